# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main job: from powered-off to running guests and back. Each test boots a copy of the same disks."""

import json

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Host, Snapshot, Vm

CLOSED_LOUDLY = "STILL OPEN"


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """Closed, guests shut off. `cr_imap` lies on a logical volume on `cr_outer`; so does the disk of `web`."""
    host = module_host(disks=["200M"])
    lab.format_disk(host, 0)
    with host.resume() as vm:
        setup = lab.Lab(vm)
        outer = setup.open(lab.disk(0), "cr_outer")
        vm.run(
            f"pvcreate -q {outer} && vgcreate -q inner {outer}"
            " && lvcreate -q -y -L 20M -n web inner && lvcreate -q -y -L 60M -n imap inner"
        )
        setup.volume("cr_outer", lab.disk(0), content="lvm", vg="inner")
        setup.encrypted_guest("imap", "/dev/inner/imap")
        setup.boot_sector("/dev/inner/web")
        setup.domain("web", "/dev/inner/web")
        vm.run("vgchange -q -an inner")
        setup.close("cr_outer")
        vm.put(
            "/usr/local/bin/on-waiting", "#!/bin/sh\necho $VMCRYPTD_WAITING >>/root/waited\n", 0o755
        )
        setup.table(
            "daemon", {"console_prompt": "10min", "on_waiting": ["/usr/local/bin/on-waiting"]}
        )
        setup.write_config()
        # Its way is to write the guests' memory to disk, in plain text: it is to find none that runs.
        vm.run("echo ON_SHUTDOWN=suspend >/etc/default/libvirt-guests; sync")
        return vm.save()


@pytest.fixture
def machine(host: HostFactory, prepared: Snapshot) -> Host:
    """Off, with the disks as they are prepared."""
    return host(snapshot=prepared)


def boot_locked(machine: Host) -> Vm:
    vm = machine.boot(wait=False)
    vm.wait_unit("vmcryptd.service")
    assert lab.mappings(vm) == []
    return vm


def assert_running(vm: Vm, starts: int, clean_stops: int) -> None:
    lab.wait_state(vm, "ready")
    vm.wait_unit("vmcryptd.target")
    expected = guest.Counters(starts, clean_stops)
    vm.wait_counters("/dev/mapper/cr_imap", expected)
    vm.wait_counters("/dev/inner/web", expected)
    assert lab.volume_states(vm) == {"cr_outer": "unlocked", "cr_imap": "unlocked"}
    assert lab.guest_states(vm) == {"imap": "running", "web": "running"}


def assert_closed(machine: Host, vm: Vm) -> None:
    """What the last shutdown of the host left behind."""
    journal = machine.journal_path(machine.boots).read_text()
    assert "volume cr_imap is closed" in journal
    assert "volume cr_outer is closed" in journal
    assert CLOSED_LOUDLY not in vm.console.transcript
    # A thief of the disk finds nothing of what the guest reads.
    assert guest.boot_sector() not in machine.disk_path(0).read_bytes()


def test_the_same_disks_again_and_again(machine: Host) -> None:
    """One answer at the console, a clean end, a power cut."""
    with boot_locked(machine) as vm:
        vm.console.expect(r"Passphrase for volume cr_outer \(.*\):")
        lab.type_secret(vm, lab.WRONG)
        vm.console.expect(r"That did not fit\. Passphrase for volume cr_outer")
        lab.type_secret(vm, lab.PASSPHRASE)
        vm.console.expect("login:")
        assert_running(vm, starts=1, clean_stops=0)
        assert json.loads(vm.run("vmcryptctl plan boot --json").out)["steps"] == []

        shown = json.loads(vm.run("vmcryptctl status --json").out)
        objects = lab.objects(vm)
        assert shown == lab.status(vm)
        for volume in shown["volumes"]:
            path = f"/org/vmcryptd1/volume/{volume['name'].replace('_', '_5f')}"
            properties = objects[path]["org.vmcryptd1.Volume"]
            assert properties["State"] == volume["state"]
            assert properties["Uuid"] == volume["uuid"]
            assert properties["NeededBy"] == volume["needed_by"]
            assert properties["KeySource"] == volume["key_source"] == "prompt"
        for domain in shown["guests"]:
            properties = objects[f"/org/vmcryptd1/guest/{domain['name']}"]["org.vmcryptd1.Guest"]
            assert properties["State"] == domain["state"]
            assert properties["Needs"] == domain["needs"]
            assert properties["StartsAtBoot"] is domain["starts_at_boot"] is True
        text = vm.run("vmcryptctl status").out
        assert all(name in text for name in ("ready", "cr_outer", "cr_imap", "imap", "web"))

        vm.power_button()
        assert vm.wait_off() == "guest-shutdown"
        assert_closed(machine, vm)

    with boot_locked(machine) as vm:
        vm.wait_unit("libvirt-guests.service")
        assert vm.run("ls /var/lib/libvirt/qemu/save").out == ""
        lab.wait_state(vm, "waiting")
        assert lab.unlock(vm, passphrase=lab.WRONG, check=False) == 3
        assert lab.volume_states(vm) == {"cr_outer": "waiting", "cr_imap": "locked"}
        assert lab.unlock(vm) == 0
        assert_running(vm, starts=2, clean_stops=1)
        vm.run("sync")  # what the guests have counted by now is not what is tested
        vm.power_cut()

    with boot_locked(machine) as vm:
        lab.wait_state(vm, "waiting")
        assert lab.unlock(vm) == 0
        assert_running(vm, starts=3, clean_stops=1)
        assert vm.reboot() == "guest-reset"
        assert_closed(machine, vm)


def test_nobody_at_the_console(machine: Host) -> None:
    with machine.resume() as vm:
        vm.run(f"sed -i 's/10min/3s/' {lab.CONFIG} && sync")
        vm.power_cut()
    with boot_locked(machine) as vm:
        vm.console.expect("login:")
        vm.wait_unit("ssh.service")
        lab.wait_state(vm, "waiting")
        vm.wait_until("grep -qx cr_outer /root/waited")
        assert lab.status(vm)["waiting"] == ["cr_outer"]
        assert vm.run("vmcryptctl wait --timeout 1s", check=False).code == 6
        assert vm.run("systemctl is-active vmcryptd.target", check=False).out == "inactive\n"

        vm.console.type("root\n")
        vm.console.expect(r"root@.*# ")
        vm.console.type("vmcryptctl unlock; echo exit=$?\n")
        vm.console.expect("Passphrase for (volume )?cr_outer.*:")
        lab.type_secret(vm, lab.PASSPHRASE)
        vm.console.expect("exit=0")
        assert_running(vm, starts=1, clean_stops=0)
        assert vm.run("vmcryptctl wait").code == 0

        # The daemon dies a second before: the way down is the same, without it.
        vm.run(
            "systemctl kill --kill-whom=main -s KILL vmcryptd.service; systemctl poweroff --no-block"
        )
        assert vm.wait_off() == "guest-shutdown"
        assert_closed(machine, vm)
