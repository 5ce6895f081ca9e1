# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes on everything that volumes stand on: the worked examples, all of them on one host."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import PROJECT, RUN_TIMEOUT_S, Host, Vm

RAID = range(4)
VG0, OUTER, GUEST_PV, DETACHED, FOREIGN = range(4, 9)
DNS = "/var/lib/libvirt/images/dns.img"

# What the examples say of the host they are made for, and what it is on this one.
EXAMPLES = {
    "one-guest": {},
    "raid10-lvm-luks": {},
    # The guest in 512 bytes has no agent.
    "luks-ext4-qcow2": {'ready           = "agent"': ""},
    "two-layers": {"/dev/disk/by-id/nvme-example-part3": lab.disk(OUTER)},
}

# The volumes that boot opens, and those that it leaves alone.
BOOT_SET = {
    "cr_imap",
    "cr_imap_encr",
    "cr_vmstore",
    "cr_base",
    "cr_outer",
    "cr_other",
    "cr_detached",
    "cr_guestpv",
}
ELSE = {"keystore", "cr_customer", "cr_manual"}
AUTOSTARTED = {"single", "imap", "dns", "database", "web"}


def partition(disk: Path) -> None:
    """One partition of type "Linux RAID" on the whole disk: the boot record's table by hand."""
    sectors = disk.stat().st_size // guest.SECTOR
    with disk.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"\xff" * 3, 0xFD, b"\xff" * 3, 2048, sectors - 2048))
        file.seek(510)
        file.write(b"\x55\xaa")


