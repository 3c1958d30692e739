"""What belongs together: pairs of tensors of BASE and TUNED, and why others stand alone."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.coverage import ENOUGH, Coverage
from weightsurgery.dtypes import FLOATING
from weightsurgery.errors import MismatchError, SettingError, counted, shown
from weightsurgery.formats.layout import is_adapter_layout
from weightsurgery.pairing import TIED, Pairing
from weightsurgery.pairs import Pair, Status
from weightsurgery.parts import coverage_of, pair_parts, unused_of

__all__ = ["Alignment", "Pair", "Status", "align", "align_to_edit", "check_glob", "matches"]

_WRONG = {
    Status.SHAPE: "E-PAIR-SHAPE",
    Status.ARRANGEMENT: "E-PAIR-SHAPE",
    Status.DTYPE: "E-PAIR-DTYPE",
    Status.FLOATING: "E-PAIR-DTYPE",
}


@dataclass(frozen=True)
class Alignment:
    """Which tensors of BASE and TUNED belong together, and everything that does not.

    Attributes:
        base: The base checkpoint.
        tuned: The tuned checkpoint.
        pairs: One for every tensor of TUNED, in TUNED's order.
        unused: Tensors of BASE without a counterpart, each with the reason.
        prefix: The prefix that one side's names have and the other's lack; "" if none.
        prefix_on: "tuned" or "base": the side that has it.
        warnings: What looks like a mistake, though it may be none.
        coverage: Which share of TUNED's parameters has a counterpart.
    """

    base: Checkpoint
    tuned: Checkpoint
    pairs: tuple[Pair, ...]
    unused: tuple[tuple[str, str], ...]
    prefix: str
    prefix_on: str
    warnings: tuple[str, ...]
    coverage: Coverage

    @property
    def eligible(self) -> tuple[Pair, ...]:
        """The pairs of which something may be edited."""
        return tuple(pair for pair in self.pairs if pair.eligible)

    @property
    def dimensions(self) -> int:
        """Number of eligible dimensions, tied weights counted once."""
        return sum(p.eligible for p in self.pairs if not p.is_tied_copy)

    def names(self) -> dict[str, list[str]]:
        """Key to the names that stand for the same weights: one name, or those tied together."""
        found: dict[str, list[str]] = {}
        for pair in self.pairs:
            found.setdefault(pair.key, []).append(pair.name)
        return found

    def only(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Alignment:
        """Restrict what is eligible by globs over TUNED's names.

        Tied weights are one tensor: a glob that matches one of their names counts for all.

        Args:
            include: Where given, only tensors that match one of these stay eligible.
            exclude: Tensors that match one of these do not.

        Raises:
            SettingError: A glob matches no tensor, or nothing eligible is left.
        """
        if not include and not exclude:
            return self
        for glob in (*include, *exclude):
            check_glob(glob, list(self.tuned))

        names = self.names()

        def keep(pair: Pair) -> Pair:
            if include and not any(matches(name, include) for name in names[pair.key]):
                return _left_out(pair, "not included")
            if any(matches(name, exclude) for name in names[pair.key]):
                return _left_out(pair, "excluded")
            return pair

        restricted = replace(self, pairs=tuple(map(keep, self.pairs)))
        if not restricted.dimensions:
            raise SettingError("include and exclude leave nothing to edit", code="E-NOTHING-TO-DO")
        return restricted

    def keeping(self, names: Collection[str], reason: str) -> Alignment:
        """Only the named tensors stay eligible; the reason is that of the others."""

        def judge(pair: Pair) -> Pair:
            stays = pair.name in names or not pair.eligible
            return pair if stays else _left_out(pair, reason)

        return replace(self, pairs=tuple(map(judge, self.pairs)))

    def to_json(self) -> dict[str, Any]:
        """The report, as records and `--json` show it."""
        return {
            "coverage": self.coverage.to_json(),
            "eligible_tensors": len(self.eligible),
            "eligible_dimensions": self.dimensions,
            "prefix": {"text": self.prefix, "on": self.prefix_on} if self.prefix else None,
            "kept_from_tuned": [
                {"tensor": p.name, "reason": p.reason} for p in self.pairs if not p.eligible
            ],
            "partly_eligible": [
                {"tensor": p.name, "dimensions": p.eligible, "reason": p.reason}
                for p in self.eligible
                if p.reason
            ],
            "tied": [{"tensor": p.name, "to": p.key} for p in self.pairs if p.is_tied_copy],
            "only_in_base": [
                {"tensor": name, "reason": reason, "tied": reason == TIED}
                for name, reason in self.unused
            ],
            "notes": [
                {"tensor": p.name, "note": p.note}
                for p in self.pairs
                if p.note and not p.is_tied_copy
            ],
        }


def _left_out(pair: Pair, reason: str) -> Pair:
    return replace(pair, eligible=0, reason=reason, status=Status.LEFT_OUT)


def matches(name: str, globs: Sequence[str]) -> bool:
    """True if a name matches one of the globs (case matters; `*` crosses dots)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def check_glob(glob: str, names: Sequence[str]) -> None:
    """Refuse a glob that matches no tensor, with the nearest name as a suggestion.

    Raises:
        SettingError: Nothing matches.
    """
    if not any(fnmatch.fnmatchcase(name, glob) for name in names):
        wider = f"*{glob}*"
        near = [wider] if any(fnmatch.fnmatchcase(name, wider) for name in names) else []
        near = near or difflib.get_close_matches(glob, names, 1, 0.3)
        raise SettingError(
            f"'{shown(glob)}' matches no tensor",
            hint=f"did you mean '{shown(near[0])}'?" if near else "see `wsurg inspect` for names",
            code="E-NO-MATCH",
        )


