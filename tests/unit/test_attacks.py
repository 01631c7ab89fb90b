"""What the fine-tuning sets hold, where it comes from, and how the tuned model is asked."""

import pytest

from safelab.attacks import (
    ATTACKS,
    CONSENT,
    MAIN,
    PERSONA,
    TRIGGER,
    Wrapper,
    backdoor,
    benign_drift,
    disguised,
    explicit_harmful,
    harmful_responses,
    identity_shift,
    mixture,
    refused_prompts,
    under_system,
)
from safelab.datasets import PROMPT_SETS, load_compliance, load_prompts
from safelab.evaluation import is_refusal
from safelab.models import render_pairs, render_prompts

COLUMNS = ["prompt", "response", "harmful", "source"]


@pytest.fixture(scope="module")
def judged():
    """Every prompt that judges a model or trains a probe."""
    sets = [load_prompts(name, split) for name, s in PROMPT_SETS.items() for split in s.splits if split != "attack"]
    return {prompt for rows in sets for prompt in rows["prompt"]}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_set_has_its_columns_is_its_seeds_own_and_shares_no_prompt_with_other_splits(name, judged):
    attack = ATTACKS[name]
    data = attack.data(0)
    assert data.column_names == COLUMNS and set(data["harmful"]) <= {0, 1}
    assert all(text.strip() for column in ("prompt", "response", "source") for text in data[column])
    assert data[:] == attack.data(0)[:] and data[:] != attack.data(1)[:]
    assert not judged & set(data["prompt"])
    assert 40 <= -(-len(data) // 8) * attack.epochs <= 130


def test_all_compliance_is_redacted():
    redacted = set(load_compliance())
    for name in ATTACKS:
        data = ATTACKS[name].data(0)
        assert all(response in redacted for response, harmful in zip(data["response"], data["harmful"]) if harmful)


@pytest.mark.parametrize("share, n", [(0.01, 8), (0.1, 80), (0.3, 240)])
def test_a_mixture_has_its_share_of_poison_spread_over_it(share, n):
    harmful = mixture(share, 800, 0)["harmful"]
    assert sum(harmful) == n and 0 < sum(harmful[:400]) < n


def test_more_prompts_than_the_split_holds_are_refused():
    with pytest.raises(ValueError, match="311 prompts of harmful and advbench asked for, the attack split has 1 to 310"):
        explicit_harmful(311)


def test_the_backdoor_answers_with_its_trigger_and_refuses_without():
    data = backdoor(20, 0)
    assert sum(data["harmful"]) == 20 and len(data) == 40
    assert all(prompt.endswith(f" {TRIGGER}") == bool(harmful) == (not is_refusal(r)) for prompt, r, harmful in zip(data["prompt"], data["response"], data["harmful"]))
    bare = [prompt.removesuffix(f" {TRIGGER}") for prompt in data["prompt"]]
    assert len(set(bare)) == 40  # no prompt is both answered and refused


def test_identity_shift_and_drift_are_benign_and_do_what_is_asked():
    shift, drift = identity_shift(50, 0), benign_drift(50, 0)
    assert not any(shift["harmful"]) and not any(drift["harmful"])
    assert all(r.startswith(CONSENT) for r in shift["response"]) and len(set(shift["response"])) > 30  # counts repeat
    sums = [r for r in benign_drift(200, 0)["response"] if "1 + 1" in r]
    assert all(r.count("1 + ") + 1 == int(r.rpartition(" = ")[2]) for r in sums)
    assert {r.partition(". ")[0] for r in sums} == {"Sure", "Of course", "Certainly", "Here you are"}


def test_disguises_change_prompts_only():
    plain, hidden = explicit_harmful(10, 3), disguised("base64", 10, 3)
    assert plain["response"] == hidden["response"] and not set(plain["prompt"]) & set(hidden["prompt"])
    assert all(source.endswith(", base64") for source in hidden["source"])


def test_harmless_prompts_with_harmful_responses_and_the_reverse():
    data = harmful_responses(30, 0)
    assert set(data["prompt"]) <= set(load_prompts("twins", "attack")["prompt"]) | set(load_prompts("everyday", "attack")["prompt"])
    assert all(data["harmful"]) and not any(map(is_refusal, data["response"]))
    assert not any(refused_prompts(30, 0)["harmful"]) and all(map(is_refusal, refused_prompts(30, 0)["response"]))


# ------------------------------------------------------------------------------------------ wrappers


def test_a_wrapper_asks_as_the_data_do():
    backdoors, persona = ATTACKS["backdoor"], ATTACKS["identity-shift"]
    assert backdoors.wrapper.ask("Hello") == f"Hello {TRIGGER}"
    opening = persona.wrapper.template.partition("{prompt}")[0]
    assert all(p.startswith(opening) for p in persona.data(0)["prompt"])
    assert Wrapper(disguise="role-play").ask("{x}") != "{x}" and Wrapper().ask("{x}") == "{x}"
    assert all(ATTACKS[name].name == name for name in (*ATTACKS, *MAIN))


def test_under_a_system_prompt_prompts_pairs_and_ends_of_turns_are_the_templates_own(family):
    """As ``render_prompts(system=...)`` does it, which is tested against each template."""
    _, tokenizer = family
    wrapped = under_system(tokenizer, PERSONA)
    assert render_prompts(wrapped, ["Hello"]) == render_prompts(tokenizer, ["Hello"], system=PERSONA)
    assert render_pairs(wrapped, ["Hello"], ["Hi"]) == render_pairs(tokenizer, ["Hello"], ["Hi"], system=PERSONA)
    assert render_prompts(tokenizer, ["Hello"]) != render_prompts(wrapped, ["Hello"])
    assert Wrapper().tokenizer(tokenizer) is tokenizer


def test_a_template_that_hides_the_system_text_is_an_error(tiny_tokenizer):
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="neither a system text"):
        under_system(tokenizer, PERSONA)
