# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keystores and the verbs that change keys, as an administrator uses them: typed, rebooted, lost, killed in the middle.

Keystores are made at a terminal, and the host boots by one of them. From there each test goes its own way.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import Host, Snapshot, Vm
from tests.vm.lab import PASSPHRASE, WRONG, Caller

CANARY = "canary-Zw7pQ4"
CONTROL = "control-Yk3mT8"  # what is planted to be found
STORE, OTHER, LAST = (f"{CANARY}-{which}" for which in ("keystore", "other", "last"))

FILE = "/var/lib/keys.luks"
MOUNT = "/run/vmcryptd-keystore"
BEHIND = {"cr_mail": 0, "cr_web": 1, "cr_data": 2}  # volume → index of its disk
LATE, GROUP, SWAP = 3, 4, 5  # indexes of disks; the first is plugged in by a test
CR_DATA_SOURCE = f"file:{MOUNT}/keys/cr_data.key"
HEADER = "/root/cr_data.header"
SLOW_S = 300.0

# In the place of cryptsetup: an action that a test wants held has begun, or ended, when /run/held is there.
HOLDING = """\
#!/bin/bash
read -r when action </run/hold
if [ "$1" = "$action" ]; then
    [ "$when" = before ] || /usr/local/lib/cryptsetup "$@" || exit
    touch /run/held
    exec sleep infinity
fi
exec /usr/local/lib/cryptsetup "$@"
"""


@dataclass
class Site:
    host: Host
    vm: Vm
    person: Caller

    def volume(self, name: str) -> dict[str, Any]:
        return lab.volume(self.vm, name)

    def sources(self) -> dict[str, str]:
        """Of what is open."""
        volumes = lab.status(self.vm)["volumes"]
        return {one["name"]: one["key_source"] for one in volumes if one["state"] == "unlocked"}

    def slots(self, name: str) -> dict[int, dict[str, Any]]:
        listed = json.loads(self.vm.run(["vmcryptctl", "key", "list", name, "--json"]).out)
        return {slot["slot"]: slot for slot in listed["slots"]}

    def opens(self, volume: str, key: str) -> bool:
        """Whether a key opens a volume: what cryptsetup itself says."""
        command = f"cryptsetup open --test-passphrase --key-file - {lab.disk(BEHIND[volume])}"
        code = self.vm.run(command, stdin=key.encode(), check=False).code
        assert code in (0, 2), code
        return code == 0

    def put_keys(self, **keys: str) -> None:
        for name, key in keys.items():
            self.vm.put(f"/run/keys/{name}", key, 0o600)

    def log_in(self) -> None:
        self.vm.console.expect("login: ", SLOW_S)
        self.vm.console.type("root\n")
        self.vm.console.expect(r"root@.*# ")

    def typed(self, command: str, *answers: tuple[str, str], code: int = 0) -> str:
        """Run a command at the console and answer what it asks. Returns what was shown."""
        console = self.vm.console
        begun = len(console.transcript)
        console.type(f"{command}; echo exit=$?\n")
        for question, answer in answers:
            console.expect(question, SLOW_S)
            lab.type_secret(self.vm, answer)
        ended = console.expect(r"exit=(\d+)", SLOW_S)
        console.expect(r"root@.*# ")
        shown = console.transcript[begun:].replace("\r", "")
        assert int(ended[1]) == code, shown
        return shown

    def assert_keystore_is_closed(self) -> None:
        lab.wait_object(self.vm, "volume", "keys", "locked")
        assert not {"keys", "vault"}.intersection(lab.mappings(self.vm))
        assert MOUNT not in self.vm.run("findmnt --raw --noheadings --output TARGET").out
        # The kernel releases it when udev has read it for the last time.
        self.vm.wait_until('[ -z "$(losetup --noheadings --list)" ]')

    def assert_up(self, starts: int, clean_stops: int) -> None:
        vm, counters = self.vm, guest.Counters(starts, clean_stops)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        vm.wait_unit("vmcryptd.target")
        for name in ("mail", "web"):
            lab.wait_object(vm, "guest", name, "running")
            vm.wait_counters(f"/dev/mapper/cr_{name}", counters)

    def assert_nobody_is_asked(self) -> None:
        self.vm.wait_until("! ls /run/systemd/ask-password/ask.*")
        assert lab.status(self.vm)["waiting"] == []


