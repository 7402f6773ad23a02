"""Robustness, as in the paper's T4: top-1 on ImageNet, ImageNet-A and -R, and mCE on ImageNet-C, as a table.

    python extras/robustness.py --checkpoint runs/finetune-tiny/best.pth --imagenet /path/to/imagenet/val \\
        --imagenet-a /path/to/imagenet-a --imagenet-r /path/to/imagenet-r --imagenet-c /path/to/imagenet-c

Each has a folder of images for each class. -A and -R have 200 of the 1000 classes, and the model chooses
among those. ImageNet-C is CORRUPTION/SEVERITY/CLASS, with 15 corruptions in 5 severities. What is not named
or not there is left out, and said to be.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
from torchvision.transforms import InterpolationMode, v2

import finetune
import finetune_distilled
import tinymim
from tinymim import UserError

# AlexNet's top-1 error, in percent, over the five severities of each corruption: what mCE is relative to.
# Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions, ICLR 2019.
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056,
    "pixelate": 71.7840, "jpeg_compression": 60.6500,
}
PAPER = """
| the paper's T4 | ImageNet | -A | -R | -C, mCE |
|---|---|---|---|---|
| T: DeiT, MAE, TinyMIM | 72.2, 71.6, 75.8 | 8.0, 7.0, 11.0 | 32.7, 36.5, 39.8 | 54.0, 55.2, 50.1 |
| S: DeiT, MAE, TinyMIM | 79.9, 80.6, 83.0 | 18.3, 20.1, 27.5 | 42.3, 45.6, 48.8 | 41.4, 40.6, 35.8 |
| B: DeiT, MAE, TinyMIM | 81.2, 83.6, 85.0 | 25.8, 33.6, 43.0 | 45.4, 50.0, 54.6 | 36.8, 37.8, 32.7 |"""

def top1(model, args, folder, whole=False):
    """Percent of the images in `folder` that are classified correctly, among its classes.

    whole: do not cut off the margins; ImageNet-C's images are the middles already.
    """
    paths, labels, classes = finetune.read_folder(folder)
    unknown = sorted(set(classes) - set(args.classes))
    if unknown:
        raise UserError(f"{folder} has the class {unknown[0]}, which the model does not know")
    transform = finetune.eval_transform(model.img_size)
    if whole:
        resize = v2.Resize(model.img_size, interpolation=InterpolationMode.BICUBIC)
        transform = v2.Compose([resize, v2.CenterCrop(model.img_size)])
    loader = finetune.make_eval_loader(paths, labels, transform, args)
    columns = torch.tensor([args.classes.index(name) for name in classes], device=args.device)
    return finetune.evaluate(model, loader, args, columns)["top1"]

def mean_corruption_error(errors):
    """{corruption: its errors in percent, for all severities} to mCE, relative to AlexNet's, in percent."""
    ratios = [sum(error) / len(error) / ALEXNET[name] for name, error in errors.items()]
    return 100 * sum(ratios) / len(ratios)

def evaluate(args):
    tinymim.setup(args)
    tensors, args.star = tinymim.read_checkpoint(args.checkpoint)[0], False
    two_heads = "head_dist.weight" in tensors
    model = (finetune_distilled if two_heads else finetune).build(args).to(args.device)
    names = finetune.read_folder(args.class_names)[2] if args.class_names else model.config["classes"]
    if not names or len(names) != model.head.out_features:
        raise UserError(f"{args.checkpoint} does not record its classes: --class-names FOLDER that has them")
    args.classes = names
    row, missing = [], []
    for name in ("imagenet", "imagenet_a", "imagenet_r"):
        folder = getattr(args, name)
        if folder and os.path.isdir(folder):
            row.append(f"{top1(model, args, folder):.1f}")
        else:
            row.append("-")
            missing.append(folder or "--" + name.replace("_", "-"))
    errors = {}
    for corruption in ALEXNET:
        severities = [os.path.join(args.imagenet_c or "", corruption, str(i)) for i in range(1, 6)]
        absent = [folder for folder in severities if not os.path.isdir(folder)]
        if not args.imagenet_c or absent:
            missing.append(absent[0] if args.imagenet_c else f"--imagenet-c: {corruption}")
        else:
            errors[corruption] = [100 - top1(model, args, folder, whole=True) for folder in severities]
            error = sum(errors[corruption]) / 5
            print(f"{corruption}: error {error:.1f}%, AlexNet's {ALEXNET[corruption]:.1f}%")
    row.append(f"{mean_corruption_error(errors):.1f}" if errors else "-")
    print(PAPER)
    partly = f" ({len(errors)} of {len(ALEXNET)} corruptions)" if 0 < len(errors) < len(ALEXNET) else ""
    print(f"| {args.checkpoint} | {' | '.join(row)}{partly} |")
    if missing:
        print(f"left out: {', '.join(missing)}")

def main(argv=None):
    parser = finetune.make_parser("extras/robustness.py", __doc__)
    add = parser.add_argument_group("robustness").add_argument
    for name in ("imagenet", "imagenet-a", "imagenet-r", "imagenet-c"):
        add(f"--{name}", help="folder")
    tinymim.run(parser, parser.parse_args(argv), evaluate)

if __name__ == "__main__":
    main()
