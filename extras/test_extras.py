"""Tests of mae.py, targets.py, robustness.py and finetune_with_label_teacher.py: python -m pytest

MAE's golden numbers were computed in float64 by its authors' code, on weights that a formula fills.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import subprocess
import sys
from unittest.mock import Mock, patch

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import finetune
import finetune_with_label_teacher as label_teacher
import mae
import robustness
import shapes
import targets
import tinymim
from test_tinymim import (
    QUICK, SMALL, WIDER, args_of, fails, fill, filled, load, refused, same)
from test_tinymim import own_folder  # a fixture: every test has an empty folder
from tinymim import ViT, relation_loss

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # leaving torchvision

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

@pytest.mark.slow
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
        loss = objective.losses(images, noise)["pixel"]
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

def test_mae_sees_clean_crops_under_a_random_mask():
    objective = mae.MAE(ViT(**SMALL), 0.75, (16, 1, 2)).eval()
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    first, second = objective(crops), objective(crops)
    torch.manual_seed(0)
    same(first, objective.losses(tinymim.normalize(crops / 255), torch.rand(2, 16)))
    assert first != second

def test_masks_and_decoders_that_do_not_fit():
    for ratio, decoder, says in ((0, (16, 1, 2), "nothing"), (0.99, (16, 1, 2), "nothing"),
                                 (0.75, (24, 1, 5), "5 heads"), (0.75, (18, 1, 3), "by 4")):
        refused(says, mae.MAE, ViT(**SMALL), ratio, decoder, error=ValueError)

def test_maes_student_is_that_of_the_options(capsys):
    objective = mae.build(args_of(mae, "--student=small", "--depth=2", "--patch-size=32"))
    assert objective.student.config == ViT(384, 2, 6, 32).config
    assert not any(block.drop_path.p for block in objective.student.blocks)
    for option, says in (("--mask-ratio=1.5", "is not between"), ("--patch-size=0", "between"),
                         ("--teacher=mae_base", "unrecognized")):
        refused("^2$", mae.main, [option], error=SystemExit)
        assert says in capsys.readouterr().err

def test_mae_then_distillation_then_finetuning(pictures):
    """A teacher of one's own. A resumed run is the uninterrupted one, decoder and masks too."""
    common = [*QUICK, f"--data={pictures}"]
    pretrain = ["--dim=24", "--depth=3", "--heads=2", "--patch-size=8", "--img-size=32",
                *"--decoder 16 1 2 --blr=0.01 --warmup-epochs=0.5".split(), *common]
    mae.main([*pretrain, "--out=mae"])
    saved = load("mae")
    assert saved["history"][-1]["pixel"] < saved["history"][0]["pixel"]
    assert saved["model"].keys() == ViT(**SMALL).state_dict().keys()
    assert "decoder.pred.weight" in saved["objective"]
    assert saved["config"] == ViT(**SMALL).config | {"pretraining": "MAE"}
    stopped(mae.main, [*pretrain, "--out=again"], epoch=3)
    mae.main([*pretrain, "--out=again", "--resume"])
    same(load("again")["objective"], saved["objective"])

    tinymim.main([*common, "--student=nano", "--dim=12", "--heads=2", "--epochs=1", "--out=small",
                  "--teacher=mae/last.pth"])
    finetune.main([*common, "--checkpoint=small/last.pth", "--epochs=1", "--out=tuned"])
    assert load("tuned")["config"]["pretraining"] == "TinyMIM"

# ---- Other targets ------------------------------------------------------------------------------

def test_class_token():
    """KL between two softmaxes over channels, spelt out."""
    student, teacher, seen, clean = networks()
    objective = targets.ClassToken(student, teacher).double()
    mapped = student(seen)[:, 0] @ objective.map.weight.T + objective.map.bias
    p = teacher(clean)[:, 0].float().softmax(-1).double()
    q = mapped.float().softmax(-1).double()
    expected = (p * (p / q).log()).sum(-1).mean()
    assert objective.losses(seen, clean)["cls"].item() == pytest.approx(expected.item(), abs=1e-6)

@pytest.mark.parametrize("name", targets.FEATURES)
def test_features(name):
    """Smooth-L1 with beta 2 to what a block of the teacher makes, normalised, spelt out."""
    student, teacher, seen, clean = networks()
    objective = targets.Feature(student, teacher, name, 3).double()
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
    loss = objective.losses(seen, clean)["feature"]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)

@pytest.mark.parametrize("bf16", [False, True])
def test_relations_without_softmax(bf16):
    student, teacher, seen, clean = networks()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = targets.LogitRelation(student, teacher, 3, 4, ("qk", "vv")).losses(seen, clean)
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
    objective = targets.MaskedRelation(student, teacher, 3, 4, mask_ratio=0.5)
    torch.manual_seed(1)
    losses = objective.losses(seen, clean)
    torch.manual_seed(1)
    keep, _ = mae.random_mask(torch.rand(2, 16), 0.5)
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
    same(losses, relation_loss(*qkv, 4, objective.pairs))

