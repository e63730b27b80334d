"""From a recipe's data section to batches: open and split a data set, transform its images, load them."""

from timm_selfdistill.data.batches import Arrangement, TrainingOrder
from timm_selfdistill.data.decode import check_pillow, decode, read_file
from timm_selfdistill.data.image_files import image_endings
from timm_selfdistill.data.loaders import Loaders, build_loaders
from timm_selfdistill.data.skipped import SKIPPED, SkipList, merge_skipped
from timm_selfdistill.data.sources import is_on_hub
from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit, open_dataset
from timm_selfdistill.data.transforms import (
    MODES,
    InputConfig,
    Transform,
    build_mixup,
    eval_transform,
    train_transform,
)
from timm_selfdistill.data.workers import worker_options

__all__ = [
    "MODES",
    "SKIPPED",
    "Arrangement",
    "ImageData",
    "ImageSplit",
    "InputConfig",
    "Loaders",
    "SkipList",
    "StreamSplit",
    "TrainingOrder",
    "Transform",
    "build_loaders",
    "build_mixup",
    "check_pillow",
    "decode",
    "eval_transform",
    "image_endings",
    "is_on_hub",
    "merge_skipped",
    "open_dataset",
    "read_file",
    "train_transform",
    "worker_options",
]
