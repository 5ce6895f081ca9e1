# SPDX-License-Identifier: LGPL-2.1-or-later
"""Volumes on everything that volumes stand on: the worked examples, all of them on one host."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import PROJECT, Snapshot, Vm

RAID = range(4)
VG0, OUTER, GUEST_PV, DETACHED, FOREIGN = range(4, 9)
# An emulated machine on a busy host.
SLOW_S = 300.0
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
    "cr_outer",
    "cr_other",
    "cr_detached",
    "cr_guestpv",
}
# Volumes that are not open when all is up: a keystore, and what has to be asked for.
CLOSED = {"keystore", "cr_customer", "cr_manual"}
STARTED = {"single", "imap", "dns", "database", "web"}


def partition(disk: Path) -> None:
    """One partition of type "Linux RAID" on the whole disk: the boot record's table by hand."""
    sectors = disk.stat().st_size // guest.SECTOR
    with disk.open("r+b") as file:
        file.seek(446)
        file.write(
            struct.pack("<B3sB3sII", 0, b"\xff" * 3, 0xFD, b"\xff" * 3, 2048, sectors - 2048)
        )
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
    setup.domain(
        "database", xml=guest.domain_xml("database", "/srv/vm/database.qcow2", kind="qcow2")
    )

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
        " && dd if=/dev/urandom of=/run/keystore/cr_other.key bs=64 count=1 status=none"
        " && chmod 600 /run/keystore/cr_other.key"
        f" && cryptsetup luksFormat --batch-mode --type luks2 {lab.CHEAP} --key-file"
        " /run/keystore/cr_other.key /dev/inner/other"
    )

    # A guest's disk that is a physical volume, with a group that the host could activate.
    setup.luks(lab.disk(GUEST_PV))
    setup.open(lab.disk(GUEST_PV), "cr_guestpv")
    vm.run(
        "pvcreate -q /dev/mapper/cr_guestpv && vgcreate -q guestvg /dev/mapper/cr_guestpv"
        " && lvcreate -q -y -L 4M -n root guestvg"
    )
    # Another program's group, which must stay inactive.
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
    # Opened because the guest web turns out to need it; no person is asked for it.
    vm.put("/etc/vmcryptd/keys/base", lab.PASSPHRASE, 0o600)
    key = "file:/etc/vmcryptd/keys/base"
    setup.volume(
        "cr_base",
        "/dev/vg0/base",
        content="filesystem",
        mount="/srv/base",
        unlock="guest",
        keys=[key],
    )
    # Its mount is the administrator's own, with an option that tells.
    options = "noauto,noatime,x-systemd.before=vmcryptd-guests.service"
    vm.run(f"echo /dev/mapper/cr_base /srv/base ext4 {options} 0 2 >>/etc/fstab")
    setup.volume("cr_detached", lab.disk(DETACHED), header="/srv/vm/detached.header")
    setup.volume("cr_guestpv", lab.disk(GUEST_PV))
    setup.volume("cr_manual", "/dev/vg0/manual", unlock="manual")
    vm.put("/etc/vmcryptd/conf.d/more.toml", "\n".join(setup.config))


@pytest.fixture(scope="module")
def locked(module_host: HostFactory) -> Snapshot:
    """Booted from powered-off: everything is locked, guests are shut off, and the daemon waits for a key."""
    sizes = ["200M", "200M", "200M", "200M", "300M", "200M", "60M", "60M", "60M"]
    host = module_host(disks=sizes)
    for index in RAID:
        partition(host.disk_path(index))
    with host.resume() as vm:
        prepare(vm)
        vm.run("sync")
        vm.power_cut()
    with host.boot(wait=False) as vm:
        wait_waiting(vm)
        return vm.save()


@pytest.fixture(scope="module")
def opened(module_host: HostFactory, locked: Snapshot) -> Snapshot:
    """One passphrase at the console has opened all of it."""
    with module_host(snapshot=locked).resume() as vm:
        vm.console.expect("login: ", SLOW_S)
        vm.console.type("root\n")
        vm.console.expect(r"root@.*# ")
        vm.console.type("vmcryptctl unlock; echo exit=$?\n")
        vm.console.expect("Passphrase for .*:")
        lab.type_secret(vm, lab.PASSPHRASE)
        vm.console.expect("exit=0", SLOW_S)
        let_dns_answer(vm)
        assert_up(vm, starts=1, clean_stops=0)
        return vm.save()


@pytest.fixture
def vm(host: HostFactory, opened: Snapshot) -> Iterator[Vm]:
    """Everything is open and runs."""
    with host(snapshot=opened).resume() as vm:
        yield vm


def behind(vm: Vm, goal: str) -> dict[str, set[str]]:
    """The steps of a plan, each with all that come before it."""
    found: dict[str, set[str]] = {}
    for step in json.loads(vm.run(["vmcryptctl", "plan", goal, "--json"]).out)["steps"]:
        earlier = set(step["after"])
        found[f"{step['action']}:{step['object']}"] = earlier.union(
            *(found[name] for name in earlier)
        )
    return found


