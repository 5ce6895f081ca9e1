# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong on a host: one clear sentence, the right name and exit status, and nothing else is hindered.

All tests begin with the same machine. Its boot set has everything in it that can be broken, next to a volume and a
guest that are not; what a person is asked for is opened by hand (`unlock = "manual"`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.vm import guest, lab
from tests.vm.conftest import HostFactory
from tests.vm.host import PROJECT, Host, Snapshot, Vm
from tests.vm.lab import PASSPHRASE, WRONG, Caller

# One try takes some seconds, so that the daemon can be killed in the middle of it.
SLOW_KDF = "--pbkdf argon2id --pbkdf-memory 16384 --pbkdf-parallel 1 --pbkdf-force-iterations 60"
# A try takes more memory than the daemon's unit gets in one test.
HUNGRY_KDF = "--pbkdf argon2id --pbkdf-memory 98304 --pbkdf-parallel 1 --pbkdf-force-iterations 4"
NO_UUID = "11111111-2222-3333-4444-555555555555"

# Volume → index of its disk. That of cr_late is plugged in by a test.
DISKS = {
    name: index
    for index, name in enumerate((
        "cr_good", "cr_uuid", "cr_damaged", "cr_primary", "cr_loose", "cr_loaded", "cr_stored",
        "cr_sealed", "cr_exec", "cr_failing", "cr_taken", "cr_slow", "cr_hand", "cr_ask",
        "cr_other", "cr_kdf", "cr_hungry", "cr_late", "cr_notluks",
    ))
}  # fmt: skip
OTHER = f"{PASSPHRASE}-other"  # opens cr_other, cr_kdf and cr_hungry only
KEY = "/etc/vmcryptd/keys/good"

BOOT: dict[str, dict[str, Any]] = {
    "cr_good": {"keys": [f"file:{KEY}"]},
    "cr_uuid": {"keys": [f"file:{KEY}"], "uuid": NO_UUID},
    "cr_damaged": {"keys": [f"file:{KEY}"]},
    "cr_primary": {"keys": [f"file:{KEY}"]},
    "cr_loose": {"keys": ["file:/etc/vmcryptd/keys/loose", "file:/etc/vmcryptd/keys/foreign"]},
    "cr_loaded": {"keys": ["credential:loaded"]},
    "cr_stored": {"keys": ["credential:stored"]},
    "cr_sealed": {"keys": ["credential:nothing", "credential:sealed"]},
    "cr_exec": {"keys": ["exec:/usr/local/bin/fetch 'the key' of"]},
    "cr_failing": {"keys": ["exec:/bin/false"]},
    "cr_taken": {"keys": [f"file:{KEY}"]},
    "cr_late": {"keys": [f"file:{KEY}"], "timeout": "1s"},
    "cr_notluks": {"keys": [f"file:{KEY}"]},
}
MANUAL: dict[str, dict[str, Any]] = {
    "cr_slow": {"keys": ["exec:/usr/local/bin/hang", "prompt"]},
    **{name: {} for name in ("cr_hand", "cr_ask", "cr_other", "cr_kdf", "cr_hungry")},
}

# What of the boot set is broken: volume → state, error, a part of the sentence.
BROKEN = {
    "cr_uuid": ("failed", "WrongUuid", f"has the UUID .*, the configuration says {NO_UUID}"),
    "cr_damaged": (
        "failed",
        "DamagedHeader",
        "volume cr_damaged: the LUKS header on .* is damaged: .*repair",
    ),
    "cr_loose": (
        "failed",
        "KeyUnavailable",
        "keys/loose is open to others; run `chmod 600 .*keys/foreign does not belong to root; run",
    ),
    "cr_failing": ("failed", "KeyUnavailable", "/bin/false failed: exit status 1"),
    "cr_taken": ("failed", "Busy", "name cr_taken is taken by something else"),
    "cr_late": ("missing", "DeviceMissing", "virtio-disk17 did not appear within 1 s"),
    "cr_never": ("missing", "DeviceMissing", f"UUID={NO_UUID} did not appear within 1 s"),
    "cr_notluks": ("failed", "NotLuks", "volume cr_notluks: .*virtio-disk18 is no LUKS device"),
}
# Volume → what has opened it, of which the bus shows the kind alone.
HEALTHY = {
    "cr_good": "file",
    "cr_primary": "file",
    "cr_loaded": "credential",
    "cr_stored": "credential",
    "cr_sealed": "credential",
    "cr_exec": "exec",
}
SICK_GUESTS = {
    "badnet": "'gone'",
    "baddisk": "/srv/gone.img",
}
# Succeeds while boot is a job.
BOOTING = (
    "busctl tree --list org.vmcryptd1 | grep /job/ |"
    " xargs -I{} busctl get-property org.vmcryptd1 {} org.vmcryptd1.Job Goal | grep -q boot"
)


@dataclass
class Site:
    """The machine after its boot set was brought up as far as that goes."""

    vm: Vm
    root: Caller
    nobody: Caller
    status: dict[str, Any]  # after that

    def volume(self, name: str) -> dict[str, Any]:
        """What the bus tells of a volume now."""
        return self._properties("Volume", "volume", name)

    def guest(self, name: str) -> dict[str, Any]:
        return self._properties("Guest", "guest", name)

    def _properties(self, interface: str, kind: str, name: str) -> dict[str, Any]:
        path = f"/org/vmcryptd1/{kind}/{lab.escaped(name)}"
        command = (
            f"busctl --json=short call org.vmcryptd1 {path} org.freedesktop.DBus.Properties"
            f" GetAll s org.vmcryptd1.{interface}"
        )
        [values] = json.loads(self.vm.run(command).out)["data"]
        return {key: value["data"] for key, value in values.items()}


@dataclass(frozen=True)
class Prepared:
    snapshot: Snapshot
    status: dict[str, Any]


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Prepared:
    late = DISKS["cr_late"]
    host = module_host(
        disks=["32M"] * len(DISKS), plugged=[index for index in DISKS.values() if index != late]
    )
    _format(host)
    with host.resume() as vm:
        _break(vm)
        _give_keys(vm)
        setup = lab.Lab(vm)
        for name, keys in BOOT.items():
            setup.volume(name, lab.disk(DISKS[name]), **keys)
        setup.volume("cr_never", f"UUID={NO_UUID}", keys=[f"file:{KEY}"], timeout="1s")
        for name, keys in MANUAL.items():
            setup.volume(name, lab.disk(DISKS[name]), unlock="manual", **keys)
        _make_guests(setup)
        vm.put(
            "/usr/local/bin/on-waiting", "#!/bin/sh\necho $VMCRYPTD_WAITING >>/run/waited\n", 0o755
        )
        setup.write_config('[daemon]\non_waiting = ["/usr/local/bin/on-waiting"]\n')
        vm.put(
            "/etc/systemd/system/vmcryptd.service.d/credential.conf",
            "[Service]\nLoadCredential=loaded:/root/loaded\n",
        )
        vm.run("systemctl daemon-reload && systemctl restart vmcryptd && vmcryptctl boot")
        root = Caller(vm)
        Caller(vm, "nobody")
        root.wait("manager", "", "degraded")
        vm.wait_counters("/dev/mapper/cr_good", guest.Counters(1, 0))
        status = lab.status(vm)
        return Prepared(vm.save(), status)


def resumed(new_host: HostFactory, prepared: Prepared) -> Iterator[Site]:
    with new_host(snapshot=prepared.snapshot).resume() as vm:
        yield Site(vm, Caller(vm), Caller(vm, "nobody"), prepared.status)


@pytest.fixture
def site(host: HostFactory, prepared: Prepared) -> Iterator[Site]:
    """For a test that changes something."""
    yield from resumed(host, prepared)


@pytest.fixture(scope="module")
def untouched(module_host: HostFactory, prepared: Prepared) -> Iterator[Site]:
    """For all that change nothing."""
    yield from resumed(module_host, prepared)


def _format(host: Host) -> None:
    for name, index in DISKS.items():
        options = {"cr_kdf": SLOW_KDF, "cr_hungry": HUNGRY_KDF}.get(name, lab.CHEAP)
        key = OTHER if name in ("cr_other", "cr_kdf", "cr_hungry") else PASSPHRASE
        if name != "cr_notluks":
            lab.format_disk(host, index, key, options)


def _break(vm: Vm) -> None:
    """The headers' JSON, of which there are two copies, and a mapping that is in the way."""
    zero = "dd if=/dev/zero bs=512 count=1 conv=notrunc,fsync status=none"
    damaged, primary = (lab.disk(DISKS[name]) for name in ("cr_damaged", "cr_primary"))
    vm.run(
        f"{zero} of={damaged} seek=9 && {zero} of={damaged} seek=41 && {zero} of={primary} seek=9"
        " && dmsetup create cr_taken --table '0 8 zero' && udevadm settle"
    )


def _give_keys(vm: Vm) -> None:
    keys = "/etc/vmcryptd/keys"
    vm.put(KEY, PASSPHRASE, 0o600)
    vm.put(f"{keys}/loose", PASSPHRASE, 0o644)
    vm.put(f"{keys}/foreign", PASSPHRASE, 0o600)
    vm.put("/root/loaded", PASSPHRASE, 0o600)
    vm.put("/etc/credstore/stored", PASSPHRASE, 0o600)
    vm.run(
        f"chown nobody {keys}/foreign; mkdir -p /etc/credstore.encrypted;"
        " systemd-creds encrypt --with-key=host --name=sealed - /etc/credstore.encrypted/sealed",
        stdin=PASSPHRASE.encode(),
    )
    vm.put(
        "/usr/local/bin/fetch",
        f'#!/bin/sh\n[ "$1 $2 $VMCRYPTD_VOLUME" = "the key of cr_exec" ] && cat {KEY}\n',
        0o755,
    )
    vm.put("/usr/local/bin/hang", "#!/bin/sh\nexec sleep infinity\n", 0o755)


def _make_guests(setup: lab.Lab) -> None:
    mapping = setup.open(lab.disk(DISKS["cr_good"]), "cr_good")
    setup.boot_sector(mapping)
    setup.close("cr_good")
    setup.domain("good", mapping)
    network = "<interface type='network'><source network='gone'/></interface></devices>"
    xml = guest.domain_xml("badnet", "/dev/mapper/cr_exec").replace("</devices>", network)
    setup.domain("badnet", xml=xml)
    file = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        "<source file='/srv/gone.img'/><target dev='vdb' bus='virtio'/></disk></devices>"
    )
    xml = guest.domain_xml("baddisk", "/dev/mapper/cr_primary").replace("</devices>", file)
    setup.domain("baddisk", xml=xml)


