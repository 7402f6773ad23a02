"""TinyMIM in one file: distil a small Vision Transformer from a large one pre-trained as a masked autoencoder (MAE).

    python tinymim.py --student tiny --teacher mae_base --data /path/to/imagenet

Paper: Ren, Wei, Zhang, Hu. TinyMIM: An Empirical Study of Distilling MIM Pre-Trained Models. CVPR 2023,
https://arxiv.org/abs/2301.01296. The student learns to relate its tokens to one another as its teacher does:
`relation_loss` in section 3 is the whole idea, and everything else carries images to it.

    1. Vision Transformer      sincos_pos_embed, Attention, Block, ViT
    2. The teacher             load_teacher
    3. Targets and losses      relation, relation_loss, TinyMIM
    4. Data                    find_images, ImageDataset, TwoViews
    5. Training                learning_rate, parameter_groups, train_epoch, checkpoints, pictures
    6. Command line            python tinymim.py --help
"""

import argparse
import collections
import contextlib
import datetime
import hashlib
import http.client
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import decode_image
from torchvision.ops import StochasticDepth
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import make_grid
from tqdm import tqdm


class UserError(Exception):
    """What the person at the keyboard can mend: the command line prints it as one line and exits with `code`."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------------------
# 1. Vision Transformer. Parameters are named as in MAE and timm: their checkpoints load here, ours load there.

STUDENTS = {  # name: (dim, depth, heads)
    "nano": (64, 4, 4),  # not in the paper: for trials
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def sincos_pos_embed(dim, grid):
    """MAE's fixed position embeddings of grid x grid patches: (1, 1 + grid², dim), zeros for the class token.

    The first half of the channels encodes a patch's column, the second half its row. dim must divide by 4.
    """
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1)  # (grid², dim)
    return torch.cat([torch.zeros(1, dim), patches]).float()[None]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, dim) to (B, N, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, dim/heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm Transformer block, (B, N, dim) to (B, N, dim); in training each branch is dropped at `drop_path`."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        mlp = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(collections.OrderedDict(mlp))
        self.drop_path = StochasticDepth(drop_path, "row")

    def qkv(self, x):
        """The queries, keys and values this block makes of its input (B, N, dim): three (B, N, dim)."""
        return self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer with a class token and fixed sin-cos position embeddings, initialised as in MAE.

    dim, depth, heads: width, number of blocks, attention heads. patch_size, img_size: in pixels; an image has
    N = (img_size / patch_size)² patches. drop_path: one rate for all blocks, or a list with a rate for each.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, dim, depth, heads, patch_size=16, img_size=224, drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"an image of {img_size} pixels does not divide into patches of {patch_size}")
        if dim % heads or dim % 4:
            raise ValueError(f"a width of {dim} must divide by 4 and by the number of heads, {heads}")
        self.dim, self.depth, self.heads, self.patch_size, self.img_size = dim, depth, heads, patch_size, img_size
        self.patch_embed = nn.Sequential(collections.OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, img_size // patch_size), requires_grad=False)
        rates = drop_path if isinstance(drop_path, (list, tuple)) else [drop_path] * depth
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # the patch embedding is a linear map of a flat patch
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
            nn.init.zeros_(module.bias)

    def tokens_entering(self, block, images):
        """The tokens (B, 1+N, dim) that enter block `block`, counted from 1, for images (B, 3, H, W)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # (B, N, dim)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for i in range(block - 1):
            x = self.blocks[i](x)
        return x

    def qkv(self, images, block):
        """Queries, keys, values of block `block`, from 1: three (B, 1+N, dim). Nothing after them is computed."""
        return self.blocks[block - 1].qkv(self.tokens_entering(block, images))

    def forward(self, images):
        """Images (B, 3, H, W) to normalised tokens (B, 1+N, dim), the class token first."""
        return self.norm(self.blocks[-1](self.tokens_entering(self.depth, images)))


# ------------------------------------------------------------------------------------------------------------
# 2. The teacher.

TEACHERS = {  # MAE's published encoders: (url, first digits of the file's md5). Huge has patches of 14 pixels.
    "mae_base": ("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth", "8cad7c"),
    "mae_large": ("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth", "b8b06e"),
    "mae_huge": ("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge.pth", "9bdbb0"),
}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # attention heads of the published widths


