"""`timm.utils.reparameterize_model`, which the scripts call for --reparam, folds every batch norm exactly."""

import types
from collections import Counter

import pytest
import timm
import torch
from models import MODELS
from safetensors.torch import save_file
from timm.layers import DropPath
from timm.utils import reparameterize_model
from torch import nn

import timm_sknet.folding
from timm_sknet import SelectiveKernelConv
from timm_sknet.cli import main
from timm_sknet.folding import Folded
from timm_sknet.layers import ConvNormAct, SelectiveKernelAttn
from timm_sknet.network import BasicBlock

VARIANTS = {
    **{name: (name, {}) for name in MODELS if '101' not in name},  # the same units as in the smaller ones
    'one branch': ('sknet12', dict(branches=[[3, 1, 1]])),
    'three branches': ('sknet12', dict(branches=[[1, 1, 1], [3, 1, 1], [5, 1, 1]])),
    'another activation': ('sknet12', dict(act_layer='silu')),
    'activation with parameters': ('sknet12', dict(act_layer='prelu')),
    'frozen': ('sknet12', {}),
    'sync': ('sknet12', {}),
    'float64': ('sknet12', dict(dtype=torch.float64)),
    'bfloat16': ('sknet12', dict(dtype=torch.bfloat16)),
}


def trained(name, **kwargs):
    """A model in training mode whose batch norms are far from the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train()
    for m in model.modules():
        if getattr(m, 'running_var', None) is not None:
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(std=0.1)
    return model


def batch_norms(model):
    return [m for m in model.modules() if getattr(m, 'running_var', None) is not None]


@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_a_folded_model_gives_the_same_logits(variant):
    name, kwargs = VARIANTS[variant]
    model = trained(name, **kwargs)
    convert = {'frozen': timm.layers.freeze_batch_norm_2d, 'sync': timm.layers.convert_sync_batchnorm}
    model = convert.get(variant, nn.Identity())(model)
    assert len(batch_norms(model)) > 10
    folded = reparameterize_model(model).eval()  # in training mode, as the scripts do
    model.eval()
    assert not batch_norms(folded) and batch_norms(model)
    x = torch.randn(2, 3, 64, 64, dtype=kwargs.get('dtype'))
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.03}.get(kwargs.get('dtype'), 1e-5)
    assert ((folded(x) - model(x)).abs().max() / model(x).abs().max()).item() < tolerance
    again = reparameterize_model(folded)
    assert torch.equal(again(x), folded(x))
    assert {p.dtype for p in folded.parameters()} == {kwargs.get('dtype', torch.float32)}


def test_two_branches_need_one_logit_for_each_channel():
    layer = SelectiveKernelConv(32).eval()
    folded = reparameterize_model(layer)
    s = torch.randn(4, 32, 1, 1)
    assert folded.attn.fc2.weight.shape == (32, 32, 1, 1) and folded.attn(s).shape == (4, 2, 32)
    torch.testing.assert_close(folded.attn(s), layer.attn(s))


class Warm(SelectiveKernelAttn):
    """Attention at a temperature of 2."""

    def forward(self, s):
        return (self.fc2(self.bn(self.fc1(s))).reshape(-1, self.M, self.channels) / 2).softmax(1)


class Double(ConvNormAct):
    def forward(self, x):
        return self.bn(2 * self.conv(x))


def share(layer):
    layer.branches[1].conv = layer.branches[0].conv


def another_fc2(layer):
    layer.attn.fc2 = nn.Conv2d(32, 64, 1)
    nn.init.normal_(layer.attn.fc2.bias)


def replace_forward(module, forward):
    module.forward = types.MethodType(forward, module)  # a copy of the module gets a copy of the method


CHANGES = {
    "attention's forward": lambda layer: replace_forward(layer.attn, Warm.forward),
    "branch's forward": lambda layer: replace_forward(layer.branches[0], Double.forward),
    'attention': lambda layer: setattr(layer.attn, '__class__', Warm),
    'branch': lambda layer: setattr(layer.branches[0], '__class__', Double),
    'shared convolution': share,
    "torch's own SyncBatchNorm": lambda layer: nn.SyncBatchNorm.convert_sync_batchnorm(layer),
    'plain batch norm': lambda layer: setattr(layer.branches[0], 'bn', nn.BatchNorm2d(32)),
    'weight norm': lambda layer: nn.utils.parametrizations.weight_norm(layer.attn.fc2),
    'parametrized': lambda layer: nn.utils.parametrizations.orthogonal(layer.branches[0].conv),
    'wrapped': lambda layer: setattr(layer.attn, 'fc2', nn.Sequential(layer.attn.fc2)),
    'bias of fc2': another_fc2,
    'hook': lambda layer: layer.branches[0].conv.register_forward_hook(lambda module, args, out: 2 * out),
}


@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_a_changed_layer_gives_the_same_values_after_folding(change):
    layer = SelectiveKernelConv(32)
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    CHANGES[change](layer)
    layer.eval()
    x = torch.randn(2, 32, 7, 5)
    folded = reparameterize_model(layer)
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)
    assert isinstance(folded.branches[1].bn, Folded) or 'Sync' in change


@pytest.fixture
def cudnn(monkeypatch):
    """Runs folded layers as on CUDA, with the kernels of cuDNN computed by torch on the CPU; counts their calls."""
    calls = Counter()

    def conv_add_relu(x, weight, shortcut, alpha, bias, *options):
        calls['add_relu'] += 1
        return (torch.conv2d(x, weight, bias, *options) + alpha * shortcut).relu()

    def conv_relu(x, weight, bias, *options):
        calls['relu'] += 1
        return torch.conv2d(x, weight, bias, *options).relu()

    monkeypatch.setattr(torch, 'cudnn_convolution_add_relu', conv_add_relu)
    monkeypatch.setattr(torch, 'cudnn_convolution_relu', conv_relu)
    monkeypatch.setattr(timm_sknet.folding, 'runs_in_cudnn', lambda x: not torch.is_grad_enabled())
    return calls


@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_a_folded_model_gives_the_same_logits_in_cudnn(variant, cudnn):
    test_a_folded_model_gives_the_same_logits(variant)
    assert bool(cudnn) == ('activation' not in variant and variant != 'float64')


def test_folded_layers_with_a_relu_are_one_kernel_each(cudnn):
    model = reparameterize_model(timm.create_model('sknet12').eval())
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert not cudnn  # autograd needs other kernels
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    units = sum(len(stage) for stage in model.stages)
    # the stem and both branches of each unit; the last convolution of a unit is added to the shortcut
    assert cudnn == {'relu': 1 + 2 * units, 'add_relu': units}


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_layer_gives_the_same_values_after_folding_in_cudnn(change, cudnn):
    test_a_changed_layer_gives_the_same_values_after_folding(change)


class Halved(BasicBlock):
    def tail(self, y):
        return super().tail(y) / 2


UNIT_CHANGES = {
    'hook on the last layer': lambda unit: unit.conv2.register_forward_hook(lambda module, args, out: 2 * out),
    'hook on its convolution': lambda unit: unit.conv2.conv.register_forward_hook(lambda module, args, out: 2 * out),
    'hook on the activation': lambda unit: unit.act.register_forward_hook(lambda module, args, out: 2 * out),
    'hook on drop path': lambda unit: unit.drop_path.register_forward_hook(lambda module, args, out: 2 * out),
    'another last layer': lambda unit: setattr(unit, 'conv2', nn.Conv2d(16, 16, 1)),
    'another activation': lambda unit: setattr(unit, 'act', nn.GELU()),
    'activation of the last layer': lambda unit: setattr(unit.conv2.bn, 'act', nn.Tanh()),
    'another drop path': lambda unit: setattr(unit, 'drop_path', nn.Tanh()),
    'drop path in training': lambda unit: setattr(unit, 'drop_path', DropPath(1.0).train()),
    'another shortcut': lambda unit: setattr(unit, 'shortcut', nn.AdaptiveAvgPool2d(1)),
    'subclass': lambda unit: setattr(unit, '__class__', Halved),
    'float64': lambda unit: unit.double(),
    'reflecting padding': lambda unit: setattr(unit.conv2.conv, 'padding_mode', 'reflect'),
    'padding by name': lambda unit: setattr(unit.conv2.conv, 'padding', 'same'),
}


@pytest.mark.parametrize('change', UNIT_CHANGES)
@torch.no_grad()
def test_a_unit_changed_after_folding_gives_the_same_values_in_cudnn(change, cudnn, monkeypatch):
    model = reparameterize_model(timm.create_model('sknet12').eval())
    unit = model.stages[0][0]
    UNIT_CHANGES[change](unit)
    x = torch.randn(2, 16, 8, 8, dtype=next(unit.parameters()).dtype)
    found = unit(x)
    assert not cudnn['add_relu'] and bool(cudnn['relu']) == (change != 'float64')
    monkeypatch.setattr(timm_sknet.folding, 'runs_in_cudnn', lambda x: False)
    torch.testing.assert_close(found, unit(x))


@pytest.mark.parametrize(
    'x',
    [
        torch.zeros(2, 4, 8, 8),
        torch.zeros(3, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8).half(),
    ],
    ids=['channels', 'dimensions', 'integers', 'half'],
)
@torch.no_grad()
def test_a_wrong_input_raises_the_error_of_torch_also_in_cudnn(x, cudnn):
    model = reparameterize_model(timm.create_model('sknet12').eval())
    with pytest.raises(RuntimeError):
        model.stem(x)
    assert not cudnn


def test_anti_aliasing_is_kept():
    layer = ConvNormAct(8, 8, 3, stride=2, aa_layer='blur')
    assert layer(torch.randn(2, 8, 8, 8)).shape == (2, 8, 4, 4)


def test_folding_keeps_mode_and_freezing():
    model = timm.layers.freeze_batch_norm_2d(trained('sknet12').eval())
    model.stages.requires_grad_(False)
    folded = reparameterize_model(model)
    folded(torch.zeros(2, 3, 32, 32))
    assert {p.requires_grad for p in folded.stages.parameters()} == {False}
    assert {p.requires_grad for p in folded.stem.parameters()} == {True}


def test_a_norm_without_statistics_is_not_folded():
    model = timm.create_model('sknet12', norm_layer='layernorm2d').eval()
    folded = reparameterize_model(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x))
    folded.load_state_dict(model.state_dict())
    assert sum(isinstance(m, nn.LayerNorm) for m in folded.modules()) > 10


def test_a_folded_model_does_not_train():
    folded = reparameterize_model(trained('sknet12')).train()
    with pytest.raises(RuntimeError, match=r'folded \(reparameterized\) model cannot train. Call eval\(\)'):
        folded(torch.zeros(2, 3, 32, 32))


def test_weights_of_a_folded_model_load_only_into_a_folded_model(tmp_path, capsys):
    model = trained('sknet12')
    folded = reparameterize_model(model)
    for target, state, words in (
        (model, folded.state_dict(), r'weights are folded \(reparameterized\), but the model is not'),
        (folded, model.state_dict(), r'model is folded \(reparameterized\), but the weights are not'),
    ):
        with pytest.raises(RuntimeError, match=words):
            target.load_state_dict(state)
        with pytest.raises(RuntimeError, match=words):
            nn.Sequential(target).load_state_dict({f'0.{key}': value for key, value in state.items()})
    again = reparameterize_model(trained('sknet12'))
    again.load_state_dict(folded.state_dict())
    again.load_state_dict({'stem.conv.weight': folded.stem.conv.weight}, strict=False)
    timm.models.save_for_hf(folded, tmp_path / 'hf', safe_serialization=True)
    with pytest.raises(RuntimeError, match=r'weights are folded \(reparameterized\)'):
        timm.create_model(f'local-dir:{tmp_path / "hf"}', pretrained=True)
    (tmp_path / 'hf' / 'README.md').write_text('---\nlicense: mit\n---\n')
    assert main(['push', str(tmp_path / 'hf'), 'org/name']) == 2
    assert 'weights are folded (reparameterized)' in capsys.readouterr().err
    save_file(folded.state_dict(), tmp_path / 'folded.safetensors')
    assert main(['convert', str(tmp_path / 'folded.safetensors'), str(tmp_path / 'out'), '--arch', 'sknet12']) == 2
    assert 'weights of a folded (reparameterized) model' in capsys.readouterr().err


@pytest.mark.parametrize('mode', ['compile', 'export'])
def test_a_folded_model_is_one_graph(mode):
    folded = reparameterize_model(trained('sknet12')).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if mode == 'compile':
            graph = torch.compile(folded, backend='aot_eager', fullgraph=True)
        else:
            graph = torch.export.export(folded, (x,)).module()
        torch.testing.assert_close(graph(x), folded(x))
