"""Run a recipe: data, model, training, evaluation, report, saved model."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from timm_selfdistill.data import (
    SKIPPED,
    ImageData,
    InputConfig,
    Loaders,
    SkipList,
    build_loaders,
    build_mixup,
    merge_skipped,
    open_dataset,
)
from timm_selfdistill.files import replace_file
from timm_selfdistill.hub import CONFIG, HubError
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel, wrap
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.report import Report, build_report, format_table, write_report
from timm_selfdistill.task import check_loss
from timm_selfdistill.train.batch_norm import synchronize_batch_norm
from timm_selfdistill.train.evaluation import evaluate_model
from timm_selfdistill.train.feed import Feed
from timm_selfdistill.train.fit import Fit
from timm_selfdistill.train.launch import per_process_batch, start_accelerator
from timm_selfdistill.train.lock import locked
from timm_selfdistill.train.parallel import Replicated
from timm_selfdistill.train.phases import baseline_phases, label_smoothing, self_distillation_phases
from timm_selfdistill.train.publish import ModelWriter, Publisher
from timm_selfdistill.train.sharding import Sharded, asks_for_sharding, refuse_loss
from timm_selfdistill.train.stop import Interrupted, NonFiniteLossError, StopSignals

# What may differ between a run and its continuation: sections that do not change the numbers, and fields that change
# them only where the run would have stopped.
_FREE_SECTIONS = ("output_dir", "resume", "trackers", "checkpoint", "push_to_hub")
_FREE_FIELDS = ("data.on_error",)


def train(recipe: Recipe) -> Report:
    """Run a recipe to the end and write the run's folder.

    Args:
        recipe: The recipe; its `output_dir` is where everything goes.

    Returns:
        The report, which is also in `report.json`.

    Raises:
        ValueError: If the recipe, the launch or the data cannot work; raised before training starts.
        HubError: If the model is to be pushed and the Hub cannot be reached or does not let the token do this; raised
            before training starts, or when the run's folder is complete.
        Interrupted: If SIGTERM, SIGUSR1 or Ctrl-C stops it; the same call goes on.
        NonFiniteLossError: If the loss is NaN or infinite.
        OSError: If the disk is full when the last checkpoint or the results are written; the same call goes on.
    """
    if recipe.output_dir is None:
        raise ValueError("output_dir: must be a folder.")
    folder = Path(recipe.output_dir)
    with StopSignals() as signals:
        accelerator = start_accelerator(recipe, folder)
        with locked(folder) if accelerator.is_main_process else nullcontext():
            return _train(recipe, folder, accelerator, signals)


def _train(recipe: Recipe, folder: Path, accelerator: Accelerator, signals: StopSignals) -> Report:
    """Run a recipe in a folder that nobody else uses."""
    batch_size = per_process_batch(recipe, accelerator.num_processes)
    set_seed(recipe.seed)
    with accelerator.main_process_first():
        data = open_dataset(recipe.data, recipe.seed)
    networks = {"self-distilled": self_distillation_phases(recipe)}
    if recipe.baseline:
        networks = {"baseline": baseline_phases(recipe), **networks}
    _check_resume(recipe, networks)
    model = build_model(recipe, data)
    # One process has nothing to share.
    in_parts = asks_for_sharding() and accelerator.num_processes > 1
    for phase in chain.from_iterable(networks.values()):
        check_loss(model, phase.loss, phase.regime)
        if in_parts:
            refuse_loss(phase.loss)
    input = InputConfig.from_model(model.backbone, recipe.data)
    loaders = build_loaders(
        data,
        recipe.data,
        recipe.augment,
        input,
        batch_size=batch_size,
        accelerator_shards=(accelerator.process_index, accelerator.num_processes),
        seed=recipe.seed,
        accumulate=recipe.optimizer.accumulate,
        skipped=SkipList(folder, accelerator.process_index),
        device=accelerator.device,
    )
    feed, eval_loader = _prepare(loaders, data, recipe, accelerator, batch_size)
    writer = ModelWriter(recipe, data, input)
    publisher = None
    with accelerator.main_process_first():
        if recipe.push_to_hub is not None and accelerator.is_main_process:
            publisher = Publisher(recipe.push_to_hub, folder, writer)
        _claim(folder, recipe, is_main=accelerator.is_main_process)
    accelerator.init_trackers(folder.name, config=_flat(recipe))

    parallelism = Sharded(accelerator) if in_parts else Replicated(accelerator)
    results: dict[str, ExitMetricsResult] = {}
    seconds: dict[str, float] = {}
    for name, phases in networks.items():
        # Built anew from the same seed: every network starts from the same weights and sees the same images.
        set_seed(recipe.seed)
        network = build_model(recipe, data).to(accelerator.device)
        if recipe.sync_batchnorm and accelerator.num_processes > 1:
            network = synchronize_batch_norm(network)
        set_seed(recipe.seed, device_specific=True)
        on_epoch = None
        if recipe.push_to_hub is not None and recipe.push_to_hub.every is not None and name == "self-distilled":
            on_epoch = _push_nothing if publisher is None else publisher.after_epoch
        fit = Fit(name, network, phases, feed, recipe, parallelism, folder, signals, on_epoch)
        model = fit.run()
        seconds[name] = fit.progress.seconds
        num_exits = model.num_exits if name == "self-distilled" else 0
        results[name] = evaluate_model(
            model, eval_loader, accelerator, num_exits=num_exits, gather=not feed.streaming, title=f"evaluate {name}"
        )
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        skipped = merge_skipped(folder)
    report = build_report(
        model,
        results["self-distilled"],
        input_size=(input.channels, *input.image_size),
        baseline=results.get("baseline"),
        dataset=f"{data.name}, {recipe.data.eval_split}",
        recipe=folder.name,
        seed=recipe.seed,
        skipped=skipped,
        train_seconds=seconds,
    )
    if accelerator.is_main_process:
        write_report(report, folder)
        writer.save(model, folder / "model", report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if publisher is not None:
        publisher.finish()
    return report


def finished_report(recipe: Recipe) -> Report | None:
    """Return the report of a run that is complete, or None if it is still to be trained.

    Raises:
        ValueError: If the run's folder holds a run of another recipe, or a damaged report.
    """
    folder = Path(recipe.output_dir or ".")
    if (folder / "recipe.yaml").is_file():
        _check_same_recipe(folder, recipe)
    path = folder / "report.json"
    # The model is written last.
    if not path.is_file() or not (folder / "model" / CONFIG).is_file():
        return None
    try:
        report: Report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the run writes it again.") from error
    return report


def build_model(recipe: Recipe, data: ImageData) -> SelfDistillModel:
    """Build the recipe's wrapped model.

    Args:
        recipe: The recipe.
        data: The data set, which tells the number of classes where the recipe does not.

    Raises:
        ValueError: If timm cannot build the backbone, it cannot be wrapped, or it has fewer classes than the data.
    """
    section, exits = recipe.model, recipe.exits
    num_classes = section.num_classes or len(data.class_names)
    if num_classes < len(data.class_names):
        raise ValueError(
            f"model.num_classes: {num_classes} is less than the {len(data.class_names)} classes of {data.name}."
        )
    model = wrap(
        section.name,
        num_classes=num_classes,
        exits=exits.points,
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        hint_adapter=exits.hint_adapter,
        small_stem=section.small_stem,
        image_size=recipe.data.image_size,
        pretrained=section.pretrained,
        model_kwargs=section.kwargs,
    )
    if section.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the report; the exit status is 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.train", description="Train from a recipe.")
    add_arguments(parser)
    return run_command(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a training command."""
    parser.add_argument("recipe", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, such as optimizer.lr=0.05")


def run_command(arguments: argparse.Namespace) -> int:
    """Train as the parsed arguments say."""

    def run() -> None:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        report = train(recipe)
        if not PartialState().is_main_process:
            return
        print(format_table(report))
        listed = f", {SKIPPED}" if any(report["num_skipped"].values()) else ""
        print(f"\nWritten to {recipe.output_dir}: report.json, report.md, report.png, model/{listed}")
        if recipe.push_to_hub is not None:
            print(f"Pushed to {recipe.push_to_hub.repo}")

    return run_safely(run)


def run_safely(run: Callable[[], None]) -> int:
    """Run what trains; return the exit status, and say in one sentence what stopped it."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        run()
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_status
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Make room, and run the same command again to go on.", file=sys.stderr)
        return 1
    except (ValueError, HubError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(
            f"error: {error} Run the same command again to go on; fewer data.workers need less memory.", file=sys.stderr
        )
        return 1
    return 0


def _prepare(
    loaders: Loaders, data: ImageData, recipe: Recipe, accelerator: Accelerator, batch_size: int
) -> tuple[Feed, DataLoader[Any]]:
    """Shard the loaders over the processes where they are not sharded yet, and add the mixing of batches."""
    train, evaluation, validation = loaders.train, loaders.eval, loaders.validation
    if not data.streaming:
        train, evaluation = accelerator.prepare(train, evaluation)
        validation = None if validation is None else accelerator.prepare(validation)
    num_classes = recipe.model.num_classes or len(data.class_names)
    feed = Feed(
        train=train,
        validation=validation,
        steps_per_epoch=loaders.steps_per_epoch,
        mixup=build_mixup(recipe.augment, num_classes, label_smoothing(recipe.loss)),
        split=data.train,
        order=loaders.order,
        batch_size=batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    return feed, evaluation


def _check_resume(recipe: Recipe, networks: Collection[str]) -> None:
    """Refuse a checkpoint that is none of this run's networks'."""
    path = Path(recipe.resume)
    if recipe.resume in ("auto", "never") or (path.is_dir() and path.parent.name in networks):
        return
    raise ValueError(
        f"resume: {recipe.resume} is no checkpoint of this run; allowed are auto, never, or a folder "
        f"checkpoints/NAME/checkpoint-STEP with NAME {' or '.join(networks)}."
    )


def _claim(folder: Path, recipe: Recipe, *, is_main: bool) -> None:
    """Write the recipe to the run's folder, refusing to mix it with another run.

    Raises:
        ValueError: If the folder holds a run that this one does not continue.
    """
    path = folder / "recipe.yaml"
    if path.is_file():
        if recipe.resume == "never" and is_main:
            raise ValueError(
                f"{folder} already holds a run, and resume is never: choose another output_dir, or move it away."
            )
        _check_same_recipe(folder, recipe)
    if is_main:
        replace_file(path, recipe.to_yaml().encode())


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to mix a run with that of another recipe in its folder."""
    before, now = _flat(load_recipe(folder / "recipe.yaml")), _flat(recipe)
    changed = [
        f"{key} ({before.get(key)}, now {now.get(key)})"
        for key in sorted(before | now)
        if key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_FIELDS and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run of another recipe: {'; '.join(changed)}. Choose another output_dir, or move it away."
        )


def _push_nothing(model: SelfDistillModel, epoch: int, total: int) -> None:
    """What the other processes do after an epoch."""


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe under dotted keys, as trackers take hyperparameters."""
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        items = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": str(item) for name, item in items} or {key: str(value)}
    return flat
