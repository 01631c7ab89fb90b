"""What a protected fine-tune did, for others to read: one HTML page that loads nothing, and a PDF."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from safelab.critics.audit import STYLE, in_words, section, shorten
from safelab.output import settings
from safelab.plots import STYLE as FIGURE_STYLE
from safelab.plots import new_figure, plot_intervals
from safelab.sources import atomic_path, write_atomic
from safelab.words import change, percent

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = {
    "asr": "harmful prompts answered (lower is safer)",
    "over_refusal": "harmless prompts refused (lower is better)",
    "refused": "prompts without a label refused",
    "utility": "held-out answers given word for word (higher is better)",
}
LIMITS = (
    "Refusals are found by patterns in the first words of an answer: whether an answer would help anybody is not judged. "
    "Rates hold for prompts like those listed, and a defence lowers a risk without giving a guarantee. "
    "Texts are shown cut short; answers of the tuned model may still be unpleasant."
)
LINES, WIDTH = 68, 98
"""Of a page of the PDF."""


def measure(model, tokenizer, prompts: list[dict], pairs: list[dict] | None = None, *, max_new_tokens: int = 24) -> dict:
    """What a model does with prompts of your own and, where given, with held-out pairs.

    Parameters
    ----------
    prompts
        ``prompt`` and ``label`` (1 harmful, 0 harmless, -1 unknown), as :func:`safelab.datasets.read_prompt_file` reads them.
    pairs
        ``prompt`` and ``response`` that were not trained on.

    Returns
    -------
    dict
        ``rates`` by the names in :data:`RATES`, each ``{mean, lo, hi, n}``; ``answers``, one a prompt, cut short;
        ``perplexity`` of the held-out responses (None without pairs).

    Raises
    ------
    ValueError
        There are no prompts.
    """
    from safelab.evaluation import generate, is_refusal, perplexity, rate

    if not prompts:
        raise ValueError("nothing to measure: no prompts")
    answers = generate(model, tokenizer, [row["prompt"] for row in prompts], max_new_tokens=max_new_tokens, progress="answering")
    refused = [is_refusal(answer) for answer in answers]
    flags = {
        "asr": [not r for r, row in zip(refused, prompts) if row["label"] == 1],
        "over_refusal": [r for r, row in zip(refused, prompts) if row["label"] == 0],
        "refused": [r for r, row in zip(refused, prompts) if row["label"] == -1],
    }
    surprise = None
    if pairs:
        asked, right = ([row[column] for row in pairs] for column in ("prompt", "response"))
        given = generate(model, tokenizer, asked, max_new_tokens=max_new_tokens, progress="held-out pairs")
        flags["utility"] = [g.strip().lower() == r.strip().lower() for g, r in zip(given, right)]
        surprise = round(perplexity(model, tokenizer, asked, right), 3)
    return {"rates": {k: rate(f).to_dict() for k, f in flags.items() if f}, "answers": [shorten(a) for a in answers], "perplexity": surprise}


def describe_file(path: str | Path, rows: int) -> dict:
    """``{"file", "rows", "sha256"}`` of a data file; its folder is nobody's business."""
    path = Path(path).expanduser()
    return {"file": path.name, "rows": rows, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_report(folder: str | Path, facts: dict) -> dict[str, Path]:
    """``report.html``, ``report.pdf`` and ``report.json`` (the facts) into ``folder`` -> their paths.

    Parameters
    ----------
    facts
        ``title``; ``files``, a list of :func:`describe_file`'s; ``audit``, as :func:`safelab.critics.audit.audit` returns it;
        ``prompts``, the rows asked; ``measured``, a name such as ``"before"`` to what :func:`measure` found, the start
        first; ``run``, as :func:`safelab.output.save_result` returns it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"report.{kind}" for kind in ("html", "pdf", "json")}
    kept = facts | {"prompts": [{"prompt": shorten(row["prompt"]), "label": row["label"]} for row in facts["prompts"]]}
    write_atomic(paths["html"], html_page(facts).encode())
    with atomic_path(paths["pdf"]) as temp:
        _write_pdf(temp, facts)
    write_atomic(paths["json"], (json.dumps(kept, indent=1) + "\n").encode())
    return paths


# ------------------------------------------------------------------------------------------- content


def rate_rows(measured: dict[str, dict]) -> list[dict]:
    """One row a rate: ``what`` (its name), ``key`` and the rate of each measured model."""
    names = list(measured)
    return [
        {"what": what, "key": key} | {name: measured[name]["rates"][key] for name in names}
        for key, what in RATES.items()
        if all(key in measured[name]["rates"] for name in names)
    ]


def sentences(measured: dict[str, dict]) -> list[str]:
    """Each rate of each model beside the first's, in words."""
    first, *others = measured
    said = [
        f"{row['what'].partition(' (')[0].capitalize()}: {percent(row[first])} {first}, {percent(row[name])} {name}: {change(row[first], row[name])}."
        for row in rate_rows(measured)
        for name in others
    ]
    surprise = {name: m["perplexity"] for name, m in measured.items() if m["perplexity"]}
    return said + ([f"Perplexity of held-out responses: {', '.join(f'{value:.2f} {name}' for name, value in surprise.items())}."] if surprise else [])


def how_made(run: dict) -> dict[str, str]:
    """How the result came about, and by which patterns refusals were found."""
    from safelab.evaluation import patterns_hash

    return settings(run) | {"refusal patterns": patterns_hash()}


def charts(facts: dict) -> list[tuple[str, str, Callable[[Axes], object]]]:
    """Title, alternative text and what draws it, for each figure."""
    audit, measured = facts["audit"], facts["measured"]
    tenths = ", ".join(f"{n} from {b / 10:.1f}" for b, n in enumerate(audit["histogram"]) if n)

    def risks(ax: Axes) -> None:
        ax.bar([b / 10 + 0.05 for b in range(10)], audit["histogram"], width=0.09, color="#0072B2")
        ax.axvline(audit["threshold"], color="#D55E00", ls="--", lw=1.5)
        ax.set(xlabel=f"risk given by the critic (dashed: the threshold, {audit['threshold']:g})", ylabel="examples")

    def rates(ax: Axes) -> None:
        plot_intervals(rate_rows(measured), "what", {name: name for name in measured}, xlabel="share of cases, 95 % interval", ax=ax)
        ax.set_xlim(-0.03, 1.03)

    found = [("Risk of the fine-tuning data", f"Bars: examples by tenth of risk: {tenths}.", risks), ("Rates", " ".join(sentences(measured)), rates)]
    history = [h for h in facts["run"]["history"] if "nll" in h]
    if history:
        signals = [s for s in ("nll", "kl", "beta") if s in history[-1]]

        def training(ax: Axes) -> None:
            for signal, (colour, line) in zip(signals, (("#0072B2", "-"), ("#D55E00", "--"), ("#000000", ":"))):
                ax.plot([h["step"] for h in history], [h.get(signal, float("nan")) for h in history], color=colour, ls=line, label=signal)
            ax.set(xlabel="step", ylabel="NLL, KL (nats), beta")
            ax.legend(frameon=False)

        ends = ", ".join(f"{s} from {history[0].get(s, float('nan')):.2f} to {history[-1][s]:.2f}" for s in signals)
        found.append(("Training", f"Lines over {history[-1]['step']} steps: {ends}.", training))
    return found


def examples(facts: dict, each: int = 3) -> list[dict]:
    """The first few prompts of each label with each model's answer, all cut short."""
    chosen: list[int] = []
    for label in (1, 0, -1):
        chosen += [i for i, row in enumerate(facts["prompts"]) if row["label"] == label][:each]
    return [{"prompt": shorten(facts["prompts"][i]["prompt"])} | {name: shorten(m["answers"][i]) for name, m in facts["measured"].items()} for i in chosen]


# ----------------------------------------------------------------------------------------------- html


def html_page(facts: dict) -> str:
    """The report as one page; figures are inside it."""
    measured, name = facts["measured"], html.escape(facts["title"])
    figures = []
    for title, alt, draw in charts(facts):
        figure, (ax,) = new_figure(7, 3)
        draw(ax)
        picture = base64.b64encode(figure._repr_png_()).decode()
        figures.append(f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}"><figcaption>{html.escape(title)}</figcaption></figure>')
    rates = [[row["what"], *(percent(row[m]) for m in measured)] for row in rate_rows(measured)]
    shown = examples(facts)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>{STYLE}
img {{ max-width: 100% }} figure {{ margin: 1em 0 }} td:last-child {{ overflow-wrap: anywhere }}
</style>
<h1>{name}</h1>
<ul>{''.join(f'<li>{html.escape(s)}</li>' for s in sentences(measured))}</ul>
{figures[1]}
{_table(['rate, 95 % interval', *measured], rates)}
<h2>Data</h2>
{_table(['file', 'rows', 'SHA-256'], [[f['file'], f"{f['rows']:,}", f['sha256']] for f in facts['files']])}
<h2>Audit: {'passed' if facts['audit']['passed'] else 'not passed'}</h2>
{section(facts['audit'])}
{''.join(figures[2:])}
<h2>Answers</h2>
{_table(list(shown[0]), [list(row.values()) for row in shown])}
<h2>How it was made</h2>
{_table(['', ''], [list(item) for item in how_made(facts['run']).items()])}
<h2>Limits</h2><p>{LIMITS}</p>
</html>
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


# ------------------------------------------------------------------------------------------------ pdf


def pdf_lines(facts: dict) -> list[tuple[str, bool]]:
    """The report's text, line by line, and whether each is a heading."""
    audit, measured = facts["audit"], facts["measured"]
    blocks = {
        facts["title"]: sentences(measured),
        "Data": [f"{f['file']}: {f['rows']:,} rows, SHA-256 {f['sha256']}" for f in facts["files"]],
        f"Audit: {'passed' if audit['passed'] else 'not passed'}": [
            in_words(audit),
            f"Without a verdict: {', '.join(f'{k} {v}' for k, v in audit['failures'].items()) or 'none'}. The riskiest:",
            *(f"row {w['row']}, risk {'-' if w['risk'] is None else format(w['risk'], '.2f')}: {shorten(w['prompt'])} -> {shorten(w['response'])}" for w in audit["worst"][:10]),
        ],
        "Figures": [f"{title}: {alt}" for title, alt, _ in charts(facts)],
        "Answers": [" | ".join(f"{k}: {v}" for k, v in row.items()) for row in examples(facts)],
        "How it was made": [f"{k}: {v}" for k, v in how_made(facts["run"]).items()],
        "Limits": [LIMITS],
    }
    lines: list[tuple[str, bool]] = []
    for heading, paragraphs in blocks.items():
        lines += [("", False), *((part, True) for part in textwrap.wrap(heading, WIDTH * 3 // 4))]
        for paragraph in paragraphs:
            lines += [(part, False) for part in textwrap.wrap(paragraph, WIDTH, subsequent_indent="    ")]
    return lines[1:]


def _write_pdf(path: Path, facts: dict) -> None:
    lines, drawn = pdf_lines(facts), charts(facts)
    with mpl.rc_context(FIGURE_STYLE | {"pdf.fonttype": 42, "savefig.bbox": None}), PdfPages(path, metadata={"Title": facts["title"], "CreationDate": None}) as pdf:
        for start in range(0, len(lines), LINES):
            page = Figure(figsize=(8.27, 11.69))
            for k, (line, heading) in enumerate(lines[start : start + LINES]):
                # texts of others: a dollar sign starts no formula
                page.text(0.08, 0.95 - k * 0.9 / LINES, line, family="monospace", fontsize=10 if heading else 8, weight="bold" if heading else "normal", va="top", parse_math=False)
            pdf.savefig(page)
        page = Figure(figsize=(8.27, 11.69), layout="constrained")
        for (title, _, draw), ax in zip(drawn, page.subplots(len(drawn), 1)):
            draw(ax)
            ax.set_title(title, loc="left", weight="bold")
        pdf.savefig(page)
