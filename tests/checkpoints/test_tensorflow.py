"""The reader of TensorFlow checkpoints: what it reads, files that it refuses, and fuzz tests.

The small checkpoints are written here: LevelDB tables with several blocks, shared key parts and checksums.
"""

import os
import resource
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

import numpy as np
import pytest
import torch
from caffe_reference import tag, varint
from hypothesis import given
from hypothesis import strategies as st
from simclr import golden
from test_convert_fuzz import MB, NUMBERS, bounded, damage, fuzz, mutated_message

from timm_sknet.checkpoints import tensorflow
from timm_sknet.checkpoints.tensorflow import find_prefix, read_checkpoint

INDEX, DATA = 'model.ckpt-7.index', 'model.ckpt-7.data-00000-of-00001'
KERNEL, BIAS = 'base_model/conv2d/kernel', 'head_supervised/linear_layer/dense/bias'
VARIABLES = {
    'base_model/batch_normalization/gamma': np.arange(3, dtype=np.float32),
    'base_model/batch_normalization/gamma/Momentum': np.ones(3, np.float32),
    'base_model/batch_normalization_1/gamma': np.arange(5, dtype=np.float32),
    KERNEL: np.arange(-12, 12, dtype=np.float32).reshape(1, 2, 3, 4),
    'base_model/conv2d/kernel/Momentum': np.ones((1, 2, 3, 4), np.float32),
    'ema_model/conv2d/kernel': np.ones((1, 2, 3, 4), np.float32),
    'global_step': np.array(7),
    'head_contrastive/nl_0/dense/kernel': np.ones((4, 4), np.float32),
    BIAS: np.array([0.5, -0.5], np.float32),
    'head_supervised/linear_layer/dense/bias/Momentum': np.zeros(2, np.float32),
    'head_supervised/linear_layer/dense/kernel': np.arange(8, dtype=np.float32).reshape(4, 2),
    'memory': np.ones(3, np.int32),
}
NETWORK = [
    'base_model/batch_normalization/gamma',
    'base_model/batch_normalization_1/gamma',
    KERNEL,
    BIAS,
    'head_supervised/linear_layer/dense/kernel',
]
TYPES = {'float32': 1, 'float64': 2, 'int32': 3, 'int64': 9}
Fields = Dict[int, Any]  # the fields of a protobuf message: numbers, or bytes


def crc32c(content: bytes) -> int:
    """Returns the masked CRC-32C, computed independently of google-crc32c."""
    crc = 2**32 - 1
    for byte in content:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 2**32 - 1
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _divided(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [_divided(byte) for byte in range(256)]


def message(fields: Fields) -> bytes:
    out = b''
    for number, value in fields.items():
        if isinstance(value, int):
            out += tag(number, 0) + varint(value)
        else:
            out += tag(number, 5) + value if number == 6 else tag(number, 2) + varint(len(value)) + value
    return out


def shape(*sizes: int) -> bytes:
    return b''.join(message({2: message({1: size})}) for size in sizes)


def block(entries: Sequence[Tuple[bytes, bytes]], every: int = 3) -> bytes:
    """Returns a block of a table. Every third key is complete, the others share bytes with the previous one."""
    content, restarts, previous = b'', [], b''
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % every:
            shared = len(os.path.commonprefix([key, previous]))
        else:
            restarts.append(len(content))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return content + struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))


def table(blocks: Sequence[bytes], root: Callable[[bytes], bytes] = bytes, kind: int = 0) -> bytes:
    """Returns a table with these blocks. `root` changes the block that contains their positions."""
    out = bytearray()

    def add(content: bytes) -> bytes:
        handle = varint(len(out)) + varint(len(content))
        content += bytes([kind])
        out.extend(content + struct.pack('<I', crc32c(content)))
        return handle

    handles = [(b'%06d' % number, add(content)) for number, content in enumerate(blocks)]
    footer = add(block([])) + add(root(block(handles)))
    return bytes(out) + footer.ljust(40, b'\0') + bytes.fromhex('57fb808b247547db')


