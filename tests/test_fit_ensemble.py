"""The fitted ensemble: what is minimised, what few images give, and what is refused."""

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
from timm_selfdistill.calibration.logits import collect_logits, replay
from timm_selfdistill.exit_logits import _PULL

CLASSES = 7


def answers(count: int, noise: tuple[float, ...] = (6.0, 2.0, 1.0), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits [K + 1, N, C] of outputs that are right the less often the noisier they are, and targets [N]."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (count,), generator=generator)
    right = 3 * torch.eye(CLASSES)[target]
    return torch.stack([right + n * torch.randn(count, CLASSES, generator=generator) for n in noise]), target


def objective(weights: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Return what is minimised, as the docstring says it."""
    loss = cross_entropy(torch.einsum("k,knc->nc", weights, logits), target, reduction="sum")
    return loss + _PULL * ((weights - weights.mean()) ** 2).sum() + (weights.sum() - 1) ** 2 / 2


def accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(-1) == target).double().mean())


@pytest.mark.parametrize("count", [10, 300])
def test_no_other_weights_are_better(count: int) -> None:
    logits, target = answers(count)
    found = torch.tensor(sd.fit_ensemble(logits=logits, target=target).weights)
    best = objective(found, logits, target)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            other = (found + size * torch.randn(3, generator=generator)).clamp_min(0)
            assert objective(other, logits, target) >= best - 1e-4


def test_weak_exits_count_less_and_the_ensemble_is_better_than_the_mean_on_other_images() -> None:
    ensemble = sd.fit_ensemble(logits=answers(500)[0], target=answers(500)[1])
    assert ensemble.weights[0] < ensemble.weights[1] < ensemble.weights[2]
    logits, target = answers(4000, seed=3)
    assert accuracy(ensemble(logits), target) > accuracy(logits.mean(0), target) + 0.05


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
    assert sd.fit_ensemble(logits=logits, target=target).weights[0] == 0


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
    assert torch.allclose(found(logits), torch.einsum("k,kbc->bc", torch.tensor(found.weights), logits), atol=1e-5)


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
    ensemble = sd.Ensemble((0.25, 0.5))
    assert sd.Ensemble.from_json(ensemble.to_json()) == ensemble
    for wrong in ({}, {"weights": 3}, {"weights": ["x"]}, []):
        with pytest.raises(ValueError, match=r"weights|could not convert"):
            sd.Ensemble.from_json(wrong)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("saved", [{"weights": [1.0]}, {"weights": [0, 0, 0, 0]}, {"weights": ["x"] * 4}, 7])
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
