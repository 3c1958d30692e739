"""What moved between BASE and TUNED: drift statistics per tensor, layer, kind and model.

Our own; the papers look at drift per dimension, and these are the numbers that lets one see.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from weightsurgery.alignment import Alignment, Pair, align
from weightsurgery.anatomy import kind_of, layer_of, natural_key
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.checkpoint import BLOCK, Checkpoint, Step, require_checkpoints
from weightsurgery.drift_kernel import drift_statistics
from weightsurgery.dtypes import DTYPES, DType
from weightsurgery.errors import (
    FormatError,
    MismatchError,
    PolicyError,
    SettingError,
    counted,
)
from weightsurgery.formats.vocabulary import read_vocabulary
from weightsurgery.kernels import Block, count_different, same_float
from weightsurgery.quantised import require_unquantised
from weightsurgery.statistics import QUANTILE_ERROR, Statistics, finite_or_none
from weightsurgery.stream import Engine, fold, map_tensors

SCHEMA = "wsurg.diff/1"


@dataclass(frozen=True)
class DiffReport:
    """What `diff` found. Every entry is a dict with the keys of `METRICS` and what names it.

    Attributes:
        base: BASE's label.
        tuned: TUNED's label.
        model: The statistics of everything compared.
        layers: By numbered layer; tensors outside any layer are under "".
        kinds: By kind of module.
        tensors: One for each tensor compared, largest relative drift first.
        other: Tensors that are not floating: how many elements differ.
        top: "dimensions", "rows", "columns" and "tokens" of largest drift.
        alignment: What belongs together, and what does not.
        warnings: What the user should know.
        gates: Results of the `--fail-if` conditions.
    """

    base: str
    tuned: str
    model: dict[str, Any]
    layers: list[dict[str, Any]]
    kinds: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    other: list[dict[str, Any]]
    top: dict[str, list[dict[str, Any]]]
    alignment: dict[str, Any]
    warnings: list[str]
    gates: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report in its versioned schema."""
        return {"schema": SCHEMA, "quantile_error": QUANTILE_ERROR, **self.__dict__}


def diff(
    base: Checkpoint, tuned: Checkpoint, *, top: int = 10, engine: Engine | None = None
) -> DiffReport:
    """Compare two checkpoints in one pass over both.

    Per tensor, per layer, per kind of module and for the model: count, changed (stored bits
    differ) and its share, L2 of the drift, relative L2 (to BASE's norm), largest |drift|, mean and
    standard deviation of the drift, cosine between the weights, sign flips, quantiles of |drift|,
    NaN and infinity counts.

    Args:
        base: Trusted pre-trained weights.
        tuned: Fine-tuned weights.
        top: How many dimensions, rows, columns and embedding rows of largest drift to list.
        engine: Workers and progress; the report does not depend on them.

    Returns:
        The report.

    Raises:
        SettingError: `top` is negative.
        MismatchError: No tensor of the two belongs together, or none has the same shape.
        ChangedError: An input changed meanwhile.
    """
    require_checkpoints(base, tuned)
    if top < 0:
        raise SettingError(f"top is {top}; expected 0 or more")
    engine = engine or Engine()
    alignment = align(base, tuned, mismatched="keep")
    once = (pair for pair in alignment.pairs if not pair.is_tied_copy)
    pairs = [pair for pair in map(_comparable, once) if pair is not None]
    if not pairs:
        raise MismatchError(
            "no tensor of BASE and TUNED can be compared: their shapes differ",
            file=tuned.label,
            hint="are these the same architecture?",
            code="E-PAIR-SHAPE",
        )
    collector = _Collector(alignment, top)
    fold(partial(_compare, top), _combine, collector, pairs, engine=engine, what="comparing")
    report = collector.report()
    for given in (base, tuned):
        given.check_unchanged()
    return report


def _comparable(pair: Pair) -> Pair | None:
    """Eligible pairs, and pairs of one shape that can only be compared as bytes."""
    if pair.eligible or pair.base is None:
        return pair if pair.eligible else None
    same = (pair.base.shape, pair.base.dtype) == (pair.tuned.shape, pair.tuned.dtype)
    only_bytes = same and not pair.tuned.dtype.arithmetic
    return Pair(pair.tuned, pair.base, pair.tuned.size, "bytes") if only_bytes else None


def _count_bytes(_pair: Pair, _start: int, base: Block, tuned: Block) -> int:
    return count_different(base, tuned)


