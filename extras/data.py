"""For study.py and demo.py: CIFAR-10 as image files, its splits, a file of results, settings of the CPU."""

import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torchvision

import finetune

def set_up_cpu():
    """What suits small networks on a CPU, as settings of PyTorch and as options, which it returns."""
    torch.set_num_threads(1)  # two threads on a network this small wait for each other
    torch.backends.cuda.enable_flash_sdp(False)  # the CPU's, too, which is slow for few tokens
    return ["--amp", "bf16"] if torch.cpu._is_avx512_bf16_supported() else []

def cifar10(root="data"):
    """CIFAR-10 as image files, downloaded the first time: data/cifar10/{train,test}/CLASS/N.png."""
    folder = os.path.join(root, "cifar10")
    if not os.path.isdir(folder):
        print(f"downloading CIFAR-10, 170 MB, to {root}/ (--data FOLDER uses your own photos)")
        for split in ("train", "test"):
            photos = torchvision.datasets.CIFAR10(root, train=split == "train", download=True)
            for i, (photo, label) in enumerate(photos):
                path = os.path.join(folder + ".part", split, photos.classes[label])
                os.makedirs(path, exist_ok=True)
                photo.save(os.path.join(path, f"{i}.png"))
        os.replace(folder + ".part", folder)
    return folder

def link_splits(root, out):
    """Links in OUT/data: "all" and "few" labels (a tenth), with the test photos as val, and "tune": few,
    with another tenth of the training photos as val. Returns how many training photos there are."""
    test = "test" if os.path.isdir(os.path.join(root, "test")) else "val"
    finetune.read_folder(os.path.join(root, test))  # what is missing is better known now than after hours
    paths, labels, classes = finetune.read_folder(os.path.join(root, "train"))
    links = {"all/train": os.path.join(root, "train"), "all/val": os.path.join(root, test),
             "few/val": os.path.join(root, test)}
    for i, name in enumerate(classes):
        found = [os.fsdecode(path) for path in paths[labels == i]]
        tenth = math.ceil(len(found) / 10)
        parts = {"few/train": found[:tenth], "tune/train": found[:tenth], "tune/val": found[-tenth:]}
        for part, chosen in parts.items():
            links |= {os.path.join(part, name, os.path.basename(path)): path for path in chosen}
    for link, target in links.items():
        link = os.path.join(out, "data", link)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            os.symlink(os.path.abspath(target), link)
    return len(paths)

def of_seeds(found, labels, spec):
    """The top-1 of all seeds of a row, among the results."""
    return [top1 for key, top1 in found.items() if key.startswith(f"{labels}/{spec}/")]

def results(path, key=None, top1=None):
    """Add {key: top1} to a JSON file that other processes change, too. Returns all that is in it."""
    found = {}
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
    if key:
        found[key] = top1
        with open(f"{path}.{os.getpid()}", "w") as file:
            json.dump(found, file, indent=1, sort_keys=True)
        os.replace(f"{path}.{os.getpid()}", path)
    return found
