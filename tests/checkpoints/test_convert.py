"""`timm-sknet convert`: all types of sources, the folder that is written, and invalid or corrupted sources."""

import argparse
import gzip
import inspect
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import caffe_reference
import numpy as np
import onnx
import pytest
import pytorch_reference
import timm
import torch
from conftest import TIMM_REPO
from hostile import Call, laughs
from hub import hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.data import create_dataset
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_sknet.checkpoints import reading
from timm_sknet.cli import main
from timm_sknet.network import SKNet, SKNetCfg
from timm_sknet.sknets import model_cfgs


@pytest.fixture
def tiny(monkeypatch):
    """Replaces sknet26 and sk_resnet50 by small networks, which take less time."""
    widths = {k: v for k, v in caffe_reference.TINY.items() if k != 'attn_widths'}
    monkeypatch.setitem(model_cfgs, 'sknet26', SKNetCfg(**widths))
    planes = pytorch_reference.TINY['planes']
    small = dict(depths=pytorch_reference.TINY['depths'], mid_widths=planes, widths=[4 * p for p in planes])
    monkeypatch.setitem(model_cfgs, 'sk_resnet50', model_cfgs['sk_resnet50'].override(**small))


@pytest.fixture
def tiny_caffe(tiny, monkeypatch):
    """Replaces sknet50, sknet101 and their Caffe variants by small networks with the same differences."""
    for name, depths, attn_widths in ('sknet50', (2, 2, 1, 1), None), ('sknet101', (2, 3, 1, 1), (8, 4, 8, 16)):
        cfg = model_cfgs['sknet26'].override(depths=depths, r=8, L=8)
        monkeypatch.setitem(model_cfgs, name, cfg)
        monkeypatch.setitem(model_cfgs, f'{name}_caffe', cfg.override(stem_pool='ceil', attn_widths=attn_widths))


@pytest.fixture
def caffemodel(tiny, tmp_path):
    graph = caffe_reference.layers(**caffe_reference.TINY)
    caffe_reference.write_caffemodel(tmp_path / 'tiny.caffemodel', graph, caffe_reference.random_blobs(graph))
    return tmp_path / 'tiny.caffemodel'


@pytest.fixture
def run(tmp_path, capsys):
    """Returns a function that converts to tmp_path/out and returns exit code and stderr."""

    def convert(source, arch, *options):
        code = main(['convert', str(source), str(tmp_path / 'out'), '--arch', arch, *map(str, options)])
        return code, capsys.readouterr().err

    return convert


@pytest.fixture
def converted(run, tmp_path):
    """Returns a function that converts successfully to tmp_path/out and returns that folder."""

    def convert(source, arch, *options):
        assert run(source, arch, *options) == (0, '')
        return tmp_path / 'out'

    return convert


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def config(folder):
    return json.loads((folder / 'config.json').read_text())


def trained(name='sknet12', **kwargs):
    """Returns a model whose batch norm statistics are not the initial ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).train()
    size = model.pretrained_cfg['input_size'][1:]
    model(torch.randn(4, model.in_chans, *size))
    return model.eval()


@pytest.fixture(scope='session')
def run_of_train_py(tmp_path_factory):
    """A model, the model with averaged weights, and the checkpoint that train.py writes for them."""
    folder = tmp_path_factory.mktemp('run')
    kwargs = dict(branches=[[3, 1, 1], [5, 1, 1]])
    model = trained(num_classes=7, bn_eps=1e-3, **kwargs)
    ema = ModelEmaV3(model)
    for parameter in ema.module.parameters():
        parameter.data *= 1.01
    args = argparse.Namespace(
        model='sknet12', model_kwargs=kwargs, bn_eps=1e-3, mean=[0.5], img_size=48, eval_metric='top1'
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, metric=64.5)
    return model, ema.module, folder / 'last.pth.tar'


@pytest.fixture
def checkpoint(run_of_train_py, tmp_path):
    """A copy of the checkpoint of `run_of_train_py` that a test can change."""
    return Path(shutil.copy(run_of_train_py[-1], tmp_path))


@torch.no_grad()
def assert_same(a, b):
    x = torch.randn(2, getattr(b, 'in_chans', 3), 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5 * b(x).abs().max().item())


# Supported sources


@pytest.mark.parametrize('options', [{}, {'packed': False}, {'double': True}, {'legacy': True}, {'extras': False}])
def test_every_form_of_a_caffe_file_gives_the_same_weights(tiny, converted, caffemodel, tmp_path, options):
    folder = converted(caffemodel, 'sknet26')
    expected = load_file(folder / 'model.safetensors')
    graph = caffe_reference.layers(**caffe_reference.TINY)
    other = tmp_path / 'other.caffemodel'
    caffe_reference.write_caffemodel(other, graph, caffe_reference.random_blobs(graph), **options)
    folder = converted(other, 'sknet26', '--force')
    torch.testing.assert_close(load_file(folder / 'model.safetensors'), expected, rtol=0, atol=0)


def test_a_caffe_file_sets_the_network_and_its_input(converted, caffemodel):
    folder = converted(caffemodel, 'sknet26')
    model = load(folder)
    assert config(folder)['model_args'] == dict(stem_pool='ceil', attn_widths=[8, 4, 8, 16])
    assert model.pool.ceil_mode and model.pool.padding == 0
    data = timm.data.resolve_data_config(model=model)
    assert (data['crop_pct'], data['interpolation'], list(data['input_size'])) == (0.875, 'bilinear', [3, 224, 224])
    assert 'test_input_size' not in config(folder)['pretrained_cfg']
    image = torch.rand(3, 8, 8)
    normalised = (image - torch.tensor(data['mean']).view(3, 1, 1)) / torch.tensor(data['std']).view(3, 1, 1)
    torch.testing.assert_close(
        normalised, 255 * image - torch.tensor([123.0, 117, 104]).view(3, 1, 1), rtol=0, atol=1e-4
    )


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a Caffe file with random weights, and returns it and its forward function."""

    def write_caffemodel(**sizes):
        graph = caffe_reference.layers(**caffe_reference.TINY | sizes)
        blobs = caffe_reference.random_blobs(graph)
        caffe_reference.write_caffemodel(tmp_path / 'authors.caffemodel', graph, blobs)
        return tmp_path / 'authors.caffemodel', lambda x: caffe_reference.forward(blobs, x)

    return write_caffemodel


CAFFE_NETWORKS = {
    'sknet50_caffe': dict(depths=(2, 2, 1, 1), attn_widths=(8, 8, 8, 8)),
    'sknet101_caffe': dict(depths=(2, 3, 1, 1), attn_widths=(8, 4, 8, 16)),
}


