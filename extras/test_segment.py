"""Tests of segment.py: python -m pytest extras/test_segment.py

The golden numbers are from the logs of the authors' segmentation of TinyMIM-B and TinyMIM*-T: their
learning rates, and the modules that they print.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks PyTorch for a GPU
os.environ["OMP_NUM_THREADS"] = "1"

import colorsys
import functools
import http.server
import math
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import finetune_with_label_teacher as label_teacher
import segment
import shapes
import tinymim
from test_extras import script, teacher_file  # the second is a fixture
from test_tinymim import SMALL, args_of, fails, load, refused, same
from test_tinymim import own_folder  # a fixture: every test has an empty folder
from tinymim import ViT

TINY = SMALL | dict(num_classes=5, channels=8)  # a Segmenter that a test can train

def draw(folder, training, validation):
    """Photos and label maps of shapes, 32 pixels wide."""
    shapes.write_segmentation(folder, "training", training, seed=1, size=32)
    shapes.write_segmentation(folder, "validation", validation, seed=2, size=32)

def built(checkpoint, *options):
    """What segment.py builds from a checkpoint, 512 pixels wide."""
    few = f"--checkpoint={checkpoint}", "--num-classes=5", "--channels=8", "--drop-path=0"
    args = args_of(segment, *few, *options)
    return segment.build(args, segment.finetune.settle(args))

def randomize(model):
    """Give values to what starts without effect, and to the statistics of batch norms."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("_table", "gamma_1", "gamma_2", "running_mean")):
            tensor.normal_()
    return model

# ---- Model --------------------------------------------------------------------------------------

@pytest.mark.parametrize("others, expected", [
    (1, [[11, 9, 9, 9, 9],
         [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]),
    (2, [[14, 12, 12, 12, 12, 12],
         [13, 11, 9, 9, 9, 9],
         [13, 10, 4, 3, 1, 0], [13, 10, 5, 4, 2, 1], [13, 10, 7, 6, 4, 3], [13, 10, 8, 7, 5, 4]]),
])
def test_the_order_of_the_bias_table_by_hand(others, expected):
    """2 x 2 patches. A table of its own row numbers shows which row each pair of tokens has."""
    attention = segment.Attention(4, 2, grid=2, others=others)
    table = attention.relative_position_bias_table
    assert not table.any() and table.shape == (9 + 3 * others, 2)
    table.data = torch.arange(len(table))[:, None] + torch.tensor([0.0, 100.0])
    bias = attention.bias()
    assert bias[0].tolist() == expected
    assert torch.equal(bias[1], bias[0] + 100)

@pytest.mark.parametrize("others", [1, 2])
def test_attention_with_bias_spelt_out(others):
    torch.manual_seed(0)
    attention = segment.Attention(12, 3, grid=3, others=others).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, others + 9, 12, dtype=torch.float64)
    heads = []
    for head in range(3):
        q, k, v = (attention.qkv(x)[:, :, i * 12 + head * 4:][:, :, :4] for i in range(3))
        weights = (q @ k.transpose(1, 2) / 2 + attention.bias()[head]).softmax(-1)
        heads.append(weights @ v)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=2)))
    attention(x).square().sum().backward()
    assert attention.relative_position_bias_table.grad.abs().min() > 0  # all rows are in use

def test_bias_and_layer_scale_start_without_effect():
    torch.manual_seed(0)
    block, plain = segment.Block(24, 2, grid=4, others=1), tinymim.Block(24, 2)
    new = "attn.relative_position_bias_table", "gamma_1", "gamma_2"
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if n not in new})
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(block(x), plain(x))
    randomize(block)
    y = x + block.gamma_1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.gamma_2 * block.mlp(block.norm2(y)))
    assert (block(x) - plain(x)).abs().max() > 0.1

