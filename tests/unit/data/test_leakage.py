"""Leaks are found whatever their spelling, and nothing else is."""

import random
import re
from collections import Counter
from itertools import chain

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_exp.data import columns, leakage

WORDS = st.lists(
    st.sampled_from(["the", "a", "slab", "wall", "roof", "floor", "beam", "load", "cost", "time", "is", "of", "for"]),
    max_size=30,
)


def row(prompt: str, completion: str = "", context: str = "") -> dict[str, str]:
    return {"prompt": prompt, "input": context, "completion": completion}


def test_same_question_is_an_exact_leak_despite_case_and_spaces():
    found = leakage.find([row("other"), row("What  is a SLAB?", "x")], [row("What is a slab", "y")], 0.7)
    assert found == [leakage.Leak(1, 0, "exact", 1.0)]


@pytest.mark.parametrize("other", ["Calculate -5 + 3.", "Calculate (5 * 3).", "Is x < y?"])
def test_mathematical_signs_distinguish_questions(other: str):
    assert not [
        one
        for one in leakage.find([row(other)], [row("Calculate 5 - 3."), row("Is x > y?")], 1.0)
        if one.kind == "exact"
    ]


def test_dialogues_are_compared_by_all_turns():
    def dialogue(first: str) -> dict:
        turns = [first, "Sure: ...", "Thank you!", "You are welcome."]
        return row("Thank you!", turns[-1]) | {"messages": [{"role": "-", "content": turn} for turn in turns]}

    assert not leakage.find([dialogue("What is a beam made of?")], [dialogue("How much does a roof cost?")], 1.0)
    assert leakage.find([dialogue("What is a beam made of?")], [dialogue("what is a beam made of?")], 1.0)


def test_question_of_a_completion_of_several_messages_ends_before_its_first_answer():
    def rows(call: str) -> dict:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": call, "train": True}]
        return row("q", "a") | {"messages": [*turns, {"role": "tool", "content": call}, turns[1]]}

    (found,) = leakage.find([rows("one")], [rows("two")], 1.0)
    assert found.kind == "exact"


def test_shared_preamble_is_not_a_leak():
    preamble = " ".join(f"word{number}" for number in range(200))
    train = [row(f"{preamble} train question {number} of its own kind") for number in range(50)]
    heldout = [row(f"{preamble} held-out question {number} about other things") for number in range(50)]
    assert leakage.find(train, heldout, 0.3) == []


def test_different_input_is_a_different_question():
    assert not leakage.find([row("Translate", "a b", "eins zwei")], [row("Translate", "c d", "drei vier")], 0.7)


def test_plain_text_is_compared_by_itself():
    text = "one two three four five six seven eight nine ten"
    (found,) = leakage.find([row("", text)], [row("", "something else"), row("", text.title())], 0.7)
    assert (found.heldout, found.kind) == (1, "exact")


def test_similar_text_is_a_near_leak_with_its_overlap():
    words = [f"w{number}" for number in range(24)]
    longer = row("q1", " ".join(words[2:]))
    (found,) = leakage.find([longer], [row("q2", " ".join(words[:4])), row("q2", " ".join(words))], 0.6)
    assert (found.heldout, found.kind) == (1, "near")
    # 22 words behind q1: 19 runs of five, of which the first is its own; 24 behind q2: 21
    assert found.overlap == 18 / (19 + 21 - 18)
    assert not leakage.find([longer], [row("q2", " ".join(words))], 0.9)


def test_short_rows_are_compared_whole():
    assert leakage.find([row("a", "b c")], [row("a b", "c")], 0.7)[0].kind == "near"
    assert not leakage.find([row("a", "b c")], [row("x", "b d")], 0.1)


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_index_equals_comparison_of_all_pairs(train: list[list[str]], heldout: list[list[str]]):
    def shingles(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}

    rows = [
        [row(f"q{number}{side}", " ".join(words)) for number, words in enumerate(part)]
        for side, part in (("t", train), ("h", heldout))
    ]
    found = {one.train: one.overlap for one in leakage.find(*rows, 0.5)}
    for index, words in enumerate(train):
        mine = shingles([f"q{index}t", *words])
        overlaps = [
            len(mine & other) / len(mine | other)
            for other in (shingles([f"q{number}h", *text]) for number, text in enumerate(heldout))
        ]
        worst = max(overlaps, default=0.0)
        assert found.get(index, 0.0) == (worst if worst >= 0.5 else 0.0)


