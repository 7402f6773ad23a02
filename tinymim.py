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

Masked image modelling suits large networks. The paper finds that a small one learns more by
imitating a large one, and most by imitating its relations. A relation compares every token with
every token: it is an N x N matrix, softmax(a bᵀ / sqrt(D/h)), one for each of h relation heads, and
a and b are q, k or v, N tokens of width D each. Its shape depends on N and h, not on D (here a head
is 64 wide in the teacher, 16 in the student). So the networks need no projection between them.
Nothing is masked here.

Part I is the method, and runs by itself: update is a step of training, and calls TinyMIM.forward,
which calls two_views, qkv_at and relation_loss. Part II is for reference: main calls train, train
calls build and fit, and fit calls update; around it checkpoints, image files, options.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import Imagenette
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these: the number of this process,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp: autocast's dtype

# ==== Part I: the method =========================================================================

# ---- 1. The loss --------------------------------------------------------------------------------

def split_heads(x, heads):
    """(B, N, D) to (B, heads, N, D/heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)

def log_relation(a, b, relation_heads):
    """log softmax(a bᵀ / sqrt(D/h)): how each token's `a` relates to every token's `b`.

    a, b: queries, keys or values of one block, (B, N, D), to be split into h = relation_heads. The
    class token takes part like any patch. Returns (B, h, N, N); exp() of a row is a distribution.
    """
    if a.ndim != 3 or a.shape[2] % relation_heads:
        raise ValueError(f"{tuple(a.shape)} is not (B, N, D), D divisible by {relation_heads}")
    # Without autocast: fp16 logits can overflow, bf16 rounds sums and probabilities.
    dtype = torch.promote_types(a.dtype, torch.float32)  # float64 stays float64
    with torch.autocast(a.device.type, enabled=False):
        a = split_heads(a.to(dtype), relation_heads)
        b = split_heads(b.to(dtype), relation_heads)
        a = a / math.sqrt(a.shape[-1])
        # log_softmax, not softmax().log(): a probability that underflows to 0 would give -inf.
        return F.log_softmax(a @ b.transpose(2, 3), dim=-1)

def relation_loss(student_qkv, teacher_qkv, relation_heads, pairs=("qq", "kk", "vv")):
    """KL(teacher's relation || student's) for each pair, {"qq": scalar, ...}: minimise the sum.

    student_qkv, teacher_qkv: queries, keys, values of one block, (B, N, D) each. B and N are the
    same in both networks, D may differ. Both are split into the same number of relation heads,
    whatever their attention has.
    """
    student = dict(zip("qkv", student_qkv, strict=True))
    teacher = dict(zip("qkv", teacher_qkv, strict=True))
    if student["q"].shape[:2] != teacher["q"].shape[:2]:
        raise ValueError(f"B or N differ: {student['q'].shape} and {teacher['q'].shape}")
    losses = {}
    for pair in pairs:
        a, b = pair  # "qk": a = "q", b = "k"
        with torch.no_grad():
            log_target = log_relation(teacher[a], teacher[b], relation_heads)
        log_predicted = log_relation(student[a], student[b], relation_heads)
        # KL(teacher || student): what the teacher relates strongly weighs most.
        kl = F.kl_div(log_predicted, log_target, reduction="none", log_target=True)
        losses[pair] = kl.sum(dim=-1).mean()  # sum over a row, mean over rows, heads and images
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
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))

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

    def qkv(self, x):
        """The queries, keys and values of its attention, (B, N, dim) each, not split into heads."""
        return self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

class ViT(nn.Module):
    """Vision Transformer with a class token and fixed sin-cos position embeddings, as in MAE.

    dim: the width, D in formulas. An image becomes N tokens: the class token and one for each
    patch. drop_path: the same rate in all blocks, as the authors distil. relation_heads: the h that
    its q, k and v are split into when it teaches (default: heads). Parameters have timm's names.
    """
    def __init__(self, dim, depth, heads, patch_size=16, img_size=224, drop_path=0.0,
                 relation_heads=None):
        super().__init__()
        if dim % 4 or dim % heads or img_size % patch_size:
            raise ValueError(f"a width of {dim} must be divisible by 4 and by {heads} heads, and "
                             f"images of {img_size} pixels by patches of {patch_size}")
        self.config = dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size,
                           img_size=img_size, relation_heads=relation_heads)
        self.dim, self.depth, self.heads, self.img_size = dim, depth, heads, img_size
        self.relation_heads = relation_heads or heads
        self.grid = img_size // patch_size  # patches per side
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(dim, heads, drop_path) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """MAE's: Xavier uniform. The convolution counts as a matrix, and keeps PyTorch's bias."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, images):
        """Images (B, 3, H, W) to the tokens (B, N, dim) that enter the first block."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (B, grid², dim)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed

    def qkv_at(self, images, block):
        """q, k, v of block number `block`, from 1: (B, N, dim) each. Later layers do not run."""
        if not 1 <= block <= self.depth:
            raise ValueError(f"there is no block {block}: 1 to {self.depth}")
        x = self.blocks[:block - 1](self.embed(images))
        return self.blocks[block - 1].qkv(x)

    def forward(self, images):
        """Images (B, 3, H, W) to normalised tokens (B, N, dim)."""
        return self.norm(self.blocks(self.embed(images)))

# ---- 3. The two views ---------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def crop_and_flip(size):  # one crop for both networks: token i is the same patch in both
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])

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
        other = torch.where(change == 1, mean, gray)
        other = torch.where(change == 0, 0, other)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images

def normalize(images):
    return v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)

def two_views(crops):
    """uint8 crops (B, 3, H, W) to the student's view and the teacher's, float (B, 3, H, W) each.
    As in the authors' code only the student's is jittered; the target comes from true colours."""
    # Jittering on the GPU lets workers send one uint8 crop, 1/8 the bytes of two float32 views.
    if crops.dtype != torch.uint8:
        raise ValueError(f"crops should be uint8, 0 to 255, not {crops.dtype}")
    images = crops / 255
    order = torch.rand(len(images), 3, device=images.device).argsort(dim=1)  # permutations
    factors = 0.6 + 0.8 * torch.rand(len(images), 3, device=images.device)  # as ColorJitter(0.4)
    return normalize(color_jitter(images, order, factors)), normalize(images)

# ---- 4. TinyMIM ---------------------------------------------------------------------------------

class TinyMIM(nn.Module):
    """The objective: a batch of uint8 crops in, {pair: loss} out.

    teacher_block: which block teaches, from 1. Default: the last if both networks are equally deep,
        else 3/4 of the way up. Of ViT-L's 24 blocks that is 18, the authors' choice: the best for
        segmentation, 0.2% below block 21 in accuracy (Table 10).
    relation_heads: h. Default: the h the teacher was distilled with, else its attention heads.
    pairs: the paper's results are of qk vv (84.6% in Table 7). The default here is MiniLMv2's qq kk
        vv (84.5%), which gives each of q, k and v a target of its own.
    """
    def __init__(self, student, teacher, teacher_block=None, relation_heads=None,
                 pairs=("qq", "kk", "vv")):
        super().__init__()
        if teacher_block is None:
            share = 1 if teacher.depth == student.depth else 0.75
            teacher_block = math.ceil(share * teacher.depth)
        if relation_heads is None:
            relation_heads = teacher.relation_heads
        if not 1 <= teacher_block <= teacher.depth:
            raise ValueError(f"the teacher has no block {teacher_block}: 1 to {teacher.depth}")
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"a pair of relations comes twice: {' '.join(pairs)}")
        if student.dim % relation_heads or teacher.dim % relation_heads:
            raise ValueError(f"widths of {student.dim} and {teacher.dim} do not both split into "
                             f"{relation_heads} relation heads")
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.teacher_block, self.relation_heads, self.pairs = teacher_block, relation_heads, pairs
        # The loss ends at q, k and v of the student's last block, so that all below it learn. What
        # comes after is not trained, and enters fine-tuning as it was initialised.
        last = student.blocks[-1]
        for layer in (last.attn.proj, last.norm2, last.mlp, student.norm):
            layer.requires_grad_(False).register_forward_pre_hook(refuse_to_train)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops):
        return self.losses(*two_views(crops))

    def losses(self, student_images, teacher_images):  # (B, 3, H, W) each
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv_at(teacher_images, self.teacher_block)
        student_qkv = self.student.qkv_at(student_images, self.student.depth)
        return relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

def refuse_to_train(layer, inputs):
    """A hook of layers that TinyMIM froze: no subclass trains through them by mistake."""
    frozen = [not parameter.requires_grad for parameter in layer.parameters()]
    if frozen and all(frozen) and layer.training and torch.is_grad_enabled():
        raise RuntimeError("TinyMIM froze this layer, as its loss does not reach it. To train it "
                           "all the same: layer.requires_grad_(True)")

# ---- 5. Training --------------------------------------------------------------------------------

RECIPE = dict(  # the authors', if an update has 4096 images: batch_size * accum * processes
    epochs=300,
    warmup_epochs=None,  # None: a 20th of the epochs
    batch_size=256,  # images per batch and process
    accum=1,  # batches whose gradients make one update
    blr=1.5e-4,  # base learning rate: the peak for an update of 256 images
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

def make_optimizer(objective, weight_decay):
    """AdamW; fit sets its rate. Biases and norms do not decay (the class token does, as in MAE)."""
    learnt = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=learnt[0].is_cuda)

def update(model, batches, optimizer, scaler, args, totals):
    """One step of the optimizer, by the gradient of args.accum batches. Adds losses to totals."""
    for i in range(args.accum):
        batch = [tensor.to(args.device, non_blocking=True) for tensor in next(batches)]
        # Processes average their gradients once, in the last backward pass (it is DDP's switch).
        model.require_backward_grad_sync = i == args.accum - 1
        with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
            losses = model(*batch)  # TinyMIM.forward(crops): {"qq": scalar, ...}
        scaler.scale(sum(losses.values()) / args.accum).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise RuntimeError(f"no loss reaches {name}: freeze it, or use it")
    # No gradient clipping, as in MAE and the authors' code.
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

# ==== Part II: the rest of a program =============================================================

class UserError(Exception):
    """A mistake in options or files. The command line prints it in a line, without a traceback."""

@contextlib.contextmanager
def explained(failure, advice="", kind=Exception):
    """Errors of this kind become a UserError that says what failed, why, and what to do."""
    try:
        yield
    except kind as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{failure} ({reason:.300}){advice}") from error

# ---- 6. The training loop -----------------------------------------------------------------------

def fit(objective, dataset, optimizer, args, evaluate=lambda epoch: {}, schedule=learning_rate):
    """The training loop, of any objective that takes a batch of an ImageDataset and gives {name:
    loss}. objective.student, a ViT, is saved as the model; objective.teacher, if any, is not."""
    loader = make_loader(dataset, args)  # of [crops], uint8 (B, 3, H, W)
    updates = len(loader) // args.accum  # per epoch
    peak = args.blr * args.images_per_update / 256  # the linear scaling rule
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")  # bf16 needs none
    state = dict(objective=objective, optimizer=optimizer, scaler=scaler)
    settings = settings_of(args, objective, dataset)
    history = load_run(state, settings)  # the records of finished epochs, with --resume
    print_run(objective, dataset, args)
    objective.compile(disable=not args.compile)  # in place: its state_dict keeps its names
    model = nn.parallel.DistributedDataParallel(objective) if WORLD > 1 else objective
    for epoch in range(len(history), args.epochs):
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        # For --resume, each epoch has its own seed: after iter(loader), which may draw a number.
        torch.manual_seed(seed_from(args.seed, epoch, RANK))
        model.train()
        began, totals = time.perf_counter(), {}
        for step in progress(epoch, updates, totals, args):
            now = epoch + step / updates
            lr = schedule(now, peak, args.warmup_epochs, args.epochs, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            update(model, batches, optimizer, scaler, args, totals)
        speed = updates * args.images_per_update / (time.perf_counter() - began)
        record = mean_losses(totals, updates * args.accum) | {"lr": lr, "images/s": speed}
        history.append({"epoch": epoch + 1} | record | evaluate(epoch + 1))
        save_run(state, settings, history)

# ---- 7. Checkpoints -----------------------------------------------------------------------------

MAE_URL = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_"
TEACHERS = {f"mae_{size}": f"{MAE_URL}{size}.pth" for size in ("base", "large", "huge")}

def download(url):
    """A file from the web, kept in torch's cache."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with explained(f"cannot download {url}", f": fetch it by hand to {path}, or name a file of "
                       "yours. extras/demo.py needs no network"):
            torch.hub.download_url_to_file(url, path)  # to a temporary file, then renamed
    return path

