"""Tests of what is in extras/: python -m pytest

The golden numbers of MAE were computed in float64 by its authors' code, on weights that a formula fills.
"""

import argparse
import functools
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, tv_tensors

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import data
import finetune
import mae
import segment
import shapes
import study
import targets
import tinymim
from test_tinymim import SMALL, WIDER, fill, filled, load, same
from tinymim import UserError, ViT, relation_loss

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Drawn shapes: train/ of 40, and test/ of 20, in ten classes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes.write(folder / "train", 40, seed=1, size=32)
    shapes.write(folder / "test", 20, seed=2, size=32)
    return folder

@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A small teacher that MAE could have left."""
    torch.manual_seed(0)
    path, vit = tmp_path_factory.mktemp("teacher") / "teacher.pth", ViT(**WIDER)
    torch.save({"model": vit.state_dict(), "config": vit.config}, path)
    return path

def networks():
    """Student, teacher, the student's and the teacher's view: random, in float64."""
    torch.manual_seed(0)
    images = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    return ViT(**SMALL).double(), ViT(**WIDER).double().requires_grad_(False), images[0], images[1]

def script(name, *options, launcher=()):
    """Run a script of extras/ in a process of its own. Returns what it printed."""
    command = [sys.executable, *launcher, os.path.join(HERE, name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout

# ---- MAE ---------------------------------------------------------------------------------------------------

def test_golden_mae():
    """Both losses, the latent, the prediction, and which patches are masked."""
    objective = mae.MAE(ViT(768, 12, 12), 0.75, (512, 8, 16))
    student = filled(objective.student, "mae.")
    for name, parameter in filled(objective.decoder, "").named_parameters():
        if name != "pos_embed":
            u = fill("mae." + ("" if name == "mask_token" else "decoder_") + name, *parameter.shape)
            parameter.data = 1 + 0.1 * u if "norm" in name and name.endswith("weight") else 0.08 * u
    images, noise = 2 * fill("images", 2, 3, 224, 224), (fill("noise", 2, 196) + 1) / 2
    keep, rank = mae.random_mask(noise, 0.75)
    assert keep.shape == (2, 49)
    assert (rank >= 49)[0, :12].int().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    with torch.no_grad():
        latent = mae.pick(student.embed(images), keep)
        for block in student.blocks:
            latent = block(latent)
        latent = student.norm(latent)
        predicted = objective.decoder(latent, rank)
        for token, expected in [
            (latent[0, 0], [-1.2372945736024303, 1.3275049180791632, 0.29686112952499166, 0.605038438901868]),
            (latent[1, 49], [0.0846666436299498, -1.8442532026117107, 0.6007483638902401, -0.08477623316289]),
            (predicted[0, 7], [1.0195772945072776, -0.6500561337543378, -0.0763281080008, -1.8124896853005]),
        ]:
            assert token[:4].tolist() == pytest.approx(expected, abs=1e-9)
        loss = objective(None, images, noise)["pixel"]
        raw = mae.pixel_loss(predicted, images, rank >= 49, normalize=False)
    assert loss.item() == pytest.approx(2.101066305076665, abs=1e-9)
    assert raw.item() == pytest.approx(2.437229215615145, abs=1e-9)

def test_random_mask_and_pick_bring_every_patch_back_to_its_place():
    torch.manual_seed(0)
    noise, tokens = torch.rand(3, 16), torch.randn(3, 17, 4)
    keep, rank = mae.random_mask(noise, 0.75)
    assert keep.shape == (3, 4) and ((rank < 4).sum(1) == 4).all()
    by_noise = mae.pick(tokens, noise.argsort(dim=1))
    same(mae.pick(by_noise, rank), tokens)
    same(mae.pick(tokens, keep), by_noise[:, :5])

@pytest.mark.parametrize("ratio", [0, 0.99, 1])
def test_a_mask_ratio_that_leaves_nothing(ratio):
    with pytest.raises(UserError, match="leaves nothing"):
        mae.MAE(ViT(**SMALL), ratio)

def test_mae_then_distillation_then_finetuning(pictures, tmp_path):
    """A teacher of one's own, and a resumed run that is the uninterrupted one, decoder and masks included."""
    common = ["--data", str(pictures), "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    pretrain = ["--dim", "24", "--depth", "3", "--heads", "2", "--patch-size", "8", "--img-size", "32",
                "--decoder", "16", "1", "2", "--blr", "0.01", "--warmup-epochs", "0.5", *common]
    mae.main([*pretrain, "--epochs", "3", "--out", str(tmp_path / "mae")])
    saved = load(tmp_path / "mae")
    assert saved["history"][-1]["pixel"] < saved["history"][0]["pixel"]
    assert saved["model"].keys() == ViT(**SMALL).state_dict().keys()
    assert "decoder.pred.weight" in saved["objective"]

    original = torch.save
    torch.save = lambda content, path: original(content, path) if content["epoch"] < 3 else sys.exit("killed")
    with pytest.raises(SystemExit, match="killed"):
        mae.main([*pretrain, "--epochs", "3", "--out", str(tmp_path / "again")])
    torch.save = original
    mae.main([*pretrain, "--epochs", "3", "--out", str(tmp_path / "again"), "--resume"])
    same(load(tmp_path / "again")["objective"], saved["objective"])

    tinymim.main(["--student", "nano", "--dim", "12", "--heads", "2", "--epochs", "1", *common, "--teacher",
                  str(tmp_path / "mae" / "last.pth"), "--out", str(tmp_path / "student")])
    finetune.main(["--checkpoint", str(tmp_path / "student" / "last.pth"), "--epochs", "1", "--out",
                   str(tmp_path / "tuned"), *common, "--data", str(link(pictures, tmp_path / "labelled"))])
    assert 0 <= load(tmp_path / "tuned")["history"][0]["top1"] <= 100

