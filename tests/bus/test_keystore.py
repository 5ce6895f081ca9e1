# SPDX-License-Identifier: LGPL-2.1-or-later
"""`vmcryptctl keystore init`: the daemon makes it, the command line asks and shows how far it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bus.simulated import ALPHA, Host, Terminal, ctl, host
from vmcryptd.cli import main

__all__ = ["host"]  # a fixture

MAIL = """
[volume.mail]
device = "/dev/vg/mail"
[sim]
empty = ["/dev/vg/keys"]
"""


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "key").write_text(ALPHA)
    return str(tmp_path / "key")


def test_it_is_there_at_once(host: Host, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    host.start(MAIL)
    argv = ["keystore", "init", "keys", "--file", "/var/lib/keys.luks", "--key-file", key]
    assert main.main(argv) == 0
    said = capsys.readouterr()
    assert said.out == "keystore keys is made: /var/lib/keys.luks, configured in conf.d/keys.toml\n"
    assert "vmcryptctl key add VOLUME --keystore keys" in said.err
    assert host.states()["keys"] == "locked"
    host.unlock("keys", ALPHA)
    assert host.states()["keys"] == "unlocked"
    assert "keystore keys is made: /var/lib/keys.luks" in host.journal.read_text()


def test_the_passphrase_is_typed_twice(host: Host) -> None:
    host.start(MAIL)
    terminal = Terminal("keystore", "init", "keys", "--device", "/dev/vg/keys")
    terminal.expect("New passphrase for keys:")
    terminal.type(ALPHA + "\n")
    terminal.expect("once more:")
    terminal.type(ALPHA + "\n")
    terminal.expect("keystore keys is made: /dev/vg/keys")
    assert terminal.end() == 0
    host.unlock("keys", ALPHA)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "either a new file"),
        (["--file", "keys"], 2, "no absolute path"),
        (["--file", "/srv/keys", "--size", "much"], 2, "no size such as 32M"),
        (["--file", "/srv/keys", "--size", "19M"], 2, "from 20 MiB"),
        (["--file", "/tmp/keys"], 2, "do not stay"),
        (["--device", "/dev/vg/mail"], 1, "is not empty"),
        (["--name", "x"], 2, "--name"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_typed(
    arguments: list[str], code: int, text: str, host: Host
) -> None:
    host.start(MAIL)
    terminal = Terminal("keystore", "init", "keys", *arguments)
    terminal.expect(text)
    assert terminal.end() == code
    assert "keys" not in host.states()


def test_a_name_that_is_taken(host: Host, key: str) -> None:
    host.start(MAIL)
    argv = ["keystore", "init", "mail", "--file", "/srv/keys", "--key-file", key]
    refused = ctl(*argv)
    assert refused.code == 2
    assert "mail" in refused.err


def test_without_a_daemon_nothing_is_made(host: Host, key: str) -> None:
    argv = ["keystore", "init", "keys", "--file", "/srv/keys", "--key-file", key]
    assert ctl(*argv).code == 5
