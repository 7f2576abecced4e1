"""`timm-sknet convert` of TensorFlow checkpoints of SimCLRv2, compared with the outputs of Google's code."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import trained
from hub import hub
from safetensors.torch import load_file
from simclr import golden
from simclr_reference import to_hub, to_tensorflow
from test_tensorflow import DATA, checkpoint
from timm.utils import reparameterize_model

from timm_sknet.checkpoints import reading
from timm_sknet.cli import main
from timm_sknet.keys import native_keys
from timm_sknet.sknets import model_cfgs

NAME = 'sk_resnet50x1_simclr'


@pytest.fixture(scope='module')
def prefix(tmp_path_factory):
    return golden.write(tmp_path_factory.mktemp('golden'))


@pytest.fixture(scope='module')
def folder(prefix, tmp_path_factory):
    folder = tmp_path_factory.mktemp('converted') / 'out'
    assert main(['convert', str(prefix), str(folder), '--arch', NAME]) == 0
    return folder


def distance(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('size', [64, 129])
@torch.no_grad()
def test_a_converted_checkpoint_gives_the_outputs_of_googles_code(folder, size):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images, expected, attention = golden.images(size), golden.expected(size), []
    model.stages[0][0].sk.attn.register_forward_hook(lambda m, args, a: attention.append(a))
    features = model.forward_features(images)
    assert distance(model.forward_head(features), expected['logits']) < 1e-5
    assert distance(model.forward_head(features, pre_logits=True), expected['pooled']) < 1e-5
    assert distance(attention[0], expected['attn']) < 1e-5
    folded = reparameterize_model(timm.create_model(f'local-dir:{folder}', pretrained=True).eval())
    assert distance(folded(images), expected['logits']) < 1e-5


def test_the_file_on_the_hub_gives_the_same_weights(folder):
    state = load_file(folder / 'model.safetensors')
    renamed = native_keys(to_hub(state)['resnet'])
    assert renamed.keys() == state.keys() and sum(not key.endswith('tracked') for key in renamed) == 453
    assert all(torch.equal(renamed[key], value) for key, value in state.items())


def test_a_file_of_the_hub_is_converted(folder, tmp_path):
    state = load_file(folder / 'model.safetensors')
    torch.save(to_hub(state), tmp_path / 'r50_1x_sk1.pth')
    assert main(['convert', str(tmp_path / 'r50_1x_sk1.pth'), str(tmp_path / 'out'), '--arch', NAME]) == 0
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['mean'], cfg['std'], cfg['interpolation']) == ([0.0] * 3, [1.0] * 3, 'bicubic')


TINY = dict(depths=(1, 2, 1, 1), mid_widths=(2, 2, 2, 2), widths=(4, 4, 4, 4), stem=(2, 3, 2), stem_widths=(2, 2), L=2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, caplog):
    """Returns a function that converts a small checkpoint with this step; it returns the exit code and the messages."""
    monkeypatch.setitem(model_cfgs, NAME, model_cfgs[NAME].override(**TINY))
    variables = to_tensorflow(trained(timm.create_model(NAME, num_classes=1000)).state_dict())

    def convert(step, *options, source='', change=lambda variables: None, arch=NAME):
        given = dict(variables)
        if step is not None:
            given['global_step'] = np.array(step)
        change(given)
        (tmp_path / 'source').mkdir(exist_ok=True)
        checkpoint(dict(sorted(given.items()))).write(tmp_path / 'source')
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        path = tmp_path / 'source' / source
        code = main(['convert', str(path), str(tmp_path / 'out'), '--arch', arch, *options])
        return code, capsys.readouterr().err + caplog.text

    return convert


@pytest.mark.parametrize(
    'step, tag, top1', [(250228, 'linear_in1k', 74.6), (37535, 'ft_in1k', 78.7), (28151, 'sup_in1k', 78.5)]
)
def test_the_step_tells_which_weights_they_are(run, tmp_path, step, tag, top1):
    assert run(step) == (0, '')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert f'# {NAME}.{tag}' in card and f'top-1 {top1} %' in card and 'arXiv' not in card
    assert 'Big Self-Supervised Models' in card and 'license: unknown' in card
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['tag'] == tag and 'label_names' not in cfg


@pytest.mark.parametrize('step, percent', [(751, 1), (3754, 10)])
def test_weights_with_a_hidden_layer_in_the_head_are_refused(run, tmp_path, step, percent):
    code, err = run(step)
    assert code == 2 and err.count('\n') == 1 and f'fine-tuned with {percent} % of the labels' in err
    assert 'hidden layer' in err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('step', [0, 5, None])
def test_any_other_step_is_read_with_a_warning_and_without_a_tag(run, tmp_path, step):
    code, messages = run(step)
    assert code == 0 and messages.count('\n') == 1 and f'global_step is {step}' in messages
    assert '"tag"' not in (tmp_path / 'out' / 'config.json').read_text()
    code, _ = run(step, '--tag', 'mine')
    assert code == 0 and '"tag": "mine"' in (tmp_path / 'out' / 'config.json').read_text()


@pytest.mark.parametrize('source', ['', 'checkpoint', 'model.ckpt-7', 'model.ckpt-7.index', DATA])
def test_a_checkpoint_is_found_by_each_of_its_paths(run, tmp_path, source):
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source' / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-7"\n')
    assert run(37535, source=source) == (0, '')


def test_a_relative_path_with_one_slash_is_not_taken_for_a_repository(run, tmp_path, monkeypatch):
    assert run(37535)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert main(['convert', 'source/model.ckpt-7', 'again', '--arch', NAME]) == 0
    assert main(['convert', 'source', 'once more', '--arch', NAME]) == 0


def test_a_mistyped_prefix_is_not_looked_for_on_the_hub(run, tmp_path, monkeypatch):
    assert run(37535)[0] == 0
    monkeypatch.setattr(reading, 'download_first', lambda *args: pytest.fail('the Hub was asked'))
    for source in 'model.ckpt-8', '../elsewhere/model.ckpt-7':
        code, err = run(37535, source=source)
        assert code == 2 and err.count('\n') == 1 and '.index is missing' in err


def test_the_graph_beside_a_checkpoint_leads_to_it(run, tmp_path):
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source' / 'model.ckpt-7.meta').write_bytes(b'\x0a\x05graph\x12\x03abc')
    assert run(37535, source='model.ckpt-7.meta') == (0, '')


def test_the_repository_of_the_table_is_converted(folder, tmp_path):
    """It has no config.json."""
    state = load_file(folder / 'model.safetensors')
    repository = 'lightly-ai/simclrv2-imagenet1k-r50_1x_sk1'
    (tmp_path / 'served' / repository).mkdir(parents=True)
    torch.save(to_hub(state), tmp_path / 'served' / repository / 'r50_1x_sk1.pth')
    command = [sys.executable, '-m', 'timm_sknet', 'convert', repository, 'out', '--arch', NAME]
    with hub(tmp_path / 'served') as address:
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'}
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=300)
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'license: apache-2.0' in card and f'# {NAME}.linear_in1k' in card and 'top-1 74.6 %' in card


def test_the_classifier_may_be_missing_or_another_one(run, tmp_path):
    def fewer(variables):
        variables['head_supervised/linear_layer/dense/kernel'] = np.ones((4, 3), np.float32)
        variables['head_supervised/linear_layer/dense/bias'] = np.ones(3, np.float32)

    assert run(37535, change=fewer) == (0, '')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == 3 and 'tag' not in config['pretrained_cfg']

    def without(variables):
        for name in 'kernel', 'bias':
            del variables[f'head_supervised/linear_layer/dense/{name}']

    assert run(37535, change=without) == (0, '')


def spoil(name, value=None):
    def change(variables):
        found = variables.pop(name)
        if value is not None:
            variables[name] = value(found)

    return change


@pytest.mark.parametrize(
    'change, words',
    [
        (spoil('base_model/conv2d_7/kernel'), 'convolutions'),
        (spoil('base_model/batch_normalization_3/gamma'), 'missing tensors: stages.0.0.shortcut.1.bn.weight'),
        (spoil('base_model/conv2d_4/kernel', lambda v: v[..., :1]), 'stages.0.0.conv1.conv.weight has the shape'),
        (spoil('base_model/conv2d_4/kernel', lambda v: v * np.float32(np.nan)), 'NaN or infinite'),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_in_one_line(run, tmp_path, change, words):
    code, err = run(37535, change=change)
    assert code == 2 and err.count('\n') == 1 and words in err
    assert os.listdir(tmp_path) == ['source']


def test_another_model_is_refused_and_the_right_one_is_named(run):
    for arch in 'sknet50', 'sk_resnet101x1_simclr':
        code, err = run(37535, arch=arch)
        assert code == 2 and f'It looks like {NAME}: use --arch {NAME}.' in err
