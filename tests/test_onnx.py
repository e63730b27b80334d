"""Early exit in exported graphs: stages for ONNX Runtime and torch.export, and one graph that stops by itself."""

import functools
import importlib
import json
import math
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import TinyNet

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli
from timm_selfdistill.export import METADATA, graphs
from timm_selfdistill.export.early_exit_graphs import _is_valid
from timm_selfdistill.onnx import OnnxEarlyExit
from timm_selfdistill.staged import LOGITS, Manifest, run_stages

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 32
# Small networks of each layout: maps, maps with the channels last, tokens.
LAYOUTS = {
    "resnet18": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": SIZE, "window_size": 2, "embed_dim": 24},
        **{"depths": (1, 1), "num_heads": (1, 2)},
    },
    "vit_tiny_patch16_224": {"img_size": SIZE, "embed_dim": 24, "depth": 2, "num_heads": 3},
}
NAMES = ("ape", "bat", "cat", "dog", "eel")


def tiny_model():
    torch.manual_seed(0)
    return sd.wrap(TinyNet(), exits=["stage0", "stage1"], image_size=SIZE, head="linear").eval()


def images(count=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator) * torch.linspace(0.1, 3, count).view(-1, 1, 1, 1)


def thresholds_of(model, x, **settings):
    """Thresholds between two images, at which half of those that reach an exit leave."""
    open_ended = sd.EarlyExit(model, math.inf, **settings)
    with torch.no_grad():
        every = torch.stack(model(x, return_exits=True).logits)
    answers = sd.early_exit.exit_answers(open_ended.config, every, model.ensemble)
    confidences = sd.early_exit.exit_confidence(answers, open_ended.config)
    found, left = [], torch.ones(len(x), dtype=torch.bool)
    for confidence in confidences:
        values = confidence[left].sort().values
        found.append(float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()))
        left &= confidence < found[-1]
    return found


def same(answer, expected):
    """Check choice for choice, and the logits to 1e-4."""
    logits, index = (np.asarray(part) for part in answer)
    assert index.tolist() == expected.exit_index.tolist()
    assert index.dtype == np.int64
    assert logits.dtype == np.float32
    largest = expected.logits.abs().max()
    assert np.abs(logits - expected.logits.numpy()).max() <= 1e-4 * largest


@pytest.fixture(scope="module", autouse=True)
def quick_exports():
    """Let torch.onnx build the table of its operators once: it takes longer than all else for a tiny network."""
    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def network():
    """Early exit with all that settings can ask for."""
    model, x = tiny_model(), images()
    model.ensemble = sd.Ensemble((0.1, 0.3, 0.6), images=9, bias=(0.5, -0.25, 0.0, 1.0, 0.125))
    settings = {"rule": "entropy", "temperatures": [0.5, 2.0], "fallback": "ensemble", "running_ensemble": True}
    with torch.no_grad():
        return sd.EarlyExit(model, thresholds_of(model, x, **settings), **settings)


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    """Its stages; tests do not change them."""
    path = tmp_path_factory.mktemp("exported") / "stages"
    return sd.export_early_exit(network, path, format="onnx-stages", image_size=SIZE, label_names=NAMES)


@pytest.fixture
def damaged(exported, tmp_path):
    """A copy of the stages, to be damaged."""
    return shutil.copytree(exported, tmp_path / "stages")


@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_answer_as_early_exit_does(name, make_backbone, tmp_path):
    model, x = sd.wrap(make_backbone(name, **LAYOUTS[name]), exits=1, image_size=SIZE).eval(), images()
    fast = sd.EarlyExit(model, thresholds_of(model, x))
    run = OnnxEarlyExit(sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=SIZE))
    expected = fast(x)
    assert len(set(expected.exit_index.tolist())) > 1
    same(run(x.numpy()), expected)
    for image in range(0, 8, 3):
        same(run(x[image : image + 1].numpy()), fast(x[image : image + 1]))


def test_ensembles_and_temperatures(network, exported):
    x = images()
    expected = network(x)
    assert sorted(set(expected.exit_index.tolist())) == [0, 1, 2]
    same(OnnxEarlyExit(exported)(x.numpy()), expected)


