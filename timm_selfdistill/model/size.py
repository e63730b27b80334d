"""How large a model is that a recipe names, found out before it is given memory."""

import itertools
from collections.abc import Mapping
from typing import Any, Final

import psutil
import timm
import torch

from timm_selfdistill.build_limit import BuildLimit, TooLargeError

# timm's largest models have about 2,500 and 6,000.
_PARAMETERS: Final = 25_000
_MODULES: Final = 60_000


def check_size(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse a timm model that this machine's memory cannot hold, or that has more parts than any of timm's.

    Args:
        name: Its name in timm.
        kwargs: Further arguments of `timm.create_model`.

    Raises:
        ValueError: If it is too large. What else is wrong with it is told where it is built.
    """
    if torch.empty(0).is_meta:
        return
    try:
        with torch.device("meta"), BuildLimit(_PARAMETERS, _MODULES):
            model = timm.create_model(name, pretrained=False, **kwargs)
        needed = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    except TooLargeError as error:
        limit = _PARAMETERS if str(error) == "parameters" else _MODULES
        raise ValueError(f"{name!r} with {dict(kwargs)!s:.200} has more than {limit:,} {error}.") from None
    except Exception:  # timm checks few arguments, and fails wherever a wrong one leads
        return
    available = psutil.virtual_memory().total
    if needed > available:
        raise ValueError(
            f"{name!r} with {dict(kwargs)!s:.200} has weights of {needed / 2**30:,.0f} GiB, and this machine has "
            f"{available / 2**30:,.0f} GiB of memory."
        )
