"""A reference implementation of the authors' PyTorch variant (SK-ResNet-50* and SK-ResNet-101*).

It is independent: it does not use timm_sknet or timm. A state is a flat dict of tensors with the keys of the authors'
checkpoints.
"""

import math
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F

State = Dict[str, torch.Tensor]

SK_RESNET50 = (3, 4, 6, 3)
SK_RESNET101 = (3, 4, 23, 3)
TINY = dict(depths=(2, 1, 1, 2), planes=(64, 96, 64, 64), num_classes=10)
# Mean weight and bias of random batch norms. The last one of a block is small, because its output is added to the
# shortcut. The one of z keeps the attention away from 0, 1 and 1/2.
GAIN_AND_SHIFT = {'bn3': (0.15, 0.0), 'bn_fc1': (0.25, 0.25)}
EXPANSION = 4
GROUPS = 32
BATCH_NORM_EPS = 1e-5
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)


def shapes(
    depths: Sequence[int],
    planes: Sequence[int] = (64, 128, 256, 512),
    num_classes: int = 1000,
) -> Dict[str, Tuple[int, ...]]:
    """Returns the shapes of the learnable tensors by key, in the order of the network."""
    out = {}

    def conv(key: str, c_in: int, c: int, kernel: int = 1, norm: str = '') -> None:
        out[f'{key}.weight'] = (c, c_in, kernel, kernel)
        if norm:
            out[f'{norm}.weight'] = out[f'{norm}.bias'] = (c,)

    conv('conv1', 3, 64, 7, norm='bn1')
    c_in = 64
    for layer, (depth, p) in enumerate(zip(depths, planes), start=1):
        for i in range(depth):
            block = f'layer{layer}.{i}.'
            conv(block + 'conv1', c_in, p, norm=block + 'bn1')
            conv(block + 'conv2', p, p, 3, norm=block + 'bn2')
            conv(block + 'conv2g', p // GROUPS, p, 3, norm=block + 'bn2g')
            conv(block + 'conv_fc1', p, p // 16, norm=block + 'bn_fc1')
            conv(block + 'conv_fc2', p // 16, 2 * p)
            conv(block + 'conv3', p, p * EXPANSION, norm=block + 'bn3')
            if i == 0:
                conv(block + 'downsample.0', c_in, p * EXPANSION, norm=block + 'downsample.1')
            c_in = p * EXPANSION
    return out | {'fc.weight': (num_classes, c_in), 'fc.bias': (num_classes,)}


def parameter_count(depths: Sequence[int]) -> int:
    return sum(math.prod(shape) for shape in shapes(depths).values())


def random_state(
    depths: Sequence[int],
    planes: Sequence[int] = (64, 128, 256, 512),
    num_classes: int = 1000,
    seed: int = 0,
    prefix: str = 'module.',
    tracked: bool = True,
) -> State:
    """Returns a random state that keeps activations near 1, and the attention away from 0 and 1.

    Args:
        depths: Number of blocks in each layer.
        planes: Channels of the SK convolutions of each layer, multiples of 32.
        num_classes: Number of classes.
        seed: Random seed.
        prefix: Prefix of all keys. The authors trained in nn.DataParallel, which adds 'module.'.
        tracked: Add num_batches_tracked, as torch does since 0.4.1.
    """
    rng = np.random.default_rng(seed)

    def normal(shape: Tuple[int, ...], std: float) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * std

    def uniform(shape: Tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))

    state = {}
    for key, shape in shapes(depths, planes, num_classes).items():
        if key == 'fc.weight':
            state[key] = normal(shape, shape[1] ** -0.5)
        elif len(shape) > 1:
            state[key] = normal(shape, (2 / math.prod(shape[1:])) ** 0.5)
        elif key == 'fc.bias':
            state[key] = normal(shape, 0.1)
        else:
            norm, name = key.rsplit('.', 1)
            gain, shift = GAIN_AND_SHIFT.get(norm.rsplit('.', 1)[-1], (1.0, 0.0))
            if name == 'weight':
                state[key] = uniform(shape, 0.5 * gain, 1.5 * gain)
                continue
            state[key] = normal(shape, 0.1) + shift
            state[f'{norm}.running_mean'] = normal(shape, 0.1)
            state[f'{norm}.running_var'] = uniform(shape, 0.5, 1.5)
            if tracked:
                state[f'{norm}.num_batches_tracked'] = torch.tensor(500_400)
    return {prefix + key: value for key, value in state.items()}


class Net:
    """Applies the convolutions of a state by their keys, in float64."""

    def __init__(self, state: State, record: Optional[Dict[str, torch.Tensor]] = None):
        self.state = {key.removeprefix('module.'): value for key, value in state.items()}
        self.record = {} if record is None else record

    def conv(self, key: str, norm: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        x = F.conv2d(x, self.state[f'{key}.weight'].double(), **options)
        if not norm:
            return x
        names = 'weight', 'bias', 'running_mean', 'running_var'
        weight, bias, mean, var = (self.state[f'{norm}.{name}'].double().view(-1, 1, 1) for name in names)
        return (x - mean) / (var + BATCH_NORM_EPS).sqrt() * weight + bias

    def block(self, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        """Applies a block: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        shortcut = x
        if f'{name}.downsample.0.weight' in self.state:
            shortcut = self.conv(f'{name}.downsample.0', f'{name}.downsample.1', x, stride=stride)
        x = self.conv(f'{name}.conv1', f'{name}.bn1', x).relu()
        u1 = self.conv(f'{name}.conv2', f'{name}.bn2', x, stride=stride, padding=1).relu()
        u2 = self.conv(f'{name}.conv2g', f'{name}.bn2g', x, stride=stride, padding=1, groups=GROUPS).relu()
        s = (u1 + u2).mean(dim=(2, 3), keepdim=True)
        z = self.conv(f'{name}.conv_fc1', f'{name}.bn_fc1', s).relu()
        logits1, logits2 = self.conv(f'{name}.conv_fc2', '', z).chunk(2, dim=1)
        a1 = (logits1 - logits2).sigmoid()
        v = a1 * u1 + (1 - a1) * u2
        x = (self.conv(f'{name}.conv3', f'{name}.bn3', v) + shortcut).relu()
        self.record[f'{name}.a1'], self.record[name] = a1, x
        return x


@torch.no_grad()
def forward(state: State, images: torch.Tensor, record: Optional[Dict[str, torch.Tensor]] = None) -> torch.Tensor:
    """Returns the logits (B, classes) in float64.

    Args:
        state: The state of a network of any depth.
        images: (B, 3, H, W), channels R, G, B, from 0 to 1, minus RGB_MEAN, divided by RGB_STD.
        record: Receives the output of each block as NAME, and its attention to the dense branch as NAME.a1.
    """
    net = Net(state, record)
    x = net.conv('conv1', 'bn1', images.double(), stride=2, padding=3).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for layer in 1, 2, 3, 4:
        i = 0
        while f'layer{layer}.{i}.conv1.weight' in net.state:
            x = net.block(f'layer{layer}.{i}', x, stride=2 if layer > 1 and i == 0 else 1)
            i += 1
    return x.mean(dim=(2, 3)) @ net.state['fc.weight'].double().T + net.state['fc.bias'].double()


def preprocess(pixels: np.ndarray) -> torch.Tensor:
    """Converts RGB pixels of 8 bits, (H, W, 3), to the input of the network, (1, 3, H, W), float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (RGB_MEAN, RGB_STD))
    return ((torch.from_numpy(pixels.astype(np.float64)) / 255 - mean) / std).permute(2, 0, 1)[None]


def write_checkpoint(path: Union[str, Path], state: State, legacy: bool = True) -> None:
    """Writes a checkpoint as the authors' training script did.

    Args:
        path: The file, a .pth.tar.
        state: The state of the model.
        legacy: Use the file format from before torch wrote zip archives.
    """
    # the optimizer has one small parameter, because buffers for all weights would double the size of the file
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=1e-4)
    optimizer.step()
    checkpoint = dict(
        epoch=100,
        state_dict=state,
        acc=torch.tensor(77.5),
        best_acc=torch.tensor(77.538),
        optimizer=optimizer.state_dict(),
    )
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
