"""Lets `import timm` register our models: PyTorch calls `autoload` at the end of `import torch`.

The module stands beside the package: an entry point inside it would make every `import torch` run the package's
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
    """Entry point of the group `torch.backends`; does nothing where TIMM_SKNET_AUTOLOAD=0, and never raises."""
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
    """Finds `timm.models` as the finders behind it do, and imports our package as soon as it has been executed.

    wrapt's hook of that kind imports the parent package from inside the finder, where Python holds the global import
    lock: two threads that import timm at once then wait for each other forever.
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
        import timm_sknet  # noqa: F401
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    message = (
        f'timm_sknet could not register its models in timm: {type(error).__name__}: {error} '
        '(TIMM_SKNET_AUTOLOAD=0 turns the attempt off)'
    )
    try:
        warnings.warn(message)
    except UserWarning:  # python -W error: torch and timm must go on all the same
        print(message, file=sys.stderr)
