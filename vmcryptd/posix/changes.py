# SPDX-License-Identifier: LGPL-2.1-or-later
"""A broadcast of changes without content: each receiver finds out what has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine


class Changes:
    """Wakes all waiting tasks and calls all watchers at every change."""

    def __init__(self) -> None:
        self._next = asyncio.Event()  # the next change: set once, and replaced
        self._watchers: list[Callable[[], None]] = []

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` at every change from now on, in the order of the calls of `watch`."""
        self._watchers.append(changed)

    def notify(self) -> None:
        """Something has changed."""
        changed, self._next = self._next, asyncio.Event()
        changed.set()
        for watcher in self._watchers:
            watcher()

    def wait(self) -> Coroutine[None, None, object]:
        """An awaitable for the next change.

        It counts from this call on, not from the start of a task that awaits it: a change in between may be the
        last one.
        """
        return self._next.wait()

    async def until(self, predicate: Callable[[], bool], timeout_s: float = math.inf) -> bool:
        """Wait until the condition holds; False when that took too long."""
        try:
            async with asyncio.timeout(None if math.isinf(timeout_s) else timeout_s):
                while not predicate():
                    await self._next.wait()
        except TimeoutError:
            return predicate()
        return True