@pytest.mark.parametrize('name', CAFFE_NETWORKS)
def test_a_caffe_file_is_of_the_network_of_that_name_without_arguments(tiny_caffe, converted, write, name):
    file, forward = write(**CAFFE_NETWORKS[name])
    folder = converted(file, name)
    assert config(folder)['architecture'] == name and config(folder)['model_args'] == {}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pixels = (255 * image).flip(1) - torch.tensor(caffe_reference.BGR_MEAN).view(3, 1, 1)
    data = timm.data.resolve_data_config(model=(model := load(folder)))
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ('mean', 'std'))
    expected = forward(pixels)
    assert ((model((image - mean) / std) - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize('name, others', [
    ('sknet50_caffe', ['sknet50', 'sknet101', 'sknet101_caffe', 'sknet12']),
    ('sknet101_caffe', ['sknet50', 'sknet101', 'sknet50_caffe', 'sknet12']),
])  # fmt: skip
def test_a_caffe_file_of_another_network_is_refused_and_its_own_is_named(
    tiny_caffe, run, write, tmp_path, name, others
):
    file, _ = write(**CAFFE_NETWORKS[name])
    for arch in others:
        code, err = run(file, arch)
        assert (
            code == 2
            and f'do not match {arch}: ' in err
            and err.endswith(f'It looks like {name}: use --arch {name}.\n')
        )
    assert os.listdir(tmp_path) == ['authors.caffemodel']


def test_a_corrupted_caffe_file_is_called_corrupted_whatever_the_network(tiny_caffe, run, write):
    file, _ = write(**CAFFE_NETWORKS['sknet50_caffe'])
    file.write_bytes(cut(file.read_bytes()))
    code, err = run(file, 'sknet50')
    assert code == 2 and 'truncated or corrupted' in err


@pytest.mark.parametrize('name', ['sknet50', 'sknet50_caffe', 'sknet101', 'sknet101_caffe'])
def test_a_state_dict_never_looks_like_a_network_of_caffe(tiny_caffe, run, tmp_path, name):
    save_file(timm.create_model(name).state_dict(), tmp_path / 'own.safetensors')
    code, err = run(tmp_path / 'own.safetensors', 'sknet12')
    assert code == 2 and '_caffe' not in err
    assert name == 'sknet101_caffe' or f'It looks like {name.removesuffix("_caffe")}: use --arch' in err


@pytest.mark.parametrize('name, other', [('sknet50', 'sknet50_caffe'), ('sknet50_caffe', 'sknet50')])
def test_a_checkpoint_or_a_folder_is_of_the_model_that_it_names(tiny_caffe, run, converted, tmp_path, name, other):
    """The weights of the two networks have the same names and shapes."""
    arguments = argparse.Namespace(model=name, model_kwargs={})
    model = trained(name, num_classes=7)
    torch.save({'state_dict': model.state_dict(), 'args': arguments}, tmp_path / 'last.pth.tar')
    code, err = run(tmp_path / 'last.pth.tar', other)
    expected = f'do not match {other}: the weights were saved for {name}. It looks like {name}: use --arch {name}.'
    assert code == 2 and expected in err
    folder = shutil.move(converted(tmp_path / 'last.pth.tar', name), tmp_path / 'first')
    assert_same(load(folder), model)
    assert config(folder)['model_args'] == {}
    code, err = run(folder / 'model.safetensors', other)
    assert code == 2 and f'use --arch {name}.' in err
    arguments.model = f'local-dir:{folder}'
    torch.save({'state_dict': model.state_dict(), 'args': arguments}, tmp_path / 'last.pth.tar')
    code, err = run(tmp_path / 'last.pth.tar', other)
    assert code == 2 and f'use --arch {name}.' in err
    config_json = (folder / 'config.json').rename(tmp_path / 'config.json')
    code, err = run(tmp_path / 'last.pth.tar', name)
    assert code == 2 and f'was trained from local-dir:{folder}, whose config.json cannot be read' in err
    config_json.rename(folder / 'config.json')
    assert_same(load(converted(tmp_path / 'last.pth.tar', name)), model)


@pytest.mark.parametrize('legacy', [True, False])
def test_a_checkpoint_of_the_pytorch_variant(tiny, converted, tmp_path, legacy):
    state = pytorch_reference.random_state(**pytorch_reference.TINY)
    pytorch_reference.write_checkpoint(tmp_path / 'model_best.pth.tar', state, legacy=legacy)
    model = load(converted(tmp_path / 'model_best.pth.tar', 'sk_resnet50'))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = pytorch_reference.forward(state, x.double())
    assert ((model(x) - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.slow
def test_timms_weights_in_every_form(theirs, repo, converted, tmp_path, monkeypatch):
    torch.save(theirs.state_dict(), tmp_path / 'pytorch_model.bin')
    torch.save({'state_dict': theirs.state_dict()}, tmp_path / 'model.pth')
    for file in repo / TIMM_REPO / 'model.safetensors', tmp_path / 'pytorch_model.bin', tmp_path / 'model.pth':
        folder = converted(file, 'sknet50', '--force')
        assert_same(load(folder), theirs)
        assert config(folder)['pretrained_cfg']['interpolation'] == 'bicubic'
        assert "from weights of timm's skresnext50_32x4d" in (folder / 'README.md').read_text()
        assert ModelCard.load(folder / 'README.md').data.license == 'unknown'  # the file states no licence


@pytest.mark.slow
def test_timms_weights_by_their_name_on_the_hub(theirs, repo, tmp_path):
    cfg = timm.get_pretrained_cfg('skresnext50_32x4d').to_dict() | dict(license='apache-2.0')
    (repo / TIMM_REPO / 'config.json').write_text(
        json.dumps({'architecture': 'skresnext50_32x4d', 'pretrained_cfg': cfg})
    )
    command = [sys.executable, '-m', 'timm_sknet', 'convert', TIMM_REPO, 'out', '--arch', 'sknet50']
    with hub(repo) as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=300)
    assert_same(load(tmp_path / 'out'), theirs)
    # timm adapts the layers that config.json names
    assert load(tmp_path / 'out', num_classes=3, in_chans=1).num_classes == 3
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.license == 'apache-2.0' and card.data.datasets == ['imagenet-1k']
    assert 'apache-2.0, stated by the source' in card.text
    assert '**published** with the weights of this name: top-1 80.168' in card.text


def test_a_checkpoint_of_train_py(converted, run_of_train_py):
    model, averaged, file = run_of_train_py
    folder = converted(file, 'sknet12')
    assert_same(load(folder), averaged)
    assert config(folder)['model_args'] == dict(branches=[[3, 1, 1], [5, 1, 1]], bn_eps=1e-3)
    cfg = config(folder)['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['std'], cfg['num_classes']) == (
        [3, 48, 48],
        [0.5] * 3,
        [0.247, 0.2435, 0.2616],
        7,
    )
    card = (folder / 'README.md').read_text()
    assert '**measured** by train.py on its validation data: top1 64.5 in epoch 3' in card
    assert 'published' not in card

    folder = converted(file, 'sknet12', '--no-ema', '--force')
    assert_same(load(folder), model)
    assert 'measured**' not in (folder / 'README.md').read_text()  # the accuracy was measured with the averaged weights


@pytest.fixture(scope='session')
def two_states():
    """The state dict of a model, and another one for the same model."""
    model = trained(num_classes=7)
    averaged = AveragedModel(model)
    for parameter in averaged.parameters():
        parameter.data *= 1.01
    return model.state_dict(), averaged.module.state_dict()


def assert_weights(folder, state):
    loaded = load(folder).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize('name', ['state_dict', 'model', 'model_state_dict', 'net', 'resnet'])
def test_a_state_dict_is_found_in_a_checkpoint(two_states, converted, tmp_path, name):
    others = {'epoch': 3, 'args': argparse.Namespace(model='resnet50'), 'head': {'weight': torch.ones(3)}}
    state = two_states[0]
    torch.save({name: state, 'optimizer': {'state': {}}} | others, tmp_path / 'checkpoint.pth')
    if name == 'state_dict':  # the arguments would be those of train.py
        torch.save({name: state, 'optimizer': {'state': {}}}, tmp_path / 'checkpoint.pth')
    folder = converted(tmp_path / 'checkpoint.pth', 'sknet12')
    assert_weights(folder, state)
    assert 'from a state dict' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('name', ['state_dict', 'model'])
def test_averaged_weights_are_taken_unless_declined(two_states, converted, tmp_path, name):
    state, averaged = two_states
    torch.save({name: state, f'{name}_ema': averaged}, tmp_path / 'both.pth')
    assert_weights(converted(tmp_path / 'both.pth', 'sknet12'), averaged)
    assert_weights(converted(tmp_path / 'both.pth', 'sknet12', '--no-ema', '--force'), state)
    torch.save({f'{name}_ema': averaged}, tmp_path / 'averaged.pth')
    assert_weights(converted(tmp_path / 'averaged.pth', 'sknet12', '--force'), averaged)


def test_two_different_state_dicts_are_refused(two_states, run, tmp_path):
    torch.save({'model': two_states[0], 'net': two_states[1]}, tmp_path / 'both.pth')
    code, err = run(tmp_path / 'both.pth', 'sknet12')
    assert code == 2 and 'it contains several state dicts: model and net. Save one of them alone' in err


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'net.', '_orig_mod.module.', 'model.net.'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_prefix_of_a_wrapper_is_removed(two_states, converted, tmp_path, prefix, suffix):
    file, state = tmp_path / f'wrapped{suffix}', {prefix + key: value for key, value in two_states[0].items()}
    torch.save({'state_dict': state}, file) if suffix == '.pth' else save_file(state, file)
    assert_weights(converted(file, 'sknet12'), two_states[0])


def test_a_prefix_that_some_keys_do_not_have_stays(two_states, run, tmp_path):
    state = {f'module.{key}' if 'head' in key else key: value for key, value in two_states[0].items()}
    torch.save(state, tmp_path / 'mixed.pth')
    code, err = run(tmp_path / 'mixed.pth', 'sknet12')
    assert code == 2 and 'unexpected tensors: module.head.fc.bias and module.head.fc.weight' in err


def test_a_prefix_that_belongs_to_another_implementation_stays(tmp_path):
    """SimCLRv2 in PyTorch: without its classifier, all keys begin with `net.`."""
    layers = 'net.0.0', 'net.0.1.0', 'net.1.blocks.0.net.2.main_conv.0'
    state = {f'{layer}.weight': torch.ones(2, 1, 1, 1) for layer in layers}
    torch.save({'resnet': state, 'head': {}}, tmp_path / 'r50_1x_sk1.pth')
    assert reading.read(str(tmp_path / 'r50_1x_sk1.pth'), 'sknet12').tensors.keys() == state.keys()


def test_weights_that_torch_averaged(converted, tmp_path):
    model = trained()
    averaged = AveragedModel(model)
    averaged.update_parameters(trained())
    torch.save({'model': model.state_dict(), 'model_ema': averaged.state_dict()}, tmp_path / 'averaged.pth')
    assert_weights(converted(tmp_path / 'averaged.pth', 'sknet12'), averaged.module.state_dict())


@pytest.fixture
def lightning_checkpoint(tmp_path):
    """Returns a function that writes the checkpoint of a LightningModule with given attributes."""
    lightning = pytest.importorskip('lightning')

    def write(**modules):
        module = lightning.LightningModule()
        for name, value in modules.items():
            setattr(module, name, value)
        trainer = lightning.Trainer(accelerator='cpu', logger=False, barebones=True)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / 'last.ckpt')
        return tmp_path / 'last.ckpt'

    return write


def test_a_checkpoint_of_lightning(lightning_checkpoint, converted):
    model = trained()
    folder = converted(lightning_checkpoint(model=model), 'sknet12')
    assert_weights(folder, model.state_dict())
    assert 'from a checkpoint of Lightning' in (folder / 'README.md').read_text()


def test_a_checkpoint_of_lightning_with_other_modules_names_the_part_to_save(lightning_checkpoint, run):
    code, err = run(lightning_checkpoint(network=trained(), loss=nn.Linear(2, 2)), 'sknet12')
    assert code == 2 and 'The weights (a checkpoint of Lightning) do not match sknet12: 0 of its' in err
    assert 'The tensors under network. look like sknet12. Save them alone, without this prefix: {key.' in err
    code, err = run(lightning_checkpoint(network=nn.Linear(2, 2)), 'sknet12')
    assert code == 2 and 'torch.save(module.NETWORK.state_dict(), FILE)' in err


def test_weights_for_four_input_channels_stay_the_same(converted, tmp_path):
    """Older releases of timm replace the first convolution by random weights."""
    model = trained(in_chans=4)
    save_file(model.state_dict(), tmp_path / 'own.safetensors')
    assert_weights(converted(tmp_path / 'own.safetensors', 'sknet12'), model.state_dict())


def test_a_repository_with_a_pickle_instead_of_safetensors(converted, tmp_path):
    model, repository = trained(num_classes=3), tmp_path / 'hub' / 'org' / 'name'
    repository.mkdir(parents=True)
    torch.save(model.state_dict(), repository / 'pytorch_model.bin')
    config = dict(architecture='sknet12', pretrained_cfg={'license': 'mit'})
    (repository / 'config.json').write_text(json.dumps(config))
    command = [sys.executable, '-m', 'timm_sknet', 'convert', 'org/name', 'out', '--arch', 'sknet12']
    with hub(tmp_path / 'hub') as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=300)
    assert_weights(tmp_path / 'out', model.state_dict())
    assert 'org/name on the Hugging Face Hub' in (tmp_path / 'out' / 'README.md').read_text()


def test_weights_of_our_own_keys_and_other_channels(converted, tmp_path):
    model = trained('sk_shufflenetv2_x0_5', in_chans=1, num_classes=5)
    save_file(model.state_dict(), tmp_path / 'own.safetensors')
    folder = converted(tmp_path / 'own.safetensors', 'sk_shufflenetv2_x0_5')
    assert_same(load(folder), model)
    cfg = config(folder)['pretrained_cfg']
    assert cfg['input_size'] == [1, 224, 224] and len(cfg['mean']) == len(cfg['std']) == 1


@torch.no_grad()
def test_a_folder_can_be_converted_again(converted, caffemodel, tmp_path):
    """The arguments of the network and its preprocessing come from config.json."""
    first = shutil.move(converted(caffemodel, 'sknet26', '--tag', 'mine'), tmp_path / 'first')
    again = converted(first / 'model.safetensors', 'sknet26', '--license', 'mit', '--dtype', 'float16')
    assert config(again)['model_args'] == config(first)['model_args']
    assert config(again)['pretrained_cfg'] == config(first)['pretrained_cfg'] | dict(license='mit')


@pytest.mark.parametrize('start', ['local-dir', 'sknet101_caffe.authors_in1k'])
def test_a_fine_tuned_checkpoint_keeps_the_network_and_input_it_started_from(converted, caffemodel, tmp_path, start):
    name, args, std = 'sknet101_caffe', {}, [1 / 255] * 3
    if start == 'local-dir':
        folder = shutil.move(converted(caffemodel, 'sknet26'), tmp_path / 'first')
        start, name, args = f'local-dir:{folder}', 'sknet26', config(folder)['model_args']
    model = timm.create_model(start, num_classes=7)
    kwargs = dict(output_stride=8, drop_path_rate=0.1, memory_efficient=True)
    arguments = argparse.Namespace(model=start, model_kwargs=kwargs, gp='avgmax' if name == 'sknet26' else None)
    torch.save({'state_dict': model.state_dict(), 'args': arguments}, tmp_path / 'last.pth.tar')
    if name == 'sknet26':
        model.reset_classifier(7, 'avgmax')
        torch.save({'state_dict': model.state_dict(), 'args': arguments}, tmp_path / 'last.pth.tar')
        args = args | dict(global_pool='avgmax')
    folder = converted(tmp_path / 'last.pth.tar', name)
    assert config(folder)['architecture'] == name and config(folder)['model_args'] == args | dict(output_stride=8)
    cfg = config(folder)['pretrained_cfg']
    assert cfg['std'] == std and 'origin_url' not in cfg and 'tag' not in cfg


@pytest.fixture
def named(tmp_path):
    """Returns a function that writes weights of three classes and a config.json with given fields."""

    def write(pretrained_cfg, **fields):
        save_file(timm.create_model('sknet12', num_classes=3).state_dict(), tmp_path / 'model.safetensors')
        fields |= dict(architecture='sknet12', pretrained_cfg=pretrained_cfg)
        (tmp_path / 'config.json').write_text(json.dumps(fields))
        return tmp_path / 'model.safetensors'

    return write


@pytest.mark.parametrize('names', [
    ['cat', 'ant', 'dog'],
    {'2': 'dog', '0': 'cat', '1': 'ant'},
    {'1': 'ant', '2': 'dog', '0': 'cat'},
])  # fmt: skip
def test_the_names_of_classes_are_written_in_the_order_of_the_indices(named, converted, names):
    for cfg, fields in (
        ({}, {'label_names': names}),
        ({'label_names': names}, {}),
        ({'label_names': None}, {'label_names': names}),
    ):
        folder = converted(named(cfg, **fields), 'sknet12', '--force')
        assert config(folder)['label_names'] == ['cat', 'ant', 'dog']
        assert load(folder).pretrained_cfg['label_names'] == ['cat', 'ant', 'dog']


def test_a_null_in_config_json_leaves_the_input_of_the_model(named, converted):
    nulls = dict.fromkeys(('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'std'))
    cfg = config(converted(named(dict(mean=[0.5] * 3) | nulls), 'sknet12'))['pretrained_cfg']
    assert (cfg['mean'], cfg['std'], cfg['input_size']) == ([0.5] * 3, [0.247, 0.2435, 0.2616], [3, 32, 32])
    assert (cfg['interpolation'], cfg['crop_pct']) == ('bilinear', 1.0)


def test_more_than_ten_class_names_are_in_numeric_order(converted, tmp_path):
    save_file(timm.create_model('sknet12', num_classes=12).state_dict(), tmp_path / 'model.safetensors')
    names = {index: f'class {index}' for index in sorted(map(str, range(12)))}
    fields = dict(architecture='sknet12', pretrained_cfg={}, label_names=names)
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    folder = converted(tmp_path / 'model.safetensors', 'sknet12')
    assert config(folder)['label_names'] == [f'class {i}' for i in range(12)]


def test_class_names_in_the_wrong_number_are_left_out(named, converted):
    for names in None, [], {}, ['cat'], {'0': 'cat', '1': 'ant'}:
        assert 'label_names' not in config(converted(named({}, label_names=names), 'sknet12', '--force'))


@pytest.mark.parametrize('names', [
    'cat',
    3,
    [None, None, None],
    ['cat', 'ant', None],
    [0, 1, 2],
    {'0': 'cat', '1': 'ant', '2': None},
    {'0': 'cat', '1': 'ant', '3': 'dog'},
    {'0': 'cat', '1': 'ant', '01': 'dog'},
    {'cat': '0', 'ant': '1', 'dog': '2'},
])  # fmt: skip
def test_invalid_class_names_are_refused_unless_others_are_given(named, run, converted, tmp_path, names):
    for cfg, fields in ({}, {'label_names': names}), ({'label_names': names}, {}):
        source = named(cfg, **fields)
        code, err = run(source, 'sknet12')
        assert code == 2 and err.count('\n') == 1 and not (tmp_path / 'out').exists()
        assert 'label_names must be a list of 3 strings, or a mapping from the indices 0 to 2 to strings, got' in err
        assert '--label-names' in err
    (tmp_path / 'names.txt').write_text('one\ntwo\nthree\n')
    folder = converted(source, 'sknet12', '--label-names', tmp_path / 'names.txt')
    assert config(folder)['label_names'] == ['one', 'two', 'three']
    assert 'label_names' not in config(converted(source, 'sknet12', '--num-classes', 0, '--force'))


def test_every_argument_of_the_network_is_kept_or_left_out_on_purpose():
    arguments = inspect.signature(SKNet).parameters.keys() - {'cfg', 'device', 'dtype', 'overrides'}
    assert arguments <= reading.MODEL_ARGS | reading.TRAINING_ARGS


# The converted folder


@pytest.mark.parametrize('kind', ['caffe', 'train'])
@torch.no_grad()
def test_transformers_loads_the_folder_and_agrees(converted, caffemodel, checkpoint, kind, monkeypatch):
    transformers = pytest.importorskip('transformers')
    folder = converted(caffemodel, 'sknet26') if kind == 'caffe' else converted(checkpoint, 'sknet12')
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x).logits, load(folder)(x), rtol=1e-5, atol=1e-5)


def test_the_folder_describes_the_model(tiny_caffe, converted, write):
    caffemodel, _ = write(**CAFFE_NETWORKS['sknet50_caffe'])
    folder = converted(caffemodel, 'sknet50_caffe')
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} <= {0o644, 0o664}
    assert 'num_classes' not in config(folder)['model_args'] and config(folder)['num_classes'] == 1000
    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert card.data.license == 'unknown' and 'no licence stated' in card.text
    assert card.text.lstrip().startswith('# sknet50_caffe.authors_in1k')
    assert "from a .caffemodel by the paper's authors" in card.text
    sha256 = subprocess.run(['sha256sum', caffemodel], capture_output=True, text=True, check=True).stdout.split()[0]
    assert sha256 in card.text and 'crop_pct 0.875' in card.text and 'our choice' in card.text
    assert card.text.index('pip install') < card.text.index('create_model')


