"""The class names that are saved with a model."""

from collections.abc import Sequence

from timm_selfdistill.model import SelfDistillModel


def class_names(model: SelfDistillModel) -> tuple[str, ...] | None:
    """Return a model's class names in the order of the logits, or None where none were saved with it.

    Names of other classes, which the backbone had before its classifier was replaced, are none of the model's.

    Raises:
        ValueError: If there are more than classes.
    """
    config = getattr(model.backbone, "pretrained_cfg", {})
    names = config.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list | tuple):
        raise ValueError(f"The model's label_names are {names!r:.200}; allowed is a list of names.")
    if model.num_classes not in (len(names), config.get("num_classes", model.num_classes)):
        return None
    return complete_names(tuple(map(str, names)), model.num_classes)


def complete_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return a name for each class: those given, and for the rest, which no data had, their indices.

    Raises:
        ValueError: If there are more names than classes.
    """
    if len(names) > num_classes:
        raise ValueError(
            f"{len(names)} label_names ({', '.join(map(str, names[:5])):.200}, ...) for {num_classes} classes: give at "
            "most one for each."
        )
    given = set(names)
    rest = (str(index) for index in range(len(names), num_classes))
    return (*names, *(name if name not in given else f"class {name}" for name in rest))
