"""Classifies image files with any timm model, for `timm-sknet predict`."""

import difflib
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub.utils import LocalEntryNotFoundError, tqdm
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import nn

from timm_sknet.images import read_image

PHOTOS = Path(__file__).parent / 'photos'
BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """A class of an image with its probability."""

    label: str
    index: int
    probability: float


def load_model(name: str) -> nn.Module:
    """Loads a classifier with its pretrained weights, in eval mode.

    Args:
        name: A registered name, 'hf-hub:ORG/REPO' or 'local-dir:FOLDER'.

    Raises:
        RuntimeError: If the model or its weights do not exist or cannot be loaded. The message names the remedy.
        ValueError: If the model is not an image classifier.
    """
    try:
        model = timm.create_model(name, pretrained=True)
    except LocalEntryNotFoundError as e:
        raise RuntimeError(
            f'The Hub cannot be reached, and {name!r} is not in the cache. Use the model in the package (leave out '
            '--model) or a local folder (local-dir:FOLDER). HF_HUB_OFFLINE=1 skips the wait.'
        ) from e
    except Exception as e:  # files and repositories of others can cause any error
        known = [*timm.list_models(), *timm.list_pretrained()]
        near = [] if name in known else difflib.get_close_matches(name.lower(), known, n=5)
        hint = f' Similar names: {", ".join(near)}.' if near else ''
        reason = ' '.join(str(e).split()).rstrip('.') or repr(e)
        raise RuntimeError(f'Model {name!r} cannot be loaded: {reason}.{hint}') from e
    if not model.num_classes:
        raise ValueError(f'Model {name!r} has no classes to predict: it returns features. Choose a classifier.')
    channels = resolve_data_config({}, model=model)['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'Model {name!r} takes images with {channels} channels. Choose a model for 3 or 1 channels.')
    return model.eval()


def fast_layout(model: nn.Module) -> torch.memory_format:
    """Converts a model on a CPU to channels_last, which is faster there; returns the memory format for its images."""
    if next(model.parameters()).device.type != 'cpu':
        return torch.preserve_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


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
    """Returns the class names of the cfg, else those of ImageNet if their number fits, else the class indices.

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


def classify(
    model: nn.Module,
    files: Sequence[Path],
    topk: int = 5,
) -> Iterator[Tuple[Path, Union[List[Prediction], ValueError]]]:
    """Classifies files in batches, preprocessed as the model's cfg says.

    Args:
        model: A classifier in eval mode. On a CPU, its weights are converted to channels_last.
        files: Images in any format that Pillow reads.
        topk: Number of classes for each image, or all if there are fewer.

    Yields:
        Each file with its most probable classes, the best first, or with the error that says why it cannot be read. The
        files keep their order, but errors are yielded before the other files of their batch.
    """
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config)
    mode = 'RGB' if config['input_size'][0] == 3 else 'L'  # as in timm's validate.py
    names, layout = class_names(model), fast_layout(model)
    for start in range(0, len(files), BATCH_SIZE):
        batch = []
        for file in files[start : start + BATCH_SIZE]:
            try:
                batch.append((file, transform(read_image(file, mode))))
            except ValueError as e:
                yield file, e
            except Exception as e:  # for example out of memory, for an image of extreme proportions
                yield file, ValueError(f'{file}: cannot be preprocessed: {e!r}')
        if batch:
            images = torch.stack([x for _, x in batch]).to(memory_format=layout)
            with torch.inference_mode():
                probabilities = model(images).float().softmax(-1)
            top = probabilities.topk(min(topk, len(names)))
            for (file, _), values, indices in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
                yield file, [Prediction(names[i], i, p) for p, i in zip(values, indices, strict=True)]