@pytest.mark.filterwarnings("ignore")
def test_one_graph():
    """torch.compile takes all of the objective at once."""
    torch.manual_seed(0)
    model = randomize(segment.Segmenter(**TINY | {"depth": 2}, distilled=True, star_dim=40))
    objective = segment.Supervised(model.eval())
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 5, (2, 32, 32))
    expected = objective(crops, labels)
    sum(expected.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())  # nothing is unused
    model.zero_grad()
    torch._dynamo.reset()
    losses = torch.compile(objective, fullgraph=True, backend="eager")(crops, labels)
    sum(losses.values()).backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, gradients)

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_attention_is_the_same():
    torch.manual_seed(0)
    attention = randomize(segment.Attention(24, 2, grid=4, others=2))
    x = torch.randn(2, 18, 24)
    torch._dynamo.reset()
    for function in (attention, torch.compile(attention, fullgraph=True)):
        attention.zero_grad()
        result = function(x)
        result.square().sum().backward()
        results = {name: p.grad.clone() for name, p in attention.named_parameters()} | {"": result}
        if function is attention:
            expected = results
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)

def test_sizes_and_initial_values():
    """As the modules in the authors' logs say; TinyMIM*-T's second token has no position here."""
    with torch.device("meta"):
        base = segment.Segmenter(768, 12, 12)
        star = segment.Segmenter(192, 12, 12, distilled=True, star_dim=1280)
    assert sum(p.numel() for p in base.parameters()) == 163_877_228
    assert sum(p.numel() for p in star.parameters()) == 87_343_324 - 192
    assert base.taps == star.taps == [4, 6, 8, 12]

    torch.manual_seed(0)
    model = segment.Segmenter(**SMALL | dict(num_classes=50, channels=64))
    for layer in (model.decoder.classify[1], model.auxiliary[2]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05) and not layer.bias.any()
    fuse = model.decoder.fuse[0].weight  # He et al.'s, by what leaves it
    assert fuse.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert [p.requires_grad for p in model.parameters()] == [True] * len([*model.parameters()])

def test_drop_path_grows():
    rates = [block.drop_path.p for block in segment.Segmenter(**TINY, drop_path=0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])

def test_four_feature_maps(teacher_file):
    model, images = built(teacher_file, "--img-size=64").eval(), torch.randn(1, 3, 64, 64)
    assert model.taps == [1, 2, 3, 4]
    with torch.no_grad():
        maps = model.features(images)
        assert [x.shape for x in maps] == [(1, 48, n, n) for n in (32, 16, 8, 4)]
        assert model(images).shape == (1, 5, 32, 32)
        x = model.blocks[1](model.blocks[0](model.embed(images)))  # the second map, spelt out
        x = model.neck[1](x[:, 1:].transpose(1, 2).reshape(1, 48, 8, 8))
    torch.testing.assert_close(maps[1], x)
    saved = load(teacher_file.parent, teacher_file.name)["model"]
    for name in ("mlp.fc1.weight", "attn.proj.weight", "attn.qkv.weight"):
        assert torch.equal(model.state_dict()[f"blocks.3.{name}"], saved[f"blocks.3.{name}"])

def test_the_loss_by_hand():
    """Ignored pixels count as 0 in the mean."""
    torch.manual_seed(0)
    model = segment.Segmenter(**TINY).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    labels[:, :9] = segment.IGNORED
    losses = segment.Supervised(model).losses(images, labels.to(torch.uint8))
    maps = model.features(images)
    for name, head, weight in (("main", model.decoder(maps), 1),
                               ("aux", model.auxiliary(maps[2]), 0.4)):
        logits = segment.resize(head, (32, 32)).log_softmax(1)
        right = logits.gather(1, labels.clamp(max=4)[:, None])[:, 0, 9:]
        expected = -weight * right.sum() / (2 * 32 * 32)
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)

