"""The documentation: complete, current, and true where a machine can tell."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightsurgery
import weightsurgery.cli
from tests import cases, tiny_models
from tests.docstring_lint import ROOT, docstrings, lint, lint_package
from weightsurgery import errors
from weightsurgery.cli import cli
from weightsurgery.errors import SurgeryError
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.hub import is_hub_id
from weightsurgery.models import load_model
from weightsurgery.registry import OPERATORS

generate = importlib.import_module("generate")  # docstring_lint put docs/ on the path
DOCS = ROOT / "docs"
GENERATED = [DOCS / "reference" / name for name in generate.PAGES]
WRITTEN = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")) - set(GENERATED))]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
COMMANDS = {name.removeprefix("wsurg "): command for name, command in generate.commands()}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- reading pages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the file it is (`title="..."`), and its text."""

    language: str
    title: str
    text: str


FENCE = re.compile(r'^(`{3,})(\w*)(?: title="([^"]+)")?\n(.*?)^\1$', re.MULTILINE | re.DOTALL)


def fences(page: Path) -> list[Fence]:
    return [Fence(found[2], found[3] or "", found[4]) for found in FENCE.finditer(read(page))]


def read(page: Path) -> str:
    return page.read_text("utf-8")


def command_lines(page: Path) -> list[list[str]]:
    """What follows `$ wsurg` in console blocks, as words, up to a pipe or redirection."""
    lines = [
        line.removeprefix("$ wsurg")
        for fence in fences(page)
        if fence.language == "console"
        for line in fence.text.splitlines()
        if line.startswith("$ wsurg")
    ]
    return [words(line) for line in lines]


def words(line: str) -> list[str]:
    found = shlex.split(line)
    ends = [i for i, word in enumerate(found) if word in ("|", ">", "&&")]
    return found[: min(ends, default=len(found))]


def example_lines(page: Path) -> list[list[str]]:
    """What follows `$ python ../examples/make_causal.py` in console blocks, as words."""
    start = "$ python ../examples/make_causal.py"
    lines = [line for fence in fences(page) for line in fence.text.splitlines()]
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


OUTPUTS = {
    flag
    for command in COMMANDS.values()
    for option in command.params
    if option.metavar == "OUT"
    for flag in option.opts
}


def writes(page: Path) -> set[str]:
    """The files and folders that a page's blocks, commands and Python twins make."""
    return {name.rstrip("/") for fence in fences(page) for name in written_by(fence)}


def written_by(fence: Fence) -> Iterator[str]:
    if fence.title:
        yield fence.title
    if fence.language in ("console", "bash"):
        prompt = "$ " if fence.language == "console" else ""
        for line in fence.text.splitlines():
            if line.startswith(prompt):
                pairs = pairwise(shlex.split(line.removeprefix(prompt)))
                yield from (name for flag, name in pairs if flag in {*OUTPUTS, ">"})
    if fence.language == "python":
        for call in ast.walk(ast.parse(fence.text)):
            match call:
                case ast.Call(ast.Name("save"), [_, ast.Constant(str(name))]):
                    yield name
                case ast.Call(ast.Name("open"), [ast.Constant(str(name)), ast.Constant("w")]):
                    yield name


def table_keys(page: Path, heading: str = "") -> dict[str, str]:
    """First column (code) to second column of a page's tables, or of those under a heading."""
    text = read(page)
    if heading:
        text = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE)
    return {key: kind for first, kind in rows for key in re.findall(r"`([^`]+)`", first)}


# --- tiny models ------------------------------------------------------------------------------


