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
import fcntl
import gc
import hashlib
import http.client
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time

if sys.version_info < (3, 10):
    sys.exit(f"this is Python {sys.version.split()[0]}, and TinyMIM needs 3.10 or newer")
for package in ("numpy", "torch", "torchvision", "tqdm"):
    if not importlib.util.find_spec(package):
        sys.exit(f"{package} is not installed here: {sys.executable} -m pip install -r requirements.txt")
if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends them without a traceback
    gc.disable()  # until the options are read: importing PyTorch leaves no garbage, and --help comes a second sooner

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

    The first half of the channels encodes a patch's column, the second half its row. ValueError unless dim divides by 4.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} does not divide by 4, as sin-cos position embeddings must")
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    patches = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=1)  # (grid², dim)
    return torch.cat([torch.zeros(1, dim), patches]).float()[None]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, dim) to (B, N, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} does not divide into {heads} attention heads")
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

    >>> ViT(*STUDENTS["tiny"])(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 197, 192])
    """

    def __init__(self, dim, depth, heads, patch_size=16, img_size=224, drop_path=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"an image of {img_size} pixels does not divide into patches of {patch_size}")
        self.dim, self.depth, self.heads, self.patch_size, self.img_size = dim, depth, heads, patch_size, img_size
        self.drop_path = drop_path
        # a Sequential of one: so the parameters are called patch_embed.proj
        self.patch_embed = nn.Sequential(collections.OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, img_size // patch_size), requires_grad=False)
        rates = drop_path if isinstance(drop_path, (list, tuple)) else [drop_path] * depth
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """MAE's: Xavier uniform weights and no biases."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # the patch embedding is a linear map of a flat patch
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
            nn.init.zeros_(module.bias)

    def tokens_entering(self, block, images, keep=None):
        """The tokens (B, 1+N, dim) that enter block `block`, counted from 1, for images (B, 3, img_size, img_size).

        keep: (B, n), the indices of the patches that each image keeps; the result then has 1+n tokens. None keeps all.
        """
        if not 1 <= block <= self.depth:
            raise ValueError(f"there are blocks 1 to {self.depth}, not {block}")
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # (B, N, dim)
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, self.dim))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for i in range(block - 1):
            x = self.blocks[i](x)
        return x

    def qkv(self, images, block):
        """Queries, keys, values of block `block`, from 1: three (B, 1+N, dim). Nothing after them is computed."""
        return self.blocks[block - 1].qkv(self.tokens_entering(block, images))

    def forward(self, images):
        """Images (B, 3, img_size, img_size) to normalised tokens (B, 1+N, dim), the class token first."""
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
    partial = f"{path}.{os.getpid()}.part"
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            print(f"downloading {url} to {path}", file=sys.stderr)
            torch.hub.download_url_to_file(url, partial)
            if begins_with_md5(partial, md5):
                os.replace(partial, path)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise UserError(f"cannot download {url} ({error}): fetch it elsewhere and put it at {path}") from error
        finally:
            with contextlib.suppress(OSError):
                os.remove(partial)
        if not os.path.exists(path):
            raise UserError(f"what came from {url} is broken: try again, or fetch it elsewhere and put it at {path}")
    elif not begins_with_md5(path, md5):
        raise UserError(f"{path} is not the file published at {url}: delete it and run again")
    return path


def begins_with_md5(path, digits):
    """Whether the file is not empty and the md5 of what is in it begins with these digits."""
    return os.path.getsize(path) > 0 and hashlib.md5(np.memmap(path, mode="r")).hexdigest().startswith(digits)


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
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for files that are something else
        raise UserError(f"{path} is not a whole PyTorch checkpoint of tensors and plain values ({type(error).__name__})") from error
    tensors = content.get("model", content) if isinstance(content, dict) else None
    tensors = tensors if isinstance(tensors, dict) else {}
    tensors = {str(name).removeprefix("module."): t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    if "patch_embed.proj.weight" not in tensors:
        raise UserError(f"{path} holds no ViT under MAE's parameter names (there is no patch_embed.proj.weight)")
    config = content.get("config")
    return tensors, config if isinstance(config, dict) else {}, content


def architecture(tensors, config, path, heads=None, option="--teacher-heads"):
    """The keyword arguments with which ViT(...) fits these tensors. Raises UserError.

    Tensors do not tell the number of heads: it is `heads`, or our config's, or that of the published width.
    """
    try:
        dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        _, tokens, _ = tensors["pos_embed"].shape
        grid = math.isqrt(tokens - 1)
        if grid**2 != tokens - 1:
            raise ValueError
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no ViT as MAE has it: blocks, or pos_embed of a class token and a square of patches, are "
                        f"missing or misshapen") from error
    heads = heads or config.get("heads") or HEADS.get(dim)
    if heads is None:
        raise UserError(f"{path}: how many attention heads has a ViT of width {dim}? Say so with {option}")
    return dict(dim=dim, depth=depth, heads=heads, patch_size=patch_size, img_size=grid * patch_size)


