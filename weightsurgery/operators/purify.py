"""Fine-purifying: reset the dimensions that drifted further than their curvature explains.

Over fine-tuning a dimension's drift spreads like a diffusion, with a variance in proportion to the
loss's curvature in it. Where the drift is large against the curvature on clean data, something
else has moved it. Meant to be followed by a short fine-tuning on clean data.

Reference:
    Zhang et al., "Diffusion Theory as a Scalpel: Detecting and Purifying Poisonous Dimensions in
    Pre-trained Language Models Caused by Backdoor or Bias", Findings of ACL 2023,
    arXiv:2305.04547.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np

from weightsurgery.alignment import Alignment, Pair, align, align_to_edit
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.curvature.result import length_warnings
from weightsurgery.diagnostics import Diagnostics
from weightsurgery.errors import MismatchError, SettingError, conflict, counted
from weightsurgery.kernels import Block, choose, magnitude_of_drift
from weightsurgery.masks import edit_by_mask, read_mask
from weightsurgery.operators.epur import Rows, embedding_pair, reset_rows, score_rows
from weightsurgery.parts import advice_on_parts
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import (
    AllowPartial,
    Exclude,
    Include,
    KeepMismatched,
    Setting,
    check_share,
    operator,
)
from weightsurgery.rng import random_bits
from weightsurgery.score_kernel import fisher_score, inverse_score, sum_of_curvature
from weightsurgery.select import Score, kth_largest
from weightsurgery.stream import Edit, Engine, fold, map_tensors
from weightsurgery.token_counts import TokenCounts

Scores = Literal["fisher", "drift", "inverse-fisher", "random"]
Embeddings = Literal["keep", "pool", "epur", "reset"]

_REMEDY = "make it for this model: wsurg fisher TUNED --data CLEAN -o fisher.safetensors"

# The settings, and beside which values of others they count.
_RANKED = {"from_mask": (False,)}
_BY_CURVATURE = {**_RANKED, "score": ("fisher", "inverse-fisher")}
_AT_RANDOM = {**_RANKED, "score": ("random",)}
_APART = {**_RANKED, "embeddings": ("keep", "epur", "reset")}
_BY_EPUR = {**_RANKED, "embeddings": ("epur",)}


def _only(text: str, only_with: Mapping[str, tuple[Any, ...]], complement: str = "") -> Setting:
    return Setting(text, complement, only_with=only_with)


Fisher = Annotated[
    Checkpoint | None, _only("diagonal of the curvature, from `wsurg fisher`", _BY_CURVATURE)
]
Ratio = Annotated[
    float, _only("share of the ranked dimensions that is reset, 0 to 1", _RANKED, "reserve")
]
RankedBy = Annotated[Scores, _only("what dimensions are ranked by", _RANKED)]
Treatment = Annotated[Embeddings, _only("what becomes of the word embeddings", _RANKED)]
Embedding = Annotated[
    str, _only("name of the word-embedding matrix; found by itself if empty", _APART)
]
Scope = Annotated[
    Literal["global", "tensor"], _only("rank over the whole model, or in each tensor", _RANKED)
]
Epsilon = Annotated[
    float, _only("added to the curvature, as a multiple of its mean", _BY_CURVATURE)
]
Seed = Annotated[int, _only("seed of --finetune, and of the random scores", _AT_RANDOM)]
Counts = Annotated[TokenCounts | None, _only("token counts, for embeddings=epur", _BY_EPUR)]
Top = Annotated[int, _only("rows of highest score that are reset to BASE", _BY_EPUR)]
Clamp = Annotated[float, _only("counts below this count as this, above 1", _BY_EPUR)]
FromMask = Annotated[Checkpoint | None, "reset what this mask has set; nothing is ranked"]
Invert = Annotated[bool, _only("reset what the mask does not have set", {"from_mask": (True,)})]


@operator
def purify(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    fisher: Fisher = None,
    ratio: Ratio = 0.3,
    score: RankedBy = "fisher",
    embeddings: Treatment = "keep",
    embedding: Embedding = "",
    scope: Scope = "global",
    epsilon: Epsilon = 1e-8,
    seed: Seed = 0,
    counts: Counts = None,
    top: Top = 200,
    clamp: Clamp = 20.0,
    from_mask: FromMask = None,
    invert: Invert = False,
    include: Include = (),
    exclude: Exclude = (),
    keep_mismatched: KeepMismatched = False,
    allow_partial: AllowPartial = False,
    engine: Engine,
) -> Checkpoint:
    """Reset the dimensions that drifted most for their curvature (Fine-purifying).

    Dimensions are ranked by r = δ²/(H + ε), δ the drift and H the diagonal of the curvature on
    clean data, and at most a share `ratio` of them, those of largest r, become BASE's, bit for
    bit; ties at the threshold are kept. `drift` ranks by δ² alone, `inverse-fisher` by 1/(H + ε)
    where something drifted, `random` not at all.

    Most rows of a word embedding never occur in a handful of examples: their curvature is 0, and
    a global ranking would spend itself on them. So they are kept out of it, unless `embeddings` is
    `pool`; `reset` gives them BASE's rows, `epur` those rows that E-PUR chooses.

    Ranking by drift against curvature is the paper's. ε, the embeddings' treatment, ties, scopes
    and the other scores are our choice.

    Args:
        base: Trusted pre-trained model.
        tuned: Fine-tuned model that may carry a backdoor or a bias.
        fisher: H, float32, under TUNED's names; needed for `fisher` and `inverse-fisher`.
        ratio: Share of the ranked dimensions that is reset; the paper's reserve ratio is 1 - ratio.
        score: "fisher", "drift", "inverse-fisher" or "random".
        embeddings: "keep", "pool", "epur" or "reset".
        embedding: TUNED's name for the word embedding, where it cannot be found.
        scope: "global" or "tensor".
        epsilon: ε over the mean of H in the ranked dimensions.
        seed: Of the random score.
        counts: Token counts, for `epur`.
        top: Rows that `epur` resets.
        clamp: Smallest count that makes a difference to `epur`.
        from_mask: A mask, from `changed_mask`; takes the ranking's place.
        invert: Whether the mask tells what to keep.
        include: Globs; where given, only matching tensors are edited.
        exclude: Globs; matching tensors are kept from TUNED.
        keep_mismatched: Keep TUNED's tensor where shapes differ, instead of refusing.
        allow_partial: Continue where less than 95 % of TUNED's parameters have a counterpart.
        engine: How to run the ranking; one that keeps results computes the scores once for any
            number of ratios.

    Returns:
        The purified model. The fisher is read once for ε, and everything twice for the threshold.
        Its notes hold threshold, ε and the diagnostics of each tensor (at ratio 1, where nothing
        has to be ranked, none).

    Raises:
        SettingError: A setting is out of range, or one that is needed is missing.
        MismatchError: The models, the fisher or the mask do not fit each other; with `epur`, there
            is no vocabulary beside TUNED, or none of its tokens has a count.
        NonFiniteError: A score is NaN or infinite.
        PolicyError: A model is quantized.
    """
    require_unquantised(base, tuned)
    paired = align_to_edit(
        base, tuned, keep_mismatched=keep_mismatched, allow_partial=allow_partial
    )
    paired = paired.only(include, exclude)
    if from_mask is not None:
        flags = read_mask(from_mask, tuned)
        edit = edit_by_mask(flags, paired.pairs, invert=invert)
        # What the mask's maker left alone is left out here too, or the share is one of more.
        return map_tensors(edit, paired if invert else paired.keeping(flags, "not in the mask"))
    if invert:
        raise conflict("invert is for a mask", "give from_mask too")
    check(paired, ratio, epsilon, embeddings, embedding, counts)
    word = _word_embedding(paired, embeddings, embedding)
    once = [p for p in paired.eligible if p.key not in word and not p.is_tied_copy]
    rows = _rows(paired, word, embeddings, counts, tuned, top=top, clamp=clamp, engine=engine)
    curvature = _curvature(fisher, paired, once, score)
    origin = (base, tuned, fisher, *(p.key for p in once))  # what scores depend on, but settings
    mean = engine.once((*origin, "mean"), lambda: _mean(curvature, once, engine))
    scale = epsilon * mean
    raw = _score(score, curvature, scale, seed)
    kept = engine.keeping((*origin, score, scale, seed), raw)
    ranking = _Ranking(kept, once, score == "fisher", engine)
    thresholds, found = ranking.thresholds(ratio, scope)
    edit = reset_rows(rows, _reset_above(kept, thresholds, paired))
    edited = [p.name for p in paired.eligible if p.key in thresholds or p.key in rows]
    result = map_tensors(edit, paired.keeping(edited, f"word embedding ({embeddings})"))
    listed = [chosen.to_json() for chosen in rows.values() if embeddings == "epur"]
    notes = {"purify": {"epsilon": scale, **found}, **({"epur": listed[0]} if listed else {})}
    warnings = [*result.warnings, *(w for chosen in rows.values() for w in chosen.warnings)]
    warnings += length_warnings(fisher)
    if embeddings == "keep" and not word:
        text = "no word embedding was recognized, so everything is ranked"
        warnings.append(f"{text}; name it with --embedding")
    return replace(result, notes={**result.notes, **notes}, warnings=tuple(warnings))


def check(
    paired: Alignment,
    ratio: float,
    epsilon: float,
    embeddings: str,
    embedding: str,
    counts: TokenCounts | None,
) -> None:
    """Refuse what can be refused without the curvature, which may take long to estimate.

    Args:
        paired: BASE and TUNED, restricted to what may be edited.
        ratio: As for `purify`.
        epsilon: As for `purify`.
        embeddings: As for `purify`.
        embedding: As for `purify`.
        counts: As for `purify`.

    Raises:
        SettingError: A setting is out of range, or one that is needed is missing.
    """
    check_share("ratio", ratio)
    if not 0 <= epsilon < np.inf:
        raise SettingError(f"epsilon is {epsilon:g}; expected 0 or more")
    word = _word_embedding(paired, embeddings, embedding)
    if all(pair.key in word for pair in paired.eligible):
        hint = "embeddings=pool ranks the embeddings"
        raise SettingError("there is nothing to rank", hint=hint, code="E-NOTHING-TO-DO")
    if embeddings == "epur" and counts is None:
        raise conflict("embeddings=epur needs token counts", "give counts, a corpus or wordfreq")


def _word_embedding(paired: Alignment, embeddings: str, embedding: str) -> tuple[str, ...]:
    """The key of the word embedding, unless it is ranked like everything else."""
    if embeddings == "pool":
        return ()
    if embedding:
        return (embedding_pair(paired, embedding).key,)
    name = find_embedding(paired.tuned)
    found = [p.key for p in paired.eligible if p.name == name]
    if not found and embeddings in ("epur", "reset"):
        raise SettingError(
            f"embeddings is '{embeddings}', but no word embedding is found that may be edited",
            hint="name it: --embedding NAME",
            code="E-EMBEDDING-NAME",
        )
    return tuple(found)


def _curvature(
    fisher: Checkpoint | None, paired: Alignment, ranked: Sequence[Pair], score: str
) -> dict[str, TensorView]:
    """H for each ranked tensor's key; {} for a score that does without.

    Raises:
        SettingError: There is no fisher.
        MismatchError: A tensor is missing in it, or has another shape or dtype.
    """
    if score not in ("fisher", "inverse-fisher"):
        return {}
    if fisher is None:
        hint = "give --fisher, from `wsurg fisher`, or clean --data, or choose --score drift"
        raise conflict(f"the score '{score}' needs the curvature", hint)
    try:
        aligned = {p.name: p.base for p in align(fisher, paired.tuned, mismatched="keep").pairs}
    except MismatchError as error:
        reason = "the fisher is of another model: no tensor in it is one of TUNED's"
        raise MismatchError(reason, file=fisher.label, hint=_REMEDY, code="E-FISHER") from error
    if fisher.metadata.get("estimator") == "fisher-standard-error":
        reason = "this is the fisher's standard error, not the fisher"
        raise MismatchError(reason, file=fisher.label, code="E-FISHER")
    same = paired.names()
    found: dict[str, TensorView] = {}
    wrong = []
    for pair in ranked:
        views = [aligned.get(name) for name in same[pair.key]]
        view = next((v for v in views if v is not None and v.shape == pair.tuned.shape), None)
        if view is None or view.dtype.name not in ("F32", "F64"):
            wrong.append(pair.name)
        else:
            found[pair.key] = view
    if wrong:
        raise MismatchError(
            f"the fisher does not fit: it lacks {counted(len(wrong), 'tensor')}, or has another "
            f"shape or a dtype other than F32 there (first: {', '.join(wrong[:3])})",
            file=fisher.label,
            tensor=wrong[0],
            hint=advice_on_parts(wrong, paired.tuned) or _REMEDY,
            code="E-FISHER",
        )
    return found


def _mean(curvature: Mapping[str, TensorView], ranked: Sequence[Pair], engine: Engine) -> float:
    """Mean of H over the ranked dimensions.

    Raises:
        MismatchError: H is negative, NaN or infinite somewhere, or zero everywhere.
    """
    if not curvature:
        return 0.0
    whole = [Pair(curvature[p.key], None, p.eligible, key=p.key) for p in ranked]

    def step(pair: Pair, _start: int, _base: Block, fisher: Block) -> float:
        total, bad = sum_of_curvature(fisher)
        if bad:
            raise MismatchError(
                f"{counted(bad, 'element')} of the fisher negative, NaN or infinite",
                tensor=pair.name,
                hint=_REMEDY,
                code="E-FISHER-VALUES",
            )
        return total

    total = fold(step, lambda s, _p, _i, x: s + x, 0.0, whole, engine=engine, what="curvature")
    if not total:
        reason = "the fisher is zero everywhere: it says nothing about this model"
        raise MismatchError(reason, code="E-FISHER-VALUES")
    return total / sum(pair.eligible for pair in ranked)


def _score(kind: str, curvature: Mapping[str, TensorView], epsilon: float, seed: int) -> Score:
    def score(pair: Pair, start: int, base: Block, tuned: Block) -> Block:
        if kind == "drift":
            return magnitude_of_drift(base, tuned)  # ranks like its square
        if kind == "random":
            numbers = random_bits(seed, pair.key, start, tuned.size) >> np.uint32(8)
            return numbers.astype(np.float32)
        by = fisher_score if kind == "fisher" else inverse_score
        return by(base, tuned, curvature[pair.key].read(start, start + tuned.size), epsilon)

    return score


@dataclass(frozen=True)
class _Ranking:
    """What is ranked, and how.

    Attributes:
        score: Gives a block's scores.
        pairs: The ranked tensors, tied ones once.
        diagnosed: Whether the scores should follow a law.
        engine: How to run the passes.
    """

    score: Score
    pairs: Sequence[Pair]
    diagnosed: bool
    engine: Engine

    def thresholds(self, ratio: float, scope: str) -> tuple[dict[str, float], dict[str, Any]]:
        """For each key the score above which dimensions are reset, and what the record says."""
        pools = [list(self.pairs)] if scope == "global" else [[pair] for pair in self.pairs]
        diagnostics = Diagnostics() if self.diagnosed and ratio < 1 else None
        found: dict[str, float] = {}
        for pool in pools:
            k = int(ratio * sum(pair.eligible for pair in pool))
            observe = diagnostics.observe if diagnostics else None
            # Strictly above the next one: ties at it, often zeros, would exceed the share.
            threshold = kth_largest(self.score, pool, k + 1, engine=self.engine, observe=observe)
            found |= {pair.key: threshold for pair in pool}
        notes: dict[str, Any] = {"ranked_dimensions": sum(pair.eligible for pair in self.pairs)}
        if scope == "global":
            first = next(iter(found.values()))
            notes["threshold"] = first if np.isfinite(first) else None
        if diagnostics is not None:
            notes["diagnostics"] = diagnostics.finish()
        return found, notes


def _reset_above(score: Score, thresholds: Mapping[str, float], paired: Alignment) -> Edit:
    pairs = {p.key: p for p in paired.eligible if not p.is_tied_copy}

    def edit(name: str, start: int, tuned: Block, base: Block) -> Block:
        threshold = thresholds[name]
        if threshold == -np.inf:  # ratio 1: what is NaN or infinite is reset too
            return choose(np.ones(tuned.size, np.bool_), base, tuned)
        return choose(score(pairs[name], start, base, tuned) > threshold, base, tuned)

    return edit


def _rows(
    paired: Alignment,
    word: Sequence[str],
    embeddings: str,
    counts: TokenCounts | None,
    tuned: Checkpoint,
    *,
    top: int,
    clamp: float,
    engine: Engine,
) -> dict[str, Rows]:
    """Rows of the word embedding that are reset, by its key; {} if none are."""
    if embeddings in ("keep", "pool"):
        return {}
    pair = next(p for p in paired.pairs if p.name == word[0])
    if embeddings == "reset":
        return {pair.key: Rows(pair.tuned.width, np.ones(pair.tuned.shape[0], np.bool_), [])}
    if counts is None:
        raise ValueError("checked before")
    return {pair.key: score_rows(pair, tuned, counts, top=top, clamp=clamp, engine=engine)}
