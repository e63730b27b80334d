"""Measure what reading a folder of images costs beside a bare walk through it.

    python benchmarks/scan_folder.py                        # 1,000,000 images in 1,000 classes, made for it and deleted
    python benchmarks/scan_folder.py --images 100000 --folder DISK

The images are empty files, so that nothing but names, folders and sizes is read.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from timm_selfdistill.data.file_rows import path_rows
from timm_selfdistill.data.image_folder import load_image_folder
from timm_selfdistill.recipe import DataSection


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the ways in turns and print a table."""
    parser = argparse.ArgumentParser(description="Time of reading a folder of images beside a bare os.walk.")
    parser.add_argument("--images", type=int, default=1_000_000, help="number of files; a twentieth is the test split")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make them; the system's temporary folder by default")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder) / "images"
        _make(root, args.images, args.classes)
        paths = [path for path, _ in _walk(root)]
        targets = np.zeros(len(paths), np.int64)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        ways: dict[str, Callable[[], Any]] = {
            "os.walk": lambda: _walk(root),
            "rows of these paths": lambda: path_rows(paths, targets, features),
            "folder read": lambda: _read(root, check_duplicates=False),
            "folder read, splits compared": lambda: _read(root, check_duplicates=True),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    bare = [walk + rows for walk, rows in zip(seconds["os.walk"], seconds["rows of these paths"], strict=True)]
    print(f"| {len(paths)} images, {args.classes} classes | median s | over os.walk and rows |")
    print("|---|---:|---:|")
    for way, times in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(times, bare, strict=True))
        print(f"| {way} | {statistics.median(times):.2f} | {ratio:.2f} |")
    print(f"\nMedians of {args.rounds} rounds, the folder's entries in memory; Python {platform.python_version()}.")


def _make(root: Path, images: int, classes: int) -> None:
    for split, count in (("train", images - images // 20), ("test", images // 20)):
        for index in range(classes):
            folder = root / split / f"class{index:04}"
            folder.mkdir(parents=True)
            for number in range(index, count, classes):
                os.close(os.open(folder / f"image{number:07}.jpg", os.O_CREAT | os.O_WRONLY))


def _walk(root: Path) -> list[tuple[str, str]]:
    """Return the path of every file and the folder that it is in."""
    return [(os.path.join(folder, name), folder) for folder, _, names in os.walk(root) for name in names]


def _read(root: Path, *, check_duplicates: bool) -> Any:
    return load_image_folder(str(root), DataSection(path=str(root), validation=0.0, check_duplicates=check_duplicates))


if __name__ == "__main__":
    main()
