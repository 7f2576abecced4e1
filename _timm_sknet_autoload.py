"""Registers our models when timm is imported: PyTorch calls `autoload` at the end of `import torch`.

This module is outside the package. An entry point inside it would make every `import torch` run the package's
`__init__`, which imports timm.
"""

import os
import sys
import warnings
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Callable, Optional


def autoload() -> None:
    """Entry point of the group `torch.backends`: installs the import hook and never raises an error.

    The environment variable TIMM_SKNET_AUTOLOAD=0 turns it off.
    """
    if os.environ.get('TIMM_SKNET_AUTOLOAD') == '0':
        return
    try:
        if find_spec('timm') is None:
            raise ModuleNotFoundError("No module named 'timm'")
        if not any(isinstance(finder, _PostImportHook) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PostImportHook())
    except Exception as error:
        _warn(error)


class _PostImportHook:
    """Import hook: lets the other finders find `timm.models`, and imports our package after `timm.models` has run.

    A post-import hook like wrapt's imports the parent package inside the finder, where Python holds the global import
    lock. Then two threads that import timm at the same time wait for each other forever.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Optional[ModuleType] = None) -> Optional[ModuleSpec]:
        if fullname != 'timm.models' or self not in sys.meta_path:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        others = [finder for finder in behind if hasattr(finder, 'find_spec')]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        try:
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module
                spec.loader.exec_module = partial(_execute_and_register, execute)  # type: ignore[method-assign]
        except Exception as error:
            _warn(error)
        return spec


def _execute_and_register(execute: Callable[[ModuleType], None], timm_models: ModuleType) -> None:
    execute(timm_models)
    try:
        register = getattr(sys.modules.get('timm_sknet.sknets'), 'register_model', None)  # None during its import
        if register and register is not timm_models.register_model:
            # timm was removed from sys.modules and is imported again, but our modules use the removed one
            for name in [name for name in sys.modules if name.split('.')[0] == 'timm_sknet']:
                del sys.modules[name]
        import timm_sknet  # noqa: F401
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    message = (
        f'timm_sknet could not register its models in timm: {type(error).__name__}: {error} '
        '(set TIMM_SKNET_AUTOLOAD=0 to turn the registration off)'
    )
    try:
        warnings.warn(message)
    except UserWarning:  # raised under python -W error, where torch and timm must still work
        print(message, file=sys.stderr)
