# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes text from outside safe for the journal, a terminal or a dialog. Pure."""

from __future__ import annotations

import re


def escaped(text: str, most: int = 128) -> str:
    """At most so many characters, each printable: a control character could end the line or forge one."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:most])
    return f"{shown}…" if len(text) > most else shown


def octal_unescaped(field: str) -> str:
    """A field of mountinfo, swaps or fstab, in which white space and backslashes are written `\\040` (getmntent(3))."""
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
