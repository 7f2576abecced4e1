"""Fuzz tests of the readers of weights: a file that is almost valid is read, or refused with a message.

FUZZ_EXAMPLES sets the number of files of each type. Without it, there are few files, and they are always the same.
"""

import argparse
import io
import json
import math
import os
import pickletools
import re
import resource
import shutil
import signal
import struct
import warnings
import zipfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import caffe_reference
import pytest
import pytorch_reference
import timm
import torch
from caffe_reference import varint
from hostile import Call, laughs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from timm_sknet import loading
from timm_sknet.checkpoints import convert, reading
from timm_sknet.network import SKNetCfg
from timm_sknet.sknets import model_cfgs

pytestmark = pytest.mark.filterwarnings('ignore')  # torch warns about some of the files made here
FILE = Path('weights')
MODELS = 'sknet26', 'sk_resnet50'
SIZES = dict(depths=(2, 1), mid_widths=(32, 32), widths=(32, 48))
GRAPH = caffe_reference.layers(**SIZES, attn_widths=(4, 2), stem_width=8, num_classes=5)
MB = 2**20


def fuzz(share: float = 1.0):
    """Returns the settings of a test with this share of FUZZ_EXAMPLES files."""
    examples = int(int(os.environ.get('FUZZ_EXAMPLES', 800)) * share)
    return settings(
        max_examples=examples,
        derandomize='FUZZ_EXAMPLES' not in os.environ,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope='module', autouse=True)
def tiny(tmp_path_factory):
    """Reduces the models to two small ones, caches their shapes, and changes to an empty folder."""
    variant = dict(depths=(1, 1), mid_widths=(32, 32), widths=(128, 128), strides=(1, 2))
    cfgs = [SKNetCfg(**SIZES, strides=(1, 2), stem=(8, 7, 2)), model_cfgs['sk_resnet50'].override(**variant)]
    built = reading.shapes
    known = {}

    def shapes(arch, most=math.inf, /, **args):
        key = arch, most, repr(args)
        if key not in known:
            known[key] = built(arch, most, **args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('fuzz'))
        patch.setattr(reading, 'shapes', shapes)
        for module in reading, loading:
            patch.setattr(module, 'hf_hub_download', mock.Mock(side_effect=OSError('no network')))
        with mock.patch.dict(model_cfgs, zip(MODELS, cfgs), clear=True):
            yield


class Content(bytes):
    """Bytes with a short repr: a failing test leaves the file in its folder."""

    def __repr__(self):
        return f'<{len(self)} bytes>'


class Hang(BaseException):
    """Raised after a timeout. It is not an Exception, so the code under test does not catch it."""


