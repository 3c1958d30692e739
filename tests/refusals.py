"""For every error code something hostile that earns it, and the command line that meets it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, hostile
from tests.bombs import packed
from tests.hostile import INDEX, SHARDS, entry, index, raw, weights
from weightsurgery.cli import _TerminatedError, demo_command
from weightsurgery.demo.run import _wsurg
from weightsurgery.errors import FormatError, MismatchError, PolicyError
from weightsurgery.formats.layout import MODULES
from weightsurgery.formats.output import Output
from weightsurgery.formats.place import temporary_of
from weightsurgery.formats.record import sealed
from weightsurgery.formats.strict_json import dump

ONE = {"model.safetensors": weights("a"), "config.json": {"model_type": "bert"}}
FRONT = "base_model.model."


@dataclass(frozen=True)
class Place:
    """Where a case builds what it needs.

    Attributes:
        folder: Empty, and the working directory.
        patch: For faults of the system.
        stack: For what has to stay open meanwhile.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    stack: ExitStack

    def pair(
        self, tuned: cases.Arrays, base: cases.Arrays | None = None, *, command: str = "mix"
    ) -> list[Any]:
        """A mix, or an interpolation, of two files."""
        given = cases.model("bert") if base is None else base
        files = {"base": given, "tuned": tuned}
        made = [cases.write_file(self.folder / f"{n}.safetensors", a) for n, a in files.items()]
        share = "--ratio" if command == "mix" else "--weight"
        return [command, *made, share, "0.5", "-o", self.folder / "out.safetensors"]

    def mix(self, out: str = "out.safetensors", *more: str) -> list[Any]:
        """A mix of two files with which nothing is wrong."""
        return [*self.pair(cases.model("bert"))[:-1], self.folder / out, *more]

    def merge(
        self, change: Callable[[cases.Arrays], cases.Arrays] | None = None, **config: Any
    ) -> list[Any]:
        """An adapter, changed, to be folded in."""
        base = cases.model("bert")
        arrays = cases.adapter(base)
        cases.write_directory(self.folder / "base", base)
        changed = change(arrays) if change else arrays
        cases.write_adapter(self.folder / "adapter", changed, cases.adapter_config(**config))
        return ["apply-adapter", "base", "adapter", "-o", "out"]


Case = Callable[[Place], list[Any]]


def file(content: bytes) -> Case:
    """A file of these bytes."""

    def build(place: Place) -> list[Any]:
        hostile.folder(place.folder, {"x.safetensors": content})
        return ["inspect", place.folder / "x.safetensors"]

    return build


def header(*, begin: int = 0, end: int = 4, data: int = 4, **changed: Any) -> Case:
    """A file of one tensor, whose entry is changed."""
    return file(raw({"w": {**entry(begin, end), **changed}}, bytes(data)))


def text(words: str) -> Case:
    """A file with this header."""
    return file(raw(words.encode(), b""))


def model(files: dict[str, Any]) -> Case:
    """A model directory of these files."""

    def build(place: Place) -> list[Any]:
        return ["inspect", hostile.folder(place.folder / "model", files)]

    return build


def shards(changed: dict[str, Any]) -> Case:
    """A model in two shards, changed."""

    def build(place: Place) -> list[Any]:
        return ["inspect", hostile.sharded(place.folder / "model", changed)]

    return build


def at(make: Callable[[Path], Any]) -> Case:
    """Something that is made where a file should be."""

    def build(place: Place) -> list[Any]:
        make(place.folder / "x.safetensors")
        return ["inspect", place.folder / "x.safetensors"]

    return build


def broken(name: str, answer: Callable[..., Any], *, mix: bool = False) -> Case:
    """A call of the system that goes wrong."""

    def build(place: Place) -> list[Any]:
        arguments = place.mix() if mix else file(weights("a"))(place)
        place.patch.setattr(os, name, answer)
        return arguments

    return build


def failing(number: int) -> Callable[..., Any]:
    """A call that fails with this number."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def stopped(
    error: type[BaseException] | BaseException, module: str = "weightsurgery.cli.inspect_command"
) -> Case:
    """A command that ends with this exception, such as an operator of one's own may raise."""

    def build(place: Place) -> list[Any]:
        def stop(*_: object, **__: object) -> Any:
            raise error

        place.patch.setattr(f"{module}.inspect", stop)
        return file(weights("a"))(place)

    return build


def listening(path: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)  # a whole path may be too long for a socket


