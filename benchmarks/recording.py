"""Measures how much recording attention slows down a forward pass, for sknet50 and for the smallest model.

python benchmarks/recording.py
"""

from functools import partial

import torch
from contenders import ours
from measure import device, images, interleaved, machine, markdown, ratio

from timm_sknet.attention import record

ROWS = [('sknet50', 8, 224, 1), ('sknet50', 1, 224, 4), ('sknet12', 1, 32, 100)]  # model, batch, size, repeats


def main() -> None:
    lines = [['', 'layout', 'batch', 'size', 'times as long with recording']]
    for name, batch, size, repeats in ROWS:
        for layout in 'channels_last', 'NCHW':
            models = {kind: ours(name).eval().to(device()) for kind in ('recorded', 'plain')}
            x = images(batch, size, layout)
            with record(models['recorded']), torch.inference_mode():
                runs = {kind: partial(model, x) for kind, model in models.items()}
                times = interleaved(runs, rounds=20, repeats=repeats)
            lines.append([name, layout, str(batch), str(size), f'{ratio(times["recorded"], times["plain"]):.3f}'])
    print(markdown(lines))
    print(machine())


if __name__ == '__main__':
    main()
