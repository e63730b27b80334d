"""Names of splits, files and classes: how they are compared, checked and shown in messages."""

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from timm_selfdistill.recipe import DataSection

# Names of split folders in lower case, and the split that each is.
STANDARD_SPLITS: Final = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}

_NAMED = 5

Indices = NDArray[np.int64]


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): some systems store an `é` as one character, others as two."""
    return unicodedata.normalize("NFC", name)


def quoted(names: Iterable[str]) -> str:
    """Return the first names as Python writes them, so that none can act on a terminal."""
    return listed(map(repr, names))


def listed(names: Iterable[str]) -> str:
    """Return the first names, divided by commas."""
    first = list(islice(names, _NAMED + 1))
    return ", ".join([*first[:_NAMED], *(["..."] if len(first) > _NAMED else [])])


def with_similar(name: str, known: Iterable[str]) -> str:
    """Return a name, quoted, and the known one that is like it, if any: "'Dog' (is it 'dog'?)"."""
    by_lower = {other.casefold(): other for other in known}
    similar = difflib.get_close_matches(name.casefold(), by_lower, 1)
    return f"{name!r} (is it {by_lower[similar[0]]!r}?)" if similar else repr(name)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not joined or torch.distributed.get_rank() == 0


def warn_first(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning in the first process only, where all processes see the same."""
    if is_first_process():
        logger.warning(message, *args)


def split_name(name: str) -> str:
    """Return the split that a name means: "train", "validation", "test" or the name itself."""
    name = normalized(name)
    return STANDARD_SPLITS.get(name.casefold(), name)


def find_split(wanted: str, available: Iterable[str]) -> str | None:
    """Return the split of that name, or the one that means the same in any case; None if there is none."""
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


def used_of(available: Iterable[str], section: DataSection) -> set[str | None]:
    """Return which of the splits that there are a recipe uses, and None if one is missing."""
    available = list(available)
    return {find_split(name, available) for name in used_splits(section).values()}


def is_split(folder: str, section: DataSection) -> bool:
    """Whether a folder is a split by its name: a usual one or one of the recipe's, in any case."""
    return find_split(folder, (*STANDARD_SPLITS.values(), *used_splits(section).values())) is not None


def resolve_splits(section: DataSection, available: Iterable[str], hint: str = "") -> DataSection:
    """Return the data section with the splits named as in the data set; `hint` ends the message of a missing one."""
    available = list(available)
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for key, wanted in used_splits(section).items():
        name = find_split(wanted, available)
        if name is None:
            missing[f"data.{key}"] = with_similar(wanted, available)
            continue
        for other, taken in found.items():
            # `evaluate` names the training split by the same name, as nothing is trained.
            if name == taken and wanted != getattr(section, other):
                raise ValueError(
                    f"data.{other} {getattr(section, other)!r} and data.{key} {wanted!r} are one split of "
                    f"{section.path}, {name!r}: name two."
                )
        found[key] = name
    if missing:
        raise ValueError(
            f"{section.path} has no split {' and no split '.join(missing.values())}; it has {', '.join(available)}. "
            f"{' and '.join(missing)} can name another one; without a split for evaluation, data.eval_fraction holds "
            f"out a share of train.{hint}"
        )
    return section.model_copy(update=found)


def split_of_file(file: Path, section: DataSection) -> str | None:
    """Return the split that a file is named by, the letters before the first other sign: train-0001.tar is "train"."""
    found = re.match(r"[^\W\d_]+", file.name)
    name = split_name(found[0]) if found else ""
    if name in STANDARD_SPLITS.values():
        return name
    used = used_splits(section).values()
    return find_split(file.name.split(".")[0], used) or find_split(name, used)


def files_by_split(files: Sequence[Path], section: DataSection) -> dict[str, list[Path]]:
    """Return the files of each split: by their names if all are named by splits; otherwise all are "train"."""
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(split_of_file(file, section), []).append(file)
    if len(found) == 1:
        words = {STANDARD_SPLITS.get(word) for file in files for word in re.split(r"[\W\d_]+", file.name.lower())}
        if None in found and len(words - {None}) > 1:
            raise ValueError(
                f"The files {files[0].name}, ..., {files[-1].name} name several splits, but not at the beginning of "
                "their names, where it counts: rename them (train-..., test-...), or give a pattern of one split."
            )
        return {"train": list(files)}
    if None in found:
        raise ValueError(
            f"Of the {len(files)} files of {section.path}, some are named by a split and others are not: "
            f"{', '.join(of_split[0].name for of_split in found.values())}."
        )
    return {name: of_split for name, of_split in found.items() if name is not None}
