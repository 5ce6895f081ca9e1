# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices and mounts from a tree like sysfs, and who holds what in it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmcryptd.adapters.storage import blocks, holders
from vmcryptd.adapters.storage import paths as paths_module
from vmcryptd.adapters.storage.blocks import SysfsBlocks, device_of, mount_unit
from vmcryptd.adapters.storage.mounts import MountTable, parse_mounts
from vmcryptd.adapters.storage.sysfs import Lasting, Links, Roots, forget, observe
from vmcryptd.core.errors import StorageError
from vmcryptd.core.model import BlockDevice, Content, Lock, Mount, Storage, VolumeSpec
from vmcryptd.core.text import octal_unescaped
from vmcryptd.posix.run import Completed

UUID = "CRYPT-LUKS2-0b7d6a2e94a54c1ea5a76b7c3b3a1f00-cr_imap"
LV = "LVM-" + "v" * 32 + "l" * 32


class Tree:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self.sys = path / "sys/class/block"
        self.proc = path / "proc"
        for directory in (self.sys, self.proc / "self/ns"):
            directory.mkdir(parents=True)
        (self.proc / "self/ns/mnt").symlink_to("mnt:[1]")
        self.mountinfo = path / "mountinfo"
        self.fstab = path / "fstab"
        self.udev = path / "udev"
        self.udev.mkdir()
        self.mountinfo.touch()

    @property
    def roots(self) -> Roots:
        places = (self.sys, self.proc, self.mountinfo, self.udev, self.fstab)
        return Roots(*map(str, places))

    def device(
        self, name: str, number: str, slaves: tuple[str, ...] = (), **attributes: str
    ) -> None:
        real = self.path / "sys/devices" / name
        (real / "slaves").mkdir(parents=True)
        (self.sys / name).symlink_to(os.path.relpath(real, self.sys))
        for slave in slaves:
            (real / "slaves" / slave).symlink_to("elsewhere")
        for attribute, value in {"dev": number, **attributes}.items():
            file = real / attribute.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(value + "\n")

    def udev_links(self, number: str, *links: str) -> None:
        lines = ["I:1", *(f"S:{link}" for link in links), "E:ID_FS_TYPE=crypto_LUKS", ""]
        (self.udev / f"b{number}").write_text("\n".join(lines))

    def change(self, name: str, **attributes: str) -> None:
        for attribute, value in attributes.items():
            (self.sys / name / attribute.replace("__", "/")).write_text(value + "\n")

    def partition(self, name: str, number: str, disk: str) -> None:
        real = self.path / "sys/devices" / disk / name
        real.mkdir()
        (self.sys / name).symlink_to(os.path.relpath(real, self.sys))
        (real / "dev").write_text(number + "\n")
        (real / "partition").write_text("1\n")

    def mount(self, number: str, target: str, fstype: str = "ext4", source: str = "none") -> None:
        self.lines.append(f"1 2 {number} / {target} rw shared:1 - {fstype} {source} rw\n")
        self.mountinfo.write_text("".join(self.lines))

    def process(
        self, pid: int, *, cmdline: str = "", namespace: str = "mnt:[1]", **links: str
    ) -> Path:
        place = self.proc / str(pid)
        (place / "fd").mkdir(parents=True)
        (place / "ns").mkdir()
        (place / "ns/mnt").symlink_to(namespace)
        (place / "comm").write_text("thing\n")
        (place / "cmdline").write_text(cmdline)
        for link, target in links.items():
            (place / link.replace("fd", "fd/")).symlink_to(target)
        return place


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    tree.device("vda", "252:0")
    tree.partition("vda1", "252:1", "vda")
    tree.device("md127", "9:127", ("vda1",))
    tree.device("dm-0", "253:0", ("md127",), dm__name="grp-imap", dm__uuid=LV, dm__suspended="0")
    tree.device("dm-1", "253:1", ("dm-0",), dm__name="cr_imap", dm__uuid=UUID, dm__suspended="1")
    tree.device("dm-2", "253:2", ("dm-1",), dm__name="in--ner-ro--ot", dm__uuid=LV)
    tree.device("loop0", "7:0")
    tree.device("loop1", "7:1", loop__backing_file="/srv/vm/a b.img")
    return tree


