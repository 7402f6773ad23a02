"""Tests of tinymim.py and finetune.py: python -m pytest

The golden numbers were computed in float64 by the authors' code (TinyMIM, MAE) and timm, on weights and images that a
formula fills (`fill`), so that anyone can compute them again.
"""

import argparse
import ast
import doctest
import hashlib
import http.server
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import finetune
import tinymim
from tinymim import UserError, ViT, relation, relation_loss

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, "extras"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script may have started pytest deaf to Ctrl-C, and so its children
PAIRS = [a + b for a in "qkv" for b in "qkv"]


# ------------------------------------------------------------------------------------------------------------
# Things the tests share.


def fill(name, *shape):
    """Numbers in [-1, 1) that depend on the name alone: a 32-bit hash of the index and the name's CRC."""
    x = (2654435761 * np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return torch.from_numpy((x ^ (x >> 16)).astype(np.float64) / 2**31 - 1).view(shape)


def filled(module, prefix, also=()):
    """The module in float64, its parameters filled: norm weights 1 + 0.1u, others 0.08u, position embeddings as they are."""
    module = module.double().eval()
    for name, parameter in module.named_parameters():
        if "pos_embed" in name and name not in also:
            continue
        u = fill(prefix + name, *parameter.shape)
        parameter.data = 1 + 0.1 * u if "norm" in name and name.endswith("weight") else 0.08 * u
    return module


SMALL = dict(dim=24, depth=3, heads=2, patch_size=8, img_size=32)  # a ViT that a test can train
WIDER = SMALL | dict(dim=48, depth=4, heads=4)


def random_qkv(width, tokens=5, images=2, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(images, tokens, width, generator=generator, dtype=torch.float64) for _ in "qkv")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 24 smooth colourful pictures in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        small = np.random.RandomState(i).randint(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((50, 40), Image.BICUBIC).save(path)
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


@pytest.fixture
def command(photos, teacher_file, tmp_path):
    """Options of a distillation that takes a second; the test adds to them."""
    return [f"--teacher={teacher_file}", "--teacher-heads=4", f"--data={photos}", f"--out={tmp_path / 'run'}", "--dim=24", "--depth=3",
            "--heads=2", "--batch-size=8", "--epochs=3", "--blr=0.05", "--workers=1", "--device=cpu"]


def run(*options, script="tinymim.py", processes=1, env=None):
    """The script in a process of its own, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, os.path.join(HERE, script), *map(str, options)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})})


def fails(capsys, code, *says, main=tinymim.main, options):
    """main(options) exits with this code and one line, which holds all of `says`."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, options)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stopped.value.code == code and len(lines) == 1, lines
    for text in says:
        assert text in lines[0]
    return lines[0]


def model_of(folder):
    return torch.load(os.path.join(folder, "last.pth"), weights_only=True)["model"]


def log_of(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text: f"{name}: {text}", **tolerance)


EXACT = dict(rtol=0, atol=0)
CPU = tinymim.Machine(torch.device("cpu"), torch.float32, compile=False, fused=False, workers=0, rank=0, local_rank=0, world=1)


# ------------------------------------------------------------------------------------------------------------
# The method.


def test_golden_distillation():
    student = filled(ViT(192, 12, heads=6), "student.")  # six heads: the authors' ViT-Tiny, in pre-training
    teacher = filled(ViT(768, 12, heads=12), "teacher.").requires_grad_(False)
    images = 2 * fill("images", 2, 3, 224, 224)
    objective = tinymim.TinyMIM(student, teacher, teacher_block=12, relation_heads=12, relations=["qk", "vv"]).eval()
    losses = objective(images, images)
    assert losses["qk"].item() == pytest.approx(0.5928374293135243, abs=1e-9)
    assert losses["vv"].item() == pytest.approx(1.1960328201657833, abs=1e-9)

    q, k, v = teacher.qkv(images, 12)
    qk, vv = relation(q, k, 12).exp(), relation(v, v, 12).exp()
    expected = [0.025767710213393306, 0.0063212661906894615, 0.0011469206929298828, 0.006966831556327835]
    assert qk[0, 3, 5, :4].tolist() == pytest.approx(expected, abs=1e-9)
    expected = [0.4439084161298033, 0.0012602242768500699, 0.0018377878317098937, 0.014642534735222338]
    assert vv[1, 0, 0, :4].tolist() == pytest.approx(expected, abs=1e-9)

    sum(losses.values()).backward()
    for name, norm in {
        "patch_embed.proj.weight": 0.11115307933877165, "cls_token": 0.002232637522656957,
        "blocks.0.attn.qkv.weight": 0.04350811949481605, "blocks.5.mlp.fc1.weight": 0.04943361111423365,
        "blocks.11.attn.qkv.weight": 0.16885630650605676, "blocks.11.norm1.bias": 0.013599193696380758,
    }.items():
        assert student.get_parameter(name).grad.norm().item() == pytest.approx(norm, abs=1e-9)
    without = {name for name, p in student.named_parameters() if p.grad is None}
    behind = {f"blocks.11.{layer}.{kind}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "norm2") for kind in ("weight", "bias")}
    assert without == behind | {"norm.weight", "norm.bias", "pos_embed"}
    assert not any(p.requires_grad for name, p in student.named_parameters() if name in without)


def test_golden_position_embeddings():
    embeddings = tinymim.sincos_pos_embed(768, 14)[0]
    assert embeddings.dtype == torch.float32 and embeddings.shape == (197, 768) and embeddings[0].abs().sum() == 0
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
        for image in range(2):
            for head in range(heads):
                for row in range(5):
                    p, log_q = [], []
                    for qkv, out in ((teacher, p), (student, log_q)):
                        width = qkv[0].shape[2] // heads
                        x, y = (qkv["qkv".index(letter)][image, :, head * width:(head + 1) * width] for letter in (a, b))
                        logits = [float(x[row] @ y[column]) / math.sqrt(width) for column in range(5)]
                        out += [logit - math.log(sum(map(math.exp, logits))) for logit in logits]
                    total += sum(math.exp(lp) * (lp - lq) for lp, lq in zip(p, log_q))
        assert losses[a + b].item() == pytest.approx(total / (2 * heads * 5), abs=1e-12)


def test_what_relation_loss_and_the_objective_do_not_take():
    heads_apart = [torch.randn(2, 4, 5, 6) for _ in "qkv"]
    with pytest.raises(ValueError, match="heads joined"):
        relation_loss(heads_apart, heads_apart, 4)
    with pytest.raises(ValueError, match="needs a teacher"):
        tinymim.TinyMIM(ViT(**SMALL))


def test_defaults_of_the_objective():
    """The last block of a teacher as deep, else that at 3/4; its heads, or those it was distilled with; and it is frozen."""
    student, teacher = ViT(**SMALL), ViT(**SMALL | dict(dim=48, depth=8, heads=4))
    objective = tinymim.TinyMIM(student, teacher)
    assert (objective.teacher_block, objective.relation_heads) == (6, 4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher = ViT(**SMALL | dict(dim=48, heads=4))
    teacher.relation_heads = 3
    objective = tinymim.TinyMIM(student, teacher)
    assert (objective.teacher_block, objective.relation_heads) == (3, 3)


def test_student_equal_to_teacher_has_no_loss():
    student = tuple(x.requires_grad_() for x in random_qkv(12, seed=3))
    loss = sum(relation_loss(student, student, 3, PAIRS).values())
    loss.backward()
    assert loss.item() == 0 and all(x.grad.abs().max() < 1e-16 for x in student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(dtype):
    """Logits of ±1e4, under autocast too, where softmax().log() is -inf and a product in fp16 overflows."""
    student, teacher = (tuple(x.to(dtype) for x in random_qkv(64, seed=seed, scale=120.0)) for seed in (4, 5))
    student = tuple(x.requires_grad_() for x in student)
    logits = student[0].detach().float() @ student[0].detach().float().transpose(1, 2) / 8
    assert logits.abs().max() > 1e4
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16):
        losses = relation_loss(student, teacher, 1, PAIRS)
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(x.grad.isfinite().all() for x in student)


def test_autocast_keeps_the_loss():
    torch.manual_seed(0)
    student, teacher = ViT(**SMALL), ViT(**WIDER).requires_grad_(False)
    objective, images = tinymim.TinyMIM(student, teacher, 4, 4), torch.randn(2, 3, 32, 32)
    exact = sum(objective(images, images).values())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sum(objective(images, images).values())
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_qkv_computes_nothing_after_it():
    vit, images = ViT(**SMALL), torch.randn(2, 3, 32, 32)
    expected = vit.blocks[1].qkv(vit.blocks[0](vit.tokens_entering(1, images)))
    for module in (vit.blocks[1].attn.proj, vit.blocks[1].norm2, vit.blocks[1].mlp, vit.blocks[2], vit.norm):
        module.forward = None  # calling it would raise
    q, k, v = vit.qkv(images, 2)
    assert q.shape == k.shape == v.shape == (2, 17, 24)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), expected))


def test_sizes():
    assert ViT(**SMALL)(torch.randn(2, 3, 32, 32)).shape == (2, 17, 24)
    for wrong in (dict(img_size=30), dict(heads=5), dict(dim=6)):
        with pytest.raises(ValueError, match="divide"):
            ViT(**SMALL | wrong)
    with pytest.raises(ValueError, match="blocks 1 to 4"):
        tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER), 5, 4)
    with pytest.raises(ValueError, match="try --relation-heads 4"):
        tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER), 4, 5)
    with pytest.raises(ValueError, match="same patches"):
        tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER | dict(img_size=40)), 4, 4)


