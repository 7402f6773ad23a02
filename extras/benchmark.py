"""How fast this machine distils, where the time goes, and how much of what the machine can do that is.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --data /path/to/images --student small --teacher mae_large --json > speed.json

Compares tinymim.py with the usual way to write the same training: Pillow decodes, crops and jitters image by
image, attention and relations are as their formulas say, in fp16 on a GPU (where the gradient scaler waits
for it in every step), in float32 on the CPU. The teacher has random weights, which take as long.

1. Training step, with compilation (on the CPU also bf16) on and off: its parts, peak memory, and its share of
   the rate of a large matrix product (counting the products and convolutions of the formulas).
2. End to end: epochs of tinymim.fit, and the share of them that it waits for data, from the first batch on.
3. Input pipeline: images/s of one worker and of all.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from timeit import default_timer as clock, repeat

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import DTYPES, ImageDataset, ViT

# Name: (dim, depth, heads, patch size).
TEACHERS = {"mae_base": (768, 12, 12, 16), "mae_large": (1024, 24, 16, 16), "mae_huge": (1280, 32, 16, 14)}

# ---- 1. The usual way --------------------------------------------------------------------------------------

class UsualDataset(ImageDataset):
    """The student's and the teacher's view of an image, float (3, H, W) each, made by Pillow."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    finish = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), tinymim.normalize])

    def __getitem__(self, key):
        with Image.open(os.fsdecode(self.paths[key % len(self)])) as image:
            crop = self.transform(image.convert("RGB"))
        return self.finish(self.jitter(crop)), self.finish(crop)

def usual_attention(q, k, v):  # (B, heads, N, dim/heads) each
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

def usual_relation(a, b, relation_heads):  # (B, N, D) each
    a, b = (x.unflatten(2, (relation_heads, -1)).transpose(1, 2) for x in (a, b))
    return (a @ b.transpose(2, 3) / a.shape[-1] ** 0.5).softmax(dim=-1).log()

# ---- 2. What is measured. args: all options, and of one way to train `usual`, `amp` and `compile`. ---------

def make_dataset(args, paths, usual):
    crop = v2.RandomResizedCrop(args.img_size, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
    return (UsualDataset if usual else ImageDataset)(paths, v2.Compose([crop, v2.RandomHorizontalFlip()]))

class Training:
    def __init__(self, args):
        self.args, self.objective = args, tinymim.build(args).to(args.device)
        self.optimizer = torch.optim.AdamW(tinymim.parameter_groups(self.objective, 0.05), lr=1e-6,
                                           fused=args.device == "cuda" and not args.usual)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
        self.autocast = lambda: torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off")
        crops = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size)).byte().to(args.device)
        self.prepare, self.batch = tinymim.two_views, [crops]
        if args.usual:  # the workers make the views
            self.prepare, self.batch = lambda *views: views, tinymim.two_views(crops)
        if args.compile:
            self.prepare = torch.compile(self.prepare)
            self.objective.compile()

    def step(self):  # what tinymim.fit does with a batch
        views = self.prepare(*self.batch)
        with self.autocast():
            losses = self.objective(*views)
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def parts(self):
        """{name: function} of the step and of its parts, each by itself."""
        objective, depth = self.objective, self.objective.student.depth
        functions = objective.teacher.qkv, objective.student.qkv, tinymim.relation_loss
        teacher_qkv, student_qkv, loss = map(torch.compile, functions) if self.args.compile else functions
        student_images, teacher_images = self.prepare(*self.batch)

        def teacher():
            with torch.no_grad(), self.autocast():
                return teacher_qkv(teacher_images, objective.teacher_block)

        def student():  # leaves gradients for the optimiser, small ones: fp16 must not overflow
            self.optimizer.zero_grad()
            with self.autocast():
                qkv = student_qkv(student_images, depth)
            torch.autograd.backward(qkv, [x.detach() / 1000 for x in qkv])
            return qkv

        target, predicted = teacher(), [x.detach().requires_grad_() for x in student()]

        def relations():
            with self.autocast():
                losses = loss(predicted, target, objective.relation_heads, objective.pairs)
            torch.autograd.grad(sum(losses.values()), predicted)

        return {"views": lambda: self.prepare(*self.batch), "teacher": teacher, "student": student,
                "relation loss": relations, "optimiser": self.optimizer.step, "step": self.step}

    def end_to_end(self, paths):
        """Table row: medians over the epochs of tinymim.fit but the first."""
        args, epochs, tinymim.DataLoader = self.args, [], Watched
        dataset = make_dataset(args, np.resize(paths, args.steps * args.batch_size), args.usual)
        with tempfile.TemporaryDirectory() as args.out:
            tinymim.fit(self.objective, self.objective.student, dataset, self.prepare, self.optimizer, args,
                        after_epoch=lambda _: epochs.append((clock() - Watched.began, Watched.waited)))
        rates = [(len(dataset) - args.batch_size) / seconds for seconds, _ in epochs[1:]]
        shares = [100 * waited / seconds for seconds, waited in epochs[1:]]
        return {"variant": args.variant, "images/s": median(rates), "waiting for data, %": median(shares)}

