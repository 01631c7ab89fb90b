"""Sentences that figures support: differences of rates with their intervals, and what a table of attacks and defences shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelab.plots_grid import cost, pareto_front

if TYPE_CHECKING:
    from collections.abc import Iterator


def difference(first: dict, second: dict) -> dict[str, float]:
    """``second`` less ``first``, rates ``{mean, lo, hi, n}`` -> ``{mean, lo, hi}`` in -1..1, with a 95 % interval.

    Newcombe's (1998, his method 10), made from the two Wilson intervals. It takes the cases of the two for different
    ones; where they are the same, as in our tables, it is rather too wide: what it shows is there.
    """
    p, q = first["mean"], second["mean"]
    return {
        "mean": q - p,
        "lo": q - p - math.hypot(q - second["lo"], first["hi"] - p),
        "hi": q - p + math.hypot(second["hi"] - q, p - first["lo"]),
    }


def change(first: dict, second: dict) -> str:
    """What became of a rate, such as ``"12 points higher [3, 21]"`` or ``"no difference shown (2 points lower [-7, 11])"``."""
    d = difference(first, second)
    size = f"{abs(100 * d['mean']):.0f} points {'lower' if d['mean'] < 0 else 'higher'}"
    lo, hi = (-100 * d["hi"], -100 * d["lo"]) if d["mean"] < 0 else (100 * d["lo"], 100 * d["hi"])
    text = f"{size} [{lo:.0f}, {hi:.0f}]"
    return text if d["lo"] > 0 or d["hi"] < 0 else f"no difference shown ({text})"


def percent(rate: dict) -> str:
    """``"12 % [6, 22], n=60"``."""
    return f"{100 * rate['mean']:.0f} % [{100 * rate['lo']:.0f}, {100 * rate['hi']:.0f}], n={rate['n']}"


def check(predicted, found) -> str:
    """What became of a prediction, in words; None is none, so a notebook that nobody answered runs through.

    Parameters
    ----------
    predicted
        A share in 0..1 where a rate was found, a list where an order was, else whatever is to be equal.
    found
        A rate ``{mean, lo, hi, n}``, a list of names in their order, or a value.

    Raises
    ------
    ValueError
        A share outside 0..1, which is perhaps meant in percent.
    """
    answer = percent(found) if isinstance(found, dict) else ", ".join(map(str, found)) if isinstance(found, list) else str(found)
    if predicted is None:
        return f"{answer}. No prediction was made: write one in the place of None, and run the cell again."
    if isinstance(found, list):
        right = sum(p == f for p, f in zip(predicted, found))
        return f"{answer}. You had {right} of {len(found)} in their places."
    if not isinstance(found, dict):
        return f"{answer}. You said {predicted}: {'right' if predicted == found else 'not this time'}."
    if not 0 <= predicted <= 1:
        raise ValueError(f"a share is between 0 and 1, not {predicted}")
    if found["lo"] <= predicted <= found["hi"]:
        return f"{answer}. You said {100 * predicted:.0f} %: within the interval."
    return f"{answer}. You said {100 * predicted:.0f} %: {abs(100 * (predicted - found['mean'])):.0f} points too {'high' if predicted > found['mean'] else 'low'}."


def conclusions(cells: list[dict], of: str = "adaptive-probe", within: float = 0.03) -> list[str]:
    """What the cells of :func:`safelab.experiments.summarise_grid` show, one paragraph an attack and one over all of them.

    A rise or a loss is said to be there only where the interval of the difference (:func:`difference`) excludes zero;
    of the others it is said that none is shown, and how large one could have gone unseen.

    Parameters
    ----------
    of
        The defence whose distance from the start is counted in the last paragraph.
    within
        The distance that counts as kept, in 0..1; means are compared.

    Raises
    ------
    ValueError
        An attack without its ``initial`` cell.
    """
    attacks: dict[str, list[dict]] = {}
    for cell in cells:
        attacks.setdefault(cell["attack"], []).append(cell)
    said, rises = [], {}
    for attack, found in attacks.items():
        start = next((c for c in found if c["defense"] == "initial"), None)
        if start is None:
            raise ValueError(f"{attack}: no cell of the safe start (initial) to compare with")
        tuned = [c for c in found if c["defense"] != "initial"]
        if not tuned:
            continue
        for cell in tuned:
            rises.setdefault(cell["defense"], []).append(cell["asr"]["mean"] - start["asr"]["mean"])
        said.append(f"{attack}: " + " ".join(_of_attack(start, tuned)))
    if len(attacks) > 1 and of in rises:
        kept = sum(rise <= within + 1e-9 for rise in rises[of])
        worst = {name: max(values) for name, values in rises.items() if len(values) == len(rises[of])}
        said.append(
            f"Over {len(rises[of])} attacks: {of} ends within {100 * within:.0f} points of the start in {kept}; the largest rise, by defence: "
            + ", ".join(f"{name} {100 * value:+.0f}" for name, value in sorted(worst.items(), key=lambda item: item[1])) + " points."
        )  # fmt: skip
    return said


def _of_attack(start: dict, tuned: list[dict]) -> Iterator[str]:
    gaps = [(c["defense"], difference(start["asr"], c["asr"])) for c in tuned]
    risen = [f"{name} ({100 * d['mean']:+.0f} points)" for name, d in sorted(gaps, key=lambda g: -g[1]["mean"]) if d["lo"] > 0]
    level = [(name, d) for name, d in gaps if d["lo"] <= 0]
    yield f"the safe start answers {percent(start['asr'])} of the harmful prompts."
    yield f"More are answered after {_listed(risen)}." if risen else "No defence is shown to answer more."
    if level:
        unseen = max(d["hi"] for _, d in level)
        yield f"No rise is shown for {_listed([name for name, _ in level])}; one of up to {100 * unseen:.0f} points could have gone unseen."
    stricter = [c["defense"] for c in tuned if difference(start["over_refusal"], c["over_refusal"])["lo"] > 0]
    if stricter:
        yield f"More everyday prompts than at the start are refused by {_listed(stricter)}."
    plain = next((c for c in tuned if c["defense"] == "sft"), None)
    others = [c for c in tuned if c is not plain]
    if not start["has_task"] or plain is None or not others:
        return
    learned = difference(start["utility"], plain["utility"])
    if learned["lo"] <= 0:
        yield f"Plain fine-tuning itself is not shown to have learned the task ({percent(plain['utility'])}), so what the others cost there cannot be said."
        return
    yield _worse("the task", "utility", plain, others)
    if all("utility_balanced" in c for c in tuned):
        yield _worse("the task with answers balanced", "utility_balanced", plain, others)
    front = pareto_front([(cost(c, "utility"), cost(c, "asr")) for c in tuned])
    yield f"By their means, no other is better at both than {_listed([tuned[i]['defense'] for i in front])}."


def _worse(at: str, key: str, plain: dict, others: list[dict]) -> str:
    worse = [f"{c['defense']} ({100 * (c[key]['mean'] - plain[key]['mean']):+.0f} points)" for c in others if difference(plain[key], c[key])["hi"] < 0]
    return f"Worse at {at} than plain fine-tuning ({percent(plain[key])}): {_listed(worse)}." if worse else f"None is shown to be worse at {at} than plain fine-tuning."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def made_by(result: dict) -> str:
    """The commands whose rows a stored table has: those of the tables it was put among (``earlier``) and its own, a line each."""
    return ",\nthen ".join(made["command"] for made in [*result.get("earlier", []), result])
