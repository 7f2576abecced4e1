"""Prints the table of the networks that selection.sh trained.

python benchmarks/selection.py benchmarks/selection.jsonl
"""

import argparse
import ast
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, List

import timm
import torch
from measure import inference, macs, markdown

NETWORKS = {
    'selection': '`sknet12`: 3x3 and dilated 3x3, with attention',
    'sum': 'the same branches, added without attention',
    'one': 'one branch, 3x3',
    'wide': 'one branch, 3x3, with more channels',
    'same': '3x3 and 3x3, with attention',
    'same_sum': '3x3 and 3x3, added without attention',
}
HEADER = (
    'network',
    'parameters',
    'MMACs',
    'runs',
    'training loss',
    'test loss',
    'top-1',
    'standard deviation',
    'difference',
    'standard error',
)


def table(runs: List[Dict[str, Any]]) -> str:
    """Returns a row for each network.

    Losses and the top-1 accuracy, in %, are means over the runs, after the last epoch. The difference is the top-1
    accuracy minus that of `sknet12`, in points, and its standard error is sqrt(s^2 / n + s_0^2 / n_0), with the
    standard deviations s and numbers n of the runs of both networks.
    """
    lines = [HEADER]
    first = [run['top1'] for run in runs if run['network'] == 'selection']
    for network, title in NETWORKS.items():
        found = [run for run in runs if run['network'] == network]
        if not found:
            continue
        top1 = [run['top1'] for run in found]
        kwargs = {key: ast.literal_eval(value) for key, value in (arg.split('=') for arg in found[0]['kwargs'])}
        model = timm.create_model('sknet12', num_classes=found[0]['classes'], **kwargs).eval()
        parameters = sum(p.numel() for p in model.parameters())
        millions = macs(inference(model, torch.zeros(1, 3, 32, 32))) / 1e6
        deviation = difference = error = ''
        if len(top1) > 1:
            deviation = f'{stdev(top1):.2f}'
        if network != 'selection' and first:
            difference = f'{mean(top1) - mean(first):+.2f}'
            if min(len(top1), len(first)) > 1:
                error = f'{(stdev(top1) ** 2 / len(top1) + stdev(first) ** 2 / len(first)) ** 0.5:.2f}'
        size = f'{parameters:,}', f'{millions:.1f}'
        losses = [f'{mean(run[loss] for run in found):.3f}' for loss in ('train_loss', 'eval_loss')]
        lines.append([title, *size, f'{len(top1)}', *losses, f'{mean(top1):.2f}', deviation, difference, error])
    return markdown(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='written by selection.sh')
    print(table([json.loads(line) for line in parser.parse_args().results.read_text().splitlines()]))
