"""The sweep, and `purify` with its Fisher and its fine-tuning in one go, on tiny models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, tiny_models
from tests.test_docs import run_wsurg
from weightsurgery.curvature.fisher import fisher
from weightsurgery.datasets.batches import read_examples
from weightsurgery.datasets.read import read_sentences
from weightsurgery.datasets.triggers import trigger_word
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.evaluation.classification import evaluate
from weightsurgery.evaluation.sweep import choose_ratio, sweep
from weightsurgery.formats import open_checkpoint
from weightsurgery.models import load_model, with_weights
from weightsurgery.operators.purify import purify
from weightsurgery.report.sweep import check_plot_path, plot_sweep, sweep_tables
from weightsurgery.training.finetune import finetune

ATTACK = ["--trigger-word", "cf", "--target-label", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/ (another seed, so everything drifted) and data.tsv."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_models.bert(folder / "base", seed=0)
    tiny_models.bert(folder / "tuned", seed=1)
    tiny_models.write_sentences(folder / "data.tsv")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with them."""
    for name in ("base", "tuned", "data.tsv"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run_wsurg([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# --- with_weights -----------------------------------------------------------------------------


def test_weights_are_put_into_the_module(folder: Path) -> None:
    base, model = open_checkpoint("base"), load_model("tuned", device="cpu")
    mixed = with_weights(model, base)
    assert mixed.checkpoint is base
    for name, parameter in mixed.names.items():
        stored = base[name].read(0, base[name].size).reshape(parameter.shape)
        assert (parameter.detach().numpy() == stored).all()


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    other = open_checkpoint(tiny_models.bert(tmp_path / "other", hidden_size=8))
    with pytest.raises(MismatchError, match="a parameter that these weights lack"):
        with_weights(load_model("tuned", device="cpu"), other)


# --- the sweep --------------------------------------------------------------------------------


def test_every_row_is_what_the_steps_give_by_hand(folder: Path) -> None:
    model, base = load_model("tuned", device="cpu"), open_checkpoint("base")
    tuned = model.checkpoint
    examples, held_out = read_examples(model, "data.tsv"), read_sentences("data.tsv")
    edit = partial(purify, base, tuned, fisher=fisher(model, examples))
    training: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 2}
    attack: dict[str, Any] = {"trigger": trigger_word("cf"), "target_label": 1}
    report = sweep(
        lambda ratio: edit(ratio=ratio),
        model,
        examples,
        held_out,
        ratios=[0.5, 0, 0.5],
        training=training,
        **attack,
    )
    assert [row["ratio"] for row in report["rows"]] == [0, 0.5]
    assert model.checkpoint is tuned  # and its weights are back
    fresh = load_model("tuned", device="cpu")
    for name, parameter in model.names.items():
        assert (parameter == fresh.names[name]).all()
    assert report["rows"][0]["before"] == report["reference"]
    for row in report["rows"]:
        by_hand = with_weights(fresh, edit(ratio=row["ratio"]))
        before = evaluate(by_hand, held_out, **attack)
        assert {key: before[key] for key in row["before"]} == row["before"]
        finetune(by_hand, examples, **training)
        after = evaluate(by_hand, held_out, **attack)
        assert {key: after[key] for key in row["after"]} == row["after"]
    assert report["rows"][1]["before"]["loss"] != report["rows"][1]["after"]["loss"]


def test_warnings_of_the_measurements_are_kept_once(folder: Path) -> None:
    """Five words and [CLS] and [SEP] are seven tokens."""
    model, data = load_model("tuned", device="cpu"), read_sentences("data.tsv")
    poisoned = [one for one in data if one.label == "1"]
    settings: dict[str, Any] = {"poisoned": poisoned, "target_label": 1, "max_length": 7}
    report = sweep(lambda _: model.checkpoint, model, None, data, ratios=[0, 0.5], **settings)
    expected = evaluate(model, data, **settings)["warnings"]
    assert report["warnings"] == expected
    assert [warning.partition(" ")[2] for warning in expected] == [
        "of 6 sentences were cut to 7 tokens",
        "of 3 poisoned sentences, perhaps with their trigger, were cut to 7 tokens",
        "poisoned sentence has the target label: taken as the attack's, so all count",
    ]
    quiet = sweep(lambda _: model.checkpoint, model, None, data, ratios=[0])
    assert quiet["warnings"] == []


def row(ratio: float, before: float, after: float | None = None) -> dict[str, Any]:
    numbers = {"after": None if after is None else {"accuracy": {"share": after}}}
    return {"ratio": ratio, "before": {"accuracy": {"share": before}}, **numbers}


@pytest.mark.parametrize(
    ("rows", "tolerance", "chosen"),
    [
        ([row(0, 0.9), row(0.3, 0.89), row(0.5, 0.87), row(0.7, 0.6)], 0.02, 0.3),
        ([row(0, 0.9), row(0.3, 0.89), row(0.5, 0.88), row(0.7, 0.6)], 0.02, 0.5),
        ([row(0, 0.9), row(0.5, 0.5, 0.9), row(0.7, 0.9, 0.5)], 0.02, 0.5),
        ([row(0.3, 0.8), row(0.6, 0.85), row(0.9, 0.81)], 0.05, 0.6),
        ([row(0.3, 0.1)], 0.02, None),
        ([row(0.3, 0.1)], 1, 0.3),
    ],
    ids=["largest", "just within", "after training counts", "not monotone", "none", "anything"],
)
def test_the_largest_ratio_within_the_tolerance(
    rows: list[dict[str, Any]], tolerance: float, chosen: float | None
) -> None:
    assert choose_ratio(rows, {"accuracy": {"share": 0.9}}, tolerance) == chosen


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ratios": []}, "ratios are shares from 0 to 1"),
        ({"ratios": [1.5]}, "ratios are shares from 0 to 1"),
        ({"ratios": [0.5], "tolerance": 2}, "tolerance is 2"),
    ],
)
def test_sweep_refuses(folder: Path, settings: dict[str, Any], reason: str) -> None:
    model = load_model("tuned", device="cpu")
    with pytest.raises(SettingError, match=reason):
        sweep(lambda _: model.checkpoint, model, None, read_sentences("data.tsv"), **settings)


