# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who needs whom, from what the kernel and libvirt say, and from memory while that cannot be seen."""

from __future__ import annotations

from typing import Any

import pytest

from vmcryptd.core import graph as graphs
from vmcryptd.core.errors import GraphError
from vmcryptd.core.graph import Graph
from vmcryptd.core.model import (
    BlockDevice,
    Content,
    DiskSource,
    Domain,
    GuestSpec,
    GuestState,
    KeySource,
    Mount,
    Observation,
    Pool,
    Remembered,
    Settings,
    SourceKind,
    SourceType,
    Storage,
    Virtualisation,
    VolumeSpec,
)

UUID = "3f1d5c5e-6f0e-4f0a-9f43-0f3d6a0e8d11"
OTHER = "00000000-0000-0000-0000-000000000001"


def volume(name: str, device: str = "", **more: Any) -> VolumeSpec:
    return VolumeSpec(name, device or f"/dev/{name}", **more)


def settings(*specs: VolumeSpec, guests: tuple[GuestSpec, ...] = ()) -> Settings:
    return Settings(
        volumes={spec.name: spec for spec in specs}, guests={spec.name: spec for spec in guests}
    )


def disk(name: str, *below: str, number: str = "", **more: Any) -> BlockDevice:
    return BlockDevice(name, number, below, **more)


def luks(name: str, dm_name: str, *below: str, uuid: str = UUID, number: str = "") -> BlockDevice:
    dm_uuid = f"CRYPT-LUKS2-{uuid.replace('-', '')}-{dm_name}"
    return BlockDevice(name, number, below, dm_name, dm_uuid)


def lv(name: str, dm_name: str, *below: str, number: str = "") -> BlockDevice:
    return BlockDevice(name, number, below, dm_name, "LVM-abc")


def storage(
    *devices: BlockDevice, mounts: tuple[Mount, ...] = (), files: Any = None, real: Any = None,
    **links: str,
) -> Storage:  # fmt: skip
    """`links`: kernel name → path, the other way round than in Storage, as keywords cannot be paths."""
    return Storage(
        devices={device.name: device for device in devices},
        links={path: name.replace("_", "-") for name, path in links.items()},
        files=files or {},
        real=real or {},
        mounts=mounts,
    )


def guest(name: str, *paths: str, state: GuestState = GuestState.OFF, **more: Any) -> Domain:
    sources = tuple(
        DiskSource(SourceType.BLOCK if path.startswith("/dev/") else SourceType.FILE, path)
        for path in paths
    )
    return Domain(name, name, state, sources=sources, **more)


def libvirt(*domains: Domain, pools: tuple[Pool, ...] = ()) -> Virtualisation:
    return Virtualisation(True, {d.name: d for d in domains}, {p.name: p for p in pools})


def build(
    configured: Settings,
    observed: Storage | None = None,
    known: Virtualisation | None = None,
    **more: Any,
) -> Graph:
    return graphs.build(
        configured,
        Observation(storage=observed or Storage(), virtualisation=known or libvirt(), **more),
    )


def test_a_volume_in_a_file() -> None:
    """cryptsetup puts a loop device between the file and the mapping, and takes it away again."""
    spec = volume("keys", "/srv/keys.img", uuid=UUID)
    there = {"/srv/keys.img": "8:1"}
    assert not build(settings(spec), storage(disk("sda1", number="8:1"))).volumes["keys"].device
    locked = build(settings(spec), storage(disk("sda1", number="8:1"), files=there))
    assert locked.volumes["keys"].device == "/srv/keys.img"
    assert not locked.volumes["keys"].is_open
    loop, other = (
        disk(f"loop{n}", backing_file=f"/srv/{name}.img") for n, name in enumerate(("keys", "copy"))
    )
    opened = storage(loop, other, luks("dm-1", "by-hand", "loop0"), files=there)
    assert build(settings(spec), opened).volumes["keys"].mapping == "by-hand"
    copy = storage(loop, other, luks("dm-1", "copy", "loop1"), files=there)
    assert not build(settings(spec), copy).volumes["keys"].is_open
    linked = storage(
        loop,
        luks("dm-1", "keys", "loop0"),
        files={"/link.img": "8:1"},
        real={"/link.img": "/srv/keys.img"},
    )
    assert build(settings(volume("keys", "/link.img")), linked).volumes["keys"].is_open


