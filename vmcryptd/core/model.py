# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data types of the configuration and of observations. Values only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

Infinity = float("inf")


class VolumeState(StrEnum):
    LOCKED = "locked"  # the mapping does not exist
    WAITING = "waiting"  # its sources are exhausted; a person is asked
    UNLOCKING = "unlocking"  # a key is being fetched or tried
    UNLOCKED = "unlocked"  # the mapping exists, made by any program
    SUSPENDED = "suspended"  # the mapping exists, its key is wiped, I/O to it blocks
    LOCKING = "locking"  # the mapping is being closed
    FAILED = "failed"  # the last attempt failed and no person is asked
    MISSING = "missing"  # its device does not exist, and no locked volume explains that


class GuestState(StrEnum):
    OFF = "off"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    UNDEFINED = "undefined"  # configured here, but libvirt knows no such domain (or is away)


class HostState(StrEnum):
    LOCKED = "locked"
    WAITING = "waiting"
    UNLOCKING = "unlocking"
    READY = "ready"
    STOPPING = "stopping"
    DEGRADED = "degraded"


# --- configuration -----------------------------------------------------------


class SourceKind(StrEnum):
    PROMPT = "prompt"
    FILE = "file"
    CREDENTIAL = "credential"
    EXEC = "exec"
    TPM2 = "tpm2"
    FIDO2 = "fido2"
    PKCS11 = "pkcs11"
    CLEVIS = "clevis"

    @property
    def token_kind(self) -> str:
        """systemd-cryptenroll's name of such a token in a header; empty if the source is no token."""
        is_token = self in (SourceKind.TPM2, SourceKind.FIDO2, SourceKind.PKCS11)
        return f"systemd-{self}" if is_token else ""


@dataclass(frozen=True)
class KeySource:
    """One way to get a volume's key."""

    kind: SourceKind
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else str(self.kind)


class Unlock(StrEnum):
    BOOT = "boot"
    GUEST = "guest"
    MANUAL = "manual"


class Lock(StrEnum):
    SHUTDOWN = "shutdown"
    GUEST = "guest"
    BOOT = "boot"
    MANUAL = "manual"


class Content(StrEnum):
    GUEST = "guest"
    LVM = "lvm"
    FILESYSTEM = "filesystem"


