"""The network that early exit is exported from: what every exit answers, and how confident it is, in one forward."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig, RuleState
from timm_selfdistill.export.graph_cuts import Stage, cut
from timm_selfdistill.export.graphs import Interface, Run, trace, write_graph, write_out_attention
from timm_selfdistill.export.one_graph import describe, input_config
from timm_selfdistill.hub import class_names, complete_names
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.model.ensemble import EachExit
from timm_selfdistill.staged import CONFIDENCE, IMAGES, LOGITS, OWN_LOGITS, TEMPERATURES


class DecidingExits(nn.Module):
    """A wrapped model with the answers and confidences of all exits, as early exit takes them.

    Args:
        model: The wrapped model.
        config: The settings of early exit; the temperatures are arguments of the forward.
        own: Whether exits that answer with an ensemble also give their own logits, which calibration needs.
    """

    def __init__(self, model: SelfDistillModel, config: EarlyExitConfig, *, own: bool = False) -> None:
        super().__init__()
        self.training = model.training
        self.exits = EachExit(model)
        self.config = config
        self._own = (OWN_LOGITS,) if own and config.combines else ()

    def forward(self, images: Tensor, temperatures: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, C, H, W] and temperatures [K] to logits [B, num_classes] and confidence [B] of each exit.

        They take turns: logits and confidence of exit 0, of exit 1, and so on; the last are the fallback's logits. Own
        logits come after them.
        """
        ensemble = self.exits.model.ensemble
        every = self.exits(images)
        outputs: list[Tensor] = []
        state: RuleState = ()
        for exit in range(len(temperatures)):
            logits = ensemble.prefix(exit)(every[: exit + 1]) if self.config.running_ensemble else every[exit]
            confidence, state = self.config.rule_object.confidence(logits / temperatures[exit], state)
            outputs += [logits, torch.where(_is_valid(logits), confidence, math.nan)]
            outputs += [every[exit] for _ in self._own]
        last = ensemble(every) if self.config.fallback == "ensemble" else every[-1]
        return (*outputs, last, *(every[-1] for _ in self._own))

    @property
    def name(self) -> str:
        """What the network is called in messages."""
        return type(self.exits.model.backbone).__name__

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The settings' temperatures."""
        return self.config.temperatures or (1.0,) * self.exits.model.num_exits

    def cut(self, size: Sequence[int], kind: str, *, dynamic_batch: bool) -> list[Stage]:
        """Trace it and cut it into stages.

        Args:
            size: Channels, height and width.
            kind: "onnx" or "torch-export".
            dynamic_batch: Whether the stages take batches of any size, or one image.
        """
        exits = self.exits.model.num_exits
        inputs = (IMAGES, TEMPERATURES)
        outputs = [(LOGITS, CONFIDENCE, *self._own)] * exits + [(LOGITS, *self._own)]
        flat = tuple(name for names in outputs for name in names)
        traced = copy.deepcopy(self)
        if kind == "onnx":
            write_out_attention(traced)
        examples = [torch.zeros(2 if dynamic_batch else 1, *size), torch.ones(exits)]
        interface = Interface(inputs, flat, (dynamic_batch, False))
        return cut(trace(traced, examples, interface), inputs, outputs, self.exits.model.exit_names)

    def answers(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits and confidences of all exits, by the settings' own temperatures."""
        with torch.no_grad():
            outputs = self(images, torch.tensor(self.temperatures))
        step, exits = 2 + len(self._own), self.exits.model.num_exits
        return list(outputs[::step]), list(outputs[1 : step * exits : step])


def write_stage(stage: Stage, examples: Sequence[Tensor], kind: str, metadata: str, path: Path) -> Run:
    """Write a stage to a file, and return what runs the file."""
    interface = Interface(
        tuple(tensor.name for tensor in stage.inputs),
        tuple(tensor.name for tensor in stage.outputs),
        tuple(tensor.batched for tensor in stage.inputs),
    )
    return write_graph(trace(stage.network, examples, interface), interface, kind, metadata, path)


def example_inputs(stages: Sequence[Stage], images: Tensor) -> list[list[Tensor]]:
    """Return, for each stage, the inputs that it gets for these images."""
    held = {IMAGES: images, TEMPERATURES: torch.ones(len(stages) - 1)}
    examples = []
    for stage in stages:
        examples.append([held[tensor.name] for tensor in stage.inputs])
        with torch.no_grad():
            found = stage.network(*examples[-1])
        held |= {tensor.name: value.contiguous() for tensor, value in zip(stage.outputs, found, strict=True)}
    return examples


def describe_early_exit(
    network: EarlyExit, image_size: int | tuple[int, int] | None, label_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return what is written beside the graphs of a network; the arguments are those of `export_early_exit`."""
    model = network.model
    names = class_names(model) if label_names is None else complete_names(label_names, model.num_classes)
    return {
        **describe(model, names, input_config(model, image_size)),
        "exit_names": list(model.exit_names),
        "early_exit": replace(network.config, costs=None).to_json(),  # those of torch
        "rule_range": _rule_range(network.config),
        "ensemble": model.ensemble.to_json(),
    }


def _is_valid(logits: Tensor) -> Tensor:
    """Whether images may leave by these logits [B, C]: none is NaN, and the largest is finite.

    Runtimes do not agree on what the largest of NaNs is, but on comparisons with them: NaN is taken for infinity first.
    """
    limit = torch.finfo(logits.dtype).max
    return torch.where(logits <= limit, logits, math.inf).amax(-1).abs() <= limit


def _rule_range(config: EarlyExitConfig) -> list[float | None]:
    rule = config.rule_object
    return [rule.always, None if rule.highest == math.inf else rule.highest]
