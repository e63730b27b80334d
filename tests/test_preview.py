"""The table that `timm-selfdistill exits` prints."""

import re

import pytest
import timm
import torch
from timm.models import register_model

from timm_selfdistill.cli import main as cli
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import wrap
from timm_selfdistill.preview import format_preview, preview_exits

NARROW = {"channels": [16, 32, 64, 128]}


def test_preview_is_what_wrap_does():
    preview = preview_exits("resnet18", num_classes=5, image_size=64, model_kwargs=NARROW)
    backbone = timm.create_model("resnet18", num_classes=5, **NARROW)
    model = wrap(backbone, image_size=64).eval()
    chosen = [row for row in preview.exits if row.is_chosen]
    assert [row.point for row in chosen] == list(model.points)
    assert [row.point.name for row in preview.exits] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert [row.indices for row in preview.exits] == [(0,), (1,), (2,), (3,), (4,)]
    assert [row.reductions for row in preview.exits] == [(2,), (4,), (8,), (16,), (32,)]
    assert preview.params == sum(p.numel() for p in backbone.parameters())
    assert (preview.num_classes, preview.image_size) == (5, (64, 64))
    for row, head, (_, tap, _, side) in zip(chosen, model.heads, TAPS, strict=True):
        assert (row.head, row.fits) == ("proportional", True)
        assert row.head_params == sum(p.numel() for p in head.parameters())
        with MacCounter() as counter, torch.no_grad():
            head(torch.zeros(1, tap, side, side))
        assert row.head_macs == counter.macs > 0
    with MacCounter() as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert preview.macs == counter.macs


TAPS = [("layer1", 16, 4, 16), ("layer2", 32, 8, 8), ("layer3", 64, 16, 4)]


def test_number_of_exits_head_and_size_are_those_asked_for():
    preview = preview_exits("resnet18", exits=1, head="linear", image_size=(64, 96), model_kwargs=NARROW)
    model = wrap(timm.create_model("resnet18", **NARROW), exits=1, image_size=(64, 96))
    assert [row.point for row in preview.exits if row.is_chosen] == list(model.points)
    assert {row.head for row in preview.exits} == {"linear"}
    assert preview.exits[1].point.taps[0].grid == (16, 24)
    preview = preview_exits("resnet18", exits=["layer1.0", 3], image_size=64, model_kwargs=NARROW)
    assert [row.point.name for row in preview.exits if row.is_chosen] == ["layer1.0", "layer3"]


def test_branches_are_shown_side_by_side():
    kwargs = {"embed_dim": [16, 32], "num_heads": [2, 2]}
    preview = preview_exits("crossvit_tiny_240", num_classes=5, model_kwargs=kwargs)
    first = preview.exits[0]
    assert [(tap.layout, tap.channels) for tap in first.point.taps] == [("NLC", 16), ("NLC", 32)]
    assert first.indices == (0, 3)
    assert first.reductions == pytest.approx((12, 240 / 14), abs=0.1)
    assert re.search(r"\* +0,3 +blocks\.0 +NLC\+NLC +16\+32 ", format_preview(preview))


def test_modules_that_are_no_points_are_named_with_the_reason(tiny_net):
    @register_model
    def net_with_mistakes(pretrained=False, num_classes=5, **kwargs):
        backbone = tiny_net(num_classes)
        for module in ("unused", "act", "stage7"):
            backbone.feature_info.append({"module": module, "num_chs": 8, "reduction": 8})
        return backbone

    preview = preview_exits("net_with_mistakes", image_size=32)
    assert [row.point.name for row in preview.exits] == ["stage0", "stage1", "stage2"]
    assert preview.unusable == {"stage7": "is not a module", "unused": "never runs", "act": "runs 3 times"}
    assert format_preview(preview).endswith("Not a point: 'act' runs 3 times.")


def test_a_model_without_a_classifier_by_default_gets_imagenets():
    name = "vit_small_patch14_dinov2"
    assert timm.create_model(name, img_size=28, depth=1).num_classes == 0
    preview = preview_exits(name, exits=1, image_size=28, model_kwargs={"img_size": 28, "depth": 3})
    assert preview.num_classes == 1000


def test_model_that_the_meta_device_cannot_run_is_built_for_real(monkeypatch):
    devices = []

    def explore(backbone, *args):
        device = next(backbone.parameters()).device.type
        devices.append(device)
        if device == "meta":
            raise ValueError("fails") from RuntimeError("no numbers")
        return original(backbone, *args)

    import timm_selfdistill.preview as module

    original = module.explore
    monkeypatch.setattr(module, "explore", explore)
    assert preview_exits("resnet18", image_size=32, model_kwargs=NARROW).exits
    assert devices == ["meta", "cpu"]


def test_command_prints_the_table(capsys):
    arguments = ["exits", "vit_tiny_patch16_224", "--num", "2", "--image-size", "32x48", "--num-classes", "5"]
    assert cli([*arguments, "img_size=[32, 48]", "depth=4", "embed_dim=24", "num_heads=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "index",
        "module",
        "layout",
        "channels",
        "reduction",
        "MACs",
        "%",
        "head",
        "head",
        "MACs",
        "%",
        "head",
        "params",
        "%",
    ]
    assert [line.split()[:5] for line in lines[2:6]] == [
        ["*", "0", "blocks.0", "NLC", "24"],
        ["*", "1", "blocks.1", "NLC", "24"],
        ["2", "blocks.2", "NLC", "24", "16"],
        ["3", "blocks.3", "NLC", "24", "16"],
    ]
    assert "for one image of 32 x 48, 5 classes." in lines[-3]
    assert lines[-1] == "No head fits the budget, or half of what the exit saves, at blocks.3."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt18"], "timm cannot create 'resnt18'.*did you mean .*'resnet18'"),
        (["resnet18", "bogus=1"], "unexpected keyword argument 'bogus'"),
        (["resnet18", "in_chans"], "override 'in_chans': must have the form section.key=value"),
        (["resnet18", "in_chans="], "override 'in_chans=': has no value"),
        (["resnet18", "--num", "9"], r"exits=9: this backbone has 4 useful exit points \(act1, layer1"),
        (["resnet18", "--head", "nonsense"], "Unknown head 'nonsense'; known are bottleneck"),
        (["resnet18", "--image-size", "0"], "must be a number of pixels, or two as in 224x192, got '0'"),
        (["resnet18", "--image-size", "64x"], "must be a number of pixels, or two as in 224x192, got '64x'"),
        (["qwen3_vit_88m_enc"], "has no get_classifier.*pure encoder has no classifier"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_a_reason(arguments, message, capsys):
    try:
        status = cli(["exits", *arguments])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
