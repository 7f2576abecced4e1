"""A reference implementation of the authors' Caffe networks: layers, files and forward pass.

It is independent: it does not use timm_sknet, timm or protobuf. Blobs are dicts from the name of a layer to the list of
its float32 arrays.
"""

import math
import struct
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F

Blobs = Dict[str, List[np.ndarray]]

# Arguments of layers().
SKNET50 = dict(depths=(3, 4, 6, 3))
SKNET101 = dict(depths=(3, 4, 23, 3), attn_widths=(32, 16, 32, 64))  # 16 as in the authors' file, not max(C / 16, 32)
TINY = dict(depths=(2, 2, 1, 1), mid_widths=(32, 32, 64, 64), widths=(32, 64, 96, 128), attn_widths=(8, 4, 8, 16))
BGR_MEAN = (104.0, 117.0, 123.0)

BATCH_NORM = 'CuDNNBatchNorm'
BATCH_NORM_EPS = 1e-5
GROUPS = 32  # also a part of the layer names: 3x3g32


class Layer(NamedTuple):
    """A layer of the graph. Its options are the fields of the message for its type in caffe.proto."""

    name: str
    type: str
    bottoms: Tuple[str, ...]
    tops: Tuple[str, ...]
    shapes: Tuple[Tuple[int, ...], ...] = ()
    options: Dict[str, int] = {}


