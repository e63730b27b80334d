"""The default head: a body of one width, and the budget that chooses the width and the points worth an exit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple

from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.checks import Share, check, is_integer
from timm_selfdistill.exits import DEFAULT_EXITS, Backbone, BackboneTaps, ExitPoint, Exits, Exploration, Tap, choose
from timm_selfdistill.heads.bodies import (
    DepthwiseConv2d,
    as_tokens,
    checked_map,
    checked_width,
    halvings,
    mean_token,
    pooled,
    register_head,
)

AUTO: Final = "auto"
"""In place of a head's name: the default head, of the width that the budget allows."""
PROPORTIONAL: Final = "proportional"
DEFAULT_BUDGET: Final = 0.1
# Parameters of all heads, as a multiple of the budget.
_PARAMS: Final = 2.5
# Of what an exit saves, the most that its head may cost.
_OF_SAVED: Final = 0.5
# Widths are the teacher's, or multiples of this.
_STEP: Final = 8
_MIN_WIDTH: Final = 16
# Channels after the pooling, as a multiple of the tap's.
_EXPAND: Final = 4


@register_head(PROPORTIONAL)
class Proportional(nn.Module):
    """Head in proportion to its backbone: whatever costs much is done at `width` channels and on few positions.

    A feature map is halved by mean pooling and widened by a 1x1 convolution. A chain of separable 3x3 convolutions
    follows, and the mean over the positions. All but the last have stride 2, and bring the map down to the grid of the
    backbone's deepest one: the shallower the exit, the longer the chain (3, 2 and 1 of them on a ResNet). With
    `expand`, channels double where the map is halved, as in a backbone, up to the width; the last convolution has the
    width in any case.
    Tokens get layer norm, a linear layer to the width and GELU; prefix tokens together weigh as much in their mean as
    all tokens of the grid.

    The classifier reads the embedding of this width. The feature that hints compare with the teacher's is a linear
    layer on it, which inference does not need.

    Args:
        tap: What is read.
        feature_dim: Width D of the teacher's feature.
        width: Channels of the embedding, and the most inside; D by default. `wrap` chooses it by `head_budget`.
        expand: Channels of a map after the pooling over the tap's, 4 in `wrap`'s default heads; without, the width.

    Raises:
        ValueError: If `width` or `expand` is not a positive whole number.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None, expand: int | None = None) -> None:
        super().__init__()
        self.out_features = width = checked_width(feature_dim if width is None else width)
        if expand is not None and (not is_integer(expand) or expand < 1):
            raise ValueError(f"expand of a head must be a positive multiple of the tap's channels, got {expand!r}.")
        self.embed = _MapEmbedding(tap, width, expand) if _is_map(tap) else _TokenEmbedding(tap, width)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.embed(x)
        return embedding


class _MapEmbedding(nn.Module):
    def __init__(self, tap: Tap, width: int, expand: int | None) -> None:
        super().__init__()
        self.tap = tap
        # Each output is a mean over what there is of its window: every position counts, at any size of the map. With
        # `expand`, 2x2 windows as in a ResNet-D, which cost less; models that were saved before have 3x3 ones.
        kernel, padding = (3, 1) if expand is None else (2, 0)
        self.pool = nn.AvgPool2d(kernel, 2, padding, ceil_mode=expand is not None, count_include_pad=False)
        widths, strides = _links(tap, width, expand)
        self.reduce = ConvNormAct(tap.channels, widths[0], 1)
        self.chain = nn.Sequential(*map(_SeparableConv, widths, widths[1:], strides))

    def forward(self, x: Tensor) -> Tensor:
        x = checked_map(self, self.tap, x, 2 ** len(self.chain))
        return pooled(self.chain(self.reduce(self.pool(x))))


class _SeparableConv(nn.Module):
    """timm's `SeparableConvNormAct`, but for its depthwise convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv2d(in_channels, stride)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = BatchNormAct2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv_pw(self.conv_dw(x)))
        return x