def _compare(top: int, pair: Pair, _start: int, base: Block, tuned: Block) -> Any:
    """What a worker does with a pair of blocks."""
    if pair.reason == "bytes":
        return count_different(base, tuned)
    has_rows = _has_rows(pair)
    totals, bins, rows, columns, values, places = drift_statistics(
        base,
        tuned,
        width=pair.tuned.width if has_rows else tuned.size,
        top=top,
        by_column=has_rows and top > 0,
    )
    first = _largest(rows, top) if has_rows else np.zeros(0, np.int64)
    return tuned.size, totals, bins, (first, rows[first]), columns, (values, places)


def _combine(collector: _Collector, pair: Pair, start: int, result: Any) -> _Collector:
    collector.add(pair, start, result)
    return collector


class _Collector:
    """Gathers partial results block by block; holds one tensor's sums at a time."""

    def __init__(self, alignment: Alignment, top: int) -> None:
        self.alignment, self.top = alignment, top
        self.embedding = find_embedding(alignment.tuned)
        self.model = Statistics()
        self.layers: dict[str, Statistics] = {}
        self.kinds: dict[str, Statistics] = {}
        self.tensors: list[dict[str, Any]] = []
        self.other: dict[str, int] = {}
        self.best: dict[str, list[tuple[float, str, int]]] = {
            name: [] for name in ("dimensions", "rows", "columns", "tokens")
        }
        self.current: Pair | None = None
        self.statistics = Statistics()
        self.columns = np.zeros(0)
        # Before the pass: what is wrong with it should not cost the report.
        self.vocabulary, self.vocabulary_warning = _vocabulary(alignment.tuned)

    def add(self, pair: Pair, start: int, result: Any) -> None:
        """Take a partial result; they come in the order of pairs and blocks."""
        if pair.reason == "bytes":
            self.other[pair.name] = self.other.get(pair.name, 0) + result
            return
        if self.current is None or self.current.name != pair.name:
            self._finish_tensor()
            self.current, self.statistics = pair, Statistics()
            self.columns = np.zeros(result[4].size)
        size, totals, bins, (rows, energies), columns, (values, places) = result
        self.statistics.add(size, totals, bins)
        self.columns += columns
        found = places >= 0
        self._keep("dimensions", pair, values[found], start + places[found])
        first_row = start // max(1, pair.tuned.width)
        self._keep("rows", pair, np.sqrt(energies), first_row + rows)
        if pair.name == self.embedding:
            self._keep("tokens", pair, np.sqrt(energies), first_row + rows)

    def _keep(self, what: str, pair: Pair, values: Block, places: Block) -> None:
        best = self.best[what]
        if not values.size or (len(best) == self.top and (not best or values[0] <= -best[-1][0])):
            return  # values fall, and of equal ones the first tensor's stay: nothing new gets in
        new = [(-float(v), pair.name, int(i)) for v, i in zip(values, places, strict=True) if v > 0]
        self.best[what] = heapq.nsmallest(self.top, [*self.best[what], *new])

    def _finish_tensor(self) -> None:
        pair = self.current
        if pair is None:
            return
        first = _largest(self.columns, self.top)
        self._keep("columns", pair, np.sqrt(self.columns[first]), first)
        sums = self.statistics
        layer, kind = layer_of(pair.name), kind_of(pair.name)
        self.tensors.append(
            {
                "tensor": pair.name,
                "layer": layer,
                "kind": kind,
                "dtype": pair.tuned.dtype.name,
                "shape": list(pair.tuned.shape),
                **sums.summary(),
            }
        )
        for group in (
            self.model,
            self.layers.setdefault(layer, Statistics()),
            self.kinds.setdefault(kind, Statistics()),
        ):
            group.add(sums.count, sums.totals, sums.bins)

    def report(self) -> DiffReport:
        """The finished report."""
        self._finish_tensor()
        base, tuned = self.alignment.base, self.alignment.tuned
        return DiffReport(
            base=base.label,
            tuned=tuned.label,
            model=self.model.summary(),
            layers=[
                {"layer": layer, **self.layers[layer].summary()}
                for layer in sorted(self.layers, key=natural_key)
            ],
            kinds=_by_drift([{"kind": k, **s.summary()} for k, s in sorted(self.kinds.items())]),
            tensors=_by_drift(self.tensors),
            other=[{"tensor": n, "changed": c} for n, c in self.other.items()],
            top=self._tops(),
            alignment=self.alignment.to_json(),
            warnings=self._warnings(),
        )

    def _tops(self) -> dict[str, list[dict[str, Any]]]:
        pairs = {pair.name: pair for pair in self.alignment.pairs}

        def dimension(_value: float, name: str, place: int) -> dict[str, Any]:
            pair = pairs[name]
            index = [int(i) for i in np.unravel_index(place, pair.tuned.shape)]
            old, new = (
                float(side.read(place, place + 1)[0]) for side in (pair.base, pair.tuned) if side
            )
            moved = finite_or_none(new - old)
            place_in = {"tensor": name, "index": index}
            return {**place_in, "base": old, "tuned": new, "drift": moved}

        best = self.best
        return {
            "dimensions": [dimension(*entry) for entry in best["dimensions"]],
            "rows": [{"tensor": n, "row": i, "l2": finite_or_none(-v)} for v, n, i in best["rows"]],
            "columns": [
                {"tensor": n, "column": i, "l2": finite_or_none(-v)} for v, n, i in best["columns"]
            ],
            "tokens": [
                {"tensor": n, "row": i, "token": self.vocabulary.get(i), "l2": finite_or_none(-v)}
                for v, n, i in best["tokens"]
            ],
        }

    def _warnings(self) -> list[str]:
        found = [*self.alignment.base.warnings, *self.alignment.tuned.warnings]
        found += self.alignment.warnings
        found += [self.vocabulary_warning] if self.vocabulary_warning else []
        bad = sum(entry["skipped"] for entry in self.tensors)
        if bad:
            those = counted(bad, "dimension is", "dimensions are")
            found.append(f"{those} NaN or infinite on a side; left out of the sums")
        for checkpoint in (self.alignment.base, self.alignment.tuned):
            try:
                require_unquantised(checkpoint)
            except PolicyError as error:
                found.append(f"{checkpoint.label}: {error.reason}; packed tensors as bytes only")
        return found


