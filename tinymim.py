"""TinyMIM in one file: distil a small ViT from a large one that MAE pre-trained.

    python tinymim.py --student tiny --teacher mae_base --data /path/to/imagenet
    python tinymim.py --student small --teacher runs/base-mae_large/last.pth
    torchrun --nproc-per-node 8 tinymim.py --student base --teacher mae_large

Paper: Ren, Wei, Zhang, Hu. TinyMIM: An Empirical Study of Distilling MIM Pre-Trained Models. CVPR 2023,
https://arxiv.org/abs/2301.01296 ("T7" below is its Table 7). The method, where a and b are two of a block's
queries, keys and values, (N, D) each, split into h heads:

    R_ab = softmax(a bᵀ / sqrt(D/h))                          how each token relates to every token
    loss = sum over the pairs ab of KL(teacher's R_ab || student's R_ab)

R is N x N whatever D is. That is the trick: a student 192 wide imitates a teacher 1024 wide, and it needs no
projection. Nothing is masked (T12): that was the teacher's pre-training. Both see the same whole crop.
"""

import argparse
import collections
import json
import math
import os
import re
import signal
import sys
import tempfile
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info
from torchvision.datasets import Imagenette
from torchvision.io import decode_image, read_file
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

# Set by torchrun: the number of this process, its number on this machine, how many there are in all.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp: the dtype of autocast
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

class UserError(ValueError):
    """A mistake in options or files. The command line prints it in one line, without a traceback."""

# ---- 1. The loss -------------------------------------------------------------------------------------------

def relation(a, b, relation_heads):
    """log R_ab, how each token's `a` relates to every token's `b`: log softmax(a bᵀ / sqrt(D/h)).

    a, b: two of a block's queries, keys and values, (B, N, D), heads side by side; h = relation_heads. N
    counts the class token, which takes part like any patch. Returns (B, h, N, N): a row is a distribution.
    """
    if a.ndim != 3 or a.shape[2] % relation_heads:
        raise ValueError(f"{tuple(a.shape)} is not (B, N, D) with D divisible by {relation_heads} heads")
    with torch.autocast(a.device.type, enabled=False):
        # At least float32 (the product in TF32 on a GPU): logits can overflow fp16 and are coarse in bf16. By
        # log_softmax, because softmax().log() can underflow to -inf.
        dtype = torch.promote_types(a.dtype, torch.float32)
        a = a.to(dtype).unflatten(2, (relation_heads, -1)).transpose(1, 2)  # (B, h, N, D/h)
        b = b.to(dtype).unflatten(2, (relation_heads, -1)).transpose(1, 2)
        a = a / math.sqrt(a.shape[-1])
        return F.log_softmax(a @ b.transpose(2, 3), dim=-1)

def relation_loss(student_qkv, teacher_qkv, relation_heads, pairs=("qq", "kk", "vv")):
    """KL(teacher's relation || student's), the mean over images, heads and rows: {pair: scalar}.

    student_qkv, teacher_qkv: queries, keys and values of one block, (B, N, D) each. B and N must be equal in
    both networks. D may differ: both are split into `relation_heads`, whatever their own attention heads are.
    """
    student, teacher = dict(zip("qkv", student_qkv)), dict(zip("qkv", teacher_qkv))
    if student["q"].shape[:2] != teacher["q"].shape[:2]:
        raise ValueError(f"B or N differ (registers?): {student['q'].shape} and {teacher['q'].shape}")
    losses = {}
    for a, b in pairs:
        with torch.no_grad():
            target = relation(teacher[a], teacher[b], relation_heads)
        predicted = relation(student[a], student[b], relation_heads)
        kl = F.kl_div(predicted, target, reduction="none", log_target=True)  # (B, h, N, N)
        losses[a + b] = kl.sum(dim=-1).mean()  # a row is a distribution: sum over it, average the rows
    return losses

# ---- 2. Vision Transformer. Parameters are named as in MAE and timm: checkpoints load both ways. -----------

