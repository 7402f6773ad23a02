"""TinyMIM in one file: distil a small Vision Transformer from a large one that MAE pre-trained.

    python tinymim.py --student tiny --teacher mae_base --data /path/to/imagenet
    torchrun --nproc-per-node 8 tinymim.py --student base --teacher mae_large --batch-size 512
    torchrun --nproc-per-node 8 tinymim.py --student small --teacher runs/base/last.pth

Paper: Ren, Wei, Zhang, Hu. TinyMIM: An Empirical Study of Distilling MIM Pre-Trained Models.
CVPR 2023, https://arxiv.org/abs/2301.01296. One step of training is the method, in short:

    student_images, teacher_images = two_views(crops)       # only the student's colours change
    with torch.no_grad():                                   # the teacher is frozen
        target = teacher.qkv_at(teacher_images, block=12)   # q, k, v of its last block, (B, N, 768)
    qkv = student.qkv_at(student_images, block=12)          # q, k, v of its own,        (B, N, 192)
    losses = relation_loss(qkv, target, relation_heads=12)  # KL(teacher's relations || student's)
    sum(losses.values()).backward()

Masked image modelling suits large networks: a small one learns more by imitating one of them. It
could copy the class token or the features; the paper finds that relations teach most. Take a pair,
by default q and q, k and k, or v and v: N tokens of width D each. Split D into h relation heads.
Each head gives an N x N matrix, softmax(q qᵀ / sqrt(D/h)): how every token relates to every token.
With the same h in both networks the matrices have the same shape, whatever D is (here a head is 64
wide in the teacher, 16 in the student), so no projection is needed. Nothing is masked here.

Part I is the method: train calls fit, fit calls two_views and TinyMIM.forward, and forward calls
qkv_at and relation_loss. Part II is for reference: checkpoints, image files, the command line.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.utils import extract_archive
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

# ==== Part I: the method =========================================================================

# ---- 1. The loss --------------------------------------------------------------------------------

def log_relation(a, b, relation_heads):
    """log softmax(a bᵀ / sqrt(D/h)): how each token's `a` relates to every token's `b`.

    a, b: queries, keys or values of one block, (B, N, D), to be split into h = relation_heads. The
    class token takes part like any patch. Returns (B, h, N, N); exp() of a row is a distribution.
    """
    if a.ndim != 3 or a.shape[2] % relation_heads:
        raise ValueError(f"{tuple(a.shape)} is not (B, N, D), D divisible by {relation_heads}")
    with torch.autocast(a.device.type, enabled=False):
        # In float32 (on a GPU, TF32): the logits can overflow fp16, and are coarse in bf16. And
        # log_softmax, not softmax().log(), which gives -inf where a probability underflows to 0.
        dtype = torch.promote_types(a.dtype, torch.float32)
        a = a.to(dtype).unflatten(2, (relation_heads, -1)).transpose(1, 2)  # (B, h, N, D/h)
        b = b.to(dtype).unflatten(2, (relation_heads, -1)).transpose(1, 2)
        a = a / math.sqrt(a.shape[-1])
        return F.log_softmax(a @ b.transpose(2, 3), dim=-1)

def relation_loss(student_qkv, teacher_qkv, relation_heads, pairs=("qq", "kk", "vv")):
    """KL(teacher's relation || student's) for each pair, {"qq": scalar, ...}: minimise the sum.

    student_qkv, teacher_qkv: queries, keys, values of one block, (B, N, D) each. B and N are the
    same in both networks, D may differ. Both are split into the same number of relation heads,
    whatever their attention has. (The paper's student has the teacher's number in its last block.)
    """
    student = dict(zip("qkv", student_qkv))
    teacher = dict(zip("qkv", teacher_qkv))
    if student["q"].shape[:2] != teacher["q"].shape[:2]:
        raise ValueError(f"B or N differ: {student['q'].shape} and {teacher['q'].shape}")
    losses = {}
    for a, b in pairs:  # "qk": a = "q", b = "k"
        with torch.no_grad():
            target = log_relation(teacher[a], teacher[b], relation_heads)
        predicted = log_relation(student[a], student[b], relation_heads)
        kl = F.kl_div(predicted, target, reduction="none", log_target=True)  # KL(target||predicted)
        losses[a + b] = kl.sum(dim=-1).mean()  # sum over a row, mean over rows, heads, images
    return losses

# ---- 2. Vision Transformer ----------------------------------------------------------------------

STUDENTS = {  # name: (dim, depth, heads)
    "nano": (96, 4, 3),  # not in the paper: for trials on a CPU
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}

def sincos_pos_embed(dim, grid):
    """MAE's fixed position embeddings, (1, 1 + grid², dim): half of dim for x, half for y."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches]).float()[None]  # zeros: the class token

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))

