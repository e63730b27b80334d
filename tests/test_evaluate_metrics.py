import math
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_selfdistill.plugins.evaluate_metrics import ExpectedCalibrationError, TopKAccuracy


def test_top_k_accuracy_counts_labels_among_the_first_k() -> None:
    ranked = [[3, 1, 0, 2, 4], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [2, 1, 0, 3, 4]]
    assert TopKAccuracy().compute(predictions=ranked, references=[3, 4, 0, 1]) == {"top1": 25.0, "top5": 75.0}
    assert TopKAccuracy(k=(2,)).compute(predictions=np.array(ranked), references=[3, 4, 0, 1]) == {"top2": 50.0}


def test_metrics_accumulate_batches_and_start_afresh() -> None:
    metric = TopKAccuracy(k=(1,))
    metric.add_batch(predictions=[[0, 1]], references=[0])
    metric.add_batch(predictions=[[0, 1], [0, 1]], references=[1, 1])
    assert metric.compute()["top1"] == pytest.approx(100 / 3)
    assert metric.compute(predictions=[[0, 1]], references=[0]) == {"top1": 100.0}


def test_calibration_error_follows_the_paper() -> None:
    generator = np.random.default_rng(0)
    confidence = np.concatenate([generator.random(500), [0.0, 0.2, 0.4, 1.0]])
    predicted, labels = generator.integers(0, 3, (2, 504))
    expected = 0.0
    for lower in range(10):
        inside = (confidence > lower / 10) & (confidence <= (lower + 1) / 10)
        if lower == 0:
            inside |= confidence == 0
        if inside.any():
            accuracy = (predicted == labels)[inside].mean()
            expected += inside.mean() * abs(accuracy - confidence[inside].mean())
    metric = ExpectedCalibrationError(num_bins=10)
    result = metric.compute(predictions=predicted, references=labels, confidences=confidence)
    assert result["ece"] == pytest.approx(expected, abs=1e-12)


def test_calibration_bins_are_closed_above_and_do_not_cancel() -> None:
    # Two bins: (0, 0.5] holds one right, (0.5, 1] one wrong answer: (0.5 + 0.75) / 2, where one bin would give 0.125.
    samples = {"predictions": [0, 0], "references": [0, 1], "confidences": [0.5, 0.75]}
    assert ExpectedCalibrationError(num_bins=2).compute(**samples) == {"ece": 0.625}
    assert ExpectedCalibrationError(num_bins=1).compute(**samples) == {"ece": 0.125}


def test_metrics_leave_random_state_and_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    TopKAccuracy().compute(predictions=[[0]], references=[0])
    ExpectedCalibrationError().compute(predictions=[0], references=[0], confidences=[0.5])
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        (TopKAccuracy(), {"predictions": [[0, 1]], "references": [-1]}, "must not be negative; got -1"),
        (ExpectedCalibrationError(), {"predictions": [0], "references": [0], "confidences": [1.5]}, r"lie in \[0, 1\]"),
        (
            ExpectedCalibrationError(),
            {"predictions": [0], "references": [0], "confidences": [math.nan]},
            r"lie in \[0, 1\]",
        ),
    ],
)
def test_metrics_refuse_impossible_samples(metric: TopKAccuracy, inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)


@pytest.mark.parametrize("make", [lambda: TopKAccuracy(k=()), lambda: TopKAccuracy(k=(0,))])
def test_top_k_refuses_k_below_one(make: object) -> None:
    with pytest.raises(ValueError, match="k must hold"):
        make()  # type: ignore[operator]
