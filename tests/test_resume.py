"""Runs that are stopped and go on: they end as if nothing had happened. Killed ones are in test_kill."""

import copy
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from once import once
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli
from timm_selfdistill.heads import HEADS
from timm_selfdistill.losses.protocol import _LOSSES
from timm_selfdistill.program import NonFiniteLossError
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.stop import EXIT_INTERRUPTED, Interrupted, StopSignals
from timm_selfdistill.train import checkpoint, finished_report, launch, train, trainer
from timm_selfdistill.train.builders import build_optimizer
from timm_selfdistill.train.checkpoint import load_checkpoint
from timm_selfdistill.train.parallelism import Replicated
from timm_selfdistill.train.steps import PhaseState

# Four steps an epoch, of a network that draws random numbers itself, on images that are drawn at random. (In bf16,
# images of 16 px are too small: oneDNN leaves the gradient of weights that only meet padding undefined.)
SMALL = (
    "epochs=3",
    "batch_size=16",
    "data.max_train=64",
    "data.max_eval=20",
    "data.image_size=16",
    "data.workers=0",
    "model.kwargs={in_chans: 1, channels: [8, 8, 16, 16], drop_rate: 0.2, drop_path_rate: 0.2}",
    "exits.head=linear",
    "augment.re_prob=0.5",
    "precision='no'",
    "baseline=false",
)