def test_a_volume_in_a_file_on_a_volume() -> None:
    inner = volume("keys", "/srv/keys.img")
    outer = volume("outer", content=Content.FILESYSTEM, mount="/srv")
    on = storage(luks("dm-1", "outer", "sda", number="253:1"), disk("sda"),
                 files={"/srv/keys.img": "253:1"}, sda="/dev/outer")  # fmt: skip
    for seen in (on, storage()):
        assert build(settings(inner, outer), seen).volumes["keys"].stands_on == ("outer",)


def test_through_raid_partitions_lvm_and_a_loop_file() -> None:
    graph = build(
        settings(
            volume("outer", "/dev/sdb"),
            volume("on_raid", "/dev/md127"),
            volume("on_lv", "/dev/vg/lv"),
            volume("on_loop", "/dev/loop0"),
        ),
        storage(
            disk("sda"), disk("sda1", "sda"), disk("sdb"),
            luks("dm-0", "outer", "sdb", number="253:0"),
            disk("dm-0p1", "dm-0"),
            disk("md127", "sda1", "dm-0p1"),
            luks("dm-1", "on_raid", "md127", uuid=OTHER),
            lv("dm-2", "vg-lv", "dm-1"),
            disk("loop0", backing_file="/srv/x.img"),
            sdb="/dev/sdb", md127="/dev/md127", dm_2="/dev/vg/lv", loop0="/dev/loop0",
            files={"/srv/x.img": "253:0"},
        ),
    )  # fmt: skip
    assert {name: node.stands_on for name, node in graph.volumes.items()} == {
        "outer": (),
        "on_raid": ("outer",),
        "on_lv": ("on_raid",),
        "on_loop": ("outer",),
    }
    assert graph.standing_on == {"outer": ("on_raid", "on_loop"), "on_raid": ("on_lv",)}
    assert graph.beneath(["on_lv"]) == ["outer", "on_raid", "on_lv"]
    assert graph.volumes["on_raid"].is_open
    assert not graph.volumes["on_lv"].is_open
    assert graph.volumes["on_lv"].device == "dm-2"
    assert graph.users("outer") == ["volume on_raid"]


@pytest.mark.parametrize(
    "device", ["/dev/my-vg/a-b", "/dev/mapper/my--vg-a--b", "/dev/mapper/my--vg-c"]
)
def test_a_group_with_hyphens_while_locked(device: str) -> None:
    graph = build(
        settings(volume("a", content=Content.LVM, vg="my-vg"), volume("b", device)),
    )
    assert graph.volumes["b"].stands_on == ("a",)
    assert graph.is_explained("b")


def test_names_that_only_begin_alike() -> None:
    graph = build(
        settings(
            volume("a", content=Content.LVM, vg="my"),
            volume("m", content=Content.FILESYSTEM, mount="/srv/vm"),
            volume("b", "/dev/my-vg/a"),
            volume("c", "/dev/mapper/my--vg-a"),
            volume("d", "/dev/mapper/mymy-a"),
            volume("k", keys=(KeySource(SourceKind.FILE, "/srv/vmx/key"),)),
            volume("l", keys=(KeySource(SourceKind.FILE, "/srv/vm/key"),)),
        ),
        known=libvirt(guest("g", "/srv/vmx/disk"), guest("h", "/srv/vm/disk")),
    )
    assert [name for name, node in graph.volumes.items() if node.needs] == ["l"]
    assert graph.volumes["l"].opens_after == ("m",)
    assert graph.volumes["l"].stands_on == ()
    assert (graph.guests["g"].needs, graph.guests["h"].needs) == ((), ("m",))


def test_detached_header_and_after() -> None:
    graph = build(
        settings(
            volume("store", content=Content.FILESYSTEM, mount="/run/keys"),
            volume("first"),
            volume("a", header="/run/keys/header", after=("first",)),
        ),
    )
    assert graph.volumes["a"].opens_after == ("store", "first")
    assert sorted(graph.beneath(["a"])[:-1]) == ["first", "store"]


