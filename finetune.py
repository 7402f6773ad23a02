"""Fine-tune a distilled student, or any ViT checkpoint, as a classifier, and evaluate it.

    python finetune.py --checkpoint runs/tiny-mae_base/last.pth --data /path/to/imagenet
    python finetune.py --checkpoint runs/finetune-tiny-mae_base/best.pth --data /path/to/imagenet --eval

--data holds train/ and val/, with a folder of images for each class. The recipe is that of MAE and TinyMIM. What it shares
with pre-training, the ViT, the data and the training loop, is imported from tinymim.py.

    1. Classifier         the ViT with a head, and what it starts from
    2. Data               augmentation: of images in the workers, of batches on the device
    3. Optimisation       layer-wise learning rates, the recipes
    4. Evaluation
    5. Training
    6. Command line       python finetune.py --help
"""

import os

import tinymim  # the first: it says what is not installed

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomErasing, v2
from torchvision.utils import save_image

from tinymim import STUDENTS, ImageDataset, Normalize, UserError, ViT, number

# ------------------------------------------------------------------------------------------------------------
# 1. Classifier.


class Classifier(ViT):
    """A ViT with a linear head on the mean of its patch tokens, or on its class token; parameters named as in timm and MAE.

    num_classes: outputs. drop_path: the rate of the last block, growing linearly from 0 at the first. cls_token: pool the
    class token after `norm`, instead of the mean before `fc_norm`. probe: put MAE's batch norm without weights before the
    head, for training the head alone. The other arguments are ViT's. Position embeddings are trained.
    """

    def __init__(self, dim, depth, heads, num_classes=1000, patch_size=16, img_size=224, drop_path=0.0, cls_token=False, probe=False):
        super().__init__(dim, depth, heads, patch_size, img_size, [drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.pos_embed.requires_grad_(True)
        self.pool_cls_token = cls_token
        if not cls_token:
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=1e-6)
        self.head_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if probe else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Images (B, 3, img_size, img_size) to logits (B, num_classes)."""
        tokens = super().forward(images)  # (B, 1+N, dim); where fc_norm is, norm does nothing
        pooled = tokens[:, 0] if self.pool_cls_token else self.fc_norm(tokens[:, 1:].mean(dim=1))
        return self.head(self.head_norm(pooled))


def load_weights(model, tensors, path):
    """Copy what fits of a checkpoint's tensors; returns the names the model has new, and those left out. Raises UserError.

    Position embeddings are interpolated to the model's grid.
    """
    grid = model.img_size // model.patch_size
    tensors = tensors | {"pos_embed": tinymim.resize_pos_embed(tensors["pos_embed"], grid)}
    own = model.state_dict()
    fitting = {name: t for name, t in tensors.items() if name in own and t.shape == own[name].shape}
    if not any(name.startswith("blocks.") for name in fitting):
        raise UserError(f"{path}: nothing in it fits a ViT of width {model.dim} with {model.depth} blocks")
    model.load_state_dict(fitting, strict=False)
    return [name for name in own if name not in fitting], [name for name in tensors if name not in fitting]


def build(args, machine, path, classes=None):
    """The classifier that a checkpoint is (classes None) or starts, or a new one (path "none"), and its config.

    classes: names of what it is to tell apart; a head for others is left out of the checkpoint. Fills in args with the recipe for
    its size. Raises UserError.
    """
    if path == "none":
        tensors, config = {}, {}
        sizes = dict(zip(("dim", "depth", "heads"), STUDENTS[args.student or "tiny"]), patch_size=16, img_size=224)
        sizes = {name: getattr(args, name) or size for name, size in sizes.items()}
    else:
        given = [name for name in ("student", "dim", "depth", "patch_size") if getattr(args, name)]
        if given and not args.resume:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --checkpoint none: {path} has its own", code=2)
        if path in tinymim.TEACHERS:
            path = tinymim.once_per_node(machine, lambda: tinymim.download(*tinymim.TEACHERS[path]))
        tensors, config, _ = tinymim.read_checkpoint(path)
        sizes = tinymim.architecture(tensors, config, path, args.heads, option="--heads")
        sizes["img_size"] = args.img_size or sizes["img_size"]
        if classes and config.get("class_names", classes) != classes:
            if args.resume:
                raise UserError(f"the run in {args.out} has other classes than --data")
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if classes:
        kind = dict(num_classes=len(classes), cls_token=args.cls_token, probe=args.freeze)
    else:
        if "head.weight" not in tensors:
            raise UserError(f"{path} has no head to evaluate: fine-tune it first")
        kind = dict(num_classes=len(tensors["head.weight"]), cls_token="norm.weight" in tensors, probe="head_norm.running_mean" in tensors)
    tinymim.fill_in(args, recipe(args, sizes["dim"]))
    tinymim.fill_in(args, dict(warmup_epochs=min(5, args.epochs / 20)))
    torch.manual_seed(args.seed)
    try:
        model = Classifier(**sizes, **kind, drop_path=args.drop_path)
    except ValueError as error:
        raise UserError(error, code=2) from error
    if tensors:
        new, left_out = load_weights(model, tensors, path)
        strange = [name for name in left_out if name.startswith("blocks.")]
        if strange:
            raise UserError(f"{path} is no plain ViT, it also has {strange[0]}")
        lacking = [name for name in new if name.startswith(("blocks.", "patch_embed.", "cls_token"))]
        if lacking:
            raise UserError(f"{path} is not whole, it lacks {lacking[0]}")
        if not classes and new:
            raise UserError(f"{path} lacks {groups_of(new)}: it cannot be evaluated")
        if machine.rank == 0 and (new or left_out):
            print(f"{path}: the classifier has new {groups_of(new)}; left out of the checkpoint: {groups_of(left_out)}")
    return model, sizes | kind | {"class_names": classes or config.get("class_names")}


def groups_of(names):
    """["head.weight", "head.bias", "norm.weight"] to "head, norm"."""
    return ", ".join(sorted({name.split(".")[0] for name in names})) or "nothing"


# ------------------------------------------------------------------------------------------------------------
# 2. Data.


def read_folder(folder):
    """A folder of class folders: (paths as an array of bytes, labels, class names). Raises UserError."""
    try:
        found = ImageFolder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
    if len(found.classes) < 2:
        raise UserError(f"{folder} has only the class {found.classes[0]}: there is nothing to tell apart")
    return np.array([os.fsencode(path) for path, _ in found.samples]), np.array(found.targets), found.classes


class Crop:
    """uint8 image (3, H, W) to an augmented crop of it, uint8 (3, img_size, img_size), and the box (top, left, height, width)
    that random erasing takes from it, or zeros. least: the smallest crop's share of the image. plain: only crop and flip."""

    def __init__(self, img_size, least=0.08, plain=False):
        self.plain = plain
        steps = [v2.RandomResizedCrop(img_size, scale=(least, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
                 v2.RandomHorizontalFlip()]
        if not plain:  # timm's rand-m9-mstd0.5-inc1: magnitude 9 of 10 is 27 of 30; the spread of 0.5 is left out
            gray = [round(255 * mean) for mean in tinymim.IMAGENET_MEAN]
            steps.append(v2.RandAugment(2, magnitude=27, num_magnitude_bins=31, interpolation=InterpolationMode.BILINEAR, fill=gray))
        self.augment = v2.Compose(steps)

    def __call__(self, image):
        crop, box = self.augment(image), [0, 0, 0, 0]
        if not self.plain and torch.rand(()) < 0.25:
            *box, _ = RandomErasing.get_params(crop, scale=(0.02, 1 / 3), ratio=(0.3, 10 / 3), value=[0.0])
            box = box if box[2] < crop.shape[1] else [0, 0, 0, 0]  # it found none that fits
        return crop, torch.tensor(box)


class CenterCrop:
    """uint8 image (3, H, W) to the middle of it, uint8 (3, img_size, img_size): 224 of 256 pixels, or in that proportion."""

    def __init__(self, img_size):
        resized = int(img_size * 256 / 224) if img_size <= 224 else img_size
        resize = v2.Resize(resized, interpolation=InterpolationMode.BICUBIC, antialias=True)
        self.crop = v2.Compose([resize, v2.CenterCrop(img_size)])

    def __call__(self, image):
        return (self.crop(image),)


class Augment(nn.Module):
    """A batch of crops, boxes and labels to what the network sees, (B, 3, H, W), and its targets, (B, num_classes)."""

    def __init__(self, num_classes, plain=False):
        super().__init__()
        self.normalize, self.num_classes, self.plain = Normalize(), num_classes, plain
        self.mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])

    def forward(self, crops, boxes, labels):
        images = self.normalize(crops / 255)
        if self.plain:
            return images, F.one_hot(labels, self.num_classes)
        top, left, height, width = boxes[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
        y = torch.arange(images.shape[2], device=images.device)[:, None]
        x = torch.arange(images.shape[3], device=images.device)
        erased = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)  # (B, 1, H, W)
        return self.mix(torch.where(erased, torch.randn_like(images), images), labels)


# ------------------------------------------------------------------------------------------------------------
# 3. Optimisation.

# Base is as its authors publish it, for batches of 1024 in all. For tiny and small nothing is published but "a higher learning
# rate and larger batch", so the rest is our choice: the learning rate doubled, no or less drop path, and lower layers that move
# more, since networks this small have nothing to spare; more epochs, since theirs are cheap. A new ViT has no pre-trained
# layers to protect, and needs longer. The linear probe is MAE's, except that SGD stands in for LARS.
RECIPES = {
    "tiny": dict(epochs=200, blr=1e-3, layer_decay=0.85, drop_path=0.0),
    "small": dict(epochs=200, blr=1e-3, layer_decay=0.75, drop_path=0.1),
    "base": dict(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.2),
    "none": dict(epochs=300, blr=5e-4, layer_decay=1.0, drop_path=0.1),
    "freeze": dict(epochs=90, blr=0.1, layer_decay=1.0, drop_path=0.0, weight_decay=0.0, min_lr=0.0, augment="crop"),
}


def recipe(args, dim):
    """The defaults for a ViT of width `dim`: those of the largest published size that is no wider, or of tiny."""
    if args.freeze:
        size = "freeze"
    elif args.checkpoint == "none":
        size = "none"
    else:
        size = "base" if dim >= 768 else "small" if dim >= 384 else "tiny"
    return dict(batch_size=128, weight_decay=0.05, min_lr=1e-6, augment="recipe") | RECIPES[size]


def parameter_groups(model, weight_decay, layer_decay):
    """The optimizer's groups, with `lr_scale`: layer_decay to the power of the layers above, counting the head; 1 for the head itself.

    Biases, norms, the class token and the position embeddings are not decayed.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = model.depth + 1  # fc_norm or norm, and the head
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        decay = 0.0 if parameter.ndim <= 1 or name in ("cls_token", "pos_embed") else weight_decay
        group = {"params": [], "lr_scale": layer_decay ** (model.depth + 1 - layer), "weight_decay": decay}
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


class Objective(nn.Module):
    """The classifier and its loss, in the shape train_epoch wants: images (B, 3, H, W), targets (B, num_classes) to {"loss"}."""

    def __init__(self, model, smoothing, frozen):
        super().__init__()
        self.model, self.smoothing = model, smoothing
        if frozen:
            model.requires_grad_(False)
            model.head.requires_grad_(True)

    def forward(self, images, targets):
        logits = self.model(images)
        return {"loss": F.cross_entropy(logits.float(), targets.float(), label_smoothing=self.smoothing)}


# ------------------------------------------------------------------------------------------------------------
# 4. Evaluation.


def make_eval_loader(paths, labels, img_size, args, machine):
    """This process's share of the images, none twice and none left out: resized, centre-cropped, uint8."""
    return DataLoader(ImageDataset(paths, CenterCrop(img_size), labels=labels), args.batch_size, num_workers=machine.workers,
                      sampler=[(0, i) for i in range(machine.rank, len(paths), machine.world)],
                      pin_memory=machine.device.type == "cuda", worker_init_fn=tinymim.stop_quietly)


@torch.no_grad()
def evaluate(model, loader, machine, columns=None):
    """Over all processes: {"top1", "top5": percent, "val_loss": mean cross-entropy, "right": how many, "images": of how many}.

    columns: the model's outputs for the labels 0, 1, ..., where these are not all its classes: it chooses among them. Files
    that cannot be decoded are named, and not counted. Leaves the model in eval mode. Raises UserError if none can be decoded.
    """
    model.eval()
    if machine.world > 1:
        for buffer in model.buffers():  # the probe's batch statistics: the same in every process
            dist.broadcast(buffer, 0)
    normalize, amp = Normalize().to(machine.device), machine.amp
    sums = torch.zeros(4, dtype=torch.float64, device=machine.device)
    for crops, labels, undecoded in loader:
        tinymim.stop_if_asked()
        if loader.dataset.report(undecoded[undecoded >= 0].tolist(), "it is not counted"):
            crops, labels = crops[undecoded < 0], labels[undecoded < 0]
            if not len(crops):
                continue
        crops, labels = (x.to(machine.device, non_blocking=True) for x in (crops, labels))
        with torch.autocast(machine.device.type, amp, enabled=amp != torch.float32):
            logits = model(normalize(crops / 255)).float()
        logits = logits if columns is None else logits[:, columns]
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([torch.ones_like(labels).sum(), right[:, 0].sum(), right.sum(), loss]).double()
    if machine.world > 1:
        dist.all_reduce(sums)
    images, top1, top5, loss = sums.tolist()
    if not images:
        raise UserError("none of the images to evaluate can be decoded")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "val_loss": loss / images, "right": int(top1), "images": int(images)}


