"""The CIFAR forms of networks that timm has for larger images only, registered with timm as `cifar_*`.

All but PyramidNet are timm's own classes with other arguments, and take further ones through `timm.create_model`:
`layers` and `channels`, for example, make any other network of the same family.
"""

from collections import OrderedDict
from typing import Any

from timm.layers import BatchNormAct2d, ClassifierHead, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG, cfgs
from torch import nn

from timm_selfdistill.backbones.pyramidnet import PyramidNet
from timm_selfdistill.stem import divide_reductions, use_small_stem

# timm's `features_only` takes five features if it is not told otherwise: stem and four stages.
_FEATURES = {"out_indices": (0, 1, 2, 3)}
_NESTED_FEATURES = {**_FEATURES, "flatten_sequential": True}


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "first_conv": first_conv,
        "classifier": classifier,
    }


# Where `register_model` looks for the configuration of a network.
default_cfgs = generate_default_cfgs(
    {
        "cifar_vgg19_bn": _cfg("features.0", "head.fc"),
        "cifar_resnext29_8x64d": _cfg("conv1", "fc"),
        "cifar_wrn20_8": _cfg("stem.conv", "head.fc"),
        "cifar_wrn44_8": _cfg("stem.conv", "head.fc"),
        "cifar_wrn28_12": _cfg("stem.conv", "head.fc"),
        "cifar_pyramidnet101_240": _cfg("conv1", "fc"),
    }
)


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm, and one linear layer instead of three.

    Paper: "Very Deep Convolutional Networks for Large-Scale Image Recognition", https://arxiv.org/abs/1409.1556. It has
    no form for CIFAR; this is the one of https://github.com/kuangliu/pytorch-cifar.
    """
    return build_model_with_cfg(
        _vgg, "cifar_vgg19_bn", pretrained, model_cfg=cfgs["vgg19"], feature_cfg={"flatten_sequential": True}, **kwargs
    )


@register_model
def cifar_resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-29, 8x64d: three stages of three bottlenecks with 8 groups.

    Paper: "Aggregated Residual Transformations for Deep Neural Networks", https://arxiv.org/abs/1611.05431; code:
    https://github.com/facebookresearch/ResNeXt.
    """
    arguments: dict[str, Any] = {
        "block": Bottleneck,
        "layers": (3, 3, 3),
        "channels": (64, 128, 256),
        "cardinality": 8,
        "base_width": 64,
    }
    return build_model_with_cfg(
        _resnet, "cifar_resnext29_8x64d", pretrained, feature_cfg=dict(_FEATURES), **arguments | kwargs
    )


@register_model
def cifar_wrn20_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN "20-8": three stages of three blocks, 8 times as wide as a CIFAR ResNet.

    The paper of wide residual networks counts depth as 6 N + 4 with N blocks a stage, which 20 is not. Here it is
    6 N + 2, as for CIFAR ResNets, which leaves out the two convolutions of the shortcuts.
    """
    return _create_wide_resnet("cifar_wrn20_8", pretrained, blocks=3, widening=8, **kwargs)


@register_model
def cifar_wrn44_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN "44-8": three stages of seven blocks, 8 times as wide as a CIFAR ResNet; on its depth see `cifar_wrn20_8`."""
    return _create_wide_resnet("cifar_wrn44_8", pretrained, blocks=7, widening=8, **kwargs)


@register_model
def cifar_wrn28_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-12: three stages of four blocks, 12 times as wide as a CIFAR ResNet."""
    return _create_wide_resnet("cifar_wrn28_12", pretrained, blocks=4, widening=12, **kwargs)


@register_model
def cifar_pyramidnet101_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PyramidNet-101 with bottlenecks, which add 240 channels: three stages of eleven blocks."""
    arguments: dict[str, Any] = {"layers": (11, 11, 11), "alpha": 240}
    return build_model_with_cfg(
        PyramidNet, "cifar_pyramidnet101_240", pretrained, feature_cfg=dict(_NESTED_FEATURES), **arguments | kwargs
    )


def _create_wide_resnet(name: str, pretrained: bool, *, blocks: int, widening: int, **kwargs: Any) -> nn.Module:
    """Build a wide residual network.

    Paper: "Wide Residual Networks", https://arxiv.org/abs/1605.07146; code:
    https://github.com/szagoruyko/wide-residual-networks.

    Args:
        name: Its name in timm.
        pretrained: As timm passes it.
        blocks: Blocks in each of the three stages.
        widening: Factor of the channels 16, 32 and 64.
        kwargs: Further arguments of timm's `ResNetV2`.
    """
    arguments: dict[str, Any] = {"layers": (blocks,) * 3, "channels": tuple(width * widening for width in (16, 32, 64))}
    return build_model_with_cfg(
        _wide_resnet, name, pretrained, feature_cfg=dict(_NESTED_FEATURES), **arguments | kwargs
    )


def _vgg(cfg: list[Any], global_pool: str = "avg", **kwargs: Any) -> VGG:
    # The two hidden layers, which the last lines take out, would have 120 M parameters.
    model = VGG(cfg, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d, **kwargs)
    model.add_module("pre_logits", nn.Identity())
    head = ClassifierHead(model.num_features, model.num_classes, global_pool, drop_rate=model.drop_rate)
    model.head = head.to(next(model.parameters()))
    model.head_hidden_size = model.num_features
    return model


def _resnet(**kwargs: Any) -> ResNet:
    model = ResNet(**kwargs)
    if not hasattr(model, "layer4"):
        # timm's forward runs four stages.
        model.layer4 = nn.Sequential()
    use_small_stem(model)
    return model


def _wide_resnet(**kwargs: Any) -> ResNetV2:
    block: dict[str, Any] = {
        "basic": True,
        "bottle_ratio": 1.0,
        "conv_layer": create_conv2d,
        "norm_layer": BatchNormAct2d,
    }
    model = ResNetV2(stem_chs=16, **block, **kwargs)
    conv = nn.Conv2d(model.in_chans, 16, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.stem = nn.Sequential(OrderedDict(conv=conv.to(next(model.parameters()))))
    divide_reductions(model, 4)
    return model
