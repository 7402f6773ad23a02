"""MAE: pre-train a teacher of your own, on your own images.

    python extras/mae.py --student base --data /path/to/images --out runs/my-mae
    python tinymim.py --student tiny --teacher runs/my-mae/last.pth --data /path/to/images

Paper: He et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022,
https://arxiv.org/abs/2111.06377. Data, training loop and most options are those of tinymim.py.
"""

import math
import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import COUNT, Block, ViT, sincos_pos_embed

# MAE's recipe, for updates of 4096 images. Its rates and its warm-up are those of tinymim.py.
DEFAULTS = tinymim.DEFAULTS | dict(
    epochs=800, drop_path=0.0, patch_size=16, mask_ratio=0.75, decoder=[512, 8, 16])

def random_mask(noise, ratio):
    """Hide the share `ratio` of P patches, those with the largest noise (B, P).

    Returns keep (B, n), the indices of the n visible patches, and rank (B, P), each patch's place
    in the order of the noise. A patch is hidden where rank >= n.
    """
    order = noise.argsort(dim=1)  # the patches, sorted by their noise
    rank = order.argsort(dim=1)  # the inverse: where in that order a patch is
    return order[:, :int(noise.shape[1] * (1 - ratio))], rank

def pick(tokens, indices):
    """From tokens (B, 1 + P, D), the class token and the patches at `indices`, (B, n)."""
    patches = tokens[:, 1:].gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :1], patches], dim=1)  # (B, 1 + n, D)

class Decoder(nn.Module):
    """Tokens of the visible patches to the pixels of all. dim: the encoder's width."""
    def __init__(self, dim, patch_size, grid, width=512, depth=8, heads=16):
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"the decoder's width, {width}, must be divisible by 4 and by its "
                             f"{heads} heads")
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(width, grid), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, patch_size**2 * 3)
        self.apply(ViT.init_weights)

    def forward(self, tokens, rank):
        """Normalised tokens (B, 1 + n, dim), rank (B, P) to pixels (B, P, patch_size² * 3)."""
        x = self.embed(tokens)
        hidden = self.mask_token.to(x.dtype).expand(len(x), rank.shape[1] + 1 - x.shape[1], -1)
        x = pick(torch.cat([x, hidden], dim=1), rank)  # from the order of the noise to the image's
        return self.pred(self.norm(self.blocks(x + self.pos_embed)))[:, 1:]

def pixel_loss(predicted, images, hidden, normalize=True):
    """Mean squared error over the hidden patches, (B, P), of pixels normalised patch by patch.
    predicted: (B, P, p² * 3) for patches of p x p pixels, each pixel's three colours together."""
    grid, p = math.isqrt(predicted.shape[1]), math.isqrt(predicted.shape[2] // 3)
    target = images.unflatten(3, (grid, p)).unflatten(2, (grid, p)).permute(0, 2, 4, 3, 5, 1)
    target = target.flatten(3).flatten(1, 2)  # (B, P, p² * 3)
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (predicted - target).square().mean(-1)  # (B, P)
    return (error * hidden).sum() / hidden.sum()

class MAE(nn.Module):
    """The objective: a batch of uint8 crops (B, 3, H, W) in, {"pixel": loss} out."""
    def __init__(self, student, mask_ratio=0.75, decoder=(512, 8, 16)):
        super().__init__()
        if not 0 < int(student.grid**2 * (1 - mask_ratio)) < student.grid**2:
            raise ValueError(f"a mask ratio of {mask_ratio} leaves nothing to see or to predict")
        self.student, self.mask_ratio = student, mask_ratio
        self.decoder = Decoder(student.dim, student.config["patch_size"], student.grid, *decoder)

    def forward(self, crops):
        images = tinymim.normalize(crops / 255)  # MAE jitters no colours
        noise = torch.rand(len(images), self.student.grid**2, device=images.device)
        return self.losses(images, noise)

    def losses(self, images, noise):  # (B, 3, H, W), (B, P): which of the P patches are hidden
        keep, rank = random_mask(noise, self.mask_ratio)
        tokens = self.student.blocks(pick(self.student.embed(images), keep))
        predicted = self.decoder(self.student.norm(tokens), rank)
        return {"pixel": pixel_loss(predicted, images, rank >= keep.shape[1])}

def build(args):
    student = tinymim.new_student(args, args.patch_size, args.img_size or 224)
    return MAE(student, args.mask_ratio, args.decoder)

def main(argv=None):
    parser = tinymim.make_parser("extras/mae.py", __doc__, DEFAULTS)
    add = parser.add_argument
    add("--patch-size", type=COUNT, help="in pixels (default: 16)")
    add("--mask-ratio", type=tinymim.SHARE, help="of the patches (default: 0.75)")
    add("--decoder", nargs=3, type=COUNT, metavar="N",
        help="its width, depth and heads (default: 512 8 16)")
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"mae-{args.student}")
    tinymim.run(parser, tinymim.train, args, build)
    if tinymim.RANK == 0:
        print(f"finished. Next: python tinymim.py --teacher {args.out}/last.pth --data {args.data}")

if __name__ == "__main__":
    main()