class Start(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class OnStopTimeout(StrEnum):
    KILL = "kill"
    LEAVE = "leave"


_LINKS = "/dev/disk/"
_TAG_LINKS = tuple(f"{_LINKS}by-{tag}/" for tag in ("uuid", "label", "partuuid", "partlabel"))


def udev_encoded(value: str) -> str:
    """A tag's value as udev writes it into the name of a link (libblkid, blkid_encode_string).

    Valid UTF-8 stays. In ASCII only letters, digits and a few signs stay; the rest is escaped byte by byte, like
    Unicode's noncharacters.
    """
    return "".join(map(_udev_encoded, value))


def _udev_encoded(char: str) -> str:
    code = ord(char)
    if code < 0x80:
        is_kept = char.isalnum() or char in "#+-.:=@_"
    else:
        is_kept = not (0xFDD0 <= code <= 0xFDEF or code & 0xFFFF == 0xFFFF)
    return char if is_kept else "".join(f"\\x{byte:02x}" for byte in char.encode())


@dataclass(frozen=True)
class VolumeSpec:
    """One `[volume.NAME]` table; the name is the mapping's name."""

    name: str
    device: str
    uuid: str | None = None
    keys: tuple[KeySource, ...] = (KeySource(SourceKind.PROMPT),)
    unlock: Unlock = Unlock.BOOT
    lock: Lock = Lock.SHUTDOWN
    content: Content = Content.GUEST
    mount: str | None = None
    vg: str | None = None
    discard: bool = False
    header: str | None = None
    after: tuple[str, ...] = ()
    timeout_s: float = 30.0
    is_configured: bool = True  # False: its table was removed, but it is still open
    origin: str = field(default="", compare=False)  # file and line of its table

    @property
    def mapper_path(self) -> str:
        return f"/dev/mapper/{self.name}"

    @property
    def device_path(self) -> str:
        """The device as a path; for tags udev's link."""
        tag, sep, value = self.device.partition("=")
        if not sep:
            return self.device
        if tag == "LABEL":
            value = value.rstrip(" \t\n\v\f\r")  # as libblkid does (blkid_probe_set_label)
        return f"/dev/disk/by-{tag.lower()}/{udev_encoded(value)}"

    @property
    def has_tag(self) -> bool:
        """Whether the device is named by a tag on the disk, which a copy has, too."""
        return self.device_path.startswith(_TAG_LINKS)

    @property
    def known_uuid(self) -> str:
        """The LUKS header's UUID in the configuration, else an empty string."""
        if self.uuid:
            return self.uuid
        link, by_uuid = self.device_path, f"{_LINKS}by-uuid/"
        return link.removeprefix(by_uuid) if link.startswith(by_uuid) and not self.header else ""

    @property
    def header_path(self) -> str:
        """The path of its LUKS header: the device, unless the header is detached."""
        return self.header or self.device_path

    @property
    def asks(self) -> bool:
        return any(source.kind is SourceKind.PROMPT for source in self.keys)


@dataclass(frozen=True)
class GuestSpec:
    """One `[guest.NAME]` table; a guest without one has these defaults."""

    name: str
    start: Start = Start.AUTO
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    ready: str = "running"  # running | agent | tcp:HOST:PORT
    stop_timeout_s: float = 180.0
    on_stop_timeout: OnStopTimeout = OnStopTimeout.KILL
    configured: bool = False  # True when the table exists
    origin: str = field(default="", compare=False)  # file and line of it


@dataclass(frozen=True)
class DaemonSpec:
    """The `[daemon]` table."""

    libvirt_uri: str = "qemu:///system"
    console_prompt_s: float = 60.0
    shutdown_timeout_s: float = 300.0
    kdf_memory: float = 0.5  # share of the available memory
    key_cache_s: float = 0.0
    on_waiting: tuple[str, ...] = ()
    on_failed: tuple[str, ...] = ()
    start_delay_s: float = 0.0


@dataclass(frozen=True)
class Settings:
    """The whole configuration, validated."""

    daemon: DaemonSpec = DaemonSpec()
    volumes: Mapping[str, VolumeSpec] = field(default_factory=dict)
    guests: Mapping[str, GuestSpec] = field(default_factory=dict)

    def guest(self, name: str) -> GuestSpec:
        return self.guests.get(name) or GuestSpec(name)


# --- observations ---------------------------------------------------------------------


class BlockDevice(NamedTuple):
    """One block device in sysfs. Names are the kernel's: `sda1`, `dm-3`, `md127`, `loop0`."""

    name: str
    number: str = ""  # "major:minor", as in mountinfo
    below: tuple[str, ...] = ()  # devices below: slaves, the whole disk of a partition
    dm_name: str = ""
    dm_uuid: str = ""
    suspended: bool = False
    backing_file: str = ""  # loop devices

    @property
    def luks_uuid(self) -> str:
        """The LUKS header's UUID of an open mapping, in canonical form, else an empty string.

        cryptsetup names it CRYPT-LUKS2-<32 hex digits>-<mapping name> (lib/libdevmapper.c).
        """
        parts = self.dm_uuid.split("-", 3)
        if len(parts) != 4 or parts[0] != "CRYPT" or not parts[1].startswith("LUKS"):
            return ""
        raw = parts[2].lower()
        if len(raw) != 32:
            return ""
        return f"{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"

    @property
    def vg(self) -> str:
        """The volume group of a logical volume, else an empty string.

        device-mapper doubles hyphens inside VG and LV names: `my--vg-lv`.
        """
        if not self.dm_uuid.startswith("LVM-"):
            return ""
        head, _, _ = self.dm_name.replace("--", "\0").partition("-")
        return head.replace("\0", "-")


class Mount(NamedTuple):
    """One line of mountinfo."""

    number: str  # "major:minor" of the mounted device
    target: str
    source: str = ""
    fstype: str = ""


class Storage(NamedTuple):
    """The host's block devices and mounts at one moment.

    `links` maps the paths that were asked for (configured devices, guests' disks) to kernel names; a path
    that does not exist, or is no block device, is absent. `files` maps paths of regular files to the
    "major:minor" of the file system that holds them. `real` maps paths to where their symbolic links lead,
    where that differs, as far as it can be followed now. `claims` maps links of udev's that were asked for to the
    kernel names of all devices that udev says have that name, where these are several: the link leads to one of them.
    """

    devices: Mapping[str, BlockDevice] = MappingProxyType({})
    links: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})
    real: Mapping[str, str] = MappingProxyType({})
    mounts: tuple[Mount, ...] = ()
    claims: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def has(self, path: str) -> bool:
        """Whether a block device or file exists, for a path that was asked for."""
        return path in self.links or path in self.files


class SourceType(StrEnum):
    BLOCK = "block"
    FILE = "file"
    POOL = "pool"


class DiskSource(NamedTuple):
    """One thing that a guest reads or writes: a disk, cdrom, nvram, a member of a backing chain."""

    type: SourceType
    path: str = ""  # block, file
    pool: str = ""
    volume: str = ""
    writable: bool = True
    shareable: bool = False


class Domain(NamedTuple):
    """One libvirt domain, as libvirt reports it."""

    name: str
    uuid: str
    state: GuestState
    autostart: bool = False
    persistent: bool = True
    sources: tuple[DiskSource, ...] = ()
    autostart_once: bool = False  # `virsh autostart --once`: at the next boot of the host only
    trouble: str = ""  # if it died or cannot run on: what happened, and what to do; else empty


