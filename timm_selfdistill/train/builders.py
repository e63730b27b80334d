"""Build the parts of a run: the network, its optimizer and schedule, and the data as the training loop takes it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from timm_selfdistill.compat import copy_hooks
from timm_selfdistill.data import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.batches import Arrangement, TrainingOrder
from timm_selfdistill.data.loaders import Loaders
from timm_selfdistill.data.transforms import InputConfig, build_mixup
from timm_selfdistill.exits import unchanged
from timm_selfdistill.hub.start_weights import load_start_weights
from timm_selfdistill.losses import needs_of
from timm_selfdistill.model import SelfDistillModel, wrap
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.task import scale_heads_lr
from timm_selfdistill.train.phases import Phase, label_smoothing

_logger = logging.getLogger(__name__)

# Of heads, which are new, on a backbone that is trained already; docs/gain.md has what it gives.
_NEW_HEADS_LR_SCALE = 5.0

# What gives each process its share of the data, which Accelerate does already.
_SHARDING_SAMPLERS = (DistributedSampler, OrderedDistributedSampler, RepeatAugSampler)


def build_model(recipe: Recipe, class_names: Sequence[str], dataset: str, *, tell: bool = False) -> SelfDistillModel:
    """Build the recipe's wrapped model, for the classes of the data set of this name; tell what is not loaded."""
    section, exits = recipe.model, recipe.exits
    num_classes = section.num_classes or len(class_names)
    if num_classes < len(class_names):
        raise ValueError(f"model.num_classes: {num_classes} is less than the {len(class_names)} classes of {dataset}.")
    model = wrap(
        section.name,
        num_classes=num_classes,
        exits=exits.points,
        head=exits.head,
        head_kwargs=exits.head_kwargs,
        head_budget=exits.head_budget,
        hint_adapter=exits.hint_adapter,
        small_stem=section.small_stem,
        image_size=recipe.data.image_size,
        pretrained=section.pretrained,
        model_kwargs=section.kwargs,
    )
    if section.weights is not None:
        for notice in load_start_weights(model, section.weights):
            if tell:
                _logger.warning("%s", notice)
    if section.grad_checkpointing:
        _checkpoint_gradients(model, section.name)
    return model.to(memory_format=torch.channels_last) if section.channels_last else model


def _checkpoint_gradients(model: SelfDistillModel, name: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"model.grad_checkpointing: must be false for {name!r}, which timm cannot compute again in parts; a "
            "smaller batch_size or a larger optimizer.accumulate needs less memory too."
        ) from error


