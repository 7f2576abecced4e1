"""The oldest timm that pyproject.toml admits, from a folder of its own, in front of the installed one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub import hub

TESTS = Path(__file__).parent
CACHE = TESTS.parent / '.cache' / 'timm'
OLDEST = re.search(r'"timm>=([\d.]+)"', (TESTS.parent / 'pyproject.toml').read_text())[1]

pytestmark = pytest.mark.slow


@pytest.fixture
def python(tmp_path):
    """Runs a Python that imports the oldest timm; returns what it prints."""
    assert (CACHE / 'oldest').is_dir(), f'{CACHE / "oldest"} is missing: `make test` installs timm {OLDEST} there'

    def run(*args, cwd=tmp_path, **env):
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (CACHE / 'oldest', TESTS))), **env},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout

    return run


def test_autoload(python):
    assert python('-c', "import timm; timm.create_model('sknet12'); print(timm.__version__)") == f'{OLDEST}\n'


def test_main_job(python):
    assert 'horse.jpg' in python('-m', 'timm_sknet', 'predict')


def test_pretrained_mapping(python, repo, tmp_path):
    script = """
import timm, torch
theirs, ours = (timm.create_model(name, pretrained=True).eval() for name in ('skresnext50_32x4d', 'sknet50'))
x = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    expected, logits = theirs(x), ours(x)
assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
"""
    with hub(repo) as address:
        python('-c', script, HF_ENDPOINT=address, HF_HOME=str(tmp_path / 'cache'), HF_HUB_OFFLINE='0')


def test_that_releases_own_tests_on_two_models(python):
    names = 'sknet12 or sk_shufflenetv2_x0_5'
    out = python('-m', 'pytest', '-p', 'timm_suite', 'tests/test_models.py', '-k', names, cwd=CACHE / f'timm-{OLDEST}')
    # Of either model ten tests, and two of the pretrained weights of sknet12.
    assert re.search(r'= 22 passed, \d+ deselected', out), out[-2000:]
