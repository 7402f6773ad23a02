"""The README's pictures. Needs matplotlib.

    python extras/figures.py --run runs/tiny-mae_base   (of tinymim.py: method.svg and relations.png)
    python extras/figures.py --speed speed.json         (of extras/benchmark.py --json: speed.svg)
    python extras/figures.py --results results.json     (of extras/study.py, its T8: results.png)

--data: a folder of images, instead of the run's own. --out: for the pictures (default: assets).
"""

import argparse
import json
import os
import sys
from statistics import mean, stdev

import torch
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from data import of_seeds
from study import ROWS

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")

BLUE, ORANGE, GRAY = "#2563a8", "#e07b16", "#d0d0d0"
plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "image.cmap": "magma",
                     "savefig.dpi": 200, "svg.hashsalt": "tinymim"})

def load_run(folder, data):
    """uint8 crops (4, 3, H, W), the objective as it was before training, the student after it."""
    checkpoint = os.path.join(folder, "last.pth")
    args = argparse.Namespace(**torch.load(checkpoint, map_location="cpu", weights_only=True)["args"])
    torch.manual_seed(args.seed)  # as in tinymim.setup
    objective, student = tinymim.build(args).eval(), tinymim.load_teacher(checkpoint)
    data = data or args.data
    paths = tinymim.find_images(tinymim.imagenette() if data == "imagenette" else data)
    crop = v2.Compose([v2.Resize(student.img_size), v2.CenterCrop(student.img_size)])
    crops = [crop(tinymim.decode(os.fsdecode(path))) for path in paths[::len(paths) // 4 or 1][:4]]
    return torch.stack(crops), objective, student

@torch.no_grad()
def relation_maps(objective, network, images):
    """{pair: relations (B, N, N), the mean over heads} of images (B, 3, H, W) in [0, 1]."""
    block = objective.teacher_block if network is objective.teacher else network.depth
    qkv = dict(zip("qkv", network.qkv(tinymim.normalize(images), block)))
    return {f"{a}-{b}": tinymim.relation(qkv[a], qkv[b], objective.relation_heads).exp().mean(dim=1)
            for a, b in objective.pairs}

def draw_relations(crops, objective, student, path):
    """How each crop's middle patch relates to all. White: the strongest in three maps, itself left out."""
    networks = {"teacher": objective.teacher, "student before": objective.student, "student after": student}
    maps = {name: relation_maps(objective, network, crops / 255) for name, network in networks.items()}
    grid, width, height = student.grid, 1 + 3.2 * len(objective.pairs), len(crops) + 0.4  # in crops
    figure = plt.figure(figsize=(9, 9 * height / width))
    for row, crop in enumerate(crops):
        shown = [(0, "", crop.permute(1, 2, 0), None)]
        for i, pair in enumerate(maps["teacher"]):
            heats = [maps[name][pair][row, 1:, 1:] for name in networks]  # without the class token
            heats = [heat[(grid + 1) * (grid // 2)].unflatten(0, (grid, grid)) for heat in heats]
            brightest = max(heat.flatten().topk(2).values[1] for heat in heats)
            shown += [(1.2 + 3.2 * i + j, f"{pair}\n{name}", heats[j], brightest)
                      for j, name in enumerate(networks)]
        for x, title, image, brightest in shown:
            place = x / width, (len(crops) - 1 - row) / height, 0.96 / width, 0.96 / height
            axes = figure.add_axes(place, xticks=[], yticks=[], frame_on=False, title=title * (row == 0))
            axes.imshow(image, vmin=0, vmax=brightest, extent=(0, grid, grid, 0),
                        interpolation="nearest" if title else "bicubic")
            axes.add_patch(plt.Rectangle((grid // 2, grid // 2), 1, 1, fill=False, color="red"))
    figure.savefig(path)

def draw_method(crops, objective, path):
    """The method at a glance, with the first crop's relations in these networks, from 0 (black) to 6 / N."""
    figure = plt.figure(figsize=(9, 3.4))
    canvas = figure.add_axes([0, 0, 1, 1], xlim=(0, 9), ylim=(0, 3.4))  # in inches
    canvas.axis("off")

    def arrow(*points):
        canvas.plot(*zip(*points[:-1]), color="black", linewidth=1)
        canvas.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", fc="black", shrinkA=0))

    def inset(x, y, image, vmax=None, **labels):
        axes = figure.add_axes([x / 9, y / 3.4 - 0.124, 0.0936, 0.248], xticks=[], yticks=[], **labels)
        axes.imshow(image, vmin=0, vmax=vmax, interpolation="nearest" if vmax else "bicubic")

    jitter = tinymim.color_jitter(crops[:1] / 255, torch.tensor([[0, 1, 2]]), torch.tensor([[1.3, 0.7, 0.6]]))
    for network, image, title, y, depth, last, height, color in (
            (objective.teacher, crops[:1] / 255, "teacher: MAE's ViT-L, frozen", 2.55, 24, 17, 0.84, BLUE),
            (objective.student, jitter, "student: new ViT-T", 0.75, 12, 11, 0.56, ORANGE)):
        x, bottom = [1.35 + 0.125 * i for i in range(depth)], y - height / 2
        inset(0.1, y, image[0].permute(1, 2, 0))
        arrow((0.98, y), (1.27, y))
        canvas.text(1.3, y + height / 2 + 0.1, title)
        canvas.bar(x[:last], height, 0.09, bottom, color=GRAY, edgecolor="black")
        canvas.bar(x[last:], height, 0.09, bottom, color="white", edgecolor="black", linestyle=":")
        canvas.bar(x[last], height / 3, 0.09, bottom, color=color, edgecolor="black")
        canvas.text(x[last] - 0.1, bottom - 0.22, f"only q, k, v of block {last + 1}", ha="right")
        arrow((x[last], bottom), (x[last], bottom - 0.18), (4.45, bottom - 0.18), (4.45, y), (4.7, y))
        canvas.text(5.2, y, "softmax\n$a\\,b^\\top/\\sqrt{D/h}$", ha="center", va="center", fontsize=9)
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

def draw_bars(panels, path):
    """Horizontal bars, a panel for each {title: {name: values}}: their mean and standard deviation."""
    rows = [len(bars) for bars in panels.values()]
    figure, axes = plt.subplots(len(rows), figsize=(8, 0.25 * sum(rows) + 0.3 * len(rows)), squeeze=False,
                                layout="constrained", height_ratios=rows)
    for cell, (title, bars) in zip(axes.flat, panels.items()):
        for name, values in reversed(bars.items()):
            error = stdev(values) if len(values) > 1 else None
            color = BLUE if name.startswith(("tinymim.py", "relation")) else GRAY
            label = f"{mean(values):.1f} ± {error:.1f}" if error else f"{mean(values):.3g}"
            cell.bar_label(cell.barh(name, mean(values), 0.7, xerr=error, color=color), [label], padding=4)
        cell.set(xticks=[], xlim=(0, 1.15 * max(map(mean, bars.values()))), frame_on=False)
        cell.set_title(title, loc="left")
    figure.savefig(path, metadata={"Date": None})

def draw(args):
    os.makedirs(args.out, exist_ok=True)
    if args.run:
        crops, objective, student = load_run(args.run, args.data)
        draw_relations(crops, objective, student, os.path.join(args.out, "relations.png"))
        draw_method(crops, objective, os.path.join(args.out, "method.svg"))
    if args.speed:
        speed = json.load(open(args.speed))
        columns = {"pipeline": "images/s, 1 worker", "step": "images/s", "end to end": "images/s"}
        where = speed["machine"]["GPU"] or speed["machine"]["processor"]
        panels = {f"{key}: {column}, {where}": {next(iter(row.values())): [row[column]] for row in speed[key]}
                  for key, column in columns.items()}
        draw_bars(panels, os.path.join(args.out, "speed.svg"))
    if args.results:
        found, panels = json.load(open(args.results)), {}
        for labels, title in (("few", "a tenth of the labels"), ("all", "all labels")):
            bars = {row: of_seeds(found, labels, spec) for table, row, spec, _ in ROWS if table == "T8"}
            bars = {row: values for row, values in bars.items() if values}
            panels |= {f"top-1 (%), {title}": bars} if bars else {}
        draw_bars(panels, os.path.join(args.out, "results.png"))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("run", "speed", "results", "data", "out"):
        parser.add_argument(f"--{name}", default="assets" if name == "out" else None)
    tinymim.run(parser, parser.parse_args(argv), draw)

if __name__ == "__main__":
    main()
