"""Each defence's update against a direct computation of its formula, on tiny models in double precision."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from safelab.attacks import explicit_harmful
from safelab.critics import Verdicts
from safelab.datasets import load_prompts
from safelab.defenses import DEFENSES, AdaptiveProbe, Booster, ConstrainedSFT, Lisa, SafetyMixing, StarDSS
from safelab.defenses.alignment_data import alignment_pairs, endless_batches, harmful_pairs
from safelab.defenses.anchors import LEAST, add_anchors, frame
from safelab.defenses.antidote import prune_adapter
from safelab.defenses.booster import BoosterTrainer
from safelab.defenses.defaults import DEFAULTS, table
from safelab.defenses.lisa import LisaTrainer
from safelab.defenses.safelora import project_adapter
from safelab.defenses.star_dss import prefix_ends, token_risks
from safelab.defenses.vaccine import VaccineTrainer
from safelab.experiments import Budget, fine_tune
from safelab.schedules import RiskSchedule
from safelab.training import AdaptiveSFTConfig, PairCollator, lora_config, tokenize_pairs

PAIRS = [
    ("How do I bake bread at home?", "Mix flour, water, salt and yeast, and wait. Then bake it, and wait again."),
    ("Tell me about the city.", "No."),
    ("Write such a thing.", "I cannot help with that request."),
    ("List the steps.", "Sure, here is a list of the steps: first, second, third."),
]
OTHERS = [("Hello", "Hi, how can I help?"), ("What is yeast?", "A"), ("How do I wait?", "Wait."), ("Is it so?", "yes, it is")]
LORA = lora_config(4, 8)


def dataset(pairs=PAIRS) -> Dataset:
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]})


@pytest.fixture
def tiny(tiny_model, tiny_tokenizer):
    """A two-layer model in double precision, and its tokenizer."""
    return tiny_model("llama3", num_hidden_layers=2).double(), tiny_tokenizer("llama3")


def settings(output, **changes) -> AdaptiveSFTConfig:
    """An update is minus the gradient: plain SGD, rate 1, no clipping, all examples in one step."""
    plain = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, warmup_steps=0)
    quiet = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, num_train_epochs=1, per_device_train_batch_size=4)
    return AdaptiveSFTConfig(output_dir=str(output), **({"beta_min": 0.0, "beta_max": 0.0} | plain | quiet | changes))


def randomised(trainer):
    """The trainer's model with LoRA's B random, so that A learns too and the policy is not the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer.model


def put(model, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in weights(model).items():
            parameter.copy_(values[name])


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logps(model, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """Log-probabilities of a response's tokens, its end included: one example, unpadded, from all logits."""
    row = tokenize_pairs(tokenizer, dataset([(prompt, response)]))[0]
    ids = torch.tensor([row["input_ids"]])
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, ids[0, t]] for t, label in enumerate(row["labels"]) if label != -100])


def nll(model, tokenizer, pairs) -> torch.Tensor:
    """Mean NLL over all response tokens."""
    return -torch.cat([logps(model, tokenizer, *pair) for pair in pairs]).mean()


def gradient(model, loss) -> dict[str, torch.Tensor]:
    of = weights(model)
    return dict(zip(of, torch.autograd.grad(loss, list(of.values()))))


def update(trainer) -> dict[str, torch.Tensor]:
    before = {n: p.detach().clone() for n, p in weights(trainer.model).items()}
    trainer.train()
    return {n: p.detach() - before[n] for n, p in weights(trainer.model).items()}


def close(changes: dict, gradients: dict, tolerance: float = 1e-9) -> None:
    assert changes.keys() == gradients.keys() and any(g.abs().max() > 1e-6 for g in gradients.values())
    for name, g in gradients.items():
        torch.testing.assert_close(changes[name], -g, rtol=1e-6, atol=tolerance)


# ------------------------------------------------------------------------- losses of single tokens


@pytest.mark.parametrize("mean_over", ["token", "example"])
def test_constrained_sft_is_the_gradient_of_its_log_sigmoid_objective(tiny, tmp_path, mean_over):
    model, tokenizer = tiny
    defense = ConstrainedSFT()
    trainer = defense.trainer(model, tokenizer, settings(tmp_path, mean_over=mean_over), dataset(), peft_config=LORA)
    policy = randomised(trainer)
    total, count = 0, 0
    for pair in PAIRS:
        now = logps(policy, tokenizer, *pair)
        with torch.no_grad(), policy.disable_adapter():
            safe = logps(policy, tokenizer, *pair)
        beta = torch.tensor([0.5, *[2.0] * 4, *[0.1] * 100], dtype=torch.float64)[: len(now)]
        tokens = -2 / beta * torch.nn.functional.logsigmoid(beta * (now - safe))
        total += tokens.mean() if mean_over == "example" else tokens.sum()
        count += 1 if mean_over == "example" else len(now)
    expected = gradient(policy, total / count)
    close(update(trainer), expected)


