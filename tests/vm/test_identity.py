# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of disks, and disks that change their names: each volume stays on its own, or is not opened."""

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Vm

pytestmark = pytest.mark.long

SLOW_S = 240.0


def kernel_name(vm: Vm, path: str) -> str:
    return vm.run(f"basename $(readlink -f {path})").out.strip()


def lower_device(vm: Vm, mapping: str) -> str:
    return vm.run(
        f"ls /sys/class/block/$(basename $(readlink -f /dev/mapper/{mapping}))/slaves"
    ).out.strip()


def boot(vm: Vm) -> None:
    vm.run(f"busctl call {lab.MANAGER} Boot")


def test_a_copy_of_a_disk(host: HostFactory) -> None:
    """It comes while the volume is open, and later while it is locked."""
    with host(disks=["40M", "40M"]).resume() as vm:
        setup = lab.Lab(vm)
        original, copy = lab.disk(0), lab.disk(1)
        uuid = setup.luks(original)
        setup.boot_sector(setup.open(original, "cr_imap"))
        setup.close("cr_imap")
        vm.run(f"dd if={original} of={copy} bs=1M conv=fsync status=none && udevadm settle")
        vm.unplug_disk(1)
        setup.volume("cr_imap", f"UUID={uuid}")
        setup.domain("imap", "/dev/mapper/cr_imap")
        setup.write_config(reload=True)
        boot(vm)
        lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
        lab.unlock(vm)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))

        vm.plug_disk(1)
        link = f"/dev/disk/by-uuid/{uuid}"
        vm.wait_until(f"[ $(readlink -f {link}) = $(readlink -f {copy}) ]")
        vm.run("udevadm settle")
        device = f"/dev/{kernel_name(vm, original)}"
        vm.wait_until(f'vmcryptctl status --json | grep -q \'"device": "{device}"\'')
        assert lab.volume_states(vm) == {"cr_imap": "unlocked"}
        assert lab.status(vm)["guests"][0]["needs"] == ["cr_imap"]
        refused = vm.run("vmcryptctl check", check=False)
        assert "cr_imap" not in refused.out.replace("guest imap", "")
        vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
        assert lab.mappings(vm) == []

        names = sorted((kernel_name(vm, original), kernel_name(vm, copy)))
        both = f"UUID={uuid} is on /dev/{names[0]} and /dev/{names[1]}"
        assert lab.volume(vm, "cr_imap")["state"] == "failed"
        assert both in lab.volume(vm, "cr_imap")["error"]
        assert lab.unlock(vm, "cr_imap", check=False) == 1
        assert both in vm.run("vmcryptctl check", check=False).out
        assert lab.mappings(vm) == []

        boot(vm)
        lab.wait_state(vm, "degraded", timeout_s=SLOW_S)
        vm.unplug_disk(1)
        lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
        lab.unlock(vm)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        assert f"/dev/{lower_device(vm, 'cr_imap')}" == device
        # The copy has none of the guest's second start.
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(2, 1))


def test_kernel_names_that_change_places(host: HostFactory) -> None:
    with host(disks=["40M", "40M"]).resume() as vm:
        setup = lab.Lab(vm)
        names = {}
        for index in (0, 1):
            names[index] = f"/dev/{kernel_name(vm, lab.disk(index))}"
            setup.encrypted_guest(f"s{index}", names[index])
        setup.write_config(reload=True)
        lab.unlock(vm, "cr_s0", "cr_s1")
        warned = vm.run("vmcryptctl check", check=False).out
        uuid = lab.volume(vm, "cr_s0")["uuid"]
        assert f'write device = "UUID={uuid}"' in warned
        vm.run("vmcryptctl lock")

        for index in (0, 1):
            vm.unplug_disk(index)
        vm.wait_until(f"! ls {names[0]} {names[1]}")
        # The one that comes first gets the first name that is free.
        for index in sorted(names, key=lambda index: names[index], reverse=True):
            vm.wait_until(f"ls {vm.plug_disk(index)}")
        assert f"/dev/{kernel_name(vm, lab.disk(0))}" == names[1]

        assert lab.unlock(vm, "cr_s0", check=False) == 1
        error = lab.volume(vm, "cr_s0")["error"]
        assert f"volume cr_s0: the LUKS header on {names[0]} was last seen as volume cr_s1" in error
        assert lab.mappings(vm) == []
        started = vm.run("vmcryptctl start s0", check=False, timeout_s=SLOW_S)
        assert started.code != 0
        assert lab.guest_states(vm) == {"s0": "off", "s1": "off"}


def test_what_udisks_opened_gets_its_name(host: HostFactory) -> None:
    with host(disks=["40M"]).resume() as vm:
        setup = lab.Lab(vm)
        setup.encrypted_guest("imap", lab.disk(0))
        setup.write_config(reload=True)
        uuid = vm.run(f"cryptsetup luksUUID {lab.disk(0)}").out.strip()
        setup.open(lab.disk(0), f"luks-{uuid}")
        vm.wait_until("ls /dev/mapper/cr_imap")
        lab.wait_object(vm, "volume", "cr_imap", "unlocked")
        vm.wait_until(f"! ls /dev/mapper/luks-{uuid}")
        vm.run("vmcryptctl start imap", timeout_s=SLOW_S)
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
        assert lab.volume(vm, "cr_imap")["error"] == ""
        vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
        assert lab.mappings(vm) == []


