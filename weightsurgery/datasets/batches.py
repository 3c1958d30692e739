"""Examples as batches of token ids, padded to their longest, in the order they are given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightsurgery.datasets.arrow import dataset_files
from weightsurgery.datasets.labels import label_ids
from weightsurgery.datasets.prompts import end_of_turn, prompt_ids, render, settle_format
from weightsurgery.datasets.read import Instruction, Sentence, read_instructions, read_sentences
from weightsurgery.datasets.rows import Note
from weightsurgery.errors import MismatchError, SettingError, counted, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.models import Model
from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that the loss leaves out
LOSSES = ("answer", "all")


@dataclass(frozen=True)
class Encoded:
    """One example as numbers.

    Attributes:
        ids: Token ids, cut to the model's or the asked length.
        types: Token type ids, () where the tokenizer gives none.
        labels: The class, as the only entry; or for a causal model one label for each token,
            `IGNORED` outside the answer.
        whole: Tokens of the text before it was cut; 0 where that is not known.
        limit: Tokens after which it was to be cut; 0 where that is not known.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    labels: tuple[int, ...]
    whole: int = field(default=0, compare=False)
    limit: int = field(default=0, compare=False)

    @property
    def is_cut(self) -> bool:
        """Whether tokens of the text were left out."""
        return self.whole > len(self.ids)


def read_examples(
    model: Model,
    data: str | os.PathLike[str],
    *,
    max_length: int = 128,
    text_column: str | Sequence[str] = (),
    label_column: str = "",
    label_kind: str = "auto",
    note: Note | None = None,
) -> list[Encoded]:
    """Read a data file of the kind that the model's task needs, and encode it.

    Args:
        model: From `load_model`.
        data: Labelled sentences for a classifier, as `read_sentences` takes them; questions and
            answers for a causal model, as `read_instructions` does.
        max_length: Tokens after which a text is cut; `cut_warning` says how many were.
        text_column: Name of the text's column, or the two names of a pair; of the question's field
            for a causal model.
        label_column: Name of the label's column, or of the answer's field.
        label_kind: "ids" or "names", where labels can be both; "auto" goes by the labels.
        note: Called with a sentence about how the file is read, if that is unusual.

    Returns:
        The examples as numbers, in the order of the file.

    Raises:
        FormatError: The file or a row of it is bad.
        MismatchError: A label is not the model's, or may be an id as well as a name.
        SettingError: `max_length` leaves no room, or there is no such label kind.
    """
    if model.task == CLASSIFICATION:
        sentences = read_sentences(
            data, text_column=text_column, label_column=label_column, note=note
        )
        ids = label_ids(sentences, model.labels, file=data, label_kind=label_kind, note=note)
        return encode_sentences(model, sentences, ids, max_length=max_length)
    texts = (text_column,) if isinstance(text_column, str) else tuple(text_column)
    if len(texts) > 1:
        raise SettingError("text_column names two fields; a causal model has one question")
    question = "".join(texts)
    instructions = read_instructions(
        data, text_column=question, label_column=label_column, note=note
    )
    return encode_instructions(model, instructions, max_length=max_length)


def encode_sentences(
    model: Model, sentences: Sequence[Sentence], labels: Sequence[int], *, max_length: int = 128
) -> list[Encoded]:
    """Sentences, or pairs of sentences, as the model's tokenizer makes them."""
    check_length(model, max_length)
    found = model.tokenizer(*_columns(sentences), truncation=True, max_length=max_length)
    types = found.get("token_type_ids") or [()] * len(sentences)
    ids = found["input_ids"]
    whole = [len(one) for one in ids]
    full = [i for i, count in enumerate(whole) if count >= max_length]
    counts = token_counts(model, [sentences[i] for i in full])
    for i, count in zip(full, counts, strict=True):
        whole[i] = count
    return [
        Encoded(tuple(one), tuple(kinds), (label,), count, max_length)
        for one, kinds, label, count in zip(ids, types, labels, whole, strict=True)
    ]


def token_counts(model: Model, sentences: Sequence[Sentence]) -> list[int]:
    """How many tokens each sentence or pair has, special ones included, before any is cut."""
    if not sentences:
        return []
    found = model.tokenizer(*_columns(sentences), verbose=False)  # that some are long is asked
    return [len(ids) for ids in found["input_ids"]]


def count_cut(examples: Sequence[Encoded]) -> int:
    """How many of the examples lost tokens."""
    return sum(one.is_cut for one in examples)


