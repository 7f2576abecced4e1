"""Reads weights of any supported source, and renames them to the keys of a model of this package."""

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

from timm_sknet.checkpoints.caffe import CORRUPTED_OR_OTHER, read_caffemodel
from timm_sknet.folding import is_folded
from timm_sknet.keys import PYTORCH_KEY_PART, TIMM_KEY_PART, detect_origin, native_keys, rename_blobs
from timm_sknet.network import SKNet, SKNetCfg
from timm_sknet.sknets import CAFFE_INPUT, default_cfgs, model_cfgs
from timm_sknet.sknets import weights as known_weights

HUB_NAME = re.compile(r'(?:hf[-_]hub:)?([\w-]+/[\w.-]+)(?:@([\w./-]+))?')
SUFFIXES = '.caffemodel', '.safetensors', '.pth', '.pt', '.tar', '.bin'
PREPROCESSING = 'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'
# The fields of `PretrainedCfg` that are taken from a source. Others, such as layer names, belong to its own network.
DESCRIPTION = *PREPROCESSING, 'tag', 'license', 'label_names', 'description', 'origin_url'
ARCHITECTURE = {f.name for f in fields(SKNetCfg)}
MODEL_ARGS = ARCHITECTURE | {'output_stride', 'global_pool'}
TRAINING_ARGS = {'drop_rate', 'drop_path_rate', 'drop_block_rate', 'zero_init_last', 'memory_efficient'}
TRAINING_ARGS.update({'num_classes', 'in_chans'})  # these are read from the tensors
# The arguments of train.py that describe the model and its input.
TRAIN_ARGS = {'model', 'model_kwargs', 'bn_momentum', 'bn_eps', 'gp', 'eval_metric', 'img_size', 'in_chans'}
TRAIN_ARGS.update(PREPROCESSING)
# The names that the pickle of a checkpoint may contain. torch.load allows more, and some of these can use any amount of
# memory.
PICKLED = re.compile(
    r'collections (OrderedDict|Counter)|argparse Namespace|torch\._utils _rebuild_(tensor(_v[23])?|parameter)|'
    r'torch(\.cuda|\.storage)? \w+Storage|torch (Size|device|bool|[a-z]+\d\w*)'
)
# In bytes. Parsed, they take up to 80 times as much memory. A model with 8,000 tensors needs half of each limit.
LONGEST_PICKLE = 2**21
LONGEST_HEADER = 2**20


@dataclass(frozen=True)
class Source:
    """Weights as read from a file, before their tensors are renamed.

    Attributes:
        what: Description of the source, for messages and the model card.
        path: The file with the weights.
        tensors: The tensors by their names in the file.
        kind: Whether the names are layers of a Caffe network or the keys of a state dict.
        arch: The model that the source states; empty if it states none, or a model of another package.
        model_args: The model arguments that the source states.
        cfg: The fields of timm's `PretrainedCfg` that the source states.
        tag: Tag of the weights in `timm_sknet.sknets.weights`; empty if they are not listed there.
        measured: The accuracy that the source states, as text.
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
    """Reads weights. The type of the source is detected from its content.

    Args:
        source: A file, or the name of a repository on the Hub; see `timm_sknet.checkpoints.convert.convert`.
        arch: The model that the weights are expected to fit.
        ema: Use the averaged (EMA) weights of a checkpoint if it contains them.

    Raises:
        ValueError: If the source is not supported or corrupted.
        OSError: If the file cannot be read.
    """
    path = Path(source)
    match = HUB_NAME.fullmatch(source)
    if match and not path.exists() and path.suffix not in SUFFIXES:
        return _read_repository(match[1], match[2])
    if path.is_dir():
        raise ValueError('this is a folder. Pass the path of the weights file in it.')
    with path.open('rb') as file:
        start = file.read(256)
    if not start:
        raise ValueError('the file is empty.')
    if start[8:9] == b'{':
        weights = _describe(_load_safetensors(path), path)
        config = path.with_name('config.json')
        return _with_config(weights, config) if path.name == 'model.safetensors' and config.is_file() else weights
    if start.startswith((b'PK', b'\x80')):
        return _read_checkpoint(path, arch, ema)
    if start.isascii() and start.decode().replace('\n', '').replace('\r', '').replace('\t', '').isprintable():
        raise ValueError(
            'this is a text file, perhaps a prototxt or a web page. Caffe weights are in a .caffemodel file.'
        )
    return _read_caffe(path, arch)


def shapes(arch: str, most: float = math.inf, /, **args: Any) -> Dict[str, torch.Size]:
    """Returns the shape of each tensor of a model's state dict.

    Args:
        arch: Name of the model.
        most: The largest number of tensors. A model with more is not created, because it could use too much memory.
        args: Arguments of `SKNet`. Arguments of `timm.create_model` are not accepted: they could load files.

    Raises:
        ValueError: If the model cannot be created with these arguments.
    """
    args = {key: value for key, value in args.items() if value is not None}  # timm ignores None, too
    try:
        cfg = model_cfgs[arch].override(**{k: v for k, v in args.items() if k in ARCHITECTURE})
        if sum(map(abs, cfg.depths)) * len(cfg.branches) > most:
            raise ValueError(f'it would have more than {most} tensors')
        state = SKNet(model_cfgs[arch], device='meta', **args).state_dict()
    except Exception as e:  # the arguments come from a file and can have any type
        raise ValueError(f'{arch} cannot be created with the arguments {args} ({e}).') from e
    return {key: value.shape for key, value in state.items()}


def to_state_dict(source: Source, arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Renames the tensors of a source to the keys of a model, and checks names and shapes.

    Args:
        source: The weights, as `read` returns them.
        arch: Name of the model.

    Returns:
        The state dict, and the arguments with which the model must be created to load it.

    Raises:
        ValueError: If the tensors do not fit the model. The message names a model that they fit, if there is one.
    """
    try:
        return _rename_and_check(source, arch)
    except ValueError as e:
        name = _matching_arch(source)
        hint = f' It looks like {name}: use --arch {name}.' if name else ''
        raise ValueError(f'{source.what}. The weights do not match {arch}: {e}{hint}') from e


