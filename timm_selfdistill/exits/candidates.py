"""What a backbone says of itself: the modules that may be tapped, and its own classifier."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# A torch module that follows timm's contract, which no base class of timm's states.
Backbone = Any

_CONTRACT = ("feature_info", "get_classifier", "num_classes", "num_features")
_ENTRY_KEYS = ("module", "num_chs", "reduction")


@dataclass(frozen=True)
class Oddity:
    """What a family's `feature_info` and shapes do not tell.

    Args:
        tapped_instead: Modules to tap instead of those that `feature_info` names, shallow to deep, `*` standing for
            any one part of a path. Indices into `feature_info` then count these modules.
        tokens_in_order: Whether tokens follow the image row by row, so that they can be read as a feature map.
    """

    tapped_instead: tuple[str, ...] = ()
    tokens_in_order: bool = True


# All the timm families that are special here, by class; everything else is read off one dry run.
_ODDITIES = {
    # Names the containers of the first and the last, parallel stage only; the last one's end is that of the network.
    "CoaT": Oddity(tapped_instead=("serial_blocks*", "parallel_blocks.*")),
    # Keeps its tokens in the order of its mask units until they are pooled.
    "Hiera": Oddity(tokens_in_order=False),
    # Names a `stem` and a `stage1` that are no modules, and promises one branch of each of the others.
    "HighResolutionNet": Oddity(tapped_instead=("layer1", "stage*")),
    # Names `block.0`, `block.1`, ... for what is `stages.0`, `stages.1`, ...
    "MultiScaleVit": Oddity(tapped_instead=("stages.*",)),
    # Names `block.0`, `block.1`, ... for what is `blocks.0`, `blocks.1`, ...
    "Twins": Oddity(tapped_instead=("blocks.*",)),
}


@dataclass(frozen=True)
class Promise:
    """What one entry of `feature_info` says of the tensor at its module.

    Args:
        index: The entry's index.
        channels: Its channels.
        reduction: How many times the image's sides are longer than the grid's.
    """

    index: int
    channels: int
    reduction: float


@dataclass(frozen=True)
class Candidate:
    """A module that `feature_info` or the caller names.

    Args:
        name: Its path as it was named.
        module: Path of the module to hook: the last child that runs, where `name` is a container.
        indices: The indices by which it may be called.
        promises: What `feature_info` says of it: nothing, or one entry for each tensor that is to be tapped.
    """

    name: str
    module: str
    indices: tuple[int, ...] = ()
    promises: tuple[Promise, ...] = ()


@dataclass(frozen=True)
class Classifier:
    """A backbone's classifier.

    Args:
        name: Its module path, of the first where there are several.
        groups: Module paths. Classifiers in one group read different features of which each gives a part of the
            teacher's (CrossViT: a feature a branch); two groups are two whole classifiers, whose features are averaged
            (distilled transformers: the class token's and the distillation token's).
    """

    name: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of all its modules."""
        return tuple(path for group in self.groups for path in group)


def oddity_of(backbone: Backbone) -> Oddity:
    """Return what is special about a timm backbone's family."""
    names = [base.__name__ for base in type(backbone).__mro__ if base.__module__.startswith("timm.")]
    return next((_ODDITIES[name] for name in names if name in _ODDITIES), Oddity())


def check_contract(backbone: Backbone) -> None:
    """Refuse a module that does not follow timm's contract.

    Raises:
        ValueError: Saying what is missing.
    """
    kind = type(backbone).__name__
    missing = [name for name in _CONTRACT if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{kind} cannot be wrapped: it has no {', '.join(missing)}. A backbone is a timm model or a module with "
            f"{', '.join(_CONTRACT)}" + (" (a pure encoder has no classifier)." if "get_classifier" in missing else ".")
        )
    entries = backbone.feature_info
    if not isinstance(entries, list | tuple):
        raise ValueError(f"feature_info of {kind} must be a list of dicts, got {type(entries).__name__}.")
    for index, entry in enumerate(entries):
        absent = [key for key in _ENTRY_KEYS if not isinstance(entry, Mapping) or key not in entry]
        if absent:
            raise ValueError(
                f"feature_info of {kind} must be a list of dicts with the keys {', '.join(_ENTRY_KEYS)}; entry {index} "
                f"has no {', '.join(absent)}: {entry!r}."
            )