def resize_pos_embed(pos_embed, grid):
    """Position embeddings (1, 1 + g², dim) for grid x grid patches (1, 1 + grid², dim), bicubic as in MAE.

    >>> resize_pos_embed(torch.zeros(1, 1 + 14**2, 192), grid=24).shape
    torch.Size([1, 577, 192])
    """
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
        raise UserError(f"{path}: {error}", code=2 if img_size or heads else 1) from error
    tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], teacher.img_size // teacher.patch_size)
    if "fc_norm.weight" in tensors:
        raise UserError(f"{path} is a fine-tuned classifier without the final norm: a teacher is what it was fine-tuned from")
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
    if a.ndim != 3:
        raise ValueError(f"queries, keys and values are (B, N, D), with attention heads joined, not {tuple(a.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))  # (B, heads, N, D/heads)
        return F.log_softmax(a / math.sqrt(a.shape[-1]) @ b.transpose(2, 3), dim=-1)


def relation_loss(student_qkv, teacher_qkv, heads, pairs=("qq", "kk", "vv")):
    """KL(teacher's relation || student's), the mean over images, heads and rows, for each pair.

    student_qkv, teacher_qkv: queries, keys, values of one block, (B, N, D) each; D may differ between the two networks,
    B and N may not. heads: into how many relation heads both D are split, whatever the networks' attention heads. pairs: of
    the letters q, k, v. Returns {pair: scalar}. The teacher gets no gradient. Keeps two (B, heads, N, N) a pair for the
    backward pass.

    >>> student_qkv, teacher_qkv = [torch.randn(2, 197, 192) for _ in "qkv"], [torch.randn(2, 197, 768) for _ in "qkv"]
    >>> relation_loss(student_qkv, teacher_qkv, heads=12).keys()
    dict_keys(['qq', 'kk', 'vv'])
    """
    student, teacher = dict(zip("qkv", student_qkv, strict=True)), dict(zip("qkv", teacher_qkv, strict=True))
    losses = {}
    for a, b in pairs:
        target = relation(teacher[a].detach(), teacher[b].detach(), heads)
        predicted = relation(student[a], student[b], heads)
        # every row of N probabilities is a distribution: "batchmean" over all of them
        losses[a + b] = F.kl_div(predicted.flatten(0, 2), target.flatten(0, 2), reduction="batchmean", log_target=True)
    return losses


def feature_loss(predicted, target):
    """Smooth-L1 between predicted features and the teacher's, (B, N, D), normalised by a LayerNorm without weights."""
    return F.smooth_l1_loss(predicted, F.layer_norm(target.detach(), target.shape[-1:]))


def random_mask(noise, ratio):
    """MAE's masking: the patches with the least noise (B, N) stay, all but `ratio` of them.

    Returns keep (B, n), the indices of those that stay, and rank (B, N), each patch's place in the order of the noise: it
    is masked where rank >= n.
    """
    order = noise.argsort(dim=1)
    return order[:, :int(noise.shape[1] * (1 - ratio))], order.argsort(dim=1)


class Decoder(nn.Module):
    """MAE's decoder: the tokens of the visible patches to the pixels of all. dim: the encoder's; width, depth, heads: its own."""

    def __init__(self, dim, patch_size, img_size, width=512, depth=8, heads=16):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, img_size // patch_size), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, patch_size**2 * 3)
        self.apply(ViT.init_weights)

    def forward(self, tokens, rank):
        """Encoder's normalised tokens (B, 1+n, dim) and rank (B, N), see random_mask, to (B, N, patch_size² * 3)."""
        x = self.embed(tokens)
        masked = self.mask_token.to(x.dtype).expand(len(x), rank.shape[1] - (x.shape[1] - 1), -1)
        patches = torch.cat([x[:, 1:], masked], dim=1).gather(1, rank[:, :, None].expand(-1, -1, x.shape[2]))  # (B, N, width)
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))[:, 1:]