class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class Block(nn.Module):
    """Pre-norm Transformer block. In training, drop_path is an image's chance to skip a branch."""
    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

class ViT(nn.Module):
    """Vision Transformer with a class token and fixed sin-cos position embeddings, as in MAE.

    dim: the width, D in formulas. An image becomes N tokens: the class token and one for each
    patch. drop_path: one rate for all blocks, as the authors distil, or a list. relation_heads:
    the h that this ViT was distilled with, if it was. Parameters have MAE's and timm's names.
    """
    def __init__(self, dim, depth, heads, patch_size=16, img_size=224, drop_path=0.0,
                 relation_heads=None):
        super().__init__()
        if dim % 4 or dim % heads or img_size % patch_size:
            raise UserError(f"a width of {dim} must be divisible by 4 and by {heads} heads, and "
                            f"--img-size {img_size} by the patch size, {patch_size}")
        self.config = dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size,
                           img_size=img_size, relation_heads=relation_heads)
        self.dim, self.depth, self.heads, self.img_size = dim, depth, heads, img_size
        self.grid = img_size // patch_size  # patches per side
        rates = drop_path if isinstance(drop_path, list) else [drop_path] * depth
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):  # as MAE does
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))  # Conv2d: as a Linear
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, images):
        """Images (B, 3, H, W) to the tokens (B, N, dim) that enter the first block."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, grid², dim)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed

    def qkv_at(self, images, block):
        """q, k, v of block number `block`, from 1: (B, N, dim) each. Later layers do not run."""
        x = self.blocks[:block - 1](self.embed(images))
        chosen = self.blocks[block - 1]
        # Not split into attention heads: the loss splits the width into relation heads.
        return chosen.attn.qkv(chosen.norm1(x)).chunk(3, -1)

    def forward(self, images):
        """Images (B, 3, H, W) to normalised tokens (B, N, dim)."""
        return self.norm(self.blocks(self.embed(images)))

# ---- 3. TinyMIM ---------------------------------------------------------------------------------

class TinyMIM(nn.Module):
    """The objective: two views of a batch in, {pair: loss} out.

    teacher_block: which block teaches, from 1. Default: the last if both networks are equally deep,
        else 3/4 of the way up. Of ViT-L's 24 blocks that is 18, the authors' choice: for a ViT-B
        best in segmentation (52.2 mIoU). In accuracy block 21 is (84.8%, not 84.6%; Table 10).
    relation_heads: h. Default: the h the teacher was distilled with, else its attention heads.
    pairs: the paper's results are of qk vv (84.6% in Table 7). The default here is MiniLMv2's qq kk
        vv (84.5%), which gives each of q, k and v a target of its own.
    """
    def __init__(self, student, teacher, teacher_block=None, relation_heads=None,
                 pairs=("qq", "kk", "vv")):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        if teacher_block is None:
            share = 1 if teacher.depth == student.depth else 0.75
            teacher_block = math.ceil(share * teacher.depth)
        if relation_heads is None:
            relation_heads = teacher.config["relation_heads"] or teacher.heads
        if not 1 <= teacher_block <= teacher.depth:
            raise UserError(f"the teacher has blocks 1 to {teacher.depth} (--teacher-block)")
        if len(set(pairs)) < len(pairs):
            raise UserError(f"{' '.join(pairs)} has a pair twice (--relations)")
        if student.dim % relation_heads or teacher.dim % relation_heads:
            raise UserError(f"widths of {student.dim} and {teacher.dim} do not both split into "
                            f"{relation_heads} relation heads (--relation-heads)")
        self.teacher_block, self.relation_heads, self.pairs = teacher_block, relation_heads, pairs
        student.config["relation_heads"] = relation_heads  # for when it is a teacher itself

    def forward(self, student_images, teacher_images):  # (B, 3, H, W) each
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv_at(teacher_images, self.teacher_block)
        # The student's last block, so that all blocks below it learn too. What comes after the q, k
        # and v of that block gets no gradient, and enters fine-tuning untrained.
        student_qkv = self.student.qkv_at(student_images, self.student.depth)
        return relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

# ---- 4. The two views ---------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def crop_and_flip(size):  # one crop for both networks: token i is the same patch in both
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip()])

def color_jitter(images, order, factors):
    """torchvision's ColorJitter, without hue, for a batch at once: images (B, 3, H, W) in [0, 1].

    order (B, 3): a permutation of brightness (0), contrast (1), saturation (2) for each image.
    factors (B, 3): the strength of the first, second, third step; 1 changes nothing.
    """
    for step in range(3):
        change = order[:, step, None, None, None]  # (B, 1, 1, 1)
        factor = factors[:, step, None, None, None]
        gray = v2.functional.rgb_to_grayscale(images)  # (B, 1, H, W)
        mean = gray.mean((1, 2, 3), keepdim=True)
        # Brightness blends with black, contrast with the mean gray, saturation with the gray image.
        other = torch.where(change == 0, 0, torch.where(change == 1, mean, gray))
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images

def normalize(images):
    return v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)

def two_views(crops):
    """uint8 crops (B, 3, H, W) to the student's view and the teacher's, float (B, 3, H, W) each.

    As in the authors' code only the student's view is jittered; the target comes from true colours.
    Jittering on the GPU lets workers send one uint8 crop, 1/8 the bytes of two float32 views.
    """
    images = crops / 255
    order = torch.rand(len(images), 3, device=images.device).argsort(dim=1)  # permutations
    factors = 0.6 + 0.8 * torch.rand(len(images), 3, device=images.device)  # as ColorJitter(0.4)
    return normalize(color_jitter(images, order, factors)), normalize(images)

# ---- 5. Training --------------------------------------------------------------------------------

RECIPE = dict(  # the authors', if an update has 4096 images: batch_size * accum * processes
    epochs=300,
    warmup_epochs=None,  # None: a 20th of the epochs
    batch_size=256,  # images per batch and process
    accum=1,  # batches whose gradients make one update
    blr=1.5e-4,  # peak learning rate for 256 images per update
    min_lr=0.0,
    weight_decay=0.05,
    drop_path=0.1,  # of the student, the same in all blocks; the teacher has none (Table 13)
)

def learning_rate(epoch, peak, warmup_epochs, epochs, floor=0.0):
    """Linear warm-up from 0 to `peak`, then half a cosine to `floor`. `epoch` is fractional."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(objective, args):
    """AdamW; fit sets its rate. Biases and norms do not decay (the class token does, as in MAE)."""
    learnt = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device == "cuda")