class Checkpoint(NamedTuple):
    """A checkpoint in memory: the messages in the index, and the data files."""

    entries: Dict[bytes, Fields]
    data: List[bytearray]

    def blocks(self) -> List[bytes]:
        entries = [(key, message(fields)) for key, fields in self.entries.items()]
        return [block(entries[i : i + 5]) for i in range(0, len(entries), 5)]

    def write(self, folder: Path, index: bytes = b'') -> Path:
        (folder / INDEX).write_bytes(index or table(self.blocks()))
        for shard, data in enumerate(self.data):
            (folder / f'model.ckpt-7.data-{shard:05}-of-{len(self.data):05}').write_bytes(data)
        return folder / 'model.ckpt-7'


def checkpoint(variables: Dict[str, np.ndarray] = VARIABLES, shards: int = 1, start: int = 0) -> Checkpoint:
    """Returns a checkpoint with these variables, whose data begin at byte `start` of each data file."""
    data = [bytearray(start) for _ in range(shards)]
    entries: Dict[bytes, Fields] = {b'': {1: shards, 3: message({1: 1})}}
    for i, (name, value) in enumerate(variables.items()):
        file, content = data[i % shards], value.tobytes()
        entries[name.encode()] = {
            1: TYPES[value.dtype.name],
            2: shape(*value.shape),
            3: i % shards,
            4: len(file),
            5: len(content),
            6: struct.pack('<I', crc32c(content)),
        }
        file.extend(content)
    return Checkpoint(entries, data)


def check(tensors: Dict[str, torch.Tensor], variables: Dict[str, np.ndarray] = VARIABLES) -> None:
    assert list(tensors) == [name for name in variables if name in NETWORK]
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, torch.tensor(variables[name]), rtol=0, atol=0)


# Checkpoints that are read


def test_only_the_variables_of_the_network_and_the_step_are_read(tmp_path):
    tensors, step = read_checkpoint(checkpoint().write(tmp_path))
    check(tensors)
    assert step == 7


def test_tensors_are_views_of_the_data_file(tmp_path):
    saved = checkpoint()
    tensors, _ = read_checkpoint(saved.write(tmp_path))
    starts = {tensor.data_ptr() - saved.entries[name.encode()][4] for name, tensor in tensors.items()}
    assert len(starts) == 1
    tensors[KERNEL].zero_()  # the map is private: the file does not change
    check(read_checkpoint(tmp_path / 'model.ckpt-7')[0])


@pytest.mark.parametrize('start', [1, 2, 3, 4, 8])
def test_variables_at_any_byte_are_read(start, tmp_path):
    tensors, step = read_checkpoint(checkpoint(start=start).write(tmp_path))
    check(tensors)
    assert all(tensor.data_ptr() % 4 == 0 for tensor in tensors.values())
    assert step == 7


def test_unknown_fields_are_ignored(tmp_path):
    saved = checkpoint()
    entries = [(key, message(fields)) for key, fields in saved.entries.items()]
    unknown = (
        tag(9, 0) + varint(2**63) + tag(10, 1) + bytes(8) + tag(11, 2) + varint(3) + b'abc' + tag(12, 5) + bytes(4)
    )
    index = table([block([(key, unknown + value + unknown) for key, value in entries])])
    check(read_checkpoint(saved.write(tmp_path, index))[0])


def test_several_data_files_are_read(tmp_path):
    tensors, step = read_checkpoint(checkpoint(shards=3).write(tmp_path))
    check(tensors)
    assert step == 7
    (tmp_path / 'model.ckpt-7.data-00001-of-00003').unlink()
    with pytest.raises(ValueError, match='model.ckpt-7.data-00001-of-00003 is missing'):
        read_checkpoint(tmp_path / 'model.ckpt-7')