def choose_columns(model_classes, folder_classes, num_classes, folder):
    """The model's outputs for the classes of a folder, or None for all in their order. Raises UserError.

    model_classes: the names of the model's outputs, or None if nobody knows them.
    """
    if model_classes is None:
        if len(folder_classes) != num_classes:
            raise UserError(f"{folder} has {len(folder_classes)} classes, the model {num_classes}, and nothing tells which is which: name "
                            f"with --class-names a folder that has a folder for each of the model's classes")
        return None  # in alphabetical order, as everybody has them
    if len(model_classes) != num_classes:
        raise UserError(f"--class-names gives {len(model_classes)} classes, the model has {num_classes}")
    unknown = [name for name in folder_classes if name not in model_classes]
    if unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise UserError(f"{folder} has the class {unknown[0]}{more} that the model does not")
    return None if folder_classes == model_classes else [model_classes.index(name) for name in folder_classes]


def run_evaluation(args, machine, folder):
    """--eval: print the accuracy of a checkpoint on folder/val if there is one, else on the class folders in `folder`.

    Raises UserError."""
    folder = os.path.join(folder, "val") if os.path.isdir(os.path.join(folder, "val")) else folder
    model, config = build(args, machine, args.checkpoint)
    paths, labels, classes = read_folder(folder)
    known = config["class_names"]
    if args.class_names:
        if not os.path.isdir(args.class_names):
            raise UserError(f"--class-names {args.class_names}: no such folder")
        known = sorted(entry.name for entry in os.scandir(args.class_names) if entry.is_dir())
    columns = choose_columns(known, classes, config["num_classes"], folder)
    columns = None if columns is None else torch.tensor(columns, device=machine.device)
    loader = make_eval_loader(paths, labels, model.img_size, args, machine)
    result = evaluate(model.to(machine.device), loader, machine, columns)
    if machine.rank == 0:
        print(f"{args.checkpoint} on {folder}: top-1 {result['top1']:.3f}%, top-5 {result['top5']:.3f}%, loss {result['val_loss']:.4f} "
              f"({result['right']} of {result['images']} right, {len(classes)} of the model's {config['num_classes']} classes)")


