"""What early exit answers, and what it computes, for images whose logits are known."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_selfdistill.early_exit.rules import EarlyExitConfig, RuleState, reaches
from timm_selfdistill.model import Ensemble


class EarlyExitOutput(NamedTuple):
    """The answers of a network with early exit, in the order of the input.

    Attributes:
        logits: Logits [B, num_classes].
        exit_index: Which exit gave them [B], int64, 0 the shallowest; K, the number of added exits, stands for the
            fallback: the backbone's own classifier, or the ensemble.
    """

    logits: Tensor
    exit_index: Tensor


def replay(config: EarlyExitConfig, logits: Tensor, ensemble: Ensemble | None = None) -> EarlyExitOutput:
    """Return what `EarlyExit` with these settings answers for images whose logits are known.

    Args:
        config: The settings.
        logits: Logits [K + 1, N, C] of all exits.
        ensemble: The model's; the mean by default.

    Returns:
        Logits [N, C] and the exits that gave them [N]: those of `EarlyExit`, to rounding.

    Raises:
        ValueError: If there is not one threshold for each exit.
    """
    config.check_exits([str(index) for index in range(len(logits) - 1)])
    answers = exit_answers(config, logits, ensemble)
    index = first_confident(exit_confidence(answers, config), config.thresholds)
    return EarlyExitOutput(answers[index, torch.arange(len(index))], index)


def exit_answers(config: EarlyExitConfig, logits: Tensor, ensemble: Ensemble | None = None) -> Tensor:
    """Return what each exit answers [K + 1, N, C] under the settings, the last in place of all that let no image leave.

    Args:
        config: The settings; thresholds and temperatures do not count.
        logits: Logits [K + 1, N, C] of all exits.
        ensemble: The model's; the mean by default.
    """
    ensemble = ensemble or Ensemble.mean(len(logits))
    early = running_ensembles(logits, ensemble)[:-1] if config.running_ensemble else logits[:-1]
    last = ensemble(logits) if config.fallback == "ensemble" else logits[-1]
    return torch.cat([early, last.unsqueeze(0)])


def running_ensembles(logits: Tensor, ensemble: Ensemble) -> Tensor:
    """Return the logits [K + 1, N, C] of the ensembles of the exits 0 to k, from those of all exits."""
    return torch.stack([ensemble.prefix(index)(logits[: index + 1]) for index in range(len(logits))])


def exit_confidence(logits: Tensor, config: EarlyExitConfig) -> Tensor:
    """Return the confidence of every exit for every image [K, N] from logits [K + 1, N, C], whatever the thresholds."""
    state: RuleState = ()
    rows = []
    for index in range(len(logits) - 1):
        confidence, state = config.confidence(logits[index], index, state)
        rows.append(confidence)
    return torch.stack(rows)


def first_confident(confidence: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the first exit whose confidence [K, N] reaches its threshold for each image [N], K where none does."""
    # In the precision of the confidence, as a comparison with a number is.
    reached = reaches(confidence, torch.tensor(thresholds, dtype=confidence.dtype).unsqueeze(1))
    return torch.cat([reached, torch.ones_like(reached[:1])]).to(torch.uint8).argmax(0)
