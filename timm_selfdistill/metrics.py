"""Accuracy and calibration of every exit and of their ensemble, over all processes, and how certain accuracies are."""

import hashlib
import logging
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_selfdistill.gather import SampleGatherer
from timm_selfdistill.model import Ensemble, ExitOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# The label of a sample that is not counted, as PyTorch's cross-entropy has it.
IGNORED: Final = -100

_NUM_RANKED = 5
_NO_CLASS = -1
# Of the standard normal distribution, for confidence intervals of 95 %.
_Z: Final = NormalDist().inv_cdf(0.975)


class OutputMetrics(TypedDict):
    """How good one output is: `top1`, `top5` and `macro_recall`, the mean accuracy of the classes that have samples
    (balanced accuracy), in percent, `ece` in [0, 1], `loss` the mean cross-entropy in nats.
    """

    top1: float
    top5: float
    macro_recall: float
    ece: float
    loss: float


class Answers(NamedTuple):
    """Which samples each output got right, so that two networks can be compared sample by sample.

    `order` is a digest of the labels: answers with the same one are to the same samples. `correct` holds one bit a
    sample for each exit, the mean of all and, if there is one, the fitted ensemble.
    """

    order: str
    correct: tuple[bytes, ...]

    def gained_and_lost(self, output: int, other: "Answers", other_output: int) -> tuple[int, int] | None:
        """Return how many samples only this output got right, and how many only the other's; None for other samples."""
        if self.order != other.order:
            return None
        own = np.frombuffer(self.correct[output], dtype=np.uint8)
        others = np.frombuffer(other.correct[other_output], dtype=np.uint8)
        return int(np.unpackbits(own & ~others).sum()), int(np.unpackbits(others & ~own).sum())


class ExitMetricsResult(TypedDict):
    """What `ExitMetrics.compute` returns; plain numbers, but for `answers`.

    `exits` holds K + 1 entries, shallow to deep, the last the backbone's own; `ensemble`, the mean of the logits, is
    None for a model without added exits, and `fitted_ensemble` where no fitted one was given. `running` are the
    ensembles of the exits 0 to k for every k, by the fitted weights where they were given. `num_samples` counts the
    samples of the metrics, `num_skipped` those that were left out for their label IGNORED, and `num_nonfinite` the
    samples for which any output was not a number. `class_sizes` are the numbers of samples of the smallest and of the
    largest class that has any.
    """

    exits: list[OutputMetrics]
    ensemble: OutputMetrics | None
    fitted_ensemble: OutputMetrics | None
    running: list[OutputMetrics]
    num_samples: int
    num_skipped: int
    num_nonfinite: int
    class_sizes: tuple[int, int]
    answers: Answers


