"""Reads weights of others, and of timm's train.py: what a file holds, and which of our networks it fits."""

import argparse
import itertools
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Collection, Dict, List, Literal, Mapping, Optional, Sequence, Tuple

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor

from timm_sknet.checkpoints.caffe import read_caffemodel
from timm_sknet.keys import PYTORCH_VARIANT, TIMM, foreign, is_folded, native_keys, rename_blobs
from timm_sknet.network import SKNet, SKNetCfg
from timm_sknet.sknets import CAFFE_INPUT, default_cfgs, model_cfgs
from timm_sknet.sknets import weights as known_weights

HUB_NAME = re.compile(r'(?:hf[-_]hub:)?([\w-]+/[\w.-]+)(?:@([\w./-]+))?')
SUFFIXES = '.caffemodel', '.safetensors', '.pth', '.pt', '.tar', '.bin'
PREPROCESSING = 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'
# What other weights than ours may say of themselves; names of layers and the like are those of their network.
DESCRIPTION = *PREPROCESSING, 'tag', 'license', 'label_names', 'description', 'origin_url'
ARCHITECTURE = {f.name for f in fields(SKNetCfg)}
MODEL_ARGS = ARCHITECTURE | {'output_stride', 'global_pool'}
TRAINING_ARGS = {'drop_rate', 'drop_path_rate', 'drop_block_rate', 'zero_init_last', 'memory_efficient'}
TRAINING_ARGS.update({'num_classes', 'in_chans'})  # known from the tensors
# of train.py's arguments, those that say something about the model and its input
TRAIN_ARGS = {'model', 'model_kwargs', 'bn_momentum', 'bn_eps', 'gp', 'eval_metric', 'img_size', 'in_chans'}
TRAIN_ARGS.update(PREPROCESSING)
# What the pickle of a checkpoint may name. Torch allows more, some of which takes as much memory as the pickle says.
PICKLED = re.compile(
    r'collections (OrderedDict|Counter)|argparse Namespace|torch\._utils _rebuild_(tensor(_v[23])?|parameter)|'
    r'torch(\.cuda|\.storage)? \w+Storage|torch (Size|device|bool|[a-z]+\d\w*)'
)
# Bytes. What they describe takes up to 80 times as much memory; some 8,000 tensors come to half of either.
LONGEST_PICKLE = 2**21
LONGEST_HEADER = 2**20


@dataclass(frozen=True)
class Source:
    """Weights as they were read.

    Attributes:
        what: What they are, in words.
        path: The file that holds them.
        tensors: The tensors by the names that they have in the file.
        kind: What these names are: layers of Caffe, or the keys of a state dict.
        arch: The model of ours that the source names, empty where it names none.
        model_args: Arguments of the model that the source names.
        cfg: Fields of timm's `PretrainedCfg` that they come with.
        tag: Their tag in our table of weights, empty where they are not in it.
        measured: A figure that they come with, in words.
    """

    what: str
    path: Path
    tensors: Mapping[str, Tensor]
    kind: Literal['caffe', 'state_dict'] = 'state_dict'
    arch: str = ''
    model_args: Mapping[str, Any] = field(default_factory=dict)
    cfg: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ''
    measured: str = ''


def read(source: str, arch: str, ema: bool = True) -> Source:
    """Reads weights and detects their kind from the content.

    Args:
        source: A file, or the name of a repository on the Hub; see `timm_sknet.checkpoints.convert.convert`.
        arch: The model they are expected to be of.
        ema: Take the averaged weights of a checkpoint that has them.

    Raises:
        ValueError: For whatever is no such thing, or damaged; the text says what is wrong with it.
        OSError: Where it cannot be read.
    """
    path = Path(source)
    match = HUB_NAME.fullmatch(source)
    if match and not path.exists() and path.suffix not in SUFFIXES:
        return _repository(match[1], match[2])
    if path.is_dir():
        raise ValueError('a folder: name the file with the weights in it.')
    with path.open('rb') as file:
        start = file.read(256)
    if not start:
        raise ValueError('an empty file.')
    if start[8:9] == b'{':
        weights = _state_dict(_safetensors(path), path)
        config = path.with_name('config.json')
        return _described(weights, config) if path.name == 'model.safetensors' and config.is_file() else weights
    if start.startswith((b'PK', b'\x80')):
        return _checkpoint(path, arch, ema)
    if start.isascii() and start.decode().replace('\n', '').replace('\r', '').replace('\t', '').isprintable():
        raise ValueError('a text file, perhaps a prototxt (the weights are in the .caffemodel) or a web page.')
    return _caffemodel(path, arch)


