"""Run a network with early exit that was exported as ONNX stages: without torch and timm."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from timm_selfdistill import staged
from timm_selfdistill.lazy import needs_extra
from timm_selfdistill.serving import NO_TIMES, Give
from timm_selfdistill.staged import Array, Manifest, OnAnswer, StagedAnswer

_SECONDS: Final = 1.0


class OnnxEarlyExit:
    """A folder that `timm-selfdistill export --format onnx-stages` wrote, run by ONNX Runtime.

    As with `EarlyExit`, each image leaves at the first exit whose confidence reaches the exit's threshold, and the rest
    of the network runs on the images that are left. May be called from several threads at once.

    Args:
        folder: The folder with `manifest.json`.
        thresholds: K numbers, one for each added exit, or one number for all, in place of those of the manifest;
            infinity lets no image leave.
        buckets: The batch sizes that the stages may run on, so that they meet few shapes: what is left of a batch is
            filled up to the next of them with repeated images, and a larger batch runs in parts of the largest. By
            default, they run on exactly what is left.
        providers: ONNX Runtime's execution providers; by default the CPU's.
        session_options: ONNX Runtime's `SessionOptions` for all stages.

    Attributes:
        manifest: What the folder says of itself, as its JSON object.
        thresholds: The thresholds.

    Raises:
        ValueError: If the folder holds no such stages, they are of another version, a file is missing or damaged, or
            a threshold or a bucket is not allowed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        thresholds: float | Sequence[float] | None = None,
        buckets: Sequence[int] | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        session_options: Any = None,
    ) -> None:
        with needs_extra("OnnxEarlyExit"):
            import onnxruntime
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.content["runtime"] != "onnx":
            raise ValueError(f"{folder} holds stages for {manifest.content['runtime']!r:.100}, not for onnx.")
        if thresholds is None:
            thresholds = manifest.thresholds
        elif isinstance(thresholds, int | float):
            thresholds = (thresholds,) * (len(manifest.stages) - 1)
        manifest.check_thresholds(thresholds)
        manifest.check_files(folder)
        self._buckets = _check_buckets(buckets)
        self._stages = manifest
        self.manifest: Mapping[str, Any] = manifest.content
        self.thresholds = tuple(thresholds)
        self._sessions = [
            onnxruntime.InferenceSession(folder / stage.file, session_options, providers=list(providers))
            for stage in manifest.stages
        ]
        # Heads of exits that nobody leaves at do not run then.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True
        self._times: list[tuple[float, float]] = []

    @property
    def num_exits(self) -> int:
        """Number K of added exits; the fallback has index K."""
        return len(self.thresholds)

    def __call__(
        self, images: Array, max_exit: int | Sequence[int] | Array | None = None, on_answer: OnAnswer | None = None
    ) -> StagedAnswer:
        """Classify a batch.

        Args:
            images: Images [B, C, H, W], float32, normalised as the manifest says.
            max_exit: The exit that answers at the latest, however confident it is: one for all images, or one for each
                [B]; K, the fallback, by default. Stages after the deepest of them do not run.
            on_answer: Called as soon as images have their answer, with their places [N], logits [N, num_classes] and
                exit, while the others are still in the network.

        Returns:
            Logits [B, num_classes], float32, and the exits that gave them [B], int64.

        Raises:
            ValueError: If the images have another type or shape, or there is no exit `max_exit` or not one for each.
        """
        self._check(images)
        limits = None if max_exit is None else staged.check_limits(max_exit, len(images), self.num_exits)
        size = self._buckets[-1] if self._buckets else len(images)
        if len(images) <= size:
            return self._run_part(images, limits, 0, on_answer)
        parts = []
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            parts.append(self._run_part(images[part], None if limits is None else limits[part], start, on_answer))
        return StagedAnswer(*map(np.concatenate, zip(*parts, strict=True)))

    def answer_images(self, images: Sequence[Any], limits: Sequence[int], give: Give) -> None:
        """Answer a batch of single images [C, H, W], as `Servable` says."""
        batch = np.stack([np.asarray(image) for image in images])
        limited = limits if min(limits) < self.num_exits else None
        self(batch, limited, lambda places, logits, exit: give(places.tolist(), list(logits), exit))

    def measure(self, batch_size: int) -> None:
        """Time the stages on this machine, for deadlines: medians over a second of one random image and of a batch.

        Raises:
            ValueError: If the batch size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; allowed is 1 or more.")
        images = np.random.default_rng(0).standard_normal((max(2, batch_size), *self._stages.image_shape), np.float32)
        one, whole = self._stage_seconds(images[:1]), self._stage_seconds(images)
        per_row = [max(0.0, (large - small) / (len(images) - 1)) for small, large in zip(one, whole, strict=True)]
        self._times = [(max(0.0, small - row), row) for small, row in zip(one, per_row, strict=True)]

    def seconds_to(self, exit: int, rows: int) -> float:
        """Return what a batch takes of which no image leaves before an exit; ValueError unless `measure` was called."""
        if not self._times:
            raise ValueError(NO_TIMES)
        return sum(fixed + row * rows for fixed, row in self._times[: exit + 1])

    def every_exit(self, images: Array, *, own: bool = False) -> Array:
        """Return with which logits [K + 1, B, num_classes] each exit would answer, the fallback last.

        Args:
            images: Images [B, C, H, W].
            own: Return what each exit says alone, the backbone's own classifier last, also where ensembles answer.

        Raises:
            ValueError: If ensembles answer, and the stages were exported before they had these outputs.
        """
        self._check(images)
        settings = self.manifest["early_exit"]
        together = settings.get("running_ensemble") or settings.get("fallback") == "ensemble"
        asked = staged.OWN_LOGITS if own and together else staged.LOGITS
        found: list[Array] = []
        held = self._given(images)
        for exit, stage in enumerate(self._stages.stages):
            if asked not in [tensor.name for tensor in stage.outputs]:
                raise ValueError("The stages do not tell what each exit says alone: export them again.")
            inputs = {name: held[name] for name in stage.input_names}
            *carried, logits = self._run(exit, inputs, [*stage.carried_names, asked])
            found.append(logits)
            held |= dict(zip(stage.carried_names, carried, strict=True))
        return np.stack(found)

    def stage_inputs(self, images: Array) -> Iterator[dict[str, Array]]:
        """Yield the inputs of each stage by name where no image leaves."""
        held = self._given(images)
        for exit, stage in enumerate(self._stages.stages):
            inputs = {name: held[name] for name in stage.input_names}
            yield inputs
            carried = stage.carried_names
            held |= dict(zip(carried, self._run(exit, inputs, carried) if carried else (), strict=True))

    def _given(self, images: Array) -> dict[str, Array]:
        return {staged.IMAGES: images, staged.TEMPERATURES: np.array(self._stages.temperatures, np.float32)}

    def _run_part(self, images: Array, limits: Array | None, start: int, on_answer: OnAnswer | None) -> StagedAnswer:
        allowed = () if limits is None else set(limits.tolist())
        unasked = [exit for exit, value in enumerate(self.thresholds) if value == math.inf and exit not in allowed]

        def leaves(exit: int, confidence: Array, places: Array) -> Sequence[bool] | Array:
            leaving = staged.reaches(confidence, self.thresholds[exit])
            return leaving if limits is None else np.asarray(leaving) | (limits[places] <= exit)

        def pass_on(places: Array, logits: Array, exit: int) -> None:
            if on_answer is not None:
                on_answer(places + start, logits, exit)

        return staged.run_stages(self._stages, self._run, images, leaves, unasked, pass_on)

    def _stage_seconds(self, images: Array) -> list[float]:
        """Return the median seconds of each stage with its exit, where no image leaves."""
        rounds: list[list[float]] = []
        deadline = time.perf_counter() + _SECONDS
        while len(rounds) < 5 or time.perf_counter() < deadline:
            rounds.append([])
            for stage, inputs in enumerate(self.stage_inputs(images)):
                begin = time.perf_counter()
                self._run(stage, inputs, self._stages.stages[stage].output_names)
                rounds[-1].append(time.perf_counter() - begin)
        medians: list[float] = np.median(rounds[1:], 0).tolist()
        return medians

    def _check(self, images: Array) -> None:
        shape = self._stages.image_shape
        if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.shape[1:] != shape:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(
                f"images are {got}; allowed are numpy arrays of float32 [B, {', '.join(map(str, shape))}]."
            )

    def _run(self, stage: int, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Sequence[Array]:
        batched = self._stages.stages[stage].batched_names
        count = len(inputs[batched[0]])
        size = next((size for size in self._buckets if size >= count), count)
        if size != count:
            rows = np.arange(size) % count
            inputs = {name: value[rows] if name in batched else value for name, value in inputs.items()}
        found: Sequence[Array] = self._sessions[stage].run(outputs, inputs, self._options)
        return found if size == count else [value[:count] for value in found]


def _check_buckets(buckets: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sizes, sorted; none for all; ValueError if they are not whole numbers above 0."""
    if buckets is None:
        return ()
    if not buckets or not all(type(size) is int and size > 0 for size in buckets):
        raise ValueError(f"buckets are {buckets!r:.300}; allowed are one or more batch sizes of at least 1.")
    return tuple(sorted(set(buckets)))
