"""Put together what a report says."""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TypedDict

import timm
import torch
from torch import nn

from timm_selfdistill.metrics import ExitMetricsResult, OutputMetrics
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.report.cost import LATENCY_BATCH_SIZE, Cost, measure_costs


class AccuracyRow(TypedDict):
    """How good an output is: `top1` and `top5` in percent, `ece` in [0, 1]; None where it is not a finite number."""

    top1: float | None
    top5: float | None
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


class ExitRow(EnsembleRow):
    """How good an exit is and what it costs; `index` counts from the shallowest, `name` is its module path."""

    index: int
    name: str


class Report(TypedDict):
    """The content of `report.json`; plain numbers, so that writing and reading it again changes nothing.

    `exits` go from shallow to deep, the last the backbone's own classifier. `baseline` is the plain backbone trained on
    its own: it costs what the last exit costs. The rest tells how the figures came about; `num_skipped` counts the
    images that could not be decoded, by what they were to be used for ("training", "validation", "evaluation"), as far
    as that is known; `num_nonfinite` counts the samples for which some output was not a number; `train_seconds`
    tells how long the training steps of each network of the run took; `input_size` is [C, H, W].
    """

    exits: list[ExitRow]
    ensemble: EnsembleRow
    baseline: AccuracyRow | None
    backbone: str
    dataset: str
    num_samples: int
    num_skipped: dict[str, int]
    num_nonfinite: int
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
    latency_batch_size: int = LATENCY_BATCH_SIZE,
) -> Report:
    """Measure what every exit costs and put it beside how good it is.

    Costs are those of what `model.forward_exit` really runs. Multiply-accumulates count convolutions, matrix products,
    attention and LSTMs, as is usual, and nothing elementwise. Latency is the median over some seconds, in eval mode, in
    the parameters' own precision and on their device. The model is left as it was.

    Args:
        model: The trained model.
        metrics: What `ExitMetrics.compute` returned for it.
        input_size: Channels, height and width of one image.
        baseline: The metrics of the plain backbone trained on its own, of which the last exit counts, if there is one.
        dataset: What was evaluated on.
        recipe: Name of the recipe.
        seed: The recipe's seed.
        skipped: How many images were skipped while training, by what they were to be used for.
        train_seconds: Seconds that the training steps of each network took, by its name.
        latency_batch_size: Number of images in a timed batch.

    Returns:
        The report.

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
    costs = measure_costs(model, input_size, latency_batch_size)
    full = costs.exits[-1].latency_ms
    parameter = next(model.parameters())
    return {
        "exits": [
            {"index": index, "name": name, **_accuracy(entry), **_cost(cost, full)}
            for index, (name, entry, cost) in enumerate(zip(names, metrics["exits"], costs.exits, strict=True))
        ],
        "ensemble": {**_accuracy(metrics["ensemble"]), **_cost(costs.ensemble, full)},
        "baseline": None if baseline is None else _accuracy(baseline["exits"][-1]),
        "backbone": _backbone_name(model.backbone),
        "dataset": dataset,
        "num_samples": metrics["num_samples"],
        "num_skipped": {**(skipped or {}), "evaluation": metrics["num_skipped"]},
        "num_nonfinite": metrics["num_nonfinite"],
        "train_seconds": dict(train_seconds or {}),
        "recipe": recipe,
        "seed": seed,
        "versions": versions(),
        "input_size": list(input_size),
        "device": device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "latency_batch_size": latency_batch_size,
        "latency_rounds": costs.rounds,
    }


def _accuracy(metrics: OutputMetrics) -> AccuracyRow:
    return {"top1": _finite(metrics["top1"]), "top5": _finite(metrics["top5"]), "ece": _finite(metrics["ece"])}


def _finite(value: float) -> float | None:
    """Return the value, or None for what JSON has no number for."""
    return float(value) if math.isfinite(value) else None


def _cost(cost: Cost, full_latency_ms: float) -> CostRow:
    return {
        "params": cost.params,
        "macs": cost.macs,
        "latency_ms": cost.latency_ms,
        "speedup": full_latency_ms / cost.latency_ms,
    }


def _backbone_name(backbone: nn.Module) -> str:
    """Return timm's name of the architecture, or the class of a backbone that is not from timm."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(backbone).__name__)


def versions() -> dict[str, str]:
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
        return f"cpu ({torch.cpu.get_capabilities().get('cpu_name') or platform.machine()})"
    return device.type