def named(values: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in values}


def cli(vm: Vm, arguments: str, *, stdin: str = "") -> tuple[int, str]:
    """The exit status and the words of vmcryptctl."""
    result = vm.run(f"vmcryptctl {arguments}", stdin=stdin.encode(), check=False)
    return result.code, result.err.strip()


# --- a boot with everything in it that can be broken ---


def test_what_is_healthy_came_up_next_to_what_is_not(untouched: Site) -> None:
    volumes = named(untouched.status["volumes"])
    for name, source in HEALTHY.items():
        assert (volumes[name]["state"], volumes[name]["key_source"]) == ("unlocked", source), name
        assert volumes[name]["error"] == "", name
    guests = named(untouched.status["guests"])
    assert guests["good"]["state"] == "running"
    untouched.vm.wait_counters("/dev/mapper/cr_good", guest.Counters(1, 0))
    assert untouched.status["state"] == "degraded"
    assert untouched.status["waiting"] == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_volume_of_the_boot_set(untouched: Site, name: str) -> None:
    state, error, sentence = BROKEN[name]
    shown = named(untouched.status["volumes"])[name]
    assert shown["state"] == state
    assert_sentence(shown["error"], sentence)
    refusal = untouched.root.refusal("Unlock", name)
    assert refusal.name == error
    assert_sentence(refusal.text, sentence)


