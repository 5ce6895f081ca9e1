# SPDX-License-Identifier: LGPL-2.1-or-later
"""After keys came in every way there is, none of them is found anywhere.

Every key has the canary in it. Each place is searched for it by a function that is first shown something else to find
there, so that a search that cannot find anything does not pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.vm import guest, lab, watch
from tests.vm.conftest import HostFactory
from tests.vm.host import Snapshot, Vm
from tests.vm.lab import PASSPHRASE, WRONG, Caller

CANARY = "canary-Zw7pQ4"
CONTROL = "control-Yk3mT8"  # what is planted to be found

FILE, CREDENTIAL, FETCHED, HANDED, TYPED = (
    f"{CANARY}-{where}" for where in ("file", "credential", "fetched", "handed", "typed")
)
assert PASSPHRASE.startswith(CANARY)
assert WRONG.startswith(CANARY)

VOLUMES: dict[str, tuple[str, dict[str, object]]] = {
    "cr_imap": (PASSPHRASE, {}),
    "cr_file": (FILE, {"keys": ["file:/etc/vmcryptd/keys/file"]}),
    "cr_credential": (CREDENTIAL, {"keys": ["credential:sealed"]}),
    "cr_fetched": (FETCHED, {"keys": ["exec:/usr/local/bin/fetch"]}),
    "cr_handed": (HANDED, {"unlock": "manual"}),
    "cr_typed": (TYPED, {"unlock": "manual"}),
}
# As everybody may see them: without their arguments.
SOURCES = {
    "cr_imap": "prompt",
    "cr_file": "file",
    "cr_credential": "credential",
    "cr_fetched": "exec",
    "cr_handed": "key",
    "cr_typed": "key",
}

# vmcryptctl on a terminal; the input comes through the FIFO.
TYPIST = """\
exec 3<>/root/typed
exec python3 -c 'import pty, sys; sys.exit(pty.spawn(["vmcryptctl", "unlock", "cr_typed"]) >> 8)' \
    <&3 >/root/terminal
"""
# A core dump of whatever crashes, through a pipe as systemd-coredump gets it.
KEEP_CORE = "#!/bin/sh\ncat >/root/core\n"
SIGNALS = {"SEGV": 11, "ABRT": 6}


@dataclass
class Site:
    vm: Vm
    root: Caller

    def pid(self) -> str:
        return self.vm.run("systemctl show -P MainPID vmcryptd").out.strip()

    def hold_a_key(self) -> None:
        """From an agent; with `key_cache` the daemon keeps it."""
        self.root.call("Lock", "cr_typed")
        call = self.root.begin("Unlock", "cr_typed")
        self.root.question("Passphrase for volume cr_typed", WRONG)
        self.root.question("That did not fit. Passphrase for volume cr_typed", TYPED)
        self.root.ended(call)

    def in_memory(self, pid: str, needle: str) -> list[str]:
        return lab.in_memory(self.vm, pid, needle)

    def in_files(self, places: str, needle: str, *, without: str = "") -> list[str]:
        return lab.in_files(self.vm, places, needle, without=without)

    def in_output(self, command: str, needle: str) -> list[str]:
        return watch.in_output(self.vm, command, needle)

    def descriptors(self) -> list[str]:
        """The daemon's open descriptors, by kind and without their numbers."""
        fds = self.vm.run(f"find /proc/{self.pid()}/fd -type l -printf '%l\\n'").out.splitlines()
        return sorted(fd.partition("[")[0] if ":[" in fd else fd for fd in fds)


