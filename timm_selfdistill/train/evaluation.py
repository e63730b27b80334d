"""Evaluate every exit of a model: over a loader, from a saved folder, or of a run that was stopped."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import SkipList, merge_skipped
from timm_selfdistill.data.survey import fingerprint
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.exit_logits import collect_logits, fit_ensemble
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.metrics import ExitMetrics, ExitMetricsResult
from timm_selfdistill.model import ExitOutput, SelfDistillModel
from timm_selfdistill.output import locked, progress_bar
from timm_selfdistill.recipe import AugmentSection, Recipe
from timm_selfdistill.report import Report, build_report, write_report
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import unwrapped_model
from timm_selfdistill.train.launch import fresh_accelerate, make_accelerator
from timm_selfdistill.train.publish import ModelWriter
from timm_selfdistill.train.run_folder import CHECKPOINTS, MODEL, check_folder, read_record
from timm_selfdistill.train.saved_run import (
    CheckpointModel,
    check_data,
    evaluation_loaders,
    load_newest,
    opened_run,
)

_logger = logging.getLogger(__name__)

_MOST_IMAGES: Final = 5_000  # more change little, and their logits take memory and time


@torch.no_grad()
def evaluate_model(
    model: torch.nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    num_exits: int,
    gather: bool = True,
    title: str = "evaluate",
) -> ExitMetricsResult:
    """Compute the metrics of every exit, of their mean and, where there is one, of the fitted ensemble.

    Args:
        model: A `SelfDistillModel`, compiled or not; left in eval mode.
        loader: Batches (images [B, C, H, W], targets [B]).
        accelerator: Places the batches, sets the precision and gathers the metrics.
        num_exits: Number K of exits to run; 0 runs the backbone alone.
        gather: Whether each process sees its own share of the data; otherwise every process sees all of it.
        title: Shown by the progress bar.

    Returns:
        The metrics, the same on every process.
    """
    model.eval()
    ensemble = unwrapped_model(model).ensemble if num_exits else None
    metrics = ExitMetrics(num_exits + 1, accelerator if gather else None, ensemble)
    for images, targets in progress_bar(loader, title=title, show=accelerator.is_main_process):
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            out = model(images, return_exits=True) if num_exits else ExitOutput((model(images),), ())
        metrics.update(out, targets)
    return metrics.compute()


def fit_held_out(
    model: SelfDistillModel, loader: Iterable[tuple[Tensor, Tensor]] | None, accelerator: Accelerator, *, gather: bool
) -> None:
    """Fit the ensemble of a trained model on the images that its run held out, if it did; it stays the mean otherwise.

    Its `ensemble` is set, and it is left in eval mode. The other arguments are those of `evaluate_model`.
    """
    if loader is None:
        return
    title = "fit the ensemble" if accelerator.is_main_process else None
    try:
        found = collect_logits(model, loader, title, accelerator=accelerator, gather=gather, most=_MOST_IMAGES)
        fit_ensemble(model, logits=found.logits, target=found.targets)
    except ValueError as error:  # of images that cannot be decoded, or logits that are not finite
        _logger.warning("The ensemble is not fitted, and stays the mean: %s", error)


def evaluate_folder(
    folder: Path,
    data_path: str | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    *,
    from_checkpoint: bool = False,
) -> Report:
    """Report every exit of a saved model on a data set.

    Args:
        folder: A run's folder, or the model folder in it.
        data_path: Hub name or path of the data set; the run's own data by default. Of another data set only the split
            `eval_split` is read.
        overrides: Fields of the recipe's data section, as "key=value".
        output: Folder for the report's files and the list of skipped images; none are written by default.
        from_checkpoint: Take the run's newest checkpoint instead of its model, such as of a run that was stopped.

    Returns:
        The report.

    Raises:
        ValueError: If the model or the data cannot be read, or the data has other classes than the model.
    """
    output = None if output is None else output.expanduser()
    with opened_run(folder, from_checkpoint) as saved, fresh_accelerate():
        model = from_pretrained(saved.model_folder)
        recipe = saved.evaluation_recipe(model, data_path, overrides)
        data = open_dataset(recipe.data, recipe.seed)
        check_data(saved, recipe, data, is_own=data_path is None)
        evaluation = _Evaluation(model, data, recipe, output)
        metrics = evaluation.measure(model)
        report = report_run(model, metrics, recipe, data, evaluation.input_config, saved.folder.name)
        if output is not None and evaluation.accelerator.is_main_process:
            write_report(report, output)
            merge_skipped(output)
        return report


def finish_folder(folder: Path) -> Report:
    """Evaluate what a run has trained so far, and write its report and its model as if it had ended there.

    The checkpoints stay, so that the run can still go on. The report says after how many epochs it was stopped.

    Raises:
        ValueError: If there is no checkpoint that can be used, another process writes to the folder, or the data
            cannot be read or is no longer the run's.
        OSError: If the disk is full.
    """
    folder = folder.expanduser()
    if not (folder / CHECKPOINTS).is_dir():
        raise ValueError(f"{folder} is not a run's folder with checkpoints.")
    check_folder(folder)
    with StopSignals(), fresh_accelerate(), locked(folder):
        return _finish(folder, load_newest(folder))


def _finish(folder: Path, found: CheckpointModel) -> Report:
    recipe, record = found.recipe, found.record
    data = open_dataset(recipe.data, recipe.seed)
    if changes := record.data.changes(fingerprint(data, recipe.data)):
        raise ValueError(
            f"{folder} holds a run of other data: {'; '.join(changes)}. Images that were trained on could be reported "
            "on: restore the data."
        )
    evaluation = _Evaluation(found.model, data, recipe, folder)
    input_config = evaluation.input_config
    seconds, baseline = {}, None
    baseline_record = read_record(folder / CHECKPOINTS / "baseline") if recipe.baseline else None
    # One that was trained for longer or shorter is none to compare with.
    if baseline_record is not None and baseline_record.epochs_done == record.epochs_done:
        plain = load_newest(folder, "baseline")
        seconds["baseline"] = plain.seconds
        baseline = evaluation.measure(plain.model, exits=False)
    evaluation.fit(found.model)
    metrics = evaluation.measure(found.model)
    stopped = f"stopped after step {found.step}, {record.epochs_done} of {record.epochs} epochs"
    name = folder.name if record.is_finished else f"{folder.name} ({stopped})"
    seconds["self-distilled"] = found.seconds
    more = {"baseline": baseline, "skipped": merge_skipped(folder), "train_seconds": seconds}
    report = report_run(found.model, metrics, recipe, data, input_config, name, **more)
    write_report(report, folder)
    note = "" if record.is_finished else f"\nThe training was {stopped}.\n"
    epochs = record.epochs_done, record.epochs
    ModelWriter(recipe, data, input_config).save(found.model, folder / MODEL, report, note, epochs)
    return report


def report_run(
    model: SelfDistillModel,
    metrics: ExitMetricsResult,
    recipe: Recipe,
    data: ImageData,
    input_config: InputConfig,
    name: str,
    **more: Any,
) -> Report:
    """Build the report of a run of this name; `more` goes to `build_report`."""
    return build_report(
        model,
        metrics,
        input_size=(input_config.channels, *input_config.image_size),
        dataset=f"{data.name}, {recipe.data.eval_split}",
        recipe=name,
        seed=recipe.seed,
        **{"baseline": None, **more},
    )


class _Evaluation:
    """Measures saved networks on a recipe's data, in one process; skipped images are listed in `output`."""

    def __init__(self, model: SelfDistillModel, data: ImageData, recipe: Recipe, output: Path | None) -> None:
        self.input_config = InputConfig.from_model(model.backbone, recipe.data)
        loaders = evaluation_loaders(data, recipe, AugmentSection(), self.input_config, SkipList(output))
        self.accelerator = make_accelerator(recipe.precision)
        self.gather = not data.streaming
        self.loader: DataLoader[Any] = self._prepared(loaders.eval)
        self.held_out = None if loaders.validation is None else self._prepared(loaders.validation)

    def measure(self, model: SelfDistillModel, *, exits: bool = True) -> ExitMetricsResult:
        """Return the metrics of a network, of its backbone alone without `exits`."""
        model = model.to(self.accelerator.device)
        num_exits = model.num_exits if exits else 0
        return evaluate_model(model, self.loader, self.accelerator, num_exits=num_exits, gather=self.gather)

    def fit(self, model: SelfDistillModel) -> None:
        """Fit the ensemble of a network of the recipe's run."""
        fit_held_out(model.to(self.accelerator.device), self.held_out, self.accelerator, gather=self.gather)

    def _prepared(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        prepared: DataLoader[Any] = self.accelerator.prepare(loader) if self.gather else loader
        return prepared
