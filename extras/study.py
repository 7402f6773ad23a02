"""The paper's tables at small scale, on CIFAR-10 or on photos of your own.

    python extras/study.py --data cifar10 --tune        (first: learning rates, on held-out training photos)
    python extras/study.py --data cifar10 --tables T8   (then one table, some, or by default all)
    python extras/study.py --smallest                   (a trial of every row, on a few drawn shapes)

A teacher is pre-trained with MAE. In each row a student learns from it in one way and is fine-tuned on a
tenth of the labels or on all. The last epoch's top-1 on the test photos counts. OUT/results.json keeps it; a
stop costs an epoch. Once OUT has the teacher (for T11 the assistant, too), other --seeds can run beside it.
"""

import argparse
import functools
import math
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import data
import finetune
import mae
import shapes
import targets
import tinymim

NETWORKS = {"teacher": (192, 6, 6), "assistant": (144, 5, 6), "student": (96, 4, 3)}  # width, depth, heads
SMALLEST = {"teacher": (24, 6, 6), "assistant": (12, 5, 3), "student": (12, 4, 3)}
# Table, row, how its student is pre-trained (options of targets.py, or a word), top-1 in the paper (ViT-B; in
# T8 and T11 ViT-T). A table's first row is what the others are compared with. The teacher has 6 blocks: 3, 4,
# 5 and 6 stand for the paper's 12, 15, 21 and 24 of 24.
ROWS = (
    ("T8", "relation (qk vv)", "--relations qk vv", 75.8),
    ("T8", "relation (qq kk vv)", "", None),
    ("T8", "feature", "--target output", 73.4),
    ("T8", "class token", "--target cls", 70.6),
    ("T8", "MAE", "mae", 71.6),
    ("T8", "scratch", "scratch", 72.2),
    ("T8", "the teacher itself", "teacher", None),
    ("T10", "block 5", "", 84.8),
    ("T10", "block 6", "--teacher-block 6", 84.4),
    ("T10", "block 4", "--teacher-block 4", 84.1),
    ("T10", "block 3", "--teacher-block 3", 83.6),
    ("T12", "raw input", "", 84.6),
    ("T12", "75% masked", "--mask-ratio 0.75", 83.9),
    ("T12", "75% masked, and MAE's loss", "--mask-ratio 0.75 --mae", 84.0),
    ("T13", "drop path of teacher 0, student 0.1", "", 84.6),
    ("T13", "drop path of teacher 0, student 0", "--drop-path 0", 84.3),
    ("T13", "drop path of teacher 0, student 0.2", "--drop-path 0.2", 84.3),
    ("T13", "drop path of teacher 0, student 0.3", "--drop-path 0.3", 84.1),
    ("T13", "drop path of teacher 0.1, student 0.1", "--teacher-drop-path 0.1", 83.9),
    ("T7", "qk vv", "--relations qk vv", 84.6),
    ("T7", "qk vv without softmax", "--relations qk vv --target logit", 84.4),
    ("T7", "qq kk vv", "", 84.5),
    ("T7", "qq kk vv without softmax", "--target logit", 84.4),
    ("T6", "Q/K/V", "--target qkv", 84.3),
    ("T6", "FFN", "--target ffn", 84.2),
    ("T6", "attention", "--target attention", 84.1),
    ("T6", "output", "--target output", 83.7),
    ("T6", "FFN after the residual", "--target ffn-after", 81.8),
    ("T6", "attention after the residual", "--target attention-after", 81.3),
    ("T5", "MAE", "mae", 83.6),
    ("T5", "class token", "--target cls", 80.6),
    ("T5", "class token, and MAE's loss", "--target cls --mae", 82.1),
    ("T11", "teacher → assistant → student", "--teacher assistant", 75.0),
    ("T11", "teacher → student", "", 74.4),
)
METHODS = {"relation": "", "logit": "--target logit", "feature": "--target output", "cls": "--target cls",
           "mae": "mae", "scratch": "scratch", "teacher": "teacher"}  # the rows by which --tune tunes

