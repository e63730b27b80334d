"""Early-exit rules, which compute the confidence of an exit, and the settings of early exit."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit.stage_costs import StageCosts
from timm_selfdistill.registry import Registry
from timm_selfdistill.staged import ROUNDING

FALLBACKS: Final = ("last", "ensemble")

RuleState = tuple[Tensor, ...]


class Rule:
    """The confidence of an exit in its answers: the base class of early-exit rules.

    A subclass is registered with `register_rule` and made without arguments. One object serves all batches and threads;
    what it has to know at the next exit goes through `state`.

    Attributes:
        lowest: No confidence is below it: as a threshold, it lets every image leave. -infinity if there is no bound.
        highest: No confidence is above it. Infinity if there is no bound.
        discrete: Whether confidences are counts or the like. Thresholds are then chosen among them, not between them.
        uses_temperatures: Whether calibration fits temperatures, which logits are divided by first.
        keeps_state: Whether it needs the logits of every exit on the way. The heads of exits where no image may leave
            run only then, before one where images may.
    """

    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    discrete: ClassVar[bool] = False
    uses_temperatures: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False

    def confidence(self, logits: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        """Return the confidence [B] of an exit, and the state for the next one.

        Args:
            logits: Logits [B, C] of the exit, divided by its temperature, at least float32. Where one is NaN or the
                largest is infinite, the confidence must be NaN or infinite: the image then stays.
            state: What was returned at the exit before, for the images that are left: tensors with B rows; empty at
                the first exit.
        """
        raise NotImplementedError

    @property
    def always(self) -> float:
        """The finite threshold that lets every image leave."""
        return max(self.lowest, torch.finfo(torch.float32).min)


_RULES: Registry[type[Rule]] = Registry("rule", "timm_selfdistill.rules")


def register_rule(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """Return a decorator that registers a subclass of `Rule`.

    Args:
        name: Its name for `EarlyExit`, `EarlyExitConfig` and `calibrate --rule`.

    Raises:
        ValueError: If the name is taken.
    """
    return _RULES.register(name)


def list_rules() -> list[str]:
    """Return the names of all registered early-exit rules, sorted."""
    return _RULES.names()


def get_rule(name: str) -> Rule:
    """Return the early-exit rule of this name; ValueError if there is none, or it is no subclass of `Rule`."""
    rule = _RULES.get(name)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise ValueError(f"Rule {name!r} is {rule!r:.100}; allowed is a subclass of timm_selfdistill.early_exit.Rule.")
    return rule()


@register_rule("max-softmax")
class _MaxSoftmax(Rule):
    """The probability of the most likely class."""

    def confidence(self, logits: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        return logits.softmax(-1).amax(-1), ()


@register_rule("margin")
class _Margin(Rule):
    """The probability of the most likely class minus that of the second."""

    def confidence(self, logits: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        first, second = logits.softmax(-1).topk(2).values.unbind(-1)
        return first - second, ()


@register_rule("entropy")
class _Entropy(Rule):
    """One minus the entropy of the softmax as a share of the largest possible.

    Paper: "BranchyNet", https://arxiv.org/abs/1709.01686
    """

    def confidence(self, logits: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        # Rounding may make it a little larger than the largest possible.
        return (1 - entropy / math.log(logits.shape[-1])).clamp(min=0), ()


@register_rule("patience")
class _Patience(Rule):
    """How many exits in a row, up to this one, gave the class that the one before them gave: 0, 1, 2, ...

    Paper: "BERT Loses Patience", https://arxiv.org/abs/2006.04152
    """

    highest = math.inf
    discrete = True
    uses_temperatures = False
    keeps_state = True

    def confidence(self, logits: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        predicted = logits.argmax(-1)
        count = torch.zeros_like(predicted)
        if state:
            before, agreeing = state
            count = torch.where(predicted == before, agreeing + 1, 0)
        return torch.where(logits.amax(-1).isfinite(), count.to(logits.dtype), math.nan), (predicted, count)


@dataclass(frozen=True)
class EarlyExitConfig:
    """The settings of early exit: an image leaves at the first exit whose confidence reaches the exit's threshold.

    Args:
        thresholds: One for each added exit, shallow to deep, in the rule's range; infinity lets no image leave there.
        rule: What confidence is, a name of `list_rules`. "max-softmax": the largest probability; "margin": the largest
            minus the second; "entropy": 1 minus the entropy as a share of the largest possible, all 0 to 1; "patience":
            how many exits in a row agreed with the one before, 0 at the first.
        temperatures: What each exit's logits are divided by first; 1 by default.
        fallback: Who answers for images that left at no exit: "last", the backbone's own classifier, or "ensemble", the
            model's `ensemble` of all exits.
        running_ensemble: Whether exit k answers, and decides, with the ensemble of the exits 0 to k in place of its own
            logits; the temperatures are then those of these ensembles.
        costs: What the parts of the network take on the machine that runs it, measured by `EarlyExit.measure`: what is
            left of a batch then runs on alone only where that saves more than it costs. No answer depends on them.

    Raises:
        ValueError: If a value is not allowed.
    """

    thresholds: tuple[float, ...]
    rule: str = "max-softmax"
    temperatures: tuple[float, ...] | None = None
    fallback: str = "last"
    running_ensemble: bool = False
    costs: StageCosts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or len(self.rule) > 100:
            raise ValueError(f"rule is {self.rule!r:.100}; allowed are {', '.join(list_rules())}.")
        lowest, highest = self.rule_object.lowest, self.rule_object.highest
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback is {self.fallback!r:.100}; allowed are {', '.join(FALLBACKS)}.")
        if not isinstance(self.running_ensemble, bool):
            raise ValueError(f"running_ensemble is {self.running_ensemble!r:.100}; allowed are true and false.")
        if not all(_is_number(value) and value > -math.inf for value in self.thresholds):
            raise ValueError(f"thresholds are {list(self.thresholds)!r:.300}; allowed are numbers, infinity for never.")
        if any(value < lowest - ROUNDING or highest + ROUNDING < value < math.inf for value in self.thresholds):
            bounds = f"{lowest:g} or more" if highest == math.inf else f"from {lowest:g}, always, to {highest:g}"
            raise ValueError(
                f"thresholds are {list(self.thresholds)!r:.300}; with the rule {self.rule} allowed are numbers "
                f"{bounds}, and infinity for never."
            )
        if self.costs is not None and len(self.costs.heads) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds, but costs of {len(self.costs.heads)} exits.")
        if self.temperatures is None:
            return
        if len(self.temperatures) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds, but {len(self.temperatures)} temperatures.")
        if not all(_is_number(value) and 0 < value < math.inf for value in self.temperatures):
            raise ValueError(f"temperatures are {list(self.temperatures)!r:.300}; allowed are finite numbers above 0.")

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "EarlyExitConfig":
        """Return the settings that `to_json` gave; ValueError if a key or a value is not allowed."""
        names = {field.name for field in fields(cls)}
        # What was saved before there were running ensembles and costs does not name them.
        if not isinstance(saved, Mapping) or set(saved) | {"running_ensemble", "costs"} != names:
            raise ValueError(f"it is {saved!r:.300}; it must be an object with the keys {', '.join(sorted(names))}.")
        thresholds, temperatures = saved["thresholds"], saved["temperatures"]
        if not isinstance(thresholds, list) or not isinstance(temperatures, list | None):
            raise ValueError(
                f"thresholds are {thresholds!r:.300} and temperatures {temperatures!r:.300}; allowed are lists "
                "of numbers, for temperatures also null."
            )
        thresholds = tuple(math.inf if value is None else value for value in thresholds)
        temperatures = None if temperatures is None else tuple(temperatures)
        costs = None if saved.get("costs") is None else StageCosts.from_json(saved["costs"])
        return cls(**{**saved, "thresholds": thresholds, "temperatures": temperatures, "costs": costs})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON, where null stands for a threshold of infinity."""
        thresholds = [None if value == math.inf else value for value in self.thresholds]
        temperatures = None if self.temperatures is None else list(self.temperatures)
        costs = {} if self.costs is None else {"costs": self.costs.to_json()}
        rest = {name: value for name, value in asdict(self).items() if name != "costs"}
        return {**rest, "thresholds": thresholds, "temperatures": temperatures, **costs}

    @cached_property
    def rule_object(self) -> Rule:
        """The rule that is registered as `rule`."""
        return get_rule(self.rule)

    def check_exits(self, names: Sequence[str]) -> None:
        """Raise ValueError unless there is one threshold for each of these exits."""
        if len(self.thresholds) != len(names):
            raise ValueError(
                f"{len(self.thresholds)} thresholds for {len(names)} exits ({', '.join(names)}): give one for each."
            )

    def runs_head(self, exit: int) -> bool:
        """Whether an exit's head runs on the images that reach it: whether its logits can change any answer."""
        with_later = self.running_ensemble or self.rule_object.keeps_state
        deciding = self.thresholds[exit:] if with_later else self.thresholds[exit : exit + 1]
        return min(deciding) < math.inf or self.fallback == "ensemble"

    @cached_property
    def heads_run(self) -> tuple[bool, ...]:
        """For each exit, whether its head runs on the images that reach it."""
        return tuple(map(self.runs_head, range(len(self.thresholds))))

    @cached_property
    def runs_heads(self) -> bool:
        """Whether any head runs."""
        return any(self.heads_run)

    @property
    def combines(self) -> bool:
        """Whether answers are made of the logits of several exits."""
        return self.running_ensemble or self.fallback == "ensemble"

    def confidence(self, logits: Tensor, exit: int, state: RuleState) -> tuple[Tensor, RuleState]:
        """Return an exit's confidence [B] in its logits [B, C], and the rule's state for the next exit."""
        # In half precision, a large probability would be rounded to 1.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperatures is not None:
            logits = logits / self.temperatures[exit]
        return self.rule_object.confidence(logits, state)


def reaches(confidence: Any, threshold: Tensor | float) -> Any:
    """Whether images leave at a threshold, as a tensor or array like the confidence.

    They never do where the confidence is NaN or infinite.
    """
    return (confidence >= threshold) & (confidence < math.inf)


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold, and not NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == math.inf or abs(value) <= sys.float_info.max
