# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lock of the one process that may open and close this host's volumes.

The daemon holds it until it ends. `vmcryptctl shutdown` and `panic` take it before they do the daemon's work in their
own process. The kernel frees it whenever the holder dies (flock(2)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

from vmcryptd.core.errors import BusyError, DeadlineError, StorageError
from vmcryptd.posix.threads import DaemonThreads

PATH = Path("/run/vmcryptd/lock")
DAEMON = "vmcryptd"  # the role of the daemon as holder

_TEXT_BYTES = 64


class Holder(NamedTuple):
    """The process that holds the lock, as it has recorded itself."""

    role: str
    pid: int

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid})"


class HostLock:
    """One process's side of the lock."""

    def __init__(self, path: Path = PATH) -> None:
        self._path = path
        self._fd = -1

    def try_hold(self, role: str) -> bool:
        """Take the lock if it is free. Raises StorageError if there can be no lock."""
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                return False
            raise StorageError(f"{self._path} cannot be locked: {error.strerror}") from None
        self._take(fd, role)
        return True

    async def hold(self, role: str, timeout_s: float) -> None:
        """Take the lock, or wait until its holder ends. Raises BusyError that names the holder, StorageError."""
        if self.try_hold(role):
            return
        fd = self._open()
        try:
            await DaemonThreads().call(timeout_s, lambda: fcntl.flock(fd, fcntl.LOCK_EX))
        except DeadlineError:
            # The thread still waits on the descriptor, so it is not closed: the process is about to exit.
            raise BusyError(f"{self.holder() or 'another process'} holds {self._path}") from None
        self._take(fd, role)

    def holder(self) -> Holder | None:
        """The process that holds the lock now; None if it has not recorded itself yet."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_TEXT_BYTES)
        except OSError:
            return None
        match = re.fullmatch(rb"([a-z ]{1,32}) ([1-9][0-9]{0,9})\n", text)
        return Holder(match[1].decode("ascii"), int(match[2])) if match else None

    def kill_holder(self, spared_role: str) -> None:
        """Kill the process that holds the lock, unless it has this role. Its death closes no volume."""
        holder = self.holder()
        if holder is None or holder.role == spared_role:
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(holder.pid)
            try:
                # The lock is still taken after the pidfd was opened, so the pidfd is of the holder.
                if not self.try_hold(spared_role) and self.holder() == holder:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def release(self) -> None:
        """Free it. Harmless when it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            return os.open(self._path, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be opened: {error.strerror}") from None

    def _take(self, fd: int, role: str) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{role} {os.getpid()}\n".encode("ascii"), 0)
        self._fd = fd
