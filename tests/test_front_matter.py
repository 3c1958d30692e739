"""An output's model card repeats the license, the base and the task of its inputs' cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests import hostile
from tests.hostile import weights
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import FormatError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.front_matter import KEYS, is_card_value, read_front_matter
from weightsurgery.formats.strict_json import dump
from weightsurgery.operators.mix import mix
from weightsurgery.proof.replay import replay
from weightsurgery.proof.verification import verify

APACHE = b"---\nlicense: apache-2.0\npipeline_tag: text-classification\n---\n# Model\n"


def model(place: Path, card: bytes | None, seed: int = 0) -> Path:
    files: dict[str, Any] = {"config.json": {}, "model.safetensors": weights("w", seed=seed)}
    return hostile.folder(place, files if card is None else {**files, "README.md": card})


def mixed(place: Path, base: bytes | None, tuned: bytes | None) -> tuple[dict[str, Any], Any]:
    """The front matter of a mix of two models with these cards, and its record."""
    pair = [
        open_checkpoint(model(place / name, card, seed))
        for seed, (name, card) in enumerate({"base": base, "tuned": tuned}.items())
    ]
    record = save(mix(*pair), place / "out")
    text = (place / "out" / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), record


def test_what_the_inputs_state_is_repeated(tmp_path: Path) -> None:
    tuned = (
        b"---\r\nlanguage:\r\n- en\r\nlicense: other\r\nlicense_name: llama3\r\n"
        b"license_link: https://example.org/l\r\nbase_model:\r\n- org/one\r\n"
        b"base_model_relation: finetune\r\npipeline_tag: 'text-generation'\r\n"
        b"model-index:\r\n- name: x\r\n  results: []\r\n---\r\n"
    )
    front, record = mixed(tmp_path, APACHE, tuned)
    assert {key: front.get(key) for key in KEYS} == {
        "license": "other",
        "license_name": "llama3",
        "license_link": "https://example.org/l",
        "base_model": ["org/one"],
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
    }
    assert "the inputs have different licenses: other ('tuned'), apache-2.0 ('base')" in " ".join(
        record["warnings"]
    )


def test_bases_license_counts_where_tuned_states_none(tmp_path: Path) -> None:
    front, record = mixed(tmp_path, APACHE, b"# no front matter\n")
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "text-classification")
    assert not record["warnings"]


def test_a_model_is_no_adapter_of_its_base(tmp_path: Path) -> None:
    """Such as one whose adapter was merged, and whose card is still the adapter's."""
    stale = b"---\nbase_model: org/one\nbase_model_relation: adapter\n---\n"
    front, _ = mixed(tmp_path, None, stale)
    assert front["base_model"] == "org/one"
    assert "base_model_relation" not in front


@pytest.mark.parametrize("card", [None, b"", b"---\n", b"---\nlicense: x\n", b"# Model"])
def test_no_card_says_nothing(tmp_path: Path, card: bytes | None) -> None:
    front, record = mixed(tmp_path, card, card)
    assert not front.keys() & set(KEYS)
    assert not record["warnings"]
    assert all("card" not in entry for entry in record["inputs"])


def test_verify_and_replay_know_the_cards_from_the_record(tmp_path: Path) -> None:
    mixed(tmp_path, None, APACHE)
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: mit\n---\n")  # edited since
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    report = verify(tmp_path / "out", base=base, tuned=tuned)
    assert report["proved"]
    assert report["selection"]["known_by"] == ["recipe"]
    assert replay(tmp_path / "out", tmp_path / "again")["identical"]


def test_a_card_that_does_not_follow_from_the_record_is_found(tmp_path: Path) -> None:
    mixed(tmp_path, None, APACHE)
    path = tmp_path / "out" / "README.md"
    path.write_text(path.read_text().replace("apache-2.0", "mit"))
    assert not verify(tmp_path / "out")["proved"]


@pytest.mark.parametrize(
    "card", [[], {"license": 1}, {"license": "a\nb"}, {"tags": "x"}, {"pipeline_tag": ["a"]}]
)
def test_a_record_with_another_kind_of_card_is_refused(tmp_path: Path, card: Any) -> None:
    mixed(tmp_path, None, APACHE)
    path = tmp_path / "out" / "wsurg-record.json"
    record = json.loads(path.read_bytes())
    record["inputs"][1]["card"] = card
    path.write_bytes(dump(record))
    with pytest.raises(FormatError, match="no model card"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "value",
    [
        "{a: 1}",
        "[1, 2]",
        "true",
        '"a\\x1b[31m"\nx: &a [*a]',
        "&a [*a]",
        "!!python/object/apply:os.system [id]",
        "[" * 5000,
        "'" + "x" * 300 + "'",
        "\n" + "- x\n" * 100,
    ],
)
def test_values_of_another_kind_are_left_out_and_told(tmp_path: Path, value: str) -> None:
    found = open_checkpoint(model(tmp_path / "m", f"---\nlicense: {value}\n---\n".encode()))
    told = " ".join(found.warnings)
    assert not found.card
    assert "'license' is not copied" in told


@given(st.binary(max_size=400), st.lists(st.sampled_from(KEYS), max_size=3))
def test_any_front_matter_is_read_or_told(data: bytes, keys: list[str]) -> None:
    import tempfile

    lines = b"".join(key.encode() + b": " + data + b"\n" for key in keys)
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"---\n" + lines + b"---\n")
        file.flush()
        found, _ = read_front_matter(InputFile(file.name))
    assert all(is_card_value(key, value) for key, value in found.items())


def test_only_the_wanted_keys_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def safe_load(text: str) -> Any:
        parsed.append(text)
        return original(text)

    original = yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", safe_load)
    results = b"model-index:\n" + b"- a: {b: [c, d], e: *x}\n" * 100_000
    found: Checkpoint = open_checkpoint(
        model(tmp_path / "m", b"---\n" + results + b"license: mit\n---\n")
    )
    assert found.card == {"license": "mit"}
    assert parsed == ["license: mit\n"]


@pytest.mark.parametrize("line", ["{" + "a: b, " * 400_000, "[" * 2_000_000, "a " * 1_000_000])
def test_a_line_without_end_takes_no_time(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    parse = yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", lambda text: seen.append(len(text)) or parse(text))
    card = f"---\nlicense: {line}\nbase_model: org/one\n---\n".encode()
    found, warnings = read_front_matter(InputFile(str(model(tmp_path / "m", card) / "README.md")))
    assert found == {"base_model": "org/one"}
    assert "'license' is not copied" in warnings[0]
    assert max(seen) < 20_000


def test_quoted_keys_are_keys(tmp_path: Path) -> None:
    card = b"---\n\"license\": mit\n'pipeline_tag': text-generation\n---\n"
    front, _ = mixed(tmp_path, None, card)
    assert (front["license"], front["pipeline_tag"]) == ("mit", "text-generation")
