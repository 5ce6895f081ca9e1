# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds parts of messages that several modules share."""

from __future__ import annotations

from collections.abc import Sequence

FEW = 3


def few(names: Sequence[str]) -> str:
    """The names in one line, shortened: "a, b, c and 37 more"."""
    more = len(names) - FEW
    if more <= 1:  # "1 more" is as long as the name
        return ", ".join(names)
    return f"{', '.join(names[:FEW])} and {more} more"


def question(names: Sequence[str], device: str, before: str = "") -> str:
    """One line for password agents. `device`: of a single volume."""
    if len(names) == 1:
        return f"{before}Passphrase for volume {names[0]} ({device}):"
    return f"{before}Passphrase for volumes {few(names)}:"
