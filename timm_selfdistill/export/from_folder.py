"""Export a saved model: of a run's folder, a model folder or a repository on the Hub."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig
from timm_selfdistill.export.early_exit_graphs import EARLY_EXIT_FORMATS, check_early_exit_format, export_early_exit
from timm_selfdistill.export.one_graph import MODEL_FORMATS, ExportChoice, check_format, export_model
from timm_selfdistill.export.quantize import check_quantization
from timm_selfdistill.hub import from_pretrained, load_with_early_exit

FORMATS: Final = {**MODEL_FORMATS, **EARLY_EXIT_FORMATS}
"""By format, what its path ends with; where that is nothing, the path is a folder."""


def export_folder(
    source: str | Path,
    exit: ExportChoice | None = None,
    output: Path | None = None,
    *,
    format: str,
    dynamic_batch: bool = False,
    threshold: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    calibration_images: Tensor | None = None,
    default_folder: str | Path | None = None,
) -> Path:
    """Write a saved model as `export_model` does, or with early exit as `export_early_exit` does.

    By default, the backbone's own classifier is written, to "exit-K" ("ensemble", "all" for all exits; the format's
    name for early exit) and the format's ending in the folder, or in `default_folder`; for a repository, in the working
    directory. Early exit is by the settings that are saved with the model, or lets images leave at any exit with the
    confidence `threshold`.

    Raises:
        ValueError: Also if an argument does not belong to the format, or there are no settings for early exit.
    """
    early = format in EARLY_EXIT_FORMATS
    # Before the model is loaded.
    if early:
        check_early_exit_format(format)
        check_quantization(quantize, format, calibration_images)
        given = {"exit": exit is not None, "dynamic_batch": dynamic_batch}
        if unfit := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{format} writes all exits, for any batch: leave out {', '.join(unfit)}.")
    else:
        check_format(format, dynamic_batch, exit)
        given = {"threshold": threshold is not None, "quantize": quantize is not None}
        if unfit := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{format} has no early exit: {', '.join(unfit)} is for {', '.join(EARLY_EXIT_FORMATS)}.")
    folder = Path(source)
    location = folder / "model" if (folder / "model").is_dir() else source
    beside = folder if default_folder is None else Path(default_folder)
    beside = beside if beside.is_dir() else Path()
    common: dict[str, Any] = {"format": format, "image_size": image_size, "overwrite": overwrite}
    if early:
        network = _load_early_exit(location, threshold)
        path = beside / f"{format}{FORMATS[format]}" if output is None else output
        return export_early_exit(
            network, path.expanduser(), quantize=quantize, calibration_images=calibration_images, **common
        )
    model = from_pretrained(location)
    choice = model.num_exits if exit is None else exit
    name = choice if isinstance(choice, str) else f"exit-{choice}"
    path = beside / f"{name}{FORMATS[format]}" if output is None else output
    return export_model(model, choice, path.expanduser(), dynamic_batch=dynamic_batch, **common)


def _load_early_exit(source: str | Path, threshold: float | None) -> EarlyExit:
    """Load a model, with early exit by what is given or, without that, by what is saved."""
    model, settings = load_with_early_exit(source)
    if threshold is not None:
        thresholds = (threshold,) * model.num_exits
        settings = EarlyExitConfig(thresholds) if settings is None else replace(settings, thresholds=thresholds)
    if settings is None:
        raise ValueError(
            f"{source} has no early-exit settings: choose them by timm-selfdistill calibrate, or give a threshold for "
            "all exits (--threshold)."
        )
    with warnings.catch_warnings():
        # What a backbone does not do with a part of its batch, its stages may do.
        warnings.filterwarnings("ignore", message=".* cannot run on with a part of its batch")
        return EarlyExit.from_config(model, settings)