@pytest.fixture(scope="module")
def prepared(module_host: HostFactory) -> Snapshot:
    """After every key came in."""
    host = module_host(disks=["32M"] * len(VOLUMES))
    for index, (key, _) in enumerate(VOLUMES.values()):
        lab.format_disk(host, index, key)
    with host.resume() as vm:
        _prepare(vm)
        vm.run("sync")
        vm.power_cut()
    with host.boot(wait=False) as vm:
        # At the console, first a wrong answer.
        vm.console.expect("Passphrase for volume cr_imap")
        lab.type_secret(vm, WRONG)
        vm.console.expect("That did not fit")
        lab.type_secret(vm, PASSPHRASE)
        lab.wait_state(vm, "ready")
        vm.wait_until("systemctl is-active multi-user.target")
        site = Site(vm, Caller(vm))
        # On descriptors, by two programs.
        assert site.root.refusal("UnlockWithKey", "cr_handed", key=WRONG).name == "WrongKey"
        assert lab.unlock(vm, "cr_handed", passphrase=WRONG, check=False) == 3
        lab.unlock(vm, "cr_handed", passphrase=HANDED)
        # On a terminal.
        typing = vm.background(f"mkfifo /root/typed; {TYPIST}")
        _type(site, WRONG)
        vm.wait_until("grep -q 'did not fit' /root/terminal")
        _type(site, TYPED)
        typing.wait()
        volumes = {one["name"]: one for one in lab.status(vm)["volumes"]}
        assert {name: one["key_source"] for name, one in volumes.items()} == SOURCES
        assert {one["state"] for one in volumes.values()} == {"unlocked"}
        vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))
        vm.run("systemctl stop sample")  # it keeps the machine busy
        return vm.save()


@pytest.fixture
def site(host: HostFactory, prepared: Snapshot) -> Iterator[Site]:
    with host(snapshot=prepared).resume() as vm:
        yield Site(vm, Caller(vm))


def _prepare(vm: Vm) -> None:
    setup = lab.Lab(vm)
    for index, (name, (_, keys)) in enumerate(VOLUMES.items()):
        setup.volume(name, lab.disk(index), **keys)
    mapping = setup.open(lab.disk(0), "cr_imap")
    setup.boot_sector(mapping)
    setup.close("cr_imap")
    setup.domain("imap", mapping)
    vm.put("/etc/vmcryptd/keys/file", FILE, 0o600)
    vm.run(
        "mkdir -p /etc/credstore.encrypted;"
        " systemd-creds encrypt --with-key=host --name=sealed - /etc/credstore.encrypted/sealed",
        stdin=CREDENTIAL.encode(),
    )
    vm.put("/root/fetched", FETCHED, 0o600)
    vm.put("/usr/local/bin/fetch", "#!/bin/sh\nexec cat /root/fetched\n", 0o755)
    # Keys are held for ever here, so that no search comes too late.
    setup.write_config('[daemon]\nkey_cache = "infinity"\n')

    watch.install(vm, [CANARY, CONTROL])
    vm.put("/usr/local/bin/keep-core", KEEP_CORE, 0o755)
    vm.run("systemctl mask libvirt-guests")


def _type(site: Site, text: str) -> None:
    """Once vmcryptctl asks and the terminal does not echo."""
    pid = "$(pgrep -f '^/usr/bin/python3.*vmcryptctl unlock cr_typed')"
    site.vm.wait_until(f"stty -F /proc/{pid}/fd/0 -a | grep -qw -- -echo")
    site.vm.run("cat >/root/typed", stdin=f"{text}\n".encode())


def test_memory_of_the_daemon_that_holds_a_key(site: Site) -> None:
    pid = site.pid()
    held = site.vm.run(
        f"find /proc/{pid}/fd -lname '/memfd:vmcryptd-key*' -exec cat {{}} \\; -exec echo \\;"
    ).out.split()
    assert PASSPHRASE in held, "no key is held, which makes the search too easy"
    assert site.in_memory(pid, "org.vmcryptd1"), "the search does not find what is there"
    assert site.in_memory(pid, CANARY) == []
    maps = site.vm.run(f"cat /proc/{pid}/maps").out
    assert "memfd" not in maps


def test_memory_of_vmcryptctl_after_an_answer(site: Site) -> None:
    site.root.call("Lock", "cr_typed")
    typing = site.vm.background(TYPIST)
    # One is answered wrongly; now it has one behind it and asks for the next.
    site.vm.run("truncate -s 0 /root/terminal")
    _type(site, WRONG)
    site.vm.wait_until("grep -q 'did not fit' /root/terminal")
    pid = site.vm.run("pgrep -f '^/usr/bin/python3.*vmcryptctl unlock cr_typed'").out.strip()
    assert site.in_memory(pid, "cr_typed"), "the search does not find what is there"
    assert site.in_memory(pid, CANARY) == []
    _type(site, TYPED)
    typing.wait()
    assert CANARY not in site.vm.get("/root/terminal").decode()


def test_arguments_and_environment_of_every_process(site: Site) -> None:
    site.vm.run("systemctl start sample")
    assert watch.sampled(site.vm, CONTROL) == []


