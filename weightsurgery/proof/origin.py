"""Whether a tensor of an output is made of BASE's and TUNED's bits alone, and which are whose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsurgery.alignment import Pair, align
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.coverage import Coverage
from weightsurgery.errors import FormatError, MismatchError, SettingError, SurgeryError, shown
from weightsurgery.formats.recorded import Recorded
from weightsurgery.kernels import Block, bits_of, count_different, to_dtype, to_float
from weightsurgery.masks import flags_of, read_mask
from weightsurgery.proof.again import do_again
from weightsurgery.stream import Engine

_BY_REPLAY = "verify it without them, or make it again with `wsurg replay`"
_AS_TRAINING = (
    "run its command again and compare the SHA-256 in the two records; its input can be proved"
)
_OTHERWISE = {
    **dict.fromkeys(("finetune", "train-adapter", "meraser"), _AS_TRAINING),
    "apply-adapter": "`wsurg verify-adapter` proves a merge",
}
_SELECT = ("mix", "purify", "epur")  # what they write is BASE's or TUNED's, bit for bit


@dataclass(frozen=True)
class Origin:
    """Where the elements of an output should be from.

    Attributes:
        pairs: TUNED's name to what belongs together.
        coverage: Which share of TUNED's parameters has a counterpart in BASE.
        base: BASE, under the names that the record gives it.
        tuned: TUNED.
        mask: What a mask says was reset; None if none was given.
        reset_where: The bit of the mask that means BASE.
        exact: Whether the mask tells just what changed; else it may name what was alike before.
        entries: What the record says of BASE and of TUNED, under these names.
        edited: The tensors that went through the operator.
        renamed: BASE's names to those that the record gives them, where they are others.
        expected: What the recorded steps give when they are done again; None if they cannot be.
        why_not: Why they cannot be, "" if they can.
    """

    pairs: Mapping[str, Pair]
    coverage: Coverage
    base: Checkpoint
    tuned: Checkpoint
    mask: Checkpoint | None
    reset_where: bool
    exact: bool
    entries: Mapping[str, Mapping[str, Any]]
    edited: Collection[str]
    renamed: Mapping[str, str]
    expected: Checkpoint | None
    why_not: str

    @property
    def given(self) -> dict[str, Checkpoint]:
        """BASE and TUNED as they were opened."""
        return {"base": self.base.sources()[0], "tuned": self.tuned}

    def describe(self) -> list[dict[str, Any]]:
        """Which inputs were given, and as which of the recorded ones their files are known."""
        return describe(self.given, self.entries)


def describe(
    given: Mapping[str, Checkpoint], entries: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Which inputs were given, and as which of the recorded ones their files are known.

    Args:
        given: BASE and TUNED under these names.
        entries: What the record says of each.

    Returns:
        For each: names, and whether it is the `same`, null where no hash was recorded; and whether
        the two are `swapped`.
    """
    hashes = {role: _hashes(one) for role, one in given.items()}
    found = []
    for role, one in given.items():
        known = [other for other in given if _is_recorded(hashes[role], entries[other])]
        hashed = all(file["sha256"] is not None for file in entries[role]["files"])
        told = {"input": role, "given": one.label, "recorded": entries[role]["name"]}
        same = role in known if hashed else None
        found.append({**told, "same": same, "swapped": bool(known) and role not in known})
    return found


@dataclass
class Counts:
    """Over the elements of a tensor.

    Attributes:
        changed: Those whose bits are not TUNED's.
        neither: Those whose bits are neither BASE's nor TUNED's.
        unlike_mask: Those that are not what the mask says.
        unlike_recipe: Those whose bits are not what the recorded steps give.
    """

    changed: int = 0
    neither: int = 0
    unlike_mask: int = 0
    unlike_recipe: int = 0

    def add(self, other: Counts) -> None:
        """Add what was counted in another part of the tensor."""
        self.changed += other.changed
        self.neither += other.neither
        self.unlike_mask += other.unlike_mask
        self.unlike_recipe += other.unlike_recipe


def find_origin(
    recorded: Recorded,
    base: Checkpoint,
    tuned: Checkpoint,
    mask: Checkpoint | None,
    engine: Engine,
) -> Origin:
    """Pair BASE with TUNED as the recorded steps did, and do these steps again if they can be.

    Args:
        recorded: The output's record.
        base: Trusted pre-trained model.
        tuned: What the output was made from.
        mask: What `--mask` wrote, or what `purify --from-mask` was given.
        engine: How to run a ranking.

    Raises:
        SettingError: The output was not made by selecting from BASE and TUNED.
        MismatchError: BASE and TUNED do not fit each other, or the mask is none of this output.
        FormatError: The recorded steps lack something, or have it of another kind.
    """
    renamings, places = _roles(recorded)
    entries = {role: recorded.content["inputs"][place] for role, place in places.items()}
    try:
        return _pair(recorded, renamings, places, entries, base, tuned, mask, engine)
    except SurgeryError as error:
        # That the models are others is what to tell, if they are.
        check_given(describe({"base": base, "tuned": tuned}, entries), error.reason)
        raise


