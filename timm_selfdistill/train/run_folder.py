"""A run's folder belongs to one run: what may be written there, which run may go on there, and what is done already.

What a run is, its recipe and its data, is kept with each checkpoint and with the model, and compared before it goes on.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from timm_selfdistill.data.decode import SKIPPED
from timm_selfdistill.data.survey import Fingerprint
from timm_selfdistill.hub import CONFIG, read_run
from timm_selfdistill.losses import SelfDistillationLoss, needs_of
from timm_selfdistill.output import is_lock
from timm_selfdistill.recipe import LOCAL, RECIPE, Recipe, is_local, load_recipe
from timm_selfdistill.report import Report
from timm_selfdistill.train.builders import build_loss
from timm_selfdistill.train.checkpoint import is_checkpoint, list_checkpoints, read_entry
from timm_selfdistill.train.checkpoint_format import CheckpointError, DamagedCheckpointError

_logger = logging.getLogger(__name__)

NONFINITE: Final = "nonfinite.jsonl"
CHECKPOINTS: Final = "checkpoints"
MODEL: Final = "model"
RECORD_KEY: Final = "run"  # of a checkpoint's state
# What a run writes, or others write of it. Those in the first line are replaced, the others are added to.
_REPLACED = (RECIPE, LOCAL, "report.json", "report.md", "report.png")
_LOGS = ("metrics.jsonl", SKIPPED, "skipped-*.jsonl", NONFINITE)
_ADDED_TO = (*_LOGS, CHECKPOINTS, MODEL, ".pushing", ".lock")
_NETWORKS = ("baseline", "self-distilled")
# What may differ between a run and its continuation: sections that do not change the numbers, and fields that change
# them only where the run would have stopped.
_FREE_SECTIONS = ("output_dir", "resume", "trackers", "tracking", "checkpoint", "push_to_hub")
_FREE_FIELDS = ("data.on_error", "data.workers", "data.check_duplicates")
# Where the data lies may differ as long as it is the same data.
_LOCATIONS = ("data.path", "data.root")
# Schedules that do not look at the end of the training.
_WITHOUT_END = ("constant", "multistep", "none", "step")
_UNKNOWN_DATA = (
    "%s was written by an earlier release, which kept no record of the run's data: whether it has changed since is not "
    "known."
)


@dataclass(frozen=True)
class RunRecord:
    """What a run is, and how many of its epochs are done."""

    recipe: Recipe  # without the paths of a machine
    data: Fingerprint
    epochs_done: int = 0
    epochs: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done >= self.epochs

    def to_json(self) -> dict[str, Any]:
        """Return it in the form that JSON and checkpoints can hold."""
        return {
            "recipe": self.recipe.model_dump(mode="json", exclude={"output_dir", "resume"}),
            "data": self.data.to_json(),
            "epochs_done": self.epochs_done,
            "epochs": self.epochs,
        }

    @classmethod
    def from_json(cls, value: Any) -> "RunRecord | None":
        """Return what `to_json` was called on, or None for None, as earlier releases kept no record."""
        if value is None:
            return None
        try:
            recipe, data, done, epochs = (value[key] for key in ("recipe", "data", "epochs_done", "epochs"))
        except (LookupError, TypeError) as error:
            raise ValueError(f"The record of the run is damaged: {error!r}.") from error
        return cls(load_recipe(recipe).without_local_paths(), Fingerprint.from_json(data), int(done), int(epochs))


def read_record(checkpoints: Path) -> RunRecord | None:
    """Return the record in the newest checkpoint of a network's folder that has one, or None."""
    for path in reversed(list_checkpoints(checkpoints)):
        try:
            record = RunRecord.from_json(read_entry(path, RECORD_KEY))
        except DamagedCheckpointError:  # skipped, with a warning, when it is to be loaded
            continue
        if record is not None:
            return record
    return None


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a run's but has files with a run's names, or has links out of it; write nothing."""
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

    The run is the one in the folder, or the one of the checkpoint that the recipe's `resume` names.
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
                f"resume: {recipe.resume} is not a checkpoint of this run; allowed are auto, never, or a folder "
                f"checkpoints/NAME/checkpoint-STEP with NAME {' or '.join(networks)}."
            )
        record = RunRecord.from_json(read_entry(path, RECORD_KEY))
        if record is None:
            _logger.warning(_UNKNOWN_DATA, path)
        else:
            _compare(record, recipe, data, f"resume: {path} is a checkpoint of")
    records = list(_records(folder))
    for record in records:
        _compare(record, recipe, data, f"{folder} holds")
    if not records and _has_results(folder):
        _logger.warning(_UNKNOWN_DATA, folder)
        for before in begun_recipes(folder):
            _refuse(recipe_changes(before, recipe, data_is_known=False), f"{folder} holds")


def remove_leftovers(folder: Path) -> None:
    """Remove the logs of runs that failed before their first checkpoint, so that they are not taken for this one's."""
    if not _has_results(folder):
        for path in _found(folder, _LOGS):
            path.unlink()


