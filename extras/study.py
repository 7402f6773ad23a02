"""The paper's tables at small scale, and when relations beat features, on CIFAR-10 or your photos.

    python extras/study.py --tables T8                          (or some; default: the paper's)
    python extras/study.py --tables length content depth end    (when do relations beat features?)
    python extras/study.py --data FOLDER --teacher new --tune   (your photos: first learning rates)
    python extras/study.py --smallest                           (every row, on drawn shapes: a test)

In each row (rows.py) a student learns in one way from a teacher, for CIFAR-10 that in assets/, and
is fine-tuned on a tenth of the labels or on all. The last epoch's top-1 on the test photos counts.
OUT/results.json keeps it with its settings; a stop costs an epoch. Other --seeds can run beside,
once there are OUT/data and the teachers.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import time
import zlib

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import data
import finetune
import mae
import parallel
import shapes
import targets
import tinymim
from rows import METHODS, ROWS, best_rates, method_of, rates_to_try, tune_key
from tinymim import UserError

NETWORKS = {  # width, depth, heads
    "teacher": (192, 6, 6), "assistant": (144, 5, 6), "student": (96, 4, 3)}
SMALLEST = {"teacher": (24, 6, 6), "assistant": (12, 5, 3), "student": (12, 4, 3)}
SIZE, CROP_SCALE = 32, 0.5  # of the photos, in pixels, and of fine-tuning's crops, at least

def sizes(args, network):
    numbers = (SMALLEST if args.smallest else NETWORKS)[network]
    return [word for option in zip(("--dim", "--depth", "--heads"), numbers) for word in option]

def run(main, folder, *options):
    """main(options) of one of the scripts, continued if it was stopped. Returns its history."""
    main([*map(str, options), "--out", folder, "--resume"])
    return tinymim.load_file(os.path.join(folder, "last.pth"))["history"]

def epochs_of(args, spec):
    """How many epochs of pre-training a row has. MAE has 10/3 as many: as much to compute."""
    words = spec.split()
    if args.smallest:
        return 1
    epochs = int(words[words.index("--epochs") + 1]) if "--epochs" in words else args.distill_epochs
    return round(epochs * 10 / 3) if "mae" in words else epochs

def pretrain(args, spec, folder, seed, blr, network="student"):
    """Pre-train as `spec` says, unless that is done. Returns the checkpoint."""
    assistant = os.path.join(args.out, "assistant", "last.pth")
    words = spec.replace("new-end", "").replace("deep", "--depth 12").split()
    words = [assistant if word == "assistant" else word for word in words]
    decoder = (12, 1, 2) if args.smallest else (96, 2, 3)
    epochs = args.teacher_epochs if network == "teacher" else epochs_of(args, spec)
    options = [*sizes(args, network), "--data", os.path.join(args.out, "data", "all"),
               "--batch-size", args.batch_size, "--blr", blr, "--seed", seed, *args.machine,
               "--decoder", *decoder]
    if "mae" in words:
        options += ["--patch-size", 4, "--img-size", SIZE]
        run(mae.main, folder, *options, "--epochs", epochs)
    else:
        run(targets.main, folder, *options, "--teacher", args.teacher, *words, "--epochs", epochs)
    checkpoint = os.path.join(folder, "last.pth")
    return renew_end(checkpoint, seed) if "new-end" in spec else checkpoint

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
        updates = epochs_of(args, "mae") * (args.images // args.batch_size)
        epochs += math.ceil(updates / max(1, len(photos) // (args.batch_size // 2)))
    return epochs

def folder_of(args, spec, seed, labels, rates):
    """For a row's pre-training, and its fine-tunings. new-end changes only what follows."""
    name = spec.replace(" new-end", "").replace("--", "").replace(" ", "-") or "relation"
    tune = f"-tune{args.tune_epochs}" if labels == "tune" else ""
    return os.path.join(args.out, f"{name}-seed{seed}-{rates[0]:g}{tune}")

def settings(args, spec, labels, rates):
    """On what a result depends, besides the row and the seed."""
    found = dict(fine_tuning_epochs=fine_tuning_epochs(args, spec, labels), blr=list(rates),
                 batch_size=args.batch_size, teacher=args.teacher_name)
    if spec not in ("scratch", "teacher"):
        found["epochs"] = epochs_of(args, spec)
    return found

def accuracy(args, spec, seed, labels, rates):
    """Pre-train as a row says, fine-tune on OUT/data/`labels`/train, test on its val. Returns the
    result: top-1 and settings."""
    folder = folder_of(args, spec, seed, labels, rates)
    result, start = settings(args, spec, labels, rates), args.teacher
    epochs, options = result["fine_tuning_epochs"], ["--layer-decay", 0.75]
    if spec == "scratch":
        start, options = "none", [*sizes(args, "student"), "--patch-size", 4, "--img-size", SIZE]
    elif spec != "teacher":
        start = pretrain(args, spec, os.path.join(folder, "pretrain"), seed, rates[0])
    tuned = os.path.join(folder, f"{labels}-{rates[1]:g}{'-new-end' * ('new-end' in spec)}")
    history = run(finetune.main, tuned, *options, *args.machine,
                  "--checkpoint", start, "--data", os.path.join(args.out, "data", labels),
                  "--epochs", epochs, "--eval-every", epochs, "--drop-path", 0,
                  "--batch-size", args.batch_size // 2, "--blr", rates[1], "--seed", seed,
                  "--augment", "crop", "--crop-scale", CROP_SCALE)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return result | dict(top1=round(history[-1]["top1"], 2), device=device)