@pytest.mark.parametrize("rule", ["max-softmax", "margin", "patience"])
def test_rules(rule, tmp_path):
    model, x = tiny_model(), images(9)
    for head, logits in zip(model.heads, model(x, return_exits=True).logits, strict=False):
        head.classifier.bias -= logits.mean(0)  # else an untrained head gives all images one class
    thresholds = [math.inf, 1] if rule == "patience" else thresholds_of(model, x, rule=rule)
    fast = sd.EarlyExit(model, thresholds, rule=rule)
    run = OnnxEarlyExit(sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=SIZE))
    expected = fast(x)
    assert len(set(expected.exit_index.tolist())) > 1
    same(run(x.numpy()), expected)


def test_thresholds_can_be_given_anew(network, exported):
    x = images()
    for thresholds in (0.0, math.inf, [math.inf, 0.0], [0.0, math.inf], [math.inf, network.config.thresholds[1]]):
        run = OnnxEarlyExit(exported, thresholds=thresholds)
        settings = {**asdict(network.config), "thresholds": thresholds}
        same(run(x.numpy()), sd.EarlyExit(network.model, **settings)(x))


@pytest.mark.parametrize("buckets", [[8], [4, 2], [1, 16]])
def test_buckets_are_the_only_sizes_that_run(exported, network, buckets):
    run, sizes = OnnxEarlyExit(exported, buckets=buckets), set()
    for index, session in enumerate(run._sessions):

        class Counted:
            def run(self, outputs, inputs, options=None, session=session):
                sizes.update(len(value) for name, value in inputs.items() if name != "temperatures")
                return session.run(outputs, inputs, options)

        run._sessions[index] = Counted()
    x = images()
    same(run(x.numpy()), network(x))
    assert sizes <= set(buckets)
    assert run(x[:0].numpy()).logits.shape == (0, 5)


def test_wrong_buckets_are_refused(exported):
    for buckets in ([], [0], [1.5], [True]):
        with pytest.raises(ValueError, match="allowed are one or more batch sizes of at least 1"):
            OnnxEarlyExit(exported, buckets=buckets)


def test_an_empty_batch_has_empty_answers(exported):
    answer = OnnxEarlyExit(exported)(np.zeros((0, 3, SIZE, SIZE), np.float32))
    assert answer.logits.shape == (0, 5)
    assert answer.exit_index.shape == (0,)
    assert (answer.logits.dtype, answer.exit_index.dtype) == (np.float32, np.int64)


def test_images_that_left_are_not_run(exported, network, monkeypatch):
    run, sizes = OnnxEarlyExit(exported), []
    stage = run._run

    def count(index, inputs, outputs):
        sizes.append({len(value) for name, value in inputs.items() if name != "temperatures"})
        return stage(index, inputs, outputs)

    monkeypatch.setattr(run, "_run", count)
    index = run(images().numpy()).exit_index
    assert sizes == [{8}, {int((index > 0).sum())}, {int((index > 1).sum())}]
    sizes.clear()
    monkeypatch.setattr(run, "thresholds", (0.0, 0.0))
    run(images().numpy())
    assert sizes == [{8}]


@pytest.mark.parametrize("buckets", [None, [3, 5]])
def test_an_image_goes_no_deeper_than_it_may(exported, network, buckets):
    x, run = images(), OnnxEarlyExit(exported, buckets=buckets)
    limits = torch.tensor([2, 0, 1, 2, 0, 1, 1, 2])
    for limit in (0, 1, 2, limits):
        expected = network(x, max_exit=limit)
        for given in (limit, np.asarray(limit, np.int32), limits.tolist() if limit is limits else limit):
            same(run(x.numpy(), given), expected)
    never = OnnxEarlyExit(exported, thresholds=math.inf, buckets=buckets)
    expected = sd.EarlyExit(network.model, **{**asdict(network.config), "thresholds": math.inf})(x, max_exit=limits)
    told = {}
    answer = never(x.numpy(), limits.numpy(), lambda places, logits, exit: told.update(dict.fromkeys(places, exit)))
    same(answer, expected)
    assert [told[place] for place in range(8)] == answer.exit_index.tolist() == limits.tolist()


def test_stages_after_the_deepest_exit_allowed_do_not_run(exported, monkeypatch):
    run, ran = OnnxEarlyExit(exported, thresholds=math.inf), []
    stage = run._run
    monkeypatch.setattr(
        run,
        "_run",
        lambda index, inputs, outputs: ran.append((index, LOGITS in outputs)) or stage(index, inputs, outputs),
    )
    for limit, expected in (
        (0, [(0, True)]),
        (1, [(0, False), (1, True)]),
        (None, [(0, False), (1, False), (2, True)]),
        ([0, 1, *[1] * 6], [(0, True), (1, True)]),
    ):
        ran.clear()
        run(images().numpy(), limit)
        assert ran == expected