def prepare(vm: Vm) -> None:
    """Disks, volumes, guests and configuration. The daemon gets to see none of it."""
    setup = lab.Lab(vm)

    members = " ".join(f"{lab.disk(index)}-part1" for index in RAID)
    vm.wait_until(f"ls {members}")
    vm.run(
        "mdadm --create /dev/md4 --run --assume-clean --level=10 --raid-devices=4 --bitmap=none"
        f" {members}"
        " && pvcreate -q /dev/md4 && vgcreate -q volgrp4 /dev/md4"
        " && lvcreate -q -y -L 40M -n lvimap_hd0 volgrp4"
    )
    vm.run(
        f"pvcreate -q {lab.disk(VG0)} && vgcreate -q vg0 {lab.disk(VG0)}"
        " && for lv in imap vmstore base manual; do lvcreate -q -y -L 60M -n $lv vg0; done"
    )
    setup.luks(lab.disk(OUTER))
    vm.run(f"pvcreate -q {setup.open(lab.disk(OUTER), 'cr_outer')}")
    vm.run(
        "vgcreate -q inner /dev/mapper/cr_outer"
        " && for lv in customer keystore other; do lvcreate -q -y -L 40M -n $lv inner; done"
    )

    # Raw disks of guests.
    for name, device in {
        "cr_imap": "/dev/vg0/imap",
        "cr_imap_encr": "/dev/volgrp4/lvimap_hd0",
        "cr_customer": "/dev/inner/customer",
        "cr_manual": "/dev/vg0/manual",
    }.items():
        setup.luks(device)
        setup.boot_sector(setup.open(device, name))
        setup.close(name)
    setup.domain("single", "/dev/mapper/cr_imap")
    setup.domain("imap", "/dev/mapper/cr_imap_encr")
    setup.domain("customer", "/dev/mapper/cr_customer", autostart=False)
    setup.domain("manual", "/dev/mapper/cr_manual")
    setup.boot_sector(DNS)
    vm.run(f"truncate -s 1M {DNS}")
    setup.domain("dns", xml=guest.domain_xml("dns", DNS, kind="raw"))

    # Image files: one in a chain of two volumes, one on its own.
    for name, device in {"cr_vmstore": "/srv/vm", "cr_base": "/srv/base"}.items():
        lv = f"/dev/vg0/{name.removeprefix('cr_')}"
        setup.luks(lv)
        vm.run(f"mkfs.ext4 -q {setup.open(lv, name)}")
        vm.run(f"mkdir -p {device} && mount /dev/mapper/{name} {device}")
    setup.boot_sector("/srv/base/base.img")
    vm.run(
        "truncate -s 1M /srv/base/base.img && cd /srv/vm"
        " && qemu-img create -q -f qcow2 -F raw -b /srv/base/base.img web.qcow2"
        " && qemu-img convert -O qcow2 /srv/base/base.img database.qcow2"
    )
    web = guest.domain_xml("web", "web.qcow2", kind="qcow2")
    web = web.replace("type='file'", "type='volume'")
    web = web.replace("<source file='web.qcow2'/>", "<source pool='vm' volume='web.qcow2'/>")
    vm.run("virsh -q pool-define-as vm dir --target /srv/vm && virsh -q pool-autostart vm")
    setup.domain("web", xml=web)
    setup.domain("database", xml=guest.domain_xml("database", "/srv/vm/database.qcow2", kind="qcow2"))

    # A header that lies in a volume's file system, and a key that lies in another's.
    vm.run(
        f"cryptsetup luksFormat --batch-mode --type luks2 {lab.CHEAP} --key-file -"
        f" --header /srv/vm/detached.header {lab.disk(DETACHED)}",
        stdin=lab.PASSPHRASE.encode(),
    )
    setup.luks("/dev/inner/keystore")
    vm.run(
        f"mkfs.ext4 -q {setup.open('/dev/inner/keystore', 'keystore')}"
        " && mkdir -p /run/keystore && mount /dev/mapper/keystore /run/keystore"
        " && dd if=/dev/urandom of=/run/keystore/other bs=64 count=1 status=none"
        " && chmod 600 /run/keystore/other"
        f" && cryptsetup luksFormat --batch-mode --type luks2 {lab.CHEAP} --key-file"
        " /run/keystore/other /dev/inner/other"
    )

    # A guest's disk that is a physical volume, with a group that the host could activate.
    setup.luks(lab.disk(GUEST_PV))
    setup.open(lab.disk(GUEST_PV), "cr_guestpv")
    vm.run(
        "pvcreate -q /dev/mapper/cr_guestpv && vgcreate -q guestvg /dev/mapper/cr_guestpv"
        " && lvcreate -q -y -L 4M -n root guestvg"
    )
    # A group of somebody else, which is to stay as it is: inactive.
    vm.run(
        f"pvcreate -q {lab.disk(FOREIGN)} && vgcreate -q --setautoactivation n foreign"
        f" {lab.disk(FOREIGN)} && lvcreate -q -y -an -L 4M -n theirs foreign"
    )

    vm.run("umount /srv/vm /srv/base /run/keystore && vgchange -q -an guestvg")
    for name in ("cr_vmstore", "cr_base", "keystore", "cr_guestpv"):
        setup.close(name)
    vm.run("vgchange -q -an inner")
    setup.close("cr_outer")

    for name, replaced in EXAMPLES.items():
        text = (PROJECT / f"config/examples/{name}.toml").read_text()
        for there, here in replaced.items():
            assert there in text, f"{name}: the example has changed"
            text = text.replace(there, here)
        vm.put(f"/etc/vmcryptd/conf.d/{name}.toml", text)
    setup.volume("cr_base", "/dev/vg0/base", content="filesystem", mount="/srv/base")
    setup.volume("cr_detached", lab.disk(DETACHED), header="/srv/vm/detached.header")
    setup.volume("cr_guestpv", lab.disk(GUEST_PV))
    setup.volume("cr_manual", "/dev/vg0/manual", unlock="manual")
    vm.put("/etc/vmcryptd/conf.d/more.toml", "\n".join(setup.config))


@pytest.fixture(scope="module")
def host(module_host: HostFactory) -> Host:
    """Off, everything locked, guests shut off."""
    sizes = ["200M", "200M", "200M", "200M", "300M", "200M", "60M", "60M", "60M"]
    host = module_host(disks=sizes)
    for index in RAID:
        partition(host.disk_path(index))
    with host.boot() as vm:
        prepare(vm)
        vm.poweroff()
    return host


@pytest.fixture(scope="module")
def vm(host: Host) -> Iterator[Vm]:
    """The first boot, which the tests that follow take through a day."""
    with host.boot(wait=False) as vm:
        vm.wait_unit("vmcryptd.service")
        yield vm