def changed(**arrays: np.ndarray) -> Callable[[cases.Arrays], cases.Arrays]:
    """With these tensors besides."""
    return lambda given: {**given, **{FRONT + n: a for n, a in arrays.items()}}


def tensors(**arrays: tuple[np.ndarray, np.ndarray]) -> Case:
    """Tensors of BASE and TUNED, beside one that is in both."""

    def build(place: Place) -> list[Any]:
        w = np.ones((2, 3), "f4")
        base, tuned = ({"w": w, **{n: pair[i] for n, pair in arrays.items()}} for i in (0, 1))
        return place.pair(tuned, base)

    return build


def adapter(change: Callable[[cases.Arrays], cases.Arrays] | None = None, **config: Any) -> Case:
    """An adapter that is changed so."""
    return lambda place: place.merge(change, **config)


def outside(place: Place) -> list[Any]:
    """A model whose config leads out of it."""
    path = hostile.folder(place.folder / "model", {"model.safetensors": weights("a")})
    (path / "config.json").symlink_to("/etc/hosts")
    return ["inspect", path]


def large(place: Place) -> list[Any]:
    """A config of a gigabyte, which takes no room."""
    path = hostile.folder(place.folder / "model", ONE)
    os.truncate(path / "config.json", 1 << 30)
    return ["inspect", path]


def unknown_to_the_hub(place: Place) -> list[Any]:
    """A hub id, and no network."""
    place.patch.setattr("huggingface_hub.snapshot_download", failing(101))
    return ["inspect", "org/nowhere"]


def archive(place: Place) -> list[Any]:
    """What begins as torch.save's archives do, and ends otherwise."""
    (place.folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(99))
    return ["inspect", "pytorch_model.bin"]


def no_record(place: Place) -> list[Any]:
    """JSON that is no record."""
    (place.folder / "wsurg-record.json").write_text('{"schema": "other/1"}')
    return ["replay", "wsurg-record.json", "-o", "out"]


def pickle_of(content: bytes) -> Case:
    """An archive with this pickle, one storage of four numbers beside it."""

    def build(place: Place) -> list[Any]:
        with zipfile.ZipFile(place.folder / "m.bin", "w") as made:
            made.writestr(zipfile.ZipInfo("m/data.pkl"), content)
            made.writestr(zipfile.ZipInfo("m/data/0"), bytes(16))
        return ["inspect", "m.bin"]

    return build


def saved_by_torch(value: Callable[[Any], Any], *then: Any) -> Case:
    """A file of torch.save's."""

    def build(place: Place) -> list[Any]:
        import torch

        torch.save(value(torch), place.folder / "m.pt")
        return ["inspect", "m.pt", *then]

    return build


def program(place: Place) -> list[Any]:
    """An archive that holds code beside its pickle."""
    with zipfile.ZipFile(place.folder / "m.pt", "w") as made:
        made.writestr(zipfile.ZipInfo("m/data.pkl"), b"\x80\x02}.")
        made.writestr(zipfile.ZipInfo("m/code/x.py"), b"1")
    return ["inspect", "m.pt"]


def overflowing(place: Place) -> list[Any]:
    """Numbers that F16 cannot hold."""
    path = cases.write_file(place.folder / "x.safetensors", {"w": F4 * 1e30})
    return ["convert", path, "--dtype", "f16", "-o", "out.safetensors"]


def made(change: Callable[[dict[str, Any]], Any] | None, *then: Any, command: str = "mix") -> Case:
    """What a command does with a mix, or an interpolation, whose record is changed and sealed."""

    def build(place: Place) -> list[Any]:
        before = place.pair(cases.model("bert", seed=5), cases.model("bert"), command=command)
        assert cases.wsurg(*before) == 0
        path = place.folder / "out.safetensors.wsurg-record.json"
        record = json.loads(path.read_text())
        if change:
            change(record)
        path.write_bytes(dump(sealed(record)))
        return list(then)

    return build


def other_bytes(place: Place) -> list[Any]:
    """A record with another seed than the output was made with, which replay then replaces."""
    made(lambda r: r["recipe"]["settings"].update(seed=1))(place)
    shutil.copy(place.folder / "out.safetensors.wsurg-record.json", place.folder / "kept.json")
    return ["replay", "kept.json", "-o", "out.safetensors", "--overwrite"]


