"""Exits that do not pay are closed: the expected time of a batch, and which thresholds become infinite."""

import math

import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill.early_exit import EarlyExitConfig, Line, StageCosts, early_exit, path_costs

K = 2


def costs(stages=(1, 1, 4), heads=(1, 1), takes=(0, 0), fixed=False):
    """Each part takes so many seconds: a row, or with `fixed` a batch."""
    lines = [tuple(Line(n, 0) if fixed else Line(0, n) for n in part) for part in (stages, heads, takes)]
    return StageCosts(*lines, batch_size=8)


@pytest.fixture
def model(tiny_net):
    torch.manual_seed(0)
    return sd.wrap(tiny_net(), exits=["stage0", "stage1"], image_size=32, head="linear").eval()


def test_expected_seconds_are_those_of_the_parts_that_run():
    config, shares = EarlyExitConfig((0.5, math.inf)), (1.0, 0.5, 0.5)
    parts = costs((1, 2, 4), (8, 16), (32, 64))
    # Exit 1 has no head to run. A single image is never taken out of a batch.
    assert path_costs.expected_seconds(config, parts, shares, 1, (True, True)) == 1 + 8 + 0.5 * (2 + 4)
    assert path_costs.expected_seconds(config, parts, shares, 4, (True, True)) == 4 * (1 + 8) + 2 * (32 + 2 + 4)
    # A stage runs where one of its four images did not leave.
    fixed = costs((1, 2, 4), (8, 16), (32, 64), fixed=True)
    runs = 1 - 0.5**4
    assert path_costs.expected_seconds(config, fixed, shares, 4, (True, True)) == 1 + 8 + runs * (32 + 2 + 4)
    # And on all of them where the batch cannot shrink.
    assert path_costs.expected_seconds(config, parts, shares, 4, (False, True)) == 4 * 9 + 4 * runs * 2 + 2 * 4


@pytest.mark.parametrize(
    ("parts", "leaving", "closed"),
    [
        (costs(), [1.0, 0.0], [False, False]),  # all leave at exit 0: the head of exit 1 never runs
        (costs(), [0.0, 0.0], [True, True]),
        (costs(), [0.0, 0.75], [True, False]),
        (costs(heads=(4, 4)), [0.25, 0.5], [True, True]),
        (costs(heads=(0.1, 0.1)), [0.5, 0.5], [False, False]),
        (costs(heads=(0.1, 0.1)), [0.03, 0.0], [True, True]),  # what it saves is less than the times are exact to
    ],
)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_exits_that_do_not_pay_are_closed(model, monkeypatch, parts, leaving, closed, batch_size):
    """So large a share of the images that reach an exit leaves there."""
    confidence = torch.zeros(K, 400)
    for exit, share in enumerate(leaving):
        reach = (confidence[:exit] < 0.5).all(0).nonzero().squeeze(1)
        confidence[exit, reach[: round(share * len(reach))]] = 1
    monkeypatch.setattr(path_costs, "exit_confidence", lambda answers, config: confidence)
    config = EarlyExitConfig((0.5, 0.5))
    found = path_costs.close_exits(model, config, parts, torch.zeros(4, 3, 32, 32), batch_size, (True, True))
    assert [value == math.inf for value in found.thresholds] == closed


@pytest.mark.parametrize("batch_size", [1, 5])
def test_measure_closes_exits_by_images(model, monkeypatch, batch_size):
    images = torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        first = model(images, return_exits=True).logits[0].softmax(-1).amax(-1)
    dear, cheap = costs(heads=(9, 9)), costs(heads=(0.25, 9))
    for parts, thresholds in ((dear, [math.inf] * K), (cheap, [float(first.median()), math.inf])):
        monkeypatch.setattr(early_exit, "measure_stage_costs", lambda *args, parts=parts: parts)
        fast = sd.EarlyExit(model, [float(first.median()), 1.0])
        assert fast.measure(batch_size) == parts
        assert fast.config.thresholds == (float(first.median()), 1.0)
        assert fast.measure(batch_size, images=images) == parts
        assert list(fast.config.thresholds) == thresholds
        assert fast.config.costs == parts
        with torch.no_grad():
            expected = sd.EarlyExit(model, thresholds)(images)
            torch.testing.assert_close(fast(images), expected)
    for wrong in (images[:0], images[0]):
        with pytest.raises(ValueError, match=r"allowed is \[N, C, H, W\], N at least 1"):
            fast.measure(4, images=wrong)


def test_patience_runs_no_head_where_no_later_exit_is_open():
    runs = EarlyExitConfig((math.inf, 1, math.inf), "patience").heads_run
    assert runs == (True, True, False)
    assert not EarlyExitConfig((math.inf,) * 3, "patience").runs_heads
    assert EarlyExitConfig((math.inf,) * 3, "patience", fallback="ensemble").runs_heads
