"""Two processes on the CPU train and measure what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from timm_selfdistill.recipe import load_recipe
from timm_selfdistill.train import evaluate_folder, train

pytestmark = pytest.mark.multiprocess

# No batch norm, which would see half a batch in each process, and no random augmentation, drawn in another order there.
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


def launch(num_processes: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Start CPU processes as docs/train.md says."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", "--main_process_port", str(_free_port())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["-m", "timm_selfdistill.train", *RECIPE, *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model" / name for name in ("model.safetensors", "exits.safetensors")]
    return {f"{file.name}:{k}": v for file in files for k, v in safetensors.torch.load_file(file).items()}


def test_two_processes_train_the_same_network_as_one(tmp_path):
    AcceleratorState._reset_state(True)
    train(load_recipe(RECIPE[0], [*RECIPE[1:], f"output_dir={tmp_path / '1'}"]))
    run = launch(2, f"output_dir={tmp_path / '2'}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Written to") == 1
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert [name for name in one if not torch.allclose(one[name], two[name], atol=1e-5)] == []
    assert any(not torch.equal(one[name], two[name]) for name in one), "the second run was no run of two processes"

    reports = [json.loads((tmp_path / str(n) / "report.json").read_text()) for n in (1, 2)]
    assert [report["num_samples"] for report in reports] == [39, 39]
    for a, b in zip(reports[0]["exits"], reports[1]["exits"], strict=True):
        assert a["top1"] == b["top1"]
        assert a["ece"] == pytest.approx(b["ece"], abs=1e-4)
    logs = [(tmp_path / str(n) / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    assert len(logs[0]) == len(logs[1]), "more than one process wrote metrics"


def test_both_processes_evaluate_with_the_batch_statistics_that_are_saved(tmp_path):
    run = launch(
        2, "model.name=resnet18", "model.kwargs={channels: [16, 32, 64, 128], in_chans: 1}", f"output_dir={tmp_path}"
    )
    assert run.returncode == 0, run.stderr
    trained = json.loads((tmp_path / "report.json").read_text())
    AcceleratorState._reset_state(True)
    saved = evaluate_folder(tmp_path)
    for a, b in zip(trained["exits"], saved["exits"], strict=True):
        assert a["top1"] == b["top1"]
        assert a["ece"] == pytest.approx(b["ece"], abs=1e-4)


def test_broken_images_are_left_out_and_listed_once(tmp_path):
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
        "data.workers=2",
        "data.validation=0",
        "batch_size=10",
    ]
    data += ["data.max_train=null", "data.max_eval=null"]
    AcceleratorState._reset_state(True)
    train(load_recipe(RECIPE[0], [*RECIPE[1:], *data, f"output_dir={tmp_path / '1'}"]))
    run = launch(2, *data, f"output_dir={tmp_path / '2'}")
    assert run.returncode == 0, run.stderr
    reports = [json.loads((tmp_path / str(n) / "report.json").read_text()) for n in (1, 2)]
    lists = [[json.loads(line) for line in (tmp_path / str(n) / "skipped.jsonl").open()] for n in (1, 2)]
    assert [report["num_samples"] for report in reports] == [12, 12]
    assert [report["num_skipped"]["evaluation"] for report in reports] == [2, 2]
    assert sorted(map(str, lists[0])) == sorted(map(str, lists[1]))
    assert len(lists[0]) == 2 + reports[0]["num_skipped"]["training"]
    assert not list((tmp_path / "2").glob("skipped-*"))


def test_processes_that_did_not_join_are_refused(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "timm_selfdistill.train", *RECIPE, f"output_dir={tmp_path}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert "2 processes were launched, but Accelerate joined 1" in run.stderr
    assert not (tmp_path / "recipe.yaml").exists()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
