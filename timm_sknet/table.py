"""Builds the table of models that `timm-sknet models` prints."""

from typing import List, NamedTuple, Optional, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_sknet.sknets import default_cfgs, paper_top1, weights


class Row(NamedTuple):
    """A model with one set of weights. Accuracies are top-1 in %; None if there is no figure."""

    model: str
    parameters: int
    gmacs: float
    input_size: Tuple[int, int, int]
    paper: Optional[float]
    weights: str
    source: str
    licence: Optional[str]
    published: Optional[float]
    measured: Optional[float]


HEADER = (
    'model',
    'parameters',
    'GMACs',
    'input',
    'top-1 in the paper',
    'weights',
    'from',
    'licence',
    'top-1 published',
    'top-1 measured',
)


def model_table() -> List[Row]:
    """Returns one row for each set of weights; counts the parameters and MACs of the models."""
    rows = []
    for name, entry in weights.items():
        variant, tag = name.split('.')
        cfg = default_cfgs[variant].cfgs[tag]
        model = timm.create_model(name, device='meta').eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *cfg.input_size, device='meta'))
        rows.append(
            Row(
                variant,
                sum(p.numel() for p in model.parameters()),
                counter.get_total_flops() / 2e9,  # a MAC counts as two operations
                cfg.input_size,
                paper_top1.get(variant),
                tag if entry.source else '',
                entry.source,
                cfg.license,
                entry.published,
                entry.measured,
            )
        )
    return rows


def format_table(rows: List[Row], markdown: bool = False) -> str:
    """Formats the rows as an aligned text table, or as a Markdown table."""
    cells = [list(HEADER)] + [
        [
            row.model,
            f'{row.parameters:,}',
            f'{row.gmacs:.4g}',
            'x'.join(map(str, row.input_size[1:])),
            *('' if x is None else str(x) for x in row[4:]),
        ]
        for row in rows
    ]
    if markdown:
        cells.insert(1, ['---'] + ['--:'] * (len(HEADER) - 1))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[f'{cell:{"<" if i == 0 else ">"}{widths[i]}}' for i, cell in enumerate(line)] for line in cells]
    if markdown:
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return '\n'.join('  '.join(line).rstrip() for line in lines)
