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
from torchvision.ops import StochasticDepth, stochastic_depth

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from mae import MAE, pick, random_mask
from tinymim import COUNT, SHARE, TinyMIM, UserError, split_heads

RELATIONS = ("relation", "logit")
FEATURES = ("output", "attention", "attention-after", "ffn", "ffn-after", "qkv")

def logits(a, b, relation_heads):
    """tinymim.log_relation without its softmax: (B, h, N, N)."""
    with torch.autocast(a.device.type, enabled=False):  # in float32, as there
        a, b = (split_heads(x.float(), relation_heads) for x in (a, b))
        return a @ b.transpose(2, 3) / math.sqrt(a.shape[-1])

class LogitRelation(TinyMIM):
    """Relations without softmax. The paper does not tell the loss: here squared error."""
    def losses(self, student_images, teacher_images):
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
        self.patches, self.mask_ratio = self.student.grid**2, mask_ratio
        if int(self.patches * (1 - mask_ratio)) < 1:
            raise ValueError(f"a mask ratio of {mask_ratio} leaves no relations to see")

    def losses(self, student_images, teacher_images):
        noise = torch.rand(len(student_images), self.patches, device=student_images.device)
        keep, _ = random_mask(noise, self.mask_ratio)
        with torch.no_grad():
            teacher_qkv = visible_qkv(self.teacher, teacher_images, self.teacher_block, keep)
        student_qkv = visible_qkv(self.student, student_images, self.student.depth, keep)
        return tinymim.relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

def visible_qkv(vit, images, block, keep):
    """ViT.qkv_at of the class token and the patches `keep` (B, n): (B, 1 + n, dim) each."""
    x = vit.blocks[:block - 1](pick(vit.embed(images), keep))
    return vit.blocks[block - 1].qkv(x)

def features(vit, images, block):
    """All features of block number `block`, from 1, (B, N, dim) each, "qkv" (B, N, 3 * dim).
    attention, ffn: what a branch adds to the tokens. -after: the tokens with it."""
    x = vit.blocks[:block - 1](vit.embed(images))
    chosen = vit.blocks[block - 1]
    attention = chosen.attn(chosen.norm1(x))
    ffn = chosen.mlp(chosen.norm2(x + attention))
    output = x + attention + ffn
    return {"output": output, "attention": attention, "attention-after": x + attention, "ffn": ffn,
            "ffn-after": output, "qkv": torch.cat(chosen.qkv(x), dim=-1)}

class Feature(nn.Module):
    """Smooth-L1 (beta 2) between a linear map of the student's output and a feature of the teacher,
    normalised by a LayerNorm without weights (q, k and v each by itself)."""
    def __init__(self, student, teacher, name="output", block=None):
        super().__init__()
        if block is None:  # as in TinyMIM, but the output is the last block's
            at_end = name == "output" or student.depth == teacher.depth
            block = math.ceil(teacher.depth * (1 if at_end else 0.75))
        if not 1 <= block <= teacher.depth:
            raise ValueError(f"the teacher has no block {block}: 1 to {teacher.depth}")
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.name, self.block, self.parts = name, block, 3 if name == "qkv" else 1
        self.map = nn.Linear(student.dim, self.parts * teacher.dim)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, crops):
        return self.losses(*tinymim.two_views(crops))

    def losses(self, student_images, teacher_images):
        with torch.no_grad():
            target = features(self.teacher, teacher_images, self.block)[self.name].float()
            target = target.unflatten(2, (self.parts, -1))
            target = F.layer_norm(target, target.shape[-1:]).flatten(2)
        predicted = self.map(self.student(student_images)).float()
        return {"feature": F.smooth_l1_loss(predicted, target, beta=2.0)}

