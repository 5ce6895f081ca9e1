# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domain and pool XML as libvirt writes it."""

from __future__ import annotations

import pytest

from vmcryptd.adapters.libvirt import definitions
from vmcryptd.adapters.libvirt.definitions import PoolPlace
from vmcryptd.core.model import DiskSource, SourceType


def block(path: str, writable: bool = True, shareable: bool = False) -> DiskSource:
    return DiskSource(SourceType.BLOCK, path=path, writable=writable, shareable=shareable)


def file(path: str, writable: bool = True, shareable: bool = False) -> DiskSource:
    return DiskSource(SourceType.FILE, path=path, writable=writable, shareable=shareable)


def described(devices: str = "", os: str = "") -> str:
    return f"<domain type='kvm'><name>x</name><os>{os}</os><devices>{devices}</devices></domain>"


DEVICES = [
    pytest.param("<disk type='block'><source dev='/dev/vg/lv'/></disk>", [block("/dev/vg/lv")]),
    pytest.param(
        "<disk type='block'><source dev='/dev/vg/lv'/><shareable/></disk>",
        [block("/dev/vg/lv", shareable=True)],
    ),
    pytest.param(
        "<disk type='file'><source file='/a &amp; &lt;b&gt; &#x27;c&#x27; ü.img'/><readonly/></disk>",
        [file("/a & <b> 'c' ü.img", writable=False)],
        id="escaped",
    ),
    pytest.param(
        "<disk type='volume'><source pool='p' volume='v.qcow2'/></disk>",
        [DiskSource(SourceType.POOL, pool="p", volume="v.qcow2")],
    ),
    pytest.param("<disk type='dir' device='floppy'><source dir='/fat'/></disk>", [file("/fat")]),
    pytest.param(
        "<disk type='file' device='cdrom'><source file='/a.iso'/></disk>",
        [file("/a.iso", writable=False)],
    ),
    pytest.param("<disk type='file' device='cdrom'><target dev='sda'/></disk>", [], id="empty"),
    pytest.param(
        "<disk type='network'><source protocol='rbd' name='pool/image'><host name='h'/></source></disk>",
        [],
        id="network",
    ),
    pytest.param("<disk type='nvme'><source type='pci' namespace='1'/></disk>", [], id="nvme"),
    pytest.param("<disk type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/></disk>", [], id="vdpa"),
    pytest.param(
        """<disk type='file'><driver type='qcow2'/><source file='/top.qcow2' index='1'/>
        <backingStore type='file' index='2'><format type='qcow2'/><source file='/mid.qcow2'/>
          <backingStore type='block' index='3'><format type='raw'/><source dev='/dev/vg/base'/>
            <backingStore/></backingStore></backingStore>
        <mirror type='file'><source file='/copy'/></mirror></disk>""",
        [file("/top.qcow2"), file("/mid.qcow2", False), block("/dev/vg/base", False)],
        id="chain",
    ),
    pytest.param(
        """<disk type='file'><driver type='qcow2'/><source file='/meta.qcow2'>
        <dataStore type='block'><format type='raw'/><source dev='/dev/vg/data'/></dataStore>
        </source></disk>""",
        [file("/meta.qcow2"), block("/dev/vg/data")],
        id="data store",
    ),
    pytest.param(
        "<filesystem type='mount'><source dir='/export'/><target dir='t'/></filesystem>",
        [file("/export", shareable=True)],
    ),
    pytest.param(
        "<filesystem type='file'><source file='/fs.img'/><readonly/></filesystem>",
        [file("/fs.img", writable=False, shareable=True)],
    ),
    pytest.param("<filesystem type='mount'><source socket='/s'/></filesystem>", [], id="socket"),
    pytest.param("<filesystem type='ram'><source usage='1'/></filesystem>", [], id="ram"),
    pytest.param(
        "<tpm><backend type='emulator'><source type='file' path='/tpm'/></backend></tpm>",
        [file("/tpm")],
    ),
    pytest.param(
        """<hostdev mode='subsystem' type='pci'><source><address bus='1'/></source></hostdev>
        <memory model='dimm'><source><pagesize>4</pagesize></source></memory>
        <serial type='file'><source path='/var/log/x'/></serial>""",
        [],
        id="not storage",
    ),
]


@pytest.mark.parametrize(("devices", "expected"), DEVICES)
def test_devices(devices: str, expected: list[DiskSource]) -> None:
    assert list(definitions.domain(described(devices)).sources) == expected


