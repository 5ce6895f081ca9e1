# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test host itself: what the other tests in this folder stand on."""

import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.vm import guest
from tests.vm.host import CommandError, Console, Host, Image, Vm, VmError, _Control, build_image

MAPPING = "/dev/mapper/cr_guest"
PASSPHRASE = b"correct horse"
FORMAT = (
    "cryptsetup luksFormat --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
    " /dev/disk/by-id/virtio-disk0 -"
)
OPEN = "cryptsetup open --key-file - /dev/disk/by-id/virtio-disk0 cr_guest"


@pytest.fixture(scope="session")
def image() -> Image:
    """Without the package: when these tests fail, it is the test host's own fault."""
    return build_image()


@pytest.fixture(scope="module")
def vm(module_host: Callable[..., Host]) -> Iterator[Vm]:
    with module_host(disks=["64M", "64M"], plugged=[0]).boot() as vm:
        yield vm


@pytest.mark.parametrize(
    ("console", "control", "comes_up"),
    [
        (b"[ 23.5] rcu: rcu_preempt kthread timer wakeup didn't happen for 5251 jiffies!\r\n", b"", False),
        (b"[  1.0] Freeing unused kernel memory\r\n", b'{"boot_id": "one"}\n', True),
    ],
    ids=["a lost timer", "a boot"],
)  # fmt: skip
def test_a_machine_whose_emulation_has_failed_is_reported(
    console: bytes, control: bytes, comes_up: bool
) -> None:
    machine = Vm.__new__(Vm)
    ends = [socket.socketpair() for _ in range(2)]
    machine.console = Console(ends[0][0])
    machine._control = _Control(ends[1][0])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        machine._process = process
        for (_, end), said in zip(ends, (console, control), strict=True):
            end.sendall(said)
        assert machine.comes_up() is comes_up
    for _, end in ends:
        end.close()


def test_every_unit_of_the_image_starts(vm: Vm) -> None:
    assert vm.wait_booted() == "running"


def test_commands(vm: Vm) -> None:
    assert vm.run("cat; echo oops >&2; exit 3", stdin=b"in\0put", check=False).code == 3
    result = vm.run("cat; echo oops >&2", stdin=b"in\0put")
    assert (result.out, result.err) == ("in\0put", "oops\n")
    with pytest.raises(CommandError, match="exit status 1"):
        vm.run("false")
    assert vm.run("sleep infinity", timeout_s=1, check=False).code == 124
    assert vm.run(["/no/such/program"], check=False).code == 127


def test_commands_run_side_by_side(vm: Vm) -> None:
    vm.run("mkfifo /run/meeting")
    reader = vm.background("cat /run/meeting")
    vm.run("echo hello >/run/meeting")
    assert reader.wait().out == "hello\n"


def test_a_background_command_takes_signals(vm: Vm) -> None:
    job = vm.background("sleep infinity")
    assert job.running
    job.signal()
    assert job.wait(check=False).code == -15


def test_files(vm: Vm) -> None:
    content = bytes(range(256)) * 4096
    vm.put("/run/deep/er/file name", content, 0o600)
    assert vm.get("/run/deep/er/file name") == content
    assert vm.run("stat -c %a '/run/deep/er/file name'").out == "600\n"


def test_console_login(vm: Vm) -> None:
    vm.console.expect("login: ")
    vm.console.type("root\n")
    vm.console.expect("# ")
    vm.console.type("echo $((6 * 7)) answers\n")
    vm.console.expect("42 answers")
    vm.console.type("exit\n")
    vm.console.expect("login: ")


def test_a_disk_comes_and_goes(vm: Vm) -> None:
    device = vm.plug_disk(1)
    vm.wait_until(f"test -b {device}")
    vm.run(f"echo kept | dd of={device} conv=fsync")
    assert vm.host.disk_path(1).read_bytes().startswith(b"kept\n")
    vm.unplug_disk(1)
    vm.wait_until(f"! test -e {device}")


def test_waiting_for_a_unit(vm: Vm) -> None:
    vm.run("systemd-run --unit=late sh -c 'sleep 1'")
    vm.wait_unit("late.service", "inactive")
    vm.wait_unit("libvirtd.socket")