def build(args, kind=TinyMIM):
    """An objective of class `kind`, as the options say. Both networks have the same patches."""
    teacher = load_teacher(args.teacher, args.img_size, args.teacher_heads)
    dim, depth, heads = STUDENTS[args.student]
    student = ViT(args.dim or dim, args.depth or depth, args.heads or heads,
                  teacher.config["patch_size"], teacher.img_size, args.drop_path)
    return kind(student, teacher, args.teacher_block, args.relation_heads, args.relations)

def train(args, build_objective=build):
    """Distil. Another build_objective(args) distils something else: a module with a ViT `student`,
    whose forward(student_images, teacher_images) gives {name: loss}. A `teacher` is not saved."""
    setup(args)  # device, precision, images_per_update = batch_size * accum * processes
    objective = build_objective(args).to(args.device)
    paths = find_images(image_folder(args.data, "train"))
    dataset = ImageDataset(paths, crop_and_flip(objective.student.img_size), args.seed)
    optimizer = make_optimizer(objective, args)
    fit(objective, dataset, torch.compile(two_views, disable=not args.compile), optimizer, args)

def fit(objective, dataset, prepare, optimizer, args, evaluate=lambda epoch: {},
        schedule=learning_rate):
    """The training loop. To learn TinyMIM, read objective as TinyMIM and prepare as two_views;
    evaluate, schedule and lr_scale serve finetune.py and extras/."""
    loader = make_loader(dataset, args)  # of [crops], uint8 (B, 3, H, W)
    updates = len(loader) // args.accum  # per epoch
    peak = args.blr * args.images_per_update / 256  # the linear scaling rule
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")  # bf16 needs none
    history = load_run(args, objective, optimizer, scaler)  # --resume: restores the run
    print_run(args, objective, dataset)
    objective.compile(disable=not args.compile)  # in place: its state_dict keeps its names
    model = objective
    if WORLD > 1:  # in distillation, parameters after the student's last q, k, v get no gradient
        model = nn.parallel.DistributedDataParallel(
            objective, find_unused_parameters=hasattr(objective, "teacher"))

    for epoch in range(len(history), args.epochs):
        # Seed each epoch, for --resume; after iter(loader), as that draws a number in some epochs.
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        torch.manual_seed(hash((args.seed, epoch, RANK)))
        model.train()  # for drop path; the teacher has none, so train() does not change it
        totals, began = {}, time.perf_counter()

        bar = progress_bar(updates, epoch, args)
        for update in bar:
            lr = schedule(epoch + update / updates, peak, args.warmup_epochs, args.epochs,
                          args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            # The gradients of `accum` batches add up to one update.
            for _ in range(args.accum):
                batch = [tensor.to(args.device, non_blocking=True) for tensor in next(batches)]
                inputs = prepare(*batch)  # student_images, teacher_images = two_views(crops)
                with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
                    losses = model(*inputs)  # TinyMIM.forward: {"qq": scalar, ...}
                loss = sum(losses.values())
                scaler.scale(loss / args.accum).backward()
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach()  # .item() waits for the GPU

            if epoch == update == 0:
                print_unused(objective)
            # No gradient clipping, as in MAE and the authors' code.
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if update % 50 == 0 or update == updates - 1:
                bar.set_postfix(loss=loss.item())  # waits, so only now and then
                if not loss.isfinite():
                    raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}: lower --blr")

        means = torch.stack(list(totals.values())) / (updates * args.accum * WORLD)
        if WORLD > 1:
            dist.all_reduce(means)
        means = dict(zip(totals, means.tolist()))
        record = {"epoch": epoch + 1, **means, "loss": sum(means.values()), "lr": lr,
                  "images/s": updates * args.images_per_update / (time.perf_counter() - began)}
        history.append(record | evaluate(epoch + 1))
        save_run(args, objective, optimizer, scaler, history)