def test_the_authors_are_named_only_for_their_own_networks(converted, caffemodel):
    folder = converted(caffemodel, 'sknet26')
    card = (folder / 'README.md').read_text()
    assert '# sknet26\n' in card and 'from a .caffemodel.' in card and 'tag' not in config(folder)['pretrained_cfg']


def test_weights_in_half_precision_with_their_counters_are_converted(converted, tmp_path):
    model = trained()
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / 'half.pth')
    state = load_file(converted(tmp_path / 'half.pth', 'sknet12') / 'model.safetensors')
    assert state['stem.bn.num_batches_tracked'].dtype == torch.int64 and state['stem.bn.num_batches_tracked'] == 1
    assert state['stem.conv.weight'].dtype == torch.float32


def test_options_do_what_they_say(converted, run_of_train_py, checkpoint, tmp_path):
    names = [f'sort {i}' for i in range(7)]
    (tmp_path / 'names.txt').write_text('\n'.join(names) + '\n')
    options = ['--tag', 'mine', '--license', 'mit', '--label-names', tmp_path / 'names.txt', '--dtype', 'float16']
    folder = converted(checkpoint, 'sknet12', '--num-classes', 7, *options)
    model = load(folder)
    assert model.pretrained_cfg['label_names'] == config(folder)['label_names'] == names
    assert model.pretrained_cfg['tag'] == 'mine'
    card = ModelCard.load(folder / 'README.md')
    assert card.data.license == 'mit' and 'mit, stated by the person who converted the weights' in card.text
    assert card.text.lstrip().startswith('# sknet12.mine')
    for key, value in load_file(folder / 'model.safetensors').items():
        statistics = key.endswith(('running_mean', 'running_var'))
        assert value.dtype == (torch.float32 if statistics else torch.float16) or 'batches' in key, key
    torch.testing.assert_close(model.state_dict(), run_of_train_py[1].state_dict(), rtol=1e-3, atol=1e-4)


