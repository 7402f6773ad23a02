"""The other things that the paper distils, as objectives for tinymim.py's training loop.

    python extras/targets.py --target attention --student base --teacher mae_large --data /path/to/imagenet

--target: relation, logit (relations without softmax, T7); cls (class token, T5); output, attention,
attention-after, ffn, ffn-after, qkv (features, T6; output is the last block's ffn-after). --mask-ratio 0.75
hides patches from both networks (T12), --mae adds MAE's own loss (T5, T12). All other options are those of
tinymim.py.
"""

import functools
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from mae import MAE, pick, random_mask
from tinymim import TinyMIM, UserError

FEATURES = ("output", "attention", "attention-after", "ffn", "ffn-after", "qkv")

class LogitRelation(TinyMIM):
    """Relations without softmax. The paper does not say with which loss: squared error is the plainest."""
    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            teacher = dict(zip("qkv", self.teacher.qkv(teacher_images, self.teacher_block)))
        student = dict(zip("qkv", self.student.qkv(student_images, self.student.depth)))
        losses = {}
        for a, b in self.pairs:
            logits = []
            for qkv in (student, teacher):
                x, y = (qkv[name].float().unflatten(2, (self.relation_heads, -1)) for name in (a, b))
                with torch.autocast(x.device.type, enabled=False):  # in float32, as in tinymim.relation
                    logits.append(torch.einsum("bnhd,bmhd->bhnm", x, y) / x.shape[-1] ** 0.5)
            losses[a + b] = F.mse_loss(*logits)
        return losses

class MaskedRelation(TinyMIM):
    """Relations of the visible tokens. The paper does not say what the teacher sees: here the same patches as
    the student, which is how MAE trained it."""
    def __init__(self, *args, mask_ratio, **options):
        super().__init__(*args, **options)
        if not 0 <= int(self.student.grid**2 * mask_ratio) < self.student.grid**2 - 1:
            raise UserError(f"a mask ratio of {mask_ratio} leaves no relations to see")
        self.mask_ratio = mask_ratio

    def forward(self, student_images, teacher_images, noise=None):
        if noise is None:
            noise = torch.rand(len(student_images), self.student.grid**2, device=student_images.device)
        keep, _ = random_mask(noise, self.mask_ratio)
        with torch.no_grad():
            teacher_qkv = visible_qkv(self.teacher, teacher_images, self.teacher_block, keep)
        student_qkv = visible_qkv(self.student, student_images, self.student.depth, keep)
        return tinymim.relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

def visible_qkv(vit, images, block, keep):
    """ViT.qkv of the class token and the patches `keep` (B, n): (B, 1 + n, dim) each."""
    x = vit.blocks[:block - 1](pick(vit.embed(images), keep))
    return vit.blocks[block - 1].qkv(x)

class ClassToken(nn.Module):
    """KL(teacher's class token || student's), both after the last norm, as distributions over their channels.

    The widths differ and the paper does not say how they are brought together: a linear map of the student's.
    """
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.map = nn.Linear(student.dim, teacher.dim)

    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            target = F.log_softmax(self.teacher(teacher_images)[:, 0].float(), dim=-1)
        predicted = F.log_softmax(self.map(self.student(student_images)[:, 0]).float(), dim=-1)
        return {"cls": F.kl_div(predicted, target, reduction="batchmean", log_target=True)}

def features(vit, images, block):
    """All features of block number `block`, from 1: {name: (B, N, dim)}, and for "qkv" (B, N, 3 * dim).

    attention, ffn: what the branch adds to the tokens. attention-after, ffn-after: the tokens after that.
    """
    x = vit.blocks[:block - 1](vit.embed(images))
    last = vit.blocks[block - 1]
    attention = last.attn(last.norm1(x))
    ffn = last.mlp(last.norm2(x + attention))
    output = x + attention + ffn
    return {"output": output, "attention": attention, "attention-after": x + attention, "ffn": ffn,
            "ffn-after": output, "qkv": torch.cat(last.qkv(x), dim=-1)}

class Feature(nn.Module):
    """Smooth-L1 (beta 2) between a linear map of the student's output and a feature of the teacher's block,
    normalised by a LayerNorm without weights (q, k and v each by itself)."""
    def __init__(self, student, teacher, name, block):
        super().__init__()
        self.student, self.teacher, self.name, self.block = student, teacher, name, block
        self.parts = 3 if name == "qkv" else 1
        self.map = nn.Linear(student.dim, self.parts * teacher.dim)

    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            target = features(self.teacher, teacher_images, self.block)[self.name].float()
            target = target.unflatten(2, (self.parts, -1))
            target = F.layer_norm(target, target.shape[-1:]).flatten(2)
        predicted = self.map(self.student(student_images)).float()
        return {"feature": F.smooth_l1_loss(predicted, target, beta=2.0)}

class WithMAE(nn.Module):
    """An objective and MAE's loss on the same student, which sees the images twice, masked for MAE."""
    def __init__(self, objective, mask_ratio, decoder):
        super().__init__()
        self.objective, self.mae = objective, MAE(objective.student, mask_ratio, decoder)
        self.student = objective.student

    def forward(self, student_images, teacher_images):
        return self.objective(student_images, teacher_images) | self.mae(student_images, teacher_images)

def build(args):
    """The objective of --target. tinymim.build makes student and teacher, and chooses the teacher's block."""
    if args.mask_ratio and args.target != "relation":
        raise UserError("--mask-ratio goes with --target relation")
    masked = functools.partial(MaskedRelation, mask_ratio=args.mask_ratio)
    kind = LogitRelation if args.target == "logit" else masked if args.mask_ratio else TinyMIM
    objective = tinymim.build(args, kind)
    student, teacher, block = objective.student, objective.teacher, objective.teacher_block
    if args.target == "cls":
        objective = ClassToken(student, teacher)
    elif args.target in FEATURES:
        block = teacher.depth if args.target == "output" and not args.teacher_block else block
        objective = Feature(student, teacher, args.target, block)
    if args.mae:
        objective = WithMAE(objective, args.mask_ratio or 0.75, args.decoder)
    if args.mae or args.target not in ("relation", "logit"):  # these need all of the student
        student.requires_grad_(True)
        student.pos_embed.requires_grad_(False)
    return objective

def main(argv=None):
    parser = tinymim.make_parser("extras/targets.py", __doc__, teacher=True)
    add = parser.add_argument_group("target").add_argument
    add("--target", choices=("relation", "logit", "cls", *FEATURES), default="relation")
    add("--mask-ratio", type=float, default=0.0, help="of patches, hidden from both networks (default: 0)")
    add("--mae", action="store_true", help="add MAE's loss, with 3/4 of the patches masked")
    add("--decoder", nargs=3, type=int, default=[512, 8, 16], metavar="N", help="MAE's: width, depth, heads")
    args = parser.parse_args(argv)
    name = f"{args.student}-{tinymim.run_name(args.teacher)}-{args.target}"
    args.out = args.out or os.path.join("runs", name)
    tinymim.run(parser, args, lambda args: tinymim.train(args, build))

if __name__ == "__main__":
    main()