class Pool(NamedTuple):
    """One libvirt storage pool: `path` for directories and file systems, `devices`/`vg` for the others."""

    name: str
    active: bool
    autostart: bool = False
    path: str = ""
    devices: tuple[str, ...] = ()
    vg: str = ""
    volumes: Mapping[str, str] = MappingProxyType({})  # volume name → path, when active

    def path_of(self, volume: str) -> str:
        """The volume's path; while the pool is off, in the pool's directory if it has one. Else empty."""
        return self.volumes.get(volume) or (f"{self.path}/{volume}" if self.path else "")


class Virtualisation(NamedTuple):
    """libvirt's domains and pools; `reachable` is False until a connection gave an answer.

    `error` is the reason of the last failed connection; domains and pools stay as last known.
    """

    reachable: bool = False
    domains: Mapping[str, Domain] = MappingProxyType({})
    pools: Mapping[str, Pool] = MappingProxyType({})
    error: str = ""

    def path_of(self, source: DiskSource) -> str:
        """The path of a guest's disk, also in a pool; empty if unknown."""
        pool = self.pools.get(source.pool)
        return source.path or (pool.path_of(source.volume) if pool else "")


class Remembered(NamedTuple):
    """Observations of open volumes, from which dependencies are known while they are locked.

    `paths`: a device or file path → the volumes it lies on. `uuids`: volume → its header's UUID.
    """

    paths: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    uuids: Mapping[str, str] = MappingProxyType({})


class Observation(NamedTuple):
    """All observations for the graph, at one moment."""

    storage: Storage = Storage()
    virtualisation: Virtualisation = Virtualisation()
    remembered: Remembered = Remembered()
    # Volume → UUID read from its header.
    uuids: Mapping[str, str] = MappingProxyType({})
    # Disk file → its backing files.
    chains: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    # Volumes whose group was activated since they were opened.
    activated: frozenset[str] = frozenset()
    # Header paths whose disk has not answered in time.
    silent: frozenset[str] = frozenset()


# --- LUKS headers ------------------------------------------------------------------------


# Costs in a header are only claims. cryptsetup itself chooses 1 GiB at most, and some seconds.
ABSURD_KIB = 2 * 1024 * 1024
ABSURD_COST = 300_000_000  # in the unit of KeySlot.cost: five minutes of one core


@dataclass(frozen=True)
class KeySlot:
    """One LUKS key slot, with the cost of a try."""

    number: int
    kdf: str  # argon2id | argon2i | pbkdf2, or an unknown one
    memory_kib: int = 0
    threads: int = 1
    iterations: int = 0
    priority: int = (
        1  # 0: only when named, 1: normal, 2: before the others; as `cryptsetup config` sets it
    )
    salt: str = field(default="", compare=False)  # distinguishes slots of the same cost

    @property
    def cost(self) -> int:
        """A try's time in microseconds of one core, roughly: used only to order slots.

        In a second a core fills about a million KiB for Argon2, or does about a million rounds of PBKDF2.
        """
        return self.iterations * (self.memory_kib or 1)

    @property
    def is_known(self) -> bool:
        return self.kdf in ("argon2id", "argon2i", "pbkdf2")

    @property
    def is_absurd(self) -> bool:
        """Whether its claimed cost is higher than any sensible choice."""
        return self.memory_kib > ABSURD_KIB or self.cost > ABSURD_COST

    @property
    def caveat(self) -> str:
        """The reason to try it last; empty for an ordinary slot."""
        if not self.is_known:
            return f"has the key derivation {self.kdf}, which is not known here"
        if self.is_absurd:
            memory = f"{self.memory_kib // 1024} MiB of memory and " if self.memory_kib else ""
            return f"claims {memory}{self.iterations} iterations"
        return ""


class Token(NamedTuple):
    """A token of a LUKS2 header: it opens key slots without a passphrase."""

    number: int
    kind: str  # as in the header: "systemd-tpm2", "systemd-fido2", "systemd-pkcs11", "clevis", …
    slots: tuple[int, ...] = ()
    needs_pin: bool = False

    @property
    def title(self) -> str:
        """The name for people."""
        words = {"systemd-tpm2": "TPM2", "systemd-fido2": "FIDO2", "systemd-pkcs11": "PKCS#11"}
        return f"the {words.get(self.kind, self.kind)} token {self.number}"


class Header(NamedTuple):
    """The public part of a LUKS header."""

    version: int
    uuid: str
    slots: tuple[KeySlot, ...] = ()
    tokens: tuple[Token, ...] = ()
    is_reencrypting: bool = False  # a key has to fit slots of both volume keys
    data_reencrypted: bool = (
        False  # all data is under the new volume key; only the last step of the rotation is missing
    )

    @property
    def memory_kib(self) -> int:
        """The most memory that an attempt takes: cryptsetup tries the slots one after another."""
        return max((slot.memory_kib for slot in self.slots), default=0)
