"""`memory_efficient=True` saves less for backward; values, derivatives and the effects of hooks stay the same."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timm_sknet import SelectiveKernelConv
from timm_sknet.layers import SelectiveKernelAttn

BRANCHES = [[3, 1, 4], [3, 2, 4], [1, 1, 2], [5, 1, 4]]


def pair(M=2, dtype=torch.float64, fmt=torch.contiguous_format, **kwargs):
    """Returns a memory-efficient layer with random batch norms, and a copy without `memory_efficient`."""
    torch.manual_seed(0)
    layer = SelectiveKernelConv(16, branches=BRANCHES[:M], L=8, memory_efficient=True, **kwargs)
    layer = layer.to(dtype=dtype, memory_format=fmt)
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    plain = copy.deepcopy(layer)
    plain.memory_efficient = False
    return layer, plain


class Alive(TorchDispatchMode):
    """Tracks the memory of all results: memory that is alive after a forward pass is kept for backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [weakref.ref(t.untyped_storage()) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


def saved(model, x):
    """Returns the bytes that a forward pass keeps for backward, without images, parameters and buffers."""
    with Alive() as alive:
        out = model(x)
    assert out.requires_grad
    known = {id(t.untyped_storage()) for t in (x, out, *model.parameters(), *model.buffers())}
    kept = {id(storage): storage.nbytes() for storage in (ref() for ref in alive.seen) if storage is not None}
    return sum(size for storage, size in kept.items() if storage not in known)


def maps(model, x):
    """Returns `saved` as a number of maps of the size of x."""
    return saved(model, x) / x.nbytes


def images(*size, dtype=torch.float64, fmt=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, generator=generator, dtype=dtype).to(memory_format=fmt)


def step(layer, x, weights, **autocast):
    """Returns the output, the gradients and the buffers after a training step."""
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
def test_values_gradients_and_running_statistics_are_those_of_autograd(M, dtype, fmt, size):
    layer, plain = pair(M, dtype, fmt)
    x, weights = images(*size, dtype=dtype, fmt=fmt), images(*size, dtype=dtype).flip(0)
    V, grads, buffers = step(layer, x, weights)
    expected, expected_grads, expected_buffers = step(plain, x, weights)
    assert torch.equal(V, expected) and V.stride() == expected.stride()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4 if size[2] == 1 else 1e-5
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + tolerance, name
    for name, buffer in expected_buffers.items():
        assert torch.equal(buffers[name], buffer), name
    assert {int(b) for name, b in buffers.items() if name.endswith('tracked')} == {1}


def test_autocast():
    layer, plain = pair(dtype=torch.float32)
    x, weights = images(4, 16, 8, 8, dtype=torch.float32), images(4, 16, 8, 8, dtype=torch.float32).flip(0)
    V, grads, buffers = step(layer, x, weights, on=True)
    expected, expected_grads, expected_buffers = step(plain, x, weights, on=True)
    exact = step(copy.deepcopy(plain), x, weights)[1]
    assert torch.equal(V, expected) and V.dtype == torch.bfloat16
    for name, grad in expected_grads.items():
        assert grads[name].dtype == grad.dtype
        if grad.norm() > 1e-3:
            assert distance(grads[name], grad) < 0.02, name
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected_buffers.items())
    assert distance(grads['x'], exact['x']) < 1.2 * distance(expected_grads['x'], exact['x']) + 1e-3


def test_every_release_of_torch_accepts_the_eps_of_the_recomputation(monkeypatch):
    """Some releases, 2.11 for example, accept no eps of 0."""

    def batch_norm(*args, eps, **kwargs):
        assert eps > 0
        recomputed.append(eps)
        return real(*args, eps=eps, **kwargs)

    real, recomputed = torch.nn.functional.batch_norm, []
    layer, _ = pair()
    V = layer(images(4, 16, 8, 8)).sum()
    monkeypatch.setattr(torch.nn.functional, 'batch_norm', batch_norm)
    V.backward()
    assert len(recomputed) == 2


def test_gradients_are_right():
    layer, _ = pair(3)
    parameters = tuple(layer.parameters())
    x = images(3, 16, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *parameters), atol=1e-4)