def shapes(arch: str, most: float = math.inf, /, **args: Any) -> Dict[str, torch.Size]:
    """Returns the shape of each tensor of a model's state dict.

    Args:
        arch: Name of the model.
        most: Number of tensors from which on the model is not even made.
        args: Those of `SKNet`, and none of timm's, which could make it load files.

    Raises:
        ValueError: For arguments that make no model.
    """
    args = {key: value for key, value in args.items() if value is not None}  # as timm does
    try:
        cfg = model_cfgs[arch].override(**{k: v for k, v in args.items() if k in ARCHITECTURE})
        if sum(map(abs, cfg.depths)) * len(cfg.branches) > most:
            raise ValueError(f'it would have more than {most} tensors')
        state = SKNet(model_cfgs[arch], device='meta', **args).state_dict()
    except Exception as e:  # arguments that were read can be anything
        raise ValueError(f'the arguments {args} make no {arch} ({e}).') from e
    return {key: value.shape for key, value in state.items()}


def fit(source: Source, arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Renames the tensors of a source to the keys of a model.

    Args:
        source: What `read` returns.
        arch: Name of the model.

    Returns:
        The state dict, and the arguments of the network that it is of.

    Raises:
        ValueError: Where the tensors are not those of this model.
    """
    caffe, cfg, args = source.kind == 'caffe', model_cfgs[arch], dict(source.model_args)
    state = dict(rename_blobs(source.tensors) if caffe else native_keys(clean_state_dict(dict(source.tensors))))
    if len(state) < len(source.tensors):
        raise ValueError('damaged, or of another network: two of its tensors have the same name.')
    if is_folded(state):
        raise ValueError('these are the weights of a folded (reparameterized) model: convert those it had before.')
    stem, bias = state.get('stem.conv.weight'), state.get('head.fc.bias')
    classes = int('head.fc.weight' in state) if bias is None else bias.numel()  # without a bias its name is missing
    if caffe and cfg.stem_pool != 'ceil':
        args['stem_pool'] = 'ceil'
    elif not caffe and stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        args['in_chans'] = stem.shape[1]

    expected = shapes(arch, len(state), num_classes=classes, **args)
    state = {key: torch.tensor(0) for key in expected if key.endswith('num_batches_tracked')} | state
    for verb, names in ('lacks', expected.keys() - state.keys()), ('has also', state.keys() - expected.keys()):
        if names:
            raise ValueError(f'it {verb} the {count(names, "tensor")}.')
    if caffe:
        units = [f'stages.{stage}.0.sk.attn.bn.weight' for stage in range(len(cfg.depths))]
        widths = [state[key].numel() for key in units]
        if widths != [expected[key].numel() for key in units]:
            args['attn_widths'] = widths
            expected = shapes(arch, len(state), num_classes=classes, **args)
    for key, shape in expected.items():
        if caffe and _without_ones(state[key].shape) == _without_ones(shape):
            state[key] = state[key].reshape(shape)  # Caffe pads shapes with ones, before or behind
        if state[key].shape != shape:
            raise ValueError(f'{key} is of shape {tuple(state[key].shape)}, not {tuple(shape)}.')
    if caffe:
        state['stem.conv.weight'] = state['stem.conv.weight'].flip(1)  # from BGR to RGB
    # what the shapes do not show
    if caffe and f'{arch}_caffe' in model_cfgs:
        raise ValueError(f'the stem pool of {arch} has a padding, that of a Caffe network has none.')
    if source.arch not in ('', arch):
        raise ValueError(f'it names the model {source.arch}.')
    return state, args


def likely_arch(source: Source) -> str:
    """Returns the name of the model that a source fits, empty where it fits none."""
    caffe = source.kind == 'caffe'
    for name in sorted(model_cfgs, key=lambda name: name.endswith('_caffe') != caffe):
        if name.endswith('_caffe') and not (caffe or source.arch):
            continue  # a state dict does not show the stem pool
        with suppress(ValueError):
            fit(source, name)
            return name
    return ''


def _without_ones(shape: Sequence[int]) -> List[int]:
    return [n for n in shape if n != 1]


def _caffemodel(path: Path, arch: str) -> Source:
    largest = max(math.prod(shape) for name in {arch, 'sknet101'} & set(model_cfgs) for shape in shapes(name).values())
    blobs = read_caffemodel(path, largest)
    return Source("a .caffemodel of the paper's authors", path, blobs, 'caffe', cfg=CAFFE_INPUT, tag='authors_in1k')


def count(names: Collection[str], what: str, show: int = 3) -> str:
    """Returns the names after their number, the first few of them."""
    shown = ', '.join(sorted(names)[:show]) + (', ...' if len(names) > show else '')
    return f'{what} {shown}' if len(names) == 1 else f'{len(names)} {what}s {shown}'


def _repository(repo: str, revision: Optional[str]) -> Source:
    try:
        path = Path(hf_hub_download(repo, 'model.safetensors', revision=revision))
        config = Path(hf_hub_download(repo, 'config.json', revision=revision))
    except (ValueError, OSError) as e:  # huggingface_hub's are of the last kind
        raise ValueError(f'no file of that name, and no model that could be had from the Hub ({e}).') from e
    source = _described(_state_dict(_safetensors(path), path), config)
    tag = next((name.split('.')[1] for name, known in known_weights.items() if known.cfg.get('hf_hub_id') == repo), '')
    return replace(source, what=f'{repo} on the Hugging Face Hub', tag=tag)


def _described(source: Source, config: Path) -> Source:
    """Returns weights with what the config.json beside them says of them."""
    arch, model_args, cfg = _config(config)
    return replace(source, arch=arch, model_args=model_args, cfg=cfg)


def _config(path: Path) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Returns the model, if it is ours, its arguments and the fields of its cfg in a config.json of timm's."""
    try:
        config = json.loads(path.read_bytes())
        arch = next((name for name in model_cfgs if name == config.get('architecture')), '')
        cfg = {k: v for k, v in config['pretrained_cfg'].items() if k in DESCRIPTION and v is not None}
        if config.get('label_names') is not None:  # timm writes them here, and reads them here first
            cfg['label_names'] = config['label_names']
        return arch, _model_args(config.get('model_args') or {}), cfg
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f'{path} is not a config.json of timm ({e!r}).') from e


