"""How the logits of all exits become one answer: their mean, or a weighted sum that was fitted on held-out images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor

from timm_selfdistill.checks import is_integer


@dataclass(frozen=True)
class Ensemble:
    """A weighted sum of the logits of all exits; made by `fit_ensemble` or `Ensemble.mean`.

    Args:
        weights: One for each of the K exits, shallow to deep, and one for the backbone's own classifier; at least 0.
        images: How many held-out images it was fitted on, where that is known.
        running: For each of the K exits, the k + 1 weights with which the exits 0 to k are combined without the deeper
            ones; by default the same weights, scaled to the sum of all.

    Raises:
        ValueError: If a weight is negative or no finite number, all of a combination are 0, the number of images is not
            positive, or `running` has not k + 1 weights for each of the exits.
    """

    weights: tuple[float, ...]
    images: int | None = None
    running: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for weights in (self.weights, *(self.running or ())):
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
                raise ValueError(
                    f"The weights of an ensemble are {list(weights)}; they must be finite, at least 0 and not all 0."
                )
        sizes = list(range(1, len(self.weights)))
        if self.running is not None and [len(weights) for weights in self.running] != sizes:
            raise ValueError(
                f"The running weights of an ensemble of {len(self.weights)} outputs are for "
                f"{[len(weights) for weights in self.running]} exits; they must be for {sizes}."
            )
        if self.images is not None and not (is_integer(self.images) and self.images > 0):
            raise ValueError(f"The number of images of an ensemble is {self.images!r:.100}; it must be 1 or more.")

    @classmethod
    def mean(cls, outputs: int) -> Self:
        """Return the mean of the logits of `outputs` outputs, K + 1 of a model."""
        return cls((1 / outputs,) * outputs)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on; raise ValueError for anything else."""
        try:
            running = value.get("running")
            return cls(
                _numbers(value["weights"]),
                value.get("images"),
                None if running is None else tuple(_numbers(weights) for weights in running),
            )
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"An ensemble is a mapping with a list 'weights'; got {value!r:.200}.") from error

    @property
    def is_mean(self) -> bool:
        """Whether it is the plain mean of the logits, which was not fitted."""
        return self.images is None and self == Ensemble.mean(len(self.weights))

    @property
    def title(self) -> str:
        """What answers that it gave are said to come from."""
        return "ensemble (mean)" if self.is_mean else "ensemble (fitted)"

    def prefix(self, exit: int) -> "Ensemble":
        """Return how the exits 0 to `exit` are combined: by their running weights or, without, by the same weights.

        These are scaled to the sum of all; where none of the exits has one, the last of them answers alone.
        """
        if exit == len(self.weights) - 1:
            return self
        if self.running is not None:
            return Ensemble(self.running[exit], self.images)
        total, own = math.fsum(self.weights), math.fsum(self.weights[: exit + 1])
        if not own:
            return Ensemble((0.0,) * exit + (total,), self.images)
        return Ensemble(tuple(weight * total / own for weight in self.weights[: exit + 1]), self.images)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)

    def __call__(self, logits: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the ensemble's logits.

        Args:
            logits: K + 1 tensors [..., C], shallow to deep, the last the backbone's own.

        Returns:
            Logits [..., C].

        Raises:
            ValueError: If there is not one weight for each.
        """
        if len(logits) != len(self.weights):
            raise ValueError(f"The ensemble has {len(self.weights)} weights for the logits of {len(logits)} outputs.")
        members = zip(self.weights, logits, strict=True)
        # A member of weight 0 may be NaN.
        return sum((weight * member for weight, member in members if weight), start=logits[0].new_zeros(()))


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