def download(url, md5):
    """Fetch `url` into torch hub's cache, unless it is there, and return its path. Raises UserError.

    The file's md5 must begin with `md5`; what does not arrive whole is not kept.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if os.path.exists(path):
        if not file_md5(path).startswith(md5):
            raise UserError(f"{path} is not the file published at {url}: delete it and run again")
        return path
    partial = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        torch.hub.download_url_to_file(url, partial)
        if not file_md5(partial).startswith(md5):
            raise UserError(f"what came from {url} is broken, or not the published file: try again, "
                            f"or fetch it elsewhere and put it at {path}")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(f"cannot download {url} ({error}): fetch it elsewhere and put it at {path}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)
    return path


def file_md5(path):
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            md5.update(chunk)
    return md5.hexdigest()


def read_checkpoint(path):
    """Read a checkpoint file, running no code from it. Raises UserError.

    Returns (tensors by name, our config or {}, all that is in the file). Understands our own files, MAE's and the
    authors' ({"model": tensors, "args": argparse.Namespace, ...}), and a bare state dict.
    """
    if not os.path.isfile(path):
        hint = "a folder: name the .pth file in it" if os.path.isdir(path) else "no such file"
        raise UserError(f"{path}: {hint}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for files that are something else
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error) else "it is empty"
        raise UserError(f"{path} is not a PyTorch checkpoint of tensors ({reason})") from error
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    tensors = tensors if isinstance(tensors, dict) else {}
    tensors = {str(name).removeprefix("module."): t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    if "patch_embed.proj.weight" not in tensors:
        raise UserError(f"{path} holds no ViT under MAE's parameter names (there is no patch_embed.proj.weight)")
    return tensors, checkpoint.get("config", {}), checkpoint


def architecture(tensors, config, path, heads=None):
    """The keyword arguments with which ViT(...) fits these tensors. Raises UserError.

    Tensors do not tell the number of heads: it is `heads`, or our config's, or that of the published width.
    """
    try:
        dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no ViT as MAE has it: pos_embed or blocks are missing or misshapen") from error
    heads = heads or config.get("heads") or HEADS.get(dim)
    if heads is None:
        raise UserError(f"{path}: how many attention heads has a ViT of width {dim}? Say so with --teacher-heads")
    return dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=grid * patch_size)


def resize_pos_embed(pos_embed, grid):
    """Position embeddings (1, 1 + g², dim) for grid x grid patches (1, 1 + grid², dim), bicubic as in MAE."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return pos_embed
    patches = patches.transpose(1, 2).unflatten(2, (side, side)).float()  # (1, dim, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def load_teacher(name_or_path, img_size=None, heads=None, drop_path=0.0):
    """A frozen ViT in eval mode from a name in TEACHERS or a checkpoint file. Raises UserError.

    A name is downloaded once. A file may be an MAE encoder or a whole MAE (the decoder is left out), one saved by
    the authors' code, a bare state dict, or our own last.pth. img_size in pixels (default: the checkpoint's); position
    embeddings are interpolated to it. The result's `relation_heads` is the number of heads its own relations were
    distilled with, else its number of attention heads.
    """
    if name_or_path not in TEACHERS and not os.path.exists(name_or_path):
        raise UserError(f"{name_or_path}: no such file, nor one of the teachers {', '.join(TEACHERS)}")
    path = download(*TEACHERS[name_or_path]) if name_or_path in TEACHERS else name_or_path
    tensors, config, _ = read_checkpoint(path)
    sizes = architecture(tensors, config, path, heads)
    try:
        teacher = ViT(**sizes | {"img_size": img_size or sizes["img_size"]}, drop_path=drop_path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], teacher.img_size // teacher.patch_size)
    wanted = teacher.state_dict()
    for wrong, names in {
        "lacks": [name for name in wanted if name not in tensors],
        "has another shape of": [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape],
        "is no plain ViT, it also has": [name for name in tensors if name.startswith("blocks.") and name not in wanted],
    }.items():
        if names:
            raise UserError(f"{path} {wrong} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}")
    teacher.load_state_dict({name: tensors[name] for name in wanted})
    teacher.relation_heads = config.get("relation_heads") or teacher.heads
    return teacher.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------
# 3. Targets and losses.


