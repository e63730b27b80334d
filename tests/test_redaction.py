"""Tokens stand in no message, and places of this machine in nothing that is shared."""

import logging
from pathlib import Path

import pytest

from timm_selfdistill.escape import PrintableFormatter, printable_message, redact, without_places

TOKEN = "hf_" + "aB3" * 11


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
