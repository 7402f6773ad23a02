"""Tests of what is in extras/: python -m pytest

MAE's golden numbers were computed in float64 by its authors' code, on weights that a formula fills.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock, patch

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import content
import data
import finetune
import finetune_distilled
import mae
import parallel
import robustness
import shapes
import study
import targets
import tinymim
from test_tinymim import SMALL, WIDER, args_of, fails, fill, filled, load, refused, same
from tinymim import ImageDataset, ViT, relation_loss

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # leaving torchvision

@pytest.fixture(autouse=True)
def usual_functions(monkeypatch):
    """The study and the demo put others in their place: undo that after each test."""
    usual = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", usual)
    monkeypatch.setattr(tinymim, "decode", tinymim.decode)

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Drawn shapes: train/ of 40, and val/ of 20, in ten classes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes.write(folder / "train", 40, seed=1, size=32)
    shapes.write(folder / "val", 20, seed=2, size=32)
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
    teacher = ViT(**WIDER).double().requires_grad_(False)
    return ViT(**SMALL).double(), teacher, images[0], images[1]

def script(name, *options, launcher=()):
    """Run a script of extras/ in a process of its own. Returns what it printed."""
    command = [sys.executable, *launcher, os.path.join(HERE, name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def stopped(main, options, epoch):
    """main(options), which is killed before it has saved this epoch."""
    save = torch.save

    def save_others(content, path):
        if content["epoch"] == epoch:
            sys.exit("killed")
        save(content, path)

    with patch.object(torch, "save", save_others), pytest.raises(SystemExit, match="killed"):
        main(options)

# ---- MAE ----------------------------------------------------------------------------------------

def test_golden_mae():
    """Both losses, the latent, the prediction, and which patches are hidden."""
    objective = mae.MAE(ViT(768, 12, 12), 0.75, (512, 8, 16))
    student = filled(objective.student, "mae.")
    for name, parameter in filled(objective.decoder, "").named_parameters():
        if name != "pos_embed":
            full_name = "mae." + ("" if name == "mask_token" else "decoder_") + name
            u = fill(full_name, *parameter.shape)
            is_scale = "norm" in name and name.endswith("weight")
            parameter.data = 1 + 0.1 * u if is_scale else 0.08 * u
    images, noise = 2 * fill("images", 2, 3, 224, 224), (fill("noise", 2, 196) + 1) / 2
    keep, rank = mae.random_mask(noise, 0.75)
    assert keep.shape == (2, 49)
    assert (rank >= 49)[0, :12].int().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    with torch.no_grad():
        latent = student.norm(student.blocks(mae.pick(student.embed(images), keep)))
        predicted = objective.decoder(latent, rank)
        for token, expected in [
            (latent[0, 0],
             [-1.2372945736024303, 1.3275049180791632, 0.29686112952499166, 0.605038438901868]),
            (latent[1, 49],
             [0.0846666436299498, -1.8442532026117107, 0.6007483638902401, -0.08477623316289]),
            (predicted[0, 7],
             [1.0195772945072776, -0.6500561337543378, -0.0763281080008, -1.8124896853005]),
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
    refused("leaves nothing", mae.MAE, ViT(**SMALL), ratio)

@pytest.mark.parametrize("decoder", [(24, 1, 5), (18, 1, 3)])
def test_a_decoder_that_does_not_split(decoder):
    refused("divisible by 4 and by its", mae.MAE, ViT(**SMALL), 0.75, decoder)

def test_maes_recipe_and_ranges(capsys):
    """Warm-up of None is a 20th of the epochs in the training loop."""
    args = vars(args_of(mae))
    recipe = dict(epochs=800, warmup_epochs=None, blr=1.5e-4, min_lr=0, weight_decay=0.05,
                  drop_path=0, mask_ratio=0.75, decoder=[512, 8, 16], script="extras/mae.py")
    assert args | recipe == args
    objective = mae.build(argparse.Namespace(**args))
    assert objective.student.config == ViT(192, 12, 3).config
    for option in ("--mask-ratio=1.5", "--patch-size=0"):
        refused("^2$", mae.main, [option], error=SystemExit)
        assert "is not between" in capsys.readouterr().err

def test_mae_then_distillation_then_finetuning(pictures, tmp_path):
    """A teacher of one's own. A resumed run is the uninterrupted one, decoder and masks too."""
    common = ["--data", str(pictures), "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    pretrain = ["--dim", "24", "--depth", "3", "--heads", "2", "--patch-size", "8", "--img-size",
                "32", "--decoder", "16", "1", "2", "--blr", "0.01", "--warmup-epochs", "0.5",
                "--epochs", "3", *common]
    mae.main([*pretrain, "--out", str(tmp_path / "mae")])
    saved = load(tmp_path / "mae")
    assert saved["history"][-1]["pixel"] < saved["history"][0]["pixel"]
    assert saved["model"].keys() == ViT(**SMALL).state_dict().keys()
    assert "decoder.pred.weight" in saved["objective"]

    again = [*pretrain, "--out", str(tmp_path / "again")]
    stopped(mae.main, again, epoch=3)
    mae.main([*again, "--resume"])
    same(load(tmp_path / "again")["objective"], saved["objective"])

    tinymim.main(["--student", "nano", "--dim", "12", "--heads", "2", "--epochs", "1", *common,
                  "--teacher", str(tmp_path / "mae" / "last.pth"),
                  "--out", str(tmp_path / "small")])
    finetune.main(["--checkpoint", str(tmp_path / "small" / "last.pth"), "--epochs", "1", *common,
                   "--out", str(tmp_path / "tuned")])
    assert 0 <= load(tmp_path / "tuned")["history"][0]["top1"] <= 100