def relation(a, b, heads):
    """How each token's `a` relates to every token's `b`: log softmax(a bᵀ / sqrt(D/heads)), row by row.

    a, b: two of a block's queries, keys and values, (B, N, D), split into `heads` relation heads, which must divide D.
    Returns log-probabilities (B, heads, N, N), in float32 or better: softmax().log() would underflow to -inf.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))  # (B, heads, N, D/heads)
        return F.log_softmax(a / math.sqrt(a.shape[-1]) @ b.transpose(2, 3), dim=-1)


def relation_loss(student_qkv, teacher_qkv, heads, pairs=("qq", "kk", "vv")):
    """KL(teacher's relation || student's), the mean over images, heads and rows, for each pair (section 3.2 of the paper).

    student_qkv, teacher_qkv: queries, keys, values of one block, (B, N, D) each; D may differ between the two networks,
    B and N may not. heads: relation heads, must divide both D. pairs: of the letters q, k, v.
    Returns {pair: scalar}. The teacher gets no gradient.
    """
    student, teacher = dict(zip("qkv", student_qkv)), dict(zip("qkv", teacher_qkv))
    losses = {}
    for a, b in pairs:
        target = relation(teacher[a].detach(), teacher[b].detach(), heads)
        predicted = relation(student[a], student[b], heads)
        # every row of N probabilities is a distribution: "batchmean" over all of them
        losses[a + b] = F.kl_div(predicted.flatten(0, 2), target.flatten(0, 2), reduction="batchmean", log_target=True)
    return losses


class TinyMIM(nn.Module):
    """The training objective: a student and its frozen teacher in, losses by name out.

    teacher_block: where the teacher's relations are taken, counted from 1; the student's are its last block's.
    Parameters of the student behind its last qkv get no gradient and are frozen, as in the authors' code.
    Raises ValueError for a combination that cannot work.
    """

    def __init__(self, student, teacher, teacher_block, relation_heads, relations=("qq", "kk", "vv")):
        super().__init__()
        if not 1 <= teacher_block <= teacher.depth:
            raise ValueError(f"the teacher has blocks 1 to {teacher.depth}, not {teacher_block}")
        if student.pos_embed.shape[1] != teacher.pos_embed.shape[1]:
            raise ValueError(f"student and teacher must see the same patches: the student's {student.img_size} pixels in "
                             f"patches of {student.patch_size}, the teacher's {teacher.img_size} in {teacher.patch_size}")
        shared = math.gcd(student.dim, teacher.dim)
        if shared % relation_heads:
            fitting = max(heads for heads in range(1, relation_heads) if shared % heads == 0)
            raise ValueError(f"widths of {student.dim} (student) and {teacher.dim} (teacher) do not both divide into "
                             f"{relation_heads} relation heads: try {fitting}")
        self.student, self.teacher = student, teacher
        self.teacher_block, self.relation_heads, self.relations = teacher_block, relation_heads, tuple(relations)
        last = student.blocks[-1]
        for unused in (last.attn.proj, last.norm2, last.mlp, student.norm):
            unused.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, student_images, teacher_images):
        """Two views (B, 3, H, W) of the same crops to {pair: scalar loss}; their sum is what is minimised."""
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv(teacher_images, self.teacher_block)
        student_qkv = self.student.qkv(student_images, self.student.depth)
        return relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.relations)


# ------------------------------------------------------------------------------------------------------------
# 4. Data. Workers decode and crop to uint8; colours and normalisation are done in batches, on the device.

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenette(root="data"):
    """Folder of Imagenette (ten classes of ImageNet, 13,394 photos), downloaded to `root` once. Raises UserError."""
    folder = os.path.join(root, "imagenette2-320")
    if not os.path.isdir(folder):
        try:
            os.makedirs(root, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as partial:  # so that what is in `folder` is whole
                Imagenette(partial, size="320px", download=True)
                os.replace(os.path.join(partial, "imagenette2-320"), folder)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"cannot download Imagenette ({error}): name a folder of images with --data, or unpack "
                            f"{IMAGENETTE} in {root}/") from error
    return folder


def find_images(folder):
    """Paths, as bytes, of all images in `folder`/train if there is one, else in `folder`, at any depth, sorted.

    An array, not a list: worker processes share it, whereas 1.3 million Python strings would be copied into each.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    folder = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else folder
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder, followlinks=True)
             for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    if not paths:
        raise UserError(f"{folder}: there are no images in it ({', '.join(IMG_EXTENSIONS)})")
    return np.array(sorted(map(os.fsencode, paths)))


def decode(path):
    """An image file, whatever its name says it is, as uint8 RGB (3, H, W). torchvision is fast, Pillow reads the rest."""
    try:
        image = decode_image(path, mode="RGB")
    except RuntimeError:
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    image = image[0] if image.ndim == 4 else image  # the first picture of an animation
    return image if image.dtype == torch.uint8 else (image.int() >> 8).byte()  # 16-bit PNG