class ClassToken(Feature):
    """KL(teacher's class token || student's), after the last norm, as distributions over channels.
    The paper does not tell how the widths come together: here by a linear map of the student's."""
    def losses(self, student_images, teacher_images):
        with torch.no_grad():
            target = F.log_softmax(self.teacher(teacher_images)[:, 0].float(), dim=-1)
        predicted = F.log_softmax(self.map(self.student(student_images)[:, 0]).float(), dim=-1)
        return {"cls": F.kl_div(predicted, target, reduction="batchmean", log_target=True)}

class WithMAE(MAE):
    """MAE's objective and another one, of one student. It sees each image twice, masked for MAE."""
    def __init__(self, objective, mask_ratio, decoder):
        super().__init__(objective.student, mask_ratio, decoder)
        self.teacher = objective.teacher
        self.objective = objective  # after the teacher: its train() puts that in eval mode again
        for layer in (self.student.blocks, self.student.norm):  # also what TinyMIM has frozen
            layer.requires_grad_(True)

    def forward(self, crops):
        return self.objective(crops) | super().forward(crops)

class TeacherDropPath(StochasticDepth):
    """For a teacher, which is always in eval mode: it acts all the same."""
    def forward(self, x):
        return stochastic_depth(x, self.p, self.mode, training=True)

def build(args):
    """The objective of --target."""
    teacher = tinymim.load_teacher(args.teacher, args.img_size, args.teacher_heads)
    for block in teacher.blocks if args.teacher_drop_path else ():
        block.drop_path = TeacherDropPath(args.teacher_drop_path, "row")
    relational = args.target in RELATIONS
    heads = (args.relation_heads or teacher.relation_heads) if relational else None
    student = tinymim.new_student(args, teacher.config["patch_size"], teacher.img_size, heads)
    relations = student, teacher, args.teacher_block, heads, args.relations
    if args.target == "cls" and teacher.norm is None:
        raise UserError(f"{args.teacher} has no norm after its last block: no --target cls")
    untrained = teacher.config["relation_heads"] and teacher.pretraining != "WithMAE"
    if untrained and args.target not in (*RELATIONS, "qkv"):
        raise UserError(f"{args.teacher} was distilled by relations, which leave the end of its "
                        f"last block untrained: no --target {args.target}")
    if args.target == "cls":
        objective = ClassToken(student, teacher)
    elif args.target in FEATURES:
        objective = Feature(student, teacher, args.target, args.teacher_block)
    elif args.target == "logit":
        objective = LogitRelation(*relations)
    elif args.mask_ratio:
        objective = MaskedRelation(*relations, mask_ratio=args.mask_ratio)
    else:
        objective = TinyMIM(*relations)
    return WithMAE(objective, args.mask_ratio or 0.75, args.decoder) if args.mae else objective

def main(argv=None):
    defaults = tinymim.DEFAULTS | tinymim.TEACHING
    parser = tinymim.make_parser("extras/targets.py", __doc__, defaults, teacher=True)
    add = parser.add_argument
    add("--target", choices=(*RELATIONS, "cls", *FEATURES), default="relation")
    add("--mask-ratio", type=SHARE, default=0.0, help="of patches, for both networks (default: 0)")
    add("--mae", action="store_true", help="add MAE's loss, with 3/4 of the patches masked")
    add("--decoder", nargs=3, type=COUNT, default=[512, 8, 16], metavar="N", help="see mae.py")
    add("--teacher-drop-path", type=tinymim.between(float, 0, 0.99), default=0.0,
        help="0, the default, is best (Table 13)")
    args = parser.parse_args(argv)
    relational = args.target in RELATIONS
    has_effect = dict(relations=relational, relation_heads=relational, decoder=args.mae,
                      teacher_block=args.target != "cls", mask_ratio=args.target == "relation")
    for name, used in has_effect.items():
        if not used and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect with these other options")
    args.out = args.out or os.path.join("runs", f"{args.student}-{args.target}")
    tinymim.run(parser, tinymim.train, args, build)

if __name__ == "__main__":
    main()
