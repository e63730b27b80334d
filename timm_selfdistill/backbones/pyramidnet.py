"""PyramidNet, which timm has not: every block is a little wider than the one before it."""

from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import Tensor, nn


class PyramidNet(nn.Module):
    """PyramidNet with bottlenecks, in its form for CIFAR.

    The k-th of K blocks has 16 + alpha k / K channels inside, rounded, and four times as many outside.

    Paper: "Deep Pyramidal Residual Networks", CVPR 2017, https://arxiv.org/abs/1610.02915; code:
    https://github.com/dyhan0920/PyramidNet-PyTorch.

    Args:
        layers: Blocks in each stage; each but the first stage halves the grid.
        alpha: Channels that all blocks add together.
        num_classes: Number of logits.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: Probability of dropout before the classifier.
        device: Where parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        alpha: float,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        channels = 16
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "bn1"}]
        widths = iter([round(16 + alpha * (k + 1) / sum(layers)) for k in range(sum(layers))])
        self.stages = nn.Sequential()
        for index, count in enumerate(layers):
            stage = nn.Sequential()
            for position in range(count):
                block = PyramidBottleneck(channels, next(widths), 2 if index and not position else 1, **dd)
                stage.append(block)
                channels = block.out_channels
            self.stages.append(stage)
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": f"stages.{index}"})
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool, **dd)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameters: by stage (coarse) or by block."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^bn2", (99999,))]
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations inside of the blocks a second time in the backward, or keep them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of `num_classes` logits, or by none."""
        weight = self.conv1.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=weight.device, dtype=weight.dtype
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to the deepest feature map [B, num_features, H / 4, W / 4]."""
        x = self.bn1(self.conv1(x))
        x = checkpoint_seq(self.stages, x, flatten=True) if self.grad_checkpointing else self.stages(x)
        x = self.act2(self.bn2(x))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the deepest feature map to logits [B, num_classes], or to what the classifier reads."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class PyramidBottleneck(nn.Module):
    """Bottleneck without an activation at its ends, whose shortcut is padded with channels of zeros.

    Args:
        in_channels: Channels of the input.
        width: Channels inside; the output has four times as many.
        stride: 2 halves the grid, by average pooling in the shortcut.
        device: Where parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(self, in_channels: int, width: int, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_channels = 4 * width
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.act3 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False, **dd)
        self.bn4 = nn.BatchNorm2d(self.out_channels, **dd)
        # Rounds up, as the convolution does.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, 4 width, H / stride, W / stride]."""
        y = self.conv1(self.bn1(x))
        y = self.conv2(self.act2(self.bn2(y)))
        y = self.bn4(self.conv3(self.act3(self.bn3(y))))
        added = self.out_channels - x.shape[1]
        output: Tensor = y + F.pad(self.pool(x), (0, 0, 0, 0, 0, added))
        return output
