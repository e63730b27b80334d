"""Read a folder of images: which folders are splits, which are classes, and which files are images."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from timm_selfdistill.data.decode import begins_like_image, image_endings
from timm_selfdistill.data.file_rows import FileSplit, Splits, check_no_shared_images, rows_of_files
from timm_selfdistill.data.names import (
    STANDARD_SPLITS,
    find_split,
    is_split,
    listed,
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

_VECTOR = (".ai", ".emf", ".eps", ".epsf", ".epsi", ".pdf", ".ps", ".svg", ".svgz", ".wmf")
# What stands beside images; files with other unknown endings are looked into.
_NO_IMAGE = (
    *(".cfg", ".csv", ".db", ".h5", ".hdf", ".hdf5", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".log"),
    *(".mat", ".md", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".pth", ".py", ".rst", ".rtf", ".toml", ".tsv"),
    *(".txt", ".xlsx", ".xml", ".yaml", ".yml"),
)
# Made by systems and programs; so are all names that begin with a dot.
_HIDDEN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
_NAMED = 3

# A vector format is drawn by other programs.
Kind = Literal["image", "vector format", "not an image", "unknown"]
# A pipe, device, socket or broken link is "not a file"; "read already", a link to a folder that is read anyway.
Reason = Literal[Kind, "hidden", "not a file", "read already", "beside the splits"]


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
    folders, images = _read_level(root, scan)
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
    if read and not any(chain.from_iterable(by_class.values() for by_class in read.values())):
        found = scan.describe(root)
        raise ValueError(f"There is no image in {quoted(by_split.values())}{f', but {found}' if found else ''}.")
    section = resolve_splits(section, by_split, hint)
    splits = {name: read[name] for name in dict.fromkeys(used_splits(section).values())}
    if unused := [name for name in by_split if name not in splits]:
        notes.append(f"not used: {quoted(unused)}")
    class_names = _class_names(splits, section, by_split)
    files = {}
    for name, by_class in splits.items():
        paths = [by_class.get(class_name, []) for class_name in class_names]
        targets = np.repeat(np.arange(len(paths)), list(map(len, paths)))
        files[name] = FileSplit(list(chain.from_iterable(paths)), targets)
    if scan.links or section.check_duplicates:
        check_no_shared_images(files, root, compare_bytes=section.check_duplicates)
    if unexpected := scan.describe(root, expected=False):
        warn_first("Left out of %s: %s.", root, unexpected)
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
        inside = _folders_in(path)
        if any(holds_image(os.path.join(path, name)) for name in inside):
            raise ValueError(
                f"{root!r} holds the folder {os.path.basename(path)!r}, which looks like a split of class folders "
                f"({quoted(inside)}), and beside it {quoted(with_images)}, named like no split. If those are not data, "
                "move them away; if they are splits, name them in data.train_split, data.eval_split or "
                f"data.validation; if all are classes, rename {os.path.basename(path)!r}."
            )
    return None


def _images_by_class(folder: str, scan: "FolderScan") -> dict[str, list[str]]:
    """Return the images of a split by class, which is the folder that each must be in."""
    classes, stray = _read_level(folder, scan)
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


def _class_names(
    splits: Mapping[str, Mapping[str, list[str]]], section: DataSection, by_split: Mapping[str, str]
) -> list[str]:
    """Return the names of the classes, sorted, after a check that every split has images of these classes only."""
    present = {split: {name for name, paths in by_class.items() if paths} for split, by_class in splits.items()}
    for split, held in present.items():
        if not held:
            raise ValueError(f"Split {split!r} of {section.path} is empty: there is no image in {by_split[split]!r}.")
    names, folder = set(splits[section.train_split]), by_split[section.train_split]
    if section.allow_empty_classes and "train" in by_split:
        names |= set(map(normalized, _folders_in(by_split["train"])))
    class_names = sorted(names)
    if len(class_names) < 2:
        only = _folders_in(folder)[0]
        inside = _folders_in(os.path.join(folder, only))
        hint = f" If {quoted(inside)} in it are what you mean, set data.path one folder deeper." if inside else ""
        raise ValueError(
            f"The folder {folder!r} holds one class folder only ({only!r}); 2 classes are needed, each a folder "
            f"of its own ({os.path.join(folder, 'CLASS', 'IMAGE')!r}).{hint}"
        )
    for split, held in present.items():
        if unknown := sorted(held - names):
            raise ValueError(
                f"Split {split!r} has {len(unknown)} class folder(s) that the training split {section.train_split!r} "
                f"has not: {listed(with_similar(other, class_names) for other in unknown)}. The training split has "
                f"{quoted(class_names)}."
            )
    empty = sorted(names - present[section.train_split])
    if empty and not section.allow_empty_classes:
        first, scan = os.path.join(folder, empty[0]), FolderScan()
        if os.path.isdir(first):  # its name may be stored with decomposed characters
            find_images(first, scan)
        raise ValueError(
            f"{len(empty)} class(es) have no image in the training split {section.train_split!r}: {quoted(empty)} "
            f"({first!r} holds {scan.describe(folder) or 'nothing'}). Add images or remove the folder, "
            "or set data.allow_empty_classes=true to go on."
        )
    return class_names


def _folders_in(folder: str) -> list[str]:
    return _read_level(folder, FolderScan())[0]


class FolderScan:
    """What a scan leaves out: the count of each reason and its first paths; and whether it met links."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.first: defaultdict[Reason, list[str]] = defaultdict(list)
        self.links = False

    def leave_out(self, reason: Reason, path: str) -> None:
        """Count a path."""
        self.counts[reason] += 1
        if len(self.first[reason]) < _NAMED:
            self.first[reason].append(path)

    def describe(self, root: str, *, expected: bool | None = None) -> str:
        """Return, for example, "2 unknown ('cat/a.bin', 'cat/b.bin'), 1 hidden ('.DS_Store')", with paths below `root`.

        With `expected`, only what is normal beside images (True) or only the rest (False) is told.
        """
        parts = []
        for reason, count in sorted(self.counts.items()):
            if expected is None or expected == (reason in ("not an image", "hidden")):
                names = ", ".join(repr(os.path.relpath(path, root)) for path in self.first[reason])
                parts.append(f"{count} {reason} ({names}{', ...' if count > _NAMED else ''})")
        return ", ".join(parts)


