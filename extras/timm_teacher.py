"""Distil from a ViT of timm: DINOv2, DINOv3, CLIP, SigLIP, DeiT III, BEiT v2, EVA-02, ...

    python extras/timm_teacher.py --teacher vit_small_patch14_dinov2.lvd142m --student small \\
        --data FOLDER                   (--img-size 224: a fifth of the patches of its own 518)

Names of teachers: timm.list_models(pretrained=True). All but the teacher is as in tinymim.py.
"""

import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim
from tinymim import DEFAULTS, IMAGENET_MEAN, IMAGENET_STD, TEACHING, TinyMIM, UserError

try:
    import timm
    from timm.layers import Attention, AttentionRope
    from timm.models import beit, eva, vision_transformer as vit
except ImportError:
    sys.exit(f"timm is not installed here, or too old: {sys.executable} -m pip install -U timm")

BLOCKS = vit.Block, eva.EvaBlock, beit.Block  # others do not norm their input, or have no .attn
ATTENTIONS = Attention, AttentionRope, eva.EvaAttention, beit.Attention

def own_qkv(attention, x):
    """q, k and v that timm's attention makes of tokens x, (B, N, D) each: before Eva's rotation and
    BEiT's position bias, as a student has neither. But after the norm of q and k, where there is
    one: the model compares them normalised."""
    if attention.qkv is None:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    else:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # Eva and BEiT store three. k_bias is 0
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, v = nn.functional.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
    if hasattr(attention, "q_norm"):  # of each head; in most models an Identity
        q = attention.q_norm(q.unflatten(2, (attention.num_heads, -1))).flatten(2)
        k = attention.k_norm(k.unflatten(2, (attention.num_heads, -1))).flatten(2)
    return q, k, v

class TimmTeacher(nn.Module):
    """A ViT of timm. To images from tinymim.normalize it gives its own mean and deviation."""
    def __init__(self, model):
        super().__init__()
        self.model, self.depth = model, len(model.blocks)
        self.relation_heads = model.blocks[0].attn.num_heads
        self.dim = model.blocks[0].attn.proj.in_features  # of q, k and v
        mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
        self.register_buffer("scale", (torch.tensor(IMAGENET_STD) / std)[:, None, None])
        self.register_buffer("shift", ((torch.tensor(IMAGENET_MEAN) - mean) / std)[:, None, None])

    def end_at(self, block):
        """Make block number `block`, from 1, the last: later layers are dropped for good."""
        self.last, self.model.norm = self.model.blocks[block - 1], nn.Identity()
        self.model.blocks = self.model.blocks[:block - 1]

    def qkv(self, images):
        """q, k, v of that block, (B, N, dim) each: of the class token, if any, and the patches."""
        x = self.last.norm1(self.model.forward_features(images * self.scale + self.shift))
        class_tokens = int(self.model.cls_token is not None)  # registers follow it: left out
        x = torch.cat([x[:, :class_tokens], x[:, self.model.num_prefix_tokens:]], dim=1)
        return own_qkv(self.last.attn, x)

class TimmTinyMIM(TinyMIM):
    """TinyMIM. If the teacher has no class token (SigLIP), the student's enters no relation."""
    def __init__(self, student, teacher, *options):
        super().__init__(student, teacher, *options)
        teacher.end_at(self.teacher_block)

    def losses(self, student_images, teacher_images):
        with torch.no_grad():
            teacher_qkv = self.teacher.qkv(teacher_images)
        student_qkv = self.student.qkv_at(student_images, self.student.depth)
        if self.teacher.model.cls_token is None:
            student_qkv = [x[:, 1:] for x in student_qkv]
        return tinymim.relation_loss(student_qkv, teacher_qkv, self.relation_heads, self.pairs)

def build(args):
    with tinymim.explained(f"timm cannot make {args.teacher}", ": see timm.list_models(). Weights "
                           "come from huggingface.co into ~/.cache/huggingface (or HF_HOME)"):
        model = timm.create_model(args.teacher, not args.no_pretrained, img_size=args.img_size)
    if not isinstance(model, vit.VisionTransformer | eva.Eva | beit.Beit) or not all(
            isinstance(block, BLOCKS) and isinstance(block.attn, ATTENTIONS)
            and getattr(block.attn, "num_kv_groups", 1) == 1 for block in model.blocks):
        raise UserError(f"cannot take q, k and v from {args.teacher}: only a VisionTransformer, "
                        "Eva or Beit of timm will do, with plain blocks, keys as wide as queries")
    patches, teacher = model.patch_embed, TimmTeacher(model)
    if len({*patches.img_size}) > 1 or len({*patches.feat_ratio(as_scalar=False)}) > 1:
        raise UserError(f"{args.teacher} has images or patches that are not square: try --img-size")
    heads = args.relation_heads or teacher.relation_heads
    student = tinymim.new_student(args, patches.feat_ratio(), patches.img_size[0], heads)
    return TimmTinyMIM(student, teacher, args.teacher_block, heads, args.relations)

def main(argv=None):
    parser = tinymim.make_parser("extras/timm_teacher.py", __doc__, DEFAULTS | TEACHING,
                                 teacher=True, without=("teacher", "teacher_heads"))
    parser.add_argument("--teacher", required=True, metavar="NAME", help="a ViT of timm")
    parser.add_argument("--no-pretrained", action="store_true", help="for tests: random weights")
    args = parser.parse_args(argv)
    args.out = args.out or os.path.join("runs", f"timm-{args.student}")
    tinymim.run(parser, tinymim.train, args, build)
    if tinymim.RANK == 0:
        print(f"finished. Next: python finetune.py --checkpoint {args.out}/last.pth --data FOLDER")

if __name__ == "__main__":
    main()