# ==== Part II: the rest of a program =============================================================

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these: the number of this process,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp: autocast's dtype

class UserError(ValueError):
    """A mistake in options or files. The command line prints it in a line, without a traceback."""

# ---- 6. Checkpoints -----------------------------------------------------------------------------

MAE_URL = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_"
TEACHERS = {f"mae_{size}": f"{MAE_URL}{size}.pth" for size in ("base", "large", "huge")}

def must_fetch(path):
    """Whether this process is to fetch it: the first of each machine does so, the others wait."""
    while LOCAL_RANK > 0 and not os.path.exists(path):
        time.sleep(1)
    return not os.path.exists(path)

def download(url):
    """A file from the web, kept in torch's cache."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if must_fetch(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)  # to .partial, then renamed
        except Exception as error:  # of the network, the server, the disk
            raise UserError(f"cannot download {url} ({error}): fetch it by hand to {path}, name a "
                            "file or --data FOLDER of yours, or try extras/demo.py") from error
    return path

def load_file(path):
    """What torch.save wrote, as long as that is tensors and plain values: no code in it runs."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")  # PyTorch does not check it
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE saves its options
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types
        reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise UserError(f"cannot load {path} ({reason}). If a download was cut short, delete it; "
                        "if it has more than tensors, save model.state_dict() instead") from error

