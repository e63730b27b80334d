"""Logits of a split, the temperatures and the ensemble that are fitted on them: what is minimised, what is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import timm_selfdistill as sd
from timm_selfdistill.early_exit import replay
from timm_selfdistill.exit_logits import _BIAS_PULL, _PULL, ExitLogits, collect_logits, fit_temperatures

CLASSES = 7


def answers(count: int, noise: tuple[float, ...] = (6.0, 2.0, 1.0), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits [K + 1, N, C] of outputs that are right the less often the noisier they are, and targets [N]."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (count,), generator=generator)
    right = 3 * torch.eye(CLASSES)[target]
    return torch.stack([right + n * torch.randn(count, CLASSES, generator=generator) for n in noise]), target


def objective(weights: Tensor, bias: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Return what is minimised, as the docstring says it."""
    loss = cross_entropy(torch.einsum("k,knc->nc", weights, logits) + bias, target, reduction="sum")
    loss = loss + _PULL * ((weights - weights.mean()) ** 2).sum() + (weights.sum() - 1) ** 2 / 2
    return loss + _BIAS_PULL * (bias**2).sum()


def accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(-1) == target).double().mean())


@pytest.mark.parametrize("count", [10, 300])
def test_no_other_weights_are_better(count: int) -> None:
    logits, target = answers(count)
    logits[:, :, 2] += 1.5  # a class that all outputs say too often
    ensemble = sd.fit_ensemble(logits=logits, target=target)
    found, bias = torch.tensor(ensemble.weights), torch.tensor(ensemble.bias or [0.0] * CLASSES)
    assert count < 100 or bias.argmin() == 2
    best = objective(found, bias, logits, target)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            other = (found + size * torch.randn(3, generator=generator)).clamp_min(0)
            shifted = bias + bool(ensemble.bias) * size * torch.randn(CLASSES, generator=generator)
            assert objective(other, shifted, logits, target) >= best - 1e-4


def test_weak_exits_count_less_and_the_ensemble_is_better_than_the_mean_on_other_images() -> None:
    ensemble = sd.fit_ensemble(logits=answers(500)[0], target=answers(500)[1])
    assert ensemble.weights[0] < ensemble.weights[1] < ensemble.weights[2]
    logits, target = answers(4000, seed=3)
    assert accuracy(ensemble(logits), target) > accuracy(logits.mean(0), target) + 0.05


def test_each_running_ensemble_is_fitted_as_if_there_were_no_deeper_exits() -> None:
    logits, target = answers(300, (8.0, 6.0, 1.0, 0.5))
    ensemble = sd.fit_ensemble(logits=logits, target=target)
    for exit in range(1, 3):
        alone = sd.fit_ensemble(logits=logits[: exit + 1], target=target)
        # A bias, which matters little here, may be kept in the one and not in the other.
        assert ensemble.prefix(exit).weights == pytest.approx(alone.weights, rel=0.05)
    assert ensemble.prefix(3) is ensemble
    assert ensemble.prefix(0).weights[0] > 0
    # Weak exits that count little among all count among themselves.
    assert ensemble.weights[0] < 0.05 < ensemble.prefix(1).weights[0] / ensemble.prefix(1).weights[1]


def test_without_running_weights_the_same_weights_count() -> None:
    ensemble = sd.Ensemble((0.0, 0.2, 0.3, 0.5), images=9)
    assert ensemble.prefix(0).weights == (1.0,)
    assert ensemble.prefix(1).weights == pytest.approx((0.0, 1.0))
    assert ensemble.prefix(2).weights == pytest.approx((0.0, 0.4, 0.6))
    assert sd.Ensemble.mean(4).prefix(1).weights == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_a_bias_is_kept_where_it_helps_on_images_that_it_was_not_fitted_on(shift: float) -> None:
    logits, target = answers(200)
    logits[:, :, 2] += shift
    ensemble = sd.fit_ensemble(logits=logits, target=target)
    assert (ensemble.bias is not None) == (shift > 0)
    assert all((ensemble.prefix(exit).bias is not None) == (shift > 0) for exit in range(2))


def test_with_one_image_it_is_the_mean_but_for_its_scale() -> None:
    logits, target = answers(1)
    weights = torch.tensor(sd.fit_ensemble(logits=logits, target=target).weights)
    assert (weights / weights.mean() - 1).abs().max() < 0.15


