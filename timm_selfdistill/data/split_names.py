"""The names of splits: which ones a recipe uses, and which names mean the same split."""

from collections.abc import Iterable
from typing import Final

from timm_selfdistill.data.names import normalized
from timm_selfdistill.recipe import DataSection

# Names of split folders in lower case, and the split that each is.
STANDARD_SPLITS: Final = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def split_name(name: str) -> str:
    """Return the split that a name means: "train", "validation" or "test", or else the name itself."""
    name = normalized(name)
    return STANDARD_SPLITS.get(name.casefold(), name)


def find_split(wanted: str, available: Iterable[str]) -> str | None:
    """Return the split of that name, or else the one that means the same, in any case; None if there is none."""
    available = list(available)
    if wanted in available:
        return wanted
    return next((name for name in available if split_name(name).casefold() == split_name(wanted).casefold()), None)


def used_splits(section: DataSection) -> dict[str, str]:
    """Return the splits that a recipe uses, by the key of its data section that names them."""
    used = {"train_split": section.train_split}
    if section.eval_fraction is None:
        used["eval_split"] = section.eval_split
    if isinstance(section.validation, str):
        used["validation"] = section.validation
    return used


def resolve_splits(section: DataSection, available: Iterable[str], hint: str = "") -> DataSection:
    """Return the data section with the splits named as they are in the data set.

    Args:
        section: The recipe's `data`.
        available: The splits that there are.
        hint: What the message of a missing split adds.

    Raises:
        ValueError: If there is no such split, or two keys name one split by different names.
    """
    available = list(available)
    found: dict[str, str] = {}
    for key, wanted in used_splits(section).items():
        name = find_split(wanted, available)
        if name is None:
            raise ValueError(
                f"{section.path} has no split {wanted!r}; it has {', '.join(available)}. data.{key} can name another "
                f"one; without a split for evaluation, data.eval_fraction holds out a share of train.{hint}"
            )
        for other, taken in found.items():
            # Where only evaluation is wanted, it stands for the training split by the same name.
            if name == taken and wanted != getattr(section, other):
                raise ValueError(
                    f"data.{other} {getattr(section, other)!r} and data.{key} {wanted!r} are one split of "
                    f"{section.path}, {name!r}: name two."
                )
        found[key] = name
    return section.model_copy(update=found)
