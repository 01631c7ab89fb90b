"""What a training run leaves: a PEFT adapter or a whole model that anybody loads without safelab, and its model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safelab.critics.audit import without_folder
from safelab.sources import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DONE = "training.json"
"""Written last: a folder that holds it is finished."""


def save_result(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, result: dict, *, merge: bool = False) -> dict:
    """Weights, tokenizer, model card and :data:`DONE` into ``folder``, whose checkpoints are removed -> ``result`` with the weights' hashes.

    Parameters
    ----------
    model
        The tuned PEFT model, or a fully fine-tuned one.
    result
        What was done: ``defense``, ``critic``, ``model``, ``data`` (hash), ``examples``, ``seed``, ``options``, ``versions``,
        ``history``, optionally ``critic_failures``; kept as it is, and read by the model card.
    merge
        Add the adapter to the weights and save the whole model.
    """
    adapter = hasattr(model, "peft_config") and not merge
    if hasattr(model, "peft_config") and merge:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}
    result = result | {"weights": weights}
    write_atomic(folder / "README.md", model_card(result, adapter=adapter).encode())
    write_atomic(folder / DONE, (json.dumps(result, indent=1) + "\n").encode())
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def settings(result: dict) -> dict[str, str]:
    """How a training came about, one line a setting; folders' names without where they lie."""
    apart = ("model", "critic", "critic_model", "defense", "data", "seed")
    return {
        "defence": result["defense"],
        "critic": result["critic"] or "the defence's own",
        "start": without_folder(str(result["model"])),
        "data as trained on (SHA-256, first digits)": f"{result['data']}, {result['examples']:,} examples",
        "seed": str(result["seed"]),
        "options": ", ".join(f"{k} {v}" for k, v in result["options"].items() if v not in (None, False) and k not in apart) or "-",
        "weights (SHA-256, first digits)": ", ".join(f"{name} {digest[:16]}" for name, digest in result["weights"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
    }


def model_card(result: dict, *, adapter: bool) -> str:
    """Markdown: how the model came about, what was seen on the way, and how to load it."""
    history = result["history"]
    last = {k: v for k, v in (history[-1] if history else {}).items() if k != "step"}
    rows = settings(result) | {
        "no verdict on": ", ".join(f"{n} ({status})" for status, n in result.get("critic_failures", {}).items()) or "no example",
        "steps": history[-1]["step"] if history else 0,
        "at the last step": ", ".join(f"{k} {v:.3f}" for k, v in last.items()),
        "measured": "; ".join(f"step {m['step']}: ASR {m['asr']:.2f}, utility {m['utility']:.2f}" for m in result.get("measured", [])) or "not during training",
    }
    load = (
        "base = AutoModelForCausalLM.from_pretrained(START)  # the model it was trained on\nmodel = PeftModel.from_pretrained(base, FOLDER)"
        if adapter
        else "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
    )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer" + ("\nfrom peft import PeftModel" if adapter else "")
    header = "---\nlibrary_name: " + ("peft" if adapter else "transformers") + "\ntags: [safelab, safety, fine-tuning]\n---\n"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"{header}# Fine-tuned under {result['defense']}\n\n"
        "Fine-tuned with safelab so that what the start refuses stays refused. Where the defence is adaptive the loss is, for each example,\n"
        "`(1 - beta) NLL + beta KL(reference || model)` with beta growing with the example's risk (arXiv 2602.17546). The critic served in training\n"
        "only: this model costs what any other of its size costs.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Use\n```python\n{imports}\n\n{load}\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```\n\n"
        "## Limits\nA defence lowers the risk that fine-tuning brings; it gives no guarantee. Measure the model on prompts of your own before you use it:\n"
        "`safelab evaluate --prompts FILE " + ("--adapter FOLDER" if adapter else "--model FOLDER") + "`.\n"
    )