def test_teacher_stays_frozen_and_in_eval_mode():
    objective = tinymim.TinyMIM(ViT(**SMALL), ViT(**WIDER).requires_grad_(False), 4, 4)
    objective.train()
    assert objective.student.training and not objective.teacher.training
    images = torch.randn(2, 3, 32, 32)
    sum(objective(images, images).values()).backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("targets", [["relation"], ["relation", "feature", "cls", "pixel"]])
def test_compiled_objective_is_the_same(targets):
    """In one graph, with drop path, and the two views in another."""
    torch.manual_seed(0)
    networks = ViT(**SMALL, drop_path=0.1), ViT(**WIDER).requires_grad_(False)
    objective = tinymim.TinyMIM(*networks, 3, 4, targets=targets, mask_ratio=0.5 * ("pixel" in targets), decoder=(16, 1, 2)).eval()
    views, crops, jitter = tinymim.TwoViews(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[[0, 1, 2], [1.2, 0.9, 0.7]]] * 2)
    images, noise = views(crops, jitter), torch.rand(2, 16)
    expected = objective(*images, noise)
    objective.compile(fullgraph=True)
    views.compile(fullgraph=True)
    torch.testing.assert_close(views(crops, jitter)[0], images[0])
    same(objective(*images, noise), expected)
    images = images[0]
    losses = objective.train()(images, images)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


# ------------------------------------------------------------------------------------------------------------
# The teacher's checkpoints.


def test_every_kind_of_checkpoint_loads(tmp_path):
    torch.manual_seed(1)
    vit = ViT(**SMALL)
    images, tensors = torch.randn(1, 3, 32, 32), vit.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24), "decoder_pos_embed": torch.zeros(1, 17, 8),
               "decoder_blocks.0.norm1.weight": torch.ones(8)}
    for kind, content in {
        "encoder": {"model": tensors},
        "whole MAE": {"model": tensors | decoder},
        "authors'": {"model": tensors, "optimizer": {"state": {}}, "epoch": 1, "args": argparse.Namespace(lr=1.0)},
        "bare": tensors,
        "with a config that is not ours": {"model": tensors, "config": None},
        "saved from DDP": {f"module.{name}": t for name, t in tensors.items()},
        "float16": {name: t.half() for name, t in tensors.items()},
        "ours": {"model": tensors, "config": SMALL | {"relation_heads": 6}, "optimizer": {}, "epoch": 1},
    }.items():
        torch.save(content, tmp_path / "x.pth")
        teacher = tinymim.load_teacher(str(tmp_path / "x.pth"), heads=None if kind == "ours" else 2)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters()), kind
        tolerance = dict(rtol=0.1, atol=0.02) if kind == "float16" else EXACT
        torch.testing.assert_close(teacher(images), vit(images), **tolerance)
        assert (teacher.heads, teacher.relation_heads) == ((2, 6) if kind == "ours" else (2, 2))
        assert (teacher.dim, teacher.depth, teacher.patch_size, teacher.img_size) == (24, 3, 8, 32)


def test_heads_of_published_widths(tmp_path):
    for dim, heads in {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}.items():
        torch.save(ViT(dim, 1, heads, patch_size=16, img_size=32).state_dict(), tmp_path / "x.pth")
        assert tinymim.load_teacher(str(tmp_path / "x.pth")).heads == heads


def test_position_embeddings_of_another_size(tmp_path):
    torch.save(ViT(**SMALL).state_dict(), tmp_path / "x.pth")
    teacher = tinymim.load_teacher(str(tmp_path / "x.pth"), img_size=64, heads=2)
    small = tinymim.sincos_pos_embed(24, 4)
    patches = small[:, 1:].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, (8, 8), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 64, 24)
    torch.testing.assert_close(teacher.pos_embed, torch.cat([small[:, :1], expected], 1), **EXACT)
    assert teacher(torch.randn(1, 3, 64, 64)).shape == (1, 65, 24)


def test_checkpoints_that_do_not_load(tmp_path):
    tensors = ViT(**SMALL).state_dict()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code-ran"),)

    for content, says in [
        ({k: t for k, t in tensors.items() if k != "blocks.1.norm2.bias"}, "lacks blocks.1.norm2.bias"),
        ({k: t for k, t in tensors.items() if "mlp" not in k}, "lacks blocks.0.mlp.fc1.weight and 11 more"),
        (tensors | {"cls_token": torch.zeros(1, 1, 25)}, "another shape of cls_token"),
        (tensors | {"blocks.0.ls1.gamma": torch.zeros(24)}, "blocks.0.ls1.gamma"),
        ({k: t for k, t in tensors.items() if "blocks" not in k}, "holds no ViT as MAE has it: blocks"),
        (tensors | {"pos_embed": torch.zeros(1, 12, 24)}, "square of patches"),
        (tensors | {"pos_embed": torch.zeros(17, 24)}, "square of patches"),
        ({"weight": torch.zeros(3)}, "no ViT under MAE's parameter names"),
        ([1, 2], "no ViT under MAE's parameter names"),
        ({"model": tensors, "args": Evil()}, "not a whole PyTorch checkpoint"),
        (b"\xff\xd8 a photo", "not a whole PyTorch checkpoint"),
        (b"", "not a whole PyTorch checkpoint"),
        (None, "no such file"),
    ]:
        path = tmp_path / "x.pth"
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=says) as error:
            tinymim.load_teacher(str(path), heads=2)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "code-ran").exists()
    torch.save(tensors, path)
    with pytest.raises(UserError, match="--teacher-heads"):
        tinymim.load_teacher(str(path))
    with pytest.raises(UserError, match="divide into patches"):
        tinymim.load_teacher(str(path), heads=2, img_size=30)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; /short/ promises more than it sends, as a connection that breaks does."""

    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if not self.path.startswith("/short/"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"only this")

    def log_message(self, *_):
        pass


def test_download(tmp_path, monkeypatch):
    """Once, checked, and nothing broken is kept: over HTTP and from file:// URLs."""
    (tmp_path / "web").mkdir()
    published = tmp_path / "web" / "mae_tiny.pth"
    torch.save({"model": ViT(192, 1, 3, img_size=32).state_dict()}, published)
    md5 = hashlib.md5(published.read_bytes()).hexdigest()[:6]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Server(*a, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    web, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "hub" / "checkpoints"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    teachers = {}
    monkeypatch.setattr(tinymim, "TEACHERS", teachers)

    for url, checksum, says in [
        (f"{web}/short/mae_tiny.pth", md5, "is broken: try again"),
        (f"{web}/mae_tiny.pth", "000000", "is broken: try again"),
        (f"{web}/missing/mae_tiny.pth", md5, "404"),
        ("http://127.0.0.1:9/mae_tiny.pth", md5, f"fetch it elsewhere and put it at {cache / 'mae_tiny.pth'}"),
    ]:
        teachers["x"] = (url, checksum)
        with pytest.raises(UserError, match=says):
            tinymim.load_teacher("x")
        assert list(cache.iterdir()) == []

    teachers["x"] = (f"{web}/mae_tiny.pth", md5)
    Server.requests.clear()
    assert tinymim.load_teacher("x").dim == tinymim.load_teacher("x").dim == 192
    assert Server.requests == ["/mae_tiny.pth"] and [path.name for path in cache.iterdir()] == ["mae_tiny.pth"]
    server.shutdown()

    (cache / "mae_tiny.pth").write_bytes(b"put there by hand, wrongly")
    with pytest.raises(UserError, match="delete it"):
        tinymim.load_teacher("x")
    (cache / "mae_tiny.pth").unlink()
    teachers["x"] = (published.as_uri(), md5)
    assert tinymim.load_teacher("x").depth == 1


# ------------------------------------------------------------------------------------------------------------
# Data.


def test_odd_files_are_ordinary(tmp_path):
    """Whatever the kind of file and its name: the same picture."""
    noise = np.random.RandomState(0).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((50, 40), Image.BICUBIC)
    gray = np.asarray(photo.convert("L"))
    with_alpha = photo.copy()
    with_alpha.putalpha(128)
    for name, image, kind, expected in [
        ("rgb.JPEG", photo, "JPEG", photo), ("png.JPEG", photo, "PNG", photo), ("bmp.bmp", photo, "BMP", photo),
        ("bmp.JPEG", photo, "BMP", photo), ("tiff.tif", photo, "TIFF", photo), ("cmyk.jpg", photo.convert("CMYK"), "JPEG", photo),
        ("gray.jpg", photo.convert("L"), "JPEG", photo.convert("L")), ("alpha.png", with_alpha, "PNG", photo),
        ("palette.png", photo.convert("P"), "PNG", photo.convert("P")), ("16bit.png", Image.fromarray(gray.astype(np.uint16) * 257), "PNG",
                                                                           Image.fromarray(gray)),
        ("gif.png", photo.convert("P"), "GIF", photo.convert("P")), ("webp.webp", photo, "WEBP", photo),
    ]:
        image.save(tmp_path / name, kind)
        decoded = tinymim.decode(str(tmp_path / name))
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, 40, 50), name
        difference = np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected.convert("RGB")))
        assert difference.mean() < (4 if kind in ("JPEG", "WEBP") else 0.01), name


def test_finding_images(photos, tmp_path):
    assert len(tinymim.find_images(str(photos))) == 24  # in photos/train
    nested = tmp_path / "a" / "b" / "ünïcode folder"
    nested.mkdir(parents=True)
    for name in ("2.PNG", "1.jpeg", "notes.txt"):
        (nested / name).touch()
    os.symlink(tmp_path, nested / "loop")
    assert [os.path.basename(os.fsdecode(path)) for path in tinymim.find_images(str(tmp_path))] == ["1.jpeg", "2.PNG"]


