"""Look at a data set before there is a recipe: its splits, columns, classes, and the sizes of some images."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from PIL import Image

from timm_selfdistill.data.decode import read
from timm_selfdistill.data.names import Indices, check_columns, find_split, split_name, with_columns
from timm_selfdistill.data.sources import load_splits
from timm_selfdistill.data.splits import ImageData, ImageSplit, open_dataset
from timm_selfdistill.recipe import DataSection

_SAMPLE = 64
_SEED = 0
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


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
    section = section.model_copy(update={"train_split": train})
    opened = _first_that_opens(list(_choices(section, names)))
    whole = _whole_counts(opened[1])
    sizes, grey = _sample_sizes(opened[1].train)
    return Survey(opened[0], opened[1], names, whole, sizes, grey)


def _choices(section: DataSection, names: Sequence[str]) -> Iterator[DataSection]:
    """Yield the ways to use the splits, the best first; not all of them need work, as test splits may lack labels."""
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
    fraction = section.eval_fraction or 0.2
    ways += [{"eval_fraction": fraction, "validation": share} for share in shares]
    for way in ways:
        yield section.model_copy(update=way)


def _first_that_opens(choices: Sequence[DataSection]) -> tuple[DataSection, ImageData]:
    first: ValueError | None = None
    for section in choices:
        try:
            return section, open_dataset(section, _SEED)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _whole_counts(data: ImageData) -> Indices:
    """Return the images of each class of the training split, those that are held out of it too."""
    parts = data.by_use().values()
    own = [part.targets for part in parts if isinstance(part, ImageSplit) and part.name == data.train.name]
    return np.bincount(np.concatenate(own), minlength=len(data.class_names))


def _sample_sizes(split: object) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Return the sizes of evenly spaced images of a split, as far as they can be read, and whether all are grey."""
    assert isinstance(split, ImageSplit)
    sizes, modes = [], set()
    for place in np.unique(np.linspace(0, len(split) - 1, _SAMPLE).astype(int)).tolist():
        try:
            with Image.open(io.BytesIO(read(split[place]["image"]))) as image:
                sizes.append(image.size)
                modes.add(image.mode)
        except Exception:  # Pillow raises whatever a format's library does; training says what is wrong with an image
            continue
    return tuple(sizes), bool(modes) and modes <= set(_GREY_MODES)
