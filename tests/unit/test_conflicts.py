# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests whose start would destroy a volume, or a disk that another guest writes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from vmcryptd.core import conflicts, graph
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    BlockDevice,
    DiskSource,
    Domain,
    GuestState,
    Observation,
    Pool,
    Settings,
    SourceType,
    Storage,
    Virtualisation,
    VolumeSpec,
)

UUID = "0" * 32
# vda → md0 → the logical volume that is the volume "a"; sr0 is a file on a loop device, volume "b".
DEVICES = (
    BlockDevice("vda"),
    BlockDevice("vda1", below=("vda",)),
    BlockDevice("md0", below=("vda1",)),
    BlockDevice("dm-0", below=("md0",), dm_name="vg-a", dm_uuid="LVM-x"),
    BlockDevice("dm-1", below=("dm-0",), dm_name="a", dm_uuid=f"CRYPT-LUKS2-{UUID}-a"),
    BlockDevice("dm-2", below=("dm-1",), dm_name="inner-c", dm_uuid="LVM-y"),
    BlockDevice("loop0", backing_file="/srv/b.luks"),
    BlockDevice("vdz"),
)
LINKS = {
    "/dev/vda": "vda",
    "/dev/vda1": "vda1",
    "/dev/vg/a": "dm-0",
    "/dev/disk/by-id/dm-name-vg-a": "dm-0",
    "/dev/mapper/a": "dm-1",
    "/dev/inner/c": "dm-2",
    "/dev/loop0": "loop0",
    "/dev/vdz": "vdz",
}
STORAGE = Storage(
    {device.name: device for device in DEVICES},
    LINKS,
    files={"/srv/link": "8:1", "/srv/b.luks": "8:1"},
    real={"/srv/link": "/srv/b.luks"},
)
VOLUMES = (
    VolumeSpec("a", "/dev/vg/a"),
    VolumeSpec("b", "/dev/loop0"),
    VolumeSpec("c", "/dev/inner/c"),
)
SETTINGS = Settings(volumes={volume.name: volume for volume in VOLUMES})


def block(path: str, *, writable: bool = True, shareable: bool = False) -> DiskSource:
    return DiskSource(SourceType.BLOCK, path, writable=writable, shareable=shareable)


def built(*guests: tuple[str, GuestState, Iterable[DiskSource]]) -> Graph:
    domains = {name: Domain(name, "", state, sources=tuple(s)) for name, state, s in guests}
    pools = {"p": Pool("p", active=True, volumes={"v": "/dev/vg/a"})}
    return graph.build(SETTINGS, Observation(STORAGE, Virtualisation(True, domains, pools)))


@pytest.mark.parametrize(
    ("disk", "text"),
    [
        (block("/dev/vg/a"), "its disk /dev/vg/a (/dev/dm-0) is the LUKS device of volume a: "),
        (block("/dev/disk/by-id/dm-name-vg-a"), "(/dev/dm-0) is the LUKS device of volume a: "),
        (DiskSource(SourceType.POOL, pool="p", volume="v"), "is the LUKS device of volume a: "),
        (block("/dev/vda"), "its disk /dev/vda carries volume a (/dev/vg/a): "),
        (block("/dev/vda1"), "its disk /dev/vda1 carries volume a (/dev/vg/a): "),
        (block("/dev/loop0"), "its disk /dev/loop0 is the LUKS device of volume b: "),
        (DiskSource(SourceType.FILE, "/srv/link"), "/srv/link (/srv/b.luks) carries volume b"),
        (block("/dev/mapper/a"), "its disk /dev/mapper/a (/dev/dm-1) carries volume c"),
        (block("/dev/vg/a", shareable=True), "is the LUKS device of volume a: "),
        (block("/dev/vdz"), ""),
        (block("/dev/vg/a", writable=False), ""),
        (block("/dev/not/there"), ""),
    ],
)
def test_disks_that_hold_a_volume(disk: DiskSource, text: str) -> None:
    conflict = conflicts.overwritten_volume(built(("g", GuestState.OFF, [disk])), "g")
    assert text in conflict.text if conflict and text else conflict is None and not text


@pytest.mark.parametrize(
    ("other", "state", "is_shared"),
    [
        (block("/dev/vdz"), GuestState.RUNNING, True),
        (block("/dev/vdz"), GuestState.PAUSED, True),
        (block("/dev/vdz"), GuestState.CRASHED, True),
        (block("/dev/vdz"), GuestState.OFF, False),
        (block("/dev/vdz", writable=False), GuestState.RUNNING, False),
        (block("/dev/vdz", shareable=True), GuestState.RUNNING, False),
        (block("/dev/vg/a"), GuestState.RUNNING, False),
    ],
)
def test_disks_that_another_guest_writes(
    other: DiskSource, state: GuestState, is_shared: bool
) -> None:
    world = built(("g", GuestState.OFF, [block("/dev/vdz")]), ("h", state, [other]))
    assert (conflicts.shared_disk(world, "g") is not None) == is_shared


def test_a_guest_that_is_just_being_started_counts() -> None:
    disks = [block("/dev/vdz")]
    world = built(("g", GuestState.OFF, disks), ("h", GuestState.OFF, disks))
    conflict = conflicts.shared_disk(world, "g", {"g", "h"})
    assert conflict
    assert conflict.text.startswith("guest h, which runs, writes its disk /dev/vdz: ")
    assert conflicts.shared_disk(world, "g", {"g"}) is None
