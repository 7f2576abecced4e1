"""Reads weights of any supported source, and renames them to the keys of a model of this package."""

import argparse
import itertools
import json
import logging
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Dict, List, Literal, Mapping, Optional, Sequence, Tuple

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor

from timm_sknet.checkpoints import diagnosis
from timm_sknet.checkpoints.caffe import CORRUPTED_OR_OTHER, read_caffemodel
from timm_sknet.checkpoints.diagnosis import SAVE_ALONE, list_names
from timm_sknet.checkpoints.tensorflow import find_prefix, read_checkpoint
from timm_sknet.folding import is_folded
from timm_sknet.keys import PYTORCH, SIMCLR, TIMM, detect_origin, native_keys, rename_blobs, rename_variables
from timm_sknet.loading import HUB_FILES, download_first, is_truncated
from timm_sknet.network import SKNet, SKNetCfg
from timm_sknet.sknets import CAFFE_INPUT, SIMCLR_STEPS, default_cfgs, model_cfgs
from timm_sknet.sknets import weights as known_weights

_logger = logging.getLogger(__name__)
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
# Checkpoints keep the weights under one of these names, and their average (EMA) under the same name with '_ema'.
STATE_DICTS = 'state_dict', 'model', 'model_state_dict', 'net', 'resnet'  # 'resnet': SimCLRv2 on the Hub
PREFIXES = 'module.', '_orig_mod.', 'model.', 'net.'  # of DataParallel, torch.compile and Lightning
PLAIN, CAFFE = 'a state dict', 'a .caffemodel'
# For each other layout of the weights: the tag of the public weights in it, and what a file in it is.
ORIGINS = {
    CAFFE: ('authors_in1k', "a .caffemodel by the paper's authors"),
    PYTORCH: ('authors_in1k', "a checkpoint of the authors' PyTorch variant"),
    TIMM: ('ra_in1k', "weights of timm's {}"),
    SIMCLR: ('linear_in1k', 'weights of SimCLRv2 in PyTorch'),
}
# Tags of SimCLRv2's weights by training step, and the steps of weights that were fine-tuned with a part of the labels.
STEPS = {step: tag for tag, step in SIMCLR_STEPS.items()}
PERCENT_OF_LABELS = {751: 1, 3754: 10}
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
        source: A file or folder, or the name of a repository on the Hub; see `timm_sknet.checkpoints.convert.convert`.
        arch: The model that the weights are expected to fit.
        ema: Use the averaged (EMA) weights of a checkpoint if it contains them.

    Raises:
        ValueError: If the source is not supported or corrupted.
        OSError: If the file cannot be read.
    """
    path = Path(source)
    if prefix := find_prefix(path):
        return _read_tensorflow(prefix)
    match = HUB_NAME.fullmatch(source)
    if match and not path.exists() and path.suffix not in SUFFIXES:
        return _read_repository(match[1], match[2], arch, ema)
    if path.is_dir():
        raise ValueError('this is a folder. Pass the path of the weights file in it.')
    with path.open('rb') as file:
        start = file.read(256)
    if not start:
        raise ValueError('the file is empty.')
    if other := diagnosis.text_file(start) or diagnosis.binary_file(start):
        raise ValueError(other)
    if path.suffix == '.pb':
        raise ValueError(
            'this is a TensorFlow graph. Pass the checkpoint, such as variables/variables of a SavedModel.'
        )
    if start[8:9] == b'{':
        weights = _describe(_load_safetensors(path), path)
        config = path.with_name('config.json')
        return _with_config(weights, config) if path.name == 'model.safetensors' and config.is_file() else weights
    if start.startswith((b'PK', b'\x80')):
        return _read_checkpoint(path, arch, ema)
    return _read_caffe(path, arch)


def shapes(arch: str, most: float = math.inf, /, **args: Any) -> Dict[str, torch.Size]:
    """Returns the shape of each tensor of a model's state dict.

    Args:
        arch: Name of the model.
        most: The largest number of tensors. If `args` ask for more, the model is not created, because it could use too
            much memory.
        args: Arguments of `SKNet`. Arguments of `timm.create_model` are not accepted: they could load files.

    Raises:
        ValueError: If the model cannot be created with these arguments.
    """
    args = {key: value for key, value in args.items() if value is not None}  # timm ignores None, too
    try:
        cfg = model_cfgs[arch].override(**{k: v for k, v in args.items() if k in ARCHITECTURE})
        if args.keys() & {'depths', 'branches'} and sum(map(abs, cfg.depths)) * len(cfg.branches) > most:
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
        if name:
            hint = f'It looks like {name}: use --arch {name}.'
        else:
            hint = _matching_part(source) or diagnosis.weights(source.what, source.tensors, _renamed(source))
        raise ValueError(f'The weights ({source.what}) do not match {arch}: {e} {hint}'.rstrip()) from e


def name_origin(source: Source, arch: str, args: Mapping[str, Any]) -> Source:
    """Returns the source with a description of its origin, if the layout of its tensors shows it.

    Args:
        source: The weights.
        arch: The model that they fit.
        args: The arguments of the model, as `to_state_dict` returns them.
    """
    layout = detect_origin(source.tensors) if source.what == PLAIN else source.what
    tag, what = ORIGINS.get(layout or '', ('', ''))
    known = known_weights.get(f'{arch}.{tag}')
    if not known or args.keys() - {'in_chans'}:  # only the layout is of that origin, the network is another
        return source
    name = known.cfg.get('hf_hub_id', '').partition('/')[2].partition('.')[0]
    return replace(source, what=what.format(name), tag=tag if known.file_url else '')  # others use the layout, too


def _matching_part(source: Source) -> str:
    """Says which model the tensors fit that have the most common first part in their names; '' if they fit none."""
    parts = Counter(key.partition('.')[0] for key in source.tensors)
    prefix = f'{max(parts, key=lambda part: parts[part], default="")}.'
    part = {key.removeprefix(prefix): value for key, value in source.tensors.items() if key.startswith(prefix)}
    name = _matching_arch(replace(source, tensors=_without_prefix(part)))
    if not name:
        return ''
    return (
        f'The tensors under {prefix} look like {name}. Save them alone, without this prefix: '
        f'{{key.removeprefix({prefix!r}): value for key, value in state_dict.items() if key.startswith({prefix!r})}}.'
    )


def _matching_arch(source: Source) -> str:
    """Returns the name of the first model that a source fits; empty if it fits none."""
    caffe = source.kind == 'caffe'
    units = len({tuple(key.split('.')[:3]) for key in _renamed(source) if key.startswith('stages.')})
    for name in sorted(model_cfgs, key=lambda name: name.endswith('_caffe') != caffe):
        if name.endswith('_caffe') and not (caffe or source.arch):
            continue  # the tensors of a state dict do not show which stem pool the network has
        if 'depths' not in source.model_args and sum(model_cfgs[name].depths) != units:
            continue  # saves time
        with suppress(ValueError):
            _rename_and_check(source, name)
            return name
    return ''


def _renamed(source: Source) -> Dict[str, Tensor]:
    return dict(rename_blobs(source.tensors) if source.kind == 'caffe' else native_keys(source.tensors))


def _rename_and_check(source: Source, arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """Does the work of `to_state_dict` for one model."""
    caffe, cfg, args = source.kind == 'caffe', model_cfgs[arch], dict(source.model_args)
    state = _renamed(source)
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
    own = f'{len(state.keys() & expected.keys())} of its {len(state)} tensors are known'
    if state.keys() != source.tensors.keys():
        own += ' (under the names of this package)'
    state = {key: torch.tensor(0) for key in expected if key.endswith('num_batches_tracked')} | state
    names = {'missing': expected.keys() - state.keys(), 'unexpected': state.keys() - expected.keys()}
    problems = [f'{problem} tensors: {list_names(found)}' for problem, found in names.items() if found]
    if problems:
        raise ValueError(f'{own}; {"; ".join(problems)}.')
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
    return Source(CAFFE, path, blobs, 'caffe', cfg=CAFFE_INPUT)


def _read_tensorflow(prefix: Path) -> Source:
    variables, step = read_checkpoint(prefix)
    if step in PERCENT_OF_LABELS:
        raise ValueError(
            f'weights of SimCLRv2 that were fine-tuned with {PERCENT_OF_LABELS[step]} % of the labels (global_step is '
            f'{step}) are not supported, because they have a hidden layer before the classifier. Use the weights '
            'finetuned_100pct, supervised or pretrained.'
        )
    convolutions = sum(name.startswith('base_model/conv2d') for name in variables)
    expected = {7 + 5 * sum(cfg.depths): cfg.depths for cfg in model_cfgs.values() if cfg.shortcut_pool}
    if convolutions not in expected:
        raise ValueError(
            f'the checkpoint has {convolutions} convolutions, expected {list_names([*map(str, expected)])} as in the '
            'networks of SimCLRv2 with SK. Those without SK (sk0) are not supported.'
        )
    if step not in STEPS:
        _logger.warning(
            f'{prefix}: global_step is {step}, which is not the step of a published checkpoint of SimCLRv2. The '
            'classifier is taken as a classifier of the pooled features.'
        )
    tensors = rename_variables(variables, expected[convolutions])
    return Source('a TensorFlow checkpoint of SimCLRv2', Path(f'{prefix}.index'), tensors, tag=STEPS.get(step or 0, ''))


def _read_repository(repo: str, revision: Optional[str], arch: str, ema: bool) -> Source:
    listed = [(name, known.cfg) for name, known in known_weights.items() if known.cfg.get('hf_hub_id') == repo]
    name, known = listed[0] if listed else ('', {})
    model, _, tag = name.partition('.')
    config = None
    bare = known.get('hf_hub_filename', '').endswith('.pth')  # SimCLRv2: no config.json
    try:
        path = Path(download_first(repo, [known['hf_hub_filename']] if bare else HUB_FILES, revision))
        if not bare:
            config = Path(hf_hub_download(repo, 'config.json', revision=revision))
    except (ValueError, OSError) as e:  # the errors of huggingface_hub are OSErrors
        raise ValueError(
            f'this file does not exist, and no repository of this name on the Hub can be read ({e}). A '
            'repository needs config.json and model.safetensors or pytorch_model.bin.'
        ) from e
    pickled = path.suffix != '.safetensors'
    source = _read_checkpoint(path, arch, ema) if pickled else _describe(_load_safetensors(path), path)
    if config:
        source = _with_config(source, config)
    else:
        source = replace(source, arch=model, cfg={key: value for key, value in known.items() if key in DESCRIPTION})
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
    name = _find_state_dict(checkpoint, ema)
    source = _describe(checkpoint.get(name, checkpoint), path)
    averaged = name.endswith('_ema')
    if not (name.startswith('state_dict') and isinstance(checkpoint.get('args'), argparse.Namespace)):
        return replace(source, what=diagnosis.trainer(checkpoint) or PLAIN)

    try:
        args = _only_json({k: v for k, v in vars(checkpoint['args']).items() if k in TRAIN_ARGS})
        metric, epoch = _only_json([checkpoint.get('metric'), checkpoint.get('epoch')])
        own_arch, model_args, cfg = _find_config(args.get('model', ''), arch)
        model_args |= _model_args(args.get('model_kwargs') or {})
        given = {'bn_momentum': args.get('bn_momentum'), 'bn_eps': args.get('bn_eps'), 'global_pool': args.get('gp')}
        model_args |= {k: v for k, v in given.items() if v is not None}
        cfg = resolve_data_config(args, cfg)
    except OSError as e:
        raise ValueError(
            f'the checkpoint was trained from {args["model"]}, whose config.json cannot be read ({e}). Restore it, or '
            'save the weights alone: torch.save(checkpoint["state_dict"], FILE).'
        ) from e
    except Exception as e:  # the arguments come from a file and can have any type
        raise ValueError(f"the arguments in the checkpoint are not valid for timm's train.py ({e!r}).") from e
    measured = ''
    if metric is not None and (averaged or 'state_dict_ema' not in checkpoint):  # measured with the averaged weights
        measured = f'{args.get("eval_metric")} {metric} in epoch {epoch}'
    what = "a checkpoint of timm's train.py"
    if 'state_dict_ema' in checkpoint:
        what += ' (averaged weights)' if averaged else ' (not the averaged weights)'
    return replace(source, what=what, arch=own_arch, model_args=model_args, cfg=cfg, measured=measured)


def _find_state_dict(checkpoint: Dict, ema: bool) -> str:
    """Returns the name of the state dict in a checkpoint; '' if there is none, or if the checkpoint is a state dict.

    Raises:
        ValueError: If there are several state dicts.
    """
    found = {
        name
        for name, value in checkpoint.items()
        if isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in dict.values(value))
    }
    names = [f'{name}_ema' if ema and f'{name}_ema' in found else name for name in STATE_DICTS]
    names = [name for name in names if name in found]
    if len(names) > 1:
        raise ValueError(f'it contains several state dicts: {list_names(names)}. Save one of them alone, in a file.')
    return names[0] if names else ''


def _unpickle(path: Path) -> Any:
    """Loads a PyTorch checkpoint. It may contain tensors, dicts, lists, text and numbers only.

    Raises:
        ValueError: If it contains anything else, or is not a valid checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            zipped = zipfile.is_zipfile(path)
            if zipped:
                with zipfile.ZipFile(path) as archive:
                    if other := diagnosis.archive(archive.namelist()):
                        raise Refused(other)
                    if any(entry.compress_type for entry in archive.infolist()):
                        raise Refused('the checkpoint is compressed, which is not supported. Save it with torch.save.')
                    if damaged := archive.testzip():  # torch does not verify checksums
                        raise Refused(f'the file is corrupted: the checksum of {damaged} in it is wrong.')
                    for entry in archive.infolist():
                        if entry.filename.lower().endswith('data.pkl'):  # torch finds it by this name
                            _check_pickle(archive.open(entry))
            elif is_truncated(path):
                raise Refused('the file is truncated. Download or copy it again.')
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
                f'refused, because it contains {name}. Only tensors, dicts, lists, text and numbers are loaded, '
                f'because other objects could run code or use too much memory. {SAVE_ALONE}'
            )
        if code.name == 'PROTO' and value in (4, 5):
            raise Refused(
                f'refused, because its pickle has the protocol {value}. Expected 2, the '
                f'default of torch.save. {SAVE_ALONE}'
            )
        if (position or 0) > LONGEST_PICKLE:
            raise Refused(
                f'refused, because it contains more than {LONGEST_PICKLE:,} bytes besides the weights. {SAVE_ALONE}'
            )


