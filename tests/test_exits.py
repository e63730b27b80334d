import math

import pytest
import timm
import torch
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.exits import Classifier, explore, find_exit_points, pool_feature


def names(taps):
    return [point.name for point in taps.points]


def tensors(taps):
    """The tapped tensors of all exits."""
    return [tap for point in taps.points for tap in point.taps]


def count_hooks(backbone):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


@pytest.fixture
def vit(make_backbone):
    return make_backbone("vit_tiny_patch16_224", embed_dim=192, depth=12)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_default_exits_of_a_resnet_are_its_first_three_stages(make_backbone, name):
    taps = find_exit_points(make_backbone(name, channels=[64, 128, 256, 512]), image_size=64)
    assert names(taps) == ["layer1", "layer2", "layer3"]
    assert [point.downsample for point in taps.points] == [8, 4, 2]
    assert taps.classifier == Classifier("fc", (("fc",),))


def test_default_exits_of_a_vit_split_its_depth_evenly(vit):
    assert names(find_exit_points(vit)) == ["blocks.2", "blocks.5", "blocks.8"]


def test_number_of_exits_splits_the_cost_evenly(vit):
    assert names(find_exit_points(vit, 1)) == ["blocks.5"]
    assert names(find_exit_points(vit, 2)) == ["blocks.3", "blocks.7"]
    assert names(find_exit_points(vit, 11)) == [f"blocks.{n}" for n in range(11)]


def test_cost_is_the_share_of_multiply_accumulates(make_backbone):
    backbone = make_backbone("resnet18", channels=[64, 64, 64, 64])
    points = find_exit_points(backbone, ["layer1", "layer2", "layer3"], image_size=32).points
    block = 2 * 9 * 64 * 64  # multiply-accumulates of a block at one position, its shortcut apart
    stem = 49 * 3 * 64 * 16 * 16
    stages = [2 * block * 8 * 8, *((2 * block + 64 * 64) * side * side for side in (4, 2, 1))]
    total = stem + sum(stages) + 64 * 5
    reached = stem
    for point, stage in zip(points, stages, strict=False):
        reached += stage
        assert point.cost == pytest.approx(reached / total, abs=1e-6)


@pytest.mark.parametrize(
    "exits",
    [[1, 2, 3], ["layer1", "layer2", "layer3"], ["layer3", 1, "layer2"], [2, "layer3", 1], (0.3, 0.53, 0.76)],
    ids=str,
)
def test_exits_by_index_name_and_cost_are_sorted_shallow_to_deep(make_backbone, exits):
    backbone = make_backbone("resnet18", channels=[64, 128, 256, 512])
    assert names(find_exit_points(backbone, exits, image_size=64)) == ["layer1", "layer2", "layer3"]


def test_cost_share_picks_the_nearest_point(vit):
    assert names(find_exit_points(vit, [0.02, 0.94])) == ["blocks.0", "blocks.10"]


def test_cost_shares_take_an_exit_each_even_where_one_is_nearest_to_all(make_backbone):
    backbone = make_backbone("resnet18", channels=[64, 128, 256, 512])
    costs = {point.name: point.cost for point in explore(backbone, image_size=64).points}
    assert min(costs, key=lambda name: abs(costs[name] - 0.72)) == min(costs, key=lambda name: abs(costs[name] - 0.85))
    assert names(find_exit_points(backbone, [0.85, 0.72], image_size=64)) == ["layer2", "layer3"]
    assert names(find_exit_points(backbone, ["layer2", 0.5], image_size=64)) == ["layer1", "layer2"]


def test_module_that_feature_info_does_not_name_can_be_tapped(make_backbone):
    (point,) = find_exit_points(make_backbone("resnet18"), ["layer2.0.conv1"], image_size=64).points
    assert (point.name, point.module) == ("layer2.0.conv1", "layer2.0.conv1")
    assert [(tap.name, tap.layout, tap.channels, tap.grid) for tap in point.taps] == [
        ("layer2.0.conv1", "NCHW", 32, (8, 8))
    ]


def test_container_is_tapped_at_its_last_child(make_backbone):
    backbone = make_backbone("resnet18")
    assert [p.module for p in find_exit_points(backbone).points] == ["layer1.1", "layer2.1", "layer3.1"]


