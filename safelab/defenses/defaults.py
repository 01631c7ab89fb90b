"""Every default of every defence, where it comes from, and where published values conflict: one table.

Papers, the authors' repositories and later comparisons run the same defence with other numbers, on other models and with
steps in the thousands. What is kept here is the authors' own number wherever it has a meaning that carries over (a
weight, a share), and a ratio or a size of ours where it has not (a number of steps).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Default(NamedTuple):
    """A value, its source, and what others have used."""

    value: Any
    source: str
    conflict: str = ""


_ALIGNMENT_SIZE = Default(400, "ours: 50 steps of 8, half of what the fine-tuning gets", "Vaccine's script: 50 epochs; Booster's: 5,000 pairs, 20 epochs")

DEFAULTS: dict[str, dict[str, Default]] = {
    "sft": {},
    "constant-kl": {"beta": Default(0.5, "ours: half and half", "Vaccine's repository: 0.1 times the KL, added to a full NLL")},
    "adaptive-probe": {
        "beta_min": Default(0.0, "ours: what is harmless is learned freely", "arXiv 2602.17546's code: 0.1"),
        "beta_max": Default(1.0, "ours: what is harmful is not learned at all", "arXiv 2602.17546's code: 0.9"),
        "granularity": Default("example", "ours: a mean over a batch dilutes the risk", "arXiv 2602.17546's text: a batch; its code: micro-batches of one example"),
        "anchors": Default(0.4, "ours: with half as many, seeds differ more in what they refuse; with a quarter, everyday prompts come to be refused", "arXiv 2602.17546 has none"),
        "shuffled": Default(0.0, "ours: for ablations only"),
        "critic": Default(None, "a probe trained on the safe model"),
        "layers": Default(None, "four layers in the second half of the model", "arXiv 2602.17546 pools over layers"),
    },
    "adaptive-judge": {
        "beta_min": Default(0.0, "as adaptive-probe", "arXiv 2602.17546's code: 0.1"),
        "beta_max": Default(1.0, "as adaptive-probe", "arXiv 2602.17546's code: 0.9"),
        "granularity": Default("example", "as adaptive-probe"),
        "anchors": Default(0.4, "as adaptive-probe"),
        "shuffled": Default(0.0, "ours: for ablations only"),
        "critic": Default(None, "ResponseClassifier on the embedded model", "arXiv 2602.17546: gpt-oss-20b; its code: gpt-4.1-mini"),
        "schedule": Default("clamp", "arXiv 2602.17546's code: clamp((r - 2) / 3, ...) of a judge's score r", "its text: linear"),
    },
    "constrained-sft": {
        "first": Default(0.5, "Qi et al. 2024 (arXiv 2406.05946), section 4; their code: beta 0.1 x first_token_bias_factor 5"),
        "opening": Default(2.0, "the same; code: beta 0.1 x bias_factor 20", "other repositories run bias_factor 10, or 1 with beta 0.001"),
        "later": Default(0.1, "the same; code: beta 0.1"),
        "opening_length": Default(5, "the same; code: bias_length 5", "others: 3"),
        "floor": Default(1e-3, "their code, not in the paper: the least weight of a token"),
    },
    "safety-mixing": {
        "share": Default(0.1, "Bianchi et al. 2024 (arXiv 2309.07875): 100 to 2,000 examples on 20,000; the most of these", "the same paper: 3 % is enough"),
    },
    "lisa": {
        "align_steps": Default(2, "Huang et al. 2024 (arXiv 2405.18641): 100 of every 1,000 steps; the ratio is kept, a run here has about 100", "their argument parser: 500 and 500"),
        "user_steps": Default(18, "the same: 900 of every 1,000"),
        "rho": Default(1.0, "the same, and their script", "their argument parser: 0.1; Booster's comparison: 0.01"),
        "warmup": Default(0.1, "their code, not in the paper: no proximal term in the first tenth of the steps"),
        "examples": Default(400, "ours", "theirs: 10,000"),
    },
    "vaccine": {
        "rho": Default(2.0, "Huang et al. 2024 (arXiv 2402.01109)", "Booster's comparison: 5"),
        "learning_rate": Default(1e-3, "their script, and the rate that made the safe model here", "Booster's comparison: 5e-4"),
        "examples": _ALIGNMENT_SIZE,
    },
    "booster": {
        "strength": Default(5.0, "Huang et al. 2024 (arXiv 2409.01586): lambda 5, and their script", "their argument parser: 0.001"),
        "step": Default(0.1, "the same: alpha 0.1"),
        "learning_rate": Default(5e-4, "the same: 5e-4 in the alignment stage"),
        "examples": _ALIGNMENT_SIZE,
        "harmful": Default(200, "ours", "theirs: 5,000, as many as there are alignment pairs"),
    },
    "antidote": {
        "ratio": Default(0.1, "Huang et al. 2024 (arXiv 2408.09600): dense_ratio 0.1"),
        "examples": Default(100, "ours", "theirs: 2,000"),
    },
    "safelora": {
        "tau": Default(0.5, "Hsu et al. 2024 (arXiv 2405.16833): threshold of their configuration", "the same configuration selects by number, the 10 least similar, unless told otherwise"),
        "unaligned": Default("smollm2-135m-instruct", "the model that the safe one was made from"),
    },
    "star-dss": {
        "words": Default(5, "Peng et al. 2025 (arXiv 2505.17196): a verdict every five words"),
        "kl_weight": Default(0.5, "the same: the weight of the KL estimate"),
        "critic": Default(None, "ResponseClassifier on the embedded model", "theirs: a guard model"),
    },
}


def default(defense: str, name: str) -> Any:
    """The value in the table."""
    return DEFAULTS[defense][name].value


def table() -> str:
    """The whole table in Markdown."""
    lines = ["| defence | parameter | value | from | elsewhere |", "|---|---|---|---|---|"]
    for defense, entries in DEFAULTS.items():
        lines += [f"| {defense} | {name} | {d.value} | {d.source} | {d.conflict} |" for name, d in entries.items()]
    return "\n".join(lines)
