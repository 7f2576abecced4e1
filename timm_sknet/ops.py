"""The arithmetic of selective kernels: fuse and select (paper, section 3.1, equations 1, 2, 5 and 6).

No parameters live here. The branches stay separate tensors: they are never stacked, so the memory format of the
convolutions' outputs (`torch.channels_last` too) is the memory format of the result.

`fuse` and `select` are the reference. `train_unit` is what they and the batch norms before them do in training, with
less memory: it keeps nothing of a branch but the convolution's output.
"""

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor, nn


def fuse(U: List[Tensor]) -> Tensor:
    """Pools the element-wise sum of the branches over space (equations 1 and 2).

    Each branch is pooled by itself in float32 or wider, so neither the sum over the branches nor the sum over a large
    map can overflow a half-precision type.

    Args:
        U: The M branch outputs, each (B, C, H, W).

    Returns:
        The channel statistics s, (B, C, 1, 1), in the branches' dtype.
    """
    dtype = torch.promote_types(U[0].dtype, torch.float32)
    s = U[0].mean((2, 3), keepdim=True, dtype=dtype)
    for i in range(1, len(U)):
        s = s + U[i].mean((2, 3), keepdim=True, dtype=dtype)
    return s.to(U[0].dtype)


def select(U: List[Tensor], a: Tensor) -> Tensor:
    """Weighs the branches channel by channel (equations 5 and 6); two branches are interpolated linearly.

    Args:
        U: The M >= 2 branch outputs, each (B, C, H, W).
        a: The attention weights, (B, M, C), which sum to 1 over M.

    Returns:
        V, (B, C, H, W), in the branches' dtype and memory format.
    """
    a = a.to(U[0].dtype).unsqueeze(3).unsqueeze(4)
    if len(U) == 2:
        if not torch.jit.is_scripting():
            if torch.compiler.is_exporting() or torch.jit.is_tracing():  # in ONNX, lerp is eight operators
                return U[1] + a[:, 0] * (U[0] - U[1])
        return torch.lerp(U[1], U[0], a[:, 0])
    V = U[0] * a[:, 0]
    for i in range(1, len(U)):
        V = torch.addcmul(V, U[i], a[:, i])
    return V


def train_unit(maps: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d], attn: nn.Module) -> Tensor:
    """Batch norm, ReLU, fuse, attention and select of an SK unit in training.

    Equals `select(U, attn(fuse(U)))` of U_i = relu(norms[i](maps[i])) in values, gradients and running statistics, and
    keeps for backward only the maps, where that keeps U too. U is computed again in backward, once. The attention is
    called as any other module, and autograd goes through it.

    Args:
        maps: The M outputs of the branches' convolutions, each (B, C, H, W), with B > 1.
        norms: Their batch norms, in training mode, affine, with running statistics and a momentum.
        attn: The attention, which maps s, (B, C, 1, 1), to a, (B, M, C).

    Returns:
        V, (B, C, H, W). It can be differentiated once.
    """
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    unit = _Unit()
    affine = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    s, V = _Fuse.apply(unit, norms, *maps, *affine)
    return _Select.apply(unit, attn(s), V)


class _Unit:
    """What fuse and select hand each other beside the gradients.

    Attributes:
        U: The branches' outputs, from fuse to select in forward.
        saved: What both save for backward: map, weight, bias, mean and 1 / standard deviation of each branch.
        a: The attention weights, from select in forward to fuse in backward.
        again: U computed again, from select to fuse in backward.
    """

    U: Sequence[Tensor] = ()
    saved: Sequence[Tensor] = ()
    a: Optional[Tensor] = None
    again: Optional[List[Tensor]] = None


class _Once(torch.autograd.Function):
    """A function of first derivatives in backward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise RuntimeError(_ONCE)

    @staticmethod
    def check(grad: Tensor) -> None:
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched=True
            raise RuntimeError(_ONCE)


_ONCE = (
    'In training, an SK convolution can be differentiated once only, and backwards: for others (higher, forward, '
    'batched) set SelectiveKernelConv.lean = False before the forward pass.'
)


class _Fuse(_Once):
    """The maps give s, and a place to hand in the gradient of V: one number that pretends to be V, on no memory."""

    @staticmethod
    def forward(ctx: Any, unit: _Unit, norms: Sequence[nn.BatchNorm2d], *inputs: Tensor) -> Any:
        M = len(norms)
        U: List[Tensor] = []
        saved: List[Tensor] = []
        for norm, c, weight, bias in zip(norms, inputs, inputs[M:], inputs[2 * M :]):
            assert norm.momentum is not None
            u, mean, invstd = torch.native_batch_norm(
                c, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
            )
            U.append(u.relu_())
            saved += c, weight, bias, mean, invstd
        ctx.unit, ctx.eps = unit, [norm.eps for norm in norms]
        ctx.save_for_backward(*saved)
        unit.U, unit.saved = U, saved
        return fuse(U), U[0].new_empty(()).expand_as(U[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ds, dV = grads
        _Once.check(dV)
        unit, saved = ctx.unit, ctx.saved_tensors
        U, unit.again = unit.again or _outputs(saved), None
        M = len(U)
        # before select has run there may be a loss on the attention, and no dV
        a = dV.new_zeros(1, M, 1, 1, 1) if unit.a is None else unit.a[..., None, None].to(dV.dtype)
        ds = ds / (dV.shape[2] * dV.shape[3])
        buffer = torch.empty_like(U[0])
        dmaps, dweights, dbiases = [], [], []
        for i, (c, weight, _, mean, invstd) in enumerate(zip(*(saved[k::5] for k in range(5)))):
            dU = torch.addcmul(ds, dV, 1 - a[:, 0] if M == 2 and i == 1 else a[:, i], out=buffer)  # 1 - a: of lerp
            dU = torch.ops.aten.threshold_backward.grad_input(dU, U[i], 0, grad_input=buffer)
            dc, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dU, c, weight, None, None, mean, invstd, True, ctx.eps[i], [True] * 3
            )
            dmaps.append(dc)
            dweights.append(dweight)
            dbiases.append(dbias)
        return None, None, *dmaps, *dweights, *dbiases


class _Select(_Once):
    """The attention weights give V."""

    @staticmethod
    def forward(ctx: Any, unit: _Unit, a: Tensor, V: Tensor) -> Tensor:
        ctx.unit, unit.a = unit, a.detach()
        ctx.save_for_backward(a, *unit.saved)
        V = select(list(unit.U), a)
        unit.U = unit.saved = ()
        return V

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dV,) = grads
        _Once.check(dV)
        a, *saved = ctx.saved_tensors
        U = _outputs(saved)
        if ctx.needs_input_grad[2]:
            ctx.unit.again = U
        if len(U) == 2:  # that of lerp
            da = torch.sub(*U).mul_(dV).sum((2, 3), dtype=a.dtype)
            da = torch.stack((da, torch.zeros_like(da)), dim=1)
        else:
            buffer = torch.empty_like(U[0])
            da = torch.stack([torch.mul(dV, u, out=buffer).sum((2, 3), dtype=a.dtype) for u in U], dim=1)
        return None, da, dV


def _outputs(saved: Sequence[Tensor]) -> List[Tensor]:
    """Computes U again from what was saved."""
    return [
        torch.native_batch_norm(c, weight, bias, mean, invstd.pow(-2), False, 0.0, 0.0)[0].relu_()
        for c, weight, bias, mean, invstd in zip(*(saved[k::5] for k in range(5)))
    ]
