"""Fine-tune a distilled student, or any ViT, as a classifier, and evaluate it.

    python finetune.py --checkpoint runs/tiny-mae_base/last.pth --data FOLDER
    python finetune.py --checkpoint mae_base --freeze --data FOLDER
    python finetune.py --eval --checkpoint runs/finetune-tiny-mae_base/best.pth

--data holds train/ and val/, both with a folder of images for each class. RECIPES says whose the recipes are.
The ViT, the data set and the training loop are those of tinymim.py.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import save_image

import tinymim
from tinymim import DTYPES, IMAGENET_MEAN, LOCAL_RANK, RANK, STUDENTS, WORLD, ImageDataset, UserError, ViT

# ---- 1. Classifier -----------------------------------------------------------------------------------------

class Classifier(ViT):
    """A ViT and a linear head, on the mean of the patch tokens or on the class token, named as in timm.

    drop_path: the rate of the last block; it grows linearly from 0 in the first. pool: "avg" or "token".
    probe: MAE's linear probe, with a batch norm without weights before the head.
    """
    def __init__(self, dim, depth, heads, num_classes=1000, patch_size=16, img_size=224, drop_path=0.0,
                 pool="avg", probe=False):
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(dim, depth, heads, patch_size, img_size, rates)
        self.config |= dict(num_classes=num_classes, pool=pool, probe=probe)
        self.pos_embed.requires_grad_(True)  # fixed in pre-training, learnt here, as in MAE
        if pool == "avg":  # the norm follows the mean instead
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=1e-6)
        self.head_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if probe else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01 if probe else 2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        tokens = super().forward(images)  # (B, N, dim), the class token first
        pooled = self.fc_norm(tokens[:, 1:].mean(dim=1)) if self.config["pool"] == "avg" else tokens[:, 0]
        return self.head(self.head_norm(pooled))

def build(args, classes=None):
    """A classifier of these classes, initialised from --checkpoint; without classes, the checkpoint's own.

    After distillation these start untrained: the head, the norm before it (fc_norm), and what was frozen, the
    student's last block after its qkv.
    """
    tensors, config = {}, {}
    sizes = dict(zip(("dim", "depth", "heads"), STUDENTS[args.student]))
    if args.checkpoint != "none":
        tensors, sizes, config = tinymim.read_checkpoint(args.checkpoint, args.heads)
    for name in ("dim", "depth", "heads", "patch_size", "img_size"):
        sizes[name] = getattr(args, name) or sizes.get(name) or {"patch_size": 16, "img_size": 224}[name]
    fill_in_recipe(args, sizes["dim"])
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be 1 at least")
    if classes:
        kind = dict(num_classes=len(classes), pool=args.pool, probe=args.freeze)
        if config.get("classes") != classes:
            tensors = {name: t for name, t in tensors.items() if not name.startswith("head")}
    elif "head_dist.weight" in tensors:
        raise UserError(f"{args.checkpoint} has two heads: extras/finetune_distilled.py --eval evaluates it")
    elif "head.weight" in tensors:  # by its names: MAE's own checkpoints have no config
        kind = dict(num_classes=len(tensors["head.weight"]), probe="head_norm.running_mean" in tensors,
                    pool="token" if "norm.weight" in tensors else "avg")
    else:
        raise UserError(f"{args.checkpoint} has no head to evaluate: fine-tune it first")
    model = Classifier(**sizes, **kind, drop_path=args.drop_path)
    model.config["classes"] = classes or config.get("classes")
    if tensors:
        # num_batches_tracked is an integer, which read_checkpoint leaves out.
        new = ("head", "fc_norm") if classes else "head_norm.num_batches_tracked"
        initial = {name: t for name, t in model.state_dict().items() if name.startswith(new)}
        tinymim.load_weights(model, initial | tensors, args.checkpoint)
    return model

class Supervised(nn.Module):
    """The objective: images (B, 3, H, W) and soft targets (B, num_classes) to {"loss": cross-entropy}."""
    def __init__(self, model, smoothing, freeze):
        super().__init__()
        self.model, self.smoothing = model, smoothing
        if freeze:
            model.requires_grad_(False)
            model.head.requires_grad_(True)

    def forward(self, images, targets):
        logits = self.model(images).float()
        return {"loss": F.cross_entropy(logits, targets.float(), label_smoothing=self.smoothing)}

# ---- 2. Data: crops and RandAugment image by image in the workers, the rest on the device. -----------------

AUGMENTATIONS = {
    # timm's rand-m9-mstd0.5-inc1, mixup and cutmix, as in MAE and TinyMIM.
    "strong": dict(randaugment=27, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1),
    # What MAE-Lite found good for ViT-Tiny: a network this small underfits strongly augmented images.
    "light": dict(randaugment=30, erasing=0.0, mixup=0.2, cutmix=0.0, smoothing=0.0),
    # Crops and flips only: for linear probes, and few or small images.
    "crop": dict(randaugment=0, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0),
}

def read_folder(folder):
    """A folder of class folders to (paths, an array of bytes; labels; names of the classes)."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folder} should hold a folder of images for each class, two at least")
    paths = [tinymim.find_images(os.path.join(folder, name)) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in paths])
    return np.concatenate(paths), labels, classes

