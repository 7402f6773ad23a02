"""The whole method in three minutes, on two CPU cores, without a GPU and without a network.

    python extras/demo.py

Draws pictures of ten shapes (extras/shapes.py). A student learns from the small MAE teacher of such
pictures in assets/, without labels, and is then fine-tuned on a few labelled ones. For comparison,
the same network is pre-trained with MAE, for as long, and trained from scratch, and the teacher is
fine-tuned. demo.png shows their accuracy, and how the patches of a picture relate.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import statistics
import sys
import time

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import figures
import finetune
import mae
import shapes
import tinymim

TEACHER = os.path.join(ROOT, "assets", "shapes_teacher.pth")
PICTURES = {  # in OUT/pictures: how many, their seed, and whether they are the easy ones
    "unlabelled/a": (4000, 3, False), "labelled/train": (2000, 4, True),
    "unlabelled/b": (4000, 5, False), "labelled/val": (1000, 6, True)}
STUDENT = "--dim 64 --depth 4 --heads 4"
SIZES = "--patch-size 6 --img-size 36"
DISTIL = (f"{STUDENT} --teacher {TEACHER} --teacher-block 6 --epochs 2 --warmup-epochs 0.2 "
          "--batch-size 64 --blr 8e-3")
PRETRAIN = (f"{STUDENT} {SIZES} --epochs 4 --batch-size 64 --blr 3e-3 --mask-ratio 0.6 "
            "--decoder 48 2 3")  # takes as long as distillation
TUNE = "--batch-size 32 --augment crop --crop-scale 0.5 --warmup-epochs 1 --eval-every 99"
# Fine-tuning, with the best of two or three rates each: tried with fewer pictures, on another seed.
# Two run at a time, the longest first.
STARTS = {
    "MAE": f"{TUNE} --epochs 8 --blr 2e-2 --layer-decay 0.65",
    "distilled": f"{TUNE} --epochs 8 --blr 2e-2 --layer-decay 0.65",
    "the teacher": f"{TUNE} --epochs 4 --blr 2e-2 --layer-decay 0.65",
    "scratch": f"{TUNE} --epochs 8 --blr 1e-2 {STUDENT} {SIZES}",
}
COLOURS = {"scratch": "#bbbbbb", "MAE": "#8fb4d9", "distilled": "#2563a8", "the teacher": "#777777"}

def learn(out, name, seed):
    """Pre-train and fine-tune one of STARTS, in a process of its own. Returns its top-1."""
    common = ["--seed", str(seed), "--device", "cpu", "--workers", "0"]
    if torch.cpu._is_avx512_bf16_supported():
        common += ["--amp", "bf16"]
    folder = os.path.join(out, f"{name.split()[-1]}-{seed}")
    unlabelled = ["--data", os.path.join(out, "pictures", "unlabelled"), "--out", folder, *common]
    labelled = ["--data", os.path.join(out, "pictures", "labelled"), *common]
    checkpoint = os.path.join(folder, "last.pth")
    with open(os.path.join(out, "log.txt"), "a") as log, contextlib.redirect_stdout(log):
        if name == "distilled":
            tinymim.main([*DISTIL.split(), *unlabelled])
        elif name == "MAE":
            mae.main([*PRETRAIN.split(), *unlabelled])
        else:
            checkpoint = "none" if name == "scratch" else TEACHER
        finetune.main(["--checkpoint", checkpoint, *STARTS[name].split(), *labelled,
                       "--out", folder + "-finetuned"])
    history = tinymim.load_file(os.path.join(folder + "-finetuned", "last.pth"))["history"]
    return history[-1]["top1"]

def draw(results, out):
    """demo.png: a bar for each of STARTS, and relation maps of teacher and student."""
    font, small = ImageFont.load_default(24), ImageFont.load_default(19)
    picture = Image.new("RGB", (1200, 570), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((40, 16), "accuracy with 2,000 labels (%)", "black", font)
    means = {name: statistics.mean(results[name]) for name in COLOURS}
    for i, (name, top1) in enumerate(means.items()):
        left, top, colour = 40 + 140 * i, 510 - 390 * top1 / max(means.values()), COLOURS[name]
        pen.rectangle((left, top, left + 100, 510), colour)
        pen.text((left + 50, top - 32), f"{top1:.0f}", "black", font, anchor="ma")
        pen.text((left + 50, 520), name, "black", small, anchor="ma")
    run, photos = os.path.join(out, "distilled-0"), os.path.join(out, "pictures", "labelled", "val")
    crops, objective, networks = figures.load_run(run, photos)
    images = crops / 255
    columns = {"picture": images}
    for name, vit in networks.items():
        relation = figures.relation_maps(objective, vit, images)["v-v"]
        heat = figures.middle_row(relation, vit.grid)
        columns[name] = (heat / heat.amax((1, 2), keepdim=True))[:, None]
    pen.text((650, 16), "how the outlined patch relates to the rest (v-v)", "black", font)
    for i, (title, cells) in enumerate(columns.items()):
        pen.text((704 + 140 * i, 56), title.split()[-1], "black", small, anchor="ma")
        for j, cell in enumerate(cells):
            cell = to_pil_image(cell.expand(3, -1, -1)).resize((108, 108), Image.NEAREST)
            left, top = 650 + 140 * i, 86 + 118 * j
            picture.paste(cell, (left, top))
            pen.rectangle((left + 54, top + 54, left + 72, top + 72), outline="red", width=2)
    picture.save(os.path.join(out, "demo.png"))

def demo(args):
    if not args.out or os.path.exists(args.out):
        raise tinymim.UserError(f"--out {args.out!r} is not a new folder: choose another")
    os.makedirs(args.out)
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process: two on networks this small wait
    began, results = time.time(), {name: [] for name in STARTS}
    print("Four networks learn, two at a time: three minutes on two cores for each seed.\n"
          f"Details go to {args.out}/log.txt.", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(2, os.cpu_count()), spawn) as pool:
        drawing = [pool.submit(shapes.write, os.path.join(args.out, "pictures", name), count, seed,
                               easy=easy) for name, (count, seed, easy) in PICTURES.items()]
        for pictures in drawing:
            pictures.result()  # waits, or raises its error
        todo = [(name, seed) for seed in range(args.seeds) for name in STARTS]
        running = {}
        while todo or running:
            while todo and len(running) < 2:
                network = todo.pop(0)
                running[pool.submit(learn, args.out, *network)] = network
            if sys.stdout.isatty():
                names = " and ".join(f"{name}, seed {seed}" for name, seed in running.values())
                print(f"{time.time() - began:.0f} s, now: {names:60}", end="\r", flush=True)
            done, _ = concurrent.futures.wait(running, 1, concurrent.futures.FIRST_COMPLETED)
            for job in done:
                name, seed = running.pop(job)
                results[name].append(job.result())
                print(f"{name}, seed {seed}: {job.result():.1f}%".ljust(79), flush=True)
    draw(results, args.out)
    print(f"\n| seeds: {args.seeds}, chance: 10% | top-1 on new pictures |\n|---|---|")
    for name in COLOURS:
        deviation = f" ± {statistics.stdev(results[name]):.1f}" if args.seeds > 1 else ""
        print(f"| {name} | {statistics.mean(results[name]):.1f}%{deviation} |")
    print(f"""
{time.time() - began:.0f} seconds. All were fine-tuned on the same 2,000 labels. Before, the student
copied its teacher's relations on 8,000 pictures without labels. MAE had as long on them by itself,
too short to help much: in 25 times as long, on 40,000 pictures, it reached 72.8% (one seed).
How patches relate: {args.out}/demo.png. Next, on photos: python extras/cifar10.py &&
python tinymim.py --student nano --teacher assets/cifar10_teacher.pth --data data/cifar10 \\
    --batch-size 128 --blr 1.6e-2 --epochs 3""")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/demo.py", description="The method, on a CPU.")
    parser.add_argument("--seeds", type=tinymim.COUNT, default=1, help="how many (default: 1)")
    parser.add_argument("--out", default=os.path.join("runs", "demo"), help="default: runs/demo")
    tinymim.run(parser, demo, parser.parse_args(argv))

if __name__ == "__main__":
    main()
