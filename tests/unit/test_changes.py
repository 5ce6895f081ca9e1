# SPDX-License-Identifier: LGPL-2.1-or-later
"""No change is missed by a task that waits for one, and none wakes a task twice."""

from __future__ import annotations

import asyncio
import math

from vmcryptd.posix.changes import Changes


async def scene_of_waits(changes: Changes) -> None:
    seen: list[str] = []
    changes.watch(lambda: seen.append("first"))
    changes.watch(lambda: seen.append("second"))
    waiting = asyncio.ensure_future(changes.wait())
    changes.notify()  # before the task has run for the first time
    async with asyncio.timeout(30):
        await waiting
    assert seen == ["first", "second"]
    later = asyncio.ensure_future(changes.wait())
    await asyncio.sleep(0)
    assert not later.done()
    later.cancel()


def test_a_change_before_the_task_runs_counts() -> None:
    async def scene() -> None:
        await scene_of_waits(Changes())

    asyncio.run(scene())


def test_until() -> None:
    async def scene() -> None:
        changes, values = Changes(), [0]
        waiting = asyncio.ensure_future(changes.until(lambda: values[0] == 2, math.inf))
        for value in (1, 2):
            await asyncio.sleep(0)
            assert not waiting.done()
            values[0] = value
            changes.notify()
        async with asyncio.timeout(30):
            assert await waiting
        assert not await changes.until(lambda: values[0] == 3, 0.001)
        # It became so without a notice, and is looked at once more at the end.
        assert await changes.until(lambda: values.append(0) or len(values) > 2, 0.001)

    asyncio.run(scene())