def check_given(inputs: Sequence[Mapping[str, Any]], reason: str = "") -> None:
    """Refuse models that are surely the wrong ones.

    Args:
        inputs: From `describe`.
        reason: Why they do not do, where they do not; other files may do as well.

    Raises:
        MismatchError: They are the recorded ones the other way round, or do not do.
    """
    if all(given["swapped"] for given in inputs):
        reason = "BASE and TUNED are given the other way round"
        raise MismatchError(reason, file=inputs[0]["given"], code="E-VERIFY-INPUTS")
    others = [given for given in inputs if given["same"] is False]
    if reason and others:
        role, name = others[0]["input"].upper(), shown(others[0]["recorded"])
        raise MismatchError(
            f"not the recorded {role}, '{name}': {reason}",
            file=others[0]["given"],
            hint="give the models that the output was made from",
            code="E-VERIFY-INPUTS",
        )


def _pair(
    recorded: Recorded,
    renamings: list[Mapping[str, Any]],
    places: Mapping[str, int],
    entries: Mapping[str, Mapping[str, Any]],
    base: Checkpoint,
    tuned: Checkpoint,
    mask: Checkpoint | None,
    engine: Engine,
) -> Origin:
    """What belongs together, and what the recorded steps give."""
    named, renamed = _renamed(base, renamings, recorded.path)
    edited = {n for n, entry in recorded.tensors.items() if entry["status"] == "edited"}
    alignment = align(named, tuned, mismatched="keep")
    inputs = {places["base"]: base, places["tuned"]: tuned}
    reset_where, exact = True, True
    if mask is not None:
        reset_where, exact, place = _rule(recorded, mask)
        inputs |= {} if place is None else {place: mask}
        mask = _flags(recorded, mask, tuned)
    expected, why_not = do_again(recorded, inputs, engine)
    return Origin(
        pairs={pair.name: pair for pair in alignment.pairs},
        coverage=alignment.coverage,
        base=named,
        tuned=tuned,
        mask=mask,
        reset_where=reset_where,
        exact=exact,
        entries=entries,
        edited=edited,
        renamed=renamed,
        expected=expected,
        why_not=why_not,
    )


def count_origins(
    origin: Origin, view: TensorView, start: int, stop: int, block: Block, counts: Counts
) -> None:
    """Add what is found in one block.

    Args:
        origin: What belongs together.
        view: The output's tensor, one that TUNED has in this shape and dtype.
        start: The block's first element.
        stop: Where it ends.
        block: Its elements.
        counts: Where to add.
    """
    pair = origin.pairs[view.name]
    tuned, expected = (origin.expected or origin.tuned)[view.name].read_both(start, stop)
    differing = count_different(tuned, block)
    counts.changed += differing
    unlike = count_different(expected, block) if origin.expected else differing
    counts.unlike_recipe += unlike if origin.expected else 0
    # What the steps gave of BASE is BASE's; where nothing else is asked, that is all.
    doubted = differing and unlike
    if not doubted and origin.mask is None:
        return
    changed = bits_of(block) != bits_of(tuned)
    is_base, may_be = np.zeros((2, changed.size), np.bool_)
    base = pair.base
    for first, last in pair.spans(start, stop) if base is not None else ():
        here = slice(first - start, last - start)
        may_be[here] = True
        if base is not None and (doubted or not origin.exact):
            reset = base.read(first, last)
            if reset.dtype != tuned.dtype:
                reset = to_dtype(to_float(reset), tuned.dtype)
            is_base[here] = bits_of(block[here]) == bits_of(reset)
    if doubted:
        counts.neither += int(np.count_nonzero(changed & ~is_base))
    if origin.mask is None:
        return
    flags = flags_of(origin.mask, view.name, start, changed.size)
    if origin.exact:
        counts.unlike_mask += int(np.count_nonzero(flags != changed))
    else:  # what the mask leaves alone, and what is not its own, is TUNED's
        flags = (flags == origin.reset_where) & (view.name in origin.edited) & may_be
        counts.unlike_mask += int(np.count_nonzero(np.where(flags, ~is_base, changed)))