def test_class_names_can_be_read_from_the_folder_of_the_data(converted, run, checkpoint, tmp_path):
    names = ['2', '10', 'Ant', 'bee 9', 'Bee 10', 'cat', 'Dog']
    for name in reversed(names):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'train' / name / 'a.jpg').touch()
    assert list(create_dataset('', root=tmp_path / 'data' / 'train').reader.class_to_idx) == names
    for folder in tmp_path / 'data', tmp_path / 'data' / 'train':
        assert config(converted(checkpoint, 'sknet12', '--label-names', folder, '--force'))['label_names'] == names
    (tmp_path / 'data' / 'cover.png').touch()
    code, err = run(checkpoint, 'sknet12', '--label-names', tmp_path / 'data', '--force')
    assert code == 2 and 'data has images outside of its class folders. Move them' in err
    (tmp_path / 'empty').mkdir()
    code, err = run(checkpoint, 'sknet12', '--label-names', tmp_path / 'empty', '--force')
    assert code == 2 and 'Found 0 images in subfolders of' in err


def test_the_classifier_can_be_left_out(converted, checkpoint):
    folder = converted(checkpoint, 'sknet12', '--num-classes', 0)
    assert not any(key.startswith('head.') for key in load_file(folder / 'model.safetensors'))
    assert load(folder)(torch.zeros(1, 3, 32, 32)).shape == (1, 96)


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_it_is_ours(run, converted, checkpoint, tmp_path):
    folder = converted(checkpoint, 'sknet12')
    code, err = run(checkpoint, 'sknet12')
    assert code == 2 and 'exists' in err and '--force' in err
    converted(checkpoint, 'sknet12', '--force', '--tag', 'second')
    assert config(folder)['pretrained_cfg']['tag'] == 'second'
    (tmp_path / 'project').mkdir()
    (tmp_path / 'project' / 'README.md').write_text('mine')
    assert main(['convert', str(checkpoint), str(tmp_path / 'project'), '--arch', 'sknet12', '--force']) == 2
    assert (tmp_path / 'project' / 'README.md').read_text() == 'mine'
    (folder / 'thesis.txt').write_text('the only copy')
    code, err = run(checkpoint, 'sknet12', '--force')
    assert code == 2 and (folder / 'thesis.txt').exists()


