"""Measure time and memory of a training step of the wrapped network, beside the same step of the plain timm network.

Run from the repository root, with the package installed: python benchmarks/train_step.py
What each column means is told in benchmarks/README.md.
"""

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import timm_selfdistill
from timm_selfdistill import SelfDistillationLoss, SelfDistillationTask, list_heads, wrap
from timm_selfdistill.backbones import use_small_stem
from timm_selfdistill.measure import MacCounter, seconds_of, synchronize

WARM_UP_STEPS = 3
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Workload:
    """A network and the images it is trained on.

    Args:
        image_size: Height and width of the images in pixels.
        num_classes: Number of classes.
        small_stem: Whether a ResNet's stem is the one for small images.
        heads: The heads that are measured by default.
        cpu_batch_size: Default number of images in a step on a CPU.
        gpu_batch_size: The same on any other device.
    """

    image_size: int
    num_classes: int
    small_stem: bool
    heads: tuple[str, ...]
    cpu_batch_size: int
    gpu_batch_size: int

    def batch_size(self, device: torch.device) -> int:
        """Return the default number of images in a step on a device."""
        return self.cpu_batch_size if device.type == "cpu" else self.gpu_batch_size


WORKLOADS = {
    "resnet18": Workload(32, 100, True, ("auto", "bottleneck", "sepconv_attention"), 32, 512),
    "resnet50": Workload(224, 1000, False, ("auto", "bottleneck", "sepconv_attention"), 8, 128),
    "tf_efficientnet_lite0": Workload(224, 1000, False, ("auto",), 16, 256),
    "vit_tiny_patch16_224": Workload(224, 1000, False, ("auto", "token", "linear"), 16, 256),
}


@dataclass(frozen=True)
class Row:
    """What was measured for one network and head.

    Args:
        model: Name of the network.
        head: Name of the head.
        batch_size: Number of images in a step.
        plain_seconds: Seconds of each plain step.
        wrapped_seconds: Seconds of the wrapped step that followed each of them.
        plain_macs: Multiply-accumulates of the plain forward.
        wrapped_macs: The same with all exits.
        plain_peak: Most bytes in use during a plain step, above those in use before it.
        wrapped_peak: The same of a wrapped step.
        head_activations: Bytes that heads and self-distillation loss keep for the backward.
        head_gradients: Bytes of the gradients of the heads' weights.
    """

    model: str
    head: str
    batch_size: int
    plain_seconds: tuple[float, ...]
    wrapped_seconds: tuple[float, ...]
    plain_macs: int
    wrapped_macs: int
    plain_peak: int
    wrapped_peak: int
    head_activations: int
    head_gradients: int

    @property
    def time_ratios(self) -> list[float]:
        """Time of the wrapped step over that of the plain one, pair by pair."""
        return [b / a for a, b in zip(self.plain_seconds, self.wrapped_seconds, strict=True)]

    @property
    def mac_ratio(self) -> float:
        """Multiply-accumulates of the wrapped step over those of the plain one."""
        return self.wrapped_macs / self.plain_macs

    @property
    def peak_ratio(self) -> float:
        """Peak of the wrapped step over what it is to stay below: the plain one's and the heads' activations."""
        return self.wrapped_peak / (self.plain_peak + self.head_activations)