def wait_waiting(vm: Vm) -> None:
    """The daemon waits for a key, and knows from libvirt who needs it."""
    lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
    lab.wait_object(vm, "guest", "web", "off", SLOW_S)


def assert_boot_is_planned_well(vm: Vm) -> dict[str, set[str]]:
    steps = behind(vm, "boot")
    assert {"activate:cr_outer"} <= steps["unlock:keystore"]
    assert {"activate:cr_outer", "mount:keystore"} <= steps["unlock:cr_other"]
    assert {"unlock:cr_other"} <= steps["unmount:keystore"] < steps["lock:keystore"]
    assert {"mount:cr_vmstore"} <= steps["unlock:cr_detached"]
    assert {"mount:cr_vmstore", "start-pool:vm", "start:database"} <= steps["start:web"]
    assert {"unlock:cr_imap_encr"} == steps["start:imap"]
    return steps


def let_dns_answer(vm: Vm) -> None:
    """The port that the guest dns would serve, if it were more than 512 bytes."""
    vm.run(
        "ip address add 192.168.1.5/32 dev lo"
        " && systemd-run --quiet --unit=dns-port nc -lknv 192.168.1.5 53"
    )


def assert_up(vm: Vm, starts: int, clean_stops: int) -> None:
    lab.wait_state(vm, "ready", timeout_s=SLOW_S)
    states = lab.volume_states(vm)
    assert {name for name, state in states.items() if state == "unlocked"} == BOOT_SET | {"cr_base"}
    assert {name for name, state in states.items() if state == "locked"} == CLOSED
    running = {name for name, state in lab.guest_states(vm).items() if state == "running"}
    assert running == STARTED
    expected = guest.Counters(starts, clean_stops)
    vm.wait_counters("/dev/mapper/cr_imap", expected)
    vm.wait_counters("/dev/mapper/cr_imap_encr", expected)
    for name in ("web", "database"):
        convert = f"qemu-img convert -U -O raw /srv/vm/{name}.qcow2 /run/{name}.img"
        vm.wait_until(f"{convert} && {counted(f'/run/{name}.img', expected)}", SLOW_S)
    assert behind(vm, "boot") == {}


def counted(file: str, expected: guest.Counters) -> str:
    """A shell condition."""
    number = f"od -An -v -tu4 -w512 -j512 -N1024 {file} | awk '{{ print $1 }}' | xargs"
    return f'[ "$({number})" = "{expected.starts} {expected.clean_stops}" ]'


def assert_others_are_left_alone(vm: Vm) -> None:
    """The group foreign is none of ours, and inactive."""
    assert vm.run("lvs --noheadings -o lv_active foreign").out.strip() == ""


def assert_nothing_failed(vm: Vm) -> None:
    assert vm.run("systemctl list-units --failed --plain --no-legend").out == ""


def test_boot_is_planned_while_everything_is_locked(host: HostFactory, locked: Snapshot) -> None:
    with host(snapshot=locked).resume() as vm:
        assert lab.mappings(vm) == []
        steps = assert_boot_is_planned_well(vm)
        assert {s.partition(":")[2] for s in steps if s.startswith("unlock:")} == BOOT_SET | {
            "keystore"
        }
        # A volume that is opened only on request starts no guest; a running guest is not started again.
        assert not {"start:manual", "start:dns", "start:customer"} & set(steps)


def test_one_passphrase_opens_all_of_it(vm: Vm) -> None:
    # The guest after dns was not started before that was ready.
    journal = vm.run("journalctl -b -o cat -u vmcryptd -u dns-port").out
    assert 0 < journal.index("Connection received") < journal.index("guest imap is started")
    assert_others_are_left_alone(vm)
    assert_nothing_failed(vm)


def test_file_systems_and_pools(vm: Vm) -> None:
    mounts = vm.run("findmnt --real -rno TARGET,SOURCE").out.splitlines()[1:]
    assert sorted(mounts) == ["/srv/base /dev/mapper/cr_base", "/srv/vm /dev/mapper/cr_vmstore"]
    # At host shutdown systemd gets to them when the guests' unit has been stopped.
    for unit in ("srv-vm.mount", "srv-base.mount"):
        before = vm.run(f"systemctl show --value -p Before {unit}").out.split()
        assert "vmcryptd-guests.service" in before
    # libvirt started the pool when nothing was mounted there.
    assert "web.qcow2" in vm.run("virsh vol-list vm").out
    options = "findmnt --noheadings --output OPTIONS --mountpoint "
    assert "noatime" in vm.run(f"{options} /srv/base").out  # as fstab has it
    assert "noatime" not in vm.run(f"{options} /srv/vm").out
    refused = vm.run("vmcryptctl lock cr_vmstore", check=False)
    assert refused.code == 1
    assert "guest database, guest web" in refused.err


