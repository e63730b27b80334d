"""How flat the minimum is: what is left of a network's accuracy when noise is added to its weights."""

import math
import statistics
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from timm_selfdistill.exits import unchanged
from timm_selfdistill.metrics import OutputMetrics
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.train import evaluate_model

Batches = Sequence[tuple[Tensor, Tensor]]


class NoisePoint(TypedDict):
    """How good the backbone's own classifier is with noise of one standard deviation `sigma` on its weights.

    `top1` in percent and `loss`, the cross-entropy in nats, are means over the draws of the noise, `top1_std` and
    `loss_std` their standard deviations; None where there is one draw only, or a value is not a finite number.
    """

    sigma: float
    top1: float
    top1_std: float | None
    loss: float | None
    loss_std: float | None


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
    """Evaluate the backbone's own classifier with Gaussian noise N(0, sigma^2) added to its weights.

    "Weights" are all parameters of the backbone: those of convolutions and linear layers, biases, and scales and shifts
    of normalisation layers; the exits do not run. Batch statistics are those that were trained: they are not estimated
    again for the noisy weights. A draw is one direction of noise, which is scaled to each sigma in turn, and is the
    same for every backbone of the same shape, so that two of them can be compared. The model is left as it was.

    Args:
        model: The wrapped model.
        batches: Images [B, C, H, W] and targets [B], on any device.
        accelerator: Sets precision and device, as in `evaluate_model`.
        sigmas: Standard deviations, 0 or more.
        draws: How often noise is drawn, 1 or more.
        seed: Decides the noise.
        title: Shown by the progress bar.

    Returns:
        A point for each standard deviation.
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
    return [_point(sigma, results) for sigma, results in zip(sigmas, found, strict=True)]


def draw_noise(weights: Sequence[Tensor], seed: int, draw: int) -> list[Tensor]:
    """Return standard normal noise for each weight, drawn on the CPU, the same for the same shapes, seed and draw."""
    # numpy's sequence of seeds, as nearby seeds of torch's own generator are not independent.
    mixed = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    return [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]


def rms(model: SelfDistillModel) -> float:
    """Return the root of the mean square of all weights of a model's backbone: what noise is small or large beside."""
    weights = list(model.backbone.parameters())
    total = sum(float(weight.detach().double().square().sum()) for weight in weights)
    return math.sqrt(total / sum(weight.numel() for weight in weights))


def _point(sigma: float, results: Sequence[OutputMetrics]) -> NoisePoint:
    top1, loss = [result["top1"] for result in results], [result["loss"] for result in results]
    finite = all(map(math.isfinite, loss))
    several = len(results) > 1
    return {
        "sigma": sigma,
        "top1": statistics.fmean(top1),
        "top1_std": statistics.stdev(top1) if several else None,
        "loss": statistics.fmean(loss) if finite else None,
        "loss_std": statistics.stdev(loss) if finite and several else None,
    }
