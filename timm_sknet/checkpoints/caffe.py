"""Reads the authors' Caffe files: the tensors of a `.caffemodel`, and our names for them.

The format is a protobuf message whose field 100 holds one message for each layer. Those are taken from the file one by
one, so that a file of 200 MB needs little more memory than its weights, and each is parsed by the protobuf library.
"""

import io
import math
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Set, Tuple

import numpy as np
import torch
from torch import Tensor

MOST_LAYERS = 10_000  # a layer takes 12 bytes in the file and 1,200 in memory
BLOBS = 'weight', 'bias', 'running_mean', 'running_var'  # in Caffe's order; only CuDNNBatchNorm has the last two


def read_caffemodel(path: Path, largest: int) -> Dict[str, Tensor]:
    """Returns the blobs of all layers, by the layer's name and ours of the blob, as in 'conv1/7x7_s2/bn.weight'.

    Args:
        path: A `.caffemodel` of Caffe's second format (`LayerParameter`).
        largest: Elements of the largest blob to expect; a wrong file cannot make us take
            more memory than that asks for.

    Raises:
        ValueError: For anything else than such a file.
        ImportError: Where the protobuf library is missing.
    """
    parse = _layer_parser()
    most = 9 * largest + 2**16  # bytes: doubles, each with a tag, and the layer's settings
    layers: Dict[str, List[Tensor]] = {}
    with path.open('rb') as file:
        for number, record in _records(file, path.stat().st_size, keep={2, 100}, most=most):
            if number == 2:
                raise ValueError("a Caffe file of the old V1 format: upgrade it with Caffe's upgrade_net_proto_binary.")
            # counted before they are parsed: an empty message takes 2 bytes in the file and 70 in memory
            if sum(1 for _ in _records(io.BytesIO(record), len(record), keep={7}, most=len(record))) > 4:
                raise ValueError('damaged, or of another network: a layer of more than 4 blobs.')
            name, blobs = parse(record)
            if not blobs:
                continue
            if name in layers:
                raise ValueError(f'damaged, or of another network: layer {name!r} stands twice in it.')
            if len(layers) == MOST_LAYERS:
                raise ValueError(f'damaged, or of another network: more than {MOST_LAYERS:,} layers.')
            layers[name] = blobs
    return {f'{layer}.{name}': blob for layer, blobs in layers.items() for name, blob in zip(BLOBS, blobs)}


def _records(file: BinaryIO, size: int, keep: Set[int], most: int) -> Iterator[Tuple[int, bytes]]:
    """Yields number and content of the length-delimited fields whose number is in `keep`, in the order of the file."""
    while file.tell() < size:
        start = file.tell()
        number, wire_type = divmod(_varint(file), 8)
        if number == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f'not a Caffe file, or damaged: no field of a protobuf message at byte {start:,}.')
        if wire_type == 0:
            _varint(file)
            continue
        length = {1: 8, 5: 4}.get(wire_type) or _varint(file)
        if file.tell() + length > size:
            raise ValueError(f'cut short or damaged: {length:,} bytes announced at byte {start:,}, {size:,} in all.')
        if wire_type == 2 and number in keep:
            if length > most:
                raise ValueError(f'damaged, or of another network: {length:,} bytes in one layer, at byte {start:,}.')
            yield number, file.read(length)
        else:
            file.seek(length, io.SEEK_CUR)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError('cut short or damaged: it ends inside a number.')
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError(f'not a Caffe file, or damaged: no number has 10 bytes, as that before byte {file.tell():,}.')


def _layer_parser() -> Callable[[bytes], Tuple[str, List[Tensor]]]:
    """Returns a function from a layer's message to its name and blobs.

    The schema holds what we need of caffe.proto's LayerParameter. A shape is left packed, since its numbers can take
    eight times the memory that they take in the file.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
        from google.protobuf.message import DecodeError
    except ImportError as e:
        raise ImportError('Caffe files need the protobuf library: pip install protobuf.') from e

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
            raise ValueError(f'damaged: a layer that is none ({e}).') from e
        return name, [_tensor(name, blob) for blob in layer.blobs]

    return parse


def _tensor(name: str, blob: Any) -> Tensor:
    with np.errstate(over='ignore'):  # infinity is refused with those that the file has
        values = np.array(blob.data or blob.double_data, dtype=np.float32)
    if blob.HasField('shape'):
        packed = io.BytesIO(blob.shape.dim[:100])  # ten numbers of ten bytes, Caffe has no more than four
        shape = []
        while packed.tell() < len(packed.getvalue()):
            shape.append(_varint(packed))
    else:
        shape = [blob.num, blob.channels, blob.height, blob.width]
    if math.prod(shape) != len(values) or min(shape, default=1) < 0:
        raise ValueError(f'damaged: a blob of layer {name!r} has {len(values):,} values for the shape {shape}.')
    return torch.from_numpy(values).reshape(shape)
