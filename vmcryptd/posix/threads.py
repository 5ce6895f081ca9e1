# SPDX-License-Identifier: LGPL-2.1-or-later
"""Blocking calls that may never return, each in a daemon thread and bounded in time.

`asyncio.to_thread` will not do: its threads are joined when the process exits
(https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.shutdown_default_executor),
so one call that hangs would keep the daemon from stopping.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from typing import TypeVar

from vmcryptd.core.errors import DeadlineError

T = TypeVar("T")


class DaemonThreads:
    """Makes blocking calls, and leaves behind those that take too long."""

    def __init__(self, most_overdue: int = 16) -> None:
        self._most_overdue = most_overdue
        self._overdue: set[threading.Thread] = set()

    async def call(self, timeout_s: float, function: Callable[[], T]) -> T:
        """Raises what the function raises, and DeadlineError when there is no answer in time."""
        self._overdue = {thread for thread in self._overdue if thread.is_alive()}
        if len(self._overdue) >= self._most_overdue:
            raise DeadlineError(f"{len(self._overdue)} earlier calls have not returned yet")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result, failure = None, None
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 (handed on to the awaiting task)
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(deliver, result, failure)
            # The error's traceback has this frame, which would keep it until a garbage collection.
            result = failure = None

        thread = threading.Thread(target=work, name="vmcryptd-blocking", daemon=True)
        thread.start()
        bound = asyncio.timeout(None if math.isinf(timeout_s) else timeout_s)
        try:
            async with bound:
                return await answer
        except TimeoutError:
            if not bound.expired() or not answer.cancelled():
                return answer.result()  # the function's own error, or an answer at the last moment
            raise DeadlineError(f"no answer within {timeout_s:g} s") from None
        finally:
            if answer.cancelled():
                self._overdue.add(thread)
