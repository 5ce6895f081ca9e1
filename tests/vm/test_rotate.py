# SPDX-License-Identifier: LGPL-2.1-or-later
"""A new volume key while a guest runs on the volume; and what comes in between: restarts, locks, power cuts."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Background, Snapshot, Vm
from tests.vm.lab import PASSPHRASE, Caller

SECOND = "canary-Zw7pQ4-second"
# What is to be found in the middle of it gets a slow disk: one piece of 16 MiB, read and written, takes ten seconds
# then, and whoever looks takes less, be the machine as busy as it may.
SLOW = 3 << 20  # bytes a second
CRAWLING = 1 << 20
FAST = 0  # as it comes
LONG_S = 300.0
MESSAGES = "/run/vmcryptd/reencrypt-cr_mail"
UNIT = "vmcryptd-reencrypt-cr_mail.service"
ROTATE = ["vmcryptctl", "key", "rotate", "cr_mail", "--key-file", "-"]
# Behind what the guest writes.
CONTENT = "dd if=/dev/mapper/cr_mail bs=1M skip=1 iflag=direct status=none | sha256sum"


@dataclass
class Site:
    """A host with one volume and a guest on it."""

    vm: Vm
    content: str

    @property
    def volume(self) -> dict[str, object]:
        return lab.volume(self.vm, "cr_mail")

    def speed(self, rate: int) -> None:
        """How fast the volume's disk is."""
        devices = self.vm.qmp.execute("query-block")
        assert isinstance(devices, list)
        [disk] = [one["qdev"] for one in devices
                  if one.get("inserted", {}).get("node-name") == "disk0"]  # fmt: skip
        others = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        self.vm.qmp.execute("block_set_io_throttle", id=disk, bps=rate, **others)

    def rotate(self, *options: str, rate: int = SLOW) -> Background:
        """In the middle of it, on a slow disk."""
        self.speed(rate)
        command = [*ROTATE, *options]
        rotating = self.vm.background(command, stdin=PASSPHRASE.encode(), timeout_s=LONG_S)
        self.moves()
        return rotating

    def moves(self) -> None:
        """Wait until data has moved, as the daemon tells it."""
        self.vm.wait_until("vmcryptctl status cr_mail | grep -q 'rotated: [1-9]'", LONG_S)
        assert self.volume["rotation"] == "running"

    def moves_the_rest(self) -> None:
        """Wait until all data has moved; cryptsetup has left to wipe what it needs no more, many times over."""
        self.vm.run("while dmsetup ls | grep -q hotzone; do :; done", timeout_s=LONG_S)
        assert self.vm.run(f"systemctl is-active '{UNIT}'").out == "active\n"

    def finish(self) -> None:
        """Go on with it to its end."""
        self.speed(FAST)
        self.vm.run(ROTATE, stdin=PASSPHRASE.encode(), timeout_s=LONG_S)
        assert self.volume["rotation"] == ""

    def is_whole(self) -> bool:
        self.speed(FAST)
        return self.vm.run(CONTENT, timeout_s=LONG_S).out == self.content


def header(vm: Vm) -> dict[str, Any]:
    metadata = vm.run(f"cryptsetup luksDump --dump-json-metadata {lab.disk(0)}").out
    found = json.loads(metadata)
    assert isinstance(found, dict)
    return found


def prepare(vm: Vm) -> str:
    """A volume with its guest; returns the sum of what is on it."""
    setup = lab.Lab(vm)
    setup.encrypted_guest("mail", lab.disk(0))
    setup.write_config()
    vm.run("systemctl restart vmcryptd")
    lab.unlock(vm, "cr_mail")
    vm.run(
        "dd if=/dev/urandom of=/dev/mapper/cr_mail bs=1M seek=1 oflag=direct status=none",
        check=False,
    )
    vm.run("sync")
    return vm.run(CONTENT).out


@dataclass(frozen=True)
class Prepared:
    snapshot: Snapshot
    content: str


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Prepared:
    with module_host(disks=["128M"]).resume() as vm:
        content = prepare(vm)
        return Prepared(vm.save(), content)


def came_up(vm: Vm, content: str, rotation: str) -> Site:
    """A boot whose question a person answers: the guest runs on what it had, with the rotation as far as that."""
    site = Site(vm, content)
    vm.wait_unit("vmcryptd.service")
    Caller(vm).question("Passphrase for volume cr_mail", PASSPHRASE, timeout_s=LONG_S)
    lab.wait_object(vm, "volume", "cr_mail", "unlocked", LONG_S)
    assert site.volume["rotation"] == rotation
    lab.wait_object(vm, "guest", "mail", "running", LONG_S)
    assert site.is_whole()
    return site


