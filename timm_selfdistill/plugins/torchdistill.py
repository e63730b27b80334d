"""torchdistill: importing this module registers wrapped models, their forward and their loss under prefixed keys.

In a torchdistill configuration `dependencies: [{name: timm_selfdistill.plugins.torchdistill}]` does so.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import timm
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_selfdistill.data import ImageSplit, open_dataset
from timm_selfdistill.data.decode import decode, read
from timm_selfdistill.data.transforms import MODES
from timm_selfdistill.hub import from_pretrained
from timm_selfdistill.lazy import needs_extra
from timm_selfdistill.losses import Needs, SelfDistillationLoss, get_loss, needs_of
from timm_selfdistill.model import ExitOutput, wrap
from timm_selfdistill.recipe import DataSection
from timm_selfdistill.recipe.loss_settings import DEFAULT_PRESET

with needs_extra(__name__):
    from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
    from torchdistill.core.interfaces.registry import FORWARD_PROC_FUNC_DICT, PRE_EPOCH_PROC_FUNC_DICT
    from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
    from torchdistill.models.registry import MODEL_DICT

PREFIX: Final = "timm_selfdistill."

_PARTS = ("train", "validation", "eval")
# The keys of a recipe's data section that choose images; the others define how they are transformed and loaded.
_IMAGE_KEYS = (
    *("path", "name", "image", "target", "train_split", "eval_split", "validation", "eval_fraction"),
    *("allow_empty_classes", "check_duplicates", "max_train", "max_eval"),
)


def forward_exits(
    model: nn.Module, sample_batch: Tensor, targets: Any = None, supp_dict: Any = None, **kwargs: Any
) -> ExitOutput:
    """Run the backbone and the exits; a forward process of torchdistill, which passes the arguments that are not used.

    The output of the module path "." is then an `ExitOutput`. Inside the forward, so that DDP sees the exits run.

    Args:
        model: The wrapped model, possibly inside DDP.
        sample_batch: Images [B, C, H, W].
    """
    output: ExitOutput = model(sample_batch, return_exits=True)
    return output


def eval_teacher(self: Any, epoch: int | None = None, **kwargs: Any) -> None:
    """Start an epoch of teacher-student training with the teacher in eval mode; a pre-epoch process of torchdistill.

    torchdistill leaves the teacher's mode alone, and models are made in training mode: a teacher with `requires_grad:
    False` would still use and change its batch statistics. `self` is the distillation box.
    """
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    self.teacher_model.eval()


class ExitLoss(nn.Module):
    """A registered loss on the student's exits, as a mid-level loss of torchdistill.

    Args:
        name: Name of a registered loss.
        **settings: For this library's own loss `preset` and the fields of `SelfDistillationConfig` that differ from it;
            for another loss its arguments.

    Raises:
        ValueError: If the loss, its preset or one of its settings is unknown, if it has parameters, or if it needs more
            than the output and the target.
    """

    def __init__(self, name: str = "self-distillation", **settings: Any) -> None:
        super().__init__()
        cls = get_loss(name)
        if cls is SelfDistillationLoss:
            preset = settings.pop("preset", DEFAULT_PRESET)
            self.loss: nn.Module = SelfDistillationLoss.from_preset(preset, **settings)
        else:
            self.loss = cls(**settings)
        if any(parameter.requires_grad for parameter in self.loss.parameters()):
            raise ValueError(
                f"The loss {name!r} has parameters, which torchdistill would not train: put them into the model."
            )
        needs = needs_of(self.loss)
        if needs != Needs(exits=needs.exits, features=needs.features, ensemble=needs.ensemble):
            raise ValueError(
                f"The loss {name!r} has {needs}, which torchdistill does not provide: train a recipe, or a "
                "SelfDistillationTask."
            )
        self.needs_exits = needs.exits

    def forward(
        self, student_io_dict: Mapping[str, Any], teacher_io_dict: Mapping[str, Any], targets: Tensor
    ) -> Tensor:
        """Return the loss of what the student returned; the teacher's part is not used.

        Args:
            student_io_dict: What the student's modules took and returned, by module path.
            targets: Class indices [B] or class probabilities [B, num_classes].

        Raises:
            ValueError: If the exits did not run.
        """
        output = student_io_dict["."]["output"]
        if isinstance(output, Tensor) and not self.needs_exits:
            output = ExitOutput((output,), ())
        if not isinstance(output, ExitOutput):
            raise ValueError(
                f"The loss reads the exits, but the student returned a {type(output).__name__}: give it the model "
                f"{PREFIX}wrap and the forward_proc {PREFIX}forward_exits."
            )
        loss: Tensor = self.loss(output, targets)["loss"]
        return loss


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images and class indices of what a recipe's `data` section names; has what torchvision's data sets have.

    Args:
        part: "train", "validation" or "eval".
        data: The keys of a recipe's `data` section that choose images, such as `{path: digits, validation: 0.1}`.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        transform: Maps a PIL image to what the model takes; without, a sample is the PIL image.
        seed: Decides which images are held out.

    Attributes:
        classes: The name of each class index.
        targets: The class index of each image.

    Raises:
        ValueError: If the data set cannot be opened, there is no such part, or a key or value is not allowed.
    """

    def __init__(
        self,
        part: str,
        data: Mapping[str, Any],
        channels: int = 3,
        transform: Callable[[Image.Image], Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, allowed in (("part", part, _PARTS), ("channels", channels, tuple(MODES))):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}.")
        if unknown := sorted(data.keys() - set(_IMAGE_KEYS)):
            raise ValueError(
                f"data has the keys {', '.join(unknown)}; allowed are {', '.join(_IMAGE_KEYS)}. `transform` and "
                "torchdistill's data loader define how images are transformed and loaded."
            )
        opened = open_dataset(DataSection.model_validate(dict(data)), seed)
        split = getattr(opened, part)
        if split is None:
            raise ValueError("part is 'validation', but data.validation is 0.")
        assert isinstance(split, ImageSplit)
        self.transform = transform
        self.classes = list(opened.class_names)
        self.targets: list[int] = split.targets.tolist()
        self._split = split
        self._mode = MODES[channels]

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        sample = self._split[index]
        image = decode(read(sample["image"]), self._mode)
        return image if self.transform is None else self.transform(image), sample["target"]


# torchdistill's registries overwrite silently, and it looks for torchvision's names first.
_ENTRIES: tuple[tuple[dict[str, Any], str, Any], ...] = (
    (MODEL_DICT, "wrap", wrap),
    (MODEL_DICT, "from_pretrained", from_pretrained),
    (MODEL_DICT, "create_model", timm.create_model),
    (FORWARD_PROC_FUNC_DICT, "forward_exits", forward_exits),
    (PRE_EPOCH_PROC_FUNC_DICT, "eval_teacher", eval_teacher),
    (MIDDLE_LEVEL_LOSS_DICT, "loss", ExitLoss),
)


def register() -> None:
    """Register everything with torchdistill, again if need be; ValueError if another object has one of the keys."""
    for registry, name, entry in _ENTRIES:
        taken = registry.get(PREFIX + name, entry)
        if _path(taken) != _path(entry):
            raise ValueError(
                f"torchdistill's key {PREFIX + name!r} is taken by {_path(taken)}, which is not overwritten: register "
                "that under another key."
            )
    for registry, name, entry in _ENTRIES:
        registry[PREFIX + name] = entry


def _path(entry: Any) -> str:
    """Return where an entry is defined; a reloaded module holds new objects of the same paths."""
    return f"{getattr(entry, '__module__', None)}.{getattr(entry, '__qualname__', repr(entry))}"


register()
