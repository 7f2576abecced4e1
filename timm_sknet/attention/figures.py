"""Draws figures like figures 3 and 4 of the paper from the results of scale experiments.

The figures are drawn without pyplot, so that they need no display and do not change the figures of the caller.
"""

import re
from pathlib import Path
from typing import Any, List, Sequence

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.data import ImageNetInfo
from torch import Tensor, nn

from timm_sknet.attention.scale import EnlargedImages, ScaleResult, replacing

FORMATS = ('.png', '.svg')
MOST_IMAGES = 12
MOST_NAMES = 40  # with more classes, the axis shows numbers instead of names
MARKERS = 'os^Dv<>P'


@matplotlib.rc_context({'text.parse_math': False})  # names may contain a $
def draw_images(model: nn.Module, results: Sequence[ScaleResult], units: Sequence[str], file: Path) -> None:
    """Draws one row for each image: the image at each scale, the attention of all units, and of channels (figure 3).

    Args:
        model: The model of the experiments. Its preprocessing is applied to the images.
        results: Results of one image each, with the same scales.
        units: Names of the units whose channels are shown.
        file: Output file, .png or .svg.
    """
    scales = results[0].scales
    widths = [*[1.6] * len(scales), _units_width(results[0]), *[3.6] * len(units)]
    figure = Figure(figsize=(sum(widths), 0.8 + 2.6 * len(results)), layout='constrained')
    axes = figure.subplots(len(results), len(widths), width_ratios=widths, squeeze=False)
    for row, result in zip(axes, results):
        images = EnlargedImages(model, result.files, scales)[0]
        assert isinstance(images, Tensor)  # the experiment has read this image
        for ax, image, scale in zip(row, images, scales):
            ax.imshow(_pixels(image, model), cmap='gray', vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f'{scale:g}x')
        row[0].set_title(_short(result.files[0].name, 40), loc='left', fontsize=9)
        _draw_units(row[len(scales)], result)
        for ax, unit in zip(row[len(scales) + 1 :], units):
            _draw_channels(ax, result, unit)
    _finish(figure, axes[0][len(scales)], results[0], file)


@matplotlib.rc_context({'text.parse_math': False})
def draw_classes(result: ScaleResult, units: Sequence[str], file: Path) -> None:
    """Draws the mean attention of all units over all images, and of some units for each class (figure 4).

    Args:
        result: The result of many images.
        units: Names of the units that are shown for each class. They are left out if there is only one class.
        file: Output file, .png or .svg.
    """
    classes = sorted(set(result.classes))
    units = units if len(classes) > 1 else []
    width = min(max(_units_width(result), 0.45 * len(classes), 7.0), 14.0)
    figure = Figure(figsize=(width, 3.4 + 2.2 * len(units)), layout='constrained')
    axes = figure.subplots(1 + len(units), 1, squeeze=False)[:, 0]
    _draw_units(axes[0], result)
    number = {name: i for i, name in enumerate(classes)}
    of_image = np.array([number[name] for name in result.classes])
    for ax, unit in zip(axes[1:], units):
        values = result.difference[:, :, list(result.units).index(unit)].numpy()
        means = np.array([values[of_image == i].mean(0) for i in range(len(classes))])
        for s, style in enumerate(_styles(result.scales)):
            named = len(classes) <= MOST_NAMES
            ax.plot(means[:, s], **style, **({'ms': 5, 'lw': 1} if named else {'ms': 0, 'lw': 0.6}))
            ax.axhline(means[:, s].mean(), color=style['color'], lw=1, ls=':')
        _label(ax, result, unit)
        ax.margins(x=0.02)
    for ax in axes[1:]:
        if len(classes) <= MOST_NAMES:
            names = [_short(name, 24) for name in _readable(classes)] if ax is axes[-1] else [''] * len(classes)
            ax.set_xticks(range(len(classes)), names, rotation=45 if len(classes) > 6 else 0, fontsize=8)
            for label in ax.get_xticklabels() if len(classes) > 6 else ():
                label.set(ha='right', rotation_mode='anchor')
        elif ax is axes[-1]:
            ax.set_xlabel(f'class, 0 to {len(classes) - 1}, in the order of their names')
    note = f'{len(result.files)} images{"; dotted: mean over the classes" if units else ""}'
    figure.supxlabel(note, fontsize=8, x=0.99, ha='right')
    _finish(figure, axes[0], result, file)


