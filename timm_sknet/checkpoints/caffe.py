"""Reads the authors' Caffe files (`.caffemodel`).

A `.caffemodel` is a protobuf message. Its field 100 contains one message for each layer. These messages are read one at
a time and parsed by the protobuf library, so that a file of 200 MB needs little more memory than its weights.
"""

import io
import math
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Set, Tuple

import numpy as np
import torch
from torch import Tensor

MOST_LAYERS = 10_000  # limits the memory: a layer can take 12 bytes in the file and 1,200 in memory
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
FIELD_1_IS_A_NUMBER = bytes([1 << 3 | VARINT])
BLOBS = 'weight', 'bias', 'running_mean', 'running_var'  # in Caffe's order; only CuDNNBatchNorm has the last two
CORRUPTED_OR_OTHER = 'the file is corrupted, or does not contain SKNet weights'


def read_caffemodel(path: Path, largest: int) -> Dict[str, Tensor]:
    """Returns the blobs of all layers, with names of the form LAYER.BLOB, such as 'conv1/7x7_s2/bn.weight'.

    Args:
        path: A `.caffemodel` in Caffe's second format (`LayerParameter`).
        largest: The expected number of elements of the largest blob. It limits the memory that a corrupted file can
            use.

    Raises:
        ValueError: If the file is corrupted, or not a `.caffemodel` in that format.
        ImportError: If the protobuf library is not installed.
    """
    parse = _layer_parser()
    most = 9 * largest + 2**16  # bytes: a double and its tag for each element, and the layer's settings
    layers: Dict[str, List[Tensor]] = {}
    size = path.stat().st_size
    with path.open('rb') as file:
        if file.read(1) == FIELD_1_IS_A_NUMBER:
            file.seek(0)
            raise ValueError(_other_message(file, size))
        file.seek(0)
        for number, record in _records(file, size, keep={2, 100}, most=most):
            if number == 2:
                raise ValueError(
                    "a Caffe file in the old V1 format, which is not supported. Upgrade it with Caffe's "
                    'upgrade_net_proto_binary.'
                )
            # count before parsing: an empty message takes 2 bytes in the file and 70 in memory
            if sum(1 for _ in _records(io.BytesIO(record), len(record), keep={7}, most=len(record))) > 4:
                raise ValueError(f'{CORRUPTED_OR_OTHER}: a layer has more than 4 blobs.')
            name, blobs = parse(record)
            if not blobs:
                continue
            if name in layers:
                raise ValueError(f'{CORRUPTED_OR_OTHER}: it has two layers with the name {name!r}.')
            if len(layers) == MOST_LAYERS:
                raise ValueError(f'{CORRUPTED_OR_OTHER}: it has more than {MOST_LAYERS:,} layers.')
            layers[name] = blobs
    if not layers:
        raise ValueError('not a Caffe file, or a Caffe file without weights.')
    return {f'{layer}.{name}': blob for layer, blobs in layers.items() for name, blob in zip(BLOBS, blobs)}


def _records(file: BinaryIO, size: int, keep: Set[int], most: int) -> Iterator[Tuple[int, bytes]]:
    """Yields the number and the content of each length-delimited field whose number is in `keep`, in file order.

    Raises:
        ValueError: If this is not a protobuf message, or if such a field has more than `most` bytes.
    """
    for number, wire_type, length in _fields(file, size):
        if wire_type == LENGTH and number in keep:
            if length > most:
                raise ValueError(
                    f'{CORRUPTED_OR_OTHER}: the layer at byte {file.tell():,} has {length:,} bytes, more than {most:,}.'
                )
            yield number, file.read(length)


def _fields(file: BinaryIO, size: int) -> Iterator[Tuple[int, int, int]]:
    """Yields the number, the wire type and the length of each field, with the file at its content.

    Raises:
        ValueError: If this is not a protobuf message.
    """
    while file.tell() < size:
        start = file.tell()
        number, wire_type = divmod(_varint(file), 8)
        if number == 0 or wire_type not in (VARINT, FIXED64, LENGTH, FIXED32):
            raise ValueError(f'not a Caffe file, or the file is corrupted: no protobuf field at byte {start:,}.')
        if wire_type == VARINT:
            _varint(file)
            yield number, wire_type, 0
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire_type) or _varint(file)
        end = file.tell() + length
        if end > size:
            raise ValueError(
                f'the file is truncated or corrupted: the field at byte {start:,} has {length:,} bytes, but only '
                f'{size - file.tell():,} bytes follow.'
            )
        yield number, wire_type, length
        file.seek(end)


