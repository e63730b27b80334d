"""A run's folder belongs to one run: what may be written there, what may be continued, and what is done already."""

import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from timm_selfdistill.checkpoint import CheckpointError, is_checkpoint, list_checkpoints, read_entry
from timm_selfdistill.data.decode import SKIPPED
from timm_selfdistill.data.fingerprint import Fingerprint
from timm_selfdistill.files import replace_file
from timm_selfdistill.hub import CONFIG, read_run
from timm_selfdistill.recipe import LOCAL, RECIPE, Recipe, dump_local, is_local, load_recipe
from timm_selfdistill.report import Report
from timm_selfdistill.train.lock import is_lock
from timm_selfdistill.train.run_record import ENTRY, RunRecord, read_record, recipe_changes

_logger = logging.getLogger(__name__)

METRICS: Final = "metrics.jsonl"
NONFINITE: Final = "nonfinite.jsonl"
CHECKPOINTS: Final = "checkpoints"
MODEL: Final = "model"
# What a run writes, or others write of it. Those in the first line are replaced, the others are added to.
_REPLACED = (RECIPE, LOCAL, "report.json", "report.md", "report.png")
_ADDED_TO = (METRICS, SKIPPED, "skipped-*.jsonl", NONFINITE, CHECKPOINTS, MODEL, ".pushing", ".lock")
_NETWORKS = ("baseline", "self-distilled")


def check_folder(folder: Path) -> None:
    """Refuse a folder that a run must not write to; nothing is written.

    Raises:
        ValueError: If it is no run's and holds something under a name that a run would write, or if it holds a link
            that would be followed out of it.
    """
    inside = [folder / CHECKPOINTS / network for network in _NETWORKS]
    for path in (*_found(folder, _ADDED_TO), *inside):
        if path.is_symlink():
            raise ValueError(
                f"output_dir: {path} is a link to {os.readlink(path)}, and a run writes nothing outside its folder: "
                "remove the link, or let output_dir itself be one."
            )
    if _is_run(folder):
        return
    foreign = [path.name for path in _found(folder, (*_REPLACED, *_ADDED_TO))]
    foreign = [name for name in foreign if name != ".lock" or not is_lock(folder / name)]
    if foreign:
        raise ValueError(
            f"output_dir: {folder} holds no run, but {', '.join(foreign)}, which a run would write: "
            "choose another output_dir, or move them away."
        )


def check_run(folder: Path, recipe: Recipe, data: Fingerprint, networks: Collection[str]) -> None:
    """Refuse to go on with a run of another recipe or other data; what has no checkpoint yet may change.

    Args:
        folder: The run's folder.
        recipe: The recipe.
        data: What the recipe's data is now.
        networks: The names of the run's networks.

    Raises:
        ValueError: If the folder, or the checkpoint that `resume` names, holds a run that this one does not continue.
    """
    if recipe.resume == "never":
        if _has_results(folder):
            raise ValueError(
                f"{folder} already holds a run, and resume is never: choose another output_dir, or move it away."
            )
        return
    if recipe.resume != "auto":
        path = Path(recipe.resume)
        if not path.is_dir() or path.parent.name not in networks:
            raise ValueError(
                f"resume: {recipe.resume} is no checkpoint of this run; allowed are auto, never, or a folder "
                f"checkpoints/NAME/checkpoint-STEP with NAME {' or '.join(networks)}."
            )
        record = RunRecord.from_json(read_entry(path, ENTRY))
        if record is None:
            _logger.warning(_UNKNOWN_DATA, path)
        else:
            _compare(record, recipe, data, f"resume: {path} is a checkpoint of")
    records = list(_records(folder))
    for record in records:
        _compare(record, recipe, data, f"{folder} holds")
    if not records and _has_results(folder):
        _logger.warning(_UNKNOWN_DATA, folder)
        if (folder / RECIPE).is_file():
            changes = recipe_changes(load_recipe(folder / RECIPE), recipe, data_is_known=False)
            _refuse(changes, f"{folder} holds")


