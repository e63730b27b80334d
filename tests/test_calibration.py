"""The choice of early exit's settings, against arithmetic that is written out, and its guarantee by simulation."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.calibration import (
    ExitLogits,
    Goal,
    PathCosts,
    choose_settings,
    collect_logits,
    fit_temperatures,
    measure_path_macs,
    replay,
)
from timm_selfdistill.calibration.calibrate import images_to_time, measure_speedup
from timm_selfdistill.calibration.choose_settings import certified, excess_errors, upper_bound
from timm_selfdistill.calibration.threshold_search import Search, share_thresholds
from timm_selfdistill.early_exit import EarlyExitConfig, Line, Rule, StageCosts, exit_answers, exit_confidence
from timm_selfdistill.early_exit.rules import _RULES
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import Ensemble

MACS = PathCosts(backbone=(200, 400, 700, 1000), heads=(20, 30, 10))
RULES = ["max-softmax", "margin", "entropy", "patience"]


def made_up(count, seed=0, exits=3, classes=10):
    """Logits of images that are hard in different measure, and of exits that are better the deeper they are."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    hardness = torch.randn(count, generator=generator)
    logits = torch.randn(exits + 1, count, classes, generator=generator)
    for exit in range(exits + 1):
        logits[exit, torch.arange(count), targets] += 2.2 * (0.6 + 0.7 * exit - hardness).clamp(min=-0.5)
    return ExitLogits(logits, targets)


def accuracy(config, stored):
    return 100 * float((replay(config, stored.logits).logits.argmax(-1) == stored.targets).double().mean())


def cost(config, stored, macs=MACS):
    return macs.mean(config, replay(config, stored.logits).exit_index)


@pytest.fixture
def model():
    torch.manual_seed(4)  # with which the untrained exits agree on some images, and not on others
    return sd.wrap("test_resnet", num_classes=5, image_size=64).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 64, 64, generator=generator) * torch.linspace(0.1, 3, 8).view(-1, 1, 1, 1)


@torch.no_grad()
def centred(model, batch):
    """Give each untrained exit a bias under which it does not say the same of all images."""
    for head, logits in zip(model.heads, model(batch, return_exits=True).logits, strict=False):
        head.classifier.bias -= logits.mean(0)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("fallback", "running"), [("last", False), ("ensemble", False), ("last", True)])
@pytest.mark.parametrize("rule", RULES)
def test_replay_and_its_cost_are_those_of_the_network(model, batch, rule, fallback, running):
    centred(model, batch)
    stored = collect_logits(model, [(batch, torch.arange(8) % 5)])
    macs = measure_path_macs(model, (3, 64, 64))
    temperatures = (0.5, 0.25, 2.0)
    settings = sd.EarlyExitConfig((math.inf,) * 3, rule, temperatures, fallback, running)
    # Between two images, that let three of eight leave.
    answers = exit_answers(settings, stored.logits)
    rows = [row.sort(descending=True).values for row in exit_confidence(answers, settings)]
    first, second, third = (1, 1, 1) if rule == "patience" else (float(row[2:4].mean()) for row in rows)
    indices = set()
    for thresholds in ((first, second, third), (math.inf, second, math.inf)):
        fast = sd.EarlyExit.from_config(model, replace(settings, thresholds=thresholds))
        expected, out = fast(batch), replay(fast.config, stored.logits)
        assert torch.equal(out.exit_index, expected.exit_index)
        torch.testing.assert_close(out.logits, expected.logits)
        with MacCounter() as counter:
            for image in batch:
                fast(image.unsqueeze(0))
        assert macs.mean(fast.config, out.exit_index) == counter.macs / 8
        indices |= set(out.exit_index.tolist())
    assert len(indices) > 1


def test_macs_of_single_exits_are_those_of_the_report(model):
    macs = measure_path_macs(model, (3, 64, 64))
    image = torch.zeros(1, 3, 64, 64)
    for exit in range(4):
        with torch.no_grad(), MacCounter() as counter:
            model.forward_exit(image, exit)
        assert macs.exit(exit) == counter.macs
    with torch.no_grad(), MacCounter() as counter:
        model(image, return_exits=True)
    # Answers need no features of the teacher's width.
    adapters = sum(head.adapter.weight.numel() for head in model.heads if isinstance(head.adapter, nn.Linear))
    assert adapters
    assert macs.every_exit == counter.macs - adapters