def load_file(path):
    """What torch.save wrote, as long as that is tensors and plain values: no code in it runs."""
    with explained(f"cannot load {path}", ": if it was downloaded, fetch it again; if it has more "
                   "than tensors, save model.state_dict() instead"):
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")  # PyTorch does not check it
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAE saves its options
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # its text is long, and advises to run the code in the file
            refused = re.search("Unsupported global: GLOBAL \\S+", str(error))
            raise ValueError(refused[0] if refused else str(error).split(". ")[0].split("\n")[0])

def read_checkpoint(source, heads=None):
    """{name: tensor} of a file or a name in TEACHERS, the ViT arguments they imply, our config."""
    if source not in TEACHERS and not os.path.isfile(source):
        raise UserError(f"there is no file {source}; known by name are {', '.join(TEACHERS)}")
    content = load_file(download(TEACHERS[source]) if source in TEACHERS else source)
    with explained(f"{source} does not have exactly one ViT with timm's names, such as "
                   "patch_embed.proj.weight"):
        config = content["config"] if isinstance(content.get("config"), dict) else {}
        for name in ("model", "state_dict", "model_state_dict", "teacher"):  # the last is DINO's
            content = content[name] if isinstance(content.get(name), dict) else content
        # What wraps the network stands before its names: module. (DDP), _orig_mod. (compile) ...
        [first] = [name for name in content if name.endswith("patch_embed.proj.weight")]
        prefix = first.removesuffix("patch_embed.proj.weight")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in content.items()
                   if name.startswith(prefix) and torch.is_tensor(tensor)
                   and tensor.is_floating_point()}
        dim, _, patch_size, _ = content[first].shape
        img_size = patch_size * math.isqrt(tensors["pos_embed"].shape[1] - 1)
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = heads or config.get("heads")
    if heads is None:
        heads = 16 if dim == 1280 else max(1, dim // 64)  # timm's
        if RANK == 0:
            print(f"{source}: {heads} attention heads, by its width (--teacher-heads, --heads)")
    if any(type(n) is not int or n < 1 for n in (heads, config.get("relation_heads") or 1)):
        raise UserError(f"{source} has heads that are no number: {config}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{source} has NaN or infinite weights: its training failed")
    sizes = dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=img_size)
    return tensors, sizes, config

