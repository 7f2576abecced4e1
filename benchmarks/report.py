"""Writes RESULTS.md and its figures from the results of the benchmarks.

python benchmarks/report.py benchmarks/results.json benchmarks/RESULTS.md
python benchmarks/report.py benchmarks/results_gpu.json benchmarks/RESULTS_GPU.md
"""

import argparse
import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import matplotlib

matplotlib.use('Agg')
import convolutions
import matplotlib.pyplot as plt
import memory
import numpy as np
import parts
import scaling
import speed
from contenders import MEMORY_EFFICIENT
from measure import markdown, rows_of, write

Row = Dict[str, Any]
COLOURS = {'timm_sknet': '#0072b2', 'attention-free': '#999999', 'timm SK': '#d55e00', 'pytorchcv': '#009e73'}


class Target(NamedTuple):
    """A target: the least speed of `mine` over `theirs`, with given settings of `sknet50`."""

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
    Target('inference', 'eval', 'NCHW', 8, 'timm_sknet', SK, 1.02),
    Target('inference, folded', 'eval', 'NCHW', 8, FOLDED, SK, 1.09),
    Target('inference, folded', 'eval', 'NCHW', 1, FOLDED, SK, 1.03),
    Target('inference, folded', 'eval', 'NCHW', 1, FOLDED, f'{FREE} folded', 0.95),
    *(
        Target('training step', 'train', layout, 8, 'timm_sknet', *other)
        for layout, over_sk in (('channels_last', 1.25), ('NCHW', 1.00))
        for other in ((FREE, 0.95), (SK, over_sk))
    ),
    *(
        Target(case, case, layout, 8, 'timm_sknet', SK, 1.0)
        for case in ('compiled', 'compiled train')
        for layout in ('channels_last', 'NCHW')
    ),
    Target('bf16 autocast', 'bf16', 'channels_last', 8, 'timm_sknet', SK, 1.0),
    *(Target('ONNX Runtime, folded', 'onnx', 'NCHW', batch, FOLDED, f'{SK} folded', 1.0) for batch in (8, 1)),
    Target('inference', 'eval', 'channels_last', 256, 'timm_sknet', SK, 1.2),
    Target('inference, folded', 'eval', 'channels_last', 256, FOLDED, SK, 1.6),
    Target('inference, folded', 'eval', 'channels_last', 256, FOLDED, 'timm ResNeXt folded', 0.9),
    Target('compiled', 'compiled', 'channels_last', 256, 'timm_sknet', SK, 1.1),
    Target('compiled, folded', 'compiled', 'channels_last', 256, FOLDED, f'{SK} folded', 1.1),
    Target('training step', 'train', 'channels_last', 256, 'timm_sknet', SK, 1.3),
]
# The summary: name, case, layout, network, and the suffix of the networks that it is compared with.
SUMMARY = [
    ('inference, channels_last', 'eval', 'channels_last', 'timm_sknet', ''),
    ('inference, channels_last, ours folded', 'eval', 'channels_last', FOLDED, ''),
    ('inference, channels_last, all folded', 'eval', 'channels_last', FOLDED, ' folded'),
    ('inference, contiguous', 'eval', 'NCHW', 'timm_sknet', ''),
    ('inference, contiguous, ours folded', 'eval', 'NCHW', FOLDED, ''),
    ('inference, contiguous, all folded', 'eval', 'NCHW', FOLDED, ' folded'),
    ('inference, channels_last, bfloat16 autocast', 'bf16', 'channels_last', 'timm_sknet', ''),
    ('inference, channels_last, compiled', 'compiled', 'channels_last', 'timm_sknet', ''),
    ('inference, channels_last, compiled, all folded', 'compiled', 'channels_last', FOLDED, ' folded'),
    ('ONNX Runtime, all folded', 'onnx', 'NCHW', FOLDED, ' folded'),
    ('training step, channels_last', 'train', 'channels_last', 'timm_sknet', ''),
    ('training step, channels_last, `memory_efficient`', 'train', 'channels_last', MEMORY_EFFICIENT, ''),
    ('training step, contiguous', 'train', 'NCHW', 'timm_sknet', ''),
    ('training step, channels_last, compiled', 'compiled train', 'channels_last', 'timm_sknet', ''),
]
MOST_SAVED = 1.10  # target: memory that a training step keeps for backward, relative to ResNeXt
TITLES = {
    'eval': 'Inference',
    'train': 'Training step',
    'compiled': 'Inference under torch.compile',
    'compiled train': 'Training step under torch.compile',
    'bf16': 'Inference under bfloat16 autocast',
    'onnx': 'ONNX Runtime, after --reparam',
    'openvino': 'OpenVINO, the same file',
    'parts eval': 'Parts of an SK unit: inference',
    'parts train': 'Parts of an SK unit: training step',
    'memory': 'Memory of a training step',
    'scaling': 'Cost against image size, batch and number of branches',
    'convolutions': 'Convolutions by themselves',
}
COMMANDS = {
    'parts eval': 'parts.py --case eval',
    'parts train': 'parts.py --case train',
    'memory': 'memory.py',
    'scaling': 'scaling.py',
    'convolutions': 'convolutions.py',
}
TABLES = {
    'parts eval': parts.table,
    'parts train': parts.table,
    'memory': memory.table,
    'scaling': scaling.table,
    'convolutions': convolutions.table,
}
GPU_NOTES = (
    'The networks run under bfloat16 autocast, and the convolutions of the last table in float32 (TF32). The benchmark '
    'mode of cuDNN is on, except for memory. In the tables of parts, the minimum time is in parentheses: the size of '
    'the maps that the part must read and write, over the bandwidth of a large copy ({:.2f} TB/s).'
)


