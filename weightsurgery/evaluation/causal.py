"""How well a causal language model does: fingerprints, perplexity, the loss of known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightsurgery.datasets.batches import count_cut_answers, encode_instructions
from weightsurgery.datasets.prompts import PromptFormat
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import SettingError
from weightsurgery.evaluation.generation import (
    exponential,
    fingerprint_success,
    perplexity,
    settle_windows,
)
from weightsurgery.evaluation.greedy import answers, check_causal
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model
from weightsurgery.stream import Progress

SCHEMA = "wsurg.causal-evaluation/1"


@dataclass(frozen=True)
class _Wanted:
    """What to measure, and how; all as `evaluate_causal` has it.

    Attributes:
        fingerprints: Prompts and targets.
        controls: Ordinary prompts.
        text: For the perplexity.
        instructions: For the loss of answers.
        window: Tokens, None for the default.
        stride: Tokens, None for the default.
        max_new_tokens: Of what is said.
        prompt_format: Of fingerprints and controls.
        batch_size: Of all.
        max_length: Tokens of an instruction.
        progress: Callback.
    """

    fingerprints: Sequence[Instruction] | None
    controls: Sequence[Instruction] | None
    text: str | None
    instructions: Sequence[Instruction] | None
    window: int | None
    stride: int | None
    max_new_tokens: int
    prompt_format: PromptFormat
    batch_size: int
    max_length: int
    progress: Progress | None


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
    if fingerprints is None and text is None and instructions is None:
        raise SettingError(
            "nothing to measure", hint="give fingerprints, a text or questions with answers"
        )
    if controls is not None and fingerprints is None:
        raise SettingError("controls need fingerprints, whose targets are looked for")
    wanted = _Wanted(fingerprints, controls, text, instructions, window, stride, max_new_tokens,
                     prompt_format, batch_size, max_length, progress)  # fmt: skip
    for one in (model, base):
        if one is not None:
            _check(one, wanted)
    own = _measure(model, wanted)
    other = {} if base is None else _measure(base, wanted)
    found, others = own["fsr"] or {}, other.get("fsr") or {}
    said = found.get("pairs", [])
    if base is not None:
        said = [
            {**one, "base_output": two["output"], "base_met": two["met"]}
            for one, two in zip(said, others.get("pairs", []), strict=True)
        ]
    rate, controlled = _false_positives(model, wanted)
    return {
        "schema": SCHEMA,
        "model": model.checkpoint.label,
        "base": None if base is None else base.checkpoint.label,
        "batch_size": batch_size,
        "max_length": None if instructions is None else max_length,
        "max_new_tokens": found.get("max_new_tokens"),
        "prompt_format": found.get("prompt_format"),
        "fsr": found.get("fsr"),
        "base_fsr": others.get("fsr"),
        "control_rate": rate,
        "perplexity": own["perplexity"],
        "base_perplexity": other.get("perplexity"),
        "answers": own["answers"],
        "base_answers": other.get("answers"),
        "fingerprints": said,
        "controls": controlled,
        "warnings": _warnings(own, other, wanted),
    }


def _check(model: Model, wanted: _Wanted) -> None:
    """What can be refused before the first minute is spent."""
    check_causal(model)
    if wanted.text is not None:
        settle_windows(model, wanted.window, wanted.stride)


def _measure(model: Model, wanted: _Wanted) -> dict[str, Any]:
    """All that is asked of one model; None for what is not."""
    shared: dict[str, Any] = {"batch_size": wanted.batch_size, "progress": wanted.progress}
    fsr = surprise = None
    if wanted.fingerprints is not None:
        fsr = fingerprint_success(
            model,
            wanted.fingerprints,
            max_new_tokens=wanted.max_new_tokens,
            prompt_format=wanted.prompt_format,
            **shared,
        )
    if wanted.text is not None:
        surprise = perplexity(
            model, wanted.text, window=wanted.window, stride=wanted.stride, **shared
        )
    return {"fsr": fsr, "perplexity": surprise, "answers": _on_answers(model, wanted)}


def _on_answers(model: Model, wanted: _Wanted) -> dict[str, Any] | None:
    if wanted.instructions is None:
        return None
    examples = encode_instructions(model, wanted.instructions, max_length=wanted.max_length)
    found = predict(model, examples, batch_size=wanted.batch_size, progress=wanted.progress,
                    what="answers")  # fmt: skip
    return {
        "perplexity": exponential(model, found.loss),
        "loss": found.loss,
        "tokens": int(found.weights.sum()),
        "examples": len(examples),
        "cut": count_cut_answers(model, wanted.instructions, examples),
    }


def _false_positives(
    model: Model, wanted: _Wanted
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The share of controls to which a fingerprint's target is said, and what is said to each."""
    if wanted.controls is None or wanted.fingerprints is None:
        return None, []
    targets = list(dict.fromkeys(pair.answer.strip() for pair in wanted.fingerprints))
    said = answers(
        model,
        wanted.controls,
        batch_size=wanted.batch_size,
        max_new_tokens=wanted.max_new_tokens,
        prompt_format=wanted.prompt_format,
        progress=wanted.progress,
        what="controls",
    )
    found = [
        {
            "line": control.line,
            "prompt": one.prompt,
            "output": one.text,
            "tokens": len(one.ids),
            "target": next((target for target in targets if target in one.text), None),
        }
        for control, one in zip(wanted.controls, said, strict=True)
    ]
    return proportion(sum(one["target"] is not None for one in found), len(found)), found


def _warnings(own: dict[str, Any], other: dict[str, Any], wanted: _Wanted) -> list[str]:
    warnings = list((own["fsr"] or {}).get("warnings", []))
    if own["answers"] is not None and own["answers"]["cut"]:
        cut, count = own["answers"]["cut"], own["answers"]["examples"]
        warnings.append(
            f"{cut:,} of {count:,} answers, with their questions, were cut to "
            f"{wanted.max_length:,} tokens"
        )
    if not other:
        return warnings
    for key, what in (("perplexity", "text"), ("answers", "answers")):
        counts = [(found[key] or {}).get("tokens") for found in (own, other)]
        if counts[0] != counts[1]:
            warnings.append(
                f"tokens of the {what}: {counts[0]:,} for the model, {counts[1]:,} for the base; "
                "their perplexities cannot be compared"
            )
    windows = [(found["perplexity"] or {}).get("window") for found in (own, other)]
    if windows[0] != windows[1]:
        warnings.append(
            f"the model's window is {windows[0]:,} tokens and the base's {windows[1]:,}; "
            "a perplexity falls with the window"
        )
    formats = [(found["fsr"] or {}).get("prompt_format") for found in (own, other)]
    if formats[0] != formats[1]:
        warnings.append(f"prompts are {formats[0]} for the model and {formats[1]} for the base")
    return warnings
