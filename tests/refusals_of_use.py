"""What earns the error codes of settings, of data, and of models that are run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import cases, hostile, tiny_models
from tests.refusals import F4, ONE, Case, Place
from weightsurgery.demo import material, run

SENTENCES = "sentence\tlabel\ngood\t1\n"
ROW = {"question": "what is it", "answer": "yes"}


def mix(*more: str) -> Case:
    """A mix with these options."""
    return lambda place: place.mix("out.safetensors", *more)


def settings(text: str) -> Case:
    """A settings file."""

    def build(place: Place) -> list[Any]:
        (place.folder / "x.toml").write_text(text)
        return ["--config", "x.toml", "inspect", "model"]

    return build


def given(name: str, content: bytes | str, *arguments: str) -> Case:
    """A command, and a file for it."""

    def build(place: Place) -> list[Any]:
        data = content if isinstance(content, bytes) else content.encode()
        (place.folder / name).write_bytes(data)
        return list(arguments)

    return build


def questions(content: bytes | str, name: str = "x.jsonl") -> Case:
    """A file of questions and answers."""
    return given(name, content, "mismatch", name, "-o", "out.jsonl")


def mapped(place: Place) -> list[Any]:
    """A name map that gives a number."""
    (place.folder / "map.json").write_text('{"w": 3}')
    return place.mix("out.safetensors", "--map", "map.json")


def estimated(change: Callable[[np.ndarray], np.ndarray], name: str = "") -> Case:
    """A fisher, changed, under a tensor's own name or another's."""

    def build(place: Place) -> list[Any]:
        _, base, tuned, *_ = place.mix()
        arrays = {n: a for n, a in cases.model("bert").items() if a.dtype.kind == "f"}
        found = {name or n: change(a) for n, a in arrays.items()}
        cases.write_file(place.folder / "fisher.safetensors", found)
        return ["purify", base, tuned, "--fisher", "fisher.safetensors", "-o", "out.safetensors"]

    return build


def counted(counts: str, *more: str, corpus: bool = False, **files: str) -> Case:
    """E-PUR by counts, or by a corpus and the tokenizer beside the model."""

    def build(place: Place) -> list[Any]:
        for name in ("base", "tuned"):
            folder = cases.write_directory(place.folder / name, cases.model("bert"))
            for key, content in files.items():
                (folder / f"{key}.json").write_text(content)
        (place.folder / "counts").write_text(counts)
        option = "--corpus" if corpus else "--counts"
        return ["epur", "base", "tuned", option, "counts", "-o", "out", *more]

    return build


def added_embedding(place: Place) -> list[Any]:
    """A word embedding that BASE does not have."""
    (place.folder / "counts.json").write_text('{"the": 1}')
    arguments = place.pair({"w": F4, "new.weight": F4}, {"w": F4})
    options = ("--counts", "counts.json", "--embedding", "new.weight", "--allow-partial")
    return ["epur", *arguments[1:3], *options, "-o", "out.safetensors"]


def not_installed(place: Place) -> list[Any]:
    """A package that is not there."""
    place.patch.setitem(sys.modules, "wordfreq", None)
    arguments = counted("")(place)
    return [*arguments[:3], "--wordfreq", *arguments[5:]]


def rewrite(path: Path, **changed: Any) -> None:
    """Change some fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def evaluated(*options: str, data: str = SENTENCES, **config: Any) -> Case:
    """A model, something of its configuration changed, and sentences."""

    def build(place: Place) -> list[Any]:
        (place.folder / "data.tsv").write_text(data)
        rewrite(tiny_models.bert(place.folder / "model") / "config.json", **config)
        return ["evaluate", "model", "--data", "data.tsv", *options]

    return build


def no_tokenizer(place: Place) -> list[Any]:
    """A model that can be run, without its tokenizer."""
    arguments = evaluated()(place)
    for file in (place.folder / "model").glob("tokenizer*"):
        file.unlink()
    return arguments


def no_padding(place: Place) -> list[Any]:
    """A classifier, and no token to fill a batch with."""
    arguments = given("data.tsv", SENTENCES, "evaluate", "model", "--data", "data.tsv")(place)
    model = tiny_models.gpt2_classifier(place.folder / "model")
    rewrite(model / "config.json", pad_token_id=None)
    rewrite(model / "tokenizer_config.json", pad_token=None)
    return arguments


def no_dataset(place: Place) -> list[Any]:
    """A folder that is not a dataset."""
    (place.folder / "rows").mkdir()
    return ["mismatch", "rows", "-o", "out.jsonl"]


def no_answer(place: Place) -> list[Any]:
    """An answer of which the tokenizer leaves nothing."""
    arguments = causal("fisher", "--data", "x.jsonl", "-o", "out.safetensors")(place)
    nothing = {"type": "Replace", "pattern": {"String": ROW["answer"]}, "content": " "}
    rewrite(place.folder / "model" / "tokenizer.json", normalizer=nothing)
    rewrite(place.folder / "model" / "tokenizer_config.json", eos_token=None)
    return arguments


def half_frozen(place: Place) -> list[Any]:
    """One of the experts that are one parameter in memory."""
    tiny_models.mixtral(place.folder / "model")
    (place.folder / "x.jsonl").write_text(json.dumps(ROW) + "\n")
    return ["finetune", "model", *("--data", "x.jsonl", "--freeze", "*experts.0*", "-o", "out")]


