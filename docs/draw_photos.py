"""Draws docs/photos.png, the photographs of the package with their predictions: python docs/draw_photos.py"""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image

from timm_sknet.cli import DEFAULT_MODEL
from timm_sknet.images import find_images
from timm_sknet.predict import PHOTOS, classify, load_model

BEST, OTHER, PLAIN = '#0072b2', '#bbbbbb', '#444444'
CLASSES = 3


def main():
    results = list(classify(load_model(DEFAULT_MODEL), find_images(PHOTOS), CLASSES))
    fig, axes = plt.subplots(
        2, len(results), figsize=(10, 3.7), dpi=90, height_ratios=(2.4, 1), layout='constrained', squeeze=False
    )
    for (file, predictions), photo, bars in zip(results, *axes):
        photo.imshow(Image.open(file))
        photo.set_title(file.name, fontsize=11, color=PLAIN)
        photo.axis('off')
        bars.barh(range(CLASSES), [p.probability for p in predictions], 0.7, color=[BEST] + [OTHER] * (CLASSES - 1))
        for i, p in enumerate(predictions):
            bars.text(1.06, i, f'{p.label} {p.probability:.1%}', va='center', fontsize=10, color=PLAIN)
        bars.set(xlim=(0, 2.2), ylim=(CLASSES - 0.4, -0.6))
        bars.axis('off')
    out = Path(__file__).parent / 'photos.png'
    fig.savefig(out, bbox_inches='tight', facecolor='white')
    Image.open(out).convert('RGB').quantize(256).save(out, optimize=True)  # a smaller file


if __name__ == '__main__':
    main()
