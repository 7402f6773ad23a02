"""Fine-tune with DeiT-style distillation from a labelled network: the way to the paper's TinyMIM*-T (79.6%).

    python extras/finetune_distilled.py --star --checkpoint runs/tiny/last.pth --data /path/to/imagenet
    python extras/finetune_distilled.py --eval --checkpoint runs/distilled-tiny/best.pth --data /path/to/data

A distillation token joins the class token. The head on the class token learns the labels. The head on the
distillation token learns what the label teacher says of the very images that the student sees, MixUp and all.
At test their logits are averaged. Touvron et al., Training Data-Efficient Image Transformers, ICML 2021.

The authors published TinyMIM*-T's architecture, with its segmentation code, and its 1000 epochs, but not
which teacher it had, hard or soft labels, weights and rates. Our choice is DeiT's: RegNetY-16GF (with
torchvision's weights), hard labels, half the loss each; and the rates and augmentation of finetune.py.
Pre-train with tinymim.py --heads 12 for --star: otherwise the heads change between the two.
"""

import os
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

STAR = dict(heads=12, star_dim=1280)  # the width of the layer before the heads

class DistilledClassifier(Classifier):
    """A Classifier with a distillation token and two heads. Their mean is what it says, except in training.

    star_dim: the width of TinyMIM*-T's layer after the last block, LayerNorm → Linear → GELU, or 0: none.
    """
    def __init__(self, *args, star_dim=0, **options):
        super().__init__(*args, **options | dict(pool="token", probe=False))
        self.config |= dict(star_dim=star_dim)
        self.dist_token = nn.Parameter(0.02 * torch.randn(1, 1, self.dim))
        width = star_dim or self.dim
        if star_dim:
            self.pre_head = nn.Sequential(nn.Linear(self.dim, star_dim), nn.GELU())
            self.fc_norm = nn.LayerNorm(star_dim, eps=1e-6)
        self.head, self.head_dist = (nn.Linear(width, self.config["num_classes"]) for _ in range(2))
        for head in (self.head, self.head_dist):
            nn.init.trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)

    def embed(self, images):
        """Images (B, 3, H, W) to tokens (B, 1 + N, dim): class, distillation, patches."""
        x = super().embed(images)
        return torch.cat([x[:, :1], self.dist_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)

    def both(self, images):
        """The logits of the two heads, (B, num_classes) each."""
        x = ViT.forward(self, images)[:, :2]
        if self.config["star_dim"]:
            x = self.fc_norm(self.pre_head(x))
        return self.head(x[:, 0]), self.head_dist(x[:, 1])

    def forward(self, images):
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return sum(self.both(images)) / 2

class DistilledSupervised(Supervised):
    """(1 - alpha) times cross-entropy with the labels, and alpha times the other head's loss: cross-entropy
    with the teacher's most likely class or, with soft labels, DeiT's KL at a temperature."""
    def __init__(self, model, smoothing, freeze, teacher, alpha, soft, temperature):
        super().__init__(model, smoothing, freeze)
        self.teacher = teacher.requires_grad_(False)
        self.alpha, self.soft, self.temperature = alpha, soft, temperature

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # batch norms
        return self

    def forward(self, images, targets):
        with torch.no_grad():
            teacher = self.teacher(images).float()
        logits, dist_logits = (x.float() for x in self.model.both(images))
        labels = F.cross_entropy(logits, targets.float(), label_smoothing=self.smoothing)
        if self.soft:
            t = self.temperature
            student, teacher = F.log_softmax(dist_logits / t, dim=1), F.log_softmax(teacher / t, dim=1)
            distilled = F.kl_div(student, teacher, reduction="sum", log_target=True) * t * t / student.numel()
        else:
            distilled = F.cross_entropy(dist_logits, teacher.argmax(dim=1))
        return {"labels": (1 - self.alpha) * labels, "distilled": self.alpha * distilled}

def load_label_teacher(name, classes, img_size):
    """A network from images, normalised as ours, to logits of these classes: torchvision's model of that name
    with its published weights (classes are ImageNet's, in the order of its folders), or a checkpoint of
    finetune.py."""
    if name in torchvision.models.list_models(module=torchvision.models):
        try:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            teacher = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download the weights of {name} ({error})") from error
        known = len(weights.meta["categories"])
        if known != len(classes):
            raise UserError(f"{name} knows {known} classes, and the data has {len(classes)}")
        return teacher
    tensors, sizes, config = tinymim.read_checkpoint(name)
    if config.get("classes") != classes or "head_dist.weight" in tensors:
        raise UserError(f"{name} is neither a model of torchvision nor finetune.py's, of these classes")
    kind = {key: config[key] for key in ("num_classes", "pool", "probe")}
    teacher = Classifier(**sizes | {"img_size": img_size}, **kind)
    extra = {key: t for key, t in teacher.state_dict().items() if key.endswith("num_batches_tracked")}
    tinymim.load_weights(teacher, extra | tensors, name)
    return teacher

def build(args, classes=None):
    """See finetune.build."""
    if args.freeze:
        raise UserError("--freeze is for finetune.py: here both heads and what is before them learn")
    star = STAR if args.star and classes else {}
    args.heads = args.heads or star.get("heads")
    args.epochs = 1000 if args.star and args.epochs is None else args.epochs
    tensors, sizes, config = tinymim.read_checkpoint(args.checkpoint, args.heads)
    if classes and config.get("heads", sizes["heads"]) != sizes["heads"] and tinymim.RANK == 0:
        print(f"{args.checkpoint} learnt with {config['heads']} heads and goes on with {sizes['heads']}")
    finetune.fill_in_recipe(args, sizes["dim"])
    sizes["img_size"] = args.img_size or sizes["img_size"]
    if classes is None and "head_dist.weight" not in tensors:
        raise UserError(f"{args.checkpoint} has no distillation head: finetune.py --eval evaluates it")
    known = classes or config["classes"]
    star_dim = star.get("star_dim", 0) if classes else config["star_dim"]
    model = DistilledClassifier(**sizes, num_classes=len(known), star_dim=star_dim, drop_path=args.drop_path)
    model.config["classes"] = known
    new = ("head", "fc_norm", "pre_head", "dist_token") if classes else ()
    if classes and config.get("classes") != classes:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head")}
    initial = {name: t for name, t in model.state_dict().items() if name.startswith(new)}
    tinymim.load_weights(model, initial | tensors, args.checkpoint)
    return model

def train(args):
    teachers = []
    def build_with_teacher(args, classes=None):  # finetune.train lets one process build, and download, first
        model = build(args, classes)
        if classes:
            teachers.append(load_label_teacher(args.label_teacher, classes, model.img_size))
        return model

    def objective(model, smoothing, freeze):
        options = args.alpha, args.soft, args.temperature
        return DistilledSupervised(model, smoothing, freeze, *teachers, *options)

    finetune.train(args, build_with_teacher, objective)

def main(argv=None):
    parser = finetune.make_parser("extras/finetune_distilled.py", __doc__)
    add = parser.add_argument_group("distillation").add_argument
    add("--star", action="store_true", help="TinyMIM*-T's 12 heads and wide layer, 1000 epochs")
    add("--label-teacher", default="regnet_y_16gf", help="a model of torchvision, or a checkpoint of "
        "finetune.py (default: DeiT's, regnet_y_16gf)")
    add("--alpha", type=float, default=0.5, help="weight of the teacher's labels (default: 0.5)")
    add("--soft", action="store_true", help="soft labels; --hard is the default")
    add("--hard", action="store_false", dest="soft", help="the teacher's most likely class")
    add("--temperature", type=float, default=1.0, help="of soft labels (default: 1)")
    args = parser.parse_args(argv)
    name = tinymim.run_name(args.checkpoint)
    args.out = None if args.eval else args.out or os.path.join("runs", f"distilled-{name}")
    tinymim.run(parser, args, train)

if __name__ == "__main__":
    main()