class ImageDataset(Dataset):
    """Item (epoch, i) is transform(uint8 image i), then its label if there are labels, then -1, or i if it is broken.

    Another image takes the place of one that cannot be decoded. All that is random depends on (seed, epoch, i) alone:
    a run is the same for any number of workers and processes, and after it is resumed.
    """

    def __init__(self, paths, transform, seed=0, labels=None):
        self.paths, self.transform, self.seed, self.labels = paths, transform, seed, labels
        self.reported = set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key
        broken = -1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)))  # of integers: always the same
            for _ in range(20):
                try:
                    image = decode(os.fsdecode(self.paths[index]))
                    break
                except Exception:  # whatever is wrong with the file: train_epoch names it
                    broken = key[1]
                    index = int(torch.randint(len(self), ()))
            else:
                image = torch.zeros(3, 64, 64, dtype=torch.uint8)  # hardly one is whole: train_epoch stops the run
            item = [self.transform(image)]
        return item + ([] if self.labels is None else [self.labels[index]]) + [broken]

    def report(self, broken):
        """Name the files of these indices that have not been named yet; returns how many indices there are."""
        for index in set(broken) - self.reported:
            tqdm.write(f"cannot decode {os.fsdecode(self.paths[index])}: another image takes its place", sys.stderr)
        self.reported.update(broken)
        return len(broken)


class EpochSampler(DistributedSampler):
    """Keys (epoch, i) for ImageDataset: each process's share of a new order every epoch (see set_epoch)."""

    def __iter__(self):
        return ((self.epoch, index) for index in super().__iter__())


class CropAndJitter:
    """uint8 image (3, H, W) to a random crop of it, uint8 (3, img_size, img_size), and random jitter (2, 3): the order
    in which brightness (0), contrast (1) and saturation (2) change, and the factors of the three steps."""

    def __init__(self, img_size, strength=0.4):
        self.strength = strength
        self.crop = v2.Compose([
            v2.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ])

    def __call__(self, image):
        factors = torch.empty(3).uniform_(1 - self.strength, 1 + self.strength)
        return self.crop(image), torch.stack([torch.randperm(3).float(), factors])


def color_jitter(images, jitter):
    """torchvision's ColorJitter, each image of a batch with its own parameters.

    images: (B, 3, H, W) in [0, 1]. jitter: (B, 2, 3), see CropAndJitter. All three changes blend the image with
    another: brightness with black, contrast with its mean gray, saturation with its gray version.
    """
    for step in range(3):
        change, factor = jitter[:, :, step, None, None, None].unbind(1)  # (B, 1, 1, 1) each
        gray = v2.functional.rgb_to_grayscale(images)
        other = torch.where(change == 2, gray, torch.where(change == 1, gray.mean((1, 2, 3), keepdim=True), 0.0))
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images


class Normalize(nn.Module):
    """Images (B, 3, H, W) in [0, 1], less ImageNet's mean of each channel, over its deviation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images):
        return (images - self.mean) / self.std


class TwoViews(nn.Module):
    """A batch from CropAndJitter to the student's view, colours changed, and the teacher's, clean: (B, 3, H, W) each."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize()

    def forward(self, crops_and_jitter):
        crops, jitter = crops_and_jitter
        images = crops / 255
        return self.normalize(color_jitter(images, jitter)), self.normalize(images)


# ------------------------------------------------------------------------------------------------------------
# 5. Training.

Machine = collections.namedtuple("Machine", "device rank local_rank world")  # world: the number of processes


def learning_rate(epoch, peak, warmup_epochs, epochs, floor=0.0):
    """Linear warm-up from 0 to `peak`, then half a cosine to `floor`. `epoch` counts from 0, with a fraction."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(module, weight_decay):
    """AdamW's groups of the trainable parameters: biases and norms are not decayed, the rest is (class token included)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def start(args):
    """Choose the device and, under torchrun, join the other processes."""
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Lower "
                            f"torchrun's --nproc-per-node, or use --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # an hour: the others wait while one process of each node downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return Machine(device, rank, local_rank, world)


def once_per_node(machine, fetch):
    """fetch() in the first process of each node, then in its others, which find what that one downloaded."""
    if machine.world > 1 and machine.local_rank > 0:
        dist.barrier()
    result = fetch()
    if machine.world > 1 and machine.local_rank == 0:
        dist.barrier()
    return result


