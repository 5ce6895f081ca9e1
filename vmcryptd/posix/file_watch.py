# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls a function again whenever files may have changed: inotify(7)."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    Inotify,
)
from vmcryptd.posix.threads import DaemonThreads

log = logging.getLogger(__name__)

T = TypeVar("T")

# Not IN_MODIFY: a file is read when its writer has closed it.
MASK = (
    IN_ATTRIB | IN_CLOSE_WRITE | IN_CREATE | IN_DELETE | IN_DELETE_SELF
    | IN_MOVED_FROM | IN_MOVED_TO | IN_MOVE_SELF
)  # fmt: skip

LOOK_S = 30.0
DRAINED = 64 * 1024


class FileWatch(Generic[T]):
    """Calls `look` in a thread at first and after each change, and `looked` in the loop with its result.

    `paths` are files and directories; for an absent one, its directory is watched.
    """

    def __init__(
        self,
        paths: Callable[[], Iterable[Path]],
        look: Callable[[], T],
        looked: Callable[[T], None],
    ) -> None:
        self._paths, self._look, self._looked = paths, look, looked
        self._threads = DaemonThreads()
        self._inotify = Inotify()
        self._is_stale = False
        self._hangs = False
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch from now on. Without inotify, the first look is the only one."""
        try:
            fd = self._inotify.open()
        except OSError as error:
            log.warning("changed files are not noticed: %s", error)
        else:
            asyncio.get_running_loop().add_reader(fd, self._read, fd)
        self.look_again()

    def look_again(self) -> None:
        self._is_stale = True
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._keep_looking())

    def close(self) -> None:
        """Watch no more."""
        if self._inotify.fd >= 0:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
        if self._looking is not None:
            self._looking.cancel()
        elif not self._hangs:
            self._inotify.close()
        self._inotify = Inotify()  # a running thread keeps the old instance

    def _read(self, fd: int) -> None:
        # The events are not evaluated: some may be lost. The files are read instead.
        os.read(fd, DRAINED)
        self.look_again()

    async def _keep_looking(self) -> None:
        try:
            while self._is_stale:
                self._is_stale = False
                look = functools.partial(_watched, self._inotify, list(self._paths()), self._look)
                try:
                    found = await self._threads.call(LOOK_S, look)
                except DeadlineError as error:
                    log.warning("changed files are not noticed: %s", error)
                    self._hangs = True
                    return
                if not self._is_stale:
                    self._looked(found)
        finally:
            self._looking = None


def _watched(inotify: Inotify, paths: Iterable[Path], look: Callable[[], T]) -> T:
    """Watch, then call `look`: a change during the call causes another one."""
    for path in paths if inotify.fd >= 0 else ():
        if inotify.add(path, MASK) is None:
            inotify.add(path.parent, MASK)
    return look()
