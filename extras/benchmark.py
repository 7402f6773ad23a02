"""How fast this machine distils, where the time goes, and how much of what the machine can do that is.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --data /path/to/images --student small --teacher mae_large --json > speed.json

Compares tinymim.py with the usual way to write the same training: Pillow decodes, crops and jitters image by
image, attention and relations are as their formulas say, and every step waits for the loss (on a GPU in fp16,
on the CPU in float32). What is compared is measured in turn, `--repeats` times over, and medians count. The
teacher has random weights, which take as long.

1. Ceilings: a large matrix product in each precision, a large copy.
2. Input pipeline: images/s of one worker and of all.
3. Training step, with mixed precision and compilation on and off: its parts, the share of the matrix
   product's rate that it reaches (FLOPs are those of matrix products and convolutions as the formulas have
   them), and the most memory that a process of its own holds.
4. End to end: epochs of tinymim.fit, and the share of them that it waits for data, from the first batch on.
   (On a GPU it may wait while the GPU still works.)
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import DTYPES, STUDENTS, UserError

TEACHERS = {  # name: (dim, depth, heads, patch size)
    "mae_base": (*STUDENTS["base"], 16),
    "mae_large": (*STUDENTS["large"], 16),
    "mae_huge": (1280, 32, 16, 14),
}
PARTS = ("views", "teacher", "student", "relation loss", "optimiser", "step")

def crop_and_flip(img_size):
    crop = v2.RandomResizedCrop(img_size, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])

# ---- 1. The usual way --------------------------------------------------------------------------------------

class UsualDataset(tinymim.ImageDataset):
    """The student's and the teacher's view of an image, float (3, H, W) each, made by Pillow."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), tinymim.normalize])

    def __getitem__(self, key):
        with Image.open(os.fsdecode(self.paths[key % len(self)])) as image:
            crop = self.transform(image.convert("RGB"))
        return self.to_tensor(self.jitter(crop)), self.to_tensor(crop)

class UsualAttention(tinymim.Attention):
    """Self-attention as its formula says, with all weights (B, heads, N, N) in memory."""
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

def usual_relation_loss(student_qkv, teacher_qkv, relation_heads, pairs):
    """tinymim.relation_loss by the formula: probabilities first, then their logarithms."""
    def relation(qkv, a, b):
        a, b = (qkv["qkv".index(x)].unflatten(2, (relation_heads, -1)).transpose(1, 2) for x in (a, b))
        return (a @ b.transpose(2, 3) / math.sqrt(a.shape[-1])).softmax(dim=-1)

    losses = {}
    for a, b in pairs:
        student, teacher = relation(student_qkv, a, b), relation(teacher_qkv, a, b)
        losses[a + b] = (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()
    return losses

class Usual(tinymim.TinyMIM):
    """TinyMIM with attention and relations as in their formulas, and a wait for the loss in every step."""
    def __init__(self, *args):
        super().__init__(*args)
        for module in self.modules():
            if isinstance(module, tinymim.Attention):
                module.__class__ = UsualAttention

    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv(teacher_images, self.teacher_block)
        student_qkv = self.student.qkv(student_images, self.student.depth)
        losses = usual_relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)
        sum(losses.values()).item()
        return losses

# ---- 2. What is measured -----------------------------------------------------------------------------------

