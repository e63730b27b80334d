"""What the bodies of heads share: their registry, and how they read tensors of any layout."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_selfdistill.checks import is_integer
from timm_selfdistill.exits import Tap
from timm_selfdistill.registry import Registry

HEADS: Registry[type[nn.Module]] = Registry("head", "timm_selfdistill.heads")


def register_head(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that registers a module as the head `name`.

    It is made with `(tap: Tap, feature_dim: int, **head_kwargs)`, feature_dim being the width D of the teacher's
    feature, and maps the tapped tensor to a feature [B, D], which the exit's linear classifier reads. A body whose
    attribute `out_features` says another width W returns [B, W]; a linear layer then makes the feature of it.

    Args:
        name: What `wrap` and recipes call it.

    Raises:
        ValueError: If the name is taken.
    """
    return HEADS.register(name)


def list_heads() -> list[str]:
    """Return the names of all registered heads; "auto" and "published", which choose one, are allowed too."""
    return HEADS.names()


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


def pooled(x: Tensor) -> Tensor:
    """Return the mean over the positions of a feature map [B, C, H, W]."""
    return x.mean((2, 3))


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
    if tap.grid is None:
        raise ValueError(f"The tokens of {tap.name!r} form no grid: choose the head token or linear.")
    return min(3, max(1, round(math.log2(tap.downsample))))
