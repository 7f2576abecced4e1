"""The matched training runs of benchmarks/selection.sh, and their table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
PATH = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'  # of python and timm-sknet


def table(results):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / 'selection.py', results], capture_output=True, text=True, check=True
    )
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines()]


def test_table_compares_the_means(tmp_path):
    wide = ['branches=[[3,1,1]]', 'mid_widths=[22,44,140]']
    runs = [('selection', [], 91.0), ('selection', [], 92.0), ('sum', ['attention=False'], 91.25)]
    runs += [('wide', wide, 90.1), ('wide', wide, 91.3)]
    rest = {'classes': 10, 'train_loss': 0.25, 'eval_loss': 0.5}
    lines = [json.dumps({'network': name, 'kwargs': kwargs, 'top1': top1, **rest}) for name, kwargs, top1 in runs]
    (tmp_path / 'runs.jsonl').write_text('\n'.join(lines))
    header, _, *rows = table(tmp_path / 'runs.jsonl')
    assert header[1:6] == ['parameters', 'MMACs', 'runs', 'training loss', 'test loss']
    assert header[6:] == ['top-1', 'standard deviation', 'difference', 'standard error']
    assert [row[1:] for row in rows] == [
        ['460,186', '44.4', '2', '0.250', '0.500', '91.50', '0.71', '', ''],
        ['446,970', '44.4', '1', '0.250', '0.500', '91.25', '', '-0.25', ''],
        ['460,486', '44.4', '2', '0.250', '0.500', '90.70', '0.85', '-0.80', '0.78'],  # sqrt(.72 / 2 + .5 / 2)
    ]


@pytest.mark.parametrize('results', ['selection.jsonl', 'selection_cifar100.jsonl'])
def test_table_in_the_docs_is_that_of_the_runs(results):
    text = (BENCHMARKS.parent / 'docs' / 'training.md').read_text()
    for row in table(BENCHMARKS / results)[2:]:
        assert f'| {" | ".join(row)} |' in text


@pytest.mark.slow
@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason="set TIMM_SCRIPTS to a folder with timm's scripts")
def test_a_run_gives_one_line_and_is_not_repeated(cifar, tmp_path):
    results = tmp_path / 'runs.jsonl'
    for _ in range(2):
        subprocess.run(
            [BENCHMARKS / 'selection.sh', cifar, results],
            env={**os.environ, 'PATH': PATH, 'SEEDS': '5', 'NETWORKS': 'wide'},
            check=True,
        )
    run = json.loads(results.read_text())
    assert (run['network'], run['seed'], run['kwargs'][0]) == ('wide', 5, 'branches=[[3,1,1]]')
    assert run['top1'] in range(0, 101, 5)  # of 20 images
    assert run['train_loss'] > 0 and run['eval_loss'] > 0
    assert table(results)[2][2:4] == ['44.4', '1']


def test_a_run_uses_the_recipe_and_names_its_log_if_it_fails(tmp_path):
    (tmp_path / 'val').mkdir()
    (tmp_path / 'own.yaml').touch()
    (tmp_path / 'train.py').write_text('import sys\nraise SystemExit(f"no such data {sys.argv}")')
    done = subprocess.run(
        [BENCHMARKS / 'selection.sh', tmp_path, tmp_path / 'runs.jsonl'],
        env={
            **os.environ,
            'PATH': PATH,
            'TIMM_SCRIPTS': str(tmp_path),
            'RECIPE': str(tmp_path / 'own.yaml'),
            'SEEDS': '5',
            'NETWORKS': 'wide',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert 'no such data' in done.stderr and f"'-c', '{tmp_path}/own.yaml'" in done.stderr
    assert f'{tmp_path}/runs.jsonl.runs/wide-5/train.log' in done.stderr
    assert not (tmp_path / 'runs.jsonl').exists()


def test_missing_arguments_print_the_usage():
    done = subprocess.run([BENCHMARKS / 'selection.sh'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('Usage: TIMM_SCRIPTS=FOLDER') and done.stderr.count('\n') == 1