# ---- TinyMIM*-T ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tables", [None, 32, 14])
def test_the_authors_star(tables, capsys):
    """A file under their names. Their log says that it has no bias tables. If it has, they are
    taken over, but for another grid than that of 512 pixels refused."""
    torch.manual_seed(0)
    vit = ViT(192, 12, 12)
    theirs = {name: t for name, t in vit.state_dict().items() if not name.startswith("norm.")}
    theirs |= {"pos_embed": torch.randn(1, 198, 192), "dist_token": torch.randn(1, 1, 192)}
    for name, shape in {"conv1x1.0.weight": (192,), "conv1x1.0.bias": (192,),
                        "conv1x1.1.weight": (1280, 192), "conv1x1.1.bias": (1280,),
                        "fc_norm.weight": (1280,), "fc_norm.bias": (1280,),
                        "head.weight": (9, 1280), "head_dist.weight": (9, 1280)}.items():
        theirs[name] = torch.randn(shape)
    for i in range(12 if tables else 0):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        theirs[name] = torch.randn((2 * tables - 1)**2 + 6, 12)
    torch.save({"model": theirs}, "star.pth")
    if tables == 14:
        refused("size mismatch for blocks.0.attn.relative_position", built, "star.pth")
        return
    model = built("star.pth")
    assert model.heads == model.blocks[3].attn.heads == 12 and model.config["star_dim"] == 1280
    assert "12: this is TinyMIM*-T" in capsys.readouterr().out
    ours = model.state_dict()
    for name, tensor in theirs.items():
        if name.startswith(("blocks.", "patch_embed.", "cls_token")):
            same(ours[name], tensor)
    for kind in ("weight", "bias"):
        same(ours[f"norm.{kind}"], theirs[f"conv1x1.0.{kind}"])
        same(ours[f"pre_head.0.{kind}"], theirs[f"conv1x1.1.{kind}"])
    positions = theirs["pos_embed"]
    same(ours["distillation_token"], theirs["dist_token"] + positions[:, 1:2])
    without = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    same(ours["pos_embed"], tinymim.resize_pos_embed(without, 32))
    assert [p.shape[:2] for p in model.neck.parameters() if p.ndim == 4] == [
        (192, 384), (384, 768), (192, 768), (768, 192), (768, 1280)]  # transposed: in, out
    if not tables:
        assert built("star.pth", "--heads=3").heads == 3

@pytest.mark.parametrize("star_dim", [0, 40])
def test_finetuned_with_a_distillation_token(star_dim):
    """The tokens are those of the classifier with a label teacher, up to its heads."""
    torch.manual_seed(0)
    classifier = label_teacher.DistilledClassifier(**SMALL, num_classes=7, star_dim=star_dim)
    torch.nn.init.normal_(classifier.norm.weight)
    torch.nn.init.normal_(classifier.dist_token)
    torch.save({"model": classifier.state_dict(), "config": classifier.config}, "c.pth")
    model = built("c.pth", "--img-size=32").eval()
    assert (model.heads, model.config["star_dim"], model.config["distilled"]) == (2, star_dim, True)
    images, coarsest = torch.randn(2, 3, 32, 32), []
    model.neck[3].register_forward_hook(lambda module, inputs, output: coarsest.append(inputs[0]))
    with torch.no_grad():
        assert model(images).shape == (2, 5, 16, 16)
        tokens = classifier.eval().blocks(classifier.embed(images))
        if star_dim:
            tokens = classifier.pre_head(classifier.norm(tokens))
    torch.testing.assert_close(coarsest[0].flatten(2).transpose(1, 2), tokens[:, 2:])

