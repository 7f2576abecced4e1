"""The SK-ResNets of SimCLRv2: their pools, and their weights by name. Google's outputs are in tests/checkpoints."""

import json
import os
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
from conftest import trained
from hub import hub
from simclr_reference import to_hub
from versions import since

from timm_sknet.network import ShortcutPool
from timm_sknet.sknets import model_cfgs, weights

NAMES = [name for name in model_cfgs if name.endswith('_simclr')]
# The smallest widths with which the branches still have a layer each.
NARROW = dict(mid_widths=(4, 8, 8, 8), widths=(8, 8, 8, 16), stem=(4, 3, 2), stem_widths=(4, 4))


def averages(x, stride):
    """Average pools of TensorFlow. Stride 1: SAME, the mean over the map only. Stride 2: zeros behind the map."""
    B, C, H, W = x.shape
    out = torch.zeros(B, C, -(-H // stride), -(-W // stride), dtype=x.dtype)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            window = x[:, :, stride * i : stride * i + 2, stride * j : stride * j + 2]
            out[:, :, i, j] = window.mean((2, 3)) if stride == 1 else window.sum((2, 3)) / 4
    return out


@pytest.mark.parametrize('stride', [1, 2])
def test_shortcut_pools_are_tensorflows(stride):
    pool = ShortcutPool(stride, dilation=1, zeros=stride == 2)
    for height in range(1, 8):
        for width in range(1, 8):
            x = torch.randn(2, 3, height, width, dtype=torch.float64)
            torch.testing.assert_close(pool(x), averages(x, stride), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dilation', [2, 4])
def test_a_dilated_pool_contains_the_pool_of_stride_two(dilation):
    """At every `dilation`-th position: the stage before has the resolution of the input."""
    for size in range(1, 20):
        x = torch.randn(1, 2, size, size + 3, dtype=torch.float64)
        found = ShortcutPool(1, dilation, zeros=True)(x)
        assert found.shape == x.shape
        sampled, step = x[:, :, ::dilation, ::dilation], 2 * dilation
        torch.testing.assert_close(found[:, :, ::step, ::step], averages(sampled, 2), rtol=1e-12, atol=1e-12)


def test_initialisation_is_googles():
    torch.manual_seed(0)
    model = timm.create_model('sk_resnet50x1_simclr')
    unit = model.stages[3][1]
    for conv in model.stem.more[1].conv, unit.sk.branches[1].conv, unit.conv3.conv, unit.sk.attn.fc2:
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.03)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.03) and not model.head.fc.bias.any()
    assert not unit.conv3.bn.weight.any() and unit.conv1.bn.weight.eq(1).all()


@since('torch', '2.15', 'the exporter of torch 2.11 assumes that sizes are odd or even; none between was run')
@torch.no_grad()
def test_exported_networks_are_exact_at_even_and_odd_sizes(tmp_path):
    model = trained(timm.create_model('sk_resnet50x1_simclr', **NARROW))
    images = torch.rand(2, 3, 64, 65, generator=torch.Generator().manual_seed(0))
    scripted, traced = torch.jit.script(model), torch.fx.symbolic_trace(model)
    dim = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: dim, 2: dim, 3: dim},))
    forms = [scripted, traced, exported.module()]
    for dynamic in {}, {2: dim, 3: dim}:
        file = tmp_path / f'{len(dynamic)}.onnx'
        torch.onnx.export(model, (images,), file, dynamo=True, dynamic_shapes=({0: dim, **dynamic},), verbose=False)
        session = onnxruntime.InferenceSession(file)
        for size in [(64, 65), (67, 90), (96, 64), (33, 34)] if dynamic else [(64, 65)]:
            x = torch.rand(3, 3, *size)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
    for size in (64, 65), (67, 90), (96, 64), (33, 34):
        x = torch.rand(3, 3, *size)
        for form in forms:
            torch.testing.assert_close(form(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_stages_and_widths(name):
    depth, width = (int(part) for part in name.removeprefix('sk_resnet').removesuffix('_simclr').split('x'))
    model = timm.create_model(name, device='meta', features_only=True)
    assert model.feature_info.channels() == [64 * width, *(width * n for n in (256, 512, 1024, 2048))]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert sum(model_cfgs[name].depths) * 3 + 2 == depth


def test_the_weights_of_every_name_load_from_the_hub(tmp_path):
    images = torch.rand(2, 3, 65, 96, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / 'images.pt')
    expected = {}
    for name in NAMES:
        model = trained(timm.create_model(name, **NARROW))
        cfg = weights[f'{name}.linear_in1k'].cfg
        folder = tmp_path / 'served' / cfg['hf_hub_id']
        folder.mkdir(parents=True)
        torch.save(to_hub(model.state_dict()), folder / cfg['hf_hub_filename'])
        with torch.no_grad():
            expected[name] = model(images)
    script = (
        'import json, sys, timm, torch\n'
        "images, found = torch.load('images.pt'), {}\n"
        'for name, kwargs in json.loads(sys.argv[1]):\n'
        '    model = timm.create_model(name, pretrained=True, **kwargs).eval()\n'
        '    adapted = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1, **kwargs)\n'
        '    with torch.no_grad():\n'
        '        found[name] = model(images)\n'
        "torch.save(found, 'found.pt')\n"
    )
    names = [(f'{name}.linear_in1k' if name == NAMES[0] else name, NARROW) for name in NAMES]
    with hub(tmp_path / 'served') as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        command = [sys.executable, '-c', script, json.dumps(names)]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=300)
    found = torch.load(tmp_path / 'found.pt')
    for (name, _), logits in zip(names, expected.values(), strict=True):
        torch.testing.assert_close(found[name], logits, rtol=0, atol=0)
