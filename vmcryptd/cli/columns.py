# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures and wraps text in terminal columns: East Asian characters take two, combining ones none."""

from __future__ import annotations

import re


def width(text: str) -> int:
    """The number of columns of a printable text."""
    if text.isascii():
        return len(text)
    import unicodedata  # only for names that need it

    def of(char: str) -> int:
        if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
            return 0
        return 2 if unicodedata.east_asian_width(char) in "WF" else 1

    return sum(map(of, text))


def padded(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def shortened(text: str, columns: int) -> str:
    """The text without its middle if it does not fit: both ends of a device's path help."""
    if width(text) <= columns:
        return text
    head, tail = text, text
    while width(tail) > (columns - 3) * 2 // 3:
        tail = tail[1:]
    while width(head) + 3 + width(tail) > columns:
        head = head[:-1]
    return f"{head}...{tail}"


def wrapped(text: str, columns: int, indent: int = 0) -> list[str]:
    """Lines of so many columns, 0 for any; indented from the second on. A word is never cut: it may be a name."""
    if not columns or width(text) <= columns:
        return [text]
    lead = len(text) - len(text.lstrip(" "))
    lines, line, gap = [], " " * lead, ""
    for chunk in re.findall(r" +|[^ ]+", text[lead:]):
        if chunk.isspace():
            gap = chunk
            continue
        if gap and width(line) + len(gap) + width(chunk) > max(columns, indent + 20):
            lines.append(line)
            line, gap = " " * indent, ""
        line += gap + chunk
        gap = ""
    return [*lines, line]
