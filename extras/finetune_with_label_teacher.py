"""Fine-tune with DeiT-style distillation from a labelled network: towards the paper's TinyMIM*-T.

    python extras/finetune_with_label_teacher.py --star --checkpoint runs/tiny/last.pth --data DIR
    python extras/finetune_with_label_teacher.py --eval --checkpoint runs/tiny-distilled/best.pth

A distillation token joins the class token. The head on the class token learns the labels, that on
the distillation token what the label teacher says of the images that the student sees, MixUp and
all. At test their logits are averaged. Touvron et al., Training Data-Efficient Image Transformers.

Of TinyMIM*-T, 79.6% after 1000 epochs, the authors published the trunk and the wide layer after it
(with a LayerNorm of eps 1e-5, here 1e-6). Ours are what the heads read, where fc_norm stands, and
the heads' width: 8.3 M parameters, 5.8 M without the heads. Neither their teacher nor their loss
and rates are known. Ours: DeiT's RegNetY-16GF (with torchvision's weights), hard labels and half
the loss each, and the rates and augmentation of finetune.py. Pre-train with tinymim.py --heads 12
for --star: otherwise the heads change between the two.
"""

import functools
import os
import re
import sys

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import tinymim
from finetune import Classifier, Supervised
from tinymim import UserError, ViT

