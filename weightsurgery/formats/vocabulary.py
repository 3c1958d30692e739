"""Token strings of a tokenizer that lies beside a model, read as data, never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.errors import FormatError
from weightsurgery.formats.json_cost import MEMORY_OF_MANY
from weightsurgery.formats.layout import joined
from weightsurgery.formats.strict_json import parse_config

MAX_BYTES = 100_000_000
_DIGITS = 10  # of a token's number
MAX_TOKENS = 1_000_000  # of a vocab.txt; the largest known has 500,000


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, FileRef]:
    """The files beside a tokenizer by their names in its folder.

    A model of several parts may have its tokenizer in a part's folder, as old sentence
    transformers do, or in a folder of its own, as pipelines do. Of several, none is taken.
    """
    files = {side.name: side for side in checkpoint.side_files if side.size <= MAX_BYTES}
    paths = [name.rpartition("/") for name in files]
    folders = {folder for folder, _, name in paths if name in _READERS}
    front = "" if "" in folders or len(folders) != 1 else joined(folders.pop(), "")
    return {n.removeprefix(front): side for n, side in files.items() if n.startswith(front)}


def read_vocabulary(checkpoint: Checkpoint) -> dict[int, str]:
    """Token id to token string, from tokenizer.json, vocab.json or vocab.txt.

    Args:
        checkpoint: A model directory's checkpoint.

    Returns:
        The strings as the tokenizer stores them (`##ing`, `Ġthe`, `▁the`); {} if there is no
        tokenizer of these kinds.

    Raises:
        FormatError: The file is not what its name says.
    """
    files = tokenizer_files(checkpoint)
    for name, read in _READERS.items():
        if name in files:
            return read(files[name])
    return {}


def read_added(checkpoint: Checkpoint) -> dict[int, str]:
    """Token id to token string of tokens added beside the tokenizer's own list of them.

    Args:
        checkpoint: A model directory's checkpoint.

    Returns:
        What added_tokens.json and tokenizer_config.json's added_tokens_decoder hold; {} where
        there is a tokenizer.json, which holds them all.

    Raises:
        FormatError: A file is not what its name says.
    """
    files = tokenizer_files(checkpoint)
    found: dict[int, str] = {}
    if "tokenizer.json" in files:
        return found
    if "added_tokens.json" in files:
        found |= _by_id(_parsed(files["added_tokens.json"], "added tokens"))
    if "tokenizer_config.json" in files:
        side = files["tokenizer_config.json"]
        decoder = parse_config(side.content(), file=side.path).get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            text = _content(entry)
            if number.isdecimal() and len(number) < _DIGITS and text is not None:
                found[int(number)] = text
    return found


def read_special(checkpoint: Checkpoint) -> set[int]:
    """Numbers of the special tokens ([CLS], <s>, …), as the tokenizer's files name them.

    Raises:
        FormatError: A file is not what its name says.
    """
    files = tokenizer_files(checkpoint)
    found: set[int] = set()
    if "tokenizer.json" in files:
        added = _parsed(files["tokenizer.json"], "tokenizer").get("added_tokens")
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict) and entry.get("special") and type(entry.get("id")) is int:
                found.add(entry["id"])
    if "special_tokens_map.json" in files:
        named = _parsed(files["special_tokens_map.json"], "special tokens")
        texts = {_content(v) for value in named.values() for v in _several(value)}
        found |= {i for i, token in read_vocabulary(checkpoint).items() if token in texts}
    return found


def _parsed(side: FileRef, what: str) -> dict[str, Any]:
    return parse_config(side.content(), file=side.path, what=what, memory=MEMORY_OF_MANY)


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _tokenizer_json(side: FileRef) -> dict[int, str]:
    tokenizer = _parsed(side, "tokenizer")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        found = _by_id(vocabulary)
    elif isinstance(vocabulary, list):  # Unigram: [[token, log probability], ...]
        found = {i: str(e[0]) for i, e in enumerate(vocabulary) if isinstance(e, list) and e}
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            found[entry["id"]] = str(entry.get("content"))
    return found


def _vocab_json(side: FileRef) -> dict[int, str]:
    return _by_id(_parsed(side, "vocabulary"))


def _vocab_txt(side: FileRef) -> dict[int, str]:
    # Split at line feeds alone: str.splitlines would cut tokens such as U+0085 in two.
    data = side.content()
    count = data.count(b"\n")
    if count > MAX_TOKENS:
        reason = f"{count:,} lines; expected at most {MAX_TOKENS:,} tokens"
        raise FormatError(reason, file=side.path, code="E-FILE-LARGE")
    lines = data.decode("utf-8", "replace").removesuffix("\n").split("\n")
    return dict(enumerate(line.removesuffix("\r") for line in lines))


def _by_id(vocabulary: Mapping[str, Any]) -> dict[int, str]:
    return {number: token for token, number in vocabulary.items() if type(number) is int}


_READERS: Mapping[str, Callable[[FileRef], dict[int, str]]] = {
    "tokenizer.json": _tokenizer_json,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
}
