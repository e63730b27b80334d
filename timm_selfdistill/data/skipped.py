"""The list of images that a run skipped: any loader process adds to it, and in the end it is one file."""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from timm_selfdistill.files import replace_file

_logger = logging.getLogger(__name__)

Use = Literal["training", "validation", "evaluation"]
SKIPPED: Final = "skipped.jsonl"


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be decoded; images are the same if all but the reason is.

    Args:
        use: What it was to be used for.
        split: The data set's split.
        row: Its row in the split; None in a stream.
        file: Its file, or its name where the data set stores one.
        sha256: Digest of its encoded bytes.
        reason: Why it cannot be decoded.
    """

    use: Use
    split: str
    row: int | None
    file: str | None
    sha256: str
    reason: str


class SkipList:
    """Writes each skipped image once to a file of this training process, whichever of its loader processes meets it.

    Each training process has a file of its own, because machines that share a network file system cannot append to the
    same one. `merge_skipped` makes one of them.

    Args:
        folder: Where the file goes, once there is an image to be listed; None to list none.
        process: Index of this training process.
    """

    def __init__(self, folder: Path | None = None, process: int = 0) -> None:
        self.path = None if folder is None else folder / f"{_PART}{process}.jsonl"
        self._seen: set[SkippedImage] = set()

    def add(self, image: SkippedImage) -> None:
        """Write an image, unless this loader process has written it before; the first one is logged too."""
        if image in self._seen:
            return
        if not self._seen:
            listed = "" if self.path is None else f" All that are skipped are listed in {self.path}."
            _logger.warning("Skipped an image that cannot be decoded: %s.%s", image, listed)
        self._seen.add(image)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(image)) + "\n"
        # Unbuffered and in one piece, so that lines of several loader processes do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def merge_skipped(folder: Path) -> dict[str, int]:
    """Make one file, `skipped.jsonl`, of those that the processes of a run wrote, each image once.

    Args:
        folder: The run's folder; no loader may be at work.

    Returns:
        How many different images were skipped, by what they were to be used for.
    """
    parts = sorted(folder.glob(f"{_PART}*.jsonl"))
    whole = folder / SKIPPED
    images = {image: line for path in (whole, *parts) for image, line in _read(path).items()}
    if parts:
        replace_file(whole, "".join(f"{line}\n" for line in images.values()).encode())
        for part in parts:
            part.unlink()
    return dict(Counter(use for use, *_ in images))


_PART = "skipped-"


def _read(path: Path) -> dict[tuple[str, ...], str]:
    """Return the lines of a file by what tells images apart."""
    images: dict[tuple[str, ...], str] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill, or by a full disk, in the middle of writing
            continue
        images.setdefault(tuple(str(entry[key]) for key in ("use", "split", "row", "file", "sha256")), line)
    return images
