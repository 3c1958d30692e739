"""A checkpoint as safetensors, in another floating dtype if asked.

transformers keeps some parameters in float32 whatever dtype a model is loaded in: routers' biases,
whose last bits choose the experts, or matrices that overflow in F16. They stay as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from weightsurgery.alignment import Pair, check_glob, matches
from weightsurgery.architecture.canonical import read_names
from weightsurgery.architecture.composite import find_architecture
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.dtypes import DTYPES, DType
from weightsurgery.errors import NonFiniteError, counted, first_few, shown
from weightsurgery.formats.config import with_dtype
from weightsurgery.formats.layout import joined
from weightsurgery.kernels import Block, to_dtype, to_float
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import Setting, operator
from weightsurgery.stream import Engine, fold

_CONFIGURED = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_AllowOverflow = Annotated[
    bool,
    Setting(
        "let numbers become infinite that the new dtype cannot hold",
        only_with={"dtype": tuple(_CONFIGURED)},
    ),
]
_Exclude = Annotated[
    tuple[str, ...],
    Setting(
        "do not convert tensors whose name matches GLOB",
        metavar="GLOB",
        only_with={"dtype": tuple(_CONFIGURED)},
    ),
]
_ROUTER_BIAS = "e_score_correction_bias"  # kept by every model that transformers knows to have it
_TOLD = 5  # tensors named in a message


@operator
def convert(
    checkpoint: Checkpoint,
    *,
    dtype: Annotated[
        Literal["keep", "bf16", "f16", "f32"], "what floating tensors are stored as"
    ] = "keep",
    exclude: _Exclude = (),
    allow_nonfinite: _AllowOverflow = False,
    engine: Engine,
) -> Checkpoint:
    """Turn a checkpoint into safetensors, in another dtype if asked.

    Tensors of F16, BF16, F32 and F64 are rounded once, to nearest with ties to even; integers,
    booleans and all others are copied unchanged. NaN and infinity are preserved. The dtype in
    config.json, of the model and of each of its parts, is changed with them. With bf16 and f16,
    tensors that transformers keeps in float32 stay as they are stored, and are reported.

    Args:
        checkpoint: What to convert.
        dtype: "bf16", "f16" or "f32"; "keep" changes no tensor.
        exclude: Globs; matching tensors stay as they are stored.
        allow_nonfinite: Let finite numbers become infinite that are too large for the new dtype,
            and report them.
        engine: Workers and progress for the pass that looks for such numbers; it reads only
            tensors that can hold one.

    Returns:
        The converted checkpoint; where `dtype` is "keep" nothing is read until it is saved.

    Raises:
        NonFiniteError: A finite number would become infinite; says how many in which tensors.
        PolicyError: `dtype` is given and the model is quantized.
        SettingError: A glob of `exclude` matches no tensor.
    """
    for glob in exclude:
        check_glob(glob, list(checkpoint))
    if dtype == "keep":
        return checkpoint
    require_unquantised(checkpoint)
    target = DTYPES[dtype.upper()]
    changed = {n: v for n, v in checkpoint.items() if v.dtype.arithmetic and v.dtype != target}
    kept = _kept(changed, exclude, _in_float32(checkpoint, dtype))
    changed = {n: v for n, v in changed.items() if n not in kept}
    overflow = _overflow(changed, target, engine)
    told = _described(overflow, changed, target)
    if overflow and not allow_nonfinite:
        raise NonFiniteError(
            told,
            file=checkpoint.label,
            hint="choose a wider dtype, or pass --allow-nonfinite",
            code="E-OVERFLOW-DTYPE",
        )
    converted = {n: _rounded(v, target) if n in changed else v for n, v in checkpoint.items()}
    result = replace(
        checkpoint,
        tensors=converted,
        warnings=(*checkpoint.warnings, *_kept_warnings(kept), *([told] if overflow else [])),
        notes={"convert": {"overflow": overflow, "kept": kept}},
    )
    return with_dtype(result, _CONFIGURED[dtype])


def _in_float32(checkpoint: Checkpoint, dtype: str) -> Collection[str]:
    """The tensors that transformers keeps in float32 where another dtype is requested.

    `_keep_in_fp32_modules` counts for F16 alone, `_keep_in_fp32_modules_strict` for BF16 too. Each
    is a regular expression that is searched in the model's name, with `*` for `.*`.
    """
    if dtype == "f32":
        return ()
    found = set()
    for folder, part in checkpoint.split().items():
        facts = find_architecture(part.config)
        modules = [_ROUTER_BIAS]
        if facts is not None:
            modules += [*facts.float32_strict, *(facts.float32 if dtype == "f16" else ())]
        pattern = re.compile("|".join(module.replace("*", ".*") for module in modules))
        places = read_names(part, facts).places.items()
        found |= {joined(folder, n) for n, place in places if pattern.search(place.model_name)}
    return found


def _kept(
    views: Mapping[str, TensorView], exclude: tuple[str, ...], float32: Collection[str]
) -> dict[str, str]:
    """The tensors that stay as they are stored, each with the reason."""
    found = {}
    for name in views:
        if matches(name, exclude):
            found[name] = "excluded"
        elif name in float32:
            found[name] = "float32 in transformers"
    return found


def _kept_warnings(kept: Mapping[str, str]) -> list[str]:
    names = [f"'{shown(name)}'" for name, reason in kept.items() if reason != "excluded"]
    if not names:
        return []
    what = "as stored because transformers keeps them in float32"
    return [f"kept {counted(len(names), 'tensor')} {what}: {first_few(names)}"]


def _rounded(view: TensorView, target: DType) -> TensorView:
    def read_both(start: int, stop: int) -> tuple[Block, Block]:
        stored, block = view.read_both(start, stop)
        return stored, _round(block, target)

    return TensorView(view.name, view.shape, target, read_both, "edited")


def _round(block: Block, target: DType) -> Block:
    return to_dtype(to_float(block), target.numpy)


def _overflow(views: dict[str, TensorView], target: DType, engine: Engine) -> dict[str, int]:
    """How many finite numbers of each tensor become infinite; tensors without any are not there."""
    pairs = [Pair(v, None, v.size, key=n) for n, v in views.items() if _may_overflow(v, target)]

    def step(_pair: Pair, _start: int, block: Block, _same: Block) -> int:
        result = to_float(_round(block, target))
        return int(np.count_nonzero(np.isinf(result)) - np.count_nonzero(np.isinf(to_float(block))))

    def combine(state: dict[str, int], pair: Pair, _start: int, count: int) -> dict[str, int]:
        return {**state, pair.name: state.get(pair.name, 0) + count} if count else state

    found: dict[str, int] = {}
    return fold(step, combine, found, pairs, engine=engine, what="looking for overflow")


def _may_overflow(view: TensorView, target: DType) -> bool:
    wide = {"F16": 0, "BF16": 1, "F32": 2, "F64": 3}  # BF16 holds less than F32 at the very end
    return wide[view.dtype.name] > wide[target.name]


def _described(overflow: dict[str, int], views: dict[str, TensorView], target: DType) -> str:
    """One line of which tensors have how many of them."""
    several = [
        f"'{shown(name)}' ({count:,} of {views[name].size:,})" for name, count in overflow.items()
    ]
    more = f" and {counted(len(several) - _TOLD, 'more tensor')}" if len(several) > _TOLD else ""
    total = sum(overflow.values())
    are, become = ("is", "becomes") if total == 1 else ("are", "become")
    return (
        f"{counted(total, 'finite number')} {are} too large for {target.name} and {become} "
        f"infinite: {', '.join(several[:_TOLD])}{more}"
    )
