"""Calibrate the early exit of a saved model: choose by one split, report on another, keep the settings."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from timm_selfdistill.calibration.calibration_page import write_calibration
from timm_selfdistill.calibration.calibration_report import CalibrationReport, Timing, build_calibration_report
from timm_selfdistill.calibration.choose_settings import Goal, choose_settings
from timm_selfdistill.calibration.onnx_settings import collect_stage_logits, open_stages, save_stage_settings
from timm_selfdistill.calibration.path_costs import (
    PathCosts,
    images_to_time,
    measure_path_macs,
    measure_speedup,
)
from timm_selfdistill.data import ImageData, ImageSplit, open_dataset
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import EarlyExitConfig, measure_stage_costs
from timm_selfdistill.exit_logits import ExitLogits, collect_logits
from timm_selfdistill.hub import from_pretrained, save_early_exit
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import AugmentSection, DataSection, Recipe, load_recipe
from timm_selfdistill.report import device_name
from timm_selfdistill.train.saved_run import SavedRun, check_classes, evaluation_loaders, opened_run, warn_of_other_data

Collect = Callable[[Iterable[tuple[Tensor, Tensor]], str], ExitLogits]

# What decides which rows a run trained on, and which it held out.
_FIXED: Final = ("path", "name", "target", "train_split", "eval_fraction", "validation")


def calibrate_folder(
    folder: Path,
    goal: Goal,
    *,
    data_path: str | None = None,
    split: str | None = None,
    overrides: Sequence[str] = (),
    rule: str = "max-softmax",
    fallback: str = "last",
    running_ensemble: bool = False,
    time_batch_size: int | None = None,
    onnx: Path | None = None,
    output: Path | None = None,
    from_checkpoint: bool = False,
) -> CalibrationReport:
    """Choose the early-exit settings of a saved model, keep them with it, and report what they give on other images.

    The settings go to the model's `config.json`; its weights are not changed. The report goes to `calibration.json`,
    `calibration.md` and `calibration.png`.

    Args:
        folder: A run's folder, or the model folder in it.
        goal: What is to be achieved.
        data_path: Hub name or path of another data set than the run's; `split` must then be given.
        split: The split to calibrate on; by default the images that the run held out for validation.
        overrides: Fields of the recipe's data section, as "key=value", such as "eval_split=test".
        rule: What confidence is, as in `EarlyExitConfig`.
        fallback: Who answers for images that left at no exit, as there.
        running_ensemble: Whether exits answer with the ensemble of those up to them, as there.
        time_batch_size: Choose by the time that batches of this size take on this machine, in place of
            multiply-accumulates.
        onnx: Stages of this model that were exported as ONNX, quantised or not: their logits are calibrated, and the
            settings go to their manifest, not to the model.
        output: Folder for the report; the run's by default, or the model's where there is no run; the stages' for them.
        from_checkpoint: Take the run's newest checkpoint instead of its model, for example of a run that was stopped.
            There is then no saved model to keep the settings with; the report has them.

    Returns:
        The report.

    Raises:
        ValueError: If the model or the data cannot be read, the data has other classes than the model, the images to
            calibrate on were trained on, are reported on or do not exist, or the goal cannot be reached.
    """
    if time_batch_size is not None and time_batch_size < 1:
        raise ValueError(f"time_batch_size is {time_batch_size}; it must be a number of images, 1 or more.")
    if time_batch_size is not None and goal.macs_budget is not None:
        raise ValueError("macs_budget is a number of MACs, but the thresholds are to be chosen by time: give speedup.")
    if onnx is not None and time_batch_size is not None:
        raise ValueError("The times are those of PyTorch: exported stages are calibrated by MACs.")
    EarlyExitConfig((), rule, fallback=fallback)  # refuses unknown names before anything runs
    with opened_run(folder, from_checkpoint) as saved:
        model = from_pretrained(saved.model_folder)
        recipe, title = _choose_images(saved, model, data_path, split, overrides)
        data = _open(recipe)
        check_classes(saved.model_folder, data)
        if data_path is None:
            warn_of_other_data(saved, recipe, data)
        input_config = InputConfig.from_model(model.backbone, recipe.data)
        input_size = (input_config.channels, *input_config.image_size)
        loaders = evaluation_loaders(data, recipe, AugmentSection(), input_config, SkipList())
        assert loaders.validation is not None
        model = model.to(PartialState().device)
        macs = measure_path_macs(model, input_size)
        settings = EarlyExitConfig((math.inf,) * model.num_exits, rule, None, fallback, running_ensemble)
        collect: Collect = partial(collect_logits, model)
        if onnx is not None:
            collect = partial(collect_stage_logits, open_stages(onnx, model, settings))
        calibration = collect(loaders.validation, "calibrate")
        costs, measured = macs, None
        if time_batch_size is not None:
            measured = measure_stage_costs(model, settings, time_batch_size, input_size)
            costs = PathCosts.of_batch(measured, time_batch_size)
        choice = choose_settings(
            calibration, costs, goal, rule=rule, fallback=fallback, running_ensemble=running_ensemble
        )
        choice = replace(choice, config=replace(choice.config, costs=measured))
        evaluation = collect(loaders.eval, "evaluate")
        time: Timing | None = None
        if time_batch_size is not None:
            images = _some_images(data, recipe, input_config, images_to_time(time_batch_size))
            speedup = measure_speedup(model, choice.config, images, time_batch_size)
            device = device_name(PartialState().device)
            time = {"batch_size": time_batch_size, "device": device, "speedup": speedup, "num_images": len(images)}
        dataset = f"{data.name}, {recipe.data.eval_split}"
        report = build_calibration_report(
            choice,
            goal,
            macs,
            calibration,
            evaluation,
            {
                "dataset": dataset,
                "backbone": model.pretrained_cfg["architecture"],
                "recipe": saved.output.name,
                "seed": recipe.seed,
                "input_size": list(input_size),
            },
            calibration_dataset=f"{data.name}, {title}",
            exit_names=model.exit_names,
            baseline_top1=_baseline(saved.folder / "report.json", dataset, len(evaluation)),
            time=time,
        )
        if onnx is None:
            save_early_exit(saved.model_folder, choice.config)
        else:
            save_stage_settings(onnx, choice.config)
        place = saved.output if onnx is None else onnx
        write_calibration(report, place if output is None else output.expanduser())
    return report


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
        recipe, _ = _choose_images(saved, model, data_path, split, ())
        data = _open(recipe)
        input_config = InputConfig.from_model(model.backbone, recipe.data)
        assert data.validation is not None
        return _some_images(replace(data, eval=data.validation), recipe, input_config, count)


def _choose_images(
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


def _open(recipe: Recipe) -> ImageData:
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


def _some_images(data: ImageData, recipe: Recipe, input_config: InputConfig, count: int) -> Tensor:
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


def _baseline(path: Path, dataset: str, num_samples: int) -> float | None:
    """Return the accuracy of the run's baseline, if it was evaluated on the same images."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    if report["baseline"] is None or (report["dataset"], report["num_samples"]) != (dataset, num_samples):
        return None
    top1: float | None = report["baseline"]["top1"]
    return top1
