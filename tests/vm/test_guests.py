# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that must not start, die, are off, or that libvirt itself is starting; and libvirt that is away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Snapshot, Vm

pytestmark = pytest.mark.long

KEY = "/root/imap.key"
# QEMU, whose start the test holds up by a gate, and then has end as it writes into that. Not a hook: while one runs,
# libvirt answers no question about the guest. Nor the probes for what this QEMU can do, which name no guest.
EMULATOR = """#!/bin/sh
case "$*" in *guest=imap*)
    if [ -p /run/gate/pipe ]; then
        read -r code </run/gate/pipe
        rm /run/gate/pipe
        [ "$code" = 0 ] || exit "$code"
    fi
esac
exec /usr/bin/qemu-system-x86_64 "$@"
"""
LIBVIRTD = "libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket"


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """All is shut. A key file opens `cr_imap`; a person opens `cr_web`."""
    with module_host(disks=["64M", "64M"]).resume() as vm:
        vm.put(KEY, lab.PASSPHRASE, 0o600)
        setup = lab.Lab(vm)
        setup.encrypted_guest("imap", lab.disk(0), keys=[f"file:{KEY}"])
        setup.encrypted_guest("web", lab.disk(1), unlock="manual")
        vm.run("virsh -q autostart --disable web")
        setup.domain("raw", lab.disk(0), autostart=False)
        setup.domain("twin", "/dev/mapper/cr_imap", autostart=False)
        setup.table("guest.raw", {"needs": ["cr_imap"]})
        vm.put("/usr/local/bin/qemu-gate", EMULATOR, 0o755)
        vm.run(
            "virsh dumpxml --inactive imap | sed s,/usr/bin/qemu-system-x86_64,/usr/local/bin/qemu-gate,"
            " >/root/imap.xml && virsh -q define /root/imap.xml"
        )
        setup.write_config(reload=True)
        return vm.save()