def test_network_keeps_at_most_a_tenth_more_than_resnext():
    """Compares the memory that a training step keeps for backward: SKNet-50 and timm's ResNeXt-50."""
    x = images(2, 3, 224, 224, dtype=torch.float32)
    ours, plain = (timm.create_model('sknet50', memory_efficient=value) for value in (True, False))
    resnext = saved(timm.create_model('resnext50_32x4d'), x)
    assert saved(ours, x) <= 1.10 * resnext
    assert saved(plain, x) <= 1.30 * resnext


@pytest.mark.parametrize('M', [2, 3, 4])
def test_a_layer_keeps_the_convolutions_maps_alone(M):
    layer, plain = pair(M, dtype=torch.float32)
    x = images(4, 16, 32, 32, dtype=torch.float32).requires_grad_()
    assert M <= maps(layer, x) < M + 0.1 and 2 * M <= maps(plain, x) < 2 * M + 0.1


@pytest.mark.parametrize('M', [2, 3])
def test_backward_frees_the_recomputed_maps(M):
    layer, _ = pair(M, dtype=torch.float32)
    x = images(4, 16, 32, 32, dtype=torch.float32).requires_grad_()
    V = layer(x)
    for _ in range(2):
        with Alive() as alive:
            V.sum().backward(retain_graph=True)
        known = {id(t.untyped_storage()) for p in (x, *layer.parameters()) for t in (p, p.grad)}
        kept = {id(s): s.nbytes() for s in (ref() for ref in alive.seen) if s is not None}
        assert sum(size for storage, size in kept.items() if storage not in known) < x.nbytes / 2


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
    """Attention that stores its output."""

    def forward(self, s):
        self.seen = super().forward(s)
        return self.seen


class Constant(nn.Module):
    """Gives all branches the same weight; has an unused parameter."""

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
def test_any_attention_can_be_used(kind):
    layer, plain = pair()
    for m in layer, plain:
        ATTENTIONS[kind](m)
        m(images(3, 16, 5, 5)).square().mean().backward()
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize('with_output', [False, True], ids=['alone', 'beside the output'])
def test_a_loss_on_the_attention_reaches_the_convolutions(with_output):
    layer, plain = pair()
    for m in layer, plain:
        m.attn.__class__ = Recorded
        V = m(images(3, 16, 5, 5))
        (m.attn.seen.square().sum() + with_output * V.square().mean()).backward()
    assert layer.branches[0].conv.weight.grad.abs().max() > 0
    assert_same_gradients(layer, plain)


def test_a_loss_may_be_taken_in_a_hook_on_the_attention():
    layer, plain = pair()
    for m in layer, plain:
        m.attn.register_forward_hook(lambda module, args, a: a.square().sum().backward(retain_graph=True))
        m(images(3, 16, 5, 5)).square().mean().backward()
    assert_same_gradients(layer, plain)