def link(pictures, folder):
    """The pictures as finetune.py wants them, with val/ for test/."""
    folder.mkdir()
    os.symlink(pictures / "train", folder / "train")
    os.symlink(pictures / "test", folder / "val")
    return folder

# ---- Other targets -----------------------------------------------------------------------------------------

def test_class_token():
    """KL between two softmaxes over channels, spelt out."""
    student, teacher, seen, clean = networks()
    objective = targets.ClassToken(student, teacher).double()
    p = teacher(clean)[:, 0].float().softmax(-1).double()
    q = (student(seen)[:, 0] @ objective.map.weight.T + objective.map.bias).float().softmax(-1).double()
    expected = (p * (p / q).log()).sum(-1).mean()
    assert objective(seen, clean)["cls"].item() == pytest.approx(expected.item(), abs=1e-6)

@pytest.mark.parametrize("name", targets.FEATURES)
def test_features(name):
    """Smooth-L1 with beta 2 to what a block of the teacher makes, normalised, spelt out."""
    student, teacher, seen, clean = networks()
    objective = targets.Feature(student, teacher, name, block=3).double()
    x = teacher.embed(clean)
    for block in teacher.blocks[:2]:
        x = block(x)
    block = teacher.blocks[2]
    attention = block.attn(block.norm1(x))
    ffn = block.mlp(block.norm2(x + attention))
    parts = {"output": [block(x)], "attention": [attention], "attention-after": [x + attention], "ffn": [ffn],
             "ffn-after": [block(x)], "qkv": block.qkv(x)}[name]
    target = [(x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
              for x in parts]
    difference = (student(seen) @ objective.map.weight.T + objective.map.bias - torch.cat(target, -1)).abs()
    expected = torch.where(difference < 2, difference**2 / 4, difference - 1).mean()
    assert objective(seen, clean)["feature"].item() == pytest.approx(expected.item(), abs=1e-6)

@pytest.mark.parametrize("bf16", [False, True])
def test_relations_without_softmax(bf16):
    student, teacher, seen, clean = networks()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = targets.LogitRelation(student, teacher, 3, 4, ("qk", "vv"))(seen, clean)
        networks_qkv = ((student.qkv(seen, 3), 6), (teacher.qkv(clean, 3), 12))
    for pair, (i, j) in {"qk": (0, 1), "vv": (2, 2)}.items():
        logits = []
        for qkv, width in networks_qkv:
            a, b = (x.float().split(width, dim=2) for x in (qkv[i], qkv[j]))
            logits.append(torch.stack([a[head] @ b[head].mT for head in range(4)]) / width**0.5)
        expected = (logits[0] - logits[1]).square().mean().item()
        assert losses[pair].item() == pytest.approx(expected, rel=1e-5)

def test_masked_relation_is_the_relation_of_the_visible_tokens():
    student, teacher, seen, clean = networks()
    noise = torch.rand(2, 16)
    objective = targets.MaskedRelation(student, teacher, 3, 4, mask_ratio=0.5)
    keep, _ = mae.random_mask(noise, 0.5)
    qkv = []
    for vit, images in ((student, seen), (teacher, clean)):
        tokens = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
        tokens = torch.stack([tokens[i][keep[i]] for i in range(2)])
        tokens = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1), tokens], dim=1)
        for block in vit.blocks[:2]:
            tokens = block(tokens)
        qkv.append(vit.blocks[2].qkv(tokens))
    expected, losses = relation_loss(*qkv, 4), objective(seen, clean, noise)
    assert qkv[0][0].shape == (2, 9, 24)
    same(losses, expected)

