"""Fuse and select, the operations of an SK convolution (paper, section 3.1, equations 1, 2, 5 and 6).

The functions have no parameters. They never stack the branches, so the result has the memory format of the
convolutions' outputs, `torch.channels_last` included.

`fuse` and `select` compute the forward pass. `recompute_in_backward` only changes what autograd saves for backward.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

# torch 2.6 has no is_exporting. There, this detects an export that does not use Dynamo (strict=False), such as ONNX's.
if not hasattr(torch.compiler, 'is_exporting'):

    def _is_exporting() -> bool:
        return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()

else:
    _is_exporting = torch.compiler.is_exporting


def fuse(U: List[Tensor]) -> Tensor:
    """Computes the mean over space of the element-wise sum of the branches (equations 1 and 2).

    The mean of each branch is computed separately, in float32 or wider. So neither the sum over the branches nor the
    sum over a large map overflows in half precision.

    Args:
        U: The M branch outputs, each (B, C, H, W).

    Returns:
        The channel statistics s, (B, C, 1, 1), in the branches' dtype.
    """
    s = _mean(U[0])
    for i in range(1, len(U)):
        s = s + _mean(U[i])
    return s.to(U[0].dtype)


def _mean(u: Tensor) -> Tensor:
    """Computes the mean over space, (B, C, 1, 1), in float32 or wider.

    Eager code divides a sum, because the backward of `mean` allocates a whole map. So does the backward of a sum with a
    wider dtype, which `_WiderMean` replaces. Exported graphs use `mean`, which is one operator.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    if not torch.jit.is_scripting():
        if _is_exporting() or torch.jit.is_tracing():
            if u.dtype == dtype:  # LiteRT does not support the argument dtype
                return u.mean((2, 3), keepdim=True)
            return u.mean((2, 3), keepdim=True, dtype=dtype)
        if u.dtype != dtype and u.requires_grad and not torch.compiler.is_compiling():
            return _WiderMean.apply(u, dtype)
    return u.sum((2, 3), keepdim=True, dtype=dtype) / (u.shape[2] * u.shape[3])