def amp_type(choice, device):
    """The dtype of autocast: what --amp says; "auto" is bf16 on a GPU that has it, fp16 on one that has not."""
    if choice == "auto":
        choice = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def make_loader(dataset, args, machine):
    """Shuffled training batches of --batch-size for this process; a last, smaller one is dropped."""
    if len(dataset) < args.batch_size * args.accum * machine.world:
        raise UserError(f"{len(dataset)} images are fewer than one batch of {args.batch_size} x --accum {args.accum} x "
                        f"{machine.world} processes: lower --batch-size")
    sampler = EpochSampler(dataset, machine.world, machine.rank, seed=args.seed, drop_last=True)
    return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True,
                      pin_memory=machine.device.type == "cuda", persistent_workers=args.workers > 0,
                      worker_init_fn=leave_interrupts_to_parent)


def leave_interrupts_to_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch, device):
    """A tensor, or (nested) list of tensors, on the device; from pinned memory the copy runs beside the computation."""
    if isinstance(batch, (list, tuple)):
        return [to_device(part, device) for part in batch]
    return batch.to(device, non_blocking=True)


def train_epoch(objective, prepare, loader, optimizer, scaler, args, machine, epoch, bar):
    """One epoch of updates; returns the mean of each loss over it, {name: float}. `epoch` counts from 0.

    objective(*prepare(batch)) gives {name: scalar}, whose sum is minimised. Nothing waits for the device between log
    points. Raises UserError for a loss that is not finite, and if most files cannot be decoded.
    """
    updates = len(loader) // args.accum
    log_every = 50 if machine.device.type == "cuda" else 1
    global_batch = args.batch_size * args.accum * machine.world
    amp = amp_type(args.amp, machine.device)
    loader.sampler.set_epoch(epoch)
    batches, sums, seen, broken = iter(loader), {}, 0, 0
    torch.manual_seed(hash((args.seed, epoch, machine.rank)))  # drop path: an epoch is the same after --resume
    objective.train()
    for update in range(updates):
        lr = learning_rate(epoch + update / updates, args.blr * global_batch / 256, args.warmup_epochs, args.epochs, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for micro in range(args.accum):
            *batch, undecoded = next(batches)
            seen += len(undecoded)
            broken += loader.dataset.report(undecoded[undecoded >= 0].tolist())
            if broken > seen / 2 and (seen >= 256 or update == updates - 1):
                raise UserError(f"{broken} of {seen} files could not be decoded: is this the right --data?")
            inputs = prepare(*to_device(batch, machine.device))
            wait = contextlib.nullcontext()
            if machine.world > 1 and micro < args.accum - 1:
                wait = objective.no_sync()  # gradients are averaged between processes once per update
            with wait:
                with torch.autocast(machine.device.type, amp, enabled=amp != torch.float32):
                    losses = objective(*inputs)
                    loss = sum(losses.values())
                scaler.scale(loss / args.accum).backward()
            for name, value in ({"loss": loss} | losses).items():
                sums[name] = sums.get(name, 0.0) + value.detach() / args.accum
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if update % log_every == 0 or update == updates - 1:
            if not math.isfinite(sums["loss"]):
                raise UserError(f"the loss is {loss.item()} at step {update + 1} of epoch {epoch + 1}. Try a lower --blr. The "
                                f"last good checkpoint is {os.path.join(args.out, 'last.pth')}, after epoch {epoch}")
            bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.2e}", refresh=False)
        bar.update(global_batch)
    means = torch.stack([value / updates for value in sums.values()])
    if machine.world > 1:
        dist.all_reduce(means)
    return {name: value / machine.world for name, value in zip(sums, means.tolist())} | {"lr": lr}




def replace_file(path, write):
    """write(file) a new version of `path`: it takes the old one's place at once, or not at all. Raises UserError."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the former into the latter
        raise UserError(f"cannot write {path} ({error}); what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def save_checkpoint(path, model, config, optimizer, scaler, epoch, args):
    """Write what load_teacher, finetune.py and --resume need: tensors and plain values. `epoch`: how many are done."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UserError(f"parameters are no longer finite after epoch {epoch}: not saved. {path} is the last good checkpoint")
    checkpoint = {
        "model": model.state_dict(), "config": config, "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(), "epoch": epoch, "rng": args.seed, "args": vars(args),
    }
    replace_file(path, lambda file: torch.save(checkpoint, file))