def _model_args(given: Dict[str, Any]) -> Dict[str, Any]:
    """Returns those arguments that the network depends on."""
    unknown = given.keys() - MODEL_ARGS - TRAINING_ARGS
    if unknown:
        raise ValueError(f'the model has arguments that no SKNet has: {count(unknown, "argument")}.')
    return {key: value for key, value in given.items() if key not in TRAINING_ARGS}


def _start(model: str, arch: str) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Returns what `_config` does, for the name of a model that train.py was given."""
    if model.startswith('local-dir:'):
        return _config(Path(model.removeprefix('local-dir:')) / 'config.json')
    match = HUB_NAME.fullmatch(model)
    if match:
        return _config(Path(hf_hub_download(match[1], 'config.json', revision=match[2])))
    variant, _, tag = model.partition('.')
    cfgs = default_cfgs.get(variant, default_cfgs[arch])
    cfg = cfgs.cfgs.get(tag, cfgs.default).to_dict()
    return variant if variant in model_cfgs else '', {}, {key: cfg[key] for key in PREPROCESSING}


def _safetensors(path: Path) -> Dict[str, Tensor]:
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if length > LONGEST_HEADER:
        raise ValueError(f'damaged, or of another network: no safetensors file with a header of {length:,} bytes.')
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f'damaged or cut short: no safetensors file ({e}).') from e


def _checkpoint(path: Path, arch: str, ema: bool) -> Source:
    checkpoint = _load(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f'it holds a {type(checkpoint).__name__}, and no weights by name.')
    checkpoint = _items(checkpoint)
    averaged = ema and isinstance(checkpoint.get('state_dict_ema'), dict)
    state = checkpoint.get('state_dict_ema' if averaged else 'state_dict', checkpoint)
    if not isinstance(checkpoint.get('args'), argparse.Namespace):
        return _state_dict(state, path)

    try:
        args = _plain({k: v for k, v in vars(checkpoint['args']).items() if k in TRAIN_ARGS})
        metric, epoch = _plain([checkpoint.get('metric'), checkpoint.get('epoch')])
        own_arch, model_args, cfg = _start(args.get('model', ''), arch)
        model_args |= _model_args(args.get('model_kwargs') or {})
        given = {'bn_momentum': args.get('bn_momentum'), 'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp')}
        model_args |= {k: v for k, v in given.items() if v is not None}
        cfg = resolve_data_config(args, cfg)
    except Exception as e:  # they can be anything
        raise ValueError(f'its arguments are not those of a checkpoint of train.py ({e!r}).') from e
    measured = ''
    if metric is not None and (averaged or 'state_dict_ema' not in checkpoint):  # it is that of the averaged weights
        measured = f'{args.get("eval_metric")} {metric} in epoch {epoch}'
    what = "a checkpoint of timm's train.py"
    if 'state_dict_ema' in checkpoint:
        what += ', its averaged weights' + ('' if averaged else ' left out')
    tensors = _state_dict(state, path).tensors
    return Source(what, path, tensors, arch=own_arch, model_args=model_args, cfg=cfg, measured=measured)


def _load(path: Path) -> Any:
    """Unpickles a checkpoint of torch, tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action='ignore'):
            zipped = zipfile.is_zipfile(path)
            if zipped:
                with zipfile.ZipFile(path) as archive:
                    if any(entry.compress_type for entry in archive.infolist()):
                        raise Refused('it is compressed, which torch does not do, and could be of any size.')
                    if damaged := archive.testzip():  # torch does not compare checksums
                        raise Refused(f'damaged: the checksum of {damaged} in it is wrong.')
                    for entry in archive.infolist():
                        if entry.filename.lower().endswith('data.pkl'):  # as torch finds it
                            _check_pickle(archive.open(entry))
            else:
                with path.open('rb') as file:
                    for _ in range(5):  # magic number, version, system, content, keys of the storages
                        _check_pickle(file)
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except Refused:
        raise
    except pickle.UnpicklingError as e:  # its text says how to run code nevertheless
        raise ValueError('damaged, or no checkpoint of torch: it cannot be unpickled.') from e
    except Exception as e:  # torch raises whatever it meets
        raise ValueError(f'damaged, or no checkpoint of torch ({e}).') from e


