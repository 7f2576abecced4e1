"""The table of models: what `timm-sknet models` prints and the README shows."""

from typing import List, NamedTuple, Optional, Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_sknet.sknets import default_cfgs, measured, model_cfgs, published, published_weights


class Row(NamedTuple):
    """One model with one set of weights; top-1 accuracies in %, None where there is no figure."""

    model: str
    parameters: int
    gmacs: float
    input_size: Tuple[int, int, int]
    paper: Optional[float]
    weights: str
    published: Optional[float]
    measured: Optional[float]


HEADER = 'model', 'parameters', 'GMACs', 'input', 'top-1 in the paper', 'weights', 'top-1 published', 'top-1 measured'


def model_table() -> List[Row]:
    """Returns a row for each set of weights, and one for each model without; parameters and MACs are counted."""
    rows = []
    for name in model_cfgs:
        model = timm.create_model(name, device='meta').eval()
        input_size = default_cfgs[name].default.input_size
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *input_size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters())
        cfgs = default_cfgs[name].cfgs
        for tag in [tag for tag in cfgs if cfgs[tag].has_weights] or ['']:
            weights = f'{name}.{tag}'
            rows.append(
                Row(
                    name,
                    parameters,
                    counter.get_total_flops() / 2e9,  # it counts a multiplication and an addition for each MAC
                    input_size,
                    published.get(name),
                    tag,
                    published_weights.get(weights),
                    measured.get(weights),
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
