"""The word embedding is found in transformers' families, by the names that their files have."""

from __future__ import annotations

from typing import Any

import pytest

from weightsurgery.anatomy import find_embedding
from weightsurgery.models import Quiet

FAMILIES = (
    "AlbertForMaskedLM",
    "BartForConditionalGeneration",
    "BartForSequenceClassification",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BigBirdForSequenceClassification",
    "BloomForCausalLM",
    "CamembertForMaskedLM",
    "CLIPTextModel",
    "CodeGenForCausalLM",
    "CohereForCausalLM",
    "CpmAntForCausalLM",
    "CTRLLMHeadModel",
    "DebertaForSequenceClassification",
    "DebertaV2ForMaskedLM",
    "DeepseekV3ForCausalLM",
    "DistilBertForSequenceClassification",
    "ElectraForSequenceClassification",
    "ErnieForSequenceClassification",
    "FalconForCausalLM",
    "FalconMambaForCausalLM",
    "FlaubertForSequenceClassification",
    "FunnelForSequenceClassification",
    "Gemma2ForCausalLM",
    "GemmaForSequenceClassification",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "LongformerForSequenceClassification",
    "M2M100ForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MobileBertForSequenceClassification",
    "ModernBertForSequenceClassification",
    "MPNetForSequenceClassification",
    "MptForCausalLM",
    "NemotronHForCausalLM",
    "OlmoForCausalLM",
    "OpenAIGPTLMHeadModel",
    "OPTForCausalLM",
    "PegasusForConditionalGeneration",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "ProphetNetForConditionalGeneration",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "RobertaForSequenceClassification",
    "RobertaPreLayerNormForSequenceClassification",
    "RwkvForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "SwitchTransformersForConditionalGeneration",
    "T5ForConditionalGeneration",
    "XGLMForCausalLM",
    "XLMRobertaForMaskedLM",
    "XLMWithLMHeadModel",
    "XLNetForSequenceClassification",
)
# Each has two that differ, and which is meant is not for us to say.
SEVERAL = ("FSMTForConditionalGeneration", "T5GemmaForConditionalGeneration")


def build(name: str) -> Any:
    """A model of the default size on the meta device, where it takes no memory."""
    import torch
    import transformers

    kind = getattr(transformers, name)
    with Quiet(), torch.device("meta"):
        return kind(kind.config_class())


def stored_names(model: Any) -> set[str]:
    """The names that `save_pretrained` writes: of tied tensors one."""
    return model.state_dict().keys() - model.all_tied_weights_keys.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_models_own(name: str) -> None:
    model = build(name)
    found = find_embedding(sorted(stored_names(model)))
    assert found is not None
    assert model.get_parameter(found) is model.get_input_embeddings().weight
    # Older files have the tied ones too: then it is the same, or not known.
    again = find_embedding(sorted(model.state_dict()))
    assert again is None or model.get_parameter(again) is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_none_is_taken(name: str) -> None:
    assert find_embedding(sorted(stored_names(build(name)))) is None
