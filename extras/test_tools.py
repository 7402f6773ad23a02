"""Tests of demo.py, figures.py, shapes.py and cifar10.py: python -m pytest extras/test_tools.py"""

import os
import sys
from pathlib import Path
from unittest.mock import Mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from test_tinymim import QUICK, fails, load, own_folder, refused, same  # first: it hides the GPU
from test_extras import pictures, teacher_file  # fixtures, as own_folder is

import pytest
import torchvision
from PIL import Image, JpegImagePlugin

import cifar10, demo, figures, shapes, targets, tinymim

@pytest.fixture
def options(teacher_file, pictures):
    """Of a distillation of half a second. Later options overrule these."""
    return [*QUICK, "--student=nano", "--dim=24", "--heads=2", f"--teacher={teacher_file}",
            f"--data={pictures}", "--out=run"]

@pytest.mark.slow
def test_the_demo_from_beginning_to_end_without_matplotlib(monkeypatch, capsys):
    few = {name: (count // 40, *more) for name, (count, *more) in demo.PICTURES.items()}
    monkeypatch.setattr(demo, "PICTURES", few)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not there
    demo.main(["--out=demo"])
    printed = capsys.readouterr().out
    for name in demo.STARTS:
        history = load(f"demo/{name.split()[-1]}-0-finetuned")["history"]
        assert f"| {name} | {history[-1]['top1']:.1f}% |" in printed
    assert Image.open("demo/demo.png").size == (1200, 570)
    assert len(load("demo/distilled-0")["history"]) == 2  # it is a run like any other
    for name in ("demo", ""):
        fails(demo.main, [f"--out={name}"], f"'{name}' is not a new folder")

def test_figures_show_the_teacher_and_the_student_before_and_after(options):
    tinymim.main(options)
    tinymim.main([*options, "--epochs=1", "--blr=0", "--out=idle"])  # learns nothing
    crops, objective, networks = figures.load_run("run")
    for name, run in (("student before", "idle"), ("student after", "run")):
        same(networks[name].state_dict(), load(run)["model"])
    maps = figures.relation_maps(objective, networks["teacher"], crops / 255)
    assert list(maps) == ["q-q", "k-k", "v-v"] and crops.shape == (4, 3, 32, 32)
    q, k, v = networks["teacher"].qkv_at(tinymim.normalize(crops / 255), 4)  # of its last block
    same(maps["v-v"], expected := tinymim.log_relation(v, v, 4).exp().mean(1).detach())
    heat = figures.middle_row(expected, grid=4)
    assert heat[1, 2, 2] == 0 and heat[1, 0, 3] == expected[1, 1 + 10, 1 + 3]

@pytest.mark.slow
def test_figures_of_any_pairs_and_folders(options):
    pytest.importorskip("matplotlib")
    for run, pairs, rows in (("$x^$", "qq kk vv", 5), ("_y", "qk vv", 5), ("z", "kk", 4)):
        tinymim.main([*options, f"--out={run}", "--relations", *pairs.split()])
        figures.main(["--run", run, "--method", "--log", run])
        width, height = Image.open(f"{run}/relations.png").size
        assert round(4 * height / width) == rows  # four photos, and one of another pair
        assert "</svg>" in Path(run, "method.svg").read_text()
    log = Path("z", "log.jsonl")
    narrow, text = Image.open("z/curves.png").width, log.read_text()
    log.write_text(text.replace('"lr"', '"top1"'))
    figures.main(["--log", "z"])
    assert Image.open("z/curves.png").width > 1.5 * narrow  # accuracy is beside the losses
    for wrong in (text[:-5], "", "3"):
        log.write_text(wrong)
        fails(figures.main, ["--log", "z"], "z/log.jsonl is empty or no log")

def test_what_figures_do_not_draw(options, monkeypatch):
    for seed in (0, 1):
        targets.main([*options, "--target=ffn", f"--seed={seed}", f"--out=ffn{seed}"])
    tinymim.main([*options, "--teacher=ffn0/last.pth"])
    os.replace("ffn1/last.pth", "ffn0/last.pth")  # another teacher under its name
    for option, run, says in (
            ("--run", "ffn0", "not learnt relations"), ("--run", "run", "no longer the teacher of"),
            ("--run", "mistyped", "no file mistyped"), ("--log", "mistyped", "mistyped/log.jsonl")):
        fails(figures.main, [option, run], says)
    assert not os.path.exists("mistyped")
    for more in ([], ["--log", "run", "--method"], ["--log", "run", "--data", "x"]):
        refused("^2$", figures.main, more, error=SystemExit)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("matplotlib is not installed", figures.main, ["--run=run"], error=SystemExit)

def test_shapes_are_the_same_for_the_same_seed(capsys):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        shapes.main([name, "--train=20", "--val=10", f"--seed={seed}"])
    drawn = [path.relative_to("a") for path in sorted(Path("a").rglob("*.png"))]
    assert len(drawn) == 30 and {path.parent.name for path in drawn} == {*shapes.SHAPES}
    a, b, c = ([Path(name, path).read_bytes() for path in drawn] for name in "abc")
    assert a == b != c
    for option in ("--size=0", "--seed=-1", "--seed=4294967295", "--train=0"):
        refused("^2$", shapes.main, ["d", option], error=SystemExit)
        assert "is not between" in capsys.readouterr().err and not os.path.exists("d")

def test_cifar10_as_png_and_as_the_jpegs_of_the_results(monkeypatch, capsys):
    photos = torchvision.datasets.FakeData(8, (3, 32, 32), num_classes=2)
    photos.classes, download = ["cat", "dog"], Mock(return_value=photos)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    for options in ([], ["--jpeg"], []):
        cifar10.main(options)
    assert capsys.readouterr().out.endswith("data/cifar10 is there already\n")
    assert len(tinymim.find_images("data/cifar10/train")) == 8
    cats = [photo for photo, label in photos if label == 0]
    assert Image.open("data/cifar10/test/cat/0001.png").tobytes() == cats[1].tobytes()
    with Image.open("data/cifar10-jpeg/train/cat/0001.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        brightness, colour = (table[:8] for table in image.quantization.values())
    assert brightness == [8, 6, 5, 8, 12, 20, 26, 31] and colour == [9, 9, 12, 24, 50, 50, 50, 50]
    download.side_effect = OSError("no route to host")
    os.rename("data", "moved")
    fails(cifar10.main, [], "cannot download CIFAR-10", "no route to host")
