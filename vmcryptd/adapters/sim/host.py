# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated host behind the same ports: `vmcryptd --sim FILE`. Needs no root, changes nothing.

vmcryptd(8) describes FILE.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.adapters.sim.keystores import SimKeystores
from vmcryptd.adapters.sim.luks import (
    SimReencryption,
    SimSlot,
    SimSlots,
    SourceKey,
    fits,
    key_slots,
)
from vmcryptd.core.durations import duration
from vmcryptd.core.errors import (
    BusyError,
    ConfigError,
    DamagedHeaderError,
    DeadlineError,
    DeviceMissingError,
    DeviceUnreadableError,
    GuestError,
    KeyFileMissingError,
    KeyUnavailableError,
    LibvirtError,
    NotLuksError,
    NotYetError,
    OutOfMemoryError,
    StorageError,
    VmcryptdError,
    WrongKeyError,
    WrongPinError,
)
from vmcryptd.core.keystores import Making
from vmcryptd.core.model import (
    BlockDevice,
    DiskSource,
    Domain,
    GuestSpec,
    GuestState,
    Header,
    Infinity,
    KeySlot,
    KeySource,
    Mount,
    Settings,
    SourceKind,
    SourceType,
    Storage,
    Token,
    Virtualisation,
    VolumeSpec,
)
from vmcryptd.core.ports import Changed, Key, Ports, Reason
from vmcryptd.posix.changes import Changes

_AWAY = "libvirt cannot be reached (simulated)"
_DIED = "died: its process ended without a shutdown (simulated)"
_FAULTS: dict[str, type[VmcryptdError]] = {
    "not-luks": NotLuksError,
    "damaged": DamagedHeaderError,
    "unreadable": DeviceUnreadableError,
}


@dataclass(frozen=True)
class _Token:
    """Opens the volume, with a PIN if it has one."""

    kind: str
    pin: str = ""
    fault: str = ""


@dataclass
class _Volume:
    slots: dict[int, SimSlot]
    on: tuple[str, ...]
    present: bool
    appears_after_s: float
    open: bool
    delay_s: float
    fault: str
    tokens: tuple[_Token, ...] = ()
    rotates_in_s: float = 0.0
    is_half_rotated: bool = False
    data_reencrypted: bool = False
    away: bool = False
    copied: bool = False
    mapped_as: str = ""  # the name of its mapping, if that differs from the volume's
    suspended: bool = False
    mounted: bool = False
    active: bool = False


@dataclass
class _Guest:
    disks: tuple[str, ...]
    shareable: bool
    autostart: bool
    state: GuestState
    start_delay_s: float
    stop_delay_s: float
    fault: str
    starting_s: float  # the time that libvirt's own autostart takes
    dies_after_s: float
    shuts_down_after_s: float
    autostart_once: bool
    trouble: str = ""


