"""Tests of tinymim.py and finetune.py: python -m pytest test_tinymim.py

The golden numbers were computed in float64 by the authors' code (TinyMIM, MAE) and timm, on weights
and images that a formula fills (`fill`): anyone can compute them again.
"""

import argparse
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import types
import zlib
from pathlib import Path
from unittest.mock import Mock, patch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # all that a forked process can use
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import finetune, tinymim
from tinymim import TinyMIM, UserError, ViT, log_relation, relation_loss

HERE = Path(__file__).resolve().parent
READMES = "".join((HERE / name).read_text("utf-8") for name in ("README.md", "extras/README.md"))
SMALL = dict(dim=24, depth=3, heads=2, patch_size=8, img_size=32)  # a ViT that a test can train
WIDER = SMALL | dict(dim=48, depth=4, heads=4)
QUICK = ["--epochs=3", "--batch-size=8", "--workers=0", "--device=cpu"]
TEACHING = dict(teacher="mae_base", relations=["qq", "kk", "vv"])
EVAL = [*QUICK[1:], "--eval"]
BICUBIC = v2.InterpolationMode.BICUBIC
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # nested, bit for bit
near = functools.partial(pytest.approx, abs=1e-9)
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # leaving torchvision

def fill(name, *shape):
    """Numbers in [-1, 1): 32-bit hashes of their index and the name's CRC."""
    x = np.arange(math.prod(shape), dtype=np.uint64)
    x = (2654435761 * x + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return torch.from_numpy((x ^ (x >> 16)).astype(np.float64) / 2**31 - 1).view(shape)

def filled(module, prefix, also=()):
    """The module in float64, its parameters filled: norm weights 1 + 0.1u, others 0.08u."""
    for name, parameter in module.double().eval().named_parameters():
        u = fill(prefix + name, *parameter.shape)
        if "pos_embed" not in name or name in also:
            is_scale = "norm" in name and name.endswith("weight")
            parameter.data = 1 + 0.1 * u if is_scale else 0.08 * u
    return module

def random_qkv(width, tokens=5, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, tokens, width, dtype=torch.float64) for _ in "qkv"]

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has an empty folder."""
    monkeypatch.chdir(tmp_path)

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
def distil(pictures):
    """Options of a distillation of half a second, into run/. Later options overrule these."""
    torch.manual_seed(0)
    torch.save({"model": ViT(**WIDER).state_dict(), "args": argparse.Namespace(lr=1.0)}, "mae.pth")
    return [*QUICK, "--dim=24", "--depth=3", "--heads=2", f"--data={pictures}", "--out=run",
            "--blr=0.05", "--teacher=mae.pth", "--teacher-heads=4"]

@pytest.fixture
def tune(pictures):
    """Options of a training from scratch, into run/."""
    return [*QUICK, "--dim=24", "--depth=3", "--heads=2", f"--data={pictures}", "--out=run",
            "--blr=0.02", "--checkpoint=none", "--patch-size=8", "--img-size=32"]

@pytest.fixture(params=["tinymim", "finetune"])
def either(request, distil, tune):
    return (tinymim.main, distil) if request.param == "tinymim" else (finetune.main, tune)

def refused(says, function, *args, error=UserError):
    """function(*args) raises this kind of error, and its message matches `says`. Returns it."""
    with pytest.raises(error, match=says) as raised:
        function(*args)
    return raised.value

def fails(main, options, *says):
    """main(options) ends with an error of one line, which holds all of `says`."""
    line = refused(None, main, options, error=SystemExit).code  # to be printed to stderr
    assert re.fullmatch(r"[\w/]+\.py: error: .*", line) and all(text in line for text in says), line

def args_of(script, *options):
    """The options, as script.main() hands them to script.train()."""
    with patch.object(tinymim, "run") as run:
        script.main(options)
    return run.call_args.args[2]

def start(module, *options):
    """python -m module, in a group of processes of its own."""
    command, env = [sys.executable, "-m", module, *options], os.environ | {"PYTHONPATH": str(HERE)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)

def load(folder, name="last.pth"):
    return torch.load(os.path.join(folder, name), weights_only=True)

def result(folder):
    """All that a run left, but for its options and speed."""
    found = {path.name: load(folder, path.name) for path in Path(folder).glob("*.pth")}
    found["log"] = {"history": [json.loads(line) for line in open(f"{folder}/log.jsonl")]}
    for part in found.values():
        history = [record | {"images/s": 0} for record in part["history"]]
        part |= dict(args=None, config=None, history=history)
    return found

# ---- The method ---------------------------------------------------------------------------------

def test_golden_distillation():
    student = filled(ViT(192, 12, heads=6), "student.")  # 6: the authors' ViT-Tiny, in distillation
    teacher = filled(ViT(768, 12, heads=12), "teacher.")
    images = 2 * fill("images", 2, 3, 224, 224)
    losses = TinyMIM(student, teacher, 12, 12, ["qk", "vv"]).eval().losses(images, images)
    assert [x.item() for x in losses.values()] == near([0.5928374293135243, 1.1960328201657833])
    q, k, v = (x.detach() for x in teacher.qkv_at(images, 12))
    assert log_relation(q, k, 12).exp()[0, 3, 5, :4].tolist() == near(
        [0.025767710213393306, 0.0063212661906894615, 0.0011469206929298828, 0.006966831556327835])
    assert log_relation(v, v, 12).exp()[1, 0, 0, :4].tolist() == near(
        [0.4439084161298033, 0.0012602242768500699, 0.0018377878317098937, 0.014642534735222338])
    sum(losses.values()).backward()
    for name, norm in {
        "cls_token": 0.002232637522656957, "patch_embed.proj.weight": 0.11115307933877165,
        "blocks.0.attn.qkv.weight": 0.04350811949481605,
        "blocks.5.mlp.fc1.weight": 0.04943361111423365,
        "blocks.11.attn.qkv.weight": 0.16885630650605676,
        "blocks.11.norm1.bias": 0.013599193696380758,
    }.items():
        assert student.get_parameter(name).grad.norm().item() == near(norm)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

def test_golden_learning_rates():
    for epoch, expected in {
        0: 0.0, 0.5: 0.0001, 2.5: 0.0005, 5: 0.001, 20.25: 0.0009378167042176453,
        52.5: 0.0005005000000000001, 99.9: 1.0027312259864862e-06, 100: 1e-06,
    }.items():
        assert tinymim.learning_rate(epoch, 1e-3, 5, 100, 1e-6) == near(expected, abs=1e-12)

def test_relation_loss_copied_alone_is_the_formula_for_every_pair():
    alone = {"math": math, "torch": torch, "F": torch.nn.functional}
    for function in (tinymim.split_heads, log_relation, relation_loss):
        exec(inspect.getsource(function), alone)
    student, teacher = random_qkv(12), random_qkv(24, seed=2)
    pairs = [a + b for a in "qkv" for b in "qkv"]
    losses = alone["relation_loss"](student, teacher, 3, pairs)
    assert list(losses) == pairs and sum(relation_loss(student, student, 3, pairs).values()) == 0
    def relation(qkv, pair):  # (image, head, row, column)
        a, b = (qkv["qkv".index(name)].unflatten(2, (3, -1)) for name in pair)
        weights = (torch.einsum("irhd,ichd->ihrc", a, b) / math.sqrt(a.shape[3])).exp()
        return weights / weights.sum(3, keepdim=True)
    for pair in pairs:
        p, q = relation(teacher, pair), relation(student, pair)
        same(losses[pair], (p * (p / q).log()).sum() / (2 * 3 * 5), atol=1e-12)

def test_part_one_runs_by_itself():
    """Cut off at the line of Part II: the views, the loss, the networks and one update."""
    source = (HERE / "tinymim.py").read_text("utf-8").partition("# ==== Part II")[0]
    part, found = types.ModuleType("part"), []
    exec(compile(source, "tinymim.py", "exec"), part.__dict__)
    for module in (part, tinymim):
        torch.manual_seed(0)
        teacher, student = module.ViT(**WIDER), module.ViT(**SMALL, drop_path=0.1)
        objective, totals = module.TinyMIM(student, teacher).train(), {}
        optimizer = module.make_optimizer(objective, weight_decay=0.05)
        optimizer.param_groups[0]["lr"] = module.learning_rate(0.5, 1e-2, 1, 10)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        args = argparse.Namespace(device="cpu", amp="off", accum=2)
        batches = iter(torch.randint(256, (2, 1, 4, 3, 32, 32), dtype=torch.uint8))
        module.update(objective, batches, optimizer, scaler, args, totals)
        found.append([totals, student.state_dict()])
    same(*found)
    assert list(totals) == ["qq", "kk", "vv"] and 0 < totals["vv"] < 10

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_stay_finite(dtype):
    """Of ±1e4: softmax().log() would be -inf, and products under autocast overflow fp16."""
    student = [(120 * x).to(dtype).requires_grad_() for x in random_qkv(64, seed=4)]
    teacher = [(120 * x).to(dtype) for x in random_qkv(64, seed=5)]
    with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16):
        losses = relation_loss(student, teacher, 1, ["qk", "kv", "vq"])
    sum(losses.values()).backward()
    assert all(x.isfinite() and x.dtype == torch.float32 and x > 1000 for x in losses.values())
    assert all(x.grad.isfinite().all() for x in student)

def test_defaults_of_the_objective():
    """The last block of a teacher as deep, else that at 3/4. Its heads, or those it learnt with."""
    student, images = ViT(**SMALL | dict(depth=5)), torch.randn(2, 2, 3, 32, 32)
    for depth, block in ((5, 5), (6, 5), (8, 6), (24, 18)):
        teacher = ViT(**WIDER | dict(depth=depth), drop_path=0.5)
        objective = TinyMIM(student, teacher).train()
        assert (objective.teacher_block, objective.relation_heads) == (block, 4)
        assert objective.pairs == ("qq", "kk", "vv") and not teacher.training
    assert len({objective.losses(*images)["qq"].item() for _ in range(4)}) == 1  # no drop path
    teacher.relation_heads = 3
    assert TinyMIM(student, teacher).relation_heads == 3
    first, *later = teacher.eval().blocks
    for module in (first.attn.proj, first.norm2, first.mlp, *later, teacher.norm):
        module.forward = None  # nothing after q, k and v is computed: calling it would raise
    losses = TinyMIM(student, teacher, 1, 6, ["qk"]).losses(*images)
    qkv = student.qkv_at(images[0], 5), teacher.qkv_at(images[1], 1)
    same(losses, relation_loss(*qkv, 6, ["qk"]))

def test_what_does_not_fit_is_said_in_words():
    split = [torch.ones(2, 4, 5, 12)] * 3  # into attention heads
    for student, teacher, heads, says in [
        (random_qkv(24), random_qkv(48), 5, r"\(2, 5, .*D divisible by 5"),
        (random_qkv(24, 196), random_qkv(48, 197), 4, "differ.*196.*197"),
        (split, split, 4, r"\(2, 4, 5, 12\).*\(B, N, D\)"),
    ]:
        refused(says, relation_loss, student, teacher, heads, error=ValueError)
    for block in (0, 4):  # of 3
        refused("1 to 3", ViT(**SMALL).qkv_at, torch.ones(1, 3, 32, 32), block, error=ValueError)
    refused("uint8", tinymim.two_views, torch.rand(1, 3, 32, 32), error=ValueError)

def test_initial_weights_are_maes():
    """Xavier uniform for all matrices, patches flattened. Biases 0, but the patch embedding's."""
    torch.manual_seed(0)
    for name, parameter in ViT(192, 2, 3).named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
        if name.endswith("weight") and parameter.ndim > 1:
            limit = math.sqrt(6 / sum(parameter.flatten(1).shape))
            assert 0.98 * limit < parameter.abs().max() <= limit, name