def not_its_mask(place: Place) -> list[Any]:
    """A model where a mask should be."""
    return made(None, *VERIFY, *BOTH, "--mask", "base.safetensors")(place)


def other_counts(place: Place) -> list[Any]:
    """Token counts that were changed since."""
    for name in ("base", "tuned"):
        folder = cases.write_directory(place.folder / name, cases.model("bert"))
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in cases.WORDS))
    (place.folder / "counts.json").write_text('{"the": 50}')
    given = ("--counts", "counts.json", "--top", "1", "-o", "out")
    assert cases.wsurg("epur", "base", "tuned", *given) == 0
    (place.folder / "counts.json").write_text('{"the": 51}')
    return ["replay", "out", "-o", "again"]


def another_input(place: Place) -> list[Any]:
    """An input that is longer than it was."""
    arguments = made(None, *REPLAY)(place)
    cases.write_file(place.folder / "base.safetensors", {**cases.model("bert"), "more": F4})
    return arguments


def nowhere(place: Place) -> list[Any]:
    """An input that is gone."""
    arguments = made(None, *REPLAY)(place)
    (place.folder / "base.safetensors").unlink()
    return arguments


def kernel(place: Place) -> list[Any]:
    """A model whose attention a repository is to compute."""
    config = {"architectures": ["BertForSequenceClassification"], "attn_implementation": "a/b"}
    hostile.folder(place.folder / "model", {**ONE, "config.json": config})
    (place.folder / "data.tsv").write_text("sentence\tlabel\ngood\t1\n")
    return ["evaluate", "model", "--data", "data.tsv"]


def two_types(place: Place) -> list[Any]:
    """Models of two types."""
    for name in ("bert", "llama"):
        cases.write_directory(place.folder / name, cases.model("bert"), config={"model_type": name})
    return ["mix", "bert", "llama", "-o", "out"]


def quantised(place: Place) -> list[Any]:
    """A model that says that it is quantized, with integers of an unknown kind."""
    arrays = {**cases.model("bert"), "layer.codes": np.ones((2, 3), "i2")}
    for name, config in (("base", {}), ("tuned", {"quantization_config": {"bits": 4}})):
        cases.write_directory(place.folder / name, arrays, config=config)
    return ["mix", "base", "tuned", "-o", "out"]


def square(place: Place) -> list[Any]:
    """An adapter of a square matrix whose neighbour is stored transposed."""
    base = {"wide.weight": np.ones((4, 8), "f4"), "square.weight": np.ones((4, 4), "f4")}
    shapes = {"wide.lora_A": (2, 4), "wide.lora_B": (8, 2)}
    shapes |= {"square.lora_A": (2, 4), "square.lora_B": (4, 2)}
    factors = {f"{FRONT}{n}.weight": np.ones(s, "f4") for n, s in shapes.items()}
    return merge(place, base, factors)


def merge(place: Place, base: cases.Arrays, factors: cases.Arrays, **config: Any) -> list[Any]:
    """An adapter of these factors, to be folded into this base."""
    cases.write_directory(place.folder / "base", base)
    cases.write_adapter(place.folder / "adapter", factors, cases.adapter_config(**config))
    return ["apply-adapter", "base", "adapter", "-o", "out"]


def factors(module: str, outputs: int = 8, inputs: int = 4) -> cases.Arrays:
    """The two factors of a module."""
    shapes = {"A": (2, inputs), "B": (outputs, 2)}
    return {f"{FRONT}{module}.lora_{n}.weight": np.ones(s, "f4") for n, s in shapes.items()}


def two_prefixes(place: Place) -> list[Any]:
    """An adapter of a layer that BASE has twice, under names of two beginnings."""
    base = {f"{part}.l.q.weight": np.ones((4, 4), "f4") for part in ("text", "vision")}
    return merge(place, base, factors("l.q", 4))


def no_direction(place: Place) -> list[Any]:
    """DoRA of a matrix of zeros, to which zeros are added."""
    size = {f"{FRONT}l.q.lora_magnitude_vector": np.ones(4, "f4")}
    zeros = {name: array * 0 for name, array in factors("l.q", 4).items()}
    return merge(place, {"l.q.weight": np.zeros((4, 4), "f4")}, {**zeros, **size}, use_dora=True)


