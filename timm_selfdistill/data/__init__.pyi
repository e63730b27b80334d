"""From a recipe's data section to batches: open and split a data set, transform its images, load them."""

from timm_selfdistill.data.batches import Arrangement as Arrangement
from timm_selfdistill.data.batches import TrainingOrder as TrainingOrder
from timm_selfdistill.data.decode import SKIPPED as SKIPPED
from timm_selfdistill.data.decode import SkipList as SkipList
from timm_selfdistill.data.decode import check_pillow as check_pillow
from timm_selfdistill.data.decode import merge_skipped as merge_skipped
from timm_selfdistill.data.decode import read_file as read_file
from timm_selfdistill.data.image_files import image_endings as image_endings
from timm_selfdistill.data.loaders import Loaders as Loaders
from timm_selfdistill.data.loaders import build_loaders as build_loaders
from timm_selfdistill.data.sources import is_on_hub as is_on_hub
from timm_selfdistill.data.splits import ImageData as ImageData
from timm_selfdistill.data.splits import ImageSplit as ImageSplit
from timm_selfdistill.data.splits import StreamSplit as StreamSplit
from timm_selfdistill.data.splits import open_dataset as open_dataset
from timm_selfdistill.data.transforms import MODES as MODES
from timm_selfdistill.data.transforms import InputConfig as InputConfig
from timm_selfdistill.data.transforms import Transform as Transform
from timm_selfdistill.data.transforms import build_mixup as build_mixup
from timm_selfdistill.data.transforms import eval_transform as eval_transform
from timm_selfdistill.data.transforms import train_transform as train_transform
from timm_selfdistill.data.workers import worker_options as worker_options