class Variant:
    """One way to train, ready to be timed. usual: the one above. amp: a key of DTYPES."""
    def __init__(self, args, usual, amp, compile):
        self.usual, self.amp, self.compile, self.device = usual, amp, compile, args.device
        self.name = f"{'usual' if usual else 'tinymim.py'}, {precision(amp, args.device)}"
        self.name += ", compiled" if compile else ""
        self.compiled = torch.compile if compile else lambda function: function
        torch.manual_seed(0)
        *sizes, patch_size = TEACHERS[args.teacher]
        teacher = tinymim.ViT(*sizes, patch_size, args.img_size)
        student = tinymim.ViT(*STUDENTS[args.student], patch_size, args.img_size, drop_path=0.1)
        objective = (Usual if usual else tinymim.TinyMIM)(
            student, teacher, args.teacher_block, args.relation_heads)
        self.objective = objective.to(args.device).train()
        self.forward = self.compiled(objective)
        self.prepare = (lambda *views: views) if usual else self.compiled(tinymim.two_views)
        self.relation_loss = usual_relation_loss if usual else self.compiled(tinymim.relation_loss)
        self.scaler = torch.amp.GradScaler(args.device, enabled=amp == "fp16")
        self.optimizer = torch.optim.AdamW(tinymim.parameter_groups(objective, 0.05), lr=1e-6,
                                           betas=(0.9, 0.95), fused=args.device == "cuda" and not usual)
        shape = (args.batch_size, 3, args.img_size, args.img_size)
        if usual:
            self.batch = torch.randn(2, *shape, device=args.device).unbind()
        else:
            self.batch = [torch.randint(256, shape, dtype=torch.uint8, device=args.device)]

    def autocast(self):
        return torch.autocast(self.device, DTYPES[self.amp], enabled=self.amp != "off")

    def step(self):
        """What tinymim.fit does with a batch."""
        views = self.prepare(*self.batch)
        with self.autocast():
            losses = self.forward(*views)
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def parts(self):
        """{name: function} that does one of PARTS by itself."""
        objective, teacher, student = self.objective, self.objective.teacher, self.objective.student
        student_images, teacher_images = self.prepare(*self.batch)
        with torch.no_grad(), self.autocast():
            teacher_qkv = teacher.qkv(teacher_images, objective.teacher_block)
            student_qkv = [x.requires_grad_() for x in student.qkv(student_images, student.depth)]
        gradients = [x.detach() / 1000 for x in student_qkv]  # small: sums over them must not overflow fp16
        run_teacher_qkv, run_student_qkv = self.compiled(teacher.qkv), self.compiled(student.qkv)

        def run_teacher():
            with torch.no_grad(), self.autocast():
                run_teacher_qkv(teacher_images, objective.teacher_block)

        def run_student():  # leaves gradients for the optimiser
            self.optimizer.zero_grad()
            with self.autocast():
                qkv = run_student_qkv(student_images, student.depth)
            torch.autograd.backward(qkv, gradients)

        def run_relation_loss():
            with self.autocast():
                losses = self.relation_loss(student_qkv, teacher_qkv, objective.relation_heads, objective.pairs)
            torch.autograd.grad(sum(losses.values()), student_qkv)

        return dict(zip(PARTS, (lambda: self.prepare(*self.batch), run_teacher, run_student, run_relation_loss,
                                self.optimizer.step, self.step)))

def precision(amp, device):
    """In words. What is left in float32 on a GPU multiplies in TF32, see tinymim.setup."""
    return "TF32" if amp == "off" and device == "cuda" else str(DTYPES[amp] or torch.float32)[len("torch."):]

def variants(args):
    """(usual, amp, compile) of each variant that is measured. A CPU can do bfloat16, if asked to."""
    usual, half = ("fp16", args.amp) if args.device == "cuda" else ("off", "bf16")
    ours = [(False, amp, compile) for compile in sorted({False, args.compile}) for amp in ("off", half)]
    return [(True, usual, False), *ours]

def synchronise(device):
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()

def interleaved(functions, device, repeats, untimed=1, least=0.2):
    """{name: function} to {name: median seconds of a call}: of `repeats` rounds, in which each is called for
    `least` seconds in a row, after `untimed` calls that bring back its memory and caches."""
    def measure(function, calls):
        for _ in range(untimed):
            function()
        synchronise(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise(device)
        return (time.perf_counter() - began) / calls

    for function in functions.values():
        measure(function, 2)  # compiles, allocates
    calls = {name: math.ceil(least / measure(function, 1)) for name, function in functions.items()}
    rounds = [{name: measure(function, calls[name]) for name, function in functions.items()}
              for _ in range(repeats)]
    return {name: statistics.median(one[name] for one in rounds) for name in functions}

def compiler():
    """How many graphs torch.compile has made so far, and how often it had to break one in two."""
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "graph breaks": sum(counters["graph_break"].values())}

def ceilings(args):
    """{name: function} of a matrix product in each precision and a copy, {name: (its work, the work's unit)}."""
    n, size = (8192, 2**30) if args.device == "cuda" else (2048, 2**28)
    functions, work = {}, {}
    for amp in dict.fromkeys(amp for _, amp, _ in variants(args)):
        a, b = torch.randn(2, n, n, device=args.device).to(DTYPES[amp] or torch.float32)
        name = f"{n} x {n} product, {precision(amp, args.device)}"
        functions[name] = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        work[name] = 2 * n**3 / 1e12, "TFLOP/s"
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=args.device)
    name = f"copy of {size >> 20} MiB, read and written"
    functions[name], work[name] = lambda: target.copy_(source), (2 * size / 1e9, "GB/s")
    return functions, work

