"""How fast this machine distils and fine-tunes, where the time goes, and what ImageNet would cost.

    python extras/benchmark.py --data /path/to/images
    python extras/benchmark.py --student base --teacher mae_large --json > speed.json
    python extras/benchmark.py --data /path/to/imagenet --variants compiled finetune

Variants: "usual" is distilling as one would write it, in fp16 on a GPU (where the gradient scaler
waits for it in every step), in float32 on the CPU. "eager" and "compiled" are tinymim.py.
"finetune" is finetune.py, by its recipe, on class folders. Weights are random.

A step on a batch that is there is measured: its time, and a GPU's peak memory. --measure adds:
    parts     of a step of tinymim.py, each by itself
    training  images/s from files to updates, at a steady rate, and hours for ImageNet at that rate
    pipeline  images/s of the workers alone: in the long run, training cannot exceed them
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from timeit import default_timer as clock

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Subset, default_collate
from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import tinymim
from tinymim import COUNT, DTYPES, TinyMIM, split_heads

IMAGENET = 1_281_167  # images
TEACHERS = {"mae_base": (768, 12, 12, 16), "mae_large": (1024, 24, 16, 16),
            "mae_huge": (1280, 32, 16, 14)}  # dim, depth, heads, patch size

# ---- 1. What is measured ------------------------------------------------------------------------

class UsualDataset(tinymim.ImageDataset):
    """The student's and the teacher's view of an image, float (3, H, W) each, made by Pillow."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    finish = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                         tinymim.normalize])

    def __getitem__(self, key):
        with Image.open(os.fsdecode(self.paths[key % len(self)])) as image:
            crop = self.transform(image.convert("RGB"))
        return self.finish(self.jitter(crop)), self.finish(crop)

def relation(a, b, heads):  # (B, N, D) each, to (B, heads, N, N)
    a, b = split_heads(a, heads), split_heads(b, heads)
    return (a @ b.transpose(2, 3) / a.shape[-1] ** 0.5).softmax(dim=-1)

