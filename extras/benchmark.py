"""How fast this machine distils and fine-tunes, where the time goes, and what ImageNet would cost.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --student base --teacher mae_large --json > speed.json
    python extras/benchmark.py --data /path/to/imagenet --variants compiled finetune

Variants: "usual" is distilling as one would write it, in fp16 on a GPU (where the gradient scaler
waits for it in every step), in float32 on the CPU. "eager" and "compiled" are tinymim.py,
"checkpoint", "matmul" and "both" changes to it (see variants.py). "finetune" is finetune.py, by its
recipe; --data must hold what it needs. Networks have random weights, which take as long.

Of each, a step is measured, on a batch that is there: its time and peak memory. --measure adds:
    parts     of a step of distilling, and the share of a large matrix product's rate that it has
              (counting the products and convolutions of the formulas)
    training  images/s from files to updates, at a steady rate, and hours for ImageNet at that rate
    pipeline  images/s of the workers alone: in the long run, training cannot exceed them
"""

import argparse
import itertools
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from timeit import default_timer as clock
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.data import Subset, default_collate
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
import variants
from tinymim import COUNT, DTYPES, UserError

VARIANTS = ("usual", "eager", "compiled", "checkpoint", "matmul", "both", "finetune")
IMAGENET = 1_281_167  # images

# ---- 1. The clock --------------------------------------------------------------------------------

WARM_UP = 3  # steps that are not timed: compilation, the choice of kernels
AHEAD = 2  # batches that each worker makes before anybody asks for them: DataLoader's default

def fewest_steps(workers):
    """Several times the batches made ahead. It smooths how unevenly workers deliver."""
    return max(8, 4 * AHEAD * workers)

class SteadyLoader:
    """Batches for tinymim.fit, and the rate at which it takes `steps` of them.

    During the first steps, workers get ahead: up to `ready` batches then lie there. To count them
    would show a rate that no long training has. So they are thrown away before the clock starts,
    and the workers have more to make when it stops.
    """
    def __init__(self, batches, steps, args, ready=0):
        self.batches, self.steps, self.args, self.ready = batches, steps, args, ready
        self.sampler = self  # fit calls its set_epoch

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return WARM_UP + self.steps + 1

    def __iter__(self):
        batches, waited, on_gpu = iter(self.batches), 0.0, self.args.device == "cuda"
        finish = torch.cuda.synchronize if on_gpu else lambda: None
        for _ in range(WARM_UP):
            yield next(batches)
        for _ in range(2 * self.ready):  # twice: workers go on while the first are thrown away
            next(batches)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        finish()
        began = clock()
        for _ in range(self.steps):
            asked = clock()
            batch = next(batches)
            waited += clock() - asked
            yield batch
        finish()
        seconds = clock() - began  # fit asks for another batch: all steps are done
        self.rate = self.steps * self.args.batch_size / seconds  # images/s
        self.waiting = 100 * waited / seconds  # % of the time
        self.batches = None  # the workers end with the epoch
        yield batch

def load_files(dataset, args, workers, steps):
    """A SteadyLoader with the workers of tinymim.fit. Images are repeated as often as needed."""
    ready = AHEAD * workers
    batches = WARM_UP + 2 * ready + steps + ready
    keys = np.random.RandomState(0).randint(2**31, size=batches * args.batch_size)
    args = argparse.Namespace(**vars(args) | {"workers": workers})
    return SteadyLoader(tinymim.make_loader(Subset(dataset, keys), args), steps, args, ready)

# ---- 2. Measurements, in a process for each variant ----------------------------------------------

fit = tinymim.fit  # measure() takes its place

def measure(objective, dataset, prepare, optimizer, args, *_):
    """In the place of tinymim.fit. Prints table rows, and leaves them in args.tables."""
    one_epoch = argparse.Namespace(**vars(args) | {"epochs": 1})
    if args.variant == "usual":
        dataset = variants.UsualDataset(dataset.paths, dataset.transform)  # makes both views
        prepare, optimizer = lambda *views: views, torch.optim.AdamW(objective.student.parameters())
    name = f"{args.variant}, {DTYPES[args.amp] or torch.float32}".replace("torch.", "")
    if args.compile and args.variant != "compiled":
        name += ", compiled"

    def train(loader):
        with mock.patch.multiple(tinymim, make_loader=lambda *_: loader, load_run=lambda *_: [],
                                 save_run=mock.DEFAULT, print_run=mock.DEFAULT):
            fit(objective, dataset, prepare, optimizer, one_epoch)

    def add(table, row):
        args.tables[table] = {"variant": name} | row
        print(table, json.dumps(args.tables[table]), flush=True)

    items = [dataset[key] for key in range(args.batch_size)]
    batch = [tensor.to(args.device) for tensor in default_collate(items)]
    loader = SteadyLoader(itertools.repeat(batch), args.repeats, args)
    train(loader)
    add("step", {"step, ms": 1000 * args.batch_size / loader.rate, "images/s": loader.rate,
                 "peak memory, GiB": peak_memory(args)})
    if "parts" in args.measure and args.variant != "finetune":
        add("parts", measure_parts(objective, batch, prepare, optimizer, loader.rate, args))
    if "training" in args.measure:
        loader = load_files(dataset, args, args.workers, args.steps)
        train(loader)
        add("end to end", {"images/s": loader.rate, "waiting for data, %": loader.waiting,
                           "epochs of ImageNet": args.epochs,
                           "hours for them": args.epochs * IMAGENET / loader.rate / 3600})
    if "pipeline" in args.measure:
        row = {"KiB per image": sum(tensor.nbytes for tensor in batch) / 1024 / args.batch_size}
        for workers in sorted({1, args.workers}):
            steps = args.steps if workers == args.workers else fewest_steps(workers)
            loader = load_files(dataset, args, workers, steps)
            for _ in loader:
                pass
            row[f"images/s, {workers} worker{'s' * (workers != 1)}"] = loader.rate
        add("pipeline", row)

