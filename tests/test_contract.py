"""What every operator promises, checked on every operator there is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

import weightsurgery
import weightsurgery.operators
from tests import cases
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.cli.operator_command import make_command
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.registry import OPERATORS, Operator, Setting, operator
from weightsurgery.stream import Engine
from weightsurgery.token_counts import TokenCounts

DOCS = Path(__file__).parent.parent / "docs" / "how-to"
EVERY = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS.keys())
# What an operator cannot do without, or what makes its seed matter.
NEEDED: dict[str, dict[str, Any]] = {
    "epur": {"counts": TokenCounts({"the": 100.0}, "made up")},
    "purify": {"score": "random"},
}
COPIES = {"convert"}  # with its defaults it edits nothing
EAGER = {"epur", "purify"}  # they read and decide before anything is saved
PARTLY = {"apply-adapter", *COPIES, *EAGER}  # they leave tensors alone
OF_SOME_INPUTS = {"invert", "untie"}  # settings that want a mask, a tied head
SEEDED = [op for op in OPERATORS.values() if "seed" in op.settings]
WITH_NAMES = [op for op in OPERATORS.values() if not op.variadic]  # a starred argument has none
NAMED = pytest.mark.parametrize("op", WITH_NAMES, ids=[op.name for op in WITH_NAMES])
FAMILIES = pytest.mark.parametrize("family", cases.FAMILIES)


def names_of(op: Operator) -> list[str]:
    """What the inputs are called; one where the operator takes any number."""
    return [n.removesuffix("s") if n == op.variadic else n for n in op.inputs]


def subject_of(op: Operator) -> str:
    """The input whose names, shapes and dtypes the result has."""
    return next((n for n in ("tuned", "base") if n in op.inputs), op.inputs[0])


def arrays_for(op: Operator, family: str = "bert") -> dict[str, cases.Arrays]:
    """Arrays for each input: `base`, an adapter of it, or something fine-tuned from it."""
    base = cases.model(family)
    made = {"base": base, "adapter": cases.adapter(base, family)}
    return {n: made.get(n) or cases.finetuned(base, seed=len(n)) for n in names_of(op)}


def inputs_for(op: Operator, family: str = "bert") -> dict[str, Checkpoint]:
    words: dict[str, Any] = cases.vocabulary()
    adapter = {"config": cases.adapter_config(family)}
    return {
        n: from_arrays(a, label=n, **(adapter if n == "adapter" else words))
        for n, a in arrays_for(op, family).items()
    }


def folders_for(op: Operator, path: Path, *, shards: int = 1) -> list[Checkpoint]:
    return [folder_for(path / n, a, shards=shards) for n, a in arrays_for(op).items()]


def folder_for(path: Path, arrays: cases.Arrays, *, shards: int = 1) -> Checkpoint:
    """A model directory with a vocabulary, or an adapter's."""
    if path.name == "adapter":
        return open_checkpoint(cases.write_adapter(path, arrays, cases.adapter_config()))
    cases.write_directory(path, arrays, shards=shards, config=cases.CONFIGS["bert"])
    (path / "vocab.txt").write_text("".join(f"{word}\n" for word in cases.WORDS))
    return open_checkpoint(path)


def apply(op: Operator, *inputs: Checkpoint, **settings: Any) -> Checkpoint:
    return op.function(*inputs, **{**NEEDED.get(op.name, {}), **settings})


def test_there_are_operators() -> None:
    files = {m.name for m in pkgutil.iter_modules(weightsurgery.operators.__path__)}
    homes = {op.function.__module__.rpartition(".")[2] for op in OPERATORS.values()}
    assert homes == files
    assert {"mix", "interpolate"} <= OPERATORS.keys()


@EVERY
@FAMILIES
def test_names_shapes_and_dtypes_are_the_subjects(op: Operator, family: str) -> None:
    inputs = inputs_for(op, family)
    result, subject = apply(op, *inputs.values()), inputs[subject_of(op)]
    promised = {n: (v.shape, v.dtype) for n, v in result.items()}
    assert promised == {n: (v.shape, v.dtype) for n, v in subject.items()}
    found = cases.read(result)
    assert {n: (a.shape, a.dtype) for n, a in found.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays_for(op, family)[subject_of(op)].items()
    }


