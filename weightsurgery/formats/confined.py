"""The confined child that loads one pickled checkpoint and writes what it holds as safetensors.

A program, run by `pickled.py` as `python -I confined.py FD OUT BYTES MEMORY SECONDS`, with the
checked archive open as FD and a pipe as stdin that ends when the parent does. Nothing of
weightsurgery is imported. It limits itself before it looks at the file: address space, CPU and
wall-clock time, size of files, descriptors. How it ended is its exit code, why is the last line on
stderr.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import signal
import sys
from typing import Any, NoReturn

UNABLE, MALFORMED, UNFIT, REFUSED, NO_ROOM, TOO_MUCH = 2, 3, 4, 5, 6, 9
_NAMES = {  # torch's name to the format's
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "bool": "BOOL",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_DESCRIPTORS = 64
_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")
_BOILERPLATE = ("Weights only load failed", "Check the documentation", "Please file")


def _end(code: int, reason: str) -> NoReturn:
    sys.stderr.write("\n" + json.dumps(reason[:1000]))
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Let the system kill this process and all it starts, once the pipe on stdin has ended.

    By a signal of the kernel's, whose default is to end the process: a thread that waits for the
    end would have to wait for the interpreter too, which a hostile pickle may keep.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):  # it would wait: the parent is there
        if not os.read(0, 1):
            os._exit(UNABLE)


def _confine(most: int, memory: int, seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + seconds
    for what, limit in (
        (resource.RLIMIT_AS, _mapped() + memory),
        (resource.RLIMIT_CPU, cpu),  # SIGXCPU, and a second later SIGKILL
        (resource.RLIMIT_FSIZE, most),
        (resource.RLIMIT_NOFILE, _DESCRIPTORS),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        known = (limit, limit + 1) if hard == resource.RLIM_INFINITY else (limit, limit + 1, hard)
        resource.setrlimit(what, (min(known), min(known[1:])))
    signal.alarm(2 * seconds)  # kills also where nobody is left who would


def _mapped() -> int:
    """Bytes of address space that torch's libraries have taken."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        _end(UNABLE, "this system does not let memory be limited; convert it on Linux")


def _load(source: int) -> Any:
    import torch

    with os.fdopen(source, "rb") as file:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _tensors(loaded: Any) -> tuple[dict[str, Any], list[str]]:
    """The tensors by name, and what else was there."""
    import torch

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())

    warnings = []
    inner = [k for k, v in loaded.items() if holds(v)] if isinstance(loaded, dict) else []
    answers = [
        *(["its own"] if holds(loaded) else []),
        *(f"those of {_listed([k])}" for k in inner),
    ]
    if len(answers) > 1:
        reason = f"ambiguous tensors: {answers[0]} and {answers[1]}"
        _end(UNFIT, reason)
    if inner:
        others = [key for key in loaded if key not in inner]
        if others:
            warnings.append(f"only its entry {inner[0]!r} was read, not {_listed(others)}")
        loaded = loaded[inner[0]]
    if not holds(loaded):
        _end(MALFORMED, "it holds no dictionary of tensors")
    others = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        warnings.append(f"entries that are no tensors were left out: {_listed(others)}")
    return {n: v.detach() for n, v in loaded.items() if isinstance(v, torch.Tensor)}, warnings


def _listed(names: list[Any]) -> str:
    return ", ".join(repr(n)[:80] for n in names[:5]) + (", …" if len(names) > 5 else "")


def _check(tensors: dict[Any, Any], most: int) -> None:
    import torch

    total = 0
    for name, tensor in tensors.items():
        if type(name) is not str or name == "__metadata__":
            _end(MALFORMED, f"a tensor's name is {name!r:.80}; expected text")
        dtype = str(tensor.dtype).removeprefix("torch.")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or dtype not in _NAMES:
            _end(
                UNFIT,
                f"tensor {name!r:.80} is {dtype}, {tensor.layout}, on {tensor.device}; safetensors "
                "holds plain tensors only",
            )
        total += tensor.numel() * tensor.element_size()
    if total > most:
        _end(TOO_MUCH, f"its tensors would take {total:,} bytes; the limit is {most:,}")


def _shared(tensors: dict[str, Any]) -> list[list[str]]:
    """Names of tensors that lie in one storage, for each storage that several lie in."""
    found: dict[int, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.numel():
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _write(tensors: dict[str, Any], told: dict[str, Any], path: str) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"told": json.dumps(told)}}
    at = 0
    for name, tensor in sorted(tensors.items()):
        end = at + tensor.numel() * tensor.element_size()
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            whole = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
            if whole.numel():
                file.write(whole.view(torch.uint8).numpy().data)


def main(arguments: list[str]) -> None:
    """Load, check and write; the process ends here, with its exit code.

    Args:
        arguments: Descriptor of the archive, path to write, bytes that may be written, bytes of
            memory that may be taken, seconds of CPU time.
    """
    source, path, most, memory, seconds = int(arguments[0]), arguments[1], *map(int, arguments[2:])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent held some back to start us
    _die_with_parent()
    try:
        import torch
    except Exception as error:
        _end(UNABLE, f"`python -I` cannot import torch ({error}); install it")
    torch.set_num_threads(1)
    _confine(most, memory, seconds)
    try:
        tensors, warnings = _tensors(_load(source))
        _check(tensors, most)
        _write(tensors, {"shared": _shared(tensors), "warnings": warnings}, path)
    except Exception as error:
        _tell(error, most, memory)
    os._exit(0)


def _tell(error: Exception, most: int, memory: int) -> NoReturn:
    """End with what went wrong."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in _OF_MEMORY):
        _end(TOO_MUCH, f"it takes more than {memory:,} bytes of memory")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _end(NO_ROOM, f"cannot write to the temporary directory: {error.strerror}")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        _end(TOO_MUCH, f"its tensors take more than {most:,} bytes")
    unknown = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text)
    if unknown:
        _end(REFUSED, f"it asks for {unknown[1][:200]}, which weights do not need")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    plain = " ".join([one for one in lines if not one.startswith(_BOILERPLATE)][:2]).rstrip(".")
    if type(error).__name__ == "UnpicklingError":
        _end(REFUSED, f"torch's loader of weights refuses it: {plain}")
    _end(MALFORMED, f"torch cannot load it: {type(error).__name__}{plain and ': '}{plain}")


if __name__ == "__main__":
    main(sys.argv[1:])
