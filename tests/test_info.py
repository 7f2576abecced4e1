"""`timm-sknet info`, which looks at a process that imports only timm."""

import importlib.metadata
import platform

import pytest

import timm_sknet
from timm_sknet.cli import main
from timm_sknet.sknets import model_cfgs


@pytest.fixture
def info(capsys, monkeypatch, tmp_path):
    """Runs the command with files in the module path of new processes, and returns its lines by their names."""

    def run(files=None, **env):
        for name, text in (files or {}).items():
            (tmp_path / name).write_text(text, encoding='utf-8')
        for name, value in (env | {'PYTHONPATH': str(tmp_path)}).items():
            monkeypatch.setenv(name, value)
        assert main(['info']) == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    return run


def test_versions_registration_and_hub_are_printed(info, monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    found = info()
    assert found['Python'].startswith(f'{platform.python_version()}, ')
    for package in 'torch', 'timm', 'huggingface_hub', 'safetensors':
        assert found[package].split('+')[0] == importlib.metadata.version(package).split('+')[0]
    assert found['timm_sknet'] == timm_sknet.__version__
    assert found['autoload'] == 'on, has registered'
    assert found['models'] == f'{len(model_cfgs)} of {len(model_cfgs)} are ours'
    assert found['cache'] == str(tmp_path / 'cache')
    assert found['Hub'].endswith(', offline (HF_HUB_OFFLINE)')


@pytest.mark.parametrize('switch', ['TIMM_SKNET_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'])
def test_an_autoload_that_is_off_is_named_with_its_switch(info, switch):
    found = info(**{switch: '0'})
    assert found['autoload'] == f'off ({switch}=0)'
    assert found['models'].startswith('0 of ')


def test_a_name_of_another_package_is_shown_with_its_module(info):
    theirs = """
from timm.models import register_model


@register_model
def sknet50(pretrained=False, **kwargs):
    raise NotImplementedError
"""
    found = info({'theirs.py': theirs, 'sitecustomize.py': 'import theirs'})
    number = len(model_cfgs)
    assert found['models'] == f'{number - 1} of {number} are ours; sknet50: registered by theirs'


def test_an_autoload_that_failed_is_shown_with_its_warning(info):
    found = info({'timm_sknet.py': '1 / 0'})
    assert found['autoload'].startswith('on, has not registered; ')
    assert 'timm_sknet could not register its models in timm: ZeroDivisionError' in found['autoload']


def test_a_timm_that_cannot_be_imported_is_shown_with_its_error(info):
    assert info({'timm.py': '1 / 0'})['models'] == '`import timm` failed: ZeroDivisionError: division by zero'
