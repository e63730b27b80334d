"""Read a tapped tensor of any layout as a feature map or as tokens."""

import math

from torch import Tensor

from timm_selfdistill.exits import Tap


def as_map(x: Tensor, tap: Tap) -> Tensor:
    """Return a tapped tensor of any layout as a feature map [B, C, H, W], without its prefix tokens."""
    if tap.layout == "NCHW":
        return x
    if tap.layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    rows, columns = grid_of(tap)
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


def grid_of(tap: Tap) -> tuple[int, int]:
    """Return the tap's grid, which a convolutional head needs."""
    if tap.grid is None:
        raise ValueError(f"The tokens of {tap.name!r} form no grid: choose the head token or linear.")
    return tap.grid
