# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipe that fetches keys from OpenBao or Vault, against a server that answers as these do."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib import digest
from tests.vault import KEY, TOKEN, Answers, Server
from vmcryptd.adapters.keysources.sources import SystemKeys
from vmcryptd.core.errors import KeyUnavailableError
from vmcryptd.core.model import KeySource, SourceKind, VolumeSpec

RECIPE = Path(__file__).resolve().parents[2] / "config/examples/fetch-from-vault"
VOLUME = VolumeSpec("cr_imap", "/dev/vg0/imap")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(command: str) -> str:
    """The digest of the key that vmcryptd gets."""

    async def go() -> str:
        key = await SystemKeys(credentials=None).fetch(KeySource(SourceKind.EXEC, command), VOLUME)
        try:
            return digest(Path(f"/proc/self/fd/{key.fileno()}").read_text())  # type: ignore[attr-defined]
        finally:
            key.close()

    return asyncio.run(go())


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def command(token: Path, server: Server, path: str = "vmcryptd/cr_imap") -> str:
    return f"/usr/bin/env VAULT_TOKEN_FILE={token} {RECIPE} {server.address} secret {path}"


def test_the_key_arrives_as_it_is(server: Server, token: Path) -> None:
    assert fetch(command(token, server)) == digest(KEY)


@pytest.mark.parametrize(
    ("trouble", "shown"),
    [
        ("token", "the token in .* is not valid"),
        ("sealed", "is sealed: unseal it"),
        ("away", "does not answer"),
        ("path", "there is no field 'key' in secret/vmcryptd/nothing"),
        ("file", "cannot be read"),
    ],
)
def test_what_went_wrong_is_one_line(
    server: Server, token: Path, trouble: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = "vmcryptd/nothing" if trouble == "path" else "vmcryptd/cr_imap"
    line = command(token, server, path)
    match trouble:
        case "token":
            token.write_text("s.other\n")
        case "sealed":
            server.sealed = True
        case "away":
            server.shutdown()
            server.server_close()
        case "file":
            token.unlink()
    with pytest.raises(KeyUnavailableError, match="exit status 1"):
        fetch(line)
    said = capfd.readouterr().err
    assert re.search(shown, said)
    assert said.count("\n") == 1
    assert TOKEN not in said
