"""The default head: a body of one width, which the budget of the exits chooses."""

import math
from collections.abc import Sequence

from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn

from timm_selfdistill.exits import Tap
from timm_selfdistill.heads.body import (
    DepthwiseConv2d,
    as_tokens,
    checked_map,
    checked_width,
    halvings,
    pooled,
    register_head,
)


@register_head("proportional")
class Proportional(nn.Module):
    """Head in proportion to its backbone: whatever costs much is done at `width` channels and on few positions.

    A feature map is halved by mean pooling and brought to the width by a 1x1 convolution. A chain of separable 3x3
    convolutions follows, and the mean over the positions. All but the last have stride 2, and bring the map down to the
    grid of the backbone's deepest one: the shallower the exit, the longer the chain (3, 2 and 1 of them on a ResNet).
    Tokens get layer norm, a linear layer to the width and GELU; prefix tokens together weigh as much in their mean as
    all tokens of the grid.

    The classifier reads the embedding of this width. The feature that hints compare with the teacher's is a linear
    layer on it, which inference does not need.

    Args:
        tap: What is read.
        feature_dim: Width D of the teacher's feature.
        width: Channels inside, and of the embedding; D by default. `wrap` chooses it by `head_budget`.
    """

    def __init__(self, tap: Tap, feature_dim: int, width: int | None = None) -> None:
        super().__init__()
        self.out_features = checked_width(feature_dim if width is None else width)
        embed = _MapEmbedding if _is_map(tap) else _TokenEmbedding
        self.embed = embed(tap, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.embed(x)
        return embedding


class _MapEmbedding(nn.Module):
    def __init__(self, tap: Tap, width: int) -> None:
        super().__init__()
        self.tap = tap
        # Each output is a mean over what there is of its 3x3 window: every position counts, at any size of the map.
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.reduce = ConvNormAct(tap.channels, width, 1)
        self.chain = nn.Sequential(*(_SeparableConv(width, s) for s in _strides(tap)))

    def forward(self, x: Tensor) -> Tensor:
        x = checked_map(self, self.tap, x, 2 ** len(self.chain))
        return pooled(self.chain(self.reduce(self.pool(x))))


class _SeparableConv(nn.Module):
    """timm's `SeparableConvNormAct`, but for its depthwise convolution."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv2d(width, stride)
        self.conv_pw = nn.Conv2d(width, width, 1, bias=False)
        self.bn = BatchNormAct2d(width)

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
        x = self.act(self.expand(self.norm(as_tokens(x, self.tap))))
        prefix = self.tap.num_prefix_tokens
        mean = x[:, prefix:].mean(1)
        return (mean + x[:, :prefix].mean(1)) / 2 if prefix else mean


def body_cost(tap: Tap, shape: Sequence[int], width: int) -> tuple[int, int]:
    """Return the parameters of a body, and its multiply-accumulates for one image.

    Args:
        tap: What is read.
        shape: Shape of the tapped tensor for one image.
        width: The body's width.
    """
    channels = tap.channels
    if not _is_map(tap):
        return 2 * channels + (channels + 1) * width, math.prod(shape) * width
    assert tap.grid is not None
    rows, columns = (math.ceil(side / 2) for side in tap.grid)
    params, macs = (channels + 2) * width, rows * columns * channels * width
    for stride in _strides(tap):
        rows, columns = math.ceil(rows / stride), math.ceil(columns / stride)
        params += (9 + width + 2) * width
        macs += rows * columns * (9 + width) * width
    return params, macs


def _is_map(tap: Tap) -> bool:
    return tap.layout in ("NCHW", "NHWC")


def _strides(tap: Tap) -> tuple[int, ...]:
    """Return the strides of the separable convolutions: with the pooling, they halve the grid 1 to 3 times."""
    return (2,) * (halvings(tap) - 1) + (1,)
