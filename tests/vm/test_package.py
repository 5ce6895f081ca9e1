# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package on a host that has it: installed, upgraded, removed and purged, while a guest runs.

All tests but the first begin with the same machine, on which a guest runs.
"""

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory, current_package
from tests.vm.host import Snapshot, Vm
from tests.vm.lab import PASSPHRASE

GUEST, VOLUME = "imap", "cr_imap"
KEY = "/etc/vmcryptd/keys/imap"
# Not called as the package: nothing of that name is to be left in the end.
NEWER = "/root/newer.deb"
ENABLED = "vmcryptd.service vmcryptd-guests.service vmcryptd-console.service"
STATIC = "vmcryptd-ready.service vmcryptd.target"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The package once more, with a higher version."""
    directory = tmp_path_factory.mktemp("newer")
    tree, built = directory / "tree", directory / "newer.deb"
    package = current_package()
    assert package
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    text, count = re.subn("(?m)^Version: .*", r"\g<0>+newer", control.read_text())
    assert count == 1
    control.write_text(text)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, built], check=True)
    return built.read_bytes()


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory, newer: bytes) -> Snapshot:
    """A guest runs on a volume whose key is a file, so that no person has to answer."""
    with module_host(disks=["64M"]).resume() as vm:
        setup = lab.Lab(vm)
        setup.encrypted_guest(GUEST, lab.disk(0), keys=[f"file:{KEY}"])
        vm.put(KEY, PASSPHRASE, 0o600)
        vm.put(NEWER, newer)
        setup.write_config("# What the administrator has written.\n", reload=True)
        # When the host booted there was nothing to open.
        vm.run("vmcryptctl boot")
        assert_up(vm)
        return vm.save()


