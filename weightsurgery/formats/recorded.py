"""Reading a record back: strictly, for it may come from a stranger as the weights do."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsurgery.dtypes import DTYPES
from weightsurgery.errors import FormatError, StorageError, shown
from weightsurgery.formats.files import InputFile, did_you_mean, open_member
from weightsurgery.formats.front_matter import is_card_value
from weightsurgery.formats.json_cost import MEMORY_OF_MANY
from weightsurgery.formats.layout import CARD, RECORD, is_plain_path, joined
from weightsurgery.formats.place import record_name
from weightsurgery.formats.record import SCHEMA, SEAL, sealed
from weightsurgery.formats.safetensors import MAX_RANK
from weightsurgery.formats.strict_json import dump, parse_object

MAX_RECORD = 100_000_000  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATUSES = ("copied", "edited", "added")
_LARGEST = 1 << 64  # of a count; a setting may be larger, but not than a float holds
_LARGEST_SETTING = 1 << 1000
_LONGEST_TEXT = 4096  # characters of a glob, a name or a path
_MOST_VALUES = 10_000  # of the settings of a step, such as globs
_MOST_STEPS = 1000


@dataclass(frozen=True)
class Recorded:
    """A record that was read and checked.

    Attributes:
        path: Of the record.
        content: All of it.
        intact: Whether it is, byte for byte, what was sealed.
    """

    path: str
    content: Mapping[str, Any]
    intact: bool

    @property
    def is_directory(self) -> bool:
        """Whether the output is a directory: it then has a card."""
        return CARD in self.files

    @property
    def hashed(self) -> bool:
        """Whether it tells the SHA-256 of every file and tensor."""
        entries = (*self.files.values(), *self.tensors.values())
        return all(entry["sha256"] is not None for entry in entries)

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Output file to size and SHA-256."""
        found: Mapping[str, Mapping[str, Any]] = self.content["outputs"]
        return found

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """Tensor to file, dtype, shape, status, changed elements and SHA-256."""
        found: Mapping[str, Mapping[str, Any]] = self.content["tensors"]
        return found


def find_output(path: str) -> str:
    """The output that is meant by its own path, or by that of its record."""
    if os.path.isdir(path):
        return path
    if os.path.basename(path) == RECORD:
        return os.path.dirname(path) or "."
    return path.removesuffix(f".{RECORD}")


def find_record(path: str) -> str:
    """The record that is meant by its own path, or by that of its output.

    Raises:
        StorageError: There is no such file or directory.
    """
    if not os.path.lexists(path):
        hint = did_you_mean(path)
        raise StorageError("no such file or directory", file=path, hint=hint, code="E-FILE-MISSING")
    is_directory = os.path.isdir(path)
    folder = path if is_directory else os.path.dirname(path)
    found = os.path.join(folder, record_name(path, is_directory=is_directory))
    # What is no JSON is an output, whose record is missing if it is not there.
    named = not is_directory and path.endswith(".json") and not os.path.lexists(found)
    return path if named else found


