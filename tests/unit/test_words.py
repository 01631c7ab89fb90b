"""What is said of a table is what its numbers support: by intervals, with what could have gone unseen."""

from __future__ import annotations

import pytest

from safelab.evaluation import wilson
from safelab.words import change, check, conclusions, difference, made_by


def of(k, n=100):
    return wilson(k, n).to_dict()


def test_the_interval_of_a_difference_is_newcombes():
    # the example of Newcombe 1998, table II: 56 of 70 and 48 of 80
    d = difference(of(48, 80), of(56, 70))
    assert d["mean"] == pytest.approx(0.2) and (d["lo"], d["hi"]) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    back = difference(of(56, 70), of(48, 80))
    assert (back["lo"], back["hi"]) == (pytest.approx(-d["hi"]), pytest.approx(-d["lo"]))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (10, 90, "80 points higher [69, 86]"),
        (90, 10, "80 points lower [69, 86]"),
        (10, 12, "no difference shown (2 points higher [-7, 11])"),
        (12, 10, "no difference shown (2 points lower [-7, 11])"),
    ],
)
def test_a_change_in_words(first, second, said):
    assert change(of(first), of(second)) == said


@pytest.mark.parametrize(
    ("predicted", "found", "said"),
    [
        (None, of(10), "10 % [6, 17], n=100. No prediction was made"),
        (0.15, of(10), "You said 15 %: within the interval."),
        (0.9, of(10), "You said 90 %: 80 points too high."),
        (0, of(10), "You said 0 %: 10 points too low."),
        (["a", "c", "b"], ["a", "b", "c"], "a, b, c. You had 1 of 3 in their places."),
        (2, 2, "2. You said 2: right."),
        ("probe", "classifier", "classifier. You said probe: not this time."),
    ],
)
def test_a_prediction_is_checked_in_place(predicted, found, said):
    assert said in check(predicted, found)


def test_a_share_in_percent_is_asked_for_again():
    with pytest.raises(ValueError, match="between 0 and 1, not 15"):
        check(15, of(10))


def cell(attack, defense, asr, utility=50, over=2, has_task=True):
    return {"attack": attack, "defense": defense, "has_task": has_task, "asr": of(asr), "over_refusal": of(over), "utility": of(utility)}


def test_rises_and_losses_are_said_where_they_are_shown():
    (said,) = conclusions([cell("a", "initial", 3), cell("a", "sft", 90, 70), cell("a", "lisa", 20, 69), cell("a", "constant-kl", 5, 50), cell("a", "adaptive-probe", 4, 71, over=20)])
    assert said.startswith("a: the safe start answers 3 % [1, 8], n=100 of the harmful prompts. More are answered after sft (+87 points) and lisa (+17 points).")
    assert "No rise is shown for constant-kl and adaptive-probe; one of up to 8 points could have gone unseen." in said
    assert "More everyday prompts than at the start are refused by adaptive-probe." in said
    assert "Worse at the task than plain fine-tuning (70 % [60, 78], n=100): constant-kl (-20 points)." in said
    assert said.endswith("no other is better at both than adaptive-probe.")


def test_the_task_with_answers_balanced_is_spoken_of_where_all_have_it():
    cells = [cell("a", "initial", 3), cell("a", "sft", 90, 70), cell("a", "adaptive-probe", 4, 50)]
    balanced = [c | {"utility_balanced": of(value)} for c, value in zip(cells, (50, 72, 71))]
    (said,) = conclusions(balanced)
    assert "Worse at the task than plain fine-tuning (70 % [60, 78], n=100): adaptive-probe (-20 points). None is shown to be worse at the task with answers balanced" in said
    assert "balanced" not in conclusions([*balanced[:2], cells[2]])[0]


def test_nothing_is_said_that_the_numbers_do_not_hold():
    (said,) = conclusions([cell("a", "initial", 3), cell("a", "sft", 6, 55), cell("a", "adaptive-probe", 3, 30)])
    assert "No defence is shown to answer more. No rise is shown for sft and adaptive-probe" in said
    assert "not shown to have learned the task" in said and "Worse" not in said and "better" not in said and "everyday" not in said
    (other,) = conclusions([cell("a", "initial", 3, has_task=False), cell("a", "sft", 90, 70, has_task=False), cell("a", "lisa", 9, 30, has_task=False)])
    assert "task" not in other


def test_over_all_attacks_the_largest_rise_counts():
    cells = [cell(a, d, asr) for a, values in (("a", (3, 90, 5)), ("b", (3, 40, 9))) for d, asr in zip(("initial", "sft", "adaptive-probe"), values)]
    said = conclusions(cells)
    assert len(said) == 3
    assert said[-1] == "Over 2 attacks: adaptive-probe ends within 3 points of the start in 1; the largest rise, by defence: adaptive-probe +6, sft +87 points."


def test_only_defences_that_met_all_attacks_are_ranked():
    cells = [cell(a, d, 5) for a in "ab" for d in ("initial", "adaptive-probe")] + [cell("a", "sft", 1)]
    assert "sft" not in conclusions(cells)[-1]


def test_a_table_without_the_start():
    with pytest.raises(ValueError, match="b: no cell of the safe start"):
        conclusions([cell("b", "sft", 1)])


def test_an_attack_that_nobody_met_is_passed_over():
    assert conclusions([cell("a", "initial", 3)]) == []


def test_a_table_is_of_all_commands_whose_rows_it_has():
    assert made_by({"command": "c"}) == "c"
    assert made_by({"earlier": [{"command": "a", "note": "elsewhere"}, {"command": "b"}], "command": "c"}) == "a,\nthen b,\nthen c"
