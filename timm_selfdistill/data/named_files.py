"""Files that are called by splits: train.csv, or train-00001.tar and the like."""

import re
from collections.abc import Sequence
from pathlib import Path

from timm_selfdistill.data.split_names import STANDARD_SPLITS, find_split, split_name, used_splits
from timm_selfdistill.recipe import DataSection


def split_of_file(file: Path, section: DataSection) -> str | None:
    """Return the split that a file is named by, the letters before the first other sign: train-0001.tar is "train"."""
    found = re.match(r"[^\W\d_]+", file.name)
    name = split_name(found[0]) if found else ""
    if name in STANDARD_SPLITS.values():
        return name
    return find_split(file.name.split(".")[0], used_splits(section).values()) or find_split(
        name, used_splits(section).values()
    )


def files_by_split(files: Sequence[Path], section: DataSection) -> dict[str, list[Path]]:
    """Return which files are which split: by their names if all are named by splits, else all "train".

    Raises:
        ValueError: If some are named by splits and others not, or the names hold splits where they do not count.
    """
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