class _WiderMean(torch.autograd.Function):
    """The mean over space in a wider dtype. Its backward converts one value for each channel, not a whole map."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, dtype: torch.dtype) -> Tensor:
        return u.sum((2, 3), keepdim=True, dtype=dtype) / (u.shape[2] * u.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Tensor, torch.dtype], output: Tensor) -> None:
        u, ctx.wider = inputs
        ctx.shape, ctx.dtype = u.shape, u.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype).expand(ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _WiderMean.forward(tangent, ctx.wider)


def select(U: List[Tensor], a: Tensor) -> Tensor:
    """Computes the weighted sum of the branches, channel by channel (equations 5 and 6).

    For two branches this is a linear interpolation.

    Args:
        U: The M >= 2 branch outputs, each (B, C, H, W).
        a: The attention weights, (B, M, C), which sum to 1 over M.

    Returns:
        V, (B, C, H, W), in the branches' dtype and memory format.
    """
    a = a.to(U[0].dtype).unsqueeze(3).unsqueeze(4)
    if len(U) == 2:
        if not torch.jit.is_scripting():
            if _is_exporting() or torch.jit.is_tracing():  # lerp would be eight operators in ONNX
                return U[1] + a.select(1, 0) * (U[0] - U[1])
        return torch.lerp(U[1], U[0], a.select(1, 0))
    V = U[0] * a.select(1, 0)
    for i in range(1, len(U)):
        V = torch.addcmul(V, U[i], a.select(1, i))
    return V


def recompute_in_backward(U: List[Tensor], V: Tensor) -> Tensor:
    """Makes autograd free the branch outputs after a forward pass and recompute them in backward.

    Autograd saves two maps for each branch: the output of the convolution (for the batch norm) and U_i (for the ReLU
    and for `select`). This function keeps only the output of the convolution. Backward recomputes U_i from it, once for
    both uses. Derivatives of any order stay the same.

    U_i is recomputed only if the autograd graph shows that it is ReLU(batch norm(convolution)), where the ReLU works in
    place and the batch norm uses batch statistics and has trainable parameters. Any other U_i is kept, for example if
    it has another activation, or if a hook or a function mode has changed it. Changes that autograd does not see
    (through `.data` or by a `TorchDispatchMode`) are not detected. If other saved-tensor hooks are active, as in
    checkpointing, they decide what is kept. Inside transforms of torch.func, every U_i is kept.

    Args:
        U: The M >= 2 branch outputs, each (B, C, H, W).
        V: `select` of them.

    Returns:
        V itself.
    """
    # The compiler decides what to keep. In nested transforms of torch.func, the hooks below would lose derivatives.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return V
    # PyTorch's notes on autograd document the attributes `_saved_` and `_raw_saved_`.
    for u, (node, index, saved) in zip(U, _uses(V, len(U))):
        relu: Any = u.grad_fn
        if relu is not _input(node, ('LerpBackward1', 'AddcmulBackward0', 'MulBackward0'), index):
            continue
        norm = _input(relu, ('ReluBackward0',), 0)
        affine: List[Any] = [getattr(_input(norm, BATCH_NORMS, i), 'variable', None) for i in (1, 2)]
        # 16-bit parameters come with 16-bit statistics, which do not give exactly the same U_i
        if any(p is None or p.itemsize < 4 for p in affine) or not norm._saved_training:
            continue
        if u._version != 1:  # counts in-place changes: the ReLU must be the only one
            continue
        output = _RecomputedOutput()
        try:
            relu._raw_saved_result.register_hooks(output.pack, output.unpack)
            getattr(node, saved).register_hooks(output.pack, output.unpack)
            output.free(norm._saved_input, norm._saved_result1, norm._saved_result2, *affine)
        except RuntimeError:  # other hooks are registered, or the map changed in place
            pass  # hooks of ours that are already registered return U_i itself
    return V


BATCH_NORMS = 'NativeBatchNormBackward0', 'CudnnBatchNormBackward0', 'MiopenBatchNormBackward0'


class _RecomputedOutput:
    """Saves U_i for its two uses in backward: the tensor itself or, after `free`, the inputs to recompute it."""

    def __init__(self) -> None:
        self.U: Optional[Tensor] = None
        self.inputs: List[Tensor] = []

    def pack(self, U: Tensor) -> None:
        self.U = U.detach()

    def free(self, *inputs: Tensor) -> None:
        self.inputs = [t.detach() for t in inputs]
        self.versions = [t._version for t in inputs]  # it has no public name
        self.U = None

    def unpack(self, _: None) -> Tensor:
        if not self.inputs:
            assert self.U is not None
            return self.U
        U, self.U = self.U, None  # the second use takes the tensor of the first use
        if U is None:
            if self.versions != [t._version for t in self.inputs]:
                raise RuntimeError(
                    'The weight or bias of a batch norm, or its input, was changed in place between forward and '
                    'backward. Change it after backward, or set memory_efficient=False.'
                )
            c, mean, invstd, weight, bias = self.inputs
            with torch.no_grad():
                # the variance already contains eps; some releases of torch reject 0, and 1e-30 is lost in rounding
                U = self.U = torch.nn.functional.batch_norm(c, mean, invstd.pow(-2), weight, bias, eps=1e-30).relu_()
        return U


def _uses(V: Tensor, M: int) -> List[Tuple[Any, int, str]]:
    """Returns where `select` uses each branch: autograd node, index of the input, name of the saved tensor."""
    node = V.grad_fn
    if M == 2:
        return [(node, 1, '_raw_saved_end'), (node, 0, '_raw_saved_self')]
    uses = []
    for _ in range(M - 1):
        uses.append((node, 1, '_raw_saved_tensor1'))
        node = _input(node, ('AddcmulBackward0',), 0)
    return [(node, 0, '_raw_saved_self'), *reversed(uses)]


def _input(node: Any, names: Sequence[str], index: int) -> Any:
    """Returns the autograd node of an input, or None if `node` has none of the names."""
    return node.next_functions[index][0] if node is not None and node.name() in names else None
