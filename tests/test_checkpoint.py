import copy
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from timm_selfdistill.train import checkpoint, checkpoint_format
from timm_selfdistill.train.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

FILES = ("tensors.safetensors", "state.json", "manifest.json")


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, structure, dtype, strides and every bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    elif isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found.hex() == expected.hex()
    else:
        assert found == expected


DTYPES = sorted(checkpoint_format._DTYPES, key=str)
CHANNELS_LAST = torch.arange(48.0).reshape(2, 3, 4, 2).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "value",
    [
        *[torch.tensor([[0, 1], [1, 0]]).to(dtype) for dtype in DTYPES],
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([math.nan, -math.inf, -0.0]),
        CHANNELS_LAST,
        CHANNELS_LAST[:, :, :1, :1].clone(),
        torch.arange(6).reshape(2, 3).t(),
        np.arange(6, dtype=np.uint32).reshape(2, 3),
        np.array(3.5),
        np.float64(0.1),
        np.int64(-3),
        np.bool_(True),
        {0: "int", "0": "str", True: [], None: None, 1.5: ()},
        [1, 2**200, -1, True, False, None, "text \u2713 \ud800", ""],
        [0.1, 1e-320, 1.7976931348623157e308, -0.0, math.nan, math.inf, -math.inf],
        (1, (2, [3, (4,)]), {"a": ({},)}),
        random.getstate(),
        np.random.get_state(),
        np.random.default_rng(0).bit_generator.state,
        torch.get_rng_state(),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_every_kind_of_value_comes_back_exactly(tmp_path: Path, value: Any) -> None:
    state = {"value": value, "beside": torch.ones(2)}
    path = save_checkpoint(tmp_path, state, step=3)
    assert path == tmp_path / "checkpoint-3"
    assert_same(load_checkpoint(path), state)


def test_views_and_shared_tensors_come_back_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    state = {
        "base": base,
        "again": base,
        "column": base[:, 1],
        "expanded": base[0].expand(2, 4),
        "parameter": parameter,
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, state, step=0))
    for name, value in state.items():
        assert torch.equal(loaded[name], value)
    loaded["base"].zero_()
    loaded["expanded"][0].zero_()
    assert torch.equal(loaded["again"], base)
    assert torch.equal(loaded["expanded"][1], base[0])
    assert type(loaded["parameter"]) is torch.Tensor
    assert parameter.requires_grad


def test_loaded_values_outlive_their_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"tensor": torch.arange(100_000), "array": np.zeros(3)}, step=0)
    loaded = load_checkpoint(path)
    for name in FILES:
        with (path / name).open("r+b") as file:
            file.write(b"\xff" * (path / name).stat().st_size)
    assert torch.equal(loaded["tensor"], torch.arange(100_000))
    loaded["tensor"] += 1
    loaded["array"] += 1


