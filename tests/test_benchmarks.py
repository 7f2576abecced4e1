"""The benchmarks run, on networks that are what they are said to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = Path(__file__).parents[1] / 'benchmarks' / 'speed.py'


@pytest.mark.slow
@pytest.mark.parametrize('case', ['eval', 'train'])
def test_speed_compares_outputs_and_keeps_a_row_for_each_network(tmp_path, case):
    out = tmp_path / 'rows.json'
    command = [SPEED, '--size', 64, '--batch', 2, '--rounds', 2, '--warmup', 1, '--case', case, '--out', out]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row['contender']: row for row in json.loads(out.read_text())}
    suffixes = ('',) if case == 'train' else ('', ' folded')
    for name in 'timm_sknet', 'attention-free', 'timm ResNeXt', 'timm SK':
        for suffix in suffixes:
            assert rows[name + suffix]['least'] > 0 and f'| {name}{suffix} |' in done.stdout
    there, back = rows['timm_sknet']['speed over'], rows['timm SK']['speed over']
    assert 0.5 < there['timm SK'] * back['timm_sknet'] < 2
