"""Examples as batches of token ids, padded to their longest, in the order they are given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsurgery.datasets.prompts import Settled, prompt_ids, render, settle_format
from weightsurgery.datasets.read import (
    Instruction,
    Sentence,
    label_ids,
    read_instructions,
    read_sentences,
)
from weightsurgery.errors import MismatchError, SettingError, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.models import Model
from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that the loss leaves out
LOSSES = ("answer", "all")
_LOGITS = 1 << 26  # of a batch; four times in float32 they take 1 GiB


@dataclass(frozen=True)
class Encoded:
    """One example as numbers.

    Attributes:
        ids: Token ids, cut to the model's or the asked length.
        types: Token type ids, () where the tokenizer gives none.
        labels: The class, as the only entry; or for a causal model one label for each token,
            `IGNORED` outside the answer.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    labels: tuple[int, ...]


def read_examples(
    model: Model, data: str | os.PathLike[str], *, max_length: int = 128
) -> list[Encoded]:
    """Read a data file of the kind that the model's task needs, and encode it.

    Args:
        model: From `load_model`.
        data: Labelled sentences (.tsv, .csv, .jsonl) for a classifier, questions and answers
            (.jsonl) for a causal model.
        max_length: Tokens after which a text is cut.

    Returns:
        The examples as numbers, in the order of the file.

    Raises:
        FormatError: The file or a row of it is bad.
        MismatchError: A label is none of the model's.
        SettingError: `max_length` leaves no room.
    """
    if model.task == CLASSIFICATION:
        sentences = read_sentences(data)
        return encode_sentences(model, sentences, label_ids(sentences, model.labels, file=data),
                                max_length=max_length)  # fmt: skip
    return encode_instructions(model, read_instructions(data), max_length=max_length)


def encode_sentences(
    model: Model, sentences: Sequence[Sentence], labels: Sequence[int], *, max_length: int = 128
) -> list[Encoded]:
    """Sentences, or pairs of sentences, as the model's tokenizer makes them."""
    check_length(model, max_length)
    found = model.tokenizer(*_columns(sentences), truncation=True, max_length=max_length)
    types = found.get("token_type_ids") or [()] * len(sentences)
    return [
        Encoded(tuple(ids), tuple(kinds), (label,))
        for ids, kinds, label in zip(found["input_ids"], types, labels, strict=True)
    ]


def token_counts(model: Model, sentences: Sequence[Sentence]) -> list[int]:
    """How many tokens each sentence or pair has, special ones included, before any is cut."""
    if not sentences:
        return []
    found = model.tokenizer(*_columns(sentences), verbose=False)  # that some are long is asked
    return [len(ids) for ids in found["input_ids"]]


def count_cut(
    model: Model, sentences: Sequence[Sentence], examples: Sequence[Encoded], *, max_length: int
) -> int:
    """How many of the sentences have more than the `max_length` tokens of their examples."""
    full = [i for i, one in enumerate(examples) if len(one.ids) >= max_length]
    counts = token_counts(model, [sentences[i] for i in full])
    return sum(count > max_length for count in counts)


def count_cut_answers(
    model: Model, instructions: Sequence[Instruction], examples: Sequence[Encoded]
) -> int:
    """How many of the instructions have more tokens than their examples."""
    how = settle_format(model, "auto", plain="lines")
    whole = [sum(map(len, _tokens(model, one, how))) for one in instructions]
    return sum(count > len(one.ids) for count, one in zip(whole, examples, strict=True))


def _columns(sentences: Sequence[Sentence]) -> list[list[str]]:
    return [list(texts) for texts in zip(*(one.texts for one in sentences), strict=True)]