def assert_sentence(text: str, pattern: str) -> None:
    """One line, that says this."""
    assert re.search(pattern, text), text
    assert "\n" not in text
    assert "Traceback" not in text


def test_exit_status_of_what_is_broken(untouched: Site) -> None:
    loop = 'for name in "$@"; do vmcryptctl unlock $name </dev/null; echo $? $name; done'
    result = untouched.vm.run(["bash", "-c", loop, "bash", *BROKEN])
    assert result.out.splitlines() == [f"1 {name}" for name in BROKEN]
    said = result.err.splitlines()
    assert len(said) == len(BROKEN), result.err
    assert all(line.startswith("vmcryptctl: ") for line in said)


@pytest.mark.parametrize("name", SICK_GUESTS)
def test_a_guest_that_does_not_start(untouched: Site, name: str) -> None:
    shown = named(untouched.status["guests"])[name]
    assert shown["state"] == "off"
    assert SICK_GUESTS[name] in shown["error"]
    refusal = untouched.root.refusal("StartGuest", name)
    assert refusal.name == "GuestFailed"
    assert SICK_GUESTS[name] in refusal.text
    assert f"virsh start {name}" in refusal.text
    code, words = cli(untouched.vm, f"start {name}")
    assert code == 1
    assert SICK_GUESTS[name] in words