# ---- Other targets ------------------------------------------------------------------------------

def test_class_token():
    """KL between two softmaxes over channels, spelt out."""
    student, teacher, seen, clean = networks()
    objective = targets.ClassToken(student, teacher).double()
    mapped = student(seen)[:, 0] @ objective.map.weight.T + objective.map.bias
    p = teacher(clean)[:, 0].float().softmax(-1).double()
    q = mapped.float().softmax(-1).double()
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
    parts = {"output": [block(x)], "attention": [attention], "attention-after": [x + attention],
             "ffn": [ffn], "ffn-after": [block(x)], "qkv": teacher.qkv_at(clean, 3)}[name]
    target = []
    for x in parts:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        target.append((x - x.mean(-1, keepdim=True)) / deviation)
    mapped = student(seen) @ objective.map.weight.T + objective.map.bias
    difference = (mapped - torch.cat(target, -1)).abs()
    expected = torch.where(difference < 2, difference**2 / 4, difference - 1).mean()
    assert objective(seen, clean)["feature"].item() == pytest.approx(expected.item(), abs=1e-6)

@pytest.mark.parametrize("bf16", [False, True])
def test_relations_without_softmax(bf16):
    student, teacher, seen, clean = networks()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = targets.LogitRelation(student, teacher, 3, 4, ("qk", "vv"))(seen, clean)
        networks_qkv = ((student.qkv_at(seen, 3), 6), (teacher.qkv_at(clean, 3), 12))
    assert losses.keys() == {"qk", "vv"}
    for pair, (i, j) in {"qk": (0, 1), "vv": (2, 2)}.items():
        logits = []
        for qkv, width in networks_qkv:
            a, b = (x.float().split(width, dim=2) for x in (qkv[i], qkv[j]))
            products = torch.stack([a[head] @ b[head].mT for head in range(4)])
            logits.append(products / width**0.5)
        expected = (logits[0] - logits[1]).square().mean().item()
        assert losses[pair].item() == pytest.approx(expected, rel=1e-5)

def test_masked_relation_is_the_relation_of_the_visible_tokens():
    student, teacher, seen, clean = networks()
    noise = torch.rand(2, 16)
    objective = targets.MaskedRelation(student, teacher, 3, 4, mask_ratio=0.5)
    keep, _ = mae.random_mask(noise, 0.5)
    qkv = []
    for vit, images in ((student, seen), (teacher, clean)):
        patches = vit.patch_embed["proj"](images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
        patches = torch.stack([patches[i][keep[i]] for i in range(2)])
        class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        for block in vit.blocks[:2]:
            tokens = block(tokens)
        block = vit.blocks[2]
        qkv.append(block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1))
    assert qkv[0][0].shape == (2, 9, 24)
    same(objective(seen, clean, noise), relation_loss(*qkv, 4))

def target_options(teacher, *options):
    return ["--student", "nano", "--dim", "24", "--heads", "2", "--teacher", str(teacher),
            "--device", "cpu", *options]