@contextmanager
def bounded(seconds: float = 5, memory: int = 64 * MB):
    """Context manager that fails if the code uses more CPU time or memory, or gives a warning."""

    def stop(*_):
        raise Hang

    signal.signal(signal.SIGVTALRM, stop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert not caught, str(caught[0])
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < memory


def try_to_read(content: bytes, arch: str, whole: bool, source: str = str(FILE)) -> str:
    """Returns why the content is refused, or '' if it is read; with `whole`, it is also converted to a folder."""
    FILE.write_bytes(content)
    before = os.listdir()
    if whole:
        with bounded(memory=256 * MB):
            try:
                convert.convert(source, Path('out'), arch)
                shutil.rmtree('out')
            except (ValueError, OSError) as e:
                assert re.fullmatch(r'.{10,}', str(e))
            finally:
                assert os.listdir() == before
    with bounded():
        try:
            weights = reading.read(source, arch)
            state, args = reading.to_state_dict(weights, arch)
            state = convert.check_and_cast(state, torch.float32)
        except (ValueError, OSError) as e:
            assert str(e).strip()
            return str(e)
        finally:
            assert os.listdir() == before
    classes = len(state['head.fc.weight']) if 'head.fc.weight' in state else 0
    expected = timm.create_model(arch, device='meta', num_classes=classes, **args).state_dict()
    names = expected.keys() if any(key.endswith('num_batches_tracked') for key in state) else state.keys()
    assert {k: v.shape for k, v in state.items()} == {k: expected[k].shape for k in names}
    assert all(value.isfinite().all() for value in state.values())
    return ''


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 5, 7, 8, 32, 100, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
RARELY = st.integers(0, 99).map(lambda number: number == 77)
ARCHS = st.sampled_from([*MODELS, MODELS[0]])


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Draws a truncated copy of the content, or one with a few bytes changed, inserted or left out."""
    at = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(['cut', 'change', 'insert', 'leave out']))
    some = draw(st.binary(min_size=1, max_size=12)) if how in ('change', 'insert') else b''
    rest = {'cut': len(content), 'insert': at, 'change': at + len(some), 'leave out': at + draw(st.integers(1, 100))}[
        how
    ]
    return Content(content[:at] + some + content[rest:])


# .caffemodel

NET, LAYER, BLOB, SHAPE = 'net', 'layer', 'blob', 'shape'
INSIDE = {(NET, 100): LAYER, (LAYER, 7): BLOB, (BLOB, 7): SHAPE}
NAMES = [layer.name for layer in GRAPH if layer.shapes]
VALUES = st.one_of(
    st.sampled_from(
        [b'', b'\xff', *(struct.pack('<f', x) for x in (math.nan, math.inf, 1.0)), struct.pack('<2d', 1e39, math.nan)]
    ),
    st.sampled_from(NAMES).map(str.encode),
    st.lists(NUMBERS, max_size=6).map(lambda numbers: b''.join(map(varint, numbers))),
    st.binary(max_size=20),
)


@cache
def caffemodel(**options: bool) -> bytes:
    caffe_reference.write_caffemodel(FILE, GRAPH, caffe_reference.random_blobs(GRAPH), **options)
    return FILE.read_bytes()


def fields_of(message: bytes):
    """Returns number, wire type and value of each field, as far as they can be read."""

    def number():
        value = shift = 0
        while True:
            byte = (file.read(1) or b'\0')[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    file, fields = io.BytesIO(message), []
    while file.tell() < len(message):
        of, wire_type = divmod(number(), 8)
        value = number() if wire_type == 0 else file.read(min({1: 8, 5: 4}.get(wire_type) or number(), len(message)))
        fields.append((of, wire_type, value))
    return fields


def encoded(number: int, wire_type: int, value, length=None) -> bytes:
    if isinstance(value, int):
        value = varint(value)
    elif wire_type == 2:
        value = varint(len(value) if length is None else length) + value
    return caffe_reference.tag(number, wire_type) + value


@st.composite
def mutated_message(draw, message: bytes, kind: str = NET) -> bytes:
    """Draws a copy of the message with one field, at any depth, changed, moved or left out."""
    fields = fields_of(message)
    if not fields:
        return draw(VALUES)
    at = draw(st.integers(0, len(fields) - 1))
    number, wire_type, value = fields[at]
    out = [encoded(*field) for field in fields]
    inside = INSIDE.get((kind, number)) if wire_type == 2 else None
    how = draw(
        st.sampled_from('drop drop twice swap number wire-type length long value end begin split reversed huge'.split())
    )
    if inside and draw(st.integers(0, 3)):
        out[at] = encoded(number, wire_type, draw(mutated_message(value, inside)))
    elif how == 'drop':
        del out[at]
    elif how == 'twice':
        out[at] *= draw(st.integers(2, 6))
    elif how == 'swap':
        other = draw(st.integers(0, len(out) - 1))
        out[at], out[other] = out[other], out[at]
    elif how == 'number':
        out[at] = encoded(draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 100, 2**29])), wire_type, value)
    elif how == 'wire-type':
        out[at] = encoded(number, draw(st.integers(0, 7)), value)
    elif how == 'length':
        out[at] = encoded(number, 2, b'' if isinstance(value, int) else value, draw(NUMBERS))
    elif how == 'long':
        out[at] = caffe_reference.tag(number, 0) + b'\xff' * draw(st.integers(1, 12)) + b'\x01'
    elif isinstance(value, int):
        out[at] = encoded(number, 0, draw(NUMBERS))
    else:
        some = draw(VALUES)
        value = {
            'value': some,
            'end': value + some,
            'begin': some + value[len(some) :],
            'split': value[:-4],
            'reversed': value[::-1],
            'huge': bytes(600_000),
        }[how]
        out[at] = encoded(number, wire_type, value)
    return Content(b''.join(out))


@given(st.data(), ARCHS)
@fuzz()
def test_caffe_files(data, arch):
    draw = data.draw
    content = caffemodel(**draw(st.sampled_from([{}, {'packed': False}, {'double': True}, {'legacy': True}])))
    for _ in range(draw(st.integers(1, 2))):
        content = draw(mutated_message(content))
        if not draw(st.integers(0, 9)):
            content = draw(damage(content))
            break
    try_to_read(content, arch, draw(RARELY))


# PyTorch checkpoints


def itself():
    """Returns an object that contains itself, so that its text never ends."""
    value = argparse.Namespace()
    value.value = value
    return value


def attributes(value, **attributes):
    """Sets attributes of the value, which can replace its methods."""
    vars(value).update(attributes)
    return value


def lying(size, stride, offset=0):
    """Returns a tensor with any size and stride in a storage of four elements."""
    storage = torch.zeros(4).storage()
    # there is no public function for this
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


TENSORS = {
    'nan': lambda w: w * math.nan,
    'infinity': lambda w: w + math.inf,
    'too large': lambda w: torch.full(w.shape, 1e300, dtype=torch.float64),
    'complex': lambda w: w.to(torch.complex64),
    'conjugated': lambda w: w.to(torch.complex64).conj(),
    'negated': torch._neg_view,  # public operations resolve the view
    'int': lambda w: w.to(torch.int32),
    'bool': lambda w: w > 0,
    'uint16': lambda w: torch.ones(w.shape, dtype=torch.uint16),
    'bf16': lambda w: w.bfloat16(),
    'half': lambda w: w.half(),
    'double': lambda w: w.double(),
    'float8': lambda w: w.to(torch.float8_e4m3fn),
    'float8 nan': lambda w: (w * math.nan).to(torch.float8_e5m2),
    'float4': lambda w: torch.empty(w.shape, dtype=torch.float4_e2m1fn_x2),
    'bits': lambda w: torch.empty(w.shape, dtype=torch.bits8),
    'sparse': lambda w: w.to_sparse(),
    'csr': lambda w: w.reshape(len(w) if w.ndim else 1, -1).to_sparse_csr(),
    'quantised': lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
    'meta': lambda w: w.to('meta'),
    'huge meta': lambda w: torch.empty(2**40, 3, 7, 7, device='meta'),
    'expanded': lambda w: w.flatten()[:1].expand(w.numel()).reshape(w.shape) if w.numel() else w,
    'one for all': lambda w: torch.zeros(()).expand(w.shape),
    'many classes': lambda w: torch.zeros(()).expand(10**9, *w.shape[1:]),
    'many channels': lambda w: torch.zeros(()).expand(w.shape[:1] + (10**9,) + w.shape[2:]),
    'two channels': lambda w: torch.zeros(w.shape[:1] + (2,) + w.shape[2:]),
    'two channels in a view': lambda w: w[:, :2] if w.ndim == 4 else w,
    'no channels': lambda w: torch.zeros(w.shape[:1] + (0,) + w.shape[2:]),
    'reversed': lambda w: w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w,
    'parameter': lambda w: torch.nn.Parameter(w.float()),
    'attributes': lambda w: attributes(w.clone(), detach=1, is_complex=1, isfinite=1, to=1, numel=1),
    'parameter with attributes': lambda w: attributes(torch.nn.Parameter(w.float()), detach=1, to=1),
    'scalar': lambda w: torch.tensor(1.0),
    'none': lambda w: torch.empty(0),
    'no classes': lambda w: w[:0],
    'flat': lambda w: w.reshape(-1),
    'more': lambda w: torch.cat([w, w]) if w.ndim else w,
    'fewer': lambda w: w[1:] if w.ndim else w,
    'more axes': lambda w: w[None],
    'another': lambda w: torch.zeros(32, 1, 3, 3),
}
THINGS = {
    'none': lambda: None,
    'zero': lambda: 0,
    'one': lambda: 1,
    'minus one': lambda: -1,
    'many': lambda: 10**9,
    'too many': lambda: 2**70,
    'nan': lambda: math.nan,
    'half': lambda: 0.5,
    'true': lambda: True,
    'text': lambda: 'text',
    'silu': lambda: 'silu',
    'number in text': lambda: '3',
    'basic': lambda: 'basic',
    'bytes': lambda: b'bytes',
    'list': lambda: [],
    'ones': lambda: [1, 1],
    'deep': lambda: [10**9, 1],
    'evened out': lambda: [10**9, 1 - 10**9],
    'texts': lambda: ['2', '1'],
    'none of all': lambda: [None, None],
    'many numbers': lambda: list(range(1000)),
    'wide': lambda: [10**9, 10**9],
    'kernels': lambda: [[3, 1, 1], [5, 1, 1]],
    'bad branches': lambda: [[3, 0, 1], [10**9, 1, 0]],
    'stem': lambda: [8, 7, 2],
    'tuple': lambda: (1, 2, 3),
    'size': lambda: (3, 10**6, 10**6),
    'floats': lambda: [0.5, 0.25, 0.125],
    'dict': lambda: {},
    'dict of numbers': lambda: {1: 2},
    'set': lambda: {1},
    'complex': lambda: 1j,
    'namespace': lambda: argparse.Namespace(a=1),
    'namespace without items': lambda: argparse.Namespace(items=1, _get_args=1, _get_kwargs=1),
    'ordered': lambda: attributes(torch.nn.Module().state_dict(), get=1, keys=1, items=1),
    'tensor': lambda: torch.tensor(0.5),
    'matrix': lambda: torch.ones(2, 2),
    'dtype': lambda: torch.float16,
    'device': lambda: torch.device('cpu'),
    'shape': lambda: torch.Size([1, 2]),
    'model of a folder': lambda: 'local-dir:.',
    'model on the Hub': lambda: 'hf_hub:org/name',
    'model with weights': lambda: 'sknet12.cifar10',
    'laughs': laughs,
    'itself': itself,
    'long': lambda: 'long ' * 10_000,
    'lines': lambda: 'a\nb\x1b[31m',
    'mkdir': lambda: Call(os.mkdir, 'code-was-run'),
    'exec': lambda: Call(exec, "open('code-was-run', 'w')"),
    'getattr': lambda: Call(getattr, [], 'clear'),
    'tensor of any size': lambda: Call(torch.Tensor, 10**10),
    'bytes of any size': lambda: Call(bytearray, 10**10),
    'lying': lambda: lying((10**5, 10**4), (10**4, 1)),
    'lying classes': lambda: lying((10**6, 48), (48, 1)),
    'lying offset': lambda: lying((2,), (1,), 10**9),
    'lying stride': lambda: lying((32, 1, 3, 3), (10**9, 1, 1, 1)),
    'negative size': lambda: lying((-1,), (1,)),
    'no numbers': lambda: lying(('a',), (None,)),
}
ARGS = 'model_kwargs', 'bn_momentum', 'bn_eps', 'gp', 'img_size', 'input_size', 'in_chans', 'mean', 'std', 'crop_pct'
ARGS += 'interpolation', 'crop_mode', 'eval_metric', 'get', *['model'] * 3
FIELDS = [*SKNetCfg.__dataclass_fields__, 'num_classes', 'arch', 'device', 'text']
KEYS = st.sampled_from(
    ['head.fc.weight', 'stem.conv.weight', 'x', 'a.conv2g.b', 'a.conv2.paths.0', 'module.', 'stem.conv.bias', 7]
)
TOP = 'state_dict', 'state_dict_ema', 'model', 'net', 'meta', 'args', 'metric', 'epoch', 'get'


@cache
def states():
    """Returns the state dicts of both models, the second one with the authors' keys."""
    state = timm.create_model(MODELS[0], num_classes=5).state_dict()
    return state, pytorch_reference.random_state((1, 1), (32, 32), num_classes=5)


def thing(draw):
    return THINGS[draw(st.sampled_from(sorted(THINGS)))]()


def change_state(draw, state) -> None:
    """Removes, replaces or renames a tensor of a state dict."""
    at = draw(st.sampled_from(['head.fc.weight', 'stem.conv.weight', *state]))
    value = state.pop(at, torch.ones(5, 48))
    how = draw(st.sampled_from(['drop', 'rename', 'thing', 'prefix', *['tensor'] * 5]))
    if how == 'rename':
        state[draw(KEYS)] = value
    elif how == 'thing':
        state[at] = thing(draw)
    elif how == 'prefix':
        prefix = draw(st.sampled_from(reading.PREFIXES))
        state |= {prefix + key: state.pop(key) for key in list(state)}
    elif how == 'tensor':
        state[at] = value
        with mock.patch.object(torch, 'empty', torch.zeros):  # reproducible values
            value = value if isinstance(value, torch.Tensor) else torch.ones(2, 2)
            try:
                state[at] = TENSORS[draw(st.sampled_from(sorted(TENSORS)))](value)
            except (RuntimeError, TypeError, IndexError):
                pass  # not possible for a tensor that was changed before


@given(st.data(), ARCHS, st.booleans())
@fuzz(0.5)
def test_checkpoints(data, arch, legacy):
    draw = data.draw
    state, averaged = dict(states()[arch == MODELS[1]]), dict(states()[arch == MODELS[1]])
    kwargs, args = {}, argparse.Namespace(img_size=32, bn_eps=1e-3, eval_metric='top1')
    name = draw(st.sampled_from(['state_dict', *reading.STATE_DICTS]))
    checkpoint = {name: state, 'epoch': 3, 'metric': 64.5}
    if draw(st.booleans()):
        checkpoint[f'{name}_ema'] = averaged
        state = averaged
    if draw(st.integers(0, 3)):
        checkpoint.update(args=args)
        args.model_kwargs = kwargs
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(['state', 'state', 'args', 'kwargs', 'kwargs', 'top']))
        if where == 'state':
            change_state(draw, state)
        elif where == 'args':
            setattr(args, draw(st.sampled_from(ARGS)), thing(draw))
        elif where == 'kwargs':
            kwargs[draw(st.sampled_from(FIELDS))] = thing(draw)
        else:
            checkpoint[draw(st.sampled_from(TOP))] = thing(draw)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        saved = draw(st.sampled_from([checkpoint, checkpoint, checkpoint, state, [checkpoint]]))
        try:
            torch.save(saved, content, _use_new_zipfile_serialization=not legacy)
        except (RuntimeError, AttributeError, TypeError):
            return  # torch cannot save this object
    try_to_read(content.getvalue(), arch, draw(RARELY))


