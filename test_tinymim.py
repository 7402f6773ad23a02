"""Tests of tinymim.py and finetune.py. The golden numbers were computed in float64 by the authors' code
(TinyMIM, MAE) and timm, on weights and images that a formula fills (`fill`): anyone can compute them again.
"""

import argparse
import functools
import http.server
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from unittest.mock import Mock, patch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # all that a forked process can use
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import finetune, tinymim
from tinymim import TinyMIM, UserError, ViT, log_relation, relation_loss

HERE = os.path.dirname(os.path.abspath(__file__))
README, EXTRAS = (open(f"{HERE}/{name}README.md", encoding="utf-8").read() for name in ("", "extras/"))
KILLS = int(os.environ.get("KILLS", 12))  # how often runs are killed at random moments
SMALL = dict(dim=24, depth=3, heads=2, patch_size=8, img_size=32)  # a ViT that a test can train
WIDER = SMALL | dict(dim=48, depth=4, heads=4)
QUICK = ["--epochs=3", "--batch-size=8", "--workers=0", "--device=cpu"]
BICUBIC = v2.InterpolationMode.BICUBIC
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # of nested structures, bit for bit
near = functools.partial(pytest.approx, abs=1e-9)
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # which is to leave torchvision

def fill(name, *shape):
    """Numbers in [-1, 1) that depend on the name alone: a 32-bit hash of the index and the name's CRC."""
    x = (2654435761 * np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return torch.from_numpy((x ^ (x >> 16)).astype(np.float64) / 2**31 - 1).view(shape)

def filled(module, prefix, also=()):
    """The module in float64, its parameters filled: norm weights 1 + 0.1u, others 0.08u."""
    for name, parameter in module.double().eval().named_parameters():
        u = fill(prefix + name, *parameter.shape)
        if "pos_embed" not in name or name in also:
            parameter.data = 1 + 0.1 * u if "norm" in name and name.endswith("weight") else 0.08 * u
    return module

def random_qkv(width, tokens=5, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) for _ in "qkv"]

@pytest.fixture(autouse=True)
def interrupt_handler():  # tinymim.run() leaves one, which ends the process
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and val/ of three classes that colour tells apart: 8 and 7 pictures of each."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for channel, i in itertools.product(range(3), range(15)):
        path = folder / ("val", "train")[i < 8] / ("red", "green", "blue")[channel] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = generator.randint(0, 120, (36, 32, 3)) + generator.randint(100) * np.eye(3)[channel]
        Image.fromarray(image.astype(np.uint8)).save(path.with_suffix(".jpg") if i % 2 else path)
    return folder

@pytest.fixture
def distil(pictures, tmp_path):  # a distillation of half a second; later options overrule these
    torch.manual_seed(0)
    torch.save({"model": ViT(**WIDER).state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    return [*QUICK, "--dim=24", "--depth=3", "--heads=2", "--blr=0.05", f"--data={pictures}",
            f"--out={tmp_path}/run", f"--teacher={tmp_path}/mae.pth", "--teacher-heads=4"]

@pytest.fixture
def tune(pictures, tmp_path):  # a training from scratch
    return [*QUICK, "--dim=24", "--depth=3", "--heads=2", "--blr=0.02", f"--data={pictures}",
            f"--out={tmp_path}/run", "--checkpoint=none", "--patch-size=8", "--img-size=32"]

@pytest.fixture(params=["tinymim", "finetune"])
def either(request, distil, tune):
    return (tinymim.main, distil) if request.param == "tinymim" else (finetune.main, tune)

def fails(main, options, *says):  # main(options) ends with an error of one line, which holds all of `says`
    with pytest.raises(SystemExit) as stopped:
        main(options)
    line = stopped.value.code  # Python prints it to stderr and exits with 1
    assert re.fullmatch(r"\w+\.py: error: .*", line) and all(text in line for text in says), line

def args_of(script, *options):  # the options as script.main() hands them to script.train()
    with patch.object(tinymim, "run") as run:
        script.main(options)
    return run.call_args.args[2]

def start(name, *options, **more):  # the script in a process of its own, and in a group of its own
    more = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) | more
    return subprocess.Popen([sys.executable, os.path.join(HERE, f"{name}.py"), *options], **more)

def load(folder, name="last.pth"):
    return torch.load(os.path.join(folder, name), weights_only=True)

def result(folder):  # all that a run left, but for its options and speed
    found = {name: load(folder, name) for name in os.listdir(folder) if name.endswith(".pth")}
    found["log"] = {"history": [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]}
    for part in found.values():
        part |= {"args": None, "config": None, "history": [x | {"images/s": 0} for x in part["history"]]}
    return found

# ---- The method --------------------------------------------------------------------------------------------

def test_golden_distillation():
    student = filled(ViT(192, 12, heads=6), "student.")  # six heads: the authors' ViT-Tiny, in pre-training
    teacher, images = filled(ViT(768, 12, heads=12), "teacher."), 2 * fill("images", 2, 3, 224, 224)
    losses = TinyMIM(student, teacher, 12, 12, ["qk", "vv"]).eval()(images, images)
    assert [losses["qk"].item(), losses["vv"].item()] == near([0.5928374293135243, 1.1960328201657833])
    q, k, v = (x.detach() for x in teacher.qkv_at(images, 12))
    qk = [0.025767710213393306, 0.0063212661906894615, 0.0011469206929298828, 0.006966831556327835]
    vv = [0.4439084161298033, 0.0012602242768500699, 0.0018377878317098937, 0.014642534735222338]
    assert log_relation(q, k, 12).exp()[0, 3, 5, :4].tolist() == near(qk)
    assert log_relation(v, v, 12).exp()[1, 0, 0, :4].tolist() == near(vv)
    sum(losses.values()).backward()
    for name, norm in {
        "patch_embed.proj.weight": 0.11115307933877165, "cls_token": 0.002232637522656957,
        "blocks.0.attn.qkv.weight": 0.04350811949481605, "blocks.5.mlp.fc1.weight": 0.04943361111423365,
        "blocks.11.attn.qkv.weight": 0.16885630650605676, "blocks.11.norm1.bias": 0.013599193696380758,
    }.items():
        assert student.get_parameter(name).grad.norm().item() == near(norm)
    without = {name for name, p in student.named_parameters() if p.grad is None}
    behind = [f"blocks.11.{layer}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2", "norm2")] + ["norm"]
    assert without == {f"{layer}.{kind}" for layer in behind for kind in ("weight", "bias")} | {"pos_embed"}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

def test_golden_position_embeddings_and_learning_rate():
    embeddings = tinymim.sincos_pos_embed(768, 14)[0]
    assert embeddings.dtype == torch.float32 and embeddings.shape == (197, 768) and not embeddings[0].any()
    assert embeddings.double().sum().item() == pytest.approx(69594.49384729861, abs=1e-6)
    expected = [0.8414709568023682, 0.5403022766113281, 0.6569865942001343, 0.7539022564888]
    assert embeddings[100, ::192].tolist() == near(expected)
    for epoch, expected in {0: 0.0, 0.5: 0.0001, 2.5: 0.0005, 5: 0.001, 20.25: 0.0009378167042176453,
                            52.5: 0.0005005000000000001, 99.9: 1.0027312259864862e-06, 100: 1e-06}.items():
        assert tinymim.learning_rate(epoch, 0.001, 5, 100, 1e-6) == pytest.approx(expected, abs=1e-12)

