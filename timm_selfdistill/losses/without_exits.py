"""Self-distillation of the backbone alone, without exits: its own predictions for other images or times teach it."""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_selfdistill.checks import NotNegative, Probability, Temperature, check
from timm_selfdistill.losses.divergences import kl
from timm_selfdistill.losses.protocol import (
    Needs,
    TrainingTime,
    check_entries,
    check_target,
    cross_entropy,
    register_loss,
    stack,
)
from timm_selfdistill.model import ExitOutput, SelfDistillModel


class _WithPrediction(nn.Module):
    """Cross-entropy, and a weighted KL divergence of some of the logits from another prediction for their images."""

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__()
        self.weight: float = check("weight", weight, NotNegative)
        self.temperature: float = check("temperature", temperature, Temperature)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, temperature={self.temperature}"

    def _terms(self, logits: Tensor, target: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        with torch.autocast(target.device.type, enabled=False):
            ce = cross_entropy(logits, target)[0]
            kd = kl(student, teacher, target, temperature=self.temperature, scale=self.temperature**2)[0]
        return {"loss": ce + self.weight * kd, "ce/0": ce.detach(), "kd/0": kd.detach()}


@register_loss("cs-kd")
class CSKD(_WithPrediction):
    """CS-KD: an image's prediction follows that of another image of its class.

    `CE(z, y) + weight T^2 KL(softmax(z' / T) || softmax(z / T))`, each a mean over the batch; z' are the backbone's
    logits for another image of class y, detached.

    Paper: "Regularizing Class-wise Predictions via Self-knowledge Distillation", https://arxiv.org/abs/2003.13964. As
    in its code, the other images run on their own, in training mode and without a gradient, and have no cross-entropy.
    There an image may be its own partner; here only where it is alone in its class.

    Args:
        weight: Weight of the divergence; the paper takes 1, and 3 for fine-grained classes.
        temperature: What logits are divided by before the softmax of the divergence.

    Raises:
        ValueError: If a value is not allowed.
    """

    needs = Needs(exits=False, batches="paired")

    def __init__(self, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__(weight, temperature)

    def forward(self, out: ExitOutput, target: Tensor, *, partners: ExitOutput) -> dict[str, Tensor]:
        """Return "loss", and its terms, unweighted and detached: "ce/0", the cross-entropy, and "kd/0", the divergence.

        Args:
            out: Logits [B, C] of the backbone, as the last entry.
            target: Class indices [B] int64, or class probabilities [B, C] floating.
            partners: The same for other images of these classes, without a gradient.

        Raises:
            ValueError: If a shape or dtype is not as above.
        """
        logits = _last(out, target)
        return self._terms(logits, target, logits, _last(partners, target).detach())


@register_loss("dlb")
class DLB(_WithPrediction):
    """DLB: the prediction for an image follows that of the step before, where it was in the batch too.

    `CE(z, y) + weight T^2 KL(softmax(p / T) || softmax(z / T))`, the CE a mean over the whole batch, the KL over its
    first half: the images that were the second half of the batch before, augmented again, with p the logits they had
    then. In the first step of a training there is no KL.

    Paper: "Self-Distillation from the Last Mini-Batch for Consistency Regularization",
    https://arxiv.org/abs/2203.16172. As in the paper, both halves run as one batch; its code runs them one after the
    other, which only batch norm sees.

    Args:
        weight: Weight of the divergence; the paper takes 1.
        temperature: What logits are divided by before the softmax of the divergence.

    Raises:
        ValueError: If a value is not allowed.
    """

    needs = Needs(exits=False, batches="repeated")

    def __init__(self, weight: float = 1.0, temperature: float = 3.0) -> None:
        super().__init__(weight, temperature)
        self._before: Tensor | None = None

    def forward(self, out: ExitOutput, target: Tensor) -> dict[str, Tensor]:
        """Return what `CSKD` does; in training mode, remember the logits of the second half of the batch.

        Args:
            out: Logits [2B, C] of the backbone, as the last entry; the first half for images of the batch before.
            target: Class indices [2B] int64, or class probabilities [2B, C] floating.

        Raises:
            ValueError: If a shape or dtype is not as above, or the first half is not as long as what was new before.
        """
        logits = _last(out, target)
        repeated, new = logits.chunk(2, dim=1)
        before = repeated.detach() if self._before is None else self._before.to(logits.device)
        if new.shape != repeated.shape or before.shape != repeated.shape:
            raise ValueError(
                f"dlb: {repeated.shape[1]} images of the batch are those of the batch before and {new.shape[1]} are "
                f"new, but the batch before had {before.shape[1]} new ones; allowed are as many each."
            )
        # From a step that was skipped because it was not finite, there is nothing to learn.
        before = torch.where(before.isfinite().all(-1, keepdim=True), before, repeated.detach())
        if self.training:
            self._before = new.detach()
        return self._terms(logits, target, repeated, before)

    def get_extra_state(self) -> Tensor | None:
        return self._before

    def set_extra_state(self, state: Any) -> None:
        self._before = state


@register_loss("ps-kd")
class PSKD(nn.Module):
    """PS-KD: what the model predicted an epoch before softens the target, the more the longer it trains.

    `CE(z, (1 - a) y + a p)`, a mean over the batch; p is the softmax of the backbone's logits with the weights it had
    when the epoch began, for the same augmented image and in eval mode, and a = `alpha` t / T in epoch t of T. In the
    first epoch, the target is y.

    Paper: "Self-Knowledge Distillation with Progressive Refinement of Targets", https://arxiv.org/abs/2006.12000. Its
    code takes for p what the model predicted in training mode when it last saw the image, otherwise augmented, from a
    table of all predictions; here the past model runs again, which costs one forward a step.

    Args:
        alpha: Share of the prediction in the target of the last epoch.

    Raises:
        ValueError: If a value is not allowed.
    """

    needs = Needs(exits=False, past=True, time=True)

    def __init__(self, alpha: float = 0.8) -> None:
        super().__init__()
        self.alpha = check("alpha", alpha, Probability)

    def forward(
        self, out: ExitOutput, target: Tensor, *, past: ExitOutput | None, time: TrainingTime
    ) -> dict[str, Tensor]:
        """Return "loss", and "ce/0", the same detached.

        Args:
            out: Logits [B, C] of the backbone, as the last entry.
            target: Class indices [B] int64, or class probabilities [B, C] floating.
            past: The same with the weights from the start of the epoch; None in the first epoch.
            time: How far training has come.

        Raises:
            ValueError: If a shape or dtype is not as above.
        """
        logits = _last(out, target)
        with torch.autocast(target.device.type, enabled=False):
            if past is not None:
                share = self.alpha * (int(time.epoch) + 1) / time.epochs
                labels = target if target.is_floating_point() else F.one_hot(target, logits.shape[-1])
                predicted = _last(past, target)[0].detach().softmax(-1)
                target = torch.lerp(labels.to(predicted.dtype), predicted, share)
            loss = cross_entropy(logits, target)[0]
        return {"loss": loss, "ce/0": loss.detach()}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class PastModel(nn.Module):
    """A frozen copy of a model, renewed at the start of every epoch but the first; its state can be saved."""

    def __init__(self, model: SelfDistillModel) -> None:
        super().__init__()
        self.model = deepcopy(model).requires_grad_(False).eval()
        self.epoch = 0

    def follow(self, model: SelfDistillModel, epoch: float) -> None:
        """Copy the model's state, if the epochs done, a share of the present one included, make a later epoch."""
        if int(epoch) > self.epoch:
            self.epoch = int(epoch)
            self.model.load_state_dict(model.state_dict())

    def train(self, mode: bool = True) -> "PastModel":
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> ExitOutput | None:
        """Return the logits of the backbone's own classifier for images [B, C, H, W]; None in the first epoch."""
        return ExitOutput((self.model(images),), ()) if self.epoch else None

    def get_extra_state(self) -> int:
        return self.epoch

    def set_extra_state(self, state: Any) -> None:
        self.epoch = state


def _last(out: ExitOutput, target: Tensor) -> Tensor:
    """Return the backbone's logits [1, B, C], which the target must fit."""
    check_entries("logits", "C", out.logits[-1:])
    check_target(target, out.logits[-1].shape)
    return stack(out.logits[-1:])
