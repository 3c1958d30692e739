"""Files that travel with the weights, and what a config loses on the way."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import hostile
from tests.hostile import weights
from weightsurgery.errors import FormatError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.layout import travels
from weightsurgery.formats.side_files import MAX_SIDE_FILE

ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}

TRAVEL = [
    *("LICENSE", "LICENSE.txt", "NOTICE", "added_tokens.json", "bpe.codes", "chat_template.jinja"),
    *("config.json", "entity_vocab.json", "generation_config.json", "merges.txt"),
    *("normalizer.json", "preprocessor_config.json", "processor_config.json", "qwen.tiktoken"),
    *("sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model"),
    *("tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("video_preprocessor_config.json", "vocab.json", "vocab.txt"),
]
LEFT = [
    *(".gitattributes", "Config.json", "__init__.py", "config.json.bak", "ema.safetensors"),
    *("modeling_evil.py", "optimizer.pt", "pickle.pkl", "requirements.txt", "tf_model.h5"),
    *("tokenization.py", "training_args.bin", "\x1b[31m.py"),
]


def test_only_listed_side_files_travel(tmp_path: Path) -> None:
    files = {name: {} if name.endswith(".json") else b"x" for name in (*TRAVEL, *LEFT)}
    model = hostile.folder(
        tmp_path / "model", {"model.safetensors": weights("a"), "README.md": b"spam"} | files
    )
    (model / "wsurg-record.json").write_text("of an earlier step, as is the model card: made anew")
    (model / "tokenizer_folder.json").mkdir()
    (model / "vocab.dangling").symlink_to("nowhere")
    os.mkfifo(model / "vocab.pipe")
    (model / os.fsdecode(b"vocab.\xff")).write_bytes(b"x")
    (model / os.fsdecode(b"not utf-8 \xff")).write_bytes(b"x")
    (model / "vocab.huge").touch()
    os.truncate(model / "vocab.huge", MAX_SIDE_FILE + 1)
    with hostile.deadline(60):
        found = open_checkpoint(model)
        record = save(found, str(tmp_path / "out"))
    assert [side.name for side in found.side_files] == TRAVEL
    reasons = dict(found.left_out)
    for name in ("tokenizer_folder.json", "vocab.dangling", "vocab.pipe"):
        assert reasons.pop(name) == "not a regular file"
    assert reasons.pop(r"vocab.\udcff") == "a name that cannot be printed"
    assert "the limit is" in reasons.pop("vocab.huge")
    assert set(reasons.values()) == {"not on the list of files to copy"}
    escaped = [name.replace("\x1b", r"\x1b") for name in LEFT]
    assert sorted(reasons) == sorted([*escaped, r"not utf-8 \udcff"])
    assert [e["file"] for e in record["left_out"]] == [name for name, _ in found.left_out]
    written = {place.name for place in (tmp_path / "out").iterdir()}
    assert written == {*TRAVEL, "model.safetensors", "README.md", "wsurg-record.json"}
    for name in TRAVEL:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert b"spam" not in (tmp_path / "out" / "README.md").read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"
PAGE = b"\n <!DOCTYPE html><html>404</html>"


@pytest.mark.parametrize("name", [n for n in TRAVEL if not n.startswith(("LICENSE", "NOTICE"))])
@pytest.mark.parametrize(("content", "code"), [(POINTER, "E-FILE-LFS"), (PAGE, "E-FILE-HTML")])
def test_what_only_stands_for_a_side_file_is_refused(
    name: str, content: bytes, code: str, tmp_path: Path
) -> None:
    """As it is for weights: the output would be a model that nothing can load."""
    model = hostile.folder(tmp_path / "model", {**ONE, name: content})
    with hostile.deadline(), pytest.raises(FormatError, match=r"found an? (Git|HTML)") as told:
        open_checkpoint(model)
    assert told.value.code == code
    hostile.check_told(told.value, file=model / name)


def test_a_licence_may_be_a_page(tmp_path: Path) -> None:
    model = hostile.folder(tmp_path / "model", {**ONE, "LICENSE.html": PAGE})
    save(open_checkpoint(model), str(tmp_path / "out"))
    assert (tmp_path / "out" / "LICENSE.html").read_bytes() == PAGE


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    **{
        key: ({"a": 1, key: {"AutoModel": "evil.Model"}}, {"a": 1}, key)
        for key in ("auto_map", "custom_pipelines", "trust_remote_code")
    },
    "attention from a repository": ({"_attn_implementation": "evil/kernel"}, {}, "_attn_implem"),
    "attention, public key": ({"attn_implementation": "evil/kernel@v1:f"}, {}, "attn_implement"),
    "attention for each part": (
        {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
        {},
        "attn_implementation",
    ),
    "attention in a list": ({"attn_implementation": ["evil/kernel"]}, {}, "attn_implementation"),
    "attention of no known kind": (
        {"attn_implementation": {"a": {"b": "evil/kernel"}}},
        {},
        "attn_implementation",
    ),
    "deep": (
        {"x": [{"y": {"auto_map": {}, "z": 1}}, [{"trust_remote_code": True}]]},
        {"x": [{"y": {"z": 1}}, [{}]]},
        "auto_map, trust_remote_code",
    ),
    "126 deep": (
        json.loads('{"x":' * 126 + '{"auto_map":1}' + "}" * 126),
        json.loads('{"x":' * 126 + "{}" + "}" * 126),
        "auto_map",
    ),
    "hostile key": ({"\x1b[31m_attn_implementation": "evil/kernel"}, {}, r"\x1b[31m_attn_impl"),
}


@pytest.mark.parametrize(("given", "clean", "told"), CONFIGS.values(), ids=CONFIGS.keys())
def test_config_loses_what_loads_code(
    tmp_path: Path, given: dict[str, Any], clean: dict[str, Any], told: str
) -> None:
    model = hostile.folder(tmp_path / "model", {**ONE, "config.json": given})
    record = save(open_checkpoint(model), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == clean
    (warning,) = record["warnings"]
    assert warning.startswith(f"config.json: removed {told}")
    assert warning.isprintable()


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "preprocessor_config.json", "generation_config.json"]
)
def test_every_config_loses_what_loads_code(tmp_path: Path, name: str) -> None:
    given = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "kept": [1.5]}
    model = hostile.folder(tmp_path / "model", {**ONE, name: given})
    record = save(open_checkpoint(model), tmp_path / "out")
    assert json.loads((tmp_path / "out" / name).read_bytes()) == {"kept": [1.5]}
    assert record["warnings"] == [f"{name}: removed auto_map"]


def test_config_loses_other_weights(tmp_path: Path) -> None:
    config = {"transformers_weights": "other.safetensors", "model_type": "bert"}
    model = hostile.folder(tmp_path / "model", {**ONE, "config.json": config})
    record = save(open_checkpoint(model, weights="model.safetensors"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {"model_type": "bert"}
    assert record["warnings"] == ["config.json: removed transformers_weights"]


def test_a_deep_config_is_gone_through_once(tmp_path: Path) -> None:
    deep = '{"x":' * 120 + "[" + "1," * 2_000_000 + "1]" + "}" * 120
    model = hostile.folder(tmp_path / "model", {**ONE, "config.json": deep.encode()})
    with hostile.deadline(60):
        save(open_checkpoint(model), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == deep


@pytest.mark.parametrize(
    "config", [b'{"b": 1,\n\t"a": [1.50, "\\u00e4"]}', b'{"attn_implementation": "sdpa"}', b"{}"]
)
def test_a_harmless_config_is_copied_byte_for_byte(tmp_path: Path, config: bytes) -> None:
    model = hostile.folder(tmp_path / "model", {**ONE, "config.json": config})
    record = save(open_checkpoint(model), str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    assert record["warnings"] == []


def test_the_files_of_every_tokenizer_of_transformers_travel() -> None:
    """Read from its source, since importing all of them would take minutes."""
    models = Path(transformers.__file__).parent / "models"
    table = re.compile(r"VOCAB_FILES_NAMES[^=]*= *\{(.*?)\}", re.DOTALL)
    names = {
        name
        for source in models.glob("*/tokenization_*.py")
        for entries in table.findall(source.read_text("utf-8"))
        for name in re.findall(r': *"([^"]+)"', entries)
    }
    assert {"tokenizer.json", "vocab.txt", "bpe.codes", "dict.txt"} <= names
    assert [name for name in sorted(names) if not travels(name)] == []
