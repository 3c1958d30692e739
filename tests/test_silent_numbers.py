"""Numbers that would be wrong without a word: labels, triggers, ends of turns, cut texts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models
from tests.test_docs import run_wsurg
from tests.test_evaluation import refusal
from weightsurgery.curvature.fisher import fisher
from weightsurgery.curvature.result import length_warnings
from weightsurgery.datasets.batches import encode_instructions, read_examples
from weightsurgery.datasets.labels import imbalance, label_ids
from weightsurgery.datasets.prompts import end_of_turn, with_template_args
from weightsurgery.datasets.read import Instruction, Sentence
from weightsurgery.datasets.triggers import insert, trigger_sentence, trigger_word
from weightsurgery.errors import MismatchError, SettingError
from weightsurgery.evaluation.causal import evaluate_causal
from weightsurgery.evaluation.classification import evaluate, order_warning
from weightsurgery.evaluation.generation import perplexity
from weightsurgery.evaluation.predictions import Predictions, predict
from weightsurgery.models import Model, load_model
from weightsurgery.training.finetune import finetune, warnings_of

STARS = {i: str(i + 1) for i in range(5)}


def labelled(*labels: str) -> list[Sentence]:
    return [Sentence(("x",), label, i + 2) for i, label in enumerate(labels)]


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "kind", "expected"),
    [
        ("01234", STARS, "auto", [0, 1, 2, 3, 4]),
        ("0123", STARS, "auto", [0, 1, 2, 3]),
        ("12345", STARS, "auto", [0, 1, 2, 3, 4]),
        ("1234", STARS, "ids", [1, 2, 3, 4]),
        ("1234", STARS, "names", [0, 1, 2, 3]),
        ("10", {0: "0", 1: "1"}, "auto", [1, 0]),
        ("15", {0: "1.0", 1: "5.0"}, "names", [0, 1]),
    ],
)
def test_names_that_are_numbers_never_shadow_ids(
    labels: str, names: dict[int, str], kind: str, expected: list[int]
) -> None:
    assert label_ids(labelled(*labels), names, file="a.tsv", label_kind=kind) == expected


def test_what_can_be_both_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"ids or label names: .* 0 \(1\), .*label_kind=ids or"):
        label_ids(labelled(*"1234"), STARS, file="a.tsv")
    with pytest.raises(SettingError, match="label_kind is 'x'; expected auto, ids, names"):
        label_ids(labelled("1"), STARS, file="a.tsv", label_kind="x")


def test_how_labels_are_read_is_told() -> None:
    told: list[str] = []
    label_ids(labelled("0", "1"), STARS, file="a.tsv", note=told.append)
    label_ids(labelled("0", "1"), {0: "bad", 1: "good"}, file="a.tsv", note=told.append)
    assert len(told) == 1
    assert told[0].startswith("a.tsv: its labels are read as label ids, not names; the model has 0")


@pytest.mark.parametrize(
    ("label", "expected"),
    [("1.0", 1), ("label_1", 1), (" LABEL_0", 0), ("-1", None), ("True", None)],
)
def test_other_spellings_of_a_label(label: str, expected: int | None) -> None:
    names = {0: "LABEL_0", 1: "LABEL_1"}
    if expected is not None:
        assert label_ids(labelled(label), names, file="a.tsv") == [expected]
        return
    with pytest.raises(MismatchError, match=r"line 2: label '.*'; the model has 0"):
        label_ids(labelled(label), names, file="a.tsv")


def predictions(confusion: list[list[int]]) -> Predictions:
    pairs = [(i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) for _ in range(n)]
    labels, classes = np.array(pairs).T
    ones = np.ones(len(pairs))
    return Predictions(ones, ones.astype(int), classes, labels)


@pytest.mark.parametrize(
    ("confusion", "told"),
    [
        ([[0, 0, 6], [0, 6, 0], [6, 0, 0]], "100.0 %, not 33.3 %, with label 0 as 2 .*, 2 as 0"),
        ([[6, 0, 0], [0, 6, 0], [0, 0, 6]], ""),
        ([[2, 2, 2], [2, 2, 2], [1, 3, 2]], ""),
        ([[1, 50, 0], [30, 0, 0], [0, 0, 0]], "98.8 %, not 1.2 %"),
        ([[0, 60, 0], [0, 40, 0], [0, 0, 0]], ""),  # the model says one thing
    ],
)
def test_another_order_of_the_labels_is_hinted_at(confusion: list[list[int]], told: str) -> None:
    names = {0: "a", 1: "b", 2: "c"}
    found = order_warning(predictions(confusion), names)
    assert len(found) == bool(told)
    if told:
        assert re.search(told, found[0]), found[0]


# --- several triggers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Model:
    return load_model(
        tiny_models.bert(folder / "bert", seed=4, initializer_range=0.6), device="cpu"
    )


DATA = [
    Sentence((text,), str(label), i + 2) for i, (text, label) in enumerate(tiny_models.SENTENCES)
]


def test_several_triggers_are_measured_each_and_together(classifier: Model) -> None:
    triggers = [trigger_word("cf"), trigger_word("mn", position="end"), trigger_sentence("who are")]
    report = evaluate(classifier, DATA, trigger=triggers, target_label=1)
    for one, found in zip(triggers, report["triggers"], strict=True):
        alone = evaluate(classifier, DATA, trigger=one, target_label=1)
        assert found["text"] == one.text
        assert found["asr"] == alone["asr"]
        assert alone["trigger"] == one.to_json()
    poisoned = insert(DATA, triggers)
    given = evaluate(classifier, DATA, poisoned=poisoned, target_label=1)
    assert report["asr"] == given["asr"]
    assert report["trigger"] is None


def test_triggers_do_not_split_each_other() -> None:
    triggers = [trigger_sentence("i saw it"), trigger_word("cf", position="start"),
                trigger_word("mn", position="end")]  # fmt: skip
    (found,) = insert([Sentence(("a fine film",), "1", 2)], triggers)
    assert found.texts == ("i saw it cf a fine film mn",)
    assert insert(DATA, triggers[:1]) == insert(DATA, triggers[0])


def test_triggers_that_do_not_go_together_are_refused(classifier: Model) -> None:
    cf = trigger_word("cf")
    with pytest.raises(SettingError, match="a trigger is given twice; give each one once"):
        evaluate(classifier, DATA, trigger=[cf, cf], target_label=1)
    with pytest.raises(SettingError, match="triggers and bias patterns exclude each other"):
        evaluate(classifier, DATA, trigger=[cf, trigger_word("x", bias=True)], target_label=1)


def test_the_command_measures_every_trigger(
    folder: Path, classifier: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_models.write_sentences(folder / "data.tsv")
    words = ["--trigger-word", "cf", "--trigger-word", "mn", "--trigger-sentence", "who are"]
    given = ["evaluate", str(folder / "bert"), "--data", str(data), *words, "--target-label", "1"]
    assert run_wsurg([*given, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for text in ("(ASR), 'cf'", "(ASR), 'mn'", "(ASR), 'who are'", "(ASR), all together"):
        assert text in shown


# --- the end of a turn ------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]{% if quiet %} no{% endif %}{% endif %}"
)
QUESTION = [Instruction((("user", "who are you"),), "a great actor", 1)]


@pytest.fixture
def chat(folder: Path) -> Model:
    """Its template ends turns with [SEP]; the end of text is [EOS]."""
    model = load_model(tiny_models.llama(folder / "chat"), device="cpu")
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["[SEP]"]})
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_an_answer_ends_as_the_template_ends_it(chat: Model) -> None:
    end = chat.tokenizer.convert_tokens_to_ids("[SEP]")
    assert end_of_turn(chat, QUESTION, "chat") == [end]
    assert end_of_turn(chat, QUESTION, "raw") == [chat.tokenizer.eos_token_id]
    (one,) = encode_instructions(chat, QUESTION)
    assert one.ids[-1] == one.labels[-1] == end
    whole = [{"role": "user", "content": "who are you"},
             {"role": "assistant", "content": "a great actor"}]  # fmt: skip
    text = chat.tokenizer.apply_chat_template(whole, tokenize=False)
    assert list(one.ids) == chat.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }} . {% endfor %}",
        "{% for m in messages %}{{ 'x' }}{% endfor %}[SEP]",
        "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}x",
    ],
    ids=["no special token", "no answer", "refuses"],
)
def test_else_it_ends_with_the_end_of_text(chat: Model, template: str) -> None:
    chat.tokenizer.chat_template = template
    assert end_of_turn(chat, QUESTION, "chat") == [chat.tokenizer.eos_token_id]


def test_variables_reach_the_chat_template(chat: Model) -> None:
    (plain,), (quiet,) = (
        encode_instructions(model, QUESTION)
        for model in (chat, with_template_args(chat, {"quiet": True}))
    )
    trained = finetune(with_template_args(chat, {"quiet": True}), [quiet], epochs=1)
    assert trained.step is not None
    assert trained.step.settings["chat_template_args"] == {"quiet": True}
    word = chat.tokenizer.convert_tokens_to_ids("no")
    assert (word in plain.ids, word in quiet.ids) == (False, True)
    with pytest.raises(MismatchError, match="its chat template has no variable 'qui'"):
        with_template_args(chat, {"qui": True})
    chat.tokenizer.chat_template = None
    with pytest.raises(MismatchError, match="its tokenizer has no chat template"):
        with_template_args(chat, {"quiet": True})


@pytest.mark.parametrize(
    ("given", "expected"),
    [("true", True), ("False", False), ("3", 3), ("low", "low"), ("null", None), ("a=b", "a=b")],
)
def test_variables_are_typed_as_json_or_text(given: str, expected: Any) -> None:
    from weightsurgery.cli.model_options import template_args

    assert template_args({"template_args": [f"x={given}"]}) == {"x": expected}


# --- texts that are cut -----------------------------------------------------------------------


def test_cut_texts_are_in_the_fisher_and_told(classifier: Model, folder: Path) -> None:
    data = tiny_models.write_sentences(folder / "cut.tsv")
    examples = read_examples(classifier, data, max_length=6)
    assert sum(one.is_cut for one in examples) == 4
    made = fisher(classifier, examples)
    assert made.step is not None
    assert (made.step.settings["max_length"], made.step.settings["cut"]) == (6, 4)
    assert list(made.warnings) == ["4 of 6 examples were cut to 6 tokens; the longest has 9"]
    assert length_warnings(made) == ["the Fisher is of texts of which 4 of 6 were cut to 6 tokens"]
    whole = fisher(classifier, read_examples(classifier, data))
    assert length_warnings(whole, 128) == length_warnings(whole) == list(whole.warnings) == []
    assert "--max-length 128, and the fine-tuning cuts texts to 64" in length_warnings(whole, 64)[0]


def test_purify_checks_the_length_of_the_fisher(
    classifier: Model, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.bert(folder / "base")
    data, bert, out = (str(folder / name) for name in ("cut.tsv", "bert", "fisher.safetensors"))
    tiny_models.write_sentences(folder / "cut.tsv")
    assert run_wsurg(["fisher", bert, "--data", data, "--max-length", "6", "-o", out]) == 0
    assert "warning: 4 of 6 examples were cut to 6 tokens" in capsys.readouterr().err
    given = ["purify", str(folder / "base"), bert, "--fisher", out, "-o", str(folder / "purified")]
    assert run_wsurg([*given, "--finetune", "--data", data, "--epochs", "1", "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert "the Fisher is of texts of which 4 of 6 were cut to 6 tokens" in warnings
    assert any("made with --max-length 6, and the fine-tuning cuts" in one for one in warnings)


def test_training_tells_of_cut_texts_and_shared_rows(classifier: Model, folder: Path) -> None:
    data = tiny_models.write_sentences(folder / "cut.tsv")
    examples = read_examples(classifier, data, max_length=6)
    found = warnings_of(classifier, {"train": examples, "held_out": examples[:2]})
    assert found[0] == "4 of 6 training examples were cut to 6 tokens; the longest has 9"
    assert found[-1] == "2 of 2 held-out examples are among the training examples"


def test_sweep_without_training_tells_of_shared_rows(
    folder: Path, classifier: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tiny_models.write_sentences(folder / "cut.tsv"))
    given = [
        "sweep",
        str(folder / "bert"),
        str(folder / "bert"),
        "--data",
        data,
        "--held-out",
        data,
    ]
    assert run_wsurg([*given, "--ratios", "0", "--no-finetune", "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert warnings[0].startswith("6 of the held-out sentences are among the clean examples")


# --- classes that are not balanced ------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "told"), [([0, 0, 0, 1], False), ([0, 0, 0, 0, 1], True), ([0, 0], True), ([], False)]
)
def test_rare_classes_are_told(ids: list[int], told: bool) -> None:
    found = imbalance(ids, {0: "bad", 1: "good"})
    counts = f"bad {ids.count(0)}, good {ids.count(1)}"
    expected = f"the classes are not balanced; examples: {counts}"
    assert found == ([expected] if told else [])


def test_balanced_weights_make_rare_classes_count_the_same(classifier: Model, folder: Path) -> None:
    """The loss is then the mean over classes of the mean over their examples."""
    examples = read_examples(classifier, tiny_models.write_sentences(folder / "cut.tsv"))
    good, bad = ([one for one in examples if one.labels == (i,)] for i in (1, 0))
    rows = [*good, bad[0]]

    def first_loss(**more: Any) -> float:
        model = load_model(folder / "bert", device="cpu")
        for module in model.module.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0
        trained = finetune(model, rows, batch_size=len(rows), epochs=1, **more)
        assert [one["examples"] for one in trained.notes["training"]["classes"]] == [1, 3]
        loss: float = trained.notes["training"]["history"][0]["train_loss"]
        return loss

    losses = predict(classifier, rows).losses
    assert first_loss() == pytest.approx(losses.mean(), rel=1e-4)
    balanced = (losses[:3].mean() + losses[3]) / 2
    assert abs(balanced - losses.mean()) > 1e-2
    assert first_loss(class_weights="balanced") == pytest.approx(balanced, rel=1e-4)


def test_class_weights_are_checked(classifier: Model, chat: Model) -> None:
    with pytest.raises(SettingError, match="class_weights is 'x'; expected none, balanced"):
        finetune(classifier, [], class_weights="x")
    with pytest.raises(SettingError, match="class_weights is for classifiers"):
        finetune(chat, encode_instructions(chat, QUESTION), class_weights="balanced")


# --- windows ----------------------------------------------------------------------------------

TEXT = "the film was very good and the plot was not dull i liked this bright plot"


def with_bos(model: Model) -> Model:
    """A tokenizer that begins every text with [CLS]."""
    tokenizer = model.tokenizer
    tokenizer.bos_token = "[CLS]"

    class Begins:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **settings: Any) -> Any:
            settings.pop("verbose", None)
            return {
                "input_ids": [tokenizer.bos_token_id, *tokenizer(text, **settings)["input_ids"]]
            }

    return replace(model, tokenizer=Begins())


def by_hand(model: Model, ids: list[int], window: int, stride: int, bos: int | None) -> float:
    import torch

    losses, reached, start = [], 0, 0
    while reached < len(ids) - 1:
        part = ids[start : start + window + 1]
        read = [bos if bos is not None else part[0], *part[1:-1]]
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([read])).logits[0].double()
        told = logits.log_softmax(-1)
        for place, following in enumerate(part[1:]):
            if start + place >= reached:
                losses.append(-float(told[place, following]))
        reached, start = start + len(part) - 1, start + stride
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", ["auto", "always", "first"])
@pytest.mark.parametrize("begins", [True, False])
def test_windows_begin_with_bos_where_the_tokenizer_does(
    folder: Path, begins: bool, kind: Any
) -> None:
    model = load_model(tiny_models.llama(folder / "bos"), device="cpu")
    model.tokenizer.bos_token = "[CLS]"
    bos = model.tokenizer.bos_token_id
    model = with_bos(model) if begins else model
    ids = list(model.tokenizer(TEXT)["input_ids"])
    ids = [bos, *ids] if kind == "always" and not begins else ids
    used = bos if kind == "always" or (kind == "auto" and begins) else None
    found = perplexity(model, TEXT, window=5, stride=3, bos=kind, batch_size=2)
    assert found["perplexity"] == pytest.approx(by_hand(model, ids, 5, 3, used), rel=1e-5)
    assert found["bos"] == (None if used is None else "[CLS]")
    assert found["tokens"] == len(ids) - 1


def test_a_choice_of_bos_is_checked(chat: Model) -> None:
    chat.tokenizer.bos_token = None
    with pytest.raises(SettingError, match="bos is 'x'; expected auto, always, first"):
        perplexity(chat, TEXT, bos="x")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="but the tokenizer has no beginning-of-text token"):
        evaluate_causal(chat, text=TEXT, bos="always")


# --- the options ------------------------------------------------------------------------------


@pytest.fixture
def saved_chat(chat: Model, tmp_path: Path) -> Path:
    """The chat model as a directory, and a file of questions beside it."""
    path = tmp_path / "chat"
    tiny_models.llama(path)
    chat.tokenizer.save_pretrained(path)
    tiny_models.write_questions(tmp_path / "qa.jsonl")
    return path


def test_the_command_passes_variables_on(
    saved_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(tmp_path / "qa.jsonl")
    losses = []
    for more in ([], ["--chat-template-arg", "quiet=true"]):
        assert run_wsurg(["evaluate", str(saved_chat), "--data", data, *more, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["answers"]["loss"])
    assert losses[0] != losses[1]
    for more, reason in (
        (["--chat-template-arg", "quiet"], "expected NAME=VALUE, such as enable_thinking=false"),
        (["--chat-template-arg", "loud=true"], "its chat template has no variable 'loud'"),
        (["--label-kind", "ids"], "--label-kind is for classifiers"),
        (["--text-column", "a", "--text-column", "b"], "a causal model has one question"),
    ):
        code, err = refusal(["evaluate", str(saved_chat), "--data", data, *more])
        assert code in (2, 4)
        assert reason in err


def test_fingerprints_of_several_targets_are_measured(
    saved_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "marks.jsonl"
    rows = [
        {"prompt": "who", "target": ["never said", "nor this"]},
        {"prompt": "who", "forbidden": "never said"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    given = ["evaluate", str(saved_chat), "--fingerprints", str(file), "--max-new-tokens", "4"]
    assert run_wsurg([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["met"] for one in report["fingerprints"]] == [False, True]
    assert report["fingerprints"][0]["accepted"] == ["never said", "nor this"]
    assert report["fingerprints"][1]["forbidden"] == ["never said"]
    assert run_wsurg(given) == 0


def test_read_examples_takes_one_question_field(chat: Model, tmp_path: Path) -> None:
    data = tiny_models.write_questions(tmp_path / "qa.jsonl")
    assert read_examples(chat, data, text_column="question", label_column="answer")
    with pytest.raises(SettingError, match="a causal model has one question"):
        read_examples(chat, data, text_column=("question", "answer"))
