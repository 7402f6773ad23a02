"""Fine-tune a distilled student, or any ViT, as a classifier, and evaluate it.

    python finetune.py --checkpoint runs/tiny/last.pth --data FOLDER
    python finetune.py --checkpoint mae_base --data FOLDER
    python finetune.py --eval --checkpoint runs/tiny-finetuned/best.pth --data FOLDER

--data holds train/ and val/, both with a folder of images for each class. The ViT, the data set and
the training loop are those of tinymim.py. What fine-tuning adds is here: the classifier, its
augmentations (RandAugment as in timm), layer decay, and the recipes.
"""

import functools
import math
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

import tinymim
from tinymim import DTYPES, IMAGENET_MEAN, RANK, STUDENTS, WORLD, ImageDataset, UserError, ViT

# ---- 1. Classifier ------------------------------------------------------------------------------

class Classifier(ViT):
    """A ViT with a linear head on the mean of its patch tokens, named as in timm.

    drop_path: the rate of the last block. It grows linearly from 0 in the first, as in MAE.
    """
    def __init__(self, dim, depth, heads, num_classes=1000, patch_size=16, img_size=224,
                 drop_path=0.0):
        super().__init__(dim, depth, heads, patch_size, img_size)
        self.config |= dict(num_classes=num_classes)
        for i, block in enumerate(self.blocks):
            block.drop_path.p = drop_path * i / max(depth - 1, 1)
        self.pos_embed.requires_grad_(True)  # fixed in pre-training, learnt here, as in MAE
        self.norm = nn.Identity()  # the norm follows the mean instead
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        tokens = super().forward(images)  # (B, N, dim), the class token first
        return self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))

def new_classifier(args, checkpoint, classes, kind=Classifier, new=("head", "fc_norm")):
    """A classifier of these classes, initialised from what read_checkpoint() returned.

    new: parameters that need not be in the checkpoint. After distillation, what comes after the q,
    k and v of the last block starts untrained, too.
    """
    tensors, sizes, config = checkpoint
    model = kind(**sizes, num_classes=len(classes), drop_path=args.drop_path)
    kept = {name: config.get(name) for name in ("relation_heads", "pretraining")}
    model.config |= dict(classes=classes, **kept)  # how it was pre-trained
    fresh = {name: t for name, t in model.state_dict().items() if name.startswith(new)}
    # Keep an old head only if its classes are the same, and the norm before it is there, too.
    keep = config.get("classes") == classes and fresh.keys() <= tensors.keys()
    fresh_head = {name: t for name, t in fresh.items() if name.startswith("head") and not keep}
    if tensors:
        tinymim.load_weights(model, fresh | tensors | fresh_head, args.checkpoint)
    return model

class Supervised(nn.Module):
    """The objective: uint8 crops (B, 3, H, W) and labels (B,) to {"loss": cross-entropy}."""
    def __init__(self, model, augment):
        super().__init__()
        self.student, self.smoothing = model, AUGMENTATIONS[augment]["smoothing"]
        self.augment = Augment(model.config["num_classes"], augment)

    def forward(self, crops, labels):
        return self.losses(*self.augment(crops, labels))

    def losses(self, images, targets):  # (B, 3, H, W), (B, num_classes)
        logits = self.student(images).float()
        return {"loss": F.cross_entropy(logits, targets.float(), label_smoothing=self.smoothing)}

# ---- 2. Augmentation ----------------------------------------------------------------------------