STUDENTS = {  # name: (dim, depth, heads)
    "nano": (96, 4, 3),  # not in the paper: for trials
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

def sincos_pos_embed(dim, grid):
    """MAE's position embeddings (1, 1 + grid², dim): half the channels say the column, half the row."""
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1)  # (grid², dim)
    return torch.cat([torch.zeros(1, dim), patches]).float()[None]

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, dim)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, dim/heads)
        return self.proj(x.transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Pre-norm Transformer block. In training, each image skips each branch with probability `drop_path`."""
    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        mlp = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(collections.OrderedDict(mlp))
        self.drop_path = StochasticDepth(drop_path, "row")

    def qkv(self, x):
        """The queries, keys and values that this block computes from its input: (B, N, dim) each."""
        return self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

class ViT(nn.Module):
    """Vision Transformer with a class token and fixed sin-cos position embeddings, initialised as in MAE.

    dim: the width, D in the formulas. patch_size, img_size: in pixels. An image becomes N tokens: one for the
    class, then one for each patch. drop_path: one rate for all blocks, or a list with a rate for each.
    """
    def __init__(self, dim, depth, heads, patch_size=16, img_size=224, drop_path=0.0):
        super().__init__()
        if dim % 4 or dim % heads or img_size % patch_size:
            raise UserError(f"{dim} must be divisible by 4 and {heads} heads, {img_size} by {patch_size}")
        self.config = dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=img_size)
        self.dim, self.depth, self.heads, self.img_size = dim, depth, heads, img_size
        self.grid = img_size // patch_size  # patches per side
        proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(collections.OrderedDict(proj=proj))  # for the name patch_embed.proj
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid), requires_grad=False)
        rates = drop_path if isinstance(drop_path, list) else [drop_path] * depth
        self.blocks = nn.Sequential(*[Block(dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """Xavier uniform. The patch embedding counts as a linear map of a flattened patch."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
            nn.init.zeros_(module.bias)

    def embed(self, images):
        """Images (B, 3, H, W) to the tokens that enter the first block, (B, N, dim)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, grid², dim)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed

    def qkv(self, images, block):
        """Queries, keys, values of block number `block`, from 1: (B, N, dim) each. Later blocks don't run."""
        x = self.blocks[:block - 1](self.embed(images))
        return self.blocks[block - 1].qkv(x)

    def forward(self, images):
        """Images (B, 3, H, W) to normalised tokens (B, N, dim)."""
        return self.norm(self.blocks(self.embed(images)))

# ---- 3. The teacher, and the objective ---------------------------------------------------------------------

TEACHERS = {f"mae_{size}": f"https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{size}.pth"
            for size in ("base", "large", "huge")}  # MAE's published encoders. Huge has patches of 14 pixels.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width, as in timm, for files that do not say

def read_checkpoint(source, heads=None):
    """Read a name in TEACHERS (downloaded once) or a file: MAE's, the authors', ours, or a bare state dict.

    Returns {name: tensor}, the arguments of the ViT that they fit, and the config that our checkpoints have.
    """
    url = TEACHERS.get(source)
    safe = dict(map_location="cpu", weights_only=True)  # runs no code from the file
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and the authors save their options
            content = torch.hub.load_state_dict_from_url(url, **safe) if url else torch.load(source, **safe)
    except Exception as error:  # torch.load raises a dozen types
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url or ""))
        if os.path.isfile(path):  # an incomplete download
            os.remove(path)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load {source} ({reason}): a file, or {', '.join(TEACHERS)}") from error
    try:
        tensors, config = content.get("model", content), content.get("config") or {}
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()
                   if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()}
        dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        img_size = patch_size * math.isqrt(tensors["pos_embed"].shape[1] - 1)
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        heads = heads or config.get("heads") or HEADS.get(dim)
    except (AttributeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{source}: no ViT under MAE's parameter names, patch_embed.proj.weight ({error!r})")
    if not heads:
        raise UserError(f"{source}: the number of attention heads is not known: --teacher-heads or --heads")
    return tensors, dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=img_size), config

def resize_pos_embed(pos_embed, grid):
    """Position embeddings (1, 1 + g², dim), bicubically resized to (1, 1 + grid², dim), as in MAE."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if side == grid:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()  # (1, dim, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

def load_weights(vit, tensors, source):
    """Copy a checkpoint's {name: tensor} into the ViT. A decoder or another head in it is left out."""
    own = vit.state_dict()  # an unknown part of a block, as a layer scale, stays: it must raise an error
    tensors = {name: t for name, t in tensors.items() if name in own or name.startswith("blocks.")}
    try:
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], vit.grid)
        vit.load_state_dict(tensors)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"{source} does not fit a plain ViT: {' '.join(str(error).split())[:200]}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{source} is broken: it has values that are not finite")

