"""Measure what `wrap` costs, in forward passes of the backbone.

    python benchmarks/wrap_cost.py

Wrapping is one forward of a single image, which finds the exits, and the making of the heads' weights. Forward passes
and wraps take turns; ratios are taken round by round.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
from timm.data import resolve_input_data_config

import timm_selfdistill as sd
from timm_selfdistill.exits import Backbone, find_exit_points


def main(arguments: Sequence[str] | None = None) -> None:
    """Time forward passes, the search for exits and wraps, and print a table."""
    parser = argparse.ArgumentParser(description="Time of wrap in forward passes of the backbone.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    backbone = timm.create_model(args.model).eval()
    size = resolve_input_data_config(backbone)["input_size"]
    batches = [torch.randn(batch_size, *size) for batch_size in args.batch_sizes]
    runs: dict[str, Callable[[], object]] = {
        **{f"forward of {len(batch)}": partial(backbone, batch) for batch in batches},
        "find_exit_points": partial(find_exit_points, backbone),
        **{f"wrap, head {head}": partial(_wrap, backbone, head) for head in ("auto", *sd.list_heads())},
    }
    with torch.no_grad():
        for run in runs.values():
            run()
        rounds = [{label: _seconds(run) for label, run in runs.items()} for _ in range(args.rounds)]
    forwards = list(runs)[: len(batches)]
    print(f"| {args.model}, {size[1]} x {size[2]} | median ms | {' | '.join(f'over {label}' for label in forwards)} |")
    print(f"|---|---:|{'---:|' * len(forwards)}")
    for label in runs:
        ratios = [statistics.median(times[label] / times[base] for times in rounds) for base in forwards]
        median = 1000 * statistics.median(times[label] for times in rounds)
        print(f"| {label} | {median:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print(
        f"\nMedians of {args.rounds} rounds, float32, {torch.get_num_threads()} threads of {os.cpu_count()} CPU cores; "
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}."
    )


def _wrap(backbone: Backbone, head: str) -> None:
    """Wrap a backbone, and take off again the hooks that the wrapped model leaves on it."""
    sd.wrap(backbone, head=head)
    for module in backbone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
