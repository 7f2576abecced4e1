"""Shared functions of the benchmarks: options, timing in interleaved rounds, and the JSON file of results."""

import argparse
import importlib
import importlib.util
import json
import platform
import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from timm_sknet.attention.scale import replacing

LAYOUTS = {'channels_last': torch.channels_last, 'NCHW': torch.contiguous_format}
Times = Dict[str, List[float]]


def options(doc: Optional[str], **numbers: int) -> argparse.ArgumentParser:
    """Returns a parser with the common options, and the given numeric options with their defaults."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument('--layout', choices=LAYOUTS, default='channels_last')
    found.add_argument('--out', type=results_file, metavar='JSON', help='file for the results')
    for name, default in numbers.items():
        what = f'{NUMBERS[name]} (default: {default})'
        found.add_argument(f'--{name}', type=partial(whole, 0 if name == 'warmup' else 1), default=default, help=what)
    return found


NUMBERS = {
    'batch': 'batch size',
    'size': 'height and width of the images',
    'rounds': 'number of timed rounds',
    'warmup': 'number of rounds before the timed ones',
    'repeats': 'number of consecutive runs that are timed together',
}


def whole(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least {least}, got {text!r}')
    return int(text)


def results_file(text: str) -> Path:
    """Checks the argument --out: a new file, or a results file."""
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f'the folder {str(file.parent)!r} does not exist, create it first')
    if file.exists():
        rows_of(text)
    return file


def rows_of(text: str) -> List[Dict[str, Any]]:
    """Reads the rows of a results file."""
    try:
        rows = json.loads(Path(text).read_text())
        assert all({'settings', 'machine'} <= set(row) for row in rows)
    except (OSError, ValueError, TypeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f'{text!r} is not a results file written by a benchmark with --out') from e
    return rows


def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def images(batch: int, size: int, layout: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, 3, size, size, device=device()).contiguous(memory_format=LAYOUTS[layout])


def read(folder: Path, model: nn.Module, limit: Optional[int] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """Returns preprocessed images, (N, C, H, W), and their classes. At most `limit` images are drawn at random."""
    names = model.pretrained_cfg.get('label_names') or ()
    # folders with other names are numbered in their order
    named = all(entry.name in names for entry in folder.iterdir() if entry.is_dir())
    class_map = {name: i for i, name in enumerate(names)} if named else ''
    transform = create_transform(**resolve_data_config(model=model))
    dataset = ImageDataset(str(folder), class_map=class_map, transform=transform)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
    images, classes = zip(*(dataset[i] for i in drawn.tolist()))
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(classes)


def top1(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, classes: torch.Tensor, batch: int
) -> float:
    right = [model(x).argmax(1) == y for x, y in zip(images.split(batch), classes.split(batch))]
    return 100 * torch.cat(right).float().mean().item()


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return model(x)

    return forward


def macs(run: Callable[[], Any]) -> int:
    """Returns the number of multiply-accumulates (MACs) of a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def interleaved(runs: Dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, repeats: int = 1) -> Times:
    """Times each run once in each round. Returns seconds.

    Args:
        runs: Functions to run, by name.
        rounds: Number of timed rounds.
        warmup: Number of rounds before the timed ones.
        repeats: Number of consecutive runs that are timed together.
    """
    torch.backends.cudnn.benchmark = True  # as timm's scripts do
    times: Times = {name: [] for name in runs}
    order = list(runs)
    for number in tqdm(range(rounds + warmup), unit='round', leave=False):
        for name in order:
            took = seconds(runs[name], repeats)
            if number >= warmup:
                times[name].append(took)
        order = order[1:] + order[:1]  # so that a run does not always follow the same one
    return times


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    if device().type == 'cuda':
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


def ratio(theirs: Sequence[float], mine: Sequence[float]) -> float:
    """Returns the speed of `mine` over `theirs`: the median over the rounds of their time divided by mine."""
    return statistics.median(np.divide(theirs, mine))


def quartiles(times: List[float]) -> List[float]:
    return statistics.quantiles(times, n=4) if len(times) > 1 else times * 3


def keep(rows: List[Dict[str, Any]], file: Path) -> None:
    """Adds rows to a JSON file. They replace rows of the same network with the same settings."""

    def identity(row: Dict[str, Any]) -> Any:
        return row['settings'], row.get('contender'), row.get('place')

    known = json.loads(file.read_text()) if file.exists() else []
    replaced = [identity(row) for row in rows]
    rows = [row for row in known if identity(row) not in replaced] + [{**row, 'machine': machine()} for row in rows]
    write(json.dumps(rows, indent=1) + '\n', file)


def write(text: str, file: Path) -> None:
    """Writes a file atomically."""
    with replacing(file) as unfinished:
        unfinished.write_text(text)


def markdown(lines: List[List[str]]) -> str:
    """Returns a Markdown table. Its first column is text, the others are numbers."""
    lines = [lines[0], ['---'] + ['--:'] * (len(lines[0]) - 1), *lines[1:]]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


PACKAGES = 'torch', 'timm', 'timm_sknet', 'onnxruntime', 'openvino', 'pytorchcv', 'holocron'


def machine() -> Dict[str, str]:
    """Returns the machine and the versions of the packages, which are stored with each row."""
    with open('/proc/cpuinfo') as file:
        cpu = re.search(r'model name\s*: (.*)', file.read())
    found = {name: importlib.import_module(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        'python': platform.python_version(),
        **{name: module.__version__ for name, module in found.items() if hasattr(module, '__version__')},
        'cpu': cpu[1] if cpu else platform.processor(),
        'isa': torch.backends.cpu.get_cpu_capability(),
        'threads': str(torch.get_num_threads()),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else '',
    }
