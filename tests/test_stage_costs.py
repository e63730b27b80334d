"""What the parts of a network with early exit take, and that a batch shrinks only where it pays."""

import math

import pytest
import torch

import timm_selfdistill as sd
from timm_selfdistill.early_exit import EarlyExitConfig, Line, StageCosts, measure_stage_costs, stage_costs

COSTS = StageCosts(
    stages=(Line(1, 0.5), Line(1, 0.25), Line(2, 0.5)),
    heads=(Line(0.5, 0.25), Line(0.25, 0.125)),
    takes=(Line(1, 0.25), Line(0, 0)),
    batch_size=8,
)


@pytest.fixture
def model(tiny_net):
    torch.manual_seed(0)
    return sd.wrap(tiny_net(), image_size=32, head="linear").eval()


def test_a_batch_shrinks_where_the_rest_saves_more_than_taking_the_rows_costs():
    # The rest takes 0.75 for a row, or with the second head 0.875; taking n rows costs 1 + n / 4.
    for left, with_head, without in ((7, False, False), (6, False, False), (5, True, False), (4, True, True)):
        assert COSTS.saves(0, 8, left, (True, True)) is with_head
        assert COSTS.saves(0, 8, left, (True, False)) is without
    assert COSTS.saves(1, 8, 7, (True, True))
    assert not COSTS.saves(1, 8, 8, (True, True))


def test_seconds_to_an_exit_are_those_of_all_that_runs():
    assert COSTS.seconds_to(0, 4, (False, False)) == 1 + 2 + 0.5 + 1
    assert COSTS.seconds_to(1, 2, (False, True)) == (1 + 1) + (1 + 0.5) + (0.25 + 0.25)
    assert COSTS.seconds_to(2, 2, (True, False)) == (1 + 1) + (1 + 0.5) + (2 + 1) + (0.5 + 0.5)


def test_they_are_measured_with_a_clock(model, monkeypatch):
    """Each part of a forward of n images takes 1 + n seconds on a clock that ticks at the marks."""
    now = [0.0]

    def clock():
        now[0] += 1 + rows[0]
        return now[0]

    rows = [0]
    model.backbone.register_forward_pre_hook(lambda module, args: rows.__setitem__(0, len(args[0])))
    monkeypatch.setattr(stage_costs.time, "perf_counter", clock)
    monkeypatch.setattr(stage_costs, "_SECONDS", 0.0)
    config = EarlyExitConfig((math.inf,) * model.num_exits)
    costs = measure_stage_costs(model, config, 8)
    assert (costs.batch_size, costs.device) == (8, "cpu")
    for lines in (costs.stages[1:], costs.heads, costs.takes):
        assert [line.at(4) for line in lines] == pytest.approx([5.0] * len(lines), rel=1e-6)
        assert [line.fixed for line in lines] == pytest.approx([1.0] * len(lines), rel=1e-6)
    assert len(costs.stages) == model.num_exits + 1


def test_a_line_is_never_negative():
    assert stage_costs._fit([1, 2, 4], [1.0, 3.0, 7.0]).fixed == 0
    falling = stage_costs._fit([1, 2, 4], [3.0, 2.0, 1.0])
    assert (falling.fixed, falling.per_row) == (2.0, 0.0)


def test_answers_do_not_depend_on_the_costs(model):
    batch = torch.randn(8, 3, 32, 32)
    exits = model.num_exits
    with torch.no_grad():
        every = model(batch, return_exits=True).logits[:exits]
        thresholds = [float(z.softmax(-1).amax(-1).median()) for z in every]
        expected = sd.EarlyExit(model, thresholds)(batch)
        assert len(expected.exit_index.unique()) > 1
        sizes = []
        model.backbone.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        for take, shrinks in ((0.0, True), (1e9, False)):
            parts = ((Line(0, 1),) * (exits + 1), (Line(0, 1),) * exits, (Line(take, 0),) * exits)
            fast = sd.EarlyExit(model, thresholds, costs=StageCosts(*parts, batch_size=8))
            sizes.clear()
            out = fast(batch)
            assert torch.equal(out.exit_index, expected.exit_index)
            torch.testing.assert_close(out.logits, expected.logits)
            assert (sizes[-1] < 8) is shrinks


def test_measured_costs_are_saved_with_the_settings(model, monkeypatch):
    monkeypatch.setattr(stage_costs, "_SECONDS", 0.0)
    monkeypatch.setattr(stage_costs, "_MIN_ROUNDS", 1)
    fast = sd.EarlyExit(model, 0.5)
    before = fast.config.to_json()
    costs = fast.measure(2)
    assert fast.config.costs == costs
    again = EarlyExitConfig.from_json(fast.config.to_json())
    assert again == fast.config
    assert sd.EarlyExit.from_config(model, again).config == fast.config
    assert "costs" not in before
    assert EarlyExitConfig.from_json(before).costs is None
    with pytest.raises(ValueError, match="batch_size is 0; allowed is 1 or more"):
        fast.measure(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"takes": [[0, 0]]}, "costs have 3 stages, 2 heads and 1 takes"),
        ({"stages": [[1, 1], [1, -1], [1, 1]]}, "allowed are seconds, finite and not negative"),
        ({"stages": [[1, 1], [1, 1], [1, math.nan]]}, "allowed are seconds, finite and not negative"),
        ({"heads": [[1, 1], [1]]}, "they must have the keys batch_size, device, heads, stages, takes"),
        ({"heads": None}, "they must have the keys"),
        ({"batch_size": "8"}, "they must have the keys"),
        ({"batch_size": 0}, "batches of 0; allowed is 1 or more"),
        ({"more": 1}, "they must have the keys"),
    ],
)
def test_wrong_costs(change, message):
    assert StageCosts.from_json(COSTS.to_json()) == COSTS
    with pytest.raises(ValueError, match=message):
        StageCosts.from_json(COSTS.to_json() | change)


def test_costs_of_other_exits_are_refused():
    with pytest.raises(ValueError, match="3 thresholds, but costs of 2 exits"):
        EarlyExitConfig((0.5,) * 3, costs=COSTS)