def load_weights(vit, tensors, source):
    """Copy {name: tensor} into the ViT. Tensors that act after its blocks may be left out: MAE's
    decoder, heads, norms. Any other that the ViT does not have is an error."""
    after = ("decoder", "mask_token", "head", "fc_norm.", "norm.")
    tensors = {name: tensor for name, tensor in tensors.items()
               if name in vit.state_dict() or not name.startswith(after)}
    with explained(f"{source} is not for square images, has no class token, or another size"):
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], vit.grid)
        vit.load_state_dict(tensors)

def resize_pos_embed(pos_embed, grid):
    """Position embeddings (1, 1 + g², dim) resized to (1, 1 + grid², dim), as MAE does it."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()  # (1, dim, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic")
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

def load_teacher(source, img_size=None, heads=None):
    """A ViT from a name in TEACHERS or a file, for images of img_size (default: the file's)."""
    tensors, sizes, config = read_checkpoint(source, heads)
    sizes["img_size"] = img_size or sizes["img_size"]
    teacher = ViT(**sizes, relation_heads=config.get("relation_heads"))
    teacher.pretraining = config.get("pretraining")
    if "norm.weight" not in tensors:  # MAE's fine-tuned ViTs lack it. q, k and v do not need it
        teacher.norm = None
    load_weights(teacher, tensors, source)
    return teacher

# ---- 8. Image files to batches ------------------------------------------------------------------

def image_folder(data, split=""):
    """The folder that --data names (imagenette: fetched), or its subfolder `split`, if any."""
    folder = os.path.join("data", "imagenette2-320") if data == "imagenette" else data
    if data == "imagenette" and not os.path.isdir(folder):
        os.makedirs("data", exist_ok=True)
        with (tempfile.TemporaryDirectory(dir="data") as partial,  # the folder appears whole
              explained("cannot download Imagenette", ": name your own images by --data FOLDER")):
            Imagenette(partial, size="320px", download=True)
            if not os.path.isdir(folder):  # else another process was faster
                os.rename(os.path.join(partial, "imagenette2-320"), folder)
    if not data:
        raise UserError("--data is empty: name a folder of images")
    inside = os.path.join(folder, split)
    return inside if split and os.path.isdir(inside) else folder

def find_images(folder):
    """The paths of all images in `folder`, at any depth, sorted, as an array of bytes."""
    paths, others, folders = [], 0, [folder]
    while folders:  # depth first: a link to its own parent soon makes a path that is too long
        for entry in os.scandir(folders.pop()):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):  # .ipynb_checkpoints, and macOS's ._photo.jpg
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif suffix in (".jpg", ".jpeg", ".png", ".webp") and (
                    entry.is_file() or entry.is_symlink()):  # to open a pipe would hang
                paths.append(os.fsencode(entry.path))
            else:
                others += 1
    if not paths:
        raise UserError(f"there are no .jpg, .png or .webp images in {folder}")
    if others and RANK == 0:
        print(f"passed over {others} files in {folder} that are not .jpg, .png or .webp")
    return np.array(sorted(paths))  # compact, and shared by forked workers

