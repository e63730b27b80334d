"""From a recipe's data section to batches: open and split a data set, transform its images, load them."""

from timm_selfdistill.data.splits import ImageData as ImageData
from timm_selfdistill.data.splits import ImageSplit as ImageSplit
from timm_selfdistill.data.splits import StreamSplit as StreamSplit
from timm_selfdistill.data.splits import open_dataset as open_dataset
