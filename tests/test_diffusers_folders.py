"""Outputs of a diffusers folder have the file names that diffusers looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import hostile
from tests.hostile import weights
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import PolicyError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.operators.mix import mix
from weightsurgery.proof.verification import verify

CONFIG = {"config.json": {"_class_name": "UNet2DConditionModel"}}
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def single(place: Path, seed: int, name: str = SINGLE) -> Path:
    return hostile.folder(place, {**CONFIG, name: weights("a", "b", seed=seed)})


def sharded(place: Path, seed: int, *, index: bool = True) -> Path:
    files = {shard: weights(name, seed=seed) for shard, name in zip(SHARDS, "ab", strict=True)}
    listed = {INDEX: hostile.index(dict(zip("ab", SHARDS, strict=True)))} if index else {}
    return hostile.folder(place, {**CONFIG, **files, **listed})


def written(checkpoint: Checkpoint, out: Path, **settings: int) -> set[str]:
    plan = save(checkpoint, out, **settings)
    assert verify(out)["proved"]
    assert set(open_checkpoint(out)) == set(checkpoint)
    assert plan["outputs"].keys() == {p.name for p in out.iterdir()} - {"wsurg-record.json"}
    return plan["outputs"].keys() - {"config.json", "README.md"}


def test_a_single_file_keeps_its_name(tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(single(tmp_path / n, i)) for i, n in enumerate("bt"))
    assert written(mix(base, tuned), tmp_path / "out") == {SINGLE}
    report = verify(tmp_path / "out", base=base, tuned=tuned)
    assert report["proved"]
    assert report["selection"]["known_by"] == ["recipe"]
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_shards_keep_their_names_and_their_index(tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(sharded(tmp_path / n, i)) for i, n in enumerate("bt"))
    assert written(mix(base, tuned), tmp_path / "out") == {*SHARDS, INDEX}
    assert verify(tmp_path / "out", base=base, tuned=tuned)["proved"]
    listed = json.loads((tmp_path / "out" / INDEX).read_bytes())["weight_map"]
    assert listed == dict(zip("ab", SHARDS, strict=True))


def test_shards_without_an_index_get_one(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "model", 0, index=False))
    assert written(found, tmp_path / "out") == {*SHARDS, INDEX}


def test_other_shards_are_named_alike(tmp_path: Path) -> None:
    found = open_checkpoint(single(tmp_path / "model", 0))
    assert written(found, tmp_path / "out", max_shard_size=1) == {*SHARDS, INDEX}


def test_a_variant_loses_its_suffix(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.fp16.safetensors"
    found = open_checkpoint(single(tmp_path / "model", 0, name), weights=name)
    assert written(found, tmp_path / "out") == {SINGLE}


def test_a_pickle_becomes_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = hostile.folder(tmp_path / "model", CONFIG)
    torch.save({"a": torch.ones(2)}, model / "diffusion_pytorch_model.bin")
    found = open_checkpoint(model)
    assert written(found, tmp_path / "out") == {SINGLE}


@pytest.mark.parametrize("other", ["model.safetensors", INDEX])
def test_two_answers_are_refused(tmp_path: Path, other: str) -> None:
    files = {SINGLE: weights("a"), other: weights("a") if other != INDEX else {}}
    with pytest.raises(PolicyError, match="ambiguous weights") as told:
        open_checkpoint(hostile.folder(tmp_path / "model", {**CONFIG, **files}))
    assert told.value.code == "E-TWO-ANSWERS"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, "20kB"], ids=["one file", "shards"])
def test_diffusers_loads_what_operators_write(tmp_path: Path, limit: str | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    for name in ("base", "tuned"):
        unet.save_pretrained(tmp_path / name, **({"max_shard_size": limit} if limit else {}))
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(1.0)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    save(mix(base, tuned, ratio=1.0), tmp_path / "out")
    assert {p.name for p in (tmp_path / "tuned").iterdir()} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    expected = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base").state_dict()
    found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
