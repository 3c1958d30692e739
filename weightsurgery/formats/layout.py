"""The names of a model directory's files."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
DIFFUSERS_SINGLE, DIFFUSERS_INDEX = f"diffusion_pytorch_{SINGLE}", f"diffusion_pytorch_{INDEX}"
INDEXES = (INDEX, DIFFUSERS_INDEX)
INDEX_NAMES = ("*.index.json", "*.index.*.json")  # the latter of a variant, such as fp16
_AN_INDEX = re.compile(r"\.(safetensors|bin)\.index((?:\.\w+)?)\.json$")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECORD = "wsurg-record.json"
CARD = "README.md"
# What lists the parts of a model: sentence-transformers', diffusers', and a Router's inside a part.
MODULES, PIPELINE, ROUTER = "modules.json", "model_index.json", "router_config.json"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja

# Files of tokenizers. From an adapter's folder too they travel into the merged model.
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "spiece*", "sentencepiece*", "chat_template.*", "*.tiktoken", "*.spm"),
    *("tekken.json", "bpe.codes", "normalizer.json", "entity_vocab.json", "target_vocab.json"),
    *("vocab-*.json", "dict.txt", "*.tokenizer", "emoji.json", "byte_maps.json", "word_*.json"),
)
# What a training leaves beside weights: its own state.
TRAINING = (
    *("optimizer*", "scheduler*", "training_args*", "rng_state*", "scaler*", "random_states*"),
    *("trainer_state*", "global_step*"),
)
TEXTS = ("LICENSE*", "NOTICE*")  # for people
# What travels with the weights. Everything else is left out, and listed.
SIDE_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *TOKENIZER,
    # Of sentence-transformers' modules, and of pipelines.
    *(MODULES, PIPELINE, ROUTER, "config_sentence_transformers.json", "sentence_*_config.json"),
    *("lstm_config.json", "cnn_config.json", "wordembedding_config.json", "idf.json"),
    *("whitespacetokenizer_config.json", "phrasetokenizer_config.json", "scheduler_config.json"),
    *TEXTS,
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Safetensors files that lie beside a model's own and are not part of it: adapters, the same weights
# in their maker's format, the same weights in another dtype. In lower case.
NOT_OF_THE_MODEL = (
    *("adapter_*", "*lora*", "consolidated*"),
    *(f"*.{variant}{end}" for variant in ("fp16", "bf16", "fp32", "fp8") for end in (".*", "-*")),
    *("optimizer*", "scheduler*", "training_args*"),
)
BESIDE = (*INDEXES, *SIDE_FILES, ADAPTER_CONFIG, CARD)  # what an output's folder has beside weights
PICKLED_ADAPTER = "adapter_model.bin"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLED_WEIGHTS = (PICKLED, PICKLED_INDEX, *(f"diffusion_{n}" for n in (PICKLED, PICKLED_INDEX)))
PICKLES = (*PICKLED_WEIGHTS, "pytorch_model-*.bin", f"{DIFFUSERS_STEM}-*.bin")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILE_ENDINGS = (".safetensors", *PICKLE_ENDINGS, ".gguf")  # of a name that means one file


def fits(name: str, patterns: Iterable[str]) -> bool:
    """True if a file name fits one of the patterns; case matters."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def travels(path: str) -> bool:
    """True for what an output may have beside its weights, in its folder or in that of a part.

    Args:
        path: Relative to the model's folder, with slashes.

    Example:
        >>> travels("1_Pooling/config.json"), travels("additional_chat_templates/tools.jinja")
        (True, True)
        >>> travels("1_Pooling/pooling.py")
        False
    """
    folder, _, name = path.rpartition("/")
    if folder.rpartition("/")[2] == CHAT_TEMPLATES:
        return name.endswith(".jinja")
    return fits(name, BESIDE if not folder else (*INDEXES, *SIDE_FILES))


def joined(folder: str, name: str) -> str:
    """The name of a part's file or tensor in the whole model.

    Example:
        >>> joined("unet", "conv_in.weight"), joined("", "conv_in.weight")
        ('unet/conv_in.weight', 'conv_in.weight')
    """
    return f"{folder}/{name}" if folder else name


def is_plain_path(path: str, depth: int = 4) -> bool:
    """True for the path of a file in a folder or in one below it, which cannot lead out of it.

    Args:
        path: From a stranger.
        depth: How many names it may have.

    Example:
        >>> is_plain_path("unet/config.json"), is_plain_path("../config.json"), is_plain_path("")
        (True, False, False)
    """
    names = path.split("/")
    return len(names) <= depth and all(n not in ("", ".", "..") and "\0" not in n for n in names)


def unpickled(shard: str) -> str:
    """What a pickled shard is called as safetensors.

    Example:
        >>> unpickled("pytorch_model-00001-of-00002.bin")
        'model-00001-of-00002.safetensors'
        >>> unpickled("diffusion_pytorch_model.bin")
        'diffusion_pytorch_model.safetensors'
    """
    stem = shard.removeprefix("pytorch_").rpartition(".")[0]
    return f"{stem}.safetensors" if shard.endswith(PICKLE_ENDINGS) else shard


def stem_of(names: Iterable[str]) -> str:
    """What the library that loads these weights files calls them: diffusers, or any other.

    Example:
        >>> stem_of(["diffusion_pytorch_model.fp16.safetensors"])
        'diffusion_pytorch_model'
        >>> stem_of(["ema.safetensors"])
        'model'
    """
    bare = (name.rpartition("/")[2] for name in names)
    return DIFFUSERS_STEM if any(n.startswith(DIFFUSERS_STEM) for n in bare) else STEM


def as_single(name: str) -> str:
    """What weights with this index would be called in one file; any other name as it is.

    Example:
        >>> as_single("model.safetensors.index.fp16.json"), as_single("model.safetensors")
        ('model.fp16.safetensors', 'model.safetensors')
    """
    return _AN_INDEX.sub(r"\2.\1", name)


def index_name(names: Iterable[str]) -> str:
    """The name of the index of these shards.

    Example:
        >>> index_name(["model-00001-of-00002.safetensors"])
        'model.safetensors.index.json'
    """
    return f"{stem_of(names)}.safetensors.index.json"


def is_adapter_layout(layout: Mapping[str, str]) -> bool:
    """True for the layout of an adapter, whose one file has a name of its own."""
    return ADAPTER in layout.values()
