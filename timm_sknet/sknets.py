"""Every SKNet by name: architectures, pretrained weights and their figures, in timm's registry.

Facts stand here once; the command line, the README's table and the tests read them from here.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)

from timm_sknet.network import SKNet, SKNetCfg, native_keys

_SHUFFLENET = SKNetCfg(
    unit='shuffle',
    depths=(4, 8, 4),
    mid_widths=(24, 48, 96),
    widths=(48, 96, 192),
    strides=(2, 2, 2),
    stem=(24, 3, 2),
    head_width=1024,
    branches=((3, 1, 0), (3, 2, 0)),
)
_SK_RESNET = SKNetCfg(
    mid_widths=(64, 128, 256, 512),
    branches=((3, 1, 1), (3, 1, 32)),
    L=0,
    bn_momentum=0.1,
    init='fan_out',
)

model_cfgs = dict(
    sknet26=SKNetCfg(depths=(2, 2, 2, 2)),
    sknet50=SKNetCfg(depths=(3, 4, 6, 3)),
    sknet101=SKNetCfg(depths=(3, 4, 23, 3)),
    sknet50_m3=SKNetCfg(branches=((3, 1, 32), (3, 2, 32), (3, 3, 32))),
    sknet29_16x32d=SKNetCfg(
        depths=(3, 3, 3),
        mid_widths=(512, 1024, 2048),
        widths=(256, 512, 1024),
        strides=(1, 2, 2),
        stem=(64, 3, 1),
        stem_pool='',
        branches=((1, 1, 16), (3, 1, 16)),
        r=32,
        L=16,
    ),
    sknet12=SKNetCfg(
        unit='basic',
        depths=(1, 2, 2),
        mid_widths=(16, 32, 96),
        widths=(16, 32, 96),
        strides=(1, 2, 2),
        stem=(16, 3, 1),
        stem_pool='',
        branches=((3, 1, 1), (3, 2, 1)),
        L=16,
    ),
    sk_shufflenetv2_x0_5=_SHUFFLENET,
    sk_shufflenetv2_x1_0=replace(_SHUFFLENET, mid_widths=(58, 116, 232), widths=(116, 232, 464)),
    sk_resnet50=_SK_RESNET,
    sk_resnet101=replace(_SK_RESNET, depths=(3, 4, 23, 3)),
)

# Top-1 accuracy in %, at the input size of the default cfg.
published = dict(  # in the paper (tables 2, 4, 5, 7) and, for sk_resnet*, by its authors with their PyTorch code
    sknet50=79.21,
    sknet101=79.81,
    sknet50_m3=79.24,
    sknet29_16x32d=96.53,
    sk_shufflenetv2_x0_5=64.65,
    sk_shufflenetv2_x1_0=71.64,
    sk_resnet50=77.538,
    sk_resnet101=78.792,
)
published_weights = {  # by whoever published the weights
    'sknet50.ra_in1k': 80.168,  # timm's results table
}
measured = {  # by us, with timm's validate.py; the README has the commands
    'sknet12.cifar10': 91.74,
}


_CAFFE = 'https://github.com/implus/SKNet'
_PYTORCH = 'https://github.com/implus/PytorchInsight'
_IMAGENET = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.875,
    interpolation='bilinear',
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    first_conv='stem.conv',
    classifier='head.fc',
    license='apache-2.0',
    origin_url=_CAFFE,
    paper_ids='arXiv:1903.06586',
    paper_name='Selective Kernel Networks',
)
_CIFAR10 = _IMAGENET | dict(
    num_classes=10,
    label_names=('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def _untrained(description: str, cfg: Dict[str, Any] = _IMAGENET, **kwargs: Any) -> Dict[str, Any]:
    notes = ('There are no public weights that timm could load; the licence is that of our code.',)
    return cfg | dict(description=description, notes=notes) | kwargs


default_cfgs = generate_default_cfgs({
    'sknet26.untrained': _untrained('SKNet-26 of the paper.'),
    'sknet50.ra_in1k': _IMAGENET | dict(
        hf_hub_id='timm/skresnext50_32x4d.ra_in1k',
        hf_hub_filename='model.safetensors',
        interpolation='bicubic',
        origin_url='https://github.com/huggingface/pytorch-image-models',
        description="SKNet-50, trained on ImageNet-1k with RandAugment as timm's skresnext50_32x4d.",
        notes=('Weights by Ross Wightman, Apache-2.0, downloaded from timm/skresnext50_32x4d.ra_in1k and renamed.',),
    ),
    'sknet101.untrained': _untrained('SKNet-101 of the paper.'),
    'sknet50_m3.untrained': _untrained('SKNet-50 of the paper with a third branch, dilation 3.'),
    'sknet29_16x32d.untrained': _untrained('SKNet-29 of the paper, for CIFAR.', _CIFAR10),
    'sknet12.cifar10': _CIFAR10 | dict(
        origin_url='https://arxiv.org/abs/1903.06586',  # the paper: the network and its weights are ours
        file=str(Path(__file__).parent / 'weights' / 'sknet12.cifar10.safetensors'),
        description='A small SKNet of basic blocks, trained on CIFAR-10 and shipped in the package.',
        notes=("Weights by the authors of timm_sknet, Apache-2.0, trained with timm's train.py.",),
    ),
    'sk_shufflenetv2_x0_5.untrained': _untrained('ShuffleNetV2 0.5x with SK convolutions, our reading of the paper.'),
    'sk_shufflenetv2_x1_0.untrained': _untrained('ShuffleNetV2 1.0x with SK convolutions, our reading of the paper.'),
    'sk_resnet50.untrained': _untrained("SK-ResNet-50*, the authors' PyTorch variant.", origin_url=_PYTORCH),
    'sk_resnet101.untrained': _untrained("SK-ResNet-101*, the authors' PyTorch variant.", origin_url=_PYTORCH),
})  # fmt: skip


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SKNet:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        if not (cfg.has_weights or cfg.source or cfg.state_dict):
            trained = [f'{name}.{tag}' for name, c in default_cfgs.items() for tag in c.tags if c.cfgs[tag].has_weights]
            raise ValueError(
                f'There are no public weights of {variant}. Use pretrained=False, name a checkpoint of your own, or '
                f'choose a model that has weights: {", ".join(trained)}.'
            )
    model_cfg = model_cfgs[variant]
    levels = model_cfg.override(**{k: v for k, v in kwargs.items() if hasattr(model_cfg, k)}).levels
    return build_model_with_cfg(
        SKNet,
        variant,
        pretrained,
        model_cfg=model_cfg,
        feature_cfg=dict(out_indices=tuple(range(levels)), flatten_sequential=True),
        pretrained_filter_fn=native_keys,
        **kwargs,
    )


_replaced = [f'{model_entrypoint(name).__module__}.{name}' for name in model_cfgs if is_model(name)]
if _replaced:
    warnings.warn(
        f"timm_sknet has replaced {', '.join(_replaced)} in timm's registry: create_model() makes "
        "timm_sknet's model of that name. For the other, set TIMM_SKNET_AUTOLOAD=0 and do not import timm_sknet."
    )
    warnings.filterwarnings('ignore', 'Overwriting', module=__name__)  # timm's own warning, one for each name


@register_model
def sknet26(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-26: 2, 2, 2, 2 units (paper, in a figure of section 4.1)."""
    return _create('sknet26', pretrained, **kwargs)


