"""The SK convolution and its attention: the modules that own the parameters (paper, section 3.1)."""

import copy
import operator
from typing import List, Optional, Sequence, Tuple

import timm.layers
import torch
from timm.layers import get_norm_act_layer
from timm.layers.typing import LayerType
from torch import Tensor, nn

from timm_sknet.folding import Folded, conv_relu, fold, is_customized, is_exactly, is_one_kernel
from timm_sknet.ops import fuse, recompute_in_backward, select

Branch = Tuple[int, int, int]  # kernel size k, dilation D, groups G; G = 0 is depthwise
PAPER_BRANCHES: Tuple[Branch, ...] = ((3, 1, 32), (3, 2, 32))


# Leaf functions in a torch.fx graph, because quantizers fail on the dtype conversions inside.
torch.fx.wrap('fuse')
torch.fx.wrap('select')
torch.fx.wrap('recompute_in_backward')


@torch.fx.wrap  # data-dependent, so a leaf for symbolic tracing
def _check_batch(s: Tensor) -> None:
    if s.shape[0] == 1:
        raise ValueError(
            'The batch norm in the attention of an SK convolution cannot normalise a training batch of 1. Use a larger '
            'batch (drop_last=True in the loader), call eval(), freeze the batch norm layers, or choose a norm_layer '
            "that does not need a batch, such as 'layernorm2d'."
        )