def log_epoch(path, record):
    """Put `record` in the place of its epoch in a file of JSON lines; lines of later epochs, from before a kill, go."""
    lines = open(path).readlines() if os.path.exists(path) else []
    lines = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
    text = "".join(lines) + json.dumps(record) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def peak_memory(device):
    """The most memory this process has held so far, in GiB: on the GPU, or its resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def preview(paths, img_size, count=3):
    """The middles of a few images from all over the list, for pictures: uint8 (count, 3, img_size, img_size)."""
    crop = v2.Compose([v2.Resize(img_size, antialias=True), v2.CenterCrop(img_size)])
    images = []
    for index in np.linspace(0, len(paths) - 1, 30).astype(int)[np.random.RandomState(0).permutation(30)]:
        with contextlib.suppress(Exception):  # a broken file: the next one will do
            images.append(crop(decode(os.fsdecode(paths[index]))))
        if len(images) == count:
            break
    if not images:
        raise UserError("30 files from all over the data were tried and none can be decoded: is this the right --data?")
    return torch.stack(images)


@torch.no_grad()
def draw_relations(objective, photos, path, cell=112):
    """Write a picture of how the patches of `photos`, uint8 (B, 3, H, W), relate in the teacher and in the student.

    A row for each query patch, marked red in the photo. A map shows that patch's row of the relation, the mean over heads,
    without the class token, scaled to its largest value besides the query: teacher and student side by side.
    """
    objective.eval()
    device = objective.student.cls_token.device
    images = Normalize().to(device)(photos.to(device) / 255)
    teacher = dict(zip("qkv", objective.teacher.qkv(images, objective.teacher_block)))
    student = dict(zip("qkv", objective.student.qkv(images, objective.student.depth)))
    maps = {}  # column title: (B, N, N)
    for a, b in objective.relations:
        for name, tokens in (("teacher", teacher), ("student", student)):
            maps[f"{name} {a}-{b}"] = relation(tokens[a], tokens[b], objective.relation_heads).exp().mean(1)[:, 1:, 1:].cpu()
    grid = math.isqrt(next(iter(maps.values())).shape[1])
    resize = lambda image, mode: F.interpolate(image[None].float(), (cell, cell), mode=mode)[0]
    cells = []
    for i, photo in enumerate(photos):
        for row, column in ((grid // 2, grid // 3), (grid // 4, 3 * grid // 4)):
            query = row * grid + column
            marked = resize(photo, "bilinear") / 255
            y, x, size = row * cell // grid, column * cell // grid, math.ceil(cell / grid)
            marked[:, y:y + size, x:x + size] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
            cells.append(marked)
            for relations in maps.values():
                heat = relations[i, query]
                heat = heat / heat[torch.arange(grid**2) != query].max()  # to itself a patch relates far more
                heat = resize(heat.view(1, grid, grid), "nearest")
                cells.append(torch.cat([3 * heat, 3 * heat - 1, 3 * heat - 2]).clamp(0, 1))  # black, red, yellow, white
    picture = make_grid(cells, nrow=1 + len(maps), padding=2, pad_value=1)
    picture = v2.functional.to_pil_image(F.pad(picture, (0, 0, 14, 0), value=1.0))
    for i, title in enumerate(["photo", *maps]):
        ImageDraw.Draw(picture).text((4 + i * (cell + 2), 2), title, fill="black")
    replace_file(path, lambda file: picture.save(file, "PNG"))


def train(args):
    """Distil a student as `args` (see parser) say, and leave last.pth, log.jsonl and relations.png in args.out."""
    machine = start(args)
    first = machine.rank == 0
    last = os.path.join(args.out, "last.pth")
    checkpoint = read_checkpoint(last)[2] if args.resume else None
    if os.path.exists(last) and not args.resume:
        raise UserError(f"{args.out} already holds a run: --resume goes on with it, another --out starts anew")

    torch.manual_seed(args.seed)
    dim, depth, heads = STUDENTS[args.student]
    sizes = dict(dim=args.dim or dim, depth=args.depth or depth, heads=args.heads or heads)
    teacher = once_per_node(machine, lambda: load_teacher(args.teacher, args.img_size, args.teacher_heads))
    sizes |= dict(patch_size=args.patch_size or teacher.patch_size, img_size=teacher.img_size)
    teacher_block = args.teacher_block or (teacher.depth if teacher.depth == sizes["depth"] else math.ceil(0.75 * teacher.depth))
    relation_heads = args.relation_heads or teacher.relation_heads
    try:
        student = ViT(**sizes, drop_path=args.drop_path)
        objective = TinyMIM(student, teacher, teacher_block, relation_heads, args.relations).to(machine.device)
    except ValueError as error:
        raise UserError(error, code=2) from error
    config = sizes | {"relation_heads": relation_heads}

    folder = once_per_node(machine, imagenette) if args.data == "imagenette" else args.data
    paths = find_images(folder)
    loader = make_loader(ImageDataset(paths, CropAndJitter(student.img_size), args.seed), args, machine)
    photos = preview(paths, student.img_size)
    views = TwoViews().to(machine.device)
    fused = {"fused": True} if args.fused else {}
    global_batch = args.batch_size * args.accum * machine.world
    optimizer = torch.optim.AdamW(parameter_groups(student, args.weight_decay), lr=0.0, betas=(0.9, 0.95), **fused)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=amp_type(args.amp, machine.device) == torch.float16)
    done = 0
    if checkpoint:
        student.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        done = checkpoint["epoch"]
    model = objective
    if args.compile:
        objective.compile()
        views.compile()
    if machine.world > 1:
        model = DistributedDataParallel(objective, broadcast_buffers=False)
    if first and machine.device.type == "cpu":
        print("no GPU: this is slow. For something that runs in minutes: --student nano --img-size 64 --relation-heads 8 --epochs 1")
    if first:
        print(f"student {args.student}: {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters, block {student.depth} "
              f"learns {' '.join(args.relations)} of block {teacher_block} of {args.teacher} in {relation_heads} relation heads")
        print(f"{len(paths)} images in {folder}, batches of {global_batch}, learning rate {args.blr * global_batch / 256:.2e}, "
              f"{machine.world} x {machine.device.type}, results in {args.out}", flush=True)
        if not checkpoint:  # a full disk or a read-only folder shows now, and from now on there is always a last.pth
            save_checkpoint(last, student, config, optimizer, scaler, 0, args)
            draw_relations(objective, photos, os.path.join(args.out, "relations.png"))

    images = len(loader) // args.accum * global_batch  # in an epoch
    with tqdm(total=args.epochs * images, initial=done * images, unit="image", unit_scale=True, smoothing=0.1, disable=not first,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for epoch in range(done, args.epochs):
            bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
            began = time.perf_counter()
            record = {"epoch": epoch + 1} | train_epoch(model, views, loader, optimizer, scaler, args, machine, epoch, bar)
            record |= {"images/s": images / (time.perf_counter() - began), "peak_memory_gib": peak_memory(machine.device)}
            if first:
                tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
                log_epoch(os.path.join(args.out, "log.jsonl"), record)
                save_checkpoint(last, student, config, optimizer, scaler, epoch + 1, args)
                draw_relations(objective, photos, os.path.join(args.out, "relations.png"))
    if machine.world > 1:
        dist.destroy_process_group()
    if first:
        print(f"done: the student is in {last}")


# ------------------------------------------------------------------------------------------------------------
# 6. Command line.


def number(kind, low, below=math.inf):
    """An argparse type: an int or float (kind) from low to, and not including, below."""
    def parse(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not " + (f"{low} or more" if below == math.inf else f"in [{low}, {below})"))
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own message about text that is no number
    return parse


def training_options(parser, epochs, warmup_epochs, batch_size, blr, min_lr, drop_path):
    """The options that tinymim.py and finetune.py share, with their defaults (None: worked out later)."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=epochs, metavar="N", help="default: %(default)s")
    add("--warmup-epochs", type=number(float, 0), default=warmup_epochs, metavar="N",
        help=f"of linear warm-up, before half a cosine; default: {warmup_epochs or 'a twentieth of --epochs'}")
    add("--batch-size", type=number(int, 1), default=batch_size, metavar="N", help="images per process and step; default: %(default)s")
    add("--accum", type=number(int, 1), default=1, metavar="N", help="steps whose gradients make one update; default: %(default)s")
    add("--blr", type=number(float, 0), default=blr, metavar="X",
        help="base learning rate: the peak is blr x batch size x accum x processes / 256; default: %(default)s")
    add("--min-lr", type=number(float, 0), default=min_lr, metavar="X", help="where the cosine ends; default: %(default)s")
    add("--weight-decay", type=number(float, 0), default=0.05, metavar="X", help="default: %(default)s")
    add("--drop-path", type=number(float, 0, 1), default=drop_path, metavar="P", help="the student's; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is a GPU, else cpu")
    add("--workers", type=number(int, 0), metavar="N", help="processes that decode images, per process; default: one per core")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision; auto: off on the CPU, bf16 on a GPU that has it, else fp16")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--fused", action=argparse.BooleanOptionalAction, help="fused AdamW; default: on a GPU")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="for checkpoints and logs; default: a folder below runs/ named after what is run")
    add("--resume", action="store_true", help="go on with the run in --out, with its options, after the last epoch it finished")


