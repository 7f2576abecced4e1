"""Times each part of an SK unit in each stage of SKNet-50, compared with the minimum time for its memory traffic.

    python benchmarks/parts.py --case eval --batch 8 --out results.json

The minimum time of a part is the size of the maps that it must read and write, each once, over the bandwidth of a large
copy. Small maps can be faster, because they stay in a cache. In training, a part runs forward and backward. The last
row times the whole unit.
"""

import argparse
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple

import timm
import torch
from measure import LAYOUTS, device, interleaved, keep, markdown, options, quartiles
from torch import Tensor, nn

from timm_sknet.ops import fuse, select


class Part(NamedTuple):
    """A part of the unit: a function of maps, and how many maps of (B, C, H, W) it reads and writes in each pass."""

    run: Callable[..., Tensor]
    inputs: List[Tensor]
    forward: int
    backward: int


def parts(unit: nn.Module, x: Tensor, u: Tensor) -> Dict[str, Part]:
    """Returns the parts of a unit with input x, (B, 2C, H, W), and maps like u, (B, C, H, W), in its SK convolution."""
    narrow, wide = unit.sk.branches
    other = torch.randn_like(u)
    s, a = u.mean((2, 3), keepdim=True), u.new_full((u.shape[0], 2, u.shape[1]), 0.5)

    def add(x: Tensor, y: Tensor) -> Tensor:
        return unit.act(x + y)

    return {
        'first 1x1': Part(unit.conv1.conv, [x], 3, 5),
        'first 1x1, norm and ReLU': Part(unit.conv1.bn, [u], 2, 3),
        '3x3': Part(narrow.conv, [u], 2, 3),
        '3x3 dilated': Part(wide.conv, [u], 2, 3),
        '3x3, norm and ReLU': Part(narrow.bn, [u], 2, 3),
        '3x3 dilated, norm and ReLU': Part(wide.bn, [u], 2, 3),
        'fuse': Part(lambda u, v: fuse([u, v]), [u, other], 2, 0),
        'attention': Part(unit.sk.attn, [s], 0, 0),
        'select': Part(lambda u, v, a: select([u, v], a), [u, other, a], 3, 5),
        'last 1x1': Part(unit.conv3.conv, [u], 3, 5),
        'last 1x1, norm': Part(unit.conv3.bn, [x], 4, 6),
        'sum with the shortcut, ReLU': Part(add, [x, torch.randn_like(x)], 6, 6),
        'whole unit': Part(unit, [x], 0, 0),
    }


def runner(part: Part, training: bool) -> Callable[[], Any]:
    amp = partial(torch.autocast, device().type, torch.bfloat16, enabled=device().type == 'cuda')
    if not training:

        @torch.inference_mode()
        def forward() -> Tensor:
            with amp():
                return part.run(*part.inputs)

        return forward

    inputs = [t.detach().requires_grad_() for t in part.inputs]
    module = [*part.run.parameters()] if isinstance(part.run, nn.Module) else []
    gradient: List[Tensor] = []

    def step() -> None:
        with amp():
            out = part.run(*inputs)
        if not gradient:
            gradient.append(torch.randn_like(out))
        torch.autograd.grad(out, [*inputs, *module], gradient[0])

    return step


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    training = args.case == 'train'
    layout = LAYOUTS[args.layout]
    model = timm.create_model('sknet50').train(training).to(device(), memory_format=layout)
    dtype = torch.bfloat16 if device().type == 'cuda' else torch.float32
    large = torch.randn(2**28 if device().type == 'cuda' else 2**24, device=device())
    copies = interleaved({'copy': large.clone}, args.rounds, args.warmup)['copy']
    bandwidth = 2 * large.nbytes / quartiles(copies)[1]
    del large
    rows = []
    for stage, units in enumerate(model.stages):
        C, size = units[1].sk.attn.channels, args.size // 4 // 2**stage
        u = torch.randn(args.batch, C, size, size, device=device(), dtype=dtype).contiguous(memory_format=layout)
        x = torch.cat([u, u], dim=1).contiguous(memory_format=layout)
        found = parts(units[1], x, u)
        runs = {name: runner(part, training) for name, part in found.items()}
        times = interleaved(runs, args.rounds, args.warmup, args.repeats)
        moved = {name: part.forward + part.backward * training for name, part in found.items()}
        moved['whole unit'] = sum(moved.values())
        rows.append(
            {
                'settings': {'case': f'parts {args.case}', 'layout': args.layout, 'batch': args.batch},
                'place': {'stage': stage, 'C': C, 'size': size},
                'run': {key: getattr(args, key) for key in ('rounds', 'warmup', 'repeats')},
                'bandwidth': bandwidth,
                'median': {name: quartiles(mine)[1] for name, mine in times.items()},
                'floor': {name: maps * u.nbytes / bandwidth for name, maps in moved.items()},
            }
        )
    return rows


def table(rows: List[Dict[str, Any]]) -> str:
    """Returns, for each stage, the measured and the minimum milliseconds of each part."""
    lines = [['ms (minimum)', *('{C}x{size}x{size}'.format(**row['place']) for row in rows)]]
    for name in rows[0]['median']:
        lines.append([name, *(f'{1e3 * row["median"][name]:.3f} ({1e3 * row["floor"][name]:.3f})' for row in rows)])
    return markdown(lines)


def main() -> None:
    parser = options(__doc__, batch=8, size=224, rounds=20, warmup=3, repeats=1)
    parser.add_argument('--case', choices=['eval', 'train'], default='eval')
    args = parser.parse_args()
    rows = measure(args)
    print(f'{args.case}, batch {args.batch}, copies at {rows[0]["bandwidth"] / 1e9:.0f} GB/s\n\n{table(rows)}\n')
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