def _roles(recorded: Recorded) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """BASE's renamings, innermost first, and the places of BASE and TUNED among the inputs.

    Raises:
        SettingError: The recipe is none of selections from one BASE and one TUNED.
    """
    found: list[tuple[int, list[Mapping[str, Any]]]] = []
    step = recorded.content["recipe"]
    while "input" not in step:
        if step["operator"] not in _SELECT or not {"base", "tuned"} <= step["inputs"].keys():
            raise SettingError(
                f"base and tuned prove what {', '.join(_SELECT)} made; "
                f"this output was made by '{shown(step['operator'])}'",
                file=recorded.path,
                hint=_OTHERWISE.get(step["operator"], _BY_REPLAY),
                code="E-VERIFY-KIND",
            )
        found.append(_leaf(step["inputs"]["base"], recorded.path))
        step = step["inputs"]["tuned"]
    if not found:
        reason = "this output is a copy, not made from base"
        raise SettingError(reason, file=recorded.path, code="E-VERIFY-KIND")
    if any(one != found[0] for one in found):
        reason = "this output was made from more than one base"
        raise SettingError(reason, file=recorded.path, code="E-VERIFY-KIND")
    if found[0][0] == step["input"]:
        reason = "this output was made from one model, which was base and tuned"
        raise SettingError(reason, file=recorded.path, code="E-VERIFY-KIND")
    return found[0][1], {"base": found[0][0], "tuned": step["input"]}


def _leaf(step: Any, path: str) -> tuple[int, list[Mapping[str, Any]]]:
    """An input and the renamings above it, innermost first.

    Raises:
        SettingError: It is more than a renamed input.
    """
    names: list[Mapping[str, Any]] = []
    while "input" not in step:
        given = step["settings"].get("names")
        if step["operator"] != "rename" or not isinstance(given, dict) or len(step["inputs"]) != 1:
            reason = f"its base was itself made, by '{shown(step['operator'])}'"
            hint = "make it again with `wsurg replay`"
            raise SettingError(reason, file=path, hint=hint, code="E-VERIFY-KIND")
        names.insert(0, given)
        step = next(iter(step["inputs"].values()))
    return step["input"], names


def _renamed(
    base: Checkpoint, renamings: list[Mapping[str, Any]], path: str
) -> tuple[Checkpoint, dict[str, str]]:
    """BASE under the names that the record gives it, and its own to those that are others.

    Raises:
        FormatError: Two of its tensors would get the same name.
    """
    renamed = {name: name for name in base}
    for renaming in renamings:
        given = {name: str(other) for name, other in renaming.items()}
        try:
            base = base.renamed(given)
        except SettingError as error:
            reason = f"its base cannot be renamed so: {error.reason}"
            raise FormatError(reason, file=path, tensor=error.tensor, code="E-RECORD") from error
        renamed = {own: given.get(name, name) for own, name in renamed.items()}
    return base, {own: name for own, name in renamed.items() if own != name}


Hashes = set[tuple[int, str]]


def _hashes(given: Checkpoint) -> tuple[Hashes, Hashes]:
    """Size and SHA-256 of the files of weights, and of those beside them; taken once."""
    weights = {(file.size, file.sha256(None)) for file in given.files}
    return weights, {(file.size, file.sha256(None)) for file in given.side_files}


def _is_recorded(hashes: tuple[Hashes, Hashes], entry: Mapping[str, Any]) -> bool:
    """True if the weights, and all files that the record names, are those by their SHA-256."""
    weights, beside = hashes
    then = {(file["size"], file["sha256"]) for file in entry["files"]}
    return weights <= then <= weights | beside


def _rule(recorded: Recorded, mask: Checkpoint) -> tuple[bool, bool, int | None]:
    """Which bit of a mask means BASE, whether it tells just what changed, its place as an input."""
    step = recorded.content["recipe"]
    place = step["inputs"].get("from_mask", {}).get("input")
    if place is None or not _is_recorded(_hashes(mask), recorded.content["inputs"][place]):
        return True, True, None
    return step["settings"].get("invert") is not True, False, place


def _flags(recorded: Recorded, mask: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """A mask's flags under TUNED's names.

    Raises:
        MismatchError: It is not a mask, or not one of this output.
    """
    try:
        flags = read_mask(mask, tuned)
    except MismatchError as error:
        at = {"file": mask.label, "tensor": error.tensor or ""}
        raise MismatchError(error.reason, **at, code="E-VERIFY-MASK") from error
    for name, view in flags.items():
        entry = recorded.tensors.get(name)
        if entry is None or entry["shape"] != list(view.shape):
            reason = "the mask is not of this output"
            raise MismatchError(reason, file=mask.label, tensor=name, code="E-VERIFY-MASK")
    return flags