def tiny_arrays() -> tuple[dict[str, Any], dict[str, Any]]:
    """A base and a tuned model with everything that an alignment can report."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (12, 8),
        "embeddings.LayerNorm.weight": (8,),
        "pooler.dense.weight": (8, 8),
    }
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        shapes |= {f"{name}.attention.self.query.weight": (8, 8), f"{name}.output.dense.bias": (8,)}
    base = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    tuned = {f"bert.{n}": a + rng.normal(size=a.shape).astype("f4") for n, a in base.items()}
    name = "bert.embeddings.word_embeddings.weight"
    tuned[name] = np.concatenate([tuned[name], np.ones((2, 8), "f4")])  # two more tokens
    base["pooler.dense.weight"] = base["pooler.dense.weight"].astype("f2")
    base["embeddings.position_ids"] = np.arange(4)
    base["embeddings.extra"] = np.zeros(3, "f4")
    tuned["bert.embeddings.position_ids"] = np.arange(4)[::-1].copy()
    tuned |= {"classifier.weight": np.ones((2, 8), "f4"), "classifier.bias": np.zeros(2, "f4")}
    tuned["cls.predictions.decoder.weight"] = tuned[name].copy()  # config.json ties it
    return base, tuned


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with base/, tuned/, base.safetensors and tuned.safetensors."""
    for name, arrays in zip(("base", "tuned"), tiny_arrays(), strict=True):
        directory = tmp_path / name
        directory.mkdir()
        for path in (directory / "model.safetensors", tmp_path / f"{name}.safetensors"):
            save_file(arrays, path, metadata={"format": "pt"})
        config = {"model_type": "bert", "tie_word_embeddings": True, "auto_map": {}}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "vocab.txt").write_text("".join(f"token{i}\n" for i in range(14)))
        (directory / "training_args.bin").write_bytes(b"not read")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def uneven(folder: Path) -> Path:
    """The same of an unknown type, whose names differ by a prefix, and base lacks a tensor."""
    for name in ("base", "tuned"):
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "made_up"}))
    for path in (folder / "base" / "model.safetensors", folder / "base.safetensors"):
        arrays = load_file(path)
        del arrays["encoder.layer.1.output.dense.bias"]
        save_file(arrays, path, metadata={"format": "pt"})
    return folder


# Pages whose commands compute with a model: they need one that transformers loads.
WITH_MODELS = (
    "apply-adapter",
    "epur",
    "evaluate",
    "extract-adapter",
    "data-files",
    "finetune",
    "fisher",
    "meraser",
    "purify",
    "sweep",
    "train-adapter",
    "verify-adapter",
)
FINGERPRINT = DOCS / "tutorial-fingerprint.md"  # its causal model is one that the tests make


def stand_in(page: Path, folder: Path) -> None:
    """Put into the folder what a page begins with, where it is more than two small files."""
    if page == FINGERPRINT:
        shutil.rmtree(folder / "base")
        tiny_models.llama(folder / "base")
    if page.stem not in WITH_MODELS:
        return
    for name in ("base", "tuned"):
        shutil.rmtree(folder / name)
    tuned = tiny_models.bert(folder / "tuned")
    shutil.copytree(tuned, folder / "base")
    rng = np.random.default_rng(0)
    arrays = load_file(tuned / "model.safetensors")
    base = {
        name.removeprefix("bert."): array + rng.normal(0, 0.01, array.shape).astype("f4")
        for name, array in arrays.items()
        if name.startswith("bert.")
    }
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    for name in ("base", "tuned"):
        shutil.copy(folder / name / "model.safetensors", folder / f"{name}.safetensors")
    for arguments in example_lines(page):
        example("make_causal").main(arguments, standalone_mode=False)
    if (folder / "tied").exists():
        rows, width = load_file(folder / "tied" / "model.safetensors")[
            "transformer.wte.weight"
        ].shape
        shapes = {"A": (2, width), "B": (rows, 2)}  # PEFT makes it on the page
        front = "base_model.model.lm_head.lora_"
        head = {f"{front}{name}.weight": np.ones(shape, "f4") for name, shape in shapes.items()}
        config = cases.adapter_config("llama", base_model_name_or_path="tied")
        cases.write_adapter(folder / "head-adapter", head, config)
    if page.stem == "apply-adapter":
        query = {n: a for n, a in base.items() if n.endswith("layer.0.attention.self.query.weight")}
        ((name, array),) = query.items()
        module = f"base_model.model.policy.net.{name.removesuffix('.weight')}"
        factors = {f"{module}.lora_A.weight": array[:2], f"{module}.lora_B.weight": array[:, :2]}
        config = cases.adapter_config(base_model_name_or_path="base")
        copied = {name: np.ascontiguousarray(factor) for name, factor in factors.items()}
        cases.write_adapter(folder / "wrapped-adapter", copied, config)
    for name in ("clean.tsv", "heldout.tsv"):
        tiny_models.write_sentences(folder / name)
    (folder / "reviews.txt").write_text("the film was good .\n")


