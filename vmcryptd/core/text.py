# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from outside, made fit for a line of the journal, a terminal or a dialog. Pure."""

from __future__ import annotations


def escaped(text: str, most: int = 128) -> str:
    """At most so many characters, each printable: a control character could end the line or forge one."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:most])
    return f"{shown}…" if len(text) > most else shown