def test_every_kind_of_checkpoint_loads(capsys):
    vit, images = ViT(**SMALL), torch.randn(1, 3, 32, 32)
    tensors, one = vit.state_dict(), torch.ones(8)
    wrapped = lambda prefix: {prefix + name: tensor for name, tensor in tensors.items()}
    for kind, content in {
        "bare": tensors, "MAE": {"model": tensors}, "None": {"model": tensors, "config": None},
        "whole MAE": {"model": tensors | {"mask_token": one, "decoder_embed.bias": one}},
        "authors'": {"model": tensors, "optimizer": {}, "args": argparse.Namespace(lr=1.0)},
        "Lightning": {"state_dict": wrapped("model.encoder."), "model": "ViT-Ti"},
        "other": {"model_state_dict": tensors}, "DDP": wrapped("module."),
        "compiled": wrapped("_orig_mod.module."), "segmentation": wrapped("backbone."),
        "DINO": {"student": wrapped("module.backbone."), "teacher": wrapped("backbone.")},
        "float16": {name: t.half() for name, t in tensors.items()},
        "ours": {"model": tensors, "config": SMALL | {"relation_heads": 6}, "epoch": 1},
    }.items():
        torch.save(content, "x.pth")
        heads, relation_heads = (None, 6) if kind == "ours" else (2, None)
        teacher = tinymim.load_teacher("x.pth", heads=heads)
        assert teacher.config == SMALL | {"relation_heads": relation_heads}
        same(teacher(images), vit(images), atol=0.02 if kind == "float16" else 0)
        assert TinyMIM(ViT(**SMALL), teacher).relation_heads == (relation_heads or 2)
    larger, patches = tinymim.load_teacher("x.pth", 64), vit.pos_embed[:, 1:].mT.view(1, 24, 4, 4)
    patches = torch.nn.functional.interpolate(patches, (8, 8), mode="bicubic").flatten(2).mT
    same(larger.pos_embed.data, torch.cat([vit.pos_embed[:, :1], patches], dim=1).data)
    assert "heads" not in capsys.readouterr().out
    for dim, heads in {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 24: 1}.items():  # a guess
        torch.save(ViT(dim, 1, heads, 8, 16).state_dict(), "x.pth")
        assert tinymim.read_checkpoint("x.pth")[1]["heads"] == heads
        says = f"{heads} attention heads.*--teacher-heads.*--heads"
        assert re.search(says, capsys.readouterr().out)

