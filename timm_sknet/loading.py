"""Reads and checks pretrained weights: the whole and unaltered weights of the network, or an error that says why not.

All weights go this way, those of the Hub, of a file and of a folder. timm alone does not compare what it downloaded,
loads what fits in silence where the classifier is replaced, and in older releases runs code that is in a pickle.
"""

import argparse
import hashlib
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, clean_state_dict
from torch import Tensor, nn

from timm_sknet.keys import is_folded, native_keys

_REMEDIES = (  # of errors while downloading: the first that fits
    (
        LocalEntryNotFoundError,
        'The Hub cannot be reached, and there is no download on this machine. Check the connection and try again, or '
        'use a local folder (local-dir:FOLDER); HF_HUB_OFFLINE=1 ends the wait at once.',
    ),
    (
        HfHubHTTPError,
        'Check the name of repository, revision and file; for a private or gated one, `hf auth login` or set HF_TOKEN; '
        'after a server error (5xx), try again later.',
    ),
    (OSError, 'Try again, with space in a cache that can be written: HF_HUB_CACHE or cache_dir= names another.'),
    (Exception, 'Try again.'),
)
# The files that timm looks for in a folder, first the names and then the endings.
_NAMES = 'model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth'
_ENDINGS = '.safetensors', '.pth', '.pth.tar', '.bin'


class PretrainedWeights:
    """Pretrained weights of a network.

    Args:
        cfg: Says where they are. As in timm, a folder or repository that the model's name gives comes first, then a
            state dict, a file and the repository of the model.
        cache_dir: The cache of huggingface_hub; None for HF_HUB_CACHE.

    Raises:
        RuntimeError: Where they cannot be read. The text names the source, the cause and what to do.
    """

    def __init__(self, cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None):
        self.cfg = cfg
        self.on_hub = cfg.source == 'hf-hub' or not (cfg.source or cfg.state_dict or cfg.file)
        self.where = f'{cfg.hf_hub_id} on the Hub'
        if not self.on_hub:
            given = cfg.state_dict if cfg.source != 'local-dir' else None
            self.where = 'state_dict' if given else str(cfg.file)
            if given:
                self.state: Mapping[str, Tensor] = given
                return
        try:
            file = _download(cfg, cache_dir) if self.on_hub else _find(Path(self.where))
        except Exception as e:
            cause = e.__cause__ if isinstance(e, LocalEntryNotFoundError) and e.__cause__ else e
            remedies = _REMEDIES if self.on_hub else ((Exception, 'Check the path.'),)
            raise self._error(cause, next(remedy for kind, remedy in remedies if isinstance(e, kind))) from e
        if not self.on_hub:
            self.where = str(file)
        try:
            self.state = read(file)
        except Exception as e:  # safetensors and torch raise whatever they meet
            raise self._error(e, self._remedy) from e

    def fit(self, model: nn.Module, num_classes: int, strict: bool = True) -> Dict[str, Tensor]:
        """Returns the weights by the model's keys.

        Args:
            model: The network.
            num_classes: Classes that are asked for. timm replaces a classifier of another number.
            strict: Refuse missing and unexpected keys.

        Raises:
            RuntimeError: Where they are not those of the network, or not finite. The text names the keys at fault.
        """
        state = dict(native_keys(self.state))
        try:
            _check(state, model, num_classes != self.cfg.num_classes, strict)
        except RuntimeError as e:
            raise self._error(e, self._remedy) from e
        return state

    @property
    def _remedy(self) -> str:
        if self.on_hub:
            return (
                'The file is damaged on the Hub, or of another network: leave out arguments that change the network, '
                'choose another revision, or tell the owner of the repository.'
            )
        return 'Choose weights of this network, and leave out arguments that change it.'

    def _error(self, cause: BaseException, remedy: str) -> RuntimeError:
        reason = shorten(str(cause) or repr(cause), 400, placeholder=' …').rstrip('.')
        return RuntimeError(f'No weights from {self.where}: {reason}. {remedy}')


