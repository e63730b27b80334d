"""Which files of a folder are images: by their endings, by their content where the ending says nothing."""

import os
from collections import Counter
from functools import cache
from typing import Final, Literal

from PIL import Image

# Formats that Pillow cannot decode (it only knows their names, or hands them to another program).
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
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

Kind = Literal["image", "vector format", "not an image"]
Reason = Literal[Kind, "unknown", "hidden", "not a file", "read already", "beside the splits"]

# What is normal beside images; anything else that is left out is warned about.
_EXPECTED: Final[tuple[Reason, ...]] = ("not an image", "hidden")


class LeftOut:
    """Counts what is left out of a folder, by reason, and keeps the first paths of each.

    The reasons: "vector format" (another program would have to draw it), "not an image" (by its ending), "unknown" (no
    image by its content, with an ending that says nothing), "hidden", "not a file" (a pipe, device, socket or broken
    link), "read already" (a link to a folder that is read anyway, or to one around it) and "beside the splits" (an
    image that is in no split).
    """

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self.first: dict[Reason, list[str]] = {}

    def add(self, reason: Reason, path: str) -> None:
        """Count a path."""
        self.counts[reason] += 1
        first = self.first.setdefault(reason, [])
        if len(first) < _NAMED:
            first.append(path)

    def update(self, other: "LeftOut") -> None:
        """Add what another one counted."""
        self.counts.update(other.counts)
        for reason, paths in other.first.items():
            self.first[reason] = (self.first.get(reason, []) + paths)[:_NAMED]

    def describe(self, root: str, *, expected: bool | None = None) -> str:
        """Return, for example, "2 unknown ('cat/a.bin', 'cat/b.bin'), 1 hidden ('.DS_Store')"; "" if there is nothing.

        Args:
            root: What the paths are relative to.
            expected: Whether to tell what is normal beside images, or all else; by default both.
        """
        parts = []
        for reason, count in sorted(self.counts.items()):
            if expected is None or expected == (reason in _EXPECTED):
                names = ", ".join(repr(os.path.relpath(path, root)) for path in self.first[reason])
                parts.append(f"{count} {reason} ({names}{', ...' if count > len(self.first[reason]) else ''})")
        return ", ".join(parts)


def find_images(folder: str, left_out: LeftOut) -> list[str]:
    """Return the images of a folder and of all folders in it, in the order of their names; links are followed.

    A file is opened only if its ending is unknown, and then only if it is a regular file.

    Args:
        folder: Where to look.
        left_out: What is left out is added to it.

    Raises:
        ValueError: If a folder cannot be read, or a name is no UTF-8.
    """
    return _find(folder, left_out, _ancestors(folder))


def read_level(folder: str, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Return the names of the folders and images that stand in a folder itself, sorted; as `find_images`."""
    folders: list[str] = []
    images: list[str] = []
    prefix = os.path.join(folder, "")
    kinds = kinds_by_ending()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name in _HIDDEN:
                    left_out.add("hidden", prefix + name)
                elif entry.is_dir():
                    folders.append(name)
                elif not entry.is_file():
                    left_out.add("not a file", prefix + name)
                elif (kind := _kind(name, prefix, kinds)) == "image":
                    images.append(name)
                else:
                    left_out.add(kind, prefix + name)
    except OSError as error:
        raise ValueError(f"The folder {folder!r} cannot be read: {error.strerror or error}.") from error
    for names in (folders, images):
        names.sort()
        _check_names(prefix, names)
    return folders, images


def holds_image(folder: str) -> bool:
    """Whether there is an image in a folder or in one inside it; looks no further than the first one."""
    return _holds_image(folder, set())


def is_image(path: str) -> bool:
    """Whether a file's content is that of an image; the pixels are not decoded."""
    Image.init()
    formats = [name for name in _TOLD_BY_CONTENT if name in Image.OPEN]
    try:
        with open(path, "rb") as file, Image.open(file, formats=formats):
            return True
    except Image.DecompressionBombError:  # an image, too large to be decoded
        return True
    except Exception:  # of the file system, or of whatever format the file resembles
        return False


@cache
def kinds_by_ending() -> dict[str, Kind]:
    """Return what files are by their ending, in lower case and with its dot."""
    readable = {
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NOT_DECODED
    }
    kinds: dict[str, Kind] = dict.fromkeys(_NO_IMAGE, "not an image")
    kinds |= dict.fromkeys((*readable, *_BY_PLUGIN), "image")
    return kinds | dict.fromkeys(_VECTOR, "vector format")


def _find(folder: str, left_out: LeftOut, seen: set[tuple[int, int]]) -> list[str]:
    """Return the images below a folder, unless it was seen before (by a link): links may lead in circles."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        left_out.add("read already", folder)
        return []
    seen.add((status.st_dev, status.st_ino))
    folders, images = read_level(folder, left_out)
    prefix = os.path.join(folder, "")
    found = [prefix + name for name in images]
    for name in folders:
        found += _find(prefix + name, left_out, seen)
    return found


def _holds_image(folder: str, seen: set[tuple[int, int]]) -> bool:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return False
    seen.add((status.st_dev, status.st_ino))
    prefix = os.path.join(folder, "")
    kinds = kinds_by_ending()
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == "." or entry.name in _HIDDEN:
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.is_file() and _kind(entry.name, prefix, kinds) == "image":
                return True
    return any(_holds_image(prefix + name, seen) for name in folders)


def _kind(name: str, prefix: str, kinds: dict[str, Kind]) -> Kind | Literal["unknown"]:
    """Return what a regular file is, looking into it if its ending does not tell."""
    ending = name[name.rfind(".") :] if "." in name else ""
    if (kind := kinds.get(ending) or kinds.get(ending.lower())) is not None:
        return kind
    return "image" if is_image(prefix + name) else "unknown"


def _ancestors(folder: str) -> set[tuple[int, int]]:
    """Return device and inode of all folders above one, by its own path and by that which it is a link to."""
    found = set()
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        while (above := os.path.dirname(path)) != path:
            path = above
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return found


def _check_names(prefix: str, names: list[str]) -> None:
    """Refuse names that no table can hold."""
    try:
        for name in names:
            name.isascii() or name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The name {os.fsencode(prefix + name)!r} is no UTF-8: rename it.") from None