@pytest.mark.long
def test_one_machine_is_switched_on_twice(host: Callable[..., Host]) -> None:
    """It takes commands long before its boot is complete; what was synced stays, and so do the guest's counters."""
    machine = host(disks=["64M", "64M"])
    with machine.boot(wait=False) as vm:
        early = vm.run("systemctl is-system-running", check=False).out
        assert early in ("initializing\n", "starting\n")
        assert vm.wait_booted() == "running"
        vm.run("echo synced >/root/file && sync && echo raw >/dev/disk/by-id/virtio-disk1")
        vm.run("sync /dev/disk/by-id/virtio-disk1")
        vm.run(FORMAT, stdin=PASSPHRASE)
        vm.run(OPEN, stdin=PASSPHRASE)
        vm.run(f"cat >{MAPPING}", stdin=guest.disk_image())
        vm.put("/root/guest.xml", guest.domain_xml("guest", MAPPING))
        vm.run("virsh define /root/guest.xml && virsh start guest")
        vm.wait_counters(MAPPING, guest.Counters(1, 0))
        vm.run("virsh shutdown guest")
        vm.wait_until("virsh domstate guest | grep -q 'shut off'")
        assert vm.read_counters(MAPPING) == guest.Counters(1, 1)
        vm.run("sync")
        vm.power_cut()
        assert not vm.on
    assert guest.boot_sector() not in machine.disk_path(0).read_bytes()
    with machine.boot() as vm:
        assert vm.get("/root/file") == b"synced\n"
        assert vm.run("head -c 3 /dev/disk/by-id/virtio-disk1").out == "raw"
        vm.run(OPEN, stdin=PASSPHRASE)
        vm.run("virsh start guest")
        vm.wait_counters(MAPPING, guest.Counters(2, 1))
        assert vm.reboot() == "guest-reset"


def test_a_machine_goes_on_from_where_it_was_saved(host: Callable[..., Host]) -> None:
    """With what runs in it, and as often as wanted; none of those that go on sees what another did."""
    with host(disks=["64M", "64M"], plugged=[1]).resume() as vm:
        assert vm.wait_booted() == "running"
        boot_id = vm.get("/proc/sys/kernel/random/boot_id")
        device = vm.plug_disk(0)
        vm.wait_until(f"test -b {device}")
        vm.run(FORMAT, stdin=PASSPHRASE)
        vm.run(OPEN, stdin=PASSPHRASE)
        vm.run(f"echo saved >/root/file; echo saved | dd of={MAPPING} conv=fsync status=none")
        vm.run("echo saved >/dev/ttyS0")
        vm.console.expect("saved")
        vm.background("echo $$ >/run/pid; exec sleep infinity")
        vm.wait_until("pgrep -x sleep")
        kept = vm.save()
        assert not vm.on
    for _ in range(2):
        with host(snapshot=kept).resume() as vm:
            assert vm.get("/proc/sys/kernel/random/boot_id") == boot_id
            assert vm.get("/root/file") == b"saved\n"
            assert vm.run(f"head -c 5 {MAPPING}").out == "saved"
            vm.run("kill -0 $(cat /run/pid)")
            vm.run(f"echo other >/root/file; echo other | dd of={MAPPING} conv=fsync status=none")
            vm.run("sync; echo other >/dev/ttyS0")
            vm.console.expect("other")
            assert "saved" in vm.console.transcript
            with pytest.raises(VmError, match="not any more"):
                vm.host.resume()
            vm.unplug_disk(1)


def test_a_deaf_guest_does_not_hear_the_button(vm: Vm) -> None:
    vm.put("/var/lib/libvirt/images/deaf.img", guest.disk_image(guest.Variant.DEAF))
    vm.run("truncate -s 1M /var/lib/libvirt/images/deaf.img")
    disk = "/var/lib/libvirt/images/deaf.img"
    vm.put("/root/deaf.xml", guest.domain_xml("deaf", disk, kind="raw"))
    vm.run("virsh create /root/deaf.xml")
    vm.wait_counters(disk, guest.Counters(1, 0))
    vm.run("virsh shutdown deaf")
    # Ten times what the polite one takes.
    vm.run("sleep 2; virsh domstate deaf | grep -q running && virsh destroy deaf")
    assert vm.read_counters(disk) == guest.Counters(1, 0)


def test_the_power_button_shuts_down_cleanly(vm: Vm) -> None:
    vm.power_button()
    assert vm.wait_off() == "guest-shutdown"
    assert "Reached target poweroff.target" in vm.host.journal_path(1).read_text()
