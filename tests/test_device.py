"""What users do on an accelerator, compared with float64 on the CPU.

pytest tests/test_device.py --device cuda

Without `--device`, the tests run on the CPU.
"""

import csv
import json
from copy import deepcopy

import pytest
import timm
import torch
from conftest import trained
from timm.utils import reparameterize_model
from torch.nn.functional import cross_entropy

from timm_sknet.attention import record
from timm_sknet.cli import main
from timm_sknet.predict import PHOTOS

# One unit in each stage: deeper networks would amplify the rounding errors of the gradients.
NETWORKS = {
    'sknet12': dict(depths=[1, 1, 1]),
    'three branches': dict(depths=[1, 1, 1], branches=[[3, 1, 1], [3, 2, 1], [1, 1, 1]]),
    'sknet50': dict(depths=[1, 1, 1, 1]),
    'sk_resnet18_timm': dict(depths=[1, 1, 1, 1]),
    'sk_shufflenetv2_x0_5': dict(depths=[1, 1, 1]),
}
# Largest error of the logits and of the gradients, relative to their norm. A rounding error can switch a ReLU.
TOLERANCES = {torch.float32: (1e-5, 3e-2), torch.float16: (5e-3, 0.15), torch.bfloat16: (2e-2, 0.4)}


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption('--device'))


@pytest.fixture(autouse=True)
def cudnn():
    """Enables the kernels that compute a whole folded layer, and computes float32 in full precision, not in TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def pair(name, device, layout=torch.channels_last, **kwargs):
    """A model with its images on the device, and the same in float64 on the CPU."""
    model_name = 'sknet12' if name == 'three branches' else name
    model = trained(timm.create_model(model_name, num_classes=10, **NETWORKS[name], **kwargs))
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = deepcopy(model).double(), x.double()
    return model.to(device, memory_format=layout), x.to(device, memory_format=layout), *exact


def amp(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def distance(found, expected):
    """The norm of the error relative to the norm of the expected values; tensors or lists of tensors."""
    found, expected = ([values] if isinstance(values, torch.Tensor) else values for values in (found, expected))
    errors = torch.cat([(f.double().cpu() - e.cpu()).flatten() for f, e in zip(found, expected, strict=True)])
    return (errors.norm() / torch.cat([e.flatten() for e in expected]).norm()).item()


def step(model, x, run=None):
    """The loss and the gradients of a training step."""
    run = model if run is None else run
    loss = cross_entropy(run(x), torch.arange(len(x), device=x.device))
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('name', NETWORKS)
def test_inference(name, dtype, layout, device):
    model, x, exact, x64 = pair(name, device, layout)
    with torch.inference_mode(), amp(device, dtype):
        logits, folded = model(x), reparameterize_model(model)(x)
    expected = exact(x64)
    assert distance(logits, expected) < TOLERANCES[dtype][0]
    assert distance(folded, expected) < TOLERANCES[dtype][0]
    assert logits.dtype == dtype


def test_folded_layers_run_in_cudnn(device, monkeypatch):
    """Needs an NVIDIA GPU with compute capability 8.0 or higher, or a CPU."""
    calls, kernel = [], torch.cudnn_convolution_relu
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', lambda *args: calls.append(args) or kernel(*args))
    model, x, *_ = pair('sknet12', device)
    with torch.inference_mode():
        reparameterize_model(model)(x)
    assert bool(calls) == (device.type == 'cuda')


@pytest.mark.parametrize('kwargs', [{}, dict(memory_efficient=True)], ids=str)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('name', NETWORKS)
def test_training_step(name, dtype, kwargs, device):
    model, x, exact, x64 = pair(name, device, **kwargs)
    with amp(device, dtype):
        loss, gradients = step(model.train(), x)
    expected_loss, expected = step(exact.train(), x64)
    assert distance(loss, expected_loss) < TOLERANCES[dtype][0]
    assert distance(gradients, expected) < TOLERANCES[dtype][1]


@pytest.mark.parametrize('name', NETWORKS)
def test_checkpointed_training_step(name, device):
    model, x, exact, x64 = pair(name, device)
    model.set_grad_checkpointing()
    assert distance(step(model.train(), x)[1], step(exact.train(), x64)[1]) < TOLERANCES[torch.float32][1]


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_compiled_as_one_graph(training, device):
    model, x, exact, x64 = pair('sknet12', device)
    compiled = torch.compile(model.train(training), fullgraph=True)
    if training:
        found, expected = step(model, x, compiled)[1], step(exact.train(), x64)[1]
    else:
        with torch.inference_mode():
            found, expected = compiled(x), exact(x64)
    assert distance(found, expected) < TOLERANCES[torch.float32][training]


def test_recorded_attention(device):
    model, x, exact, x64 = pair('sknet50', device)
    with record(model) as units, record(exact) as expected:
        model(x), exact(x64)
    for name, unit in units.items():
        assert distance(unit.mean, expected[name].mean) < 1e-5


def test_predict_and_attention(device, tmp_path, capsys):
    predictions, rows = [], []
    for place in 'cpu', str(device):
        capsys.readouterr()
        main(['predict', '--json', '--device', place, str(PHOTOS)])
        predictions.append([p for image in json.loads(capsys.readouterr().out) for p in image['predictions']])
        files = ['--out', str(tmp_path / 'figure.png'), '--csv', str(tmp_path / 'values.csv')]
        main(['attention', '--device', place, *files, str(PHOTOS / 'cat.jpg')])
        rows.append(list(csv.DictReader((tmp_path / 'values.csv').open())))
    assert len(predictions[0]) == 4 * 5
    for expected, found in zip(*predictions, strict=True):
        assert found['probability'] == pytest.approx(expected['probability'], abs=1e-4)
    for expected, found in zip(*rows, strict=True):
        assert float(found['difference']) == pytest.approx(float(expected['difference']), abs=1e-4)