def test_devices(tree: Tree) -> None:
    devices = observe(tree.roots, ()).devices
    assert devices == {
        "vda": BlockDevice("vda", "252:0"),
        "vda1": BlockDevice("vda1", "252:1", ("vda",)),
        "md127": BlockDevice("md127", "9:127", ("vda1",)),
        "dm-0": BlockDevice("dm-0", "253:0", ("md127",), "grp-imap", LV),
        "dm-1": BlockDevice("dm-1", "253:1", ("dm-0",), "cr_imap", UUID, suspended=True),
        "dm-2": BlockDevice("dm-2", "253:2", ("dm-1",), "in--ner-ro--ot", LV),
        "loop1": BlockDevice("loop1", "7:1", backing_file="/srv/vm/a b.img"),
    }
    assert devices["dm-1"].luks_uuid == "0b7d6a2e-94a5-4c1e-a5a7-6b7c3b3a1f00"


def test_a_mapping_is_looked_at_again_when_something_happened_to_it(tree: Tree) -> None:
    lasting: Lasting = {}
    observe(tree.roots, (), lasting)
    tree.change("dm-1", dm__name="other")
    assert observe(tree.roots, (), lasting).devices["dm-1"].dm_name == "cr_imap"
    forget(lasting, {}, "dm-1")
    assert observe(tree.roots, (), lasting).devices["dm-1"].dm_name == "other"


def test_a_mapping_is_suspended_without_an_event(tree: Tree) -> None:
    lasting: Lasting = {}
    assert observe(tree.roots, (), lasting).devices["dm-1"].suspended
    tree.change("dm-1", dm__suspended="0")
    assert not observe(tree.roots, (), lasting).devices["dm-1"].suspended
    tree.change("dm-1", dm__suspended="1")
    assert observe(tree.roots, (), lasting).devices["dm-1"].suspended


def test_a_mapping_in_the_making_is_looked_at_again(tree: Tree) -> None:
    lasting: Lasting = {}
    tree.device("dm-3", "253:3", dm__name="cr_dns", dm__uuid=UUID)
    assert observe(tree.roots, (), lasting).devices["dm-3"].below == ()
    (tree.sys / "dm-3/slaves/vda").symlink_to("elsewhere")
    assert observe(tree.roots, (), lasting).devices["dm-3"].below == ("vda",)


def test_another_device_of_the_same_name_is_looked_at(tree: Tree) -> None:
    lasting: Lasting = {}
    observe(tree.roots, (), lasting)
    tree.change("dm-1", dm__name="other")
    entry = tree.sys / "dm-1"
    target = os.readlink(entry)
    (tree.sys / "dm-1.new").symlink_to(target)  # first: an inode number that is free is used again
    entry.unlink()
    (tree.sys / "dm-1.new").rename(entry)
    assert observe(tree.roots, (), lasting).devices["dm-1"].dm_name == "other"


def test_all_devices_that_claim_a_link_are_seen(tree: Tree) -> None:
    link, other = "disk/by-uuid/3f1d", "disk/by-id/wwn-1"
    paths = [f"/dev/{link}", f"/dev/{other}", "/dev/vda"]
    known: Links = {}
    tree.udev_links("252:0", link, other)
    tree.udev_links("253:0", "disk/by-label/x")
    assert observe(tree.roots, paths, {}, known).claims == {}
    tree.udev_links("253:0", link)
    assert observe(tree.roots, paths, {}, known).claims == {}  # no event has come yet
    forget({}, known, "dm-0")
    assert observe(tree.roots, paths, {}, known).claims == {f"/dev/{link}": ("dm-0", "vda")}
    (tree.sys / "dm-0").unlink()
    assert observe(tree.roots, paths, {}, known).claims == {}
    assert "dm-0" not in known


def test_a_device_that_udev_has_not_come_to_is_looked_at_again(tree: Tree) -> None:
    link = "disk/by-uuid/3f1d"
    known: Links = {}
    tree.udev_links("252:0", link)
    assert observe(tree.roots, [f"/dev/{link}"], {}, known).claims == {}
    tree.udev_links("252:1", link)
    assert observe(tree.roots, [f"/dev/{link}"], {}, known).claims == {
        f"/dev/{link}": ("vda", "vda1")
    }


