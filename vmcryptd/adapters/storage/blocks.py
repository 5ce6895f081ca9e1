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
from collections.abc import Iterable, Iterator, Mapping, Sequence

from vmcryptd.adapters.storage import holders, sysfs
from vmcryptd.adapters.storage.mounts import Bind, MountTable, is_remote, parse_mounts, read_file
from vmcryptd.adapters.storage.paths import Paths, within
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
# systemd's error for a transient unit whose name the fstab or a unit file has already (src/core/dbus-manager.c,
# transient_unit_from_message). Asking first would cost another child for each mount.
HAS_UNIT = "already loaded or has a fragment file"
HOLDERS_S = 10.0
DEVICES_FILE = "/etc/lvm/devices/system.devices"
BUSY_TRIES = 3


class SysfsBlocks:
    """The port `Blocks` on this host."""

    def __init__(self, roots: Roots = Roots()) -> None:  # noqa: B008 (frozen)
        self._roots = roots
        self._threads = DaemonThreads()
        self._lasting: sysfs.Lasting = {}
        self._links: sysfs.Links = {}
        self._paths = Paths(roots.fstab)
        self._devices: Mapping[str, BlockDevice] = {}  # as last seen
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
            """Announce all events of one turn of the loop together: opening one volume causes a dozen."""
            nonlocal announced
            if not announced:
                announced = True
                loop.call_soon(announce)

        self._watch_devices(loop, announce_once)
        self._forget_all()  # earlier changes were not announced
        self._watch_mounts(loop, announce_once)
        self._paths.watch(announce_once)
        self._appearances = Appearances(announce_once)
        self._watches.callback(self._appearances.close)

    def close(self) -> None:
        """Stop watching."""
        self._watches.close()

    async def look(self, paths: Iterable[str]) -> None:
        wanted = [path for path in paths if sysfs.may_hang(path)]
        if not self._devices:
            self.observe(())
        mounts = parse_mounts(read_file(self._roots.mountinfo)) if wanted else ()
        suspended = sysfs.suspended_mounts(self._roots, self._devices, mounts)
        await self._paths.look(wanted, mounts, suspended)

    def observe(self, paths: Iterable[str]) -> Storage:
        paths = list(paths)
        storage = sysfs.observe(self._roots, paths, self._lasting, self._links, self._paths)
        self._devices = storage.devices
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

    async def activate(
        self,
        volume: VolumeSpec,
        mapping: str,
        beside: Sequence[str] = (),
        locked: Sequence[VolumeSpec] = (),
    ) -> None:
        # LVM gets our devices only: it must not scan guests' disks, nor take a guest's group of the same name for ours
        # (harvester#8894), and its own settings may exclude our devices.
        path = f"/dev/mapper/{mapping}"
        fields = "vg_uuid,vg_missing_pv_count,vg_name"
        done = await run(["pvs", "--devices", path, *_report(fields), "--", path], timeout_s=LVM_S)
        if done.code != 0:
            raise StorageError(
                f"volume {volume.name}: it holds no LVM physical volume: {done.complaint}"
            )
        uuid, missing, name = ([*done.out.strip().split(":"), "", ""])[:3]
        if not name:
            raise StorageError(
                f"volume {volume.name}: its physical volume belongs to no volume group"
            )
        if volume.vg and volume.vg != name:
            raise StorageError(
                f"volume {volume.name}: it holds the volume group {name}, not {volume.vg}; correct `vg`"
            )
        devices, is_whole = [path], missing in ("", "0")
        if not is_whole:
            devices = await self._members(uuid, path, beside)
        argv = ["vgchange", "--devices", ",".join(devices), "--activate", "y", "--", name]
        changed = await run(argv, timeout_s=LVM_S)
        await self.wait_udev()
        if is_whole and any(device.vg == name for device in self.observe(()).devices.values()):
            return
        left = await self._inactive(name, devices)
        if not left:
            return
        if any(spec.vg in (None, name) for spec in locked):
            # The step of the volume that opens last activates the group.
            log.info("the volume group %s is not complete yet: %s", name, changed.complaint)
            return
        why = changed.complaint if changed.code else f"these stay inactive: {', '.join(left)}"
        if not is_whole:
            why += f"; {await self._why_incomplete()}"
        raise StorageError(f"volume {volume.name}: the volume group {name} is not active: {why}")

    async def _members(self, uuid: str, path: str, beside: Sequence[str]) -> list[str]:
        """The devices of a group: those of our mappings that belong to it, and those that LVM finds by itself."""
        ours = [path, *(f"/dev/mapper/{mapping}" for mapping in beside)]
        found = [path]
        for where in (["--devices", ",".join(ours)], []):
            argv = ["pvs", *where, *_report("pv_name"), "--select", f"vg_uuid={uuid}"]
            done = await run(argv, timeout_s=LVM_S)
            names = [line.strip() for line in done.out.splitlines()] if done.code == 0 else []
            found += [name for name in names if name.startswith("/")]  # not "[unknown]"
        return list(dict.fromkeys(found))

    async def _inactive(self, group: str, devices: Sequence[str]) -> list[str]:
        """The logical volumes of a group that are not active and should be."""
        fields = _report("lv_active,lv_skip_activation,lv_name")
        argv = ["lvs", "--devices", ",".join(devices), *fields, "--", group]
        done = await run(argv, timeout_s=LVM_S)
        if done.code != 0:
            raise StorageError(f"the volume group {group} cannot be looked at: {done.complaint}")
        rows = [line.strip().split(":") for line in done.out.splitlines()]
        return [name for active, skipped, name in rows if not active and not skipped]

    async def _why_incomplete(self) -> str:
        """Why LVM does not use devices of the group that are not ours, and what to do."""
        with contextlib.suppress(DeadlineError):
            has_file = functools.partial(os.path.exists, DEVICES_FILE)
            if await self._threads.call(HOLDERS_S, has_file):
                return (
                    f"LVM looks at no device that {DEVICES_FILE} does not list: "
                    "`lvmdevices --adddev DEVICE` adds one"
                )
        return (
            "a physical volume is missing, or global_filter in /etc/lvm/lvm.conf hides it: "
            "`pvs` shows what LVM sees"
        )

    async def deactivate(self, volume: VolumeSpec, mapping: str) -> None:
        # The kernel says what is active: that costs nothing, and never waits for a disk.
        group = ""
        for attempt in range(BUSY_TRIES):
            storage = self.observe(())
            device = holders.by_dm_name(storage.devices, mapping)
            above = holders.reach(storage, device.name).devices if device else ()
            active = [other for other in above if other.vg and _lies_on(other, device)]
            if not active:
                return
            group = active[0].vg
            devices = ",".join(_lvm_devices(storage, group))
            argv = ["vgchange", "--devices", devices, "--activate", "n", "--", group]
            if attempt:
                await self.wait_udev()  # udev may be reading them (systemd#33129)
            done = await run(argv, timeout_s=LVM_S)
            if done.code == 0:
                return
            if "in use" not in done.err and "open" not in done.err:
                raise StorageError(
                    f"volume {volume.name}: the volume group {group} cannot be deactivated: {done.complaint}"
                )
        who = ", ".join(await self.holders(mapping))
        raise BusyError(f"volume {volume.name}: the volume group {group} on it is in use: {who}")

    async def mount(self, volume: VolumeSpec, mapping: str) -> None:
        if not volume.mount:
            raise StorageError(f"volume {volume.name}: it has no `mount`")
        # systemd refuses paths with symbolic links, and the kernel lists mounts without them.
        target = await self._real(volume, volume.mount)
        if not self._is_mounted(mapping, target):
            await self._mount_at(volume, mapping, target)
        for bind in self._paths.binds:
            if within(bind.source, target) or within(bind.source, volume.mount):
                await self._bind(volume, mapping, bind)

    async def _mount_at(self, volume: VolumeSpec, mapping: str, target: str) -> None:
        unit = mount_unit(target)
        # Before= makes systemd stop the mount after our own stop at host shutdown: guests first. systemd makes the
        # directories with 0755, so that QEMU's user can pass; this process's umask would prevent that.
        argv = [
            "systemd-mount", "--no-ask-password", "--quiet", "--collect",
            "--property=Before=vmcryptd-guests.service",
            # All guests wait for a keystore, and its journal suffices: no fsck.
            *(["--fsck=no"] if volume.lock is Lock.BOOT else []),
            "--", f"/dev/mapper/{mapping}", target,
        ]  # fmt: skip
        done = await run(argv, timeout_s=MOUNT_S)
        if done.code != 0 and HAS_UNIT in done.err:
            done = await run(["systemctl", "start", "--", unit], timeout_s=MOUNT_S)
        if done.code != 0:
            raise StorageError(
                f"volume {volume.name}: it cannot be mounted at {target}: {done.complaint}; "
                f"`systemctl status {unit}` tells more"
            )
        if not self._is_mounted(mapping, target):
            raise StorageError(
                f"volume {volume.name}: {unit} is active, but what is mounted there is another device"
            )

    async def _bind(self, volume: VolumeSpec, mapping: str, bind: Bind) -> None:
        """Mount a folder of the volume at its bind mount point in the fstab."""
        target = await self._real(volume, bind.target)
        if self._is_mounted(mapping, target):
            return
        if MountTable(self.observe(()).mounts).has(target):
            raise StorageError(
                f"volume {volume.name}: {target} was mounted from {bind.source} before the volume was: add the "
                f"options noauto and x-systemd.before=vmcryptd-guests.service to its line in the fstab, and "
                f"`umount {target}`"
            )
        unit = mount_unit(target)
        done = await run(["systemctl", "start", "--", unit], timeout_s=MOUNT_S)
        if done.code != 0:
            raise StorageError(
                f"volume {volume.name}: {bind.source} cannot be mounted at {target}, as the fstab says: "
                f"{done.complaint}; `systemctl status {unit}` tells more"
            )

    async def _real(self, volume: VolumeSpec, path: str) -> str:
        try:
            return await self._threads.call(HOLDERS_S, functools.partial(os.path.realpath, path))
        except DeadlineError as error:
            raise StorageError(
                f"volume {volume.name}: {path} cannot be looked up: {error}"
            ) from None

    async def unmount(self, volume: VolumeSpec, mapping: str) -> None:
        # Not `systemctl stop`: at host shutdown the mount's own stop job waits until ours is done,
        # and we would wait for that job. systemd notices that the mount is gone.
        for mount in holders.deepest_first(self._mounts_of(mapping)):
            done = await self._unmount_one(mount)
            if done.code == 0 or mount not in self._mounts_of(mapping):
                continue
            if "busy" not in done.err:
                raise StorageError(
                    f"volume {volume.name}: it cannot be unmounted from {mount.target}: {done.complaint}; "
                    f"unmount it, then `vmcryptctl lock {volume.name}`"
                )
            who = [h for h in await self.holders(mapping) if h != f"mounted at {mount.target}"]
            raise BusyError(
                f"volume {volume.name}: it cannot be unmounted from {mount.target}, it is in use by "
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
            log.warning("the users of %s cannot be found: %s", mapping, error)
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
        return any(mount.target == target for mount in self._mounts_of(mapping))

    def _absent(self, storage: Storage, paths: Iterable[str]) -> Iterator[str]:
        """Absent files that may appear without an event of a device or mount; not on servers, which send no events."""
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
                except OSError:  # ENOBUFS: some events were lost
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
        # call; an epoll descriptor of our own becomes readable for it. Edge-triggered, as in
        # libmount: polling the level clears the event, and the loop's epoll polls first.
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


def _report(fields: str) -> list[str]:
    return ["--noheadings", "--separator", ":", "-o", fields]


def _lvm_devices(storage: Storage, group: str) -> list[str]:
    """The devices below the active logical volumes of a group."""
    lvs = {device.name for device in storage.devices.values() if device.vg == group}
    lowers = {lower for name in lvs for lower in storage.devices[name].below} - lvs
    found = [storage.devices[lower] for lower in sorted(lowers) if lower in storage.devices]
    return [f"/dev/mapper/{one.dm_name}" if one.dm_name else f"/dev/{one.name}" for one in found]


def _lies_on(logical: BlockDevice, device: BlockDevice | None) -> bool:
    """Directly, and not through another mapping, whose contents belong to its own volume."""
    return device is not None and device.name in logical.below
