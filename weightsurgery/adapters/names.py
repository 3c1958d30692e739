"""The adapter's names for BASE's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import MismatchError, shown


class Names:
    """The adapter's names for BASE's tensors, which may differ by one prefix."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint, wanted: Iterable[str]) -> None:
        self.base, self.adapter = base, adapter
        self.prefix, self.longer = _common_prefix(list(wanted), base, adapter)

    def find(self, name: str) -> str | None:
        """BASE's name, or None."""
        # What transformers 5 calls `mlp` lies on the disk as Mixtral's authors called it.
        return self._found(name) or self._found(name.replace(".mlp.", ".block_sparse_moe.", 1))

    def _found(self, name: str) -> str | None:
        if name in self.base:
            return name
        if self.longer == "adapter" and name.startswith(self.prefix):
            name = name[len(self.prefix) :]
        elif self.longer == "base":
            name = self.prefix + name
        return name if name in self.base else None

    def need(self, name: str, view: TensorView) -> TensorView:
        """BASE's tensor of that name.

        Raises:
            MismatchError: BASE has none.
        """
        found = self.find(name)
        if found is None:
            raise MismatchError(
                f"BASE has no '{shown(name)}' that it could adapt",
                file=self.adapter.label,
                tensor=view.name,
                hint="is this the model that the adapter was trained on?",
                code="E-ADAPTER-TARGET",
            )
        return self.base[found]


def _common_prefix(wanted: list[str], base: Checkpoint, adapter: Checkpoint) -> tuple[str, str]:
    """The prefix that finds most of the names that BASE does not have as they are.

    Raises:
        MismatchError: Two find as many.
    """
    votes: Counter[tuple[str, str]] = Counter()
    missing = [name for name in wanted if name not in base]
    for name in missing:
        for rest in _endings(name):
            if rest in base:
                votes[name[: -len(rest)], "adapter"] += 1
    sought = set(missing)
    for name in base:
        for rest in _endings(name):
            if rest in sought:
                votes[name[: -len(rest)], "base"] += 1
    if not votes:
        return "", ""
    (first, most), *others = votes.most_common()
    rivals = [vote for vote, count in others if count == most]
    if rivals:
        prefixes = " and ".join(sorted(f"'{shown(vote[0])}'" for vote in (first, *rivals[:1])))
        raise MismatchError(
            f"its names fit BASE's by the prefixes {prefixes} alike; expected one",
            file=adapter.label,
            hint="give its tensors the names of BASE's",
            code="E-ADAPTER-PREFIX",
        )
    return first


def _endings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts)))
