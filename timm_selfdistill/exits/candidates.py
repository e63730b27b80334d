"""What a backbone says of itself: the modules that may be tapped, and its own classifier."""

from dataclasses import dataclass
from typing import Any

from torch import nn

# A torch module that follows timm's contract, which no base class of timm's states.
Backbone = Any


@dataclass(frozen=True)
class Candidate:
    """A tap that `feature_info` or the caller names: where it hangs and what `feature_info` promises about it."""

    name: str
    module: str
    index: int | None = None
    channels: int | None = None
    reduction: int | None = None


def resolve_feature_info(backbone: Backbone) -> dict[str, Candidate]:
    """Return the candidates that `feature_info` names and that are modules, in its order."""
    modules = dict(backbone.named_modules())
    candidates: dict[str, Candidate] = {}
    for index, info in enumerate(backbone.feature_info):
        for name in (info["module"], f"encoder.{info['module']}"):
            if name and name in modules:
                module = last_running_child(backbone, name, candidates)
                candidates.setdefault(name, Candidate(name, module, index, info["num_chs"], info["reduction"]))
                break
    return candidates


def last_running_child(backbone: Backbone, name: str, known: dict[str, Candidate]) -> str:
    """Return the path of the last module that runs inside the container `name`, or `name` itself."""
    try:
        module = backbone.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(backbone).__name__} has no module {name!r} to hang an exit on; "
            f"feature_info names {names_of(known)}, and any module that runs once in a forward is allowed."
        ) from None
    # A plain container may be run child by child, and then a hook on it never fires.
    while isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward:
        if len(module) == 0:
            break
        child, module = list(module.named_children())[-1]
        name = f"{name}.{child}"
    return name


def classifier_names(backbone: Backbone) -> tuple[str, ...]:
    """Return the paths of the modules that map the teacher's feature to logits."""
    classifier = backbone.get_classifier()
    parts = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    paths = {id(module): name for name, module in backbone.named_modules()}
    if not parts or any(not isinstance(part, nn.Module) or isinstance(part, nn.Identity) for part in parts):
        raise ValueError(
            f"{type(backbone).__name__} has no classifier (num_classes={getattr(backbone, 'num_classes', None)}), so "
            "there is nothing to teach: create it with num_classes=N or call its reset_classifier(N) first."
        )
    unknown = [type(part).__name__ for part in parts if id(part) not in paths]
    if unknown:
        raise ValueError(f"get_classifier() of {type(backbone).__name__} returned {unknown}, not one of its modules.")
    return tuple(paths[id(part)] for part in parts)


def names_of(known: Any) -> str:
    """Return the names of exit points as one comma-separated line."""
    return ", ".join(item if isinstance(item, str) else item.name for item in known) or "none"
