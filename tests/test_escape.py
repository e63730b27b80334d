"""What is shown or shared: names from elsewhere change only their own place, and no token or private path is told."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from matplotlib.figure import Figure

import timm_selfdistill as sd
from timm_selfdistill.escape import (
    PrintableFormatter,
    each_text,
    markdown_block,
    markdown_code,
    markdown_link,
    markdown_text,
    plot_text,
    printable,
    printable_message,
    redact,
    without_places,
)
from timm_selfdistill.hub import Training, model_card
from timm_selfdistill.predict import Prediction
from timm_selfdistill.report import draw_report, format_markdown, format_table

TOKEN = "hf_" + "aB3" * 11
ESCAPES = "\x1b]0;OWNED\x07\x1b[2Jcat"
HOSTILE = f"{ESCAPES}\n| [x](http://evil) <script>`**$\\frac$\t\u202egnp.\u2066_a_ ---\r\n# title\x9b2J\udce9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2066\u2069\u200e\ufeff\u061c", "\\u2066\\u2069\\u200e\\ufeff\\u061c"),
        ("\x7f\x85\x9b", "\\x7f\\x85\\x9b"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\udce9", "\\udce9"),
        ("\U000e0041", "\\U000e0041"),
        ("C:\\temp\\é e\u0301 猫 \U0001f468\u200d\U0001f469 می\u200cشود \xa0", None),
    ],
)
def test_what_controls_a_terminal_is_shown_as_python_writes_it(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


def test_a_message_keeps_its_lines_and_nothing_else() -> None:
    assert printable("a\n\x1b b\r\n", lines=True) == "a\n\\x1b b\\r\n"
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s", ("\x1b[2J",), None)
    assert PrintableFormatter("%(levelname)s: %(message)s").format(record) == "WARNING: \\x1b[2J"


def test_markdown_shows_text_as_it_is() -> None:
    assert markdown_text("a|b `c` [d](e) <b>&*~$") == "a\\|b \\`c\\` \\[d\\](e) &lt;b&gt;&amp;\\*\\~\\$"
    assert (
        markdown_text("stages_0.blocks_1 _x_ cpu (AVX-512) 3.5+cu") == "stages_0.blocks_1 \\_x\\_ cpu (AVX-512) 3.5+cu"
    )
    assert markdown_code("a`b") == "``a`b``"
    assert markdown_code("`a") == "`` `a ``"
    assert markdown_block("a\n```\nb\x1b\n", "yaml") == "````yaml\na\n```\nb\\x1b\n````\n"
    assert markdown_link("a]b", "https://h/a)b c") == "[a\\]b](https://h/a%29b%20c)"
    assert plot_text("__background__") == " __background__"
    assert plot_text("$\\frac$\n") == "\\$\\frac\\$\\n"


def test_every_text_of_a_report_is_escaped_and_nothing_else_changed() -> None:
    values = {"a": "\n", "b": [1, None, ("\n", 2.5)], "c\n": {"d": True}}
    assert each_text(values, printable) == {"a": "\\n", "b": [1, None, ("\\n", 2.5)], "c\n": {"d": True}}
    assert values["a"] == "\n"


def test_one_answer_is_one_line() -> None:
    prediction = Prediction(HOSTILE, (HOSTILE,), (0,), (1.0,), 0, HOSTILE)
    line = prediction.to_text()
    assert line.isprintable() is False  # the tabs between the columns
    assert line.replace("\t", " ").isprintable()
    assert line.count("\t") == 3
    assert json.dumps(prediction.to_json()).isascii()


def hostile_report() -> dict[str, Any]:
    row = {"top1": 1.0, "top5": 2.0, "ece": 0.1, "params": 1, "macs": 1, "latency_ms": 1.0, "speedup": 1.0}
    return {
        "exits": [{"index": index, "name": HOSTILE, **row, "macs": index + 1} for index in range(2)],
        "ensemble": row,
        "baseline": None,
        "backbone": HOSTILE,
        "dataset": HOSTILE,
        "num_samples": 3,
        "num_skipped": {"evaluation": 0},
        "num_nonfinite": 0,
        "train_seconds": {},
        "recipe": HOSTILE,
        "seed": 0,
        "versions": {"torch": "1"},
        "input_size": [3, 8, 8],
        "device": "cpu (x)",
        "dtype": "float32",
        "threads": 1,
        "latency_batch_size": 1,
        "latency_rounds": 1,
    }


def test_a_report_of_hostile_names_is_a_table_a_page_and_a_picture() -> None:
    report: Any = hostile_report()
    table, page = format_table(report), format_markdown(report)
    for text in (table, page):
        assert text.replace("\n", "").isprintable()
    assert len(table.splitlines()) == 2 + 3 + 1 + 5
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert {row.replace("\\|", "").count("|") for row in rows} == {rows[0].count("|")}
    assert "<script>" not in page
    assert isinstance(draw_report(report), Figure)  # which lays all text out: no mathematics in it


def test_a_card_of_hostile_names_is_valid() -> None:
    model = sd.wrap("test_resnet", num_classes=2, image_size=64)
    report: Any = hostile_report()
    recipe = "data:\n  path: a\n```\n<script>\n"
    training = Training(HOSTILE, False, "me/x](http://evil)", recipe, report, format_markdown(report))
    card = model_card(model, training)
    front = card.split("\n---\n")[0].removeprefix("---\n")
    metadata = yaml.safe_load(front)
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == printable(HOSTILE)
    assert ModelCard(card).data["pipeline_tag"] == "image-classification"
    text = card.removeprefix("---\n").split("\n---\n", 1)[1]
    assert text.replace("\n", "").isprintable()
    assert "[me/x\\](http://evil)](https://huggingface.co/me/x%5D%28http://evil%29)" in text
    assert f"````yaml\n{recipe}````" in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Illegal header value b'Bearer {TOKEN}\\n'", "Illegal header value b'Bearer ***\\n'"),
        ("b'Bearer other-kind-of-token\\n'", "b'Bearer ***\\n'"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("{'authorization': 'Bearer abc.def'}", "{'authorization': 'Bearer ***'}"),
        (f"https://me:{TOKEN}@huggingface.co/me/net", "https://***@huggingface.co/me/net"),
        ("https://h/x?a=1&X-Amz-Signature=0af&token=t&b=2", "https://h/x?a=1&X-Amz-Signature=***&token=***&b=2"),
        ("no bearer tokens here, basic as it is: hf_hub_download, hf-hub:me/net, a@b.c, https://h/a@main", None),
    ],
)
def test_what_looks_like_a_token_is_left_out(text: str, clean: str | None) -> None:
    assert redact(text) == (text if clean is None else clean)


def test_tokens_that_are_known_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact("a secret1 b", ["secret1\n"]) == "a *** b"
    monkeypatch.setenv("HF_TOKEN", "plain-token\n")
    assert redact("x plain-token\\n y") == "x ***\\n y"
    assert printable_message("plain-token\n\x1b") == "***\n\\x1b"
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "push with %s", ("plain-token",), None)
    assert PrintableFormatter("%(message)s").format(record) == "push with ***"


def test_places_are_named_by_what_stands_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    places = {"/home/alice/client/imgs": "imgs", "/home/alice/client": "client"}
    text = (
        "`/home/alice/client/imgs` /home/alice/client/run /home/alicex /home/alice/x/y.txt, /home/alice /srv/home/alice"
    )
    assert without_places(text, places) == "`imgs` client/run /home/alicex y.txt, ~ /srv/home/alice"
    monkeypatch.setenv("HOME", "/")
    assert without_places("/ a/b", {}) == "/ a/b"
    assert without_places(str(Path("/a/b")), {"/a": "\\1"}) == "\\1/b"
