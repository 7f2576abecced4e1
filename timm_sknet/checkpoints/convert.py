"""Writes weights as a folder in the layout of timm's models on the Hub: the work behind `timm-sknet convert`."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from timm_sknet.checkpoints.card import UNSTATED, model_card
from timm_sknet.checkpoints.reading import DESCRIPTION, Source, fit, likely_arch, read
from timm_sknet.predict import label_names as ordered_names
from timm_sknet.sknets import default_cfgs, model_cfgs

CONFIG, WEIGHTS, CARD = FILES = 'config.json', 'model.safetensors', 'README.md'
STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'
DTYPES = {'float32': torch.float32, 'float16': torch.float16}
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8


def convert(
    source: str,
    out: Path,
    arch: str,
    ema: bool = True,
    dtype: str = 'float32',
    num_classes: Optional[int] = None,
    tag: str = '',
    license: str = '',
    label_names: Optional[Path] = None,
    force: bool = False,
) -> None:
    """Writes a folder that timm, its scripts and transformers load: config.json, model.safetensors and README.md.

    Args:
        source: A `.caffemodel` or `.pth.tar` of the paper's authors, weights of timm's `skresnext50_32x4d` or of our
            models, a checkpoint of timm's train.py, or the name of a repository on the Hub that holds one of them.
        out: The folder. It is written when everything is checked, or not at all.
        arch: Name of the model.
        ema: Take the averaged weights of a checkpoint that has them.
        dtype: 'float32' or 'float16'; the statistics of batch norm layers are float32 in any case.
        num_classes: Number of classes that the source must have, or 0 to leave its classifier out.
        tag: Tag of the weights, in place of the source's own.
        license: Licence of the weights as the caller claims it, in place of the one that the source states.
        label_names: A file with the name of each class on a line of its own.
        force: Replace a folder that an earlier conversion has written.

    Raises:
        ValueError: For a source that is no such thing or not of that model, and for arguments that do not fit it.
        OSError: Where a file cannot be read or written.
    """
    if not re.fullmatch(r'[\w-]*', tag):
        raise ValueError(f'A tag is made of letters, digits, _ and -, got {tag!r}.')
    if license in ('none', UNSTATED) or not re.fullmatch(r'[a-z0-9.-]*', license):
        raise ValueError(f"A licence is one of the Hub's names, such as mit, apache-2.0 or other, got {license!r}.")
    if arch not in model_cfgs:
        raise ValueError(f'No model {arch!r} here. Choose one of {", ".join(model_cfgs)}.')
    out = Path(os.path.abspath(out))
    _check_target(out, force)
    names = _read_names(label_names) if label_names else None
    try:
        weights = read(source, arch, ema)
        state, args = _fit(weights, arch)
        weights = replace(weights, tensors={})  # for the sake of memory
        state = _checked(state, DTYPES[dtype])
        state = _cut(state, num_classes)
    except ValueError as e:
        raise ValueError(f'{source}: {_line(e)}') from e

    classes = _classes(state)
    if weights.tag and classes != default_cfgs[arch].default.num_classes:
        weights = replace(weights, tag='')  # the weights of that name have another classifier
    try:
        cfg = _pretrained_cfg(weights, arch, classes, state['stem.conv.weight'].shape[1], tag, license)
        own_names = cfg.pop('label_names', None)
    except Exception as e:  # what a source says of itself can be anything
        raise ValueError(f'{source}: what it says of its input or classes is nothing that timm knows ({e!r}).') from e
    if names is None:
        try:
            names = _class_names(own_names, classes)
        except ValueError as e:
            raise ValueError(f'{source}: {e} Correct its config.json, or name the classes with --label-names.') from e
    elif len(names) != classes:
        raise ValueError(f'{label_names} must have {classes} lines, one for each class, got {len(names)}.')
    # no num_classes in model_args: transformers would hand it over twice
    config = dict(architecture=arch, num_classes=classes, label_names=names, model_args=args, pretrained_cfg=cfg)

    parent = out.parent
    while not parent.exists():  # the others are made when all is well
        parent = parent.parent
    folder = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=parent))
    try:
        folder.chmod(0o755)
        save_file(state, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors keeps what it writes to its owner
        parameters = sum(value.numel() for key, value in state.items() if not key.endswith(STATISTICS))
        del state  # for the sake of memory
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2) + '\n')
        (folder / CARD).write_text(model_card(config, weights, parameters, dtype, claimed=bool(license)))
        try:
            load(folder)
        except ValueError as e:
            raise ValueError(f'{source}: {str(e).replace(str(folder), "the result")}') from e
        if force and out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path) -> nn.Module:
    """Returns the model in a folder, in eval mode, after it has classified an image.

    Raises:
        ValueError: Where it cannot be loaded, or gives no finite numbers.
    """
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        config = resolve_data_config(model=model)
        channels, *size = config['input_size']
        config['input_size'] = (channels, *(min(n, 512) for n in size))  # more could take any memory
        image = torch.rand(config['input_size'])
        if channels in (1, 3):
            transform = create_transform(**config)
            image = transform(Image.new('RGB' if channels == 3 else 'L', (256, 256), 'gray'))
        with torch.inference_mode():
            out = model(image[None])
    except Exception as e:  # timm raises whatever it meets in files of others
        raise ValueError(f'{folder} holds no model that timm loads and runs: {_line(e)}') from e
    if not out.isfinite().all():
        raise ValueError(f'{folder} holds a model that gives NaN or infinite numbers.')
    return model


def _line(error: Exception, most: int = 500) -> str:
    """Returns an error's text, which can have names of a file in it, in one line of a length that can be read."""
    text = ' '.join(str(error).split())
    return ''.join(c if c.isprintable() else '?' for c in text[:most]) + '...' * (len(text) > most)


