"""MAE: pre-train a teacher of your own, on your own images.

    python extras/mae.py --student base --data /path/to/images --out runs/my-mae
    python tinymim.py --student tiny --teacher runs/my-mae/last.pth --data /path/to/images

Paper: He et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arxiv.org/abs/2111.06377.
Data, training loop and options are those of tinymim.py.
"""

import math
import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import STUDENTS, Block, UserError, ViT, sincos_pos_embed

def random_mask(noise, ratio):
    """Hide the share `ratio` of P patches: those with the largest noise (B, P), one random number per patch.

    Returns keep (B, n), the indices of the patches that stay visible, and rank (B, P), each patch's place in
    the order of the noise: it is masked where rank >= n. The second argsort inverts the first: `order` lists
    the patches by noise, `rank` says where in that list a patch is. The decoder has the visible patches in
    the order of `keep`, then mask tokens: picking at `rank` puts each of them in its place.
    """
    order = noise.argsort(dim=1)
    rank = order.argsort(dim=1)
    return order[:, :int(noise.shape[1] * (1 - ratio))], rank

def pick(tokens, indices):
    """From tokens (B, 1 + P, D), the class token and the patches at `indices` (B, n): (B, 1 + n, D)."""
    patches = tokens[:, 1:].gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], dim=1)

class Decoder(nn.Module):
    """Tokens of the visible patches to the pixels of all. dim: the encoder's width; the rest: its own."""
    def __init__(self, dim, patch_size, grid, width=512, depth=8, heads=16):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, grid), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, patch_size**2 * 3)
        self.apply(ViT.init_weights)

    def forward(self, tokens, rank):
        """Normalised tokens (B, 1 + n, dim) and rank (B, P), see random_mask, to (B, P, patch_size² * 3)."""
        x = self.embed(tokens)
        masked = self.mask_token.to(x.dtype).expand(len(x), rank.shape[1] + 1 - x.shape[1], -1)
        x = pick(torch.cat([x, masked], dim=1), rank) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))[:, 1:]

def pixel_loss(predicted, images, masked, normalize=True):
    """Mean squared error over the masked patches (B, P), by default of pixels normalised patch by patch.

    predicted: (B, P, p² * 3) for patches of p x p pixels, each pixel's three colours together.
    """
    grid, p = math.isqrt(predicted.shape[1]), math.isqrt(predicted.shape[2] // 3)
    target = images.unflatten(3, (grid, p)).unflatten(2, (grid, p)).permute(0, 2, 4, 3, 5, 1)
    target = target.flatten(3).flatten(1, 2)  # (B, P, p² * 3)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (predicted - target).square().mean(-1)  # (B, P)
    return (error * masked).sum() / masked.sum()

class MAE(nn.Module):
    """The objective that takes TinyMIM's place in the training loop: {"pixel": loss} of the clean view."""
    def __init__(self, student, mask_ratio=0.75, decoder=(512, 8, 16)):
        super().__init__()
        self.student, self.mask_ratio = student, mask_ratio
        if not 0 < int(student.grid**2 * (1 - mask_ratio)) < student.grid**2:
            raise UserError(f"a mask ratio of {mask_ratio} leaves nothing to see, or nothing to predict")
        self.decoder = Decoder(student.dim, student.config["patch_size"], student.grid, *decoder)

    def forward(self, student_images, teacher_images, noise=None):
        images = teacher_images  # not jittered
        if noise is None:
            noise = torch.rand(len(images), self.student.grid**2, device=images.device)
        keep, rank = random_mask(noise, self.mask_ratio)
        tokens = self.student.blocks(pick(self.student.embed(images), keep))
        predicted = self.decoder(self.student.norm(tokens), rank)
        return {"pixel": pixel_loss(predicted, images, rank >= keep.shape[1])}

def build(args):
    dim, depth, heads = STUDENTS[args.student]
    student = ViT(args.dim or dim, args.depth or depth, args.heads or heads, patch_size=args.patch_size,
                  img_size=args.img_size or 224, drop_path=args.drop_path)
    return MAE(student, args.mask_ratio, args.decoder)

def main(argv=None):
    parser = tinymim.make_parser("extras/mae.py", __doc__)
    parser.set_defaults(epochs=800, batch_size=256, blr=1.5e-4, min_lr=0.0, drop_path=0.0)
    add = parser.add_argument_group("MAE").add_argument
    add("--patch-size", type=int, default=16, help="in pixels (default: 16)")
    add("--mask-ratio", type=float, default=0.75, help="of the patches (default: 0.75)")
    add("--decoder", nargs=3, type=int, default=[512, 8, 16], metavar="INT",
        help="its width, depth and heads (default: 512 8 16)")
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"mae-{args.student}")
    tinymim.run(parser, args, lambda args: tinymim.train(args, build))
    if tinymim.RANK == 0:
        print(f"finished. Next: python tinymim.py --teacher {args.out}/last.pth --data {args.data}")

if __name__ == "__main__":
    main()
