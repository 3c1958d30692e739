"""Adapters of a head that is tied to the embedding: refused, or untied and equal to PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import cases
from tests.peft_models import WARNINGS, Trained, gpt2, llama
from weightsurgery import (
    apply_adapter,
    extract_adapter,
    from_arrays,
    open_checkpoint,
    save,
    verify_adapter,
)
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, PolicyError
from weightsurgery.ties import _TIED_BY_DEFAULT, Tie, find_tie, find_unclear_tie, says_tied

pytestmark = WARNINGS


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


MODELS = {
    "llama": (tied_llama, "embed_tokens", "q_proj"),
    "gpt2": (gpt2, "wte", "c_attn"),
}
FAMILIES = pytest.mark.parametrize("family", MODELS)


def settings_of(case: str, family: str) -> dict[str, Any]:
    """A LoraConfig's; E stands for the embedding and Q for an ordinary layer."""
    _, embedding, query = MODELS[family]
    text = json.dumps(ALONE[case] if case in ALONE else ALIKE[case])
    return dict(json.loads(text.replace('"E"', f'"{embedding}"').replace('"Q"', f'"{query}"')))


# PEFT's adapters of one of the two modules, or of each on its own.
ALONE: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "head, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["E"]},
    "embedding and head": {"target_modules": ["E", "lm_head"]},
    "saved head": {"target_modules": ["Q"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "both saved": {"target_modules": ["Q"], "modules_to_save": ["E", "lm_head"]},
    "other tokens": {
        "target_modules": ["Q"],
        "trainable_token_indices": {"E": [3, 5], "lm_head": [3, 7]},
    },
}
ALIKE: dict[str, dict[str, Any]] = {
    "both saved, tied": {
        "target_modules": ["Q"],
        "modules_to_save": ["E", "lm_head"],
        "ensure_weight_tying": True,
    },
    "no head": {"target_modules": ["Q"]},
    "tokens": {"target_modules": ["Q"], "trainable_token_indices": [3, 5]},
    "the same tokens": {
        "target_modules": ["Q"],
        "trainable_token_indices": {"E": [3, 5], "lm_head": [3, 5]},
    },
}


def trained(folder: Path, case: str, family: str, dtype: Any = torch.float32) -> Trained:
    settings = settings_of(case, family)
    if "wte" in json.dumps(settings) and isinstance(settings.get("trainable_token_indices"), list):
        settings["trainable_token_indices"] = {"wte": settings["trainable_token_indices"]}
    if family == "gpt2" and settings["target_modules"] == ["c_attn"]:
        settings["fan_in_fan_out"] = True
    return Trained(folder, MODELS[family][0], settings, dtype)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


@FAMILIES
@pytest.mark.parametrize("case", [*ALONE, *ALIKE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_untied_model_computes_what_the_adapted_one_does(
    case: str, family: str, dtype: Any, tmp_path: Path
) -> None:
    made = trained(tmp_path, case, family, dtype)
    save(made.merge(untie=True), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config == before | {"tie_word_embeddings": False}
    loaded = type(made.model.get_base_model()).from_pretrained(tmp_path / "merged", dtype=dtype)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    # In float32, so that the weights' rounding is all that differs.
    expected, found = logits(made.model.float()), logits(loaded.float())
    room = 1e-5 if dtype == torch.float32 else 0.02
    assert (found - expected).norm() <= room * expected.norm()
    if dtype == torch.float32:  # the base's own would not do
        plain = type(loaded).from_pretrained(tmp_path / "base")
        assert (logits(plain) - expected).norm() > 4 * room * expected.norm()


@FAMILIES
@pytest.mark.parametrize("case", ALIKE)
def test_what_treats_both_alike_stays_tied(case: str, family: str, tmp_path: Path) -> None:
    made = trained(tmp_path, case, family)
    save(made.merge(), tmp_path / "merged")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "merged")
    assert (tmp_path / "merged/config.json").read_bytes() == (
        tmp_path / "base/config.json"
    ).read_bytes()
    loaded = type(made.model.get_base_model()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(made.model), rtol=1e-4, atol=1e-5)


@FAMILIES
@pytest.mark.parametrize("case", ALONE)
def test_one_of_the_two_is_not_adapted_while_they_are_tied(
    case: str, family: str, tmp_path: Path
) -> None:
    made = trained(tmp_path, case, family)
    with pytest.raises(PolicyError, match=r"ties the two: .*; --untie stores the head") as told:
        made.merge()
    assert "\n" not in str(told.value)
    assert cases.wsurg("apply-adapter", made.base, made.adapter, "-o", tmp_path / "out") == 5
    assert not (tmp_path / "out").exists()


@FAMILIES
@pytest.mark.parametrize("case", [*ALONE, *ALIKE])
def test_an_untied_merge_is_proved(case: str, family: str, tmp_path: Path) -> None:
    made = trained(tmp_path, case, family, torch.bfloat16)
    given = ("apply-adapter", made.base, made.adapter, "--untie", "-o", tmp_path / "out")
    assert cases.wsurg(*given) == 0  # which proves it
    base, adapter, merged = map(open_checkpoint, (made.base, made.adapter, tmp_path / "out"))
    report = verify_adapter(base, [adapter], merged)
    assert report["proved"], report["tensors"]
    names = [one["tensor"] for one in report["tensors"]]
    assert ("lm_head.weight" in names) == (
        case in ("head", "head, DoRA", "embedding and head", "saved head")
        or case.startswith("both saved")
        or "tokens" in case
    )


@FAMILIES
@pytest.mark.parametrize("case", ALONE)
def test_a_merge_that_stayed_tied_is_not_proved(case: str, family: str, tmp_path: Path) -> None:
    made = trained(tmp_path, case, family)
    merged = made.merge(untie=True)
    base, adapter = open_checkpoint(made.base), open_checkpoint(made.adapter)
    tied = {n: view for n, view in merged.items() if n != "lm_head.weight"}
    for one in (Checkpoint(tied, config=base.config), Checkpoint(dict(merged), config=base.config)):
        report = verify_adapter(base, [adapter], one)
        found = {entry["tensor"]: entry["verdict"] for entry in report["tensors"]}
        assert found["lm_head.weight"] == "tied"
        assert not report["proved"]


def test_a_head_that_peft_saves_to_keep_it_tied(tmp_path: Path) -> None:
    settings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    made = Trained(tmp_path, tied_llama, {"target_modules": ["q_proj"], **settings}, torch.float32)
    assert f"{FRONT}lm_head.weight" in open_checkpoint(made.adapter)
    found = cases.read(made.merge(untie=True))
    assert (found["lm_head.weight"] == found["model.embed_tokens.weight"]).all()


def test_conv1d_beside_a_linear_head(tmp_path: Path) -> None:
    settings = {"target_modules": ["c_attn", "mlp.c_proj", "lm_head"]}
    made = Trained(tmp_path, gpt2, settings, torch.float32)
    save(made.merge(untie=True), tmp_path / "merged")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(made.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["attn.c_proj", "lm_head"])
def test_a_square_conv1d_is_known_by_its_neighbours(last: str, tmp_path: Path) -> None:
    first = {"attn.c_proj": "lm_head", "lm_head": "attn.c_proj"}[last]
    settings = {"target_modules": [first, last], "use_dora": True}
    made = Trained(tmp_path, gpt2, settings, torch.float32)
    save(made.merge(untie=True), tmp_path / "merged")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(made.model), rtol=1e-4, atol=1e-5)


def test_a_square_matrix_of_unknown_orientation_is_refused() -> None:
    base = {"wide.weight": np.ones((4, 8), "f4"), "square.weight": np.ones((4, 4), "f4")}
    factors = {
        f"{FRONT}wide.lora_A.weight": np.ones((2, 4), "f4"),  # transposed, whatever is said
        f"{FRONT}wide.lora_B.weight": np.ones((8, 2), "f4"),
        f"{FRONT}square.lora_A.weight": np.ones((2, 4), "f4"),
        f"{FRONT}square.lora_B.weight": np.ones((4, 2), "f4"),
    }
    adapter = from_arrays(factors, config=cases.adapter_config("llama"))
    with pytest.raises(PolicyError, match="of this square one nobody can tell"):
        apply_adapter(from_arrays(base), adapter)
    told = from_arrays(factors, config=cases.adapter_config("llama", fan_in_fan_out=True))
    assert len(apply_adapter(from_arrays(base), told)) == 2


def test_a_wrong_head_is_found(tmp_path: Path) -> None:
    made = trained(tmp_path, "embedding", "llama")
    base, adapter = open_checkpoint(made.base), open_checkpoint(made.adapter)
    arrays = cases.read(made.merge(untie=True))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]  # adapted too
    merged = from_arrays(arrays, config={**base.config, "tie_word_embeddings": False})
    report = verify_adapter(base, [adapter], merged)
    assert [one["tensor"] for one in report["tensors"] if one["verdict"] == "edited"] == [
        "lm_head.weight"
    ]


def test_a_stored_copy_of_the_head_gets_the_trained_tokens_too(tmp_path: Path) -> None:
    made = trained(tmp_path, "tokens", "llama")
    base = open_checkpoint(made.base)
    arrays = cases.read(base)
    twice = from_arrays(
        {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]}, config=base.config
    )
    merged = apply_adapter(twice, open_checkpoint(made.adapter), force_base=True)
    found = cases.read(merged)
    assert (found["lm_head.weight"] == found["model.embed_tokens.weight"]).all()
    assert (found["lm_head.weight"] != arrays["model.embed_tokens.weight"]).any()
    assert verify_adapter(twice, [open_checkpoint(made.adapter)], merged)["proved"]


