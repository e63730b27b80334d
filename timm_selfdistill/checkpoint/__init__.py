"""Checkpoints of a training: written whole or not at all, and read without unpickling anything."""

from timm_selfdistill.checkpoint.codec import EncodedState, encode_state
from timm_selfdistill.checkpoint.errors import CheckpointError, DamagedCheckpointError
from timm_selfdistill.checkpoint.store import (
    is_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_entry,
    save_checkpoint,
)

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "EncodedState",
    "encode_state",
    "is_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "read_entry",
    "save_checkpoint",
]
