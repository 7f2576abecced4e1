"""The arithmetic of selective kernels: fuse and select (paper, section 3.1, equations 1, 2, 5 and 6).

No parameters live here. The branches stay separate tensors: they are never stacked, so the memory format of the
convolutions' outputs (`torch.channels_last` too) is the memory format of the result.
"""

from typing import List

import torch
from torch import Tensor


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
    a = a.to(U[0].dtype)[:, :, :, None, None]
    if len(U) == 2:
        return torch.lerp(U[1], U[0], a[:, 0])
    V = U[0] * a[:, 0]
    for i in range(1, len(U)):
        V = torch.addcmul(V, U[i], a[:, i])
    return V