def test_a_device_that_appears_later_is_opened_by_itself(site: Site) -> None:
    """And what was closed by hand stays closed, though its key would fetch itself."""
    assert site.volume("cr_late")["State"] == "missing"
    site.root.call("Lock", "cr_stored")
    site.vm.plug_disk(DISKS["cr_late"])
    site.root.wait("volume", "cr_late", "unlocked")
    assert site.volume("cr_late")["LastError"] == ""
    site.vm.wait_until(f"! {BOOTING}")
    assert site.volume("cr_stored")["State"] == "locked"
    site.root.call("Unlock", "cr_stored")


def test_a_key_file_is_taken_once_it_is_private(site: Site) -> None:
    site.vm.run("chmod 600 /etc/vmcryptd/keys/loose")
    site.root.call("Unlock", "cr_loose")
    assert site.volume("cr_loose")["KeySource"] == "file"


def test_a_name_that_is_free_again(site: Site) -> None:
    site.vm.run("dmsetup remove cr_taken")
    site.root.call("Unlock", "cr_taken")


# --- keys ---


def test_a_slow_fetcher_falls_through_to_the_question(site: Site) -> None:
    opening = site.root.begin("Unlock", "cr_slow")
    site.root.question("cr_slow")
    site.vm.wait_until("grep -qx cr_slow /run/waited")
    site.root.wait("volume", "cr_slow", "waiting")
    site.root.wait("manager", "", ["cr_slow"], prop="Waiting")
    # It was ended; it is tried again from time to time while a person is asked.
    site.vm.wait_until("! pgrep -f '[b]in/hang'")
    site.root.question("cr_slow", PASSPHRASE)
    site.root.ended(opening)
    assert site.volume("cr_slow")["KeySource"] == "prompt"


def test_a_key_through_busctl(site: Site) -> None:
    call = (
        f"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec busctl call {lab.MANAGER}"
        " UnlockWithKey sh cr_ask 3"
    )
    refused = site.vm.run(call, stdin=WRONG.encode(), check=False)
    assert refused.code == 1
    assert "volume cr_ask: the key fits no key slot" in refused.err
    site.vm.run(call, stdin=PASSPHRASE.encode())
    shown = site.volume("cr_ask")
    assert (shown["State"], shown["KeySource"], shown["LastError"]) == ("unlocked", "key", "")


def test_one_answer_for_all_that_wait_and_a_question_for_the_rest(site: Site) -> None:
    calls = []
    for name in ("cr_ask", "cr_hand", "cr_other"):
        calls.append(site.root.begin("Unlock", name))
        site.root.wait("volume", name, "waiting")
    site.root.question("^Passphrase for volume.* cr_ask", PASSPHRASE)
    site.root.question("^That did not fit. Passphrase for volume cr_other", OTHER)
    for call in calls:
        site.root.ended(call)


# --- what others do with our volumes ---