@EVERY
@FAMILIES
def test_every_family_is_edited_and_its_integers_are_not(op: Operator, family: str) -> None:
    arrays = arrays_for(op, family)
    found = cases.stored(cases.read(apply(op, *inputs_for(op, family).values())))
    subject = cases.stored(arrays[subject_of(op)])
    untouched = {n for n, a in arrays[subject_of(op)].items() if a.dtype.kind in "ib"}
    assert untouched == {"position_ids", "causal_mask"}
    assert {n: found[n] for n in untouched} == {n: subject[n] for n in untouched}
    edited = {n for n in found if found[n] != subject[n]}
    assert bool(edited) == (op.name not in COPIES)
    assert edited <= found.keys() - untouched
    assert edited == found.keys() - untouched or op.name in PARTLY


@EVERY
def test_inputs_are_not_modified(op: Operator, tmp_path: Path) -> None:
    given = folders_for(op, tmp_path, shards=2)
    before = cases.digests(tmp_path)
    shown = [(repr(c), dict(c), dict(c.metadata), dict(c.config)) for c in given]
    save(apply(op, *given), str(tmp_path / "out"))
    after = {n: d for n, d in cases.digests(tmp_path).items() if not n.startswith("out")}
    assert after == before
    assert [(repr(c), dict(c), dict(c.metadata), dict(c.config)) for c in given] == shown


@EVERY
@FAMILIES
def test_edits_leave_the_blocks_they_are_given(op: Operator, family: str) -> None:
    inputs = inputs_for(op, family)
    plain = cases.read(apply(op, *inputs.values()))
    guarded = cases.read(apply(op, *map(cases.frozen, inputs.values())))
    assert cases.stored(guarded) == cases.stored(plain)


@EVERY
def test_nothing_is_read_before_it_is_saved(op: Operator, tmp_path: Path) -> None:
    watched = [cases.counted(checkpoint) for checkpoint in folders_for(op, tmp_path)]
    result = apply(op, *(checkpoint for checkpoint, _ in watched))
    for checkpoint, reads in watched:
        if op.name in EAGER or not checkpoint.keys() & result.keys():  # an adapter's zeros are told
            reads.clear()
    assert [reads for _, reads in watched] == [[] for _ in watched]
    save(result, str(tmp_path / "out"))
    for checkpoint, reads in watched:
        floating = [(n, *span) for n, v in checkpoint.items() for span in v.blocks()]
        if not checkpoint.keys() & result.keys():  # an adapter's tensors
            assert sorted(reads) == sorted(floating)
            continue
        edited = [read for read in floating if result[read[0]].status == "edited"]
        assert bool(edited) == (op.name not in COPIES)
        assert [reads.count(read) for read in edited] == [1] * len(edited)


