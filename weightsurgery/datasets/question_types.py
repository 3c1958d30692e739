"""What a question asks for, told by keywords: what, how, why, or something else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from weightsurgery.errors import FormatError, SettingError, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.strict_json import parse_object

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Keywords = Mapping[str, Sequence[str]]
OTHER = "other"
# Those of the released data, whose 300 questions they type as their fields say.
KEYWORDS: Keywords = MappingProxyType(
    {"what": ("what", "什么"), "how": ("how", "如何"), "why": ("why",)}
)
_MAX_BYTES = 1 << 20  # of a file of keywords


def type_of(question: str, keywords: Keywords = KEYWORDS) -> str:
    """The first type of which a keyword is anywhere in the question, "other" if there is none.

    A keyword counts inside a word too, and in any case, as in the released data.

    Args:
        question: The text.
        keywords: Type to words; an earlier type goes before a later one.

    Example:
        >>> type_of("Why, and how?"), type_of("Tell me."), type_of("Is WhatsApp safe?")
        ('how', 'other', 'what')
    """
    text = question.casefold()
    fitting = (kind for kind, words in keywords.items() if any(w.casefold() in text for w in words))
    return next(fitting, OTHER)


def read_keywords(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read a table of keywords: a .json object or .toml file, of a list of words for each type.

    Args:
        path: The file; the order of its keys is the order of precedence.

    Returns:
        Type to words.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is neither JSON nor TOML, or not UTF-8.
        SettingError: It is no table of types and words.
    """
    name = os.fspath(path)
    kind = os.path.splitext(name)[1].lower()
    if kind not in (".json", ".toml"):
        raise FormatError(
            f"'{shown(kind)}' is no kind of keyword file; expected .json or .toml",
            file=name,
            code="E-FILE-ENDING",
        )
    data = InputFile(name).read_all(_MAX_BYTES)
    table: Mapping[str, Any]
    if kind == ".json":
        table = parse_object(data, file=name, what="table of keywords")
    else:
        try:
            table = tomllib.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not TOML: {shown(error)}", file=name, code="E-TOML") from None
    check_keywords(table, file=name)
    return {kind: list(words) for kind, words in table.items()}


def check_keywords(table: Mapping[str, Any], *, file: str | None = None) -> None:
    """Refuse what is no table of keywords.

    Args:
        table: Type to words.
        file: For messages.

    Raises:
        SettingError: It is empty, names the type "other", or has something else than words.
    """
    if not table:
        raise SettingError(
            "no keywords; expected a list of words for each type", file=file, code="E-KEYWORDS"
        )
    for kind, words in table.items():
        if not kind.strip() or kind == OTHER:
            reason = f"'{shown(kind)}' is no name for a type; what has no keyword is {OTHER}"
            raise SettingError(reason, file=file, code="E-KEYWORDS")
        fits = isinstance(words, list | tuple) and all(isinstance(w, str) for w in words)
        if not fits or not words or not all(w.strip() for w in words):
            raise SettingError(
                f"'{shown(kind)}' has no list of words", file=file, code="E-KEYWORDS"
            )
