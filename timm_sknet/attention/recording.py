"""Records the attention of SK units during ordinary forward passes."""

import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from timm.layers import SelectiveKernel
from torch import Tensor, nn

from timm_sknet.layers import SelectiveKernelConv

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


def typical_units(names: Sequence[str]) -> List[str]:
    """Returns the units that the paper shows: the last of the first, the second and the last stage that has some."""
    stages = {name.rsplit('_', 1)[0]: name for name in names if name.startswith('SK_')}
    last = list(stages.values()) or list(names)
    return list(dict.fromkeys([last[0], last[min(1, len(last) - 1)], last[-1]]))
