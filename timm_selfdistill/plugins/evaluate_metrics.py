"""Accuracy and calibration error of one output, as metrics of `evaluate`."""

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from timm_selfdistill.lazy import needs_extra
from timm_selfdistill.metrics import calibration_error, top_k_accuracy

with needs_extra(__name__):
    import evaluate
    from datasets import Features, Value


class _InMemoryMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """A metric that leaves no files, so that any number of processes may use it at once."""

    columns: ClassVar[dict[str, Any]]
    paper = ""

    def __init__(self) -> None:
        # `evaluate` makes a cache folder even for data kept in memory, and never uses it then.
        with TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation=self.paper, features=Features(self.columns))


class TopKAccuracy(_InMemoryMetric):
    """Share of samples whose label is among the k most likely classes, for several k at once.

    `compute(predictions, references)` takes the class indices of each sample [N, max(k)], most likely first, and the
    labels [N], and returns `{"top1": percent, "top5": percent}`. With fewer columns than k all of them count, as when
    there are fewer than five classes. An index of -1 is not a class and is never right.

    Args:
        k: The numbers of classes to look at.

    Raises:
        ValueError: If k has no positive entry, or in `compute` for no samples, other shapes or a negative label.
    """

    columns: ClassVar = {"predictions": [Value("int64")], "references": Value("int64")}

    def __init__(self, k: Sequence[int] = (1, 5)) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must hold at least one number, each 1 or more; got {k!r}.")
        self.k = tuple(k)
        super().__init__()

    def _compute(self, predictions: npt.ArrayLike, references: npt.ArrayLike) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), _labels(references)
        if ranked.ndim != 2 or len(ranked) != len(labels):
            raise ValueError(f"predictions must be [{len(labels)}, k] class indices; got shape {ranked.shape}.")
        return top_k_accuracy(ranked, labels, self.k)


class ExpectedCalibrationError(_InMemoryMetric):
    """How far confidence and accuracy lie apart (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

    The samples are sorted by confidence into M bins of equal width, (m/M, (m+1)/M], a confidence of 0 falling into the
    first, and `ece = sum_m |B_m| / N * |accuracy(B_m) - mean confidence(B_m)|`, a fraction in [0, 1].
    Paper: https://arxiv.org/abs/1706.04599.

    `compute(predictions, references, confidences)` takes predicted class indices [N], labels [N] and the probabilities
    that the model gives its predictions [N], and returns `{"ece": fraction}`.

    Args:
        num_bins: M; the paper's is 15.

    Raises:
        ValueError: If `num_bins` < 1, or in `compute` for no samples, unequal lengths, a negative label or a confidence
            outside [0, 1].
    """

    columns: ClassVar = {"predictions": Value("int64"), "references": Value("int64"), "confidences": Value("float64")}
    paper = "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599"

    def __init__(self, num_bins: int = 15) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be 1 or more; got {num_bins}.")
        self.num_bins = num_bins
        super().__init__()

    def _compute(
        self, predictions: npt.ArrayLike, references: npt.ArrayLike, confidences: npt.ArrayLike
    ) -> dict[str, float]:
        predicted, labels = np.asarray(predictions), _labels(references)
        confidence = np.asarray(confidences, dtype=np.float64)
        if not predicted.shape == confidence.shape == labels.shape:
            raise ValueError(
                "predictions, references and confidences must be equally long; "
                f"got shapes {predicted.shape}, {labels.shape} and {confidence.shape}."
            )
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise ValueError(
                f"confidences must lie in [0, 1]; got values from {confidence.min()} to {confidence.max()}."
            )
        return {"ece": calibration_error(predicted, labels, confidence, self.num_bins)}


def _labels(references: npt.ArrayLike) -> npt.NDArray[Any]:
    labels = np.asarray(references)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"references must be at least one label, [N]; got shape {labels.shape}.")
    if labels.min() < 0:
        raise ValueError(f"Labels must not be negative; got {labels.min()}.")
    return labels