def test_relation_loss_copied_alone_is_the_formula():  # for every pair of q, k and v
    alone = {"math": math, "torch": torch, "F": torch.nn.functional}
    exec(inspect.getsource(log_relation) + inspect.getsource(relation_loss), alone)
    pairs, student, teacher = [a + b for a in "qkv" for b in "qkv"], random_qkv(12, 5), random_qkv(24, 5, 2)
    losses = alone["relation_loss"](student, teacher, 3, pairs)
    assert list(losses) == pairs and sum(relation_loss(student, student, 3, pairs).values()) == 0
    for a, b in pairs:
        relations = []  # (image, head, row, column)
        for qkv, d in ((teacher, 8), (student, 4)):
            x, y = (qkv["qkv".index(name)].view(2, 5, 3, d) for name in (a, b))
            weights = (torch.einsum("irhd,ichd->ihrc", x, y) / math.sqrt(d)).exp()
            relations.append(weights / weights.sum(3, keepdim=True))
        p, q = relations
        assert losses[a + b].item() == near((p * (p / q).log()).sum().item() / (2 * 3 * 5), abs=1e-12)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(dtype):
    """Logits of ±1e4, where softmax().log() is -inf, and under autocast, where products overflow in fp16."""
    student, teacher = ([x.to(dtype) for x in random_qkv(64, seed=seed, scale=120.0)] for seed in (4, 5))
    student = [x.requires_grad_() for x in student]
    with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16):
        losses = relation_loss(student, teacher, 1, ["qk", "kv", "vq"])
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 and loss > 1000 for loss in losses.values())
    assert all(x.grad.isfinite().all() for x in student)

def test_defaults_of_the_objective():
    """The last block of a teacher as deep, else that at 3/4; its heads, or those it was distilled with."""
    student, images = ViT(**SMALL | dict(depth=5)), torch.randn(2, 2, 3, 32, 32)
    for depth, block in ((5, 5), (6, 5), (8, 6), (24, 18)):
        teacher = ViT(**WIDER | dict(depth=depth), drop_path=0.5)
        objective = TinyMIM(student, teacher)
        assert (objective.teacher_block, objective.relation_heads) == (block, 4)
        assert tuple(objective.pairs) == ("qq", "kk", "vv") and student.config["relation_heads"] == 4
    assert len({objective(*images)["qq"].item() for _ in range(4)}) > 1  # drop path
    teacher.config["relation_heads"] = 3
    assert TinyMIM(student, teacher).relation_heads == 3
    losses = TinyMIM(student, teacher.eval(), 1, 6, ["qk"])(*images)
    qkv = student.qkv_at(images[0], 5), teacher.qkv_at(images[1], 1)
    same(losses, relation_loss(*qkv, 6, ["qk"]))

def test_what_does_not_fit_is_said_in_words():
    for student, teacher, heads, says in [
        (random_qkv(24), random_qkv(48), 5, r"\(2, 5, .*D divisible by 5"),
        (random_qkv(24, 196), random_qkv(48, 197), 4, "differ.*196.*197"),
        ([torch.ones(2, 4, 5, 6)] * 3, [torch.ones(2, 4, 5, 12)] * 3, 4, r"\(2, 4, 5, 12\).*\(B, N, D\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            relation_loss(student, teacher, heads)
    for block in (-1, 0, 5):
        with pytest.raises(UserError, match="blocks 1 to 4 .--teacher-block"):
            TinyMIM(ViT(**SMALL), ViT(**WIDER), block)
    for dims, heads in (((24, 48), 5), ((24, 36), 8), ((64, 96), 12)):
        networks = [ViT(**SMALL | dict(dim=dim)) for dim in dims]
        with pytest.raises(UserError, match=f"{dims[0]} and {dims[1]} .*into {heads} relation heads"):
            TinyMIM(*networks, None, heads)

def test_nothing_after_q_k_and_v_is_computed():
    vit, images = ViT(**SMALL), torch.randn(2, 3, 32, 32)
    x = vit.blocks[0](vit.embed(images))
    expected = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)).chunk(3, dim=-1)
    behind = vit.blocks[1].attn.proj, vit.blocks[1].norm2, vit.blocks[1].mlp, vit.blocks[2], vit.norm
    for module in behind:
        module.forward = None  # calling it would raise
    found = vit.qkv_at(images, 2)
    assert found[0].shape == (2, 17, 24) and all(map(torch.equal, found, expected))

def test_initial_weights_are_maes():
    """Xavier uniform for all matrices, patches flattened; biases 0, but for the patch embedding's."""
    torch.manual_seed(0)
    vit = ViT(192, 2, 3)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        if name.endswith("weight") and parameter.ndim > 1:
            fan_out, fan_in = parameter.flatten(1).shape
            limit = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.98 * limit < parameter.abs().max() <= limit, name
    bias, limit = vit.patch_embed["proj"].bias, (3 * 16 * 16) ** -0.5  # PyTorch's default
    assert 0.9 * limit < bias.abs().max() <= limit

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_objective_is_the_same():  # in one graph, with drop path, forwards and backwards
    student, teacher = (ViT(**sizes | dict(depth=2), drop_path=0.1) for sizes in (SMALL, WIDER))
    objective, images, found = TinyMIM(student, teacher, 2), torch.randn(2, 2, 3, 32, 32), []
    for _ in range(2):
        torch.manual_seed(0)
        losses = objective(*images)
        sum(losses.values()).backward()
        found.append([losses, student.cls_token.grad.clone()])
        student.zero_grad()
        objective.compile(fullgraph=True, options={"fallback_random": True})  # the same random numbers
    same(*found, rtol=1e-4, atol=1e-6)

def test_every_kind_of_checkpoint_loads(tmp_path, capsys):
    vit, path, images = ViT(**SMALL), f"{tmp_path}/x.pth", torch.randn(1, 3, 32, 32)
    tensors = vit.state_dict()
    ours = {"model": tensors, "config": SMALL | {"relation_heads": 6}, "optimizer": {}, "epoch": 1}
    for kind, content in {
        "encoder": {"model": tensors}, "bare": tensors, "no config": {"model": tensors, "config": None},
        "whole MAE": {"model": tensors | {"mask_token": torch.ones(8), "decoder_embed.bias": torch.ones(8)}},
        "authors'": {"model": tensors, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1.0)},
        "Lightning": {"state_dict": tensors}, "other": {"model_state_dict": tensors},
        "DDP": {f"module.{name}": t for name, t in tensors.items()},
        "compiled": {f"_orig_mod.{name}": t for name, t in tensors.items()},
        "float16": {name: t.half() for name, t in tensors.items()}, "ours": ours,
    }.items():
        torch.save(content, path)
        teacher = tinymim.load_teacher(path, heads=None if kind == "ours" else 2)
        relation_heads = 6 if kind == "ours" else None
        assert teacher.config == SMALL | {"relation_heads": relation_heads}
        same(teacher(images), vit(images), **(dict(rtol=0.1, atol=0.02) if kind == "float16" else {}))
        assert TinyMIM(ViT(**SMALL), teacher).relation_heads == (relation_heads or 2)
    assert not any(p.requires_grad for p in teacher.parameters())  # TinyMIM has frozen it
    larger, patches = tinymim.load_teacher(path, img_size=64), vit.pos_embed[:, 1:].mT.view(1, 24, 4, 4)
    patches = torch.nn.functional.interpolate(patches, (8, 8), mode="bicubic").flatten(2).mT
    same(larger.pos_embed.data, torch.cat([vit.pos_embed[:, :1], patches], dim=1).data)
    assert "heads" not in capsys.readouterr().out

def test_heads_that_a_file_does_not_tell_are_guessed_and_said(tmp_path, capsys):
    for dim, heads in {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 24: 1}.items():  # timm's
        torch.save(ViT(dim, 1, heads, 8, 16).state_dict(), tmp_path / "x.pth")
        assert tinymim.read_checkpoint(str(tmp_path / "x.pth"))[1]["heads"] == heads
        said = capsys.readouterr().out
        assert f"{heads} attention heads" in said and "--teacher-heads" in said and "--heads" in said

