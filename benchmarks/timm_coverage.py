"""Measure the promise "any timm backbone": check every model that timm registers, and write what was found.

    python benchmarks/timm_coverage.py
    python benchmarks/timm_coverage.py --costs      # only what the default exits cost: seconds a model

Each model is checked by `backbone_checks.py`: on real tensors where it is small enough, else on torch's meta device.
One JSON line a model goes to `--output`; a run that was stopped goes on from there. `docs/coverage.md` is written from
the lines. The exit status is 1 if a model that has a classifier failed.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import timm
import torch
from backbone_checks import Subject, check_backbone

import timm_selfdistill as sd
from timm_selfdistill.exits import explore
from timm_selfdistill.preview import preview_exits

Row = dict[str, Any]

_OUTPUT = Path("runs/timm_coverage.jsonl")
# Of the multiply-accumulates that a head may cost, and of the parameters that all heads may have.
_MAX_HEAD, _MAX_PARAMS = 0.1, 0.25
# The memory of a process grows with every model that it builds.
_MODELS_PER_PROCESS = 40
_VERSIONS = {
    "timm_selfdistill": sd.__version__,
    "timm": timm.__version__,
    "torch": str(torch.__version__),
    "Python": platform.python_version(),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that have no line yet, write the report, and return 1 if any failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    if args.chunk:
        _print_lines(args.chunk, args)
        return 0
    names = [name for name in timm.list_models() if _is_of_timm(name) and fnmatch(name, args.models)][:: args.every]
    if args.costs and args.output == _OUTPUT:
        args.output = _OUTPUT.with_stem("timm_costs")
    rows = {} if args.fresh else _read(args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w") as file:
        for row in rows.values():
            print(json.dumps(row), file=file)
        for row in _sweep([name for name in names if name not in rows], args):
            print(json.dumps(row), file=file, flush=True)
            rows[row["name"]] = row
    rows = {name: rows[name] for name in names if name in rows}
    failed = [row for row in rows.values() if row["status"] == "failed"]
    print(f"{len(rows)} of {len(names)} models, {len(failed)} failed: {', '.join(row['name'] for row in failed)}")
    if args.costs:
        print("\n".join(format_costs(list(rows.values()))))
    elif args.report:
        args.report.write_text(format_report(list(rows.values()), len(names), arguments))
    return 1 if failed else 0


def check_model(name: str, max_params: float, max_macs: float, seconds: int, only_costs: bool) -> Row:
    """Check one model in this process.

    Args:
        name: Its name in timm.
        only_costs: Check nothing but what its default exits cost.
        max_params: Most parameters of a model that is run on real tensors.
        max_macs: Most multiply-accumulates, for one image, of such a model.
        seconds: Time after which the model counts as failed.

    Returns:
        The model's line; its "status" is "supported", "encoder" (it has no classifier and is refused) or "failed".
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(seconds)
    start = time.perf_counter()
    row: Row = {"name": name, "versions": _VERSIONS, "device": "meta"}
    try:
        if not only_costs:
            bare = _build_on_meta(name, max_params, max_macs)
            row["device"] = "cpu" if bare is None else "meta"
            row |= check_backbone(Subject(name, row["device"]), bare)
        if only_costs or row["status"] == "supported":
            row |= check_costs(name)
    except Exception as error:
        row |= {
            "status": "failed",
            "reason": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(limit=-4),
        }
    finally:
        signal.alarm(0)
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def check_costs(name: str) -> Row:
    """Check that the default exits of a model are in proportion to it, with its own number of classes.

    Returns:
        "costs": "paths" and "heads", the shares of its multiply-accumulates that are spent when each exit has answered
        and that each head has, and "params", the heads' share of its parameters.

    Raises:
        ValueError: If an exit costs what the network does, or the heads exceed their budget.
    """
    try:
        preview = preview_exits(name)
    except ValueError as error:
        if "no get_classifier" in str(error):
            return {"status": "encoder"}
        raise
    chosen = [row for row in preview.exits if row.is_chosen]
    heads = [row.head_macs / preview.macs for row in chosen]
    paths = [row.point.cost + head for row, head in zip(chosen, heads, strict=True)]
    params = sum(row.head_params for row in chosen) / preview.params
    if max(paths) >= 1 or max(heads) > _MAX_HEAD or params > _MAX_PARAMS:
        raise ValueError(f"out of proportion: paths {paths}, heads {heads} of the MACs, {params} of the parameters")
    return {"status": "supported", "costs": {"paths": paths, "heads": heads, "params": params}}


