"""Compares the speed of an SKNet with other networks in one process.

    python benchmarks/speed.py --model sknet50 --case eval --layout channels_last --batch 8 --out results.json

In each round, every network runs once. Ratios are computed within a round, and their median is reported. The results
are printed as Markdown and, with --out, added to a JSON file for `report.py`. Before timing, the outputs of
implementations of the same network are compared. If there is a GPU, the networks run on it, with AMP. The cases `onnx`
and `openvino` run on the CPU, from an exported file.
"""

import argparse
import tempfile
from typing import Any, Callable, Dict, List, Tuple

import torch
from contenders import MEMORY_EFFICIENT, contenders, folded
from measure import device, images, interleaved, keep, markdown, options, quartiles, ratio
from torch import nn

from timm_sknet.sknets import model_cfgs

SAME = 'timm_sknet', 'timm SK', 'pytorchcv'
CASES = 'eval', 'train', 'compiled', 'compiled train', 'bf16', 'onnx', 'openvino'
Run = Callable[[], Any]


def runners(case: str, make: Callable[[], nn.Module], x: torch.Tensor) -> Dict[str, Run]:
    """Returns the functions to time, by suffix of the name: plain and folded, or in training plain and checkpointed."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    if case in EXPORTED:
        return {' folded': EXPORTED[case](folded(make()), x)}
    models = {'': make().train(case.endswith('train'))}
    if case == 'train' and hasattr(models[''], 'set_grad_checkpointing'):
        models[' checkpointed'] = make().train()
        models[' checkpointed'].set_grad_checkpointing()
    elif not case.endswith('train'):
        models[' folded'] = folded(make())
    found: Dict[str, Run] = {}
    for suffix, model in models.items():
        model = model.to(device=x.device, memory_format=layout)
        run = torch.compile(model, fullgraph=True) if case.startswith('compiled') else model
        bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=case == 'bf16' or x.device.type == 'cuda')

        def step(run: nn.Module = run, model: nn.Module = model, bf16: torch.autocast = bf16) -> None:
            with bf16:
                loss = run(x).float().square().mean()
            loss.backward()
            model.zero_grad()

        @torch.inference_mode()
        def forward(run: nn.Module = run, bf16: torch.autocast = bf16) -> torch.Tensor:
            with bf16:
                return run(x)

        found[suffix] = step if case.endswith('train') else forward
    return found


def export(model: nn.Module, x: torch.Tensor, folder: str) -> str:
    file = f'{folder}/model.onnx'
    torch.onnx.export(model, (x.contiguous(),), file, dynamo=True, verbose=False, external_data=False)
    return file


def onnxruntime_session(model: nn.Module, x: torch.Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(export(model, x, folder), options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino_model(model: nn.Module, x: torch.Tensor) -> Run:
    import openvino

    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}
    with tempfile.TemporaryDirectory() as folder:
        compiled = openvino.Core().compile_model(export(model, x, folder), 'CPU', settings)
    return lambda: torch.from_numpy(compiled(x.contiguous().numpy())[0])


EXPORTED = {'onnx': onnxruntime_session, 'openvino': openvino_model}


def check(outputs: Dict[str, torch.Tensor], loose: bool) -> None:
    """Checks that implementations of the same network have the same output.

    Raises:
        RuntimeError: If the output of one differs.
    """
    reference = next(output for name, output in outputs.items() if name.startswith('timm_sknet')).float()
    for name, output in outputs.items():
        distance = ((output.float() - reference).abs().max() / reference.abs().max()).item()
        if not distance < (0.05 if loose else 1e-4):
            raise RuntimeError(f'{name} is not the same network: its output differs by {distance:.1e}.')


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Returns a row for each network. Its ratios are its speed over the speed of each other network."""
    x = images(args.batch, args.size, args.layout)
    if args.case in EXPORTED:
        x = x.cpu()
    torch.backends.cudnn.benchmark = True  # as timm's scripts do
    runs: Dict[str, Run] = {}
    for name, make in contenders(args.model).items():
        if (args.only and name not in args.only) or (name == MEMORY_EFFICIENT and args.case != 'train'):
            continue
        for suffix, run in runners(args.case, make, x).items():
            runs[name + suffix] = run
    if not args.case.endswith('train'):
        same = {name: run() for name, run in runs.items() if name.removesuffix(' folded') in SAME}
        check(same, loose=args.case == 'bf16' or device().type == 'cuda')

    times = interleaved(runs, args.rounds, args.warmup, args.repeats)
    settings = {key: getattr(args, key) for key in ('model', 'case', 'layout', 'batch', 'size')}
    return [
        {
            'settings': settings,
            'contender': name,
            'run': {key: getattr(args, key) for key in ('rounds', 'warmup', 'repeats', 'only') if getattr(args, key)},
            'quartiles': quartiles(mine),
            'least': min(mine),
            'speed over': {other: ratio(theirs, mine) for other, theirs in times.items()},
        }
        for name, mine in times.items()
    ]


def table(rows: List[Dict[str, Any]]) -> str:
    """Returns the rows as Markdown, with milliseconds and the speed over each reference network."""
    references = [row['contender'] for row in rows if not row['contender'].startswith(OURS_AND_GUESTS)]
    lines = [['', 'median ms', 'quartiles', 'min', *(f'over {name}' for name in references)]]
    for row in rows:
        low, median, high = (f'{1e3 * q:.1f}' for q in row['quartiles'])
        over = row['speed over']
        ratios = [f'{over[name]:.2f}' if name in over else '' for name in references]
        lines.append([row['contender'], median, f'{low}-{high}', f'{1e3 * row["least"]:.1f}', *ratios])
    return markdown(lines)


OURS_AND_GUESTS: Tuple[str, ...] = ('timm_sknet', 'pytorchcv', 'holocron')


def main() -> None:
    parser = options(__doc__, batch=8, size=224, rounds=10, warmup=2, repeats=1)
    parser.add_argument('--model', choices=model_cfgs, default='sknet50')
    parser.add_argument('--case', choices=CASES, default='eval')
    parser.add_argument('--only', nargs='+', metavar='NETWORK', help='time only these networks')
    args = parser.parse_args()
    known = list(contenders(args.model))
    if args.only and ('timm_sknet' not in args.only or not set(args.only) <= set(known)):
        parser.error(f'argument --only: must be timm_sknet and any of {known[1:]}, got {args.only}')

    rows = measure(args)
    print(f'{args.model}, {args.case}, {args.layout}, batch {args.batch}, size {args.size}\n\n{table(rows)}\n')
    if args.out:
        keep(rows, args.out)


if __name__ == '__main__':
    main()