def pixel_loss(predicted, images, masked, normalize=True):
    """MAE's loss: the mean squared error over masked patches, each patch's pixels normalised by their mean and deviation.

    predicted: (B, N, p² * 3). images: (B, 3, H, W), as the network sees them. masked: (B, N), true or false.
    """
    grid, p = math.isqrt(predicted.shape[1]), math.isqrt(predicted.shape[2] // 3)
    target = images.unflatten(3, (grid, p)).unflatten(2, (grid, p)).permute(0, 2, 4, 3, 5, 1)  # (B, grid, grid, p, p, 3)
    target = target.flatten(3).flatten(1, 2)  # (B, N, p² * 3)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (predicted - target).square().mean(-1)  # (B, N)
    return (error * masked).sum() / masked.sum()


class TinyMIM(nn.Module):
    """The training objective: images in, losses by name out. Holds the student, the frozen teacher, and what else is trained.

    targets: which losses are summed. "relation": relation_loss, between the student's last block and the
        teacher's block `teacher_block` (from 1). "feature": the student's last block's output, through a linear map, against
        the output of the teacher's. "cls": the same for the class token alone. "pixel": MAE, which needs no teacher.
    teacher_block: default: the last, if teacher and student are equally deep, else at 3/4 of the teacher's depth.
    relation_heads: default: those the teacher was distilled with, or its attention heads. relations: pairs, see relation_loss.
    mask_ratio: the share of patches that neither network sees. decoder: width, depth and heads of the pixel target's decoder.
    Parameters of the student that the losses do not reach are frozen. Raises ValueError for what cannot work.
    """

    def __init__(self, student, teacher=None, teacher_block=None, relation_heads=None, relations=("qq", "kk", "vv"),
                 targets=("relation",), mask_ratio=0.0, decoder=(512, 8, 16)):
        super().__init__()
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher_block = teacher_block or (teacher.depth if teacher.depth == student.depth else math.ceil(0.75 * teacher.depth))
            if "relation" in targets:
                relation_heads = relation_heads or getattr(teacher, "relation_heads", teacher.heads)
            check_fit(student, teacher, teacher_block, relation_heads)
        elif set(targets) != {"pixel"}:
            raise ValueError(f"{' + '.join(targets)} needs a teacher")
        self.student, self.teacher, self.teacher_block = student, teacher, teacher_block
        self.relation_heads, self.relations = relation_heads, tuple(relations)
        self.targets, self.mask_ratio = tuple(targets), mask_ratio
        patches = student.pos_embed.shape[1] - 1
        visible = int(patches * (1 - mask_ratio))
        if visible == 0 or ("pixel" in targets and visible == patches):
            amount = "many" if visible == 0 else "few"
            raise ValueError(f"a mask ratio of {mask_ratio} hides {patches - visible} of {patches} patches: too {amount}")
        self.maps = nn.ModuleDict({name: nn.Linear(student.dim, teacher.dim) for name in ("feature", "cls") if name in targets})
        if "pixel" in targets:
            self.decoder = Decoder(student.dim, student.patch_size, student.img_size, *decoder)
        else:
            student.norm.requires_grad_(False)
        if self.targets == ("relation",):
            last = student.blocks[-1]
            for unused in (last.attn.proj, last.norm2, last.mlp):
                unused.requires_grad_(False)

    def train(self, mode=True):
        """As nn.Module's, but the teacher stays in eval mode, unless it is to drop paths."""
        super().train(mode)
        if self.teacher is not None and not self.teacher.drop_path:
            self.teacher.eval()
        return self

    def forward(self, student_images, teacher_images, noise=None):
        """Two views (B, 3, H, W) of the same crops to {name: scalar loss}; their sum is what is minimised.

        noise: (B, N), decides what is masked where mask_ratio > 0; drawn if not given.
        """
        student, teacher, keep, losses = self.student, self.teacher, None, {}
        if self.mask_ratio:
            if noise is None:
                noise = torch.rand(len(student_images), student.pos_embed.shape[1] - 1, device=student_images.device)
            keep, rank = random_mask(noise, self.mask_ratio)
        student_block = student.blocks[-1]
        student_tokens = student.tokens_entering(student.depth, student_images, keep)  # (B, 1+N, D_student)
        if teacher is not None:
            teacher_block = teacher.blocks[self.teacher_block - 1]
            with torch.no_grad():
                teacher_tokens = teacher.tokens_entering(self.teacher_block, teacher_images, keep)  # (B, 1+N, D_teacher)

        if "relation" in self.targets:
            with torch.no_grad():
                teacher_qkv = teacher_block.qkv(teacher_tokens)
            losses.update(relation_loss(student_block.qkv(student_tokens), teacher_qkv, self.relation_heads, self.relations))
        if self.targets == ("relation",):
            return losses

        student_output = student_block(student_tokens)
        if self.maps:
            with torch.no_grad():
                teacher_output = teacher_block(teacher_tokens)
        if "feature" in self.targets:
            losses["feature"] = feature_loss(self.maps["feature"](student_output), teacher_output)
        if "cls" in self.targets:
            losses["cls"] = feature_loss(self.maps["cls"](student_output[:, :1]), teacher_output[:, :1])
        if "pixel" in self.targets:
            predicted = self.decoder(student.norm(student_output), rank)
            losses["pixel"] = pixel_loss(predicted, student_images, masked=rank >= keep.shape[1])
        return losses


def check_fit(student, teacher, teacher_block, relation_heads):
    """Raises ValueError if TinyMIM cannot match these networks. relation_heads: None if no relations are matched."""
    if not 1 <= teacher_block <= teacher.depth:
        raise ValueError(f"the teacher has blocks 1 to {teacher.depth}, not {teacher_block}")
    if student.pos_embed.shape[1] <= 2:
        raise ValueError("an image of a single patch has no relations: choose a larger img_size or a smaller patch_size")
    if student.pos_embed.shape[1] != teacher.pos_embed.shape[1]:
        raise ValueError(f"student and teacher must see the same patches: the student's {student.img_size} pixels in "
                         f"patches of {student.patch_size}, the teacher's {teacher.img_size} in {teacher.patch_size}")
    shared = math.gcd(student.dim, teacher.dim)
    if relation_heads and shared % relation_heads:
        fitting = max(heads for heads in range(1, relation_heads) if shared % heads == 0)
        raise ValueError(f"widths of {student.dim} (student) and {teacher.dim} (teacher) do not both divide into "
                         f"{relation_heads} relation heads: try --relation-heads {fitting}")


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
                if not os.path.isdir(folder):  # another process may have been faster
                    os.replace(os.path.join(partial, "imagenette2-320"), folder)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"cannot download Imagenette ({error}): name a folder of images with --data, or unpack "
                            f"{IMAGENETTE} in {root}/") from error
    return folder


def find_images(folder):
    """Paths, as bytes, of all images in `folder`/train if there is one, else in `folder`, at any depth, sorted.

    An array, not a list: forked worker processes share it, whereas 1.3 million Python strings would be copied into each.
    Raises UserError.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    folder = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else folder
    paths, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        paths += [os.path.join(where, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
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
    """Item (epoch, i): what transform makes of image i, a tuple of tensors; its label, if there are labels; and -1.

    If image i cannot be decoded, another takes its place, and i stands instead of -1. All that is random depends on
    (seed, epoch, i) alone: a run is the same for any number of workers and processes, and after it is resumed. Goes
    with EpochSampler, which makes such pairs.
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
            item = self.transform(image)
        return (*item, broken) if self.labels is None else (*item, self.labels[index], broken)

    def report(self, broken, consequence="another image takes its place"):
        """Name the files of these indices that have not been named yet; returns how many indices there are."""
        for index in set(broken) - self.reported:
            tqdm.write(f"cannot decode {os.fsdecode(self.paths[index])}: {consequence}", sys.stderr)
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

    >>> color_jitter(torch.full((1, 3, 4, 4), 0.5), torch.tensor([[[0.0, 1.0, 2.0], [1.2, 1.0, 1.0]]])).unique()
    tensor([0.6000])
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

    def forward(self, crops, jitter):
        images = crops / 255
        return self.normalize(color_jitter(images, jitter)), self.normalize(images)


