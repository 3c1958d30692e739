"""Rows of Parquet files and of Hugging Face datasets on disk, read by pyarrow as plain data.

pyarrow is an extra. Nothing in these files is imported or run; what is decoded is checked, and
counted row by row, so that a small file cannot become a large one without a limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from weightsurgery.errors import FormatError, first_few, not_installed, shown
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.strict_json import parse, parse_object

_MOST_ROWS = 50_000_000
_THRIFT = 1 << 26  # bytes and entries of a Parquet file's metadata
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_OLDEST = 15  # before 14.0.1 pyarrow could be made to run code


class Named(int):
    """An integer that stands for a class, as `datasets.ClassLabel` stores it.

    Attributes:
        name: What the file calls the class.
    """

    name: str

    def __new__(cls, number: int, name: str) -> Named:
        """The integer, with a name."""
        made = super().__new__(cls, number)
        made.name = name
        return made


def read_parquet(path: str, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and column to value, of every row of a Parquet file.

    Args:
        path: The file.
        most: Bytes that it may have, and characters of its texts in all.

    Raises:
        StorageError: It cannot be read.
        FormatError: It is not a Parquet file, or too large.
        SettingError: pyarrow is not installed.
    """
    pyarrow = _import_pyarrow()
    from pyarrow import parquet

    data = InputFile(path).read_all(most)
    limits = {"thrift_string_size_limit": _THRIFT, "thrift_container_size_limit": _THRIFT}
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data), **limits)
        declared = sum(
            file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)
        )
    except Exception as error:  # pyarrow raises errors of many kinds at a malformed file
        raise _malformed(path, "a Parquet file", error) from None
    if declared > most:
        raise _large(path, most)
    batches = file.iter_batches(batch_size=1024)
    yield from _rows(path, batches, most, "a Parquet file")


def read_dataset(path: str, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and column to value, of every row of a dataset saved by `save_to_disk`.

    Args:
        path: The directory of one split.
        most: Bytes that each file may have, and characters of all texts together.

    Raises:
        StorageError: A file cannot be read.
        FormatError: The directory is not a dataset, has several splits, or a file is malformed.
        SettingError: pyarrow is not installed.
    """
    files = dataset_files(path)
    pyarrow = _import_pyarrow()
    from pyarrow import ipc

    def batches() -> Iterator[Any]:
        for file in files:
            data = InputFile(file).read_all(most)
            try:
                stream = iter(ipc.open_stream(pyarrow.BufferReader(data)))
            except Exception as error:  # as above
                raise _malformed(file, "an Arrow stream", error) from None
            yield from stream

    yield from _rows(path, batches(), most, "an Arrow stream")


def dataset_files(path: str) -> list[str]:
    """The Arrow files of a Hugging Face dataset's directory, in order.

    Args:
        path: The directory of one split.

    Raises:
        FormatError: It is not a dataset, or has several splits.
    """
    if os.path.exists(os.path.join(path, _SPLITS)):
        splits = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        raise FormatError(
            f"a dataset of several splits: {shown(first_few(splits))}",
            file=path,
            hint="give the directory of one split",
            code="E-DATASET",
        )
    state = os.path.join(path, _STATE)
    if not os.path.exists(state):
        raise FormatError(
            f"a directory without {_STATE}; expected a data file, or a dataset that Hugging Face's "
            "save_to_disk wrote",
            file=path,
            code="E-DATASET",
        )
    given = parse_object(InputFile(state).read_all(1 << 24), file=state, what=_STATE)
    entries = given.get("_data_files")
    names = []
    for entry in entries if isinstance(entries, list) and entries else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        plain = isinstance(name, str) and name == os.path.basename(name) and "\0" not in name
        if not plain or not str(name).endswith(".arrow"):
            raise FormatError(
                f"_data_files names '{shown(name)}'; expected plain names that end in .arrow",
                file=state,
                code="E-DATASET",
            )
        names.append(str(name))
    if given.get("_indices_data_files"):
        reason = "its rows are selected by an index of their own, which is not supported"
        hint = "save it again after flatten_indices()"
        raise FormatError(reason, file=path, hint=hint, code="E-DATASET")
    return [os.path.join(path, name) for name in names]


def repeated(names: Sequence[str]) -> str | None:
    """The first name that occurs twice; None if all differ.

    Args:
        names: Of columns.
    """
    return next((one for i, one in enumerate(names) if one in names[:i]), None)


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise not_installed("pyarrow", "data", "save the data as .jsonl") from None
    if int(pyarrow.__version__.partition(".")[0]) < _OLDEST:
        raise not_installed(f"pyarrow>={_OLDEST}", "data", "save the data as .jsonl")
    return pyarrow


def _rows(
    path: str, batches: Iterator[Any], most: int, what: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of checked batches, one at a time, as Python's own values."""
    number, size = 0, 0
    while True:
        try:
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # offsets that lead out of a buffer would crash
        except FormatError:
            raise
        except Exception as error:  # as above
            raise _malformed(path, what, error) from None
        if batch is None:
            return
        twice = repeated(batch.schema.names)
        if twice is not None:
            raise FormatError(
                f"two columns are called '{shown(twice)}'",
                file=path,
                hint="rename one",
                code="E-ROWS-COLUMNS",
            )
        classes = _classes(batch.schema)
        for i in range(batch.num_rows):
            number += 1
            try:
                row = {
                    name: _named(batch.column(j)[i].as_py(), classes.get(name, ()))
                    for j, name in enumerate(batch.schema.names)
                }
            except Exception as error:  # as above
                raise _malformed(path, what, error) from None
            size += _weight(row)
            if size > most or number > _MOST_ROWS:
                raise _large(path, most)
            yield number, row


def _classes(schema: Any) -> dict[str, list[str]]:
    """The names of the classes in each column that has them, as datasets writes into its files."""
    given = (schema.metadata or {}).get(b"huggingface", b"")
    if not given or len(given) > _THRIFT:
        return {}
    try:
        features: Any = parse(given, file="", what="features")
        features = features["info"]["features"]
        return {
            column: one["names"]
            for column, one in features.items()
            if one.get("_type") == "ClassLabel" and all(isinstance(n, str) for n in one["names"])
        }
    except (FormatError, KeyError, TypeError, AttributeError):
        return {}  # it describes the columns, and whoever wrote it may have done so otherwise


def _named(value: Any, names: Sequence[str]) -> Any:
    is_class = type(value) is int and 0 <= value < len(names)
    return Named(value, names[value]) if is_class else value


def _weight(value: Any) -> int:
    """About how many characters a value has."""
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    if isinstance(value, list):
        return sum(map(_weight, value)) + len(value)
    return len(value) if isinstance(value, str | bytes) else 1


def _malformed(path: str, what: str, error: Exception) -> FormatError:
    reason = shown(" ".join(str(error).split()))
    return FormatError(f"cannot be read as {what}: {reason}", file=path, code="E-DATASET")


def _large(path: str, most: int) -> FormatError:
    reason = f"more than {most:,} characters, or {_MOST_ROWS:,} rows"
    return FormatError(reason, file=path, hint="split the file", code="E-FILE-LARGE")
