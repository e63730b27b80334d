"""Which process of a launch does what needs to be done once."""

import torch.distributed


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not joined or torch.distributed.get_rank() == 0
