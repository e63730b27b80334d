"""docs/tutorial.ipynb: its cells run, one after the other."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
SMALL = "epochs, limit = 1, 100"  # what papermill would set


def cells() -> list[tuple[str, bool]]:
    """Return the code of each cell, and whether it holds the parameters."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in found if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())) for cell in code]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    torch.manual_seed(0)
    shared = {"__name__": "notebook"}
    for source, has_parameters in cells():
        exec(compile(source, str(NOTEBOOK), "exec"), shared)
        if has_parameters:
            exec(SMALL, shared)
    printed = capsys.readouterr().out
    assert "1797 images" in printed
    assert "same logits as here: True" in printed
    assert (tmp_path / "tutorial-run" / "calibration.json").is_file()


def test_the_notebook_was_saved_with_its_pictures() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error"]
