"""What a run's folder may hold before, what may be continued there, and with what."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_resume import SMALL, after_steps, outcome, recipe, send, whole

from timm_selfdistill.cli import main as cli
from timm_selfdistill.hub import CONFIG
from timm_selfdistill.recipe import Recipe, load_recipe
from timm_selfdistill.stop import Interrupted
from timm_selfdistill.train import evaluate_folder, finished_report, train, trainer
from timm_selfdistill.train.checkpoint_format import build_manifest
from timm_selfdistill.train.run_folder import check_folder, recipe_changes

__all__ = ["after_steps", "whole"]  # fixtures


def of_images(folder: Path, output: Path, *overrides: str) -> Recipe:
    """A recipe for a folder of images, of which shares are held out."""
    settings = ["batch_size=8", "data.image_size=32", "data.workers=0", "epochs=2", *overrides]
    data = {"path": str(folder), "eval_fraction": 0.2, "validation": 0.1}
    return load_recipe({"model": {"name": "test_resnet"}, "data": data, "output_dir": str(output)}, settings)


@pytest.fixture
def images(tmp_path: Path, make_image_folder: Any) -> Path:
    """A folder with 12 images of each of 3 classes, in one split."""
    made = make_image_folder(tmp_path / "made", classes=3, train=12, validation=1)
    return (made / "train").rename(tmp_path / "images")


def stop(recipe: Recipe, after_steps: Any, steps: int = 2) -> None:
    after_steps(steps, send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(recipe)
    after_steps(10**9, send(signal.SIGTERM))


# The data.


def test_a_run_does_not_go_on_with_other_data(images: Path, tmp_path: Path, after_steps: Any) -> None:
    run = tmp_path / "run"
    stop(of_images(images, run), after_steps)
    (images / "class0" / "3.png").rename(tmp_path / "3.png")
    (images / "class2").rename(images / "0class2")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match="holds a run of other data") as error:
        train(of_images(images, run))
    assert "class 'class2' is now '0class2'" in str(error.value)
    assert "train has 35 images, had 36" in str(error.value)
    assert before == {path: path.read_bytes() for path in before}
    # A run without a checkpoint does not bind; nor does another folder.
    shutil.rmtree(run / "checkpoints")
    train(of_images(images, run))


def test_a_run_goes_on_with_the_same_data_elsewhere(images: Path, tmp_path: Path, after_steps: Any) -> None:
    run = tmp_path / "run"
    stop(of_images(images, run), after_steps)
    images.rename(tmp_path / "elsewhere")
    shutil.copytree(run, tmp_path / "copy")
    train(of_images(tmp_path / "elsewhere", tmp_path / "copy"))
    # A run from before this release: the data is not known, so that it must at least have the same name.
    rewrite(run, None)
    (run / "local.yaml").unlink()
    (run / "recipe.yaml").write_text(of_images(images, run).to_yaml())
    with pytest.raises(ValueError, match=r"of another recipe: data\.path \("):
        train(of_images(tmp_path / "elsewhere", run))


def rewrite(run: Path, record: Any) -> None:
    """Replace the record in all checkpoints."""
    for folder in (run / "checkpoints").glob("*/checkpoint-*"):
        state = json.loads((folder / "state.json").read_text())
        state["dict"] = [pair for pair in state["dict"] if pair[0] != "run"]
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "manifest.json").write_text(json.dumps(build_manifest(folder)))


def test_a_finished_run_keeps_its_class_names(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, after_steps: Any
) -> None:
    run = tmp_path / "run"
    train(of_images(images, run, "epochs=1"))
    config = (run / "model" / CONFIG).read_bytes()
    shutil.move(images / "class1" / "0.png", images / "class2" / "from class1.png")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        evaluate_folder(run)
    assert "images is not what the model in" in caplog.text
    assert "class 'class1' of train has 11 images, had 12" in caplog.text
    assert "Images that are held out now may have been trained on." in caplog.text
    (images / "class1").rename(images / "aclass1")
    for folder in (run, run / "checkpoints"):
        with pytest.raises(ValueError, match="class 'class1' is now 'aclass1'"):
            train(of_images(images, run, "epochs=1"))
        assert (run / "model" / CONFIG).read_bytes() == config
        # Then without its checkpoints: the model remembers.
        if folder == run:
            shutil.rmtree(run / "checkpoints")
    (run / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match=r"of another recipe: seed \(0, now 3\)"):
        train(of_images(images, run, "epochs=1", "seed=3"))


# The recipe.


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, after_steps: Any) -> None:
    stop(recipe(tmp_path / "one", "seed=7", "optimizer.lr=0.2"), after_steps)
    other = tmp_path / "one" / "checkpoints" / "self-distilled" / "checkpoint-2"
    with pytest.raises(ValueError, match="is a checkpoint of a run of another recipe") as error:
        train(recipe(tmp_path / "two", f"resume={other}"))
    assert "optimizer.lr (0.2, now 0.05); seed (7, now 0)" in str(error.value)
    with pytest.raises(ValueError, match=r"model\.name \(.*, now test_vit\)"):
        train(recipe(tmp_path / "two", f"resume={other}", "model.name=test_vit", "model.kwargs={in_chans: 1}"))
    # One of an earlier release, which does not tell: of a network of another shape.
    rewrite(tmp_path / "one", None)
    with pytest.raises(ValueError, match="is not one of this network"):
        train(recipe(tmp_path / "two", f"resume={other}", "model.kwargs={in_chans: 1, channels: [8, 8, 16, 24]}"))
    # Without a checkpoint, nothing blocks what is changed.
    train(recipe(tmp_path / "two", "epochs=1"))
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert {line["epoch"] for line in lines} == {1}


def test_a_run_whose_recipe_was_lost_goes_on_with_its_own_only(tmp_path: Path, whole: Path, after_steps: Any) -> None:
    stop(recipe(tmp_path / "run"), after_steps, steps=5)
    for name in ("recipe.yaml", "local.yaml"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=r"holds a run of another recipe: optimizer\.lr \(0\.05, now 0\.2\)"):
        train(recipe(tmp_path / "run", "optimizer.lr=0.2"))
    train(recipe(tmp_path / "run"))
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_checkpoint_of_an_earlier_release_goes_on_with_a_warning(
    tmp_path: Path, after_steps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stop(recipe(tmp_path), after_steps)
    rewrite(tmp_path, None)
    with pytest.raises(ValueError, match=r"seed \(0, now 1\)"):
        train(recipe(tmp_path, "seed=1"))
    train(recipe(tmp_path))
    assert "was written by an earlier release, which kept no record of the run's data" in caplog.text


def test_what_was_never_saved_does_not_block_changed_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("before the first checkpoint")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_save", fail)
        with pytest.raises(RuntimeError):
            train(recipe(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text()
    train(recipe(tmp_path, "seed=1", "resume=never", "epochs=1"))
    assert load_recipe(tmp_path / "recipe.yaml").seed == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(set(steps)) == 1


def test_the_loader_processes_of_a_stream_decide_its_order(tmp_path: Path, after_steps: Any) -> None:
    stream = ("data.streaming=true", "data.validation=0.0", "data.shuffle_buffer=8")
    stop(recipe(tmp_path, *stream), after_steps)
    with pytest.raises(
        ValueError, match=r"data\.workers \(0, now 1: the order of a stream depends on its loader processes\)"
    ):
        train(recipe(tmp_path, *stream, "data.workers=1"))
    # Four are the default.
    before, now = recipe(tmp_path, *stream, "data.workers=null"), recipe(tmp_path, *stream, "data.workers=4")
    assert recipe_changes(before, now, data_is_known=True) == []


# More epochs.


def test_more_epochs_make_a_run_longer_where_the_schedule_has_no_end(tmp_path: Path) -> None:
    steps = ("schedule.name=multistep", "schedule.decay_milestones=[1,2]", "schedule.warmup_epochs=1", "baseline=true")
    train(recipe(tmp_path / "whole", *steps))
    train(recipe(tmp_path / "grown", *steps, "epochs=2"))
    assert finished_report(recipe(tmp_path / "grown", *steps)) is None
    train(recipe(tmp_path / "grown", *steps))
    assert finished_report(recipe(tmp_path / "grown", *steps)) is not None
    whole, grown = outcome(tmp_path / "whole"), outcome(tmp_path / "grown")
    key = lambda line: (line["network"], line["step"], sorted(line))  # noqa: E731
    whole["metrics"], grown["metrics"] = (sorted(found["metrics"], key=key) for found in (whole, grown))
    assert whole == grown
    assert load_recipe(tmp_path / "grown" / "recipe.yaml").epochs == 3
    with pytest.raises(ValueError, match=r"epochs \(3, now 2: a run can be made longer, not shorter\)"):
        train(recipe(tmp_path / "grown", *steps, "epochs=2"))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((), "with schedule.name=cosine the learning rate of every step depends on epochs"),
        (("schedule.name=constant", "loss.name=ps-kd"), "the loss ps-kd counts the share of the training that is done"),
    ],
)
def test_more_epochs_are_refused_where_the_end_matters(
    tmp_path: Path, after_steps: Any, overrides: tuple[str, ...], why: str
) -> None:
    stop(recipe(tmp_path, *overrides), after_steps)
    with pytest.raises(ValueError, match=rf"epochs \(3, now 5: {why}"):
        train(recipe(tmp_path, *overrides, "epochs=5"))


# The folder.


@pytest.mark.parametrize(
    "name",
    [
        *("report.json", "metrics.jsonl", "skipped.jsonl", "skipped-0.jsonl", "recipe.yaml", "local.yaml", ".lock"),
        *("model/README.md", "model/config.json", "checkpoints/self-distilled/checkpoint-4/state.json"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("model: {name: resnet18}\ndata: {path: digits}\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert cli(["train", "digits", *SMALL, f"output_dir={tmp_path}"]) == 2
    assert f"holds no run, but {name.split('/')[0]}, which a run would write" in capsys.readouterr().err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {file, tmp_path / "notes.txt"}
    assert file.read_text() == "model: {name: resnet18}\ndata: {path: digits}\n"


def test_other_files_in_the_folder_of_a_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "skipped-0.jsonl", "nonfinite.jsonl", ".lock", ".pushing", "model", "checkpoints"]
)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name} is a link to .*outside, and a run writes nothing outside its folder"):
        train(recipe(tmp_path / "run"))
    assert os.listdir(tmp_path / "outside") == []
    assert os.listdir(tmp_path / "run") == [name]


def test_links_to_files_are_replaced_and_checkpoints_elsewhere_stay(tmp_path: Path, after_steps: Any) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (tmp_path / "disk").mkdir()
    run.symlink_to(tmp_path / "disk")  # a folder that is a link itself is fine
    stop(recipe(run, "epochs=2"), after_steps, steps=5)
    checkpoints = run / "checkpoints" / "self-distilled"
    for name in ("checkpoint-4", ".checkpoint-9.removed"):
        (outside / name).mkdir(parents=True)
        (outside / name / "precious").write_text("mine")
    shutil.rmtree(checkpoints / "checkpoint-4")
    for name in ("checkpoint-4", ".checkpoint-9.removed"):
        (checkpoints / name).symlink_to(outside / name)
    (outside / "card").write_text("mine")
    (run / "model").mkdir()
    for link in (run / "model" / "README.md", run / "report.md", run / ".report.json.tmp"):
        link.symlink_to(outside / "card")
    train(recipe(run, "epochs=2"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-5", "checkpoint-8"]
    assert {path.read_text() for path in outside.rglob("*") if path.is_file()} == {"mine"}
    assert not (run / "model" / "README.md").is_symlink()
    assert "Scalable depth" in (run / "report.md").read_text()


def test_a_runs_folder_tells_no_path_of_the_machine_but_in_one_file(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "secret client" / "run"
    train(of_images(images, run, "epochs=1"))
    told = [path.name for path in run.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    # The card is the hub's matter.
    assert set(told) - {"README.md"} == {"local.yaml"}
    assert load_recipe(run / "recipe.yaml") == of_images(images, run, "epochs=1")
    assert [row["top1"] for row in evaluate_folder(run)["exits"]] == [
        row["top1"] for row in json.loads((run / "report.json").read_text())["exits"]
    ]


# One process, several runs.


def test_each_run_of_a_process_has_its_own_precision_folder_and_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = trainer.Trainer._step

    def note(self: trainer.Trainer, *args: Any) -> bool:
        seen.append(self.context.accelerator.mixed_precision)
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", note)
    train(recipe(tmp_path / "one", "epochs=1", "precision=bf16", "data.image_size=64"))
    train(recipe(tmp_path / "two", "epochs=1", "data.max_train=32"))
    train(recipe(tmp_path / "three", "epochs=1", "precision=bf16", "data.image_size=64"))
    assert seen[0] == seen[-1] == "bf16"
    assert seen[4] == "no"
    assert outcome(tmp_path / "one")["weights"] == outcome(tmp_path / "three")["weights"]
    for name in ("one", "two", "three"):
        assert (tmp_path / name / "metrics.jsonl").is_file()
    evaluate_folder(tmp_path / "two")


def test_the_accelerator_of_the_caller_is_as_before(tmp_path: Path) -> None:
    from accelerate import Accelerator

    theirs = Accelerator(mixed_precision="bf16", cpu=True)
    train(recipe(tmp_path, "epochs=1", "data.max_train=32"))
    assert theirs.mixed_precision == "bf16"
    assert AcceleratorState().mixed_precision == "bf16"
    assert torch.is_grad_enabled()


def test_no_two_networks_share_a_name_in_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None: logged.append(values))
    train(recipe(tmp_path, "baseline=true", "epochs=1"))
    names = {name for values in logged for name in values}
    assert {name.partition("/")[0] for name in names} == {"baseline", "self-distilled"}
    assert {"baseline/validation/top1/0", "self-distilled/validation/top1/0", "baseline/epoch"} <= names
