"""Finds and reads image files."""

import os
from pathlib import Path
from typing import List, Union

from PIL import Image, UnidentifiedImageError
from timm.data import get_img_extensions


def find_images(path: Union[str, Path]) -> List[Path]:
    """Returns all images in a folder and its subfolders, sorted, or the path itself if it is not a folder.

    Raises:
        ValueError: If a folder has no images.
    """
    if not os.path.isdir(path):
        return [Path(path)]
    endings = (*get_img_extensions(), '.bmp', '.webp')
    files = sorted(file for file in Path(path).rglob('*') if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise ValueError(f'{path}: no image in this folder or its subfolders. Expected one of {", ".join(endings)}.')
    return files


def read_image(file: Path, mode: str = 'RGB') -> Image.Image:
    """Reads an image as timm's readers do: decoded by Pillow, converted to `mode`, without EXIF rotation.

    Images with more than 8 bits per channel are not supported: Pillow's conversion turns most of their pixels white.

    Raises:
        ValueError: If the file cannot be read. The message names the file and the cause.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(('I', 'F')):
                raise ValueError(
                    f'{image.mode} pixels (more than 8 bits per channel) are not supported. Convert the file to 8 bits.'
                )
            return image.convert(mode)
    except UnidentifiedImageError as e:
        raise ValueError(f'{file}: not an image, or its format is not supported by Pillow.') from e
    except Exception as e:  # Pillow's decoders raise errors of many classes
        raise ValueError(f'{file}: cannot be read: {getattr(e, "strerror", None) or str(e) or repr(e)}') from e
