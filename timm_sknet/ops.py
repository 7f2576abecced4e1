"""The arithmetic of selective kernels: fuse and select (paper, section 3.1, equations 1, 2, 5 and 6).

No parameters live here. The branches stay separate tensors: they are never stacked, so the memory format of the
convolutions' outputs (`torch.channels_last` too) is the memory format of the result.

`fuse` and `select` are the reference. `train_unit` is what they and the batch norms before them do in training, with
less memory: it keeps nothing of a branch but the convolution's output.
"""

from typing import Any, List, Sequence

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
    keeps for backward only the maps, where that keeps U too. U is computed again in backward.

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
    affine = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    return _TrainUnit.apply(norms, attn, *maps, *affine, *attn.parameters())


class _TrainUnit(torch.autograd.Function):
    """The attention, whose maps are small, keeps an ordinary graph of its own; it is entered again in backward."""

    @staticmethod
    def forward(ctx: Any, norms: Sequence[nn.BatchNorm2d], attn: nn.Module, *inputs: Tensor) -> Tensor:
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
        s = fuse(U)
        with torch.enable_grad():
            # leaves of this graph alone, so that no hook on a parameter sees a gradient twice
            leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in attn.named_parameters()}
            s.requires_grad_()
            a = torch.func.functional_call(attn, leaves, s)
        ctx.attention = a, [s, *leaves.values()]
        ctx.eps = [norm.eps for norm in norms]
        ctx.save_for_backward(*saved)
        return select(U, a.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'In training, an SK convolution can be differentiated once only: for higher derivatives set '
                'SelectiveKernelConv.lean = False before the forward pass.'
            )
        (dV,) = grads
        M, size = len(ctx.eps), dV.shape[2] * dV.shape[3]
        saved = ctx.saved_tensors  # once: checkpointing hands them out once
        maps, weights, biases, means, invstds = (saved[i::5] for i in range(5))
        U = [
            torch.native_batch_norm(c, weight, bias, mean, invstd.pow(-2), False, 0.0, 0.0)[0].relu_()
            for c, weight, bias, mean, invstd in zip(maps, weights, biases, means, invstds)
        ]

        a, leaves = ctx.attention
        if M == 2:  # that of lerp
            buffer = torch.sub(*U).mul_(dV)
            da = buffer.sum((2, 3), dtype=a.dtype)
            da = torch.stack((da, torch.zeros_like(da)), dim=1)
        else:
            buffer = torch.empty_like(U[0])
            da = torch.stack([torch.mul(dV, u, out=buffer).sum((2, 3), dtype=a.dtype) for u in U], dim=1)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        ds, *dattn = torch.autograd.grad(a, needed, da, retain_graph=True)  # kept for a second backward, it is small
        ds = (ds / size).to(dV.dtype)

        a = a.detach()[..., None, None].to(dV.dtype)
        dmaps, dweights, dbiases = [], [], []
        for i in range(M):
            dU = torch.addcmul(ds, dV, 1 - a[:, 0] if M == 2 and i == 1 else a[:, i], out=buffer)
            dU = torch.ops.aten.threshold_backward.grad_input(dU, U[i], 0, grad_input=buffer)
            dc, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                dU, maps[i], weights[i], None, None, means[i], invstds[i], True, ctx.eps[i], [True] * 3
            )
            dmaps.append(dc)
            dweights.append(dweight)
            dbiases.append(dbias)
        found = iter(dattn)
        of_attn = [next(found) if leaf.requires_grad else None for leaf in leaves[1:]]
        return None, None, *dmaps, *dweights, *dbiases, *of_attn