class Watched(DataLoader):
    """Notes when an epoch's first batch was there, and for how many seconds one waited for the others."""
    def __iter__(self):
        batches = super().__iter__()
        yield next(batches)
        Watched.began, Watched.waited = clock(), 0.0
        for _ in range(len(self) - 1):
            asked = clock()
            batch = next(batches)
            Watched.waited += clock() - asked
            yield batch

def measure_seconds(functions, args):
    """{name: function} to {name: seconds of a call}, medians of --repeats rounds. Each warms up first."""
    threads = torch.get_num_threads()
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
    rounds = [{name: timer.blocked_autorange().median for name, timer in timers.items()}
              for _ in range(args.repeats)]
    return {name: median(times[name] for times in rounds) for name in functions}

def measure_training(args, paths):
    """In a process of its own: table rows of the step and end to end, {name: rate} of the ceilings, and
    {part: GFLOP per image}, args.work if that is known."""
    sys.stdout = sys.stderr  # fit prints
    torch.multiprocessing.set_start_method(None, force=True)  # workers start as in a run
    tinymim.setup(args)
    if args.teacher in TEACHERS:  # with random weights
        tinymim.load_teacher = lambda name, img_size, *_, **__: ViT(*TEACHERS[name], img_size)
    if args.usual:
        tinymim.F.scaled_dot_product_attention, tinymim.relation = usual_attention, usual_relation
    training, on_gpu, work = Training(args), args.device == "cuda", args.work
    for step in range(6):
        if step == 3 and on_gpu:
            torch.cuda.reset_peak_memory_stats()  # of compiling and tuning
        training.step()
    if on_gpu:
        kib = torch.cuda.max_memory_allocated() / 1024
    else:
        import resource  # not on Windows
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)

    parts = training.parts()
    for part in () if work else ("teacher", "student", "relation loss", "step"):
        with FlopCounterMode(display=False) as counter:
            parts[part]()
        work = work | {part: counter.get_total_flops() / args.batch_size / 1e9}

    n, size = (8192, 2**30) if on_gpu else (2048, 2**28)
    a, b = torch.randn(2, n, n, device=args.device).to(DTYPES[args.amp] or torch.float32)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=args.device)
    ceilings = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = measure_seconds(parts | ceilings, args)
    rate = 2 * n**3 / 1e9 / seconds["product"]  # GFLOP/s
    step = {"variant": args.variant} | {f"{part}, ms": 1000 * seconds[part] for part in parts}
    for part in ("teacher", "step"):
        step[f"{part}, % of ceiling"] = 100 * work[part] * args.batch_size / seconds[part] / rate
    step |= {"images/s": args.batch_size / seconds["step"], "peak memory, GiB": kib / 2**20}
    ceilings = {f"product in {args.variant.split(', ')[1]}, TFLOP/s": rate / 1000,
                "copy, read and written, GB/s": 2 * size / 1e9 / seconds["copy"]}
    return step, training.end_to_end(paths), ceilings, work