def read_checkpoint(source, heads=None):
    """{name: tensor} of a file or a name in TEACHERS, the ViT arguments they imply, our config."""
    if source not in TEACHERS and not os.path.isfile(source):
        raise UserError(f"there is no file {source}; known by name are {', '.join(TEACHERS)}")
    content = load_file(download(TEACHERS[source]) if source in TEACHERS else source)
    try:
        config = content["config"] if isinstance(content.get("config"), dict) else {}
        for name in ("model", "state_dict", "model_state_dict"):
            content = content.get(name, content)
        tensors = {name.removeprefix("module.").removeprefix("_orig_mod."): tensor  # DDP, compile
                   for name, tensor in content.items()
                   if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()}
        dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        img_size = patch_size * math.isqrt(tensors["pos_embed"].shape[1] - 1)
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        heads = heads or config.get("heads")
    except (AttributeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{source} has no ViT with timm's names, such as patch_embed.proj.weight: "
                        f"timm.create_model(NAME) may have the same ({error!r})") from error
    if heads is None:
        heads = 16 if dim == 1280 else max(1, dim // 64)  # timm's
        if RANK == 0:
            print(f"{source}: {heads} attention heads, by its width (--teacher-heads, --heads)")
    sizes = dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=img_size)
    return tensors, sizes, config

def load_weights(vit, tensors, source):
    """Copy {name: tensor} into the ViT. It may have a decoder or another head besides."""
    own = vit.state_dict()
    tensors = {name: t for name, t in tensors.items() if name in own or name.startswith("blocks.")}
    try:
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], vit.grid)
        vit.load_state_dict(tensors)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{source} does not fit a ViT of this size, for square images, with one "
                        f"class token and a last norm: {' '.join(str(error).split())[:200]}")

def resize_pos_embed(pos_embed, grid):
    """Position embeddings (1, 1 + g², dim) resized to (1, 1 + grid², dim), as MAE does it."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()  # (1, dim, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

def load_teacher(source, img_size=None, heads=None):
    """A ViT from a name in TEACHERS or a file, for images of img_size (default: the file's)."""
    tensors, sizes, config = read_checkpoint(source, heads)
    sizes["img_size"] = img_size or sizes["img_size"]
    teacher = ViT(**sizes, relation_heads=config.get("relation_heads"))
    load_weights(teacher, tensors, source)
    return teacher

# What --resume may change, as long as images_per_update is the same. --data is not checked.
MAY_CHANGE = {"resume", "out", "data", "workers", "device", "compile", "batch_size", "accum"}

def load_run(args, objective, optimizer, scaler):
    """With --resume, continue the run in args.out. Returns the records of its finished epochs."""
    path = os.path.join(args.out, "last.pth")
    if not (args.resume and os.path.exists(path)):
        return []
    saved = load_file(path)
    if "history" not in saved:
        raise UserError(f"{path} is not of a run of this program: choose another --out")
    now = vars(args) | objective.student.config
    for name, before in (saved["args"] | saved["config"]).items():
        if name in now and name not in MAY_CHANGE and now[name] != before:
            raise UserError(f"{path} has a run with --{name.replace('_', '-')} {before!s:.80}, not "
                            f"{now[name]!s:.80}: --resume continues a run, by its own schedule")
    objective.load_state_dict(objective.state_dict() | saved["objective"])  # saved without teacher
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    return saved["history"]

def save_run(args, objective, optimizer, scaler, history):
    """Write log.jsonl, best.pth (of the best top1), last.pth: a kill costs an epoch at most."""
    if RANK > 0:
        return
    print("  ".join(f"{name} {value:.5g}" for name, value in history[-1].items()), flush=True)
    with open(os.path.join(args.out, "log.jsonl"), "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in history)
    own = {k: v for k, v in objective.state_dict().items() if "teacher" not in k.split(".")}
    checkpoint = dict(model=objective.student.state_dict(), config=objective.student.config,
                      objective=own, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                      history=history, epoch=len(history), args=vars(args))
    *before, newest = [record.get("top1", -1) for record in history]
    is_best = newest > max(before, default=-1)
    for name in ["best.pth", "last.pth"] if is_best else ["last.pth"]:
        path = os.path.join(args.out, name)
        torch.save(checkpoint, path + ".part")
        os.replace(path + ".part", path)

# ---- 7. Image files to batches ------------------------------------------------------------------

def image_folder(data, split=""):
    """The folder that --data names (imagenette: fetched), or its subfolder `split`, if any."""
    folder = os.path.join("data", "imagenette2-320") if data == "imagenette" else data
    if data == "imagenette" and must_fetch(folder):
        archive = download("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz")
        os.makedirs("data", exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir="data") as partial:  # the folder appears whole
                extract_archive(archive, partial)
                os.rename(os.path.join(partial, "imagenette2-320"), folder)
        except Exception as error:  # of many types, if the download was cut short
            raise UserError(f"cannot unpack {archive} ({error}): delete it if cut short") from error
    inside = os.path.join(folder, split)
    return inside if split and os.path.isdir(inside) else folder

def find_images(folder):
    """The paths of all images in `folder`, at any depth, sorted, as an array of bytes."""
    paths, others, folders = [], 0, [folder]
    while folders:  # depth first, so that a loop of links soon raises OSError
        for entry in os.scandir(folders.pop()):
            if entry.name.startswith("."):  # .ipynb_checkpoints, and macOS's ._photo.jpg
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
                paths.append(os.fsencode(entry.path))
            else:
                others += 1
    if not paths:
        raise UserError(f"there are no .jpg, .png or .webp images in {folder}")
    if others and RANK == 0:
        print(f"passed over {others} files in {folder} that are not .jpg, .png or .webp")
    return np.array(sorted(paths))  # compact, and shared by forked workers

def decode(path):
    """An image file as uint8 RGB (3, H, W)."""
    decode_jpeg = getattr(torchvision.io, "decode_image", None)  # torchvision will drop it one day
    try:
        # Pillow refuses absurd sizes. torchvision is faster, but crashes on damaged PNGs.
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF")) as image:
            if image.format == "JPEG" and decode_jpeg:
                return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), mode="RGB")
            if image.mode.startswith(("I", "F")):  # Pillow would turn most of it white
                raise ValueError("more than 8 bits per colour: convert it to 8")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"cannot read {path} ({error})") from error

