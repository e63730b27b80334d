"""A network that stops when it knows: images leave the batch at the first exit that is sure of them."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit.settings import EarlyExitConfig, State
from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.model import SelfDistillModel


class EarlyExitOutput(NamedTuple):
    """What a network with early exit returns, in the order of the input.

    Attributes:
        logits: Logits [B, num_classes].
        exit_index: Which exit gave them [B], int64, 0 the shallowest. K, the number of added exits, means that no exit
            was sure: the backbone's own classifier, or the ensemble, as the settings say.
    """

    logits: Tensor
    exit_index: Tensor


class EarlyExit(nn.Module):
    """A wrapped model in which each image stops at the first exit that is sure of it.

    Images that stop leave the batch, and the rest of the backbone runs on those that are left; when none is left, the
    forward ends. Every image gets the answer that it would get if everything ran and the exit were chosen afterwards
    (to rounding, as kernels differ between batch sizes).

    Whether the backbone runs on with a part of its batch is tried for each exit when the object is made, by forwards of
    a few random images. Behind an exit where it does not (some networks read the batch size once, at their start), the
    whole batch runs on until all of it is sure; the answers are the same, and a warning says what is lost.

    Args:
        model: The wrapped model.
        thresholds: K numbers, one for each added exit, or one number for all; infinity lets no image leave.
        rule: What confidence is: "max-softmax", "margin", "entropy" or "patience", as `EarlyExitConfig` describes.
        temperatures: K numbers that the exits' logits are divided by before their confidence is taken; 1 by default.
            The logits that are returned are not divided.
        fallback: Who answers for images that no exit was sure of: "last" or "ensemble".

    Attributes:
        config: The settings, as an `EarlyExitConfig`.
        shrinks: For each added exit, whether the backbone runs on with a part of the batch behind it.

    Raises:
        ValueError: If a setting is not allowed, or there is not one threshold or temperature for each exit.
    """

    def __init__(
        self,
        model: SelfDistillModel,
        thresholds: float | Sequence[float],
        *,
        rule: str = "max-softmax",
        temperatures: Sequence[float] | None = None,
        fallback: str = "last",
    ) -> None:
        super().__init__()
        if isinstance(thresholds, int | float):
            thresholds = [thresholds] * model.num_exits
        if model.num_classes < 2:
            raise ValueError(f"Early exit needs a choice, but the model has {model.num_classes} class.")
        temperatures = None if temperatures is None else tuple(temperatures)
        self.config = EarlyExitConfig(tuple(thresholds), rule, temperatures, fallback)
        self.config.check_exits(model.exit_names[:-1])
        self.model = model
        self.training = model.training
        self.shrinks = _try_to_shrink(model)

    @classmethod
    def from_config(cls, model: SelfDistillModel, config: EarlyExitConfig) -> "EarlyExit":
        """Return a model with settings that were saved or chosen.

        Args:
            model: The wrapped model.
            config: The settings.

        Raises:
            ValueError: If there is not one threshold for each exit.
        """
        return cls(
            model, config.thresholds, rule=config.rule, temperatures=config.temperatures, fallback=config.fallback
        )

    def forward(self, x: Tensor) -> EarlyExitOutput:
        """Classify a batch.

        Args:
            x: Images [B, C, H, W].

        Returns:
            Logits [B, num_classes] and the exits that gave them [B].

        Raises:
            RuntimeError: If the model is in train mode.
        """
        if self.model.training:
            raise RuntimeError("Early exit is for inference, but the model is in train mode: call eval() first.")
        if not len(x):
            return EarlyExitOutput(x.new_empty(0, self.model.num_classes), x.new_empty(0, dtype=torch.int64))
        journey = _Journey(self, x)
        logits = self.model.forward_while(x, journey.visit)
        if logits is not None:
            journey.arrive(logits)
        return journey.output()


class _Journey:
    """One batch on its way through a network.

    Images are known by their place in the input. `present` are those that the backbone still runs on, [P]; `waiting`
    says which of them have no answer yet.
    """

    def __init__(self, network: EarlyExit, x: Tensor) -> None:
        self._model, self._config, self._shrinks = network.model, network.config, network.shrinks
        self._present = torch.arange(len(x), device=x.device)
        self._waiting = torch.ones_like(self._present, dtype=torch.bool)
        self._state: State = ()
        self._sum: Tensor | None = None
        self._answers: list[tuple[int, Tensor, Tensor]] = []

    def visit(self, exit: int, taps: tuple[Tensor, ...]) -> Tensor | None:
        """Let images leave at an exit; return the rows of those that go on, or None for all."""
        if self._config.asks(exit):
            self._ask(exit, taps)
        rows = self._waiting.nonzero().squeeze(1)
        if len(rows) == len(self._present) or (len(rows) and not self._shrinks[exit]):
            return None
        self._present, self._waiting = self._present[rows], self._waiting[rows]
        self._state = tuple(value[rows] for value in self._state)
        self._sum = None if self._sum is None else self._sum[rows]
        return rows

    def arrive(self, logits: Tensor) -> None:
        """Answer for the images that no exit was sure of, from the backbone's own logits [P, num_classes]."""
        if self._sum is not None:
            logits = self._sum + self._model.ensemble.weights[-1] * logits
        self._answer(self._model.num_exits, self._waiting, logits)

    def output(self) -> EarlyExitOutput:
        """Return the answers in the input's order."""
        order = torch.cat([places for _, places, _ in self._answers]).argsort()
        logits = torch.cat([logits for _, _, logits in self._answers])
        index = torch.cat([torch.full_like(places, exit) for exit, places, _ in self._answers])
        return EarlyExitOutput(logits[order], index[order])

    def _ask(self, exit: int, taps: tuple[Tensor, ...]) -> None:
        """Run an exit's head, and answer for the images that it is sure of."""
        logits = self._model.head_of(exit).classify(*taps)
        if self._config.fallback == "ensemble":
            weighted = self._model.ensemble.weights[exit] * logits
            self._sum = weighted if self._sum is None else self._sum + weighted
        confidence, self._state = self._config.confidence(logits, exit, self._state)
        # NaN is never sure.
        sure = (confidence >= self._config.thresholds[exit]) & self._waiting
        self._answer(exit, sure, logits)
        self._waiting = self._waiting & ~sure

    def _answer(self, exit: int, leaving: Tensor, logits: Tensor) -> None:
        self._answers.append((exit, self._present[leaving], logits[leaving]))


