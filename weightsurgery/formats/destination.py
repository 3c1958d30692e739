"""Check where an output may go: only models are replaced, and never an input."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence

from weightsurgery.errors import PolicyError, SettingError, StorageError, SurgeryError, shown
from weightsurgery.formats.apart import check_apart, is_within
from weightsurgery.formats.layout import BESIDE, FILE_ENDINGS, RECORD, WEIGHTS, fits
from weightsurgery.formats.place import record_name, recover
from weightsurgery.formats.recorded import read_record


def check_destination(
    out: str, *, is_directory: bool, overwrite: bool, inputs: Sequence[str]
) -> None:
    """Refuse a destination that cannot be written, before work begins.

    Raises:
        SettingError: It is to be a directory, and its name is a file's.
        PolicyError: It exists and may not be replaced, or touches an input.
        StorageError: Its folder does not exist or is not writable.
    """
    if is_directory:
        reason = "the input is a model directory: outputs mirror the input"
        check_folder_name(out, reason, "; only single files make a single .safetensors file")
    target = os.path.abspath(out)
    parent = os.path.dirname(target)
    given = out.rstrip(os.sep) or out  # messages say it as the user does
    folder = os.path.dirname(given) or os.curdir
    if not os.path.isdir(parent):
        reason = "the folder to write to does not exist"
        raise StorageError(reason, file=folder, code="E-OUTPUT-FOLDER")
    if not os.access(parent, os.W_OK | os.X_OK):
        reason = "the folder to write to is not writable"
        raise StorageError(reason, file=folder, code="E-OUTPUT-FOLDER")
    recover(target)
    places = [given]
    if not is_directory:
        beside = record_name(target, is_directory=False)
        places.append(os.path.join(os.path.dirname(given), beside))
    for place in places:
        check_apart(place, inputs)
    for place in places:
        if not os.path.lexists(place):
            continue
        _check_replaceable(place, is_directory=is_directory)
        if not overwrite:
            raise PolicyError(
                "exists already",
                file=place,
                hint="--overwrite (overwrite=True) replaces it",
                code="E-OUTPUT-EXISTS",
            )


def check_folder_name(out: str, reason: str, hint: str = "") -> None:
    """Refuse a weights file's name for an output folder.

    Args:
        out: The name.
        reason: Why it will be a folder.
        hint: Appended to the advice to choose another name.

    Raises:
        SettingError: It is one.
    """
    ending = os.path.splitext(out)[1]
    if ending.lower() in FILE_ENDINGS:
        raise SettingError(
            f"'{shown(out)}' names a file, but {reason}",
            hint=f"give a name without {ending}{hint}",
            code="E-OUTPUT-NAME",
        )


def _check_replaceable(place: str, *, is_directory: bool) -> None:
    """--overwrite replaces a model directory or a file, never a folder of other things."""
    mode = os.lstat(place).st_mode
    if not (stat.S_ISDIR(mode) if is_directory else stat.S_ISREG(mode)):
        wanted = "a directory" if is_directory else "a regular file"
        raise PolicyError(
            f"exists already and is not {wanted}, so it is not replaced",
            file=place,
            hint="choose another output",
            code="E-OUTPUT-FOREIGN",
        )
    for name in _foreign(place) if is_directory else ():
        raise PolicyError(
            f"exists already and contains '{shown(name)}', which is not part of a model",
            file=place,
            hint="choose another output, or remove the directory yourself",
            code="E-OUTPUT-FOREIGN",
        )


def _foreign(place: str) -> Iterator[str]:
    """The entries of a directory that are neither files of a model nor named by its record."""
    for name in os.listdir(place):
        path = os.path.join(place, name)
        if not os.path.isdir(path) or os.path.islink(path):
            known = fits(name, (*WEIGHTS, *BESIDE, RECORD, ".gitattributes"))
            if not known or not os.path.isfile(path):
                yield name
            continue
        recorded = _recorded(place)
        files = [f for folder, _, names in os.walk(path) for f in _below(place, folder, names)]
        yield from (file for file in files or [name] if file not in recorded)


def _below(place: str, folder: str, names: Sequence[str]) -> list[str]:
    return [os.path.relpath(os.path.join(folder, name), place) for name in names]


def _recorded(place: str) -> Collection[str]:
    """The files that a directory's record names; none where it has no record that can be read."""
    try:
        return read_record(os.path.join(place, RECORD)).files.keys()
    except SurgeryError:
        return ()


def check_file_name(out: str) -> None:
    """Refuse a name for a single file of weights that says something else.

    Raises:
        SettingError: It does not end in .safetensors.
    """
    if not out.endswith(".safetensors"):
        raise SettingError(
            f"'{shown(out)}' does not end in .safetensors, but this output is a single file",
            hint="give a name that ends in .safetensors",
            code="E-OUTPUT-NAME",
        )


def check_outputs_apart(outs: Sequence[tuple[str, bool]]) -> None:
    """Refuse several outputs of one run that would overwrite each other.

    Args:
        outs: Path of each, and whether it will be a directory.

    Raises:
        PolicyError: Two are the same file, or one lies in another.
    """
    taken: list[str] = []
    for out, is_directory in outs:
        target = os.path.abspath(out)
        record = os.path.join(os.path.dirname(target), record_name(target, is_directory=False))
        places = [os.path.realpath(p) for p in ([target] if is_directory else [target, record])]
        for place in places:
            if any(is_within(place, other) or is_within(other, place) for other in taken):
                raise PolicyError(
                    "two outputs of this run would lie in the same place",
                    file=out,
                    hint="give each a place of its own",
                    code="E-OUTPUT-OVERLAP",
                )
        taken += places