@pytest.mark.parametrize(
    ("name", "kwargs", "layout", "prefix", "channels", "grids"),
    [
        ("resnet18", {}, "NCHW", 0, [16, 32, 64], [16, 8, 4]),
        ("swin_tiny_patch4_window7_224", {}, "NHWC", 0, [24, 48, 96], [16, 8, 4]),
        ("vit_tiny_patch16_224", {}, "NLC", 1, [48] * 3, [4] * 3),
        ("deit_tiny_distilled_patch16_224", {}, "NLC", 2, [48] * 3, [4] * 3),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "NLC", 0, [48] * 3, [4] * 3),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, "NLC", 5, [48] * 3, [4] * 3),
    ],
)
def test_layout_is_recognised(make_backbone, name, kwargs, layout, prefix, channels, grids):
    taps = tensors(find_exit_points(make_backbone(name, **kwargs), image_size=64))
    assert {(tap.layout, tap.num_prefix_tokens, tap.member) for tap in taps} == {(layout, prefix, None)}
    assert [tap.channels for tap in taps] == channels
    assert [tap.grid for tap in taps] == [(side, side) for side in grids]


def test_member_of_a_tuple_is_tapped(make_backbone):
    # PiT's stages return the feature map and the class tokens; after its last there is nothing left to save.
    taps = tensors(find_exit_points(make_backbone("pit_ti_224", depth=[1, 1, 1])))
    assert [(tap.layout, tap.channels, tap.grid, tap.member) for tap in taps] == [
        ("NCHW", 64, (27, 27), 0),
        ("NCHW", 128, (14, 14), 0),
    ]


def test_three_exits_on_a_two_stage_backbone_are_refused_when_asked_for(make_backbone):
    with pytest.raises(ValueError, match=r"exits=3: this backbone has 2 useful exit points \(transformers\.0, "):
        find_exit_points(make_backbone("pit_ti_224", depth=[1, 1, 1]), 3)


def test_layout_that_a_shape_leaves_open_is_that_of_the_other_stages(make_backbone):
    # The first stage's tensor is [1, 16, 16, 16]; Swin keeps channels last, its "cr" variant first.
    kwargs = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "img_size": 64, "window_size": 2}
    for name, layout in (("swin_tiny_patch4_window7_224", "NHWC"), ("swinv2_cr_tiny_224", "NCHW")):
        points = find_exit_points(make_backbone(name, **kwargs), [0, 1, 2]).points
        assert [point.taps[0].layout for point in points] == [layout] * 3
        assert (points[0].taps[0].channels, points[0].taps[0].grid) == (16, (16, 16))


def test_tokens_with_channels_first_are_recognised(tiny_net):
    class Channels1st(tiny_net):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten(2)
            self.feature_info.insert(1, {"module": "flat", "num_chs": 8, "reduction": 2})

        def forward(self, x):
            x = self.flat(self.act(self.stage0(x))).unflatten(2, (16, 16))
            return self.fc(self.act(self.stage2(self.act(self.stage1(x)))).mean((2, 3)))

    (tap,) = tensors(find_exit_points(Channels1st(), ["flat"], image_size=32))
    assert (tap.layout, tap.channels, tap.grid, tap.num_prefix_tokens) == ("NCL", 8, (16, 16), 0)


def test_tokens_that_form_no_grid_can_be_tapped(tiny_net):
    class Few(tiny_net):
        def __init__(self):
            super().__init__()
            self.few = nn.Identity()

        def forward(self, x):
            x = self.stage0(x).flatten(2).transpose(1, 2)[:, :150]
            return self.fc(nn.functional.pad(self.few(x).mean(1), (0, 24)))

    (point,) = find_exit_points(Few(), ["few"], image_size=32).points
    assert [(tap.layout, tap.channels, tap.grid, tap.downsample) for tap in point.taps] == [("NLC", 8, None, 1)]


def test_every_branch_that_feature_info_describes_is_tapped(make_backbone):
    points = find_exit_points(make_backbone("crossvit_tiny_240", embed_dim=[16, 32], num_heads=[2, 2])).points
    assert [point.name for point in points] == ["blocks.0", "blocks.1"]
    assert [(tap.name, tap.member, tap.channels, tap.grid, tap.num_prefix_tokens) for tap in points[0].taps] == [
        ("blocks.0[0]", 0, 16, (20, 20), 1),
        ("blocks.0[1]", 1, 32, (14, 14), 1),
    ]


