"""Pretrained weights by every road: the Hub, a checkpoint file, and the file in the package."""

import os
import subprocess
import sys

import pytest
import pytorch_reference
import timm
import torch
from conftest import TIMM_REPO
from hub import hub
from safetensors.torch import load_file

from timm_sknet.sknets import default_cfgs


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def test_timms_weights_give_timms_logits(theirs, images):
    ours = timm.create_model('sknet50').eval()
    ours.load_state_dict(theirs.state_dict())
    assert distance(ours(images), theirs(images)) < 1e-5


@torch.no_grad()
def test_timms_weights_give_timms_logits_in_training(theirs, images):
    state = theirs.state_dict()
    doubles = []
    for name in 'sknet50', 'skresnext50_32x4d':
        model = timm.create_model(name, dtype=torch.float64).train()
        model.load_state_dict(state)
        doubles.append(model(images.double()))
    assert distance(*doubles) < 1e-9


def test_download_from_the_hub(theirs, repo, images, tmp_path):
    torch.save(images, tmp_path / 'images.pt')
    script = (
        'import sys, timm, torch\n'
        "model = timm.create_model('sknet50', pretrained=True).eval()\n"
        "tagged = timm.create_model('sknet50.ra_in1k', pretrained=True, num_classes=0, in_chans=1)\n"
        "torch.save(model(torch.load('images.pt')).detach(), 'logits.pt')\n"
    )
    with hub(repo) as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, check=True, timeout=300)
    with torch.no_grad():
        assert distance(torch.load(tmp_path / 'logits.pt', weights_only=True), theirs(images)) < 1e-5


def test_timms_file_as_a_checkpoint(theirs, repo, images):
    ours = timm.create_model('sknet50', checkpoint_path=str(repo / TIMM_REPO / 'model.safetensors')).eval()
    with torch.no_grad():
        assert distance(ours(images), theirs(images)) < 1e-5


def test_keys_of_another_network_are_refused(theirs):
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('sknet26').load_state_dict(timm.create_model('resnet18').state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*stages.0.2.conv1.conv.weight'):
        timm.create_model('sknet26').load_state_dict(theirs.state_dict())


def test_embedded_weights_are_small_and_half_precision():
    path = default_cfgs['sknet12'].default.file
    state = load_file(path)
    assert os.path.getsize(path) <= 1_000_000
    for key, value in state.items():
        statistics = key.endswith(('running_mean', 'running_var'))
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if statistics else torch.float16), key
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in timm.create_model('sknet12').state_dict().items()
    }


def test_embedded_weights_load_as_float32_and_adapt():
    model = timm.create_model('sknet12', pretrained=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert timm.create_model('sknet12.cifar10', pretrained=True, num_classes=3, in_chans=1).num_classes == 3
    assert len(timm.create_model('sknet12', pretrained=True, features_only=True)(torch.zeros(2, 3, 32, 32))) == 3


def test_weights_that_need_another_network_get_it(tmp_path):
    model = timm.create_model('sknet101.authors_in1k', device='meta')
    assert sum(p.numel() for p in model.parameters()) == 48_686_760  # as the authors shipped it
    assert model.pool.ceil_mode and model.pretrained_cfg['std'] == (1 / 255,) * 3
    assert sum(p.numel() for p in timm.create_model('sknet101', device='meta').parameters()) == 48_736_040

    if not hasattr(timm.models, 'get_model_args'):
        return  # a timm that does not keep arguments
    small = timm.create_model('sknet50.authors_in1k', depths=(1, 1, 1, 1))
    timm.models.save_for_hf(small, tmp_path, safe_serialization=True)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pool.ceil_mode


def test_the_authors_file_is_where_the_error_points():
    with pytest.raises(ValueError, match=r'no public weights of sk_resnet50 .*drive.google.com.*timm-sknet convert'):
        timm.create_model('sk_resnet50', pretrained=True)


def test_the_authors_checkpoint_loads_directly(tmp_path):
    state = pytorch_reference.random_state(pytorch_reference.SK_RESNET50)
    pytorch_reference.write_checkpoint(tmp_path / 'sk_resnet50.pth.tar', state)
    model = timm.create_model('sk_resnet50', checkpoint_path=str(tmp_path / 'sk_resnet50.pth.tar'))
    assert torch.equal(model.head.fc.weight, state['module.fc.weight'])