@pytest.mark.parametrize(
    ("max_exit", "message"),
    [
        (3, r"max_exit is 3 to 3; allowed are 0 to 2 \(the fallback\)"),
        ([0, 1, 2, -1, 0, 0, 0, 0], "max_exit is -1 to 2; allowed are 0 to 2"),
        ([0, 1], r"max_exit has the shape \[2\]; allowed are one number, or \[8\] of them"),
        (1.0, "max_exit is 1.0; allowed are whole numbers"),
        (True, "max_exit is True; allowed are whole numbers"),
    ],
)
def test_wrong_limits(exported, max_exit, message):
    with pytest.raises(ValueError, match=message):
        OnnxEarlyExit(exported)(images().numpy(), max_exit)


def test_several_threads_use_one_runner(exported, network):
    run, x = OnnxEarlyExit(exported), images(16)
    parts = [x[start : start + size] for size in (1, 3, 8) for start in range(0, 16 - size, 2)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda part: run(part.numpy()), parts * 2))
    for part, answer in zip(parts * 2, answers, strict=True):
        same(answer, network(part))


def test_the_manifest_says_what_is_needed(exported, network):
    said = json.loads((exported / "manifest.json").read_text())
    assert said["label_names"] == list(NAMES)
    assert said["exit_names"] == ["stage0", "stage1", "fc"]
    assert said["early_exit"] == network.config.to_json()
    assert sd.Ensemble.from_json(said["ensemble"]) == network.model.ensemble
    assert (said["input_size"], said["num_classes"], said["runtime"]) == ([3, SIZE, SIZE], 5, "onnx")
    assert {"mean", "std", "interpolation", "crop_pct", "crop_mode"} <= set(said)
    assert set(said["sha256"]) == {path.name for path in exported.iterdir()} - {"manifest.json"}
    assert {"torch", "timm", "onnxruntime", "timm_selfdistill"} <= set(said["versions"])
    for stage in said["stages"]:
        graph = onnx.load(exported / stage["file"]).graph
        onnx.checker.check_model(exported / stage["file"])
        for values, tensors in ((graph.input, stage["inputs"]), (graph.output, stage["outputs"])):
            assert [value.name for value in values] == [tensor["name"] for tensor in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                shape = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
                assert shape == tensor["shape"]


def test_neither_torch_nor_timm_is_loaded(exported, network, tmp_path):
    np.save(tmp_path / "images.npy", images().numpy())
    code = (
        "import sys, numpy\n"
        "from timm_selfdistill.onnx import OnnxEarlyExit\n"
        "import timm_selfdistill\n"
        "assert timm_selfdistill.OnnxEarlyExit is OnnxEarlyExit\n"
        "answer = OnnxEarlyExit(sys.argv[1])(numpy.load('images.npy'))\n"
        "numpy.save('logits.npy', answer.logits), numpy.save('index.npy', answer.exit_index)\n"
        "assert not {'torch', 'timm', 'onnx'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(exported)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    same((np.load(tmp_path / "logits.npy"), np.load(tmp_path / "index.npy")), network(images()))


def test_wrong_images_are_refused(exported):
    run = OnnxEarlyExit(exported)
    allowed = r"allowed are numpy arrays of float32 \[B, 3, 32, 32\]"
    for wrong, got in (
        (np.zeros((1, 3, 32, 32)), r"float64 \[1, 3, 32, 32\]"),
        (np.zeros((1, 3, 32, 30), np.float32), r"float32 \[1, 3, 32, 30\]"),
        (np.zeros((3, 32, 32), np.float32), r"float32 \[3, 32, 32\]"),
        (images(), "Tensor"),
    ):
        with pytest.raises(ValueError, match=f"images are {got}; {allowed}"):
            run(wrong)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.5], "1 thresholds for 2 exits: give one for each"),
        (math.nan, r"thresholds are \[nan, nan\]; with the rule entropy allowed are numbers from 0 to 1, and infinity"),
        ([0.5, 1.5], "allowed are numbers from 0 to 1"),
        ([0.5, -math.inf], "allowed are numbers from 0 to 1"),
        ([0.5, "0.5"], "allowed are numbers from 0 to 1"),
    ],
)
def test_wrong_thresholds_are_refused(exported, thresholds, message):
    with pytest.raises(ValueError, match=message):
        OnnxEarlyExit(exported, thresholds=thresholds)