OPTIONS = [["--target", name] for name in ("relation", "logit", "cls", *targets.FEATURES)] + [
    ["--mask-ratio", "0.5"], ["--mask-ratio", "0.5", "--mae"], ["--target", "cls", "--mae"]]

@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_target_trains(options, pictures, teacher_file, tmp_path, capsys):
    """From the command line. Relations leave the end of the last block untrained, and say so in the
    config: there is no such entry where the whole student is trained."""
    targets.main(target_options(
        teacher_file, "--blr", "0.02", "--data", str(pictures), "--batch-size", "8", "--workers",
        "0", "--epochs", "4", "--decoder", "16", "1", "2", "--out", str(tmp_path), *options))
    saved = load(tmp_path)
    losses = [record["loss"] for record in saved["history"]]
    assert losses[-1] < losses[0]
    names = {part for name in saved["objective"] for part in name.split(".")}
    assert "student" in names and "teacher" not in names
    partly = "--mae" not in options and not {"cls", *targets.FEATURES} & {*options}
    assert saved["config"]["relation_heads"] == (4 if partly else 0)
    untrained = [line for line in capsys.readouterr().out.splitlines() if "no loss reaches" in line]
    assert len(untrained) == partly
    assert all("student.blocks.3.mlp.fc1" in line for line in untrained)

def test_a_resumed_run_with_another_target_is_the_uninterrupted_one(
        pictures, teacher_file, tmp_path):
    options = target_options(
        teacher_file, "--target", "qkv", "--mae", "--data", str(pictures), "--batch-size", "8",
        "--workers", "0", "--epochs", "2", "--decoder", "16", "1", "2")
    targets.main([*options, "--out", str(tmp_path / "whole")])
    part = [*options, "--out", str(tmp_path / "part")]
    stopped(targets.main, part, epoch=2)
    targets.main([*part, "--resume"])
    same(load(tmp_path / "part")["objective"], load(tmp_path / "whole")["objective"])
    other = [*part, "--resume", "--target", "ffn"]
    fails(targets.main, other, "has a run with --target qkv, not ffn")

def test_which_block_teaches(teacher_file):
    """That of the options. By default the last where the networks are as deep, else that at 3/4;
    for the output always the last."""
    for options, block in (([], 4), (["--depth=3"], 3), (["--depth=3", "--target=ffn"], 3),
                           (["--depth=3", "--target=output"], 4),
                           (["--target=output", "--teacher-block=2"], 2),  # and no relation heads:
                           (["--target=output", "--dim=32", "--teacher-heads=3"], 4)):
        objective = targets.build(args_of(targets, *target_options(teacher_file, *options)))
        is_feature = isinstance(objective, targets.Feature)
        found = objective.block if is_feature else objective.teacher_block
        assert found == block, options

def test_drop_path_of_the_teacher(teacher_file):
    """It acts in training only, and only if it is asked for."""
    images = torch.randn(8, 3, 32, 32)
    for options, rate in (([], 0.0), (["--teacher-drop-path", "0.3", "--target", "cls"], 0.3)):
        args = args_of(targets, *target_options(teacher_file, *options))
        objective = targets.build(args)
        assert [block.drop_path.p for block in objective.teacher.blocks] == [rate] * 4
        assert [block.drop_path.p for block in objective.student.blocks] == [0.1] * 4
        teacher = objective.train().teacher
        torch.manual_seed(0)
        assert torch.equal(teacher(images), teacher(images)) == (rate == 0)
        teacher.eval()
        assert torch.equal(teacher(images), teacher(images))

def test_what_targets_do_not_take(teacher_file, pictures, tmp_path, capsys):
    common = ["--data", str(pictures), "--out", str(tmp_path / "x")]
    options = target_options(teacher_file, *common)
    fails(targets.main, [*options, "--target", "cls", "--mask-ratio", "0.5"],
          "goes with --target relation")
    fails(targets.main, [*options, "--target", "cls", "--teacher-block", "1"], "leave out")
    fails(targets.main, [*options, "--mask-ratio", "1"], "leaves no relations")
    for option in ("--mask-ratio=-0.1", "--teacher-drop-path=2"):
        refused("^2$", targets.main, [*options, option], error=SystemExit)
        assert "is not between 0 and 1" in capsys.readouterr().err

# ---- The study, the demo, the benchmark ---------------------------------------------------------

