"""Run a network with early exit that was exported as ONNX stages: without torch and timm."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_selfdistill.lazy import needs_extra
from timm_selfdistill.staged import (
    IMAGES,
    LOGITS,
    TEMPERATURES,
    Array,
    Manifest,
    StagedAnswer,
    reaches,
    run_stages,
)


class OnnxEarlyExit:
    """A folder that `timm-selfdistill export --format onnx-stages` wrote, run by ONNX Runtime.

    As with `EarlyExit`, each image leaves at the first exit whose confidence reaches the exit's threshold, and the rest
    of the network runs on the images that are left. May be called from several threads at once.

    Args:
        folder: The folder with `manifest.json`.
        thresholds: K numbers, one for each added exit, or one number for all, in place of those of the manifest;
            infinity lets no image leave.
        buckets: The batch sizes that the stages may run on, so that they meet few shapes: what is left of a batch is
            filled up to the next of them with images that are there already, and a batch larger than the largest runs
            in parts of that size. By default, they run on exactly what is left.
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
        self._unasked = [exit for exit, threshold in enumerate(self.thresholds) if threshold == math.inf]

    def __call__(self, images: Array) -> StagedAnswer:
        """Classify a batch.

        Args:
            images: Images [B, C, H, W], float32, normalised as the manifest says.

        Returns:
            Logits [B, num_classes], float32, and the exits that gave them [B], int64.

        Raises:
            ValueError: If the images have another type or shape.
        """
        self._check(images)
        largest = self._buckets[-1] if self._buckets else max(1, len(images))
        parts = [
            run_stages(self._stages, self._run, images[start : start + largest], self._leaves, self._unasked)
            for start in range(0, max(1, len(images)), largest)
        ]
        return parts[0] if len(parts) == 1 else StagedAnswer(*map(np.concatenate, zip(*parts, strict=True)))

    def every_exit(self, images: Array) -> Array:
        """Return with which logits [K + 1, B, num_classes] each exit would answer, the fallback last."""
        self._check(images)
        found: list[Array] = []
        held = self._given(images)
        for exit, stage in enumerate(self._stages.stages):
            outputs = [*stage.carried_names, LOGITS]
            inputs = {name: held[name] for name in stage.input_names}
            *carried, logits = self._run(exit, inputs, outputs)
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
        return {IMAGES: images, TEMPERATURES: np.array(self._stages.temperatures, np.float32)}

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

    def _leaves(self, exit: int, confidence: Array, places: Array) -> list[bool]:
        return reaches(confidence, self.thresholds[exit])


def _check_buckets(buckets: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sizes, sorted; none for all; ValueError if they are not whole numbers above 0."""
    if buckets is None:
        return ()
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in buckets)
    if not whole or not buckets:
        raise ValueError(f"buckets are {buckets!r:.300}; allowed are one or more batch sizes of at least 1.")
    return tuple(sorted(set(buckets)))
