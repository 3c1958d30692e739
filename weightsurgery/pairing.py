"""Pairs of BASE and TUNED: finds each tensor's counterpart and judges whether it may be edited."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weightsurgery.anatomy import find_embedding, kind_of, layer_of
from weightsurgery.architecture.canonical import template
from weightsurgery.architecture.conversion import UnsupportedError
from weightsurgery.architecture.copies import are_equal, shared_layers, tied_copies
from weightsurgery.architecture.embedding import vocabulary_axes
from weightsurgery.architecture.facts import class_of
from weightsurgery.architecture.matching import Counterpart, Matcher, Side, read_sides
from weightsurgery.architecture.tokens import Tokens
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.coverage import ENOUGH, Coverage, percent
from weightsurgery.dtypes import FLOATING
from weightsurgery.errors import shown
from weightsurgery.pairs import Pair, Status
from weightsurgery.ties import is_output_head, says_tied, tied_to

# What a fine-tuning adds to a model; a pre-trained one has a language model's head at most.
_TASKS = re.compile(
    r"For\w*(?:Classification|QuestionAnswering|MultipleChoice|Prediction|CTC|XVector|Reward\w*)$"
)
DUPLICATE = "another name for a tensor that is also stored without a wrapper's segments"
_SWAPPED = "are BASE and TUNED the right way round?"
TIED = "tied to another tensor in TUNED"  # why a tensor of BASE has no counterpart of its own
_TASK_HEAD = re.compile(r"(?:^|\.)(?:classifier|score|qa_outputs|logits_proj)\.")


@dataclass(frozen=True)
class Pairing:
    """BASE and TUNED, as they are paired.

    Attributes:
        base: BASE.
        tuned: TUNED.
        called: What messages call the second model.
    """

    base: Checkpoint
    tuned: Checkpoint
    called: str = "TUNED"

    @cached_property
    def matcher(self) -> Matcher:
        """Finds counterparts."""
        return Matcher(*read_sides(self.base, self.tuned))

    @cached_property
    def tokens(self) -> Tokens:
        """Pairs rows of the vocabulary."""
        return Tokens(self.base, self.tuned)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """One for each tensor of TUNED."""
        return tuple(map(self._pair, self.tuned.values()))

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Tensors of TUNED that are tied to others, to the one that stands for all of them.

        A copy whose bytes differ stands for itself: the loading library leaves it untied.
        """
        return {
            name: leader if name == leader or are_equal(self.tuned, name, leader) else name
            for leader, names in self._tied.items()
            for name in names
        }

    @cached_property
    def untied(self) -> tuple[str, ...]:
        """Tensors of TUNED that are tied by its configuration, but stored with other values."""
        leaders = self._tied.keys()
        return tuple(n for n, key in self.keys.items() if n == key and n not in leaders)

    @cached_property
    def _tied(self) -> Mapping[str, list[str]]:
        """TUNED's tensors that its configuration makes one, by the first of them."""
        return tied_copies(self.matcher.tuned)

    @cached_property
    def _shared_in_base(self) -> frozenset[str]:
        """BASE's tensors that are copies of others because its layers share weights."""
        groups = shared_layers(self.matcher.base)
        return frozenset(n for leader, names in groups.items() for n in names if n != leader)

    def _pair(self, view: TensorView) -> Pair:
        key = self.keys.get(view.name, view.name)
        try:
            return self._judged(view, key)
        except UnsupportedError as error:
            return Pair(view, None, 0, str(error), key, status=Status.ARRANGEMENT)

    def _judged(self, view: TensorView, key: str) -> Pair:
        found = self.matcher.find(key, alone=key in self.untied)
        found = found or self._guessed(view.name)
        if found is None and view.name in self.matcher.tuned.names.ambiguous:
            return Pair(view, None, 0, DUPLICATE, key, status=Status.MISSING)
        if found is None:
            head = self.is_head(self.matcher.tuned, view.name)
            status = Status.HEAD if head else Status.MISSING
            reason = status.value if head else "BASE has no such tensor"
            return Pair(view, None, 0, reason, key, status=status)
        return self._judge(view, found, key)

    def _guessed(self, name: str) -> Counterpart | None:
        """The word embedding for an output head, where the architecture is not known."""
        if self.matcher.base.names.architecture and self.matcher.tuned.names.architecture:
            return None
        by = next((s for s, c in (("BASE", self.base), ("TUNED", self.tuned)) if says_tied(c)), "")
        embedding = find_embedding(self.base)
        if not by or not embedding or not is_output_head(name):
            return None
        note = f"tied in {by} to '{shown(embedding)}'"
        return Counterpart(self.base[embedding], (embedding,), note=note)

    def _judge(self, view: TensorView, found: Counterpart, key: str) -> Pair:
        other = found.view
        dtypes = f"{other.dtype.name} in BASE, {view.dtype.name} in {self.called}"
        shapes = f"{list(other.shape)} in BASE, {list(view.shape)} in {self.called}"
        note = found.note

        def kept(status: Status, reason: str) -> Pair:
            return Pair(view, other, 0, reason, key, note, status, names=found.names)

        if view.dtype.arithmetic != other.dtype.arithmetic:
            return kept(Status.FLOATING, f"floating on one side only ({dtypes})")
        if not view.dtype.arithmetic and view.dtype != other.dtype:
            return kept(Status.DTYPE, f"dtypes differ: {dtypes}")
        if not view.dtype.arithmetic and view.shape == other.shape:
            return kept(Status.BYTES, f"not floating ({dtypes})")
        if view.dtype != other.dtype:
            note = dtypes + (note and f"; {note}")
        if found.runs:
            count = sum(stop - start for start, stop in found.runs)
            return self._partly(view, found, key, note, "BASE has no other elements", count)
        width = self._row_width(view, other)
        if width and (view.shape != other.shape or self.tokens.differ):
            return self._by_rows(view, found, key, note, width)
        if view.shape == other.shape:
            status, reason = (Status.PAIRED, "") if view.size else (Status.EMPTY, "empty")
            return Pair(view, other, view.size, reason, key, note, status, names=found.names)
        if self.is_head(self.matcher.tuned, view.name):
            return kept(Status.HEAD, f"a task head of another shape ({shapes})")
        return kept(Status.SHAPE, f"shapes differ: {shapes}")

    def _partly(
        self, view: TensorView, found: Counterpart, key: str, note: str, why: str, count: int
    ) -> Pair:
        """A pair of which `count` elements may be edited, those in its counterpart's runs."""
        all_ = count == view.size
        reason = "" if all_ else f"{count:,} of {view.size:,} elements: {why}"
        status = Status.PAIRED if all_ else Status.PARTLY
        runs = () if all_ else found.runs
        return Pair(view, found.view, count, reason, key, note, status, runs, found.names)

    def _row_width(self, view: TensorView, other: TensorView) -> int:
        """Elements for each row of the vocabulary, 0 where a tensor has no such rows."""
        axis = self._vocabulary_axis(view, other)
        if axis is None or len(view.shape) != len(other.shape) or math.prod(view.shape[:axis]) != 1:
            return 0
        same = view.shape[:axis] == other.shape[:axis]
        rest = view.shape[axis + 1 :] == other.shape[axis + 1 :]
        return math.prod(view.shape[axis + 1 :]) if same and rest else 0

    def _vocabulary_axis(self, view: TensorView, other: TensorView) -> int | None:
        side = self.matcher.tuned
        known = side.names.architecture
        if known is not None:
            canonical = side.canonical(view.name)
            if canonical in self._axes or not self._has_numbered_axes:
                return self._axes.get(canonical)
            return self._axes.get(template(canonical))
        if kind_of(view.name) == "embedding" and len(view.shape) == 2:
            return 0
        rows = [other.shape[0], view.shape[0]] if other.shape and view.shape else []
        if kind_of(view.name) != "head" or not rows:
            return None
        return 0 if rows in (self._embedding_rows, self._configured_rows) else None

    @cached_property
    def _axes(self) -> Mapping[str, int]:
        """The dimension of the vocabulary by canonical name, numbers in it replaced."""
        known = self.matcher.tuned.names.architecture
        return vocabulary_axes(known) if known is not None else {}

    @cached_property
    def _has_numbered_axes(self) -> bool:
        return any("*" in name for name in self._axes)

    @cached_property
    def _embedding_rows(self) -> list[int]:
        """Rows of the word embedding in BASE and TUNED; [] where it cannot be found."""
        found = [side.get(find_embedding(side) or "") for side in (self.base, self.tuned)]
        shapes = [view.shape for view in found if view is not None and view.shape]
        return [shape[0] for shape in shapes] if len(shapes) == 2 else []

    @property
    def _configured_rows(self) -> list[Any]:
        return [side.config.get("vocab_size") for side in (self.base, self.tuned)]

    def _by_rows(
        self, view: TensorView, found: Counterpart, key: str, note: str, width: int
    ) -> Pair:
        """A pair of two vocabularies: the rows of the same tokens."""
        rows = self.tokens.pair_rows(view.size // width, found.view.size // width)
        count = sum(number for _, _, number in rows)
        shapes = f"{list(found.view.shape)} in BASE, {list(view.shape)} in {self.called}"
        by = "rows of the same tokens" if self.tokens.differ else "common rows"
        if not rows:
            reason = f"no {by} ({shapes})"
            return Pair(view, found.view, 0, reason, key, note, Status.ROWS, names=found.names)
        base, runs = found.view, found.runs
        if rows != [(0, 0, count)]:
            from weightsurgery.architecture.views import row_view

            base, runs = row_view(view, found.view, rows, width)
        if count * width < view.size:
            reason = f"{count:,} {by} ({shapes})"
            return Pair(
                view, base, count * width, reason, key, note, Status.ROWS, runs, found.names
            )
        note = f"{count:,} {by} ({shapes})" + (note and f"; {note}")
        return Pair(view, base, view.size, "", key, note, names=found.names)

    def is_head(self, side: Side, name: str) -> bool:
        """True for a head: outside of the base model, the output's or one that the task needs.

        A classifier's pooler is one too, since language models are stored without it. Where the
        class is not known, names decide, of tensors outside of numbered layers.
        """
        known, canonical = side.names.architecture, side.canonical(name)
        if known is None or known.name != class_of(side.checkpoint.config):
            return kind_of(canonical) == "head" and not layer_of(canonical)
        for_a_task = bool(_TASKS.search(known.name))
        if not side.is_outside(name):
            return for_a_task and canonical.startswith("pooler.")
        return for_a_task or canonical.partition(".")[0] == known.head.partition(".")[0]

    @cached_property
    def unused(self) -> tuple[tuple[str, str], ...]:
        """BASE's tensors that are no counterpart, each with the reason."""
        used = {name for pair in self.pairs for name in pair.names}
        return tuple((name, self._why_unused(name)) for name in self.base if name not in used)

    def _why_unused(self, name: str) -> str:
        base, tuned = self.matcher.base, self.matcher.tuned
        canonical = base.canonical(name)
        group = {*base.ties.group(canonical), *tuned.ties.group(canonical)}
        mine = tuned.stored(canonical)
        is_copy = mine is not None and self.keys.get(mine, mine) != mine
        is_copy |= name in self._shared_in_base
        is_tied = (
            len(group) > 1
            or is_copy
            or (
                tuned.names.architecture is None
                and (name in tied_to(self.base) or (is_output_head(name) and says_tied(self.tuned)))
            )
        )
        if name in base.names.ambiguous:
            return DUPLICATE
        return TIED if is_tied else "TUNED has no such tensor"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks like a mistake, though it may be none."""
        found = [f"{reason}: {_SWAPPED}" for reason in self._signs_of_a_swap()]
        found += [
            f"'{shown(name)}': its class and config.json tie it, but its stored values differ; "
            "treated as a separate tensor, as in transformers"
            for name in self.untied
        ]
        found += [
            f"BASE stores '{shown(name)}' and '{shown(other)}' separately, but TUNED ties them; "
            "the output cannot hold both"
            for name, other in self._lost_by_ties()
        ]
        found += [self.tokens.warning] if self._has_vocabulary and self.tokens.warning else []
        return tuple(found)

    def _signs_of_a_swap(self) -> Iterator[str]:
        """What BASE has and TUNED lacks, though fine-tuning adds rather than removes."""
        side = self.matcher.base
        lost = [name for name, reason in self.unused if reason != TIED]
        heads = [name for name in lost if self._is_task_head(side, name)]
        if heads and not any(self._is_task_head(self.matcher.tuned, n) for n in self.tuned):
            yield f"BASE has a head that TUNED lacks, '{shown(heads[0])}'"
        rows = [
            (pair.base.shape[0], pair.tuned.shape[0])
            for pair in self.pairs
            if pair.base is not None and self._row_width(pair.tuned, pair.base)
        ]
        if rows and rows[0][0] > rows[0][1]:
            yield f"BASE has {rows[0][0]:,} rows of the vocabulary and TUNED {rows[0][1]:,}"
        rest = [n for n in lost if n not in heads and not self.is_head(side, n)]
        size = sum(self.base[name].size for name in rest)
        whole = sum(view.size for view in self.base.values())
        models = [one.names.architecture for one in (side, self.matcher.tuned)]
        text_only = None not in models and [bool(m.text) for m in models if m] == [True, False]
        if text_only:
            return  # a language model taken out of a model with images
        if self.coverage.is_complete and size > (1 - ENOUGH) * whole:
            yield (
                f"{percent(1 - size / whole)} of BASE's parameters have a counterpart in TUNED "
                f"('{shown(rest[0])}' has none)"
            )

    def _lost_by_ties(self) -> Iterator[tuple[str, str]]:
        """BASE's tensors that TUNED ties to another, whose values in BASE are others."""
        base, tuned = self.matcher.base, self.matcher.tuned
        used = {name: pair.names[0] for pair in self.pairs for name in pair.names}
        for name, reason in self.unused:
            canonical = base.canonical(name)
            if reason != TIED or canonical not in (
                *tuned.ties.sources,
                *tuned.ties.sources.values(),
            ):
                continue
            others = map(base.stored, self.matcher.tied_in_tuned(canonical))
            other = next((one for one in others if one is not None and one in used), None)
            if other is not None and not are_equal(self.base, name, other):
                yield name, other

    @property
    def _has_vocabulary(self) -> bool:
        return any(p.base is not None and self._row_width(p.tuned, p.base) for p in self.pairs)

    def _is_task_head(self, side: Side, name: str) -> bool:
        known = side.names.architecture
        by_class = known is not None and bool(_TASKS.search(known.name))
        return bool(_TASK_HEAD.search(name)) or (by_class and self.is_head(side, name))

    @property
    def coverage(self) -> Coverage:
        """Which share of TUNED's parameters has a counterpart."""
        once = [p for p in self.pairs if p.tuned.dtype.name in FLOATING and p.key == p.name]
        bytes_ = {p.name: p.tuned.size for p in once if p.status is Status.BYTES}
        paired = {p.name: p.eligible or bytes_.get(p.name, 0) for p in once}
        known = self.matcher.tuned.names.architecture
        rest = [p for p in once if paired[p.name] < p.tuned.size]
        return Coverage(
            parameters=sum(p.tuned.size for p in once),
            paired=sum(paired.values()),
            heads=sum(p.tuned.size for p in rest if p.status is Status.HEAD),
            # A vocabulary that shares less than half of its tokens did not just grow.
            added=sum(
                p.tuned.size - p.eligible
                for p in rest
                if p.status is Status.ROWS and 2 * p.eligible >= p.tuned.size
            ),
            unpaired={
                p.name: p.reason for p in rest if not paired[p.name] and p.status is not Status.HEAD
            },
            partly={p.name: p.reason for p in rest if paired[p.name]},
            architecture=known.name if known else "",
        )