def test_several_adapters_of_which_one_adapts_the_head(tmp_path: Path) -> None:
    tokens = trained(tmp_path / "tokens", "tokens", "llama")
    head = trained(tmp_path / "head", "head", "llama")
    base = open_checkpoint(tokens.base)
    given = [open_checkpoint(one.adapter) for one in (tokens, head)]
    with pytest.raises(PolicyError, match="--untie"):
        apply_adapter(base, *given, force_base=True)
    merged = apply_adapter(base, *given, untie=True, force_base=True)
    assert merged.notes["untied"] == {
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
    }
    found = cases.read(merged)
    rows = found["model.embed_tokens.weight"][[3, 5]]
    assert not np.array_equal(rows, cases.read(base)["model.embed_tokens.weight"][[3, 5]])
    assert not np.array_equal(rows, found["lm_head.weight"][[3, 5]])
    assert verify_adapter(base, given, merged)["proved"]


def test_trained_tokens_beside_an_adapter_of_the_head_are_refused(tmp_path: Path) -> None:
    settings = {"target_modules": ["lm_head"], "trainable_token_indices": [3, 5]}
    made = Trained(tmp_path, tied_llama, settings, torch.float32)
    with pytest.raises(PolicyError, match="trained tokens of an embedding that the head is tied"):
        made.merge(untie=True)


