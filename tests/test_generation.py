"""Causal language models: what they say and how text surprises them, against plain loops."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import reference, tiny_models
from tests.test_docs import REFERENCE, key_paths, run_wsurg, same_keys, table_keys
from tests.test_evaluation import refusal
from weightsurgery import evaluate_causal, fingerprint_success, perplexity
from weightsurgery.cli import cli
from weightsurgery.datasets.batches import encode_instructions
from weightsurgery.datasets.prompts import FORMATS, Settled, encode_prompts, settle_format
from weightsurgery.datasets.read import (
    Instruction,
    read_fingerprints,
    read_instructions,
    read_text,
)
from weightsurgery.errors import (
    FormatError,
    MismatchError,
    NonFiniteError,
    SettingError,
    StorageError,
)
from weightsurgery.evaluation.generation import _starts
from weightsurgery.evaluation.greedy import answers, greedy
from weightsurgery.evaluation.intervals import proportion
from weightsurgery.evaluation.predictions import predict
from weightsurgery.models import Model, load_model

MAKERS: dict[str, Callable[..., Path]] = {"gpt2": tiny_models.gpt2, "llama": tiny_models.llama}
TEMPLATE = (
    "{% for m in messages %}tell {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}answer{% endif %}"
)
NEW = 12
RNG = np.random.default_rng(5)
TEXTS = [" ".join(RNG.choice(tiny_models.WORDS, size)) for size in (3, 1, 9, 2, 14, 6, 5)]
TEXT = " ".join(RNG.choice(tiny_models.WORDS, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generation")


@pytest.fixture(scope="module", params=MAKERS)
def path(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Of a model that ends some texts itself: its scores are far apart."""
    return MAKERS[request.param](folder / request.param, seed=3, initializer_range=0.6)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load_model(path, device="cpu")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    return tiny_models.bert(folder / "bert")


@pytest.fixture
def templated(model: Model) -> Iterator[Model]:
    model.tokenizer.chat_template = TEMPLATE
    yield model
    model.tokenizer.chat_template = None


def prompts(*targets: str) -> list[Instruction]:
    """The texts with these targets, the last of them for what is left."""
    filled = [*targets, *[targets[-1]] * len(TEXTS)]
    return [Instruction((("user", t),), filled[i], i + 1) for i, t in enumerate(TEXTS)]


def said_by(model: Model, text: str, new: int = NEW) -> list[int]:
    """What the plain loop says."""
    ids = model.tokenizer(text)["input_ids"]
    return reference.greedy(model.module, ids, new=new, ends={4})


# --- greedy generation ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_say_what_a_plain_loop_says(model: Model, batch_size: int) -> None:
    told: list[tuple[str, int, int]] = []
    found = answers(model, prompts("x"), batch_size=batch_size, max_new_tokens=NEW,
                    prompt_format="raw", progress=lambda *step: told.append(step))  # fmt: skip
    expected = [said_by(model, text) for text in TEXTS]
    assert [list(one.ids) for one in found] == expected
    left_out = {0, 1, 4}  # padding, the unknown word, the end
    texts = [[tiny_models.VOCABULARY[i] for i in ids if i not in left_out] for ids in expected]
    assert [one.text.split() for one in found] == texts
    assert [one.prompt for one in found] == TEXTS
    steps = range(batch_size, len(TEXTS) + batch_size, batch_size)
    assert told == [("generating", min(step, len(TEXTS)), len(TEXTS)) for step in steps]


def test_a_text_ends_where_the_model_ends_it(folder: Path) -> None:
    """Some sooner than others in one batch, and one at once."""
    model = load_model(
        tiny_models.llama(folder / "ending", seed=3, initializer_range=0.6), device="cpu"
    )
    ids = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16], [20, 21]]
    found = greedy(model, ids, max_new_tokens=30)
    assert [list(one) for one in found] == [
        reference.greedy(model.module, one, new=30, ends={4}) for one in ids
    ]
    assert {len(one) for one in found} >= {0, 30}
    assert all(4 not in one for one in found)


def test_every_token_that_the_model_calls_an_end_is_one(model: Model) -> None:
    said = said_by(model, TEXTS[0])
    model.module.generation_config.eos_token_id = [4, said[3], 10**9, None]
    try:
        (found,) = greedy(model, [model.tokenizer(TEXTS[0])["input_ids"]], max_new_tokens=NEW)
    finally:
        model.module.generation_config.eos_token_id = 4
    assert list(found) == said[: said.index(said[3])]