def test_splits_share_no_photo_and_end_at_the_right_ones(pictures, tmp_path):
    assert data.link_splits(str(pictures), str(tmp_path)) == 40

    def photos(part):
        found = tinymim.find_images(str(tmp_path / "data" / part))
        return {os.path.realpath(os.fsdecode(path)) for path in found}

    few, held_out = photos("tune/train"), photos("tune/val")
    assert few == photos("few/train") and len(few) == len(held_out) == 10 and not few & held_out
    test_photos = {str(path) for path in pictures.glob("val/*/*")}
    assert photos("few/val") == photos("all/val") == test_photos
    assert photos("all/train") == {str(path) for path in pictures.glob("train/*/*")}
    assert data.link_splits(str(pictures), str(tmp_path)) == 40  # once more
    other = shutil.copytree(pictures, tmp_path / "other")
    refused("is of other photos", data.link_splits, str(other), str(tmp_path))
    photo = sorted(other.glob("train/*/*"))[0]
    (photo.parent / "more").mkdir()
    shutil.copy(photo, photo.parent / "more")
    again = str(tmp_path / "again")
    refused("two photos have the same name", data.link_splits, str(other), again)
    shutil.rmtree(other / "val" / photo.parent.name)
    refused("different classes", data.link_splits, str(other), again)

def test_cifar10_as_files_and_a_missing_folder(tmp_path, monkeypatch):
    photos = datasets.FakeData(8, (3, 8, 8), num_classes=2)
    photos.classes = ["cat", "dog"]
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **options: photos)
    assert data.link_splits(data.cifar10(str(tmp_path)), str(tmp_path / "out")) == 8
    options = ["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]
    says = "should hold a folder of images for each class"
    fails(study.main, [*options, "--teacher", "new"], says)

def test_attention_on_a_cpu_is_the_usual():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 17, 8, dtype=torch.float64)
    usual = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    same(data.attention(q, k, v), usual, atol=1e-12)
    data.set_up_cpu()
    vit, images = ViT(**SMALL), torch.randn(1, 3, 32, 32)
    with patch("math.sqrt", return_value=1.0):  # it is this attention that runs
        changed = vit(images)
    assert not changed.allclose(vit(images))

def test_tables_compare_with_the_first_row(capsys):
    found = {"few/--relations qk vv/0": 70.0, "few/--relations qk vv/1": 72.0, "few//0": 73.0,
             "few/--target cls/0": 60.0, "few/--target cls --mae/0": 99.0}
    study.print_tables({key: {"top1": value} for key, value in found.items()}, ["T8"])
    lines = capsys.readouterr().out.splitlines()[3:]
    rows = dict(line.strip("| ").partition(" | ")[::2] for line in lines)
    assert rows["relation (qk vv)"] == "75.8 | 71.0 ± 1.4"
    assert rows["relation (qq kk vv)"] == " | 73.0 (+3.0)"  # of seed 0
    assert rows["class token"] == "70.6 (-5.2) | 60.0 (-10.0)"
    seeds = {"few/mae/0": dict(epochs=1), "few/mae/1": dict(epochs=3)}
    refused("seeds of few/mae differ in epochs: .1, 3.", data.of_seeds, seeds, "few", "mae")

def test_only_small_photos_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tinymim, "decode", Mock(side_effect=tinymim.decode))
    counted = tinymim.decode
    data.keep_small_photos()
    for size, decoded in ((64, 1), (65, 2)):
        Image.new("RGB", (size, 64), "red").save(tmp_path / f"{size}.png")
        for _ in range(2):
            assert tinymim.decode(tmp_path / f"{size}.png").shape == (3, 64, size)
        assert counted.call_count == decoded
        counted.reset_mock()

def test_rows_of_one_method_share_their_rates():
    assert all(study.method_of(spec) == name for name, (spec, _) in study.METHODS.items())
    for spec in ("--teacher assistant", "--relations qk vv"):
        assert study.method_of(spec) == "relation"
    for name, (_, best) in study.METHODS.items():
        tries = study.rates_to_try(name, {}, 1)
        assert best in tries and len(set(tries)) == (3 if name == "teacher" else 8)
        assert study.best_rates(name, {}) == best
    found = {f"tune/feature/{a:g} {b:g}": {"top1": 61.0 if a == b else 60.0}
             for a, b in study.rates_to_try("feature", {}, 1)[1:]}
    assert study.best_rates("feature", found) == (0.016, 0.008)  # --tune is not finished
    found["tune/feature/0.004 0.004"] = {"top1": 59.0}
    assert study.best_rates("feature", found) == (0.008, 0.008)
    longer = study.rates_to_try("feature", found, 10)
    assert longer == [(0.008, 0.008), (0.004, 0.008), (0.016, 0.008)]

