"""Classifies image files with any timm model, for `timm-sknet predict`."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from timm.data import create_transform, resolve_data_config
from torch import nn

from timm_sknet.images import read_image
from timm_sknet.labels import class_names

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
            '--model) or a local folder (local-dir:FOLDER). Set HF_HUB_OFFLINE=1 to use only the cache, without '
            'retries.'
        ) from e
    except Exception as e:  # files and repositories from elsewhere can cause any error
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
    """Converts a model on a CPU to channels_last, which is faster for batches there.

    Returns:
        The memory format for the images.
    """
    if next(model.parameters()).device.type != 'cpu':
        return torch.preserve_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


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
