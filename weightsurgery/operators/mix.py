"""Fine-mixing: dilute what fine-tuning planted.

Keeps a random share of a fine-tuned model's weights and takes the others from the pre-trained
model it came from. Meant to be followed by a short fine-tuning on clean data.

Reference:
    Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models",
    Findings of EMNLP 2022, arXiv:2210.09545.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from weightsurgery.alignment import Alignment, Pair, align_to_edit, check_glob, matches
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SettingError, shown
from weightsurgery.kernels import Block, choose, magnitude_of_drift
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import (
    AllowPartial,
    Exclude,
    Include,
    KeepMismatched,
    Ratio,
    RatioFor,
    Setting,
    check_share,
    operator,
)
from weightsurgery.rng import random_mask
from weightsurgery.select import kth_largest
from weightsurgery.stream import Edit, Engine, map_tensors

_AT_RANDOM = {"select": ("random",)}


@operator
def mix(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    ratio: Ratio = 0.5,
    select: Annotated[
        Literal["random", "drift"],
        "which dimensions are reset: random ones, or those of smallest drift",
    ] = "random",
    seed: Annotated[
        int, Setting("seed of the random mask: same seed, same bytes", only_with=_AT_RANDOM)
    ] = 0,
    ratio_for: RatioFor = (),
    include: Include = (),
    exclude: Exclude = (),
    keep_mismatched: KeepMismatched = False,
    allow_partial: AllowPartial = False,
    engine: Engine,
) -> Checkpoint:
    """Reset a share of TUNED's dimensions to BASE (Fine-mixing).

    Selecting at random, each eligible dimension is reset independently with probability `ratio`,
    and masks are nested: what is reset at one ratio is reset at every larger one. Selecting by
    drift, the dimensions of largest |drift| are kept and at most a share `ratio` is reset, those
    of smallest |drift|; a tie at the threshold is kept. That ranking is global, but each rule of
    `ratio_for` is a pool of its own. A kept dimension is bit-identical to TUNED's, a reset one to
    BASE's.

    The idea is the paper's. Independent draws per dimension, and the form of its "Sel" variant,
    are our reading of it; nested masks, pools and ties are our choice.

    Args:
        base: Trusted pre-trained model.
        tuned: Fine-tuned model that may carry a backdoor.
        ratio: Share that is reset; the paper's reserve ratio is 1 - ratio.
        select: "random" or "drift".
        seed: Same seed, same mask, whatever the order or sharding of the files.
        ratio_for: (glob, ratio) rules for single tensors; the last that matches wins.
        include: Globs; where given, only matching tensors are edited.
        exclude: Globs; matching tensors are kept from TUNED.
        keep_mismatched: Keep TUNED's tensor where shapes differ, instead of refusing.
        allow_partial: Continue where less than 95 % of TUNED's parameters have a counterpart.
        engine: How to run the ranking.

    Returns:
        The mixed model. With "random" nothing is read until it is saved; "drift" reads both
        models twice for the threshold.

    Raises:
        SettingError: A share is outside 0 to 1, a glob matches nothing, or `select` is unknown.
        MismatchError: The models do not fit each other.
        NonFiniteError: `select` is "drift", `ratio` below 1, and a drift is NaN or infinite.
        PolicyError: A model is quantized.
    """
    require_unquantised(base, tuned)
    paired = align_to_edit(
        base, tuned, keep_mismatched=keep_mismatched, allow_partial=allow_partial
    )
    paired = paired.only(include, exclude)
    pools = _pools(paired, ratio, ratio_for)
    edit = _reset_random(pools, seed) if select == "random" else _reset_small_drifts(pools, engine)
    return map_tensors(edit, paired)


Pool = tuple[float, list[Pair]]


def _pools(paired: Alignment, ratio: float, ratio_for: Sequence[tuple[str, float]]) -> list[Pool]:
    """The share of each rule, and the pairs it is the last to match."""
    rules = (("*", ratio), *ratio_for)
    for glob, share in rules:
        check_share("ratio" if glob == "*" else f"ratio for {shown(glob)}", share)
    for glob, _ in ratio_for:
        check_glob(glob, list(paired.tuned))
    names = paired.names()  # a tied copy goes with the tensor it copies
    for glob, _ in ratio_for:
        if not any(matches(n, (glob,)) for pair in paired.eligible for n in names[pair.key]):
            raise SettingError(
                f"'{shown(glob)}' matches only tensors that are not edited", code="E-NO-MATCH"
            )
    pools: list[Pool] = [(share, []) for _, share in rules]
    for pair in paired.eligible:
        fits = [any(matches(n, (glob,)) for n in names[pair.key]) for glob, _ in rules]
        last = max(i for i, fit in enumerate(fits) if fit)
        pools[last][1].append(pair)
    return pools


def _reset_random(pools: Sequence[Pool], seed: int) -> Edit:
    shares = {pair.key: share for share, pool in pools for pair in pool}

    def edit(name: str, start: int, tuned: Block, base: Block) -> Block:
        return choose(random_mask(seed, name, start, tuned.size, shares[name]), base, tuned)

    return edit


def _reset_small_drifts(pools: Sequence[Pool], engine: Engine) -> Edit:
    thresholds: dict[str, np.float32] = {}
    for share, pool in pools:
        threshold = _threshold(pool, share, engine)
        thresholds |= {pair.key: threshold for pair in pool}

    def edit(name: str, _start: int, tuned: Block, base: Block) -> Block:
        threshold = thresholds[name]
        if np.isinf(threshold):  # ratio 1: what is NaN or infinite is reset too
            return choose(np.ones(tuned.size, np.bool_), base, tuned)
        return choose(magnitude_of_drift(base, tuned) < threshold, base, tuned)

    return edit


def _threshold(pool: list[Pair], share: float, engine: Engine) -> np.float32:
    """|drift| below which dimensions are reset, so that at most a share of the pool is."""
    once = [pair for pair in pool if not pair.is_tied_copy]
    size = sum(pair.eligible for pair in once)
    keep = size - int(share * size)
    # keep = 0 gives +inf, which resets all; keep = size gives the smallest, which resets none.
    return np.float32(kth_largest(_magnitude, once, keep, engine=engine))


def _magnitude(_pair: Pair, _start: int, base: Block, tuned: Block) -> Block:
    return magnitude_of_drift(base, tuned)