OPTIONS = [["--target", name] for name in ("relation", "logit", "cls", *targets.FEATURES)] + [
    ["--mask-ratio", "0.5"], ["--mask-ratio", "0.5", "--mae"], ["--target", "cls", "--mae"]]

@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_target_trains(options, pictures, teacher_file, tmp_path):
    """From the command line: fit() itself checks that the losses reach all that is to be trained."""
    targets.main(["--student", "nano", "--dim", "24", "--heads", "2", "--teacher", str(teacher_file), "--blr",
                  "0.02", "--data", str(pictures), "--batch-size", "8", "--workers", "0", "--device", "cpu",
                  "--epochs", "4", "--decoder", "16", "1", "2", "--out", str(tmp_path), *options])
    saved = load(tmp_path)
    losses = [record["loss"] for record in saved["history"]]
    assert losses[-1] < losses[0]
    assert not any("teacher." in name for name in saved["objective"])

def test_what_targets_do_not_take(teacher_file, pictures, tmp_path, capsys):
    for options, says in ((["--target", "cls", "--mask-ratio", "0.5"], "goes with --target relation"),
                          (["--mask-ratio", "1"], "leaves no relations")):
        with pytest.raises(SystemExit) as stopped:
            targets.main(["--student", "nano", "--dim", "24", "--heads", "2", "--teacher", str(teacher_file),
                          "--data", str(pictures), "--out", str(tmp_path / "x"), "--device", "cpu", *options])
        assert says in str(stopped.value) and "\n" not in str(stopped.value)

# ---- The study, the demo, the benchmark --------------------------------------------------------------------

def test_splits_share_no_photo_and_end_at_the_right_ones(pictures, tmp_path):
    assert data.link_splits(str(pictures), str(tmp_path)) == 40

    def photos(part):
        found = tinymim.find_images(str(tmp_path / "data" / part))
        return {os.path.realpath(os.fsdecode(path)) for path in found}

    few, held_out = photos("tune/train"), photos("tune/val")
    assert few == photos("few/train") and len(few) == len(held_out) == 10 and not few & held_out
    assert photos("few/val") == photos("all/val") == {str(path) for path in pictures.glob("test/*/*")}
    assert photos("all/train") == {str(path) for path in pictures.glob("train/*/*")}

def test_cifar10_as_files_and_a_missing_folder(tmp_path, monkeypatch):
    photos = datasets.FakeData(8, (3, 8, 8), num_classes=2)
    photos.classes = ["cat", "dog"]
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **options: photos)
    assert data.link_splits(data.cifar10(str(tmp_path)), str(tmp_path / "out")) == 8
    with pytest.raises(SystemExit, match="No such file or directory"):
        study.main(["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")])

def test_results_keep_what_others_wrote(tmp_path):
    path = str(tmp_path / "results.json")
    data.results(path, "few//0", 50.0)
    data.results(path, "few//1", 52.0)
    written = json.loads((tmp_path / "results.json").read_text())
    assert data.results(path) == written == {"few//0": 50.0, "few//1": 52.0}

def test_tables_compare_with_the_first_row(capsys):
    found = {"few/--relations qk vv/0": 70.0, "few/--relations qk vv/1": 72.0, "few//0": 73.0,
             "few/--target cls/0": 60.0, "few/--target cls --mae/0": 99.0}
    study.print_tables(found, ["T8"])
    rows = dict(line.strip("| ").partition(" | ")[::2] for line in capsys.readouterr().out.splitlines()[3:])
    assert rows["relation (qk vv)"] == "75.8 | 71.0 ± 1.4"
    assert rows["relation (qq kk vv)"] == " | 73.0 (+2.0)"
    assert rows["class token"] == "70.6 (-5.2) | 60.0 (-11.0)"

