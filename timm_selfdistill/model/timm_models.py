"""Models of timm by name: created, or refused with words about what is wrong."""

import itertools
from collections.abc import Mapping
from typing import Any, Final

import psutil
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import get_pretrained_cfg, is_model_pretrained

from timm_selfdistill.checks import did_you_mean
from timm_selfdistill.exits import Backbone
from timm_selfdistill.measure import BuildLimit, TooLargeError
from timm_selfdistill.program import failure_of_machine

# Most parameters and modules of a model: timm's largest have about 2,500 and 6,000.
_LIMITS = {"parameters": 10_000, "modules": 24_000}
# What timm takes in front of a model's name: where its configuration is.
SOURCES: Final = ("hf-hub:", "hf_hub:", "local-dir:")


def with_image_size(name: str, kwargs: dict[str, Any], image_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Add `img_size` to the arguments of a timm model that is built for images of one size; all such models take it."""
    if image_size is None or "img_size" in kwargs or not timm.is_model(name.split(".")[0]):
        return kwargs
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag, reported where the model is built
        return kwargs
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if config is None or not config.fixed_input_size or size == config.input_size[1:]:
        return kwargs
    return kwargs | {"img_size": image_size}


def check_size(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a timm model larger than this machine's memory, or with more parts than any of timm's."""
    if torch.empty(0).is_meta:
        return
    what = f"{name!r} with {dict(kwargs)!s:.200} has"
    try:
        with torch.device("meta"), BuildLimit(**_LIMITS):
            model = timm.create_model(name, pretrained=False, **kwargs)
        needed = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    except TooLargeError as error:
        raise ValueError(f"{what} more than {_LIMITS[str(error)]:,} {error}.") from None
    except Exception:  # whatever else is wrong with the model is reported where it is built
        return
    available = psutil.virtual_memory().total
    if needed > available:
        raise ValueError(
            f"{what} weights of {needed / 2**30:,.0f} GiB, and this machine has {available / 2**30:,.0f} GiB of memory."
        )


def create_backbone(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Backbone:
    """Create a timm model; ValueError if that fails, with similar names if there is none of its name."""
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm checks few arguments, and fails wherever a wrong one leads
        if failure_of_machine(error) is not None:
            raise
        if name.startswith(SOURCES) and not isinstance(error, RuntimeError | TypeError):
            raise ValueError(_unknown_source(name, error)) from error
        if pretrained and _is_of_download(error):
            raise ValueError(
                f"The pretrained weights of {name!r} cannot be downloaded ({_reason(error)}): connect this machine to "
                "the network, or put them into the cache (run the same once where there is a network, and copy "
                f"{constants.HF_HUB_CACHE}), or start without them, by model.pretrained=false (pretrained=False)."
            ) from error
        architecture = name.split(".")[0]
        hint = "" if timm.is_model(architecture) else did_you_mean(architecture, timm.list_models(), most=3)
        raise ValueError(f"timm cannot create {name!r} with {kwargs}: {_reason(error)}{hint or '.'}") from error


def _unknown_source(name: str, error: Exception) -> str:
    """Return what is wrong with a model whose name says where its configuration is."""
    source, _, place = name.partition(":")
    wanted = f"{place} must be a folder with the config.json of a timm model."
    if source != "local-dir":
        wanted = (
            "there must be such a repository of a timm model on the Hub, as NAMESPACE/NAME, and a network or a copy in "
            "the cache."
        )
    return f"The model {name!r} cannot be created ({_reason(error)}): {wanted}"


def _is_of_download(error: Exception) -> bool:
    """Whether an error is one of the network, the Hub, its client or the client's HTTP library."""
    if isinstance(error, FileNotFoundError):
        return isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, OSError):
        # Errors of files have an errno.
        return error.errno is None or isinstance(error, ConnectionError | TimeoutError)
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub")


def _reason(error: Exception) -> str:
    """Return an error's message in one line, with its type where that tells more."""
    if isinstance(error, LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached, and there is no copy in the cache"
    lines = str(error).strip().splitlines()
    if isinstance(error, RuntimeError | TypeError | ValueError | OSError) and lines:
        return lines[0].rstrip(".")
    return repr(error)


def model_problem(name: str, *, pretrained: bool = False) -> str | None:
    """Return what is wrong with the name of a timm model and, if wanted, of its weights; None if nothing is."""
    if name.startswith(SOURCES):
        return None
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), most=3)
        return f"must be the name of a timm model, received {name!r}{hint}"
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            known = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
            listed = f"; {architecture} has {', '.join(known)}" if known else f"; {architecture} has none"
            return f"has no weights {tag!r}{listed}{did_you_mean(tag, known, most=3)}"
    if pretrained and not is_model_pretrained(name):
        return f"must be false, as timm has no weights of {name!r}"
    return None
