"""An adapter's names in BASE's terms, where the user says how they correspond.

The adapter itself is not renamed: the patterns in its configuration match its own names.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightsurgery.adapters.contents import FRONT, sort_out
from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SettingError, shown


@dataclass(frozen=True)
class Naming:
    """How an adapter's names correspond to BASE's.

    Attributes:
        strip_prefix: Ignored at the front of either side's names.
        name_map: The adapter's name to BASE's name, of a tensor or of a module with all that is
            below it; wins over the prefix.
    """

    strip_prefix: str = ""
    name_map: Mapping[str, str] = field(default_factory=dict)

    def translated(self, name: str, base: Checkpoint) -> str:
        """A name as BASE would have it; what no rule covers stays.

        Args:
            name: A parameter's, as the adapter names it.
            base: The model.
        """
        front = _longest_front(name, self._map)
        if front:
            return self._map[front] + name[len(front) :]
        prefix = self._prefix
        if not prefix or name in base:
            return name
        if name.startswith(prefix):
            return name.removeprefix(prefix)
        return prefix + name if prefix + name in base else name

    def check(self, base: Checkpoint, adapters: Sequence[Checkpoint]) -> None:
        """Refuse a prefix or a name that occurs nowhere.

        Args:
            base: The model.
            adapters: From `open_checkpoint`.

        Raises:
            SettingError: There is one.
        """
        if not self.strip_prefix and not self.name_map:
            return
        names: list[str] = []
        for adapter in adapters:
            contents = sort_out(adapter)
            names += [*(f"{module}." for module in contents.modules), *contents.plain]
        if not any(name.startswith(self._prefix) for name in (*names, *base)):
            reason = f"no tensor name begins with '{shown(self.strip_prefix)}'"
            raise SettingError(reason, code="E-NO-MATCH")
        fronts = {front for name in names for front in _fronts(name)}
        for key in self._map:
            if key not in fronts:
                near = difflib.get_close_matches(key, sorted(fronts), 1, 0.3)
                raise SettingError(
                    "the name map names a tensor or module that the adapter does not have",
                    file=" and ".join(adapter.label for adapter in adapters),
                    tensor=key,
                    hint=f"did you mean '{shown(near[0])}'?" if near else "",
                    code="E-NO-MATCH",
                )

    @property
    def _prefix(self) -> str:
        return self.strip_prefix.removeprefix(FRONT)

    @property
    def _map(self) -> dict[str, str]:
        return {name.removeprefix(FRONT): new for name, new in self.name_map.items()}


def _fronts(name: str) -> list[str]:
    """Every dotted front of a name, itself the last: a.b.c gives a, a.b and a.b.c."""
    return list(itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}"))


def _longest_front(name: str, known: Mapping[str, str]) -> str:
    return next((front for front in reversed(_fronts(name)) if front in known), "")
