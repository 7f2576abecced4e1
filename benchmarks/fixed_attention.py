"""Measures top-1 accuracy with normal attention, with attention fixed at 1/M, and fixed at its mean for each channel.

    python benchmarks/fixed_attention.py DATA/val --model sknet12.cifar10

The mean is over the evaluated images. DATA/val has one folder of images for each class, in the order of the model's
classes.
"""

import argparse
from typing import Callable, Dict, Optional

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn

from timm_sknet import SelectiveKernelAttn

Replace = Callable[[nn.Module, Tensor], Optional[Tensor]]


@torch.inference_mode()
def top1(model: nn.Module, loader, replace: Optional[Replace] = None) -> float:
    """Returns the accuracy in %. `replace` gets the attention of each unit, (B, M, C), and can return another one."""
    units = [m for m in model.modules() if isinstance(m, SelectiveKernelAttn)]
    hooks = [unit.register_forward_hook(lambda m, args, a: replace(m, a)) for unit in units] if replace else []
    right = total = 0
    for images, labels in loader:
        right += (model(images).argmax(1) == labels).sum().item()
        total += len(labels)
    for hook in hooks:
        hook.remove()
    return 100 * right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--model', default='sknet12.cifar10')
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=True).eval()
    config = resolve_data_config(model=model)
    loader = create_loader(
        create_dataset('', args.folder),
        input_size=config['input_size'],
        batch_size=500,
        use_prefetcher=False,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        num_workers=1,
    )
    totals: Dict[nn.Module, Tensor] = {}

    def record(unit: nn.Module, a: Tensor) -> None:
        totals[unit] = totals.get(unit, 0) + a.sum(0)

    print(f'{args.model} on {len(loader.dataset)} images, torch {torch.__version__}, timm {timm.__version__}')
    print(f'selection as it is          {top1(model, loader, record):.2f}')
    number = len(loader.dataset)
    print(f'attention fixed at 1/M      {top1(model, loader, lambda unit, a: torch.full_like(a, 1 / a.shape[1])):.2f}')
    print(
        f'at its mean, by channel     {top1(model, loader, lambda unit, a: (totals[unit] / number).expand_as(a)):.2f}'
    )


if __name__ == '__main__':
    main()