def _is_of_timm(name: str) -> bool:
    """Return whether timm itself registers the model, and not this package."""
    return timm.model_entrypoint(name).__module__.startswith("timm.")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check every model that timm registers.")
    parser.add_argument("--models", default="*", metavar="PATTERN", help="check those whose name matches")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="a JSON line a model")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="check every Nth model")
    parser.add_argument("--costs", action="store_true", help="check nothing but what the default exits cost")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report here, such as docs/coverage.md")
    parser.add_argument("--fresh", action="store_true", help="forget the lines of earlier runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--max-params", type=float, default=40e6, help="larger models run on the meta device")
    parser.add_argument("--max-macs", type=float, default=1.5e9, help="costlier models run on the meta device")
    parser.add_argument("--seconds", type=int, default=900, help="a model that takes longer counts as failed")
    parser.add_argument("--chunk", nargs="+", help=argparse.SUPPRESS)  # how this program starts itself for a part
    return parser.parse_args(arguments)


def _read(path: Path) -> dict[str, Row]:
    """Return the lines of earlier runs by name, without the failed ones and those of other versions."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows if row["status"] != "failed" and row["versions"] == _VERSIONS}


def _sweep(names: Sequence[str], args: argparse.Namespace) -> Iterable[Row]:
    """Yield the line of each model as it is done, from processes that check a chunk of models each."""
    chunks = [names[start : start + _MODELS_PER_PROCESS] for start in range(0, len(names), _MODELS_PER_PROCESS)]
    done: Queue[Row] = Queue()
    with ThreadPoolExecutor(args.jobs) as threads:
        futures = [threads.submit(_check_chunk, chunk, args, done.put) for chunk in chunks]
        for count in range(1, len(names) + 1):
            while True:
                try:
                    row = done.get(timeout=1)
                    break
                except Empty:
                    for future in futures:
                        if future.done():
                            future.result()
            outcome = f"{row['status']} on {row['device']} in {row['seconds']} s {row.get('reason', '')}"
            print(f"{count}/{len(names)} {row['name']} {outcome}", flush=True)
            yield row


def _check_chunk(names: Sequence[str], args: argparse.Namespace, report: Callable[[Row], None]) -> None:
    """Check models in a process of their own; should it die, go on behind the model at which it died."""
    left = list(names)
    while left:
        limits = [f"--max-params={args.max_params}", f"--max-macs={args.max_macs}", f"--seconds={args.seconds}"]
        limits += ["--costs"] if args.costs else []
        command = [sys.executable, __file__, *limits, "--chunk", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                report(json.loads(line))
                left.pop(0)
        if left:
            reason = f"the process died with status {process.returncode}"
            report(
                {
                    "name": left.pop(0),
                    "versions": _VERSIONS,
                    "device": "?",
                    "status": "failed",
                    "reason": reason,
                    "seconds": 0,
                }
            )


def _print_lines(names: Sequence[str], args: argparse.Namespace) -> None:
    """Check models one after the other and print their lines, and nothing else, to the standard output."""
    lines, sys.stdout = sys.stdout, sys.stderr
    for name in names:
        row = check_model(name, args.max_params, args.max_macs, args.seconds, args.costs)
        print(json.dumps(row), file=lines, flush=True)


def _build_on_meta(name: str, max_params: float, max_macs: float) -> Any:
    """Return the backbone on the meta device, or None if it is small or cannot run there."""
    try:
        backbone = Subject(name, "meta").create()
        if not hasattr(backbone, "get_classifier"):
            return backbone
        macs = explore(backbone).run.total_macs
    except Exception:
        return None
    params = sum(parameter.numel() for parameter in backbone.parameters())
    return None if params <= max_params and macs <= max_macs else backbone


def _out_of_time(*args: object) -> None:
    raise TimeoutError("the time for this model is up")


def format_report(rows: Sequence[Row], registered: int, arguments: Sequence[str]) -> str:
    """Return the text of the report.

    Args:
        rows: The lines of all models that were checked.
        registered: How many there are.
        arguments: Those of the command.
    """
    supported = [row for row in rows if row["status"] == "supported"]
    with_classifier = [row for row in rows if row["status"] != "encoder"]
    real = [row for row in supported if row["device"] == "cpu"]
    share = 100 * len(supported) / max(1, len(with_classifier))
    command = shlex.join(["python", "benchmarks/timm_coverage.py", *arguments])
    versions = ", ".join(f"{name} {version}" for name, version in _VERSIONS.items())
    return "\n".join(
        [
            "# Which timm models work",
            "",
            f"Written by `{command}` ({versions}).",
            "",
            f"timm registers {registered:,} model names; {len(rows):,} were checked. **{len(supported):,} of the "
            f"{len(with_classifier):,} that have a classifier work ({share:.1f} %)**, with the default exits and heads "
            "and ten classes.",
            "",
            "| | models |",
            "|---|---:|",
            f"| work, proved on real tensors | {len(real):,} |",
            f"| work, proved on the meta device | {len(supported) - len(real):,} |",
            f"| have a classifier and do not work | {len(with_classifier) - len(supported):,} |",
            f"| pure encoders, without a classifier: refused with an error that says so | "
            f"{len(rows) - len(with_classifier):,} |",
            "",
            _PROOF,
            "## Families",
            "",
            *_family_table(rows),
            "",
            "## Models that are not supported",
            "",
            *_unsupported_table(rows),
            "",
            "## Models with fewer than three exits",
            "",
            "By default there are three exits. These have fewer points between 2 % and 97 % of their cost:",
            "",
            *_few_exits_table(supported),
            "",
            "## Heads in proportion",
            "",
            *format_costs(supported),
            "",
            "## Against timm's own feature maps",
            "",
            *_oracle(supported),
            "",
        ]
    )


_PROOF = """\
"Work" means that each of these held, for a batch of two images of the model's own size
([`backbone_checks.py`](../benchmarks/backbone_checks.py)):

