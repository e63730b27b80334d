"""What trackers are told: the names of a run, its options, and its report at the end."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate import tracking as accelerates
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from timm_selfdistill.recipe import RecipeError, load_recipe
from timm_selfdistill.train import run_folder, tracking, train

TINY = ["epochs=1", "schedule.warmup_epochs=0", "batch_size=16", "precision='no'", "data.workers=0", "resume=never"]
TINY += ["data.max_train=32", "data.max_eval=10", "data.image_size=16"]
TINY += ["model.kwargs={channels: [4, 4, 8, 8], in_chans: 1}", "baseline=true"]


class Recorder(GeneralTracker):
    """Keeps what it is given, and refuses arguments as the packages' own starts do."""

    name = "wandb"
    requires_logging_directory = False
    started: ClassVar[list["Recorder"]] = []
    fails = False

    def __init__(self, project: str, *, name: str, tags: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names, self.logged, self.images, self.tables = (project, name, tags), [], {}, {}
        Recorder.started.append(self)

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.fails and any("/report/" in name for name in values):
            raise ConnectionError("no route")
        self.logged.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.images[step] = values

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        self.tables[name] = columns, data


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """A tracker in the place of wandb's."""
    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    for module in (accelerates, tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setattr(Recorder, "started", [])
    return Recorder


def test_a_tracker_gets_names_options_recipe_and_report(
    recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_picture", lambda folder: np.full((2, 3, 3), int(folder == tmp_path / "first")))
    own = ["trackers=[wandb]", "tracking.project=flowers", "tracking.options={wandb: {tags: [a]}}"]
    report = train(load_recipe("digits", [*TINY, *own, f"output_dir={tmp_path / 'first'}"]))
    (told,) = recorder.started
    assert told.names == ("flowers", "first", ["a"])
    assert (told.config["epochs"], told.config["baseline"], told.config["model.name"]) == (1, True, "resnet18")
    assert told.config["model.num_classes"] == "None"
    step, numbers = told.logged[-1]
    assert step == max(step for step, _ in told.logged) == 4
    assert all(type(value) in (int, float) for value in numbers.values())
    assert numbers["self-distilled/report/top1/1"] == report["exits"][1]["top1"]
    assert numbers["self-distilled/report/top1/ensemble"] == report["ensemble"]["top1"]
    assert numbers["baseline/report/top1/0"] == report["baseline"]["top1"]
    assert numbers["baseline/report/train_seconds"] == report["train_seconds"]["baseline"]
    (picture,) = told.images[4]["report"]
    assert np.array_equal(picture, np.ones((2, 3, 3)))
    columns, rows = told.tables["report/table"]
    assert [row[columns.index("macs")] for row in rows[:-1]] == [row["macs"] for row in report["exits"]]

    lines = capsys.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("model "))
    said = lines[start : start + 6]
    assert [line.split()[0] for line in said] == ["model", "exits", "data", "device", "plan", "output"]
    assert "resnet18, " in said[0]
    assert report["exits"][0]["name"] in said[1]
    assert "32 training images, 10 held out, 10 to report on; 10 classes, 1 x 16 x 16 pixels" in said[2]
    assert said[3].endswith(", fp32")
    assert said[4].endswith("baseline and self-distilled: 1 epochs of 2 steps, batches of 16")
    assert sum(line.startswith("model ") for line in lines) == 1


class Client:
    """Stands for what a package gives to log with; keeps what is called."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.update({name: (*args, *kwargs.values())})


@pytest.mark.parametrize(
    ("tracker", "options", "calls"),
    [
        ("comet_ml", {}, {"set_name": ("three",), "log_image": ("picture", "report", 4), "log_asset": ("report.md",)}),
        ("dvclive", {"exp_name": "three", "dir": "dvclive"}, {"log_image": ("report.png", "picture")}),
        ("trackio", {"name": "three"}, {"log": ({"report": "trackio picture"}, 4)}),
        ("clearml", {"task_name": "three"}, {}),
    ],
)
def test_each_package_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, options: dict[str, str], calls: dict[str, Any]
) -> None:
    called = tracker

    class Own(Recorder):
        name = called

        def __init__(self, project: str, **given: str) -> None:
            super().__init__(project, name="")
            self.given, self.client = given, Client()

        @property
        def tracker(self) -> Any:
            return self.client

    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, tracker, Own)
    monkeypatch.setattr(accelerates, "get_available_trackers", lambda: [LoggerType(tracker)])
    monkeypatch.setattr(tracking, "_picture", lambda folder: "picture")
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda picture: f"trackio {picture}"))
    recipe = load_recipe("digits", [f"trackers=[{tracker}]", "tracking={project: flowers, run: three}"])
    accelerator = Accelerator(log_with=list(recipe.trackers), cpu=True)
    tracking.start_trackers(accelerator, recipe, tmp_path)
    (told,) = accelerator.trackers
    assert told.names[0] == "flowers"
    assert {key: value.removeprefix(f"{tmp_path}/") for key, value in told.given.items()} == options
    rows = {"exits": [{"index": 0, "top1": 50.0, "name": "layer1"}], "ensemble": {"top1": 60.0}}
    report: Any = {**rows, "fitted_ensemble": None, "baseline": None, "train_seconds": {"self-distilled": 1.5}}
    tracking.track_report(accelerator.trackers, report, tmp_path, 4)
    numbers = {"top1/0": 50.0, "top1/ensemble": 60.0, "train_seconds": 1.5}
    assert told.logged == [(4, {f"self-distilled/report/{name}": value for name, value in numbers.items()})]
    found = {
        name: tuple(str(value).removeprefix(f"{tmp_path}/") if name == "log_asset" else value for value in values)
        for name, values in told.client.calls.items()
    }
    assert found == calls
    assert told.images == ({4: {"report": "picture"}} if tracker == "clearml" else {})


def test_a_tracker_that_fails_at_the_end_does_not_lose_the_run(
    recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "fails", True)
    train(load_recipe("digits", [*TINY, "trackers=[wandb]", "baseline=false", f"output_dir={tmp_path}"]))
    assert "The tracker wandb did not take the report: no route" in caplog.text
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{wandb: {colour: red}}", "tracking.options: a tracker does not take them: .*colour"),
        ("{wandbee: {name: a}}", "tracking.options: unknown trackers wandbee; allowed are .*wandb"),
    ],
)
def test_options_that_no_tracker_takes_are_refused(
    recorder: type[Recorder], tmp_path: Path, options: str, message: str
) -> None:
    recipe = load_recipe("digits", [*TINY, "trackers=[wandb]", f"tracking.options={options}", f"output_dir={tmp_path}"])
    with pytest.raises(ValueError, match=message):
        train(recipe)


def test_secrets_are_kept_out_of_recipes() -> None:
    with pytest.raises(RecipeError, match=r"tracking.options: must not hold api_key: recipes are shared"):
        load_recipe("digits", ["tracking.options={comet_ml: {api_key: abc, workspace: me}}"])


def test_a_run_goes_on_with_other_tracking() -> None:
    before, now = load_recipe("digits", []), load_recipe("digits", ["tracking={project: a, run: b}"])
    assert run_folder.recipe_changes(before, now, data_is_known=True) == []


@pytest.mark.whole_reports
def test_tensorboard_has_the_numbers_the_table_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = ["trackers=[tensorboard]", "tracking.project=flowers", "baseline=false", f"output_dir={tmp_path}"]
    report = train(load_recipe("digits", [*TINY, *own]))
    events = EventAccumulator(str(tmp_path / "flowers")).Reload()
    (top1,) = events.Scalars("self-distilled/report/top1/0")
    assert (top1.step, top1.value) == (2, pytest.approx(report["exits"][0]["top1"]))
    (picture,) = events.Images("report")
    assert picture.width > picture.height > 100
    (table,) = events.Tensors("report/table/text_summary")
    assert b"| exit | top-1 %" in table.tensor_proto.string_val[0]
