# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sentences that name few of many."""

from __future__ import annotations

from vmcryptd.core.wording import few, question


def test_few_of_many() -> None:
    names = [f"v{number}" for number in range(40)]
    assert few([]) == ""
    assert few(names[:4]) == "v0, v1, v2, v3"
    assert few(names[:5]) == "v0, v1, v2 and 2 more"
    assert few(names) == "v0, v1, v2 and 37 more"


def test_questions() -> None:
    assert question(["a"], "/dev/a") == "Passphrase for volume a (/dev/a):"
    names = [f"v{number}" for number in range(40)]
    assert (
        question(names, "/dev/v0", "No. ") == "No. Passphrase for volumes v0, v1, v2 and 37 more:"
    )
