"""Measures how the time of SKNet-50 grows with image size, batch and number of branches, compared with its MACs.

    python benchmarks/scaling.py --out results.json

The networks are folded, for inference. The exponent is the slope of log time over log MACs: with 1, time grows in
proportion to the arithmetic. Each point is compared with the attention-free network, which is the lower limit of the
time, and with the same network in the other layout.
"""

import argparse
from typing import Any, Dict, List, Tuple

import numpy as np
from contenders import folded, ours
from measure import LAYOUTS, device, images, inference, interleaved, keep, macs, markdown, options, quartiles, ratio
from torch import nn

SIZES = 128, 160, 224, 320, 448, 512
BATCHES = 1, 2, 4, 8, 16, 32
BRANCHES = [[3, 1, 32], [3, 2, 32], [3, 3, 32]]


def points() -> Dict[str, List[Tuple[int, int, int]]]:
    """Returns the (size, batch, M) of each curve."""
    return {
        'size': [(size, 1, 2) for size in SIZES],
        'batch': [(224, batch, 2) for batch in BATCHES],
        'M': [(224, 8, M) for M in (1, 2, 3)],
    }


def network(M: int, layout: str, **kwargs: Any) -> nn.Module:
    model = folded(ours('sknet50', branches=BRANCHES[:M], **kwargs))
    return model.to(device=device(), memory_format=LAYOUTS[layout])


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    other = next(layout for layout in LAYOUTS if layout != args.layout)
    models = {
        M: {
            'mine': (network(M, args.layout), args.layout),
            'attention-free': (network(M, args.layout, attention=False), args.layout),
            other: (network(M, other), other),
        }
        for M in (1, 2, 3)
    }
    rows = []
    for curve, places in points().items():
        runs = {
            f'{name} {size, batch, M}': inference(model, images(batch, size, layout))
            for size, batch, M in places
            for name, (model, layout) in models[M].items()
        }
        times = interleaved(runs, args.rounds, args.warmup)
        for place in places:
            size, batch, M = place
            mine, *others = (times[f'{name} {place}'] for name in models[M])
            rows.append(
                {
                    'settings': {'case': 'scaling', 'curve': curve, 'layout': args.layout},
                    'place': {'size': size, 'batch': batch, 'M': M},
                    'run': {key: getattr(args, key) for key in ('rounds', 'warmup')},
                    'macs': macs(runs[f'mine {place}']),
                    'quartiles': quartiles(mine),
                    'floor': quartiles(others[0])[1],
                    'speed over': {'attention-free': ratio(others[0], mine), other: ratio(others[1], mine)},
                }
            )
    return rows


def exponent(rows: List[Dict[str, Any]], floor: bool = False) -> float:
    """Returns the exponent of the time over the MACs; with `floor`, of the time of the attention-free network."""
    y = [row['floor'] if floor else row['quartiles'][1] for row in rows]
    return float(np.polyfit(np.log([row['macs'] for row in rows]), np.log(y), 1)[0])


def table(rows: List[Dict[str, Any]]) -> str:
    lines = [['curve', 'at', 'GMACs', 'ms', *(f'over {name}' for name in rows[0]['speed over'])]]
    for row in rows:
        curve = row['settings']['curve']
        ratios = [f'{value:.2f}' for value in row['speed over'].values()]
        lines.append(
            [curve, str(row['place'][curve]), f'{row["macs"] / 1e9:.2f}', f'{1e3 * row["quartiles"][1]:.1f}', *ratios]
        )
    return markdown(lines)


def exponents(rows: List[Dict[str, Any]]) -> str:
    lines = [['curve', 'exponent', 'of attention-free']]
    for curve in dict.fromkeys(row['settings']['curve'] for row in rows):
        mine = [row for row in rows if row['settings']['curve'] == curve]
        lines.append([curve, f'{exponent(mine):.2f}', f'{exponent(mine, floor=True):.2f}'])
    return markdown(lines)


def main() -> None:
    args = options(__doc__, rounds=8, warmup=1).parse_args()
    rows = measure(args)
    print(f'{table(rows)}\n\n{exponents(rows)}')
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