class _TokenEmbedding(nn.Module):
    def __init__(self, tap: Tap, width: int) -> None:
        super().__init__()
        self.tap = tap
        self.norm = nn.LayerNorm(tap.channels)
        self.expand = nn.Linear(tap.channels, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return mean_token(self.act(self.expand(self.norm(as_tokens(x, self.tap)))), self.tap)


def default_kwargs(point: ExitPoint, width: int) -> dict[str, int]:
    """Return the arguments of the default head of a width at a point; `expand` only where a map is tapped."""
    return {"width": width} | ({"expand": _EXPAND} if any(map(_is_map, point.taps)) else {})


def body_cost(tap: Tap, shape: Sequence[int], width: int, expand: int | None = None) -> tuple[int, int]:
    """Return the parameters of a body, and its multiply-accumulates for a tapped tensor of `shape`, one image's."""
    channels = tap.channels
    if not _is_map(tap):
        return 2 * channels + (channels + 1) * width, math.prod(shape) * width
    assert tap.grid is not None
    rows, columns = (math.ceil(side / 2) for side in tap.grid)
    widths, strides = _links(tap, width, expand)
    params, macs = (channels + 2) * widths[0], rows * columns * channels * widths[0]
    for (before, after), stride in zip(pairwise(widths), strides, strict=True):
        rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
        params += 9 * before + (before + 2) * after
        macs += rows * columns * before * (9 + after)
    return params, macs


def _is_map(tap: Tap) -> bool:
    return tap.layout in ("NCHW", "NHWC")


def _links(tap: Tap, width: int, expand: int | None) -> tuple[list[int], list[int]]:
    """Return the channels before, between and after the separable convolutions, and the stride of each."""
    times = range(halvings(tap))
    widths = [width if expand is None else min(width, expand * tap.channels * 2**n) for n in times]
    return [*widths, width], [2 for _ in times[1:]] + [1]


def resolve_budget(head: str, head_kwargs: object, head_budget: float | None) -> float | None:
    """Return the budget that chooses the widths of heads; None where `head` and `head_kwargs` say how wide they are."""
    if head == PROPORTIONAL and not head_kwargs:
        return DEFAULT_BUDGET if head_budget is None else head_budget
    if head_budget is not None:
        with_arguments = f" with head_kwargs {head_kwargs!r:.200}" if head_kwargs else ""
        raise ValueError(
            f"head_budget is {head_budget!r} for the head {head!r}{with_arguments}; allowed is None, as a budget "
            f"chooses the width of the heads {AUTO!r} and {PROPORTIONAL!r} where head_kwargs are not given."
        )
    return None


@dataclass(frozen=True)
class HeadBudget:
    """What the heads on a backbone may cost, for a `share` from above 0 to 1.

    A head may cost `share` of the backbone's multiply-accumulates, but no more than half of what its exit saves; all
    heads together may have 2.5 times `share` of its parameters, each the same part of it.
    """

    share: float
    found: Exploration
    backbone: Backbone

    def __post_init__(self) -> None:
        check("head_budget", self.share, Share)

    def width(self, point: ExitPoint, num_exits: int) -> int | None:
        """Return the largest width of a head that fits at one of `num_exits` points; None if none does."""
        widest = self.found.run.feature_dim
        widths: list[int] = [widest, *range((widest - 1) // _STEP * _STEP, self.min_width - 1, -_STEP)]
        for width in widths:
            macs, params = self.shares(point, width)
            if macs <= min(self.share, _OF_SAVED * (1 - point.cost)) and params <= _PARAMS * self.share / num_exits:
                return width
        return None

    @property
    def min_width(self) -> int:
        """The smallest width."""
        return min(_MIN_WIDTH, self.found.run.feature_dim)

    def shares(self, point: ExitPoint, width: int) -> tuple[float, float]:
        """Return the shares of the backbone's multiply-accumulates and parameters that a head of a width has."""
        feature_dim, num_classes = self.found.run.feature_dim, int(self.backbone.num_classes)
        shapes, kwargs = self.found.shapes(point), default_kwargs(point, width)
        bodies = [body_cost(tap, shape, **kwargs) for tap, shape in zip(point.taps, shapes, strict=True)]
        adapter = feature_dim if width != feature_dim else 0
        params = sum(body[0] for body in bodies) + (width + 1) * (num_classes + adapter)
        macs = sum(body[1] for body in bodies) + width * (num_classes + adapter)
        # A backbone of which no operation can be counted sets no limit to them.
        return macs / (self.found.run.total_macs or math.inf), params / self._params

    @cached_property
    def _params(self) -> int:
        return sum(parameter.numel() for parameter in self.backbone.parameters())

    def excess(self, points: Sequence[ExitPoint]) -> str:
        """Return a sentence on points where no head fits."""
        costs = [(point.name, *self.shares(point, self.min_width)) for point in points]
        listed = ", ".join(
            f"{name} ({macs:.1%} of the MACs, {params:.1%} of the parameters)" for name, macs, params in costs
        )
        return (
            f"No head fits head_budget={self.share:g} at {listed}: the smallest, of width {self.min_width}, was built "
            "there. Give a larger head_budget, other exits or fewer."
        )


class FittedExits(NamedTuple):
    """Exit points, the arguments of each one's head, and a warning where no head fits the budget."""

    taps: BackboneTaps
    head_kwargs: list[dict[str, int]]
    warning: str | None


def fit_heads(budget: HeadBudget, exits: Exits | None) -> FittedExits:
    """Choose exit points, in the forms of `wrap`, and the widths of their heads.

    Of a number of exits, and by default, only points where a head fits are chosen. By default there are fewer than
    three exits where heads fit at fewer points; points that are asked for are always taken.
    """
    found = budget.found
    if exits is None:
        useful = len(found.useful())
        counts = range(min(DEFAULT_EXITS, useful), 0, -1)
        taps = next(filter(None, (_choose_fitting(budget, count) for count in counts)), None)
        if useful and taps is None:
            raise ValueError(
                f"No head fits head_budget={budget.share:g} at any of this backbone's exit points: give a larger "
                'head_budget, name the exits (exits=[...]), or choose a head, such as "linear".'
            )
        taps = taps or choose(found, None)
    elif isinstance(exits, int):
        taps = _choose_fitting(budget, exits) or choose(found, exits)
    else:
        taps = choose(found, exits)
    widths = {point: budget.width(point, len(taps.points)) for point in taps.points}
    too_large = [point for point, width in widths.items() if width is None]
    head_kwargs = [default_kwargs(point, width or budget.min_width) for point, width in widths.items()]
    return FittedExits(taps, head_kwargs, budget.excess(too_large) if too_large else None)


def _choose_fitting(budget: HeadBudget, count: int) -> BackboneTaps | None:
    """Choose a number of exits among the points where a head fits, or None if these are fewer."""
    found = budget.found
    fitting = replace(found, points=tuple(p for p in found.useful() if budget.width(p, count) is not None))
    return choose(fitting, count) if 1 <= count <= len(fitting.points) else None