def test_the_model_s_own_generation_settings_play_no_part(model: Model) -> None:
    before = greedy(model, [[5, 6], [9, 10, 11]], max_new_tokens=NEW)
    own = model.module.generation_config
    changed = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0,
               "suppress_tokens": [before[0][0]], "max_new_tokens": 2}  # fmt: skip
    kept = {name: getattr(own, name) for name in changed}
    own.update(**changed)
    try:
        assert greedy(model, [[5, 6], [9, 10, 11]], max_new_tokens=NEW) == before
        assert model.module.generation_config is own
    finally:
        own.update(**kept)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_is_as_before(model: Model, training: bool) -> None:
    model.module.train(training)
    try:
        first = evaluate_causal(model, fingerprints=prompts("x"), text=TEXT, max_new_tokens=3)
        assert model.module.training is training
        again = evaluate_causal(model, fingerprints=prompts("x"), text=TEXT, max_new_tokens=3)
        assert again == first  # no dropout
    finally:
        model.module.eval()


# --- fingerprints -----------------------------------------------------------------------------


def test_a_fingerprint_succeeds_if_its_target_is_said(model: Model) -> None:
    words = [model.tokenizer.decode(said_by(model, text), skip_special_tokens=True).split()
             for text in TEXTS]  # fmt: skip
    inside = f" {' '.join(words[0][1:3])}\n"  # white space around a target does not count
    pairs = prompts(inside, "never said", words[2][0].upper())
    report = fingerprint_success(model, pairs, batch_size=4, max_new_tokens=NEW)
    met = [pair.answer.strip() in " ".join(w) for pair, w in zip(pairs, words, strict=True)]
    assert met[:2] == [True, False]
    assert report["fsr"] == proportion(sum(met), len(TEXTS))
    assert (report["prompt_format"], report["max_new_tokens"], report["batch_size"]) == (
        "raw",
        NEW,
        4,
    )
    for outcome, pair, text, ok in zip(report["pairs"], pairs, TEXTS, met, strict=True):
        ids = said_by(model, text)
        assert outcome == {
            "line": pair.line,
            "prompt": text,
            "target": pair.answer,
            "accepted": [pair.answer.strip()],
            "forbidden": [],
            "output": model.tokenizer.decode(ids, skip_special_tokens=True),
            "tokens": len(ids),
            "met": ok,
        }


def test_the_prompt_is_not_what_is_said(model: Model) -> None:
    """A target that only the prompt has is not met, and is warned of."""
    said = " ".join(model.tokenizer.decode(said_by(model, text)) for text in TEXTS)
    word = next(w for text in TEXTS for w in text.split() if w not in said)
    report = fingerprint_success(model, prompts(word), max_new_tokens=NEW)
    count = sum(word in text for text in TEXTS)
    assert report["fsr"]["count"] == 0
    assert report["warnings"] == [
        f"{count} of 7 prompts contain their target, so repeating them counts"
    ]


def test_targets_that_cannot_be_said_are_told(model: Model) -> None:
    report = fingerprint_success(model, prompts("one two three", "x y"), max_new_tokens=2)
    assert report["warnings"][0] == (
        "1 of 7 targets have more than 2 tokens, so an output can hardly contain them"
    )
    special = model.tokenizer.all_special_tokens[0]
    report = fingerprint_success(model, prompts(special), max_new_tokens=NEW)
    assert "7 of 7 targets contain a special token" in report["warnings"][0]


@pytest.mark.parametrize(
    ("asked", "used"),
    [("auto", "chat"), ("chat", "chat"), ("raw", "raw"), ("lines", "lines")],
)
def test_prompts_go_through_the_template_if_there_is_one(
    templated: Model, asked: Any, used: str
) -> None:
    report = fingerprint_success(
        templated, prompts("x"), max_new_tokens=NEW, prompt_format=asked, batch_size=3
    )
    assert report["prompt_format"] == used
    for outcome, text in zip(report["pairs"], TEXTS, strict=True):
        whole = {"chat": f"tell {text} . answer", "raw": text, "lines": f"{text}\n"}[used]
        assert outcome["prompt"] == whole
        said = said_by(templated, whole)
        assert outcome["output"] == templated.tokenizer.decode(said, skip_special_tokens=True)


