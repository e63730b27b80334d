"""Which images of a batch still need an answer, and which rows the backbone runs on: one forward with early exit.

The bookkeeping is done with numpy on the host: for a few rows an operation of torch takes longer than the same in
numpy, and on a GPU the host must know at each exit how many images are left anyway.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timm_selfdistill.early_exit.replay import EarlyExitOutput
from timm_selfdistill.early_exit.rules import RuleState, reaches

if TYPE_CHECKING:
    from timm_selfdistill.early_exit.early_exit import EarlyExit

Places = NDArray[np.int64]
OnAnswer = Callable[[Tensor, Tensor, int], None]


class LeavingBatch:
    """The images of one forward, known by their place in the input.

    Args:
        network: The network that runs.
        x: Images [B, C, H, W].
        limits: Of each image [B], the exit that answers at the latest; None for no limit.
        on_answer: Called with the places, logits and exit of images that have their answer.
        start: The place of the first image, for `on_answer`.

    Attributes:
        images: What the backbone starts with: the images, and repeated ones where a bucket is larger.
    """

    def __init__(
        self,
        network: "EarlyExit",
        x: Tensor,
        limits: Places | None,
        on_answer: OnAnswer | None = None,
        start: int = 0,
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
        self.images = x if len(self._places) == self._size else self._take(x, self._places)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def visit(self, exit: int, taps: tuple[Tensor, ...]) -> Tensor | None:
        """Let images leave at an exit whose head reads these tensors, as `leave` does."""
        return self.leave(exit, lambda: self._model.head_of(exit).classify(*taps))

    def leave(self, exit: int, classify: Callable[[], Tensor]) -> Tensor | None:
        """Let images leave at an exit.

        Args:
            exit: Its index.
            classify: Runs its head: returns logits [P, num_classes] of the rows that the backbone runs on.

        Returns:
            The rows of those that go on [P'], int64, or None for all.
        """
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


def check_limits(max_exit: int | Tensor, count: int, num_exits: int) -> Places:
    """Return the exit that answers each image at the latest [B].

    Args:
        max_exit: One for all images, or one for each [B]; `num_exits` is the backbone's own classifier.
        count: Number B of images.
        num_exits: Number K of added exits.

    Raises:
        ValueError: If it is no whole number or not one for each image, or there is no such exit.
    """
    values = torch.as_tensor(max_exit)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"max_exit is {max_exit!r:.100}; allowed are whole numbers.")
    if values.ndim and values.shape != (count,):
        raise ValueError(f"max_exit has the shape {list(values.shape)}; allowed are one number, or [{count}] of them.")
    limits = values.to("cpu", torch.int64).expand(count).numpy()
    if count and not 0 <= limits.min() <= limits.max() <= num_exits:
        raise ValueError(
            f"max_exit is {limits.min()} to {limits.max()}; allowed are 0 to {num_exits} (the backbone's own)."
        )
    return limits


def check_buckets(buckets: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the batch sizes that a network may run on, sorted; ValueError if there is none, or one is no size."""
    if buckets is None:
        return None
    if not buckets or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in buckets):
        raise ValueError(f"buckets are {list(buckets)!r:.200}; allowed are whole numbers, 1 or more, at least one.")
    return tuple(sorted(set(buckets)))


def _padded(rows: Places, size: int) -> tuple[Places, NDArray[np.bool_]]:
    """Return rows, repeated up to a size, and which of these are the first of their kind."""
    if size == len(rows):
        return rows, np.ones(size, dtype=np.bool_)
    return np.resize(rows, size), np.arange(size) < len(rows)
