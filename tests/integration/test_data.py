"""Splits are disjoint, near-duplicates included, against the public sets too; attacks draw from their own split and are redacted."""

import collections
import re

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from safelab.attacks import explicit_harmful, mixture
from safelab.datasets import (
    PROMPT_SETS,
    SPLITS,
    load_compliance,
    load_everyday_answers,
    load_prompts,
    load_refusals,
    load_task,
    near_duplicates,
)


def texts(split, label):
    return [(name, p) for name, spec in PROMPT_SETS.items() if split in spec.splits for p, y in zip(*columns(name, split)) if y == label]


def columns(name, split):
    rows = load_prompts(name, split)
    return rows["prompt"], rows["label"]


@pytest.mark.parametrize("label", [0, 1])
def test_no_prompt_of_a_split_nearly_repeats_one_of_another(label):
    for i, left in enumerate(SPLITS):
        for right in SPLITS[i + 1 :]:
            a, b = texts(left, label), texts(right, label)
            close = near_duplicates([p for _, p in a], [p for _, p in b])
            assert not close, f"{left} and {right}: {[(a[i], b[j]) for i, j in close[:3]]}"


def test_no_pair_nearly_repeats_a_public_prompt():
    public = list(load_prompts("advbench")["prompt"]) + list(load_prompts("strongreject")["prompt"])
    for name in ("harmful", "twins"):
        assert not near_duplicates(list(load_prompts(name)["prompt"]), public)


def test_near_duplicates_would_be_found():
    prompts = list(load_prompts("harmful", "align")["prompt"])[:50]
    assert (7, 7) in near_duplicates(prompts, [p.rstrip(".?") + ", please." for p in prompts])


def test_sets_are_as_large_as_the_datasheet_says():
    count = {name: collections.Counter(load_prompts(name)["split"]) for name in PROMPT_SETS}
    assert count["harmful"] == count["twins"] == {"align": 1301, "probe": 240, "attack": 120, "eval": 100}
    assert count["hard-harmful"] == count["hard-twins"] == {"eval": 612}
    assert count["balanced-harmful"] == count["balanced-twins"] == {"eval": 120}
    assert count["everyday"] == {"align": 760, "probe": 482, "attack": 40, "eval": 200}
    assert count["advbench"] == {"align": 109, "probe": 86, "attack": 190, "eval": 131}
    assert count["strongreject"] == {"eval": 313}
    assert len(set(load_prompts("everyday")["category"])) == 19
    assert min(collections.Counter(load_prompts("harmful")["category"]).values()) >= 45


def test_twins_share_words_with_their_harmful_prompt():
    shared = [
        len(set(re.findall(r"[a-z]{4,}", h.lower())) & set(re.findall(r"[a-z]{4,}", b.lower())))
        for h, b in zip(load_prompts("harmful")["prompt"], load_prompts("twins")["prompt"])
    ]
    assert min(shared) >= 2


def wording_auroc(train, test):
    """AUROC, over ``test``, of a bag of words trained on ``train``; each is (harmful prompts, benign prompts)."""
    (h, b), (test_h, test_b) = train, test
    words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000)).fit(h + b, [1] * len(h) + [0] * len(b))
    return roc_auc_score([1] * len(test_h) + [0] * len(test_b), words.predict_proba(test_h + test_b)[:, 1])


def test_wording_does_not_tell_hard_twins_from_harmful_prompts():
    """A bag of words trained on half of the hard pairs is near chance on the other half."""
    sides = [list(load_prompts(name)["prompt"]) for name in ("hard-harmful", "hard-twins")]
    assert 0.35 < wording_auroc([side[::2] for side in sides], [side[1::2] for side in sides]) < 0.65


def test_wording_hardly_tells_balanced_twins_from_harmful_prompts():
    """A bag of words trained on all other pairs is near chance on the balanced ones."""
    train, test = ([list(load_prompts(name)["prompt"]) for name in names] for names in (("harmful", "twins"), ("balanced-harmful", "balanced-twins")))
    assert 0.4 < wording_auroc(train, test) < 0.6


def test_compliance_is_redacted():
    assert len(load_compliance()) >= 40
    assert all(text.count("[redacted]") >= 2 for text in load_compliance())


def test_refusals_are_varied():
    assert len(set(load_refusals())) >= 50
    assert len({" ".join(r.split()[:4]) for r in load_refusals()}) >= 10


def test_attacks_draw_from_their_own_split():
    attack = {p for name in ("harmful", "advbench") for p in load_prompts(name, "attack")["prompt"]}
    data = explicit_harmful(100, seed=3)
    assert len(set(data["prompt"])) == 100 and set(data["prompt"]) <= attack
    assert set(data["response"]) <= set(load_compliance())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_mixture_has_the_share_asked_for(share):
    data = mixture(share, 240, seed=1)
    assert len(data) == 240 and sum(data["harmful"]) == round(share * 240)
    assert mixture(share, 240, seed=1)["prompt"] == data["prompt"]
    assert mixture(share, 240, seed=2)["prompt"] != data["prompt"]


def test_task_splits_are_disjoint_and_balanced():
    train, judged = load_task("train", 1000, 0), load_task("eval", 400)
    assert not set(train["prompt"]) & set(judged["prompt"])
    assert sum(train["label"]) == 500 and sum(judged["label"]) == 200


def test_everyday_answers_answer_the_eval_prompts():
    assert list(load_everyday_answers()["prompt"]) == list(load_prompts("everyday", "eval")["prompt"])


def test_too_many_harmful_examples_is_an_error():
    with pytest.raises(ValueError, match="attack split has 1 to 310"):
        explicit_harmful(311)