def layers(
    depths: Sequence[int],
    mid_widths: Sequence[int] = (128, 256, 512, 1024),
    widths: Sequence[int] = (256, 512, 1024, 2048),
    attn_widths: Sequence[int] = (32, 32, 32, 64),
    stem_width: int = 64,
    num_classes: int = 1000,
) -> List[Layer]:
    """Returns the layers of the network in Caffe's order.

    Layers with blobs have the names in the authors' files. The names of other layers are invented: a converter must not
    depend on them.

    Args:
        depths: Units in each of the stages conv2 to conv5.
        mid_widths: Channels of the SK convolutions of each stage, multiples of 32.
        widths: Output channels of each stage.
        attn_widths: Channels of z in each stage.
        stem_width: Output channels of the stem.
        num_classes: Number of classes.
    """
    graph = []

    def add(name: str, type: str, bottoms: Sequence[str], shapes=(), **options: int) -> str:
        top = bottoms[0] if type in (BATCH_NORM, 'ReLU') else name  # these work in place
        graph.append(Layer(name, type, tuple(bottoms), (top,), tuple(shapes), options))
        return top

    def conv(name: str, x: str, c_in: int, c: int, kernel: int = 1, norm=True, relu=False, **opts: int) -> str:
        shape = (c, c_in // opts.get('group', 1), kernel, kernel)
        x = add(name, 'Convolution', [x], [shape], num_output=c, bias_term=0, kernel_size=kernel, **opts)
        if norm:
            add(f'{name}/bn', BATCH_NORM, [x], [(1, c, 1, 1)] * 4)
        if relu:
            add(f'{name}/relu', 'ReLU', [x])
        return x

    x = conv('conv1/7x7_s2', 'data', 3, stem_width, 7, relu=True, stride=2, pad=3)
    x = add('pool1/3x3_s2', 'Pooling', [x], pool=0, kernel_size=3, stride=2)
    c_in = stem_width
    for stage, (depth, mid, c, d) in enumerate(zip(depths, mid_widths, widths, attn_widths), start=2):
        for u in range(1, depth + 1):
            unit = f'conv{stage}_{u}'
            stride = 2 if stage > 2 and u == 1 else 1
            shortcut = x
            x = conv(f'{unit}/1x1_reduce', x, c_in, mid, relu=True)
            both = dict(kernel=3, relu=True, group=GROUPS, stride=stride)
            branches = [
                conv(f'{unit}/3x3g32', x, mid, mid, pad=1, **both),
                conv(f'{unit}/3x3g32d2', x, mid, mid, pad=2, dilation=2, **both),
            ]
            x = add(f'{unit}/fuse', 'Eltwise', branches, operation=1)
            x = add(f'{unit}/global_pool', 'Pooling', [x], pool=1, global_pooling=1)
            x = conv(f'{unit}/B_fc1', x, mid, d, relu=True)
            x = conv(f'{unit}/B_fc2', x, d, 2 * mid, norm=False)
            x = add(f'{unit}/softmax', 'Softmax', [x])
            x = add(f'{unit}/select', 'Eltwise', [x, *branches], operation=1)
            x = conv(f'{unit}/1x1_increase', x, mid, c)
            if u == 1:
                shortcut = conv(f'{unit}/1x1_proj', shortcut, c_in, c, stride=stride)
            x = add(unit, 'Eltwise', [shortcut, x], operation=1)
            x = add(f'{unit}/relu', 'ReLU', [x])
            c_in = c
    x = add('pool5/7x7_s1', 'Pooling', [x], pool=1, kernel_size=7, stride=1)
    add('classifier', 'InnerProduct', [x], [(num_classes, c_in), (num_classes,)], num_output=num_classes)
    return graph


def parameter_count(graph: Sequence[Layer]) -> int:
    """Returns the number of learnable parameters: all blobs except the last two of a batch norm, its statistics."""
    return sum(
        math.prod(shape)
        for layer in graph
        for shape in (layer.shapes[:2] if layer.type == BATCH_NORM else layer.shapes)
    )  # fmt: skip


# Mean weight and bias of random batch norms. The last one of a unit is small, because its output is added to the
# shortcut. The one of z keeps the attention away from 0, 1 and 1/2.
GAIN_AND_SHIFT = {'1x1_increase/bn': (0.15, 0.0), 'B_fc1/bn': (0.25, 0.25)}


def random_blobs(graph: Sequence[Layer], seed: int = 0) -> Blobs:
    """Returns random blobs that keep activations near 1, and the attention away from 0 and 1.

    Convolutions have He's initialisation, which keeps the variance. The statistics of the stem are for pixels from 0 to
    255.
    """
    rng = np.random.default_rng(seed)

    def normal(shape: Tuple[int, ...], std: float) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def uniform(shape: Tuple[int, ...], low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float32)

    blobs = {}
    for layer in graph:
        if not layer.shapes:
            continue
        shape = layer.shapes[0]
        if layer.type == BATCH_NORM:
            gain, shift = next((pair for end, pair in GAIN_AND_SHIFT.items() if layer.name.endswith(end)), (1.0, 0.0))
            std = 90.0 if layer.name.startswith('conv1/') else 1.0
            blobs[layer.name] = [
                uniform(shape, 0.5 * gain, 1.5 * gain),
                normal(shape, 0.1) + np.float32(shift),
                normal(shape, 0.1 * std),
                uniform(shape, 0.5 * std**2, 1.5 * std**2),
            ]
        elif layer.type == 'InnerProduct':
            blobs[layer.name] = [normal(shape, shape[1] ** -0.5), normal(layer.shapes[1], 0.1)]
        else:
            blobs[layer.name] = [normal(shape, (2 / math.prod(shape[1:])) ** 0.5)]
    return blobs


# Protobuf's wire format: a message is a sequence of fields, and a field is a tag (its number and encoding) and a value.

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
OPTIONS = {  # field numbers in caffe.proto: the options of a type, and each option
    'Convolution': (
        106,
        dict(num_output=1, bias_term=2, pad=3, kernel_size=4, group=5, stride=6, dilation=18),
    ),
    'Eltwise': (110, dict(operation=1)),
    'InnerProduct': (117, dict(num_output=1)),
    'Pooling': (121, dict(pool=1, kernel_size=2, stride=3, global_pooling=12)),
}


def varint(n: int) -> bytes:
    """Encodes an integer: 7 bits a byte, lowest first; the 8th bit is set if more bytes follow. Negative: 64 bits."""
    n &= 2**64 - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, value: Union[int, float, str, bytes]) -> bytes:
    """Encodes a field: an int as a varint, a float in 32 bits, text or a message (bytes) with its length."""
    if isinstance(value, int):
        return tag(number, VARINT) + varint(value)
    if isinstance(value, float):
        return tag(number, FIXED32) + struct.pack('<f', value)
    value = value.encode() if isinstance(value, str) else value
    return tag(number, LENGTH) + varint(len(value)) + value


