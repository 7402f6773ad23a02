"""The whole method in minutes, with no network and no GPU: distil a student, fine-tune it on few labels, compare with scratch.

    python extras/demo.py

Draws pictures of ten shapes (extras/shapes.py), takes the small MAE teacher of such pictures in assets/, and runs the real
tinymim.py and finetune.py on them: a student is distilled from the unlabelled pictures, then fine-tuned on the few labelled
ones; another starts the same fine-tuning from scratch. Prints a table and writes demo.png.
"""

import json
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tinymim  # the first: it says what is not installed

import torch
from PIL import Image, ImageDraw

import finetune
import shapes

TEACHER = os.path.join(ROOT, "assets", "shapes_teacher.pth")
PICTURES, LABELLED, VALIDATION = 12000, 2000, 1000  # how many pictures of all ten shapes together
CHANCE = 100 / len(shapes.SHAPES)  # percent
DISTIL = "--student nano --teacher-block 6 --epochs 2 --warmup-epochs 0.2 --batch-size 64 --blr 8e-3"
TUNE = "--epochs 10 --batch-size 32 --augment crop --crop-scale 0.5"
STARTS = {  # each with the learning rates that suit it best
    "distilled": "--checkpoint {student} --blr 2e-2 --layer-decay 0.5",
    "scratch": "--checkpoint none --student nano --patch-size 6 --img-size 36 --blr 5e-3 --layer-decay 1",
}


def draw_pictures(folder):
    """unlabelled/, and labelled/ with train/ and val/, unless an earlier demo has drawn them."""
    if not os.path.exists(os.path.join(folder, "drawn")):
        shapes.write(os.path.join(folder, "unlabelled"), PICTURES, seed=3)
        shapes.write(os.path.join(folder, "labelled", "train"), LABELLED, seed=4)
        shapes.write(os.path.join(folder, "labelled", "val"), VALIDATION, seed=5)
        open(os.path.join(folder, "drawn"), "w").close()


def compare(out, data, seed):
    """One seed: distil, fine-tune, and train from scratch; the top-1 of each after every epoch, {name: [percent]}."""
    labelled, same = os.path.join(data, "labelled"), ["--seed", str(seed), "--device", "cpu"]
    student = os.path.join(out, "distilled")
    print(f"\n1/3 (seed {seed}) Distil a student from {os.path.relpath(TEACHER)} on {PICTURES} pictures without labels.", flush=True)
    tinymim.main([*DISTIL.split(), *same, "--teacher", TEACHER, "--data", os.path.join(data, "unlabelled"), "--out", student])
    curves = {}
    for step, (name, start) in enumerate(STARTS.items()):
        what = "the distilled student" if name == "distilled" else "the same network from scratch"
        print(f"\n{step + 2}/3 (seed {seed}) Fine-tune {what} on {LABELLED} labelled pictures.", flush=True)
        folder = os.path.join(out, "finetune-" + name)
        start = [word.format(student=os.path.join(student, "last.pth")) for word in start.split()]
        finetune.main([*start, *TUNE.split(), *same, "--data", labelled, "--out", folder])
        with open(os.path.join(folder, "log.jsonl")) as log:
            curves[name] = [json.loads(line)["top1"] for line in log]
    return curves


def chart(results, width, height=260):
    """A picture of top-1 over the epochs, a line for each network and seed."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 60, width - 110, 30, height - 40
    epochs = len(results[0]["scratch"])
    highest = 10 * (int(max(max(curve) for curves in results for curve in curves.values())) // 10 + 1)

    def point(epoch, percent):
        return left + (right - left) * (epoch - 1) / (epochs - 1), bottom - (bottom - top) * percent / highest

    for percent in range(0, highest + 1, 10):
        draw.line([point(1, percent), point(epochs, percent)], fill="#dddddd")
        draw.text((left - 30, point(1, percent)[1] - 6), f"{percent}%", fill="black")
    draw.text((right + 8, point(1, CHANCE)[1] - 22), f"chance: {CHANCE:.0f}%", fill="#888888")
    for epoch in range(1, epochs + 1):
        draw.text((point(epoch, 0)[0] - 4, bottom + 6), str(epoch), fill="black")
    draw.text((right + 24, bottom + 6), "epoch", fill="black")
    title = f"right answers on {VALIDATION} new pictures, after each epoch of fine-tuning on {LABELLED} labelled ones"
    draw.text((left, 8), title, fill="black")
    for name, colour in (("distilled", "#1f77b4"), ("scratch", "#ff7f0e")):
        for curves in results:
            draw.line([point(i + 1, percent) for i, percent in enumerate(curves[name])], fill=colour, width=3)
        draw.text((right + 8, point(1, results[0][name][-1])[1] - 6), name, fill=colour)
    return picture


def demo(args):
    """Draw, distil, fine-tune, compare, for each seed; then print the table and write demo.png."""
    began, data = time.time(), os.path.join(args.out, "pictures")
    draw_pictures(data)
    results = [compare(os.path.join(args.out, f"seed{seed}"), data, seed) for seed in range(args.seeds)]

    relations = Image.open(os.path.join(args.out, "seed0", "distilled", "relations.png"))
    curves = chart(results, relations.width)
    picture = Image.new("RGB", (relations.width, curves.height + 24 + relations.height), "white")
    picture.paste(curves, (0, 0))
    caption = "which patches the red patch relates to, from black (little) to white (much), in the teacher and in the distilled student:"
    ImageDraw.Draw(picture).text((4, curves.height), caption, fill="black")
    picture.paste(relations, (0, curves.height + 24))
    picture.save(os.path.join(args.out, "demo.png"))
    print(f"\nAfter the last epoch (chance is {CHANCE:.0f}%):\n")
    print(f"| student | top-1 on new pictures, {args.seeds} seed{'s' * (args.seeds > 1)} |\n|---|---|")
    for name in ("scratch", "distilled"):
        last = [curves[name][-1] for curves in results]
        deviation = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
        print(f"| {name} | {statistics.mean(last):.1f}%{deviation} |")
    print(f"\n{(time.time() - began) / 60:.1f} minutes on {os.cpu_count()} cores, torch {torch.__version__}; the picture: "
          f"{os.path.join(args.out, 'demo.png')}")


def main(argv=None):
    parser = tinymim.Parser("demo.py", "Distil, fine-tune and compare with scratch, in minutes on a CPU.")
    parser.add_argument("--seeds", type=tinymim.number(int, 1), default=1, metavar="N", help="repeat all with N seeds; default: 1")
    parser.add_argument("--out", default=os.path.join("runs", "demo"), metavar="FOLDER", help="default: runs/demo")
    parser.add_argument("--ship", metavar="FILE", help="make the demo's teacher of a last.pth of tinymim.py, in float16, and stop")
    args = parser.parse_args(argv)
    if args.ship:
        try:
            tensors, config, _ = tinymim.read_checkpoint(args.ship)
            model = {name: tensor.half() for name, tensor in tensors.items()}
            return tinymim.replace_file(TEACHER, lambda file: torch.save({"model": model, "config": config}, file))
        except tinymim.UserError as error:
            sys.exit(f"demo.py: error: {error}")
    if os.path.exists(os.path.join(args.out, "demo.png")) or os.path.exists(os.path.join(args.out, "seed0")):
        sys.exit(f"demo.py: error: {args.out} already holds a demo: delete it, or name another --out")
    try:
        demo(args)
    except OSError as error:
        sys.exit(f"demo.py: error: cannot write in {args.out} ({error}): name another --out")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
