"""The whole method in minutes, without a GPU and without a network.

    python extras/demo.py

Draws pictures of ten shapes (extras/shapes.py). A student learns from the small MAE teacher of such
pictures in assets/, without labels, and is then fine-tuned on a few labelled ones. For comparison,
the same network is pre-trained with MAE, and trained from scratch, and the teacher is fine-tuned.
A table and demo.png show it.
"""

import argparse
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

import data
import finetune
import mae
import shapes
import tinymim

TEACHER = os.path.join(ROOT, "assets", "shapes_teacher.pth")
PICTURES, LABELLED, VALIDATION = 10000, 2000, 1000  # of all ten shapes together
STUDENT = "--dim 64 --depth 4 --heads 4"
SIZES = "--patch-size 6 --img-size 36"
DISTIL = ("--teacher {teacher} --teacher-block 6 --epochs 2 --warmup-epochs 0.2 --batch-size 64 "
          "--blr 8e-3")
# It takes as long.
PRETRAIN = "--epochs 4 --batch-size 64 --blr 3e-3 --mask-ratio 0.6 --decoder 48 2 3"
TUNE = "--epochs 8 --batch-size 32 --augment crop --crop-scale 0.5"
STARTS = {  # fine-tuning, with the learning rate and layer decay that suit each best, of a handful
    "scratch": f"--checkpoint none {STUDENT} {SIZES} --blr 5e-3 --layer-decay 1",
    "MAE": "--checkpoint {mae} --blr 1e-2 --layer-decay 0.75",
    "distilled": "--checkpoint {distilled} --blr 2e-2 --layer-decay 0.5",
    "the teacher": "--checkpoint {teacher} --blr 1e-2 --layer-decay 0.5",
}

def draw_pictures(folder):
    """unlabelled/, and labelled/ with train/ and val/, unless an earlier demo has drawn them."""
    if not os.path.exists(os.path.join(folder, "drawn")):
        shapes.write(os.path.join(folder, "unlabelled"), PICTURES, seed=3)
        shapes.write(os.path.join(folder, "labelled", "train"), LABELLED, seed=4)
        shapes.write(os.path.join(folder, "labelled", "val"), VALIDATION, seed=5)
        open(os.path.join(folder, "drawn"), "w").close()

def compare(out, pictures, seed):
    """Pre-train and fine-tune: {name: top-1 after every epoch of fine-tuning}."""
    common = ["--seed", str(seed), "--device", "cpu", "--workers", "1", *data.set_up_cpu()]
    unlabelled = ["--data", os.path.join(pictures, "unlabelled"), *common]
    labelled = ["--data", os.path.join(pictures, "labelled"), *common]
    paths = {name: os.path.join(out, name, "last.pth") for name in ("distilled", "mae")}
    paths["teacher"] = TEACHER
    def words(options):
        return [word.format(**paths) for word in options.split()]

    print(f"\nSeed {seed}: distil a student, on {PICTURES} pictures without labels.", flush=True)
    folder = os.path.join(out, "distilled")
    tinymim.main([*words(f"{STUDENT} {DISTIL}"), "--out", folder, *unlabelled])
    print("\nPre-train the same network with MAE, on the same pictures.", flush=True)
    folder = os.path.join(out, "mae")
    mae.main([*words(f"{STUDENT} {SIZES} {PRETRAIN}"), "--out", folder, *unlabelled])
    curves = {}
    for name, start in STARTS.items():
        print(f"\nFine-tune on {LABELLED} labelled pictures: {name}.", flush=True)
        folder = os.path.join(out, "finetune-" + name.replace(" ", "-"))
        finetune.main([*words(f"{start} {TUNE}"), *labelled, "--out", folder])
        history = tinymim.load_file(os.path.join(folder, "last.pth"))["history"]
        curves[name] = [record["top1"] for record in history]
    return curves

