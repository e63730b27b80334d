"""Which images leave at which exit: in one forward with early exit, and afterwards, for logits that are known."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_selfdistill.early_exit.rules import EarlyExitConfig, RuleState, reaches
from timm_selfdistill.model import Ensemble

if TYPE_CHECKING:
    from timm_selfdistill.early_exit.early_exit import EarlyExit

Places = NDArray[np.int64]
OnAnswer = Callable[[Tensor, Tensor, int], None]


class EarlyExitOutput(NamedTuple):
    """The answers of a network with early exit, in the order of the input.

    Attributes:
        logits: Logits [B, num_classes].
        exit_index: Which exit gave them [B], int64, 0 the shallowest; K, the number of added exits, stands for the
            fallback: the backbone's own classifier, or the ensemble.
    """

    logits: Tensor
    exit_index: Tensor


class LeavingBatch:
    """The images of one forward, known by their place in the input.

    The bookkeeping is done with numpy on the host: for a few rows an operation of torch takes longer than the same in
    numpy, and on a GPU the host must know at each exit how many images are left anyway.
    """

    def __init__(
        self, network: "EarlyExit", x: Tensor, limits: Places | None, on_answer: OnAnswer | None, start: int
    ) -> None:
        self._on_answer, self._start = on_answer, start
        self._network, self._model, self._config = network, network.model, network.config
        self._device = x.device
        self._size = len(x)
        # Of each row that the backbone runs on: the place of its image, and whether this row is to give its answer.
        self._places, self._waiting = _padded(np.arange(self._size), network.fit(self._size))
        self._left = self._size
        self._limits = limits
        self._state: RuleState = ()
        self._members: list[Tensor] = []  # the logits [P, num_classes] of the exits so far, for ensembles
        self._answers: list[tuple[int, Places, Tensor]] = []
        # What the backbone starts with: the images, and repeated ones where a bucket is larger.
        self.images = x if len(self._places) == self._size else self._take(x, self._places)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def visit(self, exit: int, taps: tuple[Tensor, ...]) -> Tensor | None:
        """Let images leave at an exit whose head reads these tensors, as `leave` does."""
        return self.leave(exit, lambda: self._model.head_of(exit).classify(*taps))

    def leave(self, exit: int, classify: Callable[[], Tensor]) -> Tensor | None:
        """Let images leave at an exit, whose head `classify` runs; return the rows that go on [P'], None for all."""
        if self._config.heads_run[exit] or self._is_last_for_some(exit):
            self._run_head(exit, classify())
        size = self._network.fit(self._left) if self._left else 0
        if self._left and not self._network.shrinks_to(exit, len(self._places), size):
            return None
        rows, self._waiting = _padded(self._waiting.nonzero()[0], size)
        self._places = self._places[rows]
        if self._left:
            self._state = tuple(self._take(value, rows) for value in self._state)
            self._members = [self._take(member, rows) for member in self._members]
        return self._on_device(rows)

    def finish(self, logits: Tensor) -> None:
        """Answer for the images that left at no exit, from the backbone's own logits [P, num_classes]."""
        if self._config.fallback == "ensemble":
            logits = self._model.ensemble([*self._members, logits])
        self._answer(self._model.num_exits, self._waiting, logits)

    def output(self) -> EarlyExitOutput:
        """Return the answers in the input's order."""
        if len(self._answers) == 1:
            exit, _, logits = self._answers[0]
            return EarlyExitOutput(logits, torch.full((self._size,), exit, device=self._device))
        exits, places, parts = zip(*self._answers, strict=True)
        order = np.concatenate(places).argsort()
        index = np.repeat(exits, [len(part) for part in parts])[order]
        return EarlyExitOutput(self._take(torch.cat(parts), order), self._on_device(index))

    def _is_last_for_some(self, exit: int) -> bool:
        """Whether an image that waits must be answered by this exit, or by an ensemble in which it is."""
        if self._limits is None:
            return False
        limits = self._limits[self._places[self._waiting]]
        if self._config.running_ensemble:
            return bool(((limits >= exit) & (limits < self._model.num_exits)).any())
        return bool((limits == exit).any())

    def _run_head(self, exit: int, logits: Tensor) -> None:
        """Answer for the images of which an exit's logits are confident enough, or which may go no deeper."""
        if self._config.combines:
            self._members.append(logits)
        if self._config.running_ensemble:
            logits = self._model.ensemble.prefix(exit)(self._members)
        leaving = np.zeros_like(self._waiting)
        threshold = self._config.thresholds[exit]
        if threshold < math.inf or self._config.rule_object.keeps_state:
            confidence, self._state = self._config.confidence(logits, exit, self._state)
            leaving = reaches(confidence.detach().cpu().numpy(), threshold)
        if self._limits is not None:
            leaving = leaving | (self._limits[self._places] <= exit)
        leaving = leaving & self._waiting
        if leaving.any():
            self._answer(exit, leaving, logits)
            self._waiting = self._waiting & ~leaving

    def _answer(self, exit: int, leaving: NDArray[np.bool_], logits: Tensor) -> None:
        rows = leaving.nonzero()[0]
        self._left -= len(rows)
        logits = logits if len(rows) == len(leaving) else self._take(logits, rows)
        self._answers.append((exit, self._places[rows], logits))
        if self._on_answer is not None:
            self._on_answer(torch.from_numpy(self._places[rows] + self._start), logits, exit)

    def _take(self, values: Tensor, rows: Places) -> Tensor:
        return values.index_select(0, self._on_device(rows))

    def _on_device(self, values: Places) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _padded(rows: Places, size: int) -> tuple[Places, NDArray[np.bool_]]:
    """Return rows, repeated up to a size, and which of these are the first of their kind."""
    if size == len(rows):
        return rows, np.ones(size, dtype=np.bool_)
    return np.resize(rows, size), np.arange(size) < len(rows)


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
    """Return what each exit answers [K + 1, N, C], the last in place of all that let no image leave.

    Of the settings, thresholds and temperatures do not count; `logits` [K + 1, N, C] are those of all exits.
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
