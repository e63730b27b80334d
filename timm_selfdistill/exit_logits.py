"""The logits of all exits on held-out images, and what is fitted on them: temperatures and the ensemble's weights."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from timm_selfdistill.exits import unchanged
from timm_selfdistill.gather import SampleGatherer
from timm_selfdistill.lazy import needs_extra
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.model import Ensemble, SelfDistillModel
from timm_selfdistill.output import progress_bar

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOWEST_TEMPERATURE: Final = 0.05
_HIGHEST_TEMPERATURE: Final = 20.0
# What holds the weights together, and biases at 0, in nats for a deviation of 1: as much as a few dozen images say.
_PULL: Final = 30.0
_BIAS_PULL: Final = 10.0


@dataclass(frozen=True, eq=False)
class ExitLogits:
    """The logits of every exit for every image of a split.

    Args:
        logits: Logits [K + 1, N, C], shallow to deep, the last the backbone's own.
        targets: Class indices [N].
        num_skipped: How many more images there are that could not be decoded.
        ensemble: How the logits become one answer; their mean by default.

    Raises:
        ValueError: If there are no images or exits, less than two classes, a target is no class, or shapes do not fit.
    """

    logits: Tensor
    targets: Tensor
    num_skipped: int = 0
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        _check_shapes(self.logits, self.targets)
        outputs, images, classes = self.logits.shape
        if outputs < 2 or classes < 2:
            raise ValueError(f"Early exit needs an added exit and 2 classes; got {outputs - 1} and {classes}.")
        if not images:
            raise ValueError(f"There are no images to calibrate on ({self.num_skipped} could not be decoded).")
        if self.targets.min() < 0 or self.targets.max() >= classes:
            raise ValueError(
                f"The model has {classes} classes, so targets must lie in 0..{classes - 1}; "
                f"got {int(self.targets.min())} to {int(self.targets.max())}."
            )

    @classmethod
    def of_labelled(cls, logits: Tensor, labels: Tensor, ensemble: Ensemble | None = None) -> "ExitLogits":
        """Leave out the images whose label is -100."""
        _check_shapes(logits, labels)
        known = labels != IGNORED
        return cls(logits[:, known], labels[known].long(), int((~known).sum()), ensemble)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_exits(self) -> int:
        """Number K of added exits."""
        return len(self.logits) - 1

    @property
    def correct(self) -> Tensor:
        """Whether each exit is right [K + 1, N]; logits that are not a number never are."""
        return is_right(self.logits, self.targets)

    @property
    def ensemble_correct(self) -> Tensor:
        """Whether the ensemble is right [N]."""
        return is_right(self.combined(self.logits), self.targets)

    @property
    def combined(self) -> Ensemble:
        """How the logits become one answer."""
        return self.ensemble or Ensemble.mean(len(self.logits))

    def select(self, rows: Tensor) -> "ExitLogits":
        """Return the images at these places."""
        return ExitLogits(self.logits[:, rows], self.targets[rows], ensemble=self.ensemble)


@torch.no_grad()
def collect_logits(
    model: SelfDistillModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    title: str | None = "run",
    *,
    accelerator: "Accelerator | None" = None,
    gather: bool = True,
    most: int | None = None,
) -> ExitLogits:
    """Run a model over a split once; return the logits on the CPU, in at least float32.

    Args:
        model: The wrapped model; left in eval mode.
        loader: Batches (images [B, C, H, W], targets [B]); targets of -100 are left out.
        title: Shown by the progress bar; None for no bar.
        accelerator: Sets the precision, and gathers the logits of all its processes.
        gather: Whether each process sees its own share of the images; otherwise every process sees all of them.
        most: Roughly how many images to keep; where there are more, evenly spaced ones.

    Raises:
        ValueError: If the split has no images, or a target is none of the model's classes.
    """
    model.eval()
    device = next(model.parameters()).device
    samples = SampleGatherer(accelerator if gather else None, most)
    kept_on = "cpu" if samples.accelerator is None else device
    for images, targets in progress_bar(loader, title=title, show=title is not None):
        with nullcontext() if accelerator is None else accelerator.autocast():
            logits = torch.stack(model(images.to(device), return_exits=True).logits, 1)
        logits = logits.to(kept_on, torch.promote_types(logits.dtype, torch.float32))
        samples.add(logits, targets.to(kept_on))
    logits, labels = samples.gather((model.num_exits + 1, model.num_classes))
    return ExitLogits.of_labelled(logits.transpose(0, 1).cpu(), labels.cpu(), model.ensemble)


@needs_extra("fit_temperatures")
def fit_temperatures(logits: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Return for each exit the temperature that minimises the cross-entropy on held-out images.

    Paper: "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599. Unlike there, the target has
    the probability 1 - 1 / (N + 2) and the other classes share the rest, as in Platt scaling: an exit that is right
    on all N images would otherwise get a temperature of 0, at which every confidence is 1.

    Args:
        logits: Logits [K, N, C].
        targets: Class indices [N].

    Returns:
        K temperatures between 0.05 and 20; 1 for an exit whose logits are all equal, or none a number.
    """
    return tuple(_fit_temperature(row, targets) for row in logits.float())


