"""Evaluate every exit of a model, over a loader or from a saved folder."""

import json
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from timm_selfdistill.data import ImageData, InputConfig, SkipList, build_loaders, merge_skipped, open_dataset
from timm_selfdistill.hub import CONFIG, from_pretrained
from timm_selfdistill.metrics import ExitMetrics, ExitMetricsResult
from timm_selfdistill.model import ExitOutput, SelfDistillModel
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.report import Report, build_report, write_report

_BATCH_SIZE = 128


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
    folder: Path, data_path: str | None = None, overrides: Sequence[str] = (), output: Path | None = None
) -> Report:
    """Report every exit of a saved model on a data set.

    Args:
        folder: A run's folder, or the model folder in it.
        data_path: Hub name or path of the data set; the run's own data by default. Of another data set only the split
            `eval_split` is read.
        overrides: Fields of the recipe's data section, as "key=value".
        output: Folder for the report's files and the list of skipped images; none are written by default.

    Returns:
        The report.

    Raises:
        ValueError: If the model or the data cannot be read, or the data has other classes than the model.
    """
    run = folder if (folder / "model").is_dir() else folder.parent
    model_folder = run / "model" if run == folder else folder
    model = from_pretrained(model_folder)
    recipe = _recipe(run, model, data_path, overrides)
    data = open_dataset(recipe.data, recipe.seed)
    check_classes(model_folder, data)
    input = InputConfig.from_model(model.backbone, recipe.data)
    loaders = build_loaders(
        data,
        recipe.data,
        recipe.augment,
        input,
        batch_size=min(_BATCH_SIZE, len(data.train)) if isinstance(data.train, Sized) else _BATCH_SIZE,
        accelerator_shards=(0, 1),
        seed=recipe.seed,
        skipped=SkipList(output),
    )
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
        recipe=run.name,
        seed=recipe.seed,
    )
    if output is not None and accelerator.is_main_process:
        write_report(report, output)
        merge_skipped(output)
    return report


def _recipe(run: Path, model: SelfDistillModel, data_path: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the run's recipe, or one for another data set, with the overrides of its data section."""
    changes = [f"data.{override}" for override in overrides]
    saved = run / "recipe.yaml"
    if data_path is None:
        if not saved.is_file():
            raise ValueError(f"There is no {saved}, so the data set must be named with --data.")
        return load_recipe(saved, changes)
    precision = load_recipe(saved).precision if saved.is_file() else "no"
    # Nothing is trained, so the data set needs no other split: the evaluated one stands for it.
    data = {"path": data_path, "train_split": "none"}
    name = type(model.backbone).__name__
    recipe = load_recipe({"model": {"name": name}, "data": data, "precision": precision}, changes)
    only = {"train_split": recipe.data.eval_split, "validation": 0.0, "max_train": recipe.data.max_eval}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=only)})


def check_classes(folder: Path, data: ImageData) -> None:
    """Refuse a data set whose classes are not those the model was trained on, in its order."""
    names = json.loads((folder / CONFIG).read_text()).get("label_names")
    if names is not None and names != list(data.class_names):
        names = list(map(str, names)) if isinstance(names, list) else [str(names)]
        raise ValueError(
            f"{data.name} has {len(data.class_names)} classes ({', '.join(data.class_names[:5])}, ...), the model in "
            f"{folder} was trained on {len(names)} ({', '.join(names[:5])}, ...): "
            "they must be the same, in the same order."
        )