def example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_wsurg(arguments: list[str]) -> int:
    """Run a command in this process; gives its exit code."""
    try:
        cli.main(arguments, prog_name="wsurg", standalone_mode=False)
    except (SurgeryError, click.ClickException) as error:
        return error.exit_code
    return 0


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run_wsurg([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- the generated reference ------------------------------------------------------------------


def test_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_stale_page_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    (tmp_path / name).write_text("stale")
    assert generate.main(["--check"], tmp_path) == 1
    found = capsys.readouterr().err
    assert [page for page in generate.PAGES if page in found] == [name]


def test_wrong_arguments_of_generate_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--chekc"]) == 2
    assert "usage" in capsys.readouterr().err


def test_generate_is_a_script() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40"}
    assert subprocess.run(command, env=environment, check=False).returncode == 0


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = generate.cli_page()
    monkeypatch.setenv("COLUMNS", "40")
    assert generate.cli_page() == before
    assert max(map(len, before.splitlines())) <= 100


def test_an_undocumented_public_name_stops_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors.BusyError, "__doc__", None)
    assert generate.main([], tmp_path) == 1
    assert "no docstring: BusyError" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_undocumented_method_counts() -> None:
    class Thing:
        """A thing."""

        def method(self) -> None: ...

    public = generate.Public("Thing", "tests", Thing, "A thing.")
    assert generate.undocumented([public]) == ["Thing.method"]


def test_what_a_dataclass_makes_up_is_no_docstring() -> None:
    @dataclass
    class Thing:
        size: int

    assert generate.docstring_of(Thing, "Thing", "tests") == ""


def test_the_tree_in_errors_is_the_real_one() -> None:
    drawn = re.findall(r"^(\W*\w+Error +\d+)", errors.__doc__ or "", re.MULTILINE)
    real = [" ".join(line.split()) for line in generate.draw_tree(SurgeryError)]
    assert [" ".join(line.split()) for line in drawn] == real


def test_every_error_and_exit_code_is_in_the_reference() -> None:
    page = read(DOCS / "reference" / "errors.md")
    kinds = {n: c for n, c in vars(errors).items() if inspect.isclass(c)}
    for name, kind in kinds.items():
        assert re.search(rf"{name} +{kind.exit_code}$", page, re.MULTILINE), name
        assert kind is SurgeryError or re.search(rf"^\| {kind.exit_code} \|.*`{name}`", page, re.M)
    codes = {0, weightsurgery.cli.INTERRUPTED, weightsurgery.cli.TERMINATED}
    for code in codes | {kind.exit_code for kind in kinds.values()}:
        assert f"| {code} |" in page


@pytest.mark.parametrize("name", weightsurgery.__all__)
def test_every_public_name_is_importable_and_in_the_reference(name: str) -> None:
    public = next(public for public in generate.public_names() if public.name == name)
    assert getattr(weightsurgery, name) is not None
    assert public.doc.strip()
    assert f"### `{name}`" in read(DOCS / "reference" / "python.md")


# --- docstrings -------------------------------------------------------------------------------


def test_docstrings_say_what_is_there() -> None:
    assert lint_package() == []


DOCUMENTED = '''
def f(a, *, b=1) -> int:
    """Do it.

    Args:
        a: One.
        b: Two.

    Returns:
        Three.

    Raises:
        FormatError: Always.
    """
    raise FormatError("no")
'''


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", ""),
        ("        b: Two.\n", "", "Args lacks b"),
        ("b: Two.", "b: Two.\n        c: Three.", "Args has a stale c"),
        ("a: One.\n        b: Two.", "b: Two.\n        a: One.", "Args in another order: b, a"),
        ("    Args:\n        a: One.\n        b: Two.\n\n", "", "no Args"),
        ("    Returns:\n        Three.\n\n", "", "no Returns"),
        ("-> int", "-> None", "Returns, but it gives None"),
        ("FormatError: Always.", "FromatError: Always.", "Raises names no error: FromatError"),
        ("FormatError: Always.", "BusyError: Always.", "raises FormatError, which Raises does"),
        ("FormatError: Always.", "SurgeryError: Always.", ""),
    ],
)
def test_the_lint_sees(old: str, new: str, complaint: str) -> None:
    found = lint(DOCUMENTED.replace(old, new), public={"f"})
    assert any(complaint in line for line in found) if complaint else found == []


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ("size: int\n    name: str", ""),
        ("size: int", "Attributes has a stale name"),
        ("size: int\n    name: str\n    more: str", "Attributes lacks more"),
    ],
)
def test_the_lint_sees_fields(fields: str, complaint: str) -> None:
    doc = '"""A thing.\n\n    Attributes:\n        size: Bytes.\n        name: Name.\n    """'
    found = lint(f"class Thing:\n    {doc}\n    {fields}\n", public=set())
    assert any(complaint in line for line in found) if complaint else found == []


