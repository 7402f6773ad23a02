"""The whole method in two minutes, on two CPU cores, without a GPU and without a network.

    python extras/demo.py

Draws pictures of ten shapes (extras/shapes.py). A student learns from the small MAE teacher of such
pictures in assets/, without labels, and is then fine-tuned on a few labelled ones. For comparison,
the same network is pre-trained with MAE, for longer, and trained from scratch, and the teacher is
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

import data
import finetune
import mae
import shapes
import tinymim

TEACHER = os.path.join(ROOT, "assets", "shapes_teacher.pth")
PICTURES = {  # in OUT/pictures: how many, their seed, and whether they are the easy ones
    "unlabelled/a": (2500, 3, False), "labelled/train": (1500, 4, True),
    "unlabelled/b": (2500, 5, False), "labelled/val": (1000, 6, True)}
STUDENT = "--dim 64 --depth 4 --heads 4"
SIZES = "--patch-size 6 --img-size 36"
DISTIL = (f"{STUDENT} --teacher {TEACHER} --teacher-block 6 --epochs 2 --warmup-epochs 0.2 "
          "--batch-size 64 --blr 8e-3")
PRETRAIN = (f"{STUDENT} {SIZES} --epochs 4 --batch-size 64 --blr 3e-3 --mask-ratio 0.6 "
            "--decoder 48 2 3")  # takes longer than distillation
TUNE = "--batch-size 32 --augment crop --crop-scale 0.5 --warmup-epochs 1 --eval-every 99"
# Fine-tuning, with the best of two or three rates each, on a seed that is not reported. Two run at
# a time, the longest first.
STARTS = {
    "distilled": f"{TUNE} --epochs 6 --blr 2e-2 --layer-decay 0.65",
    "MAE": f"{TUNE} --epochs 6 --blr 2e-2 --layer-decay 0.65",
    "the teacher": f"{TUNE} --epochs 3 --blr 2e-2 --layer-decay 0.65",
    "scratch": f"{TUNE} --epochs 6 --blr 1e-2 {STUDENT} {SIZES}",
}

COLOURS = {"scratch": "#bbbbbb", "MAE": "#8fb4d9", "distilled": "#2563a8", "the teacher": "#777777"}

def learn(name, out, seed):
    """Pre-train and fine-tune one of STARTS, in a process of its own. Returns its top-1."""
    common = ["--seed", str(seed), "--device", "cpu", "--workers", "0", *data.set_up_cpu()]
    data.keep_small_photos()
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
    font, small = ImageFont.load_default(22), ImageFont.load_default(16)
    picture = Image.new("RGB", (1200, 560), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((30, 20), "accuracy with 1500 labels (%)", "black", font)
    means = {name: statistics.mean(results[name]) for name in COLOURS}
    for i, (name, top1) in enumerate(means.items()):
        left, top, colour = 40 + 135 * i, 500 - 380 * top1 / max(means.values()), COLOURS[name]
        pen.rectangle((left, top, left + 95, 500), colour)
        pen.text((left + 48, top - 28), f"{top1:.0f}", "black", font, anchor="ma")
        pen.text((left + 48, 510), name, "black", small, anchor="ma")
    run, photos = os.path.join(out, "distilled-0"), os.path.join(out, "pictures", "labelled", "val")
    crops, objective, networks = data.load_run(run, photos)
    images = crops / 255
    columns = {"picture": images}
    for name, vit in networks.items():
        heat = data.middle_row(data.relation_maps(objective, vit, images)["v-v"], vit.grid)
        columns[name] = (heat / heat.amax((1, 2), keepdim=True))[:, None]
    pen.text((640, 20), "how the patch in the middle relates to the others (v-v)", "black", font)
    for i, (title, cells) in enumerate(columns.items()):
        pen.text((700 + 135 * i, 56), title, "black", small, anchor="ma")
        for j, cell in enumerate(cells):
            cell = to_pil_image(cell.expand(3, -1, -1)).resize((108, 108), Image.NEAREST)
            left, top = 646 + 135 * i, 80 + 118 * j
            picture.paste(cell, (left, top))
            pen.rectangle((left + 54, top + 54, left + 72, top + 72), outline="red", width=2)
    picture.save(os.path.join(out, "demo.png"))

def demo(args):
    began = time.time()
    print(f"Four networks learn, two at a time: about two minutes on two cores, times {args.seeds} "
          f"seeds.\nDetails go to {args.out}/log.txt.", flush=True)
    results = {name: [] for name in STARTS}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(2, os.cpu_count()), spawn) as pool:
        drawing = [pool.submit(shapes.write, os.path.join(args.out, "pictures", name), count, seed,
                               easy=easy) for name, (count, seed, easy) in PICTURES.items()]
        for pictures in drawing:
            pictures.result()  # waits, or raises its error
        jobs = {pool.submit(learn, name, args.out, seed): (name, seed)
                for seed in range(args.seeds) for name in STARTS}
        for job in concurrent.futures.as_completed(jobs):
            name, seed = jobs[job]
            results[name].append(job.result())
            print(f"{name}, seed {seed}: {job.result():.1f}%", flush=True)
    draw(results, args.out)
    print(f"\n| seeds: {args.seeds}, chance: 10% | top-1 on new pictures |\n|---|---|")
    for name in COLOURS:
        deviation = f" ± {statistics.stdev(results[name]):.1f}" if args.seeds > 1 else ""
        print(f"| {name} | {statistics.mean(results[name]):.1f}%{deviation} |")
    print(f"\n{time.time() - began:.0f} seconds. All were fine-tuned on the same 1,500 labels. "
          "Before, the student copied its teacher's\nrelations on 5,000 pictures without labels; "
          f"MAE had longer on them by itself. See {args.out}/demo.png.\nNext, on photos: python "
          "extras/data.py && python tinymim.py --student nano\n--teacher "
          "assets/cifar10_teacher.pth --data data/cifar10 --batch-size 128 --blr 1.6e-2 --epochs 3")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/demo.py", description="The method, on a CPU.")
    parser.add_argument("--seeds", type=tinymim.COUNT, default=1, help="how many (default: 1)")
    parser.add_argument("--out", default=os.path.join("runs", "demo"), help="default: runs/demo")
    parser.add_argument("--ship", metavar="FILE", help="make assets/shapes_teacher.pth of it")
    args = parser.parse_args(argv)
    if args.ship:
        return data.ship(args.ship, TEACHER)
    if os.path.exists(args.out):
        sys.exit(f"extras/demo.py: error: {args.out} exists: delete it, or choose another --out")
    os.makedirs(args.out)
    tinymim.run(parser, demo, args)

if __name__ == "__main__":
    main()
