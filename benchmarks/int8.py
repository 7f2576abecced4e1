"""Quantises a network to int8 with PT2E, including its convolutions, and compares accuracy and speed with float32.

    python benchmarks/int8.py CIFAR10 --model sknet12.cifar10

The folder contains train/ and val/, with one folder for each class. Images from train/ calibrate the quantisation, and
top-1 is measured on val/. All networks are folded, in channels_last and, except for the first row, compiled. Each
network runs once in each round.
"""

import argparse
import statistics
from pathlib import Path
from typing import Tuple

import timm
import torch
import torch._inductor.config
from measure import interleaved, markdown, ratio, read, top1
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

aten = torch.ops.aten


def quantise(model: nn.Module, images: Tensor, batch: int = 64) -> torch.fx.GraphModule:
    """Returns the model with int8 weights and activations, calibrated with the images."""
    graph = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    for x in images.split(batch):
        prepared(x)
    return convert_pt2e(prepared)


def quantised_layers(graph: torch.fx.GraphModule) -> Tuple[int, int]:
    """Returns the number of convolutions and linear layers with int8 weights, and the number of all such layers."""
    layers = [node for node in graph.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    return sum('dequantize_per_channel' in str(node.args[1].target) for node in layers), len(layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--model', default='sknet12.cifar10')
    parser.add_argument('--calibrate', type=int, default=1024, help='number of training images for the calibration')
    parser.add_argument('--batch', type=int, default=100, help='batch size, a divisor of the number of images in val/')
    parser.add_argument('--rounds', type=int, default=20, help='timed rounds; 0 skips compiling and timing')
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=True).eval()
    model = reparameterize_model(model).to(memory_format=torch.channels_last)
    images, classes = read(args.folder / 'val', model)
    int8 = quantise(model, read(args.folder / 'train', model, args.calibrate)[0])
    number, of = quantised_layers(int8)
    print(f'{args.model}: {number} of {of} convolutions and linear layers in int8, {len(images)} images\n')

    models = {'float32': model, 'int8, not compiled': int8}
    if args.rounds:
        # Set globally, because an option of torch.compile is set too late for dynamo. Inductor can pack int8 weights
        # only if dynamo treats weights as constants.
        torch._inductor.config.freezing = True
        models = {'float32': model, 'float32, compiled': torch.compile(model), 'int8, compiled': torch.compile(int8)}
    lines = [[name, f'{top1(m, images, classes, args.batch):.2f}'] for name, m in models.items()]
    if not args.rounds:
        print(markdown([['', 'top-1'], *lines]))
        return
    x = images[: args.batch]
    times = interleaved({name: lambda m=m: m(x) for name, m in models.items()}, args.rounds, repeats=3)
    for line in lines:
        mine = times[line[0]]
        line += [f'{args.batch / statistics.median(mine):.0f}', f'{ratio(times["float32, compiled"], mine):.2f}']
    print(markdown([['', 'top-1', 'images/s', 'over float32, compiled'], *lines]))


if __name__ == '__main__':
    main()