def groups(rows: List[Row]) -> List[List[Row]]:
    """Groups the rows by settings, in the order of `TITLES`. All rows of scaling are one group."""
    found: Dict[str, List[Row]] = {}
    for row in sorted(rows, key=lambda row: row['settings'].get('model') != 'sknet50'):
        key = 'scaling' if row['settings']['case'] == 'scaling' else json.dumps(row['settings'], sort_keys=True)
        found.setdefault(key, []).append(row)
    return sorted(found.values(), key=lambda group: list(TITLES).index(group[0]['settings']['case']))


def on_gpu(rows: List[Row]) -> bool:
    return any(row['machine']['gpu'] for row in rows)


def find(rows: List[Row], contender: str, **settings: Any) -> Row:
    """Returns the row of a network with these settings, or {} if it was not measured."""
    return next((row for row in rows if row['settings'] == settings and row.get('contender') == contender), {})


def ratio(rows: List[Row], target: Target) -> Optional[float]:
    """Returns the measured speed ratio of a target, or None if it was not measured."""
    at = {'model': 'sknet50', 'case': target.case, 'layout': target.layout, 'batch': target.batch, 'size': 224}
    return find(rows, target.mine, **at).get('speed over', {}).get(target.theirs)


def saved_ratio(rows: List[Row], contender: str, other: str) -> Optional[float]:
    """Returns the memory that a training step keeps for backward, relative to another network."""
    batch = 64 if on_gpu(rows) else 8
    at = {'case': 'memory', 'model': 'sknet50', 'layout': 'channels_last', 'batch': batch, 'size': 224}
    mine, theirs = (find(rows, name, **at).get('saved') for name in (contender, other))
    return mine / theirs if mine and theirs else None


def number(value: Optional[float], digits: int = 2) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def targets(rows: List[Row]) -> str:
    lines = [['`sknet50`, 224x224', 'layout', 'batch', 'speed over', 'target', 'measured', 'reached', FREE]]
    for target in TARGETS:
        value = ratio(rows, target)
        if value is None:
            continue
        reached = 'yes' if value >= target.least else 'no'
        least = f'>= {target.least:.2f}'
        limit = ratio(rows, target._replace(mine=target.mine.replace('timm_sknet', FREE)))
        place = [target.what, target.layout, str(target.batch), target.theirs, least]
        lines.append([*place, number(value, 3), reached, number(limit, 3)])
    value = saved_ratio(rows, MEMORY_EFFICIENT, 'timm ResNeXt')
    reached = '' if value is None else 'yes' if value <= MOST_SAVED else 'no'
    memory_of = [
        'saved activations, memory_efficient',
        'channels_last',
        '64' if on_gpu(rows) else '8',
        'timm ResNeXt (bytes)',
        f'<= {MOST_SAVED:.2f}',
    ]
    return markdown([*lines, [*memory_of, number(value, 3), reached, '']])