def test_rows_of_one_method_share_their_rates():
    assert all(study.method_of(spec) == name for name, spec in study.METHODS.items())
    assert study.method_of("--teacher assistant") == study.method_of("--relations qk vv") == "relation"
    assert {len(study.rates_to_try(name)) for name in study.METHODS if name != "teacher"} == {8}

def test_every_row_of_the_study_works(tmp_path):
    """At its smallest; what is finished is not run again."""
    first = script("study.py", "--smallest", "--out", tmp_path)
    again = script("study.py", "--smallest", "--out", tmp_path)
    rows = [line for line in again.splitlines() if line.startswith("| ")]
    assert len(rows) == len(study.ROWS) + len({row[0] for row in study.ROWS})
    assert rows == [line for line in first.splitlines() if line.startswith("| ")]
    assert all(top1.strip() for row in rows for top1 in row.split("|")[3:5])  # every number is there
    assert "epoch 1 " in first and "epoch 1 " not in again.split("| T8")[0].split("results in")[-1]

def test_the_demos_teacher_and_its_pictures(tmp_path):
    path = os.path.join(os.path.dirname(HERE), "assets", "shapes_teacher.pth")
    assert os.path.getsize(path) < 3e6
    teacher = tinymim.load_teacher(path)
    assert teacher.config == dict(dim=128, depth=6, heads=4, patch_size=6, img_size=36)
    for name in ("a", "b"):
        script("shapes.py", tmp_path / name, "--train", 20, "--val", 10)
    drawn = sorted((tmp_path / "a").rglob("*.png"))
    assert len(drawn) == 30 and len({picture.parent.name for picture in drawn}) == 10
    assert all(x.read_bytes() == (tmp_path / "b" / x.relative_to(tmp_path / "a")).read_bytes() for x in drawn)

def test_the_demo_and_its_figures(tmp_path, monkeypatch, capsys):
    """With few pictures: all four rows, and what is drawn of them."""
    import demo
    for name, count in (("PICTURES", 64), ("LABELLED", 40), ("VALIDATION", 20)):
        monkeypatch.setattr(demo, name, count)
    demo.main(["--out", str(tmp_path / "demo")])
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in demo.STARTS)
    width, height = Image.open(tmp_path / "demo" / "demo.png").size
    assert width > 700 and height > 600
    with pytest.raises(SystemExit, match="holds a demo"):
        demo.main(["--out", str(tmp_path / "demo")])
    pytest.importorskip("matplotlib")
    script("figures.py", "--run", tmp_path / "demo" / "seed0" / "distilled", "--out", tmp_path)
    assert "</svg>" in (tmp_path / "method.svg").read_text()
    assert Image.open(tmp_path / "relations.png").size[0] > 800

def test_the_benchmark_and_its_figure(pictures, tmp_path):
    """All of it, at the smallest sizes: its numbers belong together; and its bars are drawn."""
    import benchmark
    seen, heads, half = torch.randn(2, 2, 5, 12), 3, [torch.randn(2, 3, 5, 4) for _ in "qkv"]
    expected = tinymim.relation(seen[0], seen[1], heads)
    torch.testing.assert_close(benchmark.usual_relation(seen[0], seen[1], heads), expected)
    expected = torch.nn.functional.scaled_dot_product_attention(*half)
    torch.testing.assert_close(benchmark.usual_attention(*half), expected)
    printed = script("benchmark.py", "--student", "nano", "--img-size", 32, "--batch-size", 2, "--repeats", 1,
                     "--json", "--pictures", 16, "--steps", 2, "--workers", 1, "--data", pictures)
    result = json.loads(printed)
    usual, ours = result["pipeline"]
    assert (usual["KiB per image"], ours["KiB per image"]) == (2 * 3 * 32 * 32 * 4 / 1024, 3)
    variants = [row["variant"] for row in result["step"]]
    bf16 = ["tinymim.py, bfloat16"] * torch.cpu._is_avx512_bf16_supported()
    assert variants == ["usual, float32", "tinymim.py, float32", *bf16]
    dim, tokens, patches, blocks = 768, 5, 4, 8  # whole blocks, before the qkv of the ninth, at 3/4 of 12
    in_block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    flops = patches * 3 * 16**2 * dim + blocks * in_block + 3 * tokens * dim**2
    assert result["GFLOP per image"]["teacher"] == pytest.approx(2 * flops / 1e9)
    for row in result["step"][1:]:  # the first has a ceiling of its own
        rate = result["ceilings"][f"product in {row['variant'].split(', ')[1]}, TFLOP/s"] * 1e12
        share = 100 * 2 * 2 * flops / (row["teacher, ms"] / 1000) / rate
        assert row["teacher, % of ceiling"] == pytest.approx(share)
        assert row["images/s"] == pytest.approx(2 / (row["step, ms"] / 1000))
    assert all(0 <= row["waiting for data, %"] < 100 and row["images/s"] > 0 for row in result["end to end"])
    pytest.importorskip("matplotlib")
    (tmp_path / "speed.json").write_text(printed)
    (tmp_path / "results.json").write_text('{"few//0": 70.0, "few//1": 72.0, "few/scratch/0": 54.0}')
    script("figures.py", "--speed", tmp_path / "speed.json", "--out", tmp_path,
           "--results", tmp_path / "results.json")
    assert "</svg>" in (tmp_path / "speed.svg").read_text()
    assert Image.open(tmp_path / "results.png").size[0] > 800