def test_star_from_training_to_evaluation(capsys):
    """Also in bf16."""
    torch.manual_seed(0)
    classifier = label_teacher.DistilledClassifier(**SMALL, num_classes=7, star_dim=40)
    torch.save({"model": classifier.state_dict(), "config": classifier.config}, "c.pth")
    draw("data", 4, 2)
    common = "--data data --workers 0 --device cpu --amp bf16 ".split()
    segment.main([*common, *"--checkpoint c.pth --img-size 32 --iterations 2 --eval-every 1 --out "
                  "run --warmup-iterations 1 --batch-size 4 --num-classes 11 --channels 8".split()])
    saved = load("run")
    assert saved["args"]["layer_decay"] == 0.8 and saved["config"]["star_dim"] == 40
    assert saved["history"][1]["loss"] > 0
    capsys.readouterr()
    segment.main(["--eval", "--checkpoint=run/last.pth", *common])
    assert f"mIoU {saved['history'][1]['mIoU']:.2f}" in capsys.readouterr().out

# ---- Data ---------------------------------------------------------------------------------------

def hsv(image):
    """Pixels (3, H, W) in HSV."""
    return [colorsys.rgb_to_hsv(*pixel) for pixel in image.flatten(1).T.tolist()]

def test_the_parts_of_the_distortion():
    """Saturation and hue against Python's HSV. Black, white and gray have none to change."""
    torch.manual_seed(0)
    image = torch.rand(3, 10, 10)
    image[:, 0, :3] = torch.tensor([0.0, 1.0, 0.4])
    for factor in (0.5, 1.5):
        for before, after in zip(hsv(image), hsv(segment.saturate(image, factor))):
            expected = (before[0], min(1, before[1] * factor), before[2])
            if expected[1] == 0:
                expected = (0, 0, before[2])
            assert after == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(segment.saturate(image, 1.0), image)
    for turn in (-0.1, 0.05):  # 18 and 9 degrees of 180
        for before, after in zip(hsv(image), hsv(segment.adjust_hue(image, turn))):
            difference = (after[0] - before[0] - turn + 0.5) % 1 - 0.5
            assert abs(difference) < 1e-4 or before[1] == 0
            assert after[1:] == pytest.approx(before[1:], abs=1e-5)

def test_the_distortion_of_a_gray_image():
    """24.4 is the square root of 32²/6 + (100² + 32²/6) / 24: brightness by ±32 and contrast by
    ±50%, evenly, each with probability 1/2. torchvision's ColorJitter stays far below."""
    torch.manual_seed(0)
    gray = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    means = torch.stack([segment.distort(gray).float().mean() for _ in range(5000)])
    assert means.std().item() == pytest.approx(24.4, rel=0.03)
    assert means.mean().item() == pytest.approx(100, abs=1)
    assert (means == 100).float().mean().item() == pytest.approx(1 / 4, abs=0.02)
    amounts = dict(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=18 / 180)
    jitter = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: amount})], 0.5)
                         for name, amount in amounts.items()])
    assert torch.stack([jitter(gray).float().mean() for _ in range(500)]).std() < 6

def test_the_order_of_the_distortion(monkeypatch):
    """Brightness, saturation, hue; contrast is the second or the last. Each of them half the time,
    over its whole range."""
    calls = []
    def recorder(name):
        return lambda image, amount: calls[-1].append((name, amount)) or image
    for owner, function, name in ((torch, "add", "brightness"), (torch, "mul", "contrast"),
                                  (segment, "saturate", "saturation"),
                                  (segment, "adjust_hue", "hue")):
        monkeypatch.setattr(owner, function, recorder(name))
    torch.manual_seed(0)
    photo = torch.zeros(3, 1, 1, dtype=torch.uint8)
    for _ in range(2000):
        calls.append([])
        segment.distort(photo)
    monkeypatch.undo()
    for name, low, high in (("brightness", -32 / 255, 32 / 255), ("contrast", 0.5, 1.5),
                            ("saturation", 0.5, 1.5), ("hue", -18 / 180, 18 / 180)):
        amounts = torch.tensor([dict(call)[name] for call in calls if name in dict(call)])
        assert len(amounts) == pytest.approx(1000, abs=80)
        assert low <= amounts.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < amounts.max() <= high
        assert amounts.mean() == pytest.approx((low + high) / 2, abs=0.04 * (high - low))
    orders = [tuple(dict(call)) for call in calls if len(call) == 4]
    second, last = ("brightness", "contrast", "saturation", "hue"), (
        "brightness", "saturation", "hue", "contrast")
    assert set(orders) == {second, last}
    assert orders.count(second) / len(orders) == pytest.approx(0.5, abs=0.15)