def test_checkpoints_that_do_not_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, weight = ViT(**SMALL).state_dict(), "blocks.0.norm1.weight"
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("code-ran",))})()
    for says, content in [
        ("norm.weight", finetune.Classifier(**SMALL).state_dict()),  # lacks it
        *(("x.pth", tensors | {"pos_embed": torch.zeros(shape)}) for shape in ((1, 12, 24), (17, 24), 17)),
        *(("x.pth", tensors | {f"blocks.{name}": torch.zeros(24)}) for name in ("0.ls1.gamma", "999999.x")),
        *((name, tensors | {name: torch.zeros(25)}) for name in ("cls_token", "patch_embed.proj.weight")),
        *((weight, tensors | {weight: torch.ones(24).to(t)}) for t in (torch.bool, torch.int8, torch.cfloat)),
        ("timm's names", {"vit.embeddings.cls_token": torch.zeros(3)}), ("no ViT", [1, 2]),
        *(("cannot load", content) for content in ({"model": tensors, "args": evil}, b"\xff\xd8", b"")),
        ("state_dict", {"model": tensors, "loss": np.float64(1)}),  # NumPy's own numbers
    ]:
        open("x.pth", "wb").write(content) if isinstance(content, bytes) else torch.save(content, "x.pth")
        for img_size in (None, 64):
            with pytest.raises(UserError, match=says) as error:
                tinymim.load_teacher("x.pth", img_size, heads=2)
            assert "\n" not in str(error.value) and "x.pth" in str(error.value)
            assert "weights_only" not in str(error.value)
    assert os.listdir() == ["x.pth"]  # no code has run

def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": ViT(**SMALL).state_dict()}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    torch.load(path)  # PyTorch does not notice
    with pytest.raises(UserError, match="x.pth .*checksum"):
        tinymim.load_teacher(str(path), heads=2)

def test_download(tmp_path, monkeypatch):  # once; and what is there is never deleted
    whole, hub = tmp_path / "whole.pth", tmp_path / "hub" / "checkpoints"
    torch.save({"model": ViT(192, 1, 3, img_size=32).state_dict()}, whole)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for web in (tmp_path.as_uri(), f"http://127.0.0.1:{server.server_port}"):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        for name in ("missing", "whole"):
            monkeypatch.setitem(tinymim.TEACHERS, name, f"{web}/{name}.pth")
        with pytest.raises(UserError, match=f"{web}/missing.pth.* by hand to {hub}/missing.pth.*demo"):
            tinymim.load_teacher("missing")
        assert tinymim.load_teacher("whole").dim == 192
        assert os.listdir(hub) == ["whole.pth"]
    server.shutdown()
    assert tinymim.load_teacher("whole").dim == 192
    for error in (MemoryError(), PermissionError("denied"), OSError("I/O error")):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(UserError, match=f"{hub}/whole.pth"):  # says which file it is about
            tinymim.load_teacher("whole")
        assert (hub / "whole.pth").read_bytes() == whole.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(tinymim, "LOCAL_RANK", 1)  # waits for process 0 of its machine
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "other"))
    arrives = lambda seconds: (shutil.copytree(tmp_path / "hub", tmp_path / "other"))
    monkeypatch.setattr(time, "sleep", Mock(side_effect=arrives))
    monkeypatch.setitem(tinymim.TEACHERS, "whole", "http://127.0.0.1:9/whole.pth")
    assert tinymim.load_teacher("whole").dim == 192 and time.sleep.call_count == 1

def test_odd_files_are_ordinary(tmp_path):  # whatever the kind of file and its name: the same picture
    noise = np.random.RandomState(0).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise).resize((50, 40), Image.BICUBIC)
    gray, palette, cmyk, alpha = (rgb.convert(mode) for mode in ("L", "P", "CMYK", "RGBA"))
    alpha.putalpha(128)
    kinds = [("JPEG", rgb, rgb), ("JPEG", cmyk, rgb), ("JPEG", gray, gray), ("PNG", rgb, rgb),
             ("PNG", alpha, rgb), ("PNG", gray, gray), ("PNG", palette, palette), ("WEBP", rgb, rgb)]
    for (kind, image, expected), name in itertools.product(kinds, ("x.JPEG", "x.png")):
        image.save(tmp_path / name, kind)
        decoded = tinymim.decode(str(tmp_path / name))
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, 40, 50), (kind, name)
        difference = decoded.permute(1, 2, 0).numpy() - np.asarray(expected.convert("RGB")).astype(float)
        assert np.abs(difference).mean() < (0.01 if kind == "PNG" else 4), (kind, name)

def test_without_torchvisions_decoder_pillow_decodes(tmp_path, monkeypatch):
    smooth = np.add.outer(np.arange(40), np.arange(50))[..., None] * np.array([2, 1, 1])
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    fast = tinymim.decode(tmp_path / "x.jpg")
    monkeypatch.setattr(tinymim, "decode_jpeg", None)
    slow = tinymim.decode(tmp_path / "x.jpg")
    assert slow.dtype == torch.uint8 and (slow.float() - fast.float()).abs().max() <= 2

def test_pictures_that_are_refused(tmp_path, monkeypatch):
    """Instead of turning white, running Ghostscript, or taking gigabytes."""
    deep = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="deep.png .*8 bits"):
        tinymim.decode(tmp_path / "deep.png")
    for kind, image in (("EPS", Image.new("RGB", (4, 4))), ("TIFF", Image.new("F", (4, 4)))):
        image.save(tmp_path / "x.jpg", kind)
        monkeypatch.setattr(subprocess, "Popen", Mock(side_effect=AssertionError("a program was run")))
        with pytest.raises(UserError, match="x.jpg .*cannot identify"):
            tinymim.decode(tmp_path / "x.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.jpg")
    content = (tmp_path / "bomb.jpg").read_bytes()
    header = content.index(b"\xff\xc0") + 5  # height and width follow
    claimed = content[:header] + bytes([0x4e, 0x20] * 2) + content[header + 4:]  # 20,000 by 20,000
    (tmp_path / "bomb.jpg").write_bytes(claimed)
    with pytest.raises(UserError, match="bomb.jpg .*decompression bomb"):
        tinymim.decode(tmp_path / "bomb.jpg")

