"""What lies beside an output's weights, its side files and what its record tells, against TUNED."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from weightsurgery.formats.code_keys import travelling
from weightsurgery.formats.layout import CARD, WEIGHTS, fits
from weightsurgery.formats.record import make_record
from weightsurgery.formats.strict_json import dump
from weightsurgery.proof.findings import Found
from weightsurgery.proof.origin import Origin


def check_side_files(found: Found, origin: Origin) -> None:
    """Note files beside the weights that are not what TUNED's become: a tokenizer, a template.

    Args:
        found: Where to note them.
        origin: What the output should be from; nothing can be said where TUNED is a single file.

    Raises:
        FormatError: A configuration of TUNED is not valid JSON.
        ChangedError: A file changed meanwhile.
    """
    if not (found.recorded.is_directory and origin.tuned.is_directory):
        return
    sides = {side.name: side for side in origin.tuned.side_files}
    for name in sorted(found.recorded.files.keys() | sides.keys()):
        if fits(name, (*WEIGHTS, CARD)):
            continue
        if name not in sides:
            found.wrong(name, None, "not TUNED's", "TUNED has no such file")
        elif name not in found.recorded.files:
            found.wrong(name, None, "missing", "TUNED has it")
        elif name in found.files and not found.tells(name):
            content, _ = travelling(sides[name])
            file = found.files[name]
            if file.size != len(content) or file.read_all(len(content)) != content:
                found.wrong(name, None, "not TUNED's", "TUNED's has other bytes")


# What a record tells of the steps and of what they did; the rest depends on how files are cut.
_STATEMENTS = (
    *("dropped", "changed_dimensions", "eligible_dimensions", "effective_share", "changed_by"),
    *("alignment", "report"),
)


def check_statements(found: Found, origin: Origin) -> None:
    """Note what the record says of the whole otherwise than its tensors and its steps.

    Args:
        found: Where to note it.
        origin: The recorded inputs themselves, for ties and reports may differ with others.
    """
    told, tensors = found.recorded.content, found.recorded.tensors
    copies = {name for name, pair in origin.pairs.items() if pair.is_tied_copy}
    made: Mapping[str, Any]
    made = {"changed_dimensions": sum(e["changed"] for n, e in tensors.items() if n not in copies)}
    if origin.expected is not None:
        made = make_record(
            origin.expected,
            outputs=told["outputs"],
            tensors=tensors,
            inputs=told["inputs"],
            warnings=(),
            left_out=(),
        )
    for key in _STATEMENTS:
        if key in made and (key not in told or dump(made[key]) != dump(told[key])):
            name = os.path.basename(found.recorded.path)
            found.wrong(name, None, "tells otherwise", f"'{key}' is not what the steps give")
