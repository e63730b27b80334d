"""Reading image files: depth, colours, formats that are never opened, and what is not a file."""

import io
import os
import shutil
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin

from timm_selfdistill.data.decode import FORMATS, MOST_BYTES, decode, read, read_file

RAMP = np.arange(256).reshape(16, 16)
RAMP_16 = RAMP * 257
RAMP_12 = RAMP * 4095 // 255


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def tiff(
    planes: bytes, bits: int, *, order: str = "<", channels: int = 1, photo: int = 1, sign: int = 1, planar: int = 1
) -> bytes:
    """An uncompressed TIFF of 16 x 16 pixels, of kinds that Pillow does not write."""
    size = len(planes) // channels if planar == 2 else len(planes)
    offsets = range(8, 8 + len(planes), size)
    entries = [
        *((256, [16]), (257, [16]), (258, [bits] * channels), (259, [1]), (262, [photo]), (273, offsets)),
        *((277, [channels]), (278, [16]), (279, [size] * len(offsets)), (284, [planar]), (339, [sign] * channels)),
    ]
    start = 8 + len(planes)
    outside, directory = b"", struct.pack(f"{order}H", len(entries))
    for tag, values in entries:
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            place = start + 2 + 12 * len(entries) + 4 + len(outside)
            outside, packed = outside + packed, struct.pack(f"{order}I", place)
        directory += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + planes + directory + bytes(4) + outside


def packed_12_bits(values: Any) -> bytes:
    bits = "".join(f"{value:012b}" for value in values.flat)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def tiff_16(order: str, **fields: Any) -> bytes:
    return tiff(RAMP_16.astype(f"{order}u2").tobytes(), 16, order=order, **fields)


def colour_16(order: str, planar: int) -> bytes:
    planes = np.repeat(RAMP_16[None], 3, axis=0) if planar == 2 else np.repeat(RAMP_16[..., None], 3, axis=2)
    return tiff(planes.astype(f"{order}u2").tobytes(), 16, order=order, channels=3, photo=2, planar=planar)


