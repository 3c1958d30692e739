"""Renaming rules at work: which tensor of the model a stored tensor becomes, or is part of.

The rules are facts about transformers, recorded in facts.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightsurgery.architecture.facts import Rule

CONVERTER = "WeightConverter"
_GROUP = "GroupWeightRename"
_LONGEST = 1000  # characters of a name that rules look at: regular expressions, hostile text
_REFERENCE = re.compile(r"\\(\d+)")


class UnsupportedError(ValueError):
    """An arrangement of stored tensors that cannot be paired."""


@dataclass(frozen=True)
class Loaded:
    """What a stored name becomes.

    Attributes:
        renamed: The name once all renamings are done; what a converter reads goes by this one.
        target: The model's tensor that it becomes, or the first one that it becomes part of.
        converter: The rule that converts it; None for what is only renamed.
        source: Which of the converter's source patterns it matches.
    """

    renamed: str
    target: str
    converter: Rule | None = None
    source: str = ""


class Renamer:
    """The rules of one architecture, applied to the names of one checkpoint.

    Args:
        rules: In the loading library's order.
        names: All names of the checkpoint: some rules count only where another name is present.
    """

    def __init__(self, rules: Sequence[Rule], names: Iterable[str]) -> None:
        self._renamings = [rule for rule in rules if rule.kind != CONVERTER]
        self._converters = [rule for rule in rules if rule.kind == CONVERTER]
        guarded = [rule for rule in self._renamings if rule.kind == _GROUP]
        names = list(names) if guarded else []
        self._active = {id(rule) for rule in guarded if any(_guards(rule, n) for n in names)}

    def load(self, name: str) -> Loaded:
        """What a stored name becomes in the model.

        Args:
            name: As it is stored, wrapper segments removed.
        """
        if len(name) > _LONGEST:
            return Loaded(name, name)
        for rule in self._renamings:
            name, _ = self._apply(rule, name)
        for rule in self._converters:
            target, source = self._apply(rule, name)
            if source:
                return Loaded(name, target, rule, source)
        return Loaded(name, name)

    def _apply(self, rule: Rule, name: str) -> tuple[str, str]:
        """The name after a rule, and the source pattern that matched, "" if none did."""
        prefix, rest = _scoped(rule, name)
        found = rule.pattern.search(rest) if prefix is not None else None
        if found is None:
            return name, ""
        group = found.lastgroup or "g0"  # the alternative that matched: it ends last
        index, inside = int(group[1:]), rule.pattern.groupindex[group]
        if rule.kind == _GROUP:
            if index and id(rule) not in self._active:
                return name, ""
            new = _REFERENCE.sub(lambda m: found[inside + int(m[1])] or "", rule.targets[index])
        elif r"\1" in rule.targets[0]:
            matched = found[inside + 1] or ""
            matched = str(int(matched) + rule.offset) if rule.offset else matched
            new = rule.targets[0].replace(r"\1", matched)
        else:
            new = rule.targets[0]
        return f"{prefix}{rest.replace(found[0], new, 1)}", rule.sources[index]


def _scoped(rule: Rule, name: str) -> tuple[str | None, str]:
    """What a rule leaves alone and what it looks at; None where it does not look at the name."""
    if rule.scope is None:
        return "", name
    scope = f"{rule.scope}." if rule.scope else ""
    base = f"{rule.base}." if rule.base else ""
    for prefix in (base + scope, scope):
        if name.startswith(prefix):
            return prefix, name[len(prefix) :]
    return None, name


def _guards(rule: Rule, name: str) -> bool:
    prefix, rest = _scoped(rule, name)
    found = rule.pattern.search(rest) if prefix is not None and len(name) <= _LONGEST else None
    return found is not None and found.lastgroup == "g0"
