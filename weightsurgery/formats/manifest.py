"""Read the list of a model's parts, each of which has a folder of its own.

sentence-transformers' `modules.json` lists the modules that texts go through, of which one may be
the model's folder itself; diffusers' `model_index.json` lists the components of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from weightsurgery.errors import FormatError, PolicyError, first_few, shown
from weightsurgery.formats.folder import Folder
from weightsurgery.formats.layout import (
    BESIDE,
    MODULES,
    PIPELINE,
    RECORD,
    ROUTER,
    WEIGHTS,
    fits,
    is_plain_path,
    joined,
)
from weightsurgery.formats.strict_json import parse

_MAX_BYTES = 10_000_000
_MOST_PARTS = 200
_DEPTH = 3  # names in a part's path
_FILES = (*BESIDE, *WEIGHTS, RECORD)
# sentence-transformers' modules that have weights.
_WITH_WEIGHTS = (
    *(".Transformer", ".MLMTransformer", ".CLIPModel", ".Dense", ".LSTM", ".CNN", ".LayerNorm"),
    *(".WordEmbeddings", ".WordWeights", ".StaticEmbedding", ".WeightedLayerPooling"),
    ".SparseAutoEncoder",
)


@dataclass(frozen=True)
class Manifest:
    """The parts of a model.

    Attributes:
        file: The name of the file that lists them.
        folders: Paths of the parts that lie in folders of their own.
        is_root_part: Whether the model's folder is itself a part.
        weighty: Paths of the parts that the library loads weights from, as far as the list tells.
        warnings: Parts that need code to load, which is not copied.
    """

    file: str
    folders: tuple[str, ...]
    is_root_part: bool
    weighty: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_manifest(folder: Folder) -> Manifest | None:
    """Read the list of parts in a model's folder; None if it has no list.

    Args:
        folder: The model's.

    Raises:
        FormatError: The list is malformed, or leads out of the folder.
        PolicyError: There are two such lists.
        StorageError: One cannot be read.
    """
    named = [name for name in (PIPELINE, MODULES) if name in folder.entries]
    if not named:
        return None
    if len(named) > 1:
        raise PolicyError(
            f"ambiguous parts: {PIPELINE} and {MODULES} both list some",
            file=folder.path,
            hint="keep only one of the two files",
            code="E-TWO-ANSWERS",
        )
    read = _components if named[0] == PIPELINE else _modules
    parts = dict(read(folder))
    if not parts and named[0] == MODULES:
        return None
    if len(parts) > _MOST_PARTS:
        raise _malformed(folder, named[0], f"lists more than {_MOST_PARTS} parts")
    for path in filter(None, parts):
        if not (is_plain_path(path, _DEPTH) and path.isprintable() and "\\" not in path):
            reason = f"lists a part at '{shown(path)}'; expected a folder in the model's own"
            raise _malformed(folder, named[0], reason)
        if path.startswith(".") or fits(path.partition("/")[0], _FILES):
            reason = f"lists a part at '{shown(path)}', which is the name of a file of the model"
            raise _malformed(folder, named[0], reason)
    custom = [f"'{shown(kind)}'" for path, kind in parts.items() if _is_code(folder, path, kind)]
    warning = f"{named[0]}: {first_few(custom)} needs code, which is not copied"
    folders = tuple(path for path in parts if path)
    weighty = tuple(path for path, kind in parts.items() if kind.endswith(_WITH_WEIGHTS))
    return Manifest(named[0], folders, "" in parts, weighty, (warning,) if custom else ())


def _components(folder: Folder) -> Iterator[tuple[str, str]]:
    """Folder and module of each component of a pipeline.

    Raises:
        FormatError: The list is no object.
    """
    content = _read(folder, PIPELINE)
    if not isinstance(content, dict):
        raise _malformed(folder, PIPELINE, "expected an object")
    for name, pair in content.items():
        several = isinstance(pair, list) and len(pair) == 2 and not name.startswith("_")
        if several and all(isinstance(text, str) for text in pair):
            yield name, pair[0]
            # Several ControlNets are one component, in controlnet/, controlnet_1/, and so on.
            more = (f"{name}_{i}" for i in range(1, _MOST_PARTS) if "Multi" in pair[1])
            yield from ((one, pair[0]) for one in takewhile(folder.holds, more))


def _modules(folder: Folder) -> Iterator[tuple[str, str]]:
    """Folder and class of each module of a sentence transformer, and of those in a Router.

    Raises:
        FormatError: It is no list of objects with a path and a type.
    """
    content = _read(folder, MODULES)
    for module in content if isinstance(content, list) else [None]:
        fields = module if isinstance(module, dict) else {}
        path, kind = fields.get("path"), fields.get("type")
        if not isinstance(path, str) or not isinstance(kind, str):
            raise _malformed(folder, MODULES, "expected a list of modules with path and type")
        yield path, kind
        if kind.endswith((".Router", ".Asym")) and (not path or is_plain_path(path, _DEPTH)):
            yield from _routes(folder, path)


def _routes(folder: Folder, path: str) -> Iterator[tuple[str, str]]:
    """The modules that a Router chooses among, in folders below its own."""
    inner = folder.enter(path) if path else folder
    for name in (ROUTER, "config.json") if inner is not None else ():
        if inner is not None and name in inner.entries:
            content = _read(inner, name)
            types = content.get("types") if isinstance(content, dict) else None
            for module, kind in types.items() if isinstance(types, dict) else ():
                yield joined(path, module), str(kind)
            return


def _read(folder: Folder, name: str) -> Any:
    file = folder.open(name)
    return parse(file.read_all(_MAX_BYTES), file=file.path, what="list of parts")


def _malformed(folder: Folder, name: str, reason: str) -> FormatError:
    return FormatError(reason, file=f"{folder.path}/{name}", code="E-PARTS")


def _is_code(folder: Folder, path: str, kind: str) -> bool:
    """True if a part's class is defined by a file that lies in the folder, or on the hub."""
    file = f"{kind.partition('.')[0]}.py"
    return "--" in kind or folder.holds(file) or folder.holds(joined(path, file))