def finished_report(recipe: Recipe) -> Report | None:
    """Return the report of a run that is complete, or None; another recipe or a damaged report is a `ValueError`."""
    folder = Path(recipe.output_dir or ".")
    check_folder(folder)
    path, config = folder / "report.json", folder / MODEL / CONFIG
    known = next(_records(folder), None) is not None
    before = begun_recipes(folder)
    for one in before:
        # Its data is not opened: that it is the same is checked when it goes on.
        _refuse(recipe_changes(one, recipe, data_is_known=known), f"{folder} holds")
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


def begun_recipes(folder: Path) -> list[Recipe]:
    """Return the recipes of the run in a folder: of its records, or what an earlier release left without one."""
    records = list(_records(folder))
    if not records and _has_results(folder) and (folder / RECIPE).is_file():
        return [load_recipe(folder / RECIPE)]
    return [record.recipe for record in records]


def recipe_changes(before: Recipe, now: Recipe, *, data_is_known: bool) -> list[str]:
    """Return what keeps a run of one recipe from going on with another, each as "key (before, now ...)"."""
    # Names of files of a machine count by their last part: a run may be copied to another one.
    flats = [dotted(recipe.without_local_paths()) for recipe in (before, now)]
    if not data_is_known:
        for values, recipe in zip(flats, (before, now), strict=True):
            values |= {key: dotted(recipe).get(key, "None") for key in _LOCATIONS}
    changes = []
    for key in sorted(flats[0] | flats[1]):
        one, other = (values.get(key) for values in flats)
        if one == other or key.split(".")[0] in _FREE_SECTIONS or (data_is_known and key in _LOCATIONS):
            continue
        note = _why_not(key, before, now)
        if note is not None:
            changes.append(f"{key} ({one}, now {other}{note})")
    return changes


def dotted(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Return the recipe under dotted keys, as trackers take hyperparameters: what is not a number is text."""
    values: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        items = value.items() if isinstance(value, dict) else ()
        values |= {f"{key}.{name}": item for name, item in items} or {key: value}
    return {key: value if isinstance(value, int | float) else str(value) for key, value in values.items()}


def _why_not(key: str, before: Recipe, now: Recipe) -> str | None:
    """Return why a changed key keeps a run from going on, as the end of a sentence; None if it does not."""
    if key == "data.workers" and now.data.streaming and before.data.stream_workers != now.data.stream_workers:
        return ": the order of a stream depends on its loader processes"
    if key != "epochs":
        return None if key in _FREE_FIELDS else ""
    if now.epochs < before.epochs:
        return ": a run can be made longer, not shorter"
    if now.schedule.name not in _WITHOUT_END:
        return (
            f": with schedule.name={now.schedule.name} the learning rate of every step depends on epochs; a run can be "
            f"made longer with {', '.join(_WITHOUT_END)}"
        )
    loss = build_loss(now)
    if needs_of(loss).time and not isinstance(loss, SelfDistillationLoss):
        return f": the loss {now.loss.name} counts the share of the training that is done"
    return None


def _found(folder: Path, patterns: Collection[str]) -> list[Path]:
    """Return what there is in a folder under these names, links that lead nowhere too."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of all networks of a run."""
    return [path for network in _NETWORKS for path in list_checkpoints(folder / CHECKPOINTS / network)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or holds nothing but what an unfinished start of one left."""
    if is_local(folder / LOCAL) or any(map(is_checkpoint, _checkpoints(folder))) or next(_records(folder), None):
        return True
    try:
        # An earlier release wrote every field, which no person does.
        text = (folder / RECIPE).read_text()
        load_recipe(folder / RECIPE)
    except (OSError, ValueError):
        return False
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in Recipe.model_fields)


def _has_results(folder: Path) -> bool:
    """Whether a run has come so far that something would be lost: a checkpoint, or a model."""
    return bool(_checkpoints(folder)) or (folder / MODEL / CONFIG).is_file()


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
        except ValueError:  # damaged, or no model of this library's: written again
            return
        if of_model is not None:
            yield of_model


def _compare(record: RunRecord, recipe: Recipe, data: Fingerprint, what: str) -> None:
    """Refuse a run of another recipe or other data; `what` begins the sentence that "a run of ..." ends."""
    _refuse(recipe_changes(record.recipe, recipe, data_is_known=True), what)
    if changes := record.data.changes(data):
        raise ValueError(
            f"{what} a run of other data: {'; '.join(changes)}. Images that were trained on could be reported on, and "
            "labels mean something else: restore the data, or choose another output_dir."
        )


def _refuse(changes: list[str], what: str) -> None:
    if changes:
        raise ValueError(
            f"{what} a run of another recipe: {'; '.join(changes)}. Choose another output_dir, or move it away."
        )
