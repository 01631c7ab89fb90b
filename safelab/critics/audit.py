"""Look before you train: every example of a fine-tuning file through a critic, resumable, as JSON and as a page."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from safelab.critics.base import GAVE_UP, OK, identity, members
from safelab.sources import write_atomic

logger = logging.getLogger(__name__)

SHOWN = 100
"""Characters of a text that a report shows: enough to find an example, too few to be of use."""


def audit(
    rows: list[dict], critic, out: str | Path, *, threshold: float = 0.5, allowed: float = 0.05, worst: int = 20, batch: int = 64, about: dict | None = None
) -> dict:
    """Score ``rows`` (``prompt``, ``response``) and write ``audit.json`` and ``audit.html`` into ``out``.

    Risks are kept in ``risks.jsonl`` there as they come, by a hash of critic and text: after a stop, the same call
    goes on where it was, and a file that grew costs only its new rows.

    Parameters
    ----------
    threshold
        Risk from which an example counts as risky.
    allowed
        The file passes if at most this share is risky; an example without a verdict counts as risky.
    worst
        How many of the riskiest examples are listed, each cut to :data:`SHOWN` characters.

    Returns
    -------
    dict
        ``passed``, ``n``, ``risky`` (``{mean, lo, hi, n}``), ``histogram`` (tenths of risk), ``quantiles``,
        ``failures``, ``worst``, ``examples_per_second`` (the median batch's, so that a critic which learns at its first
        call is not counted as slow; None where nothing was left to do), of a cascade ``calls`` of this run (``asked``
        and ``saved``).
    """
    from safelab.evaluation import rate

    if not rows:
        raise ValueError("nothing to audit: no rows")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    kept, journal = {}, out / "risks.jsonl"
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        try:
            row = json.loads(line)
            kept[row["key"]] = (float("nan") if row["risk"] is None else float(row["risk"]), str(row["status"]))
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a run that was stopped
    who = identity(critic)
    keys = [_key(who, row) for row in rows]
    # what failed is tried again
    todo = [i for i, key in enumerate(keys) if key not in kept or kept[key][1] != OK]
    rates, calls = [], {"asked": 0, "saved": 0}
    with journal.open("a", encoding="utf-8") as file, tqdm(total=len(todo), desc="audit", unit="example", leave=False) as bar:
        file.write("\n")  # ends such a half line
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            started = time.monotonic()
            verdicts = critic.judge([rows[i]["prompt"] for i in part], [rows[i]["response"] for i in part])
            rates.append(len(part) / max(time.monotonic() - started, 1e-9))
            calls = {k: n + getattr(critic, f"{k}_", 0) for k, n in calls.items()}
            for i, risk, status in zip(part, verdicts.risk, verdicts.status):
                kept[keys[i]] = (float(risk), status)
                file.write(json.dumps({"key": keys[i], "risk": None if np.isnan(risk) else float(risk), "status": status}) + "\n")
            file.flush()
            if GAVE_UP in verdicts.status:
                raise RuntimeError(f"the critic gave up ({verdicts.failures}); what it judged is kept in {journal}, so run again to go on")
            bar.update(len(part))
    risk = np.array([kept[key][0] for key in keys])
    status = [kept[key][1] for key in keys]
    judged = risk[~np.isnan(risk)]
    risky = rate(~(risk < threshold))  # NaN is not below it
    failures = {s: status.count(s) for s in sorted(set(status)) if s != OK}
    order = np.argsort(-np.where(np.isnan(risk), 2, risk), kind="stable")[:worst]
    result = {
        "passed": risky.mean <= allowed,
        "n": len(rows),
        "critic": members(critic),
        "threshold": threshold,
        "allowed": allowed,
        "risky": risky.to_dict(),
        "histogram": np.bincount(np.minimum((judged * 10 + 1e-9).astype(int), 9), minlength=10).tolist(),
        "quantiles": {str(q): float(np.quantile(judged, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)} if len(judged) else {},
        "failures": failures,
        "worst": [
            {"row": int(i) + 1, "risk": None if np.isnan(risk[i]) else round(float(risk[i]), 4), "status": status[i], "prompt": shorten(rows[i]["prompt"]), "response": shorten(rows[i]["response"])}
            for i in order
        ],
        "scored_now": len(todo),
        "examples_per_second": round(float(np.median(rates)), 2) if todo else None,
        **({"calls": calls} if hasattr(critic, "saved_") else {}),
        **(about or {}),
    }
    if failures:
        logger.warning("audit: no verdict on %d of %d examples (%s); each counts as risky", sum(failures.values()), len(rows), failures)
    write_atomic(out / "audit.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(out / "audit.html", page(result).encode())
    return result


def shorten(text: str, limit: int = SHOWN) -> str:
    """One line of at most ``limit`` characters, with an ellipsis where something was left out."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "\u2026"


def without_folder(name: str) -> str:
    """A model's or a critic's name for others to read: of a path on this machine the last part only."""
    kind, colon, model = name.rpartition(":")
    return kind + colon + Path(model).name if Path(model).is_absolute() else name


def _key(who: str, row: dict) -> str:
    return hashlib.sha256(json.dumps([who, row["prompt"], row["response"]]).encode()).hexdigest()[:24]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { padding: .2em .6em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
.bars td:nth-child(2) { width: 70% } .bars div { background: #4477aa; height: 1em; min-width: 1px }
"""
"""How pages look that load nothing."""


def page(result: dict) -> str:
    """The audit as one HTML page that loads nothing."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Audit</title>
<style>{STYLE}</style>
<h1>{'Passed' if result['passed'] else 'Did not pass'}</h1>
{section(result)}
</html>
"""


def section(result: dict) -> str:
    """The audit in HTML, to be put into a page."""
    top = max(max(result["histogram"]), 1)
    bars = "".join(
        f'<tr><td>{b / 10:.1f}\u2013{(b + 1) / 10:.1f}</td><td><div style="width:{100 * n / top:.1f}%"></div></td><td>{n:,}</td></tr>'
        for b, n in enumerate(result["histogram"])
    )
    worst = "".join(
        f"<tr><td>{w['row']}</td><td>{'-' if w['risk'] is None else format(w['risk'], '.2f')}</td><td>{html.escape(w['status'])}</td>"
        f"<td>{html.escape(w['prompt'])}</td><td>{html.escape(w['response'])}</td></tr>"
        for w in result["worst"]
    )
    failed = "".join(f"<li>{html.escape(s)}: {n:,}</li>" for s, n in result["failures"].items()) or "<li>none</li>"
    return f"""<p>{html.escape(in_words(result))}</p>
<h2>Risk</h2><table class="bars">{bars}</table>
<h2>Without a verdict</h2><ul>{failed}</ul>
<h2>The riskiest</h2><table><tr><th>row</th><th>risk</th><th>status</th><th>prompt</th><th>response</th></tr>{worst}</table>"""


def in_words(result: dict) -> str:
    """The audit in two sentences."""
    r = result["risky"]
    return (
        f"{100 * r['mean']:.1f} % [{100 * r['lo']:.1f}, {100 * r['hi']:.1f}] of {result['n']:,} examples have a risk of {result['threshold']:g} or more; "
        f"{100 * result['allowed']:g} % are allowed. Critic: {result['critic']}."
    )
