"""What all losses share: what they need, their registry, and how they check and compute with a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_selfdistill.checks import Gate
from timm_selfdistill.registry import Registry

LossClass = TypeVar("LossClass", bound=type[nn.Module])

_NO_INDEX: Final = torch.iinfo(torch.int64).min
_LIMIT: Final = 1e14
# How far the sum of a sample's probabilities may be from 1: what rounding makes of many classes in half precision.
_SUM_TOLERANCE: Final = 0.01


class TrainingTime(NamedTuple):
    """How far training has come.

    Attributes:
        epoch: Epochs done, with the share that is done of the present one.
        epochs: Epochs in all.
    """

    epoch: float
    epochs: int


@dataclass(frozen=True)
class Needs:
    """What a loss needs beyond the backbone's output and the target; the value of its attribute `needs`.

    The task gives it by keyword, and recipes provide the batches. Outputs of other models hold what `out` holds,
    without a gradient.

    Args:
        ema: The keyword `ema`, an `ExitOutput`: the output of the average of the weights, in eval mode.
        past: The keyword `past`, an `ExitOutput`: the output of the backbone with the weights it had when the epoch
            began, in eval mode; None in the first epoch.
        time: The keyword `time`, a `TrainingTime`.
        ensemble: The keyword `ensemble`, the model's `Ensemble` as it was when the task was made.
        batches: What a batch holds besides the samples that it draws. "paired": for each one another of its class,
            after all of them; `out` and `target` are without those, and the keyword `partners`, an `ExitOutput`, holds
            the model's output for them. "repeated": before them, those that were drawn in the batch before.
        exits: The entries of the exits in `out`; without them, `out` holds the backbone's only and the exits do not
            run.
        gate: What the gradients of the exits are multiplied by where they enter the backbone, see `gate_factors`.
        gate_fade: Share of the training, its last part, over which the gate falls linearly to 0.
        features: The exits' features have a term. Without, the task does not train the layers that make a feature of a
            narrower head's embedding (those of `hint_adapter` it always trains).
    """

    ema: bool = False
    past: bool = False
    time: bool = False
    ensemble: bool = False
    batches: Literal["plain", "paired", "repeated"] = "plain"
    exits: bool = True
    features: bool = False
    gate: Gate = 1.0
    gate_fade: float = 0.0

    def gate_factors(self, num_exits: int) -> tuple[float, ...]:
        """Return what the gradient of each of K exits is multiplied by where it enters the backbone.

        "equilibrium" is the share 1 / (K - i + 1) that "Improved Techniques for Training Adaptive Deep Networks"
        (ICCV 2019, https://arxiv.org/abs/1908.06294) gives the classifier i, 0 the shallowest, of K + 1 at its tap.
        What comes back there from the K - i deeper ones is scaled too, by (K - i) / (K - i + 1), so that every block
        learns from the mean of the gradients of all classifiers after it. Here it is not: the backbone's own gradient
        is what it is without exits, and the shares of the exits are added to it.

        Raises:
            ValueError: If `gate` is a sequence that has not one number for each exit.
        """
        if self.gate == "equilibrium":
            return tuple(1 / (num_exits - index + 1) for index in range(num_exits))
        if not isinstance(self.gate, tuple):
            return (float(self.gate),) * num_exits
        if len(self.gate) != num_exits:
            raise ValueError(f"gate has {len(self.gate)} values for {num_exits} added exits; allowed is one each.")
        return self.gate

    def gate_share(self, time: TrainingTime) -> float:
        """Return what the fading leaves of the gate at a time of the training."""
        left = 1 - time.epoch / time.epochs
        return min(left / self.gate_fade, 1.0) if self.gate_fade else 1.0


def needs_of(loss: nn.Module) -> Needs:
    """Return what a loss needs: the exits only, if it does not say; its attribute `needs_exits` overrules `needs`."""
    needs = getattr(loss, "needs", Needs())
    if not isinstance(needs, Needs):
        raise ValueError(f"The attribute needs of {type(loss).__name__} is {needs!r}; allowed is a Needs.")
    return replace(needs, exits=bool(getattr(loss, "needs_exits", needs.exits)))


_LOSSES: Registry[type[nn.Module]] = Registry("loss", "timm_selfdistill.losses")
get_loss = _LOSSES.get


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Return a decorator that registers a loss class as `name`, for recipes.

    The class is an `nn.Module`, called with `(out: ExitOutput, target)`, that returns a dict of scalars with at least
    "loss". Its attribute `needs`, a `Needs`, says what it is given; without it, the exits' entries and no keyword. The
    attribute `needs_exits` is a short form of `Needs(exits=...)`.

    Raises:
        ValueError: If the name is taken.
    """
    return cast(Callable[[LossClass], LossClass], _LOSSES.register(name))


def list_losses() -> list[str]:
    """Return the names of all registered losses, sorted."""
    return _LOSSES.names()


def stack(entries: Sequence[Tensor]) -> Tensor:
    """Stack tensors in at least float32, clamped to +-1e14."""
    stacked = torch.stack(tuple(entries))
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    # Beyond about 1e38 differences of finite values are infinite, and zero times infinity is NaN; squares summed over
    # a batch need more room still.
    return stacked.clamp(-_LIMIT, _LIMIT)


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Return the cross-entropy of logits [K, B, C] with class indices [B] or probabilities [B, C], a mean each [K]."""
    exits, batch, _ = logits.shape
    if target.is_floating_point():
        target = target.to(logits.dtype)
    target = target.expand(exits, *target.shape).flatten(0, 1)
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        target,
        weight=None if class_weights is None else logits.new_tensor(class_weights),
        reduction="none",
        label_smoothing=label_smoothing,
        # By default, torch silently leaves out samples of the class -100.
        ignore_index=_NO_INDEX,
    )
    return losses.view(exits, batch).mean(-1)


def check_entries(kind: str, width: str, entries: Sequence[Tensor]) -> None:
    """Check that logits or features are floating tensors [B, width] of one shape; `kind` and `width` name them."""
    shape = entries[0].shape if entries else torch.Size()
    valid = all(entry.shape == shape and entry.is_floating_point() for entry in entries)
    if not valid or len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"The output holds {kind} {shapes(entries)}; allowed are floating tensors of one shape [B, {width}], "
            "none of them empty."
        )


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Check that a target fits logits of a shape [B, C].

    Values are read on the CPU and outside `torch.compile` only: reading them would stall a GPU, on which a class index
    out of range ends in an assertion of its own.
    """
    indices = target.dtype == torch.int64 and target.shape == shape[:1]
    if not indices and not (target.is_floating_point() and target.shape == shape):
        raise ValueError(
            f"The target is {target.dtype} {list(target.shape)}; allowed are class indices, torch.int64 "
            f"{list(shape[:1])}, and class probabilities, floating {list(shape)}."
        )
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in target.detach().aminmax())
    if indices:
        if low < 0 or high >= shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"The target holds the class index {wrong}; allowed are 0 to {shape[1] - 1}.")
        return
    sums = target.detach().sum(-1, dtype=torch.promote_types(target.dtype, torch.float32))
    off = int((sums - 1).abs().nan_to_num(nan=torch.inf).argmax())
    # Written so that NaN is refused.
    if not low >= 0 or not abs(float(sums[off]) - 1) <= _SUM_TOLERANCE:
        raise ValueError(
            f"The target holds class probabilities from {low:g} to {high:g}, those of sample {off} with the sum "
            f"{float(sums[off]):g}; allowed are numbers of 0 or more with the sum 1 for each sample."
        )


def shapes(entries: Sequence[Tensor]) -> str:
    """Return dtypes and shapes for a message."""
    return ", ".join(f"{entry.dtype} {list(entry.shape)}" for entry in entries) or "nothing"
