"""A teacher from outside: a trained model that sees the same images and answers for exits and backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from timm_selfdistill.losses.divergences import bind_divergence
from timm_selfdistill.losses.protocol import stack
from timm_selfdistill.model import ExitOutput, SelfDistillModel
from timm_selfdistill.model.timm_models import check_size, create_backbone
from timm_selfdistill.recipe.loss_settings import OutsideTeacherConfig

# What torch has of the interpolations of timm's data configuration; the others are close to these.
_MODES = {"nearest": "nearest-exact", "bicubic": "bicubic", "lanczos": "bicubic"}


class OutsideTeacher:
    """A frozen model that teaches exits, backbone or both, beside any loss; given to a `SelfDistillationTask`.

    It sees the images that the student sees, augmented and mixed alike: they are resized to its own image size with
    its own interpolation, whole, and normalised with its own statistics. It runs once a step, in eval mode, under the
    autocast of the step and without a gradient. Checkpoints, the average of the weights and DDP do not know of it.

    Args:
        model: A model with timm's `pretrained_cfg`, itself, not a copy: it is frozen. Or the name of a timm model,
            which gets its pretrained weights.
        config: How it teaches.
        mean: Per channel, what was subtracted from the student's images; what its `pretrained_cfg` says by default.
        std: Per channel, what they were divided by then; likewise.
        model_kwargs: Further arguments of `timm.create_model` for a model given by name.

    Raises:
        ValueError: If the model or the divergence is unknown, or has no such setting.
    """

    def __init__(
        self,
        model: str | nn.Module,
        config: OutsideTeacherConfig | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            kwargs = dict(model_kwargs or {})
            check_size(model, kwargs)
            found: nn.Module = create_backbone(model, True, kwargs)
        elif model_kwargs:
            raise ValueError("model_kwargs create a teacher from its name, but a model is given.")
        else:
            found = model
        self.model = found.requires_grad_(False).eval()
        self.config = OutsideTeacherConfig() if config is None else config
        self._divergence = bind_divergence(self.config)
        self.data_config = resolve_data_config({}, model=found)
        # The model may have been built for another size than that of `pretrained_cfg`.
        self.data_config |= {"input_size": resolve_input_data_config(found, {"mean": 0.5, "std": 0.5})["input_size"]}
        self._mean, self._std = mean, std
        self._device: torch.device | None = None
        self._tensors: dict[Any, Tensor] = {}

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say how the images of the student are normalised."""
        self._mean, self._std = mean, std

    def check_classes(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        """Raise ValueError if the student has another number of classes, or others where both have names."""
        own = getattr(self.model, "num_classes", num_classes)
        if own != num_classes:
            raise ValueError(
                f"The teacher has {own} classes and the student {num_classes}: it must be a model of the same classes, "
                "fine-tuned to them if need be."
            )
        known = names_of(self.model)
        if names is None or known is None:
            return
        for index, (mine, other) in enumerate(zip(known, names, strict=False)):
            if mine != other:
                raise ValueError(
                    f"Class {index} is {mine!r} for the teacher and {other!r} for the student: it must be a model of "
                    "the same classes in the same order. If these are but other words for them, leave the teacher's "
                    "out, by pretrained_cfg_overlay={label_names: null} in its kwargs."
                )

    def check_student(self, model: SelfDistillModel, exits_run: bool, backbone_trains: bool) -> None:
        """Raise ValueError if a student cannot learn from it."""
        if model is self.model or model.backbone is self.model:
            raise ValueError("The teacher is the student itself; allowed is another model.")
        if self.config.teaches != "backbone" and not exits_run:
            raise ValueError("The teacher teaches exits, which this loss does not run; allowed is teaches='backbone'.")
        if self.config.teaches != "exits" and not backbone_trains:
            raise ValueError("The teacher teaches the backbone, which is frozen; allowed is teaches='exits'.")
        self.check_classes(model.num_classes, names_of(model))
        of_student = resolve_data_config({}, model=model)
        self._mean = of_student["mean"] if self._mean is None else self._mean
        self._std = of_student["std"] if self._std is None else self._std

    def add_terms(
        self, terms: Mapping[str, Tensor], out: ExitOutput, images: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Add what it teaches to the terms of a loss.

        Args:
            terms: The terms, with the key "loss".
            out: Logits [B, C] of K exits and the backbone, or of the backbone alone.
            images: The student's images [B, C, H, W], normalised.
            target: Class indices [B] or class probabilities [B, C], which some divergences read.

        Returns:
            All terms: "loss" with the teacher's share, and "teacher/0" to "teacher/K", of those it teaches, unweighted
            and detached.
        """
        deepest = len(out.logits) - 1
        first = deepest if self.config.teaches == "backbone" else 0
        last = deepest if self.config.teaches == "exits" else deepest + 1
        taught = self.answer(images)
        if taught.shape != out.logits[-1].shape:
            raise ValueError(
                f"The teacher answers {list(taught.shape)} and the student {list(out.logits[-1].shape)}; allowed is "
                "the same number of classes."
            )
        with torch.autocast(images.device.type, enabled=False):
            student = stack(out.logits[first:last])
            values = self._divergence(student, stack([taught]).expand_as(student), target)
            loss = terms["loss"] + self.config.weight * values.sum()
        own = {f"teacher/{index}": value for index, value in enumerate(values.detach().unbind(), first)}
        return {**terms, "loss": loss, **own}

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Return its logits [B, C] for a student's images [B, C, H, W], normalised."""
        if self._device != images.device:
            self.model.to(images.device)
            self._device = images.device
        if self.model.training:
            self.model.eval()
        logits: Tensor = self.model(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Return a student's images as the teacher takes them."""
        own, mean, std = self.data_config, self._mean, self._std
        if mean is None or std is None:
            raise ValueError("How the images are normalised is not known: give mean and std, or call expect().")
        channels, *size = own["input_size"]
        same_size = list(images.shape[2:]) == size
        if same_size and images.shape[1] == channels and (*mean, *std) == (*own["mean"], *own["std"]):
            return images
        images = images * self._per_channel(std, images) + self._per_channel(mean, images)
        if not same_size:
            mode = _MODES.get(own["interpolation"], "bilinear")
            images = F.interpolate(images, size, mode=mode, antialias=mode != "nearest-exact").clamp(0, 1)
        if images.shape[1] == 1:
            images = images.expand(-1, channels, -1, -1)
        return (images - self._per_channel(own["mean"], images)) / self._per_channel(own["std"], images)

    def _per_channel(self, values: Sequence[float], images: Tensor) -> Tensor:
        """Return one number per channel [1, C, 1, 1], kept where the images are, as a copy to a GPU makes it wait."""
        key = tuple(values), images.dtype, images.device
        if key not in self._tensors:
            if len(values) not in (1, images.shape[1]):
                raise ValueError(
                    f"{len(values)} numbers of a mean or standard deviation ({values}) do not fit images of "
                    f"{images.shape[1]} channels: give the teacher mean and std of the student's images."
                )
            self._tensors[key] = torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        return self._tensors[key]


def names_of(model: nn.Module) -> list[str] | None:
    """Return the names of a timm model's classes, or None where it has none, or names of other classes."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    return list(map(str, names)) if isinstance(names, list | tuple) and len(names) == model.num_classes else None