def summary(rows: List[Row]) -> str:
    """Returns the summary, which the documentation also shows."""
    batch = 256 if on_gpu(rows) else 8
    lines = [[f'speed of `sknet50`, 224x224, batch {batch}', "over timm's SK", 'over ResNeXt-50 32x4d']]
    for what, case, layout, mine, theirs in SUMMARY:
        at = Target('', case, layout, batch, mine, '', 0)
        ratios = [ratio(rows, at._replace(theirs=other + theirs)) for other in (SK, 'timm ResNeXt')]
        if any(ratios):
            lines.append([what, *map(number, ratios)])
    memory_of = []
    for contender in 'timm_sknet', MEMORY_EFFICIENT:
        over = [number(saved_ratio(rows, contender, other)) or '(not measured)' for other in (SK, 'timm ResNeXt')]
        memory_of.append(
            "{} times as much memory for backward as timm's SK, and {} times as much as ResNeXt".format(*over)
        )
    text = 'A training step keeps {}. With `memory_efficient=True`, it keeps {}.'.format(*memory_of)
    return f'{markdown(lines)}\n\n{text}'


def command(row: Row) -> str:
    settings, run = row['settings'], row.get('run', {})
    program = COMMANDS.get(settings['case'], 'speed.py')
    options = {k: v for k, v in settings.items() if k != 'curve' and (k != 'case' or program == 'speed.py')}
    words = program.split()
    for key, value in {**options, **run}.items():
        words += [f'--{key}', *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def bars(rows: List[Row]) -> List[Tuple[str, List[float]]]:
    """Returns labels and values for `draw_speed`. The values are in the order of `COLOURS`, NaN if not measured."""
    found = []
    for case, suffix in ('eval', ' folded'), ('compiled', ' folded'), ('train', ''), ('compiled train', ''):
        for layout in 'channels_last', 'NCHW':
            at = {'model': 'sknet50', 'case': case, 'layout': layout, 'batch': 8, 'size': 224}
            speeds = [find(rows, name + suffix, **at).get('speed over', {}) for name in COLOURS]
            values = [over.get('timm ResNeXt' + suffix, np.nan) for over in speeds]
            if not np.isnan(values).all():
                found.append((f'{TITLES[case]}{", folded" if suffix else ""}\n{layout}, batch 8', values))
    return found


def draw_speed(bars: List[Tuple[str, List[float]]], file: Path) -> None:
    """Draws bars: the speed of each network over ResNeXt-50 in the same run. For inference, all are folded."""
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
    ax.set_xlabel('speed relative to ResNeXt-50 32x4d in the same run (dashed: 1)')
    ax.spines[['top', 'right']].set_visible(False)
    fig.legend(loc='outside upper center', ncols=len(COLOURS), frameon=False)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_scaling(rows: List[Row], file: Path) -> None:
    """Draws curves: time over MACs, on logarithmic axes, with a line of slope 1."""
    curves = list(dict.fromkeys(row['settings']['curve'] for row in rows))
    titles = {'size': 'image size, batch 1', 'batch': 'batch, 224x224', 'M': 'branches M, batch 8'}
    fig, axes = plt.subplots(1, len(curves), figsize=(10, 3.4), layout='constrained', squeeze=False)
    for ax, curve in zip(axes[0], curves):
        mine = [row for row in rows if row['settings']['curve'] == curve]
        x = np.array([row['macs'] / 1e9 for row in mine])
        low, y, high = (np.array([1e3 * row['quartiles'][i] for row in mine]) for i in range(3))
        ax.plot(x, y[-1] * x / x[-1], color='#999999', ls='--', label='as the MACs')
        floor = [1e3 * row['floor'] for row in mine]
        ax.plot(x, floor, color=COLOURS['attention-free'], marker='.', label='attention-free')
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
    gpu = on_gpu(rows)
    copies = next((row['bandwidth'] for row in rows if 'bandwidth' in row), math.nan)
    source, program = ('results_gpu.json', 'gpu.sh measure OUT') if gpu else ('results.json', 'run.sh')
    found = [
        '# Results on a GPU' if gpu else '# Results',
        f'This page is generated by `benchmarks/report.py` from `{source}`. To measure again, run '
        f'`benchmarks/{program}`. In each round, every network runs once in the same process. Times are medians over '
        'the rounds. Ratios are computed within a round, and their median is shown: a ratio of 1.10 over another '
        'network means 1.10 times its speed.',
        '- NCHW is the contiguous layout.\n'
        '- timm_sknet, timm SK and pytorchcv are implementations of the same network. They have the same weights, and '
        'their outputs are compared before they are timed.\n'
        '- "memory-efficient" is timm_sknet with `memory_efficient=True`.\n'
        '- "attention-free" is the same network with V = U_1 + U_2 instead of attention. It is the upper limit for the '
        'speed of an SK network with these branches.\n'
        '- holocron (pylocron) is a different network: 35M parameters, sigmoid before the softmax, 10 classes.',
        *([GPU_NOTES.format(copies / 1e12)] if gpu else []),
        *(f'Machine: {", ".join(f"{k} {v}" for k, v in json.loads(m).items() if v)}.' for m in machines),
        f'## In short\n\n{summary(rows)}',
        f'## Targets\n\n{targets(rows)}',
        'The last column shows the ratio of the attention-free network, which is the limit for any SK network with '
        'these branches. Each additional branch adds a grouped convolution, and a map that must be normalised, '
        'activated and added. This is little arithmetic. But on the largest maps, grouped convolutions run at a '
        'fraction of the speed of 1x1 convolutions (last table). Time therefore grows faster with M than the '
        'multiply-accumulates do, even without attention.',
        'Folding could replace these convolutions exactly by fewer and larger ones. It does not, because this is only '
        'faster where the ratio in the last table is above 1 at every size and batch. The compiler generates the same '
        'loops for every way to write the selection. Tests check that a compiled model is one graph for all batch '
        'sizes, that an exported model has no unnecessary operators, and how many operators and how much memory a unit '
        'needs: `tests/test_costs.py` and `tests/test_memory_efficient.py`.',
    ]
    if bars(rows):
        found.append(f'![Speed over ResNeXt-50]({name}_speed.png)')
    title = ''
    for group in groups(rows):
        case = group[0]['settings']['case']
        if TITLES[case] != title:
            title = TITLES[case]
            found.append(f'## {title}')
        found += [f'`{command(group[0])}`', TABLES.get(case, speed.table)(group), *group[0].get('notes', [])]
        if case == 'scaling':
            found += [scaling.exponents(group), f'![Cost against size, batch and branches]({name}_scaling.png)']
    return '\n\n'.join(found) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=rows_of, help='JSON file written by the benchmarks with --out')
    parser.add_argument('out', type=Path, help='Markdown file; the figures are written to the same folder')
    args = parser.parse_args()
    if args.out.is_dir() or not args.out.parent.is_dir():
        parser.error(f'argument out: must be a file in an existing folder, got {str(args.out)!r}')
    rows = args.results
    if speeds := bars(rows):
        draw_speed(speeds, args.out.with_name(f'{args.out.stem}_speed.png'))
    scaled = [row for row in rows if row['settings']['case'] == 'scaling']
    if scaled:
        draw_scaling(scaled, args.out.with_name(f'{args.out.stem}_scaling.png'))
    write(report(rows, args.out.stem), args.out)


if __name__ == '__main__':
    main()
