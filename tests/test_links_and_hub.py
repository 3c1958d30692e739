"""Links in model directories and hub caches, and hub ids found in a cache."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.numpy

from tests import cases, hostile
from tests.hostile import COMMIT, INDEX, SHARDS, weights
from weightsurgery import apply_adapter, from_arrays
from weightsurgery.errors import ChangedError, FormatError, PolicyError, StorageError
from weightsurgery.formats import hub, open_checkpoint, save

ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}
# --- links and hub caches ---------------------------------------------------------------------

FILES = {**ONE, "tokenizer.json": {"model": {}}}


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    snapshot = hostile.hub_cache(tmp_path, "org/name", FILES)
    assert (snapshot / "model.safetensors").is_symlink()
    for place in (snapshot, f"{snapshot}/", os.path.relpath(snapshot)):
        found = open_checkpoint(place)
        assert hostile.stored(found) == hostile.stored_by_library(weights("a"))
        assert [side.name for side in found.side_files] == ["config.json", "tokenizer.json"]
        assert found.hub_id == ""


def test_a_link_to_a_model_directory_is_followed(tmp_path: Path) -> None:
    snapshot = hostile.hub_cache(tmp_path, "org/name", FILES)
    (tmp_path / "link").symlink_to(snapshot)
    assert set(open_checkpoint(tmp_path / "link")) == {"a"}


def cache_with_targets(root: Path) -> Path:
    """A cached repository beside everything that a link might lead to."""
    snapshot = hostile.hub_cache(root, "org/name", FILES)
    home = snapshot.parent.parent
    hostile.hub_cache(root, "org/other", FILES)
    hostile.folder(home, {"secret": weights("a")})
    hostile.folder(snapshot, {"plain": weights("a")})
    hostile.folder(home / "blobs" / "deep", {"secret": weights("a")})
    hostile.folder(home / "snapshots" / "other", {"secret": weights("a")})
    (home / "blobs" / "out").symlink_to("../secret")
    (home / "blobs" / "in").symlink_to(f"{0:064x}")
    return snapshot


def relink(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


OUT = {
    "the repository's root": "../../secret",
    "a folder in blobs": "../../blobs/deep/secret",
    "out again over blobs": "../../blobs/out",
    "out again by dots": "../../blobs/../secret",
    "another snapshot": "../other/secret",
    "another repository": f"../../../models--org--other/blobs/{0:064x}",
    "the same directory": "plain",
    "an absolute path": "/etc/hosts",
}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("target", OUT.values(), ids=OUT.keys())
def test_must_refuse_links_in_a_cache_to(tmp_path: Path, name: str, target: str) -> None:
    snapshot = cache_with_targets(tmp_path)
    relink(snapshot / name, target)
    assert (snapshot / name).is_file()
    with pytest.raises(PolicyError, match=r"leads out .*; put .* or pass --follow-links") as told:
        open_checkpoint(snapshot)
    hostile.check_told(told.value, file=snapshot / name)


@pytest.mark.parametrize("target", ["/dev/zero", "model.safetensors", "nowhere"])
def test_must_refuse_links_to_nothing(tmp_path: Path, target: str) -> None:
    snapshot = cache_with_targets(tmp_path)
    relink(snapshot / "model.safetensors", target)
    with hostile.deadline(), pytest.raises(PolicyError, match="link that leads out"):
        open_checkpoint(snapshot)


def test_must_refuse_a_missing_blob(tmp_path: Path) -> None:
    snapshot = cache_with_targets(tmp_path)
    relink(snapshot / "model.safetensors", "../../blobs/gone")
    with pytest.raises(StorageError, match="cannot open: No such file") as told:
        open_checkpoint(snapshot)
    hostile.check_told(told.value, file=snapshot / "model.safetensors")


def test_a_link_over_a_link_within_blobs_is_followed(tmp_path: Path) -> None:
    snapshot = cache_with_targets(tmp_path)
    relink(snapshot / "model.safetensors", "../../blobs/in")
    assert set(open_checkpoint(snapshot)) == {"a"}


# --- folders in a snapshot, as pipelines have them ---------------------------------------------


def pipeline(root: Path, *, depth: int = 1) -> Path:
    """A folder in a cached snapshot, whose files are links into the repository's blobs/."""
    snapshot = hostile.hub_cache(root, "org/name", {"model_index.json": {}})
    part = snapshot.joinpath(*("unet", "deep", "er")[:depth])
    part.mkdir(parents=True)
    for number, (name, content) in enumerate(FILES.items(), 100):
        hostile.folder(snapshot.parent.parent / "blobs", {f"{number:064x}": content})
        (part / name).symlink_to(Path("../" * (depth + 2)) / "blobs" / f"{number:064x}")
    return part


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_folder_in_a_snapshot_opens(tmp_path: Path, depth: int) -> None:
    part = pipeline(tmp_path, depth=depth)
    (tmp_path / "link").symlink_to(part)
    for place in (part, f"{part}/", os.path.relpath(part), tmp_path / "link"):
        found = open_checkpoint(place)
        assert hostile.stored(found) == hostile.stored_by_library(weights("a"))
        assert [side.name for side in found.side_files] == ["config.json", "tokenizer.json"]


