"""Write checkpoints while training goes on."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from timm_selfdistill.checkpoint import encode_state, save_checkpoint

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one network on a thread of its own, one after the other.

    Only the copy of the state is made by the caller's thread. A checkpoint that cannot be written, as on a full disk,
    leaves those before it in place; training goes on, and the next one is tried.

    Args:
        folder: Where the checkpoints go.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._running: tuple[int, Future[Path]] | None = None

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Begin to write a checkpoint; waits for the one before to be done.

        Raises:
            CheckpointError: If the state holds what cannot be stored, or the folder belongs to another run.
        """
        encoded = encode_state(state)
        try:
            self.finish()
        except OSError as error:
            _logger.warning("%s. Training goes on, and the next checkpoint is tried.", error)
        self._running = step, self._worker.submit(save_checkpoint, self._folder, encoded, step, self._keep)

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: If the folder belongs to another run.
            OSError: If it could not be written; those before it are in place.
        """
        running, self._running = self._running, None
        if running is None:
            return
        step, future = running
        try:
            future.result()
        except OSError as error:
            raise OSError(
                f"The checkpoint of step {step} cannot be written to {self._folder}: {error}; those before it are kept"
            ) from error

    def close(self) -> None:
        """Wait until the last checkpoint is written, and end the thread.

        Raises:
            CheckpointError: As `finish`.
            OSError: As `finish`.
        """
        try:
            self.finish()
        finally:
            self._worker.shutdown()
