"""Reads and checks pretrained weights: returns complete, unaltered weights of the network, or raises an error.

The models load all pretrained weights with this module: from the Hub, a file or a folder. timm alone does not verify a
download, ignores keys that do not fit if the classifier is replaced, and in older releases runs code in pickles.
"""

import argparse
import hashlib
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, clean_state_dict
from torch import Tensor, nn

from timm_sknet.folding import is_folded
from timm_sknet.keys import native_keys

_REMEDIES = (  # for download errors: the first matching class counts
    (
        LocalEntryNotFoundError,
        'The Hub cannot be reached, and the file is not in the cache. Check the connection and try again, or use a '
        'local folder (local-dir:FOLDER). Set HF_HUB_OFFLINE=1 to use only the cache, without retries.',
    ),
    (
        HfHubHTTPError,
        'Check the names of repository, revision and file. For a private or gated repository, run `hf auth login` or '
        'set HF_TOKEN. After a server error (5xx), try again later.',
    ),
    (
        OSError,
        'Check that the cache is writable and has free space, or set another one with HF_HUB_CACHE or cache_dir=. '
        'Try again.',
    ),
    (Exception, 'Try again.'),
)
HUB_FILES = 'model.safetensors', 'pytorch_model.bin'  # the weights files of a repository, in timm's order
# The weights files that timm looks for in a folder: first these names, then these endings.
_NAMES = *HUB_FILES, 'pytorch_model.pth', 'model.pth'
_ENDINGS = '.safetensors', '.pth', '.pth.tar', '.bin'


def source_of(cfg: PretrainedCfg) -> str:
    """Returns the source that timm loads the weights of a cfg from, by the name of its field or of its prefix."""
    if cfg.source in ('hf-hub', 'local-dir'):
        return cfg.source
    fields = {'state_dict': cfg.state_dict, 'file': cfg.file, 'hf-hub': cfg.hf_hub_id}
    return next((name for name, value in fields.items() if value), 'url')


