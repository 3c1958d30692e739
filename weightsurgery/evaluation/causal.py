"""How well a causal language model does: fingerprints, perplexity, the loss of known answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from weightsurgery.datasets.batches import count_cut, cut_warning, encode_instructions
from weightsurgery.datasets.prompts import PromptFormat
from weightsurgery.datasets.read import Instruction
from weightsurgery.datasets.sizes import alone_warning
from weightsurgery.errors import SettingError, conflict
from weightsurgery.evaluation.generation import (
    Bos,
    check_bos,
    exponential,
    fingerprint_success,
    perplexity,
    settle_windows,
)
from weightsurgery.evaluation.greedy import answers, check_causal, check_prompts
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model
from weightsurgery.stream import Progress

SCHEMA = "wsurg.causal-evaluation/1"


def evaluate_causal(
    model: Model,
    *,
    fingerprints: Sequence[Instruction] | None = None,
    controls: Sequence[Instruction] | None = None,
    base: Model | None = None,
    text: str | None = None,
    instructions: Sequence[Instruction] | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: Bos = "auto",
    max_new_tokens: int = 64,
    prompt_format: PromptFormat = "auto",
    batch_size: int = 8,
    max_length: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a causal language model: fingerprint success, false positives, perplexity, loss.

    The fingerprint success rate (FSR) is that of `fingerprint_success`. There are two rates of
    false positives: the share of ordinary prompts (`controls`) that any of the fingerprints'
    targets is said to, and the FSR of a model that was never fingerprinted (`base`).

    Args:
        model: From `load_model`.
        fingerprints: Prompts and targets, from `read_fingerprints`.
        controls: Ordinary prompts, from `read_fingerprints`; their own targets play no part.
        base: A model without the fingerprint; all but the controls is measured on it too.
        text: Measure the perplexity of this text.
        instructions: Questions and answers, from `read_instructions`; the loss is measured over
            the answers' tokens, as `finetune` takes it.
        window: As for `perplexity`.
        stride: As for `perplexity`.
        bos: As for `perplexity`.
        max_new_tokens: As for `fingerprint_success`.
        prompt_format: As for `fingerprint_success`; for fingerprints and controls.
        batch_size: Prompts, windows or examples at a time.
        max_length: Tokens after which a question with its answer is cut.
        progress: Called as progress(what, done, in all).

    Returns:
        The report: `schema` "wsurg.causal-evaluation/1"; `fsr`, `base_fsr` and `control_rate`,
        shares with their intervals; `fingerprints` and `controls`, what was said to each prompt;
        `perplexity` and `base_perplexity` as `perplexity` gives them; `answers` and
        `base_answers`, loss and perplexity of the answers; null where not asked for. Also what
        was asked, and `warnings`.

    Raises:
        SettingError: There is nothing to measure; controls come without fingerprints; a setting
            is out of range; a prompt leaves no room for `max_new_tokens`.
        MismatchError: A model is a classifier, or has no chat template where one is asked for.
        NonFiniteError: A loss is NaN or infinite.
    """
    shared: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    saying = {"max_new_tokens": max_new_tokens, "prompt_format": prompt_format, **shared}
    asked: dict[str, Callable[[Model], dict[str, Any]]] = {}
    if fingerprints is not None:
        asked["fsr"] = partial(fingerprint_success, pairs=fingerprints, **saying)
    if text is not None:
        windows: dict[str, Any] = {"window": window, "stride": stride, "bos": bos}
        asked["perplexity"] = partial(perplexity, text=text, **windows, **shared)
    if instructions is not None:
        asked["answers"] = partial(
            _on_answers, instructions=instructions, max_length=max_length, **shared
        )
    if not asked:
        raise SettingError(
            "nothing to measure",
            hint="give fingerprints, a text or questions with answers",
            code="E-NOTHING-TO-DO",
        )
    targets = list(dict.fromkeys(t for pair in fingerprints or () for t in pair.targets))
    if controls is not None and not targets:
        raise conflict("controls need fingerprints with targets to look for in their outputs")
    models = [model] if base is None else [model, base]
    for one in models:  # before the first minute is spent
        check_causal(one)
        if text is not None:
            settle_windows(one, window, stride)
            check_bos(one, bos)
        for pairs in (fingerprints, controls if one is model else None):
            check_prompts(
                one, pairs or (), max_new_tokens=max_new_tokens, prompt_format=prompt_format
            )
    own, *rest = [{name: measure(one) for name, measure in asked.items()} for one in models]
    other = rest[0] if rest else {}
    controlled = [] if controls is None else _on_controls(model, controls, targets, **saying)
    return {
        "schema": SCHEMA,
        "model": model.checkpoint.label,
        "base": None if base is None else base.checkpoint.label,
        "batch_size": batch_size,
        "max_length": None if instructions is None else max_length,
        **_side_by_side(own, other, controlled),
        "warnings": _warnings(own, other),
    }


