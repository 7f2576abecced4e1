"""Converts weights to a model folder (`timm-sknet convert`): read, rename, check, write."""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from timm.models import PretrainedCfg
from torch import Tensor

from timm_sknet.checkpoints.card import UNSTATED, model_card
from timm_sknet.checkpoints.folder import check_target, one_line, write
from timm_sknet.checkpoints.reading import DESCRIPTION, Source, name_origin, read, to_state_dict
from timm_sknet.labels import label_names as ordered_names
from timm_sknet.labels import read_label_names
from timm_sknet.sknets import default_cfgs, model_cfgs

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
    """Converts weights to a folder that timm, its scripts and transformers can load.

    Args:
        source: A `.caffemodel` or `.pth.tar` by the paper's authors, a TensorFlow checkpoint of SimCLRv2, weights of
            timm's `skresnext50_32x4d`, `skresnet18` or `skresnet34` or of a model of this package, a checkpoint that
            contains them, such as those of timm's train.py, or a repository on the Hub with a model.safetensors or
            pytorch_model.bin. The type is detected from the content.
        out: The folder. It is written atomically: it exists only if the conversion succeeded.
        arch: Name of the model.
        ema: Use the averaged (EMA) weights of a checkpoint if it contains them.
        dtype: 'float32' or 'float16'. Batch norm statistics are always float32.
        num_classes: Expected number of classes, or 0 to remove the classifier. None accepts any number.
        tag: Tag of the weights. It replaces the tag of the source.
        license: Licence of the weights. It replaces the licence of the source, and the model card says so.
        label_names: A text file with one class name on each line, or the folder with the class folders of the data;
            see `timm_sknet.labels.read_label_names`.
        force: Replace a folder that an earlier conversion has written.

    Raises:
        ValueError: If the source is invalid or corrupted, or if an argument does not fit it.
        OSError: If a file cannot be read or written.
        ImportError: If the source needs a package that is not installed: protobuf or google-crc32c.
    """
    if not re.fullmatch(r'[\w-]*', tag):
        raise ValueError(f'The tag must consist of letters, digits, _ and -, got {tag!r}.')
    if license in ('none', UNSTATED) or not re.fullmatch(r'[a-z0-9.-]*', license):
        raise ValueError(
            f"The licence must be one of the Hub's names, such as mit, apache-2.0 or other, got {license!r}."
        )
    if arch not in model_cfgs:
        raise ValueError(f'Unknown model {arch!r}. Choose one of {", ".join(model_cfgs)}.')
    out = Path(os.path.abspath(out))
    for path in source, str(out):
        if path.encode(errors='ignore').decode() != path:  # safetensors cannot open it
            raise ValueError(f'{path!r} is not a valid name in UTF-8. Choose another name.')
    check_target(out, force)
    names = read_label_names(label_names) if label_names else None
    try:
        weights = read(source, arch, ema)
        state, args = to_state_dict(weights, arch)
        weights = replace(name_origin(weights, arch, args), tensors={})  # frees memory
        state = check_and_cast(state, DTYPES[dtype])
        state = _set_classifier(state, num_classes)
    except ValueError as e:
        raise ValueError(f'{source}: {one_line(e, 800)}') from e

    classes = _classes(state)
    if weights.tag and classes != default_cfgs[arch].default.num_classes:
        weights = replace(weights, tag='')  # the weights with this tag have another classifier
    try:
        cfg = _pretrained_cfg(weights, arch, classes, state['stem.conv.weight'].shape[1], tag, license)
        own_names = cfg.pop('label_names', None)
    except Exception as e:  # the values come from the source and can have any type
        raise ValueError(f'{source}: its description of the input or the classes is not valid in timm ({e!r}).') from e
    if names is None:
        try:
            names = _class_names(own_names, classes)
        except ValueError as e:
            raise ValueError(f'{source}: {e} Correct its config.json, or pass the names with --label-names.') from e
    elif len(names) != classes:
        raise ValueError(f'{label_names} must give {classes} names, one for each class, got {len(names)}.')
    # no num_classes in model_args: transformers would pass it twice
    config = dict(architecture=arch, num_classes=classes, label_names=names, model_args=args, pretrained_cfg=cfg)

    parameters = sum(value.numel() for key, value in state.items() if not key.endswith(STATISTICS))
    card = model_card(config, weights, parameters, dtype, claimed=bool(license))
    try:
        write(out, state, config, card, force)
    except ValueError as e:
        raise ValueError(f'{source}: {e}') from e


def _class_names(given: Any, classes: int) -> Optional[List[str]]:
    """Returns the class names of the source in the order of the classes; None if there are not `classes` names."""
    if not (given and classes) or (isinstance(given, (dict, list, tuple)) and len(given) != classes):
        return None
    return ordered_names(given, classes)


def check_and_cast(state: Dict[str, Tensor], dtype: torch.dtype) -> Dict[str, Tensor]:
    """Checks the values of a state dict and casts them to `dtype`.

    Batch norm statistics become float32 and counters int64. Each returned tensor is contiguous and owns its memory.

    Raises:
        ValueError: If a tensor has a dtype that is not supported, or values that are not finite.
    """
    checked = {}
    for key, value in state.items():
        counter = key.endswith('num_batches_tracked')
        if value.dtype not in FLOATS and not (counter and value.dtype in INTEGERS):
            raise ValueError(f'the dtype of {key} is {value.dtype}, which is not supported for weights.')
        wanted = torch.int64 if counter else torch.float32 if key.endswith(STATISTICS) else dtype
        checked[key] = value.detach().to(wanted).clone(memory_format=torch.contiguous_format)
        if not checked[key].isfinite().all():
            reason = f'too large for {str(wanted)[6:]}' if value.isfinite().all() else 'NaN or infinite'
            raise ValueError(f'{key} has values that are {reason}.')
        if key.endswith('running_var') and (checked[key] < 0).any():
            raise ValueError(
                f'{key} has negative values, but a variance is not negative. In a Caffe file, the blobs of a batch '
                'norm must be in the order of CuDNNBatchNorm: scale, bias, mean, variance.'
            )
    return checked


def _classes(state: Dict[str, Tensor]) -> int:
    return len(state['head.fc.weight']) if 'head.fc.weight' in state else 0


def _set_classifier(state: Dict[str, Tensor], num_classes: Optional[int]) -> Dict[str, Tensor]:
    """Removes the classifier for `num_classes` 0; for another number, checks that the classifier has so many."""
    if num_classes == 0:
        return {key: value for key, value in state.items() if not key.startswith('head.fc.')}
    classes = _classes(state)
    if num_classes not in (None, classes):
        raise ValueError(
            f'the weights have {classes} classes, not {num_classes}. Leave out --num-classes, or use 0 to remove the '
            'classifier.'
        )
    return state


def _pretrained_cfg(
    weights: Source,
    arch: str,
    num_classes: int,
    in_chans: int,
    tag: str,
    license: str,
) -> Dict[str, Any]:
    """Returns the fields of timm's `PretrainedCfg`: the defaults of the model, updated with those of the source."""
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