@pytest.fixture
def options(pictures, teacher_file):
    """Of a distillation of half a second, into run/. Later ones overrule these."""
    return [*QUICK, "--student=nano", "--dim=24", "--heads=2", f"--teacher={teacher_file}",
            "--blr=0.02", f"--data={pictures}", "--out=run"]

KINDS = {"relation": "TinyMIM", "logit": "LogitRelation", "cls": "ClassToken"}
KINDS |= dict.fromkeys(targets.FEATURES, "Feature")
MAE = "--mae --decoder 16 1 2"

@pytest.mark.parametrize("target", [f"--target={name}" for name in KINDS] + [
    "--mask-ratio=0.5", f"--mask-ratio=0.5 {MAE}", f"--target=cls {MAE}"])
def test_every_target_trains(target, options):
    """From the command line. Relations alone leave the end of the last block as it was. The config
    says how the student was trained."""
    options += target.split()
    targets.main(options)
    saved, args = load("run"), args_of(targets, *options)
    assert saved["history"][-1]["loss"] < saved["history"][0]["loss"]
    names = {part for name in saved["objective"] for part in name.split(".")}
    assert "student" in names and "teacher" not in names
    start = targets.build(args).student.state_dict()
    changed = {name for name, tensor in saved["model"].items() if not tensor.equal(start[name])}
    end = {"blocks.3.mlp.fc1.weight", "blocks.3.attn.proj.bias", "norm.weight"}
    relations = args.target in targets.RELATIONS
    assert end & changed == (set() if relations and not args.mae else end)
    assert changed >= {"cls_token", "blocks.3.attn.qkv.weight"} and "pos_embed" not in changed
    kind = "MaskedRelation" if args.mask_ratio else KINDS[args.target]
    assert saved["config"]["pretraining"] == ("WithMAE" if args.mae else kind)
    assert saved["config"]["relation_heads"] == (4 if relations else None)

def test_a_resumed_run_with_another_target_is_the_uninterrupted_one(options):
    options += MAE.split()
    targets.main([*options, "--out=whole"])
    stopped(targets.main, options, epoch=3)
    options.append("--resume")
    targets.main(options)
    same(load("run")["objective"], load("whole")["objective"])
    for other in ("--target=logit", "--relation-heads=2", "--relation-heads=12"):
        name = other.split("=")[0].strip("-").replace("-", "_")
        fails(targets.main, [*options, other], f"has a run with {name} ")

def test_which_block_teaches(options):
    """That of the options. By default the last where the networks are as deep, else that at 3/4;
    for the output always the last."""
    for more, block in (("", 4), ("--depth=3", 3), ("--depth=3 --target=ffn", 3),
                        ("--depth=3 --target=output", 4), ("--target=ffn --teacher-block=2", 2),
                        ("--target=ffn --dim=32 --teacher-heads=3", 4)):  # no relation heads
        objective = targets.build(args_of(targets, *options, *more.split()))
        is_feature = isinstance(objective, targets.Feature)
        assert (objective.block if is_feature else objective.teacher_block) == block, more

