"""Several processes, on one machine or on two, train and measure what one does; launches that would not are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from forks import COMMAND, ForkServer, free_port
from once import once
from PIL import Image

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import evaluate_folder, train

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate"

# No batch norm, which would see half a batch in each process, and no random augmentation, drawn in another order there.
# The last batch of the 39 images to evaluate is full in no process.
RECIPE = [
    "digits",
    "model.name=test_vit",
    "model.kwargs={in_chans: 1, img_size: 16}",
    "augment.scale=[1.0,1.0]",
    "augment.ratio=[1.0,1.0]",
    "data.max_train=100",
    "data.max_eval=39",
    "data.image_size=16",
    "batch_size=20",
    "epochs=2",
    "baseline=false",
    "precision='no'",
    "optimizer.clip_grad=1.0",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the recipe's run in one process."""
    AcceleratorState._reset_state(True)
    return once(
        tmp_path_factory, "alone", lambda folder: train(load_recipe(RECIPE[0], [*RECIPE[1:], f"output_dir={folder}"]))
    )


def test_two_processes_train_the_same_network_as_one(alone, tmp_path):
    (run,) = launch([accelerate("--config_file", str(CONFIGS / "cpu.yaml"))], f"output_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Written to") == 1
    assert_same_run(alone, tmp_path)


@pytest.mark.parametrize("rendezvous", ["static", pytest.param("c10d", marks=pytest.mark.slow)])
def test_two_machines_of_two_processes_train_the_same_network_as_one(alone, tmp_path, rendezvous):
    port = str(free_port())
    if rendezvous == "static":
        # The file for four machines, here two that are the same one.
        options = ["--config_file", str(CONFIGS / "4x8-gpu.yaml"), "--num_machines", "2", "--num_processes", "4"]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        commands = [accelerate(*options, "--machine_rank", rank) for rank in ("0", "1")]
    else:
        options = ["--nnodes", "2", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
        options += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
        commands = [["torch.distributed.run", *options]] * 2
    runs = launch(commands, f"output_dir={tmp_path}")
    assert [run.returncode for run in runs] == [0, 0], "".join(run.stderr for run in runs)
    assert sum(run.stdout.count("Written to") for run in runs) == 1
    assert_same_run(alone, tmp_path)


def test_both_processes_evaluate_with_the_batch_statistics_that_are_saved(forks, tmp_path):
    network = ["model.name=resnet18", "model.kwargs={channels: [16, 32, 64, 128], in_chans: 1}"]
    run_two(forks, *network, f"output_dir={tmp_path}")
    trained = json.loads((tmp_path / "report.json").read_text())
    AcceleratorState._reset_state(True)
    saved = evaluate_folder(tmp_path)
    for a, b in zip(trained["exits"], saved["exits"], strict=True):
        assert a["top1"] == b["top1"]
        assert a["ece"] == pytest.approx(b["ece"], abs=1e-4)


def test_broken_images_are_left_out_and_listed_once(forks, tmp_path):
    for split, count, broken in (("train", 30, 5), ("test", 11, 3)):
        for index in range(count + broken):
            path = tmp_path / "pets" / split / ("cat", "dog")[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 5 * index).save(path)
            if index % 7 == 1:
                path.write_bytes(path.read_bytes()[:40])
    data = [
        f"data.path={tmp_path / 'pets'}",
        "data.on_error=skip",
        "data.check_duplicates=false",
        "data.workers=2",
        "data.validation=0",
        "batch_size=10",
    ]
    data += ["data.max_train=null", "data.max_eval=null"]
    AcceleratorState._reset_state(True)
    train(load_recipe(RECIPE[0], [*RECIPE[1:], *data, f"output_dir={tmp_path / '1'}"]))
    run_two(forks, *data, f"output_dir={tmp_path / '2'}")
    reports = [json.loads((tmp_path / str(n) / "report.json").read_text()) for n in (1, 2)]
    lists = [[json.loads(line) for line in (tmp_path / str(n) / "skipped.jsonl").open()] for n in (1, 2)]
    assert [report["num_samples"] for report in reports] == [12, 12]
    assert [report["num_skipped"]["evaluation"] for report in reports] == [2, 2]
    assert sorted(map(str, lists[0])) == sorted(map(str, lists[1]))
    assert len(lists[0]) == 2 + reports[0]["num_skipped"]["training"]
    assert not list((tmp_path / "2").glob("skipped-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with GPUs, these processes do find each other")
def test_processes_that_each_think_they_are_the_first_are_refused(forks, tmp_path):
    arguments = [*RECIPE, f"output_dir={tmp_path}"]
    for process in forks.start_together(COMMAND, arguments, ACCELERATE_USE_CPU="false"):
        status, _, errors = process.wait()
        assert status == 2
        assert "2 processes were launched, but Accelerate joined 1" in errors
    assert list(tmp_path.iterdir()) == []


def test_synchronized_batch_norm_is_refused_on_the_cpu(forks, tmp_path):
    for process in forks.start_together(COMMAND, [*RECIPE, f"output_dir={tmp_path}", "sync_batchnorm=true"]):
        status, _, errors = process.wait()
        assert status == 2
        assert "sync_batchnorm: torch synchronises batch norm on GPUs only, received 2 processes" in errors
    assert list(tmp_path.iterdir()) == []


TWO_PROCESSES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def accelerate(*options: str) -> list[str]:
    """Return `accelerate launch` with options, for `python -m`."""
    port = () if "--main_process_port" in options else ("--main_process_port", str(free_port()))
    return ["accelerate.commands.launch", *options, *port, "--dynamo_backend", "no"]


def run_two(forks: ForkServer, *overrides: str) -> None:
    """Train in two processes, without a launcher."""
    for process in forks.start_together(COMMAND, [*RECIPE, *overrides]):
        status, _, errors = process.wait()
        assert status == 0, errors


def launch(commands: list[list[str]], *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """Start launchers at the same time, each as if on a machine of its own, and wait for all of them."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command, "-m", "timm_selfdistill.train", *RECIPE, *overrides],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *outputs)
            for process, outputs in [(process, process.communicate(timeout=900)) for process in started]
        ]
    finally:
        for process in started:
            process.kill()


def assert_same_run(alone: Path, together: Path) -> None:
    """Compare weights to rounding, metrics, and how much was logged."""
    one, several = weights(alone), weights(together)
    assert [name for name in one if not torch.allclose(one[name], several[name], atol=1e-5)] == []
    assert any(not torch.equal(one[name], several[name]) for name in one), "the second run was one of one process"
    reports: list[dict[str, Any]] = [json.loads((folder / "report.json").read_text()) for folder in (alone, together)]
    assert [report["num_samples"] for report in reports] == [39, 39]
    for a, b in zip(reports[0]["exits"], reports[1]["exits"], strict=True):
        assert a["top1"] == b["top1"]
        assert a["ece"] == pytest.approx(b["ece"], abs=1e-4)
    fitted = [report["fitted_ensemble"] for report in reports]
    assert fitted[0]["images"] == fitted[1]["images"] == 39
    assert fitted[0]["weights"] == pytest.approx(fitted[1]["weights"], abs=1e-4)
    assert fitted[0]["top1"] == fitted[1]["top1"]
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (alone, together)]
    assert len(logs[0]) == len(logs[1]), "more than one process wrote metrics"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model" / name for name in ("model.safetensors", "exits.safetensors")]
    return {f"{file.name}:{k}": v for file in files for k, v in safetensors.torch.load_file(file).items()}
