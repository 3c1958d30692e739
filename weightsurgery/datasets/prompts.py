"""Prompts of causal language models: plain text, or in the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError, SettingError, shown
from weightsurgery.models import Model

Settled = Literal["chat", "raw", "lines"]
PromptFormat = Literal["auto", Settled]
FORMATS: tuple[PromptFormat, ...] = ("auto", *get_args(Settled))
_ANSWER = "weightsurgery"  # stands for an answer; a word that no template writes of its own


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
    return _templated(model, messages, line=one.line, add_generation_prompt=True)


def _templated(
    model: Model, messages: list[dict[str, str]], *, line: int, add_generation_prompt: bool
) -> str:
    """What the tokenizer's chat template makes of messages.

    Raises:
        MismatchError: The template refuses them.
    """
    try:
        text: str = model.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **model.template_args,
        )
    except Exception as error:  # a template raises what it likes
        reason = shown(" ".join(str(error).split()))
        raise MismatchError(
            f"its chat template refuses the messages of line {line}: {reason}",
            file=model.path,
            code="E-CHAT-TEMPLATE",
        ) from None
    return text


def with_template_args(model: Model, variables: Mapping[str, Any]) -> Model:
    """The same model, whose chat template is given these variables.

    Args:
        model: From `load_model`.
        variables: Name to value, such as enable_thinking to False.

    Raises:
        MismatchError: The tokenizer has no chat template, or the template does not use a variable.
    """
    template = str(getattr(model.tokenizer, "chat_template", None) or "")
    if not template:
        raise MismatchError(
            "its tokenizer has no chat template", file=model.path, code="E-CHAT-TEMPLATE"
        )
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise MismatchError(
                f"its chat template has no variable '{shown(name)}'",
                file=model.path,
                hint="check its spelling, or leave it out",
                code="E-CHAT-TEMPLATE",
            )
    return replace(model, template_args={**model.template_args, **variables})


def template_record(model: Model) -> dict[str, Any]:
    """The variables of the chat template for the record; {} if none are set.

    Args:
        model: From `load_model` or `with_template_args`.
    """
    return {"chat_template_args": dict(model.template_args)} if model.template_args else {}


def end_of_turn(model: Model, instructions: Sequence[Instruction], how: Settled) -> list[int]:
    """The tokens that end an answer.

    In a chat template they are what the template writes after the assistant's text, up to the
    first special token: `<end_of_turn>` of Gemma, `<|im_end|>` of Qwen, where the tokenizer's own
    end-of-text token is another. Where the template writes no special token there, and for all
    other formats, it is the tokenizer's end-of-text token; [] where there is none.

    Args:
        model: From `load_model`.
        instructions: The first one's messages are rendered with an answer, to see what ends it.
        how: As from `settle_format`.
    """
    tokenizer = model.tokenizer
    plain = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if how != "chat" or not instructions:
        return plain
    one = instructions[0]
    messages = [{"role": role, "content": text} for role, text in one.messages]
    messages.append({"role": "assistant", "content": _ANSWER})
    try:
        text = _templated(model, messages, line=one.line, add_generation_prompt=False)
    except MismatchError:  # a template for prompts alone
        return plain
    _, answer, end = text.rpartition(_ANSWER)
    ids = list(tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"])
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(
        getattr(tokenizer, "all_special_ids", ())
    )
    last = next((place for place, i in enumerate(ids) if i in special), None)
    return ids[: last + 1] if answer and last is not None else plain


def prompt_ids(model: Model, text: str, how: str) -> list[int]:
    """Token ids of a rendered prompt.

    A template brings its own special tokens; to raw text the tokenizer adds its own, but no end of
    the text, which some append to every text: the model is to continue the prompt.

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
