"""The temperature of each exit: how far its logits must be divided for its probabilities to be honest."""

import math
from typing import Final

from torch import Tensor

_COLDEST: Final = 0.05
_HOTTEST: Final = 20.0
# Halvings of the interval on a logarithmic scale: to 1e-8 of the temperature.
_STEPS: Final = 30


def fit_temperatures(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Return for each exit the temperature that minimises the cross-entropy on held-out images.

    Paper: "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599. Unlike there, the target has
    the probability 1 - 1 / (N + 2) and the other classes share the rest, as Platt scaling has it: an exit that is right
    on all N images would otherwise get a temperature of 0, under which it is equally sure of everything.

    Args:
        logits: Logits [K, N, C].
        targets: Class indices [N].

    Returns:
        K temperatures between 0.05 and 20; 1 for an exit whose logits say nothing: all equal, or none a number.
    """
    return tuple(_fit(row, targets) for row in logits.float())


def _fit(logits: Tensor, targets: Tensor) -> float:
    """Find where the slope of the cross-entropy over 1 / T, in which it is convex, changes its sign."""
    finite = logits.isfinite().all(-1)
    logits, targets = logits[finite], targets[finite]
    count, classes = logits.shape
    # Subtracting what is the same for all classes changes no probability, and keeps the sums below small.
    logits = logits - logits.mean(-1, keepdim=True)
    if not count or logits.abs().max() <= 1e-6:
        return 1.0
    rest = 1 / (count + 2)
    of_target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    of_others = (logits.sum(-1) - of_target) / (classes - 1)
    wanted = ((1 - rest) * of_target + rest * of_others).double().mean()

    def slope(temperature: float) -> float:
        expected = ((logits / temperature).softmax(-1) * logits).sum(-1).double().mean()
        return float(expected - wanted)

    cold, hot = math.log(_COLDEST), math.log(_HOTTEST)
    for _ in range(_STEPS):
        middle = (cold + hot) / 2
        # Sharper probabilities expect larger logits: where they expect too large ones, it must be hotter.
        cold, hot = (middle, hot) if slope(math.exp(middle)) > 0 else (cold, middle)
    return math.exp((cold + hot) / 2)