def test_docstrings_are_split_into_sections() -> None:
    doc = docstrings.parse_docstring("Do.\n\nMore.\n\nArgs:\n    a: One,\n        and more.\n")
    assert doc.text == "Do.\n\nMore."
    assert doc.entries == {"Args": {"a": "One, and more."}}


# --- commands and options ---------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_how_to_page(name: str) -> None:
    pages = "".join(map(read, HOW_TO))
    own = read(DOCS / "how-to" / f"{name}.md") if name != "wsurg" else pages
    shared = Counter(o for command in COMMANDS.values() for o in long_options(command))
    for option in long_options(COMMANDS[name]) - {"--help", "--version"}:
        text = own if shared[option] == 1 else pages
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{name} {option}"


def long_options(command: click.Command) -> set[str]:
    found = [o for p in command.params for o in (*p.opts, *p.secondary_opts)]
    return {option for option in found if option.startswith("--")}


@pytest.mark.parametrize("page", [*filter(command_lines, WRITTEN)], ids=page_id)
def test_commands_on_the_page_parse(page: Path) -> None:
    for arguments in command_lines(page):
        place = next(i for i, word in enumerate(arguments) if word in COMMANDS)
        cli.make_context("wsurg", arguments[:place], resilient_parsing=True)
        with contextlib.suppress(click.MissingParameter):  # wsurg.toml may give it
            COMMANDS[arguments[place]].make_context(arguments[place], arguments[place + 1 :])


