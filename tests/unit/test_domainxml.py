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


def named(path: str) -> DiskSource:
    """What is no disk, and may serve several guests."""
    return DiskSource(SourceType.FILE, path=path, shareable=True)


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
    pytest.param(
        "<disk type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/></disk>",
        [named("/dev/vhost-vdpa-0")],
        id="vdpa",
    ),
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
    pytest.param(
        "<filesystem type='mount'><source socket='/s'/></filesystem>", [named("/s")], id="socket"
    ),
    pytest.param("<filesystem type='ram'><source usage='1'/></filesystem>", [], id="ram"),
    pytest.param(
        "<tpm><backend type='emulator'><source type='file' path='/tpm'/></backend></tpm>",
        [file("/tpm")],
    ),
    pytest.param(
        """<hostdev mode='subsystem' type='pci'><source><address bus='1'/></source></hostdev>
        <memory model='dimm'><source><pagesize>4</pagesize></source></memory>
        <interface type='direct'><source dev='eth0'/></interface>
        <filesystem type='ram'><source usage='1'/><target dir='/in/the/guest'/></filesystem>
        <console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/></console>""",
        [],
        id="no host path",
    ),
]


@pytest.mark.parametrize(("devices", "expected"), DEVICES)
def test_devices(devices: str, expected: list[DiskSource]) -> None:
    assert list(definitions.domain(described(devices)).sources) == expected


@pytest.mark.parametrize(
    ("os", "expected"),
    [
        (
            "<loader>/usr/share/OVMF.fd</loader><nvram template='/t'>/v.fd</nvram>",
            [file("/v.fd"), named("/t")],
        ),
        ("<nvram type='file'><source file='/v.fd'/></nvram>", [file("/v.fd")]),
        ("<nvram type='block'><source dev='/dev/vg/v'/></nvram>", [block("/dev/vg/v")]),
        ("<nvram>/dev/vg/v</nvram>", [block("/dev/vg/v")]),
        ("<nvram/>", []),
        (
            "<kernel>/k</kernel><initrd>/i</initrd><dtb>/d</dtb><cmdline>x</cmdline>",
            [named("/k"), named("/i"), named("/d")],
        ),
        ("<acpi><table type='slic'>/slic.dat</table></acpi>", [named("/slic.dat")]),
        ("<init>/sbin/init</init><initarg>/in/the/guest</initarg>", []),
    ],
)
def test_firmware_and_kernel(os: str, expected: list[DiskSource]) -> None:
    assert list(definitions.domain(described(os=os)).sources) == expected


QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
# What libvirt's own test domains name beside disks, and what QEMU itself takes.
NAMED = [
    ("<sysinfo type='fwcfg'><entry name='opt/x' file='/srv/ignition'/></sysinfo>", "/srv/ignition"),
    ("<sysinfo type='fwcfg'><entry name='opt/x'>/content</entry></sysinfo>", ""),
    ("<sysinfo type='smbios'><bios><entry name='vendor'>/Me</entry></bios></sysinfo>", ""),
    ("<metadata><app xmlns='urn:x'><disk file='/srv/x'/></app></metadata>", ""),
    ("<resource><partition>/machine</partition></resource>", ""),
    ("<devices><emulator>/srv/qemu</emulator></devices>", "/srv/qemu"),
    ("<devices><memory><source><path>/srv/nvdimm</path></source></memory></devices>", "/srv/nvdimm"),
    ("<devices><serial type='file'><source path='/srv/log'/></serial></devices>", "/srv/log"),
    ("<devices><console type='pty'><log file='/srv/log'/></console></devices>", "/srv/log"),
    ("<devices><parallel type='unix'><source path='/srv/s'/></parallel></devices>", "/srv/s"),
    ("<devices><channel type='unix'><source path='/srv/s'/></channel></devices>", "/srv/s"),
    ("<devices><smartcard><database>/srv/nss</database></smartcard></devices>", "/srv/nss"),
    ("<devices><hostdev><rom bar='on' file='/srv/rom'/></hostdev></devices>", "/srv/rom"),
    ("<devices><interface><rom file='/srv/rom'/></interface></devices>", "/srv/rom"),
    ("<devices><interface><script path='/srv/up'/></interface></devices>", "/srv/up"),
    ("<devices><input type='evdev'><source dev='/dev/input/e'/></input></devices>", "/dev/input/e"),
    ("<devices><rng><backend model='random'>/srv/rng</backend></rng></devices>", "/srv/rng"),
    ("<devices><shmem><server path='/srv/shmem'/></shmem></devices>", "/srv/shmem"),
    ("<devices><lease><target path='/srv/lease' offset='1'/></lease></devices>", "/srv/lease"),
    ("<devices><pstore backend='acpi-erst'><path>/srv/p</path></pstore></devices>", "/srv/p"),
    ("<devices><tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm></devices>",
     "/dev/tpm0"),
    ("<devices><graphics><listen type='socket' socket='/srv/vnc'/></graphics></devices>", "/srv/vnc"),
    ("<devices><disk type='network'><source><identity keyfile='/srv/key'/></source></disk></devices>",
     "/srv/key"),
    ("<devices><disk type='file'><source file='fat:rw:/srv/dir'/></disk></devices>", "/srv/dir"),
    ("<os><nvram template='/srv/template'/></os>", "/srv/template"),
    ("<launchSecurity><quoteGenerationService path='/srv/qgs'/></launchSecurity>", "/srv/qgs"),
    ("<q:commandline><q:arg value='-kernel'/><q:arg value='/srv/k'/></q:commandline>", "/srv/k"),
    ("<q:commandline><q:arg value='name=opt/com.coreos/config,file=/srv/i,,gn'/></q:commandline>",
     "/srv/i,gn"),
    ("""<q:commandline><q:arg value='{"driver":"file","filename":"/srv/x"}'/></q:commandline>""",
     "/srv/x"),
    ("<q:commandline><q:arg value='file=fat:floppy:/srv/f,if=none'/></q:commandline>", "/srv/f"),
    ("<q:commandline><q:arg value='socket,path=/srv/s,server=on'/></q:commandline>", "/srv/s"),
    ("<q:commandline><q:arg value='nbd://host/srv'/><q:arg value='opt/x'/></q:commandline>", ""),
    ("<q:commandline><q:env name='X' value='/srv/lib'/></q:commandline>", "/srv/lib"),
]  # fmt: skip


@pytest.mark.parametrize(("xml", "path"), NAMED)
def test_everything_that_names_a_host_path(xml: str, path: str) -> None:
    text = f"<domain xmlns:q='{QEMU}'><name>x</name>{xml}</domain>"
    assert list(definitions.domain(text).sources) == ([named(path)] if path else [])


def test_where_a_tpm_keeps_its_state_by_default() -> None:
    uuid = "11111111-1111-1111-1111-111111111111"
    text = f"""<domain><uuid>{uuid}</uuid><devices><tpm><backend type='emulator'/></tpm></devices>
        </domain>"""
    assert definitions.domain(text).sources == (file(f"/var/lib/libvirt/swtpm/{uuid}"),)


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