def repeated(number: int, values: np.ndarray, packed: bool) -> bytes:
    """Encodes a field of many floats: packed into one value or, as in old files, each with its own tag."""
    values = values.astype(values.dtype.newbyteorder('<')).ravel()
    if packed:
        return field(number, values.tobytes())
    rows = np.empty(values.size, [('tag', 'u1'), ('value', values.dtype)])  # a tag below 16 takes one byte
    rows['tag'] = number << 3 | (FIXED32 if values.itemsize == 4 else FIXED64)
    rows['value'] = values
    return rows.tobytes()


def blob_proto(blob: np.ndarray, packed: bool = True, double: bool = False, legacy: bool = False) -> bytes:
    """Encodes a BlobProto. The fields are in ascending order, as protobuf writes them."""
    out = b''
    if legacy:
        shape = (1,) * (4 - blob.ndim) + blob.shape  # old blobs have four axes; the first ones have size 1
        out += b''.join(field(number, size) for number, size in enumerate(shape, start=1))
    if not double:
        out += repeated(5, blob, packed)
    if not legacy:
        out += field(7, field(1, b''.join(varint(n) for n in blob.shape)))  # Caffe has always packed this field
    if double:
        out += repeated(8, blob.astype(np.float64), packed)
    return out


def layer_parameter(layer: Layer, blobs: Sequence[np.ndarray] = (), extras: bool = True, **blob_options: bool) -> bytes:
    """Encodes a LayerParameter. Without extras, it contains only the fields that a reader of weights needs."""
    out = field(1, layer.name) + field(2, layer.type)
    if extras:
        out += b''.join(field(3, name) for name in layer.bottoms)
        out += b''.join(field(4, name) for name in layer.tops)
        out += b''.join(field(6, field(3, 1.0) + field(4, 1.0)) for _ in blobs)  # ParamSpec: lr_mult, decay_mult
    out += b''.join(field(7, blob_proto(blob, **blob_options)) for blob in blobs)
    if extras:
        out += field(10, 0)  # phase: TRAIN in a snapshot
        if layer.type in OPTIONS:
            number, numbers = OPTIONS[layer.type]
            options = sorted((numbers[name], value) for name, value in layer.options.items())
            out += field(number, b''.join(field(*option) for option in options))
    return out


def write_caffemodel(
    path: Union[str, Path],
    graph: Sequence[Layer],
    blobs: Blobs,
    *,
    packed: bool = True,
    double: bool = False,
    legacy: bool = False,
    extras: bool = True,
) -> None:
    """Writes a .caffemodel (NetParameter).

    Args:
        path: The file.
        graph: All layers; those without blobs are written with extras only.
        blobs: Arrays of each layer.
        packed: Write the numbers of a blob into one field instead of one field for each number.
        double: Write the numbers to double_data instead of data.
        legacy: Write shapes as num, channels, height, width instead of a BlobShape.
        extras: Also write the parts of a Caffe file that a reader of weights must skip.
    """
    with open(path, 'wb') as file:
        if extras:
            shape = b''.join(varint(n) for n in (1, 3, 224, 224))
            file.write(field(1, 'SKNet') + field(3, 'data') + field(8, field(1, shape)))
        for layer in graph:
            if extras or layer.shapes:
                options = dict(extras=extras, packed=packed, double=double, legacy=legacy)
                file.write(field(100, layer_parameter(layer, blobs.get(layer.name, ()), **options)))


