"""Reads TensorFlow checkpoints of SimCLRv2, without TensorFlow.

A checkpoint consists of an index, PREFIX.index, and data files, PREFIX.data-00000-of-00001. The index is a LevelDB
table. Its keys are the names of the variables. Its values are protobuf messages (`BundleEntryProto`) that contain the
dtype, the shape, and the position in a data file. The data files are memory-mapped, so that variables that are not
read, such as the state of the optimizer, need no memory.
"""

import io
import math
import os
import re
import struct
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

# Averaged weights (ema_model/) and the projection head (head_contrastive/) are not read.
NETWORK = re.compile(r'base_model/.*(?<!/Momentum)|head_supervised/linear_layer/dense/(kernel|bias)|global_step', re.S)
STATE = re.compile(rb'model_checkpoint_path:\s*"([^"\0-\x1f]+)"')
MAGIC = struct.pack('<Q', 0xDB4775248B80FB57)
FOOTER = 48  # bytes
FLOAT32, INT64 = 1, 9  # TensorFlow's numbers
DTYPES = {FLOAT32: torch.float32, INT64: torch.int64}
VARINT, BYTES, FIXED32 = 0, 2, 5  # protobuf's wire types
# Limits of the memory: 20 bytes in the index can take 2,000 in memory. TensorFlow writes 40,000 bytes for SK-ResNet-50.
LARGEST_INDEX = 2**20
MOST_VARIABLES = 10_000
LONGEST_NAME = 1_000
CORRUPTED = 'the index is corrupted'


class Variable(NamedTuple):
    """A variable in the index. The bytes `offset` to `offset + size` of the data file `shard` are its values."""

    name: str
    dtype: torch.dtype
    shape: List[int]
    shard: int
    offset: int
    size: int
    checksum: int


def find_prefix(path: Path) -> Optional[Path]:
    """Returns the prefix of the checkpoint at a path, or None if there is no TensorFlow checkpoint.

    Args:
        path: PREFIX, PREFIX.index or another file of the checkpoint, the folder with these files, or TensorFlow's file
            `checkpoint` in it, which names the latest checkpoint of the folder.

    Raises:
        ValueError: If the folder contains several checkpoints, and no file `checkpoint` that names one.
    """
    folder = path if path.is_dir() else path.parent
    state = folder / 'checkpoint'
    if path in (folder, state) and state.is_file():
        with state.open('rb') as file:
            match = STATE.match(file.read(2**12))
        if match and (name := PurePosixPath(os.fsdecode(match[1])).name):  # only files in this folder are read
            return folder / name
    if path.is_dir():
        names = sorted(index.name.removesuffix('.index') for index in path.glob('*.index'))
        if len(names) > 1:
            raise ValueError(f'the folder contains several checkpoints: {", ".join(names)}. Pass the path of one.')
        return path / names[0] if names else None
    if path.is_file() and (parts := re.fullmatch(r'(.+)\.(index|meta|data-\d{5}-of-\d{5})', path.name)):
        return path.with_name(parts[1])
    if re.fullmatch(r'.+\.ckpt-\d+', path.name) and not path.exists():  # a prefix, also if its files are missing
        return path
    return path if Path(f'{path}.index').is_file() else None


