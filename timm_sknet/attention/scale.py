"""The paper's experiment: how attention changes as the object in the image grows (section 4.4)."""

import csv
import hashlib
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_sknet.attention.recording import Unit, find_units, record
from timm_sknet.images import read_image
from timm_sknet.predict import BATCH_SIZE, fast_layout

SCALES = (1.0, 1.5, 2.0)
SAVE_EVERY = 30  # seconds between two states of an experiment
MOST_ENLARGED = 16


@dataclass
class ScaleResult:
    """Attention in N images at S scales, in U units of C channels. Differences are those of `Unit.difference`.

    Attributes:
        files: The images.
        classes: The class of each, which is the name of its folder.
        scales: Factors by which the images were enlarged.
        units: The units by name. Their own statistics are of all scales together.
        difference: Mean over the channels of attention to the widest branch less that to the narrowest, (N, S, U).
        extent: Mean over the channels of the effective kernel extent, (N, S, U).
        profile: The difference by channel, mean over the images, for each unit (S, C).
    """

    files: List[Path]
    classes: List[str]
    scales: List[float]
    units: Dict[str, Unit]
    difference: Tensor
    extent: Tensor
    profile: Dict[str, Tensor]


class EnlargedImages(Dataset):
    """Images as a model's evaluation takes them, enlarged about their centre: (S, C, H, W) for S scales.

    An image that cannot be read is the ValueError that says why.
    """

    def __init__(self, model: nn.Module, files: Sequence[Path], scales: Sequence[float]):
        self.files = files
        config = resolve_data_config({}, model=model)
        self.mode = 'RGB' if config['input_size'][0] == 3 else 'L'
        # resized to `scale` times the size of the evaluation, and cropped as there
        self.transforms = [create_transform(**config | {'crop_pct': config['crop_pct'] / scale}) for scale in scales]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Union[Tensor, ValueError]:
        try:
            image = read_image(self.files[i], self.mode)
        except ValueError as e:
            return e
        return torch.stack([transform(image) for transform in self.transforms])


def scale_experiment(
    model: nn.Module,
    files: Sequence[Path],
    scales: Sequence[float] = SCALES,
    workers: int = 0,
    state: Optional[Path] = None,
    on_error: Callable[[ValueError], Any] = lambda e: None,
) -> ScaleResult:
    """Records the attention as images are enlarged about their centre (paper, section 4.4). Shows its progress.

    Args:
        model: In eval mode; its cfg says how images are preprocessed. On a CPU, its weights are put into channels_last.
        files: The images; the name of the folder that one lies in is its class.
        scales: Factors of 1 to `MOST_ENLARGED`, each once.
        workers: Processes that read images, beside this one.
        state: File that keeps what is done when a run ends early, for the next run of the same model, files and scales
            to go on from. It is removed in the end.
        on_error: Called with the reason for each image that cannot be read; it is left out of the result.

    Raises:
        ValueError: For other scales, a model without SK units, or where no image can be read.
    """
    scales = [float(scale) for scale in scales]
    if not scales or not all(1 <= scale <= MOST_ENLARGED for scale in scales) or len(set(scales)) < len(scales):
        raise ValueError(
            f'Scales, by which images are enlarged, must be numbers of at least 1 and at most {MOST_ENLARGED}, each '
            f'once, got {scales}.'
        )
    identity = _identity(model, files, scales) if state else ''  # reads all weights
    kept = _load(state, identity)
    done = int(kept.pop('done', torch.tensor(0)))
    values = kept.pop('values', torch.full((len(files), 2, len(scales), len(find_units(model))), math.nan))
    device, layout = next(model.parameters()).device, fast_layout(model)
    loader = DataLoader(
        Subset(EnlargedImages(model, files, scales), range(done, len(files))),
        batch_size=max(1, BATCH_SIZE // len(scales)),
        num_workers=workers,
        collate_fn=list,
    )

    def save() -> None:
        if state and done < len(files):
            _save(state, identity, {'done': torch.tensor(done), 'values': values, **kept})

    saved = time.monotonic()
    try:
        with (
            record(model) as units,
            torch.inference_mode(),
            tqdm(total=len(files), initial=done, unit='image', leave=False, disable=None) as bar,
        ):
            for batch in loader:
                rows = [done + i for i, images in enumerate(batch) if isinstance(images, Tensor)]
                if rows:
                    x = torch.cat([images for images in batch if isinstance(images, Tensor)])
                    model(x.to(device, memory_format=layout))
                    for u, unit in enumerate(units.values()):
                        a = unit.last.float().unflatten(0, (len(rows), len(scales))).cpu()
                        difference = unit.difference_of(a)
                        values[rows, 0, :, u] = difference.mean(-1)
                        values[rows, 1, :, u] = unit.extent_of(a).mean(-1)
                        kept[unit.name] = kept.get(unit.name, 0) + difference.sum(0, dtype=torch.float64)
                for e in batch:
                    if isinstance(e, ValueError):
                        on_error(e)
                done += len(batch)
                bar.update(len(batch))
                if time.monotonic() > saved + SAVE_EVERY:
                    save()
                    saved = time.monotonic()
            if not kept:
                raise ValueError('None of the images can be read.')
    finally:
        save()
    if state:
        state.unlink(missing_ok=True)
    read = [i for i, row in enumerate(values) if not row.isnan().any()]
    return ScaleResult(
        files=[files[i] for i in read],
        classes=[Path(files[i]).absolute().parent.name for i in read],
        scales=scales,
        units=units,
        difference=values[read, 0],
        extent=values[read, 1],
        profile={name: kept[name] / len(read) for name in units},
    )


def table(result: ScaleResult, groups: Sequence[str]) -> List[Dict[str, Any]]:
    """Returns rows of mean difference and extent for each group of images, unit and scale.

    Args:
        result: The experiment.
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
    """Writes the rows of `table`."""
    with replacing(file) as unfinished:
        with open(unfinished, 'w', newline='', errors='backslashreplace') as f:  # names can hold bytes that are no text
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of a file once all is written."""
    unfinished = file.with_name(f'{file.name}.unfinished')
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _identity(model: nn.Module, files: Sequence[Path], scales: Sequence[float]) -> str:
    """Returns what tells one run of the experiment from another: weights, images and scales."""
    hashed = hashlib.sha256(repr(scales).encode())
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for file in files:
        found = os.stat(file) if os.path.exists(file) else None
        hashed.update(repr((str(file), found and (found.st_size, found.st_mtime_ns))).encode())
    return hashed.hexdigest()


def _save(state: Path, identity: str, tensors: Dict[str, Tensor]) -> None:
    with replacing(state) as unfinished:
        save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, {'run': identity})


def _load(state: Optional[Path], identity: str) -> Dict[str, Tensor]:
    """Returns what a run has kept; nothing where it was another's, or where the file is none of ours."""
    try:
        if state and state.exists():
            with safe_open(state, 'pt') as f:
                if (f.metadata() or {}).get('run') == identity:
                    return {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError:
        pass
    return {}