@torch.no_grad()
def draw_maps(student_path, pictures):
    """How the patch in the middle (red) of four pictures relates to the others, the mean over heads.
    A row has a picture, and for q-q, k-k and v-v the teacher's and the student's map."""
    student, teacher = tinymim.load_teacher(student_path), tinymim.load_teacher(TEACHER)
    paths = tinymim.find_images(pictures)
    crops = torch.stack([tinymim.decode(os.fsdecode(path))[:, 2:38, 2:38]
                         for path in paths[::len(paths) // 4][:4]]) / 255
    images, grid, heads = tinymim.normalize(crops), student.grid, student.config["relation_heads"]
    patch = slice(grid // 2 * 6, grid // 2 * 6 + 6)
    columns = [crops]
    for i in range(3):  # q-q, k-k, v-v
        for vit in (teacher, student):
            qkv = vit.qkv_at(images, vit.depth)
            heat = tinymim.log_relation(qkv[i], qkv[i], heads).exp().mean(1)[:, 1:, 1:]
            heat = heat[:, (grid + 1) * (grid // 2)].clone()
            heat[:, (grid + 1) * (grid // 2)] = 0  # to itself it relates far more strongly
            heat = (heat / heat.amax(1, keepdim=True)).view(-1, 1, grid, grid)
            heat = heat.repeat_interleave(6, 2).repeat_interleave(6, 3)  # a patch has 6 x 6 pixels
            columns.append(heat.expand(-1, 3, -1, -1))
    cells = torch.stack(columns, 1).flatten(0, 1).clone()  # (4 * 7, 3, 36, 36)
    cells[:, :, patch, patch] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    cells = cells.repeat_interleave(3, 2).repeat_interleave(3, 3)
    return to_pil_image(make_grid(cells, nrow=7, padding=4, pad_value=1.0))

def chart(results, width, height=260):
    """A picture of top-1 over the epochs of fine-tuning, a line for each network and seed."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 60, width - 30, 30, height - 40
    epochs = len(results[0]["scratch"])
    best = max(max(curve) for curves in results for curve in curves.values())
    highest = 10 * (int(best) // 10 + 1)

    def point(epoch, percent):
        x = left + (right - left) * (epoch - 1) / (epochs - 1)
        return x, bottom - (bottom - top) * percent / highest

    title = f"top-1 on {VALIDATION} new pictures, after each epoch on {LABELLED} labelled ones"
    draw.text((left, 8), title, fill="black")
    for percent in range(0, highest + 1, 10):
        draw.line([point(1, percent), point(epochs, percent)], fill="#dddddd")
        draw.text((left - 30, point(1, percent)[1] - 6), f"{percent}%", fill="black")
    for epoch in range(1, epochs + 1):
        draw.text((point(epoch, 0)[0] - 4, bottom + 6), str(epoch), fill="black")
    for i, (name, colour) in enumerate(zip(STARTS, ("#ff7f0e", "#2ca02c", "#1f77b4", "#7f7f7f"))):
        draw.text((left + 400 + 75 * i, 8), name, fill=colour)
        for curves in results:
            draw.line([point(*epoch) for epoch in enumerate(curves[name], 1)], fill=colour, width=3)
    return picture

def demo(args):
    began, pictures = time.time(), os.path.join(args.out, "pictures")
    draw_pictures(pictures)
    results = [compare(os.path.join(args.out, f"seed{seed}"), pictures, seed)
               for seed in range(args.seeds)]
    distilled = os.path.join(args.out, "seed0", "distilled", "last.pth")
    relations = draw_maps(distilled, os.path.join(pictures, "labelled", "val"))
    curves = chart(results, relations.width)
    picture = Image.new("RGB", (relations.width, curves.height + relations.height), "white")
    picture.paste(curves, (0, 0))
    picture.paste(relations, (0, curves.height))
    picture.save(os.path.join(args.out, "demo.png"))
    print(f"\n| seeds: {args.seeds}, chance: 10% | top-1 on new pictures |\n|---|---|")
    for name in STARTS:
        last = [curves[name][-1] for curves in results]
        deviation = f" ± {statistics.stdev(last):.1f}" if len(last) > 1 else ""
        print(f"| {name} | {statistics.mean(last):.1f}%{deviation} |")
    print("\nFrom scratch, and after so little of MAE, this network stays at chance.")
    print(f"{(time.time() - began) / 60:.1f} minutes. {args.out}/demo.png: the accuracy over the epochs,")
    print("and how the patch in the middle (red) relates to the others: the picture, then teacher and")
    print("student for q-q, k-k and v-v. Next: the same on photos, see README.md.")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/demo.py", description="The method, on a CPU.")
    parser.add_argument("--seeds", type=tinymim.COUNT, default=1, help="how many (default: 1)")
    parser.add_argument("--out", default=os.path.join("runs", "demo"), help="default: runs/demo")
    parser.add_argument("--ship", metavar="FILE", help="make assets/shapes_teacher.pth of it")
    args = parser.parse_args(argv)
    if args.ship:
        tensors, _, config = tinymim.read_checkpoint(args.ship)
        half = {name: tensor.half() for name, tensor in tensors.items()}
        return torch.save({"model": half, "config": config}, TEACHER)
    if os.path.exists(os.path.join(args.out, "seed0")):
        sys.exit(f"extras/demo.py: error: {args.out} holds a demo: choose another --out")
    tinymim.run(parser, demo, args)

if __name__ == "__main__":
    main()
