"""Runs timm's own model tests, from the sdist of the installed timm, on our models."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from hub import hub
from models import MODELS
from safetensors.torch import save_file
from simclr_reference import to_hub

from timm_sknet.sknets import default_cfgs

TESTS = Path(__file__).parent
SUITE = TESTS.parent / '.cache' / 'timm' / f'timm-{timm.__version__}'

# All tests of timm that take a model by name and apply to convolutional networks. Only its tests of single networks are
# left out.
OF_EVERY_MODEL = {
    'test_model_backward',
    'test_model_backward_fx',
    'test_model_default_cfgs',
    'test_model_forward',
    'test_model_forward_features',
    'test_model_forward_fx',
    'test_model_forward_fx_torchscript',
    'test_model_forward_intermediates',
    'test_model_forward_intermediates_features',
    'test_model_forward_torchscript',
    'test_prune_intermediate_layers_contract',
}
OF_PRETRAINED_MODELS = {'test_model_load_pretrained', 'test_model_features_pretrained'}


@pytest.fixture
def served(repo, tmp_path):
    """A folder for the loopback server that contains the weights of all models."""
    for name in MODELS:
        cfg = default_cfgs[name].default
        if cfg.hf_hub_id and not (repo / cfg.hf_hub_id).exists():
            folder = tmp_path / cfg.hf_hub_id
            folder.mkdir(parents=True)
            state = timm.create_model(name).state_dict()
            if name.endswith('_simclr'):
                torch.save(to_hub(state), folder / cfg.hf_hub_filename)
            else:
                save_file(state, folder / cfg.hf_hub_filename)
    for folder in repo.glob('*/*'):
        (tmp_path / folder.relative_to(repo)).symlink_to(folder)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_timms_tests_pass_on_every_model(served, tmp_path):
    """The suite downloads weights from a loopback server."""
    assert SUITE.is_dir(), f'{SUITE} is missing: `make test` unpacks the tests of timm there'
    report = tmp_path / 'report.xml'
    with hub(served) as address:
        run = subprocess.run(
            [sys.executable, *'-m pytest -p timm_suite tests/test_models.py -q -n 2'.split(), f'--junitxml={report}'],
            cwd=SUITE,
            env={
                **os.environ,
                'PYTHONPATH': str(TESTS),
                'OMP_NUM_THREADS': '1',
                'HF_ENDPOINT': address,
                'HF_HOME': str(tmp_path / 'cache'),
                'HF_HUB_OFFLINE': '0',
            },
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stdout[-5000:]
    expected = Counter((test, name) for test in OF_EVERY_MODEL for name in MODELS)
    # this test runs for each set of weights
    expected.update({('test_model_default_cfgs', name): len(default_cfgs[name].tags) - 1 for name in MODELS})
    expected += Counter(
        (test, name) for test in OF_PRETRAINED_MODELS for name in MODELS if default_cfgs[name].is_pretrained
    )
    assert ran(report) == expected


def ran(report: Path) -> Counter:
    """Counts the tests that were not skipped, by test and model."""
    cases = [case for case in ElementTree.parse(report).iter('testcase') if case.find('skipped') is None]
    names = [case.get('name').rstrip(']').split('[') for case in cases]
    return Counter((test, parameters.split('-')[-1].split('.')[0]) for test, parameters in names)