@register_model
def sknet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-50: 3, 4, 6, 3 units of two branches, 3x3 with dilation 1 and 2 (paper, table 1)."""
    return _create('sknet50', pretrained, **kwargs)


@register_model
def sknet101(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-101: 3, 4, 23, 3 units (paper, table 2)."""
    return _create('sknet101', pretrained, **kwargs)


@register_model
def sknet50_m3(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-50 with three branches, 3x3 with dilation 1, 2 and 3 (paper, table 7)."""
    return _create('sknet50_m3', pretrained, **kwargs)


@register_model
def sknet29_16x32d(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-29 16x32d for CIFAR: 1x1 and 3x3 branches (paper, section 4.2; kernels recalled)."""
    return _create('sknet29_16x32d', pretrained, **kwargs)


@register_model
def sknet12(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-12 for CIFAR: five basic blocks whose first layer is an SK convolution (ours, not in the paper)."""
    return _create('sknet12', pretrained, **kwargs)


@register_model
def sk_shufflenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """ShuffleNetV2 0.5x with every depthwise convolution selective (paper, section 4.1; our reading)."""
    return _create('sk_shufflenetv2_x0_5', pretrained, **kwargs)


@register_model
def sk_shufflenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """ShuffleNetV2 1.0x with every depthwise convolution selective (paper, section 4.1; our reading)."""
    return _create('sk_shufflenetv2_x1_0', pretrained, **kwargs)


@register_model
def sk_resnet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-50*, the authors' PyTorch variant: a dense 3x3 and one of 32 groups (PytorchInsight)."""
    return _create('sk_resnet50', pretrained, **kwargs)


@register_model
def sk_resnet101(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-101*, the authors' PyTorch variant (PytorchInsight)."""
    return _create('sk_resnet101', pretrained, **kwargs)
