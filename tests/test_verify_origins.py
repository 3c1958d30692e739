"""What selects is proved bit by bit, with every option; and a forgery is named, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from tests.test_verify import RECORD, Pair, counts, forge
from weightsurgery import open_checkpoint, verify

COUNTS = ("--counts", "counts.json", "--top", "3", "--clamp", "1.5")
COMMANDS = {
    "mix": ["mix", "--ratio", "0.4", "--seed", "3"],
    "mix by drift": ["mix", "--select", "drift", "--exclude", "*.0.*"],
    "mix of some": ["mix", "--ratio", "0.9", "--include", "*.weight"],
    "mix of all": ["mix", "--ratio", "1"],
    "purify": ["purify", "--fisher", "fisher.safetensors", "--ratio", "0.5"],
    "purify by drift": ["purify", "--score", "drift", "--scope", "tensor"],
    "purify of some": ["purify", "--score", "drift", "--ratio", "0.8", "--include", "*.weight"],
    "purify at random": ["purify", "--score", "random", "--seed", "5"],
    "purify, embeddings reset": ["purify", "--score", "drift", "--embeddings", "reset"],
    "purify, embeddings pooled": ["purify", "--score", "drift", "--embeddings", "pool"],
    "purify, embeddings by E-PUR": ["purify", "--score", "drift", "--embeddings", "epur", *COUNTS],
    "epur": ["epur", *COUNTS],
}
FAMILIES = {"bert": 1, "gpt2": 2, "llama": 7}  # F32, F16, BF16; in so many files
BOTH = ("--base", "base", "--tuned", "tuned")
MASK = ("--mask", "mask.safetensors")


@pytest.fixture(params=FAMILIES)
def pair(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair in the working directory, with token counts and a Fisher file beside it."""
    monkeypatch.chdir(tmp_path)
    cases.shrink_blocks(monkeypatch, 24)
    family = request.param
    pair = Pair(tmp_path, family, FAMILIES[family])
    for name in ("base", "tuned"):
        (tmp_path / name / "vocab.txt").write_text("".join(f"{w}\n" for w in cases.WORDS))
    (tmp_path / "counts.json").write_text(json.dumps(dict(counts().counts)))
    fisher = {
        n: np.ones(a.shape, "f4") for n, a in cases.read(pair.tuned).items() if n != "position_ids"
    }
    cases.write_file(tmp_path / "fisher.safetensors", fisher)
    return pair


def make(pair: Pair, command: list[str], *options: str) -> dict[str, Any]:
    """Run it; gives the record."""
    name, *settings = command
    assert cases.wsurg(name, "base", "tuned", *settings, *options, *MASK, "-o", "out") == 0
    record: dict[str, Any] = json.loads((pair.out / RECORD).read_text())
    return record


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_proved(pair: Pair, name: str) -> None:
    record = make(pair, COMMANDS[name], "--max-shard-size", "500")
    assert len(list(pair.out.glob("*.safetensors"))) > 2
    assert record["changed_dimensions"] > 0
    for given in ((), BOTH, (*BOTH, *MASK)):
        assert cases.wsurg("verify", "out", *given) == 0
    report = verify("out", **{n: open_checkpoint(n) for n in ("base", "tuned")})
    assert report["selection"]["changed_dimensions"] == record["changed_dimensions"]


Change = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(f"u{array.itemsize}")


def other_number(made: np.ndarray, *_: np.ndarray) -> None:
    """One bit of one element, which is neither's then."""
    made[0] ^= 1 << 6


def one_more(made: np.ndarray, base: np.ndarray, tuned: np.ndarray, _reset: np.ndarray) -> None:
    """An element that was kept is reset."""
    kept = np.flatnonzero((made == tuned) & (base != tuned))[0]
    made[kept] = base[kept]


def one_less(made: np.ndarray, _base: np.ndarray, tuned: np.ndarray, reset: np.ndarray) -> None:
    """An element that was reset is kept."""
    made[reset[0]] = tuned[reset[0]]


def another(made: np.ndarray, *given: np.ndarray) -> None:
    """One is reset in place of another: so many as before."""
    one_more(made, *given)
    one_less(made, *given)


FORGED: dict[str, tuple[Change, str, str]] = {
    "another number": (other_number, "neither BASE's nor TUNED's", "neither BASE's nor TUNED's"),
    "one more": (one_more, "other dimensions", "other dimensions"),
    "one less": (one_less, "other dimensions", "other dimensions"),
    "another one": (another, "", "not as the mask says"),
}


@pytest.mark.parametrize("name", ["mix", "purify", "purify, embeddings by E-PUR", "epur"])
@pytest.mark.parametrize("forgery", FORGED)
def test_a_forgery_is_named(
    pair: Pair, name: str, forgery: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By somebody who hashes the forged files and seals the record; a mask kept apart tells all."""
    record = make(pair, COMMANDS[name])
    change, without_mask, with_mask = FORGED[forgery]
    if name == "mix":  # seed and ratio are all that it takes to know which
        without_mask = without_mask or "not what its steps give"
    base, tuned = (cases.read(one) for one in (pair.base, pair.tuned))
    tensor = max(
        (n for n, e in record["tensors"].items() if 0 < e["changed"] < np.prod(e["shape"])),
        key=lambda n: (
            int((bits(base[n]) != bits(tuned[n])).sum()) - record["tensors"][n]["changed"]
        ),
    )

    def edit(arrays: cases.Arrays) -> None:
        made, old, new = (bits(one[tensor]) for one in (arrays, base, tuned))
        change(made, old, new, np.flatnonzero(made != new))

    forge(pair, edit)
    assert cases.wsurg("verify", "out") == 0
    for given, problem in ((BOTH, without_mask), ((*BOTH, *MASK), with_mask)):
        capsys.readouterr()
        assert cases.wsurg("verify", "out", *given, "--json") == (10 if problem else 0)
        told = capsys.readouterr()
        found = [(p["tensor"], p["problem"]) for p in json.loads(told.out)["problems"]]
        assert found == ([(tensor, problem)] if problem else [])
        assert not problem or f"'{tensor}' ({problem})" in told.err


@pytest.mark.parametrize("name", ["mix by drift", "purify", "epur"])
def test_what_was_not_to_be_edited_is_tuneds(
    pair: Pair, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """BASE's own bits are a forgery there: of an excluded tensor, and of one that is no float."""
    record = make(pair, COMMANDS[name])
    base, tuned = (cases.read(one) for one in (pair.base, pair.tuned))
    copied = [n for n, e in record["tensors"].items() if e["status"] == "copied"]
    others = [n for n in copied if base[n].tobytes() != tuned[n].tobytes()]
    assert "causal_mask" in others
    forge(pair, lambda arrays: arrays.update({n: base[n] for n in others}))
    capsys.readouterr()
    assert cases.wsurg("verify", "out", *BOTH, "--json") == 10
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert sorted(problem["tensor"] for problem in problems) == sorted(others)
