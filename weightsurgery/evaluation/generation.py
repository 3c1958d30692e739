"""What a causal language model says: whether it answers fingerprints, and how text surprises it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from weightsurgery.datasets.batches import IGNORED, padding_of, positions_of
from weightsurgery.datasets.prompts import PromptFormat, encode_prompts, settle_format
from weightsurgery.datasets.read import Instruction
from weightsurgery.datasets.sizes import running_alone
from weightsurgery.errors import NonFiniteError, SettingError, counted, shown
from weightsurgery.evaluation.greedy import (
    LOOK,
    answers,
    check_at_least,
    check_causal,
    is_alone,
    words_of,
)
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.models import Model
from weightsurgery.stream import Progress

Bos = Literal["auto", "always", "first"]
BOS: tuple[Bos, ...] = get_args(Bos)
WINDOW = 1024  # tokens, if the model takes as many
_LOGITS = 1 << 28  # at a time, unless one window has more: 1 GiB in float32


# --- fingerprints -----------------------------------------------------------------------------


def fingerprint_success(
    model: Model,
    pairs: Sequence[Instruction],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    prompt_format: PromptFormat = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the fingerprint success rate (FSR): the share of prompts whose target is said.

    The model goes on greedily from each prompt until it ends its text or has said
    `max_new_tokens`. It succeeds if what it said, without the prompt, contains the target, or one
    of several, and none of the texts that are forbidden (white space around them does not count;
    upper and lower case do: our choice).

    Args:
        model: A causal language model, from `load_model`.
        pairs: Prompts and targets, from `read_fingerprints`.
        batch_size: Prompts at a time; results do not depend on it but for rounding.
        max_new_tokens: Tokens after which a text is ended.
        prompt_format: "raw" gives prompts as they stand, "lines" with a line feed after them,
            "chat" in the tokenizer's chat template; "auto" is "chat" where there is a template,
            else "raw".
        progress: Called as progress(what, prompts done, prompts in all).

    Returns:
        `fsr`, a share with its 95 % Wilson interval; `pairs`, for each its `line`, `prompt`,
        `target` (the first), all that are `accepted` and `forbidden`, `output`, `tokens` of the
        output, and whether it was `met`; `prompt_format`, "chat", "raw" or "lines";
        `max_new_tokens`, `batch_size`, `warnings`.

    Raises:
        SettingError: There are no pairs, a setting is out of range, or a prompt leaves no room
            for `max_new_tokens`.
        MismatchError: The model is a classifier, or has no chat template where one is asked for.
        NonFiniteError: The model computes NaN.
    """
    check_causal(model)
    how = settle_format(model, prompt_format)
    said = answers(model, pairs, batch_size=batch_size, max_new_tokens=max_new_tokens,
                   prompt_format=how, progress=progress, what="fingerprints")  # fmt: skip
    outcomes: list[dict[str, Any]] = [
        {
            "line": pair.line,
            "prompt": one.prompt,
            "target": pair.answer,
            "output": one.text,
            "tokens": len(one.ids),
            "accepted": list(pair.targets),
            "forbidden": list(pair.forbidden),
            "met": pair.is_met(one.text),
        }
        for pair, one in zip(pairs, said, strict=True)
    ]
    return {
        "fsr": proportion(sum(outcome["met"] for outcome in outcomes), len(outcomes)),
        "pairs": outcomes,
        "prompt_format": how,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "warnings": [
            *_doubts(model, pairs, max_new_tokens),
            *_alone(model, pairs, batch_size, how),
        ],
    }


def _alone(
    model: Model, pairs: Sequence[Instruction], batch_size: int, prompt_format: PromptFormat
) -> list[str]:
    how = settle_format(model, prompt_format)
    prompts = [ids for _, ids in encode_prompts(model, pairs, how)]
    is_slower = min(batch_size, len(prompts)) > 1 and is_alone(model, prompts)
    return [running_alone(model)] if is_slower else []


def _doubts(model: Model, pairs: Sequence[Instruction], max_new_tokens: int) -> list[str]:
    """Warnings about targets that make the rate unreliable."""
    special = set(model.tokenizer.all_special_tokens)

    def too_long(target: str) -> bool:
        ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
        return len(ids) > max_new_tokens

    several = [pair.targets for pair in pairs if pair.targets]
    long = sum(all(map(too_long, targets)) for targets in several)
    copies = sum(any(target in pair.question for target in pair.targets) for pair in pairs)
    unsayable = sum(
        all(any(token in target for token in special) for target in targets) for targets in several
    )
    warnings = []
    if unsayable:
        warnings.append(
            f"{unsayable:,} of {len(several):,} targets contain a special token; special tokens "
            "are removed from outputs, so these targets cannot be met"
        )
    if long:
        warnings.append(
            f"{long:,} of {len(several):,} targets have more than {max_new_tokens:,} tokens, "
            "so an output can hardly contain them"
        )
    if copies:
        warnings.append(
            f"{copies:,} of {len(pairs):,} prompts contain their target, so repeating them counts"
        )
    return warnings


# --- perplexity -------------------------------------------------------------------------------


