"""Weights in several files: what the index lists, what the shards hold, and how far these agree.

transformers opens every file that the index names and takes all tensors in it; it never looks at
the list of tensors. So tensors that the index does not list are part of the model. They are read,
written and hashed like all others, and a warning names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsurgery.checkpoint import FileRef, TensorView
from weightsurgery.errors import (
    FormatError,
    PolicyError,
    StorageError,
    SurgeryError,
    counted,
    first_few,
    shown,
)
from weightsurgery.formats.folder import Folder, Weights
from weightsurgery.formats.layout import (
    DIFFUSERS_STEM,
    INDEX,
    NOT_OF_THE_MODEL,
    SINGLE,
    STEM,
    fits,
    unpickled,
)
from weightsurgery.formats.strict_json import parse_object

MAX_JSON = 100_000_000
_OF_A_SET = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_STEMS = {
    ".safetensors": (STEM, DIFFUSERS_STEM),
    ".bin": ("pytorch_model", DIFFUSERS_STEM),
}


@dataclass(frozen=True)
class ShardName:
    """A file name such as `model-00001-of-00003.safetensors`, taken apart.

    Attributes:
        stem: What precedes the number.
        number: Counted from 1.
        count: How many shards there are.
        ending: With its dot.
    """

    stem: str
    number: int
    count: int
    ending: str


def parse_shard_name(name: str) -> ShardName | None:
    """The parts of a shard's name; None for any other name.

    Example:
        >>> parse_shard_name("model-00001-of-00003.safetensors")
        ShardName(stem='model', number=1, count=3, ending='.safetensors')
        >>> parse_shard_name("model.safetensors")
    """
    found = _OF_A_SET.fullmatch(name)
    return ShardName(found[1], int(found[2]), int(found[3]), found[4]) if found else None


def part_warning(name: str) -> list[str]:
    """A warning if a file is one of several shards, and so only a part of a model."""
    shard = parse_shard_name(name)
    if shard is None or shard.count < 2:
        return []
    what = f"shard {shard.number} of {shard.count}"
    return [f"{shown(name)}: {what}, only a part of a model; give its directory to open all"]


def refuse_part(folder: Folder, name: str) -> None:
    """Refuse one shard of several as a directory's weights.

    Raises:
        PolicyError: The name is that of one shard of several.
    """
    shard = parse_shard_name(name)
    if shard is not None and shard.count > 1:
        raise PolicyError(
            f"{shown(name)} is shard {shard.number} of {shard.count}, only a part of the model",
            file=folder.path,
            hint="leave out --weights to open all shards",
            code="E-SHARD-PART",
        )


def find_set(folder: Folder, ending: str) -> list[str]:
    """The names of a complete set of shards in a directory without an index; [] if there is none.

    Args:
        folder: The directory.
        ending: ".safetensors" or ".bin".

    Raises:
        FormatError: There are shards, but no complete set.
        PolicyError: There are several complete sets.
    """
    present: dict[tuple[int, str], set[str]] = {}
    for name in folder.entries:
        shard = parse_shard_name(name)
        if shard and shard.stem in _STEMS[ending] and shard.ending == ending and shard.count:
            present.setdefault((shard.count, shard.stem), set()).add(name)
    wanted = {key: _set_of(key[1], key[0], ending) for key in sorted(present)}
    missing = {key: [name for name in wanted[key] if name not in present[key]] for key in wanted}
    complete = [key for key in wanted if not missing[key]]
    if len(complete) > 1:
        both = " and ".join(f"of {count}" for count, _ in complete[:2])
        raise PolicyError(
            f"ambiguous weights: complete sets of shards, {both}",
            file=folder.path,
            hint="keep one set in the directory",
            code="E-TWO-ANSWERS",
        )
    if complete or not wanted:
        return wanted[complete[0]] if complete else []
    nearest = min(missing, key=lambda key: (len(missing[key]), key))
    gone = missing[nearest]
    are = "is" if len(gone) == 1 else "are"
    raise FormatError(
        f"{len(gone):,} of {counted(nearest[0], 'shard')} {are} missing: {first_few(gone)}",
        file=folder.path,
        hint="the download may be incomplete",
        code="E-SHARD-MISSING",
    )


def _set_of(stem: str, count: int, ending: str) -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1)]


@dataclass
class Shards:
    """What was read of a model's weights files.

    Attributes:
        folder: The directory.
        tensors: All tensors.
        layout: Each tensor's file, as it is called in the directory.
        metadata: The headers' metadata; the last file counts.
        files: The files, in the order of reading.
        warnings: What was odd.
        left_out: Weights files that do not belong to the model, each with the reason.
    """

    folder: Folder
    tensors: dict[str, TensorView] = field(default_factory=dict)
    layout: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: list[FileRef] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(view.nbytes for view in self.tensors.values())

    @property
    def written_layout(self) -> dict[str, str]:
        """Each tensor's file, as it will be called once it is safetensors."""
        names = {shard: unpickled(shard) for shard in set(self.layout.values())}
        return {name: names[shard] for name, shard in self.layout.items()}

    def add(self, name: str, weights: Weights) -> None:
        """Add a file's tensors.

        Raises:
            FormatError: A tensor is in an earlier file too.
        """
        for tensor in weights.tensors:
            if tensor in self.layout:
                raise FormatError(
                    f"also in {shown(self.layout[tensor])}",
                    file=weights.file.path,
                    tensor=tensor,
                    code="E-SHARD-DUPLICATE",
                )
        self.tensors |= weights.tensors
        self.layout |= dict.fromkeys(weights.tensors, name)
        self.warnings += weights.warnings
        self.warnings += [
            f"{shown(name)}: its header metadata has another '{shown(key)}' than the shards before"
            for key in sorted(weights.metadata.keys() & self.metadata.keys())
            if weights.metadata[key] != self.metadata[key]
        ]
        self.metadata |= weights.metadata
        self.files.append(weights.file.ref())


