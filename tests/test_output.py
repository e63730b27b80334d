"""What a run says while it trains: bars on a terminal only, lines that stay, and trackers' steps that only rise."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from timm_selfdistill.output import duration, progress_bar, tell
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import train

SMALL = ["epochs=2", "schedule.warmup_epochs=0", "batch_size=16", "precision='no'", "data.workers=0"]
DATA = [
    "data.max_train=32",
    "data.max_eval=10",
    "data.image_size=16",
    "model.kwargs={channels: [4, 4, 8, 8], in_chans: 1}",
]


def test_a_run_says_one_line_an_epoch_and_trackers_get_rising_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    log = Accelerator.log

    def watched(self: Accelerator, values: dict[str, Any], step: int, **options: Any) -> None:
        logged.append((step, values))
        log(self, values, step=step, **options)

    monkeypatch.setattr(Accelerator, "log", watched)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(load_recipe("digits", [*SMALL, *DATA, f"output_dir={tmp_path}", "baseline=true"]))
    assert [str(warning.message) for warning in warned] == []
    said = capsys.readouterr().err
    assert "\r" not in said, "the error output is not a terminal here"
    lines = [line for line in said.splitlines() if re.match(r"(baseline|self-distilled) \d/2  ", line)]
    assert [line.split("  ")[0] for line in lines] == [
        "baseline 1/2",
        "baseline 2/2",
        "self-distilled 1/2",
        "self-distilled 2/2",
    ]
    number = r"[\d.e+-]+"
    for line in lines:
        assert re.search(rf"  loss {number}  rate {number}  top-1 ([\d.]+ ?)+(, ensemble {number})?  \d+ s", line), line
    assert lines[0].endswith(" left")
    assert "ensemble" in lines[2]
    assert not lines[3].endswith(" left")
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)
    assert {step for step, values in logged if "baseline/train/loss" in values} == {2, 4}
    assert {step for step, values in logged if "self-distilled/train/loss" in values} == {6, 8}
    assert all(isinstance(value, int | float) for _, values in logged for value in values.values())


def test_bars_are_hidden_without_a_terminal_and_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar(range(3), title="count")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for value, is_hidden in (("1", True), ("0", False)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        bar = progress_bar(title="a" * 200, total=3)
        assert bool(bar.disable) == is_hidden
        bar.set_postfix({"loss": "1.23", "img/s": "1000"})
        bar.close()
    assert all(len(part) <= 80 for part in re.split(r"[\r\n]", capsys.readouterr().err))
    assert progress_bar(title="none", show=False).disable


def test_lines_and_times_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a\x1b[2Jb")
    assert capsys.readouterr().err == "a\\x1b[2Jb\n"
    assert [duration(seconds) for seconds in (7.6, 119, 600, 12_600)] == ["8 s", "119 s", "10 min", "3.5 h"]
