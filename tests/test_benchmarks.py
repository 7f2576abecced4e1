"""The benchmarks run, they compare the intended networks, and RESULTS.md is generated from results.json."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


def run(program, *args):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / program, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('case', ['eval', 'train'])
def test_speed_compares_outputs_and_keeps_a_row_for_each_network(tmp_path, case):
    out = tmp_path / 'rows.json'
    shown = run('speed.py', '--size', 64, '--batch', 2, '--rounds', 3, '--warmup', 1, '--case', case, '--out', out)
    rows = {row['contender']: row for row in json.loads(out.read_text())}
    suffixes = ('', ' checkpointed') if case == 'train' else ('', ' folded')
    for name in 'timm_sknet', 'attention-free', 'timm ResNeXt', 'timm SK':
        for suffix in suffixes:
            assert rows[name + suffix]['least'] > 0 and f'| {name}{suffix} |' in shown
    assert ('timm_sknet memory-efficient' in rows) == (case == 'train')
    there, back = rows['timm_sknet']['speed over'], rows['timm SK']['speed over']
    assert there['timm SK'] * back['timm_sknet'] == pytest.approx(1)  # medians over an odd number of rounds


@pytest.mark.slow
def test_speed_of_exported_graphs(tmp_path):
    out = tmp_path / 'rows.json'
    for _ in range(2):  # the second replaces the rows of the first
        run('speed.py', '--model', 'sknet12', '--size', 32, '--batch', 2, '--rounds', 2, '--case', 'onnx', '--out', out)
    rows = {row['contender']: row for row in json.loads(out.read_text())}
    assert len(rows) == len(json.loads(out.read_text()))
    assert set(rows) == {'timm_sknet folded', 'attention-free folded', 'one branch folded'}
    assert all(row['machine']['onnxruntime'] for row in rows.values())


@pytest.mark.slow
def test_memory_of_each_network_as_it_is_and_checkpointed(tmp_path):
    out = tmp_path / 'rows.json'
    run('memory.py', '--size', 64, '--batch', 16, '--out', out)
    rows = {row['contender']: row for row in json.loads(out.read_text())}
    order = 'timm ResNeXt', 'timm_sknet memory-efficient', 'timm_sknet', 'timm SK'
    assert sorted(order, key=lambda name: rows[name]['saved']) == list(order)
    for row in rows.values():
        assert row['peak'] > row.get('saved', 0) > 0 or 'checkpointed' in row['contender']
    assert rows['timm_sknet checkpointed']['peak'] < rows['timm_sknet']['peak']


@pytest.mark.slow
def test_scaling_counts_what_it_times(tmp_path):
    out = tmp_path / 'rows.json'
    shown = run('scaling.py', '--rounds', 1, '--warmup', 0, '--out', out)
    assert shown.count('| batch |') == 6 + 1  # six points and their exponent
    rows = {tuple(row['place'].values()): row for row in json.loads(out.read_text())}
    assert rows[224, 1, 2]['macs'] == pytest.approx(4.463e9, rel=0.005)
    assert rows[224, 8, 2]['macs'] == 8 * rows[224, 1, 2]['macs']
    assert rows[224, 8, 1]['macs'] < rows[224, 8, 2]['macs'] < rows[224, 8, 3]['macs']


@pytest.mark.slow
@pytest.mark.parametrize('part', ['check', 'measure', 'train'])
def test_every_command_for_the_gpu_runs(cifar, tmp_path, part):
    if part == 'train' and 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("set TIMM_SCRIPTS to a folder with timm's scripts")
    env = os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'CIFAR': str(cifar)}
    env |= {'CLASSES': '10', 'EPOCHS': '1', 'SECONDS_LEFT': '500'}
    done = subprocess.run(
        [BENCHMARKS / 'gpu.sh', '--rehearse', part, tmp_path], env=env, stdout=subprocess.PIPE, text=True, timeout=600
    )
    assert done.returncode == 0 and '\n! ' not in done.stdout, done.stdout
    if part == 'measure':
        cases = [row['settings']['case'] for row in json.loads((tmp_path / 'results.json').read_text())]
        assert set(cases) == {'eval', 'parts eval', 'train', 'parts train', 'memory', 'compiled', 'convolutions'}
    if part == 'train':
        assert (tmp_path / 'weights' / 'model.safetensors').exists() and (tmp_path / 'result.json').exists()


@pytest.mark.parametrize('results, page', [('results.json', 'RESULTS.md'), ('results_gpu.json', 'RESULTS_GPU.md')])
def test_the_report_is_generated_from_the_results(results, page, tmp_path):
    run('report.py', BENCHMARKS / results, tmp_path / page)
    shown = (tmp_path / page).read_text()
    assert shown == (BENCHMARKS / page).read_text()
    for picture in re.findall(r'\]\((.*\.png)\)', shown):
        assert (tmp_path / picture).stat().st_size > 10_000 and (BENCHMARKS / picture).exists()
    summary = shown.split('## In short')[1].split('##')[0].strip()
    assert summary in (BENCHMARKS.parent / 'docs' / 'speed.md').read_text()


@pytest.mark.parametrize(
    'argv, complaint',
    [
        (['speed.py', '--only', 'nosuch'], "must be timm_sknet and any of ['attention-free'"),
        (['speed.py', '--model', 'resnet18'], "invalid choice: 'resnet18'"),
        (['memory.py', '--batch', '0'], "must be a whole number of at least 1, got '0'"),
        (['scaling.py', '--out', 'nowhere/rows.json'], "the folder 'nowhere' does not exist, create it first"),
        (['report.py', __file__, 'RESULTS.md'], 'is not a results file written by a benchmark with --out'),
    ],
    ids=lambda value: '' if isinstance(value, str) else ' '.join(value[:2]),
)
def test_bad_arguments_are_named(tmp_path, argv, complaint):
    program, *rest = argv
    done = subprocess.run(
        [sys.executable, BENCHMARKS / program, *rest], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and complaint in done.stderr and 'Traceback' not in done.stderr


def test_a_report_of_some_networks_leaves_the_rest_out(tmp_path):
    rows = [row for row in json.loads((BENCHMARKS / 'results.json').read_text()) if row['settings']['case'] == 'bf16']
    (tmp_path / 'rows.json').write_text(json.dumps(rows[:3]))
    run('report.py', tmp_path / 'rows.json', tmp_path / 'some.md')
    shown = (tmp_path / 'some.md').read_text()
    assert '| bf16 autocast | channels_last | 8 | timm SK |' in shown and '| compiled |' not in shown