def test_damaged_files_are_errors_that_name_them(tmp_path):  # a decoder that crashes would end the tests here
    path, generator, errors = tmp_path / "x.JPEG", np.random.RandomState(0), set()
    image = Image.fromarray(generator.randint(0, 256, (20, 30, 3), dtype=np.uint8))
    dataset = tinymim.ImageDataset(np.array([os.fsencode(path)]), v2.CenterCrop(16))
    jpeg, png = (image.save(path, kind) or path.read_bytes() for kind in ("JPEG", "PNG"))
    flips = [32, len(png) - 13, len(png) - 1, *generator.randint(8, len(png), 400)]  # the first: in CRCs
    broken = [png[:i] + bytes([png[i] ^ 1 << generator.randint(8)]) + png[i + 1:] for i in flips]
    broken += [png[:len(png) // 2], jpeg[:len(jpeg) // 2], jpeg[:10], b"not an image", b""]
    for content in broken:
        path.write_bytes(content)
        try:
            assert dataset[0][0].shape == (3, 16, 16)
        except UserError as error:
            errors.add(content)
            assert str(error).startswith(f"cannot read {path} (")
    assert len(errors) > 300 and {broken[0], *broken[-5:]} <= errors

def test_finding_images(tmp_path, monkeypatch, capsys):
    """Hidden ones are left out, other files are counted, names may be any bytes, and no unreadable
    folder is skipped."""
    folder = tmp_path / "a" / "ünïcode folder"
    folder.mkdir(parents=True)
    for hidden in (".ipynb_checkpoints/1.jpg", "a/._1.jpg"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    for name in ("2.PNG", "1.jpeg", "3.webp", "notes.txt", "scan.tiff"):
        (folder / name).touch()
    Image.new("RGB", (3, 2)).save(os.fsencode(folder) + b"/\xff.png", "PNG")  # not UTF-8
    found = tinymim.find_images(str(tmp_path))
    assert [os.path.basename(path) for path in found] == [b"1.jpeg", b"2.PNG", b"3.webp", b"\xff.png"]
    assert "2 files" in capsys.readouterr().out
    assert tinymim.ImageDataset(found, lambda image: image.shape)[3] == ((3, 2, 3),)
    os.symlink("gone.jpg", folder / "dangling.jpg")
    paths = tinymim.find_images(str(tmp_path))
    with pytest.raises(UserError, match="dangling.jpg .*No such file"):
        tinymim.ImageDataset(paths, None)[3]
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Mock(side_effect=[os.scandir(tmp_path), PermissionError("denied")]))
        with pytest.raises(OSError, match="denied"):
            tinymim.find_images(str(tmp_path))
    for name in ("loop", "again"):  # not all ways through them: that would take for ever
        os.symlink(".", folder / name)
    with pytest.raises(OSError, match="loop|again"):
        tinymim.find_images(str(tmp_path))

def test_two_views_of_a_crop_with_torchvisions_color_jitter(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tinymim, "color_jitter", Mock(side_effect=tinymim.color_jitter))
    crops = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8)
    student, teacher = tinymim.two_views(crops)
    _, orders, factors = tinymim.color_jitter.call_args.args
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4 and len(factors.unique()) > 100
    assert {*map(tuple, orders.tolist())} == {*itertools.permutations(range(3))}
    changes, jittered = ("adjust_brightness", "adjust_contrast", "adjust_saturation"), [*(crops / 255)]
    for i, step in itertools.product(range(40), range(3)):
        change = getattr(v2.functional, changes[orders[i, step]])
        jittered[i] = change(jittered[i], factors[i, step].item())
    for view, images in ((student, torch.stack(jittered)), (teacher, crops / 255)):
        same(view, v2.functional.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), atol=1e-5)

def test_crops_depend_on_seed_epoch_and_image_only(pictures):  # also in workers that live on
    paths, crop = tinymim.find_images(f"{pictures}/train"), v2.RandomResizedCrop(16, (0.2, 1))
    crops = [{i: tinymim.ImageDataset(paths, crop, seed)[24 * epoch + i][0] for i in range(24)}
             for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(a[i], b[i]) for a, b in itertools.combinations(crops, 2) for i in range(24))
    dataset = tinymim.ImageDataset(paths, crop, labels=np.arange(24))
    sampler = tinymim.EpochSampler(dataset, 1, 0)
    loader = DataLoader(dataset, 8, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        images, labels = map(torch.cat, zip(*loader))
        same(dict(zip(labels.tolist(), images)), crops[epoch])

# ---- Training, through the command line --------------------------------------------------------------------

def test_what_a_run_leaves(distil, tmp_path, capsys):
    run = tmp_path / "run"
    tinymim.main(distil + ["--epochs=8"])
    last, log = load(run), result(run)["log"]["history"]
    assert list(log[0]) == ["epoch", "qq", "kk", "vv", "loss", "lr", "images/s"] and last["epoch"] == 8
    said = capsys.readouterr().out
    assert log[7]["loss"] < 0.85 * log[0]["loss"] and len(log) == len(re.findall("^epoch", said, re.M)) == 8
    for line in ("student +24 wide, 3 blocks, 2 heads", "teacher +48 wide, 4 blocks, 4 heads",
                 "loss +qq kk vv of block 3, 4 relation heads", "untrained, .*: .*attn.proj .* student.norm",
                 "training +24 images, 3 updates of 8 per epoch, 8 epochs, peak rate 0.00156",
                 f"machine +cpu, amp off, 0 workers, 1 threads, into {run}", "finished. Next: .*finetune.py"):
        assert len(re.findall(f"^{line}", said, re.M)) == 1, line
    assert all(record["loss"] == pytest.approx(record["qq"] + record["kk"] + record["vv"]) for record in log)
    assert sorted(os.listdir(run)) == ["last.pth", "log.jsonl"]
    assert last["config"] == SMALL | {"relation_heads": 4} and "teacher.norm.bias" not in last["objective"]
    tinymim.main([*distil, f"--teacher={run}/last.pth", "--teacher-heads=2", f"--out={tmp_path}/next"])
    assert load(tmp_path / "next")["config"]["relation_heads"] == 4  # a student is a valid teacher

def test_a_run_is_a_plain_loop_with_adamw(distil, tmp_path, pictures):
    """And a student does not begin as its teacher began: its relations would be right from the start."""
    torch.manual_seed(0)
    began, path = ViT(**SMALL).state_dict(), f"{tmp_path}/began.pth"  # as extras/mae.py begins
    torch.save({"model": began, "config": SMALL}, path)
    tinymim.main([*distil, "--epochs=2", "--warmup-epochs=0.5", f"--teacher={path}", "--teacher-heads=2"])
    torch.manual_seed(0)
    teacher, student = tinymim.load_teacher(path, heads=2), ViT(**SMALL, drop_path=0.1)
    assert not any(student.get_parameter(name).equal(began[name]) for name in began if "qkv.weight" in name)
    objective, plain, decayed = TinyMIM(student, teacher), dict(params=[], weight_decay=0), dict(params=[])
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if "norm" in name or "bias" in name else decayed)["params"].append(parameter)
    optimizer = torch.optim.AdamW([decayed, plain], betas=(0.9, 0.95), weight_decay=0.05)
    crop = v2.RandomResizedCrop(32, (0.2, 1), interpolation=BICUBIC)
    transform, paths = v2.Compose([crop, v2.RandomHorizontalFlip()]), tinymim.find_images(f"{pictures}/train")
    dataset, sampler = tinymim.ImageDataset(paths, transform), tinymim.EpochSampler(paths, 1, 0)
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

LAUNCHER = """
import json, sys, finetune, tinymim, torch
tinymim.color_jitter = lambda images, order, factors: images  # each process draws its own
torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups)  # which sees how long gradients are
init, destroy = tinymim.dist.init_process_group, tinymim.dist.destroy_process_group
tinymim.dist.init_process_group = lambda backend: tinymim.dist.is_initialized() or init(backend)
tinymim.dist.destroy_process_group = lambda: None  # one group for all runs
for name, options in json.loads(sys.argv[1]):
    {"tinymim": tinymim, "finetune": finetune}[name].main(options)
tinymim.dist.barrier()
destroy()
"""

