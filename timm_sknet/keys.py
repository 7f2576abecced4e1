"""Renames the state-dict keys and layers of other implementations to our keys."""

import re
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from timm_sknet.folding import is_folded


class Layers(NamedTuple):
    """The layers of another implementation and our modules.

    The names of layers are regular expressions. The modules can refer to their groups.

    Attributes:
        unit: Pattern of a layer in a unit. Its groups are the stage, the unit and the layer inside the unit.
        first: The numbers of the first stage and the first unit.
        in_unit: The layers in a unit. In a module, '*' stands for both branches: the layer has the channels of both.
        others: The layers outside the units.
        mark: A part of a name that distinguishes this implementation from the others.
    """

    unit: str
    first: Tuple[int, int]
    in_unit: Mapping[str, str]
    others: Mapping[str, str]
    mark: str = ''

    def module(self, layer: str) -> str:
        """Returns our module for a layer; empty if the layer is unknown."""
        unit = re.fullmatch(self.unit, layer)
        if not unit:
            return _look_up(layer, self.others)
        module = _look_up(unit[3], self.in_unit)
        return module and f'stages.{int(unit[1]) - self.first[0]}.{int(unit[2]) - self.first[1]}.{module}'


def _look_up(layer: str, table: Mapping[str, str]) -> str:
    matches = ((re.fullmatch(pattern, layer), module) for pattern, module in table.items())
    return next((match.expand(module) for match, module in matches if match), '')


TIMM = "timm's SK networks"  # skresnext50_32x4d, skresnet18 and skresnet34
PYTORCH = "the authors' PyTorch code"  # sk_resnet50 and sk_resnet101
SIMCLR = 'SimCLRv2 in PyTorch'  # the files on the Hub
# timm and the authors use the names of torchvision's ResNet for the parts that do not depend on the SK convolution.
_RESNET_LAYERS = Layers(
    unit=r'layer(\d)\.(\d+)\.(.+)',
    first=(1, 0),
    in_unit={r'downsample\.0': 'shortcut.conv', r'downsample\.1': 'shortcut.bn'},
    others={'conv1': 'stem.conv', 'bn1': 'stem.bn', 'fc': 'head.fc'},
)
FOREIGN_LAYERS = {
    TIMM: _RESNET_LAYERS._replace(
        in_unit={
            **_RESNET_LAYERS.in_unit,
            r'conv(\d)\.(conv|bn)': r'conv\1.\2',
            r'conv\d\.paths\.(\d+)\.(conv|bn)': r'sk.branches.\1.\2',
            r'conv\d\.attn\.fc_reduce': 'sk.attn.fc1',
            r'conv\d\.attn\.bn': 'sk.attn.bn',
            r'conv\d\.attn\.fc_select': 'sk.attn.fc2',
        },
        mark='.paths.',
    ),
    PYTORCH: _RESNET_LAYERS._replace(
        in_unit={
            **_RESNET_LAYERS.in_unit,
            r'conv([13])': r'conv\1.conv',
            r'bn([13])': r'conv\1.bn',
            r'(conv|bn)2': r'sk.branches.0.\1',
            r'(conv|bn)2g': r'sk.branches.1.\1',
            r'conv_fc([12])': r'sk.attn.fc\1',
            r'bn_fc1': 'sk.attn.bn',
        },
        mark='.conv2g.',
    ),
    SIMCLR: Layers(
        unit=r'net\.(\d)\.blocks\.(\d+)\.(.+)',
        first=(1, 0),
        in_unit={
            r'projection\.shortcut\.2': 'shortcut.1.conv',
            r'projection\.bn\.0': 'shortcut.1.bn',
            r'net\.0': 'conv1.conv',
            r'net\.1\.0': 'conv1.bn',
            r'net\.2\.main_conv\.0': 'sk.branches.*.conv',
            r'net\.2\.main_conv\.1\.0': 'sk.branches.*.bn',
            r'net\.2\.mixing_conv\.0': 'sk.attn.fc1',
            r'net\.2\.mixing_conv\.1\.0': 'sk.attn.bn',
            r'net\.2\.mixing_conv\.2': 'sk.attn.fc2',
            r'net\.3': 'conv3.conv',
            r'net\.4\.0': 'conv3.bn',
        },
        others={
            r'net\.0\.0': 'stem.conv',
            r'net\.0\.1\.0': 'stem.bn',
            r'net\.0\.2': 'stem.more.0.conv',
            r'net\.0\.3\.0': 'stem.more.0.bn',
            r'net\.0\.4': 'stem.more.1.conv',
            r'net\.0\.5\.0': 'stem.more.1.bn',
            'fc': 'head.fc',
        },
        mark='.main_conv.',
    ),
}
CAFFE_LAYERS = Layers(
    unit=r'conv([2-9])_([1-9]\d{0,2})/(.+)',
    first=(2, 1),
    in_unit={
        '1x1_reduce': 'conv1.conv',
        '1x1_reduce/bn': 'conv1.bn',
        '3x3g32': 'sk.branches.0.conv',
        '3x3g32/bn': 'sk.branches.0.bn',
        '3x3g32d2': 'sk.branches.1.conv',
        '3x3g32d2/bn': 'sk.branches.1.bn',
        'B_fc1': 'sk.attn.fc1',
        'B_fc1/bn': 'sk.attn.bn',
        'B_fc2': 'sk.attn.fc2',
        '1x1_increase': 'conv3.conv',
        '1x1_increase/bn': 'conv3.bn',
        '1x1_proj': 'shortcut.conv',
        '1x1_proj/bn': 'shortcut.bn',
    },
    others={'conv1/7x7_s2': 'stem.conv', 'conv1/7x7_s2/bn': 'stem.bn', 'classifier': 'head.fc'},
)