@pytest.fixture
def up(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
    with host(snapshot=prepared).resume() as vm:
        yield vm


def assert_up(vm: Vm) -> None:
    lab.wait_state(vm, "ready")
    vm.wait_unit("vmcryptd.target")
    status = lab.status(vm)
    assert [(volume["name"], volume["state"]) for volume in status["volumes"]] == [
        (VOLUME, "unlocked")
    ]
    assert [(domain["name"], domain["state"]) for domain in status["guests"]] == [
        (GUEST, "running")
    ]
    assert not status["waiting"]
    # The guest counts its start when it gets to run.
    vm.wait_until(f"[ $(od -An -tu4 -j512 -N4 /dev/mapper/{VOLUME}) -gt 0 ]")


def dpkg(vm: Vm, *words: str) -> str:
    """What dpkg and the package's scripts say. Nobody is there to be asked."""
    return vm.run(f"dpkg {' '.join(words)} 2>&1 </dev/null").out


def running(vm: Vm) -> str:
    """The guest and its volume: while this is the same, nothing was stopped or closed."""
    seen = vm.run(
        # The process and when it was started.
        f"cut -d ' ' -f 1,2,22 /proc/$(cat /run/libvirt/qemu/{GUEST}.pid)/stat"
        f" && dmsetup info {VOLUME} && dmsetup table {VOLUME}"
    )
    return f"{seen.out}\n{lab.counters(vm, VOLUME)}"


def configuration(vm: Vm) -> str:
    return vm.run("find /etc/vmcryptd -type f -exec stat -c '%a %n' {} + -exec sha256sum {} +").out


def units(vm: Vm) -> str:
    """When those that stop or start something were started and stopped."""
    return vm.run(
        "systemctl show -p Id,ActiveState,ActiveEnterTimestampMonotonic,InactiveEnterTimestampMonotonic"
        f" vmcryptd-guests.service vmcryptd-console.service {STATIC}"
    ).out


def main_pid(vm: Vm) -> int:
    return int(vm.run("systemctl show --value -p MainPID vmcryptd.service").out)


def assert_no_unit_is_left(vm: Vm) -> None:
    assert vm.run("systemctl list-units --no-legend --plain 'vmcryptd*'").out == ""
    assert vm.run("systemctl is-system-running").out == "running\n"
    assert "vmcryptd" not in vm.run("busctl list --no-legend").out
    vm.run("! pgrep -x 'vmcryptd|vmcryptctl'")


def completions(vm: Vm, *lines: str) -> list[list[str]]:
    """What bash offers for the last word of each of these command lines."""
    script = """
        source /usr/share/bash-completion/completions/vmcryptctl
        for line; do
            COMP_WORDS=(vmcryptctl) COMPREPLY=()
            while read -r word; do COMP_WORDS+=("$word"); done <<<"${line// /$'\\n'}"
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _vmcryptctl
            echo "${COMPREPLY[@]}"
        done
    """
    return [line.split() for line in vm.run(["bash", "-c", script, "", *lines]).out.splitlines()]


def test_installed_and_nothing_configured(host: HostFactory) -> None:
    """As installing has left it, and a boot."""
    with host().resume() as vm:
        assert_nothing_configured(vm)


def assert_nothing_configured(vm: Vm) -> None:
    # No job of the boot is left that waits for anything, and no unit has failed.
    assert vm.wait_booted() == "running"
    assert "Passphrase" not in vm.console.transcript
    enabled = vm.run(f"systemctl is-enabled {ENABLED} {STATIC}").out.split()
    assert enabled == ["enabled"] * 3 + ["static"] * 2
    assert vm.run(f"systemctl is-active {ENABLED}").out.split() == ["active"] * 3
    assert vm.run("journalctl -q -b -p warning -u 'vmcryptd*'").out == ""

    status = lab.status(vm)
    assert status["state"] == "ready"
    assert not any(status[name] for name in ("waiting", "volumes", "guests"))
    assert "ready" in vm.run("vmcryptctl status").out
    assert "no volume is configured" in vm.run("vmcryptctl check").out

    # The image has no manual pages; whether there are some is lintian's matter.
    verify = "systemd-analyze verify --man=no --recursive-errors=no"
    verified = vm.run(f"{verify} /usr/lib/systemd/system/vmcryptd*")
    assert (verified.out, verified.err) == ("", "")


def test_completion_knows_what_is_there(up: Vm) -> None:
    verbs, *names = completions(up, "", "lock ", "stop i", "status ", "plan unlock : cr", "stop x")
    assert {"status", "unlock", "panic"} <= set(verbs)
    assert "_names" not in verbs
    assert names == [[VOLUME], [GUEST], [VOLUME, GUEST], [VOLUME], []]


def test_an_upgrade_restarts_only_the_daemon(up: Vm) -> None:
    before = running(up), configuration(up), units(up)
    daemon = main_pid(up)
    dpkg(up, "--install", NEWER)
    assert up.run("dpkg-query -W -f '${Version}' vmcryptd").out.endswith("+newer")
    assert main_pid(up) not in (0, daemon)
    assert_up(up)
    assert (running(up), configuration(up), units(up)) == before
    assert up.run("systemctl is-system-running").out == "running\n"


def test_removed_and_installed_again_under_a_running_guest(up: Vm) -> None:
    before = running(up), configuration(up)
    # A keystore that is mounted below the daemon's own directory: its files are the keys of volumes.
    mounted = "/run/vmcryptd/keystore/keys"
    up.run(
        f"mkdir -p {mounted} && mount -t tmpfs none {mounted} && echo precious >{mounted}/goals.json"
    )
    said = dpkg(up, "--remove vmcryptd")
    assert f"running guests and open volumes are left as they are. Open: {VOLUME}" in said
    assert "/run/vmcryptd is left, something else is in it" in said
    assert up.run(f"cat {mounted}/goals.json").out == "precious\n"
    assert (running(up), configuration(up)) == before
    assert_no_unit_is_left(up)
    assert up.run("find /run/vmcryptd -xdev -not -type d").out == ""
    up.run(f"umount {mounted} && cd /run && rmdir -p vmcryptd/keystore/keys")

    dpkg(up, "--install", NEWER)
    assert_up(up)
    assert (running(up), configuration(up)) == before
    # If it were not active, the guest would not be stopped when the host goes down.
    up.run("systemctl is-active vmcryptd-guests.service")


def test_an_upgrade_boots_nothing_that_was_shut_down(up: Vm) -> None:
    before = lab.counters(up, VOLUME)
    up.run("systemctl stop vmcryptd-guests.service")
    assert lab.mappings(up) == []
    daemon = main_pid(up)
    dpkg(up, "--install", NEWER)
    assert main_pid(up) not in (0, daemon)
    guests = up.run("systemctl is-active vmcryptd-guests.service", check=False)
    assert guests.out == "inactive\n"
    assert lab.volume_states(up) == {VOLUME: "locked"}
    assert lab.guest_states(up) == {GUEST: "off"}

    up.run("systemctl start vmcryptd-guests.service")
    expected = guest.Counters(before.starts + 1, before.clean_stops + 1)
    up.wait_counters(f"/dev/mapper/{VOLUME}", expected)


def test_purged_under_a_running_guest(up: Vm) -> None:
    before = running(up)
    dpkg(up, "--purge vmcryptd")
    assert running(up) == before
    assert_no_unit_is_left(up)
    left = up.run("find / /run -xdev -name '*vmcrypt*' -print -prune").out
    # Without its key the volume could never be opened again: that is the administrator's to delete.
    assert left.split() == ["/etc/vmcryptd"]
    assert up.run("find /etc/vmcryptd -not -type d").out.split() == [KEY]