def resolve_feature_info(backbone: Backbone) -> dict[str, Candidate]:
    """Return the candidates that `feature_info` names and that are modules, in its order."""
    modules = dict(backbone.named_modules())
    instead = _tapped_instead(backbone, modules)
    if instead:
        return {
            name: Candidate(name, last_running_child(backbone, name, instead), (index,))
            for index, name in enumerate(instead)
        }
    prefixes = ("", *_parts_that_share_feature_info(backbone))
    entries: dict[str, list[Promise]] = {}
    for index, entry in enumerate(backbone.feature_info):
        promise = Promise(index, entry["num_chs"], entry["reduction"])
        names = (prefix + entry["module"] for prefix in prefixes if entry["module"])
        name = next((name for name in names if name in modules), None)
        if name is not None:
            entries.setdefault(name, []).append(promise)
    return {
        name: Candidate(
            name, last_running_child(backbone, name, entries), tuple(p.index for p in promises), tuple(promises)
        )
        for name, promises in entries.items()
    }


def entries_without_module(backbone: Backbone, candidates: Mapping[str, Candidate]) -> list[str]:
    """Return the names in `feature_info` that are no modules, and so no candidates."""
    if oddity_of(backbone).tapped_instead:
        return []
    resolved = {index for candidate in candidates.values() for index in candidate.indices}
    return [entry["module"] for index, entry in enumerate(backbone.feature_info) if index not in resolved]


def last_running_child(backbone: Backbone, name: str, known: Iterable[str]) -> str:
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


def find_classifier(backbone: Backbone) -> Classifier:
    """Return where the teacher's feature becomes logits.

    Raises:
        ValueError: If the backbone has no classifier, or names one that is no part of it.
    """
    kind = type(backbone).__name__
    found = backbone.get_classifier()
    groups = [_members(part) for part in (found if isinstance(found, tuple | list) else [found])]
    parts = [part for group in groups for part in group]
    if not parts or any(not isinstance(part, nn.Module) or isinstance(part, nn.Identity) for part in parts):
        raise ValueError(
            f"{kind} has no classifier (num_classes={getattr(backbone, 'num_classes', None)}), so "
            "there is nothing to teach: create it with num_classes=N or call its reset_classifier(N) first."
        )
    paths = {id(module): name for name, module in backbone.named_modules()}
    unknown = [type(part).__name__ for part in parts if id(part) not in paths]
    if unknown:
        raise ValueError(f"get_classifier() of {kind} returned {unknown}, not one of its modules.")
    first = found[0] if isinstance(found, tuple | list) else found
    name = paths.get(id(first), paths[id(parts[0])])
    return Classifier(name, tuple(tuple(paths[id(part)] for part in group) for group in groups))


def names_of(known: Iterable[Any]) -> str:
    """Return the names of exit points as one comma-separated line."""
    return ", ".join(item if isinstance(item, str) else item.name for item in known) or "none"


def _tapped_instead(backbone: Backbone, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules to tap instead of those that `feature_info` names, or none."""
    patterns = oddity_of(backbone).tapped_instead
    expressions = [re.escape(pattern).replace(r"\*", "[^.]*") for pattern in patterns]
    return [name for expression in expressions for name in modules if re.fullmatch(expression, name)]


def _parts_that_share_feature_info(backbone: Backbone) -> Iterator[str]:
    """Yield the path prefixes of children whose `feature_info` the backbone hands on, its names being relative."""
    for name, child in backbone.named_children():
        if getattr(child, "feature_info", None) is backbone.feature_info:
            yield f"{name}."


def _members(part: Any) -> list[Any]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]
