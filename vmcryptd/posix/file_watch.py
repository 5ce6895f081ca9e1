# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks at files again whenever they may have changed: inotify(7)."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.threads import DaemonThreads

log = logging.getLogger(__name__)

T = TypeVar("T")

# sys/inotify.h. Not IN_MODIFY: a file that is being written is looked at when it is whole.
IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVE, IN_CREATE, IN_DELETE = 0x4, 0x8, 0xC0, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
MASK = IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVE | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF

LOOK_S = 30.0
DRAINED = 64 * 1024


class FileWatch(Generic[T]):
    """Calls `look` in a thread at first and after each change, and `looked` in the loop with its result.

    `paths` are files and directories; of one that is not there, the directory that it would lie in is watched.
    """

    def __init__(
        self,
        paths: Callable[[], Iterable[Path]],
        look: Callable[[], T],
        looked: Callable[[T], None],
    ) -> None:
        self._paths, self._look, self._looked = paths, look, looked
        self._threads = DaemonThreads()
        self._inotify = _Inotify()
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
        self._inotify = _Inotify()  # a thread that still looks has the other

    def _read(self, fd: int) -> None:
        # Whatever it was, the files tell more than the events, which may have been too many to be kept.
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


def _watched(inotify: _Inotify, paths: Iterable[Path], look: Callable[[], T]) -> T:
    """Watch first: what changes during the look is looked at again."""
    for path in paths:
        if not inotify.add(path):
            inotify.add(path.parent)
    return look()


class _Inotify:
    """One instance, closed when nothing refers to it any more, if not before."""

    def __init__(self) -> None:
        self.fd = -1

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def open(self) -> int:
        """Raises OSError."""
        import ctypes  # takes a while: after the start

        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return self.fd

    def add(self, path: Path) -> bool:
        """Whether it is there. Once more does no harm: the kernel knows the file by its inode."""
        if self.fd < 0:
            return True
        return bool(self._libc.inotify_add_watch(self.fd, os.fsencode(path), MASK) >= 0)