def open_files(folder: Folder, names: Iterable[str]) -> Shards:
    """Open weights files that together are one model.

    Raises:
        FormatError: One breaks its format's rules, or a tensor is in two.
        PolicyError: One is a link that leads out, or as for `open_torch`.
        StorageError: One cannot be read.
    """
    found = Shards(folder)
    for name in names:
        found.add(name, folder.open_weights(name))
    return found


def open_set(folder: Folder, names: Sequence[str]) -> Shards:
    """Open shards that no index lists, and other weights files beside them.

    Raises:
        FormatError, PolicyError, StorageError: As for `open_files`.
    """
    found = open_files(folder, names)
    what = counted(len(names), "shard")
    ending = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
    found.warnings.append(f"no index; opened {what}, {shown(ending)}")
    _add_others(found, names[0].endswith(".safetensors"), "the shards")
    return found


def open_indexed(folder: Folder, index: str) -> Shards:
    """Open the shards that an index names, and other weights files beside them.

    Raises:
        FormatError: The index or a shard breaks its format's rules, a shard is missing, or a
            tensor is in two.
        PolicyError: One is a link that leads out, or as for `open_torch`.
        StorageError: One cannot be read.
    """
    file, listed, total = read_index(folder, index)
    names = sorted(set(listed.values()))
    for name in names:
        if not folder.holds(name):
            raise FormatError(
                f"shard {shown(name)} is missing; {shown(index)} lists it",
                file=folder.path,
                hint="the download may be incomplete",
                code="E-SHARD-MISSING",
            )
    found = open_files(folder, names)
    found.files.insert(0, file)
    found.warnings += _disagreements(index, listed, found.layout)
    if total is not None and total != found.nbytes:
        found.warnings.append(
            f"{shown(index)}: total_size is {shown(total)}, the tensors take {found.nbytes:,} bytes"
        )
    _add_others(found, index == INDEX, shown(index))
    return found


def read_index(folder: Folder, name: str) -> tuple[FileRef, dict[str, str], Any]:
    """An index file, its weight map, and the total size that it states, of whatever type.

    Raises:
        FormatError: It is not an index, or names a shard by something else than a plain file name.
        PolicyError: It is a link that leads out.
        StorageError: It cannot be read.
    """
    file = folder.open(name)
    index = parse_object(file.read_all(MAX_JSON), file=file.path, what="index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("no weight_map in the index", file=file.path, code="E-INDEX-MAP")
    ending = ".bin" if ".bin.index." in name else ".safetensors"
    for tensor, shard in weight_map.items():
        if not _is_plain_name(shard, ending):
            raise FormatError(
                f"weight_map gives {shown(shard)}; expected a plain name ending in {ending}",
                file=file.path,
                tensor=tensor,
                code="E-INDEX-NAME",
            )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return file.ref(), weight_map, total


def _is_plain_name(name: Any, ending: str) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(ending)
        and len(name) > len(ending)
        and name.isprintable()
        and not any(c in name for c in "/\\:")
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )


def _disagreements(index: str, listed: Mapping[str, str], layout: Mapping[str, str]) -> list[str]:
    """Warnings for an index that does not describe its shards."""
    unlisted = [name for name in layout if name not in listed]
    lacking = [name for name in listed if name not in layout]
    moved = [n for n, shard in listed.items() if n in layout and layout[n] != shard]
    return [
        f"{shown(index)}: {what.format(counted(len(names), 'tensor'))}: {_named(names)}"
        for what, names in (
            ("does not list {} of its shards", unlisted),
            ("lists {} that no shard has", lacking),
            ("places {} in the wrong shard", moved),
        )
        if names
    ]


def _named(names: Iterable[str]) -> str:
    return first_few([f"'{shown(name)}'" for name in sorted(names)])


def _add_others(found: Shards, with_safetensors: bool, beside: str) -> None:
    """Add safetensors files beside the model's own that hold only tensors of other names."""
    own = {file.name for file in found.files}
    others = [n for n in found.folder.entries if n.endswith(".safetensors") and n not in own]
    for name in others if with_safetensors else ():
        known = name == SINGLE or fits(name.lower(), NOT_OF_THE_MODEL)
        if known or not _is_plain_name(name, ".safetensors"):
            continue
        try:
            weights = found.folder.open_weights(name)
        except (FormatError, PolicyError, StorageError) as error:
            found.left_out[name] = error.reason
            found.warnings.append(_unread(name, beside, error))
            continue
        twice = [tensor for tensor in weights.tensors if tensor in found.layout]
        if twice:
            found.left_out[name] = f"holds tensors that {beside} already have: {_named(twice)}"
        elif weights.tensors:
            found.add(name, weights)
            found.warnings.append(
                f"{shown(name)}: not in {beside}, holds {counted(len(weights.tensors), 'tensor')} "
                f"more: {_named(weights.tensors)}"
            )


def _unread(name: str, beside: str, error: SurgeryError) -> str:
    return f"{shown(name)}: not in {beside}, skipped: {error.reason}"
