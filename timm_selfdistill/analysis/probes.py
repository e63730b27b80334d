"""Measure on a network what the method's paper explains its gain by: flat minima, gradients, separable features."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby, takewhile
from typing import TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from timm.models import group_parameters
from torch import Tensor

from timm_selfdistill.exits import unchanged
from timm_selfdistill.metrics import IGNORED, OutputMetrics
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.output import progress_bar
from timm_selfdistill.train import evaluate_model

Batches = Sequence[tuple[Tensor, Tensor]]
BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps images [B, C, H, W] and targets [B] to the loss of a batch."""


class NoisePoint(TypedDict):
    """How good the backbone's own classifier is with noise of one standard deviation `sigma` on its weights.

    `top1` in percent and `loss`, the cross-entropy in nats, are means over the draws of the noise, beside their
    standard deviations; None where there is one draw only, or a value is not a finite number.
    """

    sigma: float
    top1: float
    top1_std: float | None
    loss: float | None
    loss_std: float | None


class Scatter(TypedDict):
    """What `measure_scatter` finds; `ratio` is None where `between` is 0."""

    within: float
    between: float
    ratio: float | None


class Projection(TypedDict):
    """Features in the two directions in which they vary most: [x, y] and the class index of each image.

    `explained` is the share of the features' variance in each direction, 0 to 1.
    """

    points: list[list[float]]
    classes: list[int]
    explained: list[float]


@torch.no_grad()
def measure_noise(
    model: SelfDistillModel,
    batches: Batches,
    accelerator: Accelerator,
    *,
    sigmas: Sequence[float],
    draws: int,
    seed: int,
    title: str = "noise",
) -> list[NoisePoint]:
    """Evaluate the backbone's own classifier with Gaussian noise N(0, sigma^2) added to all parameters of the backbone.

    Batch statistics stay as they were trained. A draw is one direction of noise, scaled to each sigma in turn, the same
    for every backbone of the same shape, so that two of them can be compared. The model is left unchanged.
    """
    found: list[list[OutputMetrics]] = [[] for _ in sigmas]
    with unchanged(model, restore_tensors=True):
        weights = list(model.backbone.parameters())
        before = [weight.clone() for weight in weights]
        for draw in range(draws):
            noise = draw_noise(weights, seed, draw)
            for sigma, results in zip(sigmas, found, strict=True):
                if sigma == 0 and draw > 0:
                    results.append(results[0])
                    continue
                for weight, value, direction in zip(weights, before, noise, strict=True):
                    weight.copy_(value + sigma * direction)
                label = f"{title} {sigma:g} ({draw + 1}/{draws})"
                metrics = evaluate_model(model, batches, accelerator, num_exits=0, gather=False, title=label)
                results.append(metrics["exits"][0])
    return [_noise_point(sigma, results) for sigma, results in zip(sigmas, found, strict=True)]


def draw_noise(weights: Sequence[Tensor], seed: int, draw: int) -> list[Tensor]:
    """Return standard normal noise for each weight, drawn on the CPU, the same for the same shapes, seed and draw."""
    # numpy's sequence of seeds, as nearby seeds of torch's own generator are not independent.
    mixed = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    return [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]


def find_stages(model: SelfDistillModel) -> dict[str, list[str]]:
    """Return the names of the backbone's parameters by stage, shallow to deep, as timm groups them.

    They are the coarse groups of the backbone's `group_matcher`: the stages of a convolutional network, the blocks of a
    transformer, stem and classifier apart; for the few families without one, the backbone's children. A stage is called
    by what the names of its parameters have in common; where that is nothing, the first is "stem" and the last "head".
    """
    backbone = model.backbone
    if hasattr(backbone, "group_matcher"):
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
        ordered = [groups[index] for index in sorted(groups)]
    else:
        names = [name for name, _ in backbone.named_parameters()]
        ordered = [list(group) for _, group in groupby(names, lambda name: name.partition(".")[0])]
    stages: dict[str, list[str]] = {}
    for place, names in enumerate(ordered):
        levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
        title = shared or {0: "stem", len(ordered) - 1: "head"}.get(place, names[0])
        stages[title if title not in stages else f"{title} ({place})"] = names
    return stages


