# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes new LUKS volumes on empty block devices, and in files that have no name before they are complete."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
from collections.abc import Callable

from vmcryptd.core import keystores
from vmcryptd.core.errors import BusyError, StorageError
from vmcryptd.core.ports import Key
from vmcryptd.posix.run import Completed, run
from vmcryptd.posix.threads import DaemonThreads

FORMAT_S, LOOK_S = 600.0, 60.0
MAPPINGS = "/dev/mapper"


class CryptsetupFormatting:
    """The port `Formatting`."""

    async def check_file(self, name: str, path: str) -> None:
        await _aside(lambda: _check_new_file(name, path))

    async def check_device(self, name: str, path: str) -> None:
        await _aside(lambda: _check_device(name, path))
        probed = await run(["blkid", "--probe", "--", path], timeout_s=LOOK_S)
        found = await run(["wipefs", "--no-act", "--noheadings", "--", path], timeout_s=LOOK_S)
        # 2: nothing found, blkid(8). Every other status, also an undecided one, is a refusal.
        if probed.code != 2 or found.code != 0 or found.out.strip():
            what = " ".join(found.out.split()) or probed.out.strip() or "unknown content"
            raise StorageError(
                f"{path} is not empty ({what}), so it is not formatted; if that is not needed any more, "
                f"`wipefs --all {path}` empties it"
            )

    async def new_file(self, path: str, size: int) -> int:
        made = _Made()
        try:
            return await DaemonThreads().call(FORMAT_S, lambda: made.new(path, size))
        except OSError as error:
            raise StorageError(f"{path} cannot be made: {_reason(error)}") from None
        except BaseException:
            made.give_up()
            raise

    async def name_file(self, fd: int, path: str) -> None:
        try:
            # Its own: the caller may close the other while a disk does not answer.
            await DaemonThreads().call(FORMAT_S, functools.partial(_name, os.dup(fd), path))
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise StorageError(f"{path} cannot be made: {_reason(error)}") from None

    async def format(self, place: str | int, uuid: str, key: Key) -> None:
        arguments = ["--type=luks2", f"--uuid={uuid}", "--", _path(place)]
        await self._with_key("luksFormat", arguments, place, key)

    async def open(self, place: str | int, name: str, key: Key) -> None:
        await self._with_key("open", ["--type=luks2", "--", _path(place), name], place, key)

    async def make_file_system(self, name: str) -> None:
        # No blocks are reserved for root: only root writes here.
        argv = ["mkfs.ext4", "-q", "-m", "0", f"{MAPPINGS}/{name}"]
        done = await run(argv, timeout_s=FORMAT_S)
        _demand(done, f"no file system can be made on the mapping {name}")

    async def take_back(self, place: str, uuid: str, *, is_file: bool) -> None:
        found = await run(["cryptsetup", "luksUUID", "--", place], timeout_s=LOOK_S)
        if found.code != 0 or found.out.strip() != uuid:
            return
        if is_file:
            with contextlib.suppress(FileNotFoundError):
                await DaemonThreads().call(LOOK_S, functools.partial(os.unlink, place))
            return
        wiped = await run(["wipefs", "--all", "--quiet", "--", place], timeout_s=LOOK_S)
        _demand(wiped, f"{place} cannot be emptied again; do that by `wipefs --all {place}`")

    async def _with_key(
        self, action: str, arguments: list[str], place: str | int, key: Key
    ) -> None:
        reader = key.reader()
        try:
            done = await run(
                ["cryptsetup", action, "--batch-mode", f"--key-file=/proc/self/fd/{reader}", *arguments],
                fds=[reader, *([place] if isinstance(place, int) else [])],
                timeout_s=FORMAT_S,
                expendable=True,
            )  # fmt: skip
        finally:
            os.close(reader)
        shown = place if isinstance(place, str) else "the new file"
        _demand(done, f"`cryptsetup {action}` of {shown} failed")


async def _aside(check: Callable[[], None]) -> None:
    """Run it in a thread: the disk or file system may not answer."""
    await DaemonThreads().call(LOOK_S, check)


def _check_new_file(name: str, path: str) -> None:
    _check_mapping(name)
    real = os.path.join(os.path.realpath(os.path.dirname(path)), "file")
    keystores.check_swept(name, real, keystores.SWEPT)
    if os.path.lexists(path):
        raise _exists(path)


def _check_device(name: str, path: str) -> None:
    _check_mapping(name)
    try:
        # O_EXCL: the kernel refuses a block device that is mounted or part of something.
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        kind = BusyError if error.errno == errno.EBUSY else StorageError
        text = f"{path} cannot be used: {error.strerror}; `lsblk {path}` tells more"
        raise kind(text) from None
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise StorageError(f"{path} is no block device; --file is for files")
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size < keystores.SMALLEST_BYTES:
        raise StorageError(f"{path} is too small for a keystore: 20 MiB are needed")


def _check_mapping(name: str) -> None:
    if os.path.lexists(f"{MAPPINGS}/{name}"):
        raise BusyError(f"volume {name}: a mapping has this name already; take another name")


def _path(place: str | int) -> str:
    return place if isinstance(place, str) else f"/proc/self/fd/{place}"


class _Made:
    """A file without a name, made in a thread that its caller may not wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1
        self._is_wanted = True

    def new(self, path: str, size: int) -> int:
        """Raises OSError."""
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        fd = os.open(os.path.dirname(path), flags, 0o600)
        try:
            # All blocks are allocated now: a disk that is full later must not fail writes into the keystore.
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
            with self._lock:
                if self._is_wanted:
                    self._fd = fd
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def give_up(self) -> None:
        """The caller is gone."""
        with self._lock:
            self._is_wanted = False
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _name(fd: int, path: str) -> None:
    """Closes the descriptor. Raises OSError."""
    try:
        os.fsync(fd)
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # It fails if the name exists by now. Python follows the link (linkat(2), AT_SYMLINK_FOLLOW) only with a
            # directory's descriptor.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=directory, follow_symlinks=True)
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        os.close(fd)


def _reason(error: OSError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
        return "its file system cannot hold files without a name (open(2), O_TMPFILE); use another"
    return os.strerror(error.errno) if error.errno else str(error)


def _exists(path: str) -> StorageError:
    return StorageError(f"{path} is there already; nothing is overwritten: name another file")


def _demand(done: Completed, failure: str) -> None:
    if done.code != 0:
        raise StorageError(f"{failure}: {done.complaint}")
