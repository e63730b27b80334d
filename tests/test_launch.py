"""What is refused at launch, Accelerate's shipped configuration files, and synchronised batch norm."""

import errno
import fcntl
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import timm_selfdistill as sd
from timm_selfdistill.output import locked
from timm_selfdistill.recipe import list_recipes, load_recipe
from timm_selfdistill.train import tracking, train, trainer
from timm_selfdistill.train.builders import synchronize_batch_norm
from timm_selfdistill.train.launch import Feed, asks_for_sharding
from timm_selfdistill.train.refusals import refuse_optimizer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))

TINY = ["epochs=1", "batch_size=16", "data.max_train=16", "data.max_eval=16", "data.image_size=16"]
TINY += ["data.validation=0", "precision='no'", "baseline=false"]


@pytest.fixture
def refused(tmp_path, monkeypatch) -> Callable[..., None]:
    """A function that starts a run and asserts that it is refused with a message, before anything is written."""
    monkeypatch.setattr(trainer.Trainer, "_train_epoch", lambda *args: pytest.fail("training began"))

    def refused(message: str, *overrides: str) -> None:
        with pytest.raises(ValueError, match=message):
            train(load_recipe("digits", [f"output_dir={tmp_path / 'run'}", *overrides]))
        assert not (tmp_path / "run").exists()

    return refused


def test_a_tracker_that_is_not_installed_is_refused(refused, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    refused(
        "trackers: wandb cannot be used: unknown, or the package is not installed. Installed are tensorboard; ",
        "trackers=[wandb,tensorboard]",
    )


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FSDP_VERSION", "1", "2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "true or full_shard"),
        ("FSDP_OFFLOAD_PARAMS", "true", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "false"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "no_wrap"),
        ("FSDP_IGNORED_MODULES", "head", "nothing: leave it out"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "false"),
    ],
)
def test_fsdp_in_a_way_that_is_not_done_is_refused(refused, monkeypatch, name, value, allowed):
    for variable, text in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(variable, text)
    refused(f"Accelerate was told to use FSDP with {name}={value}; allowed is {allowed}, as in recipes/accelerate/")


def test_fsdp_without_a_version_is_the_first_which_is_refused(refused, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("Accelerate was told to use FSDP with FSDP_VERSION=1; allowed is 2")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_other_parts_of_a_network_are_refused(refused, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    refused(f"Accelerate was told to use {kind}, which leaves each process with a part of the network; allowed are")


def test_the_launcher_asks_for_what_is_in_the_file():
    path = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "timm_selfdistill.train"])
    )
    with patch_environment(**prepare_multi_gpu_env(args)):
        assert asks_for_sharding()
    assert not asks_for_sharding()


def test_an_optimizer_that_does_not_know_parts_is_refused():
    refuse_optimizer("AdamW")
    with pytest.raises(
        ValueError, match=r"optimizer\.name: muon is not known to work .* allowed there are .*, adamw, "
    ):
        refuse_optimizer("muon")


def test_one_process_has_nothing_to_share(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    train(load_recipe("digits", [*TINY, f"output_dir={tmp_path}"]))
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_a_folder_that_another_process_writes_to_is_refused(forks, tmp_path, monkeypatch):
    # Its child, such as a loader process, may outlive it.
    holder = "import os, sys, time; from pathlib import Path; from timm_selfdistill.output import locked\n"
    holder += "with locked(Path(sys.argv[1])):\n"
    holder += "    child = os.fork() or time.sleep(600)\n"
    holder += "    print(child, flush=True); time.sleep(600)"
    monkeypatch.setattr(trainer.Trainer, "_train_epoch", lambda *args: pytest.fail("training began"))
    process = forks.start(holder, [str(tmp_path)])
    while not process.stdout.read_text().endswith("\n"):
        assert process.poll() is None, process.wait()
        time.sleep(0.01)
    child = int(process.stdout.read_text())
    with pytest.raises(ValueError, match=f"another run is under way in .* .process {process.pid} on "):
        train(load_recipe("digits", [f"output_dir={tmp_path}"]))
    process.send_signal(signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    assert not (tmp_path / "recipe.yaml").exists()
    with locked(tmp_path):
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        pass
    assert "nothing prevents a second run into it" in caplog.text


def test_one_process_synchronizes_nothing(tmp_path):
    train(load_recipe("digits", [*TINY, "sync_batchnorm=true", f"output_dir={tmp_path}"]))
    assert (tmp_path / "model" / "model.safetensors").is_file()


SAMPLES = TensorDataset(torch.arange(8))


def make_feed(train: Any, validation: Any) -> Feed:
    return Feed(train, validation, 1, None, split=None, order=None, batch_size=1, process=0, processes=1)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: DistributedSampler(SAMPLES, num_replicas=2, rank=0),
        lambda: timm.data.distributed_sampler.OrderedDistributedSampler(SAMPLES, num_replicas=2, rank=0),
        lambda: timm.data.distributed_sampler.RepeatAugSampler(SAMPLES, num_replicas=2, rank=0),
    ],
)
def test_a_loader_that_shards_by_itself_is_refused(make_sampler, prepared):
    loader = DataLoader(SAMPLES, batch_size=2, sampler=make_sampler())
    if prepared:
        loader = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
    with pytest.raises(ValueError, match="gives each process its share, of which Accelerate would give it a share"):
        make_feed(loader, None)
    with pytest.raises(ValueError, match="Sampler gives each process its share"):
        make_feed(DataLoader(SAMPLES), loader)


