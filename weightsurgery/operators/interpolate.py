"""Linear interpolation between two models, weight by weight.

Reference:
    Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022,
    arXiv:2109.01903, equation 1.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from weightsurgery.alignment import align_to_edit
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.kernels import Block, same_float, to_dtype, to_float
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import (
    AllowNonfinite,
    AllowPartial,
    Exclude,
    Include,
    KeepMismatched,
    check_share,
    operator,
)
from weightsurgery.stream import map_tensors


@operator
def interpolate(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    weight: Annotated[float, "weight of TUNED, 0 to 1; BASE has the rest"] = 0.5,
    include: Include = (),
    exclude: Exclude = (),
    keep_mismatched: KeepMismatched = False,
    allow_partial: AllowPartial = False,
    allow_nonfinite: AllowNonfinite = False,
) -> Checkpoint:
    """Interpolate linearly between BASE and TUNED (WiSE-FT).

    Each eligible dimension becomes (1 - weight)·base + weight·tuned, computed in float32 (float64
    for F64) and rounded once to TUNED's dtype. Weight 0 is BASE and weight 1 is TUNED, bit for
    bit.

    Args:
        base: Pre-trained model.
        tuned: Fine-tuned model.
        weight: The mixing coefficient, α in the paper.
        include: Globs; where given, only matching tensors are edited.
        exclude: Globs; matching tensors are kept from TUNED.
        keep_mismatched: Keep TUNED's tensor where shapes differ, instead of refusing.
        allow_partial: Continue where less than 95 % of TUNED's parameters have a counterpart.
        allow_nonfinite: Let NaN and infinity pass instead of refusing them.

    Returns:
        The interpolated model; nothing is read until it is saved.

    Raises:
        SettingError: `weight` is outside 0 to 1, or a glob matches nothing.
        MismatchError: The models do not fit each other.
        PolicyError: A model is quantized.
    """
    check_share("weight", weight)
    require_unquantised(base, tuned)

    def edit(_name: str, _start: int, tuned: Block, base: Block) -> Block:
        if weight == 1:  # the formula would lose the sign of -0.0
            return tuned
        if weight == 0:
            return to_dtype(to_float(base), tuned.dtype) if base.dtype != tuned.dtype else base
        w, (b, t) = weight, same_float(base, tuned)
        with np.errstate(invalid="ignore"):  # inf - inf, where that is allowed, is NaN
            return to_dtype(b + w * (t - b), tuned.dtype)

    paired = align_to_edit(
        base, tuned, keep_mismatched=keep_mismatched, allow_partial=allow_partial
    )
    return map_tensors(
        edit, paired.only(include, exclude), arithmetic=True, allow_nonfinite=allow_nonfinite
    )
