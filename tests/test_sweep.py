"""The sweep, and `purify` with its Fisher and its fine-tuning in one go, on tiny models."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, tiny_models
from tests.test_docs import run_wsurg
from weightsurgery.cli import main
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
from weightsurgery.report.tables import fit
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


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    code = stopped.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


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
    guessing = "tuned is no better than always saying '1'; a choice says nothing here"
    assert report["warnings"] == [*expected, guessing]
    assert [warning.partition(" ")[2].partition(";")[0] for warning in expected] == [
        "of 6 sentences were cut to 7 tokens",
        "of 3 poisoned sentences, perhaps with their trigger, was cut to 7 tokens",
        "poisoned sentence has the target label: taken as the attack's, so all count",
    ]
    quiet = sweep(lambda _: model.checkpoint, model, None, data, ratios=[0])
    assert quiet["warnings"] == [guessing]


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


@pytest.mark.parametrize(
    ("path", "code"), [("nowhere/curve.png", 6), ("data.tsv", 5)], ids=["folder", "exists"]
)
def test_where_the_curve_goes_is_checked_before_matplotlib_is_there(
    path: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_wsurg([*SWEEP, "--plot", path]) == code


def test_a_pipe_gets_a_line_for_each_ratio(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg([*SWEEP, "--ratios", "0,0.5", "--epochs", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    count = len(read_sentences("data.tsv"))
    assert lines[0] == f"fisher: {count} of {count}"
    assert lines[1:3] == ["sweeping, ratio 0: 1 of 2", "sweeping, ratio 0.5: 2 of 2"]
    assert not [line for line in lines[3:] if not line.startswith("warning: ")]


def test_progress_names_ratio_and_phase(folder: Path) -> None:
    model, data = load_model("tuned", device="cpu"), read_sentences("data.tsv")
    told: list[tuple[str, int, int]] = []
    examples = read_examples(model, "data.tsv")
    sweep(
        lambda _: model.checkpoint,
        model,
        examples,
        data,
        ratios=[0.5],
        training={"epochs": 1},
        progress=lambda *step: told.append(step),
    )
    phases = ("resetting", "measuring", "fine-tuning", "measuring")
    assert told == [
        ("sweeping, tuned: measuring", 0, 1),
        *((f"sweeping, ratio 0.5: {phase}", 0, 1) for phase in phases),
        ("sweeping, ratio 0.5", 1, 1),
    ]


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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    hint = r"pip install 'weightsurgery\[report\]' \(in a clone: '\.\[report\]'\)"
    with pytest.raises(SettingError, match=hint):
        check("curve.png")


def test_a_sweep_without_a_floor_is_shown_and_drawn(tmp_path: Path) -> None:
    report = swept(floor=None)
    (with_floor,), (without,) = sweep_tables(swept()), sweep_tables(report)
    assert with_floor.note == (
        f"{without.note}\nFloor: tuned gives 50.00 % the target without the trigger."
    )
    assert without.rows == with_floor.rows
    plot_sweep(report, tmp_path / "curve.svg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trigger-word", "cf"], "--trigger-word needs --target-label"),
        (["--target-label", "1"], "--target-label is an attack's"),
        (["--poisoned", "x", "--target-label", "1", "--position", "end"], "--position is for"),
        ([*ATTACK, "--bias-word", "x"], "exclude each other"),
        (["--ratios", "0,2"], "expected shares from 0 to 1"),
        (["--ratios", "a"], "expected shares from 0 to 1"),
        (["--operator", "mix", "--score", "drift"], "--score is for --operator purify"),
        (["--select", "drift"], "--select is for --operator mix"),
        (["--counts", "x", "--wordfreq"], "give one of --counts"),
        (["--corpus", "x"], "--corpus is for --embeddings epur"),
        (["--operator", "mix", "--wordfreq"], "--wordfreq is for --operator purify"),
        (["--operator", "mix", "--points", "2"], "--points is for the Fisher that --data makes"),
        (["--fisher", "x", "--points", "2"], "--points is for the Fisher that --data makes"),
        (["--score", "drift", "--points", "2"], "--points is for the Fisher that --data makes"),
        (["--no-finetune", "--epochs", "2"], "--epochs is for --finetune"),
        (["--overwrite"], "--overwrite is for --plot"),
        (
            ["--select", "drift", "--operator", "mix", "--seed", "1", "--no-finetune"],
            "--seed is for",
        ),
        (["--no-finetune", "--seed", "2"], "--seed is for --score random"),
    ],
)
def test_wrong_usage_of_sweep(options: list[str], words: str, folder: Path) -> None:
    import click

    from weightsurgery.cli import cli

    with pytest.raises(click.ClickException, match=words):
        cli.main([*SWEEP, *options], prog_name="wsurg", standalone_mode=False)


ACCURACY = {"share": 0.5, "low": 0.4, "high": 0.6, "count": 50, "of": 100}


def numbers(**more: Any) -> dict[str, Any]:
    return {"accuracy": ACCURACY, "loss": 1.0, "asr": None, "floor": None, "bacc": None, **more}


def report_of(**changes: Any) -> dict[str, Any]:
    row = {"ratio": 0.0, "before": numbers(), "after": None}
    given = {"tuned": "tuned", "tolerance": 0.02, "reference": numbers(), "rows": [row]}
    return {**given, "chosen": 0.0, "warnings": [], **changes}


def test_a_sweep_without_attack_or_training_has_fewer_columns() -> None:
    (table,) = sweep_tables(report_of())
    assert table.columns == (">ratio", ">accuracy", "", ">loss")
    assert [list(cells) for cells in table.rows] == [
        ["tuned", "50.00 %", "", "1"],
        ["0", "50.00 %", "chosen", "1"],
    ]


def test_a_sweep_fits_a_terminal_without_its_losses() -> None:
    found = numbers(asr=ACCURACY, floor=ACCURACY)
    row = {"ratio": 0.35, "before": found, "after": found}
    (table,) = sweep_tables(report_of(reference=found, rows=[row], chosen=0.35))
    assert len(fit(table, 80).columns) == 8
    narrow = fit(table, 60)
    heads = ["ratio", "accuracy before", "ASR before", "accuracy after", "ASR after", ""]
    assert [column.strip(">").replace("\n", " ") for column in narrow.columns] == heads
    assert narrow.rows[1][-1] == "chosen"
    assert "no room for loss before, loss after" in narrow.note
    assert "On 100 held-out sentences" in narrow.note
    assert sum(narrow.widths) + 3 * len(narrow.widths) + 1 <= 60


def test_what_speaks_against_a_choice_is_told(folder: Path) -> None:
    model = load_model("tuned", device="cpu")
    examples, held_out = read_examples(model, "data.tsv"), read_sentences("data.tsv")
    report = sweep(lambda _: model.checkpoint, model, examples, held_out, ratios=[0],
                   training={"epochs": 1})  # fmt: skip
    assert f"{len(held_out)} of the held-out sentences are among the clean" in report["warnings"][0]
    positive = [replace(one, label="1") for one in held_out]
    report = sweep(lambda _: model.checkpoint, model, None, positive, ratios=[0])
    assert "no better than always saying '1'" in report["warnings"][-1]


# --- purify in one go -------------------------------------------------------------------------

PAIR = ["base", "tuned"]
PURIFY = ["purify", *PAIR, "--ratio", "0.3"]


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
    assert run_wsurg(["purify", *PAIR, "--from-mask", "mask.safetensors", "-o", "first"]) == 0
    second = ["finetune", "first", "--data", "data.tsv", "--epochs", "2", "--seed", "3"]
    assert run_wsurg([*second, "-o", "second"]) == 0
    assert cases.stored_in(Path("once")) == cases.stored_in(Path("second"))
    record = json.loads(Path("once/wsurg-record.json").read_text())
    assert record["recipe"]["operator"] == "finetune"
    assert record["recipe"]["inputs"]["tuned"]["operator"] == "purify"
    assert {"purify", "training"} <= record["report"].keys()
    shown = capsys.readouterr().out
    assert "Reset by layer" in shown
    assert "training loss" in shown
    assert "sha256" not in shown
    by_mask = json.loads(Path("first/wsurg-record.json").read_text())
    reset = record["report"]["purify"]["reset"]
    assert reset["changed_dimensions"] == by_mask["changed_dimensions"] > 0
    for by, groups in by_mask["changed_by"].items():  # by the mask, the embedding is edited too
        found = {group: sums["changed"] for group, sums in groups.items() if sums["changed"]}
        assert found == {g: s["changed"] for g, s in reset[by].items() if s["changed"]}
    assert sum(g["changed"] for g in reset["layer"].values()) == reset["changed_dimensions"]
    trained = load_model("once", device="cpu")
    assert not np.isnan(evaluate(trained, read_sentences("data.tsv"))["loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--finetune"], "--finetune needs --data"),
        (["--finetune", "--data", "data.tsv", "--dry-run"], "--dry-run does not train"),
        (["--data", "data.tsv", "--fisher", "x"], "exclude each other"),
        (["--data", "data.tsv", "--score", "drift"], "--data is for the Fisher"),
        (["--fisher", "x", "--corpus", "y"], "--corpus is for --embeddings epur"),
        (["--fisher", "x", "--top", "3"], "--top is for --embeddings epur"),
        (["--fisher", "x", "--points", "3"], "--points is for the Fisher that --data makes"),
        (["--fisher", "x", "--epochs", "3"], "--epochs is for --finetune"),
        (["--fisher", "x", "--learning-rate", "3"], "--learning-rate is for --finetune"),
        (["--fisher", "x", "--max-length", "3"], "--max-length is for --data"),
        (["--fisher", "x", "--device", "cpu"], "--device is for --data"),
        (["--fisher", "x", "--seed", "3"], "--seed is for --score random"),
        (["--score", "drift", "--fisher", "x"], "--fisher is for --score fisher or inverse-fisher"),
        (["--score", "drift", "--epsilon", "1"], "--epsilon is for --score fisher or inverse"),
        (["--from-mask", "x"], "--ratio has no part in --from-mask"),
        (["--fisher", "x", "--invert"], "--invert is for --from-mask"),
        (["--fisher", "x", "--embeddings", "pool", "--embedding", "w"], "--embedding is for"),
    ],
)
def test_wrong_usage_of_purify(options: list[str], words: str, folder: Path) -> None:
    import click

    from weightsurgery.cli import cli

    with pytest.raises(click.ClickException, match=words):
        cli.main([*PURIFY, *options, "-o", "out"], prog_name="wsurg", standalone_mode=False)
    assert not Path("out").exists()


BEFORE_THE_FISHER = {
    "ratio": (["--ratio", "30"], 2, "ratio is 30.0; expected a share"),
    "epsilon": (["--epsilon", "-1"], 2, "epsilon is -1; expected 0 or more"),
    "counts": (["--embeddings", "epur"], 2, "--embeddings epur needs token counts"),
    "glob": (["--exclude", "nosuch.*"], 2, "nosuch"),
    "nothing": (["--include", "*word_embeddings*"], 2, "there is nothing to rank"),
    "rate": (["--finetune", "--learning-rate", "0"], 2, "--learning-rate is 0.0; expected"),
    "length": (["--max-length", "500"], 2, "--max-length is 500; expected"),
}


@pytest.mark.parametrize(("options", "code", "words"), BEFORE_THE_FISHER.values(),
                         ids=BEFORE_THE_FISHER)  # fmt: skip
@pytest.mark.parametrize("command", ["purify", "sweep"])
def test_what_can_be_refused_early_is(
    command: str,
    options: list[str],
    code: int,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import weightsurgery.curvature.fisher as module

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the Fisher was begun")

    monkeypatch.setattr(module, "fisher", fail)
    if command == "sweep":
        options = [o for o in options if o != "--finetune"]
        options = ["--ratios" if o == "--ratio" else o for o in options]
        words = "expected shares from 0 to 1" if "--ratios" in options else words
        arguments = [*SWEEP, *options]
    else:
        arguments = ["purify", *PAIR, "--data", "data.tsv", "-o", "out", *options]
    found, err = refused(arguments, capsys)
    assert (found, words in err) == (code, True), err
    assert not Path("out").exists()


SETTINGS_FILES = {
    "fisher below": ('data = "data.tsv"\n[purify]\nfisher = "f.safetensors"', [], 2),
    "both typed": ("", ["--fisher", "f.safetensors", "--data", "data.tsv"], 2),
    "fisher typed": ('data = "data.tsv"', ["--fisher", "f.safetensors"], 0),
    "data typed": ('[purify]\nfisher = "f.safetensors"', ["--data", "data.tsv"], 0),
    "other score": ('data = "data.tsv"', ["--score", "drift"], 0),
    "idle": ("[purify]\ntop = 3\nepochs = 2\nseed = 1", ["--fisher", "f.safetensors"], 0),
}


@pytest.mark.parametrize(("text", "options", "code"), SETTINGS_FILES.values(), ids=SETTINGS_FILES)
def test_what_is_typed_goes_before_the_settings_file(
    text: str, options: list[str], code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg(["fisher", "tuned", "--data", "data.tsv", "-o", "f.safetensors"]) == 0
    Path("wsurg.toml").write_text(text)
    found, err = refused([*PURIFY, *options, "-o", "out"], capsys)
    assert found == code, err
    if code:
        assert "exclude each other" in err
        return
    inputs = json.loads(Path("out/wsurg-record.json").read_text())["recipe"]["inputs"]
    made_here = inputs.get("fisher", {}).get("operator") == "fisher"
    assert made_here == ("--data" in options)


def test_the_fisher_is_of_the_weights_that_were_chosen(folder: Path, tmp_path: Path) -> None:
    import shutil

    two = tmp_path / "two"
    shutil.copytree("tuned", two)
    tiny_models.bert(tmp_path / "third", seed=2)
    shutil.copy(tmp_path / "third/model.safetensors", two / "other.safetensors")
    command = ["purify", "base", "two", "--data", "data.tsv", "--weights", "other.safetensors"]
    assert run_wsurg([*command, "-o", "chosen"]) == 0
    assert run_wsurg(["purify", "base", "third", "--data", "data.tsv", "-o", "expected"]) == 0
    assert cases.stored_in(Path("chosen")) == cases.stored_in(Path("expected"))


@pytest.mark.parametrize(
    "mask",
    [
        "o.safetensors",
        "./o.safetensors",
        "o.safetensors.wsurg-record.json",
        "tuned/model.safetensors",
    ],
)
def test_a_mask_has_a_place_of_its_own(
    mask: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PAIR:
        Path(f"{name}.safetensors").symlink_to(f"{name}/model.safetensors")
    before = Path("tuned/model.safetensors").read_bytes()
    arguments = ["base.safetensors", "tuned.safetensors", "-o", "o.safetensors", "--mask", mask]
    code, err = refused(["mix", *arguments, "--overwrite"], capsys)
    assert (code, err.startswith("error[E-OUTPUT-OVERLAP]: ")) == (5, True), err
    assert not Path("o.safetensors").exists()
    assert Path("tuned/model.safetensors").read_bytes() == before
