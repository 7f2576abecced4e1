"""Uploads a converted model to the Hugging Face Hub (`timm-sknet push`)."""

import re
from pathlib import Path
from typing import Optional

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.utils import HfHubHTTPError

from timm_sknet import __version__
from timm_sknet.checkpoints.card import REPOSITORY, UNSTATED
from timm_sknet.checkpoints.folder import CARD, CONFIG, FILES, WEIGHTS, load


def push(folder: Path, repo: str, private: bool = False, revision: Optional[str] = None) -> str:
    """Uploads config.json, model.safetensors and README.md of a converted model in one commit.

    Args:
        folder: The folder written by `convert`. The model in it is loaded and run first.
        repo: Name of the repository, ORG/NAME. It is created if it does not exist.
        private: Push to a private repository. Required if the model card states no licence.
        revision: The branch, created if it does not exist; 'main' if None.

    Returns:
        The model name for `timm.create_model`.

    Raises:
        ValueError: If the folder, the repository or the licence does not allow the upload.
        OSError: If the Hub rejects the upload or is unreachable.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise ValueError(f'The repository must have the form ORG/NAME, got {repo!r}.')
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f'{folder} has no {name}. Create the folder with `timm-sknet convert`.')
    if not load(folder).num_classes:
        raise ValueError(f'The model in {folder} has no classifier. Convert the weights without --num-classes 0.')
    try:
        text = (folder / CARD).read_text(encoding='utf-8')
        if not text.startswith('---'):
            raise ValueError('it has no front matter')
        card = ModelCard(text)
    except Exception as e:  # the YAML parser raises many types
        raise ValueError(f'{folder / CARD} is not a valid model card: {e}.') from e
    licensed = getattr(card.data, 'license', None) not in (None, UNSTATED)
    if not (licensed or private):
        raise ValueError(
            f'{folder} states no licence, so it cannot be pushed to a public repository. Use --private, or convert the '
            'weights again with --license if you know their licence.'
        )
    if get_token() is None:
        raise ValueError('No Hugging Face token found. Run `hf auth login`, or set HF_TOKEN.')

    operations = [
        CommitOperationAdd(CONFIG, folder / CONFIG),
        CommitOperationAdd(WEIGHTS, folder / WEIGHTS),
        CommitOperationAdd(CARD, str(card).replace(REPOSITORY, repo).encode()),
    ]
    api = HfApi(library_name='timm_sknet', library_version=__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(f'{repo} already exists and is public. Choose another name, or make it private first.')
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f'{folder.name}, by timm_sknet', revision=revision)
    except HfHubHTTPError as e:
        status = e.response.status_code
        remedy = {401: ' Check the token: `hf auth login` sets it.', 403: ' Use a token with write access to it.'}
        reason = (e.server_message or str(e)).rstrip('.')
        raise OSError(f'The Hub rejected the upload to {repo} ({status}): {reason}.{remedy.get(status, "")}') from e
    except ValueError:
        raise
    except Exception as e:  # network errors have no common base class
        raise OSError(f'Cannot push to {repo}. The Hub may be unreachable: {e!r}.') from e
    return f'hf-hub:{repo}' + (f'@{revision}' if revision else '')
