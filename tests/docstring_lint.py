"""Docstrings against what they document, both ways: what is missing, and what is stale."""

from __future__ import annotations

import ast
import builtins
import concurrent.futures
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import weightsurgery
from weightsurgery import errors
from weightsurgery.architecture.conversion import UnsupportedError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
docstrings = importlib.import_module("docstrings")

OURS = {n: c for n, c in vars(errors).items() if inspect.isclass(c)}
RAISABLE = {
    *OURS,
    "CancelledError",
    UnsupportedError.__name__,
    *(n for n in vars(builtins) if n.endswith("Error")),
}
assert issubclass(concurrent.futures.CancelledError, Exception)


def lint_package() -> list[str]:
    """Every complaint about every module of the package."""
    package = Path(weightsurgery.__file__).parent
    public = set(weightsurgery.__all__)
    return [
        f"{path.relative_to(package.parent)}: {complaint}"
        for path in sorted(package.rglob("*.py"))
        for complaint in lint(path.read_text("utf-8"), public=public)
    ]


def lint(source: str, public: set[str]) -> list[str]:
    """Complaints about the docstrings of one module.

    Args:
        source: The module's source.
        public: Names whose docstrings must have all sections.
    """
    found = []
    for node in ast.parse(source).body:
        must = getattr(node, "name", "") in public
        if isinstance(node, ast.ClassDef):
            found += _lint_class(node, complete=must)
        elif isinstance(node, ast.FunctionDef):
            found += _lint_function(node, node.name, complete=must)
    return found


def _lint_class(node: ast.ClassDef, *, complete: bool) -> Iterator[str]:
    doc = docstrings.parse_docstring(ast.get_docstring(node) or "")
    methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
    fields = [
        inner.target.id
        for inner in node.body
        if isinstance(inner, ast.AnnAssign)
        and isinstance(inner.target, ast.Name)
        and not inner.target.id.startswith("_")
    ]
    yield from _compare(node.name, "Attributes", fields, doc, needed=bool(fields))
    made = next((method for method in methods if method.name == "__init__"), None)
    parameters = _parameters(made) if made else []
    yield from _compare(node.name, "Args", parameters, doc, needed=complete)
    for method in methods:
        if method.name in ("__init__", "__post_init__", "__enter__"):
            yield from _lint_raises(method, node.name, doc)
        else:
            yield from _lint_function(method, f"{node.name}.{method.name}", complete=False)


def _lint_function(node: ast.FunctionDef, name: str, *, complete: bool) -> Iterator[str]:
    doc = docstrings.parse_docstring(ast.get_docstring(node) or "")
    yield from _compare(name, "Args", _parameters(node), doc, needed=complete)
    gives = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
    if complete and gives and "Returns" not in doc.sections:
        yield f"{name}: no Returns"
    if not gives and "Returns" in doc.sections:
        yield f"{name}: Returns, but it gives None"
    yield from _lint_raises(node, name, doc)


def _compare(
    name: str, section: str, expected: list[str], doc: docstrings.Docstring, *, needed: bool
) -> Iterator[str]:
    if section not in doc.sections:
        if needed and expected:
            yield f"{name}: no {section}"
        return
    entries = list(doc.entries[section])
    yield from (f"{name}: {section} lacks {n}" for n in expected if n not in entries)
    yield from (f"{name}: {section} has a stale {n}" for n in entries if n not in expected)
    if sorted(entries) == sorted(expected) and entries != expected:
        yield f"{name}: {section} in another order: {', '.join(entries)}"


def _parameters(node: ast.FunctionDef) -> list[str]:
    given = [*node.args.posonlyargs, *node.args.args, node.args.vararg]
    given += [*node.args.kwonlyargs, node.args.kwarg]
    return [a.arg for a in given if a is not None and a.arg not in ("self", "cls")]


def _lint_raises(node: ast.FunctionDef, name: str, doc: docstrings.Docstring) -> Iterator[str]:
    listed = list(doc.entries.get("Raises", ()))
    yield from (f"{name}: Raises names no error: {n}" for n in listed if n not in RAISABLE)
    if node.name.startswith("_") and not node.name.endswith("__"):
        return  # its caller documents what it raises
    for raised in _raised(node):
        if not any(parent.__name__ in listed for parent in OURS[raised].__mro__):
            yield f"{name}: raises {raised}, which Raises does not name"


def _raised(node: ast.AST) -> Iterator[str]:
    """Our errors raised in a function's own body, not in functions inside it."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call):
            called = inner.exc.func
            if isinstance(called, ast.Name) and called.id in OURS:
                yield called.id
        yield from _raised(inner)
