# SPDX-License-Identifier: LGPL-2.1-or-later
"""The caller for whom the running task works, for the journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Requester(NamedTuple):
    """A user; without a user id, vmcryptd itself."""

    uid: int = -1
    is_here: bool = False  # in this process, which is the command line's

    def __str__(self) -> str:
        if self.uid < 0:
            return "vmcryptd itself"
        return f"user {self.uid} {'by the command line' if self.is_here else 'over the bus'}"


# Set for each call on the bus, and inherited by its tasks.
REQUESTER: ContextVar[Requester] = ContextVar("REQUESTER", default=Requester())  # noqa: B039 (it is immutable)


@contextmanager
def by_itself() -> Iterator[None]:
    """vmcryptd itself asks for what is begun within: timers inherit the caller during whose call they were made."""
    token = REQUESTER.set(Requester())
    try:
        yield
    finally:
        REQUESTER.reset(token)
