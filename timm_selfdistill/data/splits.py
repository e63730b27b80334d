"""Open a labelled image data set, check it, and decide which rows are for training, validation and evaluation."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset

from timm_selfdistill.data.decode import USES, Use
from timm_selfdistill.data.file_rows import Splits
from timm_selfdistill.data.names import (
    Indices,
    check_columns,
    check_same_classes,
    class_names_of,
    is_first_process,
    quoted,
    resolve_splits,
    stream_classes,
    targets_of,
    used_splits,
    with_columns,
)
from timm_selfdistill.data.sources import FILE_ENDINGS, load_splits
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageSplit(Dataset[dict[str, Any]]):
    """Rows of one split of a data set; a torch data set of encoded images.

    A sample is {"image": what `datasets` stores, "target": class index, "row": its row in the split}.

    Args:
        name: The split's name in the data set.
        rows: The whole split; its only column is the encoded "image".
        indices: The rows that are used [N].
        targets: Their class indices [N].
    """

    name: str
    rows: datasets.Dataset
    indices: Indices
    targets: Indices

    @property
    def size(self) -> int:
        """Number of samples, as `StreamSplit` calls it."""
        return len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Read a batch in one go, as torch's fetcher does when it can."""
        rows = self.indices[indices].tolist()
        images = self.rows[rows]["image"]
        return [
            {"image": image, "target": target, "row": row}
            for image, target, row in zip(images, self.targets[indices].tolist(), rows, strict=True)
        ]

    def select(self, positions: Indices) -> "ImageSplit":
        """Return the samples at these positions."""
        return replace(self, indices=self.indices[positions], targets=self.targets[positions])


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """One split of a data set that is read in order, without an index."""

    name: str
    rows: datasets.IterableDataset  # of the encoded "image" and the label "target", as it is stored
    size: int | None  # number of samples of one pass; None if it is unknown
    class_index: Mapping[int | str, int]  # the class index of every label


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training.

    Args:
        train: For training.
        validation: For choosing among models and thresholds; None if the recipe wants none.
        eval: For the report, and for nothing else.
        class_names: The name of each class index.
        name: What the report calls the data set.
        streaming: Whether the splits are `StreamSplit`s: their loaders already hold this process's share, so
            `accelerator.prepare` must not get them.
    """

    train: ImageSplit | StreamSplit
    validation: ImageSplit | StreamSplit | None
    eval: ImageSplit | StreamSplit
    class_names: tuple[str, ...]
    name: str
    streaming: bool

    def by_use(self) -> dict[Use, ImageSplit | StreamSplit]:
        """Return the splits by what they are for, without validation where there is none."""
        splits = zip(USES, (self.train, self.validation, self.eval), strict=True)
        return {use: split for use, split in splits if split is not None}


def open_dataset(section: DataSection, seed: int) -> ImageData:
    """Open the data set of a recipe and split it; no code of the data set is run.

    `section.path` is "digits" (embedded), something local or a name on the Hub: `timm_selfdistill.data.sources` lists
    the kinds, in order. The first process logs what was read.

    Fractions are stratified by class. Rows held out by `eval_fraction` do not depend on the seed, so that no seed ever
    trains on another's; the validation rows and the `max_train` rows do. `max_eval` limits evaluation and validation.

    Args:
        section: The recipe's `data`.
        seed: Decides which rows are drawn.

    Raises:
        ValueError: If there is no such data set, split or column; if a column does not hold images or class labels; if
            a class has no training image or is too small to be split; if an image is in two splits; or if a stream
            would need an index.
    """
    given, (section, splits) = section, open_splits(section)
    notes = list(splits.notes)
    if (section.image, section.target) != (given.image, given.target):
        notes.append(f"images in the column {section.image!r}, labels in {section.target!r}")
    data = _stream_data(section, splits.rows) if section.streaming else _indexed_data(section, splits.rows, seed)
    if is_first_process():
        _logger.info("%s.", "; ".join([_summary(data, section), *notes]))
    return data


def open_splits(section: DataSection) -> tuple[DataSection, Splits]:
    """Find and check the splits and columns of a recipe; return the section with the names that they have."""
    splits = load_splits(section)
    section = resolve_splits(section, splits.rows)
    if (features := splits.rows[section.train_split].features) is not None:
        section = with_columns(section, features)
    for name in used_splits(section).values():
        check_columns(splits.rows[name].features, name, section)
    return section, splits


def _indexed_data(section: DataSection, splits: Mapping[str, Any], seed: int) -> ImageData:
    class_names = class_names_of(splits[section.train_split], section)

    def whole(name: str) -> ImageSplit:
        targets = targets_of(splits[name], name, section, class_names)
        return ImageSplit(name, _encoded(splits[name], {section.image: "image"}), np.arange(len(targets)), targets)

    rng, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    train, validation = whole(section.train_split), None
    _check_classes(train, class_names, section)
    if section.eval_fraction is None:
        evaluation = whole(section.eval_split)
    else:
        train, evaluation = _carve(train, section.eval_fraction, class_names, fixed)
    if isinstance(section.validation, str):
        validation = whole(section.validation)
    elif section.validation > 0:
        train, validation = _carve(train, section.validation, class_names, rng)
    train = _at_most(section.max_train, train, rng)
    validation = None if validation is None else _at_most(section.max_eval, validation, fixed)
    evaluation = _at_most(section.max_eval, evaluation, fixed)
    return ImageData(train, validation, evaluation, class_names, _title(section), streaming=False)


def _stream_data(section: DataSection, splits: Mapping[str, Any]) -> ImageData:
    class_names, class_index = stream_classes(splits[section.train_split].features[section.target], section)

    def whole(name: str, limit: int | None, size: int | None = None) -> StreamSplit:
        rows = splits[name]
        check_same_classes(rows.features[section.target], name, class_names)
        if size is None and rows.info.splits is not None and name in rows.info.splits:
            size = rows.info.splits[name].num_examples
        rows = _encoded(rows, {section.image: "image", section.target: "target"})
        if limit is not None:
            rows, size = rows.take(limit), limit if size is None else min(limit, size)
        return StreamSplit(name, rows, size, class_index)

    train = whole(section.train_split, section.max_train, section.train_size)
    validation = whole(section.validation, section.max_eval) if isinstance(section.validation, str) else None
    evaluation = whole(section.eval_split, section.max_eval)
    return ImageData(train, validation, evaluation, class_names, _title(section), streaming=True)


def _encoded(rows: Any, columns: dict[str, str]) -> Any:
    """Keep and rename these columns, and leave the images encoded."""
    rows = rows.select_columns(list(columns))
    for name in columns:
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def _check_classes(train: ImageSplit, class_names: tuple[str, ...], section: DataSection) -> None:
    """Refuse a training split of one class, or one in which a class has no image."""
    empty = [class_names[index] for index in np.flatnonzero(_counts(train, class_names) == 0)]
    present = len(class_names) - (0 if section.allow_empty_classes else len(empty))
    if present < 2:
        raise ValueError(f"Split {train.name!r} of {section.path} has samples of {present} class; 2 are needed.")
    if empty and not section.allow_empty_classes:
        raise ValueError(
            f"{len(empty)} of the {len(class_names)} classes of {section.path} have no image in the training split "
            f"{train.name!r}: {quoted(empty)}. Add images, or set data.allow_empty_classes=true to go on."
        )


def _carve(
    split: ImageSplit, fraction: float, class_names: tuple[str, ...], rng: np.random.Generator
) -> tuple[ImageSplit, ImageSplit]:
    """Return the rest of the split, and the share that is held out."""
    held_out = _stratified(split.targets, max(1, round(fraction * len(split))), rng)
    rest = split.select(np.setdiff1d(np.arange(len(split)), held_out))
    before, after = _counts(split, class_names), _counts(rest, class_names)
    small = np.flatnonzero((before == 1) | (before > after) & (after == 0))
    if len(small):
        raise ValueError(
            f"Class {class_names[small[0]]!r} has {before[small[0]]} sample(s) in split {split.name!r}, too few to "
            f"hold out a share of {fraction} ({len(small)} such classes): name a split instead, or take another share."
        )
    return rest, split.select(held_out)


def _counts(split: ImageSplit, class_names: tuple[str, ...]) -> Indices:
    return np.bincount(split.targets, minlength=len(class_names))


def _at_most(limit: int | None, split: ImageSplit, rng: np.random.Generator) -> ImageSplit:
    if limit is None or limit >= len(split):
        return split
    return split.select(_stratified(split.targets, limit, rng))


def _stratified(targets: Indices, count: int, rng: np.random.Generator) -> Indices:
    """Draw `count` positions, ascending, that keep the share of every class to within one sample."""
    classes, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    exact = sizes * count / len(targets)
    quota = np.floor(exact).astype(np.int64)
    order = rng.permutation(len(classes))  # decides ties between equal remainders
    order = order[np.argsort((quota - exact)[order], kind="stable")]
    quota[order[: count - quota.sum()]] += 1
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    rank = np.arange(len(targets)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank < np.repeat(quota, sizes)])


def _title(section: DataSection) -> str:
    """Return what a report may call the data set: no folders of this machine."""
    path = Path(section.path).expanduser()
    if path.is_dir():
        return path.resolve().name
    if path.name.endswith(FILE_ENDINGS) or path.is_file():
        return path.resolve().parent.name
    return section.path if section.name is None else f"{section.path}/{section.name}"


def _summary(data: ImageData, section: DataSection) -> str:
    """Return how many images of which splits there are, and the first names of the classes."""
    parts = []
    for use, split in data.by_use().items():
        if use == "evaluation" and section.eval_fraction is None and section.eval_split == section.train_split:
            continue  # `evaluate` reads one split, which stands for both
        size = "an unknown number of" if split.size is None else split.size
        if use == "training":
            parts.append(f"{size} images of {split.name!r}")
        else:
            held_out = split.name == data.train.name
            parts.append(f"{size} {f'held out of it for {use}' if held_out else f'of {split.name!r}'}")
    return f"{data.name}: {', '.join(parts)}; {len(data.class_names)} classes ({quoted(data.class_names)})"