@pytest.mark.parametrize("target", ["--target=logit", "--target=cls", "--target=output --mae"])
def test_the_teacher_is_in_eval_mode_and_drops_paths_only_if_asked(target, options):
    images = torch.randn(8, 3, 32, 32)
    for rate in (0, 0.3):
        args = args_of(targets, *options, f"--teacher-drop-path={rate}", *target.split())
        objective = targets.build(args).train()
        teacher = objective.teacher
        assert objective.student.training and not any(m.training for m in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert torch.equal(teacher(images), teacher(images)) == (rate == 0)

def test_what_targets_do_not_take(options, capsys):
    fails(targets.main, [*options, "--mask-ratio=1"], "leaves no relations")
    fails(targets.main, [*options, "--target=ffn", "--teacher-block=9"], "block 9: 1 to 4")
    tuned = finetune.Classifier(**WIDER)  # without a norm for its tokens
    torch.save({"model": tuned.state_dict(), "config": tuned.config}, "tuned.pth")
    fails(targets.main, [*options, "--teacher=tuned.pth", "--target=cls"], "tuned.pth has no norm")
    student = ViT(**WIDER, relation_heads=4)  # distilled by relations, as tinymim.py leaves it
    config = student.config | {"pretraining": "TinyMIM"}
    torch.save({"model": student.state_dict(), "config": config}, "distilled.pth")
    for name in ("output", "ffn", "cls"):
        fails(targets.main, [*options, "--teacher=distilled.pth", f"--target={name}"], "untrained")
    for more, says in (
        ("--mask-ratio=-0.1", "between"), ("--teacher-drop-path=1", "between"),
        ("--target=cls --mask-ratio=0.5", "effect"), ("--target=cls --teacher-block=1", "effect"),
        ("--target=ffn --relations qk", "effect"), ("--target=cls --relation-heads=4", "effect"),
        ("--target=logit --mask-ratio=0.5", "effect"), ("--decoder 16 1 2", "effect"),
    ):
        refused("^2$", targets.main, [*options, *more.split()], error=SystemExit)
        assert says in capsys.readouterr().err, more

# ---- Robustness ---------------------------------------------------------------------------------

def test_robustness_on_folders_with_known_answers(tmp_path, capsys):
    """A classifier that always says "b", or "a" where b is not among the classes."""
    model = finetune.Classifier(12, 1, 2, num_classes=3, patch_size=8, img_size=16)
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([1.0, 2.0, 0.0])
    config = model.config | {"classes": ["a", "b", "c"]}
    torch.save({"model": model.state_dict(), "config": config}, "x.pth")
    torch.save(model.state_dict(), "bare.pth")

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
    options = ["--device=cpu", "--workers=0", "--batch-size=3", "--imagenet=imagenet",
               "--imagenet-a=imagenet-a", "--imagenet-c=imagenet-c"]
    robustness.main(["--checkpoint=x.pth", *options])
    refused("^2$", robustness.main, ["--checkpoint=x.pth"], error=SystemExit)
    printed = capsys.readouterr().out
    mce = 100 * (50 / 86.6816 + 75 / 81.9324) / 2  # Hendrycks and Dietterich's: over AlexNet's
    result = f"| 37.5 | 25.0 | - | 62.5 | {mce:.1f} |\n\n-C has 2 of its 15 corruptions\n"
    assert f"x.pth {result}" in printed
    assert "imagenet-a: 2 of the 3 classes" in printed and "imagenet: " not in printed
    assert "snow: error 50.0%" in printed and "fog: error 75.0%" in printed
    assert "gaussian_noise: left out" in printed and "snow: left out" not in printed

    bare, names = ["--checkpoint=bare.pth", "--heads=2", *options], "--class-names=imagenet"
    robustness.main([*bare, names])
    assert f"bare.pth {result}" in capsys.readouterr().out
    fails(robustness.main, bare, "--class-names FOLDER")
    fails(robustness.main, [*bare, "--class-names=imagenet-a"], "of which 2 are known")
    fails(robustness.main, [*bare, names, "--imagenet=other"], "has the class d")
    # It knows its classes: others would give numbers, too.
    fails(robustness.main, ["--checkpoint=x.pth", *options, names], "x.pth names its classes")
    torch.save(ViT(**SMALL).state_dict(), "student.pth")
    fails(robustness.main, ["--checkpoint=student.pth", *options], "has no head")
    for option, says in (("--epochs=3", "unrecognized"), ("--imagenet=gone", "no folder gone")):
        refused("^2$", robustness.main, [*bare, option], error=SystemExit)
        assert says in capsys.readouterr().err

# ---- Fine-tuning with a label teacher -----------------------------------------------------------

def test_the_size_of_tinymim_star():
    """8.3 M parameters, 5.8 M without the heads, whose width is ours; and 1.3 GFLOP
    (multiply-adds), as in the paper."""
    model = label_teacher.DistilledClassifier(192, 12, 12, star_dim=1280)
    parameters = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for head in (model.head, model.head_dist) for p in head.parameters())
    assert (parameters, parameters - heads) == pytest.approx((8.3e6, 5.8e6), rel=0.01)
    spelt_out = sdpa_kernel(SDPBackend.MATH)  # which the counter understands on a CPU, too
    with FlopCounterMode(display=False) as counter, torch.no_grad(), spelt_out:
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert counter.get_total_flops() / 2 == pytest.approx(1.3e9, rel=0.05)

