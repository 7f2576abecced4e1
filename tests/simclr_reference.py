"""Files of SimCLRv2's networks as they are on the Hub: state dicts with other names, branches in one convolution."""

import re

import torch

STEM = {
    'stem.conv': 'net.0.0',
    'stem.bn': 'net.0.1.0',
    'stem.more.0.conv': 'net.0.2',
    'stem.more.0.bn': 'net.0.3.0',
    'stem.more.1.conv': 'net.0.4',
    'stem.more.1.bn': 'net.0.5.0',
    'head.fc': 'fc',
}
UNIT = {
    'shortcut.1.conv': 'projection.shortcut.2',
    'shortcut.1.bn': 'projection.bn.0',
    'conv1.conv': 'net.0',
    'conv1.bn': 'net.1.0',
    'sk.branches.0.conv': 'net.2.main_conv.0',
    'sk.branches.0.bn': 'net.2.main_conv.1.0',
    'sk.attn.fc1': 'net.2.mixing_conv.0',
    'sk.attn.bn': 'net.2.mixing_conv.1.0',
    'sk.attn.fc2': 'net.2.mixing_conv.2',
    'conv3.conv': 'net.3',
    'conv3.bn': 'net.4.0',
}


def to_hub(state):
    """Returns the content of a file on the Hub with the weights of one of our models."""
    renamed = {}
    for key, value in state.items():
        layer, _, name = key.rpartition('.')
        if '.branches.1.' in key:
            continue
        if '.branches.0.' in key:
            other = state[key.replace('.branches.0.', '.branches.1.')]
            value = torch.cat([value, other]) if value.ndim else value
        unit = re.match(r'stages\.(\d)\.(\d+)\.', layer)
        if unit:
            layer = f'net.{int(unit[1]) + 1}.blocks.{unit[2]}.{UNIT[layer.removeprefix(unit[0])]}'
        else:
            layer = STEM[layer]
        renamed[f'{layer}.{name}'] = value
    width = state['head.fc.weight'].shape[1]
    head = {'layers.0.weight': torch.zeros(width, width), 'layers.1.num_batches_tracked': torch.tensor(0)}
    return {'resnet': renamed, 'head': head}


def to_tensorflow(state):
    """Returns the variables of a TensorFlow checkpoint with the weights of one of our models, in the order of names.

    TensorFlow numbers convolutions and batch norms in the order in which the network uses them, as in our state dict.
    """
    names = dict(running_mean='moving_mean', running_var='moving_variance')
    counts = {'conv2d': 0, 'batch_normalization': 0}
    scopes, variables = {}, {}
    for key, value in state.items():
        layer, _, name = key.rpartition('.')
        if name == 'num_batches_tracked' or '.branches.1.' in key:
            continue
        if '.branches.0.' in key:
            value = torch.cat([value, state[key.replace('.branches.0.', '.branches.1.')]])
        if layer == 'head.fc':
            variable = 'head_supervised/linear_layer/dense/' + ('kernel' if name == 'weight' else 'bias')
            variables[variable] = value.t() if name == 'weight' else value
            continue
        kind = 'batch_normalization' if layer.endswith('bn') else 'conv2d'
        if layer not in scopes:
            scopes[layer] = f'base_model/{kind}' + (f'_{counts[kind]}' if counts[kind] else '')
            counts[kind] += 1
        if kind == 'conv2d':
            variables[f'{scopes[layer]}/kernel'] = value.permute(2, 3, 1, 0)
        else:
            variables[f'{scopes[layer]}/{names.get(name, dict(weight="gamma", bias="beta").get(name))}'] = value
    return {name: variables[name].contiguous().numpy() for name in sorted(variables)}
