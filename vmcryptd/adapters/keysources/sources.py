# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads keys from files, credentials, programs, people and callers into sealed memory, never into Python."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import stat
from collections.abc import Sequence

from vmcryptd.adapters.keysources import clevis
from vmcryptd.adapters.keysources.fetch import filled, run_into
from vmcryptd.core.errors import (
    CancelledError,
    DeadlineError,
    KeyFileMissingError,
    KeyUnavailableError,
    KeyUnusableError,
    NotYetError,
)
from vmcryptd.core.model import Header, KeySource, SourceKind, VolumeSpec
from vmcryptd.core.ports import Key
from vmcryptd.posix.memfd import MemfdKey, copy_from_caller, send_file
from vmcryptd.posix.run import CommandError, Completed, run
from vmcryptd.posix.threads import PlaceThreads

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
CREDENTIAL_STORES = (
    "/etc/credstore",
    "/run/credstore",
    "/usr/local/lib/credstore",
    "/usr/lib/credstore",
)
ENCRYPTED_STORES = tuple(f"{store}.encrypted" for store in CREDENTIAL_STORES)
ASKER_TRIES = 5  # askers in a row that may end early though no person declined


class SystemKeys:
    """The port `Keys` on this host."""

    def __init__(
        self,
        credentials: str | None = os.environ.get("CREDENTIALS_DIRECTORY"),
        stores: Sequence[str] = CREDENTIAL_STORES,
        encrypted_stores: Sequence[str] = ENCRYPTED_STORES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._stores = (*([credentials] if credentials else []), *stores)
        self._encrypted_stores = tuple(encrypted_stores)
        self._timeout_s = timeout_s
        self._threads = PlaceThreads()

    async def fetch(self, source: KeySource, volume: VolumeSpec) -> Key:
        match source.kind:
            case SourceKind.FILE:
                return await self._file(source.argument, private=True)
            case SourceKind.CREDENTIAL:
                return await self._credential(source.argument)
            case SourceKind.EXEC:
                return await self._exec(source.argument, volume)
        raise KeyUnavailableError(f"the key source {source.kind} gives no key by itself")

    async def bindings(self, volume: VolumeSpec, header: Header) -> tuple[int, ...]:
        return await clevis.bindings(volume, header)

    async def fetch_bound(self, volume: VolumeSpec, header: Header, slot: int) -> Key:
        return await clevis.fetch(volume, header, slot, self._timeout_s)

    async def ask(self, message: str) -> Key:
        if (
            not message.isprintable()
        ):  # a second line would be a second key of the agents' request file
            raise KeyUnavailableError("the question must be one line without control characters")
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            asked_at = loop.time()
            key, done = await self._ask_once(message)
            if done.code == 0 and key.size:
                key.seal()
                return key
            key.close()
            # systemd exits with 1 for every failure (src/ask-password/ask-password.c); only the
            # text tells ECANCELED, which is an agent's word for a person who declined. The locale
            # is ours.
            if done.code == 1 and "Operation canceled" in done.err:
                raise CancelledError("the question was declined")
            # An empty answer opens nothing, and an asker can be killed: ask again (systemd#13757),
            # but not for ever when asking ends at once each time.
            tries = tries + 1 if loop.time() - asked_at < 1.0 else 1
            if tries >= ASKER_TRIES:
                raise KeyUnavailableError(f"no person can be asked for a passphrase: {_why(done)}")
            log.info(
                "the question for a passphrase ended without an answer (%s); it is asked again",
                _why(done),
            )

    async def receive(self, fd: int) -> Key:
        what = "the key"
        try:
            with filled(what, KeyUnusableError) as key:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await copy_from_caller(fd, key)
                except TimeoutError:
                    raise KeyUnusableError(
                        f"{what} did not end within {self._timeout_s:g} s: "
                        "close the writing side after the key"
                    ) from None
            return key
        finally:
            os.close(fd)

    async def _file(self, path: str, *, private: bool) -> Key:
        if not path.startswith("/"):
            raise KeyUnavailableError(f"the key file {path} is not an absolute path; give one")
        read = functools.partial(_read_file, path, private=private)
        try:
            return await self._threads.call(path, self._timeout_s, read)
        except DeadlineError:
            raise KeyUnavailableError(
                f"the key file {path} has not been read in time; check its file system"
            ) from None

    async def _credential(self, name: str) -> Key:
        if not name or "/" in name or name in (".", "..") or not name.isprintable():
            raise KeyUnavailableError(f'"{name}" is not the name of a credential')
        if path := _find(self._stores, name):
            return await self._file(path, private=False)  # systemd protects the directory
        path = _find(self._encrypted_stores, name)
        if not path:
            raise KeyUnavailableError(
                f"there is no credential {name}; set it in vmcryptd.service "
                "(LoadCredentialEncrypted=) or put it into /etc/credstore.encrypted"
            )
        argv = ["systemd-creds", "decrypt", f"--name={name}", "--", path, "-"]
        with filled(f"the credential {path}", KeyUnavailableError) as key:
            done = await run(argv, stdout=key.fileno(), timeout_s=self._timeout_s)
            if done.code != 0:
                raise KeyUnavailableError(
                    f"the credential {path} cannot be decrypted: {done.complaint}"
                )
        return key

    async def _exec(self, command: str, volume: VolumeSpec) -> Key:
        import shlex  # not needed for the start

        try:
            argv = shlex.split(command)
        except ValueError as error:
            raise KeyUnavailableError(f"the key command is not well quoted: {error}") from None
        if not argv or not argv[0].startswith("/"):
            raise KeyUnavailableError("the key command needs a program with an absolute path")
        environment = {
            "VMCRYPTD_VOLUME": volume.name,
            "VMCRYPTD_DEVICE": volume.device_path,
            "VMCRYPTD_UUID": volume.uuid or "",
        }
        with filled(f"the output of {argv[0]}", KeyUnavailableError, NotYetError) as key:
            done = await run_into(
                key,
                argv,
                timeout_s=self._timeout_s,
                environment=environment,
                stderr_to_journal=True,
            )
            if done.code != 0:
                raise NotYetError(
                    f"the key command {argv[0]} failed: {done.reason}; `journalctl -u vmcryptd` has its messages"
                )
        return key

    async def _ask_once(self, message: str) -> tuple[MemfdKey, Completed]:
        # Without --accept-cached and --keyname nothing goes to or comes from the kernel's keyring.
        # On SIGTERM it removes its request (ask-password-api.c): a cancelled task leaves none.
        argv = [
            "systemd-ask-password", "--no-tty", "-n",
            "--id=vmcryptd",
            "--icon=drive-harddisk",
            "--timeout=0",
            "--", message,
        ]  # fmt: skip
        key = MemfdKey()
        try:
            return key, await run(argv, stdout=key.fileno(), timeout_s=math.inf)
        except CommandError as error:
            key.close()
            raise KeyUnavailableError(str(error)) from None
        except BaseException:
            key.close()
            raise


def _find(stores: Sequence[str], name: str) -> str:
    return next((path for store in stores if os.path.lexists(path := f"{store}/{name}")), "")


def _read_file(path: str, *, private: bool) -> MemfdKey:
    """A copy: the file may lie on a volume that is locked again while the key is still needed."""
    try:
        # O_NONBLOCK: a FIFO must not hang; it is refused below.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise KeyFileMissingError(
            f"the key file {path} is not there; it is tried when it appears"
        ) from None
    except OSError as error:
        raise KeyUnavailableError(
            f"the key file {path} cannot be opened: {error.strerror}"
        ) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise KeyUnavailableError(f"the key file {path} is not a regular file")
        if private and status.st_uid not in (0, os.geteuid()):
            raise KeyUnavailableError(
                f"the key file {path} does not belong to root; run `chown root {path}`"
            )
        if private and status.st_mode & 0o077:
            raise KeyUnavailableError(
                f"the key file {path} is open to others; run `chmod 600 {path}`"
            )
        with filled(f"the key file {path}", KeyUnavailableError) as key:
            send_file(fd, key)
        return key
    finally:
        os.close(fd)


def _why(done: Completed) -> str:
    return "the answer was empty" if done.code == 0 else done.complaint
