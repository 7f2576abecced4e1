"""A checkpoint of SK-ResNet-50 as Google's code and TensorFlow 1 wrote it, and the outputs of Google's network.

The weights are random values, drawn from a seed and the name of the variable. `r50_1x_sk1.npz` contains the rest: the
running statistics, and the outputs. `r50_1x_sk1.index` is TensorFlow's own file. The checksums in it show that `write`
draws the same weights.
"""

import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

INDEX = Path(__file__).with_name('r50_1x_sk1.index')
DATA = 'model.ckpt-1.data-00000-of-00001'
DEPTHS = 3, 4, 6, 3
READ = 'base_model/', 'head_supervised/'


class Variable(NamedTuple):
    name: str
    shape: Tuple[int, ...]
    offset: int
    size: int


def write(folder: Path) -> Path:
    """Writes the checkpoint into a folder and returns its prefix.

    The files have 540 MB. Variables that are not part of the network, such as the optimizer's, are zero, and take no
    space on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-1"\n')
    (folder / 'model.ckpt-1.index').write_bytes(INDEX.read_bytes())
    with (folder / DATA).open('wb') as file:
        for variable in variables():
            file.truncate(max(file.tell(), variable.offset + variable.size))
            if variable.name.startswith(READ) and not variable.name.endswith('/Momentum'):
                file.seek(variable.offset)
                file.write(value(variable.name, variable.shape).tobytes())
    return folder / 'model.ckpt-1'


def images(size: int) -> Tensor:
    """Returns the images of this size, (2, 3, size, size), with values from 0 to 1."""
    meta = kept()[1]
    rng = np.random.default_rng([meta['seed'], 1])
    count, calibration = map(int, meta['calibrate'].split('x'))
    _draw_images(rng, count, calibration)  # these gave the running statistics
    for other in map(int, meta['sizes']):  # all images are drawn from one sequence
        drawn = _draw_images(rng, meta['batch'], other)
        if other == size:
            return drawn
    raise ValueError(f'there are no images of size {size}')


def expected(size: int) -> Dict[str, Tensor]:
    """Returns the outputs of Google's network for the images of a size.

    logits: (2, 1000). pooled: features before the classifier, (2, 2048). attn: attention of the first SK convolution,
    (2, 2, 64), which is batch, branch, channel.
    """
    return {name: torch.from_numpy(kept()[0][f'{name}_{size}'].copy()) for name in ('logits', 'pooled', 'attn')}


@cache
def kept() -> Tuple[Dict[str, np.ndarray], Dict]:
    """Returns the content of the npz file: the arrays by name, and the settings of Google's network."""
    with np.load(INDEX.with_suffix('.npz')) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop('meta')))


@cache
def variables() -> List[Variable]:
    """Returns all variables in the index. This parser is independent of the one under test."""
    index = INDEX.read_bytes()
    _, _, start, size = _varints(index, len(index) - 48, 4)[0]
    found = []
    for _, handle in _entries(index[start : start + size]):
        start, size = _varints(handle, 0, 2)[0]
        found += [_variable(key.decode(), entry) for key, entry in _entries(index[start : start + size]) if key]
    return found


def value(name: str, shape: Tuple[int, ...]) -> np.ndarray:
    """Returns the value of a variable of the network."""
    arrays, meta = kept()
    if name in arrays:
        return arrays[name]
    rng = np.random.default_rng([meta['seed'], zlib.crc32(name.encode())])
    scope, kind = name.rsplit('/', 1)
    if kind == 'kernel':
        attention = len(shape) == 4 and shape[0] == 1 and shape[3] > 2 * shape[2]
        gain = 1.5 if attention or len(shape) == 2 else np.sqrt(2.0)
        drawn = rng.normal(0.0, gain / np.sqrt(np.prod(shape[:-1])), shape)
    elif kind == 'gamma':
        drawn = rng.uniform(0.5, 1.5, shape) * np.where(rng.random(shape) < 0.1, -1, 1)
        if scope in _last_norms():
            drawn *= 0.4 * np.sqrt(16 / sum(DEPTHS))
    else:
        drawn = rng.normal(0.0, 0.3, shape)
    return drawn.astype(np.float32)


@cache
def _last_norms() -> List[str]:
    """Returns the names of the last batch norm of each unit."""
    numbers, count = [], 3  # the stem has three
    for depth in DEPTHS:
        for unit in range(depth):
            count += 5 if unit == 0 else 4  # the shortcut of the first unit has one, too
            numbers.append(count - 1)
    return [f'base_model/batch_normalization_{number}' for number in numbers]


def _draw_images(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Draws images of 7 x 7 areas of different colour and brightness, with noise."""
    colours = rng.random((count, 7, 7, 3))
    area = np.arange(size) * 7 // size
    smooth = colours[:, area][:, :, area] * rng.uniform(0.3, 1.0, (count, 1, 1, 3))
    drawn = 0.7 * smooth + 0.3 * rng.random((count, size, size, 3))
    return torch.from_numpy(drawn.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def _varints(data: bytes, at: int, count: int) -> Tuple[List[int], int]:
    """Returns that many numbers, and the position behind them."""
    numbers = []
    for _ in range(count):
        number = shift = 0
        while data[at] >= 128:
            number |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
        numbers.append(number | data[at] << shift)
        at += 1
    return numbers, at


def _entries(block: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """Yields keys and values of a block of the index."""
    (restarts,) = struct.unpack('<I', block[-4:])
    at, key = 0, b''
    while at < len(block) - 4 - 4 * restarts:
        (shared, rest, size), at = _varints(block, at, 3)
        key = key[:shared] + block[at : at + rest]
        at += rest + size
        yield key, block[at - size : at]


def _variable(name: str, entry: bytes) -> Variable:
    found: Dict[int, int] = {}
    shape: List[int] = []
    at = 0
    while at < len(entry):
        (tag,), at = _varints(entry, at, 1)
        if tag == 0x35:  # the checksum
            at += 4
            continue
        (number,), at = _varints(entry, at, 1)
        if tag == 0x12:  # the shape: for each axis, 0x12, the length, 0x08 and the size
            end = at + number
            while at < end:
                (_, length, _, axis), at = _varints(entry, at, 4)
                assert length > 1
                shape.append(axis)
        found[tag >> 3] = number
    return Variable(name, tuple(shape), found.get(4, 0), found[5])