def load_teacher(source, img_size=None, heads=None, drop_path=0.0):
    """A frozen ViT from a file or a name in TEACHERS, for images of img_size (default: the checkpoint's)."""
    tensors, sizes, config = read_checkpoint(source, heads)
    teacher = ViT(**(sizes | {"img_size": img_size or sizes["img_size"]}), drop_path=drop_path)
    load_weights(teacher, tensors, source)
    teacher.relation_heads = config.get("relation_heads") or teacher.heads  # see TinyMIM
    return teacher.requires_grad_(False)

class TinyMIM(nn.Module):
    """The objective: two views of a batch in, {name: loss} out. The training loop minimises the sum.

    teacher_block: from 1. Default: the last of a teacher as deep as the student, else the one at 3/4 of its
        depth, rounded up. In T10, 18 and 21 of 24 are better targets than the last, 12 and 15 are worse.
    relation_heads: default: the teacher's attention heads, or those that it was itself distilled with.
    pairs: by default each of q, k and v has a target, as in MiniLMv2. The authors' qk and vv do as well (T7).
    """
    def __init__(self, student, teacher, teacher_block=None, relation_heads=None, pairs=("qq", "kk", "vv")):
        super().__init__()
        self.student, self.teacher, self.pairs = student, teacher.requires_grad_(False), pairs
        default = teacher.depth if teacher.depth == student.depth else math.ceil(0.75 * teacher.depth)
        self.teacher_block = default if teacher_block is None else teacher_block
        self.relation_heads = relation_heads or getattr(teacher, "relation_heads", teacher.heads)
        student.config["relation_heads"] = self.relation_heads  # for when it is a teacher itself
        if not 1 <= self.teacher_block <= teacher.depth:
            raise UserError(f"the teacher has blocks 1 to {teacher.depth}, not {self.teacher_block}")
        common = math.gcd(student.dim, teacher.dim)
        if common % self.relation_heads:
            raise UserError(f"{student.dim} and {teacher.dim} must be divisible by {self.relation_heads} "
                            f"relation heads: try --relation-heads {math.gcd(common, teacher.heads)}")

        # The loss reaches no more of the student's last block than its qkv. The rest and the final norm stay
        # as initialised until fine-tuning. Frozen, because DDP fails if a parameter gets no gradient.
        last = student.blocks[-1]
        for unused in (last.attn.proj, last.norm2, last.mlp, student.norm):
            unused.requires_grad_(False)

    def forward(self, student_images, teacher_images):  # (B, 3, H, W) each
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv(teacher_images, self.teacher_block)
        student_qkv = self.student.qkv(student_images, self.student.depth)
        return relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

# ---- 4. Data. Workers decode and crop, in uint8. Colours change for a batch at a time, on the device. ------

def imagenette(root="data"):
    """The folder of Imagenette (ten classes of ImageNet, 13,394 photos), downloaded the first time."""
    folder = os.path.join(root, "imagenette2-320")
    if not os.path.isdir(folder):
        print(f"downloading Imagenette, 330 MB, to {root}/ (--data FOLDER uses your own images)")
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as partial:  # `folder` appears whole or not at all
            Imagenette(partial, size="320px", download=True)
            os.replace(os.path.join(partial, "imagenette2-320"), folder)
    return folder

def find_images(folder):
    """The paths of all images in `folder`, at any depth, sorted, as an array of bytes."""
    paths, folders = [], [folder]
    for parent in folders:  # the list grows as folders are found
        for entry in os.scandir(parent):
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) and entry.is_file():
                paths.append(os.fsencode(entry.path))
    if not paths:
        raise UserError(f"there are no .jpg, .png or .webp images in {folder}")
    return np.array(sorted(paths))  # workers share an array; a list of str would be copied into each

def decode(path):
    """An image file as uint8 RGB (3, H, W)."""
    content = read_file(path)
    if bytes(content[:2]) == b"\xff\xd8":  # a JPEG, whatever its name
        return decode_image(content, mode="RGB")
    with Image.open(path) as image:  # torchvision's own PNG decoder crashes on damaged files
        return v2.functional.pil_to_tensor(image.convert("RGB"))

