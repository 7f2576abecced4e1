"""Quantises or exports networks with one tool, and compares them with float32 or with PyTorch.

    python benchmarks/integrations.py openvino IMAGENETTE
    python benchmarks/integrations.py nncf
    python benchmarks/integrations.py executorch
    python benchmarks/integrations.py litert

Some tools need packages that do not fit together: `make integrations` installs each into an environment of its own. The
folder contains train/ and val/, with one folder for each class of Imagenette.
"""

import argparse
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import timm
import torch
from measure import interleaved, markdown, ratio, read, top1
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Run = Callable[[Tensor], Tensor]


def folded(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return reparameterize_model(timm.create_model(name, **kwargs).eval())


def compare(models: Dict[str, Run], x: Tensor, rounds: int, top1s: Sequence[str] = ()) -> None:
    """Prints the speed of float32 and int8, after their top-1 if it is given."""
    times = interleaved({name: lambda m=model: m(x) for name, model in models.items()}, rounds)
    lines = [['', 'images/s', 'over float32']]
    for name, mine in times.items():
        lines.append([name, f'{len(x) / statistics.median(mine):.1f}', f'{ratio(times["float32"], mine):.2f}'])
    if top1s:
        lines = [[name, found, *speed] for (name, *speed), found in zip(lines, ['top-1', *top1s])]
    print(markdown(lines))


def versions(*names: str) -> str:
    return ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', *names))


def openvino(args: argparse.Namespace) -> None:
    """Post-training quantisation with NNCF, run by OpenVINO."""
    import nncf
    import openvino as ov

    print(versions('nncf', 'openvino'))
    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32'}

    def compiled(model: Any) -> Run:
        run = ov.Core().compile_model(model, 'CPU', settings)
        return lambda x: torch.from_numpy(run(x.contiguous().numpy())[0])

    def models(name: str, calibration: Tensor, **kwargs: Any) -> Dict[str, Run]:
        size = calibration.shape[2:]
        graph = ov.convert_model(folded(name, **kwargs), example_input=calibration[:2], input=[-1, 3, *size])
        batches = [batch.contiguous().numpy() for batch in calibration.split(1)]
        int8 = nncf.quantize(graph, nncf.Dataset(batches), subset_size=len(batches))
        quantised = sum(op.get_type_name() == 'FakeQuantize' for op in int8.get_ops())
        layers = sum(op.get_type_name() in ('Convolution', 'GroupConvolution', 'MatMul') for op in int8.get_ops())
        print(f'\n{name}: {layers} convolutions and linear layers, {quantised} quantisers\n')
        return {'float32': compiled(graph), 'int8': compiled(int8)}

    model = timm.create_model('sknet14.imagenette128', pretrained=True)
    images, classes = read(args.folder / 'val', model)
    found = models('sknet14.imagenette128', read(args.folder / 'train', model, 300)[0], pretrained=True)
    top1s = [f'{top1(run, images, classes, 25):.2f}' for run in found.values()]
    compare(found, images[:25], args.rounds, top1s)
    compare(models('sknet50', torch.randn(8, 3, 224, 224)), torch.randn(1, 3, 224, 224), args.rounds)


def nncf(args: argparse.Namespace) -> None:
    """Quantisation-aware training with NNCF: every parameter gets a gradient, in timm's SK-ResNet too."""
    import nncf

    print(versions('nncf'), '\n')
    lines = [['', 'parameters', 'of quantisers', 'without a gradient']]
    for name in 'sknet12', 'sknet26', 'skresnet18':
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=2)
        x = torch.randn(4, 3, 64, 64)
        plain = {parameter for parameter, _ in model.named_parameters()}
        quantised = nncf.quantize(model.eval(), nncf.Dataset([x]), subset_size=1).train()
        cross_entropy(quantised(x), torch.tensor([0, 1, 0, 1])).backward()
        parameters = {parameter: p for parameter, p in quantised.named_parameters() if p.requires_grad}
        missing = [parameter for parameter, p in parameters.items() if p.grad is None]
        lines.append([name, str(len(parameters)), str(len(parameters.keys() - plain)), str(len(missing))])
    print(markdown(lines))


def executorch(args: argparse.Namespace) -> None:
    """ExecuTorch with XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    def convert(model: nn.Module, x: Tensor) -> Run:
        program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
        with tempfile.NamedTemporaryFile(dir=folder, suffix='.pte', delete=False) as file:
            file.write(program.to_executorch().buffer)
        method = Runtime.get().load_program(file.name).load_method('forward')
        return lambda x: method.execute([x])[0].clone()

    print(versions('executorch'))
    with tempfile.TemporaryDirectory() as folder:
        print_differences(convert)


def litert(args: argparse.Namespace) -> None:
    """LiteRT, formerly TensorFlow Lite."""
    import litert_torch

    def convert(model: nn.Module, x: Tensor) -> Run:
        converted = litert_torch.convert(model, (x,))
        return lambda x: torch.from_numpy(converted(x))

    print(versions('litert-torch', 'ai-edge-litert'))
    print_differences(convert)


def print_differences(convert: Callable[[nn.Module, Tensor], Run]) -> None:
    lines = [['', 'image', 'largest difference to PyTorch']]
    for name, size in ('sknet12.cifar10', 32), ('sknet26', 64), ('sk_shufflenetv2_x1_0', 64):
        model, x = folded(name, pretrained='.' in name), torch.randn(1, 3, size, size)
        lines.append([name, f'{size}x{size}', f'{(convert(model, x)(x) - model(x)).abs().max():.1e}'])
    print(markdown(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(required=True, metavar='TOOL')
    for tool in openvino, nncf, executorch, litert:
        command = tools.add_parser(tool.__name__, help=tool.__doc__)
        command.set_defaults(run=tool)
        if tool is openvino:
            command.add_argument('folder', type=Path)
            command.add_argument('--rounds', type=int, default=20, help='number of timed rounds')
    args = parser.parse_args()
    with torch.set_grad_enabled(args.run is nncf):
        args.run(args)


if __name__ == '__main__':
    main()
