"""How the adapter's strength is set; the safe start itself is judged in tests/integration."""

import pytest
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from safelab.alignment import AlignmentRecipe, calibrate


@pytest.fixture
def refusing(tiny_model, random_lora, monkeypatch):
    """``refusing(strength) -> model`` that refuses everything once its updates are so strong, and half before that."""
    model = random_lora(tiny_model("llama3"), r=4, lora_alpha=8)

    def made(needed: float):
        def generate(net, tokenizer, prompts, **_):
            (scale,) = {module.scaling["default"] for module in net.modules() if isinstance(module, LoraLayer)}
            return ["I cannot help with that." if scale >= 2 * needed - 1e-9 or i % 2 else "Sure." for i in range(len(prompts))]

        monkeypatch.setattr("safelab.evaluation.generate", generate)
        return model

    return made


@pytest.mark.parametrize(("needed", "strength", "refused"), [(0.5, 1.0, 1.0), (1.08, 1.1, 1.0), (9.0, 1.2, 0.5)])
def test_the_least_strength_that_refuses_enough_is_kept(needed, strength, refused, refusing, tiny_model, tmp_path):
    model = refusing(needed)
    assert calibrate(model, None, AlignmentRecipe()) == (strength, refused)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama3"), tmp_path)
    for net in (model, loaded):
        (scale,) = {m.scaling["default"] for m in net.modules() if isinstance(m, LoraLayer)}
        assert scale == pytest.approx(2 * strength)
