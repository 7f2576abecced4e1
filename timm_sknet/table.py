"""The table of models: what `timm-sknet models` prints and the README shows."""

from typing import List, NamedTuple, Optional, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_sknet.sknets import default_cfgs, published, weights


class Row(NamedTuple):
    """One model with one set of weights; top-1 accuracies in %, None where there is no figure."""

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
    """Returns a row for each entry of the table of weights; parameters and MACs are counted."""
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
                counter.get_total_flops() / 2e9,  # it counts a multiplication and an addition for each MAC
                cfg.input_size,
                published.get(variant),
                tag if entry.source else '',
                entry.source,
                cfg.license,
                entry.published,
                entry.measured,
            )
        )
    return rows


def format_table(rows: List[Row], markdown: bool = False) -> str:
    """Returns the rows as aligned text."""
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
