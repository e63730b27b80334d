"""A saved model, whole or cut off at an exit: a folder that plain timm loads too."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_selfdistill.compat import save_config_for_hf
from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.hub.build import (
    build,
    check_weights,
    create_from,
    load_weights,
    on_meta_device,
    read_weights,
    sha256_of,
)
from timm_selfdistill.hub.card import card_with_early_exit, model_card
from timm_selfdistill.hub.saved_config import CONFIG, KEY, Saved, check_config, complete_names, describe, read_config
from timm_selfdistill.model import Ensemble, SelfDistillModel
from timm_selfdistill.truncation import truncate

BACKBONE: Final = "model.safetensors"
EXITS: Final = "exits.safetensors"
CARD: Final = "README.md"


def save_pretrained(
    model: SelfDistillModel,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    early_exit: EarlyExitConfig | None = None,
    card: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a folder that `from_pretrained` and, for the backbone, plain timm load.

    The folder gets `config.json` (timm's, with one more key), `model.safetensors` (the backbone under timm's own
    keys), `exits.safetensors` and `README.md`. Each file is written beside its place and then renamed, the
    configuration, which holds the weights' checksums, last. For a backbone with `small_stem`, which timm cannot build
    from a name, plain timm needs the three lines that the model card shows.

    Args:
        model: The wrapped model; what it is wrapped in (DDP, compile) must be removed first.
        folder: Where to write; made if it does not exist.
        label_names: Class names, in the order of the logits; the classes after them are named by their index.
        data_config: Preprocessing of the training run (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`).
        early_exit: When images leave early, for `load_early_exit`; the `config` of an `EarlyExit`.
        card: Text of the model card; a short one by default.
        run: What a training run says of itself, as JSON can hold it.

    Returns:
        The folder.

    Raises:
        ValueError: If the backbone is not a timm model, or not one that `data_config` fits, or has other weights than
            timm would build it with; if `early_exit` has not one threshold for each exit, there are more names than
            classes, or a weight is not a finite number.
    """
    _check(model, "model")
    if early_exit is not None:
        early_exit.check_exits(model.exit_names[:-1])
    names = None if label_names is None else complete_names(label_names, model.num_classes)
    folder = Path(folder)
    # Saved as plain timm stores it: on the CPU and in the default memory format.
    backbone = copy.deepcopy(model.backbone).cpu().to(memory_format=torch.contiguous_format)
    backbone.register_state_dict_post_hook(_unshare)
    exits = {name: tensor.cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
    with _staged(folder, (BACKBONE, EXITS, CARD, CONFIG)) as staged:
        model_config, data_config = _truthful_config(names), dict(data_config or {})
        save_for_hf(backbone, str(staged), model_config=model_config, safe_serialization=True, data_config=data_config)
        _check_can_be_built(staged, backbone)
        safetensors.torch.save_file(exits, staged / EXITS)
        sha256 = {name: sha256_of(staged / name) for name in (BACKBONE, EXITS)}
        config = json.loads((staged / CONFIG).read_text())
        # It is also outside `model_args`: transformers' wrapper of timm hands over both, and then fails.
        config["model_args"].pop("num_classes", None)
        _write_config(staged, config, describe(model, sha256, early_exit=early_exit, run=run))
        (staged / CARD).write_text(card if card is not None else model_card(model, early_exit=early_exit))
    return folder


def save_exported(
    model: SelfDistillModel, exit: int, folder: Path, label_names: Sequence[str] | None, data_config: Mapping[str, Any]
) -> None:
    """Write a model, cut off after an exit, as `config.json` and `model.safetensors`; see `save_pretrained`.

    For the backbone's own classifier (exit `num_exits`), plain timm loads the folder too.
    """
    _check(model, "network")
    small = truncate(model, exit).cpu().to(memory_format=torch.contiguous_format)
    small.register_state_dict_post_hook(_unshare)
    with _staged(folder, (BACKBONE, CONFIG)) as staged:
        safetensors.torch.save_file(small.state_dict(), staged / BACKBONE)
        model_config, data_config = _truthful_config(label_names), dict(data_config)
        save_config_for_hf(model.backbone, str(staged / CONFIG), model_config=model_config, data_config=data_config)
        config = json.loads((staged / CONFIG).read_text())
        _write_config(staged, config, describe(model, {BACKBONE: sha256_of(staged / BACKBONE)}, exit=exit))


def load_folder(folder: str | Path) -> SelfDistillModel:
    """Load a model that `save_pretrained` wrote, in eval mode; nothing is unpickled or executed."""
    folder = Path(folder)
    saved = read_config(folder)
    if saved.exit is not None:
        raise ValueError(
            f"{folder} holds a network that ends at exit {saved.exit}, not a whole model: sd.load_exported."
        )
    weights = {name: read_weights(folder / name, saved.sha256.get(name)) for name in (BACKBONE, EXITS)}
    model = build(folder, saved, weights)
    for name, module in ((BACKBONE, model.backbone), (EXITS, model.heads)):
        load_weights(module, weights[name], folder / name)
    if saved.ensemble is not None:
        model.ensemble = _ensemble(folder, saved.ensemble, model)
    return model.eval()


def load_exported(folder: str | Path) -> nn.Module:
    """Load a network that `export_model` wrote as safetensors, in eval mode; nothing is unpickled or executed.

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


def read_run(folder: str | Path) -> Any:
    """Return what the training run that saved a model said of itself, or None if no run did."""
    return read_config(Path(folder)).run


def read_early_exit(folder: str | Path) -> EarlyExitConfig | None:
    """Return the early-exit settings that were saved with a model, or None if there are none."""
    saved = read_config(Path(folder)).early_exit
    try:
        return None if saved is None else EarlyExitConfig.from_json(saved)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG} holds early-exit settings that are not allowed: {error}") from error


def save_early_exit(folder: str | Path, early_exit: EarlyExitConfig) -> None:
    """Keep early-exit settings, with one threshold for each exit, with a model that is saved already.

    `config.json` is replaced first, then the model card, where it still has the lines that tell how to load the model.
    """
    folder = Path(folder)
    model = load_folder(folder)
    early_exit.check_exits(model.exit_names[:-1])
    config = json.loads((folder / CONFIG).read_text())
    config[KEY]["early_exit"] = early_exit.to_json()
    texts = {CONFIG: json.dumps(config, indent=2)}
    if (folder / CARD).is_file():
        texts[CARD] = card_with_early_exit((folder / CARD).read_text(), model, early_exit)
    with _staged(folder, tuple(texts)) as staged:
        for name, text in texts.items():
            (staged / name).write_text(text)
        shutil.copymode(folder / CONFIG, staged / CONFIG)


def _check(model: SelfDistillModel, what: str) -> None:
    if not hasattr(model.backbone, "pretrained_cfg"):
        raise ValueError(f"A saved {what} must have a backbone of timm's, got {type(model.backbone).__name__}.")
    check_weights(model)


@contextmanager
def _staged(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give the body a place to write files, which are then put into the folder in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        staged = Path(temporary)
        yield staged
        mode = (staged / CONFIG).stat().st_mode
        for name in names:
            # safetensors makes files that only their owner can read, whatever the umask.
            (staged / name).chmod(mode)
            os.replace(staged / name, folder / name)


def _write_config(folder: Path, config: dict[str, Any], saved: Saved) -> None:
    config[KEY] = asdict(saved)
    check_config(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _check_can_be_built(folder: Path, backbone: nn.Module) -> None:
    """Refuse a backbone that timm would not build from a folder with the names of its weights."""
    try:
        with on_meta_device():
            built = create_from(folder)
    except Exception:  # of whatever kind: some networks cannot be built without memory
        return
    differing = sorted(set(built.state_dict()) ^ set(backbone.state_dict()))
    if differing:
        raise ValueError(
            f"{type(backbone).__name__} could not be loaded again: {len(differing)} of its weights, such as "
            f"{differing[0]!r}, have other names than in the network that timm builds. It was fused or changed: save "
            "it before that."
        )


def _ensemble(folder: Path, value: Any, model: SelfDistillModel) -> Ensemble:
    """Return the ensemble that was saved with a model."""
    outputs, classes = model.num_exits + 1, model.num_classes
    try:
        ensemble = Ensemble.from_json(value)
        if len(ensemble.weights) != outputs:
            raise ValueError(f"it has {len(ensemble.weights)} weights for {outputs} outputs")
        if ensemble.bias is not None and len(ensemble.bias) != classes:
            raise ValueError(f"it has a bias for {len(ensemble.bias)} classes, the model has {classes}")
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} holds an ensemble that is not allowed: {error}") from error
    return ensemble


def _unshare(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    """Copy tensors that share memory, as CoaT's position encodings do: safetensors refuses them."""
    seen: set[int] = set()
    for name, tensor in state.items():
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            state[name] = tensor.clone()
        seen.add(address)


def _truthful_config(label_names: Sequence[str] | None) -> dict[str, Any]:
    """Return what replaces, in timm's configuration, that which was true of the pretrained weights only."""
    config: dict[str, Any] = {
        "pretrained_cfg": {"tag": "selfdistill", "license": None, "origin_url": None, "paper_ids": "arXiv:1905.08094"}
    }
    if label_names is not None:
        config["label_names"] = list(label_names)
    return config
