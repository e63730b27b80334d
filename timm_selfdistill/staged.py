"""Early exit over graphs, one for each stage of a network: what their manifest says, and the loop that runs them.

It needs numpy only, as does `timm_selfdistill.onnx`, which runs the graphs.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

MANIFEST: Final = "manifest.json"
FORMAT: Final = "timm_selfdistill.stages"
# Of the manifest's form: raised when what was written before can no longer be read, or the other way round.
VERSION: Final = 1
BATCH: Final = "batch"  # stands in a shape for the number of images
IMAGES, TEMPERATURES, LOGITS, CONFIDENCE = "images", "temperatures", "logits", "confidence"
# What an exit says alone, where it answers with an ensemble: for calibration, not asked for while serving.
OWN_LOGITS: Final = "own_logits"
# How far rounding may take a confidence, or a threshold that was chosen among confidences, out of the rule's range.
ROUNDING: Final = 1e-4
_KINDS: Final[Mapping[str, type]] = {
    **{"format_version": int, "runtime": str, "architecture": str, "exit_names": list, "num_classes": int},
    **{"input_size": list, "early_exit": dict, "rule_range": list, "stages": list, "sha256": dict},
}

Array = NDArray[Any]


class StagedAnswer(NamedTuple):
    """The answers of a network with early exit, in the order of the input.

    Attributes:
        logits: Logits [B, num_classes].
        exit_index: Which exit gave them [B], int64; K, the number of added exits, stands for the fallback.
    """

    logits: Array
    exit_index: Array


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that goes into a stage or comes out of it; a shape has None for the number of images."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def batched(self) -> bool:
        """Whether it has a row for each image."""
        return self.shape[:1] == (None,)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on."""
        shape = tuple(None if size == BATCH else int(size) for size in value["shape"])
        return cls(value["name"], value["dtype"], shape)

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest holds it."""
        shape = [BATCH if size is None else size for size in self.shape]
        return {"name": self.name, "dtype": self.dtype, "shape": shape}


@dataclass(frozen=True)
class StageSpec:
    """One stage: its file and its tensors; a name means the same in all stages, but for logits and confidence."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @cached_property
    def input_names(self) -> list[str]:
        """Names of the inputs."""
        return [tensor.name for tensor in self.inputs]

    @cached_property
    def batched_names(self) -> list[str]:
        """Names of the inputs that have a row for each image."""
        return [tensor.name for tensor in self.inputs if tensor.batched]

    @cached_property
    def output_names(self) -> list[str]:
        """Names of the outputs that are asked for while serving."""
        return [tensor.name for tensor in self.outputs if tensor.name != OWN_LOGITS]

    @cached_property
    def carried_names(self) -> list[str]:
        """Names of the outputs that are for later stages, not for the answer."""
        return [name for name in self.output_names if name not in (LOGITS, CONFIDENCE)]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on."""
        inputs, outputs = (tuple(map(TensorSpec.from_json, value[key])) for key in ("inputs", "outputs"))
        return cls(str(value["file"]), inputs, outputs)

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest holds it."""
        inputs, outputs = ([tensor.to_json() for tensor in tensors] for tensors in (self.inputs, self.outputs))
        return {"file": self.file, "inputs": inputs, "outputs": outputs}