def test_mapping_of_a_locked_volume_as_a_disk() -> None:
    graph = build(settings(volume("a")), known=libvirt(guest("g", "/dev/mapper/a")))
    assert graph.guests["g"].needs == ("a",)
    assert graph.guests_on == {"a": ("g",)}


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("/dev/disk/by-id/dm-name-cr_a", ("cr_a",)),
        ("/dev/disk/by-id/dm-name-cr_a-part1", ("cr_a",)),
        ("/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-" + UUID.replace("-", "") + "-cr_a", ("cr_a",)),
        ("/dev/disk/by-id/dm-uuid-part1-CRYPT-LUKS2-" + UUID.replace("-", "") + "-cr_a1", ("cr_a",)),
        ("/dev/disk/by-id/dm-name-vg-lv", ("group",)),
        ("/dev/mapper/cr_a1", ("cr_a",)),
        ("/dev/mapper/cr_ap12", ("cr_a",)),
        ("/dev/mapper/cr_a-part1", ("cr_a",)),
        ("/dev/mapper/cr_s2p1", ("cr_s2",)),
        ("/dev/mapper/cr_s21", ()),  # of a name that ends in a digit kpartx makes none such
        ("/dev/mapper/vmp1", ("vmp",)),
        ("/dev/mapper/other1", ()),
        ("/dev/disk/by-id/wwn-cr_a", ()),
        ("/dev/disk/by-id/dm-uuid-mpath-cr_a", ()),
    ],
)  # fmt: skip
def test_names_of_a_locked_mapping_and_of_partitions_on_it(
    path: str, needs: tuple[str, ...]
) -> None:
    specs = (volume("cr_a"), volume("cr_s2"), volume("vmp"))
    group = volume("group", content=Content.LVM, vg="vg")
    graph = build(settings(*specs, group), known=libvirt(guest("g", path)))
    assert graph.guests["g"].needs == needs


def test_a_path_that_leads_elsewhere() -> None:
    graph = build(
        settings(volume("m", content=Content.FILESYSTEM, mount="/srv/vm")),
        storage(real={"/var/lib/libvirt/images/x": "/srv/vm/x"}),
        libvirt(guest("g", "/var/lib/libvirt/images/x")),
    )
    assert graph.guests["g"].needs == ("m",)


def test_a_mount_point_that_is_named_by_a_symbolic_link() -> None:
    graph = build(
        settings(volume("m", content=Content.FILESYSTEM, mount="/srv/vm")),
        storage(real={"/srv/vm": "/data/vm", "/srv/vm/x": "/data/vm/x"}),
        libvirt(guest("g", "/srv/vm/x")),
    )
    assert graph.guests["g"].needs == ("m",)


def test_a_mount_point_below_a_symbolic_link_is_recognised() -> None:
    spec = volume("m", content=Content.FILESYSTEM, mount="/srv/vm")
    seen = storage(
        luks("dm-0", "m", "m", number="253:0"), m="/dev/m", real={"/srv/vm": "/data/vm"},
        mounts=(Mount("253:0", "/data/vm"), Mount("253:0", "/bind")),
    )  # fmt: skip
    assert build(settings(spec), seen).volumes["m"].mounts == ("/bind", "/srv/vm")


def test_a_volume_mounted_below_another() -> None:
    graph = build(
        settings(
            volume("inner", content=Content.FILESYSTEM, mount="/srv/vm/fast"),
            volume("outer", content=Content.FILESYSTEM, mount="/srv/vm"),
        ),
        known=libvirt(guest("g", "/srv/vm/fast/x"), guest("h", "/srv/vm/x")),
    )
    assert graph.volumes["inner"].needs == ("outer",)
    assert graph.volumes["outer"].needs == ()
    assert graph.guests["g"].needs == ("inner",)
    assert graph.guests["h"].needs == ("outer",)