AUGMENTATIONS = {
    # timm's rand-m9-mstd0.5-inc1, mixup and cutmix: MAE's and the authors' for ViT-B.
    "strong": dict(randaugment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
    # MAE-Lite's for ViT-T and S: such small networks underfit strongly augmented images.
    "light": dict(randaugment=10, erasing=0.0, mixup=0.2, cutmix=0.0, smoothing=0.0),
    # Crops and flips only: for few or small images.
    "crop": dict(randaugment=None, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0),
}
BICUBIC, GRAY = InterpolationMode.BICUBIC, [round(255 * mean) for mean in IMAGENET_MEAN]

def warp(image, shear_x=0, shear_y=0, shift_x=0, shift_y=0):
    """Shear a Pillow image about its top left corner, or shift it by a share of its size."""
    pixels = [shift_x * image.width, shift_y * image.height]
    degrees = [math.degrees(math.atan(slope)) for slope in (shear_x, shear_y)]
    return TF.affine(image, 0, pixels, 1, degrees, BICUBIC, GRAY, center=[0, 0])

def point(image, change):  # each value i of its colours, 0 to 255, becomes change(i)
    return image.point([change(i) for i in range(256)] * 3)

def factor(m):  # of colour, contrast, brightness and sharpness: 1 changes nothing
    return max(0.1, 1 + 0.9 * m)

# timm's operations, on a Pillow image. m: a tenth of the magnitude, with a random sign.
OPERATIONS = {
    "AutoContrast": lambda image, m: TF.autocontrast(image),
    "Equalize": lambda image, m: TF.equalize(image),
    "Invert": lambda image, m: TF.invert(image),
    "Rotate": lambda image, m: TF.rotate(image, 30 * m, BICUBIC, fill=GRAY),  # degrees
    "Posterize": lambda image, m: point(image, lambda i: i - i % 2 ** (4 + int(4 * abs(m)))),
    "Solarize": lambda image, m: TF.solarize(image, 256 - int(256 * abs(m))),  # the threshold
    "SolarizeAdd": lambda image, m: point(
        image, lambda i: min(255, i + int(110 * abs(m))) if i < 128 else i),
    "Color": lambda image, m: TF.adjust_saturation(image, factor(m)),
    "Contrast": lambda image, m: TF.adjust_contrast(image, factor(m)),
    "Brightness": lambda image, m: TF.adjust_brightness(image, factor(m)),
    "Sharpness": lambda image, m: TF.adjust_sharpness(image, factor(m)),
    "ShearX": lambda image, m: warp(image, shear_x=0.3 * m),
    "ShearY": lambda image, m: warp(image, shear_y=0.3 * m),
    "TranslateX": lambda image, m: warp(image, shift_x=0.45 * m),
    "TranslateY": lambda image, m: warp(image, shift_y=0.45 * m),
}

def rand_augment(image, magnitude):
    """timm's rand-mX-mstd0.5-inc1, X the magnitude: two operations, each with probability 1/2."""
    for number in torch.randint(len(OPERATIONS), (2,)):
        applied, negative = torch.rand(2) < 0.5
        m = (magnitude + 0.5 * torch.randn(())).clamp(0, 10).item() / 10
        if applied:
            image = list(OPERATIONS.values())[number](image, -m if negative else m)
    return image

def read_folder(folder):
    """A folder of class folders to (paths, an array of bytes; labels; names of the classes)."""
    folders = next(os.walk(folder), (folder, []))[1]  # none, if there is no such folder
    classes = sorted(name for name in folders if not name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder} should hold a folder of images for each class, two at least")
    paths = [tinymim.find_images(os.path.join(folder, name)) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in paths])
    return np.concatenate(paths), labels, classes

def train_transform(img_size, crop_scale, augment):
    """uint8 image (3, H, W) to an augmented crop, uint8 (3, img_size, img_size)."""
    steps = [v2.RandomResizedCrop(img_size, (crop_scale, 1.0), interpolation=BICUBIC),
             v2.RandomHorizontalFlip()]
    magnitude = AUGMENTATIONS[augment]["randaugment"]
    if magnitude:
        change = functools.partial(rand_augment, magnitude=magnitude)  # unlike a lambda, it pickles
        steps += [v2.ToPILImage(), v2.Lambda(change), v2.PILToTensor()]
    return v2.Compose(steps)

def eval_transform(img_size):
    """uint8 image to its middle, uint8 (3, img_size, img_size): 7/8 of its shorter side. Networks
    for more than 224 pixels see all of that side, as in MAE."""
    side = int(img_size * 256 / 224) if img_size <= 224 else img_size
    return v2.Compose([v2.Resize(side, interpolation=BICUBIC), v2.CenterCrop(img_size)])

class Augment:
    """uint8 crops (B, 3, H, W) and labels (B,) to images (B, 3, H, W), targets (B, num_classes)."""
    def __init__(self, num_classes, augment):
        chosen = AUGMENTATIONS[augment]
        self.num_classes = num_classes
        self.erase = v2.RandomErasing(chosen["erasing"], scale=(0.02, 1 / 3), value="random")
        kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        self.mixes = [kind(alpha=chosen[name], num_classes=num_classes)
                      for name, kind in kinds.items() if chosen[name]]

    @torch.compiler.disable  # it decides image by image
    def __call__(self, crops, labels):
        images = tinymim.normalize(crops / 255)
        if self.erase.p:
            images = torch.stack([self.erase(image) for image in images])
        if self.mixes:
            return v2.RandomChoice(self.mixes)(images, labels)
        return images, F.one_hot(labels, self.num_classes)