def test_two_machines_and_accumulation_are_one_large_batch(distil, tune, tmp_path, monkeypatch, capsys):
    """Both machines are this one: torchrun is started twice, with a process each."""
    distil, tune = ([*options, "--drop-path=0", "--blr=5"] for options in (distil, tune + ["--augment=crop"]))
    whole, tuned, a, b, c = (f"--out={tmp_path}/{name}" for name in "whole tuned a b c".split())
    jobs = [("tinymim", [*distil, "--batch-size=4", a]),
            ("tinymim", [*distil, "--batch-size=2", "--accum=2", b]),
            ("finetune", [*tune, "--batch-size=4", c]),
            ("finetune", [*tune, "--eval", f"--checkpoint={tmp_path}/c/best.pth"])]
    (tmp_path / "launch.py").write_text(LAUNCHER)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    torchrun += [tmp_path / "launch.py", json.dumps(jobs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    machines = [subprocess.Popen(torchrun, **pipes) for _ in range(2)]
    printed, errors = zip(*[machine.communicate() for machine in machines])
    assert [machine.returncode for machine in machines] == [0, 0], errors
    monkeypatch.setattr(tinymim, "color_jitter", lambda images, order, factors: images)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups))
    tinymim.main([*distil, whole])
    finetune.main([*tune, tuned])
    for part, whole in (("a", "whole"), ("b", "whole"), ("c", "tuned")):
        part, whole = result(tmp_path / part), result(tmp_path / whole)
        same(part["last.pth"]["model"], whole["last.pth"]["model"], atol=1e-6)
        same(part["log"], whole["log"], rtol=1e-5)
    capsys.readouterr()
    finetune.main(jobs[-1][1])
    assert capsys.readouterr().out.splitlines()[-1] == "".join(printed).splitlines()[-1]

def forked(main, options, seconds=None, step=None):
    """main(options) in a forked process, killed after so many seconds, or before or after an os.replace()."""
    if (child := os.fork()) == 0:
        tinymim.tqdm.set_lock(threading.RLock())  # the usual one is shared: a killed process would keep it
        steps, replace = itertools.count(1), os.replace
        kill = lambda: next(steps) == step and os.kill(os.getpid(), signal.SIGKILL)
        os.replace = lambda *paths: (kill(), replace(*paths), kill())
        try:
            main(options)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)

@pytest.mark.parametrize("first, then", [
    ([], []), 2 * [["--workers=2"]], ([], ["--workers=1"]), 2 * [["--amp=bf16"]], 2 * [["--amp=fp16"]]])