def test_photo_and_labels_move_together(monkeypatch):
    """Boxes 40 levels bright for each label: so they remain, but at edges."""
    labels = torch.arange(5).repeat_interleave(20).expand(60, 100)
    photo = (40 * labels).to(torch.uint8).expand(3, -1, -1)
    monkeypatch.setattr(segment, "distort", lambda photo: photo)
    torch.manual_seed(0)
    sizes = set()
    for _ in range(40):
        pair = tv_tensors.Image(photo), tv_tensors.Mask(labels.to(torch.uint8))
        crop, label = segment.augment(*pair, 48)
        assert crop.shape == (3, 48, 48) and label.shape == (48, 48)
        known = label != segment.IGNORED
        sizes.add(known.sum().item())
        assert ((crop[0].int() - 40 * label.int()).abs() < 10)[known].float().mean() > 0.8
        assert label[known].bincount().max() <= 0.75 * known.sum()
        assert (crop[:, ~known].T == torch.tensor([124, 116, 104])).all()  # the padding is gray
        height, width = known.any(dim=1).sum(), known.any(dim=0).sum()
        assert known[:height, :width].all()  # it is on the right and below
    assert len(sizes) > 3  # crops of small scales are padded

def test_rescaling_is_that_of_opencv():
    assert segment.rescale(48)(torch.zeros(3, 60, 100)).shape == (3, 48, 80)
    assert segment.rescale(48)(torch.zeros(3, 10, 100)).shape == (3, 19, 192)  # the longer side
    row = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 70]).expand(1, 8, 8)
    # Not antialiased: the mean of the two columns in the middle of four.
    assert segment.rescale(2)(row)[0, 0].tolist() == [15, 55]

def test_photos_take_turns(monkeypatch):
    """An epoch shorter than the data: the next ones go on with the other photos."""
    draw(".", 8, 5)
    seen = []
    monkeypatch.setattr(segment, "augment", lambda photo, labels, size: (
        seen.append(labels.max().item()) or (photo, labels)))
    dataset = segment.SegmentationDataset(".", "training", 11, 32, items=3)
    for key in range(8):
        dataset[key]
    assert len(dataset) == 3 and set(seen) == set(range(1, 9))  # each photo has its own shape
    validation = segment.SegmentationDataset(".", "validation", 11, 48)
    photo, labels = validation[2]  # only the photo is rescaled
    assert len(validation) == 5 and photo.shape == (3, 48, 48) and labels.shape == (32, 32)

def test_the_key_seeds_a_photo():
    draw(".", 2, 1)
    first, again, other = (segment.SegmentationDataset(
        ".", "training", 11, 32, seed, items=4) for seed in (5, 5, 6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for key in range(4):
        same(first[key], again[key])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0][0], first[2][0])  # the same photo, later
    assert any(not torch.equal(first[key][0], other[key][0]) for key in range(4))

# ---- Evaluation ---------------------------------------------------------------------------------

