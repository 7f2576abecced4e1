"""Registers all SKNets in timm: architectures, pretrained weights and top-1 accuracies.

Each fact is written once, here. The command line, the table of models and the tests read it from this module.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from timm_sknet.loading import PretrainedWeights, restore, source_of
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
_SK_RESNET_TIMM = SKNetCfg(
    unit='basic',
    depths=(2, 2, 2, 2),
    mid_widths=(64, 128, 256, 512),
    widths=(64, 128, 256, 512),
    branches=((3, 1, 1), (3, 2, 1)),
    r=8,
    L=16,
    split_input=True,
    bn_momentum=0.1,
    init='pytorch',
)


def _simclr(depth: int, width: int) -> SKNetCfg:
    return SKNetCfg(
        depths={50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth],
        mid_widths=tuple(width * n for n in (64, 128, 256, 512)),
        widths=tuple(width * n for n in (256, 512, 1024, 2048)),
        stem=(width * 32, 3, 2),
        stem_widths=(width * 32, width * 64),
        stem_pool='same',
        shortcut_pool=True,
        branches=((3, 1, 1), (3, 1, 1)),
        bn_momentum=0.1,
        init='tensorflow',
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
    sk_resnet18_timm=_SK_RESNET_TIMM,
    sk_resnet34_timm=replace(_SK_RESNET_TIMM, depths=(3, 4, 6, 3)),
    sk_resnet50x1_simclr=_simclr(50, 1),
    sk_resnet50x2_simclr=_simclr(50, 2),
    sk_resnet101x1_simclr=_simclr(101, 1),
    sk_resnet101x2_simclr=_simclr(101, 2),
    sk_resnet152x1_simclr=_simclr(152, 1),
    sk_resnet152x2_simclr=_simclr(152, 2),
    sk_resnet152x3_simclr=_simclr(152, 3),
)

# Top-1 accuracy in % at the input size of the default cfg, from the paper (tables 2, 4, 5 and 7). The figures of
# sk_resnet50 and sk_resnet101 are those that the paper's authors published with their PyTorch code.
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
_SIMCLR = _IMAGENET | dict(
    interpolation='bicubic',
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    origin_url='https://github.com/google-research/simclr',
    paper_ids='arXiv:2006.10029',
    paper_name='Big Self-Supervised Models are Strong Semi-Supervised Learners',
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
        file_url: Address of a file of the authors, for weights that must be converted first.
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
        return 'a file' if self.file_url else ''


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


def _timm(name: str, description: str, published: float) -> Weights:
    repository = f'timm/{name}.ra_in1k'
    return Weights(
        _IMAGENET
        | dict(
            hf_hub_id=repository,
            hf_hub_filename='model.safetensors',
            interpolation='bicubic',
            license='apache-2.0',
            origin_url='https://github.com/huggingface/pytorch-image-models',
            description=f"{description}, trained on ImageNet-1k with RandAugment as timm's {name}.",
            notes=(f'Weights by Ross Wightman, Apache-2.0, downloaded from {repository} and renamed.',),
        ),
        dataset='imagenet-1k',
        published=published,  # timm's results table
    )


# The training step of each set of SimCLRv2's weights, by tag.
SIMCLR_STEPS = dict(linear_in1k=250228, ft_in1k=37535, sup_in1k=28151)


def _simclr_weights() -> Dict[str, Weights]:
    """Returns all weights of SimCLRv2's networks; accuracies from its paper, table 1."""
    accuracies = {  # linear, fine-tuned on all labels, supervised
        (50, 1): (74.6, 78.7, 78.5),
        (50, 2): (77.7, 81.3, 79.3),
        (101, 1): (76.3, 80.6, 79.6),
        (101, 2): (79.0, 82.4, 80.1),
        (152, 1): (77.2, 81.3, 79.9),
        (152, 2): (79.4, 82.9, 80.4),
        (152, 3): (79.8, 83.1, 80.5),
    }
    found = {}
    for (depth, width), (linear, fine_tuned, supervised) in accuracies.items():
        name, theirs = f'sk_resnet{depth}x{width}_simclr', f'r{depth}_{width}x_sk1'
        repository = f'lightly-ai/simclrv2-imagenet1k-{theirs}'
        found[f'{name}.linear_in1k'] = Weights(
            _SIMCLR
            | dict(
                hf_hub_id=repository,
                hf_hub_filename=f'{theirs}.pth',
                license='apache-2.0',
                description='SK-ResNet of SimCLRv2, pretrained on ImageNet-1k without labels. Only the classifier is '
                'trained with labels.',
                notes=(f'Weights by Google, Apache-2.0, downloaded as converted by Lightly ({repository}).',),
            ),
            dataset='imagenet-1k',
            published=linear,
        )
        for tag, kind, how, published in (
            ('ft_in1k', 'finetuned_100pct', 'pretrained without labels, then fine-tuned', fine_tuned),
            ('sup_in1k', 'supervised', 'trained with labels from the start', supervised),
        ):
            found[f'{name}.{tag}'] = Weights(
                _SIMCLR
                | dict(
                    description=f'SK-ResNet of SimCLRv2, {how} on ImageNet-1k.',
                    notes=('Weights by Google, in a TensorFlow checkpoint. Its repository is Apache-2.0.',),
                ),
                dataset='imagenet-1k',
                published=published,
                file_url='https://storage.googleapis.com/simclr-checkpoints/simclrv2/'
                f'{kind}/{theirs}/model.ckpt-{SIMCLR_STEPS[tag]}.index',
            )
    return found


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
    'sknet50.ra_in1k': _timm('skresnext50_32x4d', 'SKNet-50', 80.168),
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
    'sk_resnet18_timm.ra_in1k': _timm('skresnet18', 'ResNet-18 with SK convolutions', 73.038),
    'sk_resnet34_timm.ra_in1k': _timm('skresnet34', 'ResNet-34 with SK convolutions', 76.910),
    **_simclr_weights(),
}
default_cfgs = generate_default_cfgs({name: entry.cfg for name, entry in weights.items()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SKNet:
    named = kwargs.get('pretrained_cfg')
    if isinstance(named, dict) and 'input_size' in named:  # JSON gives a list, but timm's scripts concatenate tuples
        named = kwargs['pretrained_cfg'] = {**named, 'input_size': tuple(named['input_size'])}
    cfg = resolve_pretrained_cfg(variant, named, kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.source or cfg.state_dict):
        trained = [name for name, entry in weights.items() if entry.source and not entry.file_url]
        name = f'{variant}.{cfg.tag}'
        file = weights[name].file_url if name in weights else ''
        remedy = f'convert the published file ({file}, see docs/weights.md) with `timm-sknet convert`, ' if file else ''
        raise ValueError(
            f'There are no public weights of {name if file else variant} that timm can load. Use pretrained=False, '
            f'{remedy}load your own weights, or choose a model with weights: {", ".join(trained)}.'
        )
    model_cfg = model_cfgs[variant]
    levels = model_cfg.override(**{k: v for k, v in kwargs.items() if hasattr(model_cfg, k)}).levels
    by_url = source_of(cfg) == 'url'  # timm loads these itself
    read = PretrainedWeights(cfg, kwargs.get('cache_dir')) if pretrained and not by_url else None
    if read:  # timm copies the cfg, so a placeholder stands for the weights in it
        placeholder = replace(cfg, source=None, state_dict={'weights': None})
        kwargs |= dict(pretrained_cfg=placeholder, pretrained_cfg_overlay=None)

    given: List[Tuple[SKNet, Dict[str, Any]]] = []

    def checked(state_dict: Dict[str, Any], model: SKNet) -> Dict[str, Any]:
        model.pretrained_cfg.pop('state_dict', None)
        if cfg.source:
            model.pretrained_cfg['source'] = cfg.source
        found = read or PretrainedWeights(replace(cfg, state_dict=state_dict))
        classes = 0 if kwargs.get('features_only') else model.num_classes
        state = found.checked_state_dict(model, classes, kwargs.get('pretrained_strict', True))
        given.append((model, dict(state)))  # a copy, because timm changes the dict
        return state

    model = build_model_with_cfg(
        SKNet,
        variant,
        pretrained,
        model_cfg=model_cfg,
        feature_cfg=dict(out_indices=tuple(range(levels)), flatten_sequential=True),
        pretrained_filter_fn=checked,
        **kwargs,
    )
    for loaded, state in given:  # with features_only, `model` is not the model that was loaded
        restore(loaded, state, except_classifier=loaded.num_classes != cfg.num_classes)
    return model


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


@register_model
def sk_resnet18_timm(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """timm's skresnet18: basic blocks; the branches of their SK convolutions get one half of the channels each."""
    return _create('sk_resnet18_timm', pretrained, **kwargs)


@register_model
def sk_resnet34_timm(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """timm's skresnet34, with the blocks of `sk_resnet18_timm`."""
    return _create('sk_resnet34_timm', pretrained, **kwargs)


def _create_simclr(variant: str, pretrained: bool, **kwargs: Any) -> SKNet:
    """Creates a network of SimCLRv2, whose residual units are initialised as identities by default."""
    return _create(variant, pretrained, **dict(zero_init_last=True) | kwargs)


@register_model
def sk_resnet50x1_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-50 of SimCLRv2 (1x, SK): dense 3x3 branches, a deep stem and pooled shortcuts (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet50x1_simclr', pretrained, **kwargs)


@register_model
def sk_resnet50x2_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-50 of SimCLRv2 (2x, SK), twice as wide (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet50x2_simclr', pretrained, **kwargs)


@register_model
def sk_resnet101x1_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-101 of SimCLRv2 (1x, SK): dense 3x3 branches, a deep stem and pooled shortcuts (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet101x1_simclr', pretrained, **kwargs)


@register_model
def sk_resnet101x2_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-101 of SimCLRv2 (2x, SK), twice as wide (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet101x2_simclr', pretrained, **kwargs)


@register_model
def sk_resnet152x1_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-152 of SimCLRv2 (1x, SK): dense 3x3 branches, a deep stem and pooled shortcuts (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet152x1_simclr', pretrained, **kwargs)


@register_model
def sk_resnet152x2_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-152 of SimCLRv2 (2x, SK), twice as wide (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet152x2_simclr', pretrained, **kwargs)


@register_model
def sk_resnet152x3_simclr(pretrained: bool = False, **kwargs: Any) -> SKNet:
    """SK-ResNet-152 of SimCLRv2 (3x, SK), three times as wide (arXiv:2006.10029)."""
    return _create_simclr('sk_resnet152x3_simclr', pretrained, **kwargs)
