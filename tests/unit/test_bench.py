"""The bench on a tiny model: all arms run and learn the same objective; its figures are checked on the embedded model by hand."""

import json

import pytest
import torch

from safelab import bench


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "home"))


def test_a_quick_bench_has_every_arm_ratio_and_target(saved_model, monkeypatch):
    memory = dict.fromkeys(bench.ARMS, 400) | {"adaptive_cached": 410, "reference_design": 800}
    monkeypatch.setattr(bench, "arm_memory", lambda name, **_: memory[name])
    result = bench.run_bench(quick=True, model=str(saved_model("llama3")))
    assert set(result["medians"]) == set(result["memory_mb"]) == set(bench.ARMS) and all(result["spread"][arm]["n"] == 3 for arm in bench.ARMS)
    assert result["ratios"]["memory:adaptive_cached/sft"] == 1.025 and result["met"]["memory:adaptive_cached/sft"]
    assert set(result["met"]) == set(bench.TARGETS)
    paid_back = result["cache"]["paid_back_after_epochs"]
    assert result["met"]["cache_paid_back_epochs"] == (paid_back is not None and paid_back <= 1)
    assert json.loads(json.dumps(result)) == result and "| trl_sft |" in bench.bench_table(result)


def test_arms_take_turns_on_the_same_batches():
    seen = []
    arms = {name: lambda number, name=name: seen.append((number, name)) for name in "abc"}
    seconds = bench.time_arms(arms, 2, warm_up=1)
    assert [name for _, name in seen] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [number for number, _ in seen] == [0] * 3 + [1] * 3 + [2] * 3
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("kind", ["cached", "adapter_off", "model"])
def test_the_arms_compute_one_objective(kind, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """The first gradient of ours is that of the reference design."""
    model, tokenizer, data = tiny_model("llama3"), tiny_tokenizer("llama3"), bench.bench_data(8)
    moved = {}
    update = bench._update

    def keep(name):
        def note(model, optimizer):
            moved[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "lora_B" in n}
            update(model, optimizer)

        return note

    for name in (f"adaptive_{kind}", "reference_design"):
        torch.manual_seed(42)  # the trainers' own seed: all adapters begin alike
        arms = bench.make_arms(model, tokenizer, data, str(tmp_path), only=(name,))
        monkeypatch.setattr(bench, "_update", keep(name))
        arms[name](0)
        monkeypatch.setattr(bench, "_update", update)
    ours, theirs = moved[f"adaptive_{kind}"], moved["reference_design"]
    assert set(ours) == set(theirs) and ours
    assert max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in ours) < 0.1  # bfloat16 autocast
