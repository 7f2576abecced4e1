"""pytest plugin that runs timm's own test suite on our models only (`pytest -p timm_suite tests/test_models.py`).

timm selects the models of its tests by name, and for newer interfaces by module. The plugin replaces both selections.
"""

import timm
from models import MODELS


def _ours(list_names):
    def narrowed(filter='', module='', **kwargs):
        return [name for name in list_names(filter, **kwargs) if name.split('.')[0] in MODELS]

    return narrowed


timm.list_models = _ours(timm.list_models)
timm.list_pretrained = _ours(timm.list_pretrained)


def pytest_collection_modifyitems(config, items):
    """Deselects tests that timm wrote for single models."""
    ours = [item for item in items if _model(item) in MODELS]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def _model(item):
    return str(getattr(item, 'callspec', None) and item.callspec.params.get('model_name')).split('.')[0]