def png_16(colours: int) -> bytes:
    """A PNG of 16 bits: grey (0), with alpha (4), colour (2), colour with alpha (6)."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colours]
    lines = np.repeat(RAMP_16.astype(">u2")[..., None], channels, axis=2).reshape(16, -1)
    body = encode(Image.new("L", (1, 1)), "PNG")[:8]
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, colours, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))),
        (b"IEND", b""),
    )
    for name, content in chunks:
        body += struct.pack(">I", len(content)) + name + content
        body += struct.pack(">I", zlib.crc32(name + content))
    return body


GREY_16 = Image.fromarray(RAMP_16.astype(np.uint16))
GREY_32 = Image.fromarray(RAMP_16.astype(np.int32))
RAMPS = {
    "PNG of 16 bits": png_16(0),
    "PNG of 16 bits and alpha": png_16(4),
    "colour PNG of 16 bits": png_16(2),
    "colour PNG of 16 bits and alpha": png_16(6),
    "JPEG 2000 of 16 bits": encode(GREY_16, "JPEG2000"),
    "PGM of 16 bits": encode(GREY_16, "PPM"),
    "PGM of 12 bits": b"P5 16 16 4095\n" + RAMP_12.astype(">u2").tobytes(),
    "PGM of numbers up to 1000": b"P2 16 16 1000\n" + " ".join(str(v * 1000 // 255) for v in RAMP.flat).encode(),
    "PPM of 12 bits": b"P6 16 16 4095\n" + np.repeat(RAMP_12.astype(">u2"), 3).tobytes(),
    "TIFF of 16 bits": encode(GREY_16, "TIFF"),
    "TIFF of 16 bits, LZW": encode(GREY_16, "TIFF", compression="tiff_lzw"),
    "TIFF of 16 bits, big-endian": tiff_16(">"),
    "TIFF of 16 bits from white": tiff(RAMP_16[::-1, ::-1].astype("<u2").tobytes(), 16, photo=0),
    "TIFF of 12 bits": tiff(packed_12_bits(RAMP_12), 12),
    "colour TIFF of 16 bits": colour_16("<", 1),
    "colour TIFF of 16 bits, big-endian": colour_16(">", 1),
    "TIFF of 8 bits from white": tiff(RAMP[::-1, ::-1].astype("u1").tobytes(), 8, photo=0),
    "TIFF of 8 bits": encode(Image.fromarray(RAMP.astype(np.uint8)), "TIFF"),
}
REFUSED = {
    "TIFF of 32 bits": encode(GREY_32, "TIFF"),
    "TIFF of 32 bits that hold 8": encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "TIFF of 32 bits, unsigned": tiff((RAMP_16 * 65537).astype("<u4").tobytes(), 32),
    "TIFF of 16 bits with a sign": tiff_16("<", sign=2),
    "TIFF of 8 bits with a sign": tiff(RAMP.astype("u1").tobytes(), 8, sign=2),
    "floating-point TIFF": encode(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "floating-point TIFF that holds 8 bits": encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "floating-point PFM": encode(Image.fromarray((RAMP / 255).astype(np.float32)), "PPM"),
    "IM of 16 bits": encode(GREY_16, "IM"),
    "IM of 32 bits": encode(GREY_32, "IM"),
}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_stays_a_ramp_whatever_its_depth(name: str, mode: str) -> None:
    values = np.asarray(decode(RAMPS[name], mode)).reshape(256, -1)[:, 0].astype(int)
    assert np.abs(values - np.arange(256)).max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_no_known_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"of no known range: store it with 8 or 16 bits, unsigned, 0 for black"):
        decode(REFUSED[name], "L")


@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_16_bits_are_refused_because_pillow_reads_their_bytes_as_pixels(order: str) -> None:
    with pytest.raises(ValueError, match="planes of 16 bits are stored one after another"):
        decode(colour_16(order, 2), "RGB")


@pytest.mark.parametrize(
    ("image", "mode", "pixel"),
    [
        (Image.new("1", (4, 4), 1), "L", 255),
        (Image.new("LA", (4, 4), (90, 7)), "RGB", (90, 90, 90)),
        (Image.new("CMYK", (4, 4), (55, 155, 205, 0)), "RGB", (200, 100, 50)),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 7)), "RGB", (200, 100, 50)),
    ],
)
def test_colours_are_converted(image: Image.Image, mode: str, pixel: Any) -> None:
    assert decode(encode(image, "TIFF"), mode).getpixel((1, 1)) == pixel


@pytest.mark.parametrize(("mode", "white"), [("L", 255), ("RGB", (255,) * 3), ("RGBA", (255,) * 4)])
def test_lab_colours_become_those_of_the_mode(mode: str, white: Any) -> None:
    lab = tiff(b"\xff\0\0" * 256, 8, channels=3, photo=8)
    assert np.abs(np.subtract(decode(lab, mode).getpixel((1, 1)), white)).max() <= 1


def test_a_photo_of_16_bits_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(decode(encode(GREY_16, "PNG", exif=exif), "L"))
    assert np.array_equal(turned, np.rot90(RAMP, -1))


def iptc(content: bytes) -> bytes:
    """An IPTC file, which may hold a file of any other format."""

    def field(record: int, dataset: int, value: bytes) -> bytes:
        return b"\x1c" + bytes([record, dataset]) + struct.pack(">H", len(value)) + value

    head = field(3, 60, b"\1\1") + field(3, 20, b"\0\x10") + field(3, 30, b"\0\x10") + field(3, 120, b"\1")
    return head + field(8, 10, content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n0 0 moveto 16 16 lineto stroke\nshowpage\n"
WMF = b"\xd7\xcd\xc6\x9a" + struct.pack("<HhhhhHIH", 0, 0, 0, 16, 16, 1440, 0, 0) + b"\x01\x00\x09\x00" + bytes(30)
EMF = b"\1\0\0\0" + struct.pack("<I8i", 88, 0, 0, 16, 16, 0, 0, 16, 16) + b" EMF" + bytes(60)


@pytest.mark.parametrize(
    "data",
    [
        *(EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(EPS), 0, 0, 0, 0) + bytes(4) + EPS, WMF, EMF),
        *(b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89HDF\r\n\x1a\n", b"GRIB\0\0\0\1"),
        *(b"BUFR\0\0\0\4", b"\0\0\1\xb3\1\0\x10", iptc(EPS)),
    ],
)
def test_what_pillow_hands_to_other_programs_is_never_opened(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(f"subprocess.{name}", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(ValueError, match="no known image format, or one that is not opened"):
        decode(data, "RGB")


def test_formats_are_pillows_but_for_those_that_it_does_not_decode_itself() -> None:
    Image.init()
    assert IptcImagePlugin.IptcImageFile.format == "IPTC"
    assert set(Image.OPEN) - set(FORMATS) == {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}


@pytest.fixture
def no_files(tmp_path: Path) -> dict[str, Path]:
    """Paths that look like images and are none: what they are -> where."""
    # Addresses of sockets are short.
    folder = Path(os.path.relpath(tmp_path)) if len(os.path.relpath(tmp_path)) < len(str(tmp_path)) else tmp_path
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "random.png").symlink_to("/dev/random")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.png"))
    return {
        "a folder": folder / "folder.png",
        "a named pipe": folder / "pipe.png",
        "a socket": folder / "socket.png",
        "a device": folder / "zero.png",
        "device": folder / "random.png",
    }


def test_what_is_no_file_is_never_opened(no_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened it"))
    for kind, path in no_files.items():
        for reading in (lambda path=path: read_file(path), lambda path=path: read({"bytes": None, "path": str(path)})):
            with pytest.raises(ValueError, match=f"it is not a file, but .*{kind}"):
                reading()


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"it has 1,073,741,825 bytes; images may have 1,073,741,824"):
        read_file(tmp_path / "sparse.png")
    shutil.copy(Path(__file__), tmp_path / "small")
    assert read_file(str(tmp_path / "small")) == Path(__file__).read_bytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_threads_leave_the_warning_filters_alone_and_refuse_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(
        "warnings.catch_warnings", lambda *_, **__: pytest.fail("changed the filters of the whole process")
    )
    large, small = (encode(Image.new("L", (side, side)), "PNG") for side in (40, 20))
    before, outcomes = list(warnings.filters), set()

    def work(data: bytes, kind: str) -> None:
        for _ in range(50):
            try:
                decode(data, "L")
                outcomes.add(f"{kind} accepted")
            except ValueError as error:
                outcomes.add(f"{kind} refused: {error}")

    threads = [threading.Thread(target=work, args=pair) for pair in [(small, "small"), (large, "large")] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {
        "small accepted",
        "large refused: it is 40 x 40 pixels, above Pillow's limit of 1,000 pixels",
    }
    assert warnings.filters == before
