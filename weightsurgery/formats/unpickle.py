"""Pickles as data: an interpreter that builds inert values, imports nothing and calls nothing.

A pickle is a program for a stack machine. This one knows the opcodes of protocols 2 to 5 that
`torch.save` writes. A global is looked up in a table that the caller gives; what the table lacks is
named and refused. Every opcode is paid for from a budget before it is carried out, so that neither
a long pickle nor one that repeats its memo costs more than `BUDGET` bytes and about a second.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from weightsurgery.errors import FormatError, PolicyError, shown
from weightsurgery.formats.pickle_values import (
    BUDGET,
    Budget,
    Charge,
    DamagedError,
    Global,
    Opaque,
)

MAX_DEPTH = 1000  # of containers in containers
# Bytes that each costs at most: an opcode, a text, a memo, an item of a dictionary, an object.
_STEP, _TEXT, _MEMO, _ENTRY, _BOX = 80, 60, 112, 112, 160
_PROTO, _STOP = 0x80, ord(".")
_LONGEST_INTEGER = 255  # bytes
_LARGEST_KEY = 1 << 60  # larger integers may share their hash


class _Machine:
    """The stack, the memo, and what is left of the budget."""

    def __init__(
        self,
        data: bytes,
        start: int,
        known: Mapping[str, Global],
        load: Callable[[Any, Charge], Any],
        budget: Budget,
    ) -> None:
        self.data, self.at = data, start
        self.known, self.load, self.budget = known, load, budget
        self.charge, self.file = budget.charge, budget.file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, steps, budget = self.data, _STEPS, self.budget
        if data[self.at] != _PROTO:
            raise DamagedError("no protocol, or protocol 0 or 1; expected 2 to 5")
        while True:
            code = data[self.at]
            self.at += 1
            budget.left -= _STEP
            if budget.left < 0:
                budget.charge(0)
            if code == _STOP:
                return self.stack.pop()
            step = steps[code]
            if step is None:
                raise DamagedError(f"opcode {bytes((code,))!r} is not one that torch.save writes")
            step(self)

    # --- reading arguments ---

    def byte(self) -> int:
        found = self.data[self.at]
        self.at += 1
        return found

    def number(self, width: int) -> int:
        return int.from_bytes(self.raw(width), "little")

    def raw(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        found = self.data[self.at : end]
        self.at = end
        return found

    def bytes_of(self, width: int) -> bytes:
        count = self.number(width)
        self.charge(min(count, BUDGET + 1))
        return self.raw(count)

    def text(self, width: int) -> None:
        self.charge(_TEXT)
        found = self.bytes_of(width)
        if not found.isascii():
            self.charge(3 * len(found))  # one wide character makes all of them wide
        self.stack.append(found.decode("utf-8"))

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 500)
        found = self.raw(end - self.at).decode("utf-8")
        self.at += 1
        return found

    # --- steps ---

    def mark(self) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise DamagedError(f"more than {MAX_DEPTH:,} levels of nesting")
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def proto(self) -> None:
        version = self.number(1)
        if not 2 <= version <= 5:
            raise DamagedError(f"protocol {version}; expected 2 to 5")

    def frame(self) -> None:
        self.raw(8)

    def integer(self, width: int, signed: bool = False) -> None:
        self.stack.append(int.from_bytes(self.raw(width), "little", signed=signed))

    def long4(self) -> None:
        count = self.number(4)
        if count > _LONGEST_INTEGER:
            raise DamagedError(f"an integer of {count:,} bytes; expected at most 255")
        self.integer(count, signed=True)

    def real(self) -> None:
        self.stack.append(struct.unpack(">d", self.raw(8))[0])

    def blob(self, width: int) -> None:
        self.charge(_TEXT)
        self.bytes_of(width)
        self.stack.append(Opaque("bytes"))

    def empty(self, kind: Callable[[], Any]) -> None:
        self.stack.append(kind())

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def tuple_marked(self) -> None:
        items = self.marked()
        self.stack.append(tuple(items))

    def list_marked(self) -> None:
        items = self.marked()
        self.stack.append(items)

    def dict_marked(self) -> None:
        items = self.marked()
        target: dict[Any, Any] = {}
        self.fill(target, items)
        self.stack.append(target)

    def frozenset_marked(self) -> None:
        self.marked()
        self.stack.append(Opaque("frozenset"))

    def append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def appends(self) -> None:
        self.extend(self.marked())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise DamagedError("items for what is not a list")

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def setitems(self) -> None:
        items = self.marked()
        self.fill(self.stack[-1], items)

    def fill(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Opaque):
            return
        if type(target) is not dict or len(items) % 2:
            raise DamagedError("items for what is not a dictionary")
        self.charge(_ENTRY * (len(items) // 2))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def put(self, index: int) -> None:
        self.charge(_MEMO)
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def global_named(self, name: str) -> None:
        """Push what stands for a global.

        Raises:
            PolicyError: It is not on the list.
        """
        found = self.known.get(name)
        if found is None:
            raise PolicyError(
                f"it needs {shown(name)}, which is not on the list of what weights need",
                file=self.file,
                hint=_hint_for(name),
                code="E-PICKLE-REFUSED",
            )
        self.stack.append(found)

    def global_lines(self) -> None:
        self.global_named(f"{self.line()}.{self.line()}")

    def global_stacked(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > 1000:
            raise DamagedError("a global whose name is not text")
        self.global_named(f"{module}.{name}")

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def new_with_keywords(self) -> None:
        del self.stack[-1:]
        self.reduce()

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise DamagedError("a call of what is not a function")
        self.charge(_BOX)
        made = function.make(arguments, self.charge) if function.make else Opaque(function.name)
        self.stack.append(made)

    def build(self) -> None:
        self.stack.pop()  # the state of what we do not look into
        if not isinstance(self.stack[-1], dict | Opaque):
            raise DamagedError("a state for what has none")

    def persistent(self) -> None:
        self.charge(_BOX)
        self.stack.append(self.load(self.stack.pop(), self.charge))

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def drop_marked(self) -> None:
        self.marked()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])


def _hashable(key: Any) -> Any:
    """A key whose hash costs nothing: a tuple of itself twice, 70 times over, takes 2**70 steps."""
    if type(key) is str or (type(key) is int and -_LARGEST_KEY < key < _LARGEST_KEY):
        return key
    return Opaque(key.name if isinstance(key, Opaque) else type(key).__name__)


def _hint_for(name: str) -> str:
    if name.startswith(("torch.nn.modules.", "__main__.")) or "model" in name.lower():
        return "whoever made it can save model.state_dict() instead of the model"
    return "do not load it in any other way unless you trust it"


def _steps() -> list[Callable[[_Machine], None] | None]:
    m = _Machine
    table: dict[bytes, Callable[[_Machine], None]] = {
        b"(": m.mark,
        b"0": m.pop,
        b"1": m.drop_marked,
        b"2": m.duplicate,
        b"G": m.real,
        b"J": lambda s: s.integer(4, signed=True),
        b"K": lambda s: s.stack.append(s.byte()),
        b"M": lambda s: s.integer(2),
        b"N": lambda s: s.stack.append(None),
        b"Q": m.persistent,
        b"R": m.reduce,
        b"T": lambda s: s.text(4),  # what Python 2 wrote for a text; torch reads it as UTF-8
        b"U": lambda s: s.text(1),
        b"X": lambda s: s.text(4),
        b"a": m.append,
        b"b": m.build,
        b"c": m.global_lines,
        b"d": m.dict_marked,
        b"}": lambda s: s.empty(dict),
        b"e": m.appends,
        b"h": lambda s: s.get(s.byte()),
        b"j": lambda s: s.get(s.number(4)),
        b"l": m.list_marked,
        b"]": lambda s: s.empty(list),
        b"q": lambda s: s.put(s.byte()),
        b"r": lambda s: s.put(s.number(4)),
        b"s": m.setitem,
        b"t": m.tuple_marked,
        b")": lambda s: s.empty(tuple),
        b"u": m.setitems,
        b"\x80": m.proto,
        b"\x81": m.reduce,
        b"\x85": lambda s: s.tuple_of(1),
        b"\x86": lambda s: s.tuple_of(2),
        b"\x87": lambda s: s.tuple_of(3),
        b"\x88": lambda s: s.stack.append(True),
        b"\x89": lambda s: s.stack.append(False),
        b"\x8a": lambda s: s.integer(s.number(1), signed=True),
        b"\x8b": m.long4,
        b"B": lambda s: s.blob(4),
        b"C": lambda s: s.blob(1),
        b"\x8c": lambda s: s.text(1),
        b"\x8d": lambda s: s.text(8),
        b"\x8e": lambda s: s.blob(8),
        b"\x8f": lambda s: s.stack.append(Opaque("set")),
        b"\x90": m.appends,
        b"\x91": m.frozenset_marked,
        b"\x92": m.new_with_keywords,
        b"\x93": m.global_stacked,
        b"\x94": lambda s: s.put(len(s.memo)),
        b"\x95": m.frame,
        b"\x96": lambda s: s.blob(8),
    }
    return [table.get(bytes((code,))) for code in range(256)]


_STEPS = _steps()


def unpickle(
    data: bytes,
    start: int = 0,
    *,
    known: Mapping[str, Global],
    load: Callable[[Any, Charge], Any],
    budget: Budget,
) -> tuple[Any, int]:
    """Read one pickle as data.

    Args:
        data: Bytes that hold it.
        start: Where it begins in them.
        known: The globals that it may name, by their names with module.
        load: What stands for a persistent id, as which torch stores its storages.
        budget: What it may cost, for all pickles of a file.

    Returns:
        What it describes, in dictionaries, lists, tuples, texts, numbers, and what `known` and
        `load` make; everything else is `Opaque`. And where it ends.

    Raises:
        FormatError: It is cut or damaged.
        PolicyError: It names another global, or would take too much memory.
    """
    machine = _Machine(data, start, known, load, budget)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, ValueError) as error:  # the end of the data, of a stack
        _refuse("it is cut or damaged", machine, error)
    except DamagedError as error:
        _refuse(str(error), machine, error)


def _refuse(reason: str, machine: _Machine, error: Exception) -> NoReturn:
    raise FormatError(
        f"its pickle cannot be read at byte {machine.at:,}: {reason}",
        file=machine.file,
        hint="the file may be incomplete; torch.save writes protocols 2 to 5",
        code="E-PICKLE-LOAD",
    ) from error
