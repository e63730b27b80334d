"""The CIFAR networks registered with timm, the stem for small images, and the commands of the papers' tables."""

import math
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.backbones import use_small_stem
from timm_selfdistill.model import wrap
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.train.builders import build_model

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
COMMANDS = [
    shlex.split(line)[2:]
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("timm-selfdistill train ")
]

# As narrow and shallow as each family can be; the VGG has one size.
NARROW = {
    "cifar_vgg19_bn": {},
    "cifar_resnext29_8x64d": {"layers": (1, 1, 1), "channels": (8, 16, 32), "cardinality": 2},
    "cifar_wrn28_12": {"layers": (1, 1, 1), "channels": (8, 16, 32)},
    "cifar_pyramidnet101_240": {"layers": (1, 1, 1), "alpha": 12},
}
OURS = [*NARROW, "cifar_wrn20_8", "cifar_wrn44_8"]

COUNTS = [
    # Of the networks' own papers, in millions, with 10 classes.
    ("cifar_resnext29_8x64d", {"num_classes": 10}, 34.4e6),
    ("cifar_wrn28_12", {"num_classes": 10}, 52.5e6),
    # Of https://github.com/kuangliu/pytorch-cifar, with 10 classes.
    ("cifar_vgg19_bn", {"num_classes": 10}, 20_040_522),
    # Asserted by https://github.com/osmr/imgclsmob, with 100 classes.
    ("cifar_wrn28_12", {"layers": (2, 2, 2), "channels": (160, 320, 640)}, 17_174_324),
    ("cifar_wrn28_12", {"channels": (160, 320, 640)}, 36_536_884),
    ("cifar_wrn20_8", {"layers": (6, 6, 6)}, 35_794_484),
    ("cifar_pyramidnet101_240", {"layers": (18, 18, 18), "alpha": 270}, 27_319_071),
    ("cifar_pyramidnet101_240", {"layers": (22, 22, 22)}, 26_844_952),
    ("cifar_pyramidnet101_240", {"layers": (26, 26, 26), "alpha": 220}, 27_054_096),
    ("cifar_resnext29_8x64d", {"cardinality": 32, "base_width": 4}, 4_868_004),
    ("cifar_resnext29_8x64d", {"cardinality": 16}, 68_247_460),
]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(params=NARROW)
def backbone(request) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5, **NARROW[request.param])


@pytest.mark.parametrize(("name", "arguments", "published"), COUNTS, ids=lambda value: str(value))
def test_parameter_counts_are_the_published_ones(name, arguments, published):
    with torch.device("meta"):
        counted = parameters(timm.create_model(name, **arguments))
    assert counted == (published if isinstance(published, int) else pytest.approx(published, abs=0.05e6))


def test_the_page_has_the_parameter_counts():
    rows = re.findall(r"^\| [\w-]+ \| `(\w+)` \| `[^|]+ \| ([\d,]+) \| ([\d,]{9,})?", PAGE.read_text(), re.M)
    assert set(OURS) < {name for name, *_ in rows}
    assert len(rows) == 10
    for name, count, with_ten_classes in rows:
        for text, classes in ((count, 100), (with_ten_classes, 10)):
            with torch.device("meta"):
                model = sd.wrap(name, num_classes=classes, small_stem=name not in OURS, image_size=32).backbone
            assert not text or parameters(model) == int(text.replace(",", ""))