class ConvNormAct(timm.layers.ConvNormAct):
    """timm's ConvNormAct with the method that `timm.utils.reparameterize_model` calls to fold batch norms.

    On NVIDIA GPUs, a folded layer with a ReLU runs as one kernel, see `timm_sknet.folding.is_one_kernel`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_norm_act(x)

    def conv_norm_act(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_one_kernel(x, self):
                return conv_relu(x, self.conv)
        x = self.bn(self.conv(x))
        return x if self.aa is None else self.aa(x)

    def reparameterize(self) -> None:
        if is_exactly(self, ConvNormAct):
            self.conv, self.bn = fold(self.conv, self.bn)


class SelectiveKernelAttn(nn.Module):
    """Attention over the branches: z = act(norm(W s)), a = softmax(A z) (equations 3 and 5).

    A forward hook on this module receives a. Register it before the first call of a compiled model: torch.compile
    ignores hooks that are registered later.

    Args:
        channels: Number of channels C.
        M: Number of branches.
        attn_channels: Width d of z.
        act_layer: Activation, class or name.
        norm_layer: Normalisation, class or name.
    """

    def __init__(
        self,
        channels: int,
        M: int,
        attn_channels: int,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.M = M
        self.channels = channels
        self.fc1 = nn.Conv2d(channels, attn_channels, 1, bias=False, **dd)
        self.bn = get_norm_act_layer(norm_layer, act_layer)(attn_channels, **dd)
        self.fc2 = nn.Conv2d(attn_channels, M * channels, 1, bias=False, **dd)
        self.signs: Optional[Tensor]
        self.register_buffer('signs', None, persistent=False)

    def reparameterize(self) -> None:
        """Folds the norm and, for two branches, A.

        The softmax over two logits depends only on their difference d: a_1 = sigmoid(d) and a_2 = sigmoid(-d). So the
        two halves of A are replaced by their difference.
        """
        if not is_exactly(self, SelectiveKernelAttn):
            return
        self.fc1, self.bn = fold(self.fc1, self.bn)
        fc2 = self.fc2
        one_logit = self.M == 2 and isinstance(self.bn, Folded) and self.signs is None
        if one_logit and type(fc2) is nn.Conv2d and fc2.bias is None and not is_customized(fc2):
            first, second = fc2.weight.detach().chunk(2)
            self.fc2 = copy.deepcopy(fc2)
            self.fc2.weight = nn.Parameter(first - second, requires_grad=fc2.weight.requires_grad)
            self.fc2.out_channels //= 2
            self.signs = first.new_tensor([[1.0], [-1.0]])

    def forward(self, s: Tensor) -> Tensor:
        """Maps the statistics s, (B, C, 1, 1), to the attention weights a, (B, M, C), which sum to 1 over M.

        Raises:
            ValueError: If a batch norm in training mode gets a batch of 1.
        """
        if not torch.jit.is_scripting():
            if self.bn.training and isinstance(self.bn, nn.BatchNorm2d):
                _check_batch(s)
        z = self.bn(self.fc1(s))
        logits = self.fc2(z)
        if self.signs is not None:
            return (logits.reshape(-1, 1, self.channels) * self.signs).sigmoid()
        return logits.reshape(-1, self.M, self.channels).softmax(dim=1)


class SelectiveKernelConv(nn.Module):
    """SK convolution: (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).

    Branch i computes U_i by a grouped k_i x k_i convolution with dilation D_i, norm and activation. The output is
    V = sum_i a_i U_i, channel by channel, with the attention a = softmax(A act(norm(W mean(sum_i U_i)))). With one
    branch the softmax is 1. Then V = U_1, and the layer has no attention parameters.

    With `attention=False`, V = sum_i U_i (equation 1), to compare networks with and without attention.

    Args:
        in_channels: Number of input channels C_in.
        out_channels: Number of output channels C; C_in if None.
        branches: Kernel size, dilation and groups of each of the M >= 1 branches; 0 groups mean depthwise.
        stride: Stride of every branch.
        dilation: Factor that multiplies the dilation of every branch.
        r: Reduction ratio of the attention; its width is d = max(C / r, L).
        L: Minimum attention width.
        attn_channels: Attention width d, used instead of r and L.
        attention: Whether the branches are weighted by attention. If False, V is their sum.
        split_input: Branch i gets the i-th of M equal parts of the input channels, instead of all of them.
        act_layer: Activation of branches and attention, class or name.
        norm_layer: Normalisation of branches and attention, class or name.
        memory_efficient: In training, save one map of each branch for backward instead of two, and recompute the
            other one; see `timm_sknet.ops.recompute_in_backward`.

    Raises:
        ValueError: If branches, stride, dilation, attention width or a Boolean argument are not valid.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Optional[int] = None,
        branches: Sequence[Branch] = PAPER_BRANCHES,
        stride: int = 1,
        dilation: int = 1,
        r: float = 16,
        L: int = 32,
        attn_channels: Optional[int] = None,
        attention: bool = True,
        split_input: bool = False,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        memory_efficient: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_flags(attention=attention, split_input=split_input, memory_efficient=memory_efficient)
        dd = {'device': device, 'dtype': dtype}
        self.split_input = split_input
        self.memory_efficient = memory_efficient
        out_channels = in_channels if out_channels is None else out_channels
        branches = check_branches(branches)
        if split_input and in_channels % len(branches):
            raise ValueError(
                f'With split_input, in_channels must be divisible by the number of branches ({len(branches)}), got '
                f'{in_channels}. Choose another width or number of branches.'
            )
        in_channels //= len(branches) if split_input else 1
        branches = [(k, D, G or in_channels) for k, D, G in branches]
        for k, D, G in branches:
            if in_channels % G or out_channels % G:
                raise ValueError(
                    f'Input and output channels of branch {[k, D, G]} must be divisible by its {G} groups, got '
                    f'{in_channels} and {out_channels}. Choose other groups.'
                )
        if attn_channels is None:
            if r <= 0:
                raise ValueError(f'r must be positive, got {r}.')
            attn_channels = max(int(out_channels / r), L)
        for name, value in ('stride', stride), ('dilation', dilation), ('attention width', attn_channels):
            if value < 1:
                raise ValueError(f'The {name} of an SK convolution must be at least 1, got {value}.')

        self.branches = nn.ModuleList(
            [
                ConvNormAct(
                    in_channels,
                    out_channels,
                    k,
                    stride=stride,
                    padding=D * dilation * (k // 2),
                    dilation=D * dilation,
                    groups=G,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
                for k, D, G in branches
            ]
        )
        self.attn = None
        if attention and len(branches) > 1:
            self.attn = SelectiveKernelAttn(
                out_channels,
                len(branches),
                attn_channels,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.split_input:
            parts = x.chunk(len(self.branches), dim=1)
            U = [branch(parts[i]) for i, branch in enumerate(self.branches)]
        else:
            U = [branch(x) for branch in self.branches]
        if self.attn is None:
            V = U[0]
            for i in range(1, len(U)):
                V = V + U[i]
            return V
        a = self.attn(fuse(U))
        V = select(U, a)
        if not torch.jit.is_scripting():
            if self.memory_efficient:
                return recompute_in_backward(U, V)
        return V


def check_flags(**flags: bool) -> None:
    """Raises a ValueError if an argument is not a bool, such as the text 'false' from timm's `--model-kwargs`."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}.')


def check_branches(branches: Sequence[Branch]) -> List[Branch]:
    """Returns the branches as tuples of integers.

    Raises:
        ValueError: If there is no branch, or if a branch is not (kernel size, dilation, groups).
    """
    form = 'a sequence of (kernel size, dilation, groups), such as [[3, 1, 32], [3, 2, 32]]'
    try:
        triples = [(operator.index(k), operator.index(D), operator.index(G)) for k, D, G in branches]
    except (TypeError, ValueError):
        raise ValueError(f'branches must be {form}, got {branches!r}.') from None
    if not triples:
        raise ValueError(f'branches must be {form}, with at least one branch, got {branches!r}.')
    for k, D, G in triples:
        if k < 1 or k % 2 == 0 or D < 1 or G < 0:
            raise ValueError(
                f'A branch needs an odd kernel size, a dilation of at least 1 and groups of at least 0 (0: depthwise), '
                f'got {[k, D, G]}.'
            )
    return triples