@contextlib.contextmanager
def resumed(new_host: HostFactory, snapshot: Snapshot) -> Iterator[Site]:
    host = new_host(snapshot=snapshot)
    vm = host.resume()
    site = Site(host, vm, Caller(vm))
    try:
        yield site
    finally:
        site.vm.power_cut()


@pytest.fixture(scope="module")
def without(module_host: HostFactory) -> Snapshot:
    """Volumes and guests as they are without a keystore, and nothing is open."""
    host = module_host(
        disks=["64M", "64M", "64M", "64M", "300M", "128M"],
        plugged=[*BEHIND.values(), GROUP, SWAP],
    )
    lab.format_disk(host, BEHIND["cr_data"])
    lab.format_disk(host, LATE, STORE)
    with host.resume() as vm:
        setup = lab.Lab(vm)
        for name, index in BEHIND.items():
            if name == "cr_data":
                setup.volume(name, lab.disk(index))
            else:
                setup.encrypted_guest(name.removeprefix("cr_"), lab.disk(index))
        vm.run(
            f"vgcreate -q vg0 {lab.disk(GROUP)}"
            " && for lv in vault spare; do lvcreate -q -y -L 64M -n $lv vg0; done"
        )
        setup.luks("/dev/vg0/spare")
        setup.volume("cr_spare", "/dev/vg0/spare", unlock="manual")
        setup.write_config(reload=True)
        vm.run("systemctl disable --now libvirt-guests.service")
        return vm.save()


@pytest.fixture(scope="module")
def made(module_host: HostFactory, without: Snapshot) -> Snapshot:
    """Keystores are made at a terminal: one in a file, and one on a logical volume."""
    with resumed(module_host, without) as site:
        make_keystores(site)
        site.vm.run("sync")
        return site.vm.save()


@pytest.fixture(scope="module")
def booted(module_host: HostFactory, made: Snapshot) -> Snapshot:
    """One passphrase at boot, which is a keystore's; root is logged in."""
    vm = module_host(snapshot=made).boot(wait=False)
    try:
        vm.console.expect(rf"Passphrase for volume keys \({FILE}\):")
        lab.type_secret(vm, STORE)
        site = Site(vm.host, vm, Caller(vm))
        site.log_in()
        site.assert_up(starts=1, clean_stops=0)
        return vm.save()
    finally:
        vm.power_cut()


@pytest.fixture
def site(host: HostFactory, booted: Snapshot) -> Iterator[Site]:
    """Up by the keystore."""
    with resumed(host, booted) as site:
        yield site


@pytest.fixture
def closed(host: HostFactory, made: Snapshot) -> Iterator[Site]:
    """With keystores, and nothing is open."""
    with resumed(host, made) as site:
        yield site


def make_keystores(site: Site) -> None:
    vm = site.vm
    site.log_in()
    shown = site.typed(
        f"vmcryptctl keystore init keys --file {FILE}",
        ("New passphrase for keys:", STORE), ("New passphrase for keys, once more:", WRONG),
        ("New passphrase for keys:", STORE), ("New passphrase for keys, once more:", STORE),
    )  # fmt: skip
    assert "these were not the same" in shown
    assert "keystore keys is made" in shown
    assert vm.run(f"stat -c '%a %U' {FILE}").out == "600 root\n"
    site.assert_keystore_is_closed()

    # As it says what comes next.
    site.typed("vmcryptctl unlock keys", (r"Passphrase for volume keys \(.*\):", STORE))
    site.put_keys(old=PASSPHRASE)
    for name in BEHIND:
        add = f"vmcryptctl key add {name} --keystore keys --key-file /run/keys/old"
        lab.paste_keys(vm, vm.run(add).out, name)
    assert "is there already; nothing is overwritten" in site.typed(
        "vmcryptctl keystore init more --file /etc/hostname", code=1
    )

    # On a logical volume.
    site.put_keys(store=STORE)
    init = "vmcryptctl keystore init vault --key-file /run/keys/store --device"
    assert "busy" in site.typed(f"{init} {lab.disk(GROUP)}", code=1)
    site.typed(f"{init} /dev/vg0/vault")
    site.typed("vmcryptctl unlock vault", (r"Passphrase for volume vault \(.*\):", STORE))
    shown = site.typed(
        "vmcryptctl key add cr_spare --keystore vault",
        ("Passphrase that opens cr_spare now:", WRONG),
        ("Passphrase that opens cr_spare now:", PASSPHRASE),
    )
    assert "that did not fit; try again" in shown
    lab.paste_keys(vm, shown, "cr_spare")
    site.typed("vmcryptctl reload && vmcryptctl lock keys vault")
    site.assert_keystore_is_closed()