def test_a_killed_run_resumes_exactly(either, first, then, tmp_path):
    """Bit for bit, after kills between all steps of saving and, up to three in a run, at random moments."""
    main, options, run = either[0], either[1] + ["--drop-path=0.2"], tmp_path / "run"
    began, generator = time.perf_counter(), np.random.RandomState(0)
    forked(main, [*options, *first, f"--out={tmp_path}/whole"])
    moments = (time.perf_counter() - began) * generator.uniform(0.2, 0.8, KILLS // 2)
    kills = [[dict(step=step)] for step in range(1, 13)]
    kills += [[dict(seconds=moment) for moment in moments[i:i + 3]] for i in range(0, len(moments), 3)]
    for kills_of_run in kills[1:2] if then else kills:
        for kill in [*kills_of_run, {}]:  # nothing may have been saved yet: --resume starts, then
            forked(main, [*options, *then, "--resume"], **kill)
        same(result(run), result(tmp_path / "whole"))
        assert ("--amp=fp16" in then) == bool(load(run)["scaler"])
        shutil.rmtree(run)

def test_another_objective(distil, tmp_path, capsys):
    """It is trained, saved and resumed; parameters that its loss does not reach are named."""
    def build(args):
        objective = tinymim.build(args)
        objective.scale = torch.nn.Parameter(torch.ones(()))
        objective.unused = torch.nn.Parameter(torch.ones(()), requires_grad=args.seed > 0)
        objective.forward = lambda x, _: {
            "size": objective.student.qkv_at(x, 3)[0].norm() * objective.scale**2}
        return objective
    main = functools.partial(tinymim.main, build_objective=build)
    main(distil + [f"--out={tmp_path}/whole"])
    forked(main, distil, step=5)
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": 1, "lo')  # the history is in the checkpoint too
    main(distil + ["--resume"])
    same(result(tmp_path / "run"), result(tmp_path / "whole"))
    last = load(tmp_path / "run")
    assert "scale" in last["objective"] and last["history"][2]["size"] < last["history"][0]["size"]
    capsys.readouterr()
    main([*distil, "--seed=1", "--epochs=2", f"--out={tmp_path}/unused"])
    assert len(re.findall("no loss reaches them: unused ", capsys.readouterr().out)) == 1

def test_nothing_is_frozen_that_a_subclass_needs(distil, tmp_path):
    """An objective on the student's output, as a subclass of TinyMIM, trains the whole student."""
    class Feature(TinyMIM):
        def forward(self, student_images, teacher_images):
            return {"feature": self.student(student_images).square().mean()}
    tinymim.main([*distil, "--epochs=2"], lambda args: tinymim.build(args, Feature))
    torch.manual_seed(0)
    began, ended = ViT(**SMALL).state_dict(), load(tmp_path / "run")["model"]
    torch.manual_seed(0)
    began = tinymim.build(args_of(tinymim, *distil)).student.state_dict()
    same = [name for name in began if began[name].equal(ended[name])]
    assert same == ["pos_embed"]

@pytest.mark.parametrize("scripts, says, options", [  # -GLOB: without these pictures; !GLOB: they are damaged
    ("both", "--device cpu", "--device=cuda"), ("both", "/nonexistent", "--data=/nonexistent"),
    ("both", "cannot download https://s3", "--data=imagenette"), ("both", " 30", "--img-size=30"),
    ("both", "24 images do not fill an update of 100: --batch-size 24 or less", "--batch-size=100"),
    ("both", "--batch-size 2 or less", "--accum=10"), ("both", "/null/x", "--out=/dev/null/x"),
    ("tinymim", "cannot download http://127.0.0.1", "--teacher=mae_base"),
    ("tinymim", "no file mae_bass; known by name are mae_base", "--teacher=mae_bass"),
    ("tinymim", "1 to 4", "--teacher-block=9"), ("tinymim", "--relation-heads", "--relation-heads=7"),
    ("tinymim", "pair twice", "--relations qq vv qq"), ("tinymim", "loss is nan", "--teacher=nan.pth"),
    ("tinymim", "no .jpg, .png or .webp", "-*/*/*"), ("tinymim", "--blr", "--blr=1e8"),
    ("tinymim", "red/2.png", "!train/red/2.png --workers=1"), ("finetune", "red/8.png", "!val/red/8.png"),
    ("finetune", "red/8.png", "!val/red/8.png --workers=1"), ("finetune", "train/red", "-train/red/*"),
    ("finetune", "class red", "-val/red"), ("finetune", "/val", "-val"), ("finetune", "two at", "-*/[gr]*"),
    ("finetune", "no file x", "--checkpoint=x"), ("finetune", "one head", "--checkpoint=mae.pth --eval"),
    ("finetune", "--student", "--checkpoint=mae.pth --student=tiny"),
])
def test_errors_are_one_line(distil, tune, pictures, tmp_path, monkeypatch, scripts, says, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinymim, "TEACHERS", {"mae_base": "http://127.0.0.1:9/mae.pth"})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    broken = ViT(**WIDER).state_dict() | {"blocks.0.norm1.weight": torch.full((48,), math.nan)}
    torch.save(broken, "nan.pth")
    changed, (first, *more) = shutil.copytree(pictures, tmp_path / "changed"), options.split()
    if not first.startswith("--"):
        for i, path in enumerate([*changed.glob(first[1:])]):
            path.write_text("damaged") if first[0] == "!" else path.rename(tmp_path / str(i))
        first = f"--data={changed}"
    for module, usual in ((tinymim, distil), (finetune, tune)):
        if scripts in ("both", module.__name__):
            fails(module.main, [*usual, first, *more], f"{module.__name__}.py", says)
    assert not os.path.exists("data")

@pytest.mark.parametrize("option", [
    "--epochs=0", "--batch-size=-1", "--accum=0", "--dim=0", "--depth=-3", "--heads=0", "--img-size=0",
    "--workers=-1", "--seed=12345678901234567890", "--blr=-1", "--blr=nan", "--blr=inf", "--weight-decay=-1",
    "--drop-path=1.5", "--drop-path=-0.1", "--warmup-epochs=-1", "--epochs=two", "--relations=xy",
    "--teacher-block=0", "--relation-heads=0", "--teacher-heads=-1", "--layer-decay=2", "--crop-scale=0",
    "--crop-scale=1.1", "--eval-every=0", "--patch-size=0"])
def test_numbers_out_of_range_are_refused_by_the_options(option, distil, tune, capsys):
    for module, usual in ((tinymim, distil), (finetune, tune)):
        with pytest.raises(SystemExit) as stopped:
            module.main([*usual, option])
        name, said = option.split("=")[0], capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2
        assert f"argument {name}" in said or f"unrecognized arguments: {option}" in said

def test_a_run_is_not_overwritten(either, tmp_path):
    (main, options), run = either, tmp_path / "run"
    run.mkdir()
    for name in ("last.pth", "best.pth"):
        (run / name).write_text("precious")
        fails(main, options, "holds a run", str(run))
        assert os.listdir(run) == [name] and (run / name).read_text() == "precious"
        (run / name).unlink()

def test_resuming_before_anything_was_saved_starts(either, tmp_path):
    """A requeued job repeats its command with --resume. log.jsonl alone is no run either."""
    (main, options), run = either, tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("{}")
    main([*options, "--resume", "--epochs=1"])
    (run / "last.pth").rename(tmp_path / "first.pth")
    (run / "best.pth").unlink(missing_ok=True)
    main([*options, "--epochs=1"])
    same(load(run)["model"], load(tmp_path, "first.pth")["model"])

OTHER_RUNS = [
    "--epochs=2", "--epochs=4", "--batch-size=4", "--accum=2", "--blr=0.01", "--weight-decay=0.1",
    "--drop-path=0.3", "--warmup-epochs=1", "--seed=1", "--amp=bf16", "--dim=48", "--depth=2", "--heads=4"]
OF_TINYMIM = ["--teacher={}/other.pth", "--teacher-heads=2", "--teacher-block=4", "--relations qk vv",
              "--relation-heads=2"]
OF_FINETUNE = ["--layer-decay=0.5", "--augment=crop", "--crop-scale=0.5", "--eval-every=2"]

def test_another_run_is_not_resumed(either, tmp_path):
    """Nothing that shapes the result may change, and what differs is named."""
    (main, options), run = either, tmp_path / "run"
    shutil.copy(tmp_path / "mae.pth", tmp_path / "other.pth") if main is tinymim.main else None
    main(options)
    before = (run / "last.pth").read_bytes()
    for other in OTHER_RUNS + (OF_TINYMIM if main is tinymim.main else OF_FINETUNE):
        name = re.match("--([a-z-]+)", other)[1]
        name = {"accum": "images-per-update", "batch-size": "images-per-update"}.get(name, name)
        fails(main, [*options, "--resume", *other.format(tmp_path).split()], "has a run with", f"--{name} ")
    assert (run / "last.pth").read_bytes() == before
    main([*options, "--resume", "--batch-size=2", "--accum=4", "--workers=1"])  # the same update
    assert (run / "last.pth").read_bytes() == before  # which has nothing left to do

def test_another_objective_or_other_classes_are_not_resumed(distil, tune, pictures, tmp_path):
    tinymim.main([*distil, "--epochs=1"])
    parser = tinymim.make_parser("extras/mine.py", tinymim.__doc__, tinymim.RECIPE, teacher=True)
    mine = parser.parse_args([*distil, "--epochs=1", "--resume"])
    fails(lambda args: tinymim.run(Mock(prog="mine.py"), tinymim.train, args), mine, "has a run with", "mine.py")
    tune = [*tune, f"--out={tmp_path}/tuned", "--epochs=1"]
    finetune.main(tune)
    renamed = shutil.copytree(pictures, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "red").rename(renamed / split / "apple")
    fails(finetune.main, [*tune, f"--data={renamed}", "--resume"], "has a run with", "classes", "apple")

@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_last_checkpoint_is_named(either, damage, tmp_path):
    (main, options), last = either, tmp_path / "run" / "last.pth"
    main([*options, "--epochs=1"])
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pth")
    last.write_bytes({"cut": content[:5000], "flipped": content, "empty": b"",
                      "foreign": (tmp_path / "foreign.pth").read_bytes()}[damage])
    before = last.read_bytes()
    fails(main, [*options, "--epochs=1", "--resume"], str(last))
    assert last.read_bytes() == before

@pytest.mark.parametrize("message, says", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore", "halve --batch-size and double --accum"),
    ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999999 bytes.", "--batch-size"),
    ("unable to allocate shared memory(shm) for file </torch_7>: Success (0)", "--shm-size"),
    ("DataLoader worker (pid(s) 7) exited unexpectedly", "--workers"),  # killed for the memory that it takes
    ("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file", "full disk"),
])
def test_advice_is_added_to_what_pytorch_says(distil, monkeypatch, message, says):
    monkeypatch.setattr(tinymim, "two_views", Mock(side_effect=RuntimeError(message)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    fails(tinymim.main, distil, message.splitlines()[0], says)

def test_other_errors_keep_their_traceback(distil, monkeypatch):  # they are bugs, perhaps the user's own
    for error in (RuntimeError("my state_dict is odd"), ValueError("memory"), KeyError("parameter group")):
        with pytest.raises(type(error)) as raised:
            tinymim.main(distil, Mock(side_effect=error))
        assert raised.value is error

def test_a_full_disk_loses_nothing(distil, tmp_path):
    forked(tinymim.main, distil, step=3)  # killed after the first epoch
    resource = pytest.importorskip("resource")  # not on Windows
    last, limits = tmp_path / "run" / "last.pth", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = last.read_bytes()
    for limit in (50_000, len(before) - 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # writing past it fails
        try:
            fails(tinymim.main, distil + ["--resume"], "full disk")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert last.read_bytes() == before

def test_ctrl_c(either, tmp_path):  # in training with workers: at once, and without a traceback
    with open(tmp_path / "stderr", "w+") as stderr:
        options = [*either[1], "--epochs=9999", "--workers=2"]
        process = start(either[0].__module__, *options, stderr=stderr)
        while not (tmp_path / "run" / "last.pth").exists():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=5) == 130
        stderr.seek(0)
        assert "Traceback" not in stderr.read() and load(tmp_path / "run")["epoch"] > 0

def test_odd_terminals(distil, tmp_path):  # umlauts, a pipe that is soon closed, and an error
    processes = [start("tinymim", *distil, f"--out={tmp_path}/ü", "--epochs=1"),
                 start("tinymim", *distil, f"--out={tmp_path}/b", "--epochs=200"),
                 start("finetune", "--checkpoint=none", "--data=/ü", f"--out={tmp_path}/c")]
    processes[1].stdout.close()
    said = [process.stderr.read() for process in processes]
    assert [process.wait() for process in processes] == [0, 1, 1], said
    assert load(tmp_path / "ü")["epoch"] == 1 and "Traceback" not in said[1]
    assert re.fullmatch(r"finetune\.py: error: .*ü.*\n", said[2])

def test_golden_classifier_and_layer_decay():
    model = filled(finetune.Classifier(192, 12, 3), "ft.", also=["pos_embed"])
    logits = model(2 * fill("images", 2, 3, 224, 224))
    expected = [0.07162610234623845, 0.5291574265645436, -0.8211863038311218, 0.9171481237313825]
    assert logits[0, :4].tolist() == near(expected) and logits[1].argmax() == 323
    assert sum(p.numel() for p in model.parameters()) == 5717416
    groups = finetune.parameter_groups(model, 0.05, 0.65)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, expected in {
        "cls_token": (0.003697205891, 0.0), "pos_embed": (0.003697205891, 0.0), "head.bias": (1.0, 0.0),
        "patch_embed.proj.weight": (0.003697205891, 0.05), "patch_embed.proj.bias": (0.003697205891, 0.0),
        "blocks.0.norm1.weight": (0.005688009063, 0.0), "blocks.0.attn.qkv.weight": (0.005688009063, 0.05),
        "blocks.5.mlp.fc1.bias": (0.049022278906, 0.0), "blocks.11.mlp.fc2.weight": (0.65, 0.05),
        "fc_norm.weight": (1.0, 0.0), "head.weight": (1.0, 0.05),
    }.items():
        assert found[id(model.get_parameter(name))] == near(expected), name

def test_timm_agrees():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours, images = finetune.Classifier(192, 12, 3).eval(), torch.randn(2, 3, 224, 224)
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool="avg").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    same(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

def evaluate(capsys, path, folder):
    """[top-1, loss] that --eval prints, and that were counted by hand."""
    finetune.main([*QUICK, "--eval", f"--checkpoint={path}", f"--data={folder}", "--heads=2"])
    said = capsys.readouterr().out.splitlines()[-1]
    printed = map(float, re.search(r"the (\d+) images .*top-1 (.*)%, loss (.*)", said).groups())
    model, right, losses = finetune.Classifier(24, 3, 2, 3, 8, 32).eval(), 0, []
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    resize = v2.Resize(36, interpolation=BICUBIC)  # of which the middle 32 count, as 224 of 256
    for label, name in enumerate(sorted(os.listdir(folder))):
        for image in (resize(tinymim.decode(file)) for file in (folder / name).iterdir()):
            logits = model(tinymim.normalize(v2.CenterCrop(32)(image)[None] / 255))[0].detach()
            right += int(logits.argmax() == label)
            losses.append(-logits.log_softmax(0)[label].item())
    counted = [len(losses), 100 * right / len(losses), sum(losses) / len(losses)]
    assert list(printed) == pytest.approx(counted, abs=1e-3) and 0 < right < len(losses)
    return pytest.approx(counted[1:], abs=1e-3)

def test_finetuning_learns_and_is_evaluated_exactly(tune, pictures, tmp_path, capsys):
    finetune.main(tune + ["--epochs=6"])
    run, val, some, bare = tmp_path / "run", pictures / "val", tmp_path / "some", tmp_path / "bare.pth"
    last, best = load(run), load(run, "best.pth")
    assert list(last["history"][0]) == ["epoch", "loss", "lr", "images/s", "top1", "val_loss"]
    assert sorted(os.listdir(run)) == ["best.pth", "last.pth", "log.jsonl"]
    assert best["history"][-1]["top1"] == max(record["top1"] for record in last["history"]) > 60
    for name, record in (("last.pth", last["history"][-1]), ("best.pth", best["history"][-1])):
        assert [record["top1"], record["val_loss"]] == evaluate(capsys, run / name, val)
    torch.save({"model": last["model"]}, bare)  # MAE's files do not tell the classes
    evaluate(capsys, bare, val)
    finetune.main([*tune, f"--out={tmp_path}/rare", "--epochs=5", "--eval-every=2"])
    assert [record["epoch"] for record in load(tmp_path / "rare")["history"] if "top1" in record] == [2, 4, 5]
    for name in ("green", "red"):  # some of the classes, and then others
        shutil.copytree(val / name, some / name)
    options = [*QUICK, "--eval", f"--checkpoint={run}/last.pth", f"--data={some}"]
    fails(finetune.main, options, str(some), "robustness.py")
    fails(finetune.main, [*options, f"--checkpoint={bare}", "--heads=2"], "head.weight")
    (some / "red").rename(some / "violet")
    fails(finetune.main, options, str(some))

def test_a_broken_photo_is_found_before_training(tune, pictures, tmp_path):
    broken = shutil.copytree(pictures, tmp_path / "broken")
    (broken / "val" / "red" / "8.png").write_text("damaged")
    with patch.object(tinymim, "fit", Mock(side_effect=AssertionError("trained"))):
        fails(finetune.main, [*tune, f"--data={broken}"], "red/8.png")

def test_hidden_folders_are_no_classes(pictures, tmp_path):
    copy = shutil.copytree(pictures / "train", tmp_path / "copy")
    (copy / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(copy / ".ipynb_checkpoints" / "1.png")
    paths, labels, classes = finetune.read_folder(str(copy))
    assert classes == ["blue", "green", "red"] and len(paths) == len(labels) == 24

def test_what_finetuning_starts_from(distil, tmp_path):  # a new head, or for the same classes the old one
    def start(path, classes, *options):
        args = args_of(finetune, f"--checkpoint={tmp_path}/{path}", *options)
        return finetune.build(args, finetune.settle(args), classes)
    tinymim.main(distil + ["--epochs=1"])
    student, model = load(tmp_path / "run")["model"], start("run/last.pth", ["a", "b"])
    weights, larger = model.state_dict(), start("run/last.pth", ["a", "b"], "--img-size=64")
    assert weights.keys() - student.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(weights[name].equal(student[name]) for name in student if not name.startswith("norm."))
    assert larger(torch.ones(1, 3, 64, 64)).shape == (1, 2)
    torch.save({"model": weights, "config": model.config}, tmp_path / "tuned.pth")
    same(start("tuned.pth", ["a", "b"]).state_dict(), weights)
    other = start("tuned.pth", ["a", "c"]).state_dict()
    assert not other.pop("head.weight").equal(weights.pop("head.weight"))
    same(other, weights)

def test_recipes_follow_the_size(tmp_path):
    """MAE-Lite's for T and S, the authors' for a distilled B, MAE's for its own B and L."""
    assert tinymim.RECIPE.items() >= dict(epochs=300, blr=1.5e-4, drop_path=0.1, min_lr=0.0).items()
    light = dict(epochs=300, warmup_epochs=5, blr=1e-3, drop_path=0.0, augment="light", batch_size=128)
    strong = dict(epochs=100, warmup_epochs=5, blr=5e-4, layer_decay=0.65, augment="strong", min_lr=1e-6)
    for dim, heads, relation_heads, options, expected in [
        (192, 3, 12, [], light | dict(layer_decay=0.85)), (384, 6, None, [], light | dict(layer_decay=0.75)),
        (384, 6, 12, ["--epochs=9", "--drop-path=0.3"], dict(epochs=9, warmup_epochs=0.45, drop_path=0.3)),
        (768, 12, 16, [], strong | dict(drop_path=0.2)), (768, 12, None, [], strong | dict(drop_path=0.1)),
        (768, 12, 0, [], strong | dict(drop_path=0.2)),  # of features, by extras/targets.py
        (1024, 16, None, [], strong | dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2)),
    ]:
        vit = ViT(dim, 1, heads, relation_heads=relation_heads)
        torch.save({"model": vit.state_dict(), "config": vit.config}, tmp_path / "x.pth")
        args = args_of(finetune, f"--checkpoint={tmp_path}/x.pth", *options)
        finetune.settle(args)
        assert vars(args) | expected == vars(args), dim
    args = args_of(finetune, "--checkpoint=none", "--drop-path=0.22")
    model = finetune.build(args, finetune.settle(args), list("abcdefg"))
    assert (args.epochs, args.layer_decay, args.augment, model.dim) == (300, 1, "light", 192)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert [block.drop_path.p for block in model.blocks] == near([0.02 * i for i in range(12)])

TIMMS = dict(Posterize="PosterizeIncreasing", Solarize="SolarizeIncreasing", Color="ColorIncreasing",
             Contrast="ContrastIncreasing", Brightness="BrightnessIncreasing", Sharpness="SharpnessIncreasing",
             TranslateX="TranslateXRel", TranslateY="TranslateYRel")

@pytest.fixture(scope="module")
def textures():  # coarse colours and fine noise, as in photos, and different in brightness and contrast
    generator, found = np.random.RandomState(0), []
    for _ in range(50):
        coarse = generator.normal(generator.uniform(70, 190), generator.uniform(20, 60), (4, 4, 3))
        coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((48, 48), Image.BICUBIC)
        noise = generator.normal(0, generator.uniform(3, 15), (48, 48, 3))
        found.append(Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)))
    return found

