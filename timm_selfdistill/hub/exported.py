"""A saved network that ends at an exit: a folder with its weights, and what is needed to build it again."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_selfdistill.hub.build import build
from timm_selfdistill.hub.folder import BACKBONE, load_weights, truthful_config, unshare
from timm_selfdistill.hub.limits import check_config
from timm_selfdistill.hub.saved import CONFIG, KEY, check_finite, describe, read_config, read_weights, sha256_of
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.truncation import truncate


def save_exported(
    model: SelfDistillModel,
    exit: int,
    folder: Path,
    *,
    label_names: Sequence[str] | None,
    data_config: Mapping[str, Any],
) -> None:
    """Write a model, cut off behind an exit, to a folder: `config.json` and `model.safetensors`.

    Each file is written beside its place and then renamed, the configuration, which holds the checksum, last. For the
    backbone's own classifier, plain timm loads the folder too.

    Args:
        model: The wrapped model.
        exit: Index of the exit; `num_exits` is the backbone's own classifier.
        folder: Where to write; made if it does not exist.
        label_names: Class names, in the order of the logits.
        data_config: Preprocessing, as in `save_pretrained`.

    Raises:
        ValueError: If there is no such exit, or `data_config` does not fit the backbone.
    """
    if not hasattr(model.backbone, "pretrained_cfg"):
        raise ValueError(f"A saved network must be of a backbone of timm's, got {type(model.backbone).__name__}.")
    check_finite(model)
    small = truncate(model, exit).cpu().to(memory_format=torch.contiguous_format)
    small.register_state_dict_post_hook(unshare)  # type: ignore[no-untyped-call]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        staged = Path(temporary)
        safetensors.torch.save_file(small.state_dict(), staged / BACKBONE)
        save_config_for_hf(
            model.backbone,
            str(staged / CONFIG),
            model_config=truthful_config(label_names),
            data_config=dict(data_config),
        )
        config = json.loads((staged / CONFIG).read_text())
        config[KEY] = asdict(describe(model, {BACKBONE: sha256_of((staged / BACKBONE).read_bytes())}, exit=exit))
        check_config(config)
        (staged / CONFIG).write_text(json.dumps(config, indent=2))
        for name in (BACKBONE, CONFIG):
            # safetensors makes files that only their owner can read, whatever the umask.
            shutil.copymode(staged / CONFIG, staged / name)
            os.replace(staged / name, folder / name)


def load_exported(folder: str | Path) -> nn.Module:
    """Load a network that `export_model` wrote as safetensors, in eval mode.

    Nothing is unpickled or executed.

    Args:
        folder: The folder.

    Returns:
        What `truncate` gave: a `TruncatedModel` or, for the backbone's own classifier, the timm model.

    Raises:
        ValueError: If the folder or a file is missing, damaged, of a newer format, or from something else.
    """
    folder = Path(folder)
    saved = read_config(folder)
    if saved.exit is None:
        raise ValueError(f"{folder} holds a whole model: load it by sd.from_pretrained.")
    weights = read_weights(folder / BACKBONE, saved.sha256.get(BACKBONE))
    small = truncate(build(folder, saved, {BACKBONE: weights}), saved.exit)
    load_weights(small, weights, folder / BACKBONE)
    return small.eval()


def is_exported(folder: Path) -> bool:
    """Whether a folder holds a network that ends at an exit, rather than a whole model or anything else."""
    try:
        return read_config(folder).exit is not None
    except ValueError:
        return False
