# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine needs from the outside world. The adapters do it for real, `adapters/sim/` in memory.

Every method raises errors of `vmcryptd.core.errors` only. A key is always a `Key`: a descriptor that children read,
never its content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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

Changed = Callable[[], None]  # "something is different now, look again"; called in the event loop
Told = Callable[[float], None]  # how much is done, 0 to 1; called in the event loop


class Key(Protocol):
    """A key held as a sealed descriptor."""

    def reader(self) -> int:
        """A new read-only descriptor at offset 0, for one child; the caller closes it.

        Raises KeyWithdrawnError once it was closed.
        """

    def close(self) -> None:
        """Let go of it. Calling it twice is harmless."""


class Blocks(Protocol):
    """Block devices, volume groups, mounts."""

    def watch(self, changed: Changed) -> None:
        """Call `changed` after udev has processed a block device event, or a mount came or went."""

    async def look(self, paths: Iterable[str]) -> None:
        """Ask the file systems of the paths for them. Waits for none that does not answer in a moment."""

    def observe(self, paths: Iterable[str]) -> Storage:
        """The devices and mounts now, and what `look` last found of the paths; blocks never."""

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

        `beside`: other open mappings that may belong to the group. `locked`: volumes that may still complete it, so
        that it is no failure that parts of it stay inactive.
        """

    async def deactivate(self, volume: VolumeSpec, mapping: str) -> None:
        """Deactivate the volume group on the mapping, and none else. Raises BusyError, StorageError."""

    async def mount(self, volume: VolumeSpec, mapping: str) -> None:
        """Mount the mapping at `volume.mount` through systemd. Raises StorageError."""

    async def unmount(self, volume: VolumeSpec, mapping: str) -> None:
        """Unmount whatever of the mapping is mounted. Raises BusyError naming the processes."""

    async def holders(self, mapping: str) -> tuple[str, ...]:
        """Who uses the mapping, each in a few words: `volume group inner`, `mounted at /x`, `qemu-system (pid 7)`."""


class Crypt(Protocol):
    """LUKS headers and mappings."""

    def watch(self, changed: Changed) -> None:
        """Call `changed` after a disk that was silent has answered."""

    def silent(self) -> frozenset[str]:
        """The header paths whose disk has not answered in time until now."""

    async def header(self, volume: VolumeSpec) -> Header:
        """Read it. Raises NotLuksError, DamagedHeaderError, DeviceMissingError, DeviceUnreadableError."""

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        """Make the mapping, by one key slot or by whichever fits.

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
        """What the kernel says is available for new allocations."""


