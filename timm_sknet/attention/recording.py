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

ADD_UP_EVERY = 64  # images; adding up each image would slow down small models


class Unit:
    """The recorded attention of one SK unit with M branches and C channels, over all images.

    The statistics are float64. They and `last` are on the device of the unit at the start of the recording.

    Attributes:
        name: The name as in the paper: SK_3_4 is the fourth unit of the third stage in the paper's table 1, where the
            stem is the first stage. If the model has no numbered stages, it is the path of the module.
        path: Path of the SK convolution in the module tree.
        extents: Effective kernel size (k - 1) D + 1 of each of the M branches, in pixels of the unit's input.
        last: Attention weights of the last batch, (B, M, C), in the order of its images and of the branches. Before the
            first batch, B is 0.
    """

    def __init__(self, name: str, path: str, branches: nn.ModuleList, attn: nn.Module):
        self.name = name
        self.path = path
        convs = [next(m for m in branch.modules() if isinstance(m, nn.Conv2d)) for branch in branches]
        self.extents = [(conv.kernel_size[0] - 1) * conv.dilation[0] + 1 for conv in convs]
        self._pending: List[Tensor] = []
        parameter = next(attn.parameters())
        with torch.inference_mode(False):  # inference tensors cannot be updated outside inference mode
            shape = (2, len(branches), convs[0].out_channels)
            self.last = parameter.new_zeros(0, *shape[1:])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=parameter.device)
            self._count = torch.zeros((), dtype=torch.int64, device=parameter.device)

    def _add(self, a: Tensor) -> None:
        self.last = a = a.detach().flatten(2)  # (B, M, C, 1, 1) in timm's SelectiveKernel
        if torch.compiler.is_compiling():  # a list would be recompiled for each length
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

    def set_sums(self, sums: Tensor, count: int) -> None:
        """Replaces the statistics: the sums of the attention and of its square, (2, M, C), over `count` images."""
        self._pending = []
        self._sums = sums.to(self._sums)
        self._count = torch.full_like(self._count, count)

    @property
    def count(self) -> int:
        """Number of images. With gradient checkpointing, an image counts twice, because the units run twice."""
        self._add_up()
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """Mean attention, (M, C). It sums to 1 over the branches.

        Raises:
            RuntimeError: If no image was recorded.
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
        """Mean attention of the widest branch minus the attention of the narrowest, (C,), as in the paper's figures."""
        return self.difference_of(self.mean)

    @property
    def extent(self) -> Tensor:
        """Mean of the branches' effective kernel sizes, weighted by the mean attention, (C,)."""
        return self.extent_of(self.mean)

    def difference_of(self, a: Tensor) -> Tensor:
        """Returns `difference` for given attention weights, (..., M, C) -> (..., C).

        If branches have the same effective kernel size, the first counts as narrow and the last as wide.
        """
        wide = max(range(len(self.extents)), key=lambda i: (self.extents[i], i))
        return a[..., wide, :] - a[..., self.extents.index(min(self.extents)), :]

    def extent_of(self, a: Tensor) -> Tensor:
        """Returns `extent` for given attention weights, (..., M, C) -> (..., C)."""
        return (a * a.new_tensor(self.extents)[:, None]).sum(-2)


_NOTHING = (
    'no forward pass was recorded. Run the model inside `with record(model)`. It must be the model itself or the '
    'result of torch.compile, not a copy or an export.'
)


@contextmanager
def record(model: nn.Module) -> Iterator[Dict[str, Unit]]:
    """Context manager that records the attention of all SK units in the forward passes of a model.

    It finds each `SelectiveKernelConv` and each `SelectiveKernel` of timm with two or more branches. The model can be
    in training mode, folded before the context, or compiled before or inside it. The outputs do not change. Only
    statistics and the attention weights of the last batches are stored, so the memory does not grow. Not thread-safe.

    Args:
        model: The model, or the result of torch.compile.

    Yields:
        The units by name, in the order of the module tree. They can be read inside the context and after it.

    Raises:
        ValueError: If the model has no SK units.
        RuntimeError: On exit, if no forward pass was recorded.
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
    """Context manager that passes every output of an attention module to a unit.

    It replaces the class of the module. torch.compile checks the class: graphs that were compiled earlier are not used
    inside the context, and are used again after it. These graphs would ignore a forward hook.
    """
    units = vars(attn).setdefault('_observers', [])
    if not units:
        cls: Any = type(attn)
        object.__setattr__(attn, '__class__', _observed_class(cls))  # some modules override __setattr__
    units.append(unit)
    try:
        yield
    finally:
        units.remove(unit)
        if not units:
            object.__setattr__(attn, '__class__', type(attn).__bases__[0])
            del vars(attn)['_observers']


@cache  # with the same class, torch.compile reuses the graphs of an earlier recording
def _observed_class(cls: Any) -> Any:
    """Returns a subclass that passes the output of each call to the units in `_observers`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # not forward: hooks can change the output
        a = cls.__call__(self, *args, **kwargs)
        for unit in self._observers:
            unit._add(a)
        return a

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # copies and saved files get the original class
        return object.__new__, (cls,), {k: v for k, v in vars(self).items() if k != '_observers'}

    names = dict(__module__=cls.__module__, __qualname__=cls.__qualname__, __doc__=cls.__doc__)
    return type(cls)(cls.__name__, (cls,), dict(__call__=__call__, __reduce_ex__=__reduce_ex__, **names))


def find_units(model: nn.Module) -> Dict[str, Tuple[str, nn.ModuleList, nn.Module]]:
    """Returns path, branches and attention module of each SK unit, by the name of the unit (see `Unit`).

    Raises:
        ValueError: If there are none.
    """
    found = []
    for path, m in model.named_modules():
        path = '.'.join(part for part in path.split('.') if part != '_orig_mod')  # torch.compile adds it
        if isinstance(m, SelectiveKernelConv) and m.attn is not None:
            found.append((path, m.branches, m.attn))
        elif isinstance(m, SelectiveKernel) and m.num_paths > 1:
            found.append((path, m.paths, m.attn))
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no SK unit with two or more branches. Supported are '
            "timm_sknet.SelectiveKernelConv and timm's SelectiveKernel, in a model that is not scripted or exported."
        )
    named = [(_paper_name(path), path) for path, _, _ in found]
    times = Counter(name for (name, _), _ in named)
    names = [
        (name if times[name] == 1 else f'{name}.{rest}') if name else path for (name, rest), path in named
    ]  # a unit of a ShuffleNet can have two SK convolutions
    times = Counter(names)
    return {name if times[name] == 1 else path: unit for name, (_, path), unit in zip(names, named, found)}


def _paper_name(path: str) -> Tuple[str, str]:
    """Returns the paper's name of the unit at a path ('' if it has none), and the rest of the path."""
    match = re.search(r'(?:^|\.)(?:stages[._]|layer)(\d+)\.(\d+)\.(.*)', path)
    if not match:
        return '', path
    stage = int(match[1]) + (2 if 'stages' in match[0] else 1)  # timm numbers layers from 1, stages from 0
    return f'SK_{stage}_{int(match[2]) + 1}', match[3]


def typical_units(names: Sequence[str]) -> List[str]:
    """Returns the units that the paper shows: the last unit of the first, the second and the last stage with units."""
    stages = {name.rsplit('_', 1)[0]: name for name in names if name.startswith('SK_')}
    last = list(stages.values()) or list(names)
    return list(dict.fromkeys([last[0], last[min(1, len(last) - 1)], last[-1]]))
