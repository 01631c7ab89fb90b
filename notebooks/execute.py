"""Run notebooks as they stand, in full, and keep their outputs in them: figures, tables and text, no widgets and no progress bars.

    python notebooks/execute.py 01 02        # those whose names begin so; without any, all

How long each took, with which versions and from which source goes into its metadata; a test says when the source has changed since.
The figure of the cell tagged ``picture`` is kept, small, in ``pictures`` for the README's table.
"""

from __future__ import annotations

import base64
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


def source_hash(notebook) -> str:
    """Hash of what the code cells say."""
    return hashlib.sha256("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").encode()).hexdigest()[:16]


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


def main(names: list[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook, started = nbformat.read(path, as_version=4), time.monotonic()
        language = dict(notebook.metadata.get("language_info", {}))
        NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
        notebook.metadata["language_info"] = language or notebook.metadata["language_info"]
        notebook.metadata["executed"] = {"source": source_hash(notebook), "seconds": round(time.monotonic() - started), "versions": versions()}
        nbformat.write(without_widgets(notebook), path)
        keep_picture(notebook, path.stem)
        print(f"{path.name}: {notebook.metadata['executed']['seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
