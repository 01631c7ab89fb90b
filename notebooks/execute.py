"""Run notebooks as they stand, in full, and keep their outputs in them: figures, tables and text, no widgets and no progress bars.

    python notebooks/execute.py 01 02        # those whose names begin so; without any, all
    python notebooks/execute.py --stored 05  # only the outputs of cells tagged ``stored``: tables that a quick run shows as a full one does; the rest runs in quick mode and stays as it is

How long each took, with which versions and from which source goes into its metadata; a test says when the source has changed since.
The figure of the cell tagged ``picture`` is kept, small, in ``pictures`` for the README's table.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from safelab.experiments import versions

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def code_cells(notebook, stored: bool) -> list:
    """The code cells that show stored tables (tagged ``stored``), or the others."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and ("stored" in cell.metadata.get("tags", [])) == stored]


def source_hash(notebook, stored: bool = False) -> str:
    """Hash of what the code cells say that show stored tables, or the others."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code_cells(notebook, stored)).encode()).hexdigest()[:16]


def without_widgets(executed):
    """The notebook with what a page without its kernel can show."""
    for cell in executed.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]
    executed.metadata.pop("widgets", None)
    return executed


def keep_picture(notebook, name: str) -> None:
    """``pictures/NAME.png``, 480 pixels wide, in 64 colours."""
    (cell,) = [c for c in notebook.cells if "picture" in c.metadata.get("tags", [])]
    (figure,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
    picture = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
    picture.thumbnail((480, 480), Image.Resampling.LANCZOS)
    (HERE / "pictures").mkdir(exist_ok=True)
    picture.quantize(64).save(HERE / "pictures" / f"{name}.png", optimize=True)


def run(notebook) -> None:
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()


def run_stored(notebook) -> None:
    """Run a copy in quick mode, and take over the outputs of the cells that show stored tables."""
    if notebook.metadata["executed"]["source"] != source_hash(notebook):
        raise ValueError("other cells than those tagged 'stored' have changed: run it in full")
    quick = copy.deepcopy(notebook)
    (parameters,) = [cell for cell in quick.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += "\nQUICK = True"
    run(quick)
    for cell, executed in zip(code_cells(notebook, stored=True), code_cells(quick, stored=True)):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count


def main(names: list[str]) -> None:
    only_stored = "--stored" in names
    names = [name for name in names if name != "--stored"]
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook, started = nbformat.read(path, as_version=4), time.monotonic()
        if only_stored:
            run_stored(notebook)
        else:
            language = dict(notebook.metadata.get("language_info", {}))
            run(notebook)
            notebook.metadata["language_info"] = language or notebook.metadata["language_info"]
            notebook.metadata["executed"] = {"source": source_hash(notebook), "seconds": round(time.monotonic() - started), "versions": versions()}
        if code_cells(notebook, stored=True):
            notebook.metadata["executed"]["stored"] = source_hash(notebook, stored=True)
        nbformat.write(without_widgets(notebook), path)
        keep_picture(notebook, path.stem)
        print(f"{path.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
