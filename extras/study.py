"""The paper's tables at small scale, and when relations beat features, on CIFAR-10 or your photos.

    python extras/study.py --data cifar10 --tune        (first: learning rates, on held-out photos)
    python extras/study.py --data cifar10 --tables T8   (then one table, some, or by default all)
    python extras/study.py --data cifar10 --curve       (when do relations beat features?)
    python extras/study.py --content                    (how much of a relation the photo explains)
    python extras/study.py --smallest                   (a smoke test of every row, on drawn shapes)

The teacher for CIFAR-10 is in assets/ (--teacher new trains one). In each row a student learns from
it in one way and is fine-tuned on a tenth of the labels or on all. The last epoch's top-1 on the
test photos counts. OUT/results.json keeps it; a stop costs an epoch. Other --seeds can run beside.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch

import content
import data
import finetune
import mae
import parallel
import shapes
import targets
import tinymim
from tinymim import UserError

SHIPPED = os.path.join(ROOT, "assets", "cifar10_teacher.pth")
NETWORKS = {  # width, depth, heads
    "teacher": (192, 6, 6), "assistant": (144, 5, 6), "student": (96, 4, 3), "deep": (96, 12, 3)}
SMALLEST = {
    "teacher": (24, 6, 6), "assistant": (12, 5, 3), "student": (12, 4, 3), "deep": (12, 12, 3)}
SIZE, CROP_SCALE = 32, 0.5  # of the photos, in pixels, and of fine-tuning's crops, at least
LENGTHS = 1, 3, 10, 30  # epochs of distillation
CURVES = {"relation (qk vv)": "--relations qk vv", "relation (vv)": "--relations vv",
          "feature": "--target output", "MAE": "mae"}
# Table, row, how its student is pre-trained (options of targets.py, or words), top-1 in the paper
# (ViT-B; in Tables 8 and 11 ViT-T). A table's first row is what the others are compared with. The
# teacher has 6 blocks: 3, 4, 5 and 6 stand for the paper's 12, 15, 21 and 24 of 24. Words: mae and
# scratch train the student itself, deep is a student of 12 blocks, new-end starts fine-tuning from
# a last block that is new after its q, k and v, as it is after relations.
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
    # Hypothesis 1: relations converge more slowly. MAE has 10/3 of the epochs, which take as long.
    *(("length", f"{name}, {epochs} epochs", f"{spec} --epochs {epochs}", None)
      for epochs in LENGTHS for name, spec in CURVES.items()),
    # Hypothesis 2: relations that say more about the photo teach better. The teacher's block is 5.
    *(("content", pairs, f"--relations {pairs} --epochs 3", None)
      for pairs in ("qk vv", "qq kk vv", "vv", "qk", "qq kk")),
    *(("content", f"vv, block {block}", f"--relations vv --teacher-block {block} --epochs 3", None)
      for block in (3, 4, 6)),
    # Hypothesis 3: of 12 blocks, relations leave a twelfth half trained; of 4 blocks, a quarter.
    ("depth", "relation (qk vv), 12 blocks", "deep --relations qk vv --epochs 3", None),
    ("depth", "relation (vv), 12 blocks", "deep --relations vv --epochs 3", None),
    ("depth", "feature, 12 blocks", "deep --target output --epochs 3", None),
    # Hypothesis 4: both from the same start of the last block, features from block 5.
    ("end", "relation (qk vv)", "--relations qk vv --epochs 10 new-end", None),
    ("end", "feature of block 5", "--target output --teacher-block 5 --epochs 10 new-end", None),
    # And what of it matters: features from the output, and of block 5 with the end they trained.
    ("end", "feature", "--target output --epochs 10 new-end", None),
    ("end", "feature of block 5, end not new", "--target output --teacher-block 5 --epochs 10",
     None),
)
CURVE = ("length", "content", "depth", "end")
METHODS = {  # the rows by which --tune tunes
    "relation": "", "logit": "--target logit", "feature": "--target output", "cls": "--target cls",
    "mae": "mae", "scratch": "scratch", "teacher": "teacher"}

def method_of(spec):
    """Rows of one method share their learning rates."""
    for name in ("mae", "scratch", "teacher", "cls", "logit"):
        if name in spec.split():
            return name
    return "feature" if "--target" in spec else "relation"

def rates_to_try(method, found=None):
    """Pairs of --blr of pre-training and --blr of fine-tuning: eight for each method, three for the
    teacher. With their results, three: the best, and half and twice its rate of pre-training."""
    if method in ("scratch", "teacher"):
        rates = [(0, 1e-3 * 2**i) for i in (2, 1, 3, 0, 4, 5, 6, -1)]
        return rates[:3] if method == "teacher" else rates
    usual = 2e-3 if method == "mae" else 4e-3
    tries = [(1, 4e-3), (1, 8e-3), (1, 1.6e-2), (2, 1.6e-2), *((x, 8e-3) for x in (0.5, 2, 4, 8))]
    rates = [(usual * factor, fine) for factor, fine in tries]
    if found is None:
        return rates
    pretraining, fine = best_rates(method, found, rates, "tune")
    return [(pretraining * factor, fine) for factor in (1, 0.5, 2)]

def best_rates(method, found, rates, tuned):
    """Those with the best result named `tuned`/method/rates. The first, if none was tried."""
    def result(pair):
        return top1(found.get(f"{tuned}/{method}/{pair[0]:g} {pair[1]:g}", 0))
    return max(rates, key=result)

def sizes(args, network):
    numbers = (SMALLEST if args.smallest else NETWORKS)[network]
    return [word for option in zip(("--dim", "--depth", "--heads"), numbers) for word in option]

def run(main, folder, *options):
    """main(options) of one of the scripts, continued if it was stopped. Returns its history."""
    main([*map(str, options), "--out", folder, "--resume"])
    return tinymim.load_file(os.path.join(folder, "last.pth"))["history"]

def epochs_of(args, spec):
    """How many epochs of pre-training a row has."""
    words = spec.split()
    if "--epochs" not in words:
        return args.mae_epochs if "mae" in words else args.distill_epochs
    epochs = 1 if args.smallest else int(words[words.index("--epochs") + 1])
    return round(epochs * 10 / 3) if "mae" in words else epochs  # which takes as long

def pretrain(args, spec, folder, seed=0, blr=None, network="student"):
    """Pre-train as `spec` says, unless that is done. Returns the checkpoint."""
    words = spec.split()
    if "deep" in words:
        network = "deep"
    decoder = (12, 1, 2) if args.smallest else (96, 2, 3)
    options = [*sizes(args, network), "--data", os.path.join(args.out, "data", "all"),
               "--batch-size", args.batch_size, "--blr", blr, "--seed", seed, *args.machine,
               "--decoder", *decoder]
    epochs = args.teacher_epochs if network == "teacher" else epochs_of(args, spec)
    if "mae" in words:
        options += ["--patch-size", 4, "--img-size", SIZE, "--epochs", epochs]
        run(mae.main, folder, *options)
    else:
        assistant = os.path.join(args.out, "assistant", "last.pth")
        teachers = {"teacher": args.teacher, "assistant": assistant}
        words = [teachers.get(word, word) for word in ["--teacher", "teacher", *words]
                 if word not in ("deep", "new-end")]
        run(targets.main, folder, *options, *words, "--epochs", epochs)
    checkpoint = os.path.join(folder, "last.pth")
    return renew_end(checkpoint, seed) if "new-end" in spec.split() else checkpoint

def renew_end(checkpoint, seed):
    """A copy of the checkpoint in which what comes after the last block's q, k and v is new."""
    tensors, found, config = tinymim.read_checkpoint(checkpoint)
    torch.manual_seed(seed)
    new = tinymim.ViT(**found).state_dict()
    last = f"blocks.{found['depth'] - 1}."
    behind = (f"{last}attn.proj", f"{last}norm2", f"{last}mlp", "norm.")
    tensors |= {name: tensor for name, tensor in new.items() if name.startswith(behind)}
    path = os.path.join(os.path.dirname(checkpoint), "new-end.pth")
    torch.save({"model": tensors, "config": config}, path)
    return path

