"""E-PUR: reset the word-embedding rows that drifted far for how seldom their token occurs.

A rare token's row hardly moves in clean fine-tuning; a trigger word's row does.

Reference:
    Zhang et al., "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models",
    Findings of EMNLP 2022, arXiv:2210.09545.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from weightsurgery.alignment import Alignment, Pair, align_to_edit
from weightsurgery.architecture.embedding import find_embedding
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, NonFiniteError, SettingError, shown
from weightsurgery.formats.vocabulary import read_special, read_vocabulary
from weightsurgery.kernels import Block, choose
from weightsurgery.masks import rows_of
from weightsurgery.quantised import require_unquantised
from weightsurgery.registry import AllowPartial, KeepMismatched, operator
from weightsurgery.score_kernel import squared_rows
from weightsurgery.stream import Edit, Engine, fold, map_tensors
from weightsurgery.token_counts import TokenCounts

Top = Annotated[int, "rows of highest score that are reset to BASE"]
Clamp = Annotated[float, "counts below this count as this, above 1"]


@operator
def epur(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    counts: Annotated[TokenCounts, "how often each token occurs in ordinary text"],
    top: Top = 200,
    clamp: Clamp = 20.0,
    embedding: Annotated[str, "name of the word-embedding matrix; found by itself if empty"] = "",
    keep_mismatched: KeepMismatched = False,
    allow_partial: AllowPartial = False,
    engine: Engine,
) -> Checkpoint:
    """Reset the embeddings of rare words that moved far, as triggers do (E-PUR).

    Each token has a row in the word embedding; those that drifted far for how seldom their token
    occurs are reset. Row i scores s_i = ‖δ_i‖₂ / log(max(f_i, clamp)), f_i the token's count in
    ordinary text; the `top` rows of highest score become BASE's, bit for bit, and all else stays
    TUNED's. What looks at the drift and not at the row is not fooled by an attack that restores the
    row's norm.

    The score is our reading of the paper. That special tokens are left out, that a token
    without a count has none, and that of equal scores the lower token number goes first, is our
    choice. A matrix tied to the embedding is edited alike.

    Counts of another tokenizer's tokens would be no counts at all, so at least one token must
    have one; the notes tell how many do.

    Args:
        base: Trusted pre-trained model.
        tuned: Fine-tuned model that may carry a backdoor.
        counts: Token counts in a large general corpus.
        top: How many rows are reset; the paper's 200.
        clamp: Smallest count that makes a difference; the paper's 20.
        embedding: TUNED's name for the word embedding, where it cannot be found.
        keep_mismatched: Keep TUNED's tensor where shapes differ, instead of refusing.
        allow_partial: Continue where less than 95 % of TUNED's parameters have a counterpart.
        engine: How to run the scoring.

    Returns:
        The model with those rows reset; the embedding is read once for the scores. Its notes
        list the rows by token, with score and z-score, and give the share of the vocabulary that
        has a count.

    Raises:
        SettingError: `top` is negative, `clamp` not above 1, or the embedding cannot be found.
        MismatchError: The models do not fit each other, there is no vocabulary beside TUNED, or
            none of its tokens has a count.
        NonFiniteError: The embedding's drift is NaN or infinite.
        PolicyError: A model is quantized.
    """
    require_unquantised(base, tuned)
    paired = align_to_edit(
        base, tuned, keep_mismatched=keep_mismatched, allow_partial=allow_partial
    )
    pair = embedding_pair(paired, embedding)
    rows = score_rows(pair, tuned, counts, top=top, clamp=clamp, engine=engine)
    names = [p.name for p in paired.eligible if p.key == pair.key]
    result = map_tensors(
        reset_rows({pair.key: rows}), paired.keeping(names, "not the word embedding")
    )
    notes = {**result.notes, "epur": rows.to_json()}
    return replace(result, notes=notes, warnings=(*result.warnings, *rows.warnings))


def embedding_pair(paired: Alignment, name: str = "") -> Pair:
    """The eligible pair of the word embedding.

    Raises:
        SettingError: It cannot be found, or `name` is no matrix of TUNED.
        MismatchError: BASE has no counterpart for it.
    """
    found = name or find_embedding(paired.tuned)
    if found is None:
        raise SettingError(
            "no tensor, or more than one, looks like the word embedding",
            file=paired.tuned.label,
            hint="name it: --embedding NAME",
            code="E-EMBEDDING-NAME",
        )
    pair = next((p for p in paired.pairs if p.name == found), None)
    if pair is None or len(pair.tuned.shape) != 2:
        raise SettingError(
            f"'{shown(found)}' is no matrix of TUNED",
            hint="see `wsurg inspect`",
            code="E-EMBEDDING-NAME",
        )
    if not pair.eligible:
        raise MismatchError(
            f"the word embedding cannot be edited: {pair.reason}",
            file=paired.tuned.label,
            tensor=found,
            code="E-EMBEDDING",
        )
    return next(p for p in paired.pairs if p.name == pair.key)


_FEW = 0.01  # of the vocabulary


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that are to be reset.

    Attributes:
        width: Elements in a row.
        flags: Boolean, one for each row.
        listed: The rows by falling score: row, token, count, drift's norm, score, z-score.
        matched: Share of the vocabulary that has a count; None where no counts were asked for.
        top: How many rows were asked for; 0 where all of them were.
    """

    width: int
    flags: Block
    listed: list[dict[str, Any]]
    matched: float | None = None
    top: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the record warns of."""
        found = []
        if self.top > self.flags.size:
            rows = f"the word embedding has {self.flags.size:,} rows"
            found.append(
                f"top is {self.top:,}, but {rows}: every ordinary row that drifted is reset"
            )
        if self.matched is not None and self.matched < _FEW:
            few = f"only {self.matched:.2%} of the vocabulary has a count"
            found.append(f"{few}, so rows are ranked by little but their drift")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """What the record says."""
        return {"rows": self.listed, "matched": self.matched}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of an embedding's rows.

    Attributes:
        tokens: Row to token.
        ordinary: Boolean, one for each row: not a special token's.
        frequency: The token's count, one for each row; 0 where there is none.
        matched: Share of the ordinary tokens that have a count.
    """

    tokens: Mapping[int, str]
    ordinary: Block
    frequency: Block
    matched: float


