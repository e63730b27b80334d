"""How much faster a network is with early exit, by running it with and without."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig
from timm_selfdistill.measure import seconds_of
from timm_selfdistill.model import SelfDistillModel

_FEWEST_IMAGES: Final = 128
_FEWEST_BATCHES: Final = 4
_ROUNDS: Final = 3


def images_to_time(batch_size: int) -> int:
    """Return how many images are enough to tell how fast batches of this size are."""
    return max(_FEWEST_IMAGES, _FEWEST_BATCHES * batch_size)


@torch.no_grad()
def measure_speedup(model: SelfDistillModel, config: EarlyExitConfig, images: Tensor, batch_size: int) -> float:
    """Time a model with early exit and its plain backbone on the same images, batch by batch in turns.

    Args:
        model: The wrapped model, in eval mode.
        config: When images leave.
        images: Images [N, C, H, W], drawn like those that the answer is for; if there are fewer than `batch_size`, they
            are repeated, and what does not fill a batch is left out.
        batch_size: Images in a batch.

    Returns:
        The backbone's time over that with early exit: the median of three rounds over the images.
    """
    images = images.repeat(-(-batch_size // len(images)), 1, 1, 1).to(next(model.parameters()))
    batches = [batch for batch in torch.split(images, batch_size) if len(batch) == batch_size]
    ways: tuple[Callable[[Tensor], object], ...] = (model, EarlyExit.from_config(model, config))
    for way in ways:
        way(batches[0])
    ratios = []
    for _ in range(_ROUNDS):
        seconds = [0.0, 0.0]
        for batch in batches:
            for index, way in enumerate(ways):
                seconds[index] += seconds_of(partial(way, batch), batch.device)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
