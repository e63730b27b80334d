"""The images that early exit is calibrated on: none that the model was trained on, none that are reported on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from timm_selfdistill.data import ImageData, ImageSplit, open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import AugmentSection, DataSection, Recipe, load_recipe
from timm_selfdistill.train.saved_run import SavedRun, evaluation_loaders, opened_run

# What decides which rows a run trained on, and which it held out.
_FIXED: Final = ("path", "name", "target", "train_split", "eval_fraction", "validation")


def held_out_images(
    folder: Path,
    count: int,
    *,
    data_path: str | None = None,
    split: str | None = None,
    from_checkpoint: bool = False,
) -> Tensor:
    """Return images that a model was not trained on, prepared for it [N, C, H, W], at most `count` of all over a split.

    Arguments and errors are those of `calibrate_folder`: they are the images that it would calibrate on.
    """
    with opened_run(folder, from_checkpoint) as saved:
        model = from_pretrained(saved.model_folder)
        recipe, _ = choose_images(saved, model, data_path, split, ())
        data = open_images(recipe)
        input_config = InputConfig.from_model(model.backbone, recipe.data)
        assert data.validation is not None
        return some_images(replace(data, eval=data.validation), recipe, input_config, count)


def choose_images(
    saved: SavedRun, model: SelfDistillModel, data_path: str | None, split: str | None, overrides: Sequence[str]
) -> tuple[Recipe, str]:
    """Return the recipe of which the validation images are to calibrate on, of another data set the training images,
    and what the report calls them; refuse images that were trained on or are reported on.
    """
    fixed = sorted({override.partition("=")[0].strip() for override in overrides} & set(_FIXED))
    if data_path is not None:
        fixed = [key for key in fixed if key in ("path", "train_split", "validation")]
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed here: it decides which images were trained on. Name the split to "
            "calibrate on with --split, and another data set with --data."
        )
    if data_path is not None and split is None:
        raise ValueError(f"Name the split of {data_path} to calibrate on with --split.")
    own = None if saved.recipe_path is None else load_recipe(saved.recipe_path).data
    if data_path is None and own is None:
        raise ValueError("There is no recipe.yaml beside the model: name the data set with --data and --split.")
    recipe = saved.evaluation_recipe(model, data_path, overrides)
    section = recipe.data
    if split is None:
        if not section.validation:
            raise ValueError(
                "The run held out no images for validation (data.validation is 0), and thresholds must not be chosen "
                f"by those it trained on or reports on ({section.eval_split}): name another split with --split, or "
                "another data set with --data and --split."
            )
        if isinstance(section.validation, str):
            return recipe, section.validation
        return recipe, f"the {100 * section.validation:g} % of {section.train_split} that the run held out"
    if own is not None and split == own.train_split and (data_path is None or _is_same_data(own, data_path)):
        which = "is the split that" if data_path is None else f"of {data_path} is what"
        raise ValueError(
            f"--split {split} {which} the model was trained on, where its confidence is higher than elsewhere: name a "
            "split that was held out, or leave --data and --split out, for the run's own validation images."
        )
    if section.eval_fraction is None and split == section.eval_split:
        raise ValueError(
            f"--split {split} is the split that is reported on: thresholds that were chosen by it would look better "
            "than they are. Name another one to calibrate on, or report on another one with eval_split=NAME."
        )
    changed = section.model_copy(update={"validation" if data_path is None else "train_split": split})
    return recipe.model_copy(update={"data": changed}), split


def _is_same_data(section: DataSection, path: str) -> bool:
    return section.path == path or Path(section.path).expanduser().resolve() == Path(path).expanduser().resolve()


def open_images(recipe: Recipe) -> ImageData:
    """Open the data, its split for validation being the one to calibrate on; it must share no row with the other."""
    data = open_dataset(recipe.data, recipe.seed)
    if not recipe.data.validation:
        data = replace(data, validation=data.train)
    one, other = data.validation, data.eval
    if isinstance(one, ImageSplit) and isinstance(other, ImageSplit) and one.name == other.name:
        shared = np.intersect1d(one.indices, other.indices)
        if len(shared):
            raise ValueError(
                f"{len(shared)} images of split {one.name!r} are both to calibrate on and to report on: name other "
                "splits with --split and eval_split=NAME."
            )
    return data


def some_images(data: ImageData, recipe: Recipe, input_config: InputConfig, count: int) -> Tensor:
    """Return some of the images of `data.eval`: from all over the split, or the first of a stream."""
    if isinstance(data.eval, ImageSplit):
        places = np.linspace(0, len(data.eval) - 1, min(count, len(data.eval))).round().astype(np.int64)
        data = replace(data, eval=data.eval.select(places))
    found: list[Tensor] = []
    for images, _ in evaluation_loaders(data, recipe, AugmentSection(), input_config, SkipList()).eval:
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]