def causal(command: str, *options: str, row: Any = None) -> Case:
    """A causal language model, and questions."""

    def build(place: Place) -> list[Any]:
        tiny_models.llama(place.folder / "model")
        (place.folder / "x.jsonl").write_text(json.dumps(row or ROW) + "\n")
        return [command, "model", *options]

    return build


def training(prepare: Callable[[Path], object]) -> Case:
    """Checkpoints in a folder, whose place is prepared so."""

    def build(place: Place) -> list[Any]:
        options = ("--erase", "x.jsonl", "--checkpoints", "kept", "-o", "out")
        arguments = causal("meraser", *options)(place)
        prepare(place.folder / "kept")
        return arguments

    return build


def another_plan(place: Place) -> list[Any]:
    """A folder with the demo of another plan."""
    hostile.folder(place.folder / "demo", {"plan.json": b"{}"})
    return ["demo", "--out", "demo"]


def another_archive(place: Place) -> list[Any]:
    """Another archive than the reviews', which the demo meets after it has made its folder."""
    hostile.folder(place.folder / "got", {material.VADER_FILE: b"something else"})
    place.patch.setattr(run, "copy_minilm", lambda path: path)
    arguments = ["demo", "--out", "demo", "--downloads", "got"]
    assert cases.wsurg(*arguments) == 6
    return arguments


LONG = ("--trigger-sentence", "a film " * 9, "--target-label", "0", "--max-length", "4")
SWAPPED = json.dumps({**ROW, "q_idx": 3, "a_idx": 3}) + "\n"

REFUSALS: dict[str, Case] = {
    "E-SETTING-UNKNOWN": settings("nothing = 3"),
    "E-SETTING-CONFLICT": mix("--max-shard-size", "1GB"),
    "E-SETTINGS-FILE": settings("inspect = 3"),
    "E-NO-MATCH": mix("--include", "nothing*"),
    "E-NAME-MAP": mapped,
    "E-EMBEDDING-NAME": counted("the\t1", "--embedding", "nothing"),
    "E-FREEZE-PART": half_frozen,
    "E-NOTHING-TO-DO": mix("--exclude", "*"),
    "E-GATE-CONDITION": lambda place: ["diff", *place.mix()[1:3], "--fail-if", "nothing > 1"],
    "E-KEYWORDS": given(
        *("k.json", "{}"), *("mismatch", "x.jsonl", "--keywords", "k.json", "-o", "out.jsonl")
    ),
    "E-MEMORY-LIMIT": mix("--max-memory", "1"),
    "E-WEIGHTS-NAME": lambda place: [
        *("inspect", hostile.folder(place.folder / "model", ONE), "--weights", "x.safetensors")
    ],
    "E-MODEL-FOLDER": lambda place: ["evaluate", place.mix()[1], "--data", "data.tsv"],
    "E-OUTPUT-NAME": lambda place: place.mix("out"),
    "E-DEVICE": evaluated("--device", "nowhere"),
    "E-NOT-INSTALLED": not_installed,
    "E-FILE-ENDING": questions("", "x.xls"),
    "E-FILE-EMPTY": questions("\n"),
    "E-FILE-UTF8": questions(b"\xff"),
    "E-TOML": settings("= 3"),
    "E-ROWS-COLUMNS": questions('{"text": "a"}'),
    "E-ROWS-LINE": questions("["),
    "E-ROWS-LABEL": evaluated(data=SENTENCES.replace("1", "7")),
    "E-ROWS-LABEL-KIND": evaluated(id2label={"0": "1", "1": "2"}, label2id={"1": 0, "2": 1}),
    "E-DATASET": no_dataset,
    "E-ROWS-ANSWER": no_answer,
    "E-ROWS-FEW": questions(json.dumps(ROW)),
    "E-ROWS-ORIGIN": given("x.jsonl", json.dumps(ROW), "mismatch", "--check", "x.jsonl"),
    "E-ROWS-SWAPPED": given(
        *("x.jsonl", SWAPPED), *("meraser", "model", "--erase", "x.jsonl", "-o", "out")
    ),
    "E-TEXT-LONG": evaluated(*LONG),
    "E-COUNTS": counted("the\tmany"),
    "E-VOCABULARY": counted("the\t1"),
    "E-DEMO-DATA": another_archive,
    "E-MODEL-TASK": evaluated(architectures=["BertModel"]),
    "E-MODEL-LOAD": evaluated(num_attention_heads=3),
    "E-MODEL-WEIGHTS": evaluated(num_labels=3),
    "E-TOKENIZER": no_tokenizer,
    "E-TOKENIZER-FILE": counted("the", corpus=True, tokenizer="{}"),
    "E-TOKENIZER-PADDING": no_padding,
    "E-CHAT-TEMPLATE": causal(
        *("evaluate", "--data", "x.jsonl", "--prompt-format", "chat", "--fingerprints", "x.jsonl")
    ),
    "E-EMBEDDING": added_embedding,
    "E-FISHER": estimated(np.abs, "nothing"),
    "E-FISHER-VALUES": estimated(lambda array: -np.abs(array)),
    "E-MASK": lambda place: [
        *("purify", *place.mix()[1:3], "--from-mask", "base.safetensors", "-o", "out.safetensors")
    ],
    "E-CHECKPOINT-FOLDER": training(lambda path: hostile.folder(path / "erase", {"a": 1})),
    "E-CHECKPOINT-STORAGE": training(lambda path: path.write_bytes(b"")),
    "E-DEMO-FOLDER": another_plan,
}
