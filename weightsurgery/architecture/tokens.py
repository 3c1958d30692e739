"""Rows of a vocabulary, paired by the tokens they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from weightsurgery.checkpoint import Checkpoint, FileRef
from weightsurgery.errors import FormatError, shown
from weightsurgery.formats.vocabulary import MAX_BYTES, read_added, read_vocabulary

_READABLE = ("tokenizer.json", "vocab.json", "vocab.txt")
_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "spm.model")

Rows = tuple[int, int, int]  # first row of TUNED, first row of BASE, number of rows


@dataclass(frozen=True)
class Tokens:
    """The vocabularies of BASE and TUNED.

    Attributes:
        base: BASE.
        tuned: TUNED.
    """

    base: Checkpoint
    tuned: Checkpoint

    @property
    def warning(self) -> str:
        """What to warn of, "" if rows of the same number are known to be of the same token."""
        return self._read[2]

    @property
    def differ(self) -> bool:
        """True if both vocabularies were read, and some token has another number in BASE."""
        return self._read[0] is not None

    def pair_rows(self, tuned_rows: int, base_rows: int) -> list[Rows]:
        """The rows that stand for the same token.

        A row whose token BASE lacks, or that has no token, goes with BASE's row of the same
        number, if that row has no token either.

        Args:
            tuned_rows: Number of TUNED's rows.
            base_rows: Number of BASE's.

        Returns:
            Runs of rows, in TUNED's order.
        """
        theirs, ours, _ = self._read
        if theirs is None or ours is None:
            common = min(tuned_rows, base_rows)
            return [(0, 0, common)] if common else []
        numbers: dict[str, int] = {}
        for number, token in theirs.items():
            numbers.setdefault(token, number)
        found: list[list[int]] = []
        for row in range(tuned_rows):
            other = self._other(row, ours, theirs, numbers)
            if other is None or not 0 <= other < base_rows:
                continue
            last = found[-1] if found else [-1, -1, 0]
            if row == last[0] + last[2] and other == last[1] + last[2]:
                last[2] += 1
            else:
                found.append([row, other, 1])
        return [(row, other, count) for row, other, count in found]

    @staticmethod
    def _other(
        row: int, ours: Mapping[int, str], theirs: Mapping[int, str], numbers: Mapping[str, int]
    ) -> int | None:
        """BASE's row for one of TUNED's; the same number where that has the token, or none has."""
        if ours.get(row) == theirs.get(row):
            return row
        other = numbers.get(ours[row]) if row in ours else None
        return row if other is None and row not in theirs else other

    @cached_property
    def _read(self) -> tuple[Mapping[int, str] | None, Mapping[int, str] | None, str]:
        """BASE's token of each number, TUNED's, and a warning.

        (None, None, …) if rows are paired by number.
        """
        sides = (self.base, self.tuned)
        names = (*_READABLE, *_OTHERS)
        both = ([_file(side, (name,)) for side in sides] for name in names)
        alike = _same(next((files for files in both if None not in files), [None, None]))
        try:
            theirs, ours = (read_added(side) for side in sides)
            if alike and theirs == ours:
                return None, None, ""
            files = [_file(side, _READABLE) or _file(side, names) for side in sides]
            if None in files:
                return None, None, ""
            unreadable = [file for file in files if file is not None and file.name not in _READABLE]
            if unreadable and not alike:
                reason = f"'{shown(unreadable[0].name)}' is not readable as a list of tokens"
                return None, None, _unread(reason, files)
            theirs, ours = (
                {**read_vocabulary(side), **added}
                for side, added in zip(sides, (theirs, ours), strict=True)
            )
        except FormatError as error:
            return None, None, f"{error}; vocabulary rows are paired by number"
        if not theirs or not ours:
            return None, None, _unread("one has no list of tokens", files)
        tokens = set(theirs.values())
        if all(
            theirs.get(number) == token or (number not in theirs and token not in tokens)
            for number, token in ours.items()
        ):
            return None, None, ""
        return theirs, ours, ""


def _file(side: Checkpoint, names: tuple[str, ...]) -> FileRef | None:
    files = {file.name: file for file in side.side_files if file.size <= MAX_BYTES}
    return next((files[name] for name in names if name in files), None)


def _same(files: list[FileRef | None]) -> bool:
    """True if two files have the same bytes."""
    one, other = files
    if one is None or other is None or (one.name, one.size) != (other.name, other.size):
        return False
    return one.content() == other.content()


def _unread(reason: str, files: list[FileRef | None]) -> str:
    names = " and ".join(f"'{shown(file.path)}'" for file in files if file is not None)
    return f"cannot compare the tokenizers {names}: {reason}; vocabulary rows are paired by number"