def train_transform(img_size, crop_scale, augment):
    """uint8 image (3, H, W) to an augmented crop, uint8 (3, img_size, img_size)."""
    bicubic = InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(img_size, (crop_scale, 1.0), interpolation=bicubic)
    steps = [crop, v2.RandomHorizontalFlip()]
    magnitude = AUGMENTATIONS[augment]["randaugment"]  # of 30; timm counts to 10
    if magnitude:
        # timm draws two operations and applies each with probability 1/2. It has Invert and SolarizeAdd where
        # torchvision has Identity, and a magnitude that varies (mstd0.5), which torchvision keeps constant.
        gray = [round(255 * mean) for mean in IMAGENET_MEAN]
        change = v2.RandAugment(1, magnitude, num_magnitude_bins=31, interpolation=bicubic, fill=gray)
        # In Pillow: torchvision rotates and shears tensors without bicubic interpolation.
        maybe = v2.RandomApply([change], p=0.5)
        steps += [v2.ToPILImage(), maybe, maybe, v2.PILToTensor()]
    return v2.Compose(steps)

def eval_transform(img_size):
    """uint8 image to its middle, uint8 (3, img_size, img_size): 224 of 256 pixels, or in that proportion."""
    side = int(img_size * 256 / 224) if img_size <= 224 else img_size
    return v2.Compose([v2.Resize(side, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(img_size)])

class Augment:
    """uint8 crops (B, 3, H, W) and labels (B,) to images (B, 3, H, W) and targets (B, num_classes)."""
    def __init__(self, num_classes, augment):
        chosen = AUGMENTATIONS[augment]
        self.num_classes = num_classes
        self.erase = v2.RandomErasing(chosen["erasing"], scale=(0.02, 1 / 3), value="random")
        mixes = [mix(alpha=chosen[name], num_classes=num_classes)
                 for name, mix in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)) if chosen[name]]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, crops, labels):
        images = tinymim.normalize(crops / 255)
        if self.erase.p:
            images = torch.stack([self.erase(image) for image in images])
        return self.mix(images, labels) if self.mix else (images, F.one_hot(labels, self.num_classes))

# ---- 3. Optimisation ---------------------------------------------------------------------------------------

# Base: as the authors publish it, for updates of 1024 images. Tiny: MAE-Lite's. Small: our choice, as the
# authors say no more than "a higher learning rate and larger batch size". Probe: MAE's, with SGD
# instead of LARS, which is meant for MAE's updates of 16,384 images. Scratch: our choice.
RECIPES = {
    "tiny": dict(epochs=300, blr=1e-3, layer_decay=0.85, drop_path=0.0, augment="light"),
    "small": dict(epochs=200, blr=1e-3, layer_decay=0.75, drop_path=0.1),
    "base": dict(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.2),
    "scratch": dict(epochs=300, blr=5e-4, layer_decay=1.0, drop_path=0.1),
    "probe": dict(epochs=90, blr=0.1, layer_decay=1.0, drop_path=0.0, augment="crop", pool="token",
                  weight_decay=0.0, min_lr=0.0),
}
DEFAULTS = dict(batch_size=128, weight_decay=0.05, min_lr=1e-6, augment="strong", pool="avg")

