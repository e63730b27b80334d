"""Run a recipe: data, model, training, evaluation, report, saved model."""

import atexit
import logging
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from timm_selfdistill.data import (
    ImageData,
    InputConfig,
    Loaders,
    SkipList,
    build_loaders,
    build_mixup,
    merge_skipped,
    open_dataset,
)
from timm_selfdistill.data.fingerprint import fingerprint
from timm_selfdistill.metrics import ExitMetricsResult
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.report import Report, build_report, write_report
from timm_selfdistill.stop import StopSignals
from timm_selfdistill.task import check_loss
from timm_selfdistill.train.batch_norm import check_one_image, synchronize_batch_norm
from timm_selfdistill.train.build import build_model
from timm_selfdistill.train.evaluation import evaluate_model
from timm_selfdistill.train.feed import Feed
from timm_selfdistill.train.fit import Fit
from timm_selfdistill.train.launch import fresh_accelerate, per_process_batch, start_accelerator
from timm_selfdistill.train.lock import locked
from timm_selfdistill.train.parallel import Replicated
from timm_selfdistill.train.phases import baseline_phases, label_smoothing, self_distillation_phases
from timm_selfdistill.train.publish import ModelWriter, Publisher
from timm_selfdistill.train.run_folder import MODEL, check_folder, check_run, remove_leftovers, write_recipe
from timm_selfdistill.train.run_record import RunRecord, flat
from timm_selfdistill.train.sharding import Sharded, asks_for_sharding, refuse_loss

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
    folder = Path(recipe.output_dir)
    with StopSignals() as signals, fresh_accelerate():
        accelerator = start_accelerator(recipe, folder)
        if accelerator.is_main_process:
            check_folder(folder)
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
    record = RunRecord(recipe.without_local_paths(), fingerprint(data, recipe.data))
    with accelerator.main_process_first():
        check_run(folder, recipe, record.data, networks)
        if accelerator.is_main_process:
            remove_leftovers(folder)
    model = build_model(recipe, data.class_names, data.name)
    known = len(data.class_names)
    if accelerator.is_main_process and model.num_classes > known and not recipe.data.allow_empty_classes:
        _logger.warning(
            "model.num_classes: %d is more than the %d classes of %s: classes %d to %d have no training image. "
            "data.allow_empty_classes=true says that they may have none.",
            *(model.num_classes, known, data.name, known, model.num_classes - 1),
        )
    # One process has nothing to share.
    in_parts = asks_for_sharding() and accelerator.num_processes > 1
    for phase in chain.from_iterable(networks.values()):
        check_loss(model, phase.loss, phase.regime)
        if in_parts:
            refuse_loss(phase.loss)
    input = InputConfig.from_model(model.backbone, recipe.data)
    check_one_image(model, input, chain.from_iterable(networks.values()), recipe, accelerator.num_processes)
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
        if accelerator.is_main_process:
            write_recipe(folder, recipe)
    accelerator.init_trackers(folder.name, config=flat(record.recipe))

    parallelism = Sharded(accelerator) if in_parts else Replicated(accelerator)
    results: dict[str, ExitMetricsResult] = {}
    seconds: dict[str, float] = {}
    for name, phases in networks.items():
        # Built anew from the same seed: every network starts from the same weights and sees the same images.
        set_seed(recipe.seed)
        network = build_model(recipe, data.class_names, data.name).to(accelerator.device)
        if recipe.sync_batchnorm and accelerator.num_processes > 1:
            network = synchronize_batch_norm(network)
        set_seed(recipe.seed, device_specific=True)
        on_epoch = None
        if recipe.push_to_hub is not None and recipe.push_to_hub.every is not None and name == "self-distilled":
            on_epoch = _push_nothing if publisher is None else publisher.after_epoch
        fit = Fit(name, network, phases, feed, recipe, parallelism, folder, record, signals, on_epoch)
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
        writer.save(model, folder / MODEL, report)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    # Not before: a comparison trains several runs in the same processes.
    atexit.register(accelerator.state.destroy_process_group)
    if publisher is not None:
        publisher.finish()
    return report


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


def _push_nothing(model: SelfDistillModel, epoch: int, total: int) -> None:
    """What the other processes do after an epoch."""