MAY_CHANGE = {"data", "epochs", "batch_size", "accum", "device", "workers", "compile", "fused", "out", "resume"}  # on --resume


def command_line(parser, argv, name_run, run):
    """run(args), with every error a person can mend as one line. name_run(args) names the default --out."""
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        args = parser.parse_args(argv)
        out = args.out or os.path.join("runs", name_run(args))
        if args.resume:
            if not os.path.exists(os.path.join(out, "last.pth")):
                raise UserError(f"there is no run to go on with in {out}: no last.pth")
            saved = read_checkpoint(os.path.join(out, "last.pth"))[2]["args"]
            parser.set_defaults(**saved)
            args = parser.parse_args(argv)
            for name in saved.keys() - MAY_CHANGE:
                if saved[name] != getattr(args, name):
                    flag = "--" + name.replace("_", "-")
                    raise UserError(f"the run in {out} has {flag} {saved[name]}: it cannot go on with {getattr(args, name)}", code=2)
        args.out = out
        on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
        args.compile = on_gpu if args.compile is None else args.compile
        args.fused = on_gpu if args.fused is None else args.fused
        if args.warmup_epochs is None:
            args.warmup_epochs = args.epochs / 20
        if args.warmup_epochs >= args.epochs:
            raise UserError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}", code=2)
        if args.workers is None:
            args.workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        run(args)
    except UserError as error:
        parser.exit(error.code, f"{parser.prog}: error: {error}\n")
    except torch.OutOfMemoryError:
        parser.exit(1, f"{parser.prog}: error: the GPU's memory is full: lower --batch-size, and raise --accum by as much\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped. What {out} holds is whole: --resume goes on from there\n")
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_parser():
    parser = argparse.ArgumentParser(prog="tinymim.py", description="Distil a small ViT from a large one pre-trained by MAE.",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110, max_help_position=28))
    add = parser.add_argument_group("student").add_argument
    add("--student", choices=STUDENTS, default="tiny", help="default: %(default)s")
    for size in ("dim", "depth", "heads"):
        add(f"--{size}", type=number(int, 1), metavar="N", help="instead of the named student's")
    add("--patch-size", type=number(int, 1), metavar="N", help="in pixels; default: the teacher's")
    add("--img-size", type=number(int, 1), metavar="N", help="in pixels, for both networks; default: the teacher's")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", default="mae_base", metavar="NAME|FILE",
        help=f"{', '.join(TEACHERS)} (downloaded once), or a checkpoint; default: %(default)s")
    add("--teacher-heads", type=number(int, 1), metavar="N", help="attention heads, where the checkpoint does not tell")
    add("--teacher-block", type=number(int, 1), metavar="N",
        help="where its relations are taken, from 1; default: its last if it is as deep as the student, else 3/4 of its depth")
    add = parser.add_argument_group("target").add_argument
    add("--relations", nargs="+", choices=[a + b for a in "qkv" for b in "qkv"], default=["qq", "kk", "vv"], metavar="PAIR",
        help="of q, k, v; default: qq kk vv. The authors' published numbers: qk vv")
    add("--relation-heads", type=number(int, 1), metavar="N", help="default: as many as the teacher has heads")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="imagenette", metavar="FOLDER",
        help="of images at any depth (its train/ if there is one); default: Imagenette, downloaded once to data/")
    training_options(parser, epochs=300, warmup_epochs=None, batch_size=256, blr=1.5e-4, min_lr=0.0, drop_path=0.1)
    return parser


def run_name(path):
    """What to call a checkpoint: a teacher's name, a file's, or for our last.pth that of its folder."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if stem in ("last", "best") else stem


def main(argv=None):
    command_line(make_parser(), argv, lambda args: f"{args.student}-{run_name(args.teacher)}", train)


if __name__ == "__main__":
    main()