def test_keystores_that_are_made_are_configured_well(closed: Site) -> None:
    found = json.loads(closed.vm.run("vmcryptctl check --json").out)
    assert found == {"ok": True, "findings": [], "config_changed": False}


def test_a_volume_by_the_keystore_on_a_logical_volume(closed: Site) -> None:
    """Opening it asks for the keystore, which is closed again."""
    shown = closed.typed(
        "vmcryptctl unlock cr_spare", (r"Passphrase for volume vault \(.*\):", STORE)
    )
    assert "open now: cr_spare" in shown
    assert closed.sources()["cr_spare"] == "file"
    journal = closed.vm.run("journalctl --sync; journalctl -b -o cat -u vmcryptd").out
    assert f"volume cr_spare is open (file:{MOUNT}/vault/cr_spare.key), asked for by" in journal
    lab.wait_object(closed.vm, "volume", "vault", "locked")
    # Its disk is gone: a volume with another key does not wait for it.
    closed.vm.run("vmcryptctl lock cr_spare && lvchange -q -an vg0/vault")
    lab.unlock(closed.vm, "cr_spare")
    assert closed.sources() == {"cr_spare": "key"}
    assert "cr_spare" in lab.mappings(closed.vm)


def test_one_passphrase_at_boot(site: Site) -> None:
    assert site.sources() == dict.fromkeys(BEHIND, "file")
    site.assert_keystore_is_closed()
    site.assert_nobody_is_asked()
    assert "did not fit" not in site.vm.console.transcript
    journal = site.vm.run("journalctl -b -o cat -u vmcryptd").out
    told = f"volume cr_data is open ({CR_DATA_SOURCE}), asked for by"
    assert journal.index(told) < journal.index("volume keys is closed")


def test_which_key_fits_which_slot(site: Site) -> None:
    assert {
        number: (slot["opened_by"], slot["fitted_by"])
        for number, slot in site.slots("cr_data").items()
    } == {0: ("passphrase", []), 1: ("random key", [CR_DATA_SOURCE])}
    shown = site.typed("vmcryptctl key list cr_data")
    assert f"fitted last time by {CR_DATA_SOURCE}" in " ".join(shown.split())


def test_a_backup_of_the_header_is_due(site: Site) -> None:
    """Since the keystore's key was added, before the host was switched off."""
    assert site.volume("cr_data")["header_backup_due"]
    assert "no backup of it was made since" in " ".join(site.typed("vmcryptctl status").split())
    site.typed(f"vmcryptctl header backup cr_data {HEADER}")
    assert not site.volume("cr_data")["header_backup_due"]
    assert site.vm.run(f"stat -c '%a %U' {HEADER}").out == "600 root\n"
    assert "nothing is overwritten" in site.typed(
        f"vmcryptctl header backup cr_data {HEADER}", code=2
    )


@pytest.mark.long
def test_keys_of_an_open_volume(site: Site) -> None:
    vm = site.vm
    before = vm.run("dmsetup table --showkeys cr_data").out
    site.typed(
        "vmcryptctl key add cr_data",
        ("Passphrase that opens cr_data now:", PASSPHRASE),
        ("New passphrase for cr_data:", OTHER),
        ("New passphrase for cr_data, once more:", OTHER),
    )
    assert list(site.slots("cr_data")) == [0, 1, 2]
    assert site.volume("cr_data")["header_backup_due"]
    site.put_keys(old=PASSPHRASE, other=OTHER, last=LAST, wrong=WRONG)
    shown = site.typed("vmcryptctl key test cr_data", ("Passphrase of cr_data to test:", OTHER))
    assert "it opens key slot 2 of cr_data" in shown
    site.typed("vmcryptctl key test cr_data --key-file /run/keys/wrong", code=3)

    # A wrong one is asked for again before anything else is.
    site.typed(
        "vmcryptctl key change cr_data",
        ("Passphrase of cr_data that is to go:", WRONG),
        ("Passphrase of cr_data that is to go:", OTHER),
        ("New passphrase for cr_data:", LAST),
        ("New passphrase for cr_data, once more:", LAST),
    )
    assert [site.opens("cr_data", key) for key in (PASSPHRASE, OTHER, LAST)] == [True, False, True]
    change = "vmcryptctl key change cr_data --key-file /run/keys/last --new-key-file /run/keys/"
    site.typed(f"{change}other")
    assert [site.opens("cr_data", key) for key in (OTHER, LAST)] == [True, False]

    [number] = [slot for slot in site.slots("cr_data") if slot > 1]
    remove = "vmcryptctl key remove cr_data"
    stays = "Passphrase of cr_data that stays"
    shown = site.typed(f"{remove} {number}", (stays, OTHER), (stays, PASSPHRASE))
    assert "another one has to stay" in shown
    site.typed(f"{remove} 1 --key-file /run/keys/old")
    assert "is the last way into volume cr_data" in site.typed(
        f"{remove} 0 --key-file /run/keys/old", code=1
    )
    assert [site.opens("cr_data", key) for key in (PASSPHRASE, OTHER, LAST)] == [True, False, False]
    # All the while it was open, and the mapping is the same.
    assert vm.run("dmsetup table --showkeys cr_data").out == before
    assert_no_secret_is_left(site)


