"""What makes `wsurg` start and end fast; a library must not do this to the process it is in."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import sys

_OBJECTS = 100_000  # made between two searches for garbage; imports make many and drop none
_BLAS = "scipy.linalg"


def spare_garbage_collection() -> None:
    """Search seldom for garbage, and not among what is left when the interpreter ends."""
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)


def import_numba() -> None:
    """Import numba without SciPy's BLAS, which no kernel here calls.

    Numba looks for it when it first compiles or loads a function, and importing it takes a third
    of the time that `wsurg` needs to start. SciPy itself can be imported as ever afterwards.
    """
    if _BLAS in sys.modules:
        return
    sys.modules[_BLAS] = None  # type: ignore[assignment]  # makes importing it an ImportError
    try:
        with contextlib.suppress(ImportError):  # a numba that keeps this elsewhere is only slower
            importlib.import_module("numba.np.arraymath")
    finally:
        del sys.modules[_BLAS]
