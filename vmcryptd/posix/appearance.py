# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports the appearance of absent files: inotify(7) on the nearest existing directory of each."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import stat
import struct
from collections.abc import Callable, Container, Iterable

from vmcryptd.core.errors import DeadlineError
from vmcryptd.posix.inotify import (
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE_SELF,
    IN_ISDIR,
    IN_MOVE_SELF,
    IN_MOVED_TO,
    IN_ONLYDIR,
    Inotify,
)
from vmcryptd.posix.threads import PlaceThreads

log = logging.getLogger(__name__)

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
        self._inotify = Inotify()
        self._names: Names = {}
        self._unfinished: set[str] = set()  # files that their writers have not closed yet

    def await_(self, paths: Iterable[str], context: object = None) -> None:
        """Wait for these paths, which have no symbolic links, and for no others.

        `context`: a value that changes when a path may lead elsewhere, such as the host's mounts.
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
        if self._inotify.fd >= 0:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()

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
                inotify = Inotify()  # a hanging thread keeps its own instance
                try:
                    # In a thread: the lookup may reach a disk that hangs.
                    arm = functools.partial(_armed, inotify, awaited, unfinished)
                    self._names, is_there = await self._threads.call("", ARMING_S, arm)
                except (OSError, DeadlineError) as error:
                    log.warning("files that appear are not noticed: %s", error)
                    continue
                self._inotify = inotify
                asyncio.get_running_loop().add_reader(inotify.fd, self._read)
                if is_there:
                    self._appeared()  # between the look and this
        finally:
            self._arming = None

    def _read(self) -> None:
        try:
            events = os.read(self._inotify.fd, 64 * 1024)
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


def _armed(
    inotify: Inotify, paths: Iterable[str], unfinished: Container[str]
) -> tuple[Names, bool]:
    """Watch the nearest directory of each path. Returns also whether one of the paths exists. Raises OSError."""
    inotify.open()
    names: Names = {}
    for path in paths:
        directory, name = path, ""
        while directory != "/":
            directory, _, name = directory.rpartition("/")
            directory = directory or "/"
            if (watch := inotify.add(directory, MASK)) is not None:
                names.setdefault(watch, {}).setdefault(name, set()).add(path)
                break
    return names, any(_is_there(path, path in unfinished) for path in paths)


def _is_there(path: str, is_new: bool) -> bool:
    """Whether the file exists. A new file counts when its writer has closed it; links have no writer."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not (is_new and stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
