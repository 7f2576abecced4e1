"""Reads weights of others, and of timm's train.py: what a file holds, and which of our networks it fits."""

import argparse
import json
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor

from timm_sknet.caffe import count, native_state, read_caffemodel
from timm_sknet.network import SKNetCfg, is_folded, native_keys
from timm_sknet.sknets import CAFFE_INPUT, default_cfgs, model_cfgs, weights

HUB_NAME = re.compile(r'(?:hf[-_]hub:)?([\w-]+/[\w.-]+)(?:@([\w./-]+))?')
PREPROCESSING = 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'
MODEL_ARGS = {f.name for f in fields(SKNetCfg)}


@dataclass
class Source:
    """Weights as they were read.

    Attributes:
        what: What they are, in words.
        path: The file that holds them.
        fit: Function from the name of a model to its state dict and the arguments that make the network that they fit.
            Raises ValueError where they are not that model's.
        tag: Their tag in our table of weights, empty where they are not in it.
        cfg: Fields of timm's `PretrainedCfg` that they come with.
        measured: A figure that they come with, in words.
    """

    what: str
    path: Path
    fit: Callable[[str], Tuple[Dict[str, Tensor], Dict[str, Any]]]
    tag: str = ''
    cfg: Dict[str, Any] = field(default_factory=dict)
    measured: str = ''


def read(source: str, arch: str, ema: bool = True) -> Source:
    """Reads weights, whose kind is seen from their content.

    Args:
        source: A file, or the name of a repository on the Hub; see `timm_sknet.convert.convert`.
        arch: The model they are expected to be of.
        ema: Take the averaged weights of a checkpoint that has them.

    Raises:
        ValueError: For whatever is no such thing, or damaged; the text says what is wrong with it.
        OSError: Where it cannot be read.
    """
    path = Path(source)
    match = HUB_NAME.fullmatch(source)
    if match and not path.exists():
        return _repository(match[1], match[2])
    if path.is_dir():
        raise ValueError('a folder: name the file with the weights in it.')
    with path.open('rb') as file:
        start = file.read(256)
    if not start:
        raise ValueError('an empty file.')
    if start[8:9] == b'{':
        return _state_dict(_safetensors(path), path)
    if start.startswith((b'PK', b'\x80')):
        return _checkpoint(path, arch, ema)
    if re.match(rb'(\s|#.*\n)*(name|layers?|input)\s*[:{]', start):
        raise ValueError('a text file. A prototxt describes a network: its weights are in the .caffemodel.')
    return _caffemodel(path, arch)


def shapes(arch: str, **args: Any) -> Dict[str, torch.Size]:
    """Returns the shape of each tensor of a model's state dict.

    Raises:
        ValueError: For arguments that make no model.
    """
    try:
        state = timm.create_model(arch, device='meta', **args).state_dict()
    except Exception as e:  # arguments that were read can be anything
        raise ValueError(f'the arguments {args} make no {arch} ({e}).') from e
    return {key: value.shape for key, value in state.items()}


def _caffemodel(path: Path, arch: str) -> Source:
    layers = read_caffemodel(path, largest=max(map(math.prod, shapes(arch).values())))

    def fit(arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        return native_state(layers, model_cfgs[arch].depths, partial(shapes, arch))

    return Source("a .caffemodel of the paper's authors", path, fit, 'authors_in1k', CAFFE_INPUT)


def _repository(repo: str, revision: Optional[str]) -> Source:
    try:
        path = Path(hf_hub_download(repo, 'model.safetensors', revision=revision))
        config = json.loads(Path(hf_hub_download(repo, 'config.json', revision=revision)).read_bytes())
        cfg = dict(config['pretrained_cfg'])
        model_args = dict(config.get('model_args', {}))
    except (KeyError, TypeError, ValueError, OSError) as e:  # OSError: huggingface_hub's errors are of that kind
        raise ValueError(f'no file of that name, and no model that could be had from the Hub ({e}).') from e
    cfg.setdefault('label_names', config.get('label_names'))
    tag = next((name.split('.')[1] for name, known in weights.items() if known.cfg.get('hf_hub_id') == repo), '')
    source = _state_dict(_safetensors(path), path, model_args)
    return replace(source, what=f'{repo} on the Hugging Face Hub', tag=tag, cfg=cfg)


def _safetensors(path: Path) -> Dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f'damaged or cut short: no safetensors file ({e}).') from e