class ImageDataset(Dataset):
    """Items are (transform(image),) or (transform(image), label). A key is epoch * len(dataset) + index. It
    seeds what is random in `transform`: a run is the same for any number of workers, and after --resume."""
    def __init__(self, paths, transform, seed=0, labels=None):
        self.paths, self.transform, self.seed, self.labels = paths, transform, seed, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        path = os.fsdecode(self.paths[key % len(self)])
        try:
            image = decode(path)
        except Exception as error:  # Pillow raises many types
            raise UserError(f"cannot decode {path} ({error}): replace or delete it") from error
        image = self.seeded_transform(key, image)
        return (image,) if self.labels is None else (image, self.labels[key % len(self)])

    def seeded_transform(self, key, *inputs):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, int(key))))
            return self.transform(*inputs)

class EpochSampler(DistributedSampler):
    """This process's share of the images, in a new order each epoch, as keys for ImageDataset."""
    def __iter__(self):
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())

def color_jitter(images, order, factors):
    """torchvision's ColorJitter of images (B, 3, H, W) in [0, 1], in three steps. order (B, 3): what changes
    in each, brightness (0), contrast (1) or saturation (2). factors (B, 3): how much; 1 is not at all."""
    for step in range(3):
        change, factor = (x[:, step, None, None, None] for x in (order, factors))  # (B, 1, 1, 1) each
        gray = v2.functional.rgb_to_grayscale(images)  # (B, 1, H, W)
        # Each change blends the image with another: 0 with black, 1 with its mean gray, 2 with its own gray.
        other = torch.where(change == 1, gray.mean((1, 2, 3), keepdim=True), gray) * (change > 0)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images

def normalize(images):  # (B, 3, H, W) in [0, 1]
    return v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)

def two_views(crops):
    """uint8 crops (B, 3, H, W) to the student's view, with colours jittered, and the teacher's, unchanged as
    in its pre-training: (B, 3, H, W) each. The student learns the true colours' relations."""
    images = crops / 255
    order = torch.rand(len(images), 3, device=images.device).argsort(dim=1)  # random permutations
    factors = torch.empty(len(images), 3, device=images.device).uniform_(0.6, 1.4)
    return normalize(color_jitter(images, order, factors)), normalize(images)

# ---- 5. Training. finetune.py uses setup, learning_rate and fit, too. --------------------------------------

def setup(args):
    """Check --out, choose device and precision and, under torchrun, join the other processes."""
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        found = sorted({"last.pth", "best.pth", "log.jsonl", "relations.png"} & set(os.listdir(args.out)))
        if found and not args.resume:
            raise UserError(f"{args.out} holds a run ({found[0]}): add --resume, or choose another --out")
        if args.resume and "last.pth" not in found:
            raise UserError(f"no last.pth in {args.out}: start without --resume, in another --out")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device == "cuda"
    if on_gpu and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"PyTorch finds {torch.cuda.device_count()} GPUs: --device cpu, or fewer processes")
    if args.amp == "auto":
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if on_gpu else "off"
    args.compile = on_gpu if args.compile is None else args.compile
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    torch.manual_seed(args.seed)

def learning_rate(epoch, peak, warmup_epochs, epochs, floor=0.0):
    """Linear warm-up from 0 to `peak`, then half a cosine to `floor`. `epoch` is fractional, from 0."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2

def parameter_groups(module, weight_decay):
    """AdamW's groups: biases and norms are not decayed, the rest is (the class token too, as in MAE)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]

