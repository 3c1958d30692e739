"""Models of several parts, each in a folder of its own, are one checkpoint and one output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import hostile
from tests.hostile import weights
from weightsurgery.adapters.extract import extract_adapter
from weightsurgery.checkpoint import Checkpoint, from_arrays
from weightsurgery.comparison import diff
from weightsurgery.errors import FormatError, MismatchError, PolicyError, SettingError
from weightsurgery.formats import open_checkpoint, save
from weightsurgery.formats.journal import Journal
from weightsurgery.formats.plan import Shard
from weightsurgery.formats.strict_json import dump
from weightsurgery.formats.vocabulary import read_vocabulary
from weightsurgery.inspection import inspect
from weightsurgery.masks import changed_mask
from weightsurgery.operators.convert import convert
from weightsurgery.operators.mix import mix
from weightsurgery.operators.purify import purify
from weightsurgery.proof.replay import replay
from weightsurgery.proof.verification import verify
from weightsurgery.token_counts import count_corpus

Make = Callable[[Path, int], Path]
UNET = "diffusion_pytorch_model.safetensors"
UNET_SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def tree(place: Path, files: Mapping[str, Any]) -> Path:
    """A folder of these files, some of them in folders below it."""
    for name, content in files.items():
        folder, _, bare = name.rpartition("/")
        hostile.folder(place / folder, {bare: content})
    return place


def module(path: str, kind: str) -> dict[str, str]:
    return {"idx": "0", "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


def sentences(place: Path, seed: int, *, root: str = "", dense: bool = True) -> Path:
    """A sentence transformer, its first module in the folder itself or in one below it."""
    modules = [module(root, "Transformer"), module("1_Pooling", "Pooling")]
    modules += [module("2_Dense", "Dense")] if dense else []
    files = {
        "modules.json": [*modules, module("3_Normalize", "Normalize")],
        "config_sentence_transformers.json": {"prompts": {}, "trust_remote_code": True},
        f"{root}/config.json".strip("/"): {"model_type": "bert", "architectures": ["BertModel"]},
        f"{root}/sentence_bert_config.json".strip("/"): {"max_seq_length": 128},
        f"{root}/model.safetensors".strip("/"): weights(
            "encoder.layer.0.attention.self.query.weight", "pooler.dense.weight", seed=seed
        ),
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "1_Pooling/pooling.py": b"print()",
        "onnx/model.onnx": b"\0",
    }
    if dense:
        files["2_Dense/config.json"] = {"in_features": 4, "out_features": 3}
        files["2_Dense/model.safetensors"] = weights("linear.weight", seed=seed + 1)
    return tree(place, files)


def nested(place: Path, seed: int) -> Path:
    return sentences(place, seed, root="0_Transformer")


def pipeline(place: Path, seed: int) -> Path:
    """A pipeline of diffusers, whose text encoder is transformers' and whose unet is in shards."""
    two = dict(zip("ab", UNET_SHARDS, strict=True))
    return tree(
        place,
        {
            "model_index.json": {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "safety_checker": [None, None],
                "requires_safety_checker": False,
            },
            "unet/config.json": {"_class_name": "UNet2DConditionModel"},
            f"unet/{UNET}.index.json": hostile.index(two),
            **{f"unet/{shard}": weights(name, seed=seed) for name, shard in two.items()},
            "text_encoder/config.json": {"model_type": "clip_text_model", "torch_dtype": "float32"},
            "text_encoder/model.safetensors": weights(
                "text_model.final_layer_norm.weight", seed=seed + 1
            ),
            "tokenizer/vocab.json": {"a": 0},
            "tokenizer/merges.txt": b"",
            "scheduler/scheduler_config.json": {"beta": 1},
            "v1-5-pruned.safetensors": weights("model.diffusion_model.out.weight", seed=seed),
        },
    )


def files_of(place: Path) -> set[str]:
    return {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}


def arrays(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: view.read(0, view.size).tobytes() for name, view in checkpoint.items()}


KINDS = pytest.mark.parametrize("make", [sentences, nested, pipeline])


