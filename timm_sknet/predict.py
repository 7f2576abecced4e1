"""Classifies image files with any timm model, for `timm-sknet predict`."""

import difflib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from timm.data import resolve_data_config
from torch import Tensor, nn

from timm_sknet.images import BATCH_SIZE, ImageFiles, load_batches
from timm_sknet.labels import class_names

PHOTOS = Path(__file__).parent / 'photos'


@dataclass(frozen=True)
class Prediction:
    """A class of an image with its probability."""

    label: str
    index: int
    probability: float


def load_model(name: str, device: Optional[str] = None) -> nn.Module:
    """Loads a classifier with its pretrained weights, in eval mode.

    Args:
        name: A registered name, 'hf-hub:ORG/REPO' or 'local-dir:FOLDER'.
        device: Where the model runs, such as 'cpu'. None for the accelerator that torch detects, or the CPU.

    Raises:
        RuntimeError: If the model or its weights do not exist or cannot be loaded, or if the device is not available.
            The message names the remedy.
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
    chosen = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu')
    try:
        return model.eval().to(chosen)
    except Exception as e:  # each backend has its own errors
        reason = str(e).strip().split('\n')[0].rstrip('.')
        raise RuntimeError(f'Device {str(chosen)!r} cannot be used: {reason}. Use --device cpu.') from e


def fast_layout(model: nn.Module) -> torch.memory_format:
    """Converts a model on a CPU or an NVIDIA GPU to channels_last, which is faster for batches there.

    Returns:
        The memory format for the images.
    """
    if next(model.parameters()).device.type not in ('cpu', 'cuda'):
        return torch.preserve_format
    model.to(memory_format=torch.channels_last)
    return torch.channels_last


def _most_probable(
    model: nn.Module, layout: torch.memory_format, topk: int, images: Tensor
) -> List[List[Tuple[float, int]]]:
    """Returns the probabilities and indices of the most probable classes of each image."""
    with torch.inference_mode():
        x = images.to(next(model.parameters()).device, memory_format=layout)
        top = model(x).float().softmax(-1).topk(topk)
    return [list(zip(*row)) for row in zip(top.values.tolist(), top.indices.tolist())]


def classify(
    model: nn.Module,
    files: Sequence[Path],
    topk: int = 5,
    batch_size: int = BATCH_SIZE,
    workers: Optional[int] = 0,
) -> Iterator[Tuple[Path, Union[List[Prediction], ValueError]]]:
    """Classifies files in batches, preprocessed as the model's cfg says.

    Args:
        model: A classifier in eval mode. On a CPU or an NVIDIA GPU, its weights are converted to channels_last.
        files: Images in any format that Pillow reads.
        topk: Number of classes for each image, or all if there are fewer.
        batch_size: Number of images in a forward pass.
        workers: Number of processes that read images, as for `load_batches`. On a CPU, each of them also runs the model
            on its batches, which is faster than a model that shares the CPU cores with them.

    Yields:
        Each file with its most probable classes, the best first, or with the error that says why it cannot be read.
    """
    names, layout = class_names(model), fast_layout(model)
    run = partial(_most_probable, model, layout, min(topk, len(names)))
    on_cpu = next(model.parameters()).device.type == 'cpu'
    remaining = iter(files)
    finish = run if on_cpu else Tensor.numpy
    for errors, found in load_batches(ImageFiles(model, files), batch_size, workers, finish):
        if found is not None and not on_cpu:
            found = run(torch.from_numpy(found))
        rows = iter(found or ())
        for error, file in zip(errors, remaining):
            yield file, error or [Prediction(names[i], i, p) for p, i in next(rows)]