def remove_leftovers(folder: Path) -> None:
    """Remove what runs logged that came to nothing, so that it is not taken for this one's."""
    if not _has_results(folder):
        for path in _found(folder, (METRICS, SKIPPED, "skipped-*.jsonl", NONFINITE)):
            path.unlink()


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe to the run's folder: one that may be shared, and beside it the paths of this machine."""
    # First what shows that the folder is a run's.
    replace_file(folder / LOCAL, dump_local(recipe).encode())
    replace_file(folder / RECIPE, recipe.without_local_paths().to_yaml().encode())


def finished_report(recipe: Recipe) -> Report | None:
    """Return the report of a run that is complete, or None if it is still to be trained.

    Raises:
        ValueError: If the run's folder holds a run of another recipe, or a damaged report.
    """
    folder = Path(recipe.output_dir or ".")
    check_folder(folder)
    path, config = folder / "report.json", folder / MODEL / CONFIG
    records = list(_records(folder))
    before = [record.recipe for record in records]
    if not before and _has_results(folder) and (folder / RECIPE).is_file():
        before = [load_recipe(folder / RECIPE)]
    for one in before:
        # Its data is not opened: that it is the same is checked where it goes on.
        _refuse(recipe_changes(one, recipe, data_is_known=bool(records)), f"{folder} holds")
    # The model is written last.
    if not path.is_file() or not config.is_file() or any(one.epochs != recipe.epochs for one in before):
        return None
    record = RunRecord.from_json(read_run(config.parent))
    if record is not None and not record.is_finished:
        return None
    try:
        report: Report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run writes it again.") from error
    return report


_UNKNOWN_DATA = (
    "%s was written by an earlier release, which kept no record of the run's data: whether it has changed since is not "
    "known."
)


def _found(folder: Path, patterns: Collection[str]) -> list[Path]:
    """Return what there is in a folder under these names, links that lead nowhere too."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or holds nothing but what an unfinished start of one left."""
    checkpoints = [path for network in _NETWORKS for path in list_checkpoints(folder / CHECKPOINTS / network)]
    if is_local(folder / LOCAL) or any(map(is_checkpoint, checkpoints)) or next(_records(folder), None) is not None:
        return True
    try:
        # An earlier release wrote every field, which nobody does by hand.
        text = (folder / RECIPE).read_text()
        load_recipe(folder / RECIPE)
    except (OSError, ValueError):
        return False
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in Recipe.model_fields)


def _has_results(folder: Path) -> bool:
    """Whether a run has come so far that something would be lost: a checkpoint, or a model."""
    checkpoints = [path for network in _NETWORKS for path in list_checkpoints(folder / CHECKPOINTS / network)]
    return bool(checkpoints) or (folder / MODEL / CONFIG).is_file()


def _records(folder: Path) -> Iterator[RunRecord]:
    """Yield the records of a run that its networks' checkpoints and its model hold."""
    for network in _NETWORKS:
        if (record := read_record(folder / CHECKPOINTS / network)) is not None:
            yield record
    if (folder / MODEL / CONFIG).is_file():
        try:
            of_model = RunRecord.from_json(read_run(folder / MODEL))
        except CheckpointError:
            raise
        except ValueError:  # damaged, or no model of this library's: written anew
            return
        if of_model is not None:
            yield of_model


def _compare(record: RunRecord, recipe: Recipe, data: Fingerprint, what: str) -> None:
    """Refuse a run of another recipe or other data.

    Args:
        record: What it is.
        recipe: The recipe.
        data: The recipe's data.
        what: What it is, as the beginning of a sentence that "a run of another recipe" ends.
    """
    _refuse(recipe_changes(record.recipe, recipe, data_is_known=True), what)
    if changes := record.data.changes(data):
        raise ValueError(
            f"{what} a run of other data: {'; '.join(changes)}. Images that were trained on could be reported on, and "
            "labels mean something else: put the data back as it was, or choose another output_dir."
        )


def _refuse(changes: list[str], what: str) -> None:
    if changes:
        raise ValueError(
            f"{what} a run of another recipe: {'; '.join(changes)}. Choose another output_dir, or move it away."
        )