class LearnedWeights(nn.Module):
    """Cross-entropies, each with the weight exp(-s) for a learned s."""

    needs_exits = True

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(4))

    def forward(self, out: sd.ExitOutput, target: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = torch.stack([F.cross_entropy(logits, target) for logits in out.logits])
        return {"loss": ((-self.log_variances).exp() * losses + self.log_variances).sum()}


class DropoutHead(nn.Module):
    """A head that draws random numbers."""

    def __init__(self, tap: sd.Tap, feature_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(tap.channels, feature_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.project(x.mean((2, 3))), 0.5, self.training)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests only: others list what is registered."""
    monkeypatch.setitem(_LOSSES._entries, "test-learned-weights", LearnedWeights)
    monkeypatch.setitem(HEADS._entries, "test-dropout", DropoutHead)


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, f"output_dir={folder}", *overrides])


def outcome(folder: Path) -> dict[str, Any]:
    """What a run ended with: weights, metrics and report, but for times and the folder's name."""
    files = [folder / "model" / name for name in ("model.safetensors", "exits.safetensors")]
    weights = {f"{f.name}:{k}": v.numpy().tobytes() for f in files for k, v in safetensors.torch.load_file(f).items()}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((folder / "report.json").read_text())
    timed = {"latency_ms", "speedup", "latency_rounds", "train_seconds", "recipe"}
    timed |= {f"{network}/train/images_per_second" for network in ("baseline", "self-distilled")}
    return {"weights": weights, "metrics": _without(metrics, timed), "report": _without(report, timed)}


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of the recipe; only to be read."""
    return once(tmp_path_factory, "whole", lambda folder: train(recipe(folder)))


@pytest.fixture
def after_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """A function that lets something happen in the middle of the step that is `count` steps from now."""

    step = trainer.Trainer._step

    def at(count: int, what: Callable[[], None]) -> None:
        left = [count]

        def wrapped(*args: Any) -> bool:
            left[0] -= 1
            if left[0] == 0:
                what()
            return step(*args)

        monkeypatch.setattr(trainer.Trainer, "_step", wrapped)

    return at


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def run_in_pieces(recipe: Recipe, steps: int, after_steps: Any) -> int:
    """Run a recipe, stopping it each time after this many steps; return how often it was stopped."""
    for stops in range(100):
        AcceleratorState._reset_state(True)
        after_steps(steps, send(signal.SIGTERM))
        try:
            train(recipe)
        except Interrupted:
            continue
        after_steps(10**9, send(signal.SIGTERM))
        return stops
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("steps", "overrides"),
    [
        pytest.param(1, (), id="at every step"),
        pytest.param(
            3,
            (
                "data.workers=2",
                "ema={decay: 0.9}",
                "augment.mixup_alpha=0.5",
                "augment.cutmix_alpha=0.5",
                "schedule.select=best",
                "loss.gate=0",
                "exits.head=test-dropout",
            ),
            id="workers, EMA, Mixup, best, heads that draw random numbers of their own",
        ),
        pytest.param(
            3,
            (
                *("batch_size=8", "optimizer.accumulate=2", "optimizer.name=adamw", "schedule.regime=mixed"),
                "optimizer.heads_lr_scale=3",
                *("schedule.backbone_epochs=1", "baseline=true", "precision=bf16", "data.image_size=64"),
            ),
            id="accumulation, phases, baseline, bf16",
        ),
        pytest.param(
            3,
            (
                *("ema={decay: 0.5}", "loss.teacher=ema", "loss.kd_warmup_epochs=1.4", "loss.kd_weight=1.0"),
                *("loss.divergence=dkd", "loss.divergence_kwargs={beta: 2}", "loss.exit_weights=[1,2,3]"),
                *("schedule.regime=mixed", "schedule.backbone_epochs=1", "loss.gate=[0.5,0,1]", "loss.gate_fade=0.8"),
            ),
            id="the average teaches, warm-up, fading gate",
        ),
        pytest.param(
            3,
            ("data.cache=device", "augment.auto_augment=rand-m9-mstd0.5", "augment.re_mode=pixel", "loss.name=cs-kd"),
            id="images kept on the device, CS-KD",
        ),
        pytest.param(3, ("loss.name=cs-kd", "data.workers=2"), id="CS-KD: batches of pairs"),
        pytest.param(
            3,
            ("loss.name=dlb", "loss.kwargs={weight: 5.0}", "batch_size=8", "optimizer.accumulate=2"),
            id="DLB: batches that repeat, and the logits of the last",
        ),
        pytest.param(3, ("loss.name=ps-kd", "ema={decay: 0.5}", "epochs=4"), id="PS-KD: the model of an epoch ago"),
        pytest.param(
            3,
            ("loss.name=test-learned-weights", "optimizer.name=adamw", "optimizer.clip_grad=1"),
            id="a loss that trains along",
        ),
    ],
)
def test_a_run_that_is_stopped_ends_as_an_undisturbed_one(
    tmp_path: Path, whole: Path, after_steps: Any, steps: int, overrides: tuple[str, ...]
) -> None:
    if overrides:
        whole = tmp_path / "whole"
        train(recipe(whole, *overrides))
    stops = run_in_pieces(recipe(tmp_path / "cut", *overrides), steps, after_steps)
    assert stops > 3
    expected, cut = outcome(whole), outcome(tmp_path / "cut")
    assert [name for name in expected["weights"] if expected["weights"][name] != cut["weights"][name]] == []
    assert expected == cut


def test_the_parameters_of_a_loss_train_along_without_decay(tmp_path: Path) -> None:
    run = recipe(tmp_path, "loss.name=test-learned-weights", "optimizer.weight_decay=0.3", "checkpoint.keep=9")
    train(run)
    folders = sorted((tmp_path / "checkpoints" / "self-distilled").iterdir(), key=lambda f: int(f.name.split("-")[1]))
    saved = [load_checkpoint(folder) for folder in folders]
    learned = [state["loss"][0]["log_variances"] for state in saved]
    # The losses begin above 1, so that each s first grows, by -rate * d/ds (exp(-s) L + s) = rate * (L - 1) at s = 0.
    assert len(learned) > 2
    assert all((later != before).all() for before, later in pairwise([torch.zeros(4), *learned]))
    assert (learned[0] > 0).all()
    decays = [group["weight_decay"] for group in saved[0]["optimizer"]["param_groups"]]
    assert decays[-1] == 0
    assert 0.3 in decays[:-1]


def test_the_parameters_of_a_loss_outlive_another_number_of_processes(make_backbone: Any) -> None:
    model, loss = sd.wrap(make_backbone("resnet18"), image_size=64), LearnedWeights()
    nn.init.constant_(loss.log_variances, 0.5)
    task = sd.SelfDistillationTask(model, loss, verbose=False)
    optimizer = build_optimizer(model, loss, load_recipe("digits"))
    state = PhaseState(model, task, optimizer, None, Replicated(Accelerator(cpu=True)))
    saved = copy.deepcopy(state.capture())
    nn.init.zeros_(loss.log_variances)
    state.restore(saved | {"loss": saved["loss"] * 2})
    assert loss.log_variances.tolist() == [0.5] * 4


def test_a_run_goes_on_with_other_loader_processes(tmp_path: Path, whole: Path, after_steps: Any) -> None:
    after_steps(6, send(signal.SIGUSR1))
    with pytest.raises(Interrupted, match=r"Stopped by SIGUSR1\. Run the same command again to go on"):
        train(recipe(tmp_path / "cut"))
    train(recipe(tmp_path / "cut", "data.workers=2"))
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_a_stream_is_entered_again_where_it_was_left(tmp_path: Path, after_steps: Any) -> None:
    for workers in (0, 1):
        overrides = ("data.streaming=true", "data.validation=0.0", "data.shuffle_buffer=8", f"data.workers={workers}")
        train(recipe(tmp_path / f"whole {workers}", *overrides))
        assert run_in_pieces(recipe(tmp_path / f"cut {workers}", *overrides), 3, after_steps) > 3
        assert outcome(tmp_path / f"whole {workers}") == outcome(tmp_path / f"cut {workers}")


def test_checkpoints_between_epochs_change_nothing(tmp_path: Path, whole: Path) -> None:
    often = tmp_path / "often"
    train(recipe(often, "checkpoint.every_steps=1", "checkpoint.keep=5"))
    assert outcome(whole) == outcome(often)
    for run, kept in ((whole, [8, 12]), (often, [8, 9, 10, 11, 12])):
        folders = (run / "checkpoints" / "self-distilled").iterdir()
        assert sorted(int(folder.name.removeprefix("checkpoint-")) for folder in folders) == kept


# Signals.


def test_a_signal_while_nothing_trains_stops_at_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = trainer.Trainer._validate

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the validation went on")

    monkeypatch.setattr(trainer.Trainer, "_validate", interrupted)
    with pytest.raises(Interrupted):
        train(recipe(tmp_path / "cut"))
    monkeypatch.setattr(trainer.Trainer, "_validate", validate)
    train(recipe(tmp_path / "cut"))
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_one_ctrl_c_saves_and_a_second_stops_at_once(tmp_path: Path, after_steps: Any) -> None:
    after_steps(2, send(signal.SIGINT))
    with pytest.raises(Interrupted, match="Stopped by SIGINT") as stopped:
        train(recipe(tmp_path))
    assert stopped.value.exit_status == EXIT_INTERRUPTED
    assert (tmp_path / "checkpoints" / "self-distilled" / "checkpoint-2").is_dir()

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    after_steps(1, twice)
    with pytest.raises(Interrupted):
        train(recipe(tmp_path))
    assert not (tmp_path / "checkpoints" / "self-distilled" / "checkpoint-3").exists()


def test_the_command_ends_with_the_documented_status(
    tmp_path: Path, after_steps: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        AcceleratorState._reset_state(True)
        after_steps(1, send(number))
        assert cli(["train", "digits", *SMALL, f"output_dir={tmp_path}"]) == status
        assert f"Stopped by {number.name}. Run the same command again to go on." in capsys.readouterr().err


def test_the_former_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


# Disks.


def test_a_full_disk_does_not_stop_training_and_the_next_checkpoint_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, calls = checkpoint.write_files, []

    def full_once(folder: Path, *args: Any) -> None:
        calls.append(folder.name)
        if len(calls) == 2:
            folder.mkdir()
            (folder / "tensors.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_files", full_once)
    train(recipe(tmp_path))
    assert calls == [".checkpoint-4", ".checkpoint-8", ".checkpoint-12", ".checkpoint-12"]
    assert "The checkpoint of step 8 cannot be written" in caplog.text
    assert "No space left on device; those before it are kept. Training goes on" in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "self-distilled").iterdir()) == [
        "checkpoint-12",
        "checkpoint-4",
    ]


def test_a_disk_without_room_for_the_last_checkpoint_still_gets_the_model(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = checkpoint.write_files

    def full(folder: Path, *args: Any) -> None:
        if folder.name != ".checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_files", full)
    train(recipe(tmp_path / "cut"))
    assert "No space left on device; those before it are kept. If training is done, the model is saved" in caplog.text
    assert outcome(whole) == outcome(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints" / "self-distilled").iterdir()] == ["checkpoint-4"]
    # It is done, though its newest checkpoint is not.
    assert finished_report(recipe(tmp_path / "cut")) is not None
    monkeypatch.setattr(checkpoint, "write_files", write)
    train(recipe(tmp_path / "cut"))
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_a_disk_that_is_full_when_a_signal_stops_the_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_steps: Any
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_files", full)
    after_steps(2, send(signal.SIGTERM))
    with pytest.raises(OSError, match="No space left on device; those before it are kept"):
        train(recipe(tmp_path))


def test_a_truncated_newest_checkpoint_is_skipped(
    tmp_path: Path, whole: Path, after_steps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    after_steps(7, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(recipe(tmp_path / "cut"))
    newest = tmp_path / "cut" / "checkpoints" / "self-distilled" / "checkpoint-7" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    AcceleratorState._reset_state(True)
    train(recipe(tmp_path / "cut"))
    assert "checkpoint-7 is damaged" in caplog.text
    assert "Resuming self-distilled from" in caplog.text
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_a_folder_that_cannot_be_written_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "digits", *SMALL, "output_dir=/proc/no/run"]) == 2
    assert "error: output_dir: nothing can be written to /proc/no/run" in capsys.readouterr().err


# Losses that are not finite.


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """A function that makes the images of some steps NaN."""
    step = trainer.Trainer._step

    def poison(steps: set[int]) -> None:
        def wrapped(self: trainer.Trainer, stepper: Any, running: Any, batches: Any) -> bool:
            if self.progress.step + 1 in steps:
                batches = ((images * torch.nan, targets) for images, targets in batches)
            return step(self, stepper, running, batches)

        monkeypatch.setattr(trainer.Trainer, "_step", wrapped)

    return poison


def test_a_loss_that_is_not_finite_stops_the_run_and_tells_the_rows(
    tmp_path: Path, poisoned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned({6})
    assert cli(["train", "digits", *SMALL, f"output_dir={tmp_path}"]) == 1
    assert "error: The loss is not finite (self-distilled, epoch 2, step 6)" in capsys.readouterr().err
    (entry,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (entry["network"], entry["epoch"], entry["step"], entry["process"]) == ("self-distilled", 2, 6, 0)
    assert len(set(entry["rows"])) == 16
    # The weights that this step would have spoilt are not saved.
    assert [path.name for path in (tmp_path / "checkpoints" / "self-distilled").iterdir()] == ["checkpoint-4"]
    state = load_checkpoint(tmp_path / "checkpoints" / "self-distilled" / "checkpoint-4")
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_whose_loss_is_not_finite_is_skipped_if_asked(
    tmp_path: Path, poisoned: Any, caplog: pytest.LogCaptureFixture, accumulate: int
) -> None:
    poisoned({2, 7})
    train(recipe(tmp_path, "optimizer.on_nonfinite=skip", f"optimizer.accumulate={accumulate}"))
    assert [r.message for r in caplog.records if "Skipped" in r.message] == [
        "Skipped a step, as the loss is not finite (self-distilled, epoch 1, step 2).",
        "Skipped a step, as the loss is not finite (self-distilled, epoch 2, step 7).",
    ]
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["bn1.num_batches_tracked"] == (12 - 2) * accumulate
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert '"step": 12' in text


def test_the_rows_that_are_told_are_those_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of the training split is made NaN wherever it appears; its row is in every batch that is logged."""
    step, bad = trainer.Trainer._step, []

    def wrapped(self: trainer.Trainer, stepper: Any, running: Any, batches: Any) -> bool:
        position = self.progress.micro // 1
        if self.progress.step in (1, 6):
            bad.append(self.context.feed.rows(self.progress.epoch, position))
            images, targets = next(batches)
            rows = bad[-1]
            expected = [
                self.context.feed.split.targets[np.flatnonzero(self.context.feed.split.indices == row)[0]]
                for row in rows
            ]
            assert targets.tolist() == expected
            batches = iter([(images * torch.nan, targets)])
        return step(self, stepper, running, batches)

    monkeypatch.setattr(trainer.Trainer, "_step", wrapped)
    monkeypatch.setattr(launch.Feed, "batches", _one_by_one(launch.Feed.batches))
    train(recipe(tmp_path, "optimizer.on_nonfinite=skip"))
    logged = [json.loads(line)["rows"] for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert logged == bad
    assert len(logged) == 2


def _one_by_one(batches: Any) -> Any:
    return lambda self, epoch, done: iter(list(batches(self, epoch, done)))


def test_too_many_skips_in_a_row_stop_the_run(tmp_path: Path, poisoned: Any) -> None:
    poisoned(set(range(2, 100)))
    with pytest.raises(NonFiniteLossError, match=r"not finite in 20 steps in a row .*step 21"):
        train(recipe(tmp_path, "optimizer.on_nonfinite=skip", "epochs=10"))


# Data.


def test_a_loader_process_that_is_killed_is_an_error_and_the_run_goes_on_later(
    tmp_path: Path, whole: Path, after_steps: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        import torch.multiprocessing

        for child in torch.multiprocessing.active_children():
            child.kill()

    arguments = ["train", "digits", *SMALL, "data.workers=2", f"output_dir={tmp_path / 'cut'}"]
    AcceleratorState._reset_state(True)
    after_steps(6, kill)
    assert cli(arguments) == 1
    assert "run the same command again to go on" in capsys.readouterr().err
    AcceleratorState._reset_state(True)
    after_steps(1000, kill)
    assert cli(arguments) == 0
    assert outcome(whole) == outcome(tmp_path / "cut")


def test_clocks_that_go_backwards_do_no_harm(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, after_steps: Any
) -> None:
    """Nothing is decided by the time of day: not which checkpoint is the newest either."""
    after_steps(6, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(recipe(tmp_path / "cut"))
    for folder in (tmp_path / "cut" / "checkpoints" / "self-distilled").iterdir():
        age = 1e9 if folder.name == "checkpoint-6" else 2e9
        for path in (folder, *folder.iterdir()):
            os.utime(path, (age, age))
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("time.time", lambda: 0.0)
    train(recipe(tmp_path / "cut"))
    assert outcome(whole) == outcome(tmp_path / "cut")
    shutil.rmtree(tmp_path)
