"""Names of classes: from a cfg, a file, the folders of the data or ImageNet, or the class indices."""

import reprlib
import sys
from pathlib import Path
from typing import Any, List

from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo, create_reader, infer_imagenet_subset
from torch import nn


def label_names(value: Any, num_classes: int) -> List[str]:
    """Returns the class names in the order of their indices.

    Args:
        value: `label_names` of a cfg: a list of strings, or a mapping from indices to strings in any order. The indices
            may be strings, as in JSON.
        num_classes: Number of classes.

    Raises:
        ValueError: If `value` has another type, or does not have one name for each class.
    """
    names = value
    if isinstance(value, dict):
        try:
            by_index = {int(index): name for index, name in value.items()}
            names = [by_index[i] for i in range(len(value))]
        except (KeyError, TypeError, ValueError):
            names = None
    if isinstance(names, (list, tuple)) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        return list(names)
    number = f'{len(value)}: ' if isinstance(value, (list, tuple, dict)) else ''
    raise ValueError(
        f'label_names must be a list of {num_classes} strings, or a mapping from the indices 0 to {num_classes - 1} to '
        f'strings, got {number}{reprlib.repr(value)}.'
    )


def class_names(model: nn.Module) -> List[str]:
    """Returns the class names of the cfg, the ImageNet names if the number of classes matches, or the class indices.

    If the names of the cfg are not valid, a line on stderr says so, and the class indices are returned.
    """
    cfg: Any = model.pretrained_cfg
    num_classes: Any = model.num_classes
    names: Any = None
    subset = infer_imagenet_subset(model)
    if cfg.get('label_names'):
        descriptions = cfg.get('label_descriptions')
        descriptions = descriptions if isinstance(descriptions, dict) else {}
        try:
            names = [descriptions.get(name, name) for name in label_names(cfg['label_names'], num_classes)]
        except ValueError as e:
            message = f'{e} Class indices are shown instead. To see names, correct config.json of the model.'
            tqdm.write(f'timm-sknet: {message}', file=sys.stderr)  # does not break a progress bar
    elif subset:
        names = ImageNetInfo(subset).label_descriptions()
    if not names or len(names) != num_classes:
        names = [str(i) for i in range(num_classes)]
    return names


def read_label_names(path: Path) -> List[str]:
    """Reads class names in the order of the class indices.

    Args:
        path: A text file with one name on each line, or a folder with one folder of images for each class. For a
            folder, the order is that of timm's train.py: the class folders by name, numbers in it as numbers, without
            regard to case.

    Raises:
        ValueError: If a name is missing, or if the file is not UTF-8 text.
        OSError: If the file cannot be read.
    """
    if path.is_dir():
        try:
            names = list(create_reader('', str(path)).class_to_idx)
        except RuntimeError as e:  # there are no images
            raise ValueError(str(e)) from e
        if '' in names:
            raise ValueError(f'{path} has images outside of its class folders. Move them to another folder.')
        return names
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not a UTF-8 text file ({e}).') from e
    names = [name.strip() for name in text.removesuffix('\n').split('\n')]
    if not all(names):
        raise ValueError(f'{path} has an empty line. Write one class name on each line.')
    return names
