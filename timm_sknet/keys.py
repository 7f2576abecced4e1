"""Names of tensors: those of other implementations of our networks, and ours for them."""

import re
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

# Networks that are ours under other names: a part of a key that gives them away, and what their keys become.
TIMM = '.conv2.paths.'  # timm's skresnext50_32x4d
PYTORCH_VARIANT = '.conv2g.'  # the authors' sk_resnet50 and sk_resnet101, a grouped convolution beside each dense one
FOREIGN_KEYS: Dict[str, Sequence[Tuple[str, Union[str, Callable[[re.Match], str]]]]] = {
    TIMM: (
        (r'^conv1\.', 'stem.conv.'),
        (r'^bn1\.', 'stem.bn.'),
        (r'^fc\.', 'head.fc.'),
        (r'^layer(\d)', lambda m: f'stages.{int(m[1]) - 1}'),
        (r'\.conv2\.paths', '.sk.branches'),
        (r'\.conv2\.attn\.bn', '.sk.attn.bn'),
        (r'\.conv2\.attn\.fc_reduce', '.sk.attn.fc1'),
        (r'\.conv2\.attn\.fc_select', '.sk.attn.fc2'),
        (r'\.downsample\.0', '.shortcut.conv'),
        (r'\.downsample\.1', '.shortcut.bn'),
    ),
    PYTORCH_VARIANT: (
        (r'^conv1\.', 'stem.conv.'),
        (r'^bn1\.', 'stem.bn.'),
        (r'^fc\.', 'head.fc.'),
        (r'^layer(\d)', lambda m: f'stages.{int(m[1]) - 1}'),
        (r'(\.\d+\.conv[13])\.', r'\1.conv.'),
        (r'(\.\d+)\.bn([13])\.', r'\1.conv\2.bn.'),
        (r'\.conv2\.', '.sk.branches.0.conv.'),
        (r'\.bn2\.', '.sk.branches.0.bn.'),
        (r'\.conv2g\.', '.sk.branches.1.conv.'),
        (r'\.bn2g\.', '.sk.branches.1.bn.'),
        (r'\.conv_fc', '.sk.attn.fc'),
        (r'\.bn_fc1\.', '.sk.attn.bn.'),
        (r'\.downsample\.0', '.shortcut.conv'),
        (r'\.downsample\.1', '.shortcut.bn'),
    ),
}


def native_keys(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames the keys of networks that are ours under other names; other state dicts come back as they are."""
    origin = foreign(state_dict)
    if origin is None:
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in FOREIGN_KEYS[origin]:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def accept_foreign_keys(model: nn.Module, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
    """Renames the keys under the prefix of a model that loads them; timm filters those of pretrained weights only."""
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    folded, normalised = is_folded(own), any('.bn.' in key for key in own)
    if folded != is_folded(model.state_dict()) and (folded or normalised):  # else it is a part that shows neither
        raise RuntimeError(
            'The weights and the model are not both folded (reparameterized): load the weights that a model had '
            'before it was folded into one that is not, and fold it then.'
        )
    renamed = native_keys(own)
    if renamed is not own:
        for key in own:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in renamed.items()})


def foreign(state_dict: Iterable[str]) -> Optional[str]:
    """Returns the key of `FOREIGN_KEYS` for the network that these keys are of; None for any other."""
    return next((part for part in FOREIGN_KEYS if any(part in key for key in state_dict)), None)


def is_folded(state_dict: Mapping[str, Any]) -> bool:
    """Returns whether these are the weights of a folded SKNet, whose convolutions have a bias and no batch norm."""
    return any(key.endswith('.conv.bias') for key in state_dict)


# Caffe's layers and our modules, first those of a unit
UNIT = {
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
}
AROUND = {'conv1/7x7_s2': 'stem.conv', 'conv1/7x7_s2/bn': 'stem.bn', 'classifier': 'head.fc'}
IN_UNIT = re.compile('conv([2-9])_([1-9][0-9]{0,2})/(.+)')  # stage, unit and layer


def rename_blobs(blobs: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Renames what `read_caffemodel` returns to the keys of an SKNet; the names of other layers stay."""
    renamed = {}
    for key, blob in blobs.items():
        layer, _, name = key.rpartition('.')
        unit = IN_UNIT.fullmatch(layer)
        if unit and unit[3] in UNIT:
            layer = f'stages.{int(unit[1]) - 2}.{int(unit[2]) - 1}.{UNIT[unit[3]]}'
        renamed[f'{AROUND.get(layer, layer)}.{name}'] = blob
    return renamed
