"""Measures the memory of a training step of an SKNet and other networks, with and without checkpointing.

    python benchmarks/memory.py --model sknet50 --batch 8 --out results.json

"saved" is the memory kept between forward and backward, without parameters, images and output. "peak" is the increase
in resident memory (on a GPU: allocated memory) from before the first step to the maximum during two steps.
"""

import argparse
import multiprocessing
import re
import weakref
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from contenders import contenders
from measure import LAYOUTS, device, images, keep, markdown, options
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_sknet.sknets import model_cfgs


class Results(TorchDispatchMode):
    """Tracks the storages of all results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: List[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.storages += [weakref.ref(t.untyped_storage()) for t in tensors]
        return out


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Returns the bytes that a forward pass keeps for backward, without parameters, buffers, x and the output."""
    with Results() as results:
        out = model(x)
    known = {id(t.untyped_storage()) for t in (x, out, *model.parameters(), *model.buffers())}
    left = {id(storage): storage.nbytes() for storage in (ref() for ref in results.storages) if storage is not None}
    return sum(size for storage, size in left.items() if storage not in known)


def resident(what: str, reset: bool = False) -> int:
    """Returns the resident memory of this process in bytes: now ('RSS') or the maximum since the last reset ('HWM')."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    return 1024 * int(re.search(rf'Vm{what}:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])


def step(name: str, checkpointed: bool, args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """Returns the row of one network. Must run in its own process."""
    model = contenders(args.model)[name]().train()
    if checkpointed:
        if not hasattr(model, 'set_grad_checkpointing'):
            return None
        model.set_grad_checkpointing()
    model.to(device=device(), memory_format=LAYOUTS[args.layout])
    x = images(args.batch, args.size, args.layout)
    gpu = device().type == 'cuda'
    before = torch.cuda.memory_allocated() if gpu else resident('RSS', reset=True)
    for _ in range(2):
        with torch.autocast('cuda', torch.bfloat16, enabled=gpu):
            loss = model(x).float().square().mean()
        loss.backward()
    peak = torch.cuda.max_memory_allocated() if gpu else resident('HWM')
    row: Dict[str, Any] = {'contender': name + ' checkpointed' * checkpointed, 'peak': peak - before}
    if not checkpointed:
        with torch.autocast('cuda', torch.bfloat16, enabled=gpu):
            row['saved'] = saved_bytes(model, x)
    return row


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    settings = {'case': 'memory', **{key: getattr(args, key) for key in ('model', 'layout', 'batch', 'size')}}
    rows = []
    for name in args.only or contenders(args.model):
        for checkpointed in False, True:
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                row = pool.apply(step, (name, checkpointed, args))
            if row:
                rows.append({'settings': settings, **row})
    return rows


def table(rows: List[Dict[str, Any]]) -> str:
    """Returns the rows as Markdown, in MB and relative to ResNeXt, or to the network with one branch."""
    base = next((row for row in rows if row['contender'] in ('timm ResNeXt', 'one branch')), rows[0])
    lines = [['', 'saved MB', f'over {base["contender"]}', 'peak MB', f'over {base["contender"]}']]
    for row in rows:
        cells = []
        for key in 'saved', 'peak':
            cells += [f'{row[key] / 1e6:.0f}', f'{row[key] / base[key]:.3f}'] if key in row else ['', '']
        lines.append([row['contender'], *cells])
    return markdown(lines)


def main() -> None:
    parser = options(__doc__, batch=8, size=224)
    parser.add_argument('--model', choices=model_cfgs, default='sknet50')
    parser.add_argument('--only', nargs='+', metavar='NETWORK', help='measure only these networks')
    args = parser.parse_args()
    known = list(contenders(args.model))
    if args.only and not set(args.only) <= set(known):
        parser.error(f'argument --only: must be any of {known}, got {args.only}')

    rows = measure(args)
    print(f'{args.model}, a training step, {args.layout}, batch {args.batch}, size {args.size}\n\n{table(rows)}\n')
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
