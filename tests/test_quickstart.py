"""docs/quickstart.ipynb: its cells run, in a kernel too, and show what is committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
LARGEST = 200_000
"""Bytes that the notebook may have, outputs included."""


def source(cells: list[dict[str, Any]] = CELLS) -> str:
    """The code of all cells as one script."""
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def shown(cell: dict[str, Any]) -> list[list[str]]:
    """The kinds of a cell's outputs: a stream's name, or the forms of what is displayed."""
    return [sorted(out["data"]) if "data" in out else [out["name"]] for out in cell["outputs"]]


def text(cell: dict[str, Any]) -> str:
    """What a cell prints."""
    return "".join("".join(out.get("text", "")) for out in cell["outputs"])


def test_the_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    variables: dict[str, Any] = {}
    exec(source().replace("epochs=8", "epochs=1"), variables)
    plt.close("all")
    out = capsys.readouterr().out
    assert "Prediction('pictures/test/0/0000.png', label='" in out
    assert list(variables["history"]["train_top1"].index) == [1]
    assert variables["exported"].path.name == "best.onnx"
    assert (tmp_path / "runs" / "pictures-1" / "best.onnx").exists()
    assert len(variables["features"]) == len(variables["predictions"]) == 360


def test_the_committed_outputs_are_small_and_whole() -> None:
    assert NOTEBOOK.stat().st_size < LARGEST
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    said = "".join(map(text, code))
    assert "epoch 8/8  train loss" in said
    assert not any(word in said for word in ("warning", "Traceback", "/tmp", "/home"))


STREAM = """
import time

def frames():
    for _ in range(300):
        time.sleep(0.005)
        yield np.zeros((8, 8, 3), np.uint8)

print(len(list(distcls.load(result.out, quiet={quiet}).stream(frames()))))
"""


@pytest.mark.slow
def test_a_kernel_shows_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is one output that changes, and is gone at the end."""
    nbclient = pytest.importorskip("nbclient", reason="distcls[dev] is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="distcls[dev] is not installed")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    streams = [nbformat.v4.new_code_cell(STREAM.format(quiet=quiet)) for quiet in ("False", "True")]
    notebook.cells += streams
    bars: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc]
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            if message["msg_type"] in ("display_data", "update_display_data"):
                bars.append(message["content"]["data"]["text/plain"])
            return super().process_message(message, cell, index)

    resources = {"metadata": {"path": str(tmp_path)}}
    Client(notebook, timeout=200, coalesce_streams=True, resources=resources).execute()
    for cell, committed in zip(notebook.cells, CELLS, strict=False):
        if cell["cell_type"] == "code":
            assert sorted(shown(cell)) == sorted(shown(committed)), text(cell)
    assert any("at most" in bar and "images/s" in bar for bar in bars)
    assert any(bar.startswith("predicting, ") for bar in bars)
    assert [shown(cell) for cell in streams] == [
        [["text/html", "text/plain"], ["stdout"]],
        [["stdout"]],
    ]
    assert bars[-1] == ""
    assert len(bars) < 100
