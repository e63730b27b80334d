"""CIFAR networks that timm lacks, registered with timm as `cifar_*` by importing this module, and the CIFAR stem.

All but PyramidNet are timm's own classes with other arguments, and take further ones through `timm.create_model`:
`layers` and `channels`, for example, make any other network of the same family.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ClassifierHead, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm_selfdistill.exits import Backbone

# timm's `features_only` takes five features by default: the stem and four stages.
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


def use_small_stem(backbone: "Backbone") -> None:
    """Replace a ResNet's 7x7 stride-2 stem and its max-pool by one 3x3 stride-1 convolution, in place.

    The new convolution is freshly initialised (He, fan-out, as timm's ResNet), also in a pretrained network. Raises
    ValueError unless the backbone's `conv1` is one strided convolution that `maxpool` follows.
    """
    stem, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or stem.stride == (1, 1) or not isinstance(pool, nn.Module):
        raise ValueError(
            f"small_stem has no meaning for {type(backbone).__name__}: it replaces a strided convolution `conv1` and a "
            "`maxpool`. Choose a resnet*, resnext* or wide_resnet* without a deep stem, or leave small_stem out."
        )
    backbone.conv1 = _stem_conv(stem.in_channels, stem.out_channels, stem.weight)
    backbone.maxpool = nn.Identity()
    divide_reductions(backbone, 4)


def divide_reductions(backbone: "Backbone", factor: int) -> None:
    """Correct `feature_info` in place for a stem that leaves all grids `factor` times finer, along one side."""
    backbone.feature_info = [
        {**info, "reduction": max(1, info["reduction"] // factor)} for info in backbone.feature_info
    ]


def _stem_conv(in_channels: int, out_channels: int, like: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv.to(like)


class PyramidNet(nn.Module):
    """PyramidNet with bottlenecks, in its form for CIFAR: every block is a little wider than the one before it.

    The k-th of K blocks has 16 + alpha k / K channels inside, rounded, and four times as many outside.

    Paper: "Deep Pyramidal Residual Networks", CVPR 2017, https://arxiv.org/abs/1610.02915; code:
    https://github.com/dyhan0920/PyramidNet-PyTorch.

    Args:
        layers: Blocks in each stage; each but the first stage halves the grid.
        alpha: Channels that all blocks add together.
        num_classes: Number of logits.
        in_chans: Channels of the images. The further arguments are those of timm's models, too.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        alpha: float,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        channels = 16
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "bn1"}]
        widths = iter([round(16 + alpha * (k + 1) / sum(layers)) for k in range(sum(layers))])
        self.stages = nn.Sequential()
        for index, count in enumerate(layers):
            stage = nn.Sequential()
            for position in range(count):
                block = PyramidBottleneck(channels, next(widths), 2 if index and not position else 1, **dd)
                stage.append(block)
                channels = block.out_channels
            self.stages.append(stage)
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"})
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool, **dd)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameters: by stage (coarse) or by block."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^bn2", (99999,))]
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations inside the blocks in the backward pass, or keep them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` logits, or by none."""
        weight = self.conv1.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=weight.device, dtype=weight.dtype
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to the deepest feature map [B, num_features, H / 4, W / 4]."""
        x = self.bn1(self.conv1(x))
        x = checkpoint_seq(self.stages, x, flatten=True) if self.grad_checkpointing else self.stages(x)
        x = self.act2(self.bn2(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the deepest feature map to logits [B, num_classes], or to what the classifier reads."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class PyramidBottleneck(nn.Module):
    """Bottleneck without an activation at its ends, whose shortcut is padded with channels of zeros.

    It has `width` channels inside and four times as many outside; stride 2 halves the grid (the shortcut by pooling).
    """

    def __init__(self, in_channels: int, width: int, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_channels = 4 * width
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.act3 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False, **dd)
        self.bn4 = nn.BatchNorm2d(self.out_channels, **dd)
        # Rounds up, as the convolution does.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, 4 width, H / stride, W / stride]."""
        y = self.conv1(self.bn1(x))
        y = self.conv2(self.act2(self.bn2(y)))
        y = self.bn4(self.conv3(self.act3(self.bn3(y))))
        added = self.out_channels - x.shape[1]
        output: Tensor = y + F.pad(self.pool(x), (0, 0, 0, 0, 0, added))
        return output


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm, and one linear layer instead of three.

    Paper: "Very Deep Convolutional Networks for Large-Scale Image Recognition", https://arxiv.org/abs/1409.1556. It has
    no form for CIFAR; this is the one of https://github.com/kuangliu/pytorch-cifar.
    """
    kwargs = {"model_cfg": cfgs["vgg19"]} | kwargs
    return _build(_vgg, "cifar_vgg19_bn", pretrained, {"flatten_sequential": True}, kwargs)


@register_model
def cifar_resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-29, 8x64d: three stages of three bottlenecks with 8 groups.

    Paper: "Aggregated Residual Transformations for Deep Neural Networks", https://arxiv.org/abs/1611.05431; code:
    https://github.com/facebookresearch/ResNeXt.
    """
    stages = {"layers": (3, 3, 3), "channels": (64, 128, 256)}
    block = {"block": Bottleneck, "cardinality": 8, "base_width": 64}
    return _build(_resnet, "cifar_resnext29_8x64d", pretrained, _FEATURES, stages | block | kwargs)


@register_model
def cifar_wrn20_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN "20-8": three stages of three blocks, 8 times as wide as a CIFAR ResNet.

    The paper of wide residual networks counts depth as 6 N + 4 with N blocks in a stage, which 20 is not. Here it is
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
    stages = {"layers": (11, 11, 11), "alpha": 240}
    return _build(PyramidNet, "cifar_pyramidnet101_240", pretrained, _NESTED_FEATURES, stages | kwargs)


def _create_wide_resnet(name: str, pretrained: bool, *, blocks: int, widening: int, **kwargs: Any) -> nn.Module:
    """Build a network of "Wide Residual Networks", https://arxiv.org/abs/1605.07146.

    Code: https://github.com/szagoruyko/wide-residual-networks. Further arguments are those of timm's `ResNetV2`.
    """
    stages = {"layers": (blocks,) * 3, "channels": tuple(width * widening for width in (16, 32, 64))}
    return _build(_wide_resnet, name, pretrained, _NESTED_FEATURES, stages | kwargs)


def _build(cls: Any, name: str, pretrained: bool, features: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(cls, name, pretrained, feature_cfg=dict(features), **kwargs)
    return model


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
    layers: dict[str, Any] = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d}
    model = ResNetV2(stem_chs=16, basic=True, bottle_ratio=1.0, **layers, **kwargs)
    model.stem = nn.Sequential(OrderedDict(conv=_stem_conv(model.in_chans, 16, next(model.parameters()))))
    divide_reductions(model, 4)
    return model
