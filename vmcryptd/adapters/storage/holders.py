# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the users of a device: devices on it, mounts, swap, processes. Blocks: call it in a thread."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vmcryptd.adapters.storage.mounts import device_number, parse_mounts, read_file
from vmcryptd.adapters.storage.paths import within
from vmcryptd.adapters.storage.sysfs import Roots
from vmcryptd.core.model import BlockDevice, Mount, Storage
from vmcryptd.core.text import escaped, octal_unescaped

LONGEST = 256  # characters that describe one user
MOST_ARGUMENTS = 256 * 1024  # bytes that are read of a process's command line
GUEST_NAME = re.compile(r"(?:^|,)guest=((?:[^,]|,,)+)")  # QEMU doubles commas in option values


class Reach(NamedTuple):
    """All devices on one device, directly or further up, and their mounts."""

    devices: tuple[BlockDevice, ...]  # without the device itself
    numbers: frozenset[str]  # with it
    mounts: tuple[Mount, ...]


def reach(storage: Storage, name: str) -> Reach:
    """Everything above a device, loop devices on files in its mounts included."""
    found: dict[str, BlockDevice] = {}
    mounts: dict[Mount, None] = {}
    todo = [storage.devices[name]] if name in storage.devices else []
    while todo:
        device = todo.pop()
        if device.name in found:
            continue
        found[device.name] = device
        here = [mount for mount in storage.mounts if mount.number == device.number]
        mounts.update(dict.fromkeys(here))
        todo += [
            other
            for other in storage.devices.values()
            if device.name in other.below
            or any(within(other.backing_file, mount.target) for mount in here)
        ]
    numbers = frozenset(device.number for device in found.values())
    above = tuple(device for device in found.values() if device.name != name)
    return Reach(above, numbers, tuple(mounts))


def users(roots: Roots, storage: Storage, name: str) -> tuple[str, ...]:
    """Each user in a few words."""
    over = reach(storage, name)
    said = sorted(_device(device) for device in over.devices)
    said += [f"mounted at {mount.target}" for mount in over.mounts]
    said += _swaps(roots, over)
    openers, elsewhere = processes(roots, over)
    said += openers
    # A mount namespace's copy usually goes with the mount itself, so it is named only if nothing else is found.
    if not over.mounts or not openers:
        said += elsewhere
    # Names of guests, processes, mount points and devices come from outside.
    return tuple(dict.fromkeys(escaped(one, LONGEST) for one in said))


def processes(roots: Roots, over: Reach) -> tuple[list[str], list[str]]:
    """Those that have one of the devices, or a file in one of the mounts, open; and those that have it mounted."""
    openers, elsewhere = [], []
    own_namespace = _link(f"{roots.proc}/self/ns/mnt")
    asked_namespaces = {own_namespace, ""}
    for pid in sorted(int(entry) for entry in os.listdir(roots.proc) if entry.isdigit()):
        if pid == os.getpid():
            continue
        place = f"{roots.proc}/{pid}"
        if any(_is_of(path, target, over) for path, target in _open_files(place)):
            openers.append(_process(place, pid))
            continue
        # A mount namespace of its own (a container, ProtectSystem=) has copies of our mounts.
        namespace = _link(f"{place}/ns/mnt")
        if namespace not in asked_namespaces:
            asked_namespaces.add(namespace)
            mounts = parse_mounts(read_file(f"{place}/mountinfo"))
            if any(mount.number in over.numbers for mount in mounts):
                elsewhere.append(f"mounted for {_process(place, pid)}")
    return openers, elsewhere


def _device(device: BlockDevice) -> str:
    if device.vg:
        volume = device.dm_name.replace("--", "\0").partition("-")[2].replace("\0", "-")
        return f"logical volume {device.vg}/{volume}"
    if device.dm_name:
        return f"mapping {device.dm_name}"
    if device.backing_file:
        return f"loop device {device.name} ({device.backing_file})"
    if device.name.startswith("md"):
        return f"RAID {device.name}"
    return f"device {device.name}"


def _swaps(roots: Roots, over: Reach) -> Iterator[str]:
    names = {device.name for device in over.devices}
    for line in read_file(f"{roots.proc}/swaps").splitlines()[1:]:
        path = octal_unescaped(line.partition(" ")[0])
        on_mount = any(within(path, mount.target) for mount in over.mounts)
        if on_mount or os.path.basename(path) in names or device_number(path) in over.numbers:
            yield f"swap on {path}"


def _open_files(place: str) -> Iterator[tuple[str, str]]:
    """Each descriptor's magic link and its text, which never asks the file's own file system."""
    try:
        descriptors = os.listdir(f"{place}/fd")
    except OSError:  # it ended
        descriptors = []
    for link in (*(f"fd/{number}" for number in descriptors), "cwd", "root", "exe"):
        path = f"{place}/{link}"
        if (target := _link(path)).startswith("/"):
            yield path, target


def _is_of(path: str, target: str, over: Reach) -> bool:
    if target.startswith("/dev/"):
        return device_number(path) in over.numbers
    return any(within(target, mount.target) for mount in over.mounts)


def _process(place: str, pid: int) -> str:
    arguments = read_file(f"{place}/cmdline", MOST_ARGUMENTS).split("\0")
    for option, value in itertools.pairwise(arguments):
        if option == "-name" and (match := GUEST_NAME.search(value)):
            return f"guest {match[1].replace(',,', ',')} (pid {pid})"
    return f"{read_file(f'{place}/comm').strip() or 'process'} (pid {pid})"


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def deepest_first(mounts: Iterable[Mount]) -> list[Mount]:
    """The order to unmount in; of those stacked on one target, the last mounted first."""
    last_first = list(mounts)[::-1]
    return sorted(last_first, key=lambda mount: -mount.target.rstrip("/").count("/"))


def by_dm_name(devices: Mapping[str, BlockDevice], mapping: str) -> BlockDevice | None:
    return next((device for device in devices.values() if device.dm_name == mapping), None)
