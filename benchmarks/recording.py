"""Measures what recording attention costs a forward pass, for sknet50 and for the smallest model at batch 1.

python benchmarks/recording.py
"""

import torch
from contenders import contenders
from measure import images, interleaved, machine, markdown, ratio

from timm_sknet.attention import record


def main() -> None:
    lines = [['', 'layout', 'batch', 'size', 'times as long with recording']]
    for name, batch, size, repeats in ('sknet50', 8, 224, 1), ('sknet50', 1, 224, 4), ('sknet12', 1, 32, 100):
        for layout in 'channels_last', 'NCHW':
            model = contenders(name)['timm_sknet']().eval()
            x = images(batch, size, layout)

            def recorded(model: torch.nn.Module = model, x: torch.Tensor = x, repeats: int = repeats) -> None:
                with record(model):
                    for _ in range(repeats):
                        model(x)

            def plain(model: torch.nn.Module = model, x: torch.Tensor = x, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    model(x)

            with torch.inference_mode():
                times = interleaved({'recorded': recorded, 'plain': plain}, rounds=20)
            lines.append([name, layout, str(batch), str(size), f'{ratio(times["recorded"], times["plain"]):.3f}'])
    print(markdown(lines))
    print(machine())


if __name__ == '__main__':
    main()