def test_color_jitter_is_torchvisions():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 9, 7)
    changes = [v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation]
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    factors = torch.empty(6, 3).uniform_(0.6, 1.4)
    jittered = tinymim.color_jitter(images, torch.stack([orders.float(), factors], dim=1))
    for image, order, factor, result in zip(images, orders, factors, jittered):
        for change, amount in zip(order, factor):
            image = changes[change](image, amount.item())
        torch.testing.assert_close(result, image, rtol=0, atol=2e-6)


def test_two_views_share_the_crop(photos):
    torch.manual_seed(0)
    crop, jitter = tinymim.CropAndJitter(32)(tinymim.decode(os.fsdecode(tinymim.find_images(str(photos))[0])))
    assert crop.dtype == torch.uint8 and crop.shape == (3, 32, 32) and sorted(jitter[0].tolist()) == [0, 1, 2]
    assert ((jitter[1] >= 0.6) & (jitter[1] <= 1.4)).all()
    student, teacher = tinymim.TwoViews()(crop[None], jitter[None])
    torch.testing.assert_close(teacher[0], v2.functional.normalize(crop / 255, tinymim.IMAGENET_MEAN, tinymim.IMAGENET_STD))
    assert not torch.equal(student, teacher)
    unchanged = torch.stack([jitter[0], torch.ones(3)])
    torch.testing.assert_close(tinymim.TwoViews()(crop[None], unchanged[None])[0], teacher)


def test_crops_depend_on_seed_epoch_and_image_only(photos):
    paths = tinymim.find_images(str(photos))

    def batches(workers, seed=0, epoch=0):
        args = argparse.Namespace(batch_size=8, accum=1, seed=seed)
        dataset = tinymim.ImageDataset(paths, tinymim.CropAndJitter(16), seed)
        loader = tinymim.make_loader(dataset, args, CPU._replace(workers=workers))
        loader.sampler.set_epoch(epoch)
        return torch.cat([crops for crops, _, _ in loader])

    first = batches(0)
    assert torch.equal(first, batches(2)) and not torch.equal(first, batches(0, seed=1)) and not torch.equal(first, batches(0, epoch=1))
    before = torch.get_rng_state()
    tinymim.ImageDataset(paths, tinymim.CropAndJitter(16))[0, 3]
    assert torch.equal(before, torch.get_rng_state())


def test_broken_files(photos, command, tmp_path, capsys):
    folder = tmp_path / "some-broken"
    shutil.copytree(photos, folder)
    whole = (folder / "train" / "class0" / "0.jpg").read_bytes()
    (folder / "train" / "class0" / "half.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "train" / "class0" / "text.jpg").write_text("not an image")
    tinymim.main(command + [f"--data={folder}"])
    said = capsys.readouterr().err
    assert said.count("half.jpg") == said.count("text.jpg") == 1 and said.count("cannot decode") == 2
    assert len(log_of(tmp_path / "run")) == 3

    for i in range(60):
        (folder / "train" / f"broken{i}.jpg").write_text("not an image")
    fails(capsys, 1, "could not be decoded", options=command + [f"--data={folder}", f"--out={tmp_path / 'other'}"])
    for path in (folder / "train").rglob("*.jpg"):
        path.write_text("not an image")
    fails(capsys, 1, "can be decoded", options=command + [f"--data={folder}", f"--out={tmp_path / 'another'}"])


# ------------------------------------------------------------------------------------------------------------
# Training, through the command line.


def test_a_run(command, tmp_path, capsys):
    tinymim.main(command + ["--epochs=8"])
    log = log_of(tmp_path / "run")
    assert list(log[0]) == ["epoch", "loss", "qq", "kk", "vv", "lr", "images/s", "peak_memory_gib"]
    assert [record["epoch"] for record in log] == list(range(1, 9)) and log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert all(record["loss"] == pytest.approx(record["qq"] + record["kk"] + record["vv"], rel=1e-5) for record in log)
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "last.pth", "log.jsonl", "relations.png"]
    assert Image.open(tmp_path / "run" / "relations.png").size == (2 + 7 * 114, 16 + 4 * 114)
    checkpoint = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert set(checkpoint) == {"model", "config", "optimizer", "scaler", "epoch", "rng", "args", "auxiliary", "best"}
    assert checkpoint["config"] == SMALL | {"relation_heads": 4} and checkpoint["epoch"] == 8
    student = tinymim.load_teacher(str(tmp_path / "run" / "last.pth"))  # a student is a valid teacher
    assert (student.heads, student.relation_heads) == (2, 4)
    out, err = capsys.readouterr()
    assert out.count("loss ") == 8 and "image/s" in err


def test_defaults_are_the_papers():
    args = tinymim.make_parser().parse_args([])
    assert tinymim.complete(args) == "tiny-mae_base"
    assert (args.target, args.relations, args.epochs, args.warmup_epochs) == (["relation"], ["qq", "kk", "vv"], 300, 15)
    assert (args.blr, args.min_lr, args.weight_decay, args.drop_path, args.teacher_drop_path) == (1.5e-4, 0.0, 0.05, 0.1, 0.0)
    assert (args.mask_ratio, args.accum, args.amp) == (0.0, 1, "auto")
    args = tinymim.make_parser().parse_args(["--target", "pixel"])  # MAE
    assert tinymim.complete(args) == "tiny-mae" and args.teacher is None
    assert (args.mask_ratio, args.epochs, args.warmup_epochs, args.drop_path, args.blr) == (0.75, 800, 40, 0.0, 1.5e-4)
    assert args.decoder == [512, 8, 16]


def test_weight_decay_groups():
    student = ViT(**SMALL)
    decayed, not_decayed = tinymim.parameter_groups(student, 0.05)
    names = {id(p): name for name, p in student.named_parameters()}
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.05, 0.0)
    assert "cls_token" in [names[id(p)] for p in decayed["params"]]
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in not_decayed["params"])
    assert len(decayed["params"]) + len(not_decayed["params"]) == len(names) - 1  # all but pos_embed


def test_updates_are_adamw_on_the_sum_of_the_losses(command, tmp_path, teacher_file, photos):
    """Three updates of the command are three of a plain loop of a few lines."""
    tinymim.main(command + ["--epochs=1", "--warmup-epochs=0.5", "--drop-path=0"])
    teacher = tinymim.load_teacher(str(teacher_file), heads=4)
    torch.manual_seed(hash((0, teacher.cls_token[0, 0, 0].item())))
    student = ViT(**SMALL)
    objective = tinymim.TinyMIM(student, teacher, 3, 4)
    optimizer = torch.optim.AdamW(tinymim.parameter_groups(student, 0.05), betas=(0.9, 0.95))
    dataset = tinymim.ImageDataset(tinymim.find_images(str(photos)), tinymim.CropAndJitter(32))
    sampler = tinymim.EpochSampler(dataset, 1, 0)
    for step, (*batch, _) in enumerate(torch.utils.data.DataLoader(dataset, 8, sampler=sampler)):
        for group in optimizer.param_groups:
            group["lr"] = tinymim.learning_rate(step / 3, 0.05 * 8 / 256, 0.5, 1)
        optimizer.zero_grad()
        sum(objective(*tinymim.TwoViews()(*batch)).values()).backward()
        optimizer.step()
    same(model_of(tmp_path / "run"), student.state_dict(), rtol=0, atol=1e-7)


def test_a_student_does_not_begin_as_its_teacher_began(photos, tmp_path):
    """Not with the same sizes and the same seed: then its relations would be right from the start."""
    quick = [f"--data={photos}", "--dim=24", "--depth=3", "--heads=2", "--epochs=1", "--batch-size=8", "--blr=0", "--workers=0", "--device=cpu"]
    tinymim.main([*quick, "--target=pixel", "--img-size=32", "--patch-size=8", "--decoder", "16", "1", "2", f"--out={tmp_path / 'teacher'}"])
    tinymim.main([*quick, f"--teacher={tmp_path / 'teacher' / 'last.pth'}", f"--out={tmp_path / 'student'}"])
    teacher, student = (model_of(tmp_path / name) for name in ("teacher", "student"))
    assert not any(torch.equal(teacher[name], student[name]) for name in teacher if name.endswith(("qkv.weight", "cls_token")))


def test_two_processes_and_accumulation_are_one_large_batch(command, tmp_path):
    command += ["--epochs=1", "--drop-path=0", "--warmup-epochs=0"]
    split = [(2, ["--batch-size=4"]), (1, ["--batch-size=2", "--accum=4"]), (2, ["--batch-size=2", "--accum=2"])]
    runs = [run(*command, *options, f"--out={tmp_path / str(i)}", processes=n) for i, (n, options) in enumerate(split)]
    tinymim.main(command)
    for i, process in enumerate(runs):
        assert process.wait() == 0, process.stderr.read()
        assert torch.load(tmp_path / str(i) / "last.pth")["epoch"] == 1
        models = [model_of(tmp_path / name) for name in (str(i), "run")]
        for model in models:
            for block in range(2):  # attention ignores the keys' bias: AdamW makes steps of what rounding leaves of no gradient
                model[f"blocks.{block}.attn.qkv.bias"][24:48] = 0
        same(*models, rtol=0, atol=2e-5)
        assert log_of(tmp_path / str(i))[0]["loss"] == pytest.approx(log_of(tmp_path / "run")[0]["loss"], rel=1e-5)


