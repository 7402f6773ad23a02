"""For study.py --content: how much of a relation's variance the photo explains."""

import os

import torch

import data
import tinymim

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
            for pair in ("qq", "kk", "vv", "qk"):
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

def print_content(args, path):
    """A table of explained() for the teacher and, to compare, for a network without training."""
    folder = os.path.join(args.out, "data", "all", "val")
    paths = tinymim.find_images(folder)
    chosen = paths[::max(1, len(paths) // 1000)][:1000]
    photos = torch.stack([tinymim.decode(os.fsdecode(name)) for name in chosen])
    teacher = tinymim.load_teacher(args.teacher)
    torch.manual_seed(0)
    random = tinymim.ViT(teacher.dim, teacher.depth, teacher.heads, teacher.config["patch_size"],
                         teacher.img_size)
    print(f"\nHow much of a relation's variance the photo explains (%), {len(photos)} test photos")
    for name, vit in (("teacher", teacher), ("random", random)):
        shares = explained(vit.eval(), photos)
        print(f"\n| {name}: block | q-q | k-k | v-v | q-k |\n|---|---|---|---|---|")
        for block in range(1, vit.depth + 1):
            row = [shares[block, pair] for pair in ("qq", "kk", "vv", "qk")]
            print(f"| {block} | {' | '.join(f'{100 * share:.0f}' for share in row)} |")
            for pair, share in zip(("qq", "kk", "vv", "qk"), row):
                data.results(path, f"content/{name}/{block} {pair}", share)