def encode_instructions(
    model: Model,
    instructions: Sequence[Instruction],
    *,
    max_length: int = 128,
    prompt_format: str = "auto",
    loss_on: str = "answer",
    max_question: int | None = None,
    max_answer: int | None = None,
) -> list[Encoded]:
    """Question and answer as one sequence, with the end-of-text token after it.

    What is too long is cut from the left of the question, then from the end of the answer, so
    that a chat's last marks stay (our choice).

    Args:
        model: A causal model, from `load_model`.
        instructions: From `read_instructions`.
        max_length: Tokens of both after which a text is cut.
        prompt_format: "chat" sets the question in the tokenizer's chat template; "raw" puts
            nothing between question and answer, "lines" a line feed; "auto" is chat if there is a
            template, else lines (our choice).
        loss_on: "answer" for the answer and the end-of-text token, "all" for the question too.
        max_question: Tokens of the question after which it is cut.
        max_answer: The same of the answer, with the end-of-text token.

    Raises:
        SettingError: A length leaves no room, or a choice is none of those.
        MismatchError: The tokenizer has no chat template, and "chat" is asked for.
    """
    check_length(model, max_length)
    if loss_on not in LOSSES:
        raise SettingError(f"loss_on is '{shown(loss_on)}'; expected {', '.join(LOSSES)}")
    how = settle_format(model, prompt_format, plain="lines")
    most = min(max_answer or max_length, max_length - 1)  # a token of the question stays

    def encode(one: Instruction) -> Encoded:
        question, answer = _tokens(model, one, how)
        answer = answer[:most]
        question = question[-min(max_question or max_length, max_length - len(answer)) :]
        ids = [*question, *answer]
        counted = 0 if loss_on == "all" else len(question)
        first = max(1, counted)  # nothing predicts the first token
        return Encoded(tuple(ids), (), (*[IGNORED] * first, *ids[first:]))

    return [encode(one) for one in instructions]


def _tokens(model: Model, one: Instruction, how: Settled) -> tuple[list[int], list[int]]:
    """Question and answer, each whole."""
    tokenizer = model.tokenizer
    question = prompt_ids(model, render(model, one, how), how)
    answer = tokenizer(one.answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return question, answer


def check_length(model: Model, max_length: int) -> None:
    """Refuse a length that the model cannot take.

    Raises:
        SettingError: It is below 2 or beyond the model's positions.
    """
    most = positions_of(model) or max_length
    if not 2 <= max_length <= most:
        raise SettingError(f"max_length is {max_length}; expected 2 to {most:,} tokens")


def positions_of(model: Model) -> int | None:
    """The most tokens that the model takes at a time; None if it sets no limit."""
    most: int | None = getattr(model.module.config, "max_position_embeddings", None) or None
    if most is not None and most < 0:  # XLNet's positions are relative
        most = None
    for name, module in model.module.named_modules():
        # RoBERTa and its kin count a text's positions from the one after padding's.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            room = module.num_embeddings - module.padding_idx - 1
            most = room if most is None else min(most, room)
    return most


def longest_first(examples: Sequence[Encoded]) -> list[int]:
    """An order of little padding, in which what memory is needed is needed at once."""
    return sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))


