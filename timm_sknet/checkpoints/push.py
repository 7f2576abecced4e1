"""Uploads a model folder to the Hugging Face Hub: the work behind `timm-sknet push`."""

import re
from pathlib import Path
from typing import Optional

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from timm_sknet import __version__
from timm_sknet.checkpoints.card import REPOSITORY, UNSTATED
from timm_sknet.checkpoints.convert import CARD, CONFIG, FILES, WEIGHTS, load


def push(folder: Path, repo: str, private: bool = False, revision: Optional[str] = None) -> str:
    """Uploads config, weights and card of a folder that was converted, in one commit; no other files.

    Args:
        folder: The folder, which must load and classify.
        repo: Name of the repository, ORG/NAME; made if there is none.
        private: Make it a private one. A folder whose card states no licence goes into no other.
        revision: Branch, made if there is none; 'main' if None.

    Returns:
        The name by which timm loads the model.

    Raises:
        ValueError: For a folder that should not be published, or not so.
        OSError: Where the Hub refuses it or cannot be reached.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise ValueError(f'A repository is called ORG/NAME, got {repo!r}.')
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f'{folder} has no {name}: make the folder with `timm-sknet convert`.')
    if not load(folder).num_classes:
        raise ValueError(f'{folder} holds a model without classes: convert it with its classifier.')
    try:
        text = (folder / CARD).read_text(encoding='utf-8')
        if not text.startswith('---'):
            raise ValueError('it has no front matter')
        card = ModelCard(text)
    except Exception as e:  # of YAML
        raise ValueError(f'{folder / CARD} is no model card: {e}.') from e
    licensed = getattr(card.data, 'license', None) not in (None, UNSTATED)
    if not (licensed or private):
        raise ValueError(
            f'{folder} states no licence, so it must not be made public: push it with --private, or convert it again '
            'with --license if you can answer for one.'
        )
    if get_token() is None:
        raise ValueError('No token of the Hub on this machine: type `hf auth login`, or set HF_TOKEN.')

    operations = [
        CommitOperationAdd(CONFIG, folder / CONFIG),
        CommitOperationAdd(WEIGHTS, folder / WEIGHTS),
        CommitOperationAdd(CARD, str(card).replace(REPOSITORY, repo).encode()),
    ]
    api = HfApi(library_name='timm_sknet', library_version=__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(f'{repo} exists and is public: choose another name, or make it private first.')
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f'{folder.name}, by timm_sknet', revision=revision)
    except HfHubHTTPError as e:
        status = e.response.status_code
        remedy = {401: ' Is the token right? `hf auth login` sets it.', 403: ' The token has no right to write there.'}
        reason = (e.server_message or str(e)).rstrip('.')
        raise OSError(f'The Hub refuses {repo} ({status}): {reason}.{remedy.get(status, "")}') from e
    except ValueError:
        raise
    except Exception as e:  # those of the network have no class in common
        raise OSError(f'{repo} cannot be pushed, the Hub may be out of reach: {e!r}.') from e
    return f'hf-hub:{repo}' + (f'@{revision}' if revision else '')