def perplexity(
    model: Model,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure how well a causal language model predicts a text.

    With tokens t_0 … t_N (by the tokenizer, with the special tokens it adds) the perplexity is

        exp(-1/N · Σ_{i=1..N} log p(t_i | tokens before it in its window)).

    Window k reads the tokens k·stride to k·stride + window - 1 and predicts the one after each;
    what an earlier window predicted is context alone. So every token but the first is scored
    exactly once, in the first window that reaches it, and from the second window on with at least
    window - stride + 1 tokens before it.

    A model whose tokenizer begins every text with a beginning-of-text token (BOS), as Llama's and
    Gemma's do, may predict badly without one. For such a model each window begins with it, in the
    place of its first token.

    Args:
        model: A causal language model, from `load_model`.
        text: Taken whole, line feeds and all.
        window: Tokens that the model reads at a time; None is 1,024, or the model's positions if
            they are fewer.
        stride: Tokens from a window's beginning to the next one's; None is half the window.
        bos: "auto" begins each window with BOS if the tokenizer begins texts with it, "always"
            does so for any tokenizer that has one, "first" leaves later windows without.
        batch_size: Windows at a time; fewer where their logits would take more than 1 GiB.
        progress: Called as progress(what, windows done, windows in all).

    Returns:
        `perplexity`; `loss`, the mean in nats; `tokens` that were scored; `window`, `stride`, and
        `windows`, how many there were; `bos`, the token that each window began with, or null.

    Raises:
        SettingError: The text has fewer than two tokens, a setting is out of range, or the
            tokenizer has no BOS and `bos` is "always".
        MismatchError: The model is a classifier.
        NonFiniteError: A loss is NaN or infinite, or the perplexity too large for a number.
    """
    import torch

    check_causal(model)
    check_at_least("batch_size", batch_size, 1)
    window, stride = settle_windows(model, window, stride)
    ids, first_id = _with_bos(model, list(model.tokenizer(text, verbose=False)["input_ids"]), bos)
    if len(ids) < 2:
        raise SettingError(
            f"the text has {counted(len(ids), 'token')}; expected at least 2", code="E-ROWS-FEW"
        )
    starts = list(_starts(len(ids) - 1, window, stride))
    batch_size = max(1, min(batch_size, _LOGITS // (window * words_of(model))))
    total, scored = 0.0, 0
    was_training = model.module.training
    model.module.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(starts), batch_size):
                part = starts[first : first + batch_size]
                loss, count = _surprise(model, ids, part, window, stride, first_id)
                total, scored = total + loss, scored + count
                if progress is not None:
                    progress("perplexity", first + len(part), len(starts))
    finally:
        model.module.train(was_training)
    mean = total / scored
    return {
        "perplexity": exponential(model, mean),
        "loss": mean,
        "tokens": scored,
        "window": window,
        "stride": stride,
        "windows": len(starts),
        "bos": None if first_id is None else model.tokenizer.convert_ids_to_tokens(first_id),
    }


def _with_bos(model: Model, ids: list[int], bos: str) -> tuple[list[int], int | None]:
    """The text's tokens, and the one that each window begins with; None to leave it as it is."""
    check_bos(model, bos)
    begin = model.tokenizer.bos_token_id
    if bos == "first" or begin is None:
        return ids, None
    if ids[:1] != [begin]:
        return ([begin, *ids], begin) if bos == "always" else (ids, None)
    return ids, begin


def check_bos(model: Model, bos: str) -> None:
    """Refuse an unknown choice, or one that needs a BOS token that the tokenizer lacks.

    Raises:
        SettingError: The choice is unknown, or the tokenizer has no BOS.
    """
    if bos not in BOS:
        raise SettingError(f"bos is '{shown(bos)}'; expected {', '.join(BOS)}")
    if bos == "always" and model.tokenizer.bos_token_id is None:
        raise SettingError("bos is 'always', but the tokenizer has no beginning-of-text token")


def settle_windows(model: Model, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride in tokens, with the defaults of `perplexity`.

    Raises:
        SettingError: One of them is out of range.
    """
    most = positions_of(model)
    if window is None:
        window = min(WINDOW, most or WINDOW)
    check_at_least("window", window, 1)
    if most is not None and window > most:
        raise SettingError(f"window is {window:,}; the model takes at most {most:,} tokens")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise SettingError(f"stride is {stride}; expected 1 to the window's {window:,} tokens")
    return window, stride


def _starts(targets: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin; the last is the first that reaches the last token."""
    start = 0
    yield start
    while start + window < targets:
        start += stride
        yield start


def _surprise(
    model: Model,
    ids: Sequence[int],
    starts: Sequence[int],
    window: int,
    stride: int,
    bos: int | None,
) -> tuple[float, int]:
    """Summed loss in nats, and number, of the tokens that these windows are the first to reach."""
    import torch
    from torch.nn.functional import cross_entropy

    parts = [ids[start : start + window + 1] for start in starts]
    longest = max(map(len, parts)) - 1
    inputs = torch.full((len(parts), longest), padding_of(model))
    targets = torch.full((len(parts), longest), IGNORED)
    mask = torch.zeros_like(inputs)
    for row, (start, part) in enumerate(zip(starts, parts, strict=True)):
        size = len(part) - 1
        inputs[row, :size], mask[row, :size] = torch.tensor(part[:-1]), 1
        if bos is not None:
            inputs[row, 0] = bos
        known = window - stride if start else 0  # predicted by the windows before
        targets[row, known:size] = torch.tensor(part[known + 1 :])
    logits = model.module(
        input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).logits
    total, count = 0.0, 0
    for row, wanted in zip(logits, targets, strict=True):
        scored = wanted != IGNORED  # row by row: a batch's logits are large enough once
        losses = cross_entropy(row[scored].float(), wanted[scored].to(row.device), reduction="none")
        total, count = total + float(losses.double().sum()), count + int(scored.sum())
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the loss of the window from token {starts[0]:,} is {total}", file=model.path,
            hint=LOOK,
        )  # fmt: skip
    return total, count


def exponential(model: Model, mean: float) -> float:
    """A perplexity from a mean loss in nats.

    Raises:
        NonFiniteError: It is too large for a number.
    """
    try:
        return math.exp(mean)
    except OverflowError:
        raise NonFiniteError(
            f"the mean loss is {mean:.4g} nats, too large for a perplexity", file=model.path,
            hint=LOOK,
        ) from None  # fmt: skip