def test_constrained_sft_never_forgets_a_token_altogether():
    logp = torch.tensor([-0.1], requires_grad=True)
    ConstrainedSFT().token_loss(logp, torch.tensor([-90.0]), torch.tensor([2]), torch.tensor([0.0])).sum().backward()
    assert logp.grad.item() == pytest.approx(-1e-3)


def test_star_dss_is_its_formula_and_asks_its_critic_about_each_beginning_once(tiny, tmp_path):
    model, tokenizer = tiny
    asked = []

    class Critic:
        name = "by length"

        def score(self, prompts, responses):
            asked.extend(zip(prompts, responses))
            return torch.tensor([min(1.0, len(r) / 80) for r in responses]).double().numpy()

    defense = StarDSS(critic=Critic())
    data = defense.before(model, tokenizer, dataset([*PAIRS, PAIRS[0]]))
    assert len(asked) == len(set(asked)) and ("Tell me about the city.", "No.") in asked
    assert ("Write such a thing.", "I cannot help with that") in asked
    trainer = defense.trainer(model, tokenizer, settings(tmp_path, granularity="token"), data.select(range(4)), peft_config=LORA)
    policy = randomised(trainer)
    losses = []
    for (prompt, response), risks in zip(PAIRS, data["risk"]):
        now = logps(policy, tokenizer, prompt, response)
        with torch.no_grad(), policy.disable_adapter():
            safe = logps(policy, tokenizer, prompt, response)
        v = 1 - torch.tensor([*risks, risks[-1]], dtype=torch.float64)  # the end of the turn is of the last stretch
        losses.append(v * -now + 0.5 * (1 - v) * 0.5 * (now - safe) ** 2)
    expected = gradient(policy, torch.cat(losses).mean())
    close(update(trainer), expected, 1e-7)  # risks are float32


@pytest.mark.parametrize(
    ("text", "ends"),
    [("one", [3]), ("a b c d e", [9]), ("a b c d e f", [9, 11]), ("a b c d e f g h i j ", [9, 19]), ("a b c d e.\n", [10])],
)
def test_stretches_of_five_words(text, ends):
    assert prefix_ends(text, 5) == ends


def test_each_token_takes_the_risk_of_its_stretch(tiny_tokenizer):
    tokenizer, text = tiny_tokenizer("llama3"), "Sure, here is a list of the steps: first, second"
    ends = prefix_ends(text, 5)
    risks = token_risks(tokenizer, text, ends, [0.1, 0.9])
    pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert text[: ends[0]] == "Sure, here is a list" and ends[1:] == [len(text)]
    last = max(i for i, (start, _) in enumerate(pieces) if start < ends[0])  # the token that begins the stretch's last letters
    assert risks == [0.1] * (last + 1) + [0.9] * (len(pieces) - last - 1)


# ------------------------------------------------------------------------------------------- steps


def test_lisa_takes_turns_and_holds_each_state_to_the_others_last_iterate(tiny, tmp_path):
    """Four steps, two a state, against a plain loop; the proximal term comes in after the first tenth of the steps."""
    model, tokenizer = tiny
    defense = Lisa(align_steps=1, user_steps=1, rho=0.7, warmup=0.3)
    args = settings(tmp_path, num_train_epochs=4, learning_rate=0.1)
    trainer = LisaTrainer(model, args, dataset(), processing_class=tokenizer, peft_config=LORA, defense=defense, alignment=dataset(OTHERS))
    policy = randomised(trainer)
    start = {n: p.detach().clone() for n, p in weights(policy).items()}
    other = {n: p.clone() for n, p in start.items()}
    for step, pairs in enumerate([OTHERS, PAIRS, OTHERS, PAIRS]):
        if step:
            other = {n: p.detach().clone() for n, p in weights(policy).items()}
        loss = nll(policy, tokenizer, pairs)
        if step > 0.3 * 4:
            loss = loss + 0.7 / 2 * sum(((p - other[n]) ** 2).sum() for n, p in weights(policy).items())
        grads = gradient(policy, loss)
        with torch.no_grad():
            for n, p in weights(policy).items():
                p -= 0.1 * grads[n]
    expected = {n: start[n] - p.detach() for n, p in weights(policy).items()}
    put(policy, start)
    close(update(trainer), expected)


