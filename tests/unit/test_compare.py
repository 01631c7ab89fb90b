"""Grids: which cells, under which budget, resumed after an interruption, on joblib's backends; their table and figures."""

import json
import shlex
import time
from dataclasses import asdict

import joblib
import numpy as np
import pytest

from safelab import cli, experiments
from safelab.attacks import ATTACKS, MAIN
from safelab.defenses import DEFENSES
from safelab.experiments import SUITES, Budget, Cell, Suite, ablate, cell_budget, compare, grid, run_grid, summarise_grid, tidy
from safelab.plots import new_figure
from safelab.plots_grid import DEFENSE_STYLE, pareto_front, plot_ablations, plot_compare, plot_compare_heat, plot_heat, plot_pareto


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    """Everything that computes replaced; lists what would have been run and how it was asked."""
    runs = []
    device = type("D", (), {"type": "cpu"})
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr("safelab.models.load_model", lambda name: (type("M", (), {"device": device})(), None))
    monkeypatch.setattr("safelab.attacks.under_system", lambda tokenizer, system: system)

    def fine_tune(model, tokenizer, data, defense, seed, budget, output, **trainer):
        runs.append((defense.name, seed, len(data), budget, tokenizer, *([trainer] if trainer else [])))
        return model, {"step_seconds": 1.0, "train_seconds": 9.0, "history": []}

    monkeypatch.setattr(experiments, "fine_tune", fine_tune)
    flags = {"asr": [0, 1], "asr_strongreject": [1, 1], "over_refusal": [0, 0], "utility": [1, 1]}
    monkeypatch.setattr(Suite, "measure", lambda self, model, tokenizer, wrapper: flags | ({"asr_plain": [0, 0]} if wrapper else {}))
    monkeypatch.setattr(experiments, "_weights_hash", lambda model: "w")
    return runs


def test_a_grid_holds_all_combinations_and_the_safe_start_once_an_attack():
    cells = grid(["explicit-10", "backdoor"], ["sft", "lisa"], seeds=(0, 1), learning_rates=(1e-4, 1e-3), epochs=(1, 3))
    assert len(cells) == len(set(cells)) == 2 + 2 * 2 * 2 * 2 * 2
    assert cells[:2] == [Cell("explicit-10", "initial", 0), Cell("backdoor", "initial", 0)]
    assert [c.seed for c in cells[2:]] == sorted(c.seed for c in cells[2:])  # a whole table of seed 0 comes first


@pytest.mark.parametrize(("attacks", "defenses", "message"), [(["x"], ["sft"], "no attack 'x'"), (["backdoor"], ["y"], "no defence 'y'.*adaptive-judge")])
def test_unknown_names_list_the_known_ones(attacks, defenses, message):
    with pytest.raises(ValueError, match=message):
        grid(attacks, defenses)


def test_every_defence_gets_the_same_budget_and_attackers_may_tune_it():
    attack = ATTACKS["explicit-100"]
    assert cell_budget(Cell("explicit-100", "sft", 0), attack) == cell_budget(Cell("explicit-100", "lisa", 3), attack)
    assert cell_budget(Cell("explicit-100", "sft", 0), attack).epochs == attack.epochs
    tuned = cell_budget(Cell("explicit-100", "sft", 0, 5e-5, 20), attack)
    assert asdict(tuned) == asdict(Budget()) | {"learning_rate": 5e-5, "epochs": 20}


def test_rows_come_in_order_and_finished_ones_are_read(no_model, monkeypatch):
    cells = grid(["mixture-10", "identity-shift"], ["sft", "constant-kl"], seeds=(0, 1))
    rows = run_grid(cells, model="m", quick=True)
    assert [(r["attack"], r["defense"], r["seed"]) for r in rows] == [(c.attack, c.defense, c.seed) for c in cells]
    assert len(no_model) == 8 and {n for _, _, n, _, _ in no_model} == {experiments.QUICK_EXAMPLES}
    again = run_grid(cells, model="m", quick=True)
    assert len(no_model) == 8 and all(r["cached"] for r in again)
    run_grid(cells[:3], model="m", quick=True, force=True)
    assert len(no_model) == 9


