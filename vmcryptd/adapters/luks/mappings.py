# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens and closes mappings with cryptsetup and dmsetup, a child for each (udisks#1489), and reads LUKS headers."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from vmcryptd.adapters.luks.failures import BUSY, KILLED, OUT_OF_MEMORY, WRONG_DEVICE, failure
from vmcryptd.adapters.luks.removal import Removal
from vmcryptd.core import luks_header
from vmcryptd.core.errors import (
    BusyError,
    DamagedHeaderError,
    DeadlineError,
    DeviceUnreadableError,
    KeyUnavailableError,
    KeyUnusableError,
    NotLuksError,
    NotYetError,
    StorageError,
    VmcryptdError,
    WrongPinError,
)
from vmcryptd.core.model import Header, Token, VolumeSpec
from vmcryptd.core.ports import Changed, Key
from vmcryptd.posix.run import Completed, run
from vmcryptd.posix.threads import PlaceThreads

log = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 600.0  # Argon2id on a slow, busy host, slot after slot
TOKEN_TIMEOUT_S = 90.0  # a security key that waits for a touch gives up before that
CLOSE_TIMEOUT_S = 30.0
CLOSE_TRIES = 3
DMSETUP_TIMEOUT_S = 10.0


class Cryptsetup:
    """The port `Crypt` on this host."""

    def __init__(
        self, removal: Removal | None = None, meminfo: Path = Path("/proc/meminfo")
    ) -> None:
        self.removal = removal or Removal()
        self.meminfo = meminfo
        self._threads = PlaceThreads()

    def watch(self, changed: Changed) -> None:
        self._threads.returned = changed

    def silent(self) -> frozenset[str]:
        return self._threads.silent

    async def header(self, volume: VolumeSpec) -> Header:
        name, path = volume.name, volume.header_path
        try:
            read = functools.partial(read_header, path)
            return await self._threads.call(path, HEADER_TIMEOUT_S, read)
        except DeadlineError:
            raise DeviceUnreadableError(
                f"volume {name}: {path} has not answered within {HEADER_TIMEOUT_S:g} s; see the kernel's messages for "
                "its disk (`journalctl -k`)"
            ) from None
        except OSError as error:
            raise DeviceUnreadableError(
                f"volume {name}: the header on {path} cannot be read: {error.strerror}; mend that, then "
                f"`vmcryptctl unlock {name}`"
            ) from None
        except DamagedHeaderError as error:
            return await self._second_opinion(volume, path, error)
        except NotLuksError as error:
            raise NotLuksError(
                f"volume {name}: {path} is no LUKS device: {error}; check `device` in the configuration"
            ) from None

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        # --disable-external-tokens: a TPM's token would be tried first, and any passphrase would "work".
        argv = [
            "cryptsetup", "open", "--type", "luks", "--batch-mode",
            "--key-file", "-",
            "--disable-external-tokens",
            *_slot(slot),
            *(["--allow-discards"] if volume.discard else []),
            *(["--header", volume.header] if volume.header else []),
            "--", _device(volume), volume.name,
        ]  # fmt: skip
        await self._with_key(argv, key, volume)

    async def resume(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None = None
    ) -> None:
        argv = [
            "cryptsetup", "luksResume", "--batch-mode",
            "--key-file", "-",
            "--disable-external-tokens",
            *_slot(slot),
            *(["--header", volume.header] if volume.header else []),
            "--", mapping,
        ]  # fmt: skip
        await self._with_key(argv, key, volume)

    async def open_by_token(
        self, volume: VolumeSpec, token: Token, pin: Key | None, suspended: str
    ) -> None:
        argv = [
            "cryptsetup", "luksResume" if suspended else "open",
            "--batch-mode",
            "--verbose",  # without it cryptsetup does not say what the token lacks
            "--token-only", f"--token-id={token.number}",
            *(["--allow-discards"] if volume.discard and not suspended else []),
            *(["--header", volume.header] if volume.header else []),
            "--", *([suspended] if suspended else [_device(volume), volume.name]),
        ]  # fmt: skip
        await self._with_pin(argv, pin, volume, token)

    async def rename(self, mapping: str, name: str) -> None:
        done = await run(["dmsetup", "rename", "--", mapping, name], timeout_s=DMSETUP_TIMEOUT_S)
        if done.code != 0:
            raise StorageError(f"the mapping {mapping} cannot be renamed: {done.complaint}")

    async def close(self, mapping: str) -> None:
        try:
            if await self.removal.attempt(mapping):
                return None
        except DeadlineError:
            return await self._close_without_udev(mapping)
        await self._close(mapping)
        # cryptsetup removes them, too, but not while udev reads one.
        for device in self.removal.left_behind(mapping):
            remove = ["dmsetup", "remove", "--retry", "--", device]
            done = await run(remove, timeout_s=CLOSE_TIMEOUT_S)
            if done.code != 0 and self.is_active(device):
                raise BusyError(
                    f"volume {mapping}: the mapping {device}, which a killed key rotation left, is still in use; "
                    "stop what uses it"
                )
        return None

    async def _close(self, mapping: str) -> None:
        complaint = ""
        for attempt in range(CLOSE_TRIES):
            if attempt:
                # udev may be reading it (systemd#33129).
                await _attempt(["udevadm", "settle", "--timeout=5"], 10.0)
            try:
                done = await run(
                    ["cryptsetup", "close", "--batch-mode", "--", mapping],
                    timeout_s=CLOSE_TIMEOUT_S,
                )
            except DeadlineError:
                return await self._close_without_udev(mapping)
            if done.code in (0, WRONG_DEVICE):
                return None
            complaint = done.complaint
            if done.code != BUSY and self.is_active(mapping):
                raise StorageError(
                    f"volume {mapping}: cryptsetup cannot close the mapping: {complaint}"
                )
            if done.code != BUSY:
                return None
        raise BusyError(f"volume {mapping}: the mapping is still in use")

    async def wipe(self, mapping: str) -> None:
        for device in (mapping, *self.removal.left_behind(mapping)):
            if self.is_active(device):
                await self._wipe(device)

    def available_memory_kib(self) -> int:
        try:
            for line in self.meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1])
        except (OSError, ValueError, IndexError) as error:
            log.warning("the available memory is not known: %s", error)
        return 0

    def is_active(self, mapping: str) -> bool:
        return mapping in self.removal.present()

    async def _wipe(self, device: str) -> None:
        """Like luksSuspend, but without flushing the file system above, which may never end."""
        suspend = ["dmsetup", "suspend", "--nolockfs", "--noflush", "--", device]
        await _attempt(suspend, DMSETUP_TIMEOUT_S)
        table = await run(["dmsetup", "table", "--", device], timeout_s=DMSETUP_TIMEOUT_S)
        # A half rotated volume has two parts, each with its key.
        parts = [line.split() for line in table.out.splitlines()]
        messages = [
            ["dmsetup", "message", "--", device, start, "key", "wipe"]
            for start, _, kind, *_ in parts
            if kind == "crypt"
        ]
        for done in [
            table,
            *[await run(message, timeout_s=DMSETUP_TIMEOUT_S) for message in messages],
        ]:
            if done.code != 0 and self.is_active(device):
                raise StorageError(f"volume {device}: the key cannot be wiped: {done.complaint}")

    async def _with_key(self, argv: Sequence[str], key: Key, volume: VolumeSpec) -> None:
        reader = key.reader()
        try:
            done = await run(argv, stdin=reader, timeout_s=OPEN_TIMEOUT_S, expendable=True)
        finally:
            os.close(reader)
        if done.code != 0:
            raise open_failure(done, volume)

    async def _with_pin(
        self, argv: Sequence[str], pin: Key | None, volume: VolumeSpec, token: Token
    ) -> None:
        # Without --key-file cryptsetup reads a PIN from standard input, up to the end of the line (utils_password.c).
        reader = pin.reader() if pin else None
        try:
            done = await run(argv, stdin=reader, timeout_s=TOKEN_TIMEOUT_S, expendable=True)
        except DeadlineError:
            raise KeyUnavailableError(
                f"{token.title} did not answer within {TOKEN_TIMEOUT_S:g} s; touch it when it blinks"
            ) from None
        finally:
            if reader is not None:
                os.close(reader)
        if done.code != 0:
            raise token_failure(done, volume, token, has_pin=pin is not None)

    async def _close_without_udev(self, mapping: str) -> None:
        """Without udevd, cryptsetup and dmsetup wait for ever for a cookie that only it completes (systemd#43368)."""
        if not self.is_active(mapping):
            return  # the mapping is gone; only the wait for udev timed out
        log.warning(
            "volume %s: closing it hangs, systemd-udevd may be dead; it is removed without udev",
            mapping,
        )
        done = await run(
            ["dmsetup", "remove", "--noudevsync", "--", mapping], timeout_s=CLOSE_TIMEOUT_S
        )
        if done.code != 0 and self.is_active(mapping):
            raise BusyError(f"volume {mapping}: the mapping is still in use")

    async def _second_opinion(
        self, volume: VolumeSpec, path: str, damage: DamagedHeaderError
    ) -> Header:
        """Ask cryptsetup, which knows more checksums and repairs than the parser here; its answer counts."""
        dump, uuid = await asyncio.gather(
            run(
                ["cryptsetup", "luksDump", "--dump-json-metadata", "--", path],
                timeout_s=HEADER_TIMEOUT_S,
            ),
            run(["cryptsetup", "luksUUID", "--", path], timeout_s=HEADER_TIMEOUT_S),
        )
        if dump.code == 0 and uuid.code == 0:
            try:
                return luks_header.header(uuid.out.strip().lower(), json.loads(dump.out))
            except (ValueError, RecursionError, DamagedHeaderError) as error:
                log.info("cryptsetup's dump of %s is not understood: %s", path, error)
        raise DamagedHeaderError(
            f"volume {volume.name}: the LUKS header on {path} is damaged: {damage}; "
            f"`cryptsetup repair {path}` or a backup (`cryptsetup luksHeaderRestore`) may help"
        )