def test_there_must_be_something_to_untie() -> None:
    arrays = cases.model("llama", dtype="f4")
    adapter = from_arrays(cases.adapter(arrays, "llama"), config=cases.adapter_config("llama"))
    with pytest.raises(MismatchError, match=r"its output head is not tied .* leave out `untie`"):
        apply_adapter(from_arrays(arrays), adapter, untie=True)


FRONT = "base_model.model."


def test_a_head_that_nobody_knows_the_place_of_is_not_untied() -> None:
    arrays = {"shared.weight": np.ones((8, 4), "f4"), "q.weight": np.ones((4, 4), "f4")}
    base = from_arrays(arrays, config={"tie_word_embeddings": True})
    factors = {
        f"{FRONT}shared.lora_embedding_A": np.ones((2, 8), "f4"),
        f"{FRONT}shared.lora_embedding_B": np.ones((4, 2), "f4"),
    }
    adapter = from_arrays(factors, config=cases.adapter_config("llama"))
    with pytest.raises(PolicyError, match="--untie"):
        apply_adapter(base, adapter)
    with pytest.raises(PolicyError, match="where the head of such a model would be stored"):
        apply_adapter(base, adapter, untie=True)


# --- what may be tied, and nobody can tell ------------------------------------------------------

WORDS, OTHER = "model.embed_tokens.weight", "decoder.word_embeddings.weight"
HEAD, SECOND = "lm_head.weight", "decoder.lm_head.weight"
UNCLEAR: dict[str, list[str]] = {
    "two embeddings": [WORDS, OTHER],
    "two embeddings and a head": [WORDS, OTHER, HEAD],
    "two heads": [WORDS, HEAD, SECOND],
    "two of both": [WORDS, OTHER, HEAD, SECOND],
}


