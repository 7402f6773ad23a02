"""Robustness as in the paper's Table 4: ImageNet, its variants -A and -R, and its corruptions, -C.

    python extras/robustness.py --checkpoint runs/tiny-finetuned/best.pth --imagenet FOLDER \\
        --imagenet-a FOLDER --imagenet-r FOLDER --imagenet-c FOLDER

Each has a folder of images for each class. -A and -R have 200 of the 1000 classes, and the model
chooses among those. -C is CORRUPTION/SEVERITY/CLASS, with 15 corruptions in 5 severities. A
corruption that is not there is left out, and said to be.
"""

import argparse
import os
import sys
from statistics import mean

from torchvision.transforms import v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import tinymim
from finetune_with_label_teacher import load_classifier
from tinymim import COUNT, RANK, UserError

# AlexNet's top-1 error in percent, the mean over five severities: mCE is relative to it.
# Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions, 2019.
ALEXNET = dict(
    gaussian_noise=88.6428, shot_noise=89.4468, impulse_noise=92.264, defocus_blur=81.988,
    glass_blur=82.6268, motion_blur=78.5948, zoom_blur=79.836, snow=86.6816, frost=82.6572,
    fog=81.9324, brightness=56.4592, contrast=85.3204, elastic_transform=64.6056, pixelate=71.784,
    jpeg_compression=60.65)
PAPER = """
mCE is relative to AlexNet's errors. Table 4 calls its last column mCE, but it is most probably the
mean error: for ViT-B, MAE has 51.7, which as an mCE is an error of about 41; Table 4 has 37.8.

| Table 4: DeiT, MAE, TinyMIM | ImageNet | -A | -R | -C: mean error | -C: mCE |
|---|---|---|---|---|---|
| T | 72.2, 71.6, 75.8 | 8.0, 7.0, 11.0 | 32.7, 36.5, 39.8 | 54.0, 55.2, 50.1 | |
| S | 79.9, 80.6, 83.0 | 18.3, 20.1, 27.5 | 42.3, 45.6, 48.8 | 41.4, 40.6, 35.8 | |
| B | 81.2, 83.6, 85.0 | 25.8, 33.6, 43.0 | 45.4, 50.0, 54.6 | 36.8, 37.8, 32.7 | |"""

def top1(model, args, folder, transform=None):
    """Percent of the images in `folder` that are classified correctly, among its classes."""
    paths, labels, classes = finetune.read_folder(folder)
    known = model.config["classes"]
    for name in set(classes) - set(known):
        raise UserError(f"{folder} has the class {name}, which the model does not know")
    if len(classes) < len(known) and RANK == 0:
        print(f"{folder}: {len(classes)} of the {len(known)} classes, and only among these")
    columns = [known.index(name) for name in classes]
    with model.register_forward_hook(lambda module, images, logits: logits[:, columns]):
        return finetune.evaluate(model, paths, labels, args, transform)["top1"]

def evaluate(args):
    tinymim.resolve(args)
    tinymim.start_processes(args)
    tensors, sizes, config = tinymim.read_checkpoint(args.checkpoint, args.heads)
    sizes["img_size"] = args.img_size or sizes["img_size"]
    model = tinymim.by_options(load_classifier, args, (tensors, sizes, config))
    # ImageNet-C's images are the middles already: nothing is cut off.
    resize = v2.Resize(model.img_size, interpolation=finetune.BICUBIC)
    whole = v2.Compose([resize, v2.CenterCrop(model.img_size)])
    folders = args.imagenet, args.imagenet_a, args.imagenet_r
    row = [f"{top1(model, args, folder):.1f}" if folder else "-" for folder in folders]
    errors = {}
    for name in ALEXNET if args.imagenet_c else ():
        folders = [os.path.join(args.imagenet_c, name, str(severity)) for severity in range(1, 6)]
        said = "left out, as its five folders are not there"
        if all(map(os.path.isdir, folders)):
            errors[name] = 100 - mean(top1(model, args, folder, whole) for folder in folders)
            said = f"error {errors[name]:.1f}%, AlexNet's {ALEXNET[name]:.1f}%"
        if RANK == 0:
            print(f"{name}: {said}")
    ratios = [error / ALEXNET[name] for name, error in errors.items()]
    row += [f"{mean(errors.values()):.1f}", f"{100 * mean(ratios):.1f}"] if errors else ["-", "-"]
    if RANK == 0:
        print(f"{PAPER}\n| {args.checkpoint} | {' | '.join(row)} |\n\n"
              f"-C has {len(errors)} of its 15 corruptions")

def existing(text):  # the type of an option
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text

def main(argv=None):
    parser = argparse.ArgumentParser("extras/robustness.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="of finetune.py or finetune_with_label_teacher.py")
    for name in ("imagenet", "imagenet-a", "imagenet-r", "imagenet-c"):
        add(f"--{name}", metavar="FOLDER", type=existing)
    add("--class-names", metavar="FOLDER", help="of class folders, if the checkpoint tells none")
    add("--img-size", type=COUNT, help="in pixels (default: the checkpoint's)")
    add("--heads", type=COUNT, help="attention heads, if the checkpoint does not tell")
    add("--batch-size", type=COUNT, default=128)
    add("--workers", type=tinymim.between(int, 0), help="image decoders (default: by the cores)")
    add("--device", choices=("cuda", "mps", "cpu"), default=tinymim.DEFAULTS["device"])
    add("--amp", choices=("auto", *tinymim.DTYPES), default="auto")
    # What else tinymim.resolve and finetune.new_classifier read.
    parser.set_defaults(out=None, resume=False, seed=0, epochs=1, warmup_epochs=0, accum=1,
                        compile=False, drop_path=0.0)
    args = parser.parse_args(argv)
    if not (args.imagenet or args.imagenet_a or args.imagenet_r or args.imagenet_c):
        parser.error("nothing to evaluate: --imagenet, --imagenet-a, --imagenet-r or --imagenet-c")
    tinymim.run(parser, evaluate, args)

if __name__ == "__main__":
    main()
