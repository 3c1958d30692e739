"""Adapters and the tied output head: one tensor that two modules use, each with its own change.

PEFT adapts modules. Where the head is tied to the word embedding, what adapts one of them leaves
the other as it was; only trained tokens are shared. So a merge is one tensor no longer, unless
every adapter treats the two alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weightsurgery.adapters.finite import finite
from weightsurgery.adapters.layout import Target, read_adapter
from weightsurgery.adapters.naming import Naming
from weightsurgery.adapters.task_head import with_head_of
from weightsurgery.adapters.tie import Tie, find_tie, find_unclear, untied
from weightsurgery.adapters.updates import Replace, ReplaceRows, Update
from weightsurgery.adapters.vocabulary import refuse_unfilled, with_vocabulary_of
from weightsurgery.architecture.copies import have_equal_bytes
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import MismatchError, PolicyError, SettingError, conflict, counted, shown
from weightsurgery.ties import is_output_head


@dataclass(frozen=True)
class Reading:
    """What adapters do to BASE.

    Attributes:
        base: BASE, its vocabulary grown where an adapter's is; untied, if that was asked for.
        stored: BASE, its vocabulary grown where an adapter's is, tied as it was opened.
        tie: The embedding and the head that are one tensor in BASE as it was opened; None where
            there are none, or where they stay one.
        targets: What each adapter does, tensor by tensor.
    """

    base: Checkpoint
    stored: Checkpoint
    tie: Tie | None
    targets: tuple[tuple[Target, ...], ...]

    def updates(self) -> dict[str, list[Update]]:
        """What happens to each tensor, adapter after adapter."""
        found: dict[str, list[Update]] = {}
        for target in (target for targets in self.targets for target in targets):
            found.setdefault(target.name, []).extend(target.updates)
        return found

    @property
    def needs_untying(self) -> bool:
        """True if an adapter tells the head from the embedding that it is tied to."""
        if self.tie is None:
            return False
        found = self.updates()
        embedding = found.get(self.tie.embedding, [])
        if self.tie.head:
            return not _are_alike(found.get(self.tie.head, []), embedding)
        return not all(isinstance(update, ReplaceRows) for update in embedding)


def read_adapters(
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    weight: Sequence[float],
    *,
    naming: Naming | None = None,
    allow_nonfinite: bool = False,
) -> Reading:
    """What adapters do to BASE, its head untied from the embedding where it was tied.

    Args:
        base: The model that they were trained on.
        adapters: From `open_checkpoint`, in order.
        weight: One number for each, or none.
        naming: How their names correspond to BASE's; None for as they are.
        allow_nonfinite: Let their NaN and infinity pass; else reading them raises NonFiniteError.

    Raises:
        FormatError: An adapter is incomplete, or contradicts its configuration.
        MismatchError: An adapter does not fit BASE.
        PolicyError: An adapter is of a kind that is not folded in here, or changes what could be
            the tied embedding or its head, where nobody can tell which tensors are.
        SettingError: There is no adapter, not one finite `weight` for each, or a name that is
            mapped does not exist.
    """
    if not adapters:
        raise SettingError("no adapter is given", code="E-NOTHING-TO-DO")
    if weight and len(weight) != len(adapters):
        raise conflict(f"{counted(len(weight), 'weight')} for {counted(len(adapters), 'adapter')}")
    if not all(map(math.isfinite, weight)):
        raise SettingError(f"weight is {list(weight)}; expected finite numbers")
    naming = naming or Naming()
    naming.check(base, adapters)
    opened = with_head_of(base, adapters, naming)
    base = with_vocabulary_of(opened, adapters, naming)
    tie = find_tie(base)
    if tie and not tie.head:
        _refuse_unknown_head(base, tie, adapters)
    apart = untied(base, tie) if tie else base
    found = []
    read = adapters if allow_nonfinite else [*map(finite, adapters)]
    for adapter, by in zip(read, weight or [1.0] * len(adapters), strict=True):
        targets = read_adapter(apart, adapter, weight=by, naming=naming)
        _refuse_unclear(base, [target.name for target in targets])
        found.append(tuple(_with_tied_rows(targets, tie, adapter) if tie else targets))
    reading = Reading(apart, base, tie, tuple(found))
    refuse_unfilled(opened, base, reading.updates())
    return reading


def _are_alike(ours: Sequence[Update], theirs: Sequence[Update]) -> bool:
    """True if two tensors are changed alike; tensors of equal bytes that replace them are one."""
    return len(ours) == len(theirs) and all(map(_are_one, ours, theirs))


def _are_one(one: Update, other: Update) -> bool:
    if isinstance(one, Replace) and isinstance(other, Replace):
        return have_equal_bytes(one.by, other.by)
    if isinstance(one, ReplaceRows) and isinstance(other, ReplaceRows):
        return one.rows == other.rows and have_equal_bytes(one.by, other.by)
    return one == other


def stored_as_in_base(reading: Reading) -> Reading:
    """The same for a model that is written as BASE is: what it ties stays one tensor.

    Args:
        reading: From `read_adapters`.

    Raises:
        PolicyError: The embedding and its head would become different tensors.
    """
    base = reading.stored
    if reading.tie is None:
        return reading
    if reading.needs_untying:
        raise PolicyError(
            "an adapter changes the word embedding or the output head alone, and BASE ties "
            "the two: both would change",
            file=base.label,
            tensor=reading.tie.embedding,
            hint="--untie stores the head on its own"
            if reading.tie.can_untie
            else "keep using the adapter unmerged: no setting unties them in this model",
            code="E-TIED-HEAD",
        )
    targets = tuple(tuple(t for t in one if t.name in base) for one in reading.targets)
    return Reading(base, base, None, targets)  # the two stay one tensor


def stored_apart(reading: Reading) -> Reading:
    """The same for a model that is written with its head apart from the embedding.

    Args:
        reading: From `read_adapters`.

    Raises:
        MismatchError: There is nothing to untie.
        PolicyError: Nobody knows which tensors are tied, or where a head of its own would be
            stored.
    """
    base = reading.stored
    _refuse_unclear(base, tuple(base))
    if reading.tie is None:
        raise MismatchError(
            "its output head is not tied to the word embedding",
            file=base.label,
            hint="leave out `untie`",
            code="E-TIED-NONE",
        )
    if not reading.tie.head:
        raise _unknown_head(base, reading.tie)
    if not reading.tie.can_untie:
        raise PolicyError(
            "no setting in config.json unties the output head of this model",
            file=base.label,
            tensor=reading.tie.embedding,
            hint="leave out `untie`",
            code="E-TIED-UNCLEAR",
        )
    return reading


def _unknown_head(base: Checkpoint, tie: Tie) -> PolicyError:
    return PolicyError(
        "where the head of such a model would be stored is not known",
        file=base.label,
        tensor=tie.embedding,
        hint="store the head first, and set tie_word_embeddings to false",
        code="E-TIED-UNCLEAR",
    )


def _refuse_unknown_head(base: Checkpoint, tie: Tie, adapters: Sequence[Checkpoint]) -> None:
    """Refuse factors of a head that BASE does not store under any name that is known here.

    Raises:
        PolicyError: An adapter has some.
    """
    factors = (name for adapter in adapters for name in adapter if ".lora_" in name)
    if any(is_output_head(f"{name.partition('.lora_')[0]}.weight") for name in factors):
        raise _unknown_head(base, tie)


def _refuse_unclear(base: Checkpoint, changed: Sequence[str]) -> None:
    """Refuse to change what may be tied to something else.

    Raises:
        PolicyError: One of these names could be that of the tied embedding or of its head, and
            others could be too.
    """
    unclear = find_unclear(base)
    touched = [name for name in unclear if name in changed]
    if touched:
        others = ", ".join(f"'{shown(name)}'" for name in unclear if name != touched[0])
        raise PolicyError(
            "BASE ties its output head to its word embedding, and this tensor could be one of the "
            f"two, as {others} could",
            file=base.label,
            tensor=touched[0],
            hint="if they are not tied, say so in config.json: tie_word_embeddings false",
            code="E-TIED-UNCLEAR",
        )


def _with_tied_rows(targets: Sequence[Target], tie: Tie, adapter: Checkpoint) -> list[Target]:
    """Trained tokens of the embedding are the head's too, unless those are trained on their own.

    Raises:
        PolicyError: The embedding or the head is adapted besides, or saved whole with other bytes.
    """
    by_name = {target.name: target for target in targets}
    embedding, head = by_name.get(tie.embedding), by_name.get(tie.head)
    if embedding is None or not any(isinstance(u, ReplaceRows) for u in embedding.updates):
        return list(targets)
    others = (*embedding.updates, *(head.updates if head else ()))
    whole = [update for update in others if isinstance(update, Replace)]
    known = all(isinstance(update, Replace | ReplaceRows) for update in others)
    if not known or not all(_are_one(update, whole[0]) for update in whole):
        raise PolicyError(
            "trained tokens of an embedding that the head is tied to, beside another change of "
            "one of them",
            file=adapter.label,
            tensor=tie.embedding,
            hint="merge it with the library that made it",
            code="E-TIED-TOKENS",
        )
    if not tie.head or (head and any(isinstance(u, ReplaceRows) for u in head.updates)):
        return list(targets)
    apart = [target for target in targets if target is not head]
    return [*apart, Target(tie.head, embedding.updates)]
