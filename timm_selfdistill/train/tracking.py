"""Trackers: the file metrics.jsonl, how a run is called in those of Accelerate, and what they get of its report."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from timm_selfdistill.output import replace_file
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.report import Report, format_markdown
from timm_selfdistill.train.run_folder import dotted

_logger = logging.getLogger(__name__)

_REPORT: Final = "report"
# Under which arguments trackers take what Accelerate does not pass.
_ARGUMENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "aim": {"experiment": "project"},
    "clearml": {"task_name": "run"},
    "dvclive": {"exp_name": "run", "dir": "folder"},
    "mlflow": {"run_name": "run"},
    "swanlab": {"experiment_name": "run"},
    "trackio": {"name": "run"},
    "wandb": {"name": "run"},
}


class JsonLinesTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Appends each set of logged values to a file, as one JSON object a line; called on the main process only."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: the recipe is saved beside the file."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Append values named "NETWORK/NAME"; the network, its epoch and its own step get keys of their own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        network = next(iter(values)).partition("/")[0]
        own = {key: values[f"{network}/{key}"] for key in ("step", "epoch")}
        others = {name: value for name, value in values.items() if name.partition("/")[2] not in own}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": own["step"], "network": network, "epoch": own["epoch"], **others}) + "\n")

    def keep(self, network: str, count: int) -> None:
        """Keep only the first `count` lines of a network: a resumed run writes those after its checkpoint again."""
        if not self.path.is_file():
            return
        lines, seen = [], 0
        for line in self.path.read_text().splitlines():
            owner = _network_of(line)
            seen += owner == network
            if owner is not None and not (owner == network and seen > count):
                lines.append(line)
        replace_file(self.path, "".join(f"{line}\n" for line in lines).encode())


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that are unknown or not installed, and options for unknown ones."""
    available, known = sorted(str(name) for name in get_available_trackers()), sorted(LOGGER_TYPE_TO_CLASS)
    if missing := [name for name in recipe.trackers if name not in available]:
        raise ValueError(
            f"trackers: {', '.join(missing)} cannot be used: unknown, or the package is not installed. "
            f"Installed are {', '.join(available) or 'none'}; Accelerate knows {', '.join(known)}. "
            "metrics.jsonl is always written."
        )
    if unknown := sorted(recipe.tracking.options.keys() - set(known)):
        raise ValueError(f"tracking.options: unknown trackers {', '.join(unknown)}; allowed are {', '.join(known)}.")


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
    """Start the trackers of a run with the recipe as their configuration.

    Raises:
        ValueError: If a tracker does not take its options.
    """
    project = recipe.tracking.project or folder.name
    names = {"project": project, "run": recipe.tracking.run or folder.name, "folder": str(folder / "dvclive")}
    options = {
        tracker: {argument: names[which] for argument, which in _ARGUMENTS.get(tracker, {}).items()}
        | dict(recipe.tracking.options.get(tracker, {}))
        for tracker in recipe.trackers
    }
    try:
        accelerator.init_trackers(project, config=dotted(recipe.without_local_paths()), init_kwargs=options)
    except TypeError as error:
        raise ValueError(f"tracking.options: a tracker does not take them: {error}") from error
    if accelerator.is_main_process:
        for tracker in _NAMED.keys() & set(recipe.trackers):
            _NAMED[tracker](accelerator.get_tracker(tracker, unwrap=True), names["run"])


def track_report(trackers: Sequence[GeneralTracker], report: Report, folder: Path, step: int) -> None:
    """Give the trackers the numbers of a report, and its table and picture where they have a place for them.

    Args:
        trackers: The trackers of the main process.
        report: The report, which the folder holds already.
        folder: The run's folder.
        step: The last step of the run.
    """
    numbers = dict(_numbers(report))
    for tracker in trackers:
        if isinstance(tracker, JsonLinesTracker):
            continue
        try:
            tracker.log(numbers, step=step)
            if (more := _MORE.get(tracker.name)) is not None:
                more(tracker, report, folder, step)
        except Exception as error:  # of any package: the run is done and saved
            _logger.warning("The tracker %s did not take the report: %s", tracker.name, error)


def _network_of(line: str) -> str | None:
    """Return the network of a line, or None if a kill in the middle of writing left half of it."""
    try:
        return str(json.loads(line)["network"])
    except (json.JSONDecodeError, LookupError, TypeError):
        return None


def _numbers(report: Report) -> Iterator[tuple[str, float]]:
    """Yield what is a number in the rows of a report, under names like those of the validation."""
    rows: dict[str, Mapping[str, Any] | None] = {
        **{f"self-distilled/report/{{}}/{row['index']}": row for row in report["exits"]},
        "self-distilled/report/{}/ensemble": report["ensemble"],
        "self-distilled/report/{}/fitted_ensemble": report["fitted_ensemble"],
        "baseline/report/{}/0": report["baseline"],
    }
    for name, row in rows.items():
        for key, value in (row or {}).items():
            if key != "index" and isinstance(value, int | float):
                yield name.format(key), value
    for network, seconds in report["train_seconds"].items():
        yield f"{network}/report/train_seconds", seconds


def _name_aim(run: Any, name: str) -> None:
    run.name = name  # Accelerate calls it by the project


def _name_comet(experiment: Any, name: str) -> None:
    experiment.set_name(name)


# Trackers that take the name of the run only once it has begun.
_NAMED: Final[Mapping[str, Callable[[Any, str], None]]] = {"aim": _name_aim, "comet_ml": _name_comet}


def _to_tensorboard(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    tracker.log({f"{_REPORT}/table": format_markdown(report)}, step=step)
    # A batch with the channels first.
    tracker.log_images({_REPORT: _picture(folder).transpose(2, 0, 1)[None]}, step=step)


def _to_list_of_images(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    tracker.log_images({_REPORT: [_picture(folder)]}, step=step)


def _to_wandb(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    rows = [*report["exits"], {"name": "ensemble", **report["ensemble"]}]
    columns = ["name", "top1", "top5", "ece", "params", "macs", "latency_ms", "speedup"]
    data = [[row.get(column) for column in columns] for row in rows]
    tracker.log_table(f"{_REPORT}/table", columns=columns, data=data, step=step)
    _to_list_of_images(tracker, report, folder, step)


def _to_one_image(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    tracker.log_images({_REPORT: _picture(folder)}, step=step)


def _to_mlflow(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    for name in ("report.md", "report.png"):
        tracker.log_artifact(str(folder / name))


def _to_comet(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    tracker.tracker.log_image(_picture(folder), name=_REPORT, step=step)
    tracker.tracker.log_asset(str(folder / "report.md"))


def _to_dvclive(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    tracker.tracker.log_image(f"{_REPORT}.png", _picture(folder))


def _to_trackio(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    import trackio

    tracker.tracker.log({_REPORT: trackio.Image(_picture(folder))}, step=step)


def _picture(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the report's picture, as height x width x RGB."""
    with Image.open(folder / "report.png") as picture:
        return np.asarray(picture.convert("RGB"))


# What a tracker takes beside numbers, each in its own form.
_MORE: Final[Mapping[str, Callable[[GeneralTracker, Report, Path, int], None]]] = {
    "aim": _to_one_image,
    "clearml": _to_one_image,
    "comet_ml": _to_comet,
    "dvclive": _to_dvclive,
    "mlflow": _to_mlflow,
    "swanlab": _to_list_of_images,
    "tensorboard": _to_tensorboard,
    "trackio": _to_trackio,
    "wandb": _to_wandb,
}
