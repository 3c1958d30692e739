"""The zoo: tiny random models of transformers' architectures, each a base and its fine-tune."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 64

# Two layers, 16 wide. Each configuration class takes what it knows.
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_UNTIED = {**_GROUPED, "tie_word_embeddings": False}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
_DEEPSEEK = {
    **_TEXT,
    **_MLA,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_PROJECTED_TEXT = {**_TEXT, "projection_dim": 16}
_AUDIO: dict[str, Any] = {
    **_TEXT,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_TEXT = {"model_type": "llama", **_UNTIED}
_QWEN_VISION = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo.

    Attributes:
        model: The class that TUNED has.
        config: The class of its configuration.
        settings: What makes it tiny.
        base: The class that BASE has, where it is another.
        inputs: Which builder makes the forward pass's arguments: a key of `INPUTS`.
        fast: True for a cheap one of its kind; `law_table --fast` takes these.
    """

    model: str
    config: str
    settings: Mapping[str, Any] = field(repr=False)
    base: str = ""
    inputs: str = "text"
    fast: bool = False


def _row(model: str, config: str, settings: Mapping[str, Any], **more: Any) -> Architecture:
    return Architecture(model, config, settings, **more)


_BERT_TYPES = {**_TEXT, "type_vocab_size": 2}

ENCODERS = {
    "bert": _row("BertForMaskedLM", "BertConfig", _BERT_TYPES, fast=True),
    "bert-classifier": _row(
        "BertForSequenceClassification", "BertConfig", _BERT_TYPES, base="BertForMaskedLM"
    ),
    "bert-pretraining": _row("BertForPreTraining", "BertConfig", _BERT_TYPES),
    "roberta": _row("RobertaForMaskedLM", "RobertaConfig", _BERT_TYPES),
    "roberta-classifier": _row(
        "RobertaForSequenceClassification", "RobertaConfig", _BERT_TYPES, base="RobertaForMaskedLM"
    ),
    "xlm-roberta": _row("XLMRobertaForMaskedLM", "XLMRobertaConfig", _BERT_TYPES),
    "camembert-tokens": _row(
        "CamembertForTokenClassification", "CamembertConfig", _BERT_TYPES, base="CamembertModel"
    ),
    "albert": _row("AlbertForMaskedLM", "AlbertConfig", {**_TEXT, "embedding_size": 8}),
    "electra": _row("ElectraForMaskedLM", "ElectraConfig", {**_TEXT, "embedding_size": 8}),
    "electra-classifier": _row(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_TEXT, "embedding_size": 8},
        base="ElectraForPreTraining",
    ),
    "distilbert": _row(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 48,
            "pad_token_id": 0,
        },
    ),
    "deberta": _row(
        "DebertaForMaskedLM",
        "DebertaConfig",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "legacy": False},
    ),
    "deberta-v2": _row(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **_TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "conv_kernel_size": 3,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 8,
        },
    ),
    "mpnet": _row("MPNetForMaskedLM", "MPNetConfig", _TEXT),
    "modernbert": _row(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
    "xlm": _row(
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_langs": 1},
    ),
    "flaubert": _row(
        "FlaubertWithLMHeadModel",
        "FlaubertConfig",
        {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_langs": 1},
    ),
    "xlnet": _row(
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "mobilebert": _row(
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        {
            **_TEXT,
            "embedding_size": 8,
            "intra_bottleneck_size": 8,
            "true_hidden_size": 8,
            "num_feedforward_networks": 1,
        },
    ),
    "longformer": _row(
        "LongformerForMaskedLM", "LongformerConfig", {**_BERT_TYPES, "attention_window": 4}
    ),
    "funnel": _row(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_inner": 24,
            "n_head": 2,
            "d_head": 8,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "esm": _row(
        "EsmForMaskedLM",
        "EsmConfig",
        {**_TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"},
    ),
    "nomic-bert": _row("NomicBertForMaskedLM", "NomicBertConfig", _BERT_TYPES),
    "eurobert": _row("EuroBertForMaskedLM", "EuroBertConfig", {**_GROUPED, "mask_token_id": 3}),
}

DECODERS = {
    "gpt2": _row("GPT2LMHeadModel", "GPT2Config", _GPT, fast=True),
    "gpt2-classifier": _row(
        "GPT2ForSequenceClassification", "GPT2Config", _GPT, base="GPT2LMHeadModel"
    ),
    "openai-gpt": _row("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "ctrl": _row("CTRLLMHeadModel", "CTRLConfig", {**_GPT, "dff": 24}),
    "gpt-bigcode": _row("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "gpt-neo": _row(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **_TEXT,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt-neox": _row(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, "rotary_pct": 0.5}, fast=True
    ),
    "gpt-neox-japanese": _row("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", _TEXT),
    "gptj": _row("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "codegen": _row("CodeGenForCausalLM", "CodeGenConfig", {**_GPT, "n_head": 4, "rotary_dim": 4}),
    "opt": _row(
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16},
        fast=True,
    ),
    "opt-projected": _row(
        "OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 8}
    ),
    "bloom": _row(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2, **_ENDS},
    ),
    "falcon": _row("FalconForCausalLM", "FalconConfig", {**_TEXT, "ffn_hidden_size": 24}),
    "mpt": _row(
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "max_seq_len": 48,
            "expansion_ratio": 2,
        },
    ),
    "xglm": _row(
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "num_layers": 2,
            "attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 48,
            **_ENDS,
        },
    ),
    "biogpt": _row("BioGptForCausalLM", "BioGptConfig", _TEXT),
    "llama": _row("LlamaForCausalLM", "LlamaConfig", _UNTIED, fast=True),
    "llama-tied": _row(
        "LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, fast=True
    ),
    "llama-classifier": _row(
        "LlamaForSequenceClassification", "LlamaConfig", _UNTIED, base="LlamaForCausalLM"
    ),
    "mistral": _row("MistralForCausalLM", "MistralConfig", _GROUPED),
    "ministral": _row("MinistralForCausalLM", "MinistralConfig", _GROUPED),
    "qwen2": _row("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen2-tied": _row(
        "Qwen2ForCausalLM", "Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}
    ),
    "qwen3": _row("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "gemma": _row("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": _row("Gemma2ForCausalLM", "Gemma2Config", _GROUPED),
    "gemma3-text": _row("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED),
    "phi": _row("PhiForCausalLM", "PhiConfig", _TEXT),
    "phi3": _row("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "starcoder2": _row("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "stablelm": _row("StableLmForCausalLM", "StableLmConfig", _GROUPED),
    "olmo": _row("OlmoForCausalLM", "OlmoConfig", _GROUPED),
    "olmo2": _row("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "olmo3": _row("Olmo3ForCausalLM", "Olmo3Config", _GROUPED),
    "cohere": _row("CohereForCausalLM", "CohereConfig", _GROUPED),
    "cohere2": _row("Cohere2ForCausalLM", "Cohere2Config", _GROUPED),
    "granite": _row("GraniteForCausalLM", "GraniteConfig", _GROUPED),
    "glm": _row("GlmForCausalLM", "GlmConfig", _GROUPED),
    "glm4": _row("Glm4ForCausalLM", "Glm4Config", _GROUPED),
    "nemotron": _row("NemotronForCausalLM", "NemotronConfig", _GROUPED),
    "ernie4-5": _row("Ernie4_5ForCausalLM", "Ernie4_5Config", _GROUPED),
    "smollm3": _row("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "exaone4": _row("Exaone4ForCausalLM", "Exaone4Config", _GROUPED),
    "helium": _row("HeliumForCausalLM", "HeliumConfig", _GROUPED),
    "persimmon": _row("PersimmonForCausalLM", "PersimmonConfig", _TEXT),
    "hunyuan": _row("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _GROUPED),
    "arcee": _row("ArceeForCausalLM", "ArceeConfig", _GROUPED),
    "seed-oss": _row("SeedOssForCausalLM", "SeedOssConfig", _GROUPED),
    "apertus": _row("ApertusForCausalLM", "ApertusConfig", _GROUPED),
    "diffllama": _row(
        "DiffLlamaForCausalLM", "DiffLlamaConfig", {**_TEXT, "num_key_value_heads": 2}
    ),
}

MIXTURES = {
    "mixtral": _row(
        "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, **_LOCAL_EXPERTS}, fast=True
    ),
    "qwen2-moe": _row(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 12},
    ),
    "qwen3-moe": _row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_EXPERTS}),
    "qwen3-next": _row(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_GROUPED,
            **_EXPERTS,
            "shared_expert_intermediate_size": 12,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "phimoe": _row("PhimoeForCausalLM", "PhimoeConfig", {**_GROUPED, **_LOCAL_EXPERTS}),
    "olmoe": _row("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, **_EXPERTS}),
    "flex-olmo": _row("FlexOlmoForCausalLM", "FlexOlmoConfig", {**_GROUPED, **_EXPERTS}),
    "granitemoe": _row("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_GROUPED, **_LOCAL_EXPERTS}),
    "granitemoeshared": _row(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**_GROUPED, **_LOCAL_EXPERTS, "shared_intermediate_size": 12},
    ),
    "deepseek-v2": _row("DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK),
    "deepseek-v3": _row("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    "glm4-moe": _row(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **_GROUPED,
            "moe_intermediate_size": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "dots1": _row(
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **_GROUPED,
            "moe_intermediate_size": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": _row("GptOssForCausalLM", "GptOssConfig", {**_GROUPED, **_LOCAL_EXPERTS}),
    "dbrx": _row(
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 48,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 16,
            },
        },
    ),
    "ernie4-5-moe": _row(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **_GROUPED,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 12,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
        },
    ),
    "hunyuan-moe": _row(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {**_GROUPED, "num_experts": 4, "moe_topk": 2},
    ),
    "minimax": _row(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            **_GROUPED,
            **_LOCAL_EXPERTS,
            "block_size": 4,
            "layer_types": ["full_attention", "linear_attention"],
        },
    ),
    "minimax-m2": _row("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**_GROUPED, **_LOCAL_EXPERTS}),
    "jetmoe": _row(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            **_TEXT,
            "num_key_value_heads": 1,
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "switch-transformers": _row(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **_T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        inputs="seq2seq",
    ),
    "nllb-moe": _row(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {
            **_SEQ2SEQ,
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "expert_capacity": 16,
        },
        inputs="seq2seq",
    ),
    "jamba": _row(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
        },
    ),
    "granitemoehybrid": _row(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_GROUPED,
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 12,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention"],
            "mamba_expand": 2,
        },
    ),
}

STATE_SPACE = {
    "mamba": _row(
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "expand": 2,
            "time_step_rank": 4,
            **_ENDS,
        },
        fast=True,
    ),
    "mamba2": _row(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 8,
            "expand": 2,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            **_ENDS,
        },
    ),
    "falcon-mamba": _row(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "expand": 2,
            "time_step_rank": 4,
            **_ENDS,
        },
    ),
    "falcon-h1": _row(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **_GROUPED,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "rwkv": _row(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 24,
            "context_length": 64,
        },
    ),
    "recurrent-gemma": _row(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **_GROUPED,
            "lru_width": 16,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "lfm2": _row(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "lfm2-moe": _row(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **_GROUPED,
            **_EXPERTS,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
        },
    ),
    "zamba": _row(
        "ZambaForCausalLM",
        "ZambaConfig",
        {
            **_TEXT,
            "num_key_value_heads": 2,
            "attention_head_dim": 16,
            "mamba_d_state": 4,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
        },
    ),
    "zamba2": _row(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_TEXT,
            "num_key_value_heads": 2,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "use_mem_rope": False,
            "adapter_rank": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "use_shared_attention_adapter": False,
            "num_mem_blocks": 1,
        },
    ),
    "bamba": _row(
        "BambaForCausalLM",
        "BambaConfig",
        {
            **_GROUPED,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
            "mamba_chunk_size": 8,
        },
    ),
    "nemotron-h": _row(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_GROUPED,
            "layers_block_type": ["mamba", "attention"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
    ),
}

ENCODER_DECODERS = {
    "bart": _row("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, fast=True),
    "bart-classifier": _row(
        "BartForSequenceClassification",
        "BartConfig",
        _SEQ2SEQ,
        base="BartForConditionalGeneration",
        inputs="bart-classifier",
    ),
    "mbart": _row("MBartForConditionalGeneration", "MBartConfig", _SEQ2SEQ),
    "pegasus": _row("PegasusForConditionalGeneration", "PegasusConfig", _SEQ2SEQ),
    "marian": _row("MarianMTModel", "MarianConfig", _SEQ2SEQ),
    "blenderbot": _row("BlenderbotForConditionalGeneration", "BlenderbotConfig", _SEQ2SEQ),
    "blenderbot-small": _row(
        "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", _SEQ2SEQ
    ),
    "plbart": _row("PLBartForConditionalGeneration", "PLBartConfig", _SEQ2SEQ),
    "led": _row(
        "LEDForConditionalGeneration",
        "LEDConfig",
        {
            **_SEQ2SEQ,
            "attention_window": 4,
            "max_encoder_position_embeddings": 48,
            "max_decoder_position_embeddings": 48,
        },
    ),
    "m2m-100": _row("M2M100ForConditionalGeneration", "M2M100Config", _SEQ2SEQ),
    "prophetnet": _row(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 48,
            "decoder_start_token_id": 1,
            **_ENDS,
        },
    ),
    "fsmt": _row(
        "FSMTForConditionalGeneration",
        "FSMTConfig",
        {
            **_SEQ2SEQ,
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
            "langs": ["en", "de"],
        },
    ),
    "t5": _row("T5ForConditionalGeneration", "T5Config", {**_T5, "tie_word_embeddings": True}),
    "t5-untied": _row(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "t5-encoder": _row(
        "T5EncoderModel", "T5Config", _T5, base="T5ForConditionalGeneration", inputs="text"
    ),
    "mt5": _row("MT5ForConditionalGeneration", "MT5Config", _T5),
    "umt5": _row("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "longt5": _row("LongT5ForConditionalGeneration", "LongT5Config", {**_T5, "local_radius": 3}),
    "t5gemma": _row(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"encoder": {**_GROUPED}, "decoder": {**_GROUPED}, "vocab_size": VOCABULARY},
    ),
}
ENCODER_DECODERS = {
    name: row
    if row.inputs != "text" or name == "t5-encoder"
    else _row(row.model, row.config, row.settings, base=row.base, inputs="seq2seq", fast=row.fast)
    for name, row in ENCODER_DECODERS.items()
}

AUDIO = {
    "whisper": _row(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs="whisper",
    ),
    "wav2vec2": _row("Wav2Vec2ForCTC", "Wav2Vec2Config", _AUDIO, inputs="audio"),
    "wav2vec2-pretrained": _row(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", _AUDIO, base="Wav2Vec2Model", inputs="audio"
    ),
    "hubert": _row("HubertForCTC", "HubertConfig", _AUDIO, inputs="audio"),
    "wavlm": _row("WavLMForCTC", "WavLMConfig", _AUDIO, inputs="audio"),
    "speech-to-text": _row(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **_SEQ2SEQ,
            "input_feat_per_channel": 8,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "conv_channels": 16,
        },
        inputs="speech",
    ),
    "speecht5": _row(
        "SpeechT5ForSpeechToText",
        "SpeechT5Config",
        {
            **_AUDIO,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 24,
            "max_speech_positions": 64,
            "max_text_positions": 48,
            "decoder_start_token_id": 2,
            "encoder_max_relative_position": 8,
        },
        inputs="speecht5",
    ),
    "musicgen-decoder": _row(
        "MusicgenForCausalLM",
        "MusicgenDecoderConfig",
        {
            **_TEXT,
            "ffn_dim": 24,
            "num_codebooks": 2,
        },
        inputs="codebooks",
    ),
    "bark": _row(
        "BarkSemanticModel",
        "BarkSemanticConfig",
        {
            "input_vocab_size": VOCABULARY,
            "output_vocab_size": VOCABULARY,
            "block_size": 48,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
        },
    ),
}

VISION = {
    "vit": _row("ViTForImageClassification", "ViTConfig", _VISION, inputs="image"),
    "vit-pretrained": _row(
        "ViTForImageClassification", "ViTConfig", _VISION, base="ViTModel", inputs="image"
    ),
    "beit": _row("BeitForImageClassification", "BeitConfig", _VISION, inputs="image"),
    "dinov2": _row("Dinov2Model", "Dinov2Config", _VISION, inputs="image"),
    "clip": _row(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _PROJECTED_TEXT, "vision_config": _VISION, "projection_dim": 16},
        inputs="pair",
    ),
    "clip-text": _row("CLIPTextModel", "CLIPTextConfig", _PROJECTED_TEXT),
    "siglip": _row(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "projection_size": 16}, "vision_config": _VISION},
        inputs="pair",
    ),
    "blip": _row(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": {**_TEXT, "encoder_hidden_size": 16, "is_decoder": True},
            "vision_config": _VISION,
        },
        inputs="pair",
    ),
    "vision-encoder-decoder": _row(
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {
            "encoder": {"model_type": "vit", **_VISION},
            "decoder": {
                "model_type": "gpt2",
                **_GPT,
                "add_cross_attention": True,
                "is_decoder": True,
            },
        },
        inputs="captions",
    ),
}

_CLIP_VISION = {"model_type": "clip_vision_model", **_VISION}
_SIGLIP_VISION = {"model_type": "siglip_vision_model", **_VISION}
_QWEN2_TEXT = {**_UNTIED, "rope_parameters": _ROPE, "rope_scaling": _ROPE}
_QWEN_TOKENS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}

