# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads block devices from sysfs, mounts from mountinfo, links from udev. Never hangs: no disk is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vmcryptd.adapters.storage.mounts import MountTable, device_number, parse_mounts, read_file
from vmcryptd.adapters.storage.paths import Paths
from vmcryptd.core.model import BlockDevice, Mount, Storage


class Roots(NamedTuple):
    """The directories of the kernel's files; tests use their own tree."""

    sys_block: str = "/sys/class/block"
    proc: str = "/proc"
    mountinfo: str = "/proc/self/mountinfo"
    udev: str = "/run/udev/data"
    fstab: str = "/etc/fstab"


# A disk or partition does not change while it exists; the inode of its entry shows that it is the same one. A
# mapping changes only with an event: `forget` it then.
Lasting = dict[tuple[str, int], BlockDevice]
# Device → its links in /dev/disk by udev, without /dev/. They change only with an event, too.
Links = dict[str, frozenset[str]]


def observe(
    roots: Roots,
    paths: Iterable[str],
    lasting: Lasting | None = None,
    known_links: Links | None = None,
    known_paths: Paths | None = None,
) -> Storage:
    """Observe devices, mounts and paths. `lasting` and `known_links` are caches: most devices are read only once.

    A path outside of /dev may lie on a file system that hangs: its place comes from `known_paths`.
    """
    paths = list(paths)
    devices = block_devices(roots.sys_block, {} if lasting is None else lasting)
    mounts = parse_mounts(read_file(roots.mountinfo))
    names = {device.number: name for name, device in devices.items()}
    places = MountTable(mounts)
    links: dict[str, str] = {}
    files: dict[str, str] = {}
    reals: dict[str, str] = {}
    for path in paths:
        if path.startswith("/dev/") and (name := names.get(device_number(path))):
            links[path] = name
            continue
        if known_paths is None or (answer := known_paths.known(path)) is None:
            continue
        real = known_paths.through_binds(answer.real, places)
        if real != path:
            reals[path] = real
        number = device_number(real) if real.startswith("/dev/") else answer.block
        if name := names.get(number):
            links[path] = name
        elif answer.on and real == answer.real and places.on(real).number in ("", answer.on):
            files[path] = answer.on
    claims = udev_claims(roots, devices, paths, {} if known_links is None else known_links)
    return Storage(devices, links, files, reals, mounts, claims)


def may_hang(path: str) -> bool:
    """Whether a lookup of the path may wait for a disk or server. udev's links stay in /dev."""
    return path.startswith("/") and (not path.startswith("/dev/") or path.startswith("/dev/shm/"))


def suspended_mounts(
    roots: Roots, devices: Mapping[str, BlockDevice], mounts: Iterable[Mount]
) -> set[str]:
    """The numbers of file systems whose device is suspended now, or lies on one that is."""
    by_number = {device.number: device for device in devices.values()}
    found: dict[str, bool] = {}

    def is_suspended(name: str) -> bool:
        if name not in found:
            found[name] = False  # also ends the walk if sysfs shows a circle
            below = devices[name].below if name in devices else ()
            found[name] = (
                name.startswith("dm-")
                and attribute(f"{roots.sys_block}/{name}/dm/suspended") == "1"
            ) or any(map(is_suspended, below))
        return found[name]

    numbers = {mount.number for mount in mounts} & by_number.keys()
    return {number for number in numbers if is_suspended(by_number[number].name)}


def block_devices(sys_block: str, lasting: Lasting) -> dict[str, BlockDevice]:
    found: dict[str, BlockDevice] = {}
    known = dict(lasting)
    lasting.clear()
    try:
        entries = list(os.scandir(sys_block))
    except OSError:
        return found
    for entry in entries:
        identity = entry.name, entry.inode()
        device = known.get(identity)
        if device is None:
            device = _block_device(entry.name, entry.path)
        elif device.dm_uuid.startswith("CRYPT-"):
            device = _suspended_or_not(device, entry.path)
        if device is not None:
            found[device.name] = device
            if identity in known or _lasts(device, entry.path):
                lasting[identity] = device
    return found


def forget(lasting: Lasting, known_links: Links, name: str) -> None:
    """Read a device again the next time."""
    known_links.pop(name, None)
    for identity in [identity for identity in lasting if identity[0] == name]:
        del lasting[identity]


def udev_claims(
    roots: Roots, devices: Mapping[str, BlockDevice], paths: Iterable[str], known: Links
) -> dict[str, tuple[str, ...]]:
    """The paths that are udev's links claimed by several devices, each with these devices.

    A link leads to one of them; udev's database has all (systemd, src/libsystemd/sd-device/device-private.c,
    device_update_db: a line "S:disk/by-uuid/…" for each link).
    """
    wanted = {path.removeprefix("/dev/"): path for path in paths if path.startswith("/dev/disk/")}
    if not wanted:
        return {}
    for name in known.keys() - devices.keys():
        del known[name]
    claims: dict[str, list[str]] = {}
    for name, device in devices.items():
        if name not in known:
            database = read_file(f"{roots.udev}/b{device.number}")
            if not database:
                continue  # udev has not processed it yet
            known[name] = frozenset(
                line[2:] for line in database.splitlines() if line.startswith("S:disk/")
            )
        for link in known[name] & wanted.keys():
            claims.setdefault(wanted[link], []).append(name)
    return {path: tuple(sorted(names)) for path, names in claims.items() if len(names) > 1}


def _lasts(device: BlockDevice, path: str) -> bool:
    """False for RAID and loop devices, whose members and files change."""
    if device.name.startswith("dm-"):
        # A mapping that is just being made has no table yet. Others may be cached: hosts have many.
        return bool(device.dm_uuid and device.below)
    if device.name.startswith("loop"):
        return False
    return any(os.path.exists(f"{path}/{sign}") for sign in ("partition", "device"))


def _suspended_or_not(device: BlockDevice, path: str) -> BlockDevice:
    """The device with its suspended flag, which changes without an event."""
    suspended = attribute(f"{path}/dm/suspended") == "1"
    return device if suspended == device.suspended else device._replace(suspended=suspended)


def _block_device(name: str, path: str) -> BlockDevice | None:
    number = attribute(f"{path}/dev")
    if number is None:
        return None  # went away meanwhile
    below: tuple[str, ...] = ()
    dm_name = dm_uuid = backing_file = ""
    suspended = False
    try:
        below = tuple(sorted(os.listdir(f"{path}/slaves")))
    except OSError:  # partitions have no slaves; their directory lies in the whole disk's
        if os.path.exists(f"{path}/partition"):
            below = (os.path.basename(os.path.dirname(os.path.realpath(path))),)
    if name.startswith("dm-"):
        dm_name = attribute(f"{path}/dm/name") or ""
        dm_uuid = attribute(f"{path}/dm/uuid") or ""
        suspended = attribute(f"{path}/dm/suspended") == "1"
    elif name.startswith("loop") and not below:
        backing = attribute(f"{path}/loop/backing_file")
        if backing is None:
            return None  # a loop device without a file
        backing_file = backing
    return BlockDevice(name, number, below, dm_name, dm_uuid, suspended, backing_file)


def attribute(path: str) -> str | None:
    """An attribute in sysfs without its newline. Not open(): this takes a third of the time."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.fsdecode(os.read(fd, 4096)).removesuffix("\n")
    except OSError:
        return None
    finally:
        os.close(fd)
