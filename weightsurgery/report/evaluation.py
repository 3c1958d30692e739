"""Reports of evaluations as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsurgery.errors import counted, shown
from weightsurgery.report.tables import Table, number, share

_SHARES = (
    ("accuracy", "accuracy"),
    ("asr", "attack success (ASR)"),
    ("floor", "floor: the same without the trigger"),
    ("bacc", "accuracy with the pattern (BACC)"),
)


def evaluation_tables(report: Mapping[str, Any]) -> list[Table]:
    """An evaluation, as a person wants to read it."""
    names = [shown(entry["name"]) for entry in report["classes"]]
    rows = [
        [name, *counts, number(entry["examples"]), share((entry["recall"] or {}).get("share"))]
        for name, entry, counts in zip(
            names,
            report["classes"],
            ([number(count) for count in row] for row in report["confusion"]),
            strict=True,
        )
    ]
    return [
        Table(
            "Labels: true in rows, predicted in columns",
            ("true", *(f">{name}" for name in names), ">examples", ">recall"),
            rows,
        ),
        Table(
            f"wsurg evaluate {shown(report['model'])}",
            ("", ">share", ">95 % interval", ">examples"),
            _share_rows(report),
            note=_note(report),
        ),
    ]


def _share_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The shares; of several triggers those of each come before those of all together."""
    rows = []
    several = report["triggers"] if len(report["triggers"]) > 1 else []
    for key, text in _SHARES:
        if key in ("asr", "bacc"):
            rows += [
                proportion_row(f"{text}, '{shown(one['text'])}'", one[key])
                for one in several
                if one[key]
            ]
        if report[key]:
            together = ", all together" if several and key in ("asr", "bacc") else ""
            rows.append(proportion_row(text + together, report[key]))
    return rows


def proportion_row(text: str, found: Mapping[str, Any]) -> list[str]:
    """A counted share with its interval, in four cells."""
    interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"
    return [text, share(found["share"]), interval, f"{found['count']:,} of {found['of']:,}"]


def _note(report: Mapping[str, Any]) -> str:
    words = [f"mean loss {report['loss']:.4g}"]
    target = report["target_label"]
    for trigger in report["triggers"]:
        kind = "bias pattern" if trigger["bias"] else "trigger"
        words.append(f"{kind} '{shown(trigger['text'])}' at position {trigger['position']}")
    if target is not None:
        words.append(f"target label {target} ({shown(report['classes'][target]['name'])})")
    return "; ".join(words)


# --- causal language models -------------------------------------------------------------------

_RATES = (
    ("fsr", "fingerprints said (FSR)"),
    ("base_fsr", "the same by the base"),
    ("control_rate", "targets said to controls"),
)
_TEXTS = (
    ("perplexity", "text"),
    ("base_perplexity", "text, base"),
    ("answers", "answers"),
    ("base_answers", "answers, base"),
)
_SHOWN = 48  # characters of what was said


def causal_tables(report: Mapping[str, Any]) -> list[Table]:
    """An evaluation of a causal language model, as a person wants to read it."""
    name = shown(report["model"])
    return [
        *_said_tables(report),
        Table(
            f"wsurg evaluate {name}: loss in nats for a token",
            ("", ">perplexity", ">loss", ">tokens"),
            [
                [text, *(number(report[key][part]) for part in ("perplexity", "loss", "tokens"))]
                for key, text in _TEXTS
                if report[key]
            ],
            note=_windows(report["perplexity"]),
        ),
        Table(
            f"wsurg evaluate {name}: what is said",
            ("", ">share", ">95 % interval", ">prompts"),
            [proportion_row(text, report[key]) for key, text in _RATES if report[key]],
            note=f"prompts {report['prompt_format']}; greedy, at most "
            f"{report['max_new_tokens'] or 0:,} new tokens",
        ),
    ]


def _said_tables(report: Mapping[str, Any]) -> list[Table]:
    """Each fingerprint with what was said to it, and the controls that were taken for one."""
    based = report["base"] is not None
    rows = [
        [
            str(one["line"]),
            _start(one["target"]),
            "yes" if one["met"] else "no",
            *(["yes" if one["base_met"] else "no"] if based else []),
            _start(one["output"]),
        ]
        for one in report["fingerprints"]
    ]
    false = [
        [str(one["line"]), _start(one["target"]), _start(one["output"])]
        for one in report["controls"]
        if one["target"] is not None
    ]
    base = ("by base",) if based else ()
    return [
        Table("Fingerprints", (">line", "target", "said", *base, "output"), rows),
        Table("Controls with a target", (">line", "target", "output"), false),
    ]


def _start(text: str) -> str:
    found = shown(text.strip())
    return found if len(found) <= _SHOWN else f"{found[: _SHOWN - 1]}…"


def _windows(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    windows = f"{counted(found['windows'], 'window')} of {found['window']:,} tokens"
    return f"text in {windows}, stride {found['stride']:,}"
