"""Pretrained weights from all sources: the Hub, a checkpoint file, a folder and the package."""

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import pytorch_reference
import timm
import torch
from conftest import TIMM_REPO, trained
from hub import hub
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from timm.utils import reparameterize_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_sknet.keys import TIMM, detect_origin, native_keys
from timm_sknet.loading import PretrainedWeights
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


@pytest.mark.parametrize('name, timms', [('sk_resnet18_timm', 'skresnet18'), ('sk_resnet34_timm', 'skresnet34')])
@torch.no_grad()
def test_timms_small_weights_give_timms_logits(name, timms, images):
    theirs, ours = trained(timm.create_model(timms)), timm.create_model(name).eval()
    ours.load_state_dict(theirs.state_dict())
    for x in images, images[..., :57, :]:
        assert distance(ours(x), theirs(x)) < 1e-5
        assert distance(reparameterize_model(ours)(x), theirs(x)) < 1e-5


@torch.no_grad()
def test_timms_weights_give_timms_logits_in_training(theirs, images):
    state = theirs.state_dict()
    doubles = []
    for name in 'sknet50', 'skresnext50_32x4d':
        model = timm.create_model(name, dtype=torch.float64).train()
        model.load_state_dict(state)
        doubles.append(model(images.double()))
    assert distance(*doubles) < 1e-9


def test_download_from_the_hub(images, tmp_path):
    """timm's own files, under the real names of the repositories."""
    theirs = {}
    for name in ('skresnext50_32x4d', 'skresnet18', 'skresnet34'):
        theirs[name] = trained(timm.create_model(name))
        folder = tmp_path / 'served' / 'timm' / f'{name}.ra_in1k'
        folder.mkdir(parents=True)
        save_file(theirs[name].state_dict(), folder / 'model.safetensors')
    torch.save(images, tmp_path / 'images.pt')
    script = (
        'import sys, timm, torch\n'
        "images = torch.load('images.pt')\n"
        "for name in 'sknet50', 'sk_resnet18_timm', 'sk_resnet34_timm':\n"
        '    model = timm.create_model(name, pretrained=True).eval()\n'
        "    tagged = timm.create_model(f'{name}.ra_in1k', pretrained=True, num_classes=0, in_chans=1)\n"
        "    torch.save(model(images).detach(), f'{name}.pt')\n"
    )
    with hub(tmp_path / 'served') as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, check=True, timeout=300)
    for name, model in zip(('sknet50', 'sk_resnet18_timm', 'sk_resnet34_timm'), theirs.values()):
        logits = torch.load(tmp_path / f'{name}.pt', weights_only=True)
        with torch.no_grad():
            assert distance(logits, model(images)) < 1e-5


def test_timms_file_as_a_checkpoint(theirs, repo, images):
    ours = timm.create_model('sknet50', checkpoint_path=str(repo / TIMM_REPO / 'model.safetensors')).eval()
    with torch.no_grad():
        assert distance(ours(images), theirs(images)) < 1e-5


@pytest.mark.parametrize('name', ['skresnet50', 'skresnet50d', 'resnet18'])
def test_keys_are_renamed_only_if_all_of_them_are_known(theirs, name):
    """The keys of skresnet50 are those of skresnext50_32x4d; its shapes differ."""
    state = timm.create_model(name, device='meta').state_dict()
    assert (detect_origin(state) == TIMM) == (name == 'skresnet50')
    assert (native_keys(state) is state) == (name != 'skresnet50')
    state = {**theirs.state_dict(), 'more.weight': torch.zeros(1)}
    assert native_keys(state) is state


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