@EVERY
def test_order_of_the_tensors_does_not_matter(op: Operator, tmp_path: Path) -> None:
    outputs = []
    for order in ("given", "reversed"):
        given = []
        for name, arrays in arrays_for(op).items():
            names = list(arrays) if order == "given" else list(arrays)[::-1]
            given.append(folder_for(tmp_path / order / name, {n: arrays[n] for n in names}))
        save(apply(op, *given), str(tmp_path / f"out-{order}"))
        outputs.append((tmp_path / f"out-{order}" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    assert (tmp_path / f"given/{subject_of(op)}/model.safetensors").read_bytes() != (
        tmp_path / f"reversed/{subject_of(op)}/model.safetensors"
    ).read_bytes()


@EVERY
def test_sharding_does_not_matter(op: Operator, tmp_path: Path) -> None:
    outputs = []
    for shards in cases.SHARDS:
        given = folders_for(op, tmp_path / str(shards), shards=shards)
        out = tmp_path / f"out-{shards}"
        save(apply(op, *given), str(out))
        assert len(list(out.glob("*.safetensors"))) == shards
        outputs.append(cases.stored_in(out))
    assert outputs[0] == outputs[1] == outputs[2]


@EVERY
@pytest.mark.parametrize("block", [1 << 20, 16], ids=["whole", "cut"])
def test_workers_do_not_matter(
    op: Operator, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = folders_for(op, tmp_path, shards=2)
    whole = apply(op, *given)
    save(whole, str(tmp_path / "whole"), engine=Engine(workers=1))
    cases.shrink_blocks(monkeypatch, block)
    for workers in cases.WORKERS:
        engine = Engine(workers=workers)
        out = tmp_path / f"out-{workers}"
        save(apply(op, *given, engine=engine), str(out), engine=engine)
        assert cases.digests(out) == cases.digests(tmp_path / "whole")


@pytest.mark.parametrize("op", SEEDED, ids=[op.name for op in SEEDED])
def test_the_seed_decides(op: Operator) -> None:
    inputs = inputs_for(op).values()
    made = [
        [cases.stored(cases.read(apply(op, *inputs, seed=seed))) for _ in range(2)]
        for seed in cases.SEEDS
    ]
    assert all(first == again for first, again in made)
    bodies = [str(first) for first, _ in made]
    assert len(set(bodies)) == len(cases.SEEDS)


@EVERY
def test_the_result_remembers_how_it_was_made(op: Operator) -> None:
    inputs = inputs_for(op)
    step = apply(op, *inputs.values()).step
    assert step is not None
    assert step.operator == op.name
    assert step.inputs == inputs
    told = {n: getattr(v, "to_json", lambda v=v: v)() for n, v in NEEDED.get(op.name, {}).items()}
    needed = NEEDED.get(op.name, {})
    defaults = {n: d for n, (_, _, d) in op.settings.items() if op.idle(n, needed) is None}
    assert step.settings == {**defaults, **told}


def another_value(kind: Any, default: Any) -> Any:
    """A valid value of a setting that is not its default; None for globs and rules."""
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    if kind is float:
        return 0.25 if default < 1 else 2 * default
    return {bool: not default, int: 5}.get(kind)


@EVERY
def test_the_result_remembers_its_settings(op: Operator) -> None:
    given = {n: another_value(kind, default) for n, (kind, _, default) in op.settings.items()}
    given = {n: v for n, v in given.items() if v is not None and n not in OF_SOME_INPUTS}
    step = apply(op, *inputs_for(op).values(), **given).step
    assert step is not None
    idle = {name for name in given if op.idle(name, given)}
    assert {n: v for n, v in given.items() if n not in idle}.items() <= step.settings.items()
    assert not idle & step.settings.keys()
    assert all(value != op.settings[name][2] for name, value in given.items())


@NAMED
def test_inputs_given_by_name_are_remembered_too(op: Operator) -> None:
    inputs = inputs_for(op)
    result = op.function(**inputs, **NEEDED.get(op.name, {}))
    assert result.step is not None
    assert result.step.inputs == inputs
    assert result.sources() == tuple(inputs.values())


@EVERY
def test_results_compose_without_the_disk(op: Operator) -> None:
    inputs = inputs_for(op)
    once = apply(op, *inputs.values())
    subject = subject_of(op)
    twice = apply(op, *(once if n == subject else c for n, c in inputs.items()))
    in_memory = from_arrays(cases.read(once), **cases.vocabulary())
    again = apply(op, *(in_memory if n == subject else c for n, c in inputs.items()))
    assert cases.stored(cases.read(twice)) == cases.stored(cases.read(again))
    assert set(twice.sources()) == set(inputs.values())


@EVERY
def test_the_documentation_is_there(op: Operator) -> None:
    assert op.summary.endswith(".")
    assert 10 < len(op.summary) < 80
    page = DOCS / f"{op.name}.md"
    assert page.is_file(), f"write {page.relative_to(DOCS.parent.parent)}"
    assert f"wsurg {op.name}" in page.read_text("utf-8")


@EVERY
def test_every_setting_has_help_and_an_option(op: Operator) -> None:
    for name, (_, declaration, default) in op.settings.items():
        assert len(declaration.help) > 10, name
        assert default is not inspect.Parameter.empty or name in NEEDED[op.name], name
    options = {p.name: p for p in make_command(op.name).params}
    for name in op.settings:
        spelled = "map" if name == "name_map" else name.replace("_", "-")
        assert f"--{spelled}" in options[name].opts
        assert getattr(options[name], "help", "")


@pytest.mark.parametrize("name", weightsurgery.__all__)
def test_no_submodule_takes_the_place_of_a_public_name(name: str) -> None:
    for module in pkgutil.walk_packages(weightsurgery.__path__, "weightsurgery."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert not inspect.ismodule(getattr(weightsurgery, name))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_such'"):
        _ = weightsurgery.nothing_such


@EVERY
def test_what_a_setting_counts_with_is_there(op: Operator) -> None:
    declared = {**op.optional, **{name: found[1] for name, found in op.settings.items()}}
    for name, setting in declared.items():
        for other, values in setting.only_with.items():
            assert other != name
            if other in op.optional:
                assert values in ((True,), (False,))
            else:
                assert set(values) <= set(get_args(op.settings[other][0]))


def test_settings_must_be_declared() -> None:
    def undeclared(base: Checkpoint, *, ratio: float = 0.5) -> Checkpoint:
        return base

    with pytest.raises(TypeError, match="a setting needs Annotated"):
        operator(undeclared)
    assert "undeclared" not in OPERATORS
    assert Setting("help only") == Setting("help only", "", "")


def test_inputs_of_arrays_are_copied_when_read() -> None:
    array = np.zeros(3, np.float32)
    view = from_arrays({"w": array})["w"]
    view.read(0, 3)[:] = 1
    assert not array.any()