def test_mappings_come_back_as_dicts(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, OrderedDict(b=1, a=OrderedDict()), step=0))
    assert_same(loaded, {"b": 1, "a": {}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (namedtuple("Point", "x")(1), r"state\['a'\]\[0\] is of type test_checkpoint.Point"),
        (lambda: None, r"state\['a'\]\[0\] is of type builtins.function"),
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (torch.float32, "torch.dtype"),
        ({"x": {(1, 2): 3}}, r"state\['a'\]\[0\]\['x'\] has a key of type builtins.tuple"),
        (torch.eye(2).to_sparse(), r"state\['a'\]\[0\] is a torch.sparse_coo tensor"),
        (torch.empty(2, device="meta"), "on meta"),
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
        (np.array(["text"]), "numpy array that a checkpoint cannot hold"),
        (np.array([1], dtype=">i4"), "numpy array that a checkpoint cannot hold"),
        (np.zeros(1, dtype=complex), "complex128"),
    ],
)
def test_other_types_are_an_error_that_says_where(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, {"a": [value]}, step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        save_checkpoint(tmp_path, state, step=0)


@pytest.mark.parametrize("numbers", [{"step": -1}, {"step": 0, "keep": 0}])
def test_step_and_keep_are_checked(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="got step="):
        save_checkpoint(tmp_path, {}, **numbers)


class Training:
    """A small but complete run: convolutions in channels_last, batch norm, dropout, three random generators."""

    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = timm.create_model("resnet18", channels=(4, 4, 8, 8), num_classes=3, drop_rate=0.3)
        self.model = model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = CosineLRScheduler(self.optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-3)
        self.ema = ModelEmaV3(self.model, decay=0.9)
        self.epoch = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            scale = random.random() + np.random.random()
            loss = self.model(scale * torch.randn(4, 3, 32, 32)).logsumexp(-1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.ema.update(self.model)
            self.epoch += 1
            self.scheduler.step(self.epoch)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
            "random": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
            "epoch": self.epoch,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.load_state_dict(state["ema"])
        random.setstate(state["random"]["python"])
        np.random.set_state(state["random"]["numpy"])
        torch.set_rng_state(state["random"]["torch"])
        self.epoch = state["epoch"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_resumed_training_is_bitwise_the_same(tmp_path: Path, make_optimizer: Callable[..., Any]) -> None:
    training = Training(make_optimizer)
    training.train(3)
    path = save_checkpoint(tmp_path, training.state(), step=3)
    training.train(3)
    expected = copy.deepcopy(training.state())

    resumed = Training(make_optimizer)
    resumed.load(load_checkpoint(path))
    resumed.train(3)
    found = resumed.state()
    assert_same(as_dicts(found), as_dicts(expected))


def as_dicts(value: Any) -> Any:
    return {key: as_dicts(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_saving_does_not_change_or_hold_the_state(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": [torch.zeros(1).t()]}
    before = copy.deepcopy(state)
    save_checkpoint(tmp_path, state, step=0)
    assert_same(state, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, {"step": step}, step=step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    save_checkpoint(tmp_path, {"step": 11}, step=11, keep=1)
    assert names(tmp_path) == ["checkpoint-11"]


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-1").write_text("a file")
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, {}, step=step, keep=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-best", "notes"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    for value in "ab":
        save_checkpoint(tmp_path, {"value": value}, step=5)
    assert names(tmp_path) == ["checkpoint-5"]
    assert load_checkpoint(tmp_path / "checkpoint-5") == {"value": "b"}


def test_whole_checkpoints_of_later_steps_are_refused_and_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 9}, step=9)
    with pytest.raises(CheckpointError, match=r"Cannot save step 8: .*checkpoint-9 is later and whole"):
        save_checkpoint(tmp_path, {"step": 8}, step=8)
    assert names(tmp_path) == ["checkpoint-9"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".checkpoint-3", ".checkpoint-1.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {}, step=3)
    assert names(tmp_path) == ["checkpoint-3"]


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none")


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"0")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [remove, truncate, empty, lengthen, flip_a_bit])
def test_damage_is_found_and_the_checkpoint_before_it_taken(
    tmp_path: Path, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    older = save_checkpoint(tmp_path, {"tensor": torch.zeros(1000)}, step=1)
    newer = save_checkpoint(tmp_path, {"tensor": torch.ones(1000)}, step=2)
    damage(newer / file)
    with pytest.raises(DamagedCheckpointError, match="checkpoint-2"):
        load_checkpoint(newer)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == older
    assert "checkpoint-2" in caplog.text
    assert "Falling back" in caplog.text
    save_checkpoint(tmp_path, {"tensor": torch.ones(1000)}, step=2)
    assert latest_checkpoint(tmp_path) == newer
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_any_flipped_byte_is_an_error_and_never_another_state(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"tensor": torch.ones(2), "lr": 0.1}, step=1)
    for file in FILES:
        content = (path / file).read_bytes()
        for position in range(len(content)):
            for mask in (1, 0x80):
                changed = bytearray(content)
                changed[position] ^= mask
                (path / file).write_bytes(changed)
                with pytest.raises(CheckpointError, match="checkpoint-1"):
                    load_checkpoint(path)
        (path / file).write_bytes(content)
    load_checkpoint(path)


def test_a_damaged_checkpoint_of_a_later_step_gives_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, {}, step=1)
    truncate(save_checkpoint(tmp_path, {}, step=9) / "state.json")
    with caplog.at_level(logging.WARNING):
        save_checkpoint(tmp_path, {}, step=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert "checkpoint-9" in caplog.text


def test_another_version_is_neither_read_nor_skipped_nor_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {}, step=1)
    path = save_checkpoint(tmp_path, {}, step=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    for use in (
        lambda: load_checkpoint(path),
        lambda: latest_checkpoint(tmp_path),
        lambda: save_checkpoint(tmp_path, {}, 1),
    ):
        with pytest.raises(CheckpointError, match="format version 2; this release of timm_selfdistill reads version 1"):
            use()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    "tree",
    [
        "[]",
        '{"unknown": 1}',
        '{"dict": [["a", {"tensor": ["7", null]}]]}',
        '{"dict": [["a", {"tensor": ["0", [0, 0]]}]]}',
        '{"dict": [["a", {"tensor": ["0", [99999999999999]]}]]}',
        '{"dict": [[{"dict": []}, 1]]}',
        '{"dict": 5}',
        '{"dict": [], "tuple": []}',
        '{"dict": [["a", {"float": "__import__"}]]}',
        "[" * 100_000,
        '{"tuple": [' * 900 + "]}" * 900,
    ],
)
def test_forged_content_with_right_hashes_is_a_clear_error(tmp_path: Path, tree: str) -> None:
    path = save_checkpoint(tmp_path, {"a": torch.ones(2)}, step=1)
    (path / "state.json").write_text(tree)
    (path / "manifest.json").write_text(json.dumps(checkpoint_format.build_manifest(path)))
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_older_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save_checkpoint(tmp_path, {"step": 1}, step=1, keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, {"step": 2}, step=2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert load_checkpoint(older) == {"step": 1}


def test_a_disk_that_returns_other_bytes_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save_checkpoint(tmp_path, {"tensor": torch.zeros(9)}, step=1, keep=1)
    save_file = checkpoint_format.save_file

    def faulty(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        flip_a_bit(path)

    monkeypatch.setattr(checkpoint_format, "save_file", faulty)
    with pytest.raises(OSError, match="does not read back"):
        save_checkpoint(tmp_path, {"tensor": torch.zeros(9)}, step=2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert latest_checkpoint(tmp_path) == older


def test_everything_is_flushed_before_the_rename_and_removed_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, {}, step=1, keep=1)
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"{self} -> {to}"), rename(self, to))[1])
    save_checkpoint(tmp_path, {}, step=2, keep=1)
    hidden = tmp_path / ".checkpoint-2"
    assert sorted(events[:4]) == sorted([str(hidden), *(str(hidden / file) for file in FILES)])
    assert events[4:] == [
        f"{hidden} -> {tmp_path / 'checkpoint-2'}",
        str(tmp_path),
        f"{tmp_path / 'checkpoint-1'} -> {tmp_path / '.checkpoint-1.removed'}",
    ]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"a": torch.ones(1)}, step=1)
    (tmp_path / "usual").touch()
    assert {(path / file).stat().st_mode for file in FILES} == {(tmp_path / "usual").stat().st_mode}