def count_flops(function):
    """Floating-point operations of the matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

def peak_memory(args, variant):
    """The most memory, in GiB, that this process holds in a few steps: of the GPU, or of the machine."""
    tinymim.setup(args)
    variant = Variant(args, *variant)
    for step in range(6):
        if step == 3 and args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of compiling and tuning
        variant.step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)

def in_new_process(function, *args):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()

def measure_pipelines(args, paths):
    """Table rows: images/s with one worker and with all, and the size of an image on its way to the device."""
    paths, rows, loaders = np.resize(paths, args.pictures // 64 * 64), [], {}
    counts = {f"{count} worker{'s' * (count > 1)}": count for count in sorted({1, args.workers})}
    datasets = {"usual": UsualDataset(paths, crop_and_flip(args.img_size)),
                "tinymim.py": tinymim.ImageDataset(paths, crop_and_flip(args.img_size))}
    for workers, count in counts.items():
        for name, dataset in datasets.items():
            loaders[name, workers] = DataLoader(dataset, 64, num_workers=count, persistent_workers=True,
                                                pin_memory=args.device == "cuda")
    passes = {key: functools.partial(collections.deque, loader, maxlen=0) for key, loader in loaders.items()}
    seconds = interleaved(passes, "cpu", args.repeats, untimed=0)
    for name, dataset in datasets.items():
        row = {"pipeline": name}
        for workers in counts:
            row[f"images/s, {workers}"] = len(paths) / seconds[name, workers]
            row[f"times the usual, {workers}"] = seconds["usual", workers] / seconds[name, workers]
        rows.append(row | {"KiB per image": sum(tensor.nbytes for tensor in dataset[0]) / 1024})
    return rows

class Watched(DataLoader):
    """Notes when an epoch's first batch was there, and for how many seconds one waited for the others."""
    def __iter__(self):
        batches = super().__iter__()
        yield next(batches)
        Watched.began, Watched.waited = time.perf_counter(), 0.0
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            Watched.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

def end_to_end(args, variant, paths):
    """Medians over epochs of tinymim.fit but the first: images/s, the share of time spent waiting for data."""
    dataset = UsualDataset if variant.usual else tinymim.ImageDataset
    dataset = dataset(np.resize(paths, args.steps * args.batch_size), crop_and_flip(args.img_size))
    options, epochs = dict(accum=1, epochs=1 + args.repeats, warmup_epochs=0, blr=1e-6, min_lr=0.0), []

    def after_epoch():
        seconds = time.perf_counter() - Watched.began
        epochs.append(((len(dataset) - args.batch_size) / seconds, Watched.waited / seconds))

    with tempfile.TemporaryDirectory() as out, mock.patch.object(tinymim, "DataLoader", Watched):
        options |= dict(out=out, amp=variant.amp, compile=variant.compile)
        tinymim.fit(variant.objective, variant.objective.student, dataset, variant.prepare, variant.optimizer,
                    argparse.Namespace(**vars(args) | options), after_epoch)
    return [statistics.median(column) for column in zip(*epochs[1:])]

# ---- 3. The report -----------------------------------------------------------------------------------------

