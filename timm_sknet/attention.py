"""What the SK units of a model select: their attention, recorded during ordinary forward passes.

    with record(model) as units:
        for images in loader:
            model(images)
    units['SK_3_4'].mean  # (M, C), over all images

`scale_experiment` is the paper's: how attention changes as the object in the image grows (section 4.4).
"""

import csv
import hashlib
import math
import os
import re
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import SelectiveKernel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_sknet.layers import SelectiveKernelConv
from timm_sknet.predict import BATCH_SIZE, fast_layout, read_image

SCALES = (1.0, 1.5, 2.0)
SAVE_EVERY = 30  # seconds between two states of an experiment
MOST_ENLARGED = 16
ADD_UP_EVERY = 64  # images, so that single ones cost a small model no time


class Unit:
    """The attention of one SK unit of M branches and C channels, over all images that have passed since the beginning.

    Statistics are float64 and, like `last`, on the device that the unit was on.

    Attributes:
        name: As in the paper: SK_3_4 is the fourth unit of the stage that the paper's table 1 has third, the stem being
            the first. Where a model has no such numbers, the path of the module.
        path: Path of the SK convolution in the module tree.
        extents: Kernel extent (k - 1) D + 1 of each of the M branches, in pixels of the unit's input.
        last: Attention weights of the last batch, (B, M, C), in the order of the images and of the branches; before the
            first, B is 0.
    """

    def __init__(self, name: str, path: str, branches: nn.ModuleList, attn: nn.Module):
        self.name = name
        self.path = path
        convs = [next(m for m in branch.modules() if isinstance(m, nn.Conv2d)) for branch in branches]
        self.extents = [(conv.kernel_size[0] - 1) * conv.dilation[0] + 1 for conv in convs]
        self._pending: List[Tensor] = []
        parameter = next(attn.parameters())
        with torch.inference_mode(False):  # else they could not be written to outside that mode
            shape = (2, len(branches), convs[0].out_channels)
            self.last = parameter.new_zeros(0, *shape[1:])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=parameter.device)
            self._count = torch.zeros((), dtype=torch.int64, device=parameter.device)

    def _add(self, a: Tensor) -> None:
        self.last = a = a.detach().flatten(2)  # timm's are (B, M, C, 1, 1)
        if torch.compiler.is_compiling():  # a list would be compiled again for each length
            self._sum(a)
            return
        self._pending.append(a)
        if len(self._pending) * max(1, a.shape[0]) >= ADD_UP_EVERY:
            self._add_up()

    def _add_up(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            self._sum(torch.cat(pending))

    def _sum(self, a: Tensor) -> None:
        a = a.double()
        self._count += a.shape[0]
        self._sums += torch.stack((a, a.square())).sum(1)

    @property
    def count(self) -> int:
        """Number of images. With gradient checkpointing each counts twice, as its units run twice."""
        self._add_up()
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """Mean attention, (M, C); it sums to 1 over the branches.

        Raises:
            RuntimeError: Where no image has passed.
        """
        if not self.count:
            raise RuntimeError(f'{self.name} has no attention yet: {_NOTHING}')
        return self._sums[0] / self._count

    @property
    def std(self) -> Tensor:
        """Standard deviation of the attention over images, (M, C)."""
        mean = self.mean
        return (self._sums[1] / self._count - mean.square()).clamp(min=0).sqrt()

    @property
    def difference(self) -> Tensor:
        """Mean attention to the widest branch less that to the narrowest, (C,): the paper's figures show it."""
        return self.difference_of(self.mean)

    @property
    def extent(self) -> Tensor:
        """Effective kernel extent by channel, (C,): the branches' extents weighed by the mean attention."""
        return self.extent_of(self.mean)

    def difference_of(self, a: Tensor) -> Tensor:
        """Returns `difference` of the attention weights of any images, (..., M, C) -> (..., C).

        Among branches of the same extent, the first is taken for narrow and the last for wide.
        """
        wide = max(range(len(self.extents)), key=lambda i: (self.extents[i], i))
        return a[..., wide, :] - a[..., self.extents.index(min(self.extents)), :]

    def extent_of(self, a: Tensor) -> Tensor:
        """Returns `extent` of the attention weights of any images, (..., M, C) -> (..., C)."""
        return (a * a.new_tensor(self.extents)[:, None]).sum(-2)


_NOTHING = (
    'no forward pass was seen. Run the model within `with record(model)`: the model itself or what torch.compile '
    'returned for it, not a copy and not an export.'
)


@contextmanager
def record(model: nn.Module) -> Iterator[Dict[str, Unit]]:
    """Records the attention of every SK unit of a model in its forward passes, while the context lasts.

    The units are those of `SelectiveKernelConv` and of timm's `SelectiveKernel` with two branches or more, wherever in
    the model they are. The model may be folded, in training mode, or compiled, before or within the context. Memory is
    bounded: running statistics and the weights of the last batches are kept, no map. Outputs do not change. For one
    thread.

    Args:
        model: The model, or what torch.compile returned for it.

    Yields:
        The units by name, in the order of the module tree. They can be read in the context and after it.

    Raises:
        ValueError: For a model without SK units.
        RuntimeError: At the end, where no forward pass was seen.
    """
    units = {}
    with ExitStack() as stack:
        for name, (path, branches, attn) in find_units(model).items():
            units[name] = Unit(name, path, branches, attn)
            stack.enter_context(_observed(attn, units[name]))
        yield units
    if not any(unit.count for unit in units.values()):
        raise RuntimeError(f'Nothing was recorded: {_NOTHING}')


@contextmanager
def _observed(attn: nn.Module, unit: Unit) -> Iterator[None]:
    """Hands every output of an attention to a unit, while the context lasts.

    The class of the attention is swapped, because torch.compile guards on it: a graph from before is not used in the
    context, and is used again after it. A forward hook would not be seen by that graph.
    """
    units = vars(attn).setdefault('_observers', [])
    if not units:
        cls: Any = type(attn)
        object.__setattr__(attn, '__class__', _observed_class(cls))  # some modules of torch override __setattr__
    units.append(unit)
    try:
        yield
    finally:
        units.remove(unit)
        if not units:
            object.__setattr__(attn, '__class__', type(attn).__bases__[0])
            del vars(attn)['_observers']


@cache  # the same class each time, so that the graphs of an earlier recording are used again
def _observed_class(cls: Any) -> Any:
    """Returns a subclass that hands the output of each call to `_observers`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # forward would miss what hooks change
        a = cls.__call__(self, *args, **kwargs)
        for unit in self._observers:
            unit._add(a)
        return a

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # a copy or a file holds a module of the original class
        return object.__new__, (cls,), {k: v for k, v in vars(self).items() if k != '_observers'}

    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__, __doc__=cls.__doc__)
    return type(cls)(cls.__name__, (cls,), dict(__call__=__call__, __reduce_ex__=__reduce_ex__, **names))


def find_units(model: nn.Module) -> Dict[str, Tuple[str, nn.ModuleList, nn.Module]]:
    """Returns path, branches and attention of each SK unit by its name (see `Unit`).

    Raises:
        ValueError: Where there is none.
    """
    found = []
    for path, m in model.named_modules():
        path = '.'.join(part for part in path.split('.') if part != '_orig_mod')  # which torch.compile adds
        if isinstance(m, SelectiveKernelConv) and m.attn is not None:
            found.append((path, m.branches, m.attn))
        elif isinstance(m, SelectiveKernel) and m.num_paths > 1:
            found.append((path, m.paths, m.attn))
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no SK unit of two or more branches to record. Known are those of '
            "timm_sknet.SelectiveKernelConv and of timm's SelectiveKernel, in a model that is not scripted or exported."
        )
    named = [(_paper_name(path), path) for path, _, _ in found]
    times = Counter(name for (name, _), _ in named)
    names = [
        (name if times[name] == 1 else f'{name}.{rest}') if name else path for (name, rest), path in named
    ]  # units of ShuffleNets may have two SK convolutions
    times = Counter(names)
    return {name if times[name] == 1 else path: unit for name, (_, path), unit in zip(names, named, found)}


def _paper_name(path: str) -> Tuple[str, str]:
    """Returns the paper's name of the unit at a path, '' where it has none, and the path within the unit."""
    match = re.search(r'(?:^|\.)(?:stages[._]|layer)(\d+)\.(\d+)\.(.*)', path)
    if not match:
        return '', path
    stage = int(match[1]) + (2 if 'stages' in match[0] else 1)  # timm counts layers from 1, stages from 0
    return f'SK_{stage}_{int(match[2]) + 1}', match[3]


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


def typical_units(names: Sequence[str]) -> List[str]:
    """Returns the units that the paper shows: the last of the first, the second and the last stage that has some."""
    stages = {name.rsplit('_', 1)[0]: name for name in names if name.startswith('SK_')}
    last = list(stages.values()) or list(names)
    return list(dict.fromkeys([last[0], last[min(1, len(last) - 1)], last[-1]]))


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