def test_seconds_are_those_of_a_batch():
    costs = StageCosts(
        (Line(4, 1), Line(0, 3), Line(8, 0)), (Line(2, 1), Line(6, 0.5)), (Line(9, 9),) * 2, batch_size=4
    )
    seconds = PathCosts.of_batch(costs, 2)
    assert seconds == PathCosts((3.0, 6.0, 10.0), (2.0, 3.5))  # of one of two images
    assert seconds.paths([True, False]).tolist() == [5.0, 8.0, 12.0]


def test_the_speedup_is_that_of_what_runs(model, monkeypatch):
    # A clock that ticks with every convolution.
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    ticks = []
    for module in convolutions:
        module.register_forward_hook(lambda *arguments: ticks.append(None))
    monkeypatch.setattr("timm_selfdistill.measure.time.perf_counter", lambda: float(len(ticks)))

    def ran(exit):
        before = len(ticks)
        with torch.no_grad():
            model.forward_exit(torch.zeros(1, 3, 64, 64), exit)
        return len(ticks) - before

    images = torch.randn(5, 3, 64, 64)
    for exit in range(3):
        config = EarlyExitConfig(tuple(0.0 if index == exit else math.inf for index in range(3)))
        for batch_size in (1, 2, 8):
            assert measure_speedup(model, config, images, batch_size) == ran(3) / ran(exit)
    assert images_to_time(1) == 128
    assert images_to_time(256) == 1024


def test_a_head_that_takes_long_is_not_asked_where_time_counts():
    stored = made_up(400, 3, exits=2)
    macs, seconds = PathCosts((200, 400, 1000), (20, 30)), PathCosts((0.2, 0.4, 1.0), (2.0, 0.03))
    goal = Goal(max_accuracy_drop=1.0)
    assert choose_settings(stored, macs, goal).config.runs_head(0)
    assert not choose_settings(stored, seconds, goal).config.runs_head(0)


CONFIDENCE = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.9, 0.8, 0.7, 0.6]])


@pytest.mark.parametrize(
    ("base", "thresholds"),
    [
        (1, [0.75, 0.75]),  # 2 of 6 leave at each exit: those with 0.9 and 0.8, then the same of the four that are left
        (2, [math.inf, 0.85]),  # 6/7, 12/7 and 24/7 images: none, one, five
        (0.5, [0.65, 0.75]),  # 24/7, 12/7 and 6/7: three, then one of 0.8, 0.7, 0.6, then two
        (0, [0.4, math.inf]),  # all
        (1e-9, [0.45, math.inf]),  # all but what is less than one image
        (1e9, [math.inf, math.inf]),
    ],
)
def test_shares_of_msdnet(base, thresholds):
    assert share_thresholds(CONFIDENCE, base) == pytest.approx(thresholds)


def test_the_budget_solver_of_msdnet_keeps_to_its_budget_and_uses_it():
    stored = made_up(2000)
    search = Search(stored, MACS, sd.EarlyExitConfig((0.5,) * 3))
    for budget in (220, 300, 500, 800):
        found = search.shares_within(budget)
        assert 0.99 * budget <= found.cost <= budget
    assert search.shares_within(1060).thresholds == (math.inf,) * 3
    assert search.shares_within(219) is None


def test_temperatures_of_a_running_ensemble_are_fitted_to_its_answers():
    stored = made_up(200)
    ensemble = Ensemble((0.1, 0.2, 0.3, 0.4), images=50)
    stored = replace(stored, ensemble=ensemble)
    chosen = choose_settings(stored, MACS, Goal(speedup=1.3), fallback="ensemble", running_ensemble=True).config
    assert (chosen.running_ensemble, chosen.fallback) == (True, "ensemble")
    pools = torch.stack([ensemble.prefix(k)(stored.logits[: k + 1]) for k in range(3)])
    assert chosen.temperatures == pytest.approx(fit_temperatures(pools, stored.targets))
    assert chosen.temperatures != fit_temperatures(stored.logits[:-1], stored.targets)
    answers = replay(chosen, stored.logits, ensemble)
    assert MACS.mean(chosen, answers.exit_index) <= 1000 / 1.3
    assert 0 < answers.exit_index.double().mean() < 3


