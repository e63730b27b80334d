"""Runs that are killed without warning, and go on."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from forks import COMMAND, Fork, ForkServer
from test_multiprocess import TWO_PROCESSES, accelerate
from test_resume import SMALL, outcome

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import train


def train_for(forks: ForkServer, folder: Path, *overrides: str, seconds: float = 300.0) -> float | None:
    """Train until done, and return how long it took; or until the time is over, and return None."""
    started = time.monotonic()
    process = forks.start(COMMAND, ["digits", *SMALL, *overrides, f"output_dir={folder}"])
    status, _, errors = process.wait(seconds, kill=True)
    if status == -signal.SIGKILL:
        return None
    assert status == 0, errors
    return time.monotonic() - started


@pytest.mark.multiprocess
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(
    tmp_path: Path, forks: ForkServer, kills: int
) -> None:
    # A checkpoint at every step, so that many a kill falls into the writing of one.
    overrides = ("checkpoint.every_steps=1", "epochs=3", "ema={decay: 0.9}")
    whole = train_for(forks, tmp_path / "whole", *overrides)
    assert whole is not None
    draw = random.Random(kills)
    killed = finished = 0
    while killed < kills:
        if train_for(forks, tmp_path / "cut", *overrides, seconds=draw.uniform(0.1, 0.7) * whole) is None:
            killed += 1
        else:
            # Finished before all kills were done: the rest of them hit a run of its own.
            assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
            finished += 1
            (tmp_path / "cut").rename(tmp_path / f"finished {finished}")
    assert train_for(forks, tmp_path / "cut", *overrides) is not None
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# Several processes.


def start(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start two CPU processes as docs/train.md says."""
    command = [sys.executable, "-m", *accelerate(*TWO_PROCESSES, *options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["-m", "timm_selfdistill.train", "digits", *SMALL, *overrides, f"output_dir={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, once they do."""
    return [
        child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if "timm_selfdistill.train" in child.cmdline() and "accelerate.commands.launch" not in child.cmdline()
    ]


def wait_for_steps(folder: Path, process: subprocess.Popen[str] | Fork) -> None:
    """Wait until a run is in its second epoch."""
    while not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text()):
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.02)


def start_two(forks: ForkServer, folder: Path, *overrides: str) -> list[Fork]:
    """Start two processes as a launcher would."""
    return forks.start_together(COMMAND, ["digits", *SMALL, *overrides, f"output_dir={folder}"])


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "loss",
    [
        (),
        pytest.param(("loss.name=dlb", "loss.kwargs={weight: 5.0}"), id="DLB: each process remembers other logits"),
        pytest.param(("loss.name=ps-kd",), id="PS-KD: they share the past model", marks=pytest.mark.slow),
        pytest.param(
            ("ema={decay: 0.5}", "loss.teacher=ema", "loss.kd_weight=1.0"),
            id="they share the average",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_to_one_process_stops_all_of_them_with_everything_saved(
    tmp_path: Path, forks: ForkServer, loss: tuple[str, ...]
) -> None:
    overrides = ("epochs=12", *loss)
    cut = start_two(forks, tmp_path / "cut", *overrides)
    wait_for_steps(tmp_path / "cut", cut[0])
    cut[1].send_signal(signal.SIGTERM)
    (other, _, errors), (status, _, said) = [process.wait() for process in cut]
    assert status == 75, said
    assert "Stopped by SIGTERM. Run the same command again to go on." in said
    # Between two epochs, where nothing is unsaved, the process stops at once, and the other one finds it gone.
    stop = "Stopped by a signal to another process. Run the same command again to go on."
    assert (other, stop in errors, "Another process of the run is gone" in errors) in (
        (75, True, False),
        (1, False, True),
    )
    for folder in ("cut", "whole"):
        ended = [process.wait() for process in start_two(forks, tmp_path / folder, *overrides)]
        assert [status for status, *_ in ended] == [0, 0], ended
        assert ("Resuming self-distilled from" in ended[0][2]) == (folder == "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.multiprocess
def test_a_process_that_is_killed_ends_the_run_within_a_minute_or_restarts_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ("epochs=12", "checkpoint.every_steps=1")
    launcher = start(tmp_path, *overrides, options=("--max_restarts", "1"))
    wait_for_steps(tmp_path, launcher)
    first = ranks_of(launcher)
    first[0].kill()
    # The launcher starts both of them again, and gives up when one of these is killed too.
    psutil.wait_procs(first, timeout=120)
    steps = newest_step(tmp_path)
    while newest_step(tmp_path) < steps + 2:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)
    ranks_of(launcher)[1].kill()
    errors = launcher.communicate(timeout=120)[1]
    assert launcher.returncode != 0
    assert "Resuming self-distilled from" in errors
    # One process goes on where two were.
    train(load_recipe("digits", [*SMALL, *overrides, f"output_dir={tmp_path}"]))
    assert "was trained by 2 process(es) and goes on with 1" in caplog.text
    assert "It will not end in the same bits as an undisturbed run" in caplog.text
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 48


# A whole process group, loader processes included.


def run_in_a_terminal(folder: Path, when: str, stop: Callable[[int, int], None], *launcher: str) -> tuple[int, str]:
    """Run a training as the foreground group of a terminal, stop it once it says so; return its status and words.

    Args:
        folder: The run's folder.
        when: What it must have said.
        stop: Called with its process id, which is that of its group, and the terminal.
        launcher: What stands between `python -m` and the module.
    """
    command = [sys.executable, "-m", *launcher, "timm_selfdistill.train", "digits", *SMALL, "data.workers=2"]
    command += ["epochs=40", "data.validation=0.2", f"output_dir={folder}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, environment)
    termios.tcsetwinsize(terminal, (24, 160))  # progress bars have no titles where there is no room
    said, stopped = "", False
    try:
        while part := os.read(terminal, 10000).decode(errors="replace"):
            said += part
            if not stopped and re.search(when, said):
                stop(pid, terminal)
                stopped = True
    except OSError:  # how reading a terminal ends once no process writes to it
        pass
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def newest_step(folder: Path) -> int:
    checkpoints = (folder / "checkpoints" / "self-distilled").glob("checkpoint-*")
    return max(int(path.name.removeprefix("checkpoint-")) for path in checkpoints)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        pytest.param(lambda pid, terminal: os.write(terminal, b"\x03"), 130, "Stopped by SIGINT", id="Ctrl-C"),
        pytest.param(lambda pid, terminal: os.killpg(pid, signal.SIGTERM), 75, "Stopped by SIGTERM", id="SIGTERM"),
    ],
)
def test_a_signal_to_the_whole_process_group_stops_with_the_step_saved(
    tmp_path: Path, stop: Callable[[int, int], None], status: int, said: str
) -> None:
    # In the middle of the third epoch.
    ended, words = run_in_a_terminal(tmp_path, "self-distilled 3/40", stop)
    assert ended == status, words
    assert f"{said}. Run the same command again to go on." in words
    assert "Traceback" not in words
    assert "DataLoader worker" not in words
    assert newest_step(tmp_path) > 2
    assert not list(tmp_path.glob("*skipped*"))


@pytest.mark.multiprocess
def test_ctrl_c_to_a_launcher_and_its_processes_saves_the_step(tmp_path: Path) -> None:
    launcher = (*accelerate(*TWO_PROCESSES), "-m")
    ended, words = run_in_a_terminal(
        tmp_path, "self-distilled 3/40", lambda pid, terminal: os.write(terminal, b"\x03"), *launcher
    )
    assert ended != 0
    # One of them may be told by the other before the launcher tells it, and then says so instead.
    assert "Stopped by SIGINT. Run the same command again to go on." in words
    # The launcher prints where it was itself, and nothing of the processes.
    assert "StopSignals" not in words
    assert "DataLoader worker" not in words
    assert newest_step(tmp_path) > 2
