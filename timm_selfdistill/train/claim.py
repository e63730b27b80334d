"""A run's folder belongs to one recipe: what may be continued there, and what is done already."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from timm_selfdistill.files import replace_file
from timm_selfdistill.hub import CONFIG
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.report import Report

# What may differ between a run and its continuation: sections that do not change the numbers, and fields that change
# them only where the run would have stopped.
_FREE_SECTIONS = ("output_dir", "resume", "trackers", "checkpoint", "push_to_hub")
_FREE_FIELDS = ("data.on_error",)


def finished_report(recipe: Recipe) -> Report | None:
    """Return the report of a run that is complete, or None if it is still to be trained.

    Raises:
        ValueError: If the run's folder holds a run of another recipe, or a damaged report.
    """
    folder = Path(recipe.output_dir or ".")
    if (folder / "recipe.yaml").is_file():
        _check_same_recipe(folder, recipe)
    path = folder / "report.json"
    # The model is written last.
    if not path.is_file() or not (folder / "model" / CONFIG).is_file():
        return None
    try:
        report: Report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run writes it again.") from error
    return report


def check_resume(recipe: Recipe, networks: Collection[str]) -> None:
    """Refuse a checkpoint that is none of this run's networks'."""
    path = Path(recipe.resume)
    if recipe.resume in ("auto", "never") or (path.is_dir() and path.parent.name in networks):
        return
    raise ValueError(
        f"resume: {recipe.resume} is no checkpoint of this run; allowed are auto, never, or a folder "
        f"checkpoints/NAME/checkpoint-STEP with NAME {' or '.join(networks)}."
    )


def claim(folder: Path, recipe: Recipe, *, is_main: bool) -> None:
    """Write the recipe to the run's folder, refusing to mix it with another run.

    Raises:
        ValueError: If the folder holds a run that this one does not continue.
    """
    path = folder / "recipe.yaml"
    if path.is_file():
        if recipe.resume == "never" and is_main:
            raise ValueError(
                f"{folder} already holds a run, and resume is never: choose another output_dir, or move it away."
            )
        _check_same_recipe(folder, recipe)
    if is_main:
        replace_file(path, recipe.to_yaml().encode())


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe under dotted keys, as trackers take hyperparameters."""
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        items = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": str(item) for name, item in items} or {key: str(value)}
    return flat


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to mix a run with that of another recipe in its folder."""
    before, now = flat(load_recipe(folder / "recipe.yaml")), flat(recipe)
    changed = [
        f"{key} ({before.get(key)}, now {now.get(key)})"
        for key in sorted(before | now)
        if key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_FIELDS and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run of another recipe: {'; '.join(changed)}. Choose another output_dir, or move it away."
        )
