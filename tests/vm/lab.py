# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests put on a test host: volumes, guests, configuration; and how they look at the result."""

import base64
import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import scan_memory
from tests.vm import guest
from tests.vm.host import RUN_TIMEOUT_S, Background, Host, Vm
from vmcryptd.cli import render

# A canary: the tests look for it wherever it must never be.
PASSPHRASE = "canary-Zw7pQ4-correct"
WRONG = "canary-Zw7pQ4-wrong"

# Cheap to derive, because the machine is emulated; what derivation costs is the benchmark's matter.
CHEAP = "--pbkdf argon2id --pbkdf-memory 1024 --pbkdf-parallel 1 --pbkdf-force-iterations 4"
CONFIG = "/etc/vmcryptd/vmcryptd.toml"
MANAGER = "org.vmcryptd1 /org/vmcryptd1 org.vmcryptd1.Manager"


def disk(index: int) -> str:
    return f"/dev/disk/by-id/virtio-disk{index}"


def format_disk(host: Host, index: int, passphrase: str = PASSPHRASE, options: str = CHEAP) -> None:
    """Make a LUKS2 header on one of a host's disks, before it is plugged in: from outside, which is not emulated."""
    command = ["luksFormat", "--batch-mode", "--type", "luks2", *options.split(), "--key-file", "-"]
    subprocess.run(
        [*host.image.tool("cryptsetup"), *command, host.disk_path(index)],
        input=passphrase.encode(),
        check=True,
    )


