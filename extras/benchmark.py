"""How fast this machine distils, where the time goes, and how much of what the machine can do that is.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --data /path/to/images --student small --teacher mae_large --batch-size 256 --json > speed.json

Compares tinymim.py with the usual way to write the same training: images decoded, cropped and jittered one by one by Pillow, attention
and relations as their formulas say, and a wait for the device in every step (on a GPU in fp16, on the CPU in float32). Pipelines,
and all that belongs to steps, are measured in turn, `--repeats` times over, and the medians count. The teacher has random
weights, which take as long.

1. Ceilings: a large matrix product, a large copy.
2. Input pipeline: images/s of one worker and of all.
3. Training step, with mixed precision and compilation on and off: its parts, the share of the matrix product's rate it reaches, and
   the most memory a process of its own holds. FLOPs are those of matrix products and convolutions as the formulas have them.
4. End to end: epochs of tinymim.py's own loop, the share of them it waits for data (once the first batch is there; on a GPU
   it may wait while the GPU still works), and the images/s as a share of those of the step alone.
"""

import argparse
import collections
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim  # the first: it says what is not installed

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from tinymim import STUDENTS

TEACHERS = {"mae_base": (*STUDENTS["base"], 16), "mae_large": (*STUDENTS["large"], 16), "mae_huge": (1280, 32, 16, 14)}
PARTS = ("views", "teacher", "student", "relation loss", "optimiser", "step")
OPTIONS = ("student", "teacher", "img_size", "batch_size", "pictures", "steps", "repeats")
LOOP = dict(accum=1, seed=0, blr=1e-6, min_lr=0.0, warmup_epochs=0, epochs=10**6)  # what tinymim.py's loop asks for


# ------------------------------------------------------------------------------------------------------------
# The usual way.


class UsualDataset(tinymim.ImageDataset):
    """Item (epoch, i): the student's and the teacher's view of image i, float (3, H, W) each, and -1, or i if it is broken."""

    def __init__(self, paths, img_size):
        super().__init__(paths, transform=None)
        self.crop = v2.Compose([v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
                                v2.RandomHorizontalFlip()])
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.clean = v2.Compose([*to_tensor, v2.Normalize(tinymim.IMAGENET_MEAN, tinymim.IMAGENET_STD)])
        self.jitter = v2.ColorJitter(0.4, 0.4, 0.4)

    def __getitem__(self, key):
        try:
            with Image.open(os.fsdecode(self.paths[key[1]])) as file:
                image, broken = file.convert("RGB"), -1
        except OSError:
            image, broken = Image.new("RGB", (500, 375)), key[1]
        crop = self.crop(image)
        return self.clean(self.jitter(crop)), self.clean(crop), broken


class Views(nn.Module):
    """The usual pipeline's batches are views already."""

    def forward(self, student_images, teacher_images):
        return student_images, teacher_images


