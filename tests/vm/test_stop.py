# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way down when something resists it: deaf guests, dead daemons, holders of mappings."""

from collections.abc import Iterator

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Snapshot, Vm

NAMES = ("polite", "deaf", "left")


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """Up, with one guest that stops, one that is killed for not stopping, one that is left; and a file system."""
    with module_host(disks=["64M"] * 4).resume() as vm:
        setup = lab.Lab(vm)
        for index, name in enumerate(NAMES):
            variant = guest.Variant.POLITE if name == "polite" else guest.Variant.DEAF
            setup.encrypted_guest(name, lab.disk(index), variant=variant)
        setup.table("guest.deaf", {"stop_timeout": "2s"})
        setup.table("guest.left", {"stop_timeout": "2s", "on_stop_timeout": "leave"})
        setup.luks(lab.disk(3))
        vm.run(f"mke2fs -q {setup.open(lab.disk(3), 'cr_fs')}")
        setup.close("cr_fs")
        setup.volume("cr_fs", lab.disk(3), content="filesystem", mount="/srv/fs")
        setup.write_config(reload=True)
        vm.run("vmcryptctl boot")
        lab.wait_state(vm, "waiting")
        assert lab.unlock(vm) == 0
        lab.wait_state(vm, "ready")
        assert set(lab.guest_states(vm).values()) == {"running"}
        vm.run("mountpoint -q /srv/fs")
        vm.wait_counters("/dev/mapper/cr_polite", guest.Counters(1, 0))
        return vm.save()


@pytest.fixture
def up(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
    """Everything is open and runs."""
    with host(snapshot=prepared).resume() as vm:
        yield vm


def test_deaf_guests_and_the_others(up: Vm) -> None:
    done = up.run("vmcryptctl shutdown", check=False)
    assert done.code == 1
    assert "left" in done.err
    assert "left running" in done.err
    assert lab.guest_states(up) == {"polite": "off", "deaf": "off", "left": "running"}
    # What it holds stays, all else is closed.
    assert lab.mappings(up) == ["cr_left"]
    up.run("! mountpoint -q /srv/fs")
    journal = up.run("journalctl -b -u vmcryptd.service").out
    assert "guest deaf did not stop within 2 s: it is killed now" in journal
    # What `on_stop_timeout = "leave"` left is the administrator's to end.
    up.run("virsh -q destroy left")
    up.wait_until("vmcryptctl lock cr_left")
    assert lab.mappings(up) == []

    up.run("vmcryptctl boot")
    lab.wait_state(up, "waiting")
    assert lab.unlock(up) == 0
    lab.wait_state(up, "ready")
    up.wait_counters("/dev/mapper/cr_polite", guest.Counters(2, 1))


def test_one_guest_and_one_volume_at_a_time(up: Vm) -> None:
    refused = up.run("vmcryptctl lock cr_deaf", check=False)
    assert refused.code == 1
    assert "in use by guest deaf" in refused.err
    up.run("vmcryptctl stop deaf")
    up.run("vmcryptctl lock cr_deaf")
    assert "cr_deaf" not in lab.mappings(up)


def test_holders_are_named(up: Vm) -> None:
    up.run("vmcryptctl stop polite")
    holder = up.background("exec 3</dev/mapper/cr_polite; exec tail -f /dev/null")
    up.wait_until("pgrep -x tail")
    refused = up.run("vmcryptctl lock cr_polite", check=False)
    assert refused.code == 1
    assert "tail" in refused.err
    assert "cr_polite" in lab.mappings(up)
    holder.signal()
    holder.wait(check=False)

    busy = up.background("cd /srv/fs; exec tail -f /dev/null")
    up.wait_until("pgrep -x tail")
    refused = up.run("vmcryptctl lock cr_fs", check=False)
    assert refused.code == 1
    assert "tail" in refused.err
    busy.signal()
    busy.wait(check=False)
    up.run("vmcryptctl lock cr_polite cr_fs")
    assert not {"cr_polite", "cr_fs"} & set(lab.mappings(up))


@pytest.mark.parametrize(
    ("kill", "revive"),
    [
        (
            (
                "systemctl mask --runtime vmcryptd; systemctl kill -s KILL vmcryptd;"
                " systemctl stop vmcryptd"
            ),
            "systemctl unmask --runtime vmcryptd; systemctl start vmcryptd",
        ),
        # As hard as it gets: the bus accepts connections, and never answers. The daemon lives, and cannot be reached:
        # it is killed, because two at a time would open what the other closes.
        ("pkill -STOP -x dbus-daemon", "pkill -CONT -x dbus-daemon"),
    ],
    ids=["daemon", "bus"],
)
def test_without_daemon_or_bus(up: Vm, kill: str, revive: str) -> None:
    up.run(kill)
    done = up.run("vmcryptctl shutdown", check=False, timeout_s=600)
    left = lab.mappings(up)
    up.run(revive)
    assert left == ["cr_left"], done
    assert done.code == 1
    assert "left running" in done.err
    lab.wait_state(up, "locked")


def test_the_daemon_is_killed_while_it_stops_guests(up: Vm) -> None:
    watching = lab.Caller(up)
    stopping = up.background("vmcryptctl shutdown")
    watching.wait("guest", "deaf", "stopping")
    up.run("systemctl kill -s KILL vmcryptd")
    done = stopping.wait(check=False)
    assert lab.mappings(up) == ["cr_left"], done
    assert done.code == 1
    assert "left running" in done.err
    lab.wait_state(up, "locked")


def test_without_udev(up: Vm) -> None:
    units = "systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service"
    up.run(f"systemctl stop {units}")
    done = up.run("vmcryptctl shutdown", check=False, timeout_s=300)
    left = lab.mappings(up)
    up.run(f"systemctl start {units}")
    assert left == ["cr_left"], done
    assert "left running" in done.err
    lab.wait_state(up, "locked")


def key_in_kernel(vm: Vm) -> str:
    """The volume key of cr_fs, or where the kernel keeps it."""
    return vm.run("dmsetup table --showkeys cr_fs").out.split()[4]


def test_panic(up: Vm) -> None:
    assert set(key_in_kernel(up)) - {"0"}
    busy = up.background("cd /srv/fs; exec tail -f /dev/null")
    up.wait_until("pgrep -x tail")
    done = up.run("vmcryptctl panic", check=False)
    assert done.code == 1
    assert "cr_fs" in done.err
    assert set(lab.guest_states(up).values()) == {"off"}
    # The one that could not be closed has no key any more: reading and writing block.
    assert lab.mappings(up) == ["cr_fs"]
    assert lab.volume_states(up)["cr_fs"] == "suspended"
    assert not set(key_in_kernel(up)) - {"0"}
    busy.signal(9)
    assert lab.unlock(up, "cr_fs") == 0
    assert lab.volume_states(up)["cr_fs"] == "unlocked"
    up.run("ls /srv/fs")
    busy.wait(check=False)
    up.run("vmcryptctl lock cr_fs")
    assert lab.mappings(up) == []


def test_a_guest_that_is_left_does_not_keep_the_host_on(up: Vm) -> None:
    """The host is off after it. What is left ends with everything else, and the console has said so."""
    # libvirt's own unit tries it after us, with its own patience.
    up.put("/etc/default/libvirt-guests", "ON_SHUTDOWN=shutdown\nSHUTDOWN_TIMEOUT=2\n")
    assert up.poweroff() == "guest-shutdown"
    said = " ".join(up.console.transcript.split())
    assert "guest left did not stop within 2 s and is left running" in said
    assert "left: stopping" in said
