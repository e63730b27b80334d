"""A network with early exit: images leave the batch at the first exit that is confident enough of them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit.compiled_stages import CompiledStages
from timm_selfdistill.early_exit.leaving import LeavingBatch, OnAnswer, Places, check_buckets, check_limits
from timm_selfdistill.early_exit.paying import close_exits
from timm_selfdistill.early_exit.replay import EarlyExitOutput
from timm_selfdistill.early_exit.rules import EarlyExitConfig
from timm_selfdistill.early_exit.stage_costs import StageCosts, measure_stage_costs
from timm_selfdistill.early_exit.trial import try_out
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.hooks import BareBackbone
from timm_selfdistill.servable import NO_TIMES, Give


class EarlyExit(nn.Module):
    """A wrapped model in which each image leaves at the first exit whose confidence reaches the exit's threshold.

    The rest of the backbone runs on the images that are left; when none is left, the forward ends. Every image gets the
    answer that it would get if everything ran and the exit were chosen afterwards (to rounding, as kernels differ
    between batch sizes).

    When the object is made, forwards of a few random images find out after which exits the backbone runs on with a part
    of its batch. Where it does not (some networks read the batch size once, at their start), images that have their
    answer stay in the batch until a later exit, or until none is left without an answer; a warning names these exits.

    Args:
        model: The wrapped model.
        thresholds: K numbers, one for each added exit, or one number for all; infinity lets no image leave.
        rule: What confidence is: a name of `list_rules`, such as "max-softmax", "margin", "entropy" or "patience", as
            `EarlyExitConfig` describes.
        temperatures: K numbers that the exits' logits are divided by before their confidence is taken; 1 by default.
            The logits that are returned are not divided.
        fallback: Who answers for images that left at no exit: "last" or "ensemble".
        running_ensemble: Whether exit k answers with the ensemble of the exits 0 to k, by the weights of the model's
            `ensemble`, instead of with its own logits. Heads then run even where no image may leave.
        buckets: The batch sizes that the network may run on, so that it meets few shapes: what is left of a batch is
            filled up to the next of them with images that are there already, and a batch larger than the largest runs
            in parts of that size. By default, it runs on exactly what is left.
        costs: What the parts of the network take on this machine, as `measure` returns them: a batch shrinks only where
            that saves more than it costs. By default, it always does.

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
        self.buckets = check_buckets(buckets)
        self.model = model
        self.training = model.training
        self._stages: CompiledStages | None = None
        self.shrinks, self._bare = try_out(model)

    @classmethod
    def from_config(
        cls, model: SelfDistillModel, config: EarlyExitConfig, *, buckets: Sequence[int] | None = None
    ) -> "EarlyExit":
        """Return a model with settings that were saved or chosen; ValueError if they are for more or fewer exits."""
        return cls(
            model,
            config.thresholds,
            rule=config.rule,
            temperatures=config.temperatures,
            fallback=config.fallback,
            running_ensemble=config.running_ensemble,
            buckets=buckets,
            costs=config.costs,
        )

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
        limits = None if max_exit is None else check_limits(max_exit, count, self.model.num_exits)
        if not count:
            return EarlyExitOutput(x.new_empty(0, self.model.num_classes), x.new_empty(0, dtype=torch.int64))
        if self.buckets is None or count <= self.buckets[-1]:
            return self._forward(x, limits, on_answer)
        size = self.buckets[-1]
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

        The network then takes images of this size only, in its device and precision of now; its weights may be changed
        in place, but not replaced. Every backbone that can be compiled shrinks after all exits.

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
        """Leave out what was compiled, which cannot be copied, and what is a view of the backbone."""
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
        pay are closed, too: what left there goes deeper, and their heads no longer run. Where early exit does not pay
        at all, the plain backbone runs.

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
        if images is not None and (images.ndim != 4 or not len(images)):
            raise ValueError(f"images have the shape {list(images.shape)}; allowed is [N, C, H, W], N at least 1.")
        if images is not None and input_size is None:
            _, channels, height, width = images.shape
            input_size = (channels, height, width)
        costs = measure_stage_costs(self.model, self.config, batch_size, input_size)
        if images is not None:
            self.config = close_exits(self.model, self.config, costs, images, batch_size, self.shrinks)
        self.config = replace(self.config, costs=costs)
        return costs

    def _forward(self, x: Tensor, limits: Places | None, on_answer: OnAnswer | None, start: int = 0) -> EarlyExitOutput:
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
        count, exit = x.shape[0], len(self.config.thresholds)
        rows = self.fit(count)
        images = x if rows == count else x[torch.arange(rows, device=x.device) % count]
        model, bare = self.model, None if torch.compiler.is_compiling() else self._bare
        logits: Tensor = model(images) if bare is None or bare.backbone is not model.backbone else bare(images)
        if rows != count:
            logits = logits[:count]
        if on_answer is not None:
            on_answer(torch.arange(start, start + count), logits, exit)
        return EarlyExitOutput(logits, torch.full((count,), exit, device=x.device))
