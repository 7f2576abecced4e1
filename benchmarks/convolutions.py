"""Times the convolutions of an SKNet-50, one of each kind for each stage. They limit its speed.

    python benchmarks/convolutions.py --batch 8 --out results.json

"5x5" computes both branches exactly, as one grouped convolution with 2C outputs whose weights are mostly zeros.
"16 groups" computes one branch exactly, with half the groups and zeros in between. Both need more arithmetic, in fewer
and larger pieces.
"""

import argparse
from typing import Any, Callable, Dict, List

import torch
from measure import LAYOUTS, device, inference, interleaved, keep, macs, markdown, options, quartiles, ratio
from torch import nn

STAGES = [(128, 56), (256, 28), (512, 14), (1024, 7)]  # channels and size of the SK convolutions' maps
KINDS: Dict[str, Callable[[int], nn.Module]] = {
    '1x1': lambda C: nn.Conv2d(C, C, 1),
    '3x3': lambda C: nn.Conv2d(C, C, 3, padding=1, groups=32),
    '3x3 dilated': lambda C: nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=32),
    '5x5': lambda C: nn.Conv2d(C, 2 * C, 5, padding=2, groups=32),
    '16 groups': lambda C: nn.Conv2d(C, C, 3, padding=1, groups=16),
}
PLAIN = '1x1', '3x3', '3x3 dilated'


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    rows = []
    layout = LAYOUTS[args.layout]
    for stage, (C, size) in enumerate(STAGES):
        x = torch.randn(args.batch, C, size, size, device=device()).contiguous(memory_format=layout)
        runs = {kind: inference(make(C).to(device=device(), memory_format=layout), x) for kind, make in KINDS.items()}
        times = interleaved(runs, args.rounds, args.warmup, args.repeats)
        both = [a + b for a, b in zip(times['3x3'], times['3x3 dilated'])]
        rows.append(
            {
                'settings': {'case': 'convolutions', 'layout': args.layout, 'batch': args.batch},
                'place': {'stage': stage, 'C': C, 'size': size},
                'run': {key: getattr(args, key) for key in ('rounds', 'warmup', 'repeats')},
                'macs per second': {kind: macs(runs[kind]) / quartiles(times[kind])[1] for kind in PLAIN},
                'speed over': {'5x5': ratio(both, times['5x5']), '16 groups': ratio(times['3x3'], times['16 groups'])},
            }
        )
    return rows


def table(rows: List[Dict[str, Any]]) -> str:
    lines = [['map', *(f'{kind}, GMAC/s' for kind in PLAIN), 'one 5x5 over both 3x3', '16 groups over 32']]
    for row in rows:
        C, size = (row['place'][key] for key in ('C', 'size'))
        speeds = [f'{speed / 1e9:.0f}' for speed in row['macs per second'].values()]
        lines.append([f'{C}x{size}x{size}', *speeds, *(f'{value:.2f}' for value in row['speed over'].values())])
    return markdown(lines)


def main() -> None:
    args = options(__doc__, batch=8, rounds=20, warmup=3, repeats=5).parse_args()
    rows = measure(args)
    print(table(rows))
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
