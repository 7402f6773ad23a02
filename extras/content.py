"""How much of a relation's variance the photo explains: a table for each block and pair.

    python extras/content.py                                     (CIFAR-10, the teacher in assets/)
    python extras/content.py --data FOLDER --teacher CHECKPOINT

It compares the teacher with a network without training, on 1,000 photos of test/ or of FOLDER.
"""

import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import tinymim

PAIRS = "qq", "kk", "vv", "qk"

@torch.no_grad()
def explained(teacher, photos):
    """How much of a relation's variance the photo explains: {(block, pair): share}.

    1 - variance of the mean map / variance over photos, for each row; the mean over rows and heads.
    0: the relation is the same in each photo: it says where a patch is. 1: it has no constant part.
    photos: uint8 (P, 3, H, W). A row's mean is 1 / N in any photo, as it is a distribution.
    """
    shares = {}
    for block in range(1, teacher.depth + 1):
        totals, squares = {}, {}
        for batch in photos.split(50):
            qkv = dict(zip("qkv", teacher.qkv_at(tinymim.normalize(batch / 255), block)))
            for pair in PAIRS:
                a, b = pair
                relation = tinymim.log_relation(qkv[a], qkv[b], teacher.heads).exp().double()
                totals[pair] = totals.get(pair, 0) + relation.sum(0)  # (h, N, N)
                squares[pair] = squares.get(pair, 0) + relation.square().sum((0, 3))  # (h, N)
        for pair, total in totals.items():
            N = total.shape[2]
            of_mean = (total / len(photos)).square().mean(2) - 1 / N**2
            of_all = squares[pair] / (len(photos) * N) - 1 / N**2
            shares[block, pair] = (1 - of_mean / of_all).mean().item()
    return shares

def print_content(args):
    teacher = tinymim.load_teacher(args.teacher)
    root = data.cifar10() if args.data == "cifar10" else args.data
    paths = tinymim.find_images(tinymim.image_folder(root, "test"))
    photos = data.middles(paths[::max(1, len(paths) // 1000)][:1000], teacher.img_size)
    torch.manual_seed(0)
    networks = {"teacher": teacher, "random": tinymim.ViT(**teacher.config)}
    print(f"How much of a relation's variance the photo explains (%), {len(photos)} photos")
    for name, vit in networks.items():
        shares = explained(vit.eval(), photos)
        print(f"\n| {name}: block | q-q | k-k | v-v | q-k |\n|---|---|---|---|---|")
        for block in range(1, vit.depth + 1):
            row = [shares[block, pair] for pair in PAIRS]
            print(f"| {block} | {' | '.join(f'{100 * share:.0f}' for share in row)} |")
            for pair, share in zip(PAIRS, row if args.json else ()):
                data.results(args.json, f"content/{name}/{block} {pair}", share)

def main(argv=None):
    parser = argparse.ArgumentParser("extras/content.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="or a folder of photos")
    parser.add_argument("--teacher", default=data.CIFAR10_TEACHER, help="a checkpoint")
    parser.add_argument("--json", metavar="FILE", help="add the shares to it, as fractions")
    tinymim.run(parser, print_content, parser.parse_args(argv))

if __name__ == "__main__":
    main()
