"""Cutout: a square of the training image is blotted out."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Cutout:
    """Fill a square around a random pixel with one colour; what lies outside the image is cut off.

    Paper: "Improved Regularization of Convolutional Neural Networks with Cutout", https://arxiv.org/abs/1708.04552;
    code: https://github.com/uoguelph-mlrg/Cutout, where odd sides come out one pixel shorter.

    Args:
        side: Height and width of the square in pixels.
        fill: The colour, one value a channel.
    """

    def __init__(self, side: int, fill: Sequence[float]) -> None:
        self.side = side
        self.fill = torch.tensor(fill)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """Return an image [C, H, W] with the square in it."""
        height, width = image.shape[1:]
        top, left = (int(torch.randint(size, ())) - self.side // 2 for size in (height, width))
        image = image.clone()
        image[:, max(0, top) : top + self.side, max(0, left) : left + self.side] = self.fill
        return image