def _check_target(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise ValueError(f'{out} exists. Choose another folder, or replace it with --force.')
    if out.is_symlink() or not out.is_dir() or set(os.listdir(out)) not in (set(), set(FILES)):
        raise ValueError(f'{out} is not just a folder that a conversion has written. Choose another one.')


def _read_names(path: Path) -> List[str]:
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is no text in UTF-8 ({e}).') from e
    names = [name.strip() for name in text.removesuffix('\n').split('\n')]
    if not all(names):
        raise ValueError(f'{path} must have the name of a class on each line, one is empty.')
    return names


def _class_names(given: Any, classes: int) -> Optional[List[str]]:
    """Returns the names that a source gives its classes; None if it gives none, or those of another classifier."""
    if not (given and classes) or (isinstance(given, (dict, list, tuple)) and len(given) != classes):
        return None
    return ordered_names(given, classes)


def _fit(weights: Source, arch: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    try:
        return fit(weights, arch)
    except ValueError as e:
        name = likely_arch(weights)
        hint = f' It looks like {name}: use --arch {name}.' if name else ''
        raise ValueError(f'{weights.what}, but not of {arch}: {e}{hint}') from e


def _checked(state: Dict[str, Tensor], dtype: torch.dtype) -> Dict[str, Tensor]:
    """Returns the tensors in the dtype that they are to be stored in, each with memory of its own."""
    checked = {}
    for key, value in state.items():
        counter = key.endswith('num_batches_tracked')
        if value.dtype not in (INTEGERS if counter else FLOATS):
            raise ValueError(f'{key} is a tensor of {value.dtype}: no weights can be such.')
        wanted = torch.int64 if counter else torch.float32 if key.endswith(STATISTICS) else dtype
        checked[key] = value.detach().to(wanted).clone(memory_format=torch.contiguous_format)
        if not checked[key].isfinite().all():
            reason = f'larger than {str(wanted)[6:]} can hold' if value.isfinite().all() else 'NaN or infinite'
            raise ValueError(f'{key} has values that are {reason}.')
    return checked


def _classes(state: Dict[str, Tensor]) -> int:
    return len(state['head.fc.weight']) if 'head.fc.weight' in state else 0


def _cut(state: Dict[str, Tensor], num_classes: Optional[int]) -> Dict[str, Tensor]:
    if num_classes == 0:
        return {key: value for key, value in state.items() if not key.startswith('head.fc.')}
    classes = _classes(state)
    if num_classes not in (None, classes):
        raise ValueError(f'it has {classes} classes, not {num_classes}: leave out --num-classes, or give 0 for none.')
    return state


def _pretrained_cfg(
    weights: Source,
    arch: str,
    num_classes: int,
    in_chans: int,
    tag: str,
    license: str,
) -> Dict[str, Any]:
    """Returns the fields of timm's `PretrainedCfg`: those of the model, and what the source says of its weights."""
    cfgs = default_cfgs[arch]
    cfg = asdict(cfgs.cfgs.get(weights.tag, cfgs.default))
    size = cfg['input_size'][1:]
    if not weights.tag:
        cfg |= dict(description=None, origin_url=None)
    cfg |= dict(notes=None, license=None, label_names=None, tag=weights.tag or None)
    cfg |= {key: value for key, value in weights.cfg.items() if key in DESCRIPTION}
    cfg |= dict(num_classes=num_classes, input_size=(in_chans, *cfg['input_size'][1:]))
    if cfg['input_size'][1:] != size:
        cfg['pool_size'] = None
    for key in 'mean', 'std':
        cfg[key] = tuple(map(float, cfg[key]))
        if len(cfg[key]) != in_chans:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * in_chans
    cfg |= {key: value for key, value in dict(tag=tag, license=license).items() if value}
    return PretrainedCfg(**cfg).to_dict(remove_source=True)
