"""Every error code: registered, documented, raised somewhere, and earned by something hostile."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from tests import (
    cases,
    hostile,
    refusals,
    refusals_of_use,
    test_input_files,
    test_model_directory,
    test_safetensors_reader,
)
from tests.refusals import Case, Place
from weightsurgery import errors, open_checkpoint
from weightsurgery.cli import _TerminatedError, cli
from weightsurgery.error_codes import CODES, GENERAL
from weightsurgery.errors import SurgeryError

PACKAGE = Path(errors.__file__).parent
PAGE = PACKAGE.parent / "docs" / "reference" / "errors.md"
CODE = re.compile(r"E-[A-Z0-9]+(?:-[A-Z0-9]+)*")
REFUSALS: dict[str, Case] = {**refusals.REFUSALS, **refusals_of_use.REFUSALS}
KINDS = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}
TABLES = ("error_codes.py", "error_rules.py")
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in TABLES]


# --- the registry -----------------------------------------------------------------------------


@cache
def nodes() -> list[ast.AST]:
    """Everything in the package's source but the registry."""
    return [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))]


def test_every_code_in_the_package_is_registered_and_every_registered_one_is_there() -> None:
    texts = {node.value for node in nodes() if isinstance(node, ast.Constant)}
    assert {t for t in texts if isinstance(t, str) and CODE.fullmatch(t)} == CODES.keys()


def test_a_code_is_written_where_it_is_given_or_passed_on() -> None:
    """No code is put together, so that what is written is all there is."""
    for node in nodes():
        if isinstance(node, ast.keyword) and node.arg == "code":
            parts = [node.value]
            if isinstance(node.value, ast.IfExp):
                parts = [node.value.body, node.value.orelse]
            for part in parts:
                plain = isinstance(part, ast.Constant | ast.Name | ast.Attribute)
                helper = isinstance(part, ast.Call) and ast.unparse(part.func) == "_code_of"
                assert plain or helper, ast.unparse(node)


def test_a_code_is_given_to_errors_of_its_kind_alone() -> None:
    seen = set()
    for node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) in KINDS:
            for given in (k.value for k in node.keywords if k.arg == "code"):
                for part in ast.walk(given):
                    if isinstance(part, ast.Constant) and CODE.fullmatch(str(part.value)):
                        seen.add(part.value)
                        kind = CODES[part.value].kind
                        assert kind is KINDS[ast.unparse(node.func)], ast.unparse(node)
    assert len(seen) > len(CODES) / 2


RULES_ALONE = [
    *sorted((PACKAGE / "proof").glob("*.py")),
    *(
        PACKAGE / "formats" / f"{name}.py"
        for name in ("torch_pickle", "torch_zip", "unpickle", "recorded")
    ),
    PACKAGE / "operators" / "convert.py",
]


@pytest.mark.parametrize("path", RULES_ALONE, ids=lambda path: path.stem)
def test_what_comes_from_strangers_is_refused_by_a_rule(path: Path) -> None:
    """No error of these modules has the code of its kind alone."""
    bare = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in KINDS
        and "code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert bare == []