def test_a_fine_tuned_mae_teaches():
    """It has a head, and no norm after its blocks. Only q, k and v are used."""
    tuned, images = finetune.Classifier(**SMALL), torch.randn(1, 3, 32, 32)
    torch.save(tuned.state_dict(), "x.pth")
    teacher = tinymim.load_teacher("x.pth", heads=2)
    same(teacher.qkv_at(images, 3), tuned.qkv_at(images, 3))
    refused("not callable", teacher, images, error=TypeError)  # its output would not be the same

def flipped(content):
    """The bytes of a checkpoint with a wrong bit in their middle, which PyTorch does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1:]

def test_checkpoints_that_do_not_load():
    tensors, norm, ones = ViT(**SMALL).state_dict(), "blocks.0.norm1.weight", torch.ones(24)
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("code-ran",))})()
    torch.save(tensors, "x.pth")
    wrong_bit = flipped(Path("x.pth").read_bytes())
    for says, content in [
        *(("x.pth", tensors | {"pos_embed": torch.zeros(n)}) for n in ((1, 12, 24), (17, 24), 17)),
        *((n, tensors | {n: ones}) for n in (  # each of them changes what the network computes
            "blocks.0.ls1.gamma", "reg_token", "register_tokens", "norm_pre.weight", "dist_token",
            "blocks.0.attn.q_norm.weight", "pre_norm.weight")),
        ("x.pth", tensors | {"blocks.999999.x": ones}),
        *((n, tensors | {n: torch.zeros(25)}) for n in ("cls_token", "patch_embed.proj.weight")),
        *((norm, tensors | {norm: ones.to(t)}) for t in (torch.bool, torch.int8, torch.cfloat)),
        ("NaN", tensors | {norm: ones / 0}),
        *(("heads", {"model": tensors, "config": SMALL | {name: heads}})
          for name in ("heads", "relation_heads") for heads in (-1, "3", 3.0, [3])),
        ("timm's names", {"vit.embeddings.cls_token": torch.zeros(3)}), ("ViT", [1, 2]),
        ("one ViT", {f"{name}.{key}": t for key, t in tensors.items() for name in ("ema", "net")}),
        ("cannot load", b"\xff\xd8"), ("cannot load", b""), ("x.pth .*checksum", wrong_bit),
        ("cannot load", {"model": tensors, "args": evil}),
        ("numpy.*scalar.*state_dict", {"model": tensors, "loss": np.float64(1)}),
    ]:
        is_bytes = isinstance(content, bytes)
        Path("x.pth").write_bytes(content) if is_bytes else torch.save(content, "x.pth")
        heads = None if "heads" in says else 2
        for img_size in (None, 64):
            said = str(refused(says, tinymim.load_teacher, "x.pth", img_size, heads))
            assert "x.pth" in said and "\n" not in said and "weights_only" not in said
    assert os.listdir() == ["x.pth"]  # no code has run

def test_download_happens_once_and_deletes_nothing(tmp_path, monkeypatch):
    torch.save({"model": ViT(192, 1, 3, img_size=32).state_dict()}, "whole.pth")
    hub, whole, web = Path("hub/checkpoints"), Path("whole.pth").read_bytes(), tmp_path.as_uri()
    teachers = {name: f"{web}/{name}.pth" for name in ("missing", "whole")}
    monkeypatch.setattr(tinymim, "TEACHERS", teachers)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    says = f"{web}/missing.pth.* by hand to {hub}/missing.pth.*demo"
    refused(says, tinymim.load_teacher, "missing")
    assert tinymim.load_teacher("whole").dim == 192
    assert os.listdir(hub) == ["whole.pth"]
    os.remove("whole.pth")  # from here on it is only in the hub
    assert tinymim.load_teacher("whole").dim == 192
    with patch.object(torch, "load", side_effect=OSError("I/O error")):
        refused(f"{hub}/whole.pth", tinymim.load_teacher, "whole")  # which file it is about
    assert (hub / "whole.pth").read_bytes() == whole

def test_imagenette_is_there_whole_or_not_at_all(monkeypatch):
    def fetch(root, **_):
        Path(root, "imagenette2-320", "train", "church").mkdir(parents=True)
    def stop(root, **_):
        fetch(root)
        raise KeyboardInterrupt
    def lose(root, **_):  # another process is faster
        fetch(root)
        Path("data/imagenette2-320/train/church").mkdir(parents=True)
    monkeypatch.setattr(tinymim, "Imagenette", stop)
    refused(None, tinymim.image_folder, "imagenette", error=KeyboardInterrupt)
    assert os.listdir("data") == []
    for other in (fetch, lose):
        monkeypatch.setattr(tinymim, "Imagenette", other)
        assert os.listdir(tinymim.image_folder("imagenette", "train")) == ["church"]
        assert tinymim.image_folder("imagenette", "val") == os.path.join("data", "imagenette2-320")
        assert os.listdir("data") == ["imagenette2-320"]
        shutil.rmtree("data")

def test_odd_files_are_ordinary():
    """Whatever the file's kind and name, and whichever library decodes it: the same picture."""
    noise = np.random.RandomState(0).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise).resize((50, 40), Image.BICUBIC)
    gray, palette, cmyk, alpha = (rgb.convert(mode) for mode in ("L", "P", "CMYK", "RGBA"))
    alpha.putalpha(128)
    on_white = Image.blend(rgb, Image.new("RGB", rgb.size, "white"), 127 / 255)
    kinds = [("JPEG", rgb, rgb), ("JPEG", cmyk, rgb), ("JPEG", gray, gray), ("WEBP", rgb, rgb),
             ("PNG", rgb, rgb), ("PNG", alpha, on_white), ("PNG", gray, gray), ("PNG", palette, palette)]
    for (kind, image, expected), name in itertools.product(kinds, ("x.JPEG", "x.png")):
        image.save(name, kind)
        decoded = tinymim.decode(name)
        assert decoded.dtype == torch.uint8 and decoded.shape == (3, 40, 50), (kind, name)
        expected = v2.functional.pil_to_tensor(expected.convert("RGB"))
        difference = (decoded.double() - expected).abs()
        assert difference.mean() < (0.6 if kind == "PNG" else 4), (kind, name)
        with patch.object(torchvision.io, "decode_image", None):  # without torchvision's decoder
            same(tinymim.decode(name), decoded, atol=2)

def test_photos_are_upright():
    """As their EXIF orientation says, whichever library decodes them."""
    half = Image.new("RGB", (32, 16))
    half.paste("red", (0, 0, 16, 16))
    for kind in ("JPEG", "PNG"):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: to be shown, it is turned clockwise
        half.save("x.jpg", kind, exif=exif)
        upright = tinymim.decode("x.jpg")
        assert upright.shape == (3, 32, 16)
        assert upright[0, :14].min() > 200 and upright[0, 18:].max() < 60
        with patch.object(torchvision.io, "decode_image", None):
            same(tinymim.decode("x.jpg"), upright, atol=4)

