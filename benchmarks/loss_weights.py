"""Compare losses that weigh their own terms with one of fixed weights, as `timm-selfdistill compare` does.

Run from the repository root, with the package installed: python benchmarks/loss_weights.py RECIPE [key=value ...]
What each loss does is told in benchmarks/README.md.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_selfdistill as sd
from timm_selfdistill.compare import main

KD_WEIGHT, TEMPERATURE = 0.1, 3.0  # of the preset byot-iccv2019
LOSSES = ("fixed-weights", "learned-weights", "balanced-gradients")


class SelfWeighted(nn.Module):
    """The cross-entropies and divergences of byot-iccv2019, without hints; a subclass weighs the outputs."""

    needs_exits = True

    def forward(self, out: sd.ExitOutput, target: Tensor) -> dict[str, Tensor]:
        """Return the loss, and what each output has of it, unweighted."""
        logits = torch.stack(out.logits).float()
        with torch.autocast(target.device.type, enabled=False):
            teacher = (logits[-1].detach() / TEMPERATURE).softmax(-1)
            losses = [(1 - KD_WEIGHT) * F.cross_entropy(student, target) for student in logits[:-1]]
            for index, student in enumerate(logits[:-1] / TEMPERATURE):
                divergence = F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean")
                losses[index] = losses[index] + KD_WEIGHT * TEMPERATURE**2 * divergence
            losses.append(F.cross_entropy(logits[-1], target))
            total = self.weigh(torch.stack(losses), logits)
        return {"loss": total, **{f"loss/{index}": loss.detach() for index, loss in enumerate(losses)}}

    def weigh(self, losses: Tensor, logits: Tensor) -> Tensor:
        """Return the sum of losses [K + 1] of logits [K + 1, B, C], shallow to deep."""
        return losses.sum()


@sd.register_loss("fixed-weights")
class FixedWeights(SelfWeighted):
    """Each output weighs as much as the others."""


@sd.register_loss("learned-weights")
class LearnedWeights(SelfWeighted):
    """Each output has the weight exp(-s) of a learned s, which costs s / 2; all of it is divided by the mean weight.

    The division has no gradient. Without it the loss would shrink to a fraction, and the learning rate with it.

    Paper: "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", CVPR 2018,
    https://arxiv.org/abs/1705.07115.

    Args:
        num_exits: K.
    """

    def __init__(self, num_exits: int = 3) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_exits + 1))

    def weigh(self, losses: Tensor, logits: Tensor) -> Tensor:
        """As the base class."""
        weights = (-self.log_variances).exp()
        return (weights * losses + self.log_variances / 2).sum() / weights.mean().detach()


@sd.register_loss("balanced-gradients")
class BalancedGradients(SelfWeighted):
    """Each output has the weight with which its gradient, at its logits, is as long as that of the deepest."""

    def weigh(self, losses: Tensor, logits: Tensor) -> Tensor:
        """As the base class."""
        (gradients,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        lengths = gradients.flatten(1).norm(dim=1)
        return (lengths[-1] / lengths.clamp(min=1e-12) * losses).sum()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.startswith("--losses") for argument in arguments):
        arguments += ["--losses", ",".join(LOSSES)]
    sys.exit(main(arguments))