@dataclass(frozen=True)
class Manifest:
    """What a folder of stages says of itself: its JSON object, and what was read from it."""

    content: Mapping[str, Any]
    stages: tuple[StageSpec, ...]  # K + 1; each but the last ends with an added exit
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    rule_range: tuple[float, float]  # of the confidence

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder; ValueError if there is none, or none of this version."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} has no {MANIFEST}: it holds no stages of an exported network.")
        try:
            return cls.from_json(json.loads(path.read_bytes()))
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            said = error if isinstance(error, ValueError) else f"it is no whole manifest: {error!r:.200}"
            raise ValueError(f"{path} cannot be read: {said}") from error

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return a manifest of its JSON object; ValueError or another error if it is none."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it must be a JSON object whose 'format' is {FORMAT!r}.")
        if content.get("format_version") != VERSION:
            raise ValueError(
                f"its format_version is {content.get('format_version')!r:.100}, this version of timm_selfdistill reads "
                f"{VERSION}: export the network again, or read it with the version that wrote it "
                f"({content.get('versions')!r:.200})."
            )
        for key, kind in _KINDS.items():
            if not isinstance(content.get(key), kind):
                raise ValueError(f"its {key!r} is {content.get(key)!r:.100}; it must be of type {kind.__name__}.")
        stages = tuple(map(StageSpec.from_json, content["stages"]))
        settings, exits = content["early_exit"], len(stages) - 1
        temperatures = settings["temperatures"] or [1.0] * exits
        lowest, highest = (math.inf if bound is None else float(bound) for bound in content["rule_range"])
        thresholds = tuple(math.inf if value is None else value for value in settings["thresholds"])
        manifest = cls(content, stages, thresholds, tuple(map(float, temperatures)), (lowest, highest))
        manifest.check_thresholds(thresholds)
        if len(temperatures) != exits or len(content["exit_names"]) != exits + 1:
            raise ValueError(f"it has {exits + 1} stages, and temperatures or exit_names for another number.")
        if not all(0 < value < math.inf for value in manifest.temperatures):
            raise ValueError(f"its temperatures are {temperatures!r:.300}; allowed are finite numbers above 0.")
        manifest._check_stages()
        return manifest

    def _check_stages(self) -> None:
        """Raise ValueError unless each stage gets what it needs, and gives what is asked of it."""
        known = {IMAGES, TEMPERATURES}
        for index, stage in enumerate(self.stages):
            needed = {tensor.name for tensor in stage.inputs}
            given = {tensor.name for tensor in stage.outputs}
            asked = {LOGITS} if index == len(self.stages) - 1 else {LOGITS, CONFIDENCE}
            if not needed <= known or not asked <= given or {LOGITS, CONFIDENCE} & given != asked:
                raise ValueError(f"its stage {index} does not fit: {sorted(needed)} to {sorted(given)}.")
            known |= given - asked

    @cached_property
    def needed_after(self) -> list[dict[str, bool]]:
        """Names of the tensors that the stages after each one read, and whether they have a row for each image."""
        return [
            {tensor.name: tensor.batched for later in self.stages[index + 1 :] for tensor in later.inputs}
            for index in range(len(self.stages))
        ]

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.content["input_size"]
        return int(channels), int(height), int(width)

    def check_thresholds(self, thresholds: Sequence[float]) -> None:
        """Raise ValueError unless these are K thresholds that the rule allows."""
        exits, (lowest, highest) = len(self.stages) - 1, self.rule_range
        if len(thresholds) != exits:
            raise ValueError(f"{len(thresholds)} thresholds for {exits} exits: give one for each.")
        if not all(_is_allowed(value, lowest, highest) for value in thresholds):
            raise ValueError(
                f"thresholds are {list(thresholds)!r:.300}; with the rule {self.content['early_exit'].get('rule')} "
                f"allowed are numbers from {lowest:g} to {highest:g}, and infinity for never."
            )

    def check_files(self, folder: Path) -> None:
        """Raise ValueError unless the stages' files are there and as they were written."""
        sha256 = self.content["sha256"]
        if missing := [stage.file for stage in self.stages if stage.file not in sha256]:
            raise ValueError(f"{folder / MANIFEST} has no sha256 of {', '.join(missing)}.")
        for name, expected in sha256.items():
            path = folder / name
            if path.name != name or not path.is_file():
                raise ValueError(f"{folder} has no file {name!r:.100}, which its {MANIFEST} names.")
            if sha256_of(path) != expected:
                raise ValueError(f"{path} was damaged or exchanged: its sha256 is not that of the {MANIFEST}.")


