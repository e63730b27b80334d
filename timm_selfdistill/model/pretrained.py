"""The functions that save, push and load a model, as methods of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from timm_selfdistill.model.network import SelfDistillModel


class PretrainedMethods:
    """What a `SelfDistillModel` has of `timm_selfdistill.hub`, which is made of models and so imported when called."""

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the model to a folder, as `timm_selfdistill.save_pretrained` does, whose arguments `options` are."""
        from timm_selfdistill.hub import save_pretrained

        return save_pretrained(cast("SelfDistillModel", self), folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push the model to the Hugging Face Hub, as `timm_selfdistill.push_to_hub` does, whose arguments these are."""
        from timm_selfdistill.hub import push_to_hub

        return push_to_hub(cast("SelfDistillModel", self), repo_id, **options)

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> "SelfDistillModel":
        """Load a model from a folder or the Hub, in eval mode, as `timm_selfdistill.from_pretrained` does."""
        from timm_selfdistill.hub import from_pretrained

        return from_pretrained(source, **options)
