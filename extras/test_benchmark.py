"""Tests of benchmark.py: python -m pytest extras/test_benchmark.py"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks PyTorch for a GPU
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import shutil
import sys

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import benchmark
import tinymim
from test_extras import pictures, script  # the first is a fixture
from test_tinymim import SMALL, WIDER, refused

def test_the_usual_way_computes_the_same():
    torch.manual_seed(0)
    student, teacher = tinymim.ViT(**SMALL), tinymim.ViT(**WIDER)
    images = torch.randn(2, 2, 3, 32, 32)
    expected = tinymim.TinyMIM(student, teacher).losses(*images)
    for block in (*student.blocks, *teacher.blocks):
        usual = benchmark.UsualAttention(block.attn.proj.in_features, block.attn.heads)
        usual.load_state_dict(block.attn.state_dict())
        block.attn = usual
    losses = benchmark.UsualTinyMIM(student, teacher)(*images)
    torch.testing.assert_close(losses, expected)

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_the_compiled_objective_computes_the_same():
    student, teacher = (tinymim.ViT(**sizes | dict(depth=2), drop_path=0.1)
                        for sizes in (SMALL, WIDER))
    objective, found = tinymim.TinyMIM(student, teacher, 2), []
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        torch.manual_seed(0)
        losses = objective(crops)
        sum(losses.values()).backward()
        found.append([losses, student.cls_token.grad.clone()])
        student.zero_grad()
        objective.compile(fullgraph=True, options={"fallback_random": True})  # the same draws
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

# ---- The clock ----------------------------------------------------------------------------------

class Simulation:
    """Workers that make a batch in `making` seconds, at most `ahead` before they are asked for, and
    a step that takes `computing` seconds, the first one 100 more. Time is a number."""
    def __init__(self, making, computing, ahead):
        self.making, self.computing, self.ahead = making, computing, ahead
        self.now, self.made, self.taken = 0.0, [], []

    def __iter__(self):
        while True:
            made = self.made[-1] if self.made else 0
            place = self.taken[-self.ahead] if len(self.taken) >= self.ahead else 0
            self.made.append(max(made, place) + self.making)
            self.now = max(self.now, self.made[-1])
            self.taken.append(self.now)
            yield

    def step(self, batches):
        next(batches)
        self.now += self.computing + 100 * (len(self.taken) == 1)

@pytest.mark.parametrize("making, computing", [(3, 0), (3, 1), (1, 3)])
def test_batches_that_workers_made_ahead_do_not_count(making, computing, monkeypatch):
    args, steps, ahead = argparse.Namespace(device="cpu"), 16, 4

    def time_step(ready):
        simulation = Simulation(making, computing, ahead)
        monkeypatch.setattr(benchmark, "clock", lambda: simulation.now)
        return benchmark.time_step(simulation.step, simulation, steps, args, ready)

    pace = max(making, computing)  # the slower of the two sets it
    seconds, waited = time_step(ready=ahead)
    assert pace <= seconds < 1.03 * pace
    assert waited == pytest.approx(max(0, making - computing), abs=0.1)
    if making > computing:  # the naive way counts what lay there after the first, slow step
        assert time_step(ready=0)[0] < 0.9 * pace

def test_as_many_batches_are_made_ahead_as_it_throws_away(pictures):
    dataset = tinymim.ImageDataset(tinymim.find_images(pictures), tinymim.crop_and_flip(32))
    args = argparse.Namespace(workers=1, batch_size=2, images_per_update=2, accum=1, seed=0,
                              device="cpu")
    loader = tinymim.make_loader(dataset, args)
    assert loader.prefetch_factor == benchmark.AHEAD
    taken = []
    benchmark.time_step_on_files(lambda batches: taken.append(next(batches)), dataset, args)
    assert len(taken) == benchmark.WARM_UP + 4 * benchmark.AHEAD

# ---- All of it ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_benchmark(pictures):
    """At the smallest sizes: its numbers belong together."""
    options = ["--student", "nano", "--img-size", 32, "--batch-size", 2, "--workers", 1]
    printed = script("benchmark.py", *options, "--repeats", 1, "--device", "cpu", "--amp", "off",
                     "--json", "--variants", "usual", "eager", "finetune", "--data", pictures)
    result = json.loads(printed)
    names = ["usual, float32", "eager, float32", "finetune, float32"]
    for table in ("step", "end to end", "pipeline"):
        assert [row["variant"] for row in result[table]] == names
    crops, label = 3 * 32 * 32 / 1024, 8 / 1024
    sizes = [row["KiB per image"] for row in result["pipeline"]]
    assert sizes == pytest.approx([2 * 4 * crops, crops, crops + label])
    for row in result["step"]:
        assert row["images/s"] == pytest.approx(2 / (row["step, ms"] / 1000))
    for row in result["end to end"]:
        assert 0 <= row["waiting for data, %"] < 100
        assert row["epochs of ImageNet"] == 300
    [parts] = result["parts"]  # of tinymim.py
    assert parts["variant"] == names[1] and min(list(parts.values())[1:]) > 0

def test_what_it_does_not_take(capsys):
    for options in (["--steps=9"], ["--epochs=3"], ["--out=x"], ["--variants=matmul"],
                    ["--variants=finetune", "--relation-heads=4"]):
        refused("^2$", benchmark.main, options, error=SystemExit)
        assert "error: " in capsys.readouterr().err
