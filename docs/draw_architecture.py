"""Draws docs/architecture.png, the rooms and who imports whom: python docs/draw_architecture.py

The arrows are the imports of the code, read anew; the places of the rooms are below. One unit of the canvas is
0.1 inch. The arrows are also written into the picture as text, so that a test can tell when it is out of date.
"""

import ast
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
DATA, METHOD, NETWORK, STATE, INK = "#6E6E6E", "#0072B2", "#D55E00", "#009E73", "#222222"  # Okabe and Ito, 2008
TINTS = {DATA: "#EEEEEE", METHOD: "#DCECF6", NETWORK: "#FBE6D9", STATE: "#DDF1EA", INK: "#FFFFFF"}
WIDTH, HEIGHT, DPI = 100, 56, 150
HUBS = ("semi_main", "utils")  # bars as wide as the canvas
PROGRAMS = {"semi_main": "o", "predict": "s", "hubconf": "^"}  # marks in the rooms they import, instead of arrows
ROOMS = {  # name: left edge, lower edge, width, what it is for, colour
    "run_with_submitit": (1, 50, 23, "the same run as a Slurm job", INK),
    "predict": (25.5, 50, 18, "images to classes", INK),
    "hubconf": (45.5, 50, 13, "torch.hub", INK),
    "options": (61, 50, 15, "every flag", INK),
    "optimization": (78, 50, 21, "AdamW, schedule, amp", INK),
    "semi_main": (1, 42, 98, "builds everything from the flags, then the epoch loop", INK),
    "datasets": (3, 32, 20, "which images", DATA),
    "cifar": (3, 25, 9.3, "", DATA),
    "fashion": (13.7, 25, 9.3, "", DATA),
    "readers": (3, 18, 20, "files to lists", DATA),
    "images": (3, 11, 20, "one file, decoded", DATA),
    "transforms": (25.5, 32, 13, "the views", DATA),
    "randaugment": (25.5, 25, 13, "", DATA),
    "loading": (41.5, 32, 11.5, "batches", DATA),
    "samplers": (41.5, 25, 11.5, "orders", DATA),
    "engine": (57, 32, 15, "the step", METHOD),
    "pseudo_labels": (57, 25, 15, "the idea", METHOD),
    "losses": (57, 18, 15, "the objective", METHOD),
    "models": (57, 11, 15, "the networks", NETWORK),
    "pretrained": (41.5, 11, 11.5, "from a file", NETWORK),
    "output_folder": (77.5, 32, 13.5, "files of a run", STATE),
    "starts": (91.8, 32, 7.2, "", STATE),
    "checkpoint": (77.5, 25, 21.5, "what survives", STATE),
    "curves": (77.5, 13, 9.7, "", STATE),
    "report": (89.3, 13, 9.7, "", STATE),
    "utils": (1, 1, 98, "process group, seeds, meters, log", INK),
}
TALL = 5
WAYS = {  # arrows that go round something: points from start to end
    ("datasets", "readers"): [(13, 32), (13, 23)],
    ("datasets", "images"): [(3, 34.5), (1.3, 34.5), (1.3, 13.5), (3, 13.5)],
    ("datasets", "transforms"): [(23, 34.5), (25.5, 34.5)],
    ("loading", "transforms"): [(41.5, 34.5), (38.5, 34.5)],
    ("loading", "images"): [(41.5, 33), (40.5, 33), (40.5, 12.5), (23, 12.5)],
    ("loading", "utils"): [(53, 34.5), (54.5, 34.5), (54.5, 6)],
    ("pretrained", "transforms"): [(41.5, 14.5), (39.6, 14.5), (39.6, 33), (38.5, 33)],
    ("pretrained", "models"): [(53, 13.5), (57, 13.5)],
    ("pretrained", "checkpoint"): [(47.25, 11), (47.25, 8.5), (76, 8.5), (76, 27.5), (77.5, 27.5)],
    ("engine", "losses"): [(57, 33.5), (55.6, 33.5), (55.6, 20.5), (57, 20.5)],
    ("engine", "utils"): [(72, 34.5), (73.5, 34.5), (73.5, 6)],
    ("output_folder", "utils"): [(77.5, 34.5), (74.8, 34.5), (74.8, 6)],
    ("starts", "utils"): [(99, 34.5), (99.6, 34.5), (99.6, 8), (98, 8), (98, 6)],
}