def test_a_loader_that_accelerate_does_not_shard_is_refused():
    loader = timm.data.loader.PrefetchLoader(DataLoader(SAMPLES), device=torch.device("cpu"))
    # What the message says: Accelerate gives back the same object.
    assert Accelerator(cpu=True).prepare(loader) is loader
    with pytest.raises(ValueError, match=r"shards a torch\.utils\.data\.DataLoader only, received PrefetchLoader"):
        make_feed(loader, None)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_of_all_samples_is_accepted(shuffle):
    loader = DataLoader(SAMPLES, batch_size=2, shuffle=shuffle)
    for process in range(2):
        prepared = prepare_data_loader(
            loader, num_processes=2, process_index=process, put_on_device=False, use_seedable_sampler=True
        )
        make_feed(prepared, loader)


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("4x8-gpu", "MULTI_GPU", 4, 32),
        ("8-gpu", "MULTI_GPU", 1, 8),
        ("cpu", "MULTI_GPU", 1, 2),
        ("fsdp2", "FSDP", 1, 8),
        ("one-gpu", "NO", 1, 1),
    ],
)
def test_the_configuration_files_are_accelerates(name, kind, machines, processes):
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.use_cpu == (name == "cpu")
    # These belong to the recipe.
    assert (config.mixed_precision, config.dynamo_config) == ("no", {})
    assert path in CONFIGS
    assert len(CONFIGS) == 5


def test_the_configuration_files_are_no_recipes():
    assert not {path.stem for path in CONFIGS} & set(list_recipes())


LAUNCHES = [
    pytest.param(command, id=f"{path.name}:{index}")
    for path in [*CONFIGS, ROOT / "docs" / "train.md", ROOT / "docs" / "getting-started.md", ROOT / "README.md"]
    for index, command in enumerate(
        re.findall(r"accelerate launch (?:\\\n|[^\n`])*?timm_selfdistill\.train", path.read_text())
    )
]


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_commands_have_options_that_accelerate_knows(command):
    text = re.sub(r"\\\n[# ]*", "", command)
    # Shell variables and the names that stand for a number in a comment.
    text = re.sub(r'"?\$\{?\w+\}?"?|\bRANK\b', "1", text)
    parsed = launch_command_parser().parse_args(shlex.split(text)[2:])
    assert (parsed.module, parsed.training_script) == (True, "timm_selfdistill.train")
    if parsed.config_file is not None:
        assert ROOT / parsed.config_file in CONFIGS
        assert parsed.num_machines is None


def test_the_slurm_script_starts_one_launcher_on_each_machine():
    (script,) = re.findall(
        r"```sh\n(#!/bin/bash\n#SBATCH.*?)^```", (ROOT / "docs" / "train.md").read_text(), re.M | re.S
    )
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.M))
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "4x8-gpu.yaml"))
    machines, gpus = int(directives["nodes"]), int(directives["gpus-per-node"])
    assert (machines, machines * gpus) == (config.num_machines, config.num_processes)
    assert directives["ntasks-per-node"] == "1"
    assert "recipes/accelerate/4x8-gpu.yaml" in script
    # Each task has a number of its own only where the variable is expanded by the task, inside single quotes.
    task = re.search(r"srun bash -c '([^']*--machine_rank \$SLURM_NODEID[^']*)'", script)
    assert task is not None
    recipe, *overrides = shlex.split(task[1].replace("\\\n", "").split("timm_selfdistill.train")[1])
    load_recipe(recipe, overrides)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_synchronized_batch_norm_keeps_weights_hooks_and_outputs(name, make_backbone, images: Tensor):
    plain, converted = (sd.wrap(make_backbone(name)).train() for _ in range(2))
    converted.load_state_dict(plain.state_dict())
    keys = list(plain.state_dict())
    assert synchronize_batch_norm(converted) is converted
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.heads.modules()) > 0
    for _ in range(2):
        for a, b in zip(plain(images, return_exits=True).logits, converted(images, True).logits, strict=True):
            assert torch.equal(a, b)
    assert list(converted.state_dict()) == keys
    for key, value in plain.state_dict().items():
        assert torch.equal(value, converted.state_dict()[key]), key


def test_an_exit_on_a_batch_norm_keeps_its_hook(make_backbone, images: Tensor, tmp_path):
    # bn1 of an EfficientNet is timm's batch norm with an activation, which the conversion replaces as a whole.
    model = sd.wrap(make_backbone("test_efficientnet"), exits=["bn1", "blocks.2"])
    before = model.backbone.bn1
    entered: list[Tensor] = []
    before.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    expected = model.eval()(images, return_exits=True)
    synchronize_batch_norm(model)
    assert model.backbone.bn1 is not before
    assert list(model.backbone.bn1._forward_hooks.values()) == list(before._forward_hooks.values()) != []
    for a, b in zip(expected.logits, model(images, return_exits=True).logits, strict=True):
        assert torch.equal(a, b)
    assert len(entered) == 2
    sd.save_pretrained(model, tmp_path)
    saved = sd.from_pretrained(tmp_path)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in saved.modules())
    for a, b in zip(expected.logits, saved(images, return_exits=True).logits, strict=True):
        assert torch.equal(a, b)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(images), expected.logits[-1])