def test_resuming_is_exact(command, tmp_path, monkeypatch, capsys):
    """Bit for bit, with drop path and workers, after an interruption in the third of four epochs."""
    command += ["--epochs=4", "--drop-path=0.2"]
    tinymim.main(command + [f"--out={tmp_path / 'whole'}"])
    train_epoch = tinymim.train_epoch

    def interrupted(*args):
        if args[7] == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_epoch(*args)

    monkeypatch.setattr(tinymim, "train_epoch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        tinymim.main(command)
    assert stopped.value.code == 130 and "goes on after the last whole epoch" in capsys.readouterr().err
    assert len(log_of(tmp_path / "run")) == 2
    monkeypatch.setattr(tinymim, "train_epoch", train_epoch)
    tinymim.main([f"--out={tmp_path / 'run'}", "--resume", "--workers=2"])  # the other options are the run's own
    same(model_of(tmp_path / "run"), model_of(tmp_path / "whole"), **EXACT)
    timeless = [[{k: v for k, v in record.items() if k not in ("images/s", "peak_memory_gib")} for record in log_of(tmp_path / name)]
                for name in ("run", "whole")]
    assert timeless[0] == timeless[1]


def test_kill_leaves_a_checkpoint(command, tmp_path):
    command += ["--warmup-epochs=1"]
    process = run(*command, "--epochs=1000")
    log, last = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "last.pth"
    while not (log.exists() and len(log_of(tmp_path / "run")) >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = torch.load(last, weights_only=True)["epoch"]
    assert done >= 1
    tinymim.main([*command, f"--epochs={done + 1}", "--resume"])
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == list(range(1, done + 2))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_is_one_line(command, tmp_path, how):
    process = run(*command, "--epochs=1000", "--workers=2")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(how)
    out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err and "goes on after the last whole epoch" in err.splitlines()[-1]
    tinymim.load_teacher(str(tmp_path / "run" / "last.pth"))


def test_a_scheduler_that_stops_the_whole_group(command, tmp_path):
    """SIGTERM to the workers as well."""
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "tinymim.py"), *command, "--epochs=1000", "--workers=2"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err and "stopped" in err.splitlines()[-1]


def test_a_kill_in_the_middle_of_saving(command, tmp_path):
    """What a killed process had written stays beside the whole checkpoint, and goes with the next start."""
    tinymim.main(command + ["--epochs=1"])
    before = (tmp_path / "run" / "last.pth").read_bytes()

    def half(file):
        file.write(before[:1000])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        tinymim.replace_file(tmp_path / "run" / "last.pth", half)
    os.waitpid(child, 0)
    assert [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")]
    assert (tmp_path / "run" / "last.pth").read_bytes() == before
    tinymim.main(command + ["--epochs=2", "--resume"])
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")] and len(log_of(tmp_path / "run")) == 2


def test_half_precision_with_gradient_scaling_resumes_exactly(command, tmp_path):
    command += ["--amp=fp16", "--epochs=2"]
    tinymim.main(command + [f"--out={tmp_path / 'whole'}"])
    finite = log_of(tmp_path / "whole")[-1]["loss"]
    assert math.isfinite(finite)
    train_epoch, patch = tinymim.train_epoch, pytest.MonkeyPatch()
    with patch.context() as during:
        during.setattr(tinymim, "train_epoch", lambda *args: args[7] and signal.raise_signal(signal.SIGINT) or train_epoch(*args))
        with pytest.raises(SystemExit):
            tinymim.main(command)
    tinymim.main(command + ["--resume", "--fused"])
    whole, resumed = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "run"))
    assert whole["scaler"] == resumed["scaler"] and whole["scaler"]["scale"] > 1
    same(whole["model"], resumed["model"], rtol=0, atol=1e-5)  # fused AdamW rounds in another order


def test_two_runs_in_one_folder(command, tmp_path, capsys):
    process = run(*command, "--epochs=1000")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    try:
        fails(capsys, 1, "another process is at work", options=command + ["--resume", "--epochs=1000"])
    finally:
        process.kill()
    process.wait()