def measure_pipelines(args, paths):
    """Table rows: the KiB of an image on its way to the device, images/s with one worker and with all."""
    rows, paths = [], np.resize(paths, args.pictures)
    for name in ("usual", "tinymim.py"):
        dataset = make_dataset(args, paths, name == "usual")
        row = {"pipeline": name, "KiB per image": sum(tensor.nbytes for tensor in dataset[0]) / 1024}
        for workers in sorted({1, args.workers}):
            loader = DataLoader(dataset, 64, num_workers=workers, persistent_workers=True)
            seconds = repeat(lambda: sum(1 for _ in loader), number=1, repeat=1 + args.repeats)
            row[f"images/s, {workers} worker{'s' * (workers > 1)}"] = len(paths) / median(seconds[1:])
        rows.append(row)
    return rows

def measure(args, paths):
    """All measurements, as --json prints them."""
    on_gpu, processor = args.device == "cuda", os.uname().machine
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next((line.split(": ")[1].strip() for line in file if "model name" in line), processor)
    names = ("student", "teacher", "img_size", "batch_size", "pictures", "steps", "repeats")
    result = {"machine": {"GPU": torch.cuda.get_device_name() if on_gpu else None, "processor": processor,
                          "cores": os.cpu_count(), "torch": torch.__version__},
              "options": {name: getattr(args, name) for name in names},
              "ceilings": {}, "GFLOP per image": {}, "step": [], "end to end": []}
    # A CPU that only emulates bf16 is hundreds of times slower with it.
    amps = [args.amp] if on_gpu else ["off", "bf16"] if torch.cpu._is_avx512_bf16_supported() else ["off"]
    ours = [(False, amp, compile) for compile in sorted({False, args.compile}) for amp in amps]
    for usual, amp, compile in [(True, "fp16" if on_gpu else "off", False), *ours]:
        precision = "TF32" if on_gpu and amp == "off" else str(DTYPES[amp] or torch.float32)[len("torch."):]
        name = ("usual, " if usual else "tinymim.py, ") + precision + ", compiled" * compile
        print(name, flush=True)
        way = dict(variant=name, usual=usual, amp=amp, compile=compile, work=result["GFLOP per image"])
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            done = pool.submit(measure_training, argparse.Namespace(**vars(args) | way), paths)
            step, epoch, ceilings, result["GFLOP per image"] = done.result()
        print(step, epoch, flush=True)
        result["step"].append(step)
        result["end to end"].append(epoch)
        result["ceilings"] |= ceilings
    print("input pipeline", flush=True)
    return result | {"pipeline": measure_pipelines(args, paths)}

def print_tables(result):  # in Markdown
    for value in result.values():
        rows = value if isinstance(value, list) else [value]
        print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
            print("| " + " | ".join(cells) + " |")

def benchmark(args):
    tinymim.setup(args)
    args.batch_size = args.batch_size or {"cuda": 256, "cpu": 8}[args.device]
    args.steps = args.steps or {"cuda": 100, "cpu": 4}[args.device]
    args.epochs = 1 + args.repeats
    with contextlib.redirect_stdout(sys.stderr):  # all but the result
        paths = tinymim.find_images(tinymim.imagenette() if args.data == "imagenette" else args.data)
        result = measure(args, np.random.RandomState(0).permutation(paths))
    print(json.dumps(result, indent=1)) if args.json else print_tables(result)

def main(argv=None):
    parser = tinymim.make_parser("extras/benchmark.py", __doc__, teacher=True)
    parser.set_defaults(img_size=224, batch_size=None, blr=1e-6, warmup_epochs=0)
    add = parser.add_argument_group("benchmark").add_argument
    add("--pictures", type=int, default=1024, help="in a pass of the input pipeline (default: 1024)")
    add("--steps", type=int, help="in an epoch, 2 at least (default: 100 on a GPU, 4 on the CPU)")
    add("--repeats", type=int, default=5, help="of every measurement (default: 5)")
    add("--json", action="store_true", help="print JSON instead of tables")
    tinymim.run(parser, parser.parse_args(argv), benchmark)

if __name__ == "__main__":
    main()
