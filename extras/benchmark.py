"""How fast this machine distils, where the time goes, and how much of what the machine can do that is.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --data /path/to/images --student small --teacher mae_large --json > speed.json

Compares tinymim.py with the usual way to write the same training: Pillow decodes, crops and jitters image by
image, attention and relations are as their formulas say, in fp16 on a GPU (where the gradient scaler waits
for it in every step), in float32 on the CPU. The teacher has random weights, which take as long.

1. Training step, with mixed precision and compilation on and off: its parts, peak memory, and its share of
   the rate of a large matrix product (counting the products and convolutions of the formulas).
2. End to end: epochs of tinymim.fit, and the share of them that it waits for data, from the first batch on.
3. Input pipeline: images/s of one worker and of all.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import DTYPES, STUDENTS, ImageDataset, ViT

BASE, LARGE, HUGE = (*STUDENTS["base"], 16), (*STUDENTS["large"], 16), (1280, 32, 16, 14)
TEACHERS = {"mae_base": BASE, "mae_large": LARGE, "mae_huge": HUGE}  # name: (dim, depth, heads, patch size)

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
        shape = (args.batch_size, 3, args.img_size, args.img_size)
        crops = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
        self.prepare, self.batch = tinymim.two_views, [crops]
        if args.usual:  # the workers make the views
            self.prepare, self.batch = lambda *views: views, tinymim.two_views(crops)
        if args.compile:
            self.prepare = torch.compile(self.prepare)
            self.objective.compile()

    def step(self):
        """What tinymim.fit does with a batch."""
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
        """{column: value}, medians over the epochs of tinymim.fit but the first."""
        args, epochs, tinymim.DataLoader = self.args, [], Watched
        dataset = make_dataset(args, np.resize(paths, args.steps * args.batch_size), args.usual)

        def after_epoch():
            seconds = time.perf_counter() - Watched.began
            epochs.append(((len(dataset) - args.batch_size) / seconds, 100 * Watched.waited / seconds))

        with tempfile.TemporaryDirectory() as args.out:
            tinymim.fit(self.objective, self.objective.student, dataset, self.prepare, self.optimizer, args,
                        after_epoch)
        return dict(zip(("images/s", "waiting for data, %"), map(median, zip(*epochs[1:]))))

class Watched(DataLoader):
    """Notes when an epoch's first batch was there, and for how many seconds one waited for the others."""
    def __iter__(self):
        batches = super().__iter__()
        yield next(batches)
        Watched.began, Watched.waited = time.perf_counter(), 0.0
        for _ in range(len(self) - 1):
            asked = time.perf_counter()
            batch = next(batches)
            Watched.waited += time.perf_counter() - asked
            yield batch

def measure_seconds(functions, args):
    """{name: function} to {name: seconds of a call}, medians of --repeats rounds. Each warms up first."""
    rounds, threads = [], torch.get_num_threads()
    for _ in range(args.repeats):
        timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
        rounds.append({name: timer.blocked_autorange().median for name, timer in timers.items()})
    return {name: median(times[name] for times in rounds) for name in functions}

def measure_training(args, paths):
    """In a process of its own: table rows of the step and end to end, TFLOP/s of a matrix product, and
    {part: GFLOP per image}, which is counted in the usual way only."""
    tinymim.setup(args)
    tinymim.load_teacher = lambda name, img_size, *_: ViT(*TEACHERS[name], img_size)
    if args.usual:
        tinymim.F.scaled_dot_product_attention, tinymim.relation = usual_attention, usual_relation
    training, on_gpu, work = Training(args), args.device == "cuda", {}
    for step in range(6):
        if step == 3 and on_gpu:
            torch.cuda.reset_peak_memory_stats()  # of compiling and tuning
        training.step()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, of this process
    held = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else held

    parts, n = training.parts(), 8192 if on_gpu else 2048
    for name, part in parts.items() if args.usual else ():
        with FlopCounterMode(display=False) as counter:
            part()
        work[name] = counter.get_total_flops() / args.batch_size / 1e9
    a, b = torch.randn(2, n, n, device=args.device).to(DTYPES[args.amp] or torch.float32)
    seconds = measure_seconds(parts | {"product": lambda: a @ b}, args)
    step = {"variant": args.variant} | {f"{part}, ms": 1000 * seconds[part] for part in parts}
    step |= {"images/s": args.batch_size / seconds["step"], "peak memory, GiB": held}
    epoch = {"variant": args.variant} | training.end_to_end(paths)
    epoch["% of the step alone"] = 100 * epoch["images/s"] / step["images/s"]
    return step, epoch, 2 * n**3 / 1e12 / seconds["product"], work

