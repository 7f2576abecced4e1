"""Weights from the Hub: the whole and unaltered file, or an error that names repository, cause and remedy.

timm does not tell which file it loaded, and huggingface_hub compares only the length of what it downloaded. So the file
is fetched and checked here, and then given to timm as a local one.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from traceback import walk_tb
from typing import Callable, Mapping, Optional, TypeVar, Union

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, load_pretrained
from torch import Tensor, nn

from timm_sknet.network import is_folded

ModelT = TypeVar('ModelT', bound=nn.Module)

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


def on_hub(cfg: PretrainedCfg) -> bool:
    """Returns whether timm takes the weights of this cfg from the Hub."""
    return cfg.source == 'hf-hub' or bool(cfg.hf_hub_id and not (cfg.source or cfg.file or cfg.state_dict))


def build_from_hub(
    build: Callable[..., ModelT],
    cfg: PretrainedCfg,
    cache_dir: Optional[Union[str, Path]] = None,
) -> ModelT:
    """Builds a model whose weights lie on the Hub.

    Args:
        build: timm's `build_model_with_cfg` with all arguments; called with others for those that name the weights.
        cfg: Names repository, revision and file.
        cache_dir: The cache of huggingface_hub; None for HF_HUB_CACHE.

    Returns:
        The model, as if timm had downloaded the weights.

    Raises:
        RuntimeError: Where the weights cannot be had or do not fit. Errors of other arguments stay what they are.
    """
    try:
        file = _download(cfg, cache_dir)
    except Exception as e:
        cause = e.__cause__ if isinstance(e, LocalEntryNotFoundError) and e.__cause__ else e
        raise _error(cfg, cause, next(remedy for kind, remedy in _REMEDIES if isinstance(e, kind))) from e
    try:
        model = build(pretrained_cfg=replace(cfg, source=None, file=file), pretrained_cfg_overlay=None)
    except Exception as e:
        # timm builds, loads and wraps in one call; only the loading has to do with the weights.
        if not any(frame.f_code is load_pretrained.__code__ for frame, _ in walk_tb(e.__traceback__)):
            raise
        remedy = (
            'The file is damaged on the Hub, or of another network: leave out arguments that change the network, '
            'choose another revision, or tell the owner of the repository.'
        )
        raise _error(cfg, e, remedy) from e
    del model.pretrained_cfg['file']
    if cfg.source:
        model.pretrained_cfg['source'] = cfg.source
    return model


def check_weights(state_dict: Mapping[str, Tensor], model: nn.Module, strict: bool = True) -> Mapping[str, Tensor]:
    """Returns the state dict if it holds all that the model needs, its classifier apart, and only finite values.

    Where the classifier is to be another, timm loads what fits and leaves the rest random, in silence.

    Args:
        state_dict: Weights with the model's keys.
        model: The network that they are for.
        strict: Refuse missing keys.

    Returns:
        `state_dict` itself.

    Raises:
        RuntimeError: Names the keys at fault.
    """
    if is_folded(state_dict):
        raise RuntimeError('They are those of a folded (reparameterized) model, and load only into such a one.')
    optional = re.compile(r'head\.fc\.|.*\.num_batches_tracked$')  # PyTorch fills in the latter, old files lack it
    missing = [key for key in model.state_dict() if key not in state_dict and not optional.match(key)]
    if missing and strict:
        raise RuntimeError(f'Missing keys in the weights: {", ".join(missing[:5])}{", ..." * (len(missing) > 5)}.')
    # The sum is finite where all values are, and costs a fifth of isfinite().all().
    sums = {key: value.sum(dtype=torch.float64) for key, value in state_dict.items() if value.is_floating_point()}
    broken = [key for key, value in sums.items() if not value.isfinite()]
    if broken:
        raise RuntimeError(f'NaN or infinity in the weights: {", ".join(broken[:5])}{", ..." * (len(broken) > 5)}.')
    return state_dict


def _error(cfg: PretrainedCfg, cause: BaseException, remedy: str) -> RuntimeError:
    reason = shorten(str(cause) or repr(cause), 400, placeholder=' …').rstrip('.')
    return RuntimeError(f'No weights from {cfg.hf_hub_id} on the Hub: {reason}. {remedy}')


def _download(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> str:
    repository, _, revision = str(cfg.hf_hub_id).partition('@')
    errors = []
    for name in [cfg.hf_hub_filename] if cfg.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']:
        try:
            file = hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir)
        except EntryNotFoundError as e:  # offline too, where the cache may have the other
            errors.append(e)
        else:
            _check_sha256(Path(file))
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