def _checkpoint(path: Path, arch: str, ema: bool) -> Source:
    checkpoint = _load(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'it holds a {type(checkpoint).__name__}, and no weights by name.')
    averaged = ema and isinstance(checkpoint.get('state_dict_ema'), Mapping)
    state = checkpoint.get('state_dict_ema' if averaged else 'state_dict', checkpoint)
    if not isinstance(checkpoint.get('args'), argparse.Namespace):
        return _state_dict(state, path)

    args = vars(checkpoint['args'])
    try:
        model_args = {k: v for k, v in args.get('model_kwargs', {}).items() if k in MODEL_ARGS}
        given = {'bn_momentum': args.get('bn_momentum'), 'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp')}
        model_args |= {k: v for k, v in given.items() if v is not None}
        cfg = resolve_data_config(args, default_cfgs[arch].default.to_dict())
    except Exception as e:  # they can be anything
        raise ValueError(f'its arguments are not those of a checkpoint of train.py ({e!r}).') from e
    measured = ''
    if 'metric' in checkpoint and (
        averaged or 'state_dict_ema' not in checkpoint
    ):  # it is that of the averaged weights
        measured = f'{args.get("eval_metric")} {checkpoint["metric"]} in epoch {checkpoint.get("epoch")}, by train.py'
    what = "a checkpoint of timm's train.py" + (', averaged weights' if averaged else '')
    return replace(_state_dict(state, path, model_args), what=what, tag='', cfg=cfg, measured=measured)


def _load(path: Path) -> Any:
    """Unpickles a checkpoint of torch, tensors and plain values only."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError('its content is compressed, which torch does not do')  # could be of any size
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action='ignore'):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:
        code = re.search(r'GLOBAL (\S+)', str(e))
        if code:
            raise ValueError(f'refused: besides weights it holds {code[1]}, which could run code.') from e
        raise ValueError('damaged, or no checkpoint of torch: it cannot be unpickled.') from e
    except Exception as e:  # torch raises whatever it meets
        raise ValueError(f'damaged, or no checkpoint of torch ({e}).') from e


def _state_dict(state: Any, path: Path, model_args: Optional[Dict[str, Any]] = None) -> Source:
    """Describes a state dict, whose keys tell whose network it is of."""
    if not (isinstance(state, Mapping) and all(isinstance(key, str) for key in state)):
        raise ValueError(f'it holds a {type(state).__name__} that is no state dict.')
    others = {key for key, value in state.items() if not isinstance(value, Tensor)}
    if others:
        raise ValueError(f'it is no state dict: no tensors are its {count(others, "value")}.')
    what, tag, cfg = 'weights of timm_sknet', '', {}
    if any('.conv2g.' in key for key in state):
        what, tag = "a checkpoint of the authors' PyTorch variant", 'authors_in1k'
    elif any('.conv2.paths.' in key for key in state):
        what = "weights of timm's skresnext50_32x4d"
        cfg = {key: value for key, value in weights['sknet50.ra_in1k'].cfg.items() if key in PREPROCESSING}
    return Source(what, path, partial(_fit, native_keys(clean_state_dict(dict(state))), model_args or {}), tag, cfg)


def _fit(state: Mapping[str, Tensor], args: Dict[str, Any], arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    if is_folded(state):
        raise ValueError('these are the weights of a folded (reparameterized) model: convert those it had before.')
    cfg = model_cfgs[arch].override(**{k: v for k, v in args.items() if k in MODEL_ARGS})
    if sum(cfg.depths) * len(cfg.branches) > len(state):  # before a network of any size is made from a file's arguments
        raise ValueError(f'it has {count(state, "tensor")}, too few for its arguments {args}.')
    stem, classifier = state.get('stem.conv.weight'), state.get('head.fc.weight')
    if stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        args = args | dict(in_chans=stem.shape[1])
    expected = shapes(arch, num_classes=0 if classifier is None else classifier.shape[0], **args)
    counters = {key: torch.tensor(0) for key in expected if key.endswith('num_batches_tracked')}
    state = counters | dict(state)
    for what, keys in ('lacks', expected.keys() - state.keys()), ('has also', state.keys() - expected.keys()):
        if keys:
            raise ValueError(f'it {what} the {count(keys, "tensor")}.')
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise ValueError(f'{key} is of shape {tuple(state[key].shape)}, not {tuple(shape)}.')
    return state, args
