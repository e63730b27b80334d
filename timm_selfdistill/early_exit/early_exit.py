"""A network with early exit: images leave the batch at the first exit that is confident enough of them."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit.rules import EarlyExitConfig, RuleState, reaches
from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.model import Ensemble, SelfDistillModel


class EarlyExitOutput(NamedTuple):
    """The answers of a network with early exit, in the order of the input.

    Attributes:
        logits: Logits [B, num_classes].
        exit_index: Which exit gave them [B], int64, 0 the shallowest; K, the number of added exits, stands for the
            fallback: the backbone's own classifier, or the ensemble.
    """

    logits: Tensor
    exit_index: Tensor


class EarlyExit(nn.Module):
    """A wrapped model in which each image leaves at the first exit whose confidence reaches the exit's threshold.

    The rest of the backbone runs on the images that are left; when none is left, the forward ends. Every image gets the
    answer that it would get if everything ran and the exit were chosen afterwards (to rounding, as kernels differ
    between batch sizes).

    When the object is made, forwards of a few random images find out after which exits the backbone runs on with a part
    of its batch. Where it does not (some networks read the batch size once, at their start), images that have their
    answer stay in the batch until a later exit, or until none is left without an answer; a warning names these exits.

    Args:
        model: The wrapped model.
        thresholds: K numbers, one for each added exit, or one number for all; infinity lets no image leave.
        rule: What confidence is: a name of `list_rules`, such as "max-softmax", "margin", "entropy" or "patience", as
            `EarlyExitConfig` describes.
        temperatures: K numbers that the exits' logits are divided by before their confidence is taken; 1 by default.
            The logits that are returned are not divided.
        fallback: Who answers for images that left at no exit: "last" or "ensemble".
        running_ensemble: Whether exit k answers with the ensemble of the exits 0 to k, by the weights of the model's
            `ensemble`, instead of with its own logits. Heads then run even where no image may leave.

    Attributes:
        config: The settings, as an `EarlyExitConfig`.
        shrinks: For each added exit, whether the backbone runs on with a part of the batch after it.

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
        running_ensemble: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(thresholds, int | float):
            thresholds = [thresholds] * model.num_exits
        if model.num_classes < 2:
            raise ValueError(f"Early exit needs 2 classes or more, but the model has {model.num_classes} class.")
        temperatures = None if temperatures is None else tuple(temperatures)
        self.config = EarlyExitConfig(tuple(thresholds), rule, temperatures, fallback, running_ensemble)
        self.config.check_exits(model.exit_names[:-1])
        self.model = model
        self.training = model.training
        self.shrinks = _find_shrinking_exits(model)

    @classmethod
    def from_config(cls, model: SelfDistillModel, config: EarlyExitConfig) -> "EarlyExit":
        """Return a model with settings that were saved or chosen; ValueError if they are for more or fewer exits."""
        return cls(
            model,
            config.thresholds,
            rule=config.rule,
            temperatures=config.temperatures,
            fallback=config.fallback,
            running_ensemble=config.running_ensemble,
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
        batch = _Batch(self, x)
        logits = self.model.forward_while(x, batch.visit)
        if logits is not None:
            batch.finish(logits)
        return batch.output()


def replay(config: EarlyExitConfig, logits: Tensor, ensemble: Ensemble | None = None) -> EarlyExitOutput:
    """Return what `EarlyExit` with these settings answers for images whose logits are known.

    Args:
        config: The settings.
        logits: Logits [K + 1, N, C] of all exits.
        ensemble: The model's; the mean by default.

    Returns:
        Logits [N, C] and the exits that gave them [N]: those of `EarlyExit`, to rounding.

    Raises:
        ValueError: If there is not one threshold for each exit.
    """
    config.check_exits([str(index) for index in range(len(logits) - 1)])
    answers = exit_answers(config, logits, ensemble)
    index = first_confident(exit_confidence(answers, config), config.thresholds)
    return EarlyExitOutput(answers[index, torch.arange(len(index))], index)


def exit_answers(config: EarlyExitConfig, logits: Tensor, ensemble: Ensemble | None = None) -> Tensor:
    """Return what each exit answers [K + 1, N, C] under the settings, the last in place of all that let no image leave.

    Args:
        config: The settings; thresholds and temperatures do not count.
        logits: Logits [K + 1, N, C] of all exits.
        ensemble: The model's; the mean by default.
    """
    ensemble = ensemble or Ensemble.mean(len(logits))
    early = running_ensembles(logits, ensemble)[:-1] if config.running_ensemble else logits[:-1]
    last = ensemble(logits) if config.fallback == "ensemble" else logits[-1]
    return torch.cat([early, last.unsqueeze(0)])


def running_ensembles(logits: Tensor, ensemble: Ensemble) -> Tensor:
    """Return the logits [K + 1, N, C] of the ensembles of the exits 0 to k, from those of all exits."""
    return torch.stack([ensemble.prefix(index)(logits[: index + 1]) for index in range(len(logits))])


def exit_confidence(logits: Tensor, config: EarlyExitConfig) -> Tensor:
    """Return the confidence of every exit for every image [K, N] from logits [K + 1, N, C], whatever the thresholds."""
    state: RuleState = ()
    rows = []
    for index in range(len(logits) - 1):
        confidence, state = config.confidence(logits[index], index, state)
        rows.append(confidence)
    return torch.stack(rows)


def first_confident(confidence: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the first exit whose confidence [K, N] reaches its threshold for each image [N], K where none does."""
    # In the precision of the confidence, as a comparison with a number is.
    reached = reaches(confidence, torch.tensor(thresholds, dtype=confidence.dtype).unsqueeze(1))
    return torch.cat([reached, torch.ones_like(reached[:1])]).to(torch.uint8).argmax(0)


class _Batch:
    """The images of one forward, known by their place in the input.

    `_present` are those that the backbone still runs on, [P]; `_waiting` says which of them have no answer yet.
    """

    def __init__(self, network: EarlyExit, x: Tensor) -> None:
        self._model, self._config, self._shrinks = network.model, network.config, network.shrinks
        self._present = torch.arange(len(x), device=x.device)
        self._waiting = torch.ones_like(self._present, dtype=torch.bool)
        self._state: RuleState = ()
        self._members: list[Tensor] = []  # the logits [P, num_classes] of the exits so far, for ensembles
        self._answers: list[tuple[int, Tensor, Tensor]] = []

    def visit(self, exit: int, taps: tuple[Tensor, ...]) -> Tensor | None:
        """Let images leave at an exit; return the rows of those that go on, or None for all."""
        if self._config.runs_head(exit):
            self._run_head(exit, taps)
        rows = self._waiting.nonzero().squeeze(1)
        if len(rows) == len(self._present) or (len(rows) and not self._shrinks[exit]):
            return None
        self._present, self._waiting = self._present[rows], self._waiting[rows]
        self._state = tuple(value[rows] for value in self._state)
        self._members = [member[rows] for member in self._members]
        return rows

    def finish(self, logits: Tensor) -> None:
        """Answer for the images that left at no exit, from the backbone's own logits [P, num_classes]."""
        if self._config.fallback == "ensemble":
            logits = self._model.ensemble([*self._members, logits])
        self._answer(self._model.num_exits, self._waiting, logits)

    def output(self) -> EarlyExitOutput:
        """Return the answers in the input's order."""
        order = torch.cat([places for _, places, _ in self._answers]).argsort()
        logits = torch.cat([logits for _, _, logits in self._answers])
        index = torch.cat([torch.full_like(places, exit) for exit, places, _ in self._answers])
        return EarlyExitOutput(logits[order], index[order])

    def _run_head(self, exit: int, taps: tuple[Tensor, ...]) -> None:
        """Run an exit's head, and answer for the images that it is confident enough of."""
        logits = self._model.head_of(exit).classify(*taps)
        if self._config.combines:
            self._members.append(logits)
        if self._config.running_ensemble:
            logits = self._model.ensemble.prefix(exit)(self._members)
        confidence, self._state = self._config.confidence(logits, exit, self._state)
        leaving = reaches(confidence, self._config.thresholds[exit]) & self._waiting
        self._answer(exit, leaving, logits)
        self._waiting = self._waiting & ~leaving

    def _answer(self, exit: int, leaving: Tensor, logits: Tensor) -> None:
        rows = leaving.nonzero().squeeze(1)
        self._answers.append((exit, self._present[rows], logits[rows]))


@torch.no_grad()
def _find_shrinking_exits(model: SelfDistillModel) -> tuple[bool, ...]:
    """Return, for each exit, whether the backbone gives the same answers on a part of the batch after it."""
    images = random_images(model.backbone, model.wrap_config.image_size, 4)
    with unchanged(model):
        expected = model(images)
        shrinks = tuple(_shrinks(model, images, expected, exit) for exit in range(model.num_exits))
    if not all(shrinks):
        stuck = [name for name, fine in zip(model.exit_names[:-1], shrinks, strict=True) if not fine]
        warnings.warn(
            f"{type(model.backbone).__name__} cannot run on with a part of its batch after {', '.join(stuck)}: images "
            "that leave there get their answer, but stay in the batch until a later exit, or until all have one.",
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
