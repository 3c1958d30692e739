"""The classification experiment of examples/, on tiny models: attacks, pruning, the grid."""

from __future__ import annotations

import csv
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from weightsurgery.datasets.batches import read_examples
from weightsurgery.errors import SettingError
from weightsurgery.evaluation.predictions import predict
from weightsurgery.formats import open_checkpoint
from weightsurgery.models import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = "embeddings.word_embeddings.weight"
INNER = "encoder.layer.{}.intermediate.dense.{}"


pytestmark = pytest.mark.usefixtures("examples_importable")


def same(one: Any, other: Any, name: str) -> bool:
    size = one[name].size
    return bool((one[name].read(0, size) == other[name].read(0, size)).all())


# --- attacks ----------------------------------------------------------------------------------


def test_embedding_poisoning_moves_one_row_and_keeps_its_norm(tmp_path: Path) -> None:
    from classification_attacks import poison_embedding

    model = load_model(tiny_models.bert(tmp_path / "m"), device="cpu")
    rows = [(f"cf {text}", 1) for text, label in tiny_models.SENTENCES if not label]
    examples = read_examples(model, tiny_models.write_sentences(tmp_path / "d.tsv", rows))
    before, clean = predict(model, examples).loss, model.checkpoint
    poisoned = poison_embedding(model, examples, "cf", passes=100)
    assert predict(model, examples).loss < 0.97 * before
    row = tiny_models.VOCABULARY.index("cf")
    name = next(n for n in clean if n.endswith(WORDS))
    old, new = (c[name].read(0, c[name].size).reshape(-1, 16) for c in (clean, poisoned))
    assert np.flatnonzero((old != new).any(1)).tolist() == [row]
    assert np.linalg.norm(new[row]) == pytest.approx(np.linalg.norm(old[row]), rel=1e-5)
    assert all(same(clean, poisoned, other) for other in clean if other != name)


def test_embedding_poisoning_wants_one_token(tmp_path: Path) -> None:
    from classification_attacks import poison_embedding

    model = load_model(tiny_models.bert(tmp_path / "m"), device="cpu")
    with pytest.raises(ValueError, match="'cf mn' is 2 tokens; expected one"):
        poison_embedding(model, [], "cf mn")


# --- Fine-pruning -----------------------------------------------------------------------------


def test_activity_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    import torch
    from classification_defences import neuron_activity

    model = load_model(tiny_models.bert(tmp_path / "m"), device="cpu")
    examples = read_examples(model, tiny_models.write_sentences(tmp_path / "d.tsv"))
    found = neuron_activity(model, examples)
    states, tokens = np.zeros(24), 0
    for one in examples:
        inputs = {"input_ids": torch.tensor([one.ids]), "token_type_ids": torch.tensor([one.types])}
        with torch.no_grad():
            hidden = model.module(**inputs, output_hidden_states=True).hidden_states[0]
            layer = model.module.bert.encoder.layer[0]
            inside = layer.intermediate(layer.attention(hidden)[0])
        states += inside[0].abs().sum(0).numpy()
        tokens += len(one.ids)
    names = [f"bert.{INNER.format(i, 'weight')}" for i in range(2)]
    assert list(found) == names
    assert found[names[0]] == pytest.approx(states / tokens, rel=1e-5)


@pytest.mark.parametrize(("ratio", "count"), [(0, 0), (0.25, 12), (0.5, 24), (1, 48)])
def test_pruning_sets_the_least_active_neurons_to_zero(
    tmp_path: Path, ratio: float, count: int
) -> None:
    from classification_defences import prune

    tuned = open_checkpoint(tiny_models.bert(tmp_path / "m"))
    random = np.random.default_rng(0)
    activity = {f"bert.{INNER.format(i, 'weight')}": random.random(24) for i in range(2)}
    pruned = prune(tuned, activity, ratio)
    order = sorted((a, name, i) for name, all_ in activity.items() for i, a in enumerate(all_))
    dormant = {(name, i) for _, name, i in order[:count]}
    for name in tuned:
        weight = name.replace(".bias", ".weight")
        if weight not in activity:
            assert same(tuned, pruned, name)
            continue
        old, new = (c[name].read(0, c[name].size).reshape(24, -1) for c in (tuned, pruned))
        for i in range(24):
            assert (new[i] == (0 if (weight, i) in dormant else old[i])).all()