def measure(args, paths):
    """All measurements, as --json prints them."""
    names = ("student", "teacher", "img_size", "batch_size", "pictures", "steps", "repeats")
    result = {"machine": describe(args), "options": {name: getattr(args, name) for name in names}}
    print("memory", flush=True)  # first: a process begins with the peak of the one that starts it
    memory = [in_new_process(peak_memory, args, variant) for variant in variants(args)]
    print("input pipeline", flush=True)
    result["pipeline"] = measure_pipelines(args, paths)

    print("training step", flush=True)
    measured = [Variant(args, *variant) for variant in variants(args)]
    flops = {part: count_flops(function) for part, function in measured[0].parts().items()}
    functions, work = ceilings(args)
    for variant in measured:
        functions |= {(variant.name, part): function for part, function in variant.parts().items()}
    times = interleaved(functions, args.device, args.repeats)
    result["compiler"] = compiler()
    result["ceilings"] = {name: {"per second": work[name][0] / times[name], "unit": work[name][1]} for name in work}
    result["GFLOP per image"] = {part: flops[part] / args.batch_size / 1e9 for part in PARTS if flops[part]}
    result["step"] = []
    for variant, peak in zip(measured, memory):
        row = {"variant": variant.name} | {f"{part}, ms": 1000 * times[variant.name, part] for part in PARTS}
        row["images/s"] = args.batch_size / times[variant.name, "step"]
        product = next(name for name in work if name.endswith(", " + precision(variant.amp, args.device)))
        for part in ("teacher", "step"):
            rate = flops[part] / 1e12 / times[variant.name, part]
            row[f"{part}, % of ceiling"] = 100 * rate / result["ceilings"][product]["per second"]
        result["step"].append(row | {"peak memory, GiB": peak})

    print("end to end", flush=True)
    result["end to end"] = []
    for variant in measured:
        if variant.usual or (variant.amp, variant.compile) == (args.amp, args.compile):  # tinymim.py's defaults
            rate, waiting = end_to_end(args, variant, paths)
            alone = args.batch_size / times[variant.name, "step"]
            result["end to end"].append({"variant": variant.name, "images/s": rate, "% of the step alone":
                                         100 * rate / alone, "waiting for data, %": 100 * waiting})
    result["compiler"]["graphs in training"] = compiler()["graphs"] - result["compiler"]["graphs"]
    return result

def describe(args):
    """What the measurements depend on, besides the options."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    gpu = args.device == "cuda"
    return {"GPU": torch.cuda.get_device_name() if gpu else None, "processor": processor,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "CUDA": torch.version.cuda if gpu else None,
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}

def print_table(rows):
    """A Markdown table of rows, {column: text or number}."""
    def text(value):
        return value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(text, row.values())) + " |")

def report(result):
    """Print what `measure` returns as Markdown tables."""
    for name in ("machine", "options", "compiler"):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result[name].items() if value))
    print_table([{"ceiling": name, "rate": f"{entry['per second']:.3g} {entry['unit']}"}
                 for name, entry in result["ceilings"].items()])
    for name in ("pipeline", "step", "end to end"):
        print_table(result[name])
    print_table([{"GFLOP per image": "by the formulas"} | result["GFLOP per image"]])

def benchmark(args):
    """What the command does. Only the result goes to standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        tinymim.setup(args)
        on_gpu = args.device == "cuda"
        args.batch_size = args.batch_size or (256 if on_gpu else 8)
        args.steps = args.steps or (100 if on_gpu else 4)
        args.pictures = args.pictures or max(1024, 512 * args.workers)
        if args.steps < 2 or args.pictures < 64 or min(args.repeats, args.workers) < 1:
            raise UserError("the least are --steps 2, --pictures 64, --repeats 1, --workers 1")
        paths = tinymim.find_images(tinymim.imagenette() if args.data == "imagenette" else args.data)
        result = measure(args, np.random.RandomState(0).permutation(paths))
    print(json.dumps(result, indent=1)) if args.json else report(result)

def main(argv=None):
    description = "How fast this machine distils, and what of its own ceilings that reaches."
    parser = argparse.ArgumentParser("extras/benchmark.py", description=description)
    add = parser.add_argument
    add("--data", default="imagenette", help="folder of images (default: imagenette, downloaded to data/)")
    add("--student", choices=STUDENTS, default="tiny", help="default: tiny")
    add("--teacher", choices=TEACHERS, default="mae_base", help="its size; default: mae_base")
    add("--teacher-block", type=int, help="default: as in tinymim.py")
    add("--relation-heads", type=int, help="default: the teacher's attention heads")
    add("--img-size", type=int, default=224, help="in pixels (default: 224)")
    add("--batch-size", type=int, help="default: 256 on a GPU, 8 on the CPU")
    add("--pictures", type=int, help="that a pipeline delivers each time (default: 512 per worker, 1024 at least)")
    add("--steps", type=int, help="in an epoch, end to end (default: 100 on a GPU, 4 on the CPU)")
    add("--repeats", type=int, default=5, help="of every measurement (default: 5)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that decode (default: one per core)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure torch.compile, too (default: on a GPU)")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(amp="auto", out=None, resume=False, seed=0)
    tinymim.run(parser, parser.parse_args(argv), benchmark)

if __name__ == "__main__":
    main()
