"""Try the staged export on one small member of each of timm's classes, and say which cannot be cut, and why.

Run from the repository root, with the package installed: python benchmarks/onnx_stages.py [NAME ...]
By default the graphs are traced, cut, and run on parts of a batch by torch; with --write they are written as ONNX, and
run by ONNX Runtime. A JSON line a class goes to --output; a run that was stopped goes on from there.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import timm
import torch
from backbone_checks import Subject
from early_exit_overhead import calibrate_statistics
from test_timm_families import ENCODERS, FORMS, MEMBERS

import timm_selfdistill as sd
from timm_selfdistill.export.early_exit_graphs import DecidingExits, check_stages, describe_early_exit, manifest_of
from timm_selfdistill.staged import MANIFEST, Manifest

Row = dict[str, Any]
_VERSIONS = {"timm_selfdistill": sd.__version__, "timm": timm.__version__, "torch": str(torch.__version__)}


def main() -> int:
    """Print a line for each class, and at the end those that cannot be cut."""
    subjects = {name: subject for name, subject in {**MEMBERS, **FORMS}.items() if name not in ENCODERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes; by default all")
    parser.add_argument("--write", action="store_true", help="write the stages as ONNX, and run them")
    parser.add_argument("--output", type=Path, default=Path("runs/onnx_stages.jsonl"), help="a JSON line a class")
    parser.add_argument("--again", action="store_true", help="try those too that could not be cut before")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other class after this time")
    parser.add_argument("--timeout", type=float, default=900, help="most seconds of a class")
    parser.add_argument("--memory", type=float, default=12, help="most GiB of address space that a class may ask for")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, begun = arguments.names or list(subjects), time.perf_counter()
    rows = {name: row for name, row in read(arguments.output).items() if name in subjects}
    todo = [name for name in names if not is_done(rows.get(name), arguments)]
    for name in todo:
        if time.perf_counter() - begun > arguments.seconds:
            break
        rows[name] = {"class": name, "model": subjects[name].name, **in_a_process(subjects[name], arguments)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("a") as file:
            print(json.dumps(rows[name]), file=file)
        print(f"{name:28} {rows[name]['seconds']:6.1f} s  {describe(rows[name])}", flush=True)
    rows = {name: rows[name] for name in names if name in rows}
    summarize(rows)
    return 1 if any("error" in row for row in rows.values()) or len(rows) < len(names) else 0


def read(path: Path) -> dict[str, Row]:
    """Return the last line of each class."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["class"]: row for row in map(json.loads, lines) if row["versions"] == _VERSIONS}


def is_done(row: Row | None, arguments: argparse.Namespace) -> bool:
    """Whether a class has the line that is asked for."""
    if row is None or (arguments.write and not row["written"]):
        return False
    return "error" not in row or not arguments.again


def in_a_process(subject: Subject, arguments: argparse.Namespace) -> Row:
    """Return what was found in a process of its own, which shares what this one has imported."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(subject, arguments.write, arguments.memory, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(arguments.timeout) else {"error": "out of time"}
    except EOFError:
        found = {"error": "the process ended without an answer"}
    process.kill()
    process.join()
    seconds = round(time.perf_counter() - start, 1)
    return {**found, "written": arguments.write, "seconds": seconds, "versions": _VERSIONS}


def report(subject: Subject, write: bool, gigabytes: float, sender: Connection) -> None:
    """Send what was found of a model."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    found: Row = {}
    try:
        try_stages(subject, write, found)
    except Exception as error:  # whatever a network raises is what the table is to tell
        found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
    sender.send(found)


def try_stages(subject: Subject, write: bool, found: Row) -> None:
    """Put what is carried between the stages of a model into a line; raise whatever keeps it from being cut."""
    backbone = subject.create()
    x = subject.images(backbone)
    model = subject.wrap(backbone).eval()
    calibrate_statistics(model, x)
    network = sd.EarlyExit(model, 0.5)
    found["shrinks"] = list(network.shrinks)
    size = tuple(x.shape[1:])
    if write:
        with tempfile.TemporaryDirectory() as folder:
            sd.export_early_exit(network, Path(folder) / "stages", format="onnx-stages", image_size=size[1:])
            content = json.loads((Path(folder) / "stages" / MANIFEST).read_text())
    else:
        deciding = DecidingExits(model, network.config)
        stages = deciding.cut(size, "onnx", dynamic_batch=True)
        content = manifest_of(stages, "onnx", describe_early_exit(network, size[1:], None))
        runs = [lambda inputs, run=stage.network: run(*inputs) for stage in stages]
        content = json.loads(json.dumps({**content, "sha256": {}}))
        with torch.no_grad():
            check_stages(deciding, Manifest.from_json(content), runs, "stages")
    outputs = [
        [value for value in stage["outputs"] if value["name"].startswith("carried")] for stage in content["stages"]
    ]
    found["carried"] = [[value["shape"][1:] for value in values] for values in outputs[:-1]]


def describe(row: Row) -> str:
    """Return what a line says."""
    if "error" in row:
        return f"not cut: {row['error'][:300]}"
    sizes = ["+".join("x".join(map(str, shape)) for shape in shapes) for shapes in row["carried"]]
    shrinks = "" if all(row["shrinks"]) else f"; in PyTorch {sum(row['shrinks'])} of {len(row['shrinks'])} shrink"
    return f"cut: {', '.join(sizes)}{shrinks}"


def summarize(rows: dict[str, Row]) -> None:
    """Print how many classes can be cut, and which not."""
    failed = [name for name, row in rows.items() if "error" in row]
    kept = [name for name, row in rows.items() if not all(row.get("shrinks", [True]))]
    written = sum(row["written"] and "error" not in row for row in rows.values())
    print(f"\n{len(rows)} tried, {len(rows) - len(failed)} cut; {written} written, and run by ONNX Runtime.")
    print(
        f"Not cut: {', '.join(failed) or 'none'}.\nIn PyTorch, some exits do not shrink: {', '.join(kept) or 'none'}."
    )


if __name__ == "__main__":
    sys.exit(main())