class ImageDataset(Dataset):
    """Items are (transform(image),) or (transform(image), label). A key, epoch * len(dataset) +
    index, seeds the transform: it is the same in any worker, and after --resume."""
    def __init__(self, paths, transform, seed=0, labels=None):
        self.paths, self.transform, self.seed, self.labels = paths, transform, seed, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index = key % len(self)
        image = decode(os.fsdecode(self.paths[index]))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(key))))
            image = self.transform(image)
        return (image,) if self.labels is None else (image, self.labels[index])

class EpochSampler(DistributedSampler):
    def __iter__(self):  # keys of ImageDataset, in a new order in each epoch
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())

def make_loader(dataset, args):
    if len(dataset) < args.images_per_update:
        raise UserError(f"{len(dataset)} images do not fill an update of {args.images_per_update}: "
                        f"--batch-size {max(1, len(dataset) // (args.accum * WORLD))} or less")
    sampler = EpochSampler(dataset, WORLD, RANK, seed=args.seed, drop_last=True)
    return DataLoader(dataset, args.batch_size, sampler=sampler, drop_last=True,
                      num_workers=args.workers, persistent_workers=args.workers > 0,
                      pin_memory=args.device == "cuda")

# ---- 8. A run, and its command line --------------------------------------------------------------

def setup(args):
    """Check --out, join the other processes, and fill in options that are None or auto."""
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        if not args.resume and {"last.pth", "best.pth"} & {*os.listdir(args.out)}:
            raise UserError(f"{args.out} holds a run: add --resume, or choose another --out")
    on_gpu = args.device == "cuda"
    if on_gpu and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError("more processes than GPUs: start fewer, or use --device cpu")
    if args.amp == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if on_gpu else "off"
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20
    args.images_per_update = args.batch_size * args.accum * WORLD
    cores = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # per process
    if args.workers is None:
        args.workers = min(16, cores) if on_gpu else (cores + 2) // 4
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - args.workers))
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.manual_seed(args.seed)

def print_run(args, objective, dataset):  # what is about to happen
    lines = {name: f"{vit.dim} wide, {vit.depth} blocks, {vit.heads} heads"
             for name, vit in objective.named_children() if isinstance(vit, ViT)}
    if isinstance(objective, TinyMIM):
        lines["loss"] = (f"{' '.join(objective.pairs)} of block {objective.teacher_block}, "
                         f"{objective.relation_heads} relation heads")
    size = args.images_per_update
    lines["training"] = (f"{len(dataset)} images, {len(dataset) // size} updates of {size} per "
                         f"epoch, {args.epochs} epochs, peak rate {args.blr * size / 256:.3g}")
    lines["machine"] = (f"{args.device}, amp {args.amp}, {args.workers} workers, "
                        f"{torch.get_num_threads()} threads, into {args.out}")
    if RANK == 0:
        print(*(f"{name:10}{text}" for name, text in lines.items()), sep="\n", flush=True)