def test_a_file_system_of_a_group_below_a_configured_mount() -> None:
    """Both must be there: what it is mounted on, and what is mounted."""
    configured = settings(
        volume("m", content=Content.FILESYSTEM, mount="/srv"), volume("p", content=Content.LVM)
    )
    known = libvirt(guest("g", "/srv/fast/x"))
    graph = build(
        configured,
        storage(
            luks("dm-0", "p", "p"), lv("dm-1", "vg-fast", "dm-0", number="253:1"), p="/dev/p",
            files={"/srv/fast/x": "253:1"},
        ),
        known,
    )  # fmt: skip
    assert graph.guests["g"].needs == ("m", "p")
    remembered = Remembered(paths={"/srv/fast/x": ("m", "p")})
    assert build(configured, known=known, remembered=remembered).guests["g"].needs == ("m", "p")


def test_memory_is_asked_only_for_what_cannot_be_seen() -> None:
    configured = settings(volume("a"), volume("b"))
    known = libvirt(guest("g", "/dev/inner/x", "/img/y"))
    memory = Remembered(paths={"/dev/inner/x": ("a",), "/img/y": ("a",), "/dev/b": ("a", "gone")})
    graph = build(configured, known=known, remembered=memory)
    assert graph.guests["g"].needs == ("a",)
    assert graph.volumes["b"].stands_on == ("a",)
    seen = storage(
        disk("sda", number="8:0"),
        disk("b"),
        sda="/dev/inner/x",
        b="/dev/b",
        files={"/img/y": "8:0"},
    )
    graph = build(configured, seen, known, remembered=memory)
    assert graph.guests["g"].needs == ()
    assert graph.volumes["b"].stands_on == ()


def test_memory_that_contradicts_the_configuration_is_dropped() -> None:
    memory = Remembered(paths={"/dev/a": ("b",)}, uuids={"a": UUID})
    graph = build(settings(volume("a"), volume("b", after=("a",))), remembered=memory)
    assert graph.volumes["a"].needs == ()
    assert graph.volumes["b"].needs == ("a",)
    assert graph.volumes["a"].uuid == UUID


def test_a_circle_is_reported_with_its_path() -> None:
    with pytest.raises(GraphError) as caught:
        build(
            settings(
                volume("a", "/dev/mapper/b"), volume("b", after=("c",)), volume("c", after=("a",))
            )
        )
    path = str(caught.value).split(": ")[1].split(";")[0].split(" → ")
    assert path[0] == path[-1]
    needs = {("a", "b"), ("b", "c"), ("c", "a")}
    assert {(path[i], path[i + 1]) for i in range(3)} == needs


def test_a_volume_on_itself() -> None:
    with pytest.raises(
        GraphError, match=r"volume a: its device /dev/mapper/a lies on the volume itself"
    ):
        build(settings(volume("a", "/dev/mapper/a")))


# --- which mapping is whose ---


def test_a_mapping_made_by_hand_under_another_name() -> None:
    graph = build(
        settings(volume("a", "/dev/sda")),
        storage(disk("sda"), luks("dm-0", "by_hand", "sda"), sda="/dev/sda"),
        libvirt(guest("g", "/dev/mapper/by_hand")),
    )
    node = graph.volumes["a"]
    assert (node.mapping, node.is_open, node.taken_by, node.uuid) == ("by_hand", True, "", UUID)


def test_a_disk_on_a_mapping_under_another_name() -> None:
    graph = build(
        settings(volume("a", "/dev/sda")),
        storage(
            disk("sda"), luks("dm-0", "by_hand", "sda"),
            sda="/dev/sda", dm_0="/dev/mapper/by_hand",
        ),
        libvirt(guest("g", "/dev/mapper/by_hand")),
    )  # fmt: skip
    assert graph.guests["g"].needs == ("a",)


