"""What a tensor's name tells: the layer it belongs to, the kind of module, the order to list."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|\.)(layers?|h|blocks?)\.(\d{1,9})(?:\.|$)")

# The first rule that matches decides. Rules look at the module path without the final
# .weight/.bias; they cover the BERT, RoBERTa, GPT-2, GPT-NeoX, Llama, Mixtral and T5 families.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)", re.IGNORECASE))
    for kind, pattern in (
        ("norm", r"\w*(?:layer_?norm|rms_?norm|norm)\w*|ln_\w+|norm"),
        ("embedding.position", r"position_embeddings|wpe|embed_positions"),
        ("embedding.token_type", r"token_type_embeddings"),
        ("embedding", r"word_embeddings|embed_tokens|wte|tok_embeddings|embed_in|shared"),
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
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d{1,18})", name)
    return tuple((1, int(p), "") if i % 2 else (0, 0, p) for i, p in enumerate(parts))


def find_embedding(names: Iterable[str]) -> str | None:
    """The name of the word-embedding matrix: `shared`, or the only tensor that looks like one."""
    found = [n for n in names if kind_of(n) == "embedding" and n.endswith("weight")]
    shared = [n for n in found if n.rpartition(".")[0].endswith("shared")]
    return next(iter(shared or found)) if len(shared or found) == 1 else None
