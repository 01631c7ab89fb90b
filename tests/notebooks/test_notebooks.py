"""Every notebook runs from top to bottom, in its quick mode; those with widgets do so in tests/browser, where there is a browser."""

import nbformat
import pytest
from course import CHROMIUM, NOTEBOOKS, WITH_WIDGETS, check_ran, in_quick_mode
from nbclient import NotebookClient


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if not CHROMIUM or p not in WITH_WIDGETS], ids=lambda p: p.stem)
def test_runs_in_quick_mode(path, tmp_path):
    notebook = in_quick_mode(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    check_ran(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_fit_to_commit(path):
    """Has a kernel, is small, and holds no widget state and no path of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    text = path.read_text(encoding="utf-8")
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 1_000_000
    assert not [word for word in ("/root/", "/home/", "/work/", "/tmp/", "site-packages") if word in text]
