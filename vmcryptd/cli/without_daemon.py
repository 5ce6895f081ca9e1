# SPDX-License-Identifier: LGPL-2.1-or-later
"""`shutdown` and `panic` when the daemon or the bus is dead: the same engine in this process.

It never works beside a living daemon, because a daemon holds the host's lock. If the daemon is silent or restarting,
the first of its answer and the lock counts. If the bus is dead, a living daemon cannot answer: it is killed in the end,
which closes nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

from vmcryptd.cli.output import say
from vmcryptd.core.errors import EXIT_OK, BusyError, UnreachableError
from vmcryptd.core.model import Infinity
from vmcryptd.posix.host_lock import DAEMON, HostLock

# systemd kills a silent daemon after 30 s (WatchdogSec=), and its start takes seconds.
DAEMON_END_S = 120.0
# The kernel's time to end a killed process.
KILLED_S = 60.0


def go_down(verb: str, reason: str, again: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Returns the exit status. `again` asks the daemon once more. Raises VmcryptdError."""
    if os.geteuid() != 0:
        raise UnreachableError(f"{reason}; root can run `vmcryptctl {verb}` without it")
    lock = HostLock()
    try:
        code = asyncio.run(_answer(lock, verb, again))
        if code is not None:
            return code
        say(f"{reason}; stopping the guests and closing the volumes without it")
        from vmcryptd.daemon import down_here

        down_here(verb)
        return EXIT_OK
    finally:
        lock.release()


async def _answer(
    lock: HostLock, verb: str, again: Callable[[], Coroutine[Any, Any, int]]
) -> int | None:
    """The daemon's late answer; None once this process holds the lock. Raises VmcryptdError."""
    role = f"vmcryptctl {verb}"
    if lock.try_hold(role):
        return None
    say(f"{lock.holder() or 'vmcryptd'} runs, but does not answer; waiting until it does, or ends")
    if verb == "panic":
        _kill_holder(role)
    holding = asyncio.create_task(lock.hold(role, Infinity))
    answering = asyncio.create_task(again())
    try:
        await asyncio.wait({holding, answering}, return_when=asyncio.FIRST_COMPLETED)
        if not holding.done():
            try:
                return answering.result()
            except UnreachableError:
                pass
            await _until_free(holding, role)
        await holding
        return None
    finally:
        holding.cancel()
        answering.cancel()
        await asyncio.wait({holding, answering})


async def _until_free(holding: asyncio.Task[None], role: str) -> None:
    """Wait until the lock is ours, for as long as an unreachable daemon may take to end. Raises BusyError."""
    await asyncio.wait({holding}, timeout=DAEMON_END_S)
    if holding.done():
        return
    holder = HostLock().holder()
    if holder is not None and holder.role == DAEMON:
        say(f"{holder} cannot be reached, it is killed now")
        _kill_holder(role)
    await asyncio.wait({holding}, timeout=KILLED_S)
    if not holding.done():
        holder = HostLock().holder()
        raise BusyError(
            f"{holder or 'another process'} holds the lock of this host; "
            f"wait for its end, then run `{role}` again"
        )


def _kill_holder(role: str) -> None:
    # A separate lock, released at the end: kill_holder may get the lock, and must not keep it from the caller.
    lock = HostLock()
    try:
        lock.kill_holder(role)
    finally:
        lock.release()
