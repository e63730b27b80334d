"""Run a recipe: data, model, training, evaluation, report, saved model; and the command `train`."""

import argparse
import atexit
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from timm_selfdistill.data import ImageData, open_dataset
from timm_selfdistill.data.decode import SKIPPED, SkipList, merge_skipped
from timm_selfdistill.data.loaders import build_loaders
from timm_selfdistill.data.survey import fingerprint
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.escape import printable
from timm_selfdistill.measure import Stopwatch
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.output import locked, replace_file, tell
from timm_selfdistill.program import is_lost_process, run_program
from timm_selfdistill.recipe import LOCAL, RECIPE, Recipe, RecipeError, dump_local, load_recipe
from timm_selfdistill.report import Report, format_table, write_report
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import check_loss
from timm_selfdistill.train.builders import (
    Phase,
    baseline_phases,
    build_model,
    check_one_image,
    self_distillation_phases,
    synchronize_batch_norm,
    with_balanced_classes,
)
from timm_selfdistill.train.evaluation import evaluate_model, fit_held_out, report_run
from timm_selfdistill.train.launch import (
    asks_for_sharding,
    build_feed,
    fresh_accelerate,
    per_process_batch,
    start_accelerator,
)
from timm_selfdistill.train.parallelism import Replicated, Sharded
from timm_selfdistill.train.publish import ModelWriter, Publisher
from timm_selfdistill.train.refusals import all_problems, recipe_problems, refuse_loss
from timm_selfdistill.train.run_folder import MODEL, RunRecord, check_folder, check_run, remove_leftovers
from timm_selfdistill.train.saved_run import as_begun
from timm_selfdistill.train.steps import RunContext
from timm_selfdistill.train.tracking import header, start_trackers, track_report
from timm_selfdistill.train.trainer import Trainer

_logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> Report:
    """Run a recipe to the end and write the run's folder.

    Args:
        recipe: The recipe; its `output_dir` is where everything goes.

    Returns:
        The report, which is also in `report.json`.

    Raises:
        ValueError: If the recipe, the launch or the data cannot work, or if `output_dir` holds what this run would not
            continue, such as a run of other data; raised before training starts, and before anything is written.
        HubError: If the model is to be pushed and the Hub cannot be reached or does not let the token do this; raised
            before training starts, or when the run's folder is complete.
        Interrupted: If SIGTERM, SIGUSR1 or Ctrl-C stops it; the same call goes on.
        NonFiniteLossError: If the loss is NaN or infinite.
        OSError: If the disk is full when a signal stops it or the results are written; the same call goes on.
    """
    if recipe.output_dir is None:
        raise ValueError("output_dir: must be a folder.")
    if problems := recipe_problems(recipe.model_dump()):
        raise RecipeError(recipe.output_dir, problems)
    folder = Path(recipe.output_dir)
    clock = Stopwatch()
    recipe = as_begun(recipe)
    with StopSignals() as signals, _stopped_with_others(signals), fresh_accelerate():
        accelerator = start_accelerator(recipe, folder)
        if accelerator.is_main_process:
            check_folder(folder)
        with locked(folder) if accelerator.is_main_process else nullcontext():
            with clock.phase("preparation"):
                run = _prepare(recipe, folder, accelerator, signals)
            trained = _train_networks(run, clock)
            with clock.phase("report"):
                report = _finish(run, *trained)
        if accelerator.is_main_process:
            _logger.info("Time: %s.", clock)
        return report


@contextmanager
def _stopped_with_others(signals: StopSignals) -> Iterator[None]:
    """Take a lost process for the stop that it is, if this process was told to stop too.

    One that takes no step stops at once. Another one may have begun a step by then, which can no longer end.
    """
    try:
        yield
    except RuntimeError as error:
        if signals.received is None or not is_lost_process(error):
            raise
        raise signals.interruption() from error


@dataclass(frozen=True)
class _Run:
    """A run that is ready to train."""

    context: RunContext
    data: ImageData
    networks: Mapping[str, Sequence[Phase]]
    input_config: InputConfig
    eval_loader: DataLoader[Any]
    writer: ModelWriter
    publisher: Publisher | None


def _prepare(recipe: Recipe, folder: Path, accelerator: Accelerator, signals: StopSignals) -> _Run:
    """Open the data, refuse what cannot work, and then write the recipe to the folder."""
    batch_size = per_process_batch(recipe, accelerator.num_processes)
    set_seed(recipe.seed)
    with accelerator.main_process_first():
        networks = {"self-distilled": self_distillation_phases(recipe)}
    with accelerator.main_process_first():
        data = open_dataset(recipe.data, recipe.seed)
    if recipe.baseline:
        networks = {"baseline": baseline_phases(recipe), **networks}
    record = RunRecord(recipe.without_local_paths(), fingerprint(data, recipe.data))
    with accelerator.main_process_first():
        check_run(folder, recipe, record.data, networks)
        if accelerator.is_main_process:
            remove_leftovers(folder)
    model = build_model(recipe, data.class_names, data.name, tell=accelerator.is_main_process)
    if recipe.loss.class_weights == "balanced":
        networks = {
            name: with_balanced_classes(phases, data.train, model.num_classes) for name, phases in networks.items()
        }
    # One process has nothing to share.
    in_parts = asks_for_sharding() and accelerator.num_processes > 1
    input_config = InputConfig.from_model(model.backbone, recipe.data)
    phases = list(chain.from_iterable(networks.values()))
    _check_phases(phases, model, data, input_config, in_parts)
    check_one_image(model, input_config, phases, recipe, accelerator.num_processes)
    loaders = build_loaders(
        data,
        recipe.data,
        recipe.augment,
        input_config,
        batch_size=batch_size,
        accelerator_shards=(accelerator.process_index, accelerator.num_processes),
        seed=recipe.seed,
        accumulate=recipe.optimizer.accumulate,
        skipped=SkipList(folder, accelerator.process_index),
        device=accelerator.device,
    )
    feed, eval_loader = build_feed(loaders, data, recipe, accelerator, batch_size)
    writer = ModelWriter(recipe, data, input_config)
    publisher = None
    with accelerator.main_process_first():
        if recipe.push_to_hub is not None and accelerator.is_main_process:
            publisher = Publisher(recipe.push_to_hub, folder, writer)
        if accelerator.is_main_process:
            _write_recipe(folder, recipe)
    start_trackers(accelerator, recipe, folder)
    if accelerator.is_main_process:
        for line in header(model, data, recipe, accelerator, list(networks), input_config, feed.steps_per_epoch):
            tell(line)
    parallelism = Sharded(accelerator) if in_parts else Replicated(accelerator)
    context = RunContext(recipe, folder, record, feed, parallelism, signals)
    return _Run(context, data, networks, input_config, eval_loader, writer, publisher)