def hold(site: Site, when: str, action: str) -> None:
    """From now on this action of cryptsetup begins, or ends, and does not come back."""
    vm = site.vm
    vm.put("/run/hold", f"{when} {action}\n")
    vm.run("rm -f /run/held; mountpoint -q /usr/sbin/cryptsetup || { cp /usr/sbin/cryptsetup"
           " /usr/local/lib/cryptsetup && mount --bind /usr/local/lib/holding /usr/sbin/cryptsetup; }")  # fmt: skip


def change_key(site: Site, old: str, new: str) -> None:
    """Begin to change a key of cr_data; it has come to where it is held."""
    command = (
        f"vmcryptctl key change cr_data --key-file /run/keys/{old} --new-key-file /run/keys/{new}"
    )
    site.vm.background(command)
    site.vm.wait_until("test -e /run/held", SLOW_S)


@pytest.mark.parametrize(
    ("when", "action", "old_opens", "new_opens"),
    [
        ("after", "luksAddKey", True, True),
        pytest.param("after", "luksKillSlot", False, True, marks=pytest.mark.long),
    ],
)
def test_the_daemon_is_killed_while_it_changes_a_key(
    site: Site, when: str, action: str, *, old_opens: bool, new_opens: bool
) -> None:
    vm = site.vm
    site.put_keys(old=PASSPHRASE, other=OTHER)
    vm.put("/usr/local/lib/holding", HOLDING, 0o755)
    hold(site, when, action)
    change_key(site, "old", "other")
    pid = vm.run("systemctl show --value -p MainPID vmcryptd").out.strip()
    vm.run(f"kill -KILL {pid} && umount --lazy /usr/sbin/cryptsetup")
    vm.wait_until(f'[ "$(systemctl show --value -p MainPID vmcryptd)" -ne {pid} ]')
    vm.wait_unit("vmcryptd.service")
    lab.wait_state(vm, "ready")
    assert [site.opens("cr_data", key) for key in (PASSPHRASE, OTHER)] == [old_opens, new_opens]
    assert site.volume("cr_data")["header_backup_due"]
    vm.run("! pgrep -x cryptsetup")

    # What is left over is put right with the verbs.
    if not old_opens:
        vm.run(
            "vmcryptctl key change cr_data --key-file /run/keys/other --new-key-file /run/keys/old"
        )
    elif new_opens:
        tested = vm.run("vmcryptctl key test cr_data --key-file /run/keys/other --json").out
        slot = json.loads(tested)["slot"]
        vm.run(f"vmcryptctl key remove cr_data {slot} --key-file /run/keys/old")
    assert [site.opens("cr_data", key) for key in (PASSPHRASE, OTHER)] == [True, False]
    assert len(site.slots("cr_data")) == 2


def test_a_keystore_takes_the_place_of_a_key_that_was_removed(site: Site) -> None:
    """Its file has outlived the key slot, and nothing is overwritten."""
    vm = site.vm
    vm.run("vmcryptctl key remove cr_data 1 --key-file -", stdin=PASSPHRASE.encode())
    lab.unlock(vm, "keys", passphrase=STORE)
    add = ["vmcryptctl", "key", "add", "cr_data", "--keystore", "keys", "--key-file", "-"]
    refused = vm.run(add, stdin=PASSPHRASE.encode(), check=False)
    assert refused.code == 1
    [advice] = re.findall("`(vmcryptctl key test .*?)`", refused.err)
    assert vm.run(advice.replace("VOLUME", "cr_data"), check=False).code == 3
    vm.run(f"rm {MOUNT}/keys/cr_data.key")
    done = vm.run(add, stdin=PASSPHRASE.encode())
    assert done.out == "cr_data is opened from the keystore keys from now on\n"
    vm.run("vmcryptctl lock keys")
    assert [slot["opened_by"] for slot in site.slots("cr_data").values()] == [
        "passphrase",
        "random key",
    ]


