"""From a stored image to its pixels, and the list of the images that cannot be decoded."""

import io
import json
import logging
import os
import stat
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from timm_selfdistill.compat import read_remote
from timm_selfdistill.output import replace_file

_logger = logging.getLogger(__name__)

FORMATS: Final = (
    # The usual ones first, and at the end those that Pillow does not tell by their first bytes.
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL", "DIB", "ICO"),
    *("BLP", "CUR", "DCX", "DDS", "FITS", "FLI", "FTEX", "GBR", "ICNS", "MCIDAS", "MSP", "PCX", "PIXAR", "PSD", "QOI"),
    *("SGI", "SUN", "XBM", "XPM", "XVTHUMB", "IM", "IMT", "PCD", "SPIDER", "TGA"),
)
"""The image formats that are opened, by Pillow's names: those whose pixels Pillow or a plugin for it decodes itself.

Pillow hands EPS, WMF, BUFR, GRIB, HDF5 and MPEG to other programs, and IPTC may hold any of them.
"""

# Images that Pillow decodes with a plug-in only: without it, they are images that cannot be decoded.
_BY_PLUGIN = (".heic", ".heif", ".jxl")
# Formats that begin with bytes which nothing else begins with by chance.
_TOLD_BY_CONTENT = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# More bytes than an image of as many pixels as Pillow allows has in any format.
MOST_BYTES: Final = 1 << 30
SKIPPED: Final = "skipped.jsonl"
Use = Literal["training", "validation", "evaluation"]
USES: Final[tuple[Use, ...]] = ("training", "validation", "evaluation")

# Resized by their shorter side, images of more extreme shape would fill the memory.
_MAX_ASPECT = 1000
# Greys of these formats come from Pillow as 16 bits of full range, whatever their depth in the file.
_FULL_RANGE = {("PNG", "I;16"), ("JPEG2000", "I;16"), ("PPM", "I")}
_NO_RANGE = "its values are {}, of no known range: store it with 8 or 16 bits, unsigned, 0 for black"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
_PART = "skipped-"


class SampleError(ValueError):
    """A sample, or what follows in a stream, that cannot be used; the message says which."""

    def __init__(self, message: str) -> None:
        # From a loader process torch hands on the whole traceback, which ends with the message.
        super().__init__(message.rpartition(f"{__name__}.{type(self).__qualname__}: ")[2].rstrip())


@cache
def image_endings() -> frozenset[str]:
    """Return the endings that tell an image, in lower case and with their dot."""
    names = Image.registered_extensions().items()
    return frozenset((*_BY_PLUGIN, *(ending for ending, name in names if name in Image.OPEN and name in FORMATS)))


def begins_like_image(path: str) -> bool:
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


def read_file(path: str | Path) -> bytes:
    """Return the content of an image file; a pipe or a device is never opened.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a regular file, or too large for an image.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is not a file, but {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; images may have {MOST_BYTES:,}")
    with open(path, "rb") as file:
        return file.read()


def read(value: Any) -> bytes:
    """Return the encoded bytes of a stored image, none if it is missing; any exception says that it is unreadable.

    Args:
        value: What `datasets` stores, {"bytes", "path"} or None, or the encoded bytes.
    """
    if isinstance(value, dict):
        path, value = value["path"], value["bytes"]
        if value is None and path is not None:
            found = read_remote(path)
            return read_file(path) if found is None else found
    return b"" if value is None else bytes(value)


def decode(data: bytes, mode: str) -> Image.Image:
    """Return an encoded image, upright and in the given mode. Safe to call from several threads.

    An alpha channel that the mode lacks is dropped; values of 12 and 16 bits keep their upper 8.

    Args:
        data: The encoded bytes.
        mode: "L", "RGB" or "RGBA".

    Raises:
        ValueError: If there is no image in the bytes, or one that is too large, of extreme shape, or whose values have
            no known range (32 bits, with a sign, floating-point).
        Exception: Of any kind, from Pillow and the libraries of the formats, if the image is damaged.
    """
    if not data:
        raise ValueError("it is empty")
    Image.init()  # does nothing the second time
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:  # its message tells an address in memory
        raise ValueError("it has no known image format, or one that is not opened") from error
    _check_size(image)
    image.load()
    _check_size(image)  # icons hold images that may be larger than they say
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        ImageOps.exif_transpose(image, in_place=True)
    image = _with_8_bits(image)
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns on every other way
        image = image.convert("RGBA")
    if image.mode == "LAB":  # Pillow knows no other way from there
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def check_pillow() -> None:
    """Raise ValueError if some code of this process told Pillow to make up what is missing of a truncated image."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so that truncated images would be filled with grey and trained "
            "on: set it to False."
        )


def _check_size(image: Image.Image) -> None:
    # Of images up to twice as large, Pillow only warns; to make an error of it would change the filters of all threads.
    limit = Image.MAX_IMAGE_PIXELS
    size = f"it is {image.width} x {image.height} pixels"
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{size}, above Pillow's limit of {limit:,} pixels")
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ValueError(f"{size}, one side more than {_MAX_ASPECT} times the other")


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Return an image whose values have 8 bits; Pillow's own conversion would clip deeper ones at 255."""
    depth = 16 if (image.format, image.mode) in _FULL_RANGE else None
    inverted = False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        if set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) != {1}:
            raise ValueError(_NO_RANGE.format("signed or floating-point"))
        if bits > 8 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2:
            raise ValueError(f"its planes of {bits} bits are stored one after another, which Pillow reads wrongly")
        if image.mode.startswith("I;16"):
            # Pillow leaves what counts from white as it is, unlike with 8 bits and less.
            depth, inverted = bits, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if depth is not None:
        values = (np.asarray(image) >> (depth - 8)).astype(np.uint8)
        return Image.fromarray(255 - values if inverted else values)
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(_NO_RANGE.format("floating-point" if image.mode == "F" else "integers of more than 8 bits"))
    return image


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be decoded, as `skipped.jsonl` lists it."""

    use: Use
    split: str
    row: int | None  # in the split; None in a stream
    file: str | None  # its name where the data set stores one
    sha256: str  # of the encoded bytes
    reason: str


class SkipList:
    """Writes each skipped image once to a file of this training process, from whichever of its loader processes.

    Machines that share a network file system cannot append to the same file; `merge_skipped` joins those of all.

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
        # Unbuffered and in one piece, so that lines of several loader processes do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(image)).encode() + b"\n")


def merge_skipped(folder: Path) -> dict[str, int]:
    """Join what the processes of a run wrote to its folder in one file, `skipped.jsonl`; no loader may be at work.

    Returns:
        How many different images were skipped, by what they were to be used for.
    """
    parts = sorted(folder.glob(f"{_PART}*.jsonl"))
    images: dict[tuple[str, ...], str] = {}
    for path in (folder / SKIPPED, *parts):
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill, or by a full disk, in the middle of writing
                continue
            images[tuple(str(entry[key]) for key in ("use", "split", "row", "file", "sha256"))] = line
    if parts:
        replace_file(folder / SKIPPED, "".join(f"{line}\n" for line in images.values()).encode())
        for part in parts:
            part.unlink()
    return dict(Counter(use for use, *_ in images))