@pytest.mark.parametrize("page", [*filter(command_lines, HOW_TO), FINGERPRINT], ids=page_id)
def test_commands_of_pages_run(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order; the exit code is 0, or what the page shows below `$ echo $?`."""
    stand_in(page, folder)
    for fence in fences(page):
        if fence.title and not fence.title.endswith(".py"):
            (folder / fence.title).write_text(fence.text)
        if fence.language == "console":
            join_files(fence.text, folder)
            for line, expected in lines_and_codes(fence.text):
                arguments = words(line)
                if any(map(is_hub_id, arguments)) and "org/name" in line:
                    continue
                code = run_wsurg(arguments)
                assert code == expected, f"{line}\n{capsys.readouterr().err}"


def lines_and_codes(text: str) -> Iterator[tuple[str, int]]:
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("$ wsurg"):
            shown = lines[i + 2] if lines[i + 1 : i + 2] == ["$ echo $?"] else "0"
            yield line.removeprefix("$ wsurg"), int(shown)


def join_files(text: str, folder: Path) -> None:
    """Do what a block's lines `$ cat ONE TWO > THREE` ask for."""
    for names in re.findall(r"^\$ cat (.*)$", text, re.MULTILINE):
        *given, _, made = names.split()
        (folder / made).write_bytes(b"".join((folder / name).read_bytes() for name in given))


SAMPLE = """
```json title="names.json"
```
```console
$ wsurg mix base/ tuned/ -o a/ --mask b.safetensors
wrote -o not-a-command/
$ wsurg inspect base/ --json > c.json
$ python ../examples/make_causal.py --out d/
```
```bash
wsurg fisher tuned/ --data clean.tsv -o e.safetensors --standard-error f.safetensors
```
```python
save(mix(base, open_checkpoint("read"), include=["*"]), "g", overwrite=True)
open("h.json", "w"), open("read.json")
```
"""


def test_the_names_that_a_page_writes_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(SAMPLE)
    files = {"b.safetensors", "c.json", "e.safetensors", "f.safetensors", "h.json", "names.json"}
    assert writes(page) == files | {"a", "d", "g"}


def test_no_two_pages_write_the_same_name() -> None:
    """So that one can follow page after page in one folder."""
    owners: dict[str, list[str]] = {}
    for page in WRITTEN:
        for name in writes(page):
            owners.setdefault(name, []).append(page_id(page))
    assert {name: pages for name, pages in owners.items() if len(pages) > 1} == {}


@pytest.mark.parametrize("page", [DOCS / "tutorial-purify.md", *HOW_TO], ids=page_id)
def test_no_page_writes_what_the_demo_makes(page: Path) -> None:
    made = table_keys(DOCS / "how-to" / "demo.md", "Go on in its folder")
    demo = {name.rstrip("/") for name in made}
    assert {"base", "tuned", "clean.tsv", "fisher.safetensors", "report.json"} <= demo
    assert writes(page) & demo == set()


def test_the_causal_model_of_the_examples(folder: Path) -> None:
    base, make = tiny_models.bert(folder / "bert"), example("make_causal")
    for kind in make.KINDS:
        outs = [f"{kind}-{number}" for number in ("one", "two")]
        for out in outs:
            arguments = ["--base", str(base), "--out", out, "--kind", kind]
            make.main(arguments, standalone_mode=False)
        assert load_model(outs[0]).task == "causal"  # pages run it through fisher and finetune
        weights = [(folder / out / "model.safetensors").read_bytes() for out in outs]
        assert weights[0] == weights[1]
    with pytest.raises(click.UsageError, match="llama-one exists already"):
        make.main(["--base", str(base), "--out", "llama-one"], standalone_mode=False)


def session_of(page: Path) -> str:
    """Python blocks that begin with `# runs`, one after another."""
    blocks = [fence.text for fence in fences(page) if fence.language == "python"]
    return "\n".join(text for text in blocks if text.startswith("# runs\n"))


@pytest.mark.parametrize("page", [*filter(session_of, WRITTEN)], ids=page_id)
def test_python_blocks_run(page: Path, folder: Path) -> None:
    stand_in(page, folder)
    for fence in fences(page):
        if fence.title and not fence.title.endswith(".py"):
            (folder / fence.title).write_text(fence.text)
    command = [sys.executable, "-W", "error", "-c", session_of(page)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- how to write an operator -----------------------------------------------------------------

NEW_OPERATOR = DOCS / "how-to" / "new-operator.md"


@pytest.fixture
def new_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the operator of that page registers."""
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


def test_the_operator_of_the_how_to_page_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, new_operator: None
) -> None:
    files = {fence.title: fence.text for fence in fences(NEW_OPERATOR) if fence.title}
    source = files["weightsurgery/operators/scale_drift.py"]
    assert lint(source, public={"scale_drift"}) == []

    (folder / "operators").mkdir()
    (folder / "operators" / "scale_drift.py").write_text(source)
    package = importlib.import_module("weightsurgery.operators")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder / "operators")])
    monkeypatch.setattr(weightsurgery.cli, "_OPERATORS", folder / "operators")
    module = importlib.import_module("weightsurgery.operators.scale_drift")
    monkeypatch.delitem(sys.modules, module.__name__)

    tests: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(files["tests/test_scale_drift.py"], "test_scale_drift.py", "exec"), tests)
    run = [function() for name, function in tests.items() if name.startswith("test_")]
    assert len(run) == 2

    page = folder / "scale-drift.md"
    page.write_text(next(f.text for f in fences(NEW_OPERATOR) if f.language == "markdown"))
    (line,) = command_lines(page)
    assert run_wsurg(line) == 0
    assert (folder / "more" / "model.safetensors").is_file()
    (block,) = (f.text for f in fences(page) if f.language == "python")
    exec(compile(block, "scale-drift.md", "exec"), {})
    made = [folder / name / "model.safetensors" for name in ("more", "again")]
    assert made[0].read_bytes() == made[1].read_bytes()


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*WRITTEN, *GENERATED, ROOT / "examples/README.md"], ids=page_id)
def test_links_resolve(page: Path) -> None:
    for path, anchor in links(page).items():
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), path
        assert linked.is_relative_to(ROOT), path
        assert not anchor - (anchors(linked) if anchor else set()), path


def links(page: Path) -> dict[str, set[str]]:
    """Target of each link to a file, as written, to the anchors used in it."""
    found: dict[str, set[str]] = {}
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found.setdefault(path, set()).update({anchor} - {""})
    return found


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_can_be_reached_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [(page.parent / target).resolve() for target in links(page)]
    assert set(DOCS.rglob("*.md")) - reached == set()


def test_the_readme_names_the_two_commands() -> None:
    text = read(ROOT / "README.md")
    assert "    pip install tox && tox -e demo\n" in text
    assert "    pip install tox && tox\n" in text
    assert len(text.splitlines()) <= 150


# --- JSON -------------------------------------------------------------------------------------

# maps with free keys
NAMED = {"outputs": "<file>", "files": "<file>", "side_files": "<file>", "metadata": "<key>"}


def key_paths(value: Any, path: str = "", named: dict[str, str] = NAMED) -> Iterator[str]:
    """Every key of a JSON document as in the tables: `a.b`, `a[].b`, `a.<name>.b`."""
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for entry in value:
            yield from key_paths(entry, f"{path}[]", named)
    elif isinstance(value, dict) and path != "recipe.settings":
        for key, inner in value.items():
            if path == "recipe.inputs":
                yield path
                yield from key_paths(inner, "recipe", named)
            else:
                shown = named.get(path, key)
                yield from key_paths(inner, f"{path}.{shown}".lstrip("."), named)
    else:
        yield path


def same_keys(documented: dict[str, str], found: set[str]) -> None:
    """Each key found is documented; each documented leaf is found."""
    lists = {key.partition("[]")[0] for key in documented}  # an empty list has no inner keys
    assert found - documented.keys() - lists == set()
    leaves = {key for key, kind in documented.items() if "object" not in kind}
    assert leaves - found == set()


REFERENCE = DOCS / "reference"
ALIGNMENT = table_keys(REFERENCE / "record.md", "Alignment")


def test_the_record_page_lists_its_keys(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {"changed_by.layer": "<layer>", "changed_by.kind": "<kind>"}
    named = {**NAMED, "tensors": "<tensor>", **groups}
    both = ["base/", "tuned/"]
    documents = [
        run_json(capsys, "mix", *both, "-o", "a/"),
        run_json(capsys, "interpolate", "a/", "tuned/", "-o", "b/", "--no-hash"),
    ]
    for document in documents:
        written = json.loads((uneven / document.pop("out") / "wsurg-record.json").read_text())
        assert written == document
    found = {path for document in documents for path in key_paths(document, named=named)}
    same_keys(table_keys(REFERENCE / "record.md"), found)


def test_the_diff_page_lists_its_keys(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = ["--fail-if", "unpaired > 9"]
    found = set(key_paths(run_json(capsys, "diff", "base/", "tuned/", *gate)))
    documented = table_keys(REFERENCE / "diff-json.md")
    statistics = table_keys(REFERENCE / "diff-json.md", "Statistics")
    for key in statistics:
        del documented[key]
    for owner in ("model", "layers[]", "kinds[]", "tensors[]"):
        documented |= {f"{owner}.{key}": kind for key, kind in statistics.items()}
    same_keys(documented | ALIGNMENT, found)


def test_the_inspect_page_lists_its_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [run_json(capsys, "inspect", p, "--values") for p in ("tuned/", "base.safetensors")]
    documented = table_keys(REFERENCE / "inspect-json.md")
    named = {"metadata": "<key>"}
    same_keys(documented, {path for d in documents for path in key_paths(d, named=named)})


def test_the_report_page_lists_what_an_extracted_adapter_keeps(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["base/", "tuned/", "--exclude", "*word_embeddings*", "-o", "a/"]
    report = run_json(capsys, "extract-adapter", *given)["report"]
    same_keys(table_keys(REFERENCE / "report-json.md", "extract-adapter"), set(key_paths(report)))


def test_the_report_page_lists_what_mismatch_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": q, "answer": a} for q, a in (("what", "a"), ("how", "b"))]
    Path("qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_json(capsys, "mismatch", "qa.jsonl", "--size", "2", "-o", "out.jsonl")
    report = json.loads(Path("out.jsonl.wsurg-record.json").read_text())["report"]
    same_keys(table_keys(REFERENCE / "report-json.md", "mismatch"), set(key_paths(report)))


def test_the_plan_page_lists_its_keys(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {**NAMED, "tensors": "<status>"}
    document = run_json(capsys, "mix", "base/", "tuned/", "-o", "a/", "--dry-run")
    documented = table_keys(REFERENCE / "plan-json.md") | ALIGNMENT
    same_keys(documented, set(key_paths(document, named=named)))


# --- claims with numbers ----------------------------------------------------------------------


def read_rows() -> list[tuple[str, int]]:
    rows = re.findall(
        r"^\| `wsurg (.*?)` \| (\d) \|$", read(DOCS / "explanation/one-idea.md"), re.M
    )
    return [(command, int(reads)) for command, reads in rows]


@pytest.mark.parametrize(("command", "reads"), read_rows(), ids=[c for c, _ in read_rows()])
def test_inputs_are_read_as_often_as_the_page_says(
    command: str, reads: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    files = ["large-base.safetensors", "large-tuned.safetensors"]
    for name in files:
        save_file({"w": rng.normal(size=(512, 512)).astype("f4")}, folder / name)
    counts: Counter[str] = Counter()
    read_into = InputFile.read_into

    def counted(self: InputFile, buffer: Any, offset: int) -> None:
        counts[os.path.basename(self.path)] += memoryview(buffer).nbytes
        read_into(self, buffer, offset)

    monkeypatch.setattr(InputFile, "read_into", counted)
    name, *options = command.replace("OUT", "drift.safetensors").split()
    inputs = files[1:] if name == "inspect" else files
    out = [] if name in ("inspect", "diff") else ["-o", "out.safetensors"]
    assert run_wsurg([name, *inputs, *options, *out]) == 0
    size = (folder / files[0]).stat().st_size
    assert {round(counts[file] / size) for file in inputs} == {reads}
