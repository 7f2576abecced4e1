"""Writes and loads model folders: config.json, model.safetensors and README.md.

This is the layout of timm's models on the Hub.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

CONFIG, WEIGHTS, CARD = FILES = 'config.json', 'model.safetensors', 'README.md'


def check_target(out: Path, force: bool) -> None:
    """Checks that a folder can be written.

    Raises:
        ValueError: If it exists, unless `force` is set and it contains nothing but a model folder.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise ValueError(f'{out} already exists. Choose another folder, or replace it with --force.')
    if out.is_symlink() or not out.is_dir() or set(os.listdir(out)) not in (set(), set(FILES)):
        raise ValueError(
            f'{out} is not replaced, because --force only replaces a folder with the files of an earlier conversion. '
            'Choose another folder.'
        )


def write(out: Path, state: Dict[str, Tensor], config: Dict[str, Any], card: str, force: bool = False) -> None:
    """Writes a model folder atomically: it exists only if the model in it was loaded and run.

    Args:
        out: The folder, an absolute path.
        state: The state dict. It is emptied once it is written, which frees its memory.
        config: The content of config.json.
        card: The text of README.md.
        force: Replace the folder if it exists.

    Raises:
        ValueError: If timm cannot load and run the model.
        OSError: If a file cannot be written.
    """
    parent = out.parent
    while not parent.exists():  # missing parents are created only when the folder is complete
        parent = parent.parent
    folder = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=parent))
    try:
        folder.chmod(0o755)
        save_file(state, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
        state.clear()
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2) + '\n')
        (folder / CARD).write_text(card, encoding='utf-8')
        try:
            load(folder)
        except ValueError as e:
            raise ValueError(str(e).replace(str(folder), 'the converted folder')) from e
        if force and out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(folder: Path) -> nn.Module:
    """Loads the model in a folder, runs it on one image and returns it in eval mode.

    Raises:
        ValueError: If timm cannot load or run the model, or if its output is not finite.
    """
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        config = resolve_data_config(model=model)
        channels, *size = config['input_size']
        config['input_size'] = (channels, *(min(n, 512) for n in size))  # a wrong size could need too much memory
        image = torch.rand(config['input_size'])
        if channels in (1, 3):
            transform = create_transform(**config)
            image = transform(Image.new('RGB' if channels == 3 else 'L', (256, 256), 'gray'))
        with torch.inference_mode():
            out = model(image[None])
    except Exception as e:  # timm raises many types for invalid files
        raise ValueError(f'timm cannot load and run the model in {folder}: {one_line(e)}') from e
    if not out.isfinite().all():
        raise ValueError(f'The output of the model in {folder} is NaN or infinite.')
    return model


def one_line(error: Exception, most: int = 500) -> str:
    """Returns the message of an error in one printable line of limited length: it can contain names from a file."""
    text = ' '.join(str(error).split())
    return ''.join(c if c.isprintable() else '?' for c in text[:most]) + '...' * (len(text) > most)
