"""Tests of probe.py: python -m pytest extras/test_probe.py"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import sys

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import finetune
import probe
from test_extras import script, stopped
from test_tinymim import SMALL, args_of, fails, load, same
from test_tinymim import pictures  # a fixture: three colours
from tinymim import ViT

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # leaving torchvision

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that MAE could have left. Random features are enough to tell colours apart."""
    torch.manual_seed(0)
    path, vit = tmp_path_factory.mktemp("checkpoint") / "mae.pth", ViT(**SMALL)
    torch.save({"model": vit.state_dict(), "config": vit.config}, path)
    return path

@pytest.fixture
def options(checkpoint, pictures, tmp_path):
    return ["--checkpoint", str(checkpoint), "--data", str(pictures), "--batch-size", "8", "--blr",
            "1", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]

def test_the_probe_is_a_class_token_a_batch_norm_without_weights_and_a_head():
    torch.manual_seed(0)
    model, images = probe.Probe(**SMALL, num_classes=50), torch.randn(5, 3, 32, 32)
    tokens = model.blocks(model.embed(images))[:, 0]
    x = model.norm(tokens)
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(model.train()(images), x @ model.head.weight.T + model.head.bias)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learnt == ["head.weight", "head.bias"]

def test_it_learns_and_trains_the_head_alone(options, checkpoint, tmp_path, capsys):
    probe.main([*options, "--epochs", "10"])
    saved = load(tmp_path / "run")
    before = torch.load(checkpoint, weights_only=True)["model"]
    history, weights = saved["history"], saved["model"]
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["top1"] > 60
    new = {"head.weight", "head.bias", "head_norm.running_mean", "head_norm.running_var",
           "head_norm.num_batches_tracked"}  # the names that earlier versions wrote, too
    assert weights.keys() - before.keys() == new
    same({name: weights[name] for name in before}, before)
    capsys.readouterr()
    last = str(tmp_path / "run" / "last.pth")
    probe.main([*options[2:], "--eval", "--checkpoint", last, "--batch-size", "1"])
    record = history[-1]
    assert f"top-1 {record['top1']:.3f}%, loss {record['val_loss']:.4f}" in capsys.readouterr().out

def test_a_resumed_run_is_the_uninterrupted_one(options, tmp_path):
    probe.main([*options, "--epochs", "3"])
    again = [*options, "--epochs", "3", "--out", str(tmp_path / "again")]
    stopped(probe.main, again, epoch=2)
    probe.main([*again, "--resume"])
    same(load(tmp_path / "again")["model"], load(tmp_path / "run")["model"])

def test_processes_evaluate_with_the_statistics_that_are_saved(options, tmp_path, capsys):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script("probe.py", *options, "--batch-size", "4", "--epochs", "1", launcher=torchrun)
    record = load(tmp_path / "run")["history"][-1]
    probe.main([*options, "--eval", "--checkpoint", str(tmp_path / "run" / "last.pth")])
    assert f"loss {record['val_loss']:.4f}" in capsys.readouterr().out

def test_what_it_refuses(options, checkpoint, pictures, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["relation_heads"] = 2
    torch.save(content, tmp_path / "student.pth")
    fails(probe.main, [*options, "--checkpoint", str(tmp_path / "student.pth")], "was distilled")
    fails(probe.main, [*options, "--batch-size", "1"], "--batch-size 1")
    fails(probe.main, [*options, "--eval"], "is not of this script")
    assert not os.path.exists(tmp_path / "run")

    probe.main([*options, "--epochs", "1"])
    shutil.copytree(pictures / "val", tmp_path / "val")
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "violet")
    evaluation = [*options[:-2], "--eval", "--checkpoint", str(tmp_path / "run" / "last.pth")]
    fails(probe.main, [*evaluation, "--data", str(tmp_path)], "has other classes than")
    os.symlink(pictures / "train", tmp_path / "train")
    other = [*options, "--data", str(tmp_path), "--out", str(tmp_path / "other")]
    fails(probe.main, other, "has other classes than")
    fails(finetune.main, [*evaluation, "--data", str(pictures)], "fc_norm")

def test_the_recipe():
    args = vars(args_of(probe, "--checkpoint=runs/mae-tiny/last.pth"))
    recipe = dict(epochs=90, warmup_epochs=10, batch_size=128, blr=0.1, min_lr=0, weight_decay=0,
                  augment="crop", out="runs/mae-tiny-probe", script="extras/probe.py")
    assert args | recipe == args
    assert args_of(probe, "--checkpoint=x", "--epochs=9").warmup_epochs == 1