def test_nothing_is_pickled() -> None:
    source = "".join(Path(module.__file__).read_text() for module in (checkpoint, checkpoint_format))
    assert "pickle" not in source.replace("nothing in them is unpickled", "")
    assert "torch.load" not in source
    assert "torch.save" not in source


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree", "os.chmod"}


def content(step: int) -> dict[str, Any]:
    return {"step": step, "tensor": torch.full((20_000,), float(step)), "tuple": (step,) * 100}


def save_and_die(folder: Path, step: int, at_operation: int) -> None:
    """Save, killed at the n-th file-system operation."""
    left = at_operation

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_OPERATIONS and str(folder) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_checkpoint(folder, content(step), step=step, keep=1)


def save_for_ever(folder: Path, step: int) -> None:
    while True:
        step += 1
        save_checkpoint(folder, content(step), step=step, keep=1)


def start(function: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    # What this file imports, so that each process starts with it.
    context.set_forkserver_preload(["pytest", "timm", "timm_selfdistill.train.checkpoint"])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def assert_all_whole(folder: Path) -> int:
    latest = latest_checkpoint(folder)
    assert latest is not None
    for path in folder.glob("checkpoint-*"):
        step = load_checkpoint(path)["step"]
        assert_same(load_checkpoint(path), content(step))
    return int(load_checkpoint(latest)["step"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step again"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    found = []
    for operation in range(1, 200):
        folder = tmp_path / str(operation)
        save_checkpoint(folder, content(1), step=1)
        process = start(save_and_die, folder, step, operation)
        process.join()
        found.append(assert_all_whole(folder))
        save_checkpoint(folder, content(3), step=3, keep=1)
        assert names(folder) == ["checkpoint-3"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert len(found) > 10
    assert found[0] == 1
    assert found[-1] == step
    assert found == sorted(found)


@pytest.mark.multiprocess
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    step = 1
    save_checkpoint(tmp_path, content(step), step=step)
    for _ in range(5):
        process = start(save_for_ever, tmp_path, step)
        while process.is_alive() and f"checkpoint-{step}" in names(tmp_path):
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        latest = assert_all_whole(tmp_path)
        assert latest > step
        step = latest