def decode(path):
    """An image file as uint8 RGB (3, H, W), upright, on white where it is transparent."""
    decode_image = getattr(torchvision.io, "decode_image", None)  # torchvision may drop it one day
    with (explained(f"cannot read {path}"),
          # Pillow refuses absurd sizes. torchvision is faster, but crashes on damaged PNGs.
          Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF")) as image):
        if max(image.size) > 100 * min(image.size):  # resized, it would fill the memory
            raise ValueError(f"{image.width} x {image.height} pixels are no photo")
        if image.format == "JPEG" and decode_image:
            content = torch.from_numpy(np.fromfile(path, np.uint8))
            return decode_image(content, mode="RGB", apply_exif_orientation=True)
        if image.mode.startswith(("I", "F")):  # Pillow would turn most of it white
            raise ValueError("more than 8 bits per colour: convert it to 8")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return v2.functional.pil_to_tensor(image.convert("RGB"))

def seed_from(*numbers):
    """A seed from a run's seed, an epoch, a rank...: other numbers give an unrelated one."""
    numbers = (len(numbers), *numbers)  # as SeedSequence takes (1, 2) and (1, 2, 0) for the same
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])

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
            # The CPU's generator alone: torch.manual_seed would start CUDA in each worker.
            torch.default_generator.manual_seed(seed_from(self.seed, int(key)))
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