def read_header(path: str) -> Header:
    """Blocks. Raises OSError, NotLuksError, DamagedHeaderError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    failure = NotLuksError("nothing was read")
    try:
        for size in (luks_header.USUAL_SIZE, luks_header.WHOLE_SIZE):
            try:
                return luks_header.parse(_read(fd, size))
            except NotLuksError as error:
                # A new error without traceback: errors are kept, and the traceback would keep all data that was read.
                failure = type(error)(str(error))
    finally:
        os.close(fd)
    raise failure


def open_failure(done: Completed, volume: VolumeSpec) -> VmcryptdError:
    """The error of a failed `open` or `luksResume`, with the next step."""
    said, name = done.err.lower(), volume.name
    if done.code == BUSY:
        return BusyError(
            f"volume {name}: it cannot be opened: {done.complaint}; "
            f"`dmsetup info {name}` and `lsblk {volume.device_path}` show who has it"
        )
    if "not a valid luks device" in said:
        place = volume.header_path
        return NotLuksError(
            f"volume {name}: {place} is no LUKS device; `blkid -p {place}` shows what it is"
        )
    if "nothing to read on input" in said:
        return KeyUnusableError(f"volume {name}: the key is empty; give another one")
    return failure("open", done, volume)


# Messages of cryptsetup (utils_tools.c, tools_token_error_msg) and of systemd's plugins, and their meaning.
TOKEN_COMPLAINTS = (
    ("lockout", "its device has locked itself after wrong PINs: wait, or clear that with its own tools"),
    ("wrong keyslot passphrase", "what it gives does not fit its key slot any more: enroll it again"),
)  # fmt: skip

# From cryptsetup for security keys, from systemd for a TPM, and from the TPM's library (TPM2_RC_AUTH_FAIL). Before
# version 258 systemd only says that the TPM has failed, as it does for a cleared one. Asking again is right in both
# cases, and is bounded.
WRONG_PIN = (
    "with this pin",
    "bad pin",
    "authorization hmac check failed",
    "using tpm2: state not recoverable",
)


def token_failure(
    done: Completed, volume: VolumeSpec, token: Token, *, has_pin: bool
) -> VmcryptdError:
    """The error of a failed `open --token-only` or `luksResume --token-only`, with the next step."""
    said = f"{done.out}\n{done.err}".lower()
    place = volume.header_path
    if done.code == OUT_OF_MEMORY or done.code in KILLED or "already exists" in said:
        return open_failure(done, volume)
    if "requires pin" in said and not has_pin:
        return WrongPinError(f"{token.title} wants a PIN")
    if "requires additional missing resource" in said:
        return NotYetError(f"{token.title} does not open it: its device is not there, connect it")
    for words, meaning in TOKEN_COMPLAINTS:
        if words in said.replace("lock-out", "lockout"):
            return KeyUnavailableError(f"{token.title} does not open it: {meaning}")
    if has_pin and any(words in said for words in WRONG_PIN):
        return WrongPinError(f"{token.title} does not take this PIN")
    if done.err.strip():
        return KeyUnavailableError(f"{token.title} does not open it: {done.complaint}")
    if "no usable token" in said:
        return KeyUnavailableError(
            f"{token.title} does not open it: cryptsetup has no plugin for {token.kind} "
            f"(Debian: systemd-cryptsetup), or that does not accept it; "
            f"`cryptsetup open --debug --test-passphrase --token-only {place}` tells more"
        )
    return KeyUnavailableError(
        f"{token.title} does not open it: cryptsetup ended with {done.reason}"
    )


def _device(volume: VolumeSpec) -> str:
    """The path to open."""
    # Resolved now: the kernel follows the path after the key derivation, when a tag's link may lead to a copy.
    return os.path.realpath(volume.device_path) if volume.has_tag else volume.device_path


def _slot(number: int | None) -> list[str]:
    return [] if number is None else [f"--key-slot={number}"]


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        block = os.pread(fd, size - len(data), len(data))
        if not block:
            break
        data += block
    return bytes(data)


async def _attempt(argv: Sequence[str], timeout_s: float) -> None:
    """A step whose failure does not change the following steps."""
    try:
        done = await run(argv, timeout_s=timeout_s)
    except VmcryptdError as error:
        log.info("%s", error)
        return
    if done.code != 0:
        log.info("%s failed: %s", " ".join(argv), done.complaint)
