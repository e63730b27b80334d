"""The published heads: registered bodies that map a tap to the teacher's feature width."""

from itertools import pairwise
from typing import Final

import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.heads.body import (
    DepthwiseConv2d,
    as_tokens,
    checked_map,
    checked_width,
    halvings,
    pooled,
    register_head,
)

PUBLISHED: Final = "published"
"""In place of a head's name: the published one that suits the exit point."""


def choose_head(point: ExitPoint) -> str:
    """Return the name of the head that "published" means at an exit point."""
    if any(tap.layout != "NCHW" for tap in point.taps):
        return "token"
    return "bottleneck" if len(point.taps) == 1 else "linear"


@register_head("bottleneck")
class Bottleneck(nn.Module):
    """Bottleneck of the ICCV version: 1x1, then k x k with stride k, then 1x1 to the teacher's width, then pooling.

    Batch norm and ReLU follow each convolution. The shallower the exit, the larger k: it brings the tap down to the
    grid of the backbone's deepest feature map (8, 4 and 2 on a ResNet), at most 8, the largest the paper's networks
    need. Borders that k does not divide are padded with zeros, so that every input size works. `width` is the number of
    channels inside, a quarter of `feature_dim` by default.

    Paper: "Be Your Own Teacher", ICCV 2019, https://arxiv.org/abs/1905.08094. It leaves the bottleneck's form open;
    this is the form of its widely used re-implementation.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.tap = tap
        width = checked_width(max(1, feature_dim // 4) if width is None else width)
        self.stride = 2 ** halvings(tap)
        self.reduce = ConvNormAct(tap.channels, width, 1)
        self.shrink = ConvNormAct(width, width, self.stride, stride=self.stride, padding=0)
        self.expand = ConvNormAct(width, feature_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(checked_map(self, self.tap, x, self.stride))
        bottom, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return pooled(self.expand(self.shrink(x)))


@register_head("sepconv_attention")
class SepConvAttention(nn.Module):
    """Head of the journal version: a chain of stride-2 separable convolutions after a spatial attention.

    The attention is a separable convolution at half resolution, upsampled, through a sigmoid, and multiplies the tap;
    `attention=False` leaves it out.
    The chain has one link for each halving down to the grid of the backbone's deepest feature map (3, 2 and 1 on a
    ResNet); its widths grow geometrically from the tap's channels to the teacher's width.

    Paper: "Self-Distillation: Towards Efficient and Compact Neural Networks", TPAMI 44(8), 2022,
    https://doi.org/10.1109/TPAMI.2021.3067100. The published code fixes the sizes to a CIFAR ResNet.
    """

    def __init__(self, tap: Tap, feature_dim: int, attention: bool = True) -> None:
        super().__init__()
        if not isinstance(attention, bool):
            raise ValueError(f"attention of a head must be true or false, got {attention!r}.")
        self.tap = tap
        links = halvings(tap)
        growth = (feature_dim / tap.channels) ** (1 / links)
        widths = [tap.channels, *(round(tap.channels * growth**n) for n in range(1, links)), feature_dim]
        self.attention = _separable_conv(tap.channels, tap.channels) if attention else None
        self.chain = nn.Sequential(*(_separable_conv(a, b) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        x = checked_map(self, self.tap, x, 2 ** len(self.chain))
        if self.attention is not None:
            weight = F.interpolate(self.attention(x), size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x * weight.sigmoid()
        return pooled(self.chain(x))


@register_head("linear")
class LinearHead(nn.Module):
    """Mean over positions, layer norm and one linear layer to the teacher's width: the cheapest exit."""

    def __init__(self, tap: Tap, feature_dim: int) -> None:
        super().__init__()
        self.tap = tap
        self.norm = nn.LayerNorm(tap.channels)
        self.proj = nn.Linear(tap.channels, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        feature: Tensor = self.proj(self.norm(as_tokens(x, self.tap).mean(1)))
        return feature


@register_head("token")
class TokenHead(nn.Module):
    """Layer norm and a two-layer perceptron on every token, then the mean over the tokens.

    Prefix tokens (class, distillation, registers) together weigh as much as all the tokens of the grid together.
    `width` is the perceptron's hidden width, `feature_dim` by default.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.tap = tap
        width = checked_width(feature_dim if width is None else width)
        self.norm = nn.LayerNorm(tap.channels)
        self.mlp = nn.Sequential(nn.Linear(tap.channels, width), nn.GELU(), nn.Linear(width, feature_dim))

    def forward(self, x: Tensor) -> Tensor:
        expand, activation, project = self.mlp
        x = activation(expand(self.norm(as_tokens(x, self.tap))))
        prefix = self.tap.num_prefix_tokens
        mean = x[:, prefix:].mean(1)
        if prefix:
            mean = (mean + x[:, :prefix].mean(1)) / 2
        # A linear layer gives the same before and after a mean; after it, it runs once per image.
        feature: Tensor = project(mean)
        return feature


def _separable_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two depthwise-pointwise pairs of 3x3 convolutions, the first with stride 2, with batch norm and ReLU."""
    return nn.Sequential(
        DepthwiseConv2d(in_channels, stride=2),
        ConvNormAct(in_channels, in_channels, 1),
        DepthwiseConv2d(in_channels),
        ConvNormAct(in_channels, out_channels, 1),
    )
