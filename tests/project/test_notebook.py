"""scripts/colab_t4.ipynb, executed with the tiny base in place of the 8B model."""

import json
import zipfile

import nbformat
import pytest
from helpers import ROOT, SHORT
from nbclient import NotebookClient


@pytest.mark.slow
def test_the_notebook_trains_asks_and_keeps_the_adapter(tmp_path):
    notebook = nbformat.read(ROOT / "scripts" / "colab_t4.ipynb", as_version=4)
    cells = {cell.metadata.tags[0]: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert list(cells) == ["install", "data", "parameters", "train", "loss", "ask", "evaluate", "keep"]
    cells["install"].source = ""  # the package is installed where tests run
    cells["parameters"].source = (
        f"OVERRIDES = {[*SHORT, 'logger=none']!r}\n"
        "EVALUATE = ['run_dir=latest', 'generation.max_new_tokens=2', 'resamples=100']"
    )
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def text(tag):
        return "".join(output.get("text", "") for output in cells[tag].outputs)

    assert "saved" in text("train")
    [metrics] = tmp_path.glob("outputs/*/*/metrics.json")
    assert json.loads(metrics.read_text())["optimizer_steps"] == 12
    assert "image/png" in cells["loss"].outputs[0].data
    assert text("ask").strip()
    assert "all (64)" in text("evaluate")
    with zipfile.ZipFile(tmp_path / "intern_run.zip") as packed:
        names = packed.namelist()
    assert any(name.endswith("adapter/adapter_model.safetensors") for name in names)
    assert not any("checkpoint" in name for name in names)