# Invalid sources and options


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_checkpoint(path: Path, change) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def poison(state) -> None:
    state['state_dict_ema']['head.fc.weight'][0, 0] = float('nan')


def misname(state) -> None:
    state['state_dict_ema']['head.fcc.weight'] = state['state_dict_ema'].pop('head.fc.weight')


def reshape(state) -> None:
    weight = state['state_dict_ema']['stages.0.0.conv2.conv.weight']
    state['state_dict_ema']['stages.0.0.conv2.conv.weight'] = weight[:, :8]


def blind(state) -> None:
    state['args'].std = [0.0]


def argue(**arguments):
    """Returns a function that adds model arguments to a checkpoint."""
    return lambda state: state['args'].model_kwargs.update(arguments)


def hide(state) -> None:
    """Replaces methods by attributes, which a pickle can do."""
    misname(state)
    vars(state['state_dict_ema']).update(get=1, keys=1)


def put(**tensors):
    """Returns a function that replaces tensors of the classifier in a checkpoint."""
    return lambda state: state['state_dict_ema'].update({f'head.fc.{key}': value for key, value in tensors.items()})


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('archive/data.pkl', bytes(10_000_000))


def onnx_file(path: Path, **fields: str) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in 'xy')
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'graph', [x], [y])
    onnx.save(onnx.helper.make_model(graph, **fields), path)


def exported(path: Path) -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    path.write_bytes(file.getvalue())


def npz(path: Path) -> None:
    with path.open('wb') as file:
        np.savez(file, weight=np.ones(3))


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('run/model.safetensors', b'')


def half_precision(path: Path) -> None:
    """A layer as OpenCV's shrinkCaffeModel writes it: shape, raw_data_type, raw_data."""
    field = caffe_reference.field
    blob = field(7, field(1, b'\x03')) + field(10, 2) + field(12, np.ones(3, np.float16).tobytes())
    path.write_bytes(field(100, field(1, 'conv1') + field(2, 'Convolution') + field(7, blob)))