def test_index_of_each_branch_means_the_same_exit(make_backbone):
    backbone = make_backbone("crossvit_tiny_240", embed_dim=[16, 32], num_heads=[2, 2])
    assert names(find_exit_points(backbone, [1])) == names(find_exit_points(backbone, [4])) == ["blocks.1"]
    with pytest.raises(ValueError, match=r"names the same exit point twice: blocks\.1, blocks\.1"):
        find_exit_points(backbone, [1, 4])


def test_without_a_feature_info_entry_all_tensors_are_tapped_once(tiny_net):
    class Many(nn.Module):
        def forward(self, x):
            return [x, x, {"no": "tensor"}, x[:, :, ::2, ::2], x.flatten(2).transpose(1, 2)]

    class Net(tiny_net):
        def __init__(self):
            super().__init__()
            self.many = Many()

        def forward(self, x):
            return self.fc(self.stage2(self.stage1(self.many(self.stage0(x))[0])).mean((2, 3)))

    (point,) = find_exit_points(Net(), ["many"], image_size=32).points
    assert [(tap.member, tap.layout, tap.grid) for tap in point.taps] == [
        (0, "NCHW", (16, 16)),
        (3, "NCHW", (8, 8)),
        (4, "NLC", (16, 16)),
    ]
    assert [tap.downsample for tap in point.taps] == [4, 2, 4]
    assert point.downsample == 2


