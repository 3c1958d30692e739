"""Names paired by hand: a prefix to strip, a map from TUNED's names to BASE's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases
from weightsurgery.alignment import align
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.errors import SettingError
from weightsurgery.name_map import match_names


def numbered(*names: str) -> Checkpoint:
    """Each tensor holds its own number."""
    return from_arrays({name: np.full(2, i, np.float32) for i, name in enumerate(names)})


def values(checkpoint: Checkpoint) -> dict[str, int]:
    return {name: int(array[0]) for name, array in cases.read(checkpoint).items()}


@pytest.mark.parametrize(
    ("base", "tuned", "expected"),
    [
        (["p.a", "p.b"], ["a", "b"], {"a": 0, "b": 1}),
        (["a", "b"], ["p.a", "p.b"], {"p.a": 0, "p.b": 1}),
        (["p.a", "b"], ["a", "p.b"], {"a": 0, "p.b": 1}),
        (["p.a", "c"], ["p.a", "b"], {"p.a": 0, "c": 1}),
        (["p.a", "a"], ["p.a", "b"], {"p.a": 0, "a": 1}),
    ],
    ids=["on base", "on tuned", "on both", "exact names stay", "exact name wins"],
)
def test_strip_prefix(base: list[str], tuned: list[str], expected: dict[str, int]) -> None:
    found = match_names(numbered(*base), numbered(*tuned), strip_prefix="p.")
    assert values(found) == expected


def test_the_map_wins_over_the_prefix() -> None:
    base, tuned = numbered("p.a", "other", "p.b"), numbered("a", "b")
    found = match_names(base, tuned, strip_prefix="p.", name_map={"a": "other"})
    assert values(found) == {"a": 1, "b": 2, "p.a": 0}


def test_names_can_be_swapped() -> None:
    swap = {"a": "b", "b": "a"}
    assert values(match_names(numbered("a", "b"), numbered("a", "b"), name_map=swap)) == {
        "a": 1,
        "b": 0,
    }


def test_without_rules_nothing_changes() -> None:
    base = numbered("a", "b")
    assert values(match_names(base, base)) == values(base)


def test_the_layout_is_renamed_with_the_tensors(tmp_path: Path) -> None:
    from weightsurgery.formats import open_checkpoint

    arrays = {"p.a": np.zeros(2, np.float32), "p.b": np.ones(2, np.float32)}
    base = open_checkpoint(cases.write_directory(tmp_path / "base", arrays, shards=2))
    found = match_names(base, numbered("a", "b"), strip_prefix="p.")
    assert found.layout == {n.removeprefix("p."): shard for n, shard in base.layout.items()}
    assert [view.name for view in found.values()] == ["a", "b"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "prefix": ({"strip_prefix": "model."}, r"no tensor name begins with 'model\.'"),
    "tuned name": (
        {"name_map": {"layer.wieght": "layer.weight"}},
        r"tuned: tensor 'layer.wieght': the name map names .* not there; did you mean 'layer.wei",
    ),
    "base name": ({"name_map": {"layer.weight": "zzz"}}, "base: tensor 'zzz': the name map names"),
}


@pytest.mark.parametrize(("rules", "message"), WRONG.values(), ids=WRONG)
def test_errors(rules: dict[str, Any], message: str) -> None:
    shapes = {"layer.weight": np.zeros(2, np.float32), "spare": np.zeros(2, np.float32)}
    base, tuned = from_arrays(shapes, label="base"), from_arrays(shapes, label="tuned")
    with pytest.raises(SettingError, match=message) as caught:
        match_names(base, tuned, **rules)
    assert caught.value.exit_code == 2


def test_a_displaced_tensor_is_listed_and_pairs_with_nothing() -> None:
    base, tuned = numbered("a", "b"), numbered("a")
    found = align(match_names(base, tuned, name_map={"a": "b"}), tuned)
    (pair,) = found.pairs
    assert pair.base is not None
    assert pair.base.read(0, 1).tolist() == [1]
    ((name, _),) = found.unused
    assert name == "a (BASE's; the name map gives its place to another)"


class TestCommandLine:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path]:
        base, tuned = cases.pair("bert")
        renamed = {f"old/{name}": array for name, array in base.items()}
        return (
            cases.write_file(tmp_path / "base.safetensors", renamed),
            cases.write_file(tmp_path / "tuned.safetensors", tuned),
        )

    def test_strip_prefix(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "out.safetensors"
        assert cases.wsurg("mix", *files, "-o", out) == 4
        code = cases.wsurg("mix", *files, "-o", out, "--strip-prefix", "old/", "--ratio", 1)
        assert code == 0
        floating = cases.shapes_of("bert")
        base = cases.stored(cases.model("bert"))
        assert {n: s for n, s in cases.stored_in(out).items() if n in floating} == {
            n: s for n, s in base.items() if n in floating
        }

    @pytest.mark.parametrize("as_file", [False, True])
    def test_map(self, as_file: bool, files: tuple[Path, Path], tmp_path: Path) -> None:
        names: Any
        out, name = tmp_path / "out.safetensors", cases.EMBEDDING["bert"]
        if as_file:
            names = tmp_path / "map.json"
            names.write_text(json.dumps({name: f"old/{name}"}))
        else:
            names = f"{name}=old/{name}"
        assert cases.wsurg("mix", *files, "-o", out, "--map", names, "--ratio", 1) == 4
        given = ["--map", names, "--ratio", 1, "--allow-partial"]
        assert cases.wsurg("mix", *files, "-o", out, *given) == 0
        _, tuned = cases.pair("bert")
        expected = cases.stored(tuned | {name: cases.model("bert")[name]})
        assert cases.stored_in(out) == expected

    @pytest.mark.parametrize(
        ("content", "code", "message"),
        [
            ('{"a": 1}', 2, "the name map gives no name"),
            ("[]", 3, "name map is a JSON list, not an object"),
            ("{", 3, "name map is not valid JSON"),
            ('{"a": "b", "a": "c"}', 3, "key 'a' occurs twice"),
            ('{"nothing": "b"}', 2, "tensor 'nothing': the name map names a tensor that is not"),
        ],
    )
    def test_maps_that_cannot_be(
        self,
        files: tuple[Path, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        content: str,
        code: int,
        message: str,
    ) -> None:
        names = tmp_path / "map.json"
        names.write_text(content)
        assert cases.wsurg("diff", *files, "--map", names) == code
        assert message in capsys.readouterr().err


def test_a_renamed_base_still_aligns() -> None:
    base = numbered("p.a", "p.b")
    tuned = numbered("a", "b")
    found = align(match_names(base, tuned, strip_prefix="p."), tuned)
    assert [p.base.name for p in found.pairs if p.base] == ["a", "b"]
    assert (found.prefix, found.unused) == ("", ())
