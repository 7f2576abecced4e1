"""Builds the tables of models that `timm-sknet models` prints."""

from dataclasses import replace
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from timm_sknet.network import SKNet
from timm_sknet.sknets import Weights, default_cfgs, model_cfgs, paper_top1, weights

# The tables: one for each place of the weights, see `Weights.source`.
TITLES = {
    ('the Hub', 'the package'): 'Weights that load by name',
    ('a file',): 'Weights in files that must be converted',
    ('',): 'Networks without public weights',
}
HEADER = 'model', 'parameters', 'GMACs', 'input', 'top-1', 'licence', 'weights'


class Row(NamedTuple):
    """A model with one set of weights, or a model without weights.

    Attributes:
        name: MODEL.TAG, or the model if it has no weights.
        parameters: Number of parameters.
        gmacs: Multiply-accumulate operations of convolutions and linears for one image, in billions.
        size: Height and width of the image.
        top1: Accuracy in %: measured by us (marked), published with the weights, or stated in the paper; or empty.
        licence: Licence of the weights; empty if none is stated.
        source: Place of the weights, as `Weights.source`.
        link: Address of the weights; a path in this repository for weights in the package.
    """

    name: str
    parameters: int
    gmacs: float
    size: Tuple[int, int]
    top1: str
    licence: str
    source: str
    link: str


def model_table() -> List[Row]:
    """Returns one row for each set of weights; counts the parameters and MACs of the models."""
    counted: Dict[str, Tuple[int, int]] = {}
    rows = []
    for name, entry in weights.items():
        model, tag = name.split('.')
        cfg = default_cfgs[model].cfgs[tag]
        if model not in counted:
            counted[model] = count(model, cfg)
        parameters, macs = counted[model]
        stated = entry.published or paper_top1.get(model)
        top1 = f'{entry.measured} (ours)' if entry.measured else str(stated or '')
        _, *size = cfg.input_size
        shown = name if entry.source else model
        rows.append(Row(shown, parameters, macs / 1e9, size, top1, cfg.license or '', entry.source, _link(name, entry)))
    return rows


def count(name: str, cfg: PretrainedCfg) -> Tuple[int, int]:
    """Counts the parameters and the MACs of a model.

    Builds only two units of each stage, because all units after the first one are alike.

    Args:
        name: The model.
        cfg: Image size and number of classes.
    """
    depths = model_cfgs[name].depths
    two = replace(model_cfgs[name], depths=[min(depth, 2) for depth in depths])
    network = SKNet(two, num_classes=cfg.num_classes, device='meta').eval()
    times = {m: depth - 1 for stage, depth in zip(network.stages, depths) for m in stage[1:].modules()}
    macs = []

    def add(m: nn.Module, args: Tuple[Tensor, ...], out: Tensor) -> None:
        macs.append(times.get(m, 1) * out.numel() * m.weight[0].numel())

    for m in network.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(add)
        elif isinstance(m, nn.BatchNorm2d):
            m.forward = lambda x: x  # type: ignore[assignment, method-assign]  # slow on the meta device, and not counted
    with torch.inference_mode():
        network(torch.empty(1, *cfg.input_size, device='meta'))
    parameters = sum(times.get(m, 1) * p.numel() for m in network.modules() for p in m.parameters(recurse=False))
    return parameters, sum(macs)


def _link(name: str, entry: Weights) -> str:
    if entry.source == 'the package':
        return f'timm_sknet/weights/{name}.safetensors'
    repository = entry.cfg.get('hf_hub_id')
    return f'https://huggingface.co/{repository}' if repository else entry.file_url


def format_table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Formats the rows as tables with titles, as aligned text or as Markdown."""
    tables = []
    for sources, title in TITLES.items():
        lines = [_cells(row, markdown) for row in rows if row.source in sources]
        tables.append(f'{title}:\n\n{_format([HEADER, *lines], markdown)}')
    return '\n\n'.join(tables)


def _cells(row: Row, markdown: bool) -> Sequence[str]:
    link = f'[{row.source}]({row.link})' if markdown and row.link else row.link
    name = f'`{row.name}`' if markdown else row.name
    size = 'x'.join(map(str, row.size))
    return name, f'{row.parameters:,}', f'{row.gmacs:.4g}', size, row.top1, row.licence, link


def _format(lines: List[Sequence[str]], markdown: bool) -> str:
    columns = [column for column in zip(*lines) if any(column[1:])]  # without empty columns
    lines = list(zip(*columns))
    if markdown:
        lines.insert(1, ['---', *(['--:'] * 4), *(['---'] * 2)][: len(columns)])
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    widths = [max(map(len, column)) for column in columns]
    aligned = [[f'{cell:{">" if 0 < i < 5 else "<"}{widths[i]}}' for i, cell in enumerate(line)] for line in lines]
    return '\n'.join('  '.join(line).rstrip() for line in aligned)
