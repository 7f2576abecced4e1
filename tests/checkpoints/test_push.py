"""`timm-sknet push` and timm's own functions for publishing, with a local server that stores the uploads.

The server does not support Xet, which huggingface_hub uses if it is installed. HF_HUB_DISABLE_XET turns it off.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from hub import hub
from models import MODELS
from safetensors.torch import load_file, save_file

from timm_sknet.cli import main


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A converted model with a stated licence."""
    path = tmp_path_factory.mktemp('push')
    save_file(timm.create_model('sknet12', pretrained=True).state_dict(), path / 'own.safetensors')
    assert (
        main(['convert', str(path / 'own.safetensors'), str(path / 'mine'), '--arch', 'sknet12', '--license', 'mit'])
        == 0
    )
    return path / 'mine'


@pytest.fixture
def unlicensed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / 'unlicensed')
    card = copy / 'README.md'
    card.write_text(card.read_text().replace('license: mit', 'license: unknown'))
    return copy


@pytest.fixture
def client(tmp_path):
    """Returns a function that runs Python as a user of the server, with an empty cache and a token."""

    def run(address, *command, token='hf_write', **env):
        env = {**os.environ, 'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '0'} | env
        env |= {'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': token}
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return run


def push(*args):
    return '-m', 'timm_sknet', 'push', *args


LOADED = (
    'import sys, timm, torch\n'
    'model = timm.create_model(sys.argv[1], pretrained=True).eval()\n'
    'torch.save(model(torch.ones(1, *model.pretrained_cfg["input_size"])).detach(), "logits.pt")\n'
)


@torch.no_grad()
def test_what_was_pushed_is_loaded_by_others(folder, client, tmp_path):
    with hub(tmp_path / 'served') as address:
        for _ in range(2):  # a push can be repeated
            done = client(address, *push(folder, 'org/name'))
            assert done.returncode == 0, done.stderr
            assert "timm.create_model('hf-hub:org/name', pretrained=True)" in done.stdout
            assert 'model.safetensors: 100%' in done.stderr  # a progress bar
        assert sorted(os.listdir(tmp_path / 'served/org/name')) == ['README.md', 'config.json', 'model.safetensors']
        loaded = client(address, '-c', LOADED, 'hf-hub:org/name')
        assert loaded.returncode == 0, loaded.stderr
    expected = timm.create_model('sknet12', pretrained=True).eval()(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt', weights_only=True), expected)
    card = (tmp_path / 'served/org/name/README.md').read_text()
    assert "create_model('hf-hub:org/name'" in card and 'ORG/NAME' not in card


def test_a_branch_of_a_private_repository(folder, unlicensed, client, tmp_path):
    with hub(tmp_path / 'served') as address:
        done = client(address, *push(unlicensed, 'org/name', '--private', '--revision', 'v1'))
        assert done.returncode == 0, done.stderr
        assert 'hf-hub:org/name@v1' in done.stdout
        assert os.listdir(tmp_path / 'served/org/name') == ['.private']
        loaded = client(address, '-c', LOADED, 'hf-hub:org/name@v1')
        assert loaded.returncode == 0, loaded.stderr


def test_without_a_licence_nothing_becomes_public(unlicensed, client, tmp_path):
    with hub(tmp_path / 'served') as address:
        done = client(address, *push(unlicensed, 'org/name'))
        assert done.returncode == 2 and 'states no licence' in done.stderr and '--private' in done.stderr
        assert not (tmp_path / 'served').exists()
        (tmp_path / 'served/org/name').mkdir(parents=True)  # a public repository
        done = client(address, *push(unlicensed, 'org/name', '--private'))
        assert done.returncode == 2 and 'org/name already exists and is public' in done.stderr
        assert not os.listdir(tmp_path / 'served/org/name')


def test_errors_of_the_hub_are_reported_in_one_line(folder, client, tmp_path):
    with hub(tmp_path / 'served') as address:
        for token, expected in (
            ('', 'No Hugging Face token found. Run `hf auth login`, or set HF_TOKEN'),
            ('hf_wrong', 'The Hub rejected the upload to org/name (401): Who are you?. Check the token'),
            (
                'hf_read',
                'The Hub rejected the upload to org/name (403): You have no right to do that. Use a token with',
            ),
        ):
            done = client(address, *push(folder, 'org/name'), token=token)
            assert done.returncode == 2 and done.stderr.count('\n') == 1
            assert expected in done.stderr
    for nowhere, env in ('http://127.0.0.1:9', {}), (address, {'HF_HUB_OFFLINE': '1'}):
        done = client(nowhere, *push(folder, 'org/name'), **env)
        assert done.returncode == 2 and done.stderr.count('\n') == 1
        assert 'Cannot push to org/name. The Hub may be unreachable' in done.stderr


def no_card(folder):
    (folder / 'README.md').unlink()


def no_front_matter(folder):
    (folder / 'README.md').write_text('# A model')


def broken_front_matter(folder):
    (folder / 'README.md').write_text('---\nlicense: [mit\n---\n# A model')


def a_pickle(folder):
    state = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    torch.save(state, folder / 'pytorch_model.bin')


def no_classes(folder):
    state = load_file(folder / 'model.safetensors')
    save_file({k: v for k, v in state.items() if not k.startswith('head')}, folder / 'model.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'num_classes': 0}))


def nan(folder):
    state = load_file(folder / 'model.safetensors')
    state['head.fc.bias'][0] = float('nan')
    save_file(state, folder / 'model.safetensors')


def cut_short(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:-100])


def no_json(folder):
    (folder / 'config.json').write_text('{')


@pytest.mark.parametrize('damage, expected', [
    (no_card, 'has no README.md. Create the folder with `timm-sknet convert`'),
    (no_front_matter, 'README.md is not a valid model card: it has no front matter'),
    (broken_front_matter, 'README.md is not a valid model card'),
    (a_pickle, 'has no model.safetensors'),
    (no_classes, 'has no classifier'),
    (nan, 'NaN'),
    (cut_short, 'timm cannot load and run the model in'),
    (no_json, 'timm cannot load and run the model in'),
])  # fmt: skip
def test_an_invalid_folder_is_refused(folder, tmp_path, capsys, damage, expected):
    copy = shutil.copytree(folder, tmp_path / 'copy')
    damage(copy)
    assert main(['push', str(copy), 'org/name', '--private']) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count('\n') == 1


def test_a_repository_without_an_owner_is_refused(folder, capsys):
    assert main(['push', str(folder), 'name', '--private']) == 2
    assert "The repository must have the form ORG/NAME, got 'name'." in capsys.readouterr().err


# timm's own functions

RECORDED = hasattr(timm.models, 'get_model_args')  # older releases do not store the arguments

SMALL = {
    'sknet26': dict(branches=((3, 1, 32), (3, 2, 32), (3, 3, 32)), stem_pool='ceil', depths=(1, 1, 1, 1)),
    'sknet50': dict(depths=(1, 1, 1, 1), attn_widths=(8, 8, 8, 8)),
    'sknet101': dict(depths=(1, 1, 1, 1), r=8, L=16),
    'sknet50_m3': dict(depths=(1, 1, 1, 1)),
    'sknet50_caffe': dict(depths=(1, 1, 1, 1)),
    'sknet101_caffe': dict(depths=(1, 1, 1, 1), stem_pool='pad'),
    'sknet29_16x32d': dict(depths=(1, 1, 1)),
    'sk_resnet50': dict(depths=(1, 1, 1, 1), stem_pool='ceil'),
    'sk_resnet34_timm': dict(depths=(1, 1, 1, 1)),
    'sk_resnet50x1_simclr': dict(depths=(1, 1, 1, 1), stem_widths=(32, 64), shortcut_pool=False),
    'sk_resnet101': dict(depths=(1, 1, 1, 1), norm_layer='layernorm2d'),
}


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_save_for_hf_keeps_arguments(name, tmp_path):
    args = dict(in_chans=1, **SMALL.get(name, {}))
    model = timm.create_model(name, **args).eval()
    model.reset_classifier(7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=None if RECORDED else args)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 1, 64, 64)
    assert again(x).shape == (1, 7)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_push_to_hf_hub_keeps_arguments(client, tmp_path):
    told = '' if RECORDED else ', model_args=args'
    script = (
        'import timm, torch\n'
        'torch.manual_seed(0)\n'
        "args = dict(branches=[[3, 1, 1], [5, 1, 1]], in_chans=1, stem_pool='ceil')\n"
        "model = timm.create_model('sknet12', **args).eval()\n"
        'model.reset_classifier(7)\n'
        f"timm.models.push_to_hf_hub(model, 'org/name', safe_serialization=True{told})\n"
        "again = timm.create_model('hf-hub:org/name', pretrained=True).eval()\n"
        'x = torch.randn(1, 1, 64, 64)\n'
        'assert again(x).shape == (1, 7) and torch.equal(again(x), model(x))\n'
    )
    with hub(tmp_path / 'served') as address:
        done = client(address, '-c', script)
        assert done.returncode == 0, done.stderr