class ExitMetrics:
    """Top-1, top-5, calibration error and cross-entropy of every exit and of the ensemble, over a whole data set.

    Call `update` with every batch, then `compute`, which starts afresh. The ensemble is the mean of the logits of all
    exits, the backbone's own included. All arithmetic is in float32 whatever the model's precision. `update` waits
    neither for the device nor for other processes, which may therefore have unequal numbers of batches.

    A sample whose label is IGNORED (-100), as its image was not readable, counts nowhere but in `num_skipped`. One
    whose softmax is not a number (NaN or +inf among its logits) counts as wrong with confidence 0, makes that output's
    `loss` NaN, and is counted and logged.

    Args:
        num_outputs: K + 1, the number of logits the model returns.
        accelerator: Gathers the samples of all its processes; those with which a loader prepared by it fills up the
            last uneven batch are left out. Without it, the samples of this process count.
        ensemble: The model's, to be measured beside the mean if it was fitted on other samples.

    Raises:
        ValueError: If `num_outputs` < 1.
    """

    def __init__(
        self, num_outputs: int, accelerator: "Accelerator | None" = None, ensemble: Ensemble | None = None
    ) -> None:
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be 1 or more; got {num_outputs}.")
        self.num_outputs = num_outputs
        self.ensemble = Ensemble.mean(num_outputs) if ensemble is None else ensemble
        self._num_classes: int | None = None
        self._samples = SampleGatherer(accelerator)

    @torch.no_grad()
    def update(self, out: ExitOutput, target: Tensor) -> None:
        """Add one batch of this process, while its loader is being iterated over.

        Args:
            out: What the model returned: `num_outputs` logits [B, num_classes].
            target: Class indices [B], or IGNORED.

        Raises:
            ValueError: If the number of outputs or a shape is wrong.
        """
        if len(out.logits) != self.num_outputs:
            raise ValueError(f"Expected the logits of {self.num_outputs} outputs; got {len(out.logits)}.")
        logits = torch.stack(out.logits).float()
        if logits.ndim != 3 or target.shape != logits.shape[1:2] or target.is_floating_point():
            raise ValueError(
                "Expected logits [B, num_classes] and class indices [B]; "
                f"got {tuple(logits.shape[1:])} and {target.dtype} {tuple(target.shape)}."
            )
        if self._num_classes not in (None, logits.shape[2]):
            raise ValueError(f"Expected {self._num_classes} classes as before; got {logits.shape[2]}.")
        self._num_classes = logits.shape[2]
        # The mean is the mean of the logits bit for bit, whatever its weights are rounded to.
        rows = [logits, logits.mean(dim=0, keepdim=True), self.ensemble(logits).unsqueeze(0)]
        rows += [self.ensemble.prefix(last)(logits[: last + 1]).unsqueeze(0) for last in range(1, self.num_outputs - 1)]
        self._samples.add(_score(torch.cat(rows), target), target)

    def compute(self) -> ExitMetricsResult:
        """Return the metrics of all samples since the last call; all processes call it together and get the same.

        Raises:
            ValueError: If there are no samples or all are ignored, or if labels lie outside the model's classes.
        """
        rows = self.num_outputs + 2 + max(self.num_outputs - 2, 0)
        scores, labels = (found.cpu().numpy() for found in self._samples.gather((rows, 2 + _NUM_RANKED)))
        num_classes, self._num_classes = self._num_classes, None
        if not len(labels):
            raise ValueError("There are no samples to compute metrics of: update() was not called.")
        counted = labels != IGNORED
        num_skipped = int((~counted).sum())
        scores, labels = scores[counted], labels[counted]
        if not len(labels):
            raise ValueError(f"All {num_skipped} samples were skipped, so there is nothing to compute metrics of.")
        if num_classes is not None and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"The model has {num_classes} classes, so labels must lie in 0..{num_classes - 1}; "
                f"got labels from {labels.min()} to {labels.max()}."
            )
        num_nonfinite = int((scores[:, :, 2] == _NO_CLASS).any(axis=1).sum())
        if num_nonfinite:
            logger.warning("Logits of %d of %d samples are not finite: counted as wrong.", num_nonfinite, len(labels))
        outputs = [_metrics(scores[:, index], labels) for index in range(scores.shape[1])]
        exits, (mean, fitted, *between) = outputs[: self.num_outputs], outputs[self.num_outputs :]
        combined = mean if self.ensemble.is_mean else fitted
        sizes = np.unique(labels, return_counts=True)[1]
        right = scores[:, : self.num_outputs + 2, 2] == labels[:, None]
        return {
            "exits": exits,
            "ensemble": mean if self.num_outputs > 1 else None,
            "fitted_ensemble": None if self.ensemble.is_mean else fitted,
            "running": [exits[0], *between, combined][: self.num_outputs],
            "num_samples": len(labels),
            "num_skipped": num_skipped,
            "num_nonfinite": num_nonfinite,
            "class_sizes": (int(sizes.min()), int(sizes.max())),
            "answers": Answers(
                hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest(),
                tuple(np.packbits(column).tobytes() for column in right.T),
            ),
        }


def top_k_accuracy(ranked: npt.NDArray[Any], labels: npt.NDArray[Any], k: Sequence[int]) -> dict[str, float]:
    """Return for each k the share of samples, in percent, whose label [N] is among the first k of [N, max(k)]."""
    hits = ranked == labels[:, None]
    return {f"top{count}": 100.0 * float(hits[:, :count].any(axis=1).mean()) for count in k}


