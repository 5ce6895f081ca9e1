# SPDX-License-Identifier: LGPL-2.1-or-later
"""Observes the whole host once, for `vmcryptctl check`. It only reads, and keeps nothing."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmcryptd.adapters.keysources import sources
from vmcryptd.adapters.libvirt.domains import Libvirt
from vmcryptd.adapters.luks.mappings import Cryptsetup, read_header
from vmcryptd.adapters.storage.blocks import SysfsBlocks
from vmcryptd.adapters.systemd.state_files import StateFiles
from vmcryptd.audit import tables
from vmcryptd.core import graph as graphs
from vmcryptd.core import identity
from vmcryptd.core.errors import DamagedHeaderError, VmcryptdError, WrongUuidError
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    Header,
    Observation,
    Remembered,
    Settings,
    SourceKind,
    Storage,
    Virtualisation,
)
from vmcryptd.core.text import octal_unescaped
from vmcryptd.posix.run import CommandError, program, run

LIBVIRT_S = 30.0
SYSTEMCTL_S = 15.0
# Debian and Fedora; the script has its own default, which Debian changes from suspend to shutdown.
LIBVIRT_GUESTS_SCRIPTS = (
    "/usr/lib/libvirt/libvirt-guests.sh",
    "/usr/libexec/libvirt-guests.sh",
)
LIBVIRT_GUESTS = ("/etc/default/libvirt-guests", "/etc/sysconfig/libvirt-guests")
QEMU_CONF = "/etc/libvirt/qemu.conf"
SAVED = "/var/lib/libvirt/qemu/save"
# Where Debian, Fedora and others have libdir; the name is libcryptsetup's, crypt_token_external_path(3).
TOKEN_PLUGIN = "libcryptsetup-token-"
TOKEN_PLUGINS = tuple(
    f"{libdir}/cryptsetup/{TOKEN_PLUGIN}*.so" for libdir in ("lib/*-linux-*", "lib64", "lib")
)
UNITS = (
    "vmcryptd.service",
    "vmcryptd-guests.service",
    "vmcryptd-console.service",
    "libvirt-guests.service",
)


@dataclass(frozen=True)
class File:
    """The file at a path."""

    is_regular: bool = False
    is_directory: bool = False
    is_empty: bool = False
    is_executable: bool = False
    uid: int = 0
    mode: int = 0


@dataclass(frozen=True)
class Facts:
    """The observed host."""

    settings: Settings
    graph: Graph = field(default_factory=Graph)
    table_faults: tuple[tables.Fault, ...] = ()  # entries of fstab and crypttab that harm volumes
    headers: Mapping[str, Header | VmcryptdError] = field(default_factory=dict)  # volume → header
    strangers: Mapping[str, str] = field(
        default_factory=dict
    )  # volume → why the header on its device is another volume's
    identities: Mapping[str, str] = field(default_factory=dict)  # a guest's path → the real path
    unread_chains: Mapping[str, str] = field(default_factory=dict)  # disk image → why
    luks_disks: frozenset[str] = frozenset()  # guests' disks that begin with a LUKS header
    files: Mapping[str, File] = field(default_factory=dict)  # those that exist
    credentials: frozenset[str] = frozenset()
    token_plugins: frozenset[str] = frozenset()  # token kinds for which cryptsetup has a plugin
    has_clevis: bool = False
    units: Mapping[str, str] = field(default_factory=dict)  # unit → enabled, disabled…
    plain_swap: tuple[str, ...] = ()
    memory_kib: int = 0
    suspends: str = (
        ""  # the setting that suspends guests at shutdown, which writes their memory to disk
    )
    saved: frozenset[str] = frozenset()  # guests with a managed save
    libvirt_error: str = ""
    is_root: bool = True


async def look(settings: Settings) -> Facts:
    """Raises GraphError."""
    virtualisation, error = Virtualisation(), ""
    chains: dict[str, tuple[str, ...]] = {}
    unread: dict[str, str] = {}
    blocks = SysfsBlocks()
    if settings.volumes or settings.guests:
        libvirt = Libvirt(settings.daemon.libvirt_uri)
        try:
            virtualisation = await libvirt.refresh(LIBVIRT_S)
            chains, unread = await _chains(libvirt, virtualisation)
        except VmcryptdError as failure:
            error = str(failure)
        finally:
            await libvirt.close()
    boot_tables = tuple(
        entry
        for file in (tables.FSTAB, tables.CRYPTTAB)
        for entry in tables.entries(file, _lines(file))
    )
    needed = {*graphs.wanted_paths(settings, virtualisation, chains), *tables.paths(boot_tables)}
    wanted = sorted(needed)
    await blocks.look(wanted)
    storage = blocks.observe(wanted)
    paths, uuids = StateFiles().seen()
    observation = Observation(storage, virtualisation, Remembered(paths, uuids), {}, chains)
    graph = graphs.build(settings, observation)
    units, loaded = await _units()
    headers = await _headers(graph)
    return Facts(
        settings=settings,
        graph=graph,
        table_faults=tuple(tables.faults(boot_tables, graph, storage)),
        headers=headers,
        strangers=_strangers(settings, observation, headers),
        identities=_identities(virtualisation, storage),
        unread_chains=unread,
        luks_disks=frozenset(_luks_disks(graph, virtualisation, storage)),
        files=_files(settings),
        credentials=loaded | frozenset(_stored_credentials()),
        has_clevis=_has("clevis"),
        token_plugins=frozenset(_token_plugins()),
        units=units,
        plain_swap=tuple(_plain_swap(storage)),
        memory_kib=_total_memory_kib(),
        suspends=_suspends(units),
        saved=frozenset(path.stem for path in _entries(SAVED) if path.suffix == ".save"),
        libvirt_error=error,
        is_root=os.geteuid() == 0,
    )


async def _chains(
    libvirt: Libvirt, virtualisation: Virtualisation
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Disk image → its backing files; and disk image → why its chain cannot be read."""
    found, unread = {}, {}
    for domain in virtualisation.domains.values():
        for source in domain.sources:
            if source.path and _exists(source.path):
                try:
                    chain = await libvirt.chain(source)
                except VmcryptdError as error:
                    unread[source.path] = str(error)
                    continue
                found[source.path] = tuple(member.path for member in chain if member.path)
    return found, unread


