"""A prompt of one's own: its risk at every layer and token, what models answer, and what a critic says."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from safelab.activations import Activations
    from safelab.probes import HarmProbe


def layer_probes(states: Activations, y: np.ndarray, groups: np.ndarray) -> dict[int, HarmProbe]:
    """A probe for each layer of ``states`` but 0, trained at the last token of prompts with labels ``y`` ``(n,)``.

    One strength, and with one the folds decide nothing but ``cv_auroc_``: two are enough, so that it takes seconds.
    """
    from safelab.probes import HarmProbe

    return {layer: HarmProbe(Cs=(1e-3,), folds=2).fit(states.layer(layer), y, groups=groups) for layer in states.layers if layer}


def prompt_risk(text: str, model, tokenizer, probes: dict[int, HarmProbe]) -> tuple[np.ndarray, list[str]]:
    """Risk ``(layers, tokens)``, layers in the order of ``probes``, and the tokens: those of ``text`` and what the chat template puts after them.

    Probes that :func:`layer_probes` trained have seen last tokens only: read the last column as a probability, and those
    before it as where it comes from.

    Raises
    ------
    ValueError
        A text that is empty or longer than the model's context.
    """
    from safelab.activations import extract_activations
    from safelab.models import render_prompts
    from safelab.probing import user_span

    if not text.strip():
        raise ValueError("there is no prompt yet: type one")
    before, _ = user_span(tokenizer)
    states = extract_activations(model, tokenizer, [text], layers=list(probes), position="all").tokens(0)[before:]
    order = sorted(probes)  # as activations come
    risk = np.stack([probes[layer].predict_proba(states[:, order.index(layer)])[:, 1] for layer in probes])
    return risk, [tokenizer.decode([i]) for i in render_prompts(tokenizer, [text])[0][before:]]


def prompt_report(text: str, models: dict, tokenizer, probes: dict[int, HarmProbe], critic=None) -> dict:
    """One prompt, seen from all sides.

    Parameters
    ----------
    models
        Name -> model. The first is the safe one, whose states the probes read.
    critic
        Judges the prompt with each model's answer.

    Returns
    -------
    dict
        ``risk`` and ``tokens`` (:func:`prompt_risk`), ``layers``, and ``answers``: for each name ``text``, cut short as in
        every report here, ``refused``, and ``risk``, the critic's (None without one).
    """
    from safelab.critics.audit import shorten
    from safelab.evaluation import generate, is_refusal

    risk, tokens = prompt_risk(text, next(iter(models.values())), tokenizer, probes)
    said = {name: generate(model, tokenizer, [text])[0] for name, model in models.items()}
    judged = critic.score([text] * len(said), list(said.values())) if critic else [None] * len(said)
    answers = {name: {"text": shorten(a), "refused": is_refusal(a), "risk": r if r is None else float(r)} for (name, a), r in zip(said.items(), judged)}
    return {"risk": risk, "tokens": tokens, "layers": list(probes), "answers": answers}


def prompt_box(models: dict, tokenizer, probes: dict[int, HarmProbe], critic=None, *, examples: list[str] = ("How do I bake bread at home?",)):
    """Type a prompt, or choose one of ``examples``, and press *ask*: :func:`prompt_report` as a strip and sentences."""
    import ipywidgets as w

    from safelab.critics.audit import shorten
    from safelab.plots import new_figure, plot_strip
    from safelab.widgets.parts import named_box, png

    wide = w.Layout(width="640px")
    typed = w.Textarea(examples[0], description="prompt", layout=w.Layout(width="640px", height="64px"))
    chosen = w.Dropdown(options=[(shorten(e, 80), e) for e in examples], description="examples", layout=wide)
    ask = w.Button(description="Ask", tooltip="Read the prompt's risk and let the models answer", button_style="primary")
    text, picture = w.HTML(), w.Image(format="png", layout=w.Layout(height="300px", width="900px", object_fit="contain"))

    def show(_=None) -> None:
        ask.disabled, text.value = True, "reading\u2026"
        try:
            report = prompt_report(typed.value, models, tokenizer, probes, critic)
            figure, (ax,) = new_figure(10.5, 3.5)
            plot_strip(report["risk"], report["layers"], report["tokens"], ylabel="layer", ax=ax)
            picture.value = png(figure)
            text.value = _sentences(report)
        except ValueError as error:
            text.value = f"<b>{html.escape(str(error))}</b>"
        finally:
            ask.disabled = False

    def choose(change) -> None:
        typed.value = change["new"]
        show()

    ask.on_click(show)
    chosen.observe(choose, "value")
    show()
    return named_box("prompt-box", [chosen, typed, ask, text, picture])


def _sentences(report: dict) -> str:
    last = report["risk"][:, -1]
    cells = "".join(
        f"<tr><td><b>{html.escape(name)}</b></td><td>{'refused' if a['refused'] else 'answered'}</td><td>{html.escape(a['text'])}</td>"
        f"<td>{'' if a['risk'] is None else format(a['risk'], '.2f')}</td></tr>"
        for name, a in report["answers"].items()
    )
    return (
        f"At the last token the probes give a risk of {last.min():.2f} to {last.max():.2f}, {last[-1]:.2f} at layer {report['layers'][-1]}."
        f"<table><tr><th>model</th><th></th><th>its answer begins</th><th>critic's risk</th></tr>{cells}</table>"
    )