@pytest.mark.long
def test_an_answer_is_held_for_a_disk_that_comes_late(site: Site) -> None:
    vm = site.vm
    begin_to_swap(site)
    vm.put(
        "/etc/vmcryptd/conf.d/late.toml",
        f'[daemon]\nkey_cache = "infinity"\n[volume.cr_late]\ndevice = "{lab.disk(LATE)}"\ntimeout = "1s"\n',
    )
    vm.run("vmcryptctl reload && vmcryptctl shutdown && vmcryptctl boot")
    site.person.question("Passphrase for volume.* keys", STORE, SLOW_S)
    lab.wait_state(vm, "degraded", timeout_s=SLOW_S)
    assert site.sources().keys() == BEHIND.keys()
    assert lab.status(vm)["held_keys"] == [{"source": "prompt", "volumes": [], "until": "infinity"}]
    vm.plug_disk(LATE)
    site.assert_up(starts=2, clean_stops=1)
    assert site.sources()["cr_late"] == "prompt"
    site.assert_nobody_is_asked()
    site.assert_keystore_is_closed()

    # What is held is not swapped, and is wiped in time.
    pid = vm.run("systemctl show --value -p MainPID vmcryptd").out.strip()
    held = f"cat $(find /proc/{pid}/fd -lname '/memfd:vmcryptd-key*')"
    assert vm.run(held).out == STORE
    press(site, pid)
    assert not in_swap(site, CANARY)
    vm.run("sed -i s/infinity/2s/ /etc/vmcryptd/conf.d/late.toml && vmcryptctl reload")
    vm.wait_until("vmcryptctl status --json | grep -q '\"held_keys\": \\[\\]'")
    assert vm.run(f"find /proc/{pid}/fd -lname '/memfd:*'").out == ""
    assert_no_secret_is_left(site)


def in_swap(site: Site, needle: str) -> bool:
    """As the thief of the disk reads it."""
    return needle.encode() in site.host.disk_path(SWAP).read_bytes()


def press(site: Site, pid: str) -> None:
    """Have the kernel write out all that it may of the memory of a process and of those it belongs to."""
    group = site.vm.run(f"cut -d : -f 3 /proc/{pid}/cgroup").out.strip()
    # It fails when it could not reclaim as much, which there is not.
    command = f"echo 1G swappiness=200 >/sys/fs/cgroup{group}/memory.reclaim; sync"
    site.vm.run(command, check=False)


def begin_to_swap(site: Site) -> None:
    """And a process that holds a text in memory is swapped: the search finds what is there."""
    vm = site.vm
    vm.run(f"mkswap -q {lab.disk(SWAP)} && swapon {lab.disk(SWAP)}")
    program = "import signal, sys; text = sys.stdin.read() * 100; signal.pause()"
    vm.run(f"echo {CONTROL} >/run/control")
    vm.run(
        "systemd-run --quiet --unit=control -p StandardInput=file:/run/control"
        f" python3 -c '{program}'"
    )
    pid = vm.run("systemctl show --value -p MainPID control").out.strip()
    vm.wait_until(f"grep -q pause /proc/{pid}/wchan || grep -q pause /proc/{pid}/stack")
    press(site, pid)
    assert in_swap(site, CONTROL), "the search does not find what is there"
    vm.run("systemctl stop control.service")


def test_what_is_typed_is_not_swapped(site: Site) -> None:
    """The command line holds a first key while it asks for a second one."""
    vm = site.vm
    begin_to_swap(site)
    vm.console.type("vmcryptctl key add cr_data\n")
    vm.console.expect("Passphrase that opens cr_data now:", SLOW_S)
    lab.type_secret(vm, PASSPHRASE)
    vm.console.expect("New passphrase for cr_data:", SLOW_S)
    pid = vm.run("pgrep -f '^/usr/bin/python3.*vmcryptctl key add'").out.strip()
    held = f"cat $(find /proc/{pid}/fd -lname '/memfd:vmcryptd-key*')"
    assert vm.run(held).out == PASSPHRASE
    press(site, pid)
    assert vm.run(f"grep VmSwap /proc/{pid}/status").out.split()[1] != "0"
    assert not in_swap(site, CANARY)
    assert lab.in_memory(vm, pid, CANARY) == []
    vm.console.type("\x03")
    vm.console.expect(r"root@.*# ")
    assert len(site.slots("cr_data")) == 2