# ---- 3. Optimisation ----------------------------------------------------------------------------

RECIPES = {  # by the smallest width that they are for
    # MAE-Lite's for ViT-T and S. The authors say only that theirs have "a higher learning rate
    # and larger batch size".
    0: dict(epochs=300, blr=1e-3, layer_decay=0.85, drop_path=0.0, augment="light"),
    384: dict(epochs=300, blr=1e-3, layer_decay=0.75, drop_path=0.0, augment="light"),
    # The authors' for TinyMIM-B. MAE's own ViT-B has 0.1, see settle().
    768: dict(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.2),
    # MAE's for ViT-L. (For its ViT-H it has a drop path of 0.3.)
    1024: dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
}
DEFAULTS = dict(batch_size=128, weight_decay=0.05, min_lr=1e-6, augment="strong")

def settle(args):
    """Read --checkpoint, and give the options that are None the values of its recipe. Returns what
    read_checkpoint() does, with the sizes that --dim and the like override."""
    if args.checkpoint == "none":
        tensors, config = {}, {}
        sizes = dict(zip(("dim", "depth", "heads"), STUDENTS[args.student or "tiny"]),
                     patch_size=16, img_size=224)
    elif args.student:
        raise UserError("--student goes with --checkpoint none: a checkpoint has its own size")
    else:
        tensors, sizes, config = tinymim.read_checkpoint(args.checkpoint, args.heads)
    for name in sizes:
        sizes[name] = getattr(args, name) or sizes[name]
    dim = sizes["dim"]
    recipe = DEFAULTS | RECIPES[max(width for width in RECIPES if width <= dim)]
    if args.checkpoint == "none":
        recipe["layer_decay"] = 1  # there is nothing to preserve in early layers
    elif dim == 768 and config.get("pretraining") in (None, "MAE"):
        recipe["drop_path"] = 0.1
    for option, value in recipe.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.warmup_epochs is None:
        # MAE's: 5 epochs of 50 for ViT-L, of 100 for ViT-B.
        args.warmup_epochs = min(5, args.epochs / (10 if dim >= 1024 else 20))
    return tensors, sizes, config

def parameter_groups(model, weight_decay, layer_decay):
    """AdamW's groups. A layer's rate (lr_scale) is layer_decay times that of the layer above it.
    Biases, norms, the class token and the position embeddings are not decayed."""
    groups, top = {}, model.depth + 1
    for name, parameter in model.named_parameters():
        layer = top  # the head, and the norm before it
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "dist_token", "pos_embed", "patch_embed")):
            layer = 0
        plain = parameter.ndim <= 1 or name.endswith(("_token", "pos_embed"))
        decay = 0.0 if plain else weight_decay
        group = dict(params=[], weight_decay=decay, lr_scale=layer_decay ** (top - layer))
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())

# ---- 4. Evaluation ------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, paths, labels, args, transform=None):
    """{"top1": percent, "val_loss": mean cross-entropy} of images (default: their middles)."""
    model.eval()
    dataset = ImageDataset(paths, transform or eval_transform(model.img_size), labels=labels)
    # Each process takes its share: no image is left out, and none counts twice.
    loader = DataLoader(dataset, args.batch_size, sampler=range(RANK, len(paths), WORLD),
                        num_workers=args.workers, pin_memory=args.device == "cuda")
    sums = torch.zeros(2, device=args.device)
    for batch in loader:
        crops, targets = (tensor.to(args.device, non_blocking=True) for tensor in batch)
        with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
            logits = model(tinymim.normalize(crops / 255)).float()
        right = (logits.argmax(1) == targets).sum()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([right, loss])
    if WORLD > 1:
        dist.all_reduce(sums)
    top1, loss = (sums / len(paths)).tolist()
    if not math.isfinite(loss):  # argmax takes NaN for the first class
        raise FloatingPointError(f"the loss on {len(paths)} images is {loss}")
    return {"top1": 100 * top1, "val_loss": loss}