@needs_extra("fit_ensemble")
def fit_ensemble(
    model: SelfDistillModel | None = None,
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    logits: Sequence[Tensor] | Tensor | None = None,
    target: Tensor | None = None,
) -> Ensemble:
    """Fit the weights of the exits in the ensemble, keep them with the model, and return the ensemble.

    The weights, at least 0, minimise the cross-entropy of the weighted sum of the logits. Differences between them are
    penalised by as much as a few dozen images say: with few images, the mean comes out. A bias of each class is fitted
    beside them, and penalised too, where that lowers the cross-entropy on the other half of the images. The problem is
    convex, so the answer depends on the images alone. The ensembles of the exits 0 to k, with which a running ensemble
    answers, are fitted in the same way. Give images that were not trained on, and that nothing is reported on.

    Paper: "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks", NeurIPS 2021,
    https://arxiv.org/abs/2106.05409, whose weights are per class and exit and fitted by gradient descent.

    Args:
        model: The wrapped model, whose `ensemble` is set; it may be left out where logits are given.
        loader: Batches (images [B, C, H, W], class indices [B]); targets of -100 are left out.
        logits: In place of a loader, K + 1 tensors [N, num_classes], shallow to deep, the last the backbone's own.
        target: Their class indices [N].

    Raises:
        ValueError: If there are neither images nor logits or both, or shapes, classes or values do not fit.
    """
    if loader is not None and model is not None and logits is None and target is None:
        with unchanged(model):
            stored = collect_logits(model, loader, None)
    elif loader is None and logits is not None and target is not None:
        stored = ExitLogits.of_labelled(torch.stack([member.detach().cpu() for member in logits]), target.cpu())
    else:
        raise ValueError("fit_ensemble takes either a model and a loader, or logits and their target.")
    outputs, _, classes = stored.logits.shape
    if model is not None and (outputs, classes) != (model.num_exits + 1, model.num_classes):
        raise ValueError(
            f"The model has {model.num_exits + 1} outputs and {model.num_classes} classes; the logits are of "
            f"{outputs} and {classes}."
        )
    finite = stored.logits.isfinite().all(-1).all(0)
    if not finite.any():
        raise ValueError("There are no images to fit the ensemble on: none has finite logits.")
    members, labels = stored.logits[:, finite].double(), stored.targets[finite]
    # A running ensemble of weak exits is another problem than that of all, in which they may have no weight.
    bias = _bias_helps(members, labels)
    *running, whole = (_fit_combination(members[:count], labels, bias) for count in range(1, outputs + 1))
    ensemble = replace(whole, running=tuple(running))
    if model is not None:
        model.ensemble = ensemble
    return ensemble