@pytest.mark.parametrize("fallback", ["last", "ensemble"])
@pytest.mark.parametrize("rule", RULES)
def test_the_search_is_as_good_as_fixed_exits_and_msdnet(rule, fallback):
    stored = made_up(400, seed=3)
    for budget in (450, 700):
        config = choose_settings(stored, MACS, Goal(macs_budget=budget), rule=rule, fallback=fallback).config
        search = Search(stored, MACS, config)
        never = (math.inf,) * 3
        rivals = [search.shares_within(budget), search.candidate(never)]
        rivals += [search.candidate((*never[:exit], 0.0, *never[exit + 1 :])) for exit in range(3)]
        affordable = [rival for rival in rivals if rival is not None and rival.cost <= budget]
        assert affordable
        assert cost(config, stored) <= budget
        assert accuracy(config, stored) >= max(rival.good for rival in affordable) / 4 - 1e-9


def test_the_search_finds_what_trying_everything_finds():
    gaps = []
    for seed in range(6):
        stored, macs = made_up(100, seed, exits=2), PathCosts((200, 400, 1000), (20, 30))
        search = Search(stored, macs, sd.EarlyExitConfig((0.5, 0.5)))
        every = [search.candidate(pair) for pair in itertools.product(*(row.tolist() for row in search._levels))]
        found = search.explore()
        for budget in (300, 500, 700):
            best = max(item.good for item in every if item.cost <= budget)
            gaps.append(best - max(item.good for item in found if item.cost <= budget))
        for item in found:
            config = sd.EarlyExitConfig(item.thresholds)
            assert accuracy(config, stored) == pytest.approx(item.good)
            assert cost(config, stored, macs) == pytest.approx(item.cost)
    assert max(gaps) <= 1


@pytest.mark.parametrize("rule", RULES)
def test_goals_are_kept(rule):
    stored = made_up(2000)
    full = 100 * float(stored.correct[-1].double().mean())
    costs = []
    for drop in (0, 0.5, 2):
        config = choose_settings(stored, MACS, Goal(max_accuracy_drop=drop), rule=rule).config
        assert accuracy(config, stored) >= full - drop - 1e-9
        costs.append(cost(config, stored))
    assert 1000 >= costs[0] > costs[1] > costs[2] or rule == "patience"
    budgeted = choose_settings(stored, MACS, Goal(macs_budget=600), rule=rule).config
    assert budgeted == choose_settings(stored, MACS, Goal(speedup=1000 / 600), rule=rule).config
    assert cost(budgeted, stored) <= 600
    assert budgeted.rule == rule
    assert (budgeted.temperatures is None) == (rule == "patience")


@pytest.mark.parametrize("fallback", ["last", "ensemble"])
@pytest.mark.parametrize(
    "goal", [Goal(max_accuracy_drop=10), Goal(speedup=1.5), Goal(risk=0.2)], ids=lambda goal: next(iter(goal.to_json()))
)
def test_other_scales_of_confidence_give_the_same_choice(monkeypatch, goal, fallback):
    class LogSoftmax(Rule):
        """The logarithm of "max-softmax": the same order, but from -infinity to 0."""

        lowest, highest = -math.inf, 0.0

        def confidence(self, logits, state):
            return logits.softmax(-1).amax(-1).log(), ()

    monkeypatch.setattr(_RULES, "_entries", dict(_RULES._entries))
    sd.register_rule("log-softmax")(LogSoftmax)
    stored = made_up(1000)
    own = choose_settings(stored, MACS, goal, rule="log-softmax", fallback=fallback)
    usual = choose_settings(stored, MACS, goal, fallback=fallback)
    assert own.tested == usual.tested
    assert len(own.curve) == len(usual.curve) > 5
    for one, other in zip((own.config, *own.curve), (usual.config, *usual.curve), strict=True):
        assert torch.equal(replay(one, stored.logits).exit_index, replay(other, stored.logits).exit_index)


def test_a_tie_goes_to_the_cheapest():
    stored = made_up(200)
    same = ExitLogits(stored.logits[-1:].expand(4, -1, -1), stored.targets)
    config = choose_settings(same, MACS, Goal(speedup=1)).config
    assert config.thresholds == (0, math.inf, math.inf)


def test_what_is_no_number_never_leaves():
    stored = made_up(400)
    stored.logits[:3, ::2] = math.nan
    for goal in (Goal(max_accuracy_drop=50), Goal(speedup=1.2), Goal(risk=0.2)):
        config = choose_settings(stored, MACS, goal).config
        index = replay(config, stored.logits).exit_index
        assert (index[::2] == 3).all()
        assert (index[1::2] < 3).any()
    stored.logits[:] = math.nan
    assert not stored.correct.any()
    assert not stored.ensemble_correct.any()