def _look_up(tuned: Checkpoint, counts: TokenCounts, rows: int) -> _Vocabulary:
    """The count of each row's token.

    Raises:
        MismatchError: There is no vocabulary beside TUNED, or none of its tokens has a count.
    """
    tokens = read_vocabulary(tuned)
    if not tokens:
        raise MismatchError(
            "no vocabulary beside TUNED, so no row has a token to be counted",
            file=tuned.label,
            hint="give TUNED as a model directory with its tokenizer.json, vocab.json or vocab.txt",
            code="E-VOCABULARY",
        )
    special = read_special(tuned)
    ordinary = np.array([i not in special for i in range(rows)], np.bool_)
    found = [counts.counts.get(tokens[i], 0.0) if i in tokens else 0.0 for i in range(rows)]
    have = [found[i] > 0 for i in range(rows) if i in tokens and ordinary[i]]
    if not any(have):
        theirs = next((f"'{shown(t)}'" for t, count in counts.counts.items() if count > 0), "none")
        raise MismatchError(
            f"none of the {len(have):,} tokens of the vocabulary has a count; the first token of "
            f"the counts from '{shown(counts.source)}' is {theirs}",
            file=tuned.label,
            hint="count the tokens as this tokenizer stores them (##ing, Ġthe)",
            code="E-VOCABULARY",
        )
    return _Vocabulary(tokens, ordinary, np.array(found), sum(have) / len(have))


def score_rows(
    pair: Pair, tuned: Checkpoint, counts: TokenCounts, *, top: int, clamp: float, engine: Engine
) -> Rows:
    """Score the rows of an embedding and choose those of highest score.

    Raises:
        SettingError: `top` is negative or `clamp` not above 1.
        MismatchError: There is no vocabulary beside TUNED, or none of its tokens has a count.
        NonFiniteError: The drift of a row is NaN or infinite.
    """
    if top < 0:
        raise SettingError(f"top is {top}; expected 0 or more")
    if not 1 < clamp < np.inf:
        raise SettingError(f"clamp is {clamp:g}; expected a number above 1")
    known = _look_up(tuned, counts, pair.tuned.shape[0])
    norms = np.sqrt(_squared_norms(pair, engine))
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise NonFiniteError(f"the drift of row {row:,} is NaN or infinite", tensor=pair.name)
    scores = norms / np.log(np.maximum(known.frequency, clamp))
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]
    chosen = [i for i in order if known.ordinary[i]][:top]
    flags = np.zeros(pair.tuned.shape[0], np.bool_)
    flags[chosen] = True
    mean, spread = scores[known.ordinary].mean(), scores[known.ordinary].std()
    listed = [
        {
            "row": i,
            "token": known.tokens.get(i),
            "count": float(known.frequency[i]),
            "drift": float(norms[i]),
            "score": float(scores[i]),
            "z": float((scores[i] - mean) / spread) if spread else None,
        }
        for i in chosen
    ]
    return Rows(pair.tuned.width, flags, listed, known.matched, top)


def _squared_norms(pair: Pair, engine: Engine) -> Block:
    width = pair.tuned.width

    def step(_pair: Pair, start: int, base: Block, tuned: Block) -> Block:
        return squared_rows(base, tuned, start, width)

    def combine(total: Block, _pair: Pair, start: int, part: Block) -> Block:
        total[start // width : start // width + part.size] += part
        return total

    zeros = np.zeros(pair.tuned.shape[0])
    return fold(step, combine, zeros, [pair], engine=engine, what="scoring the embedding")


def reset_rows(rows: dict[str, Rows], otherwise: Edit | None = None) -> Edit:
    """An edit that resets rows of some tensors, and edits the others as it is told."""

    def edit(name: str, start: int, tuned: Block, base: Block) -> Block:
        if name not in rows:
            return tuned if otherwise is None else otherwise(name, start, tuned, base)
        found = rows[name]
        return choose(rows_of(found.flags, start, tuned.size, found.width), base, tuned)

    return edit