def _check_shapes(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 3 or targets.shape != logits.shape[1:2] or targets.is_floating_point():
        raise ValueError(
            "Expected logits [K + 1, N, num_classes] and class indices [N]; "
            f"got {list(logits.shape)} and {targets.dtype} {list(targets.shape)}."
        )


def is_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each of the logits [..., N, C] is right [..., N]; those that are not a number never are."""
    return (logits.argmax(-1) == targets) & ~logits.softmax(-1).amax(-1).isnan()


def _fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Find the root of the slope of the cross-entropy over 1 / T, in which it is convex."""
    from scipy.optimize import brentq

    finite = logits.isfinite().all(-1)
    logits, targets = logits[finite], targets[finite]
    count, classes = logits.shape
    # What is the same for all classes changes no probability; without it, less is lost in rounding.
    logits = logits - logits.mean(-1, keepdim=True)
    if not count or logits.abs().max() <= 1e-6:
        return 1.0
    rest = 1 / (count + 2)
    of_target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    of_others = (logits.sum(-1) - of_target) / (classes - 1)
    wanted = ((1 - rest) * of_target + rest * of_others).double().mean()

    def slope(log_temperature: float) -> float:
        expected = ((logits / math.exp(log_temperature)).softmax(-1) * logits).sum(-1).double().mean()
        return float(expected - wanted)

    low, high = math.log(_LOWEST_TEMPERATURE), math.log(_HIGHEST_TEMPERATURE)
    # The slope falls with the temperature.
    if slope(low) <= 0:
        return _LOWEST_TEMPERATURE
    if slope(high) >= 0:
        return _HIGHEST_TEMPERATURE
    return math.exp(brentq(slope, low, high, xtol=1e-8))


def _bias_helps(logits: Tensor, target: Tensor) -> bool:
    """Whether a bias that is fitted on one half of the images lowers the cross-entropy on the other, in both turns."""
    # Halves that do not depend on the order of the images, which may be that of their classes.
    order = logits[-1, :, 0].argsort()
    halves = order[::2], order[1::2]
    if not len(halves[1]):
        return False
    losses = {False: 0.0, True: 0.0}
    for fitted, other in (halves, halves[::-1]):
        for bias in losses:
            ensemble = _fit_combination(logits[:, fitted], target[fitted], bias)
            losses[bias] += float(cross_entropy(ensemble(logits[:, other]), target[other], reduction="sum"))
    return losses[True] < losses[False]


def _fit_combination(logits: Tensor, target: Tensor, with_bias: bool) -> Ensemble:
    """Return the weights and biases that minimise the cross-entropy, held together and, all at once, near the mean."""
    from scipy.optimize import minimize

    outputs, images, classes = logits.shape
    logits = logits - logits.mean(-1, keepdim=True)
    of_target = logits.gather(-1, target.expand(outputs, -1).unsqueeze(-1)).sum((1, 2))
    counts = target.bincount(minlength=classes)

    def objective(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias = torch.from_numpy(values).split_with_sizes([outputs, classes])
        total = torch.einsum("k,knc->nc", weight, logits) + bias
        apart, size = weight - weight.mean(), weight.sum() - 1
        value = total.logsumexp(-1).sum() - weight @ of_target - bias @ counts.double()
        value += _PULL * apart.square().sum() + size.square() / 2 + _BIAS_PULL * bias.square().sum()
        expected = total.softmax(-1)
        of_weight = torch.einsum("nc,knc->k", expected, logits) - of_target + 2 * _PULL * apart + size
        of_bias = expected.sum(0) - counts + 2 * _BIAS_PULL * bias
        return float(value), torch.cat([of_weight, of_bias]).numpy()

    start = np.concatenate([np.full(outputs, 1 / outputs), np.zeros(classes)])
    free = (None, None) if with_bias else (0.0, 0.0)
    bounds = [(0.0, None)] * outputs + [free] * classes
    # To rounding: by default it stops where the scale of all weights, which hardly matters, is a per cent off.
    limits = {"ftol": 1e-14, "gtol": 1e-7, "maxiter": 300}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
    found = result.x.tolist()
    weights, bias = tuple(found[:outputs]), tuple(found[outputs:]) if with_bias else None
    # Outputs that are worse than to say nothing get no weight: where all are, the mean stays.
    return Ensemble(weights if any(weights) else (1 / outputs,) * outputs, images, bias)
