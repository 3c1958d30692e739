"""What a pickle is read into, and the memory that reading it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weightsurgery.errors import PolicyError

BUDGET = 150_000_000  # bytes that the pickle and the values made of it may take

Charge = Callable[[int], None]  # takes bytes from the budget


class Opaque:
    """An object that is of no interest here; of it only the class's name is kept.

    It is equal to itself alone, so that it can be a key whatever it stands for.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle may name.

    Attributes:
        name: With its module.
        make: What stands for a call of it: takes the arguments and what charges for memory.
        value: What the name itself stands for, such as a dtype.
    """

    name: str
    make: Callable[[tuple[Any, ...], Charge], Any] | None = None
    value: Any = None


class DamagedError(Exception):
    """The pickle breaks a rule of the format, or describes what cannot be."""


class Budget:
    """The memory that reading a file's pickles may still take.

    Args:
        file: The file, for the message.
    """

    def __init__(self, file: str) -> None:
        self.file, self.left = file, BUDGET

    def charge(self, cost: int) -> None:
        """Take bytes, before they are needed.

        Raises:
            PolicyError: There are no more.
        """
        self.left -= cost
        if self.left < 0:
            raise PolicyError(
                f"its pickle would take more than {BUDGET:,} bytes of memory to read",
                file=self.file,
                hint="30,000 tensors take as much; save the weights alone, in several files",
                code="E-PICKLE-LIMIT",
            )
