import math

import pytest
import torch
from torch import nn

from timm_selfdistill.backbones import use_small_stem
from timm_selfdistill.model import wrap


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
