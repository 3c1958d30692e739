"""How often each token occurs in ordinary text: what E-PUR weighs a row's drift against."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError, MismatchError, not_installed, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.json_cost import MEMORY_OF_MANY
from weightsurgery.formats.strict_json import parse_object
from weightsurgery.formats.vocabulary import tokenizer_files

MAX_BYTES = 1 << 30  # of a file of counts, or of a corpus
WORDFREQ_CORPUS = 1_000_000_000  # words; wordfreq gives shares, E-PUR wants counts (our choice)


@dataclass(frozen=True)
class TokenCounts:
    """Counts by token string, as the tokenizer stores it (`##ing`, `Ġthe`).

    Attributes:
        counts: Token string to count; what is not in it counts as 0.
        source: Where they are from, for the record.
    """

    counts: Mapping[str, float] = field(repr=False)
    source: str

    def to_json(self) -> dict[str, Any]:
        """What a record says of them."""
        text = json.dumps(dict(sorted(self.counts.items())), separators=(",", ":"))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return {"source": self.source, "tokens": len(self.counts), "sha256": digest}


def read_counts(path: str | os.PathLike[str]) -> TokenCounts:
    """Counts from a JSON object {"token": count}, or from lines token<TAB>count.

    Args:
        path: A UTF-8 file.

    Returns:
        The counts, by token as the file has it.

    Raises:
        StorageError: The file cannot be read.
        FormatError: A line or an entry is not a token and a count of 0 or more.
    """
    file = InputFile(os.fspath(path))
    data = file.read_all(MAX_BYTES)
    if data.lstrip()[:1] == b"{":
        found = parse_object(data, file=file.path, what="counts", memory=MEMORY_OF_MANY)
    else:
        found = dict(_lines(data, file.path))
    for token, count in found.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < 1e18:
            raise FormatError(
                f"the count of '{shown(token)}' is {shown(repr(count))}; expected a number, 0 or "
                "more",
                file=file.path,
                code="E-COUNTS",
            )
    if not found:
        raise FormatError("no counts", file=file.path, code="E-FILE-EMPTY")
    return TokenCounts(found, os.path.basename(file.path))


def _lines(data: bytes, path: str) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(f"line {line}: not UTF-8", file=path, code="E-FILE-UTF8") from None
    for number, row in enumerate(text.removesuffix("\n").split("\n"), 1):
        token, tab, count = row.removesuffix("\r").rpartition("\t")
        try:
            if not tab:
                raise ValueError
            yield token, float(count)
        except ValueError:
            raise FormatError(
                f"line {number}: '{shown(row)}'; expected a token, a tab and a count",
                file=path,
                code="E-COUNTS",
            ) from None


def count_corpus(path: str | os.PathLike[str], checkpoint: Checkpoint) -> TokenCounts:
    """Counts in a text file, one paragraph a line, cut by the tokenizer beside a model.

    A paragraph is counted whole, whatever length the tokenizer was saved to cut or fill texts to.

    Args:
        path: A UTF-8 text file.
        checkpoint: A model directory's checkpoint.

    Returns:
        How often each token occurs in it.

    Raises:
        StorageError: The file cannot be read.
        FormatError: It is not UTF-8, or the tokenizer cannot be read.
        MismatchError: There is no tokenizer.json beside the model.
    """
    from tokenizers import Tokenizer

    beside = tokenizer_files(checkpoint).get("tokenizer.json")
    if beside is None:
        raise MismatchError(
            "no tokenizer.json beside the model to cut the corpus with",
            file=checkpoint.label,
            hint="give counts instead",
            code="E-TOKENIZER",
        )
    try:
        tokenizer = Tokenizer.from_str(beside.content().decode("utf-8"))
    except Exception as error:  # the library has one kind for everything
        raise FormatError(
            f"no tokenizer: {shown(error)}", file=beside.path, code="E-TOKENIZER-FILE"
        ) from None
    # tokenizer.json may carry both, as MiniLM's does: they would drop text and count [PAD].
    tokenizer.no_truncation()
    tokenizer.no_padding()
    file = InputFile(os.fspath(path))
    try:
        lines = file.read_all(MAX_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"not UTF-8: byte {error.start:,}", file=file.path, code="E-FILE-UTF8"
        ) from None
    counts: Counter[str] = Counter()
    for start in range(0, len(lines), 1024):
        batch = tokenizer.encode_batch(lines[start : start + 1024], add_special_tokens=False)
        for encoded in batch:
            counts.update(encoded.tokens)
    return TokenCounts(counts, os.path.basename(file.path))


def count_by_wordfreq(tokens: Mapping[int, str], language: str = "en") -> TokenCounts:
    """Counts from the wordfreq package: its share of each token, times a billion words.

    Word pieces inside a word have no share of their own there and count as 0. Where the
    vocabulary marks them (`##ing`), that is what has the mark; where it marks the beginnings of
    words (`Ġthe`, `▁the`), what has none. So a word that begins a text, which GPT-2's tokenizer
    leaves unmarked, counts as 0 in that form too: it looks like a piece.

    Args:
        tokens: Token number to token, from the model's tokenizer.
        language: A language of wordfreq's.

    Returns:
        Share times a billion, by token.

    Raises:
        SettingError: The package is not installed.
    """
    try:
        from wordfreq import word_frequency
    except ImportError:
        raise not_installed("wordfreq", "text", "give counts") from None
    words = _whole_words(tokens.values())
    counts = {t: word_frequency(w, language) * WORDFREQ_CORPUS for t, w in words.items() if w}
    return TokenCounts(counts, f"wordfreq ({language}, times {WORDFREQ_CORPUS:,})")


def _whole_words(tokens: Collection[str]) -> dict[str, str]:
    """The tokens that are whole words or begin one, to the word."""
    # The commoner mark decides: GPT-2 knows `##`, and Ġ is a letter of Maltese.
    begin = [token for token in tokens if token.startswith(("Ġ", "▁"))]
    if len(begin) > sum(token.startswith("##") for token in tokens):
        return {token: token.lstrip("Ġ▁") for token in begin}
    return {token: token for token in tokens if not token.startswith("##")}