def test_pictures_that_are_refused(monkeypatch):
    """Instead of turning white, running Ghostscript, or taking gigabytes."""
    Image.fromarray(np.array([[0, 255], [256, 65535]], dtype=np.uint16)).save("deep.png")
    Image.new("RGB", (4, 4)).save("eps.jpg", "EPS")
    Image.new("F", (4, 4)).save("tiff.jpg", "TIFF")
    Image.new("RGB", (1, 20000)).save("thread.png")
    Image.new("RGB", (8, 8)).save("bomb.jpg")
    bomb = Path("bomb.jpg").read_bytes()  # 8 bits, 8 pixels high and 8 wide: make that 20,000
    Path("bomb.jpg").write_bytes(bomb.replace(b"\x08\0\x08\0\x08", b"\x08\x4e\x20\x4e\x20"))
    monkeypatch.setattr(subprocess, "Popen", Mock(side_effect=AssertionError("a program was run")))
    for name, says in {"deep.png": "8 bits", "bomb.jpg": "decompression bomb",
                       "eps.jpg": "cannot identify", "tiff.jpg": "cannot identify",
                       "thread.png": "1 x 20000"}.items():
        refused(f"{name} .*{says}", tinymim.decode, name)

def test_damaged_files_are_errors_that_name_them():  # a crash of the decoder would end the tests
    path, generator, errors = Path("x.JPEG"), np.random.RandomState(0), set()
    image = Image.fromarray(generator.randint(0, 256, (20, 30, 3), dtype=np.uint8))
    dataset = tinymim.ImageDataset(np.array([b"x.JPEG"]), v2.CenterCrop(16))
    jpeg, png = (image.save(path, kind) or path.read_bytes() for kind in ("JPEG", "PNG"))
    flips = [32, len(png) - 13, len(png) - 1, *generator.randint(8, len(png), 400)]  # 3 in CRCs
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

