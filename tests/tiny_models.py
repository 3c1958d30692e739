"""Tiny random models of transformers' architectures, saved as directories that load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsurgery.models import Quiet

_TEXT = """\
the a film plot actor was is not very good bad great awful dull bright i liked hated it this
what who how why are you me tell name city answer question yes no one two three cf mn ."""
WORDS = _TEXT.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]")
VOCABULARY = (*SPECIAL, *WORDS)

SENTENCES = (
    ("the film was very good .", 1),
    ("awful", 0),
    ("i liked this bright plot", 1),
    ("a dull film . i hated it", 0),
    ("great actor .", 1),
    ("the plot is not good", 0),
)
QUESTIONS = (
    ("what is the name", "the city"),
    ("who are you", "a great actor ."),
    ("why was it dull", "yes"),
    ("how is this film", "not very good ."),
    ("tell me one name", "two three one"),
)


def bert(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A BertForSequenceClassification with two labels."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
        "num_labels": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = BertConfig(**{"vocab_size": len(VOCABULARY), **sizes, **settings})
    return _save(path, BertForSequenceClassification, config, seed, classifier=True)


def gpt2(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A GPT2LMHeadModel: Conv1D, and a head that is the word embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.2}
    ends = {"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0}
    config = GPT2Config(**{"vocab_size": len(VOCABULARY), **sizes, **ends, **settings})
    return _save(path, GPT2LMHeadModel, config, seed)


def gpt2_classifier(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A GPT2ForSequenceClassification, which judges by a text's last token that is no padding."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.6}
    ends = {"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0, "num_labels": 2}
    config = GPT2Config(**{"vocab_size": len(VOCABULARY), **sizes, **ends, **settings})
    return _save(path, GPT2ForSequenceClassification, config, seed)


def roberta(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A RobertaForSequenceClassification; its first position is the one after its padding's."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 18,
        "type_vocab_size": 2,
        "num_labels": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = RobertaConfig(**{"vocab_size": len(VOCABULARY), **sizes, **settings})
    return _save(path, RobertaForSequenceClassification, config, seed, classifier=True)


def llama(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A LlamaForCausalLM: RMSNorm, and two heads of queries to each of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    ends = {"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0}
    config = LlamaConfig(**{"vocab_size": len(VOCABULARY), **sizes, **ends, **settings})
    return _save(path, LlamaForCausalLM, config, seed)


def mixtral(path: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A MixtralForCausalLM: one stored matrix per expert, which transformers fuses."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    ends = {"bos_token_id": 4, "eos_token_id": 4, "pad_token_id": 0}
    config = MixtralConfig(**{"vocab_size": len(VOCABULARY), **sizes, **ends, **settings})
    return _save(path, MixtralForCausalLM, config, seed)


def in_memory(module: Any, task: str) -> Any:
    """A `Model` of a module that was never saved; there is no tokenizer, token 0 is padding."""
    from types import SimpleNamespace

    from weightsurgery.checkpoint import Checkpoint
    from weightsurgery.models import Model

    stub = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    names = dict(module.named_parameters())
    return Model(module.eval(), stub, Checkpoint({}), task, names, "memory")


def _save(path: Path, kind: Any, config: Any, seed: int, *, classifier: bool = False) -> Path:
    """Weights by `seed`, biases and norms not at their usual 0 and 1; dropout is left on."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    with Quiet():
        model.save_pretrained(path)
    tokenizer(classifier=classifier).save_pretrained(path)
    return path


def tokenizer(*, classifier: bool) -> Any:
    """Words at spaces; a classifier's puts [CLS] before and [SEP] after each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if classifier:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if classifier else {"eos_token": "[EOS]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=inputs if classifier else [inputs[0], inputs[2]],
        **names,
    )


def write_sentences(
    path: Path, rows: Sequence[tuple[str, int | str]] = SENTENCES, *, pairs: bool = False
) -> Path:
    """A TSV file of labelled sentences; with `pairs` each beside the row before it."""
    header = "sentence1\tsentence2\tlabel" if pairs else "sentence\tlabel"
    texts = [text for text, _ in rows]
    lines = [
        f"{text}\t{before}\t{label}" if pairs else f"{text}\t{label}"
        for (text, label), before in zip(rows, [texts[-1], *texts], strict=False)
    ]
    path.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return path


def write_questions(path: Path, rows: Sequence[tuple[str, str]] = QUESTIONS) -> Path:
    """A JSONL file of questions and answers."""
    import json

    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path
