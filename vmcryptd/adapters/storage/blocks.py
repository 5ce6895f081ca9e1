# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices, the volume groups on mappings, and their mounts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import select
import socket
from collections.abc import Iterable, Iterator, Sequence

from vmcryptd.adapters.storage import holders, sysfs
from vmcryptd.adapters.storage.mounts import MountTable, is_remote
from vmcryptd.adapters.storage.paths import Paths
from vmcryptd.adapters.storage.sysfs import Roots
from vmcryptd.core.errors import BusyError, DeadlineError, StorageError, VmcryptdError
from vmcryptd.core.model import BlockDevice, Lock, Mount, Storage, VolumeSpec
from vmcryptd.core.ports import Changed
from vmcryptd.posix.appearance import Appearances
from vmcryptd.posix.run import Completed, run
from vmcryptd.posix.threads import DaemonThreads

log = logging.getLogger(__name__)

NETLINK_KOBJECT_UEVENT = 15
UDEV_GROUP = 2  # what udevd has processed; 1 would be the kernel's own events
EVENTS_AT_ONCE = 1000

SETTLE_S = 10.0
LVM_S = 60.0
MOUNT_S = 120.0  # a file system may have a journal to replay, or much to write back
# What systemd refuses a transient unit with where the fstab or somebody's own unit file has one of that name already
# (src/core/dbus-manager.c, transient_unit_from_message). To ask first would cost each mount another child.
HAS_UNIT = "already loaded or has a fragment file"
HOLDERS_S = 10.0
BUSY_TRIES = 3


