# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipe that fetches keys from OpenBao or Vault, against a small server that answers as these do.

After the API of OpenBao 2 and Vault 1 (api-docs: secret/kv/kv-v2, system/health, auth/token): 403 for a token that is
wrong or may not, 404 for what is not there, 503 for everything while the server is sealed.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.lib import digest
from vmcryptd.adapters.keys import SystemKeys
from vmcryptd.errors import KeyUnavailableError
from vmcryptd.model import KeySource, SourceKind, VolumeSpec

RECIPE = Path(__file__).resolve().parents[2] / "config/examples/fetch-from-vault"
VOLUME = VolumeSpec("cr_imap", "/dev/vg0/imap")
TOKEN = "s.canary-token-5Tq8"
KEY = "canary-vault-Rm2x"


class Server(ThreadingHTTPServer):
    sealed = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        is_known = self.headers["X-Vault-Token"] == TOKEN
        if self.server.sealed:
            self._answer(503, {"errors": ["Vault is sealed"]})
        elif path == "/v1/sys/health":
            self._answer(200, {"sealed": False})
        elif not is_known:
            self._answer(403, {"errors": ["permission denied"]})
        elif path == "/v1/auth/token/lookup-self":
            self._answer(200, {"data": {}})
        elif path == "/v1/secret/data/vmcryptd/cr_imap":
            self._answer(200, {"data": {"data": {"key": KEY}, "metadata": {"version": 1}}})
        else:
            self._answer(404, {"errors": []})

    def _answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


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
    ("trouble", "told"),
    [
        ("token", "the token in .* is not valid"),
        ("sealed", "is sealed: unseal it"),
        ("away", "does not answer"),
        ("path", "there is no field 'key' in secret/vmcryptd/nothing"),
        ("file", "cannot be read"),
    ],
)
def test_what_went_wrong_is_one_line(
    server: Server, token: Path, trouble: str, told: str, capfd: pytest.CaptureFixture[str]
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
    assert re.search(told, said)
    assert said.count("\n") == 1
    assert TOKEN not in said
