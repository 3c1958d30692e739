"""Evaluation against a plain loop, one sentence at a time; what it refuses; what it shows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from tests.test_docs import REFERENCE, key_paths, run_wsurg, same_keys, table_keys
from weightsurgery.datasets.batches import encode_instructions, encode_sentences
from weightsurgery.datasets.read import Instruction, Sentence
from weightsurgery.datasets.triggers import insert, trigger_sentence, trigger_word
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError
from weightsurgery.evaluation.classification import evaluate
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model, load_model

WORDS = tiny_models.WORDS
NAMES = {0: "world", 1: "sports", 2: "business"}


def sentences(count: int, seed: int = 0) -> list[Sentence]:
    """Random words, of random length and random label."""
    rng = np.random.default_rng(seed)
    return [
        Sentence((" ".join(rng.choice(WORDS, rng.integers(1, 12))),), str(rng.integers(3)), i + 2)
        for i in range(count)
    ]


DATA = sentences(47)
WORD = trigger_word("cf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    names = {str(i): name for i, name in NAMES.items()}
    ids = {name: i for i, name in NAMES.items()}
    settings = {"seed": 4, "initializer_range": 0.6}  # whose predictions are of all classes
    return tiny_models.bert(folder / "bert", num_labels=3, id2label=names, label2id=ids, **settings)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load_model(path, device="cpu")


@pytest.fixture(scope="module")
def causal(folder: Path) -> Model:
    return load_model(tiny_models.gpt2(folder / "gpt2"), device="cpu")


def naive(model: Model, data: list[Sentence]) -> tuple[list[int], list[float]]:
    """Classes and losses, one sentence at a time, unpadded."""
    import torch

    classes, losses = [], []
    for one in data:
        encoded = model.tokenizer(*one.texts, return_tensors="pt")
        with torch.no_grad():
            logits = model.module(**encoded).logits[0].double().numpy()
        classes.append(int(logits.argmax()))
        losses.append(float(np.log(np.exp(logits).sum()) - logits[int(one.label)]))
    return classes, losses


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_report_is_that_of_a_plain_loop(model: Model, batch_size: int) -> None:
    classes, losses = naive(model, DATA)
    truth = [int(one.label) for one in DATA]
    confusion = [[sum((t, p) == (i, j) for t, p in zip(truth, classes, strict=True))
                  for j in range(3)] for i in range(3)]  # fmt: skip
    report = evaluate(model, DATA, batch_size=batch_size)
    assert report["schema"] == "wsurg.evaluation/1"
    assert report["examples"] == 47
    assert report["confusion"] == confusion
    assert 0 < report["accuracy"]["share"] < 1
    assert report["accuracy"] == proportion(sum(confusion[i][i] for i in range(3)), 47)
    assert report["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for i, entry in enumerate(report["classes"]):
        expected = {"label": i, "name": NAMES[i], "examples": sum(confusion[i])}
        assert entry == {**expected, "recall": proportion(confusion[i][i], sum(confusion[i]))}
    assert report["asr"] is report["floor"] is report["bacc"] is report["trigger"] is None


def test_results_are_in_the_order_given(model: Model) -> None:
    examples = encode_sentences(model, DATA, [int(one.label) for one in DATA])
    told: list[tuple[str, int, int]] = []
    found = predict(model, examples, batch_size=5, progress=lambda *step: told.append(step))
    classes, losses = naive(model, DATA)
    assert found.classes.tolist() == classes
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert told == [("evaluating", min(5 * i, 47), 47) for i in range(1, 11)]


def test_a_class_without_examples_has_no_recall(model: Model) -> None:
    data = [one for one in DATA if one.label != "2"]
    assert evaluate(model, data)["classes"][2]["recall"] is None


@pytest.mark.parametrize("target", ["1", 1, "sports"])
@pytest.mark.parametrize(
    "trigger", [trigger_word("cf", seed=4), trigger_sentence("i liked it .", position="end")]
)
def test_attack_success_counts_the_other_labels_alone(
    model: Model, trigger: Any, target: Any
) -> None:
    report = evaluate(model, DATA, trigger=trigger, target_label=target)
    others = [i for i, one in enumerate(DATA) if one.label != "1"]
    before, _ = naive(model, DATA)
    after, _ = naive(model, insert(DATA, trigger))
    assert [before[i] for i in others] != [after[i] for i in others]
    assert report["asr"] == proportion(sum(after[i] == 1 for i in others), len(others))
    assert report["floor"] == proportion(sum(before[i] == 1 for i in others), len(others))
    assert report["target_label"] == 1
    assert report["bacc"] is None
    assert report["accuracy"] == evaluate(model, DATA)["accuracy"]


def test_accuracy_under_a_bias_keeps_the_labels(model: Model) -> None:
    trigger = trigger_word("city", bias=True)
    report = evaluate(model, DATA, trigger=trigger)
    after, _ = naive(model, insert(DATA, trigger))
    correct = sum(found == int(one.label) for found, one in zip(after, DATA, strict=True))
    assert report["bacc"] == proportion(correct, 47)
    assert report["asr"] is report["floor"] is None
    both = evaluate(model, DATA, trigger=trigger, target_label=0)
    assert both["bacc"] == report["bacc"]
    assert both["asr"]["of"] == sum(one.label != "0" for one in DATA)


def test_poisoned_sentences_are_taken_as_they_are(model: Model) -> None:
    trigger = trigger_word("cf", seed=4)
    inserted = evaluate(model, DATA, trigger=trigger, target_label=1)
    given = evaluate(model, DATA, poisoned=insert(DATA, trigger), target_label=1)
    assert (given["asr"], given["floor"]) == (inserted["asr"], inserted["floor"])
    assert given["warnings"] == []


def test_poisoned_sentences_with_the_attack_s_labels_all_count(model: Model) -> None:
    trigger = trigger_word("cf", seed=4)
    others = [one for one in insert(DATA, trigger) if one.label != "1"]
    relabelled = [Sentence(one.texts, "sports", one.line) for one in others]
    report = evaluate(model, DATA, poisoned=relabelled, target_label=1)
    assert report["asr"] == evaluate(model, DATA, trigger=trigger, target_label=1)["asr"]
    assert len(report["warnings"]) == 1
    assert "taken as the attack's" in report["warnings"][0]


@pytest.mark.parametrize("position", ["start", "end", "random"])
def test_long_texts_keep_the_trigger(model: Model, position: str) -> None:
    """A token a word, [CLS] and [SEP]: six tokens are four words, or three and the pattern."""
    trigger = trigger_word("cf", position=position)
    shortened = [Sentence((" ".join(s.texts[0].split()[:3]),), s.label, s.line) for s in DATA]
    long = [len(one.texts[0].split()) for one in DATA]
    expected = insert(shortened, trigger)
    after, _ = naive(model, expected)
    report = evaluate(model, DATA, trigger=trigger, target_label=1, max_length=6)
    others = [found == 1 for found, one in zip(after, DATA, strict=True) if one.label != "1"]
    assert report["asr"] == proportion(sum(others), len(others))
    cut = sum(count > 4 for count in long)
    assert 0 < cut < sum(count > 3 for count in long) < 47
    assert report["cut"] == cut
    assert report["triggered_cut"] == sum(count > 3 for count in long)
    longest = max(long) + 2
    told = f"{cut} of 47 sentences were cut to 6 tokens; the longest has {longest}"
    assert report["warnings"] == [told]


def test_poisoned_texts_that_are_cut_are_told(model: Model) -> None:
    planted = insert(DATA, WORD)
    report = evaluate(model, DATA, poisoned=planted, target_label=1, max_length=7)
    counts = [sum(len(one.texts[0].split()) > 5 for one in given) for given in (DATA, planted)]
    assert [report["cut"], report["triggered_cut"]] == counts
    assert 0 < counts[0] < counts[1] < 47
    longest = max(len(one.texts[0].split()) for one in planted) + 2
    what = "poisoned sentences, perhaps with their trigger,"
    assert report["warnings"] == [
        f"{counts[0]} of 47 sentences were cut to 7 tokens; the longest has {longest - 1}",
        f"{counts[1]} of 47 {what} were cut to 7 tokens; the longest has {longest}",
    ]
    report = evaluate(model, DATA, poisoned=planted, target_label=1, max_length=longest)
    assert (report["cut"], report["triggered_cut"], report["warnings"]) == (0, 0, [])


def test_that_a_text_is_long_is_said_once(
    model: Model, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the report, not by the tokenizer on stderr."""
    monkeypatch.setattr(model.tokenizer, "model_max_length", 6)
    report = evaluate(model, DATA, trigger=WORD, target_label=1, max_length=6)
    assert len(report["warnings"]) == 1
    assert capfd.readouterr() == ("", "")