VISION_LANGUAGE = {
    "llava": _row(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": _LLAMA_TEXT,
            "vision_config": _CLIP_VISION,
            "image_token_id": 60,
            "image_seq_length": 4,
        },
        inputs="image tokens",
    ),
    "llava-tied": _row(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "qwen2", **_GROUPED, "tie_word_embeddings": True},
            "vision_config": _SIGLIP_VISION,
            "image_token_id": 60,
            "image_seq_length": 4,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": True,
        },
        inputs="image tokens",
    ),
    "llava-next": _row(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "text_config": _LLAMA_TEXT,
            "vision_config": _CLIP_VISION,
            "image_token_id": 60,
            "image_grid_pinpoints": [[8, 8]],
        },
    ),
    "llava-onevision": _row(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {
            "text_config": {"model_type": "qwen2", **_GROUPED, "tie_word_embeddings": False},
            "vision_config": _SIGLIP_VISION,
            "image_token_id": 60,
            "video_token_id": 61,
        },
    ),
    "video-llava": _row(
        "VideoLlavaForConditionalGeneration",
        "VideoLlavaConfig",
        {
            "text_config": _LLAMA_TEXT,
            "vision_config": _CLIP_VISION,
            "image_token_index": 60,
            "video_token_index": 61,
        },
    ),
    "vipllava": _row(
        "VipLlavaForConditionalGeneration",
        "VipLlavaConfig",
        {
            "text_config": _LLAMA_TEXT,
            "vision_config": _CLIP_VISION,
            "image_token_index": 60,
            "vision_feature_layers": [-1, -2],
        },
    ),
    "paligemma": _row(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **_GROUPED},
            "vision_config": {**_SIGLIP_VISION, "projection_dim": 16, "vision_use_head": False},
            "image_token_id": 60,
            "projection_dim": 16,
        },
    ),
    "gemma3": _row(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _GROUPED,
            "vision_config": {**_SIGLIP_VISION, "vision_use_head": False},
            "image_token_id": 60,
            "boi_token_id": 61,
            "eoi_token_id": 62,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3-text-of-gemma3": _row(
        "Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED, base="Gemma3ForConditionalGeneration"
    ),
    "mistral3": _row(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **_UNTIED},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
            "image_token_id": 60,
        },
    ),
    "qwen2-vl": _row(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": _QWEN2_TEXT, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
    ),
    "qwen2-5-vl": _row(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": _QWEN2_TEXT,
            **_QWEN_TOKENS,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
        },
    ),
    "qwen2-5-vl-tied": _row(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_QWEN2_TEXT, "tie_word_embeddings": True},
            "tie_word_embeddings": True,
            **_QWEN_TOKENS,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
        },
    ),
    "qwen3-vl": _row(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": _QWEN2_TEXT,
            **_QWEN_TOKENS,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    ),
    "qwen3-vl-moe": _row(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**_QWEN2_TEXT, **_EXPERTS},
            **_QWEN_TOKENS,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    ),
    "qwen3-5": _row(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {
            "text_config": {
                **_QWEN2_TEXT,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "layer_types": ["linear_attention", "full_attention"],
            },
            **_QWEN_TOKENS,
            "vision_config": {
                **_QWEN_VISION,
                "out_hidden_size": 16,
                "intermediate_size": 24,
                "num_position_embeddings": 16,
            },
        },
    ),
    "mllama": _row(
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {**_UNTIED, "cross_attention_layers": [1]},
            "vision_config": {
                **_VISION,
                "attention_heads": 2,
                "num_global_layers": 1,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": 60,
        },
    ),
    "internvl": _row(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **_UNTIED},
            "vision_config": {**_VISION, "image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": 60,
            "image_seq_length": 4,
        },
    ),
    "idefics2": _row(
        "Idefics2ForConditionalGeneration",
        "Idefics2Config",
        {
            "text_config": {"model_type": "mistral", **_UNTIED},
            "vision_config": _VISION,
            "perceiver_config": {
                "hidden_size": 16,
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "num_key_value_heads": 1,
                "resampler_head_dim": 8,
            },
            "image_token_id": 60,
        },
    ),
    "idefics3": _row(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {
            "text_config": _LLAMA_TEXT,
            "vision_config": _VISION,
            "image_token_id": 60,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
    ),
    "smolvlm": _row(
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **_GROUPED, "tie_word_embeddings": True},
            "vision_config": _VISION,
            "image_token_id": 60,
            "tie_word_embeddings": True,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
    ),
    "blip-2": _row(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "text_config": {
                "model_type": "opt",
                **_TEXT,
                "ffn_dim": 24,
                "word_embed_proj_dim": 16,
            },
            "vision_config": _VISION,
            "qformer_config": {**_TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
            "num_query_tokens": 4,
            "image_token_index": 60,
        },
        inputs="image tokens",
    ),
    "instructblip": _row(
        "InstructBlipForConditionalGeneration",
        "InstructBlipConfig",
        {
            "text_config": {"model_type": "t5", **_T5},
            "vision_config": _VISION,
            "qformer_config": {**_TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
            "num_query_tokens": 4,
            "image_token_index": 60,
        },
        inputs="instructblip",
    ),
    "kosmos-2": _row(
        "Kosmos2ForConditionalGeneration",
        "Kosmos2Config",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "embed_dim": 16,
                "layers": 2,
                "ffn_dim": 24,
                "attention_heads": 2,
                "max_position_embeddings": 48,
                **_ENDS,
            },
            "vision_config": _VISION,
            "latent_query_num": 4,
        },
        inputs="kosmos",
    ),
    "aya-vision": _row(
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        {
            "text_config": {"model_type": "cohere2", **_GROUPED},
            "vision_config": _SIGLIP_VISION,
            "image_token_index": 60,
            "downsample_factor": 2,
        },
    ),
    "fuyu": _row(
        "FuyuForCausalLM",
        "FuyuConfig",
        {
            **_TEXT,
            "patch_size": 4,
            "num_channels": 3,
            "text_config": {"model_type": "persimmon", **_TEXT},
        },
    ),
    "florence2": _row(
        "Florence2ForConditionalGeneration",
        "Florence2Config",
        {
            "text_config": {"model_type": "bart", **_SEQ2SEQ},
            "vision_config": {
                "embed_dim": [8, 8],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "depths": [1, 1],
                "patch_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "patch_prenorm": [False, True],
                "window_size": 2,
                "projection_dim": 16,
            },
            "image_token_id": 60,
        },
        inputs="seq2seq",
    ),
}