def read_record(path: str) -> Recorded:
    """Read a record and check that everything in it is what it should be.

    Args:
        path: Of the record itself.

    Returns:
        The record; one that was altered and is still well formed is not `intact`.

    Raises:
        StorageError: It cannot be read.
        FormatError: It is not JSON, or something in it is missing or of another kind.
    """
    folder, name = os.path.split(path)
    try:
        # One that lies in an output is a file of it, and links lead as little away as others'.
        file = open_member(folder or ".", name) if name == RECORD else InputFile(path)
    except StorageError as error:
        inside = os.path.lexists(os.path.join(folder, RECORD))
        whole = f"the folder has one: give {shown(folder)}"
        hint = whole if inside else "every output of wsurg has one; give such an output"
        reason = f"no record: {error.reason}"
        raise StorageError(reason, file=path, hint=hint, code="E-RECORD-MISSING") from error
    data = file.read_all(MAX_RECORD)
    content = parse_object(data, file=path, what="record", memory=MEMORY_OF_MANY)
    if content.get("schema") != SCHEMA:
        found = shown(content.get("schema"))
        raise FormatError(
            f"not a record: schema is {found}; expected {SCHEMA}", file=path, code="E-RECORD"
        )
    wrong = next(_faults(content), None)
    if wrong is not None:
        raise FormatError(f"not a record: {wrong}", file=path, code="E-RECORD")
    intact = data == dump(content) and content == sealed(content)
    file.check_unchanged()
    return Recorded(path, content, intact)


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a record, a short text each."""
    tool = record.get("tool")
    if not isinstance(tool, dict) or not isinstance(tool.get("version"), str):
        yield "tool.version is missing"
    if not _is_hash(record.get(SEAL)):
        yield f"{SEAL} is no SHA-256"
    yield from _output_faults(record.get("outputs"))
    yield from _input_faults(record.get("inputs"))
    yield from _tensor_faults(record.get("tensors"), record.get("outputs"))
    count = record.get("inputs")
    steps = 0
    for wrong in _recipe_faults(record.get("recipe"), len(count) if isinstance(count, list) else 0):
        steps += not wrong
        if wrong or steps > _MOST_STEPS:
            yield wrong or f"the recipe has more than {_MOST_STEPS:,} steps"
            return


def _output_faults(outputs: Any) -> Iterator[str]:
    if not isinstance(outputs, dict) or not outputs:
        yield "no outputs"
        return
    for name, entry in outputs.items():
        if not is_plain_path(name) or name == RECORD:
            yield f"outputs names '{shown(name)}'; expected a file's path in the output"
        elif not _is_file(entry):
            yield f"outputs['{shown(name)}'] is no size and SHA-256"


def _input_faults(inputs: Any) -> Iterator[str]:
    if not isinstance(inputs, list):
        yield "no inputs"
        return
    for number, given in enumerate(inputs):
        files = given.get("files") if isinstance(given, dict) else None
        if not isinstance(files, list) or not isinstance(given.get("name"), str):
            yield f"inputs[{number}] is no name and files"
        elif not isinstance(given.get("key", ""), str):
            yield f"inputs[{number}].key is no text"
        elif not all(_is_file(f) and isinstance(f.get("name"), str) for f in files):
            yield f"a file of inputs[{number}] is no name, size and SHA-256"
        elif not _is_card(given.get("card", {})):
            yield f"the card of inputs[{number}] has something that no model card says"


def _is_card(told: Any) -> bool:
    return isinstance(told, dict) and all(is_card_value(key, told[key]) for key in told)


def _tensor_faults(tensors: Any, outputs: Any) -> Iterator[str]:
    if not isinstance(tensors, dict):
        yield "no tensors"
        return
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not isinstance(outputs, dict):
            yield f"tensors['{shown(name)}'] is no object"
            return
        shape = entry.get("shape")
        right = (
            isinstance(entry.get("file"), str)
            and entry["file"] in outputs
            and entry["file"].endswith(".safetensors")
            and name.startswith(joined(os.path.dirname(entry["file"]), ""))
            and isinstance(entry.get("dtype"), str)
            and entry["dtype"] in DTYPES
            and isinstance(shape, list)
            and len(shape) <= MAX_RANK
            and all(_is_count(n) for n in shape)
            and entry.get("status") in _STATUSES
            and _is_count(entry.get("changed"))
            and entry["changed"] <= (0 if entry["status"] == "copied" else math.prod(shape))
            and "sha256" in entry
            and (entry["sha256"] is None or _is_hash(entry["sha256"]))
        )
        if not right:
            yield f"tensors['{shown(name)}'] lacks something, or has it of another kind"


def _recipe_faults(recipe: Any, inputs: int) -> Iterator[str]:
    """What is wrong with a recipe; "" for each step with which nothing is."""
    if not isinstance(recipe, dict):
        yield "a recipe is no object"
    elif recipe.keys() == {"input"}:
        if not _is_count(recipe["input"]) or recipe["input"] >= inputs:
            yield f"the recipe names input {shown(recipe['input'])} of {inputs}"
    elif recipe.keys() != {"operator", "settings", "inputs"}:
        yield f"a recipe has {shown(sorted(recipe))}; expected operator, settings and inputs"
    else:
        operator, settings, given = recipe["operator"], recipe["settings"], recipe["inputs"]
        if not isinstance(operator, str):
            yield "an operator of the recipe is no name"
        # BASE's names may be many, and are of tensors; whoever uses them sees to it.
        told = {} if operator == "rename" else settings
        if not isinstance(settings, dict) or any(_is_huge(v) for v in _leaves(settings)):
            yield f"the settings of {shown(operator)} are no object, or one of them is too large"
        elif sum(1 for _ in _leaves(told)) > _MOST_VALUES:
            yield f"the settings of {shown(operator)} are more than {_MOST_VALUES:,}"
        yield ""  # one more step
        for inner in given.values() if isinstance(given, dict) else [None]:
            yield from _recipe_faults(inner, inputs)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _is_huge(value: Any) -> bool:
    """A number beyond any setting, or a text such as no glob or name is long."""
    if isinstance(value, str):
        return len(value) > _LONGEST_TEXT
    return type(value) is int and abs(value) >= _LARGEST_SETTING


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_file(entry: Any) -> bool:
    """A size, and a SHA-256 or null."""
    return (
        isinstance(entry, dict)
        and _is_count(entry.get("size"))
        and "sha256" in entry
        and (entry["sha256"] is None or _is_hash(entry["sha256"]))
    )
