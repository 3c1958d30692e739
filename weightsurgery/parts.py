"""Pair BASE and TUNED part by part, where a model has several, such as a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.coverage import Coverage
from weightsurgery.errors import shown
from weightsurgery.formats.layout import joined
from weightsurgery.pairing import Pairing
from weightsurgery.pairs import Pair


@dataclass(frozen=True)
class Part:
    """A part of TUNED, and the part of BASE that it is paired with.

    Attributes:
        folder: TUNED's name for it; "" for the model's own folder, and for a model of one part.
        base_folder: BASE's name for it.
        pairing: How the two are paired.
    """

    folder: str
    base_folder: str
    pairing: Pairing

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """One for each tensor of the part, under the names of the whole model."""
        found = self.pairing.pairs
        return tuple(map(self.whole, found)) if self.folder or self.base_folder else found

    def whole(self, pair: Pair) -> Pair:
        """A pair under the names of the whole model."""
        return replace(
            pair,
            tuned=replace(pair.tuned, name=joined(self.folder, pair.tuned.name)),
            key=joined(self.folder, pair.key),
            names=tuple(joined(self.base_folder, name) for name in pair.names),
        )

    def message(self, text: str) -> str:
        """A message that names the part."""
        return f"{self.folder}: {text}" if self.folder else text


def pair_parts(base: Checkpoint, tuned: Checkpoint, called: str = "TUNED") -> tuple[Part, ...]:
    """Pair each part of TUNED with BASE's part of the same folder.

    The folder of a model of one part is "". If both models have a single part, these are paired
    whatever their folders are called.

    Args:
        base: BASE.
        tuned: TUNED.
        called: The second model's name in messages.
    """
    ours, theirs = base.split(), tuned.split()
    folders = {folder: folder for folder in theirs}
    if len(ours) == len(theirs) == 1:
        folders = dict(zip(theirs, ours, strict=True))
    nothing = Checkpoint({}, label=base.label)
    return tuple(
        Part(folder, folders[folder], Pairing(ours.get(folders[folder], nothing), part, called))
        for folder, part in theirs.items()
    )


def unused_of(base: Checkpoint, parts: tuple[Part, ...]) -> tuple[tuple[str, str], ...]:
    """BASE's tensors that are not a counterpart of any, each with the reason."""
    paired = {part.base_folder: part for part in parts}
    found = []
    for folder, model in base.split().items():
        part = paired.get(folder)
        if part is None:
            found += [(joined(folder, name), "TUNED has no such part") for name in model]
        else:
            found += [(joined(folder, name), reason) for name, reason in part.pairing.unused]
    return tuple(found)


def coverage_of(parts: tuple[Part, ...]) -> Coverage:
    """Which share of the parameters of all parts has a counterpart."""
    if len(parts) == 1 and not parts[0].folder:
        return parts[0].pairing.coverage
    found = [(part.folder, part.pairing.coverage) for part in parts]
    classes = dict.fromkeys(one.architecture for _, one in found if one.architecture)
    others = not all(one.architecture for _, one in found)
    known = [*classes, *(["others by names"] if classes and others else [])]
    return Coverage(
        parameters=sum(one.parameters for _, one in found),
        paired=sum(one.paired for _, one in found),
        heads=sum(one.heads for _, one in found),
        added=sum(one.added for _, one in found),
        unpaired={joined(f, name): why for f, one in found for name, why in one.unpaired.items()},
        partly={joined(f, name): why for f, one in found for name, why in one.partly.items()},
        architecture=", ".join(known),
    )


def advice_on_parts(names: Sequence[str], tuned: Checkpoint) -> str:
    """What to do where a result of running one part lacks the tensors of others.

    Args:
        names: The tensors that it lacks.
        tuned: The whole model.

    Returns:
        The options that leave these parts out; "" if a tensor of the part in the model's folder
        itself is lacking too.
    """
    lacking = {folder: {joined(folder, name) for name in part}.intersection(names)
               for folder, part in tuned.split().items()}  # fmt: skip
    if lacking.get("") or not tuned.parts:
        return ""
    flags = [f"--exclude '{shown(folder)}/*'" for folder, found in lacking.items() if found]
    return f"only one part of the model was run; keep the others as they are with {' '.join(flags)}"
