"""Count what several processes send each other in a training step, with and without exits, and compare with a formula.

    python benchmarks/all_reduce.py --report docs/scaling.md

The formula's numbers come from torch's meta device. The measured ones come from two CPU processes that train a few
steps with Accelerate's DDP, as the training loop does; what each column means is told in the report.
"""

import argparse
import json
import os
import platform
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import ProfilerActivity, profile

import timm_selfdistill as sd
from timm_selfdistill.measure import MacCounter

# The heads of each network; "none" is the plain network, "auto" are the default heads, "published" the bottlenecks or
# token heads.
MODELS = {
    "resnet50": ("none", "auto", "published", "sepconv_attention", "linear"),
    "vit_base_patch16_224": ("none", "auto", "published", "linear"),
}
GPUS = (8, 64)
NUM_CLASSES = 1000
BATCH_SIZE = 2

# DDP puts its buckets in the order of the first backward before the second step.
_UNCOUNTED_STEPS = 2
_BYTES_RECEIVED = 128  # where Linux's struct tcp_info has tcpi_bytes_received, a 64-bit number


@dataclass(frozen=True)
class Formula:
    """What a step must send, from the network alone.

    Args:
        model: Name of the network.
        head: Name of the heads; "none" for the plain network.
        parameters: Trained parameters.
        gradient_bytes: Bytes that are all-reduced: four for each of them.
        buffer_bytes: Bytes of the buffers, which the first process broadcasts.
        macs: Multiply-accumulates of one image's forward.
    """

    model: str
    head: str
    parameters: int
    gradient_bytes: int
    buffer_bytes: int
    macs: int

    def received(self, processes: int) -> float:
        """Bytes that each process receives, and sends, in a ring all-reduce of the gradients."""
        return 2 * (processes - 1) / processes * self.gradient_bytes


@dataclass(frozen=True)
class Measured:
    """What one process of two counted in one step.

    Args:
        bucket_bytes: Bytes of the gradients that DDP handed over for all-reducing.
        all_reduces: Calls of all-reduce.
        broadcasts: Calls of broadcast.
        received: Bytes that arrived at the process's TCP sockets.
    """

    bucket_bytes: int
    all_reduces: int
    broadcasts: int
    received: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables, or write the report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    if args.worker:
        _work(*args.worker)
        return
    formulas = [formula(model, head) for model in args.models for head in MODELS[model]]
    measured = [measure(each.model, each.head) for each in formulas]
    report = format_report(formulas, measured, arguments)
    if args.report:
        args.report.write_text(report)
    else:
        print(report)


def formula(model: str, head: str) -> Formula:
    """Return what a step of a network must send.

    Args:
        model: Name of a timm model.
        head: Name of the heads, "auto", or "none" for the plain network.
    """
    with torch.device("meta"):
        task, images = _task(model, head), _images(model, 1)
    network: Any = task.trainable_module.eval()
    with torch.no_grad(), MacCounter() as counter:
        network(images) if head == "none" else network(images, return_exits=True)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    return Formula(
        model,
        head,
        parameters=sum(parameter.numel() for parameter in trained),
        gradient_bytes=sum(4 * parameter.numel() for parameter in trained),
        buffer_bytes=sum(buffer.nbytes for buffer in task.buffers()),
        macs=counter.macs,
    )


