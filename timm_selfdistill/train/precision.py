"""The precision of a run: the one that the recipe names, or the one that suits the device."""

import logging
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_bf16_available, parse_flag_from_env

from timm_selfdistill.compat import cpu_computes_bf16

_logger = logging.getLogger(__name__)


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """Return an accelerator of a recipe's precision.

    Args:
        precision: "auto" for what suits the device, else what Accelerate calls it.
        **options: Further arguments of `Accelerator`.

    Raises:
        ValueError: If the device cannot compute in the precision.
    """
    # As Accelerator makes it, which it leaves as it is then.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device = state.device
    if precision == "auto":
        precision, reason = suitable_precision(device)
        if state.is_main_process:
            _logger.info("Precision %s: %s.", precision, reason)
    elif precision == "fp16" and device.type == "cpu":
        raise ValueError("precision: fp16 does nothing on a CPU; allowed there are auto, no and bf16.")
    elif precision == "bf16" and not computes_bf16(device):
        if device.type == "cuda":
            raise ValueError("precision: this GPU cannot compute in bf16; allowed are auto, no and fp16.")
        if state.is_main_process:
            _logger.warning(
                "precision: bf16 is emulated on this %s device, so training takes longer than in float32 (up to three "
                "times as long on a CPU without AVX-512); precision=auto chooses what suits the device.",
                device.type,
            )
    return Accelerator(mixed_precision=precision, **options)


def suitable_precision(device: torch.device) -> tuple[str, str]:
    """Return the fastest precision that a device computes in natively, and why it is that one."""
    if computes_bf16(device):
        return "bf16", f"the {device.type} device computes in bf16"
    if device.type == "cuda":
        return "fp16", "this GPU computes in half precision, but not in bf16"
    return "no", f"this {device.type} device is fastest in float32"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 itself, without emulating it."""
    if device.type == "cpu":
        return cpu_computes_bf16()
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported is true of older GPUs too, which emulate it.
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(is_bf16_available(ignore_tpu=False))
