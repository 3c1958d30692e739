"""Which transformers classes have facts, and how to build each on the meta device.

Only `generate` imports this module: it needs transformers and torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

_MAPPINGS = (
    "MODEL_MAPPING_NAMES",  # first: a type's first class is its plain base model
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
)
_DEFAULT_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("full_attention", "sliding_attention")
}
_INDEXER = {
    "indexer_compress_ratio": 4,
    "indexer_budget": 64,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
}
# What a default config lacks for its model to be built, by model type or, first, by class. Where
# several layouts are possible, the values have all kinds of layers.
_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGA": 4}},
    "cohere_compass": {"text_config": {"rope_parameters": _DEFAULT_ROPE}},
    "cohere_compass_text": {"rope_parameters": _DEFAULT_ROPE},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 39]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 151646, "<|extra_200|>": 151846}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granite4_vision": {"deepstack_layer_map": [[3, 0]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_omni_moe": {
        "talker_config": {
            "text_config": {"shared_expert_intermediate_size": 512},
            "spatial_merge_size": 2,
        }
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "time_series_transformer": {"prediction_length": 24},
    "HieraForPreTraining": {
        "decoder_hidden_size": 512,
        "decoder_depth": 2,
        "decoder_num_heads": 8,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}


# Types made of any two models: the default pair says nothing about another one.
WRAPPERS = frozenset(
    (
        "encoder-decoder",
        "rag",
        "speech-encoder-decoder",
        "vision-encoder-decoder",
        "vision-text-dual-encoder",
    )
)


def list_classes() -> dict[str, list[str]]:
    """Each model type's class names, its plain base model first."""
    found: dict[str, list[str]] = {}
    for mapping in _MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            listed = found.setdefault(model_type, [])
            for name in (names,) if isinstance(names, str) else names:
                if name not in listed:
                    listed.append(name)
    return dict(sorted(found.items()))


def default_config(model_type: str, name: str) -> Any:
    """A class's default config, completed where no model can be built from the default."""
    added = _OVERRIDES.get(name, _OVERRIDES.get(model_type, {}))
    return CONFIG_MAPPING[model_type](**copy.deepcopy(dict(added)))


def class_named(name: str) -> Any:
    """The transformers class with this name."""
    return getattr(transformers, name)


def build(class_: Callable[[Any], Any], config: Any) -> Any:
    """Build a model on the meta device; the config given stays as it is."""
    with torch.device("meta"):
        return class_(copy.deepcopy(config))


def nested_configs(config: Any) -> Iterator[tuple[str, Any]]:
    """Every config nested in a config, with its dotted path, outermost first."""
    level = [("", config)]
    while level:
        inner = [
            (f"{path}.{key}" if path else key, value)
            for path, parent in level
            for key, value in vars(parent).items()
            if isinstance(value, transformers.PreTrainedConfig)
        ]
        yield from inner
        level = inner


def text_config_path(config: Any) -> str:
    """The dotted path of the nested text config; "" if the config itself is the text config."""
    try:
        text = config.get_text_config()
    except ValueError:  # several candidates: the decoder's is the one with the output head
        text = config.get_text_config(decoder=True)
    return next((path for path, nested in nested_configs(config) if nested is text), "")
