"""The README's figures are those of the files that the named commands wrote."""

import json
from pathlib import Path

from safelab.cli import demo_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_headline_table_is_the_demo():
    demo = json.loads((ROOT / "figures" / "demo.json").read_text(encoding="utf-8"))
    assert demo_table(demo) in README
    assert demo["command"] in README


def test_safe_start_table_is_the_report():
    report = json.loads((ROOT / "data" / "safe-adapter" / "report.json").read_text(encoding="utf-8"))
    for name in ("advbench", "strongreject", "harmful", "twins", "everyday"):
        r = report[f"refusals_{name}"]
        assert f"{100 * r['mean']:.1f} % [{100 * r['lo']:.1f}, {100 * r['hi']:.1f}], n={r['n']}" in README


def test_every_file_linked_exists():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
