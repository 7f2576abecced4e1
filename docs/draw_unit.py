"""Draws docs/sk_unit.png: an SK convolution with two branches.

python docs/draw_unit.py
"""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

NARROW, WIDE, PLAIN = '#0072b2', '#d55e00', '#444444'  # Okabe and Ito's palette, safe for colour-blind readers


def box(ax, x, y, text, width=1.9, height=0.8, color=PLAIN, fill='white', size=10):
    """Draws a box around (x, y) and returns its left and right edges."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle='round,pad=0.02,rounding_size=0.1',
            ec=color,
            fc=fill,
            lw=1.6,
        )
    )
    ax.text(x, y, text, ha='center', va='center', fontsize=size, color=color if fill == 'white' else 'white')
    return x - width / 2 - 0.04, x + width / 2 + 0.04


def arrow(ax, *points, color=PLAIN):
    """Draws an arrow through the points."""
    xs, ys = zip(*points[:-1])
    ax.plot(xs, ys, color=color, lw=1.4, solid_capstyle='round')
    ax.annotate(
        '', points[-1], points[-2], arrowprops=dict(arrowstyle='-|>', color=color, lw=1.4, shrinkA=0, shrinkB=0)
    )


def main():
    fig, ax = plt.subplots(figsize=(12.5, 4.3), dpi=130)
    top, middle, bottom = 3.2, 1.7, 0.2

    _, x_end = box(ax, 0.6, middle, '$X$', 0.9, fill=PLAIN, size=14)
    for y, name, convolution, color in (
        (top, '$U_1$', '$3{\\times}3$, $D{=}1$, $G{=}32$\nBN, ReLU', NARROW),
        (bottom, '$U_2$', '$3{\\times}3$, $D{=}2$, $G{=}32$\nBN, ReLU', WIDE),
    ):
        left, right = box(ax, 2.9, y, convolution, 2.2, 0.95, color)
        arrow(ax, (x_end, middle), (1.4, middle), (1.4, y), (left, y))
        u_left, u_right = box(ax, 4.9, y, name, 0.8, color=color, fill=color, size=13)
        arrow(ax, (right, y), (u_left, y), color=color)
        arrow(ax, (4.9, y - 0.44 if y == top else y + 0.44), (4.9, middle + (0.2 if y == top else -0.2)), color=color)
        arrow(ax, (u_right, y), (11.33, y), color=color)
        arrow(ax, (11.5, y - 0.2 if y == top else y + 0.2), (11.5, middle + (0.2 if y == top else -0.2)), color=color)
        ax.text(11.5, y, '$\\times$', ha='center', va='center', fontsize=16, color=color)
        ax.add_patch(plt.Circle((11.5, y), 0.17, fill=False, ec=color, lw=1.4))

    for x in 4.9, 11.5:
        ax.text(x, middle, '$+$', ha='center', va='center', fontsize=15)
        ax.add_patch(plt.Circle((x, middle), 0.17, fill=False, ec=PLAIN, lw=1.4))

    end = 5.07
    for x, text, width, above in (
        (6.1, 'mean over\n$H, W$', 1.3, '$s$'),
        (7.65, '$W$, BN,\nReLU', 1.0, '$z$'),
        (9.35, '$A$, softmax\nover branches', 1.6, ''),
    ):
        left, right = box(ax, x, middle, text, width, 0.9)
        arrow(ax, (end, middle), (left, middle))
        ax.text(right + 0.2, middle + 0.1, above, fontsize=13, color=PLAIN, ha='center', va='bottom')
        end = right
    ax.plot((end, 10.75), (middle, middle), color=PLAIN, lw=1.4)
    for y, name, color in (top, '$a_1$', NARROW), (bottom, '$a_2$', WIDE):
        inward = -1 if y == top else 1
        arrow(ax, (10.75, middle), (10.75, y + 0.45 * inward), (11.36, y + 0.1 * inward), color=color)
        ax.text(10.6, (y + middle) / 2, name, color=color, fontsize=13, ha='right', va='center')
    v_left, _ = box(ax, 12.6, middle, '$V$', 0.9, fill=PLAIN, size=14)
    arrow(ax, (11.67, middle), (v_left, middle))

    for x, text in (2.9, 'split'), (7.2, 'fuse'), (10.95, 'select'):
        ax.text(x, 4.15, text, fontsize=13, style='italic', ha='center', color=PLAIN)
    ax.set(xlim=(0, 13.2), ylim=(-0.5, 4.5), aspect='equal')
    ax.axis('off')
    fig.savefig(Path(__file__).parent / 'sk_unit.png', bbox_inches='tight', facecolor='white')


if __name__ == '__main__':
    main()