def fit(objective, model, dataset, prepare, optimizer, args, after_epoch, schedule=learning_rate):
    """The training loop. After each epoch it writes log.jsonl, last.pth and, for the best "top1", best.pth.
    Each step minimises the sum of {name: scalar loss} = objective(*prepare(*batch)). `model` is the part of
    the objective to keep: the student, or the classifier. after_epoch(epoch) may return more for the log.
    """
    update_size = args.batch_size * args.accum * WORLD  # images per update
    if args.epochs < 1 or not 0 < update_size <= len(dataset):
        raise UserError(f"{len(dataset)} images, {update_size} a step, {args.epochs} epochs (--batch-size)")
    updates = len(dataset) // update_size  # per epoch
    warmup = args.epochs / 20 if args.warmup_epochs is None else args.warmup_epochs
    peak = args.blr * update_size / 256
    last, best, log = (os.path.join(args.out, name) for name in ("last.pth", "best.pth", "log.jsonl"))
    sampler = EpochSampler(dataset, WORLD, RANK, seed=args.seed, drop_last=True)
    loader = DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True,
                        pin_memory=args.device == "cuda", persistent_workers=args.workers > 0)
    scaler, history = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16"), []
    if args.resume:
        saved = torch.load(last, map_location="cpu", weights_only=True)
        # The teacher is not in the checkpoint: --teacher says where it is.
        teacher = {name: t for name, t in objective.state_dict().items() if "teacher" in name.split(".")}
        objective.load_state_dict(saved["objective"] | teacher)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        history = saved["history"]
    if args.compile:
        objective.compile()  # in place: the names in state_dict stay as they are
    parallel = DistributedDataParallel(objective) if WORLD > 1 else objective

    bar = tqdm(desc="whole run", total=args.epochs * updates * update_size, unit=" images", unit_scale=True,
               initial=len(history) * updates * update_size, disable=RANK > 0,
               mininterval=0.1 if sys.stderr.isatty() else 30)
    for epoch in range(len(history), args.epochs):
        sampler.set_epoch(epoch)
        batches, sums, began = iter(loader), collections.defaultdict(float), time.perf_counter()
        torch.manual_seed(hash((args.seed, epoch, RANK)))  # colours, drop path: the same after --resume
        objective.train()  # of the frozen teacher, only drop path changes with it: 0 by default

        for update in range(updates):
            lr = schedule(epoch + update / updates, peak, warmup, args.epochs, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            for step in range(args.accum):
                if WORLD > 1:  # the processes average their gradients in the last step only
                    parallel.require_backward_grad_sync = step == args.accum - 1
                batch = [tensor.to(args.device, non_blocking=True) for tensor in next(batches)]
                views = prepare(*batch)
                with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
                    losses = parallel(*views)
                loss = sum(losses.values())
                scaler.scale(loss / args.accum).backward()
                for name, value in ({"loss": loss} | losses).items():
                    sums[name] += value.detach()  # stays on the GPU: nothing waits for it

            unused = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                raise UserError(f"the losses do not depend on {unused[0]}: use it, or freeze it")
            scaler.step(optimizer)  # MAE and the authors need no gradient clipping: the warm-up does
            scaler.update()
            optimizer.zero_grad()

            if update % 50 == 0 or update == updates - 1:  # .item() waits for the GPU
                bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {loss.item():.4f}", refresh=False)
                if not loss.isfinite():
                    raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}: try a lower --blr")
            bar.update(update_size)

        means = torch.stack(list(sums.values())) / (updates * args.accum * WORLD)
        if WORLD > 1:
            dist.all_reduce(means)
        record = {"epoch": epoch + 1} | dict(zip(sums, means.tolist())) | {"lr": lr}
        record["images/s"] = updates * update_size / (time.perf_counter() - began)
        record |= after_epoch(epoch + 1) or {}
        is_best = "top1" in record and all(record["top1"] > old.get("top1", -1) for old in history)
        history.append(record)
        if RANK == 0:
            bar.write("  ".join(f"{name} {value:.5g}" for name, value in record.items()))
            with open(log, "w") as file:  # last.pth comes last: killed before it, --resume repeats the epoch
                file.writelines(json.dumps(entry) + "\n" for entry in history)
            own = {name: t for name, t in objective.state_dict().items() if "teacher" not in name.split(".")}
            checkpoint = dict(model=model.state_dict(), config=model.config, objective=own, epoch=epoch + 1,
                              optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), history=history,
                              args=vars(args))
            for path in [best, last] if is_best else [last]:
                torch.save(checkpoint, path + ".part")
                os.replace(path + ".part", path)  # a kill while writing leaves the old file whole