def solverstate(path: Path) -> None:
    """caffe.proto's SolverState: iter, learned_net, history, current_step."""
    field = caffe_reference.field
    history = field(3, caffe_reference.blob_proto(np.ones(3, np.float32)))
    path.write_bytes(field(1, 1000) + field(2, 'iter_1000.caffemodel') + history + field(4, 2))


def beside(value):
    """Returns a function that writes a checkpoint with this value beside the weights."""
    return lambda path: change_checkpoint(path, lambda state: state.update(metric=value))


ALONE = r'Only tensors, .* are loaded.*Save the weights alone .*: torch\.save\(model\.state_dict\(\), FILE\)\.'
BAD = {
    'ONNX': (onnx_file, 'this is an ONNX file. Convert the checkpoint that it was exported from'),
    'ONNX by PyTorch': (lambda p: onnx_file(p, producer_name='pytorch'), 'this is an ONNX file'),
    'a solverstate': (solverstate, r'this is a \.solverstate.*Pass the \.caffemodel'),
    'another message': (
        lambda p: p.write_bytes(caffe_reference.field(1, 5) + caffe_reference.field(2, 'x')),
        'this is not a Caffe file',
    ),
    'no layers': (lambda p: p.write_bytes(caffe_reference.field(1, 'SKNet')), 'or a Caffe file without weights'),
    'half precision': (half_precision, "layer 'conv1' is stored as raw data.*OpenCV.*Convert the original"),
    'TorchScript': (
        lambda p: torch.jit.script(nn.Linear(2, 2)).save(p),
        r'a TorchScript archive.*torch\.jit\.load\(FILE\)\.state_dict\(\)',
    ),
    'an exported program': (exported, r'an exported program.*torch\.export\.load\(FILE\)\.state_dict'),
    'npz': (npz, r'a NumPy archive \(\.npz\)\. Save its arrays as tensors'),
    'a zip file': (zip_file, 'a zip archive, but not a PyTorch checkpoint. It contains run/model.safetensors'),
    'an index': (
        lambda p: p.write_text(json.dumps({'metadata': {'total_size': 9}, 'weight_map': {'a': 'b'}}, indent=2)),
        'the index of weights that are split into several files',
    ),
    'JSON': (lambda p: p.write_text('{"a": {"b": 1}}'), 'a JSON file. Pass the path of the weights file'),
    'a Git LFS pointer': (
        lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'),
        'a Git LFS pointer instead of the weights. Download',
    ),
    'a NumPy scalar': (beside(np.float64(64.5)), r'contains numpy\._core\.multiarray\.scalar\. ' + ALONE),
    'a random state': (beside(np.random.RandomState(0).get_state()), r'contains numpy\..*\. ' + ALONE),
    'a path': (beside(Path('out')), r'contains pathlib\.(_local\.)?PosixPath\. ' + ALONE),
    'another pickle': (
        lambda p: torch.save({'a': torch.ones(3)}, p, pickle_protocol=4),
        r'its pickle has the protocol 4\. Expected 2, the default of torch\.save',
    ),
    'truncated': (lambda p: p.write_bytes(cut(p.read_bytes())), 'the file is truncated. Download or copy it again'),
    'no tensor': (lambda p: torch.save({}, p), 'not a state dict: it is empty'),
    'gzip': (lambda p: p.write_bytes(gzip.compress(p.read_bytes())), 'a gzip file. Decompress it first'),
    'HDF5': (lambda p: p.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(99)), 'an HDF5 file, perhaps of Keras'),
    'npy': (lambda p: np.save(p.open('wb'), np.ones(3)), 'a NumPy array'),
    'empty': (lambda p: p.write_bytes(b''), 'the file is empty'),
    'a folder': (lambda p: (p.unlink(), p.mkdir()), 'a folder. Pass the path of the weights file'),
    'nothing': (lambda p: p.unlink(), 'No such file'),
    'noise': (lambda p: p.write_bytes(bytes(range(1, 256)) * 9), 'not a Caffe file'),
    'a prototxt': (
        lambda p: p.write_text('name: "SKNet"\nlayer {\n  name: "data"\n}\n'),
        'a text file, perhaps a prototxt',
    ),
    'a web page': (lambda p: p.write_text('<!DOCTYPE html><html><title>Virus scan warning</title>'), 'or a web page'),
    'a flipped byte': (lambda p: flip(p), 'the checksum of'),
    'no image': (lambda p: change_checkpoint(p, blind), 'division by zero'),
    'unknown arguments': (
        lambda p: change_checkpoint(p, argue(depth=3)),
        r'arguments that SKNet does not have: depth\.',
    ),
    'a prototxt with a comment': (lambda p: p.write_text('# SKNet\nlayer {\n}\n'), 'perhaps a prototxt'),
    'V1': (lambda p: p.write_bytes(caffe_reference.field(2, caffe_reference.field(4, b'conv1'))), 'old V1 format'),
    'code': (lambda p: torch.save({'state_dict': Call(os.mkdir, 'code-was-run')}, p), 'refused.*mkdir'),
    'code in a plain pickle': (
        lambda p: p.write_bytes(pickle.dumps(Call(os.mkdir, 'code-was-run'))),
        'refused.*protocol 4',
    ),
    'compressed': (bomb, 'compressed'),
    'a gigabyte': (lambda p: torch.save({'state_dict': Call(bytearray, 10**9)}, p), 'refused.*bytearray'),
    'a long pickle': (lambda p: torch.save({'a': 'a' * 2**21}, p), 'refused.*more than 2,097,152 bytes'),
    'endless arguments': (
        lambda p: change_checkpoint(p, argue(branches=laughs())),
        'arguments in the checkpoint are not valid',
    ),
    'deep': (lambda p: change_checkpoint(p, argue(depths=[10**9, -(10**9), 1])), 'more than [0-9]* tensors'),
    'no depths': (lambda p: change_checkpoint(p, argue(depths=3)), 'sknet12 cannot be created with the arguments'),
    'a long name': (
        lambda p: change_checkpoint(p, put(**{'\x1b' * 2000: torch.ones(1)})),
        r'unexpected tensors: .*\.\.\.',
    ),
    'hidden methods': (lambda p: change_checkpoint(p, hide), r'missing tensors: head\.fc\.weight; unexpected'),
    'a number as classifier': (
        lambda p: change_checkpoint(p, put(weight=torch.tensor(1.0))),
        'head.fc.weight has the shape',
    ),
    'more classes than bytes': (
        lambda p: change_checkpoint(p, put(weight=torch.zeros(1).expand(10**9, 96))),
        'its tensors are larger than the file',
    ),
    'strange numbers': (
        lambda p: change_checkpoint(p, put(bias=torch.zeros(7, dtype=torch.float8_e5m2))),
        'the dtype of head.fc.bias is torch.float8_e5m2',
    ),
    'a lying safetensors': (
        lambda p: p.write_bytes(struct.pack('<Q', 2**40) + b'{"a": 1}'),
        'the header of the safetensors file has 1,099,511,627,776 bytes',
    ),
    'a list': (lambda p: torch.save([1, 2], p), 'expected a dict, got a list'),
    'no tensors': (
        lambda p: torch.save({'state_dict': {'a': 1}}, p),
        "not a state dict: the values of 'state_dict' are not tensors. Expected tensors by their names",
    ),
    'another dict': (
        lambda p: torch.save({'epoch': 3, 'net': {}}, p),
        "the values of 'epoch' and 'net' are not tensors",
    ),
    'NaN': (lambda p: change_checkpoint(p, poison), 'head.fc.weight has values that are NaN or infinite'),
    'another name': (
        lambda p: change_checkpoint(p, misname),
        r'[0-9]+ of its [0-9]+ tensors are known; missing tensors: head\.fc\.weight; '
        r'unexpected tensors: head\.fcc\.weight\.',
    ),
    'no bias': (
        lambda p: change_checkpoint(p, lambda state: state['state_dict_ema'].pop('head.fc.bias')),
        r'missing tensors: head\.fc\.bias\.',
    ),
    'another shape': (
        lambda p: change_checkpoint(p, reshape),
        r'stages.0.0.conv2.conv.weight has the shape \(16, 8, 3, 3\)',
    ),
}


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@pytest.mark.parametrize('name', BAD)
def test_an_invalid_source_is_reported_in_one_line_and_leaves_no_files(run, checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    change, expected = BAD[name]
    change(checkpoint)
    before = sorted(os.listdir(tmp_path))
    code, err = run(checkpoint, 'sknet12')
    assert code == 2 and err.count('\n') == 1 and len(err) < 1000 and '\x1b' not in err
    assert re.search(expected, err), err
    assert sorted(os.listdir(tmp_path)) == before


BAD_CAFFE = {
    'a layer less': (
        lambda blobs: blobs.pop('conv2_1/B_fc2'),
        r'missing tensors: stages\.0\.0\.sk\.attn\.fc2\.weight\.',
    ),
    'a layer more': (
        lambda blobs: blobs.update({'fc8': blobs['classifier']}),
        r'unexpected tensors: fc8\.bias and fc8\.weight\.',
    ),
    'a blob less': (lambda blobs: blobs['conv1/7x7_s2/bn'].pop(), r'missing tensors: stem\.bn\.running_var\.'),
    'another shape': (
        lambda blobs: blobs.update({'conv2_1/3x3g32': [np.ones((32, 1, 5, 5), np.float32)]}),
        r'stages\.0\.0\.sk\.branches\.0\.conv\.weight has the shape \(32, 1, 5, 5\), expected \(32, 1, 3, 3\)',
    ),
    'one of our names': (
        lambda blobs: blobs.update({'stem.conv': blobs['conv1/7x7_s2']}),
        'two of its tensors have the same name',
    ),
    'another order': (
        lambda blobs: [blob.extend([blob.pop(0), blob.pop(0)]) for blob in blobs.values() if len(blob) == 4],
        'stem.bn.running_var has negative values.*in the order of CuDNNBatchNorm: scale, bias, mean, variance',
    ),
    'NaN': (lambda blobs: blobs['classifier'][0].__setitem__((5, 5), np.nan), 'head.fc.weight has values that are NaN'),
    'infinity': (lambda blobs: blobs['conv4_1/1x1_proj'][0].fill(np.inf), 'stages.2.0.shortcut.conv.weight has values'),
}


@pytest.mark.parametrize('name', BAD_CAFFE)
def test_an_invalid_caffe_file_is_reported_in_one_line_and_leaves_no_files(tiny, run, tmp_path, name):
    graph = caffe_reference.layers(**caffe_reference.TINY)
    blobs = caffe_reference.random_blobs(graph)
    change, expected = BAD_CAFFE[name]
    change(blobs)
    graph = [layer for layer in graph if layer.name in blobs]
    graph += [graph[-1]._replace(name=more) for more in blobs.keys() - {layer.name for layer in graph}]
    caffe_reference.write_caffemodel(tmp_path / 'bad.caffemodel', graph, blobs)
    code, err = run(tmp_path / 'bad.caffemodel', 'sknet26')
    assert code == 2 and err.count('\n') == 1
    assert re.search(expected, err), err
    assert os.listdir(tmp_path) == ['bad.caffemodel']


def test_the_model_that_the_weights_look_like_is_named(tiny, run, caffemodel, checkpoint, tmp_path):
    code, err = run(caffemodel, 'sknet50')
    assert code == 2 and 'do not match sknet50' in err and 'It looks like sknet26: use --arch sknet26.' in err
    save_file(trained('sk_shufflenetv2_x0_5').state_dict(), tmp_path / 'own.safetensors')
    code, err = run(tmp_path / 'own.safetensors', 'sk_shufflenetv2_x1_0')
    assert code == 2 and 'It looks like sk_shufflenetv2_x0_5: use --arch sk_shufflenetv2_x0_5.' in err
    for change in argue(), lambda state: delattr(state['args'], 'model'):
        change_checkpoint(checkpoint, change)
        code, err = run(checkpoint, 'sknet14')
        assert code == 2 and 'It looks like sknet12: use --arch sknet12.' in err
    code, err = run(checkpoint, 'sknet512')
    assert code == 2 and "Unknown model 'sknet512'. Choose one of sknet26" in err


@pytest.mark.parametrize('name', ['skresnet50', 'skresnet50d'])
def test_networks_of_timm_without_a_counterpart_are_named(run, tmp_path, name):
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / 'theirs.pth')
    code, err = run(tmp_path / 'theirs.pth', 'sknet50')
    assert code == 2 and f"These are weights of timm's {name}, which has no counterpart in this package." in err


