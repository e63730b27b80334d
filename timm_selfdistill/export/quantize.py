"""Quantise the stages of an exported network to int8 with ONNX Runtime; classifiers and rules stay in float32."""

import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from timm_selfdistill.export.graphs import ExportError, first_line
from timm_selfdistill.onnx import OnnxEarlyExit
from timm_selfdistill.staged import LOGITS, MANIFEST, OWN_LOGITS, Array, Manifest, sha256_of

if TYPE_CHECKING:  # an optional dependency
    from onnx import GraphProto

QUANTIZERS: Final = ("dynamic", "static")


def check_quantization(mode: str | None, format_name: str, images: Sized | None) -> None:
    """Raise ValueError unless stages of this format can be quantised in this way, None for not at all."""
    if mode is not None and mode not in QUANTIZERS:
        raise ValueError(f"quantize is {mode!r:.100}; allowed are {', '.join(QUANTIZERS)}.")
    if mode is not None and format_name != "onnx-stages":
        raise ValueError(f"{format_name} cannot be quantised; allowed is onnx-stages.")
    if (mode == "static") != (images is not None and len(images) > 0):
        raise ValueError("calibration_images belong to quantize='static', which sets the range of each tensor by them.")


def quantize_stages(folder: Path, mode: str, images: Array | None) -> None:
    """Replace the graphs of a folder by quantised ones, and change its manifest.

    Args:
        folder: The stages.
        mode: "dynamic": weights are int8, and the range of a tensor is that of the batch; "static": it is that of all
            `images`, so that whole chains of operations run in int8.
        images: Images [N, C, H, W].

    Raises:
        ExportError: If ONNX Runtime cannot quantise a stage, or a quantised one cannot run.
    """
    manifest = Manifest.read(folder)
    inputs = _inputs(folder, images) if images is not None else [[] for _ in manifest.stages]
    try:
        for stage, given in zip(manifest.stages, inputs, strict=True):
            _quantize(folder / stage.file, mode, given)
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        about = {"mode": mode, "images": 0 if images is None else len(images)}
        content = {**manifest.content, "quantized": about, "sha256": {path.name: sha256_of(path) for path in files}}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        trial = np.random.default_rng(0).standard_normal((3, *manifest.image_shape), np.float32)
        answers = OnnxEarlyExit(folder).every_exit(trial)
    except Exception as error:  # of onnxruntime, of any kind
        raise ExportError(f"The stages cannot be quantised ({mode}): {first_line(error)}.") from error
    if not np.isfinite(answers).all():
        raise ExportError(f"The quantised stages ({mode}) give logits that are no numbers.")


def _inputs(folder: Path, images: Array) -> list[list[dict[str, Array]]]:
    """Return, for each stage, its inputs for images, one after the other, as the stages before it give them."""
    network = OnnxEarlyExit(folder)
    seen: list[list[dict[str, Array]]] = [[] for _ in network.manifest["stages"]]
    for image in np.split(images, len(images)):
        for stage, given in enumerate(network.stage_inputs(image)):
            seen[stage].append(given)
    return seen


def _quantize(path: Path, mode: str, given: Sequence[Mapping[str, Array]]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # without types
        def __init__(self) -> None:
            self.rows: Iterator[Mapping[str, Array]] = iter(given)

        def get_next(self) -> Any:
            return next(self.rows, None)

    kept = _of_answer(onnx.load(path, load_external_data=False).graph)
    weights = path.with_name(f"{path.name}.data")  # of a large graph
    quantized = path.parent / "quantized" / path.name
    quantized.parent.mkdir()
    large = {"use_external_data_format": weights.exists()}
    if mode == "dynamic":
        # ONNX Runtime has convolutions of uint8 weights only.
        quantize_dynamic(path, quantized, weight_type=QuantType.QUInt8, nodes_to_exclude=kept, **large)
    else:
        quantize_static(
            path,
            quantized,
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=kept,
            **large,
        )
    weights.unlink(missing_ok=True)
    for file in quantized.parent.iterdir():
        file.replace(path.parent / file.name)
    quantized.parent.rmdir()


def _of_answer(graph: "GraphProto") -> list[str]:
    """Return the names of the nodes that give an exit's logits, and of those after them."""
    reached = {LOGITS, OWN_LOGITS}
    names = []
    for node in graph.node:
        if not reached.isdisjoint([*node.input, *node.output]):
            reached.update(node.output)
            names.append(node.name)
    return names
