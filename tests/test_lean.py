"""Training with one map for each branch equals training through autograd alone, and keeps less."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timm_sknet import SelectiveKernelConv
from timm_sknet import ops as ops_module
from timm_sknet.layers import SelectiveKernelAttn

BRANCHES = [[3, 1, 4], [3, 2, 4], [1, 1, 2], [5, 1, 4]]


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the lean path is taken."""
    calls = []
    apply = ops_module._Select.apply
    monkeypatch.setattr(ops_module._Select, 'apply', lambda *args: calls.append(1) or apply(*args))
    return calls


def pair(M=2, dtype=torch.float64, fmt=torch.contiguous_format, **kwargs):
    """A layer with random norms, and a copy that leaves everything to autograd."""
    torch.manual_seed(0)
    layer = SelectiveKernelConv(16, branches=BRANCHES[:M], L=8, **kwargs).to(dtype=dtype, memory_format=fmt)
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    plain = copy.deepcopy(layer)
    plain.lean = False
    return layer, plain


def images(*size, dtype=torch.float64, fmt=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator, dtype=dtype).to(memory_format=fmt)


def step(layer, x, weights, **autocast):
    """Returns output, gradients by name and buffers after a step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=bool(autocast)):
        V = layer(x)
    (V.to(weights.dtype) * weights).sum().backward()
    grads = {'x': x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return V.detach(), grads, dict(layer.named_buffers())


def assert_same_gradients(layer, plain):
    for (name, p), q in zip(layer.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)


def distance(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize('size', [(2, 16, 1, 1), (3, 16, 7, 5), (4, 16, 8, 8)], ids=str)
@pytest.mark.parametrize('fmt', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('M', [2, 3, 4])
def test_values_gradients_and_running_statistics_are_those_of_autograd(calls, M, dtype, fmt, size):
    layer, plain = pair(M, dtype, fmt)
    x, weights = images(*size, dtype=dtype, fmt=fmt), images(*size, dtype=dtype).flip(0)
    V, grads, buffers = step(layer, x, weights)
    expected, expected_grads, expected_buffers = step(plain, x, weights)
    assert len(calls) == 1
    assert torch.equal(V, expected) and V.stride() == expected.stride()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4 if size[2] == 1 else 1e-5
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + tolerance, name
    for name, buffer in expected_buffers.items():
        assert torch.equal(buffers[name], buffer), name
    assert {int(b) for name, b in buffers.items() if name.endswith('tracked')} == {1}


def test_autocast(calls):
    layer, plain = pair(dtype=torch.float32)
    x, weights = images(4, 16, 8, 8, dtype=torch.float32), images(4, 16, 8, 8, dtype=torch.float32).flip(0)
    V, grads, buffers = step(layer, x, weights, on=True)
    expected, expected_grads, expected_buffers = step(plain, x, weights, on=True)
    exact = step(copy.deepcopy(plain), x, weights)[1]
    assert len(calls) == 1 and torch.equal(V, expected) and V.dtype == torch.bfloat16
    for name, grad in expected_grads.items():
        assert grads[name].dtype == grad.dtype
        if grad.norm() > 1e-3:
            assert distance(grads[name], grad) < 0.02, name
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected_buffers.items())
    assert distance(grads['x'], exact['x']) < 1.2 * distance(expected_grads['x'], exact['x']) + 1e-3


def test_gradients_are_right(calls):
    layer, _ = pair(3)
    parameters = tuple(layer.parameters())
    x = images(3, 16, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *parameters), atol=1e-4)
    assert calls


def test_network_keeps_at_most_a_tenth_more_than_resnext(calls):
    """What a training step of SKNet-50 saves for backward, against timm's ResNeXt-50."""
    ours, lean = timm.create_model('sknet50'), len(calls)
    resnext = timm.create_model('resnext50_32x4d')
    x = images(2, 3, 224, 224, dtype=torch.float32)
    ratio = saved(ours, x) / saved(resnext, x)
    assert len(calls) - lean == 16
    assert ratio <= 1.10, ratio