- exits are found, one dry run proves them, and heads fit them;
- `model(x)` is what the bare model gives, in train and eval mode, bit for bit, batch statistics included;
- `model(x, return_exits=True)` and `forward_exit` give the same logits for every exit;
- one training step gives every parameter of every head a gradient, and the backbone's whatever a plain step gives them;
- under gradient checkpointing, where timm offers it, each head runs once a step and the loss is the same;
- a deep copy, and a model saved and loaded again, give the same answers;
- `reset_classifier` resizes every exit;
- every tap, read as a feature map, has the shape of timm's `forward_intermediates`, and never its numbers in another
  order.

Real tensors were used for models up to the size that the command allows. The others ran on torch's meta device, which
has shapes and no numbers: there, "the same answer" means that the same operations ran on the same shapes in the same
order, and "saved and loaded" that the wrapped model is built again from the saved names of its exits.
"""


def _family_table(rows: Sequence[Row]) -> list[str]:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.get("family", "?")].append(row)
    lines = [
        "| family (`timm.models.`) | models | work | on real tensors | layouts | exits | gradient checkpointing |",
        "|---|---:|---:|---:|---|---|---:|",
    ]
    for family, members in sorted(families.items()):
        work = [row for row in members if row["status"] == "supported"]
        layouts = Counter(_layout(exit["taps"]) for row in work for exit in row["exits"])
        exits = Counter(len(row["exits"]) for row in work)
        cells = [
            f"`{family}`",
            str(len(members)),
            str(len(work)),
            str(sum(row["device"] == "cpu" for row in work)),
            ", ".join(sorted(layouts)),
            ", ".join(str(count) for count in sorted(exits)),
            str(sum(row["grad_checkpointing"] for row in work)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _layout(taps: Sequence[Sequence[Any]]) -> str:
    """Return the layouts of an exit's taps in words."""
    layouts = [tap[0] for tap in taps]
    return layouts[0] if len(layouts) == 1 else f"branches of {layouts[0]}"


