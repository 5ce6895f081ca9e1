# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interfaces through which the engine acts on the host. `adapters/` implements them, `adapters/sim/` in memory.

Every method raises errors of `vmcryptd.core.errors` only. A key is always a `Key`: a descriptor that children read,
never its content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vmcryptd.core.keystores import Making
from vmcryptd.core.model import (
    DiskSource,
    GuestSpec,
    Header,
    KeySource,
    Storage,
    Token,
    Virtualisation,
    VolumeSpec,
)

Changed = Callable[[], None]  # something has changed, look again; called in the event loop
OnProgress = Callable[[float], None]  # the part that is done, 0 to 1; called in the event loop


class Key(Protocol):
    """A key held as a sealed descriptor."""

    def reader(self) -> int:
        """A new read-only descriptor at offset 0, for one child; the caller closes it.

        Raises KeyWithdrawnError once it was closed.
        """

    def close(self) -> None:
        """Release the key. Calling it twice is harmless."""


class Blocks(Protocol):
    """Block devices, volume groups, mounts."""

    def watch(self, changed: Changed) -> None:
        """Call `changed` after udev has processed a block device event, or a mount came or went."""

    async def look(self, paths: Iterable[str]) -> None:
        """Look the paths up in their file systems. Does not wait for one that hangs."""

    def observe(self, paths: Iterable[str]) -> Storage:
        """The devices and mounts now, and the paths as `look` last found them; never blocks."""

    async def wait_udev(self) -> None:
        """Wait until udev has processed what is queued (bounded)."""

    async def activate(
        self,
        volume: VolumeSpec,
        mapping: str,
        beside: Sequence[str] = (),
        locked: Sequence[VolumeSpec] = (),
    ) -> None:
        """Activate the volume group on the mapping. Raises StorageError.

        `beside`: other open mappings that may belong to the group. `locked`: volumes that may still complete it: then
        inactive parts are no failure.
        """

    async def deactivate(self, volume: VolumeSpec, mapping: str) -> None:
        """Deactivate the volume group on the mapping only. Raises BusyError, StorageError."""

    async def mount(self, volume: VolumeSpec, mapping: str) -> None:
        """Mount the mapping at `volume.mount` through systemd. Raises StorageError."""

    async def unmount(self, volume: VolumeSpec, mapping: str) -> None:
        """Unmount every mount of the mapping. Raises BusyError naming the processes."""

    async def holders(self, mapping: str) -> tuple[str, ...]:
        """The mapping's users, each in a few words: `volume group inner`, `mounted at /x`, `qemu-system (pid 7)`."""


class Crypt(Protocol):
    """LUKS headers and mappings."""

    def watch(self, changed: Changed) -> None:
        """Call `changed` when a disk answers that had timed out."""

    def silent(self) -> frozenset[str]:
        """The header paths whose disk has not answered in time."""

    async def header(self, volume: VolumeSpec) -> Header:
        """Read it. Raises NotLuksError, DamagedHeaderError, DeviceMissingError, DeviceUnreadableError."""

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        """Make the mapping, by one key slot or by any that fits.

        Raises WrongKeyError, OutOfMemoryError, BusyError, DeviceMissingError, NotLuksError.
        """

    async def resume(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None = None
    ) -> None:
        """Give a suspended mapping its key again. Raises WrongKeyError, OutOfMemoryError."""

    async def open_by_token(
        self, volume: VolumeSpec, token: Token, pin: Key | None, suspended: str
    ) -> None:
        """Make the mapping by a token of the header, or resume the `suspended` mapping.

        Raises WrongPinError, also if one is needed and not given; NotYetError if its device is not there;
        KeyUnavailableError, BusyError, OutOfMemoryError.
        """

    async def rename(self, mapping: str, name: str) -> None:
        """Give a mapping another name. Raises StorageError."""

    async def close(self, mapping: str) -> None:
        """Remove the mapping; one that is gone already is fine. Raises BusyError (without holders), DeadlineError."""

    async def wipe(self, mapping: str) -> None:
        """Wipe the key of a mapping that cannot be closed; I/O to it blocks from then on."""

    def available_memory_kib(self) -> int:
        """The memory available for new allocations, as the kernel estimates it."""