@torch.no_grad()
def _try_to_shrink(model: SelfDistillModel) -> tuple[bool, ...]:
    """Return, for each exit, whether the backbone gives the same answers on a part of the batch behind it."""
    images = random_images(model.backbone, model.wrap_config.image_size, 4)
    with unchanged(model):
        expected = model(images)
        shrinks = tuple(_shrinks(model, images, expected, exit) for exit in range(model.num_exits))
    if not all(shrinks):
        stuck = [name for name, fine in zip(model.exit_names[:-1], shrinks, strict=True) if not fine]
        warnings.warn(
            f"{type(model.backbone).__name__} cannot run on with a part of its batch behind {', '.join(stuck)}: images "
            "that are sure there get their answer, but stay in the batch until a later exit, or until none is left.",
            stacklevel=3,
        )
    return shrinks


def _shrinks(model: SelfDistillModel, images: Tensor, expected: Tensor, exit: int) -> bool:
    """Whether the backbone, left with two of four images at an exit, gives these two their logits."""
    rows = torch.tensor([1, 3], device=images.device)
    try:
        logits = model.forward_while(images, lambda index, taps: rows if index == exit else None)
    except Exception:  # whatever the backbone raises, it means that it cannot
        return False
    expected = expected[rows]
    if logits is None or logits.shape != expected.shape:
        return False
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
