"""What torchdistill's example scripts do with a configuration; they are not in its wheel.

Run as a program in several processes, it trains under Accelerate and writes what each process ended with.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torchdistill.common.main_util import import_dependencies, set_seed
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.core.training import TrainingBox, get_training_box
from torchdistill.datasets.util import build_data_loader
from torchdistill.misc.log import MetricLogger
from torchdistill.models.official import get_image_classification_model
from torchdistill.models.registry import get_model

RECIPES = Path(__file__).parents[1] / "recipes" / "torchdistill"


def load_config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = load_yaml_file(RECIPES / f"{name}.yaml")
    import_dependencies(config["dependencies"])
    return config


def load_model(config: dict[str, Any]) -> nn.Module:
    torchvision = get_image_classification_model(config)
    return get_model(config["key"], **config["kwargs"]) if torchvision is None else torchvision


def build_box(config: dict[str, Any], accelerator: Accelerator | None = None) -> TrainingBox | DistillationBox:
    models = {name: load_model(settings) for name, settings in config["models"].items()}
    device = torch.device("cpu") if accelerator is None else accelerator.device
    common = (config["datasets"], config["train"], device, None, False, 1, accelerator)
    if "model" in models:
        return get_training_box(models["model"], *common)
    return get_distillation_box(models["teacher_model"], models["student_model"], *common)


def train(box: TrainingBox | DistillationBox, steps: int) -> list[float]:
    """Train an epoch of at most `steps` steps and return their losses."""
    losses = []
    box.pre_epoch_process(epoch=0)
    for _, (images, targets, extra) in zip(range(steps), box.train_data_loader, strict=False):
        loss = box.forward_process(images, targets, extra)
        box.post_forward_process(loss=loss)
        losses.append(loss.item())
    box.post_epoch_process()
    return losses


@torch.inference_mode()
def evaluate(model: nn.Module, config: dict[str, Any], accelerator: Accelerator | None = None) -> tuple[float, int]:
    """Return top-1 on the configuration's test images in percent, and how many images were counted."""
    settings = config["test"]["test_data_loader"]
    loader = build_data_loader(config["datasets"][settings["dataset_id"]], settings, False)
    loader = loader if accelerator is None else accelerator.prepare(loader)
    model.eval()
    metrics = MetricLogger()
    for images, targets in metrics.log_every(loader, 1000):
        hits = model(images).topk(1, dim=1).indices[:, 0] == targets
        hits = hits if accelerator is None else accelerator.gather_for_metrics(hits)
        metrics.meters["acc1"].update(100 * hits.float().mean().item(), n=len(hits))
    return metrics.meters["acc1"].global_avg, metrics.meters["acc1"].count


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(name: str, steps: str, folder: str) -> None:
    set_seed(0)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    # torchdistill 1.1.5 reads this of a frozen teacher's precision; Accelerate has it no more.
    accelerator.state.use_fp16 = False
    config = load_config(name)
    box = build_box(config, accelerator)
    trained = box.model if isinstance(box, TrainingBox) else box.student_model
    before = parameters_of(accelerator.unwrap_model(trained))
    losses = train(box, int(steps))
    top1, count = evaluate(trained, config, accelerator)
    after = parameters_of(accelerator.unwrap_model(trained))
    result = {
        "losses": losses,
        "top1": top1,
        "count": count,
        "wrapped": type(trained).__name__,
        "still": [name for name in before if torch.equal(before[name], after[name])],
    }
    process = Path(folder) / str(accelerator.process_index)
    process.with_suffix(".json").write_text(json.dumps(result))
    save_file(after, process.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