def test_a_guest_and_daemons_come_and_go_meanwhile(host: HostFactory, prepared: Prepared) -> None:
    with host(snapshot=prepared.snapshot).resume() as vm:
        site = Site(vm, prepared.content)
        vm.run("vmcryptctl header backup cr_mail /root/old")
        before = header(vm)
        vm.run("vmcryptctl start mail")
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(1, 0))
        pid = vm.run("systemctl show -P MainPID vmcryptd").out.strip()

        rotating = site.rotate()
        site.speed(CRAWLING)
        assert lab.guest_states(vm) == {"mail": "running"}
        assert "is being rotated" in vm.run("vmcryptctl status cr_mail").out
        worker = vm.run(f"systemctl show -P MainPID '{UNIT}'").out.strip()
        # Neither cryptsetup nor the daemon keeps the passphrase during the hours of work.
        for process in (pid, worker):
            assert lab.in_memory(vm, process, PASSPHRASE) == []
            assert lab.in_memory(vm, process, "cr_mail") != []
        refused = vm.run("vmcryptctl header backup cr_mail /root/half", check=False)
        assert (refused.code, "is being rotated" in refused.err) == (1, True)
        refused = vm.run("vmcryptctl lock cr_mail", check=False)
        assert (refused.code, "mail" in refused.err) == (1, True)

        # The daemon is killed. Neither the guest nor the rotation is its child.
        vm.run(f"kill -KILL {pid}")
        ended = rotating.wait(LONG_S, check=False)
        assert (ended.code, "goes on by itself" in ended.err) == (5, True)
        site.moves()
        vm.run("systemctl restart vmcryptd")
        site.moves()
        assert vm.run(f"systemctl show -P MainPID '{UNIT}'").out.strip() == worker
        again = vm.run(ROTATE, stdin=PASSPHRASE.encode(), check=False)
        assert (again.code, "is being rotated" in again.err) == (1, True), again.err

        # The guest writes to what is being written anew.
        vm.run("vmcryptctl stop mail && vmcryptctl start mail", timeout_s=LONG_S)
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(2, 1))
        assert site.is_whole()
        vm.wait_until(f"! systemctl is-active '{UNIT}'", LONG_S)
        vm.wait_until("! vmcryptctl status cr_mail | grep rotated")
        assert lab.guest_states(vm) == {"mail": "running"}
        assert site.is_whole()
        assert site.volume["header_backup_due"] is True

        # The volume key is another one: with the old header the data is noise.
        after = header(vm)
        [old], [new] = before["digests"].values(), after["digests"].values()
        assert old["digest"] != new["digest"]
        vm.run("vmcryptctl stop mail && vmcryptctl lock cr_mail && vmcryptctl unlock cr_mail --key-file -",
               stdin=PASSPHRASE.encode(), timeout_s=LONG_S)  # fmt: skip
        assert site.is_whole()
        vm.run("vmcryptctl header backup cr_mail /root/new && vmcryptctl lock cr_mail")
        for backup, is_right in (("/root/old", False), ("/root/new", True)):
            vm.run(
                f"cryptsetup open --readonly --key-file - --header {backup} {lab.disk(0)} cr_mail",
                stdin=PASSPHRASE.encode(),
            )
            assert site.is_whole() is is_right
            vm.run("cryptsetup close cr_mail")

        journal = vm.run("journalctl -b -o cat -u vmcryptd").out
        assert "volume cr_mail has a new volume key" in journal
        assert lab.in_files(vm, "/run /tmp /var/log /var/lib/vmcryptd", PASSPHRASE) == []
        assert vm.run(f"journalctl -b -o export | grep -c '{PASSPHRASE}'", check=False).out == "0\n"


