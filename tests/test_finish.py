"""A run that was stopped is of use: its newest checkpoint is evaluated, used and made a model."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import after_steps, outcome, recipe, send

import timm_selfdistill as sd
from timm_selfdistill.calibration import Goal, calibrate_folder
from timm_selfdistill.cli import main as cli
from timm_selfdistill.stop import Interrupted
from timm_selfdistill.train import evaluate_folder, finish_folder, finished_report, train
from timm_selfdistill.train.checkpoint import load_checkpoint
from timm_selfdistill.train.saved_run import load_newest

__all__ = ["after_steps"]  # a fixture

EMA = "ema={decay: 0.5}"


@pytest.fixture
def stopped(tmp_path: Path, after_steps: Any) -> Path:
    """The folder of a run with averaged weights that was stopped after 6 of 12 steps, in its second epoch."""
    after_steps(6, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(recipe(tmp_path / "run", EMA))
    after_steps(10**9, send(signal.SIGTERM))
    return tmp_path / "run"


def test_a_run_that_was_stopped_becomes_a_model_and_still_goes_on(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "copy")
    assert cli(["finish", str(stopped)]) == 0
    printed = capsys.readouterr().out
    assert "recipe run (stopped after step 6, 1 of 3 epochs)" in printed
    assert f"Written to {stopped}: report.json, report.md, report.png, model/" in printed
    report = json.loads((stopped / "report.json").read_text())
    assert report["num_samples"] == 20
    assert list(report["train_seconds"]) == ["self-distilled"]
    assert "stopped after step 6" in (stopped / "model" / "README.md").read_text()
    # What would have been evaluated: the average.
    state = load_checkpoint(stopped / "checkpoints" / "self-distilled" / "checkpoint-6")
    average = {name.removeprefix("module."): value for name, value in state["ema"].items()}
    model = sd.from_pretrained(stopped / "model")
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    assert sd.hub.class_names(model) == tuple(map(str, range(10)))
    assert evaluate_folder(stopped)["exits"][-1]["top1"] == report["exits"][-1]["top1"]
    # It is a model, but the run is not done.
    assert finished_report(recipe(stopped, EMA)) is None
    train(recipe(stopped, EMA))
    assert finished_report(recipe(stopped, EMA)) is not None
    assert "stopped after" not in (stopped / "model" / "README.md").read_text()
    train(recipe(tmp_path / "copy", EMA))
    assert outcome(stopped) == outcome(tmp_path / "copy")


def test_commands_take_the_newest_checkpoint_if_asked(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(image)
    commands = {
        "evaluate": [],
        "predict": [str(image)],
        "export": ["--format", "safetensors", "--output", str(tmp_path / "exported")],
    }
    for command, arguments in commands.items():
        assert cli([command, str(stopped), *arguments]) == 2
        assert "--from-checkpoint takes the newest checkpoint, and `timm-selfdistill finish" in capsys.readouterr().err
        assert cli([command, str(stopped), *arguments, "--from-checkpoint"]) == 0
    assert not (stopped / "model").exists()
    expected = load_newest(stopped).model
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(sd.load_exported(tmp_path / "exported")(x), expected(x), atol=1e-5)
    goal = Goal(max_accuracy_drop=50.0)
    report = calibrate_folder(stopped, goal, from_checkpoint=True, output=tmp_path / "calibration")
    assert report["dataset"] == "digits, test"
    assert (tmp_path / "calibration" / "calibration.json").is_file()
    assert not (stopped / "model").exists()
    assert cli(["export", str(stopped), "--format", "safetensors", "--from-checkpoint"]) == 0
    assert (stopped / "exit-3").is_dir()


def test_what_cannot_be_finished_is_named(
    tmp_path: Path, make_image_folder: Any, after_steps: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["finish", str(tmp_path)]) == 2
    assert "is not a run's folder with checkpoints" in capsys.readouterr().err
    images = make_image_folder(tmp_path / "images")
    settings = ["model.name=test_resnet", "model.kwargs={}", "data.image_size=32", f"data.path={images}"]
    settings += ["data.eval_split=validation", "batch_size=8", "baseline=true", "precision='no'"]
    run = recipe(tmp_path / "run", *settings)
    after_steps(2, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(run)
    assert cli(["finish", str(tmp_path / "run")]) == 2
    assert "holds no checkpoint of the network 'self-distilled'" in capsys.readouterr().err
    after_steps(14, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(run)
    # The baseline was trained for longer.
    assert finish_folder(tmp_path / "run")["baseline"] is None
    (images / "train" / "class1").rename(images / "train" / "class9")
    (images / "validation" / "class1").rename(images / "validation" / "class9")
    assert cli(["finish", str(tmp_path / "run")]) == 2
    assert "class 'class1' is now 'class9'" in capsys.readouterr().err
