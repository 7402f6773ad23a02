"""Other ways to write the training of tinymim.py, for benchmark.py to measure.

"usual" is how one would write it: Pillow decodes, crops and jitters image by image, attention and
relations are as their formulas say, and AdamW is not fused. Three are changes that were not
worth their lines (extras/README.md, Speed): "checkpoint" saves memory, "matmul" time, "both" both.
"""

import argparse
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

import finetune
import tinymim
from tinymim import STUDENTS, ViT

# With random weights, which take as long: dim, depth, heads, patch size.
TEACHERS = {"mae_base": (768, 12, 12, 16), "mae_large": (1024, 24, 16, 16),
            "mae_huge": (1280, 32, 16, 14)}

class UsualDataset(tinymim.ImageDataset):
    """The student's and the teacher's view of an image, float (3, H, W) each, made by Pillow."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    finish = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                         tinymim.normalize])

    def __getitem__(self, key):
        with Image.open(os.fsdecode(self.paths[key % len(self)])) as image:
            crop = self.transform(image.convert("RGB"))
        return self.finish(self.jitter(crop)), self.finish(crop)

def usual_attention(q, k, v):  # (B, heads, N, dim/heads) each
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

def usual_relation(a, b, relation_heads):  # (B, N, D) each
    a, b = (x.unflatten(2, (relation_heads, -1)).transpose(1, 2) for x in (a, b))
    return (a @ b.transpose(2, 3) / a.shape[-1] ** 0.5).softmax(dim=-1).log()

def recomputed_loss(*inputs, loss=tinymim.relation_loss):
    """The loss, without keeping relations for the backward pass, which computes them anew."""
    return checkpoint(loss, *inputs, use_reentrant=False)

def patches_by_product(conv, images):
    """What `conv` computes of patches that do not overlap: (B, dim, grid, grid)."""
    size = conv.kernel_size[0]
    patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, grid, 16, grid, 16)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, grid, grid, 3 * 16 * 16)
    return F.linear(patches, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)

def replace_functions(variant):
    """Make this process compute as the variant does."""
    if variant == "usual":
        F.scaled_dot_product_attention, tinymim.log_relation = usual_attention, usual_relation
    if variant in ("checkpoint", "both"):
        tinymim.relation_loss = recomputed_loss
    if variant in ("matmul", "both"):
        nn.Conv2d.forward = patches_by_product

def train(args):
    """What tinymim.py or finetune.py does with these options, as args.variant says."""
    if args.variant == "usual":
        args.amp = "fp16" if args.device == "cuda" else "off"
    if args.variant in ("usual", "eager", "compiled"):
        args.compile = args.variant == "compiled"
    replace_functions(args.variant)
    if args.variant == "finetune":
        return finetune.train(finetuning_options(args))
    if args.teacher in TEACHERS:
        tinymim.load_teacher = lambda name, img_size, heads: ViT(*TEACHERS[name], img_size)
    tinymim.train(args)

def finetuning_options(args):
    """finetune.py's options, by its recipe: like a distilled student, but with random weights."""
    parser = finetune.make_parser("finetune.py", finetune.__doc__)
    options = vars(args) | vars(parser.parse_args(["--checkpoint", args.student]))
    for name in ("data", "img_size", "batch_size", "workers", "device", "amp", "compile"):
        options[name] = getattr(args, name)
    dim, depth, heads = STUDENTS[args.student]
    sizes = dict(dim=dim, depth=depth, heads=heads, patch_size=16, img_size=224)
    tinymim.read_checkpoint = lambda *_: ({}, sizes, {"relation_heads": heads})
    finetune.evaluate = lambda *_: {}  # takes no part in what is measured
    return argparse.Namespace(**options)