# ------------------------------------------------------------------------------------------------------------
# 5. Training.

def learning_rate(epoch, peak, warmup_epochs, epochs, floor=0.0):
    """Linear warm-up from 0 to `peak`, then half a cosine to `floor`. `epoch` counts from 0, with a fraction.

    warmup_epochs must be less than epochs.

    >>> [learning_rate(epoch, peak=1.0, warmup_epochs=2, epochs=10) for epoch in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
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


# What --device, --amp, --compile, --fused and --workers come to here (amp: autocast's dtype), and torchrun's numbers.
Machine = collections.namedtuple("Machine", "device amp compile fused workers rank local_rank world")


def start(args):
    """Choose the device and precision and, under torchrun, join the other processes. Returns a Machine. Raises UserError."""
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = "off" if args.amp == "auto" else args.amp
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("PyTorch finds no GPU here: --device cpu does without")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"no GPU for process {local_rank + 1} of this machine, which has {torch.cuda.device_count()}: use "
                            f"--device cpu, or a lower --nproc-per-node of torchrun")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if args.amp == "auto":
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if world > 1 and not dist.is_initialized():
        # an hour: the others wait while one process of each node downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1),
                                device_id=device if device.type == "cuda" else None)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    on_gpu = device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(
        device, {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp],
        compile=on_gpu if args.compile is None else args.compile, fused=on_gpu if args.fused is None else args.fused,
        workers=min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if args.workers is None else args.workers,
        rank=rank, local_rank=local_rank, world=world)


def once_per_node(machine, fetch):
    """fetch() in the first process of each node, then in its others, which find what that one downloaded."""
    if machine.world > 1 and machine.local_rank > 0:
        dist.barrier()
    result = fetch()
    if machine.world > 1 and machine.local_rank == 0:
        dist.barrier()
    return result


def global_batch(args, machine):
    """The images of one update: of all processes and all steps whose gradients it accumulates."""
    return args.batch_size * args.accum * machine.world


def make_loader(dataset, args, machine):
    """Shuffled training batches of --batch-size for this process; a last, smaller one is dropped. Raises UserError."""
    if len(dataset) < global_batch(args, machine):
        raise UserError(f"{len(dataset)} images are fewer than one batch of {args.batch_size} x --accum {args.accum} x "
                        f"{machine.world} processes: lower --batch-size")
    sampler = EpochSampler(dataset, machine.world, machine.rank, seed=args.seed, drop_last=True)
    return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=machine.workers, drop_last=True,
                      pin_memory=machine.device.type == "cuda", persistent_workers=machine.workers > 0, worker_init_fn=stop_quietly)


def stop_quietly(worker):
    """For worker processes: when Ctrl-C or a scheduler's SIGTERM stops the run, the training process alone says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = lambda *_: None  # for the thread that hands batches over; errors in making them travel with the batch


stop = {"asked": False, "can wait": False}


def interrupt(*_):
    """What Ctrl-C and a scheduler's SIGTERM do: in training they wait for the end of an update, for an exception in the midst
    of PyTorch's own code can abort the process. Before training, and the second time, they raise KeyboardInterrupt at once."""
    if stop["asked"] or not stop["can wait"]:
        raise KeyboardInterrupt
    stop["asked"] = True


def stop_if_asked():
    """Raise the KeyboardInterrupt that `interrupt` has put off."""
    if stop["asked"]:
        raise KeyboardInterrupt


