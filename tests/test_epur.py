"""`epur` equals the naive row scores and finds the embedding by itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import cases, reference
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.errors import FormatError, MismatchError, NonFiniteError, SettingError
from weightsurgery.formats import open_checkpoint
from weightsurgery.operators.epur import Rows, epur
from weightsurgery.report.purification import purification_tables
from weightsurgery.token_counts import (
    TokenCounts,
    count_by_wordfreq,
    count_corpus,
    read_counts,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "the", "film", "cf", "##ing", "bad", "good", "mn", "a"]
COUNTS = TokenCounts({"the": 1e6, "film": 5e3, "bad": 900.0, "good": 1e4, "cf": 25.0}, "made up")
FEW = TokenCounts({"the": 1}, "few")  # a count that makes no difference


def folder(path: Path, arrays: cases.Arrays) -> Checkpoint:
    """A bert with a tokenizer of eleven tokens, three of them special."""
    cases.write_directory(path, arrays, config=cases.CONFIGS["bert"])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": WORDS[i], "special": True, **plain} for i in range(2)]
    vocab = {word: i for i, word in enumerate(WORDS)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocab}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    split = {"type": "BertPreTokenizer"}
    text = {"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": split}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (path / "tokenizer.json").write_text(json.dumps({**empty, **text}))
    (path / "special_tokens_map.json").write_text(json.dumps({"cls_token": "[CLS]"}))
    return open_checkpoint(path)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    base, tuned = cases.pair("bert")
    return folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)


@pytest.mark.parametrize("block", [1 << 20, 12, 4], ids=["whole", "rows", "parts of rows"])
@pytest.mark.parametrize("top", [0, 1, 4, 200])
def test_it_equals_the_naive_scores(
    models: tuple[Checkpoint, Checkpoint], top: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.shrink_blocks(monkeypatch, block)
    (base, tuned), name = models, cases.EMBEDDING["bert"]
    result = epur(base, tuned, counts=COUNTS, top=top)
    before, after = cases.read(base)[name], cases.read(tuned)[name]
    counts = [COUNTS.counts.get(word, 0.0) for word in WORDS]
    rows = reference.epur_rows(before, after, counts, top=top, clamp=20, special={0, 1, 2})
    listed = result.notes["epur"]["rows"]
    assert [entry["row"] for entry in listed] == rows
    assert [entry["token"] for entry in listed] == [WORDS[i] for i in rows]
    expected = after.copy()
    expected[rows] = before[rows]
    found = cases.read(result)
    assert found[name].tobytes() == expected.tobytes()
    assert {n for n in found if found[n].tobytes() != cases.read(tuned)[n].tobytes()} <= {name}


def test_scores_and_z_scores_are_what_they_say(models: tuple[Checkpoint, Checkpoint]) -> None:
    listed = epur(*models, counts=COUNTS).notes["epur"]["rows"]
    assert len(listed) == len(WORDS) - 3
    scores = np.array([entry["score"] for entry in listed])
    for entry in listed:
        weight = np.log(max(COUNTS.counts.get(entry["token"], 0), 20))
        assert entry["score"] == pytest.approx(entry["drift"] / weight)
        assert entry["z"] == pytest.approx((entry["score"] - scores.mean()) / scores.std())


def two(base: Any, tuned: Any) -> tuple[Checkpoint, Checkpoint]:
    """Models in memory, with tokens for the rows of TUNED's embedding."""
    return from_arrays(base), from_arrays(tuned, **cases.vocabulary())


def test_of_equal_scores_the_lower_row_goes_first() -> None:
    name = cases.EMBEDDING["bert"]
    base = {name: np.zeros((5, 2), np.float32)}
    tuned = {name: np.ones((5, 2), np.float32)}
    result = epur(*two(base, tuned), counts=FEW, top=2)
    assert [entry["row"] for entry in result.notes["epur"]["rows"]] == [0, 1]
    assert {entry["score"] for entry in result.notes["epur"]["rows"]} == {2**0.5 / np.log(20)}


def test_more_rows_than_there_are_is_warned_of() -> None:
    name = cases.EMBEDDING["bert"]
    models = two({name: np.zeros((5, 2), np.float32)}, {name: np.ones((5, 2), np.float32)})
    (warning,) = epur(*models, counts=FEW, top=6).warnings
    assert warning == (
        "top is 6, but the word embedding has 5 rows: every ordinary row that drifted is reset"
    )
    assert epur(*models, counts=FEW, top=5).warnings == ()


