# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers' operations with their keys: going down ends them, so that they have no effect afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

from vmcryptd.core.errors import OVERTAKEN, CancelledError
from vmcryptd.core.model import Infinity
from vmcryptd.engine.jobs import Jobs


class Operation:
    """One caller's task, from its call on, before its key has arrived."""

    def __init__(self, task: asyncio.Task[Any], volume: str) -> None:
        self.volume = volume  # that it is to open; empty if it opens none, or several
        self.ended = asyncio.Event()
        self._task = task
        self._cancelling = task.cancelling()
        self._changing = 0
        self._is_overtaken = False

    @property
    def is_changing(self) -> bool:
        """Whether it changes a header just now."""
        return self._changing > 0

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1

    def overtake(self) -> None:
        """Something that goes down ends it: its caller gets CancelledError."""
        if not self._is_overtaken:
            self._is_overtaken = True
            self._task.cancel()

    def was_overtaken(self) -> bool:
        """Whether the present cancellation comes from `overtake` alone."""
        return self._is_overtaken and self._task.uncancel() <= self._cancelling


class Operations:
    """All that are under way."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._running: dict[asyncio.Task[Any], Operation] = {}

    @property
    def volumes(self) -> set[str]:
        """The volumes that are to be opened, each by name."""
        return {operation.volume for operation in self._running.values() if operation.volume}

    @contextlib.contextmanager
    def begun(self, volume: str = "") -> Iterator[None]:
        """The current task works for a caller, to open this volume if one is given.

        Raises CancelledError when it is overtaken; BusyError, ShuttingDownError if it may not begin.
        """
        self._jobs.check_may_begin(rising=True)
        task = asyncio.current_task()
        assert task is not None
        operation = self._running[task] = Operation(task, volume)
        try:
            yield
        except asyncio.CancelledError:
            if operation.was_overtaken():
                raise CancelledError(OVERTAKEN) from None
            raise
        finally:
            del self._running[task]
            operation.ended.set()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The current task changes a header: of what goes down only panic breaks that off."""
        task = asyncio.current_task()
        operation = None if task is None else self._running.get(task)
        with operation.changing() if operation else contextlib.nullcontext():
            yield

    async def end_opening(self, volumes: Container[str]) -> None:
        """End those that are to open one of these."""
        await _end(one for one in self._running.values() if one.volume in volumes)

    async def end(self, timeout_s: float) -> None:
        """End all; those that change a header are waited for, for so long."""
        changing = [one for one in self._running.values() if one.is_changing]
        await _end(one for one in self._running.values() if not one.is_changing)
        await _ended(changing, timeout_s)
        await _end(changing)

    async def break_off(self, timeout_s: float) -> bool:
        """End all at once, whatever they do. False if some have not ended in this time."""
        await _end(self._running.values(), timeout_s)
        return not self._running


async def _end(operations: Iterable[Operation], timeout_s: float = Infinity) -> None:
    operations = list(operations)
    for operation in operations:
        operation.overtake()
    await _ended(operations, timeout_s)


async def _ended(operations: Iterable[Operation], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if timeout_s == Infinity else timeout_s):
            for operation in operations:
                await operation.ended.wait()