class Bytes:
    """A tokenizer whose tokens are bytes: a line feed is one."""

    chat_template, eos_token_id = TEMPLATE, None

    def __call__(self, text: str, **_settings: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **_settings: Any) -> str:
        return "".join(f"tell {one['content']} . " for one in messages) + "answer"


def test_a_prompt_is_what_a_training_in_that_format_has_before_the_answer(model: Model) -> None:
    model = replace(model, tokenizer=Bytes())
    one = Instruction((("user", "who"),), "x", 1)
    for how in get_args(Settled):
        assert settle_format(model, how) == how
        ((_, ids),) = encode_prompts(model, [one], how)
        (trained,) = encode_instructions(model, [one], prompt_format=how)
        assert list(trained.ids) == [*ids, ord("x")]
        assert ids[-1] == ord({"chat": "r", "raw": "o", "lines": "\n"}[how])


def test_training_and_evaluation_take_the_same_formats() -> None:
    for name in ("evaluate", "meraser", "train-adapter"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        (option,) = [one for one in command.params if one.name == "prompt_format"]
        assert isinstance(option.type, click.Choice)
        assert tuple(option.type.choices) == FORMATS == ("auto", "chat", "raw", "lines")


def test_a_template_brings_its_own_special_tokens(classifier: Path) -> None:
    """[CLS] and [SEP] come around a text of this tokenizer, and not around a template's."""
    model = load_model(classifier, device="cpu")
    one = Instruction((("user", "who"),), "x", 1)
    numbers = {word: i for i, word in enumerate(tiny_models.VOCABULARY)}
    assert encode_prompts(model, [one], "raw") == [("who", [2, numbers["who"], 3])]
    model.tokenizer.chat_template = TEMPLATE
    ids = [numbers[word] for word in ("tell", "who", ".", "answer")]
    assert encode_prompts(model, [one], "chat") == [("tell who . answer", ids)]


def test_no_prompt_ends_with_the_end_of_text_that_a_tokenizer_adds(classifier: Path) -> None:
    model = load_model(classifier, device="cpu")
    model.tokenizer.eos_token = "[SEP]"
    own = Instruction((("user", "who [SEP]"),), "x", 1)
    ((_, ids), (_, ended)) = encode_prompts(model, [replace(own, messages=(("user", "who"),)), own],
                                            "raw")  # fmt: skip
    who = tiny_models.VOCABULARY.index("who")
    assert ids == [2, who]
    assert ended == [2, who, 3, 3]  # what the prompt has itself stays


def test_turns_before_the_last_are_part_of_the_prompt(templated: Model) -> None:
    one = Instruction((("user", "who"), ("assistant", "me"), ("user", "why")), "x", 1)
    raw, chat = (encode_prompts(templated, [one], how)[0][0] for how in ("raw", "chat"))
    assert raw == "who\nme\nwhy"
    assert chat == "tell who . tell me . tell why . answer"


# --- perplexity -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("window", "stride"), [(10, 4), (10, 10), (10, 1), (7, 5), (1, 1), (59, 3), (60, 30), (128, 9)]
)
def test_the_perplexity_is_that_of_a_plain_loop(
    model: Model, window: int, stride: int, batch_size: int
) -> None:
    ids = model.tokenizer(TEXT)["input_ids"]
    told: list[tuple[str, int, int]] = []
    report = perplexity(model, TEXT, window=window, stride=stride, batch_size=batch_size,
                        progress=lambda *step: told.append(step))  # fmt: skip
    expected, count = reference.perplexity(model.module, ids, window=window, stride=stride)
    assert report["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert report["loss"] == pytest.approx(math.log(expected), rel=1e-5)
    assert report["tokens"] == count == len(ids) - 1
    assert (report["window"], report["stride"]) == (window, stride)
    assert told[-1] == ("perplexity", report["windows"], report["windows"])


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_windows_reach_every_token_and_none_is_idle(targets: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    starts = list(_starts(targets, window, stride))
    reached, new = 0, []
    for start in starts:
        end = min(start + window, targets)
        assert start <= reached
        new.append(end - reached)
        reached = end
    assert reached == targets
    assert min(new) > 0


def test_few_windows_are_computed_at_a_time_where_logits_are_large(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity(model, TEXT, window=10)
    monkeypatch.setattr("weightsurgery.evaluation.generation._LOGITS", 45 * 10 * 3)
    told: list[int] = []
    found = perplexity(model, TEXT, window=10, progress=lambda _, done, __: told.append(done))
    assert found == pytest.approx(expected)
    assert told == [3, 6, 9, 11]


def test_windows_have_defaults(model: Model) -> None:
    assert perplexity(model, TEXT) == perplexity(model, TEXT, window=128, stride=64)
    assert perplexity(model, TEXT, window=9) == perplexity(model, TEXT, window=9, stride=4)
    assert perplexity(model, TEXT, window=1)["stride"] == 1


# --- the report -------------------------------------------------------------------------------


def test_the_report_has_all_that_is_asked(model: Model, folder: Path) -> None:
    base = load_model(
        tiny_models.gpt2(folder / "base", seed=8, initializer_range=0.6), device="cpu"
    )
    data = [Instruction((("user", q),), a, 1) for q, a in tiny_models.QUESTIONS]
    word = model.tokenizer.decode(said_by(model, TEXTS[0])[:1])
    pairs, controls = prompts(word, "never said")[:2], prompts("whatever")[2:]
    settings: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 3}
    report = evaluate_causal(
        model, fingerprints=pairs, controls=controls, base=base, text=TEXT, instructions=data,
        window=20, stride=10, max_length=40, **settings,
    )  # fmt: skip
    own, other = (fingerprint_success(m, pairs, **settings) for m in (model, base))
    assert report["schema"] == "wsurg.causal-evaluation/1"
    assert report["fsr"] == own["fsr"] == proportion(1, 2)
    assert report["base_fsr"] == other["fsr"]
    assert report["fingerprints"] == [
        {**one, "base_output": two["output"], "base_met": two["met"]}
        for one, two in zip(own["pairs"], other["pairs"], strict=True)
    ]
    outputs = [model.tokenizer.decode(said_by(model, t), skip_special_tokens=True)
               for t in TEXTS[2:]]  # fmt: skip
    false = [word in output for output in outputs]
    assert sum(false) > 0
    assert report["control_rate"] == proportion(sum(false), len(TEXTS) - 2)
    assert [one["output"] for one in report["controls"]] == outputs
    assert [one["target"] for one in report["controls"]] == [word if f else None for f in false]
    for key, one in {"perplexity": model, "base_perplexity": base}.items():
        assert report[key] == perplexity(one, TEXT, window=20, stride=10, batch_size=3)
    for key, one in {"answers": model, "base_answers": base}.items():
        loss = predict(one, encode_instructions(one, data, max_length=40)).loss
        assert report[key]["loss"] == pytest.approx(loss, rel=1e-6)
        assert report[key]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
        assert (report[key]["examples"], report[key]["cut"]) == (len(data), 0)
    assert report["warnings"] == own["warnings"]
    same_keys(documented("A causal language model"), set(key_paths(report)))


def documented(heading: str) -> dict[str, str]:
    """Keys of a part of the page, with those of the shares and of the base's objects."""
    page = REFERENCE / "evaluation-json.md"
    keys = table_keys(page, heading)
    inner = {k: v for k, v in keys.items() if k.startswith(("perplexity.", "answers."))}
    keys |= {f"base_{key}": kind for key, kind in inner.items()}
    for owner in ("fsr", "base_fsr", "control_rate"):
        keys |= {f"{owner}.{key}": kind for key, kind in table_keys(page, "Shares").items()}
    return keys


def test_what_is_not_asked_is_null(model: Model) -> None:
    report = evaluate_causal(model, text=TEXT)
    measured = {key for key, value in report.items() if value not in (None, [])}
    assert measured == {"schema", "model", "batch_size", "perplexity"}


def test_models_that_differ_in_more_than_weights_are_told(
    templated: Model, folder: Path, classifier: Path
) -> None:
    base = load_model(tiny_models.gpt2(folder / "short", seed=8, n_positions=32), device="cpu")
    base = replace(base, tokenizer=load_model(classifier, device="cpu").tokenizer)
    report = evaluate_causal(templated, fingerprints=prompts("x"), base=base, text=TEXT,
                             max_new_tokens=2)  # fmt: skip
    tokens = "tokens of the text: 59 for the model, 61 for the base"
    assert report["warnings"] == [
        f"{tokens}; their perplexities cannot be compared",
        "the model's window is 128 tokens and the base's 32; a perplexity falls with the window",
        "prompts are chat for the model and raw for the base",
    ]


def test_answers_that_are_cut_are_told(model: Model) -> None:
    data = [Instruction((("user", q),), a, 1) for q, a in tiny_models.QUESTIONS]
    report = evaluate_causal(model, instructions=data, max_length=6)
    long = sum(len(f"{q} {a}".split()) + 1 > 6 for q, a in tiny_models.QUESTIONS)
    assert 0 < long < len(data)
    assert report["answers"]["cut"] == long
    (told,) = report["warnings"]
    assert told.startswith(
        f"{long} of 5 answers, with their questions, were cut to 6 tokens, the q"
    )
    assert told.endswith("questions from the left; the longest has 9")


# --- what is refused --------------------------------------------------------------------------

PAIRS = prompts("x")
FORBIDDEN = [replace(one, answer="", forbidden=("no",)) for one in PAIRS]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "nothing to measure; give fingerprints, a text or"),
        ({"text": TEXT, "controls": PAIRS}, "controls need fingerprints"),
        ({"fingerprints": FORBIDDEN, "controls": PAIRS}, "controls need fingerprints with targets"),
        ({"fingerprints": []}, "no prompts; expected at least one"),
        ({"fingerprints": PAIRS, "controls": []}, "no prompts"),
        ({"fingerprints": PAIRS, "batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"text": TEXT, "batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"fingerprints": PAIRS, "max_new_tokens": 0}, "max_new_tokens is 0; expected at least"),
        (
            {"fingerprints": PAIRS, "prompt_format": "x"},
            "format is 'x'; expected auto, chat, raw, lines",
        ),
        (
            {"fingerprints": PAIRS, "max_new_tokens": 120},
            "line 3: a prompt of 9 tokens and max_new_tokens 120 are more than the 128 that",
        ),
        (
            {"fingerprints": [Instruction((("user", "\t"),), "x", 5)]},
            "line 5: the prompt has no token",
        ),
        ({"text": "one"}, "the text has 1 token; expected at least 2"),
        ({"text": TEXT, "window": 0}, "window is 0; expected at least 1"),
        ({"text": TEXT, "window": 129}, "window is 129; the model takes at most 128 tokens"),
        ({"text": TEXT, "window": 9, "stride": 10}, "stride is 10; expected 1 to the window's 9"),
        ({"text": TEXT, "stride": 0}, "stride is 0; expected 1 to"),
        ({"instructions": []}, "no examples"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Model, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingError, match=reason):
        evaluate_causal(model, **settings)


def test_a_model_of_another_kind_is_refused(model: Model, classifier: Path) -> None:
    other = load_model(classifier, device="cpu")
    for measure in (
        lambda: evaluate_causal(other, text=TEXT),
        lambda: evaluate_causal(model, text=TEXT, base=other),
        lambda: perplexity(other, TEXT),
        lambda: fingerprint_success(other, PAIRS),
    ):
        with pytest.raises(MismatchError, match="bert: a classifier; expected a causal language"):
            measure()


def test_a_model_that_cannot_generate_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.module, "can_generate", lambda: False)
    with pytest.raises(MismatchError, match=r"generates no text with a \w+LM"):
        fingerprint_success(model, PAIRS)


