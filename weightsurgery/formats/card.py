"""The model card of an output: written anew, with the recipe and the hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import counted
from weightsurgery.formats.front_matter import card_of
from weightsurgery.formats.layout import (
    DIFFUSERS_STEM,
    MODULES,
    PIPELINE,
    is_adapter_layout,
    stem_of,
)
from weightsurgery.formats.record import public_name
from weightsurgery.version import __version__

_BODY = """
# {title}

Made with weightsurgery {version}, by `wsurg {operator}`, from:

{sources}

{steps}{numbers}

Settings:

```json
{settings}
```

## Files

| file | SHA-256 |
|---|---|
{files}

`wsurg-record.json` beside this card tells what was done to each tensor,
and every step with its settings.
"""
_SUBJECTS = ("tuned", "model", "checkpoint")  # what operators call the input that is edited


def make_card(checkpoint: Checkpoint, record: Mapping[str, Any]) -> bytes:
    """A README.md in the hub's format: front matter, recipe, hashes."""
    from huggingface_hub.repocard_data import (
        ModelCardData,
    )  # the package itself loads a network stack

    sources = checkpoint.sources()
    operator = checkpoint.step.operator if checkpoint.step else "copy"
    data = ModelCardData(
        library_name=_library(checkpoint),
        tags=["weightsurgery", operator],
        **_bases(checkpoint),
        **card_of(cards_of(checkpoint)),
    )
    settings = checkpoint.step.settings if checkpoint.step else {}
    body = _BODY.format(
        title=f"{public_name(_subject(checkpoint))}, after {operator}",
        version=__version__,
        operator=operator,
        sources="\n".join(f"- `{public_name(source)}`" for source in sources),
        steps=_steps(checkpoint),
        numbers=_numbers(checkpoint, record),
        settings=json.dumps(settings, indent=2, sort_keys=True),
        files="\n".join(
            f"| {name} | {entry['sha256'] or 'not taken'} |"
            for name, entry in record["outputs"].items()
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}\n".encode()


def cards_of(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """What the card of each input says, by its name, the edited model first."""
    sources = dict.fromkeys([_subject(checkpoint), *checkpoint.sources()])
    return {public_name(source): source.card for source in sources}


def _bases(checkpoint: Checkpoint) -> dict[str, Any]:
    """`base_model` as the hub understands it, and what the output is to it.

    Models of the hub are named, an adapter names only its own base. Else it is what the edited
    model's card says.
    """
    stated = _subject(checkpoint).card
    if is_adapter_layout(checkpoint.layout):
        base = (checkpoint.step.inputs if checkpoint.step else {}).get("base")
        named = [one.hub_id for one in (base.sources() if base is not None else ())]
        return _named_bases(named, "adapter")
    named = [source.hub_id for source in checkpoint.sources()]
    if not any(named):
        kept = {key: stated[key] for key in ("base_model", "base_model_relation") if key in stated}
        if kept.get("base_model_relation") == "adapter":  # whole weights are not one
            del kept["base_model_relation"]
        return kept
    return _named_bases(named, "merge" if sum(map(bool, named)) > 1 else "")


def _named_bases(hub_ids: list[str], relation: str) -> dict[str, Any]:
    names = [name.partition("@")[0] for name in hub_ids if name]
    return {
        **({"base_model": names} if names else {}),
        **({"base_model_relation": relation} if names and relation else {}),
    }


def _library(checkpoint: Checkpoint) -> str:
    """The library that loads the output."""
    if is_adapter_layout(checkpoint.layout):
        return "peft"
    beside = {file.name for file in checkpoint.side_files}
    if PIPELINE in beside or stem_of(checkpoint.layout.values()) == DIFFUSERS_STEM:
        return "diffusers"
    return "sentence-transformers" if MODULES in beside else "transformers"


def _steps(checkpoint: Checkpoint) -> str:
    """What was done, in order, where it was more than one thing."""
    found: dict[int, str] = {}
    _add_steps(checkpoint, found)
    names = [f"`{name}`" for name in found.values() if name != "rename"]
    return f"Step by step: {', '.join(names)}.\n\n" if len(names) > 1 else ""


def _add_steps(checkpoint: Checkpoint, found: dict[int, str]) -> None:
    """Add each operator that made it once, those that made its inputs first."""
    if checkpoint.step is not None and id(checkpoint) not in found:
        for given in checkpoint.step.inputs.values():
            _add_steps(given, found)
        found[id(checkpoint)] = checkpoint.step.operator


def _numbers(checkpoint: Checkpoint, record: Mapping[str, Any]) -> str:
    """How much changed, in a sentence."""
    if is_adapter_layout(checkpoint.layout):
        return f"An adapter of {checkpoint.size:,} parameters."
    share = record["effective_share"]
    ending = f" ({share:.2%} of the eligible ones)." if share is not None else "."
    return f"{counted(record['changed_dimensions'], 'dimension')} changed{ending}"


def _subject(checkpoint: Checkpoint) -> Checkpoint:
    """The opened checkpoint whose names and side files this one has."""
    while checkpoint.step is not None and checkpoint.step.inputs:
        inputs = checkpoint.step.inputs
        named = [inputs[name] for name in _SUBJECTS if name in inputs]
        checkpoint = (named or [*inputs.values()])[0]
    return checkpoint
