"""Renames the state-dict keys of other implementations, and the layers of the authors' Caffe files, to our keys."""

import re
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from timm_sknet.folding import is_folded

# Each other implementation is detected by a part of a key that no other one has.
TIMM_KEY_PART = '.conv2.paths.'  # timm's skresnext50_32x4d
PYTORCH_KEY_PART = '.conv2g.'  # the authors' sk_resnet50 and sk_resnet101
# For each implementation, by its key part: patterns of its keys and their replacements.
FOREIGN_KEYS: Dict[str, Sequence[Tuple[str, Union[str, Callable[[re.Match], str]]]]] = {
    TIMM_KEY_PART: (
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
    PYTORCH_KEY_PART: (
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
    """Renames the keys of other implementations to ours; any other state dict is returned unchanged."""
    origin = detect_origin(state_dict)
    if origin is None:
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in FOREIGN_KEYS[origin]:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


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


def detect_origin(state_dict: Iterable[str]) -> Optional[str]:
    """Detects the implementation of a state dict; returns its key in `FOREIGN_KEYS`, or None for any other."""
    return next((part for part in FOREIGN_KEYS if any(part in key for key in state_dict)), None)


# Layers of the authors' Caffe files and our modules, first inside a unit, then outside.
CAFFE_UNIT_LAYERS = {
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
CAFFE_OTHER_LAYERS = {'conv1/7x7_s2': 'stem.conv', 'conv1/7x7_s2/bn': 'stem.bn', 'classifier': 'head.fc'}
CAFFE_UNIT = re.compile('conv([2-9])_([1-9][0-9]{0,2})/(.+)')  # stage, unit and layer


def rename_blobs(blobs: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Renames the blobs of `read_caffemodel` to the keys of an SKNet; the names of unknown layers stay."""
    renamed = {}
    for key, blob in blobs.items():
        layer, _, name = key.rpartition('.')
        unit = CAFFE_UNIT.fullmatch(layer)
        if unit and unit[3] in CAFFE_UNIT_LAYERS:
            layer = f'stages.{int(unit[1]) - 2}.{int(unit[2]) - 1}.{CAFFE_UNIT_LAYERS[unit[3]]}'
        renamed[f'{CAFFE_OTHER_LAYERS.get(layer, layer)}.{name}'] = blob
    return renamed