def test_a_snapshot_with_the_same_uuid_is_another_volume() -> None:
    seen = storage(
        disk("sda"), disk("sdb"), luks("dm-0", "copy", "sdb"), sda="/dev/sda", sdb="/dev/sdb"
    )
    uuids = {"a": UUID, "copy": UUID}
    configured = settings(volume("a", "/dev/sda"), volume("copy", "/dev/sdb"))
    graph = build(configured, seen, uuids=uuids)
    assert (graph.volumes["a"].mapping, graph.volumes["copy"].mapping) == ("", "copy")
    # Nor when the original's device is away.
    graph = build(configured, seen._replace(links={"/dev/sdb": "sdb"}), uuids=uuids)
    assert (graph.volumes["a"].mapping, graph.volumes["copy"].mapping) == ("", "copy")


def test_a_mapping_whose_device_cannot_be_looked_up() -> None:
    seen = storage(luks("dm-0", "x", "sda"), luks("dm-1", "y", "sdb", uuid=OTHER))
    graph = build(settings(volume("a"), volume("y"), volume("z")), seen, uuids={"a": UUID})
    assert {name: node.mapping for name, node in graph.volumes.items()} == {
        "a": "x",
        "y": "y",
        "z": "",
    }


@pytest.mark.parametrize(
    "taken", [disk("dm-0", dm_name="a"), lv("dm-0", "a"), luks("dm-0", "a", "sdz")]
)
def test_a_name_that_is_taken(taken: BlockDevice) -> None:
    graph = build(settings(volume("a", "/dev/sda")), storage(disk("sda"), taken, sda="/dev/sda"))
    node = graph.volumes["a"]
    assert not node.is_open
    assert node.taken_by == (taken.dm_uuid or "dm-0")


def test_a_device_with_another_header_than_the_configured_one() -> None:
    graph = build(
        settings(volume("a", "/dev/sda", uuid=OTHER)),
        storage(disk("sda"), luks("dm-0", "a", "sda"), sda="/dev/sda"),
    )
    assert not graph.volumes["a"].is_open
    assert graph.volumes["a"].taken_by


def test_a_volume_with_integrity() -> None:
    """cryptsetup puts a mapping of its own between it and the device."""
    between = BlockDevice("dm-0", "", ("sda",), "a_dif", "CRYPT-INTEGRITY-a_dif")
    graph = build(
        settings(volume("a", "/dev/sda")),
        storage(disk("sda"), between, luks("dm-1", "a", "dm-0"), sda="/dev/sda"),
    )
    assert graph.volumes["a"].mapping == "a"
    assert not graph.volumes["a"].taken_by


def test_a_volume_that_is_reencrypted() -> None:
    """What cryptsetup has at work then: the mapping on an overlay, that on the device and the piece that is moved."""
    uuid = "CRYPT-SUBDEV-1-a"
    piece = BlockDevice("dm-1", "", ("sda",), "a-hotzone-forward", f"{uuid}-hotzone-forward")
    overlay = BlockDevice("dm-2", "", ("dm-1", "sda"), "a-overlay", f"{uuid}-overlay")
    graph = build(
        settings(volume("a", "/dev/sda"), volume("b", "/dev/mapper/a")),
        storage(
            disk("sda"), luks("dm-0", "a", "dm-2"), piece, overlay, luks("dm-3", "b", "dm-0"),
            sda="/dev/sda", dm_0="/dev/mapper/a",
        ),
    )  # fmt: skip
    assert graph.volumes["a"].mapping == "a"
    assert not graph.volumes["a"].taken_by
    assert graph.users("a") == ["volume b"]


def test_a_volume_whose_only_piece_was_dropped() -> None:
    """A small one is moved in one piece; once that is released, nothing leads to the device."""
    torn = BlockDevice("dm-1", "", (), "a-hotzone-forward", "CRYPT-SUBDEV-1-a-hotzone-forward")
    seen = storage(
        disk("sda"), disk("sdb"), luks("dm-0", "a", "dm-1"), torn, sda="/dev/sda", sdb="/dev/sdb"
    )
    specs = settings(volume("a", "/dev/sda"), volume("other", "/dev/sdb"))
    graph = build(specs, seen, uuids={"a": UUID, "other": OTHER})
    assert graph.volumes["a"].mapping == "a"
    assert not graph.volumes["a"].taken_by
    assert not graph.volumes["other"].is_open


