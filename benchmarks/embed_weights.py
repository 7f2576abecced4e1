"""Turns a checkpoint of timm's train.py into the weights file of the package: fp16, batch norm statistics in fp32.

python benchmarks/embed_weights.py output/train/RUN/last.pth.tar timm_sknet/weights/sknet12.cifar10.safetensors
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import load_state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()

    state = load_state_dict(str(args.checkpoint), weights_only=True)
    for key, value in state.items():
        if value.is_floating_point() and not key.endswith(('running_mean', 'running_var')):
            state[key] = value.to(torch.float16)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix('.unfinished')
    save_file(state, unfinished)
    unfinished.chmod(0o644)  # safetensors keeps what it writes to its owner
    os.replace(unfinished, args.out)
    print(f'{args.out}: {len(state)} tensors, {args.out.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
