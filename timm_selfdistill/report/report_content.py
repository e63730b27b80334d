"""Build a report: how good every exit is, and the parameters, multiply-accumulates and time that it takes."""

import math
import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Final, TypedDict

import timm
import torch
from torch import Tensor, nn

from timm_selfdistill.compat import cpu_capabilities
from timm_selfdistill.exits import unchanged
from timm_selfdistill.measure import MacCounter, median_seconds, seconds_of
from timm_selfdistill.metrics import ExitMetricsResult, OutputMetrics, paired_interval, wilson_interval
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.truncation import watch_usage

_BATCH_SIZE: Final = 16
_WARM_UP_ROUNDS = 2
_MIN_ROUNDS = 5
_SECONDS = 2.0


class AccuracyRow(TypedDict):
    """How good an output is, in percent but for `ece` in [0, 1]; None where it is not a finite number.

    `top1_interval` is the 95 % confidence interval of `top1`, and `gain_interval` that of its difference from the
    baseline's on the same images, None where there is no such difference.
    """

    top1: float | None
    top1_interval: list[float] | None
    gain_interval: list[float] | None
    top5: float | None
    macro_recall: float | None
    ece: float | None


class CostRow(TypedDict):
    """What an output costs: `params` it needs, `macs` multiply-accumulates for one image, `latency_ms` median
    milliseconds for one batch, `speedup` how many times faster it is than the backbone's own classifier.
    """

    params: int
    macs: int
    latency_ms: float
    speedup: float


class EnsembleRow(AccuracyRow, CostRow):
    """How good the ensemble is and what it costs."""


class FittedEnsembleRow(AccuracyRow):
    """How good the fitted ensemble is, which costs what the mean costs.

    `weights` are those of the K + 1 outputs, `images` how many held-out images they were fitted on, if that is known.
    """

    weights: list[float]
    images: int | None


class ExitRow(EnsembleRow):
    """How good an exit is and what it costs; `index` counts from the shallowest, `name` is its module path.

    `running_top1` is the top-1 accuracy of the ensemble of the exits up to this one, by the fitted weights if any.
    """

    index: int
    name: str
    running_top1: float | None


class Report(TypedDict):
    """The content of `report.json`: plain numbers, so that writing and reading it again changes nothing.

    `exits` go from shallow to deep; the last is the backbone's own classifier. `ensemble` is the mean of the logits of
    all; `fitted_ensemble` is None for a model whose ensemble was not fitted. `baseline` is the plain backbone trained
    on its own, which costs what the last exit costs. `num_skipped` counts the images that could not be decoded, by
    their use ("training", "validation", "evaluation") as far as it is known. `num_nonfinite` counts the samples for
    which an output was not a finite number. `class_sizes` are the samples of the smallest and of the largest class that
    has any. `train_seconds` is the time of the training steps of each network. `input_size` is [C, H, W].
    """

    exits: list[ExitRow]
    ensemble: EnsembleRow
    fitted_ensemble: FittedEnsembleRow | None
    baseline: AccuracyRow | None
    backbone: str
    dataset: str
    num_samples: int
    num_skipped: dict[str, int]
    num_nonfinite: int
    class_sizes: list[int]
    train_seconds: dict[str, float]
    recipe: str
    seed: int
    versions: dict[str, str]
    input_size: list[int]
    device: str
    dtype: str
    threads: int
    latency_batch_size: int
    latency_rounds: int