def test_what_is_up_on_a_volume() -> None:
    seen = storage(
        disk("sda"), luks("dm-0", "a", "sda", number="253:0"), lv("dm-1", "inner-x", "dm-0"),
        sda="/dev/sda", mounts=(Mount("253:0", "/srv/vm/deep"), Mount("253:0", "/srv"), Mount("8:0", "/")),
    )  # fmt: skip
    node = build(settings(volume("a", "/dev/sda", content=Content.LVM)), seen).volumes["a"]
    assert node.mounts == ("/srv", "/srv/vm/deep")
    assert node.is_active
    locked = build(settings(volume("a", "/dev/sda", content=Content.LVM)), storage(disk("sda")))
    assert not locked.volumes["a"].is_active
    assert locked.volumes["a"].mounts == ()


# --- guests and pools ---


def test_everything_that_a_guest_reads_or_writes() -> None:
    configured = settings(
        *(volume(name, f"/dev/{name}") for name in ("disk", "nvram", "base", "pool", "more")),
        guests=(GuestSpec("g", needs=("more",), configured=True), GuestSpec("other")),
    )
    mapped = {f"/dev/mapper/{name}": f"dm-{name}" for name in configured.volumes}
    devices = [luks(f"dm-{n}", n, n, number=f"9:{i}") for i, n in enumerate(configured.volumes)]
    seen = Storage(
        devices={device.name: device for device in devices},
        links={**mapped, **{f"/dev/{name}": name for name in configured.volumes}},
        files={"/n": "9:1", "/overlay": "8:1", "/base": "9:2", "/pool": "9:3"},
    )
    sources = (
        DiskSource(SourceType.BLOCK, "/dev/mapper/disk"),
        DiskSource(SourceType.FILE, "/n"),
        DiskSource(SourceType.FILE, "/overlay"),
        DiskSource(SourceType.POOL, pool="images", volume="x"),
        DiskSource(SourceType.POOL, pool="unknown", volume="x"),
    )
    known = libvirt(
        Domain("g", "g", GuestState.RUNNING, sources=sources),
        pools=(Pool("images", active=True, path="/pool", volumes={"x": "/pool/x"}),),
    )
    graph = build(configured, seen, known, chains={"/overlay": ("/base",)})
    assert graph.guests["g"].needs == ("disk", "nvram", "base", "pool", "more")
    assert graph.guests["g"].pools == ("images",)
    assert graph.pools_on == {"pool": ("images",)}
    assert graph.guests_in == {"images": ("g",)}
    assert graph.guests["other"].state is GuestState.UNDEFINED
    assert not graph.guests["other"].is_running
    assert graph.users("base") == ["guest g"]


def test_images_that_name_each_other_in_a_circle() -> None:
    """A guest writes its own disk: what it claims to be backed by must not end the daemon."""
    configured = settings(volume("m", content=Content.FILESYSTEM, mount="/m"))
    chains = {"/m/a": ("/b",), "/b": ("/m/a", "/b")}
    graph = build(configured, known=libvirt(guest("g", "/b")), chains=chains)
    assert graph.guests["g"].needs == ("m",)


@pytest.mark.parametrize("directory", [{}, {"/pool": "8:0"}])
def test_a_pool_in_a_directory_that_the_host_mounts_by_itself(directory: dict[str, str]) -> None:
    """While it is locked only memory knows; the empty mount point on the root file system does not count."""
    configured = settings(volume("a", content=Content.LVM))
    pool = Pool("images", active=True, autostart=True, path="/pool")
    source = DiskSource(SourceType.POOL, pool="images", volume="x")
    known = libvirt(Domain("g", "g", GuestState.OFF, sources=(source,)), pools=(pool,))
    seen = storage(
        luks("dm-0", "a", "a"), lv("dm-1", "vg-images", "dm-0", number="253:1"), a="/dev/a",
        files={"/pool": "253:1"},
    )  # fmt: skip
    graph = build(configured, seen, known)
    assert graph.guests["g"].needs == ("a",)
    assert graph.lies_on["/pool"] == ("a",)
    locked = storage(disk("sda", number="8:0"), files=directory)
    graph = build(configured, locked, known, remembered=Remembered(paths={"/pool": ("a",)}))
    assert graph.guests["g"].needs == ("a",)
    assert graph.pools["images"].needs == ("a",)