def imports():
    """{(importing room, imported room)} of the Python files on the top level and of the package models."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]
    names = {path: "models" if path.parent.name == "models" else path.stem for path in files}
    found = set()
    for path, name in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {(name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((name, node.module.split(".")[0]))
    return {(a, b) for a, b in found if a != b and b in names.values()}


def middle(name):
    """The middle of a room's lower edge, x and y."""
    x, y, width = ROOMS[name][:3]
    return x + width / 2, y


def box(ax, name, marks):
    """A room: its name, below it what it is for, and on its edge the marks of the programs that import it."""
    x, y, width, text, colour = ROOMS[name]
    shape = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((x, y), width, TALL, shape, fc=TINTS[colour], ec=colour, lw=1.4))
    if name in HUBS:
        title = name.replace("_", r"\_")
        ax.text(x + width / 2, y + TALL / 2, rf"$\bf{{{title}}}$   {text}", ha="center", va="center")
    else:
        ax.text(x + width / 2, y + (3.4 if text else 2.5), name, ha="center", va="center", weight="bold")
        ax.text(x + width / 2, y + 1.4, text, ha="center", va="center")
    if name in PROGRAMS:
        ax.plot([x + 1.5], [y + TALL / 2], PROGRAMS[name], color=INK, ms=7)
    for i, mark in enumerate(marks):
        ax.plot([x + 1.2 + 1.3 * i], [y + TALL], mark, color=INK, ms=5)


def arrow(ax, points, colour):
    """A line through the points with a head at its end."""
    ax.plot(*zip(*points), color=colour, lw=1.4, solid_capstyle="butt", solid_joinstyle="round")
    head = {"arrowstyle": "-|>,head_length=0.45,head_width=0.2", "shrinkA": 0, "shrinkB": 0, "color": colour}
    (x0, y0), (x1, y1) = points[-2:]
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    ax.annotate("", (x1, y1), (x1 - (x1 - x0) / length, y1 - (y1 - y0) / length), arrowprops={**head, "lw": 1})


def draw(ax, arrows):
    """All rooms and arrows; those of the programs are marks in the rooms they import, or nothing else could be seen."""
    there = {name for pair in arrows for name in pair}
    for a, b in sorted(arrows):
        if a in PROGRAMS:
            continue
        (x, y), (end, below) = middle(a), middle(b)
        if b in HUBS or a in ("cifar", "fashion"):
            end = x
        arrow(ax, WAYS.get((a, b), [(x, y), (end, below + TALL)]), ROOMS[a][4])
    for name in filter(there.__contains__, ROOMS):
        box(ax, name, [mark for program, mark in PROGRAMS.items() if (program, name) in arrows])
    words = {"o": "imported by semi_main", "s": "by predict", "^": "by hubconf"}
    for x, program in zip((26, 51, 67), filter(there.__contains__, PROGRAMS)):
        ax.plot([x], [39.6], PROGRAMS[program], color=INK, ms=5)
        ax.text(x + 1.2, 39.6, words[PROGRAMS[program]], va="center")


def main():
    """Writes architecture.png beside this script; exits with a sentence where a room has no place in it."""
    arrows = imports()
    if homeless := {name for pair in arrows for name in pair} - set(ROOMS):
        sys.exit(f"draw_architecture.py: error: give {', '.join(sorted(homeless))} a place in ROOMS.")
    plt.rcParams.update({"font.size": 9.5, "text.color": INK})
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=DPI)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    draw(ax, arrows)
    figure.savefig(Path(__file__).with_name("architecture.png"), metadata={"arrows": json.dumps(sorted(arrows))})


if __name__ == "__main__":
    main()