class UsualAttention(tinymim.Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = relation(q, k, self.heads) @ split_heads(v, self.heads)
        return self.proj(x.transpose(1, 2).flatten(2))

class UsualTinyMIM(TinyMIM):
    """Relations as their formula says, of views that the workers made."""
    def forward(self, *views):
        return self.losses(*views)

    def losses(self, student_images, teacher_images):
        with torch.no_grad():
            teacher = dict(zip("qkv", self.teacher.qkv_at(teacher_images, self.teacher_block)))
        student = dict(zip("qkv", self.student.qkv_at(student_images, self.student.depth)))
        losses, heads = {}, self.relation_heads
        for a, b in self.pairs:
            target = relation(teacher[a], teacher[b], heads)
            predicted = relation(student[a], student[b], heads)
            losses[a + b] = F.kl_div(predicted.log(), target, reduction="none").sum(-1).mean()
        return losses

def build_distillation(args):  # an objective, its dataset, its optimiser
    dim, depth, heads, patch_size = TEACHERS[args.teacher]
    teacher = tinymim.ViT(dim, depth, heads, patch_size, args.img_size)
    student = tinymim.new_student(args, patch_size, args.img_size)
    Objective, Dataset = TinyMIM, tinymim.ImageDataset
    if args.variant == "usual":
        Objective, Dataset = UsualTinyMIM, UsualDataset
        for block in (*student.blocks, *teacher.blocks):
            block.attn = UsualAttention(block.attn.proj.in_features, block.attn.heads)
    objective = Objective(student, teacher, args.teacher_block, args.relation_heads, args.relations)
    optimizer = tinymim.make_optimizer(objective.to(args.device), args.weight_decay)
    if args.variant == "usual":
        optimizer = torch.optim.AdamW(p for p in student.parameters() if p.requires_grad)
    paths = tinymim.find_images(tinymim.image_folder(args.data, "train"))
    return objective, Dataset(paths, tinymim.crop_and_flip(args.img_size)), optimizer

def build_finetuning(args):
    parser = finetune.make_parser("finetune.py", finetune.__doc__)
    # Random weights. Each layer has a rate of its own, as it has from a checkpoint.
    options = parser.parse_args(["--checkpoint=none", "--layer-decay=0.75"])
    for name in ("student", "dim", "depth", "heads", "img_size"):
        setattr(options, name, getattr(args, name))
    checkpoint = finetune.settle(options)  # fills in the rest of the recipe
    paths, labels, classes = finetune.read_folder(tinymim.image_folder(args.data, "train"))
    objective = finetune.build(options, checkpoint, classes).to(args.device)
    transform = finetune.train_transform(args.img_size, options.crop_scale, options.augment)
    groups = finetune.parameter_groups(objective.student, options.weight_decay, options.layer_decay)
    args.epochs = options.epochs
    return (objective, tinymim.ImageDataset(paths, transform, labels=labels),
            torch.optim.AdamW(groups, fused=args.device == "cuda"))

# ---- 2. The clock -------------------------------------------------------------------------------

WARM_UP = 3  # steps that are not timed: compilation, the choice of kernels
AHEAD = 2  # batches that each worker makes before anybody asks for them: DataLoader's default

def time_step(step, batches, steps, args, ready=0):
    """Seconds that step(batches) takes, the mean of `steps` calls, and that it waits for batches.

    At first workers get ahead: up to `ready` batches lie there. To count them would show a rate
    that no long training has. So they are thrown away before the clock starts, and the workers have
    more to make when it stops.
    """
    finish = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    batches, waited = iter(batches), 0.0

    def noted():
        nonlocal waited
        while True:
            asked = clock()
            batch = next(batches)
            waited += clock() - asked
            yield batch

    for _ in range(WARM_UP):
        step(batches)
    for _ in range(2 * ready):  # twice: workers go on while the first are thrown away
        next(batches)
    finish()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, noting = clock(), noted()
    for _ in range(steps):
        step(noting)
    finish()
    return (clock() - began) / steps, waited / steps

def time_step_on_files(step, dataset, args):
    """The same with the workers of tinymim.fit. Images are repeated as often as needed."""
    ready = AHEAD * args.workers
    steps = max(8, 4 * ready)  # smooths how unevenly workers deliver
    images = (WARM_UP + 3 * ready + steps) * args.batch_size
    loader = tinymim.make_loader(Subset(dataset, range(images)), args)
    return time_step(step, loader, steps, args, ready)

# ---- 3. Measurements ----------------------------------------------------------------------------

def measure(objective, dataset, optimizer, args):
    """{table: row}."""
    tables, dtype = {}, str(DTYPES[args.amp] or torch.float32).removeprefix("torch.")

    def add(table, row):
        tables[table] = {"variant": f"{args.variant}, {dtype}"} | row
        print(table, json.dumps(tables[table]), flush=True)

    objective.train().compile(disable=not args.compile)
    for group in optimizer.param_groups:
        group["lr"] = 1e-9  # takes as long as any, and never overflows, where fp16 skips a step
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    step = lambda batches: tinymim.update(objective, batches, optimizer, scaler, args, {})
    items = [dataset[key] for key in range(args.batch_size)]
    batch = [tensor.to(args.device) for tensor in default_collate(items)]
    seconds, _ = time_step(step, [batch] * (WARM_UP + args.repeats), args.repeats, args)
    memory = torch.cuda.max_memory_allocated() / 2**30 or None  # 0 without a GPU
    add("step", {"step, ms": 1000 * seconds, "images/s": args.batch_size / seconds,
                 "peak memory, GiB": memory})
    if "parts" in args.measure and args.variant in ("eager", "compiled"):
        add("parts", measure_parts(objective, batch, optimizer, args))
    if "training" in args.measure:
        seconds, waiting = time_step_on_files(step, dataset, args)
        rate = args.batch_size / seconds
        add("end to end", {"images/s": rate, "waiting for data, %": 100 * waiting / seconds,
                           "epochs of ImageNet": args.epochs,
                           "hours for them": args.epochs * IMAGENET / rate / 3600})
    if "pipeline" in args.measure:
        seconds, _ = time_step_on_files(next, dataset, args)
        size = sum(tensor.nbytes for tensor in batch) / 1024 / args.batch_size
        add("pipeline", {"workers": args.workers, "images/s": args.batch_size / seconds,
                         "KiB per image": size})
    return tables

def measure_parts(objective, batch, optimizer, args):
    autocast = torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off")
    teacher_qkv, student_qkv, relation_loss = (
        autocast(torch.compile(function, disable=not args.compile)) for function in
        (objective.teacher.qkv_at, objective.student.qkv_at, tinymim.relation_loss))
    student_images, teacher_images = tinymim.two_views(*batch)

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

    parts = {"views": lambda: tinymim.two_views(*batch), "teacher": teacher, "student": student,
             "relation loss": relations, "optimiser": optimizer.step}
    return {f"{name}, ms": 1000 * time_step(lambda _: part(), [], args.repeats, args)[0]
            for name, part in parts.items()}

def measure_variant(args):  # in a process of its own
    sys.stdout = sys.stderr  # rows appear as they come, also with --json
    torch.multiprocessing.set_start_method(None, force=True)  # workers start as in a run
    if args.variant == "usual":
        args.amp = "fp16" if args.device == "cuda" else "off"
    if args.variant != "finetune":
        args.compile = args.variant == "compiled"
    tinymim.resolve(args)  # for the threads of this process
    tinymim.start_processes(args)
    build = build_finetuning if args.variant == "finetune" else build_distillation
    return measure(*tinymim.by_options(build, args), args)

# ---- 4. Command line ----------------------------------------------------------------------------

def benchmark(args):
    if tinymim.WORLD > 1:
        raise tinymim.UserError("it measures one process: start it without torchrun")
    on_gpu = args.device == "cuda"
    args.batch_size = args.batch_size or (256 if on_gpu else 8)
    args.repeats = args.repeats or (50 if on_gpu else 3)
    tinymim.resolve(args)  # settles --workers
    args.variants = args.variants or ["usual", "eager"] + ["compiled"] * args.compile
    names = ("student", "teacher", "img_size", "batch_size", "workers", "repeats")
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
    defaults = tinymim.DEFAULTS | tinymim.TEACHING | dict(
        img_size=224, batch_size=None, out=None, compile=None)
    unused = ("out", "resume", "epochs", "warmup_epochs", "accum", "blr", "weight_decay", "seed",
              "drop_path", "compile", "teacher", "teacher_heads")
    parser = tinymim.make_parser("extras/benchmark.py", __doc__, defaults, True, unused)
    kinds = ("parts", "training", "pipeline")
    add = parser.add_argument
    add("--teacher", choices=TEACHERS, help="default: mae_base")
    add("--variants", nargs="+", choices=("usual", "eager", "compiled", "finetune"),
        help="default: usual, eager and, on a GPU, compiled")
    add("--measure", nargs="*", choices=kinds, default=kinds, help="besides a step (default: all)")
    add("--repeats", type=COUNT, help="of a step and its parts (default: 50 on a GPU, else 3)")
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    for name in ("teacher", "teacher_block", "relations", "relation_heads"):
        if args.variants == ["finetune"] and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect on --variants finetune")
    tinymim.run(parser, benchmark, args)

if __name__ == "__main__":
    main()
