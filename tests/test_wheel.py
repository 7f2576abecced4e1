"""The wheel contains every module and file of the package, and all modules can be imported after installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import pkgutil, sys
import timm_sknet
assert timm_sknet.__file__.startswith(sys.argv[1]), timm_sknet.__file__
for module in pkgutil.walk_packages(timm_sknet.__path__, 'timm_sknet.'):
    if not module.name.endswith('__main__'):
        __import__(module.name)
        print(module.name)
"""


@pytest.mark.slow
def test_every_module_of_an_installed_wheel_can_be_imported(tmp_path):
    source = tmp_path / 'source'  # a copy, because pip builds inside the source folder
    shutil.copytree(ROOT / 'timm_sknet', source / 'timm_sknet', ignore=shutil.ignore_patterns('__pycache__'))
    for name in '_timm_sknet_autoload.py', 'pyproject.toml', 'README.md', 'LICENSE':
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    build = [*pip, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    installed = tmp_path / 'installed'
    subprocess.run([*pip, 'install', '--no-deps', '--no-index', '--target', str(installed), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, '-c', IMPORT_ALL, str(installed)],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [file.relative_to(ROOT) for file in (ROOT / 'timm_sknet').rglob('*.py') if file.name != '__main__.py']
    names = {'.'.join(file.with_suffix('').parts).removesuffix('.__init__') for file in files}
    assert set(done.stdout.split()) == names - {'timm_sknet'}
    data = [file.relative_to(ROOT) for file in (ROOT / 'timm_sknet').rglob('*') if file.is_file()]
    missing = [file for file in data if '__pycache__' not in file.parts and not (installed / file).exists()]
    assert not missing
