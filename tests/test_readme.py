"""README, docs and notebook: the examples run, the commands parse, the tables and links are right."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_sknet.cli import _parser, main
from timm_sknet.predict import PHOTOS
from timm_sknet.sknets import model_cfgs, weights
from timm_sknet.table import model_table

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', *DOCS]
README, MODELS, ATTENTION, INTEGRATIONS, SPEED = (
    (ROOT / name).read_text()
    for name in ('README.md', 'docs/models.md', 'docs/attention.md', 'docs/integrations.md', 'docs/speed.md')
)
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
FROM_THE_HUB = re.compile(r"'sknet50(\.ra_in1k)?', pretrained=True|from_pretrained\('sknet50'|'hf-hub:")
pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def code_blocks(text, language):
    return [block for found, block in BLOCK.findall(text) if found == language]


def commands(text):
    """Yields every command line of timm-sknet: in code blocks, in $(...) and in inline code."""
    for block in code_blocks(text, ''):
        yield from re.findall(r'^timm-sknet .*', block.replace('\\\n', ' '), re.MULTILINE)
    yield from re.findall(r'\$\((timm-sknet [^)]*)\)', text)
    yield from re.findall(r'`(timm-sknet\s[^`]*)`', BLOCK.sub('', text))


def check_name(name):
    if not name.startswith(('local-dir:', 'hf-hub:')):
        assert name in timm.list_models() or name in timm.list_pretrained()


@pytest.fixture(scope='module')
def rows():
    return model_table()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the files that the examples name: a photograph, and converted weights (of a smaller network)."""
    folder = tmp_path_factory.mktemp('examples')
    shutil.copy(PHOTOS / 'cat.jpg', folder / 'photo.jpg')
    file = weights['sknet12.cifar10'].cfg['file']
    assert main(['convert', file, str(folder / 'sknet101'), '--arch', 'sknet12']) == 0
    return folder


@pages
def test_python_examples_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in code_blocks(page.read_text(), 'python'):
        code = compile(block, page.name, 'exec')
        for name in re.findall(r"(?:create_model|from_pretrained)\('([^']+)'", block):
            check_name(name)
        if not FROM_THE_HUB.search(block):
            exec(code, names)


@pages
def test_commands_are_accepted_by_the_parser(page, capsys):
    for command in commands(page.read_text()):
        argv = shlex.split(command, comments=True)[1:]
        if len(argv) == 1 and argv[0] not in ('predict', 'models', 'recipe'):  # the name of a command that takes more
            argv.append('--help')
            with pytest.raises(SystemExit, match='^0$'):
                _parser().parse_args(argv)
            continue
        args = vars(_parser().parse_args(argv))
        for name in args.get('model'), args.get('arch'):
            if name not in (None, 'NAME'):
                check_name(name)
        if argv[0] == 'recipe':
            assert main(argv) == 0, command
    capsys.readouterr()


@pages
def test_models_given_to_timms_scripts_exist(page):
    for name in re.findall(r'^ *(?:python|torchrun) .*? --model (\S+)', page.read_text(), re.MULTILINE):
        check_name(name)


@pytest.mark.parametrize(
    'name',
    [*(page.relative_to(ROOT) for page in PAGES), 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/RESULTS.md'],
    ids=str,
)
def test_links_lead_to_files_and_headings(name):
    page = ROOT / name
    for link in re.findall(r'\]\(([^)\s]+)\)', BLOCK.sub('', page.read_text())):
        if link.startswith('https://'):
            continue
        target, _, anchor = link.partition('#')
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r'^#+ (.*)', BLOCK.sub('', file.read_text()), re.MULTILINE)
            assert anchor in [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings], link


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 170
    for page in DOCS:
        assert f'](docs/{page.name})' in README
        assert re.match(r'# .+\n\nFor users who ', page.read_text())  # for whom the page is


def test_the_first_example_prints_what_the_readme_shows(capsys):
    block, printed = re.search(r'```python\n(.*?)```\n\n```\n(.*?)```', README, re.DOTALL).groups()
    exec(block, {})
    out = capsys.readouterr().out
    row = re.compile(r'^ *([\d.]+)% (.+)$', re.MULTILINE)
    found, shown = row.findall(out), row.findall(printed)
    assert len(shown) == 3 and [label for _, label in found] == [label for _, label in shown]
    assert [float(p) for p, _ in found] == pytest.approx([float(p) for p, _ in shown], abs=0.2)


def test_the_table_of_models_is_the_commands(capsys, monkeypatch, rows):
    monkeypatch.setattr('timm_sknet.cli.model_table', lambda: rows)  # it takes seconds
    assert main(['models', '--markdown']) == 0
    out = capsys.readouterr().out
    docs = re.search(r'<!-- timm-sknet models --markdown -->\n(.*?)<!-- end -->', MODELS, re.DOTALL)[1]
    assert docs.replace('](../', '](') == out, 'replace the tables by the output of `timm-sknet models --markdown`'
    readme = re.search(r'<!-- timm-sknet models --markdown, first table -->\n(.*?)<!-- end -->', README, re.DOTALL)[1]
    assert readme in out and len(readme.splitlines()) == 2 + 12, 'replace the table by the first one of the output'


