# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keys that fetch themselves: a TPM, a smart card, Tang, a vault; and what happens when these are taken away."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import vault
from tests.vm import guest, lab, watch
from tests.vm.conftest import HostFactory
from tests.vm.host import PROJECT, Host, Image, Snapshot, Vm
from tests.vm.lab import PASSPHRASE, Caller
from tests.vm.tpm import Tpm

PIN = "canary-Zw7pQ4-pin"
CARD_PIN = (
    "80317731"  # given to softhsm2-util as an argument, as it wants it, before anything is recorded
)
CONTROL = "control-Yk3mT8"  # what is planted to be found
TANGS = {"tang1": 7501, "tang2": 7502}
TANG_SOCKET = """\
[Unit]
DefaultDependencies=no
[Socket]
ListenStream=127.0.0.1:{port}
Accept=yes
[Install]
WantedBy=sockets.target
"""
TANG_SERVICE = """\
[Unit]
CollectMode=inactive-or-failed
[Service]
ExecStart=/usr/libexec/tangd /var/lib/{name}
StandardInput=socket
StandardOutput=socket
StandardError=journal
"""
VAULT_SOCKET = """\
[Unit]
DefaultDependencies=no
Before=vmcryptd.service
[Socket]
ListenStream=127.0.0.1:8200
[Install]
WantedBy=sockets.target
"""
VAULT_SERVICE = """\
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/vault.py
"""
FROM_VAULT = "exec:/usr/local/bin/fetch-from-vault http://127.0.0.1:8200 secret vmcryptd/cr_imap"
BOTH = '{"t":1,"pins":{"tang":[{"url":"http://127.0.0.1:7501"},{"url":"http://127.0.0.1:7502"}]}}'
FIRST = '{"url":"http://127.0.0.1:7501"}'
SLOW_S = 300.0


def enrol(vm: Vm, device: str, *options: str, answers: Sequence[tuple[str, str]] = ()) -> None:
    """systemd-cryptenroll; its questions come to the agents."""
    command = ["systemd-cryptenroll", "--unlock-key-file=/dev/stdin", *options, device]
    enrolling = vm.background(command, stdin=PASSPHRASE.encode())
    if answers:
        person = Caller(vm)
        for question, answer in answers:
            person.question(question, answer, timeout_s=SLOW_S)
    enrolling.wait(SLOW_S)


def prepare(vm: Vm) -> str:
    """Returns every secret there is, one a line."""
    setup = lab.Lab(vm)
    for name, port in TANGS.items():
        vm.run(f"mkdir /var/lib/{name} && /usr/libexec/tangd-keygen /var/lib/{name}")
        vm.put(f"/etc/systemd/system/{name}.socket", TANG_SOCKET.format(port=port))
        vm.put(f"/etc/systemd/system/{name}@.service", TANG_SERVICE.format(name=name))
    vm.run("systemctl daemon-reload && systemctl start tang1.socket tang2.socket")

    setup.encrypted_guest("mail", lab.disk(0), keys=["tpm2", "clevis", "prompt"])
    enrol(vm, lab.disk(0), "--tpm2-device=auto", "--tpm2-pcrs=16")
    bind(vm, lab.disk(0), "sss", BOTH)

    # As the recipe says. The image has no documentation.
    recipe = PROJECT / "config/examples/fetch-from-vault"
    vm.put("/usr/local/bin/fetch-from-vault", recipe.read_text(), 0o755)
    vm.put("/etc/vmcryptd/vault-token", f"{vault.TOKEN}\n", 0o600)
    vm.put("/usr/local/lib/vault.py", Path(vault.__file__).read_text())
    vm.put("/etc/systemd/system/vault.socket", VAULT_SOCKET)
    vm.put("/etc/systemd/system/vault.service", VAULT_SERVICE)
    vm.run("systemctl enable -q vault.socket")
    setup.luks(lab.disk(4), passphrase=vault.KEY)
    setup.volume("cr_imap", lab.disk(4), keys=[FROM_VAULT, "prompt"])

    setup.luks(lab.disk(1), options="--type luks1 --pbkdf-force-iterations 1000")
    bind(vm, lab.disk(1), "tang", FIRST)
    setup.volume("cr_luks1", lab.disk(1), keys=["clevis"])

    setup.luks(lab.disk(2))
    enrol(
        vm, lab.disk(2), "--tpm2-device=auto", "--tpm2-pcrs=", "--tpm2-with-pin=yes",
        answers=[("PIN", PIN), ("PIN.*repeat", PIN)],
    )  # fmt: skip
    setup.volume("cr_pin", lab.disk(2), keys=["tpm2", "prompt"], unlock="manual")

    setup.luks(lab.disk(3))
    vm.run(
        f"softhsm2-util --init-token --free --label card --so-pin {CARD_PIN} --pin {CARD_PIN}"
        " && openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out /run/card.pem"
        f" && softhsm2-util --import /run/card.pem --token card --pin {CARD_PIN} --label key --id 01",
        timeout_s=SLOW_S,
    )
    enrol(
        vm,
        lab.disk(3),
        "--pkcs11-token-uri=pkcs11:token=card;object=key",
        answers=[("PIN", CARD_PIN)],
    )
    setup.volume("cr_card", lab.disk(3), keys=["pkcs11", "prompt"], unlock="manual")
    setup.write_config(reload=True)
    keystore(vm, setup)

    # What Clevis made of its servers' answers is a secret, too.
    bound = [vm.run(f"clevis luks pass -d {lab.disk(index)} -s {slot}", timeout_s=SLOW_S).out.strip()
             for index, slot in ((0, 2), (1, 1))]  # fmt: skip
    assert all(len(key) > 30 for key in bound)
    secrets = [PASSPHRASE, PIN, CARD_PIN, vault.KEY, vault.TOKEN, *bound]
    watch.install(vm, [*secrets, CONTROL])
    return "\n".join(secrets)


