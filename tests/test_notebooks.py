"""The notebooks run from the first cell to the last, and are kept without outputs, so that they stay small."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_three_that_install_first_and_hold_no_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    for file in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        assert "pip" in cells[0].source
        assert not any(cell.outputs for cell in cells)
        assert file.stat().st_size < 20_000


@pytest.mark.slow  # each trains for a minute or so
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_runs(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert len(nbformat.writes(notebook)) < 300_000
    assert not any(output.output_type == "error" for output in outputs)
    if file.stem == "1_first_ensemble":
        text = "".join(output.get("text", "") for output in outputs)
        assert text.count("schools:") == 2
