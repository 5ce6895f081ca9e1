# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a process as a future: pidfd_open(2). The process need not be a child."""

from __future__ import annotations

import asyncio
import os


def exit_of(pid: int) -> asyncio.Future[None]:
    """A future that is done when the process has exited; a child is a zombie then, and keeps its number until reaped.

    Cancel it to release its descriptor. Raises ProcessLookupError, and OSError if there is no free descriptor.
    """
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    exited: asyncio.Future[None] = loop.create_future()
    is_open = True

    def close() -> None:
        nonlocal is_open
        if is_open:
            is_open = False
            loop.remove_reader(pidfd)
            os.close(pidfd)

    def exit_() -> None:
        close()
        if not exited.done():
            exited.set_result(None)

    loop.add_reader(pidfd, exit_)
    exited.add_done_callback(lambda _: close())
    return exited
