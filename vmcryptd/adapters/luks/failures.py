# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translates cryptsetup's failures at a LUKS header into errors."""

from __future__ import annotations

import signal

from vmcryptd.core.errors import (
    BusyError,
    DeviceUnreadableError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
)
from vmcryptd.core.model import VolumeSpec
from vmcryptd.posix.run import Completed

WRONG_KEY, OUT_OF_MEMORY, WRONG_DEVICE, BUSY = 2, 3, 4, 5  # cryptsetup(8), "RETURN CODES"
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
# cryptsetup says these with another exit status: a key fits no slot, or one of two that it has to fit; a slot is
# gone since the header was read; a slot holds no key of the volume's data.
NO_USABLE_SLOT = "no usable keyslot"


def failure(action: str, done: Completed, volume: VolumeSpec) -> VmcryptdError:
    """The error of a failed action, with the next step."""
    name, place = volume.name, volume.header_path
    if done.code == WRONG_KEY or NO_USABLE_SLOT in done.err.lower():
        return WrongKeyError(
            f"volume {name}: the key fits no key slot; try another; "
            f"`vmcryptctl key list {name}` shows the key slots"
        )
    if done.code == OUT_OF_MEMORY or done.code in KILLED:
        return OutOfMemoryError(
            f"volume {name}: there was not enough memory to derive the key; free some, then try again; "
            f"`vmcryptctl key list {name}` shows how much each key slot needs"
        )
    if done.code == WRONG_DEVICE:
        return DeviceUnreadableError(
            f"volume {name}: the device {place} cannot be used: {done.complaint}; "
            f"`lsblk {place}` shows whether it is there"
        )
    if done.code == BUSY:
        return BusyError(f"volume {name}: {place} is busy: {done.complaint}; try again later")
    return StorageError(f"volume {name}: `cryptsetup {action}` of {place} failed: {done.complaint}")