def _vocabulary(tuned: Checkpoint) -> tuple[dict[int, str], str]:
    """Token strings, and a warning if the tokenizer cannot be read; diff does not depend on it."""
    try:
        return read_vocabulary(tuned), ""
    except FormatError as error:
        return {}, str(error)


def _has_rows(pair: Pair) -> bool:
    """Rows and columns are ranked in tensors of two dimensions or more, of rows up to a block."""
    return len(pair.tuned.shape) > 1 and 0 < pair.tuned.width <= BLOCK and pair.has_whole_rows


def _largest(values: Block, count: int) -> Block:
    """Places of the `count` largest values, largest first; of equal ones the first."""
    if values.size > 4 * count:
        bound = np.partition(values, values.size - count)[values.size - count] if count else np.inf
        places = np.flatnonzero(values >= bound)
    else:
        places = np.arange(values.size)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _by_drift(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Largest relative drift first; entries that have none (BASE is zero) before all if moved."""

    def key(entry: dict[str, Any]) -> float:
        relative = entry["relative_l2"]
        return -relative if relative is not None else (-np.inf if entry["l2"] else 0.0)

    return sorted(entries, key=key)


def drift(base: Checkpoint, tuned: Checkpoint, *, allow_nonfinite: bool = False) -> Checkpoint:
    """The drift itself, δ = tuned - base, as a checkpoint that has not been computed yet.

    Args:
        base: Trusted pre-trained weights.
        tuned: Fine-tuned weights.
        allow_nonfinite: Let NaN and infinity pass instead of refusing them.

    Returns:
        The eligible tensors under TUNED's names, in float32 (float64 where a side is F64).

    Raises:
        MismatchError: No tensor of the two belongs together.
        PolicyError: A model is quantized.
    """
    require_checkpoints(base, tuned)
    require_unquantised(base, tuned)

    def dtype(pair: Pair) -> DType:
        views = (pair.base, pair.tuned)
        return DTYPES["F64" if any(v and v.dtype.name == "F64" for v in views) else "F32"]

    def edit(_name: str, _start: int, tuned: Block, base: Block) -> Block:
        base, tuned = same_float(base, tuned)
        with np.errstate(invalid="ignore", over="ignore"):  # the engine looks at the result
            return tuned - base

    result = map_tensors(
        edit,
        align(base, tuned, mismatched="keep"),
        dtype=dtype,
        arithmetic=True,
        allow_nonfinite=allow_nonfinite,
    )
    settings = {"allow_nonfinite": allow_nonfinite}
    return result.made_by(Step("drift", settings, {"base": base, "tuned": tuned}))
