"""The face of a wrapped model: what timm reads of any model, from the backbone; saving and loading as methods."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from timm.models import group_parameters
from torch import Tensor, nn

from timm_selfdistill.compat import data_config_traits
from timm_selfdistill.exits import Backbone
from timm_selfdistill.model.gradients import set_grad_checkpointing

if TYPE_CHECKING:
    from timm_selfdistill.model.network import SelfDistillModel

_CLASS_NAMES = ("label_names", "label_descriptions")  # keys of a backbone's `pretrained_cfg`


class BackboneInterface:
    """What timm asks of any network that holds a backbone, whole or cut off."""

    backbone: Backbone

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's pretrained configuration."""
        return dict(self.backbone.pretrained_cfg)

    @property
    def _traits(self) -> dict[str, Any]:
        """What timm's `resolve_input_data_config` reads the backbone's image size from."""
        return data_config_traits(self.backbone)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing of the backbone; exits and batch statistics see each image once either way."""
        set_grad_checkpointing(self.backbone, enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters that timm exempts from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}


class TimmInterface(BackboneInterface):
    """The other methods and attributes of timm's models; the backbone gives the answers."""

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return int(self.backbone.num_classes)

    @property
    def num_features(self) -> int:
        """Channels of the backbone's last feature map."""
        return int(self.backbone.num_features)

    @property
    def in_chans(self) -> int:
        """Channels of the images, where the backbone has this attribute."""
        return int(self.backbone.in_chans)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """The backbone's pretrained configuration, under its older name."""
        return self.pretrained_cfg

    @property
    def feature_info(self) -> Any:
        """The backbone's `feature_info`."""
        return self.backbone.feature_info

    def get_classifier(self) -> nn.Module:
        """Return the backbone's own classifier."""
        classifier: nn.Module = self.backbone.get_classifier()
        return classifier

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return a function from parameter name to layer, for layer-wise learning-rate decay.

        The backbone's parameters keep the layers that timm gives them; the exits share the last one, the classifier's.
        """
        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse), reverse=True)
        layer_of, last = {f"backbone.{name}": layer for name, layer in layers.items()}, max(layers.values())
        return lambda name: layer_of.get(name, last)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last feature map, unpooled."""
        features: Tensor = self.backbone.forward_features(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the backbone's logits, or the feature before its classifier, for its last feature map."""
        output: Tensor = self.backbone.forward_head(x, pre_logits=pre_logits)
        return output

    def _forget_class_names(self) -> None:
        """Remove what timm keeps of the classes' names."""
        for attribute in ("pretrained_cfg", "default_cfg"):
            config = getattr(self.backbone, attribute, None)
            if config is not None and any(key in config for key in _CLASS_NAMES):
                setattr(self.backbone, attribute, {key: config[key] for key in config if key not in _CLASS_NAMES})


class HubInterface:
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
