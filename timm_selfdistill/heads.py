"""An exit's network: a registered body that maps its tap to the teacher's feature width, and a linear classifier."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.checks import is_integer
from timm_selfdistill.exits import ExitPoint, Tap
from timm_selfdistill.registry import Registry

HEADS: Registry[type[nn.Module]] = Registry("head", "timm_selfdistill.heads")


def register_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that registers a module as the head `name`.

    It is made with `(tap: Tap, feature_dim: int, **head_kwargs)`, feature_dim being the width D of the teacher's
    feature, and maps the tapped tensor to a feature [B, D], which the exit's linear classifier reads.

    Args:
        name: What `wrap` and recipes call it.

    Raises:
        ValueError: If the name is taken.
    """
    return HEADS.register(name)


def list_heads() -> list[str]:
    """Return the names of all registered heads; "auto", which chooses by the tap's layout, is allowed too."""
    return HEADS.names()


class ExitHead(nn.Module):
    """An exit's network: a body that embeds what is tapped, and a linear classifier on what the body returns.

    Where the backbone has several branches at the point, each has its own body, and their features are averaged.

    Args:
        point: The exit point that is read.
        feature_dim: Width D of the teacher's feature.
        num_classes: Number of logits.
        head: Name of a registered body, or "auto": `token` for NLC, NCL and NHWC taps, `bottleneck` for an NCHW tap,
            `linear` for each of several NCHW branches.
        head_kwargs: Further arguments of the body.
        hint_adapter: Report the feature through a trainable linear layer, as the journal version does before it
            compares features; the classifier still reads the body's own output.
    """

    def __init__(
        self,
        point: ExitPoint,
        feature_dim: int,
        num_classes: int,
        head: str = "auto",
        head_kwargs: Mapping[str, Any] | None = None,
        hint_adapter: bool = False,
    ) -> None:
        super().__init__()
        name = choose_head(point) if head == "auto" else head
        bodies = [_build_body(name, tap, feature_dim, head_kwargs or {}) for tap in point.taps]
        self.body = bodies[0] if len(bodies) == 1 else _Branches(bodies)
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.adapter = nn.Linear(feature_dim, feature_dim) if hint_adapter else nn.Identity()

    def classify(self, *taps: Tensor) -> Tensor:
        """Return logits [B, num_classes] alone."""
        logits: Tensor = self.classifier(self.body(*taps))
        return logits

    def forward(self, *taps: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, num_classes] and the feature [B, D] that the hint compares."""
        feature = self.body(*taps)
        return self.classifier(feature), self.adapter(feature)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one of `num_classes` logits."""
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)


class _Branches(nn.ModuleList):
    def forward(self, *taps: Tensor) -> Tensor:
        return torch.stack([body(tap) for body, tap in zip(self, taps, strict=True)]).mean(0)


def choose_head(point: ExitPoint) -> str:
    """Return the name of the head that "auto" means at an exit point."""
    if any(tap.layout != "NCHW" for tap in point.taps):
        return "token"
    return "bottleneck" if len(point.taps) == 1 else "linear"


def as_map(x: Tensor, tap: Tap) -> Tensor:
    """Return a tapped tensor of any layout as a feature map [B, C, H, W], without its prefix tokens."""
    if tap.layout == "NCHW":
        return x
    if tap.layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    if tap.grid is None:
        raise ValueError(f"The tokens of {tap.name!r} form no grid: choose the head token or linear.")
    rows, columns = tap.grid
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
        width = _checked_width(max(1, feature_dim // 4) if width is None else width)
        self.stride = 2 ** _halvings(tap)
        self.reduce = ConvNormAct(tap.channels, width, 1)
        self.shrink = ConvNormAct(width, width, self.stride, stride=self.stride, padding=0)
        self.expand = ConvNormAct(width, feature_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(_checked_map(self, x, self.stride))
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
        links = _halvings(tap)
        growth = (feature_dim / tap.channels) ** (1 / links)
        widths = [tap.channels, *(round(tap.channels * growth**n) for n in range(1, links)), feature_dim]
        self.attention = _separable_conv(tap.channels, tap.channels) if attention else None
        self.chain = nn.Sequential(*(_separable_conv(a, b) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        x = _checked_map(self, x, 2 ** len(self.chain))
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
        width = _checked_width(feature_dim if width is None else width)
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


def _build_body(head: str, tap: Tap, feature_dim: int, head_kwargs: Mapping[str, Any]) -> nn.Module:
    """Build the registered body `head`, unless this machine's memory cannot hold it."""
    cls = HEADS.get(head)
    allowed = list(inspect.signature(cls).parameters)[2:]
    unknown = sorted(set(head_kwargs) - set(allowed))
    if unknown:
        raise ValueError(
            f"Head {head!r} takes no argument {', '.join(unknown)}; allowed are {', '.join(allowed) or 'none'}."
        )
    if head_kwargs:
        needed, available = _num_bytes(partial(cls, tap, feature_dim, **head_kwargs)), psutil.virtual_memory().total
        if needed > available:
            raise ValueError(
                f"head_kwargs {dict(head_kwargs)}: head {head!r} at {tap.name!r} would have parameters of "
                f"{needed / 2**30:,.0f} GiB, and this machine has {available / 2**30:,.0f} GiB; give smaller numbers."
            )
    return cls(tap, feature_dim, **head_kwargs)


def _num_bytes(build: Callable[[], nn.Module]) -> float:
    """Return the size of a body's parameters, before any memory is taken for them."""
    try:
        with torch.device("meta"):
            return sum(parameter.nbytes for parameter in build().parameters())
    except (RuntimeError, TypeError, OverflowError) as error:
        # Some third-party bodies compute numbers while they are built, and fail on the meta device.
        return math.inf if "overflow" in str(error).lower() else 0


def _separable_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two depthwise-pointwise pairs of 3x3 convolutions, the first with stride 2, with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
        ConvNormAct(in_channels, in_channels, 1),
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        ConvNormAct(in_channels, out_channels, 1),
    )


def _halvings(tap: Tap) -> int:
    """Return how often the tap's grid is halved to reach the deepest one, between 1 and the paper's 3."""
    if tap.grid is None:
        raise ValueError(f"The tokens of {tap.name!r} form no grid: choose the head token or linear.")
    return min(3, max(1, round(math.log2(tap.downsample))))


def _checked_map(body: Bottleneck | SepConvAttention, x: Tensor, stride: int) -> Tensor:
    """Return the tap as a map; refuse a single image in training whose map shrinks to one position, for batch norm."""
    x = as_map(x, body.tap)
    if body.training and x.shape[0] * math.ceil(x.shape[2] / stride) * math.ceil(x.shape[3] / stride) == 1:
        raise ValueError(
            f"The head at {body.tap.name!r} cannot train on a batch of one image of this size: its batch norm would "
            "see one value per channel. Give at least two images (or larger ones), or choose the head linear or token."
        )
    return x


def _checked_width(width: int) -> int:
    if not is_integer(width) or width < 1:
        raise ValueError(f"width of a head must be a positive number of channels, got {width!r}.")
    return width