def build_report(
    model: SelfDistillModel,
    metrics: ExitMetricsResult,
    *,
    input_size: tuple[int, int, int],
    baseline: ExitMetricsResult | None,
    dataset: str,
    recipe: str,
    seed: int,
    skipped: Mapping[str, int] | None = None,
    train_seconds: Mapping[str, float] | None = None,
    latency_batch_size: int = _BATCH_SIZE,
) -> Report:
    """Measure what every exit costs and report it with its accuracy; the model is left as it was.

    Costs are those of what `model.forward_exit` runs. Multiply-accumulates count convolutions, matrix products,
    attention and LSTMs, as is usual, and nothing elementwise. Latency is the median over some seconds, in eval mode, in
    the parameters' own precision and on their device.

    Args:
        model: The trained model.
        metrics: What `ExitMetrics.compute` returned for it.
        input_size: Channels, height and width of one image.
        baseline: The metrics of the plain backbone trained on its own, of which the last exit counts, if there is one.
        dataset: What was evaluated on.
        recipe: Name of the recipe.
        seed: The recipe's seed.
        skipped: How many images were skipped while training, by their use.
        train_seconds: Seconds that the training steps of each network took, by its name.
        latency_batch_size: Number of images in a timed batch.

    Raises:
        ValueError: If the metrics are not those of this model, the baseline was evaluated on another number of
            samples, or the batch size is not positive.
    """
    names = model.exit_names
    if len(metrics["exits"]) != len(names) or metrics["ensemble"] is None:
        raise ValueError(
            f"The model has {len(names)} outputs and an ensemble ({', '.join(names)}); the metrics are of "
            f"{len(metrics['exits'])} outputs {'without' if metrics['ensemble'] is None else 'and'} an ensemble."
        )
    if baseline is not None and baseline["num_samples"] != metrics["num_samples"]:
        raise ValueError(
            f"The baseline was evaluated on {baseline['num_samples']} samples and the model on "
            f"{metrics['num_samples']}: only results on the same samples can be compared."
        )
    if latency_batch_size < 1:
        raise ValueError(f"latency_batch_size must be 1 or more; got {latency_batch_size}.")
    row = partial(_row, metrics, baseline)
    costs, rounds = measure_costs(model, input_size, latency_batch_size)
    exits: list[ExitRow] = []
    measured = zip(names, metrics["exits"], metrics["running"], costs[:-1], strict=True)
    for index, (name, output, running, cost) in enumerate(measured):
        accuracy, running_top1 = row(output, index), _finite(running["top1"])
        exits.append({"index": index, "name": name, **accuracy, **cost, "running_top1": running_top1})
    fitted: FittedEnsembleRow | None = None
    if metrics["fitted_ensemble"] is not None:
        weights, images = list(model.ensemble.weights), model.ensemble.images
        fitted = {**row(metrics["fitted_ensemble"], len(names) + 1), "weights": weights, "images": images}
    parameter = next(model.parameters())
    pretrained = getattr(model.backbone, "pretrained_cfg", None) or {}
    return {
        "exits": exits,
        "ensemble": {**row(metrics["ensemble"], len(names)), **costs[-1]},
        "fitted_ensemble": fitted,
        "baseline": None if baseline is None else _row(baseline, None, baseline["exits"][-1], 0),
        # Of a backbone that is not from timm, its class.
        "backbone": str(pretrained.get("architecture") or type(model.backbone).__name__),
        "dataset": dataset,
        "num_samples": metrics["num_samples"],
        "num_skipped": {**(skipped or {}), "evaluation": metrics["num_skipped"]},
        "num_nonfinite": metrics["num_nonfinite"],
        "class_sizes": list(metrics["class_sizes"]),
        "train_seconds": dict(train_seconds or {}),
        "recipe": recipe,
        "seed": seed,
        "versions": versions(),
        "input_size": list(input_size),
        "device": device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "latency_batch_size": latency_batch_size,
        "latency_rounds": rounds,
    }


def versions() -> dict[str, str]:
    """Return the versions of this package, timm and torch, by name."""
    try:
        own = metadata.version("timm_selfdistill")
    except metadata.PackageNotFoundError:
        own = "unknown (not installed)"
    return {"timm_selfdistill": own, "timm": timm.__version__, "torch": str(torch.__version__)}


def device_name(device: torch.device) -> str:
    """Return what a report calls a device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({cpu_capabilities().get('cpu_name') or platform.machine()})"
    return device.type


def measure_costs(
    model: SelfDistillModel, input_size: tuple[int, int, int], batch_size: int
) -> tuple[list[CostRow], int]:
    """Return the costs of K + 1 exits and of the ensemble, and the rounds of timing; the model is left unchanged."""
    parameter = next(model.parameters())
    batch = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
    batch = batch.to(device=parameter.device, dtype=parameter.dtype)

    def run_ensemble(x: Tensor) -> Tensor:
        return torch.stack(model(x, return_exits=True).logits).mean(0)

    runs: list[Callable[[Tensor], Tensor]]
    runs = [*(partial(model.forward_exit, exit=index) for index in range(model.num_exits + 1)), run_ensemble]
    with unchanged(model):
        # Counted before timed: what a module caches in its first forward is then no inference tensor.
        counts = [_count(model, partial(run, batch[:1])) for run in runs]
        with torch.inference_mode():
            seconds, rounds = median_seconds(
                lambda: [seconds_of(partial(run, batch), batch.device) for run in runs],
                warm_up=_WARM_UP_ROUNDS,
                rounds=_MIN_ROUNDS,
                seconds=_SECONDS,
            )
    full = seconds[model.num_exits]
    costs: list[CostRow] = [
        {"params": params, "macs": macs, "latency_ms": 1000 * taken, "speedup": full / taken}
        for (params, macs), taken in zip(counts, seconds, strict=True)
    ]
    return costs, rounds


def _count(model: nn.Module, run: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the parameters that `run` needs, each once, and its multiply-accumulates."""
    with torch.no_grad(), MacCounter() as counter, watch_usage(model) as usage:
        run()
    needed = (tensor.numel() for tensor in usage.tensors.values() if isinstance(tensor, nn.Parameter))
    return sum(needed), counter.macs


def _row(
    metrics: ExitMetricsResult, baseline: ExitMetricsResult | None, output: OutputMetrics, place: int
) -> AccuracyRow:
    """Return the row of an output, at this place among the answers, compared with the baseline if there is one."""
    total = metrics["num_samples"]
    interval = list(wilson_interval(output["top1"] * total / 100, total))
    counts = None
    if baseline is not None:
        counts = metrics["answers"].gained_and_lost(place, baseline["answers"], len(baseline["exits"]) - 1)
    return {
        "top1": _finite(output["top1"]),
        "top1_interval": interval if math.isfinite(output["top1"]) else None,
        "gain_interval": None if counts is None else list(paired_interval(*counts, total)),
        "top5": _finite(output["top5"]),
        "macro_recall": _finite(output["macro_recall"]),
        "ece": _finite(output["ece"]),
    }


def _finite(value: float) -> float | None:
    """Return the value, or None for what JSON has no number for."""
    return float(value) if math.isfinite(value) else None