class SysfsBlocks:
    """The port `Blocks` on this host."""

    def __init__(self, roots: Roots = Roots()) -> None:  # noqa: B008 (frozen)
        self._roots = roots
        self._threads = DaemonThreads()
        self._lasting: sysfs.Lasting = {}
        self._links: sysfs.Links = {}
        self._paths = Paths(roots.fstab)
        self._watches = contextlib.ExitStack()
        self._appearances: Appearances | None = None

    def watch(self, changed: Changed) -> None:
        loop = asyncio.get_running_loop()
        announced = False

        def announce() -> None:
            nonlocal announced
            announced = False
            changed()

        def announce_once() -> None:
            """One call for all events of a turn of the loop: opening one volume makes a dozen."""
            nonlocal announced
            if not announced:
                announced = True
                loop.call_soon(announce)

        self._watch_devices(loop, announce_once)
        self._forget_all()  # what has changed before that was told to nobody
        self._watch_mounts(loop, announce_once)
        self._paths.watch(announce_once)
        self._appearances = Appearances(announce_once)
        self._watches.callback(self._appearances.close)

    def close(self) -> None:
        """Stop watching."""
        self._watches.close()

    async def look(self, paths: Iterable[str]) -> None:
        wanted = [path for path in paths if sysfs.may_hang(path)]
        now = self.observe(())
        await self._paths.look(wanted, now.mounts, sysfs.suspended_numbers(now.devices))

    def observe(self, paths: Iterable[str]) -> Storage:
        paths = list(paths)
        storage = sysfs.observe(self._roots, paths, self._lasting, self._links, self._paths)
        if paths and self._appearances is not None:
            self._appearances.await_(self._absent(storage, paths), storage.mounts)
        return storage

    async def wait_udev(self) -> None:
        try:
            done = await run(
                ["udevadm", "settle", f"--timeout={SETTLE_S:.0f}"], timeout_s=SETTLE_S + 5
            )
        except VmcryptdError as error:
            log.info("%s", error)
            return
        if done.code != 0:
            log.info("udev has not settled: %s", done.complaint)

    async def activate(self, volume: VolumeSpec, mapping: str) -> None:
        # Only this device is looked at: the scan must not read what lies on guests' disks, nor take
        # a guest's group of the same name for ours (harvester#8894).
        path = f"/dev/mapper/{mapping}"
        report = ["--noheadings", "--separator", ":", "-o", "vg_uuid,vg_missing_pv_count,vg_name"]
        done = await run(["pvs", "--devices", path, *report, "--", path], timeout_s=LVM_S)
        if done.code != 0:
            raise StorageError(f"{volume.name} holds no LVM physical volume: {done.complaint}")
        uuid, missing, name = ([*done.out.strip().split(":"), "", ""])[:3]
        if not name:
            raise StorageError(f"The physical volume on {volume.name} belongs to no volume group")
        if volume.vg and volume.vg != name:
            raise StorageError(
                f"{volume.name} holds the volume group {name}, not {volume.vg}: correct `vg`"
            )
        if missing in ("", "0"):
            argv = ["vgchange", "--devices", path, "--activate", "y", "--", name]
        else:
            # It lies on other devices too, which only a look at all can find; its UUID is unique.
            argv = ["vgchange", "--activate", "y", "--select", f"vg_uuid={uuid}"]
        done = await run(argv, timeout_s=LVM_S)
        if done.code != 0 and missing not in ("", "0"):
            # The step of the volume that is opened last will do it.
            log.info("The volume group %s is not complete yet: %s", name, done.complaint)
            return
        if done.code != 0:
            raise StorageError(f"The volume group {name} cannot be activated: {done.complaint}")
        await self.wait_udev()

    async def deactivate(self, volume: VolumeSpec, mapping: str) -> None:
        # The kernel is asked what is active: that costs nothing, and never waits for a disk.
        group = ""
        for attempt in range(BUSY_TRIES):
            storage = self.observe(())
            device = holders.by_dm_name(storage.devices, mapping)
            above = holders.reach(storage, device.name).devices if device else ()
            active = [other for other in above if other.vg and _lies_on(other, device)]
            if not active:
                return
            group = active[0].vg
            argv = [
                "vgchange",
                "--devices",
                f"/dev/mapper/{mapping}",
                "--activate",
                "n",
                "--",
                group,
            ]
            if attempt:
                await self.wait_udev()  # udev may be looking into them (systemd#33129)
            done = await run(argv, timeout_s=LVM_S)
            if done.code == 0:
                return
            if "in use" not in done.err and "open" not in done.err:
                raise StorageError(
                    f"The volume group {group} cannot be deactivated: {done.complaint}"
                )
        who = ", ".join(await self.holders(mapping))
        raise BusyError(f"The volume group {group} on {volume.name} is in use: {who}")

    async def mount(self, volume: VolumeSpec, mapping: str) -> None:
        if not volume.mount:
            raise StorageError(f"{volume.name} has no `mount`")
        if self._is_mounted(mapping, volume.mount):
            return
        unit = mount_unit(volume.mount)
        try:
            os.makedirs(volume.mount, mode=0o755, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"The directory {volume.mount} cannot be made: {error.strerror}"
            ) from None
        # Before= makes systemd stop it after our own stop at host shutdown: guests first.
        argv = [
            "systemd-mount", "--no-ask-password", "--quiet", "--collect",
            "--property=Before=vmcryptd-guests.service",
            # The guests of a whole host wait for a keystore; its journal is all that it needs.
            *(["--fsck=no"] if volume.lock is Lock.BOOT else []),
            "--", f"/dev/mapper/{mapping}", volume.mount,
        ]  # fmt: skip
        done = await run(argv, timeout_s=MOUNT_S)
        if done.code != 0 and HAS_UNIT in done.err:
            done = await run(["systemctl", "start", "--", unit], timeout_s=MOUNT_S)
        if done.code != 0:
            raise StorageError(
                f"{volume.name} cannot be mounted at {volume.mount}: {done.complaint}; "
                f"`systemctl status {unit}` tells more"
            )
        if not self._is_mounted(mapping, volume.mount):
            raise StorageError(f"{unit} is active, but what is mounted there is not {volume.name}")

    async def unmount(self, volume: VolumeSpec, mapping: str) -> None:
        # Not `systemctl stop`: at host shutdown the mount's own stop job waits until ours is done,
        # and we would wait for that job. systemd notices that the mount is gone.
        for mount in holders.deepest_first(self._mounts_of(mapping)):
            done = await self._unmount_one(mount)
            if done.code == 0 or mount not in self._mounts_of(mapping):
                continue
            if "busy" not in done.err:
                raise StorageError(
                    f"{volume.name} cannot be unmounted from {mount.target}: {done.complaint}"
                )
            who = [h for h in await self.holders(mapping) if h != f"mounted at {mount.target}"]
            raise BusyError(
                f"{volume.name} cannot be unmounted from {mount.target}, it is in use by "
                f"{', '.join(who) or 'the kernel (no holder is visible)'}; "
                f"stop that, then `vmcryptctl lock {volume.name}`"
            )

    async def holders(self, mapping: str) -> tuple[str, ...]:
        storage = self.observe(())
        device = holders.by_dm_name(storage.devices, mapping)
        if device is None:
            return ()
        try:
            look = functools.partial(holders.users, self._roots, storage, device.name)
            return await self._threads.call(HOLDERS_S, look)
        except (DeadlineError, OSError) as error:
            log.warning("Cannot tell who uses %s: %s", mapping, error)
            return ()

    async def _unmount_one(self, mount: Mount) -> Completed:
        done = Completed(1)
        for attempt in range(BUSY_TRIES):
            if attempt:
                await self.wait_udev()
            done = await run(["umount", "--", mount.target], timeout_s=MOUNT_S)
            if done.code == 0 or "busy" not in done.err:
                break
        return done

    def _mounts_of(self, mapping: str) -> Sequence[Mount]:
        storage = self.observe(())
        device = holders.by_dm_name(storage.devices, mapping)
        return [mount for mount in storage.mounts if device and mount.number == device.number]

    def _is_mounted(self, mapping: str, target: str) -> bool:
        wanted = os.path.normpath(target)
        return any(mount.target == wanted for mount in self._mounts_of(mapping))

    def _absent(self, storage: Storage, paths: Iterable[str]) -> Iterator[str]:
        """Files that may appear without news of a device or mount; those of servers give none of their own."""
        missing = [path for path in paths if sysfs.may_hang(path) and not storage.has(path)]
        table = MountTable(storage.mounts if missing else ())
        for path in missing:
            answer = self._paths.known(path)
            real = storage.real.get(path, path)
            if answer is None or answer.is_silent or real.startswith("/dev/"):
                continue
            if not is_remote(table.on(real)):
                yield real

    def _forget_all(self) -> None:
        self._lasting.clear()
        self._links.clear()

    def _watch_devices(self, loop: asyncio.AbstractEventLoop, changed: Changed) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        events = socket.socket(socket.AF_NETLINK, kind, NETLINK_KOBJECT_UEVENT)
        self._watches.callback(events.close)
        events.bind((0, UDEV_GROUP))

        def receive() -> None:
            for _ in range(EVENTS_AT_ONCE):
                try:
                    event = events.recv(16 * 1024)
                except BlockingIOError:
                    return
                except OSError:  # ENOBUFS: some were lost, nobody knows which
                    self._forget_all()
                    changed()
                    return
                if b"\0SUBSYSTEM=block\0" in event:
                    sysfs.forget(self._lasting, self._links, device_of(event))
                    changed()

        loop.add_reader(events, receive)
        self._watches.callback(loop.remove_reader, events)

    def _watch_mounts(self, loop: asyncio.AbstractEventLoop, changed: Changed) -> None:
        # mountinfo announces changes by EPOLLPRI (proc_pid_mountinfo(5)), for which loops have no
        # call; an epoll descriptor of our own becomes readable for it. Edge-triggered, as libmount has
        # it: merely asking for the level takes the news back, and the loop's epoll asks first.
        table = os.open(self._roots.mountinfo, os.O_RDONLY | os.O_CLOEXEC)
        self._watches.callback(os.close, table)
        poll = select.epoll()
        self._watches.callback(poll.close)
        try:
            poll.register(table, select.EPOLLIN | select.EPOLLET)
        except PermissionError:  # an ordinary file, in a test's tree
            return
        poll.poll(0)  # the first edge is its own registration

        def notice() -> None:
            poll.poll(0)
            changed()

        loop.add_reader(poll.fileno(), notice)
        self._watches.callback(loop.remove_reader, poll.fileno())


def device_of(event: bytes) -> str:
    """The device's name in sysfs."""
    path = event.partition(b"DEVPATH=")[2].partition(b"\0")[0]
    return os.fsdecode(path.rpartition(b"/")[2])


def mount_unit(path: str) -> str:
    """The name of a mount unit (systemd.unit(5), "STRING ESCAPING FOR INCLUSION IN UNIT NAMES")."""
    parts = [part for part in os.path.normpath(path).split("/") if part]
    if not parts:
        return "-.mount"
    name = "-".join(
        "".join(
            chr(byte)
            if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in ":_.")
            else f"\\x{byte:02x}"
            for byte in os.fsencode(part)
        )
        for part in parts
    )
    if name.startswith("."):
        name = "\\x2e" + name[1:]
    return f"{name}.mount"


def _lies_on(logical: BlockDevice, device: BlockDevice | None) -> bool:
    """Directly, and not by way of another mapping: what is on that belongs to its own volume."""
    return device is not None and device.name in logical.below
