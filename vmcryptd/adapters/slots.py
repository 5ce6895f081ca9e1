# SPDX-License-Identifier: LGPL-2.1-or-later
"""The key slots of LUKS headers, by cryptsetup: a child for each step, the keys as its descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from vmcryptd.adapters.run import Completed, run
from vmcryptd.errors import (
    BusyError,
    DeviceMissingError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.model import VolumeSpec
from vmcryptd.ports import Key

DERIVATION_S = 600.0  # Argon2id on a slow, busy host

WRONG_KEY, OUT_OF_MEMORY, WRONG_DEVICE, BUSY = 2, 3, 4, 5  # cryptsetup(8), "RETURN CODES"
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


class CryptsetupSlots:
    """The port `Slots` on this host."""

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        # Tokens come first otherwise, and with a TPM's any passphrase would be right.
        argv = ["open", "--test-passphrase", "--disable-external-tokens", f"--key-slot={slot}"]
        try:
            await self._cryptsetup(argv, volume, key)
        except WrongKeyError:
            return False
        return True

    async def _cryptsetup(
        self, argv: list[str], volume: VolumeSpec, key: Key, *more: Key, then: str = ""
    ) -> None:
        """One action on the volume's header; `more` keys, then `then`, are its last arguments."""
        with _open(key, *more) as (fd, *fds):
            done = await run(
                [
                    "cryptsetup", *argv, "--batch-mode",
                    # Not "-": of standard input cryptsetup takes nothing at all for a key that needs no proof.
                    f"--key-file={_path(fd)}",
                    *([f"--header={volume.header}"] if volume.header else []),
                    "--", volume.device_path, *map(_path, fds), *([then] if then else []),
                ],
                fds=(fd, *fds),
                timeout_s=DERIVATION_S,
                expendable=True,
            )  # fmt: skip
        if done.code != 0:
            raise _failure(argv[0], done, volume)


@contextlib.contextmanager
def _open(*keys: Key) -> Iterator[list[int]]:
    """Readers of keys, for one child."""
    with contextlib.ExitStack() as opened:
        fds = []
        for key in keys:
            fds.append(key.reader())
            opened.callback(os.close, fds[-1])
        yield fds


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _failure(action: str, done: Completed, volume: VolumeSpec) -> VmcryptdError:
    """What a failed action means, with the next step."""
    name, place = volume.name, volume.header or volume.device_path
    if done.code == WRONG_KEY:
        return WrongKeyError(
            f"The key fits no key slot of {name} that it may be tried on: try another; "
            f"`vmcryptctl key list {name}` shows the key slots"
        )
    if done.code == OUT_OF_MEMORY or done.code in KILLED:
        return OutOfMemoryError(
            f"There was not enough memory to derive a key of {name}: free some, then try again; "
            f"`vmcryptctl key list {name}` shows how much each key slot needs"
        )
    if done.code == WRONG_DEVICE:
        return DeviceMissingError(
            f"The device {place} of {name} cannot be used: {done.complaint}; "
            f"`lsblk {place}` shows whether it is there"
        )
    if done.code == BUSY:
        return BusyError(f"{place} of {name} is busy: {done.complaint}; try again later")
    return StorageError(f"`cryptsetup {action}` of {place} failed, for {name}: {done.complaint}")