def read_checkpoint(prefix: Path) -> Tuple[Dict[str, Tensor], Optional[int]]:
    """Returns the variables of the network and the training step, None if the checkpoint does not contain it.

    The tensors have TensorFlow's names and shapes. They are views of the memory-mapped data files.

    Args:
        prefix: The common part of the paths of the files, as `find_prefix` returns it.

    Raises:
        ValueError: If a file is missing or corrupted, or if the checkpoint is not supported.
        ImportError: If google-crc32c is not installed.
    """
    variables, shards = _read_index(Path(f'{prefix}.index'))
    paths = {v.shard: Path(f'{prefix}.data-{v.shard:05}-of-{shards:05}') for v in variables}
    sizes = {shard: _existing(path).stat().st_size for shard, path in paths.items()}
    for v in variables:
        if v.offset + v.size > sizes[v.shard]:
            raise ValueError(
                f'{paths[v.shard].name} is truncated, or does not belong to this index: {v.name!r} ends at byte '
                f'{v.offset + v.size:,}, but the file has {sizes[v.shard]:,} bytes.'
            )
    if sum(v.size for v in variables) > sum(sizes.values()):  # possible if variables share their bytes
        raise ValueError(f'{CORRUPTED}: its variables are larger than the data files.')
    files = {shard: np.memmap(path, np.uint8, mode='c') for shard, path in paths.items()}
    tensors: Dict[str, Tensor] = {}
    for v in variables:
        content = files[v.shard][v.offset : v.offset + v.size]
        if _checksum(content) != v.checksum:
            raise ValueError(
                f'{paths[v.shard].name} is corrupted, or does not belong to this index: the checksum of {v.name!r} is '
                'wrong.'
            )
        if v.offset % v.dtype.itemsize:  # possible, because TensorFlow writes the variables without padding
            content = content.copy()
        tensors[v.name] = torch.from_numpy(content).view(v.dtype).reshape(v.shape)
    step = tensors.pop('global_step', None)
    return tensors, None if step is None else int(step)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f'{path.name} is missing. A TensorFlow checkpoint consists of an index and data files in one folder.'
        )
    return path


def _checksum(content: Union[bytes, np.ndarray]) -> int:
    """Returns the masked CRC-32C, as in the files."""
    try:
        import google_crc32c
    except ImportError as e:
        raise ImportError(
            'TensorFlow checkpoints require google-crc32c. Install it with: pip install google-crc32c'
        ) from e

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def _read_index(path: Path) -> Tuple[List[Variable], int]:
    """Returns the variables to read and the number of data files."""
    with _existing(path).open('rb') as file:
        index = file.read(LARGEST_INDEX + 1)
    if len(index) > LARGEST_INDEX:
        raise ValueError(f'{path.name} has more than {LARGEST_INDEX:,} bytes, expected the index of a SimCLRv2 model.')
    if len(index) < FOOTER or not index.endswith(MAGIC):
        raise ValueError(f'{path.name} is truncated or corrupted, or is not the index of a TensorFlow checkpoint.')
    table = _table(index)
    key, value = next(table, (None, b''))
    if key != '':
        raise ValueError(f'{CORRUPTED}: it has no header.')
    header = dict(_fields(value))
    if header.get((2, VARINT)):
        raise ValueError('the checkpoint is big-endian, which is not supported.')
    shards = header.get((1, VARINT), 0)
    variables = []
    for name, value in table:
        if NETWORK.fullmatch(name):
            variables.append(_variable(name, value, shards))
        if len(variables) > MOST_VARIABLES:
            raise ValueError(f'{CORRUPTED}: it has more than {MOST_VARIABLES:,} variables.')
    return variables, shards


def _table(index: bytes) -> Iterator[Tuple[str, bytes]]:
    """Yields the keys of a LevelDB table and their values, in order. Each byte is read at most twice."""
    footer = io.BytesIO(index[-FOOTER:])
    _metaindex, root = _handle(footer), _handle(footer)
    previous, end = None, 0
    for _, value in _entries(_block(index, *root)):
        offset, size = _handle(io.BytesIO(value))
        if offset < end:
            raise ValueError(f'{CORRUPTED}: its blocks overlap.')
        end = offset + size
        for key, value in _entries(_block(index, offset, size)):
            if previous is not None and key <= previous:
                raise ValueError(f'{CORRUPTED}: its names are not unique, or not in order.')
            previous = key
            try:
                yield key.decode(), value
            except UnicodeDecodeError as e:
                raise ValueError(f'{CORRUPTED}: the name {key!r} is not valid UTF-8.') from e


def _handle(file: BinaryIO) -> Tuple[int, int]:
    """Reads offset and size of a block."""
    return _varint(file), _varint(file)


