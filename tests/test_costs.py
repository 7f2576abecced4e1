"""Guards the speed of SK units without a clock: counts their operators and maps."""

from collections import Counter

import onnx
import pytest
import timm
import torch
import torch._dynamo.testing
from models import MODELS
from timm.utils import reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import since

from timm_sknet import SelectiveKernelConv
from timm_sknet.ops import fuse


class Operators(TorchDispatchMode):
    """Counts operators and the maps that they allocate: results of shape (B, C, H, W) in new memory."""

    def __init__(self, x):
        super().__init__()
        self.x = x
        self.counts = Counter()
        self.maps = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix('aten::')
        self.counts[name] += 1
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.maps[name] += t.shape == self.x.shape
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def layer(kind, M=2, **kwargs):
    torch.manual_seed(0)
    branches = [[3, 1, 32], [3, 2, 32], [3, 3, 32], [5, 1, 32]][:M]
    found = SelectiveKernelConv(64, branches=branches, **kwargs).train(kind == 'train')
    return reparameterize_model(found) if kind == 'folded' else found


def images():
    return torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('M', [2, 3, 4])
@pytest.mark.parametrize('kind', ['eval', 'folded', 'train'])
def test_a_forward_pass_allocates_only_the_maps_of_branches_and_select(kind, M):
    x = images()
    found = layer(kind, M)
    with torch.set_grad_enabled(kind == 'train'), Operators(x) as operators:
        found(x)
    counts, maps = operators.counts, operators.maps
    convolutions = sum(counts[name] for name in counts if 'convolution' in name)
    norms = sum(maps[name] for name in maps if 'batch_norm' in name)
    assert convolutions == M + 2 and norms == (0 if kind == 'folded' else M)
    assert sum(maps.values()) - norms == M + (1 if M == 2 else M)  # of the convolutions and of select
    assert operators.largest <= x.nbytes and not {'stack', 'cat'} & set(counts)


@pytest.mark.parametrize('M', [2, 3, 4])
@pytest.mark.parametrize('memory_efficient', [False, True])
def test_a_backward_pass_runs_each_convolution_once_and_stacks_nothing(memory_efficient, M):
    x = images().requires_grad_()
    V = layer('train', M, memory_efficient=memory_efficient)(x)
    weights = torch.randn_like(V)
    with Operators(x) as operators:
        V.backward(weights)
    counts = operators.counts
    assert sum(counts[name] for name in counts if 'convolution' in name) == M + 2
    assert not {'stack', 'cat', '_softmax'} & set(counts) and operators.largest <= x.nbytes
    again = sum(operators.maps[name] for name in counts if 'batch_norm' in name and 'backward' not in name)
    assert again == (M if memory_efficient else 0)  # each U_i once, for two uses
    # gradients of each branch (select, ReLU, norm, convolution), of the mean, and of the weights of select
    assert sum(operators.maps.values()) - again <= 8 * M - 2


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_backward_pass_of_fuse_allocates_no_map(dtype):
    U = [images().to(dtype).requires_grad_() for _ in range(2)]
    s = fuse(U).sum()
    with Operators(U[0]) as operators:
        gradients = torch.autograd.grad(s, U)
    assert not any(operators.maps.values()) and operators.largest < U[0].nbytes
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 64), rtol=0, atol=0)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('memory_efficient', [False, True])
def test_a_function_mode_sees_every_convolution_norm_and_activation(training, memory_efficient):
    """Tools for quantisation watch these functions."""

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen[getattr(func, '__name__', '')] += 1
            return func(*args, **(kwargs or {}))

    model = timm.create_model('sknet12', memory_efficient=memory_efficient).train(training)
    modules, seen = list(model.modules()), Counter()
    with Watch():
        model(torch.randn(2, 3, 32, 32))
    assert seen['conv2d'] == sum(isinstance(m, torch.nn.Conv2d) for m in modules)
    assert seen['batch_norm'] == sum(isinstance(m, torch.nn.BatchNorm2d) for m in modules)
    relus = sum(isinstance(m, torch.nn.ReLU) for m in modules)
    assert seen['relu'] + seen['relu_'] == relus


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('memory_efficient', [False, True])
def test_a_forward_pass_calls_each_module_once(training, memory_efficient):
    model = timm.create_model('sknet12', memory_efficient=memory_efficient).train(training)
    calls = Counter()
    with register_module_forward_pre_hook(lambda module, args: calls.update([module])):
        model(torch.randn(2, 3, 32, 32))
    expected = {m for m in model.modules() if not isinstance(m, torch.nn.ModuleList)}
    assert {m for m in expected if m not in calls} == set() and set(calls.values()) == {1}


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_compiled_network_is_one_graph_for_all_batches(training):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    model = timm.create_model('sknet12').train(training)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in 2, 3, 5, 8:
        x = torch.randn(batch, 3, 32, 32)
        torch._dynamo.mark_dynamic(x, 0)
        out = compiled(x)
        if training:
            out.mean().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    'dynamo',
    [pytest.param(True, marks=since('torch', '2.7', 'the exporter of torch 2.6 does not simplify the graph')), False],
    ids=['dynamo', 'torchscript'],
)
def test_exported_graph_is_lean(tmp_path, dynamo):
    model = reparameterize_model(timm.create_model('sknet12').eval())
    file = tmp_path / 'model.onnx'
    torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), file, dynamo=dynamo, verbose=False)
    counts = Counter(node.op_type for node in onnx.load(file).graph.node)
    units = sum(1 for m in model.modules() if isinstance(m, SelectiveKernelConv))
    assert not {'Transpose', 'Concat', 'Softmax', 'Where', 'Less', 'BatchNormalization', 'Pow'} & set(counts), counts
    # one product and one difference in select, one product with the signs in the attention
    assert counts['Mul'] == 2 * units and counts['Sub'] == units and counts['Sigmoid'] == units, counts


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write: their tensors, each once for an operator. Views move none."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            self.total += sum(t.nbytes for t in tensors.values())
        return out


def test_a_forward_pass_moves_few_bytes():
    """The nearest to the speed on a GPU that can be measured without one."""

    def moved(model):
        with torch.inference_mode(), Bytes() as counter:
            model.eval()(torch.empty(8, 3, 224, 224, device='meta'))
        return counter.total

    names = 'resnext50_32x4d', 'sknet50', 'skresnext50_32x4d'
    resnext, ours, timms = (timm.create_model(name, device='meta') for name in names)
    assert moved(ours) < 1.35 * moved(resnext) and moved(reparameterize_model(ours)) < 0.95 * moved(resnext)
    assert moved(timms) > 1.6 * moved(resnext)


@since('torch', '2.15', 'older releases start CUDA for fake tensors; 2.8 does, and none between was run')
@pytest.mark.parametrize('name', MODELS)
def test_networks_run_with_fake_tensors_on_a_pretended_gpu(name):
    with FakeTensorMode():
        model = timm.create_model(name, device='cuda')
        out = model(torch.empty(2, 3, 64, 64, device='cuda'))
    assert out.device.type == 'cuda' and out.shape == (2, model.num_classes)


def test_bfloat16_autocast_of_the_network():
    model = timm.create_model('sknet12', pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            out = model(x)
    assert out.isfinite().all()
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize('kind', ['eval', 'folded'])
def test_an_empty_batch_gives_an_empty_result(kind):
    assert layer(kind)(torch.randn(0, 64, 8, 8)).shape == (0, 64, 8, 8)