@pytest.mark.parametrize(
    ("name", "kwargs", "exits"),
    [
        ("coat_lite_tiny", {"img_size": 64}, ["serial_blocks1", "serial_blocks2", "serial_blocks3"]),
        ("hrnet_w18_small", {}, ["stage2", "stage3", "stage4"]),
        ("mvitv2_tiny", {"img_size": 64}, ["stages.0", "stages.1", "stages.2"]),
        ("twins_svt_small", {"img_size": 64}, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_families_whose_feature_info_names_no_modules_are_tapped_elsewhere(make_backbone, name, kwargs, exits):
    backbone = make_backbone(name, **kwargs)
    assert names(find_exit_points(backbone, image_size=64)) == exits
    named = {name for name, _ in backbone.named_modules()}
    assert not all(info["module"] in named for info in backbone.feature_info) or name.startswith("coat")


def test_names_relative_to_a_part_that_shares_its_feature_info_are_found(tiny_net):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = tiny_net()
            self.feature_info, self.num_features = self.trunk.feature_info, self.trunk.num_features
            self.num_classes, self.get_classifier = self.trunk.num_classes, self.trunk.get_classifier

        def forward(self, x):
            return self.trunk(x)

    assert names(find_exit_points(Outer(), 2, image_size=32)) == ["trunk.stage0", "trunk.stage1"]


def test_tokens_that_follow_no_rows_form_no_map(make_backbone):
    backbone = make_backbone("hiera_tiny_224", img_size=(64, 64), embed_dim=24, stages=(1, 1, 2, 1))
    assert [(tap.layout, tap.grid) for tap in tensors(find_exit_points(backbone))] == [("NLC", None)] * 3


def test_grid_need_not_be_square(make_backbone):
    size = (64, 96)
    (tap,) = tensors(find_exit_points(make_backbone("vit_tiny_patch16_224", img_size=size), 1, image_size=size))
    assert (tap.grid, tap.num_prefix_tokens) == ((4, 6), 1)
    (tap,) = tensors(find_exit_points(make_backbone("resnet18"), [2], image_size=size))
    assert tap.grid == (8, 12)


def test_teachers_feature_is_found(make_backbone, family):
    backbone = make_backbone(family).eval()
    taps = find_exit_points(backbone)
    with torch.no_grad():
        feature = backbone.forward_head(backbone.forward_features(torch.zeros(1, 3, 64, 64)), pre_logits=True)
    assert taps.feature_dim == feature.shape[1]
    expected = backbone.get_classifier()
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert tuple(backbone.get_submodule(name) for name in taps.classifier.modules) == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "groups"),
    [
        ("deit_tiny_distilled_patch16_224", {}, (("head",), ("head_dist",))),
        ("efficientvim_m1", {}, (("heads.0", "heads.1", "heads.2", "heads.3"),)),
        (
            "efficientvim_m1_dist",
            {},
            (
                ("heads.0", "heads.1", "heads.2", "heads.3"),
                ("heads_dist.0", "heads_dist.1", "heads_dist.2", "heads_dist.3"),
            ),
        ),
    ],
)
def test_classifiers_of_one_network_are_grouped_apart_from_those_of_two(make_backbone, name, kwargs, groups):
    assert find_exit_points(make_backbone(name, **kwargs)).classifier.groups == groups


def test_classifiers_of_different_widths_have_no_mean(tiny_net):
    class Two(tiny_net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 5)

        def get_classifier(self):
            return self.fc, self.other

        def forward(self, x):
            x = self.stage1(self.stage0(x))
            return self.other(x.mean((2, 3))) + self.fc(self.stage2(x).mean((2, 3)))

    with pytest.raises(
        ValueError, match=r"classifiers of Two read features of different widths.*'other': 16, 'fc': 32"
    ):
        find_exit_points(Two(), image_size=32)


def test_pool_feature_averages_over_positions():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(pool_feature(x, 1), x.mean((2, 3)))
    torch.testing.assert_close(pool_feature(x, 3), x.mean((1, 2)))
    assert torch.equal(pool_feature(x[:, :, :1, :1], 1), x[:, :, 0, 0])
    assert torch.equal(pool_feature(x[..., 0], 2), x[..., 0].mean(1))
    assert torch.equal(pool_feature(x[..., 0, 0], 1), x[..., 0, 0])


# What the dry run must leave alone.


def test_dry_run_restores_modes_buffers_and_hooks(make_backbone, family):
    backbone = make_backbone(family, drop_rate=0.5).train()
    for module in list(backbone.modules())[::3]:
        module.training = False
    modes = [module.training for module in backbone.modules()]
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    find_exit_points(backbone)
    assert [module.training for module in backbone.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert count_hooks(backbone) == 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_dry_run_restores_the_random_state_of_a_backbone_that_draws_in_eval_mode(tiny_net):
    class Noisy(tiny_net):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    backbone = Noisy()
    before = torch.get_rng_state()
    find_exit_points(backbone, 2, image_size=32)
    assert torch.equal(torch.get_rng_state(), before)


def test_failed_dry_run_restores_too(tiny_net):
    backbone = tiny_net().train()
    with pytest.raises(
        ValueError, match=r"TinyNet fails on an input of shape \(1, 3, 48, 48\): only 32 px.*image_size"
    ):
        find_exit_points(backbone, image_size=48)
    assert all(module.training for module in backbone.modules())
    assert count_hooks(backbone) == 0


def test_dry_run_works_where_the_backbone_is(make_backbone):
    double = find_exit_points(make_backbone("resnet18").double(), image_size=64)
    with torch.device("meta"):
        meta = make_backbone("resnet18")
    assert find_exit_points(meta, image_size=64) == double == find_exit_points(make_backbone("resnet18"), image_size=64)


def test_dry_run_takes_the_backbones_own_size_and_channels(make_backbone):
    backbone = make_backbone("test_efficientnet", in_chans=1)
    assert backbone.pretrained_cfg["input_size"][1:] == (160, 160)
    (tap,) = tensors(find_exit_points(backbone, [0]))
    assert tap.grid == (80, 80)


# Errors say what is allowed.


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([99], r"no module at index 99; allowed are 0 \(act1\), 1 \(layer1\), .*4 \(layer4\)\."),
        ([-1], r"no module at index -1; allowed are 0 \(act1\)"),
        ([5, "layer1.0"], r"no module at index 5; allowed are .*4 \(layer4\)\."),
        (0, r"exits=0: this backbone has \d useful exit points \(.*layer1, layer2, layer3\)"),
        (-1, r"exits=-1: this backbone has"),
        (100, r"exits=100: this backbone has \d useful exit points"),
        (True, r"exits=True: this backbone has"),
        ([], r"exits=\[\]: give a number, or a list of"),
        (0.5, r"exits=0\.5: give a number, or a list of"),
        ("layer1", r"exits='layer1': give a number, or a list of feature_info indices, cost shares or module names"),
        ([True], r"An exit is a feature_info index, a cost share or a module name, not True"),
        ([None], r"An exit is a feature_info index, a cost share or a module name, not None"),
        (
            [1.0],
            r"exits=\[1\.0\]: cost shares lie between 0 and 1, .*left for them are 4: act1, layer1, layer2, layer3",
        ),
        ([0.0], r"exits=\[0\.0\]: cost shares lie between 0 and 1"),
        ([0.5, 0.5], r"exits=\[0\.5, 0\.5\]: cost shares .* are all different"),
        ([0.1, 0.2, 0.3, 0.4, 1], r"take an exit point each; left for them are 3: act1, layer2, layer3"),
        (["layer9"], r"ResNet has no module 'layer9'.*feature_info names act1, layer1, layer2, layer3, layer4"),
        (["fc"], r"Module 'fc' returns no feature map or tokens in a forward.*exit points are act1, layer1"),
        (["bn1"], r"Module 'bn1' is overwritten in place in a forward.*exit points are act1, layer1"),
        (["layer1", "layer1"], r"names the same exit point twice: layer1, layer1"),
        (["layer1", 1], r"names the same exit point twice: layer1, layer1"),
        (["layer1", "layer1.1"], r"names the same exit point twice: layer1, layer1\.1"),
    ],
    ids=str,
)
def test_wrong_exits_are_refused(make_backbone, exits, message):
    backbone = make_backbone("resnet18")
    with pytest.raises(ValueError, match=message):
        find_exit_points(backbone, exits, image_size=64)
    assert count_hooks(backbone) == 0


