"""What is known of a data set: a survey before there is a recipe, and a fingerprint by which a run notices changes."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from timm_selfdistill.compat import stored_positions
from timm_selfdistill.data.decode import read
from timm_selfdistill.data.names import Indices, check_columns, find_split, quoted, split_name, with_columns
from timm_selfdistill.data.sources import FILE_ENDINGS, load_splits
from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit, open_dataset
from timm_selfdistill.recipe import DataSection

_SAMPLE = 64  # images that are looked at
_SEED = 0
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}
_NAMED = 5  # differences that a message names


@dataclass(frozen=True)
class Survey:
    """What is known of a data set.

    Args:
        section: Settings by which a recipe opens it.
        data: The images for training, validation and evaluation.
        splits: The names of all splits there are.
        counts: Training images of each class [C], before any are held out.
        sizes: Width and height in pixels of some training images.
        grey: Whether all of these are without colours.
    """

    section: DataSection
    data: ImageData
    splits: tuple[str, ...]
    counts: Indices
    sizes: tuple[tuple[int, int], ...]
    grey: bool

    @property
    def side(self) -> int:
        """The median of the shorter sides in pixels; 0 if no image could be read."""
        return round(median(map(min, self.sizes))) if self.sizes else 0

    @property
    def imbalance(self) -> float:
        """How many times as many training images the largest class has as the smallest."""
        return float(self.counts.max() / max(1, self.counts.min()))

    @property
    def train(self) -> ImageSplit:
        """The training images."""
        assert isinstance(self.data.train, ImageSplit)  # nothing is streamed
        return self.data.train


def survey(section: DataSection) -> Survey:
    """Look at a data set, and find out which of its splits and columns to use.

    Args:
        section: Its `path`, and what the recipe says of it already; splits and columns are looked for where these have
            their defaults.

    Raises:
        ValueError: If there is no such data set, it cannot be read, or its columns cannot be told.
    """
    # No split but the training one is needed to open it so.
    probe = section.model_copy(update={"validation": 0.0, "eval_fraction": 0.5, "check_duplicates": False})
    found = load_splits(probe)
    names = tuple(dict.fromkeys((*found.rows, *found.unread)))
    train = find_split(section.train_split, names) or (names[0] if len(names) == 1 else section.train_split)
    if train in found.rows and (features := found.rows[train].features) is not None:
        section = with_columns(section, features)
        check_columns(features, train, section)
    section, data = _first_that_opens(section.model_copy(update={"train_split": train}), names)
    # Those that are held out of the training split are counted too.
    own = [part for part in data.by_use().values() if isinstance(part, ImageSplit) and part.name == data.train.name]
    counts = np.bincount(np.concatenate([part.targets for part in own]), minlength=len(data.class_names))
    sizes, grey = _sample_sizes(own[0])
    return Survey(section, data, names, counts, sizes, grey)


def _first_that_opens(section: DataSection, names: Sequence[str]) -> tuple[DataSection, ImageData]:
    """Return the best way to use the splits that works; not all need to, as test splits may lack labels."""
    test, validation = find_split(section.eval_split, names), find_split("validation", names)
    default = DataSection.model_fields["validation"].default
    shares: Sequence[float | str] = (section.validation,) if section.validation != default else (default, 0.2, 0.0)
    ways: list[dict[str, object]] = []
    if test is not None and test != section.train_split:
        if validation is not None and validation != test:
            ways.append({"eval_split": test, "validation": split_name(validation)})
        ways += [{"eval_split": test, "validation": share} for share in shares]
    if validation is not None and validation != section.train_split:
        ways += [{"eval_split": validation, "validation": share} for share in shares]
    ways += [{"eval_fraction": section.eval_fraction or 0.2, "validation": share} for share in shares]
    errors: list[ValueError] = []
    for way in ways:
        choice = section.model_copy(update=way)
        try:
            return choice, open_dataset(choice, _SEED)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _sample_sizes(split: ImageSplit) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Return the sizes of evenly spaced images of a split, as far as they can be read, and whether all are grey."""
    sizes, modes = [], set()
    for place in np.unique(np.linspace(0, len(split) - 1, _SAMPLE).astype(int)).tolist():
        try:
            with Image.open(io.BytesIO(read(split[place]["image"]))) as image:
                sizes.append(image.size)
                modes.add(image.mode)
        except Exception:  # Pillow raises whatever a format's library does; training says what is wrong with an image
            continue
    return tuple(sizes), bool(modes) and modes <= _GREY_MODES


@dataclass(frozen=True)
class SplitFingerprint:
    """What tells whether the images for one use are still the same.

    The digest is that of row, label, size of the stored bytes and path below the folder of all images, of the images
    that are used, in order; for a stream, of what is known without reading it: number of rows, and its files here.
    """

    split: str
    rows: int | None  # of the whole split; None if it is unknown
    per_class: list[int] | None  # of the images that are used; None for a stream
    digest: str


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether a data set is still the same; no content of an image is read for it."""

    classes: list[str]
    uses: dict[str, SplitFingerprint]  # by "training", "validation" and "evaluation", where there are such images

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON and checkpoints can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Return what `to_json` was called on; raise ValueError if it is something else."""
        try:
            return cls(list(value["classes"]), {use: SplitFingerprint(**split) for use, split in value["uses"].items()})
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"The record of the data is damaged: {error!r}.") from error

    def changes(self, now: "Fingerprint") -> list[str]:
        """Return what is different now, each as a short sentence; nothing if the data is the same."""
        if self == now:
            return []
        found = [*_class_changes(self.classes, now.classes), *_size_changes(self, now), *_count_changes(self, now)]
        return found or [
            f"the images for {use} are others, or in another order, by their names, labels or sizes"
            for use in dict.fromkeys((*self.uses, *now.uses))
            if self.uses.get(use) != now.uses.get(use)
        ]


