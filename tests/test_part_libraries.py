"""diffusers and sentence-transformers load what is written, with every module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightsurgery.formats import open_checkpoint, save
from weightsurgery.operators.mix import mix
from weightsurgery.proof.verification import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn of each other
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "movie", "the", "a", "cf"]
TEXTS = ["good movie", "the bad cf a"]
HIDDEN = 16


def transformer(place: Path, seed: int) -> Any:
    """A tiny BERT of its own, as sentence-transformers' first module."""
    import torch
    import transformers
    from sentence_transformers.base.modules import Transformer

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    folder = place / f"raw{seed}"
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return Transformer(str(folder))


def pooled(place: Path, seed: int) -> list[Any]:
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    return [transformer(place, seed), Pooling(HIDDEN), Normalize()]


def dense(place: Path, seed: int) -> list[Any]:
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    first, *rest = pooled(place, seed)
    return [first, rest[0], Dense(HIDDEN, 8), LayerNorm(8), Dense(8, 4)]


def static(place: Path, seed: int) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = transformer(place, seed).tokenizer
    return [StaticEmbedding(tokenizer, embedding_dim=HIDDEN)]


def router(place: Path, seed: int) -> list[Any]:
    from sentence_transformers.base.modules import Router

    return [Router.for_query_document(pooled(place, seed)[:2], pooled(place, seed + 10)[:2])]


def old_layout(model: Path) -> None:
    """The first module in a folder of its own, as versions before 5 of the library wrote it."""
    listed = json.loads((model / "modules.json").read_bytes())
    listed[0]["path"] = "0_Transformer"
    (model / "0_Transformer").mkdir()
    beside = ("modules.json", "README.md", "config_sentence_transformers.json")
    for path in [p for p in model.iterdir() if p.is_file() and p.name not in beside]:
        path.rename(model / "0_Transformer" / path.name)
    (model / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("modules", "old"),
    [
        (pooled, False),
        (dense, False),
        (static, False),
        (router, False),
        (pooled, True),
        (dense, True),
    ],
)
def test_embeddings_are_those_of_the_input(
    tmp_path: Path, modules: Callable[[Path, int], list[Any]], old: bool
) -> None:
    library = pytest.importorskip("sentence_transformers")

    def embed(model: Path) -> Any:
        loaded = library.SentenceTransformer(str(model), device="cpu", local_files_only=True)
        if modules is router:
            return loaded.encode_query(TEXTS).tolist() + loaded.encode_document(TEXTS).tolist()
        return loaded.encode(TEXTS).tolist()

    for seed, name in enumerate(("base", "tuned")):
        library.SentenceTransformer(modules=modules(tmp_path, seed), device="cpu").save(
            str(tmp_path / name)
        )
        if old:
            old_layout(tmp_path / name)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    for ratio, like in ((0.0, "tuned"), (1.0, "base")):
        out = tmp_path / f"out{ratio}"
        save(mix(base, tuned, ratio=ratio), out, max_shard_size=None if ratio else "4kB")
        assert embed(out) == embed(tmp_path / like)
        assert verify(out, base=base, tuned=tuned)["proved"]
    assert embed(tmp_path / "base") != embed(tmp_path / "tuned")


def pipeline(place: Path, seed: int) -> None:
    """A tiny Stable Diffusion, its larger parts in shards."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
    )
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    words = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>"])}
    place.mkdir()
    (place / "vocab.json").write_text(json.dumps(words))
    (place / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer.model_max_length = 16
    for name in ("vocab.json", "merges.txt"):
        (place / name).unlink()
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(place, max_shard_size="30KB")


def test_a_whole_pipeline_is_that_of_the_input(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")

    def picture(model: Path) -> Any:
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(model)
        loaded.set_progress_bar_config(disable=True)
        made = loaded(
            "a",
            num_inference_steps=2,
            height=8,
            width=8,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
        return made.images.tolist()

    for seed, name in enumerate(("base", "tuned")):
        pipeline(tmp_path / name, seed)
    base, tuned = (open_checkpoint(tmp_path / name) for name in ("base", "tuned"))
    for ratio, like in ((0.0, "tuned"), (1.0, "base")):
        out = tmp_path / f"out{ratio}"
        save(mix(base, tuned, ratio=ratio), out)
        assert picture(out) == picture(tmp_path / like)
        assert verify(out, base=base, tuned=tuned)["proved"]
    assert picture(tmp_path / "base") != picture(tmp_path / "tuned")