def test_scores_by_hand_and_by_sets():
    truth = torch.tensor([0, 0, 0, 0, 1, 1, segment.IGNORED, segment.IGNORED])
    said = torch.tensor([0, 0, 0, 1, 1, 0, 0, 3])
    matrix = segment.confusion(said, truth, 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    result, iou = segment.scores(matrix)  # classes 2 and 3 do not occur: they do not count
    assert iou[:2] == pytest.approx([60, 100 / 3]) and all(math.isnan(x) for x in iou[2:])
    assert result == pytest.approx(
        {"mIoU": 140 / 3, "mean_accuracy": 62.5, "pixel_accuracy": 400 / 6})
    torch.manual_seed(0)
    pairs = [(torch.randint(5, (30, 20)), torch.randint(6, (30, 20))) for _ in range(3)]
    truths = [torch.where(truth == 5, segment.IGNORED, truth) for _, truth in pairs]
    matrix = sum(segment.confusion(said, truth, 5) for (said, _), truth in zip(pairs, truths))
    true = torch.cat(truths).flatten().tolist()
    said = torch.cat([x for x, _ in pairs]).flatten().tolist()
    for label in range(5):
        a = {i for i, x in enumerate(true) if x == label}
        b = {i for i, x in enumerate(said) if x == label and true[i] != segment.IGNORED}
        expected = 100 * len(a & b) / len(a | b)
        assert segment.scores(matrix)[1][label] == pytest.approx(expected)

@pytest.mark.parametrize("size", [(48, 48), (48, 100), (30, 70)])
def test_sliding_windows_cover_the_image(size):
    """A network that returns its input returns the image. Windows are as large as in training."""
    windows = []
    def network(images):
        windows.append(images.shape)
        return images
    image = torch.randn(3, *size)
    torch.testing.assert_close(segment.slide(network, image, 48, 31), image)
    assert windows == [(1 + math.ceil(max(size[1] - 48, 0) / 31), 3, 48, 48)]

# ---- Optimisation -------------------------------------------------------------------------------

def test_golden_learning_rates():
    """At an iteration of the logs, which count from 1: of the class token in TinyMIM-B's, of the
    distillation token in TinyMIM*-T's."""
    def rates(model, layer_decay, iteration):
        groups = segment.parameter_groups(model, 0.05, layer_decay)
        lr = segment.linear((iteration - 1) / 16000, 1e-4, 1500 / 16000, 10)
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: lr * group["lr_scale"] for group in groups for p in group["params"]}

    with torch.device("meta"):
        base = segment.Segmenter(768, 12, 12, channels=8)
        star = segment.Segmenter(192, 12, 12, channels=8, distilled=True, star_dim=1280)
    for iteration, expected in {100: 1.567e-07, 1500: 2.352e-06, 1550: 2.353e-06,
                                100300: 8.865e-07, 159950: 7.573e-10}.items():
        found = rates(base, 0.75, iteration)["cls_token"]
        assert found == pytest.approx(expected, rel=5e-4)
    for iteration, expected in {100: 6.596e-06, 1500: 9.900e-05, 1550: 9.903e-05,
                                100300: 3.731e-05, 159950: 3.188e-08}.items():
        found = rates(star, 0.8, iteration)["distillation_token"]
        assert found == pytest.approx(expected, rel=5e-4)
    assert segment.linear(0, 1e-4, 0.1, 10) == segment.linear(10, 1e-4, 0.1, 10) == 0
    assert segment.linear(0, 1e-4, 0, 10) == pytest.approx(0, abs=1e-12)

def test_parameter_groups():
    with torch.device("meta"):
        model = segment.Segmenter(192, 12, 12, channels=8, distilled=True, star_dim=1280)
    groups = segment.parameter_groups(model, 0.05, 0.8)
    names = {p: name for name, p in model.named_parameters()}
    options = {names[p]: (group["weight_decay"], round(math.log(group["lr_scale"], 0.8)))
               for group in groups for p in group["params"]}
    assert len(options) == sum(len(group["params"]) for group in groups) == len(names)
    for name, expected in {
        "cls_token": (0.05, 13), "pos_embed": (0.05, 13), "patch_embed.proj.weight": (0.05, 13),
        "patch_embed.proj.bias": (0, 13), "distillation_token": (0.05, 0),
        "blocks.0.attn.relative_position_bias_table": (0.05, 12), "blocks.0.gamma_1": (0, 12),
        "blocks.11.attn.qkv.weight": (0.05, 1), "blocks.11.norm1.weight": (0, 1),
        "norm.weight": (0, 0), "pre_head.0.weight": (0.05, 0), "neck.0.1.weight": (0, 0),
        "neck.2.weight": (0.05, 0), "decoder.fuse.0.weight": (0.05, 0),
        "decoder.classify.1.bias": (0, 0), "auxiliary.2.weight": (0.05, 0),
    }.items():
        assert options[name] == expected, name
    for name, (decay, _) in options.items():
        assert decay == 0.05 * (model.get_parameter(name).ndim > 1)

