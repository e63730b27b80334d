"""Checkpoints of a training: written whole or not at all, and read without unpickling anything."""

from timm_selfdistill.checkpoint.codec import EncodedState, encode_state
from timm_selfdistill.checkpoint.errors import CheckpointError, DamagedCheckpointError
from timm_selfdistill.checkpoint.store import latest_checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "EncodedState",
    "encode_state",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