HOSTILE = [
    b'cos\nmkdir\nX\x0c\0\0\0code-was-run\x85R',
    b'cbuiltins\nexec\nX\x01\0\0\0a\x85R',
    b'\x8c\x02os\x8c\x05mkdir\x93\x8c\x0ccode-was-run\x85R',
    b'(X\x0c\0\0\0code-was-runios\nmkdir\n',
    b'ccollections\nOrderedDict\n)R}X\x03\0\0\0get}sb',
    b'cargparse\nNamespace\n)\x81}X\x03\0\0\0get}sb',
    b'ctorch\nTensor\n)R(NNNNtb',
    b'ctorch._utils\n_rebuild_tensor\n',
    b'X\xff\xff\xff\xff',
    b'\x8b\xff\xff\xff\x7f',
    b'\x8e' + b'\xff' * 8,
    b'\x8a\xff' + b'\x7f' * 255,
    b'X\0\0\x20\0' + bytes(2**21) + b'N',
    b']' * 5000,
    b')' + b'\x85' * 5000,
    b'(' * 500,
    b'Q',
    b'(X\x07\0\0\0storagetQ',
    b'NQ',
    b'h\xff',
    b'0',
    b'.',
    b'R',
    b'b',
    b'\x81',
    b's',
    b'u',
    b'a',
    b't',
    b'1',
    b'J\xff\xff\xff\x7f',
    b'J\xff\xff\xff\xff',
    b'\x8a\x05\0\0\0\0\x7f',
    b'K\0',
    b'N',
    b'\x88',
    b'}',
]