SUBFOLDER_OUT = {
    "another repository": f"../../../../models--org--other/blobs/{0:064x}",
    "the snapshot above": "../plain",
    "a folder in blobs": "../../../blobs/deep/secret",
    "out again over blobs": "../../../blobs/out",
    "blobs of nobody": "../../blobs/0",
    "an absolute path": "/etc/hosts",
}


@pytest.mark.parametrize("target", SUBFOLDER_OUT.values(), ids=SUBFOLDER_OUT.keys())
def test_must_refuse_links_of_a_folder_in_a_snapshot(tmp_path: Path, target: str) -> None:
    part = cache_with_targets(tmp_path) / "unet"
    hostile.folder(part, {"config.json": {}})
    hostile.folder(part.parent.parent / "blobs", {"0": weights("a")})
    (part / "model.safetensors").symlink_to(target)
    assert (part / "model.safetensors").is_file()
    with pytest.raises(PolicyError, match="link that leads out") as told:
        open_checkpoint(part)
    hostile.check_told(told.value, file=part / "model.safetensors")


# --- --follow-links ----------------------------------------------------------------------------


def linked(root: Path) -> Path:
    """A model whose files are links into a store that all users share."""
    store = hostile.sharded(root / "store" / "ab" / "cd", {"vocab.txt": b"a"})
    model = root / "model"
    model.mkdir()
    for name in sorted(os.listdir(store)):
        (model / name).symlink_to(store / name)
    return model


def test_links_are_followed_if_asked(tmp_path: Path) -> None:
    model = linked(tmp_path)
    with pytest.raises(PolicyError, match=r"--follow-links \(follow_links=True\)") as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model / "config.json")
    found = open_checkpoint(model, follow_links=True)
    store = open_checkpoint(tmp_path / "store" / "ab" / "cd")
    assert hostile.stored(found) == hostile.stored(store)
    assert [f.sha256(None) for f in found.files] == [f.sha256(None) for f in store.files]
    assert [f.name for f in found.side_files] == [f.name for f in store.side_files]