RunStage = Callable[[int, Mapping[str, Array], Sequence[str]], Sequence[Array]]
Leaves = Callable[[int, Array, Array], Sequence[bool] | Array]
OnAnswer = Callable[[Array, Array, int], None]


def run_stages(
    manifest: Manifest,
    run: RunStage,
    images: Array,
    leaves: Leaves,
    unasked: Sequence[int] = (),
    on_answer: OnAnswer = lambda places, logits, exit: None,
) -> StagedAnswer:
    """Run stage after stage, on the images that are left.

    Args:
        manifest: The manifest.
        run: Called with the index of a stage, its inputs by name and the names of the outputs that it returns.
        images: Images [B, C, H, W].
        leaves: Called with the index of an exit, the confidence [P] of the images that are left, and their places in
            the batch [P]; returns which of them leave [P].
        unasked: Exits where no image may leave; neither their logits nor their confidence is asked for.
        on_answer: Called as soon as images have their answer, with their places [N], logits [N, num_classes] and exit.
    """
    last, count = len(manifest.stages) - 1, len(images)
    logits, exit_index = np.empty((0, manifest.content["num_classes"]), np.float32), np.full(count, last, np.int64)
    places = np.arange(count)
    held: dict[str, Array] = {IMAGES: images, TEMPERATURES: np.array(manifest.temperatures, np.float32)}
    for exit, stage in enumerate(manifest.stages if count else ()):
        outputs = stage.carried_names if exit in unasked else stage.output_names
        if outputs:
            found = run(exit, {name: held[name] for name in stage.input_names}, outputs)
            held.update(zip(outputs, found, strict=True))
        if exit in unasked:
            continue
        leaving = None if exit == last else leaves(exit, held[CONFIDENCE], places)
        number = len(places) if leaving is None else sum(leaving)
        if number == count:  # all images leave here: no row is moved
            on_answer(places, held[LOGITS], exit)
            return StagedAnswer(held[LOGITS], np.full(count, exit, np.int64))
        if not number:
            continue
        if not len(logits):
            logits = np.zeros((count, manifest.content["num_classes"]), np.float32)
        leaves_here = np.ones(len(places), bool) if leaving is None else np.asarray(leaving)
        gone, answers = places[leaves_here], held[LOGITS][leaves_here]
        logits[gone], exit_index[gone] = answers, exit
        on_answer(gone, answers, exit)
        if number == len(places):
            break
        places, needed = places[~leaves_here], manifest.needed_after[exit].items()
        held = {name: held[name][~leaves_here] if rows else held[name] for name, rows in needed if name in held}
    return StagedAnswer(logits, exit_index)


def reaches(confidence: Array, threshold: float) -> list[bool]:
    """Whether images leave at a threshold; they never do where the confidence is NaN or infinite.

    In plain Python: for one image, an operation of numpy between two graphs takes longer than all of this loop.
    """
    lowest = float(confidence.dtype.type(threshold))
    return [lowest <= value < math.inf for value in confidence.tolist()]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def check_limits(max_exit: int | Sequence[int] | Array, count: int, num_exits: int) -> NDArray[np.int64]:
    """Return the exit that answers each of `count` images at the latest [B]; K, `num_exits`, is the fallback.

    Raises:
        ValueError: If it is not a whole number or one for each image, or there is no such exit.
    """
    values = np.asarray(max_exit)
    if values.dtype.kind not in "iu":
        raise ValueError(f"max_exit is {max_exit!r:.100}; allowed are whole numbers.")
    if values.shape not in ((), (count,)):
        raise ValueError(f"max_exit has the shape {list(values.shape)}; allowed are one number, or [{count}] of them.")
    if values.size and not 0 <= values.min() <= values.max() <= num_exits:
        raise ValueError(f"max_exit is {values.min()} to {values.max()}; allowed are 0 to {num_exits} (the fallback).")
    return np.broadcast_to(values.astype(np.int64), (count,))


def _is_allowed(value: Any, lowest: float, highest: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (value == math.inf or lowest - ROUNDING <= value <= highest + ROUNDING)