@cache
def pickled(legacy: bool):
    """Returns the opcodes of the pickle of a checkpoint, the bytes after it, and the whole file."""
    checkpoint = dict(state_dict=states()[0], args=argparse.Namespace(model_kwargs={}, mean=[0.5]))
    file = io.BytesIO()
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    content = file.getvalue()
    if not legacy:
        with zipfile.ZipFile(file) as archive:
            content = next(archive.read(name) for name in archive.namelist() if name.endswith('data.pkl'))
    positions, rest = [], io.BytesIO(content)
    for _ in range(5 if legacy else 1):
        start = rest.tell()
        positions += [start + position for _, _, position in pickletools.genops(rest)]
    positions.append(rest.tell())
    return [content[a:b] for a, b in zip(positions, positions[1:])], content[positions[-1] :], file


def archived(pickle: bytes, file: io.BytesIO, draw) -> bytes:
    """Returns the archive with another pickle. Rarely, another part is also changed or left out."""
    out = io.BytesIO()
    part = draw(st.sampled_from([None] * 8 + ['/version', '/byteorder', '/data/0', '/data/1', '/.data', '.pkl']))
    compressed = draw(st.integers(0, 9)) == 0
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, 'w') as new:
        for name in old.namelist():
            content = pickle if name.endswith('data.pkl') else old.read(name)
            if part and part in name:
                content = draw(st.one_of(st.none(), damage(content), st.just(bytes(100))))
            if content is not None:
                new.writestr(name, content, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    return out.getvalue()


@given(st.data(), st.booleans())
@fuzz()
def test_pickles(data, legacy):
    draw = data.draw
    parts, rest, file = pickled(legacy)
    parts = list(parts)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(parts) - 1))
        how = draw(st.sampled_from(['drop', 'insert', 'swap', 'hostile', 'other', 'argument']))
        if how == 'drop':
            del parts[at]
        elif how == 'argument':
            parts[at] = parts[at][:1] + draw(st.binary(max_size=9))
        elif how == 'other':
            parts[at] = parts[draw(st.integers(0, len(parts) - 1))]
        elif how == 'swap':
            other = draw(st.integers(0, len(parts) - 1))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at : at + (how == 'hostile')] = [draw(st.sampled_from(HOSTILE))]
    pickle = b''.join(parts)
    content = pickle + rest if legacy else archived(pickle, file, draw)
    if not draw(st.integers(0, 4)):
        content = draw(damage(content))
    try_to_read(content, MODELS[0], draw(RARELY))


