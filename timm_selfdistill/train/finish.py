"""Make the report and the model of a run that was stopped, from its newest checkpoint."""

from pathlib import Path

from accelerate import Accelerator

from timm_selfdistill.data import InputConfig, SkipList, merge_skipped, open_dataset
from timm_selfdistill.data.fingerprint import fingerprint
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.recipe import AugmentSection
from timm_selfdistill.report import Report, build_report, write_report
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.train.evaluation import evaluate_model
from timm_selfdistill.train.from_checkpoint import CheckpointModel, load_newest
from timm_selfdistill.train.launch import fresh_accelerate
from timm_selfdistill.train.lock import locked
from timm_selfdistill.train.publish import ModelWriter
from timm_selfdistill.train.run_folder import CHECKPOINTS, MODEL, check_folder
from timm_selfdistill.train.run_record import read_record
from timm_selfdistill.train.saved import evaluation_loaders


def finish_folder(folder: Path) -> Report:
    """Evaluate what a run has trained so far, and write its report and its model as if it had ended there.

    The checkpoints stay, so that the run can still go on.

    Args:
        folder: The run's folder.

    Returns:
        The report, which says after how many epochs the run was stopped.

    Raises:
        ValueError: If there is no checkpoint that can be used, another process writes to the folder, or the data
            cannot be read or is no longer the run's.
        OSError: If the disk is full.
    """
    folder = folder.expanduser()
    if not (folder / CHECKPOINTS).is_dir():
        raise ValueError(f"{folder} is no run's folder with checkpoints.")
    check_folder(folder)
    with StopSignals(), fresh_accelerate(), locked(folder):
        return _finish(folder, load_newest(folder))


def _finish(folder: Path, found: CheckpointModel) -> Report:
    """Write report and model of a run in a folder that nobody else uses."""
    recipe, record = found.recipe, found.record
    data = open_dataset(recipe.data, recipe.seed)
    if changes := record.data.changes(fingerprint(data, recipe.data)):
        raise ValueError(
            f"{folder} holds a run of other data: {'; '.join(changes)}. Images that were trained on could be reported "
            "on: put the data back as it was."
        )
    input = InputConfig.from_model(found.model.backbone, recipe.data)
    loaders = evaluation_loaders(data, recipe, AugmentSection(), input, SkipList(folder))
    accelerator = Accelerator(mixed_precision=recipe.precision)
    loader = loaders.eval if data.streaming else accelerator.prepare(loaders.eval)

    def evaluate(trained: CheckpointModel, num_exits: int) -> ExitMetricsResult:
        model = trained.model.to(accelerator.device)
        return evaluate_model(model, loader, accelerator, num_exits=num_exits, gather=not data.streaming)

    seconds, baseline = {}, None
    beside = read_record(folder / CHECKPOINTS / "baseline") if recipe.baseline else None
    # One that was trained for longer or shorter is none to compare with.
    if beside is not None and beside.epochs_done == record.epochs_done:
        plain = load_newest(folder, "baseline")
        seconds["baseline"] = plain.seconds
        baseline = evaluate(plain, 0)
    metrics = evaluate(found, found.model.num_exits)
    stopped = f"stopped after step {found.step}, {record.epochs_done} of {record.epochs} epochs"
    report = build_report(
        found.model,
        metrics,
        input_size=(input.channels, *input.image_size),
        baseline=baseline,
        dataset=f"{data.name}, {recipe.data.eval_split}",
        recipe=folder.name if record.is_finished else f"{folder.name} ({stopped})",
        seed=recipe.seed,
        skipped=merge_skipped(folder),
        train_seconds=seconds | {"self-distilled": found.seconds},
    )
    write_report(report, folder)
    note = "" if record.is_finished else f"\nThe training was {stopped}.\n"
    epochs = record.epochs_done, record.epochs
    ModelWriter(recipe, data, input).save(found.model, folder / MODEL, report, note, epochs)
    return report