def test_the_tables_hold_all_weights_and_networks_once(rows):
    names = [row.name for row in rows]
    assert sorted(names) == sorted(name if entry.source else name.split('.')[0] for name, entry in weights.items())
    assert {name.split('.')[0] for name in names} == set(model_cfgs)
    by_name = [row.name for row in rows if row.source in ('the Hub', 'the package')]
    assert sorted(by_name) == sorted(name for name in timm.list_pretrained('sk*') if name.split('.')[0] in model_cfgs)
    for row in rows:
        assert bool(row.link) == bool(row.source)
        if row.source == 'the Hub':
            assert row.link == f'https://huggingface.co/{weights[row.name].cfg["hf_hub_id"]}'
            assert row.licence == 'apache-2.0'


def test_the_table_counts_the_whole_network(rows):
    for row in rows:
        if row.name.split('.')[0] in ('sknet26', 'sknet12', 'sk_shufflenetv2_x0_5', 'sk_resnet50x1_simclr'):
            model = timm.create_model(row.name, device='meta').eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, *row.size, device='meta'))
            assert row.parameters == sum(p.numel() for p in model.parameters())
            assert row.gmacs == counter.get_total_flops() / 2e9


def test_the_readme_names_every_model(rows):
    for model in {row.name.split('.')[0] for row in rows}:
        assert re.search(rf'`{model}[.`]', README), model


def test_examples_of_arguments_run():
    block = re.search(r"```python\nimport timm\n\n(timm\.create_model\('sknet50', b.*?)```", MODELS, re.DOTALL)[1]
    lines = block.strip().splitlines()
    assert len(lines) == 4
    with torch.device('meta'):
        for line in lines:
            assert eval(line, {'timm': timm}).num_classes == 1000


def test_the_layer_of_the_readme_runs():
    block = re.search(r'```python\n(from timm_sknet import SelectiveKernelConv.*?)```', README, re.DOTALL)[1]
    names = {}
    exec(block, names)
    assert names['layer'](torch.zeros(2, 128, 8, 8)).shape == (2, 256, 4, 4)


def test_the_attention_of_the_docs_is_recorded(capsys):
    block = re.search(r'```python\n([^`]*?from timm_sknet.attention import record.*?)```', ATTENTION, re.DOTALL)[1]
    names = {}
    exec(block, names)
    assert names['units']['SK_3_2'].mean.shape == (2, 32) and 'tensor' in capsys.readouterr().out


def test_versions_shown_are_those_that_the_tests_install():
    pins = dict(re.findall(r'^([\w-]+)==(\S+)', (ROOT / 'constraints.txt').read_text(), re.MULTILINE))
    pins |= {'Lightning': pins['lightning'], 'ONNX Runtime': pins['onnxruntime']}
    parts = ['`torch.export`', '`torch.compile`', 'AOTInductor', '`torchrun`', 'FSDP2', 'SyncBN']
    pins |= dict.fromkeys(parts, pins['torch'])
    section = INTEGRATIONS.split('## Works with')[1].split('\n## ')[0]
    rows = re.findall(r'^\| (.*?) \| ([\d.]+) \| ', section, re.MULTILINE)
    assert len(rows) >= 10
    for where, version in rows:
        assert pins[where] == version, where
    assert f'torch {pins["torch"]} and timm {pins["timm"]}' in section


def test_every_integration_has_the_test_that_its_row_names():
    tests = (ROOT / 'tests' / 'test_ecosystem.py').read_text()
    named = re.findall(r'\[`(test_\w+)', INTEGRATIONS)
    assert len(named) >= 10
    for name in named:
        assert f'\ndef {name}' in tests


def test_the_figures_of_speed_are_those_of_the_benchmarks():
    for page in 'RESULTS.md', 'RESULTS_GPU.md':
        results = (ROOT / 'benchmarks' / page).read_text()
        summary = results.split('## In short')[1].split('##')[0].strip()
        assert f'<!-- benchmarks/{page}, In short -->\n{summary}\n<!-- end -->' in SPEED
    rows = re.search(r'<!-- benchmarks/RESULTS_GPU.md, three rows .*? -->\n(.*?)<!-- end -->', README, re.DOTALL)[1]
    assert len(rows.splitlines()) == 2 + 3 and set(rows.splitlines()) <= set(summary.splitlines())


def test_the_notebook_runs_without_a_network_and_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')

    def refuse(*args):
        raise OSError('The notebook must not need a network.')

    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / 'examples' / 'quickstart.ipynb').read_text())
    names = {}
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), 'quickstart.ipynb', 'exec'), names)
            shown = [line for output in cell['outputs'] for line in output.get('text', ())]
            assert _words(capsys.readouterr().out) == _words(''.join(shown))
    assert names['losses'][-1] < names['losses'][0] / 2
    assert (tmp_path / 'attention.png').stat().st_size > 10_000


def _words(text):
    """Returns the text without its figures, which depend on the versions of torch and the machine."""
    return re.sub(r' *[\d.]+', '#', text)
