"""What a model says of a whole split, and what early exit would make of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from timm_selfdistill.early_exit import EarlyExitConfig, EarlyExitOutput
from timm_selfdistill.early_exit.settings import State
from timm_selfdistill.metrics import IGNORED
from timm_selfdistill.model import Ensemble, SelfDistillModel


@dataclass(frozen=True, eq=False)
class ExitLogits:
    """The logits of every exit for every image of a split.

    Args:
        logits: Logits [K + 1, N, C], shallow to deep, the last the backbone's own.
        targets: Class indices [N].
        num_skipped: How many images more there are that could not be decoded.
        ensemble: How the logits become one answer; their mean by default.

    Raises:
        ValueError: If there are no images, no exits or less than two classes, shapes do not fit, or a target is no
            class.
    """

    logits: Tensor
    targets: Tensor
    num_skipped: int = 0
    ensemble: Ensemble | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.targets.shape != self.logits.shape[1:2]:
            raise ValueError(
                "Expected logits [K + 1, N, num_classes] and class indices [N]; "
                f"got {list(self.logits.shape)} and {list(self.targets.shape)}."
            )
        outputs, images, classes = self.logits.shape
        if outputs < 2 or classes < 2:
            raise ValueError(f"Early exit needs an added exit and 2 classes; got {outputs - 1} and {classes}.")
        if not images:
            raise ValueError(f"There are no images to calibrate on ({self.num_skipped} could not be decoded).")
        if self.targets.min() < 0 or self.targets.max() >= classes:
            raise ValueError(
                f"The model has {classes} classes, so targets must lie in 0..{classes - 1}; "
                f"got {int(self.targets.min())} to {int(self.targets.max())}."
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_exits(self) -> int:
        """Number K of added exits."""
        return len(self.logits) - 1

    @property
    def correct(self) -> Tensor:
        """Whether each exit is right [K + 1, N]; logits that are not a number never are."""
        return _right(self.logits, self.targets)

    @property
    def ensemble_correct(self) -> Tensor:
        """Whether the ensemble is right [N]."""
        return _right(_together(self.logits, self.ensemble), self.targets)

    def select(self, rows: Tensor) -> "ExitLogits":
        """Return the images at these places."""
        return ExitLogits(self.logits[:, rows], self.targets[rows], ensemble=self.ensemble)


@torch.no_grad()
def collect_logits(model: SelfDistillModel, loader: Iterable[tuple[Tensor, Tensor]], title: str = "run") -> ExitLogits:
    """Run a model over a split once.

    Args:
        model: The wrapped model; left in eval mode.
        loader: Batches (images [B, C, H, W], targets [B]); targets IGNORED are left out.
        title: Shown by the progress bar.

    Returns:
        The logits, on the CPU and in the model's own precision.

    Raises:
        ValueError: If the split has no images, or a target is none of the model's classes.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = [torch.empty(model.num_exits + 1, 0, model.num_classes)]
    targets = [torch.empty(0, dtype=torch.int64)]
    num_skipped = 0
    for images, labels in tqdm(loader, desc=title, leave=False):
        out = torch.stack(model(images.to(device), return_exits=True).logits).cpu()
        known = labels.cpu() != IGNORED
        logits.append(out[:, known])
        targets.append(labels.cpu()[known].long())
        num_skipped += int((~known).sum())
    return ExitLogits(torch.cat(logits[1:] or logits, 1), torch.cat(targets), num_skipped, model.ensemble)


def confidences(logits: Tensor, config: EarlyExitConfig) -> Tensor:
    """Return how sure every exit is of every image [K, N], whatever the thresholds; NaN where logits are no numbers.

    Args:
        logits: Logits [K + 1, N, C].
        config: The rule and the temperatures.
    """
    state: State = ()
    rows = []
    for exit in range(len(logits) - 1):
        confidence, state = config.confidence(logits[exit], exit, state)
        rows.append(confidence)
    return torch.stack(rows)


def first_sure(confidence: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the first exit that is sure of each image [N], K where none is.

    Args:
        confidence: How sure every exit is [K, N].
        thresholds: K thresholds.
    """
    # In the precision of the confidence, as a comparison with a number is.
    sure = confidence >= torch.tensor(thresholds, dtype=confidence.dtype).unsqueeze(1)
    return torch.cat([sure, torch.ones_like(sure[:1])]).to(torch.uint8).argmax(0)


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
    config.check_exits([str(exit) for exit in range(len(logits) - 1)])
    index = first_sure(confidences(logits, config), config.thresholds)
    last = _together(logits, ensemble) if config.fallback == "ensemble" else logits[-1]
    answers = torch.cat([logits[:-1], last.unsqueeze(0)])
    return EarlyExitOutput(answers[index, torch.arange(len(index))], index)


def _together(logits: Tensor, ensemble: Ensemble | None) -> Tensor:
    return (ensemble or Ensemble.mean(len(logits)))(logits)


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each of the logits [..., N, C] is right [..., N]."""
    return (logits.argmax(-1) == targets) & ~logits.softmax(-1).amax(-1).isnan()
