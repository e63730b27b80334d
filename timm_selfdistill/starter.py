"""Look at a data set and write a short recipe that suits it, from Python and as the command `init`."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from timm.models import get_pretrained_cfg, is_model_pretrained

from timm_selfdistill.data import ImageSplit
from timm_selfdistill.data.survey import Survey, survey
from timm_selfdistill.escape import printable
from timm_selfdistill.model.timm_models import model_problem
from timm_selfdistill.output import replace_file
from timm_selfdistill.recipe import DataSection, load_recipe
from timm_selfdistill.recipe.loss_settings import DEFAULT_PRESET

# Images up to this side are small: networks for larger ones would shrink them to nothing.
_SMALL_SIDE = 64
# Without an accelerator, images of more pixels take too long.
_CPU_SIDE = 128
_UNEVEN = 10.0
# Their `conv1` is one convolution.
_WITH_SMALL_STEM = re.compile(r"resnet\d+|resnext\d+_\w+|wide_resnet\d+_\d+")
_PLAIN_WORD = re.compile(r"[A-Za-z./~][\w./-]*")
_NO_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n", "~", ".")


@dataclass(frozen=True)
class Start:
    """What a recipe begins with; the fields are those of a recipe's sections."""

    name: str  # of the timm model
    pretrained: bool
    small_stem: bool
    image_size: int  # side in pixels
    epochs: int
    batch_size: int
    has_gpu: bool  # whether this machine has an accelerator, by which size and length were chosen


