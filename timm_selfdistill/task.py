"""Self-distillation as a timm training task: a wrapped model and its loss."""

from typing import Any, Literal, get_args

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_selfdistill.checks import Positive, check
from timm_selfdistill.losses import OutsideTeacher, SelfDistillationLoss, TrainingTime, needs_of
from timm_selfdistill.losses.without_exits import PastModel
from timm_selfdistill.model import ExitOutput, SelfDistillModel

Regime = Literal["joint", "frozen"]

_SCALE = "heads_lr_scale"  # key of a group of an optimizer's parameters


class SelfDistillationTask(ClassificationTask):
    """Self-distillation task: trains a backbone together with its exits.

    What the loss does not reach is frozen (the exits with the loss `none`; without hints, the layers that make features
    for them), so that plain DDP works without `find_unused_parameters`. EMA, compile, DDP preparation, checkpoint state
    and evaluator are timm's own.

    Args:
        model: The wrapped model.
        criterion: Maps `(ExitOutput, target)` to a dict of terms with the key 'loss'; by default
            `SelfDistillationLoss()`. Its attribute `needs`, a `Needs`, says what it is given. For the average of the
            weights call `setup_ema`, for the time and the past model `set_time`.
        regime: 'joint' trains everything; 'frozen' trains the exits only, the backbone stays as it is (in eval mode).
        teacher: A model from outside that teaches too, beside the loss.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.

    Raises:
        ValueError: If the model is not wrapped, the loss does not fit it, or nothing or an unreachable part would be
            trained.

    Examples:
        ```python
        task = SelfDistillationTask(sd.wrap('resnet18'), sd.SelfDistillationLoss())
        result = task(input, target)
        result['loss'].backward()
        ```
    """

    def __init__(
        self,
        model: SelfDistillModel,
        criterion: nn.Module | None = None,
        regime: Regime = "joint",
        teacher: OutsideTeacher | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(model, SelfDistillModel):
            raise ValueError(f"SelfDistillationTask trains a model made by wrap(), got {type(model).__name__}.")
        criterion = SelfDistillationLoss() if criterion is None else criterion
        check_loss(model, criterion, regime)
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        self.needs = needs_of(criterion)
        if teacher is not None:
            teacher.check_student(model, self.needs.exits, regime == "joint")
        self.teacher = teacher
        self.time: TrainingTime | None = None
        self.ensemble = model.ensemble
        self.past: PastModel | None = PastModel(model) if self.needs.past else None
        self.regime = regime
        model.backbone_frozen = regime == "frozen"
        model.backbone.requires_grad_(regime == "joint")
        model.heads.requires_grad_(self.needs.exits)
        if not (self.needs.features or model.wrap_config.hint_adapter):
            for index in range(model.num_exits):
                model.head_of(index).adapter.requires_grad_(False)
        where = next(model.parameters()).device
        model.gate.set(self.needs.gate_factors(model.num_exits), bool(self.needs.gate_fade), where)
        self.train(self.training)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Forward pass through model and exits, and the loss.

        Args:
            input: Input tensor [B, C, H, W]
            target: Class indices [B] or soft targets [B, num_classes]

        Returns:
            Dictionary with 'loss', the self-distillation loss; 'output', the logits of the backbone's own classifier;
            and every term of the loss, such as 'ce/0', 'kd/0', 'hint/0', and 'teacher/0' with a teacher from outside.
        """
        if self.needs.gate_fade and self.time is None:
            raise ValueError("The gate of the exits fades over the training: call task.set_time() before each step.")
        partners = None
        if self.needs.batches == "paired":
            if len(input) % 2:
                raise ValueError(f"The loss needs batches of pairs, but this one holds {len(input)}; allowed is 2B.")
            input, partners = input.chunk(2)
            target = target.chunk(2)[0]
        out = self._run(self.trainable_module, input)
        given = self._provide(input)
        if partners is not None:
            # After the run with a gradient, as autocast keeps what it has cast.
            with torch.no_grad():
                given["partners"] = self._run(self.trainable_module, partners)
        terms: dict[str, Tensor] = self.criterion(out, target, **given)
        if self.teacher is not None:
            terms = self.teacher.add_terms(terms, out, input, target)
        return {**terms, "output": out.logits[-1]}

    def train(self, mode: bool = True) -> "SelfDistillationTask":
        """Set the mode; the average of the weights and the past model stay in eval mode."""
        super().train(mode)
        if (average := self.get_trainable_module(ema=True)) is not None:
            average.eval()
        return self

    def set_time(self, epoch: float, epochs: int) -> None:
        """Tell how far training has come, before each step, for a loss that follows it.

        Args:
            epoch: Epochs done, with the share that is done of the present one.
            epochs: Epochs in all.
        """
        self.time = TrainingTime(epoch, epochs)
        model = unwrapped_model(self.trainable_module)
        model.gate.fade(self.needs.gate_share(self.time))
        if self.past is not None:
            self.past.follow(model, epoch)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the loss and the past model, if any, which timm's checkpoints hold besides the model."""
        if ema:
            return {}
        return {name: state for name, part in self._stateful().items() if (state := part.state_dict())}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on from what `get_task_state` returned."""
        for name, part in self._stateful().items():
            if state is not None and name in state:
                part.load_state_dict(state[name], strict=strict)

    def get_clip_groups(self, exclude_head: bool = False) -> list[list[nn.Parameter]]:
        """Return the parameters of `get_clip_parameters` whose gradients have a norm together.

        Those of the backbone are a group of their own where the gate keeps the exits' gradients from it: the rest then
        does not shorten its steps.
        """
        model = unwrapped_model(self.trainable_module)
        own = {id(p) for p in model.backbone.parameters()} if model.gate.is_closed else set()
        parameters = self.get_clip_parameters(exclude_head)
        groups = [p for p in parameters if id(p) in own], [p for p in parameters if id(p) not in own]
        return [group for group in groups if group]

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the trained parameters, those of the loss too; with `exclude_head`, without the classifiers."""
        model = unwrapped_model(self.trainable_module)
        classifiers = [model.backbone.get_submodule(name) for name in model.taps.classifier.modules]
        classifiers += [head.get_submodule("classifier") for head in model.heads]
        left_out = {id(p) for module in classifiers for p in module.parameters()} if exclude_head else set()
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
        return [*trained, *self.get_submodule("criterion").parameters()]

    def _stateful(self) -> dict[str, nn.Module]:
        """Return the parts besides the model that may have a state."""
        past = {} if self.past is None else {"past": self.past}
        return {"criterion": self.get_submodule("criterion"), **past}

    def _run(self, module: nn.Module, input: Tensor) -> ExitOutput:
        """Return the output of a module, with the exits where the loss needs them."""
        out: ExitOutput = module(input, return_exits=True) if self.needs.exits else ExitOutput((module(input),), ())
        return out

    def _provide(self, input: Tensor) -> dict[str, Any]:
        """Return what the loss needs by keyword."""
        given: dict[str, Any] = {}
        if self.needs.ema:
            if (average := self.get_trainable_module(ema=True)) is None:
                raise ValueError("The loss learns from the average of the weights: call task.setup_ema() first.")
            with torch.no_grad():
                given["ema"] = self._run(average, input)
        if self.past is not None:
            given["past"] = self.past(input)
        if self.needs.time:
            if self.time is None:
                raise ValueError("The loss follows the time of the training: call task.set_time() before each step.")
            given["time"] = self.time
        if self.needs.ensemble:
            given["ensemble"] = self.ensemble
        return given


def scale_heads_lr(optimizer: torch.optim.Optimizer, model: SelfDistillModel, scale: float) -> None:
    """Multiply the learning rate of all heads: those of the exits, and the backbone's own classifier.

    Call it once, before a schedule is made: those of torch and timm start from the rate of each group. A group with
    heads and other parameters becomes two; weight decay and all else stay.

    Args:
        optimizer: An optimizer of the model's parameters that has not taken a step.
        model: The model.
        scale: The factor, above 0.

    Raises:
        ValueError: If the factor is not above 0, or the optimizer has taken a step.
    """
    scale = check("scale", scale, Positive)
    if optimizer.state:
        raise ValueError("The optimizer has taken a step already; allowed is one that has not.")
    if scale == 1:
        return
    of_heads = set(model.parameters()) - set(model.backbone.parameters())
    for name in model.taps.classifier.modules:
        of_heads.update(model.backbone.get_submodule(name).parameters())
    for group in list(optimizer.param_groups):
        heads = [parameter for parameter in group["params"] if parameter in of_heads]
        rest = [parameter for parameter in group["params"] if parameter not in of_heads]
        if not heads:
            continue
        scaled = {"lr": group["lr"] * scale, _SCALE: scale}
        if rest:
            group["params"] = rest
            optimizer.add_param_group({**group, **scaled, "params": heads})
        else:
            group.update(scaled)


def unscaled_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the highest learning rate of all groups, without the factor of the heads."""
    return float(max(group["lr"] / group.get(_SCALE, 1.0) for group in optimizer.param_groups))


def unwrapped_model(module: Any) -> SelfDistillModel:
    """Return the wrapped model inside DDP, compile and EMA wrappers."""
    model: SelfDistillModel = unwrap_model(module)
    return model


def check_loss(model: SelfDistillModel, criterion: nn.Module, regime: Regime) -> None:
    """Raise ValueError if a loss trains nothing, leaves parameters without a gradient, or is for other exits."""
    needs_exits = needs_of(criterion).exits
    if regime not in get_args(Regime):
        raise ValueError(f"regime must be 'joint' or 'frozen', got {regime!r}.")
    if regime == "frozen" and not needs_exits:
        raise ValueError("regime='frozen' trains the exits only, but this loss does not use them: nothing would train.")
    if not isinstance(criterion, SelfDistillationLoss):
        return
    config = criterion.config
    config.check_classes(model.num_classes)
    if needs_exits:
        config.check_exits(model.num_exits)
    if regime == "joint" and not config.deepest_ce_weight and not config.deepest_kd_weight:
        raise ValueError(
            "deepest_ce_weight is 0: the backbone's classifier would get no gradient. Give a deepest_ce_weight above "
            "0, or train the exits only, with regime='frozen'."
        )
    if needs_exits and not (config.ce_weight or config.kd_weight):
        raise ValueError(
            "ce_weight and kd_weight are 0: the exits' classifiers would get no gradient from the hints alone. "
            "Give one of them a value above 0."
        )
    if needs_exits and model.wrap_config.hint_adapter and not config.hint_weight:
        raise ValueError(
            "The exits have hint adapters, but hint_weight is 0: their parameters would get no gradient. "
            "Give a hint_weight above 0, or wrap without hint_adapter."
        )
