"""Evaluate every exit of a model, over a loader or from a saved folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from timm_selfdistill.data import open_dataset
from timm_selfdistill.data.decode import SkipList, merge_skipped
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.metrics import ExitMetrics, ExitMetricsResult
from timm_selfdistill.model import ExitOutput
from timm_selfdistill.recipe import AugmentSection
from timm_selfdistill.report import Report, build_report, write_report
from timm_selfdistill.train.from_checkpoint import opened_run
from timm_selfdistill.train.launch import fresh_accelerate
from timm_selfdistill.train.saved import SavedRun, check_classes, evaluation_loaders, warn_of_other_data


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
    """Compute the metrics of every exit and the ensemble.

    Args:
        model: A `SelfDistillModel`, compiled or not; left in eval mode.
        loader: Batches (images [B, C, H, W], targets [B]).
        accelerator: Places the batches, sets the precision and gathers the metrics.
        num_exits: Number K of exits to run; 0 runs the backbone alone.
        gather: Whether each process sees its own share of the data; else every process sees all of it.
        title: Shown by the progress bar.

    Returns:
        The metrics, the same on every process.
    """
    model.eval()
    metrics = ExitMetrics(num_exits + 1, accelerator if gather else None)
    for images, targets in tqdm(loader, desc=title, leave=False, disable=not accelerator.is_main_process):
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            out = model(images, return_exits=True) if num_exits else ExitOutput((model(images),), ())
        metrics.update(out, targets)
    return metrics.compute()


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
    with opened_run(folder, from_checkpoint) as saved, fresh_accelerate():
        return _evaluate(saved, data_path, overrides, None if output is None else output.expanduser())


def _evaluate(saved: SavedRun, data_path: str | None, overrides: Sequence[str], output: Path | None) -> Report:
    """Report every exit of a saved model."""
    model = from_pretrained(saved.model_folder)
    recipe = saved.evaluation_recipe(model, data_path, overrides)
    data = open_dataset(recipe.data, recipe.seed)
    check_classes(saved.model_folder, data)
    if data_path is None:
        warn_of_other_data(saved, recipe, data)
    input = InputConfig.from_model(model.backbone, recipe.data)
    loaders = evaluation_loaders(data, recipe, AugmentSection(), input, SkipList(output))
    accelerator = Accelerator(mixed_precision=recipe.precision)
    loader = loaders.eval if data.streaming else accelerator.prepare(loaders.eval)
    model = model.to(accelerator.device)
    metrics = evaluate_model(model, loader, accelerator, num_exits=model.num_exits, gather=not data.streaming)
    report = build_report(
        model,
        metrics,
        input_size=(input.channels, *input.image_size),
        baseline=None,
        dataset=f"{data.name}, {recipe.data.eval_split}",
        recipe=saved.folder.name,
        seed=recipe.seed,
    )
    if output is not None and accelerator.is_main_process:
        write_report(report, output)
        merge_skipped(output)
    return report