def fill_in_recipe(args, dim):
    """Options that were not given get the values of the recipe."""
    size = "tiny" if dim < 384 else "small" if dim < 768 else "base"
    name = "probe" if args.freeze else "scratch" if args.checkpoint == "none" else size
    for option, value in (DEFAULTS | RECIPES[name]).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.warmup_epochs is None:  # MAE's: 5 of 100, and 10 of the probe's 90
        args.warmup_epochs = args.epochs / 9 if args.freeze else min(5, args.epochs / 20)

def parameter_groups(model, weight_decay, layer_decay):
    """AdamW's groups, with `lr_scale`: each layer learns at layer_decay times the rate of the one above it.

    Biases, norms, the class token and the position embeddings are not decayed.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = model.depth + 1  # the head, and the norm before it
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("cls_token", "dist_token", "pos_embed", "patch_embed")):
            layer = 0
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(("_token", "pos_embed")) else weight_decay
        group = dict(params=[], weight_decay=decay, lr_scale=layer_decay ** (model.depth + 1 - layer))
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())

# ---- 4. Evaluation -----------------------------------------------------------------------------------------

def make_eval_loader(paths, labels, transform, args):
    """This process's share of the images: none is left out, and none counts twice."""
    dataset = ImageDataset(paths, transform, labels=labels)
    return DataLoader(dataset, args.batch_size, sampler=range(RANK, len(paths), WORLD),
                      num_workers=args.workers, pin_memory=args.device == "cuda",
                      persistent_workers=args.workers > 0)

@torch.no_grad()
def evaluate(model, loader, args, columns=None):
    """{"top1", "top5": percent, "val_loss": mean cross-entropy} over the images of all processes.

    columns: the outputs to choose among, those of labels 0, 1, ..., if the model has more classes.
    """
    model.eval()
    if WORLD > 1:
        for buffer in model.buffers():  # the probe's batch statistics: those of process 0 for all
            dist.broadcast(buffer, 0)
    sums = torch.zeros(4, dtype=torch.float64, device=args.device)  # images, top-1, top-5, loss
    for crops, labels in loader:
        crops, labels = crops.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)
        with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
            logits = model(tinymim.normalize(crops / 255)).float()
        if columns is not None:
            logits = logits[:, columns]
        correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([torch.ones_like(labels).sum(), correct[:, 0].sum(), correct.sum(), loss])
    if WORLD > 1:
        dist.all_reduce(sums)
    count, top1, top5, loss = sums.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "val_loss": loss / count}

def run_evaluation(model, args, folder):
    """--eval: print the accuracy on folder/val, or on the class folders in `folder`.

    If these are only some of the model's classes, as in ImageNet-R, it chooses among those.
    """
    val = os.path.join(folder, "val")
    folder = val if os.path.isdir(val) else folder
    paths, labels, classes = read_folder(folder)
    known = read_folder(args.class_names)[2] if args.class_names else model.config["classes"] or classes
    if len(known) != model.head.out_features or not set(classes) <= set(known):
        raise UserError(f"not all of the {len(classes)} classes in {folder} are known to be of the model's "
                        f"{model.head.out_features}: name a folder that has them all with --class-names")
    columns = torch.tensor([known.index(name) for name in classes], device=args.device)
    loader = make_eval_loader(paths, labels, eval_transform(model.img_size), args)
    result = evaluate(model, loader, args, columns)
    if RANK == 0:
        print(f"{args.checkpoint} on {len(paths)} images of {len(classes)} classes in {folder}: "
              f"top-1 {result['top1']:.3f}%, top-5 {result['top5']:.3f}%, loss {result['val_loss']:.4f}")

# ---- 5. Training and command line --------------------------------------------------------------------------