def detect_origin(state_dict: Iterable[str]) -> Optional[str]:
    """Detects the implementation of a state dict by its keys.

    Returns:
        The implementation, a key of `FOREIGN_LAYERS`; None if there are keys that are not in its table.
    """
    keys = list(state_dict)
    for origin, layers in FOREIGN_LAYERS.items():
        if any(layers.mark in key for key in keys):
            return origin if all(layers.module(key.rpartition('.')[0]) for key in keys) else None
    return None


def native_keys(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames the keys of other implementations to ours; any other state dict is returned unchanged.

    A tensor with the channels of both branches is split into two views.
    """
    origin = detect_origin(state_dict)
    return state_dict if origin is None else _rename(state_dict, FOREIGN_LAYERS[origin])


def rename_blobs(blobs: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Renames the blobs of `read_caffemodel` to the keys of an SKNet; the names of unknown layers stay."""
    return _rename(blobs, CAFFE_LAYERS)


def _rename(tensors: Mapping[str, Tensor], layers: Layers) -> Dict[str, Tensor]:
    renamed = {}
    for key, value in tensors.items():
        layer, _, name = key.rpartition('.')
        renamed[f'{layers.module(layer) or layer}.{name}'] = value
    return _split_branches(renamed)


def _split_branches(tensors: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Splits the tensors with '*' in their key, which have the channels of both branches."""
    split = {}
    for key, value in tensors.items():
        if '*' not in key:
            split[key] = value
            continue
        halves = value.chunk(2) if value.ndim else (value, value)  # a number is a counter of the batch norm
        split.update({key.replace('*', str(i)): half for i, half in enumerate(halves)})
    return split


def rename_variables(variables: Mapping[str, Tensor], depths: Sequence[int]) -> Dict[str, Tensor]:
    """Renames the variables of a TensorFlow checkpoint of SimCLRv2 to the keys of an SKNet.

    TensorFlow numbers the layers in the order of their creation, convolutions and batch norms separately.

    Args:
        variables: The variables by name, in TensorFlow's layout.
        depths: Number of units of each stage.

    Returns:
        The tensors, as views of the variables. The names of unknown variables stay.
    """
    stem = ['stem', 'stem.more.0', 'stem.more.1']
    convs, norms = [f'{layer}.conv' for layer in stem], [f'{layer}.bn' for layer in stem]
    for stage, depth in enumerate(depths):
        for unit in range(depth):
            prefix = f'stages.{stage}.{unit}'
            layers = [f'{prefix}.{layer}' for layer in ('shortcut.1', 'conv1', 'sk.branches.*', 'conv3')[unit > 0 :]]
            *before, last = layers
            convs += [f'{layer}.conv' for layer in before]
            convs += [f'{prefix}.sk.attn.fc1', f'{prefix}.sk.attn.fc2', f'{last}.conv']
            norms += [f'{layer}.bn' for layer in (*before, f'{prefix}.sk.attn', last)]

    modules = {'head_supervised/linear_layer/dense': 'head.fc'}
    for kind, names in ('conv2d', convs), ('batch_normalization', norms):
        modules |= {f'base_model/{kind}' + (f'_{i}' if i else ''): name for i, name in enumerate(names)}
    renamed = {}
    for name, value in variables.items():
        layer, _, parameter = name.rpartition('/')
        if layer in modules and parameter in VARIABLES:
            name = f'{modules[layer]}.{VARIABLES[parameter]}'
            if parameter == 'kernel':  # the output channels are the last dimension in TensorFlow
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()
        renamed[name] = value
    return _split_branches(renamed)


VARIABLES = {
    'kernel': 'weight',
    'bias': 'bias',
    'gamma': 'weight',
    'beta': 'bias',
    'moving_mean': 'running_mean',
    'moving_variance': 'running_var',
}


def prepare_state_dict(model: nn.Module, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
    """Prepares a state dict for loading: checks that both or neither are folded, and renames foreign keys.

    It is a pre-hook of `load_state_dict`. timm itself calls `native_keys` only for pretrained weights.

    Raises:
        RuntimeError: If the weights are folded and the model is not, or the other way round.
    """
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    folded, normalised = is_folded(own), any('.bn.' in key for key in own)
    if folded != is_folded(model.state_dict()) and (folded or normalised):  # neither: a part of the weights
        problem = 'The weights are' if folded else 'The model is'
        other = 'the model is not' if folded else 'the weights are not'
        raise RuntimeError(
            f'{problem} folded (reparameterized), but {other}. Load the original weights into a model that is not '
            'folded, then fold it.'
        )
    renamed = native_keys(own)
    if renamed is not own:
        for key in own:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in renamed.items()})
