"""What lies where a file should be: pointers of Git LFS, and web pages that were saved instead."""

from __future__ import annotations

from weightsurgery.errors import FormatError

# First bytes, in lower case, to: what it is, its code, what to do.
_PAGE = ("an HTML page", "E-FILE-HTML", "download the file again")
PLACEHOLDERS = {
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "E-FILE-LFS",
        "fetch the file itself with `git lfs pull`",
    ),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
LONGEST_LOOK = 100  # bytes in which one tells itself, blanks at the start included
_LONGEST = max(map(len, PLACEHOLDERS))


def refuse_placeholder(data: bytes, *, file: str, expected: str) -> None:
    """Refuse a file that only stands for another, or a page that tells why there is none.

    Args:
        data: The file's bytes, or its first hundred.
        file: The file.
        expected: What it should have been.

    Raises:
        FormatError: It is one of these.
    """
    start = data[:LONGEST_LOOK].lstrip()[:_LONGEST].lower()
    for magic, (found, code, hint) in PLACEHOLDERS.items():
        if start.startswith(magic):
            raise FormatError(
                f"expected {expected}, found {found}", file=file, hint=hint, code=code
            )
