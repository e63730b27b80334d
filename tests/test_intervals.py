"""Confidence intervals of accuracies and of their differences."""

import math

import numpy as np
import pytest
from scipy import stats

from timm_selfdistill.intervals import paired_interval, wilson_interval


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (7, 10), (95, 100), (3601, 10_000)])
def test_wilson_is_scipys(hits: int, total: int) -> None:
    expected = stats.binomtest(hits, total).proportion_ci(0.95, "wilson")
    assert wilson_interval(hits, total) == pytest.approx((100 * expected.low, 100 * expected.high))


def test_four_more_of_a_hundred_are_no_sure_gain() -> None:
    # (4 + 1) / 102 and (0 + 1) / 102, as Bonett and Price write it.
    more, fewer = 5 / 102, 1 / 102
    half = 1.959963985 * math.sqrt((more + fewer - (more - fewer) ** 2) / 102)
    assert paired_interval(4, 0, 100) == pytest.approx((100 * (more - fewer - half), 100 * (more - fewer + half)))
    low, high = paired_interval(4, 0, 100)
    assert low < 0 < high
    assert paired_interval(0, 4, 100) == pytest.approx((-high, -low))


def test_the_paired_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for gained, lost, total in ((0.08, 0.04, 100), (0.02, 0.02, 200), (0.10, 0.02, 50)):
        drawn = rng.multinomial(total, [gained, lost, 1 - gained - lost], 2_000)
        intervals = [paired_interval(int(more), int(fewer), total) for more, fewer, _ in drawn]
        held = np.mean([low <= 100 * (gained - lost) <= high for low, high in intervals])
        assert held > 0.94
