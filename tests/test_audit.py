"""Opening a model runs nothing of it: the interpreter itself is asked, by an audit hook.

Everything is opened in one fresh process, after a few good models: what is imported at first use is
imported then. From there on opening may list the model's directory and open its files to read. What
is opened is all of the gallery of hostile inputs, and the cases here, which tempt to run code.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import hostile
from tests.gallery import gallery
from tests.hostile import INDEX, SHARDS, entry, index, raw, weights

LOOKS = {"open", "os.listdir", "os.scandir"}
ALLOWED = {*LOOKS, "builtins.id"}  # json asks for it where it writes, for a record's digest
SCRIPT = """
import json, os, pickle, sys
from weightsurgery import open_checkpoint
from weightsurgery.adapters.config import read_config
from weightsurgery.errors import SurgeryError
from weightsurgery.formats.recorded import read_record
from weightsurgery.formats.vocabulary import read_special, read_vocabulary

events = None

def hook(event, arguments):
    if events is not None:
        events.append([event, [str(argument) for argument in arguments]])

def watch(action):
    global events
    events, told = [], ""
    try:
        action()
    except SurgeryError as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        seen, events = events, None
    return seen, told

def opened(path):
    if path.endswith("wsurg-record.json"):
        read_record(path)
        return
    checkpoint = open_checkpoint(path)
    for further in (read_vocabulary, read_special, read_config):
        try:
            further(checkpoint)
        except SurgeryError:  # it is looked at only where it is wanted
            pass

warm_up, paths = json.load(sys.stdin)
sys.addaudithook(hook)
for path in warm_up:
    watch(lambda: opened(path))
found = {path: watch(lambda: opened(path)) for path in paths}
controls = {
    "exec": lambda: exec("1"),
    "compile": lambda: compile("1", "", "eval"),
    "import": lambda: __import__("this_module_is_not_there_at_all"),
    "pickle.find_class": lambda: pickle.loads(b"cos\\ngetpid\\n."),
    "os.system": lambda: os.system("true"),
    "subprocess.Popen": lambda: __import__("subprocess").Popen(["true"]).wait(),
    "socket.__new__": lambda: __import__("socket").socket().close(),
    "ctypes.dlopen": lambda: __import__("ctypes").CDLL(None),
}

def quietly(action):
    def run():
        try:
            action()
        except ImportError:
            pass
    return run

seen = {event: watch(quietly(action))[0] for event, action in controls.items()}
json.dump([found, seen], sys.stdout)
"""


class Evil:
    """Its pickle runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch code-ran",)


Events = list[tuple[str, list[str]]]
PICKLE = pickle.dumps({"w": Evil()}, 2)
CODE = b"open('code-ran', 'w')\n"
AUTO_MAP = {"AutoModel": "modeling_evil.Model", "AutoConfig": "evil/repo--config.Config"}
BOMB = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}


def model(files: dict[str, Any]) -> Callable[[Path], Path]:
    """A directory of these files."""
    return lambda path: hostile.folder(path, files)


def file(content: bytes, name: str = "x.safetensors") -> Callable[[Path], Path]:
    """A file on its own."""
    return lambda path: hostile.folder(path, {name: content}) / name


def shards(changed: dict[str, Any]) -> Callable[[Path], Path]:
    """A model in two shards, changed."""
    return lambda path: hostile.sharded(path, changed)


def zipped(name: str) -> Callable[[Path], Path]:
    """An archive of torch's that holds a program."""

    def make(path: Path) -> Path:
        path.mkdir()
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("archive/data.pkl", PICKLE)
        return path / name

    return make


def saved(path: Path, *, zipped: bool = True) -> Path:
    """A state dict as torch saves it, in either layout."""
    import torch

    path.mkdir()
    value = {"model": {"w": torch.ones(3, 2).t()}, "args": argparse.Namespace(lr=1)}
    torch.save(value, path / "x.pt", _use_new_zipfile_serialization=zipped)
    return path / "x.pt"


def linked(path: Path) -> Path:
    """A model whose config is a link that leads out."""
    hostile.folder(path, ONE)
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("/etc/hosts")
    return path


def cached(path: Path) -> Path:
    """A snapshot in a hub cache, with code beside its weights."""
    return hostile.hub_cache(path, "org/name", {**ONE, "modeling_evil.py": CODE})


