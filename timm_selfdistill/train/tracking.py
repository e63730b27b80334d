"""What a run tells while it trains: lines and bars on the terminal, metrics.jsonl, and the trackers of Accelerate."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image
from torch import Tensor

from timm_selfdistill.data import ImageData, ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.output import progress_bar, replace_file
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.report import Report, device_name, format_markdown
from timm_selfdistill.report.render import with_prefix
from timm_selfdistill.train.run_folder import dotted

_logger = logging.getLogger(__name__)

_REPORT: Final = "report"
_COLUMNS: Final = ["name", "top1", "top5", "ece", "params", "macs", "latency_ms", "speedup"]
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
    """Start the trackers of a run with the recipe as configuration; options that one does not take: `ValueError`."""
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
    # These take the name of the run only once it has begun.
    if accelerator.is_main_process and "aim" in recipe.trackers:
        accelerator.get_tracker("aim", unwrap=True).name = names["run"]
    if accelerator.is_main_process and "comet_ml" in recipe.trackers:
        accelerator.get_tracker("comet_ml", unwrap=True).set_name(names["run"])


def track_report(trackers: Sequence[GeneralTracker], report: Report, folder: Path, step: int) -> None:
    """Give the trackers of the main process the numbers of a report that a folder holds, its table and its picture."""
    numbers = dict(_numbers(report))
    for tracker in trackers:
        if isinstance(tracker, JsonLinesTracker):
            continue
        try:
            tracker.log(numbers, step=step)
            _add_table_and_picture(tracker, report, folder, step)
        except Exception as error:  # of any package: the run is done and saved
            _logger.warning("The tracker %s did not take the report: %s", tracker.name, error)


def header(
    model: SelfDistillModel,
    data: ImageData,
    recipe: Recipe,
    accelerator: Accelerator,
    networks: Sequence[str],
    input_config: InputConfig,
    batches_per_epoch: int,
) -> list[str]:
    """Return the lines above those of the epochs; `batches_per_epoch` counts the training batches of a process."""
    size = " x ".join(map(str, (input_config.channels, *input_config.image_size)))
    exits = ", ".join(f"{point.name} ({100 * point.cost:.0f} % of the cost)" for point in model.points)
    whole, plain = (sum(each.numel() for each in part.parameters()) for part in (model, model.backbone))
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    processes = accelerator.num_processes
    epochs, steps = recipe.epochs + recipe.schedule.cooldown_epochs, batches_per_epoch // recipe.optimizer.accumulate
    return [
        f"model   {recipe.model.name}, {with_prefix(plain)} parameters, {with_prefix(whole)} with exits",
        f"exits   {exits}",
        f"data    {data.name}: {_images(data.train)} training images, {_images(data.validation)} held out, "
        f"{_images(data.eval)} to report on; {model.num_classes} classes, {size} pixels",
        f"device  {device_name(accelerator.device)}, {precision}"
        + (f", {processes} processes" if processes > 1 else ""),
        f"plan    {' and '.join(networks)}: {epochs} epochs of {steps} steps, batches of {recipe.batch_size}",
        f"output  {recipe.output_dir}",
    ]


class RunningTerms:
    """The progress bar and the running means of one epoch's terms, read rarely because reading waits for the GPU."""

    def __init__(
        self,
        title: str,
        updates: int,
        done: int,
        saved: dict[str, Any] | None,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        self.bar = progress_bar(title=title, show=accelerator.is_main_process, total=updates, initial=done, unit="step")
        self.updates = self._done_before = done
        sums = {} if saved is None else saved["sums"]
        self._sums: dict[str, Tensor] = {name: total.to(accelerator.device) for name, total in sums.items()}
        self._count: int = 0 if saved is None else saved["count"]
        self._batch_size, self._start = batch_size, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last reading, which the next one of the run may go on from."""
        return {"sums": self._sums, "count": self._count}

    def add(self, parts: list[dict[str, Tensor]]) -> None:
        """Add the terms of the micro batches of a step, detached."""
        for terms in parts:
            self._count += 1
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def read(self) -> dict[str, float]:
        """Return the mean of every term since the last reading, and images per second since the bar began."""
        values = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        rate = (self.updates - self._done_before) * self._batch_size / (time.monotonic() - self._start)
        self.bar.set_postfix({"loss": f"{values.get('loss', 0):.3g}", "img/s": f"{rate:.0f}"})
        return values | {"images_per_second": rate}

    def advance(self) -> None:
        """Count one optimizer step."""
        self.updates += 1
        self.bar.update()


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


def _add_table_and_picture(tracker: GeneralTracker, report: Report, folder: Path, step: int) -> None:
    """Give a tracker what it takes beside numbers, in the form that it takes."""
    match tracker.name:
        case "aim" | "clearml":
            tracker.log_images({_REPORT: _picture(folder)}, step=step)
        case "swanlab":
            tracker.log_images({_REPORT: [_picture(folder)]}, step=step)
        case "tensorboard":
            tracker.log({f"{_REPORT}/table": format_markdown(report)}, step=step)
            # A batch with the channels first.
            tracker.log_images({_REPORT: _picture(folder).transpose(2, 0, 1)[None]}, step=step)
        case "wandb":
            rows = [*report["exits"], {"name": "ensemble", **report["ensemble"]}]
            data = [[row.get(column) for column in _COLUMNS] for row in rows]
            tracker.log_table(f"{_REPORT}/table", columns=_COLUMNS, data=data, step=step)
            tracker.log_images({_REPORT: [_picture(folder)]}, step=step)
        case "mlflow":
            for name in ("report.md", "report.png"):
                tracker.log_artifact(str(folder / name))
        case "comet_ml":
            tracker.tracker.log_image(_picture(folder), name=_REPORT, step=step)
            tracker.tracker.log_asset(str(folder / "report.md"))
        case "dvclive":
            tracker.tracker.log_image(f"{_REPORT}.png", _picture(folder))
        case "trackio":
            import trackio

            tracker.tracker.log({_REPORT: trackio.Image(_picture(folder))}, step=step)


def _picture(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the report's picture, as height x width x RGB."""
    with Image.open(folder / "report.png") as picture:
        return np.asarray(picture.convert("RGB"))


def _images(split: ImageSplit | StreamSplit | None) -> str:
    """Return how many images a split has, as far as it is known."""
    if split is None:
        return "no"
    count = len(split.indices) if isinstance(split, ImageSplit) else split.size
    return "an unknown number of" if count is None else f"{count:,}"