# ---- Robustness --------------------------------------------------------------------------------------------

def test_mean_corruption_error_by_hand():
    """Hendrycks and Dietterich: the errors of five severities over AlexNet's, averaged over corruptions."""
    import robustness
    alexnet = {name: [percent] * 5 for name, percent in robustness.ALEXNET.items()}
    assert len(alexnet) == 15 and robustness.mean_corruption_error(alexnet) == pytest.approx(100)
    errors = {"snow": [10, 20, 30, 40, 50], "fog": [81.9324] * 5}
    assert robustness.mean_corruption_error(errors) == pytest.approx(100 * (30 / 86.6816 + 1) / 2)

def test_robustness_on_folders_with_known_answers(tmp_path, capsys):
    """A classifier that always says "b", or "a" where b is not among the classes."""
    import robustness
    model = finetune.Classifier(12, 1, 2, num_classes=3, patch_size=8, img_size=16)
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([1.0, 2.0, 0.0])
    config = model.config | {"classes": ["a", "b", "c"]}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "x.pth")

    def write(folder, counts):
        for name, count in counts.items():
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20)).save(tmp_path / folder / name / f"{i}.png")

    write("imagenet", {"a": 1, "b": 3, "c": 4})
    write("imagenet-a", {"a": 1, "c": 3})  # among a and c it says a
    for corruption in ("snow", "fog"):
        for severity in range(1, 6):
            write(f"imagenet-c/{corruption}/{severity}", {"b": severity, "c": 5 - severity + 1})
    folders = [f"--{name}={tmp_path / name}" for name in ("imagenet", "imagenet-a", "imagenet-c")]
    robustness.main(["--checkpoint", str(tmp_path / "x.pth"), "--device", "cpu", "--workers", "0",
                     "--imagenet-r", "nowhere", *folders])
    printed = capsys.readouterr().out
    error = 100 * sum(6 - severity for severity in range(1, 6)) / 6 / 5
    mce = 100 * (error / 86.6816 + error / 81.9324) / 2
    assert f"x.pth | 37.5 | 25.0 | - | {mce:.1f} (2 of 15 corruptions) |" in printed
    left_out = printed.split("left out: ")[1]
    assert "nowhere" in left_out and "gaussian_noise" in left_out and "snow" not in left_out

# ---- Fine-tuning with distillation -------------------------------------------------------------------------

def test_the_size_of_tinymim_star():
    """About 5.8 M parameters without the heads, and 1.3 GFLOP (multiply-adds), as in the paper."""
    import finetune_distilled
    model = finetune_distilled.DistilledClassifier(192, 12, 12, star_dim=1280)
    heads = sum(p.numel() for head in (model.head, model.head_dist) for p in head.parameters())
    parameters = sum(p.numel() for p in model.parameters()) - heads
    assert parameters == pytest.approx(5.8e6, rel=0.01)
    spelt_out = sdpa_kernel(SDPBackend.MATH)  # which the counter understands on a CPU, too
    with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert counter.get_total_flops() / 2 == pytest.approx(1.3e9, rel=0.05)