def print_tables(results, tables):
    """Markdown: mean ± deviation over the seeds (difference to row 1, of the seeds in both)."""
    names = {"few": "a tenth of the labels", "all": "all labels"}
    for table in tables:
        rows = [(row, {0: paper} if paper else {},
                 *(data.of_seeds(results, labels, spec) for labels in names))
                for name, row, spec, paper in ROWS if name == table]
        header = [f"{table} (difference to row 1)", "paper", *names.values()]
        print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for row in rows:
            cells = row[:1]
            for values, first in zip(row[1:], rows[0][1:]):
                text = f"{statistics.mean(values.values()):.1f}" if values else ""
                text += f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
                differences = [values[seed] - first[seed] for seed in values if seed in first]
                if differences and row != rows[0]:
                    text += f" ({statistics.mean(differences):+.1f})"
                cells += (text,)
            print(f"| {' | '.join(cells)} |")

def list_jobs(args, found):
    """What accuracy() is to be asked, and the keys of the results: [(spec, seed, labels, rates,
    key)]. With --tune, one row of each method, at several rates."""
    specs, jobs = list(dict.fromkeys(row[2] for row in ROWS if row[0] in args.tables)), []
    if args.tune is not None:
        for method in args.tune or dict.fromkeys(map(method_of, specs)):
            for rates in dict.fromkeys(rates_to_try(method, found, args.tune_epochs)):
                key = tune_key(method, rates, args.tune_epochs)
                jobs.append((METHODS[method][0], 0, "tune", rates, key))
        return jobs
    for labels in args.labels:
        for seed, spec in [(seed, spec) for seed in args.seeds for spec in specs]:
            rates = best_rates(method_of(spec), found)
            jobs.append((spec, seed, labels, rates, f"{labels}/{spec}/{seed}"))
    return jobs

def is_done(args, job, found, path):
    """Whether its result is in `found`, what `path` holds. One of other settings is an error."""
    spec, _, labels, rates, key = job
    wanted = settings(args, spec, labels, rates)
    if key in found and not wanted.items() <= found[key].items():
        raise UserError(f"{path} has {key} with {found[key]}, not {wanted}: choose another --out")
    return key in found

def list_crops(args, jobs):
    """The crops that these rows will see: [(dataset, epoch)], without those that are there."""
    transforms = {"pretrain": tinymim.crop_and_flip(SIZE), "val": finetune.eval_transform(SIZE),
                  "train": finetune.train_transform(SIZE, CROP_SCALE, "crop")}
    needed, crops = {}, []  # {(split, a name in transforms, seed): epochs}
    for spec, seed, labels, *_ in jobs:
        epochs = {(labels, "train", seed): fine_tuning_epochs(args, spec, labels),
                  (labels, "val", 0): 1}
        if spec not in ("scratch", "teacher"):
            epochs["all", "pretrain", seed] = epochs_of(args, spec)
        needed |= {key: max(count, needed.get(key, 0)) for key, count in epochs.items()}
    for (split, name, seed), epochs in needed.items():
        folder = os.path.join(args.out, "data", split, "val" if name == "val" else "train")
        is_pretraining = name == "pretrain"  # tinymim.py and finetune.py order paths differently
        paths = tinymim.find_images(folder) if is_pretraining else finetune.read_folder(folder)[0]
        dataset = parallel.KeptDataset(paths, transforms[name], seed)
        crops += [(dataset, epoch) for epoch in range(epochs)]
    return [(dataset, epoch) for dataset, epoch in crops if not os.path.exists(dataset.path(epoch))]

def side_by_side(args, jobs):
    """Yields (job, result) as they end in --jobs processes, those with short pre-training first."""
    groups, began, log = {}, time.monotonic(), os.path.join(args.out, "log")
    for job in sorted(jobs, key=lambda job: epochs_of(args, job[0])):
        groups.setdefault(folder_of(args, *job[:4]), []).append(job)  # they share a pre-training
    folder = parallel.KeptDataset.folder = os.path.join(args.out, "crops")
    os.makedirs(folder, exist_ok=True)
    crops = list_crops(args, jobs)
    gigabytes = sum(len(dataset) for dataset, _ in crops) * 3 * SIZE**2 / 1e9
    print(f"first {gigabytes:.1f} GB of crops into {folder}, then rows. Their output: {log}-*.txt")
    for _ in parallel.in_processes(parallel.make_epoch, crops, os.cpu_count(), folder, log):
        pass
    run = functools.partial(run_group, args)
    for rows in parallel.in_processes(run, list(groups.values()), args.jobs, folder, log):
        for job, result in rows:
            print(f"{time.monotonic() - began:.0f} s: {job[-1]} {result['top1']}", flush=True)
            yield job, result

