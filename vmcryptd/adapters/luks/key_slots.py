# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes key slots of LUKS headers with cryptsetup: a child for each step, which gets the keys as descriptors."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import AsyncIterator

from vmcryptd.adapters.luks.failures import failure
from vmcryptd.core import luks_header
from vmcryptd.core.errors import DamagedHeaderError, StorageError, VmcryptdError, WrongKeyError
from vmcryptd.core.model import VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.posix.files import sync_directory
from vmcryptd.posix.memfd import MemfdKey, readers, send_file
from vmcryptd.posix.run import run
from vmcryptd.posix.threads import DaemonThreads

DERIVATION_S = 600.0  # Argon2id on a slow, busy host
WRITING_S = 60.0

# The fewest iterations that cryptsetup allows: 512 random bits cannot be guessed.
KEY_SIZE = 64  # bytes
CHEAP = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000")
PRIORITIES = ("ignore", "normal", "prefer")


class CryptsetupSlots:
    """The port `Slots` on this host."""

    def __init__(self, runtime: str = "/run/vmcryptd", derivation: tuple[str, ...] = ()) -> None:
        self.runtime = runtime  # in memory, for root only
        self.derivation = derivation  # for passphrases; cryptsetup's own choice is Argon2id
        self._threads = DaemonThreads()

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        # Otherwise tokens are tried first, and a TPM's token would accept any passphrase.
        argv = ["open", "--test-passphrase", "--disable-external-tokens", f"--key-slot={slot}"]
        try:
            await self._cryptsetup(argv, volume, key)
        except WrongKeyError:
            return False
        return True

    async def add(
        self, volume: VolumeSpec, key: Key, new_key: Key, *, is_random: bool = False
    ) -> None:
        derivation = CHEAP if is_random else self.derivation
        argv = ["luksAddKey", "--disable-external-tokens", *derivation]
        await self._cryptsetup(argv, volume, key, new_key)

    async def remove(self, volume: VolumeSpec, slot: int, key: Key) -> None:
        argv = ["luksKillSlot", "--disable-external-tokens"]
        await self._cryptsetup(argv, volume, key, then=str(slot))

    async def prioritise(self, volume: VolumeSpec, slot: int, priority: int) -> None:
        argv = ["config", f"--key-slot={slot}", f"--priority={PRIORITIES[priority]}"]
        await self._keyless(argv, volume)

    async def remove_token(self, volume: VolumeSpec, token: int) -> None:
        await self._keyless(["token", "remove", f"--token-id={token}"], volume)

    async def finish_rotation(self, volume: VolumeSpec) -> None:
        async with self._copy(volume) as copy:
            try:
                _finish_rotation(copy)
            except DamagedHeaderError as error:
                raise StorageError(
                    f"volume {volume.name}: the rotation of its volume key cannot be finished: {error}"
                ) from None
            # cryptsetup checks the file and writes the header at once. After a crash here all of this is repeated.
            await self._keyless(["luksHeaderRestore", f"--header-backup-file={copy}"], volume)

    async def back_up(self, volume: VolumeSpec, fd: int) -> None:
        # cryptsetup insists on making its file. The caller opens the target file, so that the kernel checks the
        # caller's right to it.
        async with self._copy(volume) as copy:
            reader = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # When this returns the backup counts as made: it has to be on the disk.
                argv = ["dd", "bs=1M", "conv=fsync", "status=none"]
                done = await run(argv, stdin=reader, stdout=fd, timeout_s=WRITING_S)
            finally:
                os.close(reader)
        if done.code != 0:
            raise StorageError(
                f"volume {volume.name}: the backup of its header cannot be written: {done.complaint}"
            )

    async def make_key(self, path: str) -> Key:
        try:
            fd = await self._threads.call(WRITING_S, functools.partial(_new_file, path))
        except FileExistsError:
            raise StorageError(
                f"{path} is there already: `vmcryptctl key test VOLUME --key-file {path}` shows whether its key "
                "is in use; if it is not, remove the file"
            ) from None
        except OSError as error:
            raise StorageError(f"{path} cannot be made: {error.strerror}") from None
        key = MemfdKey()
        try:
            argv = [
                "dd",
                f"bs={KEY_SIZE}",
                "count=1",
                "iflag=fullblock",
                "conv=fsync",
                "status=none",
            ]
            done = await run([*argv, "if=/dev/urandom"], stdout=fd, timeout_s=WRITING_S)
            if done.code != 0:
                raise StorageError(f"{path} cannot be written: {done.complaint}")
            try:
                await self._threads.call(WRITING_S, functools.partial(_written, path, fd, key))
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {error.strerror}") from None
        except BaseException:
            key.close()
            with contextlib.suppress(VmcryptdError):
                await self.drop_key(path)
            raise
        finally:
            os.close(fd)
        return key

    async def drop_key(self, path: str) -> None:
        try:
            await self._threads.call(WRITING_S, functools.partial(os.unlink, path))
        except OSError as error:
            raise StorageError(f"{path} cannot be removed: {error.strerror}") from None

    @contextlib.asynccontextmanager
    async def _copy(self, volume: VolumeSpec) -> AsyncIterator[str]:
        """A temporary file with the header and its key slots. Raises StorageError, DeviceMissingError."""
        copy = f"{self.runtime}/header-{volume.name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)  # left by a daemon that was killed
        try:
            await self._keyless(["luksHeaderBackup", f"--header-backup-file={copy}"], volume)
            yield copy
        except OSError as error:
            raise StorageError(f"{copy} cannot be used: {error.strerror}") from None
        finally:
            # There is none if cryptsetup failed early.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(copy)

    async def _keyless(self, argv: list[str], volume: VolumeSpec) -> None:
        place = volume.header_path
        argv = ["cryptsetup", *argv, "--batch-mode", "--", place]
        done = await run(argv, timeout_s=WRITING_S)
        if done.code != 0:
            raise failure(argv[1], done, volume)

    async def _cryptsetup(
        self, argv: list[str], volume: VolumeSpec, key: Key, *more: Key, then: str = ""
    ) -> None:
        """One action on the volume's header; `more` keys, then `then`, are its last arguments."""
        with readers(key, *more) as (fd, *fds):
            done = await run(
                [
                    "cryptsetup", *argv, "--batch-mode",
                    # Not "-": cryptsetup reads nothing from standard input where it needs no proof.
                    f"--key-file={_path(fd)}",
                    *([f"--header={volume.header}"] if volume.header else []),
                    "--", volume.device_path, *map(_path, fds), *([then] if then else []),
                ],
                fds=(fd, *fds),
                timeout_s=DERIVATION_S,
                expendable=True,
            )  # fmt: skip
        if done.code != 0:
            raise failure(argv[0], done, volume)


def _new_file(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _written(path: str, fd: int, key: MemfdKey) -> None:
    """Put the new key file on disk under its name before a key slot uses it; the key is read back from there."""
    sync_directory(os.path.dirname(path))
    os.lseek(fd, 0, os.SEEK_SET)
    send_file(fd, key)
    if key.size != KEY_SIZE:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    key.seal()


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _finish_rotation(copy: str) -> None:
    """Change a copy of the header, in memory. Raises OSError, DamagedHeaderError."""
    with open(copy, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        written, areas = luks_header.rotation_finished(
            os.pread(file.fileno(), luks_header.WHOLE_SIZE, 0)
        )
        if any(not len(written) <= start <= start + length <= size for start, length in areas):
            raise DamagedHeaderError("an old key slot lies outside of the header")
        os.pwrite(file.fileno(), written, 0)
        for start, length in areas:
            os.pwrite(file.fileno(), bytes(length), start)
