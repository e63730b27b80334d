"""Everything a training run depends on; every default of a run is in this folder, once."""

import os
from collections.abc import Mapping
from glob import glob
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from timm_selfdistill.checks import Count, LocalPath, Names, Section
from timm_selfdistill.recipe.data_sections import AugmentSection, DataSection
from timm_selfdistill.recipe.loss_settings import LossSection, TeacherSection
from timm_selfdistill.recipe.plain_yaml import dump
from timm_selfdistill.recipe.training_sections import (
    LOCAL_MODEL,
    CheckpointSection,
    EmaSection,
    ExitsSection,
    ModelSection,
    OptimizerSection,
    PushSection,
    ScheduleSection,
    TrackingSection,
)

# A run's recipe as it may be shared, and the paths of this machine that belong to it.
RECIPE: Final = "recipe.yaml"
LOCAL: Final = "local.yaml"
# Names on the Hub, which a folder here may have too.
_NEVER_PATHS: Final = ("push_to_hub", "trackers")


class Recipe(Section):
    """Everything a training run depends on.

    Args:
        model: The backbone.
        exits: The classifiers hung on it.
        loss: The training loss.
        teacher: A model from outside that teaches too, beside the loss; null for none.
        data: Where images and labels come from.
        augment: Training augmentation.
        optimizer: The optimizer.
        schedule: How learning rate and trained parts change.
        epochs: Passes over the training images.
        batch_size: Images per optimizer step, over all processes and micro batches.
        precision: Autocast type; "auto" for what the device computes in natively, "no" for float32.
        compile: Run the model through `torch.compile`.
        sync_batchnorm: Normalise by the statistics of all processes' images; on several GPUs only.
        ema: Average the weights; null for no average.
        baseline: Also train the plain backbone on the same budget and report it too.
        seed: Seed of weights, order and augmentation.
        output_dir: Folder of the run; `load_recipe` replaces null by runs/<recipe name>. Here and in all other paths,
            a leading ~ is the home folder.
        resume: Continue from the newest checkpoint if there is one (auto), start afresh (never), or the path of a
            checkpoint.
        checkpoint: When checkpoints are written, and how many are kept.
        trackers: Names of Accelerate trackers to log to besides metrics.jsonl.
        tracking: Project, name and options of the run in these trackers.
        push_to_hub: Push the run's model to the Hugging Face Hub; null for no push.
    """

    model: ModelSection
    exits: ExitsSection = ExitsSection()
    loss: LossSection = LossSection()
    teacher: TeacherSection | None = None
    data: DataSection
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    epochs: Count = 200
    batch_size: Count = 128
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    sync_batchnorm: bool = False
    ema: EmaSection | None = None
    baseline: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output_dir: LocalPath | None = None
    resume: LocalPath = "auto"
    checkpoint: CheckpointSection = CheckpointSection()
    trackers: Names = ()
    tracking: TrackingSection = TrackingSection()
    push_to_hub: PushSection | None = None

    def to_yaml(self) -> str:
        """Return the whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
        return dump(self.model_dump(mode="json"))

    def without_local_paths(self) -> "Recipe":
        """Return the recipe as it may be shared: paths of this machine cut down to their last name, no `output_dir`."""
        mapping = self.model_dump(mode="json")
        mapping |= {key: _shorten(value) for key, value in mapping.items() if key not in _NEVER_PATHS}
        resume = self.resume if self.resume == "never" else "auto"
        return Recipe.model_validate(mapping | {"output_dir": None, "resume": resume})

    def local_paths(self) -> dict[str, Any]:
        """Return what `without_local_paths` leaves out and another call on this machine needs, by section and key."""
        shared = self.without_local_paths().model_dump(mode="json")
        full = self.model_dump(mode="json") | {key: shared[key] for key in ("output_dir", "resume")}
        # Complete, as another call may run in another folder.
        for section, key in (("data", "path"), ("data", "root"), ("model", "weights")):
            path = full[section][key]
            if path is not None and path != "digits" and _exists(path):
                full[section][key] = os.path.abspath(path)
        return _different(full, shared)

    @classmethod
    def conflict(cls, name: str, value: Any, before: Mapping[str, Any]) -> str | None:
        data, schedule, optimizer, augment = map(before.get, ("data", "schedule", "optimizer", "augment"))
        match name:
            case "schedule" if value.select == "best" and data is not None and not data.validation:
                # The section is already built, so the message brings the rest of the path.
                raise PydanticCustomError(
                    "conflict",
                    "select: must be 'last' where data.validation is 0, as 'best' is chosen on validation images",
                )
            case "epochs" if schedule is not None and (schedule.backbone_epochs or 0) >= value:
                return f"must be greater than schedule.backbone_epochs ({schedule.backbone_epochs})"
            case "batch_size" if optimizer is not None and value % optimizer.accumulate:
                return f"must be a multiple of optimizer.accumulate ({optimizer.accumulate})"
            case "batch_size" if optimizer is not None and augment is not None and augment.mixes:
                if value // optimizer.accumulate % 2:
                    return "must give micro batches of an even size, because Mixup and CutMix mix images in pairs"
        return None


def merge(recipe: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe holds with its `local_paths` put back, where it was not edited since."""
    merged = dict(recipe)
    for key, value in paths.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(before, value)
        elif _shorten(value) == before:
            merged[key] = value
    return merged


def _different(full: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the first mapping that are not the same in the second."""
    found = {key: value for key, value in full.items() if value != short.get(key)}
    for key, value in found.items():
        other = short.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found[key] = _different(value, other)
    return found


def _shorten(value: Any) -> Any:
    """Cut every path of this machine in a value down to its last name."""
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(LOCAL_MODEL):
        return LOCAL_MODEL + _last_name(value.removeprefix(LOCAL_MODEL))
    return _last_name(value) if _is_local_path(value) else value


def _is_local_path(text: str) -> bool:
    if text in (".", "..", "~") or text.startswith(("/", "./", "../", "~/")):
        return True
    # Such as "images/flowers": a path only if it is there, and a name on the Hub if it is not.
    return "/" in text and _exists(text)


def _exists(path: str) -> bool:
    return os.path.exists(path) or bool(glob(path))


def _last_name(path: str) -> str:
    absolute = os.path.abspath(os.path.expanduser(path))
    # The last name of a home folder is that of its user.
    return "home" if absolute in ("/", os.path.expanduser("~")) else os.path.basename(absolute)