def method_of(spec):
    """Rows of one method share their learning rates."""
    return next((name for name in ("mae", "scratch", "teacher", "cls", "logit") if name in spec.split()),
                "feature" if "target" in spec else "relation")

def rates_to_try(method):
    """Eight pairs for each method: --blr of pre-training, --blr of fine-tuning. For the teacher three."""
    if method in ("scratch", "teacher"):
        rates = [(0, 1e-3 * 2**i) for i in (2, 1, 3, 0, 4, 5, 6, -1)]
        return rates[:3] if method == "teacher" else rates
    usual = 2e-3 if method == "mae" else 4e-3
    tries = [(1, 4e-3), (1, 8e-3), (1, 1.6e-2), (2, 1.6e-2), *((x, 8e-3) for x in (0.5, 2, 4, 8))]
    return [(usual * factor, fine) for factor, fine in tries]

def sizes(args, network):
    numbers = (SMALLEST if args.smallest else NETWORKS)[network]
    return [word for option in zip(("--dim", "--depth", "--heads"), numbers) for word in option]

def run(main, folder, *options):
    """main(options) of one of the scripts, continued if it was stopped. Returns its history."""
    checkpoint = os.path.join(folder, "last.pth")
    resume = ["--resume"] if os.path.exists(checkpoint) else []
    main([*map(str, options), "--out", folder, *resume])
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["history"]

def pretrain(args, spec, folder, seed=0, blr=None, network="student"):
    """Pre-train as `spec` says, unless that is done. Returns the checkpoint."""
    options = [*sizes(args, network), "--data", os.path.join(args.out, "data", "all"), "--batch-size",
               args.batch_size, "--blr", blr, "--seed", seed, *args.machine,
               "--decoder", *((12, 1, 2) if args.smallest else (96, 2, 3))]
    if spec == "mae":
        epochs = args.teacher_epochs if network == "teacher" else args.mae_epochs
        run(mae.main, folder, *options, "--patch-size", 4, "--img-size", 32, "--epochs", epochs)
    else:
        teachers = {name: os.path.join(args.out, name, "last.pth") for name in ("teacher", "assistant")}
        words = [teachers.get(word, word) for word in ("--teacher teacher " + spec).split()]
        run(targets.main, folder, *options, *words, "--epochs", args.distill_epochs)
    return os.path.join(folder, "last.pth")

