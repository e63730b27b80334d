"""The bodies of the heads: each maps a tapped tensor to the teacher's feature width."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.exits import Tap
from timm_selfdistill.heads.reading import as_map, as_tokens, grid_of, pooled
from timm_selfdistill.registry import Registry

HEADS: Registry[type[nn.Module]] = Registry("head", "timm_selfdistill.heads")


def register_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that registers a module as the head `name`.

    The module is made with `(tap: Tap, feature_dim: int)`, and `head_kwargs` as further arguments, and maps the tapped
    tensor to a feature [B, feature_dim]; the linear classifier behind it is added by the exit.

    Args:
        name: What `wrap` and recipes call it.

    Returns:
        The decorator.

    Raises:
        ValueError: If the name is taken.
    """
    return HEADS.register(name)


def list_heads() -> list[str]:
    """Return the names of all registered heads; "auto", which chooses by the tap's layout, is allowed beside them."""
    return HEADS.names()


@register_head("bottleneck")
class Bottleneck(nn.Module):
    """Bottleneck of the ICCV version: 1x1, then k x k with stride k, then 1x1 to the teacher's width, then pooling.

    Batch norm and ReLU follow each convolution. The shallower the exit, the larger k: it brings the tap down to the
    grid of the backbone's deepest feature map (8, 4 and 2 on a ResNet), at most 8, the largest the paper's networks
    need. Borders that k does not divide are padded with zeros, so that every input size works.

    Paper: "Be Your Own Teacher", ICCV 2019, https://arxiv.org/abs/1905.08094. It leaves the bottleneck's form open;
    this is the form of its widely used re-implementation.

    Args:
        tap: The tensor that is read.
        feature_dim: Width D of the teacher's feature.
        width: Channels inside; a quarter of `feature_dim` by default.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.tap = tap
        width = _positive("width", width if width is not None else max(1, feature_dim // 4))
        self.stride = 2 ** _halvings(tap)
        self.reduce = ConvNormAct(tap.channels, width, 1)
        self.shrink = ConvNormAct(width, width, self.stride, stride=self.stride, padding=0)
        self.expand = ConvNormAct(width, feature_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map the tapped tensor to a feature [B, D]."""
        x = as_map(x, self.tap)
        _check_batch(self, x, self.stride)
        x = self.reduce(x)
        bottom, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return pooled(self.expand(self.shrink(x)))


@register_head("sepconv_attention")
class SepConvAttention(nn.Module):
    """Head of the journal version: a chain of stride-2 separable convolutions behind a spatial attention.

    The attention is a separable convolution at half resolution, upsampled, through a sigmoid, and multiplies the tap.
    The chain has one link for each halving down to the grid of the backbone's deepest feature map (3, 2 and 1 on a
    ResNet); its widths grow geometrically from the tap's channels to the teacher's width.

    Paper: "Self-Distillation: Towards Efficient and Compact Neural Networks", TPAMI 44(8), 2022,
    https://doi.org/10.1109/TPAMI.2021.3067100. The published code fixes the sizes to a CIFAR ResNet.

    Args:
        tap: The tensor that is read.
        feature_dim: Width D of the teacher's feature.
        attention: Whether the chain is behind the spatial attention.
    """

    def __init__(self, tap: Tap, feature_dim: int, attention: bool = True) -> None:
        super().__init__()
        if not isinstance(attention, bool):
            raise ValueError(f"attention of a head must be true or false, got {attention!r}.")
        self.tap = tap
        links = _halvings(tap)
        growth = (feature_dim / tap.channels) ** (1 / links)
        widths = [tap.channels, *(round(tap.channels * growth**n) for n in range(1, links)), feature_dim]
        self.attention = SeparableConv(tap.channels, tap.channels) if attention else None
        self.chain = nn.Sequential(*(SeparableConv(a, b) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """Map the tapped tensor to a feature [B, D]."""
        x = as_map(x, self.tap)
        _check_batch(self, x, 2 ** len(self.chain))
        if self.attention is not None:
            weight = F.interpolate(self.attention(x), size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x * weight.sigmoid()
        return pooled(self.chain(x))


class SeparableConv(nn.Sequential):
    """Two depthwise-pointwise pairs of 3x3 convolutions, the first with stride 2, batch norm and ReLU after each.

    Args:
        in_channels: Channels of the input, and of the first pair.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
            ConvNormAct(in_channels, in_channels, 1),
            nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
            ConvNormAct(in_channels, out_channels, 1),
        )


@register_head("linear")
class LinearHead(nn.Module):
    """Mean over positions, layer norm and one linear layer to the teacher's width: the cheapest exit.

    Args:
        tap: The tensor that is read.
        feature_dim: Width D of the teacher's feature.
    """

    def __init__(self, tap: Tap, feature_dim: int) -> None:
        super().__init__()
        self.tap = tap
        self.norm = nn.LayerNorm(tap.channels)
        self.proj = nn.Linear(tap.channels, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map the tapped tensor to a feature [B, D]."""
        feature: Tensor = self.proj(self.norm(as_tokens(x, self.tap).mean(1)))
        return feature


@register_head("token")
class TokenHead(nn.Module):
    """Layer norm and a two-layer perceptron on every token, then the mean over the tokens.

    Prefix tokens (class, distillation, registers) together weigh as much as all the tokens of the grid together.

    Args:
        tap: The tensor that is read.
        feature_dim: Width D of the teacher's feature.
        width: Hidden width of the perceptron; `feature_dim` by default.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.tap = tap
        width = _positive("width", width if width is not None else feature_dim)
        self.norm = nn.LayerNorm(tap.channels)
        self.mlp = nn.Sequential(nn.Linear(tap.channels, width), nn.GELU(), nn.Linear(width, feature_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map the tapped tensor to a feature [B, D]."""
        expand, activation, project = self.mlp
        x = activation(expand(self.norm(as_tokens(x, self.tap))))
        prefix = self.tap.num_prefix_tokens
        mean = x[:, prefix:].mean(1)
        if prefix:
            mean = (mean + x[:, :prefix].mean(1)) / 2
        # A linear layer gives the same before and after a mean; after it, it runs once an image.
        feature: Tensor = project(mean)
        return feature


def _halvings(tap: Tap) -> int:
    """Return how often the tap's grid is halved to reach the deepest one, between 1 and the paper's 3."""
    grid_of(tap)
    return min(3, max(1, round(math.log2(tap.downsample))))


def _check_batch(body: "Bottleneck | SepConvAttention", x: Tensor, stride: int) -> None:
    """Refuse what batch norm cannot normalise: a single image whose map shrinks to a single position."""
    if body.training and x.shape[0] * math.ceil(x.shape[2] / stride) * math.ceil(x.shape[3] / stride) == 1:
        raise ValueError(
            f"The head at {body.tap.name!r} cannot train on a batch of one image of this size: its batch norm would "
            "see one value a channel. Give at least two images (or larger ones), or choose the head linear or token."
        )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} of a head must be a positive number of channels, got {value!r}.")
    return value
