"""Compares converted models with independent references, and tests the references.

The references implement the authors' networks in float64 without timm_sknet. The converted models run in float32 with
timm's preprocessing. If both give the same logits for photographs, all weights were converted correctly.
"""

import itertools
import math

import caffe_reference as caffe
import numpy as np
import pytest
import pytorch_reference as pytorch
import timm
import torch
import torch.nn.functional as F
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from timm.data import create_transform, resolve_data_config

import timm_sknet
from timm_sknet.cli import main

PHOTOS = [f'{timm_sknet.__path__[0]}/photos/{name}.jpg' for name in ('bird', 'cat')]


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def attention_and_outputs(record):
    attention = [value for name, value in record.items() if name.endswith('a1')]
    outputs = [value for name, value in record.items() if not name.endswith('a1')]
    assert len(attention) == len(outputs) > 0
    return attention, outputs


def assert_alive(record, logits):
    """Checks that activations and attention are in a useful range, and that the logits depend on the image."""
    attention, outputs = attention_and_outputs(record)
    assert all(0.02 < (a1 - 0.5).abs().mean() < 0.4 for a1 in attention)
    assert all(0.2 < x.std() < 5 and x.max() < 100 for x in outputs)
    assert distance(logits[0], logits[1]) > 0.05


@pytest.mark.parametrize('graph, parameters', [
    (caffe.layers((2, 2, 2, 2)), 16_746_408),
    (caffe.layers(**caffe.SKNET50), 27_479_784),
    (caffe.layers(**caffe.SKNET101 | dict(attn_widths=(32, 32, 32, 64))), 48_736_040),
    (caffe.layers(**caffe.SKNET101), 48_686_760),
], ids=['sknet26', 'sknet50', 'sknet101', "authors' sknet101"])  # fmt: skip
def test_caffe_parameters(graph, parameters):
    assert caffe.parameter_count(graph) == parameters


def test_pytorch_parameters():
    assert pytorch.parameter_count(pytorch.SK_RESNET50) == 26_154_496
    assert pytorch.parameter_count(pytorch.SK_RESNET101) == 45_678_112


@pytest.mark.parametrize('size', [(3, 4), (5, 6), (7, 8), (112, 160), (113, 161)])
def test_the_pool_agrees_with_caffe(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64) - 9  # lower than a padding with zeros
    ours = caffe.caffe_max_pool(x)
    assert torch.equal(ours, F.max_pool2d(x, 3, stride=2, padding=0, ceil_mode=True))
    rows, columns = (range(0, n - 1, 2) for n in size)  # Caffe counts a last window of 2, not one of 1
    slow = [[x[..., i : i + 3, j : j + 3].amax(dim=(2, 3)) for j in columns] for i in rows]
    assert torch.equal(ours, torch.stack([torch.stack(row, dim=-1) for row in slow], dim=-2))


def test_pool_drops_a_window_that_starts_beyond_the_input():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert caffe.caffe_max_pool(x, kernel=1, stride=3).flatten().tolist() == [0, 3, 15, 18]
    assert caffe.caffe_max_pool(x, kernel=2, stride=4).flatten().tolist() == [6, 9, 21, 24]