def unclear(case: str, **said: Any) -> tuple[cases.Arrays, dict[str, Any]]:
    """A model in which several tensors could be the tied ones, and its configuration."""
    arrays = cases.model("llama", dtype="f4")
    embedding = arrays[WORDS]
    del arrays[HEAD]
    arrays |= {name: embedding + i for i, name in enumerate(UNCLEAR[case])}
    return arrays, {"model_type": "made-up", "tie_word_embeddings": True, **said}


def adapter_of(arrays: cases.Arrays, name: str) -> cases.Arrays:
    module = FRONT + name.removesuffix(".weight")
    (rows, columns), like = arrays[name].shape, np.random.default_rng(0)
    if name in (HEAD, SECOND):
        shapes = {"lora_A.weight": (2, columns), "lora_B.weight": (rows, 2)}
    else:
        shapes = {"lora_embedding_A": (2, rows), "lora_embedding_B": (columns, 2)}
    return {f"{module}.{end}": like.normal(size=s).astype("f4") for end, s in shapes.items()}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_may_be_tied_to_something_else_is_not_changed(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, config = unclear(case)
    base = from_arrays(arrays, config=config)
    assert find_tie(base) is None
    assert sorted(find_unclear_tie(base)) == sorted(UNCLEAR[case])
    cases.write_directory(tmp_path / "base", arrays, config=config)
    for i, name in enumerate(UNCLEAR[case]):
        path = tmp_path / f"adapter{i}"
        settings = cases.adapter_config("llama", base_model_name_or_path="base")
        cases.write_adapter(path, adapter_of(arrays, name), settings)
        before = cases.digests(tmp_path)
        for more in ([], ["--untie"]):
            given = (tmp_path / "base", path, "-o", tmp_path / "out", *more)
            assert cases.wsurg("apply-adapter", *given) == PolicyError.exit_code
            (told,) = capsys.readouterr().err.splitlines()
            assert f"tensor '{name}': BASE ties its output head to its word embedding" in told
            assert all(f"'{other}'" in told for other in UNCLEAR[case])
            assert told.endswith("say so in config.json: tie_word_embeddings false")
        assert cases.wsurg("verify-adapter", tmp_path / "base", path, tmp_path / "base") == 5
        capsys.readouterr()
        assert cases.digests(tmp_path) == before


@pytest.mark.parametrize("case", UNCLEAR)
def test_adapters_of_other_layers_do_not_ask_what_is_tied(case: str) -> None:
    arrays, config = unclear(case)
    base = from_arrays(arrays, config=config)
    adapter = from_arrays(cases.adapter(arrays, "llama"), config=cases.adapter_config("llama"))
    merged = apply_adapter(base, adapter)
    assert verify_adapter(base, [adapter], merged)["proved"]
    with pytest.raises(PolicyError, match="this tensor could be one of the two"):
        apply_adapter(base, adapter, untie=True)


@pytest.mark.parametrize("case", UNCLEAR)
@pytest.mark.parametrize(
    "said",
    [{"tie_word_embeddings": False}, {"architectures": ["LlamaModel"]}],
    ids=["untied", "no head"],
)
def test_where_nothing_is_tied_all_may_be_changed(case: str, said: dict[str, Any]) -> None:
    arrays, config = unclear(case, **said)
    base = from_arrays(arrays, config=config)
    assert find_unclear_tie(base) == ()
    for name in UNCLEAR[case]:
        settings = cases.adapter_config("llama")
        adapter = from_arrays(adapter_of(arrays, name), config=settings)
        found = cases.read(apply_adapter(base, adapter))
        assert {n for n in found if not np.array_equal(found[n], arrays[n])} == {name}


def test_a_shared_embedding_is_the_one() -> None:
    arrays, config = unclear("two embeddings")
    base = from_arrays({**arrays, "shared.weight": arrays[WORDS]}, config=config)
    assert find_unclear_tie(base) == ()
    assert find_tie(base) == Tie("shared.weight", "")


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_may_be_tied_is_not_extracted_but_told(case: str) -> None:
    arrays, config = unclear(case)
    base, tuned = (
        from_arrays(one, config=config) for one in (arrays, cases.finetuned(arrays, share=1.0))
    )
    adapter = extract_adapter(base, tuned)
    listed = {one["tensor"] for one in adapter.notes["adapter"]["left_out"]}
    assert listed >= set(UNCLEAR[case])
    held = adapter.notes["adapter"]
    names = {one["tensor"] for one in [*held["matrices"], *held["whole"]]}
    assert not names & set(UNCLEAR[case])
    assert [w for w in adapter.warnings if "are not in the adapter" in w]


# --- which models are tied ---------------------------------------------------------------------

LLAMA = ["LlamaForCausalLM"]
CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "said": ({"tie_word_embeddings": True, "architectures": LLAMA}, True),
    "denied": ({"tie_word_embeddings": False, "architectures": LLAMA}, False),
    "by default": ({"model_type": "gemma"}, True),
    "not by default": ({"model_type": "llama"}, False),
    "a decoder without a head": ({"architectures": LLAMA}, True),
    "nothing said": ({}, False),
    "no head at all": (
        {"tie_word_embeddings": True, "architectures": ["LlamaForSequenceClassification"]},
        False,
    ),
    "the bare model": ({"tie_word_embeddings": True, "architectures": ["LlamaModel"]}, False),
    "GPT-2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, True),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_which_models_are_tied(case: str) -> None:
    config, tied = CONFIGS[case]
    model = from_arrays({"model.embed_tokens.weight": np.ones((8, 4), "f4")}, config=config)
    assert find_tie(model) == (Tie("model.embed_tokens.weight", "lm_head.weight") if tied else None)


@pytest.mark.parametrize("model_type", sorted(_TIED_BY_DEFAULT))
def test_what_is_tied_by_default_is_so_in_transformers(model_type: str) -> None:
    assert transformers.CONFIG_MAPPING[model_type]().tie_word_embeddings is True
    assert says_tied(from_arrays({}, config={"model_type": model_type}))


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
PLACES = ["llama", "gpt2", "bloom", "falcon", "mamba", "openai-gpt"]


@pytest.mark.parametrize("model_type", PLACES)
def test_heads_lie_where_transformers_stores_them(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type, tie_word_embeddings=False, **SMALL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = {n: np.ones((2, 2), "f4") for n in model.state_dict()}
    stored = find_tie(from_arrays(names, config={"tie_word_embeddings": True}))
    del names["lm_head.weight"]
    assert find_tie(from_arrays(names, config={"tie_word_embeddings": True})) == stored
