"""Finds and reads image files."""

import os
from pathlib import Path
from typing import List, Union

from PIL import Image, UnidentifiedImageError
from timm.data import get_img_extensions


def find_images(path: Union[str, Path]) -> List[Path]:
    """Returns the file itself, or all images below a folder, sorted.

    Raises:
        ValueError: For a folder without images.
    """
    if not os.path.isdir(path):
        return [Path(path)]
    endings = (*get_img_extensions(), '.bmp', '.webp')
    files = sorted(file for file in Path(path).rglob('*') if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise ValueError(f'{path}: there is no image in this folder, nor below it. Looked for {", ".join(endings)}.')
    return files


def read_image(file: Path, mode: str = 'RGB') -> Image.Image:
    """Returns the whole image, decoded as timm's readers do: by Pillow, converted to `mode`, not turned by EXIF.

    Images of more than 8 bits a channel are refused, because Pillow's conversion turns most of their pixels white.

    Raises:
        ValueError: For whatever is wrong with the file, which the text names.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(('I', 'F')):
                raise ValueError(f'{image.mode} pixels, more than 8 bits a channel. Convert it to 8 bits first.')
            return image.convert(mode)
    except UnidentifiedImageError as e:
        raise ValueError(f'{file}: not an image, or in no format that Pillow reads.') from e
    except Exception as e:  # Pillow's decoders raise whatever they meet
        raise ValueError(f'{file}: cannot be read: {getattr(e, "strerror", None) or str(e) or repr(e)}') from e
