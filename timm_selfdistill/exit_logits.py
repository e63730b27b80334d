"""Fit how much each exit counts in the ensemble, on images that were held out of training."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_selfdistill.model import Ensemble, SelfDistillModel

# How strongly the weights are held together, in nats for a deviation of 1: as much as a few dozen images say.
_PULL: Final = 30.0


def fit_ensemble(
    model: SelfDistillModel | None = None,
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    logits: Sequence[Tensor] | Tensor | None = None,
    target: Tensor | None = None,
) -> Ensemble:
    """Fit the weights of the exits in the ensemble, and keep them with the model.

    The weights, at least 0, minimise the cross-entropy of the weighted sum of the logits. The more they differ from
    one another, the more it costs, by as much as a few dozen images say: with few images, the mean comes out. The
    problem is convex, so the answer depends on the images alone.

    Give images that the network was not trained on, and that nothing is reported on.

    Paper: "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks", NeurIPS 2021,
    https://arxiv.org/abs/2106.05409, whose weights are per class and exit and fitted by gradient descent.

    Args:
        model: The wrapped model, whose `ensemble` is set; it may be left out where logits are given.
        loader: Batches (images [B, C, H, W], class indices [B]); targets of -100 are left out.
        logits: In place of a loader, K + 1 tensors [N, num_classes], shallow to deep, the last the backbone's own.
        target: Their class indices [N].

    Returns:
        The fitted ensemble.

    Raises:
        ValueError: If there are neither images nor logits or both, or shapes, classes or values do not fit.
    """
    if loader is not None and model is not None and logits is None and target is None:
        logits, target = _run(model, loader)
    elif loader is not None or logits is None or target is None:
        raise ValueError("fit_ensemble takes either a model and a loader, or logits and their target.")
    members = torch.stack([member.detach().double().cpu() for member in logits])
    ensemble = Ensemble(_fit(*_checked(members, target.detach().cpu(), model)))
    if model is not None:
        model.ensemble = ensemble
    return ensemble


@torch.no_grad()
def _run(model: SelfDistillModel, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the logits of all outputs [K + 1, N, C] and the targets [N], with the model in eval mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        outputs = [
            (torch.stack(model(images.to(device), return_exits=True).logits).cpu(), labels.cpu())
            for images, labels in loader
        ]
    finally:
        model.train(training)
    if not outputs:
        raise ValueError("There are no images to fit the ensemble on: the loader is empty.")
    return torch.cat([logits for logits, _ in outputs], 1), torch.cat([labels for _, labels in outputs])


def _checked(logits: Tensor, target: Tensor, model: SelfDistillModel | None) -> tuple[Tensor, Tensor]:
    """Return the images that can be fitted on, after a look at shapes and values."""
    if logits.ndim != 3 or target.shape != logits.shape[1:2] or target.is_floating_point():
        raise ValueError(
            "Expected K + 1 logits [N, num_classes] and class indices [N]; got "
            f"{list(logits.shape)} and {target.dtype} {list(target.shape)}."
        )
    if model is not None and (len(logits), logits.shape[2]) != (model.num_exits + 1, model.num_classes):
        raise ValueError(
            f"The model has {model.num_exits + 1} outputs and {model.num_classes} classes; the logits are of "
            f"{len(logits)} and {logits.shape[2]}."
        )
    from timm_selfdistill.metrics import IGNORED

    kept = (target != IGNORED) & logits.isfinite().all(-1).all(0)
    logits, target = logits[:, kept], target[kept]
    if not len(target):
        raise ValueError("There are no images to fit the ensemble on: none has a label and finite logits.")
    if target.min() < 0 or target.max() >= logits.shape[2]:
        raise ValueError(
            f"The logits have {logits.shape[2]} classes, so targets must lie in 0..{logits.shape[2] - 1}; got "
            f"{int(target.min())} to {int(target.max())}."
        )
    return logits, target


def _fit(logits: Tensor, target: Tensor) -> tuple[float, ...]:
    """Return the weights that minimise the cross-entropy, held together and, all at once, near the mean."""
    # What is the same for all classes changes no probability; without it, less is lost in rounding.
    logits = logits - logits.mean(-1, keepdim=True)
    of_target = logits.gather(-1, target.expand(len(logits), -1).unsqueeze(-1)).sum((1, 2))

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = torch.from_numpy(weights)
        total = torch.einsum("k,knc->nc", weight, logits)
        apart, size = weight - weight.mean(), weight.sum() - 1
        value = total.logsumexp(-1).sum() - weight @ of_target + _PULL * apart.square().sum() + size.square() / 2
        slope = torch.einsum("nc,knc->k", total.softmax(-1), logits) - of_target + 2 * _PULL * apart + size
        return float(value), slope.numpy()

    outputs = len(logits)
    from scipy.optimize import minimize

    found = minimize(
        objective, np.full(outputs, 1 / outputs), jac=True, method="L-BFGS-B", bounds=[(0, None)] * outputs
    )
    return tuple(found.x.tolist())
