# SPDX-License-Identifier: LGPL-2.1-or-later
"""A place whose call is late is silent until that returns, and not for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.threads import DaemonThreads, PlaceThreads


def test_a_turn_that_comes_free_too_late_leaves_no_silence() -> None:
    """On a starved machine the loop learns of the return and of the deadline at once."""

    async def test() -> None:
        threads = PlaceThreads()
        gate = threading.Event()
        first = asyncio.create_task(threads.call("disk", 60, gate.wait))
        await asyncio.sleep(0)
        second = asyncio.create_task(threads.call("disk", 0.05, lambda: None))
        await asyncio.sleep(0)
        gate.set()
        time.sleep(0.2)  # noqa: ASYNC251 (the loop is held up)
        assert await first
        with pytest.raises(DeadlineError):
            await second
        assert threads.silent == frozenset()
        assert await threads.call("disk", 60, lambda: "an answer") == "an answer"

    asyncio.run(test())


@pytest.mark.parametrize("kind", [PlaceThreads, DaemonThreads])
def test_an_error_that_comes_as_its_caller_is_cancelled(
    kind: type[PlaceThreads] | type[DaemonThreads],
) -> None:
    forgotten: list[object] = []
    done = threading.Event()

    def fail() -> None:
        try:
            raise OSError("no disk")
        finally:
            done.set()

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: forgotten.append(what))
        threads = kind()
        others = set(threading.enumerate())
        call = (
            threads.call("disk", 60, fail)
            if isinstance(threads, PlaceThreads)
            else threads.call(60, fail)
        )
        caller = asyncio.create_task(call)
        await asyncio.sleep(0)
        done.wait(60)
        for thread in set(threading.enumerate()) - others:
            thread.join(60)  # it has handed the error over
        loop.call_soon(caller.cancel)  # after the answer, before its caller runs
        await asyncio.wait({caller})
        assert caller.cancelled()
        del caller, threads, call
        gc.collect()

    asyncio.run(test())
    gc.collect()
    assert forgotten == []
