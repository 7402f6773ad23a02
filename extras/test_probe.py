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
from test_tinymim import SMALL, fails, load, refused, same
from test_tinymim import own_folder, pictures  # fixtures: an empty folder, and three colours
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
def common(pictures):
    return ["--device=cpu", "--workers=0", f"--data={pictures}"]

@pytest.fixture
def options(common, checkpoint):
    return [*common, f"--checkpoint={checkpoint}", "--batch-size=8", "--blr=1", "--out=run"]

@pytest.fixture
def evaluation(common):
    return [*common, "--checkpoint=run/last.pth", "--eval"]

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

def test_it_learns_and_trains_the_head_alone(options, evaluation, checkpoint, capsys):
    probe.main([*options, "--epochs=10"])
    saved, before = load("run"), torch.load(checkpoint, weights_only=True)["model"]
    history, weights = saved["history"], saved["model"]
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["top1"] > 60
    new = {"head.weight", "head.bias", "head_norm.running_mean", "head_norm.running_var",
           "head_norm.num_batches_tracked"}  # the names that earlier versions wrote, too
    assert weights.keys() - before.keys() == new
    same({name: weights[name] for name in before}, before)
    capsys.readouterr()
    probe.main([*evaluation, "--batch-size=1"])
    record = history[-1]
    assert f"top-1 {record['top1']:.3f}%, loss {record['val_loss']:.4f}" in capsys.readouterr().out

def test_a_resumed_run_is_the_uninterrupted_one(options):
    options += ["--epochs=3"]
    probe.main([*options, "--out=whole"])
    stopped(probe.main, options, epoch=2)
    probe.main([*options, "--resume"])
    same(load("run")["model"], load("whole")["model"])

@pytest.mark.slow
def test_processes_evaluate_with_the_statistics_that_are_saved(options, evaluation, capsys):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script("probe.py", *options, "--batch-size=4", "--epochs=1", launcher=torchrun)
    record = load("run")["history"][-1]
    probe.main(evaluation)
    assert f"loss {record['val_loss']:.4f}" in capsys.readouterr().out

@pytest.mark.parametrize("is_trained, config", [
    (False, dict(relation_heads=2)), (False, dict(pretraining="TinyMIM")),
    (False, dict(pretraining="LogitRelation")), (False, dict(pretraining="MaskedRelation")),
    (True, dict(pretraining="Feature")), (True, dict(pretraining="WithMAE", relation_heads=2))])
def test_the_end_of_the_last_block_must_be_trained(is_trained, config, options, checkpoint):
    content = torch.load(checkpoint, weights_only=True) | {"config": SMALL | config}
    torch.save(content, "student.pth")
    options += ["--checkpoint=student.pth", "--epochs=1"]
    probe.main(options) if is_trained else fails(probe.main, options, "distilled by relations")

def test_what_it_refuses(options, evaluation, checkpoint, pictures, capsys):
    fails(probe.main, [*options, "--batch-size=1"], "--batch-size 1")
    fails(probe.main, [*evaluation, f"--checkpoint={checkpoint}"], "is not of this script")
    assert not os.path.exists("run")
    for option, says in (("--epochs=3", "effect"), ("--blr=3", "effect"), ("--dim=24", "unrecog")):
        refused("^2$", probe.main, [*evaluation, option], error=SystemExit)
        assert says in capsys.readouterr().err
    probe.main([*options, "--epochs=1"])
    shutil.copytree(pictures, "changed")
    os.rename("changed/val/red", "changed/val/violet")
    fails(probe.main, [*evaluation, "--data=changed"], "has other classes than")
    fails(probe.main, [*options, "--data=changed", "--out=other"], "has other classes than")
    fails(finetune.main, evaluation, "fc_norm")
