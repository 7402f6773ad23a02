"""What scripts share: CIFAR-10 as files (python extras/data.py), splits, results, maps, CPUs."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import finetune
import tinymim
from tinymim import UserError

CIFAR10_TEACHER = os.path.join(ROOT, "assets", "cifar10_teacher.pth")

def set_up_cpu():
    """What suits small networks on a CPU, as settings, and as options, which it returns."""
    use_one_thread()
    torch.nn.functional.scaled_dot_product_attention = attention
    return ["--amp", "bf16"] if torch.cpu._is_avx512_bf16_supported() else []

def use_one_thread():  # two on a network this small wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for tinymim.setup, which else sets more

def attention(q, k, v):
    """torch's scaled_dot_product_attention as a formula: faster on a CPU, for few tokens."""
    return (q / math.sqrt(q.shape[-1]) @ k.transpose(2, 3)).softmax(-1).to(v.dtype) @ v

def cifar10(root="data"):
    """CIFAR-10 as image files, downloaded the first time: data/cifar10/{train,test}/CLASS/N.png."""
    folder = os.path.join(root, "cifar10")
    if not os.path.isdir(folder):
        print(f"downloading CIFAR-10, 170 MB, to {root}/ (--data FOLDER uses your own photos)")
        for split in ("train", "test"):
            try:
                photos = torchvision.datasets.CIFAR10(root, train=split == "train", download=True)
            except (OSError, RuntimeError) as error:  # of the network, or a file cut short
                raise UserError(f"cannot download CIFAR-10 to {root}/ ({error})") from error
            for i, (photo, label) in enumerate(photos):
                path = os.path.join(folder + ".part", split, photos.classes[label])
                os.makedirs(path, exist_ok=True)
                photo.save(os.path.join(path, f"{i}.png"))
        os.replace(folder + ".part", folder)
    return folder

def link_splits(root, out):
    """Links in OUT/data: "all" and "few" labels (a tenth), with the test photos as val, and "tune":
    few, with another tenth as val. Returns how many training photos there are."""
    test = f"{root}/test" if os.path.isdir(f"{root}/test") else f"{root}/val"
    paths, labels, classes = finetune.read_folder(f"{root}/train")
    if finetune.read_folder(test)[2] != classes:  # better said now than after hours
        raise UserError(f"{root}/train and {test} have different classes")
    links = {"all/train": f"{root}/train", "all/val": test, "few/val": test}
    for i, name in enumerate(classes):
        found = [os.fsdecode(path) for path in paths[labels == i]]
        if len({os.path.basename(path) for path in found}) < len(found):
            raise UserError(f"in {root}/train/{name} two photos have the same name")
        tenth = math.ceil(len(found) / 10)
        for part, chosen in (("few/train", found[:tenth]), ("tune/train", found[:tenth]),
                             ("tune/val", found[-tenth:])):
            links |= {os.path.join(part, name, os.path.basename(path)): path for path in chosen}
    for link, target in links.items():
        link, target = os.path.join(out, "data", link), os.path.abspath(target)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            os.symlink(target, link)
        elif os.path.realpath(link) != os.path.realpath(target):
            raise UserError(f"{out} is of other photos: {os.path.realpath(link)}")
    return len(paths)

def middles(paths, size):
    """The middle squares of some photos, uint8 (P, 3, size, size)."""
    middle = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    return torch.stack([middle(tinymim.decode(os.fsdecode(path))) for path in paths])

def load_run(folder, photos=None):
    """Of a run of tinymim.py: four of its photos (or of others), uint8 (4, 3, H, W), the objective
    as it was before training, and the networks to compare, by name."""
    checkpoint = os.path.join(folder, "last.pth")
    if not os.path.exists(checkpoint):
        raise UserError(f"there is no {checkpoint}")
    args = argparse.Namespace(**tinymim.load_file(checkpoint)["args"])
    if "relations" not in args:
        raise UserError(f"{folder} is not a run of tinymim.py (figures.py --log draws its curves)")
    torch.manual_seed(args.seed)  # as in tinymim.setup
    objective, student = tinymim.build(args).eval(), tinymim.load_teacher(checkpoint)
    paths = tinymim.find_images(tinymim.image_folder(photos or args.data, "train"))
    crops = middles(paths[::len(paths) // 4 or 1][:4], student.img_size)
    return crops, objective, {"teacher": objective.teacher, "student before": objective.student,
                              "student after": student}

@torch.no_grad()
def relation_maps(objective, network, images):
    """{pair: relations (B, N, N), the mean over heads} of images (B, 3, H, W) in [0, 1]."""
    block = objective.teacher_block if network is objective.teacher else network.depth
    qkv = dict(zip("qkv", network.qkv_at(tinymim.normalize(images), block)))
    heads = objective.relation_heads
    return {f"{a}-{b}": tinymim.log_relation(qkv[a], qkv[b], heads).exp().mean(dim=1)
            for a, b in objective.pairs}

def middle_row(relation, grid):
    """How the patch in the middle relates to all: of relations (B, N, N), (B, grid, grid)."""
    middle = (grid + 1) * (grid // 2)
    heat = relation[:, 1 + middle, 1:].clone()  # without the class token
    heat[:, middle] = 0  # to itself it relates far more strongly: black
    return heat.unflatten(1, (grid, grid))

def ship(checkpoint, path):
    """A teacher's checkpoint in float16, its weights and config alone, for assets/."""
    tensors, _, config = tinymim.read_checkpoint(checkpoint)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save({"model": half, "config": config}, path)

def results(path, key=None, result=None):
    """Add {key: result} to a JSON file that others change too. Returns all that is in it."""
    found = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
    if key:
        found[key] = result
        part = Path(f"{path}.{os.getpid()}")
        part.write_text(json.dumps(found, indent=1, sort_keys=True))
        part.replace(path)
    return found

def of_seeds(found, labels, spec):
    """{seed: top-1} of a row, among the results. If their settings differ: an error."""
    row = f"{labels}/{spec}/"
    results = {key.removeprefix(row): found[key] for key in found if key.startswith(row)}
    for name in {name for result in results.values() for name in result} - {"top1", "device"}:
        values = [result[name] for result in results.values() if name in result]
        if values != values[:1] * len(values):
            raise UserError(f"the seeds of {labels}/{spec} differ in {name}: {values}")
    return {seed: result["top1"] for seed, result in results.items()}

def keep_small_photos():
    """Decode each photo of up to 64 x 64 pixels only once: 50,000 of 32 x 32 take 150 MB."""
    decode, kept = tinymim.decode, {}

    def decode_once(path):
        photo = kept.get(path)
        if photo is None:
            photo = decode(path)
            if photo[0].numel() <= 64**2:
                kept[path] = photo
        return photo

    tinymim.decode = decode_once

if __name__ == "__main__":
    parser = argparse.ArgumentParser("extras/data.py", description="Download CIFAR-10 as files.")
    tinymim.run(parser, lambda args: print(f"CIFAR-10 is in {cifar10()}"), parser.parse_args())