def _matching_arch(source: Source) -> str:
    """Returns the name of the first model that a source fits; empty if it fits none."""
    caffe = source.kind == 'caffe'
    for name in sorted(model_cfgs, key=lambda name: name.endswith('_caffe') != caffe):
        if name.endswith('_caffe') and not (caffe or source.arch):
            continue  # the tensors of a state dict do not show which stem pool the network has
        with suppress(ValueError):
            _rename_and_check(source, name)
            return name
    return ''


def _rename_and_check(source: Source, arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Does the work of `to_state_dict` for one model."""
    caffe, cfg, args = source.kind == 'caffe', model_cfgs[arch], dict(source.model_args)
    state = dict(rename_blobs(source.tensors) if caffe else native_keys(clean_state_dict(dict(source.tensors))))
    if len(state) < len(source.tensors):
        raise ValueError(f'{CORRUPTED_OR_OTHER}: two of its tensors have the same name.')
    if is_folded(state):
        raise ValueError(
            'weights of a folded (reparameterized) model are not supported. Convert the weights from before folding.'
        )
    stem, bias = state.get('stem.conv.weight'), state.get('head.fc.bias')
    classes = int('head.fc.weight' in state) if bias is None else bias.numel()  # a missing bias is an error below
    if caffe and cfg.stem_pool != 'ceil':
        args['stem_pool'] = 'ceil'
    elif not caffe and stem is not None and stem.ndim == 4 and stem.shape[1] != 3:
        args['in_chans'] = stem.shape[1]

    expected = shapes(arch, len(state), num_classes=classes, **args)
    state = {key: torch.tensor(0) for key in expected if key.endswith('num_batches_tracked')} | state
    for problem, names in ('missing', expected.keys() - state.keys()), ('unexpected', state.keys() - expected.keys()):
        if names:
            raise ValueError(f'{problem} tensors: {list_names(names)}.')
    if caffe:
        units = [f'stages.{stage}.0.sk.attn.bn.weight' for stage in range(len(cfg.depths))]
        widths = [state[key].numel() for key in units]
        if widths != [expected[key].numel() for key in units]:
            args['attn_widths'] = widths
            expected = shapes(arch, len(state), num_classes=classes, **args)
    for key, shape in expected.items():
        if caffe and _without_ones(state[key].shape) == _without_ones(shape):
            state[key] = state[key].reshape(shape)  # Caffe pads shapes with ones, at either end
        if state[key].shape != shape:
            raise ValueError(f'{key} has the shape {tuple(state[key].shape)}, expected {tuple(shape)}.')
    if caffe:
        state['stem.conv.weight'] = state['stem.conv.weight'].flip(1)  # from BGR to RGB
    # the shapes of the tensors are the same in these cases
    if caffe and f'{arch}_caffe' in model_cfgs:
        raise ValueError(f'{arch} has a stem pool with padding, but a Caffe network has one without padding.')
    if source.arch not in ('', arch):
        raise ValueError(f'the weights were saved for {source.arch}.')
    return state, args


def _without_ones(shape: Sequence[int]) -> List[int]:
    return [n for n in shape if n != 1]


def _read_caffe(path: Path, arch: str) -> Source:
    largest = max(math.prod(shape) for name in {arch, 'sknet101'} & set(model_cfgs) for shape in shapes(name).values())
    blobs = read_caffemodel(path, largest)
    return Source("a .caffemodel by the paper's authors", path, blobs, 'caffe', cfg=CAFFE_INPUT, tag='authors_in1k')


def list_names(names: Collection[str], most: int = 3) -> str:
    """Returns the first names as text: 'a', 'a and b', or 'a, b, c and 9 more'."""
    shown = sorted(names)[:most]
    if len(names) > most:
        shown.append(f'{len(names) - most} more')
    *others, last = shown
    return f'{", ".join(others)} and {last}' if others else last


def _read_repository(repo: str, revision: Optional[str]) -> Source:
    try:
        path = Path(hf_hub_download(repo, 'model.safetensors', revision=revision))
        config = Path(hf_hub_download(repo, 'config.json', revision=revision))
    except (ValueError, OSError) as e:  # the errors of huggingface_hub are OSErrors
        raise ValueError(f'no such file, and no such model can be downloaded from the Hub ({e}).') from e
    source = _with_config(_describe(_load_safetensors(path), path), config)
    tag = next((name.split('.')[1] for name, known in known_weights.items() if known.cfg.get('hf_hub_id') == repo), '')
    return replace(source, what=f'{repo} on the Hugging Face Hub', tag=tag)


def _with_config(source: Source, config: Path) -> Source:
    """Returns the source with the description in its config.json."""
    arch, model_args, cfg = _read_config(config)
    return replace(source, arch=arch, model_args=model_args, cfg=cfg)


def _read_config(path: Path) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Reads a config.json of timm.

    Returns:
        The name of the model, empty if it is not of this package; its arguments; and fields of its `PretrainedCfg`.
    """
    try:
        config = json.loads(path.read_bytes())
        arch = next((name for name in model_cfgs if name == config.get('architecture')), '')
        cfg = {k: v for k, v in config['pretrained_cfg'].items() if k in DESCRIPTION and v is not None}
        if config.get('label_names') is not None:  # timm writes them here, and prefers these when it reads
            cfg['label_names'] = config['label_names']
        return arch, _model_args(config.get('model_args') or {}), cfg
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f'{path} is not a config.json of timm ({e!r}).') from e


