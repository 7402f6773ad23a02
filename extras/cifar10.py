"""CIFAR-10 as image files: 50,000 photos of 32 x 32 pixels to train on, 10,000 to test.

    python extras/cifar10.py             (data/cifar10/{train,test}/CLASS/NUMBER.png)
    python extras/cifar10.py --jpeg      (data/cifar10-jpeg/{train,test}/CLASS/NUMBER.jpg)

--jpeg: what the study's results and assets/cifar10_teacher.pth are of. Quality 75 and colours at
half resolution change a pixel by about 6.8 of 255 on average.
"""

import argparse
import collections
import os
import sys

import torchvision

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim

def write(args):
    folder, suffix, options = os.path.join("data", "cifar10"), "png", {}
    if args.jpeg:
        folder, suffix, options = folder + "-jpeg", "jpg", dict(quality=75, subsampling="4:2:0")
    if os.path.exists(folder):
        return print(f"{folder} is there already")
    for split in ("train", "test"):
        with tinymim.explained("cannot download CIFAR-10 to data", kind=(OSError, RuntimeError)):
            photos = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        counts = collections.Counter()
        for photo, label in photos:  # numbers count within a class, as a tenth of the labels goes
            name = photos.classes[label]  # to the first of each class, sorted by file name
            path = os.path.join(folder + ".part", split, name, f"{counts[name]:04}.{suffix}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            photo.save(path, **options)
            counts[name] += 1
    os.replace(folder + ".part", folder)  # it appears when it is complete
    print(f"CIFAR-10 is in {folder}")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/cifar10.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpeg", action="store_true", help="as the results are of")
    tinymim.run(parser, write, parser.parse_args(argv))

if __name__ == "__main__":
    main()
