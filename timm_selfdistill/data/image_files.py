"""Which files of a folder are images: by their endings, by their content where the ending says nothing."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Final, Literal

from PIL import Image

from timm_selfdistill.data.decode import FORMATS

# Images that Pillow decodes with a plug-in only: without it, they are images that cannot be decoded.
_BY_PLUGIN = (".heic", ".heif", ".jxl")
_VECTOR = (".ai", ".emf", ".eps", ".epsf", ".epsi", ".pdf", ".ps", ".svg", ".svgz", ".wmf")
# What stands beside images; files with other unknown endings are looked into.
_NO_IMAGE = (
    *(".cfg", ".csv", ".db", ".h5", ".hdf", ".hdf5", ".htm", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".log"),
    *(".mat", ".md", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".pth", ".py", ".rst", ".rtf", ".toml", ".tsv"),
    *(".txt", ".xlsx", ".xml", ".yaml", ".yml"),
)
# Formats that begin with bytes which nothing else begins with by chance.
_TOLD_BY_CONTENT = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# Made by systems and programs; so are all names that begin with a dot.
_HIDDEN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"}
_NAMED = 3

Kind = Literal["image", "vector format", "not an image"]  # a vector format is drawn by other programs
Reason = Literal[
    Kind,
    "unknown",  # no image by its content, with an ending that says nothing
    "hidden",
    "not a file",  # a pipe, device, socket or broken link
    "read already",  # a link to a folder that is read anyway, or to one around it
    "beside the splits",  # an image that is in no split
]

# What is normal beside images; anything else that is left out is warned about.
_EXPECTED: Final[tuple[Reason, ...]] = ("not an image", "hidden")


class FolderScan:
    """What a scan leaves out: the count of each reason and its first paths; and whether it met links."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.first: dict[Reason, list[str]] = {}
        self.links = False

    def leave_out(self, reason: Reason, path: str) -> None:
        """Count a path."""
        self.counts[reason] += 1
        first = self.first.setdefault(reason, [])
        if len(first) < _NAMED:
            first.append(path)

    def describe(self, root: str, *, expected: bool | None = None) -> str:
        """Return, for example, "2 unknown ('cat/a.bin', 'cat/b.bin'), 1 hidden ('.DS_Store')", with paths below `root`.

        With `expected`, only what is normal beside images (True) or only the rest (False) is told.
        """
        parts = []
        for reason, count in sorted(self.counts.items()):
            if expected is None or expected == (reason in _EXPECTED):
                names = ", ".join(repr(os.path.relpath(path, root)) for path in self.first[reason])
                parts.append(f"{count} {reason} ({names}{', ...' if count > len(self.first[reason]) else ''})")
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


def read_level(folder: str, scan: FolderScan) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the images directly in a folder, sorted; as `find_images`."""
    prefix = os.path.join(folder, "")
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=attrgetter("name")):
                name = entry.name
                # The system tells what an entry is along with its name; only for a link is there another call.
                if _is_hidden(name):
                    scan.leave_out("hidden", prefix + name)
                elif entry.is_dir():
                    folders.append(name)
                    scan.links |= entry.is_symlink()
                elif not entry.is_file():
                    scan.leave_out("not a file", prefix + name)
                elif (kind := _kind(prefix, name)) == "image":
                    images.append(name)
                    scan.links |= entry.is_symlink()
                else:
                    scan.leave_out(kind, prefix + name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    _check_names(prefix, (*folders, *images))
    return folders, images


@cache
def image_endings() -> frozenset[str]:
    """Return the endings that tell an image, in lower case and with their dot."""
    return frozenset(ending for ending, kind in _kinds_by_ending().items() if kind == "image")


@cache
def _kinds_by_ending() -> dict[str, Kind]:
    """Return what files are by their ending, in lower case and with its dot."""
    readable = {
        ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN and name in FORMATS
    }
    kinds: dict[str, Kind] = dict.fromkeys(_NO_IMAGE, "not an image")
    kinds |= dict.fromkeys((*readable, *_BY_PLUGIN), "image")
    return kinds | dict.fromkeys(_VECTOR, "vector format")


def _images_by_folder(folder: str, scan: FolderScan) -> Iterator[list[str]]:
    """Yield the images of a folder, then those of each folder in it."""
    # A link to one of the folders above would lead out of the folder and into it again.
    seen = {
        _identity(path) for path in (*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents)
    }
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if (identity := _identity(path)) in seen:
            scan.leave_out("read already", path)
            continue
        seen.add(identity)
        folders, images = read_level(path, scan)
        prefix = os.path.join(path, "")
        yield [prefix + name for name in images]
        waiting += [prefix + name for name in reversed(folders)]


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever links lead to it: its device and inode."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(str(folder), error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: str, error: OSError) -> ValueError:
    return ValueError(f"The folder {folder!r} cannot be read: {error.strerror or error}.")


def _kind(prefix: str, name: str) -> Kind | Literal["unknown"]:
    """Return what a regular file is, looking into it if its ending does not tell."""
    ending = os.path.splitext(name)[1].lower()
    if (kind := _kinds_by_ending().get(ending)) is not None:
        return kind
    return "image" if _has_image_content(prefix + name) else "unknown"


def _has_image_content(path: str) -> bool:
    """Whether a file begins like an image; the pixels are not decoded."""
    Image.init()
    formats = [name for name in _TOLD_BY_CONTENT if name in Image.OPEN]
    try:
        with open(path, "rb") as file, Image.open(file, formats=formats):
            return True
    except Image.DecompressionBombError:  # an image, too large to be decoded
        return True
    except Exception:  # of the file system, or of whatever format the file resembles
        return False


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name in _HIDDEN


def _check_names(prefix: str, names: Sequence[str]) -> None:
    """Refuse names that no table can hold."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        wrong = next(name for name in names if any("\ud800" <= letter <= "\udfff" for letter in name))
        raise ValueError(f"The name {os.fsencode(prefix + wrong)!r} is not UTF-8: rename it.") from None
