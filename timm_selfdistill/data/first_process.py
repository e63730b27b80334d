"""Which process of a launch does what needs to be done once."""

import logging

import torch.distributed


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not joined or torch.distributed.get_rank() == 0


def warn_first(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning in the first process only, where all processes see the same."""
    if is_first_process():
        logger.warning(message, *args)