def keystore(vm: Vm, setup: lab.Lab) -> None:
    """One that the TPM opens, and a volume whose key lies there. As the manual says."""
    device, key = lab.disk(5), ["--key-file", "-"]
    made = ["vmcryptctl", "keystore", "init", "keys", "--device", device, *key]
    vm.run(made, stdin=PASSPHRASE.encode())
    enrol(vm, device, "--tpm2-device=auto", "--tpm2-pcrs=")
    setup.luks(lab.disk(6))
    vm.run('sed -i \'s/^keys = .*/keys = ["tpm2", "prompt"]/\' /etc/vmcryptd/conf.d/keys.toml')
    setup.volume("cr_data", lab.disk(6))
    setup.write_config(reload=True)
    vm.run("vmcryptctl unlock keys", timeout_s=SLOW_S)
    added = vm.run(
        ["vmcryptctl", "key", "add", "cr_data", "--keystore", "keys", *key],
        stdin=PASSPHRASE.encode(),
    )
    lab.paste_keys(vm, added.out, "cr_data")
    vm.run("vmcryptctl reload")


def bind(vm: Vm, device: str, pin: str, config: str) -> None:
    vm.run(
        ["clevis", "luks", "bind", "-y", "-k", "-", "-d", device, pin, config],
        stdin=PASSPHRASE.encode(),
        timeout_s=SLOW_S,
    )


@dataclass
class Site:
    host: Host
    vm: Vm
    person: Caller
    secrets: str  # one a line

    def source(self, volume: str) -> str:
        found = lab.volume(self.vm, volume)
        assert found["state"] == "unlocked", found
        return str(found["key_source"])

    def error_of(self, volume: str) -> str:
        """Why it waits."""
        found = lab.volume(self.vm, volume)
        assert found["state"] == "waiting", found
        return str(found["error"])

    def close(self, volume: str) -> None:
        self.vm.run(["vmcryptctl", "lock", volume])


@dataclass(frozen=True)
class Booted:
    snapshot: Snapshot
    secrets: str


@pytest.fixture(scope="module")
def booted(
    module_host: HostFactory, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Booted:
    """Nobody is there, and the servers are not up at first: in the end all is open that opens by itself."""
    tpm = Tpm(image, tmp_path_factory.mktemp("tpm"))
    host: Host = module_host(disks=["64M"] * 7, extra_qemu=tpm.qemu)
    tpm.plug_in()
    with host.boot() as vm:
        secrets = prepare(vm)
        vm.run("sync")
        vm.power_cut()
    tpm.plug_in()
    with host.boot() as vm:
        lab.wait_object(vm, "guest", "mail", "running", SLOW_S)
        lab.wait_object(vm, "volume", "cr_imap", "unlocked", SLOW_S)
        # Its server comes up later than the host.
        assert "cr_luks1" not in lab.mappings(vm)
        vm.run("systemctl start tang1.socket")
        lab.wait_object(vm, "volume", "cr_luks1", "unlocked", SLOW_S)
        lab.wait_state(vm, "ready")
        lab.wait_object(vm, "volume", "keys", "locked")
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(1, 0))
        Caller(vm)
        vm.run("systemctl stop sample")  # it keeps the machine busy
        return Booted(vm.save(), secrets)


