"""The names in pyproject.toml are those that our code imports."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
PROJECT = tomllib.loads(TEXT)['project']
# modules whose package has another name
PACKAGES = {'PIL': 'pillow', 'google': 'protobuf', 'pytorch_grad_cam': 'grad-cam'}
BY_NAME = {'import_module', 'importorskip', 'need'}  # functions that import a module by its name
# benchmarks/run.sh installs pylocron (holocron) into a separate folder, tools/integrations.sh the others
SEPARATE = {'holocron', 'executorch', 'litert-torch', 'nncf'}


def names(requirements):
    found = {canonicalize_name(Requirement(text).name) for text in requirements}
    return found - {PROJECT['name']}


def imports(*folders):
    """Returns the packages that the Python files in folders import, without Python's own and without ours."""
    files = [file for folder in folders for file in (ROOT / folder).rglob('*.py')]
    ours = {name for file in files for name in (file.stem, file.parent.name)} | {
        'timm_sknet',
        '_timm_sknet_autoload',
        'theirs',
    }
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                if getattr(node.func, 'attr', getattr(node.func, 'id', '')) in BY_NAME:
                    modules.add(node.args[0].value)
    tops = {str(module).split('.')[0] for module in modules} - ours - {*sys.stdlib_module_names, 'tomllib'}
    return {canonicalize_name(PACKAGES.get(top, top)) for top in tops}


def test_the_package_imports_what_it_declares_and_nothing_else():
    extras = PROJECT['optional-dependencies']
    declared = names([*PROJECT['dependencies'], *extras['convert'], *extras['plot']])
    assert imports('timm_sknet') == declared


def test_tests_benchmarks_and_tools_import_what_the_extras_declare():
    imported = imports('timm_sknet', 'tests', 'benchmarks', 'tools', 'docs') - SEPARATE
    extras = {name for requirements in PROJECT['optional-dependencies'].values() for name in names(requirements)}
    assert imported <= extras | names(PROJECT['dependencies'])
    commented = {name for name in extras if re.search(rf'^ *"{name}\b.*  # \S', TEXT, re.MULTILINE)}
    assert extras - imported <= commented, 'a name that our code does not import needs a comment'


@pytest.mark.parametrize('name', ['torch', 'timm'])
def test_every_bound_is_a_lower_bound_with_a_reason(name):
    bounded = [text for text in PROJECT['dependencies'] if Requirement(text).specifier]
    assert name in names(bounded)
    for text in bounded:
        assert [bound.operator for bound in Requirement(text).specifier] == ['>=']
        assert re.search(rf'"{re.escape(text)}",  # \w', TEXT), f'{text} needs a reason'
    assert PROJECT['requires-python'].startswith('>=') and ',' not in PROJECT['requires-python']


def test_the_classifiers_name_the_versions_of_python_that_make_compat_runs():
    named = {text.split()[-1] for text in PROJECT['classifiers'] if text.startswith('Programming Language :: Python')}
    assert named == set(re.findall(r'\bpython(3\.\d+)', (ROOT / 'Makefile').read_text(encoding='utf-8')))
