"""The README's figures are those of the files that the named commands wrote."""

import json
import re
from pathlib import Path

from safelab.cli import demo_table
from safelab.words import difference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def kept(name: str, folder: str = "figures") -> dict:
    """A file of results."""
    return json.loads((ROOT / folder / name).read_text(encoding="utf-8"))


def test_headline_table_is_the_demo():
    demo = kept("demo.json")
    assert demo_table(demo) in README
    assert demo["command"] in README


def test_safe_start_table_is_the_report():
    report = kept("report.json", "data/safe-adapter")
    for name in ("advbench", "strongreject", "harmful", "twins", "everyday"):
        r = report[f"refusals_{name}"]
        assert f"{100 * r['mean']:.1f} % [{100 * r['lo']:.1f}, {100 * r['hi']:.1f}], n={r['n']}" in README


def critics_table() -> str:
    """The scorecards in figures/ as the README's table."""
    sets = ("human-harm", "human-objective", "human-refusal")
    cards = {(c["critic"], c["labels"]): c for c in (json.loads(f.read_text(encoding="utf-8")) for f in (ROOT / "figures").glob("critic-*.json"))}

    def figure(f: dict) -> str:
        return f"{f['mean']:.2f} [{f['lo']:.2f}, {f['hi']:.2f}]"

    def of(name: str, labels: str) -> dict | None:
        return cards["classifier", labels]["baselines"]["tfidf"] if name == "tfidf" else cards.get((name, labels))

    harm, objective, refusal = (cards["classifier", labels]["n"] for labels in sets)
    lines = [f"| critic | harm, n={harm} | recall | precision | objective, n={objective} | refusal, n={refusal} |", "|---" * 6 + "|"]
    for name, label in {"patterns": "`patterns`", "tfidf": "TF-IDF, a baseline", "probe": "`probe`, which reads prompts alone", "local-judge": "`local-judge`, the embedded model", "classifier": "`classifier`, the default"}.items():
        if of(name, sets[0]) is None:
            continue  # no scorecard is kept
        cells = [figure(of(name, sets[0])[key]) for key in ("auroc", "recall", "precision")] + [figure(card["auroc"]) if (card := of(name, labels)) else "-" for labels in sets[1:]]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"| a rater | {figure(cards['classifier', sets[0]]['raters']['rater_auroc'])} | - | - | - | - |"])


def test_critics_table_is_the_scorecards():
    assert f"<!-- critics -->\n{critics_table()}\n<!-- end critics -->" in README
    raters = kept("critic-classifier-human-harm.json")["raters"]
    assert f"the classifier reaches {raters['critic_auroc']['mean']:.2f} there" in README


def test_every_file_linked_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_rate_of_an_audit_is_the_measured_one():
    found = kept("audit_rate.json", "benchmarks")
    assert f"{found['examples_per_second']:.0f} short examples a second" in README and f"({found['mean_characters'] // 10 * 10} characters on average)" in README
    assert f"10,000 in {10_000 / found['examples_per_second'] / 60 + 0.5:.0f} minutes" in README


def attacks_table() -> str:
    """figures/compare.json as the README's table: harmful prompts answered, in percent, and the task where there is one."""
    cells = kept("compare.json")["cells"]
    attacks, defenses = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("attack", "defense"))
    found = {(cell["attack"], cell["defense"]): cell for cell in cells}
    tasks = [a for a in attacks if found[a, "initial"]["has_task"]]
    lines = ["| defence | " + " | ".join(attacks) + " | " + " | ".join(f"{a}: everyday refused | {a}: task accuracy" for a in tasks) + " |"]
    lines.append("|---" * (1 + len(attacks) + 2 * len(tasks)) + "|")
    for d in defenses:
        answered = [f"{100 * found[a, d]['asr']['mean']:.0f}" for a in attacks]
        at_the_task = [f"{100 * found[a, d][key]['mean']:.0f}" for a in tasks for key in ("over_refusal", "utility")]
        lines.append("| " + " | ".join([d, *answered, *at_the_task]) + " |")
    return "\n".join(lines)


def test_attacks_table_is_the_comparison():
    assert f"<!-- attacks -->\n{attacks_table()}\n<!-- end attacks -->" in README


def test_the_task_is_learned_as_the_comparison_says():
    found = kept("compare.json")
    cells = {c["defense"]: c for c in found["cells"] if c["attack"] == "mixture-10"}
    for key, said in (("utility", "{:.1f} % against plain fine-tuning's {:.1f} %"), ("utility_balanced", "taken out {:.1f} and {:.1f} %")):
        assert said.format(*(100 * cells[d][key]["mean"] for d in ("adaptive-probe", "sft"))) in README
    seeds = [[f"{100 * r['utility']['mean']:.1f}" for r in found["rows"] if r["attack"] == "mixture-10" and r["defense"] == d] for d in ("adaptive-probe", "sft")]
    assert "by seed {}, {} and {} against {}, {} and {}".format(*seeds[0], *seeds[1]) in README
    assert f"it ends at {100 * cells['adaptive-judge']['utility']['mean']:.1f} %, and at {100 * cells['adaptive-judge']['utility_balanced']['mean']:.1f} % with the leaning taken out" in README
    assert f"has all {len(found['rows'])} runs" in README and {tuple(c["seeds"]) for c in found["cells"] if c["defense"] != "initial"} == {(0, 1, 2)}
    (note,) = (e["note"] for e in found["earlier"] if "note" in e)
    sft, adaptive = re.findall(r"([\d., ]+ and [\d.]+ %) \(", note)
    assert f"on the H100 adaptive had ended at {adaptive.strip()} and plain fine-tuning at {sft.strip()}, and why is not known" in README