@pytest.mark.parametrize('channels', [1, 2, 4, 6, 13])
@pytest.mark.parametrize('form', ['file', 'features', 'classifier', 'float64'])
def test_weights_for_any_number_of_channels_load_exactly(channels, form, tmp_path):
    """timm 1.0.22 removes a first convolution with 2 or more than 3 channels after its filter has returned it."""
    kwargs = dict(in_chans=channels) | (dict(dtype=torch.float64) if form == 'float64' else {})
    source = timm.create_model('sknet12', **kwargs)
    save_file(source.state_dict(), tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'), input_size=(channels, 32, 32))
    kwargs |= {'features': dict(features_only=True), 'classifier': dict(num_classes=3)}.get(form, {})
    model = timm.create_model('sknet12', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    found, expected = dict(model.state_dict()), dict(source.state_dict())
    if form == 'features':
        expected = {key.replace('stages.', 'stages_', 1): value for key, value in expected.items()}
    for key in {'features': found, 'classifier': {k for k in found if 'head' not in k}}.get(form, expected):
        assert torch.equal(found[key], expected[key]), key
    if form == 'classifier':
        assert not torch.equal(found['head.fc.weight'], expected['head.fc.weight'][:3])


def test_save_for_hf_keeps_the_network_of_a_caffe_name(tmp_path):
    small = timm.create_model('sknet50_caffe', depths=(1, 1, 1, 1))
    timm.models.save_for_hf(small, tmp_path, model_args=dict(depths=(1, 1, 1, 1)), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.pool.ceil_mode and len(again.stages[0]) == 1
    torch.testing.assert_close(again.state_dict(), small.state_dict())


class Wrapped(nn.Module):
    """Holds a network as a submodule, as DDP and Lightning modules do, beside another network."""

    def __init__(self, network):
        super().__init__()
        self.module = network
        self.other = nn.Sequential(nn.Linear(2, 2), timm.create_model('sknet12'))


def small(name='sknet50', **kwargs):
    return timm.create_model(name, mid_widths=(32, 32, 32, 32), widths=(32, 32, 32, 32), depths=(1, 1, 1, 1), **kwargs)


def renamed_to_timms(state):
    """Returns the state dict under the keys of timm's skresnext50_32x4d."""
    theirs = timm.create_model('skresnext50_32x4d', layers=(1, 1, 1, 1), device='meta').state_dict()
    names = native_keys({key: key for key in theirs})
    return {names[key]: value for key, value in state.items()}


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: nn.Sequential(nn.Identity(), m), Wrapped, torch.compile])
@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('assign', [True, False])
def test_foreign_keys_load_into_a_network_inside_any_module(wrap, strict, assign):
    torch.manual_seed(0)
    source, target = wrap(small()), wrap(small())
    target.load_state_dict(source.state_dict())  # now they differ in the network only
    inner, state = small(), source.state_dict()
    prefix = next(key for key in state if key.endswith('stem.conv.weight')).removesuffix('stem.conv.weight')
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    foreign = {prefix + key: value for key, value in renamed_to_timms(inner.state_dict()).items()}
    given = others | foreign
    kept = dict(given)
    result = target.load_state_dict(given, strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys and given.keys() == kept.keys()
    expected = others | {prefix + key: value for key, value in inner.state_dict().items()}
    torch.testing.assert_close(dict(target.state_dict()), expected)


def test_copies_of_a_network_take_foreign_keys_too():
    model, inner = copy.deepcopy(small()), small()
    model.load_state_dict(renamed_to_timms(inner.state_dict()))
    torch.testing.assert_close(model.state_dict(), inner.state_dict())


def test_part_of_the_weights_loads_where_strict_is_off():
    model = reparameterize_model(small().eval())
    head = {'head.fc.weight': torch.ones(1000, 32)}
    assert model.load_state_dict(head, strict=False).missing_keys
    assert model.head.fc.weight.eq(1).all()
    nn.Sequential(model).load_state_dict({}, strict=False)


class Runs:
    """Creates a file if it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


def write_pickle(file, kind, harm):
    state = timm.create_model('sknet12').state_dict()
    if kind == 'zip':
        torch.save({**state, 'harm': Runs(harm)}, file)
    elif kind == 'legacy':
        torch.save({**state, 'harm': Runs(harm)}, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps({'state_dict': Runs(harm)}))


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'plain pickle'])
@pytest.mark.parametrize('by', ['file', 'folder'])
def test_no_code_of_a_file_is_run(kind, by, tmp_path):
    harm = tmp_path / 'harm'
    write_pickle(tmp_path / 'pytorch_model.bin', kind, harm)
    with pytest.raises(RuntimeError, match='Cannot load weights from .*pytorch_model.bin.*not a PyTorch checkpoint'):
        if by == 'file':
            overlay = dict(file=str(tmp_path / 'pytorch_model.bin'))
            timm.create_model('sknet12', pretrained=True, pretrained_cfg_overlay=overlay)
        else:
            (tmp_path / 'config.json').write_text(
                '{"architecture": "sknet12", "num_classes": 10, "pretrained_cfg": {}}'
            )
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert not harm.exists()


@pytest.mark.parametrize('form', ['safetensors', 'zip', 'legacy', 'checkpoint', 'averaged'])
@pytest.mark.parametrize('by', ['file', 'folder', 'state dict'])
def test_own_weights_load_in_every_form(form, by, tmp_path):
    state = timm.create_model('sknet12').state_dict()
    name = 'model.safetensors' if form == 'safetensors' else 'pytorch_model.bin'
    if form == 'safetensors':
        save_file(state, tmp_path / name)
    elif form in ('zip', 'legacy'):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=form == 'zip')
    else:
        other = {f'module.{key}': torch.zeros_like(value) for key, value in state.items()}
        found = {'state_dict': other, 'state_dict_ema': state} if form == 'averaged' else {'state_dict': state}
        torch.save({'epoch': 1, 'args': argparse.Namespace(lr=0.1), **found}, tmp_path / name)
    if by == 'folder':
        cfg = dict(architecture='sknet12', num_classes=10, pretrained_cfg=dict(num_classes=10, input_size=[3, 32, 32]))
        (tmp_path / 'config.json').write_text(json.dumps(cfg))
        model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
        assert model.pretrained_cfg['source'] == 'local-dir'
    else:
        overlay = dict(file=str(tmp_path / name)) if by == 'file' else dict(state_dict=state)
        model = timm.create_model('sknet12', pretrained=True, pretrained_cfg_overlay=overlay)
    assert 'state_dict' not in model.pretrained_cfg
    torch.testing.assert_close(dict(model.state_dict()), dict(state))


@pytest.mark.parametrize(
    ('spoil', 'cause'),
    [
        (lambda state: state.pop('stem.bn.weight'), 'Missing keys in the weights: stem.bn.weight'),
        (lambda state: state.update(more=torch.zeros(1)), 'Unexpected keys in the weights: more'),
        (lambda state: state.pop('head.fc.bias'), 'Missing keys in the weights: head.fc.bias'),
        (lambda state: state.update({'stem.bn.weight': torch.zeros(3)}), 'size mismatch for stem.bn.weight'),
        (
            lambda state: state.update({'stem.bn.weight': torch.full((16,), torch.inf)}),
            'NaN or infinity in the weights',
        ),
        (lambda state: state.update({'head.fc.weight': torch.zeros(5, 96)}), 'size mismatch for head.fc.weight'),
    ],
)
def test_own_weights_that_do_not_fit_are_named(spoil, cause, tmp_path):
    state = dict(timm.create_model('sknet12').state_dict())
    spoil(state)
    save_file(state, tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'))
    with pytest.raises(
        RuntimeError,
        match=f'Cannot load weights from {tmp_path}/own.safetensors: {cause}.*Choose weights of this network',
    ):
        timm.create_model('sknet12', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ('path', 'reason'),
    [
        ('missing.pth', 'the file does not exist. Check the path'),
        ('empty', 'the folder does not contain a weights file. Check the path'),
        ('text.pth', r'not a PyTorch checkpoint.*torch.save\(model.state_dict\(\), FILE\). Choose weights of'),
        ('truncated.pth', 'the file is truncated; download or copy it again'),
        ('nothing.pth', 'not a PyTorch checkpoint.*Choose weights of'),
        ('damaged.safetensors', '.*header.*Choose weights of'),
    ],
)
def test_a_path_without_weights_is_named(path, reason, tmp_path):
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'nothing.pth').write_bytes(b'')
    torch.save({'a': torch.ones(1000)}, tmp_path / 'truncated.pth')
    (tmp_path / 'truncated.pth').write_bytes((tmp_path / 'truncated.pth').read_bytes()[:2000])
    (tmp_path / 'damaged.safetensors').write_bytes(b'\x10' + bytes(7) + b'{' * 10)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RuntimeError, match=f'Cannot load weights from {tmp_path}/{path}: {reason}'):
        overlay = dict(file=str(tmp_path / path))
        timm.create_model('sknet12', pretrained=True, pretrained_cfg_overlay=overlay)


def test_checking_weights_takes_no_memory(tmp_path):
    state = timm.create_model('sknet12').state_dict()
    weights = PretrainedWeights(PretrainedCfg(state_dict=dict(state), num_classes=10))
    model, sizes = timm.create_model('sknet12'), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in (*state.values(), *model.parameters(), *model.buffers())}
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            sizes.extend(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in known)
            return out

    with Sizes():
        weights.checked_state_dict(model, 10)
    assert sizes and max(sizes) <= 16


@pytest.mark.parametrize(
    'name, place',
    [
        ('sk_resnet50.authors_in1k', 'drive.google.com'),
        ('sk_resnet50x1_simclr.ft_in1k', 'simclrv2/finetuned_100pct/r50_1x_sk1/model.ckpt-37535.index'),
        ('sk_resnet152x3_simclr.sup_in1k', 'simclrv2/supervised/r152_3x_sk1/model.ckpt-28151.index'),
    ],
)
def test_the_error_names_the_authors_file(name, place):
    with pytest.raises(ValueError, match=f'no public weights of {name} .*{place}.*timm-sknet convert'):
        timm.create_model(name, pretrained=True, device='meta')


def test_the_authors_checkpoint_loads_directly(tmp_path):
    state = pytorch_reference.random_state(pytorch_reference.SK_RESNET50)
    pytorch_reference.write_checkpoint(tmp_path / 'sk_resnet50.pth.tar', state)
    model = timm.create_model('sk_resnet50', checkpoint_path=str(tmp_path / 'sk_resnet50.pth.tar'))
    assert torch.equal(model.head.fc.weight, state['module.fc.weight'])