# ------------------------------------------------------------------------------------------------------------
# 5. Training.


def train(args):
    """Run what `args` (see make_parser) describe; leaves last.pth, best.pth, log.jsonl and augmented.png in args.out."""
    machine = tinymim.start(args)
    beginning = os.path.join(args.out, "last.pth") if args.resume else args.checkpoint
    tinymim.check_exists(beginning, besides=["none", *tinymim.TEACHERS])
    tinymim.check_exists(args.data, besides=["imagenette"])
    if not args.eval:
        lock = tinymim.claim(args, machine)  # noqa: F841, held as long as it is referred to
    folder = tinymim.once_per_node(machine, tinymim.imagenette) if args.data == "imagenette" else args.data
    if args.eval:
        return run_evaluation(args, machine, folder)
    if args.freeze and args.batch_size == 1:
        raise UserError("--freeze needs a --batch-size of 2 or more: its batch norm has nothing to normalise over in 1", code=2)
    for name in ("train", "val"):
        if not os.path.isdir(os.path.join(folder, name)):
            raise UserError(f"{folder} has no folder {name}: it needs train/ and val/, with a folder of images for each class")
    paths, labels, classes = read_folder(os.path.join(folder, "train"))
    val_paths, val_labels, val_classes = read_folder(os.path.join(folder, "val"))
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))[0]
        raise UserError(f"the classes in {folder}/train and {folder}/val differ: {odd} is only in one of them")

    model, config = build(args, machine, beginning, classes)
    dataset = ImageDataset(paths, Crop(model.img_size, args.crop_scale, plain=args.augment == "crop"), args.seed, labels)
    loader = tinymim.make_loader(dataset, args, machine)
    val_loader = make_eval_loader(val_paths, val_labels, model.img_size, args, machine)
    objective = Objective(model, 0.0 if args.augment == "crop" else 0.1, frozen=args.freeze).to(machine.device)
    augment = Augment(len(classes), plain=args.augment == "crop").to(machine.device)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    if args.freeze:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=machine.fused or None)
    if machine.rank == 0:
        draw_augmented(dataset, augment, os.path.join(args.out, "augmented.png"))
        print(f"layer decay {args.layer_decay}, drop path {args.drop_path}, {len(val_paths)} validation images")
        tinymim.print_plan(args, machine, f"{len(paths)} images of {len(classes)} classes in {folder}")
    top1 = tinymim.fit(objective, model, config, augment, loader, optimizer, args, machine,
                       after_epoch=lambda: evaluate(model, val_loader, machine))
    if machine.rank == 0:
        print(f"done: top-1 {top1:.2f}% at best, in {os.path.join(args.out, 'best.pth')}; the last epoch is in last.pth beside it")


