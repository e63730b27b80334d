"""Calibrate the early exit of a saved model: choose by one split, report on another, keep the settings."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from timm_selfdistill.calibration.calibration_images import choose_images, open_images, some_images
from timm_selfdistill.calibration.calibration_page import write_calibration
from timm_selfdistill.calibration.calibration_report import CalibrationReport, Origin, Timing, build_calibration_report
from timm_selfdistill.calibration.choose_settings import Goal, choose_settings
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig, PathCosts, measure_path_macs, measure_stage_costs
from timm_selfdistill.exit_logits import ExitLogits, collect_logits
from timm_selfdistill.hub import from_pretrained, save_early_exit
from timm_selfdistill.measure import seconds_of
from timm_selfdistill.model import Ensemble, SelfDistillModel
from timm_selfdistill.onnx import OnnxEarlyExit
from timm_selfdistill.output import progress_bar, replace_file
from timm_selfdistill.recipe import AugmentSection
from timm_selfdistill.report import device_name
from timm_selfdistill.staged import MANIFEST
from timm_selfdistill.train.saved_run import check_data, evaluation_loaders, opened_run

# Settings that are part of the graphs of exported stages.
_IN_GRAPHS: Final = ("rule", "fallback", "running_ensemble")
_MIN_IMAGES: Final = 128
_MIN_BATCHES: Final = 4
_SPEEDUP_ROUNDS: Final = 3


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
    if time_batch_size is not None:
        _check_timing(time_batch_size, goal, onnx)
    EarlyExitConfig((), rule, fallback=fallback)  # refuses unknown names before anything runs
    with opened_run(folder, from_checkpoint) as saved:
        model = from_pretrained(saved.model_folder)
        recipe, title = choose_images(saved, model, data_path, split, overrides)
        data = open_images(recipe)
        check_data(saved, recipe, data, is_own=data_path is None)
        input_config = InputConfig.from_model(model.backbone, recipe.data)
        input_size = (input_config.channels, *input_config.image_size)
        loaders = evaluation_loaders(data, recipe, AugmentSection(), input_config, SkipList())
        assert loaders.validation is not None
        model = model.to(PartialState().device)
        macs = measure_path_macs(model, input_size)
        settings = EarlyExitConfig((math.inf,) * model.num_exits, rule, None, fallback, running_ensemble)
        collect: Callable[[Iterable[tuple[Tensor, Tensor]], str], ExitLogits] = partial(collect_logits, model)
        if onnx is not None:
            collect = partial(_collect_stage_logits, _open_stages(onnx, model, settings))
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
        time = None
        if time_batch_size is not None:
            images = some_images(data, recipe, input_config, images_to_time(time_batch_size))
            time = _time(model, choice.config, images, time_batch_size)
        dataset = f"{data.name}, {recipe.data.eval_split}"
        origin: Origin = {
            "dataset": dataset,
            "backbone": model.pretrained_cfg["architecture"],
            "recipe": saved.output.name,
            "seed": recipe.seed,
            "input_size": list(input_size),
        }
        report = build_calibration_report(
            choice,
            goal,
            macs,
            calibration,
            evaluation,
            origin,
            calibration_dataset=f"{data.name}, {title}",
            exit_names=model.exit_names,
            baseline_top1=_baseline(saved.folder / "report.json", dataset, len(evaluation)),
            time=time,
        )
        if onnx is None:
            save_early_exit(saved.model_folder, choice.config)
        else:
            _save_stage_settings(onnx, choice.config)
        place = saved.output if onnx is None else onnx
        write_calibration(report, place if output is None else output.expanduser())
    return report


def _check_timing(batch_size: int, goal: Goal, onnx: Path | None) -> None:
    """Refuse to choose by time where that has no meaning."""
    if batch_size < 1:
        raise ValueError(f"time_batch_size is {batch_size}; it must be a number of images, 1 or more.")
    if goal.macs_budget is not None:
        raise ValueError("macs_budget is a number of MACs, but the thresholds are to be chosen by time: give speedup.")
    if onnx is not None:
        raise ValueError("The times are those of PyTorch: exported stages are calibrated by MACs.")


def _time(model: SelfDistillModel, config: EarlyExitConfig, images: Tensor, batch_size: int) -> Timing:
    """Time early exit beside the plain backbone, on images [N, C, H, W]."""
    speedup = measure_speedup(model, config, images, batch_size)
    device = device_name(PartialState().device)
    return {"batch_size": batch_size, "device": device, "speedup": speedup, "num_images": len(images)}


def images_to_time(batch_size: int) -> int:
    """Return how many images `measure_speedup` needs for batches of this size."""
    return max(_MIN_IMAGES, _MIN_BATCHES * batch_size)


@torch.no_grad()
def measure_speedup(model: SelfDistillModel, config: EarlyExitConfig, images: Tensor, batch_size: int) -> float:
    """Return the time of the plain backbone over that with early exit: the median of three rounds over images
    [N, C, H, W], batch by batch in turns.

    Images fewer than a batch are repeated; those that do not fill a batch are left out.
    """
    images = images.repeat(-(-batch_size // len(images)), 1, 1, 1).to(next(model.parameters()))
    batches = [batch for batch in torch.split(images, batch_size) if len(batch) == batch_size]
    ways = (model, EarlyExit.from_config(model, config))
    for way in ways:
        way(batches[0])
    ratios = []
    for _ in range(_SPEEDUP_ROUNDS):
        turns = [[seconds_of(partial(way, batch), batch.device) for way in ways] for batch in batches]
        plain, early = map(sum, zip(*turns, strict=True))
        ratios.append(plain / early)
    return statistics.median(ratios)


def _baseline(path: Path, dataset: str, num_samples: int) -> float | None:
    """Return the accuracy of the run's baseline, if it was evaluated on the same images."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    if report["baseline"] is None or (report["dataset"], report["num_samples"]) != (dataset, num_samples):
        return None
    top1: float | None = report["baseline"]["top1"]
    return top1