class Refused(ValueError):
    """For what need not be damaged."""


def _check_pickle(file: IO[bytes]) -> None:
    """Goes through one pickle, and lets pass what makes tensors and plain values."""
    for code, value, position in pickletools.genops(file):
        if code.name in ('GLOBAL', 'INST') and not PICKLED.fullmatch(str(value)):
            name = str(value).replace(' ', '.')
            raise Refused(f'refused: besides weights it holds {name}, which could run code or take any memory.')
        if (position or 0) > LONGEST_PICKLE:
            raise Refused(f'refused: besides weights it holds more than {LONGEST_PICKLE:,} bytes.')


def _plain(value: Any) -> Any:
    """Returns a value of JSON's kinds that is no longer than a model's arguments are; a pickle's can be endless."""
    return json.loads(''.join(itertools.islice(json.JSONEncoder().iterencode(value), 1000)))


def _items(mapping: Dict) -> Dict:
    """Returns a dict without the attributes that a pickle can give an OrderedDict, in place of its methods too."""
    return dict(dict.items(mapping))


def _state_dict(state: Any, path: Path) -> Source:
    """Describes a state dict, whose keys tell whose network it is of."""
    if not (isinstance(state, dict) and all(isinstance(key, str) for key in state)):
        raise ValueError(f'it holds a {type(state).__name__} that is no state dict.')
    state = _items(state)
    others = {key for key, value in state.items() if not isinstance(value, Tensor) or value.is_meta}
    if others:
        raise ValueError(f'it is no state dict: no tensors are its {count(others, "value")}.')
    if sum(value.numel() * value.itemsize for value in state.values()) > path.stat().st_size:
        raise ValueError('damaged: its tensors are larger than the file.')  # which those of strides 0 can be
    what, tag, cfg = 'a state dict', '', {}
    origin = foreign(state)
    if origin == PYTORCH_VARIANT:
        what, tag = "a checkpoint of the authors' PyTorch variant", 'authors_in1k'
    elif origin == TIMM:
        what = "weights of timm's skresnext50_32x4d"
        cfg = {key: value for key, value in known_weights['sknet50.ra_in1k'].cfg.items() if key in PREPROCESSING}
    return Source(what, path, state, cfg=cfg, tag=tag)