class Slots(Protocol):
    """The key slots of LUKS headers, one by one. None of this needs or makes a mapping."""

    async def fits(self, volume: VolumeSpec, slot: int, key: Key) -> bool:
        """Whether the key opens this slot. Raises OutOfMemoryError, DeviceMissingError, StorageError."""

    async def add(
        self, volume: VolumeSpec, key: Key, new_key: Key, *, is_random: bool = False
    ) -> None:
        """Have a new key open the volume, too. `key` opens it already.

        `is_random`: nobody can guess the new key, so trying it may cost next to nothing.
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
    """New volumes, on what is empty only."""

    async def check_file(self, name: str, path: str) -> None:
        """Raises OptionError, StorageError, BusyError unless a new file can hold a volume of this name."""

    async def check_device(self, name: str, path: str) -> None:
        """Raises StorageError, BusyError unless it is a block device, unused, and nothing is found on it."""

    async def new_file(self, path: str, size: int) -> int:
        """A descriptor of a file of root alone that has no name yet, with all its blocks. Raises StorageError."""

    async def name_file(self, fd: int, path: str) -> None:
        """Give it its name, on disk. Raises StorageError where something has that name."""

    async def format(self, place: str | int, uuid: str, key: Key) -> None:
        """Write a LUKS2 header onto a device or into such a file. Raises StorageError, DeadlineError."""

    async def open(self, place: str | int, name: str, key: Key) -> None:
        """Make the mapping `name` of what was just formatted. Raises StorageError, DeadlineError."""

    async def make_file_system(self, name: str) -> None:
        """On the mapping. Raises StorageError, DeadlineError."""

    async def take_back(self, place: str, uuid: str, *, is_file: bool) -> None:
        """Remove the file, or empty the device, if its LUKS header has this UUID. Raises StorageError."""


class Tables(Protocol):
    """The configuration files, as far as vmcryptd adds to them: one of its own for each volume that it makes."""

    def check(self, name: str, table: str) -> None:
        """Raises ConfigError if the file is there, or the whole would be refused with it."""

    def has(self, name: str) -> bool:
        """Whether the file is there."""

    def write(self, name: str, table: str) -> None:
        """As a whole or not at all, on disk, and only where nothing is. Raises ConfigError."""

    def remove(self, name: str) -> None:
        """Remove what `write` made. Raises ConfigError."""


class Reencryption(Protocol):
    """All data of a volume written anew while it is in use. It outlives the daemon."""

    async def rotate(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None, told: Told
    ) -> None:
        """Put the open volume under a new volume key, which `key` opens by a slot in the place of `slot`.

        `slot` is None to go on with what was stopped before its end; then the key has to be the same. Returns at
        the end, also when it was stopped. Once `told` is called, the key is not needed any more. When the task is
        cancelled, it goes on by itself.

        Raises WrongKeyError, BusyError, OutOfMemoryError, DeviceMissingError, StorageError.
        """

    def is_running(self, volume: VolumeSpec) -> bool:
        """Whether the volume is worked on, be it since before the daemon was started."""

    def is_torn(self, mapping: str) -> bool:
        """Whether what was killed at it has left a part that gives errors, until the mapping is closed."""

    async def follow(self, volume: VolumeSpec, mapping: str, told: Told) -> None:
        """Wait for the end of what is running."""

    async def stop(self, volume: VolumeSpec, grace_s: float) -> None:
        """Stop it where it can go on, and kill it if that takes longer than `grace_s`. Raises StorageError."""


class Keys(Protocol):
    """Where keys come from."""

    async def fetch(self, source: KeySource, volume: VolumeSpec) -> Key:
        """Get the key from a source that needs no person, bounded in time.

        Raises KeyUnavailableError; NotYetError if it is worth while to try again; KeyFileMissingError if the file
        is not there.
        """

    async def bindings(self, volume: VolumeSpec, header: Header) -> tuple[int, ...]:
        """The key slots that Clevis opens. Raises KeyUnavailableError if there are none."""

    async def fetch_bound(self, volume: VolumeSpec, header: Header, slot: int) -> Key:
        """Get the key of such a slot, bounded in time. Raises KeyUnavailableError, NotYetError."""

    async def ask(self, message: str) -> Key:
        """Ask a person through the system's agents, for as long as it takes.

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
        """What is known now, without asking; kept up to date by libvirt's events."""

    async def refresh(self, timeout_s: float) -> Virtualisation:
        """Connect if necessary and ask again. Raises LibvirtError."""

    async def chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        """The backing chain below a file or block source (readable now), without the source itself."""

    async def start(self, name: str) -> None:
        """Start the domain; one that runs is fine. Raises GuestError with libvirt's sentence, LibvirtError."""

    async def ready(self, guest: GuestSpec, timeout_s: float) -> None:
        """Wait until the guest is ready in its own sense. Raises DeadlineError."""

    async def stop(self, guest: GuestSpec, timeout_s: float) -> None:
        """Ask the guest to stop (agent and ACPI) and wait until it is off. Raises DeadlineError, GuestError."""

    async def kill(self, name: str) -> None:
        """Destroy the domain; one that is off is fine. Raises GuestError; LibvirtError if nothing was answered."""

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


class Memory(Protocol):
    """What outlives the daemon: goals under /run; dependencies, and key slots that fitted, under /var/lib."""

    def goals(self) -> tuple[str, ...]: ...

    def keep_goals(self, goals: Iterable[str]) -> None: ...

    def sources(self) -> dict[str, str]:
        """Open volume → the key source that opened it; like goals, for as long as the host is up."""

    def keep_sources(self, sources: dict[str, str]) -> None: ...

    def reasons(self) -> dict[str, tuple[str, str]]:
        """`volume NAME` or `guest NAME` → an error's name and text, of what has failed; like goals."""

    def keep_reasons(self, reasons: Mapping[str, tuple[str, str]]) -> None: ...

    def open_volumes(self) -> dict[str, VolumeSpec]:
        """The volumes that were open when this was kept, as far as closing them takes; as long as the host is up."""

    def keep_open(self, volumes: Mapping[str, VolumeSpec]) -> None: ...

    def seen(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]: ...

    def keep_seen(self, paths: dict[str, tuple[str, ...]], uuids: dict[str, str]) -> None: ...

    def fitted(self) -> dict[str, dict[str, int]]:
        """Volume → key source → the number of the key slot that it fitted last time."""

    def keep_fitted(self, slots: dict[str, dict[str, int]]) -> None: ...

    def publish(self, volumes: dict[str, bool]) -> None:
        """Tell udev's rule and the shutdown hook which mappings are ours, and which of them hold a guest's disk."""

    def due_once(self) -> tuple[str, ...]:
        """Guests marked to be started at this boot of the host only, and not started yet."""

    def keep_once(self, marked: Iterable[str], due: Iterable[str]) -> None:
        """`marked`: to be started at the next boot of the host. `due`: still to be started at this one."""

    def backups_due(self) -> dict[str, str]:
        """Volume → since when its header has differed from every backup of it."""

    def keep_backups_due(self, volumes: dict[str, str]) -> None: ...

    def making(self) -> tuple[Making, ...]:
        """The keystores that were being made."""

    def keep_making(self, keystores: Iterable[Making]) -> None: ...


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