# What opening says; "" where the model opens, for all that lies beside its weights.
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "good file": (file(weights("a", "b")), ""),
    "good model": (model(ONE), ""),
    "good shards": (shards({}), ""),
    "hub cache": (cached, ""),
    "pickle": (file(PICKLE, "x.bin"), "PolicyError"),
    "pickle, zipped": (zipped("x.bin"), "PolicyError"),
    "pickle, renamed": (file(PICKLE), "FormatError"),
    "pickle, zipped and renamed": (zipped("x.safetensors"), "FormatError"),
    "pickle in a model": (model({"pytorch_model.bin": PICKLE}), "PolicyError"),
    "pickle as the model": (model({**ONE, "model.safetensors": PICKLE}), "FormatError"),
    "pickle as a shard": (shards({SHARDS[1]: PICKLE}), "FormatError"),
    "state dict of torch's": (saved, ""),
    "state dict of torch's, before 1.6": (partial(saved, zipped=False), ""),
    "pickle as config": (model({**ONE, "config.json": PICKLE}), "FormatError"),
    "pickle as index": (shards({INDEX: PICKLE}), "FormatError"),
    "pickle as side files": (
        model({**ONE, "tokenizer.model": PICKLE, "vocab.bin": PICKLE, "optimizer.pt": PICKLE}),
        "",
    ),
    "empty file": (file(b""), "FormatError"),
    "header too long": (file(raw({}, length=10**8 + 1)), "FormatError"),
    "header not JSON": (file(raw(b'{"w":')), "FormatError"),
    "header not UTF-8": (file(raw(b'{"\xff": 1}')), "FormatError"),
    "header in UTF-7": (file(raw("{+AGE-}".encode("utf-7"))), "FormatError"),
    "header nested": (file(raw(b'{"w":' + b"[" * 10**5)), "FormatError"),
    "header is Python": (file(raw(b"{__import__('os').system('touch code-ran')}")), "FormatError"),
    "half a surrogate": (file(raw(b'{"\\ud800":{}}')), "FormatError"),
    "dtype unknown": (file(raw({"w": entry(dtype="os.system")})), "FormatError"),
    "name to escape": (file(raw({"\x1b[31m\u202e\n": entry(dtype="?")})), "FormatError"),
    "metadata": (
        file(raw({"__metadata__": {"__reduce__": "os.system", "format": "os"}, "w": entry()})),
        "",
    ),
    "auto_map": (
        model(
            {
                **ONE,
                "config.json": {"auto_map": AUTO_MAP, "trust_remote_code": True},
                "modeling_evil.py": CODE,
                "__init__.py": CODE,
                "sitecustomize.py": CODE,
                "evil.pth": b"import os; os.system('touch code-ran')\n",
            }
        ),
        "",
    ),
    "attention from a repository": (
        model({**ONE, "config.json": {"attn_implementation": "evil/kernel"}}),
        "",
    ),
    "config names weights": (
        model({**ONE, "config.json": {"transformers_weights": "/etc/hosts"}}),
        "PolicyError",
    ),
    "config names a base": (
        model({**ONE, "adapter_config.json": {"base_model_name_or_path": "evil/base"}}),
        "PolicyError",
    ),
    "config leads out": (linked, "PolicyError"),
    "index leads out": (
        shards({INDEX: index({"a": SHARDS[0], "b": "../secret.safetensors"})}),
        "FormatError",
    ),
    "index leads to the root": (
        shards({INDEX: index({"a": SHARDS[0], "b": "/etc/b.safetensors"})}),
        "FormatError",
    ),
    "index leads to the network": (
        shards({INDEX: index({"a": SHARDS[0], "b": "https://127.0.0.1/b.safetensors"})}),
        "FormatError",
    ),
    "shard missing": (
        shards({INDEX: index({"a": SHARDS[0], "b": "c.safetensors"})}),
        "FormatError",
    ),
    "tokenizer with code": (
        model(
            {
                **ONE,
                "tokenizer.json": {"pre_tokenizer": BOMB, "model": {"type": "os.system"}},
                "tokenizer_config.json": {"auto_map": AUTO_MAP, "tokenizer_class": "Evil"},
                "chat_template.jinja": b"{{ cycler.__init__.__globals__.os.system('true') }}",
            }
        ),
        "",
    ),
    "tokenizer not JSON": (model({**ONE, "tokenizer.json": b"\xff" + b"[" * 10**5}), ""),
    "modules of Python's": (
        model({**ONE, "json.py": CODE, "numpy.py": CODE, "encodings.py": CODE}),
        "",
    ),
}

GALLERY = gallery()


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Where the models lie, and what opening each made the interpreter tell; and the controls."""
    root = tmp_path_factory.mktemp("audited")
    (root / "secret.safetensors").write_bytes(weights("b"))
    warm_up = [hostile.sharded(root / "warm"), file(weights("w"))(root / "up"), root / "nowhere"]
    paths = {name: [str(make(root / name))] for name, (make, _) in CASES.items()}
    for number, (name, exhibit) in enumerate(GALLERY.items()):
        paths[name] = [str(path) for path in exhibit.make(root / str(number))]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([list(map(str, warm_up)), [p for given in paths.values() for p in given]]),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr
    found, controls = json.loads(finished.stdout)
    return root, {name: [found[path] for path in given] for name, given in paths.items()}, controls


def check_events(events: Events, folder: Path) -> None:
    """Nothing but looking into this folder, and reading."""
    assert [(event, given) for event, given in events if event not in ALLOWED] == []
    for event, (path, *how) in [told for told in events if told[0] in LOOKS]:
        assert folder == Path(path) or folder in Path(path).parents
        assert event != "open" or not int(how[1]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize(("name", "outcome"), [(n, said) for n, (_, said) in CASES.items()])
def test_opening_runs_nothing(name: str, outcome: str, heard: tuple[Path, Any, Any]) -> None:
    root, found, _ = heard
    ((events, told),) = found[name]
    assert told.partition(":")[0] == outcome
    check_events(events, root / name)
    assert not list(root.rglob("code-ran"))


@pytest.mark.parametrize(("number", "name"), list(enumerate(GALLERY)), ids=list(GALLERY))
def test_opening_anything_hostile_runs_nothing(
    number: int, name: str, heard: tuple[Path, Any, Any]
) -> None:
    root, found, _ = heard
    for events, told in found[name]:
        assert GALLERY[name].fate == "either" or bool(told) == (GALLERY[name].fate == "is refused")
        check_events(events, root / str(number))


def test_every_model_was_looked_at(heard: tuple[Path, Any, Any]) -> None:
    _, found, _ = heard
    for name in CASES:
        ((events, told),) = found[name]
        assert ("open" in {event for event, _ in events}) == (name != "config leads out"), (
            name,
            told,
        )


def test_the_hook_hears_what_must_not_happen(heard: tuple[Path, Any, Any]) -> None:
    _, _, controls = heard
    assert len(controls) == 8
    for event, events in controls.items():
        assert event in {told for told, _ in events}
