"""Tests of tinymim.py and finetune.py: python -m pytest test_tinymim.py

The golden numbers were computed in float64 by the authors' code (TinyMIM, MAE) and timm, on weights and
images that a formula fills (`fill`), so that anyone can compute them again. KILLS=200 kills more runs.
"""

import argparse
import http.server
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms import InterpolationMode, v2

import finetune
import tinymim
from tinymim import UserError, ViT, relation, relation_loss

HERE = os.path.dirname(os.path.abspath(__file__))
README = open(os.path.join(HERE, "README.md")).read()
KILLS = int(os.environ.get("KILLS", 12))  # at how many random moments runs are killed
PAIRS = [a + b for a in "qkv" for b in "qkv"]
SMALL = dict(dim=24, depth=3, heads=2, patch_size=8, img_size=32)  # a ViT that a test can train
WIDER = SMALL | dict(dim=48, depth=4, heads=4)

torch.set_num_threads(1)  # a forked process can use no more

# ---- Things the tests share --------------------------------------------------------------------------------

def fill(name, *shape):
    """Numbers in [-1, 1) that depend on the name alone: a 32-bit hash of the index and the name's CRC."""
    x = (2654435761 * np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return torch.from_numpy((x ^ (x >> 16)).astype(np.float64) / 2**31 - 1).view(shape)

def filled(module, prefix, also=()):
    """The module in float64, its parameters filled: norm weights 1 + 0.1u, others 0.08u. Position embeddings
    stay as they are, unless their name is in `also`."""
    module = module.double().eval()
    for name, parameter in module.named_parameters():
        if "pos_embed" in name and name not in also:
            continue
        u = fill(prefix + name, *parameter.shape)
        parameter.data = 1 + 0.1 * u if "norm" in name and name.endswith("weight") else 0.08 * u
    return module

def random_qkv(width, tokens=5, images=2, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(images, tokens, width, generator=generator, dtype=torch.float64) for _ in "qkv"]

@pytest.fixture(autouse=True)
def interrupt_handler():
    """tinymim.run() leaves a handler of Ctrl-C that ends the process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 24 smooth colourful pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        small = np.random.RandomState(i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((50, 40), Image.BICUBIC).save(path)
    return folder

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and val/ of three classes that colour tells apart: 20 and 7 pictures of each."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 7)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = generator.randint(0, 120, (32, 32, 3), dtype=np.uint8)
                image[..., channel] += generator.randint(60, 136)
                Image.fromarray(image).save(folder / split / name / f"{i}.png")
    return folder

@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A small random teacher as the authors' training code saves one."""
    path = tmp_path_factory.mktemp("teacher") / "small_mae.pth"
    torch.manual_seed(0)
    vit = ViT(**WIDER)
    for parameter in vit.parameters():  # livelier relations than those of fresh weights
        parameter.data += 0.1 * torch.randn_like(parameter) * (parameter is not vit.pos_embed)
    torch.save({"model": vit.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "scaler": None,
                "args": argparse.Namespace(model="mae", lr=1e-4)}, path)
    return path

QUICK = ["--epochs=3", "--workers=0", "--device=cpu", "--dim=24", "--depth=3", "--heads=2"]

@pytest.fixture
def distil(photos, teacher_file, tmp_path):
    """Options of a distillation that takes half a second; later options overrule them."""
    return [*QUICK, f"--teacher={teacher_file}", "--teacher-heads=4", f"--data={photos}",
            f"--out={tmp_path / 'run'}", "--batch-size=8", "--blr=0.05"]

@pytest.fixture
def tune(pictures, tmp_path):
    """Options of a training from scratch that takes half a second."""
    return [*QUICK, "--checkpoint=none", "--patch-size=8", "--img-size=32", f"--data={pictures}",
            f"--out={tmp_path / 'run'}", "--batch-size=10", "--blr=0.1"]

@pytest.fixture(params=["tinymim", "finetune"])
def either(request, distil, tune):
    """(main, options) of one of the two scripts."""
    return (tinymim.main, distil) if request.param == "tinymim" else (finetune.main, tune)

def fails(main, options, *says):
    """main(options) ends with an error of one line, which holds all of `says`."""
    with pytest.raises(SystemExit) as stopped:
        main([str(option) for option in options])
    line = stopped.value.code  # Python prints it to stderr, and exits with 1
    assert isinstance(line, str) and line.startswith(f"{main.__module__}.py: error: "), line
    assert "\n" not in line and all(text in line for text in says), line
    return line

def args_of(script, *options):
    """The options as script.main hands them to script.train."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinymim, "run", lambda parser, args, train: found.append(args))
        script.main([str(option) for option in options])
    return found[0]

class Interrupted(Exception):
    pass

def interrupt(main, options, epochs):
    """Run main(options) until it is in the middle of the epoch that follows so many."""
    rate = tinymim.learning_rate

    def stop(epoch, *rest):
        if epoch > epochs:
            raise Interrupted
        return rate(epoch, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(tinymim, "learning_rate", stop)
        main(options)

def script(name, *options, env=None, **streams):
    """The script in a process of its own, and of its own group."""
    return subprocess.Popen([sys.executable, os.path.join(HERE, f"{name}.py"), *map(str, options)], text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), start_new_session=True,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams)

def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)

def load(folder, name="last.pth"):
    return torch.load(os.path.join(folder, name), weights_only=True)

def log_of(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]

def result(folder):
    """All that a run left, but for its options and times."""
    found = {name: load(folder, name) for name in ("last.pth", "best.pth") if name in os.listdir(folder)}
    histories = [checkpoint["history"] for checkpoint in found.values()]
    for checkpoint in found.values():
        del checkpoint["args"]
    found["log"] = log_of(folder)
    for record in itertools.chain(found["log"], *histories):
        del record["images/s"]
    return found

def same(a, b, where="", rtol=0.0, atol=0.0):
    """Two nested structures are equal, bit for bit or within tolerances."""
    assert type(a) is type(b), where
    if isinstance(a, (dict, list)):
        assert len(a) == len(b) and (isinstance(a, list) or a.keys() == b.keys()), where
        for key in a if isinstance(a, dict) else range(len(a)):
            same(a[key], b[key], f"{where}[{key}]", rtol, atol)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {text}")
    else:
        assert a == b, where

# ---- The method --------------------------------------------------------------------------------------------

def test_golden_distillation():
    student = filled(ViT(192, 12, heads=6), "student.")  # six heads: the authors' ViT-Tiny, in pre-training
    teacher = filled(ViT(768, 12, heads=12), "teacher.")
    images = 2 * fill("images", 2, 3, 224, 224)
    losses = tinymim.TinyMIM(student, teacher, 12, 12, ["qk", "vv"]).eval()(images, images)
    assert losses["qk"].item() == pytest.approx(0.5928374293135243, abs=1e-9)
    assert losses["vv"].item() == pytest.approx(1.1960328201657833, abs=1e-9)

    with torch.no_grad():
        q, k, v = teacher.qkv(images, 12)
    qk, vv = relation(q, k, 12).exp(), relation(v, v, 12).exp()
    expected = [0.025767710213393306, 0.0063212661906894615, 0.0011469206929298828, 0.006966831556327835]
    assert qk[0, 3, 5, :4].tolist() == pytest.approx(expected, abs=1e-9)
    expected = [0.4439084161298033, 0.0012602242768500699, 0.0018378378317098937, 0.014642534735222338]
    assert vv[1, 0, 0, :4].tolist() == pytest.approx(expected, abs=1e-9)

    sum(losses.values()).backward()
    for name, norm in {
        "patch_embed.proj.weight": 0.11115307933877165, "cls_token": 0.002232637522656957,
        "blocks.0.attn.qkv.weight": 0.04350811949481605, "blocks.5.mlp.fc1.weight": 0.04943361111423365,
        "blocks.11.attn.qkv.weight": 0.16885630650605676, "blocks.11.norm1.bias": 0.013599193696380758,
    }.items():
        assert student.get_parameter(name).grad.norm().item() == pytest.approx(norm, abs=1e-9)
    without = {name for name, p in student.named_parameters() if p.grad is None}
    behind = {f"blocks.11.{layer}.{kind}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "norm2")
              for kind in ("weight", "bias")}
    assert without == behind | {"norm.weight", "norm.bias", "pos_embed"}
    assert all(p.requires_grad == (name not in without) for name, p in student.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

def test_golden_position_embeddings():
    embeddings = tinymim.sincos_pos_embed(768, 14)[0]
    assert embeddings.dtype == torch.float32 and embeddings.shape == (197, 768)
    assert embeddings[0].abs().sum() == 0
    assert embeddings.double().sum().item() == pytest.approx(69594.49384729861, abs=1e-6)
    expected = [0.8414709568023682, 0.5403022766113281, 0.6569865942001343, 0.7539022564888]
    assert embeddings[100, ::192].tolist() == pytest.approx(expected, abs=1e-9)

def test_golden_learning_rate():
    for epoch, expected in {0: 0.0, 0.5: 0.0001, 2.5: 0.0005, 5: 0.001, 20.25: 0.0009378167042176453,
                            52.5: 0.0005005000000000001, 99.9: 1.0027312259864862e-06, 100: 1e-06}.items():
        assert tinymim.learning_rate(epoch, 0.001, 5, 100, 1e-6) == pytest.approx(expected, abs=1e-12)

def test_relation_loss_is_the_formula():
    """Row by row, with networks of different widths, for every pair of q, k and v."""
    student, teacher, heads = random_qkv(12, seed=1), random_qkv(24, seed=2), 3
    losses = relation_loss(student, teacher, heads, PAIRS)
    assert list(losses) == PAIRS
    for a, b in PAIRS:
        total = 0.0
        for image, head, row in itertools.product(range(2), range(heads), range(5)):
            p, log_q = [], []
            for qkv, out in ((teacher, p), (student, log_q)):
                width = qkv[0].shape[2] // heads
                columns = slice(head * width, (head + 1) * width)
                x, y = (qkv["qkv".index(letter)][image, :, columns] for letter in (a, b))
                logits = [float(x[row] @ y[column]) / math.sqrt(width) for column in range(5)]
                out += [logit - math.log(sum(map(math.exp, logits))) for logit in logits]
            total += sum(math.exp(lp) * (lp - lq) for lp, lq in zip(p, log_q))
        assert losses[a + b].item() == pytest.approx(total / (2 * heads * 5), abs=1e-12)

def test_relation_loss_refuses_wrong_shapes_in_words():
    for student, teacher, heads, says in [
        (random_qkv(24), random_qkv(48), 5, r"\(2, 5, .*divisible by 5 heads"),
        (random_qkv(20), random_qkv(48), 6, r"\(2, 5, 20\).*divisible by 6 heads"),
        (random_qkv(24, tokens=196), random_qkv(48, tokens=197), 4, "differ.*196.*197"),
        ([torch.randn(2, 4, 5, 6) for _ in "qkv"], [torch.randn(2, 4, 5, 12) for _ in "qkv"], 4, r"\(B, N, D\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            relation_loss(student, teacher, heads)

def test_equal_networks_have_no_loss():
    student = [x.requires_grad_() for x in random_qkv(12, seed=3)]
    loss = sum(relation_loss(student, student, 3, PAIRS).values())
    loss.backward()
    assert loss.item() == 0 and all(x.grad.abs().max() < 1e-16 for x in student)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(dtype):
    """Logits of ±1e4, where softmax().log() is -inf, and under autocast, where products overflow in fp16."""
    student, teacher = ([x.to(dtype) for x in random_qkv(64, seed=seed, scale=120.0)] for seed in (4, 5))
    student = [x.requires_grad_() for x in student]
    q = student[0].detach().float()
    assert (q @ q.transpose(1, 2) / 8).abs().max() > 1e4
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16):
        losses = relation_loss(student, teacher, 1, PAIRS)
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(x.grad.isfinite().all() for x in student)

def test_relation_loss_copied_alone():
    """The two functions and three imports are all it takes."""
    copied, imports = {}, "import math, torch\nimport torch.nn.functional as F\n"
    exec(imports + inspect.getsource(relation) + inspect.getsource(relation_loss), copied)
    student, teacher = random_qkv(24), random_qkv(48, seed=1)
    same(copied["relation_loss"](student, teacher, 4), relation_loss(student, teacher, 4))

def test_defaults_of_the_objective():
    """The last block of a teacher as deep, else that at 3/4; its heads, or those it was distilled with."""
    student = ViT(**SMALL)
    for depth, block in ((3, 3), (4, 3), (8, 6), (24, 18)):
        objective = tinymim.TinyMIM(student, ViT(**WIDER | dict(depth=depth)))
        assert (objective.teacher_block, objective.relation_heads) == (block, 4)
        assert tuple(objective.pairs) == ("qq", "kk", "vv") and student.config["relation_heads"] == 4
    teacher = ViT(**WIDER)
    teacher.relation_heads = 3
    assert tinymim.TinyMIM(student, teacher).relation_heads == 3
    objective = tinymim.TinyMIM(student, teacher, teacher_block=1, relation_heads=6, pairs=["qk"])
    images = torch.randn(2, 2, 3, 32, 32)  # the student sees the first view, the teacher the second
    same(objective(*images), relation_loss(student.qkv(images[0], 3), teacher.qkv(images[1], 1), 6, ["qk"]))

def test_an_objective_that_cannot_be():
    for wrong in (dict(img_size=30), dict(heads=5), dict(dim=6)):
        with pytest.raises(UserError, match="divisible"):
            ViT(**SMALL | wrong)
    for block in (-1, 0, 5):
        with pytest.raises(UserError, match=f"blocks 1 to 4, not {block}"):
            tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER), block)
    for student, teacher, heads in ((24, 48, 5), (24, 36, 8), (64, 96, 12)):
        student, teacher = (ViT(**SMALL | dict(dim=dim)) for dim in (student, teacher))
        with pytest.raises(UserError, match=f"divisible by {heads} relation heads") as error:
            tinymim.TinyMIM(student, teacher, relation_heads=heads)
        working = int(re.search(r"--relation-heads (\d+)", str(error.value))[1])
        loss = tinymim.TinyMIM(student, teacher, relation_heads=working)(*torch.randn(2, 1, 3, 32, 32))
        assert sum(loss.values()).isfinite()

def test_teacher_is_frozen_and_may_drop_paths():
    torch.manual_seed(0)
    images = torch.randn(2, 2, 3, 32, 32)
    for rate in (0.0, 0.5):
        objective = tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER, drop_path=rate)).train()
        drawn = [sum(objective(*images).values()) for _ in range(4)]
        assert len({loss.item() for loss in drawn}) == (1 if rate == 0 else 4)
        drawn[0].backward()
        assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
        assert all(p.requires_grad == (p.grad is not None) for p in objective.parameters())

def test_qkv_computes_nothing_after_it():
    vit, images = ViT(**SMALL), torch.randn(2, 3, 32, 32)
    expected = vit.blocks[1].qkv(vit.blocks[0](vit.embed(images)))
    for module in (vit.blocks[1].attn.proj, vit.blocks[1].norm2, vit.blocks[1].mlp, vit.blocks[2], vit.norm):
        module.forward = None  # calling it would raise
    qkv = vit.qkv(images, 2)
    assert [x.shape for x in qkv] == 3 * [(2, 17, 24)] and all(map(torch.equal, qkv, expected))

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_objective_is_the_same():
    """In one graph, with drop path in training; and so is the jitter."""
    torch.manual_seed(0)
    objective = tinymim.TinyMIM(ViT(**SMALL | dict(depth=2), drop_path=0.1), ViT(**WIDER | dict(depth=2))).eval()
    jitter = torch.rand(2, 3, 32, 32), torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.rand(2, 3)
    images = torch.randn(2, 2, 3, 32, 32)
    expected = objective(*images), tinymim.color_jitter(*jitter)
    objective.compile(fullgraph=True)
    same(objective(*images), expected[0], rtol=1e-4, atol=1e-6)
    same(torch.compile(tinymim.color_jitter, fullgraph=True)(*jitter), expected[1], rtol=1e-4, atol=1e-6)
    loss = sum(objective.train()(*images).values())
    loss.backward()
    assert loss.isfinite() and objective.student.cls_token.grad.isfinite().all()

# ---- Checkpoints -------------------------------------------------------------------------------------------

def test_every_kind_of_checkpoint_loads(tmp_path):
    torch.manual_seed(1)
    vit = ViT(**SMALL)
    images, tensors = torch.randn(1, 3, 32, 32), vit.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8),
               "decoder_embed.weight": torch.zeros(8, 24), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    authors = {"optimizer": {"state": {}}, "epoch": 1, "args": argparse.Namespace(lr=1.0)}
    for kind, content in {
        "encoder": {"model": tensors},
        "whole MAE": {"model": tensors | decoder},
        "authors'": {"model": tensors} | authors,
        "bare": tensors,
        "with a config that is not ours": {"model": tensors, "config": None},
        "saved from DDP": {f"module.{name}": t for name, t in tensors.items()},
        "float16": {name: t.half() for name, t in tensors.items()},
        "ours": {"model": tensors, "config": SMALL | {"relation_heads": 6}, "optimizer": {}, "epoch": 1},
    }.items():
        torch.save(content, tmp_path / "x.pth")
        teacher = tinymim.load_teacher(str(tmp_path / "x.pth"), heads=None if kind == "ours" else 2)
        assert not any(p.requires_grad for p in teacher.parameters()), kind
        tolerance = dict(rtol=0.1, atol=0.02) if kind == "float16" else {}
        same(teacher(images), vit(images), kind, **tolerance)
        assert (teacher.heads, teacher.relation_heads) == ((2, 6) if kind == "ours" else (2, 2))
        assert teacher.config == SMALL

def test_heads_of_published_widths(tmp_path):
    for dim, heads in {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}.items():
        torch.save(ViT(dim, 1, heads, patch_size=16, img_size=32).state_dict(), tmp_path / "x.pth")
        assert tinymim.load_teacher(str(tmp_path / "x.pth")).heads == heads

def test_position_embeddings_of_another_size(tmp_path):
    torch.save(ViT(**SMALL).state_dict(), tmp_path / "x.pth")
    teacher = tinymim.load_teacher(str(tmp_path / "x.pth"), img_size=64, heads=2)
    small = tinymim.sincos_pos_embed(24, 4)
    patches = F.interpolate(small[:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2), (8, 8), mode="bicubic")
    patches = patches.permute(0, 2, 3, 1).reshape(1, 64, 24)
    same(teacher.pos_embed.data, torch.cat([small[:, :1], patches], 1))
    assert teacher(torch.randn(1, 3, 64, 64)).shape == (1, 65, 24)

def test_checkpoints_that_do_not_load(tmp_path):
    tensors, path = ViT(**SMALL).state_dict(), tmp_path / "x.pth"
    first = "blocks.0.norm1.weight"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code-ran"),)

    for content, says in [
        ({k: t for k, t in tensors.items() if k != "blocks.1.norm2.bias"}, "blocks.1.norm2.bias"),
        (tensors | {"blocks.0.ls1.gamma": torch.zeros(24)}, "blocks.0.ls1.gamma"),
        (tensors | {"blocks.999999.norm1.weight": torch.zeros(24)}, "not a plain ViT"),
        (tensors | {"cls_token": torch.zeros(1, 1, 25)}, "cls_token"),
        (tensors | {"pos_embed": torch.zeros(1, 12, 24)}, "x.pth"),
        (tensors | {"pos_embed": torch.zeros(17, 24)}, "x.pth"),
        (tensors | {"pos_embed": torch.zeros(17)}, "no ViT"),
        (tensors | {"patch_embed.proj.weight": torch.zeros(24, 192)}, "no ViT"),
        (tensors | {first: torch.ones(24, dtype=torch.bool)}, first),
        (tensors | {first: torch.ones(24, dtype=torch.int8)}, first),
        (tensors | {first: torch.ones(24, dtype=torch.complex64)}, first),
        (tensors | {first: torch.full((24,), math.nan)}, "not finite"),
        (tensors | {"blocks.2.mlp.fc2.weight": torch.full((24, 96), math.inf)}, "not finite"),
        ({"weight": torch.zeros(3)}, "no ViT under MAE's parameter names"),
        ([1, 2], "no ViT under MAE's parameter names"),
        ({"model": tensors, "args": Evil()}, "cannot load"),
        (b"\xff\xd8 a photo", "cannot load"),
        (b"", "cannot load"),
        (None, "No such file"),
    ]:
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        for img_size in (None, 64):
            with pytest.raises(UserError, match=re.escape(says)) as error:
                tinymim.load_teacher(str(path), img_size, heads=2)
            assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "code-ran").exists()
    torch.save(finetune.Classifier(**SMALL).state_dict(), path)  # fine-tuned: its norm is another
    with pytest.raises(UserError, match="norm.weight"):
        tinymim.load_teacher(str(path), heads=2)
    torch.save(tensors, path)
    with pytest.raises(UserError, match="--teacher-heads"):
        tinymim.load_teacher(str(path))

class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. /short/ and /chunks/ promise more than they send, as connections that break do."""
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.startswith("/short/"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nonly this")
        elif self.path.startswith("/chunks/"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nonly this")
        else:
            super().do_GET()

    def log_message(self, *_):
        pass

def test_download(tmp_path, monkeypatch):
    """Once, over HTTP and from file:// URLs; nothing broken is kept."""
    published, cache = tmp_path / "web" / "vit.pth", tmp_path / "hub" / "checkpoints"
    published.parent.mkdir()
    torch.save({"model": ViT(192, 1, 3, img_size=32).state_dict()}, published)
    folder = str(published.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Server(*a, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for url in (f"{web}/short/vit.pth", f"{web}/chunks/vit.pth", f"{web}/missing/vit.pth", "http://127.0.0.1:9/vit.pth"):
        monkeypatch.setattr(tinymim, "TEACHERS", {"vit": url})
        with pytest.raises(UserError, match="cannot load vit"):
            tinymim.load_teacher("vit")
        assert list(cache.iterdir()) == []
    Server.requests.clear()
    for url in (f"{web}/vit.pth", published.as_uri()):
        monkeypatch.setattr(tinymim, "TEACHERS", {"vit": url})
        assert [tinymim.load_teacher("vit").dim for _ in range(2)] == [192, 192]
        (cache / "vit.pth").unlink()
    assert Server.requests == ["/vit.pth"]
    server.shutdown()

# ---- Data --------------------------------------------------------------------------------------------------

def test_odd_files_are_ordinary(tmp_path):
    """Whatever the kind of file and its name: the same picture."""
    noise = np.random.RandomState(0).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((50, 40), Image.BICUBIC)
    with_alpha = photo.copy()
    with_alpha.putalpha(128)
    gray, palette, cmyk = (photo.convert(mode) for mode in ("L", "P", "CMYK"))
    for name, image, kind, expected in [
        ("rgb.JPEG", photo, "JPEG", photo), ("png.JPEG", photo, "PNG", photo), ("jpeg.PNG", photo, "JPEG", photo),
        ("cmyk.jpg", cmyk, "JPEG", photo), ("gray.jpg", gray, "JPEG", gray), ("gray.png", gray, "PNG", gray),
        ("alpha.png", with_alpha, "PNG", photo), ("palette.png", palette, "PNG", palette),
        ("webp.webp", photo, "WEBP", photo),
    ]:
        image.save(tmp_path / name, kind)
        decoded = tinymim.decode(str(tmp_path / name))
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, 40, 50), name
        expected = np.asarray(expected.convert("RGB"))
        difference = np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < (4 if kind in ("JPEG", "WEBP") else 0.01), name
    assert len(tinymim.find_images(str(tmp_path))) == 9

def test_damaged_files_are_errors(tmp_path):
    """They name the file. Decoders that crash would end the tests here."""
    path, generator = tmp_path / "x.JPEG", np.random.RandomState(0)
    dataset = tinymim.ImageDataset(tinymim.np.array([os.fsencode(path)]), v2.CenterCrop(16))
    image = Image.fromarray(generator.randint(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(path, "PNG")
    png = path.read_bytes()
    image.save(path, "JPEG")
    jpeg = path.read_bytes()
    flipped = [bytearray(png) for _ in range(400)]
    for content in flipped:
        content[generator.randint(8, len(png))] ^= 1 << generator.randint(8)
    wrong_crc = [png[:i - 1] + bytes([png[i - 1] ^ 1]) + png[i:] for i in (33, len(png) - 12, len(png))]
    failed = 0
    for content in flipped + wrong_crc:
        path.write_bytes(content)
        try:
            assert dataset[0][0].shape == (3, 16, 16)
        except UserError as error:
            failed += 1
            assert str(path) in str(error)
    assert failed > 300
    for content in (wrong_crc[0], png[:len(png) // 2], jpeg[:len(jpeg) // 2], jpeg[:10], b"not an image", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot decode .*x.JPEG"):
            dataset[0]

def test_finding_images(photos, tmp_path, monkeypatch):
    nested = tmp_path / "a" / "b" / "ünïcode folder"
    nested.mkdir(parents=True)
    for name in ("2.PNG", "1.jpeg", "notes.txt"):
        (nested / name).touch()
    os.mkfifo(nested / "pipe.jpg")
    found = [os.fsdecode(path) for path in tinymim.find_images(str(tmp_path))]
    assert found == [str(nested / "1.jpeg"), str(nested / "2.PNG")]
    scandir = os.scandir

    def forbidden(folder):
        if os.path.basename(folder) == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(OSError, match="Permission denied"):
        tinymim.find_images(str(tmp_path))

def test_imagenette_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    calls = []

    def broken(root, size, download):
        os.mkdir(os.path.join(root, f"imagenette2-{size[:3]}"))
        calls.append(size)
        if len(calls) == 1:
            raise OSError("the connection broke off")

    monkeypatch.setattr(tinymim, "Imagenette", broken)
    with pytest.raises(OSError, match="broke off"):
        tinymim.imagenette(str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []
    folders = [tinymim.imagenette(str(tmp_path / "data")) for _ in range(2)]
    assert folders == 2 * [str(tmp_path / "data" / "imagenette2-320")] and calls == ["320px", "320px"]
    assert os.listdir(tmp_path / "data") == ["imagenette2-320"]

def test_color_jitter_is_torchvisions():
    torch.manual_seed(0)
    images, factors = torch.rand(6, 3, 9, 7), torch.empty(6, 3).uniform_(0.6, 1.4)
    changes = [v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation]
    orders = list(itertools.permutations(range(3)))
    jittered = tinymim.color_jitter(images, torch.tensor(orders), factors)
    for image, order, factor, jitter in zip(images, orders, factors, jittered):
        for change, amount in zip(order, factor):
            image = changes[change](image, amount.item())
        same(jitter, image, atol=2e-6)

def test_two_views_are_of_the_same_crop(monkeypatch):
    torch.manual_seed(0)
    crops, drawn, jitter = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), [], tinymim.color_jitter
    monkeypatch.setattr(tinymim, "color_jitter", lambda *args: drawn.append(args) or jitter(*args))
    student, teacher = tinymim.two_views(crops)
    clean = v2.functional.normalize(crops / 255, tinymim.IMAGENET_MEAN, tinymim.IMAGENET_STD)
    same(teacher, clean)
    images, order, factors = drawn[0]
    same(student, v2.functional.normalize(jitter(crops / 255, order, factors), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(order.sort(dim=1).values, torch.arange(3).expand(40, 3)) and len(order.unique(dim=0)) == 6
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4 and len(factors.unique()) == 120

def test_crops_depend_on_seed_epoch_and_image_only(photos):
    paths = tinymim.find_images(str(photos))

    def two_epochs(workers, seed=0):
        crop = v2.RandomResizedCrop(16, (0.2, 1))
        dataset = tinymim.ImageDataset(paths, crop, seed, labels=np.arange(24))
        sampler = tinymim.EpochSampler(dataset, 1, 0, seed=0)
        loader = DataLoader(dataset, 8, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            crops, labels = map(torch.cat, zip(*loader))
            assert sorted(labels.tolist()) == list(range(24))
            yield crops[labels.argsort()], labels

    (first, order), (second, other_order) = two_epochs(workers=0)
    assert not any(map(torch.equal, first, second)) and not torch.equal(order, other_order)
    same([list(epoch) for epoch in two_epochs(workers=2)], [[first, order], [second, other_order]])
    assert not any(map(torch.equal, first, next(two_epochs(workers=0, seed=1))[0]))
    before = torch.get_rng_state()
    next(two_epochs(workers=0))
    tinymim.ImageDataset(paths, v2.RandomCrop(16))[5]
    torch.set_rng_state(before)
    tinymim.ImageDataset(paths, v2.RandomCrop(16))[5]
    assert torch.equal(before, torch.get_rng_state())
    shares = [set(tinymim.EpochSampler(range(24), 2, rank, drop_last=True)) for rank in range(2)]
    assert [len(share) for share in shares] == [12, 12] and len(shares[0] | shares[1]) == 24

# ---- Training, through the command line --------------------------------------------------------------------

def test_a_run(distil, tmp_path, capsys):
    tinymim.main(distil + ["--epochs=8"])
    log, last = log_of(tmp_path / "run"), load(tmp_path / "run")
    assert list(log[0]) == ["epoch", "loss", "qq", "kk", "vv", "lr", "images/s"]
    assert [record["epoch"] for record in log] == list(range(1, 9)) and log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(record["loss"] == pytest.approx(record["qq"] + record["kk"] + record["vv"]) for record in log)
    assert sorted(os.listdir(tmp_path / "run")) == ["last.pth", "log.jsonl", "relations.png"]
    assert Image.open(tmp_path / "run" / "relations.png").size == (2 + 7 * 114, 2 + 4 * 128)
    assert last["config"] == SMALL | {"relation_heads": 4} and last["epoch"] == 8
    assert not any(name.startswith("teacher") for name in last["objective"])
    assert capsys.readouterr().out.count("loss ") == 8
    tinymim.main(distil + [f"--teacher={tmp_path / 'run' / 'last.pth'}", f"--out={tmp_path / 'next'}",
                           "--teacher-heads=2", "--epochs=1"])  # a student is a valid teacher
    assert load(tmp_path / "next")["config"]["relation_heads"] == 4

def test_defaults_are_the_papers():
    args = args_of(tinymim)
    assert (args.student, args.teacher, args.out) == ("tiny", "mae_base", os.path.join("runs", "tiny-mae_base"))
    assert (args.relations, args.epochs, args.warmup_epochs) == (["qq", "kk", "vv"], 300, None)  # None: a 20th
    assert (args.blr, args.min_lr, args.weight_decay) == (1.5e-4, 0.0, 0.05)
    assert (args.drop_path, args.teacher_drop_path) == (0.1, 0.0)
    assert args_of(tinymim, "--teacher=runs/big/last.pth").out == os.path.join("runs", "tiny-big")
    assert args_of(finetune, "--checkpoint=runs/x/last.pth").out == os.path.join("runs", "finetune-x")
    assert tinymim.STUDENTS["nano"][0] % 12 == 0  # mae_base has 12 relation heads

def test_weight_decay_groups():
    student = ViT(**SMALL)
    decayed, not_decayed = tinymim.parameter_groups(student, 0.05)
    names = {id(p): name for name, p in student.named_parameters()}
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.05, 0.0)
    assert "cls_token" in [names[id(p)] for p in decayed["params"]]
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in not_decayed["params"])
    assert len(decayed["params"]) + len(not_decayed["params"]) == len(names) - 1  # all but pos_embed

def test_updates_are_adamw_on_the_sum_of_the_losses(distil, tmp_path, teacher_file, photos):
    """Two epochs of the command are those of a plain loop of a few lines."""
    tinymim.main(distil + ["--epochs=2", "--warmup-epochs=0.5"])
    torch.manual_seed(0)
    teacher = tinymim.load_teacher(str(teacher_file), heads=4)
    student = ViT(**SMALL, drop_path=0.1)
    objective = tinymim.TinyMIM(student, teacher, 3, 4).train()
    optimizer = torch.optim.AdamW(tinymim.parameter_groups(student, 0.05), betas=(0.9, 0.95))
    crop = v2.RandomResizedCrop(32, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    dataset = tinymim.ImageDataset(tinymim.find_images(str(photos)), transform)
    sampler = tinymim.EpochSampler(dataset, 1, 0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(DataLoader(dataset, 8, sampler=sampler))
        torch.manual_seed(hash((0, epoch, 0)))
        for step, (crops,) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = tinymim.learning_rate(epoch + step / 3, 0.05 * 8 / 256, 0.5, 2)
            optimizer.zero_grad()
            sum(objective(*tinymim.two_views(crops)).values()).backward()
            optimizer.step()
    same(load(tmp_path / "run")["model"], student.state_dict(), atol=1e-7)

def test_a_student_does_not_begin_as_its_teacher_began(distil, tmp_path):
    """Not with the same sizes and the same seed: then its relations would be right from the start."""
    torch.manual_seed(0)
    teacher = ViT(**SMALL)  # as extras/mae.py begins
    torch.save({"model": teacher.state_dict(), "config": teacher.config}, tmp_path / "teacher.pth")
    tinymim.main(distil + ["--epochs=1", "--blr=0", "--teacher-heads=2", f"--teacher={tmp_path / 'teacher.pth'}"])
    for name, tensor in load(tmp_path / "run")["model"].items():
        assert not name.endswith(("qkv.weight", "cls_token")) or not torch.equal(tensor, teacher.state_dict()[name])

LAUNCHER = """
import json, sys, finetune, tinymim
tinymim.color_jitter = lambda images, order, factors: images  # each process draws its own
for name, options in json.loads(sys.argv[1]):
    {"tinymim": tinymim, "finetune": finetune}[name].main(options)
"""

def test_two_processes_and_accumulation_are_one_large_batch(distil, tune, tmp_path, monkeypatch, capsys):
    distil, tune = distil + ["--drop-path=0"], tune + ["--drop-path=0", "--augment=crop", "--epochs=2", "--blr=0.01"]
    out = {name: f"--out={tmp_path / name}" for name in "abcdefgh"}
    evaluation = [*QUICK[1:3], "--eval", f"--checkpoint={tmp_path / 'c' / 'best.pth'}", f"--data={tune[-9][7:]}"]
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    jobs = [("tinymim", [*distil, "--batch-size=4", out["a"]]),
            ("tinymim", [*distil, "--batch-size=2", "--accum=2", out["b"]]),
            ("finetune", [*tune, "--batch-size=5", out["c"]]),
            ("finetune", [*tune, "--batch-size=5", "--freeze", out["d"]]), ("finetune", evaluation)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, tmp_path / "launcher.py", json.dumps(jobs)], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE})
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(tinymim, "color_jitter", lambda images, order, factors: images)
    tinymim.main([*distil, out["e"]])
    tinymim.main([*distil, "--batch-size=2", "--accum=4", out["f"]])
    finetune.main([*tune, out["g"]])
    for one, two in ("ef", "ea", "eb", "gc"):
        models, logs = ([read(tmp_path / name) for name in (one, two)] for read in (load, log_of))
        for model in (saved["model"] for saved in models):  # attention ignores the keys' bias: AdamW makes
            for name in model:                              # steps of what rounding leaves of no gradient
                if name.endswith("qkv.bias"):
                    model[name][24:48] = 0
        same(models[0]["model"], models[1]["model"], atol=5e-5)
        for a, b in zip(*logs):
            assert {k: a[k] for k in a if k not in ("images/s",)} == pytest.approx({k: b[k] for k in a if k != "images/s"}, rel=1e-4)
    capsys.readouterr()
    finetune.main(evaluation)
    assert capsys.readouterr().out.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert done.stdout.count("top-1") == 1
    finetune.main([*evaluation, f"--checkpoint={tmp_path / 'd' / 'last.pth'}"])  # each had its own statistics
    assert f"top-1 {log_of(tmp_path / 'd')[-1]['top1']:.3f}%" in capsys.readouterr().out

@pytest.mark.parametrize("first, then", [([], []), (["--workers=2"], ["--workers=2"]), ([], ["--workers=1"]),
                                         (["--amp=bf16"], ["--amp=bf16"]), (["--amp=fp16"], ["--amp=fp16"])])
def test_resuming_is_exact(either, first, then, tmp_path):
    """Bit for bit, with drop path, whatever the number of workers, after an interruption in epoch 3 of 4."""
    main, options = either
    options += ["--epochs=4", "--drop-path=0.2"]
    main([*options, *first, f"--out={tmp_path / 'whole'}"])
    interrupt(main, [*options, *then], epochs=2)
    assert load(tmp_path / "run")["epoch"] == 2
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": 1, "lo')  # the history is in the checkpoint too
    main([*options, *then, "--resume"])
    same(result(tmp_path / "run"), result(tmp_path / "whole"))
    if "--amp=fp16" in first:
        assert load(tmp_path / "run")["scaler"]["_growth_tracker"] > 0

def forked(main, options, seconds=None, replacement=None):
    """main(options) in a forked process, killed after so many seconds, or before its n-th os.replace()."""
    child = os.fork()
    if child == 0:
        try:
            tinymim.tqdm.set_lock(threading.RLock())  # tqdm's own is shared: a killed process would keep it
            sys.stdout = sys.stderr = open(os.devnull, "w")
            count, replace = itertools.count(1), os.replace
            os.replace = lambda *args: os.kill(os.getpid(), 9) if next(count) == replacement else replace(*args)
            main(options)
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)

def test_a_kill_loses_nothing(either, tmp_path):
    """Before each step of saving, and at random moments, up to three in a run."""
    main, options = either
    options += ["--drop-path=0.2"]
    began = time.perf_counter()
    forked(main, [*options, f"--out={tmp_path / 'whole'}"])
    lasts, generator = time.perf_counter() - began, random.Random(0)
    moments = [generator.uniform(0.2, 0.8) * lasts for _ in range(KILLS // 2)]
    kills = [[dict(seconds=moment) for moment in moments[i:i + 3]] for i in range(0, len(moments), 3)]
    for kills_of_run in [[dict(replacement=number)] for number in range(1, 5)] + kills:
        for kill in [*kills_of_run, {}]:
            started = os.path.exists(tmp_path / "run" / "last.pth")
            if not started:
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
            forked(main, options + ["--resume"] * started, **kill)
        same(result(tmp_path / "run"), result(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "run")

class Mean(nn.Module):
    """An objective that is not TinyMIM's."""
    def __init__(self, unused):
        super().__init__()
        self.student, self.map = ViT(**SMALL), nn.Linear(24, 2)
        self.extra = nn.Parameter(torch.zeros(3), requires_grad=unused)

    def forward(self, student_images, teacher_images):
        return {"mean": self.map(self.student(student_images)).square().mean()}

def test_another_objective(distil, tmp_path):
    """It is trained, saved and resumed; a parameter that the loss does not depend on is named."""
    options = distil + ["--epochs=2", "--blr=1"]

    def train(options, unused=False):
        tinymim.train(args_of(tinymim, *options), lambda args: Mean(unused), draw=lambda *_: None)

    train(options + [f"--out={tmp_path / 'whole'}"])
    interrupt(train, options, epochs=1)
    train(options + ["--resume"])
    same(result(tmp_path / "run"), result(tmp_path / "whole"))
    log = log_of(tmp_path / "run")
    assert log[1]["mean"] == log[1]["loss"] < 0.5 * log[0]["mean"] and "map.weight" in load(tmp_path / "run")["objective"]
    with pytest.raises(UserError, match="depend on extra"):
        train(options + [f"--out={tmp_path / 'unused'}"], unused=True)

# ---- Errors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("says, options", [
    ("5", ["--heads=5"]), ("relation heads", ["--relation-heads=7"]), ("blocks 1 to 4", ["--teacher-block=9"]),
    ("8", ["--img-size=30"]), ("mae_large", ["--teacher=mae_bass"]), ("/nonexistent", ["--data=/nonexistent"]),
    ("--epochs 0", ["--epochs=0"]), ("updates of 0", ["--batch-size=0"]), ("100 of 24", ["--batch-size=100"]),
    ("updates of 80 of 24", ["--accum=10"]), ("last.pth", ["--resume"]), ("--device cpu", ["--device=cuda"]),
    ("--blr", ["--blr=1e30", "--warmup-epochs=0"]), ("Not a directory", ["--out=/dev/null/run"]),
    ("no .jpg, .png or .webp images", ["--data=."]),
])
def test_usage_errors(distil, tmp_path, monkeypatch, says, options):
    if "--device=cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    fails(tinymim.main, distil + options, says)

@pytest.mark.parametrize("name", ["last.pth", "best.pth", "log.jsonl", "relations.png"])
def test_a_run_is_never_overwritten(either, tmp_path, name):
    main, options = either
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    fails(main, options, "holds a run", name, str(tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == [name] and (tmp_path / "run" / name).read_text() == "precious"

def test_resuming_another_network(either, tmp_path):
    main, options = either
    main(options)
    before = (tmp_path / "run" / "last.pth").read_bytes()
    for other in (["--dim=48"], ["--depth=2"], ["--depth=4"], *([["--pool=token"]] if main is finetune.main else [])):
        fails(main, [*options, "--epochs=4", "--resume", *other], "another network")
    assert (tmp_path / "run" / "last.pth").read_bytes() == before

@pytest.mark.parametrize("message, says", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", "--batch-size"),
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
     "out of shared memory. Please try to raise your shared memory limit.", "--shm-size"),
    ("unable to allocate shared memory(shm) for file </torch_7>: Success (0)", "--shm-size"),
    ("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0", "disk full"),
    ("File not found or corrupted.", "again"),  # torchvision, if a download broke off
])
def test_advice(distil, monkeypatch, message, says):
    def trouble(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(tinymim, "two_views", trouble)
    fails(tinymim.main, distil, says)
    monkeypatch.setattr(tinymim, "two_views", lambda *_: trouble(message := "a bug"))

def test_memory_that_does_not_suffice(distil, monkeypatch):
    monkeypatch.setattr(tinymim, "two_views", lambda crops: torch.empty(2**60))
    fails(tinymim.main, distil, "out of memory", "--batch-size", "--accum")
    decode = tinymim.decode  # a worker that the system kills
    monkeypatch.setattr(tinymim, "decode", lambda path: os.kill(os.getpid(), 9) if get_worker_info() else decode(path))
    fails(tinymim.main, distil + ["--workers=1"] + [f"--out={distil[8][6:]}2"], "--workers")

def test_a_full_disk_loses_nothing(distil, tmp_path):
    tinymim.main(distil + ["--epochs=1"])
    before, limits = (tmp_path / "run" / "last.pth").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (50_000, 200_000, len(before) - 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # writing past it fails, as on a full disk
        try:
            fails(tinymim.main, distil + ["--epochs=2", "--resume"], "disk full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "run" / "last.pth").read_bytes() == before
    tinymim.main(distil + ["--epochs=2", "--resume"])
    assert load(tmp_path / "run")["epoch"] == 2

def test_no_network(distil, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    fails(tinymim.main, distil + ["--teacher=mae_large"], "cannot load mae_large", "refused")
    fails(tinymim.main, distil + ["--data=imagenette"], "refused")
    assert os.listdir(tmp_path / "data") == []

@pytest.mark.parametrize("name", ["tinymim", "finetune"])
def test_ctrl_c_while_importing(name):
    process = script(name, "--help")
    wait_for(process, lambda: "libtorch" in open(f"/proc/{process.pid}/maps").read())
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT

def test_ctrl_c_in_training(distil, tmp_path):
    with open(tmp_path / "stderr", "w+") as stderr:
        process = script("tinymim", *distil, "--epochs=9999", "--workers=2", stderr=stderr)
        wait_for(process, (tmp_path / "run" / "last.pth").exists)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=5) == 130
        stderr.seek(0)
        text = stderr.read()
    assert "Traceback" not in text and text.count("stopped") == 1 and "--resume" in text.splitlines()[-1]
    tinymim.load_teacher(str(tmp_path / "run" / "last.pth"))

def test_odd_terminals(distil, tmp_path):
    """An encoding that cannot show a path, stderr closed, stdout closed early; and an error, in one line."""
    outs = [tmp_path / name for name in ("ünïcode", "deaf", "headless", "error")]
    options = [[*distil, "--epochs=1", f"--out={out}"] for out in outs]
    closed = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, os.path.join(HERE, "tinymim.py"), *options[1]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [script("tinymim", *options[0], env={"PYTHONIOENCODING": "ascii"}),
                 subprocess.Popen(closed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env),
                 script("tinymim", *options[2], "--epochs=200"),
                 script("finetune", "--checkpoint=none", "--data=/ünïcode", f"--out={outs[3]}", env={"PYTHONIOENCODING": "ascii"})]
    processes[2].stdout.close()
    error = processes[2].stderr.read()
    assert processes[2].wait() == 1 and "Traceback" not in error and "BrokenPipe" not in error
    said = [process.communicate() for process in processes if process is not processes[2]]
    assert [process.returncode for process in processes] == [0, 0, 1, 1], said
    assert (outs[0] / "last.pth").exists() and (outs[1] / "last.pth").exists() and "fcode" in said[0][0]
    assert said[2][0] == "" and re.fullmatch(r"finetune.py: error: .*fcode.*\n", said[2][1])

# ---- finetune.py -------------------------------------------------------------------------------------------

def test_golden_classifier():
    model = filled(finetune.Classifier(192, 12, 3), "ft.", also=["pos_embed"])
    with torch.no_grad():
        logits = model(2 * fill("images", 2, 3, 224, 224))
    expected = [0.07162610234623845, 0.5291574265645436, -0.8211863038311218, 0.9171481237313825]
    assert logits[0, :4].tolist() == pytest.approx(expected, abs=1e-9)
    assert logits[1].argmax() == 323 and sum(p.numel() for p in model.parameters()) == 5717416
    new = model.state_dict().keys() - ViT(192, 12, 3).state_dict().keys()
    assert new == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}

def test_golden_layer_decay():
    model = finetune.Classifier(192, 12, 3)
    groups = {id(p): (group["lr_scale"], group["weight_decay"])
              for group in finetune.parameter_groups(model, 0.05, 0.65) for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, expected in {
        "cls_token": (0.003697205891, 0.0), "pos_embed": (0.003697205891, 0.0),
        "patch_embed.proj.weight": (0.003697205891, 0.05), "patch_embed.proj.bias": (0.003697205891, 0.0),
        "blocks.0.norm1.weight": (0.005688009063, 0.0), "blocks.0.attn.qkv.weight": (0.005688009063, 0.05),
        "blocks.5.mlp.fc1.bias": (0.049022278906, 0.0), "blocks.11.mlp.fc2.weight": (0.65, 0.05),
        "fc_norm.weight": (1.0, 0.0), "head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0),
    }.items():
        assert groups[id(model.get_parameter(name))] == pytest.approx(expected, abs=1e-9), name

@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timm_agrees(pool):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = finetune.Classifier(192, 12, 3, pool=pool).eval()
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool=pool).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

def evaluated(capsys, *options):
    """(images, classes, top-1, top-5, loss) that --eval prints."""
    finetune.main([*map(str, options), "--eval", "--device=cpu", "--workers=0"])
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.search(r"on (\d+) images of (\d+) classes .*top-1 (.*)%, top-5 (.*)%, loss (.*)", line)
    return tuple(map(float, found.groups()))

def counted(checkpoint, folder, columns):
    """The same, counted by hand. columns: the numbers of the folder's classes in the model."""
    model = finetune.Classifier(24, 3, 2, len(checkpoint["config"]["classes"]), 8, 32).eval()
    model.load_state_dict(checkpoint["model"])
    right = images = loss = 0
    for label, name in enumerate(sorted(os.listdir(folder))):
        for path in (folder / name).iterdir():
            image = v2.functional.resize(tinymim.decode(str(path)), 36, InterpolationMode.BICUBIC)
            with torch.no_grad():
                logits = model(tinymim.normalize(image[None, :, 2:-2, 2:-2] / 255))[0, columns]
            right, images = right + int(logits.argmax() == label), images + 1
            loss -= logits.log_softmax(0)[label].item()
    return images, label + 1, pytest.approx(100 * right / images, abs=1e-3), 100, pytest.approx(loss / images, abs=1e-4)

def test_finetuning_learns_and_is_evaluated_exactly(tune, pictures, tmp_path, capsys):
    finetune.main(tune + ["--epochs=12"])
    log, run, data = log_of(tmp_path / "run"), tmp_path / "run", f"--data={pictures}"
    assert list(log[0]) == ["epoch", "loss", "lr", "images/s", "top1", "top5", "val_loss"]
    assert log[-1]["top1"] > 60 and load(run)["config"]["classes"] == ["blue", "green", "red"]
    assert load(run)["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert sorted(os.listdir(run)) == ["augmented.png", "best.pth", "last.pth", "log.jsonl"]
    for name in ("last.pth", "best.pth"):
        exact = evaluated(capsys, f"--checkpoint={run / name}", data)
        assert exact == counted(load(run, name), pictures / "val", [0, 1, 2])
        best = max(record["top1"] for record in log)
        assert exact[2] == pytest.approx(best if name == "best.pth" else log[-1]["top1"], abs=1e-3)
    assert exact[4] == pytest.approx(log[load(run, "best.pth")["epoch"] - 1]["val_loss"], abs=1e-4)

    some, model = tmp_path / "some", load(run)  # a folder that lacks a class: it chooses among the others
    for name in ("green", "red"):
        shutil.copytree(pictures / "val" / name, some / name)
    exact = counted(model, some, [1, 2])
    assert evaluated(capsys, f"--checkpoint={run / 'last.pth'}", f"--data={some}") == exact
    torch.save({"model": model["model"]}, tmp_path / "bare.pth")  # MAE's files do not tell the classes
    bare = [f"--checkpoint={tmp_path / 'bare.pth'}", "--heads=2", f"--data={some}"]
    fails(finetune.main, [*bare, "--eval"], "--class-names")
    assert evaluated(capsys, *bare, f"--class-names={pictures / 'train'}") == exact
    (some / "red").rename(some / "violet")
    fails(finetune.main, [f"--checkpoint={run / 'last.pth'}", "--eval", f"--data={some}"], str(some))

def test_what_finetuning_starts_from(distil, pictures, tmp_path):
    """All of our last.pth but its norm, and a new head; of a fine-tuned one the head too, for the same classes."""
    tinymim.main(distil + ["--epochs=1"])
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    for split in ("train", "val"):
        (other / split / "red").rename(other / split / "violet")
    options = [f"--data={pictures}", *QUICK[1:3], "--epochs=1", "--batch-size=10", "--blr=0", "--min-lr=0"]

    def tuned(start, name, *more):
        finetune.main([f"--checkpoint={tmp_path / start / 'last.pth'}", f"--out={tmp_path / name}", *options, *more])
        return load(tmp_path / name)["model"]

    student, first = load(tmp_path / "run")["model"], tuned("run", "first", "--seed=1")
    same({k: t for k, t in first.items() if k in student}, {k: t for k, t in student.items() if k in first})
    assert first.keys() - student.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    same(tuned("first", "again"), first)
    changed = tuned("first", "changed", f"--data={other}")
    assert not torch.equal(changed.pop("head.weight"), first.pop("head.weight"))
    same(changed, first)
    token = tuned("run", "token", "--pool=token", "--img-size=64")
    assert token["pos_embed"].shape == (1, 65, 24) and "norm.weight" in token
    fails(finetune.main, [f"--checkpoint={tmp_path / 'run' / 'last.pth'}", "--eval", options[0]], "no head")

def test_linear_probe_trains_the_head_alone(tune, pictures, tmp_path, capsys):
    finetune.main(tune + ["--freeze", "--epochs=1", f"--out={tmp_path / 'start'}", "--blr=0"])
    finetune.main(tune + ["--freeze", "--epochs=6"])
    before, after = load(tmp_path / "start")["model"], load(tmp_path / "run")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {f"head_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == statistics | {"head.weight", "head.bias"}
    log = log_of(tmp_path / "run")
    assert log[-1]["top1"] > 50
    exact = evaluated(capsys, f"--checkpoint={tmp_path / 'run' / 'last.pth'}", f"--data={pictures}")
    assert exact[2::2] == pytest.approx((log[-1]["top1"], log[-1]["val_loss"]), abs=1e-3)

def test_recipes_follow_the_size():
    for size, freeze, expected in [
        ("tiny", [], dict(epochs=300, warmup_epochs=5, blr=1e-3, layer_decay=0.85, drop_path=0.0, augment="light")),
        ("small", [], dict(epochs=200, blr=1e-3, layer_decay=0.75, drop_path=0.1, augment="strong", pool="avg")),
        ("base", [], dict(epochs=100, warmup_epochs=5, blr=5e-4, layer_decay=0.65, drop_path=0.2, min_lr=1e-6)),
        ("base", ["--freeze"], dict(epochs=90, warmup_epochs=10, weight_decay=0.0, pool="token", augment="crop")),
        ("base", ["--layer-decay=1", "--drop-path=0"], dict(layer_decay=1, drop_path=0, weight_decay=0.05)),
    ]:
        args = args_of(finetune, "--checkpoint=x", *freeze)
        finetune.fill_in_recipe(args, tinymim.STUDENTS[size][0])
        assert vars(args) | expected == vars(args), size
    for freeze, std, pool in (([], 2e-5, "avg"), (["--freeze"], 0.01, "token")):
        model = finetune.build(args_of(finetune, "--checkpoint=none", *freeze), list("abcdefg"))
        assert model.head.weight.std().item() == pytest.approx(std, rel=0.1) and model.config["pool"] == pool
        assert (model.dim, model.depth, model.heads, model.img_size) == (192, 12, 3, 224)
    rates = [block.drop_path.p for block in finetune.Classifier(24, 3, 2, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])

def test_label_smoothing():
    """A tenth of the target is spread over all classes."""
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    expected = -(torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]]) * logits.log_softmax(1)).sum()
    torch.testing.assert_close(finetune.Supervised(nn.Identity(), 0.1, False)(logits, target)["loss"], expected)

def test_a_quarter_passes_randaugment_untouched():
    """Each of two operations is applied with probability 1/2; torchvision's list has one that does nothing."""
    torch.manual_seed(0)
    steps = finetune.train_transform(32, 0.08, "strong").transforms
    ramp = torch.linspace(60, 180, 32).expand(32, 32)
    image = torch.stack([ramp, ramp.T, ramp.flip(1)]).round().byte()
    untouched = sum(torch.equal(v2.Compose(steps[2:])(image), image) for _ in range(1000)) / 1000
    assert 0.25 < untouched < 0.38
    for augment, magnitude in (("strong", 27), ("light", 30)):
        operations = [step.transforms[0] for step in finetune.train_transform(32, 0.08, augment).transforms
                      if isinstance(step, v2.RandomApply)]
        for operation in operations:
            assert operation.interpolation == InterpolationMode.BICUBIC
            assert (operation.num_ops, operation.magnitude, operation.num_magnitude_bins) == (1, magnitude, 31)
    assert len(operations) == 2 and len(finetune.train_transform(32, 0.08, "crop").transforms) == 2

def test_erasing_and_mixing():
    torch.manual_seed(0)
    crops, labels = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16) * 60, torch.arange(4)
    augment = finetune.Augment(4, "strong")
    augment.mix, erased, noise = None, 0, []
    for _ in range(100):
        images, targets = augment(crops, labels)
        changed = (images != tinymim.normalize(crops / 255)).any(dim=1)
        for image, where in zip(images, changed):
            if where.any():
                erased += 1
                rows, columns = where.any(dim=1).nonzero(), where.any(dim=0).nonzero()
                box = image[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
                assert where.sum() == box[0].numel() <= 256 / 3 + 16
                noise.append(box.flatten())
    noise = torch.cat(noise)
    assert 0.2 < erased / 400 < 0.3 and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(targets.argmax(1), labels)

    mixed = cut = 0
    augment = finetune.Augment(4, "strong")
    augment.erase.p = 0.0
    for _ in range(60):
        images, targets = augment(crops, labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        flat = (images.amax((2, 3)) - images.amin((2, 3)) < 1e-4).all()
        mixed, cut = mixed + int(flat and targets.max() < 0.999), cut + int(not flat)
    assert mixed > 10 and cut > 10
    assert [(type(mix).__name__, mix.alpha) for mix in augment.mix.transforms] == [("MixUp", 0.8), ("CutMix", 1.0)]
    images, targets = finetune.Augment(4, "crop")(crops, labels)
    assert torch.equal(images, tinymim.normalize(crops / 255)) and torch.equal(targets, torch.eye(4, dtype=torch.long))

@pytest.mark.parametrize("says, options", [
    ("No such file", ["--checkpoint=missing.pth"]), ("--heads", ["--checkpoint={teacher}"]),
    ("no head", ["--checkpoint={teacher}", "--eval", "--heads=4"]), ("8", ["--img-size=30"]),
    ("100 of 60", ["--batch-size=100"]), ("updates of 0", ["--batch-size=0"]), ("--epochs 0", ["--epochs=0"]),
    ("/nonexistent", ["--data=/nonexistent"]), ("val", ["--data={no_val}"]), ("red", ["--data={other}"]),
    ("yellow", ["--data={empty}"]), ("two at least", ["--data={single}"]), ("last.pth", ["--resume"]),
    ("cannot decode", ["--data={broken}"]), ("val/red/0.png", ["--data={broken}", "--workers=1"]),
])
def test_finetuning_errors(tune, teacher_file, pictures, tmp_path, says, options):
    folders = {name: tmp_path / name for name in ("no_val", "other", "empty", "single", "broken")}
    shutil.copytree(pictures / "train", folders["no_val"] / "train")
    for name in ("other", "empty", "broken"):
        shutil.copytree(pictures, folders[name])
    (folders["other"] / "val" / "red").rename(folders["other"] / "val" / "scarlet")
    (folders["empty"] / "train" / "yellow").mkdir()
    (folders["broken"] / "val" / "red" / "0.png").write_text("not an image")
    for split in ("train", "val"):
        shutil.copytree(pictures / split / "red", folders["single"] / split / "red")
    fails(finetune.main, tune + [option.format(teacher=teacher_file, **folders) for option in options], says)

# ---- README.md ---------------------------------------------------------------------------------------------

def test_readme_commands_have_options_that_exist():
    commands = re.findall(r"\b(?:python|torchrun)\b[^\n`]*? (tinymim|finetune)\.py\b([^\n`#|>]*)", README.replace("\\\n", ""))
    assert {name for name, _ in commands} == {"tinymim", "finetune"}
    for name, options in commands:
        try:
            args_of({"tinymim": tinymim, "finetune": finetune}[name], *shlex.split(options))
        except SystemExit as stopped:
            assert stopped.code == 0 or not options.strip(), (name, options)  # --help, or only its name

@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_readme_snippets_run(code, tmp_path, monkeypatch):
    """In a folder with a run of each script."""
    if re.search(r"^\s*(import|from) timm", code, flags=re.MULTILINE):
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snippet.py"])
    student, classifier = ViT(*tinymim.STUDENTS["tiny"]), finetune.Classifier(*tinymim.STUDENTS["tiny"], 10)
    for path, model, more in (("runs/tiny-mae_base/last.pth", student, {"relation_heads": 12}),
                              ("runs/finetune-tiny-mae_base/best.pth", classifier, {"classes": list("abcdefghij")})):
        os.makedirs(os.path.dirname(path))
        torch.save({"model": model.state_dict(), "config": model.config | more}, path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
