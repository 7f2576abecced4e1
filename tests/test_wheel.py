"""The wheel contains all modules and files of the package, and pip installs it without replacing other packages."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # a copy, because pip builds inside the source folder
    shutil.copytree(ROOT / 'timm_sknet', source / 'timm_sknet', ignore=shutil.ignore_patterns('__pycache__'))
    for name in '_timm_sknet_autoload.py', 'pyproject.toml', 'README.md', 'LICENSE':
        shutil.copy(ROOT / name, source)
    build = [*PIP, 'wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = folder.glob('*.whl')
    return found


@pytest.mark.slow
def test_every_module_of_an_installed_wheel_can_be_imported(wheel, tmp_path):
    installed = tmp_path / 'installed'
    subprocess.run([*PIP, 'install', '--no-deps', '--no-index', '--target', str(installed), str(wheel)], check=True)
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


@pytest.mark.slow
def test_pip_replaces_nothing_beside_the_oldest_versions(wheel, tmp_path):
    """The environment contains the metadata of the oldest versions, which is all that pip reads."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'venv')], check=True)
    python = str(next((tmp_path / 'venv').glob('[bS]*/python*')))
    site = subprocess.check_output([python, '-c', 'import site; print(site.getsitepackages()[-1])'], text=True)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith('/METADATA'))
        requirements = BytesParser().parsebytes(archive.read(metadata)).get_all('Requires-Dist')
    for requirement in map(Requirement, requirements):
        if requirement.marker is None:  # not of an extra
            oldest = next((bound.version for bound in requirement.specifier), '0.1')
            folder = Path(site.strip()) / f'{requirement.name}-{oldest}.dist-info'
            folder.mkdir()
            (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {oldest}\n')
    install = ['install', '--dry-run', '--quiet', '--no-index', '--report', '-', str(wheel)]
    report = json.loads(subprocess.check_output([*PIP, '--python', python, *install]))
    assert [item['metadata']['name'] for item in report['install']] == ['timm-sknet']