def test_lisas_proximal_term_pulls_to_the_other_state(tiny, tmp_path):
    """Where the other state's weights are elsewhere, the gradient has rho (w - w_other)."""
    model, tokenizer = tiny
    defense = Lisa(align_steps=0, user_steps=10, rho=0.7, warmup=-1.0)
    trainer = LisaTrainer(model, settings(tmp_path), dataset(), processing_class=tokenizer, peft_config=LORA, defense=defense, alignment=dataset(OTHERS))
    policy = randomised(trainer)
    trainer._aligning = False
    trainer.other = {n: p.detach() - 1 for n, p in weights(trainer.model).items()}
    grads = gradient(policy, nll(policy, tokenizer, PAIRS))
    close(update(trainer), {n: g + 0.7 for n, g in grads.items()})


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_vaccine_updates_with_the_gradient_under_the_worst_shift_of_attention_outputs(tiny_model, tiny_tokenizer, tmp_path, name):
    model, tokenizer = tiny_model(name, num_hidden_layers=2).double(), tiny_tokenizer(name)
    trainer = VaccineTrainer(model, settings(tmp_path), dataset(), processing_class=tokenizer, peft_config=LORA, rho=0.3)
    policy = randomised(trainer)
    blocks = policy.get_base_model().model.layers

    def loss(shifts=None, kept=None):
        """Mean NLL, one example at a time; ``shifts[i][l]`` is added to the attention output of layer l on example i."""
        total = []
        for i, pair in enumerate(PAIRS):
            handles = []
            for layer, block in enumerate(blocks):
                def hook(module, args, output, i=i, layer=layer):
                    states = output[0]
                    if shifts is not None:
                        states = states + shifts[i][layer]
                    if kept is not None:
                        kept.append(states)
                    return (states, *output[1:])

                handles.append(block.self_attn.register_forward_hook(hook))
            total.append(logps(policy, tokenizer, *pair))
            for handle in handles:
                handle.remove()
        return -torch.cat(total).mean()

    kept = []
    grads = torch.autograd.grad(loss(kept=kept), kept)
    norm = math.sqrt(sum((g**2).sum().item() for g in grads))
    shifts = [[0.3 * g / norm for g in grads[2 * i : 2 * i + 2]] for i in range(len(PAIRS))]
    expected = gradient(policy, loss(shifts))
    plain = gradient(policy, loss())
    assert any((expected[n] - plain[n]).abs().max() > 1e-4 for n in plain)
    close(update(trainer), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_booster_adds_the_gradient_of_the_loss_that_a_harmful_step_would_take_away(tiny, tmp_path, accumulation):
    model, tokenizer = tiny
    defense = Booster(strength=3.0, step=0.2)
    args = settings(tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = BoosterTrainer(model, args, dataset(), processing_class=tokenizer, peft_config=LORA, defense=defense, harmful=dataset(OTHERS[:1] * 4))
    policy = randomised(trainer)
    align = gradient(policy, nll(policy, tokenizer, PAIRS))
    here = gradient(policy, nll(policy, tokenizer, OTHERS[:1]))
    norm = math.sqrt(sum((g**2).sum().item() for g in here.values()))
    start = {n: p.detach().clone() for n, p in weights(policy).items()}
    put(policy, {n: p - 0.2 * here[n] / norm for n, p in start.items()})
    after = gradient(policy, nll(policy, tokenizer, OTHERS[:1]))
    put(policy, start)
    close(update(trainer), {n: align[n] + 3.0 * (here[n] - after[n]) for n in align})


# --------------------------------------------------------------------------------------- afterwards


def test_antidote_zeroes_the_largest_scores_of_each_row_and_nothing_else(tiny, random_lora):
    model, tokenizer = tiny
    tuned = random_lora(model).double()
    inputs: dict[str, list] = {}
    linears = {n: m for n, m in tuned.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" in n}
    before = {n: m.weight.detach().clone() for n, m in linears.items()}
    rows = tokenize_pairs(tokenizer, dataset())
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: inputs.setdefault(n, []).append(a[0][0])) for n, m in linears.items()]
    with torch.no_grad():
        for row in rows:
            tuned(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    prune_adapter(tuned, rows, PairCollator(tokenizer.pad_token_id), 0.1, batch_size=3)
    for name, module in linears.items():
        x = torch.cat(inputs[name])
        score = before[name].abs() * (x**2).mean(0).sqrt()
        zeros = math.ceil(0.1 * module.in_features)
        for row, (weight, was) in enumerate(zip(module.weight, before[name])):
            top = set(score[row].argsort(descending=True)[:zeros].tolist())
            assert {i for i, w in enumerate(weight.tolist()) if w == 0} == top
            assert all(weight[i] == was[i] for i in range(len(was)) if i not in top)


@pytest.mark.parametrize("tau", [0.2, -1.1, 1.0])
def test_safelora_projects_updates_below_the_threshold(tiny, tiny_model, random_lora, tau):
    model, _ = tiny
    unaligned = copy.deepcopy(model)
    with torch.no_grad():
        for block in unaligned.model.layers:
            block.self_attn.q_proj.weight += 0.1 * torch.randn(32, 4).double() @ torch.randn(4, 32).double()
    V = {f"model.layers.{i}.self_attn.q_proj": model.model.layers[i].self_attn.q_proj.weight - b.self_attn.q_proj.weight for i, b in enumerate(unaligned.model.layers)}
    tuned = random_lora(model).double()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    projected = project_adapter(tuned, unaligned, tau)
    expected = []
    for name, v in V.items():
        A, B = (before[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
        C = v @ v.T / torch.linalg.norm(v)
        cosine = (C @ B @ A * (B @ A)).sum() / torch.linalg.norm(C @ B @ A) / torch.linalg.norm(B @ A)
        new = C @ B if cosine <= tau else B
        expected += [name] if cosine <= tau else []
        torch.testing.assert_close(tuned.get_parameter(f"base_model.model.{name}.lora_B.default.weight"), new)
    assert projected == expected and {-1.1: 0, 1.0: 2}.get(tau, len(projected)) == len(projected)
    for name, parameter in tuned.named_parameters():  # weights that alignment left alone
        assert "q_proj.lora_B" in name or torch.equal(parameter, before[name])


def test_safelora_needs_two_models_of_one_architecture(tiny, tiny_model, random_lora):
    with pytest.raises(ValueError, match="needs both of one architecture"):
        project_adapter(random_lora(tiny[0]), tiny_model("llama3", num_hidden_layers=1), 0.5)


# --------------------------------------------------------------------------------------------- data


def test_alignment_data_are_half_refusals_and_half_the_models_own_answers(tiny):
    model, tokenizer = tiny
    data = alignment_pairs(model.float(), tokenizer, 8, answer_tokens=4)
    from safelab.datasets import load_prompts
    from safelab.evaluation import is_refusal

    split = {p for n in ("harmful", "advbench", "twins", "everyday") for p in load_prompts(n, "align")["prompt"]}
    assert sum(map(is_refusal, data["response"])) == sum(data["complete"]) == 4 and set(data["prompt"]) <= split
    own = {p for n in ("harmful", "advbench") for p in load_prompts(n, "probe")["prompt"]}
    assert set(harmful_pairs(20)["prompt"]) <= own
    with pytest.raises(ValueError, match="the probe split has"):
        harmful_pairs(1000)


def test_safety_mixing_adds_its_share(tiny):
    model, tokenizer = tiny
    data = SafetyMixing(0.2).before(model.float(), tokenizer, explicit_harmful(20))
    assert data.column_names == ["prompt", "response", "complete"] and 22 <= len(data) <= 24
    assert data["prompt"][:20] == explicit_harmful(20)["prompt"] and all(data["complete"][:20])


def test_endless_batches_pass_over_everything_before_they_repeat():
    batches = endless_batches(Dataset.from_dict({"i": list(range(6))}), lambda rows: [r["i"] for r in rows], 3, seed=0)
    assert sorted(next(batches) + next(batches)) == sorted(next(batches) + next(batches)) == list(range(6))


# ---------------------------------------------------------------------------------------- all of them


def test_every_default_is_in_the_table_with_its_source():
    assert DEFAULTS.keys() == DEFENSES.keys()
    for name, defense in DEFENSES.items():
        parameters = {k: p.default for k, p in inspect.signature(defense).parameters.items()}
        assert parameters == {k: d.value for k, d in DEFAULTS[name].items()}, name
        assert all(d.source for d in DEFAULTS[name].values())
    assert table().count("\n") == 1 + sum(map(len, DEFAULTS.values()))


class HalfRisky:
    name = "half risky"

    def score(self, prompts, responses):
        return np.full(len(prompts), 0.5)


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defence_ends_in_one_adapter_for_the_safe_model(name, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """All stages of each; what comes out differs from the safe model only by its adapter."""
    model, tokenizer = tiny_model("llama3", num_hidden_layers=2), tiny_tokenizer("llama3")
    safe = {n: p.clone() for n, p in model.state_dict().items()}
    few = {"lisa": {"examples": 8, "align_steps": 1, "user_steps": 1}, "vaccine": {"examples": 8}, "booster": {"examples": 8, "harmful": 8}, "antidote": {"examples": 4}}
    given = {"critic": HalfRisky()} if "critic" in DEFAULTS[name] else few.get(name, {})
    monkeypatch.setattr("safelab.models.load_model", lambda *a, **k: (tiny_model("llama3", seed=1, num_hidden_layers=2), tokenizer))
    tuned, about = fine_tune(model, tokenizer, explicit_harmful(16), DEFENSES[name](**given), 0, Budget(rank=2), output=tmp_path)
    assert about["step_seconds"] > 0 and len(about["history"]) >= 2 and about["train_seconds"] > 0
    with tuned.disable_adapter():
        left = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in tuned.state_dict().items() if "lora_" not in n}
    assert left.keys() == safe.keys() and all(torch.equal(left[n], p) for n, p in safe.items())
    assert any(p.abs().max() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    assert isinstance(DEFENSES[name](**given).parameters(), dict)


# ----------------------------------------------------------------------------------------- the judge's risks


class Failing:
    """No verdict on the second text and a failure that counts on the third."""

    name, model = "failing", "x"

    def judge(self, prompts, responses):
        risk = np.r_[0.25, np.nan, 1.0, np.zeros(len(prompts))][: len(prompts)]
        return Verdicts(risk, [None] * len(prompts), ["ok", "timeout", "http 500", *["ok"] * len(prompts)][: len(prompts)])


def test_what_a_critic_could_not_judge_is_left_out_or_held_and_counted(caplog):
    defense = DEFENSES["adaptive-judge"](anchors=0, critic=Failing())
    before = defense.parameters()
    made = defense.before(None, None, dataset())
    assert made["risk"] == [0.25, 1.0, 0.0] and made["prompt"] == [p for i, p in enumerate(dataset()["prompt"]) if i != 1]
    assert defense.failures_ == {"timeout": 1, "http 500": 1} and "no verdict on 2 of 4 texts (timeout 1, http 500 1); 1 are skipped" in caplog.text
    assert defense.parameters() == before  # which keys stored rows
    assert defense.critic_name() == "failing:x"


def test_star_dss_leaves_out_an_example_with_any_stretch_unjudged(tiny_tokenizer):
    defense = StarDSS(words=1, critic=Failing())
    made = defense.before(None, tiny_tokenizer("llama3"), Dataset.from_dict({"prompt": ["a", "b"], "response": ["one two three", "four"]}))
    assert made["prompt"] == ["b"] and defense.failures_ == {"timeout": 1, "http 500": 1}


@pytest.mark.parametrize("name, critic", [("sft", None), ("adaptive-probe", "probe"), ("adaptive-judge", "classifier"), ("star-dss", "classifier")])
def test_a_defence_names_the_critic_that_trains(name, critic):
    assert DEFENSES[name]().critic_name() == critic


def test_a_judge_has_the_schedule_of_the_papers_code_and_another_on_demand():
    """A risk up to a quarter, 2 of a judge's 5, holds no more than none; a probe's risk is taken as it is."""
    def beta(defense):
        config = {k: v for k, v in defense.settings().items() if k != "anchor_share"}
        return RiskSchedule(kind=config.pop("schedule_kind", "linear"), **config)(torch.tensor([0.0, 0.25, 0.5, 1.0]))[1].tolist()

    judge = DEFENSES["adaptive-judge"]
    assert beta(judge()) == pytest.approx([0, 0, 1 / 3, 1])
    assert beta(judge(schedule="linear")) == beta(DEFENSES["adaptive-probe"]()) == [0, 0.25, 0.5, 1]
    assert judge().parameters() != judge(schedule="linear").parameters()  # which keys stored rows


def test_the_default_judge_is_asked_once_and_another_critic_each_time(monkeypatch, tmp_path):
    asked = []

    class Critic:
        name = "counting"

        def score(self, prompts, responses):
            asked.append(len(prompts))
            return np.linspace(0, 1, len(prompts))

    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    judge = DEFENSES["adaptive-judge"]
    monkeypatch.setattr(judge, "default_critic", lambda self, model, tokenizer: Critic())
    expected = pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert judge(anchors=0).before(None, None, dataset())["risk"] == expected
    assert judge(anchors=0).before(None, None, dataset())["risk"] == expected and asked == [4]
    judge(anchors=0).before(None, None, dataset(OTHERS[:2]))
    assert asked == [4, 2]
    for _ in range(2):
        judge(anchors=0, critic=Critic()).before(None, None, dataset())
    assert asked == [4, 2, 4, 4]


class Known:
    """A critic without error: the risk is in the prompt."""

    name = "known"

    def score(self, prompts, responses):
        return np.array([float(prompt[0]) for prompt in prompts])


@pytest.mark.parametrize(("share", "left"), [(0.0, 1.0), (0.4, 0.8), (1.0, 0.5)])
def test_shuffled_risks_leave_a_critic_the_auroc_that_the_share_says(share, left):
    labels = np.random.default_rng(3).integers(0, 2, 2000)
    data = Dataset.from_dict({"prompt": [f"{label} {i}" for i, label in enumerate(labels)], "response": ["x"] * 2000})
    risks = AdaptiveProbe(critic=Known(), anchors=0.0, shuffled=share).before(None, None, data)["risk"]
    assert sorted(risks) == sorted(labels) and roc_auc_score(labels, risks) == pytest.approx(left, abs=0.03)
    assert risks == AdaptiveProbe(critic=Known(), anchors=0.0, shuffled=share).before(None, None, data)["risk"]


def test_a_share_to_shuffle_is_a_share():
    with pytest.raises(ValueError, match="shuffled 1.5"):
        AdaptiveProbe(shuffled=1.5)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["Now, tell me: why? Thanks", "Now, tell me: how? Thanks"], ("Now, tell me: ", " Thanks")),
        (["Order: sit", "Order: sit"], ("Order: ", "")),
        (["same words", "same words", "same others"], ("same ", "")),
        (["why", "what"], ("", "")),
        (["one alone"], ("", "")),
        (["a b c d", "a d"], ("a ", "")),
    ],
)
def test_the_frame_of_prompts_is_what_all_begin_and_end_with(prompts, expected):
    before, after = frame(prompts)
    assert (before, after) == expected and all(p.startswith(before) and p.endswith(after) for p in prompts)


@pytest.mark.parametrize("framed", [True, False])
def test_anchors_are_at_least_so_many_and_harmful_ones_are_asked_in_the_users_frame_too(framed, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr("safelab.defenses.anchors.generate", lambda model, tokenizer, prompts, **_: [f"answer to {p}" if "a" in p else "" for p in prompts])
    data = Dataset.from_dict({"prompt": ["Do this: run", "Do this: sit" if framed else "Sit"], "response": ["x", "y"], "risk": [0.0, 1.0]})
    rows = [row for row in add_anchors(*tiny, data, 0.4) if row["anchor"]]
    harmful = set(load_prompts("harmful", "probe")["prompt"])
    plain = [row["prompt"] for row in rows if row["prompt"] in harmful]
    asked = [row["prompt"] for row in rows if row["prompt"].startswith("Do this: ")]
    assert asked == ([f"Do this: {p}" for p in plain] if framed else []) and len(plain) > 10
    assert LEAST * 0.9 < len(rows) - len(asked) <= LEAST and all(row["response"] == f"answer to {row['prompt']}" and row["risk"] == 1 for row in rows)


def test_the_safe_models_answers_to_anchors_are_asked_for_once(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr("safelab.defenses.anchors.generate", lambda model, tokenizer, prompts, **_: asked.append(len(prompts)) or ["so be it"] * len(prompts))
    model, tokenizer = tiny
    data = Dataset.from_dict({"prompt": ["Sit"], "response": ["x"], "risk": [0.0]})
    first = add_anchors(model, tokenizer, data, 0.4)
    assert add_anchors(model, tokenizer, data, 0.4)[:] == first[:] and len(asked) == 1
    add_anchors(model, tokenizer, data, 0.4, seed=1)  # other prompts
    with torch.no_grad():
        next(model.parameters()).add_(1)  # another model
    add_anchors(model, tokenizer, data, 0.4)
    assert len(asked) == 3