def _check_phases(
    phases: Sequence[Phase], model: SelfDistillModel, data: ImageData, input_config: InputConfig, in_parts: bool
) -> None:
    """Refuse losses and outside teachers that do not fit the model, the data or a network in parts."""
    for phase in phases:
        check_loss(model, phase.loss, phase.regime)
        if in_parts:
            refuse_loss(phase.loss)
        if phase.teacher is not None:
            phase.teacher.expect(input_config.mean, input_config.std)
            phase.teacher.check_classes(model.num_classes, data.class_names)


def _train_networks(
    run: _Run, clock: Stopwatch
) -> tuple[SelfDistillModel, dict[str, ExitMetricsResult], dict[str, float], int]:
    """Train and evaluate every network, the self-distilled one last; return it, metrics and seconds by name, steps."""
    context, recipe, accelerator = run.context, run.context.recipe, run.context.accelerator
    results: dict[str, ExitMetricsResult] = {}
    seconds: dict[str, float] = {}
    first_step = 0
    for name, phases in run.networks.items():
        # Built again from the same seed: every network starts from the same weights and sees the same images.
        set_seed(recipe.seed)
        model = build_model(recipe, run.data.class_names, run.data.name).to(accelerator.device)
        if recipe.sync_batchnorm and accelerator.num_processes > 1:
            model = synchronize_batch_norm(model)
        set_seed(recipe.seed, device_specific=True)
        is_distilled = name == "self-distilled"
        push = recipe.push_to_hub if is_distilled else None
        on_epoch = None
        if push is not None and push.every is not None:
            # The other processes push nothing, but help to gather a network in parts.
            on_epoch = (lambda *_: None) if run.publisher is None else run.publisher.after_epoch
        trainer = Trainer(context, name, model, phases, on_epoch, first_step)
        first_step += trainer.total_epochs * trainer.updates_per_epoch
        with clock.phase("training"):
            model = trainer.run()
        seconds[name] = trainer.progress.seconds
        gather = not context.feed.streaming
        with clock.phase("evaluation"):
            if is_distilled:
                fit_held_out(model, context.feed.validation, accelerator, gather=gather)
            results[name] = evaluate_model(
                model,
                run.eval_loader,
                accelerator,
                num_exits=model.num_exits if is_distilled else 0,
                gather=gather,
                title=f"evaluate {name}",
            )
    return model, results, seconds, first_step


def _finish(
    run: _Run,
    model: SelfDistillModel,
    results: Mapping[str, ExitMetricsResult],
    seconds: Mapping[str, float],
    steps: int,
) -> Report:
    """Write the report and the model, and push them if asked."""
    accelerator, folder, recipe = run.context.accelerator, run.context.folder, run.context.recipe
    accelerator.wait_for_everyone()
    with accelerator.main_process_first():
        more = {"skipped": merge_skipped(folder), "baseline": results.get("baseline"), "train_seconds": seconds}
    metrics = results["self-distilled"]
    report = report_run(model, metrics, recipe, run.data, run.input_config, folder.name, **more)
    if accelerator.is_main_process:
        write_report(report, folder)
        run.writer.save(model, folder / MODEL, report)
        track_report(accelerator.trackers, report, folder, steps)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    # Not before: a comparison trains several runs in the same processes.
    atexit.register(accelerator.state.destroy_process_group)
    if run.publisher is not None:
        run.publisher.finish()
    return report


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe to the run's folder: one that may be shared, and beside it the paths of this machine."""
    # First what shows that the folder is a run's.
    replace_file(folder / LOCAL, dump_local(recipe).encode())
    replace_file(folder / RECIPE, recipe.without_local_paths().to_yaml().encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` and print the report; the exit status is 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="timm_selfdistill.train", description="Train from a recipe.")
    add_arguments(parser)
    parser.set_defaults(run=_train_and_print)
    return run_program(parser, arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path of a recipe, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, such as optimizer.lr=0.05")


def _train_and_print(recipe: str, overrides: Sequence[str]) -> None:
    loaded = load_recipe(recipe, overrides, check=all_problems)
    report = train(loaded)
    if not PartialState().is_main_process:
        return
    print(format_table(report))
    listed = f", {SKIPPED}" if any(report["num_skipped"].values()) else ""
    print(f"\nWritten to {printable(loaded.output_dir)}: report.json, report.md, report.png, model/{listed}")
    if loaded.push_to_hub is not None:
        print(f"Pushed to {loaded.push_to_hub.repo}")


COMMANDS: Final = {"train": (add_arguments, _train_and_print)}