def measure(model: str, head: str) -> tuple[Measured, Measured]:
    """Train a few steps in two CPU processes and return what each of them counted in the last."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    run = subprocess.run(
        [sys.executable, *command, "--worker", model, head],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = sorted((json.loads(line) for line in run.stdout.splitlines()), key=lambda row: int(row["rank"]))
    first, second = (Measured(**row["measured"]) for row in rows)
    return first, second


def format_report(
    formulas: Sequence[Formula], measured: Sequence[tuple[Measured, Measured]], arguments: Sequence[str]
) -> str:
    """Return the text of the report.

    Args:
        formulas: The networks, the plain one before those with heads.
        measured: What was measured of each.
        arguments: Those of the command.
    """
    command = shlex.join(["python", "benchmarks/all_reduce.py", *arguments])
    versions = {
        "timm_selfdistill": sd.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "Python": platform.python_version(),
    }
    return _PAGE.format(
        command=command,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        classes=f"{NUM_CLASSES:,}",
        batch=BATCH_SIZE,
        paper="\n".join(paper_table(formulas)),
        measured="\n".join(measured_table(formulas, measured)),
    )


def paper_table(formulas: Sequence[Formula]) -> list[str]:
    """Return the lines of the table of what a step sends by the formula."""
    traffic = [f"each of {gpus} GPUs sends and receives, MB" for gpus in GPUS]
    header = ("model", "heads", "trained parameters, M", "all-reduced, MB", *traffic, "heads' share of the bytes")
    rows = [(*header, "broadcast, MB", "forward GMACs per image", "heads' share of the GMACs")]
    plain = {each.model: each for each in formulas if each.head == "none"}
    for each in formulas:
        base = plain[each.model]
        rows.append(
            (
                each.model,
                each.head,
                f"{each.parameters / 1e6:.2f}",
                _megabytes(each.gradient_bytes),
                *(_megabytes(each.received(gpus)) for gpus in GPUS),
                f"{1 - base.gradient_bytes / each.gradient_bytes:.1%}",
                _megabytes(each.buffer_bytes),
                f"{each.macs / 1e9:.2f}",
                f"{1 - base.macs / each.macs:.1%}",
            )
        )
    return _table(rows, text_columns=2)


def measured_table(formulas: Sequence[Formula], measured: Sequence[tuple[Measured, Measured]]) -> list[str]:
    """Return the lines of the table of what two processes counted."""
    header = ("model", "heads", "all-reduced by the formula, bytes", "counted, bytes", "all-reduces", "broadcasts")
    rows = [(*header, "first process received, over the formula", "second process received, over the formula")]
    for each, (first, second) in zip(formulas, measured, strict=True):
        rows.append(
            (
                each.model,
                each.head,
                f"{each.gradient_bytes:,}",
                f"{first.bucket_bytes:,}",
                str(first.all_reduces),
                str(first.broadcasts),
                f"{first.received / each.received(2):.5f}",
                f"{second.received / (each.received(2) + each.buffer_bytes):.5f}",
            )
        )
    return _table(rows, text_columns=2)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count the bytes that processes exchange in a training step.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="the networks")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report here, such as docs/scaling.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # how this program starts itself
    return parser.parse_args(arguments)


def _task(model: str, head: str) -> ClassificationTask:
    backbone = timm.create_model(model, num_classes=NUM_CLASSES)
    if head == "none":
        return ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False)
    # With hints, so that every parameter of the heads trains.
    loss = sd.SelfDistillationLoss("byot-iccv2019")
    return sd.SelfDistillationTask(sd.wrap(backbone, head=head), loss, verbose=False)


def _images(model: str, count: int) -> Tensor:
    size = timm.data.resolve_model_data_config(timm.create_model(model, num_classes=0))["input_size"]
    return torch.zeros(count, *size)


def _work(model: str, head: str) -> None:
    """Train a few steps as one of two processes, count the last one, and print what was counted."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    task = _task(model, head)
    images, targets = _images(model, BATCH_SIZE), torch.zeros(BATCH_SIZE, dtype=torch.int64)
    prepared, optimizer = accelerator.prepare(task, torch.optim.SGD(task.parameters(), lr=1e-3))
    buckets: list[int] = []

    def count(group: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    prepared.register_comm_hook(None, count)

    def step() -> None:
        accelerator.backward(prepared(images, targets)["loss"])
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_UNCOUNTED_STEPS):
        step()
    buckets.clear()
    accelerator.wait_for_everyone()
    before = _received()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    after = _received()
    accelerator.wait_for_everyone()
    calls = {event.key: event.count for event in profiler.key_averages()}
    measured = Measured(
        bucket_bytes=sum(buckets),
        all_reduces=calls.get("c10d::allreduce_", 0),
        broadcasts=calls.get("c10d::broadcast_", 0),
        received=after - before,
    )
    # In one piece: both processes write to the same pipe.
    os.write(1, f"{json.dumps({'rank': accelerator.process_index, 'measured': asdict(measured)})}\n".encode())
    accelerator.end_training()


def _received() -> int:
    """Return how many bytes have arrived at this process's TCP sockets so far, as Linux counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", name)
        if not (path.is_symlink() and os.readlink(path).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]
    return total


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def _table(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(rows[0]) - text_columns)
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


_PAGE = """\
# What the exits cost between processes

Written by `{command}` ({versions}).

Under DDP, each process holds the whole network and computes the gradients of its share of the batch; before an
optimizer step they are averaged over all processes by all-reduce. The exits add their heads' gradients to it, and
nothing else: the loss is computed on each process's own images, clipping needs no further exchange, and with
`optimizer.accumulate` the exchange happens once a step.

## The formula

- **All-reduced** in a step: 4 bytes for each trained parameter. Gradients are float32 with `precision: bf16` too. The
  number of images does not matter. In the regime `frozen`, only the heads are trained.
- **Sent and received by each of N GPUs**: 2 (N - 1) / N times as much, in a ring, which moves the least. NCCL chooses a
  ring, trees or others by itself.
- **Broadcast** by the first process before each forward: the buffers of batch norm (`broadcast_buffers`, see
  [train.md](train.md#batch-norm)); `sync_batchnorm` adds exchanges in every batch norm, which are not counted here.

For {classes} classes, images of 224 px, three exits and the default loss; `auto` are the default heads, `published` the
bottlenecks or token heads, `none` is the plain network. MB are 10^6 bytes, GMACs 10^9 multiply-accumulates.

{paper}

A backward costs about twice its forward, with and without heads, so that the heads' share of the multiply-accumulates
is that of the step. If the time of a step is that of computing and sending, overlapped or not, the heads' share of it
lies between the two columns of shares: near that of the GMACs if the network is fast, near that of the bytes if it is
slow. That is an estimate: it leaves out what multiply-accumulates do not count ([performance.md](performance.md) has
measured steps of one process), and no machine with several GPUs was available to measure.

So a ViT pays little for its exits on any number of GPUs. The published heads of a ResNet-50 have more parameters than
the backbone, the default ones a quarter; if the network between machines is slow, a smaller `exits.head_budget` sends
less.

## Measured

Two processes on the CPU (gloo, over TCP) trained three steps of {batch} images each with the loop's task and
Accelerate's DDP; the last one was counted. *Counted* are the bytes of the gradients that DDP handed over, by a
communication hook; the calls come from torch's profiler; what a process *received* was counted by the operating
system at its TCP sockets, over what the formula says: the second process also receives the buffers.

{measured}

The few bytes above 1 are the protocol's own. DDP sends gradients in buckets of 25 MiB, the first of 1 MiB, as soon as
they are ready; hence the number of calls.
"""


if __name__ == "__main__":
    main()
