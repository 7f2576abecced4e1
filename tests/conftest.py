from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

TIMM_REPO = 'timm/skresnext50_32x4d.ra_in1k'


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='device of the tests in test_device.py, such as cuda')


def trained(model):
    """Sets the batch norms of a model to random values far from their initial ones; returns it in eval mode."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    return model.eval()


@pytest.fixture(scope='session')
def cifar(tmp_path_factory) -> Path:
    """Noise in the form of CIFAR-10 for training: 130 padded images in train/, 20 images in val/."""
    folder = tmp_path_factory.mktemp('cifar')
    rng = np.random.default_rng(0)
    for split, number in ('train', 13), ('val', 2):
        for name in range(10):
            (folder / split / str(name)).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(name) / f'{i}.png')
    return folder


@pytest.fixture(scope='session')
def theirs():
    """timm's own SKNet-50, with weights and statistics far from their initial values. Tests must not change it."""
    torch.manual_seed(0)
    return trained(timm.create_model('skresnext50_32x4d'))


@pytest.fixture(scope='session')
def repo(theirs, tmp_path_factory) -> Path:
    """A folder for the loopback server that contains timm's repository."""
    folder = tmp_path_factory.mktemp('hub')
    (folder / TIMM_REPO).mkdir(parents=True)
    save_file(theirs.state_dict(), folder / TIMM_REPO / 'model.safetensors')
    return folder
