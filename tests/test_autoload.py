"""Registration in processes that import only torch or timm. The entry point needs an installed package."""

import json
import os
import subprocess
import sys

import pytest

from timm_sknet.sknets import model_cfgs


@pytest.fixture
def python(tmp_path):
    """Runs code or files in a separate Python process; returns its standard output and error."""

    def run(code='', args=(), files=None, **env):
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1', **env}
        done = subprocess.run(
            [sys.executable, *(args or ('-c', code))],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_importing_only_timm_lists_and_creates_our_models_beside_timms_own(python):
    out, err = python("""
import json, timm, torch
assert timm.create_model('sknet12')(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
print(json.dumps([
    timm.list_models('sk*'), timm.list_pretrained('*sk*'),
    timm.list_models(module='sknets'), timm.list_models(module='sknet'),
]))
""")
    listed, pretrained, ours, timms = json.loads(out)
    assert sorted(ours) == sorted(model_cfgs)
    assert 'skresnext50_32x4d' in timms
    assert not set(ours) & set(timms)
    assert set(listed) == {*ours, *timms}
    assert {'sknet12.cifar10', 'sknet50.ra_in1k', 'skresnext50_32x4d.ra_in1k'} <= set(pretrained)
    assert not any(name.endswith('.untrained') for name in pretrained)
    assert err == ''


# A second registration fails here, because timm warns (UserWarning) that it overwrites a name.
@pytest.mark.parametrize('ours', ['import timm_sknet', 'from timm_sknet.layers import SelectiveKernelConv'])
def test_importing_the_package_or_a_module_of_it_before_timm_registers_once(python, ours):
    code = f"{ours}\nimport timm\nassert timm.is_model('sknet50')"
    assert python(args=('-W', 'error::UserWarning', '-c', code)) == ('', '')


def test_the_switch_stops_the_autoload_and_a_later_import_of_the_package_still_registers(python):
    python(
        """
import sys, timm
assert not timm.is_model('sknet50')
assert 'timm_sknet' not in sys.modules
import timm_sknet
assert timm.is_model('sknet50')
""",
        TIMM_SKNET_AUTOLOAD='0',
    )


def test_the_hook_adds_less_than_15_ms_to_import_torch_and_does_not_import_timm(python):
    code = """
import sys, time, torch
from importlib.metadata import entry_points
entry_point, = entry_points(group='torch.backends', name='timm_sknet')
start = time.perf_counter()
entry_point.load()()
print(time.perf_counter() - start)
assert not {'timm', 'timm_sknet'} & set(sys.modules)
"""
    seconds = [float(python(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')[0]) for _ in range(3)]
    assert min(seconds) < 0.015


# The parent imports torch but not timm. The hook must survive a fork, and a spawned process must install it again.
def test_forked_and_spawned_loader_workers_have_our_models(python):
    files = {
        'main.py': """
import sys, torch
from torch.utils.data import DataLoader


class Data:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import timm
        return timm.is_model('sknet50')


if __name__ == '__main__':
    assert 'timm' not in sys.modules
    for context in 'fork', 'spawn':
        found, = DataLoader(Data(), num_workers=1, multiprocessing_context=context)
        assert found.all(), context
"""
    }
    python(args=('main.py',), files=files)


def test_both_processes_of_torchrun_have_our_models(python):
    files = {'main.py': "import timm\nprint(timm.is_model('sknet50'))"}
    args = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', 'main.py')
    out, _ = python(args=args, files=files)
    assert out.split() in (['True', 'True'], ['TrueTrue'])  # both processes write to one pipe


# For each broken part: code and files that break it, the cause that the warning names, and Python's flag for warnings.
BROKEN = {
    'timm': ("sys.modules['timm'] = None", {}, "ModuleNotFoundError: No module named 'timm'", 'default'),
    'what we need of timm': (
        '',
        {'timm/__init__.py': '', 'timm/models.py': ''},
        "ModuleNotFoundError: No module named 'timm.",
        'default',
    ),
    'our package': (
        '',
        {'timm_sknet.py': '1 / 0', 'timm/__init__.py': '', 'timm/models.py': ''},
        'ZeroDivisionError: division by zero',
        'default',
    ),
    'our package where warnings are errors': (
        '',
        {'timm_sknet.py': '1 / 0', 'timm/__init__.py': '', 'timm/models.py': ''},
        'ZeroDivisionError: division by zero',
        'error',
    ),
}


@pytest.mark.parametrize(('prelude', 'files', 'cause', 'flag'), BROKEN.values(), ids=BROKEN)
def test_a_broken_part_is_named_in_one_warning_and_torch_works(python, prelude, files, cause, flag):
    code = f"""
import sys
{prelude}
import torch
if 'timm' not in sys.modules:
    import timm.models
torch.zeros(1) + 1
"""
    _, err = python(args=('-W', flag, '-c', code), files=files)
    assert err.count('timm_sknet could not register its models in timm') == 1, err
    assert cause in err


def test_a_timm_that_fails_to_import_raises_its_own_error_and_torch_works(python):
    _, err = python(
        """
import torch
try:
    import timm
except ZeroDivisionError:
    torch.zeros(1) + 1
""",
        files={'timm/__init__.py': 'import timm.models', 'timm/models.py': '1 / 0'},
    )
    assert err == ''


# A finder must not wait for the import of timm in another thread, because it blocks that import: this would not end.
def test_two_threads_may_import_timm_at_once(python):
    files = {
        'timm/__init__.py': 'import time\ntime.sleep(0.5)\nimport timm.layers, timm.models',
        'timm/layers.py': '',
        'timm/models.py': '',
        'timm_sknet.py': "print('registered')",
    }
    out, err = python(
        """
import time
from importlib import import_module
from threading import Thread
import _timm_sknet_autoload
_timm_sknet_autoload.autoload()
threads = [Thread(target=import_module, args=(name,)) for name in ('timm', 'timm.models')]
for thread in threads:
    thread.start()
    time.sleep(0.2)
for thread in threads:
    thread.join()
""",
        files=files,
    )
    assert (out, err) == ('registered\n', '')


def test_names_registered_by_others_are_replaced_with_one_warning_each(python):
    theirs = """
from timm.models import register_model


@register_model
def sknet12(pretrained=False, **kwargs):
    raise NotImplementedError


@register_model
def sknet50(pretrained=False, **kwargs):
    raise NotImplementedError
"""
    out, _ = python(
        """
import warnings
import timm
import theirs
filters = list(warnings.filters)
with warnings.catch_warnings(record=True) as caught:
    import timm_sknet
assert warnings.filters == filters
print(*[warning.message for warning in caught], sep='\\n')
assert isinstance(timm.create_model('sknet12'), timm_sknet.SKNet)
""",
        files={'theirs.py': theirs},
        TIMM_SKNET_AUTOLOAD='0',
    )
    replaced = [warning for warning in out.splitlines() if 'Overwriting' in warning]
    assert len(replaced) == len(out.splitlines()) == 2
    assert all(any(f'Overwriting {name} ' in warning for warning in replaced) for name in ('sknet12', 'sknet50'))


@pytest.mark.parametrize('first', ['timm', 'timm_sknet'])
def test_our_models_are_registered_again_when_timm_is_imported_again(python, first):
    out, err = python(f"""
import sys, {first}, timm
before = timm.create_model('sknet12')
for name in [name for name in sys.modules if name.split('.')[0] == 'timm']:
    del sys.modules[name]
import timm
after = timm.create_model('sknet12')
assert isinstance(after.stem, timm.layers.ConvNormAct) and not isinstance(before.stem, timm.layers.ConvNormAct)
import timm_sknet
assert isinstance(after, timm_sknet.SKNet)
print(*timm.list_models(module='sknets'))
""")
    assert sorted(out.split()) == sorted(model_cfgs) and err == ''


@pytest.mark.parametrize('again', ['importlib.reload(timm.models)', 'importlib.reload(timm)'])
def test_a_reloaded_timm_keeps_our_models_without_a_warning(python, again):
    code = f"""
import importlib, timm, timm_sknet
{again}
assert isinstance(timm.create_model('sknet12'), timm_sknet.SKNet)
"""
    assert python(args=('-W', 'error::UserWarning', '-c', code)) == ('', '')


def test_the_hook_is_there_once_and_passes_over_finders_without_find_spec(python):
    python("""
import sys
import timm
import _timm_sknet_autoload
_timm_sknet_autoload.autoload()
(hook,) = [finder for finder in sys.meta_path if isinstance(finder, _timm_sknet_autoload._PostImportHook)]
sys.meta_path.insert(sys.meta_path.index(hook) + 1, object())
assert hook.find_spec('timm.models', timm.__path__).name == 'timm.models'
""")