def changes(change, images, count):  # percent left untouched, and mean change of a value
    difference = []
    for i in range(count):
        image = images[i % len(images)]
        difference.append(np.abs(np.asarray(change(image), dtype=float) - np.asarray(image)).mean())
    return 100 * np.mean(np.array(difference) == 0), np.mean(difference)

def posterize(image, bits_to_keep, **_):  # timm's asks Pillow for 0 bits, too, which Pillow 13 refuses
    return image.point([i & ~(2 ** (8 - bits_to_keep) - 1) for i in range(256)] * 3)

@pytest.mark.parametrize("name", [*finetune.OPERATIONS, 9, 10])
def test_randaugment_is_timms(name, textures, monkeypatch):
    """The share of untouched images within 3 points, the mean change within 5%, in all and for each
    operation."""
    timms = pytest.importorskip("timm.data.auto_augment")
    monkeypatch.setitem(timms.NAME_TO_OP, "PosterizeIncreasing", posterize)
    options = dict(img_mean=tuple(finetune.GRAY), interpolation=Image.BICUBIC, magnitude_std=0.5)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    if name in finetune.OPERATIONS:
        theirs, count = timms.AugmentOp(TIMMS.get(name, name), 1.0, 9, options), 600
        def ours(image):
            m, sign = (9 + 0.5 * torch.randn(())).clamp(0, 10).item() / 10, 2 * torch.randint(2, ()).item() - 1
            return finetune.OPERATIONS[name](image, sign * m)
    else:
        theirs = timms.rand_augment_transform(f"rand-m{name}-mstd0.5-inc1", options)
        ours, count = functools.partial(finetune.rand_augment, magnitude=name), 6000
    found, expected = changes(ours, textures, count), changes(theirs, textures, count)
    assert found[0] == pytest.approx(expected[0], abs=3) and found[1] == pytest.approx(expected[1], rel=0.05)