FILTER = 'devices {\n use_devicesfile = 0\n global_filter = [ "r|.*|" ]\n}\n'
DEVICES_FILE = "devices {\n use_devicesfile = 1\n}\n"


def test_a_group_on_two_volumes_that_lvm_does_not_look_at(host: HostFactory) -> None:
    """By global_filter, and by a devices file, as RHEL and Fedora have it."""
    with host(disks=["40M", "40M"]).resume() as vm:
        setup = lab.Lab(vm)
        mappings = []
        for index, name in enumerate(("cr_a", "cr_b")):
            setup.luks(lab.disk(index))
            mappings.append(setup.open(lab.disk(index), name))
            setup.volume(name, lab.disk(index), content="lvm")
        vm.run(
            f"pvcreate -q {' '.join(mappings)} && vgcreate -q pair {' '.join(mappings)}"
            " && lvcreate -q -y -i 2 -L 8M -n imap pair"
        )
        setup.boot_sector("/dev/pair/imap")
        vm.run("udevadm settle && vgchange -q -an pair")
        for name in ("cr_a", "cr_b"):
            setup.close(name)
        setup.domain("imap", "/dev/pair/imap")
        setup.write_config("[guest.imap]\nneeds = ['cr_a', 'cr_b']\n", reload=True)

        for start, setting in enumerate((FILTER, DEVICES_FILE)):
            vm.put("/etc/lvm/lvmlocal.conf", setting)
            vm.run(
                "mkdir -p /etc/lvm/devices && echo VERSION=1.1.1 >/etc/lvm/devices/system.devices"
            )
            assert vm.run("vgs --noheadings -o vg_name", check=False).out.split() == []
            boot(vm)
            lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
            lab.unlock(vm)
            lab.wait_state(vm, "ready", timeout_s=SLOW_S)
            assert lab.volume_states(vm) == {"cr_a": "unlocked", "cr_b": "unlocked"}
            vm.wait_counters("/dev/pair/imap", guest.Counters(start + 1, start))
            vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
            assert lab.mappings(vm) == []


def test_a_mount_below_a_symbolic_link_and_a_folder_of_it(host: HostFactory) -> None:
    """The guest's image is reached by way of the fstab's bind mount; QEMU is an ordinary user."""
    with host(disks=["40M"]).resume() as vm:
        setup = lab.Lab(vm)
        setup.luks(lab.disk(0))
        vm.run(f"mkfs.ext4 -q {setup.open(lab.disk(0), 'cr_vm')} && mount /dev/mapper/cr_vm /mnt")
        vm.run("mkdir /mnt/images && truncate -s 1M /mnt/images/imap.img")
        setup.boot_sector("/mnt/images/imap.img")
        vm.run("umount /mnt")
        setup.close("cr_vm")
        vm.run("mkdir /data && ln -s /data /srv/link")
        options = "bind,noauto,x-systemd.before=vmcryptd-guests.service"
        vm.run(f"echo /srv/link/a/vm/images /var/images none {options} 0 0 >>/etc/fstab")
        vm.run("systemctl daemon-reload")
        setup.volume("cr_vm", lab.disk(0), content="filesystem", mount="/srv/link/a/vm")
        setup.domain("imap", xml=guest.domain_xml("imap", "/var/images/imap.img", kind="raw"))
        setup.write_config(reload=True)
        vm.wait_until("vmcryptctl status --json | grep -A3 imap | grep -q cr_vm")

        boot(vm)
        lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
        lab.unlock(vm)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        vm.wait_counters("/data/a/vm/images/imap.img", guest.Counters(1, 0))
        assert vm.run("stat -c %a /data/a /var/images").out.split() == ["755", "755"]
        vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
        assert lab.mappings(vm) == []


def test_a_file_system_that_hangs_does_not_stop_the_daemon(host: HostFactory) -> None:
    """A guest's image lies on a device that is suspended, and nothing of it is cached."""
    with host(disks=["40M", "40M"]).resume() as vm:
        setup = lab.Lab(vm)
        setup.encrypted_guest("imap", lab.disk(0))
        size = vm.run(f"blockdev --getsz {lab.disk(1)}").out.strip()
        vm.run(f"dmsetup create slow --table '0 {size} linear {lab.disk(1)} 0'")
        vm.run("mkfs.ext4 -q /dev/mapper/slow && mkdir -p /srv/slow/a")
        vm.run("mount /dev/mapper/slow /srv/slow && mkdir -p /srv/slow/a/b")
        vm.run("truncate -s 1M /srv/slow/a/b/web.img")
        web = guest.domain_xml("web", "/srv/slow/a/b/web.img", kind="raw")
        setup.domain("web", xml=web, autostart=False)
        setup.write_config("[guest.web]\nneeds = ['cr_imap']\n", reload=True)
        vm.wait_until("vmcryptctl status --json | grep -q web")

        vm.run("umount /srv/slow && mount /dev/mapper/slow /srv/slow")
        vm.run("dmsetup suspend --nolockfs --noflush slow; echo 3 >/proc/sys/vm/drop_caches")
        probe = vm.background("stat /srv/slow/a/b/web.img")
        boot(vm)
        lab.wait_state(vm, "waiting", timeout_s=SLOW_S)
        lab.unlock(vm)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
        assert probe.running  # it does hang
        vm.run("dmsetup resume slow")
        probe.wait()
        vm.run("vmcryptctl shutdown", timeout_s=SLOW_S)
        assert lab.mappings(vm) == []
