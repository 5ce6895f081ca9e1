# SPDX-License-Identifier: LGPL-2.1-or-later
"""All errors that a user can see, each with its name on the bus and its exit status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PREFIX = "org.vmcryptd1.Error."

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_WRONG_KEY = 3
EXIT_NOT_AUTHORIZED = 4
EXIT_UNREACHABLE = 5
EXIT_WAITING = 6


class VmcryptdError(Exception):
    """One sentence: what happened to which object, and what to do next. Never holds a secret."""

    name = "Failed"
    exit_code = EXIT_FAILED

    @property
    def dbus_name(self) -> str:
        return PREFIX + self.name


class InternalError(VmcryptdError):
    """A fault of vmcryptd itself; the details are in the journal, not on the bus."""

    name = "Internal"


class Mistake(NamedTuple):
    """One mistake in the configuration.

    `line` and `hint` quote the file, so they are shown only to a user who may read it, and never sent over the bus or
    to the journal.
    """

    text: str  # file, line, table, key, and the expected value
    line: str = ""  # the line of the file
    hint: str = ""  # a correct line


class ConfigError(VmcryptdError):
    """The configuration was refused; the text names file, line, table and key of each mistake."""

    name = "Config"
    exit_code = EXIT_USAGE

    def __init__(self, text: str, mistakes: Sequence[Mistake] = ()) -> None:
        super().__init__(text)
        self.mistakes = tuple(mistakes) or (Mistake(text),)

    @classmethod
    def of(cls, mistakes: Sequence[Mistake]) -> ConfigError:
        return cls("; ".join(mistake.text for mistake in mistakes), mistakes)


class OptionError(VmcryptdError):
    """An option of a call is unknown, missing, or has a value that is refused; the text names it."""

    name = "InvalidOption"
    exit_code = EXIT_USAGE


class GraphError(ConfigError):
    """The dependencies are contradictory (a cycle, an unknown name); the text names the path."""


class GoalError(ConfigError):
    """The goal does not exist."""

    name = "InvalidGoal"


class NoSuchVolumeError(VmcryptdError):
    name = "NoSuchVolume"
    exit_code = EXIT_USAGE


class NoSuchGuestError(VmcryptdError):
    name = "NoSuchGuest"
    exit_code = EXIT_USAGE


class NoVolumeError(VmcryptdError):
    """The guest needs no configured volume, so vmcryptd does not start or stop it."""

    name = "NoVolume"
    exit_code = EXIT_USAGE


class WrongKeyError(VmcryptdError):
    """The key fits no key slot of the volume."""

    name = "WrongKey"
    exit_code = EXIT_WRONG_KEY


class NoSuchKeySlotError(VmcryptdError):
    name = "NoSuchKeySlot"
    exit_code = EXIT_USAGE


class LastKeyError(VmcryptdError):
    """The last key of a volume cannot be removed."""

    name = "LastKey"


class OtherKeysError(VmcryptdError):
    """Keys would be lost without permission; the text names their slots."""

    name = "OtherKeys"


class KeyUnavailableError(VmcryptdError):
    """No key source gave a key that fits, and no person may be asked."""

    name = "KeyUnavailable"


class NotAskedError(KeyUnavailableError):
    """A person is needed, but the caller allowed no question."""

    name = "NotAsked"
    exit_code = EXIT_WAITING


class KeyWithdrawnError(KeyUnavailableError):
    """The caller has withdrawn the key while it was being tried."""


class NotYetError(KeyUnavailableError):
    """A network or program source gave no key; it may later."""


class KeyFileMissingError(KeyUnavailableError):
    """A key file does not exist; it is tried when it appears."""


class WrongPinError(KeyUnavailableError):
    """A token has refused the PIN, or needs one."""


class KeyUnusableError(VmcryptdError):
    """A caller's key cannot be read: too large, too slow, not readable, empty."""

    name = "KeyUnusable"
    exit_code = EXIT_USAGE


class NotAuthorizedError(VmcryptdError):
    name = "NotAuthorized"
    exit_code = EXIT_NOT_AUTHORIZED


class UnreachableError(VmcryptdError):
    """The daemon, or the bus, cannot be reached."""

    name = "Unreachable"
    exit_code = EXIT_UNREACHABLE


class StillWaitingError(VmcryptdError):
    """Some volumes still wait for a key."""

    name = "StillWaiting"
    exit_code = EXIT_WAITING


class DeadlineError(VmcryptdError):
    """Something took longer than its time limit."""

    name = "Timeout"
    exit_code = EXIT_WAITING


class BusyError(VmcryptdError):
    """It is still in use; the text names the users."""

    name = "Busy"


class DeviceMissingError(VmcryptdError):
    name = "DeviceMissing"


class DeviceUnreadableError(DeviceMissingError):
    """The device or detached header exists, but does not answer or gives an error."""

    name = "DeviceUnreadable"


class NotLuksError(VmcryptdError):
    name = "NotLuks"


class DamagedHeaderError(NotLuksError):
    name = "DamagedHeader"


class WrongUuidError(VmcryptdError):
    """The LUKS header is not the one that the configuration names, or is another volume's."""

    name = "WrongUuid"


class AmbiguousDeviceError(VmcryptdError):
    """Several devices have the tag in a volume's `device`; the text names them."""

    name = "AmbiguousDevice"


class OutOfMemoryError(VmcryptdError):
    name = "OutOfMemory"


class DependencyError(VmcryptdError):
    """Not tried, because something it needs failed: `cause`, a volume, guest or pool, if known."""

    name = "DependencyFailed"

    def __init__(self, text: str, cause: str = "") -> None:
        super().__init__(text)
        self.cause = cause


class GuestError(VmcryptdError):
    """libvirt could not start or stop the guest, or bring up its pool."""

    name = "GuestFailed"


class GuestDiedError(GuestError):
    """The guest went down by itself, or cannot run on."""


class LibvirtError(VmcryptdError):
    """libvirt cannot be reached, or does not answer."""

    name = "LibvirtUnreachable"


class StorageError(VmcryptdError):
    """A volume group or mount on a volume could not be brought up or down."""

    name = "StorageFailed"


class ShuttingDownError(VmcryptdError):
    """The daemon is stopping; repeat the call when it is back."""

    name = "ShuttingDown"
    exit_code = EXIT_UNREACHABLE


OVERTAKEN = "another request (lock, shutdown or panic) overtook this one"


class CancelledError(VmcryptdError):
    """Another request (lock, shutdown, panic) has cancelled this one."""

    name = "Cancelled"


def subclasses(base: type[VmcryptdError] = VmcryptdError) -> dict[str, type[VmcryptdError]]:
    """Name on the bus → class, for all errors."""
    found = {PREFIX + base.name: base}
    for child in base.__subclasses__():
        for name, cls in subclasses(child).items():
            found.setdefault(name, cls)
    return found


def named(name: str, text: str) -> VmcryptdError:
    """The error of this name (`VmcryptdError.name`); of the base class if there is none."""
    return subclasses().get(PREFIX + name, VmcryptdError)(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or an empty string."""
    import difflib  # imported only after a typing error

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")
