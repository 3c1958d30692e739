"""What a causal language model is given to go on from: a prompt as it stands, or in a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError, SettingError, shown
from weightsurgery.models import Model

Settled = Literal["chat", "raw", "lines"]
PromptFormat = Literal["auto", Settled]
FORMATS: tuple[PromptFormat, ...] = ("auto", *get_args(Settled))


def settle_format(model: Model, asked: str, *, plain: Settled = "raw") -> Settled:
    """The way to put prompts: as asked, and with "auto" in the chat template if there is one.

    Args:
        model: Its tokenizer may have a template.
        asked: One of `FORMATS`.
        plain: What "auto" means where there is none.

    Raises:
        SettingError: There is no such format.
        MismatchError: The tokenizer has no chat template, and one is asked for.
    """
    known: dict[str, Settled] = {how: how for how in get_args(Settled)}
    if asked not in FORMATS:
        raise SettingError(f"prompt_format is '{shown(asked)}'; expected {', '.join(FORMATS)}")
    templated = bool(getattr(model.tokenizer, "chat_template", None))
    if asked == "chat" and not templated:
        raise MismatchError(
            "its tokenizer has no chat template",
            file=model.path,
            hint="put prompts as raw text",
            code="E-CHAT-TEMPLATE",
        )
    return known.get(asked, "chat" if templated else plain)


def render(model: Model, one: Instruction, how: Settled) -> str:
    """The text before the answer.

    Args:
        model: From `load_model`.
        one: Whose messages are meant.
        how: "chat" puts them into the tokenizer's template, up to where the assistant begins;
            "raw" takes their texts alone, a line feed between them; "lines" puts one after them
            too.

    Raises:
        MismatchError: The template refuses these messages.
    """
    if how != "chat":
        return one.question + ("\n" if how == "lines" else "")
    messages = [{"role": role, "content": text} for role, text in one.messages]
    try:
        text: str = model.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template raises what it likes
        reason = shown(" ".join(str(error).split()))
        raise MismatchError(
            f"its chat template refuses the messages of line {one.line}: {reason}",
            file=model.path,
            code="E-CHAT-TEMPLATE",
        ) from None
    return text


def prompt_ids(model: Model, text: str, how: str) -> list[int]:
    """Token ids of a rendered prompt.

    A template brings its own special tokens; to raw text the tokenizer adds its own, but no end of
    the text, as some put behind every text: a prompt is to be gone on from.

    Args:
        model: Its tokenizer.
        text: From `render`, perhaps with something behind it.
        how: "chat", or anything else for raw text.
    """
    tokenizer = model.tokenizer
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if how == "chat":
        return plain
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    while ids and ids[-1] == end and plain[-1:] != [end]:
        ids.pop()
    return ids


def encode_prompts(
    model: Model, pairs: Sequence[Instruction], how: Settled
) -> list[tuple[str, list[int]]]:
    """Text and token ids of every prompt."""
    texts = [render(model, one, how) for one in pairs]
    return [(text, prompt_ids(model, text, how)) for text in texts]