def saved(model, x):
    """Bytes of the storages that a forward pass keeps for backward, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


def test_a_unit_keeps_the_convolutions_outputs():
    layer, plain = pair(dtype=torch.float32)
    x = images(4, 16, 32, 32, dtype=torch.float32).requires_grad_()
    maps = [saved(m, x) / (x.numel() * x.element_size()) for m in (layer, plain)]
    assert 2 <= maps[0] < 2.1 and 4 <= maps[1] < 4.1


def test_backward_may_be_repeated_and_gradients_accumulate():
    layer, plain = pair()
    x = images(3, 16, 5, 5)
    for m in layer, plain:
        V = m(x)
        V.square().mean().backward(retain_graph=True)
        V.square().mean().backward()
        m(x).mean().backward()
    assert_same_gradients(layer, plain)


def test_frozen_parameters_get_no_gradient():
    for frozen in 'branches.0.conv.weight', 'branches.1.bn.weight', 'attn.fc1.weight', 'attn.bn.bias':
        layer, plain = pair()
        for m in layer, plain:
            m.get_parameter(frozen).requires_grad_(False)
            m(images(3, 16, 5, 5)).square().mean().backward()
        for (name, p), q in zip(layer.named_parameters(), plain.parameters()):
            assert (p.grad is None) == (q.grad is None) == (name == frozen)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_hooks_on_parameters_see_each_gradient_once():
    layer, plain = pair()
    for m in layer, plain:
        for p in m.parameters():
            p.register_hook(lambda grad: 2 * grad)
        m(images(3, 16, 5, 5)).square().mean().backward()
    for p, q in zip(layer.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


class Recorded(SelectiveKernelAttn):
    """Keeps what it gives."""

    def forward(self, s):
        self.seen = super().forward(s)
        return self.seen


class Constant(nn.Module):
    """Weighs all branches alike; has a parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, s):
        return s.new_full((s.shape[0], 2, s.shape[1]), 0.5)


def scripted(layer):
    layer.attn = torch.jit.script(layer.attn)


def hooked(layer):
    layer.attn.register_forward_hook(lambda module, args, a: setattr(layer, 'seen', a))


ATTENTIONS = {
    'recorded': lambda layer: setattr(layer.attn, '__class__', Recorded),
    'constant': lambda layer: setattr(layer, 'attn', Constant()),
    'scripted': scripted,
    'hooked': hooked,
    'weight norm': lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.attn.fc1),
}


@pytest.mark.parametrize('kind', ATTENTIONS)
def test_any_attention_is_called_as_it_is(calls, kind):
    layer, plain = pair()
    for m in layer, plain:
        ATTENTIONS[kind](m)
        m(images(3, 16, 5, 5)).square().mean().backward()
    assert calls
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize('with_output', [False, True], ids=['alone', 'beside the output'])
def test_a_loss_on_the_attention_reaches_the_convolutions(calls, with_output):
    layer, plain = pair()
    for m in layer, plain:
        m.attn.__class__ = Recorded
        V = m(images(3, 16, 5, 5))
        (m.attn.seen.square().sum() + with_output * V.square().mean()).backward()
    assert calls and layer.branches[0].conv.weight.grad.abs().max() > 0
    assert_same_gradients(layer, plain)


def test_a_loss_may_be_taken_in_a_hook_on_the_attention(calls):
    layer, plain = pair()
    for m in layer, plain:
        m.attn.register_forward_hook(lambda module, args, a: a.square().sum().backward(retain_graph=True))
        m(images(3, 16, 5, 5)).square().mean().backward()
    assert len(calls) == 1
    assert_same_gradients(layer, plain)


