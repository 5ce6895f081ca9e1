# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests put on a test host: volumes, guests, configuration; and how they look at the result."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.vm import guest
from tests.vm.host import Vm

# A canary: the tests look for it wherever it must never be.
PASSPHRASE = "canary-Zw7pQ4-correct"
WRONG = "canary-Zw7pQ4-wrong"

# Cheap to derive, because the machine is emulated; what derivation costs is the benchmark's matter.
CHEAP = "--pbkdf argon2id --pbkdf-memory 1024 --pbkdf-parallel 1 --pbkdf-force-iterations 4"
MANAGER = "org.vmcryptd1 /org/vmcryptd1 org.vmcryptd1.Manager"


def disk(index: int) -> str:
    return f"/dev/disk/by-id/virtio-disk{index}"


@dataclass
class Lab:
    """A host in the making; `vm` is the boot that it is prepared in."""

    vm: Vm
    config: list[str] = field(default_factory=list)

    def luks(self, device: str, *, passphrase: str = PASSPHRASE, options: str = CHEAP) -> str:
        """Format a device; returns the header's UUID."""
        self.vm.run(
            f"cryptsetup luksFormat --batch-mode --type luks2 {options} --key-file - {device}",
            stdin=passphrase.encode(),
        )
        return self.vm.run(f"cryptsetup luksUUID {device}").out.strip()

    def open(self, device: str, name: str, *, passphrase: str = PASSPHRASE) -> str:
        self.vm.run(
            f"cryptsetup open --key-file - {device} {name}", stdin=passphrase.encode()
        )
        return f"/dev/mapper/{name}"

    def close(self, name: str) -> None:
        self.vm.run(f"udevadm settle; cryptsetup close {name}")

    def volume(self, name: str, device: str, **keys: object) -> None:
        """A table of the configuration."""
        self.table(f"volume.{name}", {"device": device, **keys})

    def table(self, name: str, keys: Mapping[str, object]) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        self.config.append("\n".join([f"[{name}]", *lines, ""]))

    def boot_sector(self, device: str, variant: guest.Variant = guest.Variant.POLITE) -> None:
        """Put the guest that counts onto a device or file."""
        quoted = shlex.quote(device)
        self.vm.run(f"dd of={quoted} conv=notrunc,fsync status=none", stdin=guest.disk_image(variant))

    def domain(self, name: str, *disks: str, autostart: bool = True, xml: str = "") -> None:
        self.vm.put(f"/root/{name}.xml", xml or guest.domain_xml(name, *disks))
        self.vm.run(f"virsh -q define /root/{name}.xml")
        if autostart:
            self.vm.run(f"virsh -q autostart {name}")

    def encrypted_guest(
        self, name: str, device: str, *, variant: guest.Variant = guest.Variant.POLITE, **keys: object
    ) -> str:
        """One volume on a device and one guest on it, shut off and closed. Returns the volume's name."""
        volume = f"cr_{name}"
        self.luks(device)
        mapping = self.open(device, volume)
        self.boot_sector(mapping, variant)
        self.close(volume)
        self.volume(volume, device, **keys)
        self.domain(name, mapping)
        return volume

    def write_config(self, extra: str = "", *, reload: bool = False) -> None:
        self.vm.put("/etc/vmcryptd/vmcryptd.toml", "\n".join([extra, *self.config]))
        if reload:
            self.vm.run("vmcryptctl reload")


def type_secret(vm: Vm, text: str) -> None:
    """Answer the question on the console, once the terminal does not echo any more.

    systemd-ask-password shows the question first and switches the echo off after that, which a person does not notice.
    """
    vm.wait_until("stty -F /dev/ttyS0 -a | grep -qw -- -echo")
    vm.console.type(text + "\n")


def status(vm: Vm) -> dict[str, Any]:
    answer = json.loads(vm.run("vmcryptctl status --json").out)
    assert isinstance(answer, dict)
    return answer


def volume_states(vm: Vm) -> dict[str, str]:
    return {volume["name"]: volume["state"] for volume in status(vm)["volumes"]}


def guest_states(vm: Vm) -> dict[str, str]:
    return {domain["name"]: domain["state"] for domain in status(vm)["guests"]}


def wait_state(vm: Vm, state: str, timeout_s: float = 120) -> None:
    """Until the daemon says so of the whole."""
    vm.wait_until(f"busctl get-property {MANAGER} State | grep -qx 's \"{state}\"'", timeout_s)


def unlock(vm: Vm, *names: str, passphrase: str = PASSPHRASE, check: bool = True) -> int:
    """Hand a passphrase in as `vmcryptctl unlock --key-file -` takes it; returns the exit status."""
    command: Sequence[str] = ["vmcryptctl", "unlock", "--key-file", "-", *names]
    return vm.run(command, stdin=passphrase.encode(), check=check).code


def counters(vm: Vm, volume: str) -> guest.Counters:
    return vm.read_counters(f"/dev/mapper/{volume}")


def mappings(vm: Vm) -> list[str]:
    """The names of all LUKS mappings."""
    lines = vm.run("dmsetup info -c --noheadings --separator ' ' -o name,uuid").out.splitlines()
    return [line.split()[0] for line in lines if " CRYPT-LUKS" in line]
