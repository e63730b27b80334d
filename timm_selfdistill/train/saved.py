"""A saved model and its run: where they are, the data that they were trained on, and the weights of the baseline."""

import json
import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_selfdistill.checkpoint import latest_checkpoint, load_checkpoint
from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.fingerprint import fingerprint
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import CONFIG, complete_names, read_run
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import AugmentSection, DataSection, Recipe, load_recipe
from timm_selfdistill.train.run_record import RunRecord

_logger = logging.getLogger(__name__)

_BATCH_SIZE = 128
# Settings of the data that do not decide which images are for what.
_HOW_TO_READ = {
    *("on_error", "workers", "image_size", "mean", "std", "interpolation", "crop_pct", "shuffle_buffer", "cache"),
    "check_duplicates",
}
# What DDP, compile and timm's average of the weights put before the name of a weight.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class SavedRun:
    """Where a saved model is, and its run.

    Args:
        folder: The run's folder, or what holds the model's where there is no run.
        model_folder: The model's folder.
    """

    folder: Path
    model_folder: Path

    @classmethod
    def find(cls, folder: Path) -> "SavedRun":
        """Take a run's folder, or the model folder in it."""
        folder = folder.expanduser()
        return cls(folder, folder / "model") if (folder / "model").is_dir() else cls(folder.parent, folder)

    @property
    def recipe_path(self) -> Path | None:
        """The run's recipe, or None where there is no run."""
        path = self.folder / "recipe.yaml"
        return path if path.is_file() else None

    @property
    def output(self) -> Path:
        """Where to put what is found out about the model: the run's folder, or the model's where there is no run."""
        return self.model_folder if self.recipe_path is None else self.folder

    def evaluation_recipe(
        self, model: SelfDistillModel, data_path: str | None, overrides: Sequence[str] = ()
    ) -> Recipe:
        """Return the run's recipe, or one for another data set.

        Args:
            model: The saved model.
            data_path: Hub name or path of another data set, of which only the split `eval_split` is to be read.
            overrides: Fields of the data section, as "key=value".

        Raises:
            ValueError: If there is neither a run nor a data set.
        """
        changes = [f"data.{override}" for override in overrides]
        saved = self.recipe_path
        if data_path is None:
            if saved is None:
                path = self.folder / "recipe.yaml"
                raise ValueError(f"There is no {path}, so the data set must be named with --data.")
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
        """Return the newest checkpoint of the run's baseline and the weights in it that were evaluated, if any.

        Raises:
            ValueError: If it cannot be read, or is not from the end of the training.
        """
        path = latest_checkpoint(self.folder / "checkpoints" / "baseline")
        if path is None or self.recipe_path is None:
            return None
        state = load_checkpoint(path)
        done, epochs = state["progress"]["epoch"], load_recipe(self.recipe_path).epochs
        if done < epochs:
            raise ValueError(
                f"{path} was saved after {done} of {epochs} epochs: the baseline is not trained to its end."
            )
        return path, evaluated_weights(state)


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in the state of a checkpoint that are evaluated and saved: the best, the average or the last.

    Args:
        state: What `load_checkpoint` returned.
    """
    weights = state["progress"]["best_weights"] or state.get("ema", state["model"])
    return {_bare(name): tensor for name, tensor in weights.items()}


def evaluation_loaders(
    data: ImageData, recipe: Recipe, augment: AugmentSection, input: InputConfig, skipped: SkipList
) -> Loaders:
    """Build the loaders for a saved model, in one process.

    Args:
        data: What `open_dataset` returned.
        recipe: Its data section and seed count.
        augment: How the training images are augmented.
        input: What the model expects.
        skipped: Lists the images that are skipped.
    """
    return build_loaders(
        data,
        # What is read once is not worth keeping.
        recipe.data.model_copy(update={"cache": None}),
        augment,
        input,
        # The training split is read little or not at all, but must have a batch.
        batch_size=min(_BATCH_SIZE, len(data.train)) if isinstance(data.train, Sized) else _BATCH_SIZE,
        accelerator_shards=(0, 1),
        seed=recipe.seed,
        skipped=skipped,
    )


def check_classes(folder: Path, data: ImageData) -> None:
    """Refuse a data set whose classes are not those the model was trained on, in its order."""
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


def warn_of_other_data(saved: SavedRun, recipe: Recipe, data: ImageData) -> None:
    """Say what is different in a run's data since its model was trained.

    Args:
        saved: The model and its run; where there is none, nothing is known.
        recipe: The run's recipe, or with other settings of the data.
        data: Its data.
    """
    record = RunRecord.from_json(read_run(saved.model_folder))
    if record is None or saved.recipe_path is None:
        return
    own = load_recipe(saved.recipe_path)
    where = {key: value for key, value in recipe.data.model_dump().items() if key in ("path", "root")}
    section = own.data.model_copy(update=where)
    kept = set(DataSection.model_fields) - _HOW_TO_READ
    if section.model_dump(include=kept) != recipe.data.model_dump(include=kept):
        # Other images are looked at: whether the run's are still the same, only they can tell.
        data = open_dataset(section, own.seed)
    now = fingerprint(data, section)
    changes = record.data.changes(now)
    if changes:
        mixed = (record.data.classes, record.data.uses["training"]) != (now.classes, now.uses["training"])
        _logger.warning(
            "%s is not what the model in %s was trained on: %s.%s",
            data.name,
            saved.folder,
            "; ".join(changes),
            " Images that are held out now may have been trained on." if mixed else "",
        )


def _bare(name: str) -> str:
    """Return the name of a weight without those of wrappers."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