def _model_args(given: Dict[str, Any]) -> Dict[str, Any]:
    """Returns the arguments that change the network, without those for training.

    Raises:
        ValueError: For arguments that `SKNet` does not have.
    """
    unknown = given.keys() - MODEL_ARGS - TRAINING_ARGS
    if unknown:
        raise ValueError(f'it has model arguments that SKNet does not have: {list_names(unknown)}.')
    return {key: value for key, value in given.items() if key not in TRAINING_ARGS}


def _find_config(model: str, arch: str) -> Tuple[str, Dict[str, Any], Dict[str, Any]]:
    """Returns what `_read_config` returns, for the model name that was passed to train.py."""
    if model.startswith('local-dir:'):
        return _read_config(Path(model.removeprefix('local-dir:')) / 'config.json')
    match = HUB_NAME.fullmatch(model)
    if match:
        return _read_config(Path(hf_hub_download(match[1], 'config.json', revision=match[2])))
    variant, _, tag = model.partition('.')
    cfgs = default_cfgs.get(variant, default_cfgs[arch])
    cfg = cfgs.cfgs.get(tag, cfgs.default).to_dict()
    return variant if variant in model_cfgs else '', {}, {key: cfg[key] for key in PREPROCESSING}


def _load_safetensors(path: Path) -> Dict[str, Tensor]:
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if length > LONGEST_HEADER:
        raise ValueError(
            f'{CORRUPTED_OR_OTHER}: the header of the safetensors file has {length:,} bytes, expected at most '
            f'{LONGEST_HEADER:,}.'
        )
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f'not a safetensors file, or the file is truncated or corrupted ({e}).') from e


def _read_checkpoint(path: Path, arch: str, ema: bool) -> Source:
    checkpoint = _unpickle(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f'not a checkpoint: expected a dict, got a {type(checkpoint).__name__}.')
    checkpoint = _without_attributes(checkpoint)
    averaged = ema and isinstance(checkpoint.get('state_dict_ema'), dict)
    state = checkpoint.get('state_dict_ema' if averaged else 'state_dict', checkpoint)
    if not isinstance(checkpoint.get('args'), argparse.Namespace):
        return _describe(state, path)

    try:
        args = _only_json({k: v for k, v in vars(checkpoint['args']).items() if k in TRAIN_ARGS})
        metric, epoch = _only_json([checkpoint.get('metric'), checkpoint.get('epoch')])
        own_arch, model_args, cfg = _find_config(args.get('model', ''), arch)
        model_args |= _model_args(args.get('model_kwargs') or {})
        given = {'bn_momentum': args.get('bn_momentum'), 'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp')}
        model_args |= {k: v for k, v in given.items() if v is not None}
        cfg = resolve_data_config(args, cfg)
    except Exception as e:  # the arguments come from a file and can have any type
        raise ValueError(f"the arguments in the checkpoint are not valid for timm's train.py ({e!r}).") from e
    measured = ''
    if metric is not None and (averaged or 'state_dict_ema' not in checkpoint):  # measured with the averaged weights
        measured = f'{args.get("eval_metric")} {metric} in epoch {epoch}'
    what = "a checkpoint of timm's train.py"
    if 'state_dict_ema' in checkpoint:
        what += ' (averaged weights)' if averaged else ' (not the averaged weights)'
    tensors = _describe(state, path).tensors
    return Source(what, path, tensors, arch=own_arch, model_args=model_args, cfg=cfg, measured=measured)


