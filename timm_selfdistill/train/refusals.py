"""Refuse what cannot work, before anything is opened: wrong names, and losses and optimizers that do not fit."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import timm
import torch
from pydantic import ValidationError
from timm.optim import list_optimizers
from torch import nn

from timm_selfdistill.checks import did_you_mean
from timm_selfdistill.data.columns import check_columns, with_columns
from timm_selfdistill.data.names import resolve_splits, used_splits
from timm_selfdistill.data.sources import is_on_hub, load_splits
from timm_selfdistill.heads import list_heads
from timm_selfdistill.losses import list_divergences, list_losses, list_presets, list_teachers, needs_of
from timm_selfdistill.model.wrapping import SOURCES, model_problem
from timm_selfdistill.recipe import REPO_ID, DataSection, Recipe

# Which names are allowed for a key, by its section.
_KNOWN: Final[dict[tuple[str, str], Callable[[], Iterable[str]]]] = {
    ("exits", "head"): lambda: ("auto", "published", *list_heads()),
    ("loss", "name"): list_losses,
    ("loss", "preset"): list_presets,
    ("loss", "divergence"): list_divergences,
    ("loss", "teacher"): list_teachers,
    ("teacher", "divergence"): list_divergences,
    ("optimizer", "name"): lambda: map(str, list_optimizers()),
}
# timm's optimizers that step weights in parts as they step whole ones (the slow tests of test_sharding compare them).
# Others raise an error, or, as muon, do something else.
OPTIMIZERS = (
    *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adamwlegacy", "adan", "adanw"),
    *("adopt", "adoptw", "lamb", "lambc", "lambw", "laprop", "larc", "lars", "lion", "madgrad", "madgradw", "momentum"),
    *("nadam", "nadamlegacy", "nadamw", "nesterov", "nesterovw", "radam", "radamw", "rmsprop"),
    *("rmsproptf", "rmsproptfw", "sgd", "sgdw"),
)

REPLICATE: Final = "Without FSDP, distributed_type MULTI_GPU leaves the network whole."

# Of more names, only those like the wrong one are listed.
_MOST_LISTED = 12


def recipe_problems(recipe: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the names of models, exits, heads, losses and optimizer in what a recipe holds.

    Each is a sentence, "section.key: what is wrong". Only values of the right type are looked at; the recipe itself
    reports the others.
    """
    sections = {name: section for name, section in recipe.items() if isinstance(section, Mapping)}
    values = {(name, key): value for name, section in sections.items() for key, value in section.items()}
    problems = []
    for (section, key), known in _KNOWN.items():
        name, names = values.get((section, key)), list(dict.fromkeys(known()))
        # timm takes its optimizers in any case, and a wrapper in front of them.
        plain = name.lower().removeprefix("lookahead_") if isinstance(name, str) and section == "optimizer" else name
        if isinstance(name, str) and plain not in names:
            problems.append(f"{section}.{key}: unknown, received {name!r}{_allowed(name, names)}")
    name = values.get(("model", "name"))
    if isinstance(name, str):
        # Weights may come from a file that the arguments name.
        arguments = values.get(("model", "kwargs"))
        own = isinstance(arguments, Mapping) and arguments.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}
        pretrained = values.get(("model", "pretrained")) is True and not own
        if problem := model_problem(name, pretrained=pretrained):
            problems.append(f"model.{'pretrained' if problem.startswith('must be false') else 'name'}: {problem}")
        elif isinstance(points := values.get(("exits", "points")), list | tuple):
            problems += _point_problems(name, arguments, points)
    teacher: Any = values.get(("teacher", "name"))
    is_timms = isinstance(teacher, str) and not (os.path.isdir(teacher) or REPO_ID.fullmatch(teacher))
    if is_timms and (problem := model_problem(teacher)):
        problems.append(f"teacher.name: {problem}")
    return problems


