"""From a stored image to its pixels: which files are read, which formats are opened, depth, orientation, channels."""

import io
import os
import stat
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

FORMATS: Final = (
    # The usual ones first, and at the end those that Pillow does not tell by their first bytes.
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL", "DIB", "ICO"),
    *("BLP", "CUR", "DCX", "DDS", "FITS", "FLI", "FTEX", "GBR", "ICNS", "MCIDAS", "MSP", "PCX", "PIXAR", "PSD", "QOI"),
    *("SGI", "SUN", "XBM", "XPM", "XVTHUMB", "IM", "IMT", "PCD", "SPIDER", "TGA"),
)
"""The image formats that are opened, by Pillow's names: those whose pixels Pillow or a plugin for it decodes itself.

Not EPS, WMF, BUFR, GRIB, HDF5 and MPEG, which Pillow hands to other programs, and not IPTC, which may hold any of them.
"""

# More bytes than an image of as many pixels as Pillow allows has in any format.
MOST_BYTES: Final = 1 << 30

# Resized by their shorter side, images of more extreme shape would fill the memory.
_MAX_ASPECT = 1000

# Greys of these formats come from Pillow as 16 bits of full range, whatever their depth in the file.
_FULL_RANGE = {("PNG", "I;16"), ("JPEG2000", "I;16"), ("PPM", "I")}

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def read_file(path: str | Path) -> bytes:
    """Return the content of an image file. What is no regular file, such as a pipe or a device, is never opened.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no regular file, or too large for an image.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is no file, but {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; images may have {MOST_BYTES:,}")
    with open(path, "rb") as file:
        return file.read()


def read(value: Any) -> bytes:
    """Return the encoded bytes of a stored image, none if it is missing.

    Args:
        value: What `datasets` stores, {"bytes", "path"} or None, or the encoded bytes.

    Raises:
        Exception: Of any kind, if the file or the address cannot be read.
    """
    if isinstance(value, dict):
        if value["bytes"] is None and value["path"] is not None:
            from datasets.utils.file_utils import is_local_path, xopen

            if is_local_path(value["path"]):
                return read_file(value["path"])
            with xopen(value["path"], "rb") as file:
                return bytes(file.read())
        value = value["bytes"]
    return b"" if value is None else bytes(value)


def decode(data: bytes, mode: str) -> Image.Image:
    """Return an encoded image, upright and in the given mode.

    An alpha channel that the mode lacks is dropped; values of 12 and 16 bits keep their upper 8. Values without a known
    range (of 32 bits, with a sign, floating-point) are refused. Safe to call from several threads.

    Args:
        data: The encoded bytes.
        mode: "L", "RGB" or "RGBA".

    Raises:
        ValueError: If there is no image in the bytes, or one that is too large, of extreme shape, or whose values have
            no known range.
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
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"it is {image.width} x {image.height} pixels, above Pillow's limit of {limit:,} pixels")
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ValueError(
            f"it is {image.width} x {image.height} pixels, one side more than {_MAX_ASPECT} times the other"
        )


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Return an image whose values have 8 bits; Pillow's own conversion would clip deeper ones at 255."""
    depth = 16 if (image.format, image.mode) in _FULL_RANGE else None
    inverted = False
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        bits = max(tags.get(BITSPERSAMPLE, (1,)))
        if set(tags.get(SAMPLEFORMAT, (1,))) != {1}:
            raise ValueError(_NO_RANGE.format("signed or floating-point"))
        if bits > 8 and tags.get(PLANAR_CONFIGURATION) == 2:
            raise ValueError(f"its planes of {bits} bits are stored one after another, which Pillow reads wrongly")
        if image.mode.startswith("I;16"):
            # Pillow leaves what counts from white as it is, unlike with 8 bits and less.
            depth, inverted = bits, tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    if depth is not None:
        values = (np.asarray(image) >> (depth - 8)).astype(np.uint8)
        return Image.fromarray(255 - values if inverted else values)
    if image.mode == "F" or image.mode.startswith("I"):
        kind = "floating-point" if image.mode == "F" else "integers of more than 8 bits"
        raise ValueError(_NO_RANGE.format(kind))
    return image


_NO_RANGE = "its values are {}, of no known range: store it with 8 or 16 bits, unsigned, 0 for black"
