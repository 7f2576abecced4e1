"""Selective Kernel Networks (arXiv:1903.06586) for timm. Importing this package registers the models."""

from timm_sknet import sknets  # noqa: F401  registers the models
from timm_sknet.layers import SelectiveKernelAttn, SelectiveKernelConv
from timm_sknet.network import SKNet, SKNetCfg

__all__ = ['SKNet', 'SKNetCfg', 'SelectiveKernelAttn', 'SelectiveKernelConv']
__version__ = '0.1.0'
