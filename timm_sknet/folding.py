"""Folds batch norms into the convolutions before them, for inference."""

import copy
from typing import Any, Mapping, Optional, Tuple, Type

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

BATCH_NORMS = BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d


class Folded(nn.Module):
    """Replaces a batch norm that was folded into a convolution; applies its activation."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError(
                'A folded (reparameterized) model cannot train. Call eval(), or train the original model.'
            )
        return self.act(x)


def fold(conv: nn.Module, norm: nn.Module) -> Tuple[nn.Module, nn.Module]:
    """Folds a batch norm, with its running statistics, into the convolution before it.

    Args:
        conv: The convolution. It is not changed, because other modules may share it.
        norm: One of timm's norm-activation layers.

    Returns:
        The folded convolution and the activation, to replace `conv` and `norm`. If one of them is of another class or
        has hooks, or if the norm has no running statistics, `conv` and `norm` are returned unchanged.
    """
    if type(conv) is not nn.Conv2d or type(norm) not in BATCH_NORMS or norm.running_var is None:
        return conv, norm
    if any(is_customized(m) for m in (conv, norm, norm.drop)):
        return conv, norm
    folded, act, norm = copy.deepcopy(conv), copy.deepcopy(norm.act), copy.deepcopy(norm).double()
    bias = None if conv.bias is None else conv.bias.double()
    fused = fuse_conv_bn_weights(
        conv.weight.double(), bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    for name, value in zip(('weight', 'bias'), fused):
        trainable = conv.weight.requires_grad
        setattr(folded, name, nn.Parameter(value.detach().to(conv.weight), requires_grad=trainable))
    return folded, Folded(act).train(conv.training)


def is_one_kernel(x: Tensor, layer: nn.Module, act: Optional[nn.Module] = None) -> bool:
    """Returns whether `conv_relu` computes the same as a folded layer and its activation.

    Args:
        x: The input of the layer.
        layer: The layer, with the attributes `conv`, `bn` and `aa` of timm's ConvNormAct.
        act: An activation after a layer that has none. By default, the activation of the layer.
    """
    conv, norm = layer.conv, layer.bn
    if type(norm) is not Folded or not runs_in_cudnn(x):
        return False
    if type(conv) is not nn.Conv2d or norm.training or layer.aa is not None:
        return False
    if act is None:
        act = norm.act
    elif type(norm.act) is not nn.Identity or is_customized(norm.act):
        return False
    if type(act) is not nn.ReLU or any(is_customized(m) for m in (conv, norm, act)):
        return False
    weight = conv.weight
    if not {x.dtype, weight.dtype} <= {torch.float16, torch.bfloat16, torch.float32}:
        return False
    if x.dtype != weight.dtype and not torch.is_autocast_enabled('cuda'):
        return False
    # the kernels do not check the shape
    if x.dim() != 4 or x.shape[1] != conv.in_channels or max(x.numel(), x[:, 0].numel() * conv.out_channels) >= 2**31:
        return False
    if conv.padding_mode != 'zeros' or isinstance(conv.padding, str) or type(weight) not in (Tensor, nn.Parameter):
        return False
    return conv.groups == 1 or conv.groups < conv.in_channels  # torch has its own kernels for depthwise convolutions


def runs_in_cudnn(x: Tensor) -> bool:
    """Returns whether `conv_relu` supports x: on an NVIDIA GPU, without autograd, compilers, transforms and modes.

    This needs `torch.backends.cudnn.benchmark`, because cuDNN's own choice of a kernel can be slow (pytorch issue
    68506).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if type(x) is not Tensor or not x.is_cuda or not torch.version.cuda:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    cudnn = torch.backends.cudnn
    if not cudnn.is_available() or not cudnn.enabled or not cudnn.benchmark:
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)  # tested with 9.0


def conv_relu(x: Tensor, conv: nn.Conv2d, shortcut: Optional[Tensor] = None) -> Tensor:
    """Computes ReLU(conv(x) + shortcut) in one kernel of cuDNN."""
    dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else x.dtype
    bias = None if conv.bias is None else conv.bias.to(dtype)
    x, weight = x.to(dtype), conv.weight.to(dtype)
    options: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *options)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut.to(dtype), 1.0, bias, *options)


def is_exactly(m: nn.Module, cls: Type[nn.Module]) -> bool:
    """Returns whether the module has the `forward` of this class: not of a subclass, and not one of its own."""
    return type(m) is cls and 'forward' not in vars(m)


def is_customized(m: nn.Module) -> bool:
    """Returns whether a call of the module runs more than its class defines: hooks, or a `forward` of its own."""
    # torch has no public API that lists hooks
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks) or 'forward' in vars(m)


def is_folded(state_dict: Mapping[str, Any]) -> bool:
    """Returns whether the weights come from a folded SKNet: its convolutions have a bias and no batch norm."""
    return any(key.endswith('.conv.bias') for key in state_dict)
