"""The methods written down as plainly as they can be: whole models at a time, no cleverness.

Nothing of the package is used here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATING = (np.dtype(np.float16), BF16, np.dtype("f4"), np.dtype("f8"))
_64 = (1 << 64) - 1


# --- the random numbers, one element at a time ------------------------------------------------


def key_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def random_number(key: int, index: int) -> int:
    """32 random bits for element `index`: half of a SplitMix64 output."""
    z = (key + (index // 2 + 1) * 0x9E3779B97F4A7C15) & _64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    z ^= z >> 31
    return z >> 32 if index % 2 else z & 0xFFFFFFFF


def mask(seed: int, name: str, size: int, share: float) -> Array:
    key = key_of(seed, name)
    bound = round(share * 2**32)
    return np.array([random_number(key, i) < bound for i in range(size)], np.bool_)


# --- dtypes -----------------------------------------------------------------------------------


def widened(array: Array) -> Array:
    """Stored values as float64, bfloat16 by its bits; F64 as it is."""
    if array.dtype == BF16:
        array = (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return array.astype(np.float64)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """float64 values rounded once, to nearest and ties to even."""
    if dtype != BF16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    return np.array([_to_bfloat16(float(v)) for v in values.ravel()], np.uint16).view(BF16)


def _to_bfloat16(value: float) -> int:
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    if math.isnan(value):
        return sign | 0x7FC0
    if math.isinf(value):
        return sign | 0x7F80
    mantissa, exponent = math.frexp(abs(value))
    step = max(exponent - 8, -133)  # of the last bit; that of denormals is fixed
    units = round(math.ldexp(mantissa, exponent - step))  # Python rounds ties to even
    whole = math.ldexp(units, step)
    if whole >= 2.0**128:
        return sign | 0x7F80
    return sign | int(np.float32(whole).view(np.uint32)) >> 16


# --- operators --------------------------------------------------------------------------------


def is_eligible(base: Arrays, name: str, tuned: Array) -> bool:
    other = base.get(name)
    if other is None or other.shape != tuned.shape or not tuned.size:
        return False
    return tuned.dtype in FLOATING and other.dtype in FLOATING


def edited(base: Arrays, tuned: Arrays, edit: Callable[[str, Array, Array], Array]) -> Arrays:
    return {
        name: edit(name, base[name].ravel(), t.ravel()).reshape(t.shape)
        if is_eligible(base, name, t)
        else t
        for name, t in tuned.items()
    }


def chosen(reset: Array, base: Array, tuned: Array) -> Array:
    """BASE's elements where `reset`, else TUNED's: the bytes themselves if the dtypes agree."""
    if base.dtype != tuned.dtype:
        base = rounded(widened(base), tuned.dtype)
    bits = f"u{tuned.dtype.itemsize}"
    return np.where(reset, base.view(bits), tuned.view(bits)).view(tuned.dtype)


def mix(base: Arrays, tuned: Arrays, *, ratio: float, seed: int = 0) -> Arrays:
    def edit(name: str, b: Array, t: Array) -> Array:
        return chosen(mask(seed, name, t.size, ratio), b, t)

    return edited(base, tuned, edit)


def arithmetic(base: Array, tuned: Array) -> type[np.floating[Any]]:
    """The type that drift and edits are computed in."""
    return np.float64 if np.dtype("f8") in (base.dtype, tuned.dtype) else np.float32


def magnitude(base: Array, tuned: Array) -> Array:
    """|drift| as the engine ranks it: taken in the arithmetic type, as float32."""
    wide = arithmetic(base, tuned)
    drift = widened(tuned).astype(wide) - widened(base).astype(wide)
    return np.abs(drift).astype(np.float32)


def mix_by_drift(base: Arrays, tuned: Arrays, *, ratio: float) -> Arrays:
    """Keep the largest drifts, with all that tie with the smallest kept one."""
    names = [n for n in tuned if is_eligible(base, n, tuned[n])]
    pool = np.concatenate([magnitude(base[n].ravel(), tuned[n].ravel()) for n in names])
    threshold = kth_largest(pool, pool.size - int(ratio * pool.size))

    def edit(_name: str, b: Array, t: Array) -> Array:
        return chosen(magnitude(b, t) < threshold, b, t)

    return edited(base, tuned, edit)


def interpolate(base: Arrays, tuned: Arrays, *, weight: float) -> Arrays:
    def edit(_name: str, b: Array, t: Array) -> Array:
        if weight in (0, 1):
            return t if weight == 1 else chosen(np.ones(t.size, np.bool_), b, t)
        wide = arithmetic(b, t)
        b, values = widened(b).astype(wide), widened(t).astype(wide)
        return rounded((b + wide(weight) * (values - b)).astype("f8"), t.dtype)

    return edited(base, tuned, edit)


def kth_largest(scores: Array, k: int) -> float:
    if k < 1:
        return math.inf
    return float(np.sort(scores)[::-1][k - 1]) if k <= scores.size else -math.inf


# --- adapters ---------------------------------------------------------------------------------


def truncated(drift: Array, rank: int) -> tuple[Array, float]:
    """The best matrix of a rank, and the norm of what it leaves: of the other singular values."""
    left, values, right = np.linalg.svd(drift.astype(np.float64), full_matrices=False)
    product = sum(values[k] * np.outer(left[:, k], right[k]) for k in range(min(rank, len(values))))
    return product, math.sqrt(sum(value**2 for value in values[rank:]))


def least_rank(drift: Array, share: float) -> int:
    """How many singular values it takes to have a share of the squared norm."""
    values = np.linalg.svd(drift.astype(np.float64), compute_uv=False)
    total, sum_ = sum(v**2 for v in values), 0.0
    for rank, value in enumerate(values, 1):
        sum_ += value**2
        if sum_ >= share * total:
            return rank
    return len(values)


# --- diff -------------------------------------------------------------------------------------


def statistics(base: Array, tuned: Array) -> dict[str, Any]:
    """What `diff` says of one tensor, with exact quantiles."""
    b, t = widened(base.ravel()), widened(tuned.ravel())
    with np.errstate(invalid="ignore", over="ignore"):
        wide = arithmetic(base, tuned)
        drift = (t.astype(wide) - b.astype(wide)).astype(np.float64)
    same = base.dtype == tuned.dtype
    changed = base.ravel().view(f"u{base.itemsize}") != tuned.ravel().view(f"u{tuned.itemsize}")
    finite = np.isfinite(drift)
    left = {
        "count": b.size,
        "changed": int((changed if same else ~((b == t) | (np.isnan(b) & np.isnan(t)))).sum()),
        "base_nan": int(np.isnan(b).sum()),
        "base_inf": int(np.isinf(b).sum()),
        "tuned_nan": int(np.isnan(t).sum()),
        "tuned_inf": int(np.isinf(t).sum()),
        "skipped": int((~finite).sum()),
    }
    return left | sums(b[finite], t[finite], drift[finite])


def sums(b: Array, t: Array, drift: Array) -> dict[str, Any]:
    norms = math.sqrt(b @ b) * math.sqrt(t @ t)
    sizes = np.sort(np.abs(drift))
    ranks = {q: max(1, math.ceil(q * drift.size)) for q in (0.5, 0.9, 0.99, 0.999)}
    return {
        "l2": math.sqrt(drift @ drift),
        "relative_l2": math.sqrt(drift @ drift) / math.sqrt(b @ b) if b.any() else None,
        "max_abs": float(sizes[-1]) if sizes.size else 0.0,
        "mean": float(drift.mean()) if drift.size else 0.0,
        "std": float(drift.std()) if drift.size else 0.0,
        "cosine": float(b @ t) / norms if norms else None,
        "sign_flips": int((np.sign(b) * np.sign(t) < 0).sum()),
        **{f"q{q * 100:g}": float(sizes[r - 1]) if sizes.size else 0.0 for q, r in ranks.items()},
    }


def largest(values: dict[str, Array], count: int) -> list[tuple[str, int]]:
    """Places of the largest positive values: by value, then tensor name, then index."""
    ranked = sorted((-float(v), name, i) for name in values for i, v in enumerate(values[name]))
    return [(name, i) for value, name, i in ranked if value < 0][:count]


# --- purify and epur --------------------------------------------------------------------------


def curvature_score(base: Array, tuned: Array, fisher: Array, epsilon: float) -> Array:
    """r = δ²/(H + ε) in float64, rounded to float32; 0 where δ is 0."""
    kind = arithmetic(base, tuned)
    d = (widened(tuned).astype(kind) - widened(base).astype(kind)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.minimum(d * d / (fisher.astype(np.float64) + epsilon), np.finfo(np.float32).max)
    return np.where(d == 0, 0, r).astype(np.float32)


def purify(
    base: Arrays, tuned: Arrays, fisher: Arrays, *, ratio: float, epsilon: float, skip: str = ""
) -> Arrays:
    """Whole-model sort; `skip` is the word embedding, which is left alone."""
    names = [n for n, t in tuned.items() if is_eligible(base, n, t) and n != skip]
    sizes = sum(tuned[n].size for n in names)
    scale = epsilon * sum(fisher[n].astype(np.float64).sum() for n in names) / sizes
    scores = {n: curvature_score(base[n], tuned[n], fisher[n], scale) for n in names}
    whole = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[::-1]
    k = int(ratio * sizes)
    reset = {n: s > whole[k] if k < sizes else np.ones(s.shape, bool) for n, s in scores.items()}
    return {n: chosen(reset[n], base[n], t) if n in reset else t for n, t in tuned.items()}


def epur_rows(
    base: Array, tuned: Array, counts: list[float], *, top: int, clamp: float, special: set[int]
) -> list[int]:
    """Rows by ‖δ_i‖ / log(max(f_i, clamp)), highest first."""
    found = []
    for i, (b, t) in enumerate(zip(base, tuned, strict=False)):
        norm = math.sqrt(sum((float(y) - float(x)) ** 2 for x, y in zip(b, t, strict=True)))
        if i not in special and norm > 0:
            found.append((-norm / math.log(max(counts[i], clamp)), i))
    return [i for _, i in sorted(found)[:top]]


# --- causal language models -------------------------------------------------------------------


def residuals(before: Array, expected: Array, after: Array, half: float, least: float) -> Array:
    """Sums over one tensor of a merge: `low_rank_kernel.residual_sums`."""
    b, e, a = (block.astype(np.float64) for block in (before, expected, after))
    change, actual, left = e - b, a - b, np.abs(a - e)
    allowed = room(before, expected, half, least)
    sums = [np.sum(x) for x in (change**2, actual**2, change * actual, left**2, allowed**2)]
    worst = np.max(left / allowed) if np.isfinite(sums).all() else np.nan
    return np.array([*sums, worst, np.sum(a != b)])


def room(before: Array, after: Array, half: float, least: float) -> Array:
    """What rounding may leave of each element: the sum's, the change's, and another order's."""
    b, a = before.astype(np.float64), after.astype(np.float64)
    change = np.abs(a - b)
    order = 2.0**-22 if before.dtype == np.float32 else 2.0**-51
    floor = least + 2.0**-20 * change.max()
    found: Array = half * (np.abs(a) + change) + order * (np.abs(b) + np.abs(a)) + floor
    return found


def greedy(module: Any, ids: list[int], *, new: int, ends: set[int]) -> list[int]:
    """The likeliest next token, again and again: one prompt, everything computed anew each time."""
    import torch

    said: list[int] = []
    while len(said) < new:
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids + said]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


def perplexity(module: Any, ids: list[int], *, window: int, stride: int) -> tuple[float, int]:
    """Perplexity, and how many tokens were scored: token by token, each in its first window."""
    import torch

    losses = []
    for place in range(1, len(ids)):
        start = 0
        while start + window < place:
            start += stride
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids[start:place]]), use_cache=False).logits
        scores = logits[0, -1].double().numpy()
        losses.append(float(np.log(np.exp(scores).sum()) - scores[ids[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)
