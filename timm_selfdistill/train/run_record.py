"""What a run is: recipe and data, kept with each checkpoint and with the model, and compared before it goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_selfdistill.checkpoint import DamagedCheckpointError, list_checkpoints, read_entry
from timm_selfdistill.data.fingerprint import Fingerprint
from timm_selfdistill.losses import SelfDistillationLoss, needs_of
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.train.phases import build_loss

ENTRY = "run"  # of a checkpoint's state
# What may differ between a run and its continuation: sections that do not change the numbers, and fields that change
# them only where the run would have stopped.
_FREE_SECTIONS = ("output_dir", "resume", "trackers", "checkpoint", "push_to_hub")
_FREE_FIELDS = ("data.on_error", "data.workers", "data.check_duplicates")
# Where the data lies may differ as long as it is the same data.
_LOCATIONS = ("data.path", "data.root")
# Schedules that do not look at the end of the training.
_WITHOUT_END = ("constant", "multistep", "none", "step")


@dataclass(frozen=True)
class RunRecord:
    """What a run is, and how far it has come.

    Args:
        recipe: The recipe, without the paths of a machine.
        data: What tells whether the data is still the same.
        epochs_done: Epochs that are done.
        epochs: Epochs of the whole run.
    """

    recipe: Recipe
    data: Fingerprint
    epochs_done: int = 0
    epochs: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done >= self.epochs

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON and checkpoints can hold it."""
        return {
            "recipe": self.recipe.model_dump(mode="json", exclude={"output_dir", "resume"}),
            "data": self.data.to_json(),
            "epochs_done": self.epochs_done,
            "epochs": self.epochs,
        }

    @classmethod
    def from_json(cls, value: Any) -> "RunRecord | None":
        """Return what `to_json` was called on, or None for None, where an earlier release kept no record.

        Raises:
            ValueError: If it is something else.
        """
        if value is None:
            return None
        try:
            recipe, data, done, epochs = (value[key] for key in ("recipe", "data", "epochs_done", "epochs"))
        except (LookupError, TypeError) as error:
            raise ValueError(f"The record of the run is damaged: {error!r}.") from error
        return cls(load_recipe(recipe).without_local_paths(), Fingerprint.from_json(data), int(done), int(epochs))


def read_record(checkpoints: Path) -> RunRecord | None:
    """Return the record in the newest of a network's checkpoints that has one, or None.

    Args:
        checkpoints: The folder of the network's checkpoints; need not exist.
    """
    for path in reversed(list_checkpoints(checkpoints)):
        try:
            record = RunRecord.from_json(read_entry(path, ENTRY))
        except DamagedCheckpointError:  # passed over, with a warning, when it is to be loaded
            continue
        if record is not None:
            return record
    return None


def recipe_changes(before: Recipe, now: Recipe, *, data_is_known: bool) -> list[str]:
    """Return what keeps a run of one recipe from going on with another, each as "key (before, now ...)".

    Args:
        before: The recipe that was run.
        now: The one to go on with.
        data_is_known: Whether the data itself is compared, so that it may lie elsewhere.
    """
    flats = [flat(recipe) for recipe in (before, now)]
    # Names of files of a machine count by their last part: a run may be copied to another one.
    shared = [flat(recipe.without_local_paths()) for recipe in (before, now)]
    for key in _LOCATIONS if not data_is_known else ():
        for full, short in zip(flats, shared, strict=True):
            short[key] = full.get(key, "None")
    changes = []
    for key in sorted(shared[0] | shared[1]):
        one, other = shared[0].get(key), shared[1].get(key)
        if one == other or key.split(".")[0] in _FREE_SECTIONS or (data_is_known and key in _LOCATIONS):
            continue
        note = _why_not(key, before, now)
        if note is not None:
            changes.append(f"{key} ({one}, now {other}{note})")
    return changes


def flat(recipe: Recipe) -> dict[str, str]:
    """Return the recipe under dotted keys, as trackers take hyperparameters."""
    flat: dict[str, str] = {}
    for key, value in recipe.model_dump(mode="json").items():
        items = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": str(item) for name, item in items} or {key: str(value)}
    return flat


def _why_not(key: str, before: Recipe, now: Recipe) -> str | None:
    """Return why a changed key keeps a run from going on, as the end of a sentence; None if it does not."""
    if key == "data.workers" and now.data.streaming:
        return ": the order of a stream depends on its loader processes"
    if key == "epochs":
        return _why_not_longer(before, now)
    return None if key in _FREE_FIELDS else ""


def _why_not_longer(before: Recipe, now: Recipe) -> str | None:
    """Return why a run cannot be made longer, as the end of a sentence; None if it can."""
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