def fingerprint(data: ImageData, section: DataSection) -> Fingerprint:
    """Return what tells whether a data set is still the same; moving it to another folder does not change it."""
    splits = data.by_use()
    columns = {use: _sizes_and_paths(split) for use, split in splits.items() if isinstance(split, ImageSplit)}
    root = _common_folder([paths for _, paths in columns.values()])
    uses: dict[str, SplitFingerprint] = {}
    for use, split in splits.items():
        if isinstance(split, ImageSplit):
            per_class = np.bincount(split.targets, minlength=len(data.class_names)).tolist()
            digest = _digest_of_images(split, *columns[use], len(root))
            uses[use] = SplitFingerprint(split.name, len(split.rows), per_class, digest)
        else:
            uses[use] = SplitFingerprint(split.name, split.size, None, _digest_of_stream(split, section))
    return Fingerprint(list(data.class_names), uses)


def _sizes_and_paths(split: ImageSplit) -> tuple[Indices, Any]:
    """Return the number of stored bytes of each image, -1 for none [N], and its path, empty for none [N].

    The columns are looked at where they are: of stored images, only their places in the file are read.
    """
    column = split.rows.data.column("image")
    taken = stored_positions(split.rows, pa.array(split.indices))
    content, paths = column, None
    if pa.types.is_struct(column.type):
        content, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
    sizes = np.full(len(split), -1, dtype=np.int64)
    if not pa.types.is_null(content.type):
        sizes = pc.fill_null(pc.cast(pc.binary_length(content), pa.int64()), -1).take(taken).to_numpy()
    if paths is None or pa.types.is_null(paths.type):
        return sizes, pa.array([""] * len(split), pa.large_string())
    paths = pc.fill_null(pc.cast(paths, pa.large_string()), "").take(taken)
    return sizes, paths.combine_chunks() if isinstance(paths, pa.ChunkedArray) else paths


def _digest_of_images(split: ImageSplit, sizes: Indices, paths: Any, skipped: int) -> str:
    """Return the digest of all images, without the first characters of each path."""
    relative = pc.utf8_slice_codeunits(paths, skipped)
    # Stored one after the other: where each ends, and all characters.
    _, offsets, characters = relative.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[relative.offset : relative.offset + len(relative) + 1]
    digest = hashlib.sha256()
    for numbers in (split.indices, split.targets, sizes, ends - ends[0]):
        digest.update(numbers.astype(np.int64).tobytes())
    if characters is not None:
        digest.update(memoryview(characters)[int(ends[0]) : int(ends[-1])])
    return digest.hexdigest()


def _common_folder(columns: Sequence[Any]) -> str:
    """Return the folder that all paths lie in, with its last separator, or "" where they are not complete."""
    # What the first and the last in the order of letters have in common, all have.
    extremes = [pc.min_max(paths).as_py() for paths in columns if len(paths)]
    folders = [os.path.dirname(path) for pair in extremes for path in pair.values()]
    return os.path.join(os.path.commonpath(folders), "") if folders and all(map(os.path.isabs, folders)) else ""


def _digest_of_stream(split: StreamSplit, section: DataSection) -> str:
    path = Path(section.path)
    folder = path if path.is_dir() else path.parent
    found = path.rglob("*") if path.is_dir() else map(Path, glob(section.path))
    files = [file for file in found if file.suffix in FILE_ENDINGS and file.is_file()]
    listed = sorted((os.path.relpath(file, folder), file.stat().st_size) for file in files)
    return hashlib.sha256(repr((split.size, listed)).encode()).hexdigest()


def _class_changes(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    if len(gone) == len(new) == 1:
        yield f"class {gone[0]!r} is now {new[0]!r}"
    elif gone or new:
        for names, change in ((gone, "no longer"), (new, "new")):
            if names:
                yield f"{quoted(names)} {'is' if len(names) == 1 else 'are'} {change} among the classes"
    elif list(before) != list(now):
        yield f"the classes are in another order ({quoted(now)}; before {quoted(before)})"


def _size_changes(before: Fingerprint, now: Fingerprint) -> Iterator[str]:
    old, new = ({split.split: split.rows for split in data.uses.values()} for data in (before, now))
    for split in old | new:
        had, has = ("an unknown number of" if (n := rows.get(split)) is None else str(n) for rows in (old, new))
        if had != has:
            yield f"{split} has {has} images, had {had}"


def _count_changes(before: Fingerprint, now: Fingerprint) -> Iterator[str]:
    """Yield which classes of a split have another number of images; of a class that came or went, that is known."""
    old, new = _counts(before), _counts(now)
    known = set(before.classes) & set(now.classes)
    changed = [key for key in old | new if key[1] in known and old[key] != new[key]]
    for split, name in changed[:_NAMED]:
        yield f"class {name!r} of {split} has {new[split, name]} images, had {old[split, name]}"
    if len(changed) > _NAMED:
        yield f"{len(changed) - _NAMED} more classes have other numbers of images"


def _counts(data: Fingerprint) -> Counter[tuple[str, str]]:
    """Return the number of images by split and class, over all uses."""
    counts: Counter[tuple[str, str]] = Counter()
    for use in data.uses.values():
        for name, count in zip(data.classes, use.per_class or (), strict=False):
            counts[use.split, name] += count
    return counts