def test_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "last.pth"
    tinymim.replace_file(path, lambda file: torch.save({"epoch": 1}, file))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # writing past it fails as on a full disk
    try:
        with pytest.raises(UserError, match="cannot write .*last.pth .*File too large"):
            tinymim.replace_file(path, lambda file: torch.save({"epoch": torch.zeros(100_000)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pth"]


def test_without_a_gpu_it_says_what_is_quick(command, teacher_file, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tinymim.main([option for option in command if option.split("=")[0] not in ("--dim", "--depth", "--heads")] + ["--epochs=1", "--depth=1"])
    assert [line for line in capsys.readouterr().out.splitlines() if "no GPU" in line and "demo.py" in line]


def test_a_fine_tuned_checkpoint_is_no_teacher(tmp_path):
    torch.save(finetune.Classifier(24, 3, 2, 4, patch_size=8, img_size=32).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="fine-tuned"):
        tinymim.load_teacher(str(tmp_path / "x.pth"), heads=2)


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, capsys):
    fails(capsys, 1, "at step", "last good checkpoint is", options=command + ["--blr=1e30", "--warmup-epochs=0"])
    assert all(tensor.isfinite().all() for tensor in model_of(tmp_path / "run").values())


def test_a_run_is_never_overwritten(command, tmp_path, capsys):
    tinymim.main(command + ["--epochs=1"])
    before = (tmp_path / "run" / "last.pth").read_bytes()
    fails(capsys, 1, "already holds a run", "--resume", options=command)
    fails(capsys, 2, "--seed", "0", "1", options=command + ["--resume", "--epochs=1", "--seed=1"])
    fails(capsys, 1, "not one of this version of finetune.py", main=finetune.main, options=["--resume", f"--out={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


@pytest.mark.parametrize("code, says, options", [
    (2, "--student", ["--student=huge"]),
    (2, "--epochs", ["--epochs=0"]),
    (2, "--epochs", ["--epochs=ten"]),
    (2, "--drop-path", ["--drop-path=1"]),
    (2, "--relations", ["--relations", "qx"]),
    (2, "--warmup-epochs", ["--warmup-epochs=5"]),
    (2, "24", ["--heads=5"]),
    (2, "relation heads", ["--relation-heads=7"]),
    (2, "blocks 1 to 4", ["--teacher-block=9"]),
    (2, "patches", ["--patch-size=16"]),
    (2, "patches of 8", ["--img-size=30"]),
    (2, "single patch", ["--img-size=8"]),
    (2, "--seed", ["--seed=99999999999999999999"]),
    (1, "no such file", ["--teacher="]),
    (2, "hides 16 of 16", ["--mask-ratio=0.99"]),
    (1, "batch-size", ["--batch-size=100"]),
    (1, "batch-size", ["--accum=100"]),
    (1, "no such file", ["--teacher=mae_bass"]),
    (1, "mae_large", ["--teacher=mae_bass"]),
    (1, "no such file or folder", ["--data=/nonexistent"]),
    (1, "no run to go on with", ["--resume"]),
    (1, "no GPU", ["--device=cuda"]),
])
def test_usage_errors(command, capsys, code, says, options):
    if "--device=cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fails(capsys, code, says, options=command + options)


def test_data_errors(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fails(capsys, 1, "no images", options=command + [f"--data={tmp_path / 'empty'}"])
    (tmp_path / "file").touch()
    fails(capsys, 1, "no such folder", options=command + [f"--data={tmp_path / 'file'}"])
    fails(capsys, 1, "cannot", str(tmp_path / "file"), options=command + [f"--out={tmp_path / 'file' / 'run'}"])


def test_a_python_or_a_package_that_does_not_do(tmp_path):
    """One line instead of a traceback, from each script."""
    code = "import sys; sys.version_info = (3, 9); sys.argv = ['x']; import runpy; runpy.run_path(sys.path[0] + '/tinymim.py')"
    old = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r}); {code}"], capture_output=True, text=True)
    assert old.returncode == 1 and len(old.stderr.splitlines()) == 1 and "3.10 or newer" in old.stderr
    extras = [f"extras/{name}.py" for name in ("benchmark", "demo", "figures", "shapes", "study")]
    for script in ("tinymim.py", "finetune.py", *extras):
        bare = subprocess.run([sys.executable, "-S", "-E", os.path.join(HERE, script)], capture_output=True, text=True)  # no site-packages
        assert bare.returncode == 1 and len(bare.stderr.splitlines()) == 1 and "pip install -r requirements.txt" in bare.stderr, bare.stderr


def test_memory_that_does_not_suffice(command, tmp_path, capsys, monkeypatch):
    """On the CPU, on a GPU, and in a worker process that the system kills: each names the option to lower."""
    def on_a_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for allocate in (on_a_gpu, lambda *_: torch.empty(2**60, dtype=torch.uint8)):
        monkeypatch.setattr(tinymim, "train_epoch", allocate)
        fails(capsys, 1, "memory is full", "lower --batch-size", "--accum", options=command)
    monkeypatch.undo()
    monkeypatch.setattr(tinymim.CropAndJitter, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    fails(capsys, 1, "died", "lower --workers", options=command)


def test_no_network(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    fails(capsys, 1, "mae_pretrain_vit_large.pth", "put it at", options=command + ["--teacher=mae_large"])
    fails(capsys, 1, "Imagenette", "imagenette2-320.tgz", "--data", options=command + ["--data=imagenette"])
    assert os.listdir(tmp_path / "data") == []


# ------------------------------------------------------------------------------------------------------------
# The other targets.


def test_golden_mae():
    """Both losses, the latent, the prediction, and which patches are masked."""
    student = ViT(768, 12, 12)
    objective = tinymim.TinyMIM(student, targets=["pixel"], mask_ratio=0.75, decoder=(512, 8, 16))
    filled(student, "mae.")
    for name, parameter in filled(objective.decoder, "").named_parameters():
        if name != "pos_embed":
            u = fill("mae." + ("" if name == "mask_token" else "decoder_") + name, *parameter.shape)
            parameter.data = 1 + 0.1 * u if "norm" in name and name.endswith("weight") else 0.08 * u
    images, noise = 2 * fill("images", 2, 3, 224, 224), (fill("noise", 2, 196) + 1) / 2
    keep, rank = tinymim.random_mask(noise, 0.75)
    assert keep.shape == (2, 49)
    assert (rank >= 49)[0, :12].tolist() == [True, True, True, False, False, True, True, True, True, False, True, True]
    with torch.no_grad():
        latent = student.norm(student.blocks[-1](student.tokens_entering(12, images, keep)))
        predicted = objective.decoder(latent, rank)
        assert latent.shape == (2, 50, 768)
        for token, expected in [
            (latent[0, 0], [-1.2372945736024303, 1.3275049180791632, 0.29686112952499166, 0.6050384389018685]),
            (latent[1, 49], [0.08466664362994984, -1.8442532026117107, 0.6007483638902401, -0.08477623316288894]),
            (predicted[0, 7], [1.0195772945072776, -0.6500561337543378, -0.07632810800078133, -1.8124896853005208]),
        ]:
            assert token[:4].tolist() == pytest.approx(expected, abs=1e-9)
        assert objective(images, None, noise)["pixel"].item() == pytest.approx(2.101066305076665, abs=1e-9)
        raw = tinymim.pixel_loss(predicted, images, rank >= 49, normalize=False)
        assert raw.item() == pytest.approx(2.437229215615145, abs=1e-9)


def two_networks(**options):
    """(objective in float64 on random networks, images of two views): see TinyMIM."""
    torch.manual_seed(0)
    student, teacher = ViT(**SMALL).double(), ViT(**WIDER).double().requires_grad_(False)
    objective = tinymim.TinyMIM(student, teacher, teacher_block=3, relation_heads=4, **options).double()
    return objective, torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def test_feature_and_class_token_losses():
    """Element by element: smooth-L1 to the teacher's block output, less each token's mean and over its deviation."""
    objective, seen, clean = two_networks(targets=["feature", "cls"])
    losses = objective(seen, clean)
    assert list(losses) == ["feature", "cls"]
    teacher, student = objective.teacher, objective.student
    target = teacher.blocks[2](teacher.tokens_entering(3, clean))
    output = student.blocks[2](student.tokens_entering(3, seen))
    for name, tokens in (("feature", range(17)), ("cls", range(1))):
        total, weight, bias = 0.0, objective.maps[name].weight, objective.maps[name].bias
        for image in range(2):
            for token in tokens:
                wanted = target[image, token]
                wanted = (wanted - wanted.mean()) / (wanted.var(unbiased=False) + 1e-5).sqrt()
                for difference in (weight @ output[image, token] + bias - wanted).abs().tolist():
                    total += 0.5 * difference**2 if difference < 1 else difference - 0.5
        assert losses[name].item() == pytest.approx(total / (2 * len(tokens) * 48), abs=1e-12)


def test_masked_relation_is_the_relation_of_the_visible_tokens():
    objective, seen, clean = two_networks(mask_ratio=0.5)
    noise = torch.rand(2, 16)
    keep, _ = tinymim.random_mask(noise, 0.5)
    assert keep.shape == (2, 8)
    qkv = []
    for vit, images, block in ((objective.student, seen, 3), (objective.teacher, clean, 3)):
        tokens = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
        tokens = torch.stack([tokens[image][keep[image]] for image in range(2)])
        tokens = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
        for i in range(block - 1):
            tokens = vit.blocks[i](tokens)
        qkv.append(vit.blocks[block - 1].qkv(tokens))
    expected = relation_loss(*qkv, heads=4)
    same(objective(seen, clean, noise), expected, **EXACT)


ALL = ["relation", "feature", "cls", "pixel"]


def test_all_targets_at_once():
    """Each loss is what it is alone; the teacher learns nothing, and everything else that is trained does."""
    objective, seen, clean = two_networks(targets=ALL, mask_ratio=0.5, decoder=(16, 2, 2))
    noise = torch.rand(2, 16)
    losses = objective(seen, clean, noise)
    assert list(losses) == ["qq", "kk", "vv", "feature", "cls", "pixel"]
    for target in ALL:
        alone = two_networks(targets=[target], mask_ratio=0.5, decoder=(16, 2, 2))[0]
        state = {name: t for name, t in objective.state_dict().items() if name in alone.state_dict()}
        alone.load_state_dict(state)
        for name, loss in alone(seen, clean, noise).items():
            torch.testing.assert_close(loss, losses[name], **EXACT)
    sum(losses.values()).backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("teacher.") and not name.endswith("pos_embed")), name


@pytest.mark.parametrize("targets", [["relation"], ["feature"], ["cls"], ["pixel"], ["relation", "pixel"], ["relation", "feature"]])
def test_what_is_trained_gets_a_gradient(targets):
    """So that DistributedDataParallel waits for nothing."""
    objective, seen, clean = two_networks(targets=targets, mask_ratio=0.5 if "pixel" in targets else 0.0, decoder=(16, 1, 2))
    sum(objective(seen, clean).values()).backward()
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in objective.parameters())


def test_teacher_drop_path(command, tmp_path, monkeypatch):
    objective, seen, clean = two_networks()
    teacher = ViT(**WIDER, drop_path=0.5).double().requires_grad_(False)
    objective = tinymim.TinyMIM(objective.student, teacher, 3, 4).double()
    assert objective.train().teacher.training and not objective.eval().teacher.training
    drawn = {float(sum(objective.train()(seen, clean).values())) for _ in range(4)}
    assert len(drawn) > 1


OPTIONS = {  # what each changes of args, and of what is built
    "--target feature cls": lambda o: (o.targets == ("feature", "cls"), set(o.maps) == {"feature", "cls"}),
    "--target relation pixel": lambda o: (o.targets == ("relation", "pixel"), o.mask_ratio == 0.75, len(o.decoder.blocks) == 8),
    "--target relation pixel --decoder 16 1 2": lambda o: (o.decoder.embed.out_features == 16, o.decoder.blocks[0].attn.heads == 2),
    "--mask-ratio 0.5": lambda o: (o.mask_ratio == 0.5,),
    "--drop-path 0.3": lambda o: tuple(block.drop_path.p == 0.3 for block in o.student.blocks),
    "--teacher-drop-path 0.3": lambda o: tuple(block.drop_path.p == 0.3 for block in o.teacher.blocks),
    "--teacher-block 2": lambda o: (o.teacher_block == 2,),
    "--relations qk vv": lambda o: (o.relations == ("qk", "vv"),),
    "--relation-heads 6": lambda o: (o.relation_heads == 6,),
    "--img-size 64": lambda o: (o.student.img_size == o.teacher.img_size == 64,),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_each_option_changes_what_it_should_and_nothing_else(command, options):
    def built(options):
        args = tinymim.make_parser().parse_args([*command, *options])
        tinymim.complete(args)
        objective, _ = tinymim.build(args, CPU)
        return objective, dict(
            targets=objective.targets, relations=objective.relations, heads=objective.relation_heads, block=objective.teacher_block,
            mask=objective.mask_ratio, drop=objective.student.drop_path, teacher_drop=objective.teacher.drop_path,
            size=objective.student.img_size, weights=float(objective.student.blocks[0].attn.qkv.weight.sum()))

    objective, changed = built(options.split())
    usual = built([])[1]
    assert all(OPTIONS[options](objective))
    assert usual == dict(targets=("relation",), relations=("qq", "kk", "vv"), heads=4, block=3, mask=0.0, drop=0.1, teacher_drop=0.0,
                         size=32, weights=changed["weights"])
    allowed = {"relation pixel": {"targets", "mask"}, "feature cls": {"targets", "heads"}, "--mask": {"mask"}, "--drop": {"drop"},
               "--teacher-drop": {"teacher_drop"}, "--teacher-block": {"block"}, "--relations": {"relations"},
               "--relation-heads": {"heads"}, "--img-size": {"size"}}
    assert {name for name in usual if usual[name] != changed[name]} == next(names for start, names in allowed.items() if start in options)


def test_mae_then_distillation_then_finetuning(command, tmp_path, pictures, capsys):
    """One's own teacher on one's own data: MAE's last.pth is a valid --teacher and a valid --checkpoint."""
    mae = [option for option in command if "teacher" not in option and "--out" not in option] + [
        "--target", "pixel", "--patch-size=8", "--img-size=32", "--decoder", "16", "1", "2", "--epochs=2"]
    tinymim.main(mae + [f"--out={tmp_path / 'mae'}"])
    assert list(log_of(tmp_path / "mae")[0])[:3] == ["epoch", "loss", "pixel"]
    saved = torch.load(tmp_path / "mae" / "last.pth", weights_only=True)
    assert saved["model"].keys() == ViT(**SMALL).state_dict().keys() and any("decoder" in name for name in saved["auxiliary"])
    distil = [option for option in command if "teacher" not in option and "--out" not in option]
    tinymim.main(distil + [f"--teacher={tmp_path / 'mae' / 'last.pth'}", f"--out={tmp_path / 'student'}", "--relation-heads=6", "--epochs=1"])
    config = torch.load(tmp_path / "student" / "last.pth", weights_only=True)["config"]
    assert config == SMALL | {"relation_heads": 6}
    tinymim.main(distil + [f"--teacher={tmp_path / 'student' / 'last.pth'}", f"--out={tmp_path / 'next'}", "--epochs=1"])
    assert torch.load(tmp_path / "next" / "last.pth", weights_only=True)["config"]["relation_heads"] == 6
    finetune.main([f"--checkpoint={tmp_path / 'mae' / 'last.pth'}", f"--data={pictures}", f"--out={tmp_path / 'tuned'}", "--epochs=1",
                   "--batch-size=10", "--workers=0", "--device=cpu"])
    assert "left out of the checkpoint: norm" in capsys.readouterr().out


def test_resuming_mae_is_exact(command, tmp_path, monkeypatch):
    """The decoder and the linear maps go on too, and the masks are those of the uninterrupted run."""
    command += ["--target", "relation", "feature", "pixel", "--decoder", "16", "1", "2", "--epochs=2"]
    tinymim.main(command + [f"--out={tmp_path / 'whole'}"])
    train_epoch = tinymim.train_epoch
    monkeypatch.setattr(tinymim, "train_epoch", lambda *args: args[7] and signal.raise_signal(signal.SIGINT) or train_epoch(*args))
    with pytest.raises(SystemExit):
        tinymim.main(command)
    monkeypatch.setattr(tinymim, "train_epoch", train_epoch)
    tinymim.main(command + ["--resume"])
    whole, resumed = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "run"))
    same(whole["model"], resumed["model"], **EXACT)
    same(whole["auxiliary"], resumed["auxiliary"], **EXACT)


@pytest.mark.parametrize("code, says, options", [
    (2, "MAE", ["--target", "pixel"]),  # with the --teacher of `command`
    (2, "too few", ["--target", "relation", "pixel", "--mask-ratio=0"]),
    (2, "--mask-ratio", ["--mask-ratio=1"]),
    (2, "--target", ["--target", "pixels"]),
    (2, "divide", ["--target", "relation", "pixel", "--decoder", "30", "1", "4"]),
])
def test_errors_of_the_targets(command, capsys, code, says, options):
    fails(capsys, code, says, options=command + options)


# ------------------------------------------------------------------------------------------------------------
# finetune.py.


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
    groups = {id(p): (group["lr_scale"], group["weight_decay"]) for group in finetune.parameter_groups(model, 0.05, 0.65)
              for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, expected in {
        "cls_token": (0.003697205891, 0.0), "pos_embed": (0.003697205891, 0.0), "patch_embed.proj.weight": (0.003697205891, 0.05),
        "patch_embed.proj.bias": (0.003697205891, 0.0), "blocks.0.norm1.weight": (0.005688009063, 0.0),
        "blocks.0.attn.qkv.weight": (0.005688009063, 0.05), "blocks.5.mlp.fc1.bias": (0.049022278906, 0.0),
        "blocks.11.mlp.fc2.weight": (0.65, 0.05), "fc_norm.weight": (1.0, 0.0), "head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0),
    }.items():
        assert groups[id(model.get_parameter(name))] == pytest.approx(expected, abs=1e-9), name


def test_label_smoothing():
    """A tenth of the target is spread over all classes."""
    model = torch.nn.Identity()
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    expected = -(torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]]) * logits.log_softmax(1)).sum()
    torch.testing.assert_close(finetune.Objective(model, 0.1, frozen=False)(logits, target)["loss"], expected)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timm_agrees(pool):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = finetune.Classifier(192, 12, 3, cls_token=pool == "token").eval()
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool=pool).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    again = finetune.Classifier(192, 12, 3, cls_token=pool == "token")
    again.load_state_dict(theirs.state_dict(), strict=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and val/ of three classes that colour tells apart: 20 and 7 pictures of each."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 7)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = random.randint(0, 120, (32, 32, 3), dtype=np.uint8)
                image[..., channel] += random.randint(60, 136)
                Image.fromarray(image).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def tuning(pictures, tmp_path):
    """Options of a training from scratch that takes a second."""
    return ["--checkpoint=none", "--dim=24", "--depth=3", "--heads=2", "--patch-size=8", "--img-size=32", f"--data={pictures}",
            f"--out={tmp_path / 'tuned'}", "--batch-size=10", "--epochs=3", "--blr=0.1", "--workers=1", "--device=cpu"]


def accuracy(capsys, *options):
    """(right answers, images, loss) that --eval prints."""
    finetune.main([*map(str, options), "--eval", "--device=cpu", "--workers=0"])
    line = capsys.readouterr().out.splitlines()[-1]
    return int(line.split("(")[1].split()[0]), int(line.split(" of ")[1].split()[0]), float(line.split("loss ")[1].split()[0])


def test_finetuning_learns_and_is_evaluated_exactly(tuning, pictures, tmp_path, capsys):
    finetune.main(tuning + ["--epochs=12"])
    log = log_of(tmp_path / "tuned")
    assert list(log[0]) == ["epoch", "loss", "lr", "images/s", "top1", "top5", "val_loss", "right", "images", "peak_memory_gib"]
    assert log[-1]["top1"] > 60 and log[-1]["images"] == 21
    group = torch.load(tmp_path / "tuned" / "last.pth", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.999)
    assert sorted(os.listdir(tmp_path / "tuned")) == [".lock", "augmented.png", "best.pth", "last.pth", "log.jsonl"]
    right, images, loss = accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", f"--data={pictures}")
    assert (right, images) == (log[-1]["right"], 21) and loss == round(log[-1]["val_loss"], 4)
    right, _, _ = accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'best.pth'}", f"--data={pictures}")
    assert right == max(record["right"] for record in log)
    (tmp_path / "tuned" / "log.jsonl").unlink()  # what was best is still known
    finetune.main(["--resume", f"--out={tmp_path / 'tuned'}", "--epochs=13", "--device=cpu"])
    again, _, _ = accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'best.pth'}", f"--data={pictures}")
    assert again >= right
    broken = tmp_path / "broken"
    shutil.copytree(pictures / "val", broken)
    (broken / "red" / "0.png").write_text("not an image")
    assert accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", f"--data={broken}")[1] == 20