def find_images(folder: str, scan: FolderScan) -> list[str]:
    """Return the images of a folder and of all folders in it, in the order of their names; links are followed.

    A file is opened only if its ending is unknown, and then only if it is a regular file. What is left out is added to
    the scan. A folder that cannot be read and a name that is not UTF-8 are ValueErrors.
    """
    return list(chain.from_iterable(_images_by_folder(folder, scan)))


def holds_image(folder: str) -> bool:
    """Whether there is an image in a folder or in one inside it."""
    return any(_images_by_folder(folder, FolderScan()))


def _images_by_folder(folder: str, scan: FolderScan) -> Iterator[list[str]]:
    """Yield the images of a folder, then those of each folder in it."""
    # A link to one of the folders above would lead out of the folder and into it again.
    seen = {
        _identity(path) for full in (os.path.abspath(folder), os.path.realpath(folder)) for path in Path(full).parents
    }
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if (identity := _identity(path)) in seen:
            scan.leave_out("read already", path)
            continue
        seen.add(identity)
        folders, images = _read_level(path, scan)
        prefix = os.path.join(path, "")
        yield [prefix + name for name in images]
        waiting += [prefix + name for name in reversed(folders)]


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever links lead to it: its device and inode."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise ValueError(f"The folder {str(folder)!r} cannot be read: {error.strerror or error}.") from error
    return status.st_dev, status.st_ino


def _read_level(folder: str, scan: FolderScan) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the images directly in a folder, sorted; as `find_images`."""
    prefix = os.path.join(folder, "")
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=attrgetter("name")):
                name = entry.name
                # The system tells what an entry is along with its name; only for a link is there another call.
                if name[0] == "." or name in _HIDDEN:
                    scan.leave_out("hidden", prefix + name)
                elif entry.is_dir():
                    folders.append(name)
                    scan.links |= entry.is_symlink()
                elif not entry.is_file():
                    scan.leave_out("not a file", prefix + name)
                elif (kind := _kind(prefix + name)) == "image":
                    images.append(name)
                    scan.links |= entry.is_symlink()
                else:
                    scan.leave_out(kind, prefix + name)
    except OSError as error:
        raise ValueError(f"The folder {folder!r} cannot be read: {error.strerror or error}.") from error
    try:
        "".join((*folders, *images)).encode()
    except UnicodeEncodeError:  # no table can hold such a name
        wrong = next(name for name in (*folders, *images) if any("\ud800" <= letter <= "\udfff" for letter in name))
        raise ValueError(f"The name {os.fsencode(prefix + wrong)!r} is not UTF-8: rename it.") from None
    return folders, images


def _kind(path: str) -> Kind:
    """Return what a regular file is, looking into it if its ending does not tell."""
    ending = os.path.splitext(path)[1].lower()
    if ending in _VECTOR:
        return "vector format"
    if ending in image_endings():
        return "image"
    if ending in _NO_IMAGE:
        return "not an image"
    return "image" if begins_like_image(path) else "unknown"
