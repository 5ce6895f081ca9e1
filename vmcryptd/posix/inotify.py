# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7), for which Python's library has no call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# sys/inotify.h
IN_ATTRIB, IN_CLOSE_WRITE, IN_CREATE, IN_DELETE = 0x4, 0x8, 0x100, 0x200
IN_MOVED_FROM, IN_MOVED_TO = 0x40, 0x80
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_ONLYDIR, IN_ISDIR = 0x01000000, 0x40000000


class Inotify:
    """One instance, closed at the latest when it is garbage collected."""

    def __init__(self) -> None:
        self.fd = -1
        self._libc: Any = None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def open(self) -> int:
        """The descriptor that events are read from; it never blocks. Raises OSError."""
        import ctypes  # slow to import, and not needed at the start

        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return self.fd

    def add(self, path: str | Path, mask: int) -> int | None:
        """The watch's number; None if the path cannot be watched. May block, like any lookup of a path.

        Repeating it is harmless: the kernel identifies the file by its inode.
        """
        watch = int(self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask))
        return None if watch < 0 else watch
