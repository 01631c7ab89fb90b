"""The notebooks, and what holds of each however it was run: by nbclient (tests/notebooks) or in a browser (tests/browser)."""

import shutil
from pathlib import Path

import nbformat

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WITH_WIDGETS = [path for path in NOTEBOOKS if "from safelab.widgets import" in path.read_text(encoding="utf-8")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
"""A browser that is on this machine, or None. Where there is one, the notebooks with widgets run in it and nowhere else."""


def in_quick_mode(path: Path):
    """The notebook without outputs, with QUICK = True in its parameters cell."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert "QUICK = " in parameters.source
    parameters.source += "\nQUICK = True"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def check_ran(notebook) -> None:
    """Every cell was run, none ended in an error, and every figure was drawn."""
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    errors = [f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"]
    assert not errors, errors
    assert all(c.execution_count for c in cells), "a cell was not run"
    shown = [o.data for o in outputs if "data" in o]
    assert not [data for data in shown if "Figure" in data.get("text/plain", "") and "image/png" not in data], "a figure that is not drawn"