def read(file: Path) -> Dict[str, Tensor]:
    """Reads a state dict, memory-mapped where the format allows it; no code of the file is run.

    Args:
        file: A safetensors file or one of `torch.save`. Of a checkpoint of train.py, as in timm, the averaged weights
            are taken where there are some.

    Raises:
        Exception: Of any kind, where the file is damaged or something else.
    """
    if file.suffix == '.safetensors':
        return load_file(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in checkpoints of train.py
            found: Any = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:  # torch raises whatever it meets; the text of some errors says how to run the code
        raise ValueError(
            'It is not a PyTorch checkpoint, or it holds more than weights, which is not unpickled; save weights alone '
            'with torch.save(model.state_dict(), FILE)'
        ) from e
    for key in 'state_dict_ema', 'model_ema', 'state_dict', 'model':
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError('It holds no state dict')
    return clean_state_dict(found)


def _check(state: Mapping[str, Tensor], model: nn.Module, replaced: bool, strict: bool) -> None:
    """Raises RuntimeError where timm would not load all that the model needs: its classifier apart if `replaced`."""
    if is_folded(state):
        raise RuntimeError('They are those of a folded (reparameterized) model, and load only into such a one')
    own = model.state_dict()
    if replaced:
        own = {key: value for key, value in own.items() if not key.startswith('head.fc.')}
    # PyTorch fills in the counters, which old files lack
    missing = [key for key in own if key not in state and not key.endswith('.num_batches_tracked')]
    if strict:
        _refuse('Missing keys in', missing)
    if strict and not replaced:
        _refuse('Unexpected keys in', [key for key in state if key not in own])
    mismatched = [key for key in own if key in state and not _same_shape(key, own[key], state[key])]
    if mismatched:
        key = mismatched[0]
        raise RuntimeError(
            f'size mismatch for {key}: {tuple(state[key].shape)} in the weights, {tuple(own[key].shape)} in the model'
        )
    floats = {key: value for key, value in state.items() if value.is_floating_point() and value.numel()}
    # the least and the largest value are finite where all are, which takes no memory
    broken = [key for key, value in floats.items() if not torch.stack(value.aminmax()).isfinite().all()]
    _refuse('NaN or infinity in', broken)


def _refuse(what: str, keys: Sequence[str]) -> None:
    if keys:
        more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
        raise RuntimeError(f'{what} the weights: {", ".join(keys[:5])}{more}')


def _same_shape(key: str, own: Tensor, found: Tensor) -> bool:
    if key == 'stem.conv.weight':  # timm adapts it to the channels of the images
        return own.ndim == found.ndim and own[:, 0].shape == found[:, 0].shape
    return own.shape == found.shape


def _find(path: Path) -> Path:
    """Returns the file itself, or the one with the weights in a folder, as timm finds it."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError('There is no such file')
    named = [path / name for name in _NAMES if (path / name).exists()]
    others = [file for ending in _ENDINGS for file in sorted(path.glob(f'*{ending}'))]
    if not named + others:
        raise FileNotFoundError('There is no file of weights in this folder')
    return (named + others)[0]


def _download(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> Path:
    repository, _, revision = str(cfg.hf_hub_id).partition('@')
    errors = []
    for name in [cfg.hf_hub_filename] if cfg.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']:
        try:
            file = Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))
        except EntryNotFoundError as e:  # offline too, where the cache may have the other
            errors.append(e)
        else:
            _check_sha256(file)
            return file
    raise errors[0]


def _check_sha256(file: Path) -> None:
    """Removes the file from the cache if it was altered. A large file is there a link to one named by its sha256."""
    if not file.is_symlink():  # a file system without links: there is nothing to compare with
        return
    blob = file.parent / os.readlink(file)  # not resolve(): it may be a link too, into the store of Xet's files
    if not re.fullmatch('[0-9a-f]{64}', blob.name):  # a small file, named as git names it
        return
    with open(blob, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if digest != blob.name:
        content = blob.resolve()
        with suppress(OSError):  # a cache that cannot be written
            for path in (content, blob, file):
                path.unlink(missing_ok=True)
        raise RuntimeError(
            f'The file was altered on its way or in the cache, and is removed from there if that can be written: '
            f'{content} has sha256 {digest}'
        )