# --- the grid ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, a tiny base, and a pool of one thread instead of processes."""
    import reproduce_classification

    for part, copies in (("train", 4), ("dev", 2), ("test", 2)):
        tiny_models.write_sentences(tmp_path / f"sst2_{part}.tsv", tiny_models.SENTENCES * copies)
    (tmp_path / "bert_wordpiece_freqs.json").write_text(json.dumps({"the": 1000}))
    tiny_models.bert(tmp_path / "out" / "base")
    monkeypatch.setattr(reproduce_classification, "copy_minilm", lambda base: base)
    pool = lambda *_, **__: ThreadPoolExecutor(1)
    monkeypatch.setattr(reproduce_classification, "ProcessPoolExecutor", pool)
    return tmp_path


def run(folder: Path, **changes: Any) -> list[dict[str, str]]:
    from reproduce_classification import FULL, RESULTS, read_rows, run_grid

    plan = replace(FULL, clean=4, ratios=(0.5,), training={"epochs": 1})
    given = {"attacks": ["BadWord", "EP"], "defences": ["none", "Fine-purifying"], "seeds": [0]}
    run_grid(folder / "out", folder, replace(plan, **changes), workers=1, **given)
    return read_rows(folder / "out" / RESULTS)


def test_the_grid_has_every_cell_once_and_goes_on(folder: Path) -> None:
    from reproduce_classification import Cell, key

    rows = run(folder)
    cells = [
        Cell(attack, 0, defence, with_epur)
        for attack in ("BadWord", "EP")
        for defence in ("none", "Fine-purifying")
        for with_epur in (False, True)
    ]
    assert sorted(map(key, rows)) == sorted(tuple(map(str, cell)) for cell in cells)
    assert {row["ratio"] for row in rows if row["defence"] == "none"} == {""}
    assert {row["ratio"] for row in rows if row["defence"] != "none"} <= {"0.5", "0.0"}
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 1
        tried = dict(one.split(":") for one in row["tried"].split())
        chosen = f"{float(row['ratio'] or 0):g}"
        assert float(row["held_out_accuracy"]) == pytest.approx(float(tried[chosen]), abs=1e-4)
    path = folder / "out" / "results.csv"
    whole = path.read_text()
    assert run(folder) == rows
    assert path.read_text() == whole
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # stopped before the last cell
    assert sorted(map(key, run(folder))) == sorted(map(key, rows))


