"""Draw the demo's pictures: a filled shape on two colours, at a random place, size and turn.

    python extras/shapes.py FOLDER --train 40000 --val 1000    (FOLDER/{train,val}/CLASS/N.png)
    python extras/shapes.py FOLDER --train 2000 --val 200 --segmentation    (in ADE20K's format)
"""

import argparse
import os
import sys

try:
    import numpy as np
    from PIL import Image
except ImportError as error:
    sys.exit(f"{error.name} is not installed here: {sys.executable} -m pip install "
             "-r requirements.txt")

SHAPES = {  # inside the shape or not, for coordinates in [-1, 1]², x to the right, y down
    "disc": lambda x, y: x**2 + y**2 < 0.8,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "half": lambda x, y: (x**2 + (y - 0.4)**2 < 1) & (y < 0.4),
    "crescent": lambda x, y: (x**2 + y**2 < 1) & ((x - 0.5)**2 + y**2 > 0.7),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "bar": lambda x, y: (abs(x) < 1) & (abs(y) < 0.3),
    "triangle": lambda x, y: (y < 0.6) & (y > 1.9 * abs(x) - 1),
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    "corner": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.85) & ((x < -0.25) | (y > 0.25)),
    "star": lambda x, y: np.hypot(x, y) * (1 - 0.42 * np.cos(5 * np.arctan2(y, x))) < 0.6,
}

def draw(shape, random, size, easy=False):
    """A picture of `shape`, uint8 (size, size, 3), and where the shape is, bool (size, size).

    It is drawn at twice the size, and so has smooth edges. easy: the shape is larger, turned by at
    most 45 degrees, and lighter than its ground.
    """
    y, x = (np.mgrid[:2 * size, :2 * size] + 0.5) / size - 1  # (2 size, 2 size) each, in [-1, 1]
    turn, split = random.uniform(0, 2 * np.pi, 2)
    radius = random.uniform(0.35, 0.7)
    if easy:
        turn, radius = (turn - np.pi) / 4, random.uniform(0.45, 0.75)
    cx, cy = random.uniform(-0.9 + radius, 0.9 - radius, 2)
    u, v = (x - cx) / radius, (y - cy) / radius
    cos, sin = np.cos(turn), np.sin(turn)
    inside = SHAPES[shape](cos * u - sin * v, sin * u + cos * v)
    ground = np.cos(split) * x + np.sin(split) * y > random.uniform(-0.5, 0.5)
    while True:
        colours = random.uniform(0, 255, (3, 3))
        contrast = colours[2] - colours[:2]  # of the shape to both grounds: it stands out
        if easy and contrast.mean(axis=1).min() > 60:
            break
        if not easy and abs(contrast).max(axis=1).min() > 100:
            break
    picture = colours[np.where(inside, 2, ground.astype(int))]
    picture = picture.reshape(size, 2, size, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return picture, inside.reshape(size, 2, size, 2).mean(axis=(1, 3)) >= 0.5

def write(folder, count, seed, size=40, easy=False):
    """Draw `count` pictures, as many of each shape, into folder/SHAPE/N.png."""
    random, names = np.random.RandomState(seed), list(SHAPES)
    for name in names:
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    for i in range(count):
        name = names[i % len(names)]
        picture = Image.fromarray(draw(name, random, size, easy)[0])
        picture.save(os.path.join(folder, name, f"{i}.png"), compress_level=1)

def write_segmentation(folder, split, count, seed, size=40):
    """Draw `count` pictures and their label maps, as ADE20K's: folder/{images,annotations}/split/.
    Label 1 is the ground, 2 the first of SHAPES."""
    random = np.random.RandomState(seed)
    for kind in ("images", "annotations"):
        os.makedirs(os.path.join(folder, kind, split), exist_ok=True)
    for i in range(count):
        label = i % len(SHAPES) + 2
        picture, inside = draw(list(SHAPES)[label - 2], random, size)
        labels = np.where(inside, label, 1).astype(np.uint8)
        for kind, array in (("images", picture), ("annotations", labels)):
            path = os.path.join(folder, kind, split, f"{i}.png")
            Image.fromarray(array).save(path, compress_level=1)

def main(argv=None):
    parser = argparse.ArgumentParser("extras/shapes.py", description="Draw pictures of ten shapes.")
    add = parser.add_argument
    add("folder")
    add("--train", type=int, default=40000, help="pictures in FOLDER/train (default: 40000)")
    add("--val", type=int, default=1000, help="pictures in FOLDER/val (default: 1000)")
    add("--size", type=int, default=40, metavar="N", help="in pixels (default: 40)")
    add("--seed", type=int, default=1, help="of train, val has the next (default: 1)")
    add("--segmentation", action="store_true", help="label maps as well")
    args = parser.parse_args(argv)
    for name, low, high in (("train", 1, 10**9), ("val", 1, 10**9), ("size", 1, 1024),
                            ("seed", 0, 2**32 - 2)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} is not between {low} and {high}")
    try:
        if args.segmentation:
            write_segmentation(args.folder, "training", args.train, args.seed, args.size)
            write_segmentation(args.folder, "validation", args.val, args.seed + 1, args.size)
        else:
            write(os.path.join(args.folder, "train"), args.train, args.seed, args.size)
            write(os.path.join(args.folder, "val"), args.val, args.seed + 1, args.size)
    except OSError as error:
        sys.exit(f"extras/shapes.py: error: cannot write in {args.folder} ({error})")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{args.train} and {args.val} pictures in {args.folder}")

if __name__ == "__main__":
    main()