def test_images_in_another_order_give_the_same_weights() -> None:
    logits, target = answers(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    first = sd.fit_ensemble(logits=logits, target=target)
    second = sd.fit_ensemble(logits=logits[:, order], target=target[order])
    assert first.weights == pytest.approx(second.weights, abs=1e-4)


def test_an_exit_that_is_always_wrong_weighs_nothing() -> None:
    logits, target = answers(1000)
    logits[0] = -5 * torch.eye(CLASSES)[target]
    found = sd.fit_ensemble(logits=logits, target=target)
    assert found.weights[0] == 0
    assert found.prefix(0).weights == (1.0,)


def test_a_loader_gives_what_its_logits_give_and_the_model_keeps_it() -> None:
    torch.manual_seed(0)
    model = sd.wrap("test_resnet", num_classes=CLASSES, image_size=32).train()
    images, target = torch.randn(12, 3, 32, 32), torch.randint(CLASSES, (12,))
    assert model.ensemble == sd.Ensemble.mean(model.num_exits + 1)
    found = sd.fit_ensemble(model, [(images[:8], target[:8]), (images[8:], target[8:])])
    assert model.training
    with torch.no_grad():
        logits = torch.stack(model.eval()(images, return_exits=True).logits)
    assert found.weights == pytest.approx(sd.fit_ensemble(logits=logits, target=target).weights, abs=1e-4)
    assert model.ensemble is found
    expected = torch.einsum("k,kbc->bc", torch.tensor(found.weights), logits) + torch.tensor(found.bias or 0.0)
    assert torch.allclose(found(logits), expected, atol=1e-5)


def test_images_without_label_or_finite_logits_do_not_count() -> None:
    logits, target = answers(50)
    more = torch.cat([logits, torch.full((3, 2, CLASSES), float("nan"))], 1)
    labels = torch.cat([target, torch.tensor([1, -100])])
    assert sd.fit_ensemble(logits=more, target=labels).weights == sd.fit_ensemble(logits=logits, target=target).weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a model and a loader"),
        ({"logits": torch.zeros(2, 4, 3)}, "either a model and a loader"),
        ({"logits": torch.zeros(2, 4, 3), "target": torch.zeros(3, dtype=torch.long)}, r"\[2, 4, 3\] and .* \[3\]"),
        ({"logits": torch.zeros(2, 4, 3), "target": torch.zeros(4)}, "class indices"),
        ({"logits": torch.zeros(2, 4, 3), "target": torch.full((4,), 3)}, "0..2; got 3 to 3"),
        ({"logits": torch.zeros(2, 4, 3), "target": torch.full((4,), -100)}, "no images"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.fit_ensemble(**arguments)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_weights_that_make_no_ensemble_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be finite, at least 0"):
        sd.Ensemble(weights)


def test_an_ensemble_survives_json_and_says_what_is_none() -> None:
    running = (sd.Ensemble((1.0,), 7, (0.5, -0.5)), sd.Ensemble((0.5, 0.0), 7, (0.0, 1.0)))
    for ensemble in (sd.Ensemble((0.25, 0.5)), sd.Ensemble((0.25, 0.5, 1.0), 7, (0.1, -0.2), running)):
        assert sd.Ensemble.from_json(json.loads(json.dumps(ensemble.to_json()))) == ensemble
    assert sd.Ensemble.from_json({"weights": [0.25, 0.5]}) == sd.Ensemble((0.25, 0.5))  # as it was saved at first
    good = {"weights": [0.25, 0.5]}
    wrongs: list[Any] = [{}, {"weights": 3}, {"weights": ["x"]}, [], good | {"images": 0}, good | {"images": 1.5}]
    one: dict[str, Any] = {"weights": [1.0]}
    wrongs += [good | {"running": running} for running in ([one, good], [], [{"weights": [-1.0]}], [1.0], 3)]
    wrongs += [good | {"bias": ["x"]}, good | {"bias": [math.inf]}, good | {"bias": 3}]
    wrongs += [good | {"bias": [0.5, 0.5], "running": [one]}, good | {"running": [one | {"bias": [0.5]}]}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"weights|could not convert|number of images|running|bias"):
            sd.Ensemble.from_json(wrong)


def test_a_fitted_ensemble_is_saved_with_the_model_and_the_mean_is_not(tmp_path: Path) -> None:
    model = sd.wrap("test_resnet", num_classes=CLASSES, image_size=64).eval()
    sd.save_pretrained(model, tmp_path / "mean")
    assert json.loads((tmp_path / "mean/config.json").read_text())["timm_selfdistill"]["ensemble"] is None
    assert sd.from_pretrained(tmp_path / "mean").ensemble.is_mean
    model.ensemble = sd.Ensemble((0.25,) + (0.5,) * model.num_exits)
    sd.save_pretrained(model, tmp_path / "fitted")
    assert sd.from_pretrained(tmp_path / "fitted").ensemble == model.ensemble
    assert copy.deepcopy(model).ensemble == model.ensemble
    model.reset_classifier(CLASSES)
    assert model.ensemble.is_mean


@pytest.mark.parametrize(
    "saved",
    [{"weights": [1.0]}, {"weights": [0, 0, 0, 0]}, {"weights": ["x"] * 4}, {"weights": [1] * 4, "bias": [0.5]}, 7],
)
def test_a_saved_ensemble_that_does_not_fit_is_refused(saved: Any, tmp_path: Path) -> None:
    sd.save_pretrained(sd.wrap("test_resnet", num_classes=CLASSES, image_size=64).eval(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["timm_selfdistill"]["ensemble"] = saved
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json holds an ensemble that is not allowed"):
        sd.from_pretrained(tmp_path)


@torch.no_grad()
def test_early_exit_answers_with_it_where_no_exit_is_sure() -> None:
    torch.manual_seed(0)
    model = sd.wrap("test_resnet", num_classes=CLASSES, image_size=64).eval()
    model.ensemble = sd.Ensemble((0.0, *(0.1 * index for index in range(1, model.num_exits + 1))))
    images = torch.randn(6, 3, 64, 64)
    members = torch.stack(model(images, return_exits=True).logits)
    fast = sd.EarlyExit(model, [math.inf] * model.num_exits, fallback="ensemble")
    out = fast(images)
    weights = torch.tensor(model.ensemble.weights)
    torch.testing.assert_close(out.logits, torch.einsum("k,kbc->bc", weights, members))
    assert out.exit_index.tolist() == [model.num_exits] * 6
    target = members[0].argmax(-1)
    stored = collect_logits(model, [(images, target)])
    torch.testing.assert_close(replay(fast.config, stored.logits, stored.ensemble).logits, out.logits)
    assert stored.ensemble_correct.tolist() == (out.logits.argmax(-1) == target).tolist()
    assert stored.select(torch.tensor([1, 2])).ensemble == model.ensemble


def test_logits_are_collected_without_images_that_could_not_be_decoded() -> None:
    torch.manual_seed(0)
    model = sd.wrap("test_resnet", num_classes=5, image_size=64)
    batch = torch.randn(8, 3, 64, 64)
    targets = torch.arange(8) % 5
    targets[[2, 7]] = -100
    stored = collect_logits(model, zip(batch.split(5), targets.split(5), strict=True))
    whole = collect_logits(model, [(batch, torch.arange(8) % 5)])
    kept = [0, 1, 3, 4, 5, 6]
    assert stored.num_skipped == 2
    assert torch.equal(stored.targets, whole.targets[kept])
    torch.testing.assert_close(stored.logits, whole.logits[:, kept])
    with pytest.raises(ValueError, match=r"no images to calibrate on \(5 could not"):
        collect_logits(model, [(batch[:5], torch.full((5,), -100))])
    with pytest.raises(ValueError, match=r"must lie in 0..4; got 0 to 5"):
        collect_logits(model, [(batch[:6], torch.arange(6))])


def test_temperatures_minimise_the_cross_entropy() -> None:
    logits, target = answers(200, (3.0, 2.0, 1.0))
    found = fit_temperatures(logits, target)
    grid = torch.logspace(math.log10(0.05), math.log10(20), 801)
    for row, temperature in zip(logits.double(), found, strict=True):
        rest = 1 / 202
        wanted = torch.full((200, CLASSES), rest / (CLASSES - 1), dtype=torch.float64)
        wanted[torch.arange(200), target] = 1 - rest
        losses = torch.stack([-(wanted * (row / t).log_softmax(-1)).sum(-1).mean() for t in grid])
        assert temperature == pytest.approx(float(grid[losses.argmin()]), rel=5e-3)
    # Twice the logits need twice the temperature, which gives the same probabilities.
    assert fit_temperatures(2 * logits, target) == pytest.approx([2 * t for t in found], rel=1e-5)


def test_a_temperature_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 20000, 10, generator=generator)
    targets = logits[0].softmax(-1).multinomial(1, generator=generator).squeeze(1)
    assert fit_temperatures(3 * logits, targets) == pytest.approx([3], rel=0.03)


def test_temperatures_of_logits_that_tell_nothing() -> None:
    targets = torch.arange(8) % 4
    perfect = 10.0 * torch.nn.functional.one_hot(targets, 4).float()
    wrong = perfect.roll(1, 1)
    damaged = perfect.clone()
    damaged[0, 0], damaged[1, 1] = math.nan, math.inf
    none = torch.full_like(perfect, math.nan)
    of_perfect, of_wrong, of_damaged, of_none, of_equal = fit_temperatures(
        torch.stack([perfect, wrong, damaged, none, torch.ones_like(perfect)]), targets
    )
    # Right on all 8 images: sure to 1 - 1 / 10, as the target of the fit is.
    assert float((perfect / of_perfect).softmax(-1).amax(-1)[0]) == pytest.approx(0.9)
    assert of_wrong == pytest.approx(20, rel=1e-6)
    assert float((perfect / of_damaged).softmax(-1).amax(-1)[0]) == pytest.approx(1 - 1 / 8)
    assert (of_none, of_equal) == (1, 1)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(4, dtype=torch.int64), "Expected logits"),
        (torch.zeros(1, 3, 4), torch.zeros(3, dtype=torch.int64), "needs an added exit"),
        (torch.zeros(2, 3, 1), torch.zeros(3, dtype=torch.int64), "2 classes; got 1 and 1"),
        (torch.zeros(2, 0, 4), torch.zeros(0, dtype=torch.int64), "There are no images"),
        (torch.zeros(2, 3, 4), torch.tensor([0, -1, 2]), "got -1 to 2"),
    ],
)
def test_logits_that_do_not_fit(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitLogits(logits, targets)
