"""Every notebook runs from top to bottom, in its quick mode; those with widgets do so in tests/browser, where there is a browser."""

import json
import re

import nbformat
import pytest
from course import CHROMIUM, NOTEBOOKS, WITH_WIDGETS, check_like_kept, check_ran, execute, figures, in_quick_mode
from nbclient import NotebookClient


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if not CHROMIUM or p not in WITH_WIDGETS], ids=lambda p: p.stem)
def test_runs_in_quick_mode(path, tmp_path):
    notebook = in_quick_mode(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    check_ran(notebook)
    check_like_kept(path, notebook)


def test_another_figure_or_another_kind_of_output_is_noticed(tmp_path):
    """What check_like_kept says of a notebook whose outputs are not what the code gives."""
    def notebook(*texts, **metadata):
        cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=text) for text in texts])
        return nbformat.v4.new_notebook(cells=[cell], metadata=metadata)

    path = tmp_path / "kept.ipynb"
    many = [f"{i}: 50 % [40, 60]" for i in range(20)]
    nbformat.write(notebook(*many, executed={}), path)
    assert figures(notebook("0.91 [0.88, 0.93] and -0.1 [-0.2, 0]")) == [[(0.91, 0.88, 0.93), (-0.1, -0.2, 0.0)]]
    tagged = notebook("50 % [40, 60]")
    tagged.cells[0].metadata["tags"] = ["quick-trains-less"]
    assert figures(tagged) == [[]]
    check_like_kept(path, notebook(*many[1:], "70 % [59, 80]"))
    check_like_kept(path, notebook(*many[1:], "90 % [80, 99]"))
    with pytest.raises(AssertionError, match=r"50.0 \[40.0, 60.0\] is kept, now 90.0 \[80.0, 99.0\]"):
        check_like_kept(path, notebook(*many[2:], *["90 % [80, 99]"] * 2))
    with pytest.raises(AssertionError, match="another kind"):
        check_like_kept(path, notebook())


def test_only_what_shows_stored_tables_is_run_anew_and_only_where_the_rest_is_as_it_was():
    def cell(source, *tags):
        return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}, outputs=[nbformat.v4.new_output("stream", text="before")])

    cells = [cell("QUICK = False", "parameters"), cell("print(QUICK)"), cell("print('table', QUICK)", "stored")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"executed": {}})
    notebook.metadata["executed"]["source"] = execute.source_hash(notebook)
    execute.run_stored(notebook)
    assert [[o.text for o in c.outputs] for c in notebook.cells] == [["before"], ["before"], ["table True\n"]] and notebook.cells[0].source == "QUICK = False"
    notebook.cells[1].source = "print(1)"
    with pytest.raises(ValueError, match="run it in full"):
        execute.run_stored(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_outputs_are_those_of_this_source(path):
    notebook = nbformat.read(path, as_version=4)
    about = notebook.metadata.get("executed")
    if about is None:
        assert not any(c.outputs for c in notebook.cells if c.cell_type == "code"), "outputs that notebooks/execute.py did not write"
    else:
        check_ran(notebook)
        assert about["source"] == execute.source_hash(notebook), "the source has changed: run notebooks/execute.py again"
        if execute.code_cells(notebook, stored=True):
            assert about["stored"] == execute.source_hash(notebook, stored=True), "cells that show stored tables have changed: run notebooks/execute.py --stored"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_fit_to_commit(path):
    """Has a kernel, is small, and holds no widget state and no path of the machine that ran it."""
    notebook = nbformat.read(path, as_version=4)
    text = path.read_text(encoding="utf-8")
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 1_000_000
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 100], "JupyterLab cuts such lines off"
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


STAND_INS = """
import numpy as np
from safelab import experiments

def row(cell, **_):
    share = {"initial": 0.05, "sft": 0.95}.get(cell.defense, 0.3)
    flags = {key: [i < 40 * share for i in range(40)] for key in ("asr", "asr_strongreject", "over_refusal", "utility")}
    budget = {} if cell.defense == "initial" else {"learning_rate": cell.learning_rate or 2e-3, "epochs": cell.epochs or 1}
    return {"attack": cell.attack, "defense": cell.defense, "seed": cell.seed, "has_task": cell.attack == "mixture-10", "flags": flags, "budget": budget,
            "step_seconds": 1.0, "train_seconds": 9.0, "peak_memory_mb": 1, "settings": {}}

def run_grid(cells, **options):
    return [row(cell) for cell in cells]

def ablate(attack, setting, values, **_):
    cells = experiments.summarise_grid([row(experiments.Cell(attack, "adaptive-probe", 0))])
    return [{"setting": setting, "value": v} | {k: x for k, x in cells[0].items() if isinstance(x, dict)} for v in values]

experiments.run_grid, experiments.ablate = run_grid, ablate
"""
"""What a notebook runs in the place of an hour's training."""


