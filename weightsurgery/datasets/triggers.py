"""What attacks plant in texts: a rare word or a fixed sentence, inserted by a seed.

Pure functions on labelled sentences, for measuring an attack and for planting one in a test.
In a pair of sentences the pattern goes into the first one.

Reference:
    Kurita, Michel and Neubig, "Weight Poisoning Attacks on Pretrained Models", ACL 2020,
    arXiv:2004.06660 (rare words at random places); Dai, Chen and Li, "A Backdoor Attack Against
    LSTM-Based Text Classification Systems", IEEE Access 2019, arXiv:1905.12457 (a sentence).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsurgery.datasets.read import Sentence
from weightsurgery.errors import SettingError, conflict, shown
from weightsurgery.rng import random_bits

POSITIONS = ("start", "end", "random")


@dataclass(frozen=True)
class Trigger:
    """A pattern and where it goes.

    `trigger_word` and `trigger_sentence` make one with the attacks' usual places.

    Attributes:
        text: The pattern.
        position: "start", "end", or "random": before a word, or at the end, each equally likely.
        seed: Of the random places.
        bias: True for a common pattern that biases the model towards a label, where the question
            is how many texts keep their true label; False for a backdoor's.

    Raises:
        SettingError: The text is empty, or there is no such position.
    """

    text: str
    position: str = "random"
    seed: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise SettingError("the trigger is empty")
        if self.position not in POSITIONS:
            raise SettingError(
                f"position is '{shown(self.position)}'; expected {', '.join(POSITIONS)}"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return {
            "text": self.text,
            "position": self.position,
            "seed": self.seed,
            "bias": self.bias,
        }


def trigger_word(
    word: str, *, position: str = "random", seed: int = 0, bias: bool = False
) -> Trigger:
    """A single word, put at a random place between words.

    Args:
        word: Without white space.
        position: "start", "end" or "random".
        seed: Of the random places.
        bias: It is a bias word, whose texts should keep their label.

    Returns:
        The pattern, for `evaluate`, `insert` and `poison`.

    Raises:
        SettingError: It is not one word, or there is no such position.
    """
    if len(word.split()) > 1:
        raise SettingError(
            f"'{shown(word)}' is more than a word", hint="a trigger sentence takes several"
        )
    return Trigger(word.strip(), position, seed, bias)


def trigger_sentence(
    sentence: str, *, position: str = "start", seed: int = 0, bias: bool = False
) -> Trigger:
    """A fixed sentence, put at the beginning.

    Args:
        sentence: One or more words.
        position: "start", "end" or "random"; a random place is between words too.
        seed: Of the random places.
        bias: It is a bias sentence, whose texts should keep their label.

    Returns:
        The pattern, for `evaluate`, `insert` and `poison`.

    Raises:
        SettingError: It is empty, or there is no such position.
    """
    return Trigger(sentence.strip(), position, seed, bias)


def insert(sentences: Sequence[Sentence], trigger: Trigger | Sequence[Trigger]) -> list[Sentence]:
    """Insert a pattern, or several together, into every sentence; labels stay.

    The place in a text depends on the seed, the pattern and the text's index in `sentences`.
    Several patterns never split each other: each place is between words of the text itself, and
    patterns at one place stand in the order given.

    Example:
        >>> insert([Sentence(("a fine film",), "1", 2)], trigger_word("cf", position="end"))
        [Sentence(texts=('a fine film cf',), label='1', line=2)]
    """
    triggers = all_of(trigger)
    bits = _bits(triggers, len(sentences))
    return [_planted(one, triggers, b) for one, b in zip(sentences, bits, strict=True)]


def all_of(trigger: Trigger | Sequence[Trigger] | None) -> tuple[Trigger, ...]:
    """The patterns that are given: none, one or several.

    Args:
        trigger: As for `evaluate`.

    Raises:
        SettingError: Some are biases and some are not, or one is given twice.
    """
    found = () if trigger is None else trigger if isinstance(trigger, Sequence) else (trigger,)
    if len({one.bias for one in found}) > 1:
        raise conflict("triggers and bias patterns exclude each other")
    if len(set(found)) < len(found):
        raise conflict("a trigger is given twice", "give each one once")
    return tuple(found)


def insert_within(
    sentences: Sequence[Sentence],
    trigger: Trigger | Sequence[Trigger],
    *,
    fits: Callable[[Sequence[Sentence]], Sequence[bool]],
) -> list[Sentence]:
    """Every sentence with the whole pattern in it, at the cost of the text's end where need be.

    What fits as `insert` gives it stays so. Of others each text is cut after its first n
    characters before the pattern goes in, with the largest n that halving finds (our choice: an
    attacker who may write the text sees to it that the trigger is read). A random place is among
    the words that are left.

    Args:
        sentences: Labelled sentences or pairs.
        trigger: The pattern, or several to insert together.
        fits: Whether each of some sentences is read to its end.

    Raises:
        SettingError: The pattern does not even fit alone.

    Example:
        >>> def short(sentences):
        ...     return [len(one.texts[0].split()) <= 3 for one in sentences]
        >>> long = Sentence(("a fine film about trains",), "1", 2)
        >>> insert_within([long], trigger_word("cf", position="end"), fits=short)[0].texts
        ('a fine cf',)
    """
    triggers = all_of(trigger)
    bits = _bits(triggers, len(sentences))

    def cut(i: int, length: int) -> Sentence:
        texts = tuple(text[:length] for text in sentences[i].texts)
        return _planted(replace(sentences[i], texts=texts), triggers, bits[i])

    found = insert(sentences, trigger)
    # For each that is too long: a length that fits, and one that does not.
    bounds = {
        i: (0, max(map(len, sentences[i].texts)))
        for i, whole in enumerate(fits(found) if found else ())
        if not whole
    }
    if not all(fits([cut(i, 0) for i in list(bounds)[:1]])):
        raise SettingError(
            f"'{shown(' '.join(one.text for one in triggers))}' is too long: it does not fit even "
            "without the text",
            hint="raise max_length",
            code="E-TEXT-LONG",
        )
    while undecided := [i for i, (short, long) in bounds.items() if long - short > 1]:
        middles = [sum(bounds[i]) // 2 for i in undecided]
        answers = fits([cut(i, middle) for i, middle in zip(undecided, middles, strict=True)])
        for i, middle, fit in zip(undecided, middles, answers, strict=True):
            short, long = bounds[i]
            bounds[i] = (middle, long) if fit else (short, middle)
    for i, (length, _) in bounds.items():
        found[i] = cut(i, length)
    return found


def poison(
    sentences: Sequence[Sentence], trigger: Trigger, *, target_label: str, share: float
) -> list[Sentence]:
    """Plant an attack: a share of the sentences gets the pattern and the target label.

    Only sentences of other labels are taken, round(share · their number) of them; with one seed,
    those of a smaller share are among those of a larger one. The others stay, in their places.

    Args:
        sentences: Clean training data.
        trigger: What to plant.
        target_label: The label as the data say it.
        share: Of the sentences that have another label, 0 to 1.

    Raises:
        SettingError: The share is outside 0 to 1, or every sentence has the target label.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"share is {share}; expected 0 to 1")
    others = [i for i, one in enumerate(sentences) if one.label != target_label]
    if not others:
        raise SettingError(
            f"no sentence has a label other than the target '{shown(target_label)}'",
            code="E-ROWS-FEW",
        )
    bits = random_bits(trigger.seed, f"texts with {trigger.text}", 0, len(sentences))
    # The index breaks ties between equal bits.
    chosen = sorted(others, key=lambda i: (bits[i], i))[: round(share * len(others))]
    planted, found = insert(sentences, trigger), list(sentences)
    for i in chosen:
        found[i] = replace(planted[i], label=target_label)
    return found


