"""Distribution-free bounds on how often something goes wrong, from how often it did."""

import math
from collections.abc import Sequence
from typing import Final

import torch

_HALVINGS: Final = 60


def binomial_tail(losses: int, count: int, rate: float) -> float:
    """Return the probability of at most `losses` losses among `count` images, each lost with probability `rate`."""
    if losses >= count:
        return 1.0
    k = torch.arange(losses + 1, dtype=torch.float64)
    n = torch.tensor(count, dtype=torch.float64)
    choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, float((choices + k * math.log(rate) + (n - k) * math.log1p(-rate)).logsumexp(0).exp()))


def upper_bound(losses: int, count: int, confidence: float) -> float:
    """Return the bound of Clopper and Pearson: with this confidence, the rate of losses is at most this.

    Args:
        losses: How many images were lost.
        count: Of how many, drawn independently.
        confidence: 0 to 1, without either.
    """
    if losses >= count:
        return 1.0
    low, high = losses / count, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(losses, count, middle) > 1 - confidence else (low, middle)
    return high


def certified(losses: Sequence[int], count: int, risk: float, confidence: float) -> int:
    """Return how many settings of a sequence, from its start, are safe, all of them with this confidence.

    A fixed sequence of tests, each exact: setting after setting, until one cannot be told from one whose rate of losses
    is above `risk`. As the first unsafe one is taken for safe with probability 1 - `confidence` at most, and nothing
    behind it is tested unless it was, no correction for their number is needed.

    Paper: "Learn then Test", https://arxiv.org/abs/2110.01052. The sequence must not have been chosen by these images.

    Args:
        losses: How many of the images each setting lost.
        count: Number of images, drawn independently.
        risk: The rate of losses that is allowed, 0 to 1.
        confidence: 0 to 1.
    """
    for place, lost in enumerate(losses):
        if binomial_tail(lost, count, risk) > 1 - confidence:
            return place
    return len(losses)