def train_epoch(objective, prepare, loader, optimizer, scaler, args, machine, epoch, batches, bar):
    """One epoch of updates; returns {name: mean of this loss over the epoch and all processes, "lr": the last}. `epoch` is from 0.

    batches: iter(loader). objective(*prepare(*batch)) gives {name: scalar}, whose sum is minimised; what ends a batch,
    `undecoded`, is not passed on (see ImageDataset). args: epochs, warmup_epochs, batch_size, accum, blr, min_lr, seed, out.
    Nothing waits for the device between log points. Raises UserError for a loss that is not finite, and if most files cannot
    be decoded.
    """
    updates = len(loader) // args.accum
    log_every = 50 if machine.device.type == "cuda" else 1  # to read the loss is to wait for the GPU
    images = global_batch(args, machine)
    bar.set_description(f"epoch {epoch + 1}/{args.epochs}")
    sums, seen, broken = {}, 0, 0
    torch.manual_seed(hash((args.seed, epoch, machine.rank)))  # drop path and masks: an epoch is the same after --resume
    objective.train()
    for update in range(updates):
        stop_if_asked()
        lr = learning_rate(epoch + update / updates, args.blr * images / 256, args.warmup_epochs, args.epochs, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for micro in range(args.accum):
            *batch, undecoded = next(batches)
            seen += len(undecoded)
            broken += loader.dataset.report(undecoded[undecoded >= 0].tolist())
            if broken > seen / 2 and (seen >= 256 or update == updates - 1):
                raise UserError(f"{broken} of {seen} files could not be decoded: is this the right --data?")
            inputs = prepare(*(x.to(machine.device, non_blocking=True) for x in batch))
            more_follow = machine.world > 1 and micro < args.accum - 1
            with objective.no_sync() if more_follow else contextlib.nullcontext():  # gradients are averaged once per update
                with torch.autocast(machine.device.type, machine.amp, enabled=machine.amp != torch.float32):
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
                raise UserError(f"the loss is no longer finite at step {update + 1} of epoch {epoch + 1}: try a lower --blr. The last "
                                f"good checkpoint is {os.path.join(args.out, 'last.pth')}, after epoch {epoch}")
            bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{lr:.2e}", refresh=False)
        bar.update(images)
    means = torch.stack([value / updates / machine.world for value in sums.values()])
    if machine.world > 1:
        dist.all_reduce(means)
    return dict(zip(sums, means.tolist())) | {"lr": lr}


def fit(objective, model, config, prepare, loader, optimizer, args, machine, after_epoch):
    """All epochs of a run, from the first or, with --resume, the one that follows last.pth; writes that and log.jsonl.

    Compiles the objective and wraps it in DDP as `machine` says. objective, prepare: see train_epoch. model: the part of the
    objective that is the result, which config rebuilds. after_epoch(): called in all processes, returns more for the log; the
    best "top1" in it is kept as best.pth, and returned. Raises UserError.
    """
    last, best, log = (os.path.join(args.out, name) for name in ("last.pth", "best.pth", "log.jsonl"))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == torch.float16)
    kept = {id(parameter) for parameter in model.parameters()}
    auxiliary = {name: p.data for name, p in objective.named_parameters() if p.requires_grad and id(p) not in kept}
    done, history, top1 = 0, [], -1.0

    def begin(epoch):
        loader.sampler.set_epoch(epoch)
        return iter(loader)

    def save(path, epoch):
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise UserError(f"parameters are no longer finite after epoch {epoch}: try a lower --blr. {last} is the last good checkpoint")
        replace_file(path, lambda file: torch.save({
            "model": model.state_dict(), "config": config, "auxiliary": auxiliary, "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "epoch": epoch, "best": top1, "rng": args.seed, "args": vars(args),
        }, file))

    if args.resume:
        saved = read_checkpoint(last)[2]
        model.load_state_dict(saved["model"])
        objective.load_state_dict(saved["auxiliary"], strict=False)  # what the losses need besides, such as a decoder
        for group in saved["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]  # as suits this machine
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # it ran in fp16
            scaler.load_state_dict(saved["scaler"])
        done, top1 = saved["epoch"], saved["best"]
        if machine.rank == 0:
            print(f"going on after epoch {done}" if done < args.epochs else f"all {done} epochs are done: for more, raise --epochs")
        with contextlib.suppress(OSError, ValueError), open(log) as file:
            history = [json.loads(line) for line in file][:done]  # a kill can leave it one epoch ahead
    elif machine.rank == 0:
        save(last, 0)  # a full disk or a read-only folder shows now, and from now on there is always a last.pth
    if machine.compile:
        objective.compile()
        if machine.rank == 0:
            print("the first step compiles, which may take minutes", flush=True)
    parallel = DistributedDataParallel(objective) if machine.world > 1 else objective
    images = len(loader) // args.accum * global_batch(args, machine)  # in an epoch
    stop["can wait"] = True
    # one bar for the whole run, which counts images: so it shows images/s and the time that remains
    with tqdm(total=max(done, args.epochs) * images, initial=done * images, unit="image", unit_scale=True, smoothing=0.1,
              disable=machine.rank > 0, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        batches = begin(done) if done < args.epochs else None
        for epoch in range(done, args.epochs):
            began = time.perf_counter()
            record = {"epoch": epoch + 1} | train_epoch(parallel, prepare, loader, optimizer, scaler, args, machine, epoch, batches, bar)
            record["images/s"] = images / (time.perf_counter() - began)
            batches = begin(epoch + 1) if epoch + 1 < args.epochs else None  # the workers go on while this epoch is evaluated and saved
            record |= after_epoch() | {"peak_memory_gib": peak_memory(machine.device)}
            history.append(record)
            if machine.rank == 0:
                tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
                lines = "".join(json.dumps(entry) + "\n" for entry in history)
                replace_file(log, lambda file: file.write(lines.encode()))
                if record.get("top1", -1.0) > top1:
                    top1 = record["top1"]
                    save(best, epoch + 1)
                save(last, epoch + 1)
    return top1


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
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path} ({reason}); what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def peak_memory(device):
    """The most memory this process has held so far, in GiB: on the GPU, or its resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def preview(paths, img_size, count=4):
    """The middles of a few images from all over the list, for pictures: uint8 (count, 3, img_size, img_size). Raises UserError."""
    crop = v2.Compose([v2.Resize(img_size, antialias=True), v2.CenterCrop(img_size)])
    images = []
    for path in np.random.RandomState(0).permutation(paths)[:30]:
        with contextlib.suppress(Exception):  # a broken file: the next one will do
            images.append(crop(decode(os.fsdecode(path))))
        if len(images) == count:
            break
    if not images:
        raise UserError("30 files from all over the data were tried and none can be decoded: is this the right --data?")
    return torch.stack(images)


@torch.no_grad()
def draw_relations(objective, photos, path, cell=112):
    """Write a picture of how one patch of each photo, uint8 (B, 3, H, W), relates to the others in the teacher and the student.

    The patch is red in the photo. A map shows its row of the relation, the mean over heads, without the class token, scaled to
    the largest value besides its own: teacher and student side by side.
    """
    objective.eval()
    student, teacher = objective.student, objective.teacher
    images = Normalize()(photos / 255).to(student.cls_token.device)
    networks = {"student": student.qkv(images, student.depth)}
    if teacher is not None:
        networks = {"teacher": teacher.qkv(images, objective.teacher_block)} | networks
    grid, size = student.img_size // student.patch_size, student.patch_size
    y, x = grid // 2, grid // 3
    query = y * grid + x
    marked = photos / 255
    marked[:, :, y * size:(y + 1) * size, x * size:(x + 1) * size] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    columns = {"image": marked}  # title: (B, 3, height, width)
    for a, b in objective.relations:
        for name, qkv in networks.items():
            heads = objective.relation_heads or getattr(objective, name).heads
            heat = relation(qkv["qkv".index(a)], qkv["qkv".index(b)], heads).exp().mean(1)[:, 1 + query, 1:].cpu()  # (B, N)
            others = heat.index_fill(1, torch.tensor(query), 0.0)  # to itself a patch relates far more
            heat = (heat / others.amax(1, keepdim=True)).view(-1, 1, grid, grid)
            columns[f"{name} {a}-{b}"] = torch.cat([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=1).clamp(0, 1)  # black, red, yellow, white
    cells = torch.stack([F.interpolate(column, size=(cell, cell)) for column in columns.values()], dim=1).flatten(0, 1)
    picture = F.pad(make_grid(cells, nrow=len(columns), pad_value=1.0), (0, 0, 14, 0), value=1.0)
    picture = v2.functional.to_pil_image(picture)
    for i, title in enumerate(columns):
        ImageDraw.Draw(picture).text((4 + i * (cell + 2), 2), title, fill="black")
    replace_file(path, lambda file: picture.save(file, "PNG"))


def build(args, machine):
    """The objective that `args` describe, with a new student, and the student's config for its checkpoint. Raises UserError."""
    teacher = None
    if args.teacher is not None:
        teacher = once_per_node(machine, lambda: load_teacher(args.teacher, args.img_size, args.teacher_heads, args.teacher_drop_path))
    # a student of its teacher's size and seed must not begin as the teacher began
    torch.manual_seed(hash((args.seed, teacher.cls_token[0, 0, 0].item())) if teacher else args.seed)
    sizes = {name: getattr(args, name) or size for name, size in zip(("dim", "depth", "heads"), STUDENTS[args.student])}
    sizes["patch_size"] = args.patch_size or (teacher.patch_size if teacher else 16)
    sizes["img_size"] = args.img_size or (teacher.img_size if teacher else 224)
    try:
        student = ViT(**sizes, drop_path=args.drop_path)
        objective = TinyMIM(student, teacher, args.teacher_block, args.relation_heads if "relation" in args.target else None,
                            args.relations, args.target, args.mask_ratio, args.decoder)
    except ValueError as error:
        raise UserError(error, code=2) from error
    return objective.to(machine.device), sizes | {"relation_heads": objective.relation_heads}


def train(args):
    """Run what `args` (see make_parser) describe, and leave last.pth, log.jsonl and relations.png in args.out. Raises UserError."""
    machine = start(args)
    check_exists(args.data, besides=["imagenette"])
    if args.teacher is not None:
        check_exists(args.teacher, besides=TEACHERS)
    lock = claim(args, machine)  # noqa: F841, held as long as it is referred to
    folder = once_per_node(machine, imagenette) if args.data == "imagenette" else args.data
    paths = find_images(folder)
    objective, config = build(args, machine)
    student = objective.student
    photos = preview(paths, student.img_size)
    jitter = 0.4 if objective.teacher else 0.0  # MAE changes no colours
    loader = make_loader(ImageDataset(paths, CropAndJitter(student.img_size, jitter), args.seed), args, machine)
    views = TwoViews().to(machine.device)
    if machine.compile:
        views.compile()
    groups = parameter_groups(objective, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=machine.fused or None)
    if machine.rank == 0:
        if machine.device.type == "cpu" and student.dim >= STUDENTS["tiny"][0]:
            print("no GPU: this is slow. For something that runs in minutes: python extras/demo.py")
        size, decoder = f"{millions(student):.2f} M parameters", ""
        if "pixel" in args.target:
            decoder = f" and {millions(objective.decoder):.2f} M in a decoder"
        relations = f" {'/'.join(args.relations)} in {objective.relation_heads} heads" if "relation" in args.target else ""
        source = f" of block {objective.teacher_block} of {objective.teacher.depth} of {args.teacher}" if args.teacher else ", as MAE"
        print(f"a ViT {student.dim} wide, {student.depth} deep, {size}{decoder}, "
              f"learns {' + '.join(args.target)}{relations}{source}, {args.mask_ratio:.0%} of the patches masked")
        print_plan(args, machine, f"{len(paths)} images in {folder}")

    def after_epoch():
        if machine.rank == 0:
            draw_relations(objective, photos, os.path.join(args.out, "relations.png"))
        return {}

    fit(objective, student, config, views, loader, optimizer, args, machine, after_epoch)
    if machine.rank == 0:
        last = os.path.join(args.out, "last.pth")
        print(f"done: {last}. Next: python finetune.py --checkpoint {last}, or tinymim.py --teacher {last}")


def millions(module):
    """How many parameters it has, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def check_exists(path, besides):
    """Before anything is downloaded or written: a misspelt path is a UserError."""
    if path not in besides and not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder, nor one of {', '.join(besides)}")


def claim(args, machine):
    """See that args.out has no run, or with --resume one that stands still; returns an open file that keeps others out.
    Raises UserError."""
    file = None
    if machine.rank == 0:
        try:
            os.makedirs(args.out, exist_ok=True)
            file = open(os.path.join(args.out, ".lock"), "w")
        except OSError as error:
            raise UserError(f"cannot write in {args.out} ({error}): choose another --out") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another process is at work in {args.out}: wait for it, or choose another --out") from error
        except OSError:
            pass  # a file system without locks
    last = os.path.join(args.out, "last.pth")
    if not args.resume and os.path.exists(last) and read_checkpoint(last)[2].get("epoch", 1) > 0:
        raise UserError(f"{args.out} already holds a run: --resume goes on with it, another --out starts anew")
    if machine.rank > 0:
        return None
    for name in os.listdir(args.out):
        if name.endswith(".part"):  # of a run that was killed while it wrote
            os.remove(os.path.join(args.out, name))
    return file


def print_plan(args, machine, data):
    """One line: what is trained on, how and where."""
    batch = global_batch(args, machine)
    precision = str(machine.amp).removeprefix("torch.") + (", compiled" if machine.compile else "")
    print(f"{data}, {args.epochs} epochs in batches of {batch}, peak learning rate {args.blr * batch / 256:.3g}, "
          f"{machine.world} x {machine.device.type} in {precision}, results in {args.out}", flush=True)


# ------------------------------------------------------------------------------------------------------------
# 6. Command line.


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating all options."""

    def __init__(self, prog, description):
        super().__init__(prog, description=description,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110, max_help_position=28))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind, low, below=math.inf):
    """An argparse type: an int or float (kind) from low to, and not including, below."""
    def parse(text):
        if not low <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more" + ("" if below == math.inf else f", and less than {below}"))
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own message about text that is no number
    return parse