def test_gradients_may_be_taken_piece_by_piece():
    layer, plain = pair()
    grads = []
    for m in layer, plain:
        loss = m(images(3, 16, 5, 5)).square().sum()
        first = torch.autograd.grad(loss, m.attn.fc2.weight, retain_graph=True)
        grads.append([*first, *torch.autograd.grad(loss, [m.branches[0].conv.weight, m.attn.fc1.weight])])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_the_attention_gets_gradients_if_the_branches_are_frozen():
    layer, plain = pair()
    for m in layer, plain:
        m.branches.requires_grad_(False)
        m(images(3, 16, 5, 5)).square().sum().backward()
    torch.testing.assert_close(layer.attn.fc1.weight.grad, plain.attn.fc1.weight.grad, rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_where_the_branches_need_no_gradient():
    layer, plain = pair(dtype=torch.float32)
    x = images(4, 16, 32, 32, dtype=torch.float32)
    for m in layer, plain:
        m.branches.requires_grad_(False)
    assert saved(layer, x) == saved(plain, x)


class Scaled(nn.Module):
    """Halves its input in place, without a record in autograd."""

    def forward(self, x):
        with torch.no_grad():
            return x.mul_(0.5)


class Changed(TorchFunctionMode):
    """Changes inputs or results of batch norms and activations, as a quantiser does."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.kind == 'result of the ReLU' and func is torch.nn.functional.relu:
            return func(*args, **kwargs) * 0.5
        if self.kind == 'result of the norm' and func is torch.nn.functional.batch_norm:
            return func(*args, **kwargs) * 0.5
        if self.kind in ('bias of the norm', 'detached bias') and func is torch.nn.functional.batch_norm:
            bias = kwargs['bias'] * 3
            return func(*args, **kwargs | {'bias': bias.detach() if self.kind == 'detached bias' else bias})
        if self.kind == 'map' and func is torch.nn.functional.batch_norm:
            return func(args[0] * 0.5, *args[1:], **kwargs)
        if self.kind == 'input of select' and func is torch.lerp:
            return func(args[0] * 0.5, *args[1:], **kwargs)
        return func(*args, **kwargs)


def changed_by_hook(layer, where, change):
    module = layer.branches[0] if where == 'branch' else getattr(layer.branches[0], where)
    module.register_forward_hook(lambda module, args, out: change(out))


@torch.no_grad()
def quantise(x):
    x.copy_((x * 4).round() / 4)


def quantised(layer, name, before=False):
    """Rounds the output or input of a module of the first branch in place, with the gradient of the identity."""
    module = layer.branches[0].bn.get_submodule(name)
    if before:
        module.register_forward_pre_hook(lambda module, args: quantise(args[0]))
    else:
        module.register_forward_hook(lambda module, args, out: quantise(out))


def checkpointed(layer, module):
    forward = module.forward
    module.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


def offloaded(layer, module):
    forward = module.forward

    def run(x):
        with save_on_cpu():
            return forward(x)

    module.forward = run


CHANGES = {
    'quantiser behind the norm': lambda layer: quantised(layer, 'drop'),
    'quantiser before the ReLU': lambda layer: quantised(layer, 'act', before=True),
    'quantiser before a ReLU with a copy': lambda layer: (
        setattr(layer.branches[0].bn, 'act', nn.ReLU()),
        quantised(layer, 'drop'),
    ),
    'checkpointed branch': lambda layer: checkpointed(layer, layer.branches[0]),
    'checkpointed norm': lambda layer: checkpointed(layer, layer.branches[1].bn),
    'offloaded branch': lambda layer: offloaded(layer, layer.branches[1]),
    'offloaded norm': lambda layer: offloaded(layer, layer.branches[0].bn),
    'offloaded ReLU': lambda layer: offloaded(layer, layer.branches[0].bn.act),
    'hook on a branch': lambda layer: changed_by_hook(layer, 'branch', lambda out: 0.5 * out),
    'hook on a norm': lambda layer: changed_by_hook(layer, 'bn', lambda out: 0.5 * out),
    'hook on a convolution': lambda layer: changed_by_hook(layer, 'conv', lambda out: 0.5 * out),
    'detaching hook': lambda layer: changed_by_hook(layer, 'branch', lambda out: out.detach() * 0.5),
    'SiLU': lambda layer: setattr(layer.branches[0].bn, 'act', nn.SiLU()),
    'leaky ReLU': lambda layer: setattr(layer.branches[1].bn, 'act', nn.LeakyReLU(inplace=True)),
    'ReLU with a copy': lambda layer: setattr(layer.branches[1].bn, 'act', nn.ReLU()),
    'no activation': lambda layer: setattr(layer.branches[1].bn, 'act', nn.Identity()),
    'dropout': lambda layer: setattr(layer.branches[1].bn, 'drop', nn.Dropout(0.5)),
    'eval': lambda layer: layer.eval(),
    'one norm in eval mode': lambda layer: layer.branches[0].bn.eval(),
    'cumulative average': lambda layer: setattr(layer.branches[1].bn, 'momentum', None),
    'no statistics': lambda layer: setattr(
        layer.branches[1], 'bn', timm.layers.BatchNormAct2d(16, momentum=0.3).double()
    ),
    'group norm': lambda layer: setattr(layer.branches[0], 'bn', timm.layers.GroupNorm1Act(16).double()),
    'frozen norm': lambda layer: layer.branches[0].bn.requires_grad_(False),
    'frozen bias': lambda layer: layer.branches[0].bn.bias.requires_grad_(False),
    'frozen convolution': lambda layer: layer.branches[0].conv.requires_grad_(False),
    'weight norm of a norm': lambda layer: torch.nn.utils.parametrize.register_parametrization(
        layer.branches[0].bn, 'weight', nn.Softplus()
    ),
    'parametrised bias of a norm': lambda layer: torch.nn.utils.parametrize.register_parametrization(
        layer.branches[0].bn, 'bias', nn.Softplus()
    ),
    'scripted branch': lambda layer: layer.branches.__setitem__(1, torch.jit.script(layer.branches[1])),
}
MODES = ['result of the ReLU', 'result of the norm', 'bias of the norm', 'detached bias', 'map', 'input of select']


def gradients(layer, seed=1):
    x = images(3, 16, 5, 5).requires_grad_()
    torch.manual_seed(seed)
    V = layer(x)
    (V * images(3, 16, 5, 5).flip(0)).sum().backward()
    return [V.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize('M', [2, 3])
@pytest.mark.parametrize('kind', CHANGES)
def test_a_changed_layer_has_the_gradients_of_autograd(kind, M):
    layer, plain = pair(M)
    for m in layer, plain:
        CHANGES[kind](m)
    torch.testing.assert_close(gradients(layer), gradients(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', MODES)
def test_changes_by_a_function_mode_have_the_gradients_of_autograd(kind):
    layer, plain = pair()
    results = []
    for m in layer, plain:
        with Changed(kind):
            results.append(gradients(m))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert not torch.equal(results[0][0], gradients(pair()[0])[0])


@pytest.mark.parametrize('in_graph', [True, False])
def test_an_in_place_change_raises_the_error_of_autograd(in_graph):
    for m in pair():
        if in_graph:
            changed_by_hook(m, 'branch', lambda out: out.mul_(0.5))
        else:
            m.branches[0].bn.act = nn.Sequential(nn.ReLU(inplace=True), Scaled())
        V = m(images(3, 16, 5, 5))
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            V.sum().backward()


@pytest.mark.parametrize('what', ['weight', 'bias', 'map'])
def test_tensors_that_backward_needs_may_not_be_changed_before(what):
    layer, _ = pair()
    maps = []
    layer.branches[1].conv.register_forward_hook(lambda module, args, out: maps.append(out))
    V = layer(images(3, 16, 5, 5))
    with torch.no_grad():
        (maps[0] if what == 'map' else getattr(layer.branches[1].bn, what)).add_(1)
    with pytest.raises(RuntimeError, match='was changed in place between .* memory_efficient=False'):
        V.sum().backward(inputs=[layer.attn.fc2.weight])


def test_bfloat16_parameters_are_left_to_autograd():
    layer, plain = pair(dtype=torch.bfloat16)
    x, weights = images(3, 16, 5, 5, dtype=torch.bfloat16), images(3, 16, 5, 5, dtype=torch.bfloat16).flip(0)
    assert all(
        torch.equal(a, b) for a, b in zip(step(layer, x, weights)[1].values(), step(plain, x, weights)[1].values())
    )


def test_one_branch_has_nothing_to_recompute():
    layer = SelectiveKernelConv(16, branches=BRANCHES[:1], memory_efficient=True)
    x = images(3, 16, 5, 5, dtype=torch.float32)
    layer(x).sum().backward()
    assert layer.branches[0].conv.weight.grad.abs().max() > 0


def test_a_network_hands_the_switch_to_all_its_layers():
    for value in True, False:
        model = timm.create_model('sk_shufflenetv2_x0_5', memory_efficient=value, device='meta')
        assert {m.memory_efficient for m in model.modules() if isinstance(m, SelectiveKernelConv)} == {value}
    assert not timm.create_model('sknet12').stages[0][0].sk.memory_efficient


def test_running_statistics_are_updated_without_gradients():
    layer, plain = pair()
    with torch.no_grad():
        layer(images(3, 16, 5, 5))
    plain(images(3, 16, 5, 5))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


def test_functional_gradients_are_those_of_autograd():
    layer, plain = pair()
    x = images(3, 16, 5, 5)

    def loss(parameters):
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).square().mean()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    plain(x).square().mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)


def hessian_vector_products(m, x):
    """Forward over reverse, and reverse over reverse."""
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    vector = {name: p.flip(0) for name, p in parameters.items()}

    def loss(parameters):
        buffers = {name: b.clone() for name, b in m.named_buffers()}
        return torch.func.functional_call(m, (parameters, buffers), (x,)).square().mean()

    gradient = torch.func.grad(loss)

    def product(parameters):
        return sum((vector[name] * g).sum() for name, g in gradient(parameters).items())

    return torch.func.jvp(gradient, (parameters,), (vector,))[1], torch.func.grad(product)(parameters)


@pytest.mark.parametrize('M', [2, 3])
def test_nested_functional_transforms_give_the_derivatives_of_autograd(M):
    x = images(3, 16, 5, 5)
    products = [hessian_vector_products(m, x) for m in pair(M)]
    torch.testing.assert_close(*products, rtol=1e-9, atol=1e-12)


def test_forward_mode_gives_the_derivative_of_autograd():
    x = images(3, 16, 5, 5)
    tangents = []
    with torch.autograd.forward_ad.dual_level():
        for m in pair():
            V = m(torch.autograd.forward_ad.make_dual(x, x.flip(0)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(V).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)


def test_vmap_gives_the_values_of_single_calls():
    layer, plain = pair()
    x = images(2, 3, 16, 5, 5)
    for m in layer, plain:
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    V = torch.func.vmap(layer)(x)
    torch.testing.assert_close(V, torch.stack([plain(x[0]), plain(x[1])]), rtol=1e-9, atol=1e-12)
    V.sum().backward()
    assert layer.branches[0].conv.weight.grad.abs().max() > 0


def test_threads_may_share_a_layer():
    layer, _ = pair()
    parameters = list(layer.parameters())
    x = images(3, 16, 5, 5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: layer(x).sum().backward(), range(100)))
    assert all(p is q for p, q in zip(parameters, layer.parameters()))


@pytest.mark.parametrize('M', [2, 3])
def test_second_derivatives_and_batched_gradients_are_those_of_autograd(M):
    results = []
    for m in pair(M):
        x = images(3, 16, 5, 5).requires_grad_()
        (grad,) = torch.autograd.grad(m(x).square().mean(), x, create_graph=True)
        grad.square().sum().backward()
        V = m(x)
        batched = torch.autograd.grad(V, x, torch.stack((V.detach(), V.detach().flip(0))), is_grads_batched=True)
        results.append([grad.detach(), x.grad, *batched, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_right():
    layer, _ = pair(3)
    x = images(2, 16, 2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), (x,), atol=1e-4)


@pytest.mark.parametrize('name', ['sknet12', 'sk_shufflenetv2_x0_5'])
def test_checkpointing_changes_no_gradient(name):
    """In training mode, checkpointing runs each unit twice."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, memory_efficient=True).double()
    x = images(3, 3, 32, 32)
    grads = []
    for enable in False, True:
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
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
def test_checkpointing_runs_a_layer_twice(kwargs):
    layer, plain = pair()
    for m in layer, plain:
        x = images(3, 16, 5, 5).requires_grad_()
        checkpoint(m, x, **kwargs).square().mean().backward()
    assert_same_gradients(layer, plain)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    assert {int(b) for name, b in layer.named_buffers() if name.endswith('tracked')} == {2}


def test_checkpointing_keeps_as_little_as_for_a_plain_layer():
    layer, plain = pair(dtype=torch.float32)
    x = images(4, 16, 32, 32, dtype=torch.float32).requires_grad_()
    for m in layer, plain:
        with Alive() as alive:
            V = checkpoint(m, x, use_reentrant=False)
        kept = {id(s): s.nbytes() for s in (ref() for ref in alive.seen) if s is not None}
        assert sum(kept.values()) < V.nbytes + x.nbytes / 2  # only V


def test_other_hooks_on_saved_tensors_see_all_saved_tensors():
    seen, grads = [], []
    for m in pair():
        sizes = []
        x = images(3, 16, 5, 5).requires_grad_()
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            V = m(x)
        V.square().mean().backward()
        seen.append(sizes)
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    assert seen[0] == seen[1]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_offloading_of_saved_tensors():
    grads = []
    for m in pair():
        with save_on_cpu():
            V = m(images(3, 16, 5, 5))
        V.square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