# What an input or its owner is blamed for; a setting out of range is told by its message alone.
BLAMED = ("FormatError", "MismatchError", "PolicyError", "StorageError")
THE_SYSTEMS = [PACKAGE / "formats" / f"{name}.py" for name in ("place",)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_refusal_of_an_input_has_the_code_of_a_rule(path: Path) -> None:
    """A general code is left to operators that others write, and to what the system says."""
    bare = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in BLAMED
        and "code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert path in THE_SYSTEMS or bare == []
    assert path not in THE_SYSTEMS or all(call.startswith("StorageError(") for call in bare)


def test_every_kind_has_a_code_of_its_own() -> None:
    for kind in KINDS.values():
        if kind is not SurgeryError:
            assert CODES[kind.code].kind is kind
            assert kind("").code == kind.code
    assert {kind.code for kind in KINDS.values()} - {SurgeryError.code} == GENERAL
    assert CODES[SurgeryError.code].exit_code == SurgeryError.exit_code == 1


def test_codes_are_plain_words_that_tell_what_to_do() -> None:
    for code, told in CODES.items():
        assert CODE.fullmatch(code)
        assert told.kind is None or told.exit_code == told.kind.exit_code
        for text in (told.means, told.remedy):
            assert text, code
            assert not set(text) & set("|\n"), code
    assert len({told.means for told in CODES.values()}) == len(CODES)
    groups = [group for group, _ in itertools.groupby(told.group for told in CODES.values())]
    assert len(groups) == len(set(groups))


def test_the_reference_has_every_code() -> None:
    rows = re.findall(r"^\| `(E-[^`]+)` \| (\d+)(?: `(\w+)`)? \| (.+) \| (.+) \|$", page(), re.M)
    expected = [
        (code, str(t.exit_code), t.kind.__name__ if t.kind else "", t.means, t.remedy)
        for code, t in CODES.items()
    ]
    assert rows == expected


def page() -> str:
    return PAGE.read_text("utf-8")


# --- each is earned ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Place(tmp_path, monkeypatch, stack)


def test_there_is_a_refusal_for_every_code() -> None:
    assert REFUSALS.keys() == CODES.keys()
    assert not refusals.REFUSALS.keys() & refusals_of_use.REFUSALS.keys()


def raised(arguments: list[str]) -> SurgeryError | None:
    """The error that a command ends with, if it is one of ours."""
    try:
        cli.main(arguments, prog_name="wsurg", standalone_mode=False)
    except SurgeryError as error:
        return error
    except (click.ClickException, click.Abort, _TerminatedError, ZeroDivisionError):
        return None
    raise AssertionError("not refused")


@pytest.mark.parametrize("code", REFUSALS)
def test_refused_with_its_code(code: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(argument) for argument in REFUSALS[code](place)]
    before = sorted(place.folder.rglob("*"))
    told = CODES[code]
    with hostile.deadline(60):
        error = raised(arguments)
    assert (type(error) if error else None) is told.kind
    assert error is None or error.code == code
    capsys.readouterr()
    with hostile.deadline(60):
        assert cases.wsurg(*arguments) == told.exit_code
    *others, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error[{code}]: ")
    assert line.isprintable()
    assert error is None or line == f"error[{code}]: {error}"
    assert error is None or not any("Traceback" in other for other in others)
    assert sorted(place.folder.rglob("*")) == before


NAMELESS = {"E-HUB", "E-ROWS-FEW", "E-TEXT-LONG"}  # a name that is no file's; rows in memory
NAMELESS |= {code for code, told in CODES.items() if told.kind is None or told.group == "Settings"}


@pytest.mark.parametrize("code", sorted(CODES.keys() - GENERAL - NAMELESS))
def test_a_rule_names_file_or_tensor(code: str, place: Place) -> None:
    error = raised([str(argument) for argument in REFUSALS[code](place)])
    assert error is not None
    assert error.file is not None or error.tensor is not None


def specific(path: Path) -> str:
    """The code with which opening something is refused; one of a rule, not of a kind."""
    with hostile.deadline(), pytest.raises(SurgeryError) as told:
        open_checkpoint(path)
    assert told.value.code not in GENERAL
    assert CODES[told.value.code].kind is type(told.value)
    return told.value.code


BLOBS = [pytest.param(case.values[0], id=case.id) for case in test_safetensors_reader.REFUSED]
BLOBS += [
    pytest.param(content, id=name) for name, (content, _) in test_input_files.OTHER_KINDS.items()
]


@pytest.mark.parametrize("blob", BLOBS)
def test_no_hostile_file_is_refused_without_a_rule(blob: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(blob)
    code = specific(tmp_path / "x.safetensors")
    assert code.startswith(("E-HEADER-", "E-DATA-", "E-JSON-", "E-FILE-"))


FOLDERS = [
    *(pytest.param(case.values[0], id=case.id) for case in test_model_directory.REFUSED),
    *(
        pytest.param({**dict.fromkeys((hostile.INDEX, *hostile.SHARDS)), **files}, id=name)
        for cases_ in (test_model_directory.TWO_ANSWERS, test_model_directory.NO_ANSWER)
        for name, (files, _) in cases_.items()
    ),
]


@pytest.mark.parametrize("files", FOLDERS)
def test_no_hostile_directory_is_refused_without_a_rule(
    files: dict[str, Any], tmp_path: Path
) -> None:
    model = hostile.sharded(tmp_path / "model", files)
    for name, content in files.items():
        if content is None:
            (model / name).unlink()
    specific(model)


NO_FILE = [pytest.param(case.values[0], id=case.id) for case in test_input_files.NO_FILE]


@pytest.mark.parametrize("make", NO_FILE)
def test_what_is_no_file_is_refused_by_a_rule(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.safetensors")
    specific(tmp_path / "x.safetensors")