@pytest.mark.long
def test_it_is_stopped_locked_killed_and_goes_on(host: HostFactory) -> None:
    # It is gone on with more than once, and each time some pieces of 16 MiB are done.
    with host(disks=["192M"]).resume() as vm:
        site = Site(vm, prepare(vm))
        device = lab.disk(0)
        vm.run(f"umask 77; printf {SECOND} >/run/second")
        vm.run(f"cryptsetup luksAddKey --batch-mode {lab.CHEAP} --key-file - {device} /run/second",
               stdin=PASSPHRASE.encode())  # fmt: skip
        vm.run(f"cryptsetup token import --token-id 3 {device}",
               stdin=b'{"type":"note","keyslots":["1"]}')  # fmt: skip
        vm.run(f"cryptsetup token import --token-id 4 {device}",
               stdin=b'{"type":"note","keyslots":["0"]}')  # fmt: skip
        refused = vm.run(ROTATE, stdin=PASSPHRASE.encode(), check=False)
        assert (refused.code, "key slot 1 (note)" in refused.err) == (1, True)

        # On purpose.
        rotating = site.rotate("--drop-others")
        vm.run("vmcryptctl key rotate --stop cr_mail", timeout_s=LONG_S)
        ended = rotating.wait(LONG_S, check=False)
        assert (ended.code, "`vmcryptctl key rotate cr_mail` goes on" in ended.err) == (1, True)
        assert site.volume["rotation"] == "unfinished"
        assert site.is_whole()
        for verb in ("key test cr_mail", "key add cr_mail --new-key-file /run/second"):
            refused = vm.run(
                f"vmcryptctl {verb} --key-file -", stdin=PASSPHRASE.encode(), check=False
            )
            assert (refused.code, "half rotated" in refused.err) == (1, True), verb
        wrong = vm.run("vmcryptctl key rotate cr_mail --key-file /run/second", check=False)
        assert wrong.code == 3, wrong.err

        # By closing the volume.
        rotating = site.rotate()
        vm.run("vmcryptctl lock cr_mail", timeout_s=LONG_S)
        assert rotating.wait(LONG_S, check=False).code == 1
        assert lab.mappings(vm) == []
        assert lab.unlock(vm, "cr_mail", passphrase=SECOND, check=False) == 3
        lab.unlock(vm, "cr_mail")
        assert site.is_whole()

        # By force: what it was at is suspended, and closing the volume is the way out.
        rotating = site.rotate()
        vm.run(f"systemctl kill --signal=KILL '{UNIT}'")
        ended = rotating.wait(LONG_S, check=False)
        assert (ended.code, "`vmcryptctl lock cr_mail`" in ended.err) == (1, True), ended.err
        vm.run("vmcryptctl lock cr_mail", timeout_s=LONG_S)
        assert vm.run("dmsetup ls").out.strip() == "No devices found"
        lab.unlock(vm, "cr_mail")
        assert site.is_whole()

        rotating = site.rotate()
        vm.run("vmcryptctl panic", timeout_s=LONG_S)
        assert rotating.wait(LONG_S, check=False).code == 1
        assert vm.run("dmsetup ls").out.strip() == "No devices found"
        lab.unlock(vm, "cr_mail")
        assert site.is_whole()

        site.finish()
        assert site.is_whole()
        found = header(vm)
        assert (len(found["keyslots"]), list(found["tokens"])) == (1, ["4"])

        # With nothing left to do but to say so; here cryptsetup would open it never again.
        rotating = site.rotate(rate=4 * SLOW)
        site.moves_the_rest()
        vm.run(f"systemctl kill --signal=KILL '{UNIT}'")
        rotating.wait(LONG_S)
        assert site.volume["rotation"] == ""
        assert site.is_whole()
        vm.run("vmcryptctl lock cr_mail", timeout_s=LONG_S)
        lab.unlock(vm, "cr_mail")
        assert site.is_whole()
        found = header(vm)
        assert (len(found["keyslots"]), list(found["tokens"])) == (1, ["4"])


@pytest.mark.long
def test_the_host_goes_down_meanwhile(host: HostFactory, prepared: Prepared) -> None:
    content = prepared.content
    machine = host(snapshot=prepared.snapshot)
    with machine.resume() as vm:
        vm.run("vmcryptctl start mail")
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(1, 0))
        Site(vm, content).rotate()
        assert vm.poweroff(LONG_S) == "guest-shutdown"
        assert "STILL OPEN" not in vm.console.transcript
    with machine.boot(wait=False) as vm:
        site = came_up(vm, content, "unfinished")
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(2, 1))
        site.rotate()
        vm.power_cut()
    with machine.boot(wait=False) as vm:
        site = came_up(vm, content, "unfinished")
        site.rotate()
        site.moves_the_rest()
        vm.power_cut()
    with machine.boot(wait=False) as vm:
        came_up(vm, content, "")
        assert lab.guest_states(vm) == {"mail": "running"}
        [number] = header(vm)["keyslots"]
        assert (
            f"key slot {number}"
            in vm.run("vmcryptctl key test cr_mail --key-file -", stdin=PASSPHRASE.encode()).out
        )