class UsualAttention(tinymim.Attention):
    """Multi-head self-attention as its formula says, with all (B, heads, N, N) weights in memory."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, dim/heads) each
        weights = (q @ k.transpose(2, 3) * q.shape[-1]**-0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def usual_relation_loss(student_qkv, teacher_qkv, heads, pairs):
    """tinymim.relation_loss by the formula: probabilities first, then their logarithms."""
    losses = {}
    for a, b in pairs:
        student, teacher = ((x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (qkv["qkv".index(a)], qkv["qkv".index(b)]))
                            for qkv in (student_qkv, teacher_qkv))
        student, teacher = ((a @ b.transpose(2, 3) / a.shape[-1]**0.5).softmax(dim=-1) for a, b in (student, teacher))
        losses[a + b] = (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()
    return losses


class Usual(tinymim.TinyMIM):
    """The objective with attention and relations as in their formulas, and a wait for the loss in every step."""

    def __init__(self, *args):
        super().__init__(*args)
        for module in self.modules():
            if isinstance(module, tinymim.Attention):
                module.__class__ = UsualAttention

    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv(teacher_images, self.teacher_block)
        student_qkv = self.student.qkv(student_images, self.student.depth)
        losses = usual_relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.relations)
        sum(losses.values()).item()
        return losses


# ------------------------------------------------------------------------------------------------------------
# What is measured.


class Variant:
    """One way to train, ready to be timed. usual: the one above. amp: autocast's dtype, float32 for none."""

    def __init__(self, args, usual, amp, compile):
        self.usual, self.amp, self.compile = usual, amp, compile
        self.device, self.compiled = torch.device(args.device), torch.compile if compile else lambda function: function
        torch.manual_seed(0)
        *sizes, patch_size = TEACHERS[args.teacher]
        teacher = tinymim.ViT(*sizes, patch_size, args.img_size).requires_grad_(False)
        student = tinymim.ViT(*STUDENTS[args.student], patch_size, args.img_size, drop_path=0.1)
        objective = (Usual if usual else tinymim.TinyMIM)(student, teacher, args.teacher_block, args.relation_heads)
        self.objective = objective.to(self.device).train()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.optimizer = torch.optim.AdamW(tinymim.parameter_groups(objective, 0.05), lr=1e-6, betas=(0.9, 0.95),
                                           fused=(not usual and self.device.type == "cuda") or None)
        self.views = (Views() if usual else tinymim.TwoViews()).to(self.device)
        self.relation_loss = self.compiled(usual_relation_loss if usual else tinymim.relation_loss)
        if usual:
            self.batch = tuple(torch.rand(2, args.batch_size, 3, args.img_size, args.img_size, device=self.device))
        else:
            crops = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8, device=self.device)
            jitter = torch.tensor([[[0.0, 1, 2], [1.2, 0.8, 1.1]]] * args.batch_size, device=self.device)
            self.batch = crops, jitter
        self.forward, self.prepare = self.compiled(objective), self.compiled(self.views)
        self.teacher_qkv, self.student_qkv = self.compiled(teacher.qkv), self.compiled(student.qkv)

    def __str__(self):
        return f"{'usual' if self.usual else 'tinymim.py'}, {precision(self.amp, self.device)}{', compiled' if self.compile else ''}"

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32)

    def step(self):
        """What train_epoch does for one batch, and for the usual way a wait until it is done."""
        images = self.prepare(*self.batch)
        with self.autocast():
            loss = sum(self.forward(*images).values())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.usual:
            synchronise(self.device)

    def parts(self):
        """{name: function} of each of PARTS, doing it by itself."""
        objective, images = self.objective, self.views(*self.batch)
        teacher, student = objective.teacher, objective.student
        with torch.no_grad(), self.autocast():
            teacher_qkv = teacher.qkv(images[1], objective.teacher_block)
            student_qkv = [x.requires_grad_() for x in student.qkv(images[0], student.depth)]

        def run_teacher():
            with torch.no_grad(), self.autocast():
                self.teacher_qkv(images[1], objective.teacher_block)

        def run_student():  # leaves gradients for the optimiser
            self.optimizer.zero_grad()
            with self.autocast():
                qkv = self.student_qkv(images[0], student.depth)
            torch.autograd.backward(qkv, [x.detach() for x in student_qkv])

        def run_relation_loss():
            with self.autocast():
                losses = self.relation_loss(student_qkv, teacher_qkv, objective.relation_heads, objective.relations)
            torch.autograd.grad(sum(losses.values()), student_qkv)

        return dict(zip(PARTS, (lambda: self.prepare(*self.batch), run_teacher, run_student, run_relation_loss,
                                self.optimizer.step, self.step)))


def precision(dtype, device):
    """A dtype in words: what is left in float32 on a GPU multiplies in TF32, see tinymim.start."""
    return "TF32" if dtype == torch.float32 and device.type == "cuda" else str(dtype).removeprefix("torch.")


def variants(args):
    """(usual, amp, compile) of each variant that is measured."""
    half = torch.float16 if args.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    ours = [(False, amp, compile) for compile in ((False, True) if args.compile else (False,)) for amp in (torch.float32, half)]
    return [(True, torch.float16 if args.device == "cuda" else torch.float32, False), *ours]


def synchronise(device):
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(functions, device, repeats, untimed=0, least=0.2):
    """{name: function} to {name: median seconds of a call}, of `repeats` rounds in which each is called for `least` seconds,
    after `untimed` calls that give it caches and memory as in a loop of its own.

    Also returns how many graphs torch.compile made after the warm-up: there should be none.
    """

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
    calls = {name: max(1, math.ceil(least / measure(function, 1))) for name, function in functions.items()}
    warm = compiler()[0]
    rounds = [{name: measure(function, calls[name]) for name, function in functions.items()} for _ in range(repeats)]
    return {name: statistics.median(one[name] for one in rounds) for name in functions}, compiler()[0] - warm