@pytest.fixture
def vm(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
    with host(snapshot=prepared).resume() as vm:
        yield vm


@pytest.fixture(scope="module")
def booted(module_host: HostFactory, prepared: Snapshot) -> Snapshot:
    """The host is ready: `imap` runs."""
    with module_host(snapshot=prepared).resume() as vm:
        vm.run("vmcryptctl boot")
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
        lab.wait_state(vm, "ready")
        return vm.save()


@pytest.fixture
def ready(host: HostFactory, booted: Snapshot) -> Iterator[Vm]:
    with host(snapshot=booted).resume() as vm:
        yield vm


def test_a_guest_that_would_overwrite_a_header_or_a_disk_is_not_started(vm: Vm) -> None:
    header = vm.run(f"sha256sum {lab.disk(0)}").out
    lab.wait_object(vm, "guest", "raw", "off")
    done = vm.run("vmcryptctl start raw", check=False)
    assert done.code == 1
    assert f"guest raw was not started: its disk {lab.disk(0)} (/dev/vd" in done.err
    assert "is the LUKS device of volume cr_imap" in done.err
    assert "`virsh edit raw`" in done.err
    assert vm.run(f"sha256sum {lab.disk(0)}").out == header
    # At boot, too.
    config = vm.get(lab.CONFIG).decode()
    vm.put(lab.CONFIG, config.replace("[guest.raw]", '[guest.raw]\nstart = "always"'))
    vm.run("vmcryptctl reload && vmcryptctl boot")
    lab.wait_state(vm, "degraded")
    vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
    assert "is the LUKS device of volume cr_imap" in vm.run("vmcryptctl wait", check=False).err
    assert lab.guest_states(vm)["raw"] == "off"

    done = vm.run("vmcryptctl start twin", check=False)
    assert done.code == 1
    assert "guest twin was not started: guest imap, which runs, writes its disk" in done.err
    assert vm.run("virsh domstate twin").out.strip() == "shut off"


def test_a_start_under_way_that_fails_is_followed_by_ours(vm: Vm) -> None:
    """As libvirt's own autostart may be when boot is asked for; here it is another client's, which can be held up."""
    lab.unlock(vm, "cr_imap")
    # QEMU is an ordinary user, and opens the gate once.
    vm.run("mkdir -m 777 /run/gate && mkfifo -m 666 /run/gate/pipe")
    starting = vm.background("virsh -q start imap")
    vm.wait_until("virsh domstate --reason imap | grep -q 'starting up'")
    vm.run("vmcryptctl boot")
    lab.wait_object(vm, "guest", "imap", "starting")
    assert lab.status(vm)["state"] == "unlocking"
    vm.run("echo 1 >/run/gate/pipe")
    assert starting.wait(check=False).code == 1
    vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
    lab.wait_state(vm, "ready")
    assert lab.guest_states(vm)["imap"] == "running"


def test_a_guest_that_is_killed_makes_the_host_degraded(ready: Vm) -> None:
    ready.run("kill -9 $(cat /run/libvirt/qemu/imap.pid)")
    lab.wait_state(ready, "degraded")
    shown = lab.status(ready)
    [error] = [one["error"] for one in shown["guests"] if one["name"] == "imap"]
    assert error.startswith("guest imap died: its process ended without a shutdown")
    assert shown["off"] == ["imap"]
    done = ready.run("vmcryptctl wait", check=False)
    assert (done.code, "guest imap died" in done.err) == (1, True)
    # Neither a restart of the daemon nor of libvirt makes that well.
    ready.run("systemctl restart vmcryptd.service")
    lab.wait_state(ready, "degraded")
    ready.run("vmcryptctl start imap")
    lab.wait_state(ready, "ready")
    assert lab.status(ready)["off"] == []


def test_a_guest_that_is_shut_down_is_named_and_the_host_stays_ready(ready: Vm) -> None:
    ready.run("vmcryptctl wait --all")
    ready.run("virsh -q shutdown imap")
    lab.wait_object(ready, "guest", "imap", "off")
    shown = lab.status(ready)
    assert (shown["state"], shown["off"]) == ("ready", ["imap"])
    ready.run("vmcryptctl wait")
    done = ready.run("vmcryptctl wait --all", check=False)
    assert (done.code, "off: imap" in done.err) == (1, True)
    assert "\n    off: imap\n" in ready.run("vmcryptctl status").out


def test_libvirt_that_stays_away_is_reported(ready: Vm) -> None:
    ready.run(f"systemctl stop {LIBVIRTD}")
    lab.wait_state(ready, "degraded")
    shown = lab.status(ready)
    assert shown["error"].startswith("libvirt at qemu:///system cannot be reached: ")
    assert lab.guest_states(ready)["imap"] == "running"
    assert "libvirt at qemu:///system cannot be reached" in ready.run("vmcryptctl status").out
    ready.run("systemctl start libvirtd.socket")
    lab.wait_state(ready, "ready")
    assert lab.status(ready)["error"] == ""


def test_autostart_once_outlives_libvirts_own_attempt(
    host: HostFactory, prepared: Snapshot
) -> None:
    with host(snapshot=prepared).resume() as vm:
        vm.run("virsh -q autostart --once web && virsh -q autostart --disable imap")
        config = vm.get(lab.CONFIG).decode()
        vm.put(lab.CONFIG, config.replace('unlock = "manual"', 'unlock = "boot"'))
        vm.run("vmcryptctl reload")
        vm.wait_until("grep -q web /var/lib/vmcryptd/once.json")
        vm.poweroff()
    with vm.host.boot() as vm:
        vm.wait_until("test -e /run/libvirt/qemu/autostarted")
        assert vm.run("virsh dominfo web | grep -i once").out.split()[-1] == "disable"
        lab.unlock(vm, "cr_web")
        vm.wait_counters("/dev/mapper/cr_web", guest.Counters(1, 0))
        lab.wait_state(vm, "ready")
        assert lab.guest_states(vm)["web"] == "running"