def macro_recall(predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Return the mean accuracy, in percent, of the classes that have samples, of predicted classes [N]."""
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    hits = np.bincount(places, weights=predicted == labels, minlength=len(sizes))
    return 100.0 * float((hits / sizes).mean())


def calibration_error(
    predicted: npt.NDArray[Any], labels: npt.NDArray[Any], confidence: npt.NDArray[Any], num_bins: int = 15
) -> float:
    """Return the expected calibration error of predicted classes [N]; see `ExpectedCalibrationError`."""
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.digitize(confidence, inner_edges, right=True)
    # |B| / N * |accuracy - mean confidence| is |sum of hits - sum of confidences| / N, without empty-bin divisions.
    gap = (predicted == labels) - confidence
    return math.fsum(abs(math.fsum(gap[bins == index])) for index in range(num_bins)) / len(labels)


def wilson_interval(hits: float, total: int) -> tuple[float, float]:
    """Return the score interval of a share, in percent, where `hits` of `total` images (1 or more) were right.

    It is that of Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953: never empty, never outside 0 to 100,
    and close to its confidence for few images and for shares near 0 and 100, where the usual interval is not.
    """
    share, squared = hits / total, _Z**2 / total
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / total + squared / (4 * total))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """Return the interval of the difference of two accuracies on the same images, in percentage points.

    It is Wald's interval of paired shares with the adjustment of Bonett and Price (2012),
    https://doi.org/10.3102/1076998611411915, which adds one image to each of the two counts; Fagerland, Lydersen and
    Laake (2014, https://doi.org/10.1002/sim.6148) recommend it. Only the first one got `gained` images right, only the
    second `lost`; images that both get right or both wrong only count in `total`, as in McNemar's test.
    """
    more, fewer, count = (gained + 1) / (total + 2), (lost + 1) / (total + 2), total + 2
    half = _Z * math.sqrt((more + fewer - (more - fewer) ** 2) / count)
    return 100 * max(-1.0, more - fewer - half), 100 * min(1.0, more - fewer + half)


def top1_interval(top1: float | None, total: int) -> tuple[float, float] | None:
    """Return Wilson's interval of an accuracy in percent on `total` images, None for None."""
    return None if top1 is None else wilson_interval(round(top1 * total / 100), total)


def _metrics(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> OutputMetrics:
    ranked = scores[:, 2:].astype(np.int64)
    accuracy = top_k_accuracy(ranked, labels, (1, _NUM_RANKED))
    return {
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "macro_recall": macro_recall(ranked[:, 0], labels),
        "ece": calibration_error(ranked[:, 0], labels, scores[:, 0].astype(np.float64)),
        # The exactly rounded sum does not depend on the order in which the processes' samples arrive.
        "loss": math.fsum(scores[:, 1]) / len(labels),
    }


def _score(logits: Tensor, target: Tensor) -> Tensor:
    """Turn logits [outputs, B, C] into [B, outputs, 7]: confidence, cross-entropy, the five most likely classes.

    Class indices are exact in float32 up to 2^24 classes, so that one tensor holds all. Labels outside the classes are
    found later, without waiting for the device here.
    """
    num_outputs, batch_size, num_classes = logits.shape
    ranked = logits.topk(min(_NUM_RANKED, num_classes)).indices
    log_probs = logits.log_softmax(dim=-1)
    confidence = log_probs.gather(-1, ranked[..., :1]).exp()
    label = target.long().clamp(0, num_classes - 1).expand(num_outputs, batch_size).unsqueeze(-1)
    loss = -log_probs.gather(-1, label)
    ranked = F.pad(ranked, (0, _NUM_RANKED - ranked.shape[-1]), value=_NO_CLASS)
    ranked = ranked.where(confidence.isfinite(), _NO_CLASS)
    confidence = confidence.nan_to_num(nan=0.0).clamp(max=1.0)
    return torch.cat([confidence, loss, ranked.float()], dim=-1).transpose(0, 1)