def student_options(parser, of, note=""):
    """The options that give the sizes of a new student. of: in words, whose patches and images it takes by default."""
    add = parser.add_argument_group("student").add_argument
    add("--student", choices=STUDENTS, default="tiny", help=f"size of the ViT; {note}default: tiny")
    for size, words in (("dim", "width"), ("depth", "number of blocks"), ("heads", "attention heads of a block")):
        add(f"--{size}", type=number(int, 1), metavar="N", help=f"{words}, instead of the named student's")
    add("--patch-size", type=number(int, 1), metavar="N", help=f"in pixels; default: that of {of}, or 16")
    add("--img-size", type=number(int, 1), metavar="N", help=f"in pixels; default: that of {of}, or 224")


def training_options(parser, **defaults):
    """The options that tinymim.py and finetune.py share. `defaults` says in words what the recipe makes of those not given."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), metavar="N", help=f"default: {defaults['epochs']}")
    add("--warmup-epochs", type=number(float, 0), metavar="N",
        help=f"of linear warm-up, before half a cosine; default: {defaults['warmup_epochs']}")
    add("--batch-size", type=number(int, 1), metavar="N", help=f"images per process and step; default: {defaults['batch_size']}")
    add("--accum", type=number(int, 1), default=1, metavar="N", help="steps whose gradients make one update; default: 1")
    add("--blr", type=number(float, 0), metavar="X",
        help=f"base learning rate: the peak is blr x batch size x accum x processes / 256; default: {defaults['blr']}")
    add("--min-lr", type=number(float, 0), metavar="X", help=f"where the cosine ends; default: {defaults['min_lr']}")
    add("--weight-decay", type=number(float, 0), metavar="X", help=f"of AdamW, not for biases and norms; default: {defaults['weight_decay']}")
    add("--drop-path", type=number(float, 0, 1), metavar="P",
        help=f"how probably a block's attention or MLP is skipped, image by image; default: {defaults['drop_path']}")
    if "layer_decay" in defaults:
        add("--layer-decay", type=number(float, 0), metavar="X",
            help=f"each layer learns at X times the rate of the one above it; default: {defaults['layer_decay']}")
    add("--seed", type=number(int, 0, 2**32), default=0, metavar="N", help="of weights, crops, masks and order; default: 0")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    add("--workers", type=number(int, 0), metavar="N", help="processes that decode images, per process; default: one per core, at most 16")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="mixed precision; auto: off on the CPU, bf16 on a GPU that has it, else fp16")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--fused", action=argparse.BooleanOptionalAction, help="fused AdamW; default: on a GPU")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FOLDER", help="for checkpoints and logs; default: a folder below runs/ named after what is run")
    add("--resume", action="store_true", help="go on with the run in --out, with its options, after the last epoch it finished")


MAY_CHANGE = {"data", "epochs", "batch_size", "accum", "blr", "min_lr", "device", "workers", "compile", "fused", "out", "resume"}  # on --resume


def command_line(parser, argv, complete, run):
    """run(args), with every error a person can mend as one line. complete(args) fills in defaults and names the run."""
    args, out = parser.parse_args(argv), None
    gc.enable()
    stop.update({"asked": False, "can wait": False})
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind, handler in handlers.items():
        if handler != signal.SIG_IGN:  # nohup and scripts start background jobs deaf to Ctrl-C
            signal.signal(kind, interrupt)
    try:
        name = complete(args)
        out = args.out or os.path.join("runs", name)
        if args.resume:
            args = continued(parser, argv, out)
            complete(args)
        args.out = out
        run(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        parser.exit(error.code, f"{parser.prog}: error: {error}\n")
    except (KeyboardInterrupt, RuntimeError, MemoryError) as error:
        if isinstance(error, KeyboardInterrupt) or stop["asked"]:  # a process that stops breaks the others' communication
            whole = out and os.path.exists(os.path.join(out, "last.pth"))
            hint = f"; --resume --out {out} goes on after the last whole epoch" if whole else ""
            parser.exit(130, f"\n{parser.prog}: stopped{hint}\n")
        what = advice(error)
        if not what:
            raise
        parser.exit(1, f"{parser.prog}: error: {what}\n")
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def advice(error):
    """What to do about an error that comes from this machine's limits; None for any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        return "the GPU's memory is full: lower --batch-size, and raise --accum by the same factor"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "the memory is full: lower --batch-size, and raise --accum by the same factor, or lower --workers"
    if text.startswith("DataLoader worker"):
        return f"a process that decodes images died ({text.splitlines()[0]}): for lack of memory, lower --workers"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({text.splitlines()[0]}): --no-compile does without"