def test_weights_of_another_network_show_examples_of_both_sides(run, tmp_path):
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'theirs.pth')
    code, err = run(tmp_path / 'theirs.pth', 'sknet50')
    assert code == 2 and '0 of its 122 tensors are known; missing tensors: stages.0.0.conv1.bn.bias, ' in err
    assert 'unexpected tensors: bn1.bias, bn1.num_batches_tracked, bn1.running_mean and 119 more.' in err
    assert err.endswith('They belong to another network or implementation. docs/weights.md lists what can be '
                        'converted.\n')  # fmt: skip


def test_an_origin_is_named_only_if_all_shapes_fit(tiny, run, converted, tmp_path):
    state = pytorch_reference.random_state(**pytorch_reference.TINY)
    torch.save(state, tmp_path / 'theirs.pth')
    folder = converted(tmp_path / 'theirs.pth', 'sk_resnet50')
    assert "from a checkpoint of the authors' PyTorch variant" in (folder / 'README.md').read_text()
    torch.save(state | {'module.conv1.weight': torch.ones(64, 3, 3, 3)}, tmp_path / 'theirs.pth')
    code, err = run(tmp_path / 'theirs.pth', 'sk_resnet50', '--force')
    assert code == 2 and 'The weights (a state dict) do not match sk_resnet50: stem.conv.weight has the shape' in err
    assert "The keys are those of the authors' PyTorch code, but no model of this package has these shapes." in err


