"""Two processes that each hold a part of the network (FSDP2) train what two with the whole network do."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forks import ForkServer
from once import once
from sharded_runs import run
from test_multiprocess import CONFIGS, accelerate, launch
from test_resume import outcome
from test_timm_families import ENCODERS, MEMBERS
from torch import nn

import timm_selfdistill as sd
from timm_selfdistill.losses import CSKD, PSKD
from timm_selfdistill.train.checkpoint import load_checkpoint
from timm_selfdistill.train.parallelism import find_units
from timm_selfdistill.train.refusals import OPTIMIZERS, refuse_loss

ON_TWO_CPUS = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

# A network that does the same in any number of processes: no batch norm and no random draws.
SAME = [
    "model.name=test_vit",
    "model.kwargs={in_chans: 1, img_size: 16, depth: 4}",
    "augment.scale=[1.0,1.0]",
    "augment.ratio=[1.0,1.0]",
    "optimizer.name=adamw",
    "optimizer.lr=1e-3",
    "ema={decay: 0.5}",
]
OPTIONS = {
    "joint": [
        "ema={decay: 0.5}",
        "augment.mixup_alpha=0.2",
        "optimizer.accumulate=2",
        "optimizer.on_nonfinite=skip",
        "schedule.select=best",
        "baseline=true",
    ],
    "mixed": [
        *SAME,
        "schedule.regime=mixed",
        "schedule.backbone_epochs=1",
        "optimizer.clip_mode=agc",
        "optimizer.layer_decay=0.75",
        "optimizer.heads_lr_scale=3",
        "exits.hint_adapter=true",
        "loss.preset=byot-tpami2021",
        "loss.gate=[0,0.5,1]",
        "loss.gate_fade=0.5",
    ],
    "frozen": ["schedule.regime=frozen", "optimizer.name=lamb"],
    # Adam would make large steps of what is rounded in 16 bits where a gradient is zero, as that of a key's bias.
    "bf16": [*SAME, "precision=bf16", "optimizer.name=sgd", "optimizer.clip_mode=value", "optimizer.clip_grad=0.01"],
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, forks):
    """The folder of all runs of two processes, which do one after the other; only to be read."""
    return once(tmp_path_factory, "sharded", partial(do_runs, forks))


def do_runs(forks: ForkServer, folder: Path) -> None:
    folder.mkdir()
    entries = []
    for name, overrides in OPTIONS.items():
        # One step of the first is not finite.
        entry = {"overrides": overrides, "poison": [2] if name == "joint" else []}
        entries += [{"folder": f"{name} whole", "fsdp": False, **entry}, {"folder": f"{name} parts", **entry}]
    entry = {"overrides": [*OPTIONS["joint"], "optimizer.name=adamw", "optimizer.lr=1e-3"], "poison": [2]}
    cut = {"folder": "cut", **entry}
    entries += [{"folder": "uncut", **entry}, {**cut, "stop_at": 3}, {**cut, "stop_at": 6}, cut]

    def started(name: str, fsdp: bool) -> dict[str, Any]:
        return {"folder": name, "overrides": SAME, "fsdp": fsdp, "stop_at": 3}

    alone = [{"folder": str(folder / name), "overrides": SAME, "fsdp": False} for name in ("undisturbed", "to-parts")]
    run(**alone[0])
    run(**alone[1], stop_at=3)
    entries += [
        started("to-whole", True),
        {**started("to-whole", False), "stop_at": None},
        started("from-whole", False),
        {**started("from-whole", True), "stop_at": None},
        {**started("to-parts", True), "stop_at": None},
        started("to-one", True),
        {"folder": "pushing", "overrides": [*SAME, "push_to_hub={repo: me/net, every: 1}"]},
    ]
    (folder / "errors.txt").write_text(run_two(forks, folder, *entries))
    run(str(folder / "to-one"), SAME, fsdp=False)


@pytest.mark.multiprocess
@pytest.mark.parametrize("options", OPTIONS)
def test_the_numbers_are_those_of_whole_networks(runs, options):
    whole, parts = runs / f"{options} whole", runs / f"{options} parts"
    assert_same(whole, parts)
    held = {path.name: json.loads(path.read_text()) for path in parts.glob("held-*")}
    assert len(held) == 2 * (1 + ("baseline=true" in OPTIONS[options]))
    for name, parts_of in held.items():
        in_whole = json.loads((whole / name).read_text())
        for key, (here, all_of_it) in parts_of.items():
            # Buffers and what cannot be halved are in both.
            assert here <= 0.6 * all_of_it, (name, key)
            assert in_whole[key] == [all_of_it, all_of_it]


@pytest.mark.multiprocess
def test_a_stopped_run_ends_with_the_same_bits(runs):
    assert outcome(runs / "cut") == outcome(runs / "uncut")
    for path in runs.glob("cut/held-*"):
        # What was loaded does not keep the whole alive.
        assert json.loads(path.read_text()) == json.loads((runs / "uncut" / path.name).read_text())


@pytest.mark.multiprocess
def test_a_run_goes_on_with_whole_networks_and_the_reverse(runs):
    for name in ("to-whole", "from-whole", "to-parts", "to-one"):
        # The terms that are logged are those of the main process's images.
        assert_same(runs / "undisturbed", runs / name, same_processes=False)
    errors = (runs / "errors.txt").read_text()
    said = "self-distilled was trained by 2 process(es){} and goes on with 2{}, after step 3, with the images"
    assert said.format(" in parts", "") in errors
    assert said.format("", " in parts") in errors


@pytest.mark.multiprocess
def test_what_is_pushed_after_an_epoch_is_whole(runs):
    (state,) = [
        load_checkpoint(path) for path in (runs / "pushing" / "checkpoints" / "self-distilled").glob("checkpoint-4")
    ]
    pushed = sd.from_pretrained(runs / "pushing" / "pushed-1").state_dict()
    assert pushed
    for name, value in pushed.items():
        assert torch.equal(value, state["ema"][f"module.{name}"])


@pytest.mark.multiprocess
def test_the_configuration_file_starts_it(tmp_path):
    options = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"]
    (done,) = launch([accelerate(*options)], f"output_dir={tmp_path}", "epochs=1")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "checkpoints" / "self-distilled").iterdir()
    state = load_checkpoint(path)
    assert (state["in_parts"], len(state["random"])) == (True, 2)
    assert "returned a view" not in done.stderr


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"]),
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    ],
)
def test_units_are_timms_layers_and_the_heads(make_backbone, name, layers):
    model = sd.wrap(make_backbone(name))
    units = find_units(model)
    assert names_of(model, units) == [*(f"backbone.{layer}" for layer in layers), "heads.0", "heads.1", "heads.2"]
    # A weight that two of them use belongs to none.
    first, second = (model.backbone.get_submodule(layer) for layer in layers[-2:])
    where = next(path for path, _ in first.named_parameters() if path in dict(second.named_parameters()))
    owner, _, leaf = where.rpartition(".")
    setattr(second.get_submodule(owner), leaf, first.get_submodule(owner).get_parameter(leaf))
    shared = first.get_parameter(where)
    assert second.get_parameter(where) is shared
    units = find_units(model)
    assert names_of(model, units)[: len(layers) - 2] == [f"backbone.{layer}" for layer in layers[:-2]]
    assert not any(parameter is shared for unit in units for parameter in unit.parameters())


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_allowed_steps_parts_as_it_steps_a_whole(name):
    assert compared("optimizers", name) < 0.01


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ENCODERS])
def test_gradients_of_a_network_of_every_class_are_those_of_a_whole(name):
    assert compared("families", name) < 1e-4


def compared(kind: str, name: str) -> float:
    """Return the difference that two processes found."""
    steps = Path(__file__).parent / "sharded_steps.py"
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", steps, kind, name],
        env={
            **ON_TWO_CPUS,
            "PYTHONPATH": os.pathsep.join([str(benchmarks), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found, _, difference = done.stdout.strip().rpartition(" ")
    assert found == name
    return float(difference)


def test_losses_that_need_another_network_are_refused():
    refuse_loss(sd.SelfDistillationLoss.from_preset("byot-iccv2019", kd_warmup_epochs=2.0))
    for loss in (sd.SelfDistillationLoss.from_preset("byot-iccv2019", teacher="ema"), PSKD(), CSKD()):
        with pytest.raises(ValueError, match="not done where each process has a part of the network"):
            refuse_loss(loss)
    with pytest.raises(ValueError, match="has parameters of its own"):
        refuse_loss(nn.PReLU())


def test_a_network_of_unknown_layers_is_one_unit_beside_the_heads(tiny_net):
    model = sd.wrap(tiny_net(), image_size=32)
    assert names_of(model, find_units(model)) == [f"heads.{index}" for index in range(model.num_exits)]


def names_of(model: nn.Module, units: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units]


def run_two(forks: ForkServer, folder: Path, *entries: dict[str, Any]) -> str:
    """Do runs in two processes, and return what they said."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([{**entry, "folder": str(folder / entry["folder"])} for entry in entries]))
    script = Path(__file__).parent / "sharded_runs.py"
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    ended = [process.wait(1800) for process in forks.start_together(code, [str(plan)])]
    said = "".join(errors for _, _, errors in ended)
    assert [status for status, *_ in ended] == [0, 0], said
    return said


def assert_same(one: Path, other: Path, same_processes: bool = True) -> None:
    """Compare weights and metrics to rounding."""
    expected, found = (
        {
            f"{path.name}:{name}": value
            for path in sorted((folder / "model").glob("*.safetensors"))
            for name, value in safetensors.torch.load_file(path).items()
        }
        for folder in (one, other)
    )
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.allclose(expected[name], found[name], atol=1e-5)] == []
    a, b = (json.loads((folder / "report.json").read_text()) for folder in (one, other))
    for ours, theirs in zip(a["exits"], b["exits"], strict=True):
        assert ours["top1"] == theirs["top1"]
        assert ours["ece"] == pytest.approx(theirs["ece"], abs=1e-4)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"network"}:
            if key.endswith("/images_per_second") or ("/train/" in key and not same_processes):
                continue
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), (ours["step"], key)
