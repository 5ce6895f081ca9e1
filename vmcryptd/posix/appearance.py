# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells when files appear that are not there yet: inotify(7) on the nearest directory of each that is."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import stat
import struct
from collections.abc import Callable, Container, Iterable

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.threads import PlaceThreads

log = logging.getLogger(__name__)

# sys/inotify.h
IN_CLOSE_WRITE, IN_MOVED_TO, IN_CREATE = 0x8, 0x80, 0x100
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_ONLYDIR, IN_ISDIR = 0x01000000, 0x40000000
MASK = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

ARMING_S = 10.0

Names = dict[
    int, dict[str, set[str]]
]  # watch → name below its directory → the awaited paths behind it


class Appearances:
    """Calls `appeared` when one of the awaited files may be there."""

    def __init__(self, appeared: Callable[[], None]) -> None:
        self._appeared = appeared
        self._threads = PlaceThreads()
        self._awaited: frozenset[str] = frozenset()
        self._context: object = None
        self._arming: asyncio.Task[None] | None = None
        self._is_stale = False
        self._fd = -1
        self._names: Names = {}
        self._unfinished: set[str] = set()  # files that their writers have not closed yet

    def await_(self, paths: Iterable[str], context: object = None) -> None:
        """Wait for these paths, which have no symbolic links, and for no others.

        `context`: anything that is different once a path may lead elsewhere, as the host's mounts are.
        """
        awaited = frozenset(paths)
        if (awaited, context) != (self._awaited, self._context):
            self._awaited, self._context = awaited, context
            self._arm()

    def close(self) -> None:
        """Wait no more."""
        if self._arming is not None:
            self._arming.cancel()
        self._disarm()

    def _disarm(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _arm(self) -> None:
        self._is_stale = True
        if self._arming is None:
            self._arming = asyncio.get_running_loop().create_task(self._keep_arming())

    async def _keep_arming(self) -> None:
        try:
            while self._is_stale:
                self._is_stale = False
                awaited, unfinished = self._awaited, frozenset(self._unfinished)
                self._disarm()
                if not awaited:
                    continue
                armed = _Armed()
                try:
                    # In a thread: the walk may meet a disk that does not answer.
                    arm = functools.partial(armed.on, awaited, unfinished)
                    is_there = await self._threads.call("", ARMING_S, arm)
                except (OSError, DeadlineError) as error:
                    log.warning("files that appear are not noticed: %s", error)
                    continue
                self._fd, self._names = armed.take()
                asyncio.get_running_loop().add_reader(self._fd, self._read)
                if is_there:
                    self._appeared()  # between the look and this
        finally:
            self._arming = None

    def _read(self) -> None:
        try:
            events = os.read(self._fd, 64 * 1024)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(events):
            watch, mask, _, length = EVENT.unpack_from(events, offset)
            offset += EVENT.size
            name = os.fsdecode(events[offset : offset + length].rstrip(b"\0"))
            offset += length
            paths = self._names.get(watch, {}).get(name, set())
            if not paths and name:
                continue  # another file's
            # Without a name: the directory itself is gone, or events were lost.
            if mask & IN_CREATE and not mask & IN_ISDIR:
                self._unfinished |= paths
            else:
                self._unfinished -= paths
                self._appeared()
            self._arm()


class _Armed:
    """An inotify instance that is being set up in a thread; closed there unless it is taken."""

    def __init__(self) -> None:
        self._fd = -1
        self._names: Names = {}

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def take(self) -> tuple[int, Names]:
        fd, self._fd = self._fd, -1
        return fd, self._names

    def on(self, paths: Iterable[str], unfinished: Container[str]) -> bool:
        """Whether one of the paths is there by now. Raises OSError."""
        import ctypes  # takes a while, and most hosts lack nothing

        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        for path in paths:
            directory, name = path, ""
            while directory != "/":
                directory, _, name = directory.rpartition("/")
                directory = directory or "/"
                watch = libc.inotify_add_watch(self._fd, os.fsencode(directory), MASK)
                if watch >= 0:
                    self._names.setdefault(watch, {}).setdefault(name, set()).add(path)
                    break
        return any(_is_there(path, path in unfinished) for path in paths)


def _is_there(path: str, is_new: bool) -> bool:
    """A new file of its own is none before its writer has closed it; links have no writer."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not (is_new and stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
