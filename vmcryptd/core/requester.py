# SPDX-License-Identifier: LGPL-2.1-or-later
"""The caller for whom the running task works, for the journal."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class Requester(NamedTuple):
    """A user on the bus; without a user id, vmcryptd itself."""

    uid: int = -1

    def __str__(self) -> str:
        return "vmcryptd itself" if self.uid < 0 else f"user {self.uid} over the bus"


# Set for each call on the bus, and inherited by its tasks.
REQUESTER: ContextVar[Requester] = ContextVar("REQUESTER", default=Requester())  # noqa: B039 (it is immutable)
