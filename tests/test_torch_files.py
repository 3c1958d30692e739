"""PyTorch files: read as torch reads them, without torch, without a copy, one state dict chosen."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests import hostile
from weightsurgery import mix, open_checkpoint, replay, save
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.cli import cli, main
from weightsurgery.errors import FormatError, PolicyError, SettingError, SurgeryError
from weightsurgery.formats import hub
from weightsurgery.formats.files import InputFile
from weightsurgery.formats.strided import gather

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
NEW = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.uint16, torch.uint32, torch.uint64),
)
LAYOUTS = {"zip": True, "before 1.6": False}


def state() -> dict[str, torch.Tensor]:
    """Tensors of all kinds: dtypes, views, empty ones, shared ones."""
    torch.manual_seed(5)
    base = torch.randn(6, 4)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.label = "has a state"  # type: ignore[attr-defined]
    complex_ = torch.randn(3, 2, dtype=torch.complex64)
    return {
        **{str(dtype): (base * 9).to(dtype) for dtype in (*FLOATS, *INTEGERS)},
        **{str(dtype): (base * 9).abs().to(dtype) for dtype in NEW},
        "shared": base,
        "shared.transposed": base.t(),
        "shared.part": base[1:3],
        "shared.column": base[:, 2],
        "permuted": torch.arange(120.0).reshape(2, 3, 4, 5).permute(3, 1, 0, 2),
        "windows": torch.arange(9.0).unfold(0, 4, 2),
        "strided": torch.arange(20.0)[::3],
        "expanded": torch.ones(1).expand(7),
        "expanded rows": torch.arange(3.0)[:, None].expand(3, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "empty strided": torch.zeros(4, 0).t(),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "parameter with state": parameter,
        "buffer": torch.nn.Buffer(torch.ones(3)),
        "conjugate": complex_.conj(),
        "imaginary": torch.randn(4, dtype=torch.complex64).conj().imag,
        "odd name/é": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def written(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def assert_equal(found: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """What the safetensors library makes of the tensors is what we read."""
    plain = {n: t.detach().resolve_conj().resolve_neg() for n, t in expected.items()}
    path = Path(found.files[0].path).with_suffix(".expected")
    save_file({n: t.clone().contiguous() for n, t in plain.items()}, path)
    assert hostile.stored(found) == hostile.stored_by_library(path.read_bytes())


# --- as torch reads them ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_is_read_as_torch_reads_it(layout: str, tmp_path: Path) -> None:
    # torch cannot load the new dtypes from a file before 1.6; `test_every_protocol` has them.
    value = {n: t for n, t in state().items() if LAYOUTS[layout] or t.dtype not in NEW}
    path = written(tmp_path / "m.pt", value, _use_new_zipfile_serialization=LAYOUTS[layout])
    found = open_checkpoint(path)
    assert_equal(found, torch.load(path, weights_only=True))
    assert not found.is_directory
    assert [file.path for file in found.files] == [str(path)]
    assert any(
        "shared, shared.column, shared.part, shared.transposed share memory" in warning
        for warning in found.warnings
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_protocol(layout: str, protocol: int, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": LAYOUTS[layout], "pickle_protocol": protocol}
    value = {"model": OrderedDict(state()), "n": 2**70, "b": b"x", "s": {1}, "f": 1.5}
    assert_equal(open_checkpoint(written(tmp_path / "m.pt", value, **options)), state())


def test_numbers_with_the_first_byte_first(tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt", {n: t for n, t in state().items() if t.dtype not in NEW})
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    # torch itself swaps what it loads from a big-endian archive: its answer is the right one.
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(name), b"big" if "byteorder" in name else data)
    expected = torch.load(tmp_path / "big.pt", weights_only=True)
    assert expected["scalar"].item() != 3.5
    assert_equal(open_checkpoint(tmp_path / "big.pt"), expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_run_of_any_view(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    strides = data.draw(st.lists(st.integers(0, 7), min_size=len(shape), max_size=len(shape)))
    offset = data.draw(st.integers(0, 5))
    storage = np.arange(300, dtype=np.float32)
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * s for s in strides])
    start = data.draw(st.integers(0, view.size))
    stop = data.draw(st.integers(start, view.size))

    def read(first: int, count: int) -> Any:
        assert 0 <= first <= first + count <= storage.size
        return storage[first : first + count].copy()

    box = (offset, tuple(shape), tuple(strides))
    found = gather(read, box, start, stop, np.dtype(np.float32))
    assert found.tolist() == view.reshape(-1)[start:stop].tolist()


def test_a_transposed_matrix_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(3_000_000.0).reshape(1000, 3000)
    found = open_checkpoint(written(tmp_path / "m.pt", {"w": weight.t()}))
    sizes = hostile.count_reads(monkeypatch)
    blocks = [found["w"].read(start, stop) for start, stop in found["w"].blocks()]
    assert len(blocks) == 3
    assert np.concatenate(blocks).tolist() == weight.t().reshape(-1).tolist()
    assert sum(sizes) == 12_000_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opening_reads_the_description_alone(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"w": torch.zeros(60_000_000, dtype=torch.uint8)}
    path = written(tmp_path / "m.pt", value, _use_new_zipfile_serialization=LAYOUTS[layout])
    sizes = hostile.count_reads(monkeypatch)
    found = open_checkpoint(path)
    assert sum(sizes) <= (10_000 if LAYOUTS[layout] else 60_000_000)
    sizes.clear()
    found["w"].read(5, 9)
    assert sizes == [4]


def test_torch_stays_out_of_this_process(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", {"w": torch.ones(2)})
    program = (
        "import sys; from weightsurgery import open_checkpoint as o; "
        f"o({str(path)!r})['w'].read(0, 2); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program]) == b"False\n"


def test_a_file_that_python_2_wrote(tmp_path: Path) -> None:
    """Its texts are byte strings, its OrderedDict is made of a list of lists."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor\n((U\x07storagectorch\nFloatStorage\nU\x0210U\x03cpuK\x02N"
        b"tQK\x00K\x02\x85K\x01\x85tR"
    )
    parts = [
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}(U\x10protocol_versionM\xe9\x03U\rlittle_endian\x88u.",
        b"\x80\x02ccollections\nOrderedDict\n(](](U\x01w" + tensor + b"eetR.",
        b"\x80\x02]U\x0210a.",
        struct.pack("<q2f", 2, 1.5, -2.0),
    ]
    (tmp_path / "old.pth").write_bytes(b"".join(parts))
    expected = torch.load(tmp_path / "old.pth", weights_only=False)
    assert_equal(open_checkpoint(tmp_path / "old.pth"), expected)


