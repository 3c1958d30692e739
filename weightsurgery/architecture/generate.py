"""Write `facts.jsonl`, the facts about each architecture, from the installed transformers.

Run by hand whenever the pinned transformers or PEFT changes; it takes about four minutes:

    python -m weightsurgery.architecture.generate [--check] [MODEL_TYPE ...]

The package never imports this module: it needs transformers, PEFT and torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

import peft
import transformers
from peft.utils import transformers_weight_conversion as peft_conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from weightsurgery.architecture.build import WRAPPERS, class_named, default_config, list_classes
from weightsurgery.architecture.observe import Json, class_record, compact, rule_record, tree

FACTS = Path(__file__).with_name("facts.jsonl")


def type_line(model_type: str, names: list[str]) -> tuple[Json, dict[str, str]]:
    """One line of the file.

    Args:
        model_type: The model type.
        names: Its classes, the plain base model first.

    Returns:
        The line, {} if no class can be built; the reason for each class that cannot be built.
    """
    records: dict[str, Json] = {}
    rules: dict[str, Json] = {}
    if model_type in WRAPPERS:
        return {}, {f"{model_type}/{name}": "made of any two models" for name in names}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            record, own = class_record(class_named(name), default_config(model_type, name))
        except Exception as error:  # whatever a default config lacks
            reasons[f"{model_type}/{name}"] = _reason(error)
            continue
        rules |= {compact(rule): rule for rule in own}
        places = list(rules)
        if own:
            record["rules"] = [places.index(compact(rule)) for rule in own]
        records[name] = record
    if not records:
        return {}, reasons
    backbone = _backbone(records)
    for record in records.values():
        _factor(record, backbone)
    line = {"model_type": model_type, "classes": records, "backbone": tree(backbone)}
    return line | ({"rules": list(rules.values())} if rules else {}), reasons


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:100]


def _backbone(records: dict[str, Json]) -> list[str]:
    """The base model's templates, or those of the first class that was built."""
    base = next((r for r in records.values() if r.get("base")), next(iter(records.values())))
    return list(base["parameters"])


def _factor(record: Json, backbone: list[str]) -> None:
    """Reduce a class's templates to how they differ from the backbone's."""
    prefix = f"{record['prefix']}." if "prefix" in record else ""
    own = set(record.pop("parameters"))
    implied = {prefix + name for name in backbone}
    more = own - implied
    less = [name for name in backbone if prefix + name not in own]
    record |= {"parameters": tree(more)} if more else {}
    record |= {"without": tree(less)} if less else {}


def peft_facts() -> Json:
    """What PEFT itself knows of renamed modules, beside the rules of transformers."""
    own = peft_conversion.build_peft_weight_mapping(
        [WeightRenaming("^$", "")], "default", peft.LoraConfig()
    )[:-1]
    patterns = peft_conversion._MODEL_TO_CONVERSION_PATTERN
    targets = peft_conversion._MOE_TARGET_MODULE_MAPPING
    return {
        "rules": [rule_record(rule) for rule in own],
        "targets": targets,
        "fused": peft_conversion._MOE_FUSED_TARGETS,
        "types": {
            kind: pattern
            for kind, pattern in sorted(patterns.items())
            if kind.islower()  # others are classes, which PEFT never looks up
            and pattern in targets
            and get_checkpoint_conversion_mapping(kind) is not None
        },
    }


def header(reasons: dict[str, str]) -> Json:
    """The file's first line."""
    return {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "legacy": [rule_record(rule) for rule in get_checkpoint_conversion_mapping("legacy")],
        "not_built": reasons,
        "peft_renames": peft_facts(),
    }


def generate(only: list[str] | None = None) -> list[str]:
    """The lines of the file.

    Args:
        only: Model types to generate; all if None.

    Returns:
        The header, then a line for each model type, sorted.
    """
    _silence()
    lines: list[str] = []
    reasons: dict[str, str] = {}
    for model_type, names in list_classes().items():
        if only is not None and model_type not in only:
            continue
        line, not_built = type_line(model_type, names)
        reasons |= not_built
        if line:
            lines.append(_serialize(line))
    return [compact(header(reasons)), *lines]


def _serialize(line: Json) -> str:
    """A line that starts with its model type, so that a search for bytes finds it."""
    start = {"model_type": line["model_type"]}
    rest = {key: value for key, value in line.items() if key != "model_type"}
    return f"{compact(start)[:-1]},{compact(rest)[1:]}"


def _silence() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


def merge(stored: list[str], renewed: list[str], types: list[str]) -> list[str]:
    """Replace the lines of some model types.

    Args:
        stored: The file's lines.
        renewed: What `generate` gives for `types`.
        types: The model types to replace; what is no longer built is removed.

    Returns:
        The lines of the whole file.
    """
    first: Json = json.loads(renewed[0])
    before: Json = json.loads(stored[0])["not_built"]
    kept = {key: reason for key, reason in before.items() if key.split("/")[0] not in types}
    first["not_built"] |= kept
    starts = tuple(f'{{"model_type":"{model_type}",' for model_type in types)
    lines = [line for line in stored[1:] if not line.startswith(starts)]
    return [compact(first), *sorted([*lines, *renewed[1:]], key=_type_of)]


def _type_of(line: str) -> str:
    found: str = json.loads(line)["model_type"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or report where it differs from transformers.

    Args:
        arguments: The command line.

    Returns:
        1 if the file differs, else 0.
    """
    parser = argparse.ArgumentParser(description="Write facts.jsonl from transformers.")
    parser.add_argument("--check", action="store_true", help="Compare only; write nothing.")
    parser.add_argument("types", nargs="*", help="Model types; all if none is given.")
    options = parser.parse_args(arguments)
    stored = FACTS.read_text("ascii").splitlines() if options.check or options.types else []
    lines = generate(options.types or None)
    if options.types:
        lines = merge(stored, lines, options.types)
    if not options.check:
        FACTS.write_text("\n".join(lines) + "\n", "ascii")
        return 0
    differ = sorted(set(stored) ^ set(lines))
    sys.stdout.write("".join(f"differs: {line[:60]}\n" for line in differ))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
