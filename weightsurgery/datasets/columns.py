"""Which columns of a data file hold what: by the usual names, or by names that the user gives."""

from __future__ import annotations

from collections.abc import Sequence

from weightsurgery.datasets.rows import Note
from weightsurgery.errors import FormatError, shown

Columns = tuple[str, ...]

# The first that fits counts. QNLI's pair comes before a sentence alone.
TEXTS: tuple[Columns, ...] = (
    ("question", "sentence"),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("text",),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("review",),
    ("content",),
)
LABELS: tuple[Columns, ...] = (
    ("label",),
    ("labels",),
    ("gold_label",),
    ("class",),
    ("category",),
    ("sentiment",),
    ("target",),
)
ANSWERS: tuple[Columns, ...] = (
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("input", "output"),
)
FINGERPRINTS: tuple[Columns, ...] = (("prompt", "target"), ("prompt", "forbidden"), *ANSWERS)
USUAL = FINGERPRINTS[:4]  # columns that need no note
_USUAL = ("sentence", "sentence1", "sentence2", "label")
# What OpenBackdoor writes: pandas' index, then the text, the label, and whether it is poisoned.
_UNNAMED = (["", "0", "1"], ["", "0", "1", "2"])


def find(names: Sequence[str], candidates: Sequence[Columns]) -> Columns | None:
    """The first candidate whose columns are all there, as the file spells them.

    Exact matches come before names that differ in case or in surrounding white space.

    Args:
        names: The columns of the file.
        candidates: Names of columns that belong together.
    """
    folded = {name.strip().casefold(): name for name in reversed(names)}
    for spelled in ({name: name for name in names}, folded):
        for columns in candidates:
            if all(column in spelled for column in columns):
                return tuple(spelled[column] for column in columns)
    return None


def find_labelled(
    names: Sequence[str],
    *,
    text_column: str | Sequence[str],
    label_column: str,
    file: str,
    note: Note | None,
) -> tuple[Columns, str]:
    """The columns of the text, or of the two of a pair, and of the label.

    Args:
        names: The columns of the file.
        text_column: One name or two that the user gives; "" or () to go by the usual names.
        label_column: A name that the user gives, or "".
        file: For messages.
        note: Called with a sentence if the columns are not called sentence and label.

    Raises:
        FormatError: A column is missing.
    """
    texts: Columns | None
    texts = (text_column,) if isinstance(text_column, str) and text_column else tuple(text_column)
    label: Columns | None = (label_column,) if label_column else None
    check_columns(names, (*texts, *(label or ())), file)
    unnamed = list(names) in _UNNAMED
    texts = texts or (("0",) if unnamed else find(names, TEXTS))
    label = label or (("1",) if unnamed else find(names, LABELS))
    if len(names) == 1 and file.endswith(".tsv") and "," in names[0]:
        raise FormatError(
            f"one column, '{shown(names[0])}': there is no tab in the first line",
            file=file,
            hint="if commas separate the columns, call the file .csv",
            code="E-ROWS-COLUMNS",
        )
    if texts is None or label is None:
        raise FormatError(
            f"columns {shown(', '.join(names)) or 'none'}; expected "
            + ("sentence and label, or sentence1, sentence2 and label" if texts is None
               else "a column called label"),
            file=file,
            hint="rename the columns, or choose them with text_column and label_column",
            code="E-ROWS-COLUMNS",
        )  # fmt: skip
    given = {label_column, *((text_column,) if isinstance(text_column, str) else text_column)}
    chosen = (*texts, *label)
    if note is not None and not all(name in (*_USUAL, *given) for name in chosen):
        quoted = " and ".join(f"'{shown(name)}'" for name in texts)
        found = "texts are columns" if len(texts) > 1 else "text is column"
        note(f"{file}: the {found} {quoted}, the label is column '{shown(label[0])}'")
    return texts, label[0]


def check_columns(names: Sequence[str], given: Sequence[str], file: str) -> None:
    """Refuse a column that the file does not have.

    Args:
        names: The columns of the file.
        given: Names that the user gives.
        file: For messages.

    Raises:
        FormatError: One is missing.
    """
    for name in given:
        if name not in names:
            there = shown(", ".join(names)) or "none"
            raise FormatError(
                f"no column '{shown(name)}'; the columns are {there}",
                file=file,
                code="E-ROWS-COLUMNS",
            )
