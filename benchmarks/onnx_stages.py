"""Try the staged export on one small member of each of timm's classes, and say which cannot be cut, and why.

Run from the repository root, with the package installed: python benchmarks/onnx_stages.py [NAME ...]
By default the graphs are traced, cut, and run on parts of a batch by torch; with --write they are also written as ONNX,
and run by ONNX Runtime.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from early_exit_overhead import calibrate_statistics
from test_timm_families import ENCODERS, FORMS, MEMBERS

import timm_selfdistill as sd
from timm_selfdistill.export.deciding_exits import DecidingExits, describe_early_exit
from timm_selfdistill.export.early_exit_graphs import check_stages, manifest_of
from timm_selfdistill.staged import Manifest


def main() -> int:
    """Print a line for each class, and at the end those that cannot be cut."""
    subjects = {name: subject for name, subject in {**MEMBERS, **FORMS}.items() if name not in ENCODERS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes; by default all")
    parser.add_argument("--write", action="store_true", help="write the stages as ONNX, and run them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other class after this time")
    arguments = parser.parse_args()
    failed, begun = {}, time.perf_counter()
    names = arguments.names or sorted(subjects)
    for count, name in enumerate(names):
        if time.perf_counter() - begun > arguments.seconds:
            print(f"The time is up; {len(names) - count} classes were not tried: {' '.join(names[count:])}")
            break
        start = time.perf_counter()
        try:
            said = f"cut: {try_stages(subjects[name], arguments.write)}"
        except Exception as error:  # whatever a network raises is what the table is to tell
            said = failed[name] = f"not cut: {type(error).__name__}: {str(error)[:300]}"
        print(f"{name:28} {time.perf_counter() - start:6.1f} s  {said}", flush=True)
    print(f"\n{len(failed)} cannot be cut: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def try_stages(subject: object, write: bool) -> str:
    """Return what is carried between the stages of a model; raise whatever keeps it from being cut or written."""
    backbone = subject.create()
    x = subject.images(backbone)
    model = subject.wrap(backbone).eval()
    calibrate_statistics(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = sd.EarlyExit(model, 0.5)
    size = tuple(x.shape[1:])
    deciding = DecidingExits(model, network.config)
    stages = deciding.cut(size, "onnx", dynamic_batch=True)
    manifest = manifest_of(stages, "onnx", describe_early_exit(network, size[1:], None))
    runs = [lambda inputs, run=stage.network: run(*inputs) for stage in stages]
    with torch.no_grad():
        check_stages(deciding, Manifest.from_json(json.loads(json.dumps({**manifest, "sha256": {}}))), runs, "stages")
    if write:
        with tempfile.TemporaryDirectory() as folder:
            sd.export_early_exit(network, Path(folder) / "stages", format="onnx-stages", image_size=size[1:])
    carried = [[value for value in stage.outputs if value.name.startswith("carried")] for stage in stages[:-1]]
    sizes = ["+".join("x".join(map(str, value.shape[1:])) for value in values) for values in carried]
    shrinks = "" if all(network.shrinks) else f"; in PyTorch {sum(network.shrinks)} of {len(network.shrinks)} shrink"
    return f"{', '.join(sizes)}{shrinks}"


if __name__ == "__main__":
    sys.exit(main())