def test_the_record_names_the_file_and_its_hash(tmp_path: Path) -> None:
    path = written(tmp_path / "m.ckpt", {"w": torch.arange(4.0)})
    record = save(open_checkpoint(path), tmp_path / "out.safetensors")
    (file,) = record["inputs"][0]["files"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file == {"name": "m.ckpt", "size": path.stat().st_size, "sha256": sha256}
    assert "key" not in record["inputs"][0]
    assert open_checkpoint(tmp_path / "out.safetensors")["w"].read(0, 4).tolist() == [0, 1, 2, 3]


# --- which state dict -------------------------------------------------------------------------

W = {"w": torch.ones(2)}
ADAM = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
TRAININGS: dict[str, tuple[Any, str]] = {
    "namespace": (
        {"model": W, "args": argparse.Namespace(lr=1e-4), "epoch": 7},
        "read the state dict 'model'; skipped 'args' (argparse.Namespace), 'epoch' (int)",
    ),
    "numpy scalar": ({"state_dict": W, "best": np.float64(0.9)}, "'best' (numpy"),
    "optimizer": ({"model": W, "optimizer": ADAM}, "skipped 'optimizer' (dict)"),
    "named optimizer": (
        {"model": W, "optim": {"state": {"w": W}, "param_groups": []}},
        "skipped 'optim' (dict)",
    ),
    "random states": (
        {
            "state_dict": W,
            "rng": [torch.get_rng_state(), np.random.RandomState(0), np.random.default_rng(0)],
            "where": torch.device("cpu"),
            "folder": Path("x"),
        },
        "'rng' (list)",
    ),
    "deeper": (
        {"callbacks": {"ema": {"shadow": {**W}}}, "state_dict": W},
        "'callbacks.ema.shadow'",
    ),
    "one deep inside": ({"a": {"b": {"c": W}}, "n": 1}, "read the state dict 'a.b.c'; skipped 'n'"),
    "tensors below its tensors": (
        {"model": {**W, "more": {"x": torch.ones(1)}}},
        "skipped entries that are not tensors: 'more' (dict)",
    ),
    "others among tensors": (
        {**W, "step": 3, "_extra_state": io.BytesIO(b"x")},
        "skipped entries that are not tensors: 'step' (int), '_extra_state' (_io.BytesIO)",
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_of_a_training_are_read_and_the_rest_is_listed(
    layout: str, name: str, tmp_path: Path
) -> None:
    value, told = TRAININGS[name]
    path = written(tmp_path / "m.pt", value, _use_new_zipfile_serialization=LAYOUTS[layout])
    found = open_checkpoint(path)
    assert list(found) == ["w"]
    assert told in " ".join(found.warnings)


SEVERAL = {"model": W, "ema": {"w": torch.zeros(2)}, "opt": ADAM}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (SEVERAL, "'model' (1 tensor), 'ema' (1 tensor)"),
        ({"model": {"a": W, "b": {**W}}}, "'model.a' (1 tensor), 'model.b' (1 tensor)"),
        ({"best": torch.ones(()), "state_dict": W}, "'.' (1 tensor), 'state_dict' (1 tensor)"),
    ],
    ids=["beside", "nested", "its own"],
)
def test_of_several_state_dicts_the_user_chooses(value: Any, told: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.pt", value)
    with pytest.raises(PolicyError, match="ambiguous weights") as refused:
        open_checkpoint(path)
    assert told in str(refused.value)
    assert refused.value.code == "E-PICKLE-SEVERAL"
    for key in told.split("'")[1::2]:
        assert open_checkpoint(path, key=key).key == key
    with pytest.raises(SettingError, match="no state dict 'x' in this file; it holds"):
        open_checkpoint(path, key="x")


def test_the_key_chooses_in_each_input_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "tuned.pt", SEVERAL)
    save_file(W, tmp_path / "base.safetensors")
    written(tmp_path / "base.pt", W)
    for base in ("base.safetensors", "base.pt"):
        command = ["diff", base, "tuned.pt", "--key", "ema", "--json"]
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
        assert json.loads(capsys.readouterr().out)["model"]["changed"] == 2
        with pytest.raises(SystemExit) as ended:
            main([*command[:-3], "--key", "emma"])
        assert ended.value.code == 2
        assert "no state dict 'emma' in this file; it holds 'model'" in capsys.readouterr().err


def test_a_key_without_a_pytorch_file_is_refused(tmp_path: Path) -> None:
    save_file(W, tmp_path / "base.safetensors")
    hostile.folder(tmp_path / "model", {"model.safetensors": hostile.weights("a")})
    for path in (tmp_path / "base.safetensors", tmp_path / "model"):
        with pytest.raises(SettingError, match="names a state dict of a PyTorch file"):
            open_checkpoint(path, key="ema")


def test_a_recorded_key_is_replayed(tmp_path: Path) -> None:
    written(tmp_path / "tuned.pt", SEVERAL)
    save_file({"w": torch.arange(2.0)}, tmp_path / "base.safetensors")
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.pt"
    made = mix(open_checkpoint(base), open_checkpoint(tuned, key="ema"), ratio=0.5)
    record = save(made, tmp_path / "out.safetensors")
    assert [given.get("key") for given in record["inputs"]] == [None, "ema"]
    report = replay(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    assert report["identical"]


# --- directories ------------------------------------------------------------------------------


def sharded(path: Path, **changed: Any) -> Path:
    """A model directory of two pickled shards."""
    hostile.folder(path, {"config.json": {"model_type": "bert"}})
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    written(path / names[0], {"a": torch.ones(3)})
    written(path / names[1], {"b": torch.zeros(2, 2, dtype=torch.bfloat16)})
    weight_map = {"a": names[0], "b": names[1], **changed}
    hostile.folder(path, {"pytorch_model.bin.index.json": hostile.index(weight_map, 20)})
    return path


def test_a_sharded_directory_is_read_written_and_replayed(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "model"))
    assert found.warnings == ()
    save(found, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *hostile.SHARDS,
        *(hostile.INDEX, "config.json", "README.md", "wsurg-record.json"),
    }
    assert hostile.stored(open_checkpoint(tmp_path / "out")) == hostile.stored(found)
    assert replay(tmp_path / "out", tmp_path / "again")["identical"]


def test_a_chosen_pickle_is_replayed(tmp_path: Path) -> None:
    hostile.sharded(tmp_path / "m")
    written(tmp_path / "m" / "pytorch_model.bin", W)
    with pytest.raises(PolicyError, match="ambiguous"):
        open_checkpoint(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m", weights="pytorch_model.bin")
    save(found, tmp_path / "out")
    assert replay(tmp_path / "out", tmp_path / "again")["identical"]


def test_an_adapter_with_pickled_weights(tmp_path: Path) -> None:
    hostile.folder(tmp_path / "a", {"adapter_config.json": {"peft_type": "LORA"}})
    written(tmp_path / "a" / "adapter_model.bin", {"w.lora_A.weight": torch.ones(1, 2)})
    found = open_checkpoint(tmp_path / "a")
    assert dict(found.layout) == {"w.lora_A.weight": "adapter_model.safetensors"}


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "a.safetensors", "x\\a.bin", ".bin"])
def test_an_index_names_plain_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"plain name ending in \.bin"):
        open_checkpoint(sharded(tmp_path / "m", a=name))