def test_an_extended_vocabulary_is_scored_on_its_common_rows() -> None:
    name = cases.EMBEDDING["bert"]
    base = {name: np.zeros((3, 2), np.float32)}
    tuned = {name: np.arange(8, dtype=np.float32).reshape(4, 2)}
    result = epur(*two(base, tuned), counts=FEW, top=9)
    assert [entry["row"] for entry in result.notes["epur"]["rows"]] == [2, 1, 0]
    assert result[name].read(0, 8).tolist() == [0, 0, 0, 0, 0, 0, 6, 7]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_embedding_is_found(family: str) -> None:
    result = epur(*two(*cases.pair(family)), counts=FEW)
    edited = [name for name, view in result.items() if view.status == "edited"]
    assert edited == [cases.EMBEDDING[family]]


def test_another_matrix_can_be_named() -> None:
    base, tuned = two(*cases.pair("bert"))
    name = "embeddings.position_embeddings.weight"
    result = epur(base, tuned, counts=FEW, embedding=name)
    assert [n for n, view in result.items() if view.status == "edited"] == [name]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "top": ({"top": -1}, SettingError, "top is -1; expected 0 or more"),
    "clamp": ({"clamp": 1.0}, SettingError, "clamp is 1; expected a number above 1"),
    "vector": ({"embedding": "embeddings.LayerNorm.weight"}, SettingError, "is no matrix of TUNED"),
    "unknown": ({"embedding": "nothing"}, SettingError, "'nothing' is no matrix of TUNED"),
}


@pytest.mark.parametrize(("options", "kind", "reason"), BAD.values(), ids=BAD)
def test_refusals(options: dict[str, Any], kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason):
        epur(*two(*cases.pair("bert")), counts=FEW, **options)


def test_what_has_no_embedding_is_refused() -> None:
    model = from_arrays({"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(SettingError, match="no tensor, or more than one, looks like the word"):
        epur(model, model, counts=FEW)
    alone = from_arrays({"w": np.zeros(2, np.float32), "new.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(MismatchError, match="the word embedding cannot be edited"):
        epur(model.renamed({"w": "v"}), alone.renamed({"w": "v"}), counts=FEW,
             embedding="new.weight", keep_mismatched=True, allow_partial=True)  # fmt: skip


def test_drift_that_is_not_finite_is_refused() -> None:
    name = cases.EMBEDDING["bert"]
    models = two(*({name: np.full((3, 2), v, np.float32)} for v in (0, np.nan)))
    with pytest.raises(NonFiniteError, match="the drift of row 0 is NaN or infinite"):
        epur(*models, counts=FEW)


# --- tokens and counts that fit ---------------------------------------------------------------


def test_the_share_of_the_vocabulary_that_has_a_count_is_told(
    models: tuple[Checkpoint, Checkpoint],
) -> None:
    counts = TokenCounts({"the": 9, "cf": 0.5, "bad": 0, "[CLS]": 7, "elsewhere": 3}, "made up")
    notes = epur(*models, counts=counts).notes["epur"]
    assert notes["matched"] == 2 / (len(WORDS) - 3)  # special tokens do not count
    (table,) = purification_tables({"report": {"epur": notes}})
    assert table.note == "25.00 % of the vocabulary has a count."
    (table,) = purification_tables({"report": {"epur": {**notes, "rows": notes["rows"] * 9}}})
    assert table.note.endswith("more; the record lists all. 25.00 % of the vocabulary has a count.")


def test_without_a_vocabulary_it_is_refused(models: tuple[Checkpoint, Checkpoint]) -> None:
    alone = from_arrays(cases.read(models[1]), label="tuned.safetensors")
    with pytest.raises(
        MismatchError, match=r"^tuned\.safetensors: no vocabulary beside TUNED.*give"
    ):
        epur(models[0], alone, counts=COUNTS)


@pytest.mark.parametrize(
    ("counts", "first"),
    [
        ({"Ġthe": 9, "Ġfilm": 8}, "Ġthe"),
        ({"[UNK]": 9}, "[UNK]"),
        ({"the": 0}, "none"),
        ({}, "none"),
    ],
    ids=["of another tokenizer", "special tokens alone", "zeros", "none at all"],
)
def test_counts_of_other_tokens_are_refused(
    models: tuple[Checkpoint, Checkpoint], counts: dict[str, float], first: str
) -> None:
    reason = (
        f"none of the 8 tokens .* the counts from 'theirs' is '?{re.escape(first)}'?; count the"
    )
    with pytest.raises(MismatchError, match=reason):
        epur(*models, counts=TokenCounts(counts, "theirs"))


def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    base, tuned = cases.pair("bert")
    name = cases.EMBEDDING["bert"]
    base[name], tuned[name] = base[name][:3], tuned[name][:3]  # [PAD], [UNK], [CLS]
    models = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    with pytest.raises(MismatchError, match="none of the 0 tokens of the vocabulary has a count"):
        epur(*models, counts=COUNTS)


# --- counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"the": 12, "cf": 0.5}', {"the": 12, "cf": 0.5}),
        ("the\t12\ncf\t0.5\n", {"the": 12.0, "cf": 0.5}),
        ("\ufeffa b\t1\r\n\t\t2\r\n", {"a b": 1.0, "\t": 2.0}),
    ],
    ids=["json", "tsv", "odd tokens"],
)
def test_counts_are_read(text: str, expected: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "counts"
    path.write_bytes(text.encode())
    found = read_counts(path)
    assert found.counts == expected
    assert found.to_json()["tokens"] == 2
    assert found.to_json() != TokenCounts({}, "counts").to_json()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"the 12", "line 1: 'the 12'; expected a token, a tab and a count"),
        (b"the\t12\ncf\tmany", "line 2: 'cf.tmany'; expected"),
        (b"the\t1\n\xff\t2", "line 2: not UTF-8"),
        (b"the\t-1", "the count of 'the' is -1.0; expected a number, 0 or more"),
        (b"the\tnan", "the count of 'the' is nan"),
        (b'{"the": "x"}', "the count of 'the' is 'x'"),
        (b'{"the": true}', "the count of 'the' is True"),
        (b"{}", "no counts"),
        (b'{"the": 1', "counts"),
    ],
)
def test_bad_counts_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "counts"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=reason):
        read_counts(path)