def train(args, build=build, objective=Supervised):
    """What the command does. Writes last.pth, best.pth, log.jsonl and augmented.png to args.out."""
    tinymim.setup(args)
    if LOCAL_RANK > 0:
        dist.barrier()  # see tinymim.train
    folder, classes = tinymim.imagenette() if args.data == "imagenette" else args.data, None
    if not args.eval:
        paths, labels, classes = read_folder(os.path.join(folder, "train"))
        val_paths, val_labels, val_classes = read_folder(os.path.join(folder, "val"))
        different = sorted(set(classes) ^ set(val_classes))
        if different:
            raise UserError(f"only one of {folder}/train and {folder}/val has the class {different[0]}")
    model = build(args, classes).to(args.device)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    if args.eval:
        return run_evaluation(model, args, folder)

    transform = train_transform(model.img_size, args.crop_scale, args.augment)
    dataset = ImageDataset(paths, transform, args.seed, labels)
    val_loader = make_eval_loader(val_paths, val_labels, eval_transform(model.img_size), args)
    objective = objective(model, AUGMENTATIONS[args.augment]["smoothing"], args.freeze).to(args.device)
    augment = Augment(len(classes), args.augment)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    if args.freeze:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, fused=args.device == "cuda")
    if RANK == 0:
        batch = [dataset[i] for i in range(0, len(dataset), len(dataset) // 32 + 1)]
        images, _ = augment(*default_collate(batch))  # as the network sees them, but in their own colours
        save_image(images, os.path.join(args.out, "augmented.png"), normalize=True, scale_each=True)
        print(f"{args.checkpoint} on {len(paths)} images, {len(val_paths)} for validation, {args.epochs} "
              f"epochs, blr {args.blr}, {args.augment}, {args.device}, amp {args.amp}, {args.out}")
    def after_epoch(epoch):
        if epoch % args.eval_every == 0 or epoch == args.epochs:
            return evaluate(model, val_loader, args)

    tinymim.fit(objective=objective, model=model, dataset=dataset, prepare=augment, optimizer=optimizer,
                args=args, after_epoch=after_epoch)

def make_parser(prog, doc):
    """The options of fine-tuning."""
    parser = tinymim.make_parser(prog, doc)
    parser.set_defaults(min_lr=None, weight_decay=None)
    text = "Defaults that are None follow the size of the network: see RECIPES."
    add = parser.add_argument_group("fine-tuning", text).add_argument
    add("--checkpoint", required=True, help="of tinymim.py, of MAE, mae_base..., or none: from scratch")
    add("--pool", choices=("avg", "token"), help="classify the mean of the patches, or the class token")
    add("--freeze", action="store_true", help="train only the head (linear probe; not of distilled students)")
    add("--layer-decay", type=float, help="each layer learns at this times the rate of the one above it")
    add("--patch-size", type=int, help="in pixels, with --checkpoint none")
    add("--augment", choices=AUGMENTATIONS, help="crop: crops and flips only, for few or small images")
    add("--crop-scale", type=float, default=0.08, help="smallest area of a random crop (default: 0.08)")
    add("--eval-every", type=int, default=1, help="epochs between evaluations (default: 1)")
    add("--eval", action="store_true", help="only evaluate a fine-tuned checkpoint on --data")
    add("--class-names", help="folder of class folders, if the checkpoint does not record them")
    return parser

def main(argv=None):
    """python finetune.py, with the words of argv, or those of the command line."""
    parser = make_parser("finetune.py", __doc__)
    args = parser.parse_args(argv)
    kind = "scratch" if args.checkpoint == "none" else "probe" if args.freeze else "finetune"
    start = args.student if args.checkpoint == "none" else tinymim.run_name(args.checkpoint)
    args.out = None if args.eval else args.out or os.path.join("runs", f"{kind}-{start}")
    tinymim.run(parser, args, train)
    if RANK == 0 and not args.eval:
        print(f"finished. Next: python finetune.py --eval --checkpoint {args.out}/best.pth "
              f"--data {args.data}")

if __name__ == "__main__":
    main()