def synchronize_batch_norm(model: SelfDistillModel) -> SelfDistillModel:
    """Let every batch norm use the statistics of all processes' images; state dict and hooks are kept."""
    before = dict(model.named_modules(remove_duplicate=False))
    convert_sync_batchnorm(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not before[name]:
            copy_hooks(before[name], module)
    return model


def check_one_image(
    model: SelfDistillModel, input_config: InputConfig, phases: Iterable[Phase], recipe: Recipe, num_processes: int
) -> None:
    """Refuse a recipe that leaves a process one image at a time, where the network cannot train on one.

    Batch norm needs two values a channel: one image is enough only where its feature maps are larger than one
    position. So the network is tried, and left unchanged.
    """
    alone = num_processes == 1 or not recipe.sync_batchnorm
    if recipe.batch_size != num_processes * recipe.optimizer.accumulate or not alone:
        return
    images = torch.zeros(1, input_config.channels, *input_config.image_size)
    for phase in phases:
        needs = needs_of(phase.loss)
        if needs.batches == "paired":  # with a second image
            continue
        with unchanged(model, restore_tensors=True), torch.no_grad():
            model.train()
            if phase.regime == "frozen":
                model.backbone.eval()
            try:
                model(images, return_exits=needs.exits)
            except ValueError as error:  # of torch's batch norm, or of a head
                raise ValueError(
                    f"batch_size: {recipe.batch_size} leaves one image for each of {num_processes} process(es) and "
                    f"optimizer.accumulate={recipe.optimizer.accumulate} micro batch(es), which the batch norm of "
                    f"{recipe.model.name} cannot train on at {' x '.join(map(str, input_config.image_size))} pixels; "
                    f"allowed are multiples of {recipe.batch_size} from {2 * recipe.batch_size} on, or fewer micro "
                    "batches."
                ) from error


def build_optimizer(model: SelfDistillModel, loss: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer with timm's parameter groups, and one without weight decay for the loss's own."""
    section = recipe.optimizer
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            filter_bias_and_bn=not section.weight_decay_on_bias_and_norm,
            layer_decay=section.layer_decay,
            **section.kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"optimizer: timm cannot make {section.name!r} with {section.kwargs}: {error}") from error
    scale_heads_lr(optimizer, model, _heads_lr_scale(recipe))
    if own := list(loss.parameters()):
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
    return optimizer


def _heads_lr_scale(recipe: Recipe) -> float:
    if recipe.optimizer.heads_lr_scale is not None:
        return recipe.optimizer.heads_lr_scale
    trained = recipe.model.pretrained or recipe.model.weights is not None
    return _NEW_HEADS_LR_SCALE if trained and recipe.schedule.regime != "frozen" else 1.0


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, cooldown_epochs: int, updates_per_epoch: int
) -> tuple[Any, int]:
    """Build timm's scheduler, None for a constant rate; return it and the number of epochs, cool-down included."""
    same_names = {"decay_epochs", "decay_milestones", "decay_rate", "min_lr", "warmup_lr", "warmup_epochs"}
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule.name,
        num_epochs=epochs,
        cooldown_epochs=cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **recipe.schedule.model_dump(include=same_names),
    )
    if scheduler is not None:
        scheduler.step_update(0)
    return scheduler, total


@dataclass
class Feed:
    """The data of a run; loaders that shard by themselves, or that Accelerate does not shard, are a `ValueError`."""

    train: Any  # training batches of this process
    validation: DataLoader[Any] | None
    steps_per_epoch: int  # training batches of this process in an epoch
    mixup: Mixup | None
    split: ImageSplit | StreamSplit  # the training split
    order: TrainingOrder | None  # None for a stream
    batch_size: int  # of one process and micro batch
    process: int
    processes: int

    def __post_init__(self) -> None:
        for loader in (self.train, self.validation):
            if loader is not None:
                _check_loader(loader)

    @property
    def streaming(self) -> bool:
        """Whether every process reads all validation batches, and a share of the training ones."""
        return self.order is None

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose what training batches hold beside the samples that they draw; a stream can only be "plain"."""
        if self.order is not None:
            self.order.arrange(arrangement)
        elif arrangement != "plain":
            raise ValueError(f"A stream cannot give {arrangement} batches.")

    def batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the training batches of an epoch that are left when `done` of them were taken before."""
        if self.order is not None:
            self.order.begin(epoch, done * self.batch_size * self.processes)
            return iter(self.train)
        self.train.begin(epoch)
        batches: Iterator[tuple[Tensor, Tensor]] = iter(self.train)
        # A stream cannot be entered in its middle; reading its beginning also draws the random numbers that go with it.
        for _ in range(done):
            next(batches)
        return batches

    def rows(self, epoch: int, batch: int) -> list[int] | None:
        """Return which rows of the training split are in a batch of this process; None for a stream, which has none."""
        if self.order is None or not isinstance(self.split, ImageSplit):
            return None
        first = (batch * self.processes + self.process) * self.batch_size
        rows: list[int] = self.split.indices[next(self.order.batches(epoch, first))].tolist()
        return rows


def build_feed(
    loaders: Loaders, data: ImageData, recipe: Recipe, accelerator: Accelerator, batch_size: int
) -> tuple[Feed, DataLoader[Any]]:
    """Shard the loaders over the processes unless they are, and return the training's data and the evaluation's."""
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


def _check_loader(loader: object) -> None:
    """Refuse a loader that Accelerate would pass on unchanged, or that is sharded already."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Accelerate shards a torch.utils.data.DataLoader only, received {type(loader).__name__}, of which every "
            "process would see all data (timm's create_loader(use_prefetcher=True) makes such a one)."
        )
    sampler: Any = loader
    while sampler is not None:
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
        if isinstance(sampler, _SHARDING_SAMPLERS):
            raise ValueError(
                f"The loader's {type(sampler).__name__} gives each process its share, of which Accelerate would give "
                "it a share again; allowed is a loader of all samples (timm's create_loader(distributed=False))."
            )