def test_gradients_may_be_taken_piece_by_piece(calls):
    layer, plain = pair()
    grads = []
    for m in layer, plain:
        loss = m(images(3, 16, 5, 5)).square().sum()
        first = torch.autograd.grad(loss, m.attn.fc2.weight, retain_graph=True)
        grads.append([*first, *torch.autograd.grad(loss, [m.branches[0].conv.weight, m.attn.fc1.weight])])
    assert calls
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_frozen_branches_leave_the_attention_its_gradient(calls):
    layer, plain = pair()
    for m in layer, plain:
        m.branches.requires_grad_(False)
        m(images(3, 16, 5, 5)).square().sum().backward()
    assert calls
    torch.testing.assert_close(layer.attn.fc1.weight.grad, plain.attn.fc1.weight.grad, rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_where_the_branches_need_no_gradient():
    layer, _ = pair(dtype=torch.float32)
    layer.branches.requires_grad_(False)
    kept = []
    layer.attn.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    V = layer(images(4, 16, 32, 32, dtype=torch.float32))
    V.sum().backward()
    assert not kept[0].requires_grad and V.grad_fn.unit.again is None


def plain_reason(kind):
    if kind == 'another activation':
        return pair(act_layer='silu')[0]
    if kind == 'another norm':
        return pair(norm_layer='groupnorm1')[0]
    if kind == 'bfloat16':
        return pair(dtype=torch.bfloat16)[0]
    layer = pair()[0]
    if kind == 'sync':
        return timm.layers.convert_sync_batchnorm(layer).eval()
    if kind == 'frozen':
        return timm.layers.freeze_batch_norm_2d(layer)
    if kind == 'norms in eval mode':
        layer.branches[0].bn.eval()
    if kind == 'eval':
        layer.eval()
    if kind == 'cumulative average':
        layer.branches[1].bn.momentum = None
    if kind == 'hook on a branch':
        layer.branches[0].register_forward_hook(lambda *args: None)
    if kind == 'hook on an activation':
        layer.branches[0].bn.act.register_forward_pre_hook(lambda *args: None)
    if kind == 'patched branch':
        layer.branches[1].forward = layer.branches[1].forward
    if kind == 'scripted branch':
        layer.branches[1] = torch.jit.script(layer.branches[1])
    if kind == 'dropout in a norm':
        layer.branches[1].bn.drop = nn.Dropout(0.5)
    if kind == 'anti-aliasing':
        layer.branches[0].aa = layer.branches[1].aa = nn.AvgPool2d(2)
    if kind == 'weight norm of a norm':
        torch.nn.utils.parametrize.register_parametrization(layer.branches[0].bn, 'weight', nn.Softplus())
    if kind == 'one branch':
        layer = SelectiveKernelConv(16, branches=BRANCHES[:1]).double()
    return layer


@pytest.mark.parametrize(
    'kind',
    [
        'another activation',
        'another norm',
        'bfloat16',
        'sync',
        'frozen',
        'norms in eval mode',
        'eval',
        'cumulative average',
        'hook on a branch',
        'hook on an activation',
        'patched branch',
        'scripted branch',
        'dropout in a norm',
        'anti-aliasing',
        'weight norm of a norm',
        'one branch',
    ],
)
def test_everything_else_is_left_to_autograd(calls, kind):
    layer = plain_reason(kind)
    x = images(3, 16, 5, 5, dtype=next(layer.parameters()).dtype).requires_grad_()
    layer(x).float().square().mean().backward()
    assert x.grad.abs().max() > 0 and not calls


def test_without_gradients_statistics_move_all_the_same(calls):
    layer, plain = pair()
    with torch.no_grad():
        layer(images(3, 16, 5, 5))
    plain(images(3, 16, 5, 5))
    assert not calls
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


def test_hooks_on_all_modules_see_the_batch_norms(calls):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    layer, _ = pair()
    try:
        layer(images(3, 16, 5, 5))
    finally:
        handle.remove()
    assert layer.branches[0].bn in seen and not calls


def test_functional_gradients_are_those_of_autograd(calls):
    layer, plain = pair()
    x = images(3, 16, 5, 5)

    def loss(parameters):
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).square().mean()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    assert not calls
    plain(x).square().mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)


def test_forward_mode_names_the_remedy():
    layer, plain = pair()
    x = images(3, 16, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match='SelectiveKernelConv.lean = False'):
            layer(torch.autograd.forward_ad.make_dual(x, x))
        plain(torch.autograd.forward_ad.make_dual(x, x))


def test_threads_may_share_a_layer(calls):
    layer, _ = pair()
    parameters = list(layer.parameters())
    x = images(3, 16, 5, 5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: layer(x).sum().backward(), range(100)))
    assert len(calls) == 100 and all(p is q for p, q in zip(parameters, layer.parameters()))


def test_second_derivatives_and_batched_gradients_name_the_remedy():
    layer, plain = pair()
    x = images(3, 16, 5, 5).requires_grad_()
    with pytest.raises(RuntimeError, match='SelectiveKernelConv.lean = False'):
        torch.autograd.grad(layer(x).square().mean(), x, create_graph=True)
    V = layer(x)
    with pytest.raises(RuntimeError, match='SelectiveKernelConv.lean = False'):
        torch.autograd.grad(V, x, torch.ones(2, *V.shape, dtype=V.dtype), is_grads_batched=True)
    (grad,) = torch.autograd.grad(plain(x).square().mean(), x, create_graph=True)
    grad.square().sum().backward()
    assert plain.branches[0].conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize('name', ['sknet12', 'sk_shufflenetv2_x0_5'])
def test_checkpointing_changes_no_gradient(calls, name):
    """In training mode, where checkpointing runs each unit twice."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    x = images(3, 3, 32, 32)
    grads = []
    for enable in False, True:
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert calls
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def save_convolutions(ctx, op, *args, **kwargs):
    convolution = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(use_reentrant=True),
        dict(use_reentrant=False),
        dict(use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_convolutions)),
    ],
    ids=['reentrant', 'not reentrant', 'convolutions saved'],
)
def test_checkpointing_runs_a_layer_twice(calls, kwargs):
    layer, plain = pair()
    for m in layer, plain:
        x = images(3, 16, 5, 5).requires_grad_()
        checkpoint(m, x, **kwargs).square().mean().backward()
    assert calls
    assert_same_gradients(layer, plain)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    assert {int(b) for name, b in layer.named_buffers() if name.endswith('tracked')} == {2}
