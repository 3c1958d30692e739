"""Fold adapters into the weights of the model that they were trained on.

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685,
    equation 3. The files and their scales are those of the library PEFT.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np

from weightsurgery.adapters.config import read_config
from weightsurgery.adapters.contents import Contents, sort_out
from weightsurgery.adapters.finite import warn_of_nonfinite
from weightsurgery.adapters.heads import Reading, read_adapters, stored_apart, stored_as_in_base
from weightsurgery.adapters.layout import Target
from weightsurgery.adapters.linked import is_all_added, parts_of
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.updates import MERGED_AT_ONCE, Replace, Shift, Update
from weightsurgery.adapters.zeros import scale_of, warn_of_zeros
from weightsurgery.anatomy import find_embedding
from weightsurgery.checkpoint import Checkpoint, FileRef, TensorView
from weightsurgery.errors import (
    MismatchError,
    NonFiniteError,
    PolicyError,
    counted,
    first_few,
    shown,
)
from weightsurgery.formats.hub import is_hub_id
from weightsurgery.formats.layout import TOKENIZER, fits
from weightsurgery.formats.record import public_name
from weightsurgery.kernels import Block, all_finite, to_dtype, to_float
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import AllowNonfinite, NameMap, Setting, StripPrefix, operator
from weightsurgery.ties import is_output_head


@operator
def apply_adapter(
    base: Checkpoint,
    *adapters: Checkpoint,
    weight: Annotated[
        tuple[float, ...],
        Setting("multiplies an adapter's change, -1 takes it back; one for each", metavar="NUMBER"),
    ] = (),
    rounding: Annotated[
        Literal["once", "peft"],
        "round the sum once, or the change first and then the sum, as PEFT's safe merge does",
    ] = "once",
    untie: Annotated[
        bool, "store an output head that BASE ties to its embedding as a tensor of its own"
    ] = False,
    strip_prefix: StripPrefix = "",
    name_map: NameMap = (),
    force_base: Annotated[bool, "accept an adapter that names another base"] = False,
    allow_nonfinite: AllowNonfinite = False,
) -> Checkpoint:
    """Fold adapters into BASE.

    W becomes W + s·B·A, in float32 (float64 for F64), for every matrix that an adapter adapts;
    several adapters add up in the order given, and the sum is rounded once to BASE's dtype. What
    no adapter touches keeps its bytes. Every tensor of an adapter is accounted for: one that
    fits nothing in BASE is an error.

    Args:
        base: The model that the adapters were trained on.
        adapters: PEFT adapters of type LORA.
        weight: One number for each adapter, or none.
        rounding: "once" or "peft".
        untie: Write head and embedding as two tensors and set `tie_word_embeddings` to false.
            Needed where an adapter changes one of the two alone, or each in its own way.
        strip_prefix: Ignored at the front of the adapters' names or of BASE's.
        name_map: An adapter's name of a module or tensor to BASE's name; wins over the prefix. All
            that is below a module is mapped with it.
        force_base: Do not compare the name of its base that an adapter gives with BASE's.
        allow_nonfinite: Let NaN and infinity pass instead of refusing them, BASE's and the
            adapters'. The adapters are then read at once, and a warning tells which hold some.

    Returns:
        The merged model; nothing but headers is read until it is saved, and of factors what tells
        that they are not zero. Reading it raises
        NonFiniteError where a value is NaN or infinite, unless that is allowed.

    Raises:
        SettingError: There is no adapter, not one `weight` for each, or a name that is mapped does
            not exist.
        FormatError: An adapter is incomplete, or contradicts its configuration.
        MismatchError: An adapter does not fit BASE, or `untie` is given and nothing is tied.
        PolicyError: An adapter is of a kind that is not folded in, names another base, would need
            `untie`, or a model is quantised.
    """
    require_unquantised(base)
    warnings = [w for adapter in adapters for w in _check_base(base, adapter, force_base)]
    stored = stored_apart if untie else stored_as_in_base
    naming = Naming(strip_prefix, dict(name_map))
    read = read_adapters(base, adapters, weight, naming=naming, allow_nonfinite=allow_nonfinite)
    reading = stored(read)
    if allow_nonfinite:
        warnings += [told for adapter in adapters for told in warn_of_nonfinite(adapter)]
    warnings += _doubts(reading, base, adapters)
    contents = [sort_out(adapter) for adapter in adapters]
    warnings += [
        f"{shown(public_name(a))}: {w}"
        for a, c in zip(adapters, contents, strict=True)
        for w in c.warnings
    ]
    side_files, replaced = _with_tokenizers(reading.base, adapters)
    warnings += replaced
    edited = reading.updates()
    by = weight or [1.0] * len(adapters)
    given = zip(adapters, by, reading.targets, contents, strict=True)
    notes: dict[str, Any] = {"adapters": [_described(*one) for one in given]}
    if reading.tie:
        notes["untied"] = {"embedding": reading.tie.embedding, "head": reading.tie.head}
    tensors = {
        name: _merged(view, edited[name], rounding, allow_nonfinite) if name in edited else view
        for name, view in reading.base.items()
    }
    return replace(
        reading.base,
        tensors=tensors,
        side_files=side_files,
        notes={**base.notes, **notes},
        warnings=(*reading.base.warnings, *warnings),
    )


def _with_tokenizers(
    base: Checkpoint, adapters: Sequence[Checkpoint]
) -> tuple[tuple[FileRef, ...], list[str]]:
    """BASE's side files with its adapters' tokenizers, and a warning for each that brings one."""
    files = {file.name: file for file in base.side_files}
    warnings = []
    for adapter in adapters if base.is_directory else ():
        found = [file for file in adapter.side_files if fits(file.name, TOKENIZER)]
        others = [f for f in found if f.name not in files or _differ(f, files[f.name])]
        files |= {file.name: file for file in others}
        if others:
            names = first_few([shown(file.name) for file in others])
            label = shown(public_name(adapter))
            warnings.append(f"tokenizer files of {label} are written in place of BASE's: {names}")
    return tuple(sorted(files.values(), key=lambda file: file.name)), warnings


def _differ(one: FileRef, other: FileRef) -> bool:
    return one.size != other.size or one.content() != other.content()


def _doubts(reading: Reading, base: Checkpoint, adapters: Sequence[Checkpoint]) -> list[str]:
    """What may not be what was meant, and is no error."""
    doubts = []
    before: set[str] = set()
    for adapter, targets in zip(adapters, reading.targets, strict=True):
        label = shown(adapter.label)
        lost = [
            target.name
            for target in targets
            if target.name in before and any(isinstance(u, Replace) for u in target.updates)
        ]
        doubts += [
            f"{label} replaces '{shown(name)}': what was folded in before it is gone"
            for name in lost
        ]
        still = [t for t in targets if all(scale_of(u) == 0 for u in t.updates)]
        if still:
            those = counted(len(still), "tensor stays as it is", "tensors stay as they are")
            doubts.append(f"{label}: its scale is 0, so {those}")
        doubts += warn_of_zeros(adapter, targets)
        before |= {target.name for target in targets}
    embedding = find_embedding(base)
    if not base.config and embedding in before and not any(map(is_output_head, base)):
        doubts.append(
            f"BASE has no config.json and stores no output head: if its head is tied to "
            f"'{shown(embedding)}', the head changes too"
        )
    return doubts


def _merged(
    view: TensorView, updates: Sequence[Update], rounding: str, allow_nonfinite: bool
) -> TensorView:
    """The tensor after all updates, rounded to its own dtype."""
    last = updates[-1]
    copied = last.by if isinstance(last, Replace) and not view.dtype.arithmetic else None

    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, subject = view.read_both(start, stop)
        if copied:  # a counter, such as batch normalisation's
            return stored, copied.read(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at below
            result = _updated(subject, updates, start, rounding, view.dtype.numpy)
        if not allow_nonfinite and not all_finite(result):
            raise NonFiniteError(
                f"NaN or infinity among elements {start:,} to {stop:,}",
                tensor=view.name,
                hint="see `wsurg diff`; --allow-nonfinite lets it pass",
            )
        return stored, result

    status = "added" if view.status == "added" else "edited"
    return replace(view, read_both=read_both, status=status)


def _updated(
    stored: Block, updates: Sequence[Update], start: int, rounding: str, dtype: np.dtype[Any]
) -> Block:
    """Stored elements after all updates, rounded to a dtype."""
    only = updates[0] if len(updates) == 1 else None
    if isinstance(only, MERGED_AT_ONCE) and rounding == "once" and stored.dtype == dtype:
        return only.merge(stored, start)
    values = to_float(stored)
    for update in updates:
        if rounding == "peft":
            values = _rounded_twice(update, values, start, dtype)
        else:
            values = update.apply(values, start)
    return to_dtype(values, dtype)


def _rounded_twice(update: Update, values: Block, start: int, dtype: np.dtype[Any]) -> Block:
    """The values after an update, a product and the sum both rounded to the stored dtype.

    PEFT rounds what it adds to a bias with the sum alone.
    """
    if is_all_added(update) and not isinstance(update, Shift):
        change = to_float(to_dtype(update.apply(np.zeros_like(values), start), dtype))
        return to_float(to_dtype(values + change, dtype))
    return to_float(to_dtype(update.apply(values, start), dtype))


def _check_base(base: Checkpoint, adapter: Checkpoint, force: bool) -> list[str]:
    """Warnings, if the adapter's word for its base cannot be compared.

    Raises:
        PolicyError: The adapter names another base.
    """
    named = read_config(adapter).base
    if not named:
        return [f"{public_name(adapter)} does not say which base it was trained on"]
    ours = (base.hub_id, _cached(base.label), str(base.config.get("_name_or_path") or ""))
    if force or any(_is_same(named, one) for one in ours if one):
        return []
    # A folder may be called like a hub id and is none, and may be given as ".".
    if not base.hub_id and _last(named) == _last(os.path.abspath(base.label)):
        return []
    raise PolicyError(
        f"the adapter was trained on '{shown(named)}', BASE is '{shown(base.label)}'",
        file=adapter.label,
        hint="--force-base applies it all the same, if you know that they are one model",
        code="E-ADAPTER-BASE",
    )


def _is_same(named: str, ours: str) -> bool:
    """True for one hub id, or for two names of which one is a path, and that end alike."""
    if is_hub_id(named) and is_hub_id(ours):
        return named.partition("@")[0].casefold() == ours.partition("@")[0].casefold()
    return _last(named) == _last(ours)


def _cached(path: str) -> str:
    """The hub id of a snapshot in the hub's cache, "" for any other path."""
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", os.path.abspath(path) + "/")
    return found[1].replace("--", "/") if found else ""


def _last(name: str) -> str:
    """The last part of a path or hub id, without its revision."""
    whole = name.partition("@")[0] if is_hub_id(name) else name  # a revision may have slashes
    return os.path.basename(whole.replace("\\", "/").rstrip("/")).partition("@")[0].casefold()


def _described(
    adapter: Checkpoint, weight: float, targets: Sequence[Target], contents: Contents
) -> dict[str, object]:
    if not targets:
        raise MismatchError(
            "the adapter changes nothing of BASE", file=adapter.label, code="E-ADAPTER-TARGET"
        )
    return {
        "adapter": public_name(adapter),
        "weight": weight,
        "unused": [{"tensor": name, "reason": reason} for name, reason in contents.unused],
        "targets": [
            {
                "tensor": target.name,
                "updates": [
                    type(part).__name__ for update in target.updates for part in parts_of(update)
                ],
                "from": sorted({s for update in target.updates for s in update.sources}),
            }
            for target in targets
        ],
    }
