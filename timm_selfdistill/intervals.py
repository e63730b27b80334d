"""95 % confidence intervals of accuracies, and of the difference of two on the same images."""

import math
from statistics import NormalDist
from typing import Final

CONFIDENCE: Final = 0.95
_Z: Final = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def wilson_interval(hits: float, total: int) -> tuple[float, float]:
    """Return the score interval of a share, in percent.

    It is that of Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953: never empty, never outside 0 to 100,
    and close to its confidence for few images and for shares near 0 and 100, where the usual interval is not.

    Args:
        hits: How many images were right.
        total: Of how many, 1 or more.
    """
    share, squared = hits / total, _Z**2 / total
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / total + squared / (4 * total))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """Return the interval of the difference of two accuracies on the same images, in percentage points.

    It is Wald's interval of paired shares with the adjustment of Bonett and Price (2012),
    https://doi.org/10.3102/1076998611411915, which adds one image to each of the two counts; Fagerland, Lydersen and
    Laake (2014, https://doi.org/10.1002/sim.6148) recommend it. Images that both get right or both wrong only count in
    the total, as in McNemar's test.

    Args:
        gained: How many images only the first one got right.
        lost: How many only the second one got right.
        total: Number of images, 1 or more.
    """
    more, fewer, count = (gained + 1) / (total + 2), (lost + 1) / (total + 2), total + 2
    half = _Z * math.sqrt((more + fewer - (more - fewer) ** 2) / count)
    return 100 * max(-1.0, more - fewer - half), 100 * min(1.0, more - fewer + half)