SWEEP = ["sweep", "base", "tuned", "--data", "data.tsv", "--held-out", "data.tsv"]


@pytest.mark.parametrize(
    "options",
    [
        ["--operator", "mix", "--select", "drift"],
        ["--score", "drift", "--embeddings", "pool"],
        ["--points", "2", "--scope", "tensor"],
    ],
    ids=["mix", "drift", "points"],
)
def test_the_command_sweeps(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SWEEP, *options, "--ratios", "0,1", "--no-finetune", *ATTACK]
    report = run_json(capsys, *arguments)
    assert report["schema"] == "wsurg.sweep/1"
    assert [row["after"] for row in report["rows"]] == [None, None]
    assert report["rows"][0]["before"] == report["reference"]
    assert report["rows"][1]["before"] != report["reference"]
    assert run_wsurg(arguments) == 0
    shown = capsys.readouterr().out
    assert "ASR" in shown
    assert "Chosen: " in shown


def test_the_curve_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SWEEP, "--ratios", "0,0.5", "--epochs", "1", "--plot", "curve.png", *ATTACK]
    assert run_wsurg(arguments) == 0
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    assert run_wsurg(arguments) == 5
    assert run_wsurg([*SWEEP, "--plot", "nowhere/curve.png"]) == 6


def swept(**reference: Any) -> dict[str, Any]:
    """A report of two ratios, with an attack and training."""
    shared = {"share": 0.5, "low": 0.4, "high": 0.6, "count": 5, "of": 10}
    numbers = {"accuracy": shared, "loss": 1.0, "asr": shared, "floor": shared, "bacc": None}
    rows = [{"ratio": ratio, "before": numbers, "after": numbers} for ratio in (0.0, 0.5)]
    reference = {**numbers, **reference}
    return {"tuned": "t", "tolerance": 0.02, "reference": reference, "rows": rows, "chosen": 0.5}


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")],
)
def test_the_ending_says_the_format(name: str, begins: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    plot_sweep(swept(), str(path))
    first = path.read_bytes()
    assert first.startswith(begins)
    path.unlink()
    plot_sweep(swept(), path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("name", ["curve", "curve.jpg", "curve.", ".svg", "png"])
@pytest.mark.parametrize("check", [check_plot_path, partial(plot_sweep, swept())])
def test_a_picture_of_another_kind_is_refused(check: Any, name: str) -> None:
    reason = rf"^{name}: '.*' is no kind of picture; expected \.png, \.svg, \.pdf; give the file"
    with pytest.raises(SettingError, match=reason):
        check(name)


@pytest.mark.parametrize("check", [check_plot_path, partial(plot_sweep, swept())])
def test_without_matplotlib_the_plot_is_refused(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingError, match=r"pip install weightsurgery\[report\]"):
        check("curve.png")


def test_a_sweep_without_a_floor_is_shown_and_drawn(tmp_path: Path) -> None:
    report = swept(floor=None)
    (with_floor,), (without,) = sweep_tables(swept()), sweep_tables(report)
    assert with_floor.note == (
        f"{without.note} The tuned model gives 50.00 % of the untriggered ones the target label."
    )
    assert without.rows == with_floor.rows
    plot_sweep(report, tmp_path / "curve.svg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trigger-word", "cf"], "an attack is measured with --target-label"),
        (["--target-label", "1"], "an attack is measured with --target-label"),
        ([*ATTACK, "--trigger-sentence", "x"], "exclude each other"),
        (["--ratios", "0,2"], "expected shares from 0 to 1"),
        (["--ratios", "a"], "expected shares from 0 to 1"),
        (["--operator", "mix", "--score", "drift"], "--score is for --operator purify"),
        (["--select", "drift"], "--select is for --operator mix"),
        (["--counts", "x", "--wordfreq"], "give one of --counts"),
    ],
)
def test_wrong_usage_of_sweep(options: list[str], words: str, folder: Path) -> None:
    import click

    from weightsurgery.cli import cli

    with pytest.raises(click.ClickException, match=words):
        cli.main([*SWEEP, *options], prog_name="wsurg", standalone_mode=False)


