"""Signals that stop a run; what a run that was stopped goes on with is in test_resume."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from test_resume import SMALL

import timm_selfdistill as sd
from timm_selfdistill import predict, stop
from timm_selfdistill.data import batches, image_folder, open_dataset
from timm_selfdistill.data.batches import Collate
from timm_selfdistill.data.decode import SkipList
from timm_selfdistill.exits import probe
from timm_selfdistill.program import run_safely
from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.stop import Interrupted, StopSignals, end_program
from timm_selfdistill.train import train
from timm_selfdistill.train.trainer import Trainer


def stopped(*args: Any, **kwargs: Any) -> Any:
    """What a signal comes in the middle of."""
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("it went on")


def in_a_fork(work: Callable[[], object]) -> int:
    """Return the exit status of a process that does some work and would then end with 7."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_signal_in_the_dry_run_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.MacCounter, "__enter__", stopped)
    with pytest.raises(Interrupted, match="Stopped by SIGTERM"), StopSignals():
        sd.wrap("test_resnet", num_classes=3)


def test_a_signal_while_a_model_is_created_is_no_fault_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", stopped)
    with pytest.raises(Interrupted), StopSignals():
        sd.wrap("test_resnet", num_classes=3)


def test_a_signal_while_data_is_opened_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", stopped)
    with pytest.raises(Interrupted), StopSignals():
        open_dataset(load_recipe("digits").data, 0)


@pytest.mark.parametrize("step", ["find_images", "check_no_shared_images"])
def test_a_signal_while_a_folder_is_scanned_is_no_fault_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str
) -> None:
    for number, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8), number).save(tmp_path / folder / "1.png")
    monkeypatch.setattr(image_folder, step, stopped)
    with pytest.raises(Interrupted), StopSignals():
        open_dataset(load_recipe("digits", [f"data.path={tmp_path}"]).data, 0)


@pytest.mark.parametrize("step", ["read", "decode"])
def test_a_signal_while_an_image_is_decoded_is_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(batches, step, stopped)
    load = Collate("evaluation", "test", "RGB", lambda image: image, SkipList(tmp_path)).load
    with pytest.raises(Interrupted), StopSignals():
        load({"image": (tmp_path / "a.png").read_bytes(), "target": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_signal_while_an_image_is_predicted_is_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    model = sd.wrap("test_resnet", num_classes=3).eval()
    monkeypatch.setattr(predict, "decode", stopped)
    with pytest.raises(Interrupted), StopSignals():
        list(sd.predict_images(model, [tmp_path / "a.png"]))


def test_a_signal_whose_exception_was_swallowed_stops_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    printed = []
    monkeypatch.setattr("sys.unraisablehook", printed.append)
    with pytest.raises(Interrupted, match="SIGUSR1"), StopSignals():
        Swallows()
    assert len(printed) == 1


def test_a_process_that_is_forked_meanwhile_leaves_signals_alone() -> None:
    with StopSignals():
        assert in_a_fork(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 7


@pytest.mark.parametrize("told", [True, False], ids=["it was told to stop too", "it was told nothing"])
def test_a_step_that_cannot_end_as_another_process_has_stopped_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: bool
) -> None:
    def step(self: Trainer, *args: object) -> bool:
        if told:
            os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2")

    monkeypatch.setattr(Trainer, "_step", step)
    kind, message = (Interrupted, "Stopped by SIGINT") if told else (RuntimeError, "Connection closed by peer")
    with pytest.raises(kind, match=message):
        train(load_recipe("digits", [*SMALL, f"output_dir={tmp_path}"]))


def test_a_launcher_that_hands_ctrl_c_on_does_not_count_as_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signals = StopSignals()
    with signals.deferred():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signals._handle(number, None)
        assert signals.interruption().exit_status == 130
        signals._last -= 2
        with pytest.raises(Interrupted, match="SIGINT"):
            signals._handle(signal.SIGINT, None)


def test_a_signal_at_the_end_of_a_program_ends_it_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        monkeypatch.setattr("atexit._run_exitfuncs", lambda number=number: os.kill(os.getpid(), number))
        assert in_a_fork(lambda: end_program(0)) == status
        assert capfd.readouterr().err == f"Stopped by {number.name}. Run the same command again to go on.\n"


def test_a_stopped_program_does_not_wait_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: time.sleep(600))
    assert in_a_fork(lambda: end_program(75)) == 75
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: time.sleep(0.5))
    assert in_a_fork(lambda: end_program(0)) == 0


def test_a_program_ends_when_all_is_done_and_printed() -> None:
    code = (
        "import atexit, threading, time\n"
        "from timm_selfdistill.stop import end_program\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "atexit.register(print, 'at exit')\n"
        "print('main')\n"
        "end_program(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")) == (3, ["main", "thread", "at exit", ""])


def test_a_command_leaves_the_level_of_loggers_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("timm_selfdistill.data")
    before = logger.level
    assert run_safely(lambda: logger.info("read")) == 0
    assert caplog.messages == ["read"]
    assert logger.level == before