def _other_message(file: BinaryIO, size: int) -> str:
    """Says what a message is whose first field is a number. A Caffe network has a name there."""
    numbers = {min(number, 9) for number, _, _ in _fields(file, size)}
    if {7, 8} <= numbers:  # the graph and its operator sets
        return 'this is an ONNX file. Convert the checkpoint that it was exported from.'
    if 3 in numbers <= {1, 2, 3, 4}:  # iteration, file of the weights, history, step
        return "this is a .solverstate, the state of Caffe's solver. Pass the .caffemodel that was saved with it."
    return 'this is not a Caffe file.'


def _varint(file: BinaryIO) -> int:
    """Reads an integer of protobuf's variable length: 7 bits a byte, lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError('the file is truncated or corrupted: it ends inside a number.')
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError(
        f'not a Caffe file, or the file is corrupted: the number before byte {file.tell():,} has more than 10 bytes.'
    )


def _layer_parser() -> Callable[[bytes], Tuple[str, List[Tensor]]]:
    """Returns a function that parses the message of a layer and returns its name and blobs.

    The schema contains only the fields of caffe.proto's LayerParameter that are needed here. Shapes are declared as
    bytes, because parsed numbers can take eight times as much memory as they take in the file.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        from google.protobuf.message import DecodeError
    except ImportError as e:
        raise ImportError('Caffe files require the protobuf library. Install it with: pip install protobuf') from e

    Field = descriptor_pb2.FieldDescriptorProto
    one, many = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED
    schema = descriptor_pb2.FileDescriptorProto(name='caffe.proto', package='caffe')
    messages: Dict[str, List[Tuple]] = {
        'Shape': [('dim', 1, one, Field.TYPE_BYTES)],
        'Blob': [
            ('num', 1, one, Field.TYPE_INT32),
            ('channels', 2, one, Field.TYPE_INT32),
            ('height', 3, one, Field.TYPE_INT32),
            ('width', 4, one, Field.TYPE_INT32),
            ('data', 5, many, Field.TYPE_FLOAT),
            ('shape', 7, one, Field.TYPE_MESSAGE, '.caffe.Shape'),
            ('double_data', 8, many, Field.TYPE_DOUBLE),
            ('raw_data', 12, one, Field.TYPE_BYTES),  # only in OpenCV and NVCaffe
        ],
        'Layer': [('name', 1, one, Field.TYPE_BYTES), ('blobs', 7, many, Field.TYPE_MESSAGE, '.caffe.Blob')],
    }
    for message, fields in messages.items():
        descriptor = schema.message_type.add(name=message)
        for field in fields:
            descriptor.field.add(**dict(zip(('name', 'number', 'label', 'type', 'type_name'), field)))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    Layer: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName('caffe.Layer'))

    def parse(record: bytes) -> Tuple[str, List[Tensor]]:
        try:
            layer = Layer.FromString(record)
            name = layer.name.decode()
        except (DecodeError, UnicodeDecodeError) as e:
            raise ValueError(f'the file is corrupted: cannot parse a layer ({e}).') from e
        return name, [_tensor(name, blob) for blob in layer.blobs]

    return parse


def _tensor(name: str, blob: Any) -> Tensor:
    """Returns a blob of the layer `name` as a float32 tensor."""
    if blob.raw_data:
        raise ValueError(
            f"a blob of layer {name!r} is stored as raw data, which is not supported. OpenCV's shrinkCaffeModel writes "
            'half precision in this form. Convert the original .caffemodel.'
        )
    with np.errstate(over='ignore'):  # infinite values are an error later, when the weights are checked
        values = np.array(blob.data or blob.double_data, dtype=np.float32)
    if blob.HasField('shape'):
        packed = io.BytesIO(blob.shape.dim[:100])  # room for ten numbers of ten bytes; Caffe has at most four
        shape = []
        while packed.tell() < len(packed.getvalue()):
            shape.append(_varint(packed))
    else:
        shape = [blob.num, blob.channels, blob.height, blob.width]
    if math.prod(shape) != len(values) or min(shape, default=1) < 0:
        raise ValueError(f'the file is corrupted: a blob of layer {name!r} has {len(values):,} values, shape {shape}.')
    return torch.from_numpy(values).reshape(shape)