def batches(
    model: Model, examples: Sequence[Encoded], size: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Inputs and labels of `size` examples at a time, on the model's device.

    Labels have shape (examples,) for a classifier and (examples, tokens) for a causal model.
    """
    import torch

    pad, side = padding_of(model), padding_side(model)
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(len(one.ids) for one in part)

        def grid(rows: list[tuple[int, ...]], fill: int, longest: int = longest) -> torch.Tensor:
            fills = [[fill] * (longest - len(row)) for row in rows]
            padded = [
                [*row, *more] if side == "right" else [*more, *row]
                for row, more in zip(rows, fills, strict=True)
            ]
            return torch.tensor(padded, device=model.device)

        inputs = {
            "input_ids": grid([one.ids for one in part], pad),
            "attention_mask": grid([(1,) * len(one.ids) for one in part], 0),
        }
        if any(one.types for one in part):
            inputs["token_type_ids"] = grid([one.types for one in part], 0)
        if model.task == CLASSIFICATION:
            yield inputs, torch.tensor([one.labels[0] for one in part], device=model.device)
        else:
            yield inputs, grid([one.labels for one in part], IGNORED)


def padding_side(model: Model) -> str:
    """The side on which batches are padded: a classifier's is the tokenizer's, if that works."""
    wanted = "right"
    if model.task == CLASSIFICATION:
        wanted = getattr(model.tokenizer, "padding_side", wanted)
    return wanted if wanted in model.sides else next(iter(model.sides), "right")


def batch_size_for(model: Model, examples: Sequence[Encoded], size: int) -> int:
    """The batch size that changes no answer: `size`, or 1 for what must be run alone.

    Classifiers of encoder-decoder models (BART, T5) judge by the last end-of-text token and take
    no batch whose texts have different numbers of them.

    Args:
        model: From `load_model`.
        examples: What is to be run.
        size: The batch size that is wanted.
    """
    if padding_side(model) not in model.sides:
        return 1
    config = model.module.config
    if model.task == CLASSIFICATION and getattr(config, "is_encoder_decoder", False):
        end = getattr(config, "eos_token_id", None)
        if len({one.ids.count(end) for one in examples}) > 1:
            return 1
    return size


def bounded_batch_size(model: Model, examples: Sequence[Encoded], size: int) -> int:
    """`batch_size_for`, and fewer where a causal model's logits would take more than 1 GiB.

    The loss and its gradient hold the logits of a batch about four times, in float32.

    Args:
        model: From `load_model`.
        examples: What is to be run.
        size: The batch size that is wanted.
    """
    size = batch_size_for(model, examples, size)
    if model.task == CLASSIFICATION or not examples:
        return size
    words: int = model.module.get_input_embeddings().weight.shape[0]
    longest = max(len(one.ids) for one in examples)
    return max(1, min(size, _LOGITS // (longest * words)))


def padding_of(model: Model) -> int:
    """The token that fills a batch; for a causal model any will do, as nothing looks at it."""
    known = [model.tokenizer.pad_token_id, model.tokenizer.eos_token_id]
    if model.task == CLASSIFICATION:  # `load_model` has seen to it that there is one
        known.insert(0, getattr(model.module.config, "pad_token_id", None))
    return next((pad for pad in known if pad is not None), 0)


def check_examples(model: Model, examples: Sequence[Encoded]) -> None:
    """Refuse what has no cross-entropy.

    Raises:
        SettingError: There are no examples.
        MismatchError: The model is no single-label classifier, or an example has no token that
            counts.
    """
    if not examples:
        raise SettingError("no examples; expected at least one", code="E-NOTHING-TO-DO")
    if model.task == CLASSIFICATION:
        kind = getattr(model.module.config, "problem_type", None)
        if len(model.labels) < 2 or kind not in (None, "single_label_classification"):
            raise MismatchError(
                f"a head with {len(model.labels)} label(s) of type {kind or 'regression'}; "
                "expected a classifier that tells two or more labels apart",
                file=model.path,
                code="E-MODEL-TASK",
            )
        return
    for number, one in enumerate(examples, 1):
        if all(label == IGNORED for label in one.labels[1:]):
            raise MismatchError(
                f"example {number} has no answer token that the loss could cover",
                file=model.path,
                code="E-ROWS-ANSWER",
            )


def digest_of(examples: Sequence[Encoded]) -> str:
    """SHA-256 of token ids and labels: which examples an estimate is of."""
    rows = [[one.ids, one.types, one.labels] for one in examples]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def describe_files(files: Sequence[str | os.PathLike[str]]) -> list[dict[str, str]]:
    """Name and SHA-256 of data files, as records tell them."""
    names = [os.fspath(file) for file in files]
    return [
        {"name": shown(os.path.basename(name)), "sha256": InputFile(name).sha256()}
        for name in names
    ]