def test_the_device_of_an_event() -> None:
    path = b"DEVPATH=/devices/virtual/block/dm-12"
    event = b"\0".join([b"libudev", b"ACTION=change", path, b"SUBSYSTEM=block", b""])
    assert device_of(event) == "dm-12"
    assert device_of(b"\0SUBSYSTEM=block\0") == ""


def test_nothing_there(tmp_path: Path) -> None:
    storage = observe(
        Roots(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")), ["/x/y"]
    )
    assert (dict(storage.devices), storage.mounts, dict(storage.files)) == ({}, (), {})


def looked_up(tree: Tree, *paths: Path | str) -> Storage:
    async def look() -> Storage:
        blocks = SysfsBlocks(tree.roots)
        await blocks.look(map(str, paths))
        return blocks.observe(list(map(str, paths)))

    return asyncio.run(look())


def test_files_and_links(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "link").symlink_to("disk.img")
    (tmp_path / "gone").symlink_to("/no/such")
    (tmp_path / "round").symlink_to("round")
    names = ("disk.img", "link", "gone", "round", "link/below", "nope")
    paths = [str(tmp_path / name) for name in names]
    storage = looked_up(tree, *paths, "relative")
    device = os.stat(tmp_path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    assert storage.files == {paths[0]: number, paths[1]: number}
    assert storage.real[paths[1]] == paths[0]
    assert storage.real[paths[2]] == "/no/such"
    assert paths[0] not in storage.real
    assert not storage.links


def test_files_on_a_server_are_found(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "nfs").mkdir()
    (tmp_path / "nfs/disk").touch()
    (tmp_path / "link").symlink_to("nfs/disk")
    tree.mount("0:50", str(tmp_path / "nfs"), "nfs4", "server:/x")
    storage = looked_up(tree, tmp_path / "nfs/disk", tmp_path / "link")
    assert storage.files == {str(tmp_path / "nfs/disk"): "0:50", str(tmp_path / "link"): "0:50"}
    assert storage.real == {str(tmp_path / "link"): str(tmp_path / "nfs/disk")}


class Hanging:
    """Looks at a directory hang until it is released, as those at a dead server's do."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = str(directory)
        self.looked = 0
        self._released = threading.Event()
        for name in ("stat", "readlink"):
            patch.setattr(paths_module.os, name, self._hanging(getattr(os, name)))
        patch.setattr(paths_module, "LOOK_S", 0.05)

    def release(self) -> None:
        self._released.set()

    def _hanging(self, call: Any) -> Any:
        def look(path: str, *more: Any, **options: Any) -> Any:
            if str(path).startswith(self.directory + "/"):
                assert threading.current_thread() is not threading.main_thread()
                self.looked += 1
                self._released.wait()
            return call(path, *more, **options)

        return look


def test_a_file_system_that_hangs_holds_up_no_other(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("dead", "sound"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "disk").touch()
    (tmp_path / "link").symlink_to("dead/disk")
    tree.mount("0:50", str(tmp_path / "dead"), "nfs4", "server:/x")
    tree.mount("252:1", str(tmp_path / "sound"))
    paths = [str(tmp_path / name) for name in ("dead/disk", "sound/disk", "link")]
    hanging = Hanging(tmp_path / "dead", monkeypatch)

    async def scene() -> None:
        answered = asyncio.Event()
        blocks = SysfsBlocks(tree.roots)
        blocks.watch(answered.set)
        try:
            await blocks.look(paths)
            assert blocks.observe(paths).files == {paths[1]: "252:1"}
            assert blocks.observe(paths).real == {paths[2]: paths[0]}
            looks = hanging.looked
            await blocks.look(paths)
            assert hanging.looked == looks  # one thread hangs, and none is added
            hanging.release()
            await answered.wait()
            await blocks.look(paths)
            assert blocks.observe(paths).files[paths[0]] == "0:50"
        finally:
            hanging.release()
            blocks.close()

    asyncio.run(scene())


def test_nothing_is_looked_at_on_a_suspended_device(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dm-1 is suspended, and dm-2 lies on it. The known files stay."""
    tree.change("dm-1", dm__suspended="0")
    paths = []
    for name, number in (("crypt", "253:1"), ("lv", "253:2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "disk").touch()
        paths.append(str(tmp_path / name / "disk"))
        tree.mount(number, str(tmp_path / name))

    async def scene() -> None:
        blocks = SysfsBlocks(tree.roots)
        await blocks.look(paths)
        assert blocks.observe(paths).files == {paths[0]: "253:1", paths[1]: "253:2"}
        tree.change("dm-1", dm__suspended="1")
        hangings = [Hanging(tmp_path / name, monkeypatch) for name in ("crypt", "lv")]
        await blocks.look(paths)
        assert blocks.observe(paths).files == {paths[0]: "253:1", paths[1]: "253:2"}
        fresh = SysfsBlocks(tree.roots)
        await fresh.look(paths)
        assert fresh.observe(paths).files == {}
        assert [hanging.looked for hanging in hangings] == [0, 0]

    asyncio.run(scene())


def test_what_was_known_goes_with_the_mount(tree: Tree, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    tree.mount("252:1", str(tmp_path))

    async def scene() -> None:
        blocks = SysfsBlocks(tree.roots)
        await blocks.look([str(disk)])
        assert blocks.observe([str(disk)]).files == {str(disk): "252:1"}
        tree.lines.clear()
        tree.mount("252:0", "/")
        assert not blocks.observe([str(disk)]).files

    asyncio.run(scene())


def test_bind_mounts_of_the_fstab_lead_to_what_they_will_show(tree: Tree, tmp_path: Path) -> None:
    images, vm = tmp_path / "images", tmp_path / "srv/v m"
    for directory in (images, vm):
        directory.mkdir(parents=True)
    escaped = str(vm).replace(" ", "\\040")
    tree.fstab.write_text(
        "# comment\n/dev/vda1 / ext4 defaults 0 1\nbroken\n"
        f"{escaped}/images/ {images} none rw,bind,noauto 0 0\n"
    )
    disk = images / "a.qcow2"
    assert looked_up(tree, disk).real == {str(disk): f"{vm}/images/a.qcow2"}
    disk.touch()  # on the host's own disk, where it is hidden later
    assert not looked_up(tree, disk).files
    tree.mount("252:1", str(images))
    assert looked_up(tree, disk).real == {}
    assert looked_up(tree, disk).files == {str(disk): "252:1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_block_device_paths(tree: Tree, tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "node", 0o60600, os.makedev(253, 1))
    except PermissionError:
        pytest.skip("device nodes are not allowed here")
    (tmp_path / "by-name").symlink_to("node")
    storage = looked_up(tree, tmp_path / "by-name")
    assert storage.links == {str(tmp_path / "by-name"): "dm-1"}


def test_mountinfo() -> None:
    text = (
        "22 1 253:3 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        "30 22 253:9 / /srv/a\\040b\\134c rw - ext4 /dev/mapper/x\\040y rw\n"
        "31 22 0:40 / /run rw shared:9 master:2 - tmpfs tmpfs rw\n"
        "broken line\n"
    )
    assert parse_mounts(text) == (
        Mount("253:3", "/", "/dev/vda1", "ext4"),
        Mount("253:9", "/srv/a b\\c", "/dev/mapper/x y", "ext4"),
        Mount("0:40", "/run", "tmpfs", "tmpfs"),
    )
    assert octal_unescaped("plain") == "plain"
    hostile = "1 2 253:1 / /srv/a\x0cb\x85c rw - ext4 /dev/x rw\n"  # ends of lines, says Python
    assert parse_mounts(hostile) == (Mount("253:1", "/srv/a\x0cb\x85c", "/dev/x", "ext4"),)


def test_mount_of_a_path() -> None:
    mounts = (
        Mount("1:1", "/"),
        Mount("1:2", "/srv"),
        Mount("1:3", "/srv/vm"),
        Mount("1:4", "/srv"),
    )
    table = MountTable(mounts)
    found = [table.on(path) for path in ("/srv/vm/x/y", "/srv/vmx", "/etc", "/")]
    assert [mount.number for mount in found] == ["1:3", "1:4", "1:1", "1:1"]


def test_unmount_order() -> None:
    mounts = [Mount("1:1", t, s) for t, s in (("/a", "1"), ("/a/b", "2"), ("/", "3"), ("/a", "4"))]
    assert [mount.source for mount in holders.deepest_first(mounts)] == ["2", "4", "1", "3"]


def test_holders(tree: Tree) -> None:
    tree.mount("253:1", "/srv/vm")
    tree.process(
        9, fd3="/srv/vm/disk.img", cmdline="/usr/bin/qemu\0-name\0guest=ma,,il,debug-threads=on\0"
    )
    tree.process(10, cwd="/srv/vm")
    tree.process(11, cwd="/srv/vmx", fd3="socket:[1]")
    other = tree.process(12, cwd="/", namespace="mnt:[2]")
    (other / "mountinfo").write_text("1 2 253:1 / /data rw - ext4 none rw\n")
    (tree.proc / "swaps").write_text("Filename Type Size Used Priority\n/srv/vm/swap file 1 0 -2\n")
    found = asyncio.run(SysfsBlocks(tree.roots).holders("cr_imap"))
    assert found == (
        "logical volume in-ner/ro-ot",
        "loop device loop1 (/srv/vm/a b.img)",
        "mounted at /srv/vm",
        "swap on /srv/vm/swap",
        "guest ma,il (pid 9)",
        "thing (pid 10)",
    )
    assert asyncio.run(SysfsBlocks(tree.roots).holders("nobody")) == ()


def test_no_name_of_a_holder_forges_a_line(tree: Tree) -> None:
    """QEMU's -name, a process's own name, a mount point: all come from outside."""
    tree.mount("253:1", "/srv/a\\012b")
    hostile = "imap\n<1>volume cr_imap: closed"
    tree.process(9, fd3="/srv/a\nb/x", cmdline=f"qemu\0-name\0guest={hostile}\0")
    process = tree.process(10, cwd="/srv/a\nb")
    (process / "comm").write_text("a\x1b[2J\n")
    tree.process(11, cwd="/srv/a\nb", cmdline="qemu\0-name\0guest=" + "x" * 1_000_000 + "\0")
    (tree.proc / "swaps").write_text("Filename\n/srv/a\\012b/Gerät\\0401 file 1 0 -2\n")
    found = asyncio.run(SysfsBlocks(tree.roots).holders("cr_imap"))
    assert {
        r"mounted at /srv/a\nb",
        r"swap on /srv/a\nb/Gerät 1",
        r"guest imap\n<1>volume cr_imap: closed (pid 9)",
        r"a\x1b[2J (pid 10)",
    } <= set(found)
    assert all(one.isprintable() and len(one) < 300 for one in found)


@pytest.mark.parametrize("here", [True, False])
def test_a_mount_namespace_is_named_only_without_other_users(tree: Tree, here: bool) -> None:
    if here:
        tree.mount("253:1", "/srv/vm")
    other = tree.process(12, cwd="/", namespace="mnt:[2]")
    (other / "mountinfo").write_text("1 2 253:1 / /data rw - ext4 none rw\n")
    found = asyncio.run(SysfsBlocks(tree.roots).holders("cr_imap"))
    assert found[-1] == "mounted for thing (pid 12)"


HAS_UNIT = "Unit {unit} was already loaded or has a fragment file."


@pytest.mark.parametrize(
    ("lock", "complaint", "commands"),
    [
        (Lock.SHUTDOWN, "", ["systemd-mount"]),
        (Lock.BOOT, "", ["systemd-mount --fsck=no"]),
        (Lock.SHUTDOWN, HAS_UNIT, ["systemd-mount", "systemctl start -- {unit}"]),
        (Lock.SHUTDOWN, "Failed to connect to bus", ["systemd-mount", None]),
    ],
)  # fmt: skip
def test_mounting(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    lock: Lock, complaint: str, commands: list[str | None],
) -> None:  # fmt: skip
    """By a mount unit of the administrator's where there is one, else by a transient one."""
    target = tmp_path / "mounted"
    unit = mount_unit(str(target))
    ran: list[str] = []

    async def run(argv: list[str], timeout_s: float) -> Completed:
        shown = [argv[0], *(word for word in argv if word.startswith("--fsck"))]
        ran.append(" ".join(argv if argv[0] == "systemctl" else shown))
        if argv[0] == "systemd-mount" and complaint:
            return Completed(1, err=complaint.format(unit=unit))
        tree.mountinfo.write_text(f"30 1 253:1 / {target} rw - ext4 /dev/mapper/cr_imap rw\n")
        return Completed(0)

    monkeypatch.setattr(blocks, "run", run)
    spec = VolumeSpec("cr_imap", "/dev/vg/imap", content="filesystem", mount=str(target), lock=lock)
    mounting = SysfsBlocks(tree.roots).mount(spec, "cr_imap")
    if commands[-1] is None:
        with pytest.raises(
            StorageError, match="volume cr_imap: it cannot be mounted .*connect to bus"
        ):
            asyncio.run(mounting)
    else:
        asyncio.run(mounting)
    assert ran == [command.format(unit=unit) for command in commands if command]


class Commands:
    """Stands for the programs that a port runs: what each begins with, and what it answers."""

    def __init__(self, patch: pytest.MonkeyPatch, **answers: Completed | Callable[[], Completed]):
        self.ran: list[str] = []
        self.answers = answers
        patch.setattr(blocks, "run", self._run)

    async def _run(self, argv: list[str], timeout_s: float) -> Completed:
        self.ran.append(" ".join(argv))
        answer = self.answers.get(argv[0].replace("-", "_"), Completed(0))
        return answer if isinstance(answer, Completed) else answer()

    def of(self, program: str) -> list[str]:
        return [command for command in self.ran if command.startswith(program)]


def test_a_mount_point_below_a_symbolic_link(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd refuses such a path, and mountinfo never shows it. Nothing is made under this process's umask."""
    (tmp_path / "data").mkdir()
    (tmp_path / "srv").symlink_to("data")
    real = f"{tmp_path}/data/a/vm"

    def mounted() -> Completed:
        tree.mount("253:1", real)
        return Completed(0)

    commands = Commands(monkeypatch, systemd_mount=mounted)
    spec = VolumeSpec("cr_imap", "/dev/x", content=Content.FILESYSTEM, mount=f"{tmp_path}/srv/a/vm")

    async def scene() -> None:
        port = SysfsBlocks(tree.roots)
        await port.mount(spec, "cr_imap")
        await port.mount(spec, "cr_imap")

    asyncio.run(scene())
    [command] = commands.ran
    assert command.endswith(f"/dev/mapper/cr_imap {real}")
    assert not (tmp_path / "data/a").exists()


@pytest.mark.parametrize(
    ("mounted", "command", "words"),
    [
        ("", "", None),
        ("", "no such directory", "cannot be mounted at .* as the fstab says: no such directory"),
        ("252:1", "", "was mounted from .* before the volume was: add the options noauto"),
        ("253:1", None, None),
    ],
)
def test_folders_of_the_volume_that_the_fstab_mounts_elsewhere(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mounted: str, command: str | None, words: str | None,
) -> None:  # fmt: skip
    images = f"{tmp_path}/images"
    tree.fstab.write_text(f"/srv/vm/images {images} none bind 0 0\n/other /x none bind 0 0\n")
    tree.mount("253:1", "/srv/vm")
    if mounted:
        tree.mount(mounted, images)
    commands = Commands(monkeypatch, systemctl=Completed(1 if command else 0, err=command or ""))
    spec = VolumeSpec("cr_imap", "/dev/x", content=Content.FILESYSTEM, mount="/srv/vm")

    async def scene() -> None:
        port = SysfsBlocks(tree.roots)
        await port.look(["/srv/vm"])
        await port.mount(spec, "cr_imap")

    if words:
        with pytest.raises(StorageError, match=f"volume cr_imap: .*{words}"):
            asyncio.run(scene())
    else:
        asyncio.run(scene())
    wanted = [f"systemctl start -- {mount_unit(images)}"] if not mounted else []
    assert commands.ran == wanted


GROUP = VolumeSpec("cr_imap", "/dev/x", content=Content.LVM)
OTHER = VolumeSpec("cr_other", "/dev/y", content=Content.LVM)
MAPPINGS = "/dev/mapper/cr_imap,/dev/mapper/cr_other"


class Lvm(Commands):
    """A group on cr_imap, cr_other and vdz; LVM's own settings let it see `seen`."""

    def __init__(
        self, patch: pytest.MonkeyPatch, *, missing: str = "2", lvs: str = "", seen: str = "",
        refused: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(patch)
        self.missing, self.lvs, self.seen, self.refused = missing, lvs, seen, refused

    async def _run(self, argv: list[str], timeout_s: float) -> Completed:
        self.ran.append(" ".join(argv))
        if argv[0] == "pvs" and "--select" not in argv:
            return Completed(0, out=f"  u-1:{self.missing}:pair\n")
        if argv[0] == "pvs":
            ours = MAPPINGS.replace(",", "\n  ") if "--devices" in argv else self.seen
            return Completed(0, out=f"  {ours}\n  [unknown]\n")
        if argv[0] == "lvs":
            return Completed(0, out=self.lvs)
        refused = self.refused and argv[0] == "vgchange"
        return Completed(5, err="Refusing activation of partial LV") if refused else Completed(0)


def activate(tree: Tree, *, locked: tuple[VolumeSpec, ...] = ()) -> None:
    beside = () if locked else ("cr_other",)
    asyncio.run(SysfsBlocks(tree.roots).activate(GROUP, "cr_imap", beside, locked))


def test_a_group_on_two_volumes_that_lvm_is_kept_from(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a devices file or global_filter: a selection over what LVM sees matches nothing, and exits 0."""
    lvm = Lvm(monkeypatch, lvs="  active::root\n  :skip activation:snap\n")
    activate(tree)
    [vgchange] = lvm.of("vgchange")
    assert vgchange == f"vgchange --devices {MAPPINGS} --activate y -- pair"


def test_a_group_on_a_disk_of_the_host_too(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    lvm = Lvm(monkeypatch, seen="/dev/vdz", lvs="  active::root\n")
    activate(tree)
    [vgchange] = lvm.of("vgchange")
    assert vgchange == f"vgchange --devices {MAPPINGS},/dev/vdz --activate y -- pair"


@pytest.mark.parametrize(("has_file", "words"), [(True, "lvmdevices --adddev"), (False, "global_filter")])  # fmt: skip
def test_a_group_that_stays_inactive_is_an_error(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_file: bool, words: str
) -> None:
    monkeypatch.setattr(blocks, "DEVICES_FILE", str(tmp_path / "system.devices"))
    if has_file:
        (tmp_path / "system.devices").touch()
    for refused in (True, False):
        Lvm(monkeypatch, lvs="  active::root\n  ::data\n", refused=refused)
        with pytest.raises(StorageError, match=f"volume cr_imap: .* pair is not active: .*{words}"):
            activate(tree)


def test_a_group_that_another_volume_will_complete(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lvm(monkeypatch, lvs="  ::data\n", refused=True)
    activate(tree, locked=(OTHER,))
    with pytest.raises(StorageError, match="pair is not active"):
        activate(tree, locked=(replace(OTHER, vg="x"),))


def test_a_whole_group_whose_volumes_all_stay_inactive(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    Lvm(monkeypatch, missing="0", lvs="  ::data\n")
    with pytest.raises(StorageError, match="pair is not active: these stay inactive: data"):
        activate(tree)
    Lvm(monkeypatch, missing="0", lvs="")  # it has no volume yet
    activate(tree)
    tree.device("dm-5", "253:5", ("dm-1",), dm__name="pair-data", dm__uuid=LV)
    lvm = Lvm(monkeypatch, missing="0")
    activate(tree)
    assert lvm.of("lvs") == []  # the kernel shows it


def test_a_group_is_deactivated_with_all_that_it_is_made_of(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.device("dm-5", "253:5", ("dm-1", "vda1"), dm__name="in--ner-data", dm__uuid=LV)
    commands = Commands(monkeypatch)
    asyncio.run(SysfsBlocks(tree.roots).deactivate(GROUP, "cr_imap"))
    assert commands.ran == [
        "vgchange --devices /dev/mapper/cr_imap,/dev/vda1 --activate n -- in-ner"
    ]


def test_unit_names() -> None:
    assert mount_unit("/") == "-.mount"
    assert mount_unit("/srv//vm/") == "srv-vm.mount"
    assert mount_unit("/srv/a-b c") == "srv-a\\x2db\\x20c.mount"
    assert mount_unit("/.x/.y") == "\\x2ex-.y.mount"


def test_many_devices_are_seen(tree: Tree) -> None:
    for number in range(200):
        tree.device(
            f"dm-{number + 10}", f"253:{number + 10}", ("vda",), dm__name="x", dm__uuid=UUID
        )
    assert len(observe(tree.roots, ()).devices) == 207