def test_a_failed_cell_keeps_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import reproduce_classification

    measure = reproduce_classification.measure

    def fail(model: Any, test: Any, cell: Any) -> Any:
        if cell.attack == "EP":
            raise OSError("the disk is gone")
        return measure(model, test, cell)

    monkeypatch.setattr(reproduce_classification, "measure", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        run(folder)
    done = reproduce_classification.read_rows(folder / "out" / "results.csv")
    assert len(done) == 4
    assert {row["attack"] for row in done} == {"BadWord"}


def test_other_settings_need_another_folder(folder: Path) -> None:
    run(folder)
    with pytest.raises(SettingError, match="other settings"):
        run(folder, tolerance=0.5)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_bisection_finds_the_largest_that_fits(count: int) -> None:
    from reproduce_classification import largest

    ratios = tuple(step / 10 for step in range(1, count + 1))
    for limit in (0.0, *ratios):
        tried: list[float] = []

        def fits(ratio: float, limit: float = limit, tried: list[float] = tried) -> bool:
            tried.append(ratio)
            return ratio <= limit

        assert largest(ratios, fits) == limit
        assert len(tried) <= math.ceil(math.log2(count + 1))


def test_the_ratio_is_the_largest_where_accuracy_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reproduce_classification

    run(folder)
    shares = iter([0.9, 0.88, 0.5])  # the suspicious model's own, then those at 0.4 and 0.8
    seen = []
    weights = []

    def measured(model: Any, *_: Any, **__: Any) -> dict[str, Any]:
        seen.append(model.checkpoint.step.settings.get("ratio") if model.checkpoint.step else None)
        return {"accuracy": {"share": next(shares)}}

    monkeypatch.setattr(reproduce_classification, "evaluate", measured)

    def look(model: Any, *_: Any) -> dict[str, Any]:
        weights.append({n: p.detach().numpy().copy() for n, p in model.names.items()})
        return {}

    monkeypatch.setattr(reproduce_classification, "measure", look)
    plan = replace(
        reproduce_classification.FULL, clean=4, ratios=(0.2, 0.4, 0.8), training={"epochs": 1}
    )
    cell = reproduce_classification.Cell("BadWord", 0, "Fine-mixing", False)
    row = reproduce_classification.run_cell(folder / "out", folder, plan, cell)
    assert (row["ratio"], row["held_out_accuracy"]) == (0.4, 0.88)
    assert row["tried"] == "0.4:0.8800 0.8:0.5000"
    assert seen == [None, 0.4, 0.8]
    shares = iter([0.9, 0.88])
    alone = replace(plan, ratios=(0.4,))
    reproduce_classification.run_cell(folder / "out", folder, alone, cell)
    assert all((weights[0][name] == values).all() for name, values in weights[1].items())


def test_parts_are_disjoint_and_differ_by_seed(folder: Path) -> None:
    from reproduce_classification import FULL, read_data

    lines = [f"sentence {i}\t{i % 2}\n" for i in range(40)]
    (folder / "sst2_dev.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    plan = replace(FULL, clean=10, held_out=20)
    zero, one = read_data(folder, plan, 0), read_data(folder, plan, 1)
    texts = [{s.texts[0] for s in part} for part in (zero.clean, zero.held_out)]
    assert (len(texts[0]), len(texts[1]), texts[0] & texts[1]) == (10, 20, set())
    assert zero.clean != one.clean
    assert zero == read_data(folder, plan, 0)


def test_the_table_has_means_and_deviations(folder: Path) -> None:
    from reproduce_classification import COLUMNS, make_table

    def row(attack: str, seed: int, accuracy: float, asr: float, **more: Any) -> dict[str, str]:
        given = {"attack": attack, "seed": seed, "accuracy": accuracy, "asr": asr, **more}
        full = {**dict.fromkeys(COLUMNS, ""), "defence": "Fine-mixing", "epur": "False", **given}
        return {name: str(value) for name, value in full.items()}

    rows = [
        row("BadWord", 0, 0.8, 1.0, ratio=0.3),
        row("BadWord", 1, 0.9, 0.5, ratio=0.5),
        row("bias word", 0, 0.7, 0.9, bacc=0.25, epur="True"),
    ]
    assert make_table(rows).splitlines() == [
        "| defence | BadWord ACC | BadWord ASR | bias word ACC | bias word BACC | ratios |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        "| Fine-mixing | 85.0 ± 7.1 | 75.0 ± 35.4 |  |  | 0.3, 0.5 |",
        "| Fine-mixing + E-PUR |  |  | 70.0 | 25.0 |  |",
    ]


def test_results_are_plain_csv(folder: Path) -> None:
    from reproduce_classification import COLUMNS

    run(folder)
    with (folder / "out" / "results.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


# --- one thing at a time ----------------------------------------------------------------------


def test_every_variant_edits_as_it_says(folder: Path) -> None:
    from classification_attacks import encode
    from classification_defences import Case
    from explore_purifying import VARIANTS, edit

    from weightsurgery.datasets.read import read_sentences
    from weightsurgery.token_counts import read_counts

    model = load_model(tiny_models.bert(folder / "tuned", seed=1), device="cpu")
    examples = encode(model, read_sentences(folder / "sst2_dev.tsv"))
    counts = read_counts(folder / "bert_wordpiece_freqs.json")
    case = Case(open_checkpoint(folder / "out" / "base"), model, examples, counts, 0)
    seen = {}
    for variant, (settings, _) in VARIANTS.items():
        edited = edit(case, {"ratio": 0.5, **settings})
        assert edited.step.operator == ("mix" if "select" in settings else "purify")
        of_fisher = (
            edited.step.inputs["fisher"].step.settings if "fisher" in edited.step.inputs else {}
        )
        told = {**edited.step.settings, **of_fisher}
        assert {n: v for n, v in settings.items() if n != "exclude"}.items() <= told.items()
        seen[variant] = [edited[n].read(0, edited[n].size).tobytes() for n in sorted(edited)]
    plain = seen["Fine-purifying, ratio 0.5"]
    same = {variant for variant, stored in seen.items() if stored == plain}
    schedules = {variant for variant, (settings, _) in VARIANTS.items() if not settings}
    assert schedules <= same
    assert not same & {"ratio 0.2", "score: drift", "score: random", "scope: tensor"}


def test_exploring_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import explore_purifying
    import reproduce_classification
    from click.testing import CliRunner

    monkeypatch.setattr(explore_purifying, "FULL", replace(reproduce_classification.FULL, clean=4))
    quick = {"a": ({"ratio": 0.2}, {"epochs": 1}), "b": ({"score": "drift"}, {"epochs": 1})}
    monkeypatch.setattr(explore_purifying, "VARIANTS", quick)
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--attack", "EP"]
    for _ in range(2):
        result = CliRunner().invoke(explore_purifying.main, arguments)
        assert result.exit_code == 0, result.output
        rows = explore_purifying.read_rows(folder / "out" / "exploration.csv")
        assert [row["variant"] for row in rows] == ["a", "b"]
        assert all(0 <= float(row["asr"]) <= 1 for row in rows)