# ---- The command --------------------------------------------------------------------------------

@pytest.mark.slow
def test_segmentation_trains_resumes_and_evaluates(teacher_file, capsys, monkeypatch):
    """The same results on two processes."""
    draw("data", 8, 5)
    common = "--data data --workers 0 --device cpu".split()
    options = [f"--checkpoint={teacher_file}", *common, "--num-classes=11", "--channels=8",
               "--eval-every=8", "--warmup-iterations=2", "--batch-size=4", "--blr=0.3",
               "--img-size=32", "--iterations=16"]
    segment.main([*options, "--out=whole"])
    saved = load("whole")
    history = saved["history"]
    expected = [0.3 / 64 * (1 - x / 16) for x in (7, 15)]
    assert [record["lr"] for record in history] == pytest.approx(expected)
    assert history[1]["loss"] < history[0]["loss"]
    assert history[1]["main"] + history[1]["aux"] == pytest.approx(history[1]["loss"], rel=1e-5)
    assert Image.open("whole/segmentation.png").width > 3 * 256
    assert saved["args"]["layer_decay"] == 0.75
    start = load(teacher_file.parent, teacher_file.name)["model"]
    for name in ("cls_token", "pos_embed", "blocks.3.gamma_1", "blocks.0.attn.proj.weight",
                 "blocks.3.attn.relative_position_bias_table"):  # all of it learns
        before = start.get(name, torch.ones(48) if "gamma" in name else torch.zeros(()))
        assert (saved["model"][name] - before).abs().max() > 1e-6, name

    options += ["--out=part"]
    with monkeypatch.context() as patch:  # stopped in the second half, and continued
        results = iter([segment.scores(torch.eye(11))])
        patch.setattr(segment, "evaluate", lambda *_: next(results))
        refused(None, segment.main, options, error=StopIteration)
    options += ["--resume"]
    segment.main(options)
    continued = load("part")
    same(continued["model"], saved["model"])  # nothing changes
    assert continued["history"][1]["mIoU"] == history[1]["mIoU"]
    for change in ("--channels=4", "--layer-decay=0.7"):
        fails(segment.main, [*options, change], "has a run with")
    draw("data", 9, 0)
    fails(segment.main, options, "has a run with photos 8, not 9")

    capsys.readouterr()
    evaluation = ["--eval", "--checkpoint=whole/last.pth", *common]
    segment.main(evaluation)
    one = capsys.readouterr().out.splitlines()
    assert len(one) == 12 and one[0].startswith("class   1  IoU ")
    assert f"mIoU {history[1]['mIoU']:.2f}" in one[-1]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = script("segment.py", *evaluation, launcher=torchrun)
    assert printed.splitlines()[-12:] == one
    for option in ("--num-classes=5", "--img-size=64", "--out=x", "--layer-decay=1"):
        refused("^2$", segment.main, [*evaluation, option], error=SystemExit)
        assert "has no effect with --eval" in capsys.readouterr().err
    del saved["model"]["decoder.classify.1.weight"]  # a head with random weights has scores, too
    torch.save(saved, "whole/last.pth")
    fails(segment.main, evaluation, "whole/last.pth", "decoder.classify.1.weight")
    for other in (teacher_file, "none"):
        says = f"{other} is not a checkpoint of this script"
        fails(segment.main, [*evaluation, f"--checkpoint={other}"], says)

