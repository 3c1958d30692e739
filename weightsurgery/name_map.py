"""BASE under TUNED's names, where the user says which belong together."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from weightsurgery.checkpoint import Checkpoint
from weightsurgery.errors import SettingError, shown


def match_names(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    strip_prefix: str = "",
    name_map: Mapping[str, str] | None = None,
) -> Checkpoint:
    """BASE under TUNED's names, as the user says they correspond.

    Args:
        base: The checkpoint to rename.
        tuned: The checkpoint whose names count.
        strip_prefix: Ignored at the front of either side's names.
        name_map: TUNED's name to BASE's name; wins over the prefix.

    Returns:
        BASE, lazily renamed; what no rule covers keeps its name.

    Raises:
        SettingError: The prefix occurs nowhere, the map names a tensor that does not exist, or
            two tensors of BASE would get the same name.
    """
    names: dict[str, str] = {}
    if strip_prefix:
        if not any(n.startswith(strip_prefix) for n in (*base, *tuned)):
            raise SettingError(
                f"no tensor name begins with '{shown(strip_prefix)}'", code="E-NO-MATCH"
            )
        bare = {name.removeprefix(strip_prefix): name for name in tuned if name not in base}
        for name in base:
            if name not in tuned and name.removeprefix(strip_prefix) in bare:
                names[name] = bare[name.removeprefix(strip_prefix)]
    for tuned_name, base_name in (name_map or {}).items():
        for name, side in ((tuned_name, tuned), (base_name, base)):
            if name not in side:
                near = difflib.get_close_matches(name, list(side), 1, 0.3)
                raise SettingError(
                    "the name map names a tensor that is not there",
                    file=side.label,
                    tensor=name,
                    hint=f"did you mean '{shown(near[0])}'?" if near else "",
                    code="E-NO-MATCH",
                )
        names = {b: t for b, t in names.items() if t != tuned_name}
        names[base_name] = tuned_name
    for displaced in (n for n in name_map or {} if n in base and n not in names):
        names[displaced] = f"{displaced} (BASE's; the name map gives its place to another)"
    return base.renamed(names)
