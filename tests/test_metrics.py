import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forks import ForkServer
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill.metrics import ExitMetrics, ExitMetricsResult, paired_interval, wilson_interval
from timm_selfdistill.model import Ensemble, ExitOutput
from timm_selfdistill.plugins.evaluate_metrics import ExpectedCalibrationError

FITTED = Ensemble((0.0, 0.25, 0.5))


def outputs(*logits: Tensor) -> ExitOutput:
    return ExitOutput(tuple(logits), tuple(logits))


def test_exit_metrics_equal_reference_arithmetic() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(23, 7) * scale for scale in (1.0, 2.0, 4.0)]
    target = torch.randint(0, 7, (23,))
    metrics = ExitMetrics(num_outputs=3)
    for rows in torch.arange(23).split(10):
        metrics.update(outputs(*(entry[rows] for entry in logits)), target[rows])
    result = metrics.compute()

    assert result["num_samples"] == 23
    assert result["num_nonfinite"] == 0
    assert len(result["exits"]) == 3
    for found, entry in zip(
        [*result["exits"], result["ensemble"]], [*logits, torch.stack(logits).mean(0)], strict=True
    ):
        probabilities = entry.softmax(-1)
        confidence, predicted = probabilities.max(-1)
        order = entry.argsort(-1, descending=True)
        assert found["top1"] == pytest.approx(100 * (predicted == target).float().mean().item())
        assert found["top5"] == pytest.approx(100 * (order[:, :5] == target[:, None]).any(-1).float().mean().item())
        assert found["loss"] == pytest.approx(-probabilities.log()[range(23), target].mean().item(), rel=1e-5)
        calibration = ExpectedCalibrationError().compute(
            predictions=predicted, references=target, confidences=confidence
        )
        assert found["ece"] == pytest.approx(calibration["ece"], abs=1e-6)
        recalls = [(predicted[target == index] == index).float().mean().item() for index in target.unique()]
        assert found["macro_recall"] == pytest.approx(100 * sum(recalls) / len(recalls))
    sizes = target.unique(return_counts=True)[1]
    assert result["class_sizes"] == (sizes.min(), sizes.max())
    json.dumps(without_answers(result))


def test_answers_are_compared_sample_by_sample() -> None:
    logits, target = samples(40)
    metrics, other = ExitMetrics(3), ExitMetrics(1)
    metrics.update(outputs(*logits.unbind(1)), target)
    other.update(outputs(logits[:, 2] + logits[:, 0]), target)
    first, second = metrics.compute()["answers"], other.compute()["answers"]
    right = (logits[:, 2] + logits[:, 0]).argmax(-1) == target
    for place, own in enumerate([*logits.unbind(1), logits.mean(1)]):
        mine = own.argmax(-1) == target
        assert first.gained_and_lost(place, second, 0) == ((mine & ~right).sum(), (right & ~mine).sum())
    other.update(outputs(logits[:, 0].flip(0)), target.flip(0))
    assert first.gained_and_lost(0, other.compute()["answers"], 0) is None, "the samples are in another order"


def without_answers(result: ExitMetricsResult) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "answers"}


def test_exit_metrics_start_afresh_after_compute() -> None:
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(torch.eye(4)), torch.arange(4))
    assert metrics.compute()["exits"][0]["top1"] == 100.0
    metrics.update(outputs(torch.eye(3)), torch.tensor([1, 2, 0]))
    assert metrics.compute()["exits"][0]["top1"] == 0.0


def test_a_single_output_has_no_ensemble() -> None:
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(torch.eye(4)), torch.arange(4))
    assert metrics.compute()["ensemble"] is None


def test_with_fewer_than_five_classes_top5_looks_at_all() -> None:
    metrics = ExitMetrics(num_outputs=2)
    metrics.update(outputs(torch.randn(8, 3), torch.randn(8, 3)), torch.arange(8) % 3)
    assert [entry["top5"] for entry in metrics.compute()["exits"]] == [100.0, 100.0]


def test_ensemble_is_averaged_in_float32() -> None:
    # In bfloat16 the mean of 256 and 257 is 256, which would tie with the first class and lose.
    first, second = torch.tensor([[256.25, 256.0]]), torch.tensor([[256.0, 258.0]])
    metrics = ExitMetrics(num_outputs=2)
    metrics.update(outputs(first.bfloat16(), second.bfloat16()), torch.tensor([1]))
    result = metrics.compute()
    assert result["ensemble"] is not None
    assert result["ensemble"]["top1"] == 100.0
    assert result["ensemble"]["loss"] == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)