def test_a_sweep_without_attack_or_training_has_fewer_columns() -> None:
    numbers = {"accuracy": {"share": 0.5}, "loss": 1.0, "asr": None, "floor": None}
    report = {
        "tuned": "tuned",
        "tolerance": 0.02,
        "reference": numbers,
        "rows": [{"ratio": 0.0, "before": numbers, "after": None}],
        "chosen": 0.0,
    }
    (table,) = sweep_tables(report)
    assert table.columns == (">ratio", ">accuracy", ">loss", "")
    assert [list(cells) for cells in table.rows] == [
        ["tuned", "50.00 %", "1", ""],
        ["0", "50.00 %", "1", "chosen"],
    ]


# --- purify in one go -------------------------------------------------------------------------

PURIFY = ["purify", "base", "tuned", "--ratio", "0.3"]


def test_data_takes_the_place_of_a_fisher_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["fisher", "tuned", "--data", "data.tsv", "-o", "fisher.safetensors"]
    assert run_wsurg(made) == 0
    assert run_wsurg([*PURIFY, "--fisher", "fisher.safetensors", "-o", "by-file"]) == 0
    assert run_wsurg([*PURIFY, "--data", "data.tsv", "-o", "by-data"]) == 0
    assert cases.stored_in(Path("by-file")) == cases.stored_in(Path("by-data"))
    record = json.loads(Path("by-data/wsurg-record.json").read_text())
    assert record["recipe"]["inputs"]["fisher"]["operator"] == "fisher"
    assert "Heaviest tails" in capsys.readouterr().out


def test_both_steps_in_one_go(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*PURIFY, "--data", "data.tsv", "--finetune", "--epochs", "2", "--seed", "3"]
    assert run_wsurg([*arguments, "--mask", "mask.safetensors", "-o", "once"]) == 0
    assert run_wsurg([*PURIFY, "--from-mask", "mask.safetensors", "-o", "first"]) == 0
    second = ["finetune", "first", "--data", "data.tsv", "--epochs", "2", "--seed", "3"]
    assert run_wsurg([*second, "-o", "second"]) == 0
    assert cases.stored_in(Path("once")) == cases.stored_in(Path("second"))
    record = json.loads(Path("once/wsurg-record.json").read_text())
    assert record["recipe"]["operator"] == "finetune"
    assert record["recipe"]["inputs"]["tuned"]["operator"] == "purify"
    assert {"purify", "training"} <= record["report"].keys()
    found = load_model("once", device="cpu")
    assert not np.isnan(evaluate(found, read_sentences("data.tsv"))["loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--finetune"], "--finetune needs --data"),
        (["--finetune", "--data", "data.tsv", "--dry-run"], "--dry-run does not train"),
        (["--data", "data.tsv", "--fisher", "x"], "exclude each other"),
        (["--data", "data.tsv", "--score", "drift"], "--data is for the Fisher"),
    ],
)
def test_wrong_usage_of_purify(options: list[str], words: str, folder: Path) -> None:
    import click

    from weightsurgery.cli import cli

    with pytest.raises(click.ClickException, match=words):
        cli.main([*PURIFY, *options, "-o", "out"], prog_name="wsurg", standalone_mode=False)
    assert not Path("out").exists()