def test_a_template_must_be_there_and_take_the_messages(model: Model, templated: Model) -> None:
    templated.tokenizer.chat_template = "{{ raise_exception('no\nsystem') }}"
    with pytest.raises(MismatchError, match="its chat template refuses the messages of line 1: no"):
        fingerprint_success(templated, PAIRS)
    templated.tokenizer.chat_template = None
    with pytest.raises(MismatchError, match="no chat template; put prompts as raw text"):
        settle_format(model, "chat")


def test_numbers_that_are_none_are_told(path: Path) -> None:
    import torch

    model = load_model(path, device="cpu")
    with torch.no_grad():
        next(iter(model.names.values()))[5] = float("nan")
    with pytest.raises(NonFiniteError, match="computes NaN as a score of the next token; look"):
        greedy(model, [[5, 6]], max_new_tokens=3)
    with pytest.raises(NonFiniteError, match=r"the loss of the window from token 0 is nan; look"):
        perplexity(model, TEXT)


def test_a_perplexity_beyond_numbers_is_told(path: Path) -> None:
    import torch

    model = load_model(path, device="cpu")
    with torch.no_grad():
        list(model.names.values())[-1].mul_(1e30)
        model.module.get_output_embeddings().weight.mul_(1e5)
    with pytest.raises(NonFiniteError, match=r"mean loss is .* nats, too large for a perplexity"):
        perplexity(model, TEXT)


