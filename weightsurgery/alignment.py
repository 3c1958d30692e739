"""What belongs together: pairs of tensors of BASE and TUNED, and why others stand alone."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsurgery.anatomy import find_embedding, kind_of
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import MismatchError, SettingError, counted, shown
from weightsurgery.ties import is_output_head, says_tied, tied_to

_OTHER_SHAPE = "shapes differ"
_WRONG = (_OTHER_SHAPE, "dtypes differ", "floating on one side")
# What a fine-tuning adds to a model; a pre-trained one has a language model's head at most.
_TASK_HEAD = re.compile(r"(?:^|\.)(?:classifier|score|qa_outputs|logits_proj)\.")


@dataclass(frozen=True)
class Pair:
    """One tensor of TUNED and its counterpart in BASE.

    Attributes:
        tuned: The tensor whose name, shape and dtype results have.
        base: Its counterpart, under whatever name BASE has for it; None if it has none.
        eligible: How many leading elements (row-major) may be edited; 0 keeps all of TUNED's.
        reason: Why not all of them, "" if all.
        key: The name random masks are drawn under: that of the tensor this one is tied to.
        note: Something the report should say about the pair, "" if nothing.
    """

    tuned: TensorView
    base: TensorView | None
    eligible: int
    reason: str = ""
    key: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """TUNED's name for the tensor."""
        return self.tuned.name

    @property
    def is_tied_copy(self) -> bool:
        """True if another pair stands for the same weights."""
        return self.key != self.tuned.name


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
    """

    base: Checkpoint
    tuned: Checkpoint
    pairs: tuple[Pair, ...]
    unused: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    prefix_on: str = ""

    @property
    def eligible(self) -> tuple[Pair, ...]:
        """The pairs of which something may be edited."""
        return tuple(pair for pair in self.pairs if pair.eligible)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks like a mistake, though it may be none."""
        lost = [name for name, _ in self.unused if _TASK_HEAD.search(name)]
        if not lost or any(_TASK_HEAD.search(pair.name) for pair in self.pairs):
            return ()
        what = f"BASE has a head that TUNED lacks, '{shown(lost[0])}'"
        return (f"{what}: are BASE and TUNED the right way round?",)

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
                return replace(pair, eligible=0, reason="not included")
            if any(matches(name, exclude) for name in names[pair.key]):
                return replace(pair, eligible=0, reason="excluded")
            return pair

        restricted = replace(self, pairs=tuple(map(keep, self.pairs)))
        if not restricted.dimensions:
            raise SettingError("include and exclude leave nothing to edit", code="E-NOTHING-TO-DO")
        return restricted

    def keeping(self, names: Collection[str], reason: str) -> Alignment:
        """Only the named tensors stay eligible; the reason is that of the others."""

        def judge(pair: Pair) -> Pair:
            stays = pair.name in names or not pair.eligible
            return pair if stays else replace(pair, eligible=0, reason=reason)

        return replace(self, pairs=tuple(map(judge, self.pairs)))

    def to_json(self) -> dict[str, Any]:
        """The report, as records and `--json` show it."""
        return {
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
            "only_in_base": [{"tensor": name, "reason": reason} for name, reason in self.unused],
            "notes": [{"tensor": p.name, "note": p.note} for p in self.pairs if p.note],
        }


