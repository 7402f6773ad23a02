"""Pictures of what is learnt, and of the README. Needs matplotlib.

    python extras/figures.py --run runs/tiny            (relations.png; --method: the README's, too)
    python extras/figures.py --log runs/tiny runs/x     (curves.png: loss and accuracy over epochs)

They are written into the run, or the first of them. --data: photos for --run, instead of its own.
"""

import argparse
import json
import os
import sys

import torch
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import UserError

def load_run(folder, photos=None):
    """Of a run of tinymim.py: the middles of four of its photos (or of others), uint8 (4, 3, H, W),
    TinyMIM as it was before training, and the networks to compare, by name."""
    checkpoint = os.path.join(folder, "last.pth")
    student = tinymim.load_teacher(checkpoint)
    saved = tinymim.load_file(checkpoint).get("args", {})
    if "relations" not in saved or saved["relation_heads"] is None:
        raise UserError(f"{folder} has not learnt relations (--log draws the curves of any run)")
    args = argparse.Namespace(**saved)
    objective = tinymim.by_options(tinymim.build, args).eval()
    paths = tinymim.find_images(tinymim.image_folder(photos or args.data, "train"))
    settings = tinymim.settings_of(args, objective, paths)
    if settings["teacher_checksum"] != saved.get("teacher_checksum"):
        raise UserError(f"{args.teacher} is no longer the teacher of {folder}")
    middle = v2.Compose([v2.Resize(student.img_size), v2.CenterCrop(student.img_size)])
    chosen = paths[::len(paths) // 4 or 1][:4]
    crops = torch.stack([middle(tinymim.decode(os.fsdecode(path))) for path in chosen])
    return crops, objective, {"teacher": objective.teacher, "student before": objective.student,
                              "student after": student}

@torch.no_grad()
def relation_maps(objective, network, images):
    """{pair: relations (B, N, N), the mean over heads} of images (B, 3, H, W) in [0, 1]."""
    block = objective.teacher_block if network is objective.teacher else network.depth
    qkv = dict(zip("qkv", network.qkv_at(tinymim.normalize(images), block)))
    heads = objective.relation_heads
    return {f"{a}-{b}": tinymim.log_relation(qkv[a], qkv[b], heads).exp().mean(dim=1)
            for a, b in objective.pairs}

def middle_row(relation, grid):
    """How the patch in the middle relates to all: of relations (B, N, N), (B, grid, grid)."""
    middle = (grid + 1) * (grid // 2)
    heat = relation[:, 1 + middle, 1:].clone()  # without the class token
    heat[:, middle] = 0  # to itself it relates far more strongly: black
    return heat.unflatten(1, (grid, grid))

def draw_relations(plt, crops, objective, networks):
    """How the middle patch of each crop relates to the others by v-v (or the first pair), and that
    of the first crop by another pair. White: the strongest in the three maps of a row."""
    maps = {name: relation_maps(objective, vit, crops / 255) for name, vit in networks.items()}
    grid, pairs = objective.student.grid, sorted(maps["teacher"], key=lambda pair: pair != "v-v")
    rows = [(pairs[0], i) for i in range(len(crops))] + [(pair, 0) for pair in pairs[1:2]]
    figure, panels = plt.subplots(len(rows), 4, figsize=(5.6, 1.4 * len(rows)), squeeze=False)
    for (pair, i), axes in zip(rows, panels):
        heats = [middle_row(of_pair[pair], grid)[i] for of_pair in maps.values()]
        brightest = max(heat.max() for heat in heats)
        for ax, image in zip(axes, (crops[i].permute(1, 2, 0), *heats)):
            ax.imshow(image.numpy(), vmin=0, vmax=brightest, extent=(0, grid, grid, 0))
            ax.add_patch(plt.Rectangle((grid // 2, grid // 2), 1, 1, fill=False, color="red"))
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(pair, rotation=0, ha="right", va="center")
    for ax, title in zip(panels[0], ("photo", *networks)):
        ax.set_title(title)
    return figure

def draw_method(plt, crops, objective):
    """The method at a glance, with the first crop's relations, from 0 (black) to 6 / N."""
    figure = plt.figure(figsize=(9, 4), layout="none")
    canvas = figure.add_axes([0, 0, 1, 1], xlim=(0, 9), ylim=(0, 4))  # in inches
    canvas.axis("off")
    style = dict(arrowstyle="-|>", fc="black", shrinkA=0)

    def inset(x, y, image, vmax=None, **labels):
        place = [x / 9, (y - 0.42) / 4, 0.84 / 9, 0.84 / 4]
        axes = figure.add_axes(place, xticks=[], yticks=[], **labels)
        axes.imshow(image.numpy(), vmin=0, vmax=vmax)

    def blocks(x, y, height, color="white", line=":"):
        canvas.bar(x, height, 0.09, y - height / 2, color=color, edgecolor="black", linestyle=line)

    used, blue, orange = ("#d0d0d0", "-"), ("#2563a8", "-"), ("#e07b16", "-")
    photo, order = crops[:1] / 255, torch.tensor([[0, 1, 2]])
    jittered = tinymim.color_jitter(photo, order, torch.tensor([[1.3, 0.7, 0.6]]))
    for vit, image, title, y, depth, last, color in (
            (objective.teacher, photo, "teacher: MAE's ViT-L, frozen", 3.1, 24, 17, blue),
            (objective.student, jittered, "student: new ViT-T", 0.9, 12, 11, orange)):
        x = [1.35 + 0.125 * i for i in range(depth)]
        inset(0.1, y, image[0].permute(1, 2, 0))
        canvas.text(1.3, y + 0.5, title)
        blocks(x[:last], y, 0.8, *used)
        blocks(x[last:], y, 0.8)
        blocks(x[last], y, 0.27, *color)
        canvas.plot([x[last], x[last], 4.45, 4.45], [y - 0.4, y - 0.6, y - 0.6, y], "k", lw=1)
        canvas.text(5.2, y, "softmax\n$a\\,b^\\top/\\sqrt{D/h}$", ha="center", va="center")
        for start, end in (0.98, 1.27), (4.45, 4.65), (5.78, 6.0):
            canvas.annotate("", (end, y), (start, y), arrowprops=style)
        for i, (pair, heat) in enumerate(relation_maps(objective, vit, image).items()):
            inset(6.22 + 0.94 * i, y, heat[0], 6 / heat.shape[2], title=pair, xlabel="token j",
                  ylabel="token i" * (i == 0))
    for x in (6.64 + 0.94 * i for i in range(len(objective.pairs))):
        canvas.annotate("KL", (x, 1.55), (x, 2.15), ha="center", arrowprops=style)
    canvas.annotate("colours\njittered", (0.52, 1.4), (0.52, 2.15), ha="center", arrowprops=style)
    for i, (text, *kind) in enumerate((("a block that is used (the student's learn)", *used),
                                       ("not used",), ("q, k, v of this block", *blue))):
        blocks(1.85, 2.25 - 0.25 * i, 0.18, *kind)
        canvas.text(1.97, 2.25 - 0.25 * i, text, va="center", fontsize=9)
    return figure

def draw_curves(plt, folders):
    """All losses in log.jsonl of some runs, and accuracies if they were measured, by epoch."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4))
    for folder in folders:
        log_path = os.path.join(folder, "log.jsonl")
        with tinymim.explained(f"{log_path} is empty or no log"), open(log_path) as file:
            log = [json.loads(line) for line in file if line.strip()]
            for name in sorted({*log[0], *log[-1]} - {"epoch", "lr", "images/s"}):
                points = [(record["epoch"], record[name]) for record in log if name in record]
                is_share = name in ("top1", "mIoU") or name.endswith("accuracy")
                label = f"{name}, {folder}".replace("$", "\\$")  # in two of them is mathematics
                panels[int(is_share)].plot(*zip(*points), marker=".", label=label)
    for axes, title in zip(panels, ("loss", "%")):
        axes.set(xlabel="epoch", ylabel=title, visible=bool(axes.lines))
        axes.legend(handles=axes.lines, fontsize=7)
    return figure

def draw(args):
    try:
        import matplotlib.pyplot as plt  # here: demo.py, which needs some of the above, has none
    except ImportError:
        sys.exit(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "image.cmap": "magma",
                         "image.interpolation": "nearest", "savefig.dpi": 130,
                         "savefig.bbox": "tight", "svg.hashsalt": "tinymim",
                         "figure.constrained_layout.use": True})
    drawn = {}
    if args.run:
        crops, objective, networks = load_run(args.run, args.data)
        path = os.path.join(args.run, "relations.png")
        drawn[path] = draw_relations(plt, crops, objective, networks)
    if args.method:  # its text is that of ViT-L and ViT-T
        drawn[os.path.join(args.run, "method.svg")] = draw_method(plt, crops, objective)
    if args.log:
        drawn[os.path.join(args.log[0], "curves.png")] = draw_curves(plt, args.log)
    for path, figure in drawn.items():
        figure.savefig(path, metadata={"Date": None})  # the same file each time
        print(f"drawn: {path}")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/figures.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run")
    parser.add_argument("--data")
    parser.add_argument("--method", action="store_true")
    parser.add_argument("--log", nargs="+", metavar="RUN")
    args = parser.parse_args(argv)
    if not (args.run or args.log):
        parser.error("nothing to draw: --run or --log")
    if not args.run and (args.method or args.data):
        parser.error("--method and --data go with --run")
    tinymim.run(parser, draw, args)

if __name__ == "__main__":
    main()