class Simulation:
    """One simulated host: all ports in one object. Only the keys that a person enters are real."""

    def __init__(self, settings: Settings, table: dict[str, Any], path: Path | None = None) -> None:
        self.settings = settings
        self._specs = dict(settings.volumes)  # also volumes that a reload has removed
        self._path = path
        self._libvirt = bool(table.get("libvirt", True))
        self._volumes = {
            name: _volume(table.get("volume", {}).get(name, {})) for name in settings.volumes
        }
        self._guests = {name: _guest(entry) for name, entry in table.get("guest", {}).items()}
        self._missing = set(table.get("missing", ()))
        self._changed: list[Changed] = []
        self._moves = Changes()
        self._seen_domains: dict[str, Domain] = {}
        self._real = SystemKeys()
        self._goals: tuple[str, ...] = ()
        self._sources: dict[str, str] = {}
        self._open: dict[str, VolumeSpec] = {}
        self._reasons: dict[str, Reason] = {}
        self.published: dict[str, bool] = {}  # mapping → whether it is marked as a guest's disk
        self._seen: tuple[dict[str, tuple[str, ...]], dict[str, str]] = ({}, {})
        self._fitted: dict[str, dict[str, int]] = {}
        self._backups_due: dict[str, str] = {}
        self._due_once = tuple(table.get("due_once", ()))
        self.marked_once: tuple[str, ...] = ()
        self.calls: list[str] = []  # the calls, in order
        self._making: tuple[Making, ...] = ()
        empty = tuple(table.get("empty", ()))
        self._keystores = SimKeystores(self._volumes, empty, self.calls)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a description. Raises ConfigError."""
        return cls.parse(read(path)[str(path)], str(path), path)

    @classmethod
    def parse(cls, text: str, name: str = "simulation", path: Path | None = None) -> Self:
        settings, table = _parse(text, name)
        try:
            return cls(settings, table, path)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"{name}: [sim]: {error}") from None

    def ports(self) -> Ports:
        return Ports(
            blocks=self,
            crypt=self,
            slots=SimSlots(self._volumes, self.calls),
            formatting=self._keystores,
            tables=self._keystores,
            reencryption=SimReencryption(self._volumes, self.calls),
            keys=self,
            domains=self,
            host=self,
            memory=self,
        )

    def reload(self, text: str) -> Settings:
        """Take over another description. Open volumes stay open. Raises ConfigError."""
        fresh = Simulation.parse(text, str(self._path or "simulation"))
        for name, volume in fresh._volumes.items():
            self._volumes.setdefault(name, volume)
        for name, guest in fresh._guests.items():
            self._guests.setdefault(name, guest)
        made = self._keystores.made
        for name, keystore in made.items():
            self._volumes.setdefault(
                name, replace(_volume({}), slots={0: SimSlot(keystore.digest)})
            )
        specs = {name: keystore.spec for name, keystore in made.items()}
        self.settings = replace(fresh.settings, volumes={**fresh.settings.volumes, **specs})
        self._specs |= self.settings.volumes
        return self.settings

    def _tell(self) -> None:
        self._moves.notify()
        for changed in self._changed:
            changed()

    # --- Blocks ---

    def watch(self, changed: Changed) -> None:
        if changed in self._changed:
            return
        self._changed.append(changed)
        loop = asyncio.get_running_loop()
        for volume in self._volumes.values():
            if 0 < volume.appears_after_s < Infinity:
                loop.call_later(volume.appears_after_s, self._appear, volume)
        for name, guest in self._guests.items():
            if guest.state is GuestState.STARTING:
                loop.call_later(guest.starting_s, self._autostarted, name)

    def _appear(self, volume: _Volume) -> None:
        volume.present, volume.appears_after_s = True, 0.0
        self._tell()

    async def look(self, paths: Iterable[str]) -> None:
        pass

    def observe(self, paths: Iterable[str]) -> Storage:
        devices: dict[str, BlockDevice] = {}
        links: dict[str, str] = {}
        mounts = []
        claims: dict[str, tuple[str, ...]] = {}
        for number, (name, volume) in enumerate(self._volumes.items()):
            spec = self._specs[name]
            if not self._is_there(volume):
                continue
            below = tuple(f"dm-{lower}" for lower in volume.on)
            devices[f"sim-{name}"] = BlockDevice(f"sim-{name}", below=below)
            links[spec.device_path] = f"sim-{name}"
            if volume.copied:
                devices[f"copy-{name}"] = BlockDevice(f"copy-{name}")
                links[spec.device_path] = f"copy-{name}"  # udev's link leads to the latest device
                claims[spec.device_path] = (f"copy-{name}", f"sim-{name}")
            if volume.open:
                dm_name = volume.mapped_as or name
                uuid = f"CRYPT-LUKS2-{_uuid(spec, number).replace('-', '')}-{dm_name}"
                devices[f"dm-{name}"] = BlockDevice(
                    f"dm-{name}", f"253:{number}", (f"sim-{name}",), dm_name, uuid, volume.suspended
                )
                links[f"/dev/mapper/{dm_name}"] = f"dm-{name}"
            if volume.mounted and spec.mount:
                mounts.append(Mount(f"253:{number}", spec.mount))
            if volume.active:
                devices[f"lv-{name}"] = BlockDevice(
                    f"lv-{name}", "", (f"dm-{name}",), f"{name}-lv", "LVM-sim"
                )
        files = {path: found for path in paths if (found := self._file(path))}
        return Storage(
            devices=devices, links=links, files=files, mounts=tuple(mounts), claims=claims
        )

    def _file(self, path: str) -> str:
        """The number of the file system with a header or key file; empty if the file does not exist."""
        named = {spec.header for spec in self._specs.values()}
        named |= {f"{key.argument}" for spec in self._specs.values() for key in spec.keys}
        if path not in named or not path.startswith("/") or path in self._missing:
            return ""
        for minor, (name, volume) in enumerate(self._volumes.items()):
            mount = self._specs[name].mount
            if mount and path.startswith(f"{mount}/"):
                return f"253:{minor}" if volume.mounted else ""
        return "8:1"

    def _is_there(self, volume: _Volume) -> bool:
        return volume.present and all(
            self._volumes[lower].open for lower in volume.on if lower in self._volumes
        )

    async def wait_udev(self) -> None:
        pass

    async def activate(
        self,
        volume: VolumeSpec,
        mapping: str,
        beside: Sequence[str] = (),
        locked: Sequence[VolumeSpec] = (),
    ) -> None:
        self._set(volume.name, f"activate {volume.name}", active=True)

    async def deactivate(self, volume: VolumeSpec, mapping: str) -> None:
        self._set(volume.name, f"deactivate {volume.name}", active=False)

    async def mount(self, volume: VolumeSpec, mapping: str) -> None:
        self._set(volume.name, f"mount {volume.name}", mounted=True)

    async def unmount(self, volume: VolumeSpec, mapping: str) -> None:
        self._set(volume.name, f"unmount {volume.name}", mounted=False)

    async def holders(self, mapping: str) -> tuple[str, ...]:
        mapping = self._volume_of(mapping)
        volume, path = self._volumes[mapping], self._specs[mapping].mapper_path
        used = {
            "a simulated process": volume.fault == "busy",
            f"volume group of {mapping}": volume.active,
            f"mounted at {self._specs[mapping].mount}": volume.mounted,
            **{n: v.open and mapping in v.on for n, v in self._volumes.items()},
            **{
                n: path in guest.disks and guest.state is not GuestState.OFF
                for n, guest in self._guests.items()
            },
        }
        return tuple(holder for holder, is_true in used.items() if is_true)

    def _set(self, name: str, call: str, **values: bool | str) -> None:
        self.calls.append(call)
        self._volumes[name] = replace(self._volumes[name], **values)  # type: ignore[arg-type]
        self._tell()

    # --- Crypt ---

    def silent(self) -> frozenset[str]:
        return frozenset()

    async def header(self, volume: VolumeSpec) -> Header:
        simulated = self._volumes[volume.name]
        if not self._is_there(simulated):
            raise DeviceMissingError(f"volume {volume.name}: its device {volume.device} is gone")
        if error := _FAULTS.get(simulated.fault):
            raise error(
                f"volume {volume.name}: there is no sound LUKS header on {volume.header_path} (simulated)"
            )
        number = list(self._volumes).index(volume.name)
        slots = key_slots(simulated)
        free = max(simulated.slots) + 1
        tokens = tuple(
            Token(place, f"systemd-{token.kind}", (free + place,), bool(token.pin))
            for place, token in enumerate(simulated.tokens)
        )
        slots += tuple(KeySlot(t.slots[0], "pbkdf2", iterations=1000) for t in tokens)
        bound = (n for n, slot in simulated.slots.items() if "clevis" in slot.sources)
        tokens += tuple(Token(len(tokens) + i, "clevis", (n,)) for i, n in enumerate(bound))
        return Header(
            2,
            _uuid(volume, number),
            slots,
            tokens,
            simulated.is_half_rotated,
            simulated.data_reencrypted,
        )

    async def open(self, volume: VolumeSpec, key: Key, slot: int | None = None) -> None:
        simulated = self._volumes[volume.name]
        await asyncio.sleep(simulated.delay_s)
        if simulated.fault == "out-of-memory":
            raise OutOfMemoryError(
                f"volume {volume.name}: the key derivation ran out of memory (simulated)"
            )
        tried = [one for n, one in simulated.slots.items() if slot in (None, n)]
        if any(one.kdf for one in tried):
            raise StorageError(f"volume {volume.name}: a key slot cannot be tried (simulated)")
        if simulated.data_reencrypted or not any([await self._fits(one, key) for one in tried]):
            raise WrongKeyError(f"volume {volume.name}: the key fits no key slot; try another")
        self._set(volume.name, f"open {volume.name}", open=True, suspended=False)

    async def resume(
        self, volume: VolumeSpec, mapping: str, key: Key, slot: int | None = None
    ) -> None:
        await self.open(volume, key, slot)

    async def open_by_token(
        self, volume: VolumeSpec, token: Token, pin: Key | None, suspended: str
    ) -> None:
        simulated = self._volumes[volume.name]
        await asyncio.sleep(simulated.delay_s)
        one = simulated.tokens[token.number]
        if simulated.away:
            raise NotYetError(
                f"{token.title} does not open it: its device is not there (simulated)"
            )
        if one.fault:
            raise KeyUnavailableError(f"{token.title} does not open it: {one.fault} (simulated)")
        if one.pin and pin is None:
            raise WrongPinError(f"{token.title} wants a PIN")
        if one.pin and pin is not None and not await self._fits(SimSlot(one.pin), pin):
            raise WrongPinError(f"{token.title} does not take this PIN")
        self._set(volume.name, f"open {volume.name}", open=True, suspended=False)

    async def _fits(self, slot: SimSlot, key: Key) -> bool:
        return await fits(slot, key)

    async def close(self, mapping: str) -> None:
        if mapping not in self._volumes:
            self.calls.append(f"close {mapping}")  # of a keystore that is being made
            return
        if await self.holders(mapping):
            raise BusyError(f"{mapping} is busy")
        name = self._volume_of(mapping)
        self._set(name, f"close {mapping}", open=False, suspended=False, mapped_as="")

    async def rename(self, mapping: str, name: str) -> None:
        self._set(self._volume_of(mapping), f"rename {mapping} {name}", mapped_as="")

    async def wipe(self, mapping: str) -> None:
        self._set(self._volume_of(mapping), f"wipe {mapping}", suspended=True)

    def _volume_of(self, mapping: str) -> str:
        found = (name for name, volume in self._volumes.items() if volume.mapped_as == mapping)
        return next(found, mapping)

    def available_memory_kib(self) -> int:
        return 4 * 1024 * 1024

    # --- Keys ---

    async def fetch(self, source: KeySource, volume: VolumeSpec) -> Key:
        slots = self._volumes[volume.name].slots.values()
        if source.argument in self._missing:
            raise KeyFileMissingError(f"{source.argument} is not there (simulated)")
        if not any(str(source) in slot.sources for slot in slots):
            raise KeyUnavailableError("it gives no key (simulated)")
        if source.kind is SourceKind.EXEC and self._volumes[volume.name].away:
            raise NotYetError("its server does not answer (simulated)")
        return SourceKey(str(source))

    async def bindings(self, volume: VolumeSpec, header: Header) -> tuple[int, ...]:
        bound = [n for token in header.tokens if token.kind == "clevis" for n in token.slots]
        if not bound:
            raise KeyUnavailableError("the header has no Clevis binding (simulated)")
        return tuple(bound)

    async def fetch_bound(self, volume: VolumeSpec, header: Header, slot: int) -> Key:
        if self._volumes[volume.name].away:
            raise NotYetError("its server does not answer (simulated)")
        return SourceKey("clevis")

    async def ask(self, message: str) -> Key:
        self.calls.append(f"ask {message}")
        await asyncio.Event().wait()  # only `vmcryptctl unlock` answers: agents need root
        raise AssertionError

    async def receive(self, fd: int) -> Key:
        return await self._real.receive(fd)

    # --- Domains ---

    def current(self) -> Virtualisation:
        if not self._libvirt:
            return Virtualisation(domains=self._seen_domains, error=_AWAY)
        self._seen_domains = {
            name: Domain(
                name,
                f"00000000-0000-0000-0000-{number:012x}",
                guest.state,
                guest.autostart,
                sources=tuple(
                    DiskSource(SourceType.BLOCK, path, shareable=guest.shareable)
                    for path in guest.disks
                ),
                autostart_once=guest.autostart_once,
                trouble=guest.trouble,
            )
            for number, (name, guest) in enumerate(self._guests.items())
        }
        return Virtualisation(True, self._seen_domains)

    async def refresh(self, timeout_s: float) -> Virtualisation:
        if not self._libvirt:
            raise LibvirtError(_AWAY)
        return self.current()

    async def chain(self, source: DiskSource) -> tuple[DiskSource, ...]:
        return ()

    async def start(self, name: str) -> None:
        guest = self._guests[name]
        await self._moves.until(lambda: guest.state is not GuestState.STARTING)
        if guest.state is not GuestState.OFF:
            return
        await asyncio.sleep(guest.start_delay_s)
        if guest.fault:
            raise GuestError(f"guest {name} could not be started: {guest.fault}")
        for path in guest.disks:
            if not self._is_disk(path):
                raise GuestError(f"guest {name} could not be started: cannot access {path}")
        self._started(name, f"start {name}")

    def _is_disk(self, path: str) -> bool:
        return any(
            (self._specs[name].mapper_path == path and volume.open)
            or (self._specs[name].device_path == path and self._is_there(volume))
            for name, volume in self._volumes.items()
        )

    def _autostarted(self, name: str) -> None:
        """The end of libvirt's own autostart, which is the same as of our start."""
        guest = self._guests[name]
        if not guest.fault and all(map(self._is_disk, guest.disks)):
            self._started(name, f"autostart {name}")
        else:
            self._guest(name, GuestState.OFF, f"autostart {name} failed")

    def _started(self, name: str, call: str) -> None:
        guest, loop = self._guests[name], asyncio.get_running_loop()
        self._guest(name, GuestState.RUNNING, call)
        if guest.dies_after_s < Infinity:
            loop.call_later(
                guest.dies_after_s, self._guest, name, GuestState.OFF, f"{name} dies", _DIED
            )
        if guest.shuts_down_after_s < Infinity:
            call = f"{name} shuts down"
            loop.call_later(guest.shuts_down_after_s, self._guest, name, GuestState.OFF, call)

    async def ready(self, guest: GuestSpec, timeout_s: float) -> None:
        pass

    async def stop(self, guest: GuestSpec, timeout_s: float) -> None:
        delay_s = self._guests[guest.name].stop_delay_s
        await asyncio.sleep(min(delay_s, timeout_s))
        if delay_s > timeout_s:
            raise DeadlineError(f"guest {guest.name} did not stop within {timeout_s:g} s")
        self._guest(guest.name, GuestState.OFF, f"stop {guest.name}")

    async def kill(self, name: str) -> None:
        self._guest(name, GuestState.OFF, f"kill {name}")

    def _guest(self, name: str, state: GuestState, call: str, trouble: str = "") -> None:
        self.calls.append(call)
        self._guests[name].state = state
        self._guests[name].trouble = trouble
        self._tell()

    async def start_pool(self, name: str) -> None:
        raise GuestError(f"there is no pool {name} (simulated)")

    async def stop_pool(self, name: str) -> None:
        raise GuestError(f"there is no pool {name} (simulated)")

    # --- Host, Memory ---

    def status(self, text: str) -> None:
        pass

    async def reach_target(self, reached: bool) -> None:
        self.calls.append(f"target {'reached' if reached else 'left'}")

    async def run_hook(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        self.calls.append(f"hook {' '.join(argv)} {environment}")

    def goals(self) -> tuple[str, ...]:
        return self._goals

    def keep_goals(self, goals: Iterable[str]) -> None:
        self._goals = tuple(goals)

    def sources(self) -> dict[str, str]:
        return self._sources

    def keep_sources(self, sources: dict[str, str]) -> None:
        self._sources = sources

    def seen(self) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        return self._seen

    def keep_seen(self, paths: dict[str, tuple[str, ...]], uuids: dict[str, str]) -> None:
        self._seen = (paths, uuids)

    def fitted(self) -> dict[str, dict[str, int]]:
        return self._fitted

    def keep_fitted(self, slots: dict[str, dict[str, int]]) -> None:
        self._fitted = slots

    def publish(self, volumes: dict[str, bool]) -> None:
        self.published = dict(volumes)

    def reasons(self) -> dict[str, Reason]:
        return self._reasons

    def keep_reasons(self, reasons: Mapping[str, Reason]) -> None:
        self._reasons = dict(reasons)

    def open_volumes(self) -> dict[str, VolumeSpec]:
        return self._open

    def keep_open(self, volumes: Mapping[str, VolumeSpec]) -> None:
        self._open = dict(volumes)

    def due_once(self) -> tuple[str, ...]:
        return self._due_once

    def keep_once(self, marked: Iterable[str], due: Iterable[str]) -> None:
        self.marked_once, self._due_once = tuple(marked), tuple(due)

    def backups_due(self) -> dict[str, str]:
        return self._backups_due

    def keep_backups_due(self, volumes: dict[str, str]) -> None:
        self._backups_due = dict(volumes)

    def making(self) -> tuple[Making, ...]:
        return self._making

    def keep_making(self, keystores: Iterable[Making]) -> None:
        self._making = tuple(keystores)

    async def kept(self) -> None:
        pass


def read(path: Path) -> dict[str, str]:
    """The text of a description, by its path. Raises ConfigError."""
    try:
        return {str(path): path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, name: str) -> tuple[Settings, dict[str, Any]]:
    from vmcryptd.config import schema

    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    table = raw.pop("sim", {})
    settings = schema.parse_tables({name: raw})
    more = {f"v{i}": VolumeSpec(f"v{i}", f"/dev/sim/v{i}") for i in range(table.get("volumes", 0))}
    settings = replace(settings, volumes={**settings.volumes, **more})
    guests = table.setdefault("guest", {})
    for i in range(table.get("guests", 0)):
        guests.setdefault(f"g{i}", {"disks": [f"/dev/mapper/v{i}"], "autostart": True})
    return settings, table


def _uuid(spec: VolumeSpec, number: int) -> str:
    """The header's UUID: the configured one, if there is one."""
    tag, _, value = spec.device.partition("=")
    named = value if tag == "UUID" else ""
    return spec.uuid or named or f"{0:08x}-0000-0000-0000-{number:012x}"


def _volume(entry: dict[str, Any]) -> _Volume:
    appears_after_s = duration(entry.get("appears_after", 0))
    return _Volume(
        slots=dict(enumerate(map(_slot, (entry, *entry.get("slots", ()))))),
        on=tuple(entry.get("on", ())),
        present=entry.get("present", appears_after_s == 0),
        appears_after_s=appears_after_s,
        open=entry.get("open", False),
        delay_s=duration(entry.get("delay", 0)),
        fault=entry.get("fault", ""),
        tokens=tuple(
            _Token(one["kind"], one.get("pin_sha256", ""), one.get("fault", ""))
            for one in entry.get("tokens", ())
        ),
        rotates_in_s=duration(entry.get("rotates_in", 0.1)),
        is_half_rotated=entry.get("half_rotated", False),
        data_reencrypted=entry.get("moved", False),
        away=entry.get("away", False),
        copied=entry.get("copied", False),
        mapped_as=entry.get("mapped_as", ""),
    )


def _slot(entry: dict[str, Any]) -> SimSlot:
    return SimSlot(
        digest=entry.get("passphrase_sha256", ""),
        sources=tuple(entry.get("sources", ())),
        memory_kib=entry.get("memory_kib", 65536),
        iterations=entry.get("iterations", 0),
        kdf=entry.get("kdf", ""),
        priority=entry.get("priority", 1),
    )


def _guest(entry: dict[str, Any]) -> _Guest:
    starting_s = duration(entry.get("starting", 0))
    state = GuestState.STARTING if starting_s else GuestState.OFF
    return _Guest(
        disks=tuple(entry.get("disks", ())),
        shareable=entry.get("shareable", False),
        autostart=entry.get("autostart", False),
        state=GuestState.RUNNING if entry.get("running") else state,
        start_delay_s=duration(entry.get("start_delay", 0)),
        stop_delay_s=duration(entry.get("stop_delay", 0)),
        fault=entry.get("fault", ""),
        starting_s=starting_s,
        autostart_once=entry.get("autostart_once", False),
        dies_after_s=duration(entry.get("dies_after", Infinity)),
        shuts_down_after_s=duration(entry.get("shuts_down_after", Infinity)),
    )
