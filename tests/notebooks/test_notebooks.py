"""Every notebook runs from top to bottom, in its quick mode."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def in_quick_mode(notebook):
    """The same notebook with QUICK = True in its parameters cell."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert "QUICK = " in cell.source
    cell.source += "\nQUICK = True"
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_in_quick_mode(path, tmp_path):
    notebook = in_quick_mode(nbformat.read(path, as_version=4))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
    shown = [o.data for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    assert not [data for data in shown if "Figure" in data.get("text/plain", "") and "image/png" not in data], "a figure that is not drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_fit_to_commit(path):
    """Has a kernel, is small, and holds no widget state and no path of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    text = path.read_text(encoding="utf-8")
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 1_000_000
    assert not [word for word in ("/root/", "/home/", "/work/", "/tmp/", "site-packages") if word in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_has_the_form_of_the_course(path):
    """Says what one will be able to do and how long it takes, asks before it shows, checks in place, and leads on."""
    cells = nbformat.read(path, as_version=4).cells
    first, last = cells[0].source, cells[-1].source
    assert "In this notebook you will" in first and re.search(r"\*Quick\* mode takes (about|under) \d+ minutes on two CPU cores", first)
    assert len(re.findall(r"^\d\. \*\*", first, re.M)) >= 3
    text = [c.source for c in cells]
    asked, checked = (next(i for i, source in enumerate(text) if i and what in source) for what in ("**Predict", "## Check yourself"))
    assert asked < checked < len(cells) - 1
    assert any(c.cell_type == "code" and "assert " in c.source for c in cells[checked:])
    assert last.startswith("## Things to try") and "**Read:**" in last
    after = NOTEBOOKS[(NOTEBOOKS.index(path) + 1) % len(NOTEBOOKS)]
    assert f"[{after.stem}]({after.name})" in last
    for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", "\n".join(text)):
        assert (path.parent / target).is_file(), target