@pytest.fixture
def pair(make: Make, tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    base, tuned = (open_checkpoint(make(tmp_path / n, 9 * i)) for i, n in enumerate(("b", "t")))
    return base, tuned


@KINDS
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_outputs_have_the_parts_of_their_input(
    pair: tuple[Checkpoint, Checkpoint], ratio: float, tmp_path: Path
) -> None:
    base, tuned = pair
    out = tmp_path / "out"
    save(mix(base, tuned, ratio=ratio), out)
    assert files_of(out) | {
        "1_Pooling/pooling.py",
        "onnx/model.onnx",
        "v1-5-pruned.safetensors",
    } >= (files_of(tmp_path / "t"))
    assert not [name for name in files_of(out) if name.endswith((".py", ".onnx"))]
    written = open_checkpoint(out)
    assert list(written) == list(tuned)
    assert written.parts.keys() == tuned.parts.keys()
    if ratio != 0.5:
        assert arrays(written) == arrays(base if ratio else tuned)
    report = verify(out, base=base, tuned=tuned)
    assert report["proved"]
    assert report["selection"]["known_by"] == ["recipe"]
    again = replay(
        out, tmp_path / "again", inputs={"base": tmp_path / "b", "tuned": tmp_path / "t"}
    )
    assert again["identical"]
    assert save(mix(base, tuned, ratio=ratio), out, overwrite=True)["outputs"]


@KINDS
def test_the_whole_model_is_compared_and_edited(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    base, tuned = pair
    report = diff(base, tuned).to_json()
    assert report["alignment"]["coverage"]["share"] == 1.0
    assert {entry["tensor"] for entry in report["tensors"]} == set(tuned)
    parts = [
        diff(b, t).model for b, t in zip(base.split().values(), tuned.split().values(), strict=True)
    ]
    total = sum(part["l2"] ** 2 for part in parts) ** 0.5
    assert report["model"]["l2"] == pytest.approx(total, rel=1e-12)
    # The threshold is one for all parts, not one for each.
    result = purify(base, tuned, ratio=0.5, score="drift")
    drift = {n: np.abs(view_array(tuned, n) - view_array(base, n)).ravel() for n in tuned}
    reset = {n: (view_array(result, n) != view_array(tuned, n)).ravel() for n in tuned}
    most = max(drift[n][~reset[n]].max(initial=0) for n in tuned)
    assert min(drift[n][reset[n]].min(initial=np.inf) for n in tuned) >= most
    mask = tmp_path / "mask.safetensors"
    save(changed_mask(result), mask)
    redone = purify(base, tuned, from_mask=open_checkpoint(mask))
    assert arrays(redone) == arrays(result)


def test_a_fisher_of_one_part_says_how_to_keep_the_others(tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(sentences(tmp_path / n, i)) for i, n in enumerate("bt"))
    own = tuned.split()[""]
    fisher = from_arrays({name: np.abs(view_array(tuned, name)) for name in own})
    with pytest.raises(
        MismatchError, match=r"only one part of the model was run; .* --exclude '2_Dense/\*'"
    ):
        purify(base, tuned, fisher=fisher)
    result = purify(base, tuned, fisher=fisher, exclude=["2_Dense/*"])
    dense = [name for name in tuned if name not in own]
    assert [arrays(result)[name] for name in dense] == [arrays(tuned)[name] for name in dense]
    assert arrays(result) != arrays(tuned)
    lacking = from_arrays({"pooler.dense.weight": view_array(tuned, "pooler.dense.weight")})
    with pytest.raises(MismatchError, match="make it for this model: wsurg fisher TUNED"):
        purify(base, tuned, fisher=lacking)


def view_array(checkpoint: Checkpoint, name: str) -> np.ndarray:
    view = checkpoint[name]
    return np.asarray(view.read(0, view.size)).view(np.float32).reshape(view.shape)


@KINDS
def test_other_shards_and_another_dtype(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    _, tuned = pair
    out = tmp_path / "out"
    save(convert(tuned, dtype="bf16"), out, max_shard_size=30)
    written = open_checkpoint(out)
    assert list(written) == list(tuned)
    assert {view.dtype.name for view in written.values()} == {"BF16"}
    assert not written.warnings
    assert verify(out)["proved"]
    config = out / "text_encoder" / "config.json"
    if config.exists():
        assert json.loads(config.read_bytes())["torch_dtype"] == "bfloat16"


@KINDS
def test_an_interrupted_run_goes_on(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def note(self: Journal, shard: Shard, output: Any, tensors: Any) -> None:
        output["sha256"].result()
        original(self, shard, output, tensors)

    original = Journal.note

    base, tuned = pair
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "note", note)
        patched.setattr(sys.modules["weightsurgery.formats.save"], "_write_rest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(mix(base, tuned), out, resume=True)
    left = next(tmp_path.glob(".wsurg-*"))
    kept = {name for name in files_of(left) if name.endswith(".safetensors")}
    assert kept == set(tuned.layout.values())
    record = save(mix(base, tuned), out, resume=True)
    assert verify(out, base=base, tuned=tuned)["proved"]
    assert record["outputs"].keys() >= kept
    assert not [*tmp_path.glob(".wsurg-*")]


def test_a_folder_without_weights_beside_the_model_is_no_part(tmp_path: Path) -> None:
    base, tuned = (
        open_checkpoint(sentences(tmp_path / n, i, dense=False)) for i, n in enumerate("bt")
    )
    assert not tuned.parts
    assert "pooler.dense.weight" in tuned
    save(mix(base, tuned), tmp_path / "out")
    assert "1_Pooling/config.json" in files_of(tmp_path / "out")
    left = dict(tuned.left_out)
    assert left["1_Pooling/pooling.py"] == "not on the list of files to copy"
    assert left["onnx"] == "a folder that is not part of the model"


def test_what_loads_code_is_removed_and_told(tmp_path: Path) -> None:
    model = sentences(tmp_path / "model", 0)
    modules = json.loads((model / "modules.json").read_bytes())
    modules[1]["type"] = "pooling.Pooling"
    (model / "modules.json").write_text(json.dumps(modules))
    record = save(open_checkpoint(model), tmp_path / "out")
    warnings = " ".join(record["warnings"])
    assert "'pooling.Pooling' needs code, which is not copied" in warnings
    assert "config_sentence_transformers.json: removed trust_remote_code" in warnings


def test_a_base_without_the_folders_pairs_with_the_model(tmp_path: Path) -> None:
    plain = tree(
        tmp_path / "plain",
        {
            "config.json": {"model_type": "bert", "architectures": ["BertModel"]},
            "model.safetensors": weights(
                "encoder.layer.0.attention.self.query.weight", "pooler.dense.weight"
            ),
        },
    )
    base = open_checkpoint(plain)
    only = open_checkpoint(sentences(tmp_path / "only", 5, root="0_Transformer", dense=False))
    assert list(only.parts) == ["0_Transformer"]
    result = mix(base, only, ratio=1.0)
    assert [*arrays(result).values()] == [*arrays(base).values()]
    whole = mix(
        base, open_checkpoint(sentences(tmp_path / "whole", 5)), ratio=1.0, allow_partial=True
    )
    kept = whole.notes["alignment"]["kept_from_tuned"]
    assert kept == [{"tensor": "2_Dense/linear.weight", "reason": "BASE has no such tensor"}]
    back = diff(open_checkpoint(tmp_path / "whole"), base).alignment["only_in_base"]
    assert [entry["tensor"] for entry in back] == ["2_Dense/linear.weight"]


def test_an_extracted_adapter_is_of_the_model_in_the_folder_itself(tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(sentences(tmp_path / n, 9 * i)) for i, n in enumerate("bt"))
    adapter = extract_adapter(base, tuned, rank=2)
    assert {name.split(".lora_")[0] for name in adapter} == {
        "base_model.model.encoder.layer.0.attention.self.query",
        "base_model.model.pooler.dense",
    }
    expected = "is not in the adapter, first '2_Dense/linear.weight': in another folder than"
    assert any(expected in warning for warning in adapter.warnings)
    pipelines = (open_checkpoint(pipeline(tmp_path / n, 9 * i)) for i, n in enumerate("pq"))
    with pytest.raises(MismatchError) as told:
        extract_adapter(*pipelines)
    assert "in another folder than the model" in told.value.hint


def test_inspect_names_the_parts(tmp_path: Path) -> None:
    report = inspect(open_checkpoint(pipeline(tmp_path / "model", 0)))
    assert report["parts"] == ["unet", "text_encoder"]


@pytest.mark.parametrize(
    "path", ["..", "../other", "/etc", "a/../b", "a\\b", "a/b/c/d", "a\nb", "."]
)
@pytest.mark.parametrize("manifest", ["modules.json", "model_index.json"])
def test_parts_outside_of_the_folder_are_refused(tmp_path: Path, manifest: str, path: str) -> None:
    listed: Any = [module("", "Transformer"), module(path, "Dense")]
    if manifest != "modules.json":
        listed = {path: ["diffusers", "UNet"]}
    model = tree(tmp_path / "model", {manifest: listed, "model.safetensors": weights("a")})
    with pytest.raises(FormatError, match="expected a folder in the model's own") as told:
        open_checkpoint(model)
    assert told.value.code == "E-PARTS"


@pytest.mark.parametrize(
    ("manifest", "content"),
    [
        ("modules.json", {}),
        ("modules.json", [{"path": ""}]),
        ("modules.json", [{"path": 3, "type": "x"}]),
        ("modules.json", [module(f"{i}_Dense", "Dense") for i in range(300)]),
        ("model_index.json", []),
        ("model_index.json", {"unet": ["diffusers", "UNet"]}),  # whose folder is missing
        ("model_index.json", b"{"),
    ],
)
def test_malformed_lists_of_parts_are_refused(tmp_path: Path, manifest: str, content: Any) -> None:
    model = tree(tmp_path / "model", {manifest: content, "model.safetensors": weights("a")})
    with pytest.raises(FormatError):
        open_checkpoint(model)


def test_an_empty_list_of_modules_leaves_a_model_as_it_is(tmp_path: Path) -> None:
    model = tree(tmp_path / "model", {"modules.json": [], "model.safetensors": weights("a")})
    opened = open_checkpoint(model)
    assert (list(opened), opened.parts) == (["a"], {})
    save(opened, tmp_path / "out")
    assert "modules.json" in files_of(tmp_path / "out")


def test_two_lists_of_parts_are_refused(tmp_path: Path) -> None:
    model = sentences(tmp_path / "model", 0)
    (model / "model_index.json").write_text("{}")
    with pytest.raises(PolicyError, match="ambiguous parts"):
        open_checkpoint(model)


def test_parts_without_weights_are_refused(tmp_path: Path) -> None:
    model = tree(tmp_path / "model", {"modules.json": [module("1_Pooling", "Pooling")]})
    with pytest.raises(FormatError, match="none of the parts") as told:
        open_checkpoint(model)
    assert told.value.code == "E-NO-WEIGHTS"


def test_weights_names_a_file_of_the_folder_itself(tmp_path: Path) -> None:
    found = open_checkpoint(sentences(tmp_path / "a", 0), weights="model.safetensors")
    assert "2_Dense/linear.weight" in found
    with pytest.raises(SettingError, match=r"in no part that model_index\.json lists"):
        open_checkpoint(pipeline(tmp_path / "b", 0), weights="v1-5-pruned.safetensors")


def test_a_linked_part_is_followed_on_request_only(tmp_path: Path) -> None:
    model = sentences(tmp_path / "model", 0)
    os.rename(model / "2_Dense", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", model / "2_Dense")
    with pytest.raises(PolicyError, match="link") as told:
        open_checkpoint(model)
    assert told.value.code == "E-LINK-OUT"
    assert "2_Dense/linear.weight" in open_checkpoint(model, follow_links=True)


def test_chat_templates_travel_and_nothing_else_from_their_folder(tmp_path: Path) -> None:
    model = tree(
        tmp_path / "model",
        {
            "model.safetensors": weights("a"),
            "additional_chat_templates/tools.jinja": b"{{ messages }}",
            "additional_chat_templates/evil.py": b"",
        },
    )
    found = open_checkpoint(model)
    assert [file.name for file in found.side_files] == ["additional_chat_templates/tools.jinja"]
    assert [name for name, _ in found.left_out] == ["additional_chat_templates/evil.py"]
    save(found, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_bytes()
    assert verify(tmp_path / "out")["proved"]
    save(found, tmp_path / "out", overwrite=True)


def _extra(out: Path) -> None:
    (out / "2_Dense" / "more.json").write_text("{}")


def _code(out: Path) -> None:
    (out / "1_Pooling" / "pooling.py").write_text("")


def _empty_folder(out: Path) -> None:
    (out / "4_More").mkdir()


def _linked(out: Path) -> None:
    os.rename(out / "2_Dense", out.parent / "moved")
    os.symlink(out.parent / "moved", out / "2_Dense")


def _changed(out: Path) -> None:
    (out / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')


def _gone(out: Path) -> None:
    os.remove(out / "2_Dense" / "model.safetensors")


def _other_weights(out: Path) -> None:
    (out / "2_Dense" / "model.safetensors").write_bytes(weights("linear.weight", seed=77))


@pytest.mark.parametrize(
    "harm", [_extra, _code, _empty_folder, _linked, _changed, _gone, _other_weights]
)
def test_verify_looks_into_the_parts(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    save(open_checkpoint(sentences(tmp_path / "model", 0)), tmp_path / "out")
    assert verify(tmp_path / "out")["proved"]
    harm(tmp_path / "out")
    report = verify(tmp_path / "out")
    assert not report["proved"]
    assert report["problems"]


def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(open_checkpoint(sentences(tmp_path / "model", 0)), out)
    path = out / "wsurg-record.json"
    record = json.loads(path.read_bytes())
    for name in ("../model/model.safetensors", "/etc/passwd", "a/b/c/d/e", "2_Dense/../x"):
        outputs = {**record["outputs"], name: {"size": 1, "sha256": None}}
        path.write_bytes(dump({**record, "outputs": outputs}))
        with pytest.raises(FormatError, match="expected a file's path"):
            verify(out)
    tensors = {**record["tensors"], "linear.weight": record["tensors"]["2_Dense/linear.weight"]}
    path.write_bytes(dump({**record, "tensors": tensors}))
    with pytest.raises(FormatError, match=r"linear\.weight"):
        verify(out)


def test_overwrite_never_takes_folders_that_the_record_does_not_name(tmp_path: Path) -> None:
    model, out = open_checkpoint(sentences(tmp_path / "model", 0)), tmp_path / "out"
    save(model, out)
    (out / "2_Dense" / "notes.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(PolicyError, match="not part of a model") as told:
            save(model, out, overwrite=True)
        assert told.value.code == "E-OUTPUT-FOREIGN"
        (out / "2_Dense" / "notes.json").unlink(missing_ok=True)
        (out / "photos").mkdir(exist_ok=True)
    os.rmdir(out / "photos")
    os.remove(out / "wsurg-record.json")
    with pytest.raises(PolicyError, match="not part of a model"):
        save(model, out, overwrite=True)


def test_what_is_no_component_is_no_part(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 0)
    listed = json.loads((model / "model_index.json").read_bytes())
    (model / "model_index.json").write_text(json.dumps({**listed, "_ignore_files": ["a", "b"]}))
    assert list(open_checkpoint(model).parts) == ["unet", "text_encoder"]


def test_several_controlnets_are_parts(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 0)
    listed = json.loads((model / "model_index.json").read_bytes())
    several = {"controlnet": ["multicontrolnet", "MultiControlNetModel"]}
    (model / "model_index.json").write_text(json.dumps(listed | several))
    names = ["controlnet", "controlnet_1", "controlnet_2"]
    for name in names:
        tree(model / name, {"config.json": {}, UNET: weights("a")})
    tree(model / "controlnet_4", {"config.json": {}, UNET: weights("a")})
    opened = open_checkpoint(model)
    assert list(opened.parts) == ["unet", "text_encoder", *names]
    save(opened, tmp_path / "out")
    assert (tmp_path / "out" / "controlnet_2" / UNET).exists()


@pytest.mark.parametrize(
    ("weights_option", "text_encoder", "vae"),
    [
        ("model.safetensors", "model.safetensors", UNET),
        (UNET, "model.safetensors", UNET),
        ("model.fp16.safetensors", "model.fp16.safetensors", UNET.replace("model.", "model.fp16.")),
    ],
)
def test_one_name_chooses_in_every_part(
    tmp_path: Path, weights_option: str, text_encoder: str, vae: str
) -> None:
    model = pipeline(tmp_path / "model", 0)
    listed = json.loads((model / "model_index.json").read_bytes())
    listed["vae"] = ["diffusers", "AutoencoderKL"]
    (model / "model_index.json").write_text(json.dumps(listed))
    half = UNET.replace("model.", "model.fp16.")
    tree(model / "vae", {UNET: weights("a"), half: weights("a"), "x.bin": b""})
    tree(model / "vae", {UNET.replace(".safetensors", ".bin"): b""})
    names = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
    tree(model / "text_encoder", {name: weights("a") for name in names})
    with pytest.raises(PolicyError, match="--weights"):
        open_checkpoint(model)
    opened = open_checkpoint(model, weights=weights_option)
    assert opened.layout["text_encoder/a"] == f"text_encoder/{text_encoder}"
    assert opened.layout["vae/a"] == f"vae/{vae}"
    assert {opened.layout[f"unet/{name}"] for name in "ab"} == {f"unet/{n}" for n in UNET_SHARDS}
    save(convert(opened), tmp_path / "out")
    save(convert(opened), tmp_path / "first")
    inputs = {"0": model}
    assert replay(tmp_path / "first", tmp_path / "again", inputs=inputs)["identical"]
    # A variant is written under the name that is loaded without asking for one.
    assert {"vae/" + UNET, "text_encoder/model.safetensors"} <= files_of(tmp_path / "out")
    assert verify(tmp_path / "out")["proved"]


def test_a_variant_in_shards_is_chosen_by_the_same_name(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model", 0)
    for name in UNET_SHARDS:
        (model / "unet" / name).rename(model / "unet" / name.replace("model-", "model.fp16-"))
    shards = [name.replace("model-", "model.fp16-") for name in UNET_SHARDS]
    (model / "unet" / f"{UNET}.index.json").unlink()
    index = hostile.index(dict(zip("ab", shards, strict=True)))
    tree(model / "unet", {f"{UNET}.index.fp16.json": index})
    text_encoder = model / "text_encoder"
    (text_encoder / "model.safetensors").rename(text_encoder / "model.fp16.safetensors")
    for name in ("model.fp16.safetensors", f"{UNET}.index.fp16.json"):
        opened = open_checkpoint(model, weights=name)
        assert list(opened.parts) == ["unet", "text_encoder"]
    save(convert(opened), tmp_path / "out")
    assert not (open_checkpoint(tmp_path / "out").warnings)
    assert verify(tmp_path / "out")["proved"]


@pytest.mark.parametrize(
    ("lost", "instead", "told"),
    [
        ("2_Dense", {}, "'2_Dense' is a folder that is missing"),
        ("2_Dense", {"2_Dense": b""}, "'2_Dense' is not a folder"),
        ("2_Dense/model.safetensors", {}, "2_Dense: no weights that can be read"),
        ("model.safetensors", {}, "no weights that can be read"),
        ("model.safetensors", {"model.onnx": b""}, r"convert model\.onnx to safetensors"),
    ],
)
def test_a_module_without_its_weights_is_refused(
    tmp_path: Path, lost: str, instead: dict[str, Any], told: str
) -> None:
    model = sentences(tmp_path / "model", 0)
    os.rename(model / lost, tmp_path / "lost")
    tree(model, instead)
    with pytest.raises(FormatError, match=told):
        open_checkpoint(model)


@pytest.mark.parametrize("config", [{"architectures": ["T5"]}, {"_class_name": "UNet"}])
@pytest.mark.parametrize("other", ["model.onnx", "model.fp16.bin", None])
def test_a_component_without_its_weights_is_refused(
    tmp_path: Path, config: dict[str, Any], other: str | None
) -> None:
    model = pipeline(tmp_path / "model", 0)
    (model / "text_encoder" / "model.safetensors").unlink()
    tree(model / "text_encoder", {"config.json": config, **({other: b""} if other else {})})
    with pytest.raises(FormatError, match="no weights that can be read") as told:
        open_checkpoint(model)
    assert (other or "incomplete") in told.value.hint
    assert told.value.code == "E-NO-WEIGHTS"


def test_an_adapter_as_a_part_is_refused(tmp_path: Path) -> None:
    model = sentences(tmp_path / "model", 0, root="0_Transformer")
    (model / "0_Transformer" / "model.safetensors").rename(
        model / "0_Transformer" / "adapter_model.safetensors"
    )
    tree(model / "0_Transformer", {"adapter_config.json": {}})
    with pytest.raises(FormatError, match="an adapter, without the weights"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["2_Dense/linear.weight", "2_Dense/other"])
def test_tensors_named_as_if_in_another_part_are_refused(tmp_path: Path, name: str) -> None:
    model = sentences(tmp_path / "model", 0)
    (model / "model.safetensors").write_bytes(weights(name, "a"))
    with pytest.raises(FormatError, match="which is another part") as told:
        open_checkpoint(model)
    assert told.value.code == "E-PARTS"


@pytest.mark.parametrize(
    "path", ["README.md", "wsurg-record.json", "tokenizer.json", "model.safetensors", ".wsurg-x"]
)
def test_parts_named_like_files_of_the_model_are_refused(tmp_path: Path, path: str) -> None:
    listed = [module("0_Transformer", "Transformer"), module(path, "Dense")]
    files = {f"{part}/model.safetensors": weights("a") for part in ("0_Transformer", path)}
    model = tree(tmp_path / "model", {"modules.json": listed, **files})
    with pytest.raises(FormatError, match="the name of a file of the model"):
        open_checkpoint(model)


def test_modules_that_are_one_file_are_not_split(tmp_path: Path) -> None:
    model = sentences(tmp_path / "model", 0)
    (model / "2_Dense" / "model.safetensors").write_bytes(weights("linear.weight", "linear.bias"))
    save(open_checkpoint(model), tmp_path / "out", max_shard_size=1)
    files = files_of(tmp_path / "out")
    assert "2_Dense/model.safetensors" in files
    assert "model.safetensors.index.json" in files


@pytest.mark.parametrize("folders", [["0_Transformer"], ["tokenizer"], ["tokenizer", "other"]])
def test_the_only_tokenizer_of_a_model_is_found(tmp_path: Path, folders: list[str]) -> None:
    make = sentences if folders == ["0_Transformer"] else pipeline
    model = make(tmp_path / "model", 0, **({"root": "0_Transformer"} if make is sentences else {}))
    if make is pipeline:
        (model / "tokenizer" / "vocab.json").unlink()
        listed = json.loads((model / "model_index.json").read_bytes())
        listed["other"] = ["transformers", "CLIPTokenizer"]
        (model / "model_index.json").write_text(json.dumps(listed))
        (model / "other").mkdir()
    words = {"a": 0, "cf": 1, "[UNK]": 2}
    for folder in folders:
        tokenizer = {
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": [],
        }
        tree(model / folder, {"tokenizer.json": tokenizer})
    opened = open_checkpoint(model)
    text = tmp_path / "corpus.txt"
    text.write_text("a cf a")
    if len(folders) > 1:
        assert not read_vocabulary(opened)
        with pytest.raises(MismatchError, match=r"no tokenizer\.json"):
            count_corpus(text, opened)
        return
    assert read_vocabulary(opened) == {0: "a", 1: "cf", 2: "[UNK]"}
    assert count_corpus(text, opened).counts == {"a": 2, "cf": 1}
