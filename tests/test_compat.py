"""Tests with the oldest timm that pyproject.toml allows, imported from a separate folder."""

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
    """Runs a Python process that imports the oldest timm; returns its output."""
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


def test_timms_own_tests_pass_on_two_models(python):
    names = 'sknet12 or sk_shufflenetv2_x0_5'
    out = python('-m', 'pytest', '-p', 'timm_suite', 'tests/test_models.py', '-k', names, cwd=CACHE / f'timm-{OLDEST}')
    # Ten tests for each of the two models, and two for the pretrained weights of sknet12.
    assert re.search(r'= 22 passed, \d+ deselected', out), out[-2000:]


def test_no_code_of_a_pickle_is_run(python, tmp_path):
    script = """
import json, os, pickle, sys, timm, torch
class Runs:
    def __reduce__(self):
        return open, ('harm', 'w')
for name in 'own.pth', 'folder/pytorch_model.bin':
    os.makedirs('folder', exist_ok=True)
    torch.save({**timm.create_model('sknet12').state_dict(), 'harm': Runs()}, name)
with open('folder/config.json', 'w') as f:
    json.dump(dict(architecture='sknet12', num_classes=10, pretrained_cfg={'num_classes': 10}), f)
for name, overlay in ('sknet12', {'file': 'own.pth'}), ('local-dir:folder', None):
    try:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except RuntimeError as e:
        print(e)
    assert not os.path.exists('harm')
"""
    refused = python('-c', script).splitlines()
    assert [re.search('Cannot load weights from (.*): not a PyTorch checkpoint', line)[1] for line in refused] == [
        'own.pth',
        'folder/pytorch_model.bin',
    ]


def test_a_folder_loads(python):
    """The folder has a safetensors file and a pickle; older releases of timm load the pickle."""
    script = """
import timm, torch
from timm.models import save_for_hf
model = timm.create_model('sknet12', pretrained=True)
save_for_hf(model, 'folder', safe_serialization='both')
again = timm.create_model('local-dir:folder', pretrained=True)
assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
assert again.pretrained_cfg['source'] == 'local-dir' and 'state_dict' not in again.pretrained_cfg
"""
    python('-c', script)