def test_a_result_of_other_settings_is_not_taken_for_this_ones(tmp_path):
    shutil.copy(os.path.join(data.ROOT, "assets", "cifar10.json"), tmp_path / "results.json")
    options = ["--smallest", "--tables", "T8", "--out", str(tmp_path)]
    fails(study.main, [*options, "--teacher", data.CIFAR10_TEACHER],
          "results.json has few/", ": choose another --out")

def test_every_row_of_the_study_works(tmp_path):
    """At its smallest, two side by side. What is finished is not run again."""
    first = script("study.py", "--smallest", "--jobs", 2, "--out", tmp_path)
    again = script("study.py", "--smallest", "--out", tmp_path)
    rows = [line for line in again.splitlines() if line.startswith("| ")]
    assert len(rows) == len(study.ROWS) + len({row[0] for row in study.ROWS})
    assert rows == [line for line in first.splitlines() if line.startswith("| ")]
    assert all(top1.strip() for row in rows for top1 in row.split("|")[3:5])  # no number missing
    assert "epoch 1 " in first and "epoch 1 " not in again.split("| T8")[0].split("results in")[-1]
    # One after the other, rows give the same: they see the same crops.
    script("study.py", "--smallest", "--tables", "end", "--out", tmp_path / "alone")
    beside = data.results(tmp_path / "results.json")
    alone = data.results(tmp_path / "alone" / "results.json")
    assert len(alone) == 10 and alone.items() <= beside.items()
    checkpoint = "relations-qk-vv-epochs-10-seed0-0.016/pretrain/last.pth"
    losses = [tinymim.load_file(folder / checkpoint)["history"][-1]["loss"]
              for folder in (tmp_path, tmp_path / "alone")]
    assert losses[0] == losses[1]

def test_kept_crops_are_those_of_the_dataset(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.KeptDataset, "folder", str(tmp_path))
    paths, labels, _ = finetune.read_folder(pictures / "train")
    crop = tinymim.crop_and_flip(16)
    plain = ImageDataset(paths, crop, 3, labels)
    for epoch in range(2):
        parallel.make_epoch((parallel.KeptDataset(paths, crop, 3), epoch))
    for kept in parallel.KeptDataset(paths, crop, 3, labels), parallel.KeptDataset(paths, crop, 3):
        for key in (0, 1, len(paths) + 1, 0):  # in two epochs, and back in the first
            same(kept[key][0], plain[key][0], atol=0)
            assert kept[key][1:] == plain[key][1:][:len(kept[key]) - 1]
    assert len(list(tmp_path.iterdir())) == 2
    changed = [parallel.KeptDataset(paths, crop, 4), parallel.KeptDataset(paths[:9], crop, 3)]
    os.utime(paths[0])
    for other in [*changed, parallel.KeptDataset(paths, crop, 3)]:
        assert not os.path.exists(other.path(0))

def killed(_):
    os.kill(os.getpid(), 9)

def fails_or_waits(number):
    if number == 0:
        sys.exit("a full disk")  # as a script's main() does
    time.sleep(600)

def test_processes_that_are_killed_or_fail(tmp_path):
    def run(function):
        return list(parallel.in_processes(function, [0, 1], 2, str(tmp_path), tmp_path / "log"))

    refused("a process was killed", run, killed)
    refused("a full disk", run, fails_or_waits, error=SystemExit)  # at once
    assert not multiprocessing.active_children()

def test_the_studys_teacher():
    path = os.path.join(os.path.dirname(HERE), "assets", "cifar10_teacher.pth")
    assert path == data.CIFAR10_TEACHER and os.path.getsize(path) < 6e6
    config = dict(dim=192, depth=6, heads=6, patch_size=4, img_size=32, relation_heads=None)
    assert tinymim.load_teacher(path).config == config
    fails(study.main, ["--data", "mine"], "--teacher new trains one on these photos")

