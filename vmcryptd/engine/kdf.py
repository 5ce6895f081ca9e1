# SPDX-License-Identifier: LGPL-2.1-or-later
"""Key derivations side by side, as far as memory and cores allow; what most waits for goes first.

An Argon2id key slot may ask for 1 GiB and all cores, per volume: opening all at once calls the OOM killer
(systemd pull request 12124), one after another takes minutes (systemd issue 19161).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from vmcryptd.core.graph import Graph
from vmcryptd.core.model import Unlock


@dataclass(order=True)
class _Waiting:
    place: tuple[int, int]  # the highest first, then in order of arrival
    memory_kib: int = field(compare=False)
    share: float = field(compare=False)
    may_start: asyncio.Future[None] = field(compare=False)


class KdfBudget:
    """Lets key derivations run side by side as far as memory and cores allow; a single one always runs."""

    def __init__(self, available_kib: Callable[[], int], cores: int = os.cpu_count() or 1) -> None:
        self._available_kib = available_kib
        self._cores = cores
        self._idle_kib = 0
        self._used_kib = 0
        self._running = 0
        self._waiting: list[_Waiting] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def take(self, memory_kib: int, share: float, height: int = 0) -> AsyncIterator[None]:
        """Hold `memory_kib`, once that fits into `share` of what is available.

        `height`: how long a chain of volumes waits for this one.
        """
        may_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = _Waiting((-height, next(self._arrivals)), memory_kib, share, may_start)
        bisect.insort(self._waiting, entry)
        self._start()
        try:
            await may_start
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self._end(memory_kib)  # it had just been let in
            raise
        try:
            yield
        finally:
            self._end(memory_kib)

    def _end(self, memory_kib: int) -> None:
        self._used_kib -= memory_kib
        self._running -= 1
        self._start()

    def _start(self) -> None:
        """Let in who fits, in order. A small one may pass a large one that has to wait for memory."""
        if not self._waiting or self._running >= self._cores:
            return
        available_kib = self._available_kib()
        for entry in list(self._waiting):
            if self._running >= self._cores:
                return
            if self._fits(entry.memory_kib, entry.share, available_kib):
                self._waiting.remove(entry)
                self._used_kib += entry.memory_kib
                self._running += 1
                # Cancelled just now: `take` gives it back as soon as its task runs.
                if not entry.may_start.cancelled():
                    entry.may_start.set_result(None)

    def _fits(self, memory_kib: int, share: float, available_kib: int) -> bool:
        if self._running == 0:
            # Measured while nothing runs: one that has just started has not yet taken what it is going to take.
            self._idle_kib = available_kib
            return True
        return self._used_kib + memory_kib <= self._idle_kib * share and memory_kib <= available_kib


def heights(graph: Graph) -> dict[str, int]:
    """How many volumes wait one behind the other for each that is closed."""
    closed = [
        name
        for name, node in graph.volumes.items()
        if not node.is_usable and node.spec.unlock is not Unlock.MANUAL
    ]
    found: dict[str, int] = {}
    for name in reversed(graph.beneath(closed)):
        for lower in graph.volumes[name].needs:
            found[lower] = max(found.get(lower, 0), found.get(name, 0) + 1)
    return found