def _open_stages(folder: Path, model: SelfDistillModel, settings: EarlyExitConfig) -> OnnxEarlyExit:
    """Open exported stages; ValueError unless they are of the model, and decide and answer as the settings say."""
    stages = OnnxEarlyExit(folder)
    said = stages.manifest
    if said["exit_names"] != list(model.exit_names) or said["num_classes"] != model.num_classes:
        raise ValueError(
            f"{folder} has the exits {', '.join(map(str, said['exit_names']))} and {said['num_classes']} classes; the "
            f"model has {', '.join(model.exit_names)} and {model.num_classes}: export it again."
        )
    for name in _IN_GRAPHS:
        if said["early_exit"].get(name) != getattr(settings, name):
            raise ValueError(
                f"{folder} was exported with {name} {said['early_exit'].get(name)!r:.100}, which is part of its "
                f"graphs; {getattr(settings, name)!r} was asked for: give that, or export it again."
            )
    return stages


def _collect_stage_logits(stages: OnnxEarlyExit, loader: Iterable[tuple[Tensor, Tensor]], title: str) -> ExitLogits:
    """Run stages over a split once; arguments and errors are those of `collect_logits`."""
    ensemble = Ensemble.from_json(stages.manifest["ensemble"])  # which the graphs hold
    found, targets = [], []
    for images, labels in progress_bar(loader, title=title):
        found.append(torch.from_numpy(stages.every_exit(images.numpy().astype(np.float32), own=True)))
        targets.append(labels)
    if not found:
        raise ValueError("There are no images to calibrate on.")
    return ExitLogits.of_labelled(torch.cat(found, 1), torch.cat(targets), ensemble)


def _save_stage_settings(folder: Path, config: EarlyExitConfig) -> None:
    """Keep early-exit settings in the manifest of stages."""
    content = json.loads((folder / MANIFEST).read_bytes())
    content["early_exit"] = config.to_json()
    replace_file(folder / MANIFEST, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
