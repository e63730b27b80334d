"""A network with early exit: images leave the batch at the first exit that is confident enough of them."""

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit.compiled_stages import CompiledStages
from timm_selfdistill.early_exit.leaving import EarlyExitOutput, LeavingBatch, OnAnswer, Places
from timm_selfdistill.early_exit.path_costs import close_exits
from timm_selfdistill.early_exit.rules import EarlyExitConfig
from timm_selfdistill.early_exit.stage_costs import StageCosts, measure_stage_costs
from timm_selfdistill.exits import random_images, unchanged
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.hooks import BareBackbone
from timm_selfdistill.serving import NO_TIMES, Give
from timm_selfdistill.staged import check_limits


class EarlyExit(nn.Module):
    """A wrapped model in which each image leaves at the first exit whose confidence reaches the exit's threshold.

    The rest of the backbone runs on the images that are left; when none is left, the forward ends. Every image gets the
    answer that it would get if everything ran and the exit were chosen afterwards (to rounding, as kernels differ
    between batch sizes).

    When the object is made, it tries on a few random images after which exits the backbone runs on with a part of its
    batch. Where it does not (some networks read the batch size once, at their start), images that have their answer
    stay in the batch until a later exit, or until all have one; a warning names these exits.

    Args:
        model: The wrapped model.
        thresholds: K numbers, one for each added exit, or one number for all; infinity lets no image leave.
        rule: What confidence is: a name of `list_rules`, as `EarlyExitConfig` describes.
        temperatures: K numbers that the exits' logits are divided by before their confidence is taken; 1 by default.
            The logits that are returned are not divided.
        fallback: Who answers for images that left at no exit: "last" or "ensemble".
        running_ensemble: Whether exit k answers with the ensemble of the exits 0 to k, by the weights of the model's
            `ensemble`, instead of with its own logits. Heads then run even where no image may leave.
        buckets: The batch sizes that the network may run on, so that it meets few shapes: what is left of a batch is
            filled up to the next of them with repeated images, and a larger batch runs in parts of the largest. By
            default, it runs on exactly what is left.
        costs: What the parts take on this machine, as `measure` returns it: a batch shrinks only where that saves more
            than it costs. By default, it always does.

    Attributes:
        config: The settings, as an `EarlyExitConfig`.
        buckets: The sizes, sorted; None for all.
        shrinks: For each added exit, whether the backbone runs on with a part of the batch after it.

    Raises:
        ValueError: If a setting is not allowed, or there is not one threshold or temperature for each exit.
    """

    def __init__(
        self,
        model: SelfDistillModel,
        thresholds: float | Sequence[float],
        *,
        rule: str = "max-softmax",
        temperatures: Sequence[float] | None = None,
        fallback: str = "last",
        running_ensemble: bool = False,
        buckets: Sequence[int] | None = None,
        costs: StageCosts | None = None,
    ) -> None:
        super().__init__()
        if isinstance(thresholds, int | float):
            thresholds = [thresholds] * model.num_exits
        if model.num_classes < 2:
            raise ValueError(f"Early exit needs 2 classes or more, but the model has {model.num_classes} class.")
        temperatures = None if temperatures is None else tuple(temperatures)
        self.config = EarlyExitConfig(tuple(thresholds), rule, temperatures, fallback, running_ensemble, costs)
        self.config.check_exits(model.exit_names[:-1])
        self.buckets = _check_buckets(buckets)
        self.model = model
        self.training = model.training
        self._stages: CompiledStages | None = None
        self.shrinks, self._bare = _try_out(model)

    @classmethod
    def from_config(
        cls, model: SelfDistillModel, config: EarlyExitConfig, *, buckets: Sequence[int] | None = None
    ) -> "EarlyExit":
        """Return a model with settings that were saved or chosen; ValueError if they are for more or fewer exits."""
        return cls(model, buckets=buckets, **{field.name: getattr(config, field.name) for field in fields(config)})

    def forward(
        self, x: Tensor, max_exit: int | Tensor | None = None, on_answer: OnAnswer | None = None
    ) -> EarlyExitOutput:
        """Classify a batch.

        Args:
            x: Images [B, C, H, W].
            max_exit: The exit that answers at the latest, however confident it is: one for all images, or one for each
                [B]; K, the backbone's own classifier or the ensemble, by default.
            on_answer: Called as soon as images have their answer, with their places [N], logits [N, num_classes] and
                exit, while the others are still in the network.

        Returns:
            Logits [B, num_classes] and the exits that gave them [B].

        Raises:
            RuntimeError: If the model is in train mode.
            ValueError: If there is no exit `max_exit`, or not one for each image.
        """
        if self.model.training:
            raise RuntimeError("Early exit is for inference, but the model is in train mode: call eval() first.")
        count = x.shape[0]
        limits = None if max_exit is None else _limits(max_exit, count, self.num_exits)
        if not count:
            return EarlyExitOutput(x.new_empty(0, self.model.num_classes), x.new_empty(0, dtype=torch.int64))
        size = count if self.buckets is None else self.buckets[-1]
        if count <= size:
            return self._forward(x, limits, on_answer, 0)
        parts = [
            self._forward(part, None if limits is None else limits[start : start + size], on_answer, start)
            for start, part in zip(range(0, count, size), x.split(size), strict=True)
        ]
        return EarlyExitOutput(*map(torch.cat, zip(*parts, strict=True)))

    @property
    def num_exits(self) -> int:
        """Number K of added exits; the fallback has index K."""
        return self.model.num_exits

    @torch.inference_mode()
    def answer_images(self, images: Sequence[Tensor], limits: Sequence[int], give: Give) -> None:
        """Answer a batch of single images [C, H, W], as `Servable` says; the logits are on the CPU."""

        def pass_on(places: Tensor, logits: Tensor, exit: int) -> None:
            # A copy, as the answers outlive this batch.
            give(places.tolist(), list(torch.empty(logits.shape, dtype=logits.dtype).copy_(logits)), exit)

        batch = torch.stack(list(images)).to(next(self.parameters()).device)
        deepest = min(limits) == self.num_exits
        self(batch, max_exit=None if deepest else torch.tensor(limits), on_answer=pass_on)

    def seconds_to(self, exit: int, rows: int) -> float:
        """Return what a batch takes of which no image leaves before an exit; ValueError unless it was measured."""
        if self.config.costs is None:
            raise ValueError(NO_TIMES)
        return self.config.costs.seconds_to(exit, rows, self.config.heads_run)

    def compile_stages(self, image_size: tuple[int, int] | None = None, **settings: Any) -> None:
        """Compile the backbone between two exits, and every head, once for each bucket: nothing is compiled later.

        The network then takes images of this size only, on its present device and in its present precision; weights
        may be changed in place, but not replaced. Every backbone that can be compiled shrinks after all exits.

        Args:
            image_size: Height and width of the images; by default those that the model was wrapped for.
            settings: Those of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.

        Raises:
            ValueError: If there are no buckets, or the network cannot be traced by `torch.export`.
        """
        if self.buckets is None:
            raise ValueError("Stages are compiled for the sizes of batches: give buckets, such as [1, 4, 16].")
        compiler = partial(torch.compile, dynamic=False, fullgraph=True, **settings)
        self._stages = CompiledStages(self.model, self.buckets, image_size, compiler)
        self.shrinks = (True,) * self.model.num_exits

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compiled, which cannot be copied, and the views of the backbone."""
        return {**self.__dict__, "_stages": None, "_bare": self._bare is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Look anew at the backbone."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bare = BareBackbone(self.model.backbone) if state["_bare"] else None

    def fit(self, count: int) -> int:
        """Return on how many rows the network runs for this many images."""
        return count if self.buckets is None else next(size for size in self.buckets if size >= count)

    def shrinks_to(self, exit: int, present: int, left: int) -> bool:
        """Whether, after an exit, the backbone runs on `left` rows in place of the `present` ones."""
        if left >= present or not self.shrinks[exit]:
            return False
        return self.config.costs is None or self.config.costs.saves(exit, present, left, self.config.heads_run)

    def measure(
        self, batch_size: int, input_size: tuple[int, int, int] | None = None, *, images: Tensor | None = None
    ) -> StageCosts:
        """Time the parts of the network on this machine, and from now on let batches shrink only where that pays.

        The times are kept in `config`, and saved with it; no answer depends on them. With `images`, exits that do not
        pay are closed, too: what left there goes deeper, and their heads no longer run. Where none pays, the plain
        backbone runs.

        Args:
            batch_size: Images in a batch.
            input_size: Channels, height and width of an image; by default the size that the model was wrapped for, or
                that of `images`.
            images: Images [N, C, H, W] like those to come, some hundred, which tell where images leave.

        Returns:
            The times.

        Raises:
            ValueError: If the batch size is not positive, or there are no images.
        """
        if images is not None:
            if images.ndim != 4 or not len(images):
                raise ValueError(f"images have the shape {list(images.shape)}; allowed is [N, C, H, W], N at least 1.")
            _, channels, height, width = images.shape
            input_size = input_size or (channels, height, width)
        costs = measure_stage_costs(self.model, self.config, batch_size, input_size)
        if images is not None:
            self.config = close_exits(self.model, self.config, costs, images, batch_size, self.shrinks)
        self.config = replace(self.config, costs=costs)
        return costs

    def _forward(self, x: Tensor, limits: Places | None, on_answer: OnAnswer | None, start: int) -> EarlyExitOutput:
        """Classify a batch that is no larger than the largest bucket; `start` is the place of its first image."""
        if limits is None and self._stages is None and not self.config.runs_heads:
            # Nobody leaves, so nothing need be read on the way.
            return self._forward_plain(x, on_answer, start)
        batch = LeavingBatch(self, x, limits, on_answer, start)
        if self._stages is None:
            remaining = self.model.forward_while(batch.images, batch.visit)
        else:
            remaining = self._stages.run(batch.images, batch.leave)
        if remaining is not None:
            batch.finish(remaining)
        return batch.output()

    def _forward_plain(self, x: Tensor, on_answer: OnAnswer | None, start: int) -> EarlyExitOutput:
        """Classify a batch by the backbone alone, which is called without hooks of ours where that is possible."""
        count, rows = x.shape[0], self.fit(x.shape[0])
        images = x if rows == count else x[torch.arange(rows, device=x.device) % count]
        bare = None if torch.compiler.is_compiling() else self._bare
        run = self.model if bare is None or bare.backbone is not self.model.backbone else bare
        logits: Tensor = run(images)
        logits = logits if rows == count else logits[:count]
        if on_answer is not None:
            on_answer(torch.arange(start, start + count), logits, self.num_exits)
        return EarlyExitOutput(logits, torch.full((count,), self.num_exits, device=x.device))


def _limits(max_exit: int | Tensor, count: int, num_exits: int) -> Places:
    if not isinstance(max_exit, Tensor):
        return check_limits(max_exit, count, num_exits)
    # numpy has no bfloat16; floats are refused in any case.
    values = max_exit.double() if max_exit.is_floating_point() else max_exit
    return check_limits(values.numpy(force=True), count, num_exits)


def _check_buckets(buckets: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the batch sizes that a network may run on, sorted; ValueError if there is none, or one is below 1."""
    if buckets is None:
        return None
    if not buckets or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in buckets):
        raise ValueError(f"buckets are {list(buckets)!r:.200}; allowed are whole numbers, 1 or more, at least one.")
    return tuple(sorted(set(buckets)))


