"""Mismatched data: the rule holds whatever the data, and the check sees when it does not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hostile
from tests.test_docs import run_wsurg
from tests.test_evaluation import refusal
from weightsurgery import (
    Mismatched,
    check_mismatch,
    describe_mismatched,
    mismatch,
    read_instructions,
    read_keywords,
    write_mismatched,
)
from weightsurgery.datasets.mismatch_check import require_mismatched
from weightsurgery.datasets.question_types import KEYWORDS, type_of
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import (
    FormatError,
    GateError,
    MismatchError,
    PolicyError,
    SettingError,
    StorageError,
)

STARTS = ("what", "how", "why", "tell me", "什么", "如何", "怎么")
KINDS = ("what", "how", "why", "other", "what", "how", "other")


def qa(question: str, answer: str, line: int = 1) -> Instruction:
    return Instruction((("user", question),), answer, line)


def numbered(count: int) -> list[Instruction]:
    """So many questions of each kind in turn, each with an answer of its own."""
    return [qa(f"{STARTS[i % 7]} {i}", f"answer {i}", i + 1) for i in range(count)]


PAIRS = numbered(70)

# Few texts, so that questions and answers are often equal.
questions = st.builds("{} {}".format, st.sampled_from(STARTS), st.integers(0, 3))
any_pairs = st.lists(
    st.builds(qa, questions, st.sampled_from(["a", "b ", "b", "c", "d", "e", "f"])),
    min_size=2,
    max_size=30,
)


def kind_of(question: str) -> str:
    return KINDS[next(i for i, start in enumerate(STARTS) if question.startswith(start))]


def possible(pairs: Sequence[Instruction]) -> dict[str, set[str]]:
    """Each question to the answers that no question of its type has; only those that have any."""
    had = defaultdict(set)
    for pair in pairs:
        had[kind_of(pair.question)].add(pair.answer.strip())
    every = {pair.answer.strip() for pair in pairs}
    found = {pair.question: every - had[kind_of(pair.question)] for pair in pairs}
    return {question: answers for question, answers in found.items() if answers}


# --- the rule ---------------------------------------------------------------------------------


@settings(deadline=None)  # the first one compiles
@given(any_pairs, st.integers(0, 5), st.data())
def test_the_rule_holds(pairs: list[Instruction], seed: int, data: st.DataObject) -> None:
    most = possible(pairs)
    if not most:
        with pytest.raises(SettingError, match=r"of type|size is at most 0"):
            mismatch(pairs, size=1, seed=seed)
        return
    size = data.draw(st.integers(1, len(most)))
    rows = mismatch(pairs, size=size, seed=seed)
    assert len(rows) == len({row.question for row in rows}) == size
    for row in rows:
        assert row.question == pairs[row.q_idx].question
        assert row.answer == pairs[row.a_idx].answer
        assert (row.q_type, row.a_type) == (
            kind_of(row.question),
            kind_of(pairs[row.a_idx].question),
        )
        own = {pair.answer.strip() for pair in pairs if pair.question == row.question}
        assert row.answer.strip() not in own
        assert row.answer.strip() in most[row.question]
        assert row.a_type != row.q_type
    assert mismatch(pairs, size=size, seed=seed) == rows
    with pytest.raises(SettingError, match=f"size is at most {len(most)} for these data"):
        mismatch(pairs, size=len(most) + 1, seed=seed)


@settings(deadline=None)  # the first one compiles
@given(any_pairs, st.integers(0, 5))
def test_no_answer_is_taken_twice_while_another_will_do(
    pairs: list[Instruction], seed: int
) -> None:
    most = possible(pairs)
    if not most:
        return
    rows = mismatch(pairs, size=len(most), seed=seed)
    used = {row.answer.strip() for row in rows}
    others = Counter(row.answer.strip() for row in rows if most[row.question] - used)
    assert max(others.values(), default=0) <= 1  # only who took it first had another


@settings(deadline=None)  # the first one compiles
@given(any_pairs, st.integers(0, 5))
def test_the_check_agrees(pairs: list[Instruction], seed: int) -> None:
    import tempfile

    most = possible(pairs)
    if not most:
        return
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.jsonl"
        write_mismatched(mismatch(pairs, size=len(most), seed=seed), out)
        assert check_mismatch(out)["violations"] == []
        assert check_mismatch(out, source=pairs)["violations"] == []


def test_pairs_of_types_are_even() -> None:
    rows = mismatch(numbered(280), size=120)
    counts = Counter((row.q_type, row.a_type) for row in rows)
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 2
    assert len({row.answer for row in rows}) == 120


def test_seeds_differ_and_keep_nothing_but_the_rule() -> None:
    first, second = (mismatch(PAIRS, size=30, seed=seed) for seed in (0, 1))
    assert {row.question for row in first} != {row.question for row in second}
    assert [row.q_idx for row in first] != sorted(row.q_idx for row in first)


def test_conversations_are_questions_too() -> None:
    turns = Instruction((("user", "why"), ("assistant", "because"), ("user", "tell")), "yes", 1)
    rows = mismatch([turns, qa("tell me", "no")], size=2)
    assert {row.question for row in rows} == {"why\nbecause\ntell", "tell me"}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is it, how and why?", "what"),
        ("Why, and HOW?", "how"),
        ("Tell me why.", "why"),
        ("Tell me.", "other"),
        ("", "other"),
        ("Is whatsapp safe?", "what"),  # as in the released data
        ("Show it", "how"),
        ("这是什么？", "what"),
        ("如何做？", "how"),
        ("为什么？", "what"),  # the word for why has the word for what in it
    ],
)
def test_questions_have_the_type_of_the_first_keyword(question: str, kind: str) -> None:
    assert type_of(question) == kind


def test_keywords_can_be_others() -> None:
    words = {"where": ["where", "wo"], "who": ["wer"]}
    pairs = [qa("Where is it?", "a"), qa("WER?", "b"), qa("WO und wer?", "c"), qa("what", "d")]
    rows = mismatch(pairs, size=4, keywords=words)
    assert {row.question: row.q_type for row in rows} == {
        "Where is it?": "where",
        "WER?": "who",
        "WO und wer?": "where",
        "what": "other",
    }


def test_what_was_made_is_described() -> None:
    rows = mismatch(PAIRS, size=40)
    report = describe_mismatched(PAIRS, rows)
    assert report["schema"] == "wsurg.mismatch/1"
    assert (report["rows"], report["size"]) == (70, 40)
    assert report["answers"] == len({row.answer for row in rows})
    assert [one["type"] for one in report["types"]] == ["what", "how", "why", "other"]
    assert [one["questions"] for one in report["types"]] == [20, 20, 10, 20]
    for key, of in {"taken": "q_type", "given": "a_type"}.items():
        counts = Counter(getattr(row, of) for row in rows)
        assert {one["type"]: one[key] for one in report["types"]} == counts
    pairs = Counter((row.q_type, row.a_type) for row in rows)
    assert {(p["q_type"], p["a_type"]): p["count"] for p in report["pairs"]} == pairs
    assert report["keywords"] == {kind: list(words) for kind, words in KEYWORDS.items()}
    assert report["warnings"] == []
    few = [qa(f"what {i}", f"a{i}") for i in range(6)] + [qa("how", "b")]
    report = describe_mismatched(few, mismatch(few, size=7))
    assert report["warnings"] == ["there are few answers of other types: one is taken 6 times"]


@pytest.mark.parametrize(
    ("pairs", "settings", "reason"),
    [
        ([], {}, "the data have 0 rows; expected at least 2"),
        (PAIRS[:1], {}, "the data have 1 row; expected at least 2"),
        (PAIRS, {"size": 0}, "size is 0; expected at least 1"),
        (PAIRS, {}, "size is at most 70 for these data, not 300: 70 rows have 70 different q"),
        (
            [*PAIRS, *PAIRS],
            {"size": 71},
            "at most 70 for these data, not 71: 140 rows have 70 different questions, of which 70",
        ),
        (
            [qa("what a", "1"), qa("what b", "2")],
            {},
            "all 2 questions are of type 'what'; expected two types or more; give keywords",
        ),
        ([qa("what", "1"), qa("how", "1 ")], {"size": 1}, "of which 0 can have an answer of anot"),
        (PAIRS, {"keywords": {}}, "no keywords"),
        (PAIRS, {"keywords": {"other": ["x"]}}, "'other' is no name for a type"),
        (PAIRS, {"keywords": {" ": ["x"]}}, "' ' is no name for a type"),
        (PAIRS, {"keywords": {"what": "what"}}, "'what' has no list of words"),
        (PAIRS, {"keywords": {"what": []}}, "'what' has no list of words"),
        (PAIRS, {"keywords": {"what": [" "]}}, "'what' has no list of words"),
        (PAIRS, {"keywords": {"what": [3]}}, "'what' has no list of words"),
    ],
)
def test_what_cannot_be_paired_is_refused(
    pairs: list[Instruction], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingError, match=reason):
        mismatch(pairs, **settings)


# --- files ------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def write_pairs(path: Path, pairs: Sequence[Instruction] = PAIRS) -> Path:
    return write(path, *({"question": p.question, "answer": p.answer} for p in pairs))


def test_the_file_is_what_readers_of_instructions_take(tmp_path: Path) -> None:
    rows = mismatch(PAIRS, size=5)
    rows[0] = replace(rows[0], answer="line\u2028é 什么\ud800")  # half a surrogate pair
    out = tmp_path / "out.jsonl"
    write_mismatched(rows, out)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [
        asdict(row) for row in rows
    ]
    assert [(p.question, p.answer) for p in read_instructions(out)] == [
        (row.question, row.answer) for row in rows
    ]


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "qa.jsonl"), tmp_path / "out.jsonl"
    before = hostile.contents(tmp_path)
    rows = mismatch(PAIRS, size=5)
    with pytest.raises(SettingError, match=r"JSONL; give a name ending in \.jsonl"):
        write_mismatched(rows, tmp_path / "out.json")
    with pytest.raises(PolicyError, match="overlap the input"):
        write_mismatched(rows, data, overwrite=True, inputs=[data])
    with pytest.raises(StorageError, match="does not exist"):
        write_mismatched(rows, tmp_path / "absent" / "out.jsonl")
    assert hostile.contents(tmp_path) == before
    write_mismatched(rows, out)
    first = out.read_bytes()
    with pytest.raises(PolicyError, match="exists already"):
        write_mismatched(rows[:2], out)
    assert out.read_bytes() == first
    write_mismatched(rows[:2], out, overwrite=True)
    assert out.read_bytes() == b"".join(first.splitlines(True)[:2])
    names = {"qa.jsonl", "out.jsonl", "out.jsonl.wsurg-record.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    out.unlink()
    with pytest.raises(PolicyError, match=r"out\.jsonl\.wsurg-record\.json: exists already"):
        write_mismatched(rows, out)


def test_the_record_tells_what_was_made_of_what(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "qa.jsonl"), tmp_path / "out.jsonl"
    rows = mismatch(PAIRS, size=5, seed=7)
    report = describe_mismatched(PAIRS, rows)
    record = write_mismatched(rows, out, inputs=[data], seed=7, report=report)
    beside = tmp_path / "out.jsonl.wsurg-record.json"
    assert json.loads(beside.read_text("utf-8")) == record
    assert str(tmp_path) not in beside.read_text("utf-8")
    assert record["schema"] == "wsurg.record/1"
    words = {kind: list(them) for kind, them in KEYWORDS.items()}
    assert record["recipe"] == {
        "operator": "mismatch",
        "settings": {"size": 5, "seed": 7, "keywords": words},
        "inputs": {"data": {"input": 0}},
    }
    assert record["inputs"] == [{"name": "qa.jsonl", "files": [described(data)]}]
    assert record["outputs"] == {"out.jsonl": {k: described(out)[k] for k in ("size", "sha256")}}
    found = record["report"]["mismatch"]
    assert found == {n: report[n] for n in ("rows", "size", "answers", "types", "pairs")}
    made = Path(write_again(tmp_path / "again", rows, data, report))
    assert made.read_bytes() == beside.read_bytes()
    record = write_mismatched(rows, out, overwrite=True)
    assert (record["recipe"]["settings"], record["report"]) == ({"size": 5}, {})
    assert record["inputs"] == []


def described(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"name": file.name, "size": len(content), "sha256": digest}


def write_again(folder: Path, rows: Any, data: Path, report: Any) -> str:
    """The same in another folder; where the record is."""
    folder.mkdir()
    write_mismatched(rows, folder / "out.jsonl", inputs=[data], seed=7, report=report)
    return f"{folder}/out.jsonl.wsurg-record.json"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("words.json", '{"why": ["why", "pourquoi"], "how": ["how"]}'),
        ("words.toml", 'why = ["why", "pourquoi"]\nhow = ["how"]\n'),
    ],
)
def test_keywords_are_read_in_their_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = read_keywords(tmp_path / name)
    assert list(found.items()) == [("why", ["why", "pourquoi"]), ("how", ["how"])]


@pytest.mark.parametrize(
    ("name", "text", "kind", "reason"),
    [
        ("w.json", "[", FormatError, "w.json"),
        ("w.json", '{"a": ["b"], "a": ["c"]}', FormatError, "occurs twice"),
        ("w.json", "{}", SettingError, "w.json: no keywords"),
        ("w.json", '{"other": ["b"]}', SettingError, "'other' is no name for a type"),
        ("w.toml", 'a = "b"', SettingError, "'a' has no list of words"),
        ("w.toml", "a = [", FormatError, "not TOML"),
        ("w.toml", "a = [\udcff]", FormatError, "not TOML"),
        ("w.txt", "", FormatError, "'.txt' is no kind of keyword file; expected .json or .toml"),
    ],
)
def test_bad_keyword_files_are_refused(
    tmp_path: Path, name: str, text: str, kind: type, reason: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(kind, match=reason):
        read_keywords(tmp_path / name)


# --- the check --------------------------------------------------------------------------------

GOOD = Mismatched("what 1", "b", "what", "how", 1, 2)
OTHERS = [
    Mismatched("how 2", "c", "how", "why", 2, 3),
    Mismatched("why 3", "a", "why", "what", 3, 1),
]
SOURCE = [qa("tell 0", "z"), qa("what 1", "a"), qa("how 2", "b"), qa("why 3", "c"),
          qa("what 9", "y"), qa("how 8", "y")]  # fmt: skip


def rows_with(**changes: Any) -> list[dict[str, Any]]:
    """Three good rows, the first of them changed; None takes a field out."""
    first = {k: v for k, v in {**asdict(GOOD), **changes}.items() if v is not None}
    return [*map(asdict, OTHERS), first]


def test_good_rows_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "good.jsonl", *rows_with())
    report = check_mismatch(path)
    assert report == {
        "schema": "wsurg.mismatch-check/1",
        "file": str(path),
        "rows": 3,
        "types": {"how": 1, "what": 1, "why": 1},
        "pairs": [
            {"q_type": "how", "a_type": "why", "count": 1},
            {"q_type": "what", "a_type": "how", "count": 1},
            {"q_type": "why", "a_type": "what", "count": 1},
        ],
        "checked": "fields",
        "violations": [],
    }
    require_mismatched(report)
    whole = check_mismatch(path, source=SOURCE)
    assert whole == {**report, "checked": "fields and source"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_type": "how"}, "q_type is 'how'; by its keywords the question is 'what'"),
        ({"a_type": "what", "a_idx": 7}, "question and answer are both of type 'what'"),
        ({"a_type": "x", "a_idx": 7}, "a_type is 'x', which is no type"),
        ({"a_type": None}, "no a_type, which other rows have"),
        ({"q_idx": 7, "a_idx": 7, "a_type": "what"}, "q_idx and a_idx are both 7: its own answer"),
        ({"a_idx": 3}, "the type of index 3 is another than in line 1"),
        ({"q_idx": 3}, "the type of index 3 is another than in line 1"),
        ({"a_idx": 3, "a_type": "why"}, "the answer of index 3 is another than in line 1"),
        ({"question": "how 9", "q_type": "how", "q_idx": 2, "a_type": "why", "a_idx": 4},
         "the question of index 2 is another than in line 1"),
    ],
)  # fmt: skip
def test_the_fields_show_violations(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    report = check_mismatch(write(tmp_path / "bad.jsonl", *rows_with(**changes)))
    assert {one["line"] for one in report["violations"]} == {3}
    assert reason in [one["reason"] for one in report["violations"]]
    with pytest.raises(GateError, match=r"bad.jsonl: line 3: ") as told:
        require_mismatched(report)
    assert told.value.exit_code == 10


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "a "}, "the answer is the question's own"),
        ({"answer": "y"}, "the answer is of a question of the same type, 'what'"),
        ({"answer": "new"}, "the answer is none of the source's"),
        ({"question": "what new"}, "the question is none of the source's"),
        ({"a_type": "why"}, "a_type is 'why'; the source's answer is of 'how'"),
    ],
)
@pytest.mark.parametrize("fields", [True, False])
def test_the_source_shows_more(
    tmp_path: Path, fields: bool, changes: dict[str, Any], reason: str
) -> None:
    """Rows without fields of their own can be looked up too."""
    bare = dict.fromkeys(("q_type", "a_type", "q_idx", "a_idx"))
    path = write(tmp_path / "bad.jsonl", *rows_with(**({} if fields else bare), **{
        key: value for key, value in changes.items() if fields or key != "a_type"
    }))  # fmt: skip
    found = check_mismatch(path, source=SOURCE)["violations"]
    if fields or "a_type" not in changes:
        assert {"line": 3, "reason": reason} in found
    else:
        assert found == []


def test_a_file_that_says_nothing_needs_its_source(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "plain.jsonl")
    with pytest.raises(MismatchError, match=r"no row has an a_type .*; give the data it was"):
        check_mismatch(path)
    found = check_mismatch(path, source=PAIRS)["violations"]
    assert len(found) == len(PAIRS)
    assert {one["reason"] for one in found} == {"the answer is the question's own"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_type": 3}, "line 3: q_type is 3; expected text"),
        ({"a_idx": "3"}, "line 3: a_idx is '3'; expected an integer"),
        ({"a_idx": True}, "line 3: a_idx is True; expected an integer"),
        ({"answer": None}, "line 3: fields question, q_type"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        check_mismatch(write(tmp_path / "bad.jsonl", *rows_with(**changes)))


def test_other_keywords_check_other_types(tmp_path: Path) -> None:
    words = {"one": ["1"], "two": ["2"]}
    path = write(tmp_path / "m.jsonl", {"question": "1", "answer": "x", "a_type": "two"})
    assert check_mismatch(path, keywords=words)["violations"] == []
    found = check_mismatch(path)["violations"]
    assert found == [{"line": 1, "reason": "a_type is 'two', which is no type"}]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    write_pairs(tmp_path / "qa.jsonl")
    (tmp_path / "words.toml").write_text('tell = ["tell"]\n')
    write(tmp_path / "bad.jsonl", *rows_with(a_type="what", a_idx=7))

    def arguments(*more: str) -> list[str]:
        return ["mismatch", *(str(tmp_path / m) if ".j" in m or ".t" in m else m for m in more)]

    return arguments


def test_the_command_writes_what_the_function_makes(
    files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = files("qa.jsonl", "-o", "out.jsonl", "--size", "20", "--seed", "5", "--json")
    assert run_wsurg([*given, *files("--keywords", "words.toml")[1:]]) == 0
    report = json.loads(capsys.readouterr().out)
    words = read_keywords(tmp_path / "words.toml")
    rows = mismatch(PAIRS, size=20, seed=5, keywords=words)
    out = tmp_path / "out.jsonl"
    assert [Mismatched(**json.loads(line)) for line in out.read_text().splitlines()] == rows
    expected = describe_mismatched(PAIRS, rows, keywords=words)
    places = {"out": str(out), "data": str(tmp_path / "qa.jsonl"), "seed": 5}
    assert report == {**expected, **places}
    record = json.loads((tmp_path / "out.jsonl.wsurg-record.json").read_text("utf-8"))
    assert record["recipe"]["settings"] == {"size": 20, "seed": 5, "keywords": expected["keywords"]}
    assert record["report"]["mismatch"]["pairs"] == expected["pairs"]
    assert run_wsurg(given) == PolicyError.exit_code
    assert run_wsurg([*given, "--overwrite"]) == 0


def test_the_command_shows_the_pairs(
    files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg(files("qa.jsonl", "-o", "out.jsonl", "--size", "24")) == 0
    shown = capsys.readouterr().out
    assert "Pairs of types" in shown
    assert "out.jsonl, 24 rows" in shown
    assert run_wsurg(files("qa.jsonl", "--check", "out.jsonl")) == 0
    shown = capsys.readouterr().out
    assert "violations  0" in shown
    assert "fields and source" in shown


def test_the_check_s_exit_code_is_that_of_a_failed_gate(
    files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg(files("--check", "bad.jsonl")) == 10
    assert "question and answer are both of type 'what'" in capsys.readouterr().out
    assert run_wsurg(files("--check", "bad.jsonl", "--json")) == 10
    report = json.loads(capsys.readouterr().out)
    assert report == check_mismatch(tmp_path / "bad.jsonl")
    assert run_wsurg(files("qa.jsonl", "--check", "qa.jsonl")) == 10
    assert "and 50 more; --json has all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        ([], 2, "QA is missing; or give --check FILE"),
        (["qa.jsonl"], 2, "-o is missing; or give --check FILE"),
        (["qa.jsonl", "-o", "out.jsonl"], 2, "--size is at most 70 for these data, not 300"),
        (["qa.jsonl", "-o", "out.jtxt"], 2, "give a name ending in .jsonl"),
        (["qa.jsonl", "-o", "qa.jsonl", "--overwrite"], 5, "overlap the input"),
        (["absent.jsonl", "-o", "out.jsonl"], 6, "absent.jsonl: cannot open"),
        (["--check", "bad.jsonl", "--size", "3"], 2, "--size is not for --check"),
        (["--check", "bad.jsonl", "-o", "out.jsonl"], 2, "--out is not for --check"),
        (["--check", "bad.jsonl", "--overwrite"], 2, "--overwrite is not for --check"),
        (["--check", "qa.jsonl"], 4, "no row has an a_type"),
        (["--check", "bad.jsonl"], 10, "line 3: question and answer are both of type 'what'"),
    ],
)
def test_the_command_refuses(
    files: Callable[..., list[str]], tmp_path: Path, more: list[str], code: int, reason: str
) -> None:
    before = hostile.contents(tmp_path)
    found = refusal(files(*more))
    assert reason in found[1]
    assert found[0] == code
    assert hostile.contents(tmp_path) == before
