"""Draw docs/method.png, the README's figure of one Semiformer training step: python docs/draw_method.py

From left to right: the three inputs, the two-stream network, and the two losses. Gradients flow back along solid
arrows; dashed arrows, from the weak view to its pseudo label, carry none. One unit of the canvas is 0.1 inch.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

CNN, TRANSFORMER, DATA, INK = "#0072B2", "#D55E00", "#6E6E6E", "#222222"
TINTS = {CNN: "#DCECF6", TRANSFORMER: "#FBE6D9", DATA: "#EEEEEE", INK: "#FFFFFF"}
WIDTH, HEIGHT, DPI = 100, 52, 150
TOP, BOTTOM = 32, 15  # y of the middle of the CNN row and of the transformer row
STAGES, HEADS = (30.5, 41.5, 52.5), 63.5  # left edges of the three blocks and the head in each row
BLOCK, HEAD_WIDTH = (8, 6.4), 9.6  # width and height of a block; a head is as high


def box(ax, x, y, width, height, text, colour, **style):
    """Draw a rounded box with its lower left corner at (x, y) and its text in the middle."""
    shape = "round,pad=0,rounding_size=0.9"
    ax.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=TINTS[colour], ec=colour, lw=1.4))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.25, **style)


def arrow(ax, *points, colour=INK, dashed=False, both=False):
    """Draw an arrow through the points, with a head at its end, or with `both` at both ends."""
    style = {"color": colour, "lw": 1.5, "linestyle": (0, (3.5, 2)) if dashed else "-"}
    if len(points) > 2:
        ax.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **style)
    # Only the shaft is dashed: a dashed outline would fray the head.
    head = {"arrowstyle": "-|>,head_length=0.5,head_width=0.22", "shrinkA": 0, "shrinkB": 0, "color": colour}
    ends = [points[-2:]] + ([points[-2:][::-1]] if both else [])
    for (x0, y0), (x1, y1) in ends:
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        near = (x1 - (x1 - x0) / length, y1 - (y1 - y0) / length)
        ax.plot([x0, near[0]], [y0, near[1]], solid_capstyle="butt", **style)
        ax.annotate("", (x1, y1), near, arrowprops={**head, "lw": 1.0, "mutation_scale": 14})


def draw_inputs(ax):
    """Draw the weak view (dashed) and, below it, the two inputs that go through the network together."""
    box(ax, 1, 33, 15, 8, "unlabelled,\nweak view (95)", DATA)
    box(ax, 1, 19, 15, 8, "unlabelled,\nstrong view (95)", DATA)
    box(ax, 1, 7, 15, 8, "labelled\nimages (13)", DATA)
    ax.text(8.5, 4.2, "(n): images per\nprocess and step", ha="center", va="center", color=DATA)
    arrow(ax, (16, 37), (28, 37), dashed=True)
    ax.text(22, 38, "same weights,\neval mode", ha="center", va="bottom")
    ax.text(22, 36, "no gradient", ha="center", va="top")
    for y in (23, 11):
        ax.plot([16, 18, 18], [y, y, 17], color=INK, lw=1.5)
    arrow(ax, (18, 17), (28, 17))
    ax.text(22.7, 18, "together,\none forward", ha="center", va="bottom")
    ax.text(22.7, 16, "train mode", ha="center", va="top")


def draw_network(ax):
    """Draw the two rows of blocks, which exchange features at every stage, and their heads."""
    frame = "round,pad=0,rounding_size=1.2"
    ax.add_patch(FancyBboxPatch((28, 3), 46.5, 38, frame, fc="#FAFAFA", ec=DATA, lw=1.2))
    width, height = BLOCK
    for row, colour, block, head in (
        (TOP, CNN, "conv", "CNN\nhead"),
        (BOTTOM, TRANSFORMER, "attention", "transformer\nhead"),
    ):
        for x in STAGES:
            box(ax, x, row - height / 2, width, height, block, colour)
        box(ax, HEADS, row - height / 2, HEAD_WIDTH, height, head, colour)
        for x, following in zip(STAGES, (*STAGES[1:], HEADS), strict=True):
            arrow(ax, (x + width, row), (following, row), colour=colour)
        arrow(ax, (HEADS + HEAD_WIDTH, row), (76, row), colour=colour)
    for x in STAGES:
        arrow(ax, (x + 1.5, BOTTOM + height / 2), (x + 1.5, TOP - height / 2), both=True)
        ax.text(x + 2.6, (TOP + BOTTOM) / 2, "squeeze\n/ expand", va="center", linespacing=1.4)
    ax.text(STAGES[0], 38, "CNN stream", color=CNN, weight="bold", va="center")
    ax.text(STAGES[0], 9.5, "transformer stream", color=TRANSFORMER, weight="bold", va="center")
    ax.text(STAGES[0], 5.8, "squeeze: CNN \u2192 tokens,  expand: tokens \u2192 CNN", va="center")
    box(ax, 76, 11, 3, 25, "logits", DATA, rotation=90)


def draw_losses(ax):
    """Draw the path from the CNN's logits of the weak view to a pseudo label, and the two losses."""
    middle = HEADS + HEAD_WIDTH / 2
    arrow(ax, (middle, TOP + BLOCK[1] / 2), (middle, 44.5), dashed=True)
    ax.text(middle - 1, 42.8, "weak view's CNN logits", ha="right", va="center")
    box(ax, middle - 4.5, 44.5, 9, 6, "softmax", DATA)
    arrow(ax, (middle + 4.5, 47.5), (76, 47.5), dashed=True)
    box(ax, 76, 44.5, 9, 6, "confident?\np \u2265 0.7", DATA)
    arrow(ax, (85, 47.5), (89, 47.5), dashed=True)
    box(ax, 89, 44.5, 10, 6, "pseudo\nlabel", DATA, weight="bold")
    arrow(ax, (94, 44.5), (94, 36), dashed=True)
    ax.text(93, 40.2, "target", ha="right", va="center")
    box(ax, 82.5, 26, 16.5, 10, "unlabelled loss\nstrong view,\nboth streams", INK)
    box(ax, 82.5, 11, 16.5, 10, "labelled loss\ncross-entropy with\nlabels, both streams", INK)
    for y in (31, 16):
        arrow(ax, (79, y), (82.5, y))
    total = "loss = labelled\n+ \u03bb \u00d7 unlabelled"
    ax.text(90.75, 6, total, ha="center", va="center", weight="bold", linespacing=1.4)


def main():
    """Write method.png beside this script."""
    plt.rcParams.update({"font.size": 9.5, "text.color": INK})
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=DPI)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    for draw in (draw_inputs, draw_network, draw_losses):
        draw(ax)
    figure.savefig(Path(__file__).with_name("method.png"))


if __name__ == "__main__":
    main()
