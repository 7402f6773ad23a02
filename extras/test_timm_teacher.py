"""Tests of timm_teacher.py, on random weights: python -m pytest"""

import os
import runpy
import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_tinymim import QUICK, args_of, fails, load, refused, same  # first: it hides the GPU
from test_tinymim import own_folder  # a fixture: every test has an empty folder
import shapes
import timm_teacher
import tinymim

@pytest.mark.parametrize("name", """
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
    vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 deit3_small_patch16_224
    vit_xsmall_patch16_clip_224 vit_base_patch16_siglip_224 vit_small_patch16_dinov3
    vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384
    vit_medium_patch16_rope_reg1_gap_256 beitv2_base_patch16_224""".split())
def test_qkv_are_what_the_models_own_attention_sees_before_the_rotation(monkeypatch, name):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=3, img_size=112, qk_norm="deit_" in name or None).eval()
    for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):
        vector.data += 0.3 * torch.randn_like(vector)  # biases, norms and layer scales count
    images, seen, attend = torch.rand(2, 3, 112, 112), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv, **more: seen.append(qkv) or attend(*qkv, **more))
    model.blocks[1].attn.register_forward_pre_hook(  # block 2 of 3, but block 1 does rotate
        lambda _, x, more: (x, {key: more[key] for key in more if key != "rope"}), with_kwargs=True)
    model(tinymim.v2.functional.normalize(images, *map(model.pretrained_cfg.get, ["mean", "std"])))
    patch_size, has_class = model.patch_embed.patch_size[0], not ("siglip" in name or "gap" in name)
    expected = [x.transpose(1, 2).flatten(2) for x in seen[1]]  # from (B, heads, N, D/heads)
    expected = [torch.cat([x[:, :has_class], x[:, -(112 // patch_size)**2:]], 1) for x in expected]

    student = tinymim.ViT(48, 1, 2, patch_size, 112)
    objective = timm_teacher.TimmTinyMIM(student, timm_teacher.TimmTeacher(model), 2, 1).train()
    seen.clear()
    found = objective.teacher.qkv(tinymim.normalize(images))
    assert not any(x.requires_grad for x in found)
    assert len(seen) == 1  # no block attends but the first
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)
    losses = objective.losses(images, tinymim.normalize(images))
    own = [x[:, not has_class:] for x in student.qkv_at(images, 1)]
    same(losses, tinymim.relation_loss(own, found, 1))

def test_a_plain_vit_gives_the_losses_of_tinymims_teacher(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=112)  # ImageNet's mean and std
    torch.save(model.state_dict(), "deit.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    options, views = ["--student=nano", "--img-size=112"], torch.randn(2, 2, 3, 112, 112)
    found = timm_teacher.build(args_of(timm_teacher, *options, "--teacher=deit")).eval()
    expected = tinymim.build(args_of(tinymim, *options, "--teacher=deit.pth")).eval()
    torch.testing.assert_close(found.losses(*views), expected.losses(*views), rtol=0, atol=1e-6)

def test_a_stopped_run_resumes_but_not_with_another_teacher():
    shapes.write("pictures", 16, seed=1, size=32)
    for folder in ("teacher", "other"):
        timm.models.save_for_hf(timm.create_model("deit_tiny_patch16_224", depth=2), folder)
    options = [*QUICK, *"--data pictures --teacher local-dir:teacher --img-size 32".split(),
               "--student=nano", "--resume"]
    timm_teacher.main([*options, "--out=whole"])
    with patch.object(tinymim, "progress", side_effect=[range(2), KeyboardInterrupt]):
        refused("130", timm_teacher.main, options, error=SystemExit)
    timm_teacher.main(options)
    run = load("runs/timm-nano")
    same(run["objective"], load("whole")["objective"])
    assert run["config"]["relation_heads"] == 3 and "teacher" not in str(run["objective"].keys())
    os.replace("other/pytorch_model.bin", "teacher/pytorch_model.bin")
    fails(timm_teacher.main, options, "has a run with teacher_checksum")

@pytest.mark.parametrize("options, says", [
    ("nope", "Unknown model (nope)"), ("deit_tiny_patch16_224", "Weights come from huggingface.co"),
    ("convnext_atto --no-pretrained", "cannot take q, k and v"),
    ("swin_tiny_patch4_window7_224 --no-pretrained", "cannot take q, k and v"),
    ("deit_tiny_patch16_224 --no-pretrained --img-size=100", "100 pixels by patches of 16"),
    ("vit_base_patch16_sapiens2 --no-pretrained", "not square: try --img-size")])
def test_a_teacher_that_cannot_be_gets_one_line(monkeypatch, options, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(timm_teacher.main, ["--teacher", *options.split()], says)

def test_without_timm_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("-m pip install -U timm$", runpy.run_path, timm_teacher.__file__, error=SystemExit)
