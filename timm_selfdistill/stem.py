"""The stem of CIFAR ResNets, for images too small to be shrunk four-fold before the first block."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    # Not at run time: our networks are registered as soon as timm is imported, perhaps by exits itself.
    from timm_selfdistill.exits import Backbone


def use_small_stem(backbone: "Backbone") -> None:
    """Replace a ResNet's 7x7 stride-2 stem and its max-pool by one 3x3 stride-1 convolution, in place.

    The new convolution is freshly initialised (He, fan-out, as timm's ResNet), also in a pretrained network.

    Args:
        backbone: A ResNet-like timm model: `conv1` is one strided convolution, and `maxpool` follows it.

    Raises:
        ValueError: If the backbone has no such stem.
    """
    stem, pool = getattr(backbone, "conv1", None), getattr(backbone, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or stem.stride == (1, 1) or not isinstance(pool, nn.Module):
        raise ValueError(
            f"small_stem has no meaning for {type(backbone).__name__}: it replaces a ResNet's stem, one strided "
            "convolution `conv1` with a `maxpool` behind it. Choose a resnet*, resnext* or wide_resnet* without a "
            "deep stem, or leave small_stem out."
        )
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1 = conv.to(stem.weight)
    backbone.maxpool = nn.Identity()
    divide_reductions(backbone, 4)


def divide_reductions(backbone: "Backbone", factor: int) -> None:
    """Correct `feature_info` for a stem that shrinks images so many times less, in place.

    Args:
        backbone: A timm model.
        factor: How many times finer its grids have become, along one side.
    """
    backbone.feature_info = [
        {**info, "reduction": max(1, info["reduction"] // factor)} for info in backbone.feature_info
    ]