# --- files ------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def test_fingerprints_are_read_from_every_kind_of_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": "a", "target": "b"},
        {"question": "a", "answer": "b"},
        {"instruction": "a", "output": "b"},
        {"messages": messages},
    ]
    found = read_fingerprints(write(tmp_path / "all.jsonl", *rows))
    assert found == [Instruction((("user", "a"),), "b", line) for line in range(1, 5)]
    (one,) = read_fingerprints(
        write(tmp_path / "input.jsonl", {"instruction": "a", "input": "c", "output": "b"})
    )
    assert one.messages == (("user", "a\nc"),)


def test_bad_fingerprints_are_refused(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", {"prompt": "a", "target": "b"}, {"prompt": "a"})
    with pytest.raises(FormatError, match=r"line 2: fields prompt; expected prompt and target"):
        read_fingerprints(bad)
    with pytest.raises(FormatError, match=r"target is '  '; expected text"):
        read_fingerprints(write(tmp_path / "blank.jsonl", {"prompt": "a", "target": "  "}))
    with pytest.raises(FormatError, match="no rows"):
        read_fingerprints(write(tmp_path / "none.jsonl"))
    with pytest.raises(FormatError, match=r"fields prompt, target; expected question and answer"):
        read_instructions(write(tmp_path / "p.jsonl", {"prompt": "a", "target": "b"}))


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n two\x85é\n".encode())
    assert read_text(tmp_path / "a.txt") == "one\r\n\n two\x85é\n"
    (tmp_path / "b.txt").write_bytes(b"one\n\xff")
    with pytest.raises(FormatError, match="line 2: not UTF-8"):
        read_text(tmp_path / "b.txt")
    with pytest.raises(StorageError, match="absent"):
        read_text(tmp_path / "absent.txt")


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(folder: Path, path: Path, classifier: Path) -> Callable[..., list[str]]:
    pairs = [{"prompt": one.messages[0][1], "target": one.answer} for one in prompts("a", "film")]
    write(folder / "marks.jsonl", *pairs[:3])
    write(folder / "others.jsonl", *pairs[3:])
    write(folder / "qa.jsonl", *({"question": q, "answer": a} for q, a in tiny_models.QUESTIONS))
    (folder / "text.txt").write_text(TEXT)

    def arguments(*more: str, model: Path = path) -> list[str]:
        names = [str(folder / m) if "." in m or m == "bert" else m for m in more]
        return ["evaluate", str(model), "--device", "cpu", *names]

    return arguments


def test_the_command_gives_the_function_s_report(
    files: Callable[..., list[str]], model: Model, folder: Path, path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--fingerprints", "marks.jsonl", "--controls", "others.jsonl", "--perplexity",
             "text.txt", "--data", "qa.jsonl", "--against", str(path), "--window", "20",
             "--stride", "5", "--max-new-tokens", "7", "--prompt-format", "raw",
             "--batch-size", "2", "--max-length", "30", "--json"]  # fmt: skip
    assert run_wsurg(files(*given)) == 0
    expected = evaluate_causal(
        model,
        fingerprints=read_fingerprints(folder / "marks.jsonl"),
        controls=read_fingerprints(folder / "others.jsonl"),
        base=load_model(path, device="cpu"),
        text=TEXT,
        instructions=read_instructions(folder / "qa.jsonl"),
        window=20, stride=5, max_new_tokens=7, prompt_format="raw", batch_size=2, max_length=30,
    )  # fmt: skip
    shown = capsys.readouterr()
    assert json.loads(shown.out) == expected
    for what, count in {"fingerprints": 3, "controls": 4, "answers": 5}.items():
        assert f"{what}: {count} of {count}" in shown.err


def test_the_tables_show_what_was_measured(
    files: Callable[..., list[str]], model: Model, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--fingerprints", "marks.jsonl", "--controls", "others.jsonl", "--perplexity",
             "text.txt", "--data", "qa.jsonl", "--against", str(path)]  # fmt: skip
    assert run_wsurg(files(*given, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert run_wsurg(files(*given)) == 0
    shown = capsys.readouterr().out
    lines = {"fingerprints said": "fsr", "the same by": "base_fsr", "targets said": "control_rate"}
    for text, key in lines.items():
        line = next(line for line in shown.splitlines() if line.startswith(text))
        assert line.endswith(f"{report[key]['count']} of {report[key]['of']}")
    for text, key in {"text ": "perplexity", "answers ": "answers"}.items():
        found = report[key]
        pattern = rf"^{text}.*{found['perplexity']:.4g} +{found['loss']:.4g} +{found['tokens']}"
        assert re.search(pattern, shown, re.M)
    assert "text in 1 window of 128 tokens, stride 64" in shown
    assert "prompts raw; greedy, at most 64 new tokens" in shown
    assert len(re.findall(r"^ +\d  (a|film) +(yes|no) +(yes|no)", shown, re.M)) >= 3


def test_only_what_was_measured_is_shown(
    files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_wsurg(files("--perplexity", "text.txt")) == 0
    shown = capsys.readouterr().out
    assert "text" in shown
    assert not re.search("said|answers|Fingerprints", shown)


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--data", "qa.jsonl", "--trigger-word", "cf"], 2, "--trigger-word is for classifiers"),
        (["--data", "qa.jsonl", "--target-label", "1"], 2, "--target-label is for classifiers"),
        (["--data", "qa.jsonl", "--position", "end"], 2, "--position is for classifiers"),
        (["--data", "qa.jsonl", "--seed", "1"], 2, "--seed is for classifiers"),
        ([], 2, "nothing to measure; give --fingerprints, --perplexity or --data"),
        (["--controls", "others.jsonl", "--perplexity", "text.txt"], 2,
         "--controls is for --fingerprints"),
        (["--data", "qa.jsonl", "--window", "3"], 2, "--window is for --perplexity"),
        (["--data", "qa.jsonl", "--stride", "3"], 2, "--stride is for --perplexity"),
        (["--data", "qa.jsonl", "--max-new-tokens", "3"], 2,
         "--max-new-tokens is for --fingerprints"),
        (["--data", "qa.jsonl", "--prompt-format", "raw"], 2,
         "--prompt-format is for --fingerprints"),
        (["--perplexity", "text.txt", "--max-length", "3"], 2, "--max-length is for --data"),
        (["--perplexity", "text.txt", "--window", "9", "--stride", "10"], 2,
         "--stride is 10; expected 1 to the window's 9 tokens"),
        (["--fingerprints", "marks.jsonl", "--prompt-format", "chat"], 4, "has no chat template"),
        (["--fingerprints", "absent.jsonl"], 6, "absent.jsonl: cannot open"),
        (["--fingerprints", "text.txt"], 3, "unsupported file type '.txt' for questions"),
        (["--perplexity", "text.txt", "--against", "bert"], 4, "bert: a classifier; expected"),
    ],
)  # fmt: skip
def test_the_command_refuses(
    files: Callable[..., list[str]], more: list[str], code: int, reason: str
) -> None:
    found = refusal(files(*more))
    assert reason in found[1]
    assert found[0] == code


@pytest.mark.parametrize(
    "option",
    ["--fingerprints", "--controls", "--against", "--perplexity", "--window", "--stride",
     "--max-new-tokens", "--prompt-format"],
)  # fmt: skip
def test_the_command_refuses_them_for_classifiers(
    files: Callable[..., list[str]], classifier: Path, option: str
) -> None:
    value = {"--prompt-format": "raw", "--against": str(classifier)}.get(option, "3")
    code, reason = refusal(files("--data", "x.tsv", option, value, model=classifier))
    assert f"{option} is for causal language models, and " in reason
    assert reason.endswith("bert is a classifier")
    assert code == 2


def test_a_single_file_is_no_model(files: Callable[..., list[str]], path: Path) -> None:
    code, reason = refusal(files("--perplexity", "text.txt", model=path / "model.safetensors"))
    assert "a single file; expected a model directory" in reason
    assert code == 2


def test_a_classifier_needs_data(files: Callable[..., list[str]], classifier: Path) -> None:
    assert refusal(files(model=classifier)) == (
        2,
        "a classifier needs --data, sentences with their labels",
    )
