"""Classifying image files, in Python and on the command line."""

import io
import json
import math
import os
import shutil
import time
from statistics import median

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_selfdistill as sd
from timm_selfdistill.cli import main as cli
from timm_selfdistill.predict import find_images

NAMES = ("ape", "bat", "cat", "dog")
NARROW = {"channels": [16, 32, 64, 128]}
INPUT = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9}


def build(**kwargs):
    """Return a model whose exits are of different minds, and sure enough to differ in it."""
    torch.manual_seed(0)
    model = sd.wrap("resnet18", num_classes=len(NAMES), image_size=32, model_kwargs={**NARROW, **kwargs}).eval()
    for head in model.heads:
        head.classifier.weight.data *= 8
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with a model and nothing else in it."""
    folder = tmp_path_factory.mktemp("run")
    sd.save_pretrained(build(), folder / "model", label_names=NAMES, data_config=INPUT)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return sd.from_pretrained(run / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_image_folder):
    """The paths of eight images in two folders, in the order of their names."""
    folder = make_image_folder(tmp_path_factory.mktemp("images"), classes=2, train=4, validation=1)
    return sorted(map(str, (folder / "train").rglob("*.png")))


def batch(model, paths):
    transform = create_transform(**resolve_model_data_config(model.backbone))
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def lines(text):
    return [line.split("\t") for line in text.splitlines()]


@pytest.mark.parametrize("exit", [0, 2, 3, None])
def test_answers_are_those_of_the_network(model, images, exit):
    found = list(sd.predict_images(model, images, exit=exit, top_k=2, batch_size=3))
    assert [one.path for one in found] == images
    index = 3 if exit is None else exit
    with torch.no_grad():
        expected = model.forward_exit(batch(model, images), index).softmax(-1)
    for one, probabilities in zip(found, expected, strict=True):
        values, order = probabilities.sort(descending=True)
        assert one.probabilities == pytest.approx(values[:2].tolist(), rel=1e-4)
        assert one.indices == tuple(order[:2].tolist())
        assert one.classes == tuple(NAMES[place] for place in one.indices)
        assert (one.exit, one.exit_name, one.error) == (index, model.exit_names[index], None)


def test_the_ensemble_answers_as_it_was_fitted_or_with_the_mean(images, run, tmp_path, capsys):
    model = sd.from_pretrained(run / "model")
    with torch.no_grad():
        logits = torch.stack(model(batch(model, images), return_exits=True).logits)
    for weights, title in (((0.25, 0.25, 0.25, 0.25), "mean"), ((0.0, 0.25, 0.5, 0.125), "fitted")):
        if title == "fitted":
            model.ensemble = sd.Ensemble(weights, images=9)
        expected = torch.einsum("k,knc->nc", torch.tensor(weights), logits).softmax(-1).amax(-1).tolist()
        found = list(sd.predict_images(model, images, exit="ensemble"))
        assert [one.probabilities[0] for one in found] == pytest.approx(expected, rel=1e-4)
        assert {(one.exit, one.exit_name) for one in found} == {(3, f"ensemble ({title})")}
    sd.save_pretrained(model, tmp_path, label_names=NAMES, data_config=INPUT)
    assert cli(["predict", str(tmp_path), images[0], "--exit", "ensemble"]) == 0
    ((_, _, probability, exit),) = lines(capsys.readouterr().out)
    assert (float(probability), exit) == (pytest.approx(expected[0], abs=1e-4), "3: ensemble (fitted)")


@pytest.mark.parametrize("fallback", ["last", "ensemble"])
def test_with_early_exit_each_image_is_answered_by_its_exit(model, images, fallback):
    temperatures = (2.0, 0.5, 3.0)
    x = batch(model, images)
    with torch.no_grad():
        every = model(x, return_exits=True).logits
    confidence = (every[0] / temperatures[0]).softmax(-1).amax(-1)
    # Between the two most confident ones: one image leaves first, the others at the end.
    threshold = float(confidence.topk(2).values.mean())
    fast = sd.EarlyExit(model, [threshold, math.inf, math.inf], temperatures=temperatures, fallback=fallback)
    with torch.no_grad():
        out = fast(x)
    assert set(out.exit_index.tolist()) == {0, 3}
    found = list(sd.predict_images(fast, images, top_k=9, batch_size=5))
    assert [one.exit for one in found] == out.exit_index.tolist()
    last = "ensemble (mean)" if fallback == "ensemble" else "fc"
    assert [one.exit_name for one in found] == [(*model.exit_names[:3], last)[one.exit] for one in found]
    for one, logits in zip(found, out.logits, strict=True):
        expected = (logits / (*temperatures, 1.0)[one.exit]).softmax(-1)
        assert dict(zip(one.indices, one.probabilities, strict=True)) == pytest.approx(
            dict(enumerate(expected.tolist())), rel=1e-4
        )


def test_loader_processes_change_nothing(model, images):
    alone, helped = (list(sd.predict_images(model, images, batch_size=2, workers=workers)) for workers in (0, 2))
    assert alone == helped
    random = torch.get_rng_state()
    list(sd.predict_images(model, images, batch_size=2, workers=1))
    assert torch.equal(torch.get_rng_state(), random)


def test_images_of_every_kind_are_read_as_in_training(tmp_path, model, images):
    plain = Image.open(images[0]).convert("RGB").crop((0, 0, 24, 12))
    plain.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, it has to be turned by 90 degrees clockwise
    plain.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    opaque = plain.convert("RGBA")
    opaque.putalpha(7)
    opaque.save(tmp_path / "alpha.png")
    first, *others = sd.predict_images(model, [tmp_path / f"{name}.png" for name in ("plain", "turned", "alpha")])
    assert [other.probabilities for other in others] == [first.probabilities] * 2

    grey = build(in_chans=1)
    plain.convert("L").save(tmp_path / "grey.png")
    one, other = sd.predict_images(grey, [tmp_path / "plain.png", tmp_path / "grey.png"])
    assert one.error is None
    assert one.probabilities == other.probabilities


def test_without_names_classes_are_called_by_their_index(images):
    (one,) = sd.predict_images(build(), images[:1])
    assert one.classes == (str(one.indices[0]),)


def test_logits_that_are_no_numbers_are_an_error(images):
    model = build()
    model.backbone.fc.bias.data[1] = math.nan
    (one,) = sd.predict_images(model, images[:1])
    assert one == sd.Prediction(images[0], error="the model gives no finite logits for it")


def test_arguments_must_make_sense(model, images):
    def message(model=model, **kwargs):
        with pytest.raises(ValueError) as error:  # noqa: PT011  # told by the caller
            sd.predict_images(model, images, **kwargs)
        return str(error.value)

    assert message(exit=4) == "There is no exit 4; allowed are 0 to 3 (the backbone's own)."
    assert message(exit=-1).startswith("There is no exit -1")
    assert message(exit="all") == "There is no exit 'all'; allowed are 0 to 3 and 'ensemble'."
    assert message(sd.EarlyExit(model, 0.5), exit=1).startswith("exit is 1, but the model chooses")
    assert message(build().train()) == "The model is in train mode: call eval() first."
    assert message(top_k=0) == "top_k is 0; it must be at least 1."
    assert message(batch_size=0) == "batch_size is 0; it must be at least 1."
    assert message(workers=-1) == "workers is -1; it must be at least 0."
    wrong = build()
    wrong.backbone.pretrained_cfg.update(label_names=list("abcde"), num_classes=4)
    assert message(wrong).startswith("5 label_names (a, b, c, d, e, ...) for 4 classes")


def test_files_folders_and_lists_are_found(tmp_path):
    for name in ("b/2.JPG", "b/a/1.png", "b/notes.txt", "c.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    b, c = str(tmp_path / "b"), str(tmp_path / "c.dat")
    inside = [f"{b}/2.JPG", f"{b}/a/1.png"]
    assert find_images([c, b], []) == [c, *inside]
    assert find_images(["-", c], [f"{b}\n", "\n", "gone.png\r\n"]) == [*inside, "gone.png", c]
    assert find_images([c, "gone.png"], []) == [c, "gone.png"]
    with pytest.raises(ValueError, match=r"no image in -; in a folder, files with the ending of an image"):
        find_images(["-"], [])


def test_a_missing_file_does_not_stop_the_others(run, images, capsys):
    assert cli(["predict", str(run), images[0], "gone.png", images[1]]) == 1
    out, err = capsys.readouterr()
    assert [line[0] for line in lines(out)] == images[:2]
    assert "gone.png: it cannot be read: No such file or directory" in err
    assert "1 of 3 images have no answer." in err


def test_commands_say_when_early_exit_answers(run, images, capsys):
    assert cli(["predict", str(run), images[0], "--threshold", "0.5"]) == 0
    said = "Early exit answers, by the --threshold 0.5: an image stops at the first exit that is confident enough. "
    assert said + "--exit 3 lets the whole network answer.\n" in capsys.readouterr().err
    model = sd.from_pretrained(run / "model")
    shutil.copytree(run / "model", run.parent / "saved" / "model", dirs_exist_ok=True)
    settings = sd.EarlyExitConfig((0.5, 0.5, 0.5))
    sd.save_pretrained(model, run.parent / "saved" / "model", early_exit=settings)
    assert cli(["predict", str(run.parent / "saved"), images[0]]) == 0
    assert "Early exit answers, by the settings that are saved with the model" in capsys.readouterr().err
    assert cli(["predict", str(run.parent / "saved"), images[0], "--exit", "3"]) == 0
    assert capsys.readouterr().err == ""
    for threshold in ("1.5", "-0.5", "nan"):
        assert cli(["predict", str(run), images[0], f"--threshold={threshold}"]) == 2, threshold
        assert "threshold" in capsys.readouterr().err


def test_command_prints_a_line_an_image(run, model, images, capsys):
    assert cli(["predict", str(run), *images]) == 0
    out, err = capsys.readouterr()
    expected = list(sd.predict_images(model, images))
    assert lines(out) == [[one.path, one.classes[0], f"{one.probabilities[0]:.4f}", "3: fc"] for one in expected]
    assert err == ""
    assert cli(["predict", str(run / "model"), images[0], "--exit", "1", "--top-k", "2"]) == 0
    (one,) = sd.predict_images(model, images[:1], exit=1, top_k=2)
    assert [line[1] for line in lines(capsys.readouterr().out)] == list(one.classes)


def test_command_prints_json(run, model, images, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(images)))
    threshold = median(one.probabilities[0] for one in sd.predict_images(model, images, exit=0))
    assert cli(["predict", str(run), "-", "--json", "--threshold", str(threshold)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = list(sd.predict_images(sd.EarlyExit(model, threshold), images))
    assert len({one.exit for one in expected}) > 1
    for row, one in zip(rows, expected, strict=True):
        assert row == {
            "path": one.path,
            "class": one.classes[0],
            "index": one.indices[0],
            "probability": pytest.approx(one.probabilities[0]),
            "exit": one.exit,
            "exit_name": one.exit_name,
        }
    assert cli(["predict", str(run), images[0], "--json", "--top-k", "3"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [top["class"] for top in row["top"]] == list(next(sd.predict_images(model, images[:1], top_k=3)).classes)
    assert row["top"][0] == {key: row[key] for key in ("class", "index", "probability")}


def test_command_takes_the_saved_early_exit_settings(tmp_path, model, images, capsys):
    settings = {"rule": "margin", "temperatures": [2, 2, 1]}
    # At both exits between the images, so that some leave and some stay.
    with torch.no_grad():
        every = model(batch(model, images), return_exits=True).logits
    tops = [(logits / 2).softmax(-1).topk(2).values for logits in every[:2]]
    fast = sd.EarlyExit(model, [*(median((top[:, 0] - top[:, 1]).tolist()) for top in tops), math.inf], **settings)
    sd.save_pretrained(model, tmp_path, label_names=NAMES, data_config=INPUT, early_exit=fast.config)

    def exits(*arguments):
        assert cli(["predict", str(tmp_path), *images, "--json", *arguments]) == 0
        return [json.loads(line)["exit"] for line in capsys.readouterr().out.splitlines()]

    assert exits() == [one.exit for one in sd.predict_images(fast, images)]
    assert len(set(exits())) > 1
    every = sd.EarlyExit(model, 0.0, **settings)
    assert exits("--threshold", "0") == [one.exit for one in sd.predict_images(every, images)] == [0] * len(images)
    assert set(exits("--exit", "2")) == {2}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_decoded_is_told_and_the_others_go_on(
    run, images, tmp_path, capsys, monkeypatch, workers
):
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    with open(images[0], "rb") as file:
        broken.write_bytes(file.read()[:-200])
    text.write_text("no image")
    listed = [images[0], str(broken), str(text), str(tmp_path / "gone.png"), images[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(listed)))
    assert cli(["predict", str(run), "-", "--batch-size", "2", "--workers", workers]) == 1
    out, err = capsys.readouterr()
    assert [line[0] for line in lines(out)] == [images[0], images[1]]
    assert f"{broken}: it cannot be " in err
    assert f"{text}: it cannot be decoded: it has no known image format" in err
    assert f"{tmp_path / 'gone.png'}: it cannot be read: No such file or directory" in err
    assert err.endswith("3 of 5 images have no answer.\n")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_is_no_file_is_told_at_once_and_the_others_go_on(run, images, tmp_path, capsys, workers):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(images[0], folder / "b.png")
    os.mkfifo(folder / "a.png")
    (folder / "c.png").symlink_to("/dev/zero")
    (folder / "d.png").mkdir()
    start = time.monotonic()
    named = [str(folder), str(folder / "a.png"), str(folder / "c.png")]
    assert cli(["predict", str(run), *named, "--workers", workers]) == 1
    assert time.monotonic() - start < 300
    out, err = capsys.readouterr()
    assert [line[0] for line in lines(out)] == [str(folder / "b.png")]
    assert err.count(f"{folder / 'a.png'}: it is not a file, but a named pipe\n") == 2
    assert err.count(f"{folder / 'c.png'}: it is not a file, but a device\n") == 2
    (one,) = sd.predict_images(sd.from_pretrained(run / "model"), [folder / "d.png"])
    assert one.error == "it is not a file, but a folder"


def test_command_refuses_what_cannot_work(run, images, tmp_path, capsys, monkeypatch):
    def fails(*arguments):
        assert cli(["predict", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    assert "There is no image in" in fails(str(run), str(tmp_path))
    assert "There is no exit 7" in fails(str(run), images[0], "--exit", "7")
    assert "holds no model" in fails(str(tmp_path), images[0])
    assert "top_k is 0" in fails(str(run), images[0], "--top-k", "0")
    monkeypatch.setattr("timm_selfdistill.predict.load_with_early_exit", None)
    assert "There is no image in" in fails(str(run), str(tmp_path))
    with pytest.raises(SystemExit) as error:
        cli(["predict", str(run), images[0], "--exit", "1", "--threshold", "0.5"])
    assert error.value.code == 2


def test_a_name_that_is_no_text_is_printed(run, images, tmp_path, capsys):
    name = tmp_path / b"\xff.png".decode(errors="surrogateescape")
    with open(images[0], "rb") as source:
        name.write_bytes(source.read())
    assert cli(["predict", str(run), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/\\udcff.png\t")
    assert cli(["predict", str(run), str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(name)