def test_other_classes_get_another_head(tuning, pictures, tmp_path, capsys):
    finetune.main(tuning + ["--epochs=1"])
    other = tmp_path / "other"
    for split in ("train", "val"):
        shutil.copytree(pictures / split, other / split)
        shutil.move(other / split / "red", other / split / "violet")
    fails(capsys, 1, "other classes", main=finetune.main, options=["--resume", f"--out={tmp_path / 'tuned'}", f"--data={other}", "--epochs=2"])
    finetune.main([f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", f"--data={other}", f"--out={tmp_path / 'next'}", "--epochs=1",
                   "--batch-size=10", "--workers=0", "--device=cpu"])
    assert "the classifier has new head;" in capsys.readouterr().out


def test_finetuning_resumes_exactly(tuning, tmp_path, monkeypatch, capsys):
    tuning += ["--drop-path=0.2"]
    finetune.main(tuning + [f"--out={tmp_path / 'whole'}"])
    train_epoch = tinymim.train_epoch

    def interrupted(*args):
        if args[7] == 2:
            signal.raise_signal(signal.SIGINT)
        return train_epoch(*args)

    monkeypatch.setattr(tinymim, "train_epoch", interrupted)
    with pytest.raises(SystemExit):
        finetune.main(tuning)
    monkeypatch.setattr(tinymim, "train_epoch", train_epoch)
    finetune.main([f"--out={tmp_path / 'tuned'}", "--resume"])
    same(model_of(tmp_path / "tuned"), model_of(tmp_path / "whole"), **EXACT)
    assert [record["val_loss"] for record in log_of(tmp_path / "tuned")] == [record["val_loss"] for record in log_of(tmp_path / "whole")]


