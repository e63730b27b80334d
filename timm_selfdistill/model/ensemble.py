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

    Raises:
        ValueError: If a weight is negative or no finite number, none is above 0, or the number of images is not
            positive.
    """

    weights: tuple[float, ...]
    images: int | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"The weights of an ensemble are {list(self.weights)}; they must be finite, at least 0 and not all 0."
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
            return cls(tuple(float(weight) for weight in value["weights"]), value.get("images"))
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
