"""Times an SKNet beside its peers, in one process: rounds in which each runs once, ratios within a round, medians.

    python benchmarks/speed.py --model sknet50 --case eval --layout channels_last --batch 8 --out results.json

Adds its rows to the JSON file that --out names, from which `report.py` makes tables; prints them as Markdown. Outputs
are compared before anything is timed, where the networks are the same. Where there is a GPU it runs there, under AMP.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import torch
from contenders import contenders, folded, machine
from torch import nn
from tqdm import tqdm

SAME = 'timm_sknet', 'timm SK', 'pytorchcv'
CASES = 'eval', 'train', 'compiled', 'compiled train', 'bf16', 'onnx'
LAYOUTS = {'channels_last': torch.channels_last, 'NCHW': torch.contiguous_format}


def runners(case: str, make: Callable[[], nn.Module], x: torch.Tensor, amp: bool) -> Dict[str, Callable[[], Any]]:
    """Returns what is timed, by the suffix of its name: as it is and, for inference, folded."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format

    def prepared(model: nn.Module) -> nn.Module:
        return model.to(device=x.device, memory_format=layout)

    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=amp or case == 'bf16')
    if case.endswith('train'):
        model = prepared(make().train())
        run = torch.compile(model, fullgraph=True) if case.startswith('compiled') else model

        def step() -> None:
            with autocast:
                loss = run(x).float().square().mean()
            loss.backward()
            model.zero_grad()

        return {'': step}

    models = {'': make().eval(), ' folded': folded(make())}
    if case == 'onnx':
        return {suffix: onnx_session(model, x) for suffix, model in models.items()}
    found = {}
    for suffix, model in models.items():
        run = torch.compile(prepared(model), fullgraph=True) if case == 'compiled' else prepared(model)

        @torch.inference_mode()
        def forward(run: nn.Module = run) -> torch.Tensor:
            with autocast:
                return run(x)

        found[suffix] = forward
    return found


def onnx_session(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/model.onnx'
        torch.onnx.export(model, (x,), file, dynamo=True, verbose=False, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Returns a row for each contender; ratios are its speed over that of others, in the median of the rounds."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size, device=device).contiguous(memory_format=LAYOUTS[args.layout])
    runs: Dict[str, Callable[[], Any]] = {}
    for name, make in contenders(args.model).items():
        for suffix, run in runners(args.case, make, x, amp=device.type == 'cuda').items():
            runs[name + suffix] = run
    if not args.case.endswith('train'):
        check({name: run() for name, run in runs.items() if name.removesuffix(' folded') in SAME}, args.case)

    times: Dict[str, List[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in tqdm(range(args.rounds + args.warmup), unit='round', leave=False):
        for name in order:
            took = seconds(runs[name], args.repeats, device)
            if number >= args.warmup:
                times[name].append(took)
        order = order[1:] + order[:1]  # so that none always follows the same one

    settings = {key: getattr(args, key) for key in ('model', 'case', 'layout', 'batch', 'size', 'rounds', 'repeats')}
    rows = []
    for name, mine in times.items():
        over = {other: statistics.median(np.divide(theirs, mine)) for other, theirs in times.items() if other != name}
        quartiles = statistics.quantiles(mine, n=4) if len(mine) > 1 else [mine[0]] * 3
        rows.append(settings | {'contender': name, 'quartiles': quartiles, 'least': min(mine), 'speed over': over})
    return rows


def check(outputs: Dict[str, torch.Tensor], case: str) -> None:
    """Compares the outputs of networks that are the same.

    Raises:
        RuntimeError: Where one is another network after all.
    """
    reference = outputs['timm_sknet'].float()
    for name, output in outputs.items():
        distance = ((output.float() - reference).abs().max() / reference.abs().max()).item()
        if not distance < (0.05 if case == 'bf16' or output.dtype != torch.float32 else 1e-4):
            raise RuntimeError(f'{name} is another network: its output differs by {distance:.1e}.')


def table(rows: List[Dict[str, Any]]) -> str:
    """Returns the rows as Markdown: milliseconds, and speed over each reference."""
    names = [row['contender'] for row in rows]
    references = [name for name in names if not name.startswith(('timm_sknet', 'pytorchcv', 'holocron'))]
    lines = [['', 'median ms', 'quartiles', 'least', *(f'over {name}' for name in references)]]
    lines.append(['---'] + ['--:'] * (len(lines[0]) - 1))
    for row in rows:
        low, median, high = (f'{1e3 * q:.1f}' for q in row['quartiles'])
        ratios = [f'{row["speed over"].get(name, 1):.2f}' for name in references]
        lines.append([row['contender'], median, f'{low}-{high}', f'{1e3 * row["least"]:.1f}', *ratios])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='sknet50')
    parser.add_argument('--case', choices=CASES, default='eval')
    parser.add_argument('--layout', choices=LAYOUTS, default='channels_last')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=1, help='runs in a row that are timed together')
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()

    rows = measure(args)
    print(f'{args.model}, {args.case}, {args.layout}, batch {args.batch}, size {args.size}\n\n{table(rows)}')
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else []
        unfinished = args.out.with_suffix('.unfinished')
        unfinished.write_text(json.dumps(known + [{**row, 'machine': machine()} for row in rows], indent=1))
        os.replace(unfinished, args.out)


if __name__ == '__main__':
    main()