class Step:
    """One training step of one network: forward, loss, backward, SGD.

    Args:
        task: The network and its loss.
        images: The batch [B, 3, H, W].
        target: Class indices [B].
        bf16: Whether forward and loss run under bfloat16 autocast.
    """

    def __init__(self, task: ClassificationTask, images: Tensor, target: Tensor, bf16: bool) -> None:
        self.task = task
        self.images = images
        self.target = target
        self.bf16 = bf16
        self.optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def __call__(self) -> None:
        """Train on the batch."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.task(self.images, self.target)["loss"]
        return loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the arguments name and print it as a table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # Torch's profiler would report every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    environment = _environment(args, arguments)
    rows = []
    print(_HEADER, flush=True)
    for name in args.models:
        for head in args.heads or WORKLOADS[name].heads:
            rows.append(_measure(name, head, args))
            print(_format(rows[-1]), flush=True)
    print("\n" + "; ".join(f"{key} {value}" for key, value in environment.items()))
    if args.json:
        document = {"environment": environment, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of a wrapped training step beside a plain one.")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--heads", nargs="+", choices=["auto", *list_heads()], help="instead of the usual ones of each model"
    )
    parser.add_argument("--batch-size", type=_positive, help="instead of the usual one of each model")
    parser.add_argument("--rounds", type=_positive, default=50, help="most pairs of steps for each model and head")
    parser.add_argument(
        "--seconds", type=float, default=70.0, help=f"no further round after this time, but at least {MIN_ROUNDS}"
    )
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=_positive, help="torch's number of CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single time to this file")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _measure(name: str, head: str, args: argparse.Namespace) -> Row:
    """Measure one network with one head."""
    batch_size = args.batch_size or WORKLOADS[name].batch_size(args.device)
    plain, wrapped = _build_steps(name, head, batch_size, args)
    for _ in range(WARM_UP_STEPS):
        plain()
        wrapped()
    pairs = _time_pairs(plain, wrapped, args.rounds, args.seconds)
    return Row(
        model=name,
        head=head,
        batch_size=batch_size,
        plain_seconds=tuple(pair[0] for pair in pairs),
        wrapped_seconds=tuple(pair[1] for pair in pairs),
        plain_macs=_count_macs(plain),
        wrapped_macs=_count_macs(wrapped),
        plain_peak=_peak_bytes(plain),
        wrapped_peak=_peak_bytes(wrapped),
        head_activations=_saved_bytes(wrapped) - _saved_bytes(plain),
        head_gradients=_weight_bytes(wrapped) - _weight_bytes(plain),
    )


def _build_steps(name: str, head: str, batch_size: int, args: argparse.Namespace) -> tuple[Step, Step]:
    """Return the plain and the wrapped step, of equal backbones on the same batch."""
    workload, device = WORKLOADS[name], args.device
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(args.seed)
    plain = timm.create_model(name, num_classes=workload.num_classes)
    if workload.small_stem:
        use_small_stem(plain)
    wrapped = wrap(copy.deepcopy(plain), head=head, image_size=workload.image_size)
    for model in (plain, wrapped):
        model.to(device).to(memory_format=memory_format).train()
    images = torch.randn(batch_size, 3, workload.image_size, workload.image_size)
    images = images.to(device, memory_format=memory_format)
    target = torch.randint(workload.num_classes, (batch_size,)).to(device)
    tasks = (
        ClassificationTask(plain, nn.CrossEntropyLoss(), device=device, verbose=False),
        SelfDistillationTask(wrapped, SelfDistillationLoss(), device=device, verbose=False),
    )
    first, second = (Step(task, images, target, bf16=args.precision == "bf16") for task in tasks)
    return first, second


def _time_pairs(plain: Step, wrapped: Step, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Return the seconds of both steps, which take turns, so that a machine that slows down slows both."""
    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + seconds
    while len(pairs) < min(rounds, MIN_ROUNDS) or (len(pairs) < rounds and time.perf_counter() < deadline):
        pairs.append((seconds_of(plain, plain.images.device), seconds_of(wrapped, wrapped.images.device)))
    return pairs


def _count_macs(step: Step) -> int:
    """Return the multiply-accumulates of a forward; torch's formula for the backward of depthwise ones is wrong."""
    counter = MacCounter()
    with counter, torch.no_grad():
        step.loss()
    return counter.macs


def _peak_bytes(step: Step) -> int:
    """Return the most bytes of tensors that live at once during a step, above those that live before it."""
    device = step.images.device
    step.optimizer.zero_grad()
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        step()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


def _saved_bytes(step: Step) -> int:
    """Return the bytes of all that forward and loss keep for the backward, each storage once, without parameters."""
    state = {tensor.untyped_storage().data_ptr() for tensor in chain(step.task.parameters(), step.task.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # While the loss lives, so does all that it saved: no address is used twice.
        loss = step.loss()
    del loss
    return sum(saved.values())


def _weight_bytes(step: Step) -> int:
    return sum(parameter.nbytes for parameter in step.task.parameters())


_HEADER = """\
| model | head | batch | pairs | plain s | wrapped s | time ratio (quartiles) | MAC ratio | time / MAC \
| plain MiB | wrapped MiB | heads' activations MiB | heads' gradients MiB | peak ratio |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def _format(row: Row) -> str:
    """Return a line of the table."""
    ratios = row.time_ratios
    low, ratio, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    sizes = (row.plain_peak, row.wrapped_peak, row.head_activations, row.head_gradients)
    cells = [
        row.model,
        row.head,
        str(row.batch_size),
        str(len(ratios)),
        f"{statistics.median(row.plain_seconds):.4f}",
        f"{statistics.median(row.wrapped_seconds):.4f}",
        f"{ratio:.3f} ({low:.3f}-{high:.3f})",
        f"{row.mac_ratio:.3f}",
        f"{ratio / row.mac_ratio:.3f}",
        *(f"{size / 2**20:.1f}" for size in sizes),
        f"{row.peak_ratio:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _environment(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what else the numbers depend on."""
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    else:
        device = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    return {
        "timm_selfdistill": timm_selfdistill.__version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "device": f"{args.device.type} ({device}, {os.cpu_count()} CPU cores)",
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "memory format": "channels_last" if args.channels_last else "contiguous",
        "seed": args.seed,
        "command": shlex.join(["python", "benchmarks/train_step.py", *arguments]),
    }


if __name__ == "__main__":
    main()
