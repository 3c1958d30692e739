"""Adapters are hostile until proved otherwise: what they say is compared, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import cases
from weightsurgery import apply_adapter, open_checkpoint, save
from weightsurgery.errors import PolicyError

MARK = "zqx"  # in every string of a hostile configuration
STRINGS = {
    "auto_mapping": {"base_model_class": f"{MARK}.Class", "parent_library": f"{MARK}.library"},
    "base_model_name_or_path": f"https://{MARK}.example/other",
    "exclude_modules": f"({MARK}+)+$",
    "layers_pattern": f"({MARK}a+)+$",
    "loftq_config": {"path": f"/dev/{MARK}"},
    "megatron_core": f"{MARK}.core",
    "modules_to_save": [f"({MARK}b*)*"],
    "peft_version": f"{MARK}",
    "rank_pattern": {f"{MARK}.module": 2},
    "alpha_pattern": {f"^{MARK}.module": 2},
    "revision": f"../{MARK}",
    "target_modules": f"({MARK}c+)+$",
    "target_parameters": [f"{MARK}[a"],
    "task_type": f"{MARK}",
    "trainable_token_indices": {f"({MARK}": [1]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, and an adapter whose configuration has hostile strings wherever it can."""
    base = cases.model("llama")
    cases.write_directory(tmp_path / "base", base, config=cases.CONFIGS["llama"])
    config = cases.adapter_config("llama", **STRINGS)
    cases.write_adapter(tmp_path / "adapter", cases.adapter(base, "llama"), config)
    return tmp_path


WATCHED = """
import json, re, sys

heard = None

def hook(event, arguments):
    if heard is not None:
        heard.append([event, [str(argument) for argument in arguments]])

sys.addaudithook(hook)
from weightsurgery import apply_adapter, open_checkpoint, verify_adapter

def work():
    base, adapter = open_checkpoint(sys.argv[1]), open_checkpoint(sys.argv[2])
    merged = apply_adapter(base, adapter, force_base=True)
    verify_adapter(base, [adapter], merged)

work()  # what is imported and compiled at first use
heard = []
work()
try:
    compile({mark!r}, "", "eval")  # the hook hears
finally:
    events, heard = heard, None
json.dump(events, sys.stdout)
"""


def test_nothing_that_an_adapter_says_is_run_or_fetched(folder: Path) -> None:
    code = WATCHED.replace("{mark!r}", repr(MARK))
    command = [sys.executable, "-c", code, str(folder / "base"), str(folder / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *events, last = json.loads(done.stdout)
    assert last[0] == "compile"
    opened = [arguments[0] for event, arguments in events if event == "open"]
    assert opened
    assert all(path.startswith(str(folder)) for path in opened)
    harmless = {"open", "os.listdir", "_thread.start_new_thread", "_thread.start_joinable_thread"}
    harmless |= {"os.putenv", "object.__getattr__", "sys._getframe", "marshal.loads"}
    assert {event for event, _ in events} - harmless == set()
    assert not [e for e in events if MARK in str(e)]


def test_no_expression_of_an_adapter_is_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = re._compile  # type: ignore[attr-defined]  # all of the module goes through it

    def watched(pattern: Any, flags: Any) -> Any:
        seen.append(str(pattern))
        return original(pattern, flags)

    monkeypatch.setattr(re, "_compile", watched)
    re.compile("heard")
    adapter = open_checkpoint(folder / "adapter")
    save(apply_adapter(open_checkpoint(folder / "base"), adapter, force_base=True), folder / "out")
    assert "heard" in seen
    assert not [pattern for pattern in seen if MARK in pattern]


def test_another_base_is_named_and_not_looked_for(folder: Path) -> None:
    with pytest.raises(PolicyError, match=rf"trained on 'https://{MARK}.example/other', BASE is"):
        apply_adapter(open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter"))


HEAVY = ["torch", "transformers", "peft", "scipy.linalg", "accelerate", "requests"]
ALONE = """
import sys
from weightsurgery.cli import main
try:
    main({arguments!r})
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)
"""
COMMANDS = [
    ["apply-adapter", "base", "adapter", "--force-base", "-o", "out"],
    ["verify-adapter", "base", "adapter", "merged"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: words[0])
def test_nothing_heavy_is_imported(arguments: list[str], folder: Path) -> None:
    base, adapter = (open_checkpoint(folder / name) for name in ("base", "adapter"))
    save(apply_adapter(base, adapter, force_base=True), folder / "merged")
    code = ALONE.format(arguments=arguments, heavy=HEAVY)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")
