# SPDX-License-Identifier: LGPL-2.1-or-later
"""How sentences for people are put together, wherever they are made."""

from __future__ import annotations

from collections.abc import Sequence

FEW = 3


def few(names: Sequence[str]) -> str:
    """The names in one line, however many they are: "a, b, c and 37 more"."""
    more = len(names) - FEW
    if more <= 1:  # to say "1 more" takes as much room as the name
        return ", ".join(names)
    return f"{', '.join(names[:FEW])} and {more} more"


def question(names: Sequence[str], device: str, before: str = "") -> str:
    """One line, as password agents show it. `device` is that of the only volume."""
    if len(names) == 1:
        return f"{before}Passphrase for volume {names[0]} ({device}):"
    return f"{before}Passphrase for volumes {few(names)}:"
