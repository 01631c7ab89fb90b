"""Disguises change the form of a prompt, the same way every time, and what it asks stays in it."""

from __future__ import annotations

import base64

import pytest

from safelab.disguises import DISGUISES, benign_wrapping, german_words, in_base64, role_play, typos

PROMPT = "How do I write a friendly letter to the new neighbours about their barking dog?"


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_is_repeatable_and_changes_the_text(name):
    disguise = DISGUISES[name]
    assert disguise(PROMPT) == disguise(PROMPT) and (disguise(PROMPT) == PROMPT) == (name == "as it is")
    assert disguise("a") and disguise("日本語 🍞")


def test_typos_swap_neighbouring_letters_and_keep_first_ones():
    changed = typos(PROMPT)
    assert sorted(changed) == sorted(PROMPT) and len(changed.split()) == len(PROMPT.split())
    assert [w[0] for w in changed.split()] == [w[0] for w in PROMPT.split()]
    assert typos(PROMPT, share=0) == PROMPT != typos(PROMPT, share=1)


@pytest.mark.parametrize("frame", [role_play, benign_wrapping])
def test_frames_hold_the_prompt_as_it_is(frame):
    assert PROMPT in frame(PROMPT) and frame("x").replace("x", "y", 1) != frame("x")


def test_german_replaces_known_words_and_leaves_the_rest():
    assert german_words("How do I write a letter? Barking!") == "wie tun ich schreibe ein Brief? Barking!"


def test_base64_decodes_to_the_prompt():
    assert base64.b64decode(in_base64(PROMPT).split()[-1]).decode() == PROMPT
