# SPDX-License-Identifier: LGPL-2.1-or-later
"""A place whose call is late is silent until that returns, and not for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.threads import PlaceThreads


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