def fine_tuning_epochs(args, spec, labels):
    epochs = args.all_epochs if labels == "all" else args.few_epochs
    if spec == "scratch":  # as many updates as the row of MAE has in all
        photos = tinymim.find_images(os.path.join(args.out, "data", labels, "train"))
        updates = args.mae_epochs * (args.images // args.batch_size)
        epochs += math.ceil(updates / (len(photos) // (args.batch_size // 2)))
    return epochs

def folder_of(args, spec, seed, labels, rates):
    """For a row's pre-training, and its fine-tunings. new-end changes only what follows."""
    name = spec.replace(" new-end", "").replace("--", "").replace(" ", "-") or "relation"
    tune = "-tune" * (labels == "tune")
    return os.path.join(args.out, f"{name}-seed{seed}-{rates[0]:g}{tune}")

def accuracy(args, spec, seed, labels, rates):
    """Pre-train as a row says, fine-tune on OUT/data/`labels`/train, test on its val: the top-1,
    and how it came about."""
    folder = folder_of(args, spec, seed, labels, rates)
    epochs, options = fine_tuning_epochs(args, spec, labels), ["--layer-decay", 0.75]
    if spec == "scratch":
        checkpoint = "none"
        options = [*sizes(args, "student"), "--patch-size", 4, "--img-size", SIZE,
                   "--layer-decay", 1]
    elif spec == "teacher":
        checkpoint = args.teacher
    else:
        checkpoint = pretrain(args, spec, os.path.join(folder, "pretrain"), seed, rates[0])
    options += ["--drop-path", 0, "--augment", "crop", "--crop-scale", CROP_SCALE,
                "--eval-every", epochs]
    tuned = os.path.join(folder, f"{labels}-{rates[1]:g}{'-new-end' * ('new-end' in spec)}")
    history = run(finetune.main, tuned,
                  "--checkpoint", checkpoint, "--data", os.path.join(args.out, "data", labels),
                  "--epochs", epochs, "--batch-size", args.batch_size // 2, "--blr", rates[1],
                  "--seed", seed, *options, *args.machine)
    last, device = history[-1], "gpu" if torch.cuda.is_available() else "cpu"
    result = dict(top1=round(last["top1"], 2), fine_tuning_epochs=last["epoch"], blr=rates,
                  batch_size=args.batch_size, teacher=os.path.basename(args.teacher), device=device)
    if checkpoint not in ("none", args.teacher):
        result["epochs"] = epochs_of(args, spec)
    return result

def top1(result):
    """The accuracy in a result: a number or, with its protocol, {"top1": number, ...}."""
    return result["top1"] if isinstance(result, dict) else result

def of_seeds(found, labels, spec):
    """The top-1 of all seeds of a row, among the results."""
    return [top1(found[key]) for key in found if key.startswith(f"{labels}/{spec}/")]

def print_tables(results, tables):
    """Markdown: mean ± deviation over the seeds (in parentheses, the difference to row 1)."""
    names = {"few": "a tenth of the labels", "all": "all labels"}
    names = {labels: name for labels, name in names.items()
             if any(key.startswith(labels) for key in results)}
    if not names:
        print("There are no results yet.")
        return
    for table in tables:
        rows = [(row, [paper] if paper else [], *(of_seeds(results, x, spec) for x in names))
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

def ship(checkpoint, path=SHIPPED):
    """A teacher's checkpoint in float16, its weights and config alone, for assets/."""
    tensors, _, config = tinymim.read_checkpoint(checkpoint)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save({"model": half, "config": config}, path)

def list_jobs(args, found):
    """What accuracy() is to be asked, and the keys of the results: [(spec, seed, labels, rates,
    key)]. With --tune, one row of each method, at several rates."""
    specs, jobs = list(dict.fromkeys(row[2] for row in ROWS if row[0] in args.tables)), []
    if args.tune is not None:
        tuned = "tune" if args.tune_epochs == 1 else f"tune{args.tune_epochs}"
        for method in args.tune or dict.fromkeys(map(method_of, specs)):
            for rates in rates_to_try(method, found if args.tune_epochs > 1 else None):
                key = f"{tuned}/{method}/{rates[0]:g} {rates[1]:g}"
                jobs.append((METHODS[method], 0, "tune", rates, key))
        return jobs
    for labels in args.labels:
        for seed, spec in [(seed, spec) for seed in args.seeds for spec in specs]:
            method = method_of(spec)
            if not any(key.startswith(f"tune/{method}/") for key in found):
                print(f"{method}: its learning rates are untried (--tune, or assets/*.json)")
            longer = "--epochs 10" in spec or "--epochs 30" in spec  # than the first tuning
            rates = best_rates(method, found, rates_to_try(method, found if longer else None),
                               "tune10" if longer else "tune")
            jobs.append((spec, seed, labels, rates, f"{labels}/{spec}/{seed}"))
    return jobs

def list_crops(args, jobs):
    """The crops that these rows will see: [(dataset, epoch)], without those that are there."""
    photos, needed = os.path.join(args.out, "data"), {}  # {(split or "pretrain", seed): epochs}
    for spec, seed, labels, *_ in jobs:
        epochs = fine_tuning_epochs(args, spec, labels)
        needed[labels, seed] = max(epochs, needed.get((labels, seed), 0))
        if spec not in ("scratch", "teacher"):
            epochs = epochs_of(args, spec)
            needed["pretrain", seed] = max(epochs, needed.get(("pretrain", seed), 0))
    crops = {}
    for (split, seed), epochs in needed.items():
        if split == "pretrain":
            paths = tinymim.find_images(os.path.join(photos, "all", "train"))
            dataset = parallel.KeptDataset(paths, tinymim.crop_and_flip(SIZE), seed)
        else:
            paths = finetune.read_folder(os.path.join(photos, split, "train"))[0]
            transform = finetune.train_transform(SIZE, CROP_SCALE, "crop")
            dataset = parallel.KeptDataset(paths, transform, seed)
            paths = finetune.read_folder(os.path.join(photos, split, "val"))[0]
            val = parallel.KeptDataset(paths, finetune.eval_transform(SIZE))
            crops[val.path(0)] = val, 0
        crops |= {dataset.path(epoch): (dataset, epoch) for epoch in range(epochs)}
    return [item for path, item in crops.items() if not os.path.exists(path)]

def side_by_side(args, jobs):
    """Yields (job, result) of all jobs, short ones first, as they end in --jobs processes."""
    groups, began, log = {}, time.monotonic(), os.path.join(args.out, "log")
    for job in sorted(jobs, key=lambda job: epochs_of(args, job[0])):
        groups.setdefault(folder_of(args, *job[:4]), []).append(job)  # they share a pre-training
    folder = parallel.KeptDataset.folder = os.path.join(args.out, "crops")
    os.makedirs(folder, exist_ok=True)
    crops = list_crops(args, jobs)
    gigabytes = sum(len(dataset) for dataset, _ in crops) * 3 * SIZE**2 / 1e9
    print(f"first {gigabytes:.1f} GB of crops into {folder}, then rows. Their output: {log}-*.txt")

    def finished(function, items, processes):
        left = args.seconds - (time.monotonic() - began)
        return parallel.in_processes(function, items, processes, left, folder, log)

    for _ in finished(parallel.make_epoch, crops, os.cpu_count()):
        pass
    for rows in finished(functools.partial(run_group, args), list(groups.values()), args.jobs):
        for job, result in rows:
            print(f"{time.monotonic() - began:.0f} s: {job[-1]} {result['top1']}", flush=True)
            yield job, result

def run_group(args, jobs):
    """In a process of its own: the results of rows that share a pre-training, when all are done."""
    args.machine = [*args.machine, "--workers", 0]
    if not torch.cuda.is_available():
        data.set_up_cpu()
    try:
        return [(job, accuracy(args, *job[:4])) for job in jobs]
    except SystemExit as error:  # which would end the process without a word
        raise UserError(str(error)) from None

def study(args):
    if args.ship:
        return ship(args.ship)
    path = os.path.join(args.out, "results.json")
    if args.print:
        return print_tables(data.results(path), args.tables)
    if args.smallest:
        args.data, args.batch_size, args.seeds = os.path.join(args.out, "shapes"), 16, [0]
        args.teacher_epochs = args.mae_epochs = args.distill_epochs = 1
        args.few_epochs = args.all_epochs = 1
        shapes.write(os.path.join(args.data, "train"), 160, seed=1, size=SIZE)
        shapes.write(os.path.join(args.data, "val"), 20, seed=2, size=SIZE)
    root = data.cifar10() if args.data == "cifar10" else args.data
    args.images = data.link_splits(root, args.out)
    tinymim.decode = functools.cache(tinymim.decode)  # small photos fit in memory: decode them once
    if torch.cuda.is_available():  # networks as small wait for their workers, and for compilation
        args.machine = ["--workers", os.cpu_count() - 1, "--no-compile"]
    else:
        args.machine = ["--workers", 0, *data.set_up_cpu()]
    if args.teacher == "new":
        folder = os.path.join(args.out, "teacher")
        args.teacher = pretrain(args, "mae", folder, blr=1.5e-3, network="teacher")
    if args.content:
        return content.print_content(args, path)

    if args.tune is not None:  # with shorter runs
        args.mae_epochs = round(args.tune_epochs * 10 / 3)
        args.distill_epochs, args.few_epochs = args.tune_epochs, 10
    found = data.results(path)
    jobs = [job for job in list_jobs(args, found) if job[-1] not in found]
    for spec, _, _, rates, _ in jobs:
        if "assistant" in spec:
            pretrain(args, "", os.path.join(args.out, "assistant"), 0, rates[0], "assistant")
    one_by_one = ((job, accuracy(args, *job[:4])) for job in jobs)
    for job, result in side_by_side(args, jobs) if args.jobs > 1 else one_by_one:
        data.results(path, job[-1], result)
    print_tables(data.results(path), args.tables if args.tune is None else [])
    if args.smallest:
        print("\nA smoke test: with networks and data as small these numbers say nothing.")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/study.py", description=__doc__.split("\n")[0])
    add, count = parser.add_argument, tinymim.COUNT
    tables = list(dict.fromkeys(row[0] for row in ROWS))
    add("--data", default="cifar10", help="or a folder with train/ and test/ or val/")
    add("--out", default="runs/study", help="folder for everything (default: runs/study)")
    add("--teacher", help="a checkpoint, or new (default: assets/cifar10_teacher.pth for cifar10)")
    add("--ship", metavar="FILE", help="make assets/cifar10_teacher.pth of a checkpoint of mae.py")
    add("--tables", nargs="+", choices=tables, help="default: those of the paper")
    add("--curve", action="store_true", help=f"the tables {', '.join(CURVE)}")
    add("--content", action="store_true", help="print how much of the relations the photo explains")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of student and fine-tuning")
    add("--labels", nargs="+", choices=("few", "all"), default=["few", "all"], help="a tenth, all")
    add("--tune", nargs="*", choices=METHODS, help="try rates, of these or of --tables's methods")
    add("--tune-epochs", type=count, default=1, help="of distillation; more than 1: three rates")
    add("--print", action="store_true", help="only print the tables of OUT/results.json")
    add("--smallest", action="store_true", help="try every row with tiny networks on drawn shapes")
    for name, epochs in (("teacher", 60), ("mae", 10), ("distill", 3), ("few", 20), ("all", 5)):
        add(f"--{name}-epochs", type=count, default=epochs, help=f"default: {epochs}")
    add("--batch-size", type=count, default=128, help="of pre-training; half in fine-tuning")
    add("--jobs", type=count, default=1, help="rows side by side (on a GPU 6 are best; default: 1)")
    add("--seconds", type=count, default=10**9, help="with --jobs: no longer than this")
    args = parser.parse_args(argv)
    if args.tables is None:
        args.tables = [name for name in tables if (name in CURVE) == args.curve or args.smallest]
    if args.teacher is None:
        shipped = args.data == "cifar10" and not args.smallest
        args.teacher = SHIPPED if shipped else "new"
    tinymim.run(parser, study, args)

if __name__ == "__main__":
    main()