def test_content_is_what_the_photo_explains():
    """Of a relation that is the same in all photos nothing, of one with a constant mean map all."""
    torch.manual_seed(0)
    vit, photos = ViT(**SMALL), torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    same_photos = photos[:1].expand(6, -1, -1, -1)
    for share in content.explained(vit, same_photos).values():
        assert share == pytest.approx(0, abs=1e-4)
    found = content.explained(vit, photos)
    q, k, v = vit.qkv_at(tinymim.normalize(photos / 255), 3)
    maps = tinymim.log_relation(q, k, 2).exp().double().detach()  # as written
    total = maps.transpose(0, 1).transpose(1, 2).flatten(2).var(2, unbiased=False)
    constant = maps.mean(0).var(2, unbiased=False)
    assert found[3, "qk"] == pytest.approx((1 - constant / total).mean().item(), rel=1e-5)
    assert len(found) == 3 * 4 and all(0 < share < 1 for share in found.values())

def test_content_of_photos_of_any_size(pictures, tmp_path, capsys):
    content.main(["--data", str(pictures), "--json", str(tmp_path / "shares.json")])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 6 | ") for line in lines) == 2
    shares = data.results(tmp_path / "shares.json")
    assert len(shares) == 2 * 6 * 4 and all(0 < share < 1 for share in shares.values())

def test_the_demos_teacher_and_its_pictures(tmp_path):
    path = os.path.join(os.path.dirname(HERE), "assets", "shapes_teacher.pth")
    assert os.path.getsize(path) < 3e6
    teacher = tinymim.load_teacher(path)
    assert teacher.config == dict(dim=128, depth=6, heads=4, patch_size=6, img_size=36,
                                  relation_heads=None)
    for name in ("a", "b"):
        script("shapes.py", tmp_path / name, "--train", 20, "--val", 10)
    drawn = sorted((tmp_path / "a").rglob("*.png"))
    assert len(drawn) == 30 and len({picture.parent.name for picture in drawn}) == 10
    for path in drawn:
        again = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == again.read_bytes()

def test_the_demo_and_its_figures(tmp_path, monkeypatch, capsys):
    """With few pictures: all four rows, and what is drawn of them."""
    import demo
    few = {name: (count // 40, *more) for name, (count, *more) in demo.PICTURES.items()}
    monkeypatch.setattr(demo, "PICTURES", few)
    demo.main(["--out", str(tmp_path / "demo")])
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in demo.STARTS) and "finished" not in printed
    assert Image.open(tmp_path / "demo" / "demo.png").size == (1200, 560)
    fails(demo.main, ["--out", str(tmp_path / "demo")], "exists: delete it")
    pytest.importorskip("matplotlib")
    run = tmp_path / "demo" / "distilled-0"
    tuned = tmp_path / "demo" / "distilled-0-finetuned"
    script("figures.py", "--run", run, "--method", "--log", run, tuned, "--out", tmp_path,
           "--results", os.path.join(os.path.dirname(HERE), "assets", "cifar10_relations.json"))
    assert "</svg>" in (tmp_path / "lengths.svg").read_text()
    assert Image.open(tmp_path / "curves.png").size == (1600, 600)  # losses, and accuracy
    assert "</svg>" in (tmp_path / "method.svg").read_text()
    assert Image.open(tmp_path / "relations.png").size[0] > 800

# ---- Robustness ---------------------------------------------------------------------------------

def test_robustness_on_folders_with_known_answers(tmp_path, capsys):
    """A classifier that always says "b", or "a" where b is not among the classes."""
    model = finetune.Classifier(12, 1, 2, num_classes=3, patch_size=8, img_size=16)
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([1.0, 2.0, 0.0])
    config = model.config | {"classes": ["a", "b", "c"]}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "x.pth")
    torch.save(model.state_dict(), tmp_path / "bare.pth")

    def write(folder, counts):
        for name, count in counts.items():
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20)).save(tmp_path / folder / name / f"{i}.png")

    write("imagenet", {"a": 1, "b": 3, "c": 4})
    write("imagenet-a", {"a": 1, "c": 3})  # among a and c it says a
    write("other", {"a": 1, "d": 1})
    for severity in range(1, 6):
        write(f"imagenet-c/snow/{severity}", {"b": severity, "c": 6 - severity})  # errors: half
        write(f"imagenet-c/fog/{severity}", {"b": 1, "c": 3})
    common = ["--device", "cpu", "--workers", "0", "--batch-size", "3"]
    common += [f"--{name}={tmp_path / name}" for name in ("imagenet", "imagenet-a", "imagenet-c")]
    robustness.main(["--checkpoint", str(tmp_path / "x.pth"), *common, "--imagenet-r", "nowhere"])
    printed = capsys.readouterr().out
    mce = 100 * (50 / 86.6816 + 75 / 81.9324) / 2  # Hendrycks and Dietterich's: over AlexNet's
    result = f"| 37.5 | 25.0 | - | 62.5 | {mce:.1f} |\n\n-C has 2 of its 15 corruptions\n"
    assert f"x.pth {result}" in printed
    assert "imagenet-a: 2 of the 3 classes" in printed and "imagenet: " not in printed
    assert "snow: error 50.0%" in printed and "fog: error 75.0%" in printed
    assert "Table 4 calls its last column mCE, but it is most probably the\nmean error" in printed
    left_out = printed.split("left out: ")[1]
    assert "nowhere" in left_out and "gaussian_noise" in left_out and "snow" not in left_out
    assert len(robustness.ALEXNET) == 15

    bare = ["--checkpoint", str(tmp_path / "bare.pth"), "--heads", "2", *common]
    fails(robustness.main, bare, "--class-names FOLDER")
    fails(robustness.main, [*bare, f"--class-names={tmp_path}/imagenet-a"], "of which 2 are known")
    robustness.main([*bare, f"--class-names={tmp_path}/imagenet"])
    printed = capsys.readouterr().out
    assert f"bare.pth {result}" in printed and "left out: --imagenet-r, " in printed
    fails(robustness.main, [*bare, f"--class-names={tmp_path}/imagenet",
                            f"--imagenet={tmp_path}/other"], "has the class d")
    robustness.main([*bare[:-3], f"--class-names={tmp_path}/imagenet"])
    assert "bare.pth | - | - | - | - | - |\n\n-C has 0" in capsys.readouterr().out

