"""What the parts of a network with early exit take on this machine, by the number of rows that they run on."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.measure import median_seconds, synchronize
from timm_selfdistill.model import SelfDistillModel

if TYPE_CHECKING:
    from timm_selfdistill.early_exit.rules import EarlyExitConfig

_WARM_UP_ROUNDS: Final = 2
_MIN_ROUNDS: Final = 7
_SECONDS: Final = 2.0


class Line(NamedTuple):
    """Seconds by the number of rows: `fixed + per_row * rows`."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> float:
        """Return the seconds for some rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a network with early exit take, measured by `measure_stage_costs`.

    Args:
        stages: Seconds of the backbone from one exit to the next: K + 1 lines.
        heads: Of each exit's head, with the decision who leaves: K lines.
        takes: Of taking some rows out of what the backbone goes on with after each exit: K lines.
        batch_size: The largest batch that was measured.
        device: What it was measured on.

    Raises:
        ValueError: If there is not one line more for stages than for heads and takes, or a number is negative or not
            finite.
    """

    stages: tuple[Line, ...]
    heads: tuple[Line, ...]
    takes: tuple[Line, ...]
    batch_size: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not len(self.stages) - 1 == len(self.heads) == len(self.takes):
            raise ValueError(
                f"costs have {len(self.stages)} stages, {len(self.heads)} heads and {len(self.takes)} takes; for K "
                "exits they must have K + 1, K and K."
            )
        values = [value for line in (*self.stages, *self.heads, *self.takes) for value in line]
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"costs hold {values!r:.200}; allowed are seconds, finite and not negative.")
        if self.batch_size < 1:
            raise ValueError(f"costs are those of batches of {self.batch_size}; allowed is 1 or more.")

    @classmethod
    def from_json(cls, saved: Any) -> "StageCosts":
        """Return what `to_json` was called on; raise ValueError for anything else."""
        names = {field.name for field in fields(cls)}
        try:
            if set(saved) != names or not isinstance(saved["batch_size"], int) or not isinstance(saved["device"], str):
                raise TypeError
            lines = {
                name: tuple(Line(float(fixed), float(per_row)) for fixed, per_row in saved[name])
                for name in ("stages", "heads", "takes")
            }
        except (TypeError, ValueError, OverflowError, KeyError) as error:
            raise ValueError(
                f"costs are {saved!r:.200}; they must have the keys {', '.join(sorted(names))}."
            ) from error
        return cls(**saved | lines)

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON holds them."""
        lines = {name: [list(line) for line in getattr(self, name)] for name in ("stages", "heads", "takes")}
        return asdict(self) | lines

    def seconds_to(self, exit: int, rows: int, heads_run: Sequence[bool]) -> float:
        """Return what a batch of `rows` images takes of which none leaves before an exit, whose own head runs.

        Exit K is the backbone's own classifier; `heads_run` says of each of the K others whether its head runs.
        """
        heads = [line for index, line in enumerate(self.heads[: exit + 1]) if heads_run[index] or index == exit]
        return sum(line.at(rows) for line in (*self.stages[: exit + 1], *heads))

    def saves(self, exit: int, present: int, left: int, heads_run: Sequence[bool]) -> bool:
        """Whether going on from an exit with `left` rows in place of `present` saves more than taking them costs.

        What is saved is what the rest of the network takes for the other rows, as in the plain backbone they would run
        to its end.
        """
        later = [line for index, line in enumerate(self.heads) if index > exit and heads_run[index]]
        per_row = sum(line.per_row for line in (*self.stages[exit + 1 :], *later))
        return (present - left) * per_row > self.takes[exit].at(left)


@torch.no_grad()
def measure_stage_costs(
    model: SelfDistillModel,
    config: "EarlyExitConfig",
    batch_size: int,
    input_size: tuple[int, int, int] | None = None,
) -> StageCosts:
    """Time the parts of a network with early exit, on its device, in forwards of one image, half a batch and a batch.

    Args:
        model: The wrapped model; left unchanged.
        config: The settings, of which the rule counts.
        batch_size: Images in a batch.
        input_size: Channels, height and width of an image; by default the size that the model was wrapped for.

    Returns:
        The costs: for each part a line through the medians of at least seven rounds and two seconds.

    Raises:
        ValueError: If the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed is 1 or more.")
    size = model.wrap_config.image_size if input_size is None else input_size[1:]
    images = random_images(model.backbone, size, max(2, batch_size))
    sizes = sorted({1, -(-len(images) // 2), len(images)})

    def measure() -> list[float]:
        return [seconds for rows in sizes for seconds in _time_parts(model, config, images[:rows])]

    with unchanged(model):
        medians, _ = median_seconds(measure, warm_up=_WARM_UP_ROUNDS, rounds=_MIN_ROUNDS, seconds=_SECONDS)
    lines = [_fit(sizes, seconds) for seconds in np.reshape(medians, (len(sizes), -1)).T.tolist()]
    device = torch.cuda.get_device_name(images.device) if images.device.type == "cuda" else images.device.type
    return StageCosts(tuple(lines[::3]), tuple(lines[1::3]), tuple(lines[2::3]), batch_size, device)


def _time_parts(model: SelfDistillModel, config: "EarlyExitConfig", images: Tensor) -> list[float]:
    """Return the seconds of each part of one forward: backbone, head, taking of rows, backbone, ..., backbone."""
    marks: list[float] = []
    rows = torch.arange(len(images), device=images.device)
    state: tuple[Tensor, ...] = ()

    def mark() -> None:
        synchronize(images.device)
        marks.append(time.perf_counter())

    def visit(index: int, taps: tuple[Tensor, ...]) -> None:
        nonlocal state
        mark()
        confidence, state = config.confidence(model.head_of(index).classify(*taps), index, state)
        (confidence.cpu().numpy() >= 1).any()
        mark()
        for tap in taps:
            tap.index_select(0, rows)
        mark()

    mark()
    model.forward_while(images, visit)
    mark()
    return [later - before for before, later in pairwise(marks)]


def _fit(sizes: Sequence[int], seconds: Sequence[float]) -> Line:
    """Return the line of least squares of the relative error, neither part of which is negative."""
    x, y = np.array(sizes, float), np.maximum(seconds, 1e-9)
    per_row, fixed = np.polyfit(x, y, 1, w=1 / y)
    if fixed < 0:
        return Line(0.0, float(np.mean(y / x)))  # through the origin
    if per_row < 0:
        return Line(float(np.mean(y)), 0.0)  # the same for any number of rows
    return Line(float(fixed), float(per_row))
