"""The record of an output: what made it from what, with the hash of every file and tensor.

Nothing in it depends on where or when it was made: no times, no host, no absolute paths. The
same inputs, settings and seed give the same record, byte for byte.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from weightsurgery.anatomy import kind_of, layer_of, natural_key
from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.errors import shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.layout import is_adapter_layout
from weightsurgery.formats.strict_json import dump
from weightsurgery.kernels import count_different
from weightsurgery.ties import tied_to
from weightsurgery.version import __version__

SCHEMA = "wsurg.record/1"
SEAL = "record_sha256"


def make_record(
    checkpoint: Checkpoint,
    *,
    outputs: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Any]],
    inputs: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    left_out: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Assemble the record of a saved checkpoint.

    Args:
        checkpoint: What was saved.
        outputs: File name to size and SHA-256.
        tensors: Tensor name to file, dtype, shape, status, changed elements, SHA-256.
        inputs: One entry for each opened checkpoint, from `describe_input`.
        warnings: What the user should know.
        left_out: Input files that were not copied, with the reason.
    """
    ids = {id(source): number for number, source in enumerate(checkpoint.sources())}
    alignment = checkpoint.notes.get("alignment") or {}
    # What no operator aligned, such as a trained model, may store a tied tensor twice all the same.
    copies = {e["tensor"] for e in alignment["tied"]} if alignment else set(tied_to(checkpoint))
    changed = sum(entry["changed"] for name, entry in tensors.items() if name not in copies)
    # After several operators the dimensions that the last one could edit are not the whole story.
    eligible = alignment.get("eligible_dimensions") if _is_one_step(checkpoint) else None
    gone = [n for n in _subject(checkpoint) if n not in checkpoint]
    return {
        "schema": SCHEMA,
        "tool": {"name": "weightsurgery", "version": __version__},
        "recipe": recipe(checkpoint, ids),
        "inputs": list(inputs),
        "outputs": outputs,
        "tensors": dict(tensors),
        "dropped": gone,
        "changed_dimensions": changed,
        "eligible_dimensions": eligible,
        "effective_share": changed / eligible if eligible else None,
        "changed_by": _grouped(tensors, copies),
        "alignment": checkpoint.notes.get("alignment"),
        "report": {n: note for n, note in checkpoint.notes.items() if n != "alignment"},
        "left_out": [{"file": _text(name), "reason": reason} for name, reason in left_out],
        "warnings": list(warnings),
    }


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, once it is complete, with its own SHA-256: that of the file without that line.

    It tells damage. Whoever can write the record can seal it again; against that it is signed.

    Args:
        record: All of it; a seal it may have is taken anew.
    """
    bare = {name: value for name, value in record.items() if name != SEAL}
    return {**bare, SEAL: hashlib.sha256(dump(bare)).hexdigest()}


def record_of_data(
    operator: str,
    *,
    settings: Mapping[str, Any],
    inputs: Sequence[str],
    outputs: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Any],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The record of a file that holds no tensors, made from such files.

    Args:
        operator: The command's name.
        settings: Every setting, given or default.
        inputs: Paths of the files; their SHA-256 is taken now.
        outputs: As for `make_record`.
        report: What the command noted about its work, under its name.
        warnings: What the user should know.

    Raises:
        StorageError: A file cannot be read.
    """
    files = [InputFile(path) for path in inputs]
    sources = [Checkpoint({}, label=file.path, files=(file.ref(),)) for file in files]
    names = ["data", *(f"data {number}" for number in range(2, len(files) + 1))]
    made = Checkpoint({}, notes=report).made_by(
        Step(operator, settings, dict(zip(names, sources, strict=False)))
    )
    hashes = {file.path: file.sha256() for file in files}
    return make_record(
        made,
        outputs=outputs,
        tensors={},
        inputs=[describe_input(source, hashes) for source in sources],
        warnings=warnings,
        left_out=(),
    )


def changed_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a record would say of the changes in a checkpoint, without saving it; reads all of it.

    Args:
        checkpoint: The result of an operator.

    Returns:
        `changed_dimensions`, and `layer` and `kind` as under the record's `changed_by`.
    """
    alignment = checkpoint.notes.get("alignment") or {"tied": []}
    copies = {entry["tensor"] for entry in alignment["tied"]}
    tensors: dict[str, dict[str, Any]] = {}
    for name, view in checkpoint.items():
        if view.status == "edited" and name not in copies:
            changed = sum(count_different(*view.read_both(i, j)) for i, j in view.blocks())
            tensors[name] = {"status": view.status, "shape": view.shape, "changed": changed}
    total = sum(entry["changed"] for entry in tensors.values())
    return {"changed_dimensions": total, **_grouped(tensors, copies)}


def _grouped(
    tensors: Mapping[str, Mapping[str, Any]], copies: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Dimensions of the edited tensors and how many of them changed, by layer and by kind."""
    found: dict[str, dict[str, Any]] = {"layer": {}, "kind": {}}
    for name, entry in sorted(tensors.items(), key=lambda item: natural_key(item[0])):
        if entry["status"] != "edited" or name in copies:
            continue
        for by, group in (("layer", layer_of(name)), ("kind", kind_of(name))):
            sums = found[by].setdefault(group, {"dimensions": 0, "changed": 0})
            sums["dimensions"] += math.prod(entry["shape"])
            sums["changed"] += entry["changed"]
    return found


def _is_one_step(checkpoint: Checkpoint) -> bool:
    if is_adapter_layout(checkpoint.layout):
        return False
    inputs = checkpoint.step.inputs.values() if checkpoint.step else ()
    return all(given.step is None or given.step.operator == "rename" for given in inputs)


def _subject(checkpoint: Checkpoint) -> Mapping[str, Any]:
    if checkpoint.step is None or is_adapter_layout(checkpoint.layout):
        return {}  # an adapter's tensors are its own
    return checkpoint.step.inputs.get("tuned", {})


def recipe(checkpoint: Checkpoint, ids: Mapping[int, int]) -> dict[str, Any]:
    """The tree of operators that made a checkpoint; leaves are numbers of inputs."""
    if checkpoint.step is None:
        return {"input": ids[id(checkpoint)]}
    return {
        "operator": checkpoint.step.operator,
        "settings": dict(checkpoint.step.settings),
        "inputs": {name: recipe(given, ids) for name, given in checkpoint.step.inputs.items()},
    }


def public_name(checkpoint: Checkpoint) -> str:
    """What to call an input in files that others will read: a hub id, or the last path part."""
    return checkpoint.hub_id or _text(os.path.basename(os.path.abspath(checkpoint.label)))


def _text(name: str) -> str:
    """A file name as text that does not depend on the locale."""
    return shown(os.fsencode(name).decode("utf-8", "backslashreplace"))


def describe_input(source: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    """An opened checkpoint: its name, its files with size and SHA-256 (null if not taken).

    With `key` where one of several state dicts was asked for, and with what its model card says
    where an output's card repeats it.
    """
    return {
        "name": public_name(source),
        **({} if source.key is None else {"key": source.key}),
        "files": [
            {"name": _text(file.name), "size": file.size, "sha256": hashes.get(file.path)}
            for file in (*source.files, *source.side_files)
        ],
        **({"card": dict(source.card)} if source.card else {}),
    }
