# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes blocking calls that may never return, each in a daemon thread and bounded in time.

`asyncio.to_thread` is no alternative: its threads are joined when the process exits
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
    """Makes blocking calls, and abandons those that take too long."""

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
        thread = _start(loop, function, answer, lambda: None)
        try:
            return await _answer_of(answer, timeout_s)
        finally:
            if answer.cancelled():
                self._overdue.add(thread)


class PlaceThreads:
    """The same for calls to a place, such as a disk: one thread for each place at most.

    A place that does not answer takes no thread from the others, however many calls go to it. Its calls come one
    after the other.
    """

    def __init__(self) -> None:
        self.returned: Callable[[], None] = lambda: None  # a place that was silent has answered
        self._turns: dict[str, asyncio.Lock] = {}
        self._callers: dict[str, int] = {}
        self._silent: set[str] = set()

    @property
    def silent(self) -> frozenset[str]:
        """The places where a call has not returned in time, and has not until now."""
        return frozenset(self._silent)

    async def call(self, place: str, timeout_s: float, function: Callable[[], T]) -> T:
        """Raises what the function raises, and DeadlineError when there is no answer in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        turn = self._turns.setdefault(place, asyncio.Lock())
        self._callers[place] = self._callers.get(place, 0) + 1
        try:
            async with asyncio.timeout_at(None if math.isinf(timeout_s) else deadline):
                await turn.acquire()
        except TimeoutError:
            # If the turn has just become free, no thread is left whose return would end the silence.
            if turn.locked():
                self._silent.add(place)
            self._leave(place)
            raise DeadlineError(f"no answer within {timeout_s:g} s") from None
        except BaseException:
            self._leave(place)
            raise
        answer: asyncio.Future[T] = loop.create_future()

        def ended() -> None:
            turn.release()
            self._leave(place)
            if place in self._silent:
                self._silent.discard(place)
                self.returned()

        _start(loop, function, answer, ended)
        try:
            return await _answer_of(answer, deadline - loop.time(), timeout_s)
        except DeadlineError:
            if turn.locked():
                self._silent.add(place)
            raise

    def _leave(self, place: str) -> None:
        self._callers[place] -= 1
        if not self._callers[place]:
            del self._callers[place], self._turns[place]


def _start(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[], T],
    answer: asyncio.Future[T],
    ended: Callable[[], None],
) -> threading.Thread:
    """Call it in a thread. `ended` is called in the loop when it has returned, also after the deadline."""

    def deliver(result: T | None, error: BaseException | None) -> None:
        ended()
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
            answer.exception()  # read: a caller that is cancelled at this moment never does
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 (handed on to the awaiting task)
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(deliver, result, failure)
        # The error's traceback has this frame, which would keep it until a garbage collection.
        result = failure = None

    thread = threading.Thread(target=work, name="vmcryptd-blocking", daemon=True)
    thread.start()
    return thread


async def _answer_of(answer: asyncio.Future[T], timeout_s: float, told_s: float | None = None) -> T:
    """The result. The future is cancelled at the deadline, and DeadlineError raised."""
    bound = asyncio.timeout(None if math.isinf(timeout_s) else timeout_s)
    try:
        async with bound:
            return await answer
    except TimeoutError:
        if not bound.expired() or not answer.cancelled():
            return answer.result()  # the function's own error, or an answer at the last moment
        told_s = timeout_s if told_s is None else told_s
        raise DeadlineError(f"no answer within {told_s:g} s") from None