def test_robustness_has_only_options_that_do_something(teacher_file, capsys):
    refused("^2$", robustness.main, ["--checkpoint=x", "--epochs=3"], error=SystemExit)
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err
    fails(robustness.main, ["--checkpoint", str(teacher_file), "--device", "cpu"], "has no head")

# ---- Fine-tuning with distillation --------------------------------------------------------------

def test_the_size_of_tinymim_star():
    """About 5.8 M parameters without the heads, and 1.3 GFLOP (multiply-adds), as in the paper."""
    model = finetune_distilled.DistilledClassifier(192, 12, 12, star_dim=1280)
    heads = sum(p.numel() for head in (model.head, model.head_dist) for p in head.parameters())
    parameters = sum(p.numel() for p in model.parameters()) - heads
    assert parameters == pytest.approx(5.8e6, rel=0.01)
    spelt_out = sdpa_kernel(SDPBackend.MATH)  # which the counter understands on a CPU, too
    with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert counter.get_total_flops() / 2 == pytest.approx(1.3e9, rel=0.05)

def test_timm_agrees_with_two_heads():
    """timm's distillation token has a position embedding, which is 0 here."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = finetune_distilled.DistilledClassifier(192, 12, 3).eval()
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    weights, place = ours.state_dict(), ours.pos_embed.detach()
    weights["pos_embed"] = torch.cat([place[:, :1], 0 * place[:, :1], place[:, 1:]], dim=1)
    theirs.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_both_heads(soft, monkeypatch):
    torch.manual_seed(0)
    model = finetune_distilled.DistilledClassifier(12, 2, 2, 5, patch_size=8, img_size=16)
    model.config["classes"] = [*"abcde"]
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(head.weight)
    teacher = finetune.Classifier(12, 1, 2, 5, patch_size=8, img_size=16)
    torch.nn.init.normal_(teacher.head.weight)
    monkeypatch.setattr(finetune_distilled, "load_label_teacher",
                        lambda *asked: asked == ("x", [*"abcde"], 16) and teacher)
    options = dict(label_teacher="x", augment="crop", alpha=0.3, soft=soft, temperature=2.0)
    objective = finetune_distilled.DistilledSupervised(model, argparse.Namespace(**options))
    images, labels = torch.randn(3, 3, 16, 16), torch.rand(3, 5).softmax(-1)
    losses = objective.train()(images, labels)
    assert not objective.teacher.training and objective.student.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    one, two = model.both(images)
    torch.testing.assert_close(model(images), (one + two) / 2)
    expected = -0.7 * (labels * one.log_softmax(1)).sum(1).mean()
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
    main = finetune_distilled.main
    common = ["--data", str(pictures), "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    finetune.main(["--checkpoint", str(teacher_file), "--epochs", "1", *common, "--out",
                   str(tmp_path / "teacher")])
    options = ["--checkpoint", str(teacher_file), *common, "--star", "--heads=2", "--epochs=2"]
    taught = [*options, "--label-teacher", str(tmp_path / "teacher" / "last.pth")]
    main([*taught, "--out", str(tmp_path / "run")])
    assert "learnt with 4 heads and goes on with 2" in capsys.readouterr().out
    saved, last = load(tmp_path / "run"), str(tmp_path / "run" / "last.pth")
    assert saved["config"]["star_dim"] == 1280 and saved["config"]["heads"] == 2
    assert not any("teacher" in name.split(".") for name in saved["objective"])
    assert list(saved["history"][1])[:3] == ["epoch", "labels", "distilled"]
    stopped(main, [*taught, "--out", str(tmp_path / "again")], epoch=2)
    main([*taught, "--out", str(tmp_path / "again"), "--resume"])
    same(load(tmp_path / "again")["model"], saved["model"])

    torch.save(saved["model"], tmp_path / "bare.pth")  # tells neither classes nor heads
    top1 = saved["history"][1]["top1"]
    evaluation = ["--eval", *common, "--checkpoint"]
    fails(main, [*evaluation, str(tmp_path / "bare.pth")], "--class-names FOLDER")
    fails(main, [*evaluation, str(teacher_file)], "has no head")
    fails(finetune.main, [*evaluation, last], "extras/finetune_distilled.py evaluates it")
    capsys.readouterr()
    for more in ([last], [str(tmp_path / "bare.pth"), "--heads", "2", "--class-names",
                          str(pictures / "train")]):
        main([*evaluation, *more])
        assert f"top-1 {top1:.3f}%" in capsys.readouterr().out
    robustness.main(["--checkpoint", last, "--device", "cpu", "--workers", "0", "--imagenet",
                     str(pictures / "val")])
    assert f"last.pth | {top1:.1f} |" in capsys.readouterr().out
    (tmp_path / "some").mkdir()
    for name in sorted(os.listdir(pictures / "val"))[:3]:
        os.symlink(pictures / "val" / name, tmp_path / "some" / name)
    fails(main, [*evaluation, last, "--data", str(tmp_path / "some")], "extras/robustness.py")

    for teacher, says in ((str(teacher_file), "is neither"), (last, "is neither"),
                          ("nothing", "no file nothing"), ("resnet18", "ImageNet's 1000 classes")):
        fails(main, [*options, "--label-teacher", teacher, "--out", str(tmp_path / "other")], says)

def test_a_label_teacher_of_torchvision(monkeypatch):
    asked = []
    get_model = lambda name, weights: asked.append((name, weights.meta["num_params"])) or "network"
    monkeypatch.setattr(finetune_distilled.torchvision.models, "get_model", get_model)
    classes = [f"n{i:08}" for i in range(1000)]
    assert finetune_distilled.load_label_teacher("regnet_y_16gf", classes, 224) == "network"
    assert asked == [("regnet_y_16gf", 83590140)]
    others = [f"class {i}" for i in range(1000)]
    refused("n01440764", finetune_distilled.load_label_teacher, "regnet_y_16gf", others, 224)
    no_network = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(finetune_distilled.torchvision.models, "get_model", no_network)
    says = "cannot download the weights of regnet_y_16gf .no route"
    refused(says, finetune_distilled.load_label_teacher, "regnet_y_16gf", classes, 224)

def test_the_recipe_of_tinymim_star():
    for options, expected in ((["--star"], dict(heads=12, epochs=1000)),
                              (["--star", "--heads=3", "--epochs=9"], dict(heads=3, epochs=9)),
                              ([], dict(heads=None, epochs=None)),
                              (["--star", "--eval"], dict(heads=None, out=None))):
        args = vars(args_of(finetune_distilled, "--checkpoint=runs/a/last.pth", *options))
        assert args | expected == args
        assert args["out"] == (None if args["eval"] else "runs/a-distilled")
        assert (args["alpha"], args["soft"], args["label_teacher"]) == (0.5, False, "regnet_y_16gf")
