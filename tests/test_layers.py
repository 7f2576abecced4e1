"""The SK convolution follows the paper's equations, also scripted, traced, exported, compiled and under autocast."""

import itertools

import pytest
import torch
from timm.layers import SelectiveKernel
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from timm_sknet import SelectiveKernelAttn, SelectiveKernelConv
from timm_sknet.ops import fuse, select

BRANCHES = {
    'M=1': [[3, 1, 4]],
    'M=2, paper': [[3, 1, 4], [3, 2, 4]],
    'M=2, 1x1 and 3x3': [[1, 1, 2], [3, 1, 2]],
    'M=2, dense and grouped': [[3, 1, 1], [3, 1, 8]],
    'M=2, depthwise': [[3, 1, 0], [3, 2, 0]],
    'M=2, 5x5 and 7x7': [[5, 1, 2], [7, 1, 8]],
    'M=3': [[3, 1, 4], [3, 2, 4], [3, 3, 4]],
    'M=4': [[1, 1, 4], [3, 1, 4], [3, 2, 2], [5, 1, 8]],
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Sets parameters and running statistics to random values far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name.endswith('running_var') or name.endswith('bn.weight'):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.data.normal_(std=0.3, generator=generator)
    return module


def conv(x, weight, stride, dilation, groups):
    """Cross-correlation as a sum of shifted images, one per tap; the padding keeps the size for odd kernels."""
    k = weight.shape[-1]
    pad = dilation * (k - 1) // 2
    B, C, H, W = x.shape
    x = nn.functional.pad(x, (pad,) * 4)
    weight = weight.reshape(groups, -1, C // groups, k, k)
    out = 0
    for i, j in itertools.product(range(k), repeat=2):
        y, z = i * dilation, j * dilation
        tap = x[:, :, y : y + H : stride, z : z + W : stride].reshape(B, groups, C // groups, -1)
        out = out + torch.einsum('bgip,goi->bgop', tap, weight[..., i, j])
    return out.reshape(B, -1, (H - 1) // stride + 1, (W - 1) // stride + 1)


def norm(x, bn, training):
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (bn.running_mean, bn.running_var)
    x = (x - mean[:, None, None]) / (var[:, None, None] + bn.eps).sqrt()
    return x * bn.weight[:, None, None] + bn.bias[:, None, None]


def equations(layer, x, branches, stride, dilation, training):
    """Reference: equations 1 to 6 of the paper. With `split_input`, each branch gets a part of x."""
    U = []
    parts = x.split(x.shape[1] // len(branches), 1) if layer.split_input else [x] * len(branches)
    for branch, part, (_, D, G) in zip(layer.branches, parts, branches):
        u = conv(part, branch.conv.weight, stride, D * dilation, G or part.shape[1])
        U.append(norm(u, branch.bn, training).clamp(min=0))
    if layer.attn is None:
        return sum(U), None
    C = U[0].shape[1]
    s = sum(U).mean((2, 3), keepdim=True)
    z = norm(torch.einsum('dc,bcij->bdij', layer.attn.fc1.weight[..., 0, 0], s), layer.attn.bn, training).clamp(min=0)
    logits = torch.einsum('md,bdij->bm', layer.attn.fc2.weight[..., 0, 0], z)
    A = torch.stack([logits[:, i * C : (i + 1) * C].exp() for i in range(len(U))], dim=1)
    a = A / A.sum(1, keepdim=True)
    return sum(a[:, i, :, None, None] * u for i, u in enumerate(U)), a


@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('kwargs', [{}, dict(split_input=True), dict(attention=False)], ids=str)
@pytest.mark.parametrize('branches', BRANCHES.values(), ids=BRANCHES)
def test_layer_follows_the_equations(branches, kwargs, training, stride, dilation):
    channels = 8 * len(branches) if 'split_input' in kwargs else 8
    settings = dict(stride=stride, dilation=dilation, r=2, L=4, **kwargs)
    layer = randomize(SelectiveKernelConv(channels, 16, branches, **settings)).double()
    assert (layer.attn is not None) == (len(branches) > 1 and 'attention' not in kwargs)
    x = torch.randn(3, channels, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, a = equations(layer, x, branches, stride, dilation, training)
    attention = []
    if a is not None:
        layer.attn.register_forward_hook(lambda module, args, out: attention.append(out))
    torch.testing.assert_close(layer.train(training)(x), expected, rtol=1e-10, atol=1e-10)
    if a is not None:
        torch.testing.assert_close(attention[0], a, rtol=1e-10, atol=1e-10)


def test_stride_gives_the_documented_output_size():
    for stride, size in itertools.product((1, 2, 3), (7, 8, 9)):
        out = SelectiveKernelConv(8, branches=BRANCHES['M=2, paper'], stride=stride).eval()(
            torch.zeros(1, 8, size, size)
        )
        assert out.shape[2:] == (-(-size // stride),) * 2


@pytest.mark.parametrize('branches', [BRANCHES['M=1'], BRANCHES['M=2, paper'], BRANCHES['M=3']], ids='M={}'.format)
def test_gradients_are_right(branches):
    layer = randomize(SelectiveKernelConv(8, 8, branches, L=4, act_layer=nn.Softplus)).double()
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()))


def test_one_branch_has_no_attention():
    layer = SelectiveKernelConv(64, branches=[[3, 1, 32]])
    assert layer.attn is None
    assert sum(p.numel() for p in layer.parameters()) == 64 * 2 * 9 + 2 * 64


@pytest.mark.parametrize(
    'channels, kwargs, width',
    [
        (128, {}, 32),
        (1024, {}, 64),
        (2048, dict(r=32, L=16), 64),
        (64, dict(L=0), 4),
        (64, dict(attn_channels=7), 7),
    ],
)
def test_attention_width(channels, kwargs, width):
    layer = SelectiveKernelConv(channels, **kwargs, device='meta')
    assert layer.attn.fc1.out_channels == layer.attn.fc2.in_channels == width
    assert layer.attn.fc2.out_channels == 2 * channels


def test_equals_timms_layer():
    theirs = randomize(
        SelectiveKernel(64, 64, [3, 5], stride=2, groups=32, rd_ratio=1 / 16, split_input=False)
    ).double()
    ours = SelectiveKernelConv(64, stride=2, L=8).double()
    names = [('paths', 'branches'), ('fc_reduce', 'fc1'), ('fc_select', 'fc2')]
    state = theirs.state_dict()
    for old, new in names:
        state = {key.replace(old, new): value for key, value in state.items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 64, 9, 9, dtype=torch.float64)
    for training in False, True:
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pooled_statistics_neither_overflow_nor_lose_precision(dtype):
    top = min(6e4, torch.finfo(dtype).max / 4)
    U = [torch.full((1, 2, 112, 112), top, dtype=dtype), torch.full((1, 2, 112, 112), -top, dtype=dtype)]
    for signs in itertools.product((0, 1), repeat=2):
        s = fuse([U[i] for i in signs])
        assert s.shape == (1, 2, 1, 1) and s.dtype == dtype
        expected = sum(U[i].double().mean((2, 3), keepdim=True) for i in signs)
        if expected.abs().max() < torch.finfo(dtype).max:
            torch.testing.assert_close(s.double(), expected, rtol=1e-3, atol=1e-3)
    small = [torch.full((1, 1, 112, 112), 0.1, dtype=dtype)] * 3
    torch.testing.assert_close(fuse(small).double().item(), 0.3, rtol=1e-2, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_fuse_has_the_derivatives_of_float32_in_half_precision(dtype):
    def curved(u):
        return fuse([u, u * u]).square().sum()

    u, v = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    transforms = {
        'gradient': torch.func.grad(curved),
        'forward': lambda u: torch.func.jvp(curved, (u,), (v.to(u),))[1],
        'forward over reverse': lambda u: torch.func.jvp(torch.func.grad(curved), (u,), (v.to(u),))[1],
        'reverse over reverse': lambda u: torch.autograd.functional.hvp(curved, u, v.to(u))[1],
        'of each image': lambda u: torch.func.vmap(torch.func.grad(curved))(u.unsqueeze(1)),
    }
    for name, transform in transforms.items():
        expected = transform(u.double())
        assert (transform(u).double() - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize('M', [2, 3, 4])
def test_select_is_a_weighted_sum_that_keeps_layout_and_dtype(M):
    generator = torch.Generator().manual_seed(0)
    for fmt, dtype in itertools.product(
        (torch.contiguous_format, torch.channels_last), (torch.float32, torch.bfloat16)
    ):
        U = [torch.randn(2, 6, 5, 7, generator=generator).to(dtype, memory_format=fmt) for _ in range(M)]
        a = torch.randn(2, M, 6, generator=generator).softmax(1)
        V = select(U, a)
        assert V.dtype == dtype and V.is_contiguous(memory_format=fmt)
        expected = (torch.stack(U, 1).double() * a[..., None, None].double()).sum(1)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(V.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('branches', [BRANCHES['M=2, paper'], BRANCHES['M=3']], ids='M={}'.format)
def test_channels_last_stays_channels_last(branches):
    layer = SelectiveKernelConv(16, branches=branches).to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    for training in True, False:
        assert layer.train(training)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('M', [2, 3])
def test_autocast_stays_close_to_float32(M):
    layer = randomize(SelectiveKernelConv(16, branches=[[3, 1, 4], [3, 2, 4], [3, 3, 4]][:M])).eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    expected = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


def test_half_precision_module_runs():
    layer = SelectiveKernelConv(16, branches=BRANCHES['M=3'], dtype=torch.bfloat16)
    assert layer(torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('act, norm', [('gelu', 'groupnorm1'), (nn.SiLU, nn.BatchNorm2d), ('silu', 'layernorm2d')])
def test_activation_and_norm_reach_branches_and_attention(act, norm):
    layer = SelectiveKernelConv(16, branches=BRANCHES['M=2, paper'], L=8, act_layer=act, norm_layer=norm)
    norms = [branch.bn for branch in layer.branches] + [layer.attn.bn]
    assert len({type(n) for n in norms}) == 1
    assert ('BatchNorm' in type(norms[0]).__name__) == (norm is nn.BatchNorm2d)
    for n in norms:
        assert (act if isinstance(act, str) else 'silu') in type(n.act).__name__.lower()
    assert layer(torch.randn(2, 16, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(branches=[]), 'at least one'),
        (dict(branches=[3, 5]), r'\[3, 5\]'),
        (dict(branches='abc'), 'abc'),
        (dict(branches=[[3.5, 1, 2]]), '3.5'),
        (dict(branches=[[3, 1]]), r'\[\[3, 1\]\]'),
        (dict(branches=[[4, 1, 2]]), r'odd kernel size.*\[4, 1, 2\]'),
        (dict(branches=[[3, 0, 2]]), r'dilation.*\[3, 0, 2\]'),
        (dict(branches=[[3, 1, -1]]), r'groups.*\[3, 1, -1\]'),
        (dict(branches=[[3, 1, 5]]), 'must be divisible by its 5 groups, got 16'),
        (dict(stride=0), 'stride.*0'),
        (dict(dilation=0), 'dilation.*0'),
        (dict(attn_channels=0), 'attention width.*0'),
        (dict(r=0), 'r must be positive, got 0'),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        SelectiveKernelConv(16, **{'branches': BRANCHES['M=2, paper'], **kwargs})


@pytest.mark.parametrize('branches', [[], 3])
def test_bad_branches_are_named_with_split_input(branches):
    with pytest.raises(ValueError, match='branches must be'):
        SelectiveKernelConv(16, branches=branches, split_input=True)


def test_training_batch_of_one_names_the_remedies():
    layer = SelectiveKernelConv(16, branches=BRANCHES['M=2, paper'])
    x = torch.randn(1, 16, 8, 8)
    with pytest.raises(ValueError, match=r'batch of 1.*drop_last=True.*eval\(\).*layernorm2d'):
        layer(x)
    layer.attn.bn.eval()
    layer(x)
    layer.eval()(x)
    SelectiveKernelConv(16, branches=BRANCHES['M=2, paper'], norm_layer='layernorm2d')(x)
    SelectiveKernelConv(16, branches=BRANCHES['M=1'])(x)


def test_batch_check_survives_symbolic_tracing_in_training():
    layer = SelectiveKernelConv(16, branches=BRANCHES['M=2, paper'])
    traced = torch.fx.symbolic_trace(layer)
    assert traced(torch.randn(2, 16, 8, 8)).shape == (2, 16, 8, 8)
    with pytest.raises(ValueError, match='batch of 1'):
        traced(torch.randn(1, 16, 8, 8))


@pytest.mark.parametrize('branches', [BRANCHES['M=1'], BRANCHES['M=2, paper'], BRANCHES['M=3']], ids='M={}'.format)
@pytest.mark.parametrize('kwargs', [{}, dict(split_input=True), dict(attention=False)], ids=str)
def test_script_trace_and_export_agree_with_eager(branches, kwargs):
    channels = 4 * len(branches) if 'split_input' in kwargs else 16
    layer = randomize(SelectiveKernelConv(channels, 16, branches=branches, **kwargs)).eval()
    x = torch.randn(2, channels, 8, 8)
    expected = layer(x)
    batch = torch.export.Dim('batch', min=1)
    forms = dict(
        script=torch.jit.script(layer),
        trace=torch.jit.trace(layer, x),
        fx=torch.fx.symbolic_trace(layer),
        export=torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module(),
    )
    for name, form in forms.items():
        torch.testing.assert_close(form(x), expected, msg=name)
        assert form(x[:1]).shape == (1, 16, 8, 8), name


def training_layer(M):
    return randomize(SelectiveKernelConv(8, branches=[[3, 1, 4], [3, 2, 4], [1, 1, 1]][:M], L=4)).double()


@pytest.mark.parametrize('M', [2, 3])
def test_training_is_ordinary_autograd(M):
    """First and second derivatives (backward, forward mode and torch.func) equal finite differences."""
    layer = training_layer(M)
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = tuple(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, *parameters), atol=1e-4)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(layer, (x,), atol=1e-4)

    def loss(weights):
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        return torch.func.functional_call(layer, (weights, buffers), (x.detach(),)).square().sum()

    found = torch.func.grad(loss)({name: p.detach() for name, p in layer.named_parameters()})
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-9)


def test_training_is_traced_and_may_change_what_autograd_saved():
    layer = training_layer(2)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    weights = dict(layer.named_parameters())

    def gradients(x):
        return torch.autograd.grad(layer(x).square().sum(), list(weights.values()))

    expected = gradients(x)
    traced = make_fx(gradients)(x)
    torch.testing.assert_close(traced(x), expected)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        V = layer(x)
        loss = V.square().sum()
        with torch.no_grad():
            V.zero_()
        torch.testing.assert_close(torch.autograd.grad(loss, list(weights.values())), expected)


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_compiled_layer_is_one_graph_and_shows_its_attention(training):
    torch._dynamo.reset()
    layer = randomize(SelectiveKernelConv(16, branches=BRANCHES['M=2, paper'])).double().train(training)
    seen = []
    layer.attn.register_forward_hook(lambda module, args, a: seen.append(a.detach()))
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    expected = layer(x)
    layer.load_state_dict(state)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)
    torch.testing.assert_close(seen[1], seen[0])
    assert seen[1].shape == (2, 2, 16)
    torch.testing.assert_close(seen[1].sum(1), torch.ones(2, 16, dtype=torch.float64))


def test_attention_is_a_public_module_of_its_own():
    attn = SelectiveKernelAttn(16, M=3, attn_channels=4).eval()
    a = attn(torch.randn(2, 16, 1, 1))
    assert a.shape == (2, 3, 16)
    torch.testing.assert_close(a.sum(1), torch.ones(2, 16))
