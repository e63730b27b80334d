"""From a recipe's data section to batches: open and split a data set, transform its images, load them."""

from typing import TYPE_CHECKING, Any

__all__ = ["ImageData", "ImageSplit", "StreamSplit", "open_dataset"]

if TYPE_CHECKING:
    from timm_selfdistill.data.splits import ImageData, ImageSplit, StreamSplit, open_dataset
else:

    def __getattr__(name: str) -> Any:
        """Load `datasets` only when a data set is opened: decoding and transforms do without it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from timm_selfdistill.data import splits

        return getattr(splits, name)
