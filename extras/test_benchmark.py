"""Tests of benchmark.py and variants.py: python -m pytest extras/test_benchmark.py"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks PyTorch for a GPU
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import sys
import time

import pytest
import torch
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import benchmark
import tinymim
import variants
from test_extras import pictures, script  # the first is a fixture

# ---- The variants compute what tinymim.py does --------------------------------------------------

def test_the_formulas_as_written():
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 5, 12)
    torch.testing.assert_close(variants.usual_relation(a, b, 3), tinymim.log_relation(a, b, 3))
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(variants.usual_attention(q, k, v), expected)

def test_recomputed_relations_keep_nothing_large_and_have_the_same_gradients():
    torch.manual_seed(0)
    teacher = torch.randn(3, 2, 30, 24)
    student = torch.randn(3, 2, 30, 12).requires_grad_()
    pairs, found = ("qk", "vv"), []
    for loss in (tinymim.relation_loss, variants.recomputed_loss):
        large = []

        def note(tensor):
            large.extend([tensor.shape] * (tensor.shape[-2:] == (30, 30)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses = loss(student.unbind(), teacher.unbind(), 3, pairs)
        gradient, = torch.autograd.grad(sum(losses.values()), student)
        found.append((losses, gradient, len(large)))
    (losses, gradient, kept), (same_losses, same_gradient, kept_anew) = found
    assert (kept, kept_anew) == (4, 0)
    torch.testing.assert_close(same_losses, losses)
    torch.testing.assert_close(same_gradient, gradient)

def test_patches_by_a_product():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 5, 4, 4), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(variants.patches_by_product(conv, images), conv(images))

# ---- The clock ----------------------------------------------------------------------------------

SLEEP, WORKERS, BATCH = 0.05, 2, 2
MOST = WORKERS / SLEEP  # images/s

class SlowDataset(tinymim.ImageDataset):
    def __getitem__(self, key):
        time.sleep(SLEEP)
        return super().__getitem__(key)

class SlowToStart(tinymim.TinyMIM):
    """Takes its time in the first step, as compilation does."""
    started = False

    def forward(self, *views):
        time.sleep(0 if self.started else 1)
        self.started = True
        return super().forward(*views)

def test_batches_that_workers_made_ahead_do_not_count(pictures):
    torch.manual_seed(0)
    student, teacher = (tinymim.ViT(12, 2, 3, 16, 32) for _ in range(2))
    args = argparse.Namespace(**tinymim.RECIPE | dict(
        variant="eager", measure=["training", "pipeline"], repeats=1, tables={}, workers=WORKERS,
        steps=2 * benchmark.fewest_steps(WORKERS), batch_size=BATCH, device="cpu", amp="off",
        compile=False, seed=0, warmup_epochs=15, images_per_update=BATCH))
    paths = tinymim.find_images(str(pictures / "train"))
    dataset = SlowDataset(paths, tinymim.crop_and_flip(32))
    objective = SlowToStart(student, teacher)
    optimizer = tinymim.make_optimizer(objective, args)
    benchmark.measure(objective, dataset, tinymim.two_views, optimizer, args)
    pipeline = args.tables["pipeline"][f"images/s, {WORKERS} workers"]
    training = args.tables["end to end"]
    # The workers set the pace, training keeps up with it, and nothing is faster than they are.
    assert 0.7 * MOST < training["images/s"] < 1.05 * min(pipeline, MOST)
    assert 0.7 * MOST < pipeline < 1.05 * MOST
    assert args.tables["pipeline"]["images/s, 1 worker"] < 1.05 * MOST / WORKERS
    assert training["waiting for data, %"] > 40
    assert training["hours for them"] == pytest.approx(300 * 1281167 / training["images/s"] / 3600)

    # The naive way: the clock starts after the first step, and few steps are timed.
    loader = tinymim.make_loader(dataset, args)
    assert loader.prefetch_factor == benchmark.AHEAD
    batches = iter(loader)
    next(batches)
    time.sleep(1)
    began = time.perf_counter()
    for _ in range(8):
        next(batches)
    assert 8 * BATCH / (time.perf_counter() - began) > 1.2 * MOST

def test_steps_that_are_too_few_are_refused():
    fewest = benchmark.fewest_steps(4)
    with pytest.raises(SystemExit, match=f"--steps {fewest - 1} is too few.* {fewest}"):
        benchmark.main(["--steps", str(fewest - 1), "--workers", "4", "--device", "cpu"])

# ---- All of it ----------------------------------------------------------------------------------

def test_the_benchmark(pictures):
    """At the smallest sizes: its numbers belong together; and its bars are drawn."""
    options = ["--student", "nano", "--img-size", 32, "--batch-size", 2, "--workers", 1]
    steps = ["--repeats", 1, "--steps", 8, "--no-compile", "--device", "cpu", "--amp", "off"]
    printed = script("benchmark.py", *options, *steps, "--json", "--variants", "usual", "eager",
                     "finetune", "--data", pictures)
    result = json.loads(printed)
    names = ["usual, float32", "eager, float32", "finetune, float32"]
    for table in ("step", "end to end", "pipeline"):
        assert [row["variant"] for row in result[table]] == names
    crops, label = 3 * 32 * 32 / 1024, 8 / 1024
    sizes = [row["KiB per image"] for row in result["pipeline"]]
    assert sizes == pytest.approx([2 * 4 * crops, crops, crops + label])
    for row in result["step"]:
        assert row["images/s"] == pytest.approx(2 / (row["step, ms"] / 1000))
        assert row["peak memory, GiB"] > 0.1
    for row in result["end to end"]:
        assert 0 <= row["waiting for data, %"] < 100
        assert row["epochs of ImageNet"] == 300
    dim, tokens, patches, blocks = 768, 5, 4, 8  # whole blocks, then the qkv of the ninth of 12
    in_block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    gflop = 2 * (patches * 3 * 16**2 * dim + blocks * in_block + 3 * tokens * dim**2) / 1e9
    for parts in result["parts"]:  # of the usual way, and of tinymim.py
        assert parts["teacher, GFLOP per image"] == pytest.approx(gflop)
        rate = 2 * gflop / (parts["teacher, ms"] / 1000)
        share = 100 * rate / (1000 * parts["product, TFLOP/s"])
        assert parts["teacher, % of it"] == pytest.approx(share)
    assert len(result["parts"]) == 2