class Slots(Protocol):
    """The key slots of LUKS headers, one by one. None of this needs or makes a mapping."""

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        """Whether the key opens this slot. Raises OutOfMemoryError, DeviceMissingError, StorageError."""

    async def add(
        self, volume: VolumeSpec, key: Key, new_key: Key, *, is_random: bool = False
    ) -> None:
        """Add a new key to the volume. `key` already opens it.

        `is_random`: the new key cannot be guessed, so its slot may be cheap to try.
        Raises WrongKeyError, OutOfMemoryError, DeviceMissingError, StorageError.
        """

    async def remove(self, volume: VolumeSpec, slot: int, key: Key) -> None:
        """Wipe a slot. `key` opens another one, else WrongKeyError. Raises as `add`."""

    async def prioritise(self, volume: VolumeSpec, slot: int, priority: int) -> None:
        """Raises StorageError, DeviceMissingError."""

    async def remove_token(self, volume: VolumeSpec, token: int) -> None:
        """Raises StorageError, DeviceMissingError."""

    async def finish_rotation(self, volume: VolumeSpec) -> None:
        """Finish a rotation whose data is all reencrypted (`Header.data_reencrypted`); takes no key.

        Raises StorageError, DeviceMissingError.
        """

    async def back_up(self, volume: VolumeSpec, fd: int) -> None:
        """Write the header and its key slots into an open file, and that to its disk.

        Raises StorageError, DeviceMissingError.
        """

    async def make_key(self, path: str) -> Key:
        """A key of 512 random bits, in a new file of root alone, on its disk. Raises StorageError."""

    async def drop_key(self, path: str) -> None:
        """Remove the file again. Raises StorageError."""


class Formatting(Protocol):
    """New volumes, only on empty devices and in new files."""

    async def check_file(self, name: str, path: str) -> None:
        """Raises OptionError, StorageError, BusyError unless a new file can hold a volume of this name."""

    async def check_device(self, name: str, path: str) -> None:
        """Raises StorageError, BusyError unless it is a block device, unused, and nothing is found on it."""

    async def new_file(self, path: str, size: int) -> int:
        """A descriptor of a file for root only that has no name yet, with all its blocks. Raises StorageError."""

    async def name_file(self, fd: int, path: str) -> None:
        """Give the file its name, on disk. Raises StorageError if the name exists."""

    async def format(self, place: str | int, uuid: str, key: Key) -> None:
        """Write a LUKS2 header onto a device or into such a file. Raises StorageError, DeadlineError."""

    async def open(self, place: str | int, name: str, key: Key) -> None:
        """Make the mapping `name` of the new volume. Raises StorageError, DeadlineError."""

    async def make_file_system(self, name: str) -> None:
        """Make a file system on the mapping. Raises StorageError, DeadlineError."""

    async def take_back(self, place: str, uuid: str, *, is_file: bool) -> None:
        """Remove the file, or empty the device, if its LUKS header has this UUID. Raises StorageError."""


class Tables(Protocol):
    """The configuration files that vmcryptd writes: one for each volume that it makes."""

    def check(self, name: str, table: str) -> None:
        """Raises ConfigError if the file exists, or the configuration would be refused with it."""

    def has(self, name: str) -> bool:
        """Whether the file is there."""

    def write(self, name: str, table: str) -> None:
        """Write a new file atomically, on disk. Raises ConfigError, also if it exists."""

    def remove(self, name: str) -> None:
        """Remove what `write` made. Raises ConfigError."""


class Reencryption(Protocol):
    """Re-encrypts all data of a volume while it is in use. It survives the daemon."""

    async def rotate(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None, on_progress: OnProgress
    ) -> None:
        """Re-encrypt the open volume under a new volume key. `key` gets a slot for it in place of `slot`.

        `slot` is None to resume a rotation; then the key has to be the same. Returns at the end, also when it was
        stopped. After the first call of `on_progress` the key is not needed. A cancelled task does not stop the
        rotation.

        Raises WrongKeyError, BusyError, OutOfMemoryError, DeviceMissingError, StorageError.
        """

    def is_running(self, volume: VolumeSpec) -> bool:
        """Whether a rotation of the volume runs, also one from before the daemon's start."""

    def is_torn(self, mapping: str) -> bool:
        """Whether a killed rotation has left a part that gives errors until the mapping is closed."""

    async def follow(self, volume: VolumeSpec, mapping: str, on_progress: OnProgress) -> None:
        """Wait for the end of a running rotation."""

    async def stop(self, volume: VolumeSpec, grace_s: float) -> None:
        """Stop it where it can resume, or kill it after `grace_s`. Raises StorageError."""


class Keys(Protocol):
    """Key sources."""

    async def fetch(self, source: KeySource, volume: VolumeSpec) -> Key:
        """Get the key from a source that needs no person, bounded in time.

        Raises KeyUnavailableError; NotYetError if a later try may succeed; KeyFileMissingError if there is no file.
        """

    async def bindings(self, volume: VolumeSpec, header: Header) -> tuple[int, ...]:
        """The key slots that Clevis opens. Raises KeyUnavailableError if there are none."""

    async def fetch_bound(self, volume: VolumeSpec, header: Header, slot: int) -> Key:
        """Get the key of a slot that Clevis opens, bounded in time. Raises KeyUnavailableError, NotYetError."""

    async def ask(self, message: str) -> Key:
        """Ask a person through the system's password agents, without a time limit.

        Raises CancelledError when the person declined, KeyUnavailableError when asking is impossible.
        """

    async def receive(self, fd: int) -> Key:
        """Read a caller's descriptor to its end, in the background, bounded; `fd` is closed.

        Raises KeyUnusableError.
        """