def test_huge_logits_stay_exact() -> None:
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(torch.tensor([[3e38, 3e38, -3e38]])), torch.tensor([0]))
    (entry,) = metrics.compute()["exits"]
    assert entry["loss"] == pytest.approx(math.log(2))
    assert entry["ece"] == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_logits_count_as_wrong_and_are_reported(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    good, broken = torch.eye(6) * 50, torch.eye(6) * 50
    broken[2, 2] = bad
    metrics = ExitMetrics(num_outputs=2)
    metrics.update(outputs(broken, good), torch.arange(6))
    with caplog.at_level(logging.WARNING):
        result = metrics.compute()
    shallow, deep = result["exits"]
    assert shallow["top1"] == shallow["top5"] == pytest.approx(100 * 5 / 6)
    assert shallow["ece"] == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(shallow["loss"])
    assert deep["top1"] == 100.0
    assert result["num_nonfinite"] == 1
    assert "1 of 6" in caplog.text


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_an_error(label: int) -> None:
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(torch.eye(4)), torch.tensor([0, 1, 2, label]))
    with pytest.raises(ValueError, match=r"4 classes, so labels must lie in 0\.\.3; got labels from"):
        metrics.compute()


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ([torch.eye(4)], torch.arange(4), "logits of 2 outputs; got 1"),
        ([torch.eye(4), torch.eye(4)], torch.arange(3), r"class indices \[B\]"),
        ([torch.eye(4), torch.eye(4)], torch.eye(4), r"class indices \[B\]"),
        ([torch.eye(4), torch.eye(4)], torch.rand(4), r"class indices \[B\]"),
    ],
)
def test_update_refuses_other_shapes(logits: list[Tensor], target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitMetrics(num_outputs=2).update(outputs(*logits), target)


def test_update_refuses_another_number_of_classes() -> None:
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(torch.eye(4)), torch.arange(4))
    with pytest.raises(ValueError, match="Expected 4 classes as before; got 5"):
        metrics.update(outputs(torch.eye(5)), torch.arange(5))


def test_compute_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ExitMetrics(num_outputs=1).compute()


def test_a_fitted_ensemble_is_measured_beside_the_mean() -> None:
    logits, target = samples(40)
    metrics, plain = ExitMetrics(3, ensemble=FITTED), ExitMetrics(3, ensemble=Ensemble.mean(3))
    alone = ExitMetrics(1)
    metrics.update(outputs(*logits.unbind(1)), target)
    plain.update(outputs(*logits.unbind(1)), target)
    alone.update(outputs(0.25 * logits[:, 1] + 0.5 * logits[:, 2]), target)
    found = metrics.compute()
    assert found["fitted_ensemble"] == alone.compute()["exits"][0]
    alone = ExitMetrics(1)
    # The running ensembles are of the same weights, scaled to their sum.
    alone.update(outputs(0.75 * logits[:, 1]), target)
    assert found["running"][1] == pytest.approx(alone.compute()["exits"][0])
    assert found["running"][2] == found["fitted_ensemble"]
    means = plain.compute()
    assert means["running"][2] == means["ensemble"]
    assert without_answers({**found, "fitted_ensemble": None, "running": means["running"]}) == without_answers(means)


def test_update_keeps_no_graph() -> None:
    logits = torch.eye(4, requires_grad=True)
    metrics = ExitMetrics(num_outputs=1)
    metrics.update(outputs(logits * 2), torch.arange(4))
    assert metrics.compute()["exits"][0]["top1"] == 100.0


@pytest.mark.multiprocess
def test_two_processes_count_exactly_what_one_counts(tmp_path: Path, forks: ForkServer) -> None:
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "unused")}
    for process in forks.start_together(code, [str(tmp_path)], **offline):
        status, _, errors = process.wait()
        assert status == 0, errors
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1] == evaluate_everything(Accelerator(cpu=True))
    assert not (tmp_path / "unused").exists()


def evaluate_everything(accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """Data sets whose last batches leave a remainder of every kind, and processes with unequal numbers of batches."""
    results = {f"{size} samples": evaluate_prepared(accelerator, size) for size in (16, 17, 19, 20, 22, 23, 3, 1)}
    mine = slice(0, 5) if accelerator.num_processes == 1 else [slice(0, 0), slice(0, 5)][accelerator.process_index]
    metrics = ExitMetrics(3, accelerator)
    logits, target = samples(5)
    for row, label in zip(logits[mine], target[mine], strict=True):
        metrics.update(outputs(*row[:, None]), label[None])
    # The samples of several processes are in another order than those of one.
    found = {name: without_answers(result) for name, result in (results | {"unequal": metrics.compute()}).items()}
    return {name: result | {"class_sizes": list(result["class_sizes"])} for name, result in found.items()}


def evaluate_prepared(accelerator: Accelerator, size: int) -> ExitMetricsResult:
    loader = accelerator.prepare(DataLoader(TensorDataset(*samples(size)), batch_size=4))
    metrics = ExitMetrics(3, accelerator, FITTED)
    for logits, target in loader:
        metrics.update(outputs(*logits.unbind(1)), target)
    return metrics.compute()


def samples(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 10, generator=generator), torch.randint(0, 10, (size,), generator=generator)


if __name__ == "__main__":
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    result_file = Path(sys.argv[1]) / f"{accelerator.process_index}.json"
    result_file.write_text(json.dumps(evaluate_everything(accelerator)))
    accelerator.end_training()


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (7, 10), (95, 100), (3601, 10_000)])
def test_wilson_is_scipys(hits: int, total: int) -> None:
    expected = stats.binomtest(hits, total).proportion_ci(0.95, "wilson")
    assert wilson_interval(hits, total) == pytest.approx((100 * expected.low, 100 * expected.high))


def test_four_more_of_a_hundred_are_not_a_certain_gain() -> None:
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
