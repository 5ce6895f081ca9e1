# SPDX-License-Identifier: LGPL-2.1-or-later
"""Goals as text: what callers write is what they read back, and nothing else is a goal."""

import pytest

from vmcryptd.core.errors import GoalError
from vmcryptd.core.goals import BOOT, LOCK_ALL, SHUTDOWN, Action, Goal, StepId, Verb


@pytest.mark.parametrize(
    "text",
    ["boot", "shutdown", "lock-all", "unlock:a", "lock:cr.imap-1", "start:g", "stop:x:y"],
)
def test_there_and_back(text: str) -> None:
    assert str(Goal.parse(text)) == text


def test_what_it_is_read_as() -> None:
    assert [Goal.parse(text) for text in ("boot", "shutdown", "lock-all")] == [
        BOOT, SHUTDOWN, LOCK_ALL,
    ]  # fmt: skip
    assert Goal.parse("stop:x:y") == Goal(Verb.STOP, "x:y")
    assert str(StepId(Action.START_POOL, "p")) == "start-pool:p"


@pytest.mark.parametrize("text", ["", "up", "late:a", "rotate:a", "unlocking:a", "boot:x", ":a"])
def test_no_goals(text: str) -> None:
    with pytest.raises(GoalError, match="is no goal; expected one of boot, shutdown, lock-all, "):
        Goal.parse(text)