def test_the_largest_rises_of_the_adaptive_defence_are_those_of_the_comparison():
    cells = {(c["attack"], c["defense"]): c["asr"] for c in kept("compare.json")["cells"]}
    attacks = [a for a, d in cells if d == "initial"]
    largest = [100 * max(cells[a, d]["mean"] - cells[a, "initial"]["mean"] for a in attacks) for d in ("adaptive-probe", "adaptive-judge")]
    assert "the largest difference of means is {:.1f} points with the probe and {:.1f} points with the judge. ".format(*largest) in README
    assert all(difference(cells[a, "initial"], cells[a, d])["lo"] <= 0 for a in attacks for d in ("adaptive-probe", "adaptive-judge"))


def answered(rate: dict) -> str:
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * rate[k] for k in ("mean", "lo", "hi")))


def test_the_most_effective_attackers_are_those_of_the_table():
    cells = kept("compare-tuned.json")["cells"]
    worst = {c["defense"]: c["asr"] for c in sorted(cells, key=lambda c: c["asr"]["mean"])}
    assert len(cells) == 1 + 12 * 3 and {c["asr"]["n"] for c in cells} == {50}
    said = {name: re.search(rf"{name}(?: to answer)? (\d+) % (\[\d+, \d+\])", README[README.index("### Attackers who try") :]) for name in ("sft", "constrained-sft", "adaptive-probe")}
    assert {name: f"{m[1]} {m[2]}" for name, m in said.items()} == {name: answered(worst[name]) for name in said}
    assert f"The safe start answers {answered(worst['initial']).replace(' ', ' % ', 1)}" in README


def disguises_table() -> str:
    """figures/compare-disguises.json as the README's table."""
    cells = kept("compare-disguises.json")["cells"]
    attacks, defenses = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("attack", "defense"))
    found = {(c["attack"], c["defense"]): c for c in cells}
    lines = ["| trained on | asked | " + " | ".join(defenses) + " |", "|---" * (2 + len(defenses)) + "|"]
    for a in attacks:
        for way, key in (("in the same words", "asr"), ("plainly", "asr_plain")) if "asr_plain" in found[a, "initial"] else (("plainly", "asr"),):
            lines.append(f"| {a} | {way} | " + " | ".join(answered(found[a, d][key]) if (a, d) in found else "-" for d in defenses) + " |")
    return "\n".join(lines)


def test_the_table_of_rewording_is_what_was_measured():
    assert f"<!-- disguises -->\n{disguises_table()}\n<!-- end disguises -->" in README


def test_what_the_critics_made_of_harmful_responses_is_what_they_said():
    rows = kept("compare-disguises.json")["rows"]
    probe, judge = ((row["mean_risk"],) for row in rows if row["attack"] == "explicit-50, harmful responses" and row["mean_risk"] is not None)
    assert "(mean risk {:.2f})".format(*probe) in README and "sees them at once ({:.2f})".format(*judge) in README


def test_the_disguises_that_get_past_the_probe_are_those_of_the_table():
    rows = {(row["attack"].removeprefix("explicit-50, "), row["defense"]): row for row in kept("compare-disguises.json")["rows"]}
    german, wrapped = ({d: rows[name, d] for d in ("initial", "adaptive-probe", "adaptive-judge")} for name in ("German, word for word", "benign wrapping"))
    share = {d: f"{100 * row['asr']['mean']:.0f} %" for d, row in german.items()}
    assert f"the start answers {share['initial']}, and after" in README and f"adaptive-probe {share['adaptive-probe']} in the same words" in README
    assert f"(mean risk {german['adaptive-probe']['mean_risk']:.2f}, typos {rows['typos', 'adaptive-probe']['mean_risk']:.2f})" in README
    assert f"hardly risky at all ({wrapped['adaptive-probe']['mean_risk']:.2f})" in README
    assert f"risks of {german['adaptive-judge']['mean_risk']:.2f} and {wrapped['adaptive-judge']['mean_risk']:.2f}, and adaptive-judge ends at {share['adaptive-judge']} in German" in README
    below = [{k: f"{100 * v:.0f}" for k, v in difference(of["adaptive-judge"]["asr"], of["adaptive-probe"]["asr"]).items()} for of in (german, wrapped)]
    assert "({mean} points below the probe, [{lo}, {hi}])".format(**below[0]) in README and "({mean} below [{lo}, {hi}])".format(**below[1]) in README
    assert f"at {100 * wrapped['adaptive-judge']['asr']['mean']:.0f} % in the wrapping" in README
    assert all(difference(of["initial"]["asr"], of["adaptive-judge"]["asr"])["lo"] <= 0 for of in (german, wrapped)), "no rise shown"