def test_the_command_line_follows_links_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = linked(tmp_path)
    before = hostile.contents(tmp_path)
    convert = ("convert", model, "-o", "out")
    assert cases.wsurg(*convert) == 5
    assert "pass --follow-links" in capsys.readouterr().err
    assert hostile.contents(tmp_path) == before
    assert cases.wsurg(*convert, "--follow-links") == 0
    record = json.loads(Path("out/wsurg-record.json").read_text())
    for file in record["inputs"][0]["files"]:
        content = (tmp_path / "store" / "ab" / "cd" / file["name"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert not [path for path in Path("out").iterdir() if path.is_symlink()]
    replay = ("replay", "out", "--input", f"0={model}", "-o", "again")
    capsys.readouterr()
    assert cases.wsurg(*replay) == 5
    assert "pass --follow-links" in capsys.readouterr().err
    assert cases.wsurg(*replay, "--follow-links") == 0
    assert cases.wsurg("verify", "again") == 0


def test_a_settings_file_cannot_follow_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = linked(tmp_path)
    Path("wsurg.toml").write_text("follow-links = true")
    assert cases.wsurg("inspect", model) == 2
    assert "type --follow-links; wsurg.toml cannot give it" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["store", "store/ab", "store/ab/cd"])
def test_an_output_never_replaces_what_a_link_leads_to(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linked(tmp_path)
    before = hostile.contents(tmp_path)
    words = ("--follow-links", "--overwrite", "-o", tmp_path / out)
    assert cases.wsurg("convert", model, *words) == 5
    assert "E-OUTPUT-OVERLAP" in capsys.readouterr().err
    assert hostile.contents(tmp_path) == before


LINKS_TO_NOTHING = {
    "dangling": ("nowhere", "E-LINK-DANGLING"),
    "a loop": (SHARDS[0], "E-LINK-LOOP"),
    "a pipe": ("../pipe", "E-FILE-KIND"),
    "a device": ("/dev/zero", "E-FILE-KIND"),
    "a folder": ("..", "E-FILE-KIND"),
}


@pytest.mark.parametrize(("target", "code"), LINKS_TO_NOTHING.values(), ids=LINKS_TO_NOTHING.keys())
def test_no_link_is_followed_to_what_is_no_file(tmp_path: Path, target: str, code: str) -> None:
    model = linked(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    relink(model / SHARDS[0], target)
    with hostile.deadline(), pytest.raises((StorageError, FormatError)) as told:
        open_checkpoint(model, follow_links=True)
    hostile.check_told(told.value, file=model / SHARDS[0])
    assert told.value.code == code


def test_a_linked_file_that_changes_is_noticed(tmp_path: Path) -> None:
    found = open_checkpoint(linked(tmp_path), follow_links=True)
    relink(tmp_path / "model" / SHARDS[0], str(tmp_path / "store" / "ab" / "cd" / SHARDS[1]))
    with pytest.raises(ChangedError, match="the file changed while it was read"):
        found.check_unchanged()


@pytest.mark.parametrize("name", ["config.json", SHARDS[1], INDEX, "vocab.txt"])
@pytest.mark.parametrize("place", ["elsewhere", "deep/model/same", "deep/blobs/0", "blobs/0"])
def test_must_refuse_links_in_a_plain_directory(tmp_path: Path, name: str, place: str) -> None:
    model = hostile.sharded(tmp_path / "deep" / "model", {"vocab.txt": b"a"})
    hostile.folder((tmp_path / place).parent, {Path(place).name: (model / name).read_bytes()})
    relink(model / name, os.path.relpath(tmp_path / place, model))
    with pytest.raises(PolicyError, match="symbolic link that leads out") as told:
        open_checkpoint(model)
    hostile.check_told(told.value, file=model / name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"], ids=["", "branch", "commit"])
def test_a_hub_id_is_found_in_the_cache(cache: Path, revision: str) -> None:
    hostile.hub_cache(cache, "org/name", FILES)
    found = open_checkpoint(f"org/name{revision}")
    assert hostile.stored(found) == hostile.stored_by_library(weights("a"))
    assert found.hub_id == f"org/name@{COMMIT}"
    assert found.label == f"org/name{revision}"
    record = save(found, str(cache.parent / "out"))
    assert record["inputs"][0]["name"] == f"org/name@{COMMIT}"
    assert "base_model:\n- org/name\n" in (cache.parent / "out" / "README.md").read_text()


@pytest.fixture
def adapted(cache: Path) -> dict[str, object]:
    """A base and an adapter of it in the cache, under one commit; gives the base's arrays."""
    base = cases.model("llama")
    config = cases.adapter_config("llama", base_model_name_or_path="org/base")
    files = {
        "org/base": {"model.safetensors": base, "config.json": cases.CONFIGS["llama"]},
        "org/adapter": {
            "adapter_model.safetensors": cases.adapter(base, "llama"),
            "adapter_config.json": config,
        },
    }
    for repo, given in files.items():
        plain = {
            name: safetensors.numpy.save(content) if name.endswith("tensors") else content
            for name, content in given.items()
        }
        hostile.hub_cache(cache, repo, plain)
    return base


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"], ids=["", "branch", "commit"])
def test_base_and_adapter_are_found_in_the_cache(
    cache: Path, adapted: cases.Arrays, revision: str
) -> None:
    base, adapter = (open_checkpoint(f"org/{name}{revision}") for name in ("base", "adapter"))
    assert adapter.hub_id == f"org/adapter@{COMMIT}"
    out = cache.parent / "out"
    assert cases.wsurg("apply-adapter", base.label, adapter.label, "-o", out) == 0
    assert cases.wsurg("verify-adapter", base.label, adapter.label, out) == 0
    given = from_arrays(adapted), from_arrays(cases.read(adapter), config=adapter.config)
    expected = cases.read(apply_adapter(*given, force_base=True))
    assert cases.stored_in(out) == cases.stored(expected)
    record = json.loads((out / "wsurg-record.json").read_text())
    assert [one["name"] for one in record["inputs"]] == [
        f"org/{name}@{COMMIT}" for name in ("base", "adapter")
    ]
    assert [file["name"] for file in record["inputs"][1]["files"]] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]


def test_an_adapters_two_files_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(_repo: str, *, allow_patterns: list[str], **_options: object) -> str:
        asked.extend(allow_patterns)
        return "/nowhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert list(hub.snapshots("org/adapter")) == ["/nowhere"] * 3
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in asked)


def test_an_adapter_beside_a_models_weights_is_two_answers(cache: Path) -> None:
    hostile.hub_cache(cache, "org/name", {**ONE, "adapter_config.json": {"peft_type": "LORA"}})
    with pytest.raises(PolicyError, match=r"model\.safetensors and adapter_config\.json"):
        open_checkpoint("org/name")


def test_a_local_path_comes_before_a_hub_id(cache: Path) -> None:
    hostile.hub_cache(cache, "org/name", FILES)
    hostile.folder(cache.parent / "org" / "name", {"model.safetensors": weights("local")})
    found = open_checkpoint("org/name")
    assert (set(found), found.hub_id) == ({"local"}, "")


def test_a_cache_without_the_weights_is_not_enough(cache: Path) -> None:
    snapshot = hostile.hub_cache(cache, "org/name", {"config.json": {}})
    with pytest.raises(FormatError, match=r"no model\.safetensors and no") as told:
        open_checkpoint("org/name")
    hostile.check_told(told.value, file=snapshot)


BAD_IDS = ["org/na--me", "org/..", "org/name.", f"org/{'x' * 99}", "-/-"]


@pytest.mark.parametrize("name", ["org/gone", "org/name@v1", f"org/gone@{COMMIT}", *BAD_IDS])
def test_a_hub_id_that_is_not_there(cache: Path, name: str) -> None:
    hostile.hub_cache(cache, "org/name", FILES)
    with pytest.raises(StorageError, match="neither a local path nor a hub repository") as told:
        open_checkpoint(name)
    assert str(told.value).startswith(f"'{name}' is neither")
    assert str(told.value).isprintable()
    assert told.value.exit_code == 6