class Domains(Protocol):
    """libvirt's domains and storage pools."""

    def watch(self, changed: Changed) -> None:
        """Call `changed` when a domain or pool, or the connection, changed."""

    def current(self) -> Virtualisation:
        """The known state, without asking libvirt; its events keep it up to date."""

    async def refresh(self, timeout_s: float) -> Virtualisation:
        """Connect if necessary and ask again. Raises LibvirtError."""

    async def chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        """The backing chain below a file or block source (readable now), without the source itself."""

    async def start(self, name: str) -> None:
        """Start the domain; one that runs is fine. Raises GuestError with libvirt's sentence, LibvirtError."""

    async def ready(self, guest: GuestSpec, timeout_s: float) -> None:
        """Wait until the guest is ready, as its `ready` setting defines that. Raises DeadlineError."""

    async def stop(self, guest: GuestSpec, timeout_s: float) -> None:
        """Ask the guest to stop (agent and ACPI) and wait until it is off. Raises DeadlineError, GuestError."""

    async def kill(self, name: str) -> None:
        """Destroy the domain; one that is off is fine. Raises GuestError; LibvirtError if libvirt did not answer."""

    async def start_pool(self, name: str) -> None:
        """Start and refresh the pool. Raises GuestError, LibvirtError."""

    async def stop_pool(self, name: str) -> None:
        """Stop the pool, its content stays. Raises GuestError, LibvirtError."""


class Host(Protocol):
    """systemd, and the commands that the administrator configured."""

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""

    async def reach_target(self, reached: bool) -> None:
        """Start or stop vmcryptd.target, without waiting for it."""

    async def run_hook(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        """Run the administrator's command in the background, bounded; its failure is logged."""


class Reason(NamedTuple):
    """Why a volume or guest is not up, for the daemon after this one."""

    error: str  # the name of the error
    text: str  # for root; without the arguments of programs, which are not to be kept
    shown: str  # for everybody


class Memory(Protocol):
    """State that survives the daemon: goals under /run; dependencies, and key slots that fitted, under /var/lib."""

    def goals(self) -> tuple[str, ...]: ...

    def keep_goals(self, goals: Iterable[str]) -> None: ...

    def sources(self) -> dict[str, str]:
        """Open volume → the key source that opened it; lost when the host goes down, like goals."""

    def keep_sources(self, sources: dict[str, str]) -> None: ...

    def reasons(self) -> dict[str, Reason]:
        """`volume NAME` or `guest NAME` → its error; lost when the host goes down."""

    def keep_reasons(self, reasons: Mapping[str, Reason]) -> None: ...

    def open_volumes(self) -> dict[str, VolumeSpec]:
        """The volumes that were open, with what closing needs to know; lost when the host goes down."""

    def keep_open(self, volumes: Mapping[str, VolumeSpec]) -> None: ...

    def seen(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]: ...

    def keep_seen(self, paths: dict[str, tuple[str, ...]], uuids: dict[str, str]) -> None: ...

    def fitted(self) -> dict[str, dict[str, int]]:
        """Volume → key source → the number of the key slot that its key last opened."""

    def keep_fitted(self, slots: dict[str, dict[str, int]]) -> None: ...

    def publish(self, volumes: dict[str, bool]) -> None:
        """List our mappings for udev's rule and the shutdown hook, and mark those that hold a guest's disk."""

    def due_once(self) -> tuple[str, ...]:
        """Guests marked to be started at this boot of the host only, and not started yet."""

    def keep_once(self, marked: Iterable[str], due: Iterable[str]) -> None:
        """`marked`: to be started at the next boot of the host. `due`: still to be started at this one."""

    def backups_due(self) -> dict[str, str]:
        """Volume → the time since which its header differs from every backup."""

    def keep_backups_due(self, volumes: dict[str, str]) -> None: ...

    def making(self) -> tuple[Making, ...]:
        """The keystores that were being made."""

    def keep_making(self, keystores: Iterable[Making]) -> None: ...

    async def kept(self) -> None:
        """Wait until all that was kept is on its disk, or has had its time."""


@dataclass(frozen=True)
class Ports:
    """The outside world."""

    blocks: Blocks
    crypt: Crypt
    slots: Slots
    formatting: Formatting
    tables: Tables
    reencryption: Reencryption
    keys: Keys
    domains: Domains
    host: Host
    memory: Memory
