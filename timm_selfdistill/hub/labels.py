"""The class names that are saved with a model."""

from timm_selfdistill.model import SelfDistillModel


def class_names(model: SelfDistillModel) -> tuple[str, ...] | None:
    """Return a model's class names in the order of the logits, or None where none were saved with it.

    Raises:
        ValueError: If there is not one for each class.
    """
    names = getattr(model.backbone, "pretrained_cfg", {}).get("label_names")
    if names is None:
        return None
    if not isinstance(names, list | tuple) or len(names) != model.num_classes:
        raise ValueError(f"The model has {model.num_classes} classes, but its label_names are {names!r:.200}.")
    return tuple(map(str, names))