# safetensors

DTYPES = 'F64', 'F32', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2', 'F4', 'I64', 'I32', 'U16', 'U8', 'BOOL', 'C64', 'F32 ', ''
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**66) | st.floats() | st.text(max_size=3) | st.sampled_from(DTYPES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@cache
def safetensors() -> bytes:
    return save(states()[0])


@st.composite
def mutated_safetensors(draw) -> bytes:
    content = safetensors()
    end = 8 + struct.unpack('<Q', content[:8])[0]
    header, rest = json.loads(content[8:end]), content[end:]
    key = draw(st.sampled_from(['head.fc.weight', 'stem.conv.weight', *header]))
    how = draw(
        st.sampled_from(['drop', 'field', 'dtype', 'shape', 'offsets', 'rename', 'value', 'rest', 'length', 'nan'])
    )
    entry = header[key]
    if how == 'drop':
        del header[key]
    elif how == 'field':
        entry[draw(st.sampled_from(['dtype', 'shape', 'data_offsets', 'x']))] = draw(JSON)
    elif how == 'dtype':
        entry['dtype'] = draw(st.sampled_from(DTYPES))
    elif how == 'shape':
        at = draw(st.integers(0, len(entry['shape'])))
        entry['shape'][at : at + 1] = draw(st.lists(st.sampled_from([0, 1, 2, 5, -1, 2**32, 2**63]), max_size=2))
    elif how == 'offsets':
        entry['data_offsets'][draw(st.integers(0, 1))] += draw(st.integers(-100, 100) | st.integers(-1, 2**64))
    elif how == 'rename':
        header[draw(st.text(max_size=5) | st.sampled_from([*header, '__metadata__', 'a.conv2.paths.0']))] = header.pop(
            key
        )
    elif how == 'value':
        header[draw(st.sampled_from([key, '__metadata__', 'x']))] = draw(JSON)
    elif how == 'rest':
        rest = draw(damage(rest))
    elif how == 'nan':
        start, stop = entry['data_offsets']
        value = struct.pack('<f', draw(st.sampled_from([math.nan, math.inf])))[: stop - start]
        rest = rest[:start] + value + rest[start + len(value) :]
    text = json.dumps(header).encode()
    length = draw(NUMBERS | st.integers(0, len(text))) if how == 'length' else len(text)
    content = struct.pack('<Q', length) + text + rest
    return Content(content) if draw(st.integers(0, 9)) else draw(damage(content))


@given(mutated_safetensors(), ARCHS, RARELY)
@fuzz()
def test_safetensors(content, arch, whole):
    try_to_read(content, arch, whole)


# Repositories on the Hub, and random bytes

CFG = [*timm.models.PretrainedCfg.__dataclass_fields__, *reading.PREPROCESSING, *['input_size', 'label_names'] * 3]
CONFIG = dict(architecture='x', model_args={}, pretrained_cfg=dict(tag='x', mean=[0.5] * 3, input_size=[3, 32, 32]))


@given(st.data())
@fuzz(0.3)
def test_repositories(data):
    draw = data.draw
    config = json.loads(json.dumps(CONFIG))
    where = draw(st.sampled_from(['top', 'args', 'cfg', 'text']))
    if where == 'top':
        config[draw(st.sampled_from(['pretrained_cfg', 'model_args', 'label_names', 'architecture', 'x']))] = draw(JSON)
    elif where == 'args':
        value = draw(JSON | st.sampled_from([[10**9, 1], [10**9, 1 - 10**9], 10**9, ['2', '1'], [1, 1]]))
        config['model_args'][draw(st.sampled_from(FIELDS))] = value
    elif where == 'cfg':
        value = draw(JSON | st.sampled_from([[3, 9000, 9000], [3, 0, 0], [0.5], ['a'] * 3, ['a'] * 5, 10**400]))
        config['pretrained_cfg'][draw(st.sampled_from(CFG))] = value
    text = json.dumps(config).encode()
    Path('config.json').write_bytes(draw(damage(text)) if where == 'text' else text)
    content = safetensors() if draw(st.integers(0, 4)) else draw(mutated_safetensors())
    files = {'model.safetensors': FILE, 'config.json': 'config.json'}
    download = mock.Mock(side_effect=lambda repo, name, **_: str(files[name]))
    with (
        mock.patch.object(reading, 'hf_hub_download', download),
        mock.patch.object(loading, 'hf_hub_download', download),
    ):
        try_to_read(content, MODELS[0], draw(st.booleans()), source='org/name@main')


STARTS = (
    b'',
    b'PK\x03\x04',
    b'PK\x05\x06',
    b'\x80\x02',
    b'\x80\x04',
    b'\x0a\x05SKNet\xa2\x06',
    b'\x12\x02',
    b'name: "SKNet"',
)
STARTS += b'\x08\x0a\x12\x07pytorch:', b'\x08\x05', b'{"weight_map": {', b'version https://git-lfs'
STARTS += b'# a\nlayer {', b'\xff' * 12, bytes(8) + b'{', b'\x02\0\0\0\0\0\0\0{}', b'\xa2\x06\x05\x0a\x03abc'


@given(st.sampled_from(STARTS), st.binary(max_size=500), ARCHS)
@fuzz(0.5)
def test_noise(start, rest, arch):
    assert try_to_read(start + rest, arch, whole=True)
