"""Tests of the pages: every command and snippet runs. python -m pytest extras/test_pages.py"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import pytest
import torch

import finetune_with_label_teacher
import shapes
import tinymim
from test_extras import pictures  # a fixture
from test_tinymim import own_folder  # a fixture: every test has an empty folder

PAGES = {name: (HERE.parent / name).read_text("utf-8")
         for name in ("README.md", "extras/README.md", "extras/study/README.md")}

# What a command asks for is made small by these. They come last, so they count.
SMALL = ["--batch-size=4", "--workers=0", "--device=cpu"]
TRAIN = [*SMALL, "--epochs=1"]
NETWORK = ["--dim=24", "--depth=4"]
OPTIONS = {
    "tinymim": [*TRAIN, *NETWORK, "--accum=1"], "targets": [*TRAIN, *NETWORK], "finetune": TRAIN,
    "mae": [*TRAIN, *NETWORK, "--heads=6", "--img-size=32", "--patch-size=8", "--decoder", "12",
            "1", "2"],
    "timm_teacher": [*TRAIN, *NETWORK, "--heads=6", "--img-size=28", "--no-pretrained"],
    "probe": TRAIN, "robustness": SMALL, "finetune_with_label_teacher": TRAIN,
    "segment": [*SMALL, "--iterations=1", "--warmup-iterations=0", "--eval-every=1",
                "--img-size=32", "--channels=8", "--num-classes=11", "--data=segmentation"],
    "shapes": ["--train=20", "--val=10"], "figures": [], "cifar10": None, "demo": None,
    "benchmark": None, "study": None, "plot": None,  # None: run by tests of their own
}
EVALUATE = ["--workers=0", "--device=cpu"]

def commands(page):
    """[(script, options)] of the Python commands in the page's blocks, in order."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if words[:1] in (["python"], ["torchrun"]) and scripts and "pytest" not in words:
                found.append((Path(words[scripts[0]]).stem, words[scripts[0] + 1:]))
    return found

@pytest.fixture
def small_world(pictures, monkeypatch):
    """What the commands name: photos, MAE's teachers, label maps, and the shipped teachers."""
    for folder in ("imagenet", "FOLDER", "data/cifar10-jpeg", "data/imagenette2-320"):
        os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
        os.symlink(pictures, folder)
    torch.manual_seed(0)
    mae = tinymim.ViT(48, 4, 12, 8, 32)
    torch.save({"model": mae.state_dict(), "config": mae.config}, "mae.pth")
    monkeypatch.setattr(tinymim, "download", lambda url: "mae.pth")
    label_teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    monkeypatch.setattr(finetune_with_label_teacher, "load_label_teacher",
                        lambda name, classes, img_size: label_teacher)
    label_teacher(torch.ones(1, 3, 32, 32))
    shapes.write_segmentation("segmentation", "training", 8, 0, 32)
    shapes.write_segmentation("segmentation", "validation", 4, 1, 32)
    os.symlink(HERE.parent / "assets", "assets")

@pytest.mark.slow
def test_commands_run_as_they_stand(small_world):
    """In their order, each with what those before it left."""
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 30 and {name for name, _ in found} <= OPTIONS.keys()
    for name, options in found:
        small = OPTIONS[name]
        if small is None:
            continue
        options = [{"/path/to/imagenet": "imagenet"}.get(option, option) for option in options]
        if name == "robustness":
            options = ["FOLDER/val" if option == "FOLDER" else option for option in options]
        if "--eval" in options:
            small = [*EVALUATE, *(["--data=segmentation"] if name == "segment" else [])]
        main = importlib.import_module(name).main
        try:
            main([*options, *small])
        except SystemExit as stopped:  # another way to the same folder: the reader takes one
            shutil.rmtree(re.search("error: (.*) holds a run", str(stopped.code))[1])
            main([*options, *small])