# ---- 9. A run -----------------------------------------------------------------------------------

# What --resume may change, as long as images_per_update is the same.
MAY_CHANGE = {"resume", "out", "data", "workers", "device", "compile", "batch_size", "accum",
              "teacher", "label_teacher"}  # their weights must be the same

def settings_of(args, objective, dataset):
    """What must be the same after --resume: options, sizes, the number of images, the teacher."""
    settings = vars(args) | objective.student.config | {"images": len(dataset)}
    if hasattr(objective, "teacher"):
        tensors = objective.teacher.state_dict().values()
        settings["teacher_checksum"] = sum(zlib.crc32(tensor.cpu().numpy()) for tensor in tensors)
    return settings

def load_run(state, settings):
    """With --resume, continue the run in --out. Returns the records of its finished epochs."""
    path, history = os.path.join(settings["out"], "last.pth"), []
    if settings["resume"] and os.path.exists(path):
        saved = load_file(path)
        if not {"args", "history", *state} <= saved.keys():
            raise UserError(f"{path} is not of a run of this program: choose another --out")
        for name, before in saved["args"].items():
            now = settings.get(name)
            if name not in MAY_CHANGE and now != before:
                raise UserError(f"{path} has a run with {name} {before!s:.80}, not {now!s:.80}: "
                                "--resume continues a run, by its own schedule")
        for name, part in state.items():  # saved without the teacher
            part.load_state_dict(part.state_dict() | saved[name])
        history = saved["history"]
    elif settings["resume"] and RANK == 0:
        print(f"there is no {path} yet: a new run")
    found = [len(history)] * WORLD
    if WORLD > 1:
        dist.all_gather_object(found, len(history))
    if len(set(found)) > 1:
        raise UserError(f"{path} differs between the machines: they must share a disk")
    return history