def caffe_max_pool(x: torch.Tensor, kernel: int = 3, stride: int = 2) -> torch.Tensor:
    """Computes Caffe's max pooling without padding. The last window can be incomplete, but must start in the input.

    Args:
        x: (B, C, H, W).
    """

    def windows(size: int) -> int:
        n = math.ceil((size - kernel) / stride) + 1
        return n - 1 if (n - 1) * stride >= size else n

    h, w = x.shape[-2:]
    nh, nw = windows(h), windows(w)
    missing = [max((n - 1) * stride + kernel - size, 0) for n, size in ((nw, w), (nh, h))]
    x = F.pad(x, (0, missing[0], 0, missing[1]), value=-math.inf)
    taps = [
        x[..., i : i + (nh - 1) * stride + 1 : stride, j : j + (nw - 1) * stride + 1 : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return torch.stack(taps).amax(dim=0)


class Net:
    """Applies layers with blobs by their names, in float64."""

    def __init__(self, blobs: Blobs, record: Optional[Dict[str, torch.Tensor]] = None):
        self.blobs = blobs
        self.record = {} if record is None else record

    def blob(self, name: str) -> List[torch.Tensor]:
        return [torch.from_numpy(blob).double() for blob in self.blobs[name]]

    def conv(self, name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        """Applies a convolution and its batch norm, if it has one: (B, C_in, H, W) -> (B, C, H', W')."""
        x = F.conv2d(x, *self.blob(name), **options)
        if f'{name}/bn' in self.blobs:
            scale, bias, mean, variance = self.blob(f'{name}/bn')
            x = (x - mean) / (variance + BATCH_NORM_EPS).sqrt() * scale + bias
        return x

    def unit(self, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
        """Applies a unit: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        proj = f'{name}/1x1_proj'
        shortcut = self.conv(proj, x, stride=stride) if proj in self.blobs else x
        x = self.conv(f'{name}/1x1_reduce', x).relu()
        u1 = self.conv(f'{name}/3x3g32', x, stride=stride, padding=1, groups=GROUPS).relu()
        u2 = self.conv(f'{name}/3x3g32d2', x, stride=stride, padding=2, dilation=2, groups=GROUPS).relu()
        s = (u1 + u2).mean(dim=(2, 3), keepdim=True)
        z = self.conv(f'{name}/B_fc1', s).relu()
        logits1, logits2 = self.conv(f'{name}/B_fc2', z).chunk(2, dim=1)
        a1 = logits1.exp() / (logits1.exp() + logits2.exp())
        v = a1 * u1 + (1 - a1) * u2
        x = (shortcut + self.conv(f'{name}/1x1_increase', v)).relu()
        self.record[f'{name}/a1'], self.record[name] = a1, x
        return x


@torch.no_grad()
def forward(blobs: Blobs, x: torch.Tensor, record: Optional[Dict[str, torch.Tensor]] = None) -> torch.Tensor:
    """Returns the logits (B, classes) in float64.

    Args:
        blobs: The blobs of a network of any depth.
        x: (B, 3, H, W), channels B, G, R, from 0 to 255, minus BGR_MEAN.
        record: Receives the output of each unit as NAME, and its attention to the first branch as NAME/a1.
    """
    net = Net(blobs, record)
    x = caffe_max_pool(net.conv('conv1/7x7_s2', x.double(), stride=2, padding=3).relu())
    for stage in 2, 3, 4, 5:
        u = 1
        while f'conv{stage}_{u}/1x1_reduce' in blobs:
            x = net.unit(f'conv{stage}_{u}', x, stride=2 if stage > 2 and u == 1 else 1)
            u += 1
    weight, bias = net.blob('classifier')
    return x.mean(dim=(2, 3)) @ weight.T + bias


def preprocess(pixels: np.ndarray) -> torch.Tensor:
    """Converts RGB pixels of 8 bits, (H, W, 3), to the input of the network, (1, 3, H, W), float64."""
    bgr = torch.from_numpy(pixels[..., ::-1].astype(np.float64))
    return (bgr - torch.tensor(BGR_MEAN, dtype=torch.float64)).permute(2, 0, 1)[None]
