"""The paper's tables at small scale, and when relations beat features, on CIFAR-10 or your photos.

    python extras/cifar10.py --jpeg                         (the photos: data/cifar10-jpeg)
    python extras/study/study.py --tables T8 --seeds 0      (one table, one seed)
    python extras/study/study.py --jobs 6                   (all, six rows side by side on a GPU)
    python extras/study/study.py --print                    (the tables of results.json here)
    python extras/study/study.py --smallest                 (every row on drawn shapes: a test)

In each row (rows.py) a student learns in one way from one teacher, and is fine-tuned on a tenth of
the labels (few) or on all. The result is the last epoch's top-1 on the test photos. It goes with
its settings to a file in OUT/results/, and all of them to OUT/results.json. Stopped at any time,
the same command continues, and has lost an epoch of what was running. The teacher in assets/ is of

    python extras/mae.py --dim 192 --depth 6 --heads 6 --patch-size 4 --img-size 32 \\
        --decoder 96 2 3 --epochs 60 --batch-size 128 --blr 1.5e-3 --data data/cifar10-jpeg
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import finetune
import mae
import shapes
import targets
import tinymim
from results import collect, is_there, load_all, print_tables, write
from rows import ASSISTANT, ROWS, rates
from tinymim import UserError

FULL = {"teacher": (192, 6), "assistant": (144, 6), "student": (96, 3),  # width, heads
        "decoder": (96, 2, 3), "batch_size": 128}  # half of it in fine-tuning
SMALLEST = {"teacher": (24, 6), "assistant": (12, 3), "student": (12, 3),
            "decoder": (12, 1, 2), "batch_size": 16}
DEPTH, PATCH_SIZE, PHOTO_SIZE = 6, 4, 32  # of the teacher: blocks, pixels

# ---- What all rows share ------------------------------------------------------------------------

@dataclass(frozen=True)
class Shared:
    out: Path
    sizes: dict  # FULL or SMALLEST
    photos: dict  # how many have labels: {"few": 5000, "all": 50000}
    teacher: Path  # the copy in OUT
    machine: list  # options of the scripts
    identity: dict  # what a result says of teacher, data and device

def link_splits(root, out):
    """Links in OUT/data: all/ and few/, both with train/ and val/, the test photos. few/train has
    the first tenth of each class. Returns how many training photos each has."""
    train, test = root / "train", root / "test" if (root / "test").is_dir() else root / "val"
    paths, labels, classes = finetune.read_folder(train)
    if finetune.read_folder(test)[2] != classes:
        raise UserError(f"{train} and {test} have different classes")
    links = {"all/train": train, "all/val": test, "few/val": test}
    for label, name in enumerate(classes):
        photos = [Path(os.fsdecode(path)) for path in paths[labels == label]]
        for photo in photos[:math.ceil(len(photos) / 10)]:
            link = f"few/train/{name}/{photo.name}"
            if link in links:
                raise UserError(f"two photos of {name} have the same name: {photo}")
            links[link] = photo
    for link, photo in links.items():
        link = out / "data" / link
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.resolve() != photo.resolve():  # it is new, or the photos have moved
            link.unlink(missing_ok=True)
            link.symlink_to(photo.resolve())
    return {"few": len(links) - 3, "all": len(paths)}

def checksum_of_photos(root):
    """Of their names and contents: a few seconds for CIFAR-10."""
    checksum = 0
    for path in map(os.fsdecode, tinymim.find_images(root)):
        name = os.path.relpath(path, root).encode()
        checksum = zlib.crc32(Path(path).read_bytes(), zlib.crc32(name, checksum))
    return f"{checksum:08x}"

def copy_teacher(source, out, width, heads):
    """Copy it to OUT, as its file may be replaced while rows train. Returns path and checksum."""
    copy = out / f"teacher.{os.getpid()}.part"
    shutil.copyfile(source, copy)
    tensors, found, _ = tinymim.read_checkpoint(copy)
    wanted = dict(dim=width, depth=DEPTH, heads=heads, patch_size=PATCH_SIZE, img_size=PHOTO_SIZE)
    if found != wanted:
        raise UserError(f"the rows are for a teacher with {wanted}: {source} has {found}")
    checksum = f"{zlib.crc32(b''.join(t.numpy().tobytes() for t in tensors.values())):08x}"
    return copy.replace(out / f"teacher-{checksum}.pth"), checksum

def use_machine(jobs):
    """What suits networks this small: options of the scripts, and the device's name in results."""
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads would wait for each other
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options = ["--workers", max(1, cores // jobs), "--no-compile", "--amp", "off"]
        return options, f"{torch.cuda.get_device_name()}, float32 (TF32)"
    amp = "bf16" if torch.cpu._is_avx512_bf16_supported() else "off"  # elsewhere bf16 is slower
    return ["--workers", 0, "--amp", amp], "cpu, float32" if amp == "off" else "cpu, bf16"

def prepare(out, data, teacher, jobs, sizes):
    """Put teacher and splits into OUT. All that is in one OUT is of one teacher, data, device."""
    if not data.is_dir():
        raise UserError(f"there is no {data} (extras/cifar10.py --jpeg makes data/cifar10-jpeg)")
    (out / "results").mkdir(parents=True, exist_ok=True)
    machine, device = use_machine(jobs)
    teacher, checksum = copy_teacher(teacher, out, *sizes["teacher"])
    identity = dict(teacher=checksum, device=device,
                    data=f"{data.resolve().name} ({checksum_of_photos(data)})")
    if not is_there(out / "study.json", identity):
        write(out / "study.json", json.dumps(identity))
    return Shared(out, sizes, link_splits(data, out), teacher, machine, identity)

def draw_smallest(out):
    """Ten kinds of shapes, four of each, and a teacher that knows nothing. Returns their paths."""
    folder, teacher = out / "shapes", out / "random.pth"
    shapes.write(folder / "train", 40, seed=1, size=PHOTO_SIZE)
    shapes.write(folder / "val", 20, seed=2, size=PHOTO_SIZE)
    torch.manual_seed(0)
    vit = tinymim.ViT(24, DEPTH, 6, PATCH_SIZE, PHOTO_SIZE)
    torch.save({"model": vit.state_dict(), "config": vit.config}, teacher)
    return folder, teacher

# ---- A row --------------------------------------------------------------------------------------

def run(main, folder, *options):
    """main(options) of one of the scripts, continued if it was stopped. Returns its history."""
    main([*map(str, options), "--out", str(folder), "--resume"])
    return tinymim.load_file(folder / "last.pth")["history"]

def row_folder(shared, row, seed):
    """Rows that differ only in new_end share it, and their pre-training."""
    return shared.out / "students" / f"{replace(row, new_end=False).key}-seed-{seed}"

def size_options(shared, row):
    width, heads = shared.sizes[row.network]
    return ["--dim", width, "--depth", row.depth, "--heads", heads]

def pretrain(shared, row, seed):
    """Train the row's network, unless that is done. Returns its checkpoint."""
    folder = row_folder(shared, row, seed) / "pretrain"
    options = [*size_options(shared, row), "--data", shared.out / "data" / "all",
               "--epochs", row.epochs, "--batch-size", shared.sizes["batch_size"],
               "--blr", rates(row)[0], "--seed", seed, *shared.machine]
    if row.method == "mae" or "--mae" in row.options:
        options += ["--decoder", *shared.sizes["decoder"]]
    if row.method == "mae":
        run(mae.main, folder, *options, "--patch-size", PATCH_SIZE, "--img-size", PHOTO_SIZE)
    else:
        assistant = replace(ASSISTANT, epochs=row.epochs)  # one for all seeds
        teacher = pretrain(shared, assistant, 0) if row.by_assistant else shared.teacher
        options += ["--relations", *row.pairs.split()] if row.pairs else []
        run(targets.main, folder, *options, "--teacher", teacher, "--target", row.method,
            *row.options)
    return renew_end(folder, seed) if row.new_end else folder / "last.pth"

def renew_end(folder, seed):
    """A copy of the checkpoint in which what follows the last block's q, k and v is new."""
    tensors, sizes, config = tinymim.read_checkpoint(folder / "last.pth")
    torch.manual_seed(seed)
    new = tinymim.ViT(**sizes).state_dict()
    last = f"blocks.{sizes['depth'] - 1}."
    end = (f"{last}attn.proj", f"{last}norm2", f"{last}mlp", "norm.")
    tensors |= {name: tensor for name, tensor in new.items() if name.startswith(end)}
    torch.save({"model": tensors, "config": config}, folder / "new-end.pth")
    return folder / "new-end.pth"

def settings(shared, row, labels, seed):
    """All that a result depends on."""
    return dict(row=row.key, labels=labels, photos=shared.photos[labels], seed=seed,
                epochs=row.epochs,
                fine_tuning_epochs=row.few_epochs if labels == "few" else row.all_epochs,
                batch_size=shared.sizes["batch_size"], blr=list(rates(row)), **shared.identity)

def result_path(shared, row, labels, seed):
    return shared.out / "results" / f"{row.key}-{labels}-seed-{seed}.json"

def accuracy(shared, row, labels, seed):
    """Pre-train, fine-tune on OUT/data/LABELS/train, test on its val. Returns the result."""
    result = settings(shared, row, labels, seed)
    if row.method == "scratch":
        start = ["--checkpoint", "none", *size_options(shared, row),
                 "--patch-size", PATCH_SIZE, "--img-size", PHOTO_SIZE]
    else:
        checkpoint = shared.teacher if row.method == "teacher" else pretrain(shared, row, seed)
        start = ["--checkpoint", checkpoint, "--layer-decay", 0.75]
    epochs, name = result["fine_tuning_epochs"], labels + "-new-end" * row.new_end
    history = run(finetune.main, row_folder(shared, row, seed) / name, *start,
                  "--data", shared.out / "data" / labels, "--blr", rates(row)[1],
                  "--epochs", epochs, "--eval-every", epochs, "--drop-path", 0, "--seed", seed,
                  "--batch-size", shared.sizes["batch_size"] // 2, "--augment", "crop",
                  "--crop-scale", 0.5, *shared.machine)
    result["top1"] = round(history[-1]["top1"], 2)
    write(result_path(shared, row, labels, seed), json.dumps(result))
    return result

# ---- Rows one after the other, or side by side --------------------------------------------------

def list_jobs(shared, rows, labels, seeds):
    """What is not done yet, in groups that share a pre-training. Short ones come first."""
    rows = sorted({row.key: row for row in rows}.values(), key=lambda row: row.epochs)
    groups = {}
    for job in itertools.product(rows, labels, seeds):
        row, _, seed = job
        if not is_there(result_path(shared, *job), settings(shared, *job)):
            name = "assistant" if row.by_assistant else row_folder(shared, row, seed)
            groups.setdefault(name, []).append(job)
    return list(groups.values())

def run_group(shared, jobs):
    # For so few tokens and in bf16, a CPU's fused attention is slower than the plain formula.
    on_gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH):
        return [accuracy(shared, *job) for job in jobs]

def set_up(log):
    """In each process. Its output goes to the file `log`-PROCESS.txt. It ends with its parent."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(f"{log}-{os.getpid()}.txt", "a", buffering=1)

def side_by_side(function, items, processes, log):
    """Yields function(item) of all items, as they end. Networks this small leave a GPU idle."""
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, set_up, (log,))
    try:
        tasks = [pool.submit(function, item) for item in items]
        for task in concurrent.futures.as_completed(tasks):
            yield task.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(f"a process was killed, for its memory perhaps: see {log}-*.txt, or try "
                        "fewer --jobs") from None
    except BaseException:  # of one row: do not wait for the others
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)

# ---- The command line ---------------------------------------------------------------------------

def study(args):
    if args.print:
        return print_tables(load_all(args.print), args.tables, ROWS)
    rows, sizes, data, teacher = ROWS, FULL, args.data, args.teacher
    if args.smallest:
        rows = [replace(row, epochs=min(row.epochs, 1), few_epochs=1, all_epochs=1) for row in ROWS]
        sizes, (data, teacher) = SMALLEST, draw_smallest(args.out)
    shared = prepare(args.out, data, teacher, args.jobs, sizes)
    chosen = [row for row in rows if row.table in args.tables]
    groups = list_jobs(shared, chosen, args.labels, args.seeds)
    run_rows, log = functools.partial(run_group, shared), args.out / "log"
    done = map(run_rows, groups)
    if args.jobs > 1:
        print(f"{len(groups)} students to train. What the rows print: {log}-*.txt", flush=True)
        done = side_by_side(run_rows, groups, args.jobs, log)
    for results in done:
        collect(args.out)
        for result in results:
            print(f"{result['row']}, {result['labels']} labels, seed {result['seed']}: "
                  f"{result['top1']}", flush=True)
    print_tables(load_all(collect(args.out)), args.tables, rows)

def main(argv=None):
    summary, examples = __doc__.split("\n\n")[:2]
    parser = argparse.ArgumentParser("extras/study/study.py", description=summary, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, tables = parser.add_argument, list(dict.fromkeys(row.table for row in ROWS))
    add("--data", type=Path, default=Path("data", "cifar10-jpeg"),
        help="folder with train/ and test/ or val/ (default: %(default)s)")
    add("--teacher", type=Path, default=ROOT / "assets" / "cifar10_teacher.pth",
        help="a checkpoint of extras/mae.py (default: assets/cifar10_teacher.pth)")
    add("--out", type=Path, help="folder for everything (default: runs/study or runs/smallest)")
    add("--tables", nargs="+", metavar="TABLE", choices=tables, default=tables,
        help=f"of {' '.join(tables)} (default: all)")
    add("--seeds", nargs="+", type=tinymim.between(int, 0), metavar="SEED",
        help="of student and fine-tuning (default: 0 1 2, --smallest: 0)")
    add("--labels", nargs="+", choices=("few", "all"), default=["few", "all"],
        help="few: a tenth (default: few all)")
    add("--jobs", type=tinymim.COUNT, default=1, help="rows side by side (default: 1)")
    add("--smallest", action="store_true", help="tiny networks on drawn shapes: a test")
    add("--print", nargs="?", type=Path, metavar="RESULTS", const=HERE / "results.json",
        help="only print the tables of a results.json (default: the one here)")
    args = parser.parse_args(argv)
    mode, ignored = "smallest", ("data", "teacher") if args.smallest else ()
    if args.print:
        mode, ignored = "print", vars(args).keys() - {"print", "tables"}
    for name in ignored:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect with --{mode}")
    args.out = args.out or Path("runs", "smallest" if args.smallest else "study")
    args.seeds = args.seeds or ([0] if args.smallest else [0, 1, 2])
    tinymim.run(parser, study, args)

if __name__ == "__main__":
    main()