def _unpickle(path: Path) -> Any:
    """Loads a PyTorch checkpoint. It may contain tensors, dicts, lists, text and numbers only.

    Raises:
        ValueError: If it contains anything else, or is not a valid checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action='ignore'):
            zipped = zipfile.is_zipfile(path)
            if zipped:
                with zipfile.ZipFile(path) as archive:
                    if any(entry.compress_type for entry in archive.infolist()):
                        raise Refused('the checkpoint is compressed, which is not supported. Save it with torch.save.')
                    if damaged := archive.testzip():  # torch does not verify checksums
                        raise Refused(f'the file is corrupted: the checksum of {damaged} in it is wrong.')
                    for entry in archive.infolist():
                        if entry.filename.lower().endswith('data.pkl'):  # torch finds it by this name
                            _check_pickle(archive.open(entry))
            else:
                with path.open('rb') as file:
                    for _ in range(5):  # magic number, version, system, content, storage keys
                        _check_pickle(file)
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except Refused:
        raise
    except pickle.UnpicklingError as e:  # its message explains how to run the code in the file, so it is not shown
        raise ValueError('not a PyTorch checkpoint, or the file is corrupted (cannot unpickle it).') from e
    except Exception as e:  # torch raises many types for invalid files
        raise ValueError(f'not a PyTorch checkpoint, or the file is corrupted ({e}).') from e


class Refused(ValueError):
    """A checkpoint that is not loaded for a known reason. Its message is shown unchanged."""


def _check_pickle(file: IO[bytes]) -> None:
    """Reads through one pickle without running it.

    Raises:
        Refused: If it is too long, or names anything that tensors, dicts, lists, text and numbers do not need.
    """
    for code, value, position in pickletools.genops(file):
        if code.name in ('GLOBAL', 'INST') and not PICKLED.fullmatch(str(value)):
            name = str(value).replace(' ', '.')
            raise Refused(
                f'refused, because it contains {name}, which could run code or use too much memory. Save only the '
                'weights, with torch.save(model.state_dict(), FILE).'
            )
        if (position or 0) > LONGEST_PICKLE:
            raise Refused(
                f'refused, because it contains more than {LONGEST_PICKLE:,} bytes besides the weights. Save only the '
                'weights, with torch.save(model.state_dict(), FILE).'
            )


def _only_json(value: Any) -> Any:
    """Returns a copy of a value that JSON can represent. The length is limited: a pickle can contain endless values."""
    return json.loads(''.join(itertools.islice(json.JSONEncoder().iterencode(value), 1000)))


def _without_attributes(mapping: Dict) -> Dict:
    """Returns a plain dict. A pickle can give an OrderedDict attributes that replace its methods."""
    return dict(dict.items(mapping))


def _describe(state: Any, path: Path) -> Source:
    """Checks that this is a state dict and detects the network from its keys.

    Raises:
        ValueError: If it is not a state dict, or larger than the file.
    """
    if not isinstance(state, dict):
        raise ValueError(f'not a state dict: expected a dict, got a {type(state).__name__}.')
    if not all(isinstance(key, str) for key in state):
        raise ValueError('not a state dict: some of its keys are not text.')
    state = _without_attributes(state)
    others = {key for key, value in state.items() if not isinstance(value, Tensor) or value.is_meta}
    if others:
        raise ValueError(f'not a state dict: the values of {list_names([*map(repr, others)])} are not tensors.')
    if sum(value.numel() * value.itemsize for value in state.values()) > path.stat().st_size:
        raise ValueError('the file is corrupted: its tensors are larger than the file.')  # possible with strides of 0
    what, tag, cfg = 'a state dict', '', {}
    origin = detect_origin(state)
    if origin == PYTORCH_KEY_PART:
        what, tag = "a checkpoint of the authors' PyTorch variant", 'authors_in1k'
    elif origin == TIMM_KEY_PART:
        what = "weights of timm's skresnext50_32x4d"
        cfg = {key: value for key, value in known_weights['sknet50.ra_in1k'].cfg.items() if key in PREPROCESSING}
    return Source(what, path, state, cfg=cfg, tag=tag)