def tied(
    place: Place,
    factors: cases.Arrays,
    *,
    stem: str = "model.embed_tokens",
    kind: str = "llama",
    **config: Any,
) -> list[Any]:
    """An adapter for a model whose head is its word embedding."""
    arguments = merge(place, {f"{stem}.weight": np.ones((8, 4), "f4")}, factors, **config)
    told = {"model_type": kind, "tie_word_embeddings": True}
    (place.folder / "base" / "config.json").write_text(json.dumps(told))
    return arguments


def grown(place: Place) -> list[Any]:
    """An adapter of more tokens than its model has, without the head's."""
    words, head = "model.embed_tokens.weight", "lm_head.weight"
    base = {words: np.ones((8, 4), "f4"), head: np.ones((8, 4), "f4")}
    more = {f"{FRONT}{words}": np.ones((9, 4), "f4")}
    arguments = merge(place, base, more, modules_to_save=["embed_tokens"])
    (place.folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return arguments


def busy(place: Place) -> list[Any]:
    """An output that another run is writing."""
    arguments = place.mix()
    out = str(place.folder / "out.safetensors")
    place.stack.enter_context(Output(out, is_directory=False, overwrite=False, inputs=[]))
    return arguments


def failing_demo(place: Place) -> list[Any]:
    """A demo of which one command fails."""

    def demo(out: Path, **_: Any) -> None:
        _wsurg(out, ["inspect", "nothing"], capture_output=True)

    place.patch.setattr(demo_command, "run_demo", demo)
    return ["demo", "--out", place.folder]


def squatted(place: Place) -> list[Any]:
    """Somebody else made the folder first in which the output would be built."""
    command = place.mix()
    os.mkdir(temporary_of(os.fspath(command[-1])))
    place.patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    return command


def foreign(place: Place) -> list[Any]:
    """An output that is a folder of other things."""
    arguments = place.mix("out.safetensors", "--overwrite")
    hostile.folder(place.folder / "out.safetensors", {"thesis.tex": b""})
    return arguments


def existing(place: Place) -> list[Any]:
    """An output that is there."""
    (place.folder / "out.safetensors").write_bytes(b"mine")
    return place.mix()


def gate(place: Place) -> list[Any]:
    """Models that are the same, and should not be."""
    return ["diff", *place.mix()[1:3], "--fail-if", "max_abs >= 0"]


VERIFY = ("verify", "out.safetensors")
BOTH = ("--base", "base.safetensors", "--tuned", "tuned.safetensors")
SWAPPED = ("--base", "tuned.safetensors", "--tuned", "base.safetensors")
REPLAY = ("replay", "out.safetensors.wsurg-record.json", "-o", "again.safetensors")
F4 = np.ones((2, 3), "f4")
NAN = np.full((2, 3), np.nan, "f4")
TOKENS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
ONE_ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
NORM = "embeddings.LayerNorm.weight"

REFUSALS: dict[str, Case] = {
    "E-SETTING": lambda place: [*place.mix(), "--ratio", "1.5"],
    "E-FORMAT": stopped(FormatError("a reason")),
    "E-MISMATCH": stopped(MismatchError("a reason")),
    "E-NONFINITE": lambda place: place.pair({"w": NAN}, {"w": F4}, command="interpolate"),
    "E-POLICY": stopped(PolicyError("a reason")),
    "E-STORAGE": broken("mkdir", failing(5), mix=True),
    "E-CHANGED": broken("preadv", lambda *_: 0),
    "E-BUSY": busy,
    "E-GATE": gate,
    "E-HEADER-SHORT": file(bytes(7)),
    "E-HEADER-LENGTH": file(raw({}, b"", length=10**8 + 1)),
    "E-HEADER-START": file(raw(b" {}", b"")),
    "E-HEADER-METADATA": text('{"__metadata__":{"a":1}}'),
    "E-HEADER-ENTRY": header(more=1),
    "E-HEADER-DTYPE": header(dtype="F33"),
    "E-HEADER-INTEGER": header(shape=[True]),
    "E-HEADER-RANK": header(shape=[1] * 65),
    "E-HEADER-SHAPE": header(shape=[-1]),
    "E-HEADER-OFFSETS": header(begin=4, end=0),
    "E-HEADER-SIZE": header(shape=[2]),
    "E-DATA-OVERLAP": file(raw({"a": entry(), "b": entry()})),
    "E-DATA-HOLE": header(begin=4, end=8, data=8),
    "E-DATA-CUT": header(data=3),
    "E-DATA-TRAILING": header(data=5),
    "E-JSON-UTF8": file(raw(b'{"\xff": 1}')),
    "E-JSON-SYNTAX": text('{"w":'),
    "E-JSON-TRAILING": text("{} x"),
    "E-JSON-DUPLICATE": text(f'{{"w":{ONE_ENTRY},"\\u0077":{ONE_ENTRY}}}'),
    "E-JSON-NUMBER": header(shape=[float("nan")]),
    "E-JSON-NESTED": text('{"w":' + "[" * 10**5),
    "E-JSON-COST": file(raw(packed("[],", 6_000_000))),
    "E-JSON-SURROGATE": text(f'{{"\\ud800":{ONE_ENTRY}}}'),
    "E-JSON-OBJECT": shards({INDEX: []}),
    "E-FILE-MISSING": lambda place: ["inspect", place.folder / "x.safetensors"],
    "E-FILE-OPEN": at(listening),
    "E-FILE-READ": broken("preadv", failing(5)),
    "E-FILE-KIND": at(os.mkfifo),
    "E-FILE-LFS": shards({INDEX: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}),
    "E-FILE-HTML": model({**ONE, "config.json": b"\n<!DOCTYPE html>\n<html>\xe4 404</html>"}),
    "E-FILE-OTHER": file(b"GGUF\3\0\0\0" + bytes(99)),
    "E-FILE-LARGE": large,
    "E-LINK-DANGLING": at(lambda path: path.symlink_to("nowhere")),
    "E-LINK-LOOP": at(lambda path: path.symlink_to(path.name)),
    "E-LINK-OUT": outside,
    "E-PICKLE": program,
    "E-PICKLE-ARCHIVE": archive,
    "E-RECORD": no_record,
    "E-PICKLE-REFUSED": pickle_of(b"\x80\x02cposix\nsystem\n."),
    "E-PICKLE-UNFIT": saved_by_torch(lambda torch: {"w": torch.ones(2, dtype=torch.complex128)}),
    "E-PICKLE-LIMIT": pickle_of(b"\x80\x02" + b"]" * 2_000_000),
    "E-PICKLE-LOAD": pickle_of(b"\x80\x02}"),
    "E-PICKLE-SEVERAL": saved_by_torch(lambda torch: {n: {"w": torch.ones(2)} for n in "ab"}),
    "E-KEY-NAME": saved_by_torch(lambda torch: {"w": torch.ones(2)}, "--key", "ema"),
    "E-OVERFLOW-DTYPE": overflowing,
    "E-RECORD-MISSING": lambda place: ["verify", place.merge()[1]],
    "E-VERIFY": made(lambda r: r["outputs"]["out.safetensors"].update(sha256="0" * 64), *VERIFY),
    "E-VERIFY-KIND": made(None, *VERIFY, *BOTH, command="interpolate"),
    "E-VERIFY-INPUTS": made(None, *VERIFY, *SWAPPED),
    "E-VERIFY-MASK": not_its_mask,
    "E-REPLAY": other_bytes,
    "E-REPLAY-STEP": made(lambda r: r["recipe"].update(operator="finetune"), *REPLAY),
    "E-REPLAY-VERSION": made(lambda r: r["tool"].update(version="0.0.1"), *REPLAY),
    "E-REPLAY-NO-HASH": made(
        lambda r: r["outputs"]["out.safetensors"].update(sha256=None), *REPLAY
    ),
    "E-REPLAY-INPUT": made(None, *REPLAY, "--input", "another=x"),
    "E-REPLAY-NOWHERE": nowhere,
    "E-REPLAY-OTHER": another_input,
    "E-REPLAY-COUNTS": other_counts,
    "E-REMOTE-CODE": kernel,
    "E-HUB": unknown_to_the_hub,
    "E-INDEX-MAP": shards({INDEX: {"metadata": {}}}),
    "E-INDEX-NAME": shards({INDEX: index({"a": "../secret.safetensors"})}),
    "E-SHARD-MISSING": shards({INDEX: index({"a": SHARDS[0], "b": "c.safetensors"})}),
    "E-SHARD-DUPLICATE": shards({SHARDS[1]: weights("a", "b")}),
    "E-PARTS": shards({MODULES: [{"idx": 0, "path": "../other", "type": "a.Dense"}]}),
    "E-SHARD-PART": lambda place: [*shards({})(place), "--weights", SHARDS[0]],
    "E-TWO-ANSWERS": shards({"model.safetensors": weights("a")}),
    "E-NO-WEIGHTS": model({"config.json": {}}),
    "E-PAIR-TYPE": two_types,
    "E-PAIR-SHAPE": tensors(x=(F4, F4.T)),
    "E-PAIR-DTYPE": tensors(x=(F4.astype("i4"), F4.astype("i8"))),
    "E-PAIR-COVERAGE": lambda place: place.pair({"w": F4, "more": F4}, {"w": F4}),
    "E-PAIR-NONE": lambda place: place.pair({"else": F4}, {"w": F4}),
    "E-OVERFLOW": tensors(x=(F4 * 1e30, F4.astype("f2"))),
    "E-QUANTISED-CONFIG": quantised,
    "E-QUANTISED-TENSOR": tensors(**{"x.qweight": (F4.astype("i4"), F4.astype("i4"))}),
    "E-ADAPTER-KIND": adapter(peft_type="LOHA"),
    "E-ADAPTER-CONFIG": adapter(use_dora="yes"),
    "E-ADAPTER-FIELD": adapter(use_magic=True),
    "E-ADAPTER-PATTERN": adapter(rank_pattern={"(a+)+$": 1}),
    "E-ADAPTER-RANK": adapter(r=0),
    "E-ADAPTER-ALPHA": adapter(lora_alpha=None),
    "E-ADAPTER-CONTRADICTION": adapter(use_dora=True),
    "E-ADAPTER-FACTOR": adapter(lambda given: {n: a for n, a in given.items() if "_A" in n}),
    "E-ADAPTER-TENSOR": adapter(changed(**{NORM: np.ones(6, "f4")})),
    "E-ADAPTER-DTYPE": adapter(lambda given: {n: a.astype("i4") for n, a in given.items()}),
    "E-ADAPTER-EMPTY": adapter(lambda _: {}),
    "E-ADAPTER-TARGET": adapter(
        lambda given: {n.replace("layer.0", "layer.7"): a for n, a in given.items()}
    ),
    "E-ADAPTER-SHAPE": adapter(
        lambda given: {n: a[:, :-1].copy() if "_A" in n else a for n, a in given.items()}
    ),
    "E-ADAPTER-UNCLEAR": square,
    "E-ADAPTER-BASE": adapter(base_model_name_or_path="org/other"),
    "E-ADAPTER-MODEL": lambda place: [*place.merge()[:2], "base", "-o", "out"],
    "E-ADAPTER-PREFIX": two_prefixes,
    "E-ADAPTER-WEIGHT": lambda place: [
        *place.merge(changed(**{NORM: np.ones(6, "f4")}), modules_to_save=["LayerNorm"]),
        *("--weight", "-1"),
    ],
    "E-ADAPTER-DORA": no_direction,
    "E-EXTRACT-NOTHING": lambda place: [
        *("extract-adapter", *place.pair(cases.model("bert"))[1:3], "-o", "out")
    ],
    "E-TIED-HEAD": lambda place: tied(place, factors("lm_head")),
    "E-TIED-UNCLEAR": lambda place: tied(place, factors("lm_head"), stem="shared", kind="made-up"),
    "E-TIED-SHARED": lambda place: tied(place, factors("lm_head"), stem="shared", kind="t5"),
    "E-ADAPTER-VOCABULARY": grown,
    "E-TIED-TOKENS": lambda place: tied(
        place,
        {**factors("lm_head"), f"{FRONT}{TOKENS}": np.ones((1, 4), "f4")},
        trainable_token_indices=[3],
    ),
    "E-TIED-NONE": lambda place: [*place.merge(), "--untie"],
    "E-OUTPUT-EXISTS": existing,
    "E-OUTPUT-FOREIGN": foreign,
    "E-OUTPUT-OVERLAP": lambda place: place.mix("tuned.safetensors", "--overwrite"),
    "E-OUTPUT-OWNER": squatted,
    "E-OUTPUT-FOLDER": lambda place: place.mix("none/out.safetensors"),
    "E-OUTPUT-SPACE": broken(
        "statvfs", lambda _: type("Room", (), {"f_bavail": 1, "f_frsize": 1}), mix=True
    ),
    "E-USAGE": lambda place: ["inspekt", place.folder],
    "E-INTERRUPTED": stopped(KeyboardInterrupt),
    "E-TERMINATED": stopped(_TerminatedError),
    "E-DEMO-STEP": failing_demo,
    "E-BUG": stopped(ZeroDivisionError),
}
