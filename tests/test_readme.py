"""The README says what is so."""

import re
from pathlib import Path

import timm
import torch

from timm_sknet.cli import main

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_the_table_of_models_is_the_commands(capsys):
    assert main(['models', '--markdown']) == 0
    shown = re.search(r'<!-- timm-sknet models --markdown -->\n(.*?)<!-- end -->', README, re.DOTALL)[1]
    assert shown.strip() == capsys.readouterr().out.strip()


def test_examples_of_arguments_run():
    block = re.search(r"```python\n(timm\.create_model\('sknet50', branches.*?)```", README, re.DOTALL)[1]
    lines = block.strip().splitlines()
    assert len(lines) == 3
    with torch.device('meta'):
        for line in lines:
            assert eval(line, {'timm': timm}).num_classes == 1000


def test_the_layer_of_the_readme_runs():
    block = re.search(r'```python\n(from timm_sknet import SelectiveKernelConv.*?)```', README, re.DOTALL)[1]
    names = {}
    exec(block, names)
    assert names['layer'](torch.zeros(2, 128, 8, 8)).shape == (2, 256, 4, 4)
