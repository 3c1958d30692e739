"""Changes of a model's config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.formats.strict_json import dump, parse_object


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """The same checkpoint with other values in its config.json, if it has one.

    Args:
        checkpoint: A model.
        changes: Key to value, at the outermost level.
    """

    def changed(file: FileRef) -> FileRef:
        def content() -> bytes:
            return dump({**parse_object(file.content(), file=file.path, what="config"), **changes})

        return replace(file, content=content)

    files = (changed(f) if f.name == "config.json" else f for f in checkpoint.side_files)
    config = {**checkpoint.config, **changes} if checkpoint.config else {}
    return replace(checkpoint, side_files=tuple(files), config=config)