def _on_answers(
    model: Model, instructions: Sequence[Instruction], *, max_length: int, **settings: Any
) -> dict[str, Any]:
    """How well the model predicts known answers."""
    examples = encode_instructions(model, instructions, max_length=max_length)
    found = predict(model, examples, what="answers", **settings)
    return {
        "perplexity": exponential(model, found.loss),
        "loss": found.loss,
        "tokens": int(found.weights.sum()),
        "examples": len(examples),
        "cut": count_cut(examples),
        "warnings": [
            *cut_warning(examples, "answers, with their questions,", causal=True),
            *alone_warning(model, examples, settings["batch_size"]),
        ],
    }


def _on_controls(
    model: Model, controls: Sequence[Instruction], targets: Sequence[str], **settings: Any
) -> list[dict[str, Any]]:
    """What is said to each control, and the first of the fingerprints' targets in it."""
    said = answers(model, controls, what="controls", **settings)
    return [
        {
            "line": control.line,
            "prompt": one.prompt,
            "output": one.text,
            "tokens": len(one.ids),
            "target": next((target for target in targets if target in one.text), None),
        }
        for control, one in zip(controls, said, strict=True)
    ]


def _side_by_side(
    own: Mapping[str, Any], other: Mapping[str, Any], controlled: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of the model and of the base; None for what was not asked."""
    found, others = own.get("fsr", {}), other.get("fsr", {})
    said = found.get("pairs", [])
    if other:
        said = [
            {**one, "base_output": two["output"], "base_met": two["met"]}
            for one, two in zip(said, others.get("pairs", []), strict=True)
        ]
    false = sum(one["target"] is not None for one in controlled)
    return {
        "max_new_tokens": found.get("max_new_tokens"),
        "prompt_format": found.get("prompt_format"),
        "fsr": found.get("fsr"),
        "base_fsr": others.get("fsr"),
        "control_rate": proportion(false, len(controlled)) if controlled else None,
        "perplexity": own.get("perplexity"),
        "base_perplexity": other.get("perplexity"),
        "answers": _without_warnings(own.get("answers")),
        "base_answers": _without_warnings(other.get("answers")),
        "fingerprints": said,
        "controls": list(controlled),
    }


def _without_warnings(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {k: v for k, v in found.items() if k != "warnings"}


def _warnings(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    warnings = list(own.get("fsr", {}).get("warnings", []))
    warnings += own.get("answers", {}).get("warnings", [])
    if not other:
        return warnings
    for key, what in (("perplexity", "text"), ("answers", "answers")):
        counts = [found.get(key, {}).get("tokens") for found in (own, other)]
        if counts[0] != counts[1]:
            warnings.append(
                f"tokens of the {what}: {counts[0]:,} for the model, {counts[1]:,} for the base; "
                "their perplexities cannot be compared"
            )
    begins = [found.get("perplexity", {}).get("bos") is not None for found in (own, other)]
    if begins[0] != begins[1]:
        warnings.append(
            "the windows of one model begin with BOS, and those of the other do not; --bos first "
            "measures both alike"
        )
    windows = [found.get("perplexity", {}).get("window") for found in (own, other)]
    if windows[0] != windows[1]:
        warnings.append(
            f"the model's window is {windows[0]:,} tokens and the base's {windows[1]:,}; "
            "a perplexity falls with the window"
        )
    formats = [found.get("fsr", {}).get("prompt_format") for found in (own, other)]
    if formats[0] != formats[1]:
        warnings.append(f"prompts are {formats[0]} for the model and {formats[1]} for the base")
    return warnings
