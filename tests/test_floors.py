"""The shape of the package: who imports whom, and how long things may get."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "weightsurgery"
FLOORS = {
    **dict.fromkeys(
        (
            "errors",
            "error_codes",
            "error_rules",
            "dtypes",
            "version",
            "buffers",
            "kernels",
            "drift_kernel",
            "rng",
            "low_rank_kernel",
            "score_kernel",
        ),
        0,
    ),
    **dict.fromkeys(
        ("checkpoint", "anatomy", "statistics", "tasks", "ties", "pairs", "coverage"), 1
    ),
    **dict.fromkeys(
        (
            "alignment",
            "architecture",
            "pairing",
            "parts",
            "name_map",
            "quantised",
            "stream",
            "select",
            "registry",
            "formats",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "batching",
            "storage",
            "tokenizer",
            "models",
            "datasets",
            "token_counts",
            "sliced_loss",
            "masks",
            "diagnostics",
        ),
        2,
    ),
    **dict.fromkeys(
        ("adapters", "comparison", "gates", "inspection", "operators", "proof", "report"), 3
    ),
    **dict.fromkeys(("curvature", "training", "evaluation"), 3),
    **dict.fromkeys(("cli", "demo", "__main__"), 4),
}
GENERATOR = {"build.py", "generate.py", "observe.py"}  # of architecture/facts.jsonl; run by hand
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]
EVERY = pytest.mark.parametrize("path", FILES, ids=IDS)
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield f"{node.module}"
            if node.module in ("weightsurgery", "weightsurgery.formats"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(path)]
    return {parts[1] for parts in names if parts[0] == "weightsurgery" and len(parts) > 1}


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == FLOORS.keys()


@EVERY
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert rooms_imported(path) == {"version"}, "the package itself loads nothing heavy"
        return
    higher = {r for r in rooms_imported(path) if FLOORS[r] > FLOORS[room]}
    assert not higher, f"{room} is on floor {FLOORS[room]}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "formats"], ids=str)
def test_formats_know_no_operators(path: Path) -> None:
    assert not rooms_imported(path) & {"operators", "registry", "alignment", "select"}


@EVERY
def test_outer_libraries_stay_in_their_rooms(path: Path) -> None:
    if path.name in GENERATOR and room_of(path) == "architecture":
        return
    allowed = {
        "click": {"cli"},
        "numba": {"kernels", "drift_kernel", "score_kernel"},
        "rich": {"report", "cli"},
        "huggingface_hub": {"formats"},
        "safetensors": {"formats"},
        "torch": {
            "adapters",
            "batching",
            "models",
            "sliced_loss",
            "datasets",
            "curvature",
            "training",
            "evaluation",
            "demo",
        },
        "transformers": {"batching", "models", "tokenizer", "training", "evaluation", "demo"},
        "tokenizers": {"token_counts"},
        "wordfreq": {"token_counts"},
        "matplotlib": {"report"},
        "pyarrow": {"datasets"},
        "scipy": {"evaluation"},
        "peft": {"training"},
        "pickle": set(),
        "yaml": {"formats"},
    }
    used = {name.split(".")[0] for name in imports_of(path)}
    known = {name for name, rooms in allowed.items() if room_of(path) not in rooms}
    assert not used & known
    others = used - allowed.keys() - {"weightsurgery", "numpy", "ml_dtypes", "tomli"}
    assert others <= sys.stdlib_module_names


@EVERY
def test_nothing_imports_the_generator_of_facts(path: Path) -> None:
    generator = {f"weightsurgery.architecture.{Path(name).stem}" for name in GENERATOR}
    assert path.name in GENERATOR or not generator & set(imports_of(path))


@EVERY
def test_functions_are_short(path: Path) -> None:
    """Lines from `def` to the end, without the docstring."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = node.body[0] if ast.get_docstring(node) else None
            documented = (text.end_lineno or 0) - text.lineno + 1 if text else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - documented
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


@EVERY
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{lines} lines"