def limit_of(examples: Sequence[Encoded]) -> int | None:
    """Tokens after which all of the examples were to be cut; None if that is not known."""
    limits = {one.limit for one in examples}
    return limits.pop() or None if len(limits) == 1 else None


def cut_warning(
    examples: Sequence[Encoded], what: str = "examples", *, causal: bool = False
) -> list[str]:
    """A warning if examples lost tokens.

    Args:
        examples: From `read_examples`, `encode_sentences` or `encode_instructions`.
        what: The word for them.
        causal: They are questions with answers, of which the question is cut from the left.
    """
    cut = count_cut(examples)
    if not cut:
        return []
    most, longest = limit_of(examples), max(one.whole for one in examples)
    to = f"to {counted(most, 'token')}" if most else "to their maximum lengths"
    where = ", the questions from the left" if causal else ""
    verb = "was" if cut == 1 else "were"
    return [
        f"{cut:,} of {len(examples):,} {what} {verb} cut {to}{where}; the longest has {longest:,}"
    ]


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
    """Question and answer as one sequence, with the end of the answer after it.

    In a chat template the answer ends as the template ends the assistant's turn, such as with
    <end_of_turn>; else with the tokenizer's end-of-text token.

    What is too long is cut from the left of the question, then from the end of the answer, so
    that a chat's last marks stay (our choice).

    Args:
        model: A causal model, from `load_model`.
        instructions: From `read_instructions`.
        max_length: Tokens of both after which a text is cut.
        prompt_format: "chat" sets the question in the tokenizer's chat template; "raw" puts
            nothing between question and answer, "lines" a line feed; "auto" is chat if there is a
            template, else lines (our choice).
        loss_on: "answer" for the answer and its end, "all" for the question too.
        max_question: Tokens of the question after which it is cut.
        max_answer: The same of the answer, with its end.

    Raises:
        SettingError: A length leaves no room, or a choice is none of those.
        MismatchError: The tokenizer has no chat template, and "chat" is asked for.
    """
    check_length(model, max_length)
    if loss_on not in LOSSES:
        raise SettingError(f"loss_on is '{shown(loss_on)}'; expected {', '.join(LOSSES)}")
    how = settle_format(model, prompt_format, plain="lines")
    most = min(max_answer or max_length, max_length - 1)  # a token of the question stays
    end = end_of_turn(model, instructions, how)
    limit = max_length if max_question is max_answer is None else 0

    def encode(one: Instruction) -> Encoded:
        question = prompt_ids(model, render(model, one, how), how)
        answer = [*model.tokenizer(one.answer, add_special_tokens=False)["input_ids"], *end]
        whole = len(question) + len(answer)
        answer = answer[:most]
        question = question[-min(max_question or max_length, max_length - len(answer)) :]
        ids = [*question, *answer]
        counted = 0 if loss_on == "all" else len(question)
        first = max(1, counted)  # nothing predicts the first token
        return Encoded(tuple(ids), (), (*[IGNORED] * first, *ids[first:]), whole, limit)

    return [encode(one) for one in instructions]


def check_length(model: Model, max_length: int) -> None:
    """Refuse a length that the model cannot take.

    Raises:
        SettingError: It is below 2 or beyond the model's positions.
    """
    most = positions_of(model) or max_length
    if not 2 <= max_length <= most:
        raise SettingError(
            f"max_length is {max_length}; expected 2 to {most:,} tokens",
            hint=f"this model has {most:,} positions" if max_length > most else "",
        )


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


def padding_of(model: Model) -> int:
    """The token that fills a batch; for a causal model any will do, as nothing looks at it."""
    known = [model.tokenizer.pad_token_id, model.tokenizer.eos_token_id]
    if model.task == CLASSIFICATION:  # `load_model` has seen to it that there is one
        known.insert(0, getattr(model.module.config, "pad_token_id", None))
    return next((pad for pad in known if pad is not None), 0)


def check_examples(model: Model, examples: Sequence[Encoded]) -> None:
    """Refuse examples for which no cross-entropy is defined.

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
    """Name and SHA-256 of data files, for the record."""
    found = []
    for file in [os.fspath(file) for file in files]:
        parts = dataset_files(file) if os.path.isdir(file) else [file]
        folder = os.path.dirname(file.rstrip(os.sep))
        for part in parts:
            name = shown(os.path.relpath(part, folder or "."))
            found.append({"name": name, "sha256": InputFile(part).sha256()})
    return found
