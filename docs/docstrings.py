"""Google-style docstrings: parsed into sections, and shown as Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, field

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Reference")
LISTS = ("Args", "Attributes", "Raises")  # sections made of `name: text`
_HEAD = re.compile(rf"({'|'.join(SECTIONS)}):")
_ENTRY = re.compile(r"([\w.]+):\s+(.*)")


@dataclass
class Docstring:
    """A docstring in its parts.

    Attributes:
        text: What stands before the first section.
        sections: Section name to its text, dedented.
        entries: For the sections in `LISTS`: name to text, in order.
    """

    text: str
    sections: dict[str, str] = field(default_factory=dict)
    entries: dict[str, dict[str, str]] = field(default_factory=dict)


def parse_docstring(text: str) -> Docstring:
    """Split a Google-style docstring into its sections."""
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(text).splitlines():
        head = _HEAD.fullmatch(line)
        if head:
            current = head[1]
            parts[current] = []
        else:
            parts[current].append(line)
    sections = {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in parts.items()}
    doc = Docstring(sections.pop(""), sections)
    doc.entries = {name: _entries(sections[name]) for name in LISTS if name in sections}
    return doc


def _entries(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def render(doc: Docstring) -> list[str]:
    """A docstring as Markdown."""
    lines = [doc.text, ""]
    for name, text in doc.sections.items():
        lines += [f"**{name}**", ""]
        if name in doc.entries:
            lines += [f"- `{entry}`: {meaning}" for entry, meaning in doc.entries[name].items()]
        elif name == "Example":
            lines += ["```pycon", text, "```"]
        else:
            lines.append(text)
        lines.append("")
    return lines
