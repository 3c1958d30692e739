"""What a tensor's name tells: the layer it belongs to, the kind of module, the order to list."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|[./])(layers?|h|blocks?)\.(\d{1,9})(?:\.|$)")

# How families call the word embedding: BERT's and BLOOM's, XLNet's, Llama's and OPT's, GPT-2's,
# GPT-NeoX's, T5's and BART's, ModernBERT's, GPT-1's, CLIP's, CPM-Ant's.
_WORDS = (
    r"word_embeddings|word_embedding|embed_tokens|wte|embed_in|shared|tok_embeddings|tokens_embed"
    r"|token_embedding|input_embedding"
)
# Names that mean it only at a path's end, and only beside none of the above: XLM's, Mamba's,
# RWKV's and xLSTM's `embeddings`, and what CTRL and the first Mamba files have.
_BARE = re.compile(r"(?:^|[./])(?:embeddings|transformer\.w|backbone\.embedding)\.weight$")

# The first rule that matches decides. Rules look at the module path without the final
# .weight/.bias; they cover the BERT, RoBERTa, GPT-2, GPT-NeoX, Llama, Mixtral and T5 families.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"(?:^|[./])(?:{pattern})(?:\.|$)", re.IGNORECASE))
    for kind, pattern in (
        # At the end: all of RoBERTa-PreLayerNorm is below `roberta_prelayernorm`.
        ("norm", r"(?:\w*norm\w*|ln_\w+)(?:\.\w+)?$"),
        ("embedding.position", r"position_embeddings|wpe|embed_positions|positions_embed"),
        ("embedding.token_type", r"token_type_embeddings"),
        ("embedding", _WORDS),
        ("head", r"lm_head|embed_out|classifier|score|qa_outputs|cls|pooler|\w*head"),
        ("attention.qkv", r"c_attn|query_key_value|qkv_proj|qkv|Wqkv"),
        ("attention.query", r"query|q_proj|q_lin|wq|SelfAttention\.q"),
        ("attention.key", r"key|k_proj|k_lin|wk|SelfAttention\.k"),
        ("attention.value", r"value|v_proj|v_lin|wv|SelfAttention\.v"),
        (
            "attention.output",
            r"attention\.output\.dense|o_proj|out_proj|out_lin|attn\.c_proj|attention\.dense|wo",
        ),
        ("mlp.router", r"router|block_sparse_moe\.gate|mlp\.gate"),
        ("mlp.gate", r"gate_proj|gate_up_proj|w1|wi_0"),
        ("mlp.up", r"up_proj|intermediate\.dense|c_fc|fc1|lin1|dense_h_to_4h|w3|wi|wi_1"),
        ("mlp.down", r"down_proj|output\.dense|mlp\.c_proj|fc2|lin2|dense_4h_to_h|w2"),
    )
)


def layer_of(name: str) -> str:
    """The numbered layer a tensor belongs to, such as `model.layers.3`; "" if none.

    Example:
        >>> layer_of("bert.encoder.layer.11.attention.self.query.weight")
        'bert.encoder.layer.11'
    """
    found = _LAYER.search(name)
    return name[: found.end(2)] if found else ""


def kind_of(name: str) -> str:
    """The kind of module a tensor belongs to, such as `attention.query`; "other" if unknown.

    Example:
        >>> kind_of("model.layers.3.mlp.down_proj.weight")
        'mlp.down'
    """
    bare = "embedding" if _BARE.search(name) else "other"
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), bare)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d{1,18})", name)
    return tuple((1, int(p), "") if i % 2 else (0, 0, p) for i, p in enumerate(parts))


def find_embedding(names: Iterable[str]) -> str | None:
    """The name of the word-embedding matrix: `shared`, or the only tensor that looks like one.

    Example:
        >>> find_embedding(["bert.embeddings.word_embeddings.weight", "classifier.weight"])
        'bert.embeddings.word_embeddings.weight'
        >>> find_embedding(["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]) is None
        True
    """
    likely = likely_embeddings(names)
    return likely[0] if len(likely) == 1 else None


def likely_embeddings(names: Iterable[str]) -> list[str]:
    """All names that could be the word embedding's; more than one where nobody can tell.

    Args:
        names: Of a model's tensors.
    """
    found = [n for n in names if kind_of(n) == "embedding" and n.endswith("weight")]
    named = [n for n in found if not _BARE.search(n)]
    shared = [n for n in named if n.rpartition(".")[0].endswith("shared")]
    return shared or named or found