@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_both_heads(soft):
    import finetune_distilled
    torch.manual_seed(0)
    model = finetune_distilled.DistilledClassifier(12, 2, 2, 5, patch_size=8, img_size=16, star_dim=0)
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(head.weight)
    teacher = finetune.Classifier(12, 1, 2, 5, patch_size=8, img_size=16)
    torch.nn.init.normal_(teacher.head.weight)
    images, targets = torch.randn(3, 3, 16, 16), torch.rand(3, 5).softmax(-1)
    objective = finetune_distilled.DistilledSupervised(model, 0.0, False, teacher, 0.3, soft, temperature=2.0)
    losses = objective.train()(images, targets)
    assert not objective.teacher.training and objective.model.training
    one, two = model.both(images)
    torch.testing.assert_close(model(images), (one + two) / 2)
    expected = -0.7 * (targets * one.log_softmax(1)).sum(1).mean()
    assert losses["labels"].item() == pytest.approx(expected.item())
    said = teacher.eval()(images)
    if soft:
        p, q = (said / 2).softmax(1), (two / 2).softmax(1)
        expected = (p * (p / q).log()).sum() * 4 / 15
    else:
        expected = -two.log_softmax(1)[torch.arange(3), said.argmax(1)].mean()
    assert losses["distilled"].item() == pytest.approx(0.3 * expected.item(), rel=1e-4)

def test_finetuning_with_a_label_teacher(pictures, teacher_file, tmp_path, capsys):
    """Train, resume, evaluate; the teacher is not saved; teachers of other classes are refused."""
    import finetune_distilled
    import robustness
    folder = link(pictures, tmp_path / "labelled")
    common = ["--data", str(folder), "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    finetune.main(["--checkpoint", str(teacher_file), "--epochs", "1", *common, "--out",
                   str(tmp_path / "teacher")])
    options = ["--checkpoint", str(teacher_file), "--star", "--heads", "4", "--label-teacher",
               str(tmp_path / "teacher" / "last.pth"), "--out", str(tmp_path / "run"), *common]
    finetune_distilled.main([*options, "--epochs", "1"])
    finetune_distilled.main([*options, "--epochs", "2", "--resume"])
    saved = load(tmp_path / "run")
    assert saved["config"]["star_dim"] == 1280 and not any("teacher." in name for name in saved["objective"])
    assert list(saved["history"][1])[:4] == ["epoch", "loss", "labels", "distilled"]
    capsys.readouterr()
    finetune_distilled.main(["--eval", "--checkpoint", str(tmp_path / "run" / "last.pth"), *common])
    assert f"top-1 {saved['history'][1]['top1']:.3f}%" in capsys.readouterr().out
    both = ["--checkpoint", str(tmp_path / "run" / "last.pth"), "--device", "cpu", "--workers", "0"]
    with pytest.raises(SystemExit, match="two heads"):
        finetune.main([*both, "--eval", "--data", str(folder)])
    robustness.main([*both, "--imagenet", str(folder / "val")])
    assert f"last.pth | {saved['history'][1]['top1']:.1f} |" in capsys.readouterr().out
    for teacher, says in ((str(teacher_file), "neither a model"), ("nothing", "cannot load nothing"),
                          (str(tmp_path / "run" / "last.pth"), "neither a model")):
        with pytest.raises(SystemExit, match=says):
            finetune_distilled.main([*options, "--label-teacher", teacher, "--epochs", "1", "--out",
                                     str(tmp_path / "other")])

# ---- Segmentation ------------------------------------------------------------------------------------------