def accuracy(args, spec, seed, labels, rates):
    """Top-1 of one row: pre-train, fine-tune on OUT/data/`labels`/train, test on OUT/data/`labels`/val."""
    name = spec.replace("--", "").replace(" ", "-") or "relation"
    folder = os.path.join(args.out, f"{name}-seed{seed}-{rates[0]:g}{'-tune' * (labels == 'tune')}")
    photos, batch = os.path.join(args.out, "data", labels), args.batch_size // 2
    epochs, options = args.all_epochs if labels == "all" else args.few_epochs, ["--layer-decay", 0.75]
    if spec == "scratch":  # as many updates as the row of MAE has in all
        in_epoch = len(tinymim.find_images(os.path.join(photos, "train"))) // batch
        epochs += math.ceil(args.mae_epochs * (args.images // args.batch_size) / in_epoch)
        checkpoint = "none"
        options = [*sizes(args, "student"), "--patch-size", 4, "--img-size", 32, "--layer-decay", 1]
    elif spec == "teacher":
        checkpoint = os.path.join(args.out, "teacher", "last.pth")
    else:
        checkpoint = pretrain(args, spec, os.path.join(folder, "pretrain"), seed, rates[0])
    options += ["--drop-path", 0, "--augment", "crop", "--crop-scale", 0.5, "--eval-every", epochs]
    return run(finetune.main, os.path.join(folder, f"{labels}-{rates[1]:g}"), "--checkpoint", checkpoint,
               "--data", photos, "--epochs", epochs, "--batch-size", batch, "--blr", rates[1], "--seed",
               seed, *options, *args.machine)[-1]["top1"]

def print_tables(results, tables):
    """Markdown: mean ± deviation over the seeds (and in parentheses the difference to the first row)."""
    names = {"few": "a tenth of the labels", "all": "all labels"}
    names = {labels: name for labels, name in names.items() if any(key.startswith(labels) for key in results)}
    for table in tables:
        rows = [(row, [paper] if paper else [], *(data.of_seeds(results, x, spec) for x in names))
                for name, row, spec, paper in ROWS if name == table]
        header = [f"{table} (difference to row 1)", "paper", *names.values()]
        print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for row in rows:
            cells = row[:1]
            for values, first in zip(row[1:], rows[0][1:]):
                text = f"{statistics.mean(values):.1f}" if values else ""
                text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                if values and first and row != rows[0]:
                    text += f" ({statistics.mean(values) - statistics.mean(first):+.1f})"
                cells += (text,)
            print(f"| {' | '.join(cells)} |")

def study(args):
    path = os.path.join(args.out, "results.json")
    if args.print:
        return print_tables(data.results(path), args.tables)
    if args.smallest:
        args.data, args.batch_size, args.seeds = os.path.join(args.out, "shapes"), 16, [0]
        args.teacher_epochs = args.mae_epochs = args.distill_epochs = args.few_epochs = args.all_epochs = 1
        shapes.write(os.path.join(args.data, "train"), 160, seed=1, size=32)
        shapes.write(os.path.join(args.data, "val"), 20, seed=2, size=32)
    args.images = data.link_splits(data.cifar10() if args.data == "cifar10" else args.data, args.out)
    tinymim.decode = functools.cache(tinymim.decode)  # small photos fit in memory: decode them once
    args.machine = ["--workers", 0, *([] if torch.cuda.is_available() else data.set_up_cpu())]

    pretrain(args, "mae", os.path.join(args.out, "teacher"), blr=1.5e-3, network="teacher")
    specs = [row[2] for row in ROWS if row[0] in args.tables]
    if args.tune is not None:  # with shorter runs
        args.mae_epochs, args.distill_epochs, args.few_epochs, args.seeds = 3, 1, 10, [0]
        args.labels, args.tables = ["tune"], []
        specs = [METHODS[name] for name in args.tune or dict.fromkeys(map(method_of, specs))]
    for labels in args.labels:
        for seed, spec in [(seed, spec) for seed in args.seeds for spec in specs]:
            method, found = method_of(spec), data.results(path)
            names = {rates: f"tune/{method}/{rates[0]:g} {rates[1]:g}" for rates in rates_to_try(method)}
            best = max(names, key=lambda rates: found.get(names[rates], 0))  # untuned: the first
            for rates in names if labels == "tune" else [best]:
                if "assistant" in spec:
                    pretrain(args, "", os.path.join(args.out, "assistant"), 0, rates[0], "assistant")
                key = names[rates] if labels == "tune" else f"{labels}/{spec}/{seed}"
                if key not in data.results(path):
                    data.results(path, key, accuracy(args, spec, seed, labels, rates))
    print_tables(data.results(path), args.tables)

def main(argv=None):
    parser = argparse.ArgumentParser("study.py", description="The paper's tables at small scale.")
    add, tables = parser.add_argument, list(dict.fromkeys(row[0] for row in ROWS))
    add("--data", default="cifar10", help="or a folder with train/ and test/ or val/ (default: cifar10)")
    add("--out", default="runs/study", help="folder for everything (default: runs/study)")
    add("--tables", nargs="+", choices=tables, default=tables, help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of student and fine-tuning (default: 0 1 2)")
    add("--labels", nargs="+", choices=("few", "all"), default=["few", "all"], help="a tenth of them, or all")
    add("--tune", nargs="*", choices=METHODS, help="try learning rates, of these or of --tables's methods")
    add("--print", action="store_true", help="only print the tables of OUT/results.json")
    add("--smallest", action="store_true", help="try every row with tiny networks on a few drawn shapes")
    for name, epochs in (("teacher", 60), ("mae", 10), ("distill", 3), ("few", 20), ("all", 5)):
        add(f"--{name}-epochs", type=int, default=epochs, help=f"default: {epochs}")
    add("--batch-size", type=int, default=128, help="of pre-training; half in fine-tuning (default: 128)")
    tinymim.run(parser, parser.parse_args(argv), study)

if __name__ == "__main__":
    main()