async def _headers(graph: Graph) -> dict[str, Header | VmcryptdError]:
    crypt = Cryptsetup()
    found: dict[str, Header | VmcryptdError] = {}
    for name, node in graph.volumes.items():
        if node.device or node.spec.header:
            try:
                found[name] = await crypt.header(node.spec)
            except VmcryptdError as error:
                found[name] = error
    return found


def _strangers(
    settings: Settings,
    observation: Observation,
    headers: Mapping[str, Header | VmcryptdError],
) -> dict[str, str]:
    found = {}
    for name, header in headers.items():
        if isinstance(header, Header):
            try:
                identity.check_header(settings.volumes[name], header.uuid, settings, observation)
            except WrongUuidError as error:
                found[name] = str(error)
    return found


def _identities(virtualisation: Virtualisation, storage: Storage) -> dict[str, str]:
    """Two paths of one device or file are the same disk."""
    found = {}
    for domain in virtualisation.domains.values():
        for source in domain.sources:
            if source.path:
                found[source.path] = storage.links.get(source.path) or os.path.realpath(source.path)
    return found


def _luks_disks(graph: Graph, virtualisation: Virtualisation, storage: Storage) -> Iterable[str]:
    mappings = {node.mapping for node in graph.volumes.values() if node.mapping}
    for domain in virtualisation.domains.values():
        for source in domain.sources:
            kernel_name = storage.links.get(source.path)
            if kernel_name is None or storage.devices[kernel_name].dm_name in mappings:
                continue
            try:
                read_header(source.path)
            except DamagedHeaderError:
                yield source.path
            except (OSError, VmcryptdError):
                continue
            else:
                yield source.path


def _files(settings: Settings) -> dict[str, File]:
    wanted: set[str] = set()
    for volume in settings.volumes.values():
        wanted.update(path for path in (volume.mount, volume.header) if path)
        for source in volume.keys:
            if source.kind is SourceKind.FILE:
                wanted.add(source.argument)
            elif source.kind is SourceKind.EXEC:
                wanted.add(shlex.split(source.argument)[0])
    wanted.update(settings.daemon.on_waiting[:1], settings.daemon.on_failed[:1])
    return {path: found for path in wanted if (found := _file(path)) is not None}