def test_the_small_networks_of_timm_are_named(converted, tmp_path):
    theirs = timm.create_model('skresnet18', num_classes=3)
    save_file(theirs.state_dict(), tmp_path / 'theirs.safetensors')
    folder = converted(tmp_path / 'theirs.safetensors', 'sk_resnet18_timm')
    assert "from weights of timm's skresnet18" in (folder / 'README.md').read_text()
    assert_same(load(folder), theirs.eval())


def test_the_backbone_of_a_detector_is_named(tiny, run, tmp_path):
    state = pytorch_reference.random_state(**pytorch_reference.TINY, prefix='backbone.')
    state = {key: value for key, value in state.items() if '.fc.' not in key}
    state |= {'neck.weight': torch.ones(3), 'bbox_head.weight': torch.ones(3)}
    torch.save({'state_dict': state, 'meta': {'mmdet_version': '1.0'}}, tmp_path / 'detector.pth')
    code, err = run(tmp_path / 'detector.pth', 'sk_resnet50')
    assert code == 2 and 'The weights (a checkpoint of OpenMMLab (MMDetection and others)) do not match' in err
    assert 'The tensors under backbone. look like sk_resnet50. Save them alone, without this prefix' in err


def test_names_that_are_not_utf8_are_refused(run, two_states, tmp_path):
    file = tmp_path / os.fsdecode(b'caf\xe9.pth')
    torch.save(two_states[0], tmp_path / 'own.pth')
    (tmp_path / 'own.pth').rename(file)
    code, err = run(file, 'sknet12')
    assert code == 2 and r"caf\udce9.pth' is not a valid name in UTF-8. Choose another name." in err
    file = file.rename(tmp_path / 'own.pth')
    code = main(['convert', str(file), str(tmp_path / os.fsdecode(b'caf\xe9')), '--arch', 'sknet12'])
    assert code == 2 and os.listdir(tmp_path) == ['own.pth']


def test_options_that_do_not_fit_are_refused(run, checkpoint, tmp_path):
    (tmp_path / 'names.txt').write_text('one\ntwo\n')
    for options, expected in (
        (['--num-classes', 10], 'the weights have 7 classes, not 10'),
        (['--label-names', tmp_path / 'names.txt'], 'names.txt must give 7 names, one for each class, got 2'),
        (['--label-names', tmp_path / 'none.txt'], 'No such file'),
        (['--license', 'none'], "The licence must be one of the Hub's names"),
        (['--license', 'MIT licence'], "The licence must be one of the Hub's names"),
        (['--tag', 'a b'], "The tag must consist of letters, digits, _ and -, got 'a b'"),
    ):
        code, err = run(checkpoint, 'sknet12', *options)
        assert code == 2 and expected in err
    assert not (tmp_path / 'out').exists()


def test_values_that_float16_cannot_hold_are_named(run, tmp_path):
    state = trained().state_dict()
    state['stem.conv.weight'][0, 0, 0, 0] = 70000
    save_file(state, tmp_path / 'large.safetensors')
    code, err = run(tmp_path / 'large.safetensors', 'sknet12', '--dtype', 'float16')
    assert code == 2 and 'stem.conv.weight has values that are too large for float16' in err


def in_a_process(script, *args, **kwargs):
    command = [sys.executable, '-c', script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_a_full_disk_is_reported_in_one_line_and_leaves_no_files(checkpoint, tmp_path):
    script = (
        'import resource, signal, sys\n'
        'from timm_sknet.cli import main\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'  # a write fails instead, as on a full disk
        'resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n'
        "sys.exit(main(['convert', *sys.argv[1:], '--arch', 'sknet12']))\n"
    )
    done = in_a_process(script, checkpoint, tmp_path / 'out')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'File too large' in done.stderr
    assert os.listdir(tmp_path) == ['last.pth.tar']


def test_a_stopped_conversion_leaves_no_files(checkpoint, tmp_path):
    script = (
        'import os, signal, sys\n'
        'from timm_sknet.checkpoints import folder\n'
        'from timm_sknet.cli import main\n'
        'folder.load = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n'
        "sys.exit(main(['convert', *sys.argv[1:], '--arch', 'sknet12']))\n"
    )
    done = in_a_process(script, checkpoint, tmp_path / 'new' / 'out')
    assert done.returncode == 143 and not done.stderr
    assert os.listdir(tmp_path) == ['last.pth.tar']


MEMORY = (
    'import os, re, sys, timm, torch\n'
    'import timm_sknet.checkpoints.convert\n'
    'from timm_sknet.cli import main\n'
    "timm.create_model('sknet12').eval()(torch.zeros(1, 3, 32, 32))\n"  # memory that torch uses in any case
    # not ru_maxrss, which starts at the value of the parent process
    "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    'before = peak()\n'
    "main(['convert', *sys.argv[1:]])\n"
    'print((peak() - before) / os.path.getsize(sys.argv[1]))\n'
)


@pytest.mark.slow
def test_converting_takes_at_most_four_times_the_files_memory(tmp_path):
    graph = caffe_reference.layers(**caffe_reference.SKNET50)
    caffe_reference.write_caffemodel(tmp_path / 'sknet50.caffemodel', graph, caffe_reference.random_blobs(graph))
    done = in_a_process(MEMORY, tmp_path / 'sknet50.caffemodel', tmp_path / 'out', '--arch', 'sknet50_caffe')
    assert (tmp_path / 'out').is_dir() and float(done.stdout.split()[-1]) < 4, done.stdout


# files of messages that are much smaller in the file than in memory
LAYER, NAME, BLOBS = 100, 1, 7  # protobuf fields
MANY_MESSAGES = {
    # 12 bytes in the file and 1,200 in memory for each; at most 10,000 layers are read
    'small layers': (
        lambda field: b''.join(field(LAYER, field(NAME, f'{i:06}') + field(BLOBS, b'')) for i in range(200_000)),
        15,
    ),
    # 2 or 3 bytes in the file and some 70 in memory for each
    'empty layers': (lambda field: field(LAYER, b'') * 2_000_000, 4),
    'empty blobs': (lambda field: field(LAYER, field(BLOBS, b'') * 3_000_000), 4),
}


@pytest.mark.parametrize('name', MANY_MESSAGES)
def test_a_caffe_file_of_many_small_messages_takes_little_memory(tmp_path, name):
    content, limit = MANY_MESSAGES[name]
    (tmp_path / 'bomb.caffemodel').write_bytes(content(caffe_reference.field))
    done = in_a_process(MEMORY, tmp_path / 'bomb.caffemodel', tmp_path / 'out', '--arch', 'sknet50')
    assert float(done.stdout.split()[-1]) < limit, done.stdout
    assert done.stderr.count('\n') == 1
