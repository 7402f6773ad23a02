"""The other things that the paper distils, as objectives for tinymim.py's training loop.

    python extras/targets.py --target attention --student base --teacher mae_large --data FOLDER

--target: relation; logit, relations without softmax (Table 7); cls, the class token (Table 5); or
a feature (Table 6): output, attention, attention-after, ffn, ffn-after, qkv. output is the last
block's ffn-after. --mask-ratio 0.75 hides patches from both networks (Table 12), and --mae adds
MAE's own loss (Tables 5 and 12). All other options are those of tinymim.py.
"""

import math
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from mae import MAE, pick, random_mask
from tinymim import COUNT, SHARE, TinyMIM, UserError

FEATURES = ("output", "attention", "attention-after", "ffn", "ffn-after", "qkv")

def logits(a, b, relation_heads):
    """tinymim.log_relation without its softmax: (B, h, N, N)."""
    with torch.autocast(a.device.type, enabled=False):  # in float32, as there
        a, b = (x.float().unflatten(2, (relation_heads, -1)).transpose(1, 2) for x in (a, b))
        return a @ b.transpose(2, 3) / math.sqrt(a.shape[-1])

class LogitRelation(TinyMIM):
    """Relations without softmax. The paper does not tell the loss: here squared error."""
    def forward(self, student_images, teacher_images):
        with torch.no_grad():
            teacher = dict(zip("qkv", self.teacher.qkv_at(teacher_images, self.teacher_block)))
        student = dict(zip("qkv", self.student.qkv_at(student_images, self.student.depth)))
        heads = self.relation_heads
        return {a + b: F.mse_loss(logits(student[a], student[b], heads),
                                  logits(teacher[a], teacher[b], heads)) for a, b in self.pairs}

class MaskedRelation(TinyMIM):
    """Relations of the visible tokens. The paper does not tell what the teacher sees: here the
    same patches as the student, which is how MAE trained it."""
    def __init__(self, *args, mask_ratio):
        super().__init__(*args)
        if not 0 <= int(self.student.grid**2 * mask_ratio) < self.student.grid**2 - 1:
            raise UserError(f"a mask ratio of {mask_ratio} leaves no relations to see")
        self.mask_ratio = mask_ratio

    def forward(self, student_images, teacher_images, noise=None):
        if noise is None:
            noise = student_images.new_empty(len(student_images), self.student.grid**2).uniform_()
        keep, _ = random_mask(noise, self.mask_ratio)
        with torch.no_grad():
            teacher_qkv = visible_qkv(self.teacher, teacher_images, self.teacher_block, keep)
        student_qkv = visible_qkv(self.student, student_images, self.student.depth, keep)
        return tinymim.relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

def visible_qkv(vit, images, block, keep):
    """ViT.qkv_at of the class token and the patches `keep` (B, n): (B, 1 + n, dim) each."""
    x = vit.blocks[:block - 1](pick(vit.embed(images), keep))
    chosen = vit.blocks[block - 1]
    return chosen.attn.qkv(chosen.norm1(x)).chunk(3, dim=-1)

class ClassToken(nn.Module):
    """KL(teacher's class token || student's), after the last norm, as distributions over channels.
    The paper does not tell how the widths come together: here by a linear map of the student's."""
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
    """All features of block number `block`, from 1, (B, N, dim) each, "qkv" (B, N, 3 * dim).
    attention, ffn: what a branch adds to the tokens. -after: the tokens with it."""
    x = vit.blocks[:block - 1](vit.embed(images))
    chosen = vit.blocks[block - 1]
    attention = chosen.attn(chosen.norm1(x))
    ffn = chosen.mlp(chosen.norm2(x + attention))
    output = x + attention + ffn
    return {"output": output, "attention": attention, "attention-after": x + attention, "ffn": ffn,
            "ffn-after": output, "qkv": chosen.attn.qkv(chosen.norm1(x))}

class Feature(nn.Module):
    """Smooth-L1 (beta 2) between a linear map of the student's output and a feature of the teacher,
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
    """An objective and MAE's, of one student. It sees each image twice, masked for MAE."""
    def __init__(self, objective, mask_ratio, decoder):
        super().__init__()
        self.student, self.teacher = objective.student, objective.teacher
        self.objective, self.mae = objective, MAE(objective.student, mask_ratio, decoder)

    def forward(self, *views):
        return self.objective(*views) | self.mae(*views)

def build(args):
    """The objective of --target. tinymim.build makes the networks and chooses the block."""
    if args.mask_ratio and args.target != "relation":
        raise UserError("--mask-ratio goes with --target relation")
    if args.target == "cls" and args.teacher_block:
        raise UserError("--target cls is of the teacher's last block: leave out --teacher-block")
    if args.target in ("cls", *FEATURES):
        args.relation_heads = 1  # tinymim.build asks for some, but these targets have none
    kind = LogitRelation if args.target == "logit" else TinyMIM
    if args.mask_ratio:
        kind = lambda *parts: MaskedRelation(*parts, mask_ratio=args.mask_ratio)
    objective = tinymim.build(args, kind)
    student, teacher, block = objective.student, objective.teacher, objective.teacher_block
    for layer in teacher.blocks:
        layer.drop_path.p = args.teacher_drop_path
    if args.target == "output" and not args.teacher_block:
        block = teacher.depth
    if args.target == "cls":
        objective = ClassToken(student, teacher)
    elif args.target in FEATURES:
        objective = Feature(student, teacher, args.target, block)
    if args.mae:
        objective = WithMAE(objective, args.mask_ratio or 0.75, args.decoder)
    if not isinstance(objective, TinyMIM):  # the others train the whole student
        student.config["relation_heads"] = 0  # distilled, and all of its last block is trained
    return objective

def main(argv=None):
    parser = tinymim.make_parser("extras/targets.py", __doc__, tinymim.RECIPE, teacher=True)
    add = parser.add_argument
    add("--target", choices=("relation", "logit", "cls", *FEATURES), default="relation")
    add("--mask-ratio", type=SHARE, default=0.0, help="of patches, for both networks (default: 0)")
    add("--mae", action="store_true", help="add MAE's loss, with 3/4 of the patches masked")
    add("--decoder", nargs=3, type=COUNT, default=[512, 8, 16], metavar="N", help="see mae.py")
    add("--teacher-drop-path", type=SHARE, default=0.0, help="0, the default, is best (Table 13)")
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"{args.student}-{args.target}")
    tinymim.run(parser, tinymim.train, args, build)

if __name__ == "__main__":
    main()