def test_timm_agrees_with_two_heads():
    """timm's distillation token has a position embedding, which is 0 here."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = label_teacher.DistilledClassifier(192, 12, 3).eval()
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    weights, place = ours.state_dict(), ours.pos_embed.detach()
    weights["pos_embed"] = torch.cat([place[:, :1], 0 * place[:, :1], place[:, 1:]], dim=1)
    theirs.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_of_both_heads(soft):
    torch.manual_seed(0)
    model = label_teacher.DistilledClassifier(12, 2, 2, 5, patch_size=8, img_size=16)
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(head.weight)
    teacher = finetune.Classifier(12, 1, 2, 5, patch_size=8, img_size=16)
    torch.nn.init.normal_(teacher.head.weight)
    options = argparse.Namespace(augment="crop", alpha=0.3, soft=soft, temperature=2.0)
    objective = label_teacher.DistilledSupervised(model, teacher, options).train()
    images, labels = torch.randn(3, 3, 16, 16), torch.rand(3, 5).softmax(-1)
    losses = objective.losses(images, labels)
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

def test_finetuning_with_a_label_teacher(pictures, teacher_file, capsys):
    """Train, resume, evaluate; the teacher is not saved, and no other one is taken for it."""
    main, val = label_teacher.main, pictures / "val"
    common = [*QUICK[1:], f"--data={pictures}"]
    options = [f"--checkpoint={teacher_file}", *common, "--epochs=2"]
    finetune.main([*options, "--out=teacher"])
    options += ["--star", "--heads=2", "--label-teacher=teacher/last.pth"]
    main([*options, "--out=whole"])
    assert "learnt with 4 heads and goes on with 2" in capsys.readouterr().out
    saved = load("whole")
    assert saved["config"]["star_dim"] == 1280 and saved["config"]["heads"] == 2
    assert not any("teacher" in name.split(".") for name in saved["objective"])
    assert list(saved["history"][1])[:3] == ["epoch", "labels", "distilled"]
    stopped(main, [*options, "--out=run"], epoch=2)
    main([*options, "--out=run", "--resume"])
    same(load("run")["model"], saved["model"])

    torch.save(saved["model"], "bare.pth")  # tells neither classes nor heads
    top1 = saved["history"][1]["top1"]
    evaluation, names = [*common, "--eval"], f"--class-names={val}"
    capsys.readouterr()
    for more in (["--checkpoint=run/last.pth"], ["--checkpoint=bare.pth", "--heads=2", names]):
        main([*evaluation, *more])
        assert f"top-1 {top1:.3f}%" in capsys.readouterr().out
    robustness.main(["--checkpoint=run/last.pth", "--device=cpu", f"--imagenet={val}"])
    assert f"last.pth | {top1:.1f} |" in capsys.readouterr().out
    last = [*evaluation, "--checkpoint=run/last.pth"]
    fails(main, [*evaluation, "--checkpoint=bare.pth"], "--class-names FOLDER")
    fails(main, [*evaluation, f"--checkpoint={teacher_file}"], "has no head")
    fails(main, [*last, names], "last.pth names its classes")
    fails(finetune.main, last, "extras/finetune_with_label_teacher.py evaluates it")
    for option in ("--temperature=2", "--class-names=x"):  # without --soft, without --eval
        refused("^2$", main, [*options, option], error=SystemExit)

    content = load("teacher")
    for name, factor in (("other", 2), ("nan", torch.nan)):
        content["model"]["cls_token"] *= factor
        torch.save(content, f"{name}.pth")
    for teacher, says in ((teacher_file, "is neither"), ("whole/last.pth", "is neither"),
                          ("nan.pth", "has NaN"), ("nothing", "no file nothing"),
                          ("resnet18", "ImageNet's 1000 classes")):
        fails(main, [*options, f"--label-teacher={teacher}", "--out=failed"], says)
    os.replace("other.pth", "teacher/last.pth")  # under the same name
    fails(main, [*options, "--out=run", "--resume"], "has a run with teacher_checksum")

def test_a_label_teacher_of_torchvision(monkeypatch):
    """Untrained here, as there may be no network to fetch its weights by."""
    models, classes = torchvision.models, [f"n{i:08}" for i in range(1000)]
    untrained = lambda name, weights: models.get_model_builder(name)()
    monkeypatch.setattr(models, "get_model", untrained)
    load_label_teacher = label_teacher.load_label_teacher
    teacher = load_label_teacher("squeezenet1_1", classes, 96)
    assert teacher(torch.zeros(2, 3, 96, 96)).shape == (2, 1000)
    refused("vit_b_32 does not take images of 96 pixels .*Wrong image height", load_label_teacher,
            "vit_b_32", classes, 96)
    others = [f"class {i}" for i in range(1000)]
    refused("n01440764", load_label_teacher, "regnet_y_16gf", others, 224)
    monkeypatch.setattr(models, "get_model", Mock(side_effect=OSError("no route to host")))
    says = "cannot download the weights of regnet_y_16gf .*no route"
    refused(says, load_label_teacher, "regnet_y_16gf", classes, 224)

def test_the_recipe_of_tinymim_star():
    for options, expected in (("--star", (12, 1000)), ("--star --heads=3 --epochs=9", (3, 9)),
                              ("--batch-size=8", (None, None))):  # those of finetune.py
        args = args_of(label_teacher, "--checkpoint=runs/a/last.pth", *options.split())
        assert (args.heads, args.epochs) == expected