def measure_gradients(
    model: SelfDistillModel, batches: Batches, loss: BatchLoss, stages: Sequence[Sequence[str]], *, seed: int
) -> list[float | None]:
    """Return the mean of |d loss / d w| over the parameters w of each stage and the batches; None where not finite.

    Gradients are taken in training mode, with batch statistics of each batch. The model is left unchanged.
    """
    parameters = dict(model.backbone.named_parameters())
    names = [name for stage in stages for name in stage]
    totals = dict.fromkeys(names, 0.0)
    with unchanged(model, restore_tensors=True), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        for images, targets in batches:
            found = torch.autograd.grad(loss(images, targets), [parameters[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    totals[name] += float(gradient.abs().sum())
    means = [
        sum(totals[name] for name in stage) / sum(parameters[name].numel() for name in stage) / len(batches)
        for stage in stages
    ]
    return [mean if math.isfinite(mean) else None for mean in means]


@torch.no_grad()
def collect_features(
    model: SelfDistillModel, batches: Batches, title: str = "features"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return K + 1 features [N, D] in float64, the last the backbone's own, and the known targets [N], in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    features: list[list[Tensor]] = [[] for _ in model.exit_names]
    targets = []
    for images, labels in progress_bar(batches, title=title):
        known = labels.cpu() != IGNORED
        targets.append(labels.cpu()[known].long())
        out = model(images.to(device), return_exits=True)
        for found, feature in zip(features, out.features, strict=True):
            found.append(feature.cpu().double()[known])
    return tuple(torch.cat(found) for found in features), torch.cat(targets)


def measure_scatter(features: Tensor, targets: Tensor) -> Scatter:
    """Measure how far images lie from the mean of their class, and these means from one another.

    With N images, feature f_i of image i, mean m_c of the n_c images of class c, and mean m of all:
    `within = sum_i |f_i - m_c(i)|^2 / N`, `between = sum_c n_c |m_c - m|^2 / N`. These are the traces of the within-
    and between-class scatter matrices of discriminant analysis, divided by N; the ratio is that of the sums of squares
    that the ICCV paper reports (https://arxiv.org/abs/1905.08094). It does not depend on the scale of the features.
    """
    total_mean = features.mean(0)
    within = between = 0.0
    for label in sorted(set(targets.tolist())):
        members = features[targets == label]
        mean = members.mean(0)
        within += float((members - mean).square().sum())
        between += len(members) * float((mean - total_mean).square().sum())
    count = len(features)
    return {"within": within / count, "between": between / count, "ratio": within / between if between else None}


def project(features: Tensor, targets: Tensor) -> Projection:
    """Project features [N, D], D at least 2, with targets [N] on their first two principal components."""
    centred = features - features.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors[:, -2:].flip(1)
    # A direction has no sign of its own: the entry of largest magnitude is made positive.
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    total = float(values.clamp(min=0).sum())
    explained = [max(float(value), 0.0) / total if total else 0.0 for value in values[-2:].flip(0)]
    return {"points": (centred @ (directions * signs)).tolist(), "classes": targets.tolist(), "explained": explained}


def _noise_point(sigma: float, results: Sequence[OutputMetrics]) -> NoisePoint:
    top1, loss = [result["top1"] for result in results], [result["loss"] for result in results]
    is_finite = all(map(math.isfinite, loss))
    return {
        "sigma": sigma,
        "top1": statistics.fmean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "loss": statistics.fmean(loss) if is_finite else None,
        "loss_std": statistics.stdev(loss) if is_finite and len(loss) > 1 else None,
    }