def conv_by_taps(x, weight, norm=None, stride=1, dilation=1, groups=1):
    """Computes a convolution tap by tap in numpy. It is padded to keep the size, and norm is folded into the weights.

    Args:
        x: (B, C_in, H, W).
        weight: (C, C_in / groups, k, k).
        norm: Scale, bias, mean and variance, C numbers each.
        stride: Step between the pixels of the full result that are returned.
        dilation: Distance of taps.
        groups: Number of groups.
    """
    (b, _, h, w), (c, c_in, k, _) = x.shape, weight.shape
    weight, shift = weight.astype(np.float64), np.zeros(c)
    if norm is not None:
        scale, bias, mean, variance = (np.asarray(values, np.float64).ravel() for values in norm)
        weight = weight * (scale / np.sqrt(variance + 1e-5))[:, None, None, None]
        shift = bias - mean * scale / np.sqrt(variance + 1e-5)
    pad = dilation * (k // 2)
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))).reshape(b, groups, c_in, h + 2 * pad, w + 2 * pad)
    weight = weight.reshape(groups, c // groups, c_in, k, k)
    out = np.zeros((b, groups, c // groups, h, w))
    for i, j in itertools.product(range(k), repeat=2):
        window = x[..., i * dilation : i * dilation + h, j * dilation : j * dilation + w]
        out += np.einsum('bgihw,goi->bgohw', window, weight[..., i, j])
    return (out.reshape(b, c, h, w) + shift[:, None, None])[..., ::stride, ::stride]


def relu(x):
    return np.maximum(x, 0)


def select(u1, u2, logits):
    """Computes V in a loop over channels. The first C of the logits (B, 2C, 1, 1) belong to u1."""
    v = np.empty_like(u1)
    c = u1.shape[1]
    for b, i in itertools.product(range(u1.shape[0]), range(c)):
        e1, e2 = math.exp(logits[b, i, 0, 0]), math.exp(logits[b, c + i, 0, 0])
        v[b, i] = (e1 * u1[b, i] + e2 * u2[b, i]) / (e1 + e2)
    return v


@pytest.mark.parametrize('unit, stride', [('conv2_1', 1), ('conv2_2', 1), ('conv3_1', 2)])
def test_a_caffe_unit_computed_a_second_way(unit, stride):
    graph = caffe.layers(**caffe.TINY)
    blobs = caffe.random_blobs(graph)
    x = torch.randn(2, blobs[f'{unit}/1x1_reduce'][0].shape[1], 9, 8, dtype=torch.float64)

    def layer(name, x, **kwargs):
        return conv_by_taps(x, blobs[f'{unit}/{name}'][0], blobs.get(f'{unit}/{name}/bn'), **kwargs)

    y = relu(layer('1x1_reduce', x.numpy()))
    u1 = relu(layer('3x3g32', y, stride=stride, groups=32))
    u2 = relu(layer('3x3g32d2', y, stride=stride, dilation=2, groups=32))
    s = u1.mean(axis=(2, 3), keepdims=True) + u2.mean(axis=(2, 3), keepdims=True)
    y = layer('1x1_increase', select(u1, u2, layer('B_fc2', relu(layer('B_fc1', s)))))
    y = relu(y + (layer('1x1_proj', x.numpy(), stride=stride) if unit.endswith('_1') else x.numpy()))
    assert distance(caffe.Net(blobs).unit(unit, x, stride), torch.from_numpy(y)) < 1e-12


@pytest.mark.parametrize('block, stride', [('layer1.0', 1), ('layer1.1', 1), ('layer2.0', 2)])
def test_a_pytorch_block_computed_a_second_way(block, stride):
    state = pytorch.random_state(**pytorch.TINY)
    x = torch.randn(2, state[f'module.{block}.conv1.weight'].shape[1], 9, 8, dtype=torch.float64)

    def layer(key, norm, x, **kwargs):
        norms = 'weight', 'bias', 'running_mean', 'running_var'
        norm = norm and [state[f'module.{block}.{norm}.{name}'].numpy() for name in norms]
        return conv_by_taps(x, state[f'module.{block}.{key}.weight'].numpy(), norm, **kwargs)

    y = relu(layer('conv1', 'bn1', x.numpy()))
    u1 = relu(layer('conv2', 'bn2', y, stride=stride))
    u2 = relu(layer('conv2g', 'bn2g', y, stride=stride, groups=32))
    s = u1.mean(axis=(2, 3), keepdims=True) + u2.mean(axis=(2, 3), keepdims=True)
    y = layer('conv3', 'bn3', select(u1, u2, layer('conv_fc2', None, relu(layer('conv_fc1', 'bn_fc1', s)))))
    shortcut = x.numpy()
    if block.endswith('0'):
        shortcut = layer('downsample.0', 'downsample.1', shortcut, stride=stride)
    y = relu(y + shortcut)
    assert distance(pytorch.Net(state).block(block, x, stride), torch.from_numpy(y)) < 1e-12


def pixels(path, size=224):
    return np.array(Image.open(path).convert('RGB').resize((size, size)))


def test_tiny_networks_are_alive():
    record = {}
    blobs = caffe.random_blobs(caffe.layers(**caffe.TINY))
    x = torch.cat([caffe.preprocess(pixels(path)) for path in PHOTOS])
    logits = caffe.forward(blobs, x, record)
    assert logits.shape == (2, 1000) and logits.dtype == torch.float64
    assert_alive(record, logits)
    record = {}
    x = torch.cat([pytorch.preprocess(pixels(path)) for path in PHOTOS])
    logits = pytorch.forward(pytorch.random_state(**pytorch.TINY), x, record)
    assert logits.shape == (2, 10) and logits.dtype == torch.float64
    assert_alive(record, logits)


@pytest.fixture(scope='module')
def net_parameter():
    """A protobuf class with the fields of caffe.proto that a reader of weights needs, and a few more."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name='caffe_reference.proto', package='caffe', syntax='proto2')
    for message, fields in dict(
        BlobShape=[('dim', 1, types.TYPE_INT64, True)],
        BlobProto=[
            *[(name, i, types.TYPE_INT32, False) for i, name in enumerate(('num', 'channels', 'height', 'width'), 1)],
            ('data', 5, types.TYPE_FLOAT, True),
            ('shape', 7, 'BlobShape', False),
            ('double_data', 8, types.TYPE_DOUBLE, True),
        ],
        ConvolutionParameter=[('num_output', 1, types.TYPE_UINT32, False), ('group', 5, types.TYPE_UINT32, False)],
        LayerParameter=[
            ('name', 1, types.TYPE_STRING, False),
            ('type', 2, types.TYPE_STRING, False),
            ('bottom', 3, types.TYPE_STRING, True),
            ('top', 4, types.TYPE_STRING, True),
            ('blobs', 7, 'BlobProto', True),
            ('convolution_param', 106, 'ConvolutionParameter', False),
        ],
        NetParameter=[
            ('name', 1, types.TYPE_STRING, False),
            ('input', 3, types.TYPE_STRING, True),
            ('input_shape', 8, 'BlobShape', True),
            ('layer', 100, 'LayerParameter', True),
        ],
    ).items():  # fmt: skip
        descriptor = file.message_type.add(name=message)
        for name, number, kind, many in fields:
            label = types.LABEL_REPEATED if many else types.LABEL_OPTIONAL
            field = descriptor.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = types.TYPE_MESSAGE, f'.caffe.{kind}'
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName('caffe.NetParameter'))


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize('extras', [True, False])
def test_protobuf_reads_the_caffemodel(packed, double, legacy, extras, net_parameter, tmp_path):
    graph = caffe.layers(**caffe.TINY, num_classes=10)
    blobs = caffe.random_blobs(graph)
    path = tmp_path / 'tiny.caffemodel'
    caffe.write_caffemodel(path, graph, blobs, packed=packed, double=double, legacy=legacy, extras=extras)
    net = net_parameter.FromString(path.read_bytes())
    assert (net.name, list(net.input)) == (('SKNet', ['data']) if extras else ('', []))
    assert [layer.name for layer in net.layer] == [layer.name for layer in graph if extras or layer.shapes]
    assert all(list(layer.top) and list(layer.bottom) for layer in net.layer) == extras
    read = {}
    for layer in net.layer:
        assert layer.HasField('convolution_param') == (extras and layer.type == 'Convolution')
        if layer.HasField('convolution_param'):
            assert layer.convolution_param.num_output == blobs[layer.name][0].shape[0]
            assert layer.convolution_param.group == (32 if '3x3g32' in layer.name else 0)
        for blob in layer.blobs:
            assert blob.HasField('num') == legacy != blob.HasField('shape')
            shape = (blob.num, blob.channels, blob.height, blob.width) if legacy else blob.shape.dim
            values, others = (blob.double_data, blob.data) if double else (blob.data, blob.double_data)
            assert not others
            read.setdefault(layer.name, []).append(np.array(values, dtype=np.float32).reshape(shape))
    assert list(read) == list(blobs)
    for name in blobs:
        assert [layer.type for layer in net.layer if layer.name == name] == [g.type for g in graph if g.name == name]
        for a, b in zip(read[name], blobs[name], strict=True):
            assert a.shape == ((1,) * (4 - b.ndim) + b.shape if legacy else b.shape)
            assert np.array_equal(a.reshape(b.shape), b)


@pytest.mark.parametrize('n, expected', [(0, '00'), (127, '7f'), (128, '8001'), (300, 'ac02'), (-1, 'ff' * 9 + '01')])
def test_varint(n, expected):
    assert caffe.varint(n).hex() == expected


@pytest.mark.parametrize('legacy', [True, False])
def test_a_checkpoint_has_the_format_of_the_authors(legacy, tmp_path):
    state = pytorch.random_state(**pytorch.TINY)
    pytorch.write_checkpoint(tmp_path / 'tiny.pth.tar', state, legacy=legacy)
    assert ((tmp_path / 'tiny.pth.tar').read_bytes()[:2] != b'PK') == legacy
    checkpoint = torch.load(tmp_path / 'tiny.pth.tar', weights_only=True)
    assert set(checkpoint) == {'state_dict', 'epoch', 'acc', 'best_acc', 'optimizer'}
    assert checkpoint['acc'].shape == checkpoint['best_acc'].shape == ()
    assert checkpoint['optimizer']['state'][0]['momentum_buffer'].shape == (3,)
    assert list(checkpoint['state_dict']) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in checkpoint['state_dict'].items())


def caffe_source(folder, config, **options):
    """Writes a random network; returns the file and a function that computes float64 logits from pixels."""
    graph = caffe.layers(**config)
    blobs = caffe.random_blobs(graph)
    caffe.write_caffemodel(folder / 'authors.caffemodel', graph, blobs, **options)
    return folder / 'authors.caffemodel', lambda x, record: caffe.forward(blobs, caffe.preprocess(x), record)


def pytorch_source(folder, depths):
    state = pytorch.random_state(depths)
    pytorch.write_checkpoint(folder / 'authors.pth.tar', state)
    return folder / 'authors.pth.tar', lambda x, record: pytorch.forward(state, pytorch.preprocess(x), record)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('arch, write, options', [
    ('sknet50_caffe', caffe_source, dict(config=caffe.SKNET50, packed=False, legacy=True)),  # an old file format
    ('sknet101_caffe', caffe_source, dict(config=caffe.SKNET101)),
    ('sk_resnet50', pytorch_source, dict(depths=pytorch.SK_RESNET50)),
], ids=['sknet50_caffe', 'sknet101_caffe', 'sk_resnet50'])  # fmt: skip
def test_a_converted_model_has_the_authors_logits(arch, write, options, tmp_path):
    source, forward = write(tmp_path, **options)
    out = tmp_path / 'out'
    assert main(['convert', str(source), str(out), '--arch', arch]) == 0
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    for size in 224, 320:
        config = resolve_data_config({}, model=model, use_test_size=False)
        assert list(config['input_size']) == [3, 224, 224]
        transform = create_transform(**config | dict(input_size=(3, size, size)))
        *steps, to_tensor, normalize = transform.transforms  # the last two depend on the converted preprocessing
        converted, expected = [], []
        record = {}
        for path in PHOTOS:
            image = Image.open(path).convert('RGB')
            converted.append(model(transform(image)[None])[0])
            for step in steps:
                image = step(image)
            x = np.array(image)
            assert x.shape == (size, size, 3) and x.dtype == np.uint8
            expected.append(forward(x, record)[0])
        converted, expected = torch.stack(converted), torch.stack(expected)
        assert_alive(record, expected)
        assert distance(converted.double(), expected) < 1e-5
