"""What processes send each other: the formula against what two of them count, and the page against the formula."""

from pathlib import Path

import pytest
from all_reduce import MODELS, formula, measure, paper_table

import timm_selfdistill as sd

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()


@pytest.mark.multiprocess
def test_two_processes_send_what_the_formula_says():
    expected = formula("test_resnet", "auto")
    first, second = measure("test_resnet", "auto")
    assert first.bucket_bytes == second.bucket_bytes == expected.gradient_bytes
    assert first.all_reduces == second.all_reduces > 0
    assert expected.buffer_bytes > 0
    assert first.received == pytest.approx(expected.gradient_bytes, rel=0.01)
    assert second.received == pytest.approx(expected.gradient_bytes + expected.buffer_bytes, rel=0.01)


def test_the_heads_add_their_parameters_and_nothing_else():
    plain, wrapped = formula("test_vit", "none"), formula("test_vit", "linear")
    heads = sum(p.numel() for p in sd.wrap("test_vit", num_classes=1000, head="linear").heads.parameters())
    assert plain.gradient_bytes == 4 * plain.parameters
    assert wrapped.gradient_bytes - plain.gradient_bytes == 4 * heads > 0
    assert wrapped.macs > plain.macs
    assert (plain.received(2), plain.received(8)) == (plain.gradient_bytes, 1.75 * plain.gradient_bytes)


def test_the_page_has_the_formulas_numbers():
    for line in paper_table([formula(model, head) for model, heads in MODELS.items() for head in heads]):
        assert line in PAGE


def test_what_was_measured_is_what_the_formula_says():
    rows = [line.strip("|").split("|") for line in PAGE.split("## Measured")[1].splitlines() if line.startswith("|")][
        2:
    ]
    assert len(rows) == sum(map(len, MODELS.values()))
    for model, head, by_formula, counted, *_, first, second in ([cell.strip() for cell in row] for row in rows):
        assert by_formula == counted == f"{formula(model, head).gradient_bytes:,}"
        assert (float(first), float(second)) == pytest.approx((1, 1), abs=1e-3)
