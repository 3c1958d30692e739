"""Find out whether padding changes a model's answers, by running two short texts.

Recurrent models that have no attention mask (RWKV) carry padding in their state, and models of
absolute positions shift. So this is measured when the model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsurgery.tasks import CLASSIFICATION

if TYPE_CHECKING:
    import torch

SIDES = ("right", "left")
_SHORT, _LONG = "a", "the name of this is not what you are and who is it"
_NEW = 3  # tokens generated
_TOLERANCE = 1e-3  # of the largest logit: rounding is far below, padding far above


def padding_sides(module: Any, tokenizer: Any, task: str) -> tuple[str, ...]:
    """The sides on which padding leaves a model's answers as they are.

    For a classifier and for a causal model's loss ("right") logits are compared, for generation
    ("left") the scores of the next tokens.

    Args:
        module: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        task: Its task.

    Returns:
        Some of `SIDES`; () where every text must be run alone.
    """
    if _depends_on_length(module):
        return ()
    return tuple(side for side in SIDES if _is_unchanged(module, tokenizer, task, side))


def keep_attention_mode(module: Any) -> None:
    """Let a model that changes its attention for short texts begin each text as configured.

    BigBird's block-sparse attention gives way to full attention at the first short text, for all
    texts that follow.
    """

    def restore(inner: Any, *_: Any) -> None:
        inner.set_attention_type(inner.config.attention_type)

    for inner in module.modules():
        if hasattr(inner, "set_attention_type") and hasattr(inner, "encoder"):
            inner.register_forward_pre_hook(restore)


def _depends_on_length(module: Any) -> bool:
    """True for block-sparse attention, which a batch's longest text decides on for all."""
    return getattr(module.config, "attention_type", None) == "block_sparse"


def _is_unchanged(module: Any, tokenizer: Any, task: str, side: str) -> bool:
    import torch

    score = _scores if side == "left" and task != CLASSIFICATION else _logits
    try:
        short, long = (list(tokenizer(text)["input_ids"]) for text in (_SHORT, _LONG))
        if not 0 < len(short) < len(long):
            return True
        pads = [tokenizer.pad_token_id, getattr(module.config, "pad_token_id", None)]
        if task == CLASSIFICATION:  # as in `padding_of`: the model looks for its own
            pads.reverse()
        pad = next((one for one in pads if one is not None), 0)
        fill, ones = [pad] * (len(long) - len(short)), [1] * len(short)
        padded = [*short, *fill] if side == "right" else [*fill, *short]
        mask = [*ones, *[0] * len(fill)] if side == "right" else [*[0] * len(fill), *ones]
        with torch.inference_mode():
            alone = score(module, [short], [ones])[0]
            found = score(module, [padded, long], [mask, [1] * len(long)])[0]
    except Exception:  # a model that cannot run these texts fails again, clearly, where it is used
        return True
    if alone.shape != found.shape:  # logits of every token
        found = found[: len(short)] if side == "right" else found[-len(short) :]
    size = float(alone.nan_to_num(0, 0, 0).abs().max())
    return bool(
        torch.allclose(alone, found, rtol=0, atol=_TOLERANCE * size + 1e-12, equal_nan=True)
    )


def _logits(module: Any, ids: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
    import torch

    device = next(iter(module.parameters())).device
    given = {"input_ids": ids, "attention_mask": mask}
    logits: torch.Tensor = module(
        **{name: torch.tensor(value, device=device) for name, value in given.items()}
    ).logits
    return logits.float()


def _scores(module: Any, ids: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
    """Scores of the first new tokens, shape (texts, tokens, vocabulary)."""
    import torch
    from transformers import GenerationConfig

    device = next(iter(module.parameters())).device
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    before = module.generation_config
    module.generation_config = config
    try:
        found = module.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
        )
    finally:
        module.generation_config = before
    return torch.stack(found.scores, 1).float()