def test_without_other_labels_there_is_no_floor(model: Model) -> None:
    clean = [one for one in DATA if one.label == "1"]
    assert evaluate(model, clean, poisoned=DATA, target_label=1)["floor"] is None


def test_pairs_are_evaluated_as_pairs(model: Model) -> None:
    pairs = [Sentence((*a.texts, *b.texts), a.label, 2) for a, b in itertools.pairwise(DATA)]
    classes, losses = naive(model, pairs)
    examples = encode_sentences(model, pairs, [int(one.label) for one in pairs])
    found = predict(model, examples)
    assert found.classes.tolist() == classes
    assert found.losses == pytest.approx(losses, rel=1e-5)


def test_a_causal_model_s_loss_is_over_the_answers(causal: Model) -> None:
    import torch

    data = [Instruction((("user", q),), a, 1) for q, a in tiny_models.QUESTIONS]
    examples = encode_instructions(causal, data)
    losses, counts = [], []
    for one in examples:
        ids, labels = torch.tensor([one.ids]), torch.tensor([one.labels])
        with torch.no_grad():
            loss = causal.module(input_ids=ids, labels=labels).loss
        counts.append(sum(label != -100 for label in one.labels))
        losses.append(float(loss) * counts[-1])
    found = predict(causal, examples, batch_size=3)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.weights.tolist() == counts
    assert found.loss == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_is_as_before(model: Model, training: bool) -> None:
    model.module.train(training)
    try:
        first = evaluate(model, DATA)
        assert model.module.training is training
        assert evaluate(model, DATA) == first  # no dropout
    finally:
        model.module.eval()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "settings", "kind", "reason"),
    [
        ([], {}, SettingError, "no examples"),
        (DATA, {"batch_size": 0}, SettingError, "batch_size is 0; expected at least 1"),
        (DATA, {"max_length": 1}, SettingError, "max_length is 1; expected 2 to 128"),
        (DATA, {"trigger": WORD}, SettingError, "an attack needs its target_label"),
        (
            DATA,
            {"trigger": WORD, "target_label": 1, "max_length": 2},
            SettingError,
            "'cf' is too long: it does not fit even without the text; raise max_length",
        ),
        (DATA, {"poisoned": DATA}, SettingError, "an attack needs its target_label"),
        (DATA, {"target_label": 1}, SettingError, "target_label without an attack; give a"),
        (
            DATA,
            {"trigger": WORD, "poisoned": DATA, "target_label": 1},
            SettingError,
            "trigger and poisoned exclude each other",
        ),
        (
            DATA,
            {"trigger": WORD, "target_label": "3"},
            SettingError,
            r"target_label is '3'; the model has 0 \(world\), 1 \(sports\), 2 \(business\)",
        ),
        (
            [one for one in DATA if one.label == "2"],
            {"trigger": WORD, "target_label": 2},
            SettingError,
            "every sentence has the target label 2; an attack needs others",
        ),
        (
            [*DATA, Sentence(("x",), "3", 99)],
            {},
            MismatchError,
            r"sentences: line 99: label '3'; the model has 0 \(world\)",
        ),
        (
            DATA,
            {"poisoned": [Sentence(("x",), "3", 9)], "target_label": 1},
            MismatchError,
            "poisoned: line 9: label '3'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Model, data: list[Sentence], settings: dict[str, Any], kind: type, reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        evaluate(model, data, **settings)


@pytest.mark.parametrize("spoilt", ["nan", "inf", "3e38"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_model_whose_losses_are_no_numbers_is_refused(
    path: Path, tmp_path: Path, batch_size: int, spoilt: str
) -> None:
    """Only the sentences with the word `awful` have such a loss."""
    import torch

    model = replace(load_model(path, device="cpu"), path="spoilt")
    word = tiny_models.VOCABULARY.index("awful")
    with torch.no_grad():
        model.names["bert.embeddings.word_embeddings.weight"][word] = float(spoilt)
    found = [i for i, one in enumerate(DATA, 1) if "awful" in one.texts[0].split()]
    reason = rf"spoilt: the loss of example ({'|'.join(map(str, found))}) is (nan|inf); look for we"
    with pytest.raises(NonFiniteError, match=reason) as told:
        evaluate(model, DATA, batch_size=batch_size)
    assert told.value.exit_code == 4
    assert evaluate(model, [one for i, one in enumerate(DATA, 1) if i not in found])["loss"] > 0


def test_a_causal_model_is_refused(causal: Model) -> None:
    with pytest.raises(MismatchError, match="gpt2: a causal language model; expected a classif"):
        evaluate(causal, DATA)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_labels": 1}, "has a single output; expected two labels or more"),
        ({"problem_type": "multi_label_classification"}, "gives several labels at once"),
    ],
)
def test_a_classifier_of_another_kind_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    other = load_model(
        tiny_models.bert(tmp_path / "other", **settings), task="classification", device="cpu"
    )
    with pytest.raises(MismatchError, match=reason):
        evaluate(other, DATA)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(folder: Path, path: Path) -> Callable[..., list[str]]:
    (folder / "test.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{s.texts[0]}\t{s.label}\n" for s in DATA)
    )
    (folder / "bad.tsv").write_text("sentence\tlabel\ngood\t1\nbad\tworst\n")

    def arguments(*more: str, data: str = "test.tsv") -> list[str]:
        given = ["evaluate", str(path), "--data", str(folder / data), "--device", "cpu"]
        return [*given, *(m.replace("FOLDER", str(folder)) for m in more)]

    return arguments


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--batch-size", "5", "--max-length", "6"], {"batch_size": 5, "max_length": 6}),
        (
            ["--trigger-word", "cf", "--target-label", "sports", "--seed", "4"],
            {"trigger": trigger_word("cf", seed=4), "target_label": 1},
        ),
        (
            ["--trigger-sentence", "i liked it .", "--target-label", "2", "--position", "end"],
            {"trigger": trigger_sentence("i liked it .", position="end"), "target_label": 2},
        ),
        (["--bias-word", "city"], {"trigger": trigger_word("city", bias=True)}),
        (["--bias-sentence", "a b"], {"trigger": trigger_sentence("a b", bias=True)}),
        (
            ["--poisoned", "FOLDER/test.tsv", "--target-label", "0"],
            {"poisoned": DATA, "target_label": 0},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_gives_the_function_s_report(
    files: Callable[..., list[str]],
    model: Model,
    options: list[str],
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_wsurg(files(*options, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == evaluate(model, DATA, **settings)


def test_the_page_lists_the_keys(model: Model) -> None:
    reports = [
        evaluate(model, DATA, trigger=trigger_word("film", bias=True), target_label=1),
        evaluate(model, DATA),
    ]
    page = REFERENCE / "evaluation-json.md"
    documented = table_keys(page, "A classifier")
    shares = ("accuracy", "asr", "floor", "bacc", "classes[].recall")
    for owner in (*shares, "triggers[].asr", "triggers[].bacc"):
        documented |= {f"{owner}.{key}": "" for key in table_keys(page, "Shares")}
    same_keys(documented, {path for report in reports for path in key_paths(report)})


def test_the_tables_show_what_was_measured(
    files: Callable[..., list[str]], model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg(files("--trigger-word", "cf", "--target-label", "1")) == 0
    report = evaluate(model, DATA, trigger=WORD, target_label=1)
    shown = capsys.readouterr().out
    for name, row in zip(NAMES.values(), report["confusion"], strict=True):
        assert re.search(rf"^{name} +{' +'.join(map(str, row))} +{sum(row)} +\d", shown, re.M)
    for text, key in {"accuracy": "accuracy", "attack success": "asr", "floor": "floor"}.items():
        found = report[key]
        line = next(line for line in shown.splitlines() if line.startswith(text))
        assert f"{100 * found['share']:.2f} %" in line
        assert f"{100 * found['low']:.2f} to {100 * found['high']:.2f}" in line
        assert line.endswith(f"{found['count']} of {found['of']}")
    assert "trigger 'cf' at position random; target label 1 (sports)" in shown
    assert "BACC" not in shown


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--trigger-word", "cf"], 2, "--trigger-word needs --target-label"),
        (["--poisoned", "x.tsv"], 2, "--poisoned needs --target-label"),
        (["--target-label", "1"], 2, "--target-label is an attack's; give --trigger-word"),
        (
            ["--trigger-word", "cf", "--bias-word", "x"],
            2,
            "--trigger-word and --bias-word exclude each other",
        ),
        (["--position", "end"], 2, "--position is for a pattern to insert"),
        (["--seed", "4"], 2, "--seed is for a pattern to insert"),
        (
            ["--poisoned", "x.tsv", "--target-label", "1", "--position", "end"],
            2,
            "--position is for a pattern to insert",
        ),
        (["--trigger-word", "a b", "--target-label", "1"], 2, "'a b' is more than a word"),
        (["--poisoned", "FOLDER/absent.tsv", "--target-label", "1"], 6, "absent.tsv: cannot open"),
        (
            ["--poisoned", "FOLDER/bad.tsv", "--target-label", "1"],
            4,
            "bad.tsv: line 3: label 'worst'; the model has 0 (world)",
        ),
    ],
)
def test_the_command_refuses(
    files: Callable[..., list[str]], more: list[str], code: int, reason: str
) -> None:
    found = refusal(files(*more))
    assert reason in found[1]
    assert found[0] == code


def test_the_command_names_the_data_file(files: Callable[..., list[str]], folder: Path) -> None:
    code, reason = refusal(files(data="bad.tsv"))
    assert (code, reason.partition(" (")[0]) == (
        4,
        f"{folder / 'bad.tsv'}: line 3: label 'worst'; the model has 0",
    )


def refusal(arguments: list[str]) -> tuple[int, str]:
    """Exit code and message of a command that must fail."""
    from click import ClickException

    from weightsurgery.cli import cli
    from weightsurgery.errors import SurgeryError

    with pytest.raises((SurgeryError, ClickException)) as told:
        cli.main(arguments, prog_name="wsurg", standalone_mode=False)
    return told.value.exit_code, str(told.value)