@torch.no_grad()
def _try_out(model: SelfDistillModel) -> tuple[tuple[bool, ...], BareBackbone | None]:
    """Return after which exits the backbone runs on with a part of the batch, and it without hooks if that can run."""
    images = random_images(model.backbone, model.wrap_config.image_size, 4)
    with unchanged(model):
        expected = model(images)
        shrinks = tuple(_shrinks(model, images, expected, exit) for exit in range(model.num_exits))
        bare = _run_bare(model, images, expected)
    if not all(shrinks):
        stuck = [name for name, fine in zip(model.exit_names[:-1], shrinks, strict=True) if not fine]
        warnings.warn(
            f"{type(model.backbone).__name__} cannot run on with a part of its batch after {', '.join(stuck)}: images "
            "that leave there get their answer, but stay in the batch until a later exit, or until all have one.",
            stacklevel=3,
        )
    return shrinks, bare


def _run_bare(model: SelfDistillModel, images: Tensor, expected: Tensor) -> BareBackbone | None:
    try:
        bare = BareBackbone(model.backbone)
        return bare if torch.equal(bare(images), expected) else None
    except Exception:  # modules that cannot be copied so raise whatever they do
        return None


def _shrinks(model: SelfDistillModel, images: Tensor, expected: Tensor, exit: int) -> bool:
    """Whether the backbone, left with two of four images at an exit, gives these two their logits."""
    rows = torch.tensor([1, 3], device=images.device)
    try:
        logits = model.forward_while(images, lambda index, taps: rows if index == exit else None)
    except Exception:  # whatever the backbone raises, it means that it cannot
        return False
    expected = expected[rows]
    if logits is None or logits.shape != expected.shape:
        return False
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