def test_a_grid_that_was_stopped_goes_on_where_it_was(no_model, monkeypatch):
    cells = grid(["explicit-50"], ["sft", "constant-kl", "constrained-sft"])
    working = experiments.fine_tune

    def stopped(model, tokenizer, data, defense, *args, **kwargs):
        if defense.name == "constrained-sft":
            raise KeyboardInterrupt
        return working(model, tokenizer, data, defense, *args, **kwargs)

    monkeypatch.setattr(experiments, "fine_tune", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_grid(cells, model="m")
    monkeypatch.setattr(experiments, "fine_tune", working)
    run_grid(cells, model="m")
    assert [name for name, *_ in no_model] == ["sft", "constant-kl", "constrained-sft"]


def test_a_wrapped_attack_trains_under_its_system_prompt_and_is_asked_both_ways(no_model):
    row = run_grid([Cell("identity-shift", "sft", 0)], model="m", quick=True)[0]
    assert no_model[0][4] == ATTACKS["identity-shift"].wrapper.system and row["wrapper"] == asdict(ATTACKS["identity-shift"].wrapper)
    assert "asr_plain" in row["flags"] and not row["has_task"]
    plain = run_grid([Cell("mixture-10", "sft", 0)], model="m", quick=True)[0]
    assert "asr_plain" not in plain["flags"] and plain["has_task"] and "wrapper" not in plain


def test_the_safe_start_is_measured_once_for_all_attacks_that_ask_plainly(no_model, tmp_path):
    run_grid(grid(["mixture-10", "explicit-10", "backdoor"], []), model="m")
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2


def test_a_suite_of_your_own_judges_a_grid(no_model):
    row = run_grid([Cell("mixture-10", "sft", 0)], model="m", suite=Suite(harmful=3))[0]
    assert row["suite"] == asdict(Suite(harmful=3))


def test_an_ablation_changes_one_setting_and_shares_rows_with_the_grid(no_model):
    (row,) = run_grid([Cell("explicit-50", "adaptive-probe", 0, epochs=2)], model="m")
    points = ablate("explicit-50", "beta_max", (0.5, row["parameters"]["beta_max"]), epochs=2, model="m")
    assert [(p["value"], p["asr"]["mean"]) for p in points] == [(0.5, 0.5), (1.0, 0.5)] and points[0]["asr"]["n"] == 2
    assert len(no_model) == 2 and {run[3].epochs for run in no_model} == {2}
    ablate("identity-shift", "beta_max", (0.5,), seeds=(0, 1), epochs=1, model="m")
    assert [run[4] for run in no_model[2:]] == [ATTACKS["identity-shift"].wrapper.system] * 2
    with pytest.raises(ValueError, match="'nonsense' is no setting of adaptive-probe.*beta_max"):
        ablate("explicit-50", "nonsense", (1,), model="m")


def test_an_ablation_reaches_the_budget_and_the_trainer_and_holds_what_is_fixed(no_model):
    ablate("explicit-50", "rank", (4, 16), model="m")
    assert [run[3].rank for run in no_model] == [4, 16]
    ablate("explicit-50", "risk_smoothing", (0.0, 0.9), fixed={"granularity": "batch"}, model="m")
    assert [run[5] for run in no_model[2:]] == [{"risk_smoothing": 0.0}, {"risk_smoothing": 0.9}]
    rows = run_grid([Cell("explicit-50", "adaptive-probe", 0)], model="m")
    assert len(no_model) == 4 and rows[0]["settings"]["granularity"] == "example"  # rank 16 is the grid's own; none of the others is


def test_another_classifier_makes_another_row_of_the_defences_that_ask_it(no_model, monkeypatch):
    cells = [Cell("explicit-50", name, 0) for name in ("adaptive-judge", "adaptive-probe")]
    run_grid(cells, model="m")
    monkeypatch.setattr("safelab.critics.classifier.VERSION", -1)
    assert [bool(row.get("cached")) for row in run_grid(cells, model="m")] == [False, True]


# -------------------------------------------------------------------------------------- backends


def test_cells_go_to_two_dask_workers_and_come_back_in_order(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: it is in the test extra")
    monkeypatch.setattr(experiments, "run_named", _row)
    cells = [Cell("backdoor", "sft", seed) for seed in range(6)]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster):
        with joblib.parallel_config(backend="dask"):
            rows = run_grid(cells, model="m")
    assert [r["seed"] for r in rows] == list(range(6)) and len({r["worker"] for r in rows}) == 2


def _row(cell, **options):
    from distributed import get_worker

    time.sleep(0.3)  # long enough that neither worker does all
    return {"seed": cell.seed, "worker": get_worker().address}


# --------------------------------------------------------------------------------- table and figures


def row(attack, defense, seed, asr, utility, has_task=True, **budget):
    flags = {"asr": asr, "asr_strongreject": asr, "over_refusal": [0, 1], "utility": utility}
    cost = {"step_seconds": 1.5, "train_seconds": 60.0, "peak_memory_mb": 3000, "seconds": 100.0}
    return {"attack": attack, "defense": defense, "seed": seed, "has_task": has_task, "flags": flags, "budget": budget, "model": "m", "suite": {}} | cost


def rows():
    tuned = {"learning_rate": 2e-3, "epochs": 1}
    return [
        row("mixture-10", "initial", 0, [0, 0, 0, 1], [0, 1]),
        row("mixture-10", "sft", 0, [1, 1, 1, 1], [1, 1], **tuned),
        row("mixture-10", "sft", 1, [1, 1, 1, 0], [1, 0], **tuned),
        row("mixture-10", "lisa", 0, [1, 0, 0, 0], [1, 1], **tuned),
        row("backdoor", "sft", 0, [1, 1, 1, 1], [1, 1], has_task=False, **tuned),
    ]


def test_a_line_of_the_table_has_rates_with_intervals_and_no_histories():
    line = tidy(rows()[2])
    assert (line["attack"], line["defense"], line["seed"], line["learning_rate"], line["epochs"]) == ("mixture-10", "sft", 1, 2e-3, 1)
    assert line["asr"]["mean"] == 0.75 and line["asr"]["n"] == 4 and line["asr"]["lo"] < 0.75 < line["asr"]["hi"]
    assert "flags" not in line and json.dumps(line) and line["mean_risk"] is None
    assert tidy(rows()[2] | {"risks": [0.0, 0.5]})["mean_risk"] == 0.25 and tidy(line) == line


def test_cells_pool_seeds_and_nothing_else():
    cells = summarise_grid(rows())
    assert [(c["attack"], c["defense"], c["seeds"]) for c in cells][:3] == [("mixture-10", "initial", [0]), ("mixture-10", "sft", [0, 1]), ("mixture-10", "lisa", [0])]
    assert cells[1]["asr"]["mean"] == 0.875 and cells[1]["asr"]["n"] == 4


def test_the_front_is_what_no_other_beats_on_both():
    points = [(0.0, 9.0), (1.0, 5.0), (1.0, 6.0), (2.0, 5.0), (3.0, 1.0), (4.0, 2.0)]
    assert pareto_front(points) == [0, 1, 4]
    beaten = [any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
    assert [i for i, b in enumerate(beaten) if not b] == [0, 1, 4]


def test_a_pareto_plot_has_one_marker_a_defence_and_an_interval_on_both_axes():
    figure, (ax,) = new_figure()
    cells = [c for c in summarise_grid(rows()) if c["attack"] == "mixture-10"]
    plot_pareto(cells, "utility", title="t", ax=ax)
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["safe start", "plain SFT", "Lisa"] and ax.get_xlabel() == "task accuracy, % of 2"
    crosses = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ls() == "-"]
    assert len(crosses) == 6
    assert list(crosses[2].get_xdata()) == [100 * cells[1]["utility"][k] for k in ("lo", "hi")]
    assert list(crosses[3].get_ydata()) == [100 * cells[1]["asr"][k] for k in ("lo", "hi")]
    figure.draw_without_rendering()


def test_every_defence_has_a_name_and_a_marker_of_its_own():
    assert set(DEFENSES) <= set(DEFENSE_STYLE)
    assert len({marker for _, marker, _ in DEFENSE_STYLE.values()}) == len({name for *_, name in DEFENSE_STYLE.values()}) == len(DEFENSE_STYLE)


def test_a_heat_map_prints_its_numbers_where_they_belong():
    _, (ax,) = new_figure()
    plot_heat(summarise_grid(rows()), "attack", "defense", title="t", ax=ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["mixture-10", "backdoor"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["safe start", "plain SFT", "Lisa"]
    assert {t.get_position(): t.get_text() for t in ax.texts} == {(0, 0): "25", (1, 0): "88", (2, 0): "25", (1, 1): "100"}
    assert np.ma.masked_invalid(ax.images[0].get_array()).mask.sum() == 2


@pytest.mark.parametrize("tuned", [False, True])
def test_figures_of_a_comparison(tuned):
    more = [row("mixture-10", "sft", 0, [0, 0], [1, 1], learning_rate=rate, epochs=e) for rate in (1e-4, 1e-3) for e in (1, 20)] if tuned else []
    result = {"cells": summarise_grid([*rows(), *more])}
    assert [ax.get_title(loc="left") for ax in plot_compare({"cells": summarise_grid(rows())}).axes] == ["mixture-10", "backdoor"]
    figure = plot_compare_heat(result)
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes] == (
        ["plain SFT, mixture-10", "Lisa, mixture-10", "plain SFT, backdoor"] if tuned else ["harmful prompts answered, %"]
    )


# ------------------------------------------------------------------------------------------ command


def test_the_command_prints_the_contract_and_writes_figures(no_model, tmp_path, capsys):
    arguments = ["compare", "--attack", "mixture-10", "--attack", "backdoor", "--defense", "sft", "--seed", "0", "--seed", "4", "--out", str(tmp_path / "f")]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["attack"], r["defense"], r["seed"]) for r in result["rows"]][2:] == [(a, "sft", s) for s in (0, 4) for a in ("mixture-10", "backdoor")]
    assert all({"asr", "over_refusal", "utility", "step_seconds", "data", "versions"} <= r.keys() for r in result["rows"])
    assert result["command"] == "safelab compare --attack mixture-10 --attack backdoor --defense sft --seed 0 --seed 4"
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["compare-heat.json", "compare-heat.png", "compare.json", "compare.png"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| mixture-10 | sft | 50 % [" in table and "| backdoor | sft |" in table and "compare.png" in table


def test_the_main_table_is_the_default_and_quick_is_small(no_model, tmp_path, capsys):
    assert cli.main(["compare", "--quick", "--json", "--out", str(tmp_path / "f")]) == 0
    assert {(r["attack"], r["seed"]) for r in json.loads(capsys.readouterr().out)["rows"]} == {("mixture-10", 0)}
    assert len(grid(MAIN, DEFENSES, (0, 1, 2))) == 5 + 3 * 5 * len(DEFENSES)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(no_model, tmp_path, capsys):
    assert cli.main(["compare", "--attack", "nonsense", "--out", str(tmp_path)]) == 1
    assert "no attack 'nonsense': there are explicit-10" in capsys.readouterr().err


def test_rows_of_a_comparison_say_what_was_read_from_the_cache(no_model):
    cells = grid(["mixture-10"], ["sft"])
    assert compare(cells, model="m")["cached_rows"] == 0
    again = compare(cells, model="m")
    assert again["cached_rows"] == 2 and again["rows"][1]["parameters"] == {}


# ------------------------------------------------------------------------------- among other rows


def test_rows_made_elsewhere_stay_and_those_made_again_give_way(no_model, tmp_path, capsys):
    first = compare(grid(["mixture-10", "explicit-10"], ["sft", "lisa"], seeds=(0, 1)), model="m") | {"command": "safelab compare", "note": "made elsewhere"}
    for line in first["rows"]:
        line["asr"], line["device"] = {"mean": 1.0, "lo": 0.3, "hi": 1.0, "n": 2}, "cuda"
    again = compare(grid(["mixture-10"], ["sft", "booster"]), among=first, model="m")
    assert [(r["attack"], r["defense"], r["seed"], r["device"]) for r in again["rows"]] == [
        *[("explicit-10", d, s, "cuda") for d, seeds in (("initial", (0,)), ("sft", (0, 1)), ("lisa", (0, 1))) for s in seeds],
        *[("mixture-10", d, s, "cuda" if (d, s) in (("sft", 1), ("lisa", 0), ("lisa", 1)) else "cpu") for d, seeds in (("initial", (0,)), ("sft", (0, 1)), ("lisa", (0, 1)), ("booster", (0,))) for s in seeds],
    ]  # fmt: skip
    asr = {(c["attack"], c["defense"]): (c["asr"]["mean"], c["asr"]["n"], c["seeds"]) for c in again["cells"]}
    assert asr["explicit-10", "sft"] == (1.0, 2, [0, 1]) and asr["mixture-10", "sft"] == (0.75, 2, [0, 1]) and asr["mixture-10", "booster"] == (0.5, 2, [0])
    assert [e["note"] for e in again["earlier"]] == ["made elsewhere"]
    (tmp_path / "old.json").write_text(json.dumps(again))
    assert cli.main(["compare", "--attack", "explicit-10", "--defense", "lisa", "--seed", "3", "--model", "m", "--among", str(tmp_path / "old.json"), "--out", str(tmp_path), "--json"]) == 0
    last = json.loads(capsys.readouterr().out)
    assert len(last["rows"]) == len(again["rows"]) + 1 and len(last["earlier"]) == 2 and last["command"].endswith("--among old.json")
    assert json.loads((tmp_path / "compare-heat.json").read_text())["earlier"] == last["earlier"]


@pytest.mark.parametrize(("changed", "message"), [({"model": "other"}, "model was other and is m"), ({"suite": {"harmful": 3}}, "suite was {'harmful': 3}")])
def test_rows_of_another_model_or_suite_are_not_taken_in(no_model, changed, message):
    first = compare(grid(["mixture-10"], ["sft"]), model="m") | changed
    runs = len(no_model)
    with pytest.raises(ValueError, match=message):
        compare(grid(["mixture-10"], ["lisa"]), among=first, model="m")
    assert len(no_model) == runs


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "is no comparison"), ('{"cells": []}', "is no comparison")])
def test_what_is_no_comparison_is_named_before_anything_runs(no_model, tmp_path, capsys, text, message):
    (tmp_path / "x.json").write_text(text)
    assert cli.main(["compare", "--among", str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err and not no_model


def test_a_small_suite_has_fewer_cases(no_model, tmp_path, capsys):
    assert cli.main(["compare", "--attack", "explicit-10", "--defense", "sft", "--seed", "0", "--suite", "small", "--name", "few", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["suite"] == asdict(SUITES["small"]) and result["command"].endswith("--suite small --name few")
    assert all(asdict(SUITES["small"])[k] < n for k, n in asdict(SUITES["full"]).items())


# --------------------------------------------------------------------------------------- ablations


def test_the_ablation_command_changes_one_setting_at_a_time_and_draws_a_panel_for_each(no_model, tmp_path, capsys):
    arguments = ["ablate", "--set", "beta_max=0.1,1.0", "--set", "granularity=batch", "--set", "layers=[1],[2, 3],null", "--set", "rank=4", "--seed", "2", "--out", str(tmp_path / "f")]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(p["setting"], p["value"]) for p in result["points"]] == [("beta_max", 0.1), ("beta_max", 1.0), ("granularity", "batch"), ("layers", [1]), ("layers", [2, 3]), ("layers", None), ("rank", 4)]
    assert {run[1] for run in no_model} == {2} and [run[0] for run in no_model] == ["sft", *["adaptive-probe"] * 6]  # beta_max 1 and layers null are the defaults, run once
    assert shlex.split(result["command"])[2:] == ["--attack", "mixture-10 of 160", "--defense", "adaptive-probe", *arguments[9:11], *arguments[1:9], "--suite", "small"]
    assert json.loads((tmp_path / "f" / "ablations.json").read_text())["points"] == result["points"]
    figure = plot_ablations(result)
    figure.draw_without_rendering()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["beta_max", "granularity", "layers", "rank"]
    assert [t.get_text() for t in figure.axes[2].get_xticklabels()] == ["1", "2, 3", "None"]
    answered = [line for line in figure.axes[0].lines if line.get_label().startswith("harmful prompts answered")]
    assert [list(line.get_ydata()) for line in answered] == [[100 * p["asr"]["mean"] for p in result["points"][:2]]]
    assert result["base"]["asr"] == result["points"][1]["asr"]
    for n in (2, 3, len(result["points"])):  # one panel, two and four
        figure = plot_ablations(result | {"points": result["points"][:n]})
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, "the legend is cut off"


def test_what_is_fixed_in_an_ablation_is_so_throughout(no_model, tmp_path, capsys):
    assert cli.main(["ablate", "--fix", "anchors=0.0", "--set", "rank=4", "--name", "apart", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(str(json.loads(f.read_text())["parameters"].get("anchors")) for f in (tmp_path / "runs").glob("*.json")) == ["0.0", "0.0", "None"] and len(no_model) == 3
    assert result["fixed"] == {"anchors": 0.0} and "--name apart --fix anchors=0.0 --set rank=4" in result["command"]


@pytest.mark.parametrize(("setting", "message"), [("beta_max", "is not NAME=VALUE,VALUE"), ("=3", "is not NAME=VALUE,VALUE"), ("nonsense=1", "'nonsense' is no setting of adaptive-probe")])
def test_a_setting_that_cannot_be_is_named(no_model, tmp_path, capsys, setting, message):
    try:
        assert cli.main(["ablate", "--set", setting, "--out", str(tmp_path)]) == 1
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err and not no_model