def all_problems(recipe: Mapping[str, Any], is_wrong: bool = False) -> list[str]:
    """Return what is wrong with the names in a recipe, those of splits and columns too if anything is wrong.

    `is_wrong` says that the recipe has other faults. If nothing is wrong, the data is opened anyway; a data set on the
    Hub is not asked for.
    """
    problems = recipe_problems(recipe)
    data = recipe.get("data")
    if (problems or is_wrong) and isinstance(data, Mapping):
        problems += _data_problems(data)
    return problems


def check_needs(loss: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError if a recipe lacks what its loss needs."""
    needs = needs_of(loss)
    if recipe.teacher is not None and recipe.teacher.teaches != "backbone" and not needs.exits:
        raise ValueError("teacher.teaches: must be backbone for this loss, which does not run the exits.")
    if needs.ema and recipe.ema is None:
        raise ValueError(
            "ema: must not be null for this loss, which learns from the average of the weights; such as "
            "ema='{decay: 0.999}'."
        )
    if needs.batches == "plain":
        return
    if recipe.data.streaming:
        raise ValueError(
            f"data.streaming: must be false for this loss, whose {needs.batches} batches need images by their index."
        )
    if recipe.augment.mixes:
        raise ValueError(
            f"augment: must not mix images for this loss, which compares those of its {needs.batches} batches; set "
            "mixup_alpha and cutmix_alpha to 0 and cutmix_minmax to null."
        )


def refuse_optimizer(name: str) -> None:
    """Refuse an optimizer that is not known to step weights in parts as it would step whole ones."""
    if name.lower() not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name: {name} is not known to work where each process has a part of the network (FSDP2); "
            f"allowed there are {', '.join(OPTIMIZERS)}."
        )


def refuse_loss(loss: nn.Module) -> None:
    """Refuse, for FSDP2, a loss that has parameters, or for which another network or the network again is run."""
    needs = needs_of(loss)
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"The loss {type(loss).__name__} has parameters of its own, which are not trained where each process has a "
            f"part of the network (FSDP2). {REPLICATE}"
        )
    if needs.ema or needs.past or needs.batches == "paired":
        raise ValueError(
            f"The loss {type(loss).__name__} has {needs}, which is not done where each process has a part of the "
            f"network (FSDP2); allowed there are losses without ema, past and paired batches. {REPLICATE}"
        )


def _allowed(name: str, names: Sequence[str]) -> str:
    listed = f"; known are {', '.join(names)}" if len(names) <= _MOST_LISTED else ""
    return listed + did_you_mean(name, names, most=3)


def _point_problems(name: str, kwargs: Any, points: Sequence[Any]) -> list[str]:
    """Return which exits a model has no place for, as far as its modules tell without running it."""
    names = [point for point in points if isinstance(point, str)]
    indices = [point for point in points if isinstance(point, int) and not isinstance(point, bool)]
    if name.startswith(SOURCES) or not (names or indices):
        return []
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **(kwargs if isinstance(kwargs, Mapping) else {}))
    except Exception:  # timm checks few arguments; what is wrong with them is reported where the model is built
        return []
    modules = [module for module, _ in model.named_modules() if module]
    stages = len(getattr(model, "feature_info", None) or ())
    problems = []
    for point in names:
        module = re.sub(r"\[\d+\]$", "", point)
        if module not in modules:
            top = [each for each in modules if "." not in each]
            problems.append(f"exits.points: {name} has no module {point!r}{_allowed(module, modules) or _listed(top)}")
    problems += [
        f"exits.points: {name} has {stages} stages, 0 to {stages - 1}, received {index}"
        for index in indices
        if stages and index >= stages
    ]
    return problems


def _listed(names: Sequence[str]) -> str:
    return f"; it has {', '.join(names[:_MOST_LISTED])}"


def _data_problems(fields: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the splits and columns that a recipe names."""
    try:
        section = DataSection.model_validate(fields)
    except ValidationError:
        return []
    if is_on_hub(section.path):
        return []
    try:
        rows = load_splits(section).rows
        section = resolve_splits(section, rows)
        if (features := rows[section.train_split].features) is not None:
            section = with_columns(section, features)
        for split in used_splits(section).values():
            check_columns(rows[split].features, split, section)
    except ValueError as error:
        return [f"data: {error}"]
    return []