def _exists(path: str) -> bool:
    return os.path.exists(path)


def _file(path: str) -> File | None:
    try:
        status = os.stat(path)
        is_directory = stat.S_ISDIR(status.st_mode)
        return File(
            is_regular=stat.S_ISREG(status.st_mode),
            is_directory=is_directory,
            is_empty=not os.listdir(path) if is_directory else status.st_size == 0,
            is_executable=os.access(path, os.X_OK),
            uid=status.st_uid,
            mode=stat.S_IMODE(status.st_mode),
        )
    except OSError:
        return None


def _stored_credentials() -> Iterable[str]:
    for store in (*sources.CREDENTIAL_STORES, *sources.ENCRYPTED_STORES):
        yield from (path.name for path in _entries(store))


def _has(name: str) -> bool:
    try:
        return bool(program(name))
    except CommandError:
        return False


def _token_plugins() -> Iterable[str]:
    for libraries in TOKEN_PLUGINS:
        for path in Path("/usr").glob(libraries):
            yield path.name.removeprefix(TOKEN_PLUGIN).partition(".")[0]


async def _units() -> tuple[dict[str, str], frozenset[str]]:
    """Unit → whether it is enabled, and the credentials of vmcryptd.service."""
    credential_keys = [
        f"{how}Credential{kind}" for how in ("Load", "Set") for kind in ("", "Encrypted")
    ]
    wanted = ("Id", "UnitFileState", *credential_keys)
    try:
        argv = ["systemctl", "show", f"--property={','.join(wanted)}", "--", *UNITS]
        done = await run(argv, timeout_s=SYSTEMCTL_S)
    except VmcryptdError:
        return {}, frozenset()
    if done.code != 0:
        return {}, frozenset()
    units: dict[str, str] = {}
    credentials: set[str] = set()
    for block in done.out.split("\n\n"):
        values: dict[str, str] = {}
        for line in block.splitlines():
            key, _, value = line.partition("=")
            values[key] = f"{values.get(key, '')} {value}".strip()
        units[values.get("Id", "")] = values.get("UnitFileState", "")
        if values.get("Id") == "vmcryptd.service":
            for key in credential_keys:
                credentials.update(one.partition(":")[0] for one in values.get(key, "").split())
    return units, frozenset(credentials)


def _plain_swap(storage: Storage) -> Iterable[str]:
    for line in _lines("/proc/swaps")[1:]:
        path = octal_unescaped(line.split()[0])
        try:
            status = os.stat(path)
        except OSError:
            continue
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        text = f"{os.major(number)}:{os.minor(number)}"
        name = next((one.name for one in storage.devices.values() if one.number == text), "")
        if name and not name.startswith("zram") and not _is_encrypted(storage, name):
            yield path


def _is_encrypted(storage: Storage, name: str) -> bool:
    device = storage.devices.get(name)
    if device is None:
        return False
    below = [_is_encrypted(storage, lower) for lower in device.below]
    return device.dm_uuid.startswith("CRYPT-") or (bool(below) and all(below))


def _total_memory_kib() -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1])
    return 0


def _suspends(units: Mapping[str, str]) -> str:
    if units.get("libvirt-guests.service", "").startswith("enabled"):
        action = _set_to(r"ON_SHUTDOWN", LIBVIRT_GUESTS_SCRIPTS) or "suspend"
        action = _set_to(r"\s*ON_SHUTDOWN", LIBVIRT_GUESTS) or action
        if action == "suspend":
            return "libvirt-guests.service (ON_SHUTDOWN=suspend)"
    for line in _lines(QEMU_CONF):  # since libvirt 11.2
        if match := re.match(r'\s*auto_shutdown_try_save\s*=\s*"(all|persistent|transient)"', line):
            return f'{QEMU_CONF} (auto_shutdown_try_save = "{match[1]}")'
    return ""


def _set_to(variable: str, paths: Iterable[str]) -> str:
    """The last value of a shell variable (an expression, from the beginning of a line); empty if it is not set."""
    value = ""
    for path in paths:
        for line in _lines(path):
            if match := re.match(rf"{variable}=[\"']?(\w+)", line):
                value = match[1]
    return value


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _entries(directory: str) -> list[Path]:
    try:
        return list(Path(directory).iterdir())
    except OSError:
        return []
