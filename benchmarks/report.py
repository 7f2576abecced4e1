"""Writes RESULTS.md and its pictures from what the benchmarks have measured.

python benchmarks/report.py benchmarks/results.json benchmarks/RESULTS.md
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import memory
import numpy as np
import scaling
import speed
from measure import markdown

Row = Dict[str, Any]
COLOURS = {'timm_sknet': '#0072b2', 'attention-free': '#999999', 'timm SK': '#d55e00', 'pytorchcv': '#009e73'}


class Target(NamedTuple):
    """What is to be reached: the speed of a contender over that of another, at given settings of `sknet50`."""

    what: str
    case: str
    layout: str
    batch: int
    mine: str
    theirs: str
    least: float


FOLDED, SK, FREE = 'timm_sknet folded', 'timm SK', 'attention-free'
TARGETS = [
    Target('inference', 'eval', 'channels_last', 8, 'timm_sknet', SK, 1.30),
    Target('inference, folded', 'eval', 'channels_last', 8, FOLDED, SK, 1.45),
    Target('inference, folded', 'eval', 'channels_last', 8, FOLDED, 'timm ResNeXt folded', 0.88),
    Target('inference, folded', 'eval', 'channels_last', 8, FOLDED, f'{FREE} folded', 0.95),
    Target('inference', 'eval', 'NCHW', 8, 'timm_sknet', SK, 1.08),
    Target('inference, folded', 'eval', 'NCHW', 8, FOLDED, SK, 1.12),
    Target('inference, folded', 'eval', 'NCHW', 1, FOLDED, SK, 1.03),
    Target('inference, folded', 'eval', 'NCHW', 1, FOLDED, f'{FREE} folded', 0.95),
    *(
        Target('training step', 'train', layout, 8, 'timm_sknet', *other)
        for layout in ('channels_last', 'NCHW')
        for other in ((FREE, 0.95), (SK, 1.10))
    ),
    *(
        Target(case, case, layout, 8, 'timm_sknet', SK, 1.0)
        for case in ('compiled', 'compiled train')
        for layout in ('channels_last', 'NCHW')
    ),
    Target('bf16 autocast', 'bf16', 'channels_last', 8, 'timm_sknet', SK, 1.0),
    *(Target('ONNX Runtime, folded', 'onnx', 'NCHW', batch, FOLDED, f'{SK} folded', 1.0) for batch in (8, 1)),
]
# What the README shows: case, layout, contender, and what its rivals' names end in.
SUMMARY = [
    ('inference, channels_last', 'eval', 'channels_last', 'timm_sknet', ''),
    ('inference, channels_last, all folded', 'eval', 'channels_last', FOLDED, ' folded'),
    ('inference, contiguous', 'eval', 'NCHW', 'timm_sknet', ''),
    ('inference, contiguous, all folded', 'eval', 'NCHW', FOLDED, ' folded'),
    ('inference, channels_last, bfloat16 autocast', 'bf16', 'channels_last', 'timm_sknet', ''),
    ('inference, channels_last, compiled', 'compiled', 'channels_last', 'timm_sknet', ''),
    ('ONNX Runtime, all folded', 'onnx', 'NCHW', FOLDED, ' folded'),
    ('training step, channels_last', 'train', 'channels_last', 'timm_sknet', ''),
    ('training step, contiguous', 'train', 'NCHW', 'timm_sknet', ''),
    ('training step, channels_last, compiled', 'compiled train', 'channels_last', 'timm_sknet', ''),
]
MOST_SAVED = 1.10  # activations of a training step, over ResNeXt's
TITLES = {
    'eval': 'Inference',
    'train': 'Training step',
    'compiled': 'Inference under torch.compile',
    'compiled train': 'Training step under torch.compile',
    'bf16': 'Inference under bfloat16 autocast',
    'onnx': 'ONNX Runtime, after --reparam',
    'openvino': 'OpenVINO, the same file',
    'memory': 'Memory of a training step',
    'scaling': 'Cost against image size, batch and number of branches',
}
COMMANDS = {'memory': 'memory.py', 'scaling': 'scaling.py'}


def groups(rows: List[Row]) -> List[List[Row]]:
    """Returns the rows of the same settings together, in the order of `TITLES`; all of scaling as one."""
    found: Dict[str, List[Row]] = {}
    for row in sorted(rows, key=lambda row: row['settings'].get('model') != 'sknet50'):
        key = 'scaling' if row['settings']['case'] == 'scaling' else json.dumps(row['settings'], sort_keys=True)
        found.setdefault(key, []).append(row)
    return sorted(found.values(), key=lambda group: list(TITLES).index(group[0]['settings']['case']))


def ratio(rows: List[Row], target: Target) -> Optional[float]:
    at = {'model': 'sknet50', 'case': target.case, 'layout': target.layout, 'batch': target.batch, 'size': 224}
    mine = [row for row in rows if row['settings'] == at and row['contender'] == target.mine]
    return mine[0]['speed over'][target.theirs] if mine else None


def targets(rows: List[Row]) -> str:
    lines = [['`sknet50`, 224x224', 'layout', 'batch', 'speed over', 'target', 'measured', 'reached']]
    for target in TARGETS:
        value = ratio(rows, target)
        cells = ['', ''] if value is None else [f'{value:.2f}', 'yes' if value >= target.least else 'no']
        lines.append(
            [target.what, target.layout, str(target.batch), target.theirs, f'>= {target.least:.2f}', *cells],
        )
    saved = {row['contender']: row.get('saved') for row in rows if row['settings']['case'] == 'memory'}
    if saved:
        value = saved['timm_sknet'] / saved['timm ResNeXt']
        reached = 'yes' if value <= MOST_SAVED else 'no'
        lines.append(
            ['saved activations', 'channels_last', '8', 'timm ResNeXt', f'<= {MOST_SAVED:.2f}', f'{value:.3f}', reached]
        )
    return markdown(lines)


def summary(rows: List[Row]) -> str:
    """Returns the few figures that the README shows too."""
    lines = [['`sknet50`, 224x224, batch 8', "speed over timm's SK", 'over ResNeXt-50 32x4d']]
    for what, case, layout, mine, theirs in SUMMARY:
        at = Target('', case, layout, 8, mine, '', 0)
        ratios = [ratio(rows, at._replace(theirs=other + theirs)) for other in (SK, 'timm ResNeXt')]
        lines.append([what, *('' if value is None else f'{value:.2f}' for value in ratios)])
    saved = {row['contender']: row.get('saved') for row in rows if row['settings']['case'] == 'memory'}
    if saved:
        ratios = [saved['timm_sknet'] / saved[other] for other in (SK, 'timm ResNeXt')]
        lines.append(['memory kept for backward (less is better)', *(f'{value:.2f}' for value in ratios)])
    return markdown(lines)


def command(settings: Dict[str, Any]) -> str:
    program = COMMANDS.get(settings['case'], 'speed.py')
    options = {k: v for k, v in settings.items() if k != 'curve' and (k != 'case' or program == 'speed.py')}
    return ' '.join([program, *(f'--{k} {v!r}' if ' ' in str(v) else f'--{k} {v}' for k, v in options.items())])


def draw_speed(rows: List[Row], file: Path) -> None:
    """Bars: the speed of each network over that of ResNeXt-50 in the same run, folded where it is inference."""
    cases = [
        ('eval', '', ' folded'),
        ('compiled', ', compiled', ' folded'),
        ('train', '', ''),
        ('compiled train', '', ''),
    ]
    bars = []
    for case, _, suffix in cases:
        for layout in 'channels_last', 'NCHW':
            at = {'model': 'sknet50', 'case': case, 'layout': layout, 'batch': 8, 'size': 224}
            mine = {row['contender']: row for row in rows if row['settings'] == at}
            if mine:
                values = [
                    mine[name + suffix]['speed over']['timm ResNeXt' + suffix] if name + suffix in mine else np.nan
                    for name in COLOURS
                ]
                bars.append((f'{TITLES[case]}{", folded" if suffix else ""}\n{layout}, batch 8', values))
    fig, ax = plt.subplots(figsize=(8, 0.5 + 0.85 * len(bars)), layout='constrained')
    height = 0.8 / len(COLOURS)
    for j, (name, colour) in enumerate(COLOURS.items()):
        places = [i + j * height for i in range(len(bars))]
        values = [values[j] for _, values in bars]
        ax.barh(places, values, height * 0.9, color=colour, label=name)
        for place, value in zip(places, values):
            if not np.isnan(value):
                ax.text(value + 0.005, place, f'{value:.2f}', va='center', fontsize=7)
    ax.axvline(1, color='black', lw=1, ls='--')
    ax.set_yticks([i + 0.3 for i in range(len(bars))], [label for label, _ in bars], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel('speed over that of ResNeXt-50 32x4d in the same run (dashed: 1)')
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(loc='outside upper center', ncols=len(COLOURS), frameon=False)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_scaling(rows: List[Row], file: Path) -> None:
    """Curves: time over multiply-accumulates, both logarithmic, with a line of slope 1."""
    curves = list(dict.fromkeys(row['settings']['curve'] for row in rows))
    titles = {'size': 'image size, batch 1', 'batch': 'batch, 224x224', 'M': 'branches M, batch 8'}
    fig, axes = plt.subplots(1, len(curves), figsize=(10, 3.4), layout='constrained', squeeze=False)
    for ax, curve in zip(axes[0], curves):
        mine = [row for row in rows if row['settings']['curve'] == curve]
        x = np.array([row['macs'] / 1e9 for row in mine])
        low, y, high = (np.array([1e3 * row['quartiles'][i] for row in mine]) for i in range(3))
        ax.plot(x, y[-1] * x / x[-1], color='#999999', ls='--', label='as the MACs')
        ax.errorbar(x, y, yerr=(y - low, high - y), color=COLOURS['timm_sknet'], marker='o', capsize=3)
        for row, px, py in zip(mine, x, y):
            ax.annotate(
                row['place'][curve], (px, py), textcoords='offset points', xytext=(-6, 7), ha='center', fontsize=8
            )
        ax.set(xscale='log', yscale='log', xlabel='GMACs', ylabel='ms', title=titles[curve])
        ax.margins(0.12)
        ax.text(0.95, 0.06, f'exponent {scaling.exponent(mine):.2f}', transform=ax.transAxes, ha='right')
        for axis in ax.xaxis, ax.yaxis:
            axis.set_major_formatter('{x:g}')
            axis.set_minor_formatter('')
        ticks = {ax.set_xticks: x, ax.set_yticks: y}
        for put, values in ticks.items():
            ends = [float(f'{v:.2g}') for v in (values[0], (values[0] * values[-1]) ** 0.5, values[-1])]
            put(ends)
        ax.legend(loc='upper left', frameon=False, fontsize=8)
        ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def report(rows: List[Row], name: str) -> str:
    machines = Counter(json.dumps(row['machine'], sort_keys=True) for row in rows)
    parts = [
        '# Results',
        'Written by `benchmarks/report.py` from `results.json`; `benchmarks/run.sh` measures it all again. Times are '
        'medians over rounds in which every network runs once in the same process; ratios are taken within a round, '
        'and their median is shown: 1.10 over another network is 1.10 times its speed. Networks that are the same '
        '(timm_sknet, timm SK, pytorchcv) have the same weights, and their outputs are compared before they are timed. '
        '"attention-free" is the same network with V = U_1 + U_2, which no SK convolution of these branches can beat. '
        'holocron (pylocron) is another network: 35M parameters, sigmoid before the softmax, 10 classes.',
        *(f'Machine: {", ".join(f"{k} {v}" for k, v in json.loads(m).items() if v)}.' for m in machines),
        f'## In short\n\n{summary(rows)}',
        f'## Targets\n\n{targets(rows)}',
        f'![Speed over ResNeXt-50]({name}_speed.png)',
    ]
    title = ''
    for group in groups(rows):
        settings = group[0]['settings']
        if TITLES[settings['case']] != title:
            title = TITLES[settings['case']]
            parts.append(f'## {title}')
        if settings['case'] == 'scaling':
            parts += [f'`scaling.py --layout {settings["layout"]}`', scaling.table(group)]
            parts.append(f'![Cost against size, batch and branches]({name}_scaling.png)')
        else:
            parts += [f'`{command(settings)}`', (memory if settings['case'] == 'memory' else speed).table(group)]
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())
    draw_speed(rows, args.out.with_name(f'{args.out.stem}_speed.png'))
    scaled = [row for row in rows if row['settings']['case'] == 'scaling']
    if scaled:
        draw_scaling(scaled, args.out.with_name(f'{args.out.stem}_scaling.png'))
    unfinished = args.out.with_suffix('.unfinished')
    unfinished.write_text(report(rows, args.out.stem))
    os.replace(unfinished, args.out)


if __name__ == '__main__':
    main()
