"""WebDataset shards: tar files in which the members of one name, up to the first dot, are one sample."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import datasets

from timm_selfdistill.data.decode import MOST_BYTES
from timm_selfdistill.data.file_rows import Splits, files_at
from timm_selfdistill.data.names import files_by_split, find_split, is_split, normalized, split_name
from timm_selfdistill.recipe import DataSection

SHARD_ENDINGS: Final = (".tar", ".tar.gz", ".tgz")

# What `data.image: image`, the default, stands for.
_ANY_IMAGE: Final = "jpg;jpeg;png;webp;avif;jp2;gif;bmp;tif;tiff;ppm;pgm"
# Members that hold an integer by WebDataset's convention.
_INTEGERS: Final = ("cls", "cls2", "index", "inx", "id")
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Sample = dict[str, bytes]


def load_shards(path: Path, section: DataSection) -> Splits | None:
    """Read WebDataset shards; without streaming, `datasets` copies the samples to its cache first.

    `data.path` is a tar file, a glob or a range in braces (`train-{000..123}.tar`) of them, or a folder that holds
    them, directly or in folders of splits. A file's split is what its name begins with; all are "train" if no name
    begins with one. `data.image` and `data.target` are endings of members, several divided by ";": the first that a
    sample has counts. A target "json.KEY" is that key of the member "json".
    """
    files = _shard_files(path, section)
    if not files:
        return None
    fields = {"image": _ANY_IMAGE if section.image == "image" else section.image, "target": section.target}
    first = files[find_split(section.train_split, files) or next(iter(files))]
    key, sample = next(_samples(str(first[0])), ("", None))
    if sample is None:
        raise ValueError(f"The shard {first[0]} holds no sample.")
    value = _label(sample, section.target, f"{first[0]}, sample {key!r}")
    label = datasets.Value("int64" if isinstance(value, int) else "string")
    features = datasets.Features({section.image: datasets.Image(), section.target: label})
    splits: dict[str, Any] = {}
    for name, of_split in files.items():
        # Size and time are there for the cache, which must not give what a file held before.
        shards = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in of_split]
        arguments = {"shards": shards, "names": (section.image, section.target), **fields, "kind": label.dtype}
        kind = datasets.IterableDataset if section.streaming else datasets.Dataset
        try:
            splits[name] = kind.from_generator(_rows, features=features, gen_kwargs=arguments)
        except datasets.exceptions.DatasetGenerationError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, ValueError | OSError) else ValueError(str(cause or error)) from None
    return Splits(splits)


def _shard_files(path: Path, section: DataSection) -> dict[str, list[Path]]:
    """Return the shards of each split, none if the data set is something else."""
    if not path.is_dir():
        files = [path] if path.is_file() else [file for part in _expanded(str(path)) for file in files_at(Path(part))]
        is_shard = [file.name.lower().endswith(SHARD_ENDINGS) and file.is_file() for file in files]
        return files_by_split(files, section) if files and all(is_shard) else {}
    if files := _shards_in(path):
        return files_by_split(files, section)
    folders = sorted(folder for folder in path.iterdir() if is_split(folder.name, section) and folder.is_dir())
    return {split_name(folder.name): files for folder in folders if (files := _shards_in(folder))}


def _shards_in(folder: Path) -> list[Path]:
    """Return the shards of a folder; none if it holds images, beside which a tar file may well stand."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(SHARD_ENDINGS))
    shards = [folder / name for name in names if (folder / name).is_file()]
    images = tuple(f".{ending}" for ending in _ANY_IMAGE.split(";"))
    if shards and any(name.lower().endswith(images) for _, _, files in os.walk(folder) for name in files):
        return []
    return shards


def _expanded(pattern: str) -> list[str]:
    """Expand a range in braces as a shell does: a{08..10} is a08, a09 and a10."""
    if (found := _BRACES.search(pattern)) is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [
        whole for number in numbers for whole in _expanded(pattern[: found.start()] + number + pattern[found.end() :])
    ]


def _rows(
    shards: list[tuple[str, int, int]], names: tuple[str, str], image: str, target: str, kind: str
) -> Iterator[dict[str, Any]]:
    """Yield the samples of shards; `datasets` gives each loader process some of the list."""
    for file, *_ in shards:
        for key, sample in _samples(file):
            where = f"{file}, sample {key!r}"
            ending = _first_of(image, sample, where)
            label = _label(sample, target, where)
            if kind == "string" and isinstance(label, int):
                label = str(label)
            elif kind == "int64" and isinstance(label, str):
                raise ValueError(f"{where}: {target!r} is {label!r}, but the first label is an integer")
            yield {names[0]: {"bytes": sample[ending], "path": f"{key}.{ending}"}, names[1]: label}


def _samples(file: str) -> Iterator[tuple[str, Sample]]:
    """Yield the name of each sample, and its members by ending."""
    name, sample = "", Sample()
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                stem, dot, ending = base.partition(".")
                if not member.isreg() or not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
                    continue
                if member.size > MOST_BYTES:
                    raise ValueError(
                        f"{file}: {member.name} has {member.size:,} bytes; a member may have {MOST_BYTES:,}"
                    )
                key = os.path.join(folder, stem)
                if key != name:
                    if sample:
                        yield name, sample
                    name, sample = key, Sample()
                ending = ending.lower()
                if ending in sample:
                    raise ValueError(f"{file}: the sample {key!r} has two members {ending!r}")
                content = archive.extractfile(member)
                assert content is not None  # it is a regular file
                sample[ending] = content.read()
            _check_end(archive, file)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"The shard {file} cannot be read: {error}") from error
    if sample:
        yield name, sample


def _check_end(archive: Any, file: str) -> None:
    """Raise unless an archive ends with the mark of its end, and with nothing after it: `tarfile` accepts a cut."""
    if archive.fileobj.tell() - archive.offset < tarfile.BLOCKSIZE:
        raise ValueError(f"the shard {file} ends without the mark of a tar file's end: it is incomplete")
    while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise ValueError(f"the shard {file} holds more after the mark of its end: joined tar files are not read")


def _first_of(endings: str, sample: Sample, where: str) -> str:
    for ending in endings.split(";"):
        if ending.lower() in sample:
            return ending.lower()
    raise ValueError(f"{where}: there is no member {endings!r}; there are {', '.join(sample)}")


def _label(sample: Sample, target: str, where: str) -> int | str:
    """Return a sample's label, an integer where the member is one by its ending or the key by JSON."""
    endings = ";".join(part.partition(".")[0] if part.startswith("json.") else part for part in target.split(";"))
    ending = _first_of(endings, sample, where)
    try:
        text = sample[ending].decode().strip()
        if ending != "json":
            return int(text) if ending in _INTEGERS and _INTEGER.fullmatch(text) else normalized(text)
        value = json.loads(text)
        for key in next(part for part in target.split(";") if part.startswith("json.")).split(".")[1:]:
            value = value[key]
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"{where}: {target!r} cannot be read from the member {ending!r}: {error!r}") from error
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{where}: {target!r} is {value!r}; labels are integers or strings")
    return normalized(value) if isinstance(value, str) else value
