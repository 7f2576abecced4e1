"""Registers all SKNets in timm: architectures, pretrained weights and top-1 accuracies.

Each fact is written once, here. The command line, the table of models and the tests read it from this module.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from timm_sknet.loading import PretrainedWeights, source_of
from timm_sknet.network import SKNet, SKNetCfg

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
    init='pytorch',
)

model_cfgs = dict(
    sknet26=SKNetCfg(depths=(2, 2, 2, 2)),
    sknet50=SKNetCfg(depths=(3, 4, 6, 3)),
    sknet101=SKNetCfg(depths=(3, 4, 23, 3)),
    sknet50_m3=SKNetCfg(branches=((3, 1, 32), (3, 2, 32), (3, 3, 32))),
    sknet50_caffe=SKNetCfg(depths=(3, 4, 6, 3), stem_pool='ceil'),
    sknet101_caffe=SKNetCfg(depths=(3, 4, 23, 3), stem_pool='ceil', attn_widths=(32, 16, 32, 64)),
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
    sknet14=SKNetCfg(
        unit='basic',
        depths=(1, 2, 2, 1),
        mid_widths=(16, 32, 64, 96),
        widths=(16, 32, 64, 96),
        strides=(1, 2, 2, 2),
        stem=(16, 3, 2),
        stem_pool='',
        branches=((3, 1, 1), (3, 2, 1)),
        L=16,
    ),
    sk_shufflenetv2_x0_5=_SHUFFLENET,
    sk_shufflenetv2_x1_0=replace(_SHUFFLENET, mid_widths=(58, 116, 232), widths=(116, 232, 464)),
    sk_resnet50=_SK_RESNET,
    sk_resnet101=replace(_SK_RESNET, depths=(3, 4, 23, 3)),
)

# Top-1 accuracy in % at the input size of the default cfg, from the paper (tables 2, 4, 5 and 7). The figures of
# sk_resnet* are those that the paper's authors published with their PyTorch code.
paper_top1 = dict(
    sknet50=79.21,
    sknet101=79.81,
    sknet50_m3=79.24,
    sknet50_caffe=79.21,
    sknet101_caffe=79.81,
    sknet29_16x32d=96.53,
    sk_shufflenetv2_x0_5=64.65,
    sk_shufflenetv2_x1_0=71.64,
    sk_resnet50=77.538,
    sk_resnet101=78.792,
)

CAFFE_URL = 'https://github.com/implus/SKNet'
PYTORCH_URL = 'https://github.com/implus/PytorchInsight'
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
    origin_url=CAFFE_URL,
    paper_ids='arXiv:1903.06586',
    paper_name='Selective Kernel Networks',
)
# The authors' Caffe networks take pixels of 0 to 255 minus the mean. These values give the same for timm's pipeline,
# whose images are in [0, 1]. Crop and interpolation are our choice: the authors do not state them.
CAFFE_INPUT = _IMAGENET | dict(mean=(123 / 255, 117 / 255, 104 / 255), std=(1 / 255, 1 / 255, 1 / 255))
_CIFAR10 = _IMAGENET | dict(
    num_classes=10,
    label_names=('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_IMAGENETTE = _IMAGENET | dict(
    num_classes=10,
    label_names=(
        'tench',
        'English springer',
        'cassette player',
        'chain saw',
        'church',
        'French horn',
        'garbage truck',
        'gas pump',
        'golf ball',
        'parachute',
    ),
    input_size=(3, 128, 128),
    pool_size=(8, 8),
    crop_pct=1.0,
    interpolation='bicubic',
)


class Weights(NamedTuple):
    """One set of pretrained weights. Accuracies are top-1 in % at the cfg's input size.

    Attributes:
        cfg: Fields of timm's `PretrainedCfg`: preprocessing, licence and location of the weights.
        dataset: Training dataset, by its name on the Hub.
        published: Accuracy that was published with the weights.
        measured: Accuracy that we measured with timm's validate.py; the documentation shows the commands.
        file_url: Address of the authors' file, for weights that must be converted first.
    """

    cfg: Dict[str, Any]
    dataset: str = ''
    published: Optional[float] = None
    measured: Optional[float] = None
    file_url: str = ''

    @property
    def source(self) -> str:
        """Location of the weights in words; empty if there are no weights."""
        if 'hf_hub_id' in self.cfg:
            return 'the Hub'
        if 'file' in self.cfg:
            return 'the package'
        return "authors' file" if self.file_url else ''


def _untrained(description: str, cfg: Dict[str, Any] = _IMAGENET) -> Weights:
    notes = ('There are no public weights.',)
    return Weights(cfg | dict(description=description, notes=notes))


def _authors(model: str, url: str, cfg: Dict[str, Any] = _IMAGENET) -> Weights:
    origin = CAFFE_URL if cfg is CAFFE_INPUT else PYTORCH_URL
    return Weights(
        cfg
        | dict(
            origin_url=origin,
            description=f"{model}, trained on ImageNet-1k by the paper's authors.",
            notes=('The authors offer the weights as a file on Google Drive and state no licence.',),
        ),
        dataset='imagenet-1k',
        published=paper_top1[model],
        file_url=url,
    )


def _shipped(name: str, description: str, cfg: Dict[str, Any], dataset: str, measured: float) -> Weights:
    return Weights(
        cfg
        | dict(
            file=str(Path(__file__).parent / 'weights' / f'{name}.safetensors'),
            license='apache-2.0',
            origin_url='https://arxiv.org/abs/1903.06586',  # the paper, because network and weights are ours
            description=description,
            notes=("Weights by the authors of timm_sknet, Apache-2.0, trained with timm's train.py.",),
        ),
        dataset=dataset,
        measured=measured,
    )


_DRIVE = 'https://drive.google.com/file/d/'

# All pretrained weights by `model.tag`; the first entry of a model is its default. To add weights from the Hub, add an
# entry with their `hf_hub_id`. The registry, `timm-sknet models` and the model cards use this table.
weights = {
    'sknet26.untrained': _untrained('SKNet-26 of the paper.'),
    'sknet50.ra_in1k': Weights(
        _IMAGENET
        | dict(
            hf_hub_id='timm/skresnext50_32x4d.ra_in1k',
            hf_hub_filename='model.safetensors',
            interpolation='bicubic',
            license='apache-2.0',
            origin_url='https://github.com/huggingface/pytorch-image-models',
            description="SKNet-50, trained on ImageNet-1k with RandAugment as timm's skresnext50_32x4d.",
            notes=(
                'Weights by Ross Wightman, Apache-2.0, downloaded from timm/skresnext50_32x4d.ra_in1k and renamed.',
            ),
        ),
        dataset='imagenet-1k',
        published=80.168,  # timm's results table
    ),
    'sknet101.untrained': _untrained('SKNet-101 of the paper.'),
    'sknet50_m3.untrained': _untrained('SKNet-50 of the paper with a third branch of dilation 3.'),
    'sknet50_caffe.authors_in1k': _authors('sknet50_caffe', _DRIVE + '1EKanqFkqoU3L6vgSLW3GjPciesZ2rrUH', CAFFE_INPUT),
    'sknet101_caffe.authors_in1k': _authors(
        'sknet101_caffe', _DRIVE + '1NEYIYeSXQeinLGU5GH2hf8T6MJytzt0U', CAFFE_INPUT
    ),
    'sknet29_16x32d.untrained': _untrained('SKNet-29 of the paper, for CIFAR.', _CIFAR10),
    'sknet12.cifar10': _shipped(
        'sknet12.cifar10',
        'A small SKNet of basic blocks, trained on CIFAR-10 and shipped in the package.',
        _CIFAR10,
        dataset='cifar10',
        measured=91.74,
    ),
    'sknet14.imagenette128': _shipped(
        'sknet14.imagenette128',
        'A small SKNet of basic blocks, trained on Imagenette at 128x128 and shipped in the package.',
        _IMAGENETTE,
        dataset='imagenette',
        measured=88.64,
    ),
    'sk_shufflenetv2_x0_5.untrained': _untrained('ShuffleNetV2 0.5x with SK convolutions; details are our choice.'),
    'sk_shufflenetv2_x1_0.untrained': _untrained('ShuffleNetV2 1.0x with SK convolutions; details are our choice.'),
    'sk_resnet50.authors_in1k': _authors('sk_resnet50', _DRIVE + '1DGYWPeKc7dyJ9i-zPJcPPa2engExPOnJ'),
    'sk_resnet101.authors_in1k': _authors('sk_resnet101', _DRIVE + '1WB7HXx-cvUIxFRe-M61XZIzUN0a3nsbF'),
}
default_cfgs = generate_default_cfgs({name: entry.cfg for name, entry in weights.items()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SKNet:
    named = kwargs.get('pretrained_cfg')
    if isinstance(named, dict) and 'input_size' in named:  # JSON gives a list, but timm's scripts concatenate tuples
        named['input_size'] = tuple(named['input_size'])
    cfg = resolve_pretrained_cfg(variant, named, kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.source or cfg.state_dict):
        trained = [name for name, entry in weights.items() if entry.source and not entry.file_url]
        files = [entry.file_url for name, entry in weights.items() if name.startswith(f'{variant}.') and entry.file_url]
        remedy = f"convert the authors' file ({files[0]}) with `timm-sknet convert`, " if files else ''
        raise ValueError(
            f'There are no public weights of {variant} that timm can load. Use pretrained=False, {remedy}load your '
            f'own weights, or choose a model with weights: {", ".join(trained)}.'
        )
    model_cfg = model_cfgs[variant]
    levels = model_cfg.override(**{k: v for k, v in kwargs.items() if hasattr(model_cfg, k)}).levels
    by_url = source_of(cfg) == 'url'  # timm loads these itself
    read = PretrainedWeights(cfg, kwargs.get('cache_dir')) if pretrained and not by_url else None
    if read:  # timm copies the cfg, so a placeholder stands for the weights in it
        placeholder = replace(cfg, source=None, state_dict={'weights': None})
        kwargs |= dict(pretrained_cfg=placeholder, pretrained_cfg_overlay=None)

    def checked(state_dict: Dict[str, Any], model: SKNet) -> Dict[str, Any]:
        model.pretrained_cfg.pop('state_dict', None)
        if cfg.source:
            model.pretrained_cfg['source'] = cfg.source
        found = read or PretrainedWeights(replace(cfg, state_dict=state_dict))
        classes = 0 if kwargs.get('features_only') else model.num_classes
        return found.checked_state_dict(model, classes, kwargs.get('pretrained_strict', True))

    return build_model_with_cfg(
        SKNet,
        variant,
        pretrained,
        model_cfg=model_cfg,
        feature_cfg=dict(out_indices=tuple(range(levels)), flatten_sequential=True),
        pretrained_filter_fn=checked,
        **kwargs,
    )


@register_model
def sknet26(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-26: 2, 2, 2, 2 units (paper, a figure in section 4.1)."""
    return _create('sknet26', pretrained, **kwargs)


