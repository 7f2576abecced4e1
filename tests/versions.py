"""Marks for tests that older versions of torch or timm cannot pass."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def since(package: str, first: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test, with its reason, if the version of a package is older than the first one that passes it."""
    return pytest.mark.skipif(Version(version(package)) < Version(first), reason=f'{package} {first}: {reason}')
