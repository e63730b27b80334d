"""What a run says of itself when it begins."""

from collections.abc import Sequence

from accelerate import Accelerator

from timm_selfdistill.data import ImageData
from timm_selfdistill.data.splits import ImageSplit, StreamSplit
from timm_selfdistill.data.transforms import InputConfig
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.recipe import Recipe
from timm_selfdistill.render import with_prefix
from timm_selfdistill.report import device_name


def header(
    model: SelfDistillModel,
    data: ImageData,
    recipe: Recipe,
    accelerator: Accelerator,
    networks: Sequence[str],
    input_config: InputConfig,
    batches_per_epoch: int,
) -> list[str]:
    """Return the lines that stand above those of the epochs.

    Args:
        model: The network with its exits.
        data: The data of the run.
        recipe: The recipe.
        accelerator: The accelerator of the run.
        networks: The names of the networks that are trained, in order.
        input_config: What images are made into.
        batches_per_epoch: Training batches of a process in an epoch.
    """
    size = " x ".join(map(str, (input_config.channels, *input_config.image_size)))
    exits = ", ".join(f"{point.name} ({100 * point.cost:.0f} % of the cost)" for point in model.points)
    whole, plain = (sum(each.numel() for each in part.parameters()) for part in (model, model.backbone))
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    processes = accelerator.num_processes
    epochs, steps = recipe.epochs + recipe.schedule.cooldown_epochs, batches_per_epoch // recipe.optimizer.accumulate
    return [
        f"model   {recipe.model.name}, {with_prefix(plain)} parameters, {with_prefix(whole)} with exits",
        f"exits   {exits}",
        f"data    {data.name}: {_images(data.train)} training images, {_images(data.validation)} held out, "
        f"{_images(data.eval)} to report on; {model.num_classes} classes, {size} pixels",
        f"device  {device_name(accelerator.device)}, {precision}"
        + (f", {processes} processes" if processes > 1 else ""),
        f"plan    {' and '.join(networks)}: {epochs} epochs of {steps} steps, batches of {recipe.batch_size}",
        f"output  {recipe.output_dir}",
    ]


def _images(split: ImageSplit | StreamSplit | None) -> str:
    """Return how many images a split has, as far as it is known."""
    if split is None:
        return "no"
    count = len(split.indices) if isinstance(split, ImageSplit) else split.size
    return "an unknown number of" if count is None else f"{count:,}"