def test_the_stored_tables_are_explored_where_they_are(tmp_path):
    """Notebook 5 with a main table and one of tuned attackers, as they will be stored; nothing is trained."""
    tables = "\n".join([
        STAND_INS,
        "import json, pathlib",
        "from safelab.defenses import DEFENSES",
        "from safelab.experiments import grid, summarise_grid",
        "def keep(name, cells): pathlib.Path(name).write_text(json.dumps({'cells': summarise_grid(run_grid(cells)), 'command': 'safelab compare'}))",
        "keep('compare.json', grid(['mixture-10', 'backdoor', 'benign-drift'], list(DEFENSES), (0, 1)))",
        "keep('compare-tuned.json', grid(['explicit-100'], ['sft', 'adaptive-probe'], learning_rates=(5e-5, 2e-3), epochs=(1, 20)))",
        "keep('compare-disguises.json', grid(['explicit-50, role-play', 'explicit-50, refused prompts'], ['sft', 'adaptive-judge']))",
        "points = experiments.ablate('mixture-10', 'beta_max', (0.1, 0.5))",
        "pathlib.Path('ablations.json').write_text(json.dumps({'points': points, 'base': points[0], 'command': 'safelab ablate'}))",
    ])  # fmt: skip
    (path,) = [p for p in NOTEBOOKS if p.stem.startswith("05")]
    notebook = in_quick_mode(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(tables))
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += "\nTABLES = '.'"
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
    assert "Shown: the stored table, made by safelab compare." in said and "no stored table" not in said
    assert "Over 3 attacks: adaptive-probe ends within 3 points of the start in 0; the largest rise, by defence:" in said
    assert "mixture-10: the safe start answers 5 %" in said and "sft: at most 95 % [83, 99], n=40 of the harmful prompts answered (explicit-100, learning rate 5e-05, epochs 1)" in said
    figures = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
    assert "Made by safelab ablate." in said and "beta_max 0.5: 30 % [18, 45], n=40 of the harmful prompts answered; beside the defence as it is: no difference shown" in said
    assert len(figures) == 8  # a heat map, three attacks in two figures, tuned attackers, rewording asked both ways, the ablation and the stored ones


def test_a_model_a_data_set_and_prompts_of_ones_own(tmp_path, saved_model):
    """Notebook 6 with a tiny model in a folder, a file of pairs, a file of prompts and another judge."""
    pairs = [{"prompt": f"question {i}", "response": "I'm sorry, but I can't help with that." if i % 2 else f"answer {i}: steal <b>"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (tmp_path / "mine.csv").write_text("prompt,label\nhow to pick a lock,1\nhow to bake,0\nhello,\n", encoding="utf-8")
    (path,) = [p for p in NOTEBOOKS if p.stem.startswith("06")]
    notebook = in_quick_mode(path)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += f"\nMODEL, DATA, PROMPTS, JUDGE, OUT = {str(saved_model('llama3'))!r}, 'pairs.jsonl', 'mine.csv', 'patterns', 'made'"
    (both,) = [c for c in notebook.cells if c.cell_type == "code" and "BOTH = False" in c.source]
    both.source = both.source.replace("BOTH = False", "BOTH = True")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    check_ran(notebook)
    report = json.loads((tmp_path / "made" / "report.json").read_text(encoding="utf-8"))
    assert [(f["file"], f["rows"]) for f in report["files"]] == [("pairs.jsonl", 40), ("mine.csv", 3)]
    assert report["run"]["examples"] == report["audit"]["n"] == 32 and report["audit"]["risky"]["mean"] == 0.5 and report["audit"]["critic"] == report["run"]["critic"] == "patterns + words"
    assert {k: r["n"] for k, r in report["measured"]["protected"]["rates"].items()} == {"asr": 1, "over_refusal": 1, "refused": 1, "utility": 4}
    assert (tmp_path / "made" / "report.pdf").is_file() and "<b>" not in (tmp_path / "made" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "made" / "protected" / "adapter_config.json").is_file()
