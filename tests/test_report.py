import copy
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from PIL import Image
from torch import nn

from timm_selfdistill.metrics import Answers, paired_interval, wilson_interval
from timm_selfdistill.model import Ensemble, wrap
from timm_selfdistill.report import (
    build_report,
    draw_report,
    format_markdown,
    format_table,
    report_content,
    write_report,
)
from timm_selfdistill.report.report_content import AccuracyRow

pytestmark = pytest.mark.whole_reports

SIZE = (3, 32, 32)
CLASSES = 10


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_content, "_SECONDS", 0.0)
        patch.setattr(report_content, "_MIN_ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    kwargs = {"channels": [16, 32, 64, 128]}
    return wrap("resnet18", num_classes=CLASSES, small_stem=True, image_size=32, model_kwargs=kwargs)


@pytest.fixture(scope="module")
def vit():
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return wrap("vit_tiny_patch16_224", num_classes=CLASSES, exits=["blocks.0", "blocks.2"], model_kwargs=kwargs)


def entry(top1, top5=99.0, ece=0.05):
    return {"top1": top1, "top5": top5, "macro_recall": top1 - 2, "ece": ece, "loss": 1.0}


def metrics(*top1, ensemble=80.0, fitted=None, num_samples=1234, num_skipped=0, num_nonfinite=0):
    right = [*top1, ensemble, ensemble if fitted is None else fitted]
    rows = [np.arange(num_samples) < (0 if math.isnan(value) else round(value * num_samples / 100)) for value in right]
    return {
        "class_sizes": (num_samples // CLASSES, num_samples // CLASSES + 1),
        "answers": Answers(str(num_samples), tuple(np.packbits(row).tobytes() for row in rows)),
        "exits": [entry(value) for value in top1],
        "ensemble": entry(ensemble),
        "fitted_ensemble": None if fitted is None else entry(fitted, ece=0.03),
        "running": [entry(value - 1 if place else value) for place, value in enumerate(top1)],
        "num_samples": num_samples,
        "num_skipped": num_skipped,
        "num_nonfinite": num_nonfinite,
    }


def build(model, results=None, **kwargs):
    if results is None:
        results = metrics(*(60.0 + 5 * index for index in range(model.num_exits + 1)))
    told = {"dataset": "digits, test", "recipe": "digits", "seed": 3}
    settings = {"input_size": SIZE, "baseline": None, "latency_batch_size": 2, **told}
    return build_report(model, results, **(settings | kwargs))


@pytest.fixture(scope="module")
def report(resnet):
    return build(resnet, baseline=metrics(74.5))


def altered(report, **kwargs):
    return copy.deepcopy(report) | kwargs


def with_points(report, macs, top1, ensemble, baseline):
    """Return the report with other figures in its picture."""
    row = report["exits"][0]
    names = [f"stages_{index}.blocks" for index in range(len(macs))]
    points = zip(names, macs, top1, strict=True)
    return altered(
        report,
        exits=[row | {"index": i, "name": name, "macs": m, "top1": t} for i, (name, m, t) in enumerate(points)],
        ensemble=report["ensemble"] | {"macs": int(1.07 * macs[-1]), "top1": ensemble},
        baseline=None if baseline is None else {"top1": baseline, "top5": 99.0, "ece": 0.1},
    )


def truncated_resnet(model, exit):
    """Return exit 0, 1 or 2 of a wrapped resnet18 as a network of its own."""
    backbone = model.backbone
    stem = [backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool]
    stages = [backbone.layer1, backbone.layer2, backbone.layer3][: exit + 1]
    return nn.Sequential(*stem, *stages, model.heads[exit])


def num_params(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@torch.no_grad()
def macs_of_layers(network, run):
    """Return the multiply-accumulates of all convolutions and linear layers that `run` calls."""
    counts = []

    def count(module, args, out):
        counts.append(out.numel() * module.weight[0].numel())

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(count) for module in layers]
    run()
    for handle in handles:
        handle.remove()
    return sum(counts)


def test_costs_of_a_resnets_exits_are_those_of_the_networks_cut_there(resnet, report):
    x = torch.zeros(1, *SIZE)
    resnet.eval()
    assert [row["name"] for row in report["exits"]] == ["layer1", "layer2", "layer3", "fc"]
    for exit in range(3):
        small = truncated_resnet(resnet, exit)
        assert report["exits"][exit]["params"] == num_params(small)
        assert report["exits"][exit]["macs"] == macs_of_layers(small, lambda net=small: net(x))
    assert report["exits"][3]["params"] == num_params(resnet.backbone)
    assert report["exits"][3]["macs"] == macs_of_layers(resnet.backbone, lambda: resnet.backbone(x))
    assert report["ensemble"]["params"] == num_params(resnet)
    assert report["ensemble"]["macs"] == macs_of_layers(resnet, lambda: resnet(x, return_exits=True))


def test_costs_of_a_vits_exits_follow_the_arithmetic(vit):
    tokens, width = 5, 24
    norm = 2 * width
    embedding = 3 * 16 * 16 * width + width + (tokens + 1) * width
    block = 2 * norm + (width + 1) * 3 * width + (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width
    block_macs = tokens * 12 * width * width + 2 * tokens * tokens * width
    classifier = (width + 1) * CLASSES
    head = norm + (width + 1) * width + classifier
    patches = 4 * 3 * 16 * 16 * width
    exits = build(vit)["exits"]
    for row, blocks in zip(exits, (1, 3), strict=False):
        assert row["params"] == embedding + blocks * block + head
        assert row["macs"] == patches + blocks * block_macs + tokens * width * width + width * CLASSES
    assert exits[-1]["params"] == embedding + 4 * block + norm + classifier == num_params(vit.backbone)
    assert exits[-1]["macs"] == patches + 4 * block_macs + width * CLASSES


def test_parameters_of_a_module_that_never_runs_count_where_another_reads_them():
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
    model = wrap("beit_base_patch16_224", num_classes=CLASSES, exits=["blocks.1"], model_kwargs=kwargs)
    rows = build(model)["exits"]
    assert rows[-1]["params"] == num_params(model.backbone)
    behind = num_params(model.backbone.blocks[2], model.backbone.fc_norm, model.backbone.norm, model.backbone.head)
    assert rows[0]["params"] == num_params(model.backbone, model.heads) - behind


def test_deeper_exits_compute_more_and_the_ensemble_most(report):
    rows = [*report["exits"], report["ensemble"]]
    assert all(cheaper["macs"] < dearer["macs"] for cheaper, dearer in itertools.pairwise(rows))
    # Not so the parameters of exits: a shallow one may have the larger head.
    assert all(row["params"] < report["ensemble"]["params"] for row in report["exits"])


def test_timed_runs_stop_at_their_exit_and_take_turns(resnet):
    order = []
    names = ("conv1", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    handles = [
        resnet.backbone.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: order.append(name))
        for name in names
    ]
    report = build(resnet)
    for handle in handles:
        handle.remove()
    one_round = [name for depth in (2, 3, 4, 5, 5) for name in names[:depth]]
    count_and_warm_up = 1 + report_content._WARM_UP_ROUNDS
    assert report["latency_rounds"] == report_content._MIN_ROUNDS
    assert order == one_round * (count_and_warm_up + report_content._MIN_ROUNDS)


def test_latency_is_positive_and_speedup_relative_to_the_last_exit(report):
    rows = [*report["exits"], report["ensemble"]]
    assert all(row["latency_ms"] > 0 for row in rows)
    assert report["exits"][-1]["speedup"] == 1.0
    for row in rows:
        assert row["speedup"] == pytest.approx(report["exits"][-1]["latency_ms"] / row["latency_ms"])


def test_batch_size_and_conditions_are_told(resnet):
    shapes = []
    handle = resnet.backbone.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[0]))
    report = build(resnet, latency_batch_size=3)
    handle.remove()
    assert set(shapes) == {1, 3}
    assert report["latency_batch_size"] == 3
    assert report["device"].startswith("cpu (")
    assert (report["dtype"], report["threads"]) == ("float32", torch.get_num_threads())
    assert (report["backbone"], report["input_size"]) == ("resnet18", [3, 32, 32])
    assert report["versions"]["timm"] == timm.__version__


def test_the_model_is_left_as_it_was(resnet):
    model = copy.deepcopy(resnet)
    model.train()
    model.backbone.layer2.eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    build(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model(torch.randn(2, *SIZE), return_exits=True).logits[0].sum().backward()


def test_modes_are_restored_after_a_failure(resnet):
    resnet.train()
    with pytest.raises(RuntimeError):
        build(resnet, input_size=(5, 32, 32))
    assert all(module.training for module in resnet.modules())


def test_accuracies_are_those_of_the_metrics(resnet):
    results = metrics(61.0, 62.0, 63.0, 64.0, ensemble=65.0)
    results["exits"][1] = entry(62.0, top5=88.0, ece=0.125)
    report = build(resnet, results, baseline=metrics(1.0, 2.0, 63.5))
    assert [row["top1"] for row in report["exits"]] == [61.0, 62.0, 63.0, 64.0]
    assert (report["exits"][1]["top5"], report["exits"][1]["ece"]) == (88.0, 0.125)
    assert report["ensemble"]["top1"] == 65.0
    low, high = wilson_interval(63.5 * 12.34, 1234)
    assert report["baseline"] == {
        "top1": 63.5,
        "top1_interval": [low, high],
        "gain_interval": None,
        "top5": 99.0,
        "macro_recall": 61.5,
        "ece": 0.05,
    }
    # The helper lets the first images be right, as many as the accuracy says: 765 and 784 of them.
    assert report["exits"][1]["gain_interval"] == list(paired_interval(0, 784 - 765, 1234))
    assert report["ensemble"]["gain_interval"] == list(paired_interval(802 - 784, 0, 1234))
    assert report["class_sizes"] == [123, 124]
    assert (report["dataset"], report["num_samples"]) == ("digits, test", 1234)
    assert (report["recipe"], report["seed"]) == ("digits", 3)


def test_a_fitted_ensemble_has_a_row_and_a_mark_of_its_own(resnet, report):
    assert report["fitted_ensemble"] is None
    model = copy.copy(resnet)
    model.ensemble = Ensemble((0.0, 0.25, 0.5, 0.125), images=1100)
    found = build(model, metrics(60.0, 65.0, 70.0, 75.0, fitted=82.5), baseline=metrics(74.5))
    row = {"top1": 82.5, "top5": 99.0, "ece": 0.03, "weights": [0.0, 0.25, 0.5, 0.125], "images": 1100}
    assert {key: found["fitted_ensemble"][key] for key in row} == row
    assert found["fitted_ensemble"]["gain_interval"] == list(paired_interval(1018 - 919, 0, 1234))
    assert found["ensemble"]["top1"] == 80.0
    table = format_table(found)
    lines = {re.split(" {2,}", line)[0]: re.split(" {2,}", line)[1:] for line in table.splitlines()}
    assert lines["ensemble, fitted"][:4] == ["82.50", "80.3 to 84.5", "+8.00 (+6.48 to +9.54)", "99.00"]
    assert lines["ensemble, fitted"][5:] == lines["ensemble"][5:]
    assert "weighs the outputs 0 0.25 0.5 0.125, by 1,100 held-out images" in table
    (axes,) = [axes for axes in draw_report(found).axes if axes.get_title(loc="left")]
    (mark,) = [line for line in axes.get_lines() if line.get_label() == "fitted ensemble (82.50 %)"]
    assert (mark.get_xdata().tolist(), mark.get_ydata().tolist()) == ([found["ensemble"]["macs"]], [82.5])
    older = {key: value for key, value in found.items() if key != "fitted_ensemble"}
    assert "fitted" not in format_table(older)


@pytest.mark.parametrize(
    ("results", "kwargs", "message"),
    [
        (metrics(60.0, 70.0), {}, "4 outputs"),
        (metrics(60.0, 65.0, 70.0, 75.0) | {"ensemble": None}, {}, "without an ensemble"),
        (None, {"baseline": metrics(70.0, num_samples=1000)}, "1000 samples"),
        (None, {"latency_batch_size": 0}, "got 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(resnet, results, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(resnet, results, **kwargs)


def test_files_have_the_agreed_layout_and_json_reads_back_the_same(report, tmp_path):
    folder = tmp_path / "runs" / "digits"
    write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    read = json.loads((folder / "report.json").read_text())
    assert read == report
    accuracies = {"top1", "top1_interval", "gain_interval", "top5", "macro_recall", "ece"}
    columns = accuracies | {"params", "macs", "latency_ms", "speedup"}
    assert all(set(row) == columns | {"index", "name", "running_top1"} for row in read["exits"])
    assert set(read["ensemble"]) == columns
    assert set(read["baseline"]) == accuracies
    assert {"dataset", "num_samples", "recipe", "seed", "versions"} < set(read)
    assert [row["index"] for row in read["exits"]] == [0, 1, 2, 3]
    assert "](report.png)" in (folder / "report.md").read_text()


def test_a_failed_write_leaves_the_former_report(report, tmp_path):
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    broken = altered(report, ensemble=report["ensemble"] | {"latency_ms": math.nan})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(broken, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_not_a_number_is_null_and_said_so(resnet, tmp_path):
    results = metrics(60.0, 65.0, 70.0, math.nan, num_nonfinite=2)
    results["exits"][0]["ece"] = math.inf
    report = build(resnet, results, baseline=metrics(70.0))
    write_report(report, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["exits"][3]["top1"] is None
    assert read["exits"][0]["ece"] is None
    for text in (format_table(report), (tmp_path / "report.md").read_text()):
        assert "n/a (null in report.json): the value was not a finite number" in text
        assert "2 samples" in text
    assert "n/a" not in format_table(altered(report, exits=report["exits"][1:3]))


def test_table_is_aligned_and_compares_with_the_baseline(report):
    table, _, notes = format_table(report).partition("\n\n")
    header, rule, *rows = table.splitlines()
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    names = ["0: layer1", "1: layer2", "2: layer3", "3: fc (backbone)", "ensemble", "baseline"]
    assert [row.split("  ")[0] for row in rows] == names
    for title in ("top-1 %", "vs. baseline", "MACs", "ms/batch", "speed-up"):
        end = header.index(title) + len(title)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows[:-1])
    cells = [re.split(" {2,}", row) for row in rows]
    assert [row[3].split()[0] for row in cells[:-1]] == ["-14.50", "-9.50", "-4.50", "+0.50", "+5.50"]
    low, high = report["exits"][0]["gain_interval"]
    assert cells[0][3] == f"-14.50 ({low:+.2f} to {high:+.2f})"
    assert cells[-1][2] == "72.0 to 76.8", "Wilson's interval of 919 of 1,234"
    assert cells[-1][1] == "74.50"
    assert cells[-1][-4:] == cells[3][-4:]
    assert "1,234 samples" in notes


def test_table_without_baseline_has_no_trace_of_one(report):
    assert "baseline" not in format_table(altered(report, baseline=None))


def test_uneven_classes_have_a_column_of_their_mean_accuracy(report):
    assert "macro" not in format_table(report).lower()
    table = format_table(altered(report, class_sizes=[10, 400]))
    header, _, first = table.splitlines()[:3]
    column = [re.split(" {2,}", line) for line in (header, first)]
    assert dict(zip(*column, strict=False))["macro recall %"] == "58.00"
    assert "the smallest has 10 images and the largest 400" in table


def test_a_metric_that_the_page_does_not_know_has_a_column_of_its_name(report, monkeypatch):
    monkeypatch.setitem(AccuracyRow.__annotations__, "auroc", float)
    rows = [{**row, "auroc": 0.9871} for row in report["exits"]]
    header, _, first = format_table(altered(report, exits=rows)).splitlines()[:3]
    column = [re.split(" {2,}", line) for line in (header, first)]
    assert dict(zip(*column, strict=False))["auroc"] == "0.987"


def test_reports_from_before_are_still_shown(report):
    old = altered(report)
    del old["class_sizes"]
    for row in (*old["exits"], old["ensemble"], old["baseline"]):
        for key in ("top1_interval", "gain_interval", "macro_recall"):
            del row[key]
    header, _, first = format_table(old).splitlines()[:3]
    column = [re.split(" {2,}", line) for line in (header, first)]
    assert dict(zip(*column, strict=False))["vs. baseline"] == "-14.50"


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (999, "999"),
        (720_300, "720 k"),
        (91_000, "91.0 k"),
        (999_600, "1.00 M"),
        (38_140_000, "38.1 M"),
        (4_090_000_000, "4.09 G"),
    ],
)
def test_large_numbers_have_three_digits_and_a_prefix(report, macs, text):
    row = report["ensemble"] | {"macs": macs, "params": 1}
    line = next(
        line for line in format_table(altered(report, ensemble=row)).splitlines() if line.startswith("ensemble")
    )
    assert f"  {text}  " in line


def test_markdown_has_every_exit_and_the_conditions(report):
    text = format_markdown(altered(report, device="cpu (Test)", threads=1, versions={"torch": "9.9"}))
    lines = text.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [
        *("0: layer1", "1: layer2", "2: layer3", "3: fc (backbone)"),
        *("ensemble", "baseline"),
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    for said in ("digits, test (1,234 samples)", "recipe digits", "seed 3", "cpu (Test)", "1 thread;", "torch 9.9"):
        assert said in text
    assert f"batch of {report['latency_batch_size']} in float32" in text
    assert "3 x 32 x 32" in text


def pixels(report):
    stream = io.BytesIO()
    draw_report(report).savefig(stream, format="png")
    picture = Image.open(stream)
    picture.load()
    return picture


def test_picture_is_a_png_that_shows_the_data(report):
    picture = pixels(report)
    assert picture.format == "PNG"
    assert picture.size == (1260, 810)
    assert pixels(report).tobytes() == picture.tobytes()
    better = altered(report, ensemble=report["ensemble"] | {"top1": 90.0})
    assert pixels(better).tobytes() != picture.tobytes()


def test_picture_marks_exits_ensemble_and_baseline(report):
    figure = draw_report(report)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    exits = lines["exits"]
    assert list(exits.get_xdata()) == [row["macs"] for row in report["exits"]]
    assert list(exits.get_ydata()) == [60.0, 65.0, 70.0, 75.0]
    ensemble = next(line for label, line in lines.items() if label.startswith("ensemble of all exits"))
    assert list(ensemble.get_ydata()) == [80.0]
    baseline = next(line for label, line in lines.items() if label.startswith("baseline"))
    assert list(baseline.get_xdata()) == [report["exits"][-1]["macs"]]
    markers = [(text.get_text(), text.xy) for text in figure.axes[0].texts]
    assert markers == [(str(row["index"]), (row["macs"], row["top1"])) for row in report["exits"]]
    names, series = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert names == ["0: layer1\n60.00 %", "1: layer2\n65.00 %", "2: layer3\n70.00 %", "3: backbone\n75.00 %"]
    assert series[:2] == ["exits", "ensemble of all exits (80.00 %)"]
    assert "(74.50 %)" in series[2]
    assert len(draw_report(altered(report, baseline=None)).legends[1].get_texts()) == 2


POINTS = {
    "rising": ([178e6, 295e6, 420e6, 556e6], [67.85, 74.57, 78.23, 78.64], 79.67, 77.09),
    "close": ([470e6, 500e6, 530e6, 556e6], [78.2, 78.5, 78.3, 78.64], 78.7, 78.5),
    "very close": ([550e6, 552e6, 554e6, 556e6], [78.5, 78.52, 78.6, 78.64], 78.7, 78.6),
    "wide": ([9e6, 60e6, 900e6], [51.0, 70.2, 80.1], 80.3, 79.7),
    "two": ([2.1e6, 4.4e6], [95.1, 97.2], 97.5, 96.9),
    "perfect": ([178e6, 295e6, 420e6, 556e6], [100.0] * 4, 100.0, 100.0),
    "dearer than the backbone": ([500e6, 90e6, 50e6], [51.0, 62.0, 70.1], 72.3, 69.7),
}


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("name", POINTS)
def test_labels_stay_in_the_picture_and_apart(report, name, baseline):
    macs, top1, ensemble, plain = POINTS[name]
    shown = with_points(report, macs, top1, ensemble, plain if baseline else None)
    if baseline:
        shown["fitted_ensemble"] = {"top1": ensemble, "top5": 99.0, "ece": 0.1, "weights": [1.0], "images": 9}
    figure = draw_report(shown)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    indices = [Text.get_window_extent(text) for text in axes.texts]
    assert len(indices) == len(macs)
    assert not any(box.overlaps(other) for box, other in itertools.combinations(indices, 2))
    assert all(axes.bbox.contains(*corner) for box in indices for corner in (box.min, box.max))
    points = [axes.transData.transform(point) for point in [*zip(macs, top1, strict=True), (1.07 * macs[-1], ensemble)]]
    for position, box in enumerate(indices):
        assert [index for index, point in enumerate(points) if box.contains(*point)] == [position]
    legends = [legend.get_window_extent() for legend in figure.legends]
    labels = [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
    assert len(labels) == len(macs) + (4 if baseline else 2)
    assert not any(box.overlaps(other) for box, other in itertools.combinations(labels, 2))
    assert not any(box.overlaps(axes.get_tightbbox()) for box in legends)
    assert all(figure.bbox.contains(*corner) for box in labels for corner in (box.min, box.max))
    assert all(0 <= tick <= 100 for tick in axes.get_yticks())


def test_picture_of_a_wide_span_has_a_logarithmic_axis(report):
    assert draw_report(with_points(report, *POINTS["wide"])).axes[0].get_xscale() == "log"
    assert draw_report(with_points(report, *POINTS["rising"])).axes[0].get_xscale() == "linear"


def test_picture_leaves_out_what_is_not_a_number(report):
    missing = with_points(report, [1e6, 2e6, 3e6], [50.0, None, 60.0], None, None)
    figure = draw_report(missing)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "2"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["0: stages_0.blocks\n50.00 %", "2: backbone\n60.00 %"]
    nothing = with_points(report, [1e6, 2e6], [None, None], None, None)
    assert not draw_report(nothing).axes[0].texts