def save_run(state, settings, history):
    """Write log.jsonl, best.pth (of the best top1), last.pth: a kill costs an epoch at most."""
    if RANK > 0:
        return
    student, parts = state["objective"].student, {k: v.state_dict() for k, v in state.items()}
    parts["objective"] = {name: tensor for name, tensor in parts["objective"].items()
                          if "teacher" not in name.split(".")}
    if not all(tensor.isfinite().all() for tensor in parts["objective"].values()):
        raise FloatingPointError(f"there are NaN weights after epoch {len(history)}")
    print("  ".join(f"{name} {value:.5g}" for name, value in history[-1].items()), flush=True)
    with open(os.path.join(settings["out"], "log.jsonl"), "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in history)
    config = {"pretraining": type(state["objective"]).__name__} | student.config
    checkpoint = dict(model=student.state_dict(), config=config, **parts, history=history,
                      epoch=len(history), args=settings)
    *before, newest = [record.get("top1", -1) for record in history]
    is_best = newest > max(before, default=-1)
    for name in ["best.pth", "last.pth"] if is_best else ["last.pth"]:
        path = os.path.join(settings["out"], name)
        torch.save(checkpoint, path + ".part")
        os.replace(path + ".part", path)

def print_run(objective, dataset, args):  # what is about to happen
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

def progress(epoch, updates, totals, args):
    """range(updates), with a bar that shows the epoch's loss so far."""
    bar = tqdm(range(updates), f"epoch {epoch + 1}/{args.epochs}", leave=False, unit=" images",
               unit_scale=args.images_per_update, disable=RANK > 0 or None)  # not in logs
    for step in bar:
        yield step
        if step % 50 == 0 or step == updates - 1:
            loss = sum(totals.values()).item() / (step + 1) / args.accum  # waits for the GPU
            bar.set_postfix(loss=loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}")

def mean_losses(totals, batches):
    """The means over the batches of all processes, and their sum as "loss"."""
    means = torch.stack(list(totals.values())) / (batches * WORLD)
    if WORLD > 1:
        dist.all_reduce(means)
    means = dict(zip(totals, means.tolist()))
    return means | {"loss": sum(means.values())}

# ---- 10. Options and the command line -----------------------------------------------------------

def resolve(args):
    """Check the options, and fill in those that follow from others or from the machine."""
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        if not args.resume and {"last.pth", "best.pth"} & {*os.listdir(args.out)}:
            raise UserError(f"{args.out} holds a run: add --resume, or choose another --out")
    on_gpu = args.device == "cuda"
    devices = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if LOCAL_RANK >= devices.get(args.device, WORLD):  # as many processes as you like on the CPU
        raise UserError(f"no {args.device} for process {LOCAL_RANK} here: try --device cpu")
    if args.amp == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if on_gpu else "off"
    if args.compile is None:
        args.compile = on_gpu and importlib.util.find_spec("triton") is not None
        if on_gpu and not args.compile and RANK == 0:
            print("Triton is not installed: training without --compile")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 20
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs:g} must end before --epochs")
    args.images_per_update = args.batch_size * args.accum * WORLD
    # The cores that this process may use: a batch system can allow fewer than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = min(16, cores) if on_gpu else (cores + 2) // 4
    if "OMP_NUM_THREADS" not in os.environ:  # whatever --workers is: it changes rounding
        torch.set_num_threads(max(1, cores - workers))
    if args.workers is None:
        args.workers = workers

def start_processes(args):
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.manual_seed(args.seed)

def by_options(build_objective, *args):
    """build_objective(*args). A ValueError of the networks gets the options that may cause it."""
    with explained("these options do not fit", ": see --img-size, --dim, --heads, --teacher-heads, "
                   "--teacher-block, --relations, --relation-heads", ValueError):
        return build_objective(*args)

def new_student(args, patch_size, img_size, relation_heads=None):
    """A ViT by the options. The same --seed is the same student, whatever was random before."""
    dim, depth, heads = STUDENTS[args.student]
    torch.manual_seed(args.seed)
    return ViT(args.dim or dim, args.depth or depth, args.heads or heads, patch_size, img_size,
               args.drop_path, relation_heads)

def build(args):
    """TinyMIM by the options. Both networks have the same patches."""
    teacher = load_teacher(args.teacher, args.img_size, args.teacher_heads)
    heads = args.relation_heads or teacher.relation_heads
    student = new_student(args, teacher.config["patch_size"], teacher.img_size, heads)
    return TinyMIM(student, teacher, args.teacher_block, heads, args.relations)

def train(args, build_objective=build):
    """Distil, or learn something else from images alone: build_objective(args) gives a module with
    a ViT `student`, whose forward(crops) gives {name: loss}."""
    resolve(args)
    start_processes(args)
    objective = by_options(build_objective, args).to(args.device)
    paths = find_images(image_folder(args.data, "train"))
    dataset = ImageDataset(paths, crop_and_flip(objective.student.img_size), args.seed)
    fit(objective, dataset, make_optimizer(objective, args.weight_decay), args)