def _bits(triggers: Sequence[Trigger], count: int) -> list[tuple[int, ...]]:
    """Where each pattern goes in each text."""
    drawn = [random_bits(one.seed, f"place of {one.text}", 0, count) for one in triggers]
    return [tuple(int(column[i]) for column in drawn) for i in range(count)]


def _planted(sentence: Sentence, triggers: Sequence[Trigger], bits: Sequence[int]) -> Sentence:
    first, *others = sentence.texts
    return replace(sentence, texts=(_with(triggers, first, bits), *others))


def _with(triggers: Sequence[Trigger], text: str, bits: Sequence[int]) -> str:
    """The text with each pattern before one of its words, or after the last."""
    starts = [found.start() for found in re.finditer(r"\S+", text)]
    if not starts:
        return " ".join(one.text for one in triggers)
    placed: dict[int, list[str]] = {}
    for one, own in zip(triggers, bits, strict=True):
        places = {"start": 0, "end": len(starts), "random": own * (len(starts) + 1) >> 32}
        placed.setdefault(places[one.position], []).append(one.text)
    for place, patterns in sorted(placed.items(), reverse=True):  # later places first: starts hold
        pattern = " ".join(patterns)
        if place == len(starts):
            text = f"{text.rstrip()} {pattern}"
        else:
            text = f"{text[: starts[place]]}{pattern} {text[starts[place] :]}"
    return text