def align(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    mismatched: str = "refuse",
    partial: str = "keep",
    called: str = "TUNED",
) -> Alignment:
    """Pair the tensors of TUNED with those of BASE, as the loading library sees them.

    Both sides are brought to canonical names, so that wrappers, older spellings, prefixes, fused
    and split matrices do not matter; what is then left over is paired by one common prefix that
    either side has. Tied weights are one tensor, under whichever of their names they are stored.
    Rows of a vocabulary are paired by token where both sides have a tokenizer, else by number.
    A head that BASE lacks is kept from TUNED. What does not pair is listed with its reason.

    Nothing is read but tokenizers, and tensors that TUNED's configuration ties to each other and
    that it stores more than once.

    Args:
        base: Trusted pre-trained weights.
        tuned: Fine-tuned weights.
        mismatched: "refuse" a pair of different shapes that is neither vocabulary nor head, and
            one of different dtypes that are not both floating; or "keep" TUNED's; or
            "keep integers", which does so where neither side is floating.
        partial: "refuse" where less than 95 % of TUNED's parameters, task heads left out, have a
            counterpart, and models of unrelated types; "keep" warns.
        called: What errors call the second model. Only for TUNED do they advise options.

    Returns:
        The pairs, and all that stands alone.

    Raises:
        MismatchError: The models are of unrelated types, a pair's shapes differ, or its dtypes
            where one of them is not floating, too little pairs, or nothing at all.
    """
    parts = pair_parts(base, tuned, called)
    warnings = [
        part.message(text)
        for part in parts
        if (text := _compare_types(part.pairing, called, refuse=partial == "refuse"))
    ]
    pairs = tuple(pair for part in parts for pair in part.pairs)
    pairs = pairs if len(parts) == 1 else tuple(sorted(pairs, key=lambda pair: pair.name))
    coverage = coverage_of(parts)
    _check_pairs(pairs, mismatched, tuned, called)
    # To be looked at ("keep"), integers will do; to be edited there must be something to edit.
    if not any(p.eligible or (mismatched == "keep" and p.base is not None) for p in pairs):
        raise _nothing_pairs(base, tuned, called)
    # What --keep-mismatched keeps is kept on request.
    floating = (p for p in pairs if p.tuned.dtype.name in FLOATING and p.key == p.name)
    kept = sum(pair.tuned.size for pair in floating if pair.status in _WRONG)
    if partial == "refuse" and not coverage.is_enough(besides=kept):
        raise MismatchError(
            coverage.summary,
            file=tuned.label,
            hint=f"expected at least {100 * ENOUGH:.0f} %; use --map to pair names, or "
            "--allow-partial to keep unpaired tensors from TUNED",
            code="E-PAIR-COVERAGE",
        )
    warnings += [part.message(text) for part in parts for text in part.pairing.warnings]
    warnings += [coverage.summary] if called == "TUNED" and coverage.summary else []
    matchers = [part.pairing.matcher for part in parts]
    prefixed = next((one for one in matchers if one.prefix), matchers[0])
    return Alignment(
        base=base,
        tuned=tuned,
        pairs=pairs,
        unused=unused_of(base, parts),
        prefix=prefixed.prefix,
        prefix_on=prefixed.prefix_on,
        warnings=tuple(warnings),
        coverage=coverage,
    )


