"""What `--dry-run` tells is what the run writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests import cases, hostile
from tests.scene import Scene
from weightsurgery.report.tables import size

RECORD = "wsurg-record.json"
RUNS = {
    "a file": ("file", ["mix"]),
    "a model in shards": ("model", ["mix"]),
    "a model in one file": ("model", ["mix", "--max-shard-size", "1GB"]),
    "a model in other shards": ("model", ["mix", "--max-shard-size", "100"]),
    "another dtype": ("model", ["convert", "--dtype", "bf16"]),
}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize(("kind", "command"), RUNS.values(), ids=RUNS.keys())
def test_the_plan_names_every_file_and_its_size(
    scene: Scene, kind: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "bert", "dtype": "float32", "auto_map": {"AutoModel": "evil.Model"}}
    hostile.folder(scene.model, {"config.json": config})  # it loses a key, and may tell a new dtype
    source, out = scene.file if kind == "file" else scene.model, scene.out(kind)
    inputs = [source] if command[0] == "convert" else [source, source]
    given = [command[0], *inputs, *command[1:], "-o", out]
    assert cases.wsurg(*given, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert cases.wsurg(*given, "--dry-run") == 0
    planned = capsys.readouterr().out
    assert list(scene.place.iterdir()) == []

    assert cases.wsurg(*given) == 0
    told = capsys.readouterr().out
    folder = out if out.is_dir() else scene.place
    found = {name: os.path.getsize(folder / name) for name in os.listdir(folder)}
    (record,) = (name for name in found if name.endswith(RECORD))
    listed = {**plan["files"], **plan["side_files"]}
    assert listed.keys() == found.keys()
    unknown = {name for name, count in listed.items() if count is None}
    assert unknown == {record} | ({"README.md"} & found.keys())
    assert {n: found[n] for n in listed.keys() - unknown} == {
        n: listed[n] for n in listed.keys() - unknown
    }
    assert plan["bytes"] == sum(plan["files"].values())

    files = f"{len(found) - 1} file{'s' if len(found) > 2 else ''}"
    assert re.search(rf"^output +{re.escape(str(out))}, {files} and the record$", planned, re.M)
    known = size(sum(count for count in listed.values() if count is not None))
    assert f"{known}, and {' and '.join(n for n in listed if n in unknown)}, of " in planned
    written = size(sum(found.values()) - found[record])
    assert f"{out}, {written} in {files}, and the record\n" in told
