"""Measure what `import timm_selfdistill` adds to the time of `import timm` and the other packages that it needs.

    python benchmarks/import_time.py

Public names are imported when they are first used: the last row uses four of them. Each import is timed in an
interpreter of its own, in seconds of the processor. They take turns, so that a machine that slows down slows all of
them; the ratio is taken round by round.
"""

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence

_USED = "from timm_selfdistill import EarlyExit, SelfDistillationLoss, save_pretrained, wrap"
_TIMED = """
import time
start = time.process_time()
{}
print(time.process_time() - start)
"""
_LISTED = f"""
import sys
import timm
before = set(sys.modules)
{_USED}
mine = [name for name in sys.modules if name not in before and name.split(".")[0] != "timm_selfdistill"]
print("\\n".join(name for name in mine if name.split(".")[0] not in sys.stdlib_module_names))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the imports and print a table."""
    parser = argparse.ArgumentParser(description="Time of importing timm_selfdistill beside importing timm.")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    needed = _third_party_modules()
    imports = {
        "timm": "import timm",
        "timm and the other packages": f"import {', '.join(['timm', *needed])}",
        "timm and timm_selfdistill": "import timm, timm_selfdistill",
        "timm_selfdistill, four names used": _USED,
    }
    for code in imports.values():
        _seconds(code)
    rounds = [{label: _seconds(code) for label, code in imports.items()} for _ in range(args.rounds)]
    packages = sorted({name.split(".")[0] for name in needed if not name.startswith("_")})
    print(f"Beside timm, timm_selfdistill imports {', '.join(packages) or 'no other package'}.\n")
    print("| import | median s | over timm | over timm and the other packages |")
    print("|---|---:|---:|---:|")
    for label in imports:
        ratios = (_ratio(rounds, label, base) for base in list(imports)[:2])
        median = statistics.median(times[label] for times in rounds)
        print(f"| {label} | {median:.3f} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |")
    print(f"\nMedians of {args.rounds} rounds; Python {platform.python_version()}.")


def _third_party_modules() -> list[str]:
    """Return the modules of other packages that importing timm_selfdistill loads and importing timm does not."""
    output = subprocess.run([sys.executable, "-c", _LISTED], capture_output=True, text=True, check=True).stdout
    return output.split()


def _seconds(code: str) -> float:
    command = [sys.executable, "-c", _TIMED.format(code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _ratio(rounds: Sequence[dict[str, float]], label: str, base: str) -> float:
    return statistics.median(times[label] / times[base] for times in rounds)


if __name__ == "__main__":
    main()