def compiler():
    """(graphs compiled so far, graph breaks so far)."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def ceilings(args, device):
    """{name: function} of a matrix product of each precision and a copy, and {name: (their work, its unit)}."""
    n, m = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    functions, work = {}, {}
    for amp in dict.fromkeys(amp for _, amp, _ in variants(args)):
        a, b = torch.randn(2, n, n, device=device).to(amp)
        out = torch.empty_like(a)
        name = f"{n} x {n} product, {precision(amp, device)}"
        functions[name], work[name] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out), (2 * n**3 / 1e12, "TFLOP/s")
    source, target = torch.zeros(2, m, dtype=torch.uint8, device=device)
    name = f"copy of {m >> 20} MiB, read and written"
    functions[name], work[name] = lambda: target.copy_(source), (2 * m / 1e9, "GB/s")
    return functions, work


def count_flops(function):
    """Floating-point operations of the matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory(args, place):
    """The most memory, in GiB, that a few steps of variants()[place] hold in a process of their own."""
    command = [sys.executable, os.path.abspath(__file__), *args.argv, f"--memory-of={place}"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(child.returncode)  # it has said why
    return float(child.stdout)


def make_loader(args, machine, usual, paths):
    """tinymim.py's loader of these files, or one that hands over the usual pipeline's views."""
    dataset = UsualDataset(paths, args.img_size) if usual else tinymim.ImageDataset(paths, tinymim.CropAndJitter(args.img_size))
    return tinymim.make_loader(dataset, args, machine)


def measure_pipelines(args, machine, paths):
    """Rows of the table of pipelines: images/s with one worker and with all, and what an image weighs on its way to the device."""
    args, paths = argparse.Namespace(**{**vars(args), "batch_size": 64}), np.resize(paths, args.pictures // 64 * 64)
    loaders = {(name, workers): make_loader(args, machine._replace(workers=workers), name == "usual", paths)
               for workers in sorted({1, machine.workers}) for name in ("usual", "tinymim.py")}
    passes = {key: lambda loader=loader: collections.deque(loader, maxlen=0) for key, loader in loaders.items()}
    seconds, _ = interleaved(passes, torch.device("cpu"), args.repeats)
    rows = []
    for name in ("usual", "tinymim.py"):
        row = {"pipeline": name}
        for workers in sorted({1, machine.workers}):
            label = f"{workers} worker{'s' * (workers > 1)}"
            row[f"images/s, {label}"] = len(paths) / seconds[name, workers]
            row[f"times the usual, {label}"] = seconds["usual", workers] / seconds[name, workers]
        item = loaders[name, 1].dataset[0, 0]
        rows.append(row | {"KiB per image": sum(x.nbytes for x in item[:-1]) / 1024})
    return rows


class Watched:
    """A loader that adds up how long it lets one wait for all batches but the first; and when that was there, `began`."""

    def __init__(self, loader):
        self.loader, self.sampler, self.dataset = loader, loader.sampler, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        yield next(batches)
        self.waited, self.began = 0.0, time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def end_to_end(args, machine, variant, paths):
    """Epochs of tinymim.train_epoch, the first of them and the first step of each not counted.

    Returns (images/s, share of the time spent waiting for data), medians.
    """
    count = args.steps * args.batch_size
    loader = Watched(make_loader(args, machine, variant.usual, np.resize(paths, count)))
    machine, rounds = machine._replace(amp=variant.amp), []
    for epoch in range(1 + args.repeats):
        loader.sampler.set_epoch(epoch)
        tinymim.train_epoch(variant.forward, variant.prepare, loader, variant.optimizer, variant.scaler, args, machine, epoch, iter(loader),
                            tqdm(disable=True))
        took = time.perf_counter() - loader.began  # from when train_epoch asked for its second batch
        rounds.append(((count - args.batch_size) / took, loader.waited / took))
    return [statistics.median(column) for column in zip(*rounds[1:])]


# ------------------------------------------------------------------------------------------------------------
# The report.


def measure(args, machine, paths):
    """All measurements, as what --json prints."""
    def say(what):
        print(what, file=sys.stderr, flush=True)

    result = {"machine": describe(args), "options": {name: getattr(args, name) for name in OPTIONS}}

    say("memory")  # first: a process begins with the peak of the one that starts it
    memory = [peak_memory(args, place) for place in range(len(variants(args)))]

    say("input pipeline")
    result["pipeline"] = measure_pipelines(args, machine, paths)

    say("training step")
    all_variants = [Variant(args, *kind) for kind in variants(args)]
    flops = {part: count_flops(function) for part, function in all_variants[0].parts().items()}
    functions, work = ceilings(args, machine.device)
    functions |= {(str(variant), part): function for variant in all_variants for part, function in variant.parts().items()}
    times, again = interleaved(functions, machine.device, args.repeats, untimed=1)
    result["compiler"] = dict(zip(("graphs", "graph breaks"), compiler())) | {"graphs after the warm-up": again}
    result["ceilings"] = {name: {"per second": amount / times[name], "unit": unit} for name, (amount, unit) in work.items()}
    result["GFLOP per image"] = {part: flops[part] / args.batch_size / 1e9 for part in ("teacher", "student", "relation loss", "step")}
    result["step"] = []
    for variant, peak in zip(all_variants, memory):
        name, suffix = str(variant), ", " + precision(variant.amp, variant.device)
        ceiling = next(entry["per second"] * 1e12 for title, entry in result["ceilings"].items() if title.endswith(suffix))
        row = {"variant": name} | {f"{part}, ms": 1000 * times[name, part] for part in PARTS}
        row["images/s"] = args.batch_size / times[name, "step"]
        row |= {f"{part}, % of ceiling": 100 * flops[part] / times[name, part] / ceiling for part in ("teacher", "step")}
        row["peak memory, GiB"] = peak
        result["step"].append(row)

    say("end to end")
    result["end to end"] = []
    for variant in (all_variants[0], *([all_variants[-1]] if args.device == "cuda" else [all_variants[1]])):
        rate, waiting = end_to_end(args, machine, variant, paths)
        alone = args.batch_size / times[str(variant), "step"]
        result["end to end"].append({"variant": str(variant), "images/s": rate, "% of the step alone": 100 * rate / alone,
                                     "waiting for data, %": 100 * waiting})
    result["compiler"]["graphs in training"] = compiler()[0] - result["compiler"]["graphs"]
    return result


def describe(args):
    """What the measurements depend on, besides the options."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    return {"GPU": torch.cuda.get_device_name() if args.device == "cuda" else None, "processor": processor, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "CUDA": torch.version.cuda if args.device == "cuda" else None,
            "torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}


def print_table(rows):
    """A Markdown table of rows, {column: value}."""
    def text(value):
        return str(value) if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(text, row.values())) + " |")


def report(result):
    """Print what `measure` returns as Markdown tables."""
    options, machine = result["options"], {name: value for name, value in result["machine"].items() if value}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"student {options['student']}, teacher {options['teacher']}, batch {options['batch_size']} of {options['img_size']} pixels")
    print_table([{"ceiling": name, "rate": f"{entry['per second']:.3g} {entry['unit']}"} for name, entry in result["ceilings"].items()])
    print_table(result["pipeline"])
    print_table(result["step"])
    print("\nGFLOP per image: " + ", ".join(f"{part} {value:.3g}" for part, value in result["GFLOP per image"].items()))
    print_table(result["end to end"])
    if result["compiler"]["graphs"]:
        print("\ntorch.compile: " + ", ".join(f"{name} {value}" for name, value in result["compiler"].items()))


def main(argv=None):
    """python extras/benchmark.py, with the words of argv, or those of the command line."""
    parser = tinymim.Parser("benchmark.py", "How fast this machine distils, and what of its own ceilings that reaches.")
    add, positive = parser.add_argument, tinymim.number(int, 1)
    add("--data", default="imagenette", metavar="FOLDER", help="of images; default: Imagenette, downloaded once to data/")
    add("--student", choices=STUDENTS, default="tiny", help="default: tiny")
    add("--teacher", choices=TEACHERS, default="mae_base", help="of its size, with random weights; default: mae_base")
    add("--teacher-block", type=positive, metavar="N", help="default: as in tinymim.py")
    add("--relation-heads", type=positive, metavar="N", help="default: the teacher's attention heads")
    add("--img-size", type=positive, default=224, metavar="N", help="in pixels; default: 224")
    add("--batch-size", type=positive, metavar="N", help="default: 256 on a GPU, 8 on the CPU")
    add("--pictures", type=tinymim.number(int, 64), metavar="N",
        help="that a pipeline delivers each time; default: 1024, or 512 for each worker")
    add("--steps", type=tinymim.number(int, 2), metavar="N", help="in an epoch, end to end; default: 100 on a GPU, 4 on the CPU")
    add("--repeats", type=positive, default=5, metavar="N", help="of every measurement; default: 5")
    add("--workers", type=positive, metavar="N", help="default: one per core")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure torch.compile, too; default: on a GPU (on a CPU it takes minutes)")
    add("--json", action="store_true", help="print all that was measured as JSON instead of tables")
    add("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(amp="auto", fused=None, out=None, resume=False, argv=sys.argv[1:] if argv is None else argv, **LOOP)
    tinymim.command_line(parser, argv, lambda args: "benchmark", benchmark)


def benchmark(args):
    """Print all measurements, or with --memory-of the one that needs a process of its own."""
    machine = tinymim.start(args)
    args.device, args.compile = machine.device.type, machine.compile
    on_gpu = args.device == "cuda"
    tinymim.fill_in(args, dict(batch_size=256 if on_gpu else 8, steps=100 if on_gpu else 4, pictures=max(1024, 512 * machine.workers)))
    try:
        if args.memory_of is not None:
            variant = Variant(args, *variants(args)[args.memory_of])
            for step in range(6):
                if step == 3 and args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # of compiling and tuning
                variant.step()
            return print(tinymim.peak_memory(machine.device))
        tinymim.check_exists(args.data, besides=["imagenette"])
        paths = tinymim.find_images(tinymim.imagenette() if args.data == "imagenette" else args.data)
        result = measure(args, machine, np.random.RandomState(0).permutation(paths))
    except ValueError as error:  # sizes that do not fit
        raise tinymim.UserError(error, code=2) from error
    print(json.dumps(result, indent=1)) if args.json else report(result)


if __name__ == "__main__":
    main()