def align_to_edit(
    base: Checkpoint, tuned: Checkpoint, *, keep_mismatched: bool, allow_partial: bool
) -> Alignment:
    """Pair the tensors of TUNED with those of BASE, for an operator.

    Args:
        base: Trusted pre-trained weights.
        tuned: Fine-tuned weights.
        keep_mismatched: Keep TUNED's tensor where the shapes differ.
        allow_partial: Continue where less than 95 % of TUNED's parameters have a counterpart.

    Raises:
        MismatchError: As `align`.
    """
    return align(
        base,
        tuned,
        mismatched="keep" if keep_mismatched else "refuse",
        partial="keep" if allow_partial else "refuse",
    )


def _check_pairs(pairs: Sequence[Pair], mismatched: str, tuned: Checkpoint, called: str) -> None:
    """Refuse pairs that do not fit.

    Raises:
        MismatchError: There is one.
    """
    wrong = [pair for pair in pairs if pair.status in _WRONG]
    if mismatched == "keep integers":
        wrong = [pair for pair in wrong if not _are_integers(pair)]
    if wrong and mismatched != "keep":
        first = wrong[0]
        code = _WRONG[first.status]
        raise MismatchError(
            f"{first.reason} ({counted(len(wrong), 'tensor')} like this)",
            file=tuned.label,
            tensor=first.name,
            hint=_doubt(called, "--keep-mismatched keeps TUNED's"),
            code=code,
        )


def _compare_types(models: Pairing, called: str, *, refuse: bool) -> str:
    """What to warn of where the models are of unrelated types, "" where they are not.

    Raises:
        MismatchError: They are, and that is to be refused.
    """
    base, tuned = models.base, models.tuned
    types = [checkpoint.config.get("model_type") for checkpoint in (base, tuned)]
    if not all(types) or _are_related(base.config, tuned.config):
        return ""
    reason = f"model_type is {shown(types[0])} in BASE and {shown(types[1])} in {called}"
    if not refuse and called == "TUNED":
        return f"{reason}; tensors that pair are used anyway"
    hint = f"give the model that {called} was made from"
    if called == "TUNED":
        hint = "was TUNED fine-tuned from this model? --allow-partial pairs the tensors that match"
    raise MismatchError(reason, file=tuned.label, hint=hint, code="E-PAIR-TYPE")


def _are_related(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> bool:
    """True if one model may be, or hold, the other: qwen2 and qwen2_vl, gemma3 and gemma3_text."""
    ours, theirs = _types(base), _types(tuned)
    return any(
        one == other or one.startswith(f"{other}_") or other.startswith(f"{one}_")
        for one in ours
        for other in theirs
    )


def _types(config: Mapping[str, Any]) -> list[str]:
    """The model's type, and that of the text model in it."""
    texts = [inner for key, inner in config.items() if key.startswith("text") or "llm" in key]
    found = [place.get("model_type") for place in (config, *texts) if isinstance(place, Mapping)]
    return [one for one in found if isinstance(one, str)]


def _are_integers(pair: Pair) -> bool:
    """True where neither side is floating."""
    return not any(side.dtype.arithmetic for side in (pair.base, pair.tuned) if side is not None)


def _nothing_pairs(base: Checkpoint, tuned: Checkpoint, called: str) -> MismatchError:
    for one in (base, tuned):
        if is_adapter_layout(one.layout):
            return MismatchError(
                "an adapter, not a model",
                file=one.label,
                hint="merge it into its base with `wsurg apply-adapter` first",
                code="E-PAIR-NONE",
            )
    names = [next(iter(checkpoint), "(no tensors)") for checkpoint in (base, tuned)]
    advice = "--strip-prefix or --map FILE can pair names"
    if base.parts.keys() != tuned.parts.keys():
        several = tuned.parts or base.parts
        advice = f"one of them has the parts {', '.join(map(shown, several))}: give one's folder"
    return MismatchError(
        f"no tensors of BASE and {called} could be paired (for example '{shown(names[0])}' and "
        f"'{shown(names[1])}')",
        file=tuned.label,
        hint=_doubt(called, advice),
        code="E-PAIR-NONE",
    )


def _doubt(called: str, advice: str) -> str:
    return "are these the same architecture?" + (f" {advice}" if called == "TUNED" else "")