def _draw_units(ax: Axes, result: ScaleResult) -> None:
    means = result.difference.mean(0).numpy()  # (S, U)
    width = 0.8 / len(result.scales)
    for s, style in enumerate(_styles(result.scales)):
        places = [u + (s - (len(result.scales) - 1) / 2) * width for u in range(len(result.units))]
        ax.bar(places, means[s], width * 0.92, color=style['color'], label=style['label'])
    names = list(result.units)
    ax.set_xticks(range(len(names)), [_short(name, 20) for name in names], rotation=90, fontsize=8)
    ax.margins(x=0.01)
    _label(ax, result, 'mean over the channels of each unit')


def _draw_channels(ax: Axes, result: ScaleResult, unit: str) -> None:
    profile = result.profile[unit].numpy()  # (S, C)
    order = profile[0].argsort()
    for s, style in enumerate(_styles(result.scales)):
        ax.plot(profile[s][order], **style, ms=2 if profile.shape[1] > 100 else 3, lw=0)
    _label(ax, result, unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f'channels, in their order at {result.scales[0]:g}x', fontsize=8)


def _label(ax: Axes, result: ScaleResult, title: str) -> None:
    extents = next(iter(result.units.values())).extents
    narrow, wide = min(extents), max(extents)
    pair = f'{wide}x{wide} minus {narrow}x{narrow}' if wide > narrow else 'last branch minus first'
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(f'attention,\n{pair}', fontsize=8)
    ax.tick_params(labelsize=8)
    ax.axhline(0, color='black', lw=0.8)
    ax.spines[['top', 'right']].set_visible(False)


def _styles(scales: Sequence[float]) -> List[Any]:
    """Returns a colour and a marker for each scale. The colours differ in brightness, so that they work in grey."""
    shades = np.linspace(0.85, 0.0, len(scales))
    return [
        dict(color=colormaps['viridis'](shade), marker=MARKERS[i % len(MARKERS)], label=f'{scale:g}x')
        for i, (scale, shade) in enumerate(zip(scales, shades))
    ]


def _units_width(result: ScaleResult) -> float:
    return max(4.0, 0.6 + 0.1 * len(result.units) * len(result.scales))


def _pixels(image: Tensor, model: nn.Module) -> np.ndarray:
    """Reverses the normalisation of an image: (C, H, W) -> (H, W, C) in [0, 1]."""
    cfg: Any = getattr(model, 'pretrained_cfg', {})
    ends = [image.new_tensor(cfg[key])[:, None, None] if cfg.get(key) else None for key in ('mean', 'std')]
    if ends[0] is not None and ends[1] is not None:
        image = image * ends[1] + ends[0]
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _readable(classes: Sequence[str]) -> List[str]:
    """Replaces WordNet ids, which the folders of ImageNet have as names, by words: n01440764 becomes tench."""
    if not any(re.fullmatch(r'n\d{8}', name) for name in classes):
        return list(classes)
    words: Any = ImageNetInfo('imagenet-22k').label_descriptions(as_dict=True)
    return [words[name].split(',')[0] if name in words else name for name in classes]


def _short(text: str, most: int) -> str:
    text = text.encode(errors='backslashreplace').decode()  # file names can contain invalid bytes
    text = ''.join(c if c.isprintable() else '?' for c in text)
    return text if len(text) <= most else f'{text[: most - 3]}...'


def _finish(figure: Figure, ax: Axes, result: ScaleResult, file: Path) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, title='object enlarged', loc='outside upper center', ncols=8, frameon=False)
    with replacing(file) as unfinished:
        figure.savefig(unfinished, format=file.suffix[1:].lower(), dpi=120)
