"""A saved model and its run: where they are, the data they were trained on, and the networks in the checkpoints."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.survey import fingerprint
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import CONFIG, complete_names, read_run, save_pretrained
from timm_selfdistill.hub.start_weights import without_wrappers
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import RECIPE, AugmentSection, DataSection, Recipe, load_recipe
from timm_selfdistill.train.builders import build_model
from timm_selfdistill.train.checkpoint import latest_checkpoint, load_checkpoint
from timm_selfdistill.train.checkpoint_format import CheckpointError
from timm_selfdistill.train.run_folder import CHECKPOINTS, MODEL, RECORD_KEY, RunRecord, begun_recipes

_logger = logging.getLogger(__name__)

_BATCH_SIZE = 128
# Settings of the data that do not decide which images are for what.
_HOW_TO_READ = {
    *("on_error", "workers", "image_size", "mean", "std", "interpolation", "crop_pct", "shuffle_buffer", "cache"),
    *("check_duplicates", "sampling"),
}


@dataclass(frozen=True)
class SavedRun:
    """Where a saved model is, and its run."""

    folder: Path  # the run's, or the parent of the model's if there is no run
    model_folder: Path

    @classmethod
    def find(cls, folder: Path) -> "SavedRun":
        """Return the one in a run's folder, or in the model folder in it."""
        folder = folder.expanduser()
        return cls(folder, folder / MODEL) if (folder / MODEL).is_dir() else cls(folder.parent, folder)

    @property
    def recipe_path(self) -> Path | None:
        """The run's recipe, or None if there is no run."""
        path = self.folder / RECIPE
        return path if path.is_file() else None

    @property
    def output(self) -> Path:
        """Where to put what is found out about the model: the run's folder, or the model's if there is no run."""
        return self.model_folder if self.recipe_path is None else self.folder

    def evaluation_recipe(
        self, model: SelfDistillModel, data_path: str | None, overrides: Sequence[str] = ()
    ) -> Recipe:
        """Return the run's recipe, or one for another data set, with fields of the data section as "key=value".

        Of another data set only the split `eval_split` is to be read. `ValueError`: there is no run and no data set.
        """
        changes = [f"data.{override}" for override in overrides]
        saved = self.recipe_path
        if data_path is None:
            if saved is None:
                raise ValueError(f"There is no {self.folder / RECIPE}, so the data set must be named with --data.")
            return load_recipe(saved, changes)
        precision = "no" if saved is None else load_recipe(saved).precision
        # Nothing is trained, so the data set needs no other split: the evaluated one stands for it.
        data = {"path": data_path, "train_split": "none"}
        name = type(model.backbone).__name__
        recipe = load_recipe({"model": {"name": name}, "data": data, "precision": precision}, changes)
        only = {
            "train_split": recipe.data.eval_split,
            "validation": 0.0,
            "max_train": recipe.data.max_eval,
            "allow_empty_classes": True,
        }
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=only)})

    def baseline_weights(self) -> tuple[Path, dict[str, Tensor]] | None:
        """Return the last checkpoint of the run's baseline and the weights in it that were evaluated, if any."""
        path = latest_checkpoint(self.folder / CHECKPOINTS / "baseline")
        if path is None or self.recipe_path is None:
            return None
        state = load_checkpoint(path)
        done, epochs = state["progress"]["epoch"], load_recipe(self.recipe_path).epochs
        if done < epochs:
            raise ValueError(
                f"{path} was saved after {done} of {epochs} epochs: the baseline is not trained to its end."
            )
        return path, _evaluated_weights(state)


@dataclass(frozen=True)
class CheckpointModel:
    """The network in a checkpoint, as it would have been evaluated and saved."""

    model: SelfDistillModel  # in eval mode
    recipe: Recipe  # with the paths of this machine as far as they are known
    record: RunRecord
    step: int  # optimizer steps taken
    seconds: float  # time spent on them


def load_newest(folder: Path, network: str = "self-distilled") -> CheckpointModel:
    """Load a network, "self-distilled" or "baseline", from its newest whole checkpoint in a run's folder."""
    path = latest_checkpoint(folder / CHECKPOINTS / network)
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint of the network {network!r}.")
    state = load_checkpoint(path)
    record = RunRecord.from_json(state.get(RECORD_KEY))
    if record is None:
        raise ValueError(
            f"{path} was written by an earlier release, which did not keep the run's recipe and classes with it: let "
            "the run go on with this one to its next checkpoint."
        )
    recipe = load_recipe(folder / RECIPE) if (folder / RECIPE).is_file() else record.recipe
    # Its weights come from the checkpoint.
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"pretrained": False, "weights": None})})
    model = build_model(plain, record.data.classes, recipe.data.path)
    try:
        model.load_state_dict(_evaluated_weights(state))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network of the recipe beside it: {error}") from error
    return CheckpointModel(model.eval(), recipe, record, state["progress"]["step"], state["progress"]["seconds"])