@torch.no_grad()
def draw_relations(objective, crops, folder):
    """relations.png: how one patch (outlined) of each crop, uint8 (B, 3, H, W), relates to all, in teacher
    and student, the mean over heads, from black (weak) over red and yellow to white (strong)."""
    if not isinstance(objective, TinyMIM):
        return
    objective.eval()  # with drop path the maps would be noise
    student, grid, images = objective.student, objective.student.grid, normalize(crops / 255)
    row, column, side, title_height = grid // 2, grid // 3, 112 // grid, 14  # the outlined patch, in pixels
    networks = {"teacher": dict(zip("qkv", objective.teacher.qkv(images, objective.teacher_block))),
                "student": dict(zip("qkv", student.qkv(images, student.depth)))}
    columns = {"crop": crops / 255}
    for a, b in objective.pairs:
        for name, qkv in networks.items():
            heat = relation(qkv[a], qkv[b], objective.relation_heads).exp().mean(dim=1)  # (B, N, N)
            heat = heat[:, 1 + row * grid + column, 1:].unflatten(1, (grid, grid))  # no class token
            heat[:, row, column] = 0  # to itself a patch relates far more strongly
            heat = 3 * heat / heat.amax((1, 2), keepdim=True)  # from 0 to 1 red rises, to 2 green, to 3 blue
            columns[f"{name} {a}-{b}"] = torch.stack([heat, heat - 1, heat - 2], dim=1).clamp(0, 1)

    boxes = side * torch.tensor([[0, 0, 0, 0], [column, row, column + 1, row + 1]])  # of title and patch
    boxes[1, 1::2] += title_height
    for title, cells in columns.items():
        cells = F.pad(F.interpolate(cells, size=side * grid), (0, 0, title_height, 0), value=1.0).cpu()
        columns[title] = [draw_bounding_boxes(cell, boxes, [title, ""], ["black", "red"]) for cell in cells]
    cells = [cell for crop in zip(*columns.values()) for cell in crop]
    save_image(cells, os.path.join(folder, "relations.png"), nrow=len(columns), pad_value=1.0)

def build(args, objective=TinyMIM):
    """The objective that the options describe: a new student, and the teacher that it learns from."""
    teacher = load_teacher(args.teacher, args.img_size, args.teacher_heads, drop_path=args.teacher_drop_path)
    dim, depth, heads = STUDENTS[args.student]
    student = ViT(args.dim or dim, args.depth or depth, args.heads or heads, img_size=teacher.img_size,
                  patch_size=teacher.config["patch_size"], drop_path=args.drop_path)
    return objective(student, teacher, args.teacher_block, args.relation_heads, pairs=args.relations)