def test_index_counts_the_entries_of_feature_info_that_are_no_modules(tiny_net):
    backbone = tiny_net()
    backbone.feature_info.insert(0, {"module": "", "num_chs": 3, "reduction": 1})
    assert names(find_exit_points(backbone, [1], image_size=32)) == ["stage0"]
    with pytest.raises(ValueError, match=r"no module at index 0; allowed are 1 \(stage0\), 2 \(stage1\), 3 \(stage2\)"):
        find_exit_points(backbone, [0], image_size=32)


@pytest.mark.parametrize(("module", "ran"), [("unused", "never runs"), ("act", "runs 3 times")])
def test_module_that_does_not_run_once_is_refused(tiny_net, module, ran):
    message = rf"Module '{module}' {ran} in a forward.*exit points are stage0, stage1, stage2"
    with pytest.raises(ValueError, match=message):
        find_exit_points(tiny_net(), ["stage0", module], image_size=32)


def test_backbone_without_the_contract_is_refused():
    with pytest.raises(
        ValueError, match="Linear cannot be wrapped: it has no feature_info, get_classifier, num_classes"
    ):
        find_exit_points(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("feature_info", "message"),
    [
        ("stages", r"feature_info of TinyNet must be a list of dicts, got str"),
        ([{"module": "stage0", "reduction": 2}], r"entry 0 has no num_chs: \{'module': 'stage0', 'reduction': 2\}"),
        (["stage0"], r"entry 0 has no module, num_chs, reduction: 'stage0'"),
        ([], r"No exit point lies between 2% and 97% of this backbone's cost; name others.*Those found are none"),
    ],
)
def test_feature_info_that_does_not_follow_the_contract_is_refused(tiny_net, feature_info, message):
    backbone = tiny_net()
    backbone.feature_info = feature_info
    with pytest.raises(ValueError, match=message):
        find_exit_points(backbone, image_size=32)


def test_pure_encoder_is_refused():
    with pytest.raises(ValueError, match=r"Encoder cannot be wrapped: it has no get_classifier.*a pure encoder has no"):
        find_exit_points(timm.create_model("qwen3_vit_88m_enc", depth=1))


@pytest.mark.parametrize(
    "family", ["resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"], indirect=True
)
def test_backbone_without_a_classifier_is_refused(make_backbone, family):
    with pytest.raises(ValueError, match=r"has no classifier \(num_classes=0\).*reset_classifier\(N\)"):
        find_exit_points(make_backbone(family, num_classes=0))


def test_classifier_that_is_no_part_of_the_backbone_is_refused(tiny_net):
    backbone = tiny_net()
    backbone.get_classifier = lambda: nn.Linear(32, 5)
    with pytest.raises(
        ValueError, match=r"get_classifier\(\) of TinyNet returned \['Linear'\], not one of its modules"
    ):
        find_exit_points(backbone, image_size=32)


def test_classifier_that_does_not_run_is_refused(tiny_net):
    backbone = tiny_net()
    backbone.get_classifier = lambda: backbone.unused
    with pytest.raises(ValueError, match=r"classifier of TinyNet \(unused\) did not run"):
        find_exit_points(backbone, image_size=32)


def test_backbone_that_returns_no_logits_is_refused(tiny_net):
    class Pair(tiny_net):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"Pair must return logits \[B, num_classes\], but returned tuple"):
        find_exit_points(Pair(), image_size=32)


def test_a_model_can_be_wrapped_in_inference_mode(make_backbone, images):
    with torch.inference_mode():
        model = sd.wrap(make_backbone("resnet18")).eval()
        out = sd.EarlyExit(model, math.inf)(images)
        assert torch.equal(out.logits, model.backbone(images))
