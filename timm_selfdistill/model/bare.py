"""A backbone without the hooks of exits, for forwards that read nothing."""

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from timm_selfdistill.compat import contents, copy_without_hooks
from timm_selfdistill.exits import Backbone
from timm_selfdistill.model.hooks import is_ours, run_unread


class BareBackbone:
    """Runs a backbone past the hooks of exits, which take some per cent of a small network's time.

    The modules with such hooks, and those that hold them, are called through copies without, which share parameters,
    buffers and all other modules with their originals: weights may change and move. Where anything else changed (a
    module was replaced, a user's hook added, an attribute set), the backbone itself runs.

    Args:
        backbone: The backbone, in eval mode.

    Attributes:
        backbone: The same.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        made: dict[nn.Module, nn.Module] = {}
        self._bare = copy_without_hooks(backbone, is_ours, made)
        # Views of what the originals hold now, and what they held: compared without a loop in Python.
        self._views = [view for module, copy in made.items() if copy is not module for view in contents(module)]
        self._values = list(chain.from_iterable(self._views))

    def __call__(self, x: Tensor) -> Any:
        """Return what the backbone returns."""
        held = chain.from_iterable(self._views)
        same = sum(map(len, self._views)) == len(self._values) and all(map(is_, held, self._values))
        return run_unread(self._bare if same else self.backbone, x)