ARCHITECTURES: dict[str, Architecture] = {
    **ENCODERS,
    **DECODERS,
    **MIXTURES,
    **STATE_SPACE,
    **ENCODER_DECODERS,
    **AUDIO,
    **VISION,
    **VISION_LANGUAGE,
}


def seed_of(name: str) -> int:
    """The seed of an architecture's weights and inputs: its own, so that rows may come and go."""
    return zlib.crc32(name.encode())


def config_of(architecture: Architecture) -> Any:
    """Its configuration; attention is the plain implementation's."""
    import transformers

    config = getattr(transformers, architecture.config)(**architecture.settings)
    config._attn_implementation = "eager"
    return config


def inputs_of(architecture: Architecture, seed: int) -> dict[str, Any]:
    """The arguments of one forward pass."""
    import torch

    random = torch.Generator().manual_seed(seed)

    def tokens(length: int = 7, *more: int) -> Any:
        return torch.randint(3, 58, (2, *more, length), generator=random)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=random)

    ends = torch.tensor([[2], [2]])
    with_image = torch.cat([torch.full((2, 4), 60), tokens()], 1)
    kinds = {
        "text": lambda: {"input_ids": tokens()},
        "seq2seq": lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(5)},
        "bart-classifier": lambda: {"input_ids": torch.cat([tokens(), ends], 1)},
        "image": lambda: {"pixel_values": noise(1, 3, 8, 8)},
        "pair": lambda: {"input_ids": tokens(), "pixel_values": noise(2, 3, 8, 8)},
        "captions": lambda: {"decoder_input_ids": tokens(), "pixel_values": noise(2, 3, 8, 8)},
        "image tokens": lambda: {"input_ids": with_image, "pixel_values": noise(2, 3, 8, 8)},
        "kosmos": lambda: {
            "input_ids": with_image,
            "pixel_values": noise(2, 3, 8, 8),
            "image_embeds_position_mask": (with_image == 60).long(),
        },
        "instructblip": lambda: {
            "input_ids": with_image,
            "pixel_values": noise(2, 3, 8, 8),
            "qformer_input_ids": tokens(),
            "decoder_input_ids": tokens(5),
        },
        "audio": lambda: {"input_values": noise(1, 400)},
        "whisper": lambda: {"input_features": noise(1, 8, 16), "decoder_input_ids": tokens(5)[:1]},
        "speech": lambda: {"input_features": noise(2, 24, 8), "decoder_input_ids": tokens(5)},
        "speecht5": lambda: {"input_values": noise(1, 400), "decoder_input_ids": tokens(5)[:1]},
        "codebooks": lambda: {"input_ids": tokens(5, 2).reshape(4, 5)},
    }
    return kinds[architecture.inputs]()


def random_model(architecture: Architecture, seed: int, *, base: bool) -> Any:
    """A model every parameter of which is random, norms and biases too.

    Args:
        architecture: Which.
        seed: Of the weights.
        base: Of BASE's class, where that is another than TUNED's.
    """
    import torch
    import transformers

    kind = getattr(transformers, (base and architecture.base) or architecture.model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = _base_config(architecture) if base else config_of(architecture)
        model = kind(config)
        add_noise(model, 0.1)
    return model.eval()


def _base_config(architecture: Architecture) -> Any:
    if architecture.base == "Gemma3ForConditionalGeneration":
        return config_of(ARCHITECTURES["gemma3"])
    return config_of(architecture)


def add_noise(model: Any, size: float) -> None:
    """Move every parameter and every floating buffer that is stored; what is tied stays tied."""
    import torch

    stored = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n in stored and b.is_floating_point()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape), alpha=size)
    for name, buffer in buffers.items():
        moved = torch.randn(buffer.shape) * size
        buffer.add_(moved.abs() if name.endswith("running_var") else moved)