def _only_json(value: Any) -> Any:
    """Returns a copy of a value that JSON can represent. The length is limited: a pickle can contain endless values."""
    return json.loads(''.join(itertools.islice(json.JSONEncoder().iterencode(value), 1000)))


def _without_attributes(mapping: Dict) -> Dict:
    """Returns a plain dict. A pickle can give an OrderedDict attributes that replace its methods."""
    return dict(dict.items(mapping))


def _describe(state: Any, path: Path) -> Source:
    """Checks that this is a state dict, and removes the prefixes of wrappers from its keys.

    Raises:
        ValueError: If it is not a state dict, or larger than the file.
    """
    if not isinstance(state, dict):
        raise ValueError(f'not a state dict: expected a dict, got a {type(state).__name__}.')
    if not all(isinstance(key, str) for key in state):
        raise ValueError('not a state dict: some of its keys are not text.')
    state = _without_attributes(state)
    if not state:
        raise ValueError('not a state dict: it is empty.')
    others = {key for key, value in state.items() if not isinstance(value, Tensor) or value.is_meta}
    if others:
        raise ValueError(
            f'not a state dict: the values of {list_names([*map(repr, others)])} are not tensors. Expected tensors by '
            f'their names, in the file itself or in it under {", ".join(STATE_DICTS)}.'
        )
    if sum(value.numel() * value.itemsize for value in state.values()) > path.stat().st_size:
        raise ValueError('the file is corrupted: its tensors are larger than the file.')  # possible with strides of 0
    return Source(PLAIN, path, _without_prefix(state))


def _without_prefix(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Removes the prefixes of wrappers that all keys have, unless the keys fit another implementation with them."""
    state.pop('n_averaged', None)  # torch.optim.swa_utils.AveragedModel adds it
    for _ in PREFIXES:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), '')
        if not prefix or detect_origin(state):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