class PretrainedWeights:
    """Reads the pretrained weights that a cfg points to, and checks them against a network.

    Args:
        cfg: Names the source. The priority is that of timm: a `local-dir:` or `hf-hub:` name, `state_dict`, `file`,
            `hf_hub_id`.
        cache_dir: Cache of huggingface_hub; None for HF_HUB_CACHE.

    Raises:
        RuntimeError: If the weights cannot be read. The message names the source, the cause and the remedy.
    """

    def __init__(self, cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None):
        self.cfg = cfg
        source = source_of(cfg)
        self.on_hub = source == 'hf-hub'
        self.where = f'{cfg.hf_hub_id} on the Hub' if self.on_hub else str(cfg.file)
        if source == 'state_dict':
            self.where = source
            self.state: Mapping[str, Tensor] = cfg.state_dict or {}
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
        except Exception as e:  # safetensors and torch raise errors of many classes
            raise self._error(e, self._remedy) from e

    def checked_state_dict(self, model: nn.Module, num_classes: int, strict: bool = True) -> Dict[str, Tensor]:
        """Returns the weights under the model's keys.

        Args:
            model: The network.
            num_classes: Requested number of classes. If the weights have another number, timm replaces the classifier.
            strict: Raise an error for missing and unexpected keys.

        Raises:
            RuntimeError: If the weights do not belong to the network or are not finite. The message names the keys.
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
                'Leave out arguments that change the network. If there are none, the file on the Hub is corrupted or '
                'belongs to another network: choose another revision, or tell the owner of the repository.'
            )
        return 'Choose weights of this network, and leave out arguments that change it.'

    def _error(self, cause: BaseException, remedy: str) -> RuntimeError:
        reason = shorten(str(cause) or repr(cause), 400, placeholder=' …').rstrip('.')
        return RuntimeError(f'Cannot load weights from {self.where}: {reason}. {remedy}')


def read(file: Path) -> Dict[str, Tensor]:
    """Reads a state dict, memory-mapped if the format allows it, without running code from the file.

    Args:
        file: A safetensors file or a file of `torch.save`. From a checkpoint of train.py the averaged (EMA) weights are
            taken if there are any, as in timm.

    Raises:
        Exception: Of any class, if the file is corrupted or not a checkpoint.
    """
    if file.suffix == '.safetensors':
        return load_file(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # checkpoints of train.py hold one
            found: Any = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:  # of many classes; some messages of torch advise to run the code
        if is_truncated(file):
            raise ValueError('the file is truncated; download or copy it again') from e
        raise ValueError(
            'not a PyTorch checkpoint, or the file is corrupted or contains objects other than weights, which are not '
            'unpickled. Save the weights alone with torch.save(model.state_dict(), FILE)'
        ) from e
    for key in 'state_dict_ema', 'model_ema', 'state_dict', 'model', 'resnet':  # 'resnet': SimCLRv2 on the Hub
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError('the file does not contain a state dict')
    return clean_state_dict(found)


def is_truncated(file: Path) -> bool:
    """Returns whether a file starts as a zip archive, such as those of `torch.save`, but its end is missing."""
    with file.open('rb') as content:
        return content.read(4) == b'PK\x03\x04' and not zipfile.is_zipfile(file)


def restore(model: nn.Module, state: Mapping[str, Tensor], except_classifier: bool) -> None:
    """Makes the weights of a model equal to the checked ones.

    For some `in_chans`, such as 4, older releases of timm drop the weights of the first convolution, which then keeps
    its initial weights.

    Args:
        model: The network that timm has loaded.
        state: The result of `PretrainedWeights.checked_state_dict`. A tensor is left out if its shape differs: timm
            adapts the first convolution to the number of image channels.
        except_classifier: Whether timm has replaced the classifier.
    """
    for key, own in model.state_dict().items():
        exempt = own.is_meta or (except_classifier and key.startswith('head.fc.'))
        if not exempt and key in state and own.shape == state[key].shape:
            own.copy_(state[key])


def _check(state: Mapping[str, Tensor], model: nn.Module, replaced: bool, strict: bool) -> None:
    """Raises RuntimeError if the weights do not fit the model; the classifier is not checked if it is `replaced`."""
    if is_folded(state):
        raise RuntimeError('the weights are folded (reparameterized) and load only into a folded model')
    own = model.state_dict()
    if replaced:
        own = {key: value for key, value in own.items() if not key.startswith('head.fc.')}
    # old files lack these counters, and PyTorch fills them in
    missing = [key for key in own if key not in state and not key.endswith('.num_batches_tracked')]
    if strict:
        _raise_if_any('Missing keys in', missing)
    if strict and not replaced:
        _raise_if_any('Unexpected keys in', [key for key in state if key not in own])
    mismatched = [key for key in own if key in state and not _same_shape(key, own[key], state[key])]
    if mismatched:
        key = mismatched[0]
        raise RuntimeError(
            f'size mismatch for {key}: {tuple(state[key].shape)} in the weights, {tuple(own[key].shape)} in the model'
        )
    floats = {key: value for key, value in state.items() if value.is_floating_point() and value.numel()}
    # all values are finite if the smallest and the largest are; comparing only these two takes no memory
    broken = [key for key, value in floats.items() if not torch.stack(value.aminmax()).isfinite().all()]
    _raise_if_any('NaN or infinity in', broken)


def _raise_if_any(what: str, keys: Sequence[str]) -> None:
    if keys:
        more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
        raise RuntimeError(f'{what} the weights: {", ".join(keys[:5])}{more}')


def _same_shape(key: str, own: Tensor, found: Tensor) -> bool:
    if key == 'stem.conv.weight':  # timm adapts it to the number of image channels
        return own.ndim == found.ndim and own[:, 0].shape == found[:, 0].shape
    return own.shape == found.shape


def _find(path: Path) -> Path:
    """Returns the path if it is a file, or the weights file that timm takes from a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError('the file does not exist')
    named = [path / name for name in _NAMES if (path / name).exists()]
    others = [file for ending in _ENDINGS for file in sorted(path.glob(f'*{ending}'))]
    if not named + others:
        raise FileNotFoundError('the folder does not contain a weights file')
    return (named + others)[0]


def _download(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> Path:
    repository, _, revision = str(cfg.hf_hub_id).partition('@')
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_FILES
    file = Path(download_first(repository, names, revision or None, cache_dir))
    _check_sha256(file)
    return file


def download_first(
    repository: str, names: Sequence[str], revision: Optional[str], cache_dir: Optional[Union[str, Path]] = None
) -> str:
    """Downloads the first of these files that a repository has, and returns its path in the cache."""
    errors: List[EntryNotFoundError] = []
    for name in names:
        # after a failure of the network, only the cache is asked for the other files
        local = any(isinstance(e, LocalEntryNotFoundError) for e in errors)
        try:
            return hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir, local_files_only=local)
        except EntryNotFoundError as e:
            errors.append(e)
    raise errors[0]


def _check_sha256(file: Path) -> None:
    """Raises RuntimeError if the file was altered, and removes it from the cache.

    In the cache a large file is a link to a file whose name is its sha256.
    """
    if not file.is_symlink():  # a file system without links: the sha256 is not known
        return
    blob = file.parent / os.readlink(file)  # not resolve(): the blob may be a link into the store of Xet
    if not re.fullmatch('[0-9a-f]{64}', blob.name):  # a small file, named by its git hash
        return
    digest = sha256(blob)
    if digest != blob.name:
        content = blob.resolve()
        with suppress(OSError):  # a read-only cache
            for path in (content, blob, file):
                path.unlink(missing_ok=True)
        raise RuntimeError(
            f'the file was altered during the download or in the cache: {content} has sha256 {digest}; it is removed '
            'from the cache if the cache is writable'
        )


def sha256(file: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, 'rb') as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()