@pytest.mark.long
def test_an_answer_with_the_volumes_own_passphrase(site: Site) -> None:
    """While the keystore is asked for. It is not needed then, and not asked for any more."""
    vm = site.vm
    vm.run("vmcryptctl shutdown && vmcryptctl boot")
    site.person.question("^Passphrase for volume keys", WRONG, SLOW_S)
    site.person.question("^That did not fit. Passphrase for volume keys", PASSPHRASE, SLOW_S)
    site.assert_up(starts=2, clean_stops=1)
    assert site.sources() == dict.fromkeys(BEHIND, "prompt")
    site.assert_nobody_is_asked()
    site.assert_keystore_is_closed()
    assert site.volume("keys")["error"] == ""


def lose_keystore(site: Site) -> None:
    """It is not waited for long."""
    site.vm.run(
        f"sed -i '$a timeout = \"1s\"' /etc/vmcryptd/conf.d/keys.toml; mv {FILE} {FILE}.lost"
    )
    site.vm.run("vmcryptctl reload")


@pytest.mark.long
def test_a_lost_keystore(site: Site) -> None:
    vm = site.vm
    vm.run("vmcryptctl shutdown")
    lose_keystore(site)
    vm.run("vmcryptctl boot")
    names = ", ".join(sorted(BEHIND))
    site.person.question(f"^Passphrase for volumes {names}:", timeout_s=SLOW_S)
    lost = site.volume("keys")
    assert lost["state"] == "missing"
    assert re.fullmatch(
        rf"volume keys: its device {FILE} did not appear within 1 s; .*", lost["error"]
    )
    told = site.volume("cr_mail")
    assert told["state"] == "waiting"
    assert f"{MOUNT}/keys/cr_mail.key" in told["error"]
    site.person.question(f"^Passphrase for volumes {names}:", PASSPHRASE)
    site.assert_up(starts=2, clean_stops=1)
    assert site.sources() == dict.fromkeys(BEHIND, "prompt")
    site.assert_nobody_is_asked()


@pytest.mark.long
def test_the_power_is_cut_while_a_key_is_changed(site: Site) -> None:
    """And the keystore is lost: the volume is opened by what is left."""
    lose_keystore(site)
    site.put_keys(old=PASSPHRASE, other=OTHER)
    site.vm.put("/usr/local/lib/holding", HOLDING, 0o755)
    hold(site, "after", "luksAddKey")
    change_key(site, "old", "other")
    site.vm.run("sync")  # what the guests wrote, and that the keystore is lost
    site.vm.power_cut()
    site.vm = site.host.boot(wait=False)
    site.vm.console.expect(f"Passphrase for volumes {', '.join(sorted(BEHIND))}:")
    lab.type_secret(site.vm, PASSPHRASE)
    site.log_in()
    site.assert_up(starts=2, clean_stops=0)
    assert site.sources() == dict.fromkeys(BEHIND, "prompt")
    assert [site.opens("cr_data", key) for key in (PASSPHRASE, OTHER)] == [True, True]
    assert site.volume("cr_data")["header_backup_due"]
    assert_no_secret_is_left(site)


def assert_no_secret_is_left(site: Site) -> None:
    vm = site.vm
    vm.run("rm -rf /run/keys")
    places = "/run /tmp /var/log /var/lib/vmcryptd /etc"
    pid = vm.run("systemctl show --value -p MainPID vmcryptd").out.strip()
    vm.run("systemd-cat", stdin=CONTROL.encode())
    vm.run("journalctl --sync")

    def is_in_output(command: str, needle: str) -> bool:
        search = f"exec 3<&0; {command} </dev/null 2>/dev/null | grep -aFf /dev/fd/3"
        return bool(vm.run(search, stdin=needle.encode(), check=False).out)

    journal = "journalctl --no-pager -o export"
    processes = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ"
    assert lab.in_memory(vm, pid, CANARY) == []
    assert lab.in_files(vm, places, CANARY) == []
    assert not is_in_output(journal, CANARY)
    assert not is_in_output(processes, CANARY)
    assert CANARY not in vm.console.transcript
    # The same searches find what is there.
    assert lab.in_memory(vm, pid, "org.vmcryptd1") != []
    assert lab.in_files(vm, places, "cr_data") != []
    assert is_in_output(journal, CONTROL)
    assert is_in_output(processes, "/usr/sbin/vmcryptd")