def test_a_checkpoint_without_a_step_is_read(tmp_path):
    variables = {name: value for name, value in VARIABLES.items() if name != 'global_step'}
    tensors, step = read_checkpoint(checkpoint(variables).write(tmp_path))
    check(tensors, variables)
    assert step is None


def test_a_data_file_that_is_not_needed_may_be_missing(tmp_path):
    saved = checkpoint()
    saved.entries[b''][1] = 2
    saved.entries[b'memory'][3] = 1
    saved.write(tmp_path)
    (tmp_path / DATA).rename(tmp_path / 'model.ckpt-7.data-00000-of-00002')
    check(read_checkpoint(tmp_path / 'model.ckpt-7')[0])


def test_the_checkpoint_of_google_is_read(tmp_path):
    """All checksums that TensorFlow wrote are compared, so a wrong dtype, offset or size would be an error."""
    prefix = golden.write(tmp_path)
    tensors, step = read_checkpoint(prefix)
    convolutions, norms = 87, 71
    assert len(tensors) == convolutions + 4 * norms + 2
    assert sum(t.numel() for name, t in tensors.items() if 'moving_' not in name) == 37_264_584
    assert step == 0
    shapes = {v.name: v.shape for v in golden.variables()}
    assert all(shapes[name] == tensor.shape for name, tensor in tensors.items())
    assert find_prefix(tmp_path) == prefix


# The path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'model').mkdir()
    checkpoint().write(tmp_path / 'model')
    return tmp_path / 'model'


@pytest.mark.parametrize('name', ['model.ckpt-7', INDEX, DATA, '', 'checkpoint'])
@pytest.mark.parametrize('named', ['model.ckpt-7', '/elsewhere/model.ckpt-7', '../../model.ckpt-7'])
def test_a_checkpoint_is_found_by_any_of_its_paths(name, named, folder):
    state = f'model_checkpoint_path: "{named}"\nall_model_checkpoint_paths: "model.ckpt-1"\n'
    (folder / 'checkpoint').write_text(state)
    assert find_prefix(folder / name) == folder / 'model.ckpt-7'


