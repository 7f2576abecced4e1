"""Classifies image files with any model of timm: the work behind `timm-sknet predict`."""

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
    """One class of one image."""

    label: str
    index: int
    probability: float


def load_model(name: str) -> nn.Module:
    """Returns a classifier with its pretrained weights, in eval mode.

    Args:
        name: A registered name, 'hf-hub:ORG/REPO' or 'local-dir:FOLDER'.

    Raises:
        RuntimeError: Where there is no such model, or no weights for it; the text says why and what works instead.
        ValueError: For a model that is no classifier.
    """
    try:
        model = timm.create_model(name, pretrained=True)
    except LocalEntryNotFoundError as e:
        raise RuntimeError(
            f'The Hub cannot be reached, and there is no download of {name!r} on this machine. Use the model in the '
            'package (leave out --model) or a local folder (local-dir:FOLDER); HF_HUB_OFFLINE=1 ends the wait at once.'
        ) from e
    except Exception as e:  # names lead to files and repositories of others, which can be wrong in every way
        known = [*timm.list_models(), *timm.list_pretrained()]
        near = [] if name in known else difflib.get_close_matches(name.lower(), known, n=5)
        hint = f' The nearest names: {", ".join(near)}.' if near else ''
        reason = ' '.join(str(e).split()).rstrip('.') or repr(e)
        raise RuntimeError(f'Model {name!r} cannot be loaded: {reason}.{hint}') from e
    if not model.num_classes:
        raise ValueError(f'Model {name!r} has no classes to predict, it gives features. Choose a classifier.')
    channels = resolve_data_config({}, model=model)['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'Model {name!r} takes images of {channels} channels. Choose one for 3 (colour) or 1 (grey).')
    return model.eval()


def fast_layout(model: nn.Module) -> torch.memory_format:
    """Puts a model that is on a CPU into channels_last, which is faster there; returns the layout for its images."""
    if next(model.parameters()).device.type != 'cpu':
        return torch.preserve_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


def label_names(value: Any, num_classes: int) -> List[str]:
    """Returns the name of each class in the order of their indices.

    Args:
        value: `label_names` of a cfg: a list of texts, or a mapping from indices, in any order, to texts. The indices
            may be texts, as those of JSON are.
        num_classes: Number of classes.

    Raises:
        ValueError: For anything else, and for fewer or more names than classes.
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
        f'label_names must be a list of {num_classes} texts, or a mapping from the indices 0 to {num_classes - 1} to '
        f'texts, got {number}{reprlib.repr(value)}.'
    )


def class_names(model: nn.Module) -> List[str]:
    """Returns the name of each class: those of the cfg, else ImageNet's where their number fits, else the index.

    Where those of the cfg cannot be used, stderr says so in one line, and the names are the indices.
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
            message = f'{e} Indices are shown instead: correct config.json of the model to see names.'
            tqdm.write(f'timm-sknet: {message}', file=sys.stderr)  # beside a progress bar, not into it
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
    """Classifies files in batches, preprocessed as the model's cfg has it.

    Args:
        model: A classifier in eval mode. On a CPU, its weights are put into channels_last.
        files: Images in any format of Pillow.
        topk: Classes for each image, at most all.

    Yields:
        Each file with its classes, the likeliest first, in the order given; or with the error that says why it cannot
        be read, somewhat earlier.
    """
    config = resolve_data_config({}, model=model)
    transform = create_transform(**config)
    mode = 'RGB' if config['input_size'][0] == 3 else 'L'  # as timm's validate.py
    names, layout = class_names(model), fast_layout(model)
    for start in range(0, len(files), BATCH_SIZE):
        batch = []
        for file in files[start : start + BATCH_SIZE]:
            try:
                batch.append((file, transform(read_image(file, mode))))
            except ValueError as e:
                yield file, e
            except Exception as e:  # such as no memory for an image of extreme proportions
                yield file, ValueError(f'{file}: cannot be preprocessed: {e!r}')
        if batch:
            images = torch.stack([x for _, x in batch]).to(memory_format=layout)
            with torch.inference_mode():
                probabilities = model(images).float().softmax(-1)
            top = probabilities.topk(min(topk, len(names)))
            for (file, _), values, indices in zip(batch, top.values.tolist(), top.indices.tolist(), strict=True):
                yield file, [Prediction(names[i], i, p) for p, i in zip(values, indices, strict=True)]