def choose_start(found: Survey, model: str | None = None, *, has_gpu: bool = False) -> Start:
    """Choose what suits a data set: a timm model, by default by the images' size and the machine, and its training.

    Raises:
        ValueError: If timm has no such model, or there are fewer than 4 training images.
    """
    images = len(found.train)
    if images < 4:
        raise ValueError(f"{found.data.name} has {images} images to train on, too few: at least 4 are needed.")
    is_small = 0 < found.side <= _SMALL_SIDE
    name = model or ("convnext_tiny" if has_gpu and not is_small else "resnet18")
    if problem := model_problem(name):
        raise ValueError(f"The model {problem}.")
    config = get_pretrained_cfg(name)
    own = 224 if config is None or config.input_size is None else int(config.input_size[-1])
    small_stem = is_small and _WITH_SMALL_STEM.fullmatch(name) is not None
    pretrained = is_model_pretrained(name) and not small_stem
    if small_stem or own <= _SMALL_SIDE:
        size = own if not small_stem else (32 if found.side <= 40 else 64)
    elif config is not None and config.fixed_input_size:
        size = own
    else:
        size = min(own, max(64, -(-found.side // 32) * 32), own if has_gpu else _CPU_SIDE)
    # What is trained from nothing takes many more steps, and a CPU few.
    most, passes = (2_000_000 if has_gpu else 500_000, (15, 100)) if not pretrained else (60_000, (5, 30))
    epochs = min(max(most // images // (1 if has_gpu or not pretrained else 4), passes[0]), passes[1])
    batch_size = 2 ** int(min(max((images // 10).bit_length() - 1, 2), 6 if pretrained or images < 10_000 else 7))
    return Start(name, pretrained, small_stem, size, epochs, batch_size, has_gpu)


def format_recipe(found: Survey, start: Start, title: str) -> str:
    """Return a recipe as YAML with comments, the first of which names the data set by `title`."""
    where = "an accelerator" if start.has_gpu else "a CPU"
    model = [f"name: {_word(start.name)}"]
    if start.pretrained:
        model.append(_commented("pretrained: true", "timm's weights, downloaded once"))
    if start.small_stem:
        model.append(_commented("small_stem: true", "the first layers do not shrink images that are small already"))
    size = f"pixels, chosen for {where}; the images have about {found.side}"
    data = [*_data_lines(found.section), _commented(f"image_size: {start.image_size}", size)]
    if found.imbalance >= _UNEVEN:
        uneven = f"the largest class has {found.imbalance:.0f} times the images of the smallest"
        data.append(_commented("sampling: balanced", uneven))
    lines = [
        f"# Written by `timm-selfdistill init` for {title} ({len(found.data.class_names)} classes, "
        f"{len(found.train):,} images to train on),",
        f"# to be trained on {where}. docs/train.md has every other key.",
        "model:",
        *(f"  {line}" for line in model),
        f"loss: {{preset: {DEFAULT_PRESET}}}",
        "data:",
        *(f"  {line}" for line in data),
        *_training_lines(start),
        f"epochs: {start.epochs}",
        f"batch_size: {start.batch_size}",
        _commented("# baseline: true", "  also train the plain network, to compare with: twice the time"),
    ]
    return "\n".join(lines) + "\n"


def _data_lines(section: DataSection) -> list[str]:
    """Return the keys of the data section that differ from their defaults, and what is reported on."""
    fields = {name: getattr(section, name) for name in DataSection.model_fields}
    changed = {name for name, field in DataSection.model_fields.items() if fields[name] != field.default}
    split = fields["eval_fraction"] is None
    comments = {
        "eval_split": "reported on once, at the end; nothing is chosen by it",
        "eval_fraction": "of the images are held out to report on",
        "validation": "of the training images are held out, to calibrate on and to fit the ensemble",
    }
    if isinstance(section.validation, str):
        comments["validation"] = "another split, to calibrate on and to fit the ensemble"
    elif section.validation == 0:
        comments["validation"] = "none is held out, as classes are too small"
    shown = [name for name in fields if name in changed or name == "validation" or (name == "eval_split" and split)]
    texts = {name: f"{name}: {_word(fields[name])}" for name in shown}
    return [_commented(text, comments[name]) if name in comments else text for name, text in texts.items()]


def _training_lines(start: Start) -> list[str]:
    if start.small_stem:
        return [
            "augment: {train_crop_mode: pad, hflip: 0.5}",
            f"optimizer: {{name: sgd, lr: {0.1 * start.batch_size / 128:.3g}, weight_decay: 5.0e-4}}",
            "schedule: {name: cosine, warmup_epochs: 2}",
        ]
    rate = 3e-4 * (start.batch_size / 64) ** 0.5
    if start.pretrained:
        return [
            "augment: {scale: [0.25, 1.0]}",
            f"optimizer: {{name: adamw, lr: {rate:.1e}, weight_decay: 0.05}}",
            "schedule: {name: cosine, warmup_epochs: 1}",
        ]
    return [
        f"optimizer: {{name: adamw, lr: {3 * rate:.1e}, weight_decay: 0.05, clip_grad: 1.0}}",
        "schedule: {name: cosine, warmup_epochs: 5}",
    ]


def _commented(text: str, comment: str) -> str:
    return f"{text:<24} # {comment}"


def _word(value: Any) -> str:
    """Return a value as YAML."""
    if isinstance(value, str) and _PLAIN_WORD.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def describe(found: Survey) -> str:
    """Return what was found in a data set, as lines for the terminal."""
    data, counts = found.data, found.counts
    uses = []
    for use, part in (("training", data.train), ("validation", data.validation), ("evaluation", data.eval)):
        if isinstance(part, ImageSplit):
            held_out = "held out of " if use != "training" and part.name == data.train.name else ""
            uses.append(f"{len(part):,} for {use} ({held_out}{part.name!r})")
    least, most = int(counts.argmin()), int(counts.argmax())
    names = data.class_names
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    lines = [
        f"images    {', '.join(uses)}",
        f"splits    {', '.join(found.splits)}",
        f"classes   {len(names)}: {listed}",
        f"balance   {counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]}) images a class",
    ]
    if found.sizes:
        widths, heights = zip(*found.sizes, strict=True)
        low, high = min(map(min, found.sizes)), max(map(max, found.sizes))
        lines.append(
            f"sizes     {median(widths):.0f} x {median(heights):.0f} pixels in the middle, sides from {low} to {high}"
            f"{', grey' if found.grey else ''} ({len(found.sizes)} images looked at)"
        )
    return "\n".join(printable(line) for line in lines)


def write_starter(
    path: str, overrides: Sequence[str] = (), model: str | None = None, output: Path | None = None, force: bool = False
) -> Path:
    """Look at a data set, print what was found, and write a recipe that suits it.

    Args:
        path: Folder, file or name on the Hub, as `data.path` of a recipe.
        overrides: Fields of the recipe's data section, as "key=value".
        model: Name of a timm model; by default one that suits the images' size and the machine.
        output: File to write; by default the data set's name with .yaml, in the current folder.
        force: Replace a file that is there.

    Returns:
        The file.

    Raises:
        ValueError: If the data set cannot be read, timm has no such model, or the file is there.
    """
    changes = [f"data.{override}" for override in overrides]
    section = load_recipe({"model": {"name": "resnet18"}, "data": {"path": path}}, changes).data  # any model
    if section.streaming:
        raise ValueError("data.streaming: must be false for init, which counts the images of every class.")
    found = survey(section)
    start = choose_start(found, model, has_gpu=torch.cuda.is_available())
    name = re.sub(r"[^\w.-]+", "-", Path(found.data.name).name).strip(".-") or "recipe"
    file = Path(f"{name}.yaml") if output is None else output.expanduser()
    if os.path.lexists(file) and not force:
        raise ValueError(f"{file} is there already: give another --output, or --force to replace it.")
    text = format_recipe(found, start, printable(found.data.name))
    print(describe(found))
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())
    load_recipe(file)
    return file


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="folder, table, parquet file or name on the Hugging Face Hub")
    parser.add_argument("--model", help="name of a timm model; by default one that suits images and machine")
    parser.add_argument("--output", type=Path, metavar="FILE", help="recipe to write; by default DATA.yaml")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the data section, such as target=fine_label"
    )


def _init(data: str, **options: Any) -> None:
    file = write_starter(data, **options)
    print(f"\nWritten to {printable(file)}. Train with:\n  timm-selfdistill train {printable(file)}")


COMMANDS: Final = {"init": (_add_init, _init)}
