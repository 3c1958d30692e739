"""Greedy generation: what a causal language model says to prompts, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsurgery.datasets.batches import padding_of, positions_of
from weightsurgery.datasets.prompts import PromptFormat, encode_prompts, end_of_turn, settle_format
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError
from weightsurgery.models import Model, Quiet
from weightsurgery.stream import Progress
from weightsurgery.tasks import CAUSAL, require_task

if TYPE_CHECKING:
    import torch

LOOK = "look for weights that are NaN, infinite or huge with wsurg inspect --values"


@dataclass(frozen=True)
class Said:
    """What a model says to one prompt.

    Attributes:
        prompt: The text it was given, with its template.
        text: What is new, without special tokens.
        ids: The same as token ids, up to and without the one that ends the text.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]


def check_causal(model: Model) -> None:
    """Refuse a model that does not go on with a text.

    Raises:
        MismatchError: It is a classifier, or transformers cannot generate with it.
    """
    require_task(model.checkpoint, CAUSAL, model.task)
    if not model.module.can_generate():
        kind = type(model.module).__name__
        raise MismatchError(
            f"transformers generates no text with a {kind}", file=model.path, code="E-MODEL-TASK"
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a setting that is too small.

    Raises:
        SettingError: It is below `least`.
    """
    if value < least:
        raise SettingError(f"{name} is {value}; expected at least {least}")


def answers(
    model: Model,
    pairs: Sequence[Instruction],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompt_format: PromptFormat,
    progress: Progress | None = None,
    what: str = "generating",
) -> list[Said]:
    """What the model says to every prompt, greedily, in the order given.

    Prompts of like length share a batch; they are padded on the left, and nothing looks at the
    padding. The model's own generation settings (sampling, penalties, code of its own) are not
    used, only its tokens that end a text, and the one that ends a turn in the chat template.

    Args:
        model: A causal language model, from `load_model`.
        pairs: Whose messages are the prompts.
        batch_size: Prompts at a time.
        max_new_tokens: Tokens after which a text is ended.
        prompt_format: As for `fingerprint_success`.
        progress: Called as progress(what, prompts done, prompts in all).
        what: The word for `progress`.

    Raises:
        SettingError: There are no prompts, a setting is out of range, or a prompt leaves no room.
        NonFiniteError: The model computes NaN.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if not pairs:
        raise SettingError("no prompts; expected at least one", code="E-NOTHING-TO-DO")
    prompts = _checked_prompts(model, pairs, max_new_tokens, prompt_format)
    ends = end_of_turn(model, pairs, settle_format(model, prompt_format))[-1:]
    order = sorted(range(len(pairs)), key=lambda i: -len(prompts[i][1]))
    new: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = greedy(
            model, [prompts[i][1] for i in chosen], max_new_tokens=max_new_tokens, ends=ends
        )
        new |= zip(chosen, found, strict=True)
        if progress is not None:
            progress(what, len(new), len(order))
    return [
        Said(text, model.tokenizer.decode(list(new[i]), skip_special_tokens=True,
                                          clean_up_tokenization_spaces=False), new[i])
        for i, (text, _) in enumerate(prompts)
    ]  # fmt: skip


def check_prompts(
    model: Model, pairs: Sequence[Instruction], *, max_new_tokens: int, prompt_format: PromptFormat
) -> None:
    """Refuse, before anything is said, prompts that `answers` would refuse.

    Args:
        model: A causal language model.
        pairs: Whose messages are the prompts.
        max_new_tokens: Tokens after which a text is ended.
        prompt_format: As for `fingerprint_success`.

    Raises:
        SettingError: A prompt leaves no room, or has no token.
        MismatchError: The model has no chat template where one is asked for.
    """
    _checked_prompts(model, pairs, max_new_tokens, prompt_format)


def _checked_prompts(
    model: Model, pairs: Sequence[Instruction], new: int, prompt_format: PromptFormat
) -> list[tuple[str, list[int]]]:
    """The prompts as text and as tokens."""
    prompts = encode_prompts(model, pairs, settle_format(model, prompt_format))
    _check_room(model, pairs, [ids for _, ids in prompts], new)
    return prompts


def _check_room(
    model: Model, pairs: Sequence[Instruction], prompts: Sequence[list[int]], new: int
) -> None:
    most = positions_of(model)
    for pair, ids in zip(pairs, prompts, strict=True):
        if not ids:
            raise SettingError(f"line {pair.line}: the prompt has no token")
        if most is not None and len(ids) + new > most:
            raise SettingError(
                f"line {pair.line}: a prompt of {len(ids):,} tokens and max_new_tokens {new:,} "
                f"are more than the {most:,} that the model takes",
                code="E-TEXT-LONG",
            )


def greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
) -> list[tuple[int, ...]]:
    """The likeliest token, again and again, from all prompts at once.

    Args:
        model: A causal language model, from `load_model`; its training mode is as before
            afterwards.
        prompts: Token ids, at least one each.
        max_new_tokens: Tokens after which a text is ended.
        ends: Tokens that end a text besides the model's own.

    Returns:
        The new tokens of each, up to and without the first that ends a text.

    Raises:
        NonFiniteError: The model computes NaN.
    """
    import torch
    from transformers import GenerationConfig

    if is_alone(model, prompts):
        alone = (greedy(model, [one], max_new_tokens=max_new_tokens) for one in prompts)
        return [found for (found,) in alone]
    longest, pad = max(map(len, prompts)), padding_of(model)
    ids = [[*[pad] * (longest - len(one)), *one] for one in prompts]
    mask = [[*[0] * (longest - len(one)), *[1] * len(one)] for one in prompts]
    stops = end_tokens(model) | set(ends)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
    )
    module = model.module
    before, was_training = module.generation_config, module.training
    module.generation_config = config  # else what it leaves open is filled from the model's own
    module.eval()
    try:
        with torch.inference_mode(), Quiet():
            found = module.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
                logits_processor=[lambda _, scores: _numbers(model, scores)],
            )[:, longest:].tolist()
    finally:
        module.generation_config = before
        module.train(was_training)
    return [_until(stops, row) for row in found]


def is_alone(model: Model, prompts: Sequence[Sequence[int]]) -> bool:
    """True for prompts of different lengths if padding would change what the model says.

    Args:
        model: A causal language model, from `load_model`.
        prompts: Token ids.
    """
    return "left" not in model.sides and len({len(one) for one in prompts}) > 1


def _numbers(model: Model, scores: torch.Tensor) -> torch.Tensor:
    """Scores as they are; the largest of some that are NaN would look like any other token."""
    if bool(scores.isnan().any()):
        raise NonFiniteError("computes NaN as a score of the next token", file=model.path,
                             hint=LOOK)  # fmt: skip
    return scores


def end_tokens(model: Model) -> set[int]:
    """The tokens that end a text, by the tokenizer and by the model's own generation settings."""
    found = [model.tokenizer.eos_token_id]
    for config in (model.module.generation_config, model.module.config):
        named = getattr(config, "eos_token_id", None)
        found += named if isinstance(named, list) else [named]
    return {i for i in found if type(i) is int and 0 <= i < words_of(model)}


def words_of(model: Model) -> int:
    """How many tokens the model knows."""
    words: int = model.module.get_input_embeddings().num_embeddings
    return words


def _until(ends: set[int], ids: list[int]) -> tuple[int, ...]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])