def measure_pipelines(args, paths):
    """Table rows: the KiB of an image on its way to the device, images/s with one worker and with all."""
    rows, loaders, paths = [], {}, np.resize(paths, args.pictures)
    for name in ("usual", "tinymim.py"):
        dataset = make_dataset(args, paths, name == "usual")
        row = {"pipeline": name, "KiB per image": sum(tensor.nbytes for tensor in dataset[0]) / 1024}
        for workers in sorted({1, args.workers}):
            loader, seconds = DataLoader(dataset, 64, num_workers=workers, persistent_workers=True), []
            for _ in range(1 + args.repeats):
                began = time.perf_counter()
                for _ in loader:
                    pass
                seconds.append(time.perf_counter() - began)
            row[f"images/s, {workers} worker{'s' * (workers > 1)}"] = len(paths) / median(seconds[1:])
        rows.append(row)
    return rows

# ---- 3. The report -----------------------------------------------------------------------------------------

def measure(args, paths):
    """All measurements, as --json prints them."""
    on_gpu, processor = args.device == "cuda", platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next((line.split(": ")[1].strip() for line in file if "model name" in line), processor)
    machine = {"GPU": torch.cuda.get_device_name() if on_gpu else None, "processor": processor,
               "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    names = ("student", "teacher", "img_size", "batch_size", "pictures", "steps", "repeats")
    result = {"machine": machine, "options": {name: getattr(args, name) for name in names}}
    result |= {"ceilings": {}, "GFLOP per image": {}, "step": [], "end to end": []}
    usual, half = ("fp16", args.amp) if on_gpu else ("off", "bf16")
    ours = [(False, amp, compile) for compile in sorted({False, args.compile}) for amp in ("off", half)]
    for usual, amp, compile in [(True, usual, False), *ours]:
        precision = "TF32" if on_gpu and amp == "off" else str(DTYPES[amp] or torch.float32)[len("torch."):]
        name = ("usual, " if usual else "tinymim.py, ") + precision + ", compiled" * compile
        print(name, flush=True)
        way = argparse.Namespace(**vars(args) | dict(variant=name, usual=usual, amp=amp, compile=compile))
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            step, epoch, ceiling, work = pool.submit(measure_training, way, paths).result()
        result["GFLOP per image"] |= work
        for part in ("teacher", "step"):  # GFLOP/ms = TFLOP/s
            rate = result["GFLOP per image"][part] * args.batch_size / step[f"{part}, ms"]
            step[f"{part}, % of ceiling"] = 100 * rate / ceiling
        result["ceilings"][f"large product, {precision}"] = {"per second": ceiling, "unit": "TFLOP/s"}
        result["step"].append(step)
        result["end to end"].append(epoch)

    print("copy, input pipeline", flush=True)
    source, target = torch.zeros(2, 2**28, dtype=torch.uint8, device=args.device)
    seconds = measure_seconds({"copy": lambda: target.copy_(source)}, args)["copy"]
    result["ceilings"]["large copy, read and written"] = {"per second": 2**29 / 1e9 / seconds, "unit": "GB/s"}
    return result | {"pipeline": measure_pipelines(args, paths)}

def print_tables(result):
    """What `measure` returns, as Markdown."""
    for name, value in result.items():
        rows = value if isinstance(value, list) else [value]
        if name == "ceilings":
            rows = [{"ceiling": key} | entry for key, entry in value.items()]
        print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
            print("| " + " | ".join(cells) + " |")

def benchmark(args):
    tinymim.setup(args)
    on_gpu = args.device == "cuda"
    args.batch_size, args.epochs = args.batch_size or (256 if on_gpu else 8), 1 + args.repeats
    args.steps = args.steps or (100 if on_gpu else 4)
    with contextlib.redirect_stdout(sys.stderr):  # all but the result
        paths = tinymim.find_images(tinymim.imagenette() if args.data == "imagenette" else args.data)
        result = measure(args, np.random.RandomState(0).permutation(paths))
    print(json.dumps(result, indent=1)) if args.json else print_tables(result)

def main(argv=None):
    parser = tinymim.make_parser("extras/benchmark.py", "How fast this machine distils.", teacher=True)
    parser.set_defaults(img_size=224, batch_size=None, blr=1e-6, warmup_epochs=0)
    add = parser.add_argument_group("benchmark").add_argument
    add("--pictures", type=int, default=1024, help="in a pass of the input pipeline (default: 1024)")
    add("--steps", type=int, help="in an epoch, 2 at least (default: 100 on a GPU, 4 on the CPU)")
    add("--repeats", type=int, default=5, help="of every measurement (default: 5)")
    add("--json", action="store_true", help="print JSON instead of tables")
    tinymim.run(parser, parser.parse_args(argv), benchmark)

if __name__ == "__main__":
    main()