@dataclass
class Lab:
    """A host in the making; `vm` is the boot that it is prepared in."""

    vm: Vm
    config: list[str] = field(default_factory=list)

    def luks(
        self,
        device: str,
        *,
        passphrase: str = PASSPHRASE,
        options: str = CHEAP,
        header: str = "",
    ) -> str:
        """Format a device, with its header in a file if that is given; returns the header's UUID."""
        if header:
            options += f" --header {header}"
        self.vm.run(
            f"cryptsetup luksFormat --batch-mode --type luks2 {options} --key-file - {device}",
            stdin=passphrase.encode(),
        )
        return self.vm.run(f"cryptsetup luksUUID {header or device}").out.strip()

    def open(self, device: str, name: str, *, passphrase: str = PASSPHRASE) -> str:
        self.vm.run(f"cryptsetup open --key-file - {device} {name}", stdin=passphrase.encode())
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
        self.vm.run(
            f"dd of={quoted} conv=notrunc,fsync status=none", stdin=guest.disk_image(variant)
        )

    def domain(self, name: str, *disks: str, autostart: bool = True, xml: str = "") -> None:
        self.vm.put(f"/root/{name}.xml", xml or guest.domain_xml(name, *disks))
        self.vm.run(f"virsh -q define /root/{name}.xml")
        if autostart:
            self.vm.run(f"virsh -q autostart {name}")

    def encrypted_guest(
        self,
        name: str,
        device: str,
        *,
        variant: guest.Variant = guest.Variant.POLITE,
        **keys: object,
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
        self.vm.put(CONFIG, "\n".join([extra, *self.config]))
        if reload:
            self.vm.run("vmcryptctl reload")


def paste_keys(vm: Vm, shown: str, volume: str) -> None:
    """Put the line that `vmcryptctl key add --keystore` printed into the volume's table."""
    [line] = re.findall(r"^    keys = .*$", shown, re.MULTILINE)
    text = vm.get(CONFIG).decode()
    assert f"[volume.{volume}]\n" in text
    vm.put(CONFIG, text.replace(f"[volume.{volume}]\n", f"[volume.{volume}]\n{line}\n"))


def type_secret(vm: Vm, text: str) -> None:
    """Answer the question on the console, once the terminal does not echo any more.

    systemd-ask-password shows the question first and switches the echo off after that, which a person does not notice.
    """
    vm.wait_until("stty -F /dev/ttyS0 -a | grep -qw -- -echo")
    vm.console.type(text + "\n")


def objects(vm: Vm) -> dict[str, dict[str, dict[str, Any]]]:
    """What busctl tells of every object: its properties, by interface."""
    call = "busctl --json=short call org.vmcryptd1 /org/vmcryptd1 org.freedesktop.DBus"
    told = vm.run(
        f"{call}.Properties GetAll s org.vmcryptd1.Manager && {call}.ObjectManager GetManagedObjects"
    )
    manager, others = (json.loads(line)["data"][0] for line in told.out.splitlines())
    return {
        path: {
            interface: {name: value["data"] for name, value in properties.items()}
            for interface, properties in interfaces.items()
        }
        for path, interfaces in {
            "/org/vmcryptd1": {"org.vmcryptd1.Manager": manager},
            **others,
        }.items()
    }


def status(vm: Vm) -> dict[str, Any]:
    """What `vmcryptctl status --json` says. It is not asked: that takes an emulated machine seconds, busctl none."""
    found = objects(vm)

    def all_of(kind: str) -> list[dict[str, Any]]:
        interface = f"org.vmcryptd1.{kind}"
        return [interfaces[interface] for interfaces in found.values() if interface in interfaces]

    [host] = all_of("Manager")
    return render.status_members(host, all_of("Volume"), all_of("Guest"), all_of("Job"))


def volume(vm: Vm, name: str) -> dict[str, Any]:
    """The same of it alone."""
    [found] = [one for one in status(vm)["volumes"] if one["name"] == name]
    return dict(found)


def volume_states(vm: Vm) -> dict[str, str]:
    return {volume["name"]: volume["state"] for volume in status(vm)["volumes"]}


def guest_states(vm: Vm) -> dict[str, str]:
    return {domain["name"]: domain["state"] for domain in status(vm)["guests"]}


def wait_state(vm: Vm, *states: str, timeout_s: float = RUN_TIMEOUT_S) -> None:
    """Until the daemon says so of the whole."""
    pattern = f's "({"|".join(states)})"'
    vm.wait_until(f"busctl get-property {MANAGER} State | grep -qxE '{pattern}'", timeout_s)


def wait_object(vm: Vm, kind: str, name: str, state: str, timeout_s: float = RUN_TIMEOUT_S) -> None:
    """Until the daemon says so of a volume or guest."""
    where = f"org.vmcryptd1 /org/vmcryptd1/{kind}/{escaped(name)} org.vmcryptd1.{kind.capitalize()}"
    vm.wait_until(f"busctl get-property {where} State | grep -qx 's \"{state}\"'", timeout_s)


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


def in_memory(vm: Vm, pid: str, needle: str) -> list[str]:
    """The regions of a process's memory that hold it, or one of its lines."""
    vm.put("/root/scan-memory", Path(scan_memory.__file__).read_bytes())
    command = ["python3", "/root/scan-memory", pid]
    return vm.run(command, stdin=needle.encode()).out.splitlines()


def in_files(vm: Vm, places: str, needle: str, *, without: str = "") -> list[str]:
    """The files that hold it, or one of its lines."""
    command = f"grep -rlsaF -D skip {without} -f - {places}"
    return vm.run(command, stdin=needle.encode() + b"\n", check=False).out.splitlines()


class Refused(Exception):
    """The daemon answered a call with an error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name.removeprefix("org.vmcryptd1.Error.")
        self.text = text


class Caller:
    """A user of the host who makes calls on its bus, with descriptors, and learns the errors' names."""

    def __init__(self, vm: Vm, user: str = "root") -> None:
        self.vm = vm
        self._socket = f"/run/caller-{user}"
        if vm.run(["nc", "-zU", self._socket], check=False).code == 0:
            return  # it runs since before the machine was saved
        vm.put("/usr/local/lib/caller", Path(__file__).with_name("caller.py").read_bytes())
        vm.background(["python3", "/usr/local/lib/caller", self._socket, user])
        vm.wait_until(f"nc -zU {self._socket}")

    def begin(self, member: str, *body: str, key: str | None = None) -> Background:
        """Make a call whose answer `ended` gives; a key is handed in as a pipe."""
        request: dict[str, Any] = {
            "member": member,
            "signature": "s" * len(body) + "h" * (key is not None),
            "body": [*body, *([] if key is None else [0])],
        }
        if key is not None:
            request["key"] = base64.b64encode(key.encode()).decode()
        return self._begin(request)

    def ended(self, call: Background, timeout_s: float = RUN_TIMEOUT_S) -> list[Any]:
        """The result of a call that was begun. Raises Refused."""
        answer = json.loads(call.wait(timeout_s).out)
        if "error" in answer:
            raise Refused(answer["error"], answer["text"])
        assert isinstance(answer["out"], list)
        return answer["out"]

    def call(self, member: str, *body: str, key: str | None = None) -> list[Any]:
        """Raises Refused."""
        return self.ended(self.begin(member, *body, key=key))

    def refusal(self, member: str, *body: str, key: str | None = None) -> Refused:
        """Make a call that has to fail."""
        try:
            result = self.call(member, *body, key=key)
        except Refused as error:
            return error
        raise AssertionError(f"{member} {body} was to be refused, and returned {result}")

    def wait(
        self,
        kind: str,
        name: str,
        *values: object,
        prop: str = "State",
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> None:
        """Until a property of a volume or guest (or of the whole, as "manager") is one of these."""
        interface = f"org.vmcryptd1.{kind.capitalize()}"
        request: dict[str, Any] = {"until": prop, "interface": interface, "values": list(values)}
        if kind != "manager":
            request["path"] = f"/org/vmcryptd1/{kind}/{escaped(name)}"
        answer = self._ask({**request, "timeout_s": timeout_s}, timeout_s)
        assert "late" not in answer, (
            f"{kind} {name}: {prop} did not become {' or '.join(map(str, values))}: {answer}"
        )

    def question(
        self, pattern: str, answer: str | None = None, timeout_s: float = RUN_TIMEOUT_S
    ) -> str:
        """Wait until systemd's agents are asked this; answer it, if there is an answer. Returns its text."""
        request: dict[str, Any] = {"question": pattern, "timeout_s": timeout_s}
        if answer is not None:
            request["answer"] = base64.b64encode(answer.encode()).decode()
        found = self._ask(request, timeout_s)
        assert "late" not in found, f"no question for {pattern!r}; questions: {found['out']}"
        return str(found["out"][0])

    def flood(self, count: int, messages: Sequence[Sequence[Any]]) -> dict[str, int]:
        """Many bad calls in a row: path, interface, member, signature, body, number of descriptors. How they ended."""
        answer = self._ask({"flood": count, "messages": messages}, 600)
        assert "error" not in answer, answer
        counts = answer["out"][0]
        assert isinstance(counts, dict)
        return counts

    def _begin(self, request: Mapping[str, Any]) -> Background:
        line = json.dumps(request).encode() + b"\n"
        return self.vm.background(["nc", "-U", self._socket], stdin=line)

    def _ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = json.loads(self._begin(request).wait(timeout_s + 60).out)
        assert isinstance(answer, dict)
        return answer


def escaped(name: str) -> str:
    """A name as the last part of an object's path."""
    return "".join(c if c.isalnum() and c.isascii() else f"_{ord(c):02x}" for c in name)