@pytest.mark.parametrize(
    ("os", "expected"),
    [
        ("<loader>/usr/share/OVMF.fd</loader><nvram template='/t'>/v.fd</nvram>", [file("/v.fd")]),
        ("<nvram type='file'><source file='/v.fd'/></nvram>", [file("/v.fd")]),
        ("<nvram type='block'><source dev='/dev/vg/v'/></nvram>", [block("/dev/vg/v")]),
        ("<nvram>/dev/vg/v</nvram>", [block("/dev/vg/v")]),
        ("<nvram/>", []),
        (
            "<kernel>/k</kernel><initrd>/i</initrd><dtb>/d</dtb><cmdline>x</cmdline>",
            [file("/k", False), file("/i", False), file("/d", False)],
        ),
        ("<acpi><table type='slic'>/slic.dat</table></acpi>", [file("/slic.dat", False)]),
    ],
)
def test_firmware_and_kernel(os: str, expected: list[DiskSource]) -> None:
    assert list(definitions.domain(described(os=os)).sources) == expected


def test_inactive_and_live_are_merged_in_order() -> None:
    inactive = described(
        "<disk type='block'><source dev='/dev/b'/></disk><disk><source dev='/dev/a'/></disk>"
    )
    live = described(
        "<disk type='block'><source dev='/dev/a'/><readonly/></disk>"
        "<disk type='file'><driver type='qcow2'/><source file='/hotplugged'/></disk>"
    )
    contents = definitions.domain(inactive, live)
    assert contents.sources == (block("/dev/b"), block("/dev/a"), file("/hotplugged"))
    assert contents.formats == {file("/hotplugged"): "qcow2"}


def test_twice_the_same_disk_is_writable_if_one_is() -> None:
    devices = "<disk><source dev='/dev/a'/><readonly/></disk><disk><source dev='/dev/a'/></disk>"
    assert definitions.domain(described(devices)).sources == (block("/dev/a"),)


def test_formats_are_those_that_are_named() -> None:
    devices = """<disk><driver name='qemu' type='raw'/><source file='/r'/></disk>
        <disk><driver name='qemu'/><source file='/n'/></disk>
        <disk><driver type='qcow2'/><source pool='p' volume='v'/></disk>"""
    assert definitions.domain(described(devices)).formats == {
        file("/r"): "raw",
        DiskSource(SourceType.POOL, pool="p", volume="v"): "qcow2",
    }


@pytest.mark.parametrize(
    ("target", "connected"),
    [
        ("<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>", True),
        ("<target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/>", False),
        ("<target type='virtio' name='com.redhat.spice.0' state='connected'/>", False),
    ],
)
def test_agent(target: str, connected: bool) -> None:
    xml = described(f"<channel type='unix'>{target}</channel>")
    assert definitions.domain(described(), xml).agent_connected is connected


def test_no_description_at_all() -> None:
    assert definitions.domain() == definitions.Contents()


@pytest.mark.parametrize(
    ("kind", "inside", "expected"),
    [
        ("dir", "<target><path>/srv/a&amp;b</path></target>", PoolPlace(path="/srv/a&b")),
        (
            "fs",
            "<source><device path='/dev/mapper/c'/></source><target><path>/srv</path></target>",
            PoolPlace(path="/srv", devices=("/dev/mapper/c",)),
        ),
        (
            "logical",
            "<source><device path='/dev/a'/><device path='/dev/b'/><name>vg</name></source>",
            PoolPlace(devices=("/dev/a", "/dev/b"), vg="vg"),
        ),
        ("logical", "<target><path>/dev/named</path></target>", PoolPlace(vg="named")),
        (
            "disk",
            "<source><device path='/dev/sdb'/></source><target><path>/dev</path></target>",
            PoolPlace(devices=("/dev/sdb",)),
        ),
        (
            "netfs",
            "<source><host name='h'/><dir path='/x'/></source><target><path>/m</path></target>",
            PoolPlace(),
        ),
        ("iscsi", "<source><device path='iqn.2000-01.x:y'/></source>", PoolPlace()),
        ("rbd", "<source><name>pool</name></source>", PoolPlace()),
    ],
)
def test_pools(kind: str, inside: str, expected: PoolPlace) -> None:
    assert definitions.pool(f"<pool type='{kind}'><name>named</name>{inside}</pool>") == expected