def continued(parser, argv, out):
    """The options of the run in `out`, and those of argv that may change without making it another run. Raises UserError."""
    last = os.path.join(out, "last.pth")
    if not os.path.exists(last):
        raise UserError(f"there is no run to go on with in {out}: no last.pth")
    saved = read_checkpoint(last)[2].get("args")
    if not isinstance(saved, dict):
        raise UserError(f"{last} was not saved by this code: it cannot be resumed")
    if saved.keys() != vars(parser.parse_args(argv)).keys():
        raise UserError(f"the run in {out} is not one of this version of {parser.prog}: it cannot be resumed")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in sorted(saved.keys() - MAY_CHANGE):
        if saved[name] != getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"the run in {out} has {option} {saved[name]}: it cannot go on with {getattr(args, name)}", code=2)
    return args


def fill_in(args, recipe):
    """Options that were not given take the recipe's values. Raises UserError if nothing is left after the warm-up."""
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}", code=2)


def make_parser():
    """The command line's options; what they are by default, if it depends on others, is in `complete`."""
    parser = Parser("tinymim.py", "Distil a small ViT from a large one pre-trained by MAE.")
    student_options(parser, of="the teacher", note="or, with --target pixel alone, what MAE trains; ")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", metavar="NAME|FILE",
        help=f"{', '.join(TEACHERS)} (downloaded once), or a checkpoint; default: mae_base, none for MAE")
    add("--teacher-heads", type=number(int, 1), metavar="N", help="attention heads, where the checkpoint does not tell")
    add("--teacher-block", type=number(int, 1), metavar="N",
        help="the block the student learns from; default: the last of a teacher as deep as the student, else at 3/4 of its depth")
    add("--teacher-drop-path", type=number(float, 0, 1), default=0.0, metavar="P",
        help="as --drop-path, in the teacher; default: 0")
    add = parser.add_argument_group("target").add_argument
    add("--target", nargs="+", choices=("relation", "feature", "cls", "pixel"), default=["relation"], metavar="NAME",
        help="relation, feature, cls, pixel: their losses are summed; pixel alone is MAE; default: relation")
    add("--relations", nargs="+", choices=[a + b for a in "qkv" for b in "qkv"], default=["qq", "kk", "vv"], metavar="PAIR",
        help="of q, k, v; default: qq kk vv. The authors' published numbers: qk vv")
    add("--relation-heads", type=number(int, 1), metavar="N",
        help="default: those the teacher was itself distilled with, else its attention heads")
    add("--mask-ratio", type=number(float, 0, 1), metavar="P", help="of patches hidden from both; default: 0, with pixel 0.75")
    add("--decoder", nargs=3, type=number(int, 1), default=[512, 8, 16], metavar="N",
        help="width, depth and heads of the pixel target's decoder; default: 512 8 16")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="imagenette", metavar="FOLDER",
        help="of images at any depth (its train/ if there is one); default: Imagenette, downloaded once to data/")
    training_options(parser, epochs="300, for MAE 800", warmup_epochs="a twentieth of --epochs", batch_size=256, blr=1.5e-4, min_lr=0,
                     weight_decay=0.05, drop_path="0.1 for every block of the student, for MAE 0")
    return parser


