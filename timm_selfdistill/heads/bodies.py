"""The bodies of heads: their registry, the published ones, and what they share."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.checks import is_integer
from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.registry import Registry

HEADS: Registry[type[nn.Module]] = Registry("head", "timm_selfdistill.heads")
PUBLISHED: Final = "published"
"""In place of a head's name: the published one that suits the exit point."""


def register_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that registers a module as the head `name`, for `wrap` and recipes; ValueError if it is taken.

    It is made with `(tap: Tap, feature_dim: int, **head_kwargs)`, feature_dim being the width D of the teacher's
    feature, and maps the tapped tensor to a feature [B, D], which the exit's linear classifier reads. A body whose
    attribute `out_features` says another width W returns [B, W]; a linear layer then makes the feature of it.
    """
    return HEADS.register(name)


def list_heads() -> list[str]:
    """Return the names of all registered heads; "auto" and "published", which choose one, are allowed too."""
    return HEADS.names()


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
        # A linear layer gives the same before and after a mean; after it, it runs once per image.
        feature: Tensor = project(mean_token(x, self.tap))
        return feature


def as_map(x: Tensor, tap: Tap) -> Tensor:
    """Return a tapped tensor of any layout as a feature map [B, C, H, W], without its prefix tokens."""
    if tap.layout == "NCHW":
        return x
    if tap.layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    rows, columns = _grid(tap)
    tokens = as_tokens(x, tap)[:, tap.num_prefix_tokens :].transpose(1, 2)
    # At another input size than the dry run's, the tokens tell the grid's area; its aspect is taken to be the same.
    height = max(1, round(math.sqrt(tokens.shape[2] * rows / columns)))
    width, rest = divmod(tokens.shape[2], height)
    if rest:
        raise ValueError(
            f"The {tokens.shape[2]} tokens of {tap.name!r} form no grid of the aspect {rows}:{columns}, which a "
            "convolutional head needs: give images of the dry run's aspect, or choose the head token or linear."
        )
    return tokens.reshape(*tokens.shape[:2], height, width)


def as_tokens(x: Tensor, tap: Tap) -> Tensor:
    """Return a tapped tensor of any layout as tokens [B, L, C], its prefix tokens in front."""
    if tap.layout == "NHWC":
        return x.flatten(1, 2)
    return x if tap.layout == "NLC" else x.flatten(2).transpose(1, 2)


def pooled(x: Tensor) -> Tensor:
    """Return the mean over the positions of a feature map [B, C, H, W]."""
    return x.mean((2, 3))


def mean_token(x: Tensor, tap: Tap) -> Tensor:
    """Return the mean of tokens [B, L, C]: the prefix tokens together weigh as much as all tokens of the grid."""
    prefix = tap.num_prefix_tokens
    mean = x[:, prefix:].mean(1)
    return (mean + x[:, :prefix].mean(1)) / 2 if prefix else mean


def checked_map(body: nn.Module, tap: Tap, x: Tensor, stride: int) -> Tensor:
    """Return the tap as a map; refuse a single image in training whose map shrinks to one position, for batch norm."""
    x = as_map(x, tap)
    if body.training and x.shape[0] * math.ceil(x.shape[2] / stride) * math.ceil(x.shape[3] / stride) == 1:
        raise ValueError(
            f"The head at {tap.name!r} cannot train on a batch of one image of this size: its batch norm would "
            "see one value per channel. Give at least two images (or larger ones), or choose the head linear or token."
        )
    return x


def checked_width(width: int) -> int:
    """Return the width of a head; ValueError unless it is a number of channels."""
    if not is_integer(width) or width < 1:
        raise ValueError(f"width of a head must be a positive number of channels, got {width!r}.")
    return width


def halvings(tap: Tap) -> int:
    """Return how often the tap's grid is halved to reach the deepest one, between 1 and the paper's 3."""
    _grid(tap)
    return min(3, max(1, round(math.log2(tap.downsample))))


def _grid(tap: Tap) -> tuple[int, int]:
    if tap.grid is None:
        raise ValueError(f"The tokens of {tap.name!r} form no grid: choose the head token or linear.")
    return tap.grid


def _separable_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two depthwise-pointwise pairs of 3x3 convolutions, the first with stride 2, with batch norm and ReLU."""
    return nn.Sequential(
        DepthwiseConv2d(in_channels, stride=2),
        ConvNormAct(in_channels, in_channels, 1),
        DepthwiseConv2d(in_channels),
        ConvNormAct(in_channels, out_channels, 1),
    )


class DepthwiseConv2d(nn.Conv2d):
    """A 3x3 convolution of each channel by itself, as `nn.Conv2d` computes it.

    On a CPU, torch 2.15 takes 18 times as long for the gradient of a strided one in bfloat16 as in float32. There, all
    positions are computed, and those that the stride skips are left out afterwards.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride[0]
        if step == 1 or x.device.type != "cpu" or not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
            return super().forward(x)
        return F.conv2d(x, self.weight, padding=self.padding, groups=self.groups)[..., ::step, ::step]
