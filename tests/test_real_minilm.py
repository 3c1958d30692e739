"""The commands on real weights: MiniLM, and a classifier trained from it for a few steps."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "minilm_pair.py"
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
HEAD = ["classifier.bias", "classifier.weight"]
SUBJECTS = ["plot", "camera", "soundtrack", "dialogue", "editing", "cast"]
VERDICTS = {"superb": 1, "moving": 1, "delightful": 1, "dreadful": 0, "tedious": 0, "clumsy": 0}
SENTENCES = [
    (f"The {subject} of this film is {verdict}.", label)
    for subject, (verdict, label) in itertools.product(SUBJECTS, VERDICTS.items())
]


def wsurg(*arguments: str | Path) -> Any:
    """Run a command with `--json` and give back its report."""
    command = [sys.executable, "-m", "weightsurgery", *map(str, arguments), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Give the example script as a module."""
    spec = importlib.util.spec_from_file_location("minilm_pair", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Build a pair from the sentences above."""
    out = tmp_path_factory.mktemp("minilm")
    base, tuned = build(example, out)
    return SimpleNamespace(out=out, base=base, tuned=tuned)


def build(example: ModuleType, out: Path, **changes: Any) -> Any:
    settings = {"sentences": SENTENCES, "steps": 15, "batch_size": 16, "max_length": 16}
    return example.build_pair(out, progress=False, **(settings | changes))


@pytest.fixture(scope="module")
def drift(pair: SimpleNamespace) -> Any:
    """Compare the pair."""
    return wsurg("diff", pair.base, pair.tuned)


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_names_differ_by_the_prefix(pair: SimpleNamespace) -> None:
    assert not any(name.startswith("bert.") for name in tensors(pair.base))
    assert {n for n in tensors(pair.tuned) if not n.startswith("bert.")} == set(HEAD)


def test_the_architecture_is_known_and_all_but_the_head_pairs(drift: Any) -> None:
    coverage = drift["alignment"]["coverage"]
    assert coverage["architecture"] == "BertForSequenceClassification"
    assert (coverage["share"], coverage["unpaired"]) == (1.0, [])
    assert drift["alignment"]["eligible_tensors"] == len(drift["tensors"]) == 103


def test_head_is_kept_with_a_reason(drift: Any) -> None:
    kept = {entry["tensor"]: entry["reason"] for entry in drift["alignment"]["kept_from_tuned"]}
    assert kept == dict.fromkeys(HEAD, "a task head that BASE lacks")


def test_top_tokens_occur_in_the_training_sentences(pair: SimpleNamespace, drift: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.base, local_files_only=True)
    train = (pair.out / "train.tsv").read_text("utf-8").splitlines()[1:]
    ids = {i for row in train for i in tokenizer(row.split("\t")[0])["input_ids"]}
    seen = set(tokenizer.convert_ids_to_tokens(sorted(ids)))
    top = drift["top"]["tokens"]
    assert len(top) == 10
    assert {entry["tensor"] for entry in top} == {WORD_EMBEDDINGS}
    assert {entry["token"] for entry in top} <= seen
    assert {entry["token"] for entry in top} & VERDICTS.keys()


def test_only_rows_of_seen_tokens_drift(drift: Any) -> None:
    embedding = next(t for t in drift["tensors"] if t["tensor"] == WORD_EMBEDDINGS)
    words = {word for sentence, _ in SENTENCES for word in sentence.split()}
    assert 0 < embedding["changed_share"] < 2 * len(words) / embedding["shape"][0]


def test_mixed_model_loads_in_transformers(pair: SimpleNamespace, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record = wsurg("mix", pair.base, pair.tuned, "--ratio", "0.3", "-o", tmp_path / "mixed")
    assert 0 < record["effective_share"] < 0.3
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "mixed", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixed", local_files_only=True)
    encoded = tokenizer([SENTENCES[0][0]], return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(**encoded).logits
    assert logits.shape == (1, 2)
    assert torch.isfinite(logits).all()


def test_mixed_model_is_base_or_tuned_everywhere(pair: SimpleNamespace, tmp_path: Path) -> None:
    wsurg("mix", pair.base, pair.tuned, "--ratio", "0.3", "-o", tmp_path / "mixed")
    base, tuned, mixed = map(tensors, (pair.base, pair.tuned, tmp_path / "mixed"))
    assert mixed.keys() == tuned.keys()
    for name, block in mixed.items():
        counterpart = base.get(name.removeprefix("bert."), tuned[name])
        assert ((block == counterpart) | (block == tuned[name])).all(), name


def test_ratio_0_reproduces_tuned(pair: SimpleNamespace, tmp_path: Path) -> None:
    record = wsurg("mix", pair.base, pair.tuned, "--ratio", "0", "-o", tmp_path / "same")
    assert record["effective_share"] == 0
    tuned, same = tensors(pair.tuned), tensors(tmp_path / "same")
    assert same.keys() == tuned.keys()
    for name, block in same.items():
        assert (block.dtype, block.shape) == (tuned[name].dtype, tuned[name].shape), name
        assert block.tobytes() == tuned[name].tobytes(), name


def test_complete_pair_is_left_alone(example: ModuleType, pair: SimpleNamespace) -> None:
    weights = pair.tuned / "model.safetensors"
    before = weights.stat()
    assert build(example, pair.out) == (pair.base, pair.tuned)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


def test_unfinished_tuned_model_is_refused(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    with pytest.raises(example.PairError, match=r"tuned exists, but not the pair\.json"):
        build(example, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "tuned"]


def test_sentences_of_one_label_are_refused(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(example.PairError, match=r"labels 0 and 1, got 30 with labels \[1\]"):
        build(example, tmp_path, sentences=[("A fine film.", 1)] * 30)
    assert list(tmp_path.iterdir()) == []