def test_discards_pass_where_the_configuration_says_so(vm: Vm) -> None:
    tables = vm.run("dmsetup table --target crypt").out.splitlines()
    passing = {line.partition(":")[0] for line in tables if "allow_discards" in line}
    assert passing == {"cr_vmstore"}


def test_a_guests_disk_is_not_looked_into(vm: Vm) -> None:
    seen = vm.run("udevadm info -q property /dev/mapper/cr_guestpv").out
    assert "ID_FS_" not in seen
    assert "LVM_" not in seen
    vm.run(
        'test -z "$(ls /sys/class/block/$(basename $(readlink -f /dev/mapper/cr_guestpv))/holders)"'
    )
    vm.run("vmcryptctl lock cr_guestpv")
    assert "cr_guestpv" not in lab.mappings(vm)

    # That it could have been: a volume whose group is the host's.
    config = "/etc/vmcryptd/conf.d/more.toml"
    vm.run(f"sed -i 's/^.volume.cr_guestpv.$/&\\ncontent = \"lvm\"/' {config} && vmcryptctl reload")
    assert lab.unlock(vm, "cr_guestpv") == 0
    vm.run("test -b /dev/guestvg/root")
    seen = vm.run("udevadm info -q property /dev/mapper/cr_guestpv").out
    assert "ID_FS_TYPE=LVM2_member" in seen
    assert_others_are_left_alone(vm)
    vm.run("vmcryptctl lock cr_guestpv && ! test -e /dev/guestvg")
    assert_others_are_left_alone(vm)
    assert "inner-other" in vm.run("dmsetup ls").out


def test_a_volume_that_comes_and_goes_with_its_guest(vm: Vm) -> None:
    starting = vm.background("vmcryptctl start customer")
    lab.wait_object(vm, "volume", "cr_customer", "waiting")
    assert lab.unlock(vm, "cr_customer") == 0
    assert starting.wait().code == 0
    vm.wait_counters("/dev/mapper/cr_customer", guest.Counters(1, 0))
    vm.run("virsh -q shutdown customer")
    vm.wait_until("! test -e /dev/mapper/cr_customer")
    lab.wait_object(vm, "volume", "cr_customer", "locked")


def test_a_volume_that_is_opened_only_on_request(vm: Vm) -> None:
    assert lab.unlock(vm, "cr_manual") == 0
    assert lab.guest_states(vm)["manual"] == "off"
    vm.run("vmcryptctl lock cr_manual")
    assert lab.volume_states(vm)["cr_manual"] == "locked"


@pytest.mark.long
def test_the_way_down_and_the_next_boot(vm: Vm) -> None:
    """Everything is closed at power-off; the next boot remembers what it cannot see."""
    # The next boot has to remember what lies on cr_outer.
    vm.run("sed -i '/^vg *=/d' /etc/vmcryptd/conf.d/two-layers.toml")
    vm.run("sed -i '/^content = \"lvm\"$/d' /etc/vmcryptd/conf.d/more.toml")
    assert_nothing_failed(vm)
    assert vm.poweroff() == "guest-shutdown"
    host = vm.host
    journal = host.journal_path(host.boots).read_text()
    down = journal[journal.rindex("Stopping vmcryptd-guests.service") :]
    for name in BOOT_SET - {"cr_guestpv"} | {"cr_base"}:
        assert f"volume {name} is closed" in down
    assert "STILL OPEN" not in vm.console.transcript
    # /run/lock is busy now and then, which has nothing to do with us.
    assert not re.search(r"systemd\[1\]: (?!.*run-lock\.mount).*(Failed|failed)", down)
    assert not re.search(r"systemd\[1\]: Stopping qemu|machine-qemu.*: Killing", down)

    with host.boot(wait=False) as vm:
        wait_waiting(vm)
        assert_boot_is_planned_well(vm)
        # Which image web.qcow2 is backed by stands in web.qcow2, which is locked: this is what it was the last time.
        [web] = [domain for domain in lab.status(vm)["guests"] if domain["name"] == "web"]
        assert web["needs"] == ["cr_vmstore", "cr_base"]
        # So the volume whose key needs no person need not be waited for.
        lab.wait_object(vm, "volume", "cr_base", "unlocked")
        assert lab.mappings(vm) == ["cr_base"]
        let_dns_answer(vm)
        assert lab.unlock(vm) == 0
        assert_up(vm, starts=2, clean_stops=1)

        vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
        assert lab.mappings(vm) == []
        assert behind(vm, "shutdown") == {}
        assert set(lab.guest_states(vm).values()) == {"off"}
        assert vm.run("findmnt --real -rno TARGET").out.split() == ["/"]
        assert_others_are_left_alone(vm)
        assert_nothing_failed(vm)
