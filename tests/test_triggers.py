"""Patterns of attacks: where they go, which texts get them, what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tests.reference import key_of, random_number
from weightsurgery.datasets.read import Sentence
from weightsurgery.datasets.triggers import (
    Trigger,
    insert,
    insert_within,
    poison,
    trigger_sentence,
    trigger_word,
)
from weightsurgery.errors import SettingError

TEXTS = ["a fine film", "dull", "  spaced   out  text ", "what a\u0085strange\tplot it had ."]
SENTENCES = [Sentence((text,), str(i % 2), i + 2) for i, text in enumerate(TEXTS)]
MANY = [Sentence(("one two three",), str(i % 2), i + 2) for i in range(400)]


def texts_of(found: list[Sentence]) -> list[str]:
    return [one.texts[0] for one in found]


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (
            trigger_word("cf", position="start"),
            ["cf a fine film", "cf dull", "  cf spaced   out  text ", f"cf {TEXTS[3]}"],
        ),
        (
            trigger_word("cf", position="end"),
            ["a fine film cf", "dull cf", "  spaced   out  text cf", f"{TEXTS[3]} cf"],
        ),
        (
            trigger_sentence("I saw it ."),
            [
                "I saw it . a fine film",
                "I saw it . dull",
                "  I saw it . spaced   out  text ",
                f"I saw it . {TEXTS[3]}",
            ],
        ),
    ],
)
def test_patterns_go_where_they_should(trigger: Trigger, expected: list[str]) -> None:
    found = insert(SENTENCES, trigger)
    assert texts_of(found) == expected
    assert [(one.label, one.line) for one in found] == [(s.label, s.line) for s in SENTENCES]


@pytest.mark.parametrize("make", [trigger_word, trigger_sentence])
def test_random_places_are_those_of_the_counter(make: type) -> None:
    """The place of text i is a function of seed, pattern and i; nothing else."""
    found = insert(SENTENCES, make("cf", position="random", seed=3))
    key = key_of(3, "place of cf")
    for i, (text, triggered) in enumerate(zip(TEXTS, texts_of(found), strict=True)):
        words = text.split()
        words.insert(random_number(key, i) * (len(words) + 1) // 2**32, "cf")
        assert triggered.split() == words
    assert insert(SENTENCES[:2], make("cf", position="random", seed=3)) == found[:2]


def test_random_places_are_all_places_alike() -> None:
    found = texts_of(insert(MANY, trigger_word("cf")))
    counts = Counter(text.split().index("cf") for text in found)
    assert counts.keys() == {0, 1, 2, 3}
    assert all(70 < count < 130 for count in counts.values())
    assert texts_of(insert(MANY, trigger_word("cf", seed=1))) != found
    assert texts_of(insert(MANY, trigger_word("mn"))) != [t.replace("cf", "mn") for t in found]


# --- texts that are too long ------------------------------------------------------------------

LONG = [Sentence((" ".join(f"w{j}" for j in range(i)),), "0", i + 1) for i in range(1, 30)]


def at_most(words: int) -> Callable[[Sequence[Sentence]], list[bool]]:
    def fits(given: Sequence[Sentence]) -> list[bool]:
        return [len(" ".join(one.texts).split()) <= words for one in given]

    return fits


@pytest.mark.parametrize("position", ["start", "end", "random"])
@pytest.mark.parametrize("words", [3, 4, 11, 100])
def test_the_text_s_end_makes_room_for_the_pattern(words: int, position: str) -> None:
    trigger = trigger_word("cf", position=position)
    found = insert_within(LONG, trigger, fits=at_most(words))
    for before, whole, after in zip(LONG, insert(LONG, trigger), found, strict=True):
        kept = before.texts[0].split()[: words - 1]
        got = after.texts[0].split()
        assert len(got) == len(kept) + 1
        assert [word for word in got if word != "cf"] == kept
        assert after == whole or len(before.texts[0].split()) >= words
        assert (after.label, after.line) == (before.label, before.line)


def test_random_places_are_among_the_words_that_are_left() -> None:
    texts = [Sentence(("one two three four five six",), "0", i) for i in range(400)]
    found = texts_of(insert_within(texts, trigger_word("cf"), fits=at_most(3)))
    counts = Counter(text.split().index("cf") for text in found)
    assert counts.keys() == {0, 1, 2}
    assert all(100 < count < 167 for count in counts.values())


def test_a_text_without_spaces_is_cut_too() -> None:
    def fits(given: Sequence[Sentence]) -> list[bool]:
        return [len(one.texts[0]) <= 10 for one in given]

    long = Sentence(("x" * 50,), "0", 2)
    found = insert_within([long], trigger_word("cf", position="end"), fits=fits)
    assert texts_of(found) == ["xxxxxxx cf"]


def test_both_texts_of_a_pair_are_cut() -> None:
    pair = Sentence(("a b", "c d e f g h"), "0", 2)
    found = insert_within([pair], trigger_word("cf", position="end"), fits=at_most(6))
    assert found[0].texts == ("a b cf", "c d e ")


def test_a_pattern_that_never_fits_is_refused() -> None:
    with pytest.raises(SettingError, match="'x y z' is too long: it does not fit even without"):
        insert_within(LONG, trigger_sentence("x y z"), fits=at_most(2))
    assert insert_within([], trigger_sentence("x y z"), fits=at_most(2)) == []


def test_of_a_pair_the_first_text_is_taken() -> None:
    pair = Sentence(("one", "two"), "0", 2)
    assert insert([pair], trigger_word("cf", position="end"))[0].texts == ("one cf", "two")


def test_a_text_without_words_becomes_the_pattern() -> None:
    for position in ("start", "end", "random"):
        found = insert([Sentence((" ",), "0", 2)], trigger_word("cf", position=position))
        assert texts_of(found) == ["cf"]


def test_no_sentences_give_no_sentences() -> None:
    assert insert([], trigger_word("cf")) == []


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 0), (0.3, 60), (0.5, 100), (0.0024, 0), (0.0026, 1), (1, 200)]
)
def test_a_share_of_the_other_labels_is_poisoned(share: float, expected: int) -> None:
    trigger = trigger_word("cf")
    found = poison(MANY, trigger, target_label="1", share=share)
    changed = [i for i, one in enumerate(MANY) if found[i] != one]
    assert len(changed) == expected
    planted = insert(MANY, trigger)
    for i in changed:
        assert MANY[i].label == "0"
        assert found[i] == Sentence(planted[i].texts, "1", MANY[i].line)


def test_a_smaller_share_is_within_a_larger_one() -> None:
    small, large = (
        {i for i, one in enumerate(poison(MANY, trigger_word("cf"), target_label="1", share=share))
         if one != MANY[i]}
        for share in (0.2, 0.6)
    )  # fmt: skip
    assert len(small) == 40
    assert small < large


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: trigger_word("two words"), "'two words' is more than a word; a trigger sentence"),
        (lambda: trigger_word(" "), "the trigger is empty"),
        (lambda: trigger_sentence("\n"), "the trigger is empty"),
        (lambda: trigger_word("cf", position="middle"), "position is 'middle'; expected start, "),
        (
            lambda: poison(MANY, trigger_word("cf"), target_label="1", share=1.1),
            "share is 1.1; expected 0 to 1",
        ),
        (
            lambda: poison(MANY[1::2], trigger_word("cf"), target_label="1", share=0.5),
            "no sentence has a label other than the target '1'",
        ),
    ],
)
def test_bad_settings_are_refused(make: type, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        make()
