"""The network class of all SKNets: stem -> stages of units -> head (paper, tables 1, 4 and 6)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Literal,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    calculate_drop_path_rates,
    create_act_layer,
    lecun_normal_,
)
from timm.layers.typing import LayerType
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices  # timm has no public name for it
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from timm_sknet.folding import conv_relu, fold, is_customized, is_exactly, is_one_kernel
from timm_sknet.keys import prepare_state_dict
from timm_sknet.layers import (
    PAPER_BRANCHES,
    Branch,
    ConvNormAct,
    SelectiveKernelAttn,
    SelectiveKernelConv,
    check_flags,
)


@dataclass(frozen=True)
class SKNetCfg:
    """Architecture of an SKNet. `create_model` takes each field as an argument, also as a JSON value.

    Attributes:
        unit: Kind of unit, a key of `UNITS`.
        depths: Units in each stage.
        mid_widths: Channels of each stage's SK convolutions.
        widths: Output channels of each stage.
        strides: Stride of each stage's first unit.
        stem: Channels, kernel size and stride of the first convolution.
        stem_widths: Channels of further 3x3 convolutions of stride 1 in the stem.
        stem_pool: 3x3 max pool of stride 2 after the stem: 'pad' (padding 1, as in PyTorch's ResNets), 'ceil' (no
            padding, size rounded up, as in the authors' Caffe files), 'same' (TensorFlow's SAME padding) or '' (none).
        head_width: Channels of a last 1x1 convolution before the global pool, 0 for none.
        branches: Kernel size, dilation and groups (0: depthwise) of each branch of the SK convolutions.
        r: Reduction ratio of the attention.
        L: Minimum attention width.
        attn_widths: Attention width of each stage, used instead of r and L.
        attention: Whether the branches of the SK convolutions are weighted by attention. If False, they are added.
        split_input: Each branch gets an equal part of the input channels, instead of all of them.
        shortcut_pool: A 2x2 average pool before the projection in a shortcut; the projection then has stride 1.
        act_layer: Activation of the whole network, name or class.
        norm_layer: Normalisation of the whole network, name or class.
        bn_momentum: Momentum of batch norm layers, as torch defines it; None for the default of `norm_layer`.
        bn_eps: The eps of batch norm layers; None for the default of `norm_layer`.
        init: Initialisation: 'caffe' as in the authors' Caffe files (He by fan-in; attention and classifier from a
            Gaussian with standard deviation 0.01), 'pytorch' as in their PyTorch code (He by fan-out) or 'tensorflow'
            as in SimCLRv2 (truncated Gaussian of variance 1 / fan-in; classifier as in 'caffe').
    """

    unit: str = 'bottleneck'
    depths: Sequence[int] = (3, 4, 6, 3)
    mid_widths: Sequence[int] = (128, 256, 512, 1024)
    widths: Sequence[int] = (256, 512, 1024, 2048)
    strides: Sequence[int] = (1, 2, 2, 2)
    stem: Tuple[int, int, int] = (64, 7, 2)
    stem_widths: Sequence[int] = ()
    stem_pool: str = 'pad'
    head_width: int = 0
    branches: Sequence[Branch] = PAPER_BRANCHES
    r: float = 16
    L: int = 32
    attn_widths: Optional[Sequence[int]] = None
    attention: bool = True
    split_input: bool = False
    shortcut_pool: bool = False
    act_layer: LayerType = 'relu'
    norm_layer: LayerType = 'batchnorm2d'
    bn_momentum: Optional[float] = 0.05
    bn_eps: Optional[float] = 1e-5
    init: Literal['caffe', 'pytorch', 'tensorflow'] = 'caffe'

    def __post_init__(self):
        stages = len(self.depths)
        for name in 'mid_widths', 'widths', 'strides', 'attn_widths':
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f'{name} must have one value for each of the {stages} stages, got {value!r}.')
        for name, known in ('unit', UNITS), ('stem_pool', STEM_POOLS), ('init', INITS):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {list(known)}, got {getattr(self, name)!r}.')
        if self.shortcut_pool and self.unit == 'shuffle':
            raise ValueError('Shuffle units have no projection in the shortcut, got shortcut_pool=True. Leave it out.')

    @property
    def levels(self) -> int:
        """Number of feature maps: one for each stage, plus stem and pool if a later layer reduces the resolution."""
        return len(self.depths) + bool(self.stem_pool) + (self.strides[0] > 1)

    def override(self, **kwargs: Any) -> 'SKNetCfg':
        """Returns a copy with other values; None keeps a field. A new norm layer has its own momentum and eps."""
        if kwargs.get('norm_layer') is not None:
            self = replace(self, bn_momentum=None, bn_eps=None)
        return replace(self, **{k: v for k, v in kwargs.items() if v is not None})


class UnitSpec(NamedTuple):
    """Arguments of a unit: its place in the network and the constructors of its layers."""

    in_chs: int
    mid_chs: int
    out_chs: int
    stride: int
    dilation: int  # of the layers after the strided one
    project: bool  # width or size changes, so the shortcut needs a projection
    pool: Optional[nn.Module]  # before the projection, which then has stride 1
    drop_path: float
    conv: Callable[..., Any]
    sk: Callable[..., Any]
    act: Callable[[], nn.Module]


class Stem(ConvNormAct):
    """The first convolution, with norm and activation, and further 3x3 convolutions of stride 1."""

    def __init__(self, in_chs: int, stem: Tuple[int, int, int], widths: Sequence[int], **layers: Any):
        width, kernel, stride = stem
        super().__init__(in_chs, width, kernel, stride=stride, **layers)
        pairs = zip([width, *widths], widths)
        self.more = nn.Sequential(*(ConvNormAct(before, after, 3, **layers) for before, after in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.conv_norm_act(x))

    def reparameterize(self) -> None:
        if is_exactly(self, Stem):
            self.conv, self.bn = fold(self.conv, self.bn)


class MaxPoolSame(nn.Module):
    """3x3 max pool of stride 2 with TensorFlow's SAME padding: odd sizes on both sides, even sizes only at the end.

    torch.fx cannot trace timm's `MaxPool2dSame`.
    """

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2], x.shape[3]
        return max_pool2d(pad(x, (w % 2, 1, h % 2, 1), value=-math.inf), 3, 2)


class ShortcutPool(nn.Module):
    """2x2 average pool before a projection (google-research/simclr, resnet.py).

    A pool that reduces the resolution, or whose stride was replaced by a dilation, pads with zeros and counts them. Any
    other pool averages over the map only, as TensorFlow's SAME padding does.

    Args:
        stride: Stride of the pool.
        dilation: Distance of the four averaged values.
        zeros: Pad with zeros instead of the values at the edge.
    """

    def __init__(self, stride: int, dilation: int, zeros: bool):
        super().__init__()
        padding = 0, dilation, 0, dilation  # on the right and at the bottom
        self.pad = nn.ZeroPad2d(padding) if zeros else nn.ReplicationPad2d(padding)
        self.stride = stride
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        x, d = self.pad(x), self.dilation
        if d == 1:
            return avg_pool2d(x, 2, self.stride)
        x = x[:, :, :-d] + x[:, :, d:]
        return (x[:, :, :, :-d] + x[:, :, :, d:]) / 4


class ResidualUnit(nn.Module):
    """Base class of residual units: tail(body(x)) plus the shortcut, which is the identity or a projection."""

    last: str  # name of the layer that `tail` calls

    def __init__(self, spec: UnitSpec):
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if spec.project:
            stride = spec.stride if spec.pool is None else 1
            self.shortcut = spec.conv(spec.in_chs, spec.out_chs, 1, stride=stride, padding=0, apply_act=False)
            if spec.pool is not None:
                self.shortcut = nn.Sequential(spec.pool, self.shortcut)
        self.drop_path = DropPath(spec.drop_path) if spec.drop_path else nn.Identity()
        self.act = spec.act()

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def tail(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if not torch.jit.is_scripting():
            last = getattr(self, self.last)
            if self.is_unchanged(last) and is_one_kernel(y, last, self.act):
                shortcut = self.shortcut(x)
                if shortcut.shape == (y.shape[0], last.out_channels, *y.shape[2:]):
                    return conv_relu(y, last.conv, shortcut)
        y = self.drop_path(self.tail(y))
        if torch.is_grad_enabled() or torch.jit.is_tracing():  # a trace must be the same with and without gradients
            y = y + self.shortcut(x)  # with full backward hooks on its layers, y must not be changed in place
        else:
            y += self.shortcut(x)  # in place, which avoids a new map: the residual is not needed again
        return self.act(y)

    def is_unchanged(self, last: nn.Module) -> bool:
        """Returns whether nothing comes between the convolution of the last layer and the sum, in inference."""
        drop_path = self.drop_path
        if type(self) not in (Bottleneck, BasicBlock) or type(last) is not ConvNormAct:
            return False
        if type(drop_path) not in (nn.Identity, DropPath) or drop_path.training:
            return False
        return not is_customized(last) and not is_customized(drop_path)

    def zero_init_last(self) -> None:
        """Initialises the last norm with zeros, so that the unit starts as the identity."""
        nn.init.zeros_(getattr(self, self.last).bn.weight)


class Bottleneck(ResidualUnit):
    """1x1 reduce -> SK convolution -> 1x1 increase, plus the shortcut (table 1)."""

    last = 'conv3'

    def __init__(self, spec: UnitSpec):
        super().__init__(spec)
        self.conv1 = spec.conv(spec.in_chs, spec.mid_chs, 1)
        self.sk = spec.sk(spec.mid_chs, spec.mid_chs, stride=spec.stride)
        self.conv3 = spec.conv(spec.mid_chs, spec.out_chs, 1, apply_act=False)

    def body(self, x: Tensor) -> Tensor:
        return self.sk(self.conv1(x))

    def tail(self, y: Tensor) -> Tensor:
        return self.conv3(y)


class BasicBlock(ResidualUnit):
    """SK convolution -> 3x3, plus the shortcut: the basic block of ResNets with an SK convolution as first layer."""

    last = 'conv2'

    def __init__(self, spec: UnitSpec):
        super().__init__(spec)
        self.sk = spec.sk(spec.in_chs, spec.mid_chs, stride=spec.stride)
        self.conv2 = spec.conv(spec.mid_chs, spec.out_chs, 3, dilation=spec.dilation, apply_act=False)

    def body(self, x: Tensor) -> Tensor:
        return self.sk(x)

    def tail(self, y: Tensor) -> Tensor:
        return self.conv2(y)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit with SK convolutions as depthwise 3x3 convolutions (section 4.1; details are our choice).

    A unit that keeps width and size transforms half of the channels and passes the other half on. Any other unit has
    two paths that both transform all channels, and each path gives half of the output channels.
    """

    def __init__(self, spec: UnitSpec):
        super().__init__()
        in_chs, half = spec.in_chs, spec.out_chs // 2
        self.shortcut = None
        if spec.project:
            self.shortcut = nn.Sequential(spec.sk(in_chs, in_chs, stride=spec.stride), spec.conv(in_chs, half, 1))
        self.conv1 = spec.conv(in_chs if spec.project else half, spec.mid_chs, 1)
        self.sk = spec.sk(spec.mid_chs, spec.mid_chs, stride=spec.stride)
        self.conv3 = spec.conv(spec.mid_chs, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            passed, y = self.shortcut(x), x
        else:
            passed, y = x.chunk(2, dim=1)
        y = self.conv3(self.sk(self.conv1(y)))
        # shuffle: the channels of the two halves alternate
        y = torch.cat((passed, y), dim=1)
        B, C, H, W = y.shape
        return y.reshape(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)


class Stage(nn.Sequential):
    """A sequence of units. With `grad_checkpointing`, backward recomputes their activations."""

    def __init__(self, *units: nn.Module):
        super().__init__(*units)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        for unit in self:
            x = unit(x)
        return x


UNITS = {'bottleneck': Bottleneck, 'basic': BasicBlock, 'shuffle': ShuffleUnit}
STEM_POOLS: Dict[str, Callable[[], nn.Module]] = {
    'pad': partial(nn.MaxPool2d, 3, stride=2, padding=1),
    'ceil': partial(nn.MaxPool2d, 3, stride=2, padding=0, ceil_mode=True),
    'same': MaxPoolSame,
    '': nn.Identity,
}
# The initialisation of convolutions for each `SKNetCfg.init`.
INITS: Dict[str, Callable[[Tensor], Any]] = {
    'caffe': partial(nn.init.kaiming_normal_, mode='fan_in', nonlinearity='relu'),
    'pytorch': partial(nn.init.kaiming_normal_, mode='fan_out', nonlinearity='relu'),
    'tensorflow': lecun_normal_,
}


class SKNet(nn.Module):
    """Selective Kernel Network.

    Args:
        cfg: The architecture.
        num_classes: Number of classes, 0 for pooled features.
        in_chans: Number of image channels.
        global_pool: Pooling of the head, as in timm ('' for none).
        output_stride: Image size divided by the size of the last map. Strides that would exceed it become dilations;
            None keeps all strides.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last unit; the rate rises linearly from 0.
        zero_init_last: Initialise residual units as identities (the authors do not).
        memory_efficient: Save less memory for backward; see `SelectiveKernelConv`.
        overrides: Fields of `SKNetCfg` to replace.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If a value is not valid for this network.
    """

    def __init__(
        self,
        cfg: SKNetCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        output_stride: Optional[int] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        memory_efficient: bool = False,
        device=None,
        dtype=None,
        **overrides: Any,
    ):
        super().__init__()
        cfg = cfg.override(**overrides)
        check_flags(shortcut_pool=cfg.shortcut_pool, zero_init_last=zero_init_last)
        if cfg.unit == 'shuffle' and (drop_path_rate or zero_init_last):
            raise ValueError(
                f'Shuffle units have no residual, got drop_path_rate={drop_path_rate}, '
                f'zero_init_last={zero_init_last}. Leave both arguments out.'
            )
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        layers: Dict[str, Any] = dict(act_layer=cfg.act_layer, norm_layer=cfg.norm_layer, **dd)
        conv: Callable[..., nn.Module] = partial(ConvNormAct, **layers)
        sk = partial(
            SelectiveKernelConv,
            branches=cfg.branches,
            r=cfg.r,
            L=cfg.L,
            attention=cfg.attention,
            split_input=cfg.split_input,
            memory_efficient=memory_efficient,
            **layers,
        )
        act = partial(create_act_layer, cfg.act_layer, inplace=True)

        self.stem = Stem(in_chans, cfg.stem, cfg.stem_widths, **layers)
        self.pool = STEM_POOLS[cfg.stem_pool]()
        width, reduction = [cfg.stem[0], *cfg.stem_widths][-1], cfg.stem[2]
        taps = [('stem', width, reduction)]
        if cfg.stem_pool:
            reduction *= 2
            taps.append(('pool', width, reduction))

        dilations, strides = dilate(cfg.strides, reduction, output_stride)
        rates: List[Any] = [0.0] * sum(cfg.depths)
        if drop_path_rate:  # timm reads values of a tensor, which a FakeTensorMode does not allow
            rates = calculate_drop_path_rates(drop_path_rate, len(rates))
        drop_rates = iter(rates)
        stages: List[nn.Module] = []
        dilation = 1
        for i, depth in enumerate(cfg.depths):
            units = []
            for j in range(depth):
                project = j == 0 and (cfg.strides[i] != 1 or width != cfg.widths[i])
                pool = ShortcutPool(strides[i], dilation, cfg.strides[i] > 1) if cfg.shortcut_pool else None
                spec = UnitSpec(
                    width,
                    cfg.mid_widths[i],
                    cfg.widths[i],
                    stride=strides[i] if j == 0 else 1,
                    dilation=dilations[i],
                    project=project,
                    pool=pool,
                    drop_path=next(drop_rates),
                    conv=conv,
                    sk=partial(sk, dilation=dilation, attn_channels=cfg.attn_widths[i] if cfg.attn_widths else None),
                    act=act,
                )
                units.append(UNITS[cfg.unit](spec))
                width = cfg.widths[i]
                dilation = dilations[i]  # only after the unit whose stride it replaces
            reduction *= strides[i]
            stages.append(Stage(*units))
            taps.append((f'stages.{i}', width, reduction))
        self.stages = nn.Sequential(*stages)

        # stem and pool give a feature map only if the next map is smaller
        self.feature_info: List[Dict[str, Any]] = [
            dict(module=name, num_chs=chs, reduction=red)
            for (name, chs, red), (_, _, next_red) in zip(taps, [*taps[1:], ('', 0, 0)])
            if name.startswith('stages') or red < next_red
        ]

        self.num_features = cfg.head_width or width
        self.conv_head = conv(width, cfg.head_width, 1) if cfg.head_width else nn.Identity()
        self.head: ClassifierHead
        self.reset_classifier(num_classes, global_pool, **dd)

        # the base class of torch's batch norms has no public name
        batch_norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for name, value in ('momentum', cfg.bn_momentum), ('eps', cfg.bn_eps):
            if value is not None and not batch_norms:
                raise ValueError(
                    f'bn_{name}={value} needs a batch norm, but norm_layer is {cfg.norm_layer!r}. Leave bn_{name} out.'
                )
            for m in batch_norms if value is not None else ():
                setattr(m, name, value)
        self._init_weights(cfg.init, zero_init_last)
        self.register_load_state_dict_pre_hook(prepare_state_dict)

    @torch.jit.ignore
    def _init_weights(self, init: str, zero_init_last: bool = False) -> None:
        """Initialises the weights as the authors do; see `SKNetCfg.init`."""
        if next(self.parameters()).is_meta:  # nothing to initialise, and slow there
            return
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                INITS[init](m.weight)
        if init == 'caffe':
            for m in self.modules():
                if isinstance(m, SelectiveKernelAttn):
                    nn.init.normal_(m.fc1.weight, std=0.01)
                    nn.init.normal_(m.fc2.weight, std=0.01)
        if init != 'pytorch' and self.num_classes > 0:
            nn.init.normal_(self.head.fc.weight, std=0.01)
            nn.init.zeros_(self.head.fc.bias)
        if zero_init_last:
            for m in self.modules():
                if isinstance(m, ResidualUnit):
                    m.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Groups parameters by depth, for timm's layer-wise learning rates."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.(\d+)', None),
                (r'^conv_head', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes backward recompute the activations of each unit instead of keeping them."""
        for m in self.modules():
            if isinstance(m, Stage):
                m.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None, device=None, dtype=None) -> None:
        """Replaces the classifier, and the pooling unless `global_pool` is None."""
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=self.head.global_pool.pool_type if global_pool is None else global_pool,
            drop_rate=self.drop_rate,
            device=parameter.device if device is None else device,
            dtype=parameter.dtype if dtype is None else dtype,
        ).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Returns the maps of `feature_info`, and the final features unless `intermediates_only`.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n maps if an int, all maps if None, else the maps at these positions of `feature_info`.
            norm: No effect: the maps are already normalised.
            stop_early: Stop after the last requested map.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return only the maps.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        taps = [info['module'] for info in self.feature_info]
        intermediates = []
        for name, module in self._steps():
            x = module(x)
            if name in taps:
                if taps.index(name) in take:
                    intermediates.append(x)
                if stop_early and taps.index(name) == last:
                    break
        else:
            x = self.conv_head(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Removes the layers that the maps at `indices` do not need; returns the positions of these maps."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        names = [name for name, _ in self._steps()]
        last_name = self.feature_info[last]['module']
        pruned = names[names.index(last_name) + 1 :]
        if 'pool' in pruned:
            self.pool = nn.Identity()
        self.stages = self.stages[: len(self.stages) - sum(name.startswith('stages') for name in pruned)]
        if prune_head or pruned:
            self.conv_head = nn.Identity()
            self.num_features = self.feature_info[last]['num_chs']
            self.reset_classifier(0, '')
        return take

    def _steps(self) -> List[Tuple[str, nn.Module]]:
        stages = [(f'stages.{i}', stage) for i, stage in enumerate(self.stages)]
        return [('stem', self.stem), ('pool', self.pool), *stages]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(x)
        x = self.stages(x)
        return self.conv_head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def dilate(strides: Sequence[int], reduction: int, output_stride: Optional[int]) -> Tuple[List[int], List[int]]:
    """Replaces the strides beyond `output_stride` by dilations.

    Args:
        strides: Stride of each stage.
        reduction: Image size divided by map size before the first stage.
        output_stride: Image size divided by map size after the last stage; None to keep the strides.

    Returns:
        Dilations and strides of the stages.

    Raises:
        ValueError: If no stage ends at `output_stride`.
    """
    reachable = [reduction * math.prod(strides[: i + 1]) for i in range(len(strides))]
    if output_stride is not None and output_stride not in reachable:
        raise ValueError(f'output_stride must be one of {reachable} for this network, got {output_stride}.')
    dilations, kept, dilation = [], [], 1
    for stride, reached in zip(strides, reachable):
        if output_stride is not None and reached > output_stride:
            dilation *= stride
            stride = 1
        dilations.append(dilation)
        kept.append(stride)
    return dilations, kept
