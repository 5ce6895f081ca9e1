# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers and keys that come late, and a disk that does not answer: each waits alone, at rest, and opens at last."""

from collections.abc import Iterator

import pytest

from tests.vm import lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Snapshot, Vm

pytestmark = pytest.mark.long

DATA, STICK, KEYED, COPIED, SILENT, GOOD = range(6)
KEY = "/etc/vmcryptd/keys/good"
STATES = {
    "cr_header": "missing",
    "cr_key": "failed",
    "cr_copy": "failed",
    "cr_silent": "failed",
    "cr_good": "unlocked",
}


def _prepare(vm: Vm) -> None:
    setup = lab.Lab(vm)
    vm.put(KEY, lab.PASSPHRASE, 0o600)
    stick = lab.disk(STICK)
    vm.run(
        f"mkfs.ext4 -q {stick} && mkdir /stick && mount {stick} /stick && truncate -s 16M /stick/header"
    )
    vm.put("/stick/key", lab.PASSPHRASE, 0o600)
    setup.luks(lab.disk(DATA), header="/stick/header")
    vm.run(
        f"cryptsetup open --header /stick/header --key-file - {lab.disk(DATA)} cr_header",
        stdin=lab.PASSPHRASE.encode(),
    )
    setup.boot_sector("/dev/mapper/cr_header")
    setup.close("cr_header")
    setup.domain("imap", "/dev/mapper/cr_header")
    for index in (KEYED, COPIED, SILENT, GOOD):
        setup.luks(lab.disk(index))
    vm.run(
        f'umount /stick && dmsetup create disk --table "0 $(blockdev --getsz {lab.disk(SILENT)})'
        f' linear {lab.disk(SILENT)} 0" && udevadm settle'
    )
    vm.unplug_disk(STICK)
    key = [f"file:{KEY}"]
    setup.volume("cr_header", lab.disk(DATA), header="/stick/header", keys=key, timeout="1s")
    setup.volume("cr_key", lab.disk(KEYED), keys=["file:/stick/key"])
    setup.volume("cr_copy", lab.disk(COPIED), keys=["file:/root/keys/copy"])
    setup.volume("cr_silent", "/dev/mapper/disk", keys=key)
    setup.volume("cr_good", lab.disk(GOOD), keys=key)
    setup.write_config(reload=True)


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """A machine that was booted as far as it goes without the stick, and with a disk that gives no answer."""
    with module_host(disks=["32M"] * 6).resume() as vm:
        _prepare(vm)
        vm.run("dmsetup suspend --nolockfs --noflush disk && vmcryptctl boot")
        lab.wait_state(vm, "degraded")
        return vm.save()


@pytest.fixture
def vm(host: HostFactory, prepared: Snapshot) -> Iterator[Vm]:
    with host(snapshot=prepared).resume() as vm:
        yield vm


def test_each_waits_alone(vm: Vm) -> None:
    """And rests: each failure is logged once, also when another disk's event causes a new look at everything."""
    found = {one["name"]: one for one in lab.status(vm)["volumes"]}
    assert {name: one["state"] for name, one in found.items()} == STATES
    assert "its header /stick/header did not appear within 1 s" in found["cr_header"]["error"]
    assert "/stick/key is not there" in found["cr_key"]["error"]
    assert "/dev/mapper/disk has not answered within 10 s" in found["cr_silent"]["error"]
    vm.run(f"udevadm trigger --settle --name-match={lab.disk(GOOD)}")
    assert lab.volume_states(vm) == STATES
    log = vm.run("journalctl -b -u vmcryptd -o cat").out.splitlines()
    for words in (
        "volume cr_header: its header /stick/header did not appear",
        "volume cr_silent: /dev/mapper/disk has not answered",
        "volume cr_key: none of its key sources",
        "volume cr_copy: none of its key sources",
    ):
        assert len([line for line in log if line.startswith(words)]) == 1, (words, log)


def test_a_stick_comes(vm: Vm) -> None:
    vm.plug_disk(STICK)
    vm.wait_until(f"test -b {lab.disk(STICK)}")
    vm.run(f"mount {lab.disk(STICK)} /stick")
    lab.wait_object(vm, "volume", "cr_header", "unlocked")
    lab.wait_object(vm, "volume", "cr_key", "unlocked")
    lab.wait_object(vm, "guest", "imap", "running")
    assert lab.volume(vm, "cr_silent")["state"] == "failed"


def test_a_key_file_is_copied(vm: Vm) -> None:
    """Into a directory that is not there either; neither udev nor the mounts tell of it."""
    vm.run(f"mkdir -m 700 /root/keys && cp {KEY} /root/keys/copy")
    lab.wait_object(vm, "volume", "cr_copy", "unlocked")


def test_the_disk_answers(vm: Vm) -> None:
    vm.run("dmsetup resume disk")
    lab.wait_object(vm, "volume", "cr_silent", "unlocked")