def test_finding_images(capsys):
    """Hidden ones are left out, others counted. Names may be any bytes. No folder is skipped."""
    folder, names = Path("a/ünïcode folder"), ("2.PNG", "1.jpeg", "3.webp", "notes.txt", "x.tiff")
    for path in (Path(".hidden/1.jpg"), Path("a/._1.jpg"), *map(folder.joinpath, names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.mkfifo(folder / "pipe.jpg")  # to open it would wait for ever
    Image.new("RGB", (3, 2)).save(os.fsencode(folder) + b"/\xff.png", "PNG")  # not UTF-8
    found = tinymim.find_images(".")
    assert [*map(os.path.basename, found)] == [b"1.jpeg", b"2.PNG", b"3.webp", b"\xff.png"]
    assert "3 files" in capsys.readouterr().out
    refused("two at least", finetune.read_folder, ".")  # a hidden folder is no class either
    assert tinymim.ImageDataset(found, lambda image: image.shape)[3] == ((3, 2, 3),)
    os.symlink("gone.jpg", folder / "dangling.jpg")
    dataset = tinymim.ImageDataset(tinymim.find_images("."), None)
    refused("dangling.jpg .*No such file", dataset.__getitem__, 3)
    with patch.object(os, "scandir", side_effect=[os.scandir(), PermissionError("denied")]):
        refused("denied", tinymim.find_images, ".", error=OSError)
    for name in ("loop", "again"):  # not all ways through them: that would take for ever
        os.symlink(".", folder / name)
    refused("loop|again", tinymim.find_images, ".", error=OSError)

def test_two_views_of_a_crop_with_torchvisions_color_jitter(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(tinymim, "color_jitter", Mock(side_effect=tinymim.color_jitter))
    crops = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8)
    student, teacher = tinymim.two_views(crops)
    _, orders, factors = tinymim.color_jitter.call_args.args
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4
    assert len(factors.unique()) > 100
    assert {*map(tuple, orders.tolist())} == {*itertools.permutations(range(3))}
    changes, jittered = ("brightness", "contrast", "saturation"), [*(crops / 255)]
    for i, step in itertools.product(range(40), range(3)):
        change = getattr(v2.functional, f"adjust_{changes[orders[i, step]]}")
        jittered[i] = change(jittered[i], factors[i, step].item())
    for view, images in ((student, torch.stack(jittered)), (teacher, crops / 255)):
        expected = v2.functional.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        same(view, expected, atol=1e-5)

def test_crops_differ_by_seed_epoch_and_image(pictures):  # workers: see the killed runs
    paths, crop = tinymim.find_images(pictures / "train"), v2.RandomResizedCrop(16, (0.2, 1))
    crops = [{i: tinymim.ImageDataset(paths, crop, seed)[24 * epoch + i][0] for i in range(24)}
             for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in itertools.combinations(crops, 2):
        assert not any(a[i].equal(b[i]) for i in range(24))

# ---- Training, through the command line ---------------------------------------------------------

def test_what_a_run_leaves(distil, capsys):
    tinymim.main(distil + ["--epochs=8"])
    last, log, said = load("run"), result("run")["log"]["history"], capsys.readouterr().out
    assert list(log[0]) == ["epoch", "qq", "kk", "vv", "loss", "lr", "images/s"]
    assert last["epoch"] == len(log) == len(re.findall("^epoch", said, re.M)) == 8
    assert log[7]["loss"] < 0.85 * log[0]["loss"]
    for line in (
        "student +24 wide, 3 blocks, 2 heads", "teacher +48 wide, 4 blocks, 4 heads",
        "loss +qq kk vv of block 3, 4 relation heads",
        "training +24 images, 3 updates of 8 per epoch, 8 epochs, peak rate 0.00156",
        "machine +cpu, amp off, 0 workers, 1 threads, into run", "finished. Next: .*finetune.py",
    ):
        assert len(re.findall(f"^{line}", said, re.M)) == 1, line
    assert all(x["loss"] == pytest.approx(x["qq"] + x["kk"] + x["vv"]) for x in log)
    assert sorted(os.listdir("run")) == ["last.pth", "log.jsonl"]
    assert last["config"] == SMALL | {"relation_heads": 4, "pretraining": "TinyMIM"}
    assert "teacher.norm.bias" not in last["objective"]

def test_a_run_is_a_plain_loop_with_adamw(distil, pictures):
    distil += ["--epochs=2", "--warmup-epochs=0.5"]
    tinymim.main(distil)
    teacher = tinymim.load_teacher("mae.pth", heads=4)
    torch.manual_seed(0)  # the student is that of the seed, whatever teaches
    student = ViT(**SMALL, drop_path=0.1)
    objective, plain, decayed = TinyMIM(student, teacher), [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if "norm" in name or "bias" in name else decayed).append(parameter)
    groups = [dict(params=decayed), dict(params=plain, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)
    crop = v2.RandomResizedCrop(32, (0.2, 1), interpolation=BICUBIC)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    dataset = tinymim.ImageDataset(tinymim.find_images(pictures / "train"), transform)
    sampler = tinymim.EpochSampler(dataset, 1, 0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(tinymim.DataLoader(dataset, 8, sampler=sampler))
        torch.manual_seed(tinymim.seed_from(0, epoch, 0))
        for step, (crops,) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = tinymim.learning_rate(epoch + step / 3, 0.05 * 8 / 256, 0.5, 2)
            optimizer.zero_grad()
            sum(objective(crops).values()).backward()
            optimizer.step()
    same(load("run")["model"], student.state_dict(), atol=1e-7)

LAUNCHER = """
import json, sys, finetune, tinymim, torch
tinymim.color_jitter = lambda images, order, factors: images  # each process draws its own
torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups)  # sees how long gradients are
init, destroy = tinymim.dist.init_process_group, tinymim.dist.destroy_process_group
tinymim.dist.init_process_group = lambda backend: tinymim.dist.is_initialized() or init(backend)
tinymim.dist.destroy_process_group = lambda: None  # one group for all runs
for name, options in json.loads(sys.argv[1]):
    {"tinymim": tinymim, "finetune": finetune}[name].main(options)
    tinymim.dist.barrier()  # the next one may read what this one wrote
destroy()
"""

def test_two_machines_and_accumulation_are_one_large_batch(
        distil, tune, pictures, monkeypatch, capsys):
    """Both machines are this one: torchrun is started twice, with a process each."""
    distil += ["--drop-path=0", "--blr=5"]
    tune += ["--drop-path=0", "--blr=5", "--augment=crop"]
    evaluation = [*EVAL, f"--data={pictures}", "--checkpoint=c/best.pth"]
    jobs = [("tinymim", [*distil, "--batch-size=4", "--out=a"]),
            ("tinymim", [*distil, "--batch-size=2", "--accum=2", "--out=b"]),
            ("finetune", [*tune, "--batch-size=4", "--out=c"]), ("finetune", evaluation)]
    Path("launch.py").write_text(LAUNCHER)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    machines = [start(*torchrun, "launch.py", json.dumps(jobs)) for _ in range(2)]
    printed, errors = zip(*[machine.communicate() for machine in machines])
    assert [machine.returncode for machine in machines] == [0, 0], errors
    monkeypatch.setattr(tinymim, "color_jitter", lambda images, order, factors: images)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups))
    tinymim.main([*distil, "--out=whole"])
    finetune.main([*tune, "--out=tuned"])
    for part, whole in (("a", "whole"), ("b", "whole"), ("c", "tuned")):
        part, whole = result(part), result(whole)
        same(part["last.pth"]["model"], whole["last.pth"]["model"], atol=1e-6)
        same(part["log"], whole["log"], rtol=1e-5)
    capsys.readouterr()
    finetune.main(evaluation)
    assert capsys.readouterr().out.splitlines()[-1] == "".join(printed).splitlines()[-1]

def forked(main, options, step=None):
    """main(options) in a process. Returns whether it was killed, at a step: around os.replace()."""
    if (child := os.fork()) == 0:
        steps, replace = itertools.count(1), os.replace
        kill = lambda: next(steps) == step and os.kill(os.getpid(), signal.SIGKILL)
        os.replace = lambda *paths: (kill(), replace(*paths), kill())
        try:
            main(options)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL

@pytest.mark.parametrize("first, then", [
    ("", ""), ("", "--workers=2"), ("--amp=bf16", "--amp=bf16"), ("--amp=fp16", "--amp=fp16")])
def test_a_killed_run_resumes_exactly(either, first, then):
    """Killed between all steps of saving, and once more when it goes on."""
    main, options = either[0], either[1] + ["--drop-path=0.2", "--epochs=2"]
    forked(main, [*options, *first.split(), "--out=whole"])
    options += [*then.split(), "--resume"]  # which starts a run, if nothing has been saved
    for step in [2] if then else itertools.count(1):
        killed, *_ = [forked(main, options, kill) for kill in (step, 3, None)]
        same(result("run"), result("whole"))
        assert ("--amp=fp16" in then) == bool(load("run")["scaler"])
        shutil.rmtree("run")
        if not killed:  # it has not as many
            assert step > 4  # in two epochs
            break

class Size(torch.nn.Module):
    """Another objective: the student's output, times a learnt scale, is to become small."""
    def __init__(self, args):
        super().__init__()
        self.student = tinymim.new_student(args, 8, 32)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, crops):
        return {"size": self.student(tinymim.normalize(crops / 255)).norm() * self.scale**2}

def test_another_objective(distil, capsys):
    """The whole student learns, and the run resumes."""
    main = functools.partial(tinymim.main, build_objective=Size)
    main(distil + ["--out=whole"])
    forked(main, distil, step=5)
    Path("run/log.jsonl").write_text('{"epoch": 1, "lo')  # the history is in the checkpoint too
    main(distil + ["--resume"])
    same(result("run"), result("whole"))
    mine = tinymim.make_parser("extras/mine.py", tinymim.__doc__, tinymim.DEFAULTS | TEACHING, True)
    args = mine.parse_args([*distil, "--resume"])
    refused("has a run with script tinymim.py, not extras/mine.py", tinymim.train, args, Size)
    last = load("run")
    assert "scale" in last["objective"] and last["history"][2]["size"] < last["history"][0]["size"]
    assert last["config"]["pretraining"] == "Size"

class WholeStudent(TinyMIM):
    def losses(self, student_images, teacher_images):
        return {"size": self.student(student_images).norm()}

def test_no_parameter_is_left_untrained_in_silence(distil):
    """Neither one that no loss reaches, nor one that TinyMIM froze and a subclass trains through."""
    def unused(args):
        objective = Size(args)
        objective.unused = torch.nn.Parameter(torch.ones(()))
        return objective
    def frozen(args):
        objective = tinymim.build(args)
        return WholeStudent(objective.student, objective.teacher)
    refused("no loss reaches unused", tinymim.main, distil, unused, error=RuntimeError)
    refused("TinyMIM froze", tinymim.main, distil, frozen, error=RuntimeError)
    def thawed(args):
        objective = frozen(args)
        objective.student.blocks.requires_grad_(True)
        objective.student.norm.requires_grad_(True)
        return objective
    tinymim.main(distil, thawed)
    before, after = tinymim.build(args_of(tinymim, *distil)).student, load("run")["model"]
    assert not after["blocks.2.mlp.fc2.weight"].equal(before.blocks[2].mlp.fc2.weight)
    student = tinymim.load_teacher("run/last.pth")
    student.train()(torch.ones(1, 3, 32, 32)).sum().backward()  # a loaded student is not frozen

@pytest.mark.parametrize("scripts, says, options", [  # -GLOB: pictures are gone; !GLOB: damaged
    ("both", "--device cpu", "--device=cuda"), ("both", "/nonexistent", "--data=/nonexistent"),
    ("both", "cannot download Imagenette", "--data=imagenette"), ("both", " 30", "--img-size=30"),
    ("both", "24 images do not fill an update of 100: --batch-size 24 or less", "--batch-size=100"),
    ("both", "--batch-size 2 or less", "--accum=10"), ("both", "/null/x", "--out=/dev/null/x"),
    ("tinymim", "cannot download https://dl.fbaipublicfiles.com/mae/", "--teacher=mae_base"),
    ("tinymim", "no file mae_bass; known by name are mae_base", "--teacher=mae_bass"),
    ("tinymim", "1 to 4", "--teacher-block=9"), ("tinymim", "twice", "--relations qq vv qq"),
    ("tinymim", "--relation-heads", "--relation-heads=16"), ("tinymim", "--blr", "--blr=1e8"),
    ("tinymim", "nan.pth has NaN", "--teacher=nan.pth"), ("finetune", "two at", "-*/[gr]*"),
    ("tinymim", "no .jpg, .png or .webp", "-*/*/*"), ("finetune", "classes {'red'}", "-val/red"),
    ("tinymim", "red/2.png", "!train/red/2.png --workers=1"), ("finetune", "/val", "-val"),
    ("finetune", "red/8.png", "!val/red/8.png"), ("finetune", "train/red", "-train/red/*"),
    ("finetune", "--student", "--checkpoint=mae.pth --student=tiny"),
])
def test_errors_are_one_line(distil, tune, pictures, monkeypatch, scripts, says, options):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(tinymim, "Imagenette", no_network)
    if scripts == "finetune":
        monkeypatch.setattr(tinymim, "fit", None)  # they are found before training
    torch.save({name: t * math.nan for name, t in ViT(**WIDER).state_dict().items()}, "nan.pth")
    shutil.copytree(pictures, "changed")
    first, *more = options.split()
    if not first.startswith("--"):
        for i, path in enumerate([*Path("changed").glob(first[1:])]):
            path.write_text("damaged") if first[0] == "!" else path.rename(str(i))
        first = "--data=changed"
    for module, usual in ((tinymim, distil), (finetune, tune)):
        if scripts in ("both", module.__name__):
            fails(module.main, [*usual, first, *more], f"{module.__name__}.py", says)
    assert not os.path.exists("data") or not os.listdir("data")

@pytest.mark.parametrize("option", """
    --epochs=0 --batch-size=-1 --accum=0 --dim=0 --depth=-3 --heads=0 --img-size=0 --workers=-1
    --seed=12345678901234567890 --blr=-1 --blr=nan --blr=inf --weight-decay=-1 --drop-path=1.5
    --drop-path=-0.1 --warmup-epochs=-1 --epochs=two --relations=xy --teacher-block=0
    --relation-heads=0 --teacher-heads=-1 --layer-decay=2 --crop-scale=0 --crop-scale=1.1
    --eval-every=0 --patch-size=0""".split())
def test_numbers_out_of_range_are_refused_by_the_options(option, distil, tune, capsys):
    for module, usual in ((tinymim, distil), (finetune, tune)):
        refused("^2$", module.main, [*usual, option], error=SystemExit)
        name, said = option.split("=")[0], capsys.readouterr().err.splitlines()[-1]
        assert f"argument {name}" in said or f"unrecognized arguments: {option}" in said

def test_a_run_is_neither_overwritten_nor_resumed_as_another_or_damaged(either):
    (main, options), last = either, Path("run/last.pth")
    os.mkdir("run")
    for path in (last, Path("run/best.pth")):
        path.write_text("precious")
        fails(main, options, "run holds a run")
        assert os.listdir("run") == [path.name] and path.read_text() == "precious"
        path.unlink()
    Path("run/log.jsonl").write_text("{}")  # alone, it is no run
    main(options)
    before = last.read_bytes()
    shutil.copy("mae.pth", "moved.pth")
    torch.save(ViT(**WIDER).state_dict(), "other.pth")
    others = """--epochs=2 --epochs=4 --batch-size=4 --accum=2 --blr=0.01 --weight-decay=0.1
        --drop-path=0.3 --warmup-epochs=1 --seed=1 --amp=bf16 --dim=48 --depth=2 --heads=4 """
    others += {
        "tinymim": """--teacher=other.pth --teacher-heads=2 --teacher-block=4 --relations=vv
            --relation-heads=2""",
        "finetune": "--layer-decay=0.5 --augment=crop --crop-scale=0.5 --eval-every=2",
    }[main.__module__]
    for other in others.split():  # all that shapes the result; what differs is named
        name = re.sub("accum|batch-size", "images-per-update", other.split("=")[0].strip("-"))
        name = re.sub("teacher$", "teacher-checksum", name)
        fails(main, [*options, "--resume", other], f"has a run with {name.replace('-', '_')} ")
    main([*options, "--resume", "--batch-size=2", "--accum=4", "--workers=1"])  # the same update
    if main is tinymim.main:
        main([*options, "--resume", "--teacher=moved.pth"])
    assert last.read_bytes() == before  # for which nothing was left to do
    torch.save({"weights": torch.ones(3)}, "foreign.pth")
    for damaged in (before[:5000], flipped(before), b"", Path("foreign.pth").read_bytes()):
        last.write_bytes(damaged)
        fails(main, [*options, "--resume"], str(last))
        assert last.read_bytes() == damaged

def test_pytorchs_errors_get_advice_and_others_keep_their_traceback(distil):
    for message, says in {
        "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 79 GiB of which 1 GiB is free. "
        "Process 7 has ...\nmore": "halve --batch-size",
        "DefaultCPUAllocator: can't allocate memory: you tried to ...": "--batch-size",
        "unable to allocate shared memory(shm) for file </torch_7>: Success (0)": "--shm-size",
        "DataLoader worker (pid(s) 7) exited unexpectedly": "--workers",  # killed for its memory
        "[enforce fail at inline_container.cc] . PytorchStreamWriter failed": "is the disk full",
        "can't start new thread": "--workers", "could not create a primitive": "--batch-size",
    }.items():
        build = Mock(side_effect=RuntimeError(message))
        main = functools.partial(tinymim.main, build_objective=build)
        fails(main, distil, message.splitlines()[0][:150], says)
    in_worker = "Caught RuntimeError in DataLoader worker process 0.\n...\nRuntimeError: a bug"
    for error in (RuntimeError(in_worker), ValueError("memory"), KeyError("parameter group")):
        with patch.object(tinymim, "make_loader", side_effect=error):  # a bug, perhaps one's own
            assert refused(None, tinymim.main, distil, error=type(error)) is error
        os.rmdir("run")

def test_a_full_disk_loses_nothing(distil):
    forked(tinymim.main, distil, step=3)  # killed after the first epoch
    resource = pytest.importorskip("resource")  # not on Windows
    last, limits = Path("run/last.pth"), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = last.read_bytes()
    for limit in (50_000, len(before) - 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # writing past it fails
        try:
            fails(tinymim.main, distil + ["--resume"], "is the disk full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert last.read_bytes() == before

def test_ctrl_c_ends_a_run_with_workers_at_once_and_without_a_traceback(either):
    process = start(either[0].__module__, *either[1], "--epochs=9999", "--workers=2")
    while not os.path.exists("run/last.pth"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and "Traceback" not in errors and load("run")["epoch"] > 0

# ---- Fine-tuning --------------------------------------------------------------------------------

def test_golden_classifier_and_layer_decay():
    model = filled(finetune.Classifier(192, 12, 3), "ft.", also=["pos_embed"])
    logits = model(2 * fill("images", 2, 3, 224, 224))
    expected = [0.07162610234623845, 0.5291574265645436, -0.8211863038311218, 0.9171481237313825]
    assert logits[0, :4].tolist() == near(expected) and logits[1].argmax() == 323
    assert sum(p.numel() for p in model.parameters()) == 5717416
    groups = finetune.parameter_groups(model, 0.05, 0.65)
    found = {p: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, expected in {
        "cls_token": (0.003697205891, 0.0), "pos_embed": (0.003697205891, 0.0),
        "patch_embed.proj.weight": (0.003697205891, 0.05),
        "blocks.0.attn.qkv.weight": (0.005688009063, 0.05),
        "blocks.5.mlp.fc1.bias": (0.049022278906, 0.0), "blocks.11.mlp.fc2.weight": (0.65, 0.05),
        "fc_norm.weight": (1.0, 0.0), "head.weight": (1.0, 0.05), "head.bias": (1.0, 0.0),
    }.items():
        assert found[model.get_parameter(name)] == near(expected), name

def evaluate(capsys, path, folder):
    """[top-1, loss] that --eval prints. Here they are counted in another way."""
    finetune.main([*EVAL, f"--checkpoint={path}", f"--data={folder}", "--heads=2"])
    said = capsys.readouterr().out
    printed = re.search(r"the (\d+) images .*top-1 (.*)%, loss (.*)", said).groups()
    middle = v2.Compose([v2.Resize(36, interpolation=BICUBIC), v2.CenterCrop(32)])  # as 256 and 224
    files, classes = sorted(folder.glob("*/*")), sorted(os.listdir(folder))
    images = torch.stack([middle(tinymim.decode(file)) for file in files])
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    model = finetune.Classifier(24, 3, 2, 3, 8, 32).eval()
    model.load_state_dict(load(".", path)["model"])
    logits = model(tinymim.normalize(images / 255)).detach()
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    loss = -logits.log_softmax(1)[range(len(files)), labels].mean().item()
    assert [*map(float, printed)] == pytest.approx([len(files), top1, loss], abs=1e-3)
    assert 0 < top1 < 100
    return pytest.approx([top1, loss], abs=1e-3)

def test_finetuning_learns_and_is_evaluated_exactly(tune, pictures, capsys):
    finetune.main(tune + ["--epochs=4"])
    last, best, val = load("run"), load("run", "best.pth"), pictures / "val"
    assert list(last["history"][0]) == ["epoch", "loss", "lr", "images/s", "top1", "val_loss"]
    assert sorted(os.listdir("run")) == ["best.pth", "last.pth", "log.jsonl"]
    assert best["history"][-1]["top1"] == max(record["top1"] for record in last["history"]) > 60
    for name, record in (("last.pth", last["history"][-1]), ("best.pth", best["history"][-1])):
        assert [record["top1"], record["val_loss"]] == evaluate(capsys, f"run/{name}", val)
    torch.save({"model": last["model"]}, "bare.pth")  # MAE's files do not tell the classes
    evaluate(capsys, "bare.pth", val)
    finetune.main([*tune, "--out=rare", "--epochs=5", "--eval-every=2"])
    assert [record["epoch"] for record in load("rare")["history"] if "top1" in record] == [2, 4, 5]
    shutil.copytree(pictures, "renamed")  # as many classes, one of them another
    for split in ("train", "val"):
        os.rename(f"renamed/{split}/red", f"renamed/{split}/apple")
    options = [*EVAL, "--checkpoint=run/last.pth", "--data=renamed"]
    fails(finetune.main, options, "renamed/val has other classes", "robustness.py")
    tinymim_file = {"model": ViT(**SMALL).state_dict(), "config": SMALL}
    torch.save(tinymim_file, "headless.pth")
    fails(finetune.main, [*EVAL, "--checkpoint=headless.pth"], "one head")
    for option in ("--epochs=3", "--out=x", "--resume", "--blr=1"):
        refused("^2$", finetune.main, [*options, option], error=SystemExit)
        assert "has no effect with --eval" in capsys.readouterr().err
    options = [*tune, "--epochs=4", "--resume", "--data=renamed"]
    fails(finetune.main, options, "has a run with", "classes", "apple")

def test_nan_is_neither_an_accuracy_nor_saved(tune, distil, pictures, monkeypatch):
    """Not logits of NaN, which argmax takes for the first class, and not weights of NaN."""
    model = finetune.Classifier(**SMALL, num_classes=3)
    model.head.weight.data[0] = 1e38  # finite, but the logits are not
    model.fc_norm.weight.data *= 1e3
    config = model.config | {"classes": ["blue", "green", "red"]}
    torch.save({"model": model.state_dict(), "config": config}, "big.pth")
    fails(finetune.main, [*EVAL, "--checkpoint=big.pth", f"--data={pictures}"], "loss on 21 images")
    finetune.main([*tune, "--epochs=1"])
    before = load("run")["model"]
    fails(finetune.main, [*tune, "--out=b", "--epochs=1", "--blr=1e9", "--warmup-epochs=0"],
          "lower --blr")
    monkeypatch.setattr(finetune, "evaluate", lambda *_: {})  # it would be found there, too
    fails(finetune.main, [*tune, "--out=c", "--epochs=1", "--blr=1e9", "--warmup-epochs=0"],
          "lower --blr")
    assert not os.path.exists("b/last.pth") and not os.path.exists("c/last.pth")
    same(load("run")["model"], before)
    nan = {name: tensor * math.nan for name, tensor in before.items()}
    torch.save({"model": nan, "config": load("run")["config"]}, "nan.pth")
    fails(finetune.main, [*EVAL, "--checkpoint=nan.pth", f"--data={pictures}"], "nan.pth has NaN")

def test_what_finetuning_starts_from(distil, pictures):
    """A new head, or for the same classes the old one. Attention heads as in extras/README.md."""
    def built(path, classes, *options):
        args = args_of(finetune, f"--checkpoint={path}", *options)
        return finetune.new_classifier(args, finetune.settle(args), classes)
    tinymim.main([*distil, "--heads=6", "--relation-heads=12", "--relations", "qk", "vv"])
    last = load("run")
    assert last["config"] == SMALL | dict(heads=6, relation_heads=12, pretraining="TinyMIM")
    assert list(last["history"][0])[1:3] == ["qk", "vv"]
    finetune.main([*QUICK, "--checkpoint=run/last.pth", "--heads=3", f"--data={pictures}"])
    tuned, student = load("run-finetuned"), last["model"]
    assert tuned["config"]["heads"] == 3 and tuned["args"]["augment"] == "light"
    model = built("run/last.pth", ["a", "b"])
    assert model.config["pretraining"] == "TinyMIM"  # by which settle() knows a distilled B
    weights = model.state_dict()
    del student["norm.weight"], student["norm.bias"]
    same({name: weights[name] for name in student}, student)
    new = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert weights.keys() - student.keys() == new
    larger = built("run/last.pth", ["a", "b"], "--img-size=64")
    assert larger(torch.ones(1, 3, 64, 64)).shape == (1, 2)
    torch.save({"model": weights, "config": model.config}, "tuned.pth")
    same(built("tuned.pth", ["a", "b"]).state_dict(), weights)
    others = [built("tuned.pth", ["a", "c"]).state_dict()]
    probed = {name: t for name, t in weights.items() if name != "fc_norm.weight"}  # as probe.py's
    torch.save({"model": probed, "config": model.config}, "probed.pth")
    others += [built("probed.pth", ["a", "b"]).state_dict()]
    head = weights.pop("head.weight")
    for other in others:
        assert not other.pop("head.weight").equal(head)
        same(other, weights)

def test_recipes_follow_the_size():
    """MAE-Lite's for T and S, the authors' for a distilled B, MAE's for its own B and L."""
    assert tinymim.RECIPE.items() >= dict(epochs=300, blr=1.5e-4, drop_path=0.1, min_lr=0.0).items()
    usual = dict(warmup_epochs=5, batch_size=128, min_lr=1e-6)
    light = usual | dict(epochs=300, blr=1e-3, drop_path=0, augment="light")
    strong = usual | dict(epochs=100, blr=5e-4, layer_decay=0.65, augment="strong")
    for dim, heads, pretraining, options, expected in [
        (192, 3, "TinyMIM", [], light | dict(layer_decay=0.85)),
        (384, 6, None, [], light | dict(layer_decay=0.75)),
        (384, 6, "TinyMIM", ["--epochs=9", "--drop-path=0.3"],
         dict(epochs=9, warmup_epochs=0.45, drop_path=0.3)),
        (768, 12, "TinyMIM", [], strong | dict(drop_path=0.2)),
        (768, 12, None, [], strong | dict(drop_path=0.1)),
        (768, 12, "MAE", [], strong | dict(drop_path=0.1)),
        (768, 12, "Feature", [], strong | dict(drop_path=0.2)),  # by extras/targets.py
        (1024, 16, None, [], strong | dict(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2)),
        (1024, 16, None, ["--epochs=3"], dict(epochs=3, warmup_epochs=0.3)),
    ]:
        vit = ViT(dim, 1, heads)
        config = vit.config | dict(pretraining=pretraining)
        torch.save({"model": vit.state_dict(), "config": config}, "x.pth")
        args = args_of(finetune, "--checkpoint=x.pth", *options)
        finetune.settle(args)
        assert vars(args) | expected == vars(args), dim
    args = args_of(finetune, "--checkpoint=none", "--drop-path=0.22")
    model = finetune.new_classifier(args, finetune.settle(args), list("abcdefg"))
    assert (args.epochs, args.layer_decay, args.augment, model.dim) == (300, 1, "light", 192)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert [block.drop_path.p for block in model.blocks] == near([0.02 * i for i in range(12)])

@pytest.mark.parametrize("name", finetune.OPERATIONS)
def test_operations_are_timms(name):
    """Bit for bit, with both signs, which are random in both."""
    timms = pytest.importorskip("timm.data.auto_augment")
    its_names = [f"{name}Increasing", f"{name}Rel", name]
    its_name = next(name for name in its_names if name in timms.NAME_TO_OP)
    options = dict(img_mean=tuple(finetune.GRAY), interpolation=Image.BICUBIC)
    pixels = np.random.RandomState(0).randint(40, 200, (48, 40, 3), dtype=np.uint8)
    photo, ours = Image.fromarray(pixels), finetune.OPERATIONS[name]
    for m in (5, 9):
        theirs = timms.AugmentOp(its_name, 1.0, m, options)
        found = {ours(photo, sign * m / 10).tobytes() for sign in (1, -1)}
        assert found == {theirs(photo).tobytes() for _ in range(40)}

def test_rand_augment_is_timms(monkeypatch):
    """Two operations, each half the time. Magnitudes deviate by 0.5, and are 10 at most."""
    for name in finetune.OPERATIONS:  # an "image" is the list of what was done to it
        note = lambda image, m, name=name: [*image, (name, 10 * m)]
        monkeypatch.setitem(finetune.OPERATIONS, name, note)
    torch.manual_seed(0)
    images = [finetune.rand_augment([], magnitude=9) for _ in range(6000)]
    counts = np.bincount([len(image) for image in images])
    assert counts / 6000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    names, magnitudes = map(np.array, zip(*itertools.chain(*images)))
    for name in finetune.OPERATIONS:
        assert np.mean(names == name) == pytest.approx(1 / 15, abs=0.01)
    assert np.mean(magnitudes > 0) == pytest.approx(0.5, abs=0.02)
    sizes = abs(magnitudes)
    assert (sizes.mean(), sizes.std()) == pytest.approx((9, 0.5), abs=0.03)
    assert sizes.max() == pytest.approx(10)

def test_train_transform():
    """RandAugment of the recipe's magnitude, on bicubic crops. It can go to a worker by pickle."""
    for augment, magnitude in (("strong", [9]), ("light", [10]), ("crop", [])):
        transform = pickle.loads(pickle.dumps(finetune.train_transform(32, 0.3, augment)))
        crop, _, *rest = transform.transforms
        assert (crop.scale, crop.interpolation) == ((0.3, 1.0), BICUBIC)
        assert [step.lambd.keywords["magnitude"] for step in rest[1:2]] == magnitude
        image = transform(torch.randint(256, (3, 48, 40), dtype=torch.uint8))
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8

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
    assert 80 < len(noise) < 120 and max(map(len, noise)) <= 256 + 48  # of 400; about 1/3
    assert abs(torch.cat(noise).mean()) < 0.05 and abs(torch.cat(noise).std() - 1) < 0.05
    logits, smoothed = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[2.8, 0.1, 0.1]]) / 3
    supervised = finetune.Supervised(finetune.Classifier(**SMALL, num_classes=3), "strong")
    supervised.student = torch.nn.Identity()
    loss = supervised.losses(logits, torch.tensor([[1, 0, 0]]))["loss"]
    same(loss, -(smoothed * logits.log_softmax(1)).sum(), rtol=1e-6)

def test_commands_in_the_readmes_have_options_that_exist():
    commands = r"\b(?:python|torchrun)\b[^\n`]*? (tinymim|finetune)\.py\b([^\n`#|>$]*)[\n`#|>]"
    found = re.findall(commands, READMES.replace("\\\n", " "))  # without variables of the shell
    assert len(found) > 10
    for name, options in found:
        try:
            args_of({"tinymim": tinymim, "finetune": finetune}[name], *options.split())
        except SystemExit as stopped:  # --help, or the name alone
            assert stopped.code == 0 or not options.strip(), (name, options)

SNIPPETS = re.findall(r"```python\n((?:(?!```).)*import .*?)```", READMES, re.DOTALL)

@pytest.mark.parametrize("code", SNIPPETS)  # those without imports are formulas
def test_readme_snippets_run(code, distil, monkeypatch):
    if re.search(r"^(import|from) timm", code, flags=re.MULTILINE):
        pytest.importorskip("timm")
    monkeypatch.setattr(sys, "argv", ["snippet.py", *distil])
    tiny = tinymim.STUDENTS["tiny"]
    for path, model in (("runs/tiny/last.pth", ViT(*tiny)),
                        ("runs/tiny-finetuned/best.pth", finetune.Classifier(*tiny, 10))):
        os.makedirs(os.path.dirname(path))
        torch.save({"model": model.state_dict(), "config": model.config}, path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