def train(args, build=build, draw=draw_relations):
    """What the command does. To distil something else, pass another build(args). It returns a module with
    a `student`, and its forward(student_images, teacher_images) returns {name: scalar loss}."""
    setup(args)
    if LOCAL_RANK > 0:
        dist.barrier()  # the first process of each machine downloads what is missing, the others find it
    folder = imagenette() if args.data == "imagenette" else args.data
    subfolder = os.path.join(folder, "train")
    paths = find_images(subfolder if os.path.isdir(subfolder) else folder)
    objective = build(args).to(args.device)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()

    crop = v2.RandomResizedCrop(objective.student.img_size, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
    dataset = ImageDataset(paths, v2.Compose([crop, v2.RandomHorizontalFlip()]), args.seed)
    examples = torch.stack([dataset[i][0] for i in range(0, len(paths), math.ceil(len(paths) / 4))])
    prepare = torch.compile(two_views) if args.compile else two_views
    groups = parameter_groups(objective, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device == "cuda")
    if RANK == 0:
        source = f"{args.student} from {args.teacher}" if "teacher" in args else args.student
        print(f"{type(objective).__name__}: {source}, {len(paths)} images, {args.device}, into {args.out}")
    fit(objective, objective.student, dataset, prepare, optimizer, args,
        after_epoch=lambda _: draw(objective, examples.to(args.device), args.out) if RANK == 0 else None)

# ---- 6. Command line ---------------------------------------------------------------------------------------

def make_parser(prog, doc, teacher=False):
    """The options that all scripts share and, with teacher, of distillation. doc: a line, examples, more."""
    parser = argparse.ArgumentParser(prog, f"python {prog} [options]", *doc.split("\n\n")[:2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", choices=STUDENTS, default="tiny", help="size of a new ViT (default: tiny)")
    for name in ("dim", "depth", "heads"):
        add(f"--{name}", type=int, help="overrides that of --student")
    add("--img-size", type=int, help="in pixels (default: the checkpoint's)")
    add("--data", default="imagenette", help="folder of images (default: imagenette, downloaded to data/)")
    add("--out", help="folder for checkpoints, log and pictures (default: runs/ and a name)")
    add("--resume", action="store_true", help="continue a run: repeat its command and add this")
    add("--epochs", type=int, help="passes over the data (default: %(default)s)")
    add("--warmup-epochs", type=float, help="of linear warm-up (default: a 20th; in finetune.py at most 5)")
    add("--batch-size", type=int, help="images per process and step (default: %(default)s)")
    add("--accum", type=int, default=1, help="steps whose gradients make one update (default: 1)")
    add("--blr", type=float, help="peak learning rate for 256 images per update (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="AdamW's (default: 0.05), not for biases and norms")
    add("--drop-path", type=float, help="rate of skipping a block's attention or MLP (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, crops, colours, drop path (default: 0)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="image decoders per training process")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    add("--amp", choices=("auto", *DTYPES), default="auto", help="auto: on a GPU bf16 or, without it, fp16")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    if teacher:
        # The authors' released recipe, except that theirs updates with 4096 images: 8 x --batch-size 512.
        parser.set_defaults(epochs=300, batch_size=256, blr=1.5e-4, min_lr=0.0, drop_path=0.1)
        add = parser.add_argument_group("teacher").add_argument
        add("--teacher", default="mae_base", help=f"{', '.join(TEACHERS)} (downloaded once), or a checkpoint")
        add("--teacher-heads", type=int, help="attention heads, if the checkpoint does not record them")
        add("--teacher-block", type=int, help="from 1 (default: the last if both are as deep, else at 3/4)")
        add("--teacher-drop-path", type=float, default=0.0, help="the paper tried it, and 0 is best (T13)")
        add("--relations", nargs="+", metavar="PAIR", choices=[a + b for a in "qkv" for b in "qkv"],
            default=["qq", "kk", "vv"], help="of q, k, v (default: qq kk vv; the published numbers: qk vv)")
        add("--relation-heads", type=int, help="default: the teacher's")
    return parser

def run_name(path):
    """What to call a checkpoint: runs/x/last.pth is x, mae.pth is mae."""
    folder, file = os.path.split(os.path.abspath(path))
    return os.path.basename(folder) if file in ("last.pth", "best.pth") else os.path.splitext(file)[0]

ADVICE = {  # what PyTorch says: what to do about it
    "tried to allocate": "out of memory: halve --batch-size and double --accum",
    r"memory\(shm\)|worker \(pid": "the workers lack memory: docker run --shm-size 8g, or --workers 0",
    "inline_container|iostream error": "cannot write the checkpoint: is the disk full? The last is whole",
    "state_dict|parameter group": "--out holds another network: --resume goes with the command of that run",
    "file not found or corrupted": "the download is incomplete: run the command again",
}

def run(parser, args, train):
    """Run train(args). Errors that the user can fix are printed in one line."""
    def stop(*_):  # at once: checkpoints are always whole, and a KeyboardInterrupt inside PyTorch can crash
        if RANK == 0 and get_worker_info() is None:
            os.write(2, b"\nstopped. If an epoch was finished, the same command with --resume continues\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    try:
        train(args)
        if WORLD > 1:
            dist.destroy_process_group()
    except BrokenPipeError:  # python tinymim.py | head
        os._exit(1)
    except (UserError, OSError) as error:  # what comes from a worker begins with a traceback
        sys.exit(f"{parser.prog}: error: {str(error).rsplit('UserError: ', 1)[-1].strip()}")
    except (RuntimeError, ValueError) as error:
        advice = [advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error), re.I)]
        if not advice:
            raise
        sys.exit(f"{parser.prog}: error: {advice[0]}")

def main(argv=None, build=build, draw=draw_relations):
    parser = make_parser("tinymim.py", __doc__, teacher=True)
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"{args.student}-{run_name(args.teacher)}")
    run(parser, args, lambda args: train(args, build, draw))
    if RANK == 0:
        print(f"finished. Next: python finetune.py --checkpoint {args.out}/last.pth --data FOLDER")

if __name__ == "__main__":
    main()