@pytest.fixture
def site(
    host: HostFactory, booted: Booted, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    tpm = Tpm(image, tmp_path_factory.mktemp("tpm"))
    tpm.plug_in()
    machine: Host = host(snapshot=booted.snapshot, extra_qemu=tpm.qemu)
    with machine.resume() as vm:
        yield Site(machine, vm, Caller(vm), booted.secrets)


def test_nobody_is_there(site: Site) -> None:
    assert site.source("cr_mail") == "tpm2"
    assert site.source("cr_imap") == "exec"
    assert site.source("cr_luks1") == "clevis"
    # A keystore that fetches its key by itself is open for as long as it takes.
    assert site.source("cr_data") == "file"
    journal = site.vm.run("journalctl -b -o cat -u vmcryptd").out
    assert "volume keys is open (tpm2), asked for by" in journal
    assert f"volume cr_imap is open ({FROM_VAULT}), asked for by" in journal


def test_one_after_the_other_is_taken_away(site: Site) -> None:
    vm = site.vm
    vm.run("systemctl start sample")
    vm.run("vmcryptctl stop mail")
    site.close("cr_mail")
    # The TPM does not recognise the machine any more. One of two servers is down.
    vm.run(f"tpm2_pcrextend 16:sha256={'5a' * 32}")
    vm.run("vmcryptctl unlock cr_mail", timeout_s=SLOW_S)
    assert site.source("cr_mail") == "clevis"

    # Now both are.
    site.close("cr_mail")
    vm.run("systemctl stop tang1.socket")
    unlocking = site.person.begin("Unlock", "cr_mail")
    site.person.question("Passphrase for volume cr_mail", timeout_s=SLOW_S)
    error = site.error_of("cr_mail")
    assert "tpm2: " in error
    assert "clevis: " in error
    journal = vm.run("journalctl -b -o cat -u vmcryptd").out
    assert "volume cr_mail: tpm2: " in journal
    assert "volume cr_mail: clevis: " in journal
    site.person.question("Passphrase for volume cr_mail", PASSPHRASE)
    site.person.ended(unlocking)
    assert site.source("cr_mail") == "prompt"

    # While a person is waited for, a server that comes back is quicker.
    site.close("cr_mail")
    unlocking = site.person.begin("Unlock", "cr_mail")
    site.person.question("Passphrase for volume cr_mail", timeout_s=SLOW_S)
    vm.run("systemctl start tang2.socket")
    site.person.ended(unlocking, SLOW_S)
    assert site.source("cr_mail") == "clevis"
    vm.wait_until("! ls /run/systemd/ask-password/ask.*")
    assert_no_secret_is_left(site)


def test_rotated_server_keys(site: Site) -> None:
    vm = site.vm
    before = vm.run("ls /var/lib/tang1").out
    vm.run("/usr/libexec/tangd-rotate-keys -d /var/lib/tang1")
    assert vm.run("ls /var/lib/tang1").out != before
    site.close("cr_luks1")
    vm.run("vmcryptctl unlock cr_luks1", timeout_s=SLOW_S)
    assert site.source("cr_luks1") == "clevis"


def test_a_vault_that_takes_the_token_no_more(site: Site) -> None:
    vm = site.vm
    site.close("cr_imap")
    vm.put("/etc/vmcryptd/vault-token", "s.another\n", 0o600)
    unlocking = site.person.begin("Unlock", "cr_imap")
    site.person.question("Passphrase for volume cr_imap", timeout_s=SLOW_S)
    assert "fetch-from-vault failed: exit status" in site.error_of("cr_imap")
    site.person.question("Passphrase for volume cr_imap", vault.KEY, timeout_s=SLOW_S)
    site.person.ended(unlocking, SLOW_S)
    assert site.source("cr_imap") == "prompt"
    journal = vm.run("journalctl -b -o cat -u vmcryptd").out
    assert "vault: the token in /etc/vmcryptd/vault-token is not valid (any more)" in journal
    assert f"volume cr_imap: {FROM_VAULT}: the key command" in journal


def test_a_pin_has_its_own_question(site: Site) -> None:
    site.vm.run("systemctl start sample")
    unlocking = site.person.begin("Unlock", "cr_pin")
    site.person.question("PIN of .* of volume cr_pin", timeout_s=SLOW_S)
    assert "wants its PIN: `systemd-tty-ask-password-agent`" in site.error_of("cr_pin")
    site.person.question("PIN of .* of volume cr_pin", PASSPHRASE, timeout_s=SLOW_S)
    site.person.question("That PIN was wrong", PIN, timeout_s=SLOW_S)
    site.person.ended(unlocking, SLOW_S)
    assert site.source("cr_pin") == "tpm2"
    assert_no_secret_is_left(site)


def test_a_smart_card(site: Site) -> None:
    site.vm.run("systemctl start sample")
    unlocking = site.person.begin("Unlock", "cr_card")
    site.person.question("PIN of .* of volume cr_card", CARD_PIN, timeout_s=SLOW_S)
    site.person.ended(unlocking, SLOW_S)
    assert site.source("cr_card") == "pkcs11"
    assert_no_secret_is_left(site)

    # Without the card it is a volume like any other.
    site.close("cr_card")
    site.vm.run("mv /var/lib/softhsm/tokens /var/lib/softhsm/away && mkdir /var/lib/softhsm/tokens")
    unlocking = site.person.begin("Unlock", "cr_card")
    site.person.question("Passphrase for volume cr_card", PASSPHRASE, timeout_s=SLOW_S)
    site.person.ended(unlocking, SLOW_S)
    assert site.source("cr_card") == "prompt"


def assert_no_secret_is_left(site: Site) -> None:
    """Nor was there one while keys came in. Each search finds what is there, too."""
    vm = site.vm
    assert watch.sampled(vm, CONTROL) == []
    pid = vm.run("systemctl show -P MainPID vmcryptd").out.strip()
    vm.run("systemd-cat", stdin=CONTROL.encode())
    vm.put("/run/vmcryptd/planted", CONTROL)
    site.person.refusal("Unlock", CONTROL)
    vm.wait_until(f"grep -qaF {CONTROL} {watch.BUS}")
    vm.run("journalctl --sync")
    journal, places = "journalctl -o export", f"/run /tmp /var/log /var/lib/vmcryptd {watch.BUS}"
    assert lab.in_memory(vm, pid, site.secrets) == []
    assert lab.in_files(vm, places, site.secrets) == []
    assert watch.in_output(vm, journal, site.secrets) == []
    assert watch.in_output(vm, "dmesg", site.secrets) == []
    assert lab.in_memory(vm, pid, "vmcryptd") != []
    assert {"/run/vmcryptd/planted", watch.BUS} <= set(lab.in_files(vm, places, CONTROL))
    assert watch.in_output(vm, journal, CONTROL) != []


@pytest.mark.long
def test_boots_without_them(site: Site) -> None:
    """Without its TPM and with one of the two servers; then without any of them."""
    host, vm = site.host, site.vm
    vm.run("systemctl enable -q tang1.socket")
    assert vm.poweroff() == "guest-shutdown"
    host.extra_qemu = ()
    with host.boot(wait=False) as vm:
        lab.wait_object(vm, "guest", "mail", "running", SLOW_S)
        assert lab.volume(vm, "cr_mail")["key_source"] == "clevis"
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(2, 1))
        lab.wait_object(vm, "volume", "cr_luks1", "unlocked", SLOW_S)
        lab.wait_object(vm, "volume", "keys", "waiting", SLOW_S)
        assert "tpm2: " in lab.volume(vm, "keys")["error"]
        Caller(vm).question("Passphrase for volume keys", PASSPHRASE)
        lab.wait_object(vm, "volume", "cr_data", "unlocked", SLOW_S)
        lab.wait_state(vm, "ready", timeout_s=SLOW_S)
        vm.run("systemctl disable -q tang1.socket")
        assert vm.poweroff() == "guest-shutdown"
    with host.boot(wait=False) as vm:
        for name in ("cr_mail", "keys"):
            lab.wait_object(vm, "volume", name, "waiting", SLOW_S)
        # Whichever of them was the first to wait is asked for; what is typed is tried on both.
        Caller(vm).question("Passphrase for volume", PASSPHRASE)
        lab.wait_object(vm, "guest", "mail", "running", SLOW_S)
        assert lab.volume(vm, "cr_mail")["key_source"] == "prompt"
        vm.wait_counters("/dev/mapper/cr_mail", guest.Counters(3, 2))
        lab.wait_object(vm, "volume", "cr_data", "unlocked", SLOW_S)
        for secret in site.secrets.splitlines():
            assert secret not in vm.console.transcript
