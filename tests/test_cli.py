"""The command line: results, errors in one line, exit codes, settings files, signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from weightsurgery import OPERATORS, SurgeryError, errors
from weightsurgery.cli import _OWN, cli, main, operator_summaries

WSURG = [sys.executable, "-m", "weightsurgery"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Path:
    """A working directory with base.safetensors and tuned.safetensors."""
    base = {
        "layers.0.weight": rng.standard_normal((8, 16), np.float32),
        "layers.1.weight": rng.standard_normal((8, 16), np.float32),
        "steps": np.arange(4),
    }
    tuned = {n: a + 0.01 * (a.dtype == np.float32) for n, a in base.items()}
    tuned = {n: a.astype(base[n].dtype) for n, a in tuned.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIR = ["base.safetensors", "tuned.safetensors"]


def run(*arguments: str) -> int:
    """Run in this process; give the exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_version_and_help_list_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name, operator in OPERATORS.items():
        assert name in text
        assert operator_summaries()[name] == operator.summary
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("wsurg, version ")


def test_mix_writes_what_python_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from weightsurgery import mix, open_checkpoint, save

    assert run("mix", *PAIR, "--ratio", "0.3", "-o", "a.safetensors") == 0
    assert "effective share" in capsys.readouterr().out
    save(mix(*map(open_checkpoint, PAIR), ratio=0.3), "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_reserve_is_the_exact_complement(folder: Path) -> None:
    assert run("mix", *PAIR, "--ratio", "0.3", "-o", "ratio.safetensors") == 0
    assert run("mix", *PAIR, "--reserve", "0.7", "-o", "reserve.safetensors") == 0
    assert Path("ratio.safetensors").read_bytes() == Path("reserve.safetensors").read_bytes()
    records = [json.loads(Path(f"{n}.safetensors.wsurg-record.json").read_text()) for n in
               ("ratio", "reserve")]  # fmt: skip
    assert records[0]["recipe"] == records[1]["recipe"]


def test_ratio_for_include_and_exclude(folder: Path) -> None:
    arguments = ["--ratio", "0", "--ratio-for", "layers.1.*=1", "-o", "out.safetensors"]
    assert run("mix", *PAIR, *arguments) == 0
    base, tuned, out = map(load_file, [*PAIR, "out.safetensors"])
    np.testing.assert_array_equal(out["layers.0.weight"], tuned["layers.0.weight"])
    np.testing.assert_array_equal(out["layers.1.weight"], base["layers.1.weight"])
    arguments = ["--ratio", "1", "--exclude", "layers.1.*", "-o", "out.safetensors", "--overwrite"]
    assert run("mix", *PAIR, *arguments) == 0
    out = load_file("out.safetensors")
    np.testing.assert_array_equal(out["layers.0.weight"], base["layers.0.weight"])
    np.testing.assert_array_equal(out["layers.1.weight"], tuned["layers.1.weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", *PAIR, "--json"],
        ["inspect", "base.safetensors", "--json"],
        ["inspect", "base.safetensors", "--json", "--values"],
        ["mix", *PAIR, "-o", "o.safetensors", "--json"],
        ["mix", *PAIR, "-o", "o.safetensors", "--json", "--dry-run"],
        ["interpolate", *PAIR, "-o", "o.safetensors", "--json"],
    ],
    ids=" ".join,
)
def test_json_is_one_document(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["schema"].startswith("wsurg.")


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    assert run("mix", *PAIR, "-o", "o.safetensors", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "nothing was written" in text
    assert "2 edited" in text
    assert sorted(os.listdir()) == before


def test_dry_run_tells_the_warnings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_file("base.safetensors")
    save_file({**base, "classifier.weight": np.zeros((2, 8), np.float32)}, "base.safetensors")
    assert run("mix", *PAIR, "-o", "o.safetensors", "--dry-run", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: BASE has a head that TUNED lacks")
    assert json.loads(captured.out)["schema"].startswith("wsurg.")


def test_diff_shows_tensors_and_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", *PAIR) == 0
    text = capsys.readouterr().out
    assert "layers.0.weight" in text
    assert "\x1b" not in text  # a pipe gets plain text
    assert run("diff", *PAIR, "--csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tensor,layer,kind,dtype,shape,count")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ([], 20),
        (["--top", "3"], 3),
        (["--top", "22"], 22),
        (["--top", "0"], 20),
        (["--top", "3", "--all"], 25),
        (["--top", "3", "--csv"], 25),
    ],
    ids=str,
)
def test_top_and_all_say_how_many_tensors_are_listed(
    arguments: list[str], rows: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, value in zip(PAIR, (0, 1), strict=True):
        many = {f"layers.{i}.weight": np.full((2, 2), i * value, np.float32) for i in range(25)}
        save_file(many, path)
    assert run("diff", *PAIR, *arguments) == 0
    first = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert len([line for line in first if line.startswith("layers.")]) == rows
    note = f"{25 - rows} tensors of smaller drift are not shown; --all shows them"
    assert (note in first) == (rows < 25)


def test_diff_writes_the_drift(folder: Path) -> None:
    assert run("diff", *PAIR, "--drift", "drift.safetensors") == 0
    base, tuned, drift = map(load_file, [*PAIR, "drift.safetensors"])
    assert set(drift) == {"layers.0.weight", "layers.1.weight"}
    for name, values in drift.items():
        np.testing.assert_array_equal(values, tuned[name] - base[name])


@pytest.mark.parametrize(
    ("out", "code", "words"),
    [
        ("drift", 2, "does not end in .safetensors"),
        ("base.safetensors", 5, "overlap the input"),
        ("taken.safetensors", 5, "--overwrite"),
        ("nowhere/drift.safetensors", 6, "does not exist"),
    ],
    ids=["suffix", "input", "exists", "folder"],
)
def test_a_bad_destination_of_the_drift_is_told_before_the_pass(
    out: str,
    code: int,
    words: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("weightsurgery.cli.diff_command.diff")  # a NameError if it is called
    Path("taken.safetensors").write_bytes(b"mine")
    assert run("diff", *PAIR, "--drift", out) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert Path("taken.safetensors").read_bytes() == b"mine"


def test_the_report_outlives_a_drift_that_cannot_be_saved(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = load_file("tuned.safetensors")
    tuned["layers.0.weight"][0, 0] = np.nan
    save_file(tuned, "tuned.safetensors")
    arguments = ["diff", *PAIR, "--json", "--drift", "drift.safetensors"]
    assert run(*arguments, "--fail-if", "tuned_nan > 0") == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"]["tuned_nan"] == 1
    assert "tensor 'layers.0.weight'" in captured.err.splitlines()[-1]
    assert not Path("drift.safetensors").exists()
    assert run(*arguments, "--allow-nonfinite") == 0
    assert Path("drift.safetensors").exists()


@pytest.mark.parametrize("flag", ["--overwrite", "--allow-nonfinite", "--hash", "--no-hash"])
def test_flags_of_the_drift_ask_for_a_drift(
    flag: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", *PAIR, flag) == 2
    captured = capsys.readouterr()
    assert flag in captured.err
    assert "give --drift too" in captured.err
    # In the file they may be meant for other commands.
    Path("wsurg.toml").write_text("overwrite = true\nno-hash = true")
    assert run("diff", *PAIR) == 0


def test_the_record_of_the_drift_goes_without_hashes(folder: Path) -> None:
    assert run("diff", *PAIR, "--drift", "drift.safetensors", "--no-hash") == 0
    record = json.loads(Path("drift.safetensors.wsurg-record.json").read_text())
    assert [entry["sha256"] for entry in record["tensors"].values()] == [None, None]


def test_inspect_keeps_to_a_memory_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "base.safetensors", "--values", "--max-memory"]
    assert run(*arguments, "2GB") == 0
    capsys.readouterr()
    assert run(*arguments, "1MB") == 2
    assert "one worker needs" in capsys.readouterr().err


# --- which weights ----------------------------------------------------------------------------


@pytest.fixture
def two_answers(folder: Path) -> Path:
    """A folder `model` beside the pair, with other.safetensors beside model.safetensors."""
    Path("model").mkdir()
    for source, name in zip(PAIR, ("model", "other"), strict=True):
        Path("model", f"{name}.safetensors").write_bytes(Path(source).read_bytes())
    return folder


@pytest.mark.parametrize("order", [1, -1], ids=["tuned", "base"])
def test_weights_are_for_the_input_that_has_them(
    order: int, two_answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["base.safetensors", "model"][::order]
    for weights, changed in (("model.safetensors", 0), ("other.safetensors", 256)):
        assert run("diff", *pair, "--weights", weights, "--json") == 0
        assert json.loads(capsys.readouterr().out)["model"]["changed"] == changed


@pytest.mark.parametrize("order", [1, -1], ids=["tuned", "base"])
def test_weights_are_looked_for_in_the_hubs_cache(
    order: int,
    two_answers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "model")
    pair = ["base.safetensors", "org/name"][::order]
    assert run("diff", *pair, "--weights", "other.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["changed"] == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diff", *PAIR], "base.safetensors: --weights names a file of a model directory"),
        (["mix", *PAIR, "-o", "o.safetensors"], "but this is a file"),
        (["inspect", "base.safetensors"], "but this is a file"),
        (
            ["diff", "base.safetensors", "model"],
            "model: weights file not found: absent.safetensors",
        ),
        (
            ["diff", "model", "base.safetensors"],
            "model: weights file not found: absent.safetensors",
        ),
        (["diff", "model", "model"], "model: weights file not found: absent.safetensors"),
    ],
    ids=["diff", "mix", "inspect", "tuned lacks it", "base lacks it", "both lack it"],
)
def test_weights_that_no_input_has_are_an_error(
    arguments: list[str], words: str, two_answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--weights", "absent.safetensors") == 2
    assert words in capsys.readouterr().err


# --- gates and errors -------------------------------------------------------------------------


def test_gates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", *PAIR, "--fail-if", "relative_l2 > 0.5") == 0
    assert run("diff", *PAIR, "--fail-if", "*.1.*: max_abs > 1e-3", "--json") == 10
    captured = capsys.readouterr()
    assert "layers.1.weight: max_abs is 0.01" in captured.err


def spoil(kind: str) -> list[str]:
    """Make one thing wrong in the working directory; give the arguments that meet it."""
    out = ["-o", "out.safetensors"]
    if kind == "usage":
        return ["mix", *PAIR]
    if kind == "ratio":
        return ["mix", *PAIR, *out, "--ratio", "1.5"]
    if kind == "glob":
        return ["mix", *PAIR, *out, "--exclude", "layer.0.*"]
    if kind == "both":
        return ["mix", *PAIR, *out, "--ratio", "0.3", "--reserve", "0.7"]
    if kind == "rule":
        return ["mix", *PAIR, *out, "--ratio-for", "layers.0.weight"]
    if kind == "reserve":
        return ["mix", *PAIR, *out, "--reserve", "most"]
    if kind == "csv and json":
        return ["diff", *PAIR, "--csv", "--json"]
    if kind == "command":
        return ["mixx", *PAIR, *out]
    if kind == "size":
        return ["mix", *PAIR, *out, "--max-memory", "much"]
    if kind == "endless size":
        return ["mix", *PAIR, *out, "--max-memory", "9" * 400]
    if kind == "gate":
        return ["diff", *PAIR, "--fail-if", "relativ_l2 > 1"]
    if kind == "suffix":
        return ["mix", *PAIR, "-o", "out"]
    if kind == "malformed":
        Path("tuned.safetensors").write_bytes(b"\xff" * 100)
    if kind == "other model":
        save_file({"else": np.zeros(3, np.float32)}, "tuned.safetensors")
    if kind == "exists":
        Path("out.safetensors").write_bytes(b"mine")
    if kind == "pickle":
        return ["mix", "base.safetensors", "model.bin", *out]
    if kind == "absent":
        return ["mix", "base.safetensors", "nowhere.safetensors", *out]
    return ["mix", *PAIR, *out]


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("usage", 2, "-o OUT is missing"),
        ("ratio", 2, "ratio is 1.5; expected a share from 0 to 1"),
        ("glob", 2, "did you mean 'layers.0.weight'"),
        ("both", 2, "exclude each other"),
        ("rule", 2, "expected GLOB=NUMBER"),
        ("reserve", 2, "expected a number"),
        ("csv and json", 2, "exclude each other"),
        ("command", 2, "did you mean 'mix'"),
        ("size", 2, "is not a size"),
        ("endless size", 2, "more bytes than there can be"),
        ("gate", 2, "unknown metric 'relativ_l2'"),
        ("suffix", 2, "does not end in .safetensors"),
        ("malformed", 3, "tuned.safetensors"),
        ("other model", 4, "could be paired"),
        ("exists", 5, "--overwrite"),
        ("pickle", 3, "zip archive"),
        ("absent", 6, "no such file"),
    ],
)
def test_errors_are_one_line_with_their_code(
    kind: str, code: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model.bin").write_bytes(b"PK\x03\x04")
    arguments = spoil(kind)
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(r"error\[E-[A-Z-]+\]: ", captured.err)
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def test_every_error_has_its_own_exit_code() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.__name__: k.exit_code for k in kinds if SurgeryError in k.__bases__}
    assert codes.pop("DemoError") == SurgeryError.exit_code  # the command that failed told its own
    assert sorted(codes.values()) == [2, 3, 4, 5, 6, 7, 10]


# --- wsurg.toml -------------------------------------------------------------------------------

SETTINGS = """
base = "base.safetensors"
tuned = "tuned.safetensors"
out = "out.safetensors"
ratio = 0.9

[mix]
seed = 5
ratio-for = ["layers.1.*=0"]
"""


def test_settings_file_supplies_arguments(folder: Path) -> None:
    Path("wsurg.toml").write_text(SETTINGS)
    assert run("mix", "--ratio", "0.3") == 0
    record = json.loads(Path("out.safetensors.wsurg-record.json").read_text())
    settings = record["recipe"]["settings"]
    assert (settings["ratio"], settings["seed"]) == (0.3, 5)
    assert settings["ratio_for"] == [["layers.1.*", 0.0]]


def test_settings_file_complement_yields_to_the_command_line(folder: Path) -> None:
    Path("wsurg.toml").write_text(SETTINGS)
    assert run("mix", "--reserve", "0.75", "--json") == 0
    record = json.loads(Path("out.safetensors.wsurg-record.json").read_text())
    assert record["recipe"]["settings"]["ratio"] == 0.25


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("ratoi = 0.3", 2, "unknown setting 'ratoi'; did you mean 'ratio'?"),
        ("[mixx]\nratio = 1", 2, "unknown command 'mixx'; did you mean 'mix'?"),
        ("[mix]\nweight = 1", 2, "unknown setting of mix 'weight'"),
        ("ratio = ", 3, "not valid TOML"),
        ("mix = 3", 2, "wsurg.toml: 'mix' is 3; it is a command, so expected a table"),
        ('ratio = "half"', 2, "wsurg.toml: 'ratio' is 'half'; expected a number"),
        ("[mix]\nseed = 1.5", 2, "wsurg.toml: 'mix.seed' is 1.5; expected an integer"),
        ("seed = true", 2, "wsurg.toml: 'seed' is true; expected an integer"),
        ("overwrite = 1", 2, "wsurg.toml: 'overwrite' is 1; expected true or false"),
        ("[finetune]\nheld-out = true", 2, "'finetune.held-out' is true; expected a share or a"),
        ("out = 3", 2, "wsurg.toml: 'out' is 3; expected a string"),
        ('out = "a\\u0000b"', 2, "wsurg.toml: 'out' is 'a\\x00b'; expected a string"),
        ('out = ["a"]', 2, "wsurg.toml: 'out' is a list; expected a string"),
        ("exclude = [1]", 2, "wsurg.toml: 'exclude' is 1; expected a string, or a list"),
        ("exclude = [{}]", 2, "wsurg.toml: 'exclude' is a table; expected a string"),
        (f"max-memory = 0x{'f' * 5000}", 2, "wsurg.toml: 'max-memory' is a number of 20,000 bits"),
        ("workers = -1", 2, "wsurg.toml: Invalid value for '--workers'"),
        ('[mix]\nmax-memory = "much"', 2, "wsurg.toml: Invalid value for '--max-memory'"),
        (f"seed = {'9' * 5000}", 3, "not valid TOML"),
        ("#" * (1 << 20) + "\n", 3, "expected at most 1,048,576"),
    ],
    ids=[
        *("key", "table", "key of a table", "syntax", "scalar for a table", "float", "integer"),
        *(
            "bool for an integer",
            "integer for a flag",
            "share or file",
            "string",
            "NUL",
            "list",
            "member",
        ),
        *("nested", "huge", "range", "size", "digits", "length"),
    ],
)
def test_settings_file_errors(
    text: str, code: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wsurg.toml").write_text(text)
    assert run("mix", *PAIR, "-o", "out.safetensors") == code
    assert words in capsys.readouterr().err


def test_settings_file_takes_the_second_form_of_a_flag(folder: Path) -> None:
    Path("wsurg.toml").write_text("hash = true\n[mix]\nno-hash = true")
    for command, hashed in (("mix", False), ("interpolate", True)):
        assert run(command, *PAIR, "-o", f"{command}.safetensors") == 0
        record = json.loads(Path(f"{command}.safetensors.wsurg-record.json").read_text())
        assert (record["tensors"]["layers.0.weight"]["sha256"] is not None) == hashed
    Path("wsurg.toml").write_text("[mix]\nno_hash = false")
    assert run("mix", *PAIR, "-o", "again.safetensors") == 0
    record = json.loads(Path("again.safetensors.wsurg-record.json").read_text())
    assert record["tensors"]["layers.0.weight"]["sha256"] is not None


def test_settings_file_takes_one_string_for_a_repeatable_option(folder: Path) -> None:
    Path("wsurg.toml").write_text('exclude = "layers.1.*"\nfail-if = "max_abs > 1e-3"')
    assert run("mix", *PAIR, "--ratio", "1", "-o", "out.safetensors") == 0
    base, tuned, out = map(load_file, [*PAIR, "out.safetensors"])
    np.testing.assert_array_equal(out["layers.0.weight"], base["layers.0.weight"])
    np.testing.assert_array_equal(out["layers.1.weight"], tuned["layers.1.weight"])
    assert run("diff", *PAIR) == 10


def test_a_named_pipe_is_no_settings_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    assert run("--config", "pipe", "diff", *PAIR) == 3
    assert "pipe: expected a regular file" in capsys.readouterr().err


def test_what_a_settings_file_supplies_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wsurg.toml").write_text(SETTINGS)
    assert run("mix", "--ratio", "0.3") == 0
    assert capsys.readouterr().err == (
        'from wsurg.toml: base = "base.safetensors", tuned = "tuned.safetensors", seed = 5, '
        'ratio-for = ["layers.1.*=0"], out = "out.safetensors"\n'
    )
    assert run("inspect", PAIR[0]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_overruled_is_not_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wsurg.toml").write_text("ratio = 0.3")
    assert run("mix", *PAIR, "--reserve", "0.8", "-o", "a.safetensors") == 0
    assert capsys.readouterr().err == ""


def test_the_settings_file_can_be_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wsurg.toml").write_text("not TOML")
    assert run("diff", *PAIR) == 3
    assert run("--no-config", "diff", *PAIR) == 0
    assert run("--no-config", "--config", "wsurg.toml", "diff", *PAIR) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_shell_completes_file_names(folder: Path) -> None:
    environment = {**os.environ, "_WSURG_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    for words in ("wsurg inspect ba", "wsurg diff ba", "wsurg mix ba"):
        done = subprocess.run(
            WSURG,
            env={**environment, "COMP_WORDS": words},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "file,ba\n"


def test_inputs_come_from_one_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wsurg.toml").write_text(SETTINGS)
    assert run("diff", "tuned.safetensors") == 2
    assert "give BASE TUNED on the command line, or all in wsurg.toml" in capsys.readouterr().err
    assert run("diff", *PAIR) == 0


def test_config_option_names_another_file(folder: Path) -> None:
    Path("other.toml").write_text(SETTINGS)
    assert run("--config", "other.toml", "mix") == 0
    assert run("--config", "absent.toml", "mix") == 6


# --- names ------------------------------------------------------------------------------------


def test_name_map_and_prefix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_file("base.safetensors")
    save_file({f"old.{n}": a for n, a in base.items()}, "prefixed.safetensors")
    names = {"layers.0.weight": "old.layers.1.weight"}
    Path("names.json").write_text(json.dumps(names))
    arguments = ["prefixed.safetensors", "tuned.safetensors", "--json"]
    assert run("diff", *arguments, "--strip-prefix", "old.") == 0
    assert json.loads(capsys.readouterr().out)["alignment"]["eligible_tensors"] == 2
    assert run("diff", *arguments, "--map", "names.json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {e["tensor"] for e in report["tensors"]} == {"layers.0.weight"}
    Path("names.json").write_text('{"layers.0.weight": 3}')
    assert run("diff", *arguments, "--map", "names.json") == 2


# --- as processes -----------------------------------------------------------------------------

FORBIDDEN = """
import sys
from weightsurgery.cli import main
try:
    main({arguments!r})
except SystemExit as stopped:
    assert not stopped.code, stopped.code
print([m for m in {modules!r} if m in sys.modules], file=sys.stderr)
"""


HEAVY = ["torch", "transformers", "scipy.linalg"]


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["--help"], ["torch", "transformers", "numba", "numpy", "rich"]),
        (["inspect", "base.safetensors"], HEAVY),
        (["diff", *PAIR], HEAVY),
        (["mix", *PAIR, "-o", "out.safetensors"], HEAVY),
        (["interpolate", *PAIR, "-o", "out.safetensors"], HEAVY),
        (["extract-adapter", *PAIR, "-o", "adapter"], ["torch", "transformers"]),
    ],
    ids=["help", "inspect", "diff", "mix", "interpolate", "extract-adapter"],
)
def test_nothing_heavy_is_imported(arguments: list[str], modules: list[str], folder: Path) -> None:
    code = FORBIDDEN.format(arguments=arguments, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


def test_scipy_is_whole_after_numba_was_imported_without_it() -> None:
    code = (
        "from weightsurgery.cli.startup import import_numba; import_numba(); import_numba(); "
        "import sys, scipy.linalg; import_numba(); print(sys.modules['scipy.linalg'].det([[2.]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.0"]


def test_importing_the_package_is_light() -> None:
    code = "import sys, weightsurgery; print('numpy' in sys.modules, weightsurgery.mix.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "mix"]


def test_without_a_command_there_is_help(folder: Path) -> None:
    done = subprocess.run(WSURG, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "\nCommands:\n  apply-adapter " in done.stderr
    assert "error[" not in done.stderr


def test_a_locale_of_bare_ascii_will_do(folder: Path) -> None:
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"} | plain
    done = subprocess.run([*WSURG, "diff", *PAIR], capture_output=True, env=environment, check=True)
    assert b"max |?|" in done.stdout


def test_where_the_drift_went_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", *PAIR, "--drift", "drift.safetensors", "--json") == 0
    told = capsys.readouterr()
    assert told.err == "the drift is in drift.safetensors, its record beside it\n"
    assert json.loads(told.out)["schema"] == "wsurg.diff/1"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_encoding_of_stdout_will_do(encoding: str, folder: Path) -> None:
    save_file({"wärme.δ": np.ones((2, 2), np.float32)}, "greek.safetensors")

    def stdout(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [*WSURG, *arguments], capture_output=True, env=environment, check=True
        )
        return done.stdout.decode(encoding)

    assert "max |" in stdout("diff", *PAIR)
    assert "rme." in stdout("inspect", "greek.safetensors")
    report = json.loads(stdout("inspect", "greek.safetensors", "--json"))
    assert report["tensors"][0]["tensor"] == "wärme.δ"  # escaped, not replaced


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_told(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*WSURG, "diff", *PAIR], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 6
    assert done.stderr == b"error[E-STORAGE]: the system said: No space left on device\n"


def test_our_bugs_come_with_a_traceback_and_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("nobody thought of this")

    monkeypatch.setattr("weightsurgery.cli.diff_command.diff", fail)
    assert run("diff", *PAIR) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert "AttributeError: nobody thought of this" in lines
    assert lines[-1].startswith("error[E-BUG]: this is a bug in weightsurgery")
    assert "report it with the traceback" in lines[-1]


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    many = {f"layers.{i}.weight": np.zeros((2, 2), np.float32) for i in range(4000)}
    save_file(many, "many.safetensors")
    command = [*WSURG, "inspect", "many.safetensors"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_a_signal_leaves_nothing(number: signal.Signals, code: int, folder: Path) -> None:
    for name in ("big_base", "big_tuned"):
        save_file({"w": np.ones((4096, 4096), np.float32)}, f"{name}.safetensors")
    before = sorted(os.listdir())
    command = [*WSURG, "mix", "big_base.safetensors", "big_tuned.safetensors", "-o"]
    with subprocess.Popen([*command, "out.safetensors"], stderr=subprocess.PIPE) as process:
        while not any(name.startswith(".wsurg-") for name in os.listdir()):
            time.sleep(0.001)
            assert process.poll() is None, "finished before the signal"
        process.send_signal(number)
        assert process.wait(30) == code
        word = b"interrupted" if number == signal.SIGINT else b"terminated"
        assert process.stderr is not None
        assert process.stderr.read() == b"error[E-%s]: %s; nothing is left half-written\n" % (
            word.upper(),
            word,
        )
    assert sorted(os.listdir()) == before


def test_a_terminal_gets_colour_and_no_color_is_honoured(folder: Path) -> None:
    def on_terminal(**extra: str) -> bytes:
        main_end, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **extra}
        environment = {k: v for k, v in environment.items() if v}
        process = subprocess.Popen(
            [*WSURG, "diff", *PAIR], stdout=terminal, stderr=terminal, env=environment
        )
        os.close(terminal)
        text = b""
        while True:
            try:
                part = os.read(main_end, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            text += part
        os.close(main_end)
        assert process.wait() == 0
        return text

    assert b"\x1b[1m" in on_terminal(NO_COLOR="")
    assert b"\x1b[3" not in on_terminal(NO_COLOR="1")


@pytest.mark.parametrize("name", ["", *_OWN, *OPERATORS])
def test_help_fits_a_terminal_of_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*name.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    examples = lines[next(i for i, line in enumerate(lines) if line.startswith("  Example")) :]
    broken = [i for i, line in enumerate(examples) if line.endswith("\\")]
    assert all(examples[i + 1].startswith(" " * 8) for i in broken)


def test_commands_are_documented() -> None:
    import click

    with click.Context(cli) as context:
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            assert command is not None
            assert "Example" in (command.help or "")
            options = [p for p in command.params if isinstance(p, click.Option)]
            assert all(option.help for option in options)