def test_pickles_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    content = written(tmp_path / "m.bin", W).read_bytes()
    files = {"pytorch_model.bin": content, "config.json": {"model_type": "bert"}}
    hostile.hub_cache(tmp_path / "hub", "org/name", files)
    found = open_checkpoint("org/name")
    assert found.hub_id == f"org/name@{hostile.COMMIT}"
    assert list(found) == ["w"]


def test_pickles_are_fetched_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched: list[list[str]] = []

    def fetch(_repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        fetched.append(allow_patterns)
        return "snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert len(list(hub.snapshots("org/name"))) == 3
    assert ["pytorch_model.bin" in patterns for patterns in fetched] == [False, False, True]


# --- the options ------------------------------------------------------------------------------


def test_whoever_opens_models_has_all_the_options() -> None:
    with cli.make_context("wsurg", ["inspect", "x"], resilient_parsing=True) as context:
        commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    having = {
        flag: {n for n, c in commands.items() if c and any(flag in p.opts for p in c.params)}
        for flag in ("--weights", "--key", "--allow-pickle")
    }
    assert having["--weights"] == having["--key"] == having["--allow-pickle"]
    assert {"inspect", "diff", "mix", "fisher", "evaluate"} <= having["--key"]


@pytest.mark.parametrize("flag", [[], ["--allow-pickle"]])
def test_the_old_flag_changes_nothing(
    flag: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "m.bin", W)
    (tmp_path / "wsurg.toml").write_text("[inspect]\nallow-pickle = true\n")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "m.bin", "--json", *flag])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["tensors"]
    for allowed in (False, True):
        assert list(open_checkpoint(tmp_path / "m.bin", allow_pickle=allowed)) == ["w"]


def test_the_file_is_held_by_its_tensors(tmp_path: Path) -> None:
    path = written(tmp_path / "m.bin", W)
    found = open_checkpoint(path)
    path.unlink()
    assert found["w"].read(0, 2).tolist() == [1, 1]
    with pytest.raises(SurgeryError):
        found.check_unchanged()
    assert isinstance(found.files[0].check_unchanged.__self__, InputFile)  # type: ignore[attr-defined]