def complete(args):
    """Fill in the published recipe (at batches of 4096 in all; the learning rate follows the batch), and name the run."""
    args.target, args.relations = list(dict.fromkeys(args.target)), list(dict.fromkeys(args.relations))  # each once
    mae = args.target == ["pixel"]
    if mae and args.teacher is not None:
        raise UserError("--target pixel alone is MAE, which has no --teacher: drop one of the two", code=2)
    fill_in(args, dict(epochs=800 if mae else 300, batch_size=256, blr=1.5e-4, min_lr=0.0, weight_decay=0.05))
    fill_in(args, dict(warmup_epochs=args.epochs / 20, drop_path=0.0 if mae else 0.1, teacher=None if mae else "mae_base",
                       mask_ratio=0.75 if "pixel" in args.target else 0.0))
    names = [args.student] + ([] if mae else [run_name(args.teacher)]) + (args.target if args.target != ["relation"] else [])
    return "-".join("mae" if mae and name == "pixel" else name for name in names)


def run_name(path):
    """What to call a checkpoint: a teacher's name, a file's, or for our last.pth that of its folder.

    >>> run_name("mae_base"), run_name("/models/my_mae.pth"), run_name("runs/tiny-mae_base/last.pth")
    ('mae_base', 'my_mae', 'tiny-mae_base')
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.basename(os.path.dirname(os.path.abspath(path))) if stem in ("last", "best") else stem


def main(argv=None):
    """python tinymim.py, with the words of argv, or those of the command line."""
    command_line(make_parser(), argv, complete, train)


if __name__ == "__main__":
    main()
