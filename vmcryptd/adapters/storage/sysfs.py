# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices from sysfs, mounts from mountinfo, paths to what they lie on. Never hangs."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vmcryptd.core.model import BlockDevice, Mount, Storage

# A path on one of these may hang when its server is away; on autofs, because a look mounts it.
NETWORK = {
    *("9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "gfs2"),
    *("lustre", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs"),
}
LINKS_LIMIT = 40  # as in the kernel's own path walk


class Roots(NamedTuple):
    """Where the kernel's files are; tests have a tree of their own."""

    sys_block: str = "/sys/class/block"
    proc: str = "/proc"
    mountinfo: str = "/proc/self/mountinfo"
    udev: str = "/run/udev/data"


# What a disk or partition looks like never changes while it is there; its entry's inode tells that
# it still is the same one. A mapping changes only with an event: `forget` it then.
Lasting = dict[tuple[str, int], BlockDevice]
# Device → the links in /dev/disk that udev has for it, without /dev/. They change with an event, too.
Links = dict[str, frozenset[str]]


def observe(
    roots: Roots,
    paths: Iterable[str],
    lasting: Lasting | None = None,
    known_links: Links | None = None,
) -> Storage:
    """`lasting` and `known_links` are kept from look to look: most of a host's devices need no second one."""
    paths = list(paths)
    devices = block_devices(roots.sys_block, {} if lasting is None else lasting)
    mounts = parse_mounts(read_file(roots.mountinfo))
    names = {device.number: name for name, device in devices.items()}
    places = MountTable(mounts)
    links: dict[str, str] = {}
    files: dict[str, str] = {}
    reals: dict[str, str] = {}
    for path in paths:
        if not path.startswith("/"):
            continue
        # udev's links stay in /dev, so nearly all paths are done with one call.
        if path.startswith("/dev/") and (name := names.get(_rdev(path))):
            links[path] = name
            continue
        real, there = places.follow(path)
        if real != path:
            reals[path] = real
        if not there:
            continue
        try:
            status = os.stat(real)
        except OSError:
            continue
        if stat.S_ISBLK(status.st_mode):
            if name := names.get(_number(status.st_rdev)):
                links[path] = name
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            files[path] = _number(status.st_dev)
            # btrfs gives each subvolume a device number of its own, which no block device has.
            if os.major(status.st_dev) == 0 and (mount := places.of(real)):
                files[path] = mount.number
    claims = udev_claims(roots, devices, paths, {} if known_links is None else known_links)
    return Storage(devices, links, files, reals, mounts, claims)


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
    """Look at a device anew the next time."""
    known_links.pop(name, None)
    for identity in [identity for identity in lasting if identity[0] == name]:
        del lasting[identity]


def udev_claims(
    roots: Roots, devices: Mapping[str, BlockDevice], paths: Iterable[str], known: Links
) -> dict[str, tuple[str, ...]]:
    """Those of the paths that are udev's links and wanted by several devices, with these.

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
                continue  # udev has not come to it yet
            known[name] = frozenset(
                line[2:] for line in database.splitlines() if line.startswith("S:disk/")
            )
        for link in known[name] & wanted.keys():
            claims.setdefault(wanted[link], []).append(name)
    return {path: tuple(sorted(names)) for path, names in claims.items() if len(names) > 1}


def _lasts(device: BlockDevice, path: str) -> bool:
    """Not of RAID and loop devices, which get and lose members and files."""
    if device.name.startswith("dm-"):
        # One that is just being made has no table yet. Mappings are many, and each look is for all.
        return bool(device.dm_uuid and device.below)
    if device.name.startswith("loop"):
        return False
    return any(os.path.exists(f"{path}/{sign}") for sign in ("partition", "device"))


def _suspended_or_not(device: BlockDevice, path: str) -> BlockDevice:
    """The one thing that changes without an event."""
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
            return None  # a loop device that stands ready, with nothing behind it
        backing_file = backing
    return BlockDevice(name, number, below, dm_name, dm_uuid, suspended, backing_file)


@functools.lru_cache(maxsize=1)
def parse_mounts(text: str) -> tuple[Mount, ...]:
    """proc_pid_mountinfo(5): id parent major:minor root target options optional… - type source."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        try:
            dash = fields.index("-", 6)
            fstype, source = fields[dash + 1], unescape(fields[dash + 2])
        except (ValueError, IndexError):
            continue
        number = fields[2]
        if number.startswith("0:") and source.startswith("/dev/"):  # btrfs
            number = _rdev(source) or number
        found.append(Mount(number, unescape(fields[4]), source, fstype))
    return tuple(found)


def unescape(field: str) -> str:
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def is_remote(mount: Mount) -> bool:
    """Whether a look into it may hang for somebody else's fault."""
    return mount.fstype in NETWORK or mount.fstype.startswith("fuse.")


class MountTable:
    """Tells which mount a path lies on, and follows paths without touching network file systems."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._by_target: Mapping[str, Mount] = {
            mount.target: mount for mount in mounts
        }  # the last is on top
        self._links: dict[
            str, str | None
        ] = {}  # of this look: paths have most of their parts in common

    def of(self, real: str) -> Mount | None:
        """The mount of a path without symbolic links."""
        while True:
            if mount := self._by_target.get(real):
                return mount
            if real == "/" or not real.startswith("/"):
                return None
            real = real[: real.rfind("/")] or "/"

    def follow(self, path: str) -> tuple[str, bool]:
        """The path with its symbolic links followed, and whether that worked to its end.

        It ends where something is missing, or where a network file system begins.
        """
        todo = path.split("/")[::-1]
        done = ""
        links = 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done[: done.rfind("/")] if done else ""
                continue
            place = f"{done}/{part}"
            if place not in self._links:
                self._links[place] = self._link(place)
            target = self._links[place] if links < LINKS_LIMIT else None
            if target is None:
                return os.path.normpath("/".join([place, *todo[::-1]])), False
            if not target:
                done = place
                continue
            links += 1
            todo += target.split("/")[::-1]
            if target.startswith("/"):
                done = ""
        return done or "/", True

    def _link(self, place: str) -> str | None:
        """What a symbolic link says; empty if it is none, None if it cannot be asked."""
        mount = self._by_target.get(place)
        if mount and is_remote(mount):
            return None
        try:
            return os.readlink(place)
        except OSError as error:
            return "" if error.errno == errno.EINVAL else None


def read_file(path: str) -> str:
    """A file of /proc to its end (each read gives a page at most); empty when it is away."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        content = b"".join(iter(functools.partial(os.read, fd, 64 * 1024), b""))
    except OSError:
        return ""
    finally:
        os.close(fd)
    return content.decode(errors="surrogateescape")


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


def _rdev(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return _number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else ""


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
