"""Finds image files, reads them and preprocesses them in batches."""

import math
import os
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 32
MOST_PIXELS = 300_000_000  # phones take photographs of 200 million pixels
NO_PHOTOGRAPHS = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')  # data, videos and drawings beside photographs


def _raise(error: ValueError) -> None:
    raise error


def find_images(path: Union[str, Path], on_error: Callable[[ValueError], Any] = _raise) -> List[Path]:
    """Returns all images in a folder and its subfolders, sorted, or the path itself if it is not a folder.

    Images are files in the formats of photographs that Pillow opens. Links are followed. Hidden files and folders are
    left out.

    Args:
        path: A folder or a file.
        on_error: Called with the reason for each folder that cannot be read, for each broken link, for each device or
            pipe with the name of an image, and for a folder without images. By default, the first one is raised.
    """
    if not os.path.isdir(path):
        return [Path(path)]
    endings = _endings()
    files: List[Path] = []
    errors = []
    folders: List[Tuple[str, Tuple[Tuple[int, int], ...]]] = [(os.fspath(path), ())]  # with the folders around them
    while folders:
        folder, around = folders.pop()
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            entries = [] if identity in around else list(os.scandir(folder))  # a link may lead to a folder around it
        except OSError as e:
            errors.append(ValueError(f'{folder}: cannot be read: {e.strerror}'))
            continue
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            try:
                if entry.is_symlink():
                    entry.stat()  # raises an error if the link is broken
                if entry.is_dir():
                    folders.append((entry.path, (*around, identity)))
                elif os.path.splitext(entry.name)[1].lower() in endings:
                    if entry.is_file():
                        files.append(Path(entry.path))
                    else:
                        errors.append(ValueError(f'{entry.path}: cannot be read: not a regular file'))
            except OSError as e:
                problem = 'broken link' if entry.is_symlink() else 'cannot be read'
                errors.append(ValueError(f'{entry.path}: {problem}: {e.strerror}'))
    if not files and not errors:
        errors.append(
            ValueError(
                f'{path}: no image in this folder or its subfolders. Expected photographs in a format that Pillow '
                'opens, such as .jpg or .png.'
            )
        )
    for error in errors:
        on_error(error)
    return sorted(files)


def _endings() -> Set[str]:
    """Returns the file name extensions of the formats of photographs that Pillow opens."""
    Image.init()
    formats = {*Image.OPEN, 'MPO'}.difference(NO_PHOTOGRAPHS)  # Pillow opens MPO as JPEG
    return {ending for ending, name in Image.EXTENSION.items() if name in formats}


@contextmanager
def pillow_for_photographs() -> Iterator[None]:
    """Context manager in which Pillow reads images of up to `MOST_PIXELS` pixels, without warnings.

    By default, Pillow warns above 89 million pixels, and raises an error above 179 million. Its warnings do not name
    the file.
    """
    before = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            _set_up_pillow()
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _set_up_pillow() -> None:
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('error', Image.DecompressionBombWarning)


def read_image(file: Path, mode: str = 'RGB') -> Image.Image:
    """Reads an image with Pillow, rotated as its EXIF orientation says, with white instead of transparency.

    Images without EXIF orientation and transparency are read as by timm. Images with more than 8 bits per channel are
    not supported: Pillow's conversion turns most of their pixels white.

    Raises:
        ValueError: If the file cannot be read. The message names the file and the cause.
    """
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(('I', 'F')):
                raise ValueError(
                    f'{opened.mode} pixels (more than 8 bits per channel) are not supported. Convert the file to 8 '
                    'bits.'
                )
            opened.load()
            _rotate(opened)
            if not opened.has_transparency_data:
                return opened.convert(mode)
            image = Image.new('RGBA', opened.size, 'white')
            image.alpha_composite(opened.convert('RGBA'))
            return image.convert(mode)
    except UnidentifiedImageError as e:
        raise ValueError(f'{file}: not an image, or its format is not supported by Pillow.') from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f'{file}: cannot be read: {e} Reduce the size of the image.') from e
    except Exception as e:  # Pillow's decoders raise errors of many classes
        raise ValueError(f'{file}: cannot be read: {getattr(e, "strerror", None) or str(e) or repr(e)}') from e


def _rotate(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data raises errors of many classes; the pixels are not affected
        pass


class ImageFiles(Dataset):
    """Dataset of image files, preprocessed for a model as its cfg says.

    If an image cannot be read, the item is the ValueError with the reason.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path]):
        self.files = files
        self.config = resolve_data_config({}, model=model)
        self.mode = 'RGB' if self.config['input_size'][0] == 3 else 'L'  # as in timm's validate.py
        self.transform = create_transform(**self.config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Union[Tensor, ValueError]:
        try:
            image = read_image(self.files[i], self.mode)
        except ValueError as e:
            return e
        try:
            return self.preprocess(image)
        except Exception as e:  # for example out of memory, for an image of extreme proportions
            return ValueError(f'{self.files[i]}: cannot be preprocessed: {e!r}')

    def preprocess(self, image: Image.Image) -> Tensor:
        return self.transform(image)


def load_batches(
    images: Dataset,
    batch_size: int = BATCH_SIZE,
    workers: Optional[int] = 0,
    finish: Callable[[Tensor], Any] = Tensor.numpy,
) -> Iterable[Tuple[List[Optional[ValueError]], Any]]:
    """Loads a dataset of images in batches.

    Args:
        images: An `ImageFiles`, or a part of it.
        batch_size: Largest number of images in a batch.
        workers: Largest number of processes that load batches, in addition to this one. None for one per CPU core,
            with at least 8 images each, or 0 if there is only one batch.
        finish: Called with the images of a batch, in the process that loads the batch. By default, they become a NumPy
            array, because workers would send a tensor through shared memory, and containers have little of it.

    Returns:
        For each batch, the error of each image, None for images that could be read, and the result of `finish`, None if
        no image could be read.
    """
    number = len(images)  # type: ignore[arg-type]
    if workers is None:
        workers = min(_cpu_cores(), number // 8) if number > batch_size else 0
        if workers:
            batch_size = min(batch_size, math.ceil(number / workers))  # gives each of them a batch
    workers = min(workers, math.ceil(number / batch_size))
    collate = partial(_collate, finish)
    return DataLoader(images, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=_start_worker)


def _cpu_cores() -> int:
    if hasattr(os, 'sched_getaffinity'):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(number: int) -> None:
    _set_up_pillow()  # the process may not inherit it


def _collate(finish: Callable[[Tensor], Any], items: Sequence[Union[Tensor, ValueError]]) -> Any:
    errors = [item if isinstance(item, ValueError) else None for item in items]
    images = [item for item in items if isinstance(item, Tensor)]
    return errors, finish(torch.stack(images)) if images else None