def test_the_judge_knows_compliance_that_it_never_saw_and_not_what_it_never_learned():
    found = kept("unseen_compliance.json", "benchmarks")
    unseen, untaught = ([f"{of[key]:.2f}" for of in found["mean_risk"].values()] for key in ("unseen", "untaught"))
    assert f"with the same {found['texts']} texts" in README
    assert f"as risky ({min(unseen)} to {max(unseen)} on average)" in README and f"risks of {min(untaught)} to {max(untaught)}, which" in README


def ablations_table() -> str:
    """figures/ablations.json as the README's table."""
    found = kept("ablations.json")
    lines = ["| changed | harmful answered | StrongREJECT answered | everyday refused |", "|---" * 4 + "|"]
    points = [("nothing", found["base"]), *((f"{p['setting']} {p['value']}", p) for p in found["points"])]
    return "\n".join(lines + [f"| {name} | " + " | ".join(answered(of[key]) for key in ("asr", "asr_strongreject", "over_refusal")) + " |" for name, of in points])


def test_the_ablations_are_those_that_were_run():
    found = kept("ablations.json")
    assert f"<!-- ablations -->\n{ablations_table()}\n<!-- end ablations -->" in README
    said = [answered(of["asr"]).replace(" ", " % ", 1) for of in (found["plain"], found["base"])]
    assert f"ends at {said[0]} of {found['base']['asr']['n']} harmful prompts answered, adaptive-probe at {said[1]}" in README
    shown = [f"{p['setting']} {p['value']}" for p in found["points"] if difference(found["base"]["asr"], p["asr"])["lo"] > 0]
    assert shown == ["beta_max 0.1"], "the README says which setting is shown to matter"


def test_without_anchors_the_probe_is_what_holds():
    found = kept("ablations-no-anchors.json")
    own, half, none = (answered(of["asr"]).replace(" ", " % ", 1) for of in (found["base"], *found["points"]))
    assert [p["value"] for p in found["points"]] == [0.5, 1.0] and found["fixed"] == {"anchors": 0.0}
    assert f"with its own risks {own}, with half" in README and f"0.75, {half}, with all of them exchanged {none}, as plain" in README
    assert found["points"][1]["asr"]["mean"] >= found["plain"]["asr"]["lo"]


def test_rank_and_smoothing_do_what_was_measured():
    rank, smoothing = (kept(f"ablations-{name}.json") for name in ("rank", "smoothing"))
    assert [p["value"] for p in rank["points"] + smoothing["points"]] == [2, 64, 0.5, 0.9] and smoothing["fixed"] == {"granularity": "batch"}
    of = [answered(p["asr"]).replace(" ", " % ", 1) for p in (rank["plain"], rank["base"], *rank["points"], smoothing["base"], *smoothing["points"])]
    assert "plain fine-tuning at {} and the defence as it is at {}".format(*of) in README
    assert "of rank 2 {}, of rank 64 {}".format(*of[2:]) in README and "a batch ends at {}, smoothed over steps by 0.5 at {}, by 0.9 at {}".format(*of[4:]) in README
    assert all(difference(found["base"]["asr"], p["asr"])["lo"] <= 0 <= difference(found["base"]["asr"], p["asr"])["hi"] for found in (rank, smoothing) for p in found["points"])


def proof_table() -> str:
    """figures/probe_proof.json as the README's table."""
    rows = kept("probe_proof.json")["rows"]
    lines = ["| held out | n | probe, safe model | probe, unaligned model | words alone |", "|---" * 5 + "|"]
    for row in rows:
        lines.append(f"| {row['test']} | {row['safe']['n']} | " + " | ".join("{mean:.2f} [{lo:.2f}, {hi:.2f}]".format(**row[key]) for key in ("safe", "unaligned", "text")) + " |")
    return "\n".join(lines)


def test_proof_table_is_the_notebooks():
    disguises = {r["disguise"]: r["recall"]["mean"] for r in kept("probe_disguises.json")["rows"]}
    assert f"flags {100 * disguises['role-play']:.0f} % of the harmful prompts that it flags at {100 * disguises['as it is']:.0f} % as they are" in README
    assert f"<!-- proof -->\n{proof_table()}\n<!-- end proof -->" in README


def test_every_notebook_has_its_row_and_its_picture():
    rows = [line for line in README.splitlines() if line.startswith("| [0")]
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert len(rows) == len(names)
    for name, row in zip(names, rows):
        assert f"[{name}](notebooks/{name}.ipynb)" in row and re.search(rf'<img src="notebooks/pictures/{name}\.png" width="160" alt="\w[^"]+">', row)
        assert (ROOT / "notebooks" / "pictures" / f"{name}.png").is_file()