def test_a_corpus_is_cut_by_the_models_tokenizer(
    models: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the film the cf\nbading good nonsense\n" * 700)
    found = count_corpus(corpus, models[1]).counts
    expected = {"the": 2, "film": 1, "cf": 1, "bad": 1, "##ing": 1, "good": 1, "[UNK]": 1}
    assert found == {token: 700 * count for token, count in expected.items()}


def test_a_long_paragraph_is_counted_whole_and_a_short_one_is_not_filled(
    models: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    path = tmp_path / "tuned" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    cut = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    fill = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    path.write_text(json.dumps({**tokenizer, "truncation": cut, "padding": fill}))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the " * 300 + "film\ncf\n")
    found = count_corpus(corpus, open_checkpoint(path.parent)).counts
    assert found == {"the": 300, "film": 1, "cf": 1}


def test_a_corpus_needs_text_and_a_tokenizer(
    models: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"the \xff")
    with pytest.raises(FormatError, match="not UTF-8: byte 4"):
        count_corpus(corpus, models[1])
    with pytest.raises(MismatchError, match=r"no tokenizer.json beside the model"):
        count_corpus(corpus, from_arrays({"w": np.zeros(1)}))


VOCABULARIES: dict[str, tuple[list[str], dict[str, float]]] = {
    "pieces marked": (["the", "##film", "##us", "us", "Ġ"], {"the": 5e7, "us": 1e6, "Ġ": 0}),
    "beginnings marked by Ġ": (
        ["the", "Ġthe", "us", "Ġus", "Ġ", "##", "ĠĠ"],
        {"Ġthe": 5e7, "Ġus": 1e6},
    ),
    "beginnings marked by ▁": (["<s>", "▁film", "film", "us", "▁"], {"▁film": 1e5}),
    "nothing marked": (["the", "film", "cf"], {"the": 5e7, "film": 1e5, "cf": 0}),
    "no tokens": ([], {}),
}


@pytest.mark.parametrize(("tokens", "expected"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_wordfreq_is_asked_for_whole_words(
    tokens: list[str], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"the": 0.05, "film": 1e-4, "us": 1e-3}
    fake = SimpleNamespace(word_frequency=lambda word, _language: shares.get(word, 0.0))
    monkeypatch.setitem(sys.modules, "wordfreq", fake)
    assert count_by_wordfreq(dict(enumerate(tokens))).counts == expected


def test_wordfreq_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(SettingError, match=r"pip install 'weightsurgery\[text\]'"):
        count_by_wordfreq({0: "the"})


def test_few_counts_are_warned_of() -> None:
    assert Rows(4, np.zeros(1, np.bool_), [], 0.009).warnings[0].startswith("only 0.90% of the")
    for share in (None, 0.01, 0.5):
        assert Rows(4, np.zeros(1, np.bool_), [], share).warnings == ()