class DistilledClassifier(Classifier):
    """A Classifier with a distillation token and two heads, named as in timm. It says their mean.
    star_dim: the width of TinyMIM*-T's layer between last block and heads, or 0: none."""
    def __init__(self, *args, star_dim=0, **options):
        super().__init__(*args, **options)
        self.config |= dict(star_dim=star_dim)
        self.dist_token = nn.Parameter(0.02 * torch.randn(1, 1, self.dim))
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)  # a ViT's: no mean of patches comes before it
        self.pre_head, self.fc_norm = nn.Identity(), nn.Identity()
        if star_dim:
            self.pre_head = nn.Sequential(nn.Linear(self.dim, star_dim), nn.GELU())
            self.fc_norm = nn.LayerNorm(star_dim, eps=1e-6)
        sizes = star_dim or self.dim, self.config["num_classes"]
        self.head, self.head_dist = nn.Linear(*sizes), nn.Linear(*sizes)
        for head in (self.head, self.head_dist):
            nn.init.trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)

    def embed(self, images):
        """Images (B, 3, H, W) to tokens (B, 1 + N, dim): class, distillation, patches."""
        x = super().embed(images)
        return torch.cat([x[:, :1], self.dist_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)

    def both(self, images):
        """The logits of the two heads, (B, num_classes) each."""
        x = self.fc_norm(self.pre_head(ViT.forward(self, images)[:, :2]))
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def forward(self, images):
        return sum(self.both(images)) / 2

class DistilledSupervised(Supervised):
    """(1 - alpha) times cross-entropy with the labels, and alpha times the other head's loss:
    cross-entropy with the teacher's most likely class or, if soft, DeiT's KL at a temperature."""
    def __init__(self, model, teacher, args):
        super().__init__(model, args.augment)
        self.teacher = teacher.requires_grad_(False)
        self.alpha, self.soft, self.temperature = args.alpha, args.soft, args.temperature

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # its batch norms
        return self

    def losses(self, images, targets):
        with torch.no_grad():
            said = self.teacher(images).float()
        logits, dist_logits = (x.float() for x in self.student.both(images))
        labels = F.cross_entropy(logits, targets.float(), label_smoothing=self.smoothing)
        if self.soft:
            t = self.temperature
            said, predicted = F.log_softmax(said / t, dim=1), F.log_softmax(dist_logits / t, dim=1)
            kl = F.kl_div(predicted, said, reduction="sum", log_target=True)
            distilled = kl * t**2 / predicted.numel()
        else:
            distilled = F.cross_entropy(dist_logits, said.argmax(dim=1))
        return {"labels": (1 - self.alpha) * labels, "distilled": self.alpha * distilled}

def load_label_teacher(name, classes, img_size):
    """A network from images, normalised as ours, to logits of these classes: torchvision's of that
    name (its classes are ImageNet's, in the order of their folders), or finetune.py's."""
    if name in torchvision.models.list_models(module=torchvision.models):
        if len(classes) != 1000 or not re.fullmatch(r"n\d{8}", classes[0]):
            raise UserError(f"{name} knows ImageNet's 1000 classes, by folders such as n01440764: "
                            f"the data has {len(classes)}, the first is {classes[0]}")
        with tinymim.explained(f"cannot download the weights of {name}"):
            teacher = torchvision.models.get_model(name, weights="DEFAULT").eval()
        with tinymim.explained(f"{name} does not take images of {img_size} pixels"):
            teacher(torch.zeros(1, 3, img_size, img_size))
        return teacher
    tensors, sizes, config = tinymim.read_checkpoint(name)
    if config.get("classes") != classes or "head_dist.weight" in tensors:
        raise UserError(f"{name} is neither torchvision's nor finetune.py's of these classes")
    teacher = Classifier(**sizes | {"img_size": img_size}, num_classes=len(classes))
    tinymim.load_weights(teacher, tensors, name)
    return teacher

def build(args, checkpoint, classes):
    """The objective, in the place of finetune.build's."""
    heads, before = checkpoint[1]["heads"], checkpoint[2].get("heads")
    if before not in (None, heads) and tinymim.RANK == 0:
        print(f"{args.checkpoint} learnt with {before} heads and goes on with {heads}")
    kind = functools.partial(DistilledClassifier, star_dim=1280 if args.star else 0)
    new = ("head", "fc_norm", "pre_head", "dist_token")
    model = finetune.new_classifier(args, checkpoint, classes, kind, new)
    teacher = load_label_teacher(args.label_teacher, classes, model.img_size)
    return DistilledSupervised(model, teacher, args)

def load_classifier(args, checkpoint):
    """A fine-tuned classifier, with one head or two, and its classes in its config."""
    tensors, _, config = checkpoint
    if "head.weight" not in tensors:
        raise UserError(f"{args.checkpoint} has no head: fine-tune it first")
    known = config.get("classes") or []
    if known and args.class_names:
        raise UserError(f"{args.checkpoint} names its classes: leave out --class-names")
    classes = finetune.read_folder(args.class_names)[2] if args.class_names else known
    if len(classes) != len(tensors["head.weight"]):
        raise UserError(f"{args.checkpoint} has {len(tensors['head.weight'])} classes, of which "
                        f"{len(classes)} are known: --class-names FOLDER that has them all")
    kind = Classifier
    if "head_dist.weight" in tensors:
        star_dim = len(tensors.get("pre_head.0.bias", ()))
        kind = functools.partial(DistilledClassifier, star_dim=star_dim)
    return finetune.new_classifier(args, checkpoint, classes, kind, new=()).to(args.device)

def evaluate(args):
    """--eval, for one head or two."""
    checkpoint = finetune.settle(args)
    tinymim.resolve(args)
    tinymim.start_processes(args)
    finetune.print_accuracy(args, tinymim.by_options(load_classifier, args, checkpoint))

def main(argv=None):
    parser = finetune.make_parser("extras/finetune_with_label_teacher.py", __doc__)
    add = parser.add_argument
    add("--star", action="store_true", help="TinyMIM*-T's 12 heads and wide layer, 1000 epochs")
    add("--label-teacher", default="regnet_y_16gf", help="a model of torchvision (default: DeiT's, "
        "regnet_y_16gf), or a checkpoint of finetune.py")
    add("--alpha", type=tinymim.SHARE, default=0.5, help="the teacher's share (default: 0.5)")
    add("--soft", action="store_true", help="soft labels, not the teacher's most likely class")
    add("--temperature", type=tinymim.between(float, 0.01), default=1.0, help="of soft labels")
    add("--class-names", help="for --eval: folder of class folders, if the file does not tell them")
    args = finetune.parse(parser, argv, "-distilled", [*finetune.USED_BY_EVAL, "class_names"])
    if (args.temperature != 1 and not args.soft) or (args.class_names and not args.eval):
        parser.error("--temperature goes with --soft, and --class-names with --eval")
    if args.eval:
        return tinymim.run(parser, evaluate, args)
    if args.star:
        args.heads, args.epochs = args.heads or 12, args.epochs or 1000
    tinymim.run(parser, finetune.train, args, build)

if __name__ == "__main__":
    main()