def test_journal_kernel_log_and_console(site: Site) -> None:
    vm = site.vm
    journal = "journalctl --no-pager -o export"
    vm.run("systemd-cat", stdin=CONTROL.encode())
    vm.run("cat >/dev/kmsg", stdin=CONTROL.encode())
    vm.run("journalctl --sync")
    for log in (journal, "dmesg"):
        assert site.in_output(log, CONTROL), f"the search in {log} does not find what is there"
        assert site.in_output(log, CANARY) == []
    assert site.in_output(journal, "volume cr_imap is open (prompt)")
    assert "Passphrase for volume cr_imap" in vm.console.transcript
    assert CANARY not in vm.console.transcript


def test_files(site: Site) -> None:
    places, without = "/run /var /tmp /etc/vmcryptd", "--exclude-dir=keys"
    planted = {f"{place}/planted" for place in ("/run/vmcryptd", "/var/lib/vmcryptd", "/tmp")}
    for path in planted:
        site.vm.put(path, f"some\n{CONTROL}")
    assert planted <= set(site.in_files(places, CONTROL, without=without))
    assert site.in_files(places, CANARY, without=without) == []


def test_the_bus(site: Site) -> None:
    site.root.refusal("Unlock", CONTROL)
    site.vm.wait_until(f"grep -qaFf {watch.NEEDLES} {watch.BUS}")
    assert site.in_files(watch.BUS, "UnlockWithKey") == [watch.BUS]
    assert site.in_files(watch.BUS, CONTROL) == [watch.BUS]
    assert site.in_files(watch.BUS, CANARY) == []


def test_nothing_is_swapped(site: Site) -> None:
    group = "/sys/fs/cgroup/system.slice/vmcryptd.service"
    assert site.vm.run(f"cat {group}/memory.swap.max").out == "0\n"
    assert site.vm.run(f"grep VmSwap /proc/{site.pid()}/status").out.split() == [
        "VmSwap:",
        "0",
        "kB",
    ]


@pytest.mark.parametrize("signal", ["SEGV", "ABRT"])
@pytest.mark.parametrize("pattern", ["/root/core", "|/usr/local/bin/keep-core"])
def test_core_dumps(site: Site, signal: str, pattern: str) -> None:
    vm = site.vm
    vm.run("cat >/proc/sys/kernel/core_pattern; rm -f /root/core", stdin=pattern.encode())
    crash = f"import os, sys; key = sys.stdin.read(); os.kill(os.getpid(), {SIGNALS[signal]})"
    vm.run(f"ulimit -c unlimited; exec python3 -c '{crash}'", stdin=CONTROL.encode(), check=False)
    vm.wait_until(f"grep -qaFf {watch.NEEDLES} /root/core")
    vm.run("rm /root/core")

    site.hold_a_key()
    pid = site.pid()
    vm.run(f"kill -{signal} {pid}")
    vm.wait_until(f'[ "$(systemctl show -P MainPID vmcryptd)" -ne {pid} ]')
    vm.wait_unit("vmcryptd.service")
    site.root.wait("manager", "", "ready")
    # A handler gets something in any case, as long as it has nothing of the memory in it.
    assert site.in_files("/root", CANARY, without="--exclude=fetched --exclude=needles") == []
    site.root.wait("guest", "imap", "running")
    site.vm.wait_counters("/dev/mapper/cr_imap", guest.Counters(1, 0))


def test_the_daemon_has_as_many_descriptors_as_before(site: Site) -> None:
    vm, root = site.vm, site.root
    vm.run("sed -i /key_cache/d /etc/vmcryptd/vmcryptd.toml")
    root.call("Reload")

    def use_every_way() -> None:
        again = ("cr_file", "cr_credential", "cr_fetched")
        for member in ("Lock", "Unlock"):
            for call in [root.begin(member, name) for name in again]:
                root.ended(call)
        site.hold_a_key()
        root.call("Lock", "cr_handed")
        root.refusal("UnlockWithKey", "cr_handed", key=WRONG)
        root.call("UnlockWithKey", "cr_handed", key=HANDED)
        vm.wait_until(f"! pgrep -P {site.pid()}")

    use_every_way()
    before = site.descriptors()
    assert not any("memfd" in fd for fd in before), before
    for _ in range(2):
        use_every_way()
    assert site.descriptors() == before