def _block(index: bytes, offset: int, size: int) -> bytes:
    """Returns the content of a block. Behind it are its type and a checksum."""
    end = offset + size
    if end + 5 > len(index) - FOOTER:
        raise ValueError(f'{CORRUPTED}: a block ends at byte {end:,}, but the file has {len(index):,} bytes.')
    kind, checksum = struct.unpack_from('<BI', index, end)
    if _checksum(index[offset : end + 1]) != checksum:
        raise ValueError(f'{CORRUPTED}: the checksum of the block at byte {offset:,} is wrong.')
    if kind != 0:
        raise ValueError(f'the index is compressed (block type {kind}), which is not supported.')
    return index[offset:end]


def _entries(block: bytes) -> Iterator[Tuple[bytes, bytes]]:
    """Yields keys and values of a block. Each key is stored without the part that it shares with the previous key."""
    restarts = struct.unpack('<I', block[-4:])[0] if len(block) >= 4 else 0
    end = len(block) - 4 - 4 * restarts  # the block ends with the positions of complete keys, and their number
    if end < 0:
        raise ValueError(f'{CORRUPTED}: a block has {len(block):,} bytes, too few for {restarts:,} restart points.')
    file = io.BytesIO(block[:end])
    key = b''
    while file.tell() < end:
        shared, rest, size = _varint(file), _varint(file), _varint(file)
        if shared > len(key) or shared + rest > LONGEST_NAME:
            raise ValueError(
                f'{CORRUPTED}: a name shares {shared:,} bytes with a name of {len(key):,} bytes, and has {rest:,} more.'
            )
        key = key[:shared] + _read(file, rest)
        yield key, _read(file, size)


def _variable(name: str, value: bytes, shards: int) -> Variable:
    fields = dict(_fields(value))
    dtype = fields.get((1, VARINT))
    expected = INT64 if name == 'global_step' else FLOAT32
    if dtype != expected:
        raise ValueError(f"{name!r} has TensorFlow's dtype {dtype}, expected {expected} ({DTYPES[expected]}).")
    if (7, BYTES) in fields:
        raise ValueError(f'{name!r} is stored in slices, which is not supported.')
    dims = [dim for key, dim in _fields(fields.get((2, BYTES), b'')) if key == (2, BYTES)]
    shape = [dict(_fields(dim)).get((1, VARINT), 0) for dim in dims]
    shard, offset, size = (fields.get((number, VARINT), 0) for number in (3, 4, 5))
    if len(shape) > 4 or 0 in shape or size != math.prod(shape) * DTYPES[expected].itemsize:
        raise ValueError(f'{CORRUPTED}: {name!r} has {size:,} bytes, but the shape {shape[:5]}.')
    if shard >= shards:
        raise ValueError(f'{CORRUPTED}: {name!r} is in data file {shard:,} of {shards:,}.')
    checksum = int.from_bytes(fields.get((6, FIXED32), b''), 'little')
    return Variable(name, DTYPES[expected], shape, shard, offset, size, checksum)


def _fields(message: bytes) -> Iterator[Tuple[Tuple[int, int], Any]]:
    """Yields number, wire type and value of each field of a protobuf message. A value is an integer or bytes."""
    file = io.BytesIO(message)
    while file.tell() < len(message):
        number, wire_type = divmod(_varint(file), 8)
        if wire_type not in (0, 1, 2, 5):
            raise ValueError(f'{CORRUPTED}: no protobuf field at byte {file.tell():,} of an entry.')
        value = _varint(file) if wire_type in (VARINT, BYTES) else {1: 8, 5: 4}[wire_type]
        yield (number, wire_type), value if wire_type == VARINT else _read(file, value)


def _varint(file: BinaryIO) -> int:
    """Reads an integer of variable length: 7 bits a byte, lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = _read(file, 1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError(f'{CORRUPTED}: a number has more than 10 bytes.')


def _read(file: BinaryIO, size: int) -> bytes:
    """Reads exactly this many bytes."""
    content = file.read(min(size, LARGEST_INDEX))
    if len(content) < size:
        raise ValueError(f'{CORRUPTED}: an entry ends too early.')
    return content
