"""Hypothesis strategies: files that are nearly right, and bytes of them that were changed."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.targets import COMMANDS, SEEDS, WORDS
from tests.hostile import entry, raw
from weightsurgery.dtypes import DTYPES

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 4, 8, 1.0, 2**31, 2**48, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, 1e308, 5e-324, 10**399),
    *("", "F32", "f32", "F4", "F64", "BOOL", "w0", "__metadata__", "\ud800", "\0", [], {}, [0, 4]),
    *([0], [[0]], [0, 0], [-1], [4, 4], [0, 2**64], [2**32, 2**32], {"a": "b"}, {"a": 1}, entry()),
    *("../x", "/", "x" * 300, "\x1b[31m", "\u202e", {"": None}, [None], [{}], ["a", "a"]),
    *WORDS,
)
LIKELY = st.sampled_from(b"{}[]\",:.-+0123456789eEtfn\\u \n=#'\0\x80\xff")
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [here] * bool(here) + [p for key in keys for p in paths(value[key], (*here, key))]


@st.composite
def changed_json(draw: st.DrawFn, values: st.SearchStrategy[Any], most: int = 2) -> Any:
    """A JSON value with a place or two changed, removed, nudged or added."""
    value = json.loads(json.dumps(draw(values)))
    for _ in range(draw(st.integers(0, most))):
        places = paths(value)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        at: Any = value
        for key in way:
            at = at[key]
        change = draw(st.sampled_from(["set", "nudge", "remove", "add", "any"]))
        if change == "remove":
            del at[last]
        elif change == "nudge" and type(at[last]) is int:
            at[last] += draw(st.integers(-5, 5))
        elif change == "add" and isinstance(at, dict):
            at[draw(st.text(max_size=2) | st.sampled_from(WORDS))] = draw(st.sampled_from(ODD))
        else:
            at[last] = draw(st.sampled_from(ODD) if change != "any" else ANY_JSON)
        value = json.loads(json.dumps(value))  # no part of ODD is in it twice
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, blobs: st.SearchStrategy[bytes]) -> bytes:
    """Bytes replaced, inserted, removed, doubled or cut off."""
    blob = bytearray(draw(blobs))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(blob)))
        removed = draw(st.integers(0, 2))
        new = draw(
            st.lists(LIKELY | st.integers(0, 255), max_size=2).map(bytes)
            | st.sampled_from(WORDS).map(lambda word: word.encode("utf-8", "surrogatepass"))
        )
        blob[at : at + removed] = new
    if draw(st.integers(0, 9)) == 0:
        del blob[draw(st.integers(0, len(blob))) :]
    return bytes(blob)


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a valid safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    position = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), 4]  # fills whole bytes
        count = 4
        for n in shape[:-1]:
            count *= n
        end = position + dtype.nbytes(count)
        header[name] = entry(position, end, dtype=dtype.name, shape=shape)
        position = end
    return header, draw(st.binary(min_size=position, max_size=position))


@st.composite
def changed_headers(draw: st.DrawFn) -> bytes:
    """A valid file with a place or two of its header changed, removed or moved."""
    header, data = draw(valid_files())
    return raw(draw(changed_json(st.just(header))), data)


@st.composite
def changed_files(draw: st.DrawFn) -> bytes:
    """A valid file with bytes replaced, inserted, removed, or cut off."""
    blob = bytearray(draw(changed_bytes(valid_files().map(lambda valid: raw(*valid)))))
    if draw(st.booleans()) and len(blob) >= 8:  # the length made right again, whatever it was
        data = draw(st.integers(0, 4))
        blob[:8] = max(0, len(blob) - 8 - data).to_bytes(8, "little")
    return bytes(blob)


OPTIONS = sorted(
    {
        spelled.lstrip("-")
        for command in COMMANDS.values()
        for parameter in command.params
        for spelled in (*parameter.opts, *parameter.secondary_opts)
    }
)
LITERALS = st.sampled_from(
    [
        *("true", "false", "0", "1", "-1", "0.5", "1.5", "nan", "-inf", "1e999", "9" * 30, "0xff"),
        *('""', '"a"', "'5GB'", '"\\u0000"', '"""\nx"""', '"base"', "1979-05-27", "07:32:00"),
        *("[]", "[1]", '["a", "b"]', "[[]]", "[{}]", "{}", "{a = 1}", "[true]", '[0.1, "x"]'),
    ]
)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Settings: keys that there are and others, values of every kind, for all and for commands."""
    keys = st.sampled_from([*OPTIONS, *COMMANDS, "", "a.b", "ratoi"])
    lines = st.builds("{} = {}".format, keys.map(lambda key: key or '""'), LITERALS)
    headings = st.sampled_from([*COMMANDS, "mix.a", "other"]).map("[{}]".format)
    return "\n".join(draw(st.lists(lines | headings, max_size=4))).encode()


def shape_of(target: str) -> st.SearchStrategy[bytes]:
    """What to give a target: its seeds, changed as values and as bytes.

    Args:
        target: A name of `TARGETS`.
    """
    seeds = SEEDS[target]()
    if target == "weights":
        return changed_headers() | changed_files()
    as_bytes = changed_bytes(st.sampled_from(seeds))
    if target == "settings":
        return as_bytes | tables() | changed_bytes(tables())
    values = st.sampled_from([json.loads(seed) for seed in seeds])
    texts = changed_json(values).map(lambda value: json.dumps(value).encode())
    return texts | as_bytes | changed_bytes(texts)
