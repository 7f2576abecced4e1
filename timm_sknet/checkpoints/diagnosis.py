"""Identifies files that cannot be converted, and says what to do with them."""

from typing import Any, Collection, Mapping, Sequence

import timm
import torch
from torch import Tensor

from timm_sknet.keys import detect_origin

LIGHTNING = 'a checkpoint of Lightning'
SAVE_ALONE = 'Save the weights alone where the model was trained: torch.save(model.state_dict(), FILE).'


def list_names(names: Collection[str], most: int = 3) -> str:
    """Returns the first names as text: 'a', 'a and b', or 'a, b, c and 9 more'."""
    shown = [name if len(name) <= 60 else f'{name[:60]}...' for name in sorted(names)[:most]]
    if len(names) > most:
        shown.append(f'{len(names) - most} more')
    *others, last = shown
    return f'{", ".join(others)} and {last}' if others else last


def text_file(start: bytes) -> str:
    """Describes a text file by its first bytes; '' if it is not text."""
    if not (start.isascii() and start.decode().translate({9: None, 10: None, 13: None}).isprintable()):
        return ''
    if start.startswith(b'version https://git-lfs'):
        return 'this is a Git LFS pointer instead of the weights. Download the weights with git lfs pull.'
    if b'"weight_map"' in start:
        return (
            'this is the index of weights that are split into several files. Load each of these files with '
            'safetensors.torch.load_file, and write all tensors to one file with safetensors.torch.save_file.'
        )
    if start.lstrip().startswith(b'{'):
        return 'this is a JSON file. Pass the path of the weights file.'
    return (
        'this is a text file, perhaps a prototxt or a web page. Caffe weights are in a .caffemodel file, those of '
        'TensorFlow in a checkpoint with an .index file.'
    )


def binary_file(start: bytes) -> str:
    """Describes a binary file by its first bytes; '' if its type is unknown."""
    kinds = {
        b'\x1f\x8b': 'this is a gzip file. Decompress it first.',
        b'\x89HDF': 'this is an HDF5 file, perhaps of Keras, which is not supported.',
        b'\x93NUMPY': 'this is a NumPy array. Expected a state dict: all tensors of the model by their names.',
    }
    return next((what for magic, what in kinds.items() if start.startswith(magic)), '')


def archive(names: Sequence[str]) -> str:
    """Says what a zip archive with these files is; returns '' if it can be a checkpoint of `torch.save`."""
    if any(name.endswith('/constants.pkl') for name in names):
        return (
            'this is a TorchScript archive (torch.jit.save). If you trust it, save its weights alone: '
            'torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE).'
        )
    if any(name.endswith(('archive_format', 'serialized_exported_program.json')) for name in names):
        return (
            'this is an exported program (torch.export.save). If you trust it, save its weights alone: '
            'torch.save(torch.export.load(FILE).state_dict, NEW_FILE).'
        )
    if any(name.endswith('.npy') for name in names):
        return (
            'this is a NumPy archive (.npz). Save its arrays as tensors: '
            'torch.save({name: torch.from_numpy(array) for name, array in numpy.load(FILE).items()}, NEW_FILE).'
        )
    if not any(name.lower().endswith('data.pkl') for name in names):
        return f'this is a zip archive, but not a PyTorch checkpoint. It contains {list_names(names or ["no files"])}.'
    return ''


def trainer(checkpoint: Mapping[Any, Any]) -> str:
    """Says which library has written a checkpoint; returns '' if it is unknown."""
    meta = checkpoint.get('meta')
    if 'pytorch-lightning_version' in checkpoint:
        return LIGHTNING
    if isinstance(meta, dict) and {'mmengine_version', 'mmcv_version', 'mmdet_version'} & meta.keys():
        return 'a checkpoint of OpenMMLab (MMDetection and others)'
    return ''


def weights(what: str, tensors: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> str:
    """Says what weights that fit no model are, as far as it is certain, and what to do with them.

    Args:
        what: Description of the file.
        tensors: The weights.
        renamed: The weights under the keys of this package, as far as they are known.
    """
    name = _timm_model(tensors)
    if name:
        return (
            f"These are weights of timm's {name}, which has no counterpart in this package. Load them with timm: "
            f'timm.create_model({name!r}, checkpoint_path=FILE).'
        )
    if what == LIGHTNING:
        return (
            'Save the network alone, without the rest of the LightningModule: '
            'torch.save(module.NETWORK.state_dict(), FILE), with the name of its attribute for NETWORK.'
        )
    origin = detect_origin(tensors)
    if origin:
        return f'The keys are those of {origin}, but no model of this package has these shapes.'
    if not any(key.startswith(('stem.', 'stages.', 'head.')) for key in renamed):
        return 'They belong to another network or implementation. docs/weights.md lists what can be converted.'
    return ''


def _timm_model(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SK network of timm that is not in this package and has these weights, except for the classifier."""

    def shapes(state: Mapping[str, Tensor]) -> Mapping[str, torch.Size]:
        return {k: v.shape for k, v in state.items() if not k.startswith('fc.') and not k.endswith('_tracked')}

    names = ('skresnet50', 'skresnet50d') if any('.conv2.paths.' in key for key in tensors) else ()
    for name in names:
        with torch.device('meta'):
            if shapes(timm.create_model(name).state_dict()) == shapes(tensors):
                return name
    return ''