def _unsupported_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| model | reason |", "|---|---|"]
    for row in rows:
        if row["status"] == "encoder":
            lines.append(f"| `{row['name']}` | has no classifier: a pure encoder |")
        elif row["status"] == "failed":
            lines.append(f"| `{row['name']}` | {row['reason'].splitlines()[0].replace('|', '/')[:300]} |")
    return lines


def _few_exits_table(rows: Sequence[Row]) -> list[str]:
    few: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row in rows:
        if len(row["exits"]) < 3:
            few[row["family"], len(row["exits"])].append(f"`{row['name']}`")
    lines = ["| family | exits | models |", "|---|---:|---|"]
    return lines + [f"| `{family}` | {count} | {', '.join(names)} |" for (family, count), names in sorted(few.items())]


def format_costs(rows: Sequence[Row]) -> list[str]:
    """Return what the default exits cost, over all models of which it is known."""
    costs = [row["costs"] for row in rows if "costs" in row]
    if not costs:
        return ["Not measured."]
    lines = [
        f"Of {len(costs):,} models with their own number of classes, each default exit, its head included, costs less "
        "than the network; in percent of the network's multiply-accumulates (MACs) or parameters:",
        "",
        "| | least | median | most |",
        "|---|---:|---:|---:|",
    ]
    columns = {
        "MACs when the last exit has answered": [max(cost["paths"]) for cost in costs],
        "MACs of the costliest head": [max(cost["heads"]) for cost in costs],
        "MACs of all heads together": [sum(cost["heads"]) for cost in costs],
        "parameters of all heads together": [cost["params"] for cost in costs],
    }
    for name, shares in columns.items():
        low, middle, high = (100 * share for share in (min(shares), statistics.median(shares), max(shares)))
        lines.append(f"| {name} | {low:.1f} | {middle:.1f} | {high:.1f} |")
    counts = Counter(len(cost["paths"]) for cost in costs)
    exits = ", ".join(f"{number:,} have {count}" for count, number in sorted(counts.items()))
    return [*lines, "", f"Of these models {exits} exits."]


def _oracle(rows: Sequence[Row]) -> list[str]:
    """Return what the comparison with `forward_intermediates` and `forward_head` found."""
    real = [row for row in rows if row["device"] == "cpu"]
    taps, shapes = (sum(row["taps_checked"][key] for row in rows) for key in ("taps", "same_shape"))
    real_shapes, values = (sum(row["taps_checked"][key] for row in real) for key in ("same_shape", "same_values"))
    features = Counter(row["teacher_feature"] for row in rows)
    lines = [
        f"Of {taps:,} taps, {shapes:,} have a counterpart in `forward_intermediates`, all of the same shape; of the "
        f"{real_shapes:,} of them on real tensors, {values:,} have the same values. Without one: {_without(rows)}.",
        "",
        "The teacher's feature is what enters the classifier. Beside `forward_head(..., pre_logits=True)` it is:",
        "",
        "| teacher's feature | models |",
        "|---|---:|",
    ]
    return lines + [f"| {outcome} | {count:,} |" for outcome, count in features.most_common()]


def _without(rows: Sequence[Row]) -> str:
    """Return the families whose taps have no counterpart, with their numbers, and why where timm's method failed."""
    missing: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for row in rows:
        checked = row["taps_checked"]
        missing[row["family"]] += checked["taps"] - checked["same_shape"]
        if "error" in checked:
            failed[row["family"]] = f", where timm's method fails on the {row['device']} device"
    noted = (f"`{family}` ({count}{failed.get(family, '')})" for family, count in sorted((+missing).items()))
    return ", ".join(noted) or "none"


if __name__ == "__main__":
    sys.exit(main())