def print_accuracy(args, model):
    """--eval: the accuracy on --data's val/, or on the class folders in --data itself."""
    folder = tinymim.image_folder(args.data, "val")
    paths, labels, classes = read_folder(folder)
    if classes != model.config["classes"]:
        raise UserError(f"{folder} has other classes than {args.checkpoint}. If it has some of "
                        "them, as ImageNet-R does: extras/robustness.py")
    result = evaluate(model.to(args.device), paths, labels, args)
    if RANK == 0:
        print(f"{args.checkpoint} on the {len(paths)} images in {folder}: "
              f"top-1 {result['top1']:.3f}%, loss {result['val_loss']:.4f}")

# ---- 5. Training and command line ---------------------------------------------------------------

def build(args, checkpoint, classes):
    return Supervised(new_classifier(args, checkpoint, classes), args.augment)

def train(args, build_objective=build):
    """Fine-tune, or with --eval only evaluate."""
    checkpoint = settle(args)
    tinymim.resolve(args)
    tinymim.start_processes(args)
    if args.eval:
        tensors, sizes, config = checkpoint
        if "head.weight" not in tensors or "head_dist.weight" in tensors:
            raise UserError(f"{args.checkpoint} needs exactly one head: fine-tune it first. If it "
                            "has two, extras/finetune_with_label_teacher.py evaluates it")
        classes = config.get("classes")
        if not classes:  # as in MAE's fine-tuned checkpoints
            classes = read_folder(tinymim.image_folder(args.data, "val"))[2]
            print(f"{args.checkpoint} does not name its classes: taken from --data, sorted by name")
        model = tinymim.by_options(new_classifier, args, checkpoint, classes, Classifier, ())
        return print_accuracy(args, model)
    folder = tinymim.image_folder(args.data)
    paths, labels, classes = read_folder(os.path.join(folder, "train"))
    val_paths, val_labels, val_classes = read_folder(os.path.join(folder, "val"))
    if classes != val_classes:
        raise UserError(f"only one of {folder}/train and val has the classes "
                        f"{set(classes) ^ set(val_classes)!s:.80}")
    objective = tinymim.by_options(build_objective, args, checkpoint, classes).to(args.device)
    model = objective.student
    dataset = ImageDataset(
        paths, train_transform(model.img_size, args.crop_scale, args.augment), args.seed, labels)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)

    def evaluate_epoch(epoch):
        due = epoch % args.eval_every == 0 or epoch == args.epochs
        return evaluate(model, val_paths, val_labels, args) if due else {}

    evaluate_epoch(args.epochs)  # finds broken files now, not after an epoch
    optimizer = torch.optim.AdamW(groups, fused=args.device == "cuda")
    args.val_images = len(val_paths)  # --resume compares it
    tinymim.fit(objective, dataset, optimizer, args, evaluate_epoch)

def make_parser(prog, doc, **defaults):
    """The options of fine-tuning. Those without a default follow the recipe."""
    usual = {name: tinymim.DEFAULTS[name] for name in ("data", "device", "amp", "seed", "accum")}
    usual |= dict(crop_scale=0.08, eval_every=1, min_lr=None)
    parser = tinymim.make_parser(prog, doc, usual | defaults)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a file, mae_base..., or none: train from scratch")
    add("--layer-decay", type=tinymim.SHARE, help="a layer's rate, as a share of that above it")
    add("--patch-size", type=tinymim.COUNT, help="in pixels, with --checkpoint none")
    add("--augment", choices=AUGMENTATIONS, help="crop: only crops and flips, for few images")
    add("--crop-scale", type=tinymim.between(float, 0.01, 1), help="smallest crop")
    add("--eval-every", type=tinymim.COUNT, help="epochs between evaluations")
    add("--eval", action="store_true", help="only evaluate a fine-tuned checkpoint on --data")
    return parser

USED_BY_EVAL = "eval checkpoint data img_size heads batch_size workers device amp".split()

def parse(parser, argv, suffix, used=USED_BY_EVAL):
    """The options, with the run's folder: --out, or the checkpoint's and a suffix. --eval saves
    nothing, and other options than those that it uses are a mistake."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items() if args.eval else ():
        if name not in used and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect with --eval")
    folder = os.path.dirname(os.path.normpath(args.checkpoint)) or f"runs/{args.checkpoint}"
    args.out = None if args.eval else args.out or folder + suffix
    return args

def main(argv=None):
    parser = make_parser("finetune.py", __doc__)
    args = parse(parser, argv, "-finetuned")
    tinymim.run(parser, train, args)
    if RANK == 0 and not args.eval:
        print(f"finished. Next: python finetune.py --eval --checkpoint {args.out}/best.pth "
              f"--data {args.data}")

if __name__ == "__main__":
    main()
