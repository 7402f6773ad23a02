"""The README's pictures, drawn from the demo's run and from what benchmark.py measured. Needs matplotlib.

    python extras/demo.py
    python extras/benchmark.py --data /path/to/images --json > speed.json
    python extras/figures.py --demo runs/demo             (assets/method.svg and assets/relations.png)
    python extras/figures.py --speed speed.json           (assets/speed.svg)
"""

import argparse
import copy
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tinymim  # the first: it says what is not installed

import numpy as np
import torch

try:
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
except ImportError:
    sys.exit(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")

BLUE, ORANGE = "#1f77b4", "#ff7f0e"
PAIRS = ("qq", "kk", "vv")


def load_demo(folder):
    """Of the demo's first seed: pictures (uint8), {name: (network, block)} of teacher and student as it began and ended, relation heads."""
    tensors, _, checkpoint = tinymim.read_checkpoint(os.path.join(folder, "seed0", "distilled", "last.pth"))
    args = argparse.Namespace(**checkpoint["args"] | {"teacher": os.path.join(ROOT, "assets", "shapes_teacher.pth")})
    objective, _ = tinymim.build(args, tinymim.start(args))  # as it was before the first step
    before, teacher = objective.eval().student, objective.teacher
    after = copy.deepcopy(before)
    after.load_state_dict(tensors)
    pictures = tinymim.preview(tinymim.find_images(os.path.join(folder, "pictures", "labelled", "val")), teacher.img_size, count=8)
    networks = {"teacher": (teacher, objective.teacher_block), "student before": (before, before.depth), "student after": (after, after.depth)}
    return pictures, networks, objective.relation_heads


@torch.no_grad()
def relations(network, block, pictures, heads):
    """{pair: (B, N, N)}: relations of patches, the mean over heads, without the class token."""
    qkv = dict(zip("qkv", network.qkv(tinymim.Normalize()(pictures / 255), block)))
    return {a + b: tinymim.relation(qkv[a], qkv[b], heads).exp().mean(1)[:, 1:, 1:].numpy() for a, b in PAIRS}


def draw_relations(demo, path):
    """Which patches the middle one relates to, in the teacher and in the student before and after distillation."""
    pictures, networks, heads = demo
    maps = {name: relations(network, block, pictures, heads) for name, (network, block) in networks.items()}
    grid = networks["teacher"][0].img_size // networks["teacher"][0].patch_size
    figure, axes = plt.subplots(4, 10, figsize=(9.6, 4.3), gridspec_kw=dict(wspace=0.06, hspace=0.06), dpi=110)
    for row, picture in enumerate(pictures[:4]):
        x = y = grid // 2
        query = y * grid + x
        axes[row, 0].imshow(picture.permute(1, 2, 0))
        side = picture.shape[1] / grid
        axes[row, 0].add_patch(plt.Rectangle((x * side, y * side), side, side, fill=False, color="red", linewidth=2))
        for i, pair in enumerate(PAIRS):
            for cell, name in zip(axes[row, 1 + 3 * i:], maps):
                heat = maps[name][pair][row, query].copy()
                heat[query] = np.nan
                cell.imshow(heat.reshape(grid, grid), cmap="magma", vmin=0)
                cell.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="red", linewidth=1.5))
                if row == 0:
                    cell.set_title(name.replace(" ", "\n"), fontsize=8)
                    if name == "student before":
                        cell.text(grid / 2 - 0.5, -4.2, f"{pair[0]}-{pair[1]} relations", ha="center", fontsize=10)
    for cell in axes.flat:
        cell.set_xticks([])
        cell.set_yticks([])
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def draw_method(demo, path):
    """The method at a glance, with real relations: of the demo's teacher and student, for one picture."""
    pictures, networks, heads = demo
    figure = plt.figure(figsize=(10, 4.1))
    canvas = figure.add_axes([0, 0, 1, 1])
    canvas.set_xlim(0, 10)
    canvas.set_ylim(0, 4.1)
    canvas.axis("off")

    def box(x, y, width, height, color, text="", **style):
        canvas.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.05", facecolor=color,
                                        edgecolor="black", linewidth=0.8, **style))
        canvas.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start, end):
        canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="black", linewidth=1))

    picture = figure.add_axes([0.012, 0.38, 0.1, 0.24])
    picture.imshow(pictures[0].permute(1, 2, 0))
    picture.axis("off")
    canvas.text(0.62, 1.38, "one crop", ha="center", fontsize=9)
    rows = {"teacher": (2.75, 12, 9, BLUE), "student before": (0.45, 6, 6, ORANGE)}  # y, half the blocks, the one that is matched
    for name, (y, count, matched, color) in rows.items():
        height = 0.9 if name == "teacher" else 0.6
        middle = y + height / 2
        for i in range(count):
            used = i < matched
            face = color if i == matched - 1 else "#eeeeee" if used else "white"
            box(1.75 + 0.21 * i, y, 0.13, height, face, alpha=1 if used else 0.35, linestyle="-" if used else ":")
        arrow((1.15, 2.3 if name == "teacher" else 1.8), (1.7, middle))
        if name == "teacher":
            canvas.text(1.75, y + height + 0.13, "teacher: ViT-L, pre-trained by MAE, frozen", fontsize=9)
            canvas.text(1.75 + 0.21 * 8 + 0.065, y - 0.1, "block 18 of 24", fontsize=9, ha="center", va="top")
            canvas.text(1.28, middle - 0.25, "clean", fontsize=9, ha="center")
        else:
            canvas.text(1.75, y + height + 0.13, "student: ViT-T, from scratch", fontsize=9)
            canvas.text(1.75 + 0.21 * 5 + 0.065, y - 0.1, "its last block", fontsize=9, ha="center", va="top")
            canvas.text(1.3, middle - 0.33, "colours\nchanged", fontsize=9, ha="center")
        network, block = networks[name]
        maps = relations(network, block, pictures[:1], heads)
        from_x = 1.75 + 0.21 * (matched - 1) + 0.13
        arrow((from_x + 0.03, middle), (4.52, middle))
        for i, letter in enumerate("qkv"):
            box(4.55, middle + 0.36 - 0.36 * i - 0.14, 0.36, 0.26, "white", letter)
            arrow((4.95, middle + 0.36 - 0.36 * i), (5.3, middle + 0.1 - 0.1 * i))
        canvas.text(5.72, middle, "softmax\nof products", fontsize=9, ha="center", va="center")
        arrow((6.14, middle), (6.5, middle))
        for i, pair in enumerate(PAIRS):
            axes, matrix = figure.add_axes([0.655 + 0.113 * i, (middle - 0.5) / 4.1, 0.1, 0.244]), maps[pair][0]
            others = ~np.eye(len(matrix), dtype=bool)  # to itself a patch relates far more
            axes.imshow(matrix, cmap="magma", vmin=0, vmax=matrix[others].max())
            axes.axis("off")
            if name == "teacher":
                canvas.text(7.05 + 1.13 * i, middle + 0.62, f"{pair[0]}-{pair[1]} relations", fontsize=10, ha="center")
            else:
                canvas.annotate("", (7.05 + 1.13 * i, 1.32), (7.05 + 1.13 * i, 2.62), arrowprops=dict(arrowstyle="<|-", color="black"))
                canvas.text(7.12 + 1.13 * i, 1.97, "KL", fontsize=10, weight="bold", va="center")
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def draw_speed(result, path):
    """What benchmark.py measured, as bars: images/s of pipelines, of training steps, and end to end."""
    machine = result["machine"]
    groups = {
        "images/s that one worker decodes and crops": {row["pipeline"]: row["images/s, 1 worker"] for row in result["pipeline"]},
        f"images/s of the training step, {result['options']['student']} from {result['options']['teacher']}":
            {row["variant"]: row["images/s"] for row in result["step"]},
        "images/s of training from files": {row["variant"]: row["images/s"] for row in result["end to end"]},
    }
    figure, axes = plt.subplots(3, 1, figsize=(8, 4.6), gridspec_kw=dict(height_ratios=[len(bars) for bars in groups.values()], hspace=0.55))
    for panel, (title, bars) in zip(axes, groups.items()):
        colors = [ORANGE if name.startswith("usual") else BLUE for name in bars]
        drawn = panel.barh(list(bars), list(bars.values()), color=colors, height=0.7)
        panel.bar_label(drawn, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in bars.values()], padding=4, fontsize=9)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xticks([])
        panel.tick_params(left=False)
        panel.set_xlim(0, 1.12 * max(bars.values()))
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    where = machine["GPU"] or f"{machine['cores']} cores of {machine['processor']}, no GPU"
    figure.text(0.99, 0.01, f"{where}, torch {machine['torch'].split('+')[0]}", ha="right", fontsize=8)
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})


def main(argv=None):
    parser = tinymim.Parser("figures.py", "Draw the README's pictures.")
    parser.add_argument("--demo", metavar="FOLDER", help="results of extras/demo.py: draws method.svg and relations.png")
    parser.add_argument("--speed", metavar="FILE", help="what extras/benchmark.py --json printed: draws speed.svg")
    parser.add_argument("--out", default=os.path.join(ROOT, "assets"), metavar="FOLDER", help="default: assets/")
    args = parser.parse_args(argv)
    if not args.demo and not args.speed:
        parser.error("nothing to draw: --demo, --speed, or both")
    plt.rcParams["svg.hashsalt"] = "tinymim"  # the same figure makes the same file
    try:
        os.makedirs(args.out, exist_ok=True)
        if args.demo:
            demo = load_demo(args.demo)
            draw_method(demo, os.path.join(args.out, "method.svg"))
            draw_relations(demo, os.path.join(args.out, "relations.png"))
        if args.speed:
            with open(args.speed) as file:
                draw_speed(json.load(file), os.path.join(args.out, "speed.svg"))
    except (OSError, json.JSONDecodeError, KeyError, tinymim.UserError) as error:
        sys.exit(f"figures.py: error: {error}")


if __name__ == "__main__":
    main()