def test_damaged_folders_are_refused(damaged, tmp_path):
    def refused(message, folder=damaged):
        with pytest.raises(ValueError, match=message):
            OnnxEarlyExit(folder)

    content = json.loads((damaged / "manifest.json").read_text())

    def write(**changes):
        (damaged / "manifest.json").write_text(json.dumps({**content, **changes}))

    refused("has no manifest.json: it holds no stages", tmp_path / "missing")
    write(format_version=2)
    refused("its format_version is 2, this version of timm_selfdistill reads 1: export the network again")
    write(format="other")
    refused("'format' is 'timm_selfdistill.stages'")
    write(runtime="torch-export")
    refused("holds stages for 'torch-export', not for onnx")
    write(stages=[{}])
    refused("it is no whole manifest: KeyError")
    write(num_classes="5")
    refused("its 'num_classes' is '5'; it must be of type int")
    write(early_exit={**content["early_exit"], "thresholds": [0.5]})
    refused("1 thresholds for 2 exits")
    write(early_exit={**content["early_exit"], "temperatures": [1.0, 0.0]})
    refused("its temperatures are .*; allowed are finite numbers above 0")
    write(stages=[content["stages"][0], *content["stages"][2:], content["stages"][2]])
    refused("its stage 1 does not fit")
    write(sha256={})
    refused("has no sha256 of stage-0.onnx")
    write(sha256={**content["sha256"], "../stage-0.onnx": ""})
    refused("has no file '../stage-0.onnx'")
    (damaged / "manifest.json").write_text("{")
    refused("manifest.json cannot be read")
    write()
    data = (damaged / "stage-1.onnx").read_bytes()
    (damaged / "stage-1.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused("stage-1.onnx was damaged or exchanged: its sha256 is not that of the manifest.json")
    (damaged / "stage-1.onnx").unlink()
    refused("has no file 'stage-1.onnx', which its manifest.json names")


def test_nothing_is_unpickled(exported, network, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    same(OnnxEarlyExit(exported)(images().numpy()), network(images()))


def test_stages_of_torch_export(network, tmp_path):
    path = sd.export_early_exit(network, tmp_path / "stages", format="torch-export-stages", image_size=SIZE)
    manifest = Manifest.read(path)
    manifest.check_files(path)
    stages = [torch.export.load(path / stage.file).module() for stage in manifest.stages]

    def run(index, inputs, outputs):
        found = stages[index](*[torch.as_tensor(inputs[tensor.name]) for tensor in manifest.stages[index].inputs])
        return [tensor.numpy() for tensor in found]

    x = images()
    same(run_stages(manifest, run, x.numpy(), lambda exit, c, _: c >= manifest.thresholds[exit]), network(x))


@pytest.fixture(scope="module")
def nested(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("nested") / "net.onnx"
    return sd.export_early_exit(network, path, format="onnx-if", image_size=SIZE, label_names=NAMES)


def test_one_graph_stops_by_itself(nested, network):
    onnx.checker.check_model(nested, full_check=True)
    session = onnxruntime.InferenceSession(nested, providers=["CPUExecutionProvider"])
    model, settings = network.model, asdict(network.config)
    for thresholds in (None, [math.inf, math.inf], [0.0, 0.0], [math.inf, 0.0]):
        given = {} if thresholds is None else {"thresholds": np.array(thresholds, np.float32)}
        fast = network if thresholds is None else sd.EarlyExit(model, **{**settings, "thresholds": thresholds})
        for image in images().split(1):
            same(session.run(["logits", "exit_index"], {"images": image.numpy(), **given}), fast(image))


def test_nothing_after_an_exit_runs_in_one_graph(nested, tmp_path):
    """The rest of the network gives NaN: it would be seen in what leaves later, and is not in what leaves before."""
    model = onnx.load(nested)
    assert [node.op_type for node in model.graph.node].count("If") == 1
    (branch,) = [node for node in model.graph.node if node.op_type == "If"]
    later = next(attribute.g for attribute in branch.attribute if attribute.name == "else_branch")
    for tensor in later.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4:
            tensor.raw_data = np.full(tensor.dims, np.nan, np.float32).tobytes()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = images(1).numpy()
    logits, index = session.run(None, {"images": image, "thresholds": np.array([0, 0], np.float32)})
    assert index.tolist() == [0]
    assert np.isfinite(logits).all()
    logits, index = session.run(None, {"images": image, "thresholds": np.array([np.inf, 0], np.float32)})
    assert index.tolist() == [2]  # what is no number is no reason to leave
    assert np.isnan(logits).all()


def test_one_graph_says_what_is_needed(nested, network):
    session = onnxruntime.InferenceSession(nested, providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert said["early_exit"] == network.config.to_json()
    assert (said["label_names"], said["input_size"]) == (list(NAMES), [3, SIZE, SIZE])
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_overridable_initializers()] == ["thresholds"]
    assert [list(value.shape) for value in session.get_outputs()] == [[1, 5], [1]]


def test_what_is_not_a_number_never_leaves(exported, nested, network):
    x = images()
    x[1::2] *= 1e38
    expected = sd.EarlyExit(network.model, **{**asdict(network.config), "thresholds": 0.0})(x)
    assert expected.exit_index.tolist() == [0, 2] * 4
    assert OnnxEarlyExit(exported, thresholds=0.0)(x.numpy()).exit_index.tolist() == [0, 2] * 4
    session = onnxruntime.InferenceSession(nested, providers=["CPUExecutionProvider"])
    given = {"images": x[1:2].numpy(), "thresholds": np.zeros(2, np.float32)}
    assert session.run(["exit_index"], given)[0].tolist() == [2]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_quantised_stages_keep_their_exits(network, tmp_path, mode):
    x = images()
    settings = {"quantize": mode, "calibration_images": x if mode == "static" else None}
    path = sd.export_early_exit(network, tmp_path / "int8", format="onnx-stages", image_size=SIZE, **settings)
    run = OnnxEarlyExit(path)
    assert run.manifest["quantized"] == {"mode": mode, "images": 8 if mode == "static" else 0}
    kinds = {node.op_type for stage in (0, 1) for node in onnx.load(path / f"stage-{stage}.onnx").graph.node}
    assert ("ConvInteger" if mode == "dynamic" else "QuantizeLinear") in kinds
    every = torch.stack(network.model(x, return_exits=True).logits)
    expected = sd.early_exit.exit_answers(network.config, every, network.model.ensemble)
    found = torch.from_numpy(run.every_exit(x.numpy()))
    difference = (found - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 0.1
    assert set(run(x.numpy()).exit_index.tolist()) <= {0, 1, 2}


def test_exits_of_ensembles_tell_what_they_say_alone(exported, network, damaged):
    run, x = OnnxEarlyExit(exported), images()
    every = torch.stack(network.model(x, return_exits=True).logits)
    np.testing.assert_allclose(run.every_exit(x.numpy(), own=True), every.numpy(), rtol=1e-4, atol=1e-4)
    answers = sd.early_exit.exit_answers(network.config, every, network.model.ensemble)
    np.testing.assert_allclose(run.every_exit(x.numpy()), answers.numpy(), rtol=1e-4, atol=1e-4)
    # Stages that were exported before they told it.
    content = json.loads((damaged / "manifest.json").read_text())
    for stage in content["stages"]:
        stage["outputs"] = [tensor for tensor in stage["outputs"] if tensor["name"] != "own_logits"]
    (damaged / "manifest.json").write_text(json.dumps(content))
    before = OnnxEarlyExit(damaged)
    same(before(x.numpy()), network(x))
    with pytest.raises(ValueError, match="do not tell what each exit says alone: export them again"):
        before.every_exit(x.numpy(), own=True)


def test_wrong_quantisation_is_refused(network, tmp_path):
    for settings, message in (
        ({"format": "onnx-stages", "quantize": "int4"}, "quantize is 'int4'; allowed are dynamic, static"),
        ({"format": "onnx-if", "quantize": "dynamic"}, "onnx-if cannot be quantised; allowed is onnx-stages"),
        ({"format": "onnx-stages", "quantize": "static"}, "calibration_images belong to quantize='static'"),
        ({"format": "onnx-stages", "calibration_images": images()}, "calibration_images belong to"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.export_early_exit(network, tmp_path / "net.onnx", image_size=SIZE, **settings)


@pytest.mark.parametrize("format", ["torch-export-stages", "onnx-if"])
def test_other_answers_are_an_error_and_leave_nothing(network, tmp_path, monkeypatch, format):
    monkeypatch.setattr(graphs, "TOLERANCE", -1.0)
    path = tmp_path / ("net.onnx" if format == "onnx-if" else "net")
    with pytest.raises(sd.ExportError, match=f"TinyNet, exported to {format}, gives other logits at exit 0"):
        sd.export_early_exit(network, path, format=format, image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_mixes_its_images_is_an_error(tmp_path):
    class Mixing(TinyNet):
        def forward(self, x):
            x = self.act(self.stage0(x))
            x = self.act(self.stage1(x))
            return self.fc(self.act(self.stage2(x - x.mean(0, keepdim=True))).mean((2, 3)))

    torch.manual_seed(0)
    model = sd.wrap(Mixing(), exits=["stage0"], image_size=SIZE, head="linear").eval()
    with pytest.warns(UserWarning, match="part of its batch"):
        fast = sd.EarlyExit(model, 0.5)
    with pytest.raises(sd.ExportError, match="gives other logits at exit 1, where a part of the batch is left"):
        sd.export_early_exit(fast, tmp_path / "net", format="torch-export-stages", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_only_what_an_export_wrote_is_replaced(network, exported, tmp_path):
    def export(path, **kwargs):
        return sd.export_early_exit(network, path, format="torch-export-stages", image_size=SIZE, **kwargs)

    with pytest.raises(ValueError, match=r"exists already; it is replaced only with overwrite=True \(--force\)"):
        export(exported)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").touch()
    with pytest.raises(ValueError, match="was not written by an export"):
        export(mine, overwrite=True)
    copy = shutil.copytree(exported, tmp_path / "copy")
    export(copy, overwrite=True)
    assert Manifest.read(copy).content["runtime"] == "torch-export"
    assert not list(copy.glob("*.onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "copy"}
    with pytest.raises(ValueError, match=r"must end with \.onnx for the format onnx-if"):
        sd.export_early_exit(network, tmp_path / "net", format="onnx-if")
    with pytest.raises(ValueError, match="no format 'onnx' for early exit; allowed are onnx-stages"):
        sd.export_early_exit(network, tmp_path / "net", format="onnx")


def test_command_exports_a_run(tmp_path, capsys):
    torch.manual_seed(0)
    model = sd.wrap("resnet18", num_classes=5, exits=1, image_size=SIZE, model_kwargs=LAYOUTS["resnet18"]).eval()
    run = tmp_path / "run"
    sd.save_pretrained(model, run / "model", label_names=NAMES, data_config={"input_size": (3, SIZE, SIZE)})
    assert cli(["export", str(run), "--format", "torch-export-stages"]) == 2
    assert "has no early-exit settings: choose them by timm-selfdistill calibrate" in capsys.readouterr().err
    assert cli(["export", str(run), "--format", "torch-export-stages", "--threshold", "0.25"]) == 0
    assert capsys.readouterr().out == f"{run}/torch-export-stages\n"
    manifest = Manifest.read(run / "torch-export-stages")
    assert manifest.thresholds == (0.25,)
    assert manifest.content["label_names"] == list(NAMES)
    for words, message in (
        (["--format", "onnx-stages", "--exit", "0"], "onnx-stages writes all exits, for any batch: leave out exit"),
        (["--format", "onnx-if", "--dynamic-batch"], "leave out dynamic_batch"),
        (["--format", "onnx", "--threshold", "0.5"], "onnx has no early exit: threshold is for onnx-stages"),
        (["--format", "safetensors", "--all-exits"], "safetensors hold one exit"),
    ):
        assert cli(["export", str(run), *words]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["model", "torch-export-stages"]


@pytest.mark.slow
def test_stages_of_each_family(family, make_backbone, tmp_path):
    model = sd.wrap(make_backbone(family), image_size=64).eval()
    x = torch.nn.functional.interpolate(images(), 64)
    fast = sd.EarlyExit(model, thresholds_of(model, x))
    run = OnnxEarlyExit(sd.export_early_exit(fast, tmp_path / "stages", format="onnx-stages", image_size=64))
    same(run(x.numpy()), fast(x))


def test_no_image_leaves_by_logits_that_are_no_numbers(tmp_path):
    class Valid(torch.nn.Module):
        def forward(self, logits):
            return _is_valid(logits)

    rows = [[1, 2], [math.nan, 2], [2, math.nan], [math.nan] * 2, [math.inf, 1], [-math.inf, 1], [-math.inf] * 2]
    logits, expected = torch.tensor(rows), [True, False, False, False, False, True, False]
    assert _is_valid(logits).tolist() == expected
    torch.onnx.export(Valid(), (logits,), dynamo=True, verbose=False).save(tmp_path / "valid.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "valid.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert found.tolist() == expected