def test_feature_info_tells_channels_and_grids(backbone):
    seen = {}
    for info in backbone.feature_info:
        module = backbone.get_submodule(info["module"])
        module.register_forward_hook(lambda m, a, out, info=info: seen.update({info["module"]: tuple(out.shape[1:])}))
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    expected = {info["module"]: (info["num_chs"], *(32 // info["reduction"],) * 2) for info in backbone.feature_info}
    assert seen == expected


def test_timm_extracts_the_features(backbone):
    name = backbone.pretrained_cfg["architecture"]
    features = timm.create_model(name, features_only=True, **NARROW[name])
    shapes = [tuple(map.shape[1:3]) for map in features(torch.randn(2, 3, 32, 32))]
    infos = backbone.feature_info
    assert shapes == [(info["num_chs"], 32 // info["reduction"]) for info in infos][: len(shapes)]
    assert len(shapes) >= 4


def test_a_step_reaches_every_parameter(backbone):
    model = sd.wrap(backbone, exits=2)
    out = model(torch.randn(4, 3, 32, 32), return_exits=True)
    sd.SelfDistillationLoss("byot-iccv2019")(out, torch.randint(5, (4,)))["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_saved_and_loaded_here_and_by_timm(backbone, tmp_path):
    model = sd.wrap(backbone, exits=2).eval()
    x = torch.randn(2, 3, 32, 32)
    sd.save_pretrained(model, tmp_path)
    logits = model(x, return_exits=True).logits
    for before, after in zip(logits, sd.from_pretrained(tmp_path)(x, return_exits=True).logits, strict=True):
        assert torch.equal(before, after)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), logits[-1])
    card = (tmp_path / "README.md").read_text()
    assert "import timm\nimport timm_selfdistill " in card


def test_classifier_is_replaced(backbone):
    backbone.reset_classifier(7)
    assert backbone.num_classes == 7
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert backbone.get_classifier() in list(backbone.modules())
    backbone.reset_classifier(0)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, backbone.num_features)


def test_layer_decay_finds_stem_blocks_and_head(backbone):
    scales = [group["lr_scale"] for group in param_groups_layer_decay(backbone, layer_decay=0.5)]
    # At least stem, three blocks and head.
    assert len(set(scales)) >= 5
    assert max(scales) == 1


def test_defaults_are_those_of_cifar(backbone):
    name = backbone.pretrained_cfg["architecture"]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (100, (3, 32, 32))
    with pytest.raises(ValueError, match="small_stem has no meaning"):
        sd.wrap(model, small_stem=True)


def test_four_stages_instead_of_three():
    with torch.device("meta"):
        wide = sd.wrap(
            "cifar_wrn44_8", model_kwargs={"layers": (5,) * 4, "channels": (128, 256, 512, 1024)}, exits=3
        ).backbone
        resnext = timm.create_model("cifar_resnext29_8x64d", layers=(2, 2, 2, 3), channels=(64, 128, 256, 512))
    assert parameters(wide) == pytest.approx(120e6, abs=0.5e6)
    assert [info["reduction"] for info in resnext.feature_info] == [1, 1, 2, 4, 8]
    assert len(resnext.layer4) == 3


def test_pyramidnet_widens_block_by_block_and_pads_the_shortcut_with_zeros():
    model = timm.create_model("cifar_pyramidnet101_240", layers=(2, 2), alpha=8).eval()
    blocks = [block for stage in model.stages for block in stage]
    assert [block.conv2.out_channels for block in blocks] == [18, 20, 22, 24]
    assert [block.out_channels for block in blocks] == [72, 80, 88, 96]
    nn.init.zeros_(blocks[2].bn4.weight)
    x = torch.randn(1, 80, 5, 5)
    y = blocks[2](x)
    assert torch.equal(y[:, :80, :2, :2], nn.functional.avg_pool2d(x, 2))
    assert y.shape == (1, 88, 3, 3)
    assert not y[:, 80:].any()


def test_pyramidnet_checkpoints_its_blocks():
    torch.manual_seed(0)
    model = timm.create_model("cifar_pyramidnet101_240", num_classes=5, **NARROW["cifar_pyramidnet101_240"])
    model.bn1.momentum = 0.0
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_every_row_has_a_command_in_both_forms():
    runs = [next(word for word in command if word.startswith("output_dir=")) for command in COMMANDS]
    assert len(set(runs)) == len(runs) == 26
    recipes = [load_recipe(recipe, overrides) for recipe, *overrides in COMMANDS]
    for preset, count in (("byot-iccv2019", 13), ("byot-tpami2021", 13)):
        form = [recipe for recipe in recipes if recipe.loss.preset == preset]
        assert len(form) == count
        assert set(OURS) < {recipe.model.name for recipe in form}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[1])
def test_commands_train_a_network_with_three_exits(command):
    recipe = load_recipe(command[0], command[1:])
    model = built(recipe)
    assert len(model.points) == 3
    if recipe.exits.points is not None:
        assert [point.cost for point in model.points] == pytest.approx([0.25, 0.5, 0.75], abs=0.06)


def built(recipe: Recipe) -> sd.SelfDistillModel:
    """Build a recipe's model as training does, without memory for its weights."""
    with torch.device("meta"):
        return build_model(recipe, [str(index) for index in range(100 if recipe.data.image_size == 32 else 1000)], "")


def test_small_stem_keeps_the_grid_of_the_image(make_backbone):
    backbone = make_backbone("resnet18")
    use_small_stem(backbone)
    conv = backbone.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(backbone.maxpool, nn.Identity)
    x = torch.randn(2, 3, 32, 32)
    assert backbone.layer1(backbone.maxpool(backbone.conv1(x))).shape == (2, 16, 32, 32)
    assert backbone.forward_features(x).shape == (2, 128, 4, 4)


def test_small_stem_corrects_feature_info(make_backbone):
    backbone = make_backbone("resnet18")
    use_small_stem(backbone)
    x = torch.randn(1, 3, 32, 32)
    grids = {}
    for info in backbone.feature_info:
        module = backbone.get_submodule(info["module"])
        module.register_forward_hook(lambda m, a, out, name=info["module"]: grids.update({name: 32 // out.shape[2]}))
    backbone(x)
    assert {info["module"]: info["reduction"] for info in backbone.feature_info} == grids


def test_small_stem_is_initialised_as_timm_does(make_backbone):
    backbone = make_backbone("resnet18")
    use_small_stem(backbone)
    assert backbone.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


def test_small_stem_keeps_input_channels_precision_and_all_other_weights(make_backbone):
    backbone = make_backbone("resnet18", in_chans=1).to(torch.bfloat16)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    use_small_stem(backbone)
    assert backbone.conv1.weight.shape == (64, 1, 3, 3)
    assert backbone.conv1.weight.dtype is torch.bfloat16
    after = backbone.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "conv1.weight")


def test_wrap_adds_the_same_exits_to_a_small_stem(make_backbone):
    model = wrap(make_backbone("resnet18"), small_stem=True, image_size=32).eval()
    assert [point.name for point in model.points] == ["layer1", "layer2", "layer3"]
    assert [point.taps[0].grid for point in model.points] == [(32, 32), (16, 16), (8, 8)]
    assert [point.downsample for point in model.points] == [8, 4, 2]
    assert model(torch.randn(2, 3, 32, 32), return_exits=True).logits[0].shape == (2, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18d", "test_efficientnet", "convnext_atto"])
def test_small_stem_without_meaning_says_where_it_has_one(make_backbone, name):
    backbone = make_backbone(name)
    with pytest.raises(ValueError, match=rf"no meaning for {type(backbone).__name__}.*Choose a resnet\*"):
        wrap(backbone, small_stem=True)


def test_small_stem_is_not_put_in_twice(make_backbone):
    backbone = make_backbone("resnet18")
    use_small_stem(backbone)
    reductions = [info["reduction"] for info in backbone.feature_info]
    with pytest.raises(ValueError, match="small_stem has no meaning"):
        use_small_stem(backbone)
    assert [info["reduction"] for info in backbone.feature_info] == reductions