def test_two_processes_count_as_one(tuning, pictures, tmp_path, capsys):
    """21 images, two processes, batches of 10."""
    finetune.main(tuning)
    checkpoint = tmp_path / "tuned" / "last.pth"
    one = accuracy(capsys, f"--checkpoint={checkpoint}", f"--data={pictures}")
    process = run(f"--checkpoint={checkpoint}", f"--data={pictures}", "--eval", "--batch-size=10", "--workers=1", "--device=cpu",
                  script="finetune.py", processes=2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"({one[0]} of 21 right" in out and f"loss {one[2]:.4f}" in out and out.count("top-1") == 1


def test_evaluation_among_some_of_the_classes(tuning, pictures, tmp_path, capsys):
    """A folder that lacks a class: predictions are made among those it has, by name."""
    finetune.main(tuning + ["--epochs=6"])
    checkpoint = torch.load(tmp_path / "tuned" / "last.pth", weights_only=True)
    assert checkpoint["config"]["class_names"] == ["blue", "green", "red"]
    some = tmp_path / "some"
    for name in ("green", "red"):
        shutil.copytree(pictures / "val" / name, some / name)
    right, images, _ = accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", f"--data={some}")
    model = finetune.Classifier(24, 3, 2, num_classes=3, patch_size=8, img_size=32)
    model.load_state_dict(checkpoint["model"])
    expected = 0
    for label, name in enumerate(("green", "red")):
        for path in (some / name).iterdir():
            image = v2.CenterCrop(32)(v2.Resize(36, interpolation=v2.InterpolationMode.BICUBIC)(tinymim.decode(str(path))))
            with torch.no_grad():
                expected += int(model.eval()(tinymim.Normalize()(image[None] / 255))[0, 1:].argmax() == label)
    assert (right, images) == (expected, 14)

    bare = tmp_path / "bare.pth"  # MAE's files do not tell the classes
    torch.save({"model": checkpoint["model"]}, bare)
    options = [f"--checkpoint={bare}", "--heads=2", "--eval", f"--data={some}", "--device=cpu", "--workers=0"]
    fails(capsys, 1, "--class-names", main=finetune.main, options=options)
    fails(capsys, 1, "no such folder", main=finetune.main, options=options + ["--class-names=/nonexistent"])
    assert accuracy(capsys, *options, f"--class-names={pictures / 'train'}")[:2] == (right, images)
    shutil.move(some / "red", some / "violet")
    fails(capsys, 1, "violet", main=finetune.main, options=[f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", "--eval", f"--data={some}"])


def test_what_finetuning_starts_from(command, tuning, pictures, tmp_path, capsys):
    """Our last.pth, with its position embeddings; what is new and what was left out is said in one line."""
    tinymim.main(command + ["--epochs=1"])
    capsys.readouterr()
    options = [f"--data={pictures}", "--epochs=1", "--batch-size=10", "--workers=0", "--device=cpu", "--warmup-epochs=0", "--blr=0", "--min-lr=0"]
    finetune.main([f"--checkpoint={tmp_path / 'run' / 'last.pth'}", f"--out={tmp_path / 'tuned'}", *options])
    line = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(line) == 1 and "new fc_norm, head;" in line[0] and line[0].endswith("left out of the checkpoint: norm")
    student, tuned = model_of(tmp_path / "run"), model_of(tmp_path / "tuned")
    same({k: t for k, t in tuned.items() if k in student}, {k: t for k, t in student.items() if k in tuned}, **EXACT)
    finetune.main([f"--checkpoint={tmp_path / 'run' / 'last.pth'}", f"--out={tmp_path / 'cls'}", "--cls-token", "--img-size=64", *options])
    assert "new head; left out of the checkpoint: nothing" in capsys.readouterr().out
    assert model_of(tmp_path / "cls")["pos_embed"].shape == (1, 65, 24)


def test_linear_probe_trains_the_head_alone(tuning, tmp_path, capsys):
    finetune.main(tuning + ["--freeze", "--epochs=1", f"--out={tmp_path / 'start'}", "--blr=0"])
    finetune.main(tuning + ["--freeze", "--epochs=6"])
    before, after = model_of(tmp_path / "start"), model_of(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias", "head_norm.running_mean", "head_norm.running_var", "head_norm.num_batches_tracked"}
    log = log_of(tmp_path / "tuned")
    assert log[-1]["top1"] > 50
    right, _, loss = accuracy(capsys, f"--checkpoint={tmp_path / 'tuned' / 'last.pth'}", f"--data={tuning[6].split('=')[1]}")
    assert right == log[-1]["right"] and loss == round(log[-1]["val_loss"], 4)


def test_augmentation_is_the_recipe():
    torch.manual_seed(0)
    crop = finetune.Crop(16)
    randaugment, mix = crop.augment.transforms[2], finetune.Augment(num_classes=4).mix
    assert [(type(t).__name__, t.alpha) for t in mix.transforms] == [("MixUp", 0.8), ("CutMix", 1.0)] and mix.p == [0.5, 0.5]
    assert randaugment.interpolation == v2.InterpolationMode.BILINEAR
    assert (randaugment.num_ops, randaugment.magnitude, randaugment.num_magnitude_bins) == (2, 27, 31)
    image = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    boxes = torch.stack([crop(image)[1] for _ in range(800)])
    erased = boxes[boxes[:, 2] > 0]
    assert 0.2 < len(erased) / 800 < 0.3
    area = (erased[:, 2] * erased[:, 3]).double().mean() / 256
    assert 0.1 < area < 0.25  # between 2% and a third, evenly

    augment = finetune.Augment(num_classes=4)
    crops, labels = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8), torch.arange(4)
    crops[1:] = 0
    boxes = torch.tensor([[2, 3, 4, 5]] + 3 * [[0, 0, 0, 0]])
    del augment.mix
    augment.mix = lambda images, labels: (images, labels)
    images, _ = augment(crops, boxes, labels)
    noise = torch.zeros(16, 16, dtype=torch.bool)
    noise[2:6, 3:8] = True
    clean = augment.normalize(crops / 255)
    assert torch.equal(images[0, :, ~noise], clean[0, :, ~noise]) and torch.equal(images[1:], clean[1:])
    assert len(images[0, :, noise].unique()) == 60 and abs(images[0, :, noise].mean()) < 0.5

    augment, boxes, mixed, cut = finetune.Augment(num_classes=4), torch.zeros(4, 4, dtype=torch.long), 0, 0
    crops = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16) * 60
    for _ in range(60):
        images, targets = augment(crops, boxes, labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        flat = (images.amax((2, 3)) - images.amin((2, 3)) < 1e-4).all()
        mixed, cut = mixed + int(flat and targets.max() < 0.999), cut + int(not flat)
    assert mixed > 10 and cut > 10


def test_finetuning_defaults_follow_the_size(photos, tmp_path):
    args = finetune.make_parser().parse_args(["--checkpoint=x"])
    base = finetune.recipe(args, 768)
    assert (base["epochs"], base["blr"], base["layer_decay"], base["drop_path"], base["min_lr"]) == (100, 5e-4, 0.65, 0.2, 1e-6)
    assert finetune.recipe(args, 192)["blr"] > base["blr"] and finetune.recipe(args, 384)["blr"] > base["blr"]
    model, config = finetune.build(finetune.make_parser().parse_args(["--checkpoint=none"]), CPU, "none", list("abcdefg"))
    assert config == dict(dim=192, depth=12, heads=3, patch_size=16, img_size=224, num_classes=7, cls_token=False, probe=False,
                          class_names=list("abcdefg"))
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.2) and model.pos_embed.requires_grad
    rates = [block.drop_path.p for block in finetune.Classifier(24, 3, 2, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


NEW = ["--checkpoint=none", "--student=nano", "--patch-size=8", "--img-size=32"]


@pytest.mark.parametrize("code, says, options", [
    (2, "--checkpoint is missing", []),
    (2, "patches", [*NEW, "--img-size=30"]),
    (2, "--warmup-epochs", [*NEW, "--warmup-epochs=3"]),
    (2, "--dim", ["--checkpoint={teacher}", "--dim=48"]),
    (2, "--batch-size", [*NEW, "--freeze", "--batch-size=1"]),
    (1, "no such file", ["--checkpoint=missing.pth"]),
    (1, "--heads", ["--checkpoint={teacher}"]),
    (1, "no head", ["--checkpoint={teacher}", "--eval", "--heads=4"]),
    (1, "batch-size", [*NEW, "--batch-size=100"]),
    (1, "no such file or folder", [*NEW, "--data=/nonexistent"]),
    (1, "no folder val", [*NEW, "--data={no_val}"]),
    (1, "differ: red", [*NEW, "--data={other}"]),
    (1, "yellow", [*NEW, "--data={empty}"]),
    (1, "only the class red", [*NEW, "--data={single}"]),
    (1, "no run to go on with", [*NEW, "--resume"]),
])
def test_finetuning_errors(teacher_file, pictures, tmp_path, capsys, code, says, options):
    folders = {name: tmp_path / name for name in ("no_val", "other", "empty", "single")}
    shutil.copytree(pictures / "train", folders["no_val"] / "train")
    for name in ("other", "empty"):
        shutil.copytree(pictures, folders[name])
    shutil.move(folders["other"] / "val" / "red", folders["other"] / "val" / "yellow")
    (folders["empty"] / "train" / "yellow").mkdir()
    for split in ("train", "val"):
        shutil.copytree(pictures / split / "red", folders["single"] / split / "red")
    options = [option.format(teacher=teacher_file, **folders) for option in options]
    shared = [f"--data={pictures}", f"--out={tmp_path / 'tuned'}", "--batch-size=10", "--epochs=3", "--workers=0", "--device=cpu"]
    fails(capsys, code, says, main=finetune.main, options=shared + options)


# ------------------------------------------------------------------------------------------------------------
# README.md, extras/, and what people copy.


SOURCE, README = (open(os.path.join(HERE, name)).read() for name in ("tinymim.py", "README.md"))
IMPORTS, *SECTIONS = re.split(r"^# -{20,}\n", SOURCE, flags=re.MULTILINE)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_section_pasted_alone_runs_its_example(number):
    """Each section of tinymim.py with the imports, but nothing else of it, in a file of its own."""
    section, examples = SECTIONS[number - 1], doctest.DocTestRunner()
    assert section.startswith(f"# {number}. ")
    pasted = {"__name__": "pasted"}
    exec(compile(IMPORTS + section, f"section {number}", "exec"), pasted)
    for node in ast.walk(ast.parse(section)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            examples.run(doctest.DocTestParser().get_doctest(ast.get_docstring(node), pasted, node.name, None, 0))
    assert examples.summarize().attempted > 0 and examples.summarize().failed == 0


def test_relation_loss_copied_alone():
    """The two functions and three imports are all it takes."""
    copied = {}
    exec("import math, torch\nimport torch.nn.functional as F\n" + inspect.getsource(relation) + inspect.getsource(relation_loss), copied)
    student, teacher = random_qkv(24), random_qkv(48, seed=1)
    same(copied["relation_loss"](student, teacher, 4), relation_loss(student, teacher, 4), **EXACT)


def readme_commands():
    """The README's command lines, as lists of words."""
    lines = README.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].split() for line in lines if re.match(r" *(python|torchrun) ", line)]


def test_readme_commands_run(photos, pictures, tmp_path, monkeypatch):
    """Every command line of the README that calls one of the two scripts, in its order, on small networks and few images."""
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "teacher.pth"
    torch.save({"model": ViT(**WIDER).state_dict()}, teacher)
    published = teacher.as_uri(), hashlib.md5(teacher.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(tinymim, "TEACHERS", dict.fromkeys(tinymim.TEACHERS, published))
    monkeypatch.setitem(tinymim.HEADS, 48, 4)
    classifier = finetune.Classifier(**SMALL, num_classes=3)
    torch.save({"model": classifier.state_dict()}, tmp_path / "mae_finetuned_vit_base.pth")
    monkeypatch.setitem(tinymim.HEADS, 24, 2)
    quick = ["--epochs=1", "--batch-size=6", "--accum=1", "--workers=0", "--device=cpu"]
    seen = {"tinymim.py": 0, "finetune.py": 0}
    for words in readme_commands():
        script = next((word for word in words if word in seen), None)
        if script is None:
            continue
        options, module = words[words.index(script) + 1:] + quick, tinymim if script == "tinymim.py" else finetune
        if script == "tinymim.py":
            options += ["--dim=24", "--depth=3", "--heads=2", f"--data={photos}"]
            options += ["--img-size=32", "--patch-size=8"] if "pixel" in options and "--img-size" not in options else []
        else:
            options += [f"--data={pictures}"] + ([f"--class-names={pictures / 'val'}"] if "--class-names" in options else [])
        args = module.make_parser().parse_args(options)
        if not (args.resume or script == "finetune.py" and args.eval):
            shutil.rmtree(args.out or os.path.join("runs", module.complete(args)), ignore_errors=True)  # commands may share it
        module.main(options)
        seen[script] += 1
    assert seen["tinymim.py"] >= 12 and seen["finetune.py"] >= 9


def test_readme_commands_have_options_that_exist(monkeypatch):
    """torchrun's, and those of extras/."""
    from torch.distributed.run import get_args_parser

    seen = set()
    for words in readme_commands():
        if words[0] == "torchrun":
            get_args_parser().parse_args(words[1:])
        script = next(word for word in words if word.endswith(".py") or word == "pytest")
        if script.startswith("extras/"):
            options = [word for word in words if word.startswith("--")]
            text = subprocess.run([sys.executable, os.path.join(HERE, script), "--help"], capture_output=True, text=True).stdout
            assert script.endswith("figures.py") or text.startswith("usage") and all(option in text for option in options), words
            seen.add(script)
    assert seen == {f"extras/{name}.py" for name in ("benchmark", "demo", "figures", "shapes")}


def test_readme_snippets_run(tmp_path, monkeypatch):
    """Each Python snippet, in a namespace of its own; those of the method are lines of the code."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    sizes = dict(zip(("dim", "depth", "heads"), tinymim.STUDENTS["tiny"]))
    for folder, model in (("tiny-mae_base", ViT(**sizes)), ("finetune-tiny-mae_base", finetune.Classifier(**sizes, num_classes=10))):
        os.makedirs(os.path.join("runs", folder))
        torch.save({"model": model.state_dict(), "config": sizes | {"num_classes": 10, "patch_size": 16, "img_size": 224}},
                   os.path.join("runs", folder, "best.pth" if folder.startswith("fine") else "last.pth"))
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    quoted = [code for code in snippets if "import " not in code]
    assert len(quoted) == 2 and all(code.split("  #")[0].strip() in SOURCE for code in quoted)
    for code in snippets:
        assert len(code.splitlines()) <= 11
        if code not in quoted:
            exec(code, {})
    assert len(snippets) - len(quoted) == 4


def test_readme_points_at_the_right_lines():
    """[`name`](file#L12): there it is defined, assigned or an option; or, if it is nowhere, it is in that line and no other."""
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 25 and len(links) == README.count(".py#L")
    for name, file, line in links:
        lines = open(os.path.join(HERE, file)).read().splitlines()
        if re.fullmatch(r"\w+\.\w+", name):  # a method
            method = inspect.getsourcelines(getattr(getattr(tinymim, name.split(".")[0]), name.split(".")[1]))[1]
            assert int(line) == method, f"{name} is in line {method}"
            continue
        name = re.escape(name)
        where = [i + 1 for i, text in enumerate(lines) if re.search(rf'^\s*(def|class) {name}\b|^\s*([\w.]+\.)?{name}( =|: )|add\("--{name}"', text)]
        where = where or [i + 1 for i, text in enumerate(lines) if re.search(name, text)]
        assert int(line) in where and len(where) <= 3, f"{name} is in lines {where} of {file}, not in {line}"


def test_readme_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 4
    for picture in pictures:
        assert 0 < os.path.getsize(os.path.join(HERE, picture)) < 300_000


def test_usual_way_of_the_benchmark_is_the_same_training(photos):
    """What tinymim.py is compared with makes the same losses of the same networks."""
    import benchmark

    student, teacher, images = ViT(**SMALL), ViT(**WIDER), torch.rand(2, 2, 3, 32, 32)
    usual = benchmark.Usual(student, teacher, 3, 4)(*images)
    for module in [*student.modules(), *teacher.modules()]:
        if isinstance(module, benchmark.UsualAttention):
            module.__class__ = tinymim.Attention
    same(usual, tinymim.TinyMIM(student, teacher, 3, 4)(*images))
    views = benchmark.UsualDataset(tinymim.find_images(photos), 32)[0, 3]
    assert [tuple(x.shape) for x in views[:2]] == [(3, 32, 32)] * 2 and views[0].dtype == torch.float32 and views[2] == -1


def test_benchmark_runs(photos, tmp_path):
    """All of it, at the smallest sizes: its numbers belong together; and its bars are drawn."""
    words = ["--student=nano", "--relation-heads=8", "--img-size=32", "--batch-size=2", "--repeats=1", "--pictures=64", "--steps=3"]
    done = subprocess.run([sys.executable, os.path.join(HERE, "extras", "benchmark.py"), *words, f"--data={photos}", "--device=cpu",
                           "--workers=1", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    usual, ours = result["pipeline"]
    assert usual["times the usual, 1 worker"] == 1
    assert ours["times the usual, 1 worker"] == pytest.approx(ours["images/s, 1 worker"] / usual["images/s, 1 worker"])
    assert (usual["KiB per image"], round(ours["KiB per image"])) == (2 * 3 * 32 * 32 * 4 / 1024, 3)
    assert [row["variant"] for row in result["step"]] == ["usual, float32", "tinymim.py, float32", "tinymim.py, bfloat16"]
    dim, tokens, patches, blocks = 768, 5, 4, 8  # whole blocks, before the 9th of 12, of which there is only qkv
    flops = 2 * (patches * 3 * 16**2 * dim + blocks * (12 * tokens * dim**2 + 2 * tokens**2 * dim) + 3 * tokens * dim**2)
    assert result["GFLOP per image"]["teacher"] == pytest.approx(flops / 1e9)
    for row in result["step"]:
        rate = result["ceilings"]["2048 x 2048 product, " + row["variant"].split(", ")[1]]["per second"] * 1e12
        assert row["teacher, % of ceiling"] == pytest.approx(100 * 2 * flops / (row["teacher, ms"] / 1000) / rate)
        assert row["images/s"] == pytest.approx(2 / (row["step, ms"] / 1000)) and 0.5 < row["peak memory, GiB"] < 8
    assert all(0 <= row["waiting for data, %"] < 100 and row["images/s"] > 0 for row in result["end to end"])
    (tmp_path / "speed.json").write_text(done.stdout)
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, os.path.join(HERE, "extras", "figures.py"), f"--speed={tmp_path / 'speed.json'}", f"--out={tmp_path}"], check=True)
    assert "</svg>" in (tmp_path / "speed.svg").read_text()


def test_benchmark_keeps_time(monkeypatch):
    """Medians of rounds, per call; and what a loader lets one wait, but for its first batch."""
    import benchmark

    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def take(seconds):
        clock[0] += seconds

    naps = iter([9, 9, 9, 9, 1, 9, 2, 4, 9, 3, 3, 9, 20, 30])  # five to warm up, then three rounds of an untimed and two timed calls
    assert benchmark.interleaved({"nap": lambda: take(next(naps))}, torch.device("cpu"), 3, untimed=1, least=1.5)[0] == {"nap": 3}
    watched = benchmark.Watched(argparse.Namespace(sampler=None, dataset=None))
    watched.loader = (take(nap) or nap for nap in (50, 3, 4))
    for _ in watched:
        take(10)
    assert (watched.waited, clock[0] - watched.began) == (7, 3 + 10 + 4 + 10)


def test_the_demos_teacher(tmp_path):
    path = os.path.join(HERE, "assets", "shapes_teacher.pth")
    assert os.path.getsize(path) < 3e6
    teacher = tinymim.load_teacher(path)
    assert (teacher.dim, teacher.depth, teacher.heads, teacher.patch_size, teacher.img_size) == (128, 6, 4, 6, 36)


def test_shapes_are_drawn_as_before(tmp_path):
    """The same seed draws the same pictures, with every class in a folder."""
    for name in ("a", "b"):
        subprocess.run([sys.executable, os.path.join(HERE, "extras", "shapes.py"), tmp_path / name, "--train=20", "--val=10"], check=True)
    pictures = sorted((tmp_path / "a").rglob("*.png"))
    assert len(pictures) == 30 and len({path.parent.name for path in pictures}) == 10
    assert all(path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() for path in pictures)


def test_every_row_of_the_study_works(tmp_path):
    """At its smallest setting; what is finished is not run again."""
    shapes, study = (os.path.join(HERE, "extras", name) for name in ("shapes.py", "study.py"))
    subprocess.run([sys.executable, shapes, tmp_path / "data", "--train=80", "--val=40", "--size=32"], check=True)
    outputs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, study, "--data", tmp_path / "data", "--out", tmp_path / "study", "--smallest", "--device=cpu"],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    rows = [line for line in outputs[0].splitlines() if line.startswith("| ")]
    assert len(rows) == 22 and rows == [line for line in outputs[1].splitlines() if line.startswith("| ")]
    assert "start " in outputs[0] and "start " not in outputs[1] and "too small to conclude" in outputs[0]