def test_bounds_of_the_binomial_distribution():
    def tail(losses, count, rate):
        return sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(losses + 1))

    for losses, count, rate in ((0, 10, 0.3), (3, 12, 0.2), (7, 9, 0.5)):
        exact = tail(losses, count, rate)
        assert certified([losses], count, rate, 1 - exact * (1 + 1e-6)) == 1
        assert certified([losses], count, rate, 1 - exact * (1 - 1e-6)) == 0
        assert tail(losses, count, upper_bound(losses, count, 0.9)) == pytest.approx(0.1)
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05**0.01)
    assert upper_bound(5, 5, 0.9) == 1
    assert certified([5], 5, 0.5, 1e-9) == 0
    # The tail is 0.08, to two digits.
    assert [certified([1200], 50000, 0.025, confidence) for confidence in (0.9, 0.95)] == [1, 0]


def test_an_unsafe_setting_is_certified_as_seldom_as_promised():
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.02, 0.04, 0.0501, 0.0502, 0.06, 0.04])
    draws = torch.rand(4000, 300, 1, generator=generator)
    losses = (draws < rates).sum(1)
    safe = [certified(row, 300, 0.05, 0.8) for row in losses.tolist()]
    share = sum(count > 2 for count in safe) / 4000
    assert 0.1 < share <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 4000)
    assert sum(count > 0 for count in safe) > 3000


def test_the_guarantee_holds_where_a_choice_by_the_same_images_does_not():
    world = made_up(20000, seed=7, exits=2, classes=4)
    macs = PathCosts((200, 400, 1000), (20, 30))
    broken = {"risk": 0, "max_accuracy_drop": 0}
    speedups = []
    for seed in range(24):
        drawn = world.select(torch.randint(20000, (300,), generator=torch.Generator().manual_seed(seed)))
        for goal in (Goal(risk=0.05, confidence=0.8), Goal(max_accuracy_drop=5)):
            config = choose_settings(drawn, macs, goal).config
            if goal.risk is not None:
                speedups.append(1000 / cost(config, world, macs))
                broken["risk"] += float(excess_errors(config, world).double().mean()) > 0.05
            else:
                drop = 100 * float(world.correct[-1].double().mean()) - accuracy(config, world)
                broken["max_accuracy_drop"] += drop > 5
    assert broken["risk"] <= 4  # a share of at most 1 - 0.8
    assert broken["max_accuracy_drop"] > 8
    assert sum(speedups) / 24 > 1.3


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "Give one of max_accuracy_drop, speedup, macs_budget, risk; got none"),
        ({"speedup": 2, "risk": 0.1}, "got speedup, risk"),
        ({"max_accuracy_drop": -0.5}, "max_accuracy_drop is -0.5; it must be percentage points, 0 to 100"),
        ({"max_accuracy_drop": math.nan}, "max_accuracy_drop is nan"),
        ({"speedup": 0.5}, "speedup is 0.5; it must be a factor of 1 or more"),
        ({"macs_budget": math.inf}, "macs_budget is inf; it must be a number of multiply-accumulates"),
        ({"risk": 0}, "risk is 0; it must be a probability above 0 and below 1"),
        ({"risk": 0.1, "confidence": 1}, "confidence is 1; it must be a probability"),
    ],
)
def test_goals_that_are_none(goal, message):
    with pytest.raises(ValueError, match=message):
        Goal(**goal)


def test_goals_that_cannot_be_reached_say_what_can():
    stored = made_up(300)
    with pytest.raises(ValueError, match=r"the cheapest exit costs 220, a speedup of 4.545 over the backbone's 1000"):
        choose_settings(stored, MACS, Goal(speedup=5))
    assert choose_settings(stored, MACS, Goal(speedup=1000 / 220)).config.thresholds == (0, math.inf, math.inf)
    with pytest.raises(ValueError, match=r"A risk of 0.001 .* of these 150 .* lose 0. A risk of 0.0152 can be"):
        choose_settings(stored, MACS, Goal(risk=0.001))
    poor = ExitLogits(stored.logits * torch.tensor([-9.0, -9, -9, 1]).view(4, 1, 1), stored.targets)
    with pytest.raises(ValueError, match=r"max_accuracy_drop 1 cannot be reached: .* points less"):
        choose_settings(poor, MACS, Goal(max_accuracy_drop=1), fallback="ensemble")
    with pytest.raises(ValueError, match="Unknown rule 'luck'; known are"):
        choose_settings(stored, MACS, Goal(speedup=2), rule="luck")
    with pytest.raises(ValueError, match="needs 2 images or more"):
        choose_settings(stored.select(torch.tensor([0])), MACS, Goal(risk=0.1))
