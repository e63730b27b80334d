"""Read a folder of images: which folders are splits, which are classes, and the rows of each split."""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import datasets
import numpy as np

from timm_selfdistill.data.file_rows import FileSplit, Splits, check_no_shared_images, rows_of_files
from timm_selfdistill.data.image_files import FolderScan, find_images, holds_image, read_level
from timm_selfdistill.data.names import (
    STANDARD_SPLITS,
    find_split,
    is_split,
    normalized,
    quoted,
    resolve_splits,
    split_name,
    used_of,
    used_splits,
    warn_first,
    with_similar,
)
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)

_NAMED = 5


def load_image_folder(path: str | Path, section: DataSection) -> Splits | None:
    """Read the splits that a recipe uses from a folder of images: columns "image" and "label" (a `ClassLabel`).

    The folders in it are splits (`train`, `val`, `valid`, `validation` and `test` in any case, and those that the
    recipe names) or, where none or only some have such names, classes of the one split "train". The folders in a split
    are its classes; what is in folders inside a class belongs to the class. Class names are normalised (NFC), and the
    classes are those of the training split, in the order of their names.
    """
    root = os.path.abspath(path)
    if not os.path.isdir(root):
        return None
    scan = FolderScan()
    folders, images = read_level(root, scan)
    by_split = _split_folders(root, folders, section)
    notes, hint = [], ""
    if by_split is None:
        like_splits = [name for name in folders if split_name(name) in STANDARD_SPLITS.values()]
        notes.append(f"read as class folders{f', {quoted(like_splits)} too' if like_splits else ''}")
        hint = f" The folders in it were read as classes ({quoted(folders)}), all of them the split 'train'."
        by_split, scan = {"train": root}, FolderScan()  # the folder is read again, as that of the split
    else:
        for name in images:
            scan.leave_out("beside the splits", os.path.join(root, name))
        if others := [name for name in folders if os.path.join(root, name) not in by_split.values()]:
            notes.append(f"no split and not read: {quoted(others)}")

    used = used_of(by_split, section)
    read = {name: _images_by_class(folder, scan) for name, folder in by_split.items() if hint or name in used}
    if read and not any(map(_present, read.values())):
        found = scan.describe(root)
        raise ValueError(f"There is no image in {quoted(by_split.values())}{f', but {found}' if found else ''}.")
    section = resolve_splits(section, by_split, hint)
    splits = {name: read[name] for name in dict.fromkeys(used_splits(section).values())}
    if unused := [name for name in by_split if name not in splits]:
        notes.append(f"not used: {quoted(unused)}")
    for name, by_class in splits.items():
        if not _present(by_class):
            raise ValueError(f"Split {name!r} of {section.path} is empty: there is no image in {by_split[name]!r}.")
    class_names = _class_names(splits, section, by_split)
    files = {}
    for name, by_class in splits.items():
        paths = [by_class.get(class_name, []) for class_name in class_names]
        targets = np.repeat(np.arange(len(paths)), list(map(len, paths)))
        files[name] = FileSplit(list(chain.from_iterable(paths)), targets)
    if scan.links or section.check_duplicates:
        check_no_shared_images(files, root, compare_bytes=section.check_duplicates)
    if unexpected := scan.describe(root, expected=False):
        warn_first(_logger, "Left out of %s: %s.", root, unexpected)
    if expected := scan.describe(root, expected=True):
        notes.append(f"left out: {expected}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    return Splits(rows_of_files(files, features, section), notes, unused)


def _split_folders(root: str, folders: Sequence[str], section: DataSection) -> dict[str, str] | None:
    """Return the folder of each split, or None where the folders are classes."""
    by_split: dict[str, str] = {}
    for folder in folders:
        if is_split(folder, section):
            name = split_name(folder)
            if (other := find_split(name, by_split)) is not None:
                raise ValueError(
                    f"The folders {os.path.basename(by_split[other])!r} and {folder!r} in {root!r} are both the split "
                    f"{other!r}: make one of them, or move one away."
                )
            by_split[name] = os.path.join(root, folder)
    others = [folder for folder in folders if os.path.join(root, folder) not in by_split.values()]
    # A split of another name is one because the recipe says so.
    if not by_split or not others or not by_split.keys() <= set(STANDARD_SPLITS.values()):
        return by_split or None
    if not (with_images := [name for name in others if holds_image(os.path.join(root, name))]):
        return by_split
    for path in by_split.values():
        inside = read_level(path, FolderScan())[0]
        if any(holds_image(os.path.join(path, name)) for name in inside):
            raise ValueError(
                f"{root!r} holds the folder {os.path.basename(path)!r}, which looks like a split of class folders "
                f"({quoted(inside)}), and beside it {quoted(with_images)}, named like no split. If those are not data, "
                "move them away; if they are splits, name them in data.train_split, data.eval_split or "
                f"data.validation; if all are classes, rename {os.path.basename(path)!r}."
            )
    return None


def _images_by_class(folder: str, scan: FolderScan) -> dict[str, list[str]]:
    """Return the images of a split by class, which is the folder that each must be in."""
    classes, stray = read_level(folder, scan)
    if stray:
        where = f"beside the class folders {quoted(classes)}" if classes else "but no class folders"
        raise ValueError(
            f"The folder {folder!r} holds {len(stray)} image(s) ({quoted(stray)}) {where}: the class of an image is "
            f"the name of its folder, so put each into one ({os.path.join(folder, 'CLASS', stray[0])!r})."
        )
    images: dict[str, list[str]] = {}
    for name in classes:
        # Two folders may have one name, composed and decomposed.
        images.setdefault(normalized(name), []).extend(find_images(os.path.join(folder, name), scan))
    return images


def _present(by_class: Mapping[str, list[str]]) -> set[str]:
    """Return the classes that have images."""
    return {name for name, paths in by_class.items() if paths}


def _class_names(
    splits: Mapping[str, Mapping[str, list[str]]], section: DataSection, by_split: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, sorted, after checking that every split has the same."""
    train, folder = splits[section.train_split], by_split[section.train_split]
    names = set(train)
    if section.allow_empty_classes and "train" in by_split:
        names |= set(map(normalized, read_level(by_split["train"], FolderScan())[0]))
    class_names = sorted(names)
    if len(class_names) < 2:
        (only,) = read_level(folder, FolderScan())[0][:1]
        inside = read_level(os.path.join(folder, only), FolderScan())[0]
        hint = f" If {quoted(inside)} in it are what you mean, set data.path one folder deeper." if inside else ""
        raise ValueError(
            f"The folder {folder!r} holds one class folder only ({only!r}); 2 classes are needed, each a folder "
            f"of its own ({os.path.join(folder, 'CLASS', 'IMAGE')!r}).{hint}"
        )
    for name, by_class in splits.items():
        if unknown := sorted(_present(by_class) - names):
            named = [with_similar(other, class_names) for other in unknown[:_NAMED]]
            raise ValueError(
                f"Split {name!r} has {len(unknown)} class folder(s) that the training split {section.train_split!r} "
                f"has not: {', '.join(named)}{', ...' if len(unknown) > len(named) else ''}. The training split has "
                f"{quoted(class_names)}."
            )
    empty = sorted(names - _present(train))
    if empty and not section.allow_empty_classes:
        first, held = os.path.join(folder, empty[0]), FolderScan()
        if os.path.isdir(first):  # its name may be stored with decomposed characters
            find_images(first, held)
        raise ValueError(
            f"{len(empty)} class(es) have no image in the training split {section.train_split!r}: {quoted(empty)} "
            f"({first!r} holds {held.describe(folder) or 'nothing'}). Add images or remove the folder, "
            "or set data.allow_empty_classes=true to go on."
        )
    return class_names