def run_group(args, jobs):
    """In a process of its own: the results of rows that share a pre-training, when all are done."""
    args.machine = [*args.machine, "--workers", 0]
    if not torch.cuda.is_available():
        data.set_up_cpu()
    return [(job, accuracy(args, *job[:4])) for job in jobs]

def study(args):
    path = os.path.join(args.out, "results.json")
    if args.print:
        return print_tables(data.results(path), args.tables)
    if args.teacher is None:
        args.teacher = "new" if args.smallest else data.CIFAR10_TEACHER
        if args.data != "cifar10":
            raise UserError("--teacher new trains one on these photos; or name a checkpoint")
    if args.smallest:
        args.data, args.batch_size, args.seeds = os.path.join(args.out, "shapes"), 16, [0]
        args.teacher_epochs = args.few_epochs = args.all_epochs = 1
        shapes.write(os.path.join(args.data, "train"), 160, seed=1, size=SIZE)
        shapes.write(os.path.join(args.data, "val"), 20, seed=2, size=SIZE)
    root = data.cifar10() if args.data == "cifar10" else args.data
    args.images = data.link_splits(root, args.out)
    data.keep_small_photos()
    if torch.cuda.is_available():  # where such small networks wait for all but the GPU
        args.machine = ["--workers", os.cpu_count() - 1, "--no-compile", "--amp", "off"]
    else:
        args.machine = ["--workers", 0, *data.set_up_cpu()]
    if args.teacher == "new":
        folder = os.path.join(args.out, "teacher")
        args.teacher = pretrain(args, "mae", folder, 0, 1.5e-3, "teacher")
    tensors, sizes, _ = tinymim.read_checkpoint(args.teacher)
    if (sizes["depth"], sizes["patch_size"], sizes["img_size"]) != (6, 4, SIZE):
        raise UserError("the rows are for a teacher of 6 blocks, patches of 4 pixels and photos of "
                        f"{SIZE}: {args.teacher} has {sizes}")
    weights = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    args.teacher_name = f"{os.path.basename(args.teacher)} ({zlib.crc32(weights):08x})"

    if args.tune is not None:  # with shorter runs
        args.distill_epochs, args.few_epochs = args.tune_epochs, 10
    found = data.results(path)
    jobs = [job for job in list_jobs(args, found) if not is_done(args, job, found, path)]
    for spec, _, _, rates, _ in jobs:
        if "assistant" in spec:
            pretrain(args, "", os.path.join(args.out, "assistant"), 0, rates[0], "assistant")
    one_by_one = ((job, accuracy(args, *job[:4])) for job in jobs)
    for job, result in side_by_side(args, jobs) if args.jobs > 1 else one_by_one:
        data.results(path, job[-1], result)
    if args.tune is None:
        print_tables(data.results(path), args.tables)
    if args.smallest:
        print("\nA smoke test: with such small networks and data these numbers say nothing.")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/study.py", description=__doc__.split("\n")[0])
    add, count = parser.add_argument, tinymim.COUNT
    tables = list(dict.fromkeys(row[0] for row in ROWS))
    add("--data", default="cifar10", help="or a folder with train/ and test/ or val/")
    add("--out", help="folder for everything (default: runs/study or runs/smallest)")
    add("--teacher", help="a checkpoint, or new to train one (cifar10: assets/cifar10_teacher.pth)")
    add("--tables", nargs="+", choices=tables, help="default: those of the paper")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of student and fine-tuning")
    add("--labels", nargs="+", choices=("few", "all"), default=["few", "all"], help="a tenth, all")
    add("--tune", nargs="*", choices=METHODS, help="try rates, of these or of --tables's methods")
    add("--tune-epochs", type=count, default=1, help="of distillation; more than 1: three rates")
    add("--print", action="store_true", help="only print the tables of OUT/results.json")
    add("--smallest", action="store_true", help="try every row with tiny networks on drawn shapes")
    for name, epochs in (("teacher", 60), ("distill", 3), ("few", 20), ("all", 5)):
        add(f"--{name}-epochs", type=count, default=epochs, help=f"default: {epochs}")
    add("--batch-size", type=tinymim.between(int, 2), default=128, help="half in fine-tuning")
    add("--jobs", type=count, default=1, help="rows side by side (on a GPU 6 are best; default: 1)")
    args = parser.parse_args(argv)
    args.tables = args.tables or [name for name in tables if name[0] == "T" or args.smallest]
    args.out = args.out or ("runs/smallest" if args.smallest else "runs/study")
    tinymim.run(parser, study, args)

if __name__ == "__main__":
    main()