@pytest.mark.parametrize("mapping", ["cr_hand", "by-hand"])
def test_a_mapping_opened_by_hand_is_adopted(site: Site, mapping: str) -> None:
    device = lab.disk(DISKS["cr_hand"])
    site.vm.run(f"cryptsetup open --key-file - {device} {mapping}", stdin=PASSPHRASE.encode())
    site.root.wait("volume", "cr_hand", "unlocked")
    site.root.call("UnlockWithKey", "cr_hand", key=WRONG)  # it is open: nothing is tried
    site.root.call("Lock", "cr_hand")
    assert mapping not in lab.mappings(site.vm)
    site.root.wait("volume", "cr_hand", "locked")


def test_a_volume_that_waits_is_opened_by_hand(site: Site) -> None:
    call = site.root.begin("Unlock", "cr_hand")
    site.root.question("cr_hand")
    device = lab.disk(DISKS["cr_hand"])
    site.vm.run(f"cryptsetup open --key-file - {device} cr_hand", stdin=PASSPHRASE.encode())
    site.root.ended(call)
    site.vm.wait_until("! ls /run/systemd/ask-password/ask.*")


USERS = {
    "process": (
        "systemd-run -q --unit=holder -p StandardInput=file:/dev/mapper/cr_hand sleep 1h",
        r"in use by sleep \(pid \d+\)",
        "systemctl stop holder",
    ),
    "mount": (
        "mkfs.ext4 -q /dev/mapper/cr_hand && mkdir -p /srv/by-hand && mount /dev/mapper/cr_hand /srv/by-hand",
        "in use by mounted at /srv/by-hand",
        "umount /srv/by-hand",
    ),
    "logical volume": (
        "vgcreate -qqy byhand /dev/mapper/cr_hand && lvcreate -qqy -L 4M -n lv byhand",
        "in use by logical volume byhand/lv",
        "vgchange -q -an byhand",
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_a_busy_volume_names_who_uses_it(site: Site, user: str) -> None:
    use, words, let_go = USERS[user]
    if site.volume("cr_hand")["State"] == "locked":
        site.root.call("UnlockWithKey", "cr_hand", key=PASSPHRASE)
    site.vm.run(use)
    refusal = site.root.refusal("Lock", "cr_hand")
    assert refusal.name == "Busy"
    assert_sentence(refusal.text, words)
    assert "cr_hand" in lab.mappings(site.vm)
    site.vm.run(let_go)
    site.root.call("Lock", "cr_hand")
    assert "cr_hand" not in lab.mappings(site.vm)


def test_a_guest_that_runs_keeps_its_volume(untouched: Site) -> None:
    refusal = untouched.root.refusal("Lock", "cr_good")
    assert (refusal.name, "guest good" in refusal.text) == ("Busy", True)
    assert cli(untouched.vm, "lock cr_good")[0] == 1


# --- libvirt away ---


def test_without_libvirt_volumes_open_and_guests_follow(site: Site) -> None:
    vm, root = site.vm, site.root
    root.call("Shutdown")
    assert lab.mappings(vm) == []
    before = vm.run("systemctl show -P MainPID vmcryptd").out
    units = "libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service"
    vm.run(f"systemctl stop {units}")
    root.call("Boot")
    root.wait("volume", "cr_good", "unlocked")
    root.wait("manager", "", "degraded")
    text = vm.run("systemctl show -P StatusText vmcryptd").out
    assert text.startswith("Degraded: "), text
    vm.run("systemctl start libvirtd.socket")
    root.wait("guest", "good", "running")
    vm.wait_counters("/dev/mapper/cr_good", guest.Counters(2, 1))
    assert vm.run("systemctl show -P MainPID vmcryptd").out == before


# --- who may ---


def test_an_unprivileged_user_reads_and_changes_nothing(untouched: Site) -> None:
    vm = untouched.vm
    nobody = "runuser -u nobody --"
    status = json.loads(vm.run(f"{nobody} vmcryptctl status --json").out)
    assert named(status["volumes"])["cr_good"]["state"] == "unlocked"
    vm.run(f"{nobody} vmcryptctl plan boot")
    vm.run(f"{nobody} busctl introspect org.vmcryptd1 /org/vmcryptd1")
    vm.run(f"{nobody} busctl get-property {lab.MANAGER} State")
    for member, body in {
        "Unlock": ["cr_ask"], "Lock": ["cr_stored"], "UnlockAll": [], "LockAll": [], "Boot": [],
        "StartGuest": ["good"], "StopGuest": ["good"], "Shutdown": [], "Panic": [], "Reload": [],
    }.items():  # fmt: skip
        refusal = untouched.nobody.refusal(member, *body)
        assert refusal.name == "NotAuthorized", member
        assert_sentence(refusal.text, "user 65534 may not do org.vmcryptd1.[a-z]+")
    assert (
        untouched.nobody.refusal("UnlockWithKey", "cr_ask", key=PASSPHRASE).name == "NotAuthorized"
    )
    assert untouched.nobody.refusal("UnlockAllWithKey", key=PASSPHRASE).name == "NotAuthorized"
    result = vm.run(
        f"{nobody} vmcryptctl unlock --key-file - cr_ask", stdin=PASSPHRASE.encode(), check=False
    )
    assert result.code == 4
    assert "may not do org.vmcryptd1.unlock" in result.err
    assert untouched.volume("cr_ask")["State"] == "locked"


def test_the_example_rule_lets_its_group_unlock(site: Site) -> None:
    vm = site.vm
    vm.run("groupadd --system -f vmcryptd && useradd --system --groups vmcryptd keyholder")
    rule = (PROJECT / "config/examples/50-vmcryptd.rules").read_bytes()
    vm.put("/etc/polkit-1/rules.d/50-vmcryptd.rules", rule)
    vm.run("systemctl restart polkit")
    keyholder = Caller(vm, "keyholder")
    keyholder.call("UnlockWithKey", "cr_ask", key=PASSPHRASE)
    assert site.volume("cr_ask")["State"] == "unlocked"
    assert keyholder.refusal("Lock", "cr_ask").name == "NotAuthorized"
    assert site.nobody.refusal("UnlockWithKey", "cr_ask", key=PASSPHRASE).name == "NotAuthorized"


def test_without_polkit_root_may_and_nobody_else(site: Site) -> None:
    vm = site.vm
    vm.run("systemctl mask --runtime --now polkit.service")
    try:
        site.root.call("UnlockWithKey", "cr_ask", key=PASSPHRASE)
        refusal = site.nobody.refusal("Lock", "cr_ask")
        assert refusal.name == "NotAuthorized"
        assert_sentence(refusal.text, "polkit cannot be asked")
    finally:
        vm.run("systemctl unmask --runtime polkit.service")


# --- the daemon itself ---


def test_a_bad_configuration_is_refused_and_the_running_one_stays(untouched: Site) -> None:
    path = "/etc/vmcryptd/conf.d/bad.toml"
    untouched.vm.put(path, '[volume.cr_new]\ndevice = "/dev/null"\nunlok = "boot"\n')
    refusal = untouched.root.refusal("Reload")
    assert refusal.name == "Config"
    assert_sentence(refusal.text, r"bad\.toml.*volume\.cr_new.*unlok.*did you mean")
    code, words = cli(untouched.vm, "reload")
    assert code == 2
    assert "bad.toml" in words
    assert untouched.vm.run("systemctl reload vmcryptd", check=False).code != 0
    assert untouched.vm.run("systemctl is-active vmcryptd").out == "active\n"
    assert untouched.volume("cr_good")["State"] == "unlocked"
    untouched.vm.run(f"rm {path}")
    untouched.vm.run("systemctl reload vmcryptd")


def test_a_key_derivation_without_memory_dies_alone(site: Site) -> None:
    vm, unit = site.vm, "vmcryptd.service"
    pid = vm.run(f"systemctl show -P MainPID {unit}").out
    before = int(vm.run(f"systemctl show -P MemoryCurrent {unit}").out)
    vm.run(f"systemctl set-property --runtime {unit} MemoryMax={before + (24 << 20)}")
    try:
        refusal = site.root.refusal("UnlockWithKey", "cr_hungry", key=OTHER)
        assert refusal.name == "OutOfMemory", refusal
        assert_sentence(refusal.text, "volume cr_hungry: there was not enough memory to derive")
        site.root.call("UnlockWithKey", "cr_ask", key=PASSPHRASE)
        assert vm.run(f"systemctl show -P MainPID {unit}").out == pid
    finally:
        vm.run(f"systemctl set-property --runtime {unit} MemoryMax=infinity")
    site.root.call("UnlockWithKey", "cr_hungry", key=OTHER)


def test_a_volume_whose_table_is_gone_stays_ours_until_it_is_closed(site: Site) -> None:
    vm, root = site.vm, site.root
    root.call("UnlockWithKey", "cr_hand", key=PASSPHRASE)
    config = vm.run(f"cat {lab.CONFIG}").out
    without = re.sub(r"^\[volume\.cr_hand\]\n([^\[\n].*\n|\n)*", "", config, flags=re.MULTILINE)
    assert without != config
    vm.put(lab.CONFIG, without)
    root.call("Reload")
    for _ in range(2):
        assert "cr_hand" in lab.mappings(vm)
        shown = site.volume("cr_hand")
        assert shown["State"] == "unlocked"
        assert_sentence(shown["LastError"], "volume cr_hand: it is no longer configured")
        vm.run("test -e /run/vmcryptd/guest-content/cr_hand")
        vm.run("grep -qx cr_hand /run/vmcryptd/volumes")
        vm.run("systemctl restart vmcryptd")
    root.call("Lock", "cr_hand")
    assert "cr_hand" not in lab.mappings(vm)
    vm.run("test ! -e /run/vmcryptd/guest-content/cr_hand")
    assert root.refusal("Lock", "cr_hand").name == "NoSuchVolume"
    vm.put(lab.CONFIG, config)
    root.call("Reload")
    root.wait("volume", "cr_hand", "locked")


RESTARTS = {
    "killed": "systemctl kill -s KILL vmcryptd",
    "restarted": "systemctl restart vmcryptd",
}


@pytest.mark.parametrize("how", RESTARTS)
def test_the_daemon_is_gone_for_a_moment(site: Site, how: str) -> None:
    """In the middle of waiting, of opening, and with a guest that runs."""
    vm, root = site.vm, site.root
    root.begin("Unlock", "cr_ask")
    root.wait("volume", "cr_ask", "waiting")
    root.begin("Unlock", "cr_kdf")
    root.wait("volume", "cr_kdf", "waiting")
    root.question("cr_ask", OTHER)
    # One try of it, in the middle of which it stays.
    child = "pgrep -fx '/usr/sbin/cryptsetup open .* cr_kdf'"
    vm.wait_until(f"{child} && pkill -STOP -fx '/usr/sbin/cryptsetup open .* cr_kdf'")
    before = running(vm)
    reasons = {name: site.volume(name)["LastError"] for name in BROKEN}
    pid = vm.run("systemctl show -P MainPID vmcryptd").out.strip()
    vm.run(RESTARTS[how])
    vm.wait_until(f'[ "$(systemctl show -P MainPID vmcryptd)" -ne {pid} ]')
    vm.wait_unit("vmcryptd.service")
    root.wait("volume", "cr_ask", "waiting")
    root.wait("volume", "cr_kdf", "waiting")
    root.wait("manager", "", "waiting")
    assert running(vm) == before
    assert {name: site.volume(name)["LastError"] for name in BROKEN} == reasons
    assert vm.run(child, check=False).out == "", "a cryptsetup of the old daemon is left"
    states = {name: site.volume(name)["State"] for name in ("cr_good", "cr_ask", "cr_kdf")}
    assert states == {"cr_good": "unlocked", "cr_ask": "waiting", "cr_kdf": "waiting"}
    root.wait("guest", "good", "running")
    root.question("^Passphrase for volume", PASSPHRASE)
    root.wait("volume", "cr_ask", "unlocked")
    root.question("volume cr_kdf")
    root.call("Lock", "cr_kdf")
    root.wait("volume", "cr_kdf", "locked")
    vm.wait_until("! ls /run/systemd/ask-password/ask.*")


def running(vm: Vm) -> str:
    """Every mapping with its device number, and every guest with its process."""
    return vm.run(
        "dmsetup info -c --noheadings -o name,uuid,major,minor; virsh list --all --id --name;"
        " cat /run/libvirt/qemu/*.pid"
    ).out
