"""Calibrate stages that were exported as ONNX: what their exits answer, and the settings that they keep."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.exit_logits import ExitLogits
from timm_selfdistill.files import replace_file
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.onnx import OnnxEarlyExit
from timm_selfdistill.staged import MANIFEST

_FIXED: Final = ("rule", "fallback", "running_ensemble")


def open_stages(folder: Path, model: SelfDistillModel, settings: EarlyExitConfig) -> OnnxEarlyExit:
    """Open exported stages; ValueError unless they are of the model, and decide and answer as the settings say."""
    stages = OnnxEarlyExit(folder)
    said = stages.manifest
    if said["exit_names"] != list(model.exit_names) or said["num_classes"] != model.num_classes:
        raise ValueError(
            f"{folder} has the exits {', '.join(map(str, said['exit_names']))} and {said['num_classes']} classes; the "
            f"model has {', '.join(model.exit_names)} and {model.num_classes}: export it again."
        )
    for name in _FIXED:
        if said["early_exit"].get(name) != getattr(settings, name):
            raise ValueError(
                f"{folder} was exported with {name} {said['early_exit'].get(name)!r:.100}, which is part of its "
                f"graphs; {getattr(settings, name)!r} was asked for: give that, or export it again."
            )
    if settings.combines:
        raise ValueError(f"{folder} answers with an ensemble; only stages whose exits answer alone are calibrated.")
    return stages


def collect_stage_logits(stages: OnnxEarlyExit, loader: Iterable[tuple[Tensor, Tensor]], title: str) -> ExitLogits:
    """Run stages over a split once; arguments and errors are those of `collect_logits`."""
    found, targets = [], []
    for images, labels in tqdm(loader, desc=title, leave=False):
        found.append(torch.from_numpy(stages.every_exit(images.numpy().astype(np.float32))))
        targets.append(labels)
    if not found:
        raise ValueError("There are no images to calibrate on.")
    return ExitLogits.of_labelled(torch.cat(found, 1), torch.cat(targets))


def save_stage_settings(folder: Path, config: EarlyExitConfig) -> None:
    """Keep early-exit settings in the manifest of stages."""
    content = json.loads((folder / MANIFEST).read_bytes())
    content["early_exit"] = config.to_json()
    replace_file(folder / MANIFEST, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
