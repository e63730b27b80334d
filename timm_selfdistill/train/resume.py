"""Which checkpoint a network goes on from."""

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from timm_selfdistill.checkpoint import latest_checkpoint, load_checkpoint
from timm_selfdistill.train.launch import JsonLinesTracker

_logger = logging.getLogger(__name__)


def find_checkpoint(resume: str, checkpoints: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the state of the checkpoint to go on from, or None to start afresh; drop what was logged behind it.

    Args:
        resume: The recipe's `resume`.
        checkpoints: The network's folder of checkpoints, of its name.
        accelerator: The accelerator; all processes call it together.

    Raises:
        ValueError: If the recipe names a checkpoint that is not the newest, or the processes see different ones.
        CheckpointError: If the checkpoint cannot be used.
    """
    tracker = accelerator.get_tracker("jsonl")
    keep = tracker.keep if isinstance(tracker, JsonLinesTracker) else _keep_nothing
    if resume == "never":
        keep(checkpoints.name, 0)
        return None
    # A checkpoint that is named belongs to one of the run's networks; the others go on from their newest.
    named = None if resume == "auto" else Path(resume)
    newest = latest_checkpoint(checkpoints)
    path = named if named is not None and named.parent.name == checkpoints.name else newest
    if path is not None and newest is not None and path.resolve() != newest.resolve():
        raise ValueError(
            f"resume: {path} is older than {newest}, which would be lost: move the later checkpoints away, or copy "
            "the run to another output_dir."
        )
    found = gather_object([None if path is None else path.name])
    if len(set(found)) > 1:
        raise ValueError(
            f"resume: the processes do not see the same checkpoints of {checkpoints.name} ({found}): output_dir must "
            "be on storage that all machines share."
        )
    if path is None:
        keep(checkpoints.name, 0)
        return None
    saved: dict[str, Any] = load_checkpoint(path)
    if accelerator.is_main_process:
        _logger.warning("Resuming %s from %s.", checkpoints.name, path)
    keep(checkpoints.name, saved["progress"]["logged"])
    return saved


def _keep_nothing(network: str, count: int) -> None:
    """What a run without the log does."""