def compared_one_by_one(train: list[dict], heldout: list[dict], threshold: float) -> list[leakage.Leak]:
    """Find leaks with Python's sets: slow, and easy to see through."""

    def shingles(one: dict) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", " ".join([one["prompt"], one["input"], one["completion"]]).casefold())
        return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}

    def question(one: dict) -> str:
        texts = [one["prompt"], one["input"]] if one["prompt"] or one["input"] else [one["completion"]]
        return "\0".join(" ".join(text.casefold().split()) for text in texts).rstrip(".?!\0 ")

    questions = [*map(question, heldout)]
    counted = Counter(chain.from_iterable(map(shingles, heldout)))
    common = {shingle for shingle, count in counted.items() if count > max(10, len(heldout) // 50)}
    others = [shingles(one) - common for one in heldout]
    leaks = []
    for index, one in enumerate(train):
        mine = shingles(one) - common
        overlaps = [len(mine & other) / len(mine | other) if mine & other else 0.0 for other in others]
        worst = max(overlaps, default=0.0)
        if question(one) in questions:
            leaks.append(leakage.Leak(index, questions.index(question(one)), "exact", 1.0))
        elif worst >= threshold:
            leaks.append(leakage.Leak(index, overlaps.index(worst), "near", worst))
    return leaks


ODD = st.lists(
    st.sampled_from(["a", "Straße", "STRASSE", "\u0130", "b_1", "x-y", "10.5", "!", "\n", "é", "\x85", "\x1c"]),
    max_size=14,
)
ANY_ROWS = st.lists(st.builds(row, *[st.one_of(ODD, WORDS).map(" ".join)] * 3), max_size=30)


@given(ANY_ROWS, ANY_ROWS, st.sampled_from([0.01, 0.3, 0.7, 1.0]))
@settings(deadline=None)
def test_arrays_equal_sets(train: list[dict], heldout: list[dict], threshold: float):
    # The same rows several times, so that some sequences are common.
    heldout = heldout * 3
    assert leakage.find(train, heldout, threshold) == compared_one_by_one(train, heldout, threshold)


def test_processes_find_the_same_leaks(monkeypatch):
    chance = random.Random(0)
    rows = [row(f"question {n % 90}", " ".join(chance.choices("abcd", k=9))) for n in range(200)]
    heldout, train = Dataset.from_list(rows[:60]), Dataset.from_list(rows[60:])
    expected = leakage.find(train, heldout, 0.1)
    monkeypatch.setattr(columns, "processes", lambda count: 2)
    monkeypatch.setattr(columns, "BATCH", 30)
    monkeypatch.setattr(leakage, "BATCH", 30)
    assert leakage.find(train, heldout, 0.1) == expected
    assert {leak.kind for leak in expected} == {"exact", "near"}


def test_leaks_of_many_rows_are_found_once(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path))
    monkeypatch.setattr(leakage, "_WORTH_KEEPING", 4)
    train = Dataset.from_list([row(f"question {number} of many") for number in range(4)])
    heldout = Dataset.from_list([row("Question 2 of many?"), row("quite another one")])
    found = leakage.find(train, heldout, 0.7)
    assert [(leak.train, leak.heldout, leak.kind) for leak in found] == [(2, 0, "exact")]
    with monkeypatch.context() as patch:
        patch.setattr(leakage, "_found", lambda *_: pytest.fail("looked for again"))
        assert leakage.find(train, heldout, 0.7) == found
    # Other rows or another threshold are another question.
    assert leakage.find(train.select([0, 2]), heldout.select([0, 1]), 0.7) == [leakage.Leak(1, 0, "exact", 1.0)]
    looked = []
    monkeypatch.setattr(leakage, "_found", lambda *given: looked.append(given[2]) or [])
    assert leakage.find(train, heldout, 0.8) == []
    assert looked == [0.8]
