"""What happens where the loss is NaN or infinite."""

import json
import logging
from pathlib import Path

from timm_selfdistill.failures import NonFiniteLossError
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.train.agreement import Verdict
from timm_selfdistill.train.feed import Feed
from timm_selfdistill.train.progress import Progress

_logger = logging.getLogger(__name__)

_SKIPS_IN_A_ROW = 20  # after so many steps in a row, skipping cannot help


class LossGuard:
    """Stops a run, or skips a step, where the loss is not finite, and writes down which images were in the batch.

    Args:
        name: Name of the network.
        feed: The data.
        recipe: The recipe.
        folder: The run's folder.
        process: Index of this process.
    """

    def __init__(self, name: str, feed: Feed, recipe: Recipe, folder: Path, process: int) -> None:
        self._name, self._feed, self._process = name, feed, process
        self._accumulate = recipe.optimizer.accumulate
        self._skips = recipe.optimizer.on_nonfinite == "skip"
        self._path = folder / "nonfinite.jsonl"

    def judge(self, verdict: Verdict | None, progress: Progress) -> bool:
        """Return whether the step that the verdict is about is to be skipped.

        Args:
            verdict: What the processes agreed on, or None if that is nothing yet.
            progress: How far training has come, that step included.

        Raises:
            NonFiniteLossError: If the recipe does not skip such steps, or there were too many in a row.
        """
        if verdict is None:
            return False
        if not verdict.bad:
            progress.skipped = 0
            return False
        progress.skipped += 1
        if verdict.bad_here:
            self._write(verdict, progress)
        at = f"{self._name}, epoch {progress.epoch + 1}, step {verdict.step}"
        if not self._skips:
            raise NonFiniteLossError(
                f"The loss is not finite ({at}); {self._path} tells the rows of the batch. A smaller optimizer.lr, "
                "optimizer.clip_grad or precision=no may help; optimizer.on_nonfinite=skip leaves such steps out. The "
                "checkpoints before it are kept."
            )
        if progress.skipped == _SKIPS_IN_A_ROW:
            raise NonFiniteLossError(
                f"The loss was not finite in {progress.skipped} steps in a row ({at}), which skipping does not mend; "
                f"{self._path} tells the rows of the batches. The checkpoints before them are kept."
            )
        _logger.warning("Skipped a step, as the loss is not finite (%s).", at)
        return True

    def _write(self, verdict: Verdict, progress: Progress) -> None:
        first = progress.micro - (progress.step - verdict.step + 1) * self._accumulate
        batches = [self._feed.rows(progress.epoch, first + micro) for micro in range(self._accumulate)]
        rows = None if None in batches else [row for batch in batches for row in batch or ()]
        entry = {
            "network": self._name,
            "epoch": progress.epoch + 1,
            "step": verdict.step,
            "process": self._process,
            "rows": rows,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
