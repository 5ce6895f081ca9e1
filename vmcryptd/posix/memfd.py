# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys in memory, filled by splice(2), sendfile(2) or a child, never through Python.

The pages of a memfd belong to the daemon's control group, and `MemorySwapMax=0` in its unit keeps
them from swap. The command line has no such unit, and locks them itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import math
import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmcryptd.core.errors import KeyUnusableError, KeyWithdrawnError
from vmcryptd.posix.run import run
from vmcryptd.posix.threads import DaemonThreads

if TYPE_CHECKING:  # not imported at run time, for a fast command line
    import ctypes

    from vmcryptd.core.ports import Key

LIMIT = 8 * 1024 * 1024  # cryptsetup's limit for key files

# fcntl(2); the module has these names from Python 3.8 on only where the C library had them too.
F_GETPIPE_SZ, F_ADD_SEALS, F_GET_SEALS = 1032, 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8
MAP_FAILED = (1 << (8 * struct.calcsize("P"))) - 1  # (void *) -1, mmap(2)
SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3


class TooLargeError(Exception):
    """The key is larger than LIMIT; the caller names the key."""


class MemfdKey:
    """A key in a memfd: written once, sealed, then read by children only."""

    def __init__(self) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            self._fd = os.memfd_create("vmcryptd-key", flags | MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.memfd_create("vmcryptd-key", flags)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def fileno(self) -> int:
        """The writable descriptor, for the process that fills it."""
        if self._fd < 0:
            raise ValueError("the key is closed")
        return self._fd

    def seal(self) -> None:
        fcntl.fcntl(self.fileno(), F_ADD_SEALS, SEALS)

    def reader(self) -> int:
        if self._fd < 0:
            raise KeyWithdrawnError("the key was withdrawn before it was tried on all key slots")
        # Opened again, so that each child has its own offset.
        return os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class LockedKey(MemfdKey):
    """A key whose pages are locked, up to the process's limit, for processes that may be swapped.

    They are locked through a mapping that cannot be read, so that core dumps do not contain them.
    """

    def __init__(self) -> None:
        self._mapping: tuple[int, int] | None = None  # address, size
        super().__init__()

    def seal(self) -> None:
        super().seal()
        if not self.size or self._mapping is not None:
            return
        import mmap  # not needed for the start

        libc = _libc()
        # Private: before Linux 6.7 the kernel refuses a shared mapping of a sealed memfd.
        address = libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_PRIVATE, self.fileno(), 0)
        if address != MAP_FAILED:
            self._mapping = address, self.size
            libc.mlock(*self._mapping)
            libc.mprotect(*self._mapping, 0)

    def close(self) -> None:
        super().close()
        if self._mapping is not None:
            _libc().munmap(*self._mapping)
            self._mapping = None


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.mlock.argtypes = libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = [pointer, size, number]
    return libc


def send_file(fd: int, key: MemfdKey) -> None:
    while os.sendfile(key.fileno(), fd, None, LIMIT + 1):
        if key.size > LIMIT:
            raise TooLargeError


def send_start(source: MemfdKey, size: int, key: MemfdKey) -> None:
    """Copy the first `size` bytes of one key into another, inside the kernel."""
    fd = source.reader()
    try:
        while (left := size - key.size) > 0 and os.sendfile(key.fileno(), fd, None, left):
            pass
    finally:
        os.close(fd)


async def copy_from_caller(fd: int, key: MemfdKey) -> None:
    """Read a descriptor to its end; the caller bounds the time.

    Its O_NONBLOCK flag is shared with the sender, so it is neither trusted nor changed.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
        raise KeyUnusableError("the key is not open for reading")
    if _knows(fd, F_GETPIPE_SZ):
        await Pump(fd, key).run()
        return
    if _knows(fd, F_GET_SEALS):  # a memfd, or a file on tmpfs: reading it cannot block
        send_file(fd, key)
        return
    # Of a file on a server that is away, even this hangs.
    asked = os.dup(fd)
    mode = await DaemonThreads().call(math.inf, functools.partial(_mode, asked))
    if stat.S_ISDIR(mode):
        raise KeyUnusableError("the key is a directory; give a file, pipe or terminal")
    if stat.S_ISSOCK(mode):
        await Pump(fd, key).run()
    elif stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        # May block in the kernel (a dead server, a terminal): a child can be killed.
        done = await run(
            ["head", "-c", str(LIMIT + 1)], stdin=fd, stdout=key.fileno(), timeout_s=math.inf
        )
        if done.code != 0:
            raise KeyUnusableError(f"the key cannot be read: {done.complaint}")
        if key.size > LIMIT:
            raise TooLargeError
    else:
        raise KeyUnusableError("the key is nothing that can be read to an end; give a file or pipe")


def _knows(fd: int, command: int) -> bool:
    """Whether it is of the kind that fcntl(2) has the command for. Asks no file system."""
    try:
        fcntl.fcntl(fd, command)
    except OSError:
        return False
    return True


def _mode(fd: int) -> int:
    """Of the file; closes the descriptor."""
    try:
        return os.fstat(fd).st_mode
    finally:
        os.close(fd)


class Pump:
    """Moves a pipe's or a socket's content into a key, inside the kernel."""

    def __init__(self, source: int, key: MemfdKey) -> None:
        self._source = source
        self._key = key
        self._is_pipe = stat.S_ISFIFO(os.fstat(source).st_mode)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def ready() -> None:
            try:
                if not ended.done() and self.step():
                    ended.set_result(None)
            except Exception as error:  # noqa: BLE001 (handed on to the awaiting task)
                ended.set_exception(error)

        loop.add_reader(self._source, ready)
        try:
            await ended
        finally:
            loop.remove_reader(self._source)

    def step(self) -> bool:
        """Move the available data. True at its end."""
        while True:
            try:
                moved = self._splice()
            except BlockingIOError:
                return False
            if not moved:
                return True
            if self._key.size > LIMIT:
                raise TooLargeError

    def _splice(self) -> int:
        # SPLICE_F_NONBLOCK holds for this call only, whatever the description's O_NONBLOCK says.
        if self._is_pipe:
            return os.splice(self._source, self._key.fileno(), LIMIT, flags=os.SPLICE_F_NONBLOCK)
        # splice(2) needs a pipe on one side.
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            moved = os.splice(self._source, writer, LIMIT, flags=os.SPLICE_F_NONBLOCK)
            left = moved
            while left:
                left -= os.splice(reader, self._key.fileno(), left)
            return moved
        finally:
            os.close(reader)
            os.close(writer)


@contextlib.contextmanager
def readers(*keys: Key) -> Iterator[list[int]]:
    """A descriptor of each key, for one child or one call."""
    with contextlib.ExitStack() as opened:
        fds = []
        for key in keys:
            fds.append(key.reader())
            opened.callback(os.close, fds[-1])
        yield fds