@contextmanager
def opened_run(folder: Path, from_checkpoint: bool = False) -> Iterator[SavedRun]:
    """Give the body a saved model and its run, from the run's folder or the model folder in it.

    With `from_checkpoint` the model is the network in the run's newest checkpoint, saved in a temporary folder.
    """
    folder = folder.expanduser()
    if not from_checkpoint:
        yield SavedRun.find(folder)
        return
    found = load_newest(folder)
    with tempfile.TemporaryDirectory(prefix="timm-selfdistill-") as temporary:
        save_pretrained(
            found.model,
            temporary,
            label_names=found.record.data.classes,
            data_config=InputConfig.from_model(found.model.backbone, found.recipe.data).to_timm(),
            run=found.record.to_json(),
        )
        yield SavedRun(folder, Path(temporary))


def as_begun(recipe: Recipe) -> Recipe:
    """Return a recipe with the precision of the run that it goes on with, where it names none itself.

    Earlier releases had another default.
    """
    if "precision" in recipe.model_fields_set or recipe.resume == "never":
        return recipe
    path, folder = Path(recipe.resume), Path(recipe.output_dir or ".")
    if recipe.resume != "auto" and path.is_dir():
        folder = path.parents[2]
    before = begun_recipes(folder)
    return recipe.model_copy(update={"precision": before[0].precision}) if before else recipe


def evaluation_loaders(
    data: ImageData, recipe: Recipe, augment: AugmentSection, input_config: InputConfig, skipped: SkipList
) -> Loaders:
    """Build the loaders for a saved model, in one process; of the recipe, its data section and seed count."""
    return build_loaders(
        data,
        # What is read once is not worth keeping.
        recipe.data.model_copy(update={"cache": None}),
        augment,
        input_config,
        # The training split is read little or not at all, but must have a batch.
        batch_size=min(_BATCH_SIZE, len(data.train)) if isinstance(data.train, Sized) else _BATCH_SIZE,
        accelerator_shards=(0, 1),
        seed=recipe.seed,
        skipped=skipped,
        device=PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device,
    )


def check_data(saved: SavedRun, recipe: Recipe, data: ImageData, *, is_own: bool) -> None:
    """Refuse data of other classes than the model's; of the run's own data, say what changed since the training."""
    check_classes(saved.model_folder, data)
    record = RunRecord.from_json(read_run(saved.model_folder)) if is_own else None
    if record is None or saved.recipe_path is None:
        return
    own = load_recipe(saved.recipe_path)
    where = {key: value for key, value in recipe.data.model_dump().items() if key in ("path", "root")}
    section = own.data.model_copy(update=where)
    kept = set(DataSection.model_fields) - _HOW_TO_READ
    if section.model_dump(include=kept) != recipe.data.model_dump(include=kept):
        # Other images are looked at: only the run's own can tell whether they are still the same.
        data = open_dataset(section, own.seed)
    now = fingerprint(data, section)
    if changes := record.data.changes(now):
        mixed = (record.data.classes, record.data.uses["training"]) != (now.classes, now.uses["training"])
        _logger.warning(
            "%s is not what the model in %s was trained on: %s.%s",
            data.name,
            saved.folder,
            "; ".join(changes),
            " Images that are held out now may have been trained on." if mixed else "",
        )


def check_classes(folder: Path, data: ImageData) -> None:
    """Refuse a data set whose classes are not those that the model in a folder was trained on, in its order."""
    names = json.loads((folder / CONFIG).read_text()).get("label_names")
    if names is None:
        return
    names = list(map(str, names)) if isinstance(names, list) else [str(names)]
    # Classes that the training data did not have are named by their indices.
    fits = len(data.class_names) <= len(names) and complete_names(data.class_names, len(names)) == tuple(names)
    if not fits:
        raise ValueError(
            f"{data.name} has {len(data.class_names)} classes ({', '.join(data.class_names[:5])}, ...), the model in "
            f"{folder} was trained on {len(names)} ({', '.join(names[:5])}, ...): "
            "they must be the same, in the same order."
        )


def _evaluated_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint's state that are evaluated and saved: the best, the average or the last."""
    weights = state["progress"]["best_weights"] or state.get("ema", state["model"])
    return without_wrappers(weights)
