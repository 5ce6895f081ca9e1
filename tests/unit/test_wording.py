# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sentences that name few of many, and the style of the errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from vmcryptd.core.errors import subclasses
from vmcryptd.core.wording import few, question

PACKAGE = Path(__file__).resolve().parents[2] / "vmcryptd"
PROPER_NAMES = ("Clevis",)
# Expressions for the name of a volume or guest.
NAMES = ("name", "volume", "guest", "spec.name", "volume.name", "step.object", "self._spec.name")


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


def error_texts() -> Iterator[tuple[str, ast.expr]]:
    """Each text with which the package makes an error of ours, and where."""
    ours = {cls.__name__ for cls in subclasses().values()} | {"UsageError"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ours and node.args:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.args[0]


def test_errors_begin_in_lower_case_and_name_volumes_as_such() -> None:
    wrong, count = [], 0
    for place, text in error_texts():
        first = text.values[0] if isinstance(text, ast.JoinedStr) else text
        if isinstance(first, ast.Constant):
            count += 1
            said = str(first.value)
            if said[:1].isupper() and not said.startswith(PROPER_NAMES):
                wrong.append(f"{place}: {said}")
        elif isinstance(first, ast.FormattedValue):
            count += 1
            shown = ast.unparse(first.value)
            # A simulated host's are those of files.
            if shown in NAMES and not place.startswith("adapters/sim/"):
                wrong.append(f"{place}: {{{shown}}} without the word before it")
    assert count > 100
    assert not wrong
