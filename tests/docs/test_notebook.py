"""The notebook of the documentation: it runs, and it is stored with its outputs."""

from pathlib import Path

import pytest

from tests.docs.pages import ROOT

NOTEBOOK = ROOT / "docs/guides/use/notebook.ipynb"

nbformat = pytest.importorskip("nbformat", reason="no nbconvert in this environment")
preprocessors = pytest.importorskip("nbconvert.preprocessors", reason="no nbconvert in this environment")


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    preprocessors.ExecutePreprocessor(timeout=240).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    assert (tmp_path / "runs/email/checkpoints").is_dir()


def test_notebook_is_stored_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
