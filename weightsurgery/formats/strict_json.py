"""JSON from strangers: no duplicate keys, no surprises of encoding or depth.

NaN and infinity are not valid JSON, and are refused in headers, indexes and records. Python writes
them, and transformers reads them, so `parse_config` accepts them in a model's configuration files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Literal

from weightsurgery.errors import FormatError, shown
from weightsurgery.formats.json_cost import MEMORY, allowed_cost, collector_paused, parsing_cost
from weightsurgery.formats.placeholders import refuse_placeholder

MAX_DEPTH = 128  # levels of nesting; the safetensors library's parser has the same limit
_SPACE = b" \t\r\n"  # what JSON takes for it
MAX_DIGITS = 400  # of an integer; Python itself refuses to print one of more than 4,300


class _RuleError(ValueError):
    """A rule that `json` itself does not have was broken."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RuleError("E-JSON-DUPLICATE", f"key '{shown(key)}' occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise _RuleError("E-JSON-NUMBER", f"{text} is not JSON")


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise _RuleError("E-JSON-NUMBER", f"an integer of {len(text):,} digits")
    # int("-0") is 0, so an offset of -0 would pass; to other parsers it is a float.
    return -0.0 if text == "-0" else int(text)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 would be written back as Infinity
        raise _RuleError("E-JSON-NUMBER", f"{shown(text)} is out of range")
    return number


def _check_values(value: Any, *, surrogates: bool) -> None:
    """Refuse nesting that is too deep and, where some text escapes one, half a surrogate pair."""
    level: list[Any] = [[value]]
    depth = 0
    while level:
        if depth > MAX_DEPTH:
            raise RecursionError
        if surrogates:
            for text in _texts(level):
                text.encode()
        children = (v.values() if type(v) is dict else v for v in level)
        level = [v for inner in children for v in inner if type(v) is list or type(v) is dict]
        depth += 1


def _texts(level: list[Any]) -> Iterator[str]:
    for value in level:
        if type(value) is dict:
            yield from value
        for inner in value.values() if type(value) is dict else value:
            if isinstance(inner, str):
                yield inner


def _refuse_bomb(data: bytes, *, file: str, what: str, memory: int) -> None:
    cost, allowed = parsing_cost(data), allowed_cost(len(data), memory)
    if cost > allowed:
        raise FormatError(
            f"{what} would take {cost:,} bytes of memory to parse; the limit is {allowed:,}",
            file=file,
            hint="no real model comes near; the file may be made to exhaust memory",
            code="E-JSON-COST",
        )


def parse(
    data: bytes,
    *,
    file: str,
    what: str = "file",
    memory: int = MEMORY,
    nonfinite: Literal["refuse", "accept"] = "refuse",
) -> Any:
    """Parse UTF-8 JSON strictly.

    Args:
        data: The bytes.
        file: The file they came from, for the message.
        what: What the JSON is, for the message: header, index, config.
        memory: Bytes that parsing may take; what would take more is refused unparsed.
        nonfinite: Whether to accept NaN, Infinity and -Infinity as Python's json does.

    Raises:
        FormatError: The bytes are not UTF-8 or not JSON, a key occurs twice, a string holds half
            a surrogate pair, a number is out of range, the nesting is too deep, or there is more
            of all than any model has.
    """
    refuse = nonfinite == "refuse"
    refuse_placeholder(data, file=file, expected=f"JSON ({what})")
    data = data.rstrip(_SPACE)  # as padding a header may have any number of them
    _refuse_bomb(data, file=file, what=what, memory=memory)
    try:
        # Decode first: json.loads(bytes) would accept UTF-16, UTF-32 and a byte-order mark.
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"{what} is not UTF-8 (byte {error.start})"
        raise FormatError(reason, file=file, code="E-JSON-UTF8") from None
    try:
        with collector_paused():
            value = json.loads(
                text,
                object_pairs_hook=_unique,
                parse_constant=_no_constant if refuse else float,
                parse_int=_integer,
                parse_float=_float if refuse else float,
            )
            # An escaped surrogate: fine in pairs, not UTF-8 alone.
            _check_values(value, surrogates=b"\\ud" in data or b"\\uD" in data)
        return value
    except RecursionError:
        reason = f"{what} is nested too deeply"
        raise FormatError(reason, file=file, code="E-JSON-NESTED") from None
    except UnicodeEncodeError:
        reason = f"{what} escapes half a surrogate pair"
        raise FormatError(reason, file=file, code="E-JSON-SURROGATE") from None
    except ValueError as error:  # JSONDecodeError, _RuleError
        reason = f"{what} is not valid JSON: {shown(error)}"
        raise FormatError(reason, file=file, code=_code_of(error)) from None


def _code_of(error: ValueError) -> str:
    if isinstance(error, _RuleError):
        return error.code
    trailing = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
    return "E-JSON-TRAILING" if trailing else "E-JSON-SYNTAX"


def parse_object(
    data: bytes, *, file: str, what: str = "file", memory: int = MEMORY
) -> dict[str, Any]:
    """Parse UTF-8 JSON strictly; the outermost value must be an object.

    Raises:
        FormatError: As for `parse`, or the value is something else than an object.
    """
    return _object(parse(data, file=file, what=what, memory=memory), file, what)


def parse_config(
    data: bytes, *, file: str, what: str = "config", memory: int = MEMORY
) -> dict[str, Any]:
    """Parse a model's configuration or tokenizer file, which may hold NaN and infinity.

    `"time_step_limit": [0.0, Infinity]` is in the config.json of every Mamba-2 that transformers 4
    wrote. Python's json reads it, and `dump` writes it back in the same words.

    Raises:
        FormatError: As for `parse_object`, but for numbers that are not finite.
    """
    found = parse(data, file=file, what=what, memory=memory, nonfinite="accept")
    return _object(found, file, what)


def _object(value: Any, file: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        reason = f"{what} is a JSON {type(value).__name__}, not an object"
        raise FormatError(reason, file=file, code="E-JSON-OBJECT")
    return value


def dump_line(value: Any) -> bytes:
    """JSON on a line of its own, sorted keys, ASCII."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def dump(value: Any) -> bytes:
    """JSON as the hub's files have it: indent 2, sorted keys, final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