def draw_augmented(dataset, augment, path, count=32):
    """Write a picture of a batch as the network sees it, colours in place again."""
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    device = augment.normalize.mean.device
    batch = torch.utils.data.default_collate([dataset[0, int(i)] for i in indices])
    images, _ = augment(*(x.to(device) for x in batch[:3]))
    images = (images * augment.normalize.std + augment.normalize.mean).clamp(0, 1).cpu()
    tinymim.replace_file(path, lambda file: save_image(images, file, format="png"))


# ------------------------------------------------------------------------------------------------------------
# 6. Command line.


def make_parser():
    """The command line's options; the recipe's values of those not given are in RECIPES."""
    parser = tinymim.Parser("finetune.py", "Fine-tune a ViT checkpoint as a classifier, and evaluate it.")
    add = parser.add_argument_group("start").add_argument
    add("--checkpoint", metavar="FILE|NAME|none",
        help=f"required, but for --resume: last.pth of tinymim.py, an MAE checkpoint, one of {', '.join(tinymim.TEACHERS)}, or none: "
        "train from scratch")
    add("--cls-token", action="store_true", help="classify the class token instead of the mean of the patch tokens")
    add("--freeze", action="store_true", help="train the head alone (linear probe)")
    tinymim.student_options(parser, of="the checkpoint", note="with --checkpoint none only; ")
    parser.set_defaults(student=None)
    add = parser.add_argument_group("data and evaluation").add_argument
    add("--data", default="imagenette", metavar="FOLDER",
        help="with train/ and val/, a folder of images for each class in both; default: Imagenette, downloaded once to data/")
    add("--augment", choices=("recipe", "crop"),
        help="recipe: MixUp, CutMix, RandAugment, random erasing, label smoothing; crop: random crops and flips only, for a "
        "linear probe, or few images or epochs; default: recipe, with --freeze crop")
    add("--crop-scale", type=number(float, 0, 1.001), default=0.08, metavar="P", help="the least area of a random crop; default: 0.08")
    add("--eval", action="store_true",
        help="only measure a fine-tuned --checkpoint, on --data FOLDER's val/ if it has one, else on FOLDER; if that has only some of the "
        "model's classes, among those")
    add("--class-names", metavar="FOLDER", help="where a checkpoint does not tell its classes: a folder that has one for each")
    tinymim.training_options(
        parser, epochs="base 100, tiny and small 200, from scratch 300, --freeze 90", warmup_epochs="5, at most a twentieth of --epochs",
        batch_size=128, blr="base and from scratch 5e-4, tiny and small 1e-3, --freeze 0.1", min_lr="1e-6, --freeze 0",
        weight_decay="0.05, --freeze 0", drop_path="base 0.2, small and from scratch 0.1, tiny and --freeze 0",
        layer_decay="base 0.65, small 0.75, tiny 0.85, else 1")
    return parser


def complete(args):
    """Name the run; the recipe is filled in when the size of the ViT is known."""
    if args.checkpoint is None and not (args.resume and args.out):
        raise UserError("--checkpoint is missing: what to fine-tune or evaluate, or none to train from scratch (--resume needs the "
                        "--out of the run alone)", code=2)
    start = tinymim.run_name(args.checkpoint) if args.checkpoint not in ("none", None) else args.student or "tiny"
    return f"{'scratch' if args.checkpoint == 'none' else 'probe' if args.freeze else 'finetune'}-{start}"


def main(argv=None):
    """python finetune.py, with the words of argv, or those of the command line."""
    tinymim.command_line(make_parser(), argv, complete, train)


if __name__ == "__main__":
    main()
