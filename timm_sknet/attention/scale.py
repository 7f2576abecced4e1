"""Measures how attention changes as images are enlarged, as in section 4.4 of the paper."""

import csv
import hashlib
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Subset

from timm_sknet.attention.recording import Unit, find_units, record
from timm_sknet.images import BATCH_SIZE, ImageFiles, load_batches
from timm_sknet.predict import fast_layout

SCALES = (1.0, 1.5, 2.0)
SAVE_EVERY = 30  # seconds between two saves of the state
MOST_ENLARGED = 16


@dataclass
class ScaleResult:
    """The attention in N images at S scales, in U units with C channels.

    Attributes:
        files: The images.
        classes: The class of each image: the name of its folder.
        scales: The factors by which the images were enlarged.
        units: The units by name. Their `mean` and `std` are over all images at all scales.
        difference: `Unit.difference`, mean over channels, (N, S, U).
        extent: `Unit.extent`, mean over channels, (N, S, U).
        profile: For each unit, `Unit.difference` of each channel, mean over images, (S, C).
    """

    files: List[Path]
    classes: List[str]
    scales: List[float]
    units: Dict[str, Unit]
    difference: Tensor
    extent: Tensor
    profile: Dict[str, Tensor]


class EnlargedImages(ImageFiles):
    """Dataset of images, enlarged around their centre and preprocessed for a model: (S, C, H, W) for S scales.

    If an image cannot be read, the item is the ValueError with the reason.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path], scales: Sequence[float]):
        super().__init__(model, files)
        # with crop_pct / scale, the image is resized to `scale` times its usual size and then cropped as usual
        self.transforms = [
            create_transform(**self.config | {'crop_pct': self.config['crop_pct'] / scale}) for scale in scales
        ]

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.stack([transform(image) for transform in self.transforms])


def scale_experiment(
    model: nn.Module,
    files: Sequence[Path],
    scales: Sequence[float] = SCALES,
    workers: Optional[int] = 0,
    state: Optional[Path] = None,
    on_error: Callable[[ValueError], Any] = lambda e: None,
    batch_size: int = BATCH_SIZE,
) -> ScaleResult:
    """Records the attention as images are enlarged around their centre (paper, section 4.4). Shows a progress bar.

    Args:
        model: The model, in eval mode. Its cfg defines the preprocessing. On a CPU, its weights are converted to
            channels_last.
        files: The images. The class of an image is the name of its folder.
        scales: Different factors from 1 to `MOST_ENLARGED`.
        workers: Number of processes that read images, as for `timm_sknet.images.load_batches`. None for 0 on a CPU,
            because the model uses all cores there.
        state: File for the progress of an interrupted run. A later run with the same model, files and scales continues
            from it. The file is removed when the run is complete.
        on_error: Called with the error for each image that cannot be read. The result does not contain these images.
        batch_size: Number of images in a forward pass. An image counts once for each scale.

    Raises:
        ValueError: If the scales are invalid, the model has no SK units, or no image can be read.
    """
    scales = [float(scale) for scale in scales]
    if not scales or not all(1 <= scale <= MOST_ENLARGED for scale in scales) or len(set(scales)) < len(scales):
        raise ValueError(f'Scales must be different numbers of at least 1 and at most {MOST_ENLARGED}, got {scales}.')
    identity = _identity(model, files, scales) if state else ''  # slow: it reads all weights
    kept = _load_state(state, identity)
    done = int(kept.pop('done', torch.tensor(0)))
    values = kept.pop('values', torch.full((len(files), 2, len(scales), len(find_units(model))), math.nan))
    device, layout = next(model.parameters()).device, fast_layout(model)
    if workers is None and device.type == 'cpu':
        workers = 0
    remaining = Subset(EnlargedImages(model, files, scales), range(done, len(files)))
    batches = load_batches(remaining, max(1, batch_size // len(scales)), workers)

    def save() -> None:
        if state and done < len(files):
            _save_state(state, identity, {'done': torch.tensor(done), 'values': values, **kept})

    saved = time.monotonic()
    try:
        with (
            record(model) as units,
            torch.inference_mode(),
            tqdm(total=len(files), initial=done, unit='image', leave=False, disable=None) as bar,
        ):
            for errors, images in batches:
                rows = [done + i for i, error in enumerate(errors) if not error]
                sums = dict(kept)
                if images is not None:
                    model(torch.from_numpy(images).flatten(0, 1).to(device, memory_format=layout))
                    for u, unit in enumerate(units.values()):
                        a = unit.last.cpu().double().unflatten(0, (len(rows), len(scales)))
                        values[rows, 0, :, u] = unit.difference_of(a).mean(-1).float()
                        values[rows, 1, :, u] = unit.extent_of(a).mean(-1).float()
                        sums[unit.name] = sums.get(unit.name, 0) + torch.stack((a, a.square())).sum(1)
                done, kept = done + len(errors), sums  # at once, because the run can be interrupted anywhere
                for error in filter(None, errors):
                    on_error(error)
                bar.update(len(errors))
                if time.monotonic() > saved + SAVE_EVERY:
                    save()
                    saved = time.monotonic()
            if not kept:
                raise ValueError('None of the images can be read.')
            read = [i for i, row in enumerate(values) if not row.isnan().any()]
            for name, unit in units.items():  # including the images of an interrupted run
                unit.set_sums(kept[name].sum(1), len(read) * len(scales))
    finally:
        save()
    if state:
        state.unlink(missing_ok=True)
    return ScaleResult(
        files=[files[i] for i in read],
        classes=[Path(files[i]).absolute().parent.name for i in read],
        scales=scales,
        units=units,
        difference=values[read, 0],
        extent=values[read, 1],
        profile={name: unit.difference_of(kept[name][0] / len(read)) for name, unit in units.items()},
    )


def table(result: ScaleResult, groups: Sequence[str]) -> List[Dict[str, Any]]:
    """Returns one row for each group of images, unit and scale, with mean difference and mean extent.

    Args:
        result: The result of an experiment.
        groups: The group of each image, such as `result.classes`.
    """
    rows = []
    for group in sorted(set(groups)):
        chosen = [i for i, name in enumerate(groups) if name == group]
        difference, extent = result.difference[chosen].mean(0).tolist(), result.extent[chosen].mean(0).tolist()
        for u, unit in enumerate(result.units.values()):
            for s, scale in enumerate(result.scales):
                rows.append(
                    dict(
                        group=group,
                        images=len(chosen),
                        unit=unit.name,
                        module=unit.path,
                        scale=scale,
                        difference=difference[s][u],
                        extent=extent[s][u],
                    )
                )
    return rows


def write_csv(rows: Sequence[Dict[str, Any]], file: Path) -> None:
    """Writes the rows of `table` to a CSV file."""
    with replacing(file) as unfinished:
        # names can contain invalid bytes
        with open(unfinished, 'w', newline='', encoding='utf-8', errors='backslashreplace') as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Context manager for writing a file atomically: yields a temporary path, which replaces the file at the end."""
    unfinished = file.with_name(f'{file.name}.unfinished')
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _identity(model: nn.Module, files: Sequence[Path], scales: Sequence[float]) -> str:
    """Returns a hash of the weights, the images and the scales of an experiment."""
    hashed = hashlib.sha256(repr(scales).encode())
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for file in files:
        found = os.stat(file) if os.path.exists(file) else None
        hashed.update(repr((str(file), found and (found.st_size, found.st_mtime_ns))).encode())
    return hashed.hexdigest()


def _save_state(state: Path, identity: str, tensors: Dict[str, Tensor]) -> None:
    with replacing(state) as unfinished:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, {'run': identity})
        except SafetensorError as e:
            raise OSError(f'{state}: the progress cannot be saved: {e}') from e


def _load_state(state: Optional[Path], identity: str) -> Dict[str, Tensor]:
    """Returns the saved tensors of an interrupted run; empty if the file is invalid or from a different run."""
    try:
        if state and state.exists():
            with safe_open(state, 'pt') as f:
                if (f.metadata() or {}).get('run') == identity:
                    # copies, because Windows does not replace or remove a file that is memory-mapped
                    return {name: f.get_tensor(name).clone() for name in f.keys()}
    except SafetensorError:
        pass
    return {}
