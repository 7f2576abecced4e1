"""How the time of SKNet-50 grows with image size, batch and number of branches, against its multiply-accumulates.

    python benchmarks/scaling.py --out results.json

Inference, folded. The exponent is the slope of log time over log MACs: 1 where time grows as the arithmetic does.
"""

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import timm
import torch
from contenders import folded
from measure import LAYOUTS, images, interleaved, keep, markdown, quartiles
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def run(model: nn.Module, size: int, batch: int, layout: str) -> Callable[[], torch.Tensor]:
    x = images(batch, size, layout)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return model(x)

    return forward


def macs(model: nn.Module, size: int, batch: int, layout: str) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, size, batch, layout)()
    return counter.get_total_flops() // 2


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    models = {
        M: folded(timm.create_model('sknet50', branches=BRANCHES[:M])).to(memory_format=LAYOUTS[args.layout])
        for M in (1, 2, 3)
    }
    rows = []
    for curve, places in points().items():
        runs = {str(place): run(models[place[2]], *place[:2], args.layout) for place in places}
        times = interleaved(runs, args.rounds, args.warmup)
        for size, batch, M in places:
            rows.append(
                {
                    'settings': {'case': 'scaling', 'curve': curve, 'layout': args.layout},
                    'place': {'size': size, 'batch': batch, 'M': M},
                    'macs': macs(models[M], size, batch, args.layout),
                    'rounds': args.rounds,
                    'quartiles': quartiles(times[str((size, batch, M))]),
                }
            )
    return rows


def exponent(rows: List[Dict[str, Any]]) -> float:
    x, y = (np.log([f(row) for row in rows]) for f in (lambda row: row['macs'], lambda row: row['quartiles'][1]))
    return float(np.polyfit(x, y, 1)[0])


def table(rows: List[Dict[str, Any]]) -> str:
    lines = [['curve', 'from', 'to', 'GMACs', 'ms', 'exponent']]
    for curve in dict.fromkeys(row['settings']['curve'] for row in rows):
        mine = [row for row in rows if row['settings']['curve'] == curve]
        ends = mine[0], mine[-1]
        lines.append(
            [
                curve,
                *(str(end['place'][curve]) for end in ends),
                ' to '.join(f'{end["macs"] / 1e9:.2f}' for end in ends),
                ' to '.join(f'{1e3 * end["quartiles"][1]:.0f}' for end in ends),
                f'{exponent(mine):.2f}',
            ]
        )
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layout', choices=LAYOUTS, default='channels_last')
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()

    rows = measure(args)
    print(table(rows))
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
