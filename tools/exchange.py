"""Checks that weights of one environment load in another one: a checkpoint of training, and its converted folder.

Usage: python tools/exchange.py write FOLDER, then in the other environment: python tools/exchange.py read FOLDER
"""

import argparse
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from timm_sknet.cli import main

ARCH = 'sknet12'


def write(folder: Path) -> None:
    """Trains a network for one step, saves it as timm's train.py does, converts it, and saves its logits."""
    torch.manual_seed(0)
    folder.mkdir()
    images = torch.randn(4, 3, 32, 32)
    model = timm.create_model(ARCH, pretrained=True, num_classes=3)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.01)
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    args = argparse.Namespace(model=ARCH, num_classes=3, eval_metric='top1')
    saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(epoch=0)
    if main(['convert', str(folder / 'last.pth.tar'), str(folder / 'converted'), '--arch', ARCH]):
        sys.exit(1)
    with torch.no_grad():
        logits = model.eval()(images)
    save_file({'images': images, 'logits': logits}, folder / 'expected.safetensors')


def read(folder: Path) -> None:
    """Loads both, and compares their logits with those of the other environment."""
    expected = load_file(folder / 'expected.safetensors')
    models = {
        'the checkpoint': timm.create_model(ARCH, num_classes=3, checkpoint_path=str(folder / 'last.pth.tar')),
        'the folder': timm.create_model(f'local-dir:{folder / "converted"}', pretrained=True),
    }
    for name, model in models.items():
        with torch.no_grad():
            logits = model.eval()(expected['images'])
        torch.testing.assert_close(logits, expected['logits'], rtol=1e-5, atol=1e-5)
        difference = (logits - expected['logits']).abs().max().item()
        print(f'torch {torch.__version__}, timm {timm.__version__}: logits of {name} differ by {difference:.1e}')


if __name__ == '__main__':
    {'write': write, 'read': read}[sys.argv[1]](Path(sys.argv[2]))