@register_model
def sknet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-50: 3, 4, 6, 3 units with two branches, 3x3 with dilation 1 and 2 (paper, table 1)."""
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
def sknet50_caffe(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-50 as in the authors' Caffe file: a stem pool without padding, its size rounded up."""
    return _create('sknet50_caffe', pretrained, **kwargs)


@register_model
def sknet101_caffe(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-101 as in the authors' Caffe file: the same stem pool, and attention of width 16 in the second stage."""
    return _create('sknet101_caffe', pretrained, **kwargs)


@register_model
def sknet29_16x32d(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-29 16x32d for CIFAR: 1x1 and 3x3 branches (paper, section 4.2, which does not state the kernels)."""
    return _create('sknet29_16x32d', pretrained, **kwargs)


@register_model
def sknet12(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-12 for CIFAR: five basic blocks whose first layer is an SK convolution (ours, not in the paper)."""
    return _create('sknet12', pretrained, **kwargs)


@register_model
def sknet14(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SKNet-14 for small photographs: six basic blocks whose first layer is an SK convolution (ours)."""
    return _create('sknet14', pretrained, **kwargs)


@register_model
def sk_shufflenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """ShuffleNetV2 0.5x with SK convolutions as depthwise convolutions (paper, section 4.1; details are our choice)."""
    return _create('sk_shufflenetv2_x0_5', pretrained, **kwargs)


@register_model
def sk_shufflenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """ShuffleNetV2 1.0x with SK convolutions as depthwise convolutions (paper, section 4.1; details are our choice)."""
    return _create('sk_shufflenetv2_x1_0', pretrained, **kwargs)


@register_model
def sk_resnet50(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-50* of the authors' PyTorch code (PytorchInsight): a dense 3x3 branch and one with 32 groups."""
    return _create('sk_resnet50', pretrained, **kwargs)


@register_model
def sk_resnet101(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-101* of the authors' PyTorch code (PytorchInsight)."""
    return _create('sk_resnet101', pretrained, **kwargs)
