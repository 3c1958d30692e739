"""An adapter from two models: what fine-tuning did to BASE, as low-rank factors.

The decompositions are made at once, not while the adapter is written: a rank that follows from the
energy is part of the names, shapes and configuration that must be known before the first byte is
written. What is held meanwhile is the adapter, whose size is the point of making one, and for each
worker one block of a drift with the factors that are looked for in it; the drift of a small matrix,
or of one that is wanted at nearly full rank, is held whole. Both models are never in memory. What
goes into the adapter unchanged (norms, biases, heads) is only read when it is written.

Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685,
    equation 3. That a drift may be truncated to low rank is measured here, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightsurgery.adapters.build import make_adapter
from weightsurgery.adapters.decompose import (
    OVERSAMPLING,
    POWER_ITERATIONS,
    Algebra,
    Drift,
    Factors,
    TorchAlgebra,
    Wanted,
    decompose,
    decompose_stack,
)
from weightsurgery.adapters.memory import fit_works, works_expected
from weightsurgery.adapters.places import FACTORS, NOWHERE, ROWS, WHOLE, Place, Tree, find_places
from weightsurgery.alignment import align_to_edit, check_glob
from weightsurgery.architecture.copies import have_equal_bytes
from weightsurgery.architecture.loaded import as_loaded
from weightsurgery.checkpoint import Checkpoint, Step, require_checkpoints
from weightsurgery.errors import (
    MismatchError,
    NonFiniteError,
    SettingError,
    conflict,
    counted,
    shown,
)
from weightsurgery.formats.plan import parse_size
from weightsurgery.kernels import all_finite
from weightsurgery.pairs import Status
from weightsurgery.quantised import require_unquantised
from weightsurgery.stream import Engine

DEFAULT_RANK = 16
_LARGEST = 1e150  # squared norm of a drift: the root of a singular value must fit float32


@dataclass(frozen=True)
class Found:
    """What the weights say of a place.

    Attributes:
        place: The place.
        moved: Whether TUNED differs from BASE there.
        energy: The squared norm of the drift; 0 where there is no drift to take.
        factors: Of what goes into factors and moved.
        rows: Of what goes as rows, those that moved.
    """

    place: Place
    moved: bool
    energy: float = 0.0
    factors: Factors | None = None
    rows: tuple[int, ...] = ()


def extract_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    whole: Sequence[str] = (),
    rest: str = "whole",
    svd: str = "auto",
    power_iterations: int | None = None,
    oversampling: int | None = None,
    seed: int = 0,
    base_name: str = "",
    device: str | None = None,
    allow_partial: bool = False,
    max_memory: int | str | None = None,
    engine: Engine | None = None,
) -> Checkpoint:
    """Make a LoRA adapter of what moved between BASE and TUNED.

    The drift of each matrix is truncated to its largest singular values, B·A with α = r, so that
    the scale is 1; both factors get the square roots of the singular values and are stored in
    float32 (our choice). What is no matrix (norms, biases, heads) is held whole where it moved.

    Args:
        base: Trusted pre-trained model; the adapter will belong to it.
        tuned: What was fine-tuned from it.
        rank: Singular values to keep of each matrix, 16 unless `energy` is given; a smaller matrix
            keeps all it has.
        energy: Keep of each matrix as many as this share of its drift's squared norm takes.
        max_rank: But no more than this; only with `energy`.
        include: Globs over TUNED's names: only these.
        exclude: Globs: not these.
        whole: Globs: hold these whole, though they are matrices, or heads that BASE lacks.
        rest: "whole" holds whole what is no matrix, "list" leaves it out and says so.
        svd: "exact", "randomised", or "auto" to take the first for small matrices and high ranks.
        power_iterations: Of the randomised decomposition, 4 unless given: more are slower and
            nearer to the best. Not with "exact".
        oversampling: Directions that it looks for besides those that are kept, 10 unless given.
            Not with "exact".
        seed: Of its random signs.
        base_name: What the adapter says it belongs to; by default BASE's hub id or the last part
            of its path.
        device: Compute with torch there, such as "cuda"; None computes with numpy.
        allow_partial: Continue even if less than 95 % of TUNED's parameters have a counterpart.
        max_memory: Bytes, or a size such as "4GB"; fewer workers are used to stay under it, the
            writing of the adapter included. It is an estimate, and knows nothing of a device.
        engine: Workers (each takes a matrix at a time) and progress.

    Returns:
        The adapter, to be written by `save`; its `notes["adapter"]` say what was kept.

    Raises:
        SettingError: A setting is out of range or contradicts another, a glob matches no tensor,
            the device is not to be had, or one worker may need more than `max_memory`.
        MismatchError: The models do not fit each other, a vocabulary or another shape differs, or
            nothing moved that an adapter could hold.
        NonFiniteError: A drift holds NaN or infinity.
        PolicyError: A model is quantized.
    """
    require_checkpoints(base, tuned)
    settings = {
        "rank": rank, "energy": energy, "max_rank": max_rank, "include": tuple(include),
        "exclude": tuple(exclude), "whole": tuple(whole), "rest": rest, "svd": svd,
        **_randomised(svd, power_iterations, oversampling), "seed": seed,
        "base_name": base_name, "device": device, "allow_partial": allow_partial,
    }  # fmt: skip
    wanted = _wanted(settings)
    require_unquantised(base, tuned)
    inputs = {"base": base, "tuned": tuned}
    tuned = as_loaded(tuned)
    paired = align_to_edit(base, tuned, keep_mismatched=True, allow_partial=allow_partial)
    alignment = paired.only(include, exclude)
    for glob in whole:
        check_glob(glob, list(tuned))
    places = find_places(alignment, whole)
    found = _look(places, tuned, wanted, _within(max_memory, places, wanted, engine, base, tuned))
    kept, left_out = _decide(found, rest)
    if not kept:
        raise MismatchError(
            "nothing moved between BASE and TUNED that an adapter could hold",
            file=tuned.label,
            hint=f"'{shown(left_out[0]['tensor'])}': {left_out[0]['reason']}" if left_out else "",
            code="E-EXTRACT-NOTHING",
        )
    for one in kept:
        if not one.place.pair.eligible:  # a head that BASE lacks was not looked at
            _check_finite(one.place)
    adapter = make_adapter(alignment, kept, base_name)
    notes = {"alignment": alignment.to_json(), "adapter": _report(found, kept, left_out, adapter)}
    made = replace(adapter, notes=notes, warnings=_warnings(alignment.warnings, kept, left_out))
    base.check_unchanged()
    tuned.check_unchanged()
    return made.made_by(Step("extract-adapter", settings, inputs))


def _within(
    max_memory: int | str | None,
    places: Sequence[Place],
    wanted: Wanted,
    engine: Engine | None,
    *inputs: Checkpoint,
) -> Engine:
    """The engine with as many workers as the limit allows."""
    engine = engine or Engine()
    if max_memory is None:
        return engine
    works = works_expected(places, wanted, inputs)
    workers, _ = fit_works(works, engine.width, parse_size(max_memory), inputs)
    return replace(engine, workers=workers)


def _wanted(given: dict[str, Any]) -> Wanted:
    """The settings of a decomposition.

    Raises:
        SettingError: One is out of range, or contradicts another.
    """
    rank, energy, max_rank = given["rank"], given["energy"], given["max_rank"]
    if rank is not None and energy is not None:
        raise conflict("rank and energy are both given", "give one of them")
    if max_rank is not None and energy is None:
        raise conflict("max_rank is given without energy", "give rank in its place")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise SettingError(f"{name} is {value}; expected an integer from 1")
    if energy is not None and not 0 < energy <= 1:
        raise SettingError(f"energy is {energy}; expected a share above 0, up to 1")
    for name, choices in (("svd", ("auto", "exact", "randomised")), ("rest", ("whole", "list"))):
        if given[name] not in choices:
            raise SettingError(f"{name} is '{shown(given[name])}'; expected {' or '.join(choices)}")
    return Wanted(
        rank=max_rank if energy is not None else rank or DEFAULT_RANK,
        energy=energy,
        svd=given["svd"],
        power_iterations=given["power_iterations"] or 0,
        oversampling=given["oversampling"] or 0,
        seed=given["seed"],
        algebra=_algebra(given["device"]),
    )


def _randomised(svd: str, *given: int | None) -> dict[str, int | None]:
    """The settings of the randomised decomposition; None for each where it is not used.

    Raises:
        SettingError: One is given though it is not used, or is negative.
    """
    names = {"power_iterations": POWER_ITERATIONS, "oversampling": OVERSAMPLING}
    found: dict[str, int | None] = {}
    for (name, usual), value in zip(names.items(), given, strict=True):
        if svd == "exact" and value is not None:
            raise conflict(f"{name} is given, and svd is exact", "leave out one of the two")
        if value is not None and value < 0:
            raise SettingError(f"{name} is {value}; expected 0 or more")
        found[name] = value if value is not None or svd == "exact" else usual
    return found


def _algebra(device: str | None) -> Algebra:
    if device is None:
        return Algebra()
    from weightsurgery.models import pick_device

    return TorchAlgebra(pick_device(device))


# --- looking at the weights -------------------------------------------------------------------


def _look(
    places: Sequence[Place], tuned: Checkpoint, wanted: Wanted, engine: Engine
) -> list[Found]:
    """Read every pair; a matrix is decomposed by one worker, so that all sums have one order."""

    def look(place: Place) -> Found:
        if place.pair.is_tied_copy:  # what it is tied to stands for it
            return Found(place, moved=not have_equal_bytes(tuned[place.pair.key], place.pair.tuned))
        return _found(place, wanted)

    sizes = {
        pair.name: pair.tuned.nbytes + (pair.base.nbytes if pair.base else 0)
        for pair in (place.pair for place in places)
    }
    total, done, found = sum(sizes.values()), 0, []
    # Closed by name: left to the garbage collector, its threads could be joined at any place.
    with closing(engine.run(look, places)) as results:
        for place, result in results:
            found.append(result)
            done += sizes[place.pair.name]
            engine.report("decomposing", done, total)
    return found


def _found(place: Place, wanted: Wanted) -> Found:
    pair = place.pair
    if pair.base is None or pair.status is Status.ROWS:
        return Found(place, moved=True)
    if not pair.eligible:
        return Found(place, moved=not have_equal_bytes(pair.base, pair.tuned))
    drift = Drift(pair)
    energies = drift.row_energies()
    energy = float(energies.sum())
    if not energy < _LARGEST:
        raise NonFiniteError(
            f"a drift of norm {energy**0.5:.3g}, too large for factors in float32",
            tensor=pair.name,
            hint="leave the tensor out with --exclude",
        )
    if place.how == ROWS:
        rows = tuple(map(int, np.flatnonzero(energies)))
        return Found(place, bool(rows), energy, rows=rows)
    if place.how != FACTORS or not energy:
        return Found(place, energy > 0, energy)
    if place.is_stack:
        return Found(place, True, energy, decompose_stack(pair, wanted, energies))
    return Found(place, True, energy, decompose(drift, wanted, energy))


def _check_finite(place: Place) -> None:
    view = place.pair.tuned
    if not all(all_finite(view.read(i, j)) for i, j in view.blocks()):
        hint = "leave it out of whole"
        raise NonFiniteError("NaN or infinity in TUNED", tensor=view.name, hint=hint)


# --- what goes in -----------------------------------------------------------------------------


def _decide(found: Sequence[Found], rest: str) -> tuple[list[Found], list[dict[str, str]]]:
    """What the adapter holds, and what moved and is left out, with the reason.

    A module is saved whole or not at all, so what it holds besides comes along unmoved.
    """
    by_name = {one.place.pair.name: one for one in found}
    tree = Tree(by_name)
    moved = [one for one in found if one.moved]
    saved: set[str] = set()
    for one in moved:
        asked = one.place.reason.startswith("asked for")
        if one.place.how == WHOLE and (asked or rest == "whole"):
            saved |= set(tree.saved_with(one.place.module))
    kept, left_out = [], []
    for one in found:
        name, how = one.place.pair.name, one.place.how
        wanted = how == FACTORS or (how != NOWHERE and rest == "whole")
        if name in saved or (one.moved and wanted):
            kept.append(one)
        if one.moved and not wanted and (name not in saved or how == NOWHERE):
            left_out.append({"tensor": name, "reason": one.place.reason})
    return kept, left_out


def _warnings(
    before: Sequence[str], kept: Sequence[Found], left_out: Sequence[dict[str, str]]
) -> tuple[str, ...]:
    if all(one.factors is None for one in kept):
        before = (*before, "no matrix goes into factors: PEFT does not load such an adapter")
    asked = ("excluded", "not included")
    silent = [one for one in left_out if one["reason"] not in asked]
    if not silent:
        return tuple(before)
    those = counted(len(silent), "tensor that differs is", "tensors that differ are")
    what = f"{those} not in the adapter"
    return (*before, f"{what}, first '{shown(silent[0]['tensor'])}': {silent[0]['reason']}")


def _report(
    found: Sequence[Found],
    kept: Sequence[Found],
    left_out: Sequence[dict[str, str]],
    adapter: Checkpoint,
) -> dict[str, Any]:
    """What was kept of each tensor, for the record."""
    matrices = [_matrix(one, one.factors) for one in kept if one.factors is not None]
    energy = sum(one["drift"] ** 2 for one in matrices)
    residual = sum(one["residual"] ** 2 for one in matrices)
    others = [one for one in kept if one.factors is None]
    return {
        "matrices": matrices,
        "drift": energy**0.5,
        "residual": residual**0.5,
        "energy_kept": 1 - residual / energy if energy else None,
        "rank": adapter.config["r"],
        "parameters": adapter.size,
        "factor_parameters": sum(
            one.factors.left.size + one.factors.right.size for one in kept if one.factors
        ),
        "whole": [
            {
                "tensor": one.place.pair.name,
                "reason": one.place.reason or "its module is saved",
                "drift": one.energy**0.5,
                "rows": len(one.rows) if one.place.how == ROWS else None,
            }
            for one in others
        ],
        "left_out": list(left_out),
        "unmoved": sum(not one.moved for one in found),
    }


def _matrix(one: Found, factors: Factors) -> dict[str, Any]:
    return {
        "tensor": one.place.pair.name,
        "layout": one.place.layout,
        "shape": list(one.place.pair.tuned.shape),
        "rank": factors.rank,
        "method": factors.method,
        "drift": factors.energy**0.5,
        "residual": factors.residual**0.5,
        "relative_residual": (factors.residual / factors.energy) ** 0.5,
        "energy_kept": factors.kept,
    }
