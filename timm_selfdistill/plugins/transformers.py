"""transformers: a wrapped model and its loss in the form that `transformers.Trainer` trains and evaluates.

Nothing of transformers is imported here; it is what calls.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.task import Regime, SelfDistillationTask, unwrapped_model


class TrainerModel(nn.Module):
    """A wrapped model that takes pixel values and labels, and returns loss and logits, as Trainer expects.

    In train mode the loss is the self-distillation loss. In eval mode it is the cross-entropy of the backbone's own
    classifier, and the logits of the exits are returned as well.

    Args:
        model: The wrapped model; `sd.save_pretrained(trainer.model.model, folder)` saves it after training.
        criterion: The loss; by default that of `SelfDistillationTask`.
        regime: "joint" trains everything, "frozen" the exits only.

    Attributes:
        model: The wrapped model.

    Raises:
        ValueError: If the loss does not fit the model, or needs what Trainer does not give: the time of the training,
            the average or an earlier state of the weights, or batches of pairs.
    """

    def __init__(self, model: SelfDistillModel, criterion: nn.Module | None = None, regime: Regime = "joint") -> None:
        super().__init__()
        self._task = SelfDistillationTask(model, criterion, regime, verbose=False)
        needs = self._task.needs
        given = {
            "the time of the training": needs.time or needs.gate_fade,
            "the average of the weights": needs.ema,
            "an earlier state of the weights": needs.past,
            f"{needs.batches} batches": needs.batches != "plain",
        }
        if missing := [name for name, needed in given.items() if needed]:
            raise ValueError(
                f"The loss needs {', '.join(missing)}, which transformers' Trainer does not give; allowed are losses "
                "without. `timm-selfdistill train` and a loop around SelfDistillationTask train with this one."
            )

    @property
    def model(self) -> SelfDistillModel:
        return unwrapped_model(self._task.trainable_module)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Classify images and, with labels, compute the loss.

        Args:
            pixel_values: Images [B, C, H, W].
            labels: Class indices [B].

        Returns:
            "loss", with labels; "logits" [B, num_classes] of the backbone's own classifier; in eval mode also
            "exit_logits" [B, K, num_classes] of the added exits, shallow to deep.
        """
        if self.training and labels is not None:
            result = self._task(pixel_values, labels)
            return {"loss": result["loss"], "logits": result["output"]}
        *early, last = self.model(pixel_values, return_exits=True).logits
        result = {"logits": last, "exit_logits": torch.stack(early, 1)}
        return result if labels is None else {"loss": F.cross_entropy(last, labels), **result}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep fewer activations of the backbone, as timm does it; Trainer calls this for `gradient_checkpointing`.

        Args:
            gradient_checkpointing_kwargs: Must be empty: timm decides how.
        """
        if gradient_checkpointing_kwargs:
            raise ValueError(
                f"gradient_checkpointing_kwargs is {dict(gradient_checkpointing_kwargs)}; allowed is none, as the "
                "backbone's own gradient checkpointing takes none."
            )
        self.model.set_grad_checkpointing()


def exit_accuracy(prediction: Any) -> dict[str, float]:
    """Return the top-1 accuracies of a `TrainerModel`, for Trainer's `compute_metrics`.

    Args:
        prediction: A `transformers.EvalPrediction` with the logits [N, C] and [N, K, C] and the labels [N].

    Returns:
        "accuracy" of the backbone's own classifier, "accuracy_exit_0" and so on of the exits, from 0 to 1.
    """
    logits, exit_logits = prediction.predictions
    of_exits = {f"accuracy_exit_{index}": exit_logits[:, index] for index in range(exit_logits.shape[1])}
    return {
        name: float(np.mean(values.argmax(-1) == prediction.label_ids))
        for name, values in {"accuracy": logits, **of_exits}.items()
    }