def test_scores_by_hand_and_by_sets():
    truth = torch.tensor([0, 0, 0, 0, 1, 1, segment.IGNORED, segment.IGNORED])
    said = torch.tensor([0, 0, 0, 1, 1, 0, 0, 3])
    matrix = segment.confusion(said, truth, 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    result, iou = segment.scores(matrix)  # classes 2 and 3 do not occur: they do not count
    assert iou[:2] == pytest.approx([60, 100 / 3]) and all(math.isnan(x) for x in iou[2:])
    assert result == pytest.approx({"mIoU": 140 / 3, "mean_accuracy": 62.5, "pixel_accuracy": 400 / 6})
    torch.manual_seed(0)
    pairs = [(torch.randint(5, (30, 20)), torch.randint(6, (30, 20))) for _ in range(3)]
    truths = [torch.where(truth == 5, segment.IGNORED, truth) for _, truth in pairs]
    matrix = sum(segment.confusion(said, truth, 5) for (said, _), truth in zip(pairs, truths))
    true, said = torch.cat(truths).flatten().tolist(), torch.cat([x for x, _ in pairs]).flatten().tolist()
    for label in range(5):
        a = {i for i, x in enumerate(true) if x == label}
        b = {i for i, x in enumerate(said) if x == label and true[i] != segment.IGNORED}
        assert segment.scores(matrix)[1][label] == pytest.approx(100 * len(a & b) / len(a | b))

def test_feature_maps_of_a_distilled_student(pictures, teacher_file, tmp_path):
    """512 pixels in, four maps out. What distillation did not train keeps the checkpoint's initial values."""
    tinymim.main(f"--dim 24 --depth 4 --heads 2 --teacher {teacher_file} --data {pictures} --epochs 1 "
                 f"--batch-size 20 --workers 0 --out {tmp_path}".split())
    args = dict.fromkeys(("heads", "dim", "depth", "patch_size"), None) | dict(num_classes=5, channels=8)
    args |= dict(checkpoint=str(tmp_path / "last.pth"), student="tiny", img_size=512, eval=False, drop_path=0)
    model = segment.build(argparse.Namespace(**args)).eval()
    assert model.taps == [1, 2, 3, 4] and segment.Segmenter(24, 12, 2, channels=8).taps == [4, 6, 8, 12]
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        maps = model.features(images)
        assert [x.shape for x in maps] == [(1, 24, 64 * s // 2, 64 * s // 2) for s in (8, 4, 2, 1)]
        assert model(images).shape == (1, 5, 256, 256)
        x = model.blocks[1](model.blocks[0](model.embed(images)))  # the second map, spelt out
        x = model.neck[1](x[:, 1:].transpose(1, 2).reshape(1, 24, 64, 64))
    torch.testing.assert_close(maps[1], x)
    saved = load(tmp_path)["model"]
    for name in ("blocks.3.mlp.fc1.weight", "blocks.3.attn.proj.weight", "blocks.3.attn.qkv.weight"):
        assert torch.equal(model.state_dict()[name], saved[name])

def test_photo_and_labels_move_together():
    """Boxes 40 levels bright for each label: so they remain, but at edges, and where colours change."""
    labels = torch.arange(5).repeat_interleave(20).expand(60, 100)
    photo = (40 * labels).to(torch.uint8).expand(3, -1, -1)
    transform = segment.Transform(48, train=True)
    transform.change = transform.change.transforms[0]  # the flip, without the colours
    torch.manual_seed(0)
    sizes = set()
    for _ in range(40):
        crop, label = transform(tv_tensors.Image(photo), tv_tensors.Mask(labels.to(torch.uint8)))
        assert crop.shape == (3, 48, 48) and label.shape == (48, 48)
        known = label != segment.IGNORED
        sizes.add(known.sum().item())
        assert ((crop[0].int() - 40 * label.int()).abs() < 10)[known].float().mean() > 0.8
        assert label[known].bincount().max() <= 0.75 * known.sum()
        assert (crop[:, ~known].T == torch.tensor([124, 116, 104])).all()  # the padding is gray
    assert len(sizes) > 3  # crops of small scales are padded
    shrunk, same = segment.Transform(48, train=False)(tv_tensors.Image(photo), labels)
    assert shrunk.shape == (3, 48, 80) and same is labels

@pytest.mark.parametrize("size", [(48, 48), (48, 100), (30, 70)])
def test_sliding_windows_cover_the_image(size):
    """A network that returns its input returns the image; each window is as large as in training."""
    windows = []
    def network(images):
        windows.append(images.shape)
        return images
    image = torch.randn(3, *size)
    torch.testing.assert_close(segment.slide(network, image, 48, 31), image)
    assert windows == [(1 + math.ceil(max(size[1] - 48, 0) / 31), 3, 48, 48)]

def test_segmentation_trains_resumes_and_evaluates(teacher_file, tmp_path, capsys, monkeypatch):
    """The same results on two processes."""
    shapes.write_segmentation(tmp_path / "data", "training", 8, seed=1, size=32)
    shapes.write_segmentation(tmp_path / "data", "validation", 5, seed=2, size=32)
    common = ["--data", str(tmp_path / "data"), "--img-size", "32", "--workers", "0", "--device", "cpu"]
    options = ["--checkpoint", str(teacher_file), *common, "--num-classes", "11", "--channels", "8",
               "--eval-every", "8", "--warmup-iterations", "2", "--batch-size", "4", "--blr", "0.3"]
    segment.main([*options, "--iterations", "16", "--out", str(tmp_path / "whole")])
    saved = load(tmp_path / "whole")
    history = saved["history"]
    assert [record["lr"] for record in history] == pytest.approx([0.3 / 64 * (1 - x / 16) for x in (7, 15)])
    assert history[1]["loss"] < history[0]["loss"]
    assert history[1]["main"] + history[1]["aux"] == pytest.approx(history[1]["loss"], rel=1e-5)
    assert Image.open(tmp_path / "whole" / "segmentation.png").width > 3 * 256

    with monkeypatch.context() as patch:  # stopped in the second half, and continued: nothing changes
        results = iter([segment.scores(torch.eye(11))])
        patch.setattr(segment, "evaluate", lambda *_: next(results))
        with pytest.raises(StopIteration):
            segment.main([*options, "--iterations", "16", "--out", str(tmp_path / "part")])
    segment.main([*options, "--iterations", "16", "--out", str(tmp_path / "part"), "--resume"])
    same(load(tmp_path / "part")["model"], saved["model"])

    seen = []  # an epoch shorter than the data: the next ones go on with the other photos
    dataset = segment.SegmentationDataset(str(tmp_path / "data"), "training", 11, 32, items=3)
    dataset.transform = lambda photo, labels: seen.append(labels.max().item()) or (photo, labels)
    for key in range(8):
        dataset[key]
    assert len(dataset) == 3 and set(seen) == {1, 2, 3, 4, 5, 6, 7, 8}  # each photo has a shape of its own

    capsys.readouterr()
    checkpoint = str(tmp_path / "whole" / "last.pth")
    segment.main(["--eval", "--checkpoint", checkpoint, *common])
    one = capsys.readouterr().out.splitlines()
    assert len(one) == 12 and one[0].startswith("class   1  IoU ")
    assert f"mIoU {history[1]['mIoU']:.2f}" in one[-1]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = script("segment.py", "--eval", "--checkpoint", checkpoint, *common, launcher=torchrun)
    assert printed.splitlines()[-12:] == one

def test_ade20k_is_downloaded_once_and_whole(tmp_path, monkeypatch):
    (tmp_path / "zip" / "ADEChallengeData2016" / "images").mkdir(parents=True)
    archive = shutil.make_archive(str(tmp_path / "ade"), "zip", tmp_path / "zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(segment, "ADE20K", f"http://127.0.0.1:{server.server_port}/ade.zip")
        for _ in range(2):  # the second time without a download
            folder = segment.ade20k(str(tmp_path / "data"))
            assert os.listdir(folder) == ["images"]
            assert os.listdir(tmp_path / "data") == ["ADEChallengeData2016"]
            os.truncate(archive, 50)
        with pytest.raises(zipfile.BadZipFile):
            segment.ade20k(str(tmp_path / "other"))
        assert os.listdir(tmp_path / "other") == []
        server.shutdown()

@pytest.mark.parametrize("options, says", [
    ("--img-size 30", "30 by 8"), ("--num-classes 2", "--num-classes"), ("--data nowhere", "nowhere"),
    ("--checkpoint {data}/x.txt", "cannot load"), ("--eval", "not a checkpoint of this script"),
    ("--iterations 5 --eval-every 2", "multiple"), ("--epochs 3", "--iterations"),
    ("--data {data}/small", "(32, 32) bytes"), ("--data {data}/missing", "1 photos have no label map"),
    ("--data {data}/colour", "(32, 32) bytes"), ("--batch-size 1", "--batch-size 2"),
])
def test_mistakes_in_segmentation(options, says, teacher_file, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("no checkpoint")
    for folder in (".", "small", "missing", "colour"):
        shapes.write_segmentation(tmp_path / folder, "training", 2, seed=1, size=32)
        shapes.write_segmentation(tmp_path / folder, "validation", 1, seed=2, size=32)
    Image.new("L", (5, 5)).save(tmp_path / "small/annotations/training/0.png")
    os.remove(tmp_path / "missing/annotations/validation/0.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "colour/annotations/training/1.png")
    common = (f"--checkpoint {teacher_file} --data {tmp_path} --img-size 32 --iterations 2 --eval-every 2 "
              "--warmup-iterations 1 --batch-size 2 --num-classes 11 --workers 0 --device cpu --channels 8 "
              f"--out {tmp_path}/run ")
    with pytest.raises(SystemExit) as stopped:
        segment.main((common + options.format(data=tmp_path)).split())
    assert says in str(stopped.value) + capsys.readouterr().err