def print_unused(objective):
    names = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if names and RANK == 0:
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
        print("untrained, as no loss reaches them:", *modules)

def progress_bar(updates, epoch, args):
    return tqdm(range(updates), f"epoch {epoch + 1}/{args.epochs}", leave=False, unit=" images",
                unit_scale=args.images_per_update, disable=RANK > 0 or None)  # not in logs

def between(kind, low, high=10**9):  # the type of an option
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number
COUNT, RATE, SHARE = between(int, 1), between(float, 0), between(float, 0, 1)

def make_parser(prog, doc, recipe, teacher=False):
    """The options of all scripts, with their defaults in `recipe`, and perhaps of distillation."""
    summary, examples = doc.split("\n\n")[:2]
    parser = argparse.ArgumentParser(prog, description=summary, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**dict(script=prog, student="tiny", accum=1) | recipe)
    add = parser.add_argument
    add("--student", choices=STUDENTS, help="size of a new ViT (default: tiny)")
    for name in ("dim", "depth", "heads"):
        add(f"--{name}", type=COUNT, help="overrides that of --student")
    add("--img-size", type=COUNT, help="in pixels (default: the checkpoint's, or 224)")
    add("--data", default="imagenette", help="folder of images (default: imagenette, downloaded)")
    add("--out", help="folder for checkpoints and log (default: in runs/)")
    add("--resume", action="store_true", help="continue a run: repeat its command and add this")
    add("--epochs", type=COUNT, help="passes over the data")
    add("--warmup-epochs", type=RATE, help="of linear warm-up")
    add("--batch-size", type=COUNT, help="images per batch and process")
    add("--accum", type=COUNT, help="batches that make one update (default: 1)")
    add("--blr", type=RATE, help="peak learning rate for 256 images per update")
    add("--weight-decay", type=RATE, help="of AdamW")
    add("--drop-path", type=SHARE, help="rate of skipping a branch")
    add("--seed", type=between(int, 0), default=0, help="of all that is random (default: 0)")
    add("--workers", type=between(int, 0), help="image decoders (default: by the cores)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "mps", "cpu"), default=device, help="mps is untested")
    add("--amp", choices=("auto", *DTYPES), default="auto", help="default: bf16 or fp16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction, default=device == "cuda")
    if teacher:
        add("--teacher", default="mae_base", help=f"{', '.join(TEACHERS)}, or a checkpoint")
        add("--teacher-heads", type=COUNT, help="attention's (default: the file's, or by width)")
        add("--teacher-block", type=COUNT, help="default: the last, or if depths differ, at 3/4")
        add("--relations", nargs="+", choices=[a + b for a in "qkv" for b in "qkv"], metavar="PAIR",
            default=["qq", "kk", "vv"], help="default: qq kk vv; the published results: qk vv")
        add("--relation-heads", type=COUNT, help="default: the teacher's")
    return parser

def run(parser, function, args, *more):  # a user's mistake ends in one line, without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C, at once
    try:
        function(args, *more)
        if WORLD > 1:
            dist.destroy_process_group()
    except (OSError, UserError) as error:  # one from a worker begins with its traceback
        sys.exit(f"{parser.prog}: error: {str(error).rsplit('UserError: ', 1)[-1].strip()}")
    except RuntimeError as error:  # PyTorch's, about memory or a full disk: add what may help
        words = "out of memory", "allocate", "inline_container", "iostream", "DataLoader worker ("
        if not any(word in str(error) for word in words):
            raise
        start = str(error).rsplit("Error: ", 1)[-1].splitlines()[0]  # after a worker's traceback
        start = ". ".join(start.split(". ")[:3])  # out of memory has much to say
        sys.exit(f"{parser.prog}: error: {start} (a full disk? Else halve --batch-size and double "
                 "--accum, or try --workers 0 or docker run --shm-size 8g)")

def main(argv=None, build_objective=build):
    parser = make_parser("tinymim.py", __doc__, RECIPE, teacher=True)
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", args.student)
    run(parser, train, args, build_objective)
    if RANK == 0:
        print(f"finished. Next: python finetune.py --checkpoint {args.out}/last.pth --data FOLDER")

if __name__ == "__main__":
    main()
