# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way down without a daemon: typos, daemons that are dead, silent or just starting."""

from collections.abc import Iterator

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Snapshot, Vm
from tests.vm.lab import PASSPHRASE

TYPO = '\n[volume.cr_new]\ndevise = "/dev/vdz"\n'
PID = "systemctl show --value -p MainPID vmcryptd.service"


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """One guest that stops when it is asked, one that never does, and both run."""
    with module_host(disks=["64M"] * 2).resume() as vm:
        setup = lab.Lab(vm)
        vm.put("/etc/vmcryptd/keys/all", PASSPHRASE, 0o600)
        for index, name in enumerate(("imap", "deaf")):
            variant = guest.Variant.DEAF if name == "deaf" else guest.Variant.POLITE
            keys = ["file:/etc/vmcryptd/keys/all"]
            setup.encrypted_guest(name, lab.disk(index), variant=variant, keys=keys)
        setup.table("guest.deaf", {"stop_timeout": "10s"})
        setup.write_config(reload=True)
        vm.run("vmcryptctl boot")
        lab.wait_state(vm, "ready")
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
        return vm.save()


@pytest.fixture
def vm(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
    with host(snapshot=prepared).resume() as vm:
        yield vm


def assert_down(vm: Vm, clean_stops: int) -> None:
    """Everything is closed; the polite guest was asked to stop so often."""
    assert lab.mappings(vm) == []
    assert vm.run("virsh -q list --name").out.strip() == ""
    vm.run(
        "cryptsetup open --key-file - /dev/disk/by-id/virtio-disk0 look", stdin=PASSPHRASE.encode()
    )
    assert lab.counters(vm, "look") == guest.Counters(1, clean_stops)
    vm.run("udevadm settle; cryptsetup close look")


@pytest.mark.parametrize("verb", ["shutdown", "panic"])
def test_a_typo_while_the_daemon_is_down(vm: Vm, verb: str) -> None:
    vm.run("systemctl stop vmcryptd.service")
    vm.put(lab.CONFIG, vm.get(lab.CONFIG).decode() + TYPO)
    done = vm.run(f"vmcryptctl {verb}", check=False, timeout_s=300)
    assert done.code == 0, done
    assert "devise" in done.err
    assert "the last valid configuration is used" in done.err
    assert_down(vm, 1 if verb == "shutdown" else 0)


def test_a_typo_an_upgrade_and_the_power_button(vm: Vm) -> None:
    vm.put(lab.CONFIG, vm.get(lab.CONFIG).decode() + TYPO)
    # As an upgrade does, and then it does not come back.
    vm.run("systemctl restart vmcryptd.service", check=False)
    vm.wait_until("systemctl is-failed vmcryptd.service")
    assert vm.poweroff() == "guest-shutdown"
    assert "STILL OPEN" not in vm.console.transcript
    journal = vm.host.journal_path(vm.host.boots).read_text()
    assert "the last valid configuration is used" in journal
    assert "guest imap is stopped" in journal
    for name in ("cr_imap", "cr_deaf"):
        assert f"volume {name} is closed" in journal


def test_panic_does_not_wait_for_a_daemon_that_hangs(vm: Vm) -> None:
    daemon = vm.run(PID).out.strip()
    vm.run(f"kill -STOP {daemon}")
    done = vm.run("vmcryptctl panic", check=False, timeout_s=300)
    assert done.code == 0, done
    assert f"vmcryptd (pid {daemon}) runs, but does not answer" in done.err
    # systemd has started another one, which finds nothing open any more.
    vm.wait_unit("vmcryptd.service")
    assert vm.run(PID).out.strip() not in ("0", daemon)
    assert set(lab.volume_states(vm).values()) == {"locked"}
    assert_down(vm, 0)


def test_a_daemon_that_starts_waits_for_a_shutdown_without_it(vm: Vm) -> None:
    vm.run("systemctl stop vmcryptd.service")
    # Without a bus: a call on it would start the daemon, which would do the shutdown itself.
    stopping = vm.background("DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/no-bus vmcryptctl shutdown")
    vm.wait_until("grep -q 'vmcryptctl shutdown' /run/vmcryptd/lock")
    holder = vm.run("awk '{ print $3 }' /run/vmcryptd/lock").out.strip()
    vm.run(f"kill -STOP {holder}")  # until the daemon has come to the lock
    starting = vm.background("systemctl start vmcryptd.service")
    vm.wait_until(
        "systemctl show --value -p StatusText vmcryptd | grep -q 'Waiting for vmcryptctl shutdown'"
    )
    vm.run(f"kill -CONT {holder}")
    assert stopping.wait(300).code == 0
    assert starting.wait(300).code == 0
    assert set(lab.volume_states(vm).values()) == {"locked"}
    assert_down(vm, 1)