def matches(name: str, globs: Sequence[str]) -> bool:
    """True if a name matches one of the globs (case matters; `*` crosses dots)."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def check_glob(glob: str, names: Sequence[str]) -> None:
    """Refuse a glob that matches no tensor, with the nearest name as a suggestion.

    Raises:
        SettingError: Nothing matches.
    """
    if not any(fnmatch.fnmatchcase(name, glob) for name in names):
        near = difflib.get_close_matches(glob, names, 1, 0.3)
        raise SettingError(
            f"'{shown(glob)}' matches no tensor",
            hint=f"did you mean '{shown(near[0])}'?" if near else "see `wsurg inspect` for names",
            code="E-NO-MATCH",
        )


def align(
    base: Checkpoint, tuned: Checkpoint, *, mismatched: str = "refuse", called: str = "TUNED"
) -> Alignment:
    """Pair the tensors of TUNED with those of BASE.

    Exact names first; the rest by one common prefix that either side has (`bert.`, `model.`,
    `module.` …), found by counting. A head that BASE ties to its embedding is paired with that
    embedding; an extended vocabulary is paired on the rows both have; a head that BASE lacks is
    kept from TUNED. What does not pair is listed with its reason.

    Args:
        base: Trusted pre-trained weights.
        tuned: Fine-tuned weights.
        mismatched: "refuse" a pair of different shapes that is neither vocabulary nor head, and
            one of different dtypes that are not both floating; or "keep" TUNED's; or
            "keep integers", which does so where neither side is floating.
        called: What errors call the second model. Only for TUNED do they advise options.

    Returns:
        The pairs, and all that stands alone.

    Raises:
        MismatchError: The models are of different types, a pair's shapes differ, or its dtypes
            where one of them is not floating, or nothing pairs at all.
    """
    _check_types(base, tuned, called)
    prefix, side = _common_prefix(base, tuned)
    ties = tied_to(tuned)
    pairs, used = [], set()
    for name, view in tuned.items():
        other, note = _counterpart(name, base, tuned, prefix, side)
        if other is not None:
            used.add(other.name)
        pair = _judge(view, other, note, base=base, tuned=tuned, called=called)
        pairs.append(replace(pair, key=ties.get(name, name)))
    wrong = [p for p in pairs if p.reason.startswith(_WRONG)]
    if mismatched == "keep integers":
        wrong = [p for p in wrong if not _are_integers(p)]
    if wrong and mismatched != "keep":
        first = wrong[0]
        raise MismatchError(
            f"{first.reason} ({counted(len(wrong), 'tensor')} like this)",
            file=tuned.label,
            tensor=first.name,
            hint=_doubt(called, "--keep-mismatched keeps TUNED's"),
            code="E-PAIR-SHAPE" if first.reason.startswith(_OTHER_SHAPE) else "E-PAIR-DTYPE",
        )
    # To be looked at ("keep"), integers will do; to be edited there must be something to edit.
    if not any(p.eligible or (mismatched == "keep" and p.base is not None) for p in pairs):
        raise _nothing_pairs(base, tuned, called)
    unused = tuple((n, _why_unused(n, base, tuned)) for n in base if n not in used)
    return Alignment(base, tuned, tuple(pairs), unused, prefix, side)


def _check_types(base: Checkpoint, tuned: Checkpoint, called: str) -> None:
    types = [checkpoint.config.get("model_type") for checkpoint in (base, tuned)]
    made = "fine-tuned" if called == "TUNED" else "made"
    if all(types) and types[0] != types[1]:
        raise MismatchError(
            f"model_type is {shown(types[0])} in BASE and {shown(types[1])} in {called}",
            file=tuned.label,
            hint=f"give the model that {called} was {made} from",
            code="E-PAIR-TYPE",
        )


def _common_prefix(base: Checkpoint, tuned: Checkpoint) -> tuple[str, str]:
    """The prefix that pairs most of the names left over by exact matching, and its side."""
    votes: Counter[tuple[str, str]] = Counter()
    for longer, shorter, side in ((tuned, base, "tuned"), (base, tuned, "base")):
        free = {name for name in shorter if name not in longer}
        for name, view in longer.items():
            if name in shorter:
                continue
            dot = name.find(".")
            while dot >= 0:  # every dotted suffix: a.b.c gives b.c and c
                rest = name[dot + 1 :]
                if rest in free and shorter[rest].shape == view.shape:
                    votes[name[: dot + 1], side] += 1
                dot = name.find(".", dot + 1)
    if not votes:
        return "", ""
    return min(votes, key=lambda vote: (-votes[vote], len(vote[0]), vote))


def _counterpart(
    name: str, base: Checkpoint, tuned: Checkpoint, prefix: str, side: str
) -> tuple[TensorView | None, str]:
    if name in base:
        return base[name], ""
    other = ""
    if side == "tuned" and name.startswith(prefix):
        other = name[len(prefix) :]
    elif side == "base":
        other = prefix + name
    if other in base and other not in tuned:  # what TUNED has too belongs to that one
        return base[other], ""
    ties = next((s for s, c in (("BASE", base), ("TUNED", tuned)) if says_tied(c)), "")
    embedding = find_embedding(base)
    if ties and embedding and is_output_head(name):
        return base[embedding], f"{ties} ties it to '{shown(embedding)}'"
    return None, ""


def _judge(
    view: TensorView,
    other: TensorView | None,
    note: str,
    *,
    base: Checkpoint,
    tuned: Checkpoint,
    called: str,
) -> Pair:
    def kept(reason: str) -> Pair:
        return Pair(view, other, 0, reason, note=note)

    if other is None:
        is_head = kind_of(view.name) == "head"
        return kept("a task head that BASE lacks" if is_head else "BASE has no such tensor")
    dtypes = f"{other.dtype.name} in BASE, {view.dtype.name} in {called}"
    if view.dtype.arithmetic != other.dtype.arithmetic:
        return kept(f"floating on one side only ({dtypes})")
    if not view.dtype.arithmetic and view.dtype != other.dtype:
        return kept(f"dtypes differ: {dtypes}")
    if not view.dtype.arithmetic and view.shape == other.shape:
        return kept(f"not floating ({dtypes})")
    if view.dtype != other.dtype:
        note = dtypes + (note and f"; {note}")
    if view.shape == other.shape:
        return Pair(view, other, view.size, "" if view.size else "empty", note=note)
    shapes = f"{list(other.shape)} in BASE, {list(view.shape)} in {called}"
    if view.dtype.arithmetic and _is_vocabulary(view, other, base, tuned):
        rows = min(view.shape[0], other.shape[0])
        reason = f"{rows:,} common rows ({shapes})"
        return Pair(view, other, rows * math.prod(view.shape[1:]), reason, note=note)
    if kind_of(view.name) == "head":
        return kept(f"a task head of another shape ({shapes})")
    return kept(f"shapes differ: {shapes}")


def _are_integers(pair: Pair) -> bool:
    """True where neither side is floating."""
    return not any(side.dtype.arithmetic for side in (pair.base, pair.tuned) if side is not None)


def _is_vocabulary(
    view: TensorView, other: TensorView, base: Checkpoint, tuned: Checkpoint
) -> bool:
    """An embedding, or an output head or bias over the vocabulary, with rows added or dropped."""
    if len(view.shape) != len(other.shape) or view.shape[1:] != other.shape[1:] or not view.shape:
        return False
    if kind_of(view.name) == "embedding":
        return len(view.shape) == 2
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (base, tuned)]
    return sizes == [other.shape[0], view.shape[0]] and kind_of(view.name) == "head"


def _why_unused(name: str, base: Checkpoint, tuned: Checkpoint) -> str:
    if name in tied_to(base) or (is_output_head(name) and says_tied(tuned)):
        return "tied to the word embedding in TUNED"
    return "TUNED has no such tensor"


def _nothing_pairs(base: Checkpoint, tuned: Checkpoint, called: str) -> MismatchError:
    names = [next(iter(checkpoint), "(no tensors)") for checkpoint in (base, tuned)]
    return MismatchError(
        f"no tensor of BASE and {called} belongs together (names such as '{shown(names[0])}' and "
        f"'{shown(names[1])}')",
        file=tuned.label,
        hint=_doubt(called, "--strip-prefix or --map FILE can pair names"),
        code="E-PAIR-NONE",
    )


def _doubt(called: str, advice: str) -> str:
    return "are these the same architecture?" + (f" {advice}" if called == "TUNED" else "")
