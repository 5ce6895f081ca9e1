# SPDX-License-Identifier: LGPL-2.1-or-later
"""README's ten lines, word by word, on a host on which nothing is configured."""

import re

import pytest

from tests.vm import lab
from tests.vm.conftest import HostFactory
from tests.vm.guest import Counters
from tests.vm.host import PROJECT, Vm

SECTION = "Ten lines of configuration"
SLOW_S = 300.0  # Argon2id with cryptsetup's own costs, emulated
# What the commands ask at a terminal: question, answer, and whether the answer is not echoed.
ASKED = {
    "cryptsetup": (
        (r"in capital letters\): ", "YES", False),
        ("Enter passphrase for [^:]*: ", lab.PASSPHRASE, True),
        ("Verify passphrase: ", lab.PASSPHRASE, True),
    ),
    "vmcryptctl unlock": (("Passphrase for [^:]*:", lab.PASSPHRASE, True),),
}


def blocks() -> list[str]:
    """The section's code, each block as it stands there."""
    text = (PROJECT / "README.md").read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    [found] = [one for one in section if one.startswith(SECTION)]
    return re.findall(r"^```toml\n(?:.*\n)*?```\n|(?:^    .*\n)+", found, re.MULTILINE)


def typed(vm: Vm, command: str) -> None:
    """Type a command at the console and answer what it asks."""
    without_comment = re.sub(r"\s+# .*", "", command)
    # On one line: programs that ask discard what is typed ahead.
    vm.console.type(f"{without_comment}; echo exit=$?\n")
    for begin, questions in ASKED.items():
        if command.startswith(begin):
            for question, answer, is_secret in questions:
                vm.console.expect(question, SLOW_S)
                if is_secret:
                    lab.type_secret(vm, answer)
                else:
                    vm.console.type(f"{answer}\n")
    ended = vm.console.expect(r"exit=(\d+)", SLOW_S)
    vm.console.expect(r"root@.*# ")
    assert ended[1] == "0", f"{command}: {vm.console.transcript[-2000:]}"


@pytest.mark.long
def test_the_ten_lines_end_with_a_clean_check(host: HostFactory) -> None:
    with host(disks=["160M"]).resume() as vm:
        vm.run(f"pvcreate -q {lab.disk(0)} && vgcreate -q volgrp4 {lab.disk(0)}")
        vm.run("lvcreate -q -y -L 8M -n lvimap volgrp4")
        setup = lab.Lab(vm)
        setup.boot_sector("/dev/volgrp4/lvimap")
        setup.domain("imap", "/dev/volgrp4/lvimap", autostart=False)

        vm.console.expect("login: ")
        vm.console.type("root\n")
        vm.console.expect(r"root@.*# ")
        # `virsh edit` opens an editor; this one writes the new source in the place of the old one.
        vm.console.type(
            "export EDITOR='sed -i s,/dev/volgrp4/lvimap,/dev/mapper/cr_imap_encr,'; stty cols 200\n"
        )
        vm.console.expect(r"root@.*# ")
        for block in blocks():
            if block.startswith("```toml"):
                vm.put(lab.CONFIG, block.removeprefix("```toml\n").removesuffix("```\n"))
                continue
            for line in block.splitlines():
                typed(vm, line.strip())

        checked = vm.run("vmcryptctl check", check=False)
        assert (checked.code, checked.out, checked.err) == (
            0, "nothing is wrong: boot will work\n", "",
        )  # fmt: skip
        lab.wait_state(vm, "ready")
        assert lab.volume_states(vm) == {"cr_imap_encr": "unlocked"}
        assert lab.guest_states(vm) == {"imap": "running"}
        vm.wait_counters("/dev/mapper/cr_imap_encr", Counters(1, 0))
