"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A state that cannot be saved, or a checkpoint that cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is incomplete or not what was written."""
