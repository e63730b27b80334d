"""All exits together: their logits as one answer, the mean or a weighted sum that was fitted on held-out images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from torch import Tensor, nn

from timm_selfdistill.checks import is_integer

if TYPE_CHECKING:
    from timm_selfdistill.model.network import SelfDistillModel


ENSEMBLE: Final = "ensemble"
"""What stands in place of an exit's index where all exits answer together."""

ExitChoice = int | Literal["ensemble"]


@dataclass(frozen=True)
class Ensemble:
    """A weighted sum of the logits of all exits, and a bias; made by `fit_ensemble` or `Ensemble.mean`.

    Args:
        weights: One for each of the K exits, shallow to deep, and one for the backbone's own classifier; at least 0.
        images: How many held-out images it was fitted on, where that is known.
        bias: What is added to the logits of each class; nothing by default.
        running: For each of the K exits, the ensemble of the exits 0 to k, without the deeper ones; by default it has
            the same weights, scaled to the sum of all, and the same bias.

    Raises:
        ValueError: If a weight or a bias is not finite, a weight is negative, no weight is above 0, the number of
            images is not positive, or `running` is not of 1, 2, ..., K outputs and as many classes.
    """

    weights: tuple[float, ...]
    images: int | None = None
    bias: tuple[float, ...] | None = None
    running: tuple["Ensemble", ...] | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(
                f"The weights of an ensemble are {list(self.weights)}; they must be finite, at least 0 and not all 0."
            )
        if self.images is not None and not (is_integer(self.images) and self.images > 0):
            raise ValueError(f"The number of images of an ensemble is {self.images!r:.100}; it must be 1 or more.")
        if not all(map(math.isfinite, self.bias or ())):
            raise ValueError(f"The bias of an ensemble is {list(self.bias or ())!r:.300}; it must be finite.")
        members = self.running or ()
        sizes = [len(member.weights) for member in members]
        if self.running is not None and sizes != list(range(1, len(self.weights))):
            raise ValueError(
                f"The running ensembles have {sizes} outputs; of weights for {len(self.weights)} they must have "
                f"{list(range(1, len(self.weights)))}."
            )
        classes = None if self.bias is None else len(self.bias)
        if any((None if member.bias is None else len(member.bias)) != classes for member in members):
            raise ValueError("The running ensembles must have a bias for the same classes as the ensemble.")

    @classmethod
    def mean(cls, outputs: int) -> Self:
        """Return the mean of the logits of `outputs` outputs, K + 1 of a model."""
        return cls((1 / outputs,) * outputs)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on; raise ValueError for anything else."""
        try:
            weights, bias, running = value["weights"], value.get("bias"), value.get("running")
            return cls(
                weights=tuple(map(float, weights)),
                images=value.get("images"),
                bias=None if bias is None else tuple(map(float, bias)),
                running=None if running is None else tuple(map(cls.from_json, running)),
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
        """Return the ensemble of the exits 0 to `exit`: the running one or, without, that of the same weights.

        These are scaled to the sum of all; where none of the exits has one, the last of them answers alone.
        """
        if exit == len(self.weights) - 1:
            return self
        if self.running is not None:
            return self.running[exit]
        total, own = math.fsum(self.weights), math.fsum(self.weights[: exit + 1])
        if not own:
            return Ensemble((0.0,) * exit + (total,), self.images, self.bias)
        weights = tuple(weight * total / own for weight in self.weights[: exit + 1])
        return Ensemble(weights, self.images, self.bias)

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
            ValueError: If there is not one weight for each, or one bias for each class.
        """
        if len(logits) != len(self.weights):
            raise ValueError(f"The ensemble has {len(self.weights)} weights for the logits of {len(logits)} outputs.")
        members = zip(self.weights, logits, strict=True)
        if self.bias is not None and len(self.bias) != logits[0].shape[-1]:
            raise ValueError(f"The ensemble has a bias for {len(self.bias)} classes, not {logits[0].shape[-1]}.")
        start = logits[0].new_zeros(()) if self.bias is None else logits[0].new_tensor(self.bias)
        # A member of weight 0 may be NaN.
        return sum((weight * member for weight, member in members if weight), start=start)


class EachExit(nn.Module):
    """Runs all exits of a wrapped model, in its mode, and returns the logits of each."""

    def __init__(self, model: "SelfDistillModel") -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, C, H, W] to K + 1 logits [B, num_classes], shallow to deep, the last the backbone's own."""
        return _run(self.model, x, [True] * self.model.num_exits)


class AllExits(nn.Module):
    """Runs the exits of a wrapped model, in its mode, and combines their logits as the model's `ensemble` says."""

    def __init__(self, model: "SelfDistillModel") -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        ensemble = self.model.ensemble
        return ensemble(_run(self.model, x, [bool(weight) for weight in ensemble.weights]))


def check_choice(model: "SelfDistillModel", exit: int | str, words: Sequence[str] = (ENSEMBLE,)) -> None:
    """Raise ValueError unless this is the index of an exit, `num_exits`, or one of the words."""
    if exit in words:
        return
    if isinstance(exit, str):
        allowed = [f"0 to {model.num_exits}", *map(repr, words)]
        raise ValueError(f"There is no exit {exit!r:.100}; allowed are {', '.join(allowed[:-1])} and {allowed[-1]}.")
    model.check_exit(exit)


def _run(model: "SelfDistillModel", x: Tensor, runs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return K + 1 logits; in place of those of the exits that need not run, the backbone's."""
    found: dict[int, Tensor] = {}

    def visit(index: int, taps: tuple[Tensor, ...]) -> None:
        if runs[index]:
            found[index] = model.head_of(index).classify(*taps)

    last = model.forward_while(x, visit)
    assert last is not None  # no image leaves
    return tuple(found.get(index, last) for index in range(model.num_exits + 1))