def test_train_transform(textures):
    """RandAugment with the recipe's magnitude, on bicubic crops; it can go to a worker by pickle."""
    for augment, magnitude in (("strong", 9), ("light", 10), ("crop", None)):
        transform = pickle.loads(pickle.dumps(finetune.train_transform(32, 0.3, augment)))
        crop, _, *rest = transform.transforms
        assert (crop.scale, crop.interpolation) == ((0.3, 1.0), BICUBIC)
        assert [step.lambd.keywords for step in rest[1:2]] == [{"magnitude": magnitude}] * bool(magnitude)
        image = v2.functional.pil_to_tensor(textures[0])
        assert transform(image).shape == (3, 32, 32) and transform(image).dtype == torch.uint8

def test_erasing_mixing_and_smoothing():
    torch.manual_seed(0)
    crops = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16) * 60
    labels, clean, noise, kinds = torch.arange(4), tinymim.normalize(crops / 255), [], set()
    same(finetune.Augment(4, "crop")(crops, labels), (clean, torch.eye(4, dtype=torch.long)))
    erase, mix = finetune.Augment(4, "strong"), finetune.Augment(4, "strong")
    assert [kind.alpha for kind in mix.mixes] == [0.8, 1.0]
    erase.mixes, mix.erase.p = [], 0.0
    for _ in range(100):
        images, _ = erase(crops, labels)
        noise += [image[image != old] for image, old in zip(images, clean) if not image.equal(old)]
        images, targets = mix(crops, labels)
        same(targets.sum(1), torch.ones(4), atol=1e-6)
        flat = (images - images[:, :, :1, :1]).abs().max() < 1e-4
        kinds.add((flat.item(), (targets.max() < 0.999).item()))
    assert kinds >= {(True, True), (False, True)}  # mixed, cut
    assert 80 < len(noise) < 120 and max(map(len, noise)) <= 256 + 48  # of 400 images; about a third at most
    assert abs(torch.cat(noise).mean()) < 0.05 and abs(torch.cat(noise).std() - 1) < 0.05
    logits, smoothed = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    supervised = finetune.Supervised(torch.nn.Identity(), argparse.Namespace(augment="strong"))
    loss = supervised(logits, torch.tensor([[1, 0, 0]]))["loss"]
    same(loss, -(smoothed * logits.log_softmax(1)).sum(), rtol=1e-6)

def test_commands_in_the_readmes_have_options_that_exist():
    commands = r"\b(?:python|torchrun)\b[^\n`]*? (tinymim|finetune)\.py\b([^\n`#|>]*)"
    found = re.findall(commands, (README + EXTRAS).replace("\\\n", " "))
    assert len(found) > 10
    for name, options in found:
        if "$" in options:  # a variable of the shell
            continue
        try:
            args_of({"tinymim": tinymim, "finetune": finetune}[name], *options.split())
        except SystemExit as stopped:
            assert stopped.code == 0 or not options.strip(), (name, options)  # --help, or the name alone

def test_heads_as_in_the_authors_code(distil, pictures, tmp_path):
    """T and S as in extras/README.md: 6 heads, relations of 12, and fine-tuning with 3."""
    student, run = ["--student=nano", "--heads=6", "--relation-heads=12", "--relations", "qk", "vv"], tmp_path / "run"
    distil = [option for option in distil if not re.match("--(dim|depth|heads)=", option)]
    tinymim.main([*distil, *student, "--epochs=1"])
    assert load(run)["config"] == dict(SMALL, dim=96, depth=4, heads=6, relation_heads=12)
    assert list(load(run)["history"][0])[1:3] == ["qk", "vv"]
    finetune.main([*QUICK, "--epochs=1", f"--checkpoint={run}/last.pth", "--heads=3", f"--data={pictures}"])
    tuned, before = load(f"{run}-finetuned"), load(run)["model"]
    assert tuned["config"]["heads"] == 3 and tuned["args"]["augment"] == "light"
    assert tuned["model"]["blocks.0.attn.qkv.weight"].shape == before["blocks.0.attn.qkv.weight"].shape

SNIPPETS = re.findall(r"```python\n((?:(?!```).)*import .*?)```", README + EXTRAS, re.DOTALL)

@pytest.mark.parametrize("code", SNIPPETS)
def test_readme_snippets_run(code, distil, tmp_path, monkeypatch):  # those without imports are formulas
    if re.search(r"^(import|from) timm", code, flags=re.MULTILINE):
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snippet.py", *distil])
    tiny = tinymim.STUDENTS["tiny"]
    for folder, name, model in (("runs/tiny", "last.pth", ViT(*tiny)),
                                ("runs/tiny-finetuned", "best.pth", finetune.Classifier(*tiny, 10))):
        os.makedirs(folder)
        torch.save({"model": model.state_dict(), "config": model.config}, f"{folder}/{name}")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