def test_a_logical_pool() -> None:
    pool = Pool("vms", active=False, vg="inner")
    source = DiskSource(SourceType.POOL, pool="vms", volume="x")
    known = libvirt(Domain("g", "g", GuestState.OFF, sources=(source,)), pools=(pool,))
    named = settings(volume("a", content=Content.LVM, vg="inner"))
    assert build(named, known=known).guests["g"].needs == ("a",)
    unnamed = settings(volume("a", content=Content.LVM))
    seen = storage(luks("dm-0", "a", "a"), lv("dm-1", "inner-x", "dm-0"), a="/dev/a")
    graph = build(unnamed, seen, known)
    assert graph.pools["vms"].needs == ("a",)
    assert "/dev/inner" in graphs.wanted_paths(unnamed, known, {})
    memory = Remembered(paths={"/dev/inner": graph.lies_on["/dev/inner"]})
    assert build(unnamed, known=known, remembered=memory).guests["g"].needs == ("a",)


def test_ours_are_guests_on_volumes_and_configured_ones() -> None:
    graph = build(
        settings(volume("a"), guests=(GuestSpec("named", configured=True),)),
        known=libvirt(guest("on", "/dev/mapper/a"), guest("named"), guest("else", "/img")),
    )
    assert {name for name, node in graph.guests.items() if node.is_ours} == {"on", "named"}


def test_every_path_is_looked_up() -> None:
    configured = settings(
        volume(
            "a",
            "UUID=x",
            header="/h",
            keys=(KeySource(SourceKind.FILE, "/k"), KeySource(SourceKind.EXEC, "/e")),
        ),
        volume("m", content=Content.FILESYSTEM, mount="/srv/vm"),
        volume("n", content=Content.FILESYSTEM, mount="/top"),
    )
    known = libvirt(
        guest("g", "/dev/x", "/img"),
        pools=(Pool("p", True, path="/p", devices=("/dev/p",), vg="q", volumes={"v": "/p/v"}),),
    )
    assert graphs.wanted_paths(configured, known, {"/img": ("/base",)}) == {
        "/dev/disk/by-uuid/x", "/h", "/k", "/dev/m", "/srv/vm", "/srv", "/dev/n", "/top", "/",
        "/dev/x", "/img", "/base", "/p", "/dev/p", "/dev/q", "/p/v",
    }  # fmt: skip


def test_a_device_is_explained_while_something_beneath_is_locked() -> None:
    specs = settings(volume("a", "/dev/sda"), volume("b", "/dev/mapper/a"), volume("c"))
    graph = build(specs, storage(disk("sda"), sda="/dev/sda"))
    assert graph.is_explained("b")
    assert not graph.is_explained("a")
    assert not graph.is_explained("c")
    opened = storage(disk("sda"), luks("dm-0", "a", "sda"), sda="/dev/sda")
    assert not build(specs, opened).is_explained("b")


def test_ten_thousand() -> None:
    count = 10_000
    specs = settings(*(volume(f"v{i}") for i in range(count)))
    domains = [guest(f"g{i}", f"/dev/mapper/v{i}") for i in range(count)]
    devices = [luks(f"dm-{i}", f"v{i}", f"s{i}", uuid=f"{i:08x}{UUID[8:]}") for i in range(count)]
    seen = Storage(
        devices={device.name: device for device in devices},
        links={f"/dev/v{i}": f"s{i}" for i in range(count)},
    )
    graph = build(specs, seen, libvirt(*domains))
    assert all(node.is_open for node in graph.volumes.values())
    assert len(graph.guests_on) == count


def test_a_tower() -> None:
    """No recursion limit stands in the way of a deep stack."""
    count = 2_000
    specs = settings(
        *(volume(f"v{i}", f"/dev/mapper/v{i - 1}" if i else "/dev/sda") for i in range(count))
    )
    graph = build(specs)
    assert len(graph.beneath([f"v{count - 1}"])) == count