def peak_memory(args):  # in GiB
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

def measure_parts(objective, batch, prepare, optimizer, rate, args):
    """Table row: the parts of a step, each by itself, and how near they are to the ceilings."""
    autocast = torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off")
    teacher_qkv, student_qkv, relation_loss = (
        autocast(torch.compile(function, disable=not args.compile)) for function in
        (objective.teacher.qkv_at, objective.student.qkv_at, tinymim.relation_loss))
    student_images, teacher_images = prepare(*batch)

    @torch.no_grad()
    def teacher():
        return teacher_qkv(teacher_images, objective.teacher_block)

    def student():  # leaves gradients for the optimiser, small ones: fp16 must not overflow
        optimizer.zero_grad()
        qkv = student_qkv(student_images, objective.student.depth)
        torch.autograd.backward(qkv, [x.detach() / 1000 for x in qkv])
        return qkv

    target, predicted = teacher(), [x.detach().requires_grad_() for x in student()]

    def relations():
        losses = relation_loss(predicted, target, objective.relation_heads, objective.pairs)
        torch.autograd.grad(sum(losses.values()), predicted)

    n, size = (8192, 2**30) if args.device == "cuda" else (2048, 2**28)
    a, b = torch.randn(2, n, n, device=args.device).to(DTYPES[args.amp] or torch.float32)
    source, there = torch.zeros(2, size, dtype=torch.uint8, device=args.device)
    parts = {"views": lambda: prepare(*batch), "teacher": teacher, "student": student,
             "relation loss": relations, "optimiser": optimizer.step}
    ceilings = {"product": lambda: a @ b, "copy": lambda: there.copy_(source)}
    seconds, gflop, threads = {}, {}, torch.get_num_threads()
    for name, function in (parts | ceilings).items():
        timer = Timer("f()", globals={"f": function}, num_threads=threads)
        seconds[name] = timer.timeit(args.repeats).mean
    for name in ("teacher", "student", "relation loss"):  # per image; the others have no products
        with (FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH),
              torch.compiler.set_stance("force_eager")):
            parts[name]()
        gflop[name] = counter.get_total_flops() / 1e9 / args.batch_size
    product = 2 * n**3 / 1e9 / seconds["product"]  # GFLOP/s
    teaching = gflop["teacher"] * args.batch_size / seconds["teacher"]
    return ({f"{name}, ms": 1000 * seconds[name] for name in parts}
            | {f"{name}, GFLOP per image": value for name, value in gflop.items()}
            | {"product, TFLOP/s": product / 1000, "teacher, % of it": 100 * teaching / product,
               "step, % of it": 100 * sum(gflop.values()) * rate / product,
               "copy, read and written, GB/s": 2 * size / 1e9 / seconds["copy"]})

def measure_variant(args):
    """In a process of its own: {table: row}."""
    sys.stdout = sys.stderr
    torch.multiprocessing.set_start_method(None, force=True)  # workers start as in a run
    args.tables, tinymim.fit = {}, measure
    variants.train(args)
    return args.tables

# ---- 3. Command line -----------------------------------------------------------------------------

def benchmark(args):
    on_gpu = args.device == "cuda"
    args.batch_size = args.batch_size or (256 if on_gpu else 8)
    args.repeats = args.repeats or (50 if on_gpu else 3)
    tinymim.setup(args)  # settles --workers
    fewest = fewest_steps(args.workers)
    args.steps = args.steps or fewest
    args.variants = args.variants or VARIANTS[:3 if args.compile else 2]
    if args.accum > 1:
        raise UserError("--accum is not measured")
    if args.steps < fewest:
        raise UserError(f"--steps {args.steps} is too few for a steady rate, as workers make "
                        f"{AHEAD * args.workers} batches ahead: {fewest}, or fewer --workers")
    names = ("student", "teacher", "img_size", "batch_size", "workers", "steps", "repeats")
    result = {"machine": {"GPU": torch.cuda.get_device_name() if on_gpu else None,
                          "processor": platform.processor() or platform.machine(),
                          "cores": os.cpu_count(), "torch": torch.__version__},
              "options": {name: getattr(args, name) for name in names}}
    for variant in args.variants:
        options = argparse.Namespace(**vars(args), variant=variant)
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            rows = pool.submit(measure_variant, options).result()
        for table, row in rows.items():
            result.setdefault(table, []).append(row)
    print(json.dumps(result, indent=1)) if args.json else print_tables(result)

def print_tables(result):  # in Markdown
    for name, rows in result.items():
        rows = rows if isinstance(rows, list) else [rows]
        print(f"\n{name}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()]
            print("| " + " | ".join(cells) + " |")

def main(argv=None):
    recipe = tinymim.RECIPE | dict(batch_size=None, img_size=224)
    parser = tinymim.make_parser("extras/benchmark.py", __doc__, recipe, teacher=True)
    kinds = ("parts", "training", "pipeline")
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS,
        help="default: usual, eager and, unless --no-compile, compiled")
    add("--measure", nargs="*", choices=kinds, default=kinds, help="besides a step (default: all)")
    add("--steps", type=COUNT, help="timed with workers (default: 4 for each batch made ahead)")
    add("--repeats", type=COUNT, help="timed without them (default: 50 on a GPU, 3 on the CPU)")
    add("--json", action="store_true", help="print JSON instead of tables")
    tinymim.run(parser, benchmark, parser.parse_args(argv))

if __name__ == "__main__":
    main()