def test_the_recipe(monkeypatch, teacher_file):
    """1e-4 at batch 16, as published; and from scratch no layer decay."""
    fits = []
    monkeypatch.setattr(tinymim, "fit", lambda *fitted, **_: fits.append(fitted))
    draw(".", 2, 1)
    few = "--data . --img-size 32 --channels 8 --num-classes 11 --device cpu --checkpoint "
    segment.main(f"{few} {teacher_file} --out a".split())
    segment.main(f"{few} none --dim 24 --depth 3 --heads 2 --patch-size 8 --out b".split())
    _, dataset, _, args, _ = fits[0]
    assert args.blr * args.images_per_update / 256 == pytest.approx(1e-4)
    assert args.epochs * len(dataset) == 16 * 160000 and args.layer_decay == 0.75
    assert args.warmup_epochs / args.epochs == 1500 / 160000
    objective, _, _, args, _ = fits[1]
    scratch = objective.student.config
    assert scratch | SMALL == scratch and args.layer_decay == 1.0

def test_ade20k_is_downloaded_once_and_whole(tmp_path, monkeypatch):
    os.makedirs("zip/ADEChallengeData2016/images")
    archive = shutil.make_archive("ade", "zip", "zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(segment, "ADE20K", f"http://127.0.0.1:{server.server_port}/ade.zip")
        for _ in range(2):  # the second time without a download
            assert os.listdir(segment.ade20k("data")) == ["images"]
            assert os.listdir("data") == ["ADEChallengeData2016"]
            os.truncate(archive, 50)
        refused("cannot download .*/ade.zip .*zip file", segment.ade20k, "other")
        assert os.listdir("other") == []
        server.shutdown()

@pytest.mark.parametrize("options, says", [
    ("--img-size 30", "30 pixels by patches of 8"), ("--num-classes 2", "--num-classes 2"),
    ("--num-classes 256", "--num-classes"), ("--data nowhere", "nowhere"),
    ("--checkpoint x.txt", "cannot load"), ("--iterations 5 --eval-every 2", "multiple"),
    ("--epochs 3", "unrecognized"), ("--warmup-epochs 3", "unrecognized"),
    ("--augment strong", "unrecognized"), ("--teacher mae_base", "unrecognized"),
    ("--data small", "(32, 32) bytes"), ("--data colour", "(32, 32) bytes"),
    ("--data missing", "1 photos have no label map"), ("--batch-size 1", "--batch-size 2"),
    ("--data broken", "cannot read"), ("--student tiny", "--checkpoint none"),
    ("--dim 24", "another size"), ("--layer-decay 2", "--layer-decay"),
    ("--layer-decay 0", "--layer-decay"),
])
def test_mistakes_in_segmentation(options, says, teacher_file, capsys):
    Path("x.txt").write_text("no checkpoint")
    for folder in (".", "small", "missing", "colour", "broken"):
        draw(folder, 2, 1)
    Image.new("L", (5, 5)).save("small/annotations/training/0.png")
    os.remove("missing/annotations/validation/0.png")
    Image.new("RGB", (32, 32)).save("colour/annotations/training/1.png")
    os.truncate("broken/annotations/validation/0.png", 50)
    common = (f"--checkpoint {teacher_file} --data . --img-size 32 --iterations 2 --eval-every 2 "
              "--warmup-iterations 1 --batch-size 2 --num-classes 11 --workers 0 --device cpu "
              "--channels 8 --out run ")
    with pytest.raises(SystemExit) as stopped:
        segment.main((common + options).split())
    said = str(stopped.value) if stopped.value.code != 2 else capsys.readouterr().err
    assert says in said.strip().splitlines()[-1]
    assert stopped.value.code == 2 or len(said.strip().splitlines()) == 1
