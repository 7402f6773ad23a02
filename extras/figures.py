"""Pictures of what is learnt, and of the README. Needs matplotlib.

    python extras/figures.py --run runs/tiny            (relations.png; --method: the README's, too)
    python extras/figures.py --log runs/tiny runs/x     (curves.png: loss and accuracy over epochs)
    python extras/figures.py --results results.json     (of extras/study.py: lengths.svg)

They are written beside what they show, or to --out. --data: photos for --run, instead of its own.
"""

import argparse
import json
import os
import sys
from statistics import mean, stdev

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from data import load_run, middle_row, of_seeds, relation_maps
from rows import CURVES, LENGTHS

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")

BLUE, ORANGE, GRAY = "#2563a8", "#e07b16", "#d0d0d0"
plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "image.cmap": "magma",
                     "savefig.dpi": 200, "svg.hashsalt": "tinymim"})

def draw_relations(crops, objective, networks, path):
    """How each crop's middle patch relates to the others. White: the strongest in three maps."""
    maps = {name: relation_maps(objective, vit, crops / 255) for name, vit in networks.items()}
    grid = objective.student.grid
    width, height = 1 + 3.2 * len(objective.pairs), len(crops) + 0.4  # in crops
    figure = plt.figure(figsize=(9, 9 * height / width))
    for row, crop in enumerate(crops):
        shown = [(0, "", crop.permute(1, 2, 0), None)]
        for i, pair in enumerate(maps["teacher"]):
            heats = [middle_row(maps[name][pair], grid)[row] for name in networks]
            brightest = max(heat.max() for heat in heats)
            shown += [(1.2 + 3.2 * i + j, f"{pair}\n{name}", heats[j], brightest)
                      for j, name in enumerate(networks)]
        for x, title, image, brightest in shown:
            place = x / width, (len(crops) - 1 - row) / height, 0.96 / width, 0.96 / height
            title = title if row == 0 else ""
            axes = figure.add_axes(place, xticks=[], yticks=[], frame_on=False, title=title)
            axes.imshow(image, vmin=0, vmax=brightest, extent=(0, grid, grid, 0),
                        interpolation="nearest" if brightest else "bicubic")
            axes.add_patch(plt.Rectangle((grid // 2, grid // 2), 1, 1, fill=False, color="red"))
    figure.savefig(path)

def draw_method(crops, objective, path):
    """The method at a glance, with the first crop's relations, from 0 (black) to 6 / N."""
    figure = plt.figure(figsize=(9, 3.4))
    canvas = figure.add_axes([0, 0, 1, 1], xlim=(0, 9), ylim=(0, 3.4))  # in inches
    canvas.axis("off")

    def arrow(*points):
        canvas.plot(*zip(*points[:-1]), color="black", linewidth=1)
        style = dict(arrowstyle="-|>", fc="black", shrinkA=0)
        canvas.annotate("", points[-1], points[-2], arrowprops=style)

    def inset(x, y, image, vmax=None, **labels):
        place = [x / 9, y / 3.4 - 0.124, 0.0936, 0.248]
        axes = figure.add_axes(place, xticks=[], yticks=[], **labels)
        axes.imshow(image, vmin=0, vmax=vmax, interpolation="nearest" if vmax else "bicubic")

    order, factors = torch.tensor([[0, 1, 2]]), torch.tensor([[1.3, 0.7, 0.6]])
    jitter = tinymim.color_jitter(crops[:1] / 255, order, factors)
    for network, image, title, y, depth, last, height, color in (
            (objective.teacher, crops[:1] / 255, "teacher: MAE's ViT-L, frozen", 2.55, 24, 17, 0.84,
             BLUE), (objective.student, jitter, "student: new ViT-T", 0.75, 12, 11, 0.56, ORANGE)):
        x, bottom = [1.35 + 0.125 * i for i in range(depth)], y - height / 2
        inset(0.1, y, image[0].permute(1, 2, 0))
        arrow((0.98, y), (1.27, y))
        canvas.text(1.3, y + height / 2 + 0.1, title)
        canvas.bar(x[:last], height, 0.09, bottom, color=GRAY, edgecolor="black")
        canvas.bar(x[last:], height, 0.09, bottom, color="white", edgecolor="black", linestyle=":")
        canvas.bar(x[last], height / 3, 0.09, bottom, color=color, edgecolor="black")
        canvas.text(x[last] - 0.1, bottom - 0.22, f"only q, k, v of block {last + 1}", ha="right")
        corner = bottom - 0.18
        arrow((x[last], bottom), (x[last], corner), (4.45, corner), (4.45, y), (4.7, y))
        formula = "softmax\n$a\\,b^\\top/\\sqrt{D/h}$"
        canvas.text(5.2, y, formula, ha="center", va="center", fontsize=9)
        arrow((5.7, y), (5.95, y))
        for i, (pair, heat) in enumerate(relation_maps(objective, network, image).items()):
            inset(6.17 + 0.95 * i, y, heat[0], 6 / heat.shape[2], xlabel="token j",
                  ylabel="token i" * (i == 0), title=f"{pair} relations" * (y > 1))
    for i in range(len(objective.pairs)):
        arrow((6.59 + 0.95 * i, 1.92), (6.59 + 0.95 * i, 1.22))
        canvas.text(6.65 + 0.95 * i, 1.53, "KL")
    arrow((0.52, 2.1), (0.52, 1.2))
    canvas.text(0.6, 1.58, "colours\njittered")
    figure.savefig(path, metadata={"Date": None})

def draw_lengths(found, path):
    """Accuracy after fine-tuning against epochs of distillation: mean, deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    titles, most = {"few": "a tenth of the labels", "all": "all labels"}, 0
    for axes, (labels, title) in zip(panels, titles.items()):
        for (name, spec), color in zip(CURVES.items(), (BLUE, "#6aaed6", ORANGE, "gray")):
            tops = {epochs: list(of_seeds(found, labels, f"{spec} --epochs {epochs}").values())
                    for epochs in LENGTHS}
            tops = {epochs: values for epochs, values in tops.items() if values}
            errors = [stdev(values) if len(values) > 1 else float("nan")
                      for values in tops.values()]
            axes.errorbar(list(tops), [mean(values) for values in tops.values()], errors,
                          label=name if tops else None, color=color, marker="o", markersize=3,
                          capsize=2)
            most = max(most, len(tops))
        axes.set(xscale="log", xlabel="epochs of distillation", ylabel="top-1 (%)", title=title)
        axes.set_xticks(LENGTHS, LENGTHS)
        axes.minorticks_off()
        axes.legend()
    if most < 2:
        raise tinymim.UserError("no row has results of two lengths (study.py --tables length)")
    figure.savefig(path, metadata={"Date": None})

def draw_curves(folders, path):
    """log.jsonl of some runs: all losses, and accuracy if it was measured, over the epochs."""
    curves = {"loss": {}, "%": {}}
    for folder in folders:
        with open(os.path.join(folder, "log.jsonl")) as file:
            log = [json.loads(line) for line in file]
        if not log:
            raise tinymim.UserError(f"{folder}/log.jsonl is empty")
        for name in sorted((log[0].keys() | log[-1].keys()) - {"epoch", "lr", "images/s"}):
            points = [(record["epoch"], record[name]) for record in log if name in record]
            is_share = name in ("top1", "mIoU") or name.endswith("accuracy")
            curves["%" if is_share else "loss"][f"{folder}: {name}"] = points
    curves = {title: lines for title, lines in curves.items() if lines}
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False,
                                  layout="constrained")
    for axes, (title, lines) in zip(panels.flat, curves.items()):
        for label, points in lines.items():
            axes.plot(*zip(*points), label=label, marker="." if len(points) == 1 else None)
        axes.set(xlabel="epoch", ylabel=title)
        axes.legend(fontsize=6)
    figure.savefig(path)

def draw(args):
    out = args.out or args.run
    if out is None:
        out = args.log[0] if args.log else os.path.dirname(args.results) or "."
    os.makedirs(out, exist_ok=True)
    if args.run:
        crops, objective, networks = load_run(args.run, args.data)
        draw_relations(crops, objective, networks, os.path.join(out, "relations.png"))
        if args.method:  # its text is that of ViT-L and ViT-T
            draw_method(crops, objective, os.path.join(out, "method.svg"))
    if args.log:
        draw_curves(args.log, os.path.join(out, "curves.png"))
    if args.results:
        draw_lengths(json.load(open(args.results)), os.path.join(out, "lengths.svg"))
    print(f"drawn into {out}")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/figures.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for name in ("run", "results", "data", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--log", nargs="+", metavar="RUN")
    parser.add_argument("--method", action="store_true")
    args = parser.parse_args(argv)
    if not (args.run or args.log or args.results):
        parser.error("nothing to draw: --run, --log or --results")
    tinymim.run(parser, draw, args)

if __name__ == "__main__":
    main()
