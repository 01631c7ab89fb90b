"""The notebooks, and what holds of each however it was run: by nbclient (tests/notebooks) or in a browser (tests/browser)."""

import copy
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WITH_WIDGETS = [path for path in NOTEBOOKS if "from safelab.widgets import" in path.read_text(encoding="utf-8")]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
"""A browser that is on this machine, or None. Where there is one, the notebooks with widgets run in it and nowhere else."""

spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS[0].parent / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


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


INTERVAL = re.compile(r"(-?\d+(?:\.\d+)?)(?: %)? \[(-?\d+(?:\.\d+)?), (-?\d+(?:\.\d+)?)\]")
"""A figure with its interval, as every table and sentence writes it: ``0.91 [0.88, 0.93]``, ``3 % [1, 8]``."""


def check_like_kept(path: Path, notebook) -> None:
    """A quick run shows, cell by cell, the kinds of output that the committed full run has, and figures whose 95 % intervals meet.

    One in twenty may miss, as intervals do. Nothing is compared where no outputs are kept, and no figures in cells tagged
    ``quick-trains-less``: what comes of 2 epochs is not to be found in the interval of 16.
    """
    kept = nbformat.read(path, as_version=4)
    if "executed" not in kept.metadata:
        return
    now = execute.without_widgets(copy.deepcopy(notebook))
    assert shown(kept) == shown(now), "run notebooks/execute.py again: its outputs are of another kind now"
    both = [(a, b) for then, here in zip(figures(kept), figures(now)) if len(then) == len(here) for a, b in zip(then, here)]
    apart = [f"{a[0]} [{a[1]}, {a[2]}] is kept, now {b[0]} [{b[1]}, {b[2]}]" for a, b in both if a[1] > b[2] or b[1] > a[2]]
    assert len(apart) <= max(1, len(both) / 20), apart


def shown(notebook) -> list[set]:
    """Which of figures, tables and text each code cell shows."""
    outputs = [c.outputs for c in notebook.cells if c.cell_type == "code"]
    return [{kind for o in of for kind in (o.get("data") or [o.output_type]) if kind != "text/plain"} for of in outputs]


def figures(notebook) -> list[list[tuple[float, float, float]]]:
    """Each code cell's figures with an interval, as (value, lo, hi); none of a cell whose quick run trains less."""
    texts = [
        [o.get("text") or o.get("data", {}).get("text/html") or o.get("data", {}).get("text/plain") or "" for o in cell.outputs if "quick-trains-less" not in cell.metadata.get("tags", [])]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [[tuple(map(float, found)) for text in of for found in INTERVAL.findall(text)] for of in texts]