def test_a_folder_with_several_checkpoints_needs_a_file_that_names_one(folder):
    assert find_prefix(folder) == folder / 'model.ckpt-7'
    (folder / 'model.ckpt-12.index').touch()
    with pytest.raises(ValueError, match='several checkpoints: model.ckpt-12, model.ckpt-7. Pass the path of one'):
        find_prefix(folder)
    (folder / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-12"')
    assert find_prefix(folder) == folder / 'model.ckpt-12'
    assert find_prefix(folder / 'model.ckpt-7') == folder / 'model.ckpt-7'


@pytest.mark.parametrize('name', ['/', '.', '..', '/.', 'a/..', '../', '../../x', '\0', 'a\nb', ''])
def test_the_file_checkpoint_cannot_lead_out_of_its_folder(name, folder):
    for outside in folder.parent / 'model.index', folder.parent / 'x.index', folder.parent.with_suffix('.index'):
        outside.touch()
    (folder / 'checkpoint').write_text(f'model_checkpoint_path: "{name}"')
    assert Path(os.path.abspath(f'{find_prefix(folder)}.index')).parent == folder


def test_other_paths_are_not_checkpoints(tmp_path):
    (tmp_path / 'weights.pth').touch()
    (tmp_path / 'checkpoint').write_bytes(b'PK\3\4' + bytes(100))
    (tmp_path / 'model.index.json').touch()
    for name in '', 'weights.pth', 'checkpoint', 'model.index.json', 'model', INDEX, DATA, 'missing/checkpoint':
        assert find_prefix(tmp_path / name) is None


def test_a_large_file_checkpoint_takes_no_memory(tmp_path):
    (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "a')
    os.truncate(tmp_path / 'checkpoint', 2**30)
    with bounded():
        assert find_prefix(tmp_path / 'checkpoint') is None


# Checkpoints that are refused


def set_field(number: int, value: Any, name: str = KERNEL) -> Callable[[Checkpoint], None]:
    return lambda saved: saved.entries[name.encode()].__setitem__(number, value)


def rename(name: bytes) -> Callable[[Checkpoint], None]:
    """Changes the last name in the index."""
    return lambda saved: saved.entries.__setitem__(name, saved.entries.pop([*saved.entries][-1]))


REFUSED_ENTRIES = {
    'big-endian': (set_field(2, 1, ''), 'big-endian, which is not supported'),
    'no data files': (set_field(1, 0, ''), 'is in data file 0 of 0'),
    'header that is text': (set_field(1, b'1', ''), 'is in data file 0 of 0'),
    'no header': (lambda saved: saved.entries.pop(b''), 'no header'),
    'no dtype': (set_field(1, b''), 'dtype None, expected 1'),
    'double': (set_field(1, 2), r"'base_model/conv2d/kernel' has TensorFlow's dtype 2, expected 1 \(torch.float32\)"),
    'int32 step': (set_field(1, 3, 'global_step'), r"'global_step' has .* dtype 3, expected 9 \(torch.int64\)"),
    'slices': (set_field(7, b''), 'stored in slices, which is not supported'),
    'another shape': (set_field(2, shape(1, 2, 3, 5)), r'has 96 bytes, but the shape \[1, 2, 3, 5\]'),
    'no shape': (set_field(2, b''), r'has 96 bytes, but the shape \[\]'),
    'negative shape': (set_field(2, shape(2**64 - 24)), 'but the shape'),
    'huge shape': (set_field(2, shape(2**63, 2**63)), 'but the shape'),
    'shape with 0': (lambda saved: saved.entries[KERNEL.encode()].update({2: shape(0, 2), 5: 0}), 'has 0 bytes'),
    'many axes': (set_field(2, shape(24, *[1] * 1000)), r'but the shape \[24, 1, 1, 1, 1\]'),
    'shape that is no message': (set_field(2, b'\x12'), 'ends too early'),
    'axis that is no message': (set_field(2, message({2: b'\x0f'})), 'no protobuf field'),
    'another data file': (set_field(3, 1), 'is in data file 1 of 1'),
    'offset behind the end': (set_field(4, 1000), f'{DATA} is truncated.* ends at byte 1,096, but the file has'),
    'huge offset': (set_field(4, 2**63), 'is truncated'),
    'another offset': (set_field(4, 0), f"{DATA} is corrupted.* the checksum of '{KERNEL}' is wrong"),
    'another size': (set_field(5, 92), 'has 92 bytes, but the shape'),
    'another checksum': (set_field(6, bytes(4)), f"the checksum of '{KERNEL}' is wrong"),
    'no checksum': (lambda saved: saved.entries[KERNEL.encode()].pop(6), f"the checksum of '{KERNEL}' is wrong"),
    'name that is not UTF-8': (rename(b'memory\xff'), r"the name b'memory\\xff' is not valid UTF-8"),
    'long name': (rename(b'm' * 1001), 'has 1,001 more'),
    'names in wrong order': (rename(b'a'), 'not in order'),
    'empty data file': (lambda saved: saved.data[0].clear(), f'{DATA} is truncated'),
    'no data file': (lambda saved: saved.data.clear(), f'{DATA} is missing'),
}


@pytest.mark.parametrize('change, expected', REFUSED_ENTRIES.values(), ids=REFUSED_ENTRIES)
def test_an_unsupported_or_corrupted_entry_is_refused(change, expected, tmp_path):
    saved = checkpoint()
    change(saved)
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(saved.write(tmp_path))


def positions(*handles: Tuple[int, int]) -> Callable[[bytes], bytes]:
    """Returns a function that replaces the positions of the blocks."""
    entries = [(b'%06d' % i, varint(offset) + varint(size)) for i, (offset, size) in enumerate(handles)]
    return lambda root: block(entries)


BLOCKS = checkpoint().blocks()
FIRST, SECOND = map(len, BLOCKS[:2])
HEADER = (b'', message({1: 1}))
NO_RESTARTS = bytes(4)
REFUSED_TABLES = {
    'snappy': (lambda: table(BLOCKS, kind=1), r'compressed \(block type 1\), which is not supported'),
    'no entries': (lambda: table([]), 'no header'),
    'empty block': (lambda: table([b'']), 'a block has 0 bytes, too few'),
    'blocks without entries': (lambda: table([block([])] * 9), 'no header'),
    'many restart points': (lambda: table([struct.pack('<I', 2**32 - 1)]), 'too few for 4,294,967,295 restart points'),
    'a block twice': (lambda: table(BLOCKS, positions((0, FIRST), (0, FIRST))), 'its blocks overlap'),
    'blocks in another order': (
        lambda: table(BLOCKS, positions((0, FIRST), (FIRST + SECOND + 10, len(BLOCKS[2])), (FIRST + 5, SECOND))),
        'its blocks overlap',
    ),
    'the same entries twice': (lambda: table([BLOCKS[0], BLOCKS[0]]), 'not unique'),
    'a name twice': (lambda: table([block([HEADER, (b'a', b''), (b'a', b'')])]), 'not unique'),
    'a block behind the end': (lambda: table(BLOCKS, positions((0, FIRST), (2**40, 9))), 'a block ends at byte'),
    'a huge block': (lambda: table(BLOCKS, positions((0, 2**63))), 'a block ends at byte'),
    'a block with another size': (lambda: table(BLOCKS, positions((0, FIRST - 1))), 'the checksum of the block'),
    'half a position': (lambda: table(BLOCKS, lambda root: block([(b'a', b'\x80')])), 'ends too early'),
    'a long number': (lambda: table([b'\xff' * 10 + b'\1' + NO_RESTARTS]), 'more than 10 bytes'),
    'a shared part without a previous name': (
        lambda: table([varint(1) + varint(1) + varint(0) + b'a' + NO_RESTARTS]),
        'shares 1 bytes with a name of 0 bytes',
    ),
    'a huge value': (lambda: table([varint(0) + varint(0) + varint(2**63) + NO_RESTARTS]), 'ends too early'),
    'a huge name': (lambda: table([varint(0) + varint(2**63) + varint(0) + NO_RESTARTS]), 'a name shares 0 bytes'),
    'another file': (
        lambda: b'another file' * 10,
        f'{INDEX} is truncated or corrupted, or is not the index of a Tensor',
    ),
    'only the magic number': (lambda: table([])[-8:], 'is truncated or corrupted'),
    'large file': (lambda: bytes(2**20 + 1), 'has more than 1,048,576 bytes'),
}


@pytest.mark.parametrize('content, expected', REFUSED_TABLES.values(), ids=REFUSED_TABLES)
def test_an_unsupported_or_corrupted_index_is_refused(content, expected, tmp_path):
    prefix = checkpoint().write(tmp_path, content())
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(prefix)


def test_variables_that_share_their_bytes_are_refused(tmp_path):
    """Otherwise, reading would take as much time as the index has variables, times the size of the data file."""
    fields = checkpoint().entries[KERNEL.encode()]
    entries = {b'': {1: 1}} | {b'base_model/%06d' % i: fields for i in range(1000)}
    with pytest.raises(ValueError, match='its variables are larger than the data files'):
        read_checkpoint(Checkpoint(entries, checkpoint().data).write(tmp_path))


def test_a_missing_index_is_refused(folder):
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=f'{INDEX} is missing. A TensorFlow checkpoint consists of'):
        read_checkpoint(find_prefix(folder / DATA))


def test_every_truncation_is_refused(folder):
    for name, unused in (DATA, VARIABLES['memory'].nbytes), (INDEX, 0):
        for size in reversed(range((folder / name).stat().st_size - unused)):
            os.truncate(folder / name, size)
            with pytest.raises(ValueError, match=f'{name} is truncated'):
                read_checkpoint(folder / 'model.ckpt-7')
        checkpoint().write(folder)


def test_a_changed_byte_is_refused_or_does_not_matter(folder):
    """The checksums cover all bytes that are read, except the last 48 bytes of the index."""
    refused: Dict[str, Set[int]] = {INDEX: set(), DATA: set()}
    for name in refused:
        with (folder / name).open('r+b', buffering=0) as file:
            for i, byte in enumerate(file.read()):
                file.seek(i)
                file.write(bytes([byte ^ 0x41]))
                try:
                    tensors, step = read_checkpoint(folder / 'model.ckpt-7')
                except ValueError:
                    refused[name].add(i)
                else:
                    check(tensors)
                    assert step == 7
                file.seek(i)
                file.write(bytes([byte]))
    blocks = sum(len(content) + 5 for content in BLOCKS)
    assert refused[INDEX] >= set(range(blocks))
    entries = checkpoint().entries
    taken = [entries[name.encode()] for name in [*NETWORK, 'global_step']]
    assert refused[DATA] == {i for fields in taken for i in range(fields[4], fields[4] + fields[5])}


def long_names(start: bytes) -> bytes:
    """Returns a block of entries with 11 bytes each, whose names have 1,000 bytes."""
    value = message({1: 1, 5: 4})
    content = block([HEADER, (start.ljust(997, b'a'), value)])[:-8]
    for i in range(60_000):
        content += varint(997) + varint(3) + varint(len(value)) + (b'%c%c%c' % (i >> 12, i >> 6 & 63, i & 63)) + value
    return content + NO_RESTARTS


def many_entries(count: int, key: bytes, value: bytes) -> bytes:
    return block([HEADER, *((key % i, value) for i in range(count))])


# The last column: why it is refused, None if it is read.
LARGE = {
    'many variables': (lambda: [many_entries(30_000, b'base_model/%06d', message({1: 1, 5: 4}))], 'more than 10,000'),
    'variables with long names': (lambda: [long_names(b'base_model/')], 'more than 10,000 variables'),
    'other long names': (lambda: [long_names(b'memory')], None),
    'many other names': (lambda: [many_entries(60_000, b'%06d', b'')], None),
    'many axes': (lambda: [block([HEADER, (b'base_model/a', message({1: 1, 2: b'\x12\0' * 400_000}))])], 'the shape'),
    'many fields': (lambda: [block([HEADER, (b'base_model/a', b'\x08\1' * 400_000)])], 'but the shape'),
    'many blocks': (lambda: [block([])] * 20_000, 'no header'),
    'restart points only': (lambda: [struct.pack('<200001I', *[0] * 200_000, 200_000)], 'no header'),
}


@pytest.mark.parametrize('blocks, expected', LARGE.values(), ids=LARGE)
def test_a_large_index_takes_little_memory_and_time(blocks, expected, tmp_path):
    prefix = checkpoint().write(tmp_path, table(blocks()))
    assert tensorflow.LARGEST_INDEX // 3 < (tmp_path / INDEX).stat().st_size <= tensorflow.LARGEST_INDEX
    with bounded(memory=32 * MB), pytest.raises(ValueError, match=expected) if expected else nullcontext():
        read_checkpoint(prefix)


def test_a_block_is_not_read_again_and_again(tmp_path):
    large = struct.pack('<100001I', *[0] * 100_000, 100_000)
    prefix = checkpoint().write(tmp_path, table([large], positions(*[(0, len(large))] * 30_000)))
    with bounded(seconds=1), pytest.raises(ValueError, match='its blocks overlap'):
        read_checkpoint(prefix)


def test_variables_that_are_not_read_take_no_memory(tmp_path):
    saved = checkpoint()
    content = table(saved.blocks())
    prefix = saved.write(tmp_path, content)
    os.truncate(tmp_path / DATA, 2**33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(read_checkpoint(prefix)[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_the_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'google_crc32c', None)
    with pytest.raises(ImportError, match='Install it with: pip install google-crc32c'):
        read_checkpoint(folder / 'model.ckpt-7')


# Fuzz tests


@st.composite
def mutated_index(draw) -> bytes:
    """Draws an index with one to three changes and valid checksums."""
    saved = checkpoint()
    entries = [(key, message(fields)) for key, fields in saved.entries.items()]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(entries) - 1))
        key, value = entries[at]
        how = draw(st.sampled_from('value value value number shape drop twice swap key'.split()))
        if how == 'value':
            entries[at] = key, draw(mutated_message(value, 'entry'))
        elif how == 'number':
            fields = {**saved.entries.get(key, {}), draw(st.integers(1, 7)): draw(NUMBERS)}
            entries[at] = key, message(fields | {6: bytes(4)} if isinstance(fields.get(6), int) else fields)
        elif how == 'shape':
            fields = {**saved.entries.get(key, {}), 2: shape(*draw(st.lists(NUMBERS, max_size=6)))}
            entries[at] = key, message(fields)
        elif how == 'drop' and len(entries) > 1:
            del entries[at]
        elif how == 'twice':
            entries.insert(at, entries[at])
        elif how == 'swap':
            other = draw(st.integers(0, len(entries) - 1))
            entries[at], entries[other] = entries[other], entries[at]
        elif how == 'key':
            entries[at] = draw(damage(key)), value
    size = draw(st.integers(1, 6))
    blocks = [block(entries[i : i + size], every=draw(st.integers(1, 4))) for i in range(0, len(entries), size)]
    where = draw(st.sampled_from(['nowhere', 'nowhere', 'block', 'root', 'file']))
    if where == 'block':
        at = draw(st.integers(0, len(blocks) - 1))
        blocks[at] = draw(damage(blocks[at]))
    index = table(blocks, lambda root: draw(damage(root)) if where == 'root' else root)
    return draw(damage(index)) if where == 'file' else index


@given(mutated_index(), st.data())
@fuzz(0.375)
def test_any_checkpoint_is_read_or_refused(tmp_path_factory, index, data):
    saved = checkpoint()
    if not data.draw(st.integers(0, 9)):
        saved.data[0][:] = data.draw(damage(bytes(saved.data[0])))
    folder = tmp_path_factory.getbasetemp() / 'fuzz-tensorflow'
    folder.mkdir(exist_ok=True)
    prefix = saved.write(folder, bytes(index))
    with bounded():
        try:
            tensors, step = read_checkpoint(prefix)
        except ValueError as e:
            assert len(str(e)) > 10
            return
    assert step is None or step == 7
    for name, tensor in tensors.items():
        assert name.startswith(('base_model/', 'head_supervised/')) and not name.endswith('/Momentum')
        assert tensor.dtype == torch.float32
    assert sum(tensor.numel() * 4 for tensor in tensors.values()) <= len(saved.data[0])
    values = {value.tobytes() for value in VARIABLES.values()}
    assert all(tensor.numpy().tobytes() in values for tensor in tensors.values())  # the checksums are valid


@given(st.binary(max_size=300))
@fuzz(0.1)
def test_any_file_checkpoint_is_read_or_ignored(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / 'fuzz-state'
    folder.mkdir(exist_ok=True)
    (folder / 'checkpoint').write_bytes(b'model_checkpoint_path: "' + content)
    with bounded():
        prefix = find_prefix(folder)
    assert prefix is None or Path(os.path.abspath(f'{prefix}.index')).parent == folder
