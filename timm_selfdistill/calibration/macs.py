"""What the way to each exit costs: the part of the backbone that runs, and the heads that are asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.exits import untouched
from timm_selfdistill.flops import MacCounter
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.model import SelfDistillModel


@dataclass(frozen=True)
class PathMacs:
    """Multiply-accumulates of one image.

    Args:
        backbone: Of the backbone up to each of the K exits, and of all of it: K + 1 numbers, growing.
        heads: Of each exit's head.
    """

    backbone: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def full(self) -> int:
        """Of the plain backbone."""
        return self.backbone[-1]

    @property
    def every_exit(self) -> int:
        """Of the backbone and all heads, as the ensemble needs them."""
        return self.full + sum(self.heads)

    def exit(self, index: int) -> int:
        """Return what one exit alone costs, K the backbone's own classifier."""
        return self.backbone[index] + (self.heads[index] if index < len(self.heads) else 0)

    def paths(self, asked: Sequence[bool]) -> Tensor:
        """Return what an image costs that leaves at each exit [K + 1], float64.

        Args:
            asked: Whether each of the K exits is asked, if an image comes by.
        """
        heads = torch.tensor([macs if runs else 0 for macs, runs in zip(self.heads, asked, strict=True)])
        return (torch.tensor(self.backbone) + torch.cat([heads, heads.new_zeros(1)]).cumsum(0)).double()

    def mean(self, config: EarlyExitConfig, exit_index: Tensor) -> float:
        """Return the mean over images that leave at these exits [N] under these settings, each as if it came alone."""
        return float(self.paths([config.asks(exit) for exit in range(len(self.heads))])[exit_index].mean())


@torch.no_grad()
def measure_path_macs(model: SelfDistillModel, input_size: tuple[int, int, int]) -> PathMacs:
    """Count the multiply-accumulates of each part of the way, in one forward of one image.

    Args:
        model: The wrapped model; left as it was.
        input_size: Channels, height and width of one image.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    backbone: list[int] = []
    heads: list[int] = []
    with untouched(model), MacCounter() as counter:

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            before = counter.macs
            backbone.append(before - sum(heads))
            head = model.heads[index]
            assert isinstance(head, ExitHead)
            head.classify(*taps)
            heads.append(counter.macs - before)

        model.forward_while(image, visit)
        backbone.append(counter.macs - sum(heads))
    return PathMacs(tuple(backbone), tuple(heads))