def between(kind, low, high=10**9):  # the type of an option
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number
COUNT, RATE, SHARE = between(int, 1), between(float, 0), between(float, 0, 1)

DEFAULTS = RECIPE | dict(  # what is not here is None: it follows from others or from a file
    student="tiny", data="imagenette", seed=0, amp="auto", resume=False,
    device="cuda" if torch.cuda.is_available() else "cpu")
TEACHING = dict(teacher="mae_base", relations=["qq", "kk", "vv"])

def make_parser(prog, doc, defaults, teacher=False, without=()):
    """The options of all scripts, perhaps those of distillation. without: names of unused ones."""
    summary, examples = doc.split("\n\n")[:2]
    parser = argparse.ArgumentParser(prog, description=summary, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, help, **kind):
        if name not in without:
            help += " (default: %(default)s)" if defaults.get(name) else ""
            parser.add_argument("--" + name.replace("_", "-"), help=help, **kind)

    add("student", "size of a new ViT", choices=STUDENTS)
    for name in ("dim", "depth", "heads"):
        add(name, "overrides that of --student", type=COUNT)
    add("img_size", "in pixels (default: the checkpoint's, or 224)", type=COUNT)
    add("data", "folder of images")
    add("out", "folder for checkpoints and log (default: in runs/)")
    add("resume", "continue a run: repeat its command and add this", action="store_true")
    add("epochs", "passes over the data", type=COUNT)
    add("warmup_epochs", "of linear warm-up", type=RATE)
    add("batch_size", "images per batch and process", type=COUNT)
    add("accum", "batches that make one update", type=COUNT)
    add("blr", "peak learning rate for 256 images per update", type=RATE)
    add("weight_decay", "of AdamW", type=RATE)
    add("drop_path", "rate of skipping a branch", type=between(float, 0, 0.99))
    add("seed", "of all that is random", type=between(int, 0))
    add("workers", "image decoders (default: by the cores)", type=between(int, 0))
    add("device", "mps is untested", choices=("cuda", "mps", "cpu"))
    add("amp", "auto: bf16 or fp16 on a GPU", choices=("auto", *DTYPES))
    add("compile", "default: on a GPU", action=argparse.BooleanOptionalAction)
    if teacher:
        add("teacher", f"{', '.join(TEACHERS)}, or a checkpoint")
        add("teacher_heads", "attention's (default: the file's, or by width)", type=COUNT)
        add("teacher_block", "default: the last, or if depths differ, at 3/4", type=COUNT)
        add("relations", "the published results: qk vv", nargs="+", metavar="PAIR",
            choices=[a + b for a in "qkv" for b in "qkv"])
        add("relation_heads", "default: the teacher's", type=COUNT)
    parser.set_defaults(script=prog, **defaults)
    return parser

def run(parser, function, args, *more):  # a user's mistake ends in one line, without a traceback
    try:
        function(args, *more)
        if WORLD > 1:
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, UserError) as error:  # one from a worker begins with its traceback
        text = str(error).rsplit("UserError: ", 1)[-1].strip()
    except FloatingPointError as error:
        text = f"{error}: lower --blr" + ", or --amp off (fp16 overflows)" * (args.amp == "fp16")
    except (MemoryError, RuntimeError) as error:  # perhaps PyTorch's, about memory or a full disk
        text = f"{type(error).__name__} {error}"
        if not re.search("MemoryError|out of memory|allocate|inline_container|iostream|new thread|"
                         "create a primitive|worker \\(pid", text):
            raise
        text = text.rsplit("Error: ", 1)[-1].split("\n")[0]  # the last of a worker's traceback
        text = (f"{text:.200} (is the disk full? Else halve --batch-size and double --accum, or "
                "try --workers 0 or docker run --shm-size 8g)")
    sys.exit(f"{parser.prog}: error: {text}")

def main(argv=None, build_objective=build):
    parser = make_parser("tinymim.py", __doc__, DEFAULTS | TEACHING, teacher=True)
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", args.student)
    run(parser, train, args, build_objective)
    if RANK == 0:
        print(f"finished. Next: python finetune.py --checkpoint {args.out}/last.pth --data FOLDER")

if __name__ == "__main__":
    main()
