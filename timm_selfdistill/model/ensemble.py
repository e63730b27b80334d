"""How the logits of all exits become one answer: their mean, or a weighted sum that was fitted on held-out images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class Ensemble:
    """A weighted sum of the logits of all exits; made by `fit_ensemble` or `Ensemble.mean`.

    Args:
        weights: One for each of the K exits, shallow to deep, and one for the backbone's own classifier; at least 0.

    Raises:
        ValueError: If a weight is negative or no finite number, or none is above 0.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"The weights of an ensemble are {list(self.weights)}; they must be finite, at least 0 and not all 0."
            )

    @classmethod
    def mean(cls, outputs: int) -> Self:
        """Return the mean of the logits of `outputs` outputs, K + 1 of a model."""
        return cls((1 / outputs,) * outputs)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on; raise ValueError for anything else."""
        try:
            return cls(tuple(float(weight) for weight in value["weights"]))
        except (LookupError, TypeError) as error:
            raise ValueError(f"An ensemble is a mapping with a list 'weights'; got {value!r:.200}.") from error

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of the logits."""
        return self == Ensemble.mean(len(self.weights))

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
