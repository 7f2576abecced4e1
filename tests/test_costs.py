"""What an SK unit costs, in operators: a guard against slow code that needs no clock. Its memory: test_lean.py."""

from collections import Counter

import onnx
import pytest
import timm
import torch
import torch._dynamo.testing
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sknet import SelectiveKernelConv


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, views apart."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        name = func._schema.name.removeprefix('aten::')
        if not any(alias is not None and not alias.is_write for alias in aliases) and name not in FREE:
            self.counts[name] += 1
        return out


FREE = 'empty', 'empty_like', 'new_empty', 'promote_types'


ATTENTION = {'mean': 2, 'add': 1, 'convolution': 4, 'lerp': 1}
FORWARD = {
    'eval': ATTENTION | {'native_batch_norm': 3, 'relu_': 3, '_softmax': 1},
    'folded': ATTENTION | {'relu_': 3, 'mul': 1, 'sigmoid': 1},
    'train': ATTENTION | {'native_batch_norm': 3, 'relu_': 3, '_softmax': 1, 'add_': 3},
}
BACKWARD = {
    'native_batch_norm': 2,  # U again
    'relu_': 2,
    'pow': 2,
    'sub': 1,
    'mul_': 1,
    'sum': 1,
    'zeros_like': 1,
    'stack': 1,
    'div': 1,
    'rsub': 1,
    'addcmul': 2,
    'threshold_backward': 3,
    'native_batch_norm_backward': 3,
    'convolution_backward': 4,
    '_softmax_backward_data': 1,
    'add': 1,  # of the gradients of x
}


def layer(kind):
    torch.manual_seed(0)
    found = SelectiveKernelConv(64).train(kind == 'train')
    return reparameterize_model(found) if kind == 'folded' else found


@pytest.mark.parametrize('kind', FORWARD)
def test_operators_of_the_forward_pass(kind):
    found = layer(kind)
    x = torch.randn(2, 64, 8, 8)
    with torch.set_grad_enabled(kind == 'train'), Operators() as operators:
        found(x)
    assert dict(operators.counts) == FORWARD[kind]


def test_operators_of_the_backward_pass():
    V = layer('train')(torch.randn(2, 64, 8, 8, requires_grad=True))
    weights = torch.randn_like(V)
    with Operators() as operators:
        V.backward(weights)
    assert dict(operators.counts) == BACKWARD


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


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'torchscript'])
def test_exported_graph_is_lean(tmp_path, dynamo):
    model = reparameterize_model(timm.create_model('sknet12').eval())
    file = tmp_path / 'model.onnx'
    torch.onnx.export(model, (torch.randn(2, 3, 32, 32),), file, dynamo=dynamo, verbose=False)
    counts = Counter(node.op_type for node in onnx.load(file).graph.node)
    units = sum(1 for m in model.modules() if isinstance(m, SelectiveKernelConv))
    assert not {'Transpose', 'Concat', 'Softmax', 'Where', 'Less', 'BatchNormalization', 'Pow'} & set(counts), counts
    # select takes one product and one difference, and the attention one product by its signs
    assert counts['Mul'] == 2 * units and counts['Sub'] == units and counts['Sigmoid'] == units, counts


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
def test_an_empty_batch_comes_out_empty(kind):
    assert layer(kind)(torch.randn(0, 64, 8, 8)).shape == (0, 64, 8, 8)
